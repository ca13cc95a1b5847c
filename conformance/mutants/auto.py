"""Mutates every operator, comparison, condition, number and index of the design files, one a time.

Where `engine` holds faults that somebody thought of, this holds those that nobody chose. A mutant
that no case notices is either equivalent, and stands in equivalent.toml with its reason, or shows
what the goldens do not check.
"""

import ast
import dataclasses
import functools
import json
import math
import multiprocessing
import signal
import sys
import time
import tomllib
import warnings
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from conformance.mutants.engine import HERE, MutantError, copied, golden_cases
from conformance.mutants.fit import problem_of_fit
from conformance.process import ROOT
from conformance.runner import check
from spec.backend import REQUIRED_DTYPES
from spec.goldens import Case, Goldens

IMPLS = ("numpy", "torch")  # a run in the others costs a compilation for each mutant
FILES = ("schedule.py", "diffusion.py", "unet.py", "train.py")
EQUIVALENT = "equivalent.toml"
ALL = "all"
HANGS = "time limit"
OPERATORS: dict[type, tuple[str, str]] = {
    ast.Add: ("+", "-"),
    ast.Sub: ("-", "+"),
    ast.Mult: ("*", "/"),
    ast.Div: ("/", "*"),
    ast.FloorDiv: ("//", "*"),
    ast.Pow: ("**", "*"),
}
COMPARISONS: dict[type, tuple[str, tuple[str, ...]]] = {
    ast.Lt: ("<", ("<=", ">=")),
    ast.LtE: ("<=", ("<", ">")),
    ast.Gt: (">", (">=", "<=")),
    ast.GtE: (">=", (">", "<")),
    ast.Eq: ("==", ("!=",)),
    ast.NotEq: ("!=", ("==",)),
    ast.Is: ("is", ("is not",)),
    ast.IsNot: ("is not", ("is",)),
    ast.In: ("in", ("not in",)),
    ast.NotIn: ("not in", ("in",)),
}
LEAST_SECONDS = 20  # of a core's time, before a mutant counts as one that hangs
SLOWER = 4  # times as much of a core's time as without a fault may pass
WAITING = 20  # times its limit a mutant may take on the clock: other work may hold the cores


@dataclasses.dataclass(frozen=True)
class AutoMutant:
    """One place of one file, replaced."""

    impl: str
    file: str
    function: str  # its qualified name; "" outside of functions
    line: int
    kind: str  # operator, comparison, condition, number, index
    old: str  # the line as it is, without what surrounds it
    new: str
    source: str  # of the whole file, mutated

    @property
    def name(self) -> str:
        return f"impl_{self.impl}/{self.file}:{self.line} {self.function}: {self.old} -> {self.new}"


@dataclasses.dataclass(frozen=True)
class AutoVerdict:
    """What came of a mutant: killed by a case or the check of fit, or not."""

    mutant: AutoMutant
    by: str | None  # a case's id and dtype, "fit", "import", "time limit"; None: it survived
    reason: str | None = None  # of one that survived: why it is equivalent


@dataclasses.dataclass(frozen=True)
class Equivalent:
    """A mutant that computes the same, and why."""

    impls: tuple[str, ...]
    file: str
    function: str
    old: str
    new: str
    reason: str

    def covers(self, mutant: AutoMutant) -> bool:
        same = (self.file, self.function, self.old, self.new)
        found = (mutant.file, mutant.function, mutant.old, mutant.new)
        return mutant.impl in self.impls and same == found


def mutants_of(impl: str, root: Path = ROOT) -> list[AutoMutant]:
    """Every mutant of the design files of impl_<impl>, in the order of the text."""
    found = []
    for file in FILES:
        source = (root / f"impl_{impl}" / file).read_text(encoding="utf-8")
        found += list(mutations(source, impl, file))
    return found


