#!/usr/bin/env python3
"""A backend outside this repository: a program that answers the suite in JSON lines.

It uses nothing but Python's standard library, and could be written in any language. It knows S1,
S2, S3 and S6, on lists of numbers, and says of all else that it is not implemented:

    .nox/base/bin/python -m conformance run --impl plain=examples/plain_worker.py --level 0

conformance/README.md describes every request and reply.
"""

import json
import math
import platform
import struct
import sys
import time
from operator import mul
from pathlib import Path

KINDS = {"F64": "d", "F32": "f", "I64": "q", "I32": "i", "BOOL": "?"}  # of safetensors, of struct


class NotWritten(Exception):
    """A call that this program does not have."""


# --- files ---------------------------------------------------------------------------------------


def read_tensors(path, wanted):
    """Key -> (shape, flat list) of the tensors in a safetensors file that are wanted.

    The file: a length (8 bytes, little-endian), a JSON header of that length, then the data.
    """
    with open(path, "rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
        found = {}
        for key in wanted:
            entry = header[key]
            start, end = entry["data_offsets"]
            file.seek(8 + length + start)
            kind, count = KINDS[entry["dtype"]], math.prod(entry["shape"])
            found[key] = (
                entry["shape"],
                list(struct.unpack(f"<{count}{kind}", file.read(end - start))),
            )
    return found


def write_tensors(path, tensors, dtype):
    """Write key -> (shape, flat list of floats) as a safetensors file."""
    kind, name = {"float64": ("d", "F64"), "float32": ("f", "F32")}[dtype]
    header, data = {}, b""
    for key, (shape, values) in tensors.items():
        start = len(data)
        data += struct.pack(f"<{len(values)}{kind}", *values)
        header[key] = {"dtype": name, "shape": shape, "data_offsets": [start, len(data)]}
    text = json.dumps(header).encode()
    Path(path).write_bytes(struct.pack("<Q", len(text)) + text + data)


# --- the model: S1, S2, S3 and S6 ----------------------------------------------------------------


def make_schedule(config):
    """The tables of S1 by name."""
    steps = config["timesteps"]
    if config["schedule"] == "linear":
        first, last = config["beta_start"], config["beta_end"]
        betas = [first + t * (last - first) / max(steps - 1, 1) for t in range(steps)]
        betas = betas if steps == 1 else [*betas[:-1], last]
    else:

        def f(t):
            return math.cos((t / steps + 0.008) / 1.008 * math.pi / 2) ** 2

        betas = [min(1 - f(t + 1) / f(t), 0.999) for t in range(steps)]
    alphas = [1 - beta for beta in betas]
    cumprod = [1.0]
    for alpha in alphas:
        cumprod.append(cumprod[-1] * alpha)
    before, after = cumprod[:-1], cumprod[1:]
    rows = list(zip(betas, alphas, before, after, strict=True))
    return {
        "betas": betas,
        "alphas": alphas,
        "alphas_cumprod": after,
        "alphas_cumprod_prev": before,
        "sqrt_alphas_cumprod": [math.sqrt(a) for a in after],
        "sqrt_one_minus_alphas_cumprod": [math.sqrt(1 - a) for a in after],
        "sqrt_recip_alphas_cumprod": [math.sqrt(1 / a) for a in after],
        "sqrt_recipm1_alphas_cumprod": [math.sqrt(1 / a - 1) for a in after],
        "posterior_variance": [b * (1 - p) / (1 - a) for b, _, p, a in rows],
        "posterior_mean_coef1": [b * math.sqrt(p) / (1 - a) for b, _, p, a in rows],
        "posterior_mean_coef2": [(1 - p) * math.sqrt(al) / (1 - a) for _, al, p, a in rows],
    }


def by_row(table, t, count):
    """table[t] for each of `count` numbers: those of one image after those of another."""
    each = count // len(t)
    return [table[at] for at in t for _ in range(each)]


def combine(a, x, b, y):
    """a * x + b * y, number by number."""
    return [p + q for p, q in zip(map(mul, a, x), map(mul, b, y), strict=True)]


def coefficients(config, t, count):
    """sqrt(alpha-bar) and sqrt(1 - alpha-bar) for each number of a batch."""
    tables = make_schedule(config)
    names = "sqrt_alphas_cumprod", "sqrt_one_minus_alphas_cumprod"
    return [by_row(tables[name], t, count) for name in names]


def q_sample(config, x0, t, noise):
    a, s = coefficients(config, t, len(x0))
    return {"out": combine(a, x0, s, noise)}  # S2


def target(config, x0, t, noise):
    if config["prediction"] != "v":
        return {"out": {"eps": noise, "x0": x0}[config["prediction"]]}
    a, s = coefficients(config, t, len(x0))
    return {"out": combine(a, noise, [-value for value in s], x0)}  # S2


def predict_x0_eps(config, x_t, t, out):
    a, s = coefficients(config, t, len(x_t))
    rows = list(zip(a, s, x_t, out, strict=True))
    if config["prediction"] == "eps":
        x0 = [(x - s * o) / a for a, s, x, o in rows]
    elif config["prediction"] == "x0":
        x0 = out
    else:
        x0 = [a * x - s * o for a, s, x, o in rows]
    if config["clip"]:
        x0 = [min(max(value, -1.0), 1.0) for value in x0]
    eps = [(x - a * x0) / s for a, s, x, x0 in zip(a, s, x_t, x0, strict=True)]  # S3
    return {"x0": x0, "eps": eps}


def guide(config, out_null, out_label, guidance_scale):
    pairs = zip(out_null, out_label, strict=True)
    return {"out": [null + guidance_scale * (label - null) for null, label in pairs]}  # S6


CALLS = {"q_sample": q_sample, "target": target, "predict_x0_eps": predict_x0_eps, "guide": guide}

# --- the protocol --------------------------------------------------------------------------------


class Worker:
    """Answers requests, each by a reply of the same id."""

    def __init__(self):
        self.goldens = self.results = self.dtype = None
        self.count = 0

    def hello(self, request):
        self.goldens, self.results = Path(request["goldens"]), Path(request["results"])
        self.dtype = request["dtype"]
        if self.dtype not in ("float64", "float32"):
            return {"status": "no dtype", "message": f"plain has no {self.dtype}"}
        return {
            "status": "ready",
            "protocol": 1,
            "name": "plain",
            "modes": ["eager"],
            "mode": "eager",
            "versions": {"python": platform.python_version()},
        }

    def case(self, request):
        case, start = request["case"], time.perf_counter()
        results = self.call(case)
        self.count += 1
        file = f"{self.count}.safetensors"
        write_tensors(self.results / file, results, self.dtype)
        return {
            "status": "done",
            "file": file,
            "seconds": time.perf_counter() - start,
            "describe": {
                "name": "plain",
                "framework": "plain Python",
                "device": "cpu",
                "threads": 1,
            },
            "versions": {"python": platform.python_version()},
        }

    def call(self, case):
        """Key -> (shape, flat list) of what the case asks for."""
        if case["call"] == "schedule":
            return {
                key: ([len(table)], table) for key, table in make_schedule(case["config"]).items()
            }
        if case["call"] not in CALLS:
            raise NotWritten(f"plain has no {case['call']}")
        arguments, shape = dict(case["options"]), None
        for name, reference in case["inputs"].items():
            stem, _, key = reference.partition(":")
            its_shape, values = read_tensors(self.goldens / f"{stem}.safetensors", [key])[key]
            arguments[name] = values
            shape = its_shape if len(its_shape) == 4 else shape  # that of the images
        results = CALLS[case["call"]](case["config"], **arguments)
        return {key: (shape, values) for key, values in results.items()}

    def answer(self, request):
        try:
            return {"hello": self.hello, "case": self.case}[request["do"]](request)
        except NotWritten as error:
            return {"status": "not implemented", "message": str(error)}
        except Exception as error:
            return {"status": "error", "message": f"{type(error).__name__}: {error}"}


def main():
    worker = Worker()
    for line in sys.stdin:
        request = json.loads(line)
        if request["do"] == "stop":
            break
        reply = {"id": request["id"], **worker.answer(request)}
        sys.stdout.write(json.dumps(reply) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
