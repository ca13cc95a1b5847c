"""Goldens of any config: what is served and refused, what a seed changes, who passes them."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import conformance
import impl_numpy
from spec.cases import Inputs, golden_params
from spec.config import Config, ConfigError
from spec.fresh import check_config, fresh_cases, random_config, toml_text
from spec.goldens import Goldens
from spec.tolerance import tolerance

ROOT = Path(__file__).resolve().parent.parent

SMALL = Config(
    name="small",
    image_size=(2, 4),
    in_channels=1,
    channels=(4, 6),
    layers_per_block=2,
    groups=2,
    num_classes=2,
    timesteps=3,
    prediction="v",
)


def test_every_random_config_can_be_served_and_all_choices_occur():
    configs = [random_config(number) for number in range(300)]
    for config in configs:
        check_config(config)
    assert random_config(17) == configs[17]
    assert len(set(configs)) == 300
    for field, values in (
        ("layers_per_block", {1, 2, 3}),
        ("prediction", {"eps", "x0", "v"}),
        ("variance", {"small", "large"}),
        ("schedule", {"linear", "cosine"}),
        ("clip", {True, False}),
        ("levels", {1, 2, 3, 4}),
    ):
        assert {getattr(config, field) for config in configs} == values
    assert any(not config.num_classes for config in configs)
    assert any(config.image_size[0] != config.image_size[1] for config in configs)
    assert any(config.attention_levels for config in configs)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"channels": (4, 2)}, r"channels\[1\] = 2 with groups = 2 is one channel a group"),
        ({"image_size": (2, 2)}, "attention has a single pixel"),
        ({"beta_start": 1e-6}, "first beta, 1e-06, is below"),
        ({"beta_start": 0.5, "beta_end": 0.9, "timesteps": 100}, "alphas_cumprod ends at"),
        ({"name": "a/b"}, "its name goes into names of files"),
        ({"channels": (256, 512), "image_size": (64, 64)}, "an hour's work"),
    ],
)
def test_what_no_golden_can_say_is_refused_with_the_reason(changes, words):
    check_config(SMALL)
    with pytest.raises(ConfigError, match=words):
        check_config(SMALL.replace(**changes))


@pytest.mark.parametrize(
    "changes", [{}, {"num_classes": 0}, {"timesteps": 1}, {"attention_levels": (0, 1)}]
)
def test_the_cases_fit_any_config_and_follow_the_seed(changes):
    config = SMALL.replace(**changes)
    one, again, other = Inputs(1), Inputs(1), Inputs(2)
    cases = fresh_cases(one, config)
    assert {case.level for case in cases} == set(range(7))
    assert len({case.id for case in cases}) == len(cases)
    assert {case.full_config.name for case in cases} == {"small"}
    few = fresh_cases(Inputs(1), config, brief=True)
    assert {case.call for case in few} < {case.call for case in cases}
    fresh_cases(again, config)
    fresh_cases(other, config)
    stem = "small.inputs"
    for key, value in again.files[stem].items():
        assert np.array_equal(value, one.files[stem][key]), key
    for name in golden_params(Inputs(), config):
        assert not np.array_equal(
            one.files[stem][f"params/{name}"], other.files[stem][f"params/{name}"]
        )
    t, t_prev = one.files[stem]["L1/t"], one.files[stem]["L1/t_prev"]
    assert (t_prev < t).all()
    assert t.max() == config.timesteps - 1
    if config.num_classes:
        labels = np.concatenate(
            [v.ravel() for k, v in one.files[stem].items() if k.endswith("labels")]
        )
        assert 0 <= labels.min() <= labels.max() == config.num_classes


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Goldens of SMALL and of a random config, made as the command makes them."""
    pytest.importorskip("diffusers")
    pytest.importorskip("mpmath")
    from spec import generate

    folder = tmp_path_factory.mktemp("fresh") / "goldens"
    generate.write_fresh(folder, [SMALL, random_config(3)], 5, ["float32"], brief=True)
    return folder


def test_fresh_goldens_are_complete_and_a_right_backend_passes(folder):
    goldens = Goldens(folder)
    goldens.verify()
    assert goldens.configs == {"small": SMALL, "random-3": random_config(3)}
    results = conformance.check_backend(impl_numpy, goldens=goldens)
    assert len(results) == 2 * len(goldens.cases)
    assert [r.case.id for r in results if not r.ok] == []
    reasons = {o.tolerance["float32"]["reason"] for c in goldens.cases for o in c.outputs}
    assert any(reason.startswith("16 x floor, 8 seeds") for reason in reasons)


