"""A backend and goldens made of it, for the tests of the suite's machinery.

The numbers of the goldens come from this very backend, so they show nothing of the spec: they show
what the suite says of backends that differ from this one. The gradients are made up.
"""

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from conformance.execute import Session
from spec import reference
from spec.config import load_config
from spec.goldens import Case, Goldens, sha256
from spec.noise import normals
from spec.params import blocks, find_block, initial_params, parameter_shapes

CONFIG = load_config("tiny")
DIGITS = load_config("digits")
BATCH = 3
TOLERANCE = {
    "float64": {"l2": 1e-10, "reason": "float64"},
    "float32": {"max": 1e-5, "l2": 1e-5, "reason": "float32, made up"},
    "bf16": {"l2": 1e-2, "reason": "bf16, made up"},
}
# A float32 parameter rounds at 6e-8 of itself, which is much of an EMA's first small move.
MOVED = TOLERANCE | {"float32": {"l2": 1e-2, "reason": "float32 parameters, made up"}}
BLOCKS = ("emb", "down_blocks.0.resnets.0", "down_blocks.1.attentions.0", "up_blocks.0.resnets.0")


class Fake:
    """The plain reference in float64, cast at the end; its gradients are 0.3 p + 0.01 loss."""

    def __init__(self, config, params, dtype):
        self.config, self.dtype = config, dtype
        self.tables = reference.make_schedule(config)
        self.now = reference.initial_state({k: v.astype(np.float64) for k, v in params.items()})

    def cast(self, value):
        if isinstance(value, dict):
            return {key: self.cast(leaf) for key, leaf in value.items()}
        return np.array(value, self.dtype)

    def schedule(self):
        return self.cast(self.tables)

    def q_sample(self, x0, t, noise):
        return self.cast(reference.q_sample(self.tables, x0, t, noise))

    def target(self, x0, t, noise):
        return self.cast(reference.target(self.config, self.tables, x0, t, noise))

    def predict_x0_eps(self, x_t, t, out):
        x0, eps = reference.predict_x0_eps(self.config, self.tables, x_t, t, out)
        return self.cast(x0), self.cast(eps)

    def ddpm_step(self, x_t, t, out, noise):
        return self.cast(reference.ddpm_step(self.config, self.tables, x_t, t, out, noise))

    def ddim_step(self, x_t, t, t_prev, out, noise, eta=0.0):
        args = (self.config, self.tables, x_t, t, t_prev, out, noise, eta)
        return self.cast(reference.ddim_step(*args))

    def guide(self, out_null, out_label, guidance_scale):
        return self.cast(reference.guide(out_null, out_label, guidance_scale))

    def predict(self, x, t, labels=None):
        return self.cast(reference.predict(self.config, self.now["params"], x, t, labels))

    def taps(self, x, t, labels=None):
        return self.cast(reference.taps(self.config, self.now["params"], x, t, labels))

    def run_block(self, name, **inputs):
        return self.cast(reference.run_block(self.config, self.now["params"], name, **inputs))

    def loss_and_grads(self, x0, t, noise, labels=None, drop=None):
        p = self.now["params"]
        loss = float(reference.loss(self.config, self.tables, p, x0, t, noise, labels, drop))
        return loss, self.cast({name: 0.3 * value + 0.01 * loss for name, value in p.items()})

    def apply_gradients(self, grads):
        wide = {name: value.astype(np.float64) for name, value in grads.items()}
        self.now = reference.update(self.config, self.now, wide)

    def train_step(self, x0, t, noise, labels=None, drop=None):
        loss, grads = self.loss_and_grads(x0, t, noise, labels, drop)
        self.apply_gradients(grads)
        return loss

    def sample(self, x, noise=None, labels=None, *, method="ddpm", steps=None, **options):
        """Not a sampler: x faded step by step, and moved by its label."""
        moved = x + 0.1 * labels[:, None, None, None]
        return self.cast(np.stack([moved * 0.9**i for i in range(steps)]))

    def state(self):
        trees = {part: self.cast(self.now[part]) for part in ("params", "m", "v", "ema")}
        return {"step": self.now["step"], **trees}

    def load_state(self, state):
        trees = {part: state[part] for part in ("params", "m", "v", "ema")}
        wide = {p: {k: v.astype(np.float64) for k, v in tree.items()} for p, tree in trees.items()}
        self.now = {"step": state["step"], **wide}

    def synchronize(self):
        pass

    def describe(self):
        return {"name": "fake", "dtype": self.dtype}


