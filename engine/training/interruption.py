"""An interruption that waits for the end of a step."""

from __future__ import annotations

import signal
from types import FrameType, TracebackType
from typing import Any, Self

from engine.training.distributed import World, mean

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interruption:
    """Within the context SIGINT and SIGTERM are only noted, the first of them: a second one acts as ever."""

    def __init__(self) -> None:
        self._asked = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        for number in _SIGNALS:
            self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._restore()

    def asked(self, world: World) -> bool:
        """Whether any process was interrupted; all of them get the same answer."""
        return mean(float(self._asked), world) > 0

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._asked = True
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
