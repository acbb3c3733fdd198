"""Measuring in a process of its own: nothing before it counts, neither memory nor threads."""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

DOCS = Path(__file__).resolve().parent.parent
TORCHRUN = ("torch.distributed.run", "--standalone", "--nproc-per-node")


def apart(function: str, *, threads: int = 1, processes: int = 1, **given: Any) -> Any:
    """What a function returns in a fresh interpreter, as plain numbers.

    Args:
        function: `module:name`, within this package.
        threads: Of each process.
        processes: More than one are run by torchrun; the first one's answer is returned.
        given: Arguments of the function; JSON has to be able to say them.
    """
    launcher = (*TORCHRUN, str(processes), "-m") if processes > 1 else ()
    with TemporaryDirectory() as folder:
        answer = Path(folder) / "answer.json"
        command = ["-m", *launcher, "benchmark.apart", function, json.dumps(given), str(answer)]
        subprocess.run([sys.executable, *command], check=True, env=_environment(threads))
        return json.loads(answer.read_text(encoding="utf-8"))


def _environment(threads: int) -> dict[str, str]:
    paths = (str(DOCS), os.environ.get("PYTHONPATH", ""))
    return os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "OMP_NUM_THREADS": str(threads),
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }


def peak() -> int:
    """The most memory this process has held so far, in bytes.

    Not getrusage's maximum, which begins with that of the process that started this one.
    """
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def main(arguments: Sequence[str]) -> None:
    name, given, answer = arguments
    module, function = name.split(":")
    found = getattr(importlib.import_module(f"benchmark.{module}"), function)(**json.loads(given))
    plain = dataclasses.asdict(found) if dataclasses.is_dataclass(found) else found
    if os.environ.get("RANK", "0") == "0":
        Path(answer).write_text(json.dumps(plain), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
