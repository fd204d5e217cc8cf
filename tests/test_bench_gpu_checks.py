"""bench/gpu.py's checks of operators: they find what is wrong."""

from typing import Any
from unittest.mock import Mock

import pytest
import torch

from bench.gpu_cases import Sizes, case, names
from bench.gpu_checks import CPU, REPEAT, SIZES, operator
from bench.gpu_context import Context
from bench.gpu_orders import Truth, work
from bench.operator_example import flat
from ttt_kernels import tuning
from ttt_kernels.registry import OPERATORS


def test_every_operator_has_a_case() -> None:
    sizes = SIZES["80"]
    made = [case(name, sizes, torch.float32, CPU, 0) for name in names()]
    assert {c.example.operator.name for c in made} == set(OPERATORS)


@pytest.mark.parametrize("name", names())
def test_all_of_a_case_is_on_its_device(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # One without numbers, so that none are drawn either.
    monkeypatch.setattr(torch, "Generator", Mock(return_value=Mock(manual_seed=Mock(return_value=None))))
    made = case(name, SIZES["64"], torch.bfloat16, torch.device("meta"), 0)
    given = flat([v for v in made.example.inputs if isinstance(v, torch.Tensor | list)])
    assert {t.device.type for t in given} == {"meta"}


def test_some_heads_speak_for_all() -> None:
    made = case("swa", Sizes(1, 9, 5, 32, 16, 4, 8, 11, 1), torch.float32, CPU, 0, heads=2)
    for order in OPERATORS["swa"].orders("cpu"):
        given = made.example.arguments(order)
        found = work(made.example, order, "cpu", given)()
        truth = Truth(made, order, CPU, given)
        error, tolerance = truth.error(found)
        assert error <= tolerance
        broken = [t.clone() for t in found]
        broken[0][:, :, 1] += 1
        error, tolerance = truth.error(broken)
        assert error > tolerance


def test_kernels_are_checked_with_every_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    options = [tuning.Config((("BLOCK", size),), 4, 1) for size in (16, 32, 64)]
    ran: list[tuning.Config] = []
    kernels = OPERATORS["rms_norm"].kernels["cpu"]
    right = kernels["forward"]

    def with_choice(*arguments: Any) -> Any:
        tuning.run("kernel", (), options, ran.append)
        # One run of the last configuration has other bits, but not wrong ones.
        other = ran.count(options[2]) == 2
        return [torch.nextafter(t, 2 * t) if other else t for t in right(*arguments)]

    monkeypatch.setitem(kernels, "forward", with_choice)
    monkeypatch.setattr("bench.gpu_checks.SIZES", {"8": Sizes(2, 7, 5, 16, 16, 2, 8, 11, 1)})
    found = operator(Context(CPU, "float32"), "rms_norm", "cpu", "float32")
    told = [o for o in found["orders"] if o["order"] == "forward"]
    assert [(o["configuration"], o["repeats"]) for o in told] == [(0, True), (1, True), (2, False)]
    assert all(o["error"] <= o["tolerance"] for o in told)
    assert not found["green"]
    # Both other orders take what forward saves from one run more, of what is chosen outside of these checks.
    assert [ran.count(option) for option in options] == [REPEAT + 2, REPEAT, REPEAT]
