"""The worker's side of the benchmark: one model, opened, checked, and timed call by call."""

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

from conformance.bench import device
from conformance.bench.gate import AFTER, BEFORE, PARTS, checked_batch, sampling_inputs
from conformance.bench.steps import batch_of, peak_memory, reset_peak_memory, resident_memory
from conformance.bench.workloads import Workload
from conformance.execute import Session, described
from spec.config import Config, config_from_dict
from spec.params import initial_params

BATCHES = 4  # different ones, worked in turn
COPIES = 20
STILL = 3  # calls in a row that bring no more memory, after which a process is warm
GROWN = 1.01  # of the memory so far; less is what comes and goes
SETTLE_SECONDS = 10.0  # at most: a heap may grow for ever


def starting_params(workload: Workload) -> dict[str, np.ndarray]:
    """The weights that a workload begins with, float32."""
    if workload.checkpoint is None:
        return initial_params(workload.config, 0)
    return {
        name: value.astype(np.float32) for name, value in load_file(workload.checkpoint).items()
    }


def read_workload(entry: Mapping[str, Any]) -> Workload:
    """The workload of a request."""
    checkpoint = entry["checkpoint"]
    return Workload(
        key=entry["key"],
        config=config_from_dict(entry["config"]),
        batch=entry["batch"],
        kind=entry["kind"],
        steps=entry["steps"],
        guidance_scale=entry["guidance_scale"],
        checkpoint=Path(checkpoint) if checkpoint else None,
    )


