"""bench/gpu.py's training steps: how many sequences at a time, what is computed again, and whether they are right."""

import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from gpu_runs import SMALL, recorded_by, small

from bench import (
    gpu_prefill,
    gpu_train,
)
from bench.gpu_checks import CPU
from bench.gpu_context import Context, Wrong, random_model
from bench.gpu_train import engine_loss, step
from bench.gpu_transformer import Attention, Transformer
from bench.memory import PeakMemory, parameter_bytes
from engine import TTTConfig, TTTModel
from engine import config as configs
from engine.training import trial
from ttt_kernels.registry import OPERATORS


def test_a_batch_is_accumulated_of_what_fits() -> None:
    """Without memory for two sequences they come one by one."""
    config = small()
    context = Context(CPU, "float32")
    for needed, size in ((1.0, 4), (1e18, 1)):
        model = random_model(config, torch.float32, CPU)
        found = step(context, model, engine_loss(model), 32, 128, needed, lambda part: None)
        assert (found["micro_batch"], found["micro_batches"]) == (size, 4 // size)
        assert found["tokens"] == 128


@pytest.mark.parametrize(("kind", "enough"), [("ttt", 4), ("full_attention", 1)])
@pytest.mark.parametrize(
    ("room", "fails", "expected"),
    [(1.01, False, {False}), (0.99, False, {True}), (1.01, True, {False, True})],
)
def test_nothing_is_computed_again_where_enough_sequences_fit(
    kind: str, enough: int, room: float, fails: bool, expected: set[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As many as make large products; where it does not fit, or proves not to, what is spared is computed again."""
    monkeypatch.setitem(configs._PRESETS, "small", SMALL)
    monkeypatch.setattr(gpu_train, "checked", lambda *_: {})
    tried: list[tuple[bool, int]] = []
    usual, loss = TTTModel.loss, Transformer.loss

    def own(self: TTTModel, tokens: torch.Tensor, *, checkpoint_blocks: bool) -> Any:
        tried.append((checkpoint_blocks, len(tokens)))
        if fails and not checkpoint_blocks:
            raise torch.OutOfMemoryError
        return usual(self, tokens, checkpoint_blocks=checkpoint_blocks)

    def other(self: Transformer, tokens: torch.Tensor, *, recompute: bool, **more: Any) -> torch.Tensor:
        tried.append((recompute, len(tokens)))
        if fails and not recompute:
            raise torch.OutOfMemoryError
        return loss(self, tokens, recompute=recompute, **more)

    monkeypatch.setattr(TTTModel, "loss", own)
    monkeypatch.setattr(Transformer, "loss", other)
    config = TTTConfig.preset("small", compute_dtype="float32")
    of_one = gpu_train.ttt_bytes(config, 32, recompute=False)
    if kind == "full_attention":
        of_one = gpu_train.full_attention_bytes(config.as_full_attention(32), 32, recompute=False)
    free = room * enough * of_one / gpu_train.SHARE_OF_MEMORY
    monkeypatch.setattr(gpu_train, "_free", lambda *_: free)
    found = getattr(gpu_train, kind)(Context(CPU, "float32"), "small", 32, 8 * 32)
    assert {again for again, _ in tried} == expected
    assert found["recompute"].startswith("all" if True in expected else "nothing")
    assert all(rows >= enough for again, rows in tried if not again)


@pytest.mark.parametrize(("room", "expected"), [(1.01, "nothing"), (0.99, "all")])
def test_a_sequence_is_learnt_from_as_a_longer_one(
    room: float, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One at a time although all fit, and computed again what has to be of the longer one."""
    monkeypatch.setitem(configs._PRESETS, "small", SMALL)
    monkeypatch.setattr(gpu_train, "checked", lambda *_: {})
    config = TTTConfig.preset("small", compute_dtype="float32")
    free = room * gpu_train.ttt_bytes(config, 128, recompute=False) / gpu_train.SHARE_OF_MEMORY
    monkeypatch.setattr(gpu_train, "_free", lambda *_: free)
    found = gpu_train.ttt(Context(CPU, "float32"), "small", 32, 128, as_of=128)
    assert (found["micro_batch"], found["micro_batches"], found["tokens"]) == (1, 4, 128)
    assert found["recompute"].startswith(expected)


@pytest.mark.usefixtures("one_thread")
def test_every_kernel_of_a_model_is_compiled_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a call's arguments those that are missing, and what is wanted, are compiled in."""
    monkeypatch.setitem(
        configs._PRESETS, "small", SMALL | {"num_layers": 4, "suffix_layers": 2, "window": 32}
    )
    calls: set[Any] = set()

    def known(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return value.dtype, value.dim(), value.shape[1] % 16 if value.dim() == 4 else None
        if isinstance(value, list | tuple):
            return tuple(map(known, value))
        return value if isinstance(value, bool) else type(value)

    for name, op in OPERATORS.items():
        for order, kernel in op.kernels["cpu"].items():

            def told(*given: Any, what: Any = (name, order), kernel: Any = kernel) -> Any:
                calls.add((what, *map(known, given)))
                return kernel(*given)

            monkeypatch.setitem(op.kernels["cpu"], order, told)
    context = Context(CPU, "float32")
    gpu_train.compile_models(context, "small")
    compiled = set(calls)
    calls.clear()
    gpu_train.ttt(context, "small", 96, 192)
    gpu_prefill.ttt(context, "small", 96)
    assert len(calls) > len(OPERATORS)
    assert calls <= compiled


@pytest.mark.usefixtures("one_thread")
def test_gradients_of_replays_are_checked_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Recordings whose replay gives something else than what was recorded."""
    wrong = False

    def run(self: Any, lane: Any, key: tuple[Any, ...], work: Callable[[], None]) -> None:
        work()
        if wrong and key in self._replays and key[0] == "back":
            self.d_x *= 1.1
        self._replays[key] = work

    recorded_by(monkeypatch, run)
    assert gpu_train.checked(Context(CPU, "float32"), small(), engine_loss)["error"] < 1e-4
    wrong = True
    with pytest.raises(Wrong, match="gradients are off"):
        gpu_train.checked(Context(CPU, "float32"), small(), engine_loss)


def test_what_does_not_fit_is_gone_before_less_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    """While an error is handled, its traceback holds all that the failed step had."""
    config = small()
    model = random_model(config, torch.float32, CPU)
    held: list[weakref.ref[torch.Tensor]] = []
    left: list[bool] = []

    def loss(tokens: torch.Tensor) -> torch.Tensor:
        large = torch.zeros(3)
        held.append(weakref.ref(large))
        if len(tokens) > 1:
            raise torch.OutOfMemoryError
        return engine_loss(model)(tokens) + large.sum()

    def note(device: torch.device) -> None:
        left.append(any(tensor() is not None for tensor in held))

    monkeypatch.setattr(gpu_train, "release_memory", note)
    assert step(Context(CPU, "float32"), model, loss, 32, 64, 1.0, lambda part: None)["micro_batch"] == 1
    assert len(held) == 3
    assert len(left) == 4
    assert not any(left)


def test_full_attention_is_warmed_up_at_its_full_length(monkeypatch: pytest.MonkeyPatch) -> None:
    """By one block and the head; and values lie in memory as they do in the model."""
    monkeypatch.setitem(configs._PRESETS, "small", SMALL)
    monkeypatch.setattr(gpu_train, "checked", lambda *_: {})
    calls: list[tuple[int | None, int, bool]] = []
    strides: set[tuple[Any, ...]] = set()
    usual, attend = Transformer.loss, Attention.__call__

    def loss(self: Transformer, tokens: torch.Tensor, *, recompute: bool, blocks: int | None = None) -> Any:
        calls.append((blocks, tokens.shape[1] - 1, torch.is_grad_enabled()))
        return usual(self, tokens, recompute=recompute, blocks=blocks)

    def attended(self: Attention, *given: torch.Tensor) -> torch.Tensor:
        strides.add(tuple(t.stride() for t in given))
        return attend(self, *given)

    monkeypatch.setattr(Transformer, "loss", loss)
    monkeypatch.setattr(Attention, "__call__", attended)
    gpu_train.full_attention(Context(CPU, "float32"), "small", 64, 64)
    assert calls == [(1, 64, True), (None, 64, True), (None, 64, True)]
    assert len(strides) == 1


def test_what_graphs_keep_counts_as_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of all that was allocated the parameters alone are left out, not what a warm-up has made."""
    cuda = torch.device("cuda", 1)
    segments = [
        {"device": 1, "segment_pool_id": (0, 0), "total_size": 10**9, "allocated_size": 7000},
        {"device": 1, "segment_pool_id": (0, 3), "total_size": 500, "allocated_size": 20},
        {"device": 1, "segment_pool_id": (0, 4), "total_size": 60, "allocated_size": 60},
        {"device": 0, "segment_pool_id": (0, 5), "total_size": 10**8, "allocated_size": 0},
    ]
    monkeypatch.setattr(torch.cuda, "memory_snapshot", lambda: segments)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 7080)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 9000)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: None)
    linear = torch.nn.Linear(5, 10, bias=False, dtype=torch.bfloat16)
    assert PeakMemory(cuda, parameter_bytes(linear)).peak_bytes() == 9000 + 480 - 100
    assert PeakMemory(cuda).peak_bytes() == 9000 + 480 - 7080
    assert trial._peak(cuda) == 9480


def test_parameters_are_shared_by_configurations() -> None:
    context = Context(CPU, "float32")
    config = small().as_full_attention(8192)
    a = context.model(config, torch.float32)
    b = context.model(small().as_full_attention(131072), torch.float32)
    assert b.config.rope_theta != a.config.rope_theta
    assert b.embed.weight.data_ptr() == a.embed.weight.data_ptr()
    assert context.model(small(), torch.float32).embed.weight.data_ptr() != a.embed.weight.data_ptr()
    assert torch.equal(a.final_norm, torch.ones(32))
    assert float(a.blocks[0].w_gate.detach().std()) == pytest.approx(0.02, rel=0.1)
