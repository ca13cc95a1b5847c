"""The shared checks of arguments: every fault is named, and nothing bad reaches the model."""

import platform
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from spec.backend import Checked, Model, check_open
from spec.config import load_config
from spec.params import ParameterError, initial_params

ROOT = Path(__file__).parent.parent
TINY, UNCOND = load_config("tiny"), load_config("tiny_uncond")
PARAMS = initial_params(TINY, 0)


class Recorder:
    """Stands for a model: remembers what reached it and gives it back."""

    def __init__(self):
        self.calls = []

    def __getattr__(self, name):
        def method(*given, **named):
            self.calls.append((name, given, named))
            return name

        return method


@pytest.fixture
def recorder():
    return Recorder()


@pytest.fixture
def model(recorder):
    return Checked(recorder, TINY, "float32")


@pytest.fixture
def plain(recorder):
    return Checked(recorder, UNCOND, "float32")


def images(rows=3, config=TINY, dtype=np.float32):
    return np.zeros((rows, *config.image_shape), dtype)


T = np.array([0, 5, 999])
LABELS = np.array([0, 5, 2])


def test_good_arguments_reach_the_model(model, recorder):
    x = images()
    assert model.q_sample(x, T, x) == "q_sample"
    assert model.predict(x, T, LABELS) == "predict"
    assert model.loss_and_grads(x, T, x, LABELS, np.array([True, False, False]))
    assert model.ddim_step(x, T, np.array([-1, -1, 3]), x, x, 1)
    assert model.run_block("emb", t=T, labels=LABELS)
    assert model.sample(x, labels=LABELS, method="ddim", steps=7, guidance_scale=0)
    assert model.sample(x, labels=LABELS, method="dpmpp", steps=7, guidance_scale=2)
    assert model.sample(x, np.zeros((1000, *x.shape), np.float32), LABELS)
    assert [name for name, _, _ in recorder.calls][:2] == ["q_sample", "predict"]
    assert recorder.calls[-1][2]["steps"] == 1000
    assert isinstance(model, Model)


BAD_TIMES = [
    (np.array([0, 5, 1000]), ValueError, r"t\[2\] = 1000 is outside 0..999"),
    (np.array([0, -1, 5]), ValueError, r"t\[1\] = -1 is outside"),
    (np.array([0.0, 5.0, 9.0]), TypeError, "t is float64; give a NumPy array of integers"),
    ([0, 5, 9], TypeError, "t is list"),
    (np.array([True, False, True]), TypeError, "t is bool"),
    (np.array([0, 5]), ValueError, r"t has shape \[2\]; expected \[3\]"),
    (np.array([[0], [5], [9]]), ValueError, r"t has shape \[3, 1\]"),
    (7, TypeError, "t is int"),
]


@pytest.mark.parametrize(("t", "error", "words"), BAD_TIMES)
def test_bad_times_are_named(model, recorder, t, error, words):
    x = images()
    for call in (
        lambda: model.q_sample(x, t, x),
        lambda: model.ddpm_step(x, t, x, x),
        lambda: model.predict(x, t, LABELS),
        lambda: model.train_step(x, t, x, LABELS),
        lambda: model.predict_x0_eps(x, t, x),
    ):
        with pytest.raises(error, match=words):
            call()
    assert not recorder.calls


@pytest.mark.parametrize(
    ("labels", "error", "words"),
    [
        (np.array([0, 6, 2]), ValueError, r"labels\[1\] = 6 is outside 0..5; 5 is the null"),
        (np.array([0, -1, 2]), ValueError, r"labels\[1\] = -1"),
        (np.array([0.0, 1.0, 2.0]), TypeError, "labels is float64"),
        (np.array([0, 1]), ValueError, r"labels has shape \[2\]"),
        (None, ValueError, "labels are missing.*5 classes"),
    ],
)
def test_bad_labels_are_named(model, recorder, labels, error, words):
    x = images()
    for call in (
        lambda: model.predict(x, T, labels),
        lambda: model.taps(x, T, labels),
        lambda: model.loss_and_grads(x, T, x, labels),
        lambda: model.sample(x, labels=labels, method="ddim", steps=2),
    ):
        with pytest.raises(error, match=words):
            call()
    assert not recorder.calls


@pytest.mark.parametrize(
    ("x", "error", "words"),
    [
        (images()[0], ValueError, r"x has rank 3, shape \[8, 12, 2\]; expected \[B, 8, 12, 2\]"),
        (images(0), ValueError, "x has an empty batch"),
        (images().transpose(0, 3, 1, 2), ValueError, r"x has shape \[3, 2, 8, 12\]; expected"),
        (images(dtype=np.float64), TypeError, "x has dtype float64.*float32"),
        (images().astype(np.int64), TypeError, "x has dtype int64"),
        ([[1.0]], TypeError, "x is a list; give a NumPy array"),
    ],
)
def test_bad_images_are_named(model, recorder, x, error, words):
    with pytest.raises(error, match=words):
        model.predict(x, T, LABELS)
    with pytest.raises(error, match=words):
        model.sample(x, labels=LABELS, method="ddim", steps=2)
    assert not recorder.calls


