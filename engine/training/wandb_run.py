"""A run at Weights & Biases."""

from __future__ import annotations

import importlib
import os
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from engine.files import atomic_write

ID_FILE = "wandb-run-id"
"""In the run's folder: the name under which Weights & Biases knows it, so that resuming goes on with it."""


@dataclass(frozen=True, kw_only=True)
class WandbOptions:
    """Where Weights & Biases is to keep a run. Raises `ValueError` for a value that is not accepted."""

    project: str
    entity: str | None = None
    """A user or a team; None: whose key it is."""
    key: str | None = field(default=None, repr=False)
    """The API key; None: that of WANDB_API_KEY or of an earlier login."""
    mode: str = "online"
    """online; or offline: into files below the run's folder, without the network."""

    def __post_init__(self) -> None:
        if not isinstance(self.project, str) or not self.project:
            raise ValueError(f"project={self.project!r} is not accepted: it must be a non-empty string")
        if self.mode not in ("online", "offline"):
            raise ValueError(f"mode={self.mode!r} is not accepted: it must be online or offline")


class WandbRun:
    """Begins a run, or, where `resumed`, goes on with that of `folder`: steps that it has are not sent again.

    Needs the package wandb. Raises `ValueError` where that is missing or the run cannot begin.
    """

    def __init__(self, options: WandbOptions, folder: Path, resumed: bool) -> None:
        if options.mode == "offline":
            # Offline runs report themselves to the server all the same, unless this is so before the import.
            os.environ["WANDB_ERROR_REPORTING"] = "false"
        try:
            wandb: Any = importlib.import_module("wandb")
        except ImportError as error:
            raise ValueError("Weights & Biases needs the package wandb: pip install '.[wandb]'") from error
        try:
            self._run = wandb.init(
                project=options.project,
                entity=options.entity,
                mode=options.mode,
                dir=folder,
                id=_run_id(folder, resumed),
                resume="allow",
                # Here the key stays in this process; a login would write it to the user's files.
                settings=wandb.Settings(api_key=options.key),
            )
        except wandb.errors.Error as error:
            raise ValueError(f"Weights & Biases: the run cannot begin: {error}") from error

    def write(self, values: Mapping[str, int | float]) -> None:
        """Logs a step's values."""
        self._run.log({name: value for name, value in values.items() if name != "step"}, step=values["step"])

    def close(self) -> None:
        """Ends the run, after what is still to be sent."""
        self._run.finish()


def _run_id(folder: Path, resumed: bool) -> str:
    path = folder / ID_FILE
    if not (resumed and path.exists()):
        with atomic_write(path) as temporary:
            temporary.write_text(secrets.token_hex(8), encoding="utf-8")
    return path.read_text(encoding="utf-8")
