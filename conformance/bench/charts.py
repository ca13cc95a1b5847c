"""The results as pictures: SVG files, the same bytes for the same results.

`WORKLOAD.svg` for each workload: the median time of every contender and its interval. `shares.svg`:
both shares of the ceiling. `scaling.svg`: cost on logarithmic axes, with slopes, and memory.
"""

import io
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from conformance.bench.rounds import short
from conformance.bench.scaling import TEXTS

# Of one hue for one framework, told apart by those who do not see red and green alike.
HUES = {"numpy": "#0072b2", "torch": "#d55e00", "tensorflow": "#b8860b", "jax": "#009e73"}
OTHER = "#6b6b6b"
FRAMEWORKS = {
    "numpy": "numpy",
    "torch": "torch",
    "diffusers": "torch",
    "lucidrains": "torch",
    "tf": "tensorflow",
    "keras": "tensorflow",
    "jax": "jax",
    "nnx": "jax",
}
DASHES = ("-", "--", ":", "-.")  # of a framework's first, second, ... line
MARKERS = ("o", "s", "^", "D")
PALE = 0.45  # opacity of a peer's bar
INK, FAINT = "#262626", "#d9d9d9"
WIDTH = 8.0  # inches
ROW, FRAME = 0.34, 1.35  # inches: of a row, and of title, axis and notes together
SETTINGS: Any = {
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "bench",  # the names inside the file do not change from run to run
    "font.family": "sans-serif",
    "font.size": 9.5,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.titlesize": 11.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "grid.color": FAINT,
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
}
UNITS = ((1.0, "seconds"), (1e-3, "milliseconds"), (1e-6, "microseconds"))
AXES = {"batch": "batch", "image_size": "image size", "width": "width"}


class ChartError(Exception):
    """Charts that cannot be drawn; the message says what to do."""


def draw(results: Mapping[str, Any], folder: Path) -> list[Path]:
    """Write every chart that these results have figures for; gives the files.

    Raises ChartError where matplotlib is not there.
    """
    try:
        import matplotlib
        from matplotlib import figure  # noqa: F401
    except ImportError as error:
        raise ChartError(
            "charts need matplotlib, which this Python does not have; install it, or give the "
            "results to one that has it: python -m conformance.bench show FILE --charts FOLDER"
        ) from error
    timed = [entry for entry in results["runs"] if entry["median"] is not None]
    written = []
    with matplotlib.rc_context(SETTINGS):
        for workload in dict.fromkeys(entry["workload"] for entry in timed):
            if results["kind"] == "scaling":
                break  # its workloads are the points of one picture
            drawn = _workload(results, workload)
            written.append(_written(drawn, folder / f"{workload}.svg"))
        if any(entry["share_large"] is not None for entry in timed) and results["kind"] == "bench":
            written.append(_written(_shares(results, timed), folder / "shares.svg"))
        if any(len(line["points"]) > 1 for line in results["scaling"]):
            written.append(_written(_scaling(results["scaling"]), folder / "scaling.svg"))
    return written


def _written(drawn: Any, path: Path) -> Path:
    """The figure as a file; no date in it."""
    text = io.StringIO()
    drawn.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text.getvalue(), encoding="utf-8")
    return path


def _figure(width: float, height: float) -> Any:
    """An empty figure that belongs to no window."""
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    drawn = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasSVG(drawn)
    return drawn


def hue(backend: str) -> str:
    """The colour of a backend's framework."""
    return HUES.get(FRAMEWORKS.get(short(backend), ""), OTHER)


def label(entry: Mapping[str, Any], dtypes: int = 1) -> str:
    """The name of a run in a chart; its dtype where there are several, a star: another network."""
    name = f"{short(entry['backend'])} {entry['mode']}"
    star = " *" if entry.get("peer_network") else ""
    return f"{name} {entry['dtype']}{star}" if dtypes > 1 else f"{name}{star}"


def _unit(largest: float) -> tuple[float, str]:
    """The unit in which the largest time is at least 1."""
    return next(((size, name) for size, name in UNITS if largest >= size), UNITS[-1])


