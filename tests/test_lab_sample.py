"""lab/sample.py: slices of the stream, batches that change nothing, moments; what is refused."""

import math

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

import lab.sample
from impl_numpy import open as open_numpy
from lab.cli import app
from lab.files import write_run
from lab.pictures import grid
from lab.sample import (
    BATCH,
    BATCH_BYTES,
    Plan,
    batch_noise,
    batch_size,
    draw,
    even_moments,
    progress_picture,
)
from spec.config import load_config
from spec.noise import normals, sampling_noise
from spec.params import initial_params

SMALL = load_config("digits").replace(
    name="small", channels=[4], groups=2, attention_levels=[], timesteps=12
)


@pytest.fixture(scope="module")
def model():
    return open_numpy(SMALL, initial_params(SMALL, 3))


@pytest.fixture
def run(tmp_path):
    write_run(tmp_path / "run", SMALL, initial_params(SMALL, 3))
    return tmp_path / "run"


def sample(run, *words):
    words = ["sample", "--weights", run, *words]
    return CliRunner().invoke(app, [str(word) for word in words], obj="impl_numpy")


@pytest.mark.parametrize("ends", [(0, 1), (0, 7), (1, 2), (3, 9), (5, 5), (6, 103), (97, 200)])
def test_a_slice_of_the_stream_is_the_stream_s(ends):
    whole = normals(2**63 + 5, "z", 11, (200,))
    first, last = ends
    part = normals(2**63 + 5, "z", 11, (last - first,), first)
    assert np.array_equal(part, whole[slice(*ends)])


@pytest.mark.parametrize("size", [(8, 8, 1), (4, 12, 3), (1, 1, 1)])
def test_noise_of_a_batch_is_that_of_the_whole(size):
    config = SMALL.replace(image_size=list(size[:2]), in_channels=size[2])
    x, z = sampling_noise(config, 7, 9, 3)
    plan = Plan(7, None, "ddim", 3, eta=1.0, seed=9)
    for first, rows in ((0, 7), (2, 3), (5, 2)):
        got_x, got_z = batch_noise(config, plan, first, rows)
        assert got_x.dtype == got_z.dtype == np.float32
        assert np.array_equal(got_x, x[first : first + rows].astype(np.float32))
        assert np.array_equal(got_z, z[:, first : first + rows].astype(np.float32))
    assert batch_noise(config, Plan(7, None, "ddim", 3), 0, 7)[1] is None


@pytest.mark.parametrize(
    "method", [{"method": "ddpm", "steps": 12}, {"method": "ddim", "steps": 4}]
)
def test_the_split_into_batches_shows_in_rounding_alone(model, monkeypatch, method):
    plan = Plan(11, np.arange(11) % 10, **method, seed=2)
    moments = [0, 2, method["steps"]]
    whole = np.concatenate(list(draw(model, SMALL, plan, moments)), axis=1)
    monkeypatch.setattr(lab.sample, "BATCH", 4)
    parts = list(draw(model, SMALL, plan, moments))
    assert [part.shape[1] for part in parts] == [4, 4, 3]
    np.testing.assert_allclose(np.concatenate(parts, axis=1), whole, rtol=0, atol=2e-5)
    x, z = sampling_noise(SMALL, 11, 2, method["steps"])
    x, z = x.astype(np.float32), z.astype(np.float32)
    expected = model.sample(x, z, np.arange(11) % 10, **method)
    assert np.array_equal(whole[0], x)
    assert np.array_equal(whole[1], expected[1])
    assert np.array_equal(whole[2], expected[-1])


def test_batches_fit_into_memory_and_are_alike():
    assert batch_size(SMALL, Plan(20, None, "ddpm", 12)) == 20
    assert batch_size(SMALL, Plan(BATCH + 1, None, "ddim", 12)) == math.ceil((BATCH + 1) / 2)
    large = load_config("ddpm_cifar10")
    rows = batch_size(large, Plan(100000, None, "ddpm", 1000))
    assert BATCH_BYTES / 2 < rows * 3 * 1000 * 3072 * 4 <= BATCH_BYTES


