"""What a framework would give: each layer with its backward directly under its forward.

A layer is f(p, name, x) -> y, back; back(dy, g) adds the gradients of its parameters into g and
returns dx. Images are [B, H, W, C]; weights are [O, I] (linear) and [k, k, I, O] (convolution).
"""

import numpy as np

EPS = 1e-6  # of every GroupNorm (S7)
CACHED = 1 << 18  # numbers that a core keeps at hand: windows are worked on so many at a time


def add(g: dict, name: str, value: np.ndarray) -> None:
    """g[name] += value, where nothing there counts as zero."""
    g[name] = g[name] + value if name in g else value


def time_table(timesteps: int, width: int) -> np.ndarray:
    """[T, width] in float64: the sines of every time, then the cosines."""
    half = width // 2  # S7
    frequencies = np.exp(-np.log(1e4) * np.arange(half) / (half - 1))
    angles = np.arange(timesteps)[:, None] * frequencies
    return np.concatenate([np.sin(angles), np.cos(angles)], axis=1)


def column_sums(rows: np.ndarray) -> np.ndarray:
    """[N, C] -> [C]: as a product, which is many times faster than a sum over the first axis."""
    return np.ones(len(rows), rows.dtype) @ rows


def linear(p: dict, name: str, x: np.ndarray):
    """x [..., I] -> [..., O]."""
    w = p[f"{name}.weight"]

    def back(dy, g):
        rows = dy.reshape(-1, dy.shape[-1])
        add(g, f"{name}.bias", column_sums(rows))
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


def spread(x: np.ndarray, height: int, width: int, start: int, stride: int = 1) -> np.ndarray:
    """Zeros [B, height, width, C] with x [B, H, W, C] at every stride-th pixel from `start`."""
    b, h, w, c = x.shape
    y = np.zeros((b, height, width, c), x.dtype)
    y[:, start : start + stride * h : stride, start : start + stride * w : stride] = x
    return y


def windows(x: np.ndarray, k: int, stride: int = 1):
    """x [B, H, W, C] -> every k x k window as a row [N*H'*W', k*k*C], some images at a time.

    Yields the slice of the batch and its rows: few enough that the cache still has them.
    """
    b, h, w, c = x.shape
    db, dh, dw, dc = x.strides  # k neighbours in a row of pixels are one piece of k*C numbers
    shape = b, (h - k) // stride + 1, (w - k) // stride + 1, k, k * c
    view = np.lib.stride_tricks.as_strided(x, shape, (db, stride * dh, stride * dw, dh, dc))
    count = max(1, CACHED // view[0].size)
    for part in (slice(i, i + count) for i in range(0, b, count)):
        yield part, view[part].reshape(-1, k * k * c)


def convolve(x: np.ndarray, w: np.ndarray, stride: int = 1) -> np.ndarray:
    """x [B, H, W, I], w [k, k, I, O] -> [B, H', W', O], nothing padded: rows times w."""
    k, out = len(w), w.shape[-1]
    b, h, width, _ = x.shape
    y = np.empty((b, (h - k) // stride + 1, (width - k) // stride + 1, out), x.dtype)
    for part, rows in windows(x, k, stride):
        np.matmul(rows, w.reshape(-1, out), out=y[part].reshape(-1, out))
    return y


def conv(p: dict, name: str, x: np.ndarray, stride: int = 1, pad: tuple[int, int] = (1, 1)):
    """x [B, H, W, I] -> [B, H', W', O]; rows are made again for the backward, not kept."""
    w = p[f"{name}.weight"]
    k, out = len(w), w.shape[-1]
    _, height, width, _ = x.shape
    if any(pad):
        x = spread(x, height + sum(pad), width + sum(pad), pad[0])
    y = convolve(x, w, stride)
    y += p[f"{name}.bias"]

    def back(dy, g):
        add(g, f"{name}.bias", column_sums(dy.reshape(-1, out)))
        dw = 0
        for part, rows in windows(x, k, stride):
            dw += rows.T @ dy[part].reshape(-1, out)
        add(g, f"{name}.weight", dw.reshape(w.shape))
        if k > 1:
            dy = spread(dy, height + k - 1, width + k - 1, k - 1 - pad[0], stride)
        return convolve(dy, w[::-1, ::-1].swapaxes(2, 3))  # a convolution again, kernel flipped

    return y, back


def group_norm(p: dict, name: str, x: np.ndarray, groups: int):
    """x [B, H, W, C], normalised over H, W and neighbouring channels, a group each, then scaled."""
    gamma = p[f"{name}.weight"]
    b, c = x.shape[0], x.shape[-1]
    ones = np.ones((1, x[0].size // c), x.dtype)

    def mean(values):  # [B, H*W, C] -> [B, 1, C]: of a channel's group, for each channel
        sums = (ones @ values).reshape(b, groups, -1).sum(2) / (values[0].size // groups)
        return sums.repeat(c // groups, axis=1)[:, None]

    normal = x.reshape(b, -1, c)
    normal = normal - mean(normal)  # two passes: no cancellation
    rstd = 1 / np.sqrt(mean(normal * normal) + EPS)
    normal *= rstd
    y = normal * gamma
    y += p[f"{name}.bias"]

    def back(dy, g):
        d = dy.reshape(normal.shape)
        dn = d * normal
        add(g, f"{name}.bias", column_sums(d.reshape(-1, c)))
        add(g, f"{name}.weight", column_sums(dn.reshape(-1, c)))
        dn *= gamma
        d = d * gamma
        m = mean(dn)
        d -= mean(d)
        d -= normal * m
        d *= rstd
        return d.reshape(x.shape)

    return y.reshape(x.shape), back


def silu(x: np.ndarray):
    """x * sigmoid(x); tanh gives a sigmoid that cannot overflow."""
    s = np.tanh(0.5 * x)
    s *= 0.5
    s += 0.5

    def back(dy, g):
        d = 1 - s
        d *= x
        d += 1
        d *= s
        d *= dy
        return d

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
