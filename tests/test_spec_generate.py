"""The generator: its sources agree, wrong ones are refused, floors perturb, tolerances derive."""

import json
import random

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")
pytest.importorskip("mpmath")

from spec import agree, generate, reference, tables  # noqa: E402
from spec.cases import Inputs, golden_cases  # noqa: E402
from spec.floor import Decomposed, Perturbed, errors, perturbed_run  # noqa: E402
from spec.generate import entries, fetch, solve  # noqa: E402
from spec.goldens import GOLDENS, Goldens  # noqa: E402
from spec.oracle import Oracle  # noqa: E402

torch.set_num_threads(1)
INPUTS = Inputs()
CASES = {case.id: case for case in golden_cases(INPUTS)}


@pytest.fixture(autouse=True, scope="module")
def _stored_inputs():
    """Stored inputs are authoritative: a libm may round a normal the other way."""
    goldens = Goldens()
    for stem, tree in INPUTS.files.items():
        for key in tree if stem.endswith(".inputs") else ():
            tree[key] = goldens.array(f"{stem}:{key}")


def test_the_generator_makes_the_cases_of_the_manifest():
    raw = json.loads((GOLDENS / "manifest.json").read_text(encoding="utf-8"))
    assert [case["id"] for case in raw["cases"]] == list(CASES)
    for entry in raw["cases"]:
        case = CASES[entry["id"]]
        assert (entry["call"], entry["inputs"]) == (case.call, case.inputs)
        assert (entry["options"], entry["causes"]) == (case.options, list(case.causes))


def test_every_tolerance_follows_from_the_recorded_floors():
    raw = json.loads((GOLDENS / "manifest.json").read_text(encoding="utf-8"))
    goldens = Goldens()
    for entry, known in zip(raw["cases"], goldens.cases, strict=True):
        case = CASES[entry["id"]]
        outputs = entry["outputs"]
        case.floors = {name: o["floor"] for name, o in outputs.items() if "floor" in o}
        case.expected = {o.name: goldens.expected(known, o) for o in known.outputs}
        case.shapes = {o.name: o.shape for o in known.outputs}
    for entry, again in zip(raw["cases"], entries(list(CASES.values())), strict=True):
        for name, output in entry["outputs"].items():
            assert output["tolerance"] == again["outputs"][name]["tolerance"], (entry["id"], name)


@pytest.mark.parametrize("stem", list(tables.CASES))
def test_tables_are_committed_to_the_last_digit(stem):
    committed = (tables.SCHEDULES / f"{stem}.csv").read_text(encoding="ascii")
    assert committed == tables.csv_text(stem)


@pytest.mark.parametrize(
    "name",
    [
        "L1/tiny/predict_x0_eps",
        "L1/tiny_v/ddpm_step_clipped",
        "L1/tiny_v/ddim_step_eta1",
        "L2/tiny/conv_out_mean_100",
        "L3/tiny_uncond/taps",
        "L4/tiny/loss_and_grads",
        "L5/tiny/apply_sequence",
        "L6/tiny/ddim_guided_eta",
    ],
)
def test_the_two_sources_agree_and_give_what_is_stored(name):
    goldens = Goldens()
    (known,) = [case for case in goldens.cases if case.id == name]
    case = CASES[name]
    apart = solve(case, *fetch(case, INPUTS))
    assert all(value < 1e-12 for value in apart.values())
    for output in known.outputs:
        value = case.expected[output.name]
        assert agree.distance(value, goldens.expected(known, output)) < 1e-10


def test_a_wrong_source_is_refused_by_case_and_tensor(monkeypatch):
    case = CASES["L3/tiny/taps"]

    def plain_silu(x):
        return np.maximum(x, 0)

    monkeypatch.setattr(reference, "silu", plain_silu)
    with pytest.raises(agree.AgreementError, match=r"L3/tiny/taps: \S+ of spec/reference.py"):
        solve(case, *fetch(case, INPUTS))


def test_a_wrong_gradient_is_refused():
    case = CASES["L4/tiny/loss_and_grads"]
    given, params = fetch(case, INPUTS)
    expected = Oracle(case.full_config, params).run(case.call, given, {})
    name = "grads/mid_block.resnets.0.conv1.bias"
    expected[name] = expected[name] * (1 + 1e-8)
    with pytest.raises(agree.AgreementError, match=r"mid_block.resnets.0.conv1.bias .*gradient"):
        agree.agreement(case, given, params, expected)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("name", ["L3/tiny/taps", "L4/tiny/loss_and_grads", "L5/tiny/apply_late"])
