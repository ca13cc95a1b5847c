"""Damaged folders of goldens: refused by name by the command itself, whatever the damage."""

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save
from typer.testing import CliRunner

from conformance.__main__ import app
from spec.goldens import GoldenError, Goldens, sha256

ROOT = Path(__file__).resolve().parent.parent
FILES = ("a.inputs", "a.expected", "b.expected")


def tensors():
    """File -> tensors; made up, since no backend gets to see them."""
    rng = np.random.Generator(np.random.Philox(5))
    image = (3, 8, 12, 2)
    null, label = rng.normal(size=image), rng.normal(size=image)
    return {
        "a.inputs": {"null": null, "label": label, "p/one": np.ones(2), "g/one": np.ones(2)},
        "a.expected": {"L1/guide/out": null + 2 * (label - null)},
        "b.expected": {"L1/guide_b/out": null + 3 * (label - null), "L2/emb/out": np.ones((3, 2))},
    }


def manifest(data):
    """The manifest of the files' bytes, as plain values."""
    limits = {
        "float64": {"l2": 1e-10, "reason": "float64"},
        "float32": {"l2": 1e-6, "max": 1e-6, "reason": "float32"},
        "bf16": {"finite": 0.0, "l2": 0.5, "reason": "bf16"},
    }

    def case(level, call, inputs, options, **outputs):
        entries = {}
        for name, reference in outputs.items():
            stem, key = reference.split(":")
            value = tensors()[stem][key]
            entries[name] = {
                "tensor": reference,
                "shape": list(value.shape),
                "dtype": "float64",
                "sha256": sha256(value.tobytes()),
                "tolerance": limits,
            }
        identity = next(iter(outputs.values())).split(":")[1].rpartition("/")[0]
        return {
            "id": identity,
            "level": level,
            "clause": "S6",
            "config": "tiny",
            "replace": {"clip": False},
            "call": call,
            "params": "a.inputs:p",
            "inputs": inputs,
            "options": options,
            "outputs": entries,
            "causes": ["the first cause"],
            "oracle": "two sources",
        }

    inputs = {"out_null": "a.inputs:null", "out_label": "a.inputs:label"}
    return {
        "format": 1,
        "made_with": {"numpy": "2"},
        "files": {stem: sha256(content) for stem, content in data.items()},
        "configs": {},
        "cases": [
            case(1, "guide", inputs, {"guidance_scale": 2.0}, out="a.expected:L1/guide/out"),
            case(1, "guide", inputs, {"guidance_scale": 3.0}, out="b.expected:L1/guide_b/out"),
            case(
                2, "run_block", {"x": "a.inputs:null"}, {"name": "emb"}, out="b.expected:L2/emb/out"
            ),
        ],
    }


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A sound folder of goldens."""
    monkeypatch.chdir(tmp_path)
    data = {stem: save(tree) for stem, tree in tensors().items()}
    made = tmp_path / "goldens"
    made.mkdir()
    for stem, content in data.items():
        (made / f"{stem}.safetensors").write_bytes(content)
    (made / "manifest.json").write_text(json.dumps(manifest(data)), encoding="utf-8")
    return made


def change(folder, edit):
    """Change the values of the manifest."""
    path = folder / "manifest.json"
    raw = json.loads(path.read_text(encoding="utf-8"))
    edit(raw)
    path.write_text(json.dumps(raw), encoding="utf-8")


def rehash(folder):
    """Let the manifest have the hashes that the files have now, as a faulty generator would."""
    files = {stem: sha256((folder / f"{stem}.safetensors").read_bytes()) for stem in FILES}
    change(folder, lambda raw: raw.update(files=files))


def refused(folder, *words):
    """Hold that the command refuses the folder, and says all of these words."""
    command = ["run", "--impl=nobody_has_this", f"--goldens={folder}"]
    done = CliRunner().invoke(app, command, env={"COLUMNS": "400"})
    assert isinstance(done.exception, SystemExit), done.exception
    assert done.exit_code == 1, done.output
    said = " ".join(done.stderr.split())
    assert said.startswith("error: ")
    assert "Traceback" not in said
    for word in words:
        assert word in said
    assert not Path("reports").exists()


def refusal(folder):
    """The words of the refusal, or None where the folder is taken; raises what else is raised."""
    try:
        Goldens(folder).verify()
    except GoldenError as error:
        return str(error)
    return None


def test_a_sound_folder_gets_as_far_as_the_backend(folder):
    command = ["run", "--impl=nobody_has_this", f"--goldens={folder}"]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 2
    assert "backend 'nobody_has_this' is not a module" in " ".join(done.stderr.split())


def test_from_a_shell_there_is_a_message_and_no_traceback(folder):
    path = folder / "b.expected.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    command = [sys.executable, "-m", "conformance", "run", "--impl=nobody_has_this"]
    done = subprocess.run(
        [*command, f"--goldens={folder}"], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 1
    assert "b.expected.safetensors has sha256" in " ".join(done.stderr.split())
    assert "Traceback" not in done.stdout + done.stderr


# --- the files ------------------------------------------------------------------------------------


@pytest.mark.parametrize("rehashed", [False, True], ids=["", "rehashed"])
@pytest.mark.parametrize("stem", FILES)
@pytest.mark.parametrize("place", ["0", "1", "7", "8", "9", "header", "data", "middle", "end"])
def test_a_truncated_file_is_refused(folder, stem, place, rehashed):
    path = folder / f"{stem}.safetensors"
    data = path.read_bytes()
    header = 8 + int.from_bytes(data[:8], "little")
    named = {"header": header - 1, "data": header, "middle": len(data) // 2, "end": len(data) - 1}
    path.write_bytes(data[: named.get(place) or int(place)])
    if rehashed:
        rehash(folder)
    refused(folder, f"golden {stem}.safetensors", "is no file of" if rehashed else "has sha256")


@pytest.mark.parametrize("stem", FILES)
def test_any_single_bit_of_a_file_is_noticed(folder, stem):
    path = folder / f"{stem}.safetensors"
    data = path.read_bytes()
    header = 8 + int.from_bytes(data[:8], "little")
    places = [*range(64), *range(64, 8 * header, 17), *range(8 * header, 8 * len(data), 1511)]
    places.append(8 * len(data) - 1)
    for place in places:
        spoilt = bytearray(data)
        spoilt[place // 8] ^= 1 << place % 8
        path.write_bytes(spoilt)
        with pytest.raises(GoldenError, match=f"{stem}.safetensors has sha256 .* was changed"):
            Goldens(folder).verify()
    refused(folder, f"golden {stem}.safetensors has sha256")


@pytest.mark.parametrize("stem", FILES)
def test_a_spoilt_header_of_a_right_hash_raises_nothing_else(folder, stem):
    """What is in an input is the generator's affair; an output has a hash of its own."""
    path = folder / f"{stem}.safetensors"
    data = path.read_bytes()
    raw = json.loads((folder / "manifest.json").read_text())
    found = 0
    for place in range(0, 8 * (8 + int.from_bytes(data[:8], "little")), 11):
        spoilt = bytearray(data)
        spoilt[place // 8] ^= 1 << place % 8
        path.write_bytes(spoilt)
        raw["files"][stem] = sha256(spoilt)
        (folder / "manifest.json").write_text(json.dumps(raw))
        said = refusal(folder)
        found += said is not None
        assert said is None or stem in said
    assert found > 20


def test_two_files_in_each_others_place_are_refused(folder):
    one, two = (folder / f"{stem}.safetensors" for stem in FILES[1:])
    first = one.read_bytes()
    one.write_bytes(two.read_bytes())
    two.write_bytes(first)
    refused(folder, "golden a.expected.safetensors has sha256")
    rehash(folder)
    refused(folder, "golden tensor a.expected:L1/guide/out is missing")


@pytest.mark.parametrize("stem", FILES)
def test_a_missing_an_empty_and_an_extra_file_are_refused(folder, stem):
    path = folder / f"{stem}.safetensors"
    data = path.read_bytes()
    path.write_bytes(b"")
    refused(folder, f"golden {stem}.safetensors has sha256")
    path.unlink()
    refused(folder, f"golden {stem}.safetensors is missing")
    path.write_bytes(data)
    (folder / "more.safetensors").write_bytes(data)
    refused(folder, "goldens not in the manifest: more")


@pytest.mark.parametrize("name", ["a.inputs.safetensors", "manifest.json"])
@pytest.mark.parametrize(
    "kind", ["folder", "dangling", "loop", "to a folder", "other", "device", "pipe"]
)
def test_what_is_no_file_of_these_bytes_is_refused(folder, name, kind):
    path = folder / name
    path.unlink()
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    else:
        targets = {"dangling": "nowhere", "loop": name, "to a folder": ".", "device": "/dev/zero"}
        path.symlink_to(targets.get(kind, "b.expected.safetensors"))
    refused(folder, name)


def test_a_link_to_the_very_bytes_is_as_good_as_they_are(folder, tmp_path):
    """What a golden is its hash says, so a checkout of links verifies."""
    for path in list(folder.iterdir()):
        path.rename(tmp_path / path.name)
        path.symlink_to(tmp_path / path.name)
    Goldens(folder).verify()


def test_no_folder_at_all_is_refused(folder, tmp_path):
    refused(tmp_path / "nowhere", "manifest.json cannot be read")
    refused(folder / "manifest.json", "manifest.json cannot be read")


# --- the manifest ---------------------------------------------------------------------------------


def test_a_truncated_manifest_is_refused_wherever_it_ends(folder):
    path = folder / "manifest.json"
    data = path.read_bytes()
    for end in range(0, len(data), 7):
        path.write_bytes(data[:end])
        with pytest.raises(GoldenError, match=r"manifest\.json cannot be read"):
            Goldens(folder)
    for end in (0, 1, len(data) // 2, len(data) - 1):
        path.write_bytes(data[:end])
        refused(folder, "manifest.json cannot be read")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "cannot be read"),
        ("null", "the whole is 'None', expected an object"),
        ("[]", "the whole is '[]', expected an object"),
        ('"manifest"', "expected an object"),
        ("1e999", "expected an object"),
        ("{}", "format None, expected 1"),
        ('{"format": 1}', "the whole has no 'files'"),
        ('{"format": 1, "files": {}}', "the whole has no 'made_with'"),
        ('{"format": 1, "files": {}, "made_with": {}}', "the whole has no 'cases'"),
        ('{"format": 1, "files": {}, "made_with": {}, "cases": {}}', "cases of the whole is '{}'"),
        ('{"format": 1, "files": {}, "made_with": {}, "cases": [1]}', "case 0 is '1', expected an"),
        ('{"format": 1, "files": {}, "made_with": {}, "cases": [{}]}', "case 0 has no 'id'"),
        ('{"format": 1, "format": 1}', "'format' stands twice in one object"),
        ('{"format": NaN}', "NaN is no JSON"),
        ('{"format": -Infinity}', "-Infinity is no JSON"),
        ("[" * 100_000, "cannot be read"),
        ('{"format": ' + "9" * 5000 + "}", "cannot be read"),
        ("\ufeff{}", "cannot be read"),
        ('{"format": 1}\x00', "cannot be read"),
    ],
)  # fmt: skip
def test_other_json_is_refused(folder, text, words):
    (folder / "manifest.json").write_text(text, encoding="utf-8")
    refused(folder, "manifest.json", words)


