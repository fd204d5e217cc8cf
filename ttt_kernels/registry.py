"""Chains the forward, backward and double backward of an operator as registered operators.

Each order is a `torch.library.custom_op` with a fake implementation, and the autograd formula of one calls
the next. The last has none, so a derivative that nobody wrote raises and names the operator; a plain
`torch.autograd.Function` around a raw kernel would return a first-order gradient without an error.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch._library.autograd import make_autograd_impl

from ttt_kernels.backends import Refusal, has_tangent, in_transform, select

ORDERS = ("forward", "backward", "double_backward")
OPERATORS: dict[str, "Operator"] = {}
"""Every registered operator by name."""
_LIBRARY = torch.library.Library("ttt_kernels", "FRAGMENT")

Kernel = Callable[..., Any]


def _plain(schema_type: str, value: Any) -> Any:
    """A kernel's result in the container that a schema returns."""
    return list(value) if schema_type == "Tensor[]" else value


def _unwanted(schema_type: str, arguments: Sequence[Any]) -> Any:
    """What a schema returns for a result that nobody wants: a tensor without elements, or no tensors."""
    if schema_type == "Tensor[]":
        return []
    some = next(v for a in arguments if a is not None for v in (a if isinstance(a, list | tuple) else [a]))
    return some.new_empty(0)