def _workload(results: Mapping[str, Any], key: str) -> Any:
    """Times of one workload, the fastest on top."""
    runs = [entry for entry in results["runs"] if entry["workload"] == key]
    timed = [e for e in runs if e["median"] is not None and e["status"] in ("ok", "incomplete")]
    timed.sort(key=lambda entry: entry["median"])
    dtypes = len({entry["dtype"] for entry in timed})
    unit, unit_name = _unit(max((entry["interval"][1] for entry in timed), default=1.0))
    drawn = _figure(WIDTH, FRAME + ROW * len(timed) + 0.2 * bool(_notes(runs)))
    axes = drawn.subplots()
    for row, entry in enumerate(timed):
        low, high = (bound / unit for bound in entry["interval"])
        median, colour = entry["median"] / unit, hue(entry["backend"])
        _bar(axes, row, median, colour, entry["peer"])
        axes.plot([low, high], [row, row], color=INK, linewidth=1.4, solid_capstyle="butt")
        for bound in (low, high):
            axes.plot([bound, bound], [row - 0.16, row + 0.16], color=INK, linewidth=1.4)
        axes.annotate(
            _number(median),
            (max(high, median), row),
            xytext=(6, 0),
            textcoords="offset points",
            va="center",
        )
    axes.set_yticks(range(len(timed)), [label(entry, dtypes) for entry in timed])
    axes.set_ylim(len(timed) - 0.4, -0.6)
    axes.set_xlim(0, 1.1 * max((entry["interval"][1] / unit for entry in timed), default=1.0))
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x")
    rounds = max((len(entry["rounds"]) for entry in timed), default=0)
    axes.set_xlabel(
        f"{unit_name} for a call: the median, and its 95 % interval over {rounds} rounds"
    )
    texts = {entry["workload"]: entry["text"] for entry in results["work"]}
    _title(axes, f"{key}: {texts.get(key, '')}".removesuffix(": "), _machine(results))
    if notes := _notes(runs):
        drawn.text(0.01, 0.005, notes, fontsize=8, va="bottom")
        below = 0.2 / drawn.get_figheight()
        drawn.get_layout_engine().set(rect=(0, below, 1, 1 - below))
    return drawn


def _bar(axes: Any, row: float, length: float, colour: str, peer: bool, height: float = 0.62):
    """A bar from zero; pale, with an edge, for another library."""
    axes.barh(
        row,
        length,
        height,
        color=(*_rgb(colour), PALE if peer else 1.0),
        edgecolor=colour,
        linewidth=1.0,
        linestyle="--" if peer else "-",
    )


def _rgb(colour: str) -> tuple[float, float, float]:
    red, green, blue = (int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5))
    return red, green, blue


def _number(value: float) -> str:
    """Three digits, without an exponent."""
    return f"{value:.0f}" if value >= 100 else f"{value:#.3g}"


def _title(axes: Any, title: str, below: str) -> None:
    axes.set_title(title, loc="left", pad=22, fontweight="bold")
    axes.annotate(
        below,
        (0, 1),
        xytext=(0, 7),
        xycoords="axes fraction",
        textcoords="offset points",
        fontsize=8.5,
        color="#5a5a5a",
    )


def _machine(results: Mapping[str, Any]) -> str:
    """The machine in one line, and what pale bars are."""
    machine, settings = results["machine"], results["settings"]
    on_gpu = settings["device"] == "cuda" and machine["gpu"]
    what = machine["gpu"] if on_gpu else f"{machine['cpu']}, {settings['threads']} threads"
    dtypes = " and ".join(settings["dtypes"])
    peers = "; pale: other libraries" if any(entry["peer"] for entry in results["runs"]) else ""
    return f"{what}; {dtypes}{peers}"


def _notes(runs: Iterable[Mapping[str, Any]]) -> str:
    """What has no figure, and what a star means."""
    runs = list(runs)
    failed = [
        f"{label(entry)} ({entry['status']})"
        for entry in runs
        if entry["status"] not in ("ok", "incomplete")
    ]
    notes = [f"no figure: {', '.join(failed)}"] if failed else []
    if any(entry.get("peer_network") and entry["median"] is not None for entry in runs):
        notes.append("* its state was not checked; its network may be another")
    return "; ".join(notes)


def _shares(results: Mapping[str, Any], timed: Sequence[Mapping[str, Any]]) -> Any:
    """Both shares of the ceiling, a panel for each workload, the largest share on top."""
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for entry in timed:
        if entry["share_large"] is not None and entry["status"] == "ok":
            groups.setdefault(entry["workload"], []).append(entry)
    rows = [len(group) for group in groups.values()]
    height = 0.9 + sum(0.55 + ROW * count for count in rows)
    drawn = _figure(WIDTH, height)
    grid = drawn.subplots(
        len(groups), 1, sharex=True, squeeze=False, height_ratios=[0.5 + c for c in rows]
    )
    for axes, (workload, group) in zip(grid[:, 0], groups.items(), strict=True):
        group.sort(key=lambda entry: -entry["share_large"])
        dtypes = len({entry["dtype"] for entry in group})
        for row, entry in enumerate(group):
            large, own = entry["share_large"], entry["share_shapes"]
            _bar(axes, row, large, hue(entry["backend"]), entry["peer"])
            if own is not None:
                axes.plot(own, row, "D", color="white", markeredgecolor=INK, markersize=5.5)
            axes.annotate(
                f"{large:.2f}" if own is None else f"{large:.2f} ({own:.2f})",
                (max(large, own or 0.0), row),
                xytext=(7, 0),
                textcoords="offset points",
                va="center",
            )
        axes.set_yticks(range(len(group)), [label(entry, dtypes) for entry in group])
        axes.set_ylim(len(group) - 0.4, -0.6)
        axes.set_xlim(0, 1.06)
        axes.tick_params(axis="y", length=0)
        axes.grid(axis="x")
        axes.axvline(1.0, color=INK, linewidth=1.2)
        axes.set_title(workload, loc="left", fontsize=10, fontweight="bold")
    grid[-1, 0].set_xlabel(
        "bar: share of the best rate of large matrix products here\n"
        "diamond, in brackets: of the best rate of the call's own products"
    )
    drawn.suptitle(
        f"Shares of the ceiling: {_machine(results)}", x=0.01, ha="left", fontsize=10, color=INK
    )
    return drawn


