"""Says what a failure points at: the simple mistake it looks like, the step, the first block."""

import difflib
import itertools
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from conformance.compare import Finding, euclidean, one_error, relative_error
from conformance.execute import NEAR
from spec.config import Config
from spec.goldens import Case, Output
from spec.params import block_shapes, blocks

if TYPE_CHECKING:
    from conformance.runner import Result

SHARE = 0.01  # of the error may be left where a simple mistake is to explain it
LISTED = 5  # tensors named in a list
NAMED = 6  # rows, or times, named in a list
COMPARED = 50  # names, of a result's thousands, that are held against each other
BY_ROW = ("t", "t_prev", "labels")  # inputs with a number for each row that tell rows apart
FLOAT32_ERRORS = (5e-9, 5e-6)  # relative: a rounding is at most 6e-8, and grows on its way
ROUNDED = (
    "the error is of the size of float32's rounding: look for a number that is made in float32, or "
    "a small constant such as epsilon"
)
EXACT_ELSEWHERE = (
    "in float64 this case passes, so the formula is right: look for what is computed in float32 "
    "and has to be computed in float64 and cast once, or for a small constant such as epsilon"
)
# What makes a result of another dtype, by that dtype.
DTYPES = {
    "float64": (
        "float64 came in on the way, and all after it is float64: np.sqrt or np.exp of a whole "
        "number, an entry of a float64 table, an array made without a dtype; cast it there"
    ),
    "float32": "something is made in float32: work in the dtype that open was given, self.dtype",
}
# Table of S1 -> the tables that are made from it.
_POSTERIOR = ("posterior_variance", "posterior_mean_coef1", "posterior_mean_coef2")
_OF_CUMPROD = (
    "alphas_cumprod_prev",
    "sqrt_alphas_cumprod",
    "sqrt_one_minus_alphas_cumprod",
    "sqrt_recip_alphas_cumprod",
    "sqrt_recipm1_alphas_cumprod",
    *_POSTERIOR,
)
MADE_FROM = {
    "betas": ("alphas", "alphas_cumprod", *_OF_CUMPROD),
    "alphas": ("alphas_cumprod", *_OF_CUMPROD),
    "alphas_cumprod": _OF_CUMPROD,
    "alphas_cumprod_prev": _POSTERIOR,
}
# What a case's name tells of its causes: those that hold these words come first. The rest of the
# list keeps its order, most frequent first.
BY_NAME = (
    ("_mean_100", ("one-pass variance",)),
    ("_sigma_0.01", ("epsilon 1e-5", "epsilon added outside", "an unbiased one")),
    ("_again", ("not zeroed between calls",)),
    ("_dropped", ("dropout mask", "null class")),
    ("ddpm_step_large", ("noise added at t=0", "variance small and large")),
    ("ddpm_step_small", ("variance small and large",)),
    ("_unclipped", ("although the config turns it off",)),
    ("_clipped", ("clip missing", "clipped x0")),
    ("ddim_step_eta0", ("the end taken as", "eps not derived")),
    ("apply_clipped", ("clip by",)),
    ("apply_small", ("warm-up", "EMA before the update")),
    ("apply_late", ("step counted from 0", "not carried over")),
    ("apply_sequence", ("not carried over", "frozen")),
    ("guided", ("guidance as", "null")),
    ("guided_eta", ("guidance as", "null")),
    ("guided_0", ("a scale of 0", "guidance as", "null")),
    ("ddim_eta", ("eta or sigma", "frozen")),
)
# The same by the first table that is wrong.
BY_TABLE = {
    "betas": ("endpoint", "not capped"),
    "alphas_cumprod_prev": ("alphas_cumprod_prev",),
    "sqrt_alphas_cumprod": ("swapped",),
    "sqrt_one_minus_alphas_cumprod": ("swapped",),
    **dict.fromkeys(_POSTERIOR, ("posterior table",)),
}
# What shows in the rows of one number alone: the cause stands first where they are wrong and no
# others, and last where they are right.
ONE_NUMBER = {
    "ddim_step": ("t_prev", "-1", "the end taken as"),
    "ddpm_step": ("t", "0", "noise added at t=0"),
}
IN_LOW_PRECISION = ("float32", "low precision", "rounded on the way")
IN_FLOAT32_ALONE = ("one-pass", *IN_LOW_PRECISION, "epsilon")
NOT_FINITE = ("NaN", "logarithm of 0", "not capped", "[-1]", "the last step", "alphas_cumprod[0]")
IN_BACKWARD = ("backward", "not zeroed", "softmax diff", "no gradient", "overwritten", "derivative")


