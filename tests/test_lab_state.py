"""lab/state.py and lab/train.py: what a state holds, what is refused, and what a fault leaves."""

import errno
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file, save_file
from typer.testing import CliRunner

import lab.train
from lab.cli import app
from lab.files import FileError, read_run
from lab.state import IDENTITY, KEY, PARTS, STATE, data_digest, read_state, write_state
from lab.train import METRICS, Metrics, alone_in, learning_rate
from spec.config import load_config

SMALL = """
image_size = [8, 8]
in_channels = 1
channels = [4]
layers_per_block = 1
groups = 2
num_classes = 10
timesteps = 10
batch_size = 4
warmup = 4
label_dropout = 0.1
"""


@pytest.fixture
def small(tmp_path):
    path = tmp_path / "small.toml"
    path.write_text(SMALL)
    return path


def train(small, out, *more, backend="impl_numpy"):
    words = ["train", "--config", small, "--out", out, *more]
    return CliRunner().invoke(app, [str(word) for word in words], obj=backend)


@pytest.fixture
def run(tmp_path, small):
    out = tmp_path / "run"
    done = train(small, out, "--steps", 3)
    assert done.exit_code == 0, done.output
    return out


def bits(out):
    state = read_state(out).state
    return {f"{part}.{name}": v.tobytes() for part in PARTS for name, v in state[part].items()}


def test_a_state_holds_all_of_a_run(run, small):
    saved = read_state(run)
    assert saved.state["step"] == 3
    assert saved.config == load_config(small)
    assert set(saved.facts) >= {"format", "framework", "numpy", "python", "threads", "steps"}
    assert saved.facts["seed"] == 0
    assert saved.facts["backend"] == "impl_numpy"
    weights = read_run(run, None)[1]
    assert all(np.array_equal(weights[name], v) for name, v in saved.state["ema"].items())
    assert any(not np.array_equal(weights[name], v) for name, v in saved.state["params"].items())


@pytest.mark.parametrize("noise", [[], ["--shared-noise"]])
def test_a_run_in_two_parts_is_the_run_in_one(tmp_path, small, noise):
    one, two = tmp_path / "one", tmp_path / "two"
    assert train(small, one, "--steps", 7, "--seed", 5, *noise).exit_code == 0
    assert train(small, two, "--steps", 4, "--seed", 5, "--sample-every", 2, *noise).exit_code == 0
    assert sorted(path.name for path in (two / "samples").iterdir()) == [
        "step-000002.png",
        "step-000004.png",
    ]
    # All but the number of steps is known from the state.
    done = CliRunner().invoke(
        app, ["train", "--out", str(two), "--steps", "7", "--resume"], obj="impl_numpy"
    )
    assert done.exit_code == 0, done.output
    assert "goes on at step 4 of 7" in done.output
    assert bits(one) == bits(two)


def test_metrics_say_what_each_step_did(run, small):
    lines = [json.loads(line) for line in (run / METRICS).read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert [line["learning_rate"] for line in lines] == [
        learning_rate(load_config(small), step) for step in range(3)
    ]
    assert lines[0]["learning_rate"] == pytest.approx(0.25e-3)
    for line in lines:
        assert list(line) == ["step", "loss", "images_per_second", "seconds", "learning_rate"]
        assert line["loss"] > 0
        assert line["images_per_second"] > 0
    assert 0 < lines[0]["seconds"] < lines[1]["seconds"]


def test_metrics_go_on_after_the_state(tmp_path, capsys):
    path = tmp_path / METRICS
    records = [{"step": step, "seconds": step / 2} for step in (1, 2, 3, 4)]
    path.write_text("".join(json.dumps(r) + "\n" for r in records) + '{"step": 5, "sec')
    metrics = Metrics(tmp_path, 3)
    assert metrics.seconds == 1.5
    metrics.add({"step": 4, "seconds": 9.0})
    metrics.sync()
    metrics.close()
    assert [json.loads(line) for line in path.read_text().splitlines()] == [
        *records[:3],
        {"step": 4, "seconds": 9.0},
    ]
    assert not capsys.readouterr().err
    Metrics(tmp_path, 6).close()
    assert "has 4 of the 6 steps" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--seed", 1], "seed = 1, the run has 0"),
        (["--batch-size", 8], "batch_size = 8, the run has 4"),
        (["--config", "digits"], "layers_per_block = 1"),
        (["--shared-noise"], "shared_noise = True, the run has False"),
        (["--precision", "bf16"], "--precision bf16 is not for impl_numpy, which has float32"),
        (["--steps", 2], "is at step 3, beyond --steps 2"),
        (["--overwrite"], "--resume goes on, --overwrite begins anew"),
    ],
)
def test_another_run_is_refused(run, small, options, words):
    before = {path.name: path.read_bytes() for path in run.iterdir()}
    done = train(small, run, "--resume", *options)
    assert done.exit_code == 2
    if words == "layers_per_block = 1":
        words = "channels = [32, 64], the run has [4]"
    assert words in done.output
    assert {path.name: path.read_bytes() for path in run.iterdir()} == before