@dataclass
class Operator:
    """One operator: what its three orders take and return, and the kernels that compute them.

    The kernels of a backend are functions named after the orders, with the signatures
    `forward(*inputs, *params) -> (*outputs, *saved)`,
    `backward(*d_outputs, *inputs, *kept, *saved, *params, needs) -> gradients` and
    `double_backward(*g_inputs, *d_outputs, *inputs, *kept, *saved, *params, needs) -> cotangents`, where
    `needs` says for each result (gradients: the differentiable inputs; cotangents: the outputs, then the
    differentiable inputs) whether it is wanted; an unwanted one is None. Kept outputs and saved values are
    functions of the inputs: derivatives are total.

    An operator may carry saved values. Their cotangents are further results of `double_backward`, whose `needs` may
    go on with a flag for each; what goes through one that is wanted is left out of the inputs' cotangents. Autograd
    brings them to where the values were computed, and `backward` takes them at its end, None being zero; then a
    cotangent of an output may be None too. So the products by which both reach the inputs are made once.

    Attributes:
        name: the operator's word, as its folder is called.
        inputs, params, outputs, saved: name -> schema type ("Tensor", "Tensor?", "Tensor[]", "float", ...).
        differentiable: the inputs that have gradients.
        fake: shapes of `forward` without computing it: `fake(*inputs, *params) -> (*outputs, *saved)`.
        keeps: the outputs that `backward` and `double_backward` are given too.
        carries: the saved values that have cotangents of their own.
        fake_backward: what the gradients look like, where they are not like the differentiable inputs:
            `fake_backward(*inputs, *params) -> gradients`.
        kernels: backend -> order -> function; each backend serves the same orders as "reference", and where
            there is no "double_backward" the second derivative raises as the third does elsewhere.
        refusals: backend -> why it cannot serve given tensors.
    """

    name: str
    inputs: dict[str, str]
    params: dict[str, str]
    outputs: dict[str, str]
    saved: dict[str, str]
    differentiable: tuple[str, ...]
    fake: Kernel
    kernels: dict[str, dict[str, Kernel]]
    refusals: dict[str, Refusal] = field(default_factory=dict)
    keeps: tuple[str, ...] = ()
    carries: tuple[str, ...] = ()
    fake_backward: Kernel | None = None

    def __post_init__(self) -> None:
        served = self.orders("reference")
        assert served in (ORDERS, ORDERS[:2])
        assert all(self.orders(name) == served for name in self.kernels), f"{self.name}: an order is missing"
        assert set(self.differentiable) <= set(self.inputs)
        self._diff_index = [list(self.inputs).index(n) for n in self.differentiable]
        self._kept_index = [list(self.outputs).index(n) for n in self.keeps]
        self._carried_index = [list(self.saved).index(n) for n in self.carries]
        self._forward = self._define_forward()
        self._backward = self._define_backward()
        self._link_forward()
        if served == ORDERS:
            self._double_backward = self._define_double_backward()
            self._link_backward()
        OPERATORS[self.name] = self

    def orders(self, backend: str) -> tuple[str, ...]:
        """The orders that a backend's own kernels serve."""
        return tuple(order for order in ORDERS if order in self.kernels.get(backend, {}))

    def select(self, backend: str | None, *inputs: Any) -> str:
        """The backend for a call; see `backends.select`."""
        return select(self.name, backend, tuple(_tensors(inputs)), self.refusals)

    def forward(self, *arguments: Any, backend: str) -> tuple[Any, ...]:
        """Runs `forward(*inputs, *params)` on a backend, recorded for differentiation where that is needed."""
        return self._call("forward", self._forward, arguments, backend)

    def backward(self, *arguments: Any, needs: Sequence[bool], backend: str) -> tuple[Any, ...]:
        """Runs `backward(*d_outputs, *inputs, *kept, *saved, *params)`, itself differentiable."""
        nothing = [None] * len(self.carries)
        return self._call("backward", self._backward, (*arguments, list(needs), *nothing), backend)

    def _call(
        self, order: str, registered: Kernel, arguments: tuple[Any, ...], backend: str
    ) -> tuple[Any, ...]:
        """The kernel itself where nobody can ask for a derivative, because dispatch costs 10 to 20 us a call."""
        if backend == "reference":
            return self.kernels["reference"][order](*arguments)
        tensors = _tensors(arguments)
        if _plain_tensors(tensors):
            return self.kernels[backend][order](*arguments)
        return self._record(order, registered, arguments, backend)

    def _record(
        self, order: str, registered: Kernel, arguments: tuple[Any, ...], backend: str
    ) -> tuple[Any, ...]:
        """Calls a registered operator, refusing tangents and transforms, for which it has no rule."""
        if not torch.compiler.is_compiling() and in_transform(_tensors(arguments)):
            raise ValueError(
                f"{self.name} ({order}): forward mode and torch.func transforms do not pass through backend "
                f"{backend!r}; use backend='reference'"
            )
        results = registered(*arguments, backend)
        results = results if isinstance(results, tuple) else (results,)
        if order == "forward":
            return results
        needs = self._needs(order, arguments)
        return tuple(r if need else None for r, need in zip(results, needs, strict=True))

    def _needs(self, order: str, arguments: Sequence[Any]) -> list[bool]:
        """Of the arguments of an order's kernel, which of its results are wanted."""
        if order == "backward":
            return list(arguments[len(arguments) - 1 - len(self.carries)])
        count = len(self.outputs) + len(self.differentiable) + len(self.carries)
        return [*arguments[-1], *[False] * (count - len(arguments[-1]))]

    def _schema(self, arguments: dict[str, str], results: Sequence[str]) -> str:
        taken = ", ".join(f"{kind} {name}" for name, kind in arguments.items())
        given = ", ".join(results)
        return f"({taken}, str backend) -> {given if len(results) == 1 else f'({given})'}"

    def _register(
        self, order: str, arguments: dict[str, str], results: Sequence[str], fake: Kernel
    ) -> torch.library.CustomOpDef:
        has_needs = order != "forward"

        def run(*values: Any) -> Any:
            *given, backend = values
            out = self.kernels[backend][order](*given)
            flags = self._needs(order, given) if has_needs else [True] * len(results)
            plain = [
                _plain(kind, v) if need and v is not None else _unwanted(kind, given)
                for kind, v, need in zip(results, out, flags, strict=True)
            ]
            return plain[0] if len(results) == 1 else tuple(plain)

        suffix = "" if order == "forward" else f"_{order}"
        op = torch.library.custom_op(
            f"ttt_kernels::{self.name}{suffix}", run, mutates_args=(), schema=self._schema(arguments, results)
        )
        op.register_fake(fake)
        self._refuse_tangents(op, order)
        return op

    def _refuse_tangents(self, op: torch.library.CustomOpDef, order: str) -> None:
        """Raises where a tangent reaches the registered operator itself, whose result would have none.

        `_record` sees tangents first, except in code that torch.compile traces (measured with torch 2.13: a
        compiled torch.func.jvp gave zeros, a dual tensor none). A device's own autograd key goes before the
        general one that custom_op fills.
        """
        record = make_autograd_impl(op._opoverload, op)

        def guard(keyset: Any, *arguments: Any) -> Any:
            if has_tangent(_tensors(arguments)):
                raise ValueError(
                    f"{self.name} ({order}): a registered operator has no rule for forward mode; use "
                    f"backend='reference'"
                )
            return record(keyset, *arguments)

        for key in ("AutogradCPU", "AutogradCUDA"):
            _LIBRARY.impl(op._opoverload, guard, key, with_keyset=True)

    def _define_forward(self) -> torch.library.CustomOpDef:
        results = [*self.outputs.values(), *self.saved.values()]

        def fake(*values: Any) -> Any:
            out = self.fake(*values[:-1])
            return (
                out[0]
                if len(results) == 1
                else tuple(_plain(k, v) for k, v in zip(results, out, strict=True))
            )

        return self._register("forward", {**self.inputs, **self.params}, results, fake)

    def _define_backward(self) -> torch.library.CustomOpDef:
        results = [self._gradient_type(self.inputs[n]) for n in self.differentiable]

        def fake(*values: Any) -> Any:
            needs, start = self._needs("backward", values[:-1]), len(self.outputs)
            inputs = values[start : start + len(self.inputs)]
            likes = [inputs[i] for i in self._diff_index]
            if self.fake_backward is not None:
                end = len(values) - 2 - len(self.carries)
                likes = self.fake_backward(*inputs, *values[end - len(self.params) : end])
            out = [
                self._fake_like(like) if need else _unwanted(kind, values)
                for kind, like, need in zip(results, likes, needs, strict=True)
            ]
            return out[0] if len(results) == 1 else tuple(out)

        carried = {f"d_{name}": "Tensor?" for name in self.carries}
        return self._register("backward", self._backward_arguments() | carried, results, fake)

    def _define_double_backward(self) -> torch.library.CustomOpDef:
        results = [
            *self.outputs.values(),
            *(self._gradient_type(self.inputs[n]) for n in self.differentiable),
            *(self.saved[n] for n in self.carries),
        ]
        cotangents = {f"g_{n}": self._optional(self.inputs[n]) for n in self.differentiable}

        def fake(*values: Any) -> Any:
            needs, start = self._needs("double_backward", values[:-1]), len(self.differentiable)
            d_outputs = values[start : start + len(self.outputs)]
            inputs = values[start + len(self.outputs) :]
            saved = inputs[len(self.inputs) + len(self.keeps) :]
            of_inputs, carried = (
                (inputs[i] for i in self._diff_index),
                (saved[i] for i in self._carried_index),
            )
            likes = [*d_outputs, *of_inputs, *carried]
            out = [
                self._fake_like(like) if need else _unwanted(kind, values)
                for kind, like, need in zip(results, likes, needs, strict=True)
            ]
            return out[0] if len(results) == 1 else tuple(out)

        return self._register("double_backward", {**cotangents, **self._backward_arguments()}, results, fake)

    def _backward_arguments(self) -> dict[str, str]:
        d_outputs = {
            f"d_{n}": self._optional(kind) if self.carries else kind for n, kind in self.outputs.items()
        }
        kept = {n: self.outputs[n] for n in self.keeps}
        return {**d_outputs, **self.inputs, **kept, **self.saved, **self.params, "needs": "bool[]"}

    @staticmethod
    def _gradient_type(kind: str) -> str:
        return "Tensor" if kind == "Tensor?" else kind

    @staticmethod
    def _optional(kind: str) -> str:
        return "Tensor?" if kind == "Tensor" else kind

    @staticmethod
    def _fake_like(like: Any) -> Any:
        if isinstance(like, list | tuple):
            return [torch.empty_like(t, memory_format=torch.contiguous_format) for t in like]
        return torch.empty_like(like, memory_format=torch.contiguous_format)

    def _link_forward(self) -> None:
        n_in, n_out, n_par = len(self.inputs), len(self.outputs), len(self.params)

        def setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
            output = output if isinstance(output, tuple) else (output,)
            ctx.set_materialize_grads(False)
            _save(ctx, [*inputs[:n_in], *(output[i] for i in self._kept_index), *output[n_out:]])
            ctx.params, ctx.backend = inputs[n_in:-1], inputs[-1]
            ctx.like = [_describe(o) for o in output[:n_out]]

        def formula(ctx: Any, *d_all: Any) -> tuple[Any, ...]:
            values = _restore(ctx)
            d_outputs, carried = d_all[:n_out], [d_all[n_out + i] for i in self._carried_index]
            if not _any_given([*d_outputs, *carried]):
                # Autograd comes by here on its way from `backward`, which was given kept outputs.
                return tuple(_nones(values[:n_in]) + [None] * (n_par + 1))
            if not _any_given(carried):
                d_outputs = tuple(_filled(d, like) for d, like in zip(d_outputs, ctx.like, strict=True))
            needs = [_any(ctx.needs_input_grad[i]) for i in self._diff_index]
            arguments = (*d_outputs, *values, *ctx.params, needs, *carried)
            grads = self._record("backward", self._backward, arguments, ctx.backend)
            result = _nones(values[:n_in]) + [None] * (n_par + 1)
            for i, grad in zip(self._diff_index, grads, strict=True):
                if grad is not None:
                    result[i] = grad
            return tuple(result)

        self._forward.register_autograd(formula, setup_context=setup)

    def _link_backward(self) -> None:
        n_out, n_par = len(self.outputs), len(self.params)
        n_known = n_out + len(self.inputs) + len(self.keeps)
        n_values = n_known + len(self.saved)

        def setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
            ctx.set_materialize_grads(False)
            _save(ctx, inputs[:n_values])
            ctx.params, rest = inputs[n_values : n_values + n_par], inputs[n_values + n_par :]
            ctx.wanted, *carried, ctx.backend = rest
            ctx.carried = _any_given(carried)

        def formula(ctx: Any, *g_inputs: Any) -> tuple[Any, ...]:
            if ctx.carried:
                raise NotImplementedError(
                    f"ttt_kernels::{self.name}_double_backward gave what is to be differentiated here, and no "
                    "autograd formula is registered for it"
                )
            values = _restore(ctx)
            # A result that nobody wanted is an empty tensor, and so is its cotangent.
            given = [g if want else None for g, want in zip(g_inputs, ctx.wanted, strict=True)]
            rest = [None] * (n_par + 2 + len(self.carries))
            if not _any_given(given):
                return tuple(_nones(values) + rest)
            cotangents = [
                _list_filled(g, values[n_out + i]) for g, i in zip(given, self._diff_index, strict=True)
            ]
            positions = [
                *range(n_out),
                *(n_out + i for i in self._diff_index),
                *(n_known + i for i in self._carried_index),
            ]
            needs = [_any(ctx.needs_input_grad[p]) for p in positions]
            arguments = (*cotangents, *values, *ctx.params, needs)
            out = self._record("double_backward", self._double_backward, arguments, ctx.backend)
            result = _nones(values) + rest
            for position, cotangent in zip(positions, out, strict=True):
                if cotangent is not None:
                    result[position] = cotangent
            return tuple(result)

        self._backward.register_autograd(formula, setup_context=setup)


