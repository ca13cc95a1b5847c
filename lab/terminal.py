"""What a person sees: the console, errors of one line, progress."""

import contextlib
from collections.abc import Iterator

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

console = Console(highlight=False, soft_wrap=True, markup=False)  # a path may hold [brackets]


def fault(error: Exception) -> str:
    """What went wrong, as one line without Python's names for it."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename or 'a file'}: {error.strerror}"
    return str(error)


def warn(text: str) -> None:
    """A line on standard error that stops nothing."""
    typer.echo(f"warning: {text}", err=True)


@contextlib.contextmanager
def faults_told() -> Iterator[None]:
    """A wrong argument, file or config ends the program with one line and exit status 2."""
    try:
        yield
    except (ValueError, OSError, ImportError) as error:
        typer.echo(f"error: {fault(error)}", err=True)
        raise typer.Exit(2) from error


class Loading:
    """A bar for data that are fetched and read, shown from the first call on: a Progress of S11."""

    def __init__(self) -> None:
        self.bar = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            TimeElapsedColumn(),
            console=console,
        )
        self.tasks: dict[str, object] = {}

    def __call__(self, what: str, done: int, total: int) -> None:
        if what not in self.tasks:
            self.tasks[what] = self.bar.add_task(what, total=total)
            self.bar.start()
        self.bar.update(self.tasks[what], completed=done, total=total)  # type: ignore[arg-type]

    def __enter__(self) -> "Loading":
        return self

    def __exit__(self, *error: object) -> None:
        if self.tasks:
            self.bar.stop()
