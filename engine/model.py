"""The model: its parameters, and thin methods over what the other modules do with them."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Self

import torch
from torch import Tensor, nn

from engine.config import DTYPES, TTTConfig

if TYPE_CHECKING:
    from engine.loss import LossOutput, Method
    from engine.prefill import PrefillOutput
    from engine.state import State

INIT_STD = 0.02
FAST_MATRICES = ("fast_gate", "fast_up", "fast_down")


_Key = tuple[tuple[nn.Parameter, int, int], ...]


class Weight(nn.Module):
    """A single matrix under the name `weight`: the embedding (V, d) or the untied head (V, d)."""

    def __init__(
        self, rows: int, columns: int, dtype: torch.dtype, device: torch.device | str | None
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(rows, columns, dtype=dtype, device=device))


class Block(nn.Module):
    """The parameters of one block; `has_fast` says whether it is one of the last, with a fast MLP.

    Matrices are (out, in). `w_qkv` (3d, d) holds the rows of q, k and v in this order, heads of D rows each.
    Norms and fast matrices are kept in at least fp32 whatever `dtype` is, since the inner loop updates in
    fp32.
    """

    fast_norm: nn.Parameter
    fast_gate: nn.Parameter
    fast_up: nn.Parameter
    fast_down: nn.Parameter
    fast_post_norm: nn.Parameter

    def __init__(
        self, config: TTTConfig, has_fast: bool, dtype: torch.dtype, device: torch.device | str | None
    ) -> None:
        super().__init__()
        self.has_fast = has_fast
        master = torch.promote_types(dtype, torch.float32)

        def parameter(*shape: int, dtype: torch.dtype = master) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape, dtype=dtype, device=device))

        d, i = config.hidden_size, config.intermediate_size
        self.seq_norm = parameter(d)
        self.w_qkv = parameter(3 * d, d, dtype=dtype)
        self.q_norm = parameter(config.head_dim)
        self.k_norm = parameter(config.head_dim)
        self.w_o = parameter(d, d, dtype=dtype)
        self.seq_post_norm = parameter(d)
        if has_fast:
            self.fast_norm = parameter(d)
            self.fast_gate = parameter(i, d)
            self.fast_up = parameter(i, d)
            self.fast_down = parameter(d, i)
            self.fast_post_norm = parameter(d)
        self.mlp_norm = parameter(d)
        self.w_gate = parameter(i, d, dtype=dtype)
        self.w_up = parameter(i, d, dtype=dtype)
        self.w_down = parameter(d, i, dtype=dtype)
        self.mlp_post_norm = parameter(d)


class TTTModel(nn.Module):
    """A TTT-E2E model (arXiv 2512.23675), or a plain Transformer where `config.suffix_layers` is 0.

    `dtype` is that in which embeddings and matrices are stored; norms and fast matrices are float32 always
    (float64 with `dtype=torch.float64`), so choose it here or in `from_pretrained`, not by `.to(dtype)`. What
    activations and products are computed in is `config.compute_dtype`. The initial weights depend on
    `config`, `dtype` and `seed` only, not on the device; on the `meta` device there are none.

    Raises `ValueError` for a `dtype` that is not float32, bfloat16, float16 or float64.
    """

    def __init__(
        self,
        config: TTTConfig,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if dtype not in DTYPES.values():
            raise ValueError(f"dtype={dtype} is not accepted: it must be one of " + ", ".join(DTYPES))
        self.config = config
        self.embed = Weight(config.vocab_size, config.hidden_size, dtype, device)
        self.blocks = nn.ModuleList(
            Block(config, index >= config.prefix_layers, dtype, device) for index in range(config.num_layers)
        )
        self.final_norm = nn.Parameter(
            torch.empty(config.hidden_size, dtype=torch.promote_types(dtype, torch.float32), device=device)
        )
        if not config.tie_embeddings:
            self.head = Weight(config.vocab_size, config.hidden_size, dtype, device)
        self._fingerprint: tuple[TTTConfig, _Key, str] | None = None
        if not self.final_norm.is_meta:
            self._initialize(seed)

    @property
    def head_weight(self) -> Tensor:
        """The output head's matrix, (V, d); the embedding's where the two are tied."""
        return self.embed.weight if self.config.tie_embeddings else self.head.weight

    @property
    def num_parameters(self) -> int:
        """How many numbers the model has, those of its fast MLPs included; tied embeddings count once."""
        return sum(parameter.numel() for parameter in self.parameters())

    def loss(
        self,
        tokens: Tensor,
        step: int | None = None,
        *,
        backend: str | None = None,
        method: Method = "rollback",
        snapshot_every: int = 16,
        truncate_steps: int | None = None,
        checkpoint_blocks: bool = True,
    ) -> LossOutput:
        """The meta-objective over `tokens`: differentiable `loss` (0-dim) and `nll` (B, T), the latter unmasked.

        The loss is the mean over mini-batches of the mean of their counted targets before the inner step (section
        2.2 of arXiv 2512.23675); its gradient goes through every step, clipping included.

        Args:
            tokens: (B, T + 1) int64, T a multiple of the mini-batch size (any T without fast weights).
            step: the outer training step, for the warm-up of the inner rate; None (evaluation) is full rate.
            backend: None for the best that can run, or a backend's name.
            method: how the gradient gets at the fast weights of every step: "rollback" rolls them backwards by the
                factors of every step's gradient; "snapshots" keeps the whole state at every `snapshot_every`-th step
                and reads the stretch after it again, which it takes back by rollback; "graph" keeps all that was
                computed.
            snapshot_every: inner steps of such a stretch. Shorter sequences are taken back by rollback alone.
            truncate_steps: the gradient does not go from one stretch of so many inner steps to the stretch before
                through the fast weights (it does through attention); None: all the way.
            checkpoint_blocks: keep only their inputs of the blocks before the fast ones, and compute them again, a
                window's worth of tokens at a time.

        Raises:
            ValueError: unsuitable tokens, a negative step, an unknown method, or a backend that cannot serve.
        """
        from engine.loss import loss

        return loss(
            self,
            tokens,
            step,
            backend=backend,
            method=method,
            snapshot_every=snapshot_every,
            truncate_steps=truncate_steps,
            checkpoint_blocks=checkpoint_blocks,
        )

    def init_state(self, batch_size: int = 1) -> State:
        """The state of `batch_size` sequences of which nothing has been read yet."""
        from engine.state import init_state

        return init_state(self, batch_size)

    def load_state(self, path: str | os.PathLike[str]) -> State:
        """The state that `State.save` wrote to `path`, if it was one of this model; else a `ValueError`."""
        from engine.state import load_state

        return load_state(self, path)

    def prefill(self, tokens: Tensor, state: State, *, backend: str | None = None) -> PrefillOutput:
        """Reads `tokens` (B, T) int64 into `state`, in place; builds no graph.

        Returns `nll` (B, T) fp32, in nats, of every token given all that the state has read before it (NaN
        for the very first), and `logits` (B, V) for the token that comes next.
        """
        from engine.prefill import prefill

        return prefill(self, tokens, state, backend=backend)

    def decode(self, token: Tensor, state: State, *, backend: str | None = None) -> Tensor:
        """Reads one `token` (B,) int64 per sequence into `state`, in place; returns the next one's logits (B,
        V).
        """
        from engine.decode import decode

        return decode(self, token, state, backend=backend)

    def generate(
        self,
        prompt: Tensor | Sequence[int],
        *,
        max_new_tokens: int = 64,
        temperature: float = 0.8,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int | None = None,
        stop_token: int | None = None,
        state: State | None = None,
        backend: str | None = None,
    ) -> Tensor:
        """Up to `max_new_tokens` tokens, int64 (B, n), that follow `prompt` (B, T); (n,) for (T,) or a list.

        What is written is learnt from like what is read. `temperature` 0 is greedy; see
        `engine.generate.generate`.
        """
        from engine.generate import generate

        return generate(
            self,
            prompt,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            seed=seed,
            stop_token=stop_token,
            state=state,
            backend=backend,
        )

    def fingerprint(self) -> str:
        """Hex SHA-256 of the configuration and of every weight's name, dtype, shape and bytes.

        Computed again only if the configuration or a parameter was replaced, or a parameter changed in place,
        since the last call; changes through `parameter.data` escape torch's count of changes and so this one.
        """
        parameters = dict(self.named_parameters())
        # Tensors made in inference mode have no count of changes: no caching for them.
        if any(parameter.is_inference() for parameter in parameters.values()):
            return self._hash(parameters)
        # The parameters themselves, so that none can be freed and another take its address.
        key = tuple(
            (parameter, parameter.data_ptr(), parameter._version) for parameter in parameters.values()
        )
        cached = self._fingerprint
        if cached is None or cached[0] != self.config or not _same(cached[1], key):
            cached = self._fingerprint = (self.config, key, self._hash(parameters))
        return cached[2]

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Writes `config.json` and `model.safetensors` into `folder`, which is made if need be; whole or not
        at all.
        """
        from engine.pretrained import save_pretrained

        save_pretrained(self, folder)

    @classmethod
    def from_pretrained(
        cls,
        folder: str | os.PathLike[str],
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> TTTModel:
        """The model that `save_pretrained` wrote to `folder`, or a trained one of the package: "tiny-stdlib".

        `dtype` converts embeddings and matrices; None keeps the stored one. Raises `ValueError` that says
        which file or tensor is missing, damaged or not what the configuration asks for.
        """
        from engine.pretrained import from_pretrained

        return from_pretrained(cls, folder, dtype, device)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # `.to` and its kin put other numbers into the same parameters without counting it as a change.
        self._fingerprint = None
        return super()._apply(fn, recurse)

    def _initialize(self, seed: int) -> None:
        # Drawn on the CPU in fp32, so that a seed gives the same weights on every device and the nearest in
        # every dtype.
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in self.parameters():
                if parameter.ndim == 1:
                    parameter.fill_(1.0)
                else:
                    parameter.copy_(torch.randn(parameter.shape, generator=generator) * INIT_STD)

    def _hash(self, parameters: dict[str, nn.Parameter]) -> str:
        digest = hashlib.sha256(json.dumps(self.config.to_dict(), sort_keys=True).encode())
        for name, parameter in parameters.items():
            digest.update(f"{name} {parameter.dtype} {tuple(parameter.shape)}".encode())
            digest.update(parameter.detach().cpu().contiguous().view(torch.uint8).numpy().data)
        return digest.hexdigest()


def _same(a: _Key, b: _Key) -> bool:
    return len(a) == len(b) and all(x[0] is y[0] and x[1:] == y[1:] for x, y in zip(a, b, strict=True))
