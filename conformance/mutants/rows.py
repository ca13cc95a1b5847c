"""Rows of earlier runs, kept in one file: what changed is tried alone, and the page tells of all.

Each row has a hash of what it was found on: the implementation, the goldens and the fault itself.
Where one of them is another now, the row is stale, and no page is written from it.
"""

import dataclasses
import functools
import hashlib
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from conformance.mutants import auto
from conformance.mutants.engine import HERE, IMPLS, Mutant, MutantError, load_mutants
from conformance.mutants.report import ORDER, Row
from conformance.process import ROOT
from conformance.reports import write
from conformance.runner import UsageError
from spec.goldens import GOLDENS

SHOWN = 3  # names in a message


class StaleError(MutantError):
    """Faults that have no row for the files as they are; the message says what to run."""


def plain(rows: Sequence[Row]) -> list[Row]:
    """The rows with infinite margins as words, as JSON has no infinity."""
    return [{k: "inf" if v == math.inf else v for k, v in row.items()} for row in rows]


def revived(rows: Sequence[Row]) -> list[Row]:
    """The rows that `plain` gave, with margins as numbers again."""
    return [{**row, "margin": float(row["margin"])} if row.get("margin") else row for row in rows]


@functools.cache
def _digest(path: Path, changed: int, size: int) -> bytes:
    """The hash of a file that was last changed then and is of that size: the manifest is long."""
    return hashlib.sha256(path.read_bytes()).digest()


def stamp(impl: str, text: str) -> str:
    """A hash of the files of impl_<impl>, of the goldens' manifest, and of a text."""
    found = hashlib.sha256(text.encode())
    for path in (*sorted((ROOT / f"impl_{impl}").glob("*.py")), GOLDENS / "manifest.json"):
        stat = path.stat()
        found.update(path.name.encode() + _digest(path, stat.st_mtime_ns, stat.st_size))
    return found.hexdigest()[:16]


def stamp_of(mutant: Mutant) -> str:
    """The hash that a row of this fault has now."""
    return stamp(mutant.impl, json.dumps(dataclasses.asdict(mutant), sort_keys=True))


def stamp_of_auto(impl: str) -> str:
    """The hash that a row of an implementation's automatic faults has now."""
    return stamp(impl, (HERE / auto.EQUIVALENT).read_text(encoding="utf-8"))


def stamps_of(job: dict[str, Any]) -> dict[str, str]:
    """The hashes of a job's rows by name, or under "" where it is one of automatic faults."""
    if "auto" in job:
        return {"": stamp_of_auto(job["impl"])}
    names = set(job["names"])
    return {m.name: stamp_of(m) for m in load_mutants(job["impl"]) if m.name in names}


def _place(row: Row) -> tuple:
    """What tells an automatic fault of an implementation from the others."""
    return tuple(row[key] for key in ("file", "line", "function", "kind", "old", "new"))


