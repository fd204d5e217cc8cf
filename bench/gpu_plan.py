"""What bench/gpu.py measures, the most important first, and about how long each measurement takes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from bench.flops import prefill_flops_per_token, training_flops_per_token
from bench.gpu_cases import names
from bench.gpu_checks import CHECKED_DTYPES, golden_files
from bench.gpu_prefill import PASSES
from bench.table import tokens as in_words
from engine import TTTConfig
from ttt_kernels.registry import OPERATORS, Operator

STAGES = ("checks", "ceilings", "operators", "prefill", "decode", "train", "official")

PREFILL_FIRST = ("3b", "125m", "1b")
TRAIN_FIRST = ("1b", "125m", "3b")
"""Presets in the order of what the bars ask of them."""
OFFICIAL = ("125m", 32768)
SPEED_UP = ("3b", 131072)

# Assumed of a device that was not measured yet, for the time that things take: useful operations per second.
ASSUMED_RATE = {"cuda": 2.5e14}
SLOW_RATE = 2e10
START_SECONDS = {"cuda": 8.0}
"""Until a process has a device."""
CHECK_SECONDS = 10.0
OFFICIAL_SECONDS = 150.0
"""Most of it for compiling its program in two ways."""


@dataclass(frozen=True)
class Settings:
    """What to measure; the defaults are what the bars need."""

    device: str = "cuda"
    dtype: str = "bfloat16"
    stages: tuple[str, ...] = STAGES
    backends: tuple[str, ...] = ()
    """Those whose kernels run on the device, but reference."""
    presets: tuple[str, ...] = ("125m", "1b", "3b")
    train_presets: tuple[str, ...] = ("125m", "1b", "3b")
    lengths: tuple[int, ...] = (8192, 32768, 131072)
    tokens_per_batch: int = 131072
    long_preset: str = "125m"
    long: int = 2**20
    compiled_baselines: bool = True
    official: str | None = None


@dataclass(frozen=True)
class Measurement:
    """A piece of work whose result is kept by its key.

    task, arguments: what bench/gpu_child.py does. group: measurements of one group are done by one process. seconds:
    about how long it takes. needs: cases of operators whose checks must be green; None: all checks.
    """

    key: str
    stage: str
    task: str
    arguments: dict[str, Any]
    group: str
    seconds: float
    needs: tuple[str, ...] | None = ()
    parallel: bool = False
    environment: dict[str, str] = field(default_factory=dict)


def plan(settings: Settings) -> list[Measurement]:
    """Every measurement of the stages in question; those of a group are together, unless others matter more."""
    made = _Plan(settings)
    readers = _ordered(settings.presets, PREFILL_FIRST)
    learners = _ordered(settings.train_presets, TRAIN_FIRST)
    everything = [
        *made.checks(),
        *made.ceilings(),
        *made.models(readers[:1]),
        *made.train(learners[:1]),
        *made.models(readers[1:]),
        *made.official(),
        *made.train(learners[1:2]),
        *made.operators(),
        *made.compiled(),
        *made.train(learners[2:]),
    ]
    return [m for m in everything if m.stage in settings.stages]


def key(stage: str, *parts: object) -> str:
    """The name of a result."""
    return " ".join(map(str, (stage, *parts)))


class _Plan:
    def __init__(self, settings: Settings) -> None:
        self._s = settings
        self._rate = ASSUMED_RATE.get(settings.device.split(":")[0], SLOW_RATE)

    def checks(self) -> Iterator[Measurement]:
        for dtype in CHECKED_DTYPES:
            for name in names():
                for backend in self._s.backends:
                    if not _operator(name).orders(backend):
                        continue
                    yield Measurement(
                        key("checks", name, backend, dtype), "checks", "operator check",
                        {"name": name, "backend": backend, "dtype": dtype}, f"checks of {_family(name)} {dtype}",
                        CHECK_SECONDS, parallel=True,
                    )  # fmt: skip
        for index, file in enumerate(golden_files()):
            for backend in self._model_backends():
                yield Measurement(
                    key("checks", "golden", file.stem, backend or "default"), "checks", "golden check",
                    {"file": str(file), "backend": backend}, f"golden cases {index % 3}", CHECK_SECONDS, parallel=True,
                )  # fmt: skip
        if self._s.device.startswith("cuda"):
            yield from self._compiled_kernels()

    def _model_backends(self) -> list[str | None]:
        """Those with kernels of all operators of a model; None, the best of each operator, where there are several."""
        whole = [b for b in self._s.backends if all(op.orders(b) for op in map(_operator, names()))]
        return [*whole, *([None] if len(self._s.backends) > 1 else [])]

    def _compiled_kernels(self) -> Iterator[Measurement]:
        """Not checks: the same kernels at the models' shapes, called once so that many processors compile them."""
        seen = set()
        for preset in _ordered(self._s.presets, PREFILL_FIRST):
            yield Measurement(
                key("kernels", "of a model", preset), "checks", "compile models", {"preset": preset},
                f"kernels of a model {preset}", CHECK_SECONDS, parallel=True,
            )  # fmt: skip
            for name in names():
                variant = (name, preset)
                if name.startswith("swa"):
                    # The longest to compile, and the same for all widths of model.
                    variant = (name, str(TTTConfig.preset(preset).head_dim))
                if variant in seen:
                    continue
                seen.add(variant)
                yield Measurement(
                    key("kernels", name, preset), "checks", "compile", {"preset": preset, "name": name},
                    f"kernels of {_family(name)} {preset}", CHECK_SECONDS, parallel=True,
                )  # fmt: skip

    def ceilings(self) -> Iterator[Measurement]:
        # By the process that comes next anyway.
        first = _ordered(self._s.presets, PREFILL_FIRST)[0]
        yield Measurement("ceilings", "ceilings", "ceilings", {}, first, 3.0)

    def models(self, presets: Sequence[str]) -> Iterator[Measurement]:
        """Reading and writing."""
        for preset in presets:
            for length in sorted(self._s.lengths, reverse=True):
                for model in ("ttt-e2e", "full-attention"):
                    yield self._reading(preset, length, model, {}, preset)
                if length == max(self._s.lengths):
                    yield self._writing(preset)
            if preset == self._s.long_preset:
                yield self._long_text(preset)

    def _reading(self, preset: str, length: int, model: str, more: dict[str, Any], group: str) -> Measurement:
        config = TTTConfig.preset(preset)
        if model == "full-attention":
            config = config.as_full_attention(length)
        once = prefill_flops_per_token(config, length) * length / self._rate
        runs = 2 + min(4.0, max(0.0, 2.0 / once - 1))
        return Measurement(
            key("prefill", preset, length, model, *more.values()), "prefill", f"prefill {model}",
            {"preset": preset, "length": length, **more}, group, 2.0 + runs * once, None,
        )  # fmt: skip

    def _writing(self, preset: str) -> Measurement:
        return Measurement(key("decode", preset), "decode", "decode", {"preset": preset}, preset, 5.0, None)

    def _long_text(self, preset: str) -> Measurement:
        length = self._s.long
        seconds = prefill_flops_per_token(TTTConfig.preset(preset), length) * length / self._rate
        arguments = {"preset": preset, "length": length}
        name = key("prefill", preset, length, "long text")
        return Measurement(
            name, "prefill", "long text", arguments, preset, 4.0 + (PASSES + 1) * seconds, None
        )

    def train(self, presets: Sequence[str]) -> Iterator[Measurement]:
        # The shortest and the longest first: they have bars.
        lengths = sorted(self._s.lengths)
        for preset in presets:
            for length in dict.fromkeys((lengths[0], lengths[-1], *lengths)):
                for model in ("ttt-e2e", "full-attention"):
                    yield self._learning(preset, length, model, {}, f"train {preset}")
            # What a token costs at different lengths is compared with as many sequences at a time.
            if lengths[-1] >= self._s.tokens_per_batch:
                for length in lengths[1:-1]:
                    yield self._learning(preset, length, "ttt-e2e", {"as_of": lengths[-1]}, f"train {preset}")

    def _learning(
        self, preset: str, length: int, model: str, more: dict[str, Any], group: str
    ) -> Measurement:
        config = TTTConfig.preset(preset)
        if model == "full-attention":
            config = config.as_full_attention(length)
        tokens = max(length, self._s.tokens_per_batch)
        seconds = training_flops_per_token(config, length) * tokens / self._rate
        return Measurement(
            key("train", preset, length, model, *more.values()), "train", f"train {model}",
            {"preset": preset, "length": length, "tokens_per_batch": self._s.tokens_per_batch, **more}, group,
            4.0 + min(seconds, 14.0 + seconds * length / tokens), None,
        )  # fmt: skip

    def operators(self) -> Iterator[Measurement]:
        for preset in _ordered(self._s.presets, PREFILL_FIRST):
            for name in names():
                yield Measurement(
                    key("operators", preset, name), "operators", "operator", {"preset": preset, "name": name},
                    "operators", 3.0, (name,),
                )  # fmt: skip

    def compiled(self) -> Iterator[Measurement]:
        """The baselines of the bars once more, compiled by torch.compile."""
        if not self._s.compiled_baselines:
            return
        more, group = {"style": "compiled"}, "compiled baselines"
        lengths = sorted(self._s.lengths)
        for preset in _ordered(self._s.presets, PREFILL_FIRST)[:1]:
            yield self._longer(self._reading(preset, lengths[-1], "full-attention", more, group))
        for preset in _ordered(self._s.train_presets, TRAIN_FIRST)[:1]:
            for length in dict.fromkeys((lengths[0], lengths[-1])):
                yield self._longer(self._learning(preset, length, "full-attention", more, group))

    @staticmethod
    def _longer(m: Measurement) -> Measurement:
        """With the time that compiling takes."""
        return Measurement(m.key, m.stage, m.task, m.arguments, m.group, m.seconds + 40.0, m.needs)

    def official(self) -> Iterator[Measurement]:
        preset, length = OFFICIAL
        if preset not in self._s.presets or length not in self._s.lengths:
            preset, length = self._s.presets[0], min(self._s.lengths)
        arguments = {"preset": preset, "length": length, "path": self._s.official}
        seconds = OFFICIAL_SECONDS if self._s.official else 0.0
        name = key("official", preset, length)
        yield Measurement(name, "official", "official", arguments, "official", seconds, None)


def _ordered(presets: Sequence[str], first: Sequence[str]) -> list[str]:
    known = [name for name in first if name in presets]
    return known + [name for name in presets if name not in known]


def _operator(case: str) -> Operator:
    """Of which it is a case."""
    return OPERATORS[case.split(" ")[0]]


def _family(case: str) -> str:
    """Of cases whose kernels are compiled by one process."""
    if case in ("swa", "swa_jvp"):
        return case
    return next((name for name in ("swiglu", "linear_ce") if case.startswith(name)), "the others")


def start_seconds(settings: Settings) -> float:
    """Until a process can begin to measure."""
    return START_SECONDS.get(settings.device.split(":")[0], 2.0)


def in_order(measurements: Sequence[Measurement]) -> list[list[Measurement]]:
    """Groups in the order of their first measurements."""
    groups: dict[str, list[Measurement]] = {}
    for m in measurements:
        groups.setdefault(m.group, []).append(m)
    return list(groups.values())


def describe(m: Measurement) -> str:
    """For progress."""
    length = m.arguments.get("length")
    return m.key if length is None else m.key.replace(str(length), in_words(length))
