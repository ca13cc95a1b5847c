"""Faults put into copies of the implementations, each to be caught at the clause that it breaks."""

from conformance.mutants.engine import (
    Mutant,
    MutantError,
    Verdict,
    fit_of_copy,
    golden_cases,
    load_mutants,
    mutated,
    run_copy,
    try_mutant,
)

__all__ = [
    "Mutant",
    "MutantError",
    "Verdict",
    "fit_of_copy",
    "golden_cases",
    "load_mutants",
    "mutated",
    "run_copy",
    "try_mutant",
]
