"""Golden cases of any config and seed, for `python -m spec.generate --config`; random configs.

A generator's module. The cases are those of the committed goldens, from the schedule to whole
trajectories, on inputs that the seed draws; the training run (L7) alone is left out.
"""

import dataclasses
import json
import random
import re
import zlib
from typing import Any

import numpy as np

from spec.cases import (
    Case,
    Inputs,
    golden_params,
    gradient_cases,
    layer_cases,
    network_cases,
    step_cases,
    stride_of,
    train_case,
    trajectory_case,
    update_cases,
)
from spec.config import Config, ConfigError
from spec.noise import uniforms
from spec.params import parameter_count, parameter_shapes
from spec.reference import make_schedule
from spec.tolerance import FEW_SEEDS

# Of each element, float64 builds of a schedule lose 2^-53 / (1 - alphas_cumprod[0]): 2e-11 here,
# as much as on the longest committed one.
LEAST_NOISE = 5e-6
# alphas_cumprod at the end. A DDIM step from there with eta = 1 takes the root of
# 1 - then - sigma^2 = (1 - then) now / then, about: what is left of numbers near 1, each with an
# error of 2^-53. Of some four of them the root keeps 2 * 2^-53 / sqrt(now / then), 2e-11 here, and
# more below: float64 itself, in another order, would not come within the 1e-10 that it is held to.
LEAST_SIGNAL = 1e-10
MOST_WORK = 3e12  # multiplications of all cases, by `work`: about an hour
LONG = 12  # times T that a ddpm trajectory visits; of more, a short schedule takes the place
SHORT = {"linear": {"timesteps": 8, "beta_start": 5e-3, "beta_end": 0.4}}
SHORT["cosine"] = {"timesteps": 8}


def check_config(config: Config) -> None:
    """Raise ConfigError, with every reason, where no golden of this config would say anything."""
    found = [*_problems(config)]
    if found:
        raise ConfigError(f"no goldens can be made of config {config.name!r}: " + "; ".join(found))


def _problems(config: Config):
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]*", config.name):
        yield (
            "its name goes into names of files; use letters, digits, _, - and . in the name of "
            "the .toml file, or in its key `name`"
        )
    for level, width in enumerate(config.channels):
        if width < 2 * config.groups:
            yield (
                f"channels[{level}] = {width} with groups = {config.groups} is one channel a "
                "group: the gradients of biases before a GroupNorm are then zero but for rounding "
                "(S8); use at least two channels a group"
            )
    height, width = (side >> (config.levels - 1) for side in config.image_size)
    if height * width < 2:
        yield (
            "the middle's attention has a single pixel, so that the gradients of to_q and to_k "
            "are zero but for rounding (S8); use larger images, or fewer levels"
        )
    with np.errstate(all="ignore"):  # of a schedule that is refused below, tables may be infinite
        betas = make_schedule(config)["betas"]
    if betas[0] < LEAST_NOISE:
        yield (
            f"its first beta, {betas[0]:.2g}, is below {LEAST_NOISE:g}: float64 itself then loses "
            "too much of 1 - alphas_cumprod; use a larger beta_start, or fewer timesteps"
        )
    signal = float(np.log1p(-betas).sum())
    if signal < np.log(LEAST_SIGNAL):
        yield (
            f"alphas_cumprod ends at e^{signal:.0f}, below {LEAST_SIGNAL:g}: float64 itself then "
            "loses too much of a DDIM step; use a smaller beta_end, or fewer timesteps"
        )
    if work(config) > MOST_WORK:
        yield (
            f"its goldens would take {work(config) / MOST_WORK:.1f} times an hour's work or more; "
            "use smaller images, narrower channels or fewer blocks: what is wrong in a large "
            "network is wrong in a small one of the same kind"
        )


def work(config: Config) -> float:
    """About how many multiplications all cases of a config take.

    Most of it is the second source of gradients: a forward for every tensor of parameters.
    """
    pixels = config.image_size[0] * config.image_size[1]
    tensors = len(parameter_shapes(config))
    return 12.0 * tensors * parameter_count(config) * pixels


def fresh_cases(inputs: Inputs, config: Config, brief: bool = False) -> list[Case]:
    """The cases of one config, on inputs of `inputs.seed`; brief: one of each kind, no block alone.

    Raises ConfigError where `check_config` does.
    """
    check_config(config)
    params = inputs.put_tree(config.name, "params", golden_params(inputs, config))
    case = Case(f"L0/{config.name}/schedule", "S1", config.name, "schedule", {}, {})
    cases = [case, *step_cases(inputs, config)]
    if brief:
        kept = ("q_sample", "target", "predict_x0_eps", "ddpm_step", "ddim_step_eta0.5", "guide_3")
        cases = [case, *(c for c in cases[1:] if c.id.rpartition("/")[2] in kept)]
        cases += network_cases(inputs, config, params)[1:]
        cases += gradient_cases(inputs, config, params, whole=False)
        cases.append(train_case(inputs, config, params, (1, 2), stride_of(config)))
    else:
        cases += layer_cases(inputs, config, params)
        cases += network_cases(inputs, config, params)
        cases += gradient_cases(inputs, config, params, whole=bool(config.num_classes))
        cases += update_cases(inputs, config, params, (1, 2, 3))
    cases += _trajectories(inputs, config, params, brief)
    return [dataclasses.replace(c, own=config, seeds=FEW_SEEDS) for c in cases]


