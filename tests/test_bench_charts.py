"""The charts: that they are SVG with their text as text, the same each time, and say what is so."""

import copy
import re
import sys
from xml.etree import ElementTree

import pytest

from conformance.bench import charts

PEERS = "conformance.bench.peers."


def entry(workload, backend, mode, median, **changes) -> dict:
    """A run of the results, as far as charts read it."""
    return {
        "workload": workload,
        "backend": backend,
        "mode": mode,
        "dtype": "float32",
        "peer": backend.startswith(PEERS),
        "peer_network": False,
        "status": "ok",
        "median": median,
        "interval": [0.95 * median, 1.02 * median],
        "rounds": [[median]] * 5,
        "share_large": 0.1 / median,
        "share_shapes": 0.12 / median,
        **changes,
    }


def line(backend, axis, values, power, **changes) -> dict:
    """A line of the section `scaling`."""
    points = [
        {"value": v, "seconds": [0.01 * v**power] * 5, "peak_memory": 10**8 * v} for v in values
    ]
    found = {"backend": backend, "mode": "eager", "dtype": "float32", "axis": axis}
    found |= {"points": points, "slope": power, "slope_interval": [power - 0.02, power + 0.03]}
    return {**found, **changes}


@pytest.fixture
def results() -> dict:
    failed = {"status": "failed check", "median": None, "interval": None, "share_large": None}
    return {
        "kind": "bench",
        "machine": {"cpu": "A processor", "gpu": "A card"},
        "settings": {"device": "cpu", "threads": 2, "dtypes": ["float32"]},
        "work": [{"workload": "S", "text": "a train step, 64 images of 16x16x1"}],
        "runs": [
            entry("S", "impl_numpy", "parallel", 0.411),
            entry("S", "impl_torch", "eager", 0.203),
            entry("S", f"{PEERS}diffusers", "eager", 0.254),
            entry("S", f"{PEERS}lucidrains", "eager", 1.517, peer_network=True, share_large=None),
            {**entry("S", "impl_jax", "compiled", 0.3), **failed},
            entry("M", "impl_torch", "eager", 213e-6, share_large=0.3, share_shapes=None),
        ],
        "scaling": [],
    }


def texts(path) -> list[str]:
    """Every text of an SVG, in the order of the file."""
    root = ElementTree.parse(path).getroot()
    assert root.tag.endswith("}svg")
    found = ("".join(node.itertext()).strip() for node in root.iter() if node.tag.endswith("}text"))
    return [text for text in found if text]


def test_a_workload_has_its_times_the_fastest_first(results, tmp_path):
    written = charts.draw(results, tmp_path / "charts")
    assert [path.name for path in written] == ["S.svg", "M.svg", "shares.svg"]
    found = texts(written[0])
    names = ["torch eager", "diffusers eager", "numpy parallel", "lucidrains eager *"]
    assert [text for text in found if text in names] == names
    numbers = ["0.203", "0.254", "0.411", "1.52"]
    assert [text for text in found if text in numbers] == numbers
    assert "S: a train step, 64 images of 16x16x1" in found
    assert "A processor, 2 threads; float32; pale: other libraries" in found
    note = "no figure: jax compiled (failed check); * its state was not checked; its network may "
    assert f"{note}be another" in found
    assert any(text.startswith("seconds for a call: the median") for text in found)
    small = texts(written[1])
    assert "213" in small
    assert any(text.startswith("microseconds for a call") for text in small)
    assert not any("no figure" in text for text in small)


def test_shares_stand_beside_the_ceiling(results, tmp_path):
    found = texts(charts.draw(results, tmp_path)[-1])
    assert [text for text in found if text.startswith("0.") and "(" in text] == [
        "0.49 (0.59)",
        "0.39 (0.47)",
        "0.24 (0.29)",
    ]
    assert "0.30" in found
    assert not any("lucidrains" in text for text in found)


def test_the_same_results_give_the_same_bytes(results, tmp_path):
    results["scaling"] = [line("impl_numpy", "batch", (1, 2, 4), 1.0)]
    first = charts.draw(copy.deepcopy(results), tmp_path / "one")
    second = charts.draw(results, tmp_path / "two")
    assert [path.name for path in first] == ["S.svg", "M.svg", "shares.svg", "scaling.svg"]
    for one, two in zip(first, second, strict=True):
        assert one.read_bytes() == two.read_bytes()
        text = one.read_text("utf-8")
        assert "<text" in text
        assert not re.search(r"dc:date|font-family: None|file:|/tmp|/home", text)
    results["runs"][0]["median"] = 0.42
    assert charts.draw(results, tmp_path / "two")[0].read_bytes() != first[0].read_bytes()


def test_scaling_shows_slopes_on_logarithmic_axes(results, tmp_path):
    results["kind"] = "scaling"
    results["scaling"] = [
        line("impl_numpy", "batch", (1, 4, 16), 1.0),
        line("impl_torch", "batch", (1, 4, 16), 0.75),
        line("impl_torch", "batch", (1, 4), 0.5, mode="compiled"),
        line("impl_numpy", "width", (16, 32), 1.8),
        line("impl_jax", "width", (16,), 0.0, slope=None, slope_interval=None),
    ]
    (written,) = charts.draw(results, tmp_path)
    found = texts(written)
    for text in (
        "numpy eager: 1.00 (0.98 to 1.03)",
        "torch eager: 0.75 (0.73 to 0.78)",
        "torch compiled: 0.50 (0.48 to 0.53)",
        "numpy eager: 1.80 (1.78 to 1.83)",
        "seconds for a train step",
        "peak memory, MiB",
    ):
        assert text in found
    assert not any("jax" in text for text in found)
    assert not any("image size" in text for text in found)


def test_lines_of_one_framework_differ(results):
    lines = [line("impl_torch", "batch", (1, 2), 1.0, mode=mode) for mode in ("a", "b")]
    lines.append(line(f"{PEERS}diffusers", "batch", (1, 2), 1.0))
    styles = charts._styles(lines, 1)
    assert len({style["color"] for style in styles.values()}) == 1
    assert len({style["linestyle"] for style in styles.values()}) == 3


def test_colours_are_those_of_the_framework():
    assert charts.hue("impl_torch") == charts.hue(f"{PEERS}diffusers") == charts.HUES["torch"]
    assert charts.hue("impl_tf") == charts.hue(f"{PEERS}keras") == charts.HUES["tensorflow"]
    assert charts.hue("impl_jax") == charts.hue(f"{PEERS}nnx") == charts.HUES["jax"]
    assert charts.hue("somebodys.own") == charts.OTHER


def test_several_dtypes_are_named(results, tmp_path):
    results["settings"]["dtypes"] = ["float32", "bf16"]
    results["runs"].append(entry("S", "impl_torch", "eager", 0.15, dtype="bf16"))
    found = texts(charts.draw(results, tmp_path)[0])
    assert "torch eager bf16" in found
    assert "torch eager float32" in found


def test_a_gpu_is_named(results, tmp_path):
    results["settings"]["device"] = "cuda"
    found = texts(charts.draw(results, tmp_path)[0])
    assert "A card; float32; pale: other libraries" in found


def test_results_without_figures_have_no_charts(results, tmp_path):
    results["runs"] = [results["runs"][4]]
    assert charts.draw(results, tmp_path) == []


def test_without_matplotlib_it_says_what_to_do(results, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(charts.ChartError, match="charts need matplotlib"):
        charts.draw(results, tmp_path)
