"""Keys of the official implementation that do nothing here, or that only one value can have."""

from __future__ import annotations

from typing import Any

from omegaconf import DictConfig, OmegaConf

from engine.training import schema
from engine.training.experiments import FAST_MLPS

# What sets up compilation, memory or parallelism of JAX, and changes no result; and what the
# official implementation does not read either.
_IGNORED = (
    *(f"backend.{name}" for name in schema.Backend.__dataclass_fields__),
    "checkpoint.float_dtype",
    "checkpoint.save_optimizer_state",
    "training.tokenizer_name",
    "training.loader_workers",
    "training.inner_remat_freq",
    "training.n_data_parallel",
    "training.n_state_parallel",
    *(f"model.{name}" for name in schema.Model.__dataclass_fields__ if name.startswith("remat_")),
    "model.unroll_block_scan",
    "model.unroll_inner_scan",
    "model.force_flash",
    "model.seq_len",
    "model.output_size",
)

_IGNORED_WITH_INNER_LOOP = tuple(
    f"training.optimizer_inner.{name}"
    for name in schema.SGD.__dataclass_fields__
    if name not in ("optimizer_type", "lr", "clip_gradient")
)
_IGNORED_WITHOUT_INNER_LOOP = ("training.truncate_steps", "training.method", "model.suffix_len")

_ACCEPTED: dict[str, tuple[Any, ...]] = {
    "training.optimizer_outer.optimizer_type": ("adamw",),
    "training.optimizer_outer.bf16_momentum": (False,),
    "training.spec_outer": (["**"],),
    "model.qk_norm": (True,),
    "model.pre_norm": (True,),
    "model.post_norm": (True,),
    "model.resid_pdrop": (0.0,),
    "model.embd_pdrop": (0.0,),
    "model.attn_pdrop": (0.0,),
    "model.feed_forward_prime": ("swiglu",),
    "model.state_dtype": ("fp32", "float32"),
    "model.initializer_range": (0.02,),
}
_ACCEPTED_WITH_INNER_LOOP: dict[str, tuple[Any, ...]] = {
    "model.prime": (True,),
    "model.seq_modeling_block": ("SWA",),
    "training.spec_inner": ([FAST_MLPS],),
    "training.optimizer_inner.optimizer_type": ("sgd",),
}
_ACCEPTED_WITHOUT_INNER_LOOP: dict[str, tuple[Any, ...]] = {"model.prime": (False,)}


def ignored_keys(cfg: DictConfig) -> list[str]:
    """`KEY=VALUE` of every key that has been set, to something else than its default, and does nothing."""
    defaults = OmegaConf.structured(schema.Config)
    inner_loop = cfg.training.train_mode == "meta"
    keys = _IGNORED + (_IGNORED_WITH_INNER_LOOP if inner_loop else _IGNORED_WITHOUT_INNER_LOOP)
    return [
        f"{key}={value}" for key in keys if (value := _plain(cfg, key)) != OmegaConf.select(defaults, key)
    ]


def refuse_other_results(cfg: DictConfig) -> None:
    """Raises `ValueError` for a value that the official implementation would compute something else by."""
    inner_loop = cfg.training.train_mode == "meta"
    special = _ACCEPTED_WITH_INNER_LOOP if inner_loop else _ACCEPTED_WITHOUT_INNER_LOOP
    for key, accepted in (_ACCEPTED | special).items():
        value = _plain(cfg, key)
        if value not in accepted:
            mode = f" with training.train_mode={cfg.training.train_mode}" if key in special else ""
            listed = " or ".join(map(repr, accepted))
            raise ValueError(f"{key}={value!r} is not accepted{mode}: it must be {listed}")


def _plain(cfg: DictConfig, key: str) -> Any:
    value = OmegaConf.select(cfg, key)
    return OmegaConf.to_container(value) if OmegaConf.is_config(value) else value
