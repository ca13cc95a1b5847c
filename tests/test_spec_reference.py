"""The reference forward: it meets the goldens, and has the properties that the clauses state."""

import itertools
import math

import numpy as np
import pytest

from spec import reference
from spec.config import load_config
from spec.goldens import Goldens
from spec.noise import normals
from spec.params import blocks

GOLDENS = Goldens()
# The fifty guided steps of digits take the reference ten seconds; the generator checks them.
WITHOUT_GRADIENTS = [
    case
    for case in GOLDENS.cases
    if case.call not in ("loss_and_grads", "train_steps", "train_run")
    and case.id != "L6/digits/ddim_guided"
]
NORMS = {
    "l2": lambda d, e: np.linalg.norm(d) / (np.linalg.norm(e) or 1),
    "max": lambda d, e: np.abs(d).max() / (np.abs(e).max() or 1),
    "each": lambda d, e: np.max(np.abs(d) / np.where(e == 0, 1, np.abs(e))),
    "abs": lambda d, _: np.abs(d).max(),
}


def arguments(case):
    """The inputs and the parameters of a case, float64."""
    get = GOLDENS.tree if case.call == "apply_gradients" else GOLDENS.array
    params = GOLDENS.tree(case.params) if case.params else None
    if params:
        params = {name: value.astype(np.float64) for name, value in params.items()}
    return {key: get(value) for key, value in case.inputs.items()}, params


@pytest.mark.parametrize("case", WITHOUT_GRADIENTS, ids=lambda case: case.id)
def test_the_reference_meets_every_golden(case):
    inputs, params = arguments(case)
    s = reference.make_schedule(case.config)
    found = reference.answer(case.config, s, case.call, case.options, inputs, params)
    assert set(found) == {output.name for output in case.outputs}
    for output in case.outputs:
        got, expected = found[output.name], GOLDENS.expected(case, output)
        assert got.shape == output.shape
        got = got.reshape(-1)[:: output.stride].reshape(expected.shape)
        limits = {norm: v for norm, v in output.tolerance["float64"].items() if norm != "reason"}
        assert limits
        for norm, limit in limits.items():
            assert NORMS[norm](got - expected, expected) <= limit, (output.name, norm)


@pytest.mark.parametrize("name", ["tiny", "tiny_uncond", "tiny_v", "tiny_x0", "tiny_deep"])
def test_losses_meet_their_goldens(name):
    (case,) = [case for case in GOLDENS.cases if case.id == f"L4/{name}/loss_and_grads"]
    inputs, params = arguments(case)
    s = reference.make_schedule(case.config)
    expected = GOLDENS.expected(case, next(o for o in case.outputs if o.name == "loss"))
    assert reference.loss(case.config, s, params, **inputs) == pytest.approx(expected, rel=1e-12)


def test_golden_gradients_are_the_complex_steps_of_the_reference():
    (case,) = [case for case in GOLDENS.cases if case.id == "L4/tiny/loss_and_grads"]
    inputs, params = arguments(case)
    s = reference.make_schedule(case.config)
    outputs = {o.name.removeprefix("grads/"): o for o in case.outputs}
    grads = {name: GOLDENS.expected(case, outputs[name]) for name in params}
    for seed in range(3):
        ways = {n: normals(seed, "golden", i, g.shape) for i, (n, g) in enumerate(grads.items())}
        found = reference.directional_derivative(case.config, s, params, ways, inputs)
        expected = sum((grads[name] * ways[name]).sum() for name in grads)
        assert found == pytest.approx(expected, rel=1e-11)
    for name in grads:
        if name.endswith("to_k.bias"):  # softmax ignores a shift
            assert not grads[name].any()
            way = {name: normals(9, "golden", 0, grads[name].shape)}
            found = reference.directional_derivative(case.config, s, params, way, inputs)
            assert abs(found) < 1e-15


CONFIGS = ["tiny", "tiny_uncond", "tiny_v", "tiny_x0"]


def pixels(config, seed, rows=4):
    return normals(seed, "golden", 0, (rows, *config.image_shape))


