"""The process that does measurements for bench/gpu.py, one after the other, and tells of each as soon as it is done."""

from __future__ import annotations

import json
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1]))

import torch

from bench import gpu_ceilings, gpu_checks, gpu_decode, gpu_official, gpu_operators, gpu_prefill, gpu_train
from bench.gpu_context import Context, Wrong
from bench.memory import release_memory
from bench.timing import synchronize

TASKS = {
    "operator check": gpu_checks.operator,
    "golden check": gpu_checks.golden,
    "compile": gpu_operators.compile_kernels,
    "compile models": gpu_train.compile_models,
    "ceilings": gpu_ceilings.measure,
    "operator": gpu_operators.measure,
    "prefill ttt-e2e": gpu_prefill.ttt,
    "prefill full-attention": gpu_prefill.full_attention,
    "long text": gpu_prefill.long_text,
    "decode": gpu_decode.measure,
    "train ttt-e2e": gpu_train.ttt,
    "train full-attention": gpu_train.full_attention,
    "official": gpu_official.measure,
}


TOLD_LINES = 12
"""Of the calls that led to a failure, the last ones."""


def main() -> None:
    """Reads a job (JSON) from stdin; writes a line of JSON when a measurement begins, and one when it ends.

    It ends early, by itself, behind an error that its device does not get over, and with the process that started it.
    """
    parent = os.getppid()
    job = json.load(sys.stdin)
    threading.Thread(target=end_with, args=(parent,), daemon=True).start()
    # What libraries print must not stand among the results.
    lines = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def tell(**fields: Any) -> None:
        lines.write(json.dumps(fields) + "\n")
        lines.flush()

    device = torch.device(job["device"])
    if device.type == "cuda":
        torch.cuda.set_device(device)
    context = Context(device, job["dtype"])
    for m in job["measurements"]:
        if time.time() + m["seconds"] > job["deadline"]:
            tell(key=m["key"], status="skipped", reason="no time left")
            continue
        tell(key=m["key"], status="begun")
        tell_of(context, m["key"], m["task"], m["arguments"], tell)
        if not usable(device):
            # Those that are left are done by another process.
            return
        release_memory(device)


def usable(device: torch.device) -> bool:
    """Whether the device still does what it is asked for: after an illegal access CUDA refuses everything."""
    try:
        synchronize(device)
    except RuntimeError:
        return False
    return True


def end_with(parent: int) -> None:
    """Ends this process once `parent` has ended, even in a kernel that never does."""
    while os.getppid() == parent:
        time.sleep(1.0)
    os._exit(1)


def tell_of(
    context: Context, key: str, task: str, arguments: dict[str, Any], tell: Callable[..., None]
) -> None:
    """Does one measurement, and tells its status with what was found, or why nothing was."""
    start = time.perf_counter()
    found: dict[str, Any]
    try:
        found = {"status": "measured"} | TASKS[task](context, **arguments)
    except Wrong as error:
        found = {"status": "wrong", "reason": str(error)}
    except gpu_official.Unavailable as error:
        found = {"status": "skipped", "reason": str(error)}
    except torch.OutOfMemoryError:
        found = {"status": "failed", "reason": "out of memory"}
    except Exception as error:
        # Whatever it is (Triton's errors are not RuntimeErrors), those after it are to be done.
        words = " ".join(str(error).split())[:300]
        lines = "".join(traceback.format_exception(error)).splitlines()
        found = {
            "status": "failed",
            "reason": f"{type(error).__name__}: {words}",
            "traceback": lines[-TOLD_LINES:],
        }
    tell(key=key, **found, took=time.perf_counter() - start)


if __name__ == "__main__":
    main()
