"""`python -m conformance.bench`: see conformance/bench/command.py."""

from conformance.bench.command import main

if __name__ == "__main__":
    main()
