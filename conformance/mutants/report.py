"""What came of the mutants: figures, a table for a terminal, and the page docs/mutants.md."""

import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table
from rich.text import Text

from conformance.coach import titles
from conformance.mutants.engine import Mutant

Row = dict[str, Any]  # see worker.row
ORDER = ("numpy", "torch", "tf", "jax")
HEADINGS = {"numpy": "NumPy", "torch": "PyTorch", "tf": "TensorFlow", "jax": "JAX"}
SMALLEST = 10
CHOSEN_BY_NOBODY = "## Faults that nobody chose"
EARLIER = "Found on an earlier state of these files, and not tried again since."


def impls_of(rows: Sequence[Row]) -> list[str]:
    """The implementations that the rows are of, in the order of reports."""
    found = {row["impl"] for row in rows}
    return [impl for impl in ORDER if impl in found] + sorted(found - set(ORDER))


def share(part: int, whole: int) -> str:
    """A count, of how many, and the percentage."""
    return f"{part} of {whole} ({100 * part / whole:.1f} %)" if whole else "-"


def figures(rows: Sequence[Row]) -> dict[str, Any]:
    """Counts of the verdicts on curated mutants, and the median margin of those killed."""
    killed = [row for row in rows if row["killed"]]
    margins = [row["margin"] for row in killed]
    blocks = [row for row in rows if row["expected"]["block"]]
    causes = [row for row in rows if row["cause_named"] is not None]
    return {
        "mutants": len(rows),
        "killed": len(killed),
        "right_clause": sum(row["clause"] == row["expected"]["clause"] for row in killed),
        "with_block": len(blocks),
        "right_block": sum(row["block"] == row["expected"]["block"] for row in blocks),
        "with_cause": len(causes),
        "right_cause": sum(row["cause_named"] for row in causes),
        "pending": sum(row["pending"] is not None for row in rows),
        "median_margin": statistics.median(margins) if margins else None,
        "smallest_margin": min(margins, default=None),
    }


def auto_figures(rows: Sequence[Row]) -> dict[str, int]:
    """Counts of the verdicts on automatic mutants."""
    survivors = [row for row in rows if row["by"] is None]
    return {
        "mutants": len(rows),
        "killed": len(rows) - len(survivors),
        "equivalent": sum(row["reason"] is not None for row in survivors),
        "unexplained": sum(row["reason"] is None for row in survivors),
    }


def margin(value: float | None) -> str:
    """A margin in two digits; 1e+04 as 1e4."""
    if value is None:
        return ""
    if math.isinf(value):
        return "∞"
    return f"{value:.2g}".replace("e+0", "e").replace("e+", "e")


def verdict(row: Row) -> Text:
    """The verdict in a word or two, coloured."""
    if row["pending"]:
        known = row["problem"] is not None
        return Text("pending", "yellow") if known else Text("caught: no longer pending", "red")
    if row["problem"] is None:
        return Text("caught", "green")
    return Text("wrong verdict" if row["killed"] else "SURVIVED", "bold red")


def table(rows: Sequence[Row]) -> Table:
    """One row a mutant."""
    made = Table()
    for heading in ("mutant", "expected", "dtype", "first failing case", "margin", "cause", ""):
        made.add_column(heading, justify="right" if heading == "margin" else "left")
    named = {None: "-", True: "named", False: "not named"}
    for row in rows:
        case = f"{row['case']} ({row['clause']})" if row["killed"] else ""
        made.add_row(
            escape(f"{row['impl']}: {row['name']}"),
            row["expected"]["clause"],
            row["dtype"],
            escape(case),
            margin(row["margin"]),
            named[row["cause_named"]],
            verdict(row),
        )
    return made


def narrowest(rows: Sequence[Row]) -> list[Row]:
    """The killed mutants with the smallest margins, smallest first."""
    return sorted((row for row in rows if row["killed"]), key=lambda row: row["margin"])[:SMALLEST]


