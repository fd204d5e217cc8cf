"""The golden cases: everything that the official implementation computed, on every backend that can run."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from harness import BACKENDS
from safetensors.torch import safe_open, save_file
from torch import Tensor

from engine import TTTModel
from engine.golden import GoldenCase, carried_cases, load_golden
from engine.loss import METHODS
from engine.verify import Results, compare, compute, verify

FILES = sorted([*carried_cases(), *(Path(__file__).parent / "golden").glob("*.safetensors")])
INNER_LOOP = {"prefix output", "inner gradients", "inner gradient norms", "fast weights"}


def case_of(name: str) -> GoldenCase:
    return load_golden(next(path for path in FILES if path.stem == name))


@pytest.fixture(scope="module")
def results() -> Results:
    return compute(case_of("e2e-base"))


def test_all_cases_are_there() -> None:
    assert {path.stem for path in FILES} == {
        "e2e-base",
        "e2e-bf16",
        "e2e-clipped-warmup",
        "e2e-long",
        "e2e-noclip",
        "e2e-suffix-all-window-eq-chunk",
        "e2e-untied-headdim40",
        "full-attention",
        "swa-full",
    }


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
@pytest.mark.parametrize("method", METHODS)
def test_case(method: str, path: Path, backend: str) -> None:
    case = load_golden(path)
    checks = {check.group: check for check in verify(case, backend, method=method, snapshot_every=1)}
    expected = {"token nll", "loss", "meta-gradients"}
    if case.config.suffix_layers:
        expected |= INNER_LOOP
    if not case.config.ilr_warmup_steps:
        expected.add("token nll (prefill)")
        expected |= {"fast weights (prefill)"} if case.config.suffix_layers else set()
    assert set(checks) == expected
    bad = {group: f"{c.error:.2e} > {c.tolerance:.0e}" for group, c in checks.items() if not c.ok}
    assert not bad


def test_layout() -> None:
    case = case_of("e2e-untied-headdim40")
    model = TTTModel(case.config)
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    assert {name: weight.shape for name, weight in case.weights.items()} == shapes
    assert {name: gradient.shape for name, gradient in case.meta_grads.items()} == shapes
    assert case.final_fast is not None
    assert case.inner_grads is not None
    fast = case.final_fast[0]
    assert [tuple(weight.shape) for weight in fast] == [(1, 72, 80), (1, 72, 80), (1, 80, 72)]
    assert [weight.shape for weight in case.inner_grads[1][0]] == [weight.shape for weight in fast]
    assert case.tokens.shape == (1, 121)
    assert case.tokens.dtype == torch.int64


def test_baselines_have_no_fast_weights() -> None:
    for name, window in (("full-attention", None), ("swa-full", 32)):
        case = case_of(name)
        assert (case.config.suffix_layers, case.config.window) == (0, window)
        assert case.final_fast is None
        assert case.inner_grads is None
        assert case.prefix_output is None


@pytest.mark.parametrize(
    ("key", "group"),
    [
        ("metrics/token_nll_loss", "token nll"),
        ("loss", "loss"),
        ("prefix_output", "prefix output"),
        ("inner_grad_norm", "inner gradient norms"),
        (
            "inner_grad_step1/language_model.model.h.suffix_blocks.feed_forward_prime.w2.weight",
            "inner gradients",
        ),
        ("final_fast/language_model.model.h.suffix_blocks.feed_forward_prime.w3.weight", "fast weights"),
        ("meta_grad/language_model.model.h.blocks.seq_modeling_block.wq.weight", "meta-gradients"),
        ("meta_grad/language_model.model.wte.weight", "meta-gradients"),
    ],
)
def test_a_changed_result_fails_its_group(tmp_path: Path, results: Results, key: str, group: str) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors[key].view(-1)[0] += 0.01

    case = load_golden(rewrite(tmp_path, change))
    assert {check.group.removesuffix(" (prefill)") for check in compare(case, results) if not check.ok} == {
        group
    }


def test_zeros_and_nan_are_failures(tmp_path: Path, results: Results) -> None:
    key = "meta_grad/language_model.model.h.blocks.ffn_norm.weight"
    for value in (0.0, float("nan")):
        case = load_golden(rewrite(tmp_path, lambda tensors, value=value: tensors[key].fill_(value)))  # type: ignore[misc]
        assert [check.group for check in compare(case, results) if not check.ok] == ["meta-gradients"]


def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], object], **config: object) -> Path:
    source = next(path for path in FILES if path.stem == "e2e-base")
    with safe_open(source, "pt") as file:
        values = json.loads(file.metadata()["config"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    change(tensors)
    save_file(tensors, folder / "changed.safetensors", metadata={"config": json.dumps(values | config)})
    return folder / "changed.safetensors"


def test_what_is_no_golden_case_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "case.safetensors"
    with pytest.raises(ValueError, match="no such file"):
        load_golden(path)
    path.write_bytes(carried_cases()[0].read_bytes()[:5000])
    with pytest.raises(ValueError, match="is damaged"):
        load_golden(path)
    save_file({"loss": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match="it has no config"):
        load_golden(path)
    with pytest.raises(ValueError, match="it has no prefix_output"):
        load_golden(rewrite(tmp_path, lambda tensors: tensors.pop("prefix_output")))
    with pytest.raises(ValueError, match="qk_norm=False"):
        load_golden(rewrite(tmp_path, lambda tensors: None, qk_norm=False))
    with pytest.raises(ValueError, match="vocab_size=0 is not accepted"):
        load_golden(rewrite(tmp_path, lambda tensors: None, vocab_size=0))