def _tensors(arguments: Sequence[Any]) -> list[Tensor]:
    """The tensors among a kernel's arguments, those in lists included."""
    values = (v for a in arguments for v in (a if isinstance(a, list | tuple) else (a,)))
    return [v for v in values if isinstance(v, Tensor)]


def _plain_tensors(tensors: Sequence[Tensor]) -> bool:
    """Whether nothing records, traces or transforms these tensors, and memory holds their values as they are."""
    return unrecorded(tensors) and not torch._C._len_torch_dispatch_stack()


def unrecorded(tensors: Sequence[Tensor]) -> bool:
    """As `_plain_tensors`, for kernels of no operator: a mode that watches torch's operations does not see them."""
    if torch.compiler.is_compiling() or in_transform(tensors):
        return False
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        return False
    if torch._C._get_tracing_state() is not None:
        return False
    return all(type(t) in (Tensor, torch.nn.Parameter) and not t.is_neg() for t in tensors)


def _any(needs: Any) -> bool:
    return any(needs) if isinstance(needs, list | tuple) else bool(needs)


def _any_given(cotangents: Sequence[Any]) -> bool:
    """Whether any cotangent, those in lists included, is not None, which is zero."""
    return any(c is not None for g in cotangents for c in (g if isinstance(g, list | tuple) else (g,)))


