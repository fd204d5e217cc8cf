"""All that a model remembers of what it has read: fast weights, attention windows, pending tokens."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from engine.files import atomic_write
from engine.inner import FastWeights, Forward
from engine.weights import Fast, initial_fast
from engine.window import Window

if TYPE_CHECKING:
    from engine.decode import Decoding
    from engine.model import TTTModel

_FORMAT = "ttt-state-1"
SLAB = 2048
"""Tokens that the prefix blocks take at once, as far as whole mini-batches fit."""


class State:
    """What a batch of B sequences has read so far, in memory that does not depend on how much that was.

    Attributes:
        position: (B,) int64, tokens read by each sequence; they advance together.
        fast: fp32 fast weights of every suffix block and their copies in the compute dtype.
        prefix, suffix: the attention windows of the blocks.
        pending_tokens: (B, n) int64, tokens of the current mini-batch, n at most its size.
        pending_hidden: (B, n, d), the prefix blocks' outputs for them.
        last_hidden: (B, d), the output of the final norm at the newest token, or None before the first.
        read: intermediates of a mini-batch that was read whole and waits for its last target, so that they need
            not be computed again; None otherwise. Not saved.
        decoding: how its tokens are read one by one. Not saved.
    """

    def __init__(self, model: TTTModel, batch_size: int, *, roomy: bool = False) -> None:
        """`roomy`: windows with so much memory that what they keep is seldom moved, and never onto itself."""
        self._model = model
        self._batch_size = batch_size
        self._roomy = roomy
        self.reset()

    @torch.no_grad()
    def reset(self) -> None:
        """Back to having read nothing."""
        config, device = self._model.config, self._model.final_norm.device
        like = torch.empty(0, dtype=config.torch_dtype, device=device)
        masters = tuple(
            (g.clone(memory_format=torch.contiguous_format), u.clone(memory_format=torch.contiguous_format),
             d.clone(memory_format=torch.contiguous_format))
            for g, u, d in initial_fast(self._model, self._batch_size)
        )  # fmt: skip
        self.fast = FastWeights.of(masters, config)
        size = config.mini_batch_size

        def window(slack: int, behind: int) -> Window:
            keep = None if config.window is None else config.window - 1 + behind
            if self._roomy and keep is not None:
                slack *= 1 + -(-keep // slack)
            return Window(self._batch_size, config.num_heads, config.head_dim, keep, slack, like)

        self.prefix = [window(self.slab, 0) for _ in range(config.prefix_layers)]
        # The inner step reads its whole mini-batch again, so the keys before it must still be there then.
        self.suffix = [window(size, size) for _ in range(config.suffix_layers)]
        self.position = torch.zeros(self._batch_size, dtype=torch.int64)
        self._tokens = torch.zeros(self._batch_size, size, dtype=torch.int64, device=device)
        self._hidden = like.new_zeros(self._batch_size, size, config.hidden_size)
        self._pending = 0
        self.last_hidden: Tensor | None = None
        self.read: Forward | None = None
        self.decoding: Decoding | None = None

    @property
    def model(self) -> TTTModel:
        """The model that this state belongs to."""
        return self._model

    @property
    def batch_size(self) -> int:
        """B."""
        return self._batch_size

    @property
    def slab(self) -> int:
        """Tokens that the prefix blocks take at once."""
        size = self._model.config.mini_batch_size
        return max(size, SLAB // self._batch_size // size * size)

    @property
    def tokens_read(self) -> int:
        """Tokens read by each sequence."""
        return int(self.position[0])

    @property
    def pending(self) -> int:
        """n, how many tokens of the current mini-batch have been read."""
        return self._pending

    @property
    def pending_tokens(self) -> Tensor:
        """See the class."""
        return self._tokens[:, : self._pending]

    @property
    def pending_hidden(self) -> Tensor:
        """See the class."""
        return self._hidden[:, : self._pending]

    def add_pending(self, tokens: Tensor, hidden: Tensor) -> None:
        """Appends tokens (B, n) and their prefix outputs (B, n, d) to the current mini-batch."""
        end = self._pending + tokens.shape[1]
        self._tokens[:, self._pending : end] = tokens
        self._hidden[:, self._pending : end] = hidden
        self._pending = end

    def clear_pending(self) -> None:
        """The current mini-batch is over."""
        self._pending = 0
        self.read = None

    def advance(self, tokens: int) -> None:
        """Counts tokens as read."""
        self.position += tokens

    def fast_weights(self) -> Fast:
        """(gate, up, down) of every suffix block, fp32, (B, ...) each."""
        return self.fast.masters

    def num_bytes(self) -> int:
        """Bytes of all its tensors."""
        tensors = [t for w in (*self.prefix, *self.suffix) for t in (w.k, w.v)]
        tensors += [t for block in (*self.fast.masters, *self.fast.copies) for t in block]
        tensors += [self._tokens, self._hidden, self.position]
        tensors += [] if self.last_hidden is None else [self.last_hidden]
        unique = {t.data_ptr(): t.numel() * t.element_size() for t in tensors}
        return sum(unique.values())

    def copy_from(self, other: State) -> None:
        """Takes over all that another state of the same model and batch size has read, into its own memory."""
        for mine, theirs in zip(self._fast_tensors(), other._fast_tensors(), strict=True):
            mine.copy_(theirs)
        self._pending = other._pending
        windows = zip((*self.prefix, *self.suffix), (*other.prefix, *other.suffix), strict=True)
        for window, source in windows:
            window.copy_from(source, self._pending)
        self.position.copy_(other.position)
        self.pending_tokens.copy_(other.pending_tokens)
        self.pending_hidden.copy_(other.pending_hidden)
        self.last_hidden = None if other.last_hidden is None else other.last_hidden.clone()
        # Its intermediates are views of the other's windows; they are computed again when they are needed.
        self.read = None

    def _fast_tensors(self) -> list[Tensor]:
        """Masters, and the copies where they are not the masters themselves."""
        versions = (self.fast.masters,) if self.fast.copies is self.fast.masters else self.fast
        return [t for fast in versions for block in fast for t in block]

    def clone(self) -> State:
        """An independent copy."""
        other = object.__new__(State)
        other._model, other._batch_size, other._roomy = self._model, self._batch_size, self._roomy
        masters = tuple((g.clone(), u.clone(), d.clone()) for g, u, d in self.fast.masters)
        other.fast = FastWeights.of(masters, self._model.config)
        other.prefix = [w.clone() for w in self.prefix]
        other.suffix = [w.clone() for w in self.suffix]
        other.position = self.position.clone()
        other._tokens, other._hidden = self._tokens.clone(), self._hidden.clone()
        other._pending = self._pending
        other.last_hidden = None if self.last_hidden is None else self.last_hidden.clone()
        # Its intermediates are views of this state's windows; the copy computes them again when they are needed.
        other.read = None
        other.decoding = None
        return other

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the state to a safetensors file, whole or not at all.

        The file carries the fingerprint of the model's weights, and is only loaded for a model with the same.
        """
        metadata = {
            "format": _FORMAT,
            "fingerprint": self._model.fingerprint(),
            "batch_size": str(self._batch_size),
            "config": json.dumps(self._model.config.to_dict(), sort_keys=True),
        }
        tensors = {name: t.contiguous().clone() for name, t in self._tensors().items()}
        with atomic_write(path) as temporary:
            save_file(tensors, temporary, metadata)

    def _tensors(self) -> dict[str, Tensor]:
        tensors = {
            "position": self.position,
            "pending_tokens": self.pending_tokens,
            "pending_hidden": self.pending_hidden,
        }
        if self.last_hidden is not None:
            tensors["last_hidden"] = self.last_hidden
        for kind, windows in (("prefix", self.prefix), ("suffix", self.suffix)):
            for index, window in enumerate(windows):
                tensors[f"{kind}.{index}.k"], tensors[f"{kind}.{index}.v"] = window.valid()
        for index, block in enumerate(self.fast.masters):
            for name, matrix in zip(("gate", "up", "down"), block, strict=True):
                tensors[f"fast.{index}.{name}"] = matrix
        return tensors

    def _restore(self, tensors: dict[str, Tensor]) -> None:
        """Fills a fresh state from `_tensors` of another; raises KeyError, RuntimeError or ValueError."""
        device = self._model.final_norm.device
        expected = set(self._tensors()) | {"last_hidden"}
        if unknown := sorted(set(tensors) - expected):
            raise ValueError(f"unexpected tensors {', '.join(unknown)}")
        self.position.copy_(tensors["position"])
        self.add_pending(tensors["pending_tokens"].to(device), tensors["pending_hidden"].to(device))
        if self.tokens_read:
            shape = (self._batch_size, self._model.config.hidden_size)
            self.last_hidden = tensors["last_hidden"].to(device).reshape(shape).clone()
        for kind, windows in (("prefix", self.prefix), ("suffix", self.suffix)):
            for index, window in enumerate(windows):
                window.extend(
                    tensors[f"{kind}.{index}.k"].to(device), tensors[f"{kind}.{index}.v"].to(device)
                )
        for index, block in enumerate(self.fast.masters):
            for name, matrix in zip(("gate", "up", "down"), block, strict=True):
                saved = tensors[f"fast.{index}.{name}"]
                if saved.shape != matrix.shape:
                    raise ValueError(f"fast.{index}.{name} has shape {tuple(saved.shape)}")
                matrix.copy_(saved)
        self.fast = FastWeights.of(self.fast.masters, self._model.config)


