"""Where a framework's own defaults are not this model: the notes, and what finds each of them.

`python -m conformance.defaults [--impl torch]` puts each default into a copy of an implementation
and measures by how many tolerances its golden case is off, in this interpreter.
"""

import dataclasses
import functools
import math
import tomllib
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

TABLE = Path(__file__).with_suffix(".toml")
NEAR = 3.0  # a measure may differ by this factor from the one on record: libraries sum otherwise


@dataclasses.dataclass(frozen=True)
class Default:
    """One default of a framework that the design does not share."""

    name: str
    impl: str
    matter: str
    clause: str
    note: str
    dtype: str  # the column that shows it
    case: str  # the golden case that finds it
    measured: float | None = None  # error / tolerance there; none where only a GPU shows it
    file: str = ""
    old: str = ""
    new: str = ""

    @property
    def text(self) -> str:
        """The note in a sentence or two."""
        if self.measured is None:
            found = f"{self.case} finds it on a GPU ({self.dtype})"
        else:
            found = f"with that, {self.case} is {self.measured:.2g} tolerances off ({self.dtype})"
        return f"{self.matter} ({self.clause}): {self.note}; {found}"


@functools.cache
def load_defaults() -> tuple[Default, ...]:
    """The entries of defaults.toml, in its order."""
    entries = tomllib.loads(TABLE.read_text(encoding="utf-8"))
    return tuple(Default(name, **entry) for name, entry in entries.items())


def notes(backends: Iterable[str]) -> dict[str, list[Default]]:
    """Backend -> the defaults of its framework; backends that are not shipped here have none."""
    found = {name: [d for d in load_defaults() if f"impl_{d.impl}" == name] for name in backends}
    return {name: defaults for name, defaults in found.items() if defaults}


def measure(default: Default) -> float:
    """error / tolerance of its case with the framework's own default in place."""
    from conformance.mutants.engine import Mutant, copied
    from conformance.runner import check

    mutant = Mutant(
        name=default.name,
        impl=default.impl,
        file=default.file,
        old=default.old,
        new=default.new,
        clause=default.clause,
        fault=default.note,
    )
    with copied(default.impl, mutant) as module, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        (result,) = check(module, [default.dtype], [default.case])
    return math.inf if result.ratio is None else result.ratio


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    impl: Annotated[list[str], typer.Option(help="torch, tf, jax; default: all.")] = [],  # noqa: B006
) -> None:
    """Measure each default of the frameworks in this interpreter; exit code 1: one differs."""
    from conformance.show import Watch, console

    every = load_defaults()
    known = sorted({default.impl for default in every})
    if unknown := sorted(set(impl) - set(known)):
        Watch(console(stderr=True)).say(
            f"error: --impl {unknown[0]!r} has no defaults on record; choose of {', '.join(known)}"
        )
        raise typer.Exit(2)
    out = console()
    table = Table("default", "column", "case", "on record", "measured")
    wrong = False
    with Watch(out).steps("defaults") as seen:
        for default in every:
            if default.old and (not impl or default.impl in impl):
                seen(default.name)
                share, known_share = measure(default), default.measured or 0.0
                near = share == known_share or 1 / NEAR < share / (known_share or 1e-300) < NEAR
                wrong |= not near or share <= 1
                table.add_row(
                    default.name,
                    default.dtype,
                    default.case,
                    f"{known_share:.3g}",
                    f"{share:.3g}",
                    style="" if near else "bold red",
                )
    out.print(table)
    raise typer.Exit(1 if wrong else 0)


if __name__ == "__main__":
    app(prog_name="python -m conformance.defaults")
