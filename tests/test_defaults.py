"""The frameworks' own defaults: each is a change that can be made, and is found as is recorded."""

import pytest
from typer.testing import CliRunner

from conformance.defaults import NEAR, app, load_defaults, measure, notes
from conformance.mutants.engine import Mutant, mutated
from conformance.process import ROOT
from spec.goldens import Goldens

FRAMEWORKS = {"torch": "torch", "tf": "tensorflow", "jax": "jax"}
DEFAULTS = load_defaults()
CASES = {case.id: case for case in Goldens().cases}


@pytest.mark.parametrize("default", DEFAULTS, ids=lambda default: default.name)
def test_every_default_can_be_put_back_and_names_its_case(default):
    assert CASES[default.case].clause == default.clause
    assert default.clause in default.text
    if not default.old:
        assert default.measured is None
        assert "on a GPU" in default.text
        return
    source = (ROOT / f"impl_{default.impl}" / default.file).read_text("utf-8")
    mutant = Mutant(
        default.name, default.impl, default.file, default.old, default.new, default.clause, ""
    )
    assert mutated(source, mutant) != source
    assert default.measured > 2
    assert default.case in default.text


@pytest.mark.parametrize(
    "default",
    [d for d in DEFAULTS if d.old and (d.impl == "torch" or "L2" in d.case) and "L7" not in d.case],
    ids=lambda default: default.name,
)
def test_a_default_is_found_by_as_much_as_is_recorded(default):
    pytest.importorskip(FRAMEWORKS[default.impl])
    share = measure(default)
    assert share > 1
    assert 1 / NEAR < share / default.measured < NEAR


def test_every_framework_has_its_notes_and_a_stranger_none():
    found = notes(["impl_numpy", "impl_torch", "impl_tf", "impl_jax", "somebody.else"])
    assert sorted(found) == ["impl_jax", "impl_tf", "impl_torch"]
    for matter in ("GroupNorm", "TF32", "initial values"):
        assert all(any(matter in d.matter for d in defaults) for defaults in found.values())


def test_an_implementation_without_notes_is_refused():
    done = CliRunner().invoke(app, ["--impl", "numpy"])
    assert done.exit_code == 2
    assert "choose of jax, tf, torch" in done.output
