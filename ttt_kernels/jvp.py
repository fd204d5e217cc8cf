"""The twin of an operator that takes tangents beside its arguments; it differentiates once in reverse.

With J the derivative of an operator f at its inputs, the tangent J t is what the double backward of f computes as the
cotangent of the output's cotangent, from t as the cotangents of the gradients. So the gradient of <J t, d> with respect
to t is J^T d, the backward of f for the cotangent d, and with respect to the inputs it is the rest of the double
backward, the gradient of <J^T d, t>. A twin needs no kernels of its own.
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ttt_kernels.registry import Kernel, Operator
from ttt_kernels.tangents import total


def twin(base: Operator, **fixed: Any) -> Operator:
    """The operator `<name>_jvp` of an operator with one output.

    Its inputs are those of `base`, then a tangent for each that is differentiable, in their order, None being zero;
    its outputs are base's and "tangent", and its parameters base's without those that are fixed.

    Args:
        base: all its backends serve the twin too.
        fixed: values of parameters of base in every call.
    """
    (output,) = base.outputs
    n_in, n_diff = len(base.inputs), len(base.differentiable)
    params = {name: kind for name, kind in base.params.items() if name not in fixed}

    def settings(given: Sequence[Any]) -> list[Any]:
        free = iter(given)
        return [fixed[name] if name in fixed else next(free) for name in base.params]

    def kernels(of: dict[str, Kernel]) -> dict[str, Kernel]:
        def forward(*given: Any) -> tuple[Any, ...]:
            inputs, dots = given[:n_in], given[n_in : n_in + n_diff]
            every = settings(given[n_in + n_diff :])
            out, *saved = of["forward"](*inputs, *every)
            kept = [out] if base.keeps else []
            # The tangent does not depend on a cotangent of the output: any tensor like it will do.
            needs = (True, *[False] * n_diff)
            tangent = of["double_backward"](*dots, out, *inputs, *kept, *saved, *every, needs)[0]
            return out, tangent, *saved

        def backward(d_out: Tensor, d_tangent: Tensor, *given: Any) -> tuple[Tensor | None, ...]:
            needs, given = given[-1], given[:-1]
            inputs, dots, rest = given[:n_in], given[n_in : n_in + n_diff], given[n_in + n_diff :]
            state = len(rest) - len(params)
            every = (*inputs, *rest[:state], *settings(rest[state:]))
            of_inputs, of_dots = needs[:n_diff], needs[n_diff:]
            to_inputs: tuple[Tensor | None, ...] = (None,) * n_diff
            to_dots: tuple[Tensor | None, ...] = (None,) * n_diff
            if any(of_inputs):
                direct = of["backward"](d_out, *every, of_inputs)
                through = of["double_backward"](*dots, d_tangent, *every, (False, *of_inputs))[1:]
                to_inputs = tuple(total(a, b) for a, b in zip(direct, through, strict=True))
            if any(of_dots):
                to_dots = of["backward"](d_tangent, *every, of_dots)
            return (*to_inputs, *to_dots)

        return {"forward": forward, "backward": backward}

    def fake(*given: Any) -> tuple[Any, ...]:
        out, *saved = base.fake(*given[:n_in], *settings(given[n_in + n_diff :]))
        return out, out.new_empty(out.shape), *saved

    dots = {f"{name}_dot": "Tensor?" for name in base.differentiable}
    return Operator(
        name=f"{base.name}_jvp",
        inputs={**base.inputs, **dots},
        params=params,
        outputs={output: "Tensor", "tangent": "Tensor"},
        saved=base.saved,
        differentiable=(*base.differentiable, *dots),
        fake=fake,
        kernels={name: kernels(of) for name, of in base.kernels.items()},
        refusals=base.refusals,
        keeps=base.keeps,
    )
