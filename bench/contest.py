"""Contenders in turns, each by a process of its own: checked first, then measured."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeVar

from bench.output import progress


class Named(Protocol):
    """What takes part."""

    @property
    def label(self) -> str:
        """What messages call it."""


Contender = TypeVar("Contender", bound=Named)
Job = TypeVar("Job")
Run = Callable[[Job], dict[str, Any]]


def all_agree(work: Sequence[tuple[Contender, Job]], check: Run[Job]) -> bool:
    """Whether every result is the reference's: no speed of a wrong result is reported."""
    green = True
    for contender, job in work:
        progress(f"checking {contender.label} against reference ")
        try:
            right = check(job)["green"]
        except RuntimeError as error:
            progress(f"\n{contender.label}: not checked, and so not measured: {error}\n")
            green = False
            continue
        if not right:
            progress(
                f"{contender.label} disagrees with the reference formulas; "
                "its speed means nothing and is not reported\n"
            )
            green = False
    return green


def measure_all(
    work: Sequence[tuple[Contender, Job]], measure: Run[Job]
) -> list[tuple[Contender, dict[str, Any]]]:
    """The results of those that could be measured."""
    return [(contender, results[0]) for contender, results in measure_in_turns(work, measure, 1)]


def measure_in_turns(
    work: Sequence[tuple[Contender, Job]], measure: Run[Job], rounds: int
) -> list[tuple[Contender, list[dict[str, Any]]]]:
    """The results of every round, of those that could be measured in all: a shared machine does not keep one speed."""
    results: dict[int, list[dict[str, Any]]] = {index: [] for index in range(len(work))}
    for _ in range(rounds):
        for index, (contender, job) in enumerate(work):
            if index not in results:
                continue
            progress(f"{contender.label}: ")
            try:
                results[index].append(measure(job))
            except RuntimeError as error:
                progress(f"\n{contender.label}: not measured: {error}\n")
                del results[index]
    return [(work[index][0], found) for index, found in results.items()]