@pytest.mark.parametrize(
    ("steps", "count", "moments"),
    [(50, 6, [0, 10, 20, 30, 40, 50]), (3, 10, [0, 1, 2, 3]), (1, 10, [0, 1]), (999, 2, [0, 999])],
)
def test_moments_are_even_and_end_with_the_sample(steps, count, moments):
    assert even_moments(steps, count) == moments


def test_a_picture_on_the_way_shows_every_class_from_the_same_noise(model):
    picture = progress_picture(model, SMALL, 0)
    x = normals(0, "x_T", 0, (20, 8, 8, 1)).astype(np.float32)
    images = model.sample(x, None, np.arange(20) % 10, method="ddim", steps=12)[-1]
    assert np.array_equal(picture, grid(images, 10))


def test_a_strip_and_a_film_end_with_the_picture(tmp_path, run):
    plain, film = tmp_path / "plain.png", tmp_path / "film.gif"
    words = ["--count", 3, "--labels", "4,5,6", "--steps", 6]
    assert sample(run, *words, "--out", plain, "--gif", film).exit_code == 0
    done = sample(run, *words, "--out", tmp_path / "strip.png", "--strip")
    assert done.exit_code == 0, done.output
    last = np.asarray(Image.open(plain))
    strip = np.asarray(Image.open(tmp_path / "strip.png"))
    assert strip.shape == (3 * 66 + 2, 7 * 66 + 2, 3)
    assert last.shape == (66 + 2, 3 * 66 + 2, 3)
    for i in range(3):
        shown = strip[i * 66 + 2 : i * 66 + 66, 6 * 66 + 2 : 7 * 66]
        assert np.array_equal(shown, last[2:66, i * 66 + 2 : i * 66 + 66])
    frames = Image.open(film)
    assert frames.n_frames == 7
    frames.seek(6)
    assert np.array_equal(np.asarray(frames.convert("RGB")), last)


def test_the_first_images_are_the_same_however_many_are_drawn(tmp_path, run):
    few, many = tmp_path / "few.png", tmp_path / "many.png"
    words = ["--labels", "7", "--method", "ddpm"]
    assert sample(run, *words, "--count", 4, "--out", few).exit_code == 0
    assert sample(run, *words, "--count", 16, "--out", many).exit_code == 0
    a, b = (np.asarray(Image.open(path)).astype(int) for path in (few, many))
    # the first two, which stand beside each other in both
    assert np.abs(a[:66, :132] - b[:66, :132]).max() <= 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--out", "x.jpg"], "--out x.jpg is no PNG file; give a name that ends with .png"),
        (["--gif", "x.png"], "--gif x.png is no GIF file; give a name that ends with .gif"),
        (["--method", "euler"], "--method = 'euler' is unknown; choose one of ddpm, ddim"),
        (["--mode", "fast"], "--mode = 'fast' is unknown; choose one of eager, compiled"),
        (["--precision", "fp8"], "--precision = 'fp8' is unknown; choose one of float32, bf16"),
        (["--precision", "bf16"], "--precision bf16 is not for impl_numpy, which has float32"),
        (["--device", "tpu"], "device = 'tpu' is unknown"),
        (["--count", "0"], "greater than or equal to 1"),
    ],
)
def test_wrong_arguments_are_refused(run, monkeypatch, tmp_path, words, message):
    monkeypatch.chdir(tmp_path)
    done = sample(run, *words)
    assert done.exit_code == 2
    assert message in done.output
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]


def test_a_folder_is_no_picture(tmp_path, run):
    (tmp_path / "a.png").mkdir()
    done = sample(run, "--out", tmp_path / "a.png")
    assert done.exit_code == 2
    assert "is a folder; give the name of a PNG file" in done.output
