"""`python -m impl_NAME train|sample ...`: trains one backend on a dataset, and draws with it."""

import dataclasses
import importlib
import json
import math
import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
)

from lab import pictures
from lab.events import EVENTS, check_tensorboard
from lab.files import FileError, read_run, write_atomically
from lab.sample import DDIM_STEPS, Plan, batch_size, draw, even_moments, parse_labels
from lab.state import (
    check_same_run,
    circumstances,
    data_digest,
    read_state,
)
from lab.terminal import console, fault, faults_told, warn
from lab.train import (
    Metrics,
    Run,
    alone_in,
    check_data,
    choose_config,
    clean_folder,
    fit_config,
    holds_run,
    run_name,
    training_data,
)
from spec.backend import METHODS, MODES, one_of
from spec.config import Config

STEPS = 2000
PRECISIONS = ("float32", "bf16")
STRIP_COLUMNS = 10  # moments that a strip shows, noise and sample among them
GIF_FRAMES = 50
FAILED = 1
INTERRUPTED = 130  # what a shell reports after Ctrl-C

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # plain help and errors, the same in a terminal and in a log
)

SeedOption = typer.Option(min=0, max=2**32 - 1, help="Of every random number; default 0.")
DeviceOption = typer.Option(help="auto, cpu or cuda; default auto.")
ModeOption = typer.Option(
    help="eager, compiled or parallel (slices of the batch side by side); default: the framework's."
)
PrecisionOption = typer.Option(
    help="float32 or bf16: of the network's arithmetic; weights and state are float32 always."
)


def main(backend: str) -> None:
    """Run the command line on the backend of this module name, such as `impl_torch`."""
    app(prog_name=f"python -m {backend}", obj=backend)


def find_backend(backend: str, mode: str | None, precision: str | None):
    """The backend's module. Raises ValueError where it does not compute as asked."""
    one_of("--precision", precision or PRECISIONS[0], PRECISIONS)
    if mode is not None:
        one_of("--mode", mode, MODES)
    with console.status(f"loading {backend}"):
        module = importlib.import_module(backend)
    if precision is not None and precision not in module.dtypes:
        able = [name for name in PRECISIONS if name in module.dtypes]
        raise ValueError(
            f"--precision {precision} is not for {backend}, which has {' and '.join(able)}; take "
            "that, or one of the frameworks"
        )
    return module


def open_model(
    module,
    config: Config,
    params,
    seed: int,
    device: str | None,
    mode: str | None,
    precision: str | None,
):
    """The backend's model; what it runs on is printed. Without a mode, the one it names first."""
    model = module.open(
        config,
        params,
        seed=seed,
        dtype=precision or PRECISIONS[0],
        device=device or "auto",
        mode=mode or module.modes[0],
    )
    facts = model.describe()
    console.print(
        f"{facts['framework']} on {facts['device']}, {facts['dtype']}, {facts['mode']}; "
        f"config {config.name}"
    )
    return model


def command_to_go_on(context: typer.Context, folder: Path) -> str:
    """The command that this run goes on with: this one, with its folder and --resume."""
    words = [sys.orig_argv[0], "-m", context.obj, "train"]
    for parameter in context.command.params:
        name, value = str(parameter.name), context.params[str(parameter.name)]
        source = context.get_parameter_source(name)
        given = source is not None and source.name == "COMMANDLINE"
        if not given or name in ("out", "resume", "overwrite"):
            continue
        words += [parameter.opts[0]] if value is True else [parameter.opts[0], str(value)]
    return shlex.join([*words, "--out", str(folder), "--resume"])


