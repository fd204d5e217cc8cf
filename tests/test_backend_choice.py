"""Where more than one backend has kernels for a GPU, the faster one serves: what is tried, remembered and shown."""

from collections.abc import Callable
from importlib import import_module
from pathlib import Path

import pytest
import torch
from torch import Tensor

from ttt_kernels import backends, tuning
from ttt_kernels.clipped_sgd import reference, update
from ttt_kernels.clipped_sgd.update import NAME, RUN, update_

# The module; the package has a function of that name.
choosing = import_module("ttt_kernels.backends")


@pytest.fixture
def on_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """As if both backends of GPUs served tensors of this processor; says what runs. Triton is said to be the faster."""
    log: list[str] = []

    def logged(name: str) -> Callable:
        def run(*arguments: object) -> Tensor:
            log.append(name)
            return reference.update_(*arguments)

        return run

    monkeypatch.setattr(choosing, "_missing", lambda name: None)
    monkeypatch.setattr(choosing, "_on_cpu", lambda tensors: False)
    monkeypatch.setattr(update, "_REFUSALS", dict.fromkeys(("cuda", "triton"), lambda _: None))
    for name in ("cuda", "triton"):
        monkeypatch.setitem(RUN, name, logged(name))

    def time(trial: Callable[[str], None], option: str) -> float:
        for _ in range(3):
            trial(option)
        return {"cuda": 2.0, "triton": 1.0}[option]

    monkeypatch.setenv("TTT_KERNELS_CACHE", str(tmp_path))
    monkeypatch.setattr(tuning, "_chosen", {})
    monkeypatch.setattr(tuning, "_may_choose", lambda: True)
    monkeypatch.setattr(tuning, "_capturing", lambda: False)
    monkeypatch.setattr(tuning, "_device", lambda: "device")
    monkeypatch.setattr(tuning, "_time", time)
    return log


def call() -> list[Tensor]:
    weights, copies = [torch.ones(2, 3)], [torch.zeros(2, 3).bfloat16()]
    norm = update_(weights, [torch.ones(2, 3)], lr=0.5, copies=copies)
    return [*weights, *copies, norm]


def choices() -> dict[str, tuple[str, ...]]:
    table = backends()
    return {name: table[name]["choices"] for name in ("cuda", "triton")}


def test_the_faster_backend_is_found_out_once_and_shown(on_a_gpu: list[str]) -> None:
    new, copy, _ = call()
    # The user's weights have taken one step, whatever was tried.
    assert torch.equal(new, torch.full((2, 3), 0.5))
    assert torch.equal(copy, new.bfloat16())
    assert on_a_gpu == ["cuda"] * 3 + ["triton"] * 3 + ["triton"]
    call()
    assert on_a_gpu[7:] == ["triton"]
    assert choices() == {"cuda": (), "triton": (f"{NAME} torch.float32 torch.bfloat16 1 8^0",)}


def test_the_first_backend_where_nothing_is_tried(
    on_a_gpu: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tuning, "_capturing", lambda: True)
    call()
    monkeypatch.setattr(tuning, "_may_choose", lambda: False)
    call()
    assert on_a_gpu == ["cuda", "cuda"]
    assert choices() == {"cuda": (), "triton": ()}
    update_([torch.ones(1, 2)], [torch.ones(1, 2)], lr=1.0, backend="triton")
    assert on_a_gpu[2:] == ["triton"]


def test_one_backend_that_can_serve_is_not_compared(
    on_a_gpu: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(update, "_REFUSALS", {"triton": lambda _: None})
    call()
    assert on_a_gpu == ["triton"]
    assert choices() == {"cuda": (), "triton": ()}
