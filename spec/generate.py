"""Writes the schedule tables and the goldens, or checks those that are committed.

`python -m spec.generate` writes, `--missing` keeps what is there and makes what is not, `--check`
compares. Needs torch, diffusers and mpmath: the rule that `spec` imports no framework does not hold
for this module and for those that only it imports (agree, cases, causes, floor, oracle, tables,
tolerance). The method is described in SPEC.md under "Goldens".
"""

import concurrent.futures
import contextlib
import dataclasses
import importlib.metadata
import json
import math
import multiprocessing
import platform
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console
from rich.progress import Progress
from safetensors.numpy import save

from spec import tables
from spec.agree import AgreementError, agreement, distance
from spec.cases import CHECKPOINT, Case, Inputs, golden_cases
from spec.config import Config, ConfigError, load_config
from spec.floor import asks_network, floors, seeds_of
from spec.fresh import check_config, fresh_cases, random_config
from spec.goldens import FORMAT, GOLDENS, GoldenError, Goldens, sha256
from spec.oracle import Oracle
from spec.params import initial_params
from spec.tolerance import FACTORS, median_floors, part_of, tolerance, vanishes

Tree = dict[str, np.ndarray]
Told = Callable[[str, int, int], None]  # what is done, how much of it, of how much
WORKERS = 2
CHUNK = 8  # seeds of one task
INPUTS_APART = 2.0**-23  # relative: another libm may round a stored normal the other way
TENSORS_APART = 1e-12  # relative L2
# A parameter's change is the difference of two near numbers.
CHANGES_APART = 1e-10
FLOOR_MARGIN = 2.0  # a recomputed seed may lie this much above the recorded floor
ORACLES = {
    "schedule": "mpmath at 50 digits",
    "q_sample": "torch, float64, on mpmath tables",
    "target": "torch, float64, on mpmath tables",
    "guide": "torch, float64",
    "predict_x0_eps": "diffusers DDPMScheduler and torch, float64, on mpmath tables",
    "ddpm_step": "diffusers DDPMScheduler, float64, on mpmath tables",
    "ddim_step": "diffusers DDIMScheduler, float64, on mpmath tables",
    "run_block": "diffusers UNet2DModel, float64",
    "predict": "diffusers UNet2DModel, float64",
    "taps": "diffusers UNet2DModel, float64",
    "loss_and_grads": "diffusers UNet2DModel and torch autograd, float64",
    "apply_gradients": "torch.optim.Adam, float64",
    "train_steps": "diffusers UNet2DModel, torch autograd and torch.optim.Adam, float64",
    "sample": "diffusers UNet2DModel and schedulers, float64",
    "train_run": "diffusers UNet2DModel and schedulers, torch autograd and Adam, float64",
}
console = Console()


def fetch(case: Case, inputs: Inputs) -> tuple[dict[str, Any], Tree | None]:
    """The arrays and trees that a case's references name, and its parameters."""
    get = inputs.tree if case.call == "apply_gradients" else inputs.array
    given = {key: get(reference) for key, reference in case.inputs.items()}
    if case.call == "train_run":  # from initial weights (S10)
        start = initial_params(case.full_config, case.options["seed"])
        return given, {name: value.astype(np.float64) for name, value in start.items()}
    return given, inputs.tree(case.params) if case.params else None


def solve(case: Case, given: dict[str, Any], params: Tree | None) -> dict[str, float]:
    """Fill in the case's golden outputs; gives how near the two sources came."""
    if case.call == "schedule":
        results = tables.exact_tables(case.full_config)
    else:
        results = Oracle(case.full_config, params).run(case.call, given, case.options)
    for name in results:
        if vanishes(case, name):  # what autograd gives there is rounding
            if np.abs(results[name]).max() > 1e-14:
                raise AgreementError(f"{case.id}: {name} should vanish, by S8")
            results[name] = np.zeros_like(results[name])
    if any(not np.isfinite(value).all() for value in results.values()):
        raise AgreementError(f"{case.id}: the oracle gave numbers that are not finite")
    apart = agreement(case, given, params, results)
    case.oracle = f"{ORACLES[case.call]}; spec/reference.py"
    # S8: what a whole step makes of a gradient that is zero but for rounding is not compared.
    kept = {
        name: value
        for name, value in results.items()
        if not (case.call == "train_steps" and name.endswith("to_k.bias"))
    }
    case.shapes = {name: value.shape for name, value in kept.items()}
    case.expected = {
        name: value.reshape(-1)[:: case.stride] if case.stride > 1 and value.size > 64 else value
        for name, value in kept.items()
    }
    return apart


