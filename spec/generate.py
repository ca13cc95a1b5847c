"""Writes the schedule tables and the goldens, or checks those that are committed.

`python -m spec.generate` writes, `python -m spec.generate --check` compares. Needs torch, diffusers
and mpmath: the rule that `spec` imports no framework does not hold for this module and for those
that only it imports (tables, oracle, agree, floor). Source of the method: SPEC.md, "Goldens".
"""

import importlib.metadata
import json
import platform
import time
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console
from rich.progress import Progress
from safetensors.numpy import save

from spec import tables
from spec.agree import AgreementError, agreement
from spec.cases import Case, Inputs, golden_cases
from spec.goldens import FORMAT, GOLDENS, Goldens, sha256
from spec.oracle import Oracle

Tree = dict[str, np.ndarray]
TABLE_FLOAT32 = 8 * 2.0**-24
console = Console()


def fetch(case: Case, inputs: Inputs) -> tuple[dict[str, Any], Tree | None]:
    """The arrays and trees that a case's references name, and its parameters."""

    def array(reference: str) -> np.ndarray:
        stem, _, key = reference.partition(":")
        return inputs.files[stem][key]

    def tree(reference: str) -> Tree:
        stem, _, prefix = reference.partition(":")
        start = f"{prefix}/"
        files = inputs.files[stem]
        return {k.removeprefix(start): v for k, v in files.items() if k.startswith(start)}

    trees = case.call == "apply_gradients"
    given = {key: (tree if trees else array)(ref) for key, ref in case.inputs.items()}
    return given, tree(case.params) if case.params else None


def solve(case: Case, inputs: Inputs) -> dict[str, float]:
    """Fill in the case's golden outputs; gives how near the two sources came."""
    given, params = fetch(case, inputs)
    if case.call == "schedule":
        results = tables.exact_tables(case.full_config)
        case.oracle = "mpmath at 50 digits"
    else:
        results = Oracle(case.full_config, params).run(case.call, given, case.options)
        case.oracle = ORACLES.get(case.call, "diffusers UNet2DModel, float64")
    if case.call == "loss_and_grads":
        # The true gradient is zero (S8); what autograd gives is rounding.
        for name in [n for n in results if n.endswith("to_k.bias")]:
            if np.abs(results[name]).max() > 1e-15:
                raise AgreementError(f"{case.id}: {name} should vanish")
            results[name] = np.zeros_like(results[name])
    if any(not np.isfinite(value).all() for value in results.values()):
        raise AgreementError(f"{case.id}: the oracle gave numbers that are not finite")
    apart = agreement(case, given, params, results)
    case.oracle += "; spec/reference.py within " + ", ".join(
        f"{value:.0e} ({kind})" for kind, value in apart.items()
    )
    case.expected = {
        name: value.reshape(-1)[:: case.stride] if strided(case, value) else value
        for name, value in results.items()
        if not exempt(case, name)
    }
    case.shapes = {name: value.shape for name, value in results.items()}
    return apart


ORACLES = {
    "q_sample": "torch, float64, on mpmath tables",
    "target": "torch, float64, on mpmath tables",
    "guide": "torch, float64",
    "predict_x0_eps": "diffusers DDPMScheduler, float64, on mpmath tables",
    "ddpm_step": "diffusers DDPMScheduler, float64, on mpmath tables",
    "ddim_step": "diffusers DDIMScheduler, float64, on mpmath tables",
    "loss_and_grads": "diffusers UNet2DModel and torch autograd, float64",
    "apply_gradients": "torch.optim.Adam, float64",
    "train_steps": "diffusers UNet2DModel, torch autograd and torch.optim.Adam, float64",
    "sample": "diffusers UNet2DModel and schedulers, float64",
}


def exempt(case: Case, name: str) -> bool:
    """Whether S8 leaves this result out of the comparison."""
    return case.call == "train_steps" and name.endswith("to_k.bias")


def strided(case: Case, value: np.ndarray) -> bool:
    """Whether only every case.stride-th element of a result is stored: small ones are whole."""
    return case.stride > 1 and value.size > 64


def tolerance(case: Case, name: str) -> dict[str, dict[str, Any]]:
    """How near a result must come, by dtype."""
    if case.call == "schedule":
        return {
            "float64": {"each": 1e-10, "reason": "float64 builds come within 2e-11 at T = 4000"},
            "float32": {
                "each": TABLE_FLOAT32,
                "reason": "8 roundings of 2^-24: built in float64 and cast once",
            },
        }
    if name.startswith("grads/") and name.endswith("to_k.bias"):
        return {"float64": {"abs": 1e-10, "reason": "the true gradient is zero (S8)"}}
    exact: dict[str, Any] = {"l2": 1e-10, "reason": "float64, S8 and section Goldens of SPEC.md"}
    if "delta/" in name:
        exact |= {"max": 1e-9}
    return {"float64": exact}


