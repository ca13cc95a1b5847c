"""Each fault of conformance/mutants is caught, in the clause that it breaks; and none else is."""

import dataclasses
import functools
import sys

import pytest

from conformance.mutants import (
    Mutant,
    MutantError,
    fit_of_copy,
    golden_cases,
    load_mutants,
    mutated,
    run_copy,
    try_mutant,
)
from conformance.mutants.engine import FIT, IMPLS, copied
from spec.goldens import Goldens

MUTANTS = [mutant for impl in IMPLS for mutant in load_mutants(impl)]
CLAUSES = {f"S{number}" for number in (*range(1, 11), 13)}
LEAST = 60  # over all implementations


@functools.cache
def goldens() -> Goldens:
    return Goldens()


@pytest.fixture(autouse=True)
def one_thread():
    """Networks this small are slower on several threads; and other tests share the cores."""
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)


@functools.cache
def faultless(impl: str, dtype: str) -> tuple[list[str], list[str]]:
    """Ids of all cases run, and of those failed, on a copy without any fault."""
    results = run_copy(impl, goldens(), dtype)
    return [result.case.id for result in results], [r.case.id for r in results if not r.ok]


@functools.cache
def faultless_fit(impl: str) -> str | None:
    """What the check of fit says of a copy without any fault."""
    return fit_of_copy(impl)


def parameter(mutant: Mutant):
    """The mutant under its name; one that is pending must fail, and only by its verdict."""
    pending = pytest.mark.xfail(strict=True, raises=AssertionError, reason=mutant.pending)
    marks = [pending] if mutant.pending else []
    return pytest.param(mutant, id=f"{mutant.impl}-{mutant.name}", marks=marks)


@pytest.mark.parametrize("mutant", [parameter(mutant) for mutant in MUTANTS])
def test_the_fault_is_caught_where_it_is(mutant):
    if mutant.impl == "torch":
        pytest.importorskip("torch").set_num_threads(1)
    if mutant.clause == FIT:
        assert faultless_fit(mutant.impl) is None
        assert try_mutant(mutant, goldens()).problem is None, mutant.fault
        return
    ran, failed = faultless(mutant.impl, mutant.dtype)
    assert ran
    assert not failed, "the implementation fails without any fault, so a kill shows nothing"
    verdict = try_mutant(mutant, goldens())
    assert verdict.problem is None, f"{mutant.fault} {verdict.problem}"
    assert verdict.margin > 1


def test_there_are_many_and_every_clause_that_is_checked_has_some():
    sure = [mutant for mutant in MUTANTS if not mutant.pending]
    assert len(sure) >= LEAST
    for impl in IMPLS:
        assert {mutant.clause for mutant in sure if mutant.impl == impl} >= CLAUSES
    assert {mutant.dtype for mutant in sure} == {"float64", "float32"}


def test_faults_are_told_in_sentences():
    assert not [mutant.name for mutant in MUTANTS if not mutant.fault.endswith(".")]


def test_cases_run_by_level_and_are_the_tiny_ones():
    cases = golden_cases(goldens(), "float64")
    assert [case.level for case in cases] == sorted(case.level for case in cases)
    assert {case.config.name[:4] for case in cases} == {"tiny"}


# --- the engine itself -------------------------------------------------------------------------


def a_mutant(**changes) -> Mutant:
    fields = {"name": "made-up", "impl": "numpy", "file": "diffusion.py", "old": "a", "new": "b"}
    return Mutant(**{**fields, "clause": "S2", "fault": "It is made up.", **changes})


@pytest.mark.parametrize(("source", "count"), [("x + y", 0), ("a + a", 2)])
def test_a_text_that_is_not_there_once_is_refused(source, count):
    with pytest.raises(MutantError, match=rf"made-up .* stands {count} times .* has changed"):
        mutated(source, a_mutant())


def test_a_mutant_that_changes_nothing_is_refused():
    with pytest.raises(MutantError, match="old and new are the same"):
        mutated("a", a_mutant(new="a"))


def test_a_missing_file_is_named():
    with (
        pytest.raises(MutantError, match=r"impl_numpy/absent.py is not there"),
        copied("numpy", a_mutant(file="absent.py")),
    ):
        pass


def test_a_mutant_that_is_no_python_is_no_kill():
    broken = a_mutant(old="return a * x0 + b * noise", new="return (")
    with pytest.raises(MutantError, match="cannot be imported, and so shows nothing"):
        try_mutant(broken, goldens())


def test_a_change_without_effect_survives():
    same = a_mutant(old="return a * x0 + b * noise", new="return b * noise + a * x0")
    verdict = try_mutant(same, goldens())
    assert not verdict.killed
    assert verdict.problem == "survived: every case passed"


def test_a_fault_that_fit_does_not_show_survives():
    same = a_mutant(old="return a * x0 + b * noise", new="return b * noise + a * x0", clause=FIT)
    verdict = try_mutant(same, goldens())
    assert verdict.problem == "survived: the check of fit passed"
    assert (verdict.case, verdict.margin) == ("", 0.0)


def test_a_wrong_expectation_is_told():
    wrong = a_mutant(old="return a * x0 + b * noise", new="return a * x0 - b * noise", clause="S7")
    verdict = try_mutant(wrong, goldens())
    assert verdict.killed
    assert verdict.problem == "caught at S2 by L1/tiny/q_sample; expected S7"
    raised = dataclasses.replace(wrong, clause="S2", status="error")
    assert "ended with 'failed'" in try_mutant(raised, goldens()).problem
    block = a_mutant(file="layers.py", old="EPS = 1e-6", new="EPS = 1e-3", clause="S7", block="emb")
    assert "names block down_blocks.0.resnets.0" in try_mutant(block, goldens()).problem


def test_the_real_package_is_back_after_a_copy():
    import impl_numpy
    from impl_numpy import diffusion

    before = list(sys.path)
    with copied("numpy") as module:
        assert module is not impl_numpy
        assert sys.modules["impl_numpy"] is module
        assert sys.modules["impl_numpy.diffusion"] is not diffusion
    assert sys.modules["impl_numpy"] is impl_numpy
    assert sys.modules["impl_numpy.diffusion"] is diffusion
    assert sys.path == before


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[x]\nfile = 1", "missing keys old, new, clause, fault"),
        ("[x]\nname = 'y'", "unknown keys name"),
        ("[x", "is not TOML"),
    ],
)
def test_a_wrong_entry_is_named(tmp_path, monkeypatch, text, message):
    from conformance.mutants import engine

    (tmp_path / "numpy.toml").write_text(text, encoding="utf-8")
    monkeypatch.setattr(engine, "HERE", tmp_path)
    with pytest.raises(MutantError, match=message):
        load_mutants("numpy")


def test_the_command_tells_and_fails():
    from typer.testing import CliRunner

    from conformance.mutants.__main__ import app

    run = functools.partial(CliRunner().invoke, app)
    caught = run(["--impl", "numpy", "--name", "q-sample-*"])
    assert caught.exit_code == 0, caught.output
    assert "L1/tiny/q_sample (S2)" in caught.output
    assert "smallest margins" in caught.output
    assert run(["--impl", "cobol"]).exit_code == 2
    assert run(["--name", "no-such-*"]).exit_code == 2
