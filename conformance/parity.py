"""One training run in every backend: the same weights, batches, times, noise and label dropout.

Float64 curves are held to one another and to the golden curve (L7), float32 curves to the float64
run. Draws them, their differences at every step, and the digits that each run makes.
"""

import dataclasses
import datetime
import json
import os
import platform
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

from conformance.execute import Session, SharedRun
from conformance.process import Impl, WorkerDied
from conformance.reports import number, suite_version, write
from conformance.runner import Suite, UsageError, finite
from spec.config import Config, config_from_dict
from spec.data import load_dataset
from spec.goldens import Case, Goldens
from spec.noise import sampling_noise

FORMAT = 1
CHUNK = 10  # steps between two signs of life
SAMPLE_STEPS, GUIDANCE_SCALE, COUNT = 50, 1.5, 10


@dataclasses.dataclass
class Curve:
    """The run of one backend in one dtype."""

    backend: str
    dtype: str
    losses: list[float] = dataclasses.field(default_factory=list)
    samples: np.ndarray | None = None  # [10, H, W, C]
    problem: str = ""
    seconds: float = 0.0
    describe: dict[str, Any] = dataclasses.field(default_factory=dict)
    versions: dict[str, str] = dataclasses.field(default_factory=dict)

    @property
    def name(self) -> str:
        return f"{self.backend} {self.dtype}"


@dataclasses.dataclass
class Limit:
    """How far every loss of a dtype's curve may be from the golden, relative, and until when."""

    value: float
    steps: int
    source: str


@dataclasses.dataclass
class Parity:
    """All runs, and what they are held against."""

    config: Config
    seed: int
    steps: int
    curves: list[Curve]
    golden: np.ndarray | None  # the L7 curve, where it is of this run
    limits: dict[str, Limit]  # by dtype; none where there is no golden

    @property
    def reference(self) -> tuple[str, np.ndarray]:
        """The float64 run that differences are taken from: the first that is whole."""
        for curve in self.curves:
            if curve.dtype == "float64" and not curve.problem:
                return curve.name, np.array(curve.losses)
        assert self.golden is not None
        return "golden, float64", self.golden

    def difference(self, curve: Curve) -> np.ndarray:
        """|loss - that of the float64 run| / the latter, at every step that both have."""
        _, reference = self.reference
        count = min(len(reference), len(curve.losses))
        return np.abs(np.array(curve.losses[:count]) - reference[:count]) / reference[:count]

    def from_golden(self, curve: Curve) -> float | None:
        """The largest relative difference from the golden curve, where there is one."""
        if self.golden is None or not curve.losses:
            return None
        count = min(len(self.golden), len(curve.losses))
        golden = self.golden[:count]
        return float(np.max(np.abs(np.array(curve.losses[:count]) - golden) / golden))

    def verdict(self, curve: Curve) -> bool | None:
        """Whether the curve is within its limit; None where there is none."""
        limit, apart = self.limits.get(curve.dtype), self.from_golden(curve)
        if curve.problem:
            return False
        return None if limit is None or apart is None else apart <= limit.value

    @property
    def ok(self) -> bool:
        return bool(self.curves) and all(self.verdict(curve) is not False for curve in self.curves)

    def notes(self) -> list[str]:
        """A line on each run."""
        name, reference = self.reference
        lines = [f"float64 run: {name}, {len(reference)} steps"]
        for curve in self.curves:
            if curve.problem:
                lines.append(f"{curve.name}: {curve.problem}")
                continue
            text = f"{curve.name}: last loss {curve.losses[-1]:.6f}"
            if curve.name != name:
                text += f", at most {number(float(self.difference(curve).max()))} from it"
            verdict, apart = self.verdict(curve), self.from_golden(curve)
            if verdict is not None:
                limit = self.limits[curve.dtype]
                word = "within" if verdict else "OVER"
                text += f"; {number(apart)} from the golden curve, {word} {number(limit.value)}"
            lines.append(f"{text}; {curve.seconds:.0f} s")
        return lines

    def report(self) -> dict[str, Any]:
        """The JSON report."""
        name, _ = self.reference
        curves = []
        for curve in self.curves:
            entry = dataclasses.asdict(curve)
            entry["samples"] = None if curve.samples is None else curve.samples.tolist()
            entry["losses"] = [finite(loss) for loss in curve.losses]
            entry["difference"] = [finite(float(d)) for d in self.difference(curve)]
            entry["from_golden"] = finite(self.from_golden(curve))
            entry["ok"] = self.verdict(curve)
            curves.append(entry)
        return {
            "format": FORMAT,
            "made": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "ok": self.ok,
            "suite": suite_version(),
            "machine": {
                "platform": platform.platform(),
                "processor": platform.processor() or platform.machine(),
                "cores": os.cpu_count(),
            },
            "config": dataclasses.asdict(self.config),
            "seed": self.seed,
            "steps": self.steps,
            "reference": name,
            "limits": {dtype: dataclasses.asdict(limit) for dtype, limit in self.limits.items()},
            "golden": None if self.golden is None else self.golden.tolist(),
            "curves": curves,
        }