def _scaling(lines: Sequence[Mapping[str, Any]]) -> Any:
    """Cost and memory over each axis, on logarithmic axes; slopes in the legends."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    lines = [line for line in lines if len(line["points"]) > 1]
    axes_there = [axis for axis in AXES if any(line["axis"] == axis for line in lines)]
    drawn = _figure(3.6 * len(axes_there) + 0.6, 7.2)
    grid = drawn.subplots(2, len(axes_there), squeeze=False, sharey="row", sharex="col")
    dtypes = len({line["dtype"] for line in lines if "dtype" in line})
    styles = _styles(lines, dtypes)
    plain = FuncFormatter(lambda value, _: f"{value:g}")  # no powers of ten
    for column, axis in enumerate(axes_there):
        above, below = grid[:, column]
        for line in (line for line in lines if line["axis"] == axis):
            name = label({"dtype": "", **line}, dtypes)
            values = [point["value"] for point in line["points"]]
            seconds = [float(np.median(point["seconds"])) for point in line["points"]]
            low = [min(point["seconds"]) for point in line["points"]]
            high = [max(point["seconds"]) for point in line["points"]]
            above.fill_between(values, low, high, color=styles[name]["color"], alpha=0.15, lw=0)
            above.plot(values, seconds, label=f"{name}: {_slope(line)}", **styles[name])
            memory = [
                (point["value"], point["peak_memory"] / 2**20)
                for point in line["points"]
                if point["peak_memory"]
            ]
            if memory:
                below.plot(*zip(*memory, strict=True), **styles[name])
        ticks = sorted(
            {point["value"] for line in lines if line["axis"] == axis for point in line["points"]}
        )
        for axes in (above, below):
            axes.set_xscale("log")
            axes.set_yscale("log")
            axes.grid(which="major")
            axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
            axes.xaxis.set_minor_locator(NullLocator())
            axes.yaxis.set_minor_locator(LogLocator(subs=(2, 5)))
            axes.yaxis.set_major_formatter(plain)
            axes.yaxis.set_minor_formatter(plain)
        above.set_title(AXES[axis], loc="left", fontweight="bold")
        above.tick_params(axis="x", labelbottom=False)
        above.legend(title="slope, 95 % interval", alignment="left", loc="upper left")
        below.set_xlabel(TEXTS[axis])
    grid[0, 0].set_ylabel("seconds for a train step")
    grid[1, 0].set_ylabel("peak memory, MiB")
    _room_above(grid[0, 0], 1 + len(styles))
    return drawn


def _styles(lines: Sequence[Mapping[str, Any]], dtypes: int) -> dict[str, dict[str, Any]]:
    """Colour by framework; dash and marker by what comes first, second, ... of it."""
    styles: dict[str, dict[str, Any]] = {}
    seen: dict[str, int] = {}
    for line in lines:
        name = label({"dtype": "", **line}, dtypes)
        if name not in styles:
            colour = hue(line["backend"])
            place = seen[colour] = seen.get(colour, -1) + 1
            styles[name] = {
                "color": colour,
                "linestyle": DASHES[place % len(DASHES)],
                "marker": MARKERS[place % len(MARKERS)],
                "markersize": 4,
                "linewidth": 1.5,
            }
    return styles


def _slope(line: Mapping[str, Any]) -> str:
    """The slope and its interval, in words."""
    if line["slope"] is None:
        return "no slope"
    low, high = line["slope_interval"]
    return f"{line['slope']:.2f} ({low:.2f} to {high:.2f})"


def _room_above(axes: Any, rows: int) -> None:
    """Make room for a legend of so many rows over what is drawn; panels in a row share the axis."""
    low, high = axes.get_ylim()
    axes.set_ylim(low, high * (high / low) ** (0.06 * rows / (1 - 0.06 * min(rows, 12))))