@app.command()
def train(
    context: typer.Context,
    config: Annotated[
        str | None,
        typer.Option(help="A config's name, or a .toml file; default the dataset's, or digits."),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            help="digits, mnist, fashion_mnist, cifar10 or folder:PATH; default the config's."
        ),
    ] = None,
    data_dir: Annotated[
        Path | None,
        typer.Option(help="Folder that has the dataset's files; default: they are fetched."),
    ] = None,
    steps: Annotated[
        int | None, typer.Option(min=1, help=f"Updates of the weights in all; default {STEPS}.")
    ] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="In place of the config's.")] = None,
    seed: Annotated[int | None, SeedOption] = None,
    shared_noise: Annotated[
        bool,
        typer.Option("--shared-noise", help="Draw from the stream that all backends share (S10)."),
    ] = False,
    device: Annotated[str | None, DeviceOption] = None,
    mode: Annotated[str | None, ModeOption] = None,
    precision: Annotated[str | None, PrecisionOption] = None,
    sample_every: Annotated[
        int | None, typer.Option(min=1, help="Steps between pictures, in samples/ of the folder.")
    ] = None,
    save_every: Annotated[
        int | None, typer.Option(min=1, help="Steps between saves; default: about a minute.")
    ] = None,
    tensorboard: Annotated[
        bool, typer.Option("--tensorboard", help="Write curves and pictures for TensorBoard too.")
    ] = False,
    out: Annotated[Path | None, typer.Option(help="Folder; default runs/CONFIG-BACKEND.")] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the state in the folder, to --steps.")
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a run that stands in the folder.")
    ] = False,
) -> None:
    """Train from new weights; the averaged weights (EMA) are written to a folder.

    Ctrl-C ends it early, keeps what is there, and prints the command that goes on.
    """
    with faults_told():
        if resume and overwrite:
            raise ValueError("--resume goes on, --overwrite begins anew; give one of them")
        if data is not None:
            check_data(data)
        folder, chosen = out, None
        if folder is None or config is not None or not resume:
            chosen = choose_config(config, data)
            name = run_name(chosen, data or chosen.data)
            folder = out or Path("runs") / f"{name}-{context.obj.removeprefix('impl_')}"
        saved = read_state(folder) if resume else None
        if saved is not None and config is None:
            chosen = saved.config
        if saved is None and holds_run(folder) and not overwrite:
            raise FileError(
                f"{folder} holds a run; go on with it by --resume, choose another --out, or "
                "replace it by --overwrite"
            )
        facts: dict[str, Any] = {}  # of the run so far
        if saved is not None:
            facts = saved.facts
            steps = facts["steps"] if steps is None else steps
            if steps < saved.state["step"]:
                raise FileError(
                    f"{folder} is at step {saved.state['step']}, beyond --steps {steps}; give more"
                )
        assert chosen is not None
        if batch_size is not None:
            chosen = chosen.replace(batch_size=batch_size)
        if data is None:
            data = facts.get("data", chosen.data)
            data_dir = facts.get("data_dir") if data_dir is None else data_dir
        seed = facts.get("seed", 0) if seed is None else seed
        precision = facts.get("dtype", PRECISIONS[0]) if precision is None else precision
        device = facts.get("device_option", "auto") if device is None else device
        mode = facts.get("mode") if mode is None else mode
        sample_every = facts.get("sample_every") if sample_every is None else sample_every
        save_every = facts.get("save_every") if save_every is None else save_every
        tensorboard = tensorboard or facts.get("tensorboard", False)
        if tensorboard:
            check_tensorboard()
        module = find_backend(context.obj, mode, precision)
        images, labels = training_data(chosen, data, data_dir)
        if saved is None or config is not None:  # else the data must be the run's own in any case
            fitted = fit_config(chosen, data, labels)
            if fitted.num_classes != chosen.num_classes:
                console.print(
                    f"num_classes is {fitted.num_classes}, as {data} has it, in place of "
                    f"{chosen.num_classes}"
                )
            chosen = fitted
        model = open_model(module, chosen, None, seed, device, mode, precision)
        now = {
            "config": dataclasses.asdict(chosen),
            "seed": seed,
            "shared_noise": shared_noise or facts.get("shared_noise", False),
            "backend": context.obj,
            "dtype": precision,
            "data": data,
            "data_dir": None if data_dir is None else str(data_dir),
            "data_sha256": data_digest(images, labels),
            "steps": steps or STEPS,
            "device_option": device,
            "sample_every": sample_every,
            "save_every": save_every,
            "tensorboard": tensorboard,
            **circumstances(model.describe()),
        }
        now = json.loads(json.dumps(now))  # lists for tuples, as they are read back
        if saved is not None:
            differences = check_same_run(facts, now, folder)
            if differences:
                warn(f"{'; '.join(differences)}: the last bits may differ from an unbroken run's")
            console.print(f"goes on at step {saved.state['step']} of {now['steps']}")
        folder.mkdir(parents=True, exist_ok=True)
        with alone_in(folder):
            clean_folder(folder, saved.state["step"] if saved else None)
            run = Run(
                model,
                chosen,
                now,
                folder,
                now["steps"],
                state=saved.state if saved else None,
                sample_every=sample_every,
                save_every=save_every,
            )
            metrics = Metrics(folder, run.step, tensorboard)
            if tensorboard:
                console.print(f"to watch it: tensorboard --logdir {folder / EVENTS}")
            follow(run, images, labels, metrics, command_to_go_on(context, folder))


def follow(run: Run, images: np.ndarray, labels: np.ndarray, metrics: Metrics, go_on: str) -> None:
    """Train, and say how it ended: done, stopped by Ctrl-C, or by a fault."""
    try:
        finished = run.train(images, labels, metrics)
    except ArithmeticError as error:
        typer.echo(
            f"error: {error}; {kept(run)}. Lower learning_rate in a config of your own, and train "
            "anew",
            err=True,
        )
        raise typer.Exit(FAILED) from error
    except (OSError, KeyboardInterrupt) as error:
        reason = fault(error) if isinstance(error, OSError) else "stopped at once"
        typer.echo(f"error: {reason}; {kept(run)}", err=True)
        if run.saved_step is not None:
            typer.echo(f"go on with: {go_on}", err=True)
        raise typer.Exit(FAILED if isinstance(error, OSError) else INTERRUPTED) from error
    finally:
        metrics.close()
    if run.recent:
        loss = sum(run.recent) / len(run.recent)
        console.print(f"mean loss of the last {len(run.recent)} steps {loss:.4f}")
    if finished:
        console.print(f"trained {run.step} steps; wrote {run.folder}")
        return
    console.print(f"stopped after {run.step} of {run.goal} steps; all of it is kept")
    console.print(f"go on with: {go_on}")
    raise typer.Exit(INTERRUPTED)


