"""Slices of a batch side by side: the numbers of the whole batch, whatever its size."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# In a process of its own: JAX and TensorFlow settle their devices and threads when they begin.
PROGRAM = """
import importlib, json, sys
import numpy as np
from spec.config import load_config

backend = importlib.import_module(sys.argv[1])
config = load_config("tiny").replace(max_grad_norm=0.1, batch_size=4)
found = []
for rows in map(int, sys.argv[2:]):
    draw = np.random.default_rng(rows)
    shape = (rows, *config.image_shape)
    batch = {
        "x0": draw.uniform(-1, 1, shape),
        "t": draw.integers(config.timesteps, size=rows),
        "noise": draw.standard_normal(shape),
        "labels": draw.integers(config.num_classes, size=rows),
        "drop": draw.random(rows) < 0.5,
    }
    for mode in ("parallel", "eager" if sys.argv[1] == "impl_torch" else "compiled"):
        model = backend.open(config, dtype="float64", device="cpu", mode=mode)
        loss, grads = model.loss_and_grads(**batch)
        losses = [model.train_step(**batch) for _ in range(2)]
        images, labels = draw.uniform(-1, 1, (7, *config.image_shape)), np.arange(7) % 3
        if mode == "parallel":
            other = model, loss, grads, losses
        else:
            first, loss2, grads2, losses2 = other
            error = max(np.abs(g - grads2[n]).max() for n, g in grads.items())
            error /= max(np.abs(g).max() for g in grads.values())
            a, b = first.state(), model.state()
            moved = max(np.abs(a["ema"][n] - b["ema"][n]).max() for n in a["ema"])
            both = zip(*(m.fit(images, labels, 3, shared_noise=True) for m in (first, model)))
            found.append({
                "rows": rows,
                "mode": first.describe()["mode"],
                "threads": first.describe()["threads"],
                "loss": abs(loss - loss2),
                "losses": max(abs(x - y) for x, y in zip(losses, losses2, strict=True)),
                "grads": error,
                "ema": moved,
                "step": [a["step"], b["step"]],
                "fit": max(abs(x - y) for x, y in both),
            })
print(json.dumps(found))
"""
SHARING = sorted(path.parent.name for path in ROOT.glob("impl_*/parallel.py"))


def test_all_four_share_out_a_batch():
    assert SHARING == ["impl_jax", "impl_numpy", "impl_tf", "impl_torch"]


# of 5 and 1, where the slices are unequal and where one thread has nothing, compilers take long
@pytest.mark.parametrize(
    ("implementation", "rows"),
    [
        ("impl_numpy", ["4", "5", "1"]),
        ("impl_torch", ["4", "5", "1"]),
        ("impl_tf", ["4"]),
        ("impl_jax", ["4"]),
    ],
)
def test_slices_give_what_the_whole_batch_gives(implementation, rows):
    pytest.importorskip({"impl_tf": "tensorflow"}.get(implementation, implementation[5:]))
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, implementation, *rows],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    for found in json.loads(done.stdout.splitlines()[-1]):
        assert found["mode"] == "parallel"
        assert found["step"] == [2, 2]
        # float64 rounds at 1e-16; sums over a batch of a few thousand numbers lose some digits
        for what in ("loss", "losses", "fit"):
            assert found[what] < 1e-12, (what, found)
        assert found["grads"] < 1e-12, found
        assert found["ema"] < 1e-9, found


@pytest.mark.parametrize("implementation", ["impl_tf", "impl_jax"])
def test_a_process_that_began_otherwise_is_told(implementation):
    pytest.importorskip({"impl_tf": "tensorflow", "impl_jax": "jax"}[implementation])
    program = (
        "import importlib, sys\n"
        "from spec.config import load_config\n"
        "backend, config = importlib.import_module(sys.argv[1]), load_config('tiny')\n"
        "backend.threads = lambda: 3\n"  # as on a machine of three cores
        "backend.open(config, device='cpu')\n"
        "try:\n"
        "    backend.open(config, device='cpu', mode='parallel')\n"
        "except ValueError as error:\n"
        "    print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, implementation],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "mode = 'parallel'" in done.stdout
    assert "open this mode first in its process" in done.stdout
