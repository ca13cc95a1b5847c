"""Tries mutants of one implementation in one column, in the interpreter that has its framework.

The request is one JSON object on stdin; the replies are lines on stdout, each a JSON object.
"""

import dataclasses
import json
import os
import sys
from typing import Any, TextIO

from conformance.mutants import auto
from conformance.mutants.engine import (
    MutantError,
    Verdict,
    faultless_problem,
    load_mutants,
    try_mutant,
)
from conformance.runner import UsageError
from spec.goldens import GoldenError, Goldens


def row(verdict: Verdict) -> dict[str, Any]:
    """All that a report says of a verdict."""
    mutant = verdict.mutant
    return {
        "impl": mutant.impl,
        "name": mutant.name,
        "fault": mutant.fault,
        "expected": {"clause": mutant.clause, "block": mutant.block, "cause": mutant.cause},
        "pending": mutant.pending,
        "dtype": verdict.dtype,
        "mode": mutant.mode,
        "killed": verdict.killed,
        "case": verdict.case,
        "clause": verdict.clause,
        "block": verdict.block,
        "margin": verdict.margin if verdict.killed else None,
        "cause_named": verdict.cause_named,
        "problem": verdict.problem,
    }


def replies(request: dict[str, Any]) -> Any:
    """The rows of the mutants asked for, one by one."""
    goldens = Goldens()
    if "auto" in request:
        part, every = request["auto"]["part"], request["auto"]["every"]
        for found in auto.run_auto(request["impl"], goldens, tuple(part), every):
            fields = dataclasses.asdict(found.mutant)
            del fields["source"]
            yield {**fields, "by": found.by, "reason": found.reason}
        return
    names = set(request["names"])
    mutants = [mutant for mutant in load_mutants(request["impl"]) if mutant.name in names]
    verdicts = []
    for mutant in mutants:
        verdicts.append(try_mutant(mutant, goldens, request["dtype"]))
        yield row(verdicts[-1])
    if problem := faultless_problem(verdicts, goldens):
        raise MutantError(problem)


def answer(request: dict[str, Any], out: TextIO) -> None:
    """Write a line for each row, and one more that says how it ended."""
    try:
        for reply in replies(request):
            print(json.dumps({"row": reply}), file=out, flush=True)
        end = {"end": ""}
    except (MutantError, UsageError, GoldenError) as error:
        end = {"end": str(error)}
    print(json.dumps(end), file=out, flush=True)


if __name__ == "__main__":
    replies_to = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what a framework prints is no reply
    answer(json.loads(sys.stdin.readline()), replies_to)