@pytest.mark.parametrize("name", CONFIGS)
def test_tables_belong_together(name):
    s = reference.make_schedule(load_config(name))
    assert list(s) == list(GOLDENS.cases[0].outputs[i].name for i in range(11))
    assert s["alphas_cumprod_prev"][0] == 1
    assert s["posterior_variance"][0] == 0
    assert np.array_equal(s["alphas_cumprod_prev"][1:], s["alphas_cumprod"][:-1])
    assert (np.diff(s["alphas_cumprod"]) < 0).all()
    assert s["betas"].max() <= 0.999
    squares = s["sqrt_alphas_cumprod"] ** 2 + s["sqrt_one_minus_alphas_cumprod"] ** 2
    assert np.allclose(squares, 1, rtol=1e-15, atol=0)
    # The posterior keeps the mean: coef1 * sqrt(abar_t-1's x0) + coef2 * sqrt(abar_t) is its own.
    mean = s["posterior_mean_coef1"] + s["posterior_mean_coef2"] * s["sqrt_alphas_cumprod"]
    assert np.allclose(mean, np.sqrt(s["alphas_cumprod_prev"]), rtol=1e-10, atol=0)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_perfect_network_gives_back_x0_and_noise(name):
    config = load_config(name)
    s = reference.make_schedule(config)
    x0, noise = np.clip(pixels(config, 1), -1, 1), pixels(config, 2)
    t = np.array([0, config.timesteps // 2, config.timesteps - 2, 1])
    x_t = reference.q_sample(s, x0, t, noise)
    out = reference.target(config, s, x0, t, noise)
    found, eps = reference.predict_x0_eps(config, s, x_t, t, out)
    # Dividing by sqrt(abar) or by its complement costs digits at either end.
    assert np.allclose(found, x0, atol=1e-8)
    assert np.allclose(eps, noise, atol=1e-8)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_perfect_network_ends_at_x0(name):
    config = load_config(name)
    s = reference.make_schedule(config)
    x0, noise = np.clip(pixels(config, 1), -1, 1), pixels(config, 2)
    t = np.zeros(4, np.int64)
    x_t, out = reference.q_sample(s, x0, t, noise), reference.target(config, s, x0, t, noise)
    end = np.full(4, -1)
    for eta in (0.0, 1.0):
        step = reference.ddim_step(config, s, x_t, t, end, out, pixels(config, 3), eta)
        assert np.allclose(step, x0, atol=1e-10)
    assert np.allclose(reference.ddpm_step(config, s, x_t, t, out, pixels(config, 3)), x0)


@pytest.mark.parametrize("name", CONFIGS)
def test_ddim_with_eta_one_and_every_step_is_ddpm_with_the_small_variance(name):
    config = load_config(name).replace(variance="small", clip=False)
    s = reference.make_schedule(config)
    t = np.array([1, 2, config.timesteps // 2, 5])
    x_t, out, z = pixels(config, 1), pixels(config, 2), pixels(config, 3)
    ddpm = reference.ddpm_step(config, s, x_t, t, out, z)
    ddim = reference.ddim_step(config, s, x_t, t, t - 1, out, z, 1.0)
    assert np.allclose(ddim, ddpm, rtol=1e-8, atol=1e-9)


def test_noise_at_the_last_step_has_no_effect():
    for name in CONFIGS:
        config = load_config(name)
        s = reference.make_schedule(config)
        x_t, out, t = pixels(config, 1), pixels(config, 2), np.zeros(4, np.int64)
        one = reference.ddpm_step(config, s, x_t, t, out, pixels(config, 3))
        other = reference.ddpm_step(config, s, x_t, t, out, 7 * pixels(config, 4))
        assert np.array_equal(one, other)


def normal_images(method: str, steps: int) -> list[float]:
    """How far each state of a sampler is off the exact path, relative; the last is the sample's.

    Of images of a normal distribution of variance 1/4 the best x0 is known, and with it the path:
    x stays the same multiple of its own deviation.
    """
    config = load_config("tiny").replace(prediction="x0", clip=False)
    s = reference.make_schedule(config)
    alphas = np.append(s["alphas_cumprod"], 1.0)  # the last is that of the end, -1
    spread = np.sqrt(0.25 * alphas + 1 - alphas)
    times = [*reference.ddim_times(config.timesteps, steps), -1]
    x, x0, off = pixels(config, 1), None, []
    exact = x / spread[times[0]]
    for i, (time, end) in enumerate(itertools.pairwise(times)):
        best = np.sqrt(alphas[time]) * 0.25 / spread[time] ** 2 * x
        if method == "dpmpp":
            x, x0 = reference.dpmpp_step(config, s, x, times[:-1], i, best, x0)
        else:
            t, t_prev = np.full(len(x), time), np.full(len(x), end)
            x = reference.ddim_step(config, s, x, t, t_prev, best, np.zeros_like(x), 0.0)
        off.append(np.linalg.norm(x / spread[end] - exact) / np.linalg.norm(exact))
    return off


def test_dpmpp_is_of_second_order_and_ddim_of_first():
    """At a time that all of them visit: near the end a step's length in lambda does not shrink."""
    counts = (50, 100, 200)
    first, second = (
        [normal_images(method, steps)[steps // 2 - 1] for steps in counts]
        for method in ("ddim", "dpmpp")
    )
    for (a, b), (c, d) in zip(itertools.pairwise(first), itertools.pairwise(second), strict=True):
        assert 1.8 < a / b < 2.2
        assert 3.4 < c / d < 4.6
        assert d < b / 5


def test_dpmpp_in_one_step_and_in_two_is_ddim():
    for steps in (1, 2):
        assert normal_images("dpmpp", steps) == pytest.approx(normal_images("ddim", steps))
    assert normal_images("dpmpp", 3) != pytest.approx(normal_images("ddim", 3), rel=0.01)


@pytest.mark.parametrize(("total", "steps"), [(1000, 7), (1000, 1000), (1000, 1), (20, 20), (1, 1)])
def test_ddim_times_go_down_from_the_last(total, steps):
    times = reference.ddim_times(total, steps)
    assert len(times) == steps
    assert times[0] == total - 1
    assert times[-1] >= 0
    assert all(a > b for a, b in itertools.pairwise(times))
    if steps == total:
        assert times == list(reversed(range(total)))
    if (total, steps) == (1000, 7):
        assert times == [999, 857, 714, 571, 428, 285, 142]


def test_float32_step_coefficients_would_fail_where_alpha_bar_vanishes():
    s = reference.make_schedule(load_config("tiny_v"))
    now, then = s["alphas_cumprod"][3999], s["alphas_cumprod"][3333]

    def toward(dtype):
        a, b, one = dtype(now), dtype(then), dtype(1)
        sigma = np.sqrt((one - b) / (one - a)) * np.sqrt(one - a / b)
        with np.errstate(invalid="ignore"):
            return np.sqrt(one - b - sigma * sigma)

    exact, low = toward(np.float64), toward(np.float32)
    assert 0 < exact < 1e-4
    assert np.isnan(low) or abs(low - exact) > 0.5 * exact


def test_guidance_at_zero_is_null_and_at_one_is_label():
    null, label = pixels(load_config("tiny"), 1), pixels(load_config("tiny"), 2)
    assert np.array_equal(reference.guide(null, label, 0.0), null)
    assert np.allclose(reference.guide(null, label, 1.0), label, rtol=1e-14)


def test_rows_do_not_see_each_other():
    (case,) = [case for case in GOLDENS.cases if case.id == "L3/tiny/predict"]
    inputs, params = arguments(case)
    whole = reference.predict(case.config, params, **inputs)
    for i in range(len(whole)):
        row = {name: value[i : i + 1] for name, value in inputs.items()}
        assert np.allclose(reference.predict(case.config, params, **row)[0], whole[i], rtol=1e-12)


def test_taps_are_the_blocks_in_order():
    (case,) = [case for case in GOLDENS.cases if case.id == "L3/tiny/taps"]
    inputs, params = arguments(case)
    found = reference.taps(case.config, params, **inputs)
    names = [block.name for block in blocks(case.config)]
    assert list(found) == names == [output.name for output in case.outputs]


def test_an_update_clips_warms_up_and_moves_the_average():
    config = load_config("tiny").replace(warmup=4, max_grad_norm=1.0)
    params = {"a": np.array([1.0, -2.0]), "b": np.array([0.5])}
    grads = {"a": np.array([30.0, 0.0]), "b": np.array([-40.0])}
    state = reference.update(config, reference.initial_state(params), grads)
    assert np.allclose(state["m"]["a"], [0.1 * 0.6, 0])
    assert np.allclose(state["m"]["b"], -0.08)
    # The first step of Adam is the learning rate times the sign, here a quarter of it.
    rate = config.learning_rate / 4
    assert np.allclose(state["params"]["a"], [1 - rate, -2], atol=1e-9)
    assert np.allclose(state["params"]["b"], 0.5 + rate, atol=1e-9)
    assert np.allclose(state["ema"]["b"] - 0.5, 0.9 * rate, atol=1e-9)
    assert state["step"] == 1
    off = reference.update(
        config.replace(max_grad_norm=0.0), reference.initial_state(params), grads
    )
    assert np.allclose(off["m"]["b"], -4)


def test_epsilon_stands_outside_the_root_and_is_not_hatted():
    config = load_config("tiny").replace(warmup=0, max_grad_norm=0.0)
    grads = {"a": np.array([1e-8])}
    state = reference.update(config, reference.initial_state({"a": np.zeros(1)}), grads)
    assert state["params"]["a"][0] == pytest.approx(-config.learning_rate / 2, rel=1e-12)


def test_the_complex_step_sees_through_every_block():
    config = load_config("tiny")
    (case,) = [case for case in GOLDENS.cases if case.id == "L4/tiny/loss_and_grads"]
    inputs, params = arguments(case)
    s = reference.make_schedule(config)
    name = "mid_block.attentions.0.to_v.weight"
    way = {name: normals(3, "golden", 1, params[name].shape)}
    found = reference.directional_derivative(config, s, params, way, inputs)
    h = 1e-5
    ends = [
        reference.loss(config, s, params | {name: params[name] + sign * h * way[name]}, **inputs)
        for sign in (1, -1)
    ]
    assert found == pytest.approx((ends[0] - ends[1]) / (2 * h), rel=1e-6)
    assert math.isfinite(found)
    assert found != 0
