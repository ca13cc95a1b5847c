"""TensorFlow and JAX against the goldens, each in a worker process as the suite runs them.

NumPy and PyTorch pass every case before `test_mutants.py` puts faults into them.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
CASES = ("L[0-2]/*", "L3/tiny/*", "L4/tiny_v/*", "L5/tiny/*", "L6/tiny_uncond/*", "L6/tiny_v/*")


@pytest.mark.parametrize("implementation", ["impl_tf", "impl_jax"])
def test_passes_the_goldens_in_float64(implementation, tmp_path):
    selection = [word for case in CASES for word in ("--case", case)]
    command = [sys.executable, "-m", "conformance", "run", "--impl", implementation]
    command += ["--dtype", "float64", *selection, "--threads", "1", "--reports", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1500)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    report = json.loads((tmp_path / "conformance.json").read_text("utf-8"))
    assert report["ok"] is True
    assert len(report["results"]) > 100
