"""The operations of a train step counted from the config, against PyTorch's own counter."""

import math

import pytest
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import impl_torch
from conformance.bench import batch_of
from conformance.bench.count import count, count_forward
from spec.config import load_config
from spec.params import parameter_count, parameter_shapes

TINY, DIGITS, CIFAR10 = (load_config(name) for name in ("tiny", "digits", "ddpm_cifar10"))
S = DIGITS.replace(
    name="s",
    image_size=(16, 16),
    channels=(32, 64, 64),
    attention_levels=(2,),
    num_classes=0,
    label_dropout=0.0,
)
M = CIFAR10.replace(name="m", channels=(64, 128, 128, 128))
CONFIGS = [TINY, load_config("tiny_uncond"), load_config("tiny_deep"), DIGITS, S, M]


def batch(config, rows: int) -> dict:
    """Inputs of one train step, float32."""
    given = batch_of(config.replace(batch_size=rows), 0)
    return {
        key: value.astype("float32") if value.dtype.kind == "f" else value
        for key, value in given.items()
    }


def counted(function, *inputs, **named) -> int:
    """What PyTorch counts while the function runs; attention as two products, not a fused one."""
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        function(*inputs, **named)
    return counter.get_total_flops()


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.name)
def test_operations_are_those_that_pytorch_counts(config):
    model = impl_torch.open(config, device="cpu", mode="eager")
    given = batch(config, 2)
    assert count(config, 2).flops == counted(model.train_step, **given)
    labels = {"labels": given["labels"]} if config.num_classes else {}
    forward = counted(model.predict, given["x0"], given["t"], **labels)
    assert count_forward(config, 2).flops == forward


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.name)
def test_a_step_is_three_forward_passes_but_for_the_gradients_that_nobody_needs(config):
    """Those of the images, at conv_in, and of the table of times, at time_embedding.linear_1."""
    height, width, channels = config.image_shape
    first = config.channels[0]
    images = 2 * 5 * height * width * 9 * channels * first
    times = 2 * 5 * first * config.time_width
    assert count(config, 5).flops == 3 * count_forward(config, 5).flops - images - times


@pytest.mark.parametrize(
    ("config", "rows", "flops", "millions"),
    [(S, 64, 23.74e9, 1.113), (M, 16, 153.5e9, 8.952), (CIFAR10, 128, 4.777e12, 35.75)],
    ids=["s", "m", "l"],
)
def test_workloads_are_as_large_as_is_said(config, rows, flops, millions):
    work = count(config, rows)
    assert work.flops == pytest.approx(flops, rel=3e-4)
    assert work.parameters / 1e6 == pytest.approx(millions, rel=3e-4)
    assert work.parameters == parameter_count(config)


@pytest.mark.parametrize("config", [TINY, M], ids=lambda config: config.name)
def test_products_add_up_and_grow_with_the_batch(config):
    one, three = count(config, 1), count(config, 3)
    assert three.flops == sum(2 * g.m * g.n * g.k * g.times for g in three.gemms)
    assert three.flops == 3 * one.flops
    keys = [(g.m, g.n, g.k, g.what) for g in three.gemms]
    assert len(set(keys)) == len(keys)
    # Every weight of two dimensions or four has a product for its gradient, and no other one has.
    weights = sum(
        math.prod(shape)
        for name, shape in parameter_shapes(config).items()
        if len(shape) > 1 and not name.startswith("class_embedding")
    )
    for work in (one, three):
        of_weights = [g for g in work.gemms if g.what.endswith("gradient of the weights")]
        linear = [g for g in of_weights if not g.what.startswith("attention")]
        assert sum(g.m * g.n * g.times for g in linear) == weights


def test_bytes_are_a_constant_for_the_parameters_and_a_share_for_each_image():
    one, two, three = (count(DIGITS, rows).bytes for rows in (1, 2, 3))
    assert three - two == two - one > 0
    # params, m, v, EMA read and written, gradients written and read: ten times four bytes
    assert one - (two - one) == 40 * parameter_count(DIGITS)
    forward = count_forward(DIGITS, 1).bytes
    assert forward - (two - one) == 4 * parameter_count(DIGITS)
