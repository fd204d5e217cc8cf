"""The official JAX implementation on the same tokens and weights, where a checkout and its packages are there."""

from __future__ import annotations

import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from bench.gpu_context import Context, Wrong, random_tokens
from engine import TTTConfig, TTTModel

CHILD = str(Path(__file__).with_name("official_child.py"))
PACKAGES = {
    "jax": "jax",
    "jaxlib": "jaxlib",
    "equinox": "equinox",
    "optax": "optax",
    "einops": "einops",
    "jaxtyping": "jaxtyping",
    "hydra": "hydra-core",
    "omegaconf": "omegaconf",
    "antlr4": "antlr4-python3-runtime",
    "yaml": "PyYAML",
    "packaging": "packaging",
    "tqdm": "tqdm",
    "safetensors": "safetensors",
}
"""What it and bench/official_child.py import, themselves or by Hydra, and the names that these are installed by."""
PYTHON = (3, 12)
"""The oldest whose grammar it is written in."""
SECONDS = 300.0
SPARE = 60.0
"""Of them, those that one more of its ways is not begun for."""
LOSS_OF_MINI_BATCH = 1e-3
"""How far the mean loss of a mini-batch may be from that here. In bfloat16 it is 2e-4 at worst in the first four of
125m, where a model that does not learn as it reads is 6e-3 off, and one with a window of 2048 1e-2. The mean over all
tokens, of random ones by random weights, tells neither from what is right: 2e-3 and 3e-3."""

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
    if sys.version_info < PYTHON:
        raise Unavailable(f"it needs Python {'.'.join(map(str, PYTHON))} or newer")
    if missing := missing_packages():
        raise Unavailable(f"packages that it needs are not installed: {', '.join(missing)}")
    config = TTTConfig.preset(preset, compute_dtype=context.dtype)
    tokens = random_tokens(config, 1, length, context.device)
    # The last token's target is the first token, as a sequence of its own has none.
    targets = tokens.roll(-1, dims=1)
    own, weights = own_losses(context, config, tokens, targets)
    with tempfile.TemporaryDirectory() as folder:
        rows = torch.cat((tokens, targets)).cpu().numpy()
        np.save(Path(folder, "tokens.npy"), rows)
        save_file(weights, Path(folder, "weights.safetensors"))
        job = {
            "path": path,
            "experiment": f"{preset}/pretrain/pretrain-{preset}-e2e",
            "length": length,
            "dtype": context.dtype,
            "tokens": str(Path(folder, "tokens.npy")),
            "weights": str(Path(folder, "weights.safetensors")),
            "platform": context.device.type,
            "limit": SECONDS - SPARE,
        }
        found = in_child(job, context.device)
    best = fastest(found.pop("ways"), own)
    return found | best | {"tokens": length, "tokens_per_s": length / best["seconds"]}


def missing_packages() -> list[str]:
    """Of `PACKAGES`, what is not installed here."""
    return [name for module, name in PACKAGES.items() if find_spec(module) is None]


def own_losses(
    context: Context, config: TTTConfig, tokens: Tensor, targets: Tensor
) -> tuple[np.ndarray, dict[str, Tensor]]:
    """The mean loss of every mini-batch here, and all parameters; the GPU's memory is free again behind it."""
    model = context.model(config, context.torch_dtype)
    read = torch.cat((tokens, targets[:, -1:]), 1)
    nll = model.prefill(read, model.init_state()).nll[0, 1:].double()
    losses = nll.view(-1, config.mini_batch_size).mean(1).cpu().numpy()
    weights = named_as_there(model)
    del model
    context.release()
    return losses, weights


def fastest(ways: Mapping[str, Mapping[str, Any]], own: np.ndarray) -> dict[str, Any]:
    """The fastest of its ways that read what is read here, and beside it what the others have come to.

    Raises Wrong where those that ran read something else, Unavailable where none ran.
    """
    right, others = {}, {}
    wrong = False
    for name, way in ways.items():
        if "reason" in way:
            others[name] = str(way["reason"])
            continue
        losses = np.asarray(way["losses"], np.float64)
        # A NaN compares as false.
        error = float(np.abs(losses - own).max()) if losses.shape == own.shape else float("nan")
        if error <= LOSS_OF_MINI_BATCH:
            right[name] = (statistics.median(way["runs"]), error, way)
            others[name] = f"{right[name][0]:.3f} s"
        else:
            wrong = True
            others[name] = f"a mini-batch's loss is off by {error:.1e}, at most {LOSS_OF_MINI_BATCH:.1e}"
    if not right:
        same = len(set(others.values())) == 1
        words = next(iter(others.values())) if same else "; ".join(f"{n}: {r}" for n, r in others.items())
        if wrong:
            raise Wrong(f"it reads something else: {words}")
        raise Unavailable(f"it could not run: {words}")
    name = min(right, key=lambda name: right[name][0])
    seconds, error, way = right[name]
    others.pop(name)
    return {
        "seconds": seconds,
        "runs": way["runs"],
        "settings": name,
        "others": others,
        "mean_nll": float(np.mean(way["losses"])),
        "own_mean_nll": float(own.mean()),
        "check": {"error": error, "tolerance": LOSS_OF_MINI_BATCH},
    }


def in_child(job: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """The result of a process that imports JAX; raises Unavailable with its last words where it fails."""
    try:
        child = subprocess.run(
            [sys.executable, CHILD], input=json.dumps(job), capture_output=True, text=True,
            env=os.environ | environment(device), timeout=SECONDS,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        raise Unavailable(f"it took more than {SECONDS:.0f} s") from None
    if child.returncode < 0:
        raise Unavailable(f"it was ended by {signal.Signals(-child.returncode).name}")
    if child.returncode > 0:
        words = (child.stderr.strip().splitlines() or ["no word"])[-1]
        raise Unavailable(f"it ended with status {child.returncode}: {words[:200]}")
    found: dict[str, Any] = json.loads(child.stdout)
    if "ways" not in found:
        raise Unavailable(f"it could not run: {found['reason']}")
    return found


def environment(device: torch.device) -> dict[str, str]:
    """Variables that give JAX this device and no other."""
    if device.type != "cuda":
        return {"JAX_PLATFORMS": device.type}
    index = device.index or 0
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return {
        "JAX_PLATFORMS": "cuda",
        "CUDA_VISIBLE_DEVICES": str(index) if visible is None else visible.split(",")[index],
        # This process has memory there too.
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
    }


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
