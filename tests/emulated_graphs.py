"""CUDA graphs and streams without a GPU: recordings that replay what was recorded, and streams that are watched.

A recording keeps torch's operations with the tensors that they were given, and a replay runs these again, into the same
memory, without any Python in between: as a CUDA graph does. What an operation was given as a number is what it was when
it was recorded. Nothing is changed by being recorded, and whoever asks what a tensor holds while it is, is refused.

Operations of all lanes run at once, in the order in which they are given. But each lane has a clock, and a mark tells
what its lane's is: an operation that touches memory which another lane has written, or writes what it has read, while
this lane has waited for no mark behind that, is a race.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from engine.graphs import Lanes

Clock = dict[str, int]
_LOOKS = (
    torch.ops.aten.item.default,
    torch.ops.aten._local_scalar_dense.default,
    torch.ops.aten.nonzero.default,
    torch.ops.aten.is_nonzero.default,
)


class Emulation(TorchDispatchMode):
    """The device: what was recorded, and who has touched what."""

    def __init__(self) -> None:
        super().__init__()
        self.lane = "main"
        self.clocks: dict[str, Clock] = {name: {} for name in Lanes._fields}
        self.replays = 0
        self._recording: _Recording | None = None
        self._written: dict[int, tuple[str, int]] = {}
        self._read: dict[int, Clock] = {}
        # So that no later memory has their addresses.
        self._seen: dict[int, Any] = {}
        self._host: dict[int, Any] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self._recording is not None:
            return self._recording.note(func, args, kwargs or {})
        operation = _Operation(func, args, kwargs or {})
        self.watch(operation)
        return operation.results

    def lanes(self, device: torch.device) -> Lanes:
        """As `engine.graphs.lanes`."""
        return Lanes(*(_Lane(self, name) for name in Lanes._fields))

    def record(self, work: Callable[[], None]) -> Callable[[], None]:
        """As `engine.graphs.Lane.record`."""
        self._recording = recording = _Recording()
        try:
            work()
        finally:
            self._recording = None
            recording.undo()

        def replay() -> None:
            self.replays += 1
            for operation in recording.operations:
                self.watch(operation)
            # A device knows nothing of inference mode: what was made in it is written again outside.
            with torch.utils._python_dispatch._disable_current_modes(), torch.inference_mode():
                for operation in recording.operations:
                    operation.again()

        return replay

    def on_host(self, t: Tensor) -> None:
        """Tells of a tensor whose memory is the processor's, where nothing runs beside anything."""
        self._host[_memory(t)] = t.untyped_storage()

    def call(self, func: Callable[..., Any], *args: Any) -> Any:
        """Runs a kernel that is none of torch's operations, which is recorded like one; it may change its arguments."""
        return self.__torch_dispatch__(_Kernel(func), (), args)

    def launch(self, kernel: Callable[[], None]) -> None:
        """Runs a kernel that has no results but what it writes to its arguments; nothing watches these for races."""
        if self._recording is None:
            with torch.utils._python_dispatch._disable_current_modes():
                kernel()
        else:
            self._recording.operations.append(_Launch(kernel))

    def watch(self, operation: _Operation | _Launch) -> None:
        """Finds a race of an operation that runs on the lane at hand."""
        if isinstance(operation, _Launch) or operation.is_view:
            return
        clock = self.clocks[self.lane]
        clock[self.lane] = now = clock.get(self.lane, 0) + 1
        for t, key in operation.touched:
            self._touch(t, key, operation, now, writes=key in operation.written)

    def _touch(self, t: Tensor, key: int, operation: _Operation, now: int, *, writes: bool) -> None:
        if key in self._host:
            return
        clock = self.clocks[self.lane]
        if key not in self._seen:
            self._seen[key] = t.untyped_storage()
        others = [self._written[key]] if key in self._written else []
        if writes:
            others += self._read.get(key, {}).items()
        for lane, time in others:
            if lane != self.lane and time > clock.get(lane, 0):
                raise AssertionError(
                    f"race: {operation.func} of lane {self.lane!r} {'writes' if writes else 'reads'} memory of "
                    f"{tuple(t.shape)} that lane {lane!r} used and that nothing was waited for"
                )
        if writes:
            self._written[key] = (self.lane, now)
        else:
            self._read.setdefault(key, {})[self.lane] = now


class _Kernel:
    """What a function of our own looks like among torch's operations."""

    is_view = False

    def __init__(self, func: Callable[..., Any]) -> None:
        self._func = func

    class _schema:
        is_mutable = False

    def __call__(self, *args: Any) -> Any:
        return self._func(*args)


