"""PyTorch's layers that choose their way by device or shape, beside plain sums."""

import pytest

torch = pytest.importorskip("torch")

from impl_torch import layers  # noqa: E402

DTYPES = {torch.float64: 1e-13, torch.float32: 1e-5}  # relative to the largest value


@pytest.fixture
def convolutions(monkeypatch):
    """The shapes of all that is convolved."""
    seen, real = [], torch.nn.functional.conv2d

    def convolve(x, *rest):
        seen.append(tuple(x.shape))
        return real(x, *rest)

    monkeypatch.setattr(layers.F, "conv2d", convolve)
    return seen


def near(one, other, dtype):
    assert one.shape == other.shape
    assert (one - other).abs().max() <= DTYPES[dtype] * other.abs().max()


def compare(layer, x, expected, dtype):
    """The layer's result and its gradients, by the input too, against those of `expected`."""
    x.requires_grad_()
    inputs = (x, *layer.parameters())
    y, wanted = layer(x), expected(x)
    near(y, wanted, dtype)
    slope = torch.randn_like(wanted)
    for one, other in zip(
        torch.autograd.grad(y, inputs, slope),
        torch.autograd.grad(wanted, inputs, slope),
        strict=True,
    ):
        near(one, other, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("shape", "images"),
    [
        ((4, 256), (16, 6, 1, 64)),
        ((1, 1040), (16, 6, 1, 65)),
        ((2, 32, 32), (16, 6, 1, 128)),
        ((1, 1030), None),  # cannot be shared out among 16
        ((2, 64), None),  # too few to gain by it
        ((8,), None),
        ((0, 256), None),
    ],
)
def test_rows_of_any_number_are_multiplied(shape, images, dtype, convolutions):
    torch.manual_seed(3)
    layer = layers.linear(6, 5).to(dtype)
    x = torch.randn(*shape, 6, dtype=dtype)

    def expected(x):
        return torch.einsum("...i,oi->...o", x, layer.weight) + layer.bias

    if x.numel():
        compare(layer, x, expected, dtype)
    else:
        assert layer(x).shape == (*shape, 5)
    assert convolutions == ([images] if images else [])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
@pytest.mark.parametrize("images", [1, 2, 16])
def test_a_1x1_convolution_of_few_images_is_the_same_product(images, layout, dtype, convolutions):
    torch.manual_seed(4)
    layer = layers.conv(6, 5, 1, pad=0).to(dtype, memory_format=layout)
    x = torch.randn(images, 6, 32, 32, dtype=dtype).contiguous(memory_format=layout)

    def expected(x):
        y = torch.einsum("bihw,oi->bohw", x, layer.weight[..., 0, 0])
        return y + layer.bias[:, None, None]

    compare(layer, x, expected, dtype)
    few = layout == torch.channels_last and images < 16
    assert convolutions == [(16, 6, 1, images * 64) if few else (images, 6, 32, 32)]
    assert layer(x).is_contiguous(memory_format=layout)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
@pytest.mark.parametrize("offset", [0, 1000])
def test_what_gpus_normalise_by_is_what_the_kernel_of_cpus_gives(offset, layout, dtype):
    torch.manual_seed(5)
    layer = layers.group_norm(4, 12).to(dtype)
    x = offset + torch.randn(2, 12, 3, 5, dtype=dtype).contiguous(memory_format=layout)

    def expected(x):
        h = layers.standardised(x, 4)
        assert h.is_contiguous(memory_format=layout)
        return h * layer.weight[:, None, None] + layer.bias[:, None, None]

    if offset:  # the digits that x itself has lost: nothing else may be lost
        wide = layers.standardised(x.double(), 4)
        assert (layers.standardised(x, 4) - wide).abs().max() < 1e3 * DTYPES[dtype]
    else:
        compare(layer, x, expected, dtype)
