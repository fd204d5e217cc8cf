"""Settings of every test: the installed package is tested, uninitialized memory is poisoned, time is bounded."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from cuda_here import COMPILER, OnHost, build
from hypothesis import HealthCheck, settings

if not torch.cuda.is_available():
    # Triton reads it when it is imported: kernels are interpreted where there is no GPU to run them.
    os.environ.setdefault("TRITON_INTERPRET", "1")

_CHECKOUT = Path(__file__).resolve().parent.parent


def _prefer_installed_package() -> None:
    """`python -m pytest` puts the checkout first, where a package installed from it has no compiled extension.

    It goes last instead, where the benchmarks are still found.
    """
    sys.path[:] = [p for p in sys.path if Path(p or ".").resolve() != _CHECKOUT] + [str(_CHECKOUT)]


_prefer_installed_package()

settings.register_profile(
    "suite", max_examples=25, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("suite")


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """torch.empty gives NaN, so that an element that no kernel wrote cannot pass for a result."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Models this small gain nothing by more, and on a busy machine threads would wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def built_cuda_on_host(tmp_path_factory: pytest.TempPathFactory) -> OnHost:
    """The CUDA kernels, compiled for the processor."""
    if COMPILER is None:
        pytest.skip("there is no C++ compiler to compile the CUDA kernels for the processor")
    return build(tmp_path_factory.mktemp("cuda_on_host"))


@pytest.fixture
def cuda_on_host(built_cuda_on_host: OnHost) -> OnHost:
    """The same, with its threads in order."""
    built_cuda_on_host.arrange()
    return built_cuda_on_host
