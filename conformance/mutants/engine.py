"""Copies an implementation, puts one fault into the copy, and runs the golden cases on it."""

import contextlib
import dataclasses
import fnmatch
import importlib
import math
import shutil
import sys
import tempfile
import tomllib
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from conformance.mutants.fit import problem_of_fit
from conformance.process import ROOT
from conformance.runner import Result, check, finish, in_column
from spec.goldens import Case, Goldens

HERE = Path(__file__).resolve().parent
IMPLS = tuple(sorted(p.stem for p in HERE.glob("*.toml") if (ROOT / f"impl_{p.stem}").is_dir()))
CONFIGS = "tiny"  # the names of the configs that mutants run on start so: larger ones take long
STATUSES = ("failed", "fault", "error")
# A model takes TensorFlow and JAX seconds to open. There, cases that run nothing of a clause are
# left out for its faults.
SLOW = ("jax", "tf")
CASES = {
    "S1": ("L0/*",),
    "S2": ("L1/*",),
    "S3": ("L1/*",),
    "S4": ("L1/*", "L6/*/ddpm*"),
    "S5": ("L1/*", "L6/*/ddim*"),
    "S6": ("L1/*/guide*", "L4/*_dropped", "L6/*_guided*"),
    "S7": ("L2/*", "L3/*"),
    "S8": ("L3/tiny/*", "L4/*"),
    "S9": ("L5/*",),
    "S13": ("L6/*/dpmpp*",),
}
FIT = "S10"  # the clause of faults in what `fit` draws: no golden case calls it, a check does


class MutantError(ValueError):
    """A mutant that cannot be made: the implementation has changed, or the entry is wrong."""


