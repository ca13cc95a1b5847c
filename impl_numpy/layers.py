"""What a framework would give: each layer with its backward directly under its forward.

A layer is f(p, name, x) -> y, back; back(dy, g) adds the gradients of its parameters into g and
returns dx. Images are [B, H, W, C]; parameters stand in the layouts of S7 (linear OI, conv OIHW).
"""

import numpy as np

EPS = 1e-6  # of every GroupNorm (S7)


def add(g: dict, name: str, value: np.ndarray) -> None:
    """g[name] += value, where nothing there counts as zero."""
    g[name] = g[name] + value if name in g else value


def time_table(timesteps: int, width: int) -> np.ndarray:
    """[T, width] in float64: the sines of every time, then the cosines."""
    half = width // 2  # S7
    frequencies = np.exp(-np.log(1e4) * np.arange(half) / (half - 1))
    angles = np.arange(timesteps)[:, None] * frequencies
    return np.concatenate([np.sin(angles), np.cos(angles)], axis=1)


def linear(p: dict, name: str, x: np.ndarray):
    """x [..., I] -> [..., O]."""
    w = p[f"{name}.weight"]

    def back(dy, g):
        rows = dy.reshape(-1, dy.shape[-1])
        add(g, f"{name}.bias", rows.sum(0))
        add(g, f"{name}.weight", rows.T @ x.reshape(-1, x.shape[-1]))
        return dy @ w

    return x @ w.T + p[f"{name}.bias"], back


def embedding(p: dict, name: str, rows: np.ndarray):
    """Row numbers [B] -> [B, O]; the gradients of one row are summed."""
    w = p[f"{name}.weight"]

    def back(dy, g):
        dw = np.zeros_like(w)
        np.add.at(dw, rows, dy)
        add(g, f"{name}.weight", dw)

    return w[rows], back


def conv(p: dict, name: str, x: np.ndarray, stride: int = 1, pad: tuple[int, int] = (1, 1)):
    """x [B, H, W, I] -> [B, H', W', O]: every window as a row, all rows in one product."""
    w = p[f"{name}.weight"]
    out, channels, k, _ = w.shape
    kernel = w.transpose(2, 3, 1, 0).reshape(-1, out)  # [k*k*I, O]
    padded = np.pad(x, ((0, 0), pad, pad, (0, 0)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (k, k), axis=(1, 2))
    windows = windows[:, ::stride, ::stride].transpose(0, 1, 2, 4, 5, 3)  # [B, H', W', k, k, I]
    shape = windows.shape
    cols = windows.reshape(-1, k * k * channels)

    def back(dy, g):
        rows = dy.reshape(-1, out)
        add(g, f"{name}.bias", rows.sum(0))
        dkernel = (cols.T @ rows).reshape(k, k, channels, out)
        add(g, f"{name}.weight", dkernel.transpose(3, 2, 0, 1))
        dcols = (rows @ kernel.T).reshape(shape)
        dpadded = np.zeros_like(padded)
        for i in range(k):  # every window gives its gradient back to where it was read
            for j in range(k):
                ends = i + stride * shape[1], j + stride * shape[2]
                dpadded[:, i : ends[0] : stride, j : ends[1] : stride] += dcols[:, :, :, i, j]
        return dpadded[:, pad[0] : pad[0] + x.shape[1], pad[0] : pad[0] + x.shape[2]]

    return (cols @ kernel + p[f"{name}.bias"]).reshape(*shape[:3], out), back


def group_norm(p: dict, name: str, x: np.ndarray, groups: int):
    """x [B, H, W, C], normalised over H, W and neighbouring channels, a group each, then scaled."""
    gamma = p[f"{name}.weight"]
    grouped = x.reshape(x.shape[0], -1, groups, x.shape[-1] // groups)  # [B, H*W, G, C/G]
    centred = grouped - grouped.mean((1, 3), keepdims=True)  # two passes: no cancellation
    rstd = 1 / np.sqrt((centred * centred).mean((1, 3), keepdims=True) + EPS)
    normal = (centred * rstd).reshape(x.shape)

    def back(dy, g):
        add(g, f"{name}.bias", dy.sum((0, 1, 2)))
        add(g, f"{name}.weight", (dy * normal).sum((0, 1, 2)))
        d, n = (dy * gamma).reshape(grouped.shape), normal.reshape(grouped.shape)
        d = d - d.mean((1, 3), keepdims=True) - n * (d * n).mean((1, 3), keepdims=True)
        return (d * rstd).reshape(x.shape)

    return normal * gamma + p[f"{name}.bias"], back


def silu(x: np.ndarray):
    """x * sigmoid(x); tanh gives a sigmoid that cannot overflow."""
    s = 0.5 * (1 + np.tanh(0.5 * x))

    def back(dy, g):
        return dy * (s * (1 + x * (1 - s)))

    return x * s, back


def attend(q: np.ndarray, k: np.ndarray, v: np.ndarray):
    """q, k, v [B, N, C] -> [B, N, C]: softmax over keys of q.k / sqrt(C), applied to v."""
    scale = 1 / np.sqrt(q.shape[-1]).astype(q.dtype)
    scores = q @ k.transpose(0, 2, 1) * scale  # [B, queries, keys]
    e = np.exp(scores - scores.max(-1, keepdims=True))
    a = e / e.sum(-1, keepdims=True)

    def back(dy, g):
        da = dy @ v.transpose(0, 2, 1)
        ds = a * (da - (da * a).sum(-1, keepdims=True)) * scale
        return ds @ k, ds.transpose(0, 2, 1) @ q, a.transpose(0, 2, 1) @ dy

    return a @ v, back


def nearest(x: np.ndarray):
    """x [B, H, W, C] -> [B, 2H, 2W, C], every pixel four times."""
    b, h, w, c = x.shape

    def back(dy, g):
        return dy.reshape(b, h, 2, w, 2, c).sum((2, 4))

    return x.repeat(2, axis=1).repeat(2, axis=2), back
