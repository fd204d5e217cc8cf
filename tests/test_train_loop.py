"""Training from the first step to the last checkpoint: it learns, it resumes to the bit, it stops where it must."""

import json
import math
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from train_runs import run, state

from engine.model import TTTModel
from engine.training import checkpoint
from engine.training.loop import train
from engine.training.options import DatasetOptions
from engine.training.run import Run


def losses(given: Run) -> list[float]:
    lines = (given.log_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))
    return [row["loss"] for row in rows]


def assert_same_bits(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """All six steps at once."""
    whole = run(tmp_path_factory.mktemp("straight"))
    assert train(whole) == 0
    return whole


def test_learns(straight: Run) -> None:
    found = losses(straight)
    assert len(found) == 6
    assert found[0] == pytest.approx(math.log(256), abs=0.2)
    assert found[-1] < found[0] - 0.3


def test_evaluates_and_exports(straight: Run) -> None:
    result = json.loads((straight.log_dir / "evaluation-00000006.json").read_text(encoding="utf-8"))
    assert len(result["nll_by_position"]) == straight.seq_length
    assert result["loss"] == pytest.approx(sum(result["nll_by_position"]) / straight.seq_length, abs=1e-4)
    assert_same_bits(TTTModel.from_pretrained(straight.log_dir / "model").state_dict(), state(straight, 6))


def test_resumes_to_the_bit(straight: Run, tmp_path: Path) -> None:
    assert train(run(tmp_path, break_step=2)) == 0
    assert checkpoint.steps(tmp_path / "checkpoints") == [3]
    assert train(run(tmp_path)) == 0
    assert losses(run(tmp_path)) == losses(straight)
    assert_same_bits(state(run(tmp_path), 6), state(straight, 6))


def test_an_interrupted_run_goes_on(straight: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A signal in the middle of a step: that step is finished and kept."""
    original = TTTModel.loss

    def interrupted(self: TTTModel, tokens: Tensor, step: int | None = None, **options: Any) -> Any:
        if step == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, tokens, step, **options)

    monkeypatch.setattr(TTTModel, "loss", interrupted)
    before = signal.getsignal(signal.SIGTERM)
    assert train(run(tmp_path)) == 130
    assert signal.getsignal(signal.SIGTERM) == before
    assert checkpoint.steps(tmp_path / "checkpoints") == [2]
    monkeypatch.undo()
    assert train(run(tmp_path)) == 0
    assert_same_bits(state(run(tmp_path), 6), state(straight, 6))


def test_accumulation_changes_nothing(straight: Run, tmp_path: Path) -> None:
    assert train(run(tmp_path, accum_steps=4, total_steps=2)) == 0
    assert losses(run(tmp_path)) == pytest.approx(losses(straight)[:2], abs=2e-6)


def test_milestones_stay(tmp_path: Path) -> None:
    train(run(tmp_path, save_milestone_freq=2, total_steps=5))
    assert checkpoint.steps(tmp_path / "checkpoints") == [2, 4, 5]


def test_what_is_not_finite_stops_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = TTTModel.loss

    def broken(self: TTTModel, tokens: Tensor, step: int | None = None, **options: Any) -> Any:
        out = original(self, tokens, step, **options)
        return out._replace(loss=out.loss * math.nan) if step == 3 else out

    monkeypatch.setattr(TTTModel, "loss", broken)
    given = run(tmp_path, save_milestone_freq=2)
    with pytest.raises(ValueError, match=r"step 3: the loss is nan") as error:
        train(given)
    message = str(error.value)
    assert "checkpoint is that of step 2 in " + str(given.checkpoint_dir) in message
    assert "the batch has the sequences [" in message
    # The parameters of the checkpoint have not seen it.
    assert all(t.isfinite().all() for t in state(given, 2).values())


def test_a_gradient_that_is_not_finite_stops_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engine.training.loop.clip_", lambda *_: torch.tensor(math.inf))
    with pytest.raises(ValueError, match=r"norm inf; .* there is no checkpoint yet"):
        train(run(tmp_path))


def test_extension_takes_parameters_only(straight: Run, tmp_path: Path) -> None:
    """Longer sequences, a schedule of its own, and the parameters of the other run's last checkpoint."""
    longer = run(
        tmp_path,
        load_part="params",
        resume_checkpoint_dir=straight.checkpoint_dir,
        seq_length=2 * straight.seq_length,
        total_steps=1,
    )
    assert train(longer) == 0
    assert losses(longer)[0] < losses(straight)[0] - 0.2


def test_other_data_are_not_gone_on_with(straight: Run, tmp_path: Path) -> None:
    other = run(tmp_path, checkpoint_dir=straight.checkpoint_dir, total_steps=8, seq_length=16)
    with pytest.raises(ValueError, match="seq_length"):
        train(other)


def test_evaluation_alone(straight: Run, tmp_path: Path) -> None:
    only = run(tmp_path, checkpoint_dir=straight.checkpoint_dir, eval_mode=True)
    assert train(only) == 0
    name = "evaluation-00000006.json"
    found, expected = (json.loads((r.log_dir / name).read_text()) for r in (only, straight))
    assert found["nll_by_position"] == expected["nll_by_position"]
    with pytest.raises(ValueError, match="there is no checkpoint in"):
        train(run(tmp_path, eval_mode=True))


def test_evaluation_takes_no_more_at_a_time_than_a_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that what had memory enough to train has enough to be evaluated; nor are the last gradients kept."""
    original = TTTModel.loss
    seen = []

    def watched(self: TTTModel, tokens: Tensor, step: int | None = None, **options: Any) -> Any:
        if step is None:
            seen.append((len(tokens), [p.grad for p in self.parameters() if p.grad is not None]))
        return original(self, tokens, step, **options)

    monkeypatch.setattr(TTTModel, "loss", watched)
    assert train(run(tmp_path, total_steps=1, accum_steps=2)) == 0
    assert seen
    assert all(shown == (2, []) for shown in seen)
    seen.clear()
    assert train(run(tmp_path, total_steps=1, eval_batch_size=1)) == 0
    assert {rows for rows, _ in seen} == {1}


def test_wrong_input(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"training\.global_batch_size=4 .*accum_steps=3"):
        train(run(tmp_path, accum_steps=3))
    with pytest.raises(ValueError, match="there is no checkpoint in"):
        train(run(tmp_path, load_part="params", resume_checkpoint_dir=tmp_path / "nothing"))
    dataset = DatasetOptions("text", tmp_path / "nowhere", "train", "val", None, False)
    with pytest.raises(ValueError, match="nowhere"):
        train(run(tmp_path, dataset=dataset))


def test_random_tokens(tmp_path: Path) -> None:
    """Enough for a trial: no data are needed."""
    dataset = DatasetOptions("dummy", None, "train", "val", None, True)
    given = run(tmp_path, dataset=dataset, total_steps=1)
    assert train(given) == 0
    assert losses(given)[0] == pytest.approx(math.log(256), abs=0.2)
    result = json.loads((given.log_dir / "evaluation-00000001.json").read_text(encoding="utf-8"))
    assert result["sequences"] == 8
