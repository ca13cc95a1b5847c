"""`python -m impl_torch train|sample ...`: the command line of lab, on this backend."""

from lab.cli import main

if __name__ == "__main__":
    main("impl_torch")
