"""Which backend serves a call, who says so, and that it is true."""

import threading
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from harness import BACKENDS, draw
from torch import Tensor

import ttt_kernels
from ttt_kernels import backends, clipped_sgd, rms_norm, rope, use_backend
from ttt_kernels.backends import NAMES, available, refuse_on_cpu, refuse_on_cuda
from ttt_kernels.registry import OPERATORS, ORDERS

needs_cpu = pytest.mark.skipif("cpu" not in BACKENDS, reason="the C++ extension is not built")


@pytest.fixture(autouse=True)
def _no_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TTT_KERNELS_BACKEND", raising=False)


def leaves(*shapes: tuple[int, ...]) -> list[Tensor]:
    return [draw(*shape, seed=i).float().requires_grad_() for i, shape in enumerate(shapes)]


def _rms_norm() -> tuple[Tensor, list[Tensor]]:
    inputs = leaves((3, 8), (8,))
    return ttt_kernels.rms_norm(*inputs), inputs


def _rope() -> tuple[Tensor, list[Tensor]]:
    inputs = leaves((1, 3, 2, 8))
    return ttt_kernels.rope(*inputs, torch.arange(3)), inputs


def _swiglu() -> tuple[Tensor, list[Tensor]]:
    inputs = leaves((1, 3, 4), (5, 4), (5, 4), (4, 5))
    return ttt_kernels.swiglu(*inputs), inputs


def _linear_ce() -> tuple[Tensor, list[Tensor]]:
    inputs = leaves((3, 4), (7, 4))
    return ttt_kernels.linear_cross_entropy(*inputs, torch.tensor([1, 6, 0]), reduction="none"), inputs


def _clipped_sgd() -> tuple[Tensor, list[Tensor]]:
    inputs = leaves((2, 8), (2, 8))
    return ttt_kernels.clipped_sgd(inputs[:1], inputs[1:], lr=0.1, max_norm=1.0).weights[0], inputs


def _swa() -> tuple[Tensor, list[Tensor]]:
    inputs = leaves((1, 3, 2, 4), (1, 3, 1, 4), (1, 3, 1, 4))
    return ttt_kernels.sliding_window_attention(*inputs, window=2), inputs


def _swa_jvp() -> tuple[Tensor, list[Tensor]]:
    inputs = leaves(*((1, 3, 2, 4), (1, 3, 1, 4), (1, 3, 1, 4)) * 2)
    return ttt_kernels.sliding_window_attention_jvp(*inputs, window=2)[1], inputs


def _swiglu_jvp() -> tuple[Tensor, list[Tensor]]:
    inputs = leaves(*((2, 4), (5, 4), (5, 4), (4, 5)) * 2)
    return ttt_kernels.swiglu_jvp(*inputs)[1], inputs


def _rms_norm_jvp() -> tuple[Tensor, list[Tensor]]:
    inputs = leaves(*((2, 4), (4,)) * 2)
    return ttt_kernels.rms_norm_jvp(*inputs)[1], inputs


def _linear_ce_jvp() -> tuple[Tensor, list[Tensor]]:
    x, weight, *dots = inputs = leaves(*((3, 4), (6, 4)) * 2)
    found = ttt_kernels.linear_cross_entropy_jvp(x, weight, torch.tensor([0, 5, 2]), *dots)
    return found[1], inputs


def _linear_ce_slope() -> tuple[Tensor, list[Tensor]]:
    x, weight = inputs = leaves((3, 4), (7, 4))
    operator = OPERATORS["linear_ce_slope"]
    target = torch.tensor([1, 6, 0])
    chosen = operator.select(None, x, weight, target)
    nll, slope, _ = operator.forward(x, weight, target, [], -100, True, backend=chosen)
    return (slope * nll[:, None]).sum(1), inputs


CALLS = {
    "rms_norm": _rms_norm,
    "rope": _rope,
    "swiglu": _swiglu,
    "linear_ce": _linear_ce,
    "clipped_sgd": _clipped_sgd,
    "swa": _swa,
    "swa_jvp": _swa_jvp,
    "swiglu_jvp": _swiglu_jvp,
    "rms_norm_jvp": _rms_norm_jvp,
    "linear_ce_jvp": _linear_ce_jvp,
    "linear_ce_slope": _linear_ce_slope,
}
"""One call of each operator, giving an output and the inputs that have gradients."""
ONCE = {name for name in CALLS if name.endswith("_jvp")} | {"linear_ce_slope"}
"""Those that have a derivative in them already, and one order less."""


def run(call: Callable[[], tuple[Tensor, list[Tensor]]], order: str) -> None:
    """Runs a call up to an order."""
    out, inputs = call()
    if order == "forward":
        return
    loss = (out * draw(*out.shape, seed=5).float().requires_grad_()).square().sum()
    grads = torch.autograd.grad(loss, inputs, create_graph=order == "double_backward")
    if order == "double_backward":
        torch.autograd.grad(sum(g.square().sum() for g in grads), inputs)


