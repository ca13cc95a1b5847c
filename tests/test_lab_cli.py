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
from lab.quality import check_config
from lab.sample import parse_labels
from lab.state import read_state
from lab.train import choose_config, fit_config, run_name
from spec.config import load_config
from spec.data import SHAPES

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
        (["--config", "digits", "--data", "mnist"], "take --config mnist, or a .toml file of your"),
        (["--data", "letters"], "--data 'letters' is unknown; choose one of digits, mnist"),
        (["--data", "folder:x"], "--data folder:x needs a --config"),
        (["--config", "mnist", "--data", "folder:no-such"], "folder no-such is not there"),
        (["--data-dir", "x"], "'digits' comes with scikit-learn; leave --data-dir out"),
        (["--data", "mnist", "--data-dir", "no-such"], "--data-dir no-such is no folder"),
        (["--precision", "bf16"], "bf16 is not for impl_numpy, which has float32; take"),
        (["--precision", "half"], "--precision = 'half' is unknown"),
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


def test_the_strip_in_the_readme_is_what_its_command_draws(tmp_path, monkeypatch):
    pytest.importorskip("torch")
    monkeypatch.chdir(ROOT)
    readme = (ROOT / "README.md").read_text("utf-8")
    [line] = [line for line in readme.splitlines() if line.endswith("--out docs/strip.png")]
    words = shlex.split(line)
    assert words[:4] == [".nox/torch-cpu/bin/python", "-m", "impl_torch", "sample"]
    done = invoke("impl_torch", *words[3:-1], tmp_path / "strip.png")
    assert done.exit_code == 0, done.output
    drawn = np.asarray(Image.open(tmp_path / "strip.png")).astype(int)
    shown = np.asarray(Image.open(ROOT / "docs/strip.png")).astype(int)
    assert shown.shape == drawn.shape
    assert np.abs(shown - drawn).max() <= 1
    assert (ROOT / "docs/strip.png").stat().st_size < 150_000


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


@pytest.mark.parametrize("backend", ["impl_numpy", "impl_torch"])
def test_a_config_without_classes_trains_on_images_alone(tmp_path, small, backend):
    text = SMALL.replace("num_classes = 10", "num_classes = 0").replace("label_dropout = 0.1", "")
    small.write_text(text)
    done = invoke(backend, "train", "--config", small, "--steps", 2, "--out", tmp_path / "run")
    assert done.exit_code == 0, done.output
    assert read_run(tmp_path / "run", None)[0] == load_config(small)
    assert "class_embedding.weight" not in read_weights(tmp_path / "run" / WEIGHTS)


