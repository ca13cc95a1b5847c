"""`python -m conformance.bench`: see conformance/bench/command.py."""

import signal

from conformance.bench.command import main

if __name__ == "__main__":
    # As by Ctrl-C: workers and temporary files go, and what is finished is written.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    main()
