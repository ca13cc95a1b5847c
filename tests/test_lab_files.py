"""lab/files.py: settings that diffusers opens, refusals that name the fault, whole writes."""

import json
import os

import numpy as np
import pytest
from safetensors.numpy import save_file

from lab.files import (
    CONFIG,
    NETWORK,
    SETTINGS,
    WEIGHTS,
    FileError,
    from_diffusers,
    read_run,
    read_weights,
    to_diffusers,
    write_atomically,
    write_run,
)
from spec.config import ConfigError, config_names, load_config
from spec.params import OLD_ATTENTION_NAMES, ParameterError, initial_params, parameter_shapes

# The settings of google/ddpm-cifar10-32 as published: an early release, with fewer keys.
DDPM_CIFAR10 = {
    "_class_name": "UNet2DModel",
    "_diffusers_version": "0.0.4",
    "act_fn": "silu",
    "attention_head_dim": None,
    "block_out_channels": [128, 256, 256, 256],
    "center_input_sample": False,
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"],
    "downsample_padding": 0,
    "flip_sin_to_cos": False,
    "freq_shift": 1,
    "in_channels": 3,
    "layers_per_block": 2,
    "mid_block_scale_factor": 1,
    "norm_eps": 1e-06,
    "norm_num_groups": 32,
    "out_channels": 3,
    "sample_size": 32,
    "time_embedding_type": "positional",
    "up_block_types": ["UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"],
}


@pytest.fixture(scope="module")
def tiny():
    config = load_config("tiny")
    return config, initial_params(config, 0)


@pytest.mark.parametrize("name", config_names())
def test_settings_there_and_back(name):
    config = load_config(name)
    settings = json.loads(json.dumps(to_diffusers(config)))
    other = load_config("digits" if name != "digits" else "tiny")
    found = from_diffusers(settings, other)
    assert all(getattr(found, field) == getattr(config, field) for field in NETWORK)
    assert found.beta_end == other.beta_end
    assert found.name == other.name


@pytest.mark.parametrize("name", ["tiny", "tiny_uncond", "digits"])
def test_diffusers_knows_every_setting(name):
    from diffusers import UNet2DModel

    config = load_config(name)
    model, ignored = UNet2DModel.from_config(to_diffusers(config), return_unused_kwargs=True)
    assert set(ignored) == {"_class_name"}
    shapes = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    assert shapes == parameter_shapes(config)
    ours = {key for key in to_diffusers(config) if not key.startswith("_")}
    assert ours == {key for key in model.config if not key.startswith("_")}


def test_defaults_of_missing_keys_are_those_of_diffusers():
    import inspect

    from diffusers import UNet2DModel

    from lab.files import FIXED, FREE

    real = {
        name: list(p.default) if isinstance(p.default, tuple) else p.default
        for name, p in inspect.signature(UNet2DModel.__init__).parameters.items()
        if name != "self"
    }
    assert real == {**FREE, **{key: default for key, (_, default) in FIXED.items()}}


def test_a_published_checkpoint_is_the_config_of_the_spec():
    config = load_config("ddpm_cifar10")
    assert from_diffusers(DDPM_CIFAR10, config) == config
    found = from_diffusers(DDPM_CIFAR10, load_config("digits"))
    assert all(getattr(found, name) == getattr(config, name) for name in NETWORK)
    assert found.batch_size == load_config("digits").batch_size


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"act_fn": "gelu"}, ["act_fn = 'gelu', expected 'silu'"]),
        (
            {"attention_head_dim": 8, "norm_eps": 1e-5},
            ["attention_head_dim = 8", "norm_eps = 1e-05"],
        ),
        ({"flip_sin_to_cos": None}, ["flip_sin_to_cos = None, expected False"]),
        ({"out_channels": 6}, ["out_channels = 6"]),
        ({"sample_size": None}, ["sample_size = None"]),
        ({"down_block_types": ["SkipDownBlock2D"] * 4}, ["SkipDownBlock2D"]),
        (
            {"down_block_types": "DownBlock2D"},
            ["down_block_types = 'DownBlock2D', expected a list"],
        ),
        ({"up_block_types": ["UpBlock2D"] * 4}, ["up_block_types", "mirrored"]),
        ({"num_class_embeds": 1}, ["num_class_embeds = 1"]),
        ({"new_thing": True}, ["new_thing is unknown"]),
        ({"_class_name": "UNet2DConditionModel"}, ["UNet2DConditionModel"]),
    ],
)
def test_unsupported_settings_are_named(change, words):
    with pytest.raises(FileError) as error:
        from_diffusers({**DDPM_CIFAR10, **change}, load_config("ddpm_cifar10"))
    assert all(word in str(error.value) for word in words)


