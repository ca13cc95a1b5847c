"""The noise floors: how far a correct implementation may stand from a golden, by precision.

A generator's module. The oracle's network runs in float32 with every operation perturbed, backward
included. `Decomposed` writes convolutions, norms, softmax and SiLU as sums and products, in one of
the ways that frameworks use; `Perturbed`, beneath autograd, splits every contraction and every sum
into randomly ordered partial sums, each rounded, and moves every other result by a random relative
2^-24 (transcendental functions by 2^-23). A floor is the largest error over the seeds.

For tf32 and bf16 the same runs move more inside the network, and only there: the factors of every
product by 2^-10 (tf32) or 2^-8 (bf16), and for bf16 every result by 2^-8, but for what GroupNorm
does between its input and its output, which is float32's (S7).

An operation that is in none of the lists below raises: nothing passes unperturbed by oversight.
"""

import contextlib
import functools
import itertools
import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from spec.cases import Case
from spec.oracle import Oracle

SEEDS = {"float32": 32, "tf32": 8, "bf16": 8}
# Of a whole training run, which takes minutes a seed and whose curve pools a hundred steps.
RUN_SEEDS = {"float32": 8, "tf32": 4, "bf16": 4}
# What a product's factors lose: a tensor core may chop the rest off where bfloat16 is rounded to.
FACTORS_BY = {"tf32": 2.0**-10, "bf16": 2.0**-8}
RESULTS_BY = {"bf16": 2.0**-8}  # what is kept between operations loses
aten = torch.ops.aten
POOL = 1 << 21  # random signs, drawn once and read from a place that the seed gives

# Views, copies and choices: the result holds the arguments' own numbers.
EXACT = {
    aten._reshape_alias,
    aten._to_copy,
    aten._unsafe_view,
    aten.alias,
    aten.amax,
    aten.as_strided,
    aten.cat,
    aten.clamp,
    aten.clone,
    aten.constant_pad_nd,
    aten.copy,
    aten.detach,
    aten.embedding,
    aten.empty,
    aten.eq,
    aten.expand,
    aten.fill,
    aten.full,
    aten.full_like,
    aten.ge,
    aten.gt,
    aten.im2col,
    aten.index,
    aten.le,
    aten.lift_fresh,
    aten.logical_and,
    aten.masked_fill,
    aten.neg,
    aten.new_empty_strided,
    aten.new_zeros,
    aten.ones_like,
    aten.permute,
    aten.select,
    aten.select_backward,
    aten.slice,
    aten.slice_backward,
    aten.split,
    aten.squeeze,
    aten.stack,
    aten.t,
    aten.transpose,
    aten.unbind,
    aten.unsqueeze,
    aten.upsample_nearest2d,
    aten.view,
    aten.where,
    aten.zero,
    aten.zeros,
    aten.zeros_like,
}
ROUNDED = {aten.add, aten.sub, aten.rsub, aten.mul, aten.div, aten.sqrt, aten.reciprocal}
# Their derivatives' formulas, where autograd keeps one operation for them.
ROUNDED |= {aten.pow, aten.sigmoid_backward}
TRANSCENDENTAL = {aten.exp, aten.sigmoid, aten.rsqrt, aten.log}


def seeds_of(case: Case, precision: str) -> int:
    """How many seeds a floor is the largest error of."""
    if case.seeds:
        return case.seeds
    return (RUN_SEEDS if case.call == "train_run" else SEEDS)[precision]


def norms_of(case: Case, name: str) -> tuple[str, ...]:
    """The norms of an output's floor: of a curve, the largest relative error of all its steps."""
    return ("each",) if case.call == "train_run" and name == "loss" else ("l2", "max")


def asks_network(case: Case) -> bool:
    """Whether a precision of the network's products can show in this case's results."""
    return case.level >= 2 and case.call != "apply_gradients" and not is_table(case)


def is_table(case: Case) -> bool:
    """Whether the case asks for rows of S7's table of times alone."""
    return case.options.get("name") == "time_proj"


@functools.cache
def sign_pool(dtype: torch.dtype, size: float) -> torch.Tensor:
    """Random signs times `size`."""
    generator = torch.Generator().manual_seed(0)
    signs = torch.randint(0, 2, (POOL,), generator=generator, dtype=torch.int8) * 2 - 1
    return signs.to(dtype) * size


