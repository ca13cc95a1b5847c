"""`python -m impl_NAME train|sample ...`: trains one backend on a dataset, and draws with it."""

import collections
import contextlib
import importlib
import math
import signal
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from lab.files import WEIGHTS, FileError, read_run, write_atomically, write_run
from lab.pictures import grid, png
from spec.config import Config, load_config
from spec.data import load_dataset
from spec.noise import normals, sampling_noise

WINDOW = 50  # steps over which the loss and the speed are averaged
DDIM_STEPS = 50
INTERRUPTED = 130  # what a shell reports after Ctrl-C

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # plain help and errors, the same in a terminal and in a log
)
console = Console(highlight=False, soft_wrap=True)

ConfigOption = Annotated[str, typer.Option(help="A config's name, or a .toml file.")]
SeedOption = Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Of every random number.")]
DeviceOption = Annotated[str, typer.Option(help="auto, cpu or cuda.")]


def main(backend: str) -> None:
    """Run the command line on the backend of this module name, such as `impl_torch`."""
    app(prog_name=f"python -m {backend}", obj=backend)


@contextlib.contextmanager
def faults_told() -> Iterator[None]:
    """A wrong argument, file or config ends the program with one line and exit status 2."""
    try:
        yield
    except (ValueError, OSError) as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from error


def open_model(backend: str, config: Config, params, seed: int, device: str):
    """The backend's model, in the mode that it names first; what it runs on is printed."""
    module = importlib.import_module(backend)
    model = module.open(config, params, seed=seed, device=device, mode=module.modes[0])
    facts = model.describe()
    console.print(
        f"{facts['framework']} on {facts['device']}, {facts['dtype']}, {facts['mode']}; "
        f"config {config.name}"
    )
    return model


def training_data(config: Config) -> tuple[np.ndarray, np.ndarray]:
    """Images [N, H, W, C] and labels [N] of the config's dataset. Raises ValueError."""
    data = load_dataset(config.data)
    shape = data.train_images.shape[1:]
    if shape != config.image_shape:
        raise ValueError(
            f"dataset {config.data!r} has images {list(shape)}, config {config.name!r} is for "
            f"{list(config.image_shape)} (height, width, channels); choose a config of this dataset"
        )
    classes = int(data.train_labels.max()) + 1
    if config.num_classes not in (0, classes):
        raise ValueError(
            f"dataset {config.data!r} has {classes} classes, config {config.name!r} has "
            f"{config.num_classes}; set num_classes to {classes}, or to 0 for none"
        )
    return data.train_images, data.train_labels


@contextlib.contextmanager
def interruptions() -> Iterator[threading.Event]:
    """An event that Ctrl-C sets, so that a step is never cut in half; a second one ends at once."""
    asked = threading.Event()

    def ask(signal_number, frame):
        if asked.is_set():
            raise KeyboardInterrupt
        asked.set()

    before = signal.signal(signal.SIGINT, ask)
    try:
        yield asked
    finally:
        signal.signal(signal.SIGINT, before)


def follow(losses: Iterable[float], steps: int, batch_size: int) -> tuple[int, float]:
    """Draw losses until they end or Ctrl-C; gives the steps done and the mean of the last losses.

    Raises ArithmeticError where a loss is not finite.
    """
    recent: collections.deque[float] = collections.deque(maxlen=WINDOW)
    times = collections.deque([time.perf_counter()], maxlen=WINDOW)
    done = 0
    bar = Progress(
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:.4f}  {task.fields[rate]:,.0f} images/s "),
        TimeRemainingColumn(),
        console=console,
    )
    with interruptions() as asked, bar:
        task = bar.add_task("", total=steps, loss=math.nan, rate=0.0)
        for loss in losses:
            if not math.isfinite(loss):
                raise ArithmeticError(f"the loss is {loss} at step {done}")
            recent.append(loss)
            times.append(time.perf_counter())
            rate = batch_size * (len(times) - 1) / (times[-1] - times[0])
            done += 1
            bar.update(task, completed=done, loss=sum(recent) / len(recent), rate=rate)
            if asked.is_set():
                break
    return done, sum(recent) / len(recent)


