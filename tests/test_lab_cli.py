"""`python -m impl_NAME train|sample`: what is written, what is refused, and what Ctrl-C keeps."""

import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from lab.cli import app
from lab.files import WEIGHTS, read_run, read_weights
from lab.sample import parse_labels
from lab.state import read_state
from lab.train import training_data
from spec.config import load_config

ROOT = Path(__file__).resolve().parents[1]
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
warmup = 2
label_dropout = 0.1
"""


@pytest.fixture
def small(tmp_path):
    path = tmp_path / "small.toml"
    path.write_text(SMALL)
    return path


def invoke(backend, *arguments):
    return CliRunner().invoke(app, [str(a) for a in arguments], obj=backend)


@pytest.mark.parametrize("backend", ["impl_numpy", "impl_torch"])
@pytest.mark.parametrize("noise", [[], ["--shared-noise"]])
def test_train_then_sample(tmp_path, small, backend, noise):
    out = tmp_path / "run"
    done = invoke(backend, "train", "--config", small, "--steps", 3, "--out", out, *noise)
    assert done.exit_code == 0, done.output
    assert "mean loss of the last 3 steps" in done.output
    config, weights = read_run(out, None)
    assert config == load_config(small)
    picture = tmp_path / "grid.png"
    done = invoke(backend, "sample", "--weights", out, "--steps", 4, "--out", picture)
    assert done.exit_code == 0, done.output
    assert Image.open(picture).size == (10 * 66 + 2, 2 * 66 + 2)
    again = invoke(backend, "train", "--config", small, "--steps", 3, "--out", out, *noise)
    assert again.exit_code == 2
    assert "holds a run" in again.output
    more = ["--overwrite", "--seed", 1]
    again = invoke(backend, "train", "--config", small, "--steps", 3, "--out", out, *noise, *more)
    assert again.exit_code == 0, again.output
    assert not np.array_equal(
        read_weights(out / WEIGHTS)["conv_in.weight"], weights["conv_in.weight"]
    )


def test_a_seed_gives_the_same_run_and_shared_noise_the_same_in_both(tmp_path, small):
    for name, backend in (("a", "impl_numpy"), ("b", "impl_numpy"), ("c", "impl_torch")):
        options = ["--config", small, "--steps", 5, "--shared-noise", "--out", tmp_path / name]
        assert invoke(backend, "train", *options).exit_code == 0
    a, b, c = (read_weights(tmp_path / name / WEIGHTS) for name in "abc")
    assert all(np.array_equal(a[key], b[key]) for key in a)
    # Adam divides by the size of a gradient: where one is nearly zero, rounding decides its sign.
    error = np.sqrt(sum(np.sum((a[key] - c[key]) ** 2) for key in a))
    assert error < 1e-3 * np.sqrt(sum(np.sum(a[key] ** 2) for key in a))


@pytest.mark.parametrize(
    "options",
    [
        [],
        ["--method", "ddpm"],
        ["--eta", "1", "--steps", "7", "--labels", "3"],
        ["--guidance-scale", "2.5", "--labels", "1,10", "--count", "3", "--seed", "9"],
    ],
)
def test_all_backends_draw_the_same_picture(tmp_path, small, options):
    assert invoke("impl_numpy", "train", "--config", small, "--steps", 2, "--out", tmp_path).output
    pictures = []
    for backend in ("impl_numpy", "impl_torch"):
        out = tmp_path / f"{backend}.png"
        done = invoke(backend, "sample", "--weights", tmp_path, "--out", out, *options)
        assert done.exit_code == 0, done.output
        pictures.append(np.asarray(Image.open(out)).astype(int))
    assert np.abs(pictures[0] - pictures[1]).max() <= 1
    assert pictures[0].std() > 10


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--config", "tiny"], "images [8, 8, 1], config 'tiny' is for [8, 12, 2]"),
        (["--config", "none"], "unknown config 'none'"),
        (["--device", "tpu"], "device = 'tpu' is unknown"),
        (["--batch-size", "0"], "greater than or equal to 1"),
        (["--steps", "0"], "greater than or equal to 1"),
        (["--seed", "-1"], "greater than or equal to 0"),
    ],
)
def test_wrong_training_arguments_are_refused(tmp_path, options, words):
    done = invoke("impl_numpy", "train", "--out", tmp_path / "run", *options)
    assert done.exit_code == 2
    assert words in done.output
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--out", "picture.jpg"], "no PNG file"),
        (["--labels", "a"], "--labels 'a' is not a list"),
        (["--labels", "11"], "labels[0] = 11 is outside 0..10"),
        (["--steps", "21"], "--steps 21 is above the 20"),
        (["--method", "euler"], "method = 'euler' is unknown"),
        (["--method", "ddpm", "--steps", "5"], "ddpm visits all 20"),
        (["--eta", "1.5"], "eta = 1.5"),
        (["--config", "digits"], "channels = (8, 16), the config has (32, 64)"),
    ],
)
def test_wrong_sampling_arguments_are_refused(tmp_path, small, options, words):
    run = tmp_path / "run"
    assert invoke("impl_numpy", "train", "--config", small, "--steps", 1, "--out", run).output
    out = ["--out", str(tmp_path / "picture.png")]
    done = invoke("impl_numpy", "sample", "--weights", run, *out, *options)
    assert done.exit_code == 2, done.output
    assert words in done.output
    assert not (tmp_path / "picture.png").exists()


def test_labels_repeat_every_class_by_default():
    assert parse_labels(None, load_config("digits")) == list(range(10))
    assert parse_labels("3, 1", load_config("digits")) == [3, 1]
    assert parse_labels(None, load_config("tiny_uncond")) == []


def test_a_config_without_classes_trains_on_images_alone():
    config = load_config("digits").replace(num_classes=0, label_dropout=0.0)
    assert len(training_data(config)[0]) > 1000
    with pytest.raises(ValueError, match="has 10 classes, config 'digits' has 9"):
        training_data(load_config("digits").replace(num_classes=9))


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGINT for one process there")
def test_ctrl_c_keeps_what_is_trained(tmp_path, small):
    command = [sys.executable, "-m", "impl_numpy", "train", "--config", str(small)]
    command += ["--steps", "1000000", "--out", str(tmp_path / "run")]
    log = tmp_path / "log"
    with log.open("w") as output:
        process = subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT)
        try:
            deadline = time.monotonic() + 60
            while "config small" not in log.read_text() and time.monotonic() < deadline:
                time.sleep(0.1)
            time.sleep(1)  # some steps
            process.send_signal(signal.SIGINT)
            assert process.wait(timeout=30) == 130, log.read_text()
        finally:
            process.kill()
    text = log.read_text()
    assert "stopped after" in text
    state = read_state(tmp_path / "run").state
    assert f"stopped after {state['step']} of 1000000 steps" in text
    go_on = shlex.split(text.split("go on with: ")[1].strip())
    assert go_on == [*command, "--resume"]
    go_on[go_on.index("1000000")] = str(state["step"] + 1)
    done = subprocess.run(go_on, cwd=ROOT, capture_output=True, text=True, check=True)
    assert f"goes on at step {state['step']}" in done.stdout
    assert read_state(tmp_path / "run").state["step"] == state["step"] + 1
    assert read_run(tmp_path / "run", None)[0] == load_config(small)
