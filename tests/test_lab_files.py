"""lab/files.py: settings that diffusers opens, refusals that name the fault, whole writes."""

import json
import os

import numpy as np
import pytest
from diffusers_settings import CIFAR10, CIFAR10_SCHEDULER
from safetensors.numpy import save_file

from lab.files import (
    CONFIG,
    NETWORK,
    SCHEDULER,
    SETTINGS,
    WEIGHTS,
    FileError,
    from_diffusers,
    from_scheduler,
    read_run,
    read_weights,
    to_diffusers,
    to_scheduler,
    write_atomically,
    write_run,
)
from spec.config import ConfigError, config_names, load_config
from spec.params import OLD_ATTENTION_NAMES, ParameterError, initial_params, parameter_shapes


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
    assert from_diffusers(CIFAR10, config) == config
    found = from_diffusers(CIFAR10, load_config("digits"))
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
        (  # all that is wrong, at once
            {
                "attention_head_dim": 8,
                "resnet_time_scale_shift": "scale_shift",
                "dropout": 0.1,
                "down_block_types": ["DownBlock2D", "ResnetDownsampleBlock2D"] * 2,
                "mid_block_type": None,
                "class_embed_type": "timestep",
                "cross_attention_dim": 768,
            },
            [
                "attention_head_dim = 8, expected None",
                "resnet_time_scale_shift = 'scale_shift', expected 'default'",
                "dropout = 0.1, expected 0.0",
                "down_block_types holds ResnetDownsampleBlock2D, ResnetDownsampleBlock2D",
                "up_block_types",
                "mid_block_type = None",
                "class_embed_type = 'timestep'",
                "cross_attention_dim is unknown",
            ],
        ),
    ],
)
def test_unsupported_settings_are_named(change, words):
    with pytest.raises(FileError) as error:
        from_diffusers({**CIFAR10, **change}, load_config("ddpm_cifar10"))
    assert [word for word in words if word not in str(error.value)] == []


SCHEDULE = ("timesteps", "schedule", "beta_start", "beta_end", "prediction", "variance", "clip")


@pytest.mark.parametrize("name", config_names())
def test_schedulers_there_and_back(name):
    config = load_config(name)
    other = load_config("tiny_v" if name != "tiny_v" else "digits")
    found = from_scheduler(json.loads(json.dumps(to_scheduler(config))), other)
    assert found == other.replace(**{field: getattr(config, field) for field in SCHEDULE})


@pytest.mark.parametrize("name", config_names())
def test_a_scheduler_of_diffusers_has_the_betas_of_the_spec(name):
    from diffusers import DDPMScheduler

    from spec.reference import make_schedule

    config = load_config(name)
    scheduler, ignored = DDPMScheduler.from_config(to_scheduler(config), return_unused_kwargs=True)
    assert set(ignored) <= {"_class_name"}
    np.testing.assert_allclose(scheduler.betas, make_schedule(config)["betas"], rtol=1e-5)


def test_defaults_of_missing_scheduler_keys_are_those_of_diffusers():
    import inspect

    from diffusers import DDIMScheduler, DDPMScheduler

    from lab.files import SCHEDULER_FIXED, SCHEDULER_FREE, SCHEDULER_UNUSED

    ours, old = {**SCHEDULER_FREE, **SCHEDULER_FIXED}, {"predict_epsilon", "timestep_values"}
    for kind, missing in ((DDPMScheduler, old), (DDIMScheduler, {*old, "variance_type"})):
        real = {
            name: parameter.default
            for name, parameter in inspect.signature(kind.__init__).parameters.items()
            if name != "self" and name not in SCHEDULER_UNUSED
        }
        assert real == {key: value for key, value in ours.items() if key not in missing}


def test_a_published_scheduler_is_the_schedule_of_the_spec():
    config = load_config("ddpm_cifar10")
    assert from_scheduler(CIFAR10_SCHEDULER, config) == config
    small = {k: v for k, v in CIFAR10_SCHEDULER.items() if k != "variance_type"}
    assert from_scheduler(small, config) == config.replace(variance="small")
    assert from_scheduler({**small, "_class_name": "DDIMScheduler"}, config) == config
    cosine = {"beta_schedule": "squaredcos_cap_v2", "prediction_type": "v_prediction"}
    found = from_scheduler({**CIFAR10_SCHEDULER, **cosine}, config)
    assert found == config.replace(schedule="cosine", prediction="v")
    unclipped = from_scheduler({"clip_sample": False, "clip_sample_range": 2.0}, config)
    assert unclipped == config.replace(clip=False, variance="small")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"_class_name": "PNDMScheduler"}, ["_class_name = 'PNDMScheduler', expected DDPM"]),
        ({"clip_sample_range": 2.0}, ["clip_sample_range = 2.0, expected 1.0"]),
        (
            {
                "trained_betas": [0.1],
                "beta_schedule": "scaled_linear",
                "prediction_type": ["epsilon"],
                "variance_type": "learned_range",
                "thresholding": True,
                "rescale_betas_zero_snr": True,
                "use_karras_sigmas": True,
            },
            [
                "trained_betas = [0.1], expected None",
                "beta_schedule = 'scaled_linear', expected linear or squaredcos_cap_v2",
                "prediction_type = ['epsilon'], expected epsilon or sample or v_prediction",
                "variance_type = 'learned_range', expected fixed_small or fixed_large",
                "thresholding = True, expected False",
                "rescale_betas_zero_snr = True",
                "use_karras_sigmas is unknown",
            ],
        ),
    ],
)
def test_unsupported_schedulers_are_named(change, words):
    with pytest.raises(FileError) as error:
        from_scheduler({**CIFAR10_SCHEDULER, **change}, load_config("ddpm_cifar10"))
    assert [word for word in words if word not in str(error.value)] == []


