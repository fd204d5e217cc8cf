"""What every operator promises, at every order and on every backend that runs here."""

from typing import Any

import pytest
import torch
from harness import EVERY_BACKEND, assert_within_budget
from operators import EXAMPLES, KERNELS, Example, flat
from torch import Tensor
from torch.library import opcheck

from ttt_kernels.registry import OPERATORS, ORDERS

BASES = tuple(name for name, example in EXAMPLES.items() if example.operator.orders("reference") == ORDERS)
ONCE = tuple(name for name in EXAMPLES if name not in BASES)
"""Differentiable once on kernels: what they compute has a derivative in it already."""
COMPILED = tuple(name for name in KERNELS if name != "triton")
OWN_PRODUCTS = tuple(n for n in EXAMPLES if not n.startswith(("swiglu", "linear_ce")))
"""Whose products are not the BLAS's."""
# A copy of 16 bits has no finite differences.
SMOOTH = tuple(name for name in BASES if name != "clipped_sgd unclipped")
CARRIERS = tuple(name for name, example in EXAMPLES.items() if example.operator.carries)
"""With saved values that have cotangents of their own."""
TWINS = tuple(name for name in EXAMPLES if name.endswith("_jvp"))


def served(example: Example, backend: str) -> tuple[str, ...]:
    """The orders that a backend's own kernels serve."""
    return example.operator.orders(backend)


def pairs(
    names: tuple[str, ...], backends: tuple[str, ...], *, slow: tuple[str, ...] = ("triton",)
) -> list[Any]:
    """Parameters for every example on every backend that serves it; interpreting takes long."""
    return [
        pytest.param(name, backend, marks=pytest.mark.slow if backend in slow else (), id=f"{name}-{backend}")
        for name in names
        for backend in backends
        if backend == "reference" or served(EXAMPLES[name], backend)
    ]


def with_orders(
    names: tuple[str, ...],
    backends: tuple[str, ...],
    orders: tuple[str, ...] = ORDERS,
    *,
    slow: tuple[str, ...] = ("triton",),
) -> list[Any]:
    """As `pairs`, with every order that the backend serves."""
    return [
        pytest.param(*pair.values, order, marks=pair.marks, id=f"{pair.id}-{order}")
        for pair in pairs(names, backends, slow=slow)
        for order in orders
        if order in served(EXAMPLES[pair.values[0]], pair.values[1])
    ]


def kernel_dtype(backend: str) -> torch.dtype:
    """The widest dtype that a backend takes."""
    return torch.float32 if backend == "triton" else torch.float64


def run(
    example: Example, backend: str, order: str, needs: list[bool] | None = None, **changes: Any
) -> list[Any]:
    """An order's results by the backend's kernels."""
    arguments = example.arguments(order)
    for i, value in changes.get("replace", {}).items():
        arguments[i] = value
    if order != "forward":
        arguments.append(example.wanted(order) if needs is None else needs)
    return list(example.operator.kernels[backend][order](*arguments))


def test_every_operator_has_an_example() -> None:
    assert {example.operator.name for example in EXAMPLES.values()} == set(OPERATORS)


def test_every_kernel_backend_serves_every_order() -> None:
    for operator in OPERATORS.values():
        for backend in operator.kernels:
            assert operator.orders(backend) == operator.orders("reference")


@pytest.mark.parametrize("name", tuple(EXAMPLES))
def test_the_formulas_of_a_gradient_are_what_autograd_makes_of_the_forward(name: str) -> None:
    example = EXAMPLES[name]
    leaves = [t.clone().requires_grad_() for t in example.leaves()]
    outputs = example.on("reference")(*leaves)
    d_outputs = flat(example.arguments("backward")[: len(example.operator.outputs)])
    expected = torch.autograd.grad(outputs, leaves, d_outputs)
    found = flat(run(example, "reference", "backward"))
    for value, truth in zip(found, expected, strict=True):
        torch.testing.assert_close(value, truth)


