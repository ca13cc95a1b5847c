"""Configs: what ships loads; every fault is named, with what is allowed."""

import dataclasses

import pytest

from spec.config import Config, ConfigError, config_from_dict, config_names, load_config

TINY = dataclasses.asdict(load_config("tiny"))


def test_all_shipped_configs_load_under_their_own_name():
    names = config_names()
    assert {"digits", "tiny", "tiny_uncond", "tiny_v", "tiny_x0", "ddpm_cifar10"} <= set(names)
    assert [load_config(name).name for name in names] == names


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"timestep": 10}, ["unknown key 'timestep'", "timesteps"]),
        ({"schedule": "quadratic"}, ["schedule = 'quadratic'", "linear, cosine"]),
        ({"prediction": "score"}, ["prediction = 'score'", "eps, x0, v"]),
        ({"variance": "learned"}, ["variance = 'learned'", "small, large"]),
        ({"data": "imagenet"}, ["data = 'imagenet'", "digits"]),
        ({"image_size": [8, 10]}, ["width 10", "not divisible by 4", "multiple of 4"]),
        ({"image_size": [6, 12]}, ["height 6", "not divisible by 4"]),
        ({"image_size": [8]}, ["[height, width]"]),
        ({"channels": [8, 15, 12]}, ["channels[1] = 15", "groups = 4"]),
        ({"channels": []}, ["channels is empty"]),
        ({"channels": [7, 14], "groups": 7}, ["channels[0] = 7", "even"]),
        ({"channels": [2, 4], "groups": 2}, ["channels[0] = 2", "at least 4"]),
        ({"groups": 0}, ["groups = 0", "at least 1"]),
        ({"attention_levels": [3]}, ["level 3", "0..2"]),
        ({"attention_levels": [1, 1]}, ["twice"]),
        ({"timesteps": 0}, ["timesteps = 0"]),
        ({"timesteps": 1.5}, ["timesteps = 1.5", "integer"]),
        ({"timesteps": True}, ["timesteps = True", "integer"]),
        ({"beta_end": 1.0}, ["beta_end = 1.0", "(0, 1)"]),
        ({"beta_start": float("nan")}, ["beta_start", "finite"]),
        ({"learning_rate": 0.0}, ["learning_rate", "positive"]),
        ({"ema_decay": 1.0}, ["ema_decay = 1.0"]),
        ({"max_grad_norm": -1.0}, ["max_grad_norm = -1.0"]),
        ({"label_dropout": 1.5}, ["label_dropout = 1.5"]),
        ({"num_classes": 0}, ["label_dropout", "num_classes"]),
        ({"clip": 1}, ["clip = 1", "true or false"]),
    ],
)
def test_a_fault_is_named_with_what_is_allowed(change, words):
    with pytest.raises(ConfigError) as caught:
        config_from_dict({**TINY, **change})
    assert all(word in str(caught.value) for word in ["'tiny'", *words])


def test_all_faults_are_named_at_once():
    with pytest.raises(ConfigError) as caught:
        load_config("tiny").replace(image_size=(8, 10), groups=5, ema_decay=2.0)
    message = str(caught.value)
    assert all(word in message for word in ("width 10", "channels[2] = 12", "ema_decay = 2.0"))


def test_a_missing_key_is_named():
    values = {key: value for key, value in TINY.items() if key not in ("groups", "channels")}
    with pytest.raises(ConfigError, match="missing key 'channels', 'groups'"):
        config_from_dict(values)


def test_unknown_names_and_unreadable_files_are_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"unknown config 'digit'.*digits"):
        load_config("digit")
    with pytest.raises(ConfigError, match="cannot be read"):
        load_config(tmp_path / "none.toml")
    broken = tmp_path / "broken.toml"
    broken.write_text("image_size = [8,", encoding="utf-8")
    with pytest.raises(ConfigError, match="not TOML"):
        load_config(broken)


def test_a_config_is_read_from_a_path_and_cannot_be_changed(tmp_path):
    path = tmp_path / "mine.toml"
    text = (
        "image_size = [4, 4]\nin_channels = 1\nchannels = [4]\nlayers_per_block = 1\ngroups = 2\n"
    )
    path.write_text(text, encoding="utf-8")
    config = load_config(path)
    assert isinstance(config, Config)
    assert (config.name, config.levels, config.time_width) == ("mine", 1, 16)
    assert config.image_shape == (4, 4, 1)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.groups = 4