def test_images_of_one_call_agree(model):
    with pytest.raises(ValueError, match=r"noise has shape \[2, 8, 12, 2\]; expected \[3, 8, 12"):
        model.q_sample(images(), T, images(2))
    with pytest.raises(ValueError, match="out_label has shape"):
        model.guide(images(), images(2), 1.0)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"steps": 1001}, ValueError, r"steps = 1001 is outside 1..1000"),
        ({"steps": 0}, ValueError, "steps = 0"),
        ({"steps": 2.0}, ValueError, "steps = 2.0"),
        ({"steps": True}, ValueError, "steps = True"),
        ({"method": "plms"}, ValueError, "method = 'plms' is unknown; choose one of ddpm, ddim"),
        ({"method": "ddpm", "steps": 10}, ValueError, "ddpm visits all 1000 times"),
        ({"method": "ddpm", "steps": 1000}, ValueError, "noise is missing"),
        ({"method": "ddpm", "steps": None, "eta": 0.5}, ValueError, "no meaning for ddpm"),
        ({"method": "dpmpp", "eta": 0.5}, ValueError, "eta = 0.5 has no meaning for dpmpp"),
        ({"method": "dpmpp", "steps": 1001}, ValueError, r"steps = 1001 is outside 1..1000"),
        (
            {"method": "dpmpp", "noise": np.zeros((5, *images().shape), np.float32)},
            ValueError,
            "noise was given, but dpmpp adds none; leave it out, or use ddim",
        ),
        ({"eta": 1.5}, ValueError, r"eta = 1.5 is outside \[0.0, 1.0\]"),
        ({"eta": -0.1}, ValueError, "eta = -0.1"),
        ({"eta": float("nan")}, ValueError, "eta = nan"),
        ({"eta": "1"}, TypeError, "eta is a str"),
        ({"eta": 0.5}, ValueError, r"noise is missing.*\[5, 3, 8, 12, 2\]"),
        ({"guidance_scale": float("inf")}, ValueError, "guidance_scale = inf"),
        ({"guidance_scale": float("nan")}, ValueError, "guidance_scale = nan"),
        ({"guidance_scale": "2"}, TypeError, "guidance_scale is a str"),
    ],
)
def test_bad_sampling_options_are_named(model, recorder, options, error, words):
    given = {"method": "ddim", "steps": 5, **options}
    with pytest.raises(error, match=words):
        model.sample(images(), labels=LABELS, **given)
    assert not recorder.calls


def test_noise_of_a_trajectory_has_a_row_for_each_step(model):
    with pytest.raises(ValueError, match=r"noise has shape \[4, 3, 8, 12, 2\]; expected \[5, 3"):
        model.sample(
            images(), np.zeros((4, *images().shape), np.float32), LABELS, method="ddim", steps=5
        )


def test_ddim_steps_go_down(model):
    x = images()
    with pytest.raises(ValueError, match=r"t_prev\[1\] = 5 is not below t\[1\] = 5"):
        model.ddim_step(x, T, np.array([-1, 5, 3]), x, x)
    with pytest.raises(ValueError, match=r"t_prev\[0\] = -2 is outside -1..999"):
        model.ddim_step(x, T, np.array([-2, 1, 3]), x, x)
    with pytest.raises(ValueError, match="eta = 2"):
        model.ddim_step(x, T, np.array([-1, 1, 3]), x, x, 2)


def test_a_config_without_classes_takes_no_labels(plain):
    x, t = images(config=UNCOND), np.array([0, 5, 23])
    with pytest.raises(ValueError, match="labels were given, but 'tiny_uncond' has no classes"):
        plain.predict(x, t, LABELS)
    with pytest.raises(ValueError, match="drop was given"):
        plain.train_step(x, t, x, None, np.array([True, False, True]))
    with pytest.raises(ValueError, match="guidance needs classes"):
        plain.sample(x, method="ddim", steps=3, guidance_scale=1.0)
    assert plain.predict(x, t) == "predict"


@pytest.mark.parametrize(
    "drop", [np.array([1, 0, 1]), np.array([True]), [True, False, True], np.zeros((3, 1), bool)]
)
def test_a_bad_mask_is_named(model, drop):
    with pytest.raises(TypeError, match=r"drop is .*; give a NumPy array of 3 booleans"):
        model.loss_and_grads(images(), T, images(), LABELS, drop)