def kept(run: Run) -> str:
    """What is on disk of a run that a fault ended."""
    if run.saved_step is None:
        return "nothing was written"
    return f"the state of step {run.saved_step} is kept in {run.folder}"


@app.command()
def sample(
    context: typer.Context,
    weights: Annotated[
        Path, typer.Option(help="Folder of a run or of diffusers, or a .safetensors file.")
    ],
    config: Annotated[
        str | None, typer.Option(help="A config's name or file; default: the folder's own.")
    ] = None,
    method: Annotated[str, typer.Option(help=f"{', '.join(METHODS)}.")] = "ddim",
    steps: Annotated[
        int | None, typer.Option(min=1, help=f"Default {DDIM_STEPS}; all for ddpm.")
    ] = None,
    eta: Annotated[float, typer.Option(help="Noise of ddim's steps, 0 to 1.")] = 0.0,
    guidance_scale: Annotated[
        float | None, typer.Option(help="Above 1: nearer to the label (S6).")
    ] = None,
    labels: Annotated[
        str | None, typer.Option(help="Such as 3 or 0,1,2; repeated to fill; default: all classes.")
    ] = None,
    count: Annotated[int, typer.Option(min=1, help="Number of images.")] = 20,
    seed: Annotated[int, SeedOption] = 0,
    device: Annotated[str | None, DeviceOption] = None,
    mode: Annotated[str | None, ModeOption] = None,
    precision: Annotated[str | None, PrecisionOption] = None,
    out: Annotated[Path, typer.Option(help="PNG file, replaced where it is there.")] = Path(
        "samples.png"
    ),
    strip: Annotated[
        bool, typer.Option("--strip", help="Show how they come about: a row an image.")
    ] = False,
    gif: Annotated[Path | None, typer.Option(help="GIF file too, of how they come about.")] = None,
) -> None:
    """Draw images from trained weights into one picture; a seed gives every backend the same."""
    with faults_told():
        check_file("--out", out, ".png")
        if gif is not None:
            check_file("--gif", gif, ".gif")
        one_of("--method", method, METHODS)
        chosen, params = read_run(weights, config)
        wanted = parse_labels(labels, chosen)
        if steps is None:
            steps = chosen.timesteps if method == "ddpm" else min(DDIM_STEPS, chosen.timesteps)
        if steps > chosen.timesteps:
            raise ValueError(f"--steps {steps} is above the {chosen.timesteps} of {chosen.name!r}")
        module = find_backend(context.obj, mode, precision)
        rows = np.resize(wanted, count) if wanted else None
        plan = Plan(count, rows, method, steps, eta, guidance_scale, seed)
        model = open_model(module, chosen, params, seed, device, mode, precision)
        columns = even_moments(steps, STRIP_COLUMNS) if strip else [steps]
        frames = even_moments(steps, GIF_FRAMES) if gif else [steps]
        moments = sorted({*columns, *frames})
        drawn = draw_all(model, chosen, plan, moments)
        across = len(wanted) if 1 < len(wanted) <= 16 else math.isqrt(count - 1) + 1
        if strip:
            picture = pictures.strip(drawn[[moments.index(at) for at in columns]])
        else:
            picture = pictures.grid(drawn[-1], across)
        write_atomically(out, pictures.png(picture))
        if gif is not None:
            film = [pictures.grid(drawn[moments.index(at)], across) for at in frames]
            write_atomically(gif, pictures.gif(film))
    console.print(f"wrote {out}: {count} images, {method} in {steps} steps, seed {seed}")
    if gif is not None:
        console.print(f"wrote {gif}: the same in {len(frames)} frames")


def check_file(option: str, path: Path, suffix: str) -> None:
    """Raise ValueError where this cannot be the name of a file of this kind."""
    kind = suffix[1:].upper()
    if path.suffix.lower() != suffix:
        raise ValueError(f"{option} {path} is no {kind} file; give a name that ends with {suffix}")
    if path.is_dir():
        raise ValueError(f"{option} {path} is a folder; give the name of a {kind} file")


def draw_all(model, config: Config, plan: Plan, moments: list[int]) -> np.ndarray:
    """[len(moments), count, H, W, C] of all images, with a line that shows the time it takes."""
    size = batch_size(config, plan)
    batches = math.ceil(plan.count / size)
    columns: list[ProgressColumn] = [
        SpinnerColumn(),
        TextColumn("{task.description}"),
        TimeElapsedColumn(),
    ]
    if batches > 1:
        columns += [BarColumn(), MofNCompleteColumn(), TextColumn("batches")]
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(f"drawing {plan.count} images", total=batches)
        parts = []
        for part in draw(model, config, plan, moments):
            parts.append(part)
            progress.advance(task)
    return np.concatenate(parts, axis=1)