class Trainer:
    """The worker's side: one run, step by step."""

    def __init__(self, session: Session, request: dict[str, Any]) -> None:
        self.config, self.folder = config_from_dict(request["config"]), Path(request["folder"])
        data = load_file(request["data"])
        self.data = data
        self.model = session.open(self.config, None, request["seed"])
        self.run = SharedRun(
            session, self.model, self.config, data["images"], data.get("classes"), request["seed"]
        )

    def part(self, request: dict[str, Any]) -> dict[str, Any]:
        """`steps`: train for so many, gives their losses; `sample`: write samples.safetensors."""
        if request["part"] == "steps":
            losses = [finite(self.run.step()) for _ in range(request["count"])]
            return {"losses": losses, "describe": self.model.describe()}
        x = self.data["x"].astype(self.run.session.dtype)
        images = self.run.samples(x, self.data.get("labels"), request["options"])
        path = self.folder / "samples.safetensors"
        save_file({"samples": np.ascontiguousarray(images, np.float64)}, path)
        return {"file": path.name}


def check_run(steps: int, seed: int) -> None:
    """Raise UsageError for a run that cannot be made."""
    if not 1 <= steps <= 1_000_000:
        raise UsageError(f"--steps {steps} is outside 1..1000000; choose a number inside")
    if not 0 <= seed < 2**64:
        raise UsageError(f"--seed {seed} is outside 0..2^64-1; choose one inside")


def golden_run(
    goldens: Goldens, config: Config, seed: int | None
) -> tuple[Case, np.ndarray] | None:
    """The L7 case of this config and seed (None: of any), and its loss curve."""
    for case in goldens.cases:
        wanted = case.call == "train_run" and case.config == config
        if wanted and seed in (None, case.options["seed"]):
            output = next(o for o in case.outputs if o.name == "loss")
            return case, goldens.expected(case, output)
    return None


def batch_of_golden(goldens: Goldens, config: Config) -> Config:
    """The config in the batch size of its golden run; as it is where it has none."""
    for case in goldens.cases:
        if case.call == "train_run" and case.config.replace(batch_size=config.batch_size) == config:
            return case.config
    return config


def seed_of(goldens: Goldens, config: Config) -> int:
    """The seed of the config's golden run; 0 where it has none."""
    found = golden_run(goldens, config, None)
    return 0 if found is None else int(found[0].options["seed"])


def limits_of(case: Case, dtypes: list[str]) -> dict[str, Limit]:
    """The limits that the manifest sets for every loss of the curve."""
    output = next(o for o in case.outputs if o.name == "loss")
    return {
        dtype: Limit(float(output.tolerance[dtype]["each"]), output.shape[0], case.id)
        for dtype in dtypes
        if "each" in output.tolerance.get(dtype, {})
    }


def sampling_options(config: Config) -> dict[str, Any]:
    """How the samples are drawn: DDIM, guided where the config has classes."""
    steps = min(SAMPLE_STEPS, config.timesteps)
    options: dict[str, Any] = {"method": "ddim", "steps": steps, "eta": 0.0}
    return options | ({"guidance_scale": GUIDANCE_SCALE} if config.num_classes else {})


def training_set(config: Config) -> dict[str, np.ndarray]:
    """The images [N, H, W, C] and classes [N] of the config's dataset. Raises UsageError."""
    try:
        data = load_dataset(config.data)
    except (ValueError, OSError, ImportError) as error:
        raise UsageError(f"config {config.name!r}: {error}") from error
    if data.train_images.shape[1:] != config.image_shape:
        raise UsageError(
            f"dataset {config.data!r} has images {list(data.train_images.shape[1:])}, config "
            f"{config.name!r} is for {list(config.image_shape)}; choose a config of this dataset"
        )
    given = {"images": data.train_images}
    return given | ({"classes": data.train_labels} if config.num_classes else {})


