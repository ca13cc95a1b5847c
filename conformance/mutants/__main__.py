"""The command line: `python -m conformance.mutants [--impl numpy] [--name GLOB]`."""

import fnmatch
import os
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from conformance.mutants.engine import (
    FIT,
    IMPLS,
    Mutant,
    MutantError,
    Verdict,
    figures,
    fit_of_copy,
    load_mutants,
    narrowest,
    run_copy,
    try_mutant,
)
from conformance.process import THREAD_VARIABLES
from conformance.runner import UsageError, check_dtypes
from conformance.show import Watch, console
from spec.goldens import GoldenError, Goldens

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


def choose(impls: list[str], globs: list[str]) -> list[Mutant]:
    """The mutants of these implementations whose names match. Raises UsageError for none."""
    for impl in impls:
        if impl not in IMPLS:
            raise UsageError(f"--impl {impl!r} has no mutants; choose of {', '.join(IMPLS)}")
    every = [mutant for impl in impls for mutant in load_mutants(impl)]
    for glob in globs:
        if not any(fnmatch.fnmatchcase(mutant.name, glob) for mutant in every):
            raise UsageError(
                f"--name {glob!r} matches none of {len(every)} mutants; names look like "
                f"{', '.join(mutant.name for mutant in every[:3])}"
            )
    return [m for m in every if not globs or any(fnmatch.fnmatchcase(m.name, g) for g in globs)]


def word(verdict: Verdict) -> Text:
    """The verdict in a word or two, coloured."""
    if verdict.mutant.pending:
        known = verdict.problem is not None
        return Text("pending", "yellow") if known else Text("caught: no longer pending", "red")
    if verdict.problem is None:
        return Text("caught", "green")
    return Text("wrong verdict" if verdict.killed else "SURVIVED", "bold red")


def is_wrong(verdict: Verdict, own_column: bool = True) -> bool:
    """Whether the verdict fails the run.

    In a column that the mutants did not choose, survivors count and the rest is information.
    """
    if not own_column:
        return not verdict.killed and not verdict.mutant.pending
    return (verdict.problem is None) == bool(verdict.mutant.pending)


def table_of(verdicts: list[Verdict]) -> Table:
    """One row a mutant."""
    table = Table()
    for heading in ("mutant", "expected", "dtype", "first failing case", "margin", "verdict"):
        table.add_column(heading, justify="right" if heading == "margin" else "left")
    for v in verdicts:
        name = escape(f"{v.mutant.impl}: {v.mutant.name}")
        margin = f"{v.margin:.3g}" if v.killed else ""
        case = f"{v.case} ({v.clause})" if v.killed else ""
        table.add_row(name, v.mutant.clause, v.dtype, escape(case), margin, word(v))
    return table


@app.command()
def mutants(
    impl: Annotated[list[str], typer.Option(help="numpy, torch; default: all.")] = list(IMPLS),  # noqa: B006
    name: Annotated[list[str], typer.Option(help="Only mutants that match this glob.")] = [],  # noqa: B006
    dtype: Annotated[
        str | None, typer.Option(help="Run all in this column, not each in its own.")
    ] = None,
) -> None:
    """Put each fault into a copy of an implementation, and see that the suite catches it there.

    Exit code 1: one survived, or was caught at another clause than the one that it breaks.
    """
    for variable in THREAD_VARIABLES:
        os.environ.setdefault(variable, "1")  # the networks are tiny
    out, watch = console(), Watch(console())
    try:
        chosen = choose(impl, name)
        goldens = Goldens()
        columns = {(m.impl, dtype or m.dtype): None for m in chosen}
        check_dtypes([column for _, column in columns])
        with watch.steps("without a fault") as seen:
            for one, column in columns:
                seen(f"{one} {column}")
                failed = [
                    result.case.id for result in run_copy(one, goldens, column) if not result.ok
                ]
                if (one, FIT) in {(m.impl, m.clause) for m in chosen} and fit_of_copy(one):
                    failed.append("the check of fit")
                if failed:
                    raise MutantError(
                        f"impl_{one} without any fault fails {', '.join(failed)} in {column}; "
                        "correct it first, as a kill shows nothing otherwise"
                    )
        verdicts: list[Verdict] = []
        with watch.steps("mutants") as seen:
            for mutant in chosen:
                if out.is_terminal or not verdicts:
                    seen(f"{mutant.impl}: {mutant.name}" if out.is_terminal else str(len(chosen)))
                verdicts.append(try_mutant(mutant, goldens, dtype))
    except (UsageError, GoldenError, MutantError) as error:
        Watch(console(stderr=True)).say(f"error: {error}")
        raise typer.Exit(2 if isinstance(error, UsageError) else 1) from error
    out.print(table_of(verdicts))
    own = dtype is None
    for verdict in verdicts:
        if verdict.mutant.pending or (verdict.problem and (own or not verdict.killed)):
            why = f" (pending: {verdict.mutant.pending})" if verdict.mutant.pending else ""
            watch.say(f"{verdict.mutant.impl}: {verdict.mutant.name}: {verdict.problem}{why}")
    watch.say(", ".join(f"{key}: {value:.3g}" for key, value in figures(verdicts).items()))
    near = ", ".join(f"{v.mutant.impl} {v.mutant.name} {v.margin:.3g}" for v in narrowest(verdicts))
    watch.say(f"smallest margins: {near or 'none'}")
    raise typer.Exit(1 if any(is_wrong(verdict, own) for verdict in verdicts) else 0)


if __name__ == "__main__":
    app(prog_name="python -m conformance.mutants")
