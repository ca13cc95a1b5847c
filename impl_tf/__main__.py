"""`python -m impl_tf train|sample`."""

from lab.cli import main

if __name__ == "__main__":
    main("impl_tf")
