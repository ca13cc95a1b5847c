"""Who imports whom, that the implementations are parallel, and that the pages are true.

Every checker is tried on made-up violations too: a test that cannot fail shows nothing.
"""

import ast
import functools
import platform
import re
import subprocess
import sys
from pathlib import Path

import pytest

from conformance import lines

ROOT = Path(__file__).resolve().parents[1]
FRAMEWORKS = {
    "impl_numpy": {"threadpoolctl"},
    "impl_torch": {"torch"},
    "impl_tf": {"tensorflow", "keras"},
    "impl_jax": {"jax", "flax"},
}
IMPLEMENTATIONS = sorted(path.name for path in ROOT.glob("impl_*") if path.is_dir())
PACKAGES = ["spec", "conformance", "lab", *FRAMEWORKS]
# What requirements/base.txt gives, by the names under which it is imported.
LIBRARIES = {
    "matplotlib",
    "numpy",
    "PIL",
    "pooch",
    "rich",
    "safetensors",
    "sklearn",
    "threadpoolctl",
    "typer",
}
GENERATORS = {"torch", "diffusers", "mpmath"}  # the sources of the goldens, and nowhere else
GENERATOR_FILES = {"spec/generate.py", "spec/oracle.py", "spec/floor.py", "spec/tables.py"}
# What a dataset's files need, where they are read.
DATA = {"spec/archives.py": {"pooch"}, "spec/folder.py": {"PIL"}}
# The benchmark measures what each library can do, and other networks beside ours. Each library is
# imported where it is used, in a process of its own.
MEASURED = {
    "conformance/bench/ceiling.py": {"torch", "tensorflow", "jax"},
    "conformance/bench/peers/on_torch.py": {"torch"},
    "conformance/bench/peers/diffusers.py": {"torch", "diffusers"},
    "conformance/bench/peers/lucidrains.py": {
        "torch",
        "torchvision",
        "denoising_diffusion_pytorch",
        "ema_pytorch",
    },
    "conformance/bench/peers/keras.py": {"tensorflow", "keras"},
    "conformance/bench/peers/nnx.py": {"jax", "flax", "optax"},
}
# What an implementation shares with the others: data, names and checks, never arithmetic.
SHARED = {"spec.backend", "spec.config", "spec.noise", "spec.params"}
PARALLEL = ("schedule.py", "diffusion.py", "train.py", "params.py")


# --- imports ---------------------------------------------------------------------------------


