"""The command line: `python -m conformance.bench run`, `show`, `compare`, `scaling`.

By argparse and not typer: on a machine that has a GPU, the frameworks are often all that is there.
"""

import argparse
import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from conformance.bench import (
    charts,
    compare,
    machine,
    results,
    scaling,
    shares,
    table,
    workloads,
)
from conformance.bench.rounds import PROCESSES, Bench, Contender, Plan, Run, find_contenders, short
from conformance.process import CannotStart, Impl, interpreter, shipped
from conformance.runner import UsageError, check_threads, parse_impl
from spec.backend import ARRAY_DTYPES
from spec.config import ConfigError

DEVICES = ("cpu", "cuda")
# Other libraries, and the environment of each, which nox makes only where they are asked for.
PEERS = {
    "conformance.bench.peers.diffusers": "peers-torch",
    "conformance.bench.peers.lucidrains": "peers-lucidrains",
    "conformance.bench.peers.keras": "peers-tf",
    "conformance.bench.peers.nnx": "peers-jax",
}
LEAST_ROUNDS, MOST_ROUNDS = 5, 1000
MOST_AT_ONCE = 64


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Carry out a command line, and end with its exit code: 2 where it asks for the impossible."""
    chosen = parser().parse_args(arguments)
    try:
        code = chosen.command(chosen)
    except (UsageError, ConfigError, results.ResultsError, scaling.ScalingError) as error:
        print(f"error: {error}", file=sys.stderr)
        code = 2
    except charts.ChartError as error:
        print(f"error: {error}", file=sys.stderr)
        code = 1
    except CannotStart as error:
        print(f"error: {error}", file=sys.stderr)
        code = 2 if error.usage else 1
    except KeyboardInterrupt:
        print("stopped: nothing was finished that could be written", file=sys.stderr)
        code = 128 + signal.SIGINT
    except BrokenPipeError:  # whoever reads, `head` for one, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 1
    sys.exit(code)


def parser() -> argparse.ArgumentParser:
    """What can be asked for."""
    top = argparse.ArgumentParser(
        prog="python -m conformance.bench",
        description="Times the backends, each checked in the process that is timed.",
    )
    commands = top.add_subparsers(required=True, metavar="COMMAND")
    run = commands.add_parser("run", help="measure", description="Measure, and write the results.")
    run.set_defaults(command=run_command)
    add_choices(run, seconds=2.0, ceiling_seconds=20.0, out=Path("reports/bench.json"))
    run.add_argument(
        "--workload",
        action="append",
        default=[],
        metavar="NAME",
        help=f"{', '.join(workloads.shipped())}, or a config; repeat for more "
        "(default: S, M and sample-digits; with --device cuda L and sample-L)",
    )
    run.add_argument("--batch", type=int, help="images of a call, in place of the workload's")
    grow = commands.add_parser(
        "scaling",
        help="measure how cost grows",
        description="Measure how the cost of a train step grows, and the slope on log axes.",
    )
    grow.set_defaults(command=scaling_command)
    add_choices(grow, seconds=0.5, ceiling_seconds=0.0, out=Path("reports/bench-scaling.json"))
    grow.add_argument("--workload", default="S", metavar="NAME", help="what grows (default: S)")
    grow.add_argument(
        "--axis",
        action="append",
        default=[],
        metavar="AXIS[=N,N,...]",
        help=f"one of {', '.join(scaling.AXES)}, and its values; repeat for more (default: all)",
    )
    differ = commands.add_parser("compare", help="say what changed between two files of results")
    differ.add_argument("first", type=Path)
    differ.add_argument("second", type=Path)
    differ.set_defaults(command=compare_command)
    show = commands.add_parser("show", help="print the tables of a file of results")
    show.add_argument("file", type=Path)
    show.add_argument("--charts", type=Path, metavar="FOLDER", help="draw them too, as SVG")
    show.set_defaults(command=show_command)
    return top


def add_choices(
    command: argparse.ArgumentParser, seconds: float, ceiling_seconds: float, out: Path
) -> None:
    """The options that every measuring command has."""

    def repeated(option: str, **more: Any) -> None:
        command.add_argument(option, action="append", default=[], **more)

    repeated(
        "--impl",
        metavar="MODULE[=PYTHON]",
        help="a backend and its interpreter; repeat for more (default: all that stand here)",
    )
    repeated(
        "--mode",
        metavar="NAME",
        help="a mode, or all; repeat for more (default: the usual ones of each backend)",
    )
    repeated("--dtype", choices=tuple(ARRAY_DTYPES), help="repeat for more (default: float32)")
    command.add_argument("--peers", action="store_true", help="all other libraries that are known")
    repeated(
        "--peer",
        metavar="NAME[=PYTHON]",
        help=f"one other library: {', '.join(map(short, PEERS))}, or a module; repeat for more",
    )
    command.add_argument("--device", default="cpu", choices=DEVICES)
    command.add_argument("--threads", type=int, help="of every backend (default: all cores)")
    command.add_argument(
        "--at-once",
        type=int,
        default=1,
        metavar="N",
        help="start and check so many processes at a time, which saves minutes on many cores; what "
        "is paid once is then not told (default: 1)",
    )
    command.add_argument("--rounds", type=int, default=5, help="at least 5 (default: 5)")
    command.add_argument(
        "--seconds",
        type=float,
        default=seconds,
        help=f"of samples in a round (default: {seconds:g})",
    )
    command.add_argument(
        "--thorough", action="store_true", help=f"{PROCESSES} fresh processes of each"
    )
    command.add_argument(
        "--ceiling-seconds",
        type=float,
        default=ceiling_seconds,
        help=f"for the ceiling of each library; 0 leaves it out (default: {ceiling_seconds:g})",
    )
    command.add_argument("--seed", type=int, default=0, help="of the order of turns (default: 0)")
    command.add_argument(
        "--timeout", type=float, default=900.0, help="seconds for one call (default: 900)"
    )
    command.add_argument("--charts", type=Path, metavar="FOLDER", help="draw them too, as SVG")
    command.add_argument("--out", type=Path, default=out, help=f"the results (default: {out})")


def chosen_impls(chosen: argparse.Namespace) -> list[Impl]:
    """The backends that were asked for. Raises UsageError for one given twice."""
    texts = chosen.impl or [f"{name}={interpreter(name, chosen.device)}" for name in shipped()]
    impls: dict[str, Impl] = {}
    for text in texts:
        impl = parse_impl(text, sys.executable)
        if impl.name in impls:
            raise UsageError(f"--impl {impl.name} is given twice; give each backend once")
        impls[impl.name] = impl
    return list(impls.values())


def chosen_peers(chosen: argparse.Namespace) -> list[Impl]:
    """The other libraries that were asked for. Raises UsageError for one given twice."""
    known = {short(module): module for module in PEERS}
    texts = list(chosen.peer) + ([*known] if chosen.peers else [])
    peers: dict[str, Impl] = {}
    for number, text in enumerate(texts):
        name, equals, _ = text.partition("=")
        module = known.get(name, name)
        python = interpreter(PEERS.get(module, module), chosen.device)
        impl = parse_impl(f"{module}{text[len(name) :]}" if equals else module, python)
        if impl.name in peers and number < len(chosen.peer):
            raise UsageError(f"--peer {name} is given twice; give each once")
        peers.setdefault(impl.name, impl)
    return list(peers.values())


def chosen_plan(
    chosen: argparse.Namespace, found: list[workloads.Workload], processes: int
) -> Plan:
    """The plan of a command line. Raises UsageError for a number outside its bounds."""
    if not LEAST_ROUNDS <= chosen.rounds <= MOST_ROUNDS:
        raise UsageError(
            f"--rounds {chosen.rounds} is outside {LEAST_ROUNDS}..{MOST_ROUNDS}: fewer say nothing "
            "of the noise; choose a number inside"
        )
    if not 0 < chosen.seconds <= 3600:
        raise UsageError(f"--seconds {chosen.seconds:g} is outside (0, 3600]; choose one inside")
    if not 0 < chosen.timeout <= 86400:
        raise UsageError(f"--timeout {chosen.timeout:g} is outside (0, 86400]; choose one inside")
    if not 0 <= chosen.ceiling_seconds <= 3600:
        raise UsageError(
            f"--ceiling-seconds {chosen.ceiling_seconds:g} is outside [0, 3600]; choose one inside"
        )
    if not 1 <= chosen.at_once <= MOST_AT_ONCE:
        raise UsageError(
            f"--at-once {chosen.at_once} is outside 1..{MOST_AT_ONCE}; choose one inside"
        )
    if chosen.seed < 0:
        raise UsageError(f"--seed {chosen.seed} is negative; give 0 or more")
    return Plan(
        workloads=found,
        device=chosen.device,
        threads=check_threads(chosen.threads),
        rounds=chosen.rounds,
        seconds=chosen.seconds,
        processes=processes,
        seed=chosen.seed,
        timeout=chosen.timeout,
        at_once=chosen.at_once,
    )


def check_out(path: Path) -> None:
    """Raise UsageError where no file of this name can be written."""
    there = next(
        place for place in (path.absolute().parent, *path.absolute().parents) if place.exists()
    )
    if path.is_dir() or not there.is_dir() or not os.access(there, os.W_OK):
        raise UsageError(f"--out {path} cannot be written; name a file in a folder of yours")


def run_command(chosen: argparse.Namespace) -> int:
    """Measure workloads; gives the exit code: 1 where a figure is missing that was asked for."""
    names = chosen.workload or workloads.default_keys(chosen.device)
    found = list(dict.fromkeys(workloads.find(name, chosen.batch) for name in names))
    return measured(chosen, found, "bench", lambda values, runs: None)


def scaling_command(chosen: argparse.Namespace) -> int:
    """Measure how cost grows; gives the exit code, as above."""
    base = workloads.find(chosen.workload)
    if base.kind != "train":
        raise UsageError(f"--workload {base.key} is no train step; choose S, M, L or a config")
    points = scaling.points(base, chosen_axes(chosen.axis))

    def add_lines(values: dict[str, Any], runs: Sequence[Run]) -> None:
        values["scaling"] = scaling.entries(points, runs)

    return measured(chosen, [point.workload for point in points], "scaling", add_lines)


def chosen_axes(texts: Sequence[str]) -> dict[str, Sequence[int]]:
    """The axes of `--axis`, each with its values. Raises UsageError for what is no number."""
    axes: dict[str, Sequence[int]] = {}
    for text in texts:
        name, equals, values = text.partition("=")
        try:
            axes[name] = (
                [int(v) for v in values.split(",")] if equals else scaling.AXES.get(name, ())
            )
        except ValueError as error:
            raise UsageError(f"--axis {text!r}: give whole numbers, as in batch=1,2,4") from error
    return axes or dict(scaling.AXES)


def measured(
    chosen: argparse.Namespace,
    found: list[workloads.Workload],
    kind: str,
    add: Callable[[dict[str, Any], Sequence[Run]], None],
) -> int:
    """Measure, write and show; `add` puts more into the results. Gives the exit code."""
    plan = chosen_plan(chosen, found, PROCESSES if chosen.thorough else 1)
    check_out(chosen.out)
    impls, peers, dtypes = chosen_impls(chosen), chosen_peers(chosen), chosen.dtype or ["float32"]
    values = results.empty(plan, dtypes, machine.describe(plan.threads), kind)
    values["work"] = [work_entry(workload) for workload in found]
    problems: list[str] = []

    def write(bench: Bench, more: Sequence[Run] = ()) -> None:
        values["machine"]["after"] = machine.clocks()
        results.fill(values, bench, more)
        shares.fill(values, found)
        values["goals"] = table.goals(values)
        add(values, bench.runs)
        results.write(chosen.out, values)

    with table.progress() as seen:
        contenders, lacking = find_contenders(impls, peers, chosen.mode, dtypes, plan, seen)
        refuse_lacking(chosen, contenders, lacking)
        values["machine"]["before"] = machine.clocks()
        if chosen.ceiling_seconds:
            values["ceilings"], problems = shares.measure(
                contenders, plan, chosen.ceiling_seconds, seen
            )
        sizes = {entry["workload"]: entry["flops"] for entry in values["work"]}
        bench = Bench(plan, contenders, sizes, seen, write)
        bench.run()
    write(bench, [Run(w, c, "cannot start", why) for w in found for c, why in lacking])
    table.show(values)
    for problem in problems:
        print(problem)
    print(f"results: {chosen.out}")
    draw(values, chosen.charts)
    failed = [entry for entry in values["runs"] if entry["status"] not in allowed(chosen, entry)]
    return 0 if bench.complete and not failed and not problems else 1


def allowed(chosen: argparse.Namespace, entry: dict[str, Any]) -> tuple[str, ...]:
    """What may become of a run: of those not asked for by name, that they are not there."""
    if entry["peer"]:
        named = entry["backend"] in peers_by_name(chosen)
        return ("ok", "not implemented") if named else ("ok", "not implemented", "cannot start")
    return ("ok",) if chosen.impl else ("ok", "cannot start")


def peers_by_name(chosen: argparse.Namespace) -> set[str]:
    """The modules of the peers that --peer named, which --peers alone does not."""
    named = argparse.Namespace(**{**vars(chosen), "peers": False})
    return {impl.name for impl in chosen_peers(named)}


def refuse_lacking(
    chosen: argparse.Namespace, contenders: list[Contender], lacking: list[tuple[Contender, str]]
) -> None:
    """Raise CannotStart where nothing can be timed, or what was named cannot be."""
    by_name = peers_by_name(chosen)
    peers = [why for contender, why in lacking if contender.peer]
    named = [
        why
        for contender, why in lacking
        if (contender.impl.name in by_name if contender.peer else chosen.impl)
    ]
    if chosen.peers and not any(contender.peer for contender in contenders):
        named = [*dict.fromkeys([*named, *peers])]  # none of what was asked for
    if any(why in named for why in peers):
        named.append("`nox -s bench -- --peers` makes the environments of the other libraries")
    if named or not contenders:
        raise CannotStart("\n".join(named or [why for _, why in lacking]), usage=True)


def work_entry(workload: workloads.Workload) -> dict[str, Any]:
    """What one call of a workload is."""
    work = shares.work_of(workload)
    return {
        "workload": workload.key,
        "text": workload.text,
        "batch": workload.batch,
        "parameters": work.parameters,
        "flops": work.flops,
        "bytes": work.bytes,
    }


def compare_command(chosen: argparse.Namespace) -> int:
    """Print what changed from one file of results to another."""
    compare.show(results.read(chosen.first), results.read(chosen.second))
    return 0


def show_command(chosen: argparse.Namespace) -> int:
    """Print the tables of a file of results."""
    values = results.read(chosen.file)
    table.show(values)
    draw(values, chosen.charts)
    return 0


def draw(values: dict[str, Any], folder: Path | None) -> None:
    """Draw the charts where they are asked for. Raises ChartError without matplotlib."""
    if folder is not None:
        paths = charts.draw(values, folder)
        print(f"charts: {', '.join(map(str, paths)) or 'none, for want of figures'}")