def test_bf16_goes_on_exactly_and_is_a_run_of_its_own(tmp_path, small):
    pytest.importorskip("torch")
    one, two = tmp_path / "one", tmp_path / "two"
    bf16 = ["--precision", "bf16"]
    for out, steps in ((one, 6), (two, 3)):
        done = train(small, out, "--steps", steps, *bf16, backend="impl_torch")
        assert done.exit_code == 0, done.output
        assert ", bf16, " in done.output
    done = train(small, two, "--resume", "--precision", "float32", backend="impl_torch")
    assert done.exit_code == 2
    assert "dtype = 'float32', the run has 'bf16'" in done.output
    done = train(small, two, "--resume", "--steps", 6, backend="impl_torch")
    assert done.exit_code == 0, done.output
    assert bits(one) == bits(two)
    state = read_state(one).state
    assert {value.dtype for part in PARTS for value in state[part].values()} == {np.dtype("f4")}
    # Master weights: what bf16 cannot hold is kept.
    weight = state["params"]["conv_in.weight"].view(np.uint32)
    assert (weight & 0xFFFF).any()


def test_other_data_and_another_backend_are_refused(run, small, monkeypatch):
    pytest.importorskip("torch")
    done = train(small, run, "--resume", "--steps", 4, backend="impl_torch")
    assert done.exit_code == 2
    assert "backend = 'impl_torch', the run has 'impl_numpy'" in done.output
    data = lab.train.load_dataset("digits")
    other = data._replace(train_images=-data.train_images)
    monkeypatch.setattr(lab.train, "load_dataset", lambda *_: other)
    done = train(small, run, "--resume", "--steps", 4)
    assert done.exit_code == 2
    assert "the data are not those of the run" in done.output


def test_a_folder_must_hold_the_images_that_it_held(tmp_path, small):
    animals, one, two = tmp_path / "animals", tmp_path / "one", tmp_path / "two"
    draw = np.random.default_rng(0)
    for i in range(8):
        place = animals / "ab"[i % 2]
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(draw.integers(0, 256, (8, 8), np.uint8)).save(place / f"{i}.png")
    data = ["--data", f"folder:{animals}"]
    assert train(small, one, "--steps", 5, *data).exit_code == 0
    assert train(small, two, "--steps", 2, *data).exit_code == 0
    assert train(small, two, "--steps", 5, "--resume").exit_code == 0  # its --config is another's
    assert bits(one) == bits(two)
    # As well from another place, but not with an image changed, or a class more.
    animals.rename(tmp_path / "moved")
    done = train(small, two, "--steps", 6, "--resume")
    assert done.exit_code == 2
    assert "is not there; give the path" in done.output
    moved = ["--data", f"folder:{tmp_path / 'moved'}"]
    assert train(small, two, "--steps", 6, "--resume", *moved).exit_code == 0
    before = bits(two)
    image = tmp_path / "moved" / "a" / "0.png"
    Image.fromarray(255 - np.asarray(Image.open(image))).save(image)
    done = train(small, two, "--steps", 7, "--resume", *moved)
    assert done.exit_code == 2
    assert "the data are not those of the run" in done.output
    (tmp_path / "moved" / "c").mkdir()
    image.rename(tmp_path / "moved" / "c" / "0.png")
    done = CliRunner().invoke(
        app, ["train", "--out", str(two), "--resume", *moved], obj="impl_numpy"
    )
    assert done.exit_code == 2
    assert "the data are not those of the run" in done.output
    assert bits(two) == before


def test_the_digest_of_data_sees_every_value():
    images, labels = np.zeros((2, 3, 4, 1), np.float32), np.array([0, 1])
    digests = {data_digest(images, labels)}
    changed = images.copy()
    changed[1, 2, 3, 0] = 1e-7
    digests |= {data_digest(changed, labels), data_digest(images, labels[::-1])}
    digests |= {data_digest(images.reshape(2, 4, 3, 1), labels), data_digest(images[:1], labels)}
    assert len(digests) == 5