def test_a_manifest_that_is_no_text_is_refused(folder):
    (folder / "manifest.json").write_bytes(b"\xff\xfe{}")
    refused(folder, "manifest.json cannot be read")
    (folder / "manifest.json").write_bytes((folder / "a.inputs.safetensors").read_bytes())
    refused(folder, "manifest.json cannot be read")


# What a tolerance may not be, as it would stand in the file.
@pytest.mark.parametrize("column", ["float64", "float32", "bf16"])
@pytest.mark.parametrize(
    ("limit", "words"),
    [
        ("NaN", "NaN is no JSON"),
        ("Infinity", "Infinity is no JSON"),
        ("1e999", "inf is not a finite number"),
        ("-1e-10", "-1e-10 is not a finite number of at least 0"),
        ("-0.5", "is not a finite number of at least 0"),
        ("1", "a result of zeros would be within it"),
        ("1.0", "a result of zeros would be within it"),
        ("1e300", "a result of zeros would be within it"),
        ("9" * 400, "a result of zeros would be within it"),
        ("null", "is not a finite number"),
        ("true", "is not a finite number"),
        ('"1e-10"', "is not a finite number"),
        ("[1e-10]", "is not a finite number"),
    ],
)
def test_a_tolerance_that_holds_nothing_is_refused(folder, column, limit, words):
    place = ("cases", 1, "outputs", "out", "tolerance", column, "l2")
    written(folder, place, limit)
    named = () if "JSON" in words else ("output out of case L1/guide_b", f"{column} tolerance l2")
    refused(folder, words, *named)


