"""One run in several backends: what is compared, drawn, refused, and said when it goes wrong."""

import json
import math
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from conformance.__main__ import app
from conformance.parity import (
    Curve,
    Limit,
    Parity,
    batch_of_golden,
    golden_run,
    limits_of,
    sampling_options,
    seed_of,
)
from spec.config import load_config
from spec.goldens import Goldens

ROOT = Path(__file__).resolve().parents[1]
GOLDENS = Goldens()
DIGITS = load_config("digits")
SMALL = """
image_size = [8, 8]
in_channels = 1
channels = [8, 12]
layers_per_block = 1
groups = 4
attention_levels = []
num_classes = 10
timesteps = 20
batch_size = 6
learning_rate = 2e-3
warmup = 2
label_dropout = 0.2
"""
# The backend beside it, but for a rate that a tenth too large and a step that may fail.
OFF = """
import dataclasses

import impl_numpy

name, modes = "off", ("eager",)


class Off:
    def __init__(self, model):
        self.model, self.steps = model, 0

    def __getattr__(self, attribute):
        return getattr(self.model, attribute)

    def train_step(self, *given, **more):
        self.steps += 1
        if self.steps == FAILS_AT:
            raise RuntimeError("out of luck")
        loss = self.model.train_step(*given, **more)
        return float("nan") if self.steps == NAN_AT else loss


def open(config, params=None, **more):
    config = dataclasses.replace(config, learning_rate=1.1 * config.learning_rate)
    return Off(impl_numpy.open(config, params, **more))


FAILS_AT = NAN_AT = None
"""


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{ROOT}")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "small.toml").write_text(SMALL, "utf-8")
    return tmp_path


def parity(*arguments, impl=("impl_numpy",)):
    given = [f"--impl={name}" for name in impl]
    done = CliRunner().invoke(app, ["parity", *given, "--threads=1", *arguments])
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    return done


def report(place):
    return json.loads((place / "reports/parity.json").read_text("utf-8"))


def test_a_run_is_made_compared_and_drawn(place):
    (place / "off.py").write_text(OFF, "utf-8")
    done = parity("--config=small.toml", "--steps=12", "--seed=3", impl=("impl_numpy", "off"))
    assert done.exit_code == 0, done.output  # no golden of this run, so nothing to fail
    values = report(place)
    assert (values["steps"], values["seed"], values["golden"]) == (12, 3, None)
    assert values["reference"] == "impl_numpy float64"
    curves = {(c["backend"], c["dtype"]): c for c in values["curves"]}
    assert len(curves) == 4
    for curve in curves.values():
        assert len(curve["losses"]) == 12
        assert np.shape(curve["samples"]) == (10, 8, 8, 1)
        assert curve["ok"] is None
        assert "numpy" in curve["versions"]
    assert max(curves["impl_numpy", "float64"]["difference"]) == 0
    assert 0 < max(curves["impl_numpy", "float32"]["difference"]) < 1e-5
    off = curves["off", "float64"]["difference"]
    assert off[0] == 0  # the first loss comes before the first update
    assert off[1] > 1e-6
    picture = Image.open(place / "reports/parity.png")
    assert picture.size[0] > 1000
    assert picture.size[1] > 800


def test_a_run_that_fails_is_told_and_the_others_go_on(place):
    for fault, words in (
        ("FAILS_AT = 3", "failed at step 1: RuntimeError: out of luck"),
        ("NAN_AT = 2", "the loss of step 1 is nan"),
    ):
        (place / "off.py").write_text(OFF + fault, "utf-8")
        done = parity("--config=small.toml", "--steps=4", impl=("impl_numpy", "off"))
        assert done.exit_code == 1, done.output
        assert words in done.output
        curves = report(place)["curves"]
        assert [curve["problem"] == "" for curve in curves] == [True, True, False, False]
        assert len(curves[0]["losses"]) == 4


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--steps=0"], "--steps 0 is outside 1..1000000"),
        (["--seed=-1"], "--seed -1 is outside 0..2^64-1"),
        (["--config=nowhere"], "unknown config 'nowhere'"),
        (["--config=tiny"], "dataset 'digits' has images"),
        (["--config=small.toml", "--dtype=float32"], "add --dtype float64"),
        (["--dtype=float16"], "--dtype 'float16' is unknown"),
        (["--jobs=99"], "--jobs 99 is outside"),
    ],
)
def test_what_cannot_be_run_is_refused(place, arguments, words):
    done = parity(*arguments)
    assert done.exit_code == 2, done.output
    assert words in " ".join(done.output.split())
    assert not (place / "reports").exists()


RUN = batch_of_golden(GOLDENS, DIGITS)  # in the golden run's batch size


def golden_parity(shift=0.0, dtype="float64", steps=100):
    case, curve = golden_run(GOLDENS, RUN, None)
    losses = [float(loss) for loss in curve[:steps]]
    losses[steps // 2] *= 1 + shift
    run = Curve("impl_x", dtype, losses)
    limits = limits_of(case, ["float64", "float32"])
    return Parity(RUN, case.options["seed"], steps, [run], curve, limits)


def test_a_curve_is_held_to_the_golden_one_by_its_worst_step():
    assert golden_parity().verdict(golden_parity().curves[0]) is True
    for steps in (100, 40):
        assert golden_parity(0.99e-11, steps=steps).ok
        assert not golden_parity(1.01e-11, steps=steps).ok
    limit = golden_parity().limits["float32"]
    assert isinstance(limit, Limit)
    assert 1e-7 < limit.value < 1e-4
    assert golden_parity(0.99 * limit.value, "float32").ok
    over = golden_parity(1.01 * limit.value, "float32")
    assert not over.ok
    assert "OVER" in over.notes()[-1]
    assert not golden_parity(math.nan).ok
    assert golden_run(GOLDENS, RUN, 1) is None
    assert seed_of(GOLDENS, RUN) == golden_parity().seed
    assert seed_of(GOLDENS, load_config("tiny")) == 0
    assert golden_run(GOLDENS, DIGITS.replace(batch_size=RUN.batch_size + 1), None) is None
    assert RUN.replace(batch_size=DIGITS.batch_size) == DIGITS
    assert batch_of_golden(GOLDENS, load_config("tiny")) == load_config("tiny")


def test_samples_are_guided_only_where_there_are_classes():
    assert sampling_options(DIGITS)["guidance_scale"] == 1.5
    assert sampling_options(load_config("tiny_uncond")) == {
        "method": "ddim",
        "steps": 24,
        "eta": 0.0,
    }
