"""The implementations against the goldens, each in a worker process as the suite runs them.

NumPy and PyTorch pass every other case in float64 before `test_mutants.py` puts faults into them;
float32 is the matter of `nox -s conformance`.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from spec.config import load_config
from spec.params import parameter_shapes

ROOT = Path(__file__).resolve().parent.parent
MOST = ("L[0-2]/*", "L3/tiny/*", "L4/tiny_v/*", "L5/tiny/*", "L6/tiny_uncond/*", "L6/tiny_v/*")
NETWORK = ("L2/*", "L3/tiny/*")
STEP = ("L4/tiny/*", "L5/tiny/*")
TRAINING = ("L4/tiny/*", "L4/tiny_uncond/*", "L5/tiny/*", "L7/*")


@pytest.mark.parametrize(
    ("implementation", "dtype", "cases", "mode"),
    [
        ("impl_numpy", "float64", ("L7/*",), None),
        ("impl_torch", "float64", ("L7/*",), None),
        ("impl_tf", "float64", (*MOST, "L7/*"), None),
        ("impl_jax", "float64", (*MOST, "L7/*"), None),
        ("impl_torch", "bf16", (*NETWORK, "L4/*", "L5/tiny/*", "L6/tiny/*"), None),
        ("impl_tf", "bf16", NETWORK, None),
        ("impl_jax", "bf16", NETWORK, None),
        ("impl_numpy", "float64", TRAINING, "parallel"),
        ("impl_torch", "float64", TRAINING, "parallel"),
        ("impl_tf", "float64", STEP, "parallel"),
        ("impl_jax", "float64", STEP, "parallel"),
        ("impl_torch", "float64", TRAINING, "contiguous"),
    ],
)
def test_passes_the_goldens(implementation, dtype, cases, mode, tmp_path):
    selection = [word for case in cases for word in ("--case", case)]
    command = [sys.executable, "-m", "conformance", "run", "--impl", implementation]
    command += ["--dtype", dtype, *selection, "--reports", str(tmp_path)]
    # one thread, but where the batch is shared out
    command += ["--mode", mode, "--threads", "2"] if mode else ["--threads", "1"]
    done = subprocess.run(
        [*command, "--timeout", "900"], cwd=ROOT, capture_output=True, text=True, timeout=2400
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    report = json.loads((tmp_path / "conformance.json").read_text("utf-8"))
    assert report["ok"] is True
    assert len(report["results"]) >= {("L7/*",): 1, TRAINING: 8, STEP: 6}.get(cases, 30)
    assert mode is None or {column["mode"] for column in report["columns"]} == {mode}


@pytest.mark.parametrize("config", ["tiny", "tiny_uncond", "tiny_deep"])
def test_the_names_of_torch_are_the_canonical_ones(config):
    """A state_dict of impl_torch is a checkpoint: the parameters, and nothing else."""
    pytest.importorskip("torch")
    from impl_torch.unet import UNet

    config = load_config(config)
    shapes = {name: tuple(value.shape) for name, value in UNet(config).state_dict().items()}
    assert shapes == parameter_shapes(config)
