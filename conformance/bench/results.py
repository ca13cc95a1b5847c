"""The file of results: put together, checked by its schema, written, read again."""

import datetime
import json
import math
import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from conformance.bench import stats
from conformance.bench.rounds import Bench, Plan, Run
from conformance.process import ROOT

SCHEMA_VERSION = 1
SCHEMA = Path(__file__).parent / "schema.json"


class ResultsError(ValueError):
    """A file that holds no results of this version; the message says what it is."""


def empty(
    plan: Plan, dtypes: Sequence[str], machine: dict[str, Any], kind: str = "bench"
) -> dict[str, Any]:
    """Results of a plan of which nothing is done yet."""
    return {
        "schema": SCHEMA_VERSION,
        "kind": kind,
        "made": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "complete": False,
        "machine": machine,
        "settings": {
            "workloads": [workload.key for workload in plan.workloads],
            "device": plan.device,
            "dtypes": list(dtypes),
            "threads": plan.threads,
            "rounds": plan.rounds,
            "seconds": plan.seconds,
            "processes": plan.processes,
            "thorough": plan.processes > 1,
            "seed": plan.seed,
            "at_once": plan.at_once,
        },
        "versions": {},
        "ceilings": [],
        "work": [],
        "runs": [],
        "goals": [],
        "scaling": [],
    }


def run_entry(run: Run) -> dict[str, Any]:
    """The entry of one contender on one workload, without its rank and its shares."""
    entry: dict[str, Any] = {
        "workload": run.workload.key,
        "kind": run.workload.kind,
        "batch": run.workload.batch,
        "backend": run.contender.impl.name,
        "mode": run.contender.mode,
        "dtype": run.contender.dtype,
        "peer": run.contender.peer,
        "peer_network": bool(run.before and not run.before.full),
        "device": str(run.describe.get("device", "")),
        "status": run.status,
        "message": without_paths(run.message, run.contender.impl.python),
        "gate": {
            "before": run.before and run.before.report(),
            "after": run.after and run.after.report(),
        },
        **{f"{what}_s": _middle(run.starts, what) for what in ("import", "build", "first", "copy")},
        "starts": run.starts,
        "peak_memory": run.peak_memory,
        "memory_of": run.memory_of,
        "rounds": run.rounds,
        "round_processes": run.processes,
        "processes": len(run.starts),
        "versions": run.versions,
        "describe": run.describe,
        **dict.fromkeys(("median", "q1", "q3", "interval", "rank", "images_per_second")),
        **dict.fromkeys(("flops", "share_large", "share_shapes")),
    }
    if run.rounds and run.status in ("ok", "incomplete"):
        summary = stats.summarise(run.rounds, run.processes)
        entry |= {
            "median": summary.median,
            "q1": summary.q1,
            "q3": summary.q3,
            "interval": list(summary.interval),
            "images_per_second": run.workload.batch / summary.median,
        }
    return entry


def without_paths(text: str, python: str) -> str:
    """The text without paths of this machine, since results are published."""
    places = {
        python: "PYTHON",
        str(Path(python).resolve()): "PYTHON",
        f"{ROOT}{os.sep}": "",
        str(Path(python).parent.parent): "ENVIRONMENT",
        sys.prefix: "ENVIRONMENT",
        sys.base_prefix: "PREFIX",
        tempfile.gettempdir(): "TEMPORARY",
        os.getcwd(): ".",
        str(Path.home()): "~",
    }
    for place, name in places.items():
        if len(place) > 1:
            text = text.replace(place, name)
    return text


def _middle(starts: Sequence[Mapping[str, float | None]], what: str) -> float | None:
    known = [value for start in starts if (value := start[what]) is not None]
    return float(np.median(known)) if known else None


def fill(values: dict[str, Any], bench: Bench, more: Sequence[Run] = ()) -> None:
    """Put what a bench has found into its results, ranks included, and runs that never began."""
    values["complete"] = bench.complete
    values["runs"] = [run_entry(run) for run in [*bench.runs, *more]]
    values["versions"] = {}
    for run in bench.runs:
        values["versions"].setdefault(run.contender.impl.name, run.versions)
    rank(values["runs"])


def rank(runs: Sequence[dict[str, Any]]) -> None:
    """Rank the entries of each workload, dtype and device."""
    groups: dict[tuple, list[dict[str, Any]]] = {}
    for entry in runs:
        if entry["status"] == "ok":
            groups.setdefault((entry["workload"], entry["dtype"], entry["device"]), []).append(
                entry
            )
    for group in groups.values():
        found = stats.ranks([(entry["interval"][0], entry["interval"][1]) for entry in group])
        for entry, place in zip(group, found, strict=True):
            entry["rank"] = place