class _Operation:
    """One of torch's operations with what it was given, run once.

    results: what it gave. own: those of them in memory of their own. touched: all tensors with their memory. written:
    the memory that it changes.
    """

    def __init__(self, func: Any, args: Any, kwargs: dict[str, Any]) -> None:
        self.func, self._args, self._kwargs = func, args, kwargs
        given = [(t, _memory(t)) for t in _tensors((args, kwargs))]
        self.written = _written(func, args, kwargs) if func._schema.is_mutable else set()
        self.before = {key for _, key in given}
        self.results = func(*args, **kwargs)
        self.own = [None if _memory(t) in self.before else t for t in _tensors(self.results)]
        new = [(t, _memory(t)) for t in self.own if t is not None]
        self.touched = given + new
        self.written |= {key for _, key in new}

    @property
    def is_view(self) -> bool:
        """Whether it has touched no memory: those of torch's views that may be copies sometimes are."""
        return self.func.is_view and all(t is None for t in self.own)

    def again(self) -> None:
        """Runs it again, into the memory of the first time."""
        if self.is_view:
            return
        results = self.func(*self._args, **self._kwargs)
        if any(t is not None for t in self.own):
            for old, new in zip(self.own, _tensors(results), strict=True):
                if old is not None:
                    old.copy_(new)


class _Launch:
    """A kernel with its arguments."""

    def __init__(self, kernel: Callable[[], None]) -> None:
        self.again = kernel


class _Recording:
    """Operations, and what they overwrote of memory that was there before."""

    def __init__(self) -> None:
        self.operations: list[_Operation | _Launch] = []
        self._own: set[int] = set()
        # Of tensors made of numbers, which on a GPU are told to be on the processor.
        self._host: set[int] = set()
        self._overwritten: dict[int, tuple[Tensor, Tensor]] = {}

    def note(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Runs an operation, for its results, and keeps it."""
        if func in _LOOKS and _memory(args[0]) in self._host:
            return func(*args, **kwargs)
        if func in _LOOKS:
            raise AssertionError(f"{func} waits for the device while it is recorded")
        if func._schema.is_mutable:
            written = _written(func, args, kwargs)
            for t in _tensors((args, kwargs)):
                key = _memory(t)
                if key in written and key not in self._own and key not in self._overwritten:
                    whole = torch.empty(0, dtype=t.dtype).set_(t.untyped_storage())
                    self._overwritten[key] = (whole, whole.clone())
        operation = _Operation(func, args, kwargs)
        if func is torch.ops.aten.lift_fresh.default:
            self._host.add(_memory(operation.results))
        self._own |= {_memory(t) for t in operation.own if t is not None}
        self.operations.append(operation)
        return operation.results

    def undo(self) -> None:
        for whole, value in self._overwritten.values():
            whole.copy_(value)


class _Lane:
    """As `engine.graphs.Lane`."""

    def __init__(self, device: Emulation, name: str) -> None:
        self._device, self._name = device, name

    @contextmanager
    def active(self) -> Iterator[None]:
        outer, self._device.lane = self._device.lane, self._name
        try:
            yield
        finally:
            self._device.lane = outer

    def record(self, work: Callable[[], None]) -> Callable[[], None]:
        return self._device.record(work)

    def mark(self) -> Clock:
        return dict(self._device.clocks[self._name])

    def wait(self, mark: Clock) -> None:
        clock = self._device.clocks[self._name]
        for lane, time in mark.items():
            clock[lane] = max(time, clock.get(lane, 0))


def _tensors(values: Any) -> list[Tensor]:
    if isinstance(values, Tensor):
        return [values]
    if isinstance(values, dict):
        values = values.values()
    elif not isinstance(values, list | tuple):
        return []
    return [t for value in values for t in _tensors(value)]


def _memory(t: Tensor) -> int:
    return t.untyped_storage()._cdata


def _written(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> set[int]:
    """The memory of arguments that an operation changes."""
    found = set()
    for index, argument in enumerate(func._schema.arguments):
        value = kwargs.get(argument.name, args[index] if index < len(args) else None)
        if argument.alias_info is not None and argument.alias_info.is_write:
            found |= {_memory(t) for t in _tensors(value)}
    return found


@contextmanager
def interpreted_kernels(device: Emulation) -> Iterator[None]:
    """Within the context Triton's interpreter takes launches to an emulation, with their arguments as they are then."""
    from triton.runtime.interpreter import GridExecutor

    run = GridExecutor.__call__

    def launch(executor: Any, *args: Any, **kwargs: Any) -> None:
        device.launch(lambda: run(executor, *args, **kwargs))

    GridExecutor.__call__ = launch
    try:
        yield
    finally:
        GridExecutor.__call__ = run
