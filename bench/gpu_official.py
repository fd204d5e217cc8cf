"""The official JAX implementation on the same tokens and weights, where a checkout and its packages are there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from bench.gpu_context import Context, Wrong, random_tokens
from bench.measure import MEAN_OF_TOKENS
from bench.memory import release_memory
from engine import TTTConfig, TTTModel

CHILD = str(Path(__file__).with_name("official_child.py"))
PACKAGES = ("jax", "equinox", "optax", "einops", "jaxtyping", "hydra", "safetensors", "tqdm")
"""What it and bench/official_child.py import."""
SECONDS = 240.0

_BLOCKS = "language_model.model.h.blocks."
_PRIME = "language_model.model.h.prime_storage."
_SHARED = {
    "seq_norm": "seq_norm",
    "q_norm": "seq_modeling_block.q_norm",
    "k_norm": "seq_modeling_block.k_norm",
    "w_o": "seq_modeling_block.wo",
    "seq_post_norm": "seq_post_norm",
    "mlp_norm": "ffn_norm",
    "w_gate": "feed_forward.w1",
    "w_up": "feed_forward.w3",
    "w_down": "feed_forward.w2",
    "mlp_post_norm": "ffn_post_norm",
}
_FAST = {
    "fast_norm": "ffn_prime_norm",
    "fast_gate": "feed_forward_prime.w1",
    "fast_up": "feed_forward_prime.w3",
    "fast_down": "feed_forward_prime.w2",
    "fast_post_norm": "ffn_prime_post_norm",
}


class Unavailable(Exception):
    """There is nothing to measure, and why."""


def measure(context: Context, preset: str, length: int, path: str | None) -> dict[str, Any]:
    """Seconds of its reading; raises Unavailable where it cannot run, Wrong where it reads something else."""
    if path is None:
        raise Unavailable("no checkout was given by --official")
    missing = [name for name in PACKAGES if find_spec(name) is None]
    if missing:
        raise Unavailable(f"packages that it needs are not installed: {', '.join(missing)}")
    config = TTTConfig.preset(preset, compute_dtype=context.dtype)
    model = context.model(config, context.torch_dtype)
    tokens = random_tokens(config, 1, length, context.device)
    # The last token's target is the first token, as a sequence of its own has none.
    targets = tokens.roll(-1, dims=1)
    read = torch.cat((tokens, targets[:, -1:]), 1)
    own = float(model.prefill(read, model.init_state()).nll[:, 1:].double().mean())
    release_memory(context.device)
    with tempfile.TemporaryDirectory() as folder:
        rows = torch.cat((tokens, targets)).cpu().numpy()
        np.save(Path(folder, "tokens.npy"), rows)
        save_file(named_as_there(model), Path(folder, "weights.safetensors"))
        job = {
            "path": path,
            "experiment": f"{preset}/pretrain/pretrain-{preset}-e2e",
            "length": length,
            "tokens": str(Path(folder, "tokens.npy")),
            "weights": str(Path(folder, "weights.safetensors")),
        }
        found = in_child(job)
    if not abs(found["mean_nll"] - own) <= MEAN_OF_TOKENS["bfloat16"]:
        raise Wrong(f"its mean loss is {found['mean_nll']:.4f}, here {own:.4f}: it reads something else")
    return found | {
        "own_mean_nll": own,
        "tokens": length,
        "tokens_per_s": length / found["seconds"],
        "attention": "its own",
    }


def in_child(job: dict[str, Any]) -> dict[str, Any]:
    """The result of a process that imports JAX; raises Unavailable with its last words where it fails."""
    environment = os.environ | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    try:
        child = subprocess.run(
            [sys.executable, CHILD], input=json.dumps(job), capture_output=True, text=True,
            env=environment, timeout=SECONDS,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        raise Unavailable(f"it took more than {SECONDS:.0f} s") from None
    if child.returncode != 0:
        words = (child.stderr.strip().splitlines() or [f"status {child.returncode}"])[-1]
        raise Unavailable(f"it could not run: {words[:200]}")
    found: dict[str, Any] = json.loads(child.stdout)
    return found


def named_as_there(model: TTTModel) -> dict[str, Tensor]:
    """All parameters in float32 under the names of its model's tree: stacked over blocks, matrices (in, out)."""
    blocks = list(model.blocks)
    suffix = blocks[model.config.prefix_layers :]

    def stacked(of: list[Any], name: str, part: slice = slice(None)) -> Tensor:
        tensors = [getattr(block, name)[part].detach().float().cpu() for block in of]
        return torch.stack([t if t.dim() == 1 else t.T for t in tensors]).contiguous()

    d = model.config.hidden_size
    found = {
        "language_model.model.wte.weight": model.embed.weight.detach().float().cpu(),
        "language_model.model.ln_f.weight": model.final_norm.detach().float().cpu(),
    }
    if not model.config.tie_embeddings:
        found["language_model.lm_head.weight"] = model.head_weight.detach().float().cpu().T.contiguous()
    for i, name in enumerate(("wq", "wk", "wv")):
        rows = slice(i * d, (i + 1) * d)
        found[f"{_BLOCKS}seq_modeling_block.{name}.weight"] = stacked(blocks, "w_qkv", rows)
    found |= {f"{_BLOCKS}{there}.weight": stacked(blocks, name) for name, there in _SHARED.items()}
    fast = _FAST if suffix else {}
    return found | {f"{_PRIME}{there}.weight": stacked(suffix, name) for name, there in fast.items()}
