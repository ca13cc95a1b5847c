"""Runs a case's call on a model and gives its results by key; knows no expected value."""

import dataclasses
import difflib
import math
import time
import traceback
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from spec.backend import ARRAY_DTYPES, Model
from spec.config import Config
from spec.goldens import Case, GoldenError, Goldens
from spec.noise import training_draws
from spec.params import initial_params, parameter_shapes

Arrays = dict[str, np.ndarray]
ONE_ARRAY = {
    **dict.fromkeys(("q_sample", "target", "ddpm_step", "ddim_step", "guide"), "out"),
    **dict.fromkeys(("run_block", "predict"), "out"),
    "sample": "trajectory",
}
TREES = ("schedule", "taps")
STATE_PARTS = ("params", "m", "v", "ema")
PROTOCOL = tuple(vars(Model))
NEAR = 0.8  # how alike two names are, of 1, where one may be the other misspelt
LONGEST = 2000  # characters of an exception's message


class Fault(Exception):
    """A model that breaks the protocol; the message names what it did and what is expected."""


@dataclasses.dataclass
class Outcome:
    """What came of one call."""

    status: str  # done, fault, error, not implemented; from a worker also crashed, timed out
    results: Arrays = dataclasses.field(default_factory=dict)
    seconds: float = 0.0
    message: str = ""
    trace: str = ""  # of an exception, or the end of what a dead worker wrote to stderr


@dataclasses.dataclass
class _Held:
    model: Any
    changed: bool = False  # its training state is no longer that of `open`
    handed: list[tuple[str, str, np.ndarray, bytes]] = dataclasses.field(default_factory=list)
    trees: list[tuple[str, str, Arrays, list[str]]] = dataclasses.field(default_factory=list)

    def hand(self, call: str, trees: Mapping[str, Arrays]) -> None:
        """Remember arrays that a call was given, to see later whether the model works in them."""
        named = _flat(trees)
        self.handed += [(call, name, array, array.tobytes()) for name, array in named]
        self.trees += [(call, name, tree, list(tree)) for name, tree in trees.items()]

    def check_handed(self) -> None:
        """Raise Fault where an array that was handed over is no longer what it was."""
        for call, name, tree, keys in self.trees:
            if list(tree) != keys:
                raise Fault(
                    f"{call} was given {name}, and the model took names out of that dict or put "
                    "some in; keep a copy"
                )
        for call, name, array, before in self.handed:
            if array.tobytes() != before:
                raise Fault(
                    f"{call} was given {name}, and the model changed that array in place, then or "
                    "in a later update; keep a copy"
                )


