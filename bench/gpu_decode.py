"""How fast a model writes, one sequence at a time."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from bench import decode
from bench.flops import decode_weight_bytes
from bench.gpu_context import Context, Wrong, random_tokens, with_config
from bench.gpu_orders import relative_error
from engine import TTTConfig, TTTModel

PROMPT, TOKENS = 64, 64
CHECKED_TOKENS = 4
SLACK = 3.0


def measure(context: Context, preset: str) -> dict[str, Any]:
    """The median time of a greedy step in runs between two inner steps, and the weights' bytes that it reads."""
    config = TTTConfig.preset(preset, compute_dtype=context.dtype)
    model = context.model(config, context.torch_dtype)
    check = checked(context, model)
    # So many that no inner step is among them.
    prompt = min(PROMPT, config.mini_batch_size // 4)
    tokens = min(TOKENS, config.mini_batch_size // 2)
    seconds = decode.median_seconds(model, 1, prompt, tokens, None)
    read = decode_weight_bytes(config, config.torch_dtype)
    return {
        "check": check,
        "seconds": seconds,
        "tokens_per_s": 1 / seconds,
        "bytes": read,
        "bytes_per_s": read / seconds,
    }


def checked(context: Context, model: TTTModel) -> dict[str, float]:
    """How far logits of tokens read one by one are from those of the formulas; raises Wrong if too far."""
    wide = "float64" if context.dtype == "float32" else "float32"
    exact = _logits(with_config(model, replace(model.config, compute_dtype=wide)), "reference")
    plain = _logits(model, "reference")
    error = relative_error(_logits(model, None), exact)
    tolerance = SLACK * relative_error(plain, exact) + torch.finfo(context.torch_dtype).eps
    if not error <= tolerance:
        raise Wrong(f"logits are off by {error:.1e} from the reference formulas, at most {tolerance:.1e}")
    return {"error": error, "tolerance": tolerance}


def _logits(model: TTTModel, backend: str | None) -> Tensor:
    tokens = random_tokens(model.config, 1, 8 + CHECKED_TOKENS, model.final_norm.device)
    state = model.init_state()
    model.prefill(tokens[:, :8], state, backend=backend)
    return torch.stack(
        [model.decode(token, state, backend=backend) for token in tokens[:, 8:].unbind(1)]
    ).double()