def test_other_circumstances_are_a_warning(run, small, monkeypatch):
    monkeypatch.setenv("OPENBLAS_NUM_THREADS", "1")
    done = train(small, run, "--resume", "--steps", 4)
    assert done.exit_code == 0, done.output
    assert "warning: threads is 1 " in done.output
    assert "OPENBLAS_NUM_THREADS=1, was " in done.output
    assert "the last bits may differ" in done.output


def test_a_run_that_is_done_says_so(run, small):
    before = bits(run)
    done = train(small, run, "--resume")
    assert done.exit_code == 0, done.output
    assert "goes on at step 3 of 3" in done.output
    assert bits(run) == before


def test_a_run_is_not_replaced_unasked(run, small):
    for name in ("diffusion_pytorch_model.safetensors", STATE):  # either makes it a run
        done = train(small, run)
        assert done.exit_code == 2
        assert "go on with it by --resume, choose another --out, or replace it by" in done.output
        (run / name).unlink()
    assert train(small, run, "--steps", 2).exit_code == 0
    assert train(small, run, "--steps", 1, "--sample-every", 1, "--overwrite").exit_code == 0
    assert len((run / METRICS).read_text().splitlines()) == 1
    assert train(small, run, "--steps", 2, "--overwrite").exit_code == 0
    assert not list((run / "samples").iterdir())


def test_nothing_to_go_on_from_is_said(tmp_path, small):
    done = train(small, tmp_path / "none", "--resume")
    assert done.exit_code == 2
    assert f"holds no {STATE} to go on from; leave --resume out to begin" in done.output
    assert not (tmp_path / "none").exists()


def damage(path, kind):
    data = bytearray(path.read_bytes())
    if kind == "cut short":
        del data[-1000:]
    elif kind == "cut in its head":
        del data[20:]
    elif kind == "empty":
        data.clear()
    elif kind == "one bit":
        data[-500] ^= 1
    elif kind == "a bit of its facts":
        at = data.index(b'\\"seed\\": 0') + 9
        data[at : at + 1] = b"1"
    elif kind == "no facts":
        save_file(load_file(path), path)
        return
    elif kind == "of another version":
        at = data.index(b'\\"format\\": 1') + 12
        data[at : at + 1] = b"2"
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("cut short", "is damaged, not a whole file"),
        ("cut in its head", "is damaged, not a whole file"),
        ("empty", "is damaged, not a whole file"),
        ("one bit", "is damaged: its values are not those written"),
        ("a bit of its facts", "is damaged: its values are not those written"),
        ("no facts", "was not written by this command"),
        ("of another version", "has format 2; this version reads 1"),
    ],
)
def test_a_damaged_state_is_refused_and_left(run, small, kind, words):
    damage(run / STATE, kind)
    before = {path.name: path.read_bytes() for path in run.iterdir()}
    done = train(small, run, "--steps", 5, "--resume")
    assert done.exit_code == 2
    assert words in done.output
    assert "put a copy of it back, or train anew with --overwrite" in done.output
    assert {path.name: path.read_bytes() for path in run.iterdir()} == before


def test_facts_that_are_missing_are_told(tmp_path, run):
    saved = read_state(run)
    facts = {key: value for key, value in saved.facts.items() if key != "seed"}
    write_state(tmp_path / "other", saved.state, facts)
    with pytest.raises(FileError, match="lacks seed"):
        read_state(tmp_path / "other")
    assert KEY == "rosetta"
    assert "seed" in IDENTITY


