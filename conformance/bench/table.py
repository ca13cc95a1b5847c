"""Results as tables in the terminal, the goals beside what was measured, and progress."""

import contextlib
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TextIO

import numpy as np

from conformance.bench import stats
from conformance.bench.rounds import Seen, short

# What the train step is to reach on two cores: its time over that of diffusers' UNet2DModel as it
# comes, in the same run, and its share of the ceiling.
RATIO, SHARE = "time / diffusers eager", "share of the ceiling"
GOALS = {
    ("S", "impl_torch"): {RATIO: 0.78, SHARE: 0.50},
    ("M", "impl_torch"): {RATIO: 0.88, SHARE: 0.66},
    ("S", "impl_tf"): {RATIO: 0.90, SHARE: 0.38},
    ("M", "impl_tf"): {RATIO: 0.93, SHARE: 0.60},
    ("S", "impl_jax"): {RATIO: 1.3, SHARE: 0.33},
    ("M", "impl_jax"): {RATIO: 1.5, SHARE: 0.40},
    ("S", "impl_numpy"): {RATIO: 1.5, SHARE: 0.28},
    ("M", "impl_numpy"): {RATIO: 1.4, SHARE: 0.45},
}
YARDSTICK = ("diffusers", "eager")  # short name of a peer's module, and its mode
Rows = list[list[str]]  # a head, then the rows


