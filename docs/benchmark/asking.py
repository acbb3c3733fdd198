"""A study of thousands of neurons against a chat server, killed and called again."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

PROGRAM = Path(__file__).parents[2] / "tests" / "programs" / "study_at_size.py"


@dataclass(frozen=True)
class Asking:
    """What the program says.

    Attributes:
        neurons: How many were explained.
        kills: How often the second run was killed.
        said: Its lines.
    """

    neurons: int
    kills: int
    said: list[str]


def measure(neurons: int, kills: int) -> Asking:
    """Run the program in an environment of one thread."""
    command = [sys.executable, str(PROGRAM), "--neurons", str(neurons), "--kill", str(kills)]
    ran = subprocess.run(
        command,
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
    )
    return Asking(neurons, kills, ran.stdout.splitlines())


def told(found: Asking) -> str:
    """The section of the page."""
    listed = "\n".join(line for line in found.said if not line.startswith("  lock"))
    return (
        f"{found.neurons:,} text neurons, each explained by one request and simulated by five, "
        f"then once more, killed {found.kills} times at random moments and called again "
        f"(`python tests/programs/study_at_size.py --neurons {found.neurons} --kill "
        f"{found.kills}`). The server waits before it answers; it and the client share the "
        f"machine.\n\n```text\n{listed}\n```"
    )
