"""An order is registered or it raises: no derivative is ever silently wrong, whoever asks for it and how."""

from collections.abc import Callable

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from harness import BACKENDS, draw
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from ttt_kernels import clipped_sgd, rms_norm, rope, use_backend
from ttt_kernels.registry import OPERATORS

pytestmark = pytest.mark.skipif("cpu" not in BACKENDS, reason="the C++ extension is not built")

LR = 0.3


def _rms_norm(x: Tensor, weight: Tensor, backend: str | None = None) -> Tensor:
    return rms_norm(x, weight, backend=backend)


def _rope(x: Tensor, weight: Tensor, backend: str | None = None) -> Tensor:
    return rope((x * weight)[:, None, None], torch.arange(1), backend=backend)


def _clipped_sgd(x: Tensor, weight: Tensor, backend: str | None = None) -> Tensor:
    out = clipped_sgd([x, x + weight], [x * weight, x], lr=LR, max_norm=1.0, backend=backend)
    return out.weights[0] + out.weights[1] + out.norm[:, None]


OPERATIONS = {"rms_norm": _rms_norm, "rope": _rope, "clipped_sgd": _clipped_sgd}
"""An operator with one tensor, with several, and with lists of tensors."""

each_operation = pytest.mark.parametrize("operation", OPERATIONS.values(), ids=OPERATIONS)
Operation = Callable[..., Tensor]


def inputs(grad: bool = True) -> list[Tensor]:
    return [draw(3, 8, seed=0).requires_grad_(grad), draw(8, seed=1).requires_grad_(grad)]


def scalar(t: Tensor) -> Tensor:
    return (t * torch.linspace(0.5, 1.5, t.numel(), dtype=t.dtype).reshape(t.shape)).square().sum()


def gradients(function: Operation, tensors: list[Tensor], order: int) -> tuple[Tensor, ...]:
    """The gradient, or the gradient of its square's sum, and so on."""
    result = torch.autograd.grad(scalar(function(*tensors)), tensors, create_graph=order > 1)
    for remaining in range(order - 1, 0, -1):
        result = torch.autograd.grad(sum(scalar(g) for g in result), tensors, create_graph=remaining > 1)
    return result


@each_operation
@pytest.mark.parametrize("order", [1, 2])
def test_orders_agree_with_autograd_of_the_formulas(operation: Operation, order: int) -> None:
    found = gradients(lambda *a: operation(*a, backend="cpu"), inputs(), order)
    expected = gradients(lambda *a: operation(*a, backend="reference"), inputs(), order)
    torch.testing.assert_close(found, expected)


@each_operation
def test_third_order_raises_and_names_the_operator(operation: Operation) -> None:
    tensors = inputs()
    with pytest.raises(RuntimeError, match=r"ttt_kernels.*_double_backward.*no autograd formula"):
        gradients(lambda *a: operation(*a, backend="cpu"), tensors, 3)
    first = torch.autograd.grad(scalar(operation(*tensors, backend="cpu")), tensors, create_graph=True)
    second = torch.autograd.grad(sum(scalar(g) for g in first), tensors, create_graph=True)
    with pytest.raises(RuntimeError, match=r"ttt_kernels.*_double_backward.*no autograd formula"):
        sum(scalar(g) for g in second).backward()


@each_operation
def test_third_order_of_the_reference(operation: Operation) -> None:
    tensors = inputs()
    found = gradients(lambda *a: operation(*a, backend="reference"), tensors, 3)
    step = 1e-5
    direction = draw(3, 8, seed=7)

    def second(sign: int) -> Tensor:
        moved = [(tensors[0].detach() + sign * step * direction).requires_grad_(), tensors[1]]
        result = gradients(lambda *a: operation(*a, backend="reference"), moved, 2)
        return sum(scalar(g) for g in result)

    difference = (second(1) - second(-1)) / (2 * step)
    torch.testing.assert_close((found[0] * direction).sum(), difference, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("needs", [(True, True), (True, False), (False, True)])
@pytest.mark.parametrize("order", [1, 2])
def test_only_wanted_gradients(needs: tuple[bool, bool], order: int) -> None:
    tensors = [t.requires_grad_(n) for t, n in zip(inputs(grad=False), needs, strict=True)]
    wanted = [t for t in tensors if t.requires_grad]
    results = []
    for backend in ("cpu", "reference"):
        loss = scalar(rms_norm(*tensors, backend=backend))
        for _ in range(order):
            grads = torch.autograd.grad(loss, wanted, create_graph=True, allow_unused=True)
            loss = sum(scalar(g) for g in grads)
        results.append(grads)
    torch.testing.assert_close(results[0], results[1])


def test_explicit_backward_computes_what_is_wanted() -> None:
    """The engine's inner step calls it so; also where it is recorded."""
    operator = OPERATORS["rms_norm"]
    x, weight = inputs()
    for record in (False, True):
        with torch.set_grad_enabled(record):
            y, rstd = operator.forward(x, weight, None, 1e-6, backend="cpu")
            needs = [False, True, False]
            dx, dw, dz = operator.backward(y, x, weight, None, rstd, 1e-6, needs=needs, backend="cpu")
        assert dx is None
        assert dz is None
        assert dw.requires_grad == record
        torch.testing.assert_close(dw, (y * y / weight).sum(0))


# -- Forward mode and transforms: right, or a ValueError ----------------------------------------------------


@each_operation
def test_forward_mode_refuses_or_is_right(operation: Operation) -> None:
    x, weight = inputs(grad=False)
    tangent = draw(3, 8, seed=3)
    with pytest.raises(ValueError, match="forward mode"):
        torch.func.jvp(lambda t: operation(t, weight, backend="cpu"), (x,), (tangent,))
    with forward_ad.dual_level(), pytest.raises(ValueError, match="forward mode"):
        operation(forward_ad.make_dual(x, tangent), weight, backend="cpu")
    step = 1e-6
    expected = (operation(x + step * tangent, weight) - operation(x - step * tangent, weight)) / (2 * step)
    found = torch.func.jvp(lambda t: operation(t, weight), (x,), (tangent,))[1]
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)
    jacobian = torch.func.jacfwd(lambda t: operation(t, weight))(x)
    torch.testing.assert_close((jacobian * tangent).sum((-2, -1)), found)


