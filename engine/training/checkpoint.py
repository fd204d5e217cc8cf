"""Checkpoints of a training run: whole or not there, and refused where they are not what is asked for.

A checkpoint is the folder `step-00000123`, 123 being the number of completed updates. It holds the parameters
and the optimizer's state as torch.distributed.checkpoint (DCP) writes them, every process its part, which any
number of processes can read; and `run.json`, with the SHA-256 of every other file. The index of DCP is a
pickle: load only checkpoints that you trust.
"""

from __future__ import annotations

import os
import re
import secrets
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor

from engine.config import DTYPES, TTTConfig
from engine.model import TTTModel
from engine.training import run_file, tensors
from engine.training.distributed import gather, rank

_NAME = re.compile(r"step-(\d{8,})")
_TEMPORARY = re.compile(r"\.step-\d{8,}\.tmp-[0-9a-f]+")
_INDEX_FILE = ".metadata"

PathLike = str | os.PathLike[str]


def save(
    directory: PathLike, *, step: int, model: TTTModel, optimizer: torch.optim.AdamW, meta: Mapping[str, Any]
) -> Path:
    """Writes the checkpoint of `step` completed updates; every process has to call it.

    It appears under its name when all of it is on the disk. A process killed before that leaves a hidden
    folder, which the next call removes: only one run at a time may write into `directory`.

    Args:
        meta: anything that JSON can hold, such as the data's fingerprint, seeds and options; `load` gives it
            back, and compares what it is asked to.

    Returns:
        The checkpoint's folder.

    Raises:
        ValueError: a negative step, one that has a checkpoint already, or a `meta` without JSON.
        OSError: it could not be written.
    """
    if step < 0:
        raise ValueError(
            f"step={step} is not accepted: it must be the number of completed updates, at least 0"
        )
    target = _folder(directory, step)
    if target.exists():
        raise ValueError(f"{target} is there already: a checkpoint is never overwritten")
    meta = run_file.as_json("meta", meta)
    stored = tensors.parameters(model) | tensors.optimizer_state(model, optimizer)
    temporary = _temporary(target, gather(secrets.token_hex(8))[0])
    try:
        if rank() == 0:
            _remove_unfinished(Path(directory))
            temporary.mkdir(parents=True)
        gather(None)
        with _storage(target):
            dcp.save(
                stored, storage_writer=dcp.FileSystemWriter(temporary), no_dist=not dist.is_initialized()
            )
        # DCP begins the name of every file with the rank of the process that wrote it.
        own = sorted(temporary.glob(f"__{rank()}_*")) + [temporary / _INDEX_FILE] * (rank() == 0)
        files = gather({path.name: run_file.described(path) for path in own})
        random = gather(run_file.random_state(model.final_norm.device))
        if rank() == 0:
            everything = {name: file for part in files for name, file in part.items()}
            run_file.write(temporary, step=step, model=model, meta=meta, random=random, files=everything)
            _sync(temporary)
            temporary.rename(target)
            _sync(target.parent)
        gather(None)
    finally:
        if rank() == 0:
            shutil.rmtree(temporary, ignore_errors=True)
    return target


def steps(directory: PathLike) -> list[int]:
    """The steps that have a checkpoint in `directory`, ascending; none where there is no such folder."""
    if not Path(directory).is_dir():
        return []
    names = (_NAME.fullmatch(path.name) for path in Path(directory).iterdir() if path.is_dir())
    return sorted(int(match[1]) for match in names if match)


def latest(directory: PathLike) -> int | None:
    """The last step that has a checkpoint in `directory`; None where none has."""
    return max(steps(directory), default=None)


def load(
    directory: PathLike,
    step: int,
    *,
    model: TTTModel,
    optimizer: torch.optim.AdamW | None,
    expected_meta: Mapping[str, Any],
) -> dict[str, Any]:
    """Puts model and optimizer into the state that they had, to the bit; every process has to call it.

    With the optimizer the whole run is resumed: the configuration has to be the same, and the generators of
    random numbers are restored if the number of processes is the same. Hyper-parameters of the optimizer are
    not, they are its own. With None only parameters are loaded, as for extension: the configuration may then
    have another name, window, rope theta, inner rate and compute dtype. The checkpoint may come from any
    number of processes, sharded or not.

    Args:
        expected_meta: what `meta` has to have; further entries of it are not compared.

    Returns:
        The `meta` that was saved.

    Raises:
        ValueError: no such checkpoint, or everything in which it is damaged, incomplete or another than asked
            for. Nothing has been changed then.
        OSError: it could not be read. Nothing has been changed then either.
    """
    folder = _existing(directory, step)
    run = run_file.read(folder)
    wanted = tensors.parameters(model)
    if optimizer is not None:
        wanted |= tensors.optimizer_layout(model, optimizer)
    if wrong := _differences(folder, run, step, model, wanted, expected_meta, optimizer is not None):
        raise ValueError(f"{folder} cannot be loaded: " + "; ".join(wrong))
    # Read beside the model, so that it stays as it is if the disk fails.
    read = {name: torch.empty_like(tensor) for name, tensor in wanted.items()}
    with _storage(folder):
        dcp.load(read, storage_reader=dcp.FileSystemReader(folder), no_dist=not dist.is_initialized())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(read[tensors.PARAMETER + name])
    if optimizer is not None:
        tensors.set_optimizer_state(model, optimizer, read)
        run_file.restore_random_state(run["random"], model.final_norm.device)
    meta: dict[str, Any] = run["meta"]
    return meta


