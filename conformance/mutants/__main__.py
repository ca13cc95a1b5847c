"""`python -m conformance.mutants`, the same as `python -m conformance mutants`."""

from conformance.mutants.command import app

__all__ = ["app"]

if __name__ == "__main__":
    app(prog_name="python -m conformance.mutants")
