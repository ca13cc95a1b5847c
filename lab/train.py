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

from lab.events import EVENTS, PATTERN, Events
from lab.files import (
    CONFIG,
    INDEX,
    SCHEDULER,
    SETTINGS,
    WEIGHTS,
    FileError,
    write_atomically,
    write_run,
)
from lab.pictures import png
from lab.sample import progress_picture
from lab.state import PARTS, STATE, write_state
from lab.terminal import Loading, console, warn
from spec.backend import State
from spec.config import Config, load_config
from spec.data import FOLDER, SHAPES, load_dataset

METRICS = "metrics.jsonl"
SAMPLES = "samples"
OWN = "folder"  # the `data` of a config for images of one's own
WINDOW = 50  # steps over which the loss and the speed are averaged
SAVE_SECONDS = 60  # between two saves, where --save-every does not say
SAVE_SHARE = 0.05  # of the time, at most, goes into saving then


def check_data(name: str) -> None:
    """Raise ValueError unless this is the name of a dataset."""
    if name not in SHAPES and not name.startswith(FOLDER):
        raise ValueError(
            f"--data {name!r} is unknown; choose one of {', '.join(SHAPES)}, or {FOLDER}PATH for "
            "images of your own"
        )


def choose_config(name: str | None, data: str | None) -> Config:
    """The config of this name, or else of this dataset, or else `digits`.

    Raises ValueError for a folder without a config: nothing says how large its images are to be.
    """
    if name is None and data is not None and data.startswith(FOLDER):
        raise ValueError(
            f"--data {data} needs a --config, which says what its images are made to: mnist (28x28 "
            "grey), cifar10 (32x32 in colour), or a .toml file of your own"
        )
    return load_config(name or data or "digits")


def training_data(
    config: Config, name: str, data_dir: Path | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Images [N, H, W, C] of the config's shape and labels [N]: a dataset's part to train on.

    Raises ValueError where they do not fit the config, and what `load_dataset` raises.
    """
    if name == OWN:
        raise ValueError(
            f"config {config.name!r} is for images of your own; name them with --data {FOLDER}PATH"
        )
    check_data(name)
    if name in SHAPES and SHAPES[name] != config.image_shape:
        raise ValueError(
            f"dataset {name!r} has images {list(SHAPES[name])}, config {config.name!r} is for "
            f"{list(config.image_shape)} (height, width, channels); take --config {name}, or a "
            ".toml file of your own with that image_size and in_channels"
        )
    with Loading() as loading:
        data = load_dataset(name, data_dir, config.image_shape, loading)
    return data.train_images, data.train_labels


def fit_config(config: Config, name: str, labels: np.ndarray) -> Config:
    """The config with the dataset's name and, for a folder, its number of classes.

    A config without classes keeps to that: it trains on images alone. The classes of a config for
    another dataset say nothing of a folder, so it gets the folder's: 0 where there are no
    subfolders. Raises ValueError where a config for folders, or for a dataset, has other classes.
    """
    classes = int(labels.max()) + 1
    fitted = config.replace(data=OWN if name.startswith(FOLDER) else name)
    if config.num_classes in (0, classes):
        return fitted
    if fitted.data == OWN and config.data != OWN:
        if classes == 1:
            return fitted.replace(num_classes=0, label_dropout=0.0)
        return fitted.replace(num_classes=classes)
    raise ValueError(
        f"dataset {name!r} has {classes} classes, config {config.name!r} has "
        f"{config.num_classes}; in a config of your own, set num_classes to {classes}, or to 0 "
        "(and label_dropout to 0) for images without classes"
    )


def run_name(config: Config, data: str) -> str:
    """What a run is called: as its config, and as its data where they are not the config's."""
    if data == config.data:
        return config.name
    if data.startswith(FOLDER):
        data = Path(data.removeprefix(FOLDER)).expanduser().resolve().name or OWN
    return f"{config.name}-{data}"


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
    written = (STATE, WEIGHTS, CONFIG, SETTINGS, SCHEDULER, INDEX, METRICS)
    for name in (*written, f"{SAMPLES}/step-"):
        place = folder / name
        for temporary in place.parent.glob(f".{place.name}*.*"):
            temporary.unlink(missing_ok=True)
    if step is None:
        for name in written:
            (folder / name).unlink(missing_ok=True)
        for path in folder.joinpath(EVENTS).glob(PATTERN):
            path.unlink(missing_ok=True)
    for at, path in sample_files(folder).items():
        if step is None or at > step:
            path.unlink(missing_ok=True)


def learning_rate(config: Config, step: int) -> float:
    """The rate of the update after `step` of them (S9)."""
    return config.learning_rate * min(1.0, (step + 1) / config.warmup if config.warmup else 1.0)


class Metrics:
    """`metrics.jsonl` of a run, one JSON object a step, each step once; TensorBoard's files too."""

    def __init__(self, folder: Path, step: int, tensorboard: bool = False) -> None:
        """Open it to go on after `step`; lines of later steps are dropped."""
        self.path, self.seconds = folder / METRICS, 0.0
        self._keep(step)
        self.events = Events(folder, step) if tensorboard else None
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
        if self.events:
            self.events.add(record)

    def picture(self, step: int, data: bytes) -> None:
        """Show the bytes of a PNG file in TensorBoard, where that was asked for."""
        if self.events:
            self.events.picture(step, data)

    def sync(self) -> None:
        """Put all lines on disk: a state must never be ahead of its metrics."""
        self.file.flush()
        os.fsync(self.file.fileno())

    def close(self) -> None:
        """Close the files, though the disk be full: what was synced stays."""
        if self.events:
            self.events.close()
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

    def draw(self) -> bytes:
        """The picture of this step, drawn with the EMA weights: a PNG file, which is written."""
        state = self.model.state()
        self.model.load_state({**state, "params": state["ema"]})
        try:
            picture = progress_picture(self.model, self.config, self.facts["seed"])
        finally:
            self.model.load_state(state)
        data = png(picture)
        write_atomically(self.folder / SAMPLES / f"step-{self.step:06}.png", data)
        return data

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
                    metrics.picture(self.step, self.draw())
                if self.step < self.goal and not asked.is_set() and self._save_due():
                    self.save(metrics)
            if self.saved_step != self.step or self.step == self.goal:
                self.save(metrics)
        return self.step == self.goal
