"""Reads the golden files: cases with inputs and expected outputs, refused where a hash differs."""

import dataclasses
import functools
import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load as parse_safetensors

from spec.config import Config, config_from_dict, load_config

SPEC = Path(__file__).parent
GOLDENS = SPEC / "goldens"
FORMAT = 1


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
            raw = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise GoldenError(
                f"golden manifest {path} cannot be read: {error}; {REMEDY}"
            ) from error
        if raw.get("format") != FORMAT:
            raise GoldenError(
                f"{path} has format {raw.get('format')!r}, expected {FORMAT}; {REMEDY}"
            )
        self.files: dict[str, str] = raw["files"]
        self.made_with: dict[str, str] = raw["made_with"]
        # Configs that the spec does not ship, field by field.
        self.configs = {n: config_from_dict(v) for n, v in raw.get("configs", {}).items()}
        self.cases = [_case(entry, self.configs) for entry in raw["cases"]]
        self._read = functools.lru_cache(maxsize=None)(self._read_file)

    def _path(self, stem: str) -> Path:
        return (
            SPEC / "checkpoints" / f"{stem.removeprefix('checkpoints/')}.safetensors"
            if stem.startswith("checkpoints/")
            else self.folder / f"{stem}.safetensors"
        )

    def _read_file(self, stem: str) -> dict[str, np.ndarray]:
        return parse_safetensors(self._bytes(stem))

    def _bytes(self, stem: str) -> bytes:
        """The content of a file, its hash verified."""
        path = self._path(stem)
        if stem not in self.files:
            raise GoldenError(f"golden {path.name} is not in the manifest; {REMEDY}")
        try:
            data = path.read_bytes()
        except OSError as error:
            raise GoldenError(
                f"golden {path.name} is missing ({error.strerror}); {REMEDY}"
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
            for output in case.outputs:
                self.expected(case, output)

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


def _case(entry: dict[str, Any], configs: dict[str, Config]) -> Case:
    config = configs.get(entry["config"]) or load_config(entry["config"])
    if entry.get("replace"):
        config = config.replace(**entry["replace"])
    outputs = tuple(
        Output(
            name,
            value["tensor"],
            tuple(value["shape"]),
            value["dtype"],
            value["sha256"],
            value.get("stride", 1),
            value["tolerance"],
        )
        for name, value in entry["outputs"].items()
    )
    return Case(
        id=entry["id"],
        level=entry["level"],
        clause=entry["clause"],
        config=config,
        call=entry["call"],
        params=entry.get("params"),
        inputs=entry.get("inputs", {}),
        options=entry.get("options", {}),
        outputs=outputs,
        causes=tuple(entry["causes"]),
        oracle=entry["oracle"],
    )