def section_of(path: Path) -> str:
    """The section of automatic faults of a page that was written before; empty where none is."""
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    return text[text.index(CHOSEN_BY_NOBODY) :] if CHOSEN_BY_NOBODY in text else ""


def page(
    curated: Sequence[Row],
    automatic: Sequence[Row],
    untried: Sequence[Mutant] = (),
    earlier: str = "",
) -> str:
    """The page in Markdown: figures, the kill matrix, the smallest margins, the survivors.

    untried: faults that have no verdict yet. earlier: `section_of` a page before, where the
    automatic faults were not tried on the files as they are.
    """
    lines = [
        "# Mutants: does the suite notice a fault?",
        "",
        "Written by `nox -s mutants`; do not edit it. A mutant is a copy of an implementation with "
        "one fault in it. The golden cases of the `tiny` configs run on it, level by level, and "
        "the first that fails says what the author would be told. Faults in what `fit` draws (S10) "
        "are held to the check in `conformance/mutants/fit.py`, since no golden case calls it.",
    ]
    if curated:
        lines += _curated(curated)
    if untried:
        lines += _untried(untried)
    if automatic:
        lines += _automatic(automatic)
    elif earlier:
        heading, _, rest = earlier.removesuffix("\n").partition("\n")
        rest = rest.removeprefix(f"\n{EARLIER}\n")
        lines += ["", heading, "", EARLIER, rest]
    return "\n".join(lines) + "\n"


def _curated(rows: Sequence[Row]) -> list[str]:
    impls = impls_of(rows)
    columns = [*impls, None]
    made = [figures([r for r in rows if impl in (None, r["impl"])]) for impl in columns]
    heads = [*(HEADINGS.get(impl, impl) for impl in impls), "all"]
    lines = [
        "",
        "## Faults that were thought of",
        "",
        "Each is a named patch in `conformance/mutants/NAME.toml`, with the clause that must catch "
        "it, and the block and the cause that the diagnosis must name. The margin is the error "
        "over the tolerance in the first case that fails; ∞ stands for NaN, a wrong shape or "
        "dtype, an exception, a broken protocol, and for what the check of `fit` tells.",
        "",
        f"| | {' | '.join(heads)} |",
        f"| --- |{' ---: |' * len(heads)}",
    ]
    for name, text in (
        ("mutants", lambda f: str(f["mutants"])),
        ("killed", lambda f: share(f["killed"], f["mutants"])),
        ("at the right clause", lambda f: share(f["right_clause"], f["mutants"])),
        (
            "at the right block, where one is asked for",
            lambda f: share(f["right_block"], f["with_block"]),
        ),
        ("with the right cause", lambda f: share(f["right_cause"], f["with_cause"])),
        ("median margin", lambda f: margin(f["median_margin"])),
        ("smallest margin", lambda f: margin(f["smallest_margin"])),
    ):
        lines.append(f"| {name} | {' | '.join(text(f) for f in made)} |")
    if any(row["impl"] in ("tf", "jax") for row in rows):
        lines += [
            "",
            "In TensorFlow and JAX, where a model takes seconds to open, the cases that run "
            "nothing of the broken clause are left out (`CASES` in `engine.py`).",
        ]
    lines += ["", "### The ten smallest margins", "", "| mutant | case | dtype | margin |"]
    lines.append("| --- | --- | --- | ---: |")
    for row in narrowest(rows):
        name = f"{row['impl']}: {row['name']}"
        lines.append(f"| {name} | {row['case']} | {row['dtype']} | {margin(row['margin'])} |")
    if pending := [row for row in rows if row["pending"]]:
        lines += ["", "### Not caught yet", ""]
        lines += [f"- {r['impl']}: {r['name']}: {_text(r['pending'])}" for r in pending]
    unnamed = [r for r in rows if r["cause_named"] is False and not r["pending"]]
    if unnamed:
        lines += ["", "### Where the right cause was not among those named", ""]
        lines += [f"- {r['impl']}: {r['name']}, by {r['case']}" for r in unnamed]
    lines += [
        "",
        "### The kill matrix",
        "",
        "Margins; an empty cell means that the fault was not tried there, mostly because it cannot "
        "occur. `!` marks a survivor, or a verdict that is not the one asked for.",
    ]
    by_name: dict[str, dict[str, Row]] = {}
    for row in rows:
        by_name.setdefault(row["name"], {})[row["impl"]] = row
    clauses = sorted({row["expected"]["clause"] for row in rows}, key=lambda c: int(c[1:]))
    for clause in clauses:
        lines += ["", f"#### {clause}: {titles()[clause]}", ""]
        lines.append(f"| fault | {' | '.join(heads[:-1])} |")
        lines.append(f"| --- |{' ---: |' * len(impls)}")
        for name, found in by_name.items():
            first = next(iter(found.values()))
            if first["expected"]["clause"] != clause:
                continue
            cells = [_cell(found.get(impl)) for impl in impls]
            lines.append(f"| `{name}`: {_text(first['fault'])} | {' | '.join(cells)} |")
    return lines