def _trajectories(inputs: Inputs, config: Config, params: str, brief: bool) -> list[Case]:
    """L6: every sampler in a number of steps that the seed draws; brief: one that it draws."""
    total, seed = config.timesteps, inputs.seed or 0
    drawn = uniforms(zlib.crc32(f"{seed}/{config.name}".encode()), "golden", 2, (4,))
    steps = min(total, 2 + int(5 * drawn[0]))
    eta, scale = round(0.1 + 0.9 * drawn[1], 2), round(4.5 * drawn[2] - 0.5, 2)
    replace = SHORT[config.schedule] if total > LONG else {}
    short = config.replace(**replace)
    plans: list[tuple[str, int, dict[str, Any], dict[str, Any]]] = [
        ("ddpm", short.timesteps, replace, {"method": "ddpm"}),
        ("ddim", steps, {}, {"method": "ddim", "eta": 0.0}),
        ("ddim_eta", steps, {}, {"method": "ddim", "eta": eta}),
        ("ddim_every_t", short.timesteps, replace, {"method": "ddim", "eta": 0.0}),
        ("dpmpp", steps, {}, {"method": "dpmpp"}),
        ("dpmpp_every_t", short.timesteps, replace, {"method": "dpmpp"}),
    ]
    if config.num_classes:
        guided = [plan for plan in plans if not plan[0].endswith("every_t")]
        for what, count, changed, options in guided:
            options = {**options, "guidance_scale": scale}
            plans.append((f"{what}_guided", count, changed, options))
    if brief:
        plans = [plans[int(drawn[3] * len(plans)) % len(plans)]]
    return [
        trajectory_case(inputs, config, params, what, count, seed, changed, **options)
        for what, count, changed, options in plans
    ]


def random_config(number: int) -> Config:
    """A small config that its number draws: every field anywhere in what the design allows."""
    draw = random.Random(f"config {number}")

    def power(low: float, high: float) -> float:
        return float(f"{10 ** draw.uniform(low, high):.3g}")

    levels, groups = draw.choice((1, 2, 2, 3, 3, 4)), draw.choice((1, 1, 2, 2, 3, 4))
    widths = [w for w in range(2 * groups, 25, groups) if w >= 4]
    channels = [draw.choice([w for w in widths if w % 2 == 0])]
    channels += [draw.choice(widths) for _ in range(levels - 1)]
    step = 2 ** (levels - 1)
    most = max(16 // step, 2)
    height, width = draw.randint(1, most), draw.randint(1, most)
    if height * width == 1:
        width = 2
    timesteps = draw.choice((1, 2, 3, 4, 7, 10, 24, 50, 100, 300, 1000, 1000, 2000, 4000))
    # of two equal betas as large as this, alphas_cumprod ends at e^-22, above LEAST_SIGNAL
    top = min(-0.3, float(np.log10(-np.expm1(-22 / timesteps))))
    low = -3.0 if timesteps < 100 else -5.0
    classes = draw.choice((0, 0, 1, 2, 3, 5, 7, 10))
    return Config(
        name=f"random-{number}",
        image_size=(height * step, width * step),
        in_channels=draw.choice((1, 2, 3, 4)),
        channels=tuple(channels),
        layers_per_block=draw.choice((1, 1, 1, 2, 2, 3)),
        groups=groups,
        attention_levels=tuple(level for level in range(levels) if draw.random() < 0.4),
        num_classes=classes,
        timesteps=timesteps,
        schedule=draw.choice(("linear", "cosine")),
        beta_start=power(low, top),
        beta_end=power(low, top),
        prediction=draw.choice(("eps", "x0", "v")),
        variance=draw.choice(("small", "large")),
        clip=draw.random() < 0.5,
        learning_rate=power(-4, -2),
        warmup=draw.choice((0, 0, 1, 2, 5)),
        max_grad_norm=draw.choice((0.0, 0.1, 1.0, 10.0)),
        ema_decay=draw.choice((0.0, 0.5, 0.995, 0.9999)),
        label_dropout=draw.choice((0.0, 0.2)) if classes else 0.0,
        batch_size=3,
    )


def toml_text(config: Config) -> str:
    """The config as a .toml file: what JSON writes of numbers, texts and lists, TOML reads."""
    fields = dataclasses.asdict(config).items()
    return "".join(f"{key} = {json.dumps(value)}\n" for key, value in fields)