def mutations(source: str, impl: str = "", file: str = "") -> Iterator[AutoMutant]:
    """Every mutant of one source, which must be valid Python."""
    data = source.encode()
    starts = [0]
    for line in data.splitlines(keepends=True):
        starts.append(starts[-1] + len(line))

    def begin(node: Any) -> int:
        return starts[node.lineno - 1] + node.col_offset

    def end(node: Any) -> int:
        return starts[node.end_lineno - 1] + node.end_col_offset

    def made(function: str, kind: str, node: Any, first: int, last: int, text: str) -> AutoMutant:
        mutated = data[:first] + text.encode() + data[last:]
        ast.parse(mutated)  # a mutant that is no Python would be killed by nothing of ours
        number = data[:first].count(b"\n")
        before, after = (d.decode().splitlines()[number].strip() for d in (data, mutated))
        return AutoMutant(impl, file, function, number + 1, kind, before, after, mutated.decode())

    def operator(function: str, kind: str, left: Any, right: Any, word: str, new: str):
        first = data.index(word.encode(), end(left), begin(right))
        return made(function, kind, left, first, first + len(word), new)

    def walk(node: ast.AST, function: str) -> Iterator[AutoMutant]:
        if isinstance(node, ast.JoinedStr):
            return  # a name put together; its parts have no places of their own
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            function = f"{function}.{node.name}".lstrip(".")
        if isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
            word, new = OPERATORS[type(node.op)]
            yield operator(function, "operator", node.left, node.right, word, new)
        if isinstance(node, ast.AugAssign) and type(node.op) in OPERATORS:
            word, new = OPERATORS[type(node.op)]
            yield operator(function, "operator", node.target, node.value, word, new)
        if isinstance(node, ast.Compare):
            lefts = [node.left, *node.comparators]
            for left, right, op in zip(lefts, node.comparators, node.ops, strict=False):
                word, others = COMPARISONS[type(op)]
                for new in others:
                    yield operator(function, "comparison", left, right, word, new)
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.USub, ast.Not)):
            kind = "operator" if isinstance(node.op, ast.USub) else "condition"
            yield made(function, kind, node, begin(node), begin(node.operand), "")
        elif isinstance(node, (ast.If, ast.IfExp)) and not isinstance(node.test, ast.Compare):
            test = node.test
            if not isinstance(test, ast.UnaryOp):
                text = f"not ({data[begin(test) : end(test)].decode()})"
                yield made(function, "condition", test, begin(test), end(test), text)
        if isinstance(node, ast.Constant) and isinstance(node.value, (bool, int, float)):
            value = node.value
            if isinstance(value, bool):
                news = [str(not value)]
            else:
                news = [repr(value + 1)] + ([repr(value * 2)] if value not in (0, 1) else [])
            for text in news:
                yield made(function, "number", node, begin(node), end(node), text)
        if isinstance(node, ast.Subscript) and _is_index(node.slice):
            index = node.slice
            text = f"{data[begin(index) : end(index)].decode()} + 1"
            yield made(function, "index", index, begin(index), end(index), text)
        for child in ast.iter_child_nodes(node):
            yield from walk(child, function)

    yield from walk(ast.parse(source), "")


def _is_index(node: ast.expr) -> bool:
    """Whether one may be added: neither a slice, nor a tuple, nor a name in quotes."""
    return isinstance(node, (ast.Name, ast.Attribute, ast.BinOp, ast.Call, ast.UnaryOp))


def load_equivalents(path: Path = HERE / EQUIVALENT) -> list[Equivalent]:
    """The mutants that are known to compute the same. Raises MutantError for a wrong entry."""
    try:
        entries = tomllib.loads(path.read_text(encoding="utf-8")).get("equivalent", [])
        return [Equivalent(**{**entry, "impls": tuple(entry["impls"])}) for entry in entries]
    except (tomllib.TOMLDecodeError, TypeError, KeyError) as error:
        raise MutantError(
            f"{path.name}: {error}; every [[equivalent]] needs impls, file, function, old, new and "
            "reason, and nothing else"
        ) from error


def stale(equivalents: Sequence[Equivalent], mutants: Sequence[AutoMutant]) -> list[str]:
    """What equivalent.toml names and the implementations no longer hold."""
    return [
        f"impl_{impl}/{known.file} {known.function}: {known.old} -> {known.new}"
        for known in equivalents
        for impl in known.impls
        if impl in {m.impl for m in mutants}
        and not any(known.covers(m) for m in mutants if m.impl == impl)
    ]


def ordered(goldens: Goldens, seconds: dict[str, float]) -> list[tuple[str, Case]]:
    """dtype and case of all that may notice a mutant, the cheapest first; float32 last."""
    every = [(dtype, case) for dtype in REQUIRED_DTYPES for case in golden_cases(goldens, dtype)]
    return sorted(
        every,
        key=lambda one: (one[0] != "float64", seconds.get(f"{one[1].id} {one[0]}", 0.0)),
    )


