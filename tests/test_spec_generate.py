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
        for name, output in outputs.items():
            for precision, found in output.get("floor", {}).items():
                case.floors.setdefault(precision, {})[name] = found
        assert list(case.floors) == generate.precisions(case), case.id
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
        "L6/tiny_v/dpmpp_clipped",
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
    with Decomposed(seed, Perturbed(seed)):
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


@pytest.mark.parametrize(
    ("precision", "factors", "results"), [("tf32", 2**-10, 0.0), ("bf16", 2**-8, 2**-8)]
)
def test_a_coarser_precision_moves_products_and_results_of_the_network_alone(
    precision, factors, results
):
    a, one = torch.linspace(1.01, 1.99, 1000).reshape(1, -1), torch.ones(1, 1)
    mode = Perturbed(0, precision=precision)
    with mode:
        outside = a * 1.0
        with mode.network():
            inside, product = a * 1.0, a.reshape(-1, 1) @ one
            with mode.network(False):
                within = a * 1.0
    for result in (outside, within):
        assert float((result / a - 1).abs().max()) < 2**-22
    moved = (inside / a - 1).abs()
    assert float(moved.max()) == pytest.approx(results, abs=2**-22)
    assert float(moved.min()) == pytest.approx(results, abs=2**-22)
    # two factors, and the result where it is rounded too
    error = float((product / a.reshape(-1, 1) - 1).abs().max())
    assert factors < error < 1.1 * (2 * factors + results)


def test_group_norm_is_float32_within_for_bfloat16():
    x = 1.0 + 0.01 * torch.randn(2, 8, 6, 6, generator=torch.Generator().manual_seed(0))
    weight, bias = torch.full((8,), 1.5), torch.full((8,), 0.1)
    results = {}
    for precision in ("float32", "bf16"):
        mode = Perturbed(0, precision=precision)
        given = x.clone().requires_grad_()
        with Decomposed(0, mode), mode, mode.network():
            y = torch.nn.functional.group_norm(given, 4, weight, bias, 1e-6)
            (dx,) = torch.autograd.grad((y * y * y).sum(), given)
        results[precision] = y.detach(), dx
    exact = torch.nn.functional.group_norm(x.double(), 4, weight.double(), bias.double(), 1e-6)
    for precision, low, high in (("float32", 1e-8, 1e-4), ("bf16", 1e-3, 2**-7)):
        error = (results[precision][0] - exact).abs() / exact.abs().max()
        assert low < float(error.max()) < high  # statistics of eight bits would miss by far more
    apart = (results["bf16"][1] - results["float32"][1]).norm() / results["float32"][1].norm()
    assert 1e-4 < float(apart) < 0.1


def test_large_tensors_are_moved_in_parts():
    x = torch.full((3 << 20,), 1.5)
    with Perturbed(0):
        y = x * 1.0
    assert set(((y - x) * 2**23).abs().tolist()) == {1.0}


def test_what_is_missing_is_made_and_the_rest_kept(tmp_path, monkeypatch):
    names = ("L0/tiny/linear_2", "L1/tiny/guide_3", "L2/tiny/conv_in")
    chosen = [name for name in names if name in CASES]
    assert len(chosen) == 3

    def few(inputs):
        return [case for case in golden_cases(inputs) if case.id in chosen]

    monkeypatch.setattr(generate, "golden_cases", few)
    monkeypatch.setattr(tables, "SCHEDULES", tmp_path / "schedules")
    folder = tmp_path / "goldens"
    solved, measured = [], []
    solve_one, floors_of = generate.solve, generate.floors
    monkeypatch.setattr(
        generate, "solve", lambda case, *given: solved.append(case.id) or solve_one(case, *given)
    )

    def fake_measure(cases, inputs, most=None):
        for case in cases:
            for precision in generate.precisions(case):
                if precision not in case.floors:
                    measured.append((case.id, precision))
                    found = floors_of(case, *fetch(case, inputs), [0], precision=precision)
                    case.floors[precision] = found

    monkeypatch.setattr(generate, "measure", fake_measure)
    chosen.remove("L2/tiny/conv_in")
    generate.write(folder)
    first = json.loads((folder / "manifest.json").read_text("utf-8"))
    assert solved == chosen
    chosen.append("L2/tiny/conv_in")
    solved.clear(), measured.clear()
    generate.write(folder, missing=True)
    assert solved == ["L2/tiny/conv_in"]
    assert measured == [(solved[0], precision) for precision in ("float32", "tf32", "bf16")]
    again = json.loads((folder / "manifest.json").read_text("utf-8"))
    assert again["cases"][:2] == first["cases"]
    assert set(again["cases"][2]["outputs"]["out"]["tolerance"]) == {
        "float64",
        "float32",
        "tf32",
        "bf16",
    }
    goldens = Goldens(folder)
    goldens.verify()
    assert [case.id for case in goldens.cases] == chosen


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
    changed = generate._changed_inputs(goldens, inputs)
    assert changed == ["tiny.inputs:L3/x", "tiny.inputs:L3/t"]
