"""Writes what a run found: JSON for programs, JUnit for CI, Markdown for people."""

import dataclasses
import datetime
import json
import os
import platform
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np

from conformance.bench import Timing
from conformance.compare import Finding
from conformance.defaults import notes
from conformance.process import ROOT
from conformance.runner import Column, Plan, Result, finite
from conformance.samples import Samples
from spec.goldens import sha256

FORMAT = 1
SCHEMA = Path(__file__).parent / "schema.json"


@dataclasses.dataclass
class Report:
    """Everything that one run found."""

    plan: Plan
    columns: list[Column]
    timings: list[Timing] | None = None  # None: not asked for
    timing_problem: str = ""
    samples: Samples | None = None
    samples_problem: str = ""

    @property
    def ok(self) -> bool:
        """Whether every selected case ran and passed, and so did all else that was asked for."""
        return (
            bool(self.columns)
            and all(column.ok for column in self.columns)
            and not (self.timing_problem or self.samples_problem)
            and all(timing.ok for timing in self.timings or [])
            and (self.samples is None or self.samples.ok)
        )


def _finding(finding: Finding) -> dict[str, Any]:
    worst = finding.worst
    return {
        "output": finding.output,
        "problem": finding.problem,
        "text": finding.text,
        "shape": list(finding.shape),
        "norm": worst.norm if worst else None,
        "error": finite(worst.error) if worst else None,
        "tolerance": finite(worst.tolerance) if worst else None,
        "ratio": finite(finding.ratio),
        "reason": finding.reason,
        "index": None if finding.index is None else list(finding.index),
        "got": finite(finding.got),
        "expected": finite(finding.expected),
        "norms": {
            m.norm: {"error": finite(m.error), "tolerance": finite(m.tolerance)}
            for m in finding.measures
        },
    }


def _result(result: Result) -> dict[str, Any]:
    case, worst = result.case, result.worst
    bad = [finding for finding in result.findings if not finding.ok]
    return {
        "backend": result.backend,
        "dtype": result.dtype,
        "case": case.id,
        "level": case.level,
        "clause": case.clause,
        "config": case.config.name,
        "call": case.call,
        "status": result.status,
        "seconds": round(result.seconds, 6),
        "message": result.message,
        "trace": result.trace,
        "outputs": len(case.outputs),
        "outputs_failed": len(bad),
        "ratio": finite(result.ratio),
        "worst": _finding(worst) if worst else None,
        "failures": [_finding(finding) for finding in bad],
        "block": result.block,
        "clues": result.clues,
        "causes": list(result.causes),
    }


def _levels(column: Column) -> list[dict[str, Any]]:
    rows = []
    chosen = [*column.selected, *column.left_out]
    for number in sorted({case.level for case in chosen}):
        results = column.level(number)
        compared = [result for result in results if result.ratio is not None]
        worst = max(compared, key=lambda result: result.ratio or 0.0, default=None)
        rows.append(
            {
                "level": number,
                "total": sum(case.level == number for case in chosen),
                "passed": sum(result.ok for result in results),
                "not_implemented": sum(r.status == "not implemented" for r in results),
                "ratio": finite(worst.ratio) if worst else None,
                "worst_case": worst.case.id if worst else None,
            }
        )
    return rows


def _column(column: Column) -> dict[str, Any]:
    first = column.failures[0] if column.failures else None
    return {
        "backend": column.backend,
        "dtype": column.dtype,
        "ok": column.ok,
        "selected": len(column.selected),
        "left_out": [case.id for case in column.left_out],
        "checked": len(column.results),
        "passed": sum(result.ok for result in column.results),
        "reached": column.reached,
        "first_difference": first
        and {"clause": first.case.clause, "case": first.case.id, "block": first.block},
        "mode": column.hello.get("mode"),
        "modes": column.hello.get("modes", []),
        "describe": column.describe,
        "versions": column.versions,
        "levels": _levels(column),
    }


def suite_version() -> str:
    """The version in pyproject.toml, or "unknown" outside a checkout."""
    import tomllib

    try:
        text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
        return str(tomllib.loads(text)["project"]["version"])
    except (OSError, KeyError, ValueError):
        return "unknown"


def to_json(report: Report) -> dict[str, Any]:
    """The report as plain values that schema.json describes."""
    plan, setup = report.plan, report.plan.setup
    manifest = plan.goldens.folder / "manifest.json"
    values = {
        "format": FORMAT,
        "made": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "ok": report.ok,
        "suite": suite_version(),
        "goldens": {
            "manifest_sha256": sha256(manifest.read_bytes()),
            "files": plan.goldens.files,
            "made_with": plan.goldens.made_with,
            "cases": len(plan.goldens.cases),
        },
        "machine": {
            "platform": platform.platform(),
            "processor": platform.processor() or platform.machine(),
            "cores": os.cpu_count(),
            "python": platform.python_version(),
            "numpy": np.__version__,
        },
        "options": {
            "impls": [impl.name for impl in plan.impls],
            "dtypes": plan.dtypes,
            "device": setup.device,
            "mode": setup.mode,
            "threads": setup.threads,
            "timeout": setup.timeout,
        },
        "columns": [_column(column) for column in report.columns],
        "results": [_result(result) for column in report.columns for result in column.results],
        "timing": None
        if report.timings is None
        else {
            "problem": report.timing_problem,
            "entries": [timing.report() for timing in report.timings],
        },
        "defaults": [
            {
                "backend": backend,
                "matter": default.matter,
                "clause": default.clause,
                "note": default.note,
                "case": default.case,
                "dtype": default.dtype,
                "measured": default.measured,
            }
            for backend, found in notes(impl.name for impl in plan.impls).items()
            for default in found
        ],
        "samples": None
        if report.samples is None and not report.samples_problem
        else (report.samples.report() if report.samples else {"ok": False})
        | {"problem": report.samples_problem},
    }
    return json.loads(json.dumps(values, default=str))


