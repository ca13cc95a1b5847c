"""A run killed at any moment and resumed ends with the bits of a run that was never stopped.

Twenty kills in each of the four take about twenty minutes, so they are left out unless asked for:
`ROSETTA_SLOW_TESTS=1 nox -s tests -- tests/test_lab_resume.py`.
"""

import importlib.util
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lab.files import WEIGHTS, read_weights
from lab.state import PARTS, STATE, read_state

ROOT = Path(__file__).resolve().parents[1]
FRAMEWORKS = {"numpy": "numpy", "torch": "torch", "tf": "tensorflow", "jax": "jax"}
STEPS = 60
SMALL = """
image_size = [8, 8]
in_channels = 1
channels = [8, 16]
layers_per_block = 1
groups = 4
attention_levels = [1]
num_classes = 10
timesteps = 20
batch_size = 4
warmup = 30
label_dropout = 0.1
"""
slow = pytest.mark.skipif(
    not os.environ.get("ROSETTA_SLOW_TESTS"), reason="set ROSETTA_SLOW_TESTS=1 for it"
)
posix = pytest.mark.skipif(sys.platform == "win32", reason="no SIGKILL there")


def command(backend, config, out, *more):
    words = ["train", "--config", config, "--steps", STEPS, "--sample-every", 20, "--device", "cpu"]
    return [sys.executable, "-m", f"impl_{backend}", *map(str, [*words, "--out", out, *more])]


def finish(words):
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def kill(words, out, before, after):
    """Start a run and kill it `before` seconds after the start, or `after` steps were seen.

    Gives the step of the state that is left, or None where there is none.
    """
    process = subprocess.Popen(
        words, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    metrics = out / "metrics.jsonl"
    size = metrics.stat().st_size if metrics.exists() else 0
    try:
        began = time.monotonic()
        while time.monotonic() - began < before and process.poll() is None:
            time.sleep(0.002)
            if metrics.exists() and metrics.stat().st_size > size:
                time.sleep(after)
                break
        process.send_signal(signal.SIGKILL)
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode in (-signal.SIGKILL, 0), errors
    return read_state(out).state["step"] if (out / STATE).exists() else None


def check_kills(backend, tmp_path, kills, seed, options=()):
    """Kill a run so often, resume it to its end, and compare with one that was not stopped."""
    config = tmp_path / "small.toml"
    config.write_text(SMALL)
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    began = time.monotonic()
    finish(command(backend, config, whole, *options))
    duration = time.monotonic() - began
    chance, steps, alive = random.Random(seed), [], STEPS
    while len(steps) < kills:
        resume = ["--resume"] if (broken / STATE).exists() else []
        save = ["--save-every", chance.choice([1, 3, 7])]
        words = command(backend, config, broken, *options, *save, *resume)
        # One in five dies before its first step; the others within some steps.
        before = chance.uniform(0, duration) if chance.random() < 0.2 else 600
        step = kill(words, broken, before, chance.uniform(0, 0.15))
        steps.append(step)
        if step == STEPS:  # it was faster than the kill: another run takes its place
            check_same(whole, broken)
            for path in (broken / STATE, broken / WEIGHTS):
                path.unlink()
            alive = STEPS
        elif step is not None:
            assert alive == STEPS or step >= alive, f"{step} after {alive}: a state went back"
            alive = step
    print(f"{backend}: states after {kills} kills stood at {steps}")
    assert any(step not in (None, 0, STEPS) for step in steps), f"no kill met a step: {steps}"
    resume = ["--resume"] if (broken / STATE).exists() else []
    finish(command(backend, config, broken, *options, *resume))
    check_same(whole, broken)


def check_same(whole, broken):
    a, b = read_state(whole), read_state(broken)
    assert a.state["step"] == b.state["step"] == STEPS
    for part in PARTS:
        for name, value in a.state[part].items():
            assert value.tobytes() == b.state[part][name].tobytes(), f"{part} {name}"
    weights = read_weights(broken / WEIGHTS)
    assert all(np.array_equal(weights[key], value) for key, value in a.state["ema"].items())
    lines = [json.loads(line) for line in (broken / "metrics.jsonl").read_text().splitlines()]
    others = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    for key in ("loss", "learning_rate"):
        assert [line[key] for line in lines] == [line[key] for line in others]
    assert [line["seconds"] for line in lines] == sorted(line["seconds"] for line in lines)
    for folder in (whole, broken):
        pictures = sorted(path.name for path in (folder / "samples").iterdir())
        assert pictures == [f"step-{step:06}.png" for step in (20, 40, 60)]
        for name in pictures:
            one, other = ((place / "samples" / name).read_bytes() for place in (whole, folder))
            assert one == other, name
        assert not [path for path in folder.rglob(".*") if path.is_file()], "a temporary file"


def own_images(folder):
    """A folder of two classes of small images, as an argument of --data."""
    draw = np.random.default_rng(0)
    for i in range(30):
        place = folder / f"class-{i % 2}"
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(draw.integers(0, 256, (9, 12, 3), np.uint8)).save(place / f"{i}.png")
    return f"folder:{folder}"


@posix
@pytest.mark.parametrize(
    ("backend", "kind"),
    [("numpy", "plain"), ("torch", "plain"), ("numpy", "own images"), ("torch", "bf16")],
)
def test_a_killed_run_ends_as_one_never_stopped(tmp_path, backend, kind):
    options = {
        "plain": [],
        "own images": ["--data", own_images(tmp_path / "images"), "--shared-noise"],
        "bf16": ["--precision", "bf16", "--tensorboard"],
    }
    if kind == "bf16":
        pytest.importorskip("tensorboard")
    check_kills(backend, tmp_path, kills=2, seed=1, options=options[kind])


@posix
@slow
@pytest.mark.parametrize("backend", FRAMEWORKS)
def test_twenty_kills(tmp_path, backend):
    if importlib.util.find_spec(FRAMEWORKS[backend]) is None:
        pytest.skip(f"{FRAMEWORKS[backend]} is not installed")
    check_kills(backend, tmp_path, kills=20, seed=2)
