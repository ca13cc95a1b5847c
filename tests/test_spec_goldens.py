"""Goldens: whole, hashed, and refused by name when anything about them changed."""

import json
import shutil
from collections import Counter

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from spec.backend import ARRAY_DTYPES
from spec.config import load_config
from spec.goldens import GOLDENS, GoldenError, Goldens
from spec.params import blocks, parameter_shapes

ALL = Goldens()
CALLS = {
    "schedule", "q_sample", "target", "predict_x0_eps", "ddpm_step", "ddim_step", "guide",
    "run_block", "predict", "taps", "loss_and_grads", "apply_gradients", "train_steps", "sample",
    "train_run",
}  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    """A copy of the goldens that a test may spoil."""
    copy = tmp_path / "goldens"
    shutil.copytree(GOLDENS, copy)
    return copy


def test_everything_committed_verifies():
    ALL.verify()
    assert ALL.made_with.keys() >= {"torch", "diffusers", "mpmath", "numpy"}


def test_every_call_level_and_config_has_cases():
    assert {case.call for case in ALL.cases} == CALLS
    assert {case.level for case in ALL.cases} == set(range(8))
    levels = Counter((case.level, case.config.name) for case in ALL.cases)
    for name in ("tiny", "tiny_uncond", "tiny_v", "tiny_x0"):
        assert all(levels[level, name] for level in (1, 3, 4, 6))
    assert levels[3, "tiny_deep"]
    assert levels[4, "tiny_deep"]


def test_networks_of_one_and_of_several_layers_a_block_are_asked():
    asked = {case.config.layers_per_block for case in ALL.cases if case.call == "loss_and_grads"}
    assert min(asked) == 1
    assert max(asked) > 1


def test_every_block_of_tiny_runs_alone():
    alone = {case.options["name"] for case in ALL.cases if case.call == "run_block"}
    assert alone == {block.name for block in blocks(load_config("tiny"))}


def test_gradients_name_every_parameter():
    for case in ALL.cases:
        if case.call == "loss_and_grads":
            names = {output.name.removeprefix("grads/") for output in case.outputs}
            assert names == {"loss", *parameter_shapes(case.config)}


def test_every_output_has_a_tolerance_with_a_reason_in_every_column():
    unasked = 0
    for case in ALL.cases:
        assert case.causes
        assert case.oracle
        assert case.clause.startswith("S")
        for output in case.outputs:
            assert list(output.tolerance) == list(ARRAY_DTYPES)
            for column, entry in output.tolerance.items():
                limits = {norm: value for norm, value in entry.items() if norm != "reason"}
                assert entry["reason"]
                assert limits
                if "finite" in limits:  # only what a coarse step does where a gradient is near 0
                    assert limits == {"finite": 0.0}
                    assert column in ("tf32", "bf16")
                    unasked += 1
                    continue
                most = 0.5 if column in ("float64", "float32") else 1
                assert all(0 < value < most for value in limits.values())
    assert unasked < 0.06 * sum(len(case.outputs) for case in ALL.cases)


def test_columns_differ_where_a_product_of_the_network_is_asked_for():
    for case in ALL.cases:
        network = case.level >= 2 and case.call != "apply_gradients"
        for output in case.outputs:
            by_column = [
                {
                    norm: value
                    for norm, value in output.tolerance[column].items()
                    if norm != "reason"
                }
                for column in ("float32", "tf32", "bf16")
            ]
            if not network:
                assert by_column[0] == by_column[1] == by_column[2], output.name
            elif "/delta/" in output.name or "/ema_delta/" in output.name:
                continue  # the sign of Adam's first step is chance in every precision
            elif "time_proj" not in (output.name, case.options.get("name")):
                for norm in set(by_column[0]) & set(by_column[1]) & set(by_column[2]):
                    limits = [limit[norm] for limit in by_column]
                    assert limits[0] < limits[1] < limits[2], (case.id, output.name)


def test_goldens_reveal():
    """Values that would hide a fault are not among them."""
    params = ALL.tree("tiny.inputs:params")
    for name, value in params.items():
        assert np.abs(value).max() > 1e-3, name
        assert len(np.unique(value)) > 1, name
        if value.ndim == 4 and value.shape[-1] > 1:
            assert not np.allclose(value, value[..., ::-1]), name
    for case in ALL.cases:
        last = case.config.timesteps - 1
        if case.call in ("q_sample", "ddpm_step", "predict", "loss_and_grads"):
            t = ALL.array(case.inputs["t"])
            assert {0, last} <= set(t.tolist())
            assert len(set(t.tolist())) == len(t)
            assert len(t) not in (1, case.config.in_channels)
        if case.call == "loss_and_grads" and "drop" in case.inputs:
            labels, drop = ALL.array(case.inputs["labels"]), ALL.array(case.inputs["drop"])
            assert set(drop.tolist()) == {True, False}
            assert case.config.num_classes in labels
        if case.call == "train_steps":
            t = ALL.array(case.inputs["t"])
            assert len({tuple(row) for row in t.tolist()}) == len(t)