@pytest.fixture
def used(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str, str]]:
    """Every kernel that runs, as (operator, backend, order)."""
    log: list[tuple[str, str, str]] = []

    def logged(kernel: Callable, key: tuple[str, str, str]) -> Callable:
        def run_kernel(*arguments: object) -> object:
            log.append(key)
            return kernel(*arguments)

        return run_kernel

    for operator in OPERATORS.values():
        for backend, kernels in operator.kernels.items():
            for order, kernel in list(kernels.items()):
                monkeypatch.setitem(kernels, order, logged(kernel, (operator.name, backend, order)))
    return log


def _of(name: str, used: list[tuple[str, str, str]]) -> list[tuple[str, str, str]]:
    """What ran of an operator itself: a twin runs the kernels of its base."""
    return [key for key in used if key[0] == name]


@needs_cpu
@pytest.mark.parametrize("name", sorted(OPERATORS))
@pytest.mark.parametrize("order", ORDERS)
def test_every_order_is_the_backends_own(name: str, order: str, used: list[tuple[str, str, str]]) -> None:
    served = OPERATORS[name].orders("reference")
    assert backends()["cpu"]["operators"][name] == served
    if order not in served:
        with pytest.raises(RuntimeError, match="no autograd formula"):
            run(CALLS[name], order)
        return
    with use_backend("cpu"):
        run(CALLS[name], order)
    assert set(_of(name, used)) == {(name, "cpu", k) for k in ORDERS[: ORDERS.index(order) + 1]}
    assert {backend for _, backend, _ in used} == {"cpu"}


@needs_cpu
@pytest.mark.parametrize("name", sorted(OPERATORS))
def test_every_order_runs_once(name: str, used: list[tuple[str, str, str]]) -> None:
    """Where the cotangents are constants, the second derivative does not come by the first pass again.

    But with what it carries, for the rest of its products.
    """
    with use_backend("cpu"):
        out, inputs = CALLS[name]()
        cotangent = draw(*out.shape, seed=5).float()
        grads = torch.autograd.grad(out, inputs, cotangent, create_graph=True)
        if "double_backward" in OPERATORS[name].orders("reference"):
            torch.autograd.grad(sum(g.square().sum() for g in grads), inputs, allow_unused=True)
    own = _of(name, used)
    expected = [(name, "cpu", order) for order in OPERATORS[name].orders("reference")]
    assert own == expected + [(name, "cpu", "backward")] * bool(OPERATORS[name].carries)


@needs_cpu
@pytest.mark.parametrize("name", sorted(OPERATORS))
def test_best_backend_is_the_default(name: str, used: list[tuple[str, str, str]]) -> None:
    run(CALLS[name], "forward")
    assert _of(name, used) == [(name, "cpu", "forward")]


def test_backends_table() -> None:
    table = backends()
    assert tuple(table) == NAMES
    assert table["reference"]["available"]
    for name, entry in table.items():
        assert entry["available"] == (name in available())
        assert (entry["reason"] is None) == entry["available"]
        assert table[name]["operators"]["clipped_sgd.update_"] == ("forward",)
        assert ("choices" in entry) == (name in ("cuda", "triton"))
    assert table["cuda"]["operators"] == {"decode": ("forward",), "clipped_sgd.update_": ("forward",)}
    for name in OPERATORS:
        assert table["reference"]["operators"][name] == ORDERS[: 2 if name in ONCE else 3]
    for name in BACKENDS:
        assert table[name]["operators"]["decode"] == ("forward",)
    if "cpu" in BACKENDS:
        assert table["cpu"]["instruction_set"] in ("portable", "avx2", "avx512", "avx512_bf16")


def test_a_missing_extension_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    from ttt_kernels import extension

    monkeypatch.setattr(extension, "cpu", None)
    monkeypatch.setattr(extension, "missing", "no compiler was found")
    assert backends()["cpu"]["reason"] == "no compiler was found"
    assert "cpu" not in available()
    out = rms_norm(torch.ones(2, 4), torch.ones(4))
    assert torch.equal(out, rms_norm(torch.ones(2, 4), torch.ones(4), backend="reference"))
    with pytest.raises(ValueError, match="backend 'cpu' cannot serve this call: no compiler was found"):
        rms_norm(torch.ones(2, 4), torch.ones(4), backend="cpu")
    with (
        pytest.raises(ValueError, match=r"no compiler was found; available here: .*reference"),
        use_backend("cpu"),
    ):
        pass


def test_argument_beats_context_beats_environment(
    monkeypatch: pytest.MonkeyPatch, used: list[tuple[str, str, str]]
) -> None:
    x, weight = torch.ones(2, 4), torch.ones(4)
    with pytest.raises(ValueError, match="'cuda' cannot serve this call"):
        rms_norm(x, weight, backend="cuda")
    monkeypatch.setenv("TTT_KERNELS_BACKEND", "cuda")
    with pytest.raises(ValueError, match="'cuda' cannot serve this call"):
        rms_norm(x, weight)
    with use_backend("reference"):
        rms_norm(x, weight)
        with pytest.raises(ValueError, match="'cuda' cannot serve this call"):
            rms_norm(x, weight, backend="cuda")
    rms_norm(x, weight, backend="reference")
    assert used == [("rms_norm", "reference", "forward")] * 2
    monkeypatch.setenv("TTT_KERNELS_BACKEND", "")
    rms_norm(x, weight)
    assert used[-1][1] == BACKENDS[0]


