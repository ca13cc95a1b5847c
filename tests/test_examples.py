"""The example of a backend in a process of its own, which shares no line with this repository."""

import ast
import json
import sys
from pathlib import Path

from typer.testing import CliRunner

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