def opener(model_class):
    """An `open` of the protocol for a class like Fake."""

    def open_model(config, params=None, *, seed=0, dtype="float32", device="auto", mode="compiled"):
        if device == "cuda":
            raise ValueError("device = 'cuda' is not on this machine")
        params = initial_params(config, seed) if params is None else params
        return model_class(config, {k: np.asarray(v, dtype) for k, v in params.items()}, dtype)

    return open_model


class Backend:
    """A backend that is not a module of its own."""

    modes = ("eager",)

    def __init__(self, model_class, name="fake"):
        self.name, self.open = name, opener(model_class)


def exact(purpose_step, shape):
    """Normals that float32 holds exactly, in float64."""
    return normals(7, "golden", purpose_step, shape).astype(np.float32).astype(np.float64)


def golden_inputs():
    """The tensors of tiny.inputs."""
    image = (BATCH, *CONFIG.image_shape)
    inputs = {name: exact(i, image) for i, name in enumerate(("x0", "noise", "out", "out_label"))}
    inputs |= {"t": np.array([0, 400, 999]), "t_prev": np.array([-1, 200, 998])}
    inputs |= {"labels": np.array([0, 5, 2]), "drop": np.array([False, True, False])}
    steps = (2, *image)
    inputs |= {"steps/x0": exact(5, steps), "steps/noise": exact(6, steps)}
    inputs |= {"steps/t": np.array([[1, 2, 3], [999, 0, 5]])}
    inputs |= {"steps/labels": np.array([[0, 1, 2], [3, 4, 5]])}
    inputs |= {"steps/drop": np.zeros((2, BATCH), bool), "emb": exact(8, (BATCH, 32))}
    recorded = reference.taps(
        CONFIG, initial_params(CONFIG, 3), inputs["x0"], inputs["t"], inputs["labels"]
    )
    by_name = {block.name: block for block in blocks(CONFIG)}
    for name in BLOCKS[1:]:
        block = by_name[name]
        spatial = recorded[name].shape[1:3]
        inputs[f"block/{name}"] = exact(9, (BATCH, *spatial, block.in_channels))
    inputs |= {"digits/x": exact(10, (2, *DIGITS.image_shape)), "digits/labels": np.array([1, 10])}
    for i, (name, shape) in enumerate(parameter_shapes(CONFIG).items()):
        inputs[f"params/{name}"] = exact(100 + i, shape) / 8
        for j, tree in enumerate(("a", "b", "m")):
            inputs[f"tree_{tree}/{name}"] = exact(1000 * (j + 1) + i, shape) / 8
        inputs[f"tree_v/{name}"] = inputs[f"tree_m/{name}"] ** 2
    return {key: np.ascontiguousarray(value) for key, value in inputs.items()}