def clues(
    case: Case,
    findings: Sequence[Finding],
    results: Mapping[str, np.ndarray],
    expected: Callable[[Output], np.ndarray],
    hide: bool = False,
    by_row: Mapping[str, np.ndarray] | None = None,
) -> list[str]:
    """Lines on a failed case that only the arrays themselves can tell.

    hide: leave out how the golden can be made of what came, which gives every element away.
    by_row: those inputs of the case that BY_ROW names, one number a row.
    """
    outputs = {output.name: output for output in case.outputs}
    endless = [finding.output for finding in findings if finding.problem == "not finite"]
    lines = []
    if endless:
        got = results[endless[0]]
        lines.append(not_finite(case, endless[0], got))
        lines += which_rows(case, endless[0], ~np.isfinite(got), by_row or {})
    if len(endless) > 1:
        lines.append(f"{len(endless)} results hold NaN or infinity")
    kinds = [f for f in findings if f.problem == "dtype" and f.output in results]
    if kinds:
        got_dtype = str(results[kinds[0].output].dtype)
        lines.append(DTYPES.get(got_dtype, "cast the result to the dtype that open was given"))
    lines += _misspelt(findings)
    bad = [finding for finding in findings if finding.problem in ("tolerance", "shape")]
    worst = first_wrong(case, findings) or max(bad, key=lambda f: f.ratio, default=None)
    if worst is None or worst not in bad:
        return lines
    output = outputs[worst.output]
    golden = expected(output).astype(np.float64)
    got = results[output.name].astype(np.float64)
    whole = output.stride == 1
    if whole or worst.problem == "tolerance":
        with np.errstate(all="ignore"):
            kept = got if whole else got.reshape(-1)[:: output.stride]
            likeness = looks_like(kept, golden, whole)
            double = results[output.name].dtype == np.float64
            rounded = not likeness and whole and double and _rounded_once(got, golden)
        if likeness and not hide:
            lines.append(f"{output.name} {likeness}")
        elif rounded:
            lines.append(ROUNDED)
    if worst.problem == "tolerance":
        wrong = out_alone(worst, got, golden, output.stride, _axis_of_rows(case))
        lines += which_rows(case, output.name, wrong, by_row or {})
    if case.call == "sample" and worst.problem == "tolerance":
        step = _first_step(worst, got, golden, output.stride)
        lines.append(f"the first step out of tolerance is {step} of {len(got)}")
    return lines


def _misspelt(findings: Sequence[Finding]) -> list[str]:
    """Lines on results that are missing where one of nearly the same name came."""
    extra = [finding.output for finding in findings if finding.problem == "extra"][:COMPARED]
    missing = [finding.output for finding in findings if finding.problem == "missing"][:COMPARED]
    lines = []
    for name in missing:
        if near := difflib.get_close_matches(name, extra, 1, NEAR):
            lines.append(f"{near[0]} came and is no result: should it be {name}?")
    return lines[:LISTED]


def _rounded_once(got: np.ndarray, expected: np.ndarray) -> bool:
    """Whether they differ by about as much as a rounding to float32 on the way makes."""
    if got.shape != expected.shape or not expected.any():
        return False
    low, high = FLOAT32_ERRORS
    return low < euclidean(got - expected) / euclidean(expected) < high


def _first_step(finding: Finding, got: np.ndarray, golden: np.ndarray, stride: int) -> int:
    """Number, from 1, of the first step of a trajectory that is out of the tolerance.

    golden holds every stride-th element. A step's error stands beside that step's own size.
    """
    limits = {measure.norm: measure.tolerance for measure in finding.measures}
    limit = limits.get("max", limits.get("l2", 0.0))
    kept = np.arange(0, got.size, stride)
    step = kept // (got.size // len(got))
    errors, sizes = np.zeros(len(got)), np.zeros(len(got))
    np.maximum.at(errors, step, np.abs(got.reshape(-1)[kept] - golden.reshape(-1)))
    np.maximum.at(sizes, step, np.abs(golden.reshape(-1)))
    over = errors > limit * sizes
    return int(np.argmax(over if over.any() else errors)) + 1


