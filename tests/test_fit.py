"""What `engine fit` predicts: the fastest way that fits, and lengths beyond those that were tried."""

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from train_runs import MODEL, run

from engine.config import TTTConfig
from engine.training.fit import Plan, fit, plans, predicted, rehearsed, trial_lengths
from engine.training.run import Run
from engine.training.trial import Choice, Cost, enough, try_out

MEGABYTE = 2**20


class FakeTrial:
    """Costs by formulas: a graph takes more memory and less time; two sequences at a time pay, four do not.

    What is to be known of snapshots is computed, and never tried of more than one stretch.
    """

    def __init__(self, limit: int = 10**12) -> None:
        self.limit = limit
        self.tried: list[tuple[Choice, int]] = []
        self.passes: list[int] = []

    def __call__(self, run: Run, choice: Choice, length: int, passes: int = 1) -> Cost | None:
        self.tried.append((choice, length))
        self.passes.append(passes)
        weight = {"graph": 4, "rollback": 2}[choice.method] * (1 if choice.checkpoint_blocks else 2)
        peak = 100 * MEGABYTE + choice.rows * length * weight * 1024
        pace = {"graph": 1.0, "rollback": 1.3}[choice.method]
        seconds = length * 1e-3 * pace * {1: 1.0, 2: 1.5, 4: 3.0}[choice.rows]
        return None if peak > self.limit else Cost(peak, seconds, 0.3 * seconds, update=0.25)


def test_takes_the_fastest_that_fits(tmp_path: Path) -> None:
    given = run(tmp_path, global_batch_size=4, seq_length=24)
    every = list(plans(given, 10**12, FakeTrial()))
    assert len({plan.choice for plan in every}) == len(every) == 4 + 2
    # Two at a time pay, four do not.
    assert every[-2].choice == Choice(2, "graph", False)
    assert every[-1].choice == Choice(4, "graph", False)
    best = min(every, key=lambda plan: plan.seconds)
    assert best.choice.rows == 2
    assert best.overrides == "training.accum_steps=2 training.method=graph training.checkpoint_blocks=false"
    assert best.seconds == pytest.approx(2 * 24e-3 * 1.5 + 0.25)


def test_memory_decides(tmp_path: Path) -> None:
    given = run(tmp_path, global_batch_size=4, seq_length=24)
    graph = FakeTrial()(given, Choice(1, "graph", True), 24)
    assert graph is not None
    found = list(plans(given, int((graph.peak - 1) / 0.9), FakeTrial()))
    # The graph was tried, and is not gone on with.
    assert {plan.choice.method for plan in found if plan.choice.rows > 1} == {"rollback"}
    assert not list(plans(given, 10**12, FakeTrial(limit=0)))


def test_what_the_run_fixes_is_not_tried(tmp_path: Path) -> None:
    given = run(tmp_path, method="rollback", checkpoint_blocks=True, global_batch_size=1)
    assert [plan.choice for plan in plans(given, 10**12, FakeTrial())] == [Choice(1, "rollback", True)]
    baseline = replace(given, method="auto", model=replace(given.model, suffix_layers=0))
    assert [plan.choice.method for plan in plans(baseline, 10**12, FakeTrial())] == ["rollback"]


def test_long_sequences_are_extrapolated(tmp_path: Path) -> None:
    config = TTTConfig.preset("tiny")
    given = run(tmp_path, model=config, seq_length=2**17)
    lengths = trial_lengths(given)
    assert lengths == [512 + 128, 4 * (512 + 128)]
    trial = FakeTrial()
    plan = predicted(given, Choice(1, "rollback", True), trial)
    assert plan is not None
    assert [length for _, length in trial.tried] == lengths
    assert plan.seconds == pytest.approx(4 * 2**17 * 1.3e-3 + 0.25)
    assert plan.peak == pytest.approx(100 * MEGABYTE + 2**17 * 2 * 1024, rel=1e-6)
    # What is not longer than the longer of the two is tried itself, and so is full attention.
    assert trial_lengths(replace(given, seq_length=2560)) == [2560]
    assert trial_lengths(replace(given, seq_length=2688)) == lengths
    assert trial_lengths(replace(given, model=config.as_full_attention(2**17))) == [2**17]


def test_snapshots_add_a_reading_and_what_they_keep_to_a_rollback(tmp_path: Path) -> None:
    config = TTTConfig.preset("tiny")
    given = run(tmp_path, model=config, seq_length=2**14)
    trial = FakeTrial()
    found = {plan.choice: plan for plan in plans(given, 10**12, trial) if plan.choice.rows == 1}
    assert len(trial.tried) == len(set(trial.tried))
    assert {choice.method for choice, _ in trial.tried} == {"rollback", "graph"}
    plan = found[Choice(1, "snapshots", True)]
    # Eight stretches of sixteen mini-batches; the last one is read once.
    reading = 1.3e-3 * 0.3 * 7 * 2048
    assert plan.seconds == pytest.approx(4 * (1.3e-3 * 2**14 + reading) + 0.25)
    snapshot = 4 * (3 * 192 * 384 + 2 * 4 * 511 * 192)
    assert plan.peak == pytest.approx(100 * MEGABYTE + 2048 * 2 * 1024 + 7 * snapshot, rel=1e-6)
    assert plan.peak < found[Choice(1, "rollback", True)].peak


