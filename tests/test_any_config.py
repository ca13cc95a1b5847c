"""The implementations on configs and arguments that nobody chose, against spec/reference.py.

hypothesis draws the config, shapes, times, labels, steps and numbers, in float64. Each
implementation runs in a worker process, as the suite runs it, so that a crash is a failure and no
two frameworks meet. In `nox -s tests` a few dozen examples, always the same; `nox -s slow` draws
thousands of others. What fails is shrunk and printed whole, with a line that brings it back.

Limits are those of the goldens: 1e-10 in relative L2, of tables in each element. The reference's
own tables are float64 too, as the implementations' are: for the schedules drawn here, within the
bounds of spec/fresh.py, both lose at most 2e-11 of an element.
"""

import collections
import dataclasses
import json
import os
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, assume, event, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from conformance.process import Impl, Setup, WorkerProcess
from conformance.runner import read_results
from spec import reference
from spec.backend import METHODS
from spec.cases import Inputs, golden_params
from spec.config import Config
from spec.fresh import LEAST_NOISE, LEAST_SIGNAL
from spec.goldens import FORMAT

SLOW = os.environ.get("ROSETTA_SLOW_TESTS") == "1"
LIMIT = 1e-10  # relative L2; of tables, each element
IMPLS = ("impl_numpy", "impl_torch", "impl_tf", "impl_jax")
# What compiles pays for each new config, so each is in the mode that is soonest done.
MODES = {"impl_tf": "eager", "impl_jax": "eager"}
# Examples of functions without a network, of networks, and of bad arguments.
COUNTS = {
    "impl_numpy": (10, 6, 12),
    "impl_torch": (6, 2, 12),
    "impl_tf": (2, 0, 8),
    "impl_jax": (1, 0, 8),
}
SLOW_COUNTS = {
    "impl_numpy": (700, 300, 250),
    "impl_torch": (450, 200, 200),
    "impl_tf": (60, 15, 40),
    "impl_jax": (25, 3, 25),
}
FORGET = 40  # models that a worker holds before it is told to drop them
Arrays = dict[str, np.ndarray]


# --- an implementation in its process ------------------------------------------------------------


class Runner:
    """One implementation: makes calls of the protocol, on arrays, in a worker process."""

    def __init__(self, impl: str, folder: Path) -> None:
        goldens = folder / "goldens"
        goldens.mkdir()
        empty = {"format": FORMAT, "made_with": {}, "files": {}, "cases": []}
        (goldens / "manifest.json").write_text(json.dumps(empty))
        setup = Setup(goldens, "cpu", MODES.get(impl), 1, 300.0, MINIMAL)
        self.worker = WorkerProcess(Impl(impl, sys.executable), "float64", setup, folder)
        self.impl, self.path, self.configs = impl, folder / "given.safetensors", set()
        self.seconds, self.examples = 0.0, collections.Counter()

    def ask(self, config: Config, call: str, arrays: Arrays, **options) -> dict:
        """The worker's reply to one call; params/... among the arrays are the parameters."""
        if config not in self.configs and len(self.configs) >= FORGET:
            self.worker.greet()
            self.configs.clear()
        self.configs.add(config)
        names = [name for name in arrays if "/" not in name]
        case = {
            "id": call,
            "config": dataclasses.asdict(config),
            "call": call,
            "params": "given:params" if len(names) < len(arrays) else None,
            "inputs": {name: f"given:{name}" for name in names},
            "options": options,
        }
        given = {name: np.ascontiguousarray(value) for name, value in arrays.items()}
        save_file(given or {"nothing": np.zeros(1)}, self.path)
        request = {"do": "case", "case": case, "given": str(self.path)}
        start = time.monotonic()
        reply = self.worker.ask(request, 300.0)
        self.seconds += time.monotonic() - start
        return reply

    def call(self, config: Config, call: str, arrays: Arrays, **options) -> Arrays:
        """The results of a call that must work."""
        reply = self.ask(config, call, arrays, **options)
        assert reply["status"] == "done", (call, reply.get("message"), reply.get("trace"))
        return read_results(self.worker.folder, reply["file"], 2**28)

    def count(self, kind: str) -> None:
        """Count an example, and tell of it now and then."""
        self.examples[kind] += 1
        if SLOW and self.examples[kind] % 25 == 0:
            line = f"{self.impl} {kind}: {self.examples[kind]} examples, {self.seconds:.0f} s"
            print(line, file=sys.__stdout__, flush=True)


