"""SwiGLU: every order, dtype, layout and instruction set against the formulas in float64."""

from collections.abc import Callable

import pytest
import torch
from harness import BACKENDS, assert_within_budget, draw, relative_error
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ttt_kernels import backends, swiglu, swiglu_jvp
from ttt_kernels.extension import cpu as extension
from ttt_kernels.extension import dtype_code
from ttt_kernels.swiglu import cpu, operator, reference

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def on(backend: str) -> Callable[..., Tensor]:
    return lambda x, g, u, d: swiglu(x, g, u, d, backend=backend)


def arguments(
    lead: tuple[int, ...],
    d: int,
    i: int,
    *,
    batched: bool = False,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
) -> list[Tensor]:
    """x, w_gate, w_up, w_down, scaled so that gates are of order one."""
    own = lead[:1] if batched else ()
    shapes = [(*lead, d), (*own, i, d), (*own, i, d), (*own, d, i)]
    scales = (1.0, d**-0.5, d**-0.5, i**-0.5)
    return [
        draw(*s, seed=seed + k, scale=c).to(dtype)
        for k, (s, c) in enumerate(zip(shapes, scales, strict=True))
    ]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@settings(max_examples=12)
@given(
    batch=st.integers(1, 3),
    rows=st.integers(1, 5),
    d=st.integers(4, 40),
    i=st.integers(4, 70),
    batched=st.booleans(),
)
def test_every_order_within_budget(
    backend: str, dtype: torch.dtype, batch: int, rows: int, d: int, i: int, batched: bool
) -> None:
    inputs = arguments((batch, rows), d, i, batched=batched)
    assert_within_budget(on, inputs, dtype, backend, slack=3.0)


@pytest.mark.parametrize("lead", [(), (7,), (2, 1, 3), (0,), (2, 0)], ids=str)
def test_shared_weights_take_any_leading_dimensions(lead: tuple[int, ...]) -> None:
    x, *weights = arguments(lead, 6, 10)
    y = swiglu(x, *weights, backend="cpu")
    assert y.shape == x.shape
    torch.testing.assert_close(y.reshape(-1, 6), swiglu(x.reshape(-1, 6), *weights, backend="reference"))


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_sequence_has_its_own_weights(backend: str) -> None:
    x, *weights = arguments((3, 5), 8, 12, batched=True)
    y = swiglu(x, *weights, backend=backend)
    for b in range(3):
        torch.testing.assert_close(y[b], swiglu(x[b], *(w[b] for w in weights), backend=backend))