@dataclasses.dataclass(frozen=True)
class Mutant:
    """One fault: a text of one file replaced by another, and where the suite must notice it."""

    name: str
    impl: str  # the folder impl_<impl>
    file: str  # of that folder
    old: str  # occurs exactly once in the file
    new: str
    clause: str  # of the first case that must fail
    fault: str  # what is wrong, in a sentence
    dtype: str = "float64"  # the column that must catch it
    cause: str = ""  # words that the diagnosis must hold: in a likely cause, a clue, the message
    block: str | None = None  # the block that the diagnosis must name
    status: str = "failed"  # of the first case: "fault" breaks the protocol, "error" raises
    mode: str = "eager"  # compiled: the fault shows only in what is compiled as a whole
    cases: tuple[str, ...] = ()  # globs: run these alone, not all that `cases_for` gives
    pending: str | None = None  # what the goldens lack to catch it; the suite cannot yet


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What the golden cases said of a mutant, or the check of `fit` for one of clause S10."""

    mutant: Mutant
    dtype: str
    result: Result | None = None  # of the first case that failed, in the order of the levels
    block: str | None = None  # the first block that the failures of that level name
    told: str | None = None  # by the check of `fit`

    @property
    def killed(self) -> bool:
        return self.result is not None or self.told is not None

    @property
    def case(self) -> str:
        """Id of the first case that failed; "fit" for its check."""
        return self.result.case.id if self.result else "fit" if self.told else ""

    @property
    def clause(self) -> str:
        """The clause of that case: where the diagnosis sends the author."""
        return self.result.case.clause if self.result else FIT if self.told else ""

    @property
    def margin(self) -> float:
        """error / tolerance there; infinite for NaN, wrong shapes or dtypes, exceptions, `fit`."""
        if self.result is None:
            return math.inf if self.told else 0.0
        if self.result.status != "failed" or self.result.ratio is None:
            return math.inf
        return self.result.ratio

    @property
    def cause_named(self) -> bool | None:
        """Whether what is printed of that case names the right cause; None: the mutant has none."""
        if not self.mutant.cause:
            return None
        texts = [self.told or ""]
        if self.result is not None:
            texts = [self.result.message, *self.result.clues, *self.result.causes]
        return any(self.mutant.cause.lower() in text.lower() for text in texts)

    @property
    def problem(self) -> str | None:
        """Why this is not the verdict that the mutant asks for; None where it is."""
        if self.told:
            return None
        if self.result is None:
            what = "the check of fit" if self.mutant.clause == FIT else "every case"
            return f"survived: {what} passed"
        if self.clause != self.mutant.clause:
            return f"caught at {self.clause} by {self.case}; expected {self.mutant.clause}"
        if self.result.status != self.mutant.status:
            return (
                f"{self.case} ended with {self.result.status!r} ({self.result.message}); "
                f"expected {self.mutant.status!r}"
            )
        if self.mutant.block and self.block != self.mutant.block:
            return f"the diagnosis names block {self.block}; expected {self.mutant.block}"
        return None


def load_mutants(impl: str) -> list[Mutant]:
    """The mutants of <impl>.toml, in its order. Raises MutantError that names a wrong entry."""
    path = HERE / f"{impl}.toml"
    if impl not in IMPLS:
        raise MutantError(f"no mutants for {impl!r}; there are some for {', '.join(IMPLS)}")
    try:
        entries = tomllib.loads(path.read_text(encoding="utf-8"))
    except tomllib.TOMLDecodeError as error:
        raise MutantError(f"{path.name} is not TOML: {error}") from error
    return [_mutant(impl, name, entry) for name, entry in entries.items()]


def _mutant(impl: str, name: str, entry: dict[str, Any]) -> Mutant:
    fields = {field.name: field for field in dataclasses.fields(Mutant)}
    unknown = sorted(set(entry) - set(fields) | set(entry) & {"name", "impl"})
    needed = [n for n, field in fields.items() if field.default is dataclasses.MISSING]
    missing = [key for key in needed if key not in entry and key not in ("name", "impl")]
    if unknown or missing:
        raise MutantError(
            f"mutant {name} of {impl}.toml: unknown keys {', '.join(unknown) or 'none'}; "
            f"missing keys {', '.join(missing) or 'none'}"
        )
    mutant = Mutant(name=name, impl=impl, **{**entry, "cases": tuple(entry.get("cases", ()))})
    if mutant.status not in STATUSES:
        raise MutantError(
            f"mutant {name} of {impl}.toml: status {mutant.status!r} is unknown; "
            f"choose one of {', '.join(STATUSES)}"
        )
    return mutant


def mutated(source: str, mutant: Mutant) -> str:
    """The source with the fault in it. Raises MutantError unless `old` occurs exactly once."""
    where = f"mutant {mutant.name} of {mutant.impl}.toml"
    count = source.count(mutant.old)
    if count != 1:
        raise MutantError(
            f"{where}: its text stands {count} times in impl_{mutant.impl}/{mutant.file}, expected "
            f"once; the implementation has changed, so bring the mutant up to date:\n{mutant.old}"
        )
    if mutant.new == mutant.old:
        raise MutantError(f"{where}: old and new are the same; change one of them")
    return source.replace(mutant.old, mutant.new)


@contextlib.contextmanager
def copied(
    impl: str, mutant: Mutant | None = None, sources: Mapping[str, str] | None = None
) -> Iterator[ModuleType]:
    """A copy of impl_<impl> with the mutant's fault in it, imported in place of the real one.

    sources: whole files, written in place of those of these names. Afterwards the copy is gone, and
    what was imported under that name before is back.
    """
    package = f"impl_{impl}"
    with tempfile.TemporaryDirectory(prefix="mutant-") as temporary:
        folder = Path(temporary) / package
        shutil.copytree(ROOT / package, folder, ignore=shutil.ignore_patterns("__pycache__"))
        if mutant is not None:
            path = folder / mutant.file
            if not path.is_file():
                raise MutantError(
                    f"mutant {mutant.name} of {impl}.toml: {package}/{mutant.file} is not there"
                )
            source = mutated(path.read_text(encoding="utf-8"), mutant)
            path.write_text(source, encoding="utf-8")
        for file, source in (sources or {}).items():
            (folder / file).write_text(source, encoding="utf-8")
        before, written = _forget(package), sys.dont_write_bytecode
        sys.path.insert(0, temporary)
        sys.dont_write_bytecode = True  # the folder is deleted while Python knows its caches
        importlib.invalidate_caches()
        try:
            module = _imported(package, mutant)
            if Path(str(module.__file__)).parent.resolve() != folder.resolve():
                raise MutantError(f"{package} was imported from {module.__file__}, not the copy")
            yield module
        finally:
            _forget(package)
            sys.modules.update(before)
            sys.dont_write_bytecode = written
            sys.path.remove(temporary)
            importlib.invalidate_caches()


def _imported(package: str, mutant: Mutant | None) -> ModuleType:
    try:
        return importlib.import_module(package)
    except (SyntaxError, NameError, AttributeError) as error:
        if mutant is None:
            raise
        raise MutantError(
            f"mutant {mutant.name} of {mutant.impl}.toml cannot be imported, and so shows nothing: "
            f"{type(error).__name__}: {error}"
        ) from error


def _forget(package: str) -> dict[str, ModuleType]:
    """Take a package and all its modules out of sys.modules; gives them."""
    names = [name for name in sys.modules if name == package or name.startswith(f"{package}.")]
    return {name: sys.modules.pop(name) for name in names}


def golden_cases(goldens: Goldens, dtype: str) -> list[Case]:
    """The cases that mutants run on: the tiny configs, by level, then in the manifest's order."""
    cases = [case for case in goldens.cases if case.config.name.startswith(CONFIGS)]
    return sorted(in_column(cases, dtype), key=lambda case: case.level)


