"""`fit` of the implementations: the shared stream's draws step by step, native draws by frequency.

The faults that this must notice are the mutants of clause S10, in tests/test_mutants.py.
"""

import importlib

import numpy as np
import pytest

from conformance.mutants.fit import (
    IMAGES,
    STEPS,
    TIMES,
    _carried_problem,
    _frequency_problem,
    _joint_problem,
    _normal_problem,
    _overlap,
    _rate_problem,
    _sharing_problem,
    problem_of_fit,
    problem_of_seeds,
)

IMPLS = {"numpy": "numpy", "torch": "torch", "tf": "tensorflow", "jax": "jax"}


def package(impl):
    framework = pytest.importorskip(IMPLS[impl])
    if impl == "torch":
        framework.set_num_threads(1)
    return importlib.import_module(f"impl_{impl}")


@pytest.mark.parametrize("impl", IMPLS)
def test_fit_draws_and_trains_as_it_should(impl):
    real = importlib.import_module(f"{package(impl).__name__}.train").train_step
    assert problem_of_fit(package(impl)) is None
    assert importlib.import_module(f"impl_{impl}.train").train_step is real


@pytest.mark.parametrize("impl", IMPLS)
def test_native_draws_differ_between_seeds(impl):
    assert problem_of_seeds(package(impl)) is None


def test_frequencies_that_are_wrong_are_told():
    generator = np.random.Generator(np.random.Philox(0))
    t = generator.integers(10, size=2400)
    assert _frequency_problem("times", t, 10) is None
    assert "0 to 9 were drawn; expected 0..8" in _frequency_problem("times", t, 9)
    assert "10 of the times was drawn 0.000" in _frequency_problem("times", t, 11)
    assert _rate_problem("a drop", t < 2, 0.2) is None
    assert "expected 0.800" in _rate_problem("a drop", t < 2, 0.8)


def test_rows_that_share_a_draw_are_told():
    generator = np.random.Generator(np.random.Philox(5))
    t, drop = generator.integers(10, size=2000), generator.random(2000) < 0.25
    assert _sharing_problem("time", t, 0.1) is None
    assert _sharing_problem("mask", drop, 0.625) is None
    assert "the same time for two rows of a batch was drawn 1.000 of the time" in (
        _sharing_problem("time", t[:250].repeat(8), 0.1)
    )
    assert "expected 0.625" in _sharing_problem("mask", drop[:250].repeat(8), 0.625)


def test_draws_that_go_together_are_told():
    generator = np.random.Generator(np.random.Philox(3))
    u, other, whole = (
        generator.random(2000),
        generator.random(2000),
        generator.integers(2**32, size=2000),
    )
    rows = (u * IMAGES).astype(int)
    assert _joint_problem("both", rows, (other * TIMES).astype(int)) is None
    assert "go together" in _joint_problem("both", rows, (u * TIMES).astype(int))
    assert "go together" in _joint_problem("both", whole % IMAGES, whole % TIMES)
    assert "go together" in _joint_problem("both", rows, u < 0.25)
    one_in_five = np.where(other < 0.2, u, generator.random(2000))
    assert "the same key" in _joint_problem("both", rows, (one_in_five * TIMES).astype(int))


def test_noise_that_goes_with_another_draw_is_told():
    generator = np.random.Generator(np.random.Philox(6))
    noise, u = generator.normal(size=(STEPS * 8, 2, 2, 1)), generator.random(STEPS * 8)
    assert _carried_problem("drops", u < 0.1, noise) is None
    first = noise.reshape(STEPS, -1)[:, :8].ravel()  # of each step
    for values in (first < -1.3, -first, np.floor(first * 3)):
        problem = _carried_problem("drops", values, noise)
        assert problem.startswith("drops and noise go together")
        assert "the same key" in problem
    for _ in range(200):
        assert _carried_problem("drops", generator.random(STEPS * 8) < 0.1, noise) is None


def test_right_draws_pass_as_often_as_the_limit_says():
    """In 2000 tries none should fail: the limit is passed by 3e-7 of them."""
    generator = np.random.Generator(np.random.Philox(4))
    for _ in range(2000):
        rows, t = generator.integers(IMAGES, size=2000), generator.integers(TIMES, size=2000)
        assert _joint_problem("both", rows, t) is None


def test_noise_that_comes_again_elsewhere_is_seen():
    noise = np.random.Generator(np.random.Philox(2)).normal(size=(8, 2, 2, 2))
    one, shifted, other = ([None, None, n] for n in (noise, np.roll(noise, 4), noise + 1e-3))
    assert _overlap(one, one)
    assert _overlap(one, shifted)
    assert not _overlap(one, other)


def test_noise_that_is_not_normal_is_told():
    noise = np.random.Generator(np.random.Philox(1)).normal(size=(500, 4, 6, 2))
    assert _normal_problem(noise) is None
    assert "variance" in _normal_problem(noise * 1.1)
    assert "mean 0.1" in _normal_problem(noise + 0.1)
    assert "same noise" in _normal_problem(np.concatenate([noise, noise[:1]]))