@pytest.mark.parametrize("backend", BACKENDS)
def test_strides(backend: str) -> None:
    x, w_gate, w_up, w_down = arguments((3, 6), 10, 14)
    transposed = x.transpose(0, 1).contiguous().transpose(0, 1)
    sliced = torch.cat([x, x], -1)[..., :10]
    weights = (w_gate.t().contiguous().t(), torch.cat([w_up, w_up])[:14], w_down)
    expected = swiglu(x, w_gate, w_up, w_down, backend="reference")
    for same in (transposed, sliced):
        torch.testing.assert_close(swiglu(same, *weights, backend=backend), expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("batched", [False, True])
def test_expanded_cotangents(backend: str, batched: bool) -> None:
    inputs = arguments((2, 5), 7, 9, batched=batched)

    def gradients(which: str) -> list[Tensor]:
        leaves = [t.clone().requires_grad_() for t in inputs]
        swiglu(*leaves, backend=which).sum().backward()
        return [leaf.grad for leaf in leaves]

    for own, expected in zip(gradients(backend), gradients("reference"), strict=True):
        torch.testing.assert_close(own, expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_float32_weights_beside_a_half_precision_x(backend: str, dtype: torch.dtype) -> None:
    x, *weights = (t.to(torch.float32) for t in arguments((4, 5), 12, 20))
    x = x.to(dtype).requires_grad_()
    weights = [w.requires_grad_() for w in weights]
    y = swiglu(x, *weights, backend=backend)
    grads = torch.autograd.grad(y, [x, *weights], torch.ones_like(y))
    assert y.dtype == dtype
    assert [g.dtype for g in grads] == [dtype, torch.float32, torch.float32, torch.float32]
    rounded = [x.detach().double(), *(w.detach().to(dtype).double() for w in weights)]
    rounded = [t.requires_grad_() for t in rounded]
    truth = swiglu(*rounded, backend="reference")
    eps = torch.finfo(dtype).eps
    assert relative_error(y.detach(), truth.detach()) < 2 * eps
    for grad, exact in zip(grads, torch.autograd.grad(truth, rounded, torch.ones_like(truth)), strict=True):
        assert relative_error(grad, exact) < 2 * eps


def test_extreme_gates_stay_finite() -> None:
    gate = torch.tensor([-1e4, -100.0, -88.0, 0.0, 88.0, 100.0, 1e4] * 3)
    eye = torch.eye(21)
    inputs = [gate.diag(), eye, eye, eye]
    for which in BACKENDS:
        leaves = [t.clone().requires_grad_() for t in inputs]
        y = swiglu(*leaves, backend=which)
        grads = torch.autograd.grad(y, leaves, torch.ones_like(y))
        exact = torch.nn.functional.silu(gate.double()) * gate.double()
        assert all(torch.isfinite(g).all() for g in grads)
        torch.testing.assert_close(y.diag().double(), exact, rtol=1e-6, atol=1e-30)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("batched", [False, True])
def test_gradcheck(backend: str, batched: bool) -> None:
    inputs = [t.requires_grad_() for t in arguments((2, 2), 2, 3, batched=batched)]
    assert torch.autograd.gradcheck(on(backend), inputs)
    assert torch.autograd.gradgradcheck(on(backend), inputs)


@pytest.mark.parametrize("missing", range(4))
def test_double_backward_without_one_cotangent(missing: int) -> None:
    inputs = [t.requires_grad_() for t in arguments((3,), 4, 5)]
    kept = [k for k in range(4) if k != missing]

    def seconds(backend: str) -> list[Tensor]:
        first = torch.autograd.grad(
            swiglu(*inputs, backend=backend).square().sum(), inputs, create_graph=True
        )
        return list(torch.autograd.grad(sum(first[k].square().sum() for k in kept), inputs))

    for own, expected in zip(seconds("cpu"), seconds("reference"), strict=True):
        torch.testing.assert_close(own, expected)


@pytest.mark.parametrize(
    "needs", [[True] * 4, [False, False, False, True], [True, False, False, False], [False] * 4]
)
def test_backward_returns_what_is_wanted(needs: list[bool]) -> None:
    inputs = arguments((3, 4), 6, 8)
    _, gate, up = cpu.forward(*inputs)
    dy = draw(3, 4, 6, seed=9)
    own = cpu.backward(dy, *inputs, gate, up, needs)
    expected = reference.backward(dy, *inputs, gate, up, [True] * 4)
    for need, o, e in zip(needs, own, expected, strict=True):
        if need:
            torch.testing.assert_close(o, e)
        else:
            assert o is None


@pytest.mark.slow
def test_registered_operators() -> None:
    for batched in (False, True):
        inputs = [t.requires_grad_() for t in arguments((2, 3), 4, 5, batched=batched)]
        y, gate, up = (t.detach() for t in operator.forward(*inputs, backend="cpu"))
        g = [torch.randn_like(t) for t in inputs]
        dy = torch.randn_like(y).requires_grad_()
        torch.library.opcheck(torch.ops.ttt_kernels.swiglu.default, (*inputs, "cpu"))
        backward = torch.ops.ttt_kernels.swiglu_backward.default
        torch.library.opcheck(backward, (dy, *inputs, gate, up, [True] * 4, "cpu"))
        detached = [t.detach() for t in inputs]
        torch.library.opcheck(backward, (dy.detach(), *detached, gate, up, [True, False, False, True], "cpu"))
        torch.library.opcheck(
            torch.ops.ttt_kernels.swiglu_double_backward.default,
            (*g, dy.detach(), *detached, gate, up, [True] * 5, "cpu"),
        )


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiles_without_a_break(backend: str) -> None:
    compiled = torch.compile(on(backend), fullgraph=True, backend="aot_eager")
    leaves = [t.requires_grad_() for t in arguments((2, 3), 4, 5)]
    copies = [t.detach().clone().requires_grad_() for t in leaves]
    compiled(*leaves).square().sum().backward()
    on("reference")(*copies).square().sum().backward()
    for leaf, copy in zip(leaves, copies, strict=True):
        torch.testing.assert_close(leaf.grad, copy.grad)


def test_a_third_derivative_raises_on_cpu_and_works_on_reference() -> None:
    x = draw(3, 4, seed=0).requires_grad_()
    weights = arguments((3,), 4, 5)[1:]

    def second(backend: str) -> Tensor:
        (first,) = torch.autograd.grad(swiglu(x, *weights, backend=backend).sum(), x, create_graph=True)
        return torch.autograd.grad(first.square().sum(), x, create_graph=True)[0]

    with pytest.raises(RuntimeError, match="swiglu_double_backward"):
        torch.autograd.grad(second("cpu").square().sum(), x)
    with pytest.raises(RuntimeError, match="swiglu_double_backward"):
        second("cpu").square().sum().backward()
    (third,) = torch.autograd.grad(second("reference").square().sum(), x)
    assert third.abs().max() > 0


def test_forward_mode_and_vmap_are_right_or_refused() -> None:
    inputs = tuple(arguments((3, 2), 4, 5))
    tangents = tuple(draw(*t.shape, seed=50 + k) for k, t in enumerate(inputs))
    expected = torch.func.jvp(lambda *a: swiglu(*a, backend="reference"), inputs, tangents)
    chosen = torch.func.jvp(lambda *a: swiglu(*a), inputs, tangents)
    torch.testing.assert_close(chosen, expected)
    assert chosen[1].abs().max() > 0
    with pytest.raises(ValueError, match="forward mode"):
        torch.func.jvp(lambda *a: swiglu(*a, backend="cpu"), inputs, tangents)
    x, *weights = inputs
    torch.testing.assert_close(torch.func.vmap(lambda row: swiglu(row, *weights))(x), swiglu(x, *weights))
    with pytest.raises(ValueError, match="transforms"):
        torch.func.vmap(lambda row: swiglu(row, *weights, backend="cpu"))(x)


@pytest.mark.parametrize("batched", [False, True])
def test_jvp_twin(batched: bool) -> None:
    inputs = arguments((2, 3), 4, 5, batched=batched)
    tangents = [draw(*t.shape, seed=50 + k) for k, t in enumerate(inputs)]
    expected = torch.func.jvp(on("reference"), tuple(inputs), tuple(tangents))
    torch.testing.assert_close(swiglu_jvp(*inputs, *tangents), expected)
    for k in range(4):
        alone = [t if j == k else None for j, t in enumerate(tangents)]
        zeros = tuple(t if j == k else torch.zeros_like(t) for j, t in enumerate(tangents))
        expected = torch.func.jvp(on("reference"), tuple(inputs), zeros)
        torch.testing.assert_close(swiglu_jvp(*inputs, *alone), expected)
    assert swiglu_jvp(*inputs)[1].abs().max() == 0


def test_jvp_twin_differentiates_in_reverse() -> None:
    inputs = [t.requires_grad_() for t in arguments((2,), 2, 3)]
    tangents = [draw(*t.shape, seed=50 + k).requires_grad_() for k, t in enumerate(inputs)]
    assert torch.autograd.gradcheck(swiglu_jvp, [*inputs, *tangents])


@pytest.mark.parametrize("isa", extension.instruction_sets() if extension else [])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_instruction_set(isa: str, dtype: torch.dtype) -> None:
    """Between the products, at sizes around every vector's."""
    before = extension.instruction_set()
    extension.choose_instruction_set(isa)
    try:
        for i in (1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 33, 20_001):
            gate, up, dy = (draw(i, seed=k, scale=3.0).to(dtype) for k in range(3))
            own = [torch.empty_like(gate) for _ in range(4)]
            code, count = dtype_code(dtype), gate.numel()
            extension.swiglu_forward(code, gate.data_ptr(), up.data_ptr(), own[0].data_ptr(), count)
            extension.swiglu_backward(code, *(t.data_ptr() for t in (dy, gate, up, *own[1:])), count)
            wide = [t.double() for t in (dy, gate, up)]
            s = torch.sigmoid(wide[1])
            silu = wide[1] * s
            expected = (
                silu * wide[2],
                wide[0] * wide[2] * (s + silu * (1 - s)),
                wide[0] * silu,
                silu * wide[2],
            )
            for o, e in zip(own, expected, strict=True):
                torch.testing.assert_close(
                    o.double(), e, rtol=8 * torch.finfo(dtype).eps, atol=8 * torch.finfo(dtype).eps
                )
    finally:
        extension.choose_instruction_set(before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_products_in_half_precision(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """The path of processors with such instructions, which torch emulates on others."""
    monkeypatch.setattr("ttt_kernels.matmul.has_native", lambda _: True)
    for batched in (False, True):
        assert_within_budget(on, arguments((2, 5), 12, 20, batched=batched), dtype, "cpu", slack=3.0)


def test_results_do_not_depend_on_the_number_of_threads() -> None:
    gate, up, dh = (draw(40_001, seed=k).float() for k in range(3))
    results = []
    threads = torch.get_num_threads()
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            out = [torch.empty_like(gate) for _ in range(3)]
            extension.swiglu_backward(
                dtype_code(torch.float32), *(t.data_ptr() for t in (dh, gate, up, *out)), gate.numel()
            )
            results.append(torch.stack(out))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_backends_lists_its_own_orders() -> None:
    assert backends()["cpu"]["operators"]["swiglu"] == ("forward", "backward")
    assert backends()["reference"]["operators"]["swiglu"] == ("forward", "backward", "double_backward")


def good() -> dict[str, Tensor]:
    names = ("x", "w_gate", "w_up", "w_down")
    return dict(zip(names, arguments((2, 3), 4, 5), strict=True))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.ones(2, 3, 4, dtype=torch.int64)}, "x of shape .2, 3, 4. has dtype torch.int64"),
        ({"x": torch.tensor(1.0, dtype=torch.float64)}, "x has no dimensions"),
        ({"x": torch.ones(2, 3, 6, dtype=torch.float64)}, r"w_gate has shape \(5, 4\); accepted is \(5, 6\)"),
        ({"w_gate": torch.ones(5, dtype=torch.float64)}, r"w_gate has shape \(5,\)"),
        ({"w_gate": torch.ones(5, 4)}, "w_gate of shape .5, 4. has dtype torch.float32"),
        ({"w_up": torch.ones(6, 4, dtype=torch.float64)}, r"w_up has shape \(6, 4\); accepted is \(5, 4\)"),
        ({"w_up": torch.ones(2, 5, 4, dtype=torch.float64)}, r"w_up has shape \(2, 5, 4\)"),
        (
            {"w_down": torch.ones(5, 4, dtype=torch.float64)},
            r"w_down has shape \(5, 4\); accepted is \(4, 5\)",
        ),
        (
            {"w_gate": torch.ones(3, 5, 4, dtype=torch.float64)},
            r"w_gate has shape .* accepted is \(2, 5, 4\)",
        ),
        ({"w_down": torch.ones(4, 5, dtype=torch.float64, device="meta")}, "w_down is on meta"),
        ({"w_down": None}, "w_down must be a tensor, got NoneType"),
    ],
)
def test_unsuitable_arguments(change: dict[str, Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=f"swiglu: {message}"):
        swiglu(**{**good(), **change})
    with pytest.raises(ValueError, match=f"swiglu_jvp: {message}"):
        swiglu_jvp(**{**good(), **change})


def test_batched_weights_need_sequences() -> None:
    _, *weights = arguments((2, 3), 4, 5, batched=True)
    with pytest.raises(ValueError, match=r"x has shape \(2, 4\); accepted is \(B, T, d\)"):
        swiglu(torch.ones(2, 4, dtype=torch.float64), *weights)


def test_unsuitable_tangents_and_backends() -> None:
    with pytest.raises(ValueError, match=r"w_up_dot has shape \(5, 3\)"):
        swiglu_jvp(**good(), w_up_dot=torch.ones(5, 3, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"x_dot has shape \(2, 3, 4\), torch.float32"):
        swiglu_jvp(**good(), x_dot=torch.ones(2, 3, 4))
    with pytest.raises(ValueError, match="x_dot must be a tensor"):
        swiglu_jvp(**good(), x_dot=1.0)
    with pytest.raises(ValueError, match="swiglu_jvp: backend 'cpu' cannot serve this call"):
        swiglu_jvp(**good(), backend="cpu")
    with pytest.raises(ValueError, match="backend 'cuda' cannot serve this call"):
        swiglu(**good(), backend="cuda")
    with pytest.raises(ValueError, match="backend is 'gpu'"):
        swiglu(**good(), backend="gpu")