class Session:
    """One backend in one column of the matrix; opens a model once for each config and parameters.

    A reference "given:<key>" in a case stands for an entry of `given`, as if it were a golden file.
    """

    def __init__(
        self, backend: Any, goldens: Goldens, dtype: str, device: str, mode: str | None = None
    ) -> None:
        self.backend, self.goldens, self.column = backend, goldens, dtype
        self.dtype = ARRAY_DTYPES[dtype]
        self.device, self.mode = device, mode or backend.modes[0]
        self.describe: dict[str, Any] = {}
        self._held: dict[tuple, _Held] = {}

    def attempt(self, case: Case, given: Mapping[str, np.ndarray] | None = None) -> Outcome:
        """Run the case; every exception of the backend becomes part of the Outcome."""
        start = time.perf_counter()
        key = (case.config, case.params)
        try:
            with np.errstate():  # what a call sets there ends with it
                outcome = Outcome("done", self._run(case, key, given or {}))
        except NotImplementedError as error:
            outcome = Outcome("not implemented", message=said(error).partition(": ")[2])
        except Fault as fault:
            outcome = Outcome("fault", message=str(fault))
        except GoldenError:
            raise
        except (Exception, SystemExit) as error:
            outcome = Outcome("error", message=said(error), trace=trace_of(error))
        if outcome.status in ("fault", "error") or case.params in GIVEN_PARAMS:
            self._held.pop(key, None)  # what a failed call left behind must not reach other cases
        outcome.seconds = time.perf_counter() - start
        return outcome

    def forget(self) -> None:
        """Drop every model."""
        self._held.clear()

    def initial(self, case: Case, given: Mapping[str, np.ndarray]) -> Arrays:
        """The parameters that the case starts from, in the dtype of the session."""
        seed = case.options.get("seed", 0)
        tree = initial_params(case.config, seed) if case.params is None else None
        tree = self._tree(str(case.params), given) if tree is None else tree
        return {name: value.astype(self.dtype) for name, value in tree.items()}

    def _open(self, case: Case, given: Mapping[str, np.ndarray]) -> _Held:
        params = None if case.params is None else self.initial(case, given)
        held = _Held(None)
        held.hand("open", {"params": params or {}})
        held.model = self.open(case.config, params, case.options.get("seed", 0))
        held.check_handed()
        return held

    def open(self, config: Config, params: Arrays | None, seed: int = 0) -> Any:
        """A model of the backend in this column's dtype, device and mode."""
        model = self.backend.open(
            config, params, seed=seed, dtype=self.column, device=self.device, mode=self.mode
        )
        if model is None:
            raise Fault("open gave None; expected a model: is its `return` missing?")
        return model

    def _load(self, held: _Held, state: Mapping[str, Any]) -> None:
        """Load a copy of the state, and remember that copy."""
        copy = _copied(state)
        held.hand("load_state", {part: copy[part] for part in STATE_PARTS})
        method(held.model, "load_state")(copy)
        held.check_handed()

    def _tree(self, reference: str, given: Mapping[str, np.ndarray]) -> Arrays:
        stem, _, prefix = reference.partition(":")
        if stem != "given":
            return self.goldens.tree(reference)
        start = f"{prefix}/"
        return {k.removeprefix(start): v for k, v in given.items() if k.startswith(start)}

    def _array(self, reference: str, given: Mapping[str, np.ndarray]) -> np.ndarray:
        stem, _, key = reference.partition(":")
        value = given[key] if stem == "given" else self.goldens.array(reference)
        return self._cast(value)

    def _cast(self, value: np.ndarray) -> np.ndarray:
        return np.array(value, self.dtype if value.dtype.kind == "f" else value.dtype)

    def _run(self, case: Case, key: tuple, given: Mapping[str, np.ndarray]) -> Arrays:
        held = self._held.get(key)
        if held is None:
            held = self._held[key] = self._open(case, given)
        elif held.changed:
            held = self._held[key] = self._reset(case, held, given)
        model = held.model
        self.describe = described(model)
        if case.call == "apply_gradients":
            held.changed = True
            return self._apply_gradients(held, case, given)
        arguments = {name: self._array(ref, given) for name, ref in case.inputs.items()}
        if case.call == "train_steps":
            held.changed = True
            results = self._train_steps(model, case, arguments, given)
        elif case.call == "train_run":
            held.changed = True
            results = self._train_run(model, case, arguments)
        else:
            value = guarded(model, case.call, arguments, case.options)
            results = named_results(case.call, value, arguments)
        held.check_handed()  # at the first case that shows it, whatever its level
        return results

    def _reset(self, case: Case, held: _Held, given: Mapping[str, np.ndarray]) -> _Held:
        """The same model at its first state, so that what it compiled is kept; or a new one."""
        start = self.initial(case, given)
        zeros = {name: np.zeros_like(value) for name, value in start.items()}
        state: dict[str, Any]
        state = {"step": 0, "params": start, "m": zeros, "v": zeros, "ema": start}
        again = _Held(held.model)
        try:
            self._load(again, state)
            now = read_state(held.model, case.config, self.dtype, 0)
        except NotImplementedError:
            return self._open(case, given)
        for part in STATE_PARTS:
            for name, value in now[part].items():
                if value.tobytes() != state[part][name].tobytes():
                    raise Fault(
                        f"load_state, then state: {part}[{name}] is not what was loaded; state "
                        "must give back every part exactly"
                    )
        return again

    def _apply_gradients(self, held: _Held, case: Case, given: Mapping[str, np.ndarray]) -> Arrays:
        model = held.model
        options = dict(case.options)
        start = self.initial(case, given)
        first = int(options.get("step", 0))
        if first or {"m", "v"} & set(case.inputs):
            zeros = {name: np.zeros_like(value) for name, value in start.items()}
            m, v = (
                self._cast_tree(case.inputs[part], given) if part in case.inputs else zeros
                for part in ("m", "v")
            )
            state = {"step": first, "params": start, "m": m, "v": v, "ema": start}
            self._load(held, state)
        for label in options["sequence"]:
            grads = self._cast_tree(case.inputs[f"grads/{label}"], given)
            held.hand("apply_gradients", {"grads": grads})
            if guarded(model, "apply_gradients", {"grads": grads}, {}) is not None:
                raise Fault("apply_gradients gave something back; expected None")
        held.check_handed()
        steps = first + len(options["sequence"])
        state = read_state(model, case.config, self.dtype, steps)
        return changes(state, start)

    def _cast_tree(self, reference: str, given: Mapping[str, np.ndarray]) -> Arrays:
        return {name: self._cast(value) for name, value in self._tree(reference, given).items()}

    def _train_steps(
        self, model: Any, case: Case, arguments: Arrays, given: Mapping[str, np.ndarray]
    ) -> Arrays:
        start, losses, results = self.initial(case, given), [], {}
        recorded: list[tuple[int, dict, dict]] = []
        for i in range(len(arguments["x0"])):
            batch = {name: value[i] for name, value in arguments.items()}
            losses.append(a_loss("train_step", guarded(model, "train_step", batch, {})))
            if i + 1 in case.options["record"]:
                state = read_state(model, case.config, self.dtype, i + 1)
                recorded.append((i + 1, state, _copied(state)))
                for key, value in changes(state, start).items():
                    results[f"{i + 1}/{key}"] = value
        for step, state, copy in recorded:
            for part in STATE_PARTS:
                for name, value in state[part].items():
                    if value.tobytes() != copy[part][name].tobytes():
                        raise Fault(
                            f"state gave {part}[{name}] after step {step}, and a later step "
                            "changed that array in place; give copies"
                        )
        return {"loss": np.array(losses), **results}

    def _train_run(self, model: Any, case: Case, arguments: Arrays) -> Arrays:
        images, classes = arguments["images"], arguments["classes"]
        run = SharedRun(self, model, case.config, images, classes, case.options["seed"])
        losses = [run.step() for _ in range(case.options["steps"])]
        samples = run.samples(arguments["x"], arguments["labels"], case.options["sample"])
        return {"loss": np.array(losses), "samples": samples}


