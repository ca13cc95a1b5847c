"""lab/events.py: what TensorBoard reads of a run is what its metrics and pictures say."""

import base64
import json
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from lab.cli import app
from lab.events import EVENTS, PATTERN, RECORDS, Events
from lab.state import STATE, read_state
from lab.train import METRICS, SAMPLES

ROOT = Path(__file__).resolve().parents[1]
SMALL = """
image_size = [8, 8]
in_channels = 1
channels = [4]
layers_per_block = 1
groups = 2
num_classes = 0
timesteps = 10
batch_size = 4
"""
# TensorBoard's own reader, in a process of its own: it imports TensorFlow where that is there.
READ = """
import base64, json, sys
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
read = EventAccumulator(sys.argv[1], size_guidance={"scalars": 0, "images": 0}).Reload()
tags = read.Tags()
print(json.dumps({
    "scalars": {tag: [[e.step, e.value] for e in read.Scalars(tag)] for tag in tags["scalars"]},
    "images": {
        tag: [
            [e.step, e.width, e.height, base64.b64encode(e.encoded_image_string).decode()]
            for e in read.Images(tag)
        ]
        for tag in tags["images"]
    },
}))
"""


@pytest.fixture
def train(tmp_path):
    config, out = tmp_path / "small.toml", tmp_path / "run"
    config.write_text(SMALL)

    def train(*more):
        words = ["train", "--config", config, "--out", out, *more]
        done = CliRunner().invoke(app, [str(word) for word in words], obj="impl_numpy")
        return out, done

    return train


def read(out):
    pytest.importorskip("tensorboard")
    words = [sys.executable, "-c", READ, str(out / EVENTS)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def check_same(out, found):
    """Hold what TensorBoard reads to metrics.jsonl and samples/."""
    lines = [json.loads(line) for line in (out / METRICS).read_text().splitlines()]
    assert set(found["scalars"]) == {"loss", "images_per_second", "learning_rate"}
    for tag, values in found["scalars"].items():
        assert [step for step, _ in values] == [line["step"] for line in lines]
        expected = [line[tag] for line in lines]
        assert [value for _, value in values] == pytest.approx(expected, rel=1e-6)  # float32
    pictures = {}
    for step, width, height, data in found["images"]["samples"]:
        pictures[f"step-{step:06}.png"] = base64.b64decode(data)
        assert (width, height) == (4 * 66 + 2, 4 * 66 + 2)
    assert pictures == {path.name: path.read_bytes() for path in (out / SAMPLES).iterdir()}


def test_tensorboard_shows_a_run_that_was_killed_and_resumed_once(train):
    out, done = train("--steps", 4, "--sample-every", 2, "--tensorboard")
    assert done.exit_code == 0, done.output
    assert f"to watch it: tensorboard --logdir {out / EVENTS}" in done.output
    state = (out / STATE).read_bytes()
    more = ["--resume", "--steps", 6]  # it knows the other options
    assert train(*more)[1].exit_code == 0
    (out / STATE).write_bytes(state)  # as though killed at step 6, before its state was written
    assert read_state(out).state["step"] == 4
    assert train(*more)[1].exit_code == 0
    assert len(list((out / EVENTS).glob(PATTERN))) == 3
    check_same(out, read(out))


def test_a_run_is_replaced_with_what_tensorboard_shows(train):
    out, _ = train("--steps", 3, "--sample-every", 1, "--tensorboard")
    more = ["--steps", 2, "--sample-every", 1, "--seed", 1, "--tensorboard", "--overwrite"]
    assert train(*more)[1].exit_code == 0
    assert len(list((out / EVENTS).glob(PATTERN))) == 1
    check_same(out, read(out))
    assert train("--steps", 1, "--overwrite")[1].exit_code == 0
    assert not list((out / EVENTS).glob(PATTERN))


@pytest.mark.parametrize("missing", ["tensorboard", RECORDS])  # all of it, or a part
def test_a_missing_package_is_told_before_the_work(tmp_path, missing):
    start = f"import sys; sys.modules[{missing!r}] = None; from lab.cli import main"
    words = ["train", "--steps", "2", "--tensorboard", "--out", str(tmp_path / "run")]
    done = subprocess.run(
        [sys.executable, "-c", f"{start}; main('impl_numpy')", *words],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 2
    assert "error: --tensorboard needs the package tensorboard" in done.stderr
    assert done.stderr.rstrip().endswith("pip install tensorboard")
    assert not (tmp_path / "run").exists()


def test_a_full_disk_is_told(train, monkeypatch):
    pytest.importorskip("tensorboard")
    out, done = train("--steps", 2, "--tensorboard")

    def add(self, record):
        raise OSError(28, "No space left on device", "events")

    monkeypatch.setattr(Events, "add", add)
    out, done = train("--steps", 4, "--resume", "--tensorboard")
    assert done.exit_code == 1
    assert "No space left on device; the state of step 2 is kept" in done.output
    assert read_state(out).state["step"] == 2