class Subject:
    """One model of a backend and what is asked of it; every sample ends with the device done."""

    def __init__(self, session: Session, request: Mapping[str, Any]) -> None:
        self.session, self.folder = session, Path(request["folder"])
        self.workload = read_workload(request["workload"])
        start = starting_params(self.workload)
        start = {name: value.astype(session.dtype) for name, value in start.items()}
        self.began = {name: value.copy() for name, value in start.items()}
        began = time.perf_counter()
        self.model = session.open(self.workload.config, start)
        self.model.synchronize()
        self.build = time.perf_counter() - began
        self.steps = 0
        self.released = False  # since the last call that was timed
        self.first_loss: float | None = None
        self.framework = device.framework_of(described(self.model))
        training = self.workload.kind == "train"
        self.call: Callable[[], Any] = self._train_step if training else self._sample
        self.inputs = self._inputs(self.workload.config) if training else []
        self.given = {} if training else self._cast(sampling_inputs(self.workload))

    def _cast(self, batch: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {
            name: value.astype(self.session.dtype) if value.dtype.kind == "f" else value
            for name, value in batch.items()
        }

    def _inputs(self, config: Config) -> list[dict[str, np.ndarray]]:
        return [self._cast(batch_of(config, step)) for step in range(1, BATCHES + 1)]

    def part(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """The reply to one part: check, warm, copy, round."""
        parts = {"check": self.check, "warm": self.warm, "copy": self.copy, "round": self.round}
        if request["part"] not in parts:
            raise ValueError(f"part {request['part']!r} is unknown; known are {', '.join(parts)}")
        reply = parts[request["part"]](request)
        where = (self.framework, self.session.device)
        if device.is_short(*where, request.get("needed")):  # a dozen workers wait side by side
            device.release(*where)
            self.released = True
        return reply

    def check(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """One call whose results are written out for the check; its seconds too."""
        when = BEFORE if request["when"] == "before" else AFTER
        if self.workload.kind == "sample":
            return self._check_sampling()
        batch = self._cast(checked_batch(self.workload.config, when))
        try:
            before = self.model.state()
        except NotImplementedError:
            return self._check_loss(when)
        tensors = {f"before/{p}/{n}": v.copy() for p in PARTS for n, v in before[p].items()}
        loss, seconds = self._timed(lambda: self.model.train_step(**batch))
        after = self.model.state()
        tensors |= {f"after/{p}/{n}": np.array(v) for p in PARTS for n, v in after[p].items()}
        counts = {"step": before["step"], "expected_step": self.steps, "after_step": after["step"]}
        self.steps += 1
        return {**self._written(tensors), **counts, "loss": float(loss), "first": seconds}

    def _check_loss(self, when: int) -> dict[str, Any]:
        """Of a model that shows no state: the loss on one batch, which must fall."""
        batch = self._cast(checked_batch(self.workload.config, BEFORE))
        loss, seconds = self._timed(lambda: self.model.train_step(**batch))
        self.steps += 1
        if self.first_loss is None:
            self.first_loss = float(loss)
        return {
            "file": None,
            "loss": float(loss),
            "first_loss": self.first_loss,
            "first": seconds,
            "describe": described(self.model),
        }

    def _check_sampling(self) -> dict[str, Any]:
        trajectory, seconds = self._timed(self._sample)
        try:
            now = self.model.params()
        except NotImplementedError:
            now = self.began
        changed = [n for n, v in self.began.items() if not np.array_equal(now[n], v)]
        written = self._written({"trajectory": np.array(trajectory)})
        return {**written, "first": seconds, "changed": changed, "describe": described(self.model)}

    def _written(self, tensors: Mapping[str, np.ndarray]) -> dict[str, Any]:
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / "check.safetensors"
        save_file({name: np.array(value, order="C") for name, value in tensors.items()}, path)
        return {"file": path.name, "describe": described(self.model)}

    def warm(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Calls that do not count: some frameworks compile a second time."""
        for _ in range(request["calls"]):
            self._seconds()
        device.release(self.framework, self.session.device)  # what compiling took is no peak
        self.released = True
        reset_peak_memory()
        device.reset_peak(self.framework, self.session.device)
        return {}

    def copy(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Seconds of copying one call's arrays to the device, each time anew."""
        copy = device.copier(self.framework, self.session.device)
        if copy is None:
            return {"samples": []}
        arrays = list((self.inputs[0] if self.inputs else self.given).values())
        copy(arrays)
        return {"samples": [self._timed(lambda: copy(arrays))[1] for _ in range(COPIES)]}

    def round(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Calls for some seconds, at least one, after one or some that do not count.

        Before it another worker had the caches, the memory and the clock to itself.
        """
        if self.released:
            self._settle()
        else:
            self._seconds()
        end = time.perf_counter() + request["seconds"]
        samples = [self._seconds()]
        while time.perf_counter() < end:
            samples.append(self._seconds())
        on_device = device.peak(self.framework, self.session.device)
        return {
            "samples": samples,
            "peak_memory": peak_memory() if on_device is None else on_device,
            "memory_of": "host" if on_device is None else "device",
        }

    def _settle(self) -> None:
        """Calls until the memory has come back that was given away: they take longer."""
        most = still = 0
        end = time.perf_counter() + SETTLE_SECONDS
        while still < STILL and time.perf_counter() < end:
            self._seconds()
            now = resident_memory() or 0
            still = 0 if now > GROWN * most else still + 1
            most = max(most, now)
        self.released = False

    def _seconds(self) -> float:
        return self._timed(self.call)[1]

    def _timed(self, call: Callable[[], Any]) -> tuple[Any, float]:
        """What a call gives, and its seconds until the device has finished it."""
        start = time.perf_counter()
        value = call()
        self.model.synchronize()
        return value, time.perf_counter() - start

    def _train_step(self) -> float:
        loss = self.model.train_step(**self.inputs[self.steps % BATCHES])
        self.steps += 1
        if not np.isfinite(loss):
            raise FloatingPointError(f"the loss is {loss} after {self.steps} steps")
        return loss

    def _sample(self) -> np.ndarray:
        return self.model.sample(
            **self.given,
            method="ddim",
            steps=self.workload.steps,
            guidance_scale=self.workload.guidance_scale,
        )
