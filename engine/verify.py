"""Checks this installation against golden cases: everything that the official code computed, by groups."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from engine.golden import GoldenCase
from engine.loss import loss
from engine.model import FAST_MATRICES, TTTModel
from engine.weights import Fast

# The tolerances of the golden cases' authors: about five times what an independent implementation was off by.
# In fp32 a nll and a fast weight are compared by their worst element, gradients tensor by tensor; in bf16,
# where single elements are noise, by the mean and all together. The norms and the prefix output, for which
# none were published: that of the gradients, and five and three times what a plain fp32 and bf16
# implementation was off by.
_TOLERANCES = {
    "float32": {
        "token nll": 2e-5,
        "loss": 2e-6,
        "prefix output": 1e-5,
        "inner gradients": 1e-4,
        "inner gradient norms": 1e-4,
        "fast weights": 5e-6,
        "meta-gradients": 1e-4,
    },
    "bfloat16": {
        "token nll": 0.02,
        "loss": 3e-3,
        "prefix output": 0.03,
        "inner gradients": 0.1,
        "inner gradient norms": 0.1,
        "fast weights": 0.1,
        "meta-gradients": 0.3,
    },
}


@dataclass(frozen=True)
class Check:
    """How far one group of results is from the golden ones."""

    group: str
    error: float
    tolerance: float

    @property
    def ok(self) -> bool:
        """Whether the error is a number, and one within the tolerance."""
        return self.error <= self.tolerance


@dataclass(frozen=True)
class Results:
    """What this installation computes for a golden case; fields as in `GoldenCase`, and those of prefill."""

    loss: Tensor
    nll: Tensor
    meta_grads: dict[str, Tensor]
    prefix_output: Tensor
    inner_norms: Tensor
    inner_grads: Sequence[Fast]
    final_fast: Fast
    prefill_nll: Tensor | None
    """(1, T); None where the inner rate warms up, since prefill always takes full steps."""
    prefill_fast: Fast


def verify(
    case: GoldenCase,
    backend: str | None = None,
    device: torch.device | str = "cpu",
    **options: Any,
) -> list[Check]:
    """Runs `case` on `backend` (None: the best that can run) and compares every group of its results.

    `options` are those of `TTTModel.loss`. Raises `ValueError` for a backend that cannot run on the device.
    """
    return compare(case, compute(case, backend, device, **options))


def compute(
    case: GoldenCase,
    backend: str | None = None,
    device: torch.device | str = "cpu",
    **options: Any,
) -> Results:
    """Runs `case` by `loss`, its gradients included, and by `prefill`; the results are brought to the CPU."""
    model = TTTModel(case.config, device=device)
    model.load_state_dict(case.weights)
    tokens = case.tokens.to(device)
    out = loss(model, tokens, case.step, backend=backend, keep_inner_grads=2, **options)
    out.loss.backward()
    state = model.init_state(batch_size=1)
    nll = None
    if not case.config.ilr_warmup_steps:
        nll = model.prefill(tokens, state, backend=backend).nll[:, 1:].cpu()
    return Results(
        loss=out.loss.detach().cpu(),
        nll=out.nll.detach().cpu(),
        meta_grads={
            name: _required(name, parameter.grad).cpu() for name, parameter in model.named_parameters()
        },
        prefix_output=out.prefix_output.detach().cpu(),
        inner_norms=out.inner_norms.cpu(),
        inner_grads=[_on_cpu(grads) for grads in out.inner_grads],
        final_fast=_on_cpu(out.fast),
        prefill_nll=nll,
        prefill_fast=_on_cpu(state.fast_weights()),
    )


def _on_cpu(fast: Fast) -> Fast:
    return tuple((g.detach().cpu(), u.detach().cpu(), d.detach().cpu()) for g, u, d in fast)


def compare(case: GoldenCase, results: Results) -> list[Check]:
    """The worst error of every group that `case` has, against its tolerance."""
    errors = {
        "token nll": _nll_error(case, results.nll),
        "loss": (results.loss - case.loss).abs().item(),
        "meta-gradients": _gradient_error(case, _split(results.meta_grads), _split(case.meta_grads)),
    }
    if case.config.suffix_layers:
        errors |= {
            "prefix output": _relative(
                [results.prefix_output], [_required("prefix output", case.prefix_output)]
            ),
            "inner gradients": _gradient_error(
                case, _flat(results.inner_grads), _flat(case.inner_grads or ())
            ),
            "inner gradient norms": _norm_error(results.inner_norms, _required("norms", case.inner_norms)),
            "fast weights": _fast_error(case, results.final_fast),
        }
    if results.prefill_nll is not None:
        errors["token nll (prefill)"] = _nll_error(case, results.prefill_nll)
        if case.config.suffix_layers:
            errors["fast weights (prefill)"] = _fast_error(case, results.prefill_fast)
    tolerances = _TOLERANCES[case.config.compute_dtype]
    return [Check(name, error, tolerances[name.removesuffix(" (prefill)")]) for name, error in errors.items()]


def _exact(case: GoldenCase) -> bool:
    return case.config.compute_dtype == "float32"


def _nll_error(case: GoldenCase, nll: Tensor) -> float:
    error = (nll - case.nll).abs()
    return float(error.max() if _exact(case) else error.mean())


def _fast_error(case: GoldenCase, fast: Fast) -> float:
    got, want = _flat([fast]), _flat([case.final_fast or ()])
    if _exact(case):
        return _worst(float((a - b).abs().max()) for a, b in zip(got, want, strict=True))
    suffix = range(case.config.prefix_layers, case.config.num_layers)
    start = [case.weights[f"blocks.{index}.{name}"][None] for index in suffix for name in FAST_MATRICES]
    moved = [b - s for b, s in zip(want, start, strict=True)]
    return _relative([a - s for a, s in zip(got, start, strict=True)], moved)


def _gradient_error(case: GoldenCase, got: list[Tensor], want: list[Tensor]) -> float:
    if _exact(case):
        return _worst(_relative([a], [b]) for a, b in zip(got, want, strict=True))
    return _relative(got, want)


def _norm_error(got: Tensor, want: Tensor) -> float:
    return ((got - want) / want).abs().max().item()


def _split(gradients: dict[str, Tensor]) -> list[Tensor]:
    # Values have far larger gradients than queries and keys, whose errors would not show in the whole.
    parts = {name: g.chunk(3) if name.endswith("w_qkv") else (g,) for name, g in gradients.items()}
    return [part for name in sorted(parts) for part in parts[name]]


def _flat(groups: Iterable[Fast]) -> list[Tensor]:
    return [tensor for group in groups for block in group for tensor in block]


def _relative(got: list[Tensor], want: list[Tensor]) -> float:
    difference = torch.stack(
        [(a.double() - b.double()).norm() for a, b in zip(got, want, strict=True)]
    ).norm()
    # All zeros to compare with give inf or NaN: a failure, as it must be.
    return float(difference / torch.stack([b.double().norm() for b in want]).norm())


def _worst(errors: Iterable[float]) -> float:
    # Unlike the built-in max, never loses a NaN.
    return float(torch.tensor(list(errors), dtype=torch.float64).max())


def _required(name: str, tensor: Tensor | None) -> Tensor:
    if tensor is None:
        raise AssertionError(f"{name} is not there")
    return tensor