def _save(ctx: Any, values: Sequence[Any]) -> None:
    """Keeps tensors, lists of tensors and None for the autograd formula."""
    ctx.layout = [len(v) if isinstance(v, list | tuple) else (-1 if v is None else -2) for v in values]
    ctx.save_for_backward(*_tensors(values))


def _restore(ctx: Any) -> list[Any]:
    tensors = iter(ctx.saved_tensors)
    values: list[Any] = []
    for kind in ctx.layout:
        if kind == -1:
            values.append(None)
        else:
            values.append(next(tensors) if kind == -2 else [next(tensors) for _ in range(kind)])
    return values


def _describe(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [_describe(v) for v in value]
    return value.shape, value.dtype, value.device


def _filled(value: Any, like: Any) -> Any:
    """A cotangent with zeros where autograd has none."""
    if isinstance(like, list):
        value = value if value is not None else [None] * len(like)
        return [_filled(v, k) for v, k in zip(value, like, strict=True)]
    shape, dtype, device = like
    return torch.zeros(shape, dtype=dtype, device=device) if value is None else value


def _list_filled(value: Any, like: Any) -> Any:
    """A schema has lists of tensors but no lists with gaps: those are filled, a single None stays."""
    if not isinstance(like, list | tuple):
        return value
    given = value if value else [None] * len(like)
    return [torch.zeros_like(k) if v is None else v for v, k in zip(given, like, strict=True)]


def _nones(values: Sequence[Any]) -> list[Any]:
    """No gradient, in the structure that autograd wants for tensors and lists of tensors."""
    return [[None] * len(v) if isinstance(v, list | tuple) else None for v in values]