def goals(values: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Each goal beside what the fastest mode of its backend reached, where both were measured."""
    found = []
    if values["settings"]["device"] != "cpu":
        return []
    timed = [r for r in values["runs"] if r["status"] == "ok" and r["dtype"] == "float32"]
    for (workload, backend), wanted in GOALS.items():
        ours = [r for r in timed if (r["workload"], r["backend"]) == (workload, backend)]
        if not ours:
            continue
        best = min(ours, key=lambda entry: entry["median"])
        for what, goal in wanted.items():
            value, bounds = (
                _ratio(best, timed) if what == RATIO else (best["share_large"], _share_bounds(best))
            )
            met = None if value is None else (value <= goal if what == RATIO else value >= goal)
            found.append(
                {
                    "workload": workload,
                    "backend": backend,
                    "mode": best["mode"],
                    "what": what,
                    "value": value,
                    "interval": bounds,
                    "goal": goal,
                    "met": met,
                }
            )
    return found


def _ratio(
    best: Mapping[str, Any], timed: Sequence[Mapping[str, Any]]
) -> tuple[float | None, list[float] | None]:
    for entry in timed:
        name = (short(entry["backend"]), entry["mode"])
        if entry["peer"] and name == YARDSTICK and entry["workload"] == best["workload"]:
            value, bounds = stats.paired_ratio(
                best["rounds"], entry["rounds"], best["round_processes"]
            )
            return value, list(bounds)
    return None, None


def _share_bounds(best: Mapping[str, Any]) -> list[float] | None:
    if best["share_large"] is None:
        return None
    low, high = best["interval"]
    return [best["share_large"] * best["median"] / high, best["share_large"] * best["median"] / low]


def seconds(value: float | None) -> str:
    """A time in three digits and a fitting unit."""
    if value is None:
        return "-"
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if value >= size:
            return f"{_three(value / size)} {unit}"
    return f"{_three(value / 1e-6)} us"


def _three(value: float) -> str:
    """Three digits, with no exponent for what is below a million."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _between(bounds: Sequence[float] | None, median: float | None) -> str:
    """Two times in the unit of the median."""
    if bounds is None or median is None:
        return "-"
    unit, size = ("s", 1.0) if median >= 1 else ("ms", 1e-3) if median >= 1e-3 else ("us", 1e-6)
    return f"{_three(bounds[0] / size)} to {_three(bounds[1] / size)} {unit}"


def memory(value: int | None) -> str:
    """Bytes as MiB."""
    return "-" if value is None else f"{value / 2**20:,.0f} MiB"


def percent(value: float | None) -> str:
    """A share."""
    return "-" if value is None else f"{100 * value:.0f} %"


def _mark(entry: Mapping[str, Any]) -> str:
    """A star where the network is another and could not be held against the reference."""
    before = entry["gate"]["before"]
    return " *" if before and not before["full"] else ""


def _name(entry: Mapping[str, Any]) -> list[str]:
    return [f"{short(entry['backend'])}{_mark(entry)}", entry["mode"] or "-", entry["dtype"]]


def steady_rows(runs: Sequence[Mapping[str, Any]]) -> Rows:
    """The steady call of each entry of one workload, the fastest first."""
    rows = [
        [
            *("rank", "backend", "mode", "dtype", "median", "95 % interval", "quartiles"),
            *("images/s", "of the ceiling", "of its shapes"),
        ]
    ]
    order = sorted(runs, key=lambda e: (e["median"] is None, e["median"] or 0.0))
    for entry in order:
        if entry["median"] is None:
            rows.append(["-", *_name(entry), entry["status"], *["-"] * 5])
            continue
        rows.append(
            [
                str(entry["rank"] or "-"),
                *_name(entry),
                seconds(entry["median"]),
                _between(entry["interval"], entry["median"]),
                _between((entry["q1"], entry["q3"]), entry["median"]),
                _three(entry["images_per_second"]),
                percent(entry["share_large"]),
                percent(entry["share_shapes"]),
            ]
        )
    return rows


def once_rows(runs: Sequence[Mapping[str, Any]]) -> Rows:
    """What is paid once, and memory, of each entry of one workload."""
    rows = [["backend", "mode", "dtype", "import", "building", "first call", "copy", "peak memory"]]
    for entry in runs:
        if entry["starts"]:
            times = [seconds(entry[key]) for key in ("import_s", "build_s", "first_s", "copy_s")]
            peak = memory(entry["peak_memory"])
            peak += " of the device" if entry["memory_of"] == "device" else ""
            rows.append([*_name(entry), *times, peak])
    return rows


def goal_rows(entries: Sequence[Mapping[str, Any]]) -> Rows:
    """Each goal beside what was measured."""
    rows = [["workload", "backend", "mode", "", "measured", "95 % interval", "goal", "met"]]
    for goal in entries:
        bounds = goal["interval"]
        rows.append(
            [
                goal["workload"],
                short(goal["backend"]),
                goal["mode"] or "-",
                goal["what"],
                "-" if goal["value"] is None else f"{goal['value']:.2f}",
                "-" if bounds is None else f"{bounds[0]:.2f} to {bounds[1]:.2f}",
                f"{'at most' if goal['what'] == RATIO else 'at least'} {goal['goal']:.2f}",
                {True: "yes", False: "NO", None: "not measured"}[goal["met"]],
            ]
        )
    return rows


def scaling_rows(entries: Sequence[Mapping[str, Any]]) -> Rows:
    """How the cost of each backend grows along each axis."""
    rows = [
        [
            *("axis", "backend", "mode", "dtype", "from", "to", "median", "memory"),
            *("slope", "95 % interval"),
        ]
    ]
    for line in entries:
        points = line["points"]
        if not points:
            continue
        first, last = points[0], points[-1]
        times = [seconds(float(np.median(point["seconds"]))) for point in (first, last)]
        peaks = [memory(point["peak_memory"]) for point in (first, last)]
        bounds = line["slope_interval"]
        rows.append(
            [
                line["axis"],
                short(line["backend"]),
                line["mode"],
                line.get("dtype", "float32"),
                str(first["value"]),
                str(last["value"]),
                " to ".join(times),
                " to ".join(peaks),
                "-" if line["slope"] is None else f"{line['slope']:.2f}",
                "-" if bounds is None else f"{bounds[0]:.2f} to {bounds[1]:.2f}",
            ]
        )
    return rows


def notes(values: Mapping[str, Any]) -> list[str]:
    """What stands below the tables: who has no figure and why, how the others were checked."""
    lines = []
    for entry in values["runs"]:
        name = f"{entry['workload']}, {' '.join(_name(entry))}"
        before, after = entry["gate"]["before"], entry["gate"]["after"]
        if entry["status"] != "ok":
            first = entry["message"].strip().splitlines() or [""]
            lines.append(f"{name}: {entry['status']}: {first[0]}")
        elif not before["full"]:
            lines.append(f"{name}: * {before['how']}")
        elif before["share"] is not None and after["share"] is not None:
            worst = max((before, after), key=lambda verdict: verdict["share"])
            lines.append(
                f"{name}: checked before and after the rounds; worst {worst['worst']}, "
                f"{worst['share']:.2g} of its limit"
            )
    if not values["complete"]:
        lines.append("INCOMPLETE: the run was stopped; what had been finished is kept")
    return lines


def show(values: Mapping[str, Any], out: TextIO | None = None) -> None:
    """Print every table of the results."""
    out = out or sys.stdout
    machine, settings = values["machine"], values["settings"]
    of = f"{machine['cpu']}, {settings['threads']} threads"
    if settings["device"] != "cpu":
        of = f"{machine['gpu'] or 'no GPU'}, {of}"
    print(
        f"{of}; {settings['rounds']} rounds of {settings['seconds']:g} s, "
        f"{settings['processes']} process{'es' * (settings['processes'] > 1)} each; "
        f"made {values['made']}",
        file=out,
    )
    if held := machine.get("held_by"):
        names = " ".join(f"{name}={value}" for name, value in held.items())
        without = " ".join(f"-u {name}" for name in held)
        print(
            f"{names} is set: a library may do less with this processor than it could; for what it "
            f"can do, run without (env {without} ...)",
            file=out,
        )
    for ceiling in values["ceilings"]:
        print(ceiling_text(ceiling), file=out)
    if values["kind"] == "scaling":
        title = "How cost grows: seconds are in proportion to value to the power of the slope"
        print_table(title, scaling_rows(values["scaling"]), out)
        for line in notes(values):
            print(line, file=out)
        return
    work = {entry["workload"]: entry for entry in values["work"]}
    for key in dict.fromkeys(entry["workload"] for entry in values["runs"]):
        runs = [entry for entry in values["runs"] if entry["workload"] == key]
        print_table(work_text(key, work.get(key)), steady_rows(runs), out)
        if len(rows := once_rows(runs)) > 1:
            print_table(f"{key}: paid once, and memory", rows, out)
    if values["goals"]:
        print_table("Goals, on two cores", goal_rows(values["goals"]), out)
    for line in notes(values):
        print(line, file=out)


def work_text(key: str, work: Mapping[str, Any] | None) -> str:
    """The title of a workload's table."""
    if work is None:
        return key
    flops = "" if work["flops"] is None else f", {work['flops'] / 1e9:,.1f} GFLOP"
    return f"{key}: {work['text']} ({work['parameters']:,} parameters{flops})"


def ceiling_text(ceiling: Mapping[str, Any]) -> str:
    """One line on a measured ceiling."""
    rate = ceiling["large"]["flops_per_second"] / 1e9
    copy = ceiling["copy_bytes_per_second"]
    return (
        f"ceiling of {ceiling['library']} {ceiling['dtype']} on {ceiling['device']}: "
        f"{rate:,.0f} GFLOP/s in products of {ceiling['large']['n']}"
        + ("" if copy is None else f", copies {copy / 1e9:,.0f} GB/s")
    )


def print_table(title: str, rows: Rows, out: TextIO) -> None:
    """Print a table: by rich where it is installed, else in plain columns."""
    try:
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text
    except ImportError:
        print(plain_table(title, rows), file=out)
        return
    table = Table(title=Text(title), title_justify="left")
    for name in rows[0]:
        table.add_column(name, justify="left" if name in LEFT else "right")
    for row in rows[1:]:
        table.add_row(*(Text(cell, "bold red" if cell == "NO" else "") for cell in row))
    width = None if out.isatty() else 160
    Console(file=out, width=width, highlight=False).print(table)


LEFT = ("axis", "backend", "mode", "dtype", "workload", "", "what")


def plain_table(title: str, rows: Rows) -> str:
    """A table in columns of spaces."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    left = [name in LEFT for name in rows[0]]
    lines = [title]
    for row in rows:
        cells = [
            cell.ljust(width) if to_left else cell.rjust(width)
            for cell, width, to_left in zip(row, widths, left, strict=True)
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines) + "\n"


def duration(value: float | None) -> str:
    """A time left, roughly; nothing where it is not known yet."""
    if value is None:
        return ""
    if value < 90:
        return f"; about {max(5, 5 * round(value / 5))} s left"
    return f"; about {round(value / 60)} min left"


@contextlib.contextmanager
def progress(out: TextIO | None = None) -> Iterator[Seen]:
    """Follows a run: one line that changes on a terminal, a line for each step elsewhere."""
    out = out or sys.stderr

    def written(text: str, left: float | None) -> None:
        print(f"{time.strftime('%H:%M:%S')} {text}{duration(left)}", file=out, flush=True)

    if not out.isatty():
        yield written
        return
    try:
        from rich.console import Console
        from rich.text import Text
    except ImportError:
        yield written
        return
    with Console(file=out).status("starting") as status:
        yield lambda text, left: status.update(Text(f"{text}{duration(left)}"))