def precisions(case: Case) -> list[str]:
    """The precisions in which the case has floors of its own."""
    if case.level == 0:
        return []
    # whether float64 itself gives a whole step depends on the numbers that a seed draws
    own = ["float64"] if case.own and case.call == "train_steps" else []
    if not case.columns:
        return own
    return own + (list(case.columns) if asks_network(case) else ["float32"])


@contextlib.contextmanager
def bars(told: Told | None = None) -> Iterator[Told]:
    """What follows work: `told`, or a bar on the console for each kind."""
    if told is not None:
        yield told
        return
    with Progress(console=console) as progress:
        tasks: dict[str, Any] = {}

        def tell(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = progress.add_task(what, total=total)
            progress.update(tasks[what], completed=done)

        yield tell


class Here(concurrent.futures.Executor):
    """Runs each call at once, in this process: starting others would take longer."""

    def submit(self, fn, /, *args, **kwargs):
        future: concurrent.futures.Future = concurrent.futures.Future()
        future.set_result(fn(*args, **kwargs))
        return future


def executor(processes: int) -> concurrent.futures.Executor:
    """What runs calls in so many processes; 0: in this one."""
    if not processes:
        return Here()
    context = multiprocessing.get_context("spawn")
    return concurrent.futures.ProcessPoolExecutor(processes, context)


def measure(
    cases: list[Case],
    inputs: Inputs,
    most: int | None = None,
    told: Told | None = None,
    processes: int = WORKERS,
) -> None:
    """Fill in the floors that cases lack, over all seeds or at most so many, in processes."""
    tasks = []
    for case in cases:
        for precision in precisions(case):
            if precision not in case.floors:
                seeds = list(range(seeds_of(case, precision)))[:most]
                chunk = 1 if case.call == "train_run" else CHUNK
                tasks += [
                    (case, precision, seeds[i : i + chunk]) for i in range(0, len(seeds), chunk)
                ]
    tasks.sort(key=lambda task: -task[0].level)  # long ones first
    with bars(told) as tell, executor(processes) as pool:
        tell("noise floors", 0, len(tasks))
        futures = {
            pool.submit(floors, case, *fetch(case, inputs), seeds, precision=precision): (
                case,
                precision,
            )
            for case, precision, seeds in tasks
        }
        measured: dict[tuple[str, str], dict[str, dict[str, float]]] = {}
        for i, future in enumerate(concurrent.futures.as_completed(futures), 1):
            case, precision = futures[future]
            known = measured.setdefault((case.id, precision), {})
            for name, found in future.result().items():
                before = known.get(name, found)
                known[name] = {norm: max(before[norm], value) for norm, value in found.items()}
            tell("noise floors", i, len(tasks))
    for case in cases:  # three digits are recorded, and what is recorded is what counts
        for precision in precisions(case):
            for name, found in measured.get((case.id, precision), {}).items():
                rounded = {norm: float(f"{value:.3g}") for norm, value in found.items()}
                case.floors.setdefault(precision, {})[name] = rounded


def solve_all(cases: list[Case], inputs: Inputs, told: Told | None = None) -> None:
    """Fill in every case's golden outputs. Raises AgreementError; prints how near they came."""
    worst: dict[tuple[int, str], float] = {}
    with bars(told) as tell:
        for i, case in enumerate(cases, 1):
            if not case.expected:
                for kind, value in solve(case, *fetch(case, inputs)).items():
                    key = case.level, kind
                    worst[key] = max(worst.get(key, 0.0), value)
            tell("goldens from two sources", i, len(cases))
    for (level, kind), value in sorted(worst.items()):
        console.print(f"L{level} {kind}: the two sources are at most {value:.1e} apart")


def versions() -> dict[str, str]:
    """What the goldens were made with."""
    names = ("numpy", "torch", "diffusers", "mpmath", "safetensors")
    return {"python": platform.python_version()} | {
        name: importlib.metadata.version(name) for name in names
    }


def entries(cases: list[Case]) -> list[dict[str, Any]]:
    """The `cases` of the manifest."""
    medians = median_floors(cases)
    result = []
    for case in cases:
        entry: dict[str, Any] = {
            "id": case.id,
            "level": case.level,
            "clause": case.clause,
            "config": case.config,
        }
        entry |= {"replace": case.replace} if case.replace else {}
        entry |= {"call": case.call}
        entry |= {"params": case.params} if case.params else {}
        entry |= {"inputs": case.inputs, "options": case.options, "outputs": {}}
        for name, value in case.expected.items():
            output = entry["outputs"][name] = {
                "tensor": f"{case.config}.expected:{case.id}/{name}",
                "shape": list(case.shapes[name]),
                "dtype": str(value.dtype),
                "sha256": sha256(np.ascontiguousarray(value).tobytes()),
            }
            if value.shape != case.shapes[name]:
                output["stride"] = case.stride
            output["tolerance"] = tolerance(case, name, medians)
            if case.floors:
                output["floor"] = {p: floors_of[name] for p, floors_of in case.floors.items()}
        entry |= {"causes": list(case.causes), "oracle": case.oracle}
        result.append(entry)
    return result


def manifest_text(cases: list[Case], files: dict[str, str]) -> str:
    """The manifest as JSON, one line an output."""

    def line(value: object) -> str:
        return json.dumps(value, ensure_ascii=False)

    blocks = []
    for entry in entries(cases):
        parts = []
        for key, value in entry.items():
            text = line(value)
            if key == "outputs":
                rows = [f"    {line(name)}: {line(output)}" for name, output in value.items()]
                text = "{\n" + ",\n".join(rows) + "\n   }"
            parts.append(f"   {line(key)}: {text}")
        blocks.append("  {\n" + ",\n".join(parts) + "\n  }")
    hashes = ",\n".join(f"  {line(stem)}: {line(digest)}" for stem, digest in sorted(files.items()))
    own = {case.config: dataclasses.asdict(case.own) for case in cases if case.own}
    configs = ",\n".join(f"  {line(name)}: {line(fields)}" for name, fields in own.items())
    return (
        "{\n"
        f' "format": {FORMAT},\n "made_with": {line(versions())},\n'
        + (f' "configs": {{\n{configs}\n }},\n' if own else "")
        + f' "files": {{\n{hashes}\n }},\n'
        ' "cases": [\n' + ",\n".join(blocks) + "\n ]\n}\n"
    )


def tensors_of(inputs: Inputs, cases: list[Case]) -> dict[str, Tree]:
    """File stem -> key -> tensor, inputs and expected, without the checkpoint."""
    files = {k: v for k, v in inputs.files.items() if not k.startswith("checkpoints/")}
    for case in cases:
        file = files.setdefault(f"{case.config}.expected", {})
        file |= {f"{case.id}/{name}": value for name, value in case.expected.items()}
    return files


def recall(folder: Path, cases: list[Case], inputs: Inputs) -> int:
    """Take over what is stored of every case that is still the same; gives how many those are."""
    goldens = Goldens(folder)
    goldens.verify()
    raw = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    entries_by_id = {entry["id"]: entry for entry in raw["cases"]}
    stored = {case.id: case for case in goldens.cases}
    changed = _changed_inputs(goldens, inputs, new=True)
    count = 0
    for case in cases:
        entry = entries_by_id.get(case.id)
        # an input is a tensor, or the tree of all those below it
        used = [*case.inputs.values(), *([case.params] if case.params else [])]
        touched = any(c == ref or c.startswith(f"{ref}/") for ref in used for c in changed)
        same = (
            entry
            and not touched
            and all(
                entry.get(key, missing) == json.loads(json.dumps(getattr(case, key)))
                for key, missing in (
                    ("config", None),
                    ("replace", {}),
                    ("call", None),
                    ("params", None),
                    ("inputs", {}),
                    ("options", {}),
                )
            )
        )
        if not entry or not same:
            continue
        for output in stored[case.id].outputs:
            case.expected[output.name] = goldens.expected(stored[case.id], output)
            case.shapes[output.name] = output.shape
            for precision, found in entry["outputs"][output.name].get("floor", {}).items():
                case.floors.setdefault(precision, {})[output.name] = found
        case.oracle = entry["oracle"]
        count += 1
    return count


def write(folder: Path, missing: bool = False) -> None:
    """Write tables, tensors and manifest. Raises AgreementError, and then writes no golden."""
    tables.SCHEDULES.mkdir(exist_ok=True)
    for stem in tables.CASES:
        (tables.SCHEDULES / f"{stem}.csv").write_text(tables.csv_text(stem), encoding="ascii")
    inputs = Inputs()
    cases = golden_cases(inputs)
    if missing:
        console.print(f"{recall(folder, cases, inputs)} of {len(cases)} cases are kept")
    solve_all(cases, inputs)
    measure(cases, inputs)
    write_folder(folder, cases, inputs)


def write_folder(folder: Path, cases: list[Case], inputs: Inputs) -> None:
    """Write the tensors and the manifest of cases that are solved and measured."""
    folder.mkdir(parents=True, exist_ok=True)
    files = {
        stem: save({key: np.array(value, order="C") for key, value in tree.items()})
        for stem, tree in tensors_of(inputs, cases).items()
    }
    for stem, data in files.items():
        (folder / f"{stem}.safetensors").write_bytes(data)
    hashes = {stem: sha256(data) for stem, data in files.items()}
    if "checkpoints/digits" in inputs.files:
        hashes["checkpoints/digits"] = sha256(CHECKPOINT.read_bytes())
    (folder / "manifest.json").write_text(manifest_text(cases, hashes), encoding="utf-8")
    Goldens(folder).verify()
    size = sum(path.stat().st_size for path in folder.iterdir()) / 1e6
    outputs = sum(len(case.expected) for case in cases)
    console.print(f"wrote {len(cases)} cases, {outputs} tensors, {size:.1f} MB to {folder}")


def check(folder: Path) -> list[str]:
    """Every difference between what is committed and what comes out now; empty where none."""
    problems = []
    for stem in tables.CASES:
        path = tables.SCHEDULES / f"{stem}.csv"
        if not path.exists() or path.read_text(encoding="ascii") != tables.csv_text(stem):
            problems.append(f"{path.name} differs from mpmath's table")
    console.print(f"compared {len(tables.CASES)} schedule tables, to the last digit")
    goldens = Goldens(folder)
    goldens.verify()
    inputs = Inputs()
    cases = golden_cases(inputs)
    changed = _changed_inputs(goldens, inputs)
    problems += [f"{reference} is not what the shared stream draws" for reference in changed]
    solve_all(cases, inputs)
    problems += _check_tensors(goldens, cases)
    problems += _check_floors(folder, cases, inputs)
    return problems


def _changed_inputs(goldens: Goldens, inputs: Inputs, new: bool = False) -> list[str]:
    """References of inputs that are drawn otherwise than stored; all others become the stored ones.

    With `new`, one that is not stored at all counts as changed; else GoldenError is raised.
    """
    changed, count = [], 0
    for stem, tree in inputs.files.items():
        for key, value in tree.items():
            if stem.startswith("checkpoints/"):
                continue
            reference = f"{stem}:{key}"
            if new and not goldens.holds(reference):
                changed.append(reference)
                continue
            stored = goldens.array(reference)
            apart = np.abs(stored - value) if value.dtype.kind == "f" else stored != value
            if stored.shape != value.shape or (apart > INPUTS_APART * np.abs(value)).any():
                changed.append(reference)
            else:
                tree[key] = stored
            count += 1
    console.print(f"compared {count} input tensors with the shared stream")
    return changed


def _check_tensors(goldens: Goldens, cases: list[Case]) -> list[str]:
    """Compare the expected tensors made now with those stored, which then take their place."""
    problems, worst, count = [], 0.0, 0
    stored = {case.id: {o.name: o for o in case.outputs} for case in goldens.cases}
    if list(stored) != [case.id for case in cases]:
        missing, extra = set(stored) ^ {case.id for case in cases}, len(stored) - len(cases)
        return [f"the manifest's cases differ: {sorted(missing)} ({extra:+d})"]
    for case, known in zip(cases, goldens.cases, strict=True):
        if list(stored[case.id]) != list(case.expected):
            problems.append(f"{case.id} has other outputs than the manifest")
            continue
        for name, value in case.expected.items():
            golden = goldens.expected(known, stored[case.id][name])
            apart = distance(value, golden) if value.shape == golden.shape else np.inf
            limit = CHANGES_APART if part_of(name) in ("delta", "ema_delta") else TENSORS_APART
            if not apart <= limit:
                problems.append(f"{case.id} {name}: {apart:.2g} from what is stored ({limit:g})")
            worst, count = max(worst, apart), count + 1
            case.expected[name] = golden
    console.print(f"compared {count} golden tensors: at most {worst:.1e} apart")
    return problems


def _check_floors(folder: Path, cases: list[Case], inputs: Inputs) -> list[str]:
    """Compare one seed's errors with the recorded floors, and the manifest with its derivation."""
    raw = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    recorded: dict[str, dict[str, dict[str, dict[str, float]]]] = {}
    for entry in raw["cases"]:
        by_precision = recorded.setdefault(entry["id"], {})
        for name, output in entry["outputs"].items():
            for precision, found in output.get("floor", {}).items():
                by_precision.setdefault(precision, {})[name] = found
    measure(cases, inputs, most=1)
    problems, count = [], 0
    for case in cases:
        known_floors = recorded[case.id]
        if {p: set(f) for p, f in case.floors.items()} != {
            p: set(f) for p, f in known_floors.items()
        }:
            problems.append(f"{case.id}: floors are recorded for other outputs or precisions")
            continue
        for precision, by_name in case.floors.items():
            for name, found in by_name.items():
                for norm, value in found.items():
                    known = known_floors[precision][name][norm]
                    count += 1
                    if not value <= FLOOR_MARGIN * known:
                        problems.append(
                            f"{case.id} {name}: one {precision} seed errs by {value:.2g} ({norm}), "
                            f"the recorded floor is {known:.2g}"
                        )
                    if not 0 <= known < math.inf or (known == 0) != (value == 0):
                        problems.append(
                            f"{case.id} {name}: {precision} floor {known} ({norm}) says nothing"
                        )
        case.floors = known_floors
    console.print(
        f"compared {count} noise floors with one seed, at most {FLOOR_MARGIN:g} times as large"
    )
    for entry, known in zip(entries(cases), raw["cases"], strict=True):
        if json.loads(json.dumps(entry)) != known:
            keys = [key for key in entry if json.loads(json.dumps(entry[key])) != known.get(key)]
            problems.append(f"{entry['id']}: the manifest's {', '.join(keys)} differ")
    console.print(f"compared {len(cases)} manifest entries with their derivation")
    return problems


def write_fresh(
    folder: Path,
    configs: list[Config],
    seed: int,
    columns: list[str],
    brief: bool = False,
    told: Told | None = None,
    processes: int = WORKERS,
) -> None:
    """Write goldens of these configs, on inputs of the seed. Raises ConfigError, AgreementError.

    Without columns they have limits for float64 alone, which ask for few floors.
    """
    inputs, cases = Inputs(seed), []
    for config in configs:
        cases += fresh_cases(inputs, config, brief)
    cases = [dataclasses.replace(case, columns=tuple(columns)) for case in cases]
    solve_all(cases, inputs, told)
    measure(cases, inputs, None, told, processes)
    write_folder(folder, cases, inputs)


def main(
    check_only: Annotated[
        bool, typer.Option("--check", help="Compare with what is committed; write nothing.")
    ] = False,
    missing: Annotated[
        bool,
        typer.Option("--missing", help="Keep what is stored; make cases and floors that it lacks."),
    ] = False,
    config: Annotated[
        list[str],
        typer.Option(help="Goldens of this config instead: a name, or a .toml file; repeat."),
    ] = [],  # noqa: B006
    random: Annotated[
        str, typer.Option(metavar="FIRST:COUNT", help="Goldens of so many random configs.")
    ] = "",
    seed: Annotated[int, typer.Option(help="Of the inputs of --config and --random.")] = 0,
    out: Annotated[
        Path | None, typer.Option(help="Folder, new or empty, for --config and --random.")
    ] = None,
    column: Annotated[
        list[str], typer.Option(help="Limits besides float64's: float32, tf32, bf16; repeat.")
    ] = ["float32"],  # noqa: B006
    brief: Annotated[
        bool, typer.Option("--brief", help="One case of each kind, and no block alone.")
    ] = False,
) -> None:
    """Write spec/schedules and spec/goldens, or check them; or write goldens of other configs."""
    start = time.monotonic()
    problems = []
    try:
        if config or random:
            configs = [load_config(name) for name in config] + random_configs(random)
            if check_only or missing:
                raise ConfigError("--check and --missing are for the committed goldens alone")
            check_request(configs, seed, out, column)
            write_fresh(out, configs, seed, column, brief)
        elif out or brief:
            raise ConfigError("--out and --brief are for goldens of --config or --random")
        elif check_only:
            problems = check(GOLDENS)
        else:
            write(GOLDENS, missing)
    except (AgreementError, GoldenError, ConfigError) as error:
        console.print(f"error: {error}", style="red", markup=False, highlight=False)
        raise typer.Exit(2 if isinstance(error, ConfigError) else 1) from error
    for problem in problems:
        console.print(f"[red]{problem}[/red]")
    console.print(f"{time.monotonic() - start:.0f} s")
    if problems:
        raise typer.Exit(1)


def random_configs(text: str) -> list[Config]:
    """The configs of FIRST:COUNT, or none of an empty text. Raises ConfigError for another one."""
    if not text:
        return []
    first, _, count = text.partition(":")
    if not (first.isdecimal() and count.isdecimal() and 1 <= int(count) <= 1000):
        raise ConfigError(f"--random {text!r} is not FIRST:COUNT, such as 0:20; COUNT is 1 to 1000")
    return [random_config(int(first) + i) for i in range(int(count))]


def check_request(configs: list[Config], seed: int, out: Path | None, columns: list[str]) -> None:
    """Raise ConfigError where goldens cannot be made as asked, before any work."""
    if not 0 <= seed < 2**64:
        raise ConfigError(f"--seed {seed} is outside 0..2^64-1; choose one inside")
    if unknown := [name for name in columns if name not in FACTORS]:
        raise ConfigError(
            f"--column {', '.join(unknown)} is unknown; choose among {', '.join(FACTORS)}"
        )
    if columns and "float32" not in columns:
        raise ConfigError("--column float32 is missing: what is outside the network has its limits")
    if out is None:
        raise ConfigError("--out is missing; name a folder for the goldens, new or empty")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"--out {out} is there and not empty; name a new folder")
    names = [config.name for config in configs]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ConfigError(f"two configs are named {', '.join(twice)}; give them other names")
    for config in configs:
        check_config(config)


if __name__ == "__main__":
    typer.run(main)