def _untried(mutants: Sequence[Mutant]) -> list[str]:
    impls = sorted({mutant.impl for mutant in mutants}, key=ORDER.index)
    counts = ", ".join(f"{sum(m.impl == i for m in mutants)} of {HEADINGS[i]}" for i in impls)
    lines = [
        "",
        "### Not tried yet",
        "",
        f"These have no verdict on the files as they are ({counts}).",
        "",
    ]
    of = {m.name: [o.impl for o in mutants if o.name == m.name] for m in mutants}
    first = {m.name: m for m in reversed(mutants)}
    for name in of:
        where = ", ".join(HEADINGS[impl] for impl in of[name])
        lines.append(f"- `{name}`: {_text(first[name].fault)} ({first[name].clause}; {where})")
    return lines


def _cell(row: Row | None) -> str:
    if row is None:
        return ""
    wrong = row["problem"] is not None and not row["pending"]
    return margin(row["margin"]) + (" !" if wrong else "")


def _text(text: str) -> str:
    return text.replace("|", "\\|").replace("*", "\\*")


def _automatic(rows: Sequence[Row]) -> list[str]:
    impls = impls_of(rows)
    lines = [
        "",
        CHOSEN_BY_NOBODY,
        "",
        "Every arithmetic operator, comparison, condition, number and index of `schedule.py`, "
        "`diffusion.py`, `unet.py` and `train.py` is changed, one at a time. The cases run from "
        "the cheapest on, in float64, then in float32, then the check of `fit`.",
        "",
        "| | operators | comparisons | conditions | numbers | indices | all | killed |",
        "| --- |" + " ---: |" * 7,
    ]
    for impl in impls:
        own = [row for row in rows if row["impl"] == impl]
        kinds = ("operator", "comparison", "condition", "number", "index")
        counts = [str(sum(row["kind"] == kind for row in own)) for kind in kinds]
        found = auto_figures(own)
        killed = share(found["killed"], found["mutants"])
        lines.append(f"| {HEADINGS[impl]} | {' | '.join(counts)} | {len(own)} | {killed} |")
    survivors = [row for row in rows if row["by"] is None]
    lines += ["", "### Survivors", ""]
    if not survivors:
        return [*lines, "None."]
    by_reason: dict[str, list[Row]] = {}
    for row in survivors:
        by_reason.setdefault(row["reason"] or "", []).append(row)
    for reason, group in by_reason.items():
        lines += [reason or "**Not equivalent, and not caught:**", ""]
        for row in group:
            where = f"impl_{row['impl']}/{row['file']}, {row['function']}"
            lines.append(f"- {where}: `{row['old']}` → `{row['new']}`")
        lines.append("")
    return lines[:-1]