def make_parity(
    suite: Suite,
    config: Config,
    steps: int,
    seed: int,
    jobs: int,
    seen: Callable[[str, int], Callable[[int], None]],
) -> Parity:
    """Train every backend in every dtype of the plan; `seen(name, steps)` gives what hears of it.

    Raises UsageError where there is no float64 run to compare with.
    """
    found = golden_run(suite.plan.goldens, config, seed)
    if "float64" not in suite.plan.dtypes and found is None:
        raise UsageError("differences are taken from a float64 run; add --dtype float64")
    given = training_set(config)
    count = config.num_classes or COUNT
    given["x"] = sampling_noise(config, count, seed, 1)[0]
    if config.num_classes:
        given["labels"] = np.arange(count, dtype=np.int64)
    curves = [Curve(i.name, dtype) for i in suite.plan.impls for dtype in suite.plan.dtypes]
    with tempfile.TemporaryDirectory(prefix="parity-") as folder:
        data = Path(folder) / "data.safetensors"
        save_file({key: np.ascontiguousarray(value) for key, value in given.items()}, data)
        impls = {impl.name: impl for impl in suite.plan.impls}

        def train(curve: Curve) -> None:
            request = {"config": dataclasses.asdict(config), "seed": seed, "data": str(data)}
            done = seen(curve.name, steps)
            _train(suite, impls[curve.backend], curve, request, steps, done)

        with ThreadPoolExecutor(jobs) as pool:
            try:
                list(pool.map(train, curves))
            except BaseException:
                suite.stop()
                raise
    golden = None if found is None else found[1]
    limits = limits_of(found[0], suite.plan.dtypes) if found else {}
    parity = Parity(config, seed, steps, curves, golden, limits)
    if golden is None and all(c.problem for c in curves if c.dtype == "float64"):
        problems = "; ".join(f"{c.name}: {c.problem}" for c in curves if c.problem)
        raise UsageError(f"no float64 run came to its end, so there is no reference: {problems}")
    return parity


def _train(
    suite: Suite,
    impl: Impl,
    curve: Curve,
    request: dict[str, Any],
    steps: int,
    done: Callable[[int], None],
) -> None:
    """One run in its worker; what goes wrong becomes the curve's problem."""
    worker = suite.worker(impl, curve.dtype)
    timeout, start = suite.plan.setup.timeout, time.monotonic()

    def ask(**more: Any) -> dict[str, Any]:
        reply = worker.ask({"do": "train", **more}, timeout)
        if reply["status"] != "done":
            raise RuntimeError(reply.get("message") or reply["status"])
        return reply

    try:
        ask(part="open", folder=str(worker.folder), **request)
        starts = worker.starts
        while len(curve.losses) < steps and not suite.stopped.is_set():
            count = 1 if not curve.losses else min(CHUNK, steps - len(curve.losses))
            reply = ask(part="steps", count=count)
            curve.losses += [float(loss) for loss in reply["losses"]]
            curve.describe = reply["describe"]
            if not np.isfinite(curve.losses).all():
                bad = int(np.argmin(np.isfinite(curve.losses)))
                raise RuntimeError(f"the loss of step {bad} is {curve.losses[bad]}")
            done(len(curve.losses))
        reply = ask(part="sample", options=sampling_options(config_from_dict(request["config"])))
        if worker.starts != starts:
            raise RuntimeError("the worker was started anew during the run")
        curve.samples = load_file(worker.folder / reply["file"])["samples"]
        curve.versions = worker.hello.get("versions", {})
    except (WorkerDied, RuntimeError) as error:
        status = error.status if isinstance(error, WorkerDied) else "failed"
        curve.problem = f"{status} at step {len(curve.losses)}: {error}"
    curve.seconds = time.monotonic() - start
    worker.close()


COLOURS = ("#4269d0", "#ff725c", "#3ca951", "#a463f2", "#9c6b4e", "#6cc5b0", "#97bbf5")
STYLES = {"float64": "-", "float32": "--", "tf32": "-.", "bf16": ":"}