def written(folder, place, text):
    """Put a text in the place of a value of the manifest, as it is."""

    def mark(raw):
        for step in place[:-1]:
            raw = raw[step]
        raw[place[-1]] = "<here>"

    change(folder, mark)
    path = folder / "manifest.json"
    path.write_text(path.read_text().replace('"<here>"', text), encoding="utf-8")


OUTPUT = ("cases", 0, "outputs", "out")


@pytest.mark.parametrize(
    ("place", "text", "words"),
    [
        (("format",), "2", "format 2, expected 1"),
        (("files", "a.inputs"), '"' + "0" * 64 + '"', "golden a.inputs.safetensors has sha256"),
        (("files", "a.inputs"), '"0"', "files: a.inputs: '0' is no SHA-256"),
        (("files", "../a"), '"' + "0" * 64 + '"', "files: '../a' is no name of a file"),
        (("files", ".."), '"' + "0" * 64 + '"', "files: '..' is no name of a file"),
        (("files", "checkpoints/../a"), '"' + "0" * 64 + '"', "is no name of a file"),
        (("files", ""), '"' + "0" * 64 + '"', "files: '' is no name of a file"),
        (("files", "a\0b"), '"' + "0" * 64 + '"', "cannot be printed"),
        (("files", "none"), '"' + "0" * 64 + '"', "golden none.safetensors is missing"),
        (("files", "checkpoints/none"), '"' + "0" * 64 + '"', "none.safetensors is missing"),
        (("configs",), "[]", "configs is '[]', expected an object"),
        (("configs", "own"), '{"name": "own"}', "config 'own': missing key"),
        (("configs", "own"), "3", "config own is '3', expected an object"),
        (("cases",), "[]", "no case is selected"),
        (("cases", 0, "id"), '"L1/guide_b"', "case L1/guide_b stands twice"),
        (("cases", 0, "id"), "7", "id of case 0 is '7', expected a text"),
        (("cases", 0, "id"), '"\\u001b[31m"', "cannot be printed"),
        (("cases", 0, "id"), '"\\ud800"', "cannot be printed"),
        (("cases", 0, "level"), "8", "level of case L1/guide is 8, outside 0..7"),
        (("cases", 0, "level"), "true", "level of case L1/guide is 'True', expected a whole"),
        (("cases", 0, "level"), "1.0", "level of case L1/guide is '1.0', expected a whole"),
        (("cases", 0, "clause"), '"S99"', "case L1/guide is of clause 'S99', which SPEC.md lacks"),
        (("cases", 0, "config"), '"huge"', "case L1/guide: unknown config 'huge'"),
        (("cases", 0, "replace"), '{"nothing": 1}', "case L1/guide: config 'tiny': unknown key"),
        (("cases", 0, "replace"), '{"clip": 3}', "case L1/guide: config 'tiny': clip = 3"),
        (("cases", 0, "params"), '"a.inputs:q"', "golden tree a.inputs:q is missing"),
        (("cases", 0, "params"), "[]", "params of case L1/guide is '[]', expected a text"),
        (("cases", 0, "inputs", "out_null"), '"a.inputs:x"', "golden tensor a.inputs:x is missing"),
        (("cases", 0, "inputs", "out_null"), '"none:x"', "golden none.safetensors is not in the"),
        (("cases", 0, "inputs", "grads/a"), '"a.inputs:h"', "golden tree a.inputs:h is missing"),
        (("cases", 0, "inputs"), '["x"]', "inputs of case L1/guide is"),
        (("cases", 2, "options"), "{}", "options of case L2/emb lack name, which run_block needs"),
        (("cases", 2, "options", "name"), '"none"', "case L2/emb: unknown block 'none'"),
        (("cases", 0, "options"), "3", "options of case L1/guide is '3', expected an object"),
        (("cases", 0, "outputs"), "{}", "case L1/guide checks nothing"),
        (("cases", 0, "causes"), '"a"', "causes of case L1/guide is 'a', expected a list"),
        (("cases", 0, "causes"), "[3]", "a cause of case L1/guide is '3', expected a text"),
        (("cases", 0, "oracle"), "null", "oracle of case L1/guide is 'None', expected a text"),
        ((*OUTPUT, "tensor"), '"a.expected:none"', "a.expected:none is missing"),
        ((*OUTPUT, "shape"), "[3, 8, 12]", "the manifest says float64 [3, 8, 12]"),
        ((*OUTPUT, "shape"), "[3, 8, 12, -2]", "is -2, outside 0.."),
        ((*OUTPUT, "shape"), "[1e3]", "expected a whole number"),
        ((*OUTPUT, "shape"), "[" + "9" * 40 + "]", "outside 0.."),
        ((*OUTPUT, "shape"), "[1000000, 1000000, 1000000]", "the size of output 'out'"),
        ((*OUTPUT, "stride"), "0", "the stride of output 'out' of case L1/guide is 0, outside 1"),
        ((*OUTPUT, "stride"), "-1", "is -1, outside 1"),
        ((*OUTPUT, "stride"), "2", "the manifest says float64 [288]"),
        ((*OUTPUT, "dtype"), '"float32"', "the manifest says float32"),
        ((*OUTPUT, "dtype"), "null", "expected a text"),
        ((*OUTPUT, "sha256"), '"0"', "of case L1/guide has sha256"),
        ((*OUTPUT, "tolerance"), "[]", "expected an object"),
        ((*OUTPUT, "tolerance"), "{}", "case L1/guide compares no number"),
        ((*OUTPUT, "tolerance", "float64"), "{}", "compares no number in float64"),
        ((*OUTPUT, "tolerance", "float64"), '{"reason": "r"}', "has no float64 tolerance"),
        ((*OUTPUT, "tolerance", "float64"), '{"finite": 0.0}', "compares no number in float64"),
        ((*OUTPUT, "tolerance", "float64", "l3"), "0.1", "has the unknown norm 'l3'"),
        ((*OUTPUT, "tolerance", "float16"), '{"l2": 0.1}', "has a tolerance for 'float16'"),
        ((*OUTPUT, "tolerance", "float64", "abs"), "1e9", "abs = 1000000000.0 is not below 1"),
    ],
    ids=lambda value: "/".join(map(str, value)) if isinstance(value, tuple) else None,
)  # fmt: skip
def test_a_value_that_cannot_be_is_refused_by_its_place(folder, place, text, words):
    written(folder, place, text)
    if place == ("cases",):  # a selection of nothing is a fault of the command line
        done = CliRunner().invoke(app, ["run", "--impl=nobody", f"--goldens={folder}"])
        assert done.exit_code == 2
        assert words in " ".join(done.stderr.split())
        return
    refused(folder, words)


