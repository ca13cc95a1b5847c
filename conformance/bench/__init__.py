"""The benchmark: train steps timed after they were checked in the very process that is timed."""

from conformance.bench.steps import (
    DTYPE,
    ROUND_SECONDS,
    Timer,
    Timing,
    batch_of,
    peak_memory,
    reference_shares,
    reset_peak_memory,
    run_timing,
    timing_configs,
    verify,
)

__all__ = [
    "DTYPE",
    "ROUND_SECONDS",
    "Timer",
    "Timing",
    "batch_of",
    "peak_memory",
    "reference_shares",
    "reset_peak_memory",
    "run_timing",
    "timing_configs",
    "verify",
]