@pytest.mark.parametrize(("name", "backend"), pairs(tuple(EXAMPLES), KERNELS, slow=()))
def test_within_budget(name: str, backend: str) -> None:
    within_budget(name, backend, torch.float32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("name", "backend"), pairs(tuple(EXAMPLES), KERNELS))
def test_within_budget_in_16_bits(name: str, backend: str, dtype: torch.dtype) -> None:
    within_budget(name, backend, dtype)


def within_budget(name: str, backend: str, dtype: torch.dtype) -> None:
    example = EXAMPLES[name]
    highest = len(served(example, "reference")) - 1
    # A learning rate's gradient is an inner product, which cancels.
    assert_within_budget(example.on, example.leaves(), dtype, backend, highest=highest, slack=3.0)


@pytest.mark.parametrize(("name", "backend"), pairs(SMOOTH, ("reference", *COMPILED)))
def test_derivatives_are_finite_differences(name: str, backend: str) -> None:
    leaves = [t.clone().requires_grad_() for t in EXAMPLES[name].leaves()]
    call = lambda *x: tuple(EXAMPLES[name].on(backend)(*x))  # noqa: E731
    assert torch.autograd.gradcheck(call, leaves)
    assert torch.autograd.gradgradcheck(call, leaves)


@pytest.mark.parametrize(("name", "backend", "order"), with_orders(tuple(EXAMPLES), KERNELS, slow=KERNELS))
def test_opcheck(name: str, backend: str, order: str) -> None:
    example = EXAMPLES[name].cast(kernel_dtype(backend))
    arguments = example.arguments(order)
    if order != "forward":
        arguments.append(example.wanted(order))
    if order == "backward":
        arguments += [None] * len(example.operator.carries)
    suffix = "" if order == "forward" else f"_{order}"
    if order != served(example, backend)[-1]:
        arguments = [_differentiable(v) for v in arguments]
    opcheck(getattr(torch.ops.ttt_kernels, example.operator.name + suffix).default, (*arguments, backend))


def _differentiable(value: Any) -> Any:
    if isinstance(value, list) and value and isinstance(value[0], Tensor):
        return [_differentiable(v) for v in value]
    if isinstance(value, Tensor) and value.is_floating_point():
        return value.detach().requires_grad_()
    return value


@pytest.mark.parametrize(("name", "backend"), pairs(BASES, COMPILED, slow=COMPILED))
def test_opcheck_of_unwanted_gradients(name: str, backend: str) -> None:
    """An empty tensor in place of a gradient that nobody wants, and of its cotangent."""
    example = EXAMPLES[name].cast(kernel_dtype(backend))
    wanted = example.wanted("backward")
    operator = getattr(torch.ops.ttt_kernels, f"{example.operator.name}_backward").default
    carried = [None] * len(example.operator.carries)
    for i in [i for i, want in enumerate(wanted) if want]:
        arguments = [_differentiable(v) for v in example.arguments("backward")]
        opcheck(operator, (*arguments, [i == j for j in range(len(wanted))], *carried, backend))


@pytest.mark.parametrize(("name", "backend"), pairs(CARRIERS, COMPILED, slow=()))
def test_opcheck_of_carried_cotangents(name: str, backend: str) -> None:
    example = EXAMPLES[name].cast(kernel_dtype(backend))
    operators, given = torch.ops.ttt_kernels, example.operator
    carried, wanted = example.carried(), example.wanted("backward")
    backward = getattr(operators, f"{given.name}_backward").default
    opcheck(backward, (*example.arguments("backward"), wanted, *carried, backend))
    double_backward = getattr(operators, f"{given.name}_double_backward").default
    needs = [*example.wanted("double_backward"), *[True] * len(carried)]
    opcheck(double_backward, (*example.arguments("double_backward"), needs, backend))


@pytest.mark.parametrize("name", tuple(EXAMPLES))
def test_an_operator_called_by_itself_refuses_tangents(name: str) -> None:
    example = EXAMPLES[name]
    operator = getattr(torch.ops.ttt_kernels, example.operator.name)
    leaves = tuple(example.leaves())
    with pytest.raises(ValueError, match=rf"{example.operator.name} \(forward\): .*forward mode"):
        torch.func.jvp(lambda *x: operator(*example.given(x), *example.params, "cpu"), leaves, leaves)


