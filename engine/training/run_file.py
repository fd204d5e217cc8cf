"""`run.json` of a checkpoint: what it belongs to, and what its files have to be."""

from __future__ import annotations

import base64
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from engine.model import TTTModel
from engine.training.distributed import gather, rank

RUN_FILE = "run.json"
FORMAT = 1

# What extension to longer sequences changes: where positions and windows end, how far an inner step goes, and what
# products are computed in. None of it is in a parameter.
_FREE_FIELDS = frozenset(
    {"name", "window", "rope_theta", "inner_lr", "ilr_init", "ilr_warmup_steps", "compute_dtype"}
)


def as_json(name: str, value: Any) -> Any:
    """`value` as JSON gives it back; a `ValueError` where it has no JSON."""
    try:
        return json.loads(json.dumps(value, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name}: not all of it can be written as JSON ({error})") from error


def write(folder: Path, *, step: int, model: TTTModel, meta: Any, random: Any, files: Any) -> None:
    """Writes `run.json` into `folder`, down to the disk."""
    run = {
        "format": FORMAT,
        "step": step,
        "config": model.config.to_dict(),
        "dtype": dtype_name(model),
        "meta": meta,
        "versions": {name: _version(name) for name in ("torch", "ttt-kernels")},
        "random": random,
        "files": files,
    }
    with open(folder / RUN_FILE, "w", encoding="utf-8") as file:
        file.write(json.dumps(run | {"sha256": _digest(run)}, indent=1) + "\n")
        file.flush()
        os.fsync(file.fileno())


def read(folder: Path) -> dict[str, Any]:
    """What `write` wrote; a `ValueError` where it is missing, damaged or another version's."""
    path = folder / RUN_FILE
    if not path.is_file():
        raise ValueError(f"{path}: there is no such file")
    try:
        run = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    if not isinstance(run, dict) or run.get("format") != FORMAT:
        raise ValueError(f"{path}: expected a checkpoint of format {FORMAT}")
    if run.pop("sha256", None) != _digest(run):
        raise ValueError(f"{path} is damaged: its checksum is another")
    return run


def _version(package: str) -> str | None:
    """None where it runs from a checkout that is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _digest(run: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(run, sort_keys=True).encode()).hexdigest()


def dtype_name(model: TTTModel) -> str:
    """The dtype that embeddings and matrices are stored in, as the configuration names dtypes."""
    return str(model.embed.weight.dtype).removeprefix("torch.")


def described(path: Path) -> dict[str, Any]:
    """Size in bytes and SHA-256 of a file."""
    with open(path, "rb") as file:
        return {
            "bytes": os.fstat(file.fileno()).st_size,
            "sha256": hashlib.file_digest(file, "sha256").hexdigest(),
        }


def damaged(folder: Path, files: Mapping[str, Any]) -> dict[str, str]:
    """Those of `files` that are not in `folder` as `described` described them, and what is wrong with each."""
    wrong = {}
    for name, expected in files.items():
        path = folder / name
        if not path.is_file():
            wrong[name] = f"{name} is missing"
        elif (size := path.stat().st_size) != expected["bytes"]:
            wrong[name] = f"{name} has {size} bytes, expected {expected['bytes']}"
        elif described(path) != expected:
            wrong[name] = f"{name} is damaged: its checksum is another"
    return wrong


def config_differences(run: Mapping[str, Any], model: TTTModel, *, everything: bool) -> Iterator[str]:
    """How the configuration and the stored dtype differ from the model's.

    `everything` is False where only parameters are wanted: then fields may differ that none depends on.
    """
    found, expected = run["config"], model.config.to_dict()
    if not everything:
        found, expected = (
            {name: value for name, value in config.items() if name not in _FREE_FIELDS}
            for config in (found, expected)
        )
    yield from differences("config", found, expected)
    yield from differences("dtype", run["dtype"], dtype_name(model))


def differences(name: str, found: Any, expected: Any) -> Iterator[str]:
    """Where two values of JSON differ, as one sentence each, however deep."""
    if isinstance(found, dict) and isinstance(expected, dict):
        for key in sorted(found.keys() | expected.keys()):
            if key not in found:
                yield f"{name}.{key} is missing, expected {expected[key]!r}"
            elif key not in expected:
                yield f"{name}.{key} is {found[key]!r}, expected none"
            else:
                yield from differences(f"{name}.{key}", found[key], expected[key])
    elif found != expected:
        yield f"{name} is {found!r}, expected {expected!r}"


def random_state(device: torch.device) -> dict[str, str]:
    """The state of this process's generators: the CPU's, and that of `device` where it is a GPU."""
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return {name: base64.b64encode(state.numpy().tobytes()).decode() for name, state in states.items()}


def restore_random_state(states: list[dict[str, str]], device: torch.device) -> None:
    """Puts this process's generators into the state that `states` has, by rank, for them.

    Where the number of processes is another one, none is the process it was: they stay as they are. Likewise
    a GPU's where there was none.
    """
    if len(states) != len(gather(None)):
        return
    own = {
        name: torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)
        for name, text in states[rank()].items()
    }
    torch.set_rng_state(own["cpu"])
    if device.type == "cuda" and "cuda" in own:
        torch.cuda.set_rng_state(own["cuda"], device)