@app.command()
def train(
    context: typer.Context,
    config: ConfigOption = "digits",
    steps: Annotated[int, typer.Option(min=1, help="Updates of the weights.")] = 2000,
    batch_size: Annotated[int | None, typer.Option(min=1, help="In place of the config's.")] = None,
    seed: SeedOption = 0,
    shared_noise: Annotated[
        bool,
        typer.Option("--shared-noise", help="Draw from the stream that all backends share (S10)."),
    ] = False,
    device: DeviceOption = "auto",
    out: Annotated[Path | None, typer.Option(help="Folder; default runs/CONFIG-BACKEND.")] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a run that stands in the folder.")
    ] = False,
) -> None:
    """Train from new weights; the averaged weights (EMA) are written to a folder.

    Ctrl-C ends it early and keeps what is there.
    """
    with faults_told():
        chosen = load_config(config)
        if batch_size is not None:
            chosen = chosen.replace(batch_size=batch_size)
        images, labels = training_data(chosen)
        folder = out or Path("runs") / f"{chosen.name}-{context.obj.removeprefix('impl_')}"
        if (folder / WEIGHTS).exists() and not overwrite:
            raise FileError(f"{folder} holds a run; choose another --out, or add --overwrite")
        model = open_model(context.obj, chosen, None, seed, device)
    try:
        losses = model.fit(images, labels, steps, shared_noise)
        done, loss = follow(losses, steps, chosen.batch_size)
    except ArithmeticError as error:
        typer.echo(
            f"error: {error}: nothing was written; lower learning_rate in a config of your own",
            err=True,
        )
        raise typer.Exit(1) from error
    with faults_told():
        write_run(folder, chosen, model.state()["ema"])
    if done < steps:
        console.print(f"stopped after {done} of {steps} steps; what was trained so far is kept")
    console.print(f"mean loss of the last {min(done, WINDOW)} steps {loss:.4f}; wrote {folder}")
    if done < steps:
        raise typer.Exit(INTERRUPTED)


def parse_labels(text: str | None, config: Config) -> list[int]:
    """Labels from a list such as `0,1,2`; every class where there is none; [] without classes."""
    if text is None:
        return list(range(config.num_classes))
    try:
        return [int(part) for part in text.split(",")]
    except ValueError as error:
        raise ValueError(f"--labels {text!r} is not a list such as 0,1,2") from error


@app.command()
def sample(
    context: typer.Context,
    weights: Annotated[Path, typer.Option(help="Folder of a run, or a .safetensors file.")],
    config: Annotated[
        str | None, typer.Option(help="A config's name or file; default: the folder's own.")
    ] = None,
    method: Annotated[str, typer.Option(help="ddim or ddpm.")] = "ddim",
    steps: Annotated[
        int | None, typer.Option(min=1, help=f"Default {DDIM_STEPS} for ddim; all for ddpm.")
    ] = None,
    eta: Annotated[float, typer.Option(help="Noise of ddim's steps, 0 to 1.")] = 0.0,
    guidance_scale: Annotated[
        float | None, typer.Option(help="Above 1: nearer to the label (S6).")
    ] = None,
    labels: Annotated[
        str | None, typer.Option(help="Such as 3 or 0,1,2; repeated to fill; default: all classes.")
    ] = None,
    count: Annotated[int, typer.Option(min=1, help="Number of images.")] = 20,
    seed: SeedOption = 0,
    device: DeviceOption = "auto",
    out: Annotated[Path, typer.Option(help="PNG file, replaced where it is there.")] = Path(
        "samples.png"
    ),
) -> None:
    """Draw images from trained weights into one picture; a seed gives every backend the same."""
    with faults_told():
        if out.suffix.lower() != ".png":
            raise ValueError(f"--out {out} is no PNG file; give a name that ends with .png")
        chosen, params = read_run(weights, config)
        wanted = parse_labels(labels, chosen)
        ddim_steps = min(DDIM_STEPS, chosen.timesteps) if method == "ddim" else chosen.timesteps
        steps = ddim_steps if steps is None else steps
        if steps > chosen.timesteps:
            raise ValueError(f"--steps {steps} is above the {chosen.timesteps} of {chosen.name!r}")
        if method == "ddpm" or eta:
            x, noise = sampling_noise(chosen, count, seed, steps)
            noise = noise.astype(np.float32)
        else:
            x, noise = normals(seed, "x_T", 0, (count, *chosen.image_shape)), None
        rows = np.array([wanted[i % len(wanted)] for i in range(count)]) if wanted else None
        model = open_model(context.obj, chosen, params, seed, device)
        images = model.sample(
            x.astype(np.float32),
            noise,
            rows,
            method=method,
            steps=steps,
            eta=eta,
            guidance_scale=guidance_scale,
        )[-1]
        columns = len(wanted) if 1 < len(wanted) <= 16 else math.isqrt(count - 1) + 1
        write_atomically(out, png(grid(images, columns)))
    console.print(f"wrote {out}: {count} images, {method} in {steps} steps, seed {seed}")
