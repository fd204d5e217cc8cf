"""Every order of an operator at the shapes of one mini-batch of a model: checked, then timed."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from bench.attention_contenders import FUSED, band
from bench.gpu_cases import Case, Sizes, case
from bench.gpu_context import Context
from bench.gpu_orders import Truth, work
from bench.memory import freed_memory_kept, release_memory
from bench.operator_example import flat
from bench.timing import cache_bytes, repeated_seconds, replayed_seconds, rotating
from engine.config import TTTConfig
from ttt_kernels.registry import Operator

REPEAT = 5
HEADS = 2
"""Of so many heads attention is checked, whose formulas have all scores at once."""
MOST_COPIES = 16


def measure(context: Context, preset: str, name: str) -> dict[str, Any]:
    """Seconds of each order on the backend that a call takes, and of the plain formulas."""
    config = TTTConfig.preset(preset, compute_dtype=context.dtype)
    made = case(name, Sizes.of(config), context.torch_dtype, context.device, 0, HEADS)
    operator = made.example.operator
    backend = chosen_backend(made)
    orders = {}
    for order in operator.orders(backend):
        try:
            orders[order] = _order(made, order, backend, context.device)
        except torch.OutOfMemoryError:
            orders[order] = {"right": True, "reason": "out of memory"}
        release_memory(context.device)
    return {"backend": backend, "green": all(found["right"] for found in orders.values()), "orders": orders}


def compile_kernels(context: Context, preset: str, name: str) -> dict[str, Any]:
    """Calls every order once, so that its kernels are compiled and found in Triton's cache by other processes."""
    config = TTTConfig.preset(preset, compute_dtype=context.dtype)
    made = case(name, Sizes.of(config), context.torch_dtype, context.device, 0)
    backend = chosen_backend(made)
    for order in made.example.operator.orders(backend):
        given = made.example.arguments(order, backend)
        work(made.example, order, backend, given)()
    return {}


def chosen_backend(made: Case) -> str:
    """Who serves the engine's calls, which it finds out by a tensor like those of the model."""
    return made.example.operator.select(None, made.example.leaves()[0])


def _order(made: Case, order: str, backend: str, device: torch.device) -> dict[str, Any]:
    example = made.example
    given = example.arguments(order)
    ours = work(example, order, backend, given)
    results = ours()
    error, tolerance = Truth(made, order, device, given).error(results)
    found: dict[str, Any] = {"error": error, "tolerance": tolerance, "right": error <= tolerance}
    if not found["right"]:
        return found | {"reason": f"wrong: error {error:.1e}, at most {tolerance:.1e}"}
    used = _bytes(given) + _bytes(results)
    del results
    # Enough copies of the inputs that none is still in the cache when its turn comes again.
    copies = min(MOST_COPIES, 1 + -(-2 * cache_bytes(device) // used))
    works = [ours]
    for _ in range(copies - 1):
        other = example.each(lambda t: t.clone())
        works.append(work(other, order, backend, [_cloned(v) for v in given]))
    for turn in works:
        turn()
    with freed_memory_kept():
        try:
            seconds, launched = replayed_seconds(works, device, REPEAT), False
        except RuntimeError:
            # What cannot be captured is timed with its launches.
            seconds, launched = repeated_seconds(rotating(works), device, REPEAT), True
    return found | {
        "seconds": statistics.median(seconds),
        "spread": [min(seconds), max(seconds)],
        "launches_included": launched,
        "flops": made.products.get(order),
        "bytes": used,
        "baselines": _baselines(made, order, given, device),
    }


def _baselines(made: Case, order: str, given: list[Any], device: torch.device) -> dict[str, float]:
    """Median seconds of what a user would otherwise call."""
    rivals: dict[str, Callable[[], object]] = {
        "plain formulas": work(made.example, order, "reference", given)
    }
    if made.example.operator.name == "swa" and order == "forward":
        rivals |= _fused(made.example.operator, made.example.inputs, made.example.params)
    found = {}
    for name, rival in rivals.items():
        try:
            rival()
            found[name] = statistics.median(repeated_seconds(rival, device, 3))
        except (torch.OutOfMemoryError, RuntimeError):
            # A kernel that does not take such arguments, or more memory than there is.
            continue
        finally:
            release_memory(device)
    return found


def _fused(
    operator: Operator, inputs: tuple[Any, ...], params: tuple[Any, ...]
) -> dict[str, Callable[[], object]]:
    """torch's fused attention by each of its kernels, with a mask tensor for the window."""
    q, k, v = (t.transpose(1, 2).contiguous() for t in inputs[:3])
    mask = band(q.shape[2], k.shape[2], q.device, params[list(operator.params).index("window")])

    def by(kernel: SDPBackend) -> Callable[[], Tensor]:
        def attend() -> Tensor:
            with sdpa_kernel([kernel]):
                return scaled_dot_product_attention(q, k, v, attn_mask=mask)

        return attend

    return {name: by(kernel) for name, kernel in FUSED.items()}


def _bytes(values: list[Any]) -> int:
    return sum(
        t.numel() * t.element_size() for t in flat([v for v in values if isinstance(v, Tensor | list)])
    )


def _cloned(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [_cloned(v) for v in value]
    return value.clone() if isinstance(value, Tensor) else value