def test_inputs_are_representable_in_float32():
    for stem in ALL.files:
        if stem.endswith(".inputs"):
            for key, value in load_file(GOLDENS / f"{stem}.safetensors").items():
                if value.dtype.kind == "f":
                    assert np.array_equal(value, value.astype(np.float32)), key


def test_a_truncated_file_is_refused_by_name_and_hash(folder):
    path = folder / "tiny.inputs.safetensors"
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(GoldenError) as caught:
        Goldens(folder).verify()
    message = str(caught.value)
    assert "tiny.inputs.safetensors" in message
    assert ALL.files["tiny.inputs"] in message
    assert "nox -s goldens" in message


def test_one_changed_bit_is_refused(folder):
    path = folder / "tiny_v.expected.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(GoldenError, match=r"tiny_v.expected.safetensors has sha256 .* changed"):
        Goldens(folder).verify()


def test_a_missing_file_is_refused(folder):
    (folder / "tiny_x0.expected.safetensors").unlink()
    with pytest.raises(GoldenError, match=r"tiny_x0.expected.safetensors is missing"):
        Goldens(folder).verify()


def test_an_extra_file_is_refused(folder):
    save_file({"a": np.zeros(1)}, folder / "more.safetensors")
    with pytest.raises(GoldenError, match="not in the manifest: more"):
        Goldens(folder).verify()


def edited(folder, change):
    """The manifest of a folder, changed by a function of its JSON."""
    path = folder / "manifest.json"
    raw = json.loads(path.read_text(encoding="utf-8"))
    change(raw)
    path.write_text(json.dumps(raw), encoding="utf-8")
    return Goldens(folder)


def output_of(raw, number=0):
    return next(iter(raw["cases"][number]["outputs"].values()))


def test_a_changed_hash_of_one_tensor_is_refused_by_case(folder):
    found = edited(folder, lambda raw: output_of(raw, 20).update(sha256="0" * 64))
    with pytest.raises(GoldenError, match=rf"of case {ALL.cases[20].id} has sha256"):
        found.verify()


def test_a_changed_shape_is_refused(folder):
    found = edited(folder, lambda raw: output_of(raw, 20).update(shape=[1, 2, 3]))
    with pytest.raises(GoldenError, match=r"the manifest says float64 \[1, 2, 3\]"):
        found.verify()


def test_a_tensor_that_is_not_there_is_refused(folder):
    found = edited(folder, lambda raw: output_of(raw).update(tensor="tiny.expected:none"))
    with pytest.raises(GoldenError, match=r"tiny.expected:none is missing"):
        found.verify()


def test_a_case_twice_or_without_outputs_is_refused(folder):
    twice = edited(folder, lambda raw: raw["cases"].append(raw["cases"][0]))
    with pytest.raises(GoldenError, match=r"L0/tiny/\w+ stands twice"):
        twice.verify()
    empty = edited(folder, lambda raw: (raw["cases"].pop(), raw["cases"][3].update(outputs={})))
    with pytest.raises(GoldenError, match="checks nothing"):
        empty.verify()


def test_a_file_that_the_manifest_does_not_name_is_refused(folder):
    found = edited(folder, lambda raw: raw["files"].pop("tiny.inputs"))
    with pytest.raises(GoldenError, match="not in the manifest"):
        found.verify()
    with pytest.raises(GoldenError, match="not in the manifest"):
        found.tree("tiny.inputs:params")


def test_another_format_or_no_manifest_is_refused(folder):
    with pytest.raises(GoldenError, match="format 99, expected 1"):
        edited(folder, lambda raw: raw.update(format=99))
    (folder / "manifest.json").unlink()
    with pytest.raises(GoldenError, match="cannot be read"):
        Goldens(folder)


def test_schedule_files_hold_the_golden_tables():
    from spec.tables import CASES, NAMES, read_csv

    for stem in CASES:
        (case,) = [case for case in ALL.cases if case.id == f"L0/tiny/{stem}"]
        table = read_csv(stem)
        assert tuple(table) == NAMES
        for output in case.outputs:
            assert np.array_equal(ALL.expected(case, output), table[output.name])