class Surprise(FakeTrial):
    """As `FakeTrial`, but a graph takes half as long again as it was predicted to."""

    def __call__(self, run: Run, choice: Choice, length: int, passes: int = 1) -> Cost | None:
        cost = super().__call__(run, choice, length, passes)
        if cost is None or choice.method != "graph":
            return cost
        return replace(cost, seconds=1.5 * cost.seconds, peak=cost.peak + MEGABYTE)


def found_and_rehearsed(given: Run, free: int, trial: FakeTrial) -> tuple[list[Plan], list[Plan]]:
    found = list(plans(given, 10**12, FakeTrial()))
    return found, list(rehearsed(given, free, found, trial))


def test_the_most_promising_is_rehearsed(tmp_path: Path) -> None:
    given = run(tmp_path, model=TTTConfig.preset("tiny"), seq_length=2**14, global_batch_size=4)
    trial = FakeTrial()
    found, sure = found_and_rehearsed(given, 10**12, trial)
    assert len(sure) == 1
    best = min(found, key=lambda plan: plan.seconds)
    assert sure[0].choice == best.choice
    # As the formulas are linear, it takes what was predicted.
    assert (sure[0].seconds, sure[0].peak) == (
        pytest.approx(best.seconds),
        pytest.approx(best.peak, rel=1e-6),
    )
    assert (trial.tried, trial.passes) == ([(best.choice, 2**14)], [2])


def test_what_is_not_as_predicted_is_not_taken(tmp_path: Path) -> None:
    given = run(tmp_path, model=TTTConfig.preset("tiny"), seq_length=2048, global_batch_size=1)
    found, sure = found_and_rehearsed(given, 10**12, Surprise())
    assert {plan.choice.method for plan in found} == {"graph", "rollback"}
    # Rollback takes 1.3 times as long as a graph was predicted to; one rehearsal of it is enough.
    assert [plan.choice.method for plan in sure] == ["graph", "graph", "rollback"]
    assert min(sure, key=lambda plan: plan.seconds).choice.method == "rollback"


def test_what_does_not_fit_at_full_length_is_not_taken(tmp_path: Path) -> None:
    given = run(tmp_path, method="graph", global_batch_size=1, seq_length=24)
    predictions = sorted(plan.peak for plan in plans(given, 10**12, FakeTrial()))
    # Room for both as predicted, then for the smaller one alone.
    _, sure = found_and_rehearsed(given, int((predictions[1] + 1) / 0.9), Surprise())
    assert [plan.choice.checkpoint_blocks for plan in sure] == [False, True]
    _, sure = found_and_rehearsed(given, 10**12, FakeTrial(limit=predictions[0]))
    assert [plan.choice.checkpoint_blocks for plan in sure] == [True]


@pytest.mark.parametrize(
    ("said", "fits"),
    [
        ("CUDA out of memory. Tried to allocate 2.00 GiB.", False),
        ("CUDA error: out of memory", False),
        ("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`", False),
        ("CUDA error: an illegal memory access was encountered", True),
    ],
)
def test_who_finds_no_memory(said: str, fits: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch's allocator has an error of its own for that, libraries and graphs have none."""

    class Pool:
        def __init__(self, *_: object, **__: object) -> None:
            pass

        def __enter__(self) -> "Pool":
            return self

        def __exit__(self, *_: object) -> None:
            pass

        def submit(self, *_: object) -> "Pool":
            return self

        def result(self) -> Cost:
            raise RuntimeError(said)

    monkeypatch.setattr("engine.training.trial.ProcessPoolExecutor", Pool)
    with pytest.raises(RuntimeError, match="illegal") if fits else nullcontext():
        assert try_out(run(tmp_path), Choice(1, "rollback", True), 24) is None


def test_all_graphs_are_there_before_time_is_taken() -> None:
    cuda = torch.device("cuda")
    for window, unit, steps in ((8192, 1024, 8 + 2), (13, 8, 2 + 2), (3, 8, 1 + 2)):
        config = replace(MODEL, window=window, mini_batch_size=unit)
        assert enough(config, cuda) == steps * unit
        assert enough(config, torch.device("cpu")) == 2 * unit
    # Without an inner loop kernels are timed for about as much work as there is.
    assert enough(MODEL.as_sliding_window(), cuda) > 2**30


@pytest.mark.slow
def test_a_trial_keeps_gradients_where_there_is_accumulation(tmp_path: Path) -> None:
    given = run(tmp_path, model=replace(MODEL, vocab_size=2**20), accum_steps=1, method="rollback")
    one, two = (
        try_out(replace(given, global_batch_size=size), Choice(1, "rollback", True), given.seq_length)
        for size in (1, 2)
    )
    assert one is not None
    assert two is not None
    gradient = 4 * 2**20 * MODEL.hidden_size
    assert two.peak - one.peak == pytest.approx(gradient, rel=0.25)


@pytest.mark.slow
def test_a_real_trial(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = run(tmp_path, method="rollback", checkpoint_blocks=True, global_batch_size=1)
    # Of this process, which a trial's has nothing of.
    much = torch.ones(2**28)
    cost = try_out(given, Choice(1, "rollback", True), given.seq_length)
    assert cost is not None
    assert cost.seconds > 0
    # torch alone takes more than a hundred megabytes.
    assert 100 * MEGABYTE < cost.peak < much.nbytes
    assert fit(given) == 0
    shown = capsys.readouterr().out
    assert "training.accum_steps=1 training.method=rollback training.checkpoint_blocks=true" in shown
