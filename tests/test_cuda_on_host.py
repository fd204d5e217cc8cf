"""The host's emulation of CUDA finds what it is there to find, and the kernels' own barrier and sums hold."""

import ctypes

import pytest
import torch
from cuda_here import ORDERS, OnHost
from harness import draw
from torch import Tensor

THREADS = 96


def at(t: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(t.data_ptr())


def message(on_host: OnHost, status: int) -> str:
    assert status == 1
    return on_host.library.last_error().decode()


@pytest.mark.parametrize("order", ORDERS)
def test_shared_memory_behind_a_barrier(cuda_on_host: OnHost, order: int) -> None:
    values = draw(3 * THREADS, seed=0).float()
    expected = values.view(3, THREADS).flip(1).flatten()
    cuda_on_host.arrange(order)
    out = torch.empty_like(values)
    assert cuda_on_host.library.run_reverse(at(values), at(out), 3, 1) == 0
    assert torch.equal(out, expected)
    # What another thread has not written yet is NaN, in whatever order they run.
    assert cuda_on_host.library.run_reverse(at(values), at(out), 3, 0) == 0
    assert out.isnan().any()


@pytest.mark.parametrize("order", ORDERS)
def test_sums_of_a_block(cuda_on_host: OnHost, order: int) -> None:
    values = draw(2, THREADS, seed=0)
    cuda_on_host.arrange(order)
    out = torch.empty_like(values)
    assert cuda_on_host.library.run_sums(at(values), at(out), 2) == 0
    torch.testing.assert_close(out[:, 0], values.sum(1) * values.amax(1), rtol=1e-14, atol=0)
    assert torch.equal(out, out[:, :1].expand_as(out))


def rounds(values: Tensor, count: int) -> Tensor:
    for _ in range(count):
        values = values + values.roll((-1, -1), (0, 1))
    return values


@pytest.mark.parametrize("order", ORDERS)
def test_barrier_of_the_grid(cuda_on_host: OnHost, order: int) -> None:
    """One counter serves any number of barriers, launches and blocks."""
    counter = torch.zeros(1, dtype=torch.int32)
    for launch, blocks in enumerate((1, 7, 3, 64, 2)):
        cuda_on_host.arrange(order, processors=4)
        values, buffers = draw(blocks, 32, seed=launch).float(), torch.empty(2, blocks, 32)
        assert cuda_on_host.library.run_rounds(at(values), at(buffers), at(counter), blocks, 5, 1) == 0
        torch.testing.assert_close(buffers[1], rounds(values, 5))
        assert counter.item() & 0x7FFFFFFF == 0


@pytest.mark.parametrize("order", ORDERS)
def test_a_missing_barrier_of_the_grid_shows(cuda_on_host: OnHost, order: int) -> None:
    values, buffers, counter = (
        draw(7, 32, seed=0).float(),
        torch.empty(2, 7, 32),
        torch.zeros(1, dtype=torch.int32),
    )
    cuda_on_host.arrange(order)
    assert cuda_on_host.library.run_rounds(at(values), at(buffers), at(counter), 7, 5, 0) == 0
    assert not torch.allclose(buffers[1], rounds(values, 5))


@pytest.mark.parametrize("in_bulk", [True, False])
@pytest.mark.parametrize("order", ORDERS)
def test_copies_to_shared_memory(cuda_on_host: OnHost, order: int, in_bulk: bool) -> None:
    values = draw(64, seed=0).float()
    cuda_on_host.arrange(order, in_bulk=in_bulk)
    out = torch.empty_like(values)
    assert cuda_on_host.library.run_copied(at(values), at(out), 1) == 0
    assert torch.equal(out, values)
    # In one order they have come before anybody looks.
    if order != 1:
        status = cuda_on_host.library.run_copied(at(values), at(out), 0)
        assert "without having waited for a copy" in message(cuda_on_host, status)
        assert out.isnan().any()


def test_a_cooperative_launch_has_to_be_resident(cuda_on_host: OnHost) -> None:
    cuda_on_host.arrange(processors=2)
    values = torch.zeros(200)
    status = cuda_on_host.library.run_rounds(at(values), at(values), at(values), 65, 1, 1)
    assert message(cuda_on_host, status) == "CUDA kernel rounds: too many blocks in cooperative launch"


@pytest.mark.parametrize(
    ("what", "problem"),
    [
        (0, "a lane calls for lanes without itself"),
        (1, "all threads wait for others|a lane waits for one that does not exist or has ended"),
        (2, "written beyond the block's dynamic shared memory"),
        (3, "a vector is not where its size demands"),
        (4, "look for what no other thread will write"),
        (5, "a barrier is used that nobody has made"),
        (6, "more threads arrive at a barrier than it was made for"),
        (7, "a thread has ended with copies that nobody waits for"),
        (8, "a copy's size is no multiple of 16 bytes"),
    ],
)
def test_faults_are_found(cuda_on_host: OnHost, what: int, problem: str) -> None:
    memory = torch.zeros(64)
    cuda_on_host.arrange()
    status = cuda_on_host.library.run_faulty(what, at(memory), 32, ctypes.c_ulong(16))
    found = message(cuda_on_host, status)
    assert any(p in found for p in problem.split("|")), found


def test_refusals_of_the_runtime_name_the_kernel(cuda_on_host: OnHost) -> None:
    run, memory = cuda_on_host.library.run_faulty, at(torch.zeros(64))
    assert message(cuda_on_host, run(9, memory, 1025, ctypes.c_ulong(0))) == (
        "CUDA kernel faulty: invalid configuration argument"
    )
    assert message(cuda_on_host, run(9, memory, 32, ctypes.c_ulong(228 << 10))) == (
        "CUDA kernel faulty: invalid argument"
    )
    # More than a block has unasked is asked for.
    assert run(9, memory, 32, ctypes.c_ulong(227 << 10)) == 0