def to_junit(report: Report) -> bytes:
    """The report as JUnit XML: a test suite for each column, a test for each case."""
    root = ElementTree.Element("testsuites", name="conformance")
    for column in report.columns:
        count = {
            "tests": len(column.results),
            "failures": sum(r.status in ("failed", "fault") for r in column.results),
            "errors": sum(not r.ok and r.status not in ("failed", "fault") for r in column.results),
        }
        seconds = f"{sum(r.seconds for r in column.results):.3f}"
        suite = ElementTree.SubElement(
            root,
            "testsuite",
            name=f"{column.backend}.{column.dtype}",
            time=seconds,
        )
        for key, value in count.items():
            suite.set(key, str(value))
        for result in column.results:
            case = ElementTree.SubElement(
                suite,
                "testcase",
                classname=f"{column.backend}.{column.dtype}.L{result.case.level}",
                name=result.case.id,
                time=f"{result.seconds:.3f}",
            )
            if not result.ok:
                kind = "failure" if result.status in ("failed", "fault") else "error"
                entry = ElementTree.SubElement(
                    case, kind, type=result.status, message=printable(result.message)
                )
                entry.text = printable("\n".join([*explain(result), result.trace]))
    ElementTree.indent(root)
    return ElementTree.tostring(root, encoding="utf-8", xml_declaration=True)


def printable(text: str) -> str:
    """The text without the control characters that XML cannot hold."""
    return re.sub(r"[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]", "?", text)


def number(value: float | None) -> str:
    """A number in three digits."""
    return "-" if value is None else f"{value:.3g}"


def explain(result: Result) -> list[str]:
    """What is known of a failure, a line each: "label: text"."""
    case, worst = result.case, result.worst
    lines = [f"clause: {case.clause}, level {case.level}, config {case.config.name}, {case.call}"]
    if result.status != "failed":
        lines.append(f"verdict: {result.status}: {result.message}")
    if result.block:
        lines.append(f"block: {result.block}")
    if result.status == "failed" and worst is not None:
        bad = sum(not finding.ok for finding in result.findings)
        lines.append(f"outputs: {bad} of {len(result.findings)} differ")
        lines.append(f"problem: {worst.text}")
        if worst.index is not None:
            lines.append(f"worst at: {worst.index} of shape {worst.shape}")
            for label, value in (("got", worst.got), ("expected", worst.expected)):
                lines.append(f"{label}: {'not shown' if value is None else repr(value)}")
        for m in worst.measures:
            verdict = f"{number(m.ratio)} tolerances" + ("" if m.ok else ", too much")
            lines.append(
                f"{m.norm}: error {number(m.error)}, tolerance {number(m.tolerance)}: {verdict}"
            )
        if worst.reason:
            lines.append(f"tolerance from: {worst.reason}")
    lines += [f"clue: {clue}" for clue in result.clues]
    return [*lines, *[f"likely cause: {cause}" for cause in result.causes]]


def cell(entry: dict[str, Any]) -> str:
    """One cell of the matrix: passed/total, and the worst error in shares of its tolerance."""
    ratio, lacking = entry["ratio"], entry["not_implemented"]
    share = "" if ratio is None else f"  {share_text(ratio)}"
    note = f"  {lacking} not implemented" if lacking else ""
    return f"{entry['passed']}/{entry['total']}{share}{note}"


def share_text(ratio: float | str) -> str:
    if isinstance(ratio, str):
        return ratio
    return f"{ratio:.2f}" if 0.01 <= ratio < 100 else f"{ratio:.0e}" if ratio else "0"