@pytest.fixture(scope="module", params=IMPLS)
def runner(request):
    if request.param != "impl_numpy":
        pytest.importorskip({"impl_tf": "tensorflow"}.get(request.param, request.param[5:]))
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        made = Runner(request.param, Path(folder))
        yield made
        made.worker.close()
        if SLOW:
            counts = ", ".join(f"{count} of {kind}" for kind, count in made.examples.items())
            line = f"{made.impl}: {counts} examples, {made.seconds:.0f} s of calls"
            print(line, file=sys.__stdout__, flush=True)


def examples(runner: Runner, kind: int):
    """Settings for a kind of examples: always the same few, or many others."""
    count = (SLOW_COUNTS if SLOW else COUNTS)[runner.impl][kind]
    if not count:
        pytest.skip("a network takes this framework many seconds: in `nox -s slow`")
    return settings(
        max_examples=count,
        derandomize=not SLOW,
        database=None,
        deadline=None,
        print_blob=True,
        suppress_health_check=list(HealthCheck),
    )


# --- what is drawn -------------------------------------------------------------------------------

MINIMAL = Config("minimal", (1, 2), 1, (4,), 1, 1)
TIMESTEPS = (1, 2, 3, 4, 7, 24, 100, 1000)  # each is a new shape of the tables to compile for


def in_bounds(config: Config) -> bool:
    """Whether float64 itself gives the tables and the steps of a schedule to 1e-10."""
    with np.errstate(all="ignore"):  # of one that is not, tables may be infinite
        betas = reference.make_schedule(config)["betas"]
    return betas[0] >= LEAST_NOISE and np.log1p(-betas).sum() >= np.log(LEAST_SIGNAL)


def schedules(timesteps):
    """Fields of a config that the functions without a network depend on."""

    def beta(exponent: float) -> float:
        return float(f"{10**exponent:.4g}")

    exponents = st.floats(-5.2, -0.01)
    return st.fixed_dictionaries(
        {
            "timesteps": st.sampled_from(timesteps),
            "schedule": st.sampled_from(("linear", "cosine")),
            "beta_start": exponents.map(beta),
            "beta_end": exponents.map(beta),
            "prediction": st.sampled_from(("eps", "x0", "v")),
            "variance": st.sampled_from(("small", "large")),
            "clip": st.booleans(),
        }
    )


@st.composite
def step_examples(draw):
    """A config with the least network, and arrays and numbers for every function without one."""
    size = (draw(st.integers(1, 4)), draw(st.integers(1, 4)))
    fields = {"image_size": size, "in_channels": draw(st.integers(1, 3)), "num_classes": 2}
    config = MINIMAL.replace(**fields, **draw(schedules(TIMESTEPS)))
    assume(in_bounds(config))
    rows = draw(st.integers(1, 4))
    t = np.array(draw(st.lists(st.integers(0, config.timesteps - 1), min_size=rows, max_size=rows)))
    t_prev = np.array([draw(st.integers(-1, int(time) - 1)) for time in t])
    shape = (rows, *config.image_shape)
    arrays = images(draw(st.integers(0, 2**32 - 1)), shape, "x0", "x_t", "noise", "out", "other")
    eta = draw(st.one_of(st.sampled_from((0.0, 1.0)), st.floats(0, 1)))
    scale = draw(st.floats(-10, 10))
    return config, t, t_prev, arrays, eta, scale


def images(seed: int, shape: tuple[int, ...], *names: str) -> Arrays:
    """Normals by name."""
    generator = np.random.default_rng(seed)
    return {name: generator.standard_normal(shape) for name in names}


