"""Makes goldens for who asks in JSON lines: `python -m spec.serve`, the runner's oracle.

A generator's module. A request is {"do": "plan" | "make", "config": {...} or "random": NUMBER,
"seed": N, "brief": bool}; for "make" also {"out": FOLDER, "columns": [...], "processes": N}. While
one is made, lines {"what": ..., "done": i, "of": n} tell how far it is. The last line of each
reply has a "status": "done", "refused" (the config or the request is at fault, as the "message"
says) or "error". The reply to "plan" has the `config` field by field and as `toml`, and the
`cases` as [id, level]; nothing is computed for it but the inputs.
"""

import dataclasses
import json
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from spec.cases import Inputs
from spec.config import Config, ConfigError, config_from_dict
from spec.fresh import fresh_cases, random_config, toml_text
from spec.generate import check_request, write_fresh

Reply = dict[str, Any]


def config_of(request: dict[str, Any]) -> Config:
    """The config that a request names, or draws by its number. Raises ConfigError."""
    if "random" in request:
        return random_config(request["random"])
    return config_from_dict(request["config"])


def answer(request: dict[str, Any], tell: Callable[[Reply], None]) -> Reply:
    """The last line of the reply to a request; `tell` takes those before it."""
    try:
        if request["do"] not in ("plan", "make"):
            raise ConfigError(f"request {request['do']!r} is unknown; known are plan, make")
        config, seed, brief = config_of(request), request["seed"], request["brief"]
        if request["do"] == "plan":
            cases = fresh_cases(Inputs(seed), config, brief)
            return {
                "status": "done",
                "config": dataclasses.asdict(config),
                "toml": toml_text(config),
                "cases": [[case.id, case.level] for case in cases],
            }
        out, columns = Path(request["out"]), request["columns"]
        check_request([config], seed, out, columns)

        def told(what: str, done: int, total: int) -> None:
            tell({"what": what, "done": done, "of": total})

        write_fresh(out, [config], seed, columns, brief, told, request["processes"])
    except ConfigError as error:
        return {"status": "refused", "message": str(error)}
    except Exception as error:
        trace = traceback.format_exc()
        return {"status": "error", "message": f"{type(error).__name__}: {error}", "trace": trace}
    return {"status": "done"}


def main() -> None:
    """Answer requests until the end of the input; whatever else is printed goes to stderr."""
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def tell(reply: Reply) -> None:
        replies.write(json.dumps(reply) + "\n")
        replies.flush()

    for line in sys.stdin:
        tell(answer(json.loads(line), tell))


if __name__ == "__main__":
    main()
