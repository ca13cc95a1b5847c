"""`python -m lab quality|solvers RUN`: measures a run, in whichever backend is there."""

import tempfile
import traceback
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from lab import quality as q
from lab import solvers as s
from lab.files import json_text, read_run, write_atomically
from spec.backend import METHODS, Model, one_of
from spec.config import Config

DDIM_STEPS = 50

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # plain help and errors, the same in a terminal and in a log
)

RunFolder = Annotated[Path, typer.Argument(help="Folder of a run, or a .safetensors file.")]
ConfigName = Annotated[
    str | None, typer.Option(help="A config's name or file; default: the folder's own.")
]
BackendModule = Annotated[
    str | None,
    typer.Option(
        help=f"Such as impl_numpy; default: the first there is of {', '.join(q.BACKENDS)}."
    ),
]
Seed = Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Of the noise.")]
Device = Annotated[str, typer.Option(help="auto, cpu or cuda.")]
console = Console(highlight=False, soft_wrap=True)


@app.callback()
def main() -> None:
    """What can be said of a run."""


def report_file(run: Path, chosen: Path | None, what: str = "quality") -> Path:
    """Where the report goes: the chosen file, the run's folder, or beside a file of weights.

    The picture goes beside it. Raises ValueError for a name that does not end with .json.
    """
    if chosen is None:
        return run / f"{what}.json" if run.is_dir() else run.with_name(f"{run.stem}-{what}.json")
    if chosen.suffix != ".json":
        raise ValueError(f"--json {chosen} is no JSON file; give a name that ends with .json")
    return chosen


def check_place(file: Path) -> None:
    """Make the folder of the report. Raises ValueError where report or picture cannot go there."""
    for path in (file, file.with_suffix(".png")):
        if path.is_dir():
            raise ValueError(f"{path} is to be written, but is a folder; give another --json")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=file.parent).close()
    except OSError as error:
        raise ValueError(
            f"{file} cannot be written ({error.strerror}); give another place with --json"
        ) from error


def open_model(
    backend: str | None, config: Config, params: dict[str, np.ndarray], seed: int, device: str
) -> tuple[Model, dict[str, str]]:
    """A backend's model, in the mode that it names first, and what it runs on, which is printed."""
    with console.status("opening the backend"):
        module = q.find_backend(backend)
        model = module.open(config, params, seed=seed, device=device, mode=module.modes[0])
    facts = model.describe()
    console.print(
        f"{module.__name__}: {facts['framework']} on {facts['device']}, {facts['dtype']}, "
        f"{facts['mode']}; config {config.name}"
    )
    return model, {"module": module.__name__, **facts}


