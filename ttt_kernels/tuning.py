"""What is fastest on this device: of a Triton kernel's configurations, and of the backends that have an operator.

Each is timed once for each key (dtype, head dimension and the like; of lengths only the order of magnitude of all work)
and the answer is kept in a file for each kind of device, under TTT_KERNELS_CACHE or ~/.cache/ttt_kernels. With
deterministic algorithms (`torch.use_deterministic_algorithms`) and in interpreter mode the first is taken: of backends
the one that comes first in `backends.NAMES`. In a CUDA graph's capture nothing is timed; what was not timed before is
the first there too.
"""

import json
import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import torch

_ENVIRONMENT = "TTT_KERNELS_CACHE"
_chosen: dict[str, dict[str, int]] = {}
"""Device -> name of a choice -> index of what was chosen."""
_untimed: set[tuple[str, str]] = set()
"""Devices and names of choices for which there was no memory to time anything: this process does not try again."""


@dataclass(frozen=True)
class Config:
    """Tile sizes of a kernel by name, warps of a program, stages of its loads and options of ptxas.

    Unless told to have one block on a multiprocessor, ptxas spills some bytes where that makes room for another.
    """

    sizes: tuple[tuple[str, int], ...]
    warps: int
    stages: int
    ptxas: str = "--minnctapersm=1"

    def options(self) -> dict[str, int | bool | str]:
        """Options of the compiler; Triton 3.10 no longer fuses multiplications with additions unasked."""
        return {
            "num_warps": self.warps,
            "num_stages": self.stages,
            "enable_fp_fusion": True,
            "ptx_options": self.ptxas,
        }

    def __str__(self) -> str:
        sizes = " ".join(f"{name}={value}" for name, value in self.sizes)
        return f"{sizes} warps={self.warps} stages={self.stages}"


Launch = Callable[[Config], Any]


def run(kernel: str, key: Sequence[object], configs: Sequence[Config], launch: Launch) -> None:
    """Launches a kernel with the best of its configurations for the current device.

    Args:
        kernel: its name.
        key: everything that the best configuration depends on.
        configs: what to choose from, the safest first; it is taken wherever nothing can be timed.
        launch: runs the kernel; it may run many times, and writes the same results each time.
    """
    launch(best(kernel, key, configs, launch))


Option = TypeVar("Option", Config, str)


def best(
    name: str, key: Sequence[object], options: Sequence[Option], trial: Callable[[Option], Any]
) -> Option:
    """The fastest of some options, configurations or backends, on the current device.

    Args:
        name: what they are options for.
        key: everything that the best depends on.
        options: what to choose from; the first is taken wherever nothing can be timed.
        trial: does the work with one of them; called many times for each where they are timed.
    """
    if len(options) == 1 or not _may_choose():
        return options[0]
    device = _device()
    if device not in _chosen:
        _chosen[device] = _read(device)
    choices, label = _chosen[device], _name(name, tuple(key), tuple(options))
    index = choices.get(label)
    if index is None or index >= len(options):
        if (device, label) in _untimed or _capturing():
            return options[0]
        times = [_time(trial, option) for option in options]
        if min(times) == float("inf"):
            _untimed.add((device, label))
            return options[0]
        choices[label] = index = times.index(min(times))
        _write(device, choices)
    return options[index]


def choices(among: Sequence[str]) -> dict[str, str]:
    """What has been chosen among these names on the current device: for what, with its key -> the name."""
    if not _may_choose():
        return {}
    device, found = _device(), {}
    for label, index in _chosen.get(device, _read(device)).items():
        work, *options = label.replace("]", "").split(" [")
        if index < len(options) and set(options) <= set(among):
            found[work] = options[index]
    return found


def amount(count: int) -> str:
    """Roughly how much there is of something, so that what is fastest for little work is not taken for much."""
    return f"8^{min((max(count, 1) - 1).bit_length() // 3, 5)}"


def _may_choose() -> bool:
    """Whether results may depend on what is fastest."""
    return (
        torch.cuda.is_available() and not interpreted() and not torch.are_deterministic_algorithms_enabled()
    )


def _capturing() -> bool:
    """Whether launches are recorded into a CUDA graph, where nothing can be timed."""
    return torch.cuda.is_current_stream_capturing()


@cache
def _name(name: str, key: tuple[object, ...], options: tuple[Config | str, ...]) -> str:
    return " ".join([name, *map(str, key), *(f"[{option}]" for option in options)])


def interpreted() -> bool:
    """Whether Triton's kernels run in its interpreter, on the processor."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on", "y")


@cache
def capability(device: torch.device) -> int:
    """Compute capability of a device, as in sm_80; 0 for the processor."""
    if device.type != "cuda":
        return 0
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def _time(trial: Callable[[Option], Any], option: Option) -> float:
    """Milliseconds of a trial, or infinity where the device lacks the memory or registers for it."""
    from triton.runtime.errors import OutOfResources
    from triton.testing import do_bench

    try:
        return do_bench(lambda: trial(option), warmup=5, rep=20, return_mode="median")
    except (OutOfResources, torch.cuda.OutOfMemoryError):
        return float("inf")


def _device() -> str:
    """The kind of the current device, and the versions on which a choice depends."""
    return _kind(torch.cuda.current_device())


@cache
def _kind(device: int) -> str:
    import triton
    from triton import knobs

    versions = (
        f"triton-{triton.__version__}",
        f"ptxas-{knobs.nvidia.ptxas.version}",
        f"torch-{torch.__version__}",
    )
    return "-".join((torch.cuda.get_device_name(device), *versions)).replace("/", "-").replace(" ", "-")


def _file(device: str) -> Path:
    folder = os.environ.get(_ENVIRONMENT) or Path.home() / ".cache" / "ttt_kernels"
    return Path(folder) / f"{device}.json"


def _read(device: str) -> dict[str, int]:
    """Choices made before; none where the file is missing or damaged."""
    try:
        found = json.loads(_file(device).read_text())
    except (OSError, ValueError):
        return {}
    if not isinstance(found, dict):
        return {}
    return {name: i for name, i in found.items() if type(i) is int and i >= 0}


def _write(device: str, choices: dict[str, int]) -> None:
    """Replaces the file at once, with what other processes have added since; without it if it cannot be written."""
    path = _file(device)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
        with os.fdopen(handle, "w") as file:
            json.dump({**_read(device), **choices}, file, indent=1, sort_keys=True)
        os.replace(temporary, path)
    except OSError:
        pass