def no_space(*_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def read_only(*_, **__):
    raise OSError(errno.EROFS, os.strerror(errno.EROFS), "a temporary")


@pytest.mark.parametrize("call", ["fsync", "replace"])
@pytest.mark.parametrize("calls_before", [0, 1, 2, 3])
def test_a_full_disk_leaves_the_last_good_state(run, small, monkeypatch, call, calls_before):
    """The n-th write fails: of the metrics, the state, or the weights."""
    before, left = bits(run), [calls_before]
    real = getattr(os, call)

    def fail(*arguments):
        left[0] -= 1
        return no_space() if left[0] < 0 else real(*arguments)

    monkeypatch.setattr(os, call, fail)
    done = train(small, run, "--steps", 5, "--resume")
    monkeypatch.setattr(os, call, real)
    assert done.exit_code == 1, done.output
    assert "No space left on device" in done.output
    kept = read_state(run).state["step"]
    assert kept == (3 if bits(run) == before else 5)
    said = 5 if "the state of step 5 is kept" in done.output else 3
    assert said <= kept  # renamed, but perhaps not for good: not counted on
    assert f"the state of step {said} is kept in {run}" in done.output
    go_on = shlex.split(done.output.split("go on with: ")[1].strip())
    assert go_on[1:] == [
        *("-m", "impl_numpy", "train", "--config", str(small), "--steps", "5"),
        *("--out", str(run), "--resume"),
    ]
    done = CliRunner().invoke(app, go_on[3:], obj="impl_numpy")
    assert done.exit_code == 0, done.output
    whole = run.parent / "whole"
    assert train(small, whole, "--steps", 5).exit_code == 0
    assert bits(run) == bits(whole)
    lines = [json.loads(line) for line in (run / METRICS).read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5]
    assert not [path for path in run.rglob(".*") if path.is_file()]


def test_a_full_disk_during_a_write_leaves_the_last_good_state(run, small, monkeypatch):
    before = bits(run)

    class Full:
        def __init__(self, file):
            self.file = file

        def __enter__(self):
            return self

        def __exit__(self, *error):
            self.file.close()

        def write(self, data):
            self.file.write(data[: len(data) // 2])
            self.file.flush()
            no_space()

    real = os.fdopen
    monkeypatch.setattr(os, "fdopen", lambda handle, mode: Full(real(handle, mode)))
    done = train(small, run, "--steps", 5, "--resume")
    assert done.exit_code == 1
    assert f"{run / STATE}: No space left on device; the state of step 3 is kept" in done.output
    assert bits(run) == before
    assert not [path for path in run.rglob(".*") if path.is_file()]


def test_a_folder_that_cannot_be_written_is_known_before_the_work(tmp_path, small, monkeypatch):
    monkeypatch.setattr("tempfile.mkstemp", read_only)
    done = train(small, tmp_path / "run", "--steps", 5)
    assert done.exit_code == 1
    assert f"{tmp_path / 'run' / STATE}: Read-only file system; nothing was written" in done.output
    assert "go on with" not in done.output
    monkeypatch.undo()
    monkeypatch.setattr(Path, "mkdir", read_only)
    done = train(small, tmp_path / "other", "--steps", 5)
    assert done.exit_code == 2
    assert "Read-only file system" in done.output


def test_a_folder_in_a_file_s_place_is_refused(tmp_path, small):
    (tmp_path / "file").write_text("")
    done = train(small, tmp_path / "file", "--steps", 1)
    assert done.exit_code == 2
    assert "error: " in done.output
    assert "exists" in done.output


def test_two_do_not_train_in_one_folder(run, small):
    pytest.importorskip("fcntl")
    hold = f"import fcntl, os, sys; fcntl.flock(os.open({str(run)!r}, os.O_RDONLY), fcntl.LOCK_EX)"
    hold += "; print('held', flush=True); sys.stdin.read()"
    with subprocess.Popen(
        [sys.executable, "-c", hold], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout.readline() == "held\n"
        done = train(small, run, "--steps", 5, "--resume")
        process.stdin.close()
    assert done.exit_code == 2
    assert f"another process is training in {run}" in done.output
    with alone_in(run):
        pass


def test_what_is_not_finite_is_never_saved(run, small, monkeypatch):
    before = bits(run)
    bad = small.with_name("steep.toml")
    bad.write_text(SMALL.replace("warmup = 4", "learning_rate = 1e30\nmax_grad_norm = 0.0"))
    with np.errstate(all="ignore"):
        done = train(bad, run.parent / "steep", "--steps", 20)
    assert done.exit_code == 1, done.output
    assert "the loss is " in done.output or "no longer finite at step" in done.output
    assert "the state of step 0 is kept" in done.output
    assert "Lower learning_rate in a config of your own" in done.output

    real = lab.train.Run.save

    def save(self, metrics):
        next(iter(self.model.model._state.v.values()))[...] = np.inf
        real(self, metrics)

    monkeypatch.setattr(lab.train.Run, "save", save)
    done = train(small, run, "--steps", 5, "--resume")
    assert done.exit_code == 1
    assert "the v are no longer finite at step 5; the state of step 3 is kept" in done.output
    assert bits(run) == before