def test_a_change_is_held_to_what_float64_gives_of_a_step(folder):
    (case,) = [case for case in Goldens(folder).cases if case.id == "L5/small/train_steps"]
    limits = {output.name: output.tolerance["float64"] for output in case.outputs}
    changes = {name: limit for name, limit in limits.items() if "/delta/" in name}
    assert changes
    for limit in changes.values():
        assert limit["l2"] >= 1e-10
        assert limit["max"] >= 1e-9
        assert (limit["l2"] > 1e-10 or limit["max"] > 1e-9) == ("16 x floor" in limit["reason"])
    assert sum("16 x floor" in limit["reason"] for limit in changes.values()) < len(changes) / 4


def test_a_gradient_near_adams_epsilon_widens_its_own_limit_alone():
    cases = fresh_cases(Inputs(1), SMALL, brief=True)
    (case,) = [case for case in cases if case.call == "train_steps"]
    steep, flat = "1/delta/conv_in.weight", "1/delta/conv_out.weight"
    case.floors = {
        "float64": {steep: {"l2": 1e-10, "max": 2e-9}, flat: {"l2": 1e-14, "max": 4e-11}}
    }
    case.columns = ()
    assert tolerance(case, flat, {})["float64"] == {
        "l2": 1e-10,
        "max": 1e-9,
        "reason": "float64, of an Adam step",
    }
    limit = tolerance(case, steep, {})["float64"]
    assert (limit["l2"], limit["max"]) == (1.6e-9, 3.2e-8)
    assert "16 x floor, 8 seeds: l2 1e-10, max 2e-09" in limit["reason"]


class Faulty:
    """impl_numpy, but for the second resnet's time embedding on the way down."""

    name, modes = "faulty", ("eager",)

    @staticmethod
    def open(config, params=None, **more):
        params = dict(params) if params else params
        if params:
            name = "down_blocks.0.resnets.1.time_emb_proj.bias"
            params[name] = params[name] * 1.001
        return impl_numpy.open(config, params, **more)


def test_a_fault_in_a_second_resnet_is_found_where_it_is(folder):
    goldens = Goldens(folder)
    cases = [case for case in goldens.cases if case.id == "L3/small/taps"]
    for result in conformance.check_backend(Faulty, ["float64", "float32"], cases, goldens=goldens):
        assert result.status == "failed"
        assert result.block == "down_blocks.0.resnets.1"


def generate_command(*arguments):
    command = [sys.executable, "-m", "spec.generate", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def test_the_command_line_makes_goldens_of_a_file(tmp_path):
    pytest.importorskip("diffusers")
    file, out = tmp_path / "mine.toml", tmp_path / "out"
    mine = SMALL.replace(name="mine", num_classes=0, layers_per_block=1)
    file.write_text(toml_text(mine), "utf-8")
    done = generate_command("--config", file, "--seed", 3, "--brief", "--out", out)
    assert done.returncode == 0, done.stdout + done.stderr
    assert Goldens(out).configs == {"mine": mine}
    again = generate_command("--config", file, "--out", out)
    assert again.returncode == 2
    assert "is there and not empty" in " ".join(again.stdout.split())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--config", "nothing", "--out", "x"], "unknown config 'nothing'; shipped are"),
        (["--config", "ddpm_cifar10", "--out", "x"], "an hour's work"),
        (["--config", "tiny"], "--out is missing"),
        (["--config", "tiny", "--out", "x", "--column", "float16"], "--column float16 is unknown"),
        (["--config", "tiny", "--out", "x", "--check"], "for the committed goldens alone"),
        (["--random", "3", "--out", "x"], "is not FIRST:COUNT"),
        (["--out", "x"], "are for goldens of --config or --random"),
    ],
)
def test_what_cannot_be_made_is_refused_before_the_work(options, words, monkeypatch):
    pytest.importorskip("diffusers")
    from typer.testing import CliRunner

    from spec import generate

    app = generate.typer.Typer()
    app.command()(generate.main)
    monkeypatch.setattr(generate, "write_fresh", None)
    done = CliRunner().invoke(app, options)
    assert done.exit_code == 2
    assert words in " ".join(done.output.split())