def test_a_folder_of_other_settings_is_refused_with_every_key(tmp_path, tiny):
    config, params = tiny
    write_run(tmp_path, config, params)
    (tmp_path / CONFIG).unlink()
    assert read_run(tmp_path, None)[0].prediction == "eps"
    wrong = {**to_diffusers(config), "attention_head_dim": 8, "dropout": 0.1}
    (tmp_path / SETTINGS).write_text(json.dumps(wrong))
    wrong = {**to_scheduler(config), "variance_type": "learned", "num_train_timesteps": 0}
    (tmp_path / SCHEDULER).write_text(json.dumps(wrong))
    with pytest.raises(FileError) as error:
        read_run(tmp_path, None)
    for word in ("attention_head_dim = 8", "dropout = 0.1", SETTINGS, SCHEDULER, "'learned'"):
        assert word in str(error.value)
    (tmp_path / SCHEDULER).write_text(json.dumps({**wrong, "variance_type": "fixed_small"}))
    with pytest.raises(FileError, match=r"dropout.*timesteps = 0 is below 1"):
        read_run(tmp_path, None)
    with pytest.raises(FileError, match=rf"{SETTINGS}: settings.*dropout = 0.1"):
        read_run(tmp_path, "tiny")  # a config that is named does not make it another network


def test_where_a_scheduler_is_looked_for(tmp_path, tiny):
    config, params = tiny
    for i, place in enumerate((".", "scheduler", "../scheduler", "..")):
        folder = tmp_path / f"saved{i}" / "unet"
        write_run(folder, config, params)
        for name in (CONFIG, SCHEDULER):
            (folder / name).unlink()
        assert read_run(folder, None)[0].timesteps == 1000
        (folder / place).mkdir(exist_ok=True)
        (folder / place / SCHEDULER).write_text('{"num_train_timesteps": 30}')
        found, read = read_run(folder, None)
        assert (found.timesteps, found.variance, found.name) == (30, "small", "unet")
        assert all(np.array_equal(read[key], params[key]) for key in params)
        assert read_run(folder.parent, None)[0] == found.replace(name=folder.parent.name)


def test_the_order_of_attention_levels_is_kept():
    config = load_config("tiny").replace(attention_levels=(2, 0))
    assert from_diffusers(to_diffusers(config), config) == config


def test_a_missing_key_counts_as_diffusers_default():
    settings = {k: v for k, v in CIFAR10.items() if k not in ("freq_shift", "norm_eps")}
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
    written = sorted(path.name for path in tmp_path.iterdir())
    assert written == sorted([CONFIG, SETTINGS, SCHEDULER, WEIGHTS])
    for source, name in ((tmp_path, None), (tmp_path, "tiny"), (tmp_path / WEIGHTS, "tiny")):
        found, read = read_run(source, name)
        assert found == config
        assert list(read) == list(params)
        assert all(np.array_equal(read[key], params[key]) for key in params)


@pytest.mark.parametrize("name", ["\N{GRINNING FACE}", "é", "a\x7f", 'a"\\\n'])
def test_a_run_may_have_any_name(tmp_path, tiny, name):
    config, params = tiny
    write_run(tmp_path, config.replace(name=name), params)
    assert read_run(tmp_path, None)[0] == config.replace(name=name)


def test_settings_too_deep_to_parse_are_refused(tmp_path):
    (tmp_path / SETTINGS).write_text("[" * 100_000)
    with pytest.raises(FileError, match="cannot be read: maximum recursion depth"):
        read_run(tmp_path, None)


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
    with pytest.raises(FileError, match=r"holds no config\.toml or config\.json: name the config"):
        read_run(tmp_path, None)
    with pytest.raises(FileError, match="no such folder or file"):
        read_run(tmp_path / "none", None)
    with pytest.raises(FileError, match="cannot be read"):
        read_run(tmp_path / "none.safetensors", "tiny")
    with pytest.raises(ConfigError, match="unknown config 'small'"):
        read_run(tmp_path, "small")
    (tmp_path / "bad.safetensors").write_bytes(b"not tensors")
    with pytest.raises(FileError, match="not a safetensors file"):
        read_weights(tmp_path / "bad.safetensors")
    write_run(tmp_path, config, params)
    with pytest.raises(FileError, match="a file of weights alone: name the config"):
        read_run(tmp_path / WEIGHTS, None)
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
