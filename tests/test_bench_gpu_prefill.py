"""bench/gpu.py's reading of models, and the full attention beside it."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from gpu_runs import SMALL, baseline, recorded_by, small

from bench import (
    gpu_prefill,
)
from bench.gpu_checks import CPU
from bench.gpu_context import Context, Wrong, random_model, random_tokens, with_config
from bench.gpu_prefill import checked, same_logits
from bench.gpu_train import gradient_error
from bench.gpu_transformer import Transformer
from engine import TTTConfig, TTTModel, graphs
from engine import config as configs
from engine.prefill import Reader
from engine.recordings import Recordings


def test_the_baseline_is_the_engines_full_attention() -> None:
    config = small().as_full_attention(40)
    context, transformer = Context(CPU, "float32"), baseline(config)
    assert same_logits(context, transformer.model, transformer)["error"] < 1e-5

    def loss(model: TTTModel) -> Any:
        other = Transformer(model, transformer.attention)
        return lambda tokens: other.loss(tokens, recompute=True)

    assert gradient_error(context, config, loss)["green"]
    with torch.no_grad():
        transformer.model.blocks[0].q_norm[0] = 2.0
    broken = Context(CPU, "float32")
    other = with_config(transformer.model, replace(config, norm_eps=0.5))
    with pytest.raises(Wrong, match="off by"):
        same_logits(broken, other, transformer)


def test_what_is_computed_again_is_the_same() -> None:
    config = small().as_full_attention(40)
    gradients = []
    for recompute in (False, True):
        transformer = baseline(config)
        tokens = random_tokens(config, 2, 41, CPU)
        transformer.loss(tokens, recompute=recompute).backward()
        gradients.append([p.grad for p in transformer.model.parameters()])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)


def test_plain_torch_is_the_same_baseline() -> None:
    config = small().as_full_attention(40)
    by_kernels, plain = baseline(config), baseline(config)
    plain._ops = baseline(config, "compiled")._ops
    tokens = random_tokens(config, 1, 33, CPU)
    values = [t.logits(tokens, t.weights()) for t in (by_kernels, plain)]
    torch.testing.assert_close(values[0], values[1])


@pytest.mark.usefixtures("one_thread")
def test_a_wrong_model_is_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    right = TTTModel.prefill

    def wrong(model: Any, tokens: torch.Tensor, state: Any, *, backend: str | None = None) -> Any:
        out = right(model, tokens, state, backend=backend)
        return out._replace(nll=out.nll + 1e-3) if backend is None else out

    context = Context(CPU, "float32")
    model = random_model(small(), torch.float32, CPU)
    assert checked(context, model)["error"] < 2e-5
    monkeypatch.setattr(TTTModel, "prefill", wrong)
    with pytest.raises(Wrong, match="off by"):
        checked(Context(CPU, "float32"), model)


@pytest.mark.usefixtures("one_thread")
def test_what_is_replayed_is_checked_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Recordings whose replay gives something else than what was recorded; as few tokens as for large models."""
    monkeypatch.setattr(gpu_prefill, "CHECK_TOKENS", 1)
    monkeypatch.setattr("engine.state.SLAB", 32)
    model = random_model(small(), torch.float32, CPU)
    kinds: set[Any] = set()
    wrong = [""]

    def run(self: Recordings, lane: Any, key: tuple[Any, ...], work: Callable[[], None]) -> None:
        work()
        if key in self._replays and key[0] == wrong[0]:
            self.nll += 1e-3
        kinds.add(key[0])
        self._replays[key] = work

    recorded_by(monkeypatch, run)
    assert checked(Context(CPU, "float32"), model)["error"] < 2e-5
    for wrong[0] in ("step", "look"):
        with pytest.raises(Wrong, match="off by"):
            checked(Context(CPU, "float32"), model)
    assert kinds == {"prefix", "step", "look"}