def places(value, place=()):
    """Every place in plain values, the outer ones first."""
    if place:
        yield place
    if isinstance(value, (dict, list)):
        for step in value if isinstance(value, dict) else range(len(value)):
            yield from places(value[step], (*place, step))


ODD = (None, True, -1, 0, 0.5, 2**80, 1e308, "", "x", "a:b", "\0", "\ud800", [], {}, [[]], [None],
       {"": None}, {"l2": {}})  # fmt: skip


def test_whatever_stands_in_the_place_of_a_value_nothing_else_is_raised(folder):
    path = folder / "manifest.json"
    raw = json.loads(path.read_text())
    raw["cases"] = [raw["cases"][2]]
    refusals = taken = 0
    for place in list(places(raw)):
        for odd in ODD:
            changed = copy.deepcopy(raw)
            inner = changed
            for step in place[:-1]:
                inner = inner[step]
            inner[place[-1]] = odd
            path.write_text(json.dumps(changed))
            said = refusal(folder)
            taken += said is None
            refusals += said is not None
            assert (said or "").isprintable()
    assert refusals > 5 * taken > 0


def test_any_single_bit_of_the_manifest_is_a_refusal_or_harmless(folder):
    path = folder / "manifest.json"
    data = path.read_bytes()
    found = 0
    for place in range(0, 8 * len(data), 37):
        spoilt = bytearray(data)
        spoilt[place // 8] ^= 1 << place % 8
        path.write_bytes(spoilt)
        said = refusal(folder)
        found += said is not None
        assert (said or "").isprintable()
    assert found > 100
