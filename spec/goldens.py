"""Reads the golden files: cases with inputs and expected outputs, refused where a hash differs."""

import dataclasses
import functools
import hashlib
import json
import math
import os
import re
import stat
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load as parse_safetensors

from spec.backend import ARRAY_DTYPES
from spec.config import Config, config_from_dict, load_config
from spec.params import find_block

SPEC = Path(__file__).parent
GOLDENS = SPEC / "goldens"
FORMAT = 1
RELATIVE = ("l2", "max", "each")  # norms in which a result of zeros is off by 1
NORMS = (*RELATIVE, "abs", "finite")
LEVELS = range(8)
LARGEST = 2**40  # of a shape or a stride; no file is as large
TREES = ("grads/", "m", "v")  # inputs that are trees
# What the call of a case needs among its options, beside the arguments of the method.
NEEDED = {
    "run_block": ("name",),
    "apply_gradients": ("sequence",),
    "train_steps": ("record",),
    "train_run": ("seed", "steps", "sample"),
}


class GoldenError(ValueError):
    """A golden that is missing, changed or not in the manifest; the message names it."""


@dataclasses.dataclass(frozen=True)
class Output:
    """One expected tensor of a case, and how near a result must come."""

    name: str  # the key among the case's results, such as "out" or "grads/conv_in.bias"
    tensor: str  # reference of the expected values: "<file stem>:<key>"
    shape: tuple[int, ...]  # of the result
    dtype: str  # in which the golden is stored
    sha256: str  # of the stored bytes
    stride: int  # 1: every element is stored; n: only result.reshape(-1)[::n]
    tolerance: dict[str, dict[str, Any]]  # dtype -> {"l2" | "max" | "each" | "abs": ..., "reason"}


@dataclasses.dataclass(frozen=True)
class Case:
    """One call of the protocol with golden inputs, and what it must give."""

    id: str  # "L3/tiny/predict"
    level: int
    clause: str  # "S7"
    config: Config
    call: str  # a method of the protocol, or "train_steps", or "train_run"
    params: str | None  # reference of the parameter tree; None: from seed 0
    inputs: dict[str, str]  # argument -> reference of an array or, for `grads`, of trees
    options: dict[str, Any]  # plain arguments
    outputs: tuple[Output, ...]
    causes: tuple[str, ...]  # what usually makes this case fail, most likely first
    oracle: str  # which two sources agreed on the golden


def sha256(data: bytes) -> str:
    """Hexadecimal SHA-256 of bytes."""
    return hashlib.sha256(data).hexdigest()


