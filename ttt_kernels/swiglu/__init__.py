"""The gated MLP: (silu(x Wg^T) * (x Wu^T)) Wd^T."""

from dataclasses import dataclass

from torch import Tensor

from ttt_kernels import checks, tangents
from ttt_kernels.backends import refuse_on_cpu, refuse_on_triton
from ttt_kernels.registry import Kernel, Operator
from ttt_kernels.swiglu import cpu, jvp, products, reference, triton


def _fake(x: Tensor, w_gate: Tensor, w_up: Tensor, w_down: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    saved = (*x.shape[:-1], w_gate.shape[-2])
    return x.new_empty(x.shape), x.new_empty(saved), x.new_empty(saved)


operator = Operator(
    name="swiglu",
    inputs={"x": "Tensor", "w_gate": "Tensor", "w_up": "Tensor", "w_down": "Tensor"},
    params={},
    outputs={"y": "Tensor"},
    saved={"gate": "Tensor", "up": "Tensor"},
    differentiable=("x", "w_gate", "w_up", "w_down"),
    carries=("gate", "up"),
    fake=_fake,
    kernels={
        "reference": {
            "forward": reference.forward,
            "backward": reference.backward,
            "double_backward": reference.double_backward,
        },
        "cpu": {"forward": cpu.forward, "backward": cpu.backward, "double_backward": cpu.double_backward},
        "triton": {
            "forward": triton.forward,
            "backward": triton.backward,
            "double_backward": triton.double_backward,
        },
    },
    refusals={"cpu": refuse_on_cpu, "triton": refuse_on_triton},
)
jvp_operator = jvp.twin(operator)


@dataclass(frozen=True)
class Factored:
    """A backend's backward that leaves the weights' gradients as products of thin matrices over the tokens.

    Attributes:
        backward: `(dy, x, w_gate, w_up, w_down, gate, up, needs) -> (dx or None, Factors)`.
        weight_gradients: `(Factors, w_gate, w_up, w_down) -> gradients`, of the bits that `operator.backward` gives;
            of the weights it reads shapes and dtypes.
    """

    backward: Kernel
    weight_gradients: Kernel


FACTORED = {
    "reference": Factored(reference.factored_backward, reference.weight_gradients),
    "cpu": Factored(cpu.factored_backward, products.weight_gradients),
    "triton": Factored(triton.factored_backward, products.weight_gradients),
}


def swiglu(x: Tensor, w_gate: Tensor, w_up: Tensor, w_down: Tensor, *, backend: str | None = None) -> Tensor:
    """The gated MLP y = (silu(x w_gate^T) * (x w_up^T)) w_down^T (arXiv 2002.05202, equation 6).

    Args:
        x: (B, T, d), any floating dtype; with shared weights any leading dimensions, (..., d).
        w_gate: (i, d), shared, or (B, i, d), one set of weights per sequence. x's dtype, or float32 beside a
            bfloat16 or float16 x: then rounded to x's dtype for the products, its gradient in float32.
        w_up: as w_gate.
        w_down: (d, i) or (B, d, i), otherwise as w_gate.
        backend: None for the best that can run, or a backend's name.

    Returns:
        x's shape and dtype. Differentiable twice with respect to every argument (any number of times on the
        reference backend).

    Raises:
        ValueError: an argument has an unsuitable shape, dtype or device, or the backend cannot serve the
            call.
    """
    _check("swiglu", x, w_gate, w_up, w_down)
    chosen = operator.select(backend, x, w_gate, w_up, w_down)
    return operator.forward(x, w_gate, w_up, w_down, backend=chosen)[0]


def swiglu_jvp(
    x: Tensor,
    w_gate: Tensor,
    w_up: Tensor,
    w_down: Tensor,
    x_dot: Tensor | None = None,
    w_gate_dot: Tensor | None = None,
    w_up_dot: Tensor | None = None,
    w_down_dot: Tensor | None = None,
    *,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """`swiglu` and its directional derivative along the tangents of its arguments.

    Args:
        x, w_gate, w_up, w_down: as in `swiglu`.
        x_dot, w_gate_dot, w_up_dot, w_down_dot: shape, dtype and device of their arguments;
            None is zero and costs nothing.
        backend: None for the best that can run, or a backend's name.

    Returns:
        (y, tangent of y), both of x's shape and dtype. Differentiable once in reverse with respect to all eight
        tensors (any number of times on the reference backend).

    Raises:
        ValueError: as `swiglu`, or a tangent is not like its argument.
    """
    _check("swiglu_jvp", x, w_gate, w_up, w_down)
    tangents.check(
        "swiglu_jvp",
        x=(x, x_dot),
        w_gate=(w_gate, w_gate_dot),
        w_up=(w_up, w_up_dot),
        w_down=(w_down, w_down_dot),
    )
    arguments = (x, w_gate, w_up, w_down, x_dot, w_gate_dot, w_up_dot, w_down_dot)
    y, tangent, *_ = jvp_operator.forward(*arguments, backend=jvp_operator.select(backend, *arguments))
    return y, tangent


def _check(operator: str, x: Tensor, w_gate: Tensor, w_up: Tensor, w_down: Tensor) -> None:
    checks.floating(operator, x=x, w_gate=w_gate, w_up=w_up, w_down=w_down)
    checks.same_device(operator, x=x, w_gate=w_gate, w_up=w_up, w_down=w_down)
    checks.weight_dtype(operator, x, w_gate=w_gate, w_up=w_up, w_down=w_down)
    if x.dim() < 1:
        raise ValueError(f"{operator}: x has no dimensions; accepted is (..., d)")
    if w_gate.dim() not in (2, 3):
        raise ValueError(
            f"{operator}: w_gate has shape {checks.shape(w_gate)}; accepted are (i, d), shared, and (B, i, d)"
        )
    if w_gate.dim() == 3 and x.dim() != 3:
        raise ValueError(
            f"{operator}: x has shape {checks.shape(x)}; accepted is (B, T, d) beside one set of weights per "
            f"sequence, w_gate having shape {checks.shape(w_gate)}"
        )
    batch = tuple(x.shape[:1]) if w_gate.dim() == 3 else ()
    d, i = x.shape[-1], w_gate.shape[-2]
    expected = {"w_gate": (w_gate, (i, d)), "w_up": (w_up, (i, d)), "w_down": (w_down, (d, i))}
    for name, (weight, matrix) in expected.items():
        if tuple(weight.shape) != (*batch, *matrix):
            raise ValueError(
                f"{operator}: {name} has shape {checks.shape(weight)}; accepted is {(*batch, *matrix)}, x "
                f"having shape {checks.shape(x)} and w_gate {checks.shape(w_gate)}"
            )
