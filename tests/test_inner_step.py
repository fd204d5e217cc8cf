"""The inner step computes what it needs, once, and nothing else; whichever way it is reached."""

import gc
from collections import Counter
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from harness import BACKENDS, relative_error
from small_model import CONFIG, model, stream
from torch import Tensor

from engine.caches import GrowingCache, by_cache, no_rows
from engine.inner import FastWeights, inner_step
from engine.ops import Ops
from engine.weights import collect, initial_fast
from ttt_kernels.registry import OPERATORS
from ttt_kernels.swiglu import FACTORED

SIZE, BLOCKS = CONFIG.mini_batch_size, CONFIG.suffix_layers


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str, tuple[bool, ...]]]:
    """Every kernel that runs: operator, order and what is wanted of it."""
    log: list[tuple[str, str, tuple[bool, ...]]] = []

    def logged(name: str, order: str, kernel: Callable) -> Callable:
        def run(*arguments: object) -> object:
            wanted = (a for a in reversed(arguments) if isinstance(a, list | tuple))
            needs = () if order == "forward" else next(wanted)
            log.append((name, order, tuple(needs)))
            return kernel(*arguments)

        return run

    for operator in OPERATORS.values():
        for kernels in operator.kernels.values():
            for order, kernel in list(kernels.items()):
                monkeypatch.setitem(kernels, order, logged(operator.name, order, kernel))
    for backend, factored in list(FACTORED.items()):
        backward = logged("swiglu", "backward", factored.backward)
        monkeypatch.setitem(FACTORED, backend, replace(factored, backward=backward))
    return log


@pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "reference"])
@pytest.mark.parametrize("recorded", [False, True])
def test_only_gradients_that_it_needs(backend: str, recorded: bool, ran: list) -> None:
    """No slow weight's, and of the first block none below its fast MLP; also where a graph is built."""
    m = model()
    if recorded:
        m.loss(stream(SIZE + 1), backend=backend, method="graph")
    else:
        m.prefill(stream(SIZE + 1), m.init_state(), backend=backend)
    backwards = Counter((name, needs) for name, order, needs in ran if order == "backward")
    # Each other block's queries and keys, and of every block: the norms around both MLPs, less one, and attention's.
    norms = 1 + 4 * BLOCKS + 4 * (BLOCKS - 1) - 1
    assert backwards == {
        ("rms_norm", (True, False, False)): norms,
        ("swiglu", (True, False, False, False)): BLOCKS,
        ("swiglu", (True, True, True, True)): BLOCKS - 1,
        ("swiglu", (False, True, True, True)): 1,
        ("swa", (True, True, True)): BLOCKS - 1,
        ("rope", (True,)): 2 * (BLOCKS - 1),
    }
    forwards = Counter(name for name, order, _ in ran if order == "forward")
    assert (forwards["linear_ce_slope"], forwards["linear_ce"]) == (1, 0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_is_one_step_of_sgd_by_autograd(backend: str) -> None:
    """Clipped, per sequence, on the masked mean of the losses."""
    m = model(inner_clip=0.3)
    config, ops, weights = m.config, Ops(m, backend), collect(m)
    tokens = stream(SIZE + 1, batch=2)
    x = torch.nn.functional.embedding(tokens[:, :-1], weights.embed)
    fast = FastWeights.of(initial_fast(m, 2), config)

    def step(which: Ops, start: FastWeights):
        rows = no_rows(config, tokens)[-2 * config.suffix_layers :]
        caches = [GrowingCache(config.window, *pair) for pair in by_cache(rows)]
        return inner_step(which, config, weights, start, x, torch.arange(SIZE), tokens[:, 1:], caches, 0.5)

    with torch.no_grad():
        own = step(ops, fast)
    leaves = [t.detach().clone().requires_grad_() for block in fast.masters for t in block]
    start = FastWeights.of(tuple(zip(*[iter(leaves)] * 3, strict=True)), config)
    nll = step(Ops(m, "reference"), start).read.nll
    counts = tokens[:, 1:] != config.bos_token_id
    grads = torch.autograd.grad(((nll * counts).sum(1) / counts.sum(1)).sum(), leaves)
    norm = torch.stack([g.flatten(1).square().sum(1) for g in grads]).sum(0).sqrt()
    assert (norm > 0.3).all()
    torch.testing.assert_close(own.norm, norm, rtol=1e-4, atol=0)
    new = [t for block in own.fast.masters for t in block]
    for found, given, old, g in zip(new, own.grads, leaves, grads, strict=True):
        assert relative_error(given, g.double()) < 1e-4
        expected = old.detach() - 0.5 * (0.3 / norm)[:, None, None] * g
        torch.testing.assert_close(found, expected, rtol=0, atol=2e-6)


def test_memory_does_not_grow_with_the_steps() -> None:
    """Of what one step holds nothing is left at the next but the state."""
    m = model()
    alive = []

    def tensors() -> int:
        gc.collect()
        return sum(isinstance(o, Tensor) for o in gc.get_objects())

    state = m.init_state()
    for _ in range(4):
        m.prefill(stream(SIZE), state)
        alive.append(tensors())
    assert alive[1] == alive[2] == alive[3]


@pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "reference"])
def test_the_last_step_is_in_nobodys_loss(backend: str, ran: list) -> None:
    """So the sweep back does not go through it: of three steps two have a second derivative."""
    model_ = model()
    out = model_.loss(stream(3 * SIZE + 1), backend=backend)
    ran.clear()
    out.loss.backward()
    orders = Counter((name, order) for name, order, _ in ran)
    # An update is taken back, and not taken again.
    assert (orders["clipped_sgd", "forward"], orders["clipped_sgd", "backward"]) == (0, 2)
    assert orders["linear_ce_slope", "backward"] == 3
    # A tangent stands for the computation of an inner gradient.
    assert orders["swiglu", "double_backward"] == 0
    assert orders["swiglu_jvp", "backward"] == 2 * (2 * BLOCKS)
    with pytest.raises(RuntimeError, match=r"only once|second time"):
        out.loss.backward()