class Goldens:
    """The manifest of a folder of goldens, and its tensors, read when asked for and verified.

    A reference is "<stem>:<key>": `key` in `<stem>.safetensors` of the folder. A tree reference
    "<stem>:<prefix>" stands for all keys "<prefix>/<name>"; "checkpoint:digits" for all tensors of
    `spec/checkpoints/digits.safetensors`.

    Raises GoldenError, naming the file and both hashes, wherever something is missing, extra,
    changed or cannot be read.
    """

    def __init__(self, folder: Path = GOLDENS) -> None:
        self.folder = Path(folder)
        path = self.folder / "manifest.json"
        try:
            raw = json.loads(
                _content(path).decode("utf-8"),
                object_pairs_hook=_each_once,
                parse_constant=_no_constant,
            )
        except (OSError, ValueError, RecursionError) as error:
            raise GoldenError(
                f"golden manifest {path} cannot be read: {error}; {REMEDY}"
            ) from error
        try:
            self._take(raw)
        except ValueError as error:
            raise GoldenError(f"golden manifest {path}: {error}; {REMEDY}") from error
        self._read = functools.lru_cache(maxsize=None)(self._read_file)

    def _take(self, raw: Any) -> None:
        """The parts of the manifest, each of the kind it must be. Raises ValueError that names it.

        Nobody has signed a manifest, so nothing is taken for granted that a later line builds on.
        """
        raw = _a(dict, raw, "the whole")
        if raw.get("format") != FORMAT:
            raise ValueError(f"it has format {raw.get('format')!r}, expected {FORMAT}")
        self.files: dict[str, str] = _texts(raw, "files", "the whole")
        for stem, digest in self.files.items():
            name = stem.removeprefix("checkpoints/")
            if not name.isprintable() or not re.fullmatch(r"(?!\.\.?$)[^/\\:]+", name):
                raise ValueError(f"files: {stem!r} is no name of a file in its folder")
            if not re.fullmatch("[0-9a-f]{64}", digest):
                raise ValueError(f"files: {stem}: {digest!r} is no SHA-256")
        self.made_with: dict[str, str] = _texts(raw, "made_with", "the whole")
        # Configs that the spec does not ship, field by field.
        own = _a(dict, raw.get("configs", {}), "configs")
        self.configs = {
            _a(str, name, "the name of a config"): config_from_dict(_a(dict, v, f"config {name}"))
            for name, v in own.items()
        }
        entries = _field(raw, "cases", list, "the whole")
        self.cases = [_case(entry, i, self.configs) for i, entry in enumerate(entries)]

    def _path(self, stem: str) -> Path:
        return (
            SPEC / "checkpoints" / f"{stem.removeprefix('checkpoints/')}.safetensors"
            if stem.startswith("checkpoints/")
            else self.folder / f"{stem}.safetensors"
        )

    def _read_file(self, stem: str) -> dict[str, np.ndarray]:
        data = self._bytes(stem)
        try:
            return parse_safetensors(data)
        except Exception as error:  # whatever bytes of a right hash make a parser raise
            raise GoldenError(
                f"golden {self._path(stem).name} is no file of tensors: {error}; {REMEDY}"
            ) from error

    def _bytes(self, stem: str) -> bytes:
        """The content of a file, its hash verified."""
        path = self._path(stem)
        if stem not in self.files:
            raise GoldenError(f"golden {path.name} is not in the manifest; {REMEDY}")
        try:
            data = _content(path)
        except FileNotFoundError as error:
            raise GoldenError(f"golden {path.name} is missing; {REMEDY}") from error
        except OSError as error:
            raise GoldenError(
                f"golden {path.name} cannot be read ({error.strerror or error}); {REMEDY}"
            ) from error
        if sha256(data) != self.files[stem]:
            raise GoldenError(
                f"golden {path.name} has sha256 {sha256(data)}, the manifest says "
                f"{self.files[stem]}: the file was changed; {REMEDY}"
            )
        return data

    def verify(self) -> None:
        """Check every file against the manifest, both ways, and every expected tensor's hash."""
        present = {path.stem for path in self.folder.glob("*.safetensors")}
        if extra := sorted(present - set(self.files)):
            raise GoldenError(f"goldens not in the manifest: {', '.join(extra)}; {REMEDY}")
        for stem in self.files:
            self._read(stem)
        seen: set[str] = set()
        for case in self.cases:
            if case.id in seen:
                raise GoldenError(f"case {case.id} stands twice in the manifest; {REMEDY}")
            if not case.outputs:
                raise GoldenError(f"case {case.id} checks nothing; {REMEDY}")
            seen.add(case.id)
            if case.clause not in titles():
                raise GoldenError(
                    f"case {case.id} is of clause {case.clause!r}, which SPEC.md lacks; {REMEDY}"
                )
            for argument, reference in case.inputs.items():
                if argument.startswith(TREES[0]) or argument in TREES[1:]:
                    self.tree(reference)
                else:
                    self.array(reference)
            if case.params is not None:
                self.tree(case.params)
            columns = {column for output in case.outputs for column in output.tolerance}
            asked: set[str] = set()  # the columns in which the case compares a number
            for output in case.outputs:
                value = self.expected(case, output)
                if value.size == 0 or not np.isfinite(value).all():
                    raise GoldenError(
                        f"golden {output.tensor} of case {case.id} is empty or not finite; {REMEDY}"
                    )
                for column in filter(output.tolerance.get, output.tolerance):
                    if set(tolerance_of(case, output, column)[0]) - {"finite"}:
                        asked.add(column)
            if columns - asked or not asked:
                where = ", ".join(sorted(columns - asked)) or "any column"
                raise GoldenError(
                    f"case {case.id} compares no number in {where}: all of its outputs have the "
                    f"tolerance finite alone, or none; {REMEDY}"
                )

    def inputs(self) -> dict[str, bytes]:
        """File -> content of a folder that has the inputs of all cases, and no case.

        Nothing in it tells of an expected tensor, not even its hash, from which one number could be
        found by trying.
        """
        named = {ref for case in self.cases for ref in (*case.inputs.values(), case.params or "")}
        stems = {reference.partition(":")[0] for reference in named} & set(self.files)
        found = {f"{stem}.safetensors": self._bytes(stem) for stem in sorted(stems)}
        kept = {
            stem: digest
            for stem, digest in self.files.items()
            if stem in stems or stem.startswith("checkpoints/")
        }
        manifest = {"format": FORMAT, "made_with": self.made_with, "files": kept, "cases": []}
        return {**found, "manifest.json": json.dumps(manifest).encode()}

    def holds(self, reference: str) -> bool:
        """Whether there is a tensor of this reference."""
        stem, _, key = reference.partition(":")
        return stem in self.files and key in self._read(stem)

    def array(self, reference: str) -> np.ndarray:
        """The tensor that a reference names, as stored."""
        stem, _, key = reference.partition(":")
        tensors = self._read(stem)
        if key not in tensors:
            raise GoldenError(f"golden tensor {reference} is missing; {REMEDY}")
        return tensors[key]

    def tree(self, reference: str) -> dict[str, np.ndarray]:
        """Name -> tensor of all keys under a tree reference."""
        stem, _, prefix = reference.partition(":")
        if stem == "checkpoint":
            return dict(self._read(f"checkpoints/{prefix}"))
        start = f"{prefix}/"
        tensors = self._read(stem)
        tree = {k.removeprefix(start): v for k, v in tensors.items() if k.startswith(start)}
        if not tree:
            raise GoldenError(f"golden tree {reference} is missing; {REMEDY}")
        return tree

    def expected(self, case: Case, output: Output) -> np.ndarray:
        """The golden of one output, its shape, dtype and hash verified."""
        value = self.array(output.tensor)
        size = int(np.prod(output.shape, dtype=np.int64))
        shape = output.shape if output.stride == 1 else (-(-size // output.stride),)
        if value.shape != shape or str(value.dtype) != output.dtype:
            raise GoldenError(
                f"golden {output.tensor} of case {case.id} is {value.dtype} {list(value.shape)}, "
                f"the manifest says {output.dtype} {list(shape)}; {REMEDY}"
            )
        if (digest := sha256(np.ascontiguousarray(value).tobytes())) != output.sha256:
            raise GoldenError(
                f"golden {output.tensor} of case {case.id} has sha256 {digest}, the manifest says "
                f"{output.sha256}; {REMEDY}"
            )
        return value


REMEDY = "restore spec/goldens from the repository, or make it anew with `nox -s goldens`"


def _content(path: Path) -> bytes:
    """The bytes of a regular file, or of one that a link leads to. Raises OSError for all else.

    A pipe or a device would be read without an end.
    """
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    with open(os.open(path, flags), "rb") as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise OSError("it is a pipe, a device or a folder, not a file")
        return file.read()


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; a name that stands twice would hide what it named first."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{twice!r} stands twice in one object")
    return found


def _no_constant(word: str) -> None:
    raise ValueError(f"{word} is no JSON")


def _a(kind: type, value: Any, where: str) -> Any:
    """The value, which must be of this kind; texts printable. Raises ValueError that says where."""
    words = {dict: "an object", list: "a list", str: "a text", int: "a whole number"}
    if not isinstance(value, kind) or isinstance(value, bool):
        raise ValueError(f"{where} is {str(value)[:40]!r}, expected {words[kind]}")
    if isinstance(value, str) and not value.isprintable():
        raise ValueError(f"{where} is {value[:40]!r}, which cannot be printed")
    return value


def _field(entry: dict[str, Any], name: str, kind: type, where: str) -> Any:
    if name not in entry:
        raise ValueError(f"{where} has no {name!r}")
    return _a(kind, entry[name], f"{name} of {where}")


def _texts(entry: dict[str, Any], name: str, where: str) -> dict[str, str]:
    found = _field(entry, name, dict, where)
    return {
        _a(str, key, f"a name in {name} of {where}"): _a(str, value, f"{key} in {name} of {where}")
        for key, value in found.items()
    }


def _whole(value: Any, low: int, high: int, where: str) -> int:
    if not low <= _a(int, value, where) <= high:
        raise ValueError(f"{where} is {value}, outside {low}..{high}")
    return value


@functools.cache
def titles() -> dict[str, str]:
    """Clause -> its title in SPEC.md."""
    text = (SPEC / "SPEC.md").read_text(encoding="utf-8")
    return dict(re.findall(r"^## (S\d+) (.+)$", text, re.MULTILINE))


def tolerance_of(case: Case, output: Output, column: str) -> tuple[dict[str, float], str]:
    """Norm -> tolerance, and its reason. Raises GoldenError where it would check nothing."""
    entry = dict(output.tolerance.get(column, {}))
    reason = str(entry.pop("reason", ""))
    what = f"output {output.name} of case {case.id}"
    if column not in ARRAY_DTYPES:
        raise GoldenError(
            f"{what} has a tolerance for {column!r}; columns are {', '.join(ARRAY_DTYPES)}"
        )
    if not entry:
        raise GoldenError(
            f"{what} has no {column} tolerance; add one of {', '.join(NORMS)} to the manifest"
        )
    for norm, value in entry.items():
        if norm not in NORMS:
            raise GoldenError(
                f"{what} has the unknown norm {norm!r}; allowed are {', '.join(NORMS)}"
            )
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not (number and 0 <= value < math.inf):
            raise GoldenError(
                f"{what}: {column} tolerance {norm} = {ascii(value)[:40]} is not a finite number "
                "of at least 0; correct the manifest"
            )
        if value >= 1:
            why = "a result of zeros would be within it" if norm in RELATIVE else "it says nothing"
            raise GoldenError(
                f"{what}: {column} tolerance {norm} = {ascii(value)[:40]} is not below 1: {why}; "
                "correct the manifest"
            )
    return {norm: float(value) for norm, value in entry.items()}, reason


def _case(entry: Any, number: int, configs: dict[str, Config]) -> Case:
    """A case of the manifest. Raises ValueError that names it and what is wrong with it."""
    identity = _field(_a(dict, entry, f"case {number}"), "id", str, f"case {number}")
    where = f"case {identity}"
    config = _field(entry, "config", str, where)
    try:
        config = configs.get(config) or load_config(config)
        if entry.get("replace"):
            config = config.replace(**_a(dict, entry["replace"], f"replace of {where}"))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{where}: {error}") from error
    call = _field(entry, "call", str, where)
    options = _a(dict, entry.get("options", {}), f"options of {where}")
    if missing := [name for name in NEEDED.get(call, ()) if name not in options]:
        raise ValueError(f"options of {where} lack {', '.join(missing)}, which {call} needs")
    if call == "run_block":
        try:
            find_block(config, _field(options, "name", str, f"options of {where}"))
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error
    outputs = _field(entry, "outputs", dict, where)
    params = entry.get("params")
    return Case(
        id=identity,
        level=_whole(entry.get("level"), LEVELS[0], LEVELS[-1], f"level of {where}"),
        clause=_field(entry, "clause", str, where),
        config=config,
        call=call,
        params=None if params is None else _a(str, params, f"params of {where}"),
        inputs=_texts({"inputs": {}} | entry, "inputs", where),
        options=options,
        outputs=tuple(_output(name, value, where) for name, value in outputs.items()),
        causes=tuple(
            _a(str, c, f"a cause of {where}") for c in _field(entry, "causes", list, where)
        ),
        oracle=_field(entry, "oracle", str, where),
    )


def _output(name: str, value: Any, where: str) -> Output:
    where = f"output {_a(str, name, f'the name of an output of {where}')!r} of {where}"
    value = _a(dict, value, where)
    shape = [
        _whole(n, 0, LARGEST, f"a side in the shape of {where}")
        for n in _field(value, "shape", list, where)
    ]
    _whole(math.prod(shape), 0, LARGEST, f"the size of {where}")
    tolerance = {
        _a(str, column, f"a column of {where}"): _a(dict, entry, f"the {column} limits of {where}")
        for column, entry in _field(value, "tolerance", dict, where).items()
    }
    return Output(
        name,
        _field(value, "tensor", str, where),
        tuple(shape),
        _field(value, "dtype", str, where),
        _field(value, "sha256", str, where),
        _whole(value.get("stride", 1), 1, LARGEST, f"the stride of {where}"),
        tolerance,
    )
