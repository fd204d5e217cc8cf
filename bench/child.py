"""A job done by a process of its own, so that peak memory is that job's alone and a failure stays there."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Callable
from typing import Any

from bench.output import progress


def run_script(script: str, job: dict[str, Any]) -> dict[str, Any]:
    """
    The result of `job`, done by a process that runs `script`, whose main is `serve`.

    Raises `ValueError` with the child's own words for bad input, `RuntimeError` where it failed otherwise.
    """
    child = subprocess.run([sys.executable, script], input=json.dumps(job), stdout=subprocess.PIPE, text=True)
    if child.returncode < 0:
        name = signal.Signals(-child.returncode).name
        raise RuntimeError(
            f"the process was ended by {name}" + (" (out of memory?)" if name == "SIGKILL" else "")
        )
    if child.returncode != 0:
        raise RuntimeError(f"the process ended with status {child.returncode}")
    result: dict[str, Any] = json.loads(child.stdout)
    if "refused" in result:
        raise ValueError(result["refused"])
    return result


def serve(work: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """Reads a job (JSON) from stdin, shows progress on stderr and writes its result (JSON) to stdout."""
    job = json.load(sys.stdin)
    try:
        result = work(job)
    except ValueError as error:
        result = {"refused": str(error)}
        progress("\n")
    json.dump(result, sys.stdout)