def cases_for(mutant: Mutant, goldens: Goldens, dtype: str) -> list[Case]:
    """The cases that a mutant runs on, in their order.

    These are all; those that the mutant names; or, where a framework is slow, those that run what
    its clause says.
    """
    cases = golden_cases(goldens, dtype)
    globs = mutant.cases or (CASES.get(mutant.clause, ()) if mutant.impl in SLOW else ())
    return [c for c in cases if not globs or any(fnmatch.fnmatchcase(c.id, g) for g in globs)]


def results_on(
    module: ModuleType,
    goldens: Goldens,
    dtype: str,
    cases: Sequence[Case] | None = None,
    mode: str = "eager",
) -> Iterator[Result]:
    """The results on an imported copy, one by one, of these cases or of all of `golden_cases`."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a mutant divides by zero and the like
        cases = golden_cases(goldens, dtype) if cases is None else cases
        if cases:
            yield from check(module, [dtype], cases, goldens=goldens, mode=mode)


def fit_of_copy(impl: str, mutant: Mutant | None = None) -> str | None:
    """What the check of `fit` says of a copy, or that fit raised; None where nothing is wrong."""
    with copied(impl, mutant) as module, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return problem_of_fit(module)
        except Exception as error:  # of whatever a fault makes a framework raise
            return f"fit raised {type(error).__name__}: {error}"


def run_copy(
    impl: str,
    goldens: Goldens,
    dtype: str,
    cases: Sequence[Case] | None = None,
    mode: str = "eager",
) -> list[Result]:
    """The results of these cases, by default of every one, on a copy without any fault."""
    with copied(impl) as module:
        return list(results_on(module, goldens, dtype, cases, mode))


def faultless_problem(verdicts: Sequence[Verdict], goldens: Goldens) -> str | None:
    """What fails without a fault too, of the cases that caught mutants of one implementation.

    None where nothing does. All verdicts are of one column.
    """
    impl, dtype, failed = verdicts[0].mutant.impl, verdicts[0].dtype, []
    for mode in sorted({verdict.mutant.mode for verdict in verdicts}):
        caught = {v.case for v in verdicts if v.result and v.mutant.mode == mode}
        cases = [case for case in golden_cases(goldens, dtype) if case.id in caught]
        failed += [r.case.id for r in run_copy(impl, goldens, dtype, cases, mode) if not r.ok]
    if any(verdict.mutant.clause == FIT for verdict in verdicts) and fit_of_copy(impl):
        failed.append("the check of fit")
    if not failed:
        return None
    return (
        f"impl_{impl} without any fault fails {', '.join(failed)} in {dtype}; correct it first, "
        "as a kill shows nothing otherwise"
    )


def try_mutant(mutant: Mutant, goldens: Goldens, dtype: str | None = None) -> Verdict:
    """Run the cases on the mutant, in its own column or another, until the verdict is known.

    That is at the first failure; where a block is to be named, the level of the first failure is
    run until a failure names one. A mutant of clause S10 is held to the check of `fit` instead, in
    float64. Raises MutantError for a mutant that cannot be made.
    """
    dtype, first = dtype or mutant.dtype, None
    if mutant.clause == FIT:
        return Verdict(mutant, dtype, told=fit_of_copy(mutant.impl, mutant))
    with copied(mutant.impl, mutant) as module:
        cases = cases_for(mutant, goldens, dtype)
        for result in results_on(module, goldens, dtype, cases, mutant.mode):
            if first and result.case.level != first.case.level:
                break
            if not result.ok:
                finish([result])
                first = first or result
                if result.block or not mutant.block:
                    return Verdict(mutant, dtype, first, result.block)
    return Verdict(mutant, dtype, first)
