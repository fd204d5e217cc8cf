"""Two processes that share a batch and a model train as one does."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from small_model import TINIER
from torch import Tensor
from torch.distributed.tensor import DTensor

from engine import TTTModel
from engine.training.checkpoint import load, prune, save, steps
from engine.training.distributed import World, cleanup, gather, mean, rank, setup, shard
from engine.training.log import TrainLog
from engine.training.optimizer import OptimizerOptions, clip_, learning_rate, make_optimizer

pytestmark = pytest.mark.usefixtures("one_thread")

SIZE = 2
OPTIONS = OptimizerOptions(lr=1e-2, warmup_steps=1, decay_steps=5, init_lr=1e-3, clip=0.5)
TOKENS = torch.randint(64, (2, 4, 33), generator=torch.Generator().manual_seed(1))
# Of every update.
WAYS: tuple[dict[str, Any], ...] = ({"method": "rollback"}, {"method": "snapshots", "snapshot_every": 2})
ONE = World(0, 1, torch.device("cpu"))


def make(dtype: torch.dtype, seed: int = 0) -> TTTModel:
    config = replace(TINIER, vocab_size=65, compute_dtype=str(dtype).removeprefix("torch."))
    return TTTModel(config, dtype=dtype, seed=seed)


def whole(tensor: Tensor) -> Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def train(model: TTTModel, world: World, optimizer: torch.optim.AdamW) -> dict[str, Any]:
    """Two updates on this process's share of the batches, and what came of them."""
    shown: dict[str, Any] = {"losses": [], "norms": [], "gradients": [], "evaluations": []}
    for step, batch in enumerate(TOKENS):
        own = batch[world.rank :: world.size]
        with torch.no_grad():
            shown["evaluations"].append(mean(model.loss(own).loss.item(), world))
        loss = model.loss(own, step, **WAYS[step]).loss
        loss.backward()
        shown["losses"].append(mean(loss.item(), world))
        shown["gradients"].append({name: whole(p.grad) for name, p in model.named_parameters()})
        shown["norms"].append(clip_(model.parameters(), OPTIONS.clip).item())
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(OPTIONS, step)
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        shown["evaluations"].append(mean(model.loss(TOKENS[0, world.rank :: world.size]).loss.item(), world))
    shown["shards"] = [isinstance(parameter, DTensor) for parameter in model.parameters()]
    shown["parameters"] = {name: whole(p) for name, p in model.named_parameters()}
    return shown


def state(model: TTTModel, optimizer: torch.optim.AdamW) -> dict[str, Tensor]:
    found = {name: whole(p) for name, p in model.named_parameters()}
    for name, p in model.named_parameters():
        found |= {f"{key}.{name}": whole(value) for key, value in optimizer.state[p].items()}
    return found


