"""The second source of the goldens: `spec/reference.py` must give what the oracle gave.

A generator's module. A golden is accepted only where the two agree, forward to 1e-12 relative and
gradients to 1e-10; `AgreementError` names the case, the tensor and the distance otherwise.
"""

import numpy as np

from spec import reference
from spec.cases import Case, golden_normals
from spec.noise import training_draws
from spec.oracle import Oracle
from spec.tables import exact_tables

FORWARD = 1e-12  # relative L2
SCHEDULE = 5e-11  # of each element: float64 loses that much in 1 - alphas_cumprod at T = 4000
UPDATE = 1e-10  # relative L2, over ten whole steps
RUN = 1e-12  # of each loss, and of the samples in L2, over a hundred
GRADIENT = 1e-10  # of a directional derivative along unit normals, relative to the tensor's norm
DIRECTIONS = 4  # over all parameters at once; and one for each tensor alone
Tree = dict[str, np.ndarray]


class AgreementError(AssertionError):
    """The two sources of a golden differ."""


def tables_of(case: Case) -> Tree:
    """The exact tables: what float64 loses in building its own is L0's matter."""
    return exact_tables(case.full_config)


def distance(got: np.ndarray, expected: np.ndarray) -> float:
    """||got - expected|| / ||expected||, or ||got|| where nothing is expected."""
    scale = np.linalg.norm(expected)
    return float(np.linalg.norm(got - expected) / (scale if scale else 1.0))


def agreement(case: Case, inputs: dict, params: Tree | None, expected: Tree) -> dict[str, float]:
    """Kind of comparison -> the largest distance. Raises AgreementError where one is too large."""
    if case.call == "schedule":
        found = reference.make_schedule(case.full_config)
        error = max(
            float(np.max(np.abs(found[n] - e) / np.where(e == 0, 1, np.abs(e))))
            for n, e in expected.items()
        )
        return _accept(case, "schedule", SCHEDULE, {"table": error})
    if case.call == "loss_and_grads":
        loss = reference.loss(case.full_config, tables_of(case), params, **inputs)
        forward = _accept(case, "forward", FORWARD, {"loss": distance(loss, expected["loss"])})
        grads = {k.removeprefix("grads/"): v for k, v in expected.items() if k != "loss"}
        return forward | _accept(
            case, "gradient", GRADIENT, gradient_distances(case, params, grads, inputs)
        )
    if case.call == "train_steps":
        return _train_steps(case, inputs, params, expected)
    if case.call == "train_run":
        return _train_run(case, inputs, params, expected)
    found = reference.answer(
        case.full_config, tables_of(case), case.call, case.options, inputs, params
    )
    if list(found) != list(expected):
        raise AgreementError(f"{case.id}: results {list(found)}, the oracle gave {list(expected)}")
    distances = {name: distance(found[name], expected[name]) for name in expected}
    return _accept(case, "forward", FORWARD, distances)


def _accept(case: Case, kind: str, limit: float, distances: dict[str, float]) -> dict[str, float]:
    name, worst = max(distances.items(), key=lambda item: item[1])
    if not worst <= limit:
        raise AgreementError(
            f"{case.id}: {name} of spec/reference.py and of the oracle are {worst:.2g} apart "
            f"({kind}), allowed is {limit:g}; no golden is written until they agree"
        )
    return {kind: worst}


def gradient_distances(
    case: Case, params: Tree, grads: Tree, batch: dict, alone: bool = True
) -> dict[str, float]:
    """How far the oracle's gradients are from complex-step derivatives of the reference's loss.

    Directions are unit normals, of all parameters and of each tensor `alone`; a distance is
    relative to the norm of the gradient of the tensors that move (absolute where that is zero,
    as the true gradient of to_k.bias is: what autograd gives there is rounding, S8).
    """
    config, s = case.full_config, tables_of(case)
    grads = {n: 0 * g if n.endswith("to_k.bias") else g for n, g in grads.items()}
    plans = {f"direction {i}": list(params) for i in range(DIRECTIONS)}
    plans |= {name: [name] for name in params} if alone else {}
    distances = {}
    for label, names in plans.items():
        direction = {n: golden_normals(f"{case.id}:{label}:{n}", params[n].shape) for n in names}
        found = reference.directional_derivative(config, s, params, direction, batch)
        expected = sum(float((grads[n] * direction[n]).sum()) for n in names)
        norm = np.sqrt(sum(float((grads[n] ** 2).sum()) for n in names))
        distances[label] = abs(found - expected) / (norm if norm else 1.0)
    return distances


def _train_steps(case: Case, inputs: dict, params: Tree, expected: Tree) -> dict[str, float]:
    """The reference's own updates, on autograd's gradients at the reference's own parameters.

    Those gradients are held to complex-step derivatives at the first and the last step.
    """
    config = case.full_config
    state = reference.initial_state(params)
    losses, distances, gradients = [], {}, {}
    steps = len(inputs["t"])
    for i in range(steps):
        batch = {name: value[i] for name, value in inputs.items()}
        losses.append(reference.loss(config, tables_of(case), state["params"], **batch))
        found = Oracle(config, state["params"]).run("loss_and_grads", batch, {})
        grads = {n: found[f"grads/{n}"] for n in state["params"]}
        if i in (0, steps - 1):
            alone = case.own is None  # of a fresh config, L4 has asked for each tensor
            some = gradient_distances(case, state["params"], grads, batch, alone)
            gradients |= {f"step {i + 1}, {name}": value for name, value in some.items()}
        state = reference.update(config, state, grads)
        if i + 1 in case.options["record"]:
            for key, value in reference.moved(state, params).items():
                # What a step makes of to_k.bias, whose gradient is zero, is rounding alone (S8).
                if not key.endswith("to_k.bias"):
                    distances[f"{i + 1}/{key}"] = distance(value, expected[f"{i + 1}/{key}"])
    distances["loss"] = distance(np.array(losses), expected["loss"])
    return _accept(case, "update", UPDATE, distances) | _accept(
        case, "gradient", GRADIENT, gradients
    )


def _train_run(case: Case, inputs: dict, params: Tree, expected: Tree) -> dict[str, float]:
    """The same for a whole run: the curve and the samples of the reference's own state.

    Gradients are held to complex-step derivatives along whole directions, first step and last.
    """
    config, tables = case.full_config, tables_of(case)
    state, losses, gradients = reference.initial_state(params), [], {}
    steps, seed = case.options["steps"], case.options["seed"]
    for step in range(steps):
        draws = training_draws(config, len(inputs["images"]), seed, step)
        batch = {
            "x0": inputs["images"][draws.rows],
            "t": draws.t,
            "noise": draws.noise,
            "labels": inputs["classes"][draws.rows],
            "drop": draws.drop,
        }
        losses.append(reference.loss(config, tables, state["params"], **batch))
        found = Oracle(config, state["params"]).run("loss_and_grads", batch, {})
        grads = {name: found[f"grads/{name}"] for name in state["params"]}
        if step in (0, steps - 1):
            some = gradient_distances(case, state["params"], grads, batch, alone=False)
            gradients |= {f"step {step + 1}, {name}": value for name, value in some.items()}
        state = reference.update(config, state, grads)
    trajectory = reference.sample(
        config, tables, state["ema"], inputs["x"], None, inputs["labels"], **case.options["sample"]
    )
    curve = np.abs(np.array(losses) - expected["loss"]) / expected["loss"]
    distances = {
        "loss": float(curve.max()),
        "samples": distance(trajectory[-1], expected["samples"]),
    }
    return _accept(case, "run", RUN, distances) | _accept(case, "gradient", GRADIENT, gradients)