@each_operation
def test_forward_mode_that_enters_in_the_backward_raises(operation: Operation) -> None:
    x, weight = inputs()
    y = operation(x, weight, backend="cpu")
    with forward_ad.dual_level(), pytest.raises(ValueError, match=r"backward.*forward mode"):
        torch.autograd.grad(y, x, forward_ad.make_dual(torch.ones_like(y), torch.ones_like(y)))


@each_operation
def test_forward_mode_does_not_pass_through_compiled_code(operation: Operation) -> None:
    """There nobody sees the tangent but the registered operator itself, which would drop it."""
    x, weight = inputs(grad=False)
    torch.compiler.reset()

    def jvp(t: Tensor) -> Tensor:
        return torch.func.jvp(lambda u: operation(u, weight, backend="cpu"), (t,), (t,))[1]

    with pytest.raises(Exception, match="no rule for forward mode"):
        torch.compile(jvp, fullgraph=True, backend="aot_eager")(x)
    compiled = torch.compile(lambda t: operation(t, weight, backend="cpu"), backend="aot_eager")
    with forward_ad.dual_level(), pytest.raises(Exception, match="no rule for forward mode"):
        compiled(forward_ad.make_dual(x, x))


@each_operation
def test_vmap_refuses_or_is_right(operation: Operation) -> None:
    weight = draw(8, seed=1)
    x = draw(4, 3, 8, seed=0)
    with pytest.raises(ValueError, match=r"torch.func transforms"):
        torch.func.vmap(lambda t: operation(t, weight, backend="cpu"))(x)
    found = torch.func.vmap(lambda t: operation(t, weight))(x)
    torch.testing.assert_close(found, torch.stack([operation(t, weight) for t in x]))


@each_operation
def test_batched_cotangents_are_right_or_refused(operation: Operation) -> None:
    x, weight = inputs()
    y = operation(x, weight, backend="cpu")
    cotangents = draw(2, *y.shape, seed=4)
    with pytest.raises(ValueError, match=r"torch.func transforms"):
        torch.func.vmap(lambda c: torch.autograd.grad(y, x, c, retain_graph=True)[0])(cotangents)
    if operation is _clipped_sgd:
        with pytest.raises(RuntimeError, match="not implemented for ttt_kernels::clipped_sgd_backward"):
            torch.autograd.grad(y, x, cotangents, is_grads_batched=True)
        return
    expected = [torch.autograd.grad(y, x, c, retain_graph=True)[0] for c in cotangents]
    found = torch.autograd.grad(y, x, cotangents, is_grads_batched=True)[0]
    torch.testing.assert_close(found, torch.stack(expected))


@each_operation
def test_functional_gradient(operation: Operation) -> None:
    x, weight = inputs(grad=False)
    with pytest.raises(ValueError, match=r"torch.func transforms"):
        torch.func.grad(lambda t: scalar(operation(t, weight, backend="cpu")))(x)
    found = torch.func.grad(lambda t: scalar(operation(t, weight)))(x)
    torch.testing.assert_close(found, gradients(lambda t: operation(t, weight), [x.requires_grad_()], 1)[0])


# -- Tracing ------------------------------------------------------------------------------------------------


@each_operation
@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
def test_make_fx_sees_the_operator(operation: Operation, mode: str) -> None:
    """A trace holds the operator, not the numbers that its kernel once gave."""
    x, weight = inputs(grad=False)
    traced = make_fx(lambda *a: operation(*a, backend="cpu"), tracing_mode=mode)(x, weight)
    assert any("ttt_kernels" in str(node.target) for node in traced.graph.nodes)
    torch.testing.assert_close(traced(x + 1, weight), operation(x + 1, weight))


@pytest.mark.slow
@each_operation
@pytest.mark.parametrize(("backend", "dynamic"), [("cpu", False), ("cpu", True), ("reference", False)])
def test_compiles_without_a_break(operation: Operation, backend: str, dynamic: bool) -> None:
    torch.compiler.reset()
    compiled = torch.compile(operation, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    found = gradients(lambda *a: compiled(*a, backend=backend), inputs(), 1)
    torch.testing.assert_close(found, gradients(operation, inputs(), 1))


def test_compiled_code_follows_use_backend() -> None:
    torch.compiler.reset()
    graphs: list[bool] = []

    def record(graph: torch.fx.GraphModule, _: object) -> Callable:
        graphs.append(any("ttt_kernels" in str(node.target) for node in graph.graph.nodes))
        return graph

    compiled = torch.compile(lambda *a: rms_norm(*a), fullgraph=True, backend=record)
    for name in ("cpu", "reference"):
        with use_backend(name):
            torch.testing.assert_close(compiled(*inputs()), rms_norm(*inputs()))
    assert graphs == [True, False]
