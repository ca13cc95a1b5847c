"""One training run in its folder: it goes on from its state, and keeps what it has done."""

import collections
import contextlib
import json
import math
import os
import signal
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from lab.files import CONFIG, SETTINGS, WEIGHTS, FileError, write_atomically, write_run
from lab.pictures import png
from lab.sample import progress_picture
from lab.state import PARTS, STATE, write_state
from lab.terminal import Loading, console, warn
from spec.backend import State
from spec.config import Config
from spec.data import load_dataset

METRICS = "metrics.jsonl"
SAMPLES = "samples"
EVENTS = "tensorboard"
WINDOW = 50  # steps over which the loss and the speed are averaged
SAVE_SECONDS = 60  # between two saves, where --save-every does not say
SAVE_SHARE = 0.05  # of the time, at most, goes into saving then
FETCHED = ("mnist", "fashion_mnist", "cifar10")
FOLDER = "folder:"


def training_data(
    config: Config, name: str | None = None, data_dir: Path | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Images [N, H, W, C] and labels [N] of a dataset, by default the config's.

    Raises ValueError where they do not fit the config, and what `load_dataset` raises.
    """
    name = config.data if name is None else name
    options: dict[str, Any] = {} if data_dir is None else {"data_dir": data_dir}
    if name.startswith(FOLDER):
        options["image_shape"] = config.image_shape
    with Loading() as loading:
        if name in FETCHED or name.startswith(FOLDER):
            options["progress"] = loading
        data = load_dataset(name, **options)
    shape = data.train_images.shape[1:]
    if shape != config.image_shape:
        raise ValueError(
            f"dataset {name!r} has images {list(shape)}, config {config.name!r} is for "
            f"{list(config.image_shape)} (height, width, channels); choose a config of this dataset"
        )
    classes = int(data.train_labels.max()) + 1
    if config.num_classes not in (0, classes):
        raise ValueError(
            f"dataset {name!r} has {classes} classes, config {config.name!r} has "
            f"{config.num_classes}; set num_classes to {classes}, or to 0 for none"
        )
    return data.train_images, data.train_labels


@contextlib.contextmanager
def interruptions() -> Iterator[threading.Event]:
    """An event that Ctrl-C or SIGTERM sets, so that a step is never cut in half.

    A second one ends at once.
    """
    asked = threading.Event()

    def ask(signal_number, frame):
        if asked.is_set():
            raise KeyboardInterrupt
        asked.set()

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Hold a run's folder, so that no other process trains there too. Raises FileError.

    The system lets go when the process ends, however it ends; without flock nothing is held.
    """
    try:
        import fcntl
    except ImportError:
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise FileError(
                f"another process is training in {folder}; wait for it, or choose another --out"
            ) from error
        except OSError:  # a file system without locks
            pass
        yield
    finally:
        os.close(handle)


def holds_run(folder: Path) -> bool:
    """Whether there is a run in this folder, finished or not."""
    return (folder / WEIGHTS).exists() or (folder / STATE).exists()


def sample_files(folder: Path) -> dict[int, Path]:
    """The pictures that a run drew on its way, by step."""
    files = {}
    for path in folder.joinpath(SAMPLES).glob("step-*.png"):
        with contextlib.suppress(ValueError):
            files[int(path.stem.removeprefix("step-"))] = path
    return files


def clean_folder(folder: Path, step: int | None) -> None:
    """Remove what a killed run left half-written, and what lies after `step`; None: all of a run.

    The state goes first: without it, nothing else counts as a run to go on from.
    """
    for name in (STATE, WEIGHTS, CONFIG, SETTINGS, METRICS, f"{SAMPLES}/step-"):
        place = folder / name
        for temporary in place.parent.glob(f".{place.name}*.*"):
            temporary.unlink(missing_ok=True)
    if step is None:
        for name in (STATE, WEIGHTS, METRICS):
            (folder / name).unlink(missing_ok=True)
        for path in folder.joinpath(EVENTS).glob("events.out.tfevents.*"):
            path.unlink(missing_ok=True)
    for at, path in sample_files(folder).items():
        if step is None or at > step:
            path.unlink(missing_ok=True)


def learning_rate(config: Config, step: int) -> float:
    """The rate of the update after `step` of them (S9)."""
    return config.learning_rate * min(1.0, (step + 1) / config.warmup if config.warmup else 1.0)


class Metrics:
    """`metrics.jsonl` of a run: one JSON object a step, each step once."""

    def __init__(self, folder: Path, step: int) -> None:
        """Open it to go on after `step`; lines of later steps are dropped."""
        self.path, self.seconds = folder / METRICS, 0.0
        self._keep(step)
        self.file = self.path.open("a", encoding="utf-8")

    def _keep(self, step: int) -> None:
        text = self.path.read_bytes() if self.path.exists() else b""
        kept, steps = [], set()
        for line in text.splitlines():
            try:
                record = json.loads(line)
                at, seconds = int(record["step"]), float(record["seconds"])
            except (ValueError, KeyError, TypeError):  # the last line of a killed run
                continue
            if at <= step and at not in steps:
                kept.append(line + b"\n")
                steps.add(at)
                self.seconds = seconds
        if len(steps) < step:
            warn(f"{self.path} has {len(steps)} of the {step} steps that were done")
        if (data := b"".join(kept)) != text:
            write_atomically(self.path, data)

    def add(self, record: Mapping[str, Any]) -> None:
        """Append a line; it is on disk after `sync`."""
        self.file.write(json.dumps(record) + "\n")

    def sync(self) -> None:
        """Put all lines on disk: a state must never be ahead of its metrics."""
        self.file.flush()
        os.fsync(self.file.fileno())

    def close(self) -> None:
        """Close the file, though the disk be full: what was synced stays."""
        with contextlib.suppress(OSError):
            self.file.close()


class Run:
    """A model in training, and the folder that keeps it."""

    def __init__(
        self,
        model,
        config: Config,
        facts: dict[str, Any],
        folder: Path,
        goal: int,
        *,
        state: State | None = None,
        sample_every: int | None = None,
        save_every: int | None = None,
    ) -> None:
        """A new run of this model, or one that goes on from `state`, which is on disk.

        `facts` go into the state's file as they are.
        """
        self.model, self.config, self.facts = model, config, facts
        self.folder, self.goal = folder, goal
        self.sample_every, self.save_every = sample_every, save_every
        # A new run reads and loads its state too. TensorFlow orders some sums by names, which
        # count all that was made before: the first step must come after the same calls always.
        first = model.state()
        self.unsaved = first if state is None else None
        model.load_state(first if state is None else state)
        self.step: int = (first if state is None else state)["step"]
        # of the last state on disk
        self.saved_step: int | None = None if state is None else self.step
        self.saved_at = time.monotonic()
        self.save_seconds = 0.0
        self.recent: collections.deque[float] = collections.deque(maxlen=WINDOW)

    def save(self, metrics: Metrics) -> None:
        """Put metrics, state and, after the first step, weights on disk. Raises OSError.

        Raises ArithmeticError before that where the state is not finite: a good one is kept.
        """
        began = time.monotonic()
        state, self.unsaved = self.unsaved or self.model.state(), None
        for part in PARTS:
            if not all(np.isfinite(value).all() for value in state[part].values()):
                raise ArithmeticError(f"the {part} are no longer finite at step {self.step}")
        metrics.sync()
        write_state(self.folder, state, self.facts)
        self.saved_step = self.step
        if self.step:
            write_run(self.folder, self.config, state["ema"])
        self.saved_at = time.monotonic()
        self.save_seconds = self.saved_at - began

    def _save_due(self) -> bool:
        if self.save_every:
            return self.step % self.save_every == 0
        wait = max(SAVE_SECONDS, self.save_seconds / SAVE_SHARE)
        return time.monotonic() - self.saved_at > wait

    def draw(self) -> np.ndarray:
        """The picture of this step [H', W', 3], from the EMA weights; it is also written."""
        state = self.model.state()
        self.model.load_state({**state, "params": state["ema"]})
        try:
            picture = progress_picture(self.model, self.config, self.facts["seed"])
        finally:
            self.model.load_state(state)
        write_atomically(self.folder / SAMPLES / f"step-{self.step:06}.png", png(picture))
        return picture

    def train(self, images: np.ndarray, labels: np.ndarray, metrics: Metrics) -> bool:
        """Train until the goal; False where Ctrl-C ended it before. All that is done is saved.

        Raises ArithmeticError where a loss or the state is not finite, and OSError.
        """
        durations: collections.deque[float] = collections.deque(maxlen=WINDOW)
        seconds, batch = metrics.seconds, self.config.batch_size
        bar = Progress(
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]:.4f}  {task.fields[rate]:,.0f} images/s "),
            TimeRemainingColumn(),
            console=console,
        )
        with interruptions() as asked, bar:
            task = bar.add_task("", total=self.goal, completed=self.step, loss=math.nan, rate=0.0)
            if self.saved_step is None:
                self.save(metrics)  # a folder that cannot be written is known before the work
            while self.step < self.goal and not asked.is_set():
                until = self.goal
                if self.sample_every:
                    until = min(until, (self.step // self.sample_every + 1) * self.sample_every)
                began = time.perf_counter()
                shared = self.facts["shared_noise"]
                for loss in self.model.fit(images, labels, until - self.step, shared):
                    if not math.isfinite(loss):
                        raise ArithmeticError(f"the loss is {loss} at step {self.step + 1}")
                    durations.append(time.perf_counter() - began)
                    seconds += durations[-1]
                    rate = batch * len(durations) / sum(durations)
                    self.recent.append(loss)
                    record = {
                        "step": self.step + 1,
                        "loss": loss,
                        "images_per_second": round(rate, 3),
                        "seconds": round(seconds, 6),
                        "learning_rate": learning_rate(self.config, self.step),
                    }
                    metrics.add(record)
                    self.step += 1
                    mean = sum(self.recent) / len(self.recent)
                    bar.update(task, completed=self.step, loss=mean, rate=rate)
                    if asked.is_set():
                        break
                    if self.step < until and self._save_due():
                        self.save(metrics)
                    began = time.perf_counter()
                # A picture comes before the state of its step: a state never lacks one.
                if self.sample_every and self.step % self.sample_every == 0:
                    self.draw()
                if self.step < self.goal and not asked.is_set() and self._save_due():
                    self.save(metrics)
            if self.saved_step != self.step or self.step == self.goal:
                self.save(metrics)
        return self.step == self.goal