def work(own_rank: int, port: int, folder: Path) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(own_rank), "LOCAL_RANK": str(own_rank), "WORLD_SIZE": str(SIZE)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    world = setup("cpu")
    shown: dict[str, Any] = {"world": (world.rank, world.size, rank()), "gathered": gather(own_rank * 10)}
    model = optimizer = None
    for dtype in (torch.float64, torch.float32):
        model = make(dtype)
        shard(model, world)
        shown["sharded"] = [p.to_local().numel() for p in model.parameters()]
        optimizer = make_optimizer(model, OPTIONS)
        shown[dtype] = train(model, world, optimizer)

    torch.manual_seed(100 + own_rank)
    save(folder / "sharded", step=1, model=model, optimizer=optimizer, meta={})
    save(folder / "sharded", step=2, model=model, optimizer=optimizer, meta={})
    shown["state"] = state(model, optimizer)
    shown["pruned"] = prune(folder / "sharded", keep=1)
    drawn = torch.rand(3)
    load(folder / "sharded", 2, model=model, optimizer=optimizer, expected_meta={})
    shown["random"] = torch.equal(torch.rand(3), drawn)

    load(folder / "plain", 7, model=model, optimizer=optimizer, expected_meta={})
    shown["loaded"] = state(model, optimizer)
    shown["after loading"] = train(model, world, optimizer)
    try:
        load(folder / "damaged", 7, model=model, optimizer=optimizer, expected_meta={})
    except ValueError as error:
        shown["refusal"] = str(error)
    with TrainLog(folder / f"log-{own_rank}", 1) as log:
        log.record(1, loss=1.0, grad_norm=1.0, lr=0.1, inner_lr=1.0, tokens=8, seconds=0.5)
    torch.save(shown, folder / f"shown-{own_rank}.pt")
    cleanup()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where two processes left what they found; and `plain`, a checkpoint that one process wrote."""
    folder = tmp_path_factory.mktemp("two")
    model = make(torch.float32, seed=5)
    optimizer = make_optimizer(model, OPTIONS)
    train(model, ONE, optimizer)
    for name in ("plain", "damaged"):
        written = save(folder / name, step=7, model=model, optimizer=optimizer, meta={})
    (written / "__0_0.distcp").write_bytes(b"")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(work, (port, folder), nprocs=SIZE)
    return folder


@pytest.fixture(scope="module")
def shown(folder: Path) -> list[dict[str, Any]]:
    """What each of the two processes found."""
    return [torch.load(folder / f"shown-{r}.pt", weights_only=False) for r in range(SIZE)]


def assert_near(found: Tensor, expected: Tensor, tolerance: float) -> None:
    assert found.shape == expected.shape
    assert (found - expected).norm() <= tolerance * expected.norm()


def assert_same(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype, name
        assert torch.equal(a[name], b[name]), name


@pytest.mark.slow
def test_two_processes_know_each_other(shown: list[dict[str, Any]]) -> None:
    assert [s["world"] for s in shown] == [(0, 2, 0), (1, 2, 1)]
    assert [s["gathered"] for s in shown] == [[0, 10], [0, 10]]


@pytest.mark.slow
def test_parameters_are_shared_out(shown: list[dict[str, Any]]) -> None:
    model = make(torch.float32)
    for first, second, parameter in zip(
        shown[0]["sharded"], shown[1]["sharded"], model.parameters(), strict=True
    ):
        assert first + second == parameter.numel()
        assert 0 < second <= first < parameter.numel()
    assert all(all(s[torch.float32]["shards"]) for s in shown)


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-13)])
def test_losses_and_gradients_are_those_of_one_process(
    shown: list[dict[str, Any]], dtype: torch.dtype, tolerance: float
) -> None:
    model = make(dtype)
    expected = train(model, ONE, make_optimizer(model, OPTIONS))
    # The first update's, since Adam turns rounding of a tiny gradient into a whole update in float32.
    updates = 1 if dtype == torch.float32 else 2
    for found in (s[dtype] for s in shown):
        if updates == 2:
            assert found["evaluations"] == pytest.approx(expected["evaluations"], rel=1e-9)
        for name in ("losses", "norms", "evaluations"):
            assert found[name][:updates] == pytest.approx(expected[name][:updates], rel=tolerance), name
        for ours, theirs in zip(found["gradients"][:updates], expected["gradients"], strict=False):
            for name, gradient in theirs.items():
                assert_near(ours[name], gradient, tolerance)


@pytest.mark.slow
def test_updates_are_those_of_one_process(shown: list[dict[str, Any]]) -> None:
    model = make(torch.float64)
    expected = train(model, ONE, make_optimizer(model, OPTIONS))
    for found in (s[torch.float64] for s in shown):
        for name, parameter in expected["parameters"].items():
            assert_near(found["parameters"][name], parameter, 1e-9)


@pytest.mark.slow
def test_one_process_reads_the_checkpoint_of_two(folder: Path, shown: list[dict[str, Any]]) -> None:
    model = make(torch.float32, seed=9)
    optimizer = make_optimizer(model, OPTIONS)
    generator = torch.get_rng_state()
    load(folder / "sharded", 2, model=model, optimizer=optimizer, expected_meta={})
    assert_same(state(model, optimizer), shown[0]["state"])
    assert torch.equal(torch.get_rng_state(), generator)


@pytest.mark.slow
def test_two_processes_read_the_checkpoint_of_one(shown: list[dict[str, Any]]) -> None:
    model = make(torch.float32, seed=5)
    optimizer = make_optimizer(model, OPTIONS)
    train(model, ONE, optimizer)
    for found in shown:
        assert_same(found["loaded"], state(model, optimizer))
    expected = train(model, ONE, optimizer)
    assert shown[0]["after loading"]["losses"][0] == pytest.approx(expected["losses"][0], rel=1e-6)


@pytest.mark.slow
def test_generators_of_both_are_restored(shown: list[dict[str, Any]]) -> None:
    assert [s["random"] for s in shown] == [True, True]


@pytest.mark.slow
def test_both_refuse_with_the_same_reason(shown: list[dict[str, Any]]) -> None:
    assert shown[0]["refusal"] == shown[1]["refusal"]
    assert "__0_0.distcp has 0 bytes, expected" in shown[0]["refusal"]


@pytest.mark.slow
def test_pruned_once(folder: Path, shown: list[dict[str, Any]]) -> None:
    assert [s["pruned"] for s in shown] == [[1], [1]]
    assert steps(folder / "sharded") == [2]


@pytest.mark.slow
def test_only_the_first_process_logs(folder: Path) -> None:
    assert (folder / "log-0" / "metrics.jsonl").read_text().count("\n") == 1
    assert not (folder / "log-1").exists()


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    yield monkeypatch
    assert not dist.is_initialized()


@pytest.mark.parametrize("under_torchrun", [True, False])
def test_alone(environment: pytest.MonkeyPatch, under_torchrun: bool) -> None:
    if under_torchrun:
        for name, value in (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0")):
            environment.setenv(name, value)
    world = setup("cpu")
    assert world == ONE
    assert mean(0.1, world) == 0.1
    assert gather("x") == ["x"]
    model = make(torch.float32)
    shard(model, world)
    assert type(model) is TTTModel
    cleanup()


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"RANK": "0"}, r"RANK='0', WORLD_SIZE=None, LOCAL_RANK=None; torchrun sets all three"),
        ({"RANK": "0", "WORLD_SIZE": "two", "LOCAL_RANK": "0"}, r"WORLD_SIZE='two'"),
    ],
)
def test_refuses_an_environment(
    environment: pytest.MonkeyPatch, variables: dict[str, str], message: str
) -> None:
    for name, value in variables.items():
        environment.setenv(name, value)
    with pytest.raises(ValueError, match=message):
        setup("cpu")


def test_refuses_one_gpu_for_all(environment: pytest.MonkeyPatch) -> None:
    for name, value in (("RANK", "1"), ("WORLD_SIZE", "2"), ("LOCAL_RANK", "1")):
        environment.setenv(name, value)
    with pytest.raises(ValueError, match=r"device='cuda:0' is one for all 2 processes; accepted is 'cuda'"):
        setup("cuda:0")
    with pytest.raises(ValueError, match=r"device='nonsense' cannot be used here"):
        setup("nonsense")


def test_refuses_to_shard_several_dtypes() -> None:
    model = TTTModel(make(torch.float32).config, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=r"torch\.bfloat16 and torch\.float32; sharding accepts one dtype"):
        shard(model, World(0, 2, torch.device("cpu")))
