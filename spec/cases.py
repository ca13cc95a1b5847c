"""The golden cases: which calls are made on which inputs, before anything is computed.

A generator's module. Inputs come from the shared stream (S10, purpose "golden", keyed by the
tensor's name), rounded to float32, so that every dtype sees the same numbers.
"""

import dataclasses
import zlib
from typing import Any

import numpy as np
from safetensors.numpy import load as parse_safetensors

from spec import tables
from spec.causes import causes_of
from spec.config import Config, load_config
from spec.data import load_digits
from spec.goldens import SPEC
from spec.noise import normals, sampling_noise, uniforms
from spec.params import blocks, find_block, parameter_shapes

Tree = dict[str, np.ndarray]
CHECKPOINT = SPEC / "checkpoints" / "digits.safetensors"
STRIDE = 7  # coprime to every width of the tiny network
# Of the run that every framework trains (L7): a quarter of the config's batch, so that it takes a
# quarter of the time. A rounding must stay small for a fault to be seen: of the seeds 0 to 7 it
# grows to 2e-7 to 3e-6 of a loss in a hundred steps. (In batches of 128 it is 3e-7 with seed 7, and
# 4e-4 with seed 0.)
RUN_SEED, RUN_STEPS, RUN_BATCH = 7, 100, 32
B = 3  # rows of a batch: neither 1 nor a number of channels, groups, levels or pixels


@dataclasses.dataclass
class Case:
    """One case as the generator sees it; `expected` is filled in later."""

    id: str
    clause: str
    config: str
    call: str
    inputs: dict[str, Any]
    options: dict[str, Any]
    params: str | None = None
    replace: dict[str, Any] = dataclasses.field(default_factory=dict)
    stride: int = 1
    expected: Tree = dataclasses.field(default_factory=dict)
    oracle: str = ""
    shapes: dict[str, tuple[int, ...]] = dataclasses.field(default_factory=dict)
    own: Config | None = None  # the config itself, where the name is not that of a shipped one
    columns: tuple[str, ...] = ("float32", "tf32", "bf16")  # the limits that follow from floors
    seeds: int | None = None  # of every floor; None: those of the committed goldens
    # precision -> output -> norm -> the largest error of perturbed runs
    floors: dict[str, dict[str, dict[str, float]]] = dataclasses.field(default_factory=dict)

    @property
    def level(self) -> int:
        return int(self.id[1])

    @property
    def full_config(self) -> Config:
        return (self.own or load_config(self.config)).replace(**self.replace)

    @property
    def causes(self) -> tuple[str, ...]:
        return causes_of(self.call, self.options, self.full_config)