def test_nothing_is_recorded_while_a_long_text_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the windows, mini-batches and parts of the model that reads it, whose width changes nothing."""
    usual = TTTConfig.preset("125m")
    narrow = usual.to_dict() | {
        "hidden_size": 8, "intermediate_size": 8, "num_heads": 1, "num_layers": 2, "suffix_layers": 1,
        "vocab_size": 16, "bos_token_id": None,
    }  # fmt: skip
    del narrow["name"]
    monkeypatch.setitem(configs._PRESETS, "narrow", narrow)
    monkeypatch.setattr(gpu_prefill, "checked", lambda context, model: {})
    monkeypatch.setattr(Reader, "logits", lambda self: None)
    part: list[int] = []
    recorded: set[Any] = set()
    late: list[Any] = []

    def run(self: Recordings, lane: Any, key: tuple[Any, ...], work: Callable[[], None]) -> None:
        if key not in recorded and part:
            late.append((len(part), key))
        recorded.add(key)

    def told(work: Callable[[], Any], device: torch.device) -> tuple[Any, float]:
        part.append(0)
        return work(), 1.0

    recorded_by(monkeypatch, run)
    monkeypatch.setattr(gpu_prefill, "timed", told)
    gpu_prefill.long_text(Context(CPU, "float32"), "narrow", 2**20)
    assert len(part) == gpu_prefill.PASSES * gpu_prefill.PARTS
    assert {key[0] for key in recorded} == {"prefix", "step", "look"}
    assert late == []


@pytest.mark.usefixtures("one_thread")
def test_an_interruption_of_a_long_text_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(configs._PRESETS, "small", SMALL)
    calls: list[float] = []

    def told(work: Callable[[], Any], device: torch.device) -> tuple[Any, float]:
        calls.append(100.0 if len(calls) in (3, gpu_prefill.PARTS + 62) else 1.0)
        return work(), calls[-1]

    monkeypatch.setattr(gpu_prefill, "timed", told)
    found = gpu_prefill.long_text(Context(CPU, "float32"), "small", 1024)
    assert max(calls) == 100.0
    assert found["seconds_by_part"] == [1.0] * gpu_prefill.PARTS
    assert found["late_over_early"] == 1.0


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("can", [True, False])
def test_full_attention_is_replayed_where_the_engine_is(can: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Timed without launches; with them where it cannot be recorded."""
    monkeypatch.setitem(configs._PRESETS, "small", SMALL)
    recorded_by(monkeypatch, lambda *_: None)
    done: list[str] = []

    def record(work: Callable[[], None]) -> Callable[[], None]:
        if not can:
            raise RuntimeError("operation not permitted when stream is capturing")
        work()
        return lambda: done.append("replayed")

    lane = graphs.lanes(CPU).main
    lane.record = record  # type: ignore[method-assign]
    usual = Transformer.logits

    def logits(self: Transformer, tokens: torch.Tensor, weights: Any) -> torch.Tensor:
        if tokens.shape[1] == 64:
            done.append("launched")
        return usual(self, tokens, weights)

    monkeypatch.setattr(Transformer, "logits", logits)
    found = gpu_prefill.full_attention(Context(CPU, "float32"), "small", 64)
    runs = len(found["runs"])
    # The warm-up, and the recording.
    assert done == (["launched"] * 2 + ["replayed"] * runs if can else ["launched"] * (1 + runs))


@pytest.mark.usefixtures("one_thread")
def test_nothing_is_recorded_while_reading_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(configs._PRESETS, "small", SMALL)
    timing, late = [False], []

    def run(self: Recordings, lane: Any, key: tuple[Any, ...], work: Callable[[], None]) -> None:
        if key not in self._replays and timing[0]:
            late.append(key)
        self._replays[key] = work
        work()

    def told(work: Callable[[], Any], device: torch.device) -> tuple[Any, float]:
        timing[0] = True
        return work(), 1.0

    recorded_by(monkeypatch, run)
    monkeypatch.setattr(gpu_prefill, "timed", told)
    found = gpu_prefill.ttt(Context(CPU, "float32"), "small", 256)
    assert timing[0]
    assert late == []
    assert found["runs"] == [1.0, 1.0]


@pytest.mark.usefixtures("one_thread")
def test_rounder_products_are_given_what_rounding_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    """The formulas at the model's own dtype are as far off as it says; a few times that is too far."""
    config = small(compute_dtype="bfloat16")
    model = random_model(config, torch.bfloat16, CPU)
    found = checked(Context(CPU, "bfloat16"), model)
    assert found["error"] <= found["tolerance"] < 5 * found["error"]
    right = TTTModel.prefill

    def wrong(model: Any, tokens: torch.Tensor, state: Any, *, backend: str | None = None) -> Any:
        out = right(model, tokens, state, backend=backend)
        return out._replace(nll=out.nll + 2 * found["tolerance"]) if backend is None else out

    monkeypatch.setattr(TTTModel, "prefill", wrong)
    with pytest.raises(Wrong, match="off by"):
        checked(Context(CPU, "bfloat16"), model)