class SharedRun:
    """A run of train steps from initial weights, whose every draw is the shared stream's (S10)."""

    def __init__(
        self,
        session: Session,
        model: Any,
        config: Config,
        images: np.ndarray,  # [N, H, W, C]
        classes: np.ndarray | None,  # [N]
        seed: int,
    ) -> None:
        self.session, self.model, self.config, self.seed = session, model, config, seed
        self.images, self.classes, self.steps = images.astype(session.dtype), classes, 0

    def step(self) -> float:
        """Train for one step; gives its loss."""
        draws = training_draws(self.config, len(self.images), self.seed, self.steps)
        batch = {
            "x0": self.images[draws.rows],
            "t": draws.t,
            "noise": draws.noise.astype(self.session.dtype),
        }
        if self.classes is not None:
            batch |= {"labels": self.classes[draws.rows], "drop": draws.drop}
        self.steps += 1
        return a_loss("train_step", guarded(self.model, "train_step", batch, {}))

    def samples(
        self, x: np.ndarray, labels: np.ndarray | None, options: Mapping[str, Any]
    ) -> np.ndarray:
        """Samples [B, H, W, C] from x = x_T, drawn by a model opened with the averaged weights."""
        state = read_state(self.model, self.config, self.session.dtype, self.steps)
        averaged = self.session.open(self.config, state["ema"])
        given = {"x": x} | ({} if labels is None else {"labels": labels})
        trajectory = guarded(averaged, "sample", given, options)
        return an_array("sample", trajectory)[-1].copy()


GIVEN_PARAMS = ("given:params",)  # differ from call to call, so that no model is kept for them


def described(model: Any) -> dict[str, Any]:
    """What the model says of itself; a describe that fails costs no case its verdict."""
    try:
        return plain(method(model, "describe")())
    except Exception as error:
        return {"error": said(error)}


def plain(described: Any) -> dict[str, Any]:
    """What a model says of itself, as names and short values that any report can hold."""
    found: dict[str, Any] = {}
    for name, value in dict(described).items():
        if isinstance(value, float) and not math.isfinite(value):
            value = str(value)
        if isinstance(value, int) and value.bit_length() > 63:
            value = f"an integer of {value.bit_length()} bits"
        simple = value is None or isinstance(value, (bool, int, float))
        found[str(name)[:80]] = value if simple else str(value)[:400]
    return found


