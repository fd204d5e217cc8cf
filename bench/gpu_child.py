"""The process that does measurements for bench/gpu.py, one after the other, and tells of each as soon as it is done."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1]))

import torch

from bench import gpu_ceilings, gpu_checks, gpu_decode, gpu_official, gpu_operators, gpu_prefill, gpu_train
from bench.gpu_context import Context, Wrong
from bench.memory import release_memory

TASKS = {
    "operator check": gpu_checks.operator,
    "golden check": gpu_checks.golden,
    "compile": gpu_operators.compile_kernels,
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


def main() -> None:
    """Reads a job (JSON) from stdin; writes a line of JSON when a measurement begins, and one when it ends."""
    job = json.load(sys.stdin)
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
        release_memory(device)


def tell_of(
    context: Context, key: str, task: str, arguments: dict[str, Any], tell: Callable[..., None]
) -> None:
    """Does one measurement, and tells its status with what was found, or why nothing was."""
    start = time.perf_counter()
    try:
        found = {"status": "measured"} | TASKS[task](context, **arguments)
    except Wrong as error:
        found = {"status": "wrong", "reason": str(error)}
    except gpu_official.Unavailable as error:
        found = {"status": "skipped", "reason": str(error)}
    except torch.OutOfMemoryError:
        found = {"status": "failed", "reason": "out of memory"}
    except (RuntimeError, ValueError) as error:
        words = " ".join(str(error).split())[:300]
        found = {"status": "failed", "reason": words or type(error).__name__}
    tell(key=key, **found, took=time.perf_counter() - start)


if __name__ == "__main__":
    main()