@pytest.mark.parametrize(("name", "backend", "order"), with_orders(tuple(EXAMPLES), KERNELS, ORDERS[1:]))
def test_only_what_is_needed(name: str, backend: str, order: str) -> None:
    """One result at a time, of the same bits; what nobody wants is None."""
    example = EXAMPLES[name].cast(kernel_dtype(backend))
    wanted = example.wanted(order)
    everything = run(example, backend, order)
    for i in [i for i, want in enumerate(wanted) if want]:
        one = run(example, backend, order, [i == j for j in range(len(wanted))])
        assert all(o is None for j, o in enumerate(one) if j != i)
        for own, expected in zip(flat([one[i]]), flat([everything[i]]), strict=True):
            assert torch.equal(own, expected)
    assert all(r is None for r in run(example, backend, order, [False] * len(wanted)))


@pytest.mark.parametrize(("name", "backend"), pairs(BASES, KERNELS))
def test_a_missing_cotangent_is_zero(name: str, backend: str) -> None:
    example = EXAMPLES[name].cast(kernel_dtype(backend))
    cotangents = example.cotangents()
    present = [i for i, g in enumerate(cotangents) if g is not None]
    for missing in [*({i} for i in present), set(present)]:
        zeros = {i: _zeros(cotangents[i]) for i in missing}
        own = flat(run(example, backend, "double_backward", replace=dict.fromkeys(missing)))
        expected = flat(run(example, "reference", "double_backward", replace=zeros))
        for o, e in zip(own, expected, strict=True):
            torch.testing.assert_close(o, e, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("name", "backend"), pairs(CARRIERS, EVERY_BACKEND))
def test_carried_cotangents_lead_to_what_is_left_out(name: str, backend: str) -> None:
    example = EXAMPLES[name].cast(kernel_dtype(backend))
    count, outputs = len(example.operator.carries), len(example.operator.outputs)
    wanted = example.wanted("double_backward")
    whole = run(example, backend, "double_backward")
    assert whole[len(wanted) :] == [None] * count
    *part, gate, up = run(example, backend, "double_backward", [*wanted, *[True] * count])
    kernel = example.operator.kernels[backend]["backward"]
    first, needs = example.arguments("backward"), example.wanted("backward")
    rest = kernel(*[None] * outputs, *first[outputs:], needs, gate, up)
    for o, e in zip(part[:outputs], whole[:outputs], strict=True):
        assert torch.equal(o, e)
    for own, other, e in zip(part[outputs:], rest, whole[outputs : len(wanted)], strict=True):
        torch.testing.assert_close(own + other, e, rtol=1e-4, atol=1e-5)
    # With a cotangent of the output both together.
    for both, own, other in zip(
        kernel(*first, needs, gate, up), run(example, backend, "backward"), rest, strict=True
    ):
        torch.testing.assert_close(both, own + other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("name", "backend"), pairs(CARRIERS, KERNELS))
def test_only_what_is_needed_beside_carried_cotangents(name: str, backend: str) -> None:
    example = EXAMPLES[name].cast(kernel_dtype(backend))
    count = len(example.wanted("double_backward"))
    carried = [True] * len(example.operator.carries)
    everything = run(example, backend, "double_backward", [True] * count + carried)
    nothing = [False] * count
    for i in range(count):
        one = run(example, backend, "double_backward", [i == j for j in range(count)] + carried)
        assert all((o is None) == (j != i and j < count) for j, o in enumerate(one))
        assert all(torch.equal(o, e) for o, e in zip(one, everything, strict=True) if o is not None)
    alone = run(example, backend, "double_backward", [*nothing, True, False])
    assert torch.equal(alone[count], everything[count])
    assert all(o is None for j, o in enumerate(alone) if j != count)
    alone = run(example, backend, "double_backward", [*nothing, False, True])
    assert torch.equal(alone[count + 1], everything[count + 1])
    # What one of them leaves out, the other does not.
    first = run(example, backend, "double_backward", [*([True] * count), True, False])
    kernel = example.operator.kernels[backend]["backward"]
    arguments, needs = example.arguments("backward"), example.wanted("backward")
    rest = kernel(None, *arguments[1:], needs, first[count], None)
    whole = run(example, backend, "double_backward")
    for own, other, e in zip(first[1:count], rest, whole[1:count], strict=True):
        torch.testing.assert_close(own + other, e, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("name", "backend"), pairs(CARRIERS, KERNELS, slow=()))
