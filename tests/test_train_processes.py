"""Two gloo processes on one machine train as one process does, from the loop's first step to its last."""

import json
import os
import socket
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp
from train_runs import run, state, write_text

from engine.training import checkpoint
from engine.training.loop import train


def _work(rank: int, ports: tuple[int, int], folder: Path) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    # Stopped, and gone on with; by the same port one process could meet what the other has yet to leave.
    for port, break_step in zip(ports, (2, None), strict=True):
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        assert train(run(folder, break_step=break_step)) == 0


def _free_ports() -> tuple[int, int]:
    with socket.socket() as first, socket.socket() as second:
        for free in (first, second):
            free.bind(("127.0.0.1", 0))
        return first.getsockname()[1], second.getsockname()[1]


@pytest.mark.slow
def test_two_processes_equal_one(tmp_path: Path) -> None:
    for name in ("one", "two"):
        write_text(tmp_path / name / "text")
    mp.spawn(_work, (_free_ports(), tmp_path / "two"), nprocs=2)
    one, two = run(tmp_path / "one"), run(tmp_path / "two")
    assert train(one) == 0
    rows = [
        [json.loads(line) for line in (r.log_dir / "metrics.jsonl").read_text().splitlines()]
        for r in (one, two)
    ]
    assert len(rows[0]) == len(rows[1]) == one.total_steps
    for a, b in zip(*rows, strict=True):
        assert b["loss"] == pytest.approx(a["loss"], abs=2e-6)
        assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=1e-4)
    evaluations = [json.loads((r.log_dir / "evaluation-00000006.json").read_text()) for r in (one, two)]
    assert evaluations[1]["sequences"] == evaluations[0]["sequences"]
    assert evaluations[1]["nll_by_position"] == pytest.approx(evaluations[0]["nll_by_position"], abs=2e-5)
    # A checkpoint of two processes is read by one.
    assert checkpoint.steps(two.checkpoint_dir) == [3, 6]
    for a, b in zip(state(one, 6).values(), state(two, 6).values(), strict=True):
        torch.testing.assert_close(b, a, rtol=0, atol=5e-5)