def versions() -> dict[str, str]:
    """What the goldens were made with."""
    names = ("numpy", "torch", "diffusers", "mpmath", "safetensors")
    return {"python": platform.python_version()} | {
        name: importlib.metadata.version(name) for name in names
    }


def manifest_text(cases: list[Case], files: dict[str, bytes]) -> str:
    """The manifest, one line an output."""

    def line(value: object) -> str:
        return json.dumps(value, ensure_ascii=False)

    entries = []
    for case in cases:
        head = {"id": case.id, "level": case.level, "clause": case.clause, "config": case.config}
        head |= {"replace": case.replace} if case.replace else {}
        head |= {"call": case.call}
        head |= {"params": case.params} if case.params else {}
        head |= {"inputs": case.inputs, "options": case.options}
        parts = [f"   {line(key)}: {line(value)}" for key, value in head.items()]
        outputs = []
        for name, value in case.expected.items():
            entry = {
                "tensor": f"{case.config}.expected:{case.id}/{name}",
                "shape": list(case.shapes[name]),
                "dtype": str(value.dtype),
                "sha256": sha256(np.ascontiguousarray(value).tobytes()),
            }
            if value.shape != case.shapes[name]:
                entry["stride"] = case.stride
            entry["tolerance"] = tolerance(case, name)
            outputs.append(f"    {line(name)}: {line(entry)}")
        parts.append('   "outputs": {\n' + ",\n".join(outputs) + "\n   }")
        parts.append(f'   "causes": {line(case.causes)}')
        parts.append(f'   "oracle": {line(case.oracle)}')
        entries.append("  {\n" + ",\n".join(parts) + "\n  }")
    hashes = {stem: sha256(data) for stem, data in sorted(files.items())}
    return (
        "{\n"
        f' "format": {FORMAT},\n "made_with": {line(versions())},\n'
        f' "files": {json.dumps(hashes, indent=2)},\n'
        ' "cases": [\n' + ",\n".join(entries) + "\n ]\n}\n"
    )


def build() -> tuple[Inputs, list[Case]]:
    """All cases with their golden outputs. Raises AgreementError."""
    inputs = Inputs()
    cases = golden_cases(inputs)
    worst: dict[tuple[int, str], float] = {}
    with Progress(console=console) as progress:
        task = progress.add_task("goldens", total=len(cases))
        for case in cases:
            for kind, value in solve(case, inputs).items():
                key = case.level, kind
                worst[key] = max(worst.get(key, 0.0), value)
            progress.advance(task)
    for (level, kind), value in sorted(worst.items()):
        console.print(f"L{level} {kind}: the two sources are at most {value:.1e} apart")
    return inputs, cases


def tensors_of(inputs: Inputs, cases: list[Case]) -> dict[str, Tree]:
    """File stem -> key -> tensor, inputs and expected."""
    files = dict(inputs.files)
    for case in cases:
        file = files.setdefault(f"{case.config}.expected", {})
        file |= {f"{case.id}/{name}": value for name, value in case.expected.items()}
    return files


def write(folder: Path) -> None:
    """Write tables, tensors and manifest."""
    tables.SCHEDULES.mkdir(exist_ok=True)
    for stem in tables.CASES:
        (tables.SCHEDULES / f"{stem}.csv").write_text(tables.csv_text(stem), encoding="ascii")
    inputs, cases = build()
    folder.mkdir(exist_ok=True)
    files = {
        stem: save({k: np.array(v, order="C") for k, v in tree.items()})
        for stem, tree in tensors_of(inputs, cases).items()
    }
    for stem, data in files.items():
        (folder / f"{stem}.safetensors").write_bytes(data)
    (folder / "manifest.json").write_text(manifest_text(cases, files), encoding="utf-8")
    Goldens(folder).verify()
    size = sum(len(data) for data in files.values()) / 1e6
    outputs = sum(len(case.expected) for case in cases)
    console.print(f"wrote {len(cases)} cases, {outputs} tensors, {size:.1f} MB to {folder}")


def main(
    check: Annotated[bool, typer.Option(help="Compare with what is committed; write nothing.")] = (
        False
    ),
) -> None:
    """Write spec/schedules and spec/goldens, or check them."""
    start = time.monotonic()
    try:
        write(GOLDENS)
    except AgreementError as error:
        console.print(f"[red]{error}[/red]")
        raise typer.Exit(1) from error
    console.print(f"{time.monotonic() - start:.0f} s")


if __name__ == "__main__":
    typer.run(main)