def test_the_order_of_attention_levels_is_kept():
    config = load_config("tiny").replace(attention_levels=(2, 0))
    assert from_diffusers(to_diffusers(config), config) == config


def test_a_missing_key_counts_as_diffusers_default():
    settings = {k: v for k, v in DDPM_CIFAR10.items() if k not in ("freq_shift", "norm_eps")}
    with pytest.raises(FileError, match=r"freq_shift = 0, expected 1.*norm_eps = 1e-05"):
        from_diffusers(settings, load_config("ddpm_cifar10"))


def test_diffusers_opens_the_folder_and_agrees(tmp_path, tiny):
    import torch
    from diffusers import UNet2DModel

    import impl_numpy

    config, params = tiny
    write_run(tmp_path, config, params)
    model, found = UNet2DModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(found.values()), found
    x = np.random.default_rng(0).standard_normal((2, 8, 12, 2)).astype(np.float32)
    t, labels = np.array([3, 999]), np.array([0, 5])
    with torch.no_grad():
        theirs = model(
            torch.from_numpy(x).permute(0, 3, 1, 2),
            torch.from_numpy(t),
            class_labels=torch.from_numpy(labels),
        ).sample
    ours = impl_numpy.open(config, read_run(tmp_path, None)[1]).predict(x, t, labels)
    # Their sines are float32's of t up to 999, so the two are near, not the same (S7).
    np.testing.assert_allclose(theirs.permute(0, 2, 3, 1).numpy(), ours, atol=1e-4)


def test_a_run_there_and_back(tmp_path, tiny):
    config, params = tiny
    write_run(tmp_path, config, params)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([CONFIG, SETTINGS, WEIGHTS])
    for source, name in ((tmp_path, None), (tmp_path, "tiny"), (tmp_path / WEIGHTS, "tiny")):
        found, read = read_run(source, name)
        assert found == config
        assert list(read) == list(params)
        assert all(np.array_equal(read[key], params[key]) for key in params)


def test_old_attention_names_are_read(tmp_path, tiny):
    _, params = tiny
    old = {new: old for old, new in OLD_ATTENTION_NAMES.items()}
    renamed = {}
    for key, value in params.items():
        for new, name in old.items():
            key = key.replace(f".{new}.", f".{name}.") if ".attentions." in key else key
        renamed[key] = value
    assert set(renamed) != set(params)
    save_file(renamed, tmp_path / "old.safetensors")
    read = read_run(tmp_path / "old.safetensors", "tiny")[1]
    assert all(np.array_equal(read[key], params[key]) for key in params)


def test_faults_of_a_run_are_named(tmp_path, tiny):
    config, params = tiny
    with pytest.raises(FileError, match=r"config\.toml"):
        read_run(tmp_path, None)
    with pytest.raises(FileError, match="cannot be read"):
        read_run(tmp_path / "none.safetensors", "tiny")
    with pytest.raises(ConfigError, match="unknown config 'small'"):
        read_run(tmp_path, "small")
    (tmp_path / "bad.safetensors").write_bytes(b"not tensors")
    with pytest.raises(FileError, match="not a safetensors file"):
        read_weights(tmp_path / "bad.safetensors")
    write_run(tmp_path, config, params)
    with pytest.raises(FileError, match="num_classes = 5, the config has 0"):
        read_run(tmp_path, "tiny_uncond")
    with pytest.raises(ParameterError, match="class_embedding"):
        read_run(tmp_path / WEIGHTS, "tiny_uncond")
    (tmp_path / SETTINGS).write_text("[]")
    with pytest.raises(FileError, match="expected an object"):
        read_run(tmp_path, None)
    with pytest.raises(ParameterError, match="holds nan"):
        write_run(tmp_path, config, {**params, "conv_in.bias": np.full(8, np.nan)})


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "deep" / "file"
    write_atomically(path, b"old")

    def fail(source, target):
        raise OSError("no space left")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="no space"):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert [item.name for item in path.parent.iterdir()] == ["file"]