def method(model: Any, name: str) -> Callable:
    """The model's method. Raises NotImplementedError where there is none."""
    found = getattr(model, name, None)
    if not callable(found):
        others = [n for n in dir(model) if not n.startswith("_") and n not in PROTOCOL]
        near = difflib.get_close_matches(name, others, 1, NEAR)
        also = f", but {near[0]}: is that meant?" if near else ""
        raise NotImplementedError(f"the model has no method {name}{also}")
    return found


def guarded(model: Any, call: str, arguments: dict[str, Any], options: Mapping[str, Any]) -> Any:
    """The value of a method, after a check that it left its arguments as they were."""
    run = method(model, call)
    flat = {name: value for name, value in _flat(arguments)}
    before = {name: value.tobytes() for name, value in flat.items()}
    names = {name: list(tree) for name, tree in arguments.items() if isinstance(tree, dict)}
    value = run(**arguments, **options)
    for name in sorted(flat):  # the same one in each run: files give their arrays in any order
        if flat[name].tobytes() != before[name]:
            raise Fault(f"{call} changed its argument {name}; work on a copy")
    for name, keys in names.items():
        if list(arguments[name]) != keys:
            raise Fault(f"{call} changed its argument {name}: keys came or went; work on a copy")
    return value


def _flat(arguments: Mapping[str, Any]):
    for name, value in arguments.items():
        if isinstance(value, dict):
            for key, leaf in value.items():
                yield f"{name}[{key}]", leaf
        else:
            yield name, value


def named_results(call: str, value: Any, arguments: Arrays) -> Arrays:
    """The results of a call by key. Raises Fault for a value of the wrong kind."""
    if call in ONE_ARRAY:
        results = {ONE_ARRAY[call]: an_array(call, value)}
    elif call == "predict_x0_eps":
        x0, eps = _pair(call, value, "x0 and eps")
        results = {
            "x0": an_array("the x0 of predict_x0_eps", x0),
            "eps": an_array("the eps of predict_x0_eps", eps),
        }
    elif call in TREES:
        results = a_tree(call, value)
    elif call == "loss_and_grads":
        loss, grads = _pair(call, value, "the loss and its gradients")
        results = {"loss": np.array(a_loss(call, loss))}
        for name, grad in a_tree("the gradients of loss_and_grads", grads).items():
            results[f"grads/{name}"] = grad
    else:
        raise GoldenError(f"the manifest asks for the call {call!r}, which this suite cannot make")
    for key, result in results.items():
        for name, argument in arguments.items():
            if np.may_share_memory(result, argument):
                raise Fault(f"{call} gave its own argument {name} as {key}; give a new array")
    return results


def _pair(call: str, value: Any, what: str) -> tuple[Any, Any]:
    if not isinstance(value, tuple) or len(value) != 2:
        raise Fault(f"{call} gave {kind_of(value)}; expected a tuple of 2: {what}{_remedy(value)}")
    return value


def an_array(what: str, value: Any) -> np.ndarray:
    """The value, in native byte order. Raises Fault unless it is a NumPy array of numbers.

    A subclass, such as a masked array or a matrix, has other arithmetic, or hides elements.
    """
    if not isinstance(value, np.ndarray):
        raise Fault(f"{what} gave {kind_of(value)}; expected a NumPy array{_remedy(value)}")
    if type(value) is not np.ndarray:
        raise Fault(f"{what} gave {kind_of(value)}; expected a plain NumPy array: np.array(x)")
    if value.dtype.kind not in "biuf" or value.dtype.itemsize > 8:
        raise Fault(f"{what} gave an array of dtype {value.dtype}; expected floating point numbers")
    return value.astype(value.dtype.newbyteorder("="), copy=False)


