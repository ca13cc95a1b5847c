"""What a train step has to compute and to move: floating point operations, bytes, matrix products.

Counted by hand from the config alone, so that the same figure stands beside every backend,
whatever its code computes more or less.

Operations are those of convolutions, linear layers and the products of attention, a multiplication
and an addition for each pair: 2 m n k for a product [m, k] @ [k, n]. A convolution is the product
of its patches, [B*H'*W', 9*I] @ [9*I, O]; taps that lie on the padding count too. The backward pass
has two products of the same size for each of the forward pass: the gradient of its input and that
of its weights, or of both factors in attention. The input's is not needed, and not counted, where
the input depends on no parameter: at `conv_in` and `time_embedding.linear_1`. What is linear in the
size of the arrays (norms, SiLU, softmax, additions, Adam, the EMA) is not counted: it is bound by
bytes.

PyTorch's FlopCounterMode counts a train step of impl_torch alike, to the last operation (see
tests/test_bench_count.py), with attention as two products. Where a fused attention kernel runs, it
counts that by formulas of its own: the backward pass of flash attention has five products for the
four here, since it computes the scores again, and the kernel for CPUs is not counted at all.
"""

import dataclasses
from collections.abc import Iterator

from spec.config import Config
from spec.params import Block, blocks, parameter_count

ITEM = 4  # bytes of a float32


@dataclasses.dataclass(frozen=True)
class Gemm:
    """A matrix product [m, k] @ [k, n], done `times` times in a step."""

    m: int
    n: int
    k: int
    times: int
    what: str

    @property
    def flops(self) -> float:
        """Operations of all of them."""
        return 2.0 * self.m * self.n * self.k * self.times


@dataclasses.dataclass(frozen=True)
class Work:
    """One train step: operations, the least traffic in bytes, parameters, products."""

    flops: float
    bytes: float
    parameters: int
    gemms: tuple[Gemm, ...]


@dataclasses.dataclass(frozen=True)
class _Product:
    """A product of the forward pass, and whether the gradient of its left side is needed."""

    gemm: Gemm
    left_needed: bool = True


def count(config: Config, batch: int) -> Work:
    """The work of one train step, forward, backward, Adam and EMA, on `batch` images.

    Bytes are the least that a step can move between the memory and the processor, in float32:

    - parameters, both of Adam's moments and the EMA, read once and written once;
    - gradients of the parameters, written once and read once;
    - what every convolution, linear layer and attention product of the forward pass gives, written
      once, and read once more for the backward pass.

    Everything else (norms, SiLU, sums, gradients of activations) would stay in the caches of an
    ideal machine. A real step moves several times as much.
    """
    products = list(_products(config, batch))
    parameters = parameter_count(config)
    activations = sum(p.gemm.m * p.gemm.n * p.gemm.times for p in products)
    gemms = _merged(gemm for product in products for gemm in _train(product))
    return Work(
        flops=sum(gemm.flops for gemm in gemms),
        bytes=float(ITEM * (4 * 2 * parameters + 2 * parameters + 2 * activations)),
        parameters=parameters,
        gemms=gemms,
    )


def count_forward(config: Config, batch: int) -> Work:
    """The work of one call of the network on `batch` images, as sampling makes it.

    Bytes: the parameters read once, and what every product gives written once and read once.
    A guided step calls it with 2B images (S6).
    """
    products = list(_products(config, batch))
    parameters = parameter_count(config)
    activations = sum(p.gemm.m * p.gemm.n * p.gemm.times for p in products)
    gemms = _merged(product.gemm for product in products)
    return Work(
        flops=sum(gemm.flops for gemm in gemms),
        bytes=float(ITEM * (parameters + 2 * activations)),
        parameters=parameters,
        gemms=gemms,
    )


def _train(product: _Product) -> Iterator[Gemm]:
    """The product, and those of its backward pass."""
    forward = product.gemm
    m, n, k = forward.m, forward.n, forward.k
    yield forward
    if product.left_needed:
        yield Gemm(m, k, n, forward.times, f"{forward.what}, gradient of the input")
    yield Gemm(k, n, m, forward.times, f"{forward.what}, gradient of the weights")


def _merged(gemms: Iterator[Gemm]) -> tuple[Gemm, ...]:
    """Products of one shape and kind as one entry, in the order of their first."""
    times: dict[tuple[int, int, int, str], int] = {}
    for gemm in gemms:
        key = (gemm.m, gemm.n, gemm.k, gemm.what)
        times[key] = times.get(key, 0) + gemm.times
    return tuple(Gemm(m, n, k, number, what) for (m, n, k, what), number in times.items())


def _products(config: Config, batch: int) -> Iterator[_Product]:
    """The products of the forward pass, block by block (S7)."""
    for block in blocks(config):
        yield from _products_of(config, block, batch)


def _products_of(config: Config, block: Block, batch: int) -> Iterator[_Product]:
    height, width = (side >> block.level for side in config.image_size)
    pixels = height * width
    cin, cout = block.in_channels, block.out_channels

    def conv(fan_in: int, area: int, size: int = 3, needed: bool = True) -> _Product:
        what = f"{size}x{size} convolution"
        return _Product(Gemm(batch * area, cout, size * size * fan_in, 1, what), needed)

    def linear(rows: int, fan_in: int, needed: bool = True) -> _Product:
        return _Product(Gemm(rows, cout, fan_in, 1, "linear layer"), needed)

    if block.kind == "emb":
        yield linear(batch, cin, needed=False)  # of a table
        yield linear(batch, cout)
    elif block.kind == "conv_in":
        yield conv(cin, pixels, needed=False)  # of the images
    elif block.kind == "resnet":
        yield conv(cin, pixels)
        yield linear(batch, config.time_width)
        yield conv(cout, pixels)
        if cin != cout:
            yield conv(cin, pixels, size=1)
    elif block.kind == "attention":
        for _ in range(4):  # q, k, v and the output
            yield linear(batch * pixels, cin)
        yield _Product(Gemm(pixels, pixels, cin, batch, "attention, scores"))
        yield _Product(Gemm(pixels, cin, pixels, batch, "attention, values"))
    elif block.kind == "downsample":
        yield conv(cin, pixels // 4)
    elif block.kind == "upsample":
        yield conv(cin, 4 * pixels)
    elif block.kind == "conv_out":
        yield conv(cin, pixels)
