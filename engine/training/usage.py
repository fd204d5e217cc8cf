"""What `--help` prints; Hydra's own list of so many groups takes it long."""

from __future__ import annotations

from collections.abc import Iterable

from engine.training.experiments import experiments, models, trainings

_USAGE = """\
usage: {prog} [GROUP=NAME | +GROUP=NAME | KEY=VALUE]... [OPTION]...

Trains TTT-E2E (e2e) and its baselines, full attention (fa) and sliding-window attention (swa). For example:

  {prog} +experiment=tiny/pretrain-tiny-stdlib-e2e
  {prog} +deploy=interactive +experiment=125m/pretrain/pretrain-125m-e2e \\
      deploy_paths.data.dclm_filter_8k=FOLDER training.checkpoint_path=FOLDER
  {prog} +deploy=submitit hydra.launcher.nodes=4 hydra.launcher.partition=NAME \\
      +experiment=125m/extension/ext-125m-e2e-32K deploy_paths.data.books3=FOLDER \\
      training.resume_exp_name=pretrain-125m-e2e training.load_part=params

groups:
  +deploy=        interactive (here), submitit (by Slurm)
  +experiment=    {experiments}
  training=       {trainings}
  model=          {models}

options, of Hydra:
  --cfg job [--resolve]   show the keys of the run and their values instead of running it
  --config-dir FOLDER     add groups of your own: FOLDER/experiment/NAME.yaml is +experiment=NAME
  --multirun              run every combination of values that are separated by commas
  --hydra-help            all options"""


def usage(prog: str) -> str:
    """How the command is called, with every choice of the groups."""
    return _USAGE.format(
        prog=prog,
        experiments=_listed(experiments()),
        trainings=_listed(trainings()),
        models=", ".join(models()),
    )


def _listed(paths: Iterable[str]) -> str:
    """A line for each folder."""
    folders: dict[str, list[str]] = {}
    for path in paths:
        folders.setdefault(path.rpartition("/")[0], []).append(path)
    return f"\n{' ' * 18}".join(", ".join(names) for names in folders.values())
