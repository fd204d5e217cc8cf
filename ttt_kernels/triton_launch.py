"""What launches of Triton kernels share."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from ttt_kernels import tuning
from ttt_kernels.tuning import Config


def on(device: torch.device) -> AbstractContextManager[object]:
    """The context in which kernels run on a device."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def launch(
    name: str,
    kernel: Any,
    programs: Any,
    configs: Sequence[Config],
    key: Sequence[object],
    device: torch.device,
    arguments: dict[str, Any],
) -> None:
    """Launches a kernel with the best of its configurations.

    Args:
        name: the kernel's, with its operator's.
        kernel: the `triton.jit` function.
        programs: how many programs a configuration has, a function of its sizes by name.
        configs: as for `tuning.run`.
        key: what the best configuration depends on besides which arguments are missing and how much work there is.
        device: where the arguments are.
        arguments: all but the sizes of a configuration; a missing one is None.
    """

    def run(config: Config) -> None:
        sizes = dict(config.sizes)
        kernel[(programs(sizes),)](**arguments, **sizes, **config.options())

    missing = [label for label, value in arguments.items() if value is None]
    work = tuning.amount(programs(dict(configs[0].sizes)))
    with on(device):
        tuning.run(name, (*key, work, *missing), configs, run)