def init_state(model: TTTModel, batch_size: int = 1) -> State:
    """A state for `batch_size` sequences that have read nothing.

    Raises:
        ValueError: batch_size is not a positive integer.
    """
    if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
        raise ValueError(f"init_state: batch_size is {batch_size!r}; accepted are integers of at least 1")
    return State(model, batch_size)


@torch.no_grad()
def load_state(model: TTTModel, path: str | os.PathLike[str]) -> State:
    """Reads what `State.save` wrote.

    Raises:
        ValueError: the file is missing or damaged, is no state, or belongs to other weights.
    """
    if not os.path.isfile(path):
        raise ValueError(f"load_state: {os.fspath(path)!r} is not a file")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"load_state: {os.fspath(path)!r} is damaged or no safetensors file: {error}"
        ) from error
    if metadata.get("format") != _FORMAT:
        raise ValueError(f"load_state: {os.fspath(path)!r} holds no state of this format ({_FORMAT})")
    if metadata.get("fingerprint") != model.fingerprint():
        config = json.loads(metadata.get("config", "{}"))
        raise ValueError(
            f"load_state: {os.fspath(path)!r} belongs to a model with other weights or configuration "
            f"({config.get('name')!r}, fingerprint {metadata.get('fingerprint', '')[:12]}) than this one "
            f"({model.config.name!r}, {model.fingerprint()[:12]})"
        )
    try:
        state = State(model, int(metadata["batch_size"]))
        state._restore(tensors)
    except (KeyError, RuntimeError, ValueError) as error:
        raise ValueError(f"load_state: {os.fspath(path)!r} does not fit: {error}") from error
    return state