def golden_calls():
    """id -> (level, clause, config, call, params, inputs, options)."""

    def refs(*names, **more):
        return {n: f"tiny.inputs:{n}" for n in names} | {
            k: f"tiny.inputs:{v}" for k, v in more.items()
        }

    cases = {
        "L0/tiny/schedule": (0, "S1", "schedule", {}, {}),
        "L1/tiny/q_sample": (1, "S2", "q_sample", refs("x0", "t", "noise"), {}),
        "L1/tiny/target": (1, "S2", "target", refs("x0", "t", "noise"), {}),
        "L1/tiny/predict_x0_eps": (1, "S3", "predict_x0_eps", refs("t", "out", x_t="x0"), {}),
        "L1/tiny/ddpm_step": (1, "S4", "ddpm_step", refs("t", "out", "noise", x_t="x0"), {}),
        "L1/tiny/ddim_step": (
            1,
            "S5",
            "ddim_step",
            refs("t", "t_prev", "out", "noise", x_t="x0"),
            {"eta": 0.5},
        ),
        "L1/tiny/guide": (
            1,
            "S6",
            "guide",
            refs("out_label", out_null="out"),
            {"guidance_scale": 1.5},
        ),
    }
    for name in BLOCKS:
        given = {"emb": refs("t", "labels"), "resnet": refs("emb", x=f"block/{name}")}
        inputs = given.get(find_block(CONFIG, name).kind, refs(x=f"block/{name}"))
        cases[f"L2/tiny/{name}"] = (2, "S7", "run_block", inputs, {"name": name})
    network = refs("t", "labels", x="x0")
    batch = refs("x0", "t", "noise", "labels", "drop")
    cases["L3/tiny/predict"] = (3, "S7", "predict", network, {})
    cases["L3/tiny/taps"] = (3, "S7", "taps", network, {})
    cases["L4/tiny/grads"] = (4, "S8", "loss_and_grads", batch, {})
    cases["L5/tiny/apply"] = (
        5,
        "S9",
        "apply_gradients",
        {"grads/a": "tiny.inputs:tree_a", "grads/b": "tiny.inputs:tree_b"},
        {"sequence": ["a", "b", "a"]},
    )
    cases["L5/tiny/apply_later"] = (
        5,
        "S9",
        "apply_gradients",
        {"grads/a": "tiny.inputs:tree_a", "m": "tiny.inputs:tree_m", "v": "tiny.inputs:tree_v"},
        {"sequence": ["a"], "step": 7},
    )
    steps = {name: f"tiny.inputs:steps/{name}" for name in ("x0", "t", "noise", "labels", "drop")}
    cases["L5/tiny/train_steps"] = (5, "S9", "train_steps", steps, {"record": [1, 2]})
    cases["L6/digits/guided"] = (
        6,
        "S6",
        "sample",
        refs(x="digits/x", labels="digits/labels"),
        {"method": "ddim", "steps": 4, "eta": 0.0, "guidance_scale": 1.5},
    )
    return cases


def write_goldens(folder: Path) -> Path:
    """Write a folder of goldens in the format of spec/goldens.py; gives the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(golden_inputs(), folder / "tiny.inputs.safetensors")
    entries = []
    for case_id, (level, clause, call, inputs, options) in golden_calls().items():
        digits = case_id.split("/")[1] == "digits"
        entries.append(
            {
                "id": case_id,
                "level": level,
                "clause": clause,
                "config": "digits" if digits else "tiny",
                "call": call,
                "params": None if digits else "tiny.inputs:params",
                "inputs": inputs,
                "options": options,
                "outputs": {},
                "causes": ["the first cause", "the second cause"],
                "oracle": "itself",
            }
        )
    _write_manifest(folder, entries)
    session = Session(Backend(Fake), Goldens(folder), "float64", "cpu")
    expected = {}
    for case, entry in zip(Goldens(folder).cases, entries, strict=True):
        outcome = session.attempt(case)
        assert outcome.status == "done", (case.id, outcome.message, outcome.trace)
        for key, value in outcome.results.items():
            stride = 7 if value.size > 300 and case.call == "loss_and_grads" else 1
            if stride > 1:
                kept = np.ascontiguousarray(value.reshape(-1)[::stride])
            else:
                kept = np.array(value, order="C")
            expected[f"{case.id}/{key}"] = kept
            entry["outputs"][key] = {
                "tensor": f"tiny.expected:{case.id}/{key}",
                "shape": list(value.shape),
                "dtype": str(value.dtype),
                "sha256": sha256(kept.tobytes()),
                "stride": stride,
                "tolerance": MOVED if "delta/" in key else TOLERANCE,
            }
    save_file(expected, folder / "tiny.expected.safetensors")
    _write_manifest(folder, entries)
    Goldens(folder).verify()
    return folder


def _write_manifest(folder, entries):
    files = {path.stem: sha256(path.read_bytes()) for path in sorted(folder.glob("*.safetensors"))}
    manifest = {"format": 1, "made_with": {"numpy": np.__version__}, "files": files}
    text = json.dumps(manifest | {"cases": entries})
    (folder / "manifest.json").write_text(text, encoding="utf-8")


def case_named(goldens: Goldens, case_id: str) -> Case:
    """The case of this id."""
    return next(case for case in goldens.cases if case.id == case_id)
