"""`python -m engine train` and the console script `train`: Hydra's command line, then the training loop."""

from __future__ import annotations

import importlib.util
import logging
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pprint import pformat

import hydra
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import InterpolationToMissingValueError, OmegaConfBaseException

from engine.files import atomic_write
from engine.training import cluster
from engine.training.groups import CONFIG_NAME, SLURM_LAUNCHER, register
from engine.training.run import Run, run_from_config
from engine.training.usage import usage

logger = logging.getLogger(__name__)

_FULL_ERROR = "HYDRA_FULL_ERROR"


Work = Callable[[Run], int]


def main(argv: Sequence[str] | None = None, *, prog: str = "train", work: Work | None = None) -> int:
    """Trains what `argv` (None: the process's arguments), in Hydra's syntax, describes; returns the exit status.

    With `work` that is done with the run instead, in this process, and nothing is written.

    An error of the user's is one line on stderr, beginning with `prog`, and status 2; with HYDRA_FULL_ERROR=1
    it is raised. On a cluster this process submits the run, and waits for it.
    """
    full_error = os.environ.get(_FULL_ERROR) == "1"
    statuses: list[int] = []
    errors: list[Exception] = []

    def task(cfg: DictConfig) -> None:
        try:
            statuses.append(launch(cfg) if work is None else work(run_from_config(cfg)[0]))
        except (ValueError, OSError) as error:
            # These lists are the submitting process's; what is raised on a cluster finds its way there.
            if full_error or cluster.submitted():
                raise
            errors.append(error)

    arguments = sys.argv[1:] if argv is None else argv
    if "--help" in arguments or "-h" in arguments:
        print(usage(prog))
        return 0
    if work is not None:
        arguments = [*arguments, "hydra.run.dir=.", "hydra/job_logging=stdout"]
    register()
    try:
        with _read_by_hydra(arguments):
            hydra.main(version_base=None, config_path=None, config_name=CONFIG_NAME)(task)()
    except (ValueError, OSError, HydraException, OmegaConfBaseException) as error:
        if full_error:
            raise
        errors.append(error)
    except RuntimeError as error:
        # Submitit's, where there is no Slurm to submit to.
        if full_error or "srun" not in str(error):
            raise
        errors.append(error)
    for failure in errors:
        print(f"{prog}: {_sentence(failure)}", file=sys.stderr)
    return 2 if errors else max(statuses, default=0)


def launch(cfg: DictConfig) -> int:
    """Trains what a composed configuration describes, in this process; returns the training's exit status.

    Raises `ValueError` for a value that is not accepted.
    """
    if cluster.submitted():
        cluster.export_ranks()
    if cluster.rank() > 0:
        logging.getLogger().setLevel(logging.WARNING)
    run, notices = run_from_config(cfg)
    logger.info("Launching with\n%s", pformat(run.raw))
    for notice in notices:
        logger.info(notice)
    if cluster.rank() == 0:
        _write_config(run)
    # The rest of the command does without it: what is wrong is told sooner.
    from engine.training.loop import train

    return train(run)


def _write_config(run: Run) -> None:
    run.log_dir.mkdir(parents=True, exist_ok=True)
    with atomic_write(run.log_dir / "config.yaml") as path:
        path.write_text(OmegaConf.to_yaml(OmegaConf.create(run.raw)), encoding="utf-8")


@contextmanager
def _read_by_hydra(arguments: Sequence[str]) -> Iterator[None]:
    """Hydra takes the process's arguments, and raises its errors only where this variable is set."""
    argv, full_error = sys.argv, os.environ.get(_FULL_ERROR)
    sys.argv = [argv[0], *arguments]
    os.environ[_FULL_ERROR] = "1"
    try:
        yield
    finally:
        sys.argv = argv
        if full_error is None:
            del os.environ[_FULL_ERROR]
        else:
            os.environ[_FULL_ERROR] = full_error


def _sentence(error: Exception) -> str:
    if SLURM_LAUNCHER in str(error) and importlib.util.find_spec("submitit") is None:
        return "deploy=submitit needs the package hydra-submitit-launcher: pip install '.[slurm]'"
    name, collides, _ = str(error).partition(" is validated against ConfigStore schema with the same name")
    if collides:
        return f"{name} is an option that is here already: give the one in --config-dir another name"
    if isinstance(error, InterpolationToMissingValueError):
        return f"{str(error).splitlines()[0]}: set it, or choose a +experiment=..."
    cause = f" {error.__cause__}" if isinstance(error, HydraException) and error.__cause__ else ""
    return " ".join(f"{error}{cause}".split())
