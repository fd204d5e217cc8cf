"""torch.compile on the model, and on an inner loop that a user writes of the operators."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from harness import BACKENDS
from small_model import model, stream
from torch import Tensor

from engine import TTTModel
from ttt_kernels import swiglu

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]


@pytest.fixture(autouse=True)
def nothing_compiled() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def small() -> TTTModel:
    return model(num_layers=2, suffix_layers=1)


def loss_and_gradients(
    m: TTTModel, *, compiled: bool, fullgraph: bool = False, **options: Any
) -> list[Tensor]:
    def loss(tokens: Tensor) -> Tensor:
        return m.loss(tokens, **options).loss

    call = torch.compile(loss, backend="aot_eager", fullgraph=fullgraph) if compiled else loss
    value = call(stream(17))
    return [value.detach(), *torch.autograd.grad(value, list(m.parameters()))]


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_meta_objective_is_one_graph(backend: str) -> None:
    m, options = small(), {"method": "graph", "checkpoint_blocks": False, "backend": backend}
    found = loss_and_gradients(m, compiled=True, fullgraph=True, **options)
    for a, b in zip(found, loss_and_gradients(m, compiled=False, **options), strict=True):
        torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@torch.no_grad()
def test_so_is_its_evaluation(backend: str) -> None:
    """No kernel is called past its operator while a graph is made."""
    m, options = small(), {"method": "graph", "checkpoint_blocks": False, "backend": backend}
    compiled = torch.compile(
        lambda tokens: m.loss(tokens, **options).nll, backend="aot_eager", fullgraph=True
    )
    torch.testing.assert_close(compiled(stream(17)), m.loss(stream(17), **options).nll, rtol=2e-5, atol=2e-6)


def test_sweeps_stay_as_they_are() -> None:
    m = small()
    for a, b in zip(*(loss_and_gradients(m, compiled=c) for c in (True, False)), strict=True):
        torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-6)
    torch.compiler.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported, match="checkpoint_blocks=False"):
        loss_and_gradients(m, compiled=True, fullgraph=True)


def test_prefill_and_decode() -> None:
    m, tokens = small(), stream(20)
    state, plain = m.init_state(), m.init_state()
    prefill = torch.compile(m.prefill, backend="aot_eager")
    decode = torch.compile(m.decode, backend="aot_eager")
    found, expected = prefill(tokens, state), m.prefill(tokens, plain)
    torch.testing.assert_close(found.nll, expected.nll, rtol=0, atol=2e-5, equal_nan=True)
    for token in (3, 5):
        logits = [call(torch.tensor([token]), s) for call, s in ((decode, state), (m.decode, plain))]
        torch.testing.assert_close(*logits, rtol=0, atol=4e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_inner_gradient_of_operators_is_one_graph(backend: str) -> None:
    generator = torch.Generator().manual_seed(0)
    x, *weights = (
        torch.randn(shape, generator=generator) for shape in ((2, 3, 8), (2, 16, 8), (2, 16, 8), (2, 8, 16))
    )
    weights = [w.requires_grad_() for w in weights]

    def outer() -> Tensor:
        inner = swiglu(x, *weights, backend=backend).square().sum()
        grads = torch.autograd.grad(inner, weights, create_graph=True)
        return swiglu(x, *(w - 0.1 * g for w, g in zip(weights, grads, strict=True)), backend=backend).sum()

    with torch._dynamo.config.patch(trace_autograd_ops=True):
        compiled = torch.compile(outer, fullgraph=True, backend="aot_eager")
        found = torch.autograd.grad(compiled(), weights)
    for a, b in zip(found, torch.autograd.grad(outer(), weights), strict=True):
        torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-5)