@st.composite
def network_configs(draw):
    """A config of a small network, of any kind that has true gradients (S8)."""
    levels, groups = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    width = st.integers(2, 12 // groups).map(lambda count: count * groups)
    first = width.filter(lambda channels: channels >= 4 and channels % 2 == 0)
    step = 2 ** (levels - 1)
    sides = (draw(st.integers(1, 8 // step)), draw(st.integers(1, 8 // step)))
    assume(sides[0] * sides[1] > 1)
    return Config(
        name="drawn",
        image_size=(sides[0] * step, sides[1] * step),
        in_channels=draw(st.integers(1, 3)),
        channels=(draw(first), *(draw(width) for _ in range(levels - 1))),
        layers_per_block=draw(st.integers(1, 2)),
        groups=groups,
        attention_levels=tuple(level for level in range(levels) if draw(st.booleans())),
        num_classes=draw(st.sampled_from((0, 0, 1, 2, 5))),
        **draw(schedules((1, 2, 3, 5, 24, 1000))),
    )


@st.composite
def network_examples(draw):
    """A network, its parameters and a batch, and a way to sample from it."""
    config = draw(network_configs())
    assume(in_bounds(config))
    rows, seed = draw(st.integers(1, 3)), draw(st.integers(0, 2**32 - 1))
    generator = np.random.default_rng(seed)
    arrays = images(seed, (rows, *config.image_shape), "x0", "noise")
    arrays["t"] = generator.integers(0, config.timesteps, rows)
    if config.num_classes:
        arrays["labels"] = generator.integers(0, config.num_classes + 1, rows)
        arrays["drop"] = generator.integers(0, 2, rows).astype(bool)
    params = golden_params(Inputs(seed), config)
    way = {"method": draw(st.sampled_from(METHODS))}
    if way["method"] == "ddpm":
        assume(config.timesteps <= 5)
    way["steps"] = config.timesteps
    if way["method"] != "ddpm":
        way["steps"] = draw(st.integers(1, min(config.timesteps, 4)))
    if way["method"] == "ddim":
        way["eta"] = draw(st.one_of(st.sampled_from((0.0, 1.0)), st.floats(0, 1)))
    if config.num_classes and draw(st.booleans()):
        way["guidance_scale"] = draw(st.floats(-2, 4))
    return config, params, arrays, way


# --- what is compared ----------------------------------------------------------------------------


def near(what: str, got: np.ndarray, expected: np.ndarray) -> None:
    """Hold a result to its shape, to finite numbers and to the limit."""
    assert got.shape == np.shape(expected), what
    assert got.dtype == np.float64, what
    assert np.isfinite(got).all(), what
    error = np.linalg.norm(got - expected) / (np.linalg.norm(expected) or 1.0)
    assert error <= LIMIT, f"{what}: {error:.2g} apart, allowed is {LIMIT:g}"


def check_functions(runner: Runner, example) -> None:
    """Hold every function without a network to the reference."""
    config, t, t_prev, arrays, eta, scale = example
    event(f"{config.schedule} {config.prediction}")
    x0, x_t, noise, out, other = arrays.values()
    s = reference.make_schedule(config)
    tables = runner.call(config, "schedule", {})
    assert set(tables) == set(s)
    for name, expected in s.items():
        difference = np.abs(tables[name] - expected)
        assert (difference <= LIMIT * np.abs(expected)).all(), f"{name}: {difference.max()}"
    clean, noisy = {"x0": x0, "t": t, "noise": noise}, {"x_t": x_t, "t": t, "out": out}
    near(
        "q_sample",
        runner.call(config, "q_sample", clean)["out"],
        reference.q_sample(s, x0, t, noise),
    )
    near(
        "target",
        runner.call(config, "target", clean)["out"],
        reference.target(config, s, x0, t, noise),
    )
    read = runner.call(config, "predict_x0_eps", noisy)
    wanted = reference.predict_x0_eps(config, s, x_t, t, out)
    for name, expected in zip(("x0", "eps"), wanted, strict=True):
        near(name, read[name], expected)
    noisy |= {"noise": noise}
    near(
        "ddpm_step",
        runner.call(config, "ddpm_step", noisy)["out"],
        reference.ddpm_step(config, s, x_t, t, out, noise),
    )
    near(
        "ddim_step",
        runner.call(config, "ddim_step", {**noisy, "t_prev": t_prev}, eta=eta)["out"],
        reference.ddim_step(config, s, x_t, t, t_prev, out, noise, eta),
    )
    both = {"out_null": out, "out_label": other}
    near(
        "guide",
        runner.call(config, "guide", both, guidance_scale=scale)["out"],
        reference.guide(out, other, scale),
    )
    runner.count("functions")


def test_functions_without_a_network(runner):
    @examples(runner, 0)
    @given(step_examples())
    def holds(example):
        check_functions(runner, example)

    holds()


def check_network(runner: Runner, example) -> None:
    """Hold the network, its loss, its gradients and its samples to the reference."""
    config, params, arrays, way = example
    event(way["method"])
    s = reference.make_schedule(config)
    tree = {f"params/{name}": value for name, value in params.items()}
    x, noise, labels = arrays["x0"], arrays["noise"], arrays.get("labels")
    asked = {"x": x, "t": arrays["t"]} | ({} if labels is None else {"labels": labels})
    near(
        "predict",
        runner.call(config, "predict", asked | tree)["out"],
        reference.predict(config, params, x, arrays["t"], labels),
    )
    found = runner.call(config, "loss_and_grads", arrays | tree)
    near("loss", found["loss"], reference.loss(config, s, params, **arrays))
    along(config, s, params, arrays, found)
    given_noise = {}
    if way["method"] == "ddpm" or way.get("eta"):
        given_noise = images(1, (way["steps"], *x.shape), "noise")
    start = {"x": noise} | ({} if labels is None else {"labels": labels})
    near(
        "sample",
        runner.call(config, "sample", start | given_noise | tree, **way)["trajectory"],
        reference.sample(config, s, params, **start, **given_noise, **way),
    )
    runner.count("networks")


def test_networks(runner):
    @examples(runner, 1)
    @given(network_examples())
    def holds(example):
        check_network(runner, example)

    holds()


def along(config: Config, s: Arrays, params: Arrays, batch: Arrays, found: Arrays) -> None:
    """Hold gradients to the reference's complex-step derivative along a unit normal direction."""
    generator = np.random.default_rng(0)
    direction = {name: generator.standard_normal(value.shape) for name, value in params.items()}
    # S8: the true gradient of to_k.bias is zero, and what is found there is rounding.
    grads = {name: found[f"grads/{name}"] * (not name.endswith("to_k.bias")) for name in params}
    slope = sum(float((grads[name] * direction[name]).sum()) for name in params)
    expected = reference.directional_derivative(config, s, params, direction, batch)
    norm = np.sqrt(sum(float((grad**2).sum()) for grad in grads.values()))
    assert abs(slope - expected) <= LIMIT * norm, f"{slope} along a direction, not {expected}"
    for name in params:
        if name.endswith("to_k.bias"):
            assert np.abs(found[f"grads/{name}"]).max() <= LIMIT * max(1.0, norm), name


# --- what is refused -----------------------------------------------------------------------------

# Each call's arguments; `options` are numbers and words, the others arrays.
CALLS = {
    "q_sample": ("x0", "t", "noise"),
    "target": ("x0", "t", "noise"),
    "predict_x0_eps": ("x_t", "t", "out"),
    "ddpm_step": ("x_t", "t", "out", "noise"),
    "ddim_step": ("x_t", "t", "t_prev", "out", "noise"),
    "guide": ("out_null", "out_label"),
    "predict": ("x", "t", "labels"),
    "taps": ("x", "t", "labels"),
    "loss_and_grads": ("x0", "t", "noise", "labels"),
    "sample": ("x", "labels"),
}
OPTIONS = {
    "ddim_step": {"eta": 0.5},
    "guide": {"guidance_scale": 2.0},
    "sample": {"method": "ddim", "steps": 2, "eta": 0.0, "guidance_scale": 1.5},
}
BAD_OPTIONS = {
    "eta": (-0.1, 1.5, float("nan"), float("inf"), "much", None, True, [0.5]),
    "guidance_scale": (float("nan"), float("inf"), float("-inf"), "much", True, [2.0]),
    "method": ("euler", "", None, 3),
    "steps": (0, -1, 10**6, 1.5, "two", True, [2]),
}
TIMES = ("t", "t_prev")


@st.composite
def bad_examples(draw):
    """A call with one argument that is not allowed; gives its name too."""
    config = MINIMAL.replace(
        image_size=(draw(st.sampled_from((1, 3))), 2),
        in_channels=2,
        num_classes=3,
        timesteps=4,
        beta_start=0.01,
        beta_end=0.1,
    )
    call, rows = draw(st.sampled_from(sorted(CALLS))), draw(st.integers(1, 3))
    shape = (rows, *config.image_shape)
    arrays = images(0, shape, *(name for name in CALLS[call] if name not in (*TIMES, "labels")))
    integers = {"t": np.full(rows, 3), "t_prev": np.full(rows, 1), "labels": np.full(rows, 2)}
    arrays |= {name: value for name, value in integers.items() if name in CALLS[call]}
    options = dict(OPTIONS.get(call, {}))
    name = draw(st.sampled_from((*CALLS[call], *options)))
    if name in options:
        bad = draw(st.sampled_from(BAD_OPTIONS[name]))
        # guide must have a number, and a sampler none at all
        assume(not (call == "guide" and bad is None))
        options[name] = bad
    elif name in integers:
        row, high = draw(st.integers(0, rows - 1)), 3 if name == "labels" else config.timesteps - 1
        low = -1 if name == "t_prev" else 0
        kind = draw(st.sampled_from(("low", "high", "far", "longer", "floats", "booleans", "rank")))
        value = arrays[name].copy()
        if kind in ("low", "high", "far"):
            value[row] = {"low": low - 1, "high": high + 1, "far": 2**40}[kind]
        elif kind == "longer":
            value = np.concatenate([value, value])
        elif kind == "rank":
            value = value[:, None]
        else:
            value = value.astype(float if kind == "floats" else bool)
        arrays[name] = value
    else:
        kind = draw(st.sampled_from(("rank", "side", "channels", "rows", "empty", "integers")))
        if kind == "rank":
            shape = draw(st.sampled_from((shape[1:], (*shape, 1), ())))
        elif kind == "empty":
            shape = (0, *shape[1:])
        elif kind != "integers":
            axis = {"rows": 0, "side": draw(st.integers(1, 2)), "channels": 3}[kind]
            shape = (*shape[:axis], shape[axis] + draw(st.integers(1, 3)), *shape[axis + 1 :])
        arrays[name] = np.ones(shape, int if kind == "integers" else float)
    return config, call, arrays, options, name


def check_refusal(runner: Runner, example) -> None:
    """See that a call is refused, by an error that names the argument."""
    config, call, arrays, options, name = example
    event(f"{call} {name}")
    reply = runner.ask(config, call, arrays, **options)
    assert reply["status"] == "error", f"{call} took a bad {name}: {reply['status']}"
    kind, _, message = reply["message"].partition(": ")
    assert kind in ("ValueError", "TypeError"), reply["message"]
    # Where rows differ, the first argument that has another number of them is named.
    assert any(word in message for word in (name, *CALLS[call])), message
    if arrays.get(name) is None or arrays[name].ndim != 4:
        assert name in message, message
    runner.count("bad arguments")


def test_bad_arguments_are_refused_by_name(runner):
    @examples(runner, 2)
    @given(bad_examples())
    def holds(example):
        check_refusal(runner, example)

    holds()


# --- and that a fault would be seen --------------------------------------------------------------

FAULTY = """
import impl_numpy

name, modes = "faulty", ("eager",)


class Faulty:
    def __init__(self, model):
        self.model = model

    def __getattr__(self, name):
        return getattr(self.model, name)

    def ddim_step(self, x_t, t, t_prev, out, noise, eta=0.0):
        return self.model.ddim_step(x_t, t, t_prev, out, noise, eta * (1 - 1e-6))

    def loss_and_grads(self, *batch, **named):
        loss, grads = self.model.loss_and_grads(*batch, **named)
        return loss, {**grads, "conv_in.bias": grads["conv_in.bias"] * (1 + 1e-8)}

    def guide(self, out_null, out_label, guidance_scale):
        return out_null + guidance_scale * (out_label - out_null)


def open(config, params=None, **more):
    return Faulty(impl_numpy.open(config, params, **more))
"""


@pytest.mark.parametrize(
    ("check", "drawn", "words"),
    [
        (check_functions, step_examples(), "ddim_step: .* apart, allowed is 1e-10"),
        (check_network, network_examples(), "along a direction, not"),
        (check_refusal, bad_examples(), "guide took a bad|could not be broadcast"),
    ],
)
def test_a_fault_is_seen(check, drawn, words, tmp_path, monkeypatch):
    (tmp_path / "faulty.py").write_text(FAULTY, "utf-8")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    (tmp_path / "run").mkdir()
    runner = Runner("faulty", tmp_path / "run")

    @settings(
        max_examples=60,
        derandomize=True,
        database=None,
        deadline=None,
        phases=(Phase.generate,),
        suppress_health_check=list(HealthCheck),
    )
    @given(drawn)
    def holds(example):
        check(runner, example)

    try:
        with pytest.raises(AssertionError, match=words):
            holds()
    finally:
        runner.worker.close()