@pytest.mark.parametrize(
    ("name", "given", "words"),
    [
        ("none", {}, "unknown block 'none'"),
        ("conv_in", {}, "x is missing"),
        ("conv_in", {"x": images(), "t": T}, "takes x; leave out t"),
        ("emb", {"t": T}, "labels are missing"),
        ("emb", {"t": T, "labels": LABELS, "x": images()}, "leave out x"),
        ("down_blocks.1.resnets.0", {"x": images()}, "emb is missing"),
        (
            "down_blocks.1.attentions.0",
            {"x": np.zeros((3, 8, 12, 16), np.float32)},
            r"x has shape \[3, 8, 12, 16\]; expected \[B, 4, 6, 16\]",
        ),
        (
            "mid_block.resnets.0",
            {"x": np.zeros((3, 2, 3, 12), np.float32), "emb": np.zeros((2, 32), np.float32)},
            r"emb has shape \[2, 32\]; expected \[3, 32\]",
        ),
    ],
)
def test_blocks_are_given_what_they_take(model, recorder, name, given, words):
    with pytest.raises(ValueError, match=words):
        model.run_block(name, **given)
    assert not recorder.calls


def test_gradients_and_states_must_fit(model, recorder):
    with pytest.raises(ParameterError, match=r"missing: conv_in.weight"):
        model.apply_gradients({n: v for n, v in PARAMS.items() if n != "conv_in.weight"})
    with pytest.raises(ParameterError, match=r"conv_in.bias holds nan at \[0\]"):
        model.apply_gradients(PARAMS | {"conv_in.bias": np.full(8, np.nan)})
    zeros = {name: np.zeros_like(value) for name, value in PARAMS.items()}
    state = {"step": 3, "params": PARAMS, "m": zeros, "v": zeros, "ema": PARAMS}
    model.load_state(state)
    for change, words in (
        ({"step": -1}, "step = -1"),
        ({"step": 1.5}, "step = 1.5"),
        ({"extra": 1}, "state holds .*extra"),
    ):
        with pytest.raises(ValueError, match=words):
            model.load_state(state | change)
    assert [name for name, _, _ in recorder.calls] == ["load_state"]


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"dtype": "float16"}, ValueError, "dtype = 'float16' is unknown; choose one of float64"),
        ({"dtype": "tf32"}, ValueError, "'tf32' is a mode of NVIDIA GPUs; use float32, or device="),
        (
            {"dtype": "bf16", "dtypes": ("float64", "float32")},
            ValueError,
            "dtype = 'bf16' is unknown; choose one of float64, float32$",
        ),
        ({"mode": "fast"}, ValueError, "mode = 'fast'"),
        ({"device": "tpu"}, ValueError, "device = 'tpu'"),
        ({"config": "tiny"}, TypeError, "config is a str; give a Config"),
        ({"params": {}}, ParameterError, "missing"),
    ],
)
def test_open_refuses_what_it_does_not_know(change, error, words):
    given = {"config": TINY, "params": None, "dtype": "float32", "device": "cpu", "mode": "eager"}
    assert check_open(**given) is None
    with pytest.raises(error, match=words):
        check_open(**(given | change))


def new_pages(heaps: int | None, work: str) -> int:
    """The pages that a process gets from the system while it does some work a second time."""
    if platform.libc_ver()[0] != "glibc":
        pytest.skip("the setting is glibc's")
    code = (
        "import numpy as np, resource, threading\n"
        "from spec.backend import keep_freed_memory\n"
        f"keep_freed_memory({heaps})\n"
        "faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
        f"{work}\n"
        "work()\n"
        "before = faults()\n"
        "work()\n"
        "print(faults() - before)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return int(done.stdout)


def test_freed_memory_is_kept():
    """An array as large as those of a step comes back to the place of the one freed before it."""
    pages = new_pages(None, "def work(): [np.ones(2**22).sum() for _ in range(20)]")
    assert pages < 2**25 // 4096  # fewer than one of the twenty arrays has


def test_freed_memory_of_threads_is_kept_in_their_own_heaps():
    """As above, of a thread that stays and empties all parts of its heap, step by step."""
    work = (
        "from concurrent.futures import ThreadPoolExecutor\n"
        "pool = ThreadPoolExecutor(1)\n"
        "def arrays(): [np.ones(2**21) for _ in range(8)]\n"
        "def work(): pool.submit(lambda: [arrays() for _ in range(5)]).result()"
    )
    assert new_pages(None, work) < 2**24 // 4096 // 2  # fewer than half an array has


def test_freed_memory_of_threads_is_kept_in_one_heap():
    """As above, in threads that end, with arrays too large for a part of a heap of theirs."""
    work = (
        "def arrays(): [np.ones(size) for size in [2**21] * 8 + [2**24] * 2]\n"
        "def work():\n"
        "    thread = threading.Thread(target=lambda: [arrays() for _ in range(5)])\n"
        "    thread.start(), thread.join()"
    )
    assert new_pages(1, work) < 2**24 // 4096 // 2  # fewer than half an array has
