"""Parameters: names, shapes and counts are diffusers'; what does not fit is named."""

import math

import numpy as np
import pytest

from spec.config import load_config
from spec.params import (
    ParameterError,
    blocks,
    check_params,
    find_block,
    initial_params,
    parameter_count,
    parameter_shapes,
)

TINY = load_config("tiny")
PARAMS = initial_params(TINY, 0)


def test_the_counts_are_those_of_the_published_models():
    cifar10 = load_config("ddpm_cifar10")
    assert parameter_count(cifar10) == 35_746_307
    assert len(parameter_shapes(cifar10)) == 328
    assert parameter_count(load_config("digits")) == 702_753


@pytest.mark.parametrize("name", ["tiny", "tiny_uncond", "tiny_deep", "digits", "fashion_mnist"])
def test_names_shapes_and_blocks_are_those_of_diffusers(name):
    pytest.importorskip("diffusers")
    from spec.oracle import UNet2DModel, unet_arguments

    config = load_config(name)
    model = UNet2DModel(**unet_arguments(config))
    theirs = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    assert theirs == parameter_shapes(config)
    modules = dict(model.named_modules())
    for block in blocks(config):
        if block.kind != "emb":  # a sum of two embeddings, no module of its own
            assert block.name in modules
    ours = {block.name for block in blocks(config)}
    inside = ("resnets", "attentions", "downsamplers", "upsamplers")
    for module in modules:
        if module.split(".")[-2:-1] and module.split(".")[-2] in inside:
            assert module in ours


def test_blocks_take_what_the_network_gives_them():
    plan = blocks(TINY)
    assert [block.kind for block in plan[:3]] == ["time_proj", "emb", "conv_in"]
    assert plan[-1].kind == "conv_out"
    assert find_block(TINY, "up_blocks.0.resnets.0").in_channels == 12 + 12
    assert find_block(TINY, "up_blocks.0.resnets.1").in_channels == 12 + 16
    assert find_block(TINY, "up_blocks.2.resnets.0").in_channels == 16 + 8
    with pytest.raises(ValueError, match=r"unknown block 'mid'.*mid_block.resnets.0"):
        find_block(TINY, "mid")


def test_every_fault_is_named_at_once():
    broken = dict(PARAMS)
    del broken["conv_in.bias"]
    broken["conv_extra.bias"] = np.zeros(3)
    broken["conv_in.weight"] = broken["conv_in.weight"].transpose(2, 3, 1, 0)
    broken["conv_out.bias"] = np.array([1, 2])
    broken["conv_norm_out.weight"] = np.where(np.arange(8) == 5, np.nan, 1.0)
    with pytest.raises(ParameterError) as caught:
        check_params(TINY, broken)
    message = str(caught.value)
    for words in (
        "missing: conv_in.bias",
        "not in this config: conv_extra.bias",
        "conv_in.weight has shape [3, 3, 2, 8], expected [8, 2, 3, 3]",
        "conv_out.bias has dtype int64",
        "conv_norm_out.weight holds nan at [5]",
        "'tiny'",
    ):
        assert words in message


def test_infinity_is_refused():
    with pytest.raises(ParameterError, match=r"conv_in.bias holds inf at \[0\]"):
        check_params(TINY, PARAMS | {"conv_in.bias": np.full(8, np.inf)})


def test_old_attention_names_are_read_and_order_is_restored():
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    renamed = {}
    for name in reversed(PARAMS):
        for new, former in old.items():
            if ".attentions." in name and f".{new}." in name:
                name_then = name.replace(f".{new}.", f".{former}.")
                break
        else:
            name_then = name
        renamed[name_then] = PARAMS[name]
    assert any(".query." in name for name in renamed)
    found = check_params(TINY, renamed)
    assert list(found) == list(parameter_shapes(TINY))
    assert all(np.array_equal(found[name], PARAMS[name]) for name in PARAMS)


def test_a_parameter_under_both_names_is_refused():
    name = "mid_block.attentions.0.to_q.bias"
    twice = PARAMS | {name.replace("to_q", "query"): PARAMS[name]}
    with pytest.raises(ParameterError, match="given twice"):
        check_params(TINY, twice)


def test_initial_values_follow_the_seed_and_the_fan_in():
    again, other = initial_params(TINY, 0), initial_params(TINY, 1)
    shapes = parameter_shapes(TINY)
    assert list(again) == list(shapes)
    assert all(np.array_equal(again[name], PARAMS[name]) for name in shapes)
    weight = PARAMS["down_blocks.1.resnets.0.conv1.weight"]
    assert not np.array_equal(weight, other["down_blocks.1.resnets.0.conv1.weight"])
    bound = 1 / math.sqrt(8 * 9)
    assert 0.95 * bound < np.abs(weight).max() <= bound
    assert abs(weight.mean()) < 0.05 * bound
    assert np.array_equal(PARAMS["conv_norm_out.weight"], np.ones(8))
    assert np.array_equal(PARAMS["conv_norm_out.bias"], np.zeros(8))
    assert PARAMS["class_embedding.weight"].var() == pytest.approx(1, abs=0.2)
    assert all(value.dtype == np.float32 for value in PARAMS.values())
