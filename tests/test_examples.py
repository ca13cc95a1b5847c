"""The examples: a backend in a process of its own, and scripts that the checker put right."""

import ast
import importlib.util
import json
import re
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

import conformance
from conformance.__main__ import app
from spec.goldens import Goldens

ROOT = Path(__file__).resolve().parent.parent
PLAIN = ROOT / "examples" / "plain_worker.py"
WRITTEN = {"schedule", "q_sample", "target", "predict_x0_eps", "guide"}


def statuses(worker: Path, reports: Path) -> dict[tuple[str, str], str]:
    """(dtype, case) -> status, for levels 0 to 2 of the tiny configs."""
    arguments = ["run", f"--impl=plain={worker}", f"--reports={reports}", "--case=L[012]/*"]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 1, done.output  # part of it is not written
    report = json.loads((reports / "conformance.json").read_text())
    return {(r["dtype"], r["case"]): r["status"] for r in report["results"]}


def test_it_uses_the_standard_library_alone():
    tree = ast.parse(PLAIN.read_text(encoding="utf-8"))
    names = {alias.name for n in ast.walk(tree) if isinstance(n, ast.Import) for alias in n.names}
    names |= {str(node.module) for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert {name.partition(".")[0] for name in names} <= set(sys.stdlib_module_names)


def test_what_it_has_passes_and_the_rest_is_not_implemented(tmp_path):
    found = statuses(PLAIN, tmp_path)
    calls = {case.id: case.call for case in Goldens().cases if case.level <= 2}
    assert len(found) == 2 * len(calls)
    for (_, case), status in found.items():
        assert status == ("passed" if calls[case] in WRITTEN else "not implemented"), case


def test_a_fault_in_it_is_found(tmp_path):
    text = PLAIN.read_text(encoding="utf-8")
    faulty = tmp_path / "faulty.py"
    changed = text.replace("math.sqrt(1 - a) for a in after", "math.sqrt(1 - a * a) for a in after")
    assert changed != text
    faulty.write_text(changed, encoding="utf-8")
    faulty.chmod(0o755)
    found = statuses(faulty, tmp_path)
    assert found["float64", "L0/tiny/ho2020"] == "failed"
    assert found["float32", "L1/tiny/q_sample"] == "failed"
    guided = {found[key] for key in found if "guide" in key[1]}
    assert guided == {"passed"}


@pytest.fixture
def paper_style(monkeypatch):
    pytest.importorskip("torch")
    monkeypatch.syspath_prepend(ROOT / "examples" / "paper_style")
    return importlib.import_module("paper_style")


@pytest.mark.parametrize("cases", ["L[0-3]/*", "L4/tiny/*", "L5/tiny/apply_[cs]*"])
def test_the_script_of_the_tutorial_is_right(paper_style, cases):
    results = list(conformance.check(paper_style, ["float64"], [cases]))
    assert results
    assert {r.case.id: r.message for r in results if not r.ok} == {}


def test_its_samplers_are_right(paper_style):
    cases = ["L6/tiny/ddim", "L6/tiny/ddim_guided_0", "L6/tiny/dpmpp", "L6/tiny_x0/ddpm_T2"]
    results = list(conformance.check(paper_style, ["float64", "float32"], cases))
    assert len(results) == 2 * len(cases)
    assert {r.case.id: r.message for r in results if not r.ok} == {}


# What the tutorial quotes of the checker's words, and one of its mistakes made again.
@pytest.mark.parametrize(
    ("right", "wrong", "case", "said"),
    [
        (".clamp(max=0.999)", "", "L0/tiny/nichol2021", "cosine betas not capped at 0.999"),
        ("0, 1, 0, 1", "1, 0, 1, 0", "L2/tiny/down_blocks.0.downsamplers.0", "one column right"),
        (
            "i = torch.arange(half, dtype=torch.float64)",
            "i = torch.arange(half)",
            "L2/tiny/time_proj",
            "of the size of float32's rounding",
        ),
        (
            "self.d.optimizer.zero_grad()",
            "pass",
            "L4/tiny/loss_and_grads_again",
            "gradients left by a call before",
        ),
        ("drop, self.c.num_classes", "drop, 0", "L4/tiny/loss_and_grads_dropped", "the null label"),
        ("(self.step + 1) / c.warmup", "self.step / c.warmup", "L5/tiny/apply_small", "the rate"),
        ("(1 + self.step) / (10", "1 or (10", "L5/tiny/apply_small", "look at the EMA"),
        ("scale is None", "not scale", "L6/tiny/ddim_guided_0", "a scale of 0 taken for no"),
    ],
)
def test_a_mistake_of_the_tutorial_is_named(paper_style, tmp_path, right, wrong, case, said):
    text = Path(paper_style.__file__).read_text(encoding="utf-8")
    assert text.count(right) >= 1
    (tmp_path / "mistaken.py").write_text(text.replace(right, wrong), encoding="utf-8")
    spec = importlib.util.spec_from_file_location("mistaken", tmp_path / "mistaken.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    # `_again` stands on the call before it, on the same model.
    cases = [case, case.removesuffix("_again")]
    results = conformance.check_backend(module, ["float64"], cases)
    result = next(result for result in results if result.case.id == case)
    assert result.status == "failed"
    assert said in " ".join([*result.clues, *result.causes])


def test_the_tutorial_says_how_many_mistakes_there_are():
    text = (ROOT / "docs" / "tutorial.md").read_text(encoding="utf-8")
    numbers = [
        int(n) for group in re.findall(r"^\*\*([\d, ]+)\.", text, re.M) for n in group.split(",")
    ]
    assert numbers == list(range(1, 27))
    assert "Twenty-six things were wrong" in text
    assert "26 usual mistakes" in (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_one_in_tinygrad_is_right(monkeypatch):
    pytest.importorskip("tinygrad")
    monkeypatch.syspath_prepend(ROOT / "examples" / "tinygrad_backend")
    module = importlib.import_module("tinygrad_backend")
    results = list(conformance.check(module, ["float64"], ["L[01]/*", "L2/tiny/mid_block.*"]))
    assert results
    assert {r.case.id: r.message for r in results if not r.ok} == {}
