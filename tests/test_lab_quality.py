"""lab/quality.py: that good digits pass, that each way to be bad is seen, and the command line."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

import lab.quality as q
from lab.__main__ import app
from lab.files import read_run, write_run
from spec.config import load_config
from spec.data import load_digits
from spec.noise import normals
from spec.params import initial_params

CHECKPOINT = Path(__file__).resolve().parents[1] / "spec" / "checkpoints" / "digits.safetensors"


@pytest.fixture(scope="module")
def real():
    return q.RealDigits()


@pytest.fixture(scope="module")
def held_out(real):
    return real.data.test_images, real.data.test_labels


def with_moments(random, mean, covariance, count=50):
    """Numbers [count, F] that have this mean and this unbiased covariance exactly."""
    raw = random.standard_normal((count, len(mean)))
    raw -= raw.mean(axis=0)
    white = raw @ np.linalg.inv(np.linalg.cholesky(np.cov(raw, rowvar=False))).T
    return mean + white @ np.linalg.cholesky(covariance).T


def test_the_distance_of_gaussians_has_its_closed_form():
    random = np.random.default_rng(0)
    turn = np.linalg.qr(random.standard_normal((4, 4)))[0]
    one, two = np.array([4.0, 1.0, 0.25, 9.0]), np.array([1.0, 1.0, 4.0, 2.0])
    shift = np.array([1.0, -2.0, 0.0, 0.5])
    a = with_moments(random, shift, turn * one @ turn.T)
    b = with_moments(random, np.zeros(4), turn * two @ turn.T, count=80)
    expected = shift @ shift + np.sum((np.sqrt(one) - np.sqrt(two)) ** 2)
    assert q.frechet_distance(a, b) == pytest.approx(expected, rel=1e-10)
    assert q.frechet_distance(b, a) == pytest.approx(expected, rel=1e-10)
    assert q.frechet_distance(a, a) == pytest.approx(0, abs=1e-10)
    # covariances that do not commute: the eigenvalues of the product, which is not symmetric
    skew = random.standard_normal((4, 4))
    c = with_moments(random, np.zeros(4), skew @ skew.T + np.eye(4))
    cov_a, cov_c = np.cov(a, rowvar=False), np.cov(c, rowvar=False)
    cross = np.sqrt(np.linalg.eigvals(cov_a @ cov_c).real).sum()
    expected = shift @ shift + np.trace(cov_a) + np.trace(cov_c) - 2 * cross
    assert q.frechet_distance(a, c) == pytest.approx(expected, rel=1e-9)
    # one point alone: nothing but the other's spread
    point = np.tile(shift, (50, 1))
    expected = shift @ shift + two.sum()
    assert q.frechet_distance(point, b) == pytest.approx(expected, rel=1e-9)


def test_the_protocol_is_as_it_says(real):
    data = load_digits()
    assert real.count == len(data.test_images) == 359
    assert len(real.distances) == q.SPLITS == 20
    assert real.pca.n_components_ == q.FEATURES == 20
    assert real.accuracy > 0.99
    assert np.mean(real.distances) == pytest.approx(0.195, abs=0.005)
    # digits of the first split, by another way: moments of the features, and a general root
    train, test = (x.reshape(len(x), -1) for x in (data.train_images, data.test_images))
    centred = train - train.mean(axis=0)
    axes = np.linalg.svd(centred, full_matrices=False)[2][:20]
    a, b = (test - train.mean(axis=0)) @ axes.T, centred @ axes.T
    cov_a, cov_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    cross = np.sqrt(np.linalg.eigvals(cov_a @ cov_b).real).sum()
    expected = np.sum(a.mean(axis=0) ** 2) + np.trace(cov_a) + np.trace(cov_b) - 2 * cross
    assert real.distances[0] == pytest.approx(expected, rel=1e-4)  # the data are float32


@pytest.mark.parametrize("count", [40, 100, 200, 359])
def test_fewer_real_digits_are_an_even_part_of_all_writers(real, held_out, count):
    labels = held_out[1]
    part = q.balanced_part(labels, count, 3)
    assert len(set(part)) == count
    assert np.ptp(np.bincount(labels[part], minlength=10)) <= (1 if count < 350 else 2)
    # the mean place in the data is that of a random draw, within five standard errors
    assert abs(part.mean() - 179) < 5 * 104 / np.sqrt(count)
    assert not np.array_equal(part, q.balanced_part(labels, count, 4))
    # fewer digits are further off by chance: of k in all features, about as 1/k
    fewer = np.mean(q.RealDigits(count).distances)
    assert fewer == pytest.approx(np.mean(real.distances) * 359 / count, rel=0.25)


def test_real_digits_pass(real, held_out):
    for seed in (0, 31, 32):  # the held-out part, and digits split in another way
        split = load_digits(seed)
        measured = real.measure(split.test_images, split.test_labels, 1.0)
        assert measured.share > 0.99
        assert 0.5 < measured.ratio < 1.5
        assert measured.met
    assert real.measure(*held_out, 1.0).ratio == pytest.approx(
        real.distances[0] / np.mean(real.distances)
    )


def test_noise_fails_in_both(real, held_out):
    images = np.clip(normals(0, "x_T", 0, held_out[0].shape), -1, 1)
    measured = real.measure(images, held_out[1], 1.0)
    assert measured.share < 0.2
    assert measured.ratio > 20
    assert not measured.met


def test_digits_that_nobody_asked_for_fail_the_share_alone(real, held_out):
    images, labels = held_out
    shuffled = real.measure(images, np.roll(labels, 1), 1.0)
    assert shuffled.share < 0.3
    some = labels.copy()
    some[::20] = (some[::20] + 1) % 10  # one in twenty
    slightly = real.measure(images, some, 1.0)
    assert 0.93 < slightly.share < 0.97
    for measured in (shuffled, slightly):
        assert measured.ratio < 1.5
        assert not measured.met


def test_a_digit_drawn_again_and_again_fails_the_distance_alone(real, held_out):
    images, labels = held_out
    first = [int(np.argmax(labels == label)) for label in range(10)]
    measured = real.measure(images[first][labels], labels, 1.0)
    assert measured.share > 0.97
    assert measured.ratio > 5
    assert not measured.met


def test_digits_that_are_blurred_or_too_few_kinds_fail_the_distance(real, held_out):
    images, labels = held_out
    means = np.stack([images[labels == label].mean(axis=0) for label in range(10)])
    toward_means = real.measure((images + means[labels]) / 2, labels, 1.0)
    assert toward_means.share > 0.99
    assert toward_means.ratio > 1.5
    three = real.measure(images[labels < 3], labels[labels < 3], 1.0)
    assert three.share > 0.97
    assert three.ratio > 5


def test_the_line_wants_all_three_at_once():
    assert q.Measured(1.5, 0.97, 0.3, 1.5, True).met
    for wrong in ((1.51, 0.97, 1.5), (1.5, 0.969, 1.5), (1.5, 0.97, 1.51)):
        scale, share, ratio = wrong
        assert not q.Measured(scale, share, 0.3, ratio, True).met
    assert not q.Measured(1.0, 1.0, float("nan"), float("nan"), True).met
    assert not q.Measured(1.0, 1.0, 0.3, 1.0, False).met, "too few digits"


class Echo:
    """A model whose samples are x_T, moved by the label; it remembers how it was asked."""

    def __init__(self, bad=None):
        self.asked, self.bad = [], bad

    def sample(self, x, noise, labels, **options):
        self.asked.append((len(x), None if noise is None else noise.copy(), options))
        image = x / 8 + labels[:, None, None, None].astype(np.float32) / 100
        if self.bad is not None:
            image[self.bad] = np.nan
        return np.stack([x, image])


@pytest.mark.parametrize("method", ["ddim", "ddpm"])
@pytest.mark.parametrize("count", [1, 64, 65, 200, 359])
def test_every_digit_is_drawn_once_in_batches_of_one_size(count, method):
    config, model = load_config("digits"), Echo()
    labels = q.balanced_labels(count, 10)
    assert np.ptp(np.bincount(labels, minlength=10)) <= 1
    images = np.concatenate([*q.draw(model, config, labels, 1.25, method, 3, seed=5)])
    x = normals(5, "x_T", 0, (count, 8, 8, 1)).astype(np.float32)
    np.testing.assert_allclose(
        images, np.clip(x / 8 + labels[:, None, None, None] / 100, -1, 1), atol=1e-6
    )
    assert len(model.asked) == q.batches(count)
    assert len({size for size, _, _ in model.asked}) == 1
    assert all(size <= q.BATCH for size, _, _ in model.asked)
    expected = {"method": method, "steps": 3, "guidance_scale": 1.25}
    assert all(options == expected for _, _, options in model.asked)
    noise = [noise for _, noise, _ in model.asked]
    if method == "ddim":
        assert noise == [None] * len(noise)
    else:
        z = np.concatenate(noise, axis=1)[:, :count]
        for step in range(3):
            np.testing.assert_array_equal(
                z[step], normals(5, "z", step, (count, 8, 8, 1)).astype(np.float32)
            )


def test_digits_that_are_not_finite_are_said():
    draws = q.draw(Echo(bad=3), load_config("digits"), q.balanced_labels(9, 10), 1.5, "ddim", 3, 0)
    with pytest.raises(q.SampleError, match=r"guidance scale 1.5.*NaN"):
        next(draws)


def test_the_first_backend_that_is_there_is_taken(monkeypatch):
    assert q.find_backend("impl_numpy").name == "numpy"
    monkeypatch.setattr(q, "BACKENDS", ("impl_nothing", "impl_numpy", "impl_torch"))
    assert q.find_backend(None).name == "numpy"
    monkeypatch.setattr(q, "BACKENDS", ("impl_nothing", "impl_less"))
    with pytest.raises(ValueError, match=r"impl_nothing \(No module.*impl_less \(No module"):
        q.find_backend(None)
    for name in ("", ".x"):
        with pytest.raises(ValueError, match="no backend can be imported"):
            q.find_backend(name)
    with pytest.raises(ValueError, match="json is no backend"):
        q.find_backend("json")


def invoke(*arguments):
    return CliRunner().invoke(app, ["quality", *(str(a) for a in arguments)])


def test_the_shipped_checkpoint_from_the_command_line(tmp_path):
    run = tmp_path / "run"
    write_run(run, *read_run(CHECKPOINT, "digits"))
    done = invoke(run, "--steps", 20, "--guidance-scale", 1.25, "--guidance-scale", 2)
    assert done.exit_code == 0, done.output
    assert "met at 1.25\n" in done.output
    found = json.loads((run / "quality.json").read_text())
    assert [row["guidance_scale"] for row in found["scales"]] == [1.25, 2.0]
    assert [row["met"] for row in found["scales"]] == [True, False], "2 is above 1.5"
    assert all(row["share"] > 0.97 for row in found["scales"])
    assert 0.7 < found["scales"][0]["ratio"] < 1.5
    assert found["met"] is True
    assert (found["method"], found["steps"], found["seed"]) == ("ddim", 20, 0)
    assert found["backend"]["module"] in q.BACKENDS
    assert found["protocol"]["count"] == 359
    assert found["real"]["svm_accuracy"] > 0.99
    assert Image.open(run / "quality.png").size == (600, 810)


def test_a_quick_look_in_numpy_at_a_file_of_weights(tmp_path):
    shares = []
    for backend in ("impl_numpy", "impl_torch"):
        file = tmp_path / "new" / f"{backend}.json"
        options = ["--steps", 5, "--count", 50, "--guidance-scale", 1.25, "--backend", backend]
        done = invoke(CHECKPOINT, "--config", "digits", *options, "--json", file)
        assert done.exit_code == 1, done.output
        assert "the quality line wants 359: leave --count out" in done.output
        assert "too few" in done.output
        found = json.loads(file.read_text())
        assert found["backend"]["module"] == backend
        assert (found["met"], found["protocol"]["count"]) == (False, 50)
        assert file.with_suffix(".png").exists()
        shares.append((found["scales"][0]["share"], found["scales"][0]["distance"]))
    assert shares[0] == pytest.approx(shares[1], rel=1e-3)
    assert shares[0][0] > 0.9


def test_weights_that_learnt_nothing_exit_with_1(tmp_path):
    config = load_config("digits")
    write_run(tmp_path, config, initial_params(config, 0))
    options = ["--steps", 2, "--count", 40, "--guidance-scale", 1]
    done = invoke(tmp_path, *options, "--backend", "impl_numpy")
    assert done.exit_code == 1, done.output
    assert "not met" in done.output
    assert json.loads((tmp_path / "quality.json").read_text())["met"] is False
    params = {name: value * 1e15 for name, value in initial_params(config, 0).items()}
    write_run(tmp_path / "wild", config, params)
    with np.errstate(all="ignore"):
        done = invoke(tmp_path / "wild", *options, "--backend", "impl_numpy")
    assert done.exit_code == 1, done.output
    assert "NaN or infinity" in done.output
    assert not (tmp_path / "wild" / "quality.json").exists()


def test_a_fault_that_nobody_foresaw_is_no_verdict(tmp_path, monkeypatch):
    def fail(*arguments):
        raise RuntimeError("out of memory")
        yield

    monkeypatch.setattr(q, "draw", fail)
    file = tmp_path / "report.json"
    done = invoke(CHECKPOINT, "--config", "digits", "--backend", "impl_numpy", "--json", file)
    assert done.exit_code == 2
    assert "RuntimeError: out of memory" in done.output
    assert not file.exists()


@pytest.mark.parametrize(
    ("there", "words"),
    [
        ("report.json", "report.json is to be written, but is a folder; give another --json"),
        ("report.png", "report.png is to be written, but is a folder; give another --json"),
        ("file", "report.json cannot be written (File exists); give another place with --json"),
    ],
)
def test_a_place_that_cannot_be_written_is_said_before_the_work(
    tmp_path, monkeypatch, there, words
):
    monkeypatch.setattr(q, "find_backend", None)  # calling it would fail
    file = tmp_path / "report.json"
    if there == "file":
        (tmp_path / there).touch()
        file = tmp_path / there / "report.json"
    else:
        (tmp_path / there).mkdir()
    done = invoke(CHECKPOINT, "--config", "digits", "--json", file)
    assert done.exit_code == 2, done.output
    assert words in done.output
    assert "Traceback" not in done.output


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--config", "tiny"], "is not the network of config 'tiny'"),
        (["--count", "400"], "--count 400 is outside 21..359"),
        (["--count", "20"], "--count 20 is outside 21..359"),
        (["--method", "euler"], "--method = 'euler' is unknown; choose one of ddpm, ddim"),
        (["--method", "ddpm", "--steps", "5"], "ddpm visits all 1000 times"),
        (["--steps", "1001"], "steps = 1001 is outside 1..1000"),
        (["--guidance-scale", "nan"], "must be a finite number"),
        (["--backend", "impl_none"], "impl_none (No module named 'impl_none')"),
        (["--device", "tpu"], "device = 'tpu' is unknown"),
        (["--backend", ".x"], "no backend can be imported"),
        (["--json", "report.txt"], "--json report.txt is no JSON file"),
    ],
)
def test_what_cannot_be_done_exits_with_2(tmp_path, options, words):
    config = load_config("digits")
    write_run(tmp_path, config, initial_params(config, 0))
    done = invoke(tmp_path, "--backend", "impl_numpy", *options)
    assert done.exit_code == 2, done.output
    assert words in done.output
    assert not (tmp_path / "quality.json").exists()


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("tiny", {}, ["images [8, 12, 2], expected [8, 8, 1]", "num_classes = 5, expected 10"]),
        ("mnist", {}, ["data = 'mnist', expected 'digits'", "images [28, 28, 1]"]),
        ("digits", {"num_classes": 0, "label_dropout": 0.0}, ["num_classes = 0, expected 10"]),
    ],
)
def test_configs_of_anything_else_are_refused(tmp_path, name, change, words):
    config = load_config(name).replace(**change)
    write_run(tmp_path, config, initial_params(config, 0))
    done = invoke(tmp_path)
    assert done.exit_code == 2
    assert "is not for digits that can be asked for by class" in done.output
    assert "name the config with --config" in done.output
    assert [word for word in words if word not in done.output] == []


def test_a_file_alone_wants_its_config(tmp_path):
    done = invoke(CHECKPOINT)
    assert done.exit_code == 2
    assert "name the config" in done.output
    done = invoke(tmp_path / "none")
    assert done.exit_code == 2
    assert "no such folder or file" in done.output
