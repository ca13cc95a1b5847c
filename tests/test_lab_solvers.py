"""lab/solvers.py: errors against a path that is known, and the command line."""

import io
import json
import pathlib

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

import lab.solvers as s
from lab.__main__ import app
from lab.files import write_run
from spec.config import load_config
from spec.params import initial_params

ROOT = pathlib.Path(__file__).resolve().parents[1]
# A schedule that is little longer than the most steps, and a network of 8x12 pixels.
SHORT = load_config("tiny_uncond").replace(timesteps=60, in_channels=1, clip=False)


class Path:
    """Samples that are x times a number that says how far they have come, and how well."""

    def __init__(self, config, wrong=0.0):
        self.config, self.wrong, self.calls = config, wrong, []

    def sample(self, x, noise, labels, *, method, steps, guidance_scale):
        self.calls.append((method, steps, len(x), guidance_scale))
        assert noise is None
        assert (labels is None) == (self.config.num_classes == 0)
        total = self.config.timesteps
        times = np.append(total - 1 - np.arange(1, steps) * total // steps, -1)
        error = (self.wrong or 1 / steps) if method == "dpmpp" else 2 / steps
        error = error if steps < total else 0.0
        scale = times + 2.0 + np.where(times < 0, 3, 1) * error
        return (scale[:, None, None, None, None] * x).astype(np.float32)


def test_errors_are_those_of_the_last_state_and_of_the_same_time_before_it():
    steps = []
    model = Path(SHORT)
    found = s.measure(model, SHORT, None, 7, 0, steps.append)
    size = found.size
    assert found.rms["ddim"] == pytest.approx([3 * 2 / n * size for n in s.STEPS], rel=1e-5)
    assert found.rms["dpmpp"] == pytest.approx([3 / n * size for n in s.STEPS], rel=1e-5)
    assert found.before["ddim"] == pytest.approx([2 / n * size for n in s.STEPS], rel=1e-3)
    assert found.before["dpmpp"] == pytest.approx([1 / n * size for n in s.STEPS], rel=1e-3)
    assert found.apart == 0
    assert sum(steps) == s.work(SHORT)
    assert {call[2:] for call in model.calls} == {(7, None)}


def test_images_come_in_batches_of_one_size_and_each_once():
    config = load_config("digits").replace(timesteps=60)
    model = Path(config)
    whole = s.measure(model, config, 1.5, s.BATCH + 3, 0)
    assert {call[2:] for call in model.calls} == {(27, 1.5)}
    assert whole.exact.shape == (s.SHOWN, 8, 8, 1)
    few = s.measure(model, config, 1.5, s.SHOWN, 0)
    np.testing.assert_array_equal(whole.exact, few.exact)


def test_a_sample_that_is_not_finite_is_an_error():
    with pytest.raises(ArithmeticError, match=r"DPM-Solver\+\+\(2M\) in 5 steps gave NaN"):
        s.measure(Path(SHORT, wrong=np.nan), SHORT, None, 3, 0)


def test_guidance_is_tried_where_there_are_classes():
    assert s.scales_of(SHORT) == (None,)
    assert s.scales_of(load_config("digits")) == (None, 1.5)


def test_the_readme_tells_what_was_measured():
    found = json.loads((ROOT / "docs" / "solvers.json").read_text("utf-8"))
    assert found["steps"] == list(s.STEPS)
    text = " ".join((ROOT / "README.md").read_text("utf-8").split())
    plain = found["errors"][0]
    ours, ddim = (
        [f"{e:.3f}" if e < 0.1 else f"{e:.2f}" for e in plain["rms"][method]]
        for method in ("dpmpp", "ddim")
    )
    assert f"off by {ours[0]}, {ours[1]}, {ours[2]} and {ours[3]} (RMS" in text
    assert f"DDIM's by {ddim[0]}, {ddim[1]}, {ddim[2]} and {ddim[3]};" in text
    before = [plain["rms_before_the_last_step"][method][2] for method in ("dpmpp", "ddim")]
    assert f"off by {before[0]:.3f} there, DDIM by {before[1]:.3f}" in text


def invoke(*arguments):
    return CliRunner().invoke(app, ["solvers", *(str(a) for a in arguments)])


def test_a_run_from_the_command_line(tmp_path):
    config = load_config("digits").replace(
        channels=(8, 8), groups=4, attention_levels=(), timesteps=60, prediction="x0"
    )
    write_run(tmp_path, config, initial_params(config, 3))
    done = invoke(tmp_path, "--count", 6, "--backend", "impl_numpy")
    assert done.exit_code == 0, done.output
    found = json.loads((tmp_path / "solvers.json").read_text())
    assert (found["steps"], found["timesteps"], found["count"]) == ([5, 10, 20, 50], 60, 6)
    assert [row["guidance_scale"] for row in found["errors"]] == [None, 1.5]
    for row in found["errors"]:
        assert all(0 < error < 1 for errors in row["rms"].values() for error in errors)
        assert row["rms"]["ddim"][-1] < row["rms"]["ddim"][0]
    picture = Image.open(io.BytesIO((tmp_path / "solvers.png").read_bytes()))
    assert picture.size == (900, 558)
    assert "RMS difference from DDIM in 60 steps" in done.output


@pytest.mark.parametrize(
    ("change", "options", "words"),
    [
        ({"timesteps": 50}, [], "has 50 timesteps"),
        ({}, ["--backend", "impl_none"], "no backend can be imported"),
        ({}, ["--json", "solvers.png"], "is no JSON file"),
        ({}, ["--device", "tpu"], "device = 'tpu' is unknown"),
    ],
)
def test_what_cannot_be_done_exits_with_2(tmp_path, change, options, words):
    config = load_config("digits").replace(channels=(8, 8), groups=4, **change)
    write_run(tmp_path, config, initial_params(config, 3))
    done = invoke(tmp_path, "--backend", "impl_numpy", *options)
    assert done.exit_code == 2, done.output
    assert words in done.output
    assert not (tmp_path / "solvers.json").exists()