def own_images(folder, *classes, count=4, size=(9, 12)):
    """A folder of small images: `count` in each of the subfolders; "" is the folder itself."""
    draw = np.random.default_rng(0)
    for name in classes:
        folder.joinpath(name).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            pixels = draw.integers(0, 256, (*size, 3), np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{i}.png")
    return f"folder:{folder}"


@pytest.mark.parametrize(
    ("classes", "expected", "said"),
    [
        (["cats", "dogs", "owls"], 3, "num_classes is 3, as folder:"),
        ([""], 0, "num_classes is 0, as folder:"),
    ],
)
def test_a_folder_of_images_gives_a_config_its_classes(tmp_path, small, classes, expected, said):
    data, out = own_images(tmp_path / "animals", *classes), tmp_path / "run"
    options = ["--config", small, "--data", data, "--steps", 2, "--out", out]
    done = invoke("impl_numpy", "train", *options)
    assert done.exit_code == 0, done.output
    assert said in done.output
    config = read_run(out, None)[0]
    assert (config.data, config.num_classes) == ("folder", expected)
    assert config.label_dropout == (0.1 if expected else 0.0)
    done = invoke("impl_numpy", "train", "--out", out, "--steps", 3, "--resume")
    assert done.exit_code == 0, done.output
    assert "goes on at step 2 of 3" in done.output
    done = invoke("impl_numpy", "sample", "--weights", out, "--out", tmp_path / "a.png")
    assert done.exit_code == 0, done.output


def test_a_config_for_folders_means_its_classes(tmp_path, small):
    data = own_images(tmp_path / "animals", "cats", "dogs", "owls")
    small.write_text(SMALL.replace("num_classes = 10", 'num_classes = 2\ndata = "folder"'))
    train = ["train", "--config", small, "--steps", 1, "--out", tmp_path / "run"]
    done = invoke("impl_numpy", *train)
    assert done.exit_code == 2
    assert "config 'small' is for images of your own; name them with --data folder:" in done.output
    done = invoke("impl_numpy", *train, "--data", data)
    assert done.exit_code == 2
    assert "has 3 classes, config 'small' has 2; in a config of your own, set" in done.output
    assert not (tmp_path / "run").exists()
    small.write_text(small.read_text().replace("num_classes = 2", "num_classes = 3"))
    assert invoke("impl_numpy", *train, "--data", data).exit_code == 0
    assert read_run(tmp_path / "run", None)[0] == load_config(small)


def idx(path, array):
    head = bytes([0, 0, 8, array.ndim]) + b"".join(n.to_bytes(4, "big") for n in array.shape)
    path.write_bytes(head + array.tobytes())


def test_a_dataset_is_read_from_a_folder_and_brings_its_config(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    draw = np.random.default_rng(0)
    for part in ("train", "t10k"):
        idx(tmp_path / f"{part}-images-idx3-ubyte", draw.integers(0, 256, (20, 28, 28), np.uint8))
        idx(tmp_path / f"{part}-labels-idx1-ubyte", np.arange(20, dtype=np.uint8) % 10)
    options = ["--data-dir", tmp_path, "--steps", 1, "--batch-size", 2]
    done = invoke("impl_numpy", "train", "--data", "fashion_mnist", *options)
    assert done.exit_code == 0, done.output
    assert "wrote runs/fashion_mnist-numpy" in done.output
    assert "reading Fashion-MNIST" in done.output
    expected = load_config("fashion_mnist").replace(batch_size=2)
    assert read_run(Path("runs/fashion_mnist-numpy"), None)[0] == expected
    assert read_state(Path("runs/fashion_mnist-numpy")).facts["data_dir"] == str(tmp_path)
    # The folder is known on resuming; another dataset of the same form is another run's.
    again = ["train", "--out", "runs/fashion_mnist-numpy", "--steps", 2, "--resume"]
    assert invoke("impl_numpy", *again).exit_code == 0
    # A config goes with another dataset of its form, and the run is called after both.
    done = invoke("impl_numpy", "train", "--config", "mnist", "--data", "fashion_mnist", *options)
    assert "wrote runs/mnist-fashion_mnist-numpy" in done.output
    assert read_run(Path("runs/mnist-fashion_mnist-numpy"), None)[0].data == "fashion_mnist"


@pytest.mark.parametrize("name", SHAPES)
def test_every_dataset_has_a_config_of_its_name(name):
    config = choose_config(None, name)
    assert (config.name, config.data, config.image_shape) == (name, name, SHAPES[name])
    assert config.num_classes == 10


def test_a_run_on_a_folder_is_not_taken_for_digits():
    config = fit_config(load_config("digits"), "folder:x", np.arange(10))
    assert config.num_classes == 10
    with pytest.raises(ValueError, match="data = 'folder', expected 'digits'"):
        check_config(config)


def test_a_run_is_called_after_config_and_data():
    digits = load_config("digits")
    assert run_name(digits, "digits") == "digits"
    assert run_name(digits, "folder:some/where/cats/") == "digits-cats"
    assert run_name(digits, "folder:/") == "digits-folder"


def test_a_dataset_must_have_the_classes_of_the_config():
    labels = np.arange(10)
    digits = load_config("digits")
    assert fit_config(digits, "digits", labels) == digits
    unconditional = digits.replace(num_classes=0, label_dropout=0.0)
    assert fit_config(unconditional, "folder:x", labels) == unconditional.replace(data="folder")
    with pytest.raises(ValueError, match="has 10 classes, config 'digits' has 9; in a config of"):
        fit_config(digits.replace(num_classes=9), "digits", labels)


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