@needs_cpu
def test_contexts_nest_and_end(used: list[tuple[str, str, str]]) -> None:
    def serves() -> str:
        rms_norm(torch.ones(2, 4), torch.ones(4))
        return used[-1][1]

    with use_backend("reference"):
        with use_backend("cpu"):
            assert serves() == "cpu"
        assert serves() == "reference"
        found: list[str] = []
        other = threading.Thread(target=lambda: found.append(serves()))
        other.start()
        other.join()
        assert found == ["cpu"]
    with pytest.raises(KeyError), use_backend("reference"):
        raise KeyError
    assert serves() == "cpu"


def test_unknown_names(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight = torch.ones(2, 4), torch.ones(4)
    accepted = "accepted are 'reference', 'cpu', 'triton', 'cuda'"
    with pytest.raises(ValueError, match=f"backend is 'gpu'; {accepted}"):
        rms_norm(x, weight, backend="gpu")
    with pytest.raises(ValueError, match=f"name is 'gpu'; {accepted}"), use_backend("gpu"):
        pass
    monkeypatch.setenv("TTT_KERNELS_BACKEND", "gpu")
    with pytest.raises(ValueError, match=f"TTT_KERNELS_BACKEND is 'gpu'; {accepted}"):
        rms_norm(x, weight)


@pytest.mark.parametrize("name", ["cuda", "triton"])
def test_what_cannot_run_says_why_and_what_can(name: str) -> None:
    if name in available():
        pytest.skip(f"{name} runs here")
    with pytest.raises(
        ValueError, match=f"rms_norm: backend '{name}' cannot serve .*: .*; what can: .*reference"
    ):
        rms_norm(torch.ones(2, 4), torch.ones(4), backend=name)
    with pytest.raises(ValueError, match=f"use_backend\\('{name}'\\): .*; available here: .*reference"):
        use_backend(name).__enter__()


@pytest.mark.parametrize(
    ("built", "capability", "runs"),
    [
        (("sm_80", "sm_90a", "sm_100", "compute_100"), 80, True),
        (("sm_80", "sm_90a", "sm_100", "compute_100"), 89, True),
        (("sm_80", "sm_90a", "sm_100", "compute_100"), 90, True),
        (("sm_80", "sm_90a", "sm_100", "compute_100"), 103, True),
        (("sm_80", "sm_90a", "sm_100", "compute_100"), 120, True),
        (("sm_80", "sm_90a", "sm_100", "compute_100"), 75, False),
        (("sm_90a", "compute_90"), 80, False),
        (("sm_80", "sm_90a"), 100, False),
        (("sm_86",), 80, False),
    ],
)
def test_a_gpu_that_cuda_kernels_were_not_built_for(
    built: tuple[str, ...], capability: int, runs: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ttt_kernels import extension, tuning

    kernels = SimpleNamespace(architectures=lambda: list(built))
    monkeypatch.setattr(extension, "load_cuda", lambda: (kernels, ""))
    monkeypatch.setattr(tuning, "capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    entry = backends()["cuda"]
    assert entry["available"] == runs
    expected = f"cuda:0 is sm_{capability}, and the CUDA extension was built for {', '.join(built)}"
    assert entry["reason"] == (None if runs else expected)


def test_what_cuda_kernels_cannot_take(monkeypatch: pytest.MonkeyPatch) -> None:
    assert refuse_on_cuda((torch.ones(2),)) == "a tensor is on cpu, and its kernels run on a GPU"
    double = SimpleNamespace(
        device=torch.device("cuda:0"), dtype=torch.float64, is_floating_point=lambda: True
    )
    accepted = "torch.float32, torch.bfloat16, torch.float16"
    assert refuse_on_cuda((double,)) == f"a tensor has dtype torch.float64; accepted are {accepted}"


@needs_cpu
def test_what_cpu_kernels_cannot_take() -> None:
    x, weight = torch.ones(2, 4, device="meta"), torch.ones(4, device="meta")
    with pytest.raises(ValueError, match="'cpu' cannot serve this call: a tensor is on meta"):
        rms_norm(x, weight, backend="cpu")
    assert rms_norm(x, weight).device.type == "meta"
    small = torch.ones(2, 4).to(torch.float8_e4m3fn)
    assert "has dtype torch.float8_e4m3fn; accepted are torch.float32" in str(refuse_on_cpu((small,)))


@needs_cpu
def test_results_stay_on_the_inputs_device_under_a_default_device() -> None:
    x, weight, positions = torch.ones(1, 2, 1, 4), torch.ones(4), torch.arange(2)
    with torch.device("meta"):
        results = [
            rms_norm(x, weight),
            rope(x, positions),
            *clipped_sgd([x], [x], lr=0.1, max_norm=1.0, copy_dtype=torch.bfloat16)[0],
        ]
    assert all(t.device.type == "cpu" for t in results)