def looks_like(got: np.ndarray, expected: np.ndarray, whole: bool = True) -> str | None:
    """How a simple mistake makes `got` of `expected`, or None; it must explain 99 % of the error.

    Both are float64, of any shape; not whole: they are a choice of elements, in a row.
    """
    if got.shape != expected.shape:
        if got.ndim == expected.ndim:
            for axes in itertools.permutations(range(got.ndim)):
                turned = expected.transpose(axes)
                if turned.shape == got.shape and np.allclose(got, turned, rtol=1e-4):
                    return f"is the expected value with axes in the order {axes}"
        if got.size == expected.size and np.allclose(got.ravel(), expected.ravel(), rtol=1e-4):
            return "holds the expected values in another shape"
        return None
    error = euclidean(got - expected)
    if not np.isfinite(error):
        return None

    def explains(guess: np.ndarray) -> bool:
        return euclidean(got - guess) <= SHARE * error

    if not got.any():
        return "is zero everywhere"
    if explains(-expected):
        return "has the opposite sign"
    if got.size > 1:
        power = float(np.sum(expected * expected))
        factor = float(np.sum(got * expected)) / power if power else 0.0
        if factor and explains(factor * expected):
            return f"is {factor:.10g} times the expected value"
        shift = float(np.mean(got - expected))
        if explains(expected + shift):
            return f"is the expected value {'+' if shift > 0 else '-'} {abs(shift):.6g}"
    for name, guess in _rearranged(expected) if whole else ():
        if explains(guess):
            return f"is the expected value {name}"
    return None


