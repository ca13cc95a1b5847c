"""The samples of all backends: the picture, the comparison, and what they refuse."""

import dataclasses
import json
import types

import numpy as np
import pytest
from conformance_fakes import Backend, Fake, write_goldens
from PIL import Image
from safetensors.numpy import save_file
from typer.testing import CliRunner

import conformance.__main__ as command_line
from conformance import samples
from conformance.execute import Session
from conformance.process import Impl
from spec.config import load_config
from spec.goldens import Goldens, sha256
from spec.params import initial_params


class Near(Fake):
    def sample(self, *args, **more):
        return super().sample(*args, **more) * (1 + 1e-6)


class Far(Fake):
    def sample(self, *args, **more):
        return super().sample(*args, **more) + 1e-3


class Lost(Fake):
    def sample(self, *args, **more):
        return super().sample(*args, **more) * np.nan


class Short(Fake):
    def sample(self, *args, **more):
        return super().sample(*args, **more)[:3]


class Later(Fake):
    def sample(self, *args, **more):
        raise NotImplementedError("later")


@pytest.fixture(scope="module")
def goldens(tmp_path_factory):
    return write_goldens(tmp_path_factory.mktemp("goldens"))


@pytest.fixture
def place(goldens, tmp_path, monkeypatch):
    """Goldens with a checkpoint of digits, in a spec folder of this test's own."""
    manifest = json.loads((goldens / "manifest.json").read_text())
    for path in goldens.glob("*.safetensors"):
        (tmp_path / path.name).symlink_to(path)
    checkpoint = tmp_path / "checkpoints" / "digits.safetensors"
    checkpoint.parent.mkdir()
    save_file(initial_params(load_config("digits"), 0), checkpoint)
    manifest["files"]["checkpoints/digits"] = sha256(checkpoint.read_bytes())
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    monkeypatch.setattr("spec.goldens.SPEC", tmp_path)
    monkeypatch.setattr(samples, "CHECKPOINT", checkpoint)
    return tmp_path


class HereSuite:
    """Stands for a Suite; its backends run in this process."""

    def __init__(self, folder, **models):
        self.models = models
        goldens = Goldens(folder)
        self.plan = types.SimpleNamespace(
            impls=[Impl(name, "") for name in models], goldens=goldens
        )

    def ask_case(self, impl, dtype, case, given):
        backend = Backend(self.models[impl.name], impl.name)
        return Session(backend, self.plan.goldens, dtype, "cpu").attempt(case, given), {}


def make(folder, **models):
    return samples.make_samples(HereSuite(folder, **models), lambda text: None)


def test_backends_that_agree(place):
    made = make(place, first=Fake, near=Near)
    assert made.ok
    assert list(made.images) == ["first", "near"]
    assert made.images["first"].shape == (10, 8, 8, 1)
    assert 0 < made.differences["near"] <= made.limit == 2e-5  # twice that of the golden
    assert made.source == "L6/digits/guided"
    labels = made.images["first"].mean(axis=(1, 2, 3))  # the fakes move x by its label
    assert (np.diff(labels) != 0).all()


def test_backends_that_differ(place):
    made = make(place, first=Fake, far=Far, near=Near)
    assert not made.ok
    assert made.differences["far"] > made.limit
    assert made.differences["near"] < made.limit
    assert made.report()["ok"] is False


@pytest.mark.parametrize(
    ("model", "text"),
    [
        (Lost, "values not finite"),
        (Short, "gave [3, 10, 8, 8, 1]"),
        (Later, "not implemented: later"),
    ],
)
def test_backends_that_give_no_samples(place, model, text):
    made = make(place, first=Fake, bad=model)
    assert not made.ok
    assert text in made.problems["bad"]
    assert list(made.images) == ["first"]


def test_nobody_gives_samples(place):
    made = make(place, bad=Later)
    assert not made.ok
    assert made.differences == {}


def test_the_picture(place):
    made = make(place, first=Fake, far=Far, near=Near)
    path = place / "out" / "samples.png"
    samples.draw(made, path)
    with Image.open(path) as picture:
        assert picture.format == "PNG"
        assert picture.width > 1200
        pixels = np.asarray(picture.convert("RGB"), np.float64)
    coloured = np.ptp(pixels, axis=2).max(axis=1) > 40  # rows of the differences
    assert not coloured[: len(coloured) // 2].any()
    assert coloured[len(coloured) * 2 // 3 :].any()
    assert [entry.name for entry in path.parent.iterdir()] == ["samples.png"]
    samples.draw(make(place, alone=Fake), path)


def test_a_missing_checkpoint_is_said(place):
    samples.CHECKPOINT.unlink()
    with pytest.raises(samples.SamplesError, match=r"digits\.safetensors is missing"):
        make(place, first=Fake)


def test_a_changed_checkpoint_is_refused(place):
    samples.CHECKPOINT.write_bytes(samples.CHECKPOINT.read_bytes() + b" ")
    with pytest.raises(samples.SamplesError, match="the file was changed"):
        make(place, first=Fake)


def test_no_golden_no_limit(place):
    held = Goldens(place)
    held.cases = [
        dataclasses.replace(case, options={"steps": 4}) if case.call == "sample" else case
        for case in held.cases
    ]
    with pytest.raises(samples.SamplesError, match="no guided sample of digits"):
        samples.limit_between(held)


def test_the_command_fails_clearly_without_a_checkpoint(place, goldens, monkeypatch):
    samples.CHECKPOINT.unlink()
    done = CliRunner().invoke(
        command_line.app,
        ["samples", "--impl=conformance_fakes", f"--goldens={goldens}", f"--reports={place / 'r'}"],
    )
    assert done.exit_code == 1
    assert "digits.safetensors is missing" in " ".join(done.stderr.split())
    assert not (place / "r").exists()
