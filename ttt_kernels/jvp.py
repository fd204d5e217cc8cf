"""The twin of an operator that takes tangents beside its arguments; it differentiates once in reverse.

With J the derivative of an operator f at its inputs, the tangent J t is what the double backward of f computes as the
cotangent of the output's cotangent, from t as the cotangents of the gradients. So the gradient of <J t, d> with respect
to t is J^T d, the backward of f for the cotangent d, and with respect to the inputs it is the rest of the double
backward, the gradient of <J^T d, t>. A twin needs no kernels of its own, but may have them where they share products
(`twin_of_kernels`).
"""

from collections.abc import Container, Sequence
from typing import Any

from torch import Tensor

from ttt_kernels.registry import Kernel, Operator
from ttt_kernels.tangents import total


def twin(base: Operator, own: dict[str, dict[str, Kernel]] | None = None, **fixed: Any) -> Operator:
    """The operator `<name>_jvp` of an operator with one output, on all its backends, composed of base's kernels.

    Its inputs are those of `base`, then a tangent for each that is differentiable, in their order, None being zero;
    its outputs are base's and "tangent", and its parameters base's without those that are fixed.

    Args:
        own: by backend and order, kernels that do in one pass what would be composed.
        fixed: values of parameters of base in every call.
    """
    instead = own or {}

    def fake(*given: Any) -> tuple[Any, ...]:
        out, *saved = base.fake(*given[: len(base.inputs)], *_settings(base, fixed, given[_count(base) :]))
        return out, out.new_empty(out.shape), *saved

    kernels = {name: composed(base, of, **fixed) | instead.get(name, {}) for name, of in base.kernels.items()}
    return twin_of_kernels(base, kernels, fake, base.saved, fixed, base.keeps)


def twin_of_kernels(
    base: Operator,
    kernels: dict[str, dict[str, Kernel]],
    fake: Kernel,
    saved: dict[str, str],
    fixed: Container[str] = (),
    keeps: tuple[str, ...] = (),
) -> Operator:
    """The same with given kernels, which may save and keep other values than base's."""
    (output,) = base.outputs
    dots = {f"{name}_dot": "Tensor?" for name in base.differentiable}
    return Operator(
        name=f"{base.name}_jvp",
        inputs={**base.inputs, **dots},
        params={name: kind for name, kind in base.params.items() if name not in fixed},
        outputs={output: "Tensor", "tangent": "Tensor"},
        saved=saved,
        differentiable=(*base.differentiable, *dots),
        fake=fake,
        kernels=kernels,
        refusals=base.refusals,
        keeps=keeps,
    )


def composed(base: Operator, of: dict[str, Kernel], **fixed: Any) -> dict[str, Kernel]:
    """A twin's kernels, composed of those of base's three orders on one backend, and saving what those save."""
    n_in, n_diff = len(base.inputs), len(base.differentiable)
    n_params = len(base.params) - len(fixed)

    def forward(*given: Any) -> tuple[Any, ...]:
        inputs, dots = given[:n_in], given[n_in : n_in + n_diff]
        every = _settings(base, fixed, given[n_in + n_diff :])
        out, *saved = of["forward"](*inputs, *every)
        kept = [out] if base.keeps else []
        # The tangent does not depend on a cotangent of the output: any tensor like it will do.
        needs = (True, *[False] * n_diff)
        tangent = of["double_backward"](*dots, out, *inputs, *kept, *saved, *every, needs)[0]
        return out, tangent, *saved

    def backward(d_out: Tensor, d_tangent: Tensor, *given: Any) -> tuple[Tensor | None, ...]:
        needs, given = given[-1], given[:-1]
        inputs, dots, rest = given[:n_in], given[n_in : n_in + n_diff], given[n_in + n_diff :]
        state = len(rest) - n_params
        every = (*inputs, *rest[:state], *_settings(base, fixed, rest[state:]))
        of_inputs, of_dots = needs[:n_diff], needs[n_diff:]
        to_inputs: tuple[Tensor | None, ...] = (None,) * n_diff
        to_dots: tuple[Tensor | None, ...] = (None,) * n_diff
        if any(of_inputs):
            direct = of["backward"](d_out, *every, of_inputs)
            # Without what base may carry, which nobody wants.
            through = of["double_backward"](*dots, d_tangent, *every, (False, *of_inputs))[1 : 1 + n_diff]
            to_inputs = tuple(total(a, b) for a, b in zip(direct, through, strict=True))
        if any(of_dots):
            to_dots = of["backward"](d_tangent, *every, of_dots)
        return (*to_inputs, *to_dots)

    return {"forward": forward, "backward": backward}


def _count(base: Operator) -> int:
    """How many inputs a twin has."""
    return len(base.inputs) + len(base.differentiable)


def _settings(base: Operator, fixed: dict[str, Any], given: Sequence[Any]) -> list[Any]:
    """All parameters of base, from a twin's."""
    free = iter(given)
    return [fixed[name] if name in fixed else next(free) for name in base.params]