def test_every_formulation_of_the_floor_is_the_same_function(name, seed):
    """Without perturbation, in float64, what the floor chooses among agrees with the oracle."""
    case = CASES[name]
    given, params = fetch(case, INPUTS)
    plain = Oracle(case.full_config, params).run(case.call, given, case.options)
    oracle = Oracle(case.full_config, params, choose=random.Random(seed))
    with Decomposed(seed):
        found = oracle.run(case.call, given, case.options)
    for key, value in plain.items():
        if not key.endswith("to_k.bias"):
            limit = 1e-9 if "delta" in key else 1e-12
            assert agree.distance(found[key], value) < limit, key


def test_the_floor_follows_its_seed_and_is_not_zero():
    case = CASES["L4/tiny/loss_and_grads"]
    given, params = fetch(case, INPUTS)
    exact = Oracle(case.full_config, params).run(case.call, given, {})
    one, again, other = (perturbed_run(case, given, params, seed) for seed in (1, 1, 2))
    for name, value in exact.items():
        assert np.array_equal(one[name], again[name])
        if name.endswith("to_k.bias") or name == "loss":
            continue
        assert not np.array_equal(one[name], other[name]), name
        found = errors(one[name], value)
        assert 0 < found["l2"] < 1e-4, name


def test_sums_and_products_are_split_and_rounded():
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(50, 300, generator=generator)
    b = torch.randn(300, 40, generator=generator)
    exact = a.double() @ b.double()
    with Perturbed(3):
        product, total = a @ b, (a.sum(), a.sum(0), a.mean(1, keepdim=True))
    assert 0 < errors(product.numpy(), exact.numpy())["max"] < 1e-5
    assert not torch.equal(product, a @ b)
    assert total[1].shape == (300,)
    assert total[2].shape == (50, 1)
    wide = a.double()
    for got, value in zip(total, (wide.sum(), wide.sum(0), wide.mean(1, True)), strict=True):
        assert float((got.double() - value).abs().max()) < 1e-4


def test_elementwise_results_move_by_one_rounding():
    x = torch.linspace(1.01, 1.99, 1000)
    with Perturbed(0):
        y = x * 1.0
    steps = ((y - x) * 2**23).abs()
    assert set(steps.tolist()) == {1.0}


def test_an_operation_that_the_floor_does_not_know_is_refused():
    with Perturbed(0), pytest.raises(NotImplementedError, match=r"does not know aten.erfinv"):
        torch.erfinv(torch.tensor([0.5]))


def test_float64_is_left_alone_by_a_float32_floor():
    x = torch.linspace(0, 1, 50, dtype=torch.float64)
    with Perturbed(0):
        y = x * 3 + 1
    assert torch.equal(y, x * 3 + 1)


def test_the_check_names_a_tensor_that_comes_out_otherwise():
    goldens = Goldens()
    cases = golden_cases(Inputs())
    for case, known in zip(cases, goldens.cases, strict=True):
        case.expected = {o.name: goldens.expected(known, o) for o in known.outputs}
    assert generate._check_tensors(goldens, cases) == []
    (case,) = [case for case in cases if case.id == "L4/tiny_v/loss_and_grads"]
    name = "grads/conv_in.weight"
    case.expected[name] = case.expected[name] * (1 + 1e-10)
    (problem,) = generate._check_tensors(goldens, cases)
    assert problem.startswith(f"{case.id} {name}: 1e-10 from what is stored")
    assert "cases differ" in generate._check_tensors(goldens, cases[1:])[0]


def test_the_check_names_an_input_that_the_stream_does_not_draw():
    goldens, inputs = Goldens(), Inputs()
    golden_cases(inputs)
    inputs.files["tiny.inputs"]["L3/x"][0, 0, 0, 0] += 1e-5
    inputs.files["tiny.inputs"]["L3/t"][0] += 1
    problems = generate._check_inputs(goldens, inputs)
    assert [problem.split()[0] for problem in problems] == [
        "tiny.inputs:L3/x",
        "tiny.inputs:L3/t",
    ]