def plain(value: Any) -> Any:
    """The value as JSON holds it: no NaN or infinity, no tuple, no array."""
    if isinstance(value, dict):
        return {str(key): plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(entry) for entry in value]
    if isinstance(value, np.generic):
        return plain(value.item())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if value is None or isinstance(value, (bool, int, float, str)) else str(value)


def write(path: Path, values: dict[str, Any]) -> None:
    """Write results that the schema describes, under a temporary name first."""
    values = plain(values)
    check(values, str(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.part")
    unfinished.write_text(json.dumps(values, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    os.replace(unfinished, path)


def read(path: Path) -> dict[str, Any]:
    """The results in a file. Raises ResultsError for what is none, or of another version."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ResultsError(
            f"{path} cannot be read: {error.strerror}; name a file that can"
        ) from error
    except ValueError as error:
        raise ResultsError(
            f"{path} is no JSON ({error}); give a file that `bench run` has written"
        ) from error
    version = values.get("schema") if isinstance(values, dict) else None
    if version is None:
        raise ResultsError(
            f"{path} holds no results: it has no `schema`; give a file that `bench run` has written"
        )
    if version != SCHEMA_VERSION:
        raise ResultsError(
            f"{path} is of schema {version!r}; this program reads {SCHEMA_VERSION}: make it anew, "
            "or read it with the version that wrote it"
        )
    check(values, str(path))
    return values


def check(values: Any, name: str) -> None:
    """Raise ResultsError where the values are not what schema.json describes."""
    found = problem(values, json.loads(SCHEMA.read_text(encoding="utf-8")))
    if found:
        raise ResultsError(f"{name} is not what conformance/bench/schema.json describes: {found}")


TYPES: dict[str, Any] = {
    "object": dict,
    "array": list,
    "string": str,
    "boolean": bool,
    "null": type(None),
}


def problem(value: Any, schema: Mapping[str, Any], path: str = "$", top: Any = None) -> str:
    """The first place where a value is not what a schema describes; empty where it fits.

    As the package jsonschema would say, which need not be there. Known are `type`, `enum`, `const`,
    `minimum`, `required`, `properties`, `additionalProperties`, `items`, `minItems`, `maxItems` and
    `$ref` into `$defs`.
    """
    top = schema if top is None else top
    if "$ref" in schema:
        return problem(value, top["$defs"][schema["$ref"].rpartition("/")[2]], path, top)
    kinds = schema.get("type", [])
    kinds = [kinds] if isinstance(kinds, str) else kinds
    if kinds and not any(_is(value, kind) for kind in kinds):
        return f"{path}: {str(value)[:80]!r} is no {' or '.join(kinds)}"
    if "const" in schema and value != schema["const"]:
        return f"{path}: {str(value)[:80]!r} is not {schema['const']!r}"
    if "enum" in schema and value not in schema["enum"]:
        return f"{path}: {str(value)[:80]!r} is none of {schema['enum']}"
    if "minimum" in schema and _is(value, "number") and value < schema["minimum"]:
        return f"{path}: {value} is less than {schema['minimum']}"
    if isinstance(value, dict):
        return _object_problem(value, schema, path, top)
    if isinstance(value, list):
        low, high = schema.get("minItems", 0), schema.get("maxItems", math.inf)
        if not low <= len(value) <= high:
            return f"{path}: {len(value)} entries; expected {low} to {high}"
        found = (
            problem(entry, schema.get("items", {}), f"{path}[{i}]", top)
            for i, entry in enumerate(value)
        )
        return next((text for text in found if text), "")
    return ""


def _object_problem(value: dict, schema: Mapping[str, Any], path: str, top: Any) -> str:
    known, more = schema.get("properties", {}), schema.get("additionalProperties", {})
    for name in schema.get("required", []):
        if name not in value:
            return f"{path}: {name!r} is missing"
    for name, entry in value.items():
        if name not in known and more is False:
            return f"{path}: {name!r} is unknown"
        found = problem(entry, known.get(name, more), f"{path}.{name}", top)
        if found:
            return found
    return ""


def _is(value: Any, kind: str) -> bool:
    if kind in ("number", "integer"):
        whole = isinstance(value, int) or (isinstance(value, float) and value.is_integer())
        number = isinstance(value, (int, float)) if kind == "number" else whole
        return number and not isinstance(value, bool)
    return isinstance(value, TYPES[kind])