def a_tree(what: str, value: Any) -> Arrays:
    """The value. Raises Fault unless it is a dict of arrays by name."""
    if not isinstance(value, Mapping):
        raise Fault(
            f"{what} gave {kind_of(value)}; expected a dict of NumPy arrays by name{_remedy(value)}"
        )
    items = list(value.items())  # once: whoever makes them anew could make others
    if not all(type(name) is str for name, _ in items):
        raise Fault(f"{what} gave names that are no texts; expected a dict of NumPy arrays by name")
    if len(dict(items)) < len(items):
        raise Fault(f"{what} gave a name twice; expected a dict of NumPy arrays by name")
    return {name: an_array(f"{what}: {name}", leaf) for name, leaf in items}


def _remedy(value: Any) -> str:
    """How the value becomes one, for the usual tensors; what may have made it None."""
    if value is None:
        return " (is a `return` missing?)"
    if hasattr(value, "detach"):
        return ": x.detach().cpu().numpy()"
    return ": np.array(x)" if hasattr(value, "__array__") else ""


def a_loss(call: str, value: Any) -> float:
    """The value as a float. Raises Fault unless it is one already."""
    if not isinstance(value, (float, np.floating)):
        raise Fault(f"{call} gave {kind_of(value)} as the loss; expected a float{_remedy(value)}")
    return float(value)


def read_state(model: Any, config: Config, dtype: str, step: int) -> dict[str, Any]:
    """The model's training state. Raises Fault unless it is whole and counts `step` steps."""
    state = method(model, "state")()
    wanted = ("step", *STATE_PARTS)
    if not isinstance(state, Mapping) or sorted(state) != sorted(wanted):
        held = ", ".join(map(str, state)) if isinstance(state, Mapping) else kind_of(state)
        raise Fault(f"state gave {held}; expected a dict of {', '.join(wanted)}")
    count = state["step"]
    if isinstance(count, bool) or not isinstance(count, (int, np.integer)) or count != step:
        raise Fault(f"state gave step {count!r} after {step} steps; expected {step}")
    shapes = parameter_shapes(config)
    for part in STATE_PARTS:
        tree = a_tree(f"the {part} of state", state[part])
        missing, extra = sorted(set(shapes) - set(tree)), sorted(set(tree) - set(shapes))
        if missing or extra:
            raise Fault(
                f"the {part} of state: missing {', '.join(missing) or 'none'}; "
                f"not a parameter of this config: {', '.join(extra) or 'none'}"
            )
        for name, value in tree.items():
            if value.shape != shapes[name] or value.dtype != dtype:
                raise Fault(
                    f"the {part} of state: {name} is {value.dtype} {list(value.shape)}; expected "
                    f"{dtype} {list(shapes[name])}"
                )
    return {"step": int(count), **{part: dict(state[part]) for part in STATE_PARTS}}


def changes(state: Mapping[str, Any], start: Arrays) -> Arrays:
    """The results of a training state: how far params and EMA moved from `start`, m and v."""
    results: Arrays = {}
    for name, value in start.items():
        first = value.astype(np.float64)
        results[f"delta/{name}"] = state["params"][name].astype(np.float64) - first
        results[f"ema_delta/{name}"] = state["ema"][name].astype(np.float64) - first
        results[f"m/{name}"] = state["m"][name].copy()
        results[f"v/{name}"] = state["v"][name].copy()
    return results


def _copied(state: Mapping[str, Any]) -> dict[str, Any]:
    trees = {part: {k: v.copy() for k, v in state[part].items()} for part in STATE_PARTS}
    return {"step": state["step"], **trees}


def kind_of(value: Any) -> str:
    """A few words on what a value is: "a tuple of 3", "a torch.Tensor"."""
    if value is None:
        return "None"
    if isinstance(value, (tuple, list)):
        return f"a {type(value).__name__} of {len(value)}"
    kind = type(value)
    name = kind.__name__ if kind.__module__ == "builtins" else _full(kind)
    return f"{'an' if name[:1].lower() in 'aeio' else 'a'} {name}"


def _full(kind: type) -> str:
    return f"{kind.__module__}.{kind.__name__}"


def said(error: BaseException) -> str:
    """The exception's name and message, cut to a length that can be shown."""
    try:
        return f"{type(error).__name__}: {error}"[:LONGEST]
    except Exception:
        return f"{type(error).__name__}: its message cannot be made"


def trace_of(error: BaseException) -> str:
    """The traceback, its middle left out where it is long."""
    text = "".join(traceback.format_exception(error))
    return text if len(text) <= 6000 else f"{text[:1500]}\n...\n{text[-4500:]}"