def measure(
    run: Path,
    config: str | None,
    backend: str | None,
    scales: list[float],
    method: str,
    steps: int | None,
    count: int | None,
    seed: int,
    device: str,
    file: Path,
) -> bool:
    """Draw and measure digits at every scale; writes the report and the picture.

    Gives whether the quality line is met. Raises ValueError, OSError or SampleError.
    """
    if not all(np.isfinite(scales)):
        raise ValueError("--guidance-scale must be a finite number, such as 1.25")
    one_of("--method", method, METHODS)
    chosen, params = read_run(run, config)
    q.check_config(chosen)
    if steps is None:
        steps = chosen.timesteps if method == "ddpm" else min(DDIM_STEPS, chosen.timesteps)
    check_place(file)  # what cannot be is known before the work
    model, opened = open_model(backend, chosen, params, seed, device)
    with console.status("measuring real digits"):
        real = q.RealDigits(count)
    console.print(
        f"{real.count} digits at each guidance scale, {method} in {steps} steps, seed {seed}"
    )
    labels = q.balanced_labels(real.count, chosen.num_classes)
    digits, measured = [], []
    bar = Progress(
        TextColumn("guidance {task.fields[scale]:g}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("batches"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
    )
    with bar:
        task = bar.add_task("", total=len(scales) * q.batches(real.count), scale=scales[0])
        for scale in scales:
            bar.update(task, scale=scale)
            parts = []
            for part in q.draw(model, chosen, labels, scale, method, steps, seed):
                parts.append(part)
                bar.advance(task)
            digits.append(np.concatenate(parts))
            measured.append(real.measure(digits[-1], labels, scale))
    about = {
        "run": str(run),
        "config": chosen.name,
        "backend": opened,
        "method": method,
        "steps": steps,
        "seed": seed,
    }
    result = q.report(measured, real, about)
    console.print(q.table(measured, real))
    if real.count < real.most:
        console.print(
            f"{real.count} digits are for a quick look; the quality line wants {real.most}: leave "
            "--count out"
        )
    line = (
        f"at least {q.LEAST_SHARE:.0%} read as asked and a ratio of at most {q.LARGEST_RATIO:g}, "
        f"at one guidance scale of at most {q.LARGEST_SCALE:g}"
    )
    met = [f"{m.guidance_scale:g}" for m in measured if m.met]
    console.print(f"quality line ({line}): {'met at ' + ', '.join(met) if met else 'not met'}")
    image = q.picture(measured, digits, labels, real)
    write_atomically(file.with_suffix(".png"), image)
    write_atomically(file, json_text(result))  # last: where it is there, all is
    console.print(f"wrote {file} and {file.with_suffix('.png')}")
    return bool(met)


@app.command()
def quality(
    run: RunFolder,
    config: ConfigName = None,
    backend: BackendModule = None,
    guidance_scale: Annotated[
        list[float] | None,
        typer.Option(help="May be repeated; default 1, 1.25 and 1.5."),
    ] = None,
    method: Annotated[str, typer.Option(help="ddim, dpmpp or ddpm.")] = "ddim",
    steps: Annotated[
        int | None, typer.Option(min=1, help=f"Default {DDIM_STEPS}; all for ddpm.")
    ] = None,
    count: Annotated[
        int | None,
        typer.Option(
            help="Digits at each scale, for a quick look. Default: 359, as many as are held out."
        ),
    ] = None,
    seed: Seed = 0,
    device: Device = "auto",
    json: Annotated[
        Path | None,
        typer.Option(help="Report; the picture goes beside it. Default RUN/quality.json."),
    ] = None,
) -> None:
    """Say how many generated digits are read as asked, and how near they are to real ones.

    Exit status: 0 where the quality line is met at one of the guidance scales, 1 where it is not
    (with fewer digits than 359 it never is), 2 where the command cannot be carried out.
    """
    scales = guidance_scale or list(q.SCALES)
    try:
        file = report_file(run, json)
        met = measure(run, config, backend, scales, method, steps, count, seed, device, file)
    except q.SampleError as error:
        typer.echo(f"quality line not met: {error}", err=True)
        raise typer.Exit(1) from error
    except (ValueError, OSError) as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from error
    except Exception as error:  # such as a GPU's memory that ran out: no verdict, so never 1
        traceback.print_exc()
        raise typer.Exit(2) from error
    raise typer.Exit(0 if met else 1)


def compare(
    run: Path,
    config: str | None,
    backend: str | None,
    count: int,
    seed: int,
    device: str,
    file: Path,
) -> None:
    """Measure the samplers; writes the report and the picture.

    Raises ValueError, OSError or ArithmeticError.
    """
    chosen, params = read_run(run, config)
    s.check_config(chosen)
    check_place(file)  # what cannot be is known before the work
    model, opened = open_model(backend, chosen, params, seed, device)
    scales = s.scales_of(chosen)
    bar = Progress(
        TextColumn("{task.fields[scale]}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("steps"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
    )
    measured = []
    with bar:
        task = bar.add_task("", total=len(scales) * s.work(chosen), scale="")
        for scale in scales:
            bar.update(task, scale=s.guided(scale))
            measured.append(
                s.measure(model, chosen, scale, count, seed, lambda steps: bar.advance(task, steps))
            )
    about = {
        "run": str(run),
        "config": chosen.name,
        "clip": chosen.clip,
        "backend": opened,
        "timesteps": chosen.timesteps,
        "count": count,
        "seed": seed,
    }
    console.print(s.table(measured, chosen.timesteps))
    write_atomically(file.with_suffix(".png"), s.picture(measured, chosen.timesteps))
    write_atomically(file, json_text(s.report(measured, about)))  # last: where it is, all is
    console.print(f"wrote {file} and {file.with_suffix('.png')}")


@app.command()
def solvers(
    run: RunFolder,
    config: ConfigName = None,
    backend: BackendModule = None,
    count: Annotated[int, typer.Option(min=1, help="Images of each sampler.")] = 50,
    seed: Seed = 0,
    device: Device = "auto",
    json: Annotated[
        Path | None,
        typer.Option(help="Report; the picture goes beside it. Default RUN/solvers.json."),
    ] = None,
) -> None:
    """Hold few steps of DDIM and of DPM-Solver++(2M) against DDIM in all steps.

    Exit status: 0, or 2 where the command cannot be carried out.
    """
    try:
        compare(run, config, backend, count, seed, device, report_file(run, json, "solvers"))
    except (ValueError, OSError, ArithmeticError) as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from error


if __name__ == "__main__":
    app(prog_name="python -m lab")
