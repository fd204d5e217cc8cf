"""Golden cases: small runs of the official JAX implementation, read in this package's layout.

Each file holds a token stream, random weights, and all that the official code computed from them. Its weights
are (in, out) and stacked over blocks, with q, k and v apart; w1, w3 and w2 are an MLP's gate, up and down
projections.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import safe_open
from torch import Tensor

from engine.config import TTTConfig
from engine.weights import Fast

_BLOCKS = "language_model.model.h.blocks."
_PRIME = "language_model.model.h.prime_storage."
_FAST = "language_model.model.h.suffix_blocks.feed_forward_prime."
# Ours: theirs. Those that are not norms are transposed; w_qkv is put together from three.
_BLOCK_NAMES = {
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
_PRIME_NAMES = {
    "fast_norm": "ffn_prime_norm",
    "fast_gate": "feed_forward_prime.w1",
    "fast_up": "feed_forward_prime.w3",
    "fast_down": "feed_forward_prime.w2",
    "fast_post_norm": "ffn_prime_post_norm",
}
_COMPUTE_DTYPES = {"fp32": "float32", "bf16": "bfloat16"}


@dataclass(frozen=True)
class GoldenCase:
    """One golden file. All tensors are fp32 on the CPU unless said otherwise; T tokens are predicted, b a
    step.

    What the inner loop alone computes (`prefix_output` and below) is None in a case without fast MLPs.
    """

    path: Path
    config: TTTConfig
    step: int
    """The outer training step, for the warm-up of the inner rate."""
    tokens: Tensor
    """(1, T+1) int64."""
    weights: dict[str, Tensor]
    """A state dict of `TTTModel`."""
    loss: Tensor
    """0-dim."""
    nll: Tensor
    """(1, T), of every target."""
    meta_grads: dict[str, Tensor]
    """Gradient of `loss` with respect to every one of `weights`, under the same names."""
    prefix_output: Tensor | None
    """(1, T, d), what comes out of the blocks without fast MLPs."""
    inner_norms: Tensor | None
    """(1, T/b), global norms of the inner gradients before clipping."""
    inner_grads: tuple[Fast, ...] | None
    """Of the first two steps, before clipping."""
    final_fast: Fast | None
    """The fast weights after the whole stream."""


def carried_cases() -> list[Path]:
    """The small golden files that come with the package."""
    return sorted((Path(__file__).parent / "cases").glob("*.safetensors"))


def load_golden(path: str | os.PathLike[str]) -> GoldenCase:
    """Reads a golden file; `ValueError` says what is wrong where it is missing, damaged or not golden."""
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: there is no such file")
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
        return _case(path, json.loads(metadata["config"]), tensors)
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged or not a safetensors file: {error}") from error
    except KeyError as error:
        raise ValueError(f"{path} is not a golden case: it has no {error.args[0]}") from error
    except ValueError as error:
        raise ValueError(f"{path} is not a golden case: {error}") from error


def _case(path: Path, values: Mapping[str, Any], tensors: dict[str, Tensor]) -> GoldenCase:
    config = _config(values)
    meta = config.suffix_layers > 0
    steps = [_fast(config, tensors, f"inner_grad_step{step}/") for step in range(2)] if meta else []
    return GoldenCase(
        path=path,
        config=config,
        step=int(values["step"]),
        tokens=tensors["tokens"].long()[None],
        weights=_state_dict(config, tensors, "params/"),
        loss=tensors["loss"][0],
        nll=tensors["metrics/token_nll_loss"][None],
        meta_grads=_state_dict(config, tensors, "meta_grad/"),
        prefix_output=tensors["prefix_output"][None] if meta else None,
        inner_norms=tensors["inner_grad_norm"][None] if meta else None,
        inner_grads=tuple(steps) if meta else None,
        final_fast=_fast(config, tensors, "final_fast/") if meta else None,
    )


def _config(values: Mapping[str, Any]) -> TTTConfig:
    for key, only in (("qk_norm", True), ("pre_norm", True), ("post_norm", True)):
        if values[key] is not only:
            raise ValueError(f"{key}={values[key]!r}; this model always has it")
    meta = {"meta": True, "pretrain": False}[values["train_mode"]]
    return TTTConfig(
        name=values["name"],
        vocab_size=values["vocab_size"],
        hidden_size=values["hidden_size"],
        intermediate_size=values["intermediate_size"],
        num_layers=values["num_hidden_layers"],
        num_heads=values["num_attention_heads"],
        suffix_layers=values["suffix_len"] if meta else 0,
        mini_batch_size=values["mini_batch_size"],
        window=None if values["seq_modeling_block"] == "self_attention" else values["sliding_window_size"],
        rope_theta=values["rope_theta"],
        inner_lr=values["inner_lr"],
        inner_clip=values["inner_clip"],
        ilr_init=values["ilr_init"],
        ilr_warmup_steps=values["ilr_warmup_steps"],
        bos_token_id=values["bos_token_id"],
        norm_eps=values["rms_norm_eps"],
        tie_embeddings=values["tie_word_embeddings"],
        compute_dtype=_COMPUTE_DTYPES[values["compute_dtype"]],
    )


def _state_dict(config: TTTConfig, tensors: dict[str, Tensor], group: str) -> dict[str, Tensor]:
    def transposed(name: str) -> Tensor:
        weight = tensors[f"{group}{name}.weight"]
        return weight.mT if weight.ndim == 3 else weight

    ours = {
        "embed.weight": tensors[f"{group}language_model.model.wte.weight"],
        "final_norm": tensors[f"{group}language_model.model.ln_f.weight"],
    }
    if not config.tie_embeddings:
        ours["head.weight"] = tensors[f"{group}language_model.lm_head.weight"].mT.contiguous()
    blocks = {name: transposed(_BLOCKS + theirs) for name, theirs in _BLOCK_NAMES.items()}
    blocks["w_qkv"] = torch.cat(
        [transposed(f"{_BLOCKS}seq_modeling_block.{w}") for w in ("wq", "wk", "wv")], dim=1
    )
    for name, stacked in blocks.items():
        for index, weight in enumerate(stacked):
            ours[f"blocks.{index}.{name}"] = weight.contiguous()
    for name, theirs in _PRIME_NAMES.items() if config.suffix_layers else ():
        for index, weight in enumerate(transposed(_PRIME + theirs), config.prefix_layers):
            ours[f"blocks.{index}.{name}"] = weight.contiguous()
    return ours


def _fast(config: TTTConfig, tensors: dict[str, Tensor], group: str) -> Fast:
    gate, up, down = (tensors[f"{group}{_FAST}{name}.weight"].mT for name in ("w1", "w3", "w2"))
    return tuple((gate[i, None], up[i, None], down[i, None]) for i in range(config.suffix_layers))