class Perturbed(TorchDispatchMode):
    """Perturbs every operation on tensors of one dtype, and splits every sum."""

    def __init__(
        self, seed: int, dtype: torch.dtype = torch.float32, precision: str = "float32"
    ) -> None:
        super().__init__()
        self.dtype, self.choose = dtype, random.Random(seed)
        self.generator = torch.Generator().manual_seed(seed)
        half = torch.finfo(dtype).eps / 2
        self.fine = sign_pool(dtype, half), sign_pool(dtype, 2 * half)
        self.factors_by, self.results_by = FACTORS_BY.get(precision), RESULTS_BY.get(precision)
        self.in_network = False

    @contextlib.contextmanager
    def network(self, inside: bool = True) -> Iterator[None]:
        """Operations made here are the network's, which has the precision that was asked for."""
        before, self.in_network = self.in_network, inside
        try:
            yield
        finally:
            self.in_network = before

    @property
    def coarse(self) -> bool:
        """Whether results are kept in fewer digits here."""
        return self.in_network and self.results_by is not None

    @property
    def signs(self) -> torch.Tensor:
        """What moves a result by half a unit in its last place."""
        return sign_pool(self.dtype, self.results_by) if self.coarse else self.fine[0]

    @property
    def doubled(self) -> torch.Tensor:
        """What moves the result of a transcendental function."""
        return self.signs if self.coarse else self.fine[1]

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        packet = func.overloadpacket
        in_place = packet.__name__.endswith("_") and not packet.__name__.startswith("_")
        plain = getattr(aten, packet.__name__.rstrip("_")) if in_place else packet
        if plain in EXACT:
            return func(*args, **kwargs)
        if packet in self.SPLIT:
            result = self.SPLIT[packet](self, func, args, kwargs)
            kept = self.coarse and result.dtype == self.dtype
            return self._moved(result, self.signs) if kept else result
        result = func(*args, **kwargs)
        if not torch.is_tensor(result) or result.dtype != self.dtype:
            return result
        if plain not in ROUNDED and plain not in TRANSCENDENTAL:
            raise NotImplementedError(f"the noise floor does not know {func}; add it to a list")
        moved = self._moved(result, self.doubled if plain in TRANSCENDENTAL else self.signs)
        return result.copy_(moved) if in_place else moved

    def _moved(self, x: torch.Tensor, signs: torch.Tensor) -> torch.Tensor:
        """x with every element moved up or down by a relative 2^-24, or 2^-23."""
        drawn, left = [], x.numel()
        while left or not drawn:
            count = min(left, POOL // 2 if left >= POOL else left)
            start = self.choose.randrange(POOL - count)
            drawn.append(signs[start : start + count])
            left -= count
        by = drawn[0] if len(drawn) == 1 else torch.cat(drawn)
        return torch.addcmul(x, x, by.view(x.shape))

    def _pieces(self, count: int) -> list[torch.Tensor]:
        """0..count-1 in a random order, cut into 2 to 4 pieces (fewer where there are fewer)."""
        order = torch.randperm(count, generator=self.generator)
        parts = min(self.choose.randint(2, 4), count)
        cuts = [0, *sorted(self.choose.sample(range(1, count), parts - 1)), count]
        return [order[a:b] for a, b in itertools.pairwise(cuts)]

    def _sum_pieces(self, piece: Callable[[torch.Tensor], torch.Tensor], count: int):
        """The sum of piece(indices) over the pieces of 0..count-1."""
        first, *others = [piece(indices) for indices in self._pieces(count)]
        for other in others:
            first = first + other
        return first

    def _product(self, func, args, _kwargs):
        a, b = args
        if a.dtype != self.dtype:
            return func(a, b)
        if self.in_network and self.factors_by:
            pool = sign_pool(self.dtype, self.factors_by)
            a, b = self._moved(a, pool), self._moved(b, pool)
        right = -2  # the contracted dimension of b

        def piece(indices):
            return func(a.index_select(-1, indices), b.index_select(right, indices))

        return self._sum_pieces(piece, a.shape[-1])

    def _sum(self, func, args, kwargs):
        x, dims = args[0], args[1] if len(args) > 1 else None
        keep = args[2] if len(args) > 2 else kwargs.get("keepdim", False)
        if x.dtype != self.dtype:
            return func(*args, **kwargs)
        dims = [d % x.ndim for d in dims] if dims else list(range(x.ndim))
        kept = [d for d in range(x.ndim) if d not in dims]
        flat = x.permute(*kept, *dims).reshape(*(x.shape[d] for d in kept), -1)
        count = flat.shape[-1]
        result = self._sum_pieces(lambda i: flat.index_select(-1, i).sum(-1), count)
        if keep:
            result = result.reshape([1 if d in dims else n for d, n in enumerate(x.shape)])
        if func.overloadpacket is aten.mean:
            result = self._moved(result / count, self.signs)
        return result

    def _col2im(self, func, args, _kwargs):
        columns, size, kernel, *others = args
        taps = kernel[0] * kernel[1]
        split = columns.reshape(len(columns), -1, taps, columns.shape[-1])

        def piece(indices):
            part = torch.zeros_like(split)
            part[:, :, indices] = split[:, :, indices]
            return func(part.reshape(columns.shape), size, kernel, *others)

        return self._sum_pieces(piece, taps)

    def _upsample_backward(self, func, args, kwargs):
        del func, kwargs
        grad = args[0]  # [B, C, 2H, 2W]: four values are summed
        corners = [grad[..., i::2, j::2] for i in (0, 1) for j in (0, 1)]
        self.choose.shuffle(corners)
        total = corners[0]
        for corner in corners[1:]:
            total = total + corner
        return total

    def _embedding_backward(self, func, args, _kwargs):
        grad, rows, *others = args
        order = torch.tensor(self.choose.sample(range(len(rows)), len(rows)))
        return func(grad[order], rows[order], *others)

    SPLIT = {  # noqa: RUF012
        aten.mm: _product,
        aten.bmm: _product,
        aten.sum: _sum,
        aten.mean: _sum,
        aten.col2im: _col2im,
        aten.upsample_nearest2d_backward: _upsample_backward,
        aten.embedding_dense_backward: _embedding_backward,
    }


class Decomposed(TorchFunctionMode):
    """Writes the network's operations as sums, products and elementary functions."""

    def __init__(self, seed: int, mode: Perturbed) -> None:
        super().__init__()
        self.choose, self.mode = random.Random(seed), mode

    def __torch_function__(self, func, types, args=(), kwargs=None):
        rule = RULES.get(func)
        if rule is None:
            return func(*args, **(kwargs or {}))
        if rule is _group_norm and self.mode.coarse:
            return self._group_norm_in_float32(*args, **(kwargs or {}))
        return rule(self.choose, *args, **(kwargs or {}))

    def _group_norm_in_float32(self, x, groups, weight, bias, eps):
        return InFloat32.apply(self.mode, self.choose, groups, eps, x, weight, bias)


class InFloat32(torch.autograd.Function):
    """A GroupNorm that is float32's within, forward and backward, and coarse at its ends (S7)."""

    @staticmethod
    def forward(ctx, mode, choose, groups, eps, x, weight, bias):
        ctx.mode, ctx.choose, ctx.groups, ctx.eps = mode, choose, groups, eps
        ctx.save_for_backward(x, weight, bias)
        with mode.network(False):
            y = _group_norm(choose, x, groups, weight, bias, eps)
        return y * 1  # a result of the network: moved as one

    @staticmethod
    def backward(ctx, dy):
        inputs = [value.detach().requires_grad_() for value in ctx.saved_tensors]
        with ctx.mode.network(False), torch.enable_grad():
            x, weight, bias = inputs
            y = _group_norm(ctx.choose, x, ctx.groups, weight, bias, ctx.eps)
            grads = torch.autograd.grad(y, inputs, dy)
        return None, None, None, None, *(g * 1 for g in grads)


def _conv2d(_choose, x, weight, bias, stride=(1, 1), padding=(0, 0), *_others):
    high, wide = (
        (n + 2 * p - k) // s + 1
        for n, p, k, s in zip(x.shape[2:], padding, weight.shape[2:], stride, strict=True)
    )
    columns = torch.nn.functional.unfold(
        x, weight.shape[2:], padding=padding, stride=stride
    )  # [B, I * K * K, L]
    rows = columns.transpose(1, 2).reshape(-1, columns.shape[1])
    y = rows @ weight.reshape(len(weight), -1).t() + bias
    return y.reshape(len(x), high, wide, -1).permute(0, 3, 1, 2)


def _linear(_choose, x, weight, bias):
    y = x.reshape(-1, x.shape[-1]) @ weight.t() + bias
    return y.reshape(*x.shape[:-1], -1)


def _group_norm(choose, x, groups, weight, bias, eps):
    grouped = x.reshape(len(x), groups, -1)
    mean = grouped.mean(-1, keepdim=True)
    centred = grouped - mean
    variance = (centred * centred).mean(-1, keepdim=True)
    way = choose.randrange(3)
    rstd = torch.rsqrt(variance + eps) if way else 1 / torch.sqrt(variance + eps)
    spread = (1, -1, *(1,) * (x.ndim - 2))
    if way < 2:
        normed = (centred * rstd).reshape(x.shape)
        return normed * weight.reshape(spread) + bias.reshape(spread)
    # One scale and one shift a channel.
    width = x.shape[1] // groups
    lead = (len(x), groups, width)
    scale = weight.reshape(1, groups, width) * rstd.expand(lead)
    shift = bias.reshape(1, groups, width) - mean.expand(lead) * scale
    lead = (len(x), x.shape[1], *(1,) * (x.ndim - 2))
    return x * scale.reshape(lead) + shift.reshape(lead)


def _silu(choose, x, inplace=False):
    del inplace
    return x / (1 + torch.exp(-x)) if choose.randrange(2) else x * torch.sigmoid(x)


def _softmax(choose, x, dim, *_others, **_more):
    e = torch.exp(x - x.detach().amax(dim, keepdim=True))
    total = e.sum(dim, keepdim=True)
    return e / total if choose.randrange(2) else e * (1 / total)


def _baddbmm(choose, _empty, a, b, *, beta, alpha):
    assert beta == 0
    way = choose.randrange(3)
    if way == 0:
        return alpha * (a @ b)
    if way == 1:
        return (a * alpha) @ b
    root = alpha**0.5
    return (a * root) @ (b * root)


RULES: dict[Any, Callable] = {
    torch.conv2d: _conv2d,
    torch.nn.functional.linear: _linear,
    torch.nn.functional.group_norm: _group_norm,
    torch.nn.functional.silu: _silu,
    torch.Tensor.softmax: _softmax,
    torch.baddbmm: _baddbmm,
}


def errors(
    got: np.ndarray, expected: np.ndarray, norms: tuple[str, ...] = ("l2", "max")
) -> dict[str, float]:
    """The error of a result by norm: relative L2, relative to the largest element, or of each."""
    difference = got - expected
    found = {}
    for norm in norms:
        if norm == "each":
            found[norm] = float(np.abs(difference / expected).max())
        elif norm == "l2":
            scale = float(np.linalg.norm(expected)) or 1.0
            found[norm] = float(np.linalg.norm(difference)) / scale
        else:
            found[norm] = float(np.abs(difference).max()) / (float(np.abs(expected).max()) or 1.0)
    return found


def perturbed_run(
    case: Case,
    given: dict,
    params: dict | None,
    seed: int,
    dtype: torch.dtype = torch.float32,
    precision: str = "float32",
) -> dict[str, np.ndarray]:
    """The results of a case with every operation perturbed by one seed."""
    oracle = Oracle(case.full_config, params, dtype, random.Random(seed))
    mode = Perturbed(seed, dtype, precision)
    oracle.in_network = mode.network
    oracle.entering = lambda x: x * 1 if mode.coarse else x  # a result of the network: moved as one
    with Decomposed(seed, mode), mode:
        return oracle.run(case.call, given, case.options)


def floors(
    case: Case,
    given: dict,
    params: dict | None,
    seeds: list[int],
    dtype: torch.dtype = torch.float32,
    precision: str = "float32",
) -> dict[str, dict[str, float]]:
    """Output name -> norm -> the largest error over these seeds; precision float64: in that."""
    torch.set_num_threads(1)
    dtype = torch.float64 if precision == "float64" else dtype
    largest: dict[str, dict[str, float]] = {}
    for seed in seeds:
        results = perturbed_run(case, given, params, seed, dtype, precision)
        for name, expected in case.expected.items():
            got = results[name]
            got = got if got.shape == expected.shape else got.reshape(-1)[:: case.stride]
            before = largest.setdefault(name, {})
            for norm, value in errors(got, expected, norms_of(case, name)).items():
                before[norm] = max(before.get(norm, 0.0), value)
    return largest
