"""The peers: that each trains what it is said to, from the weights that it is given.

Diffusers and NNX are held to spec/reference.py as the benchmark does it. Keras has the network, the
lucidrains package has none of it: of those as much as there is. The latter's package stands in its
own environment alone (requirements/peers-lucidrains-cpu.txt).
"""

import importlib.util
import inspect
import warnings

import numpy as np
import pytest

from conformance.bench import batch_of, peers, reference_shares
from conformance.bench.count import count
from spec import reference
from spec.config import load_config
from spec.noise import sampling_noise
from spec.params import initial_params, parameter_count

TINY = load_config("tiny").replace(batch_size=2)
SMALL = TINY.replace(  # one level, for what takes long to compile
    name="small",
    image_size=(4, 4),
    channels=(8,),
    layers_per_block=1,
    groups=4,
    attention_levels=(),
    timesteps=20,
)
PEERS = ("diffusers", "keras", "nnx")


def peer(name: str):
    return importlib.import_module(f"conformance.bench.peers.{name}")


def drawn(config, step: int = 0) -> dict:
    """Inputs of one train step, float32."""
    return {
        key: value.astype("float32") if value.dtype.kind == "f" else value
        for key, value in batch_of(config, step).items()
    }


def wide(tree) -> dict:
    return {name: np.asarray(value, np.float64) for name, value in tree.items()}


def shares_of_one_step(model, config, loss_and_grads=None) -> dict:
    """error / limit of a train step from the initial weights; the gradient is read from m."""
    start, batch = wide(initial_params(config, 0)), batch_of(config, 0)
    before = model.state()
    assert before["step"] == 0
    assert list(before["params"]) == list(start)
    for part in ("params", "m", "v", "ema"):
        for name, value in before[part].items():
            expected = start[name] if part in ("params", "ema") else np.zeros_like(start[name])
            np.testing.assert_array_equal(value, expected.astype("float32"))
    loss = model.train_step(**drawn(config))
    model.synchronize()
    after = model.state()
    assert after["step"] == 1
    stepped = {"loss": np.array([loss])}
    for part in ("m", "v"):
        stepped |= {f"1/{part}/{name}": value for name, value in after[part].items()}
    for part, key in (("params", "delta"), ("ema", "ema_delta")):
        stepped |= {f"1/{key}/{n}": value - start[n] for n, value in wide(after[part]).items()}
    if loss_and_grads is None:
        loss_and_grads = loss, {name: value / 0.1 for name, value in wide(after["m"]).items()}
    graded = {"loss": loss_and_grads[0]}
    graded |= {f"grads/{name}": value for name, value in loss_and_grads[1].items()}
    return reference_shares(config, start, batch, graded, stepped)


@pytest.mark.parametrize("mode", ["eager", "tuned"])
@pytest.mark.parametrize("base", [TINY, load_config("tiny_v").replace(batch_size=2)])
def test_diffusers_steps_as_the_reference(mode, base):
    config = base.replace(max_grad_norm=0.0)
    model = peer("diffusers").open(config, device="cpu", mode=mode)
    known = model.loss_and_grads(**drawn(config))
    shares = shares_of_one_step(model, config, known)
    assert max(shares.values()) <= 1, shares
    # the EMA moves by S9's decay in later steps too: 2/11 of the old, then the new
    old, params = model.state()["ema"], model.state()["params"]
    model.train_step(**drawn(config, 1))
    new = model.state()
    decay = min(config.ema_decay, 2 / 11)
    for name, value in new["ema"].items():
        expected = decay * old[name] + (1 - decay) * new["params"][name]
        np.testing.assert_allclose(value, expected, atol=1e-6)
        assert not np.array_equal(new["params"][name], params[name]) or "to_k.bias" in name


@pytest.mark.parametrize("mode", ["compiled", "tuned"])
def test_nnx_steps_as_the_reference(mode):
    config = SMALL.replace(max_grad_norm=0.0)
    shares = shares_of_one_step(peer("nnx").open(config, device="cpu", mode=mode), config)
    assert max(shares.values()) <= 1, shares


def test_a_wrong_step_is_seen():
    """The comparison above can fail: another rate, and another decay of the EMA."""
    config = SMALL.replace(max_grad_norm=0.0)
    wrong = config.replace(learning_rate=1.001 * config.learning_rate)
    model = peer("diffusers").open(wrong, device="cpu")
    assert shares_of_one_step(model, config)["update"] > 1
    model = peer("diffusers").open(config, device="cpu")
    model.ema.get_decay = lambda step: 0.0  # as the library has it in the first step
    assert shares_of_one_step(model, config)["EMA"] > 1


@pytest.mark.parametrize("name", PEERS)
def test_memory_is_left_alone_in_the_first_mode_alone(name, monkeypatch):
    kept = []
    monkeypatch.setattr(peers, "keep_freed_memory", lambda: kept.append(True))
    first, second = peer(name).modes[:2]
    peer(name).open(SMALL, device="cpu", mode=first)
    assert kept == []
    peer(name).open(SMALL, device="cpu", mode=second)
    assert kept == [True]


@pytest.mark.parametrize("name", PEERS)
def test_the_network_is_that_of_the_spec(name):
    params = initial_params(TINY, 3)
    model = peer(name).open(TINY, params, device="cpu")
    found = model.params()
    assert list(found) == list(params)
    assert all(np.array_equal(found[key], value) for key, value in params.items())
    given, exact = drawn(TINY), batch_of(TINY, 0)
    out = model.predict(given["x0"], given["t"], given["labels"])
    expected = reference.predict(TINY, wide(params), exact["x0"], exact["t"], exact["labels"])
    assert out.dtype == np.float32
    assert abs(out - expected).max() < 2e-5 * abs(expected).max()
    described = model.describe()
    assert described["parameters"] == parameter_count(TINY)
    assert described["checked"].startswith("the same network")