def _rearranged(expected: np.ndarray) -> Iterable[tuple[str, np.ndarray]]:
    for axis in range(expected.ndim):
        size = expected.shape[axis]
        if size < 2:
            continue
        yield f"reversed along axis {axis}", np.flip(expected, axis)
        yield f"moved by one along axis {axis}", np.roll(expected, 1, axis)
        yield f"moved by minus one along axis {axis}", np.roll(expected, -1, axis)
        if size % 2 == 0 and size > 2:
            halves = np.roll(expected, size // 2, axis)
            yield f"with the two halves of axis {axis} exchanged", halves
    if expected.ndim <= 5:
        for axes in itertools.permutations(range(expected.ndim)):
            turned = expected.transpose(axes)
            if list(axes) != sorted(axes) and turned.shape == expected.shape:
                yield f"with axes in the order {axes}", turned


def first_wrong(case: Case, findings: Sequence[Finding]) -> Finding | None:
    """The first result that is wrong, where results are made from one another: tables and taps."""
    if case.call == "schedule":  # whose goldens stand in the order in which S1 makes them
        return next((finding for finding in findings if not finding.ok), None)
    return first_tap(case, findings)


def first_tap(case: Case, findings: Sequence[Finding]) -> Finding | None:
    """The first block's tap that is out of tolerance, in the order in which the blocks run."""
    if case.call != "taps":
        return None
    by_name = {finding.output: finding for finding in findings}
    order = (by_name.get(block.name) for block in blocks(case.config))
    return next((f for f in order if f and not f.ok and f.problem != "missing"), None)


def _axis_of_rows(case: Case) -> int:
    return 1 if case.call == "sample" else 0


def out_alone(
    finding: Finding, got: np.ndarray, golden: np.ndarray, stride: int, axis: int
) -> np.ndarray:
    """Which rows would be out of tolerance if all others were right, as a mask that broadcasts.

    A row is one index of the axis. golden holds every stride-th element.
    """
    shape = [1] * got.ndim
    if got.ndim <= axis:
        return np.zeros(shape, bool)
    flat, kept = golden.reshape(-1), np.arange(0, got.size, stride)
    row = np.unravel_index(kept, got.shape)[axis]
    shape[axis] = count = got.shape[axis]
    with np.errstate(all="ignore"):
        difference = np.abs(got.reshape(-1)[kept] - flat)
        largest = difference.max()
        peak, relative = np.zeros(count), np.zeros(count)
        np.maximum.at(peak, row, difference)
        np.maximum.at(relative, row, relative_error(difference, flat))
        squares = np.bincount(row, (difference / largest) ** 2, count)
        shares = {
            "l2": np.sqrt(squares / squares.sum()),
            "max": peak / largest,
            "abs": peak / largest,
        }
        wrong = np.zeros(count, bool)
        for measure in finding.measures:
            whole = one_error(measure.norm, difference, flat)
            error = relative if measure.norm == "each" else whole * shares.get(measure.norm, 0.0)
            wrong |= ~(error <= measure.tolerance)
    return (wrong & (peak > 0)).reshape(shape)


def which_rows(
    case: Case, output: str, wrong: np.ndarray, by_row: Mapping[str, np.ndarray]
) -> list[str]:
    """A line on which rows of a result, or which times of a table, are wrong; [] for none or all.

    wrong: a mask of the result's elements, or one that broadcasts to it.
    """
    axes = _axes(case, output)
    axis = next((i for i, word in enumerate(axes) if word in ("rows", "times")), None)
    if axis is None or wrong.ndim <= axis:
        return []
    count = wrong.shape[axis]
    bad = np.moveaxis(wrong, axis, 0).reshape(count, -1).any(axis=1)
    rows = [int(i) for i in np.flatnonzero(bad)]
    if not rows or len(rows) == count:
        return []
    if axes[axis] == "times":
        return [f"{output} is wrong at {_times(rows, count)}; at the others it is right"]
    told = [
        f"{name} = {_listed([str(values[i]) for i in rows])}"
        for name, values in by_row.items()
        if values.shape == (count,)
    ]
    where = f" ({'; '.join(told)})" if told else ""
    which, verb = ("row", "is") if len(rows) == 1 else ("rows", "are")
    return [
        f"{output}: {which} {_listed([str(i) for i in rows])} of {count}{where} {verb} wrong; "
        "the others are right"
    ]


def _times(times: list[int], count: int) -> str:
    """Some of the times 0 .. count-1 in words."""
    if len(times) > NAMED and times[-1] - times[0] + 1 == len(times):
        ends = f"t = {times[0]} to {times[-1]}"
        return f"{len(times)} of {count} times, {ends}"
    few = _listed([str(t) for t in times])
    return f"t = {few}" if len(times) <= NAMED else f"{len(times)} of {count} times, t = {few}"


def _listed(words: list[str]) -> str:
    """ "1", "1 and 2", "1, 2 and 3", "1, 2, 3, ... and 9"."""
    if len(words) > NAMED:
        words = [*words[: NAMED - 2], "...", words[-1]]
    return " and ".join(filter(None, [", ".join(words[:-1]), words[-1]]))


def not_finite(case: Case, output: str, got: np.ndarray) -> str:
    """How many steps, rows or entries of a result hold NaN or infinity, and which is the first."""
    bad = ~np.isfinite(got)
    parts = []
    for axis, word in enumerate(_axes(case, output)[: got.ndim]):
        held = bad.any(axis=tuple(i for i in range(got.ndim) if i != axis))
        parts.append(f"{int(held.sum())} of {len(held)} {word}")
    where = f" in {', '.join(parts)}" if parts else ""
    first = tuple(int(i) for i in np.unravel_index(int(np.argmax(bad)), got.shape))
    return f"{output} holds NaN or infinity{where}; the first at {first}"


def _axes(case: Case, output: str) -> tuple[str, ...]:
    """What the first axes of a result count."""
    if case.call == "sample":
        return "steps", "rows"
    if case.call == "schedule":
        return ("times",)
    if output == "loss":
        return ("steps",)
    if case.call in ("loss_and_grads", "apply_gradients", "train_steps"):
        return ()  # a parameter's axes count no rows
    return ("rows",)


def likely(result: "Result") -> tuple[str, ...]:
    """The causes of a failed case, first those that its name and its findings speak for.

    They are of numbers, so there are none where a name or a dtype alone is wrong.
    """
    case, bad = result.case, [finding for finding in result.findings if not finding.ok]
    if bad and all(finding.problem in ("dtype", "missing", "extra") for finding in bad):
        return ()
    words: list[str] = []
    for end, tell in BY_NAME:
        if case.id.endswith(end):
            words += tell
    if EXACT_ELSEWHERE in result.clues:
        words = [*IN_FLOAT32_ALONE, *words]
    if ROUNDED in result.clues:
        words += IN_LOW_PRECISION
    if any(finding.problem == "not finite" for finding in bad):
        words += NOT_FINITE
    if case.call == "schedule" and bad:
        words += BY_TABLE.get(bad[0].output, ())
    if case.call == "predict_x0_eps" and [finding.output for finding in bad] == ["eps"]:
        words.append("eps not derived")
    if case.call == "loss_and_grads" and bad and all(f.output != "loss" for f in bad):
        words += IN_BACKWARD
    first, last = _by_rows(result)
    words = [*first, *words]

    def rank(cause: str) -> int:
        if any(word in cause for word in last):
            return len(words) + 1
        return next((i for i, word in enumerate(words) if word in cause), len(words))

    return tuple(sorted(case.causes, key=rank))


def _by_rows(result: "Result") -> tuple[list[str], list[str]]:
    """The causes that the numbers of the wrong rows speak for, and those they speak against."""
    name, number, cause = ONE_NUMBER.get(result.case.call, ("", "", ""))
    told = [re.search(rf"[(; ]{name} = ([^;)]*)", clue) for clue in result.clues if name]
    for found in filter(None, told):
        numbers = re.findall(r"-?\d+", found[1])
        if number not in numbers and "..." not in found[1]:
            return [], [cause]
        if set(numbers) == {number}:
            return [cause], []
    return [], []


def parameter_blocks(config: Config) -> dict[str, str]:
    """Parameter -> the block that holds it, in the order in which the blocks run."""
    return {p: block.name for block in blocks(config) for p in block_shapes(config, block)}


def blame(result: "Result", column: Sequence["Result"]) -> tuple[str | None, list[str]]:
    """The block that a failure points at, if any, and lines that say so.

    `column` holds the results of the same backend and dtype, among them the blocks run alone.
    """
    case = result.case
    if case.call == "run_block":
        return case.options["name"], [_on_block(case, column)]
    bad = [finding for finding in result.findings if not finding.ok]
    if case.call == "schedule":
        return None, _on_tables(result.findings)
    if case.call == "taps":
        tap = first_tap(case, result.findings)
        return (tap.output, [_on_tap(case, tap.output, column)]) if tap else (None, [])
    tapped, already = _taps_of(case, column)
    if case.call == "predict":
        return tapped, already
    if case.call == "loss_and_grads":
        block, lines = _on_gradients(case, bad)
        return block, [*already, *lines]
    if case.call == "apply_gradients":
        return None, _on_state(result.findings)
    if case.call == "train_steps":
        return None, [*already, *_on_state(result.findings)]
    return None, already if case.call == "sample" else []


def across(columns: Mapping[str, Sequence["Result"]]) -> None:
    """Put a clue into the failures of one backend that another of its dtypes does not have.

    columns: the results by dtype.
    """
    right = {result.case.id for result in columns.get("float64", ()) if result.ok}
    for result in columns.get("float32", ()):
        bad = {finding.problem for finding in result.findings if not finding.ok}
        if result.status == "failed" and result.case.id in right and bad <= {"tolerance"}:
            result.clues.append(EXACT_ELSEWHERE)


def _on_tables(findings: Sequence[Finding]) -> list[str]:
    """Which tables are wrong, and which of them are made from the first."""
    wrong = [finding.output for finding in findings if not finding.ok]
    right = [finding.output for finding in findings if finding.ok]
    lines = [f"wrong: {', '.join(wrong)}; right: {', '.join(right) or 'nothing'}"] if wrong else []
    numbers = {f.output for f in findings if f.problem in ("tolerance", "not finite")}
    after = [name for name in wrong[1:] if name in MADE_FROM.get(wrong[0], ())]
    if after and wrong[0] in numbers:
        which = (
            "all others that are wrong are" if after == wrong[1:] else f"{len(after)} others are"
        )
        lines.append(f"mend {wrong[0]} first: {which} made from it")
    return lines


def _on_block(case: Case, column: Sequence["Result"]) -> str:
    if case.options["name"] == "emb":
        for other in column:
            inner = other.case.call == "run_block" and other.case.options["name"] == "time_proj"
            if inner and other.case.config == case.config and other.status == "failed":
                return "emb begins with time_proj, which is wrong: mend that first"
    return "this block is wrong by itself: its input was golden"


def _taps_of(case: Case, column: Sequence["Result"]) -> tuple[str | None, list[str]]:
    """The first wrong tap of the same network, where the taps failed, and a line that says so."""
    for other in column:
        if other.case.call == "taps" and other.case.config == case.config:
            tap = first_tap(other.case, other.findings)
            if tap is not None:
                text = f"the network is wrong already: see {other.case.id}, from {tap.output} on"
                return tap.output, [text]
    return None, []


def _on_tap(case: Case, block: str, column: Sequence["Result"]) -> str:
    start = f"the first block out of tolerance is {block}; "
    named = [
        other
        for other in column
        if other.case.call == "run_block" and other.case.options["name"] == block
    ]
    alone = [other for other in named if other.case.config == case.config] or named
    if not alone:
        return start + "--level 2 in the same command says whether it is wrong by itself"
    if any(other.status == "not implemented" for other in alone):
        return start + "run_block is not implemented, so it cannot be told from its input"
    if any(not other.ok for other in alone):
        return start + "run alone on golden input it is wrong too: look in this block"
    return (
        start + "run alone on golden input it is right, so look at what it is given: the output "
        "of the block before, the skip and its order, emb"
    )


def _on_gradients(case: Case, bad: Sequence[Finding]) -> tuple[str | None, list[str]]:
    grads = [finding for finding in bad if finding.output.startswith("grads/")]
    lines = []
    if any(finding.output == "loss" for finding in bad):
        mask = "the mask, the null label " if "drop" in case.inputs else ""
        lines.append(
            f"the loss itself is wrong: look at the forward pass, {mask}and the mean first"
        )
    elif grads:
        lines.append(
            "the loss is right: look at the backward pass, and for gradients left by a call before"
        )
    if not grads:
        return None, lines
    held = parameter_blocks(case.config)
    order = {name: i for i, name in enumerate(held)}
    names = [finding.output.removeprefix("grads/") for finding in grads]
    known = [name for name in names if name in held]
    lines.append(f"worst of {len(grads)} gradients: {_worst(grads)}")
    if not known:
        return None, lines
    last = held[max(known, key=order.__getitem__)]
    lines.append(
        f"the backward pass comes from the output, and the first block on its way with a wrong "
        f"gradient is {last}"
    )
    return last, lines


def _on_state(findings: Sequence[Finding]) -> list[str]:
    """Which parts of the training state are wrong and which are right, at the first record."""
    parts: dict[str, list[Finding]] = {}
    for finding in findings:
        head = finding.output.split("/")
        name = head[0] if not head[0].isdigit() else f"{head[1]} after {head[0]}"
        parts.setdefault(name, []).append(finding)
    wrong = {name: [f for f in group if not f.ok] for name, group in parts.items()}
    texts = [f"{name} ({len(bad)} of {len(parts[name])})" for name, bad in wrong.items() if bad]
    right = [name for name, bad in wrong.items() if not bad]
    if not texts:
        return []
    every = [finding for bad in wrong.values() for finding in bad]
    return [
        f"wrong: {', '.join(texts)}; right: {', '.join(right) or 'nothing'}",
        *_on_update([name for name, bad in wrong.items() if bad]),
        f"worst: {_worst(every)}",
    ]


def _on_update(wrong: Sequence[str]) -> list[str]:
    """Where in an update to look: m and v are made first, delta of them, ema_delta of that (S9)."""
    split = [name.partition(" ") for name in wrong if not name.startswith("loss")]
    at = {name for name, _, record in split if record == split[0][2]}  # the first record alone
    if at & {"m", "v"}:
        return [
            "m and v come first: look at the gradients they get, the clip, then their own lines"
        ]
    if "delta" in at:
        return ["m and v are right: look at the rate, the bias corrections and epsilon"]
    return ["all but the average is right: look at the EMA"] if "ema_delta" in at else []


def _worst(findings: Sequence[Finding]) -> str:
    ranked = sorted(findings, key=lambda finding: -finding.ratio)[:LISTED]
    return ", ".join(f"{finding.output} ({finding.ratio:.3g})" for finding in ranked)
