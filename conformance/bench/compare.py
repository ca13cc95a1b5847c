"""What changed from one file of results to another, beyond noise."""

import sys
from collections.abc import Mapping
from typing import Any, TextIO

from conformance.bench import stats, table
from conformance.bench.rounds import short

KEY = ("workload", "batch", "backend", "mode", "dtype", "device")
SAME_MACHINE = ("cpu", "cores", "threads", "memory", "huge_pages", "held_by", "gpu")
DRIFT = 0.03  # of a ceiling, from which on it is told
MEMORY = 0.05  # of a peak, from which on it is told


def compare(first: Mapping[str, Any], second: Mapping[str, Any]) -> list[dict[str, Any]]:
    """An entry for each call that both have timed: the second's time over the first's."""
    found = []
    old = {_key(entry): entry for entry in first["runs"] if entry["status"] == "ok"}
    for entry in second["runs"]:
        before = old.get(_key(entry))
        if before is None or entry["status"] != "ok":
            continue
        value, bounds = stats.ratio(
            entry["rounds"],
            before["rounds"],
            entry["round_processes"],
            before["round_processes"],
        )
        changed = stats.changed(bounds)
        verdict = ("faster" if value < 1 else "slower") if changed else "the same, within noise"
        found.append(
            {
                **dict(zip(KEY, _key(entry), strict=True)),
                "first": before["median"],
                "second": entry["median"],
                "ratio": value,
                "interval": list(bounds),
                "changed": changed,
                "verdict": verdict,
            }
        )
    return found


def _key(entry: Mapping[str, Any]) -> tuple:
    return tuple(entry[name] for name in KEY)


def remarks(first: Mapping[str, Any], second: Mapping[str, Any]) -> list[str]:
    """What a reader must know beside the ratios."""
    lines = []
    for name in SAME_MACHINE:
        a, b = first["machine"].get(name), second["machine"].get(name)
        if a != b:
            lines.append(f"another machine: {name} was {a}, is {b}")
    lines += _ceilings(first, second)
    for values, which, other in ((first, "first", second), (second, "second", first)):
        timed = {_key(entry) for entry in other["runs"] if entry["status"] == "ok"}
        for entry in values["runs"]:
            if entry["status"] == "ok" and _key(entry) not in timed:
                name = f"{entry['workload']}, {short(entry['backend'])} {entry['mode']}"
                lines.append(f"timed in the {which} alone: {name} {entry['dtype']}")
        if not values["complete"]:
            lines.append(f"the {which} is incomplete: its run was stopped")
        if values["settings"]["processes"] == 1:
            lines.append(
                f"the {which} has one process of each: what differs from process to process (some "
                "percent) is not in its intervals; --thorough measures it"
            )
    old = {_key(entry): entry for entry in first["runs"]}
    for entry in second["runs"]:
        before, now = old.get(_key(entry), {}).get("peak_memory"), entry["peak_memory"]
        if before and now and abs(now / before - 1) > MEMORY:
            lines.append(
                f"{entry['workload']}, {short(entry['backend'])} {entry['mode']}: peak memory was "
                f"{table.memory(before)}, is {table.memory(now)}"
            )
    return lines


def _ceilings(first: Mapping[str, Any], second: Mapping[str, Any]) -> list[str]:
    """How much faster the machine itself was."""
    lines = []
    for kind in dict.fromkeys((c["dtype"], c["device"]) for c in second["ceilings"]):
        a, b = (
            max(
                (
                    c["large"]["flops_per_second"]
                    for c in values["ceilings"]
                    if (c["dtype"], c["device"]) == kind
                ),
                default=None,
            )
            for values in (first, second)
        )
        if a and b and abs(b / a - 1) > DRIFT:
            lines.append(
                f"the machine's own {kind[0]} ceiling on {kind[1]} is {b / a:.2f} times what it "
                "was: a change of that size says nothing of a backend"
            )
    return lines


def rows(entries: list[dict[str, Any]]) -> table.Rows:
    """The comparison as a table."""
    head = ["workload", "backend", "mode", "dtype", "first", "second", "ratio", "95 % interval", ""]
    return [
        head,
        *(
            [
                e["workload"],
                short(e["backend"]),
                e["mode"],
                e["dtype"],
                table.seconds(e["first"]),
                table.seconds(e["second"]),
                f"{e['ratio']:.3f}",
                f"{e['interval'][0]:.3f} to {e['interval'][1]:.3f}",
                e["verdict"],
            ]
            for e in entries
        ),
    ]


def show(first: Mapping[str, Any], second: Mapping[str, Any], out: TextIO | None = None) -> None:
    """Print what changed from the first to the second."""
    out = out or sys.stdout
    entries = compare(first, second)
    if entries:
        table.print_table("Time of the second over that of the first", rows(entries), out)
        count = sum(entry["changed"] for entry in entries)
        print(f"{count} of {len(entries)} changed beyond noise", file=out)
    else:
        print("nothing was timed in both", file=out)
    for line in remarks(first, second):
        print(line, file=out)