def test_keras_trains_by_train_on_batch_from_the_right_loss():
    model = peer("keras").open(SMALL, device="cpu", mode="graph")
    given, exact = drawn(SMALL), batch_of(SMALL, 0)
    tables = reference.make_schedule(SMALL)
    expected = reference.loss(SMALL, tables, wide(initial_params(SMALL, 0)), **exact)
    losses = [model.train_step(**given) for _ in range(12)]
    model.synchronize()
    assert losses[0] == pytest.approx(float(np.real(expected)), rel=5e-6)
    assert losses[-1] < losses[0]
    with pytest.raises(NotImplementedError, match="state has no canonical names"):
        model.state()


def test_keras_warms_up_as_s9_says():
    rate = peer("keras").WarmUp(0.5, 4)
    assert [float(rate(k)) for k in (0, 1, 3, 9)] == [0.125, 0.25, 0.5, 0.5]


def test_diffusers_samples_as_the_reference():
    """Guided, every step; its tables are float32, so to 1e-4."""
    config = SMALL.replace(timesteps=20, beta_start=0.005, beta_end=0.4)
    params = initial_params(config, 1)
    x, _ = sampling_noise(config, 3, 5, 10)
    labels = np.array([1, 0, 2])
    model = peer("diffusers").open(config, params, device="cpu")
    given = {"method": "ddim", "steps": 10, "guidance_scale": 1.5}
    found = model.sample(x.astype("float32"), labels=labels, **given)
    expected = reference.sample(
        config,
        reference.make_schedule(config),
        wide(params),
        x,
        np.zeros((10, 1, 1, 1, 1)),
        labels,
        eta=0.0,
        **given,
    )
    assert found.shape == (10, 3, *config.image_shape)
    assert abs(found - expected).max() < 1e-4 * abs(expected).max()
    with pytest.raises(NotImplementedError, match="method = 'ddim', eta = 0"):
        model.sample(x.astype("float32"), labels=labels, steps=10)
    with pytest.raises(NotImplementedError, match="steps that divide T, not 7"):
        model.sample(x.astype("float32"), labels=labels, method="ddim", steps=7)


def test_diffusers_has_the_settings_of_the_oracle():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from diffusers import UNet2DModel

        from spec.oracle import unet_arguments
    defaults = inspect.signature(UNet2DModel.__init__).parameters
    for name in ("tiny", "digits", "ddpm_cifar10"):
        config = load_config(name)
        own = peer("diffusers").unet_arguments(config)
        for key, value in unet_arguments(config).items():
            assert (own[key] if key in own else defaults[key].default) == value


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mode": "fast"}, "mode = 'fast' is unknown; choose one of"),
        ({"dtype": "int8"}, "dtype = 'int8' is unknown; choose one of"),
        ({"device": "tpu"}, "device = 'tpu' is unknown; choose one of"),
        ({"device": "cuda"}, "device='cpu'"),
        ({"dtype": "tf32"}, "tf32"),
        ({"params": {}}, "missing: "),
    ],
)
@pytest.mark.parametrize("name", PEERS)
def test_what_cannot_be_opened_is_refused(name, changes, message):
    given = {"params": None, "device": "auto", **changes}
    with pytest.raises(ValueError, match=message):
        peer(name).open(SMALL, given.pop("params"), **given)


@pytest.fixture(scope="module")
def lucidrains():
    if not importlib.util.find_spec("denoising_diffusion_pytorch"):
        pytest.skip(
            "denoising_diffusion_pytorch stands in the environment peers-lucidrains-cpu alone"
        )
    return peer("lucidrains")


UNCONDITIONAL = SMALL.replace(
    num_classes=0, label_dropout=0.0, channels=(8, 16), attention_levels=(1,), timesteps=1000
)


@pytest.mark.parametrize("mode", ["eager", "tuned"])
def test_lucidrains_learns_and_says_how_large_it_is(lucidrains, mode):
    config = UNCONDITIONAL.replace(learning_rate=1e-3)
    model = lucidrains.open(config, device="cpu", mode=mode)
    given = drawn(config)
    first = {key: value.clone() for key, value in model.ema.ema_model.named_parameters()}
    losses = [model.train_step(**given) for _ in range(12)]
    model.synchronize()
    assert np.isfinite(losses).all()
    assert losses[-1] < losses[0]
    now = dict(model.ema.ema_model.named_parameters())
    assert any((now[key] != value).any() for key, value in first.items())
    described = model.describe()
    ours = count(config, config.batch_size).flops
    assert described["checked"].startswith("another network: ")
    assert f"(here {parameter_count(config):,})" in described["checked"]
    assert f"(here {ours / 1e9:.4g})" in described["checked"]
    assert described["flops"] > 0
    double = lucidrains.flops(config.replace(batch_size=4))
    assert double == 2 * described["flops"]
    with pytest.raises(NotImplementedError):
        model.state()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"channels": (8, 12)}, r"has widths that are multiples of the first, not \[8, 12\]"),
        ({"num_classes": 3}, "has a Unet without classes"),
        ({"prediction": "v"}, "weighs its loss unless prediction = 'eps', not 'v'"),
        ({"beta_end": 0.03}, r"has one linear schedule, 0.0001 to 0.02, not \(0.0001, 0.03\)"),
    ],
)
def test_lucidrains_refuses_what_it_has_nothing_near_to(lucidrains, changes, message):
    with pytest.raises(NotImplementedError, match=f"denoising-diffusion-pytorch {message}$"):
        lucidrains.open(UNCONDITIONAL.replace(**changes), device="cpu")