def test_nothing_is_given_to_the_inputs(name: str, backend: str) -> None:
    """Neither cotangents nor what else would lead there: zeros, not None."""
    example = EXAMPLES[name].cast(kernel_dtype(backend))
    count = len(example.wanted("double_backward"))
    given = dict.fromkeys(range(len(example.cotangents())))
    found = run(example, backend, "double_backward", [True] * (count + 2), replace=given)
    assert all(not t.any() for t in found[1:4])


def _zeros(value: Any) -> Any:
    return [torch.zeros_like(v) for v in value] if isinstance(value, list) else torch.zeros_like(value)


@pytest.mark.parametrize(("name", "backend", "order"), with_orders(tuple(EXAMPLES), KERNELS))
def test_same_bits_every_time(name: str, backend: str, order: str) -> None:
    example = EXAMPLES[name].cast(kernel_dtype(backend))
    first, again = (flat(run(example, backend, order)) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize(("name", "backend", "order"), with_orders(BASES, KERNELS))
def test_strides_do_not_matter(name: str, backend: str, order: str) -> None:
    """Every tensor as every second element of another, whose other elements are NaN."""
    example = EXAMPLES[name].cast(kernel_dtype(backend))
    arguments = example.arguments(order)
    needs = [] if order == "forward" else [example.wanted(order)]
    kernel = example.operator.kernels[backend][order]
    expected = flat(kernel(*arguments, *needs))
    found = flat(kernel(*[_apart(v) for v in arguments], *needs))
    for o, e in zip(found, expected, strict=True):
        torch.testing.assert_close(o, e)


def _apart(value: Any) -> Any:
    if isinstance(value, list):
        return [_apart(v) for v in value]
    if not isinstance(value, Tensor) or not value.is_floating_point() or not value.dim():
        return value
    return torch.stack([value, torch.full_like(value, torch.nan)], -1)[..., 0]


@pytest.mark.parametrize(("name", "backend"), pairs(BASES, KERNELS))
def test_expanded_cotangents(name: str, backend: str) -> None:
    """Strides of 0, as `.sum()` makes them."""
    example = EXAMPLES[name].cast(kernel_dtype(backend))

    def seconds(which: str) -> list[Tensor]:
        leaves = [t.clone().requires_grad_() for t in example.leaves()]
        total = sum(o.double().sum() for o in example.on(which)(*leaves))
        first = torch.autograd.grad(total, leaves, create_graph=True)
        # Without it, the first gradients of a linear operator would need none.
        zero = 0 * sum(t.sum() for t in leaves)
        second = torch.autograd.grad(zero + sum(g.sum() for g in first), leaves)
        return [t.detach() for t in (*first, *second)]

    for own, expected in zip(seconds(backend), seconds("reference"), strict=True):
        torch.testing.assert_close(own, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("name", "backend"), pairs(BASES, EVERY_BACKEND))
def test_compiles_without_a_break(name: str, backend: str) -> None:
    # Examples differ in what a compiled function may not depend on, and it is compiled only so often.
    torch._dynamo.reset()
    example = EXAMPLES[name].cast(kernel_dtype(backend))
    compiled = torch.compile(example.on(backend), fullgraph=True, backend="aot_eager")

    def gradients(call: Any) -> tuple[Tensor, ...]:
        leaves = [t.clone().requires_grad_() for t in example.leaves()]
        return torch.autograd.grad(sum(o.double().square().sum() for o in call(*leaves)), leaves)

    for own, expected in zip(gradients(compiled), gradients(example.on("reference")), strict=True):
        torch.testing.assert_close(own, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("name", "backend"), pairs(tuple(EXAMPLES), EVERY_BACKEND))
def test_the_order_after_the_last_raises(name: str, backend: str) -> None:
    example = EXAMPLES[name].cast(kernel_dtype(backend))
    leaves = [t.clone().requires_grad_() for t in example.leaves()]
    loss = sum(o.double().square().sum() for o in example.on(backend)(*leaves))
    last = served(example, "reference")[-1]
    for _ in ORDERS[1 : len(served(example, "reference"))]:
        grads = torch.autograd.grad(loss, leaves, create_graph=True)
        loss = sum(g.double().square().sum() for g in grads)
    if backend == "reference":
        assert all(g.isfinite().all() for g in torch.autograd.grad(loss, leaves))
    else:
        with pytest.raises(RuntimeError, match=f"{example.operator.name}_{last}"):
            torch.autograd.grad(loss, leaves)


@pytest.mark.parametrize(("name", "backend"), pairs(BASES, KERNELS, slow=()))
def test_forward_mode_and_vmap_are_refused(name: str, backend: str) -> None:
    example = EXAMPLES[name].cast(kernel_dtype(backend))
    leaves = tuple(example.leaves())

    def public(*tensors: Tensor) -> list[Tensor]:
        return example.on(example.operator.select(backend, *flat(example.given(tensors))))(*tensors)

    with pytest.raises(ValueError, match="forward mode"):
        torch.func.jvp(public, leaves, leaves)
    with pytest.raises(ValueError, match="transforms"):
        torch.func.vmap(lambda t: public(t, *leaves[1:]))(torch.stack([leaves[0]] * 2))


@pytest.mark.parametrize(("name", "backend"), pairs(TWINS, EVERY_BACKEND))
def test_the_twin_is_the_directional_derivative(name: str, backend: str) -> None:
    example = EXAMPLES[name].cast(kernel_dtype(backend))
    base = EXAMPLES[{"rms_norm_jvp": "rms_norm residual"}.get(name, name.removesuffix("_jvp"))]
    base = base.cast(kernel_dtype(backend))
    count = len(base.leaves())
    leaves = example.leaves()
    for kept in [range(count), *([i] for i in range(count)), []]:
        dots = [t if i in kept else None for i, t in enumerate(leaves[count:])]
        given = [*example.inputs[: len(base.inputs)], *dots]
        own = example.operator.kernels[backend]["forward"](*given, *example.params)[:2]
        along = tuple(torch.zeros_like(t) if d is None else d for t, d in zip(leaves, dots, strict=False))
        truth = torch.func.jvp(lambda *x: base.on("reference")(*x)[0], tuple(leaves[:count]), along)
        for o, t in zip(own, truth, strict=True):
            torch.testing.assert_close(o, t, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("name", "backend"), pairs(ONCE, ("reference", *COMPILED), slow=("reference",)))
def test_differentiates_once_in_reverse(name: str, backend: str) -> None:
    leaves = [t.clone().requires_grad_() for t in EXAMPLES[name].leaves()]
    call = lambda *x: tuple(EXAMPLES[name].on(backend)(*x))  # noqa: E731
    assert torch.autograd.gradcheck(call, leaves)
    if backend == "reference":
        assert torch.autograd.gradgradcheck(call, leaves)


@pytest.mark.parametrize(("name", "backend", "order"), with_orders(OWN_PRODUCTS, COMPILED))
def test_same_bits_for_any_number_of_threads(name: str, backend: str, order: str) -> None:
    example = EXAMPLES[name]
    arguments = [*example.arguments(order), *([] if order == "forward" else [example.wanted(order)])]
    threads = torch.get_num_threads()
    results = []
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            results.append(flat(example.operator.kernels[backend][order](*arguments)))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