def prune(directory: PathLike, *, keep: int, milestone: int | None = None) -> list[int]:
    """Removes all checkpoints but the newest `keep` and those of steps that are multiples of `milestone`.

    Every process has to call it. Returns the removed steps. Raises `ValueError` where `keep` or `milestone` is
    below 1.
    """
    for name, value in (("keep", keep), ("milestone", milestone)):
        if value is not None and value < 1:
            raise ValueError(f"{name}={value} is not accepted: it must be an integer of at least 1")
    removed = gather([s for s in steps(directory)[:-keep] if milestone is None or s % milestone])[0]
    if rank() == 0:
        for step in removed:
            folder = _folder(directory, step)
            # Under the name of an unfinished one first, so that no half of it is ever taken for a checkpoint.
            hidden = _temporary(folder, secrets.token_hex(8))
            folder.rename(hidden)
            shutil.rmtree(hidden)
    return removed


def export(directory: PathLike, step: int, folder: PathLike) -> None:
    """Writes the parameters of a checkpoint to `folder`, as `TTTModel.from_pretrained` reads them.

    To be called where there is one process. Raises `ValueError` as `load` does.
    """
    run = run_file.read(_existing(directory, step))
    model = TTTModel(TTTConfig.from_dict(run["config"]), dtype=DTYPES[run["dtype"]], device="meta")
    model.to_empty(device="cpu")
    load(directory, step, model=model, optimizer=None, expected_meta={})
    model.save_pretrained(folder)


def _existing(directory: PathLike, step: int) -> Path:
    folder = _folder(directory, step)
    if not folder.is_dir():
        there = ", ".join(map(str, steps(directory))) or "none"
        raise ValueError(f"{folder}: there is no such checkpoint; steps that have one: {there}")
    return folder


def _folder(directory: PathLike, step: int) -> Path:
    return Path(directory) / f"step-{step:08d}"


def _temporary(folder: Path, token: str) -> Path:
    return folder.with_name(f".{folder.name}.tmp-{token}")


def _remove_unfinished(directory: Path) -> None:
    if directory.is_dir():
        for path in directory.iterdir():
            if _TEMPORARY.fullmatch(path.name):
                shutil.rmtree(path)


def _sync(folder: Path) -> None:
    # A name that is not on the disk is lost with the machine, whatever the files are.
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def _storage(folder: Path) -> Iterator[None]:
    """Turns what DCP raises, no subclass of Exception, into an OSError; and being alone needs no warning."""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            yield
    except dcp.CheckpointException as error:
        failures = (f"process {rank}: {failure[0]}" for rank, failure in error.failures.items())
        raise OSError(f"{folder}: {'; '.join(failures)}") from error


def _differences(
    folder: Path,
    run: Mapping[str, Any],
    step: int,
    model: TTTModel,
    wanted: Mapping[str, Tensor],
    expected_meta: Mapping[str, Any],
    everything: bool,
) -> list[str]:
    """All that speaks against loading the `wanted` tensors from `folder`; the same in every process."""
    found_meta = {name: value for name, value in run["meta"].items() if name in expected_meta}
    wrong = [
        *run_file.differences("step", run["step"], step),
        *run_file.config_differences(run, model, everything=everything),
        *run_file.differences("meta", found_meta, run_file.as_json("expected_meta", expected_meta)),
    ]
    ranks = len(gather(None))
    own = list(run["files"])[rank() :: ranks]
    damaged: dict[str, str] = {}
    for part in gather(run_file.damaged(folder, {name: run["files"][name] for name in own})):
        damaged |= part
    wrong += damaged.values()
    if _INDEX_FILE not in damaged:
        wrong += tensors.differences(folder, wanted, everything)
    return wrong