def first_kill(impl: str, goldens: Goldens, mutant: AutoMutant, order: Any) -> str | None:
    """Id and dtype of the first case of this order that the mutant fails, or what else ended it."""
    sources = {mutant.file: mutant.source}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            with copied(impl, sources=sources) as module:
                for dtype in REQUIRED_DTYPES:
                    cases = [case for column, case in order if column == dtype]
                    for result in check(module, [dtype], cases, goldens=goldens, mode="eager"):
                        if not result.ok:
                            return f"{result.case.id} {dtype}"
                return "fit" if problem_of_fit(module) else None
        except MutantError:
            raise
        except Exception as error:  # at its import, or where fit raises
            return f"{type(error).__name__} outside of a case"


def case_seconds(impl: str, goldens: Goldens) -> dict[str, float]:
    """Seconds of every case without a fault, and of a core's time in all, under ALL.

    Raises MutantError where one does not pass.
    """
    seconds = {}
    with copied(impl) as module:
        for dtype in REQUIRED_DTYPES:
            cases = golden_cases(goldens, dtype)
            for result in check(module, [dtype], cases, goldens=goldens, mode="eager"):
                if not result.ok:
                    raise MutantError(
                        f"impl_{impl} without any fault fails {result.case.id} in {dtype}; correct "
                        "it first, as a kill shows nothing otherwise"
                    )
                seconds[f"{result.case.id} {dtype}"] = result.seconds
        if told := problem_of_fit(module):
            raise MutantError(f"impl_{impl} without any fault fails the check of fit: {told}")
    return {**seconds, ALL: time.process_time()}


def _child(send: Connection, work: Callable[[], Any], limit: int | None) -> None:
    try:
        if limit:
            import resource  # where there is fork, there is this

            resource.setrlimit(resource.RLIMIT_CPU, (limit, limit + 1))
        if "torch" in sys.modules:
            sys.modules["torch"].set_num_threads(1)  # the networks are tiny
        send.send_bytes(json.dumps({"done": work()}).encode())
    except BaseException as error:
        send.send_bytes(json.dumps({"error": f"{type(error).__name__}: {error}"}).encode())


def forked(work: Callable[[], Any], limit: int | None = None) -> Any:
    """What `work` gives in a child of this process, whose memory it shares.

    So every mutant meets freshly imported modules, and one that hangs or dies takes nothing along:
    the word for that is given then. limit is in seconds of a core's time.
    """
    if "fork" not in multiprocessing.get_all_start_methods():
        raise MutantError("mutants made automatically need fork: run this on Linux or macOS")
    context = multiprocessing.get_context("fork")
    receive, send = context.Pipe(duplex=False)
    child = context.Process(target=_child, args=(send, work, limit), daemon=True)
    child.start()
    send.close()
    try:
        if not receive.poll(limit and WAITING * limit):
            return HANGS
        reply = json.loads(receive.recv_bytes())
    except EOFError:
        child.join()
        return HANGS if child.exitcode == -signal.SIGXCPU else "the process died"
    finally:
        child.kill()
        child.join()
        receive.close()
    if "error" in reply:
        raise MutantError(reply["error"])
    return reply["done"]


def preload(impl: str, goldens: Goldens) -> None:
    """Import the framework and read the goldens, so that no child does so again."""
    with copied(impl):
        pass
    for dtype in REQUIRED_DTYPES:
        for case in golden_cases(goldens, dtype):
            for output in case.outputs:
                goldens.expected(case, output)


def run_auto(
    impl: str, goldens: Goldens, part: tuple[int, int] = (0, 1), every: int = 1
) -> Iterator[AutoVerdict]:
    """The verdict on every mutant of an implementation, one by one.

    part (i, n) is the i-th of n parts of them, and every = 10 takes each tenth alone.
    """
    mutants = mutants_of(impl)
    equivalents = load_equivalents()
    if gone := stale(equivalents, mutants):
        raise MutantError(
            f"{EQUIVALENT} names what is no longer there: {'; '.join(gone)}; bring it up to date"
        )
    preload(impl, goldens)
    seconds = forked(lambda: case_seconds(impl, goldens))
    limit = max(LEAST_SECONDS, math.ceil(SLOWER * seconds.pop(ALL)))
    order = ordered(goldens, seconds)
    for mutant in mutants[::every][part[0] :: part[1]]:
        by = forked(functools.partial(first_kill, impl, goldens, mutant, order), limit)
        known = next((e.reason for e in equivalents if e.covers(mutant)), None)
        yield AutoVerdict(mutant, by, known if by is None else None)
