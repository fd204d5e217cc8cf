"""The one description of a model: shapes, window and inner loop, of TTT-E2E and of its two baselines."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, fields, replace
from itertools import pairwise
from typing import Any

import torch

DTYPES: dict[str, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}

# What every published size shares (arXiv 2512.23675): Llama 3's vocabulary and its <|begin_of_text|>.
_PUBLISHED: dict[str, Any] = {
    "vocab_size": 128256,
    "mini_batch_size": 1024,
    "window": 8192,
    "bos_token_id": 128000,
}

_PRESETS: dict[str, dict[str, Any]] = {
    # Bytes, for two cores. Heads of 64 as in 125m, 350m and 1b, so that the same kernels run; a quarter of
    # the blocks with fast MLPs and the window four mini-batches long, so that it behaves as the large ones
    # do; the mini-batch short enough that a page of text takes several inner steps. 384 * (4 + 1) = 480 * 4:
    # exactly the parameters of a Transformer with intermediate size 480 (2.5 hidden sizes; 2.6 to 2.75 in the
    # published ones).
    "tiny": {
        "vocab_size": 256,
        "mini_batch_size": 128,
        "window": 512,
        "bos_token_id": None,
        "hidden_size": 192,
        "intermediate_size": 384,
        "num_layers": 4,
        "num_heads": 3,
        "suffix_layers": 1,
    },
    "125m": _PUBLISHED
    | {"hidden_size": 768, "intermediate_size": 1664, "num_layers": 12, "num_heads": 12, "suffix_layers": 3},
    "350m": _PUBLISHED
    | {"hidden_size": 1024, "intermediate_size": 2304, "num_layers": 24, "num_heads": 16, "suffix_layers": 6},
    "760m": _PUBLISHED
    | {"hidden_size": 1536, "intermediate_size": 3328, "num_layers": 24, "num_heads": 16, "suffix_layers": 6},
    "1b": _PUBLISHED
    | {"hidden_size": 2048, "intermediate_size": 4352, "num_layers": 24, "num_heads": 32, "suffix_layers": 6},
    "3b": _PUBLISHED
    | {"hidden_size": 2560, "intermediate_size": 5632, "num_layers": 32, "num_heads": 32, "suffix_layers": 8},
}

# (layers, layers with fast MLPs, intermediate size) of a published TTT-E2E model: the intermediate size of
# its baselines. Published, so looked up: exact parity would be up to 2 % more.
_BASELINE_INTERMEDIATE = {
    (12, 3, 1664): 2048,
    (24, 6, 2304): 2816,
    (24, 6, 3328): 4096,
    (24, 6, 4352): 5376,
    (32, 8, 5632): 6912,
}

_SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads", "mini_batch_size")

_BASE_THETA = 500_000.0
_THETA_OF_CONTEXT = ((8192, _BASE_THETA), (32768, 2_000_000.0), (131072, 10_000_000.0))


@dataclass(frozen=True)
class TTTConfig:
    """Hyper-parameters of a TTT-E2E model (arXiv 2512.23675) or, with `suffix_layers=0`, of a Transformer.

    Raises `ValueError` for a value that no model can have, naming the field, the value and what is accepted.
    """

    name: str
    vocab_size: int
    hidden_size: int
    """d, the width of the residual stream."""
    intermediate_size: int
    """i, of every MLP, static and fast, in all blocks."""
    num_layers: int
    num_heads: int
    suffix_layers: int
    """S, how many of the last blocks also have a fast MLP; 0: no inner loop."""
    mini_batch_size: int
    """b, tokens per inner step."""
    window: int | None
    """Keys that a query sees, itself included; None: all before it."""
    rope_theta: float = _BASE_THETA
    inner_lr: float = 1.0
    inner_clip: float = 1.0
    """Bound on the global norm of an inner gradient; 0: none."""
    ilr_init: float = 1.0
    """Inner learning rate at which the warm-up over outer steps starts."""
    ilr_warmup_steps: int = 0
    bos_token_id: int | None = None
    """As a target it does not count in the inner loss; None: every target counts."""
    norm_eps: float = 1e-6
    tie_embeddings: bool = True
    compute_dtype: str = "float32"
    """Of activations and matrix products: float32, bfloat16, float16 or float64."""

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name:
            raise _refused("name", self.name, "a non-empty string")
        for field in _SIZES:
            _check_int(field, getattr(self, field), 1)
        _check_int("suffix_layers", self.suffix_layers, 0, self.num_layers)
        _check_int("ilr_warmup_steps", self.ilr_warmup_steps, 0)
        if self.window is not None:
            _check_int("window", self.window, 1, or_none=" or None (full attention)")
        if self.bos_token_id is not None:
            _check_int("bos_token_id", self.bos_token_id, 0, self.vocab_size - 1, or_none=" or None")
        if self.hidden_size % self.num_heads or self.hidden_size // self.num_heads % 2:
            raise _refused("hidden_size", self.hidden_size, f"an even multiple of num_heads={self.num_heads}")
        for field in ("rope_theta", "norm_eps"):
            _check_float(field, getattr(self, field), positive=True)
        for field in ("inner_lr", "inner_clip", "ilr_init"):
            _check_float(field, getattr(self, field), positive=False)
        if not isinstance(self.tie_embeddings, bool):
            raise _refused("tie_embeddings", self.tie_embeddings, "True or False")
        if self.compute_dtype not in DTYPES:
            raise _refused("compute_dtype", self.compute_dtype, "one of " + ", ".join(DTYPES))

    @property
    def head_dim(self) -> int:
        """D, the width of an attention head."""
        return self.hidden_size // self.num_heads

    @property
    def prefix_layers(self) -> int:
        """How many blocks come before the first one with a fast MLP."""
        return self.num_layers - self.suffix_layers

    @property
    def torch_dtype(self) -> torch.dtype:
        """`compute_dtype` as torch names it."""
        return DTYPES[self.compute_dtype]

    @staticmethod
    def presets() -> tuple[str, ...]:
        """The names that `preset` knows, smallest model first."""
        return tuple(_PRESETS)

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> TTTConfig:
        """The configuration published under `name` (or `tiny`), with any fields replaced by `overrides`.

        The presets' inner rate has no warm-up: that of the published pre-training (`ilr_init` 0.1 over the
        first tenth of the steps) belongs to a training run, which sets it by overrides.

        Raises `ValueError` for an unknown name, an unknown field or a value that is not accepted.
        """
        if name not in _PRESETS:
            raise _refused("preset", name, "one of " + ", ".join(_PRESETS))
        return cls.from_dict({"name": name} | _PRESETS[name] | overrides)

    def as_full_attention(self, context: int) -> TTTConfig:
        """The full-attention Transformer that this model is compared with, for sequences of `context` tokens.

        Same width, depth and (nearly) parameters, no fast MLPs, and the rope theta of the published
        baselines: 500K at a context of 8K, 2M at 32K, 10M at 128K, log-linear in the context between,
        constant outside.
        """
        _check_int("context", context, 1)
        return self._baseline("full-attention", window=None, rope_theta=_theta(context))

    def as_sliding_window(self) -> TTTConfig:
        """The sliding-window Transformer that this model is compared with: its window, no fast MLPs.

        Raises `ValueError` if the configuration has no window.
        """
        if self.window is None:
            raise _refused("window", None, "a positive integer, for a sliding-window Transformer")
        return self._baseline("sliding-window", window=self.window, rope_theta=_BASE_THETA)

    def to_dict(self) -> dict[str, Any]:
        """Every field under its name; the values are what JSON can hold."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TTTConfig:
        """The inverse of `to_dict`; fields with a default may be absent.

        Raises `ValueError` for unknown and for missing fields, and for values that are not accepted.
        """
        known = {field.name: field for field in fields(cls)}
        if unknown := [str(key) for key in values if key not in known]:
            raise ValueError(f"unknown config fields: {', '.join(unknown)}; accepted: {', '.join(known)}")
        required = [name for name, field in known.items() if field.default is MISSING]
        if missing := [name for name in required if name not in values]:
            raise ValueError(f"missing config fields: {', '.join(missing)}")
        return cls(**values)

    def _baseline(self, kind: str, *, window: int | None, rope_theta: float) -> TTTConfig:
        shape = (self.num_layers, self.suffix_layers, self.intermediate_size)
        parity = round(self.intermediate_size * (self.num_layers + self.suffix_layers) / self.num_layers)
        return replace(
            self,
            name=f"{self.name}-{kind}",
            intermediate_size=_BASELINE_INTERMEDIATE.get(shape, parity),
            suffix_layers=0,
            window=window,
            rope_theta=rope_theta,
        )


def _theta(context: int) -> float:
    if context <= _THETA_OF_CONTEXT[0][0]:
        return _THETA_OF_CONTEXT[0][1]
    for (short, low), (long, high) in pairwise(_THETA_OF_CONTEXT):
        if context < long:
            return float(low * (high / low) ** (math.log(context / short) / math.log(long / short)))
    return _THETA_OF_CONTEXT[-1][1]


def _refused(field: str, value: object, accepted: str) -> ValueError:
    return ValueError(f"{field}={value!r} is not accepted: it must be {accepted}")


def _check_int(field: str, value: object, low: int, high: int | None = None, or_none: str = "") -> None:
    accepted = f"an integer of at least {low}" if high is None else f"an integer from {low} to {high}"
    if (
        not isinstance(value, int)
        or isinstance(value, bool)
        or value < low
        or (high is not None and value > high)
    ):
        raise _refused(field, value, accepted + or_none)


def _check_float(field: str, value: object, *, positive: bool) -> None:
    number = value if isinstance(value, (int, float)) and not isinstance(value, bool) else math.nan
    if not math.isfinite(number) or number < 0 or (positive and number == 0):
        raise _refused(field, value, "a finite number " + ("above 0" if positive else "of at least 0"))
