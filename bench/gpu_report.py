"""What bench/gpu.py found, as a person reads it: summary.md with tables, and plots beside it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from bench.gpu_bars import BARS, NotMeasured, baseline
from bench.gpu_plan import Measurement
from bench.gpu_plot import plot_all
from bench.gpu_store import Store
from bench.table import tokens as in_words
from engine.files import atomic_write

FILE = "summary.md"
Result = Mapping[str, Any]


def write_report(folder: Path, store: Store, everything: Sequence[Measurement]) -> str:
    """Writes `folder`/summary.md and the plots; returns the table of bars, and where the rest is."""
    pictures = plot_all(folder, store.results) if find_spec("matplotlib") else []
    text = "\n\n".join(
        [
            "# " + str(store.facts.get("gpu", store.facts["cpu"])),
            _facts(store.facts, store.settings),
            "## Bars",
            _bars(store),
            "## Ceilings",
            _ceilings(store.results.get("ceilings", {})),
            *(f"![{path.stem}]({path.name})" for path in pictures),
            *_sections(store, everything),
        ]
    )
    with atomic_write(folder / FILE) as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")
    return f"{_bars(store)}\n\n{folder / FILE}"


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """In Markdown; numbers, which are all columns but the first, to the right."""
    lines = ["| " + " | ".join(header) + " |", "|---" + "|---:" * (len(header) - 1) + "|"]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def _facts(facts: Result, settings: Result) -> str:
    changed = {True: ", with changes", False: "", None: ""}[facts["changed"]]
    commit = f"{facts['commit'][:12]}{changed}" if facts["commit"] else "not known to git here"
    rows = [
        ("commit", f"{commit} (sources {facts['sources']})"),
        *((name, str(facts[name])) for name in facts if name not in ("commit", "changed", "sources")),
        ("compute dtype", str(settings["dtype"])),
        ("tokens of a training batch", str(settings["tokens_per_batch"])),
    ]
    return table(("", ""), rows)


def _bars(store: Store) -> str:
    rows = [(bar.what, bar.published or "-", bar.words(), *bar.verdict(store.results)) for bar in BARS]
    return table(("what", "published", "bar", "measured", ""), rows)


def _ceilings(result: Result) -> str:
    if result.get("status") != "measured":
        return _why(result)
    rows = [
        ("matrix products, TFLOP/s", f"{result['product_flops_per_s'] / 1e12:.3g}"),
        ("copy, read and written, GB/s", f"{result['copy_bytes_per_s'] / 1e9:.4g}"),
    ]
    return table(("", "best"), rows)


def _sections(store: Store, everything: Sequence[Measurement]) -> list[str]:
    ceilings = store.results.get("ceilings", {})
    found: list[str] = []
    tables: tuple[tuple[str, str, Sequence[str], Callable[..., list[Sequence[str]]]], ...] = (
        ("Correctness", "checks", ("check", "", "worst error", "at most", "where"), _check_rows),
        (
            "Reading", "prefill",
            ("", "tokens/s", "seconds", "TFLOP/s", "of products", "memory, GiB", "full attention takes", ""),
            _prefill_rows,
        ),
        ("Writing", "decode", ("", "tokens/s", "ms", "GB/s", "of copy"), _decode_rows),
        (
            "Training", "train",
            ("", "seconds a batch", "tokens/s", "TFLOP/s", "of products", "memory, GiB", "full attention takes", ""),
            _train_rows,
        ),
        ("The official code", "official", ("", "seconds", "tokens/s", "mean loss", ""), _official_rows),
        (
            "Operators, one mini-batch", "operators",
            ("", "order", "ms", "of the ceiling", "bound by", "error", "others, ms"), _operator_rows,
        ),
    )  # fmt: skip
    for title, stage, header, make in tables:
        rows: list[Sequence[str]] = []
        for m in everything:
            if m.stage != stage or m.task.startswith("compile"):
                continue
            result = store.results.get(m.key, {"status": "skipped", "reason": "not asked for yet"})
            if result["status"] == "measured":
                rows += make(_name(m), m, result, ceilings, store.results)
            else:
                rows.append([_name(m), _why(result), *[""] * (len(header) - 2)])
        found += [f"## {title}", table(header, rows)]
    return found


def _name(m: Measurement) -> str:
    words = [in_words(int(w)) if w.isdigit() else w for w in m.key.split(" ")[1:]]
    if "as_of" in m.arguments:
        words[-1:] = ["as of", words[-1]]
    return " ".join(words)


def _why(result: Result) -> str:
    return f"not measured ({result.get('reason', result.get('status', 'not asked for yet'))})"


def _rate(result: Result, ceilings: Result) -> tuple[str, str]:
    per_s = result["flops"] / result["seconds"]
    peak = ceilings.get("product_flops_per_s")
    return f"{per_s / 1e12:.3g}", "-" if peak is None else f"{per_s / peak:.0%}"


def _memory(count: int) -> str:
    return f"{count / 2**30:.2f}"


def _check_rows(name: str, m: Measurement, result: Result, *_: Any) -> list[Sequence[str]]:
    parts = result["orders"] if "orders" in result else result["groups"]
    worst = max(parts, key=lambda part: (not part.get("repeats", True), part["error"] / part["tolerance"]))
    where = " ".join(str(v) for k, v in worst.items() if k not in ("error", "tolerance", "repeats"))
    if not worst.get("repeats", True):
        where += ", whose results differ from run to run"
    verdict = "green" if result["green"] else "**RED**"
    return [(name, verdict, f"{worst['error']:.1e}", f"{worst['tolerance']:.1e}", where)]


def _beside(results: Result, m: Measurement, result: Result) -> str:
    """How many times as long full attention takes, on the line of TTT-E2E."""
    if not m.task.endswith("ttt-e2e") or "as_of" in m.arguments:
        return ""
    try:
        other = baseline(results, m.stage, m.arguments["preset"], m.arguments["length"])
    except NotMeasured:
        return "not measured"
    return f"{other['seconds'] / result['seconds']:.2f}x"


def _prefill_rows(
    name: str, m: Measurement, result: Result, ceilings: Result, results: Result
) -> list[Sequence[str]]:
    speed = (f"{result['tokens_per_s']:,.0f}", f"{result['seconds']:.3f}", *_rate(result, ceilings))
    if m.task == "long text":
        memory = _memory(max(result["memory_by_part"]))
        flat = f"time per token, end over beginning: {result['late_over_early']:.3f}"
        return [(name, *speed, memory, "", flat)]
    memory = _memory(result["peak_memory_bytes"])
    note = f"{result['attention']}, {result['style']}" if "attention" in result else ""
    return [(name, *speed, memory, _beside(results, m, result), note)]


def _decode_rows(name: str, m: Measurement, result: Result, ceilings: Result, *_: Any) -> list[Sequence[str]]:
    top = ceilings.get("copy_bytes_per_s")
    share = "-" if top is None else f"{result['bytes_per_s'] / top:.0%}"
    speed = f"{result['tokens_per_s']:.1f}", f"{result['seconds'] * 1e3:.3f}"
    return [(name, *speed, f"{result['bytes_per_s'] / 1e9:.4g}", share)]


def _train_rows(
    name: str, m: Measurement, result: Result, ceilings: Result, results: Result
) -> list[Sequence[str]]:
    note = f"{result['micro_batches']} micro-batches of {result['micro_batch']}"
    if result["micro_batches_measured"] < result["micro_batches"]:
        note += f", {result['micro_batches_measured']} of them measured"
    if "attention" in result:
        note += f"; {result['attention']}, {result['style']}"
    note += f"; computed again: {result['recompute']}"
    return [
        (
            name, f"{result['seconds']:.3f}", f"{result['tokens_per_s']:,.0f}", *_rate(result, ceilings),
            _memory(result["extra_memory_bytes"]), _beside(results, m, result), note,
        )
    ]  # fmt: skip


def _official_rows(name: str, m: Measurement, result: Result, *_: Any) -> list[Sequence[str]]:
    speed = f"{result['seconds']:.3f}", f"{result['tokens_per_s']:,.0f}"
    others = "".join(f" ({way}: {words})" for way, words in result["others"].items())
    note = f"{result['settings']}{others}; jax {result['jax']}, {result['device']}"
    return [(name, *speed, f"{result['mean_nll']:.4f}", note)]


def _operator_rows(
    name: str, m: Measurement, result: Result, ceilings: Result, *_: Any
) -> list[Sequence[str]]:
    rows: list[Sequence[str]] = []
    for order, found in result["orders"].items():
        if "seconds" not in found:
            rows.append((f"{name}, {result['backend']}", order, found["reason"], "", "", "", ""))
            continue
        share, bound = _binding(found, ceilings)
        error = f"{found['error']:.1e} (at most {found['tolerance']:.1e})"
        others = ", ".join(f"{rival} {s * 1e3:.3f}" for rival, s in found["baselines"].items())
        launched = " with launches" if found["launches_included"] else ""
        milliseconds = f"{found['seconds'] * 1e3:.3f}{launched}"
        rows.append((f"{name}, {result['backend']}", order, milliseconds, share, bound, error, others))
    return rows


def _binding(found: Result, ceilings: Result) -> tuple[str, str]:
    """The share that was reached of the ceiling that leaves least, and which one that is."""
    if "product_flops_per_s" not in ceilings:
        return "-", "-"
    least = {"memory": found["bytes"] / ceilings["copy_bytes_per_s"]}
    if found["flops"] is not None:
        least["products"] = found["flops"] / ceilings["product_flops_per_s"]
    bound = max(least, key=lambda name: least[name])
    return f"{least[bound] / found['seconds']:.0%}", bound