class Inputs:
    """The input tensors by file stem and key; "checkpoints/digits" holds trained weights.

    With a seed, all of them are others, and so are the times between the first and the last.
    """

    def __init__(self, seed: int | None = None) -> None:
        self.files: dict[str, Tree] = {}
        self.seed = seed

    def _keyed(self, name: str) -> str:
        return name if self.seed is None else f"{self.seed}/{name}"

    def normals(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        """Normals that belong to a name, and to the seed."""
        return golden_normals(self._keyed(name), shape)

    def times(self, config: Config, name: str, *middle: float) -> np.ndarray:
        """Times of a batch: 0, T-1, then these fractions of T, or as many that the seed draws."""
        last = config.timesteps - 1
        if self.seed is not None:
            key = zlib.crc32(self._keyed(name).encode())
            middle = tuple(uniforms(key, "golden", 1, (len(middle),)))
        return np.array([0, last, *(int(f * last) for f in middle)])

    def put(self, stem: str, key: str, value: np.ndarray) -> str:
        """Store a tensor; gives its reference."""
        tensors = self.files.setdefault(f"{stem}.inputs", {})
        if key in tensors:
            raise ValueError(f"input {stem}.inputs:{key} is made twice")
        value = np.array(value)
        if value.dtype.kind == "f":
            value = value.astype(np.float32).astype(np.float64)
        tensors[key] = value
        return f"{stem}.inputs:{key}"

    def put_tree(self, stem: str, prefix: str, tree: Tree) -> str:
        """Store a tree; gives its reference."""
        for name, value in tree.items():
            self.put(stem, f"{prefix}/{name}", value)
        return f"{stem}.inputs:{prefix}"

    def draw(self, stem: str, key: str, shape: tuple[int, ...], scale=1.0, shift=0.0) -> str:
        """Store normals of this shape, times scale, plus shift."""
        return self.put(stem, key, shift + scale * self.normals(f"{stem}:{key}", shape))

    def array(self, reference: str) -> np.ndarray:
        """The tensor that a reference names."""
        stem, _, key = reference.partition(":")
        return self.files[stem][key]

    def tree(self, reference: str) -> Tree:
        """Name -> tensor of a tree reference, float64."""
        stem, _, prefix = reference.partition(":")
        if stem == "checkpoint":
            weights = self.files[f"checkpoints/{prefix}"]
            return {name: value.astype(np.float64) for name, value in weights.items()}
        start = f"{prefix}/"
        tensors = self.files[stem].items()
        return {key.removeprefix(start): v for key, v in tensors if key.startswith(start)}


def golden_normals(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Normals that belong to a name."""
    return normals(zlib.crc32(name.encode()), "golden", 0, shape)


def golden_params(inputs: Inputs, config: Config) -> Tree:
    """Random weights that hide nothing: no zero convolution, gamma not 1, beta not 0."""
    params = {}
    for key, shape in parameter_shapes(config).items():
        draw = inputs.normals(f"{config.name}:{key}", shape)
        module, _, part = key.rpartition(".")
        if "norm" in module.rpartition(".")[2]:
            value = 1 + 0.25 * draw if part == "weight" else 0.2 * draw
        elif module == "class_embedding":
            value = 0.5 * draw
        elif part == "bias":
            value = 0.1 * draw
        else:
            value = draw / np.sqrt(np.prod(shape[1:]))
        params[key] = value
    return params


def stride_of(config: Config) -> int:
    """Every how many-th element of a large tensor is kept: coprime to every width (tiny: 7)."""
    widths = (*config.channels, *config.image_size)
    return next(prime for prime in (7, 11, 13, 17, 61) if all(w % prime for w in widths))


def some_labels(config: Config, *wanted: int) -> np.ndarray:
    """These labels, or the last class where there are fewer; num_classes is the null label."""
    null = config.num_classes
    return np.array([label if label == null else min(label, null - 1) for label in wanted])


def _batch(
    inputs: Inputs,
    config: Config,
    key: str,
    count: int = 0,
    labels: tuple[int, ...] | None = None,
) -> dict[str, str]:
    """References of x0, t, noise, labels and drop of one batch, or of `count` of them."""
    stem, lead = config.name, (count,) if count else ()
    shape = (*lead, B, *config.image_shape)
    x0 = np.clip(0.7 * inputs.normals(f"{stem}:{key}/x0", shape), -1, 1)
    t = np.stack(
        [
            np.roll(inputs.times(config, f"{stem}:{key}/t{i}", (0.37 + 0.619 * i) % 1), i)
            for i in range(count or 1)
        ]
    )
    given = {
        "x0": inputs.put(stem, f"{key}/x0", x0),
        "t": inputs.put(stem, f"{key}/t", t if count else t[0]),
        "noise": inputs.draw(stem, f"{key}/noise", shape),
    }
    if config.num_classes:
        null = config.num_classes
        turn = [
            np.roll(some_labels(config, *labels) if labels else [null - 1, null, (2 + i) % null], i)
            for i in range(count or 1)
        ]
        drop = np.stack([np.roll([False, False, True], i) for i in range(count or 1)])
        given["labels"] = inputs.put(stem, f"{key}/labels", np.stack(turn) if count else turn[0])
        given["drop"] = inputs.put(stem, f"{key}/drop", drop if count else drop[0])
    return given


def golden_cases(inputs: Inputs) -> list[Case]:
    """Every case, in the order of the levels; those of digits where its checkpoint is there."""
    names = ("tiny", "tiny_uncond", "tiny_v", "tiny_x0")
    configs = {name: load_config(name) for name in names}
    params = {
        name: inputs.put_tree(name, "params", golden_params(inputs, configs[name]))
        for name in names[:2]
    }
    params["tiny_v"] = params["tiny_x0"] = params["tiny"]
    cases = [
        Case(f"L0/tiny/{stem}", "S1", "tiny", "schedule", {}, {}, replace=dict(tables.CASES[stem]))
        for stem in tables.CASES
    ]
    for name in params:
        # From 23 to 1 of tiny_uncond, float32 coefficients with eta = 1 take the root of less
        # than 0.
        cases += step_cases(inputs, configs[name], long=1 if name == "tiny_uncond" else None)
    cases += layer_cases(inputs, configs["tiny"], params["tiny"])
    # Of this one the network alone is asked: only its plan differs, blocks and steps do not.
    configs["tiny_deep"] = deep = load_config("tiny_deep")
    networks = params | {
        "tiny_deep": inputs.put_tree("tiny_deep", "params", golden_params(inputs, deep))
    }
    for name, tree in networks.items():
        stride = 1 if name == "tiny" else STRIDE
        cases += network_cases(inputs, configs[name], tree, stride)
    for name, tree in networks.items():
        cases += gradient_cases(inputs, configs[name], tree, whole=name == "tiny")
    cases += update_cases(inputs, configs["tiny"], params["tiny"])
    cases += _trajectory_cases(inputs, params)
    if CHECKPOINT.exists():
        inputs.files["checkpoints/digits"] = parse_safetensors(CHECKPOINT.read_bytes())
        cases += _digits_cases(inputs)
    cases.append(_run_case(inputs))
    return sorted(cases, key=lambda case: case.level)


def step_cases(inputs: Inputs, config: Config, long: int | None = None) -> list[Case]:
    """L1: everything between the schedule and the network; `long` is where a long step ends."""
    name, rows = config.name, 5
    shape = (rows, *config.image_shape)
    times = inputs.times(config, f"{name}:L1/t", 0.5, 0.07, 0.8)
    t = inputs.put(name, "L1/t", times)
    noise = inputs.draw(name, "L1/noise", shape)
    x0 = inputs.put(name, "L1/x0", np.clip(0.7 * inputs.normals(f"{name}:L1/x0", shape), -1, 1))
    x_t, out = inputs.draw(name, "L1/x_t", shape), inputs.draw(name, "L1/out", shape)
    clean = {"x0": x0, "t": t, "noise": noise}
    noisy = {"x_t": x_t, "t": t, "out": out}

    def case(what: str, clause: str, call: str, given: dict, replace=None, **options) -> Case:
        return Case(f"L1/{name}/{what}", clause, name, call, given, options, replace=replace or {})

    cases = [
        case("q_sample", "S2", "q_sample", clean),
        case("target", "S2", "target", clean),
        case("predict_x0_eps", "S3", "predict_x0_eps", noisy),
        case("ddpm_step", "S4", "ddpm_step", {**noisy, "noise": noise}),
    ]
    other = "large" if config.variance == "small" else "small"
    cases.append(
        case(
            f"ddpm_step_{other}",
            "S4",
            "ddpm_step",
            {**noisy, "noise": noise},
            {"variance": other},
        )
    )
    turned = {"clip": not config.clip}
    word = "unclipped" if config.clip else "clipped"
    cases.append(case(f"predict_x0_eps_{word}", "S3", "predict_x0_eps", noisy, turned))
    cases.append(case(f"ddpm_step_{word}", "S4", "ddpm_step", {**noisy, "noise": noise}, turned))
    # Row 0 ends; row 1 takes a long step, row 2 one to t-1, row 3 ends from afar, row 4 to 0.
    long = int(0.6 * config.timesteps) if long is None else long
    ends = np.minimum([-1, long, times[2] - 1, -1, 0], times - 1)
    t_prev = inputs.put(name, "L1/t_prev", ends)
    ddim = {**noisy, "t_prev": t_prev, "noise": noise}
    for eta in (0.0, 0.5, 1.0):
        cases.append(case(f"ddim_step_eta{eta:g}", "S5", "ddim_step", ddim, eta=eta))
    cases.append(case(f"ddim_step_{word}", "S5", "ddim_step", ddim, turned, eta=0.5))
    if config.num_classes:
        both = {"out_null": out, "out_label": noise}
        for scale in (0.0, 1.0, 3.0, -0.5):
            cases.append(case(f"guide_{scale:g}", "S6", "guide", both, guidance_scale=scale))
    return cases


def layer_cases(inputs: Inputs, config: Config, params: str) -> list[Case]:
    """L2: every block alone, and three of them on inputs of small and shifted spread."""
    stem, last = config.name, config.timesteps - 1
    height, width = config.image_size
    times = {"t": inputs.put(stem, "L2/t", np.minimum([0, 1, config.timesteps // 2, last], last))}
    if config.num_classes:
        labels = some_labels(config, 0, config.num_classes, 3, 1)
        times["labels"] = inputs.put(stem, "L2/labels", labels)
    emb = inputs.draw(stem, "L2/emb", (B, config.time_width))
    shared: dict[tuple[int, ...], str] = {}

    def image(name: str) -> tuple[int, ...]:
        block = find_block(config, name)
        return B, height >> block.level, width >> block.level, block.in_channels

    def case(name: str, what: str, given: dict) -> Case:
        return Case(f"L2/{stem}/{what}", "S7", stem, "run_block", given, {"name": name}, params)

    cases = []
    plan = blocks(config)
    for block in plan:
        named = times
        if block.kind not in ("time_proj", "emb"):
            shape = image(block.name)
            if shape not in shared:
                key = "L2/x" + "x".join(map(str, shape[1:]))
                shared[shape] = inputs.draw(stem, key, shape, 1.3, 0.2)
            named = {"x": shared[shape], "emb": emb}
        given = {key: named[key] for key in block.inputs if key in named}
        cases.append(case(block.name, block.name, given))
    for kind in ("resnet", "attention", "conv_out"):
        name = next(block.name for block in plan if block.kind == kind)
        for what, scale, shift in (("sigma_0.01", 0.01, 0.0), ("mean_100", 1.0, 100.0)):
            x = inputs.draw(stem, f"L2/{name}_{what}", image(name), scale, shift)
            given = {"x": x, "emb": emb}
            given = {key: given[key] for key in find_block(config, name).inputs}
            cases.append(case(name, f"{name}_{what}", given))
    return cases


def network_cases(inputs: Inputs, config: Config, params: str, stride: int = 1) -> list[Case]:
    """L3: the whole network and its taps."""
    name = config.name
    given = {
        "x": inputs.draw(name, "L3/x", (B, *config.image_shape)),
        "t": inputs.put(name, "L3/t", np.roll(inputs.times(config, f"{name}:L3/t", 0.43), 1)),
    }
    if config.num_classes:
        labels = some_labels(config, config.num_classes, 0, 3)
        given["labels"] = inputs.put(name, "L3/labels", labels)
    return [
        Case(f"L3/{name}/predict", "S7", name, "predict", given, {}, params),
        Case(f"L3/{name}/taps", "S7", name, "taps", given, {}, params, stride=stride),
    ]


def gradient_cases(inputs: Inputs, config: Config, params: str, whole: bool) -> list[Case]:
    """L4: loss and gradients. The `whole` tells S8 from the dropout of labels, which is S6's."""
    name = config.name

    def case(what: str, clause: str, given: dict, stride: int = stride_of(config)) -> Case:
        return Case(
            f"L4/{name}/{what}", clause, name, "loss_and_grads", given, {}, params, stride=stride
        )

    batch = _batch(inputs, config, "L4")
    if not whole:
        return [case("loss_and_grads", "S8", batch)]
    again = _batch(inputs, config, "L4/again", labels=(2, config.num_classes, 2))
    kept, other = ({k: v for k, v in b.items() if k != "drop"} for b in (batch, again))
    return [
        case("loss_and_grads", "S8", kept, stride=1),
        # The same model is asked a second time, with a label that two rows share.
        case("loss_and_grads_again", "S8", other),
        case("loss_and_grads_dropped", "S6", batch),
    ]


def update_cases(
    inputs: Inputs, config: Config, params: str, record: tuple[int, ...] = (1, 2, 10)
) -> list[Case]:
    """L5: the optimiser on given gradients, and the whole train step."""
    name, shapes, stride = config.name, parameter_shapes(config), stride_of(config)
    # Tensors of 1e-8 stand where epsilon does: inside or outside the root, hat or not.
    small = (1e-3, 1e-6, 1e-3, 1e-7, 1e-8)
    sizes = {
        "a": [0.05 * max(1.0, config.max_grad_norm)] * len(shapes),  # norm about 12: clipped
        "b": [small[i % len(small)] for i in range(len(shapes))],  # norm about 0.2: not clipped
        "c": [(0.03, 0.001, 1e-5)[i % 3] for i in range(len(shapes))],
        "m": [0.01] * len(shapes),
    }
    trees = {
        key: inputs.put_tree(
            name,
            f"L5/{key}",
            {
                part: scale * inputs.normals(f"{name}:L5/{key}/{part}", shape)
                for (part, shape), scale in zip(shapes.items(), scales, strict=True)
            },
        )
        for key, scales in sizes.items()
    }
    trees["v"] = inputs.put_tree(
        name,
        "L5/v",
        {n: (0.02 * inputs.normals(f"{name}:L5/v/{n}", s)) ** 2 for n, s in shapes.items()},
    )

    def case(what: str, sequence: str, replace=None, state: tuple[str, ...] = (), **options):
        given = {f"grads/{key}": trees[key] for key in sorted(set(sequence))}
        return Case(
            f"L5/{name}/{what}",
            "S9",
            name,
            "apply_gradients",
            given | {key: trees[key] for key in state},
            {"sequence": list(sequence), **options},
            params,
            replace=replace or {},
            stride=stride,
        )

    return [
        case("apply_clipped", "a"),
        case("apply_small", "b"),
        case("apply_sequence", "abcab"),
        case("apply_late", "bc", state=("m", "v"), step=5000),
        case("apply_plain", "a", {"max_grad_norm": 0.0, "warmup": 0}),
        train_case(inputs, config, params, record, stride),
    ]


def train_case(
    inputs: Inputs, config: Config, params: str, record: tuple[int, ...], stride: int
) -> Case:
    """L5: as many train steps as the last of `record`; what they make of the state after those."""
    return Case(
        f"L5/{config.name}/train_steps",
        "S9",
        config.name,
        "train_steps",
        _batch(inputs, config, "L5/train", record[-1]),
        {"record": list(record)},
        params,
        stride=stride,
    )


def trajectory_case(
    inputs: Inputs,
    config: Config,
    params: str,
    what: str,
    steps: int,
    seed: int,
    replace: dict[str, Any] | None = None,
    **options: Any,
) -> Case:
    """L6: one whole trajectory from the shared stream's noise."""
    name = config.name
    x, noise = sampling_noise(config, B, seed, steps)
    given = {"x": inputs.put(name, f"L6/{what}/x", x)}
    if options["method"] == "ddpm" or options.get("eta"):
        given["noise"] = inputs.put(name, f"L6/{what}/noise", noise)
    if config.num_classes:
        given["labels"] = inputs.put(name, f"L6/{what}/labels", some_labels(config, 2, 4, 0))
    if options["method"] != "ddpm":
        options["steps"] = steps
    clause = {"ddpm": "S4", "ddim": "S5", "dpmpp": "S13"}[options["method"]]
    clause = "S6" if "guidance_scale" in options else clause
    return Case(
        f"L6/{name}/{what}",
        clause,
        name,
        "sample",
        given,
        options,
        params,
        replace=replace or {},
    )


def _trajectory_cases(inputs: Inputs, params: dict[str, str]) -> list[Case]:
    """L6: whole trajectories of every method, with those step counts that are hardest."""

    def case(what: str, name: str, steps: int, seed: int, replace=None, **options) -> Case:
        config = load_config(name)
        return trajectory_case(inputs, config, params[name], what, steps, seed, replace, **options)

    ddim: dict[str, Any] = {"method": "ddim"}
    dpmpp: dict[str, Any] = {"method": "dpmpp"}
    # Those of S4, S5 and S13 come first: a fault of theirs shows in what S6 guides, too.
    return [
        case("ddpm", "tiny_uncond", 24, 11, method="ddpm"),
        case("ddim", "tiny", 7, 12, **ddim, eta=0.0),  # 1000 / 7 is not whole
        # Differs in eta alone from the one above: a compiled sampler must not keep its first.
        case("ddim_eta", "tiny", 7, 30, **ddim, eta=0.7),
        # Of 4000 times in 3 steps, float32 coefficients take the root of less than 0.
        case("ddim_eta1", "tiny_v", 3, 15, **ddim, eta=1.0),
        case("ddim_every_t", "tiny_x0", 20, 17, **ddim, eta=0.0),
        case("ddpm_T2", "tiny_x0", 2, 18, {"timesteps": 2}, method="ddpm"),
        case("ddim_T1", "tiny_x0", 1, 19, {"timesteps": 1}, **ddim, eta=1.0),
        case("dpmpp", "tiny", 7, 21, **dpmpp),
        case("dpmpp", "tiny_v", 9, 22, **dpmpp),  # 4000 / 9 is not whole
        case("dpmpp_every_t", "tiny_x0", 20, 23, **dpmpp),
        case("dpmpp_1", "tiny_x0", 1, 24, **dpmpp),
        case("dpmpp_2", "tiny_x0", 2, 25, **dpmpp),
        case("dpmpp_3", "tiny_x0", 3, 26, **dpmpp),
        case("dpmpp_unclipped", "tiny", 10, 27, {"clip": False, "timesteps": 10}, **dpmpp),
        case("dpmpp_clipped", "tiny_v", 4, 28, {"clip": True}, **dpmpp),
        case("ddim_guided", "tiny", 7, 13, **ddim, eta=0.0, guidance_scale=1.5),
        # Differs from the one above in the scale alone.
        case("ddim_guided_0", "tiny", 7, 20, **ddim, eta=0.0, guidance_scale=0.0),
        case("ddim_guided_eta", "tiny", 7, 14, **ddim, eta=0.7, guidance_scale=3.0),
        case("ddpm_guided", "tiny_x0", 20, 16, method="ddpm", guidance_scale=1.5),
        case("dpmpp_guided", "tiny", 7, 29, **dpmpp, guidance_scale=1.5),
    ]


def _digits_cases(inputs: Inputs) -> list[Case]:
    """The trained digits model: network, gradients, two train steps, guided samples."""
    params, config, stride = "checkpoint:digits", load_config("digits"), 61
    cases = network_cases(inputs, config, params, STRIDE)
    cases.append(
        Case(
            "L4/digits/loss_and_grads",
            "S8",
            "digits",
            "loss_and_grads",
            _batch(inputs, config, "L4"),
            {},
            params,
            stride=stride,
        )
    )
    cases.append(train_case(inputs, config, params, (1, 2), stride))
    steps, count = 50, config.num_classes
    x, _ = sampling_noise(config, count, 0, 1)
    given = {
        "x": inputs.put("digits", "L6/x", x),
        "labels": inputs.put("digits", "L6/labels", np.arange(count)),
    }
    options = {"method": "ddim", "steps": steps, "eta": 0.0, "guidance_scale": 1.5}
    cases.append(Case("L6/digits/ddim_guided", "S6", "digits", "sample", given, options, params))
    return cases


def _run_case(inputs: Inputs) -> Case:
    """L7: one hundred shared-noise steps on digits from initial weights, then ten samples."""
    config, data = load_config("digits"), load_digits()
    x, _ = sampling_noise(config, config.num_classes, RUN_SEED, 1)
    given = {
        "images": inputs.put("digits", "L7/images", data.train_images),
        "classes": inputs.put("digits", "L7/classes", data.train_labels),
        "x": inputs.put("digits", "L7/x", x),
        "labels": inputs.put("digits", "L7/labels", np.arange(config.num_classes)),
    }
    options = {
        "seed": RUN_SEED,
        "steps": RUN_STEPS,
        "sample": {"method": "ddim", "steps": 50, "eta": 0.0, "guidance_scale": 1.5},
    }
    batch = {"batch_size": RUN_BATCH}
    return Case("L7/digits/train_run", "S10", "digits", "train_run", given, options, replace=batch)