def draw(parity: Parity, path: Path) -> None:
    """Write the picture: curves, differences at every step on a log axis, samples side by side."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    whole = [curve for curve in parity.curves if curve.losses]
    shown = [curve for curve in whole if curve.samples is not None]
    name, _ = parity.reference
    row = 0.62  # inches of a row of samples
    figure = Figure(figsize=(12, 7.6 + row * len(shown)), dpi=140, facecolor="white")
    FigureCanvasAgg(figure)
    heights = [3.2, 3.6, max(0.5, row * len(shown) + 0.5)]
    parts: Any = figure.subfigures(3, 1, height_ratios=heights)
    upper, lower, samples = parts
    backends = list(dict.fromkeys(curve.backend for curve in parity.curves))
    colour = {backend: COLOURS[i % len(COLOURS)] for i, backend in enumerate(backends)}
    left, right = 0.095, 0.99

    axis = upper.subplots()
    upper.subplots_adjust(left=left, right=right, top=0.85, bottom=0.12)
    for i, curve in enumerate(whole):
        # earlier curves are wider, so that those beneath are seen
        axis.plot(
            range(1, len(curve.losses) + 1),
            curve.losses,
            STYLES.get(curve.dtype, "-"),
            color=colour[curve.backend],
            linewidth=1 + 5 * (1 - i / len(whole)),
            alpha=0.75,
            label=curve.name,
        )
    axis.set_ylabel("loss")
    axis.set_xlim(1, max(2, parity.steps))
    axis.set_title(
        f"One run in {len(backends)} backends: config {parity.config.name}, seed {parity.seed}, "
        f"{parity.steps} steps of {parity.config.batch_size} images, shared noise"
    )
    axis.legend(ncols=2, fontsize=8.5, frameon=False)
    axis.grid(alpha=0.25)

    axis = lower.subplots()
    lower.subplots_adjust(left=left, right=right, top=0.92, bottom=0.13)
    for curve in whole:
        if curve.name == name:
            continue
        difference = parity.difference(curve)
        axis.plot(
            range(1, len(difference) + 1),
            np.where(difference > 0, difference, np.nan),
            STYLES.get(curve.dtype, "-"),
            marker="." if len(difference) < 40 else "",
            color=colour[curve.backend],
            linewidth=1.2,
        )
    for dtype, limit in parity.limits.items():
        axis.plot([1, limit.steps], [limit.value] * 2, color="black", linewidth=1)
        axis.annotate(
            f"limit of {dtype}, {number(limit.value)}",
            (1, limit.value),
            xytext=(4, 3),
            textcoords="offset points",
            fontsize=8.5,
        )
    axis.set_yscale("log")
    axis.margins(y=0.14)  # room for the limits' names
    axis.set_xlim(1, max(2, parity.steps))
    axis.set_xlabel("step")
    axis.set_ylabel("relative difference")
    axis.set_title(
        f"Difference of each loss from that of {name}, in the same colours "
        "(no mark where both are the same number)"
    )
    axis.grid(alpha=0.25, which="both")

    if shown:
        _draw_samples(samples, shown, colour, left, right)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.part")
    figure.savefig(unfinished, format="png")
    os.replace(unfinished, path)


def _draw_samples(
    figure: Any, shown: list[Curve], colour: dict[str, str], left: float, right: float
) -> None:
    """A row of samples for each run."""
    count = len(shown[0].samples)  # type: ignore[arg-type]
    title = "Samples of the averaged weights, from the same noise"
    figure.suptitle(title, fontsize=12, y=0.97, va="top")
    axes = figure.subplots(
        len(shown),
        count,
        squeeze=False,
        gridspec_kw={"left": left + 0.06, "right": right, "top": 0.92, "bottom": 0.02},
    )
    for curve, row in zip(shown, axes, strict=True):
        for image, axis in zip(curve.samples, row, strict=True):  # type: ignore[arg-type]
            picture = np.clip((image + 1) / 2, 0, 1)
            picture = picture[..., 0] if picture.shape[-1] != 3 else picture
            axis.imshow(picture, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
            axis.set(xticks=[], yticks=[])
        row[0].text(
            -0.2,
            0.5,
            curve.name,
            transform=row[0].transAxes,
            ha="right",
            va="center",
            fontsize=9,
            family="monospace",
            color=colour[curve.backend],
        )


def write_all(parity: Parity, folder: Path) -> list[Path]:
    """Write parity.json and parity.png; gives their paths."""
    text = json.dumps(parity.report(), indent=1, allow_nan=False) + "\n"
    write(folder / "parity.json", text.encode())
    draw(parity, folder / "parity.png")
    return [folder / "parity.json", folder / "parity.png"]
