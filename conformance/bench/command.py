"""The command line: `python -m conformance.bench run`, `show`, `compare`, `scaling`.

By argparse and not typer: on a machine that has a GPU, the frameworks are often all that is there.
"""

import argparse
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from conformance.bench import compare, machine, results, shares, table, workloads
from conformance.bench.rounds import PROCESSES, Bench, Contender, Plan, Run, find_contenders, short
from conformance.process import CannotStart, Impl, interpreter, shipped
from conformance.runner import UsageError, check_threads, parse_impl
from spec.backend import ARRAY_DTYPES
from spec.config import ConfigError

DEVICES = ("cpu", "cuda")
# Other libraries, and the environment of each, which nox makes only where they are asked for.
PEERS = {
    "conformance.bench.peers.diffusers": "peers-torch",
    "conformance.bench.peers.lucidrains": "peers-torch",
    "conformance.bench.peers.keras": "peers-tf",
    "conformance.bench.peers.nnx": "peers-jax",
}
LEAST_ROUNDS, MOST_ROUNDS = 5, 1000


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Carry out a command line, and end with its exit code: 2 where it asks for the impossible."""
    # End by an exception, so that workers and temporary files go too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    chosen = parser().parse_args(arguments)
    try:
        code = chosen.command(chosen)
    except (UsageError, ConfigError, results.ResultsError) as error:
        print(f"error: {error}", file=sys.stderr)
        code = 2
    except CannotStart as error:
        print(f"error: {error}", file=sys.stderr)
        code = 2 if error.usage else 1
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
    add_choices(run)
    run.add_argument(
        "--workload",
        action="append",
        default=[],
        metavar="NAME",
        help=f"{', '.join(workloads.shipped())}, or a config; repeat for more "
        "(default: S, M and sample-digits; with --device cuda L and sample-L)",
    )
    run.add_argument("--batch", type=int, help="images of a call, in place of the workload's")
    run.add_argument("--thorough", action="store_true", help=f"{PROCESSES} fresh processes of each")
    run.add_argument("--out", type=Path, default=Path("reports/bench.json"), help="the results")
    run.add_argument("--peers", action="store_true", help="other libraries too, all that are known")
    run.add_argument(
        "--peer",
        action="append",
        default=[],
        metavar="NAME[=PYTHON]",
        help=f"one other library: {', '.join(map(short, PEERS))}, or a module; repeat for more",
    )
    run.add_argument(
        "--ceiling-seconds",
        type=float,
        default=20.0,
        help="for the ceiling of each library; 0 leaves it out (default: 20)",
    )
    differ = commands.add_parser("compare", help="say what changed between two files of results")
    differ.add_argument("first", type=Path)
    differ.add_argument("second", type=Path)
    differ.set_defaults(command=compare_command)
    show = commands.add_parser("show", help="print the tables of a file of results")
    show.add_argument("file", type=Path)
    show.set_defaults(command=show_command)
    return top


def add_choices(command: argparse.ArgumentParser) -> None:
    """The options that every measuring command has."""
    command.add_argument(
        "--impl",
        action="append",
        default=[],
        metavar="MODULE[=PYTHON]",
        help="a backend and its interpreter; repeat for more (default: all that stand here)",
    )
    command.add_argument(
        "--mode",
        action="append",
        default=[],
        metavar="NAME",
        help="a mode, or all; repeat for more (default: the usual one of each backend)",
    )
    command.add_argument(
        "--dtype",
        action="append",
        default=[],
        choices=tuple(ARRAY_DTYPES),
        help="repeat for more (default: float32)",
    )
    command.add_argument("--device", default="cpu", choices=DEVICES)
    command.add_argument("--threads", type=int, help="of every backend (default: all cores)")
    command.add_argument("--rounds", type=int, default=5, help="at least 5 (default: 5)")
    command.add_argument(
        "--seconds", type=float, default=2.0, help="of samples in a round (default: 2)"
    )
    command.add_argument("--seed", type=int, default=0, help="of the order of turns (default: 0)")
    command.add_argument(
        "--timeout", type=float, default=900.0, help="seconds for one call (default: 900)"
    )


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
    for text in texts:
        name, equals, _ = text.partition("=")
        module = known.get(name, name)
        python = interpreter(PEERS.get(module, module), chosen.device)
        impl = parse_impl(f"{module}{text[len(name) :]}" if equals else module, python)
        if impl.name in peers and text in chosen.peer:
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
    )


def check_out(path: Path) -> None:
    """Raise UsageError where no file of this name can be written."""
    there = next(
        place for place in (path.absolute().parent, *path.absolute().parents) if place.exists()
    )
    if path.is_dir() or not there.is_dir() or not os.access(there, os.W_OK):
        raise UsageError(f"--out {path} cannot be written; name a file in a folder of yours")


def run_command(chosen: argparse.Namespace) -> int:
    """Measure; gives the exit code: 1 where a figure is missing that was asked for."""
    names = chosen.workload or workloads.default_keys(chosen.device)
    found = list(dict.fromkeys(workloads.find(name, chosen.batch) for name in names))
    plan = chosen_plan(chosen, found, PROCESSES if chosen.thorough else 1)
    check_out(chosen.out)
    impls, peers, dtypes = chosen_impls(chosen), chosen_peers(chosen), chosen.dtype or ["float32"]
    here = machine.describe(plan.threads)
    values = results.empty(plan, dtypes, here)
    values["work"] = [work_entry(workload) for workload in found]
    problems: list[str] = []
    with table.progress() as seen:
        contenders, lacking = find_contenders(impls, peers, chosen.mode, dtypes, plan, seen)
        refuse_lacking(chosen, contenders, lacking)
        here["before"] = machine.clocks()
        if chosen.ceiling_seconds:
            measured = shares.measure(contenders, plan, chosen.ceiling_seconds, seen)
            values["ceilings"], problems = measured
        sizes = {entry["workload"]: entry["flops"] for entry in values["work"]}
        bench = Bench(plan, contenders, sizes, seen)
        bench.run()
    here["after"] = machine.clocks()
    for workload in found:
        for contender, why in lacking:
            bench.runs.append(Run(workload, contender, "cannot start", why))
    results.fill(values, bench)
    shares.fill(values, found)
    values["goals"] = table.goals(values)
    results.write(chosen.out, values)
    table.show(values)
    for problem in problems:
        print(problem)
    print(f"results: {chosen.out}")
    failed = [entry for entry in values["runs"] if entry["status"] not in allowed(chosen, entry)]
    return 0 if bench.complete and not failed and not problems else 1


def allowed(chosen: argparse.Namespace, entry: dict[str, Any]) -> tuple[str, ...]:
    """What may become of a run: of those not asked for by name, that they are not there."""
    if entry["peer"]:
        return ("ok", "not implemented")
    return ("ok",) if chosen.impl else ("ok", "cannot start")


def refuse_lacking(
    chosen: argparse.Namespace, contenders: list[Contender], lacking: list[tuple[Contender, str]]
) -> None:
    """Raise CannotStart where nothing can be timed, or what was named cannot be."""
    named = [why for contender, why in lacking if chosen.impl or contender.peer]
    if any(contender.peer for contender, _ in lacking):
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
    table.show(results.read(chosen.file))
    return 0