def to_markdown(report: Report, values: dict[str, Any]) -> str:
    """The report as a page; `values` are those of to_json."""
    columns = values["columns"]
    lines = [
        "# Conformance",
        "",
        f"{'Everything passed.' if report.ok else 'Not everything passed.'} "
        f"Made {values['made']}; device {values['options']['device']}, "
        f"{values['options']['threads']} threads.",
        "",
        "Passed of all cases, and the worst error as a share of its tolerance.",
        "",
    ]
    heads = [f"{column['backend']} {column['dtype']}" for column in columns]
    rows = [["level", *heads]]
    for level in sorted({entry["level"] for column in columns for entry in column["levels"]}):
        found = [
            next((cell(e) for e in column["levels"] if e["level"] == level), "-")
            for column in columns
        ]
        rows.append([f"L{level}", *found])
    lines += _table(rows)
    failed = [result for column in report.columns for result in column.failures]
    if failed:
        lines += ["", "## Failures"]
    for result in failed:
        lines += ["", f"### {result.backend} {result.dtype}: {result.case.id}", ""]
        lines += [f"- {_plain(line)}" for line in explain(result)]
    if defaults := notes(impl.name for impl in report.plan.impls):
        lines += ["", "## Where the frameworks' own defaults differ", ""]
        lines += [
            "What a framework does unless told otherwise is not always this model. Each line was "
            "found by the suite; SPEC.md explains them.",
            "",
        ]
        lines += [f"- {_plain(f'{n}: {d.text}')}" for n, found in defaults.items() for d in found]
    lines += ["", "## What ran", ""]
    lines += _table(
        [
            ["column", "mode", "checked", "versions"],
            *[
                [
                    head,
                    str(column["mode"]),
                    f"{column['checked']} of {column['selected']}",
                    ", ".join(f"{k} {v}" for k, v in column["versions"].items()),
                ]
                for head, column in zip(heads, columns, strict=True)
            ],
        ]
    )
    if report.timings:
        lines += ["", "## Train step, float32", ""]
        lines += _table(timing_rows(report.timings))
        lines += ["", *[f"- {_plain(line)}" for line in timing_notes(report.timings)]]
    if report.timing_problem:
        lines += ["", f"Not timed: {_plain(report.timing_problem)}"]
    if report.samples:
        lines += ["", "## Samples", "", "![one digit of each class](samples.png)", ""]
        lines += [f"- {_plain(line)}" for line in sample_notes(report.samples)]
    if report.samples_problem:
        lines += ["", f"No samples: {_plain(report.samples_problem)}"]
    machine = values["machine"]
    lines += ["", f"Machine: {machine['platform']}, {machine['cores']} cores."]
    return "\n".join(lines) + "\n"


def timing_rows(timings: Sequence[Timing]) -> list[list[str]]:
    """A table of the timings, its head first."""
    rows = [
        [
            "config",
            "backend",
            "batch",
            "first step",
            "median",
            "quartiles",
            "images/s",
            "peak memory",
            "threads",
        ]
    ]
    for timing in timings:
        if not timing.ok:
            rows.append([timing.config, timing.backend, str(timing.batch), *["-"] * 6])
            continue
        low, middle, high = timing.quartiles
        rows.append(
            [
                timing.config,
                timing.backend,
                str(timing.batch),
                f"{timing.first:.3g} s",
                f"{middle * 1e3:.3g} ms",
                f"{low * 1e3:.3g} to {high * 1e3:.3g} ms",
                f"{timing.batch / middle:,.0f}",
                "-" if timing.peak_memory is None else f"{timing.peak_memory / 2**20:,.0f} MiB",
                str(timing.threads),
            ]
        )
    return rows


def timing_notes(timings: Sequence[Timing]) -> list[str]:
    """How each timed step was checked, or why there are no numbers."""
    return [
        f"{timing.config}, {timing.backend}: checked in the same process by {timing.verified}"
        if timing.ok
        else f"{timing.config}, {timing.backend}: not timed: {timing.problem}"
        for timing in timings
    ]


def sample_notes(samples: Samples) -> list[str]:
    """How far the samples of the backends are apart."""
    lines = [f"{name}: no samples: {problem}" for name, problem in samples.problems.items()]
    first = next(iter(samples.images), "")
    for name, share in samples.differences.items():
        verdict = "within" if share <= samples.limit else "OVER"
        lines.append(
            f"{name} differs from {first} by {number(share)} of the largest value, {verdict} the "
            f"limit {number(samples.limit)} (twice that of {samples.source})"
        )
    if len(samples.images) == 1:
        lines.append(f"{first} alone: nothing to compare with")
    return lines


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    head, *body = [[text.replace("|", "\\|") for text in row] for row in rows]
    return [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *body)]


def _plain(text: str) -> str:
    """The text on one line, with nothing that Markdown would take as markup."""
    return re.sub(r"([\\`*_<>\[\]|])", r"\\\1", " ".join(printable(text).split()))


def write(path: Path, data: bytes) -> None:
    """Write a file under a temporary name, then rename it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.part")
    unfinished.write_bytes(data)
    os.replace(unfinished, path)


def write_json(path: Path, values: dict[str, Any]) -> None:
    """Write plain values as JSON."""
    write(path, (json.dumps(values, indent=1, allow_nan=False) + "\n").encode())


def write_all(report: Report, folder: Path) -> list[Path]:
    """Write conformance.json, .xml and .md; gives their paths."""
    values = to_json(report)
    text = json.dumps(values, indent=1, allow_nan=False) + "\n"
    contents = {
        "conformance.json": text.encode(),
        "conformance.xml": to_junit(report),
        "conformance.md": to_markdown(report, values).encode(),
    }
    for name, data in contents.items():
        write(folder / name, data)
    return [folder / name for name in contents]