class Rows:
    """The rows of a file. Raises UsageError where it holds something else."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._expected: dict[str, dict[str, str]] = {}  # what a job's rows are to be found on
        self._read()

    def _read(self) -> None:
        self.curated: dict[tuple[str, str], Row] = {}  # by implementation and name
        self.automatic: dict[str, list[Row]] = {}  # by implementation
        if not self.path.exists():
            return
        try:
            found = json.loads(self.path.read_text(encoding="utf-8"))
            for row in revived(found["curated"]):
                self.curated[row["impl"], row["name"]] = row
            for row in found["automatic"]:
                self.automatic.setdefault(row["impl"], []).append(row)
        except (ValueError, KeyError, TypeError) as error:
            raise UsageError(
                f"--rows {self.path} holds no rows of mutants ({type(error).__name__}: {error}); "
                "name a file that a run wrote with --rows, or a new one"
            ) from error

    def fresh(self, mutant: Mutant) -> bool:
        """Whether there is a row of the fault as it is now, on the files as they are now."""
        row = self.curated.get((mutant.impl, mutant.name))
        return row is not None and row.get("of") == stamp_of(mutant)

    def settled(self, mutant: Mutant) -> bool:
        """Whether it need not be tried again: its row is fresh, and its verdict the right one."""
        row = self.curated.get((mutant.impl, mutant.name), {})
        return self.fresh(mutant) and row["problem"] is None and row["cause_named"] is not False

    def fresh_auto(self, impl: str) -> bool:
        """Whether there is a row of every automatic fault, on the files as they are now."""
        rows, now = self.automatic.get(impl, []), stamp_of_auto(impl)
        every = len(auto.mutants_of(impl))
        return len(rows) == every and all(row.get("of") == now for row in rows)

    def expect(self, jobs: Sequence[dict[str, Any]]) -> None:
        """Remember what the rows of these jobs are going to be found on."""
        for job in jobs:
            self._expected[json.dumps(job)] = stamps_of(job)

    def keep(self, job: dict[str, Any], rows: Sequence[Row]) -> None:
        """Put the rows of a job in the place of older ones, and write the file.

        Raises MutantError where what they were found on changed meanwhile.
        """
        stamps = stamps_of(job)
        if stamps != self._expected[json.dumps(job)]:
            raise MutantError(
                f"{len(rows)} rows of {job['impl']} are not kept: the implementation, its faults "
                "or the goldens changed as they ran; run again, and leave the files alone meanwhile"
            )
        self._read()  # another run may have written it since
        if "auto" in job:
            made = {_place(row): {**row, "of": stamps[""]} for row in rows}
            old = self.automatic.get(job["impl"], [])
            others = [r for r in old if r.get("of") == stamps[""] and _place(r) not in made]
            self.automatic[job["impl"]] = [*others, *made.values()]
        else:
            for row in rows:
                self.curated[row["impl"], row["name"]] = {**row, "of": stamps[row["name"]]}
        self.save()

    def save(self) -> None:
        """Write the file, a row a line, without faults that are there no more."""
        names = {(mutant.impl, mutant.name) for impl in IMPLS for mutant in load_mutants(impl)}
        parts = {
            "curated": [self.curated[key] for key in sorted(set(self.curated) & names)],
            "automatic": [row for impl in sorted(self.automatic) for row in self.automatic[impl]],
        }
        texts = []
        for part, rows in parts.items():
            lines = ",\n".join(json.dumps(row, allow_nan=False) for row in plain(rows))
            texts.append(f'"{part}": [\n{lines}\n]' if lines else f'"{part}": []')
        write(self.path, ("{\n" + ",\n".join(texts) + "\n}\n").encode())

    def curated_rows(self) -> list[Row]:
        """The rows of all faults, as reports order them. Raises StaleError where one is stale."""
        impls = sorted(IMPLS, key=ORDER.index)
        every = {impl: load_mutants(impl) for impl in impls}
        lacking = {i: [m.name for m in every[i] if not self.fresh(m)] for i in impls}
        told = [
            f"{len(names)} of {impl} ({', '.join(names[:SHOWN])}{', ...' * (len(names) > SHOWN)})"
            for impl, names in lacking.items()
            if names
        ]
        if told:
            self._refuse(f"faults {'; '.join(told)}", [impl for impl in impls if lacking[impl]])
        return [self.curated[mutant.impl, mutant.name] for i in impls for mutant in every[i]]

    def automatic_rows(self) -> list[Row]:
        """The same of the automatic faults."""
        lacking = [impl for impl in auto.IMPLS if not self.fresh_auto(impl)]
        if lacking:
            self._refuse(f"automatic faults of {', '.join(lacking)}", ["auto", *lacking])
        return [row for impl in auto.IMPLS for row in self.automatic[impl]]

    def tried(self) -> tuple[list[Row], list[Mutant]]:
        """The fresh rows of faults, as reports order them, and the faults that have none."""
        every = [m for impl in sorted(IMPLS, key=ORDER.index) for m in load_mutants(impl)]
        rows = [self.curated[m.impl, m.name] for m in every if self.fresh(m)]
        return rows, [mutant for mutant in every if not self.fresh(mutant)]

    def _refuse(self, what: str, impls: list[str]) -> None:
        options = " ".join("--auto" if impl == "auto" else f"--impl {impl}" for impl in impls)
        raise StaleError(
            f"no page is written: {self.path} lacks rows, found on the implementation and goldens "
            f"as they are now, of the {what}; run with {options} --rows {self.path}"
        )
