"""bench/kernels.py for every operator but attention: what it counts, what it checks, what it writes and refuses."""

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import (
    inner_step_problem,
    kernel_child,
    kernel_contenders,
    kernels,
    kernels_clipped_sgd,
    kernels_inner_step,
    kernels_linear_ce,
    kernels_rms_norm,
    kernels_rope,
    kernels_swiglu,
    linear_ce_problem,
    machine,
)
from bench.flops import inner_step_flops_per_token
from engine import TTTConfig
from ttt_kernels.registry import OPERATORS

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")
ORDERS = ("forward", "backward", "double-backward")
STEP = inner_step_problem.Problem("tiny", 2, 12, 7, 2, 40, "float32")
PROBLEMS: dict[str, Any] = {
    "swiglu": kernels_swiglu.Problem(2, 5, 8, 12, False, "float32"),
    "linear_cross_entropy": linear_ce_problem.Problem(6, 8, 50, "float32"),
    "rms_norm": kernels_rms_norm.Problem(2, 5, 8, True, "float32"),
    "rope": kernels_rope.Problem(2, 5, 3, 8, "float32"),
    "clipped_sgd": kernels_clipped_sgd.Problem(2, 2, 6, 8, "float32"),
}
NAMES = {
    "swiglu": "swiglu",
    "linear_cross_entropy": "linear_ce",
    "rms_norm": "rms_norm",
    "rope": "rope",
    "clipped_sgd": "clipped_sgd",
}
SMALL = {
    "swiglu": ["--tokens", "5", "--hidden", "8", "--intermediate", "12"],
    "linear_cross_entropy": ["--tokens", "6", "--hidden", "8", "--vocab", "50"],
    "rms_norm": ["--tokens", "5", "--hidden", "8"],
    "rope": ["--tokens", "5", "--heads", "3", "--head-dim", "8"],
    "clipped_sgd": ["--blocks", "2", "--hidden", "6", "--intermediate", "8"],
    "inner_step": ["--preset", "tiny", "--mini-batch", "12", "--window", "7", "--vocab", "40"],
}
COMMON = ["--dtype", "float32", "--repeat", "2", "--backend", "reference"]
BASELINES = {
    "swiglu": ("plain",),
    "linear_cross_entropy": ("plain", "chunked"),
    "rms_norm": ("plain",),
    "rope": ("plain", "complex"),
    "clipped_sgd": ("plain",),
    "inner_step": ("autograd",),
}


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the seconds that ceilings and processes take."""
    monkeypatch.setattr(machine, "product_rate", lambda dtype, device: 1e11)
    monkeypatch.setattr(machine, "copy_bandwidth", lambda device: 1e10)
    monkeypatch.setattr(kernels, "in_child", kernel_child.run)


def rows_of(operator: str, folder: Path, *arguments: str, status: int = 0) -> list[dict[str, Any]]:
    file = folder / "rows.json"
    assert kernels.main([operator, *SMALL[operator], *COMMON, *arguments, "--json", str(file)]) == status
    rows: list[dict[str, Any]] = json.loads(file.read_text())
    return rows


def test_useful_operations_are_those_of_every_product() -> None:
    swiglu, loss = PROBLEMS["swiglu"], PROBLEMS["linear_cross_entropy"]
    assert [swiglu.flops(o) / (2 * 10 * 8 * 12) for o in (*ORDERS, "all")] == [3, 6, 16, 25]
    assert [loss.flops(o) / (2 * 6 * 8 * 50) for o in (*ORDERS, "all")] == [1, 2, 6, 9]
    assert loss.flops("forward-backward") == loss.flops("forward") + loss.flops("backward")


def test_useful_operations_of_the_inner_step_are_its_formula() -> None:
    config = TTTConfig.preset("tiny", num_layers=2, suffix_layers=2, vocab_size=40)
    d, i, s, w = config.hidden_size, config.intermediate_size, 2, 7
    blocks = 2 * s * (4 * d * d + 3 * d * i) + 2 * s * 3 * d * i + 4 * s * d * w
    head = 2 * d * 40 + 2 * d * 40
    step = 2 * (s - 1) * (4 * d * d + 6 * d * i) + 8 * (s - 1) * d * w
    step += 2 * (3 * d * i) + 2 * d * i + 2 * s * 3 * d * i
    assert inner_step_flops_per_token(config, w) == blocks + head + step
    assert STEP.flops("forward") == 2 * 12 * (blocks + head + step)


def test_useful_bytes_are_those_of_every_tensor() -> None:
    norm, turned, step = (PROBLEMS[name] for name in ("rms_norm", "rope", "clipped_sgd"))
    x = 2 * 5 * 8 * 4
    assert [norm.bytes(o) / x for o in (*ORDERS, "all")] == [3, 3, 6, 12]
    assert [replace(norm, residual=False).bytes(o) / x for o in (*ORDERS, "all")] == [2, 3, 5, 10]
    assert [turned.bytes(o) / (2 * 5 * 3 * 8 * 4) for o in (*ORDERS, "all")] == [2, 2, 2, 6]
    weights = 2 * 2 * 3 * 6 * 8
    assert step.length == weights / 2
    assert [step.bytes(o) / (4 * weights) for o in (*ORDERS, "all")] == [4, 5, 9, 18]
    assert replace(step, dtype="bfloat16").bytes("forward") == step.bytes("forward") / 2


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("operator", PROBLEMS)
def test_every_contender_computes_the_same(operator: str, dtype: str) -> None:
    module = kernels.OPERATORS[operator]
    problem = replace(PROBLEMS[operator], dtype=dtype)
    truths = module.truths(problem, module.ORDERS)
    for name in ("ttt_kernels/reference", *BASELINES[operator]):
        contender = module.contender(name)
        for order in contender.orders:
            x = contender.arrange(problem.inputs(CPU))
            found = contender.rearrange(contender.prepare(problem, x, order)())
            for error, tolerance in module.verdicts(found, *truths["whole"][order]):
                assert error <= tolerance, (name, order)


@pytest.mark.parametrize(
    ("operator", "changed"),
    [("swiglu", {"grouped": True}), ("rms_norm", {"residual": False}), ("clipped_sgd", {"batch": 1})],
)
def test_so_do_they_with_other_settings(operator: str, changed: dict[str, Any]) -> None:
    module, problem = kernels.OPERATORS[operator], replace(PROBLEMS[operator], **changed)
    truths = module.truths(problem, module.ORDERS)
    for name in ("ttt_kernels/reference", *BASELINES[operator]):
        contender = module.contender(name)
        for order in contender.orders:
            found = contender.prepare(problem, contender.arrange(problem.inputs(CPU)), order)()
            assert all(e <= t for e, t in module.verdicts(found, *truths["whole"][order])), (name, order)


def test_a_part_of_the_loss_is_that_of_the_whole() -> None:
    problem = linear_ce_problem.Problem(40, 8, 300, "float32")
    formulas = kernels_linear_ce.OwnLoss("reference")
    orders = ("forward", "backward", "double-backward", "all")
    whole = linear_ce_problem.everything(formulas, problem, orders)
    part = linear_ce_problem.sampled(problem, orders)
    for order in orders:
        results, tolerances, places = part[order]
        for all_of_it, some, tolerance, place in zip(
            whole[order][0], results, tolerances, places, strict=True
        ):
            assert torch.allclose(
                all_of_it if place is None else all_of_it[place], some, rtol=1e-10, atol=1e-12
            )
            assert tolerance < 1e-5
    rows, classes = part["backward"][2]
    assert rows is not None
    assert classes is not None
    assert (len(rows), rows[0], rows[-1]) == (16, 0, 39)
    assert set(problem.inputs(CPU).constants[0][rows].tolist()) <= set(classes.tolist())


@pytest.mark.parametrize("suffix", [1, 3])
def test_the_inner_step_is_that_of_autograd(suffix: int) -> None:
    # The mean's factor is float32, which holds 1 / 16 exactly.
    problem = replace(STEP, suffix_layers=suffix, mini_batch=16, dtype="float64")
    found = [
        kernels_inner_step.contender(name).prepare(problem, problem.inputs(CPU), "forward")()
        for name in ("ttt_kernels/reference", "autograd")
    ]
    before = [t for block in problem.inputs(CPU).fast.masters for t in block]
    assert len(found[0]) == 1 + 2 * len(before) == 1 + 6 * suffix
    for own, autograd in zip(*found, strict=True):
        assert torch.allclose(own, autograd, rtol=1e-9, atol=1e-12)
    for new, old in zip(found[0][1 + len(before) :], before, strict=True):
        assert (new - old).norm() > 0


def test_the_inner_step_is_repeated_on_what_it_left() -> None:
    inputs = STEP.inputs(CPU)
    work = kernels_inner_step.contender("ttt_kernels/reference").prepare(STEP, inputs, "forward")
    lengths = {window.length for window in inputs.windows}
    first = work()[0].clone()
    assert {window.length for window in inputs.windows} == lengths
    assert (work()[0] - first).abs().max() > 0


def test_what_the_results_take_is_not_counted_beyond_them() -> None:
    given, new = torch.ones(10), torch.ones(6, dtype=torch.float64)
    assert kernel_child.new_bytes([given[:5], new, new[2:]], [given, (True, False)]) == 48


@pytest.mark.slow
@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("operator", SMALL)
def test_an_object_for_every_contender_and_order(
    operator: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    module = kernels.OPERATORS[operator]
    rows = rows_of(operator, tmp_path)
    contenders = ("ttt_kernels/reference", *BASELINES[operator])
    expected = {(name, order) for name in contenders for order in module.contender(name).orders}
    assert {(r["contender"], r["order"]) for r in rows} == expected
    products = module.CEILING == "products"
    unit, share = ("flops", "share_of_peak") if products else ("bytes", "share_of_copy")
    for r in rows:
        assert (r["operator"], r["status"], r["dtype"]) == (operator, "measured", "float32")
        assert r[f"{unit}_per_s"] == pytest.approx(r[unit] / r["seconds_best"])
        assert r[share] == pytest.approx(r[f"{unit}_per_s"] / (1e11 if products else 1e10))
        assert r["peak_flops_per_s" if products else "copy_bytes_per_s"] > 0
        assert 0 < r["error"] <= r["tolerance"] < 1e-4
        assert r["extra_peak_memory_bytes"] >= 0
        beyond = r.get("extra_beyond_outputs_bytes")
        assert (beyond is not None) == (operator == "linear_cross_entropy")
        assert beyond is None or 0 <= beyond <= r["extra_peak_memory_bytes"]
        assert ("times_faster" in r) == r["own"]
    out = capsys.readouterr().out
    assert ("GFLOP/s" if products else "GB/s") in out
    assert ("beyond outputs" in out) == (operator == "linear_cross_entropy")


@pytest.mark.slow
@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("operator", NAMES)
def test_no_speed_is_reported_of_a_wrong_result(
    operator: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel = OPERATORS[NAMES[operator]].kernels["reference"]
    right = kernel["backward"]
    truths = kernels.OPERATORS[operator].truths

    def wrong(*arguments: Any, **settings: Any) -> Any:
        results = list(right(*arguments, **settings))
        flat = [t for t in kernel_contenders.flat(results) if t.is_floating_point()]
        flat[-1].mul_(1 + 1e-4)
        return tuple(results)

    def honest(*arguments: Any) -> Any:
        with monkeypatch.context() as patch:
            patch.setitem(kernel, "backward", right)
            return truths(*arguments)

    monkeypatch.setattr(kernels.OPERATORS[operator], "truths", honest)
    monkeypatch.setitem(kernel, "backward", wrong)
    rows = rows_of(operator, tmp_path, "--orders", *ORDERS, "--baselines", "none", status=1)
    found = {r["order"]: r for r in rows}
    assert {order: r["status"] for order, r in found.items()} == {
        "forward": "measured",
        "backward": "wrong",
        "double-backward": "measured",
    }
    assert found["backward"]["error"] == pytest.approx(1e-4, rel=0.2)
    assert not [
        key for key in found["backward"] if "per_s" in key and "copy" not in key and "peak" not in key
    ]
    assert "seconds" not in found["backward"]


@pytest.mark.usefixtures("quick")
def test_no_speed_is_reported_of_a_wrong_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = kernels_inner_step.inner_gradient

    def wrong(*arguments: Any) -> list[torch.Tensor]:
        *grads, last = right(*arguments)
        return [*grads, last * (1 + 1e-3)]

    truths = kernels_inner_step.truths

    def honest(*arguments: Any) -> Any:
        with monkeypatch.context() as patch:
            patch.setattr(kernels_inner_step, "inner_gradient", right)
            return truths(*arguments)

    monkeypatch.setattr(kernels_inner_step, "inner_gradient", wrong)
    monkeypatch.setattr(kernels_inner_step, "truths", honest)
    rows = rows_of("inner_step", tmp_path, status=1)
    assert {r["contender"]: r["status"] for r in rows} == {
        "ttt_kernels/reference": "wrong",
        "autograd": "measured",
    }


@pytest.mark.usefixtures("quick")
def test_an_error_in_a_row_that_only_the_full_size_has_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(linear_ce_problem, "CHECK_TOKENS", 3)
    kernel = OPERATORS["linear_ce"].kernels["reference"]
    right = kernel["forward"]

    def wrong(*arguments: Any) -> Any:
        nll, *rest = right(*arguments)
        nll = nll.clone()
        nll[3:] *= 1 + 1e-4
        return nll, *rest

    monkeypatch.setitem(kernel, "forward", wrong)
    monkeypatch.setattr(linear_ce_problem.reference, "forward", right)
    arguments = ("--orders", "forward", "--baselines", "none")
    truths = kernels_linear_ce.truths

    def honest(*given: Any) -> Any:
        with monkeypatch.context() as patch:
            patch.setitem(kernel, "forward", right)
            return truths(*given)

    monkeypatch.setattr(kernels_linear_ce, "truths", honest)
    assert [r["status"] for r in rows_of("linear_cross_entropy", tmp_path, *arguments, status=1)] == ["wrong"]


@pytest.mark.slow
@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("operator", ["swiglu", "linear_cross_entropy", "rms_norm", "rope"])
def test_packages_that_are_not_there_have_a_reason(
    operator: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    rows = rows_of(operator, tmp_path, "--baselines", "liger", "fla")
    skipped = {r["contender"]: r for r in rows if not r["own"]}
    assert set(skipped) == {"liger", "fla"}
    assert all(r["status"] == "skipped" and r["reason"] for r in skipped.values())
    assert "not measured:" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.usefixtures("quick")
def test_what_would_not_fit_is_left_out_with_a_reason(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    logits = 6 * 50 * 4
    monkeypatch.setattr(kernels, "available_bytes", lambda device: int(5 * logits / 0.6))
    rows = rows_of("linear_cross_entropy", tmp_path, "--baselines", "plain")
    statuses = {r["order"]: r["status"] for r in rows if not r["own"]}
    assert statuses == {
        "forward": "measured",
        "backward": "measured",
        "forward-backward": "measured",
        "double-backward": "skipped",
        "all": "skipped",
    }


@pytest.mark.parametrize(
    ("operator", "arguments", "named"),
    [
        ("swiglu", ["--tokens", "5", "0"], "--tokens=0"),
        ("swiglu", ["--intermediate", "0"], "--intermediate=0"),
        ("swiglu", ["--sequences", "0"], "--sequences=0"),
        ("swiglu", ["--sequences", "2", "--batch", "2"], "--batch=2"),
        ("swiglu", ["--backend", "abacus"], "abacus"),
        ("swiglu", ["--baselines", "abacus"], "abacus"),
        ("linear_cross_entropy", ["--vocab", "1"], "--vocab=1"),
        ("linear_cross_entropy", ["--hidden", "-1"], "--hidden=-1"),
        ("rms_norm", ["--hidden", "0"], "--hidden=0"),
        ("rms_norm", ["--backend", "cuda"], "cuda"),
        ("rope", ["--head-dim", "7"], "--head-dim=7"),
        ("rope", ["--heads", "0"], "--heads=0"),
        ("clipped_sgd", ["--blocks", "0"], "--blocks=0"),
        ("clipped_sgd", ["--plot", "plot.png"], "two lengths"),
        ("inner_step", ["--preset", "huge"], "huge"),
        ("inner_step", ["--mini-batch", "0"], "--mini-batch=0"),
        ("inner_step", ["--window", "0"], "--window=0"),
        ("inner_step", ["--suffix-layers", "0"], "--suffix-layers=0"),
        ("inner_step", ["--backend", "abacus"], "abacus"),
        ("inner_step", ["--repeat", "0"], "--repeat=0"),
    ],
)
@pytest.mark.usefixtures("quick")
def test_bad_input_is_refused_in_one_line(
    operator: str,
    arguments: list[str],
    named: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert kernels.main([operator, *SMALL[operator], *COMMON, "--json", "rows.json", *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert len(err.splitlines()) == 1
    assert named in err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("operator", SMALL)
def test_defaults_are_a_125m(operator: str) -> None:
    module = kernels.OPERATORS[operator]
    parser = argparse.ArgumentParser()
    module.add_arguments(parser)
    args = parser.parse_args([])
    args.batch = 1
    (problem,) = module.problems(args, "float32")
    expected = {
        "swiglu": kernels_swiglu.Problem(1, 1024, 768, 1664, False, "float32"),
        "linear_cross_entropy": linear_ce_problem.Problem(1024, 768, 128256, "float32"),
        "rms_norm": kernels_rms_norm.Problem(1, 16384, 768, True, "float32"),
        "rope": kernels_rope.Problem(1, 16384, 12, 64, "float32"),
        "clipped_sgd": kernels_clipped_sgd.Problem(1, 3, 768, 1664, "float32"),
        "inner_step": inner_step_problem.Problem("125m", 1, 1024, 8192, 3, 128256, "float32"),
    }
    assert problem == expected[operator]


@pytest.mark.slow
@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("operator", PROBLEMS)
def test_compiled_formulas_compute_the_same(operator: str, tmp_path: Path) -> None:
    rows = rows_of(operator, tmp_path, "--orders", "forward", "backward", "--baselines", "compiled")
    assert {(r["contender"], r["order"]): r["status"] for r in rows if not r["own"]} == {
        ("compiled", "forward"): "measured",
        ("compiled", "backward"): "measured",
    }