def imports(source: str) -> set[str]:
    """Full dotted names that a module imports, at any depth, and by import_module("literal")."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            found |= {
                f"{module}.{alias.name}" if module == "spec" else module for alias in node.names
            }
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = node.func
            name = called.attr if isinstance(called, ast.Attribute) else getattr(called, "id", "")
            if name in ("import_module", "__import__") and isinstance(node.args[0].value, str):
                found.add(node.args[0].value)
    return found


def allowed_imports(path: str) -> set[str]:
    """Top-level packages that this file may import besides the standard library and its own."""
    package = path.split("/")[0]
    if path in GENERATOR_FILES:
        return {*LIBRARIES, *GENERATORS}
    if package == "spec":
        return {"numpy", "safetensors", "sklearn", *DATA.get(path, set())}
    if package in ("conformance", "lab"):
        return {"spec", *LIBRARIES, *MEASURED.get(path, set())}
    extra = {"lab"} if path.endswith("/__main__.py") else set()
    return {"spec", "numpy", *FRAMEWORKS[package], *extra}


def import_faults(path: str, source: str) -> list[str]:
    """What in this file breaks the direction of dependencies (section 2 of the design)."""
    package, faults = path.split("/")[0], []
    allowed = allowed_imports(path) | {package} | set(sys.stdlib_module_names)
    for name in sorted(imports(source)):
        top = name.split(".")[0]
        if not top:
            faults.append(f"{path} imports {name}: write the full name")
        elif top not in allowed:
            faults.append(f"{path} imports {name}")
        elif package in FRAMEWORKS and top == "spec" and name not in SHARED:
            faults.append(f"{path} imports {name}: share data, never arithmetic")
    return faults


def python_files(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


def test_every_implementation_has_its_rule():
    assert set(IMPLEMENTATIONS) <= set(FRAMEWORKS), "add its framework to FRAMEWORKS above"
    assert {"impl_numpy", "impl_torch"} <= set(IMPLEMENTATIONS)


@pytest.mark.parametrize("package", [name for name in PACKAGES if (ROOT / name).is_dir()])
def test_dependencies_point_one_way(package):
    files = python_files(package)
    assert files
    faults = [
        fault
        for file in files
        for fault in import_faults(file.relative_to(ROOT).as_posix(), file.read_text("utf-8"))
    ]
    assert not faults


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("impl_numpy/unet.py", "import torch"),
        ("impl_numpy/unet.py", "def f():\n    from jax import numpy"),
        ("impl_torch/unet.py", "from impl_numpy.layers import conv"),
        ("impl_torch/unet.py", "import lab.files"),
        ("impl_torch/train.py", "from conformance import compare"),
        ("impl_torch/unet.py", "from spec.reference import unet"),
        ("impl_torch/unet.py", "from spec import reference"),
        ("impl_jax/unet.py", "import tensorflow as tf"),
        ("impl_torch/unet.py", "from .layers import conv"),
        ("conformance/run.py", "from impl_torch import backend"),
        ("conformance/run.py", "import importlib\nimportlib.import_module('torch')"),
        ("conformance/run.py", "import lab"),
        ("conformance/bench/steps.py", "import torch"),
        ("conformance/bench/ceiling.py", "import impl_torch"),
        ("conformance/bench/peers/keras.py", "import torch"),
        ("lab/cli.py", "import conformance"),
        ("lab/cli.py", "import impl_numpy"),
        ("spec/config.py", "import torch"),
        ("spec/reference.py", "import mpmath"),
        ("spec/noise.py", "import conformance.run"),
        ("spec/noise.py", "def f():\n    import pooch"),
        ("spec/data.py", "from PIL import Image"),
        ("spec/archives.py", "import requests"),
        ("spec/folder.py", "import rich"),
        ("spec/generate.py", "import impl_numpy"),
        ("spec/generate.py", "import tensorflow"),
    ],
)
def test_a_wrong_import_is_found(path, source):
    assert import_faults(path, source)


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("impl_torch/__main__.py", "from lab.cli import main"),
        ("impl_torch/unet.py", "import torch.nn.functional as F\nfrom impl_torch import layers"),
        ("spec/generate.py", "import torch, diffusers, mpmath\nfrom spec.reference import f"),
        ("spec/archives.py", "def f():\n    import pooch"),
        ("spec/folder.py", "def f():\n    from PIL import Image, ImageOps"),
        ("conformance/run.py", "import importlib\nimportlib.import_module(name)"),
        ("conformance/bench/ceiling.py", "def f():\n    import torch"),
    ],
)
def test_a_right_import_passes(path, source):
    assert not import_faults(path, source)


# --- parallel structure ----------------------------------------------------------------------


def arguments(node: ast.FunctionDef) -> tuple[str, ...]:
    """Argument names in order, without self."""
    a = node.args
    names = [arg.arg for arg in (*a.posonlyargs, *a.args, *a.kwonlyargs)]
    names += [arg.arg for arg in (a.vararg, a.kwarg) if arg]
    return tuple(name for name in names if name != "self")


def public(nodes: list[ast.stmt], kind: type) -> list:
    return [n for n in nodes if isinstance(n, kind) and not n.name.startswith("_")]


def outline(source: str) -> list[tuple[str, tuple[str, ...]]]:
    """Public functions with their arguments and classes with their fields, in order."""
    result = []
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
            result.append((node.name, arguments(node)))
        elif isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            fields = [n.target.id for n in node.body if isinstance(n, ast.AnnAssign)]
            result.append((node.name, tuple(fields)))
    return result


def snake(name: str) -> str:
    """ResBlock -> res_block."""
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower()


def unet_outline(source: str) -> list[tuple[str, tuple[str, ...]]]:
    """The blocks of a unet.py with their inputs, in order; the same for functions and classes.

    NumPy's functions get parameters, a name and a width of groups (p, name, groups) where a class
    of a framework holds them: those are left out. `forward`, `call` and `__call__` are one thing.
    """
    result = []
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef) and arguments(node)[:1] == ("p",):
            inputs = tuple(a for a in arguments(node) if a not in ("p", "name", "groups"))
            result.append((node.name, inputs))
        elif isinstance(node, ast.ClassDef):
            functions = [n for n in node.body if isinstance(n, ast.FunctionDef)]
            properties = [n for n in functions if "property" in map(ast.unparse, n.decorator_list)]
            methods = {n.name: arguments(n) for n in functions if n not in properties}
            runs = [name for name in ("forward", "call", "__call__") if name in methods]
            parts = [name for name in methods if not name.startswith("_") and name not in runs]
            result += [(name, methods[name]) for name in parts]
            result += [(snake(node.name), methods[name]) for name in runs[:1]]
    return result


def helpers(source: str) -> list[tuple[str, tuple[str, ...]]]:
    """The public functions of a unet.py that are no blocks."""
    functions = public(ast.parse(source).body, ast.FunctionDef)
    return [(f.name, arguments(f)) for f in functions if arguments(f)[:1] != ("p",)]


def read(implementation: str, file: str) -> str:
    return (ROOT / implementation / file).read_text("utf-8")


OTHERS = [name for name in IMPLEMENTATIONS if name != "impl_numpy"]


@pytest.mark.parametrize("file", PARALLEL)
@pytest.mark.parametrize("implementation", OTHERS)
def test_same_functions_same_arguments_same_order(implementation, file):
    assert outline(read("impl_numpy", file))
    assert outline(read(implementation, file)) == outline(read("impl_numpy", file))


@pytest.mark.parametrize("implementation", OTHERS)
def test_a_batch_is_shared_out_under_the_same_names(implementation):
    # threads have a class of their own, in NumPy and PyTorch
    one, other = (
        [f for f in outline(read(name, "parallel.py")) if f[0] != "Workers"]
        for name in ("impl_numpy", implementation)
    )
    assert one
    assert other == one


@pytest.mark.parametrize("implementation", OTHERS)
def test_same_blocks_same_inputs_same_order(implementation):
    expected = unet_outline(read("impl_numpy", "unet.py"))
    assert [name for name, _ in expected][-1] == "unet"
    assert unet_outline(read(implementation, "unet.py")) == expected


@pytest.mark.parametrize("implementation", OTHERS)
def test_numpy_alone_has_helpers_of_its_own(implementation):
    # A framework finds the way of a skip's gradient by itself; NumPy needs a function for it.
    shared = helpers(read(implementation, "unet.py"))
    assert shared == [h for h in helpers(read("impl_numpy", "unet.py")) if h in shared]


@pytest.mark.parametrize(
    "other",
    [
        "def f(a, c): ...\ndef g(x): ...",  # an argument's name
        "def f(b, a): ...\ndef g(x): ...",  # the order of arguments
        "def g(x): ...\ndef f(a, b): ...",  # the order of functions
        "def f(a, b): ...",  # a function is missing
        "def f(a, b): ...\ndef g(x): ...\ndef h(): ...",  # one too many
        "def f(a, b): ...\ndef g(x, *, y=1): ...",
        "def f(a, b): ...\ndef g(x, **more): ...",
    ],
)
def test_a_difference_in_functions_is_found(other):
    first = "def f(a, b): ...\ndef _private(): ...\ndef g(x): ..."
    assert outline(first) == outline("def f(a, b): ...\ndef g(x): ...")
    assert outline(other) != outline(first)


def test_a_difference_in_blocks_is_found():
    functions = (
        "def res_block(p, name, x, emb, groups): ...\nclass UNet:\n def forward(self, x): ..."
    )
    classes = (
        "class ResBlock:\n def forward(self, x, emb): ...\nclass UNet:\n def call(self, x): ..."
    )
    assert unet_outline(functions) == unet_outline(classes)
    assert unet_outline(functions) != unet_outline(classes.replace("x, emb", "emb, x"))
    assert unet_outline(functions) != unet_outline(classes.replace("ResBlock", "Resnet"))
    first, second = classes.split("\nclass ")
    assert unet_outline(functions) != unet_outline(f"class {second}\n{first}")


CLAUSE_MARK = re.compile(r"#\s*(S\d+)\b(.*)$")
RUNS = ("forward", "call", "__call__")


def anchor(code: str) -> str:
    """What a line is about, the same in every framework: its keyword, or the first name it sets."""
    if keyword := re.match(r"(if|for|while|def|return|yield|with)\b", code):
        return keyword.group(1)
    return re.match(r"\w*", code).group()


def clause_marks(source: str) -> list[tuple[str, str, str]]:
    """(function, clause, anchor) of every mark such as `# S4`, in order.

    A class that is called is named as NumPy's function. The anchor is empty where the mark goes on
    with a reason, `# S4; ...`: there a framework does the same thing in another way.
    """
    spans: list[tuple[int, int, str]] = []

    def walk(body: list[ast.stmt], owner: str = "") -> None:
        for node in body:
            if isinstance(node, ast.ClassDef):
                walk(node.body, node.name)
            elif isinstance(node, ast.FunctionDef):
                name = snake(owner) if owner and node.name in RUNS else node.name
                spans.append((node.lineno, node.end_lineno or 0, name))

    walk(ast.parse(source).body)
    marks = []
    for number, line in enumerate(source.splitlines(), 1):
        if found := CLAUSE_MARK.search(line):
            name = next((n for first, last, n in spans if first <= number <= last), "")
            reason = found.group(2).lstrip().startswith(";")
            marks.append((name, found.group(1), "" if reason else anchor(line.strip())))
    return marks


def marks_differ(source: str, first: str) -> list[str]:
    """Where the clause marks of a source are not those of the first one."""
    left, right = clause_marks(source), clause_marks(first)
    faults = [f"{len(left)} marks, expected {len(right)}"] if len(left) != len(right) else []
    for (name, clause, at), (name1, clause1, at1) in zip(left, right, strict=False):
        if (name, clause) != (name1, clause1) or (at and at1 and at != at1):
            faults.append(f"{name}: # {clause} at {at!r}; expected {name1}: # {clause1} at {at1!r}")
    return faults


@pytest.mark.parametrize("file", ["schedule.py", "diffusion.py", "train.py"])
@pytest.mark.parametrize("implementation", OTHERS)
def test_clauses_are_cited_in_the_same_places(implementation, file):
    assert clause_marks(read("impl_numpy", file))
    assert not marks_differ(read(implementation, file), read("impl_numpy", file))


@pytest.mark.parametrize("implementation", OTHERS)
def test_clauses_are_cited_in_the_same_blocks(implementation):
    # NumPy, which keeps a `back` of each step, spreads over several lines what elsewhere is one.
    numpy = [mark[:2] for mark in clause_marks(read("impl_numpy", "unet.py"))]
    assert numpy == [mark[:2] for mark in clause_marks(read(implementation, "unet.py"))]
    assert not marks_differ(read(implementation, "unet.py"), read("impl_torch", "unet.py"))


@pytest.mark.parametrize(
    "other",
    [
        "def f(x):\n    y = x  # S2\n    return y",  # another clause
        "def f(x):\n    y = x\n    return y",  # no mark
        "def f(x):\n    y = x\n    return y  # S1",  # another line
        "def g(x):\n    y = x  # S1\n    return y",  # another function
        "def f(x):\n    y = x  # S1\n    return y  # S1",  # one too many
    ],
)
def test_a_clause_cited_elsewhere_is_found(other):
    first = "def f(x):\n    y = x  # S1\n    return y"
    assert not marks_differ(first, first)
    assert not marks_differ("class F:\n    def call(self, x):\n        y = 1  # S1", first)
    assert not marks_differ(
        "def f(x):\n    def body():  # S1; a scan is a loop\n        ...", first
    )
    assert marks_differ(other, first)


def test_line_budgets_hold():
    counts = lines.count_all(ROOT)
    assert [count.name for count in counts] == IMPLEMENTATIONS
    assert [problem for count in counts for problem in count.problems] == []


def test_a_broken_line_budget_is_found(tmp_path):
    folder = tmp_path / "impl_torch"
    folder.mkdir()
    for file in ("__init__.py", *lines.CORE, "layers.py", "params.py"):
        (folder / file).write_text("x = 1  # comment\n\n# comment\n" * 75)
    assert any("params.py has 75" in problem for problem in lines.count_all(tmp_path)[0].problems)
    assert lines.count_all(tmp_path)[0].core == 300
    (folder / "unet.py").write_text("x = 1\n" * 76)
    assert any("301" in problem for problem in lines.count_all(tmp_path)[0].problems)


# --- pages and files -------------------------------------------------------------------------


@functools.cache
def tracked_files() -> list[Path]:
    """Every file under version control."""
    try:
        done = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not a git checkout: which files are the repository's is not known")
    return [
        path for name in done.stdout.decode().split("\0") if name and (path := ROOT / name).exists()
    ]


def code_lines(markdown: str) -> list[str]:
    """The lines of all fenced code blocks."""
    fences = re.findall(r"^```[^\n]*\n(.*?)^```", markdown, re.MULTILINE | re.DOTALL)
    return [line.strip() for fence in fences for line in fence.splitlines()]


def test_ci_runs_what_the_readme_shows():
    script = (ROOT / ".ci/run").read_text("utf-8").splitlines()
    assert script[0] == "#!/usr/bin/env bash"
    assert "set -euo pipefail" in script
    own = ('cd "$(dirname "$0")/.."', "set -euo pipefail")
    commands = [line for line in script if line and not line.startswith("#") and line not in own]
    shown = code_lines((ROOT / "README.md").read_text("utf-8"))
    assert commands
    assert [line for line in commands if line not in shown] == []


def test_the_readme_counts_lines_as_they_are():
    text = " ".join((ROOT / "README.md").read_text("utf-8").split())
    names = {"numpy": "NumPy", "torch": "PyTorch", "tf": "TensorFlow", "jax": "JAX"}
    said = re.search(r"The first four files together have (.*?)\.", text)
    assert said
    for count in lines.count_all(ROOT):
        name = names[count.name.removeprefix("impl_")]
        assert re.search(rf"\b{count.core} (lines of code )?in {name}\b", said.group(1)), name


def link_targets(markdown: str) -> list[str]:
    """Targets of links and pictures in a Markdown page that point into the repository."""
    text = re.sub(r"^```.*?^```", "", markdown, flags=re.MULTILINE | re.DOTALL)
    text = re.sub(r"`[^`\n]*`", "", text)
    targets = re.findall(r"\]\(\s*<?([^)\s>]+)", text) + re.findall(r'(?:src|href)="([^"]+)"', text)
    targets += re.findall(r"^\[[^\]]+\]:\s*(\S+)", text, re.MULTILINE)
    inside = [target for target in targets if not re.match(r"[a-z]+:|#", target)]
    return [target.split("#")[0] for target in inside]


def test_every_relative_link_leads_somewhere():
    pages = [path for path in tracked_files() if path.suffix == ".md"]
    assert pages
    broken = [
        f"{page.relative_to(ROOT)}: {target}"
        for page in pages
        for target in link_targets(page.read_text("utf-8"))
        if not (page.parent / target).exists()
    ]
    assert not broken


def test_link_targets_are_found():
    page = (
        "[a](one.md) ![b](two.png) [c](https://x.example/y) [d](#here) [e](three.md#part)\n"
        '<img src="four.png">\n[f]: five.md\n```\n[g](six.md)\n```\n`[h](seven.md)`\n'
    )
    assert link_targets(page) == ["one.md", "two.png", "three.md", "four.png", "five.md"]


def private_words(text: str) -> list[str]:
    """Absolute paths of a machine, its name, and hosts of package registries."""
    patterns = [
        r"(?<![\w.~/])/(?:home|Users|root|tmp|work|mnt|opt|data)/\w[^\s'\"]*",
        r"\b(?:files\.pythonhosted|download\.pytorch|pypi)\.org\b",
    ]
    if len(node := platform.node()) > 4 and node != "localhost":
        patterns.append(rf"\b{re.escape(node)}\b")
    return [match.group() for pattern in patterns for match in re.finditer(pattern, text)]


def test_nothing_of_a_machine_is_in_the_repository():
    found = []
    for path in tracked_files():
        data = path.read_bytes()
        if b"\0" not in data[:4096] and path.suffix != ".safetensors":
            words = private_words(data.decode("utf-8"))
            found += [f"{path.relative_to(ROOT)}: {word}" for word in words]
    assert not found


def test_private_words_are_found():
    slash = "/"  # spelt apart, so that this file does not hold them itself
    assert private_words(f"open('{slash}home{slash}me/x')") == [f"{slash}home{slash}me/x"]
    assert private_words(f"at {slash}tmp{slash}y now") == [f"{slash}tmp{slash}y"]
    assert private_words("https://" + "pypi" + ".org/simple")
    if len(platform.node()) > 4 and platform.node() != "localhost":
        assert private_words(f"made on {platform.node()}")
    assert not private_words(
        "runs/data/x, ../tmp/x, /usr/bin/env, a/work/b, https://x.example/home/y"
    )
