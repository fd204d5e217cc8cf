"""Breaks kernels in one place at a time and demands that a test fails: `python tests/mutations.py`.

Works on a copy. Every mutation names the test that must catch it; one that survives ends the run with status 1.
Needs pybind11 and a C++ compiler beside what the tests need; takes about half an hour on two cores. Arguments choose
mutations whose description has one of them in it.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
TILES, TURNS, ROWS = "csrc/cpu/swa_tiles.h", "csrc/cpu/swa_turns.h", "csrc/cpu/swa_rows.h"
FORWARD, BACKWARD, DOUBLE = (
    f"csrc/cpu/swa_{order}.cpp" for order in ("forward", "backward", "double_backward")
)
SECOND = "test_second_order_equals_dense_attention"
DENSE = "test_equals_dense_attention"
MEAN = "test_within_budget_where_keys_or_values_have_a_mean"


T_TILES, T_VISIBLE, T_FORWARD, T_BACKWARD, T_DOUBLE, T_ALONG, T_ALONG_BACK = (
    f"ttt_kernels/swa/triton_{name}.py"
    for name in ("tiles", "visible", "forward", "backward", "double_backward", "jvp_forward", "jvp_backward")
)
CASE = "test_within_budget_in_float32 and "
SMALL, GROUPS, PACKED = CASE + "everything", CASE + "groups", CASE + "short"
S_PASS, S_PRODUCTS, L_PASS = (
    f"ttt_kernels/{name}.py"
    for name in ("swiglu/triton_kernels", "swiglu/triton_products", "linear_ce/triton_kernels")
)
S_SMALL, L_SMALL = "test_within_budget_in_float32", "test_within_budget and float32"
MEAN_OF_TENSORS = "test_within_budget_where_tensors_have_a_mean"
LAST, ABSENT = "test_gradients_of_the_last_keys_only", "test_queries_without_keys_and_what_lies_there"
N_KERNELS, N_LOCATED, N_LAUNCH = (
    f"ttt_kernels/rms_norm/triton{name}.py" for name in ("_kernels", "_located", "")
)
R_KERNELS, R_ANGLES, R_HEADS, R_LAUNCH = (
    f"ttt_kernels/rope/triton{name}.py" for name in ("_kernels", "_angles", "_heads", "")
)
C_KERNELS, C_SUMS, C_TUPLES, C_CALL = (
    f"ttt_kernels/clipped_sgd/triton_{name}.py" for name in ("kernels", "sums", "tuples", "call")
)
GRID, COPIES, CUDA_SGD = (f"csrc/cuda/{name}" for name in ("grid.h", "async_copy.h", "clipped_sgd.cu"))
D_BLOCK, D_WEIGHTS, D_ATTENTION = (f"csrc/cuda/decode_{name}.h" for name in ("block", "weights", "attention"))
ROUNDS, SAME_BITS, COPIED = "test_rounds_where", "test_same_bits", "test_copies_to_shared_memory"
BLOCK_SUMS, GRID_BARRIER, FASTER = (
    "test_sums_of_a_block",
    "test_barrier_of_the_grid",
    "test_the_faster_backend",
)
SETS, BUDGETS = "test_every_instruction_set", "within_budget"
BUDGET, ANGLES, THRESHOLD = "test_within_budget", "test_angles_far_out", "test_at_the_threshold"


SWEEP, SUMS, ROLLBACK, ALONG, STRETCHES, SLABS, CACHES = (
    f"engine/{name}.py"
    for name in ("through_time", "cotangents", "rollback", "tangents", "snapshots", "slabs", "caches")
)
SWEEPS = "test_sweeps_equal_the_graph"
STEP = "engine/step_back.py"
REPLAY, RECORDINGS, WINDOW, STATE, REPLAY_SWEEP, SWEEP_SPACE = (
    f"engine/{name}.py" for name in ("replay", "recordings", "window", "state", "replay_sweep", "sweep_space")
)
REPLAYED = "test_a_second_reading or test_states_take_turns"
SWEPT = "test_a_second_sweep"
TWIN, SLOPE = "test_within_budget and swiglu_jvp", "test_within_budget and linear_ce_slope"
ATTENTION_TWIN = "test_within_budget and swa_jvp"
NORM_TWIN = "test_within_budget and rms_norm_jvp and triton"

OPERATORS = ("swa", "swiglu", "linear_ce", "rms_norm", "rope", "clipped_sgd", "decode")


class Mutation(NamedTuple):
    """Replaces `old` by `new` in a file; a test of `test`, an expression of pytest's -k, must fail."""

    what: str
    file: str
    old: str
    new: str
    test: str

    def module(self) -> str:
        """The file of the test: that of the meta-gradient for the engine, of all operators for what is not one's own.

        Else its operator's, whose folder the file is in or whose name its name begins with, for its kind of kernels.
        """
        *folders, name = Path(self.file).parts
        if self.file in (REPLAY, RECORDINGS, WINDOW, STATE):
            return "tests/test_replay.py"
        if self.file in (REPLAY_SWEEP, SWEEP_SPACE):
            return "tests/test_replay_sweep.py"
        if folders == ["engine"]:
            return "tests/test_meta_gradient.py"
        if folders == ["ttt_kernels"] or self.test in (TWIN, SLOPE, ATTENTION_TWIN, NORM_TWIN):
            return "tests/test_every_operator.py"
        if self.file == R_HEADS:
            return "tests/test_rope_heads.py"
        if self.file in (GRID, COPIES):
            return "tests/test_cuda_on_host.py"
        if self.test == FASTER:
            return "tests/test_backend_choice.py"
        of_folder = folders[0] == "ttt_kernels"
        operator = folders[1] if of_folder else next(o for o in OPERATORS if name.startswith(o))
        kind = next((f"_{kind}" for kind in ("triton", "cuda") if kind in self.file), "")
        along = "_jvp" if self.what.startswith("Triton, tangents") else ""
        return f"tests/test_{operator}{along}{kind}.py"


MUTATIONS = (
    Mutation("window one key too wide", "ttt_kernels/swa/visible.py", "(window - 1)", "window", DENSE),
    Mutation("packed sequences see the one before", "ttt_kernels/swa/visible.py", "right=True) - 1",
             "right=True) - 2", DENSE),
    Mutation("hidden keys before the window are seen", ROWS, "fill(tile + end, kQueries - end, C(-INFINITY));",
             "", DENSE),
    Mutation("keys after the query are seen", ROWS, "fill(tile, begin, C(-INFINITY));", "", DENSE),
    Mutation("a group loses its other heads", ROWS, "return kv_head * group + row % group;",
             "return kv_head * group;", DENSE),
    Mutation("backward forgets the D correction", BACKWARD, "p * (load(d_p + i) - d)", "p * load(d_p + i)", DENSE),
    Mutation("weights beyond one", "csrc/cpu/swa_gradient.h", "exponential(select<C>(x > zero, zero, x))",
             "exponential(x)", "test_weights_are_at_most_one"),
    Mutation("chunks do not wait for their turn", TURNS, "if (chunk == 0) return;", "return;",
             "test_same_bits_for_any_number_of_threads"),
    Mutation("S' loses A K^T", DOUBLE, "if (c.a) product<false>(kK, a_panels, some, seen, tiles.s1);",
             "if (c.a) fill(tiles.s1, seen.size() * kQueries, C(0));", SECOND),
    Mutation("S' loses Q B^T", DOUBLE, "product<true>(kB, of.q_panels, some, seen, tiles.s1)", "(void)0", SECOND),
    Mutation("S' without its mean", DOUBLE, "s = load(t.s1 + i) - of_r,", "s = load(t.s1 + i),", SECOND),
    Mutation("dO_bar loses P C", DOUBLE, "if (given(c.c, seen)) add_rows(tiles.p, kC, some, seen, sum);", "", SECOND),
    Mutation("dO_bar loses r O", DOUBLE, "load(m + d) - load(o + d)", "load(m + d)", SECOND),
    Mutation("E forgets the D correction", DOUBLE, " - of.delta[row] * r[row];", ";", SECOND),
    Mutation("T forgets the D correction", DOUBLE, "p * (s * difference +", "p * (s * load(t.d_p + i) +", SECOND),
    Mutation("T loses dO C^T", DOUBLE, "(s * difference + load(t.g + i) - of_e)", "(s * difference - of_e)", SECOND),
    Mutation("Q_bar loses dS B", DOUBLE, "if (given(c.b, seen)) add_rows(tiles.d_p, kB, some, seen, sum);", "", SECOND),
    Mutation("K_bar loses dS^T A", DOUBLE, "if (c.a) add_keys(tiles.d_p, a, some, seen, origin, k_sum);", "",
             SECOND),
    Mutation("V_bar of P instead of P'", DOUBLE, "store(t.s1 + i, p * s);", "store(t.s1 + i, p);", SECOND),
    Mutation("r loses n", DOUBLE, "r[row] += near[row];", "r[row] += C(0);", MEAN),
    Mutation("o without what it lost", "csrc/cpu/swa_gradient.h", "if (!rest) return;", "return;", MEAN),
    Mutation("S' with what a row has in common", DOUBLE, "return shared > 4 * spread;", "return false;", MEAN),
    Mutation("cotangents of keys before key_start are read", DOUBLE, "{c.b, c.key_start}", "{c.b, 0}",
             "test_backward_from_a_key_on_differentiates"),
    Mutation("cotangents in the block of key_start are left out", DOUBLE, "seen.end > c.key_start",
             "seen.begin > c.key_start", "test_backward_from_a_key_on_differentiates"),
    Mutation("twin: V_bar loses P^T X", DOUBLE, "if (c.x) add_keys(tiles.p, x, some, seen, origin, v_sum);", "",
             ATTENTION_TWIN),
    Mutation("twin: T loses X V^T", DOUBLE, "if (by_c && c.x) product<true>(kV, x_panels, some, seen, tiles.g);", "",
             ATTENTION_TWIN),
    Mutation("twin: T loses rowsum(X * O)", DOUBLE,
             "e[row] += dot(x + row * stride, o, D);\n            }\n        }", "}\n        }", ATTENTION_TWIN),
    Mutation("twin: dV of P' instead of P", DOUBLE, "add_keys(tiles.p, of.d_o, some, seen, origin, dv_sum);",
             "add_keys(tiles.s1, of.d_o, some, seen, origin, dv_sum);", ATTENTION_TWIN),
    Mutation("twin: r loses n", DOUBLE, "if (c.r) c.r[statistic(position, head)] = r[row];",
             "if (c.r) c.r[statistic(position, head)] = r[row] - near[row];", "test_jvp_where_tensors_have_a_mean"),
    Mutation("twin: the tangent without what it lost", DOUBLE, "if (c.do_rest) c.do_rest.write_rest(",
             "if (c.do_rest) c.do_rest.write(", "test_jvp_where_tensors_have_a_mean"),
    Mutation("twin: E loses rowsum(dO * O')", DOUBLE, "e[row] = dot(of.d_o + row * stride, o, D);", "e[row] = C(0);",
             ATTENTION_TWIN),
    Mutation("swiglu's slope loses its second term", "csrc/cpu/swiglu.cpp", "slope = s + silu * rest", "slope = s",
             SETS),
    Mutation("swiglu's curvature", "csrc/cpu/swiglu.cpp", "splat(C(2)) + g * (rest - s)",
             "splat(C(2)) + g * rest", SETS),
    Mutation("swiglu's cotangent of G loses H's", "csrc/cpu/swiglu.cpp", " + to_h * slope * u", "", SETS),
    Mutation("swiglu: x_bar loses dG b", "ttt_kernels/swiglu/products.py", "(d_gate, b), (d_up, c))", "(d_up, c))",
             BUDGETS),
    Mutation("swiglu: what G carries is lost", "csrc/cpu/swiglu.cpp", "(splat(C(1)) - s)) + to_g, n)",
             "(splat(C(1)) - s)), n)", SETS),
    Mutation("swiglu: what U carries is lost", "csrc/cpu/swiglu.cpp", "dh * silu + to_u, n)", "dh * silu, n)", SETS),
    Mutation("swiglu: W_g's cotangent has what G carries too", "ttt_kernels/swiglu/products.py",
             "(transposed(through_gate), x_)", "(transposed(gate_bar), x_)", BUDGETS),
    Mutation("swiglu: products are made twice", "ttt_kernels/swiglu/__init__.py", 'carries=("gate", "up"),', "",
             "test_reverse_over_reverse"),
    Mutation("carried cotangents stay behind", "ttt_kernels/registry.py", "*ctx.params, needs, *carried)",
             "*ctx.params, needs, *[None] * len(carried))", "test_within_budget and swiglu"),
    Mutation("norm: x_bar loses 3 m p", "csrc/cpu/rms_norm.cpp", "C(3) * m * p", "m * p", SETS),
    Mutation("norm: dy_bar loses the residual's cotangent", "csrc/cpu/rms_norm.cpp",
             " + read_or_zero(zr, i, k), k, stream_dy", ", k, stream_dy", SETS),
    Mutation("norm: the last rows have no part in dw", "csrc/cpu/rms_norm.cpp", "last < rows ? last : rows",
             "last < rows ? last : last - kRowsPerSum", SETS),
    Mutation("loss: the others do not decay", "csrc/cpu/linear_ce.cpp", "others[r] *= factor;", "",
             "huge_logits or budget"),
    Mutation("loss: the target is among the others", "csrc/cpu/linear_ce.cpp",
             "if (own >= 0) row[own] = from_compute<T>(C(-HUGE_VAL));", "", BUDGETS),
    Mutation("loss: q forgets the mean", "csrc/cpu/linear_ce.cpp", "(read(tangent + i, k) - middle)",
             "read(tangent + i, k)", BUDGETS),
    Mutation("loss: the mean loses a W_t", "ttt_kernels/linear_ce/blockwise.py",
             "at_own = at_own + (of_a * _own_rows(weight, own, x)).sum(1)", "", BUDGETS),
    Mutation("loss: the mean loses x b_t", "ttt_kernels/linear_ce/blockwise.py",
             "at_own = at_own + (of_x * _own_rows(g_weight, own, x)).sum(1)", "", BUDGETS),
    Mutation("loss: x_bar loses dl b", "ttt_kernels/linear_ce/blockwise.py", "turn.mul_(d[:, None])", "turn.mul_(0)",
             BUDGETS),
    Mutation("loss and slope: W's cotangent loses c x", "ttt_kernels/linear_ce/blockwise.py",
             "operand((of_a + of_c * x).to(x.dtype))", "operand(of_a.to(x.dtype))", SLOPE),
    Mutation("SGD: l . u is l . l", "csrc/cpu/clipped_sgd.cpp", "sums[3].add(of_l, of_u)", "sums[3].add(of_l, of_l)",
             BUDGETS),
    Mutation("SGD: G loses 3 h a / n^2", "ttt_kernels/clipped_sgd/cpu.py", "eta * b - 3 * eta * h * a",
             "eta * b - eta * h * a", BUDGETS),
    Mutation("rope: neighbours turn by one angle", "csrc/cpu/rope.cpp",
             "return __builtin_shufflevector(v, v, (I / 2)...)",
             "return __builtin_shufflevector(v, v, (I / 4)...)", BUDGETS),
    Mutation("a twin's inputs have no part in its tangent", "ttt_kernels/jvp.py", "tuple(total(a, b) for",
             "tuple(a for", "test_the_twin_differentiates"),
    Mutation("swiglu's twin: H's cotangent loses t_dy e", "ttt_kernels/swiglu/jvp.py", "(dy_, of_down), (t_dy_, e))",
             "(dy_, of_down))", TWIN),
    Mutation("swiglu's twin: x's cotangent loses dG^ b", "ttt_kernels/swiglu/jvp.py", "(d_gate, b), (d_up, c)),",
             "(d_up, c)),", TWIN),
    Mutation("swiglu's twin: W_d loses H^", "ttt_kernels/swiglu/jvp.py", "(transposed(t_dy_), t_hidden)),", "),", TWIN),
    Mutation("sweep: the weights roll on", ROLLBACK, "torch.addcmul(w, g, rate", "torch.addcmul(w, g, -rate", SWEEPS),
    Mutation("sweep: later steps do not know their weights", SWEEP, "total(d, f.to(w.dtype)) for",
             "f.to(w.dtype) for", SWEEPS),
    Mutation("sweep: earlier keys have no cotangents", SUMS, "sum_[:, own] += piece", "pass", SWEEPS),
    Mutation("sweep: slow weights of the last step only", SUMS, "if found is None else found.add_(grad)",
             "if found is None else found", SWEEPS),
    Mutation("truncation: cut a step late", SWEEP, "index % self.truncate_steps == 0",
             "index % self.truncate_steps == 1", "test_truncated_to_one_step"),
    Mutation("stretches: fast weights do not know later ones", STRETCHES, "*zip(flat(read.fast), d_fast, strict=True),",
             "", SWEEPS),
    Mutation("stretches: keys do not know later ones", STRETCHES,
             "*zip(read.rows, d_rows.pop(index, read.rows, unseen), strict=True),", "", SWEEPS),
    Mutation("stretches: cotangents of other rows", STRETCHES, "d_rows.pop(index, read.rows, unseen)",
             "d_rows.pop(index, read.rows, 0)", "test_drawn_models"),
    Mutation("stretches: each begins at position 0", STRETCHES, "part.start, past, masters", "0, past, masters",
             "test_truncation or " + SWEEPS),
    Mutation("stretches: a cut falls behind the first", SWEEP, "index += self.first_step", "index += 0",
             "test_drawn_models"),
    Mutation("stretches: a slab's keys do not know later stretches", SLABS, "d_rows.add_last(x.shape[1], (dk, dv))",
             "pass", SWEEPS),
    Mutation("stretches: a slab drops the cotangents of earlier ones", SLABS, "*d_rows.before(given)",
             "*(torch.zeros_like(t) for t in given)", SWEEPS),
    Mutation("stretches: the sweep drops the cotangents of earlier ones", SWEEP, "*d_rows.before(self._past)",
             "*(torch.zeros_like(t) for t in self._past)", SWEEPS),
    Mutation("stretches: one key too few is kept", CACHES, "else min(length, window - 1)",
             "else min(length, window - 2)", SWEEPS),
    Mutation("tangents: values have none", ALONG, "ops.rope(k_dot, positions), v_dot)",
             "ops.rope(k_dot, positions), 0 * v_dot)", SWEEPS),
    Mutation("tangents: keys stay where they are", ALONG, "ops.rope(k_dot, positions), v_dot)", "k_dot, v_dot)",
             SWEEPS),
    Mutation("tangents: none beside an MLP", ALONG, "ops.norm_jvp(y, w.post_norm, x, y_dot, x_dot)",
             "ops.norm_jvp(y, w.post_norm, x, y_dot, None)", SWEEPS),
    Mutation("replay: a slot is not waited for to be free", REPLAY, "                lane.wait(slot.free)",
             "                pass", REPLAYED),
    Mutation("replay: a slab is not waited for", REPLAY, "lane.wait(slot.ready)", "pass", REPLAYED),
    Mutation("replay: the tokens are not waited for", REPLAY, "lane.wait(main.mark())", "pass", REPLAYED),
    Mutation("replay: the caller does not wait", REPLAY, "main.wait(lane.mark())", "pass", REPLAYED),
    Mutation("replay: targets of the recording", REPLAY, "space.targets.copy_(targets)", "space.targets = targets",
             REPLAYED),
    Mutation("replay: hidden states of the recording", REPLAY, "space.x.copy_(x)", "space.x = x", REPLAYED),
    Mutation("replay: positions of the recording", REPLAY,
             "torch.arange(first, first + x.shape[1], out=space.own_positions)", "pass", REPLAYED),
    Mutation("replay: all mini-batches at the first one's rows", REPLAY, "space.run(space.lanes.first, (kind, start)",
             "space.run(space.lanes.first, (kind, 0)", REPLAYED),
    Mutation("replay: the next user does not wait", RECORDINGS, "self.lanes.main.wait(self._used)", "pass",
             "test_the_next_user_waits"),
    Mutation("replay: rows move onto themselves", WINDOW, "2 * k.shape[1] > self.length", "False", REPLAYED),
    Mutation("replay: a gap holds what it held", WINDOW, "mine[:, :start] = 0", "pass", REPLAYED),
    Mutation("replay: fast weights of another state", STATE, "mine.copy_(theirs)", "pass", REPLAYED),
    Mutation("replay: the inner rate of the recording", REPLAY_SWEEP, "grads, space.lr))", "grads, loop.lr))",
             "test_another_inner_rate"),
    Mutation("replay: slow weights of the recording", SWEEP_SPACE, "                mine.copy_(theirs)\n            s",
             "                pass\n            s", "test_changed_weights"),
    Mutation("replay: a sweep's weights are another's", SWEEP_SPACE, "self._owner() is not owner", "False",
             "test_changed_weights"),
    Mutation("replay: later steps do not count", REPLAY_SWEEP, "mine.add_(d_fast) if along else ", "", SWEPT),
    Mutation("replay: earlier keys have no cotangents", REPLAY_SWEEP, "d_past[:, start - first : stop - first],",
             "torch.zeros_like(d_past[:, start - first : stop - first]),", SWEPT),
    Mutation("replay: cotangents of keys stay where they are", REPLAY_SWEEP, "sums[:, start - own : stop - own],",
             "sums[:, start:stop],", SWEPT),
    Mutation("replay: sums of the sweep before", REPLAY_SWEEP, "total.zero_()", "pass", SWEPT),
    Mutation("replay: the weights do not roll back", REPLAY_SWEEP, "w.addcmul_(g, space", "w.addcmul(g, space", SWEPT),
    Mutation("replay: gradients are the space's own", REPLAY_SWEEP, "t.to(kind, copy=True) for",
             "t.to(kind) for", "test_results_outlive"),
    Mutation("replay: 16-bit weights have 16-bit sums", SWEEP_SPACE, "torch.promote_types(t.dtype, torch.float32)",
             "t.dtype", "test_cotangents_of_16_bit_weights"),
    Mutation("sweep: 16-bit weights have 16-bit sums", SUMS, "torch.promote_types(self._dtypes[i], torch.float32)",
             "self._dtypes[i]", "test_cotangents_of_16_bit_weights"),
    Mutation("Triton: T loses r", T_DOUBLE, "(b_s1 - b_r) * (b_dp - b_delta)", "b_s1 * (b_dp - b_delta)", SMALL),
    Mutation("Triton: T loses D", T_DOUBLE, "(b_s1 - b_r) * (b_dp - b_delta)", "(b_s1 - b_r) * b_dp", SMALL),
    Mutation("Triton: T loses dO C^T", T_DOUBLE, "b_g = b_g + b_doc", "b_g = b_g", SMALL),
    Mutation("Triton: T loses E", T_DOUBLE, "b_g = -b_e", "b_g = 0.0 * b_e", SMALL),
    Mutation("Triton: Q_bar loses dS B", T_DOUBLE, "add_product(b_acc, b_ds, b_b, D, FIRST)", "b_acc", SMALL),
    Mutation("Triton: Q_bar loses T K", T_DOUBLE, "b_acc = add_product(b_acc, b_t, b_k, D, FIRST)", "",
             SMALL),
    Mutation("Triton: K_bar loses dS^T A", T_DOUBLE, "add_product(b_kbar, b_ds, b_a, D, FIRST)", "b_kbar", SMALL),
    Mutation("Triton: K_bar loses T^T Q", T_DOUBLE, "add_product(b_kbar, b_t, b_q, D, FIRST)", "b_kbar", SMALL),
    Mutation("Triton: V_bar of P S'", T_DOUBLE, "b_p * (b_s1 - b_r), b_do", "b_p * b_s1, b_do", SMALL),
    Mutation("Triton: dO_bar loses P C", T_DOUBLE, "add_product(b_m, b_p, b_c, D)", "b_m", SMALL),
    Mutation("Triton: P detached", T_DOUBLE,
             "add_product(b_m, b_ps1, load_rows(x_v, j, low, Tk, BK, D, PIECES, EDGE), D)", "b_m", SMALL),
    Mutation("Triton: dO_bar loses r O", T_DOUBLE, "b_m[piece] - b_r[:, None] * b_o", "b_m[piece]",
             SMALL),
    Mutation("Triton: E loses D r", T_DOUBLE, "b_dom - b_delta * b_r", "b_dom", SMALL),
    Mutation("Triton: r loses n", T_DOUBLE, "b_r + b_near, i", "b_r, i", CASE + "key"),
    Mutation("Triton: S' with what a row has in common", T_DOUBLE,
             "tl.where(_common(b_r, b_square), b_r, 0.0)", "0.0 * b_r", MEAN),
    Mutation("Triton: o without what it lost", T_TILES, "b_piece += load_piece(x_rest", "0 * load_piece(x_rest", MEAN),
    Mutation("Triton, tangents: O' loses P C", T_ALONG, "b_m = add_product(b_m, b_p, b_c, D, FIRST)", "pass", SMALL),
    Mutation("Triton, tangents: S' loses Q B^T", T_ALONG, "b_s1 = add_product_t(b_s1, b_q, b_b, D)", "pass", SMALL),
    Mutation("Triton, tangents: the mean does not move", T_ALONG, "b_shift = b_moved - b_near",
             "b_shift = 0.0 * b_near", SMALL),
    Mutation("Triton, tangents: S' with what a row has in common", T_ALONG, "b_moved = b_near + tl.sum(b_p * b_s1, 1)",
             "b_moved = b_near + 0.0 * tl.sum(b_p * b_s1, 1)", MEAN_OF_TENSORS),
    Mutation("Triton, tangents: sums about the old mean", T_ALONG, "_less(b_m, b_o, b_shift[:, None])", "b_m", SMALL),
    Mutation("Triton, tangents: O' without what it lost", T_ALONG, "b_lost = rest(b_piece, t[0].dtype.element_ty)",
             "b_lost = 0.0 * b_piece", "test_what_is_lost"),
    Mutation("Triton, tangents: E without what O' lost", T_ALONG_BACK, "head_or_none(t_odot_rest, sequence, head)",
             "None", "test_what_is_lost"),
    Mutation("Triton, tangents: T loses X V^T", T_ALONG_BACK, "b_g = product_t(b_x, b_v, BQ, BK, D)",
             "b_g = tl.zeros((BQ, BK), tl.float32)", SMALL),
    Mutation("Triton, tangents: E loses rowsum(X * O)", T_ALONG_BACK,
             "b_e += row_sums(x_o, x_rest, x_x, i, Tq, BQ, D, PIECES)", "pass", SMALL),
    Mutation("Triton, tangents: Q_bar loses dS B", T_ALONG_BACK, "b_qbar = add_product(b_qbar, b_ds, b_b, D, FIRST)",
             "pass", SMALL),
    Mutation("Triton, tangents: Q_bar loses dO C^T", T_ALONG_BACK, "b_g = add_product_t(b_g, b_do, b_c, D)", "pass",
             SMALL),
    Mutation("Triton, tangents: K_bar loses dO C^T", T_ALONG_BACK, "b_g = add_product_t(b_g, b_c, b_do, D)", "pass",
             SMALL),
    Mutation("Triton, tangents: K_bar loses dS^T A", T_ALONG_BACK, "b_kbar = add_product(b_kbar, b_ds, b_a, D, FIRST)",
             "pass", SMALL),
    Mutation("Triton, tangents: V_bar loses P^T X", T_ALONG_BACK, "b_vbar = add_product(b_vbar, b_p, b_x, D, FIRST)",
             "pass", SMALL),
    Mutation("Triton, tangents: V_bar of P S'", T_ALONG_BACK, "b_p * (b_s1 - b_r), b_do", "b_p * b_s1, b_do", SMALL),
    Mutation("Triton, tangents: dV of P'", T_ALONG_BACK, "b_dv = add_product(b_dv, b_p, b_do, D, FIRST)",
             "b_dv = add_product(b_dv, b_p * b_r, b_do, D, FIRST)", SMALL),
    Mutation("Triton, tangents: S' of keys without tangents has no mean", T_ALONG_BACK, "        if MOVES:\n",
             "        if x_a is not None or b_b is not None:\n", "test_missing_tangents"),
    Mutation("Triton, tangents: a head of the group is lost", T_ALONG_BACK, "for member in range(group):",
             "for member in range(group - 1 + (group == 1)):", SMALL),
    Mutation("Triton, tangents: the tile of key_start has none", T_VISIBLE, "tl.maximum(span[0], cut)",
             "tl.maximum(span[0], cut + SIZE)", SMALL),
    Mutation("Triton, tangents: tiles before key_start are lost", T_VISIBLE, "tl.minimum(span[5], cut), SIZE",
             "tl.minimum(span[2], cut), SIZE", CASE + "last and not keys"),
    Mutation("Triton, tangents: keys before key_start have no gradients", "ttt_kernels/swa/triton_jvp.py",
             '("jvp_keys_before", 0, key_start,', '("jvp_keys_before", key_start, key_start,', SMALL),
    Mutation("Triton: dQ forgets D", T_BACKWARD, "b_p * (b_dp - b_delta[:, None])", "b_p * b_dp", SMALL),
    Mutation("Triton: dK forgets D", T_BACKWARD, "(product_t(b_v, b_do, BK, BQ, D) - b_delta)",
             "product_t(b_v, b_do, BK, BQ, D)", SMALL),
    Mutation("Triton: weights beyond one", T_BACKWARD, "tl.minimum(b_s, 0.0, propagate_nan=tl.PropagateNan.ALL)",
             "b_s", "test_weights_are_at_most_one"),
    Mutation("Triton: window one key too wide", T_VISIBLE, "tl.maximum(b_i + (Tk - Tq + 1) - window, low)",
             "tl.maximum(b_i + (Tk - Tq) - window, low)", SMALL),
    Mutation("Triton: range of keys begins too late", T_VISIBLE, "b_i + (Tk - Tq + 1) - window, low",
             "b_i + (Tk - Tq + 2) - window, low", CASE + "reaches"),
    Mutation("Triton: range of queries ends too early", T_VISIBLE, "tl.minimum(j + window - (Tk - Tq), Tq)",
             "tl.minimum(j + window - (Tk - Tq) - 1, Tq)", CASE + "reaches"),
    Mutation("Triton: middle of keys begins too early", T_VISIBLE, "full = tl.minimum(tl.cdiv(first_key(last",
             "full = tl.minimum(tl.cdiv(first_key(i", CASE + "cache"),
    Mutation("Triton: middle of keys ends too late", T_VISIBLE, "tl.maximum((i + (Tk - Tq) + 1) // BK * BK, full)",
             "tl.maximum((i + BQ - 1 + (Tk - Tq) + 1) // BK * BK, full)", CASE + "causal"),
    Mutation("Triton: middle of queries begins too early", T_VISIBLE, "tl.maximum(last - (Tk - Tq), 0), BQ)",
             "tl.maximum(j - (Tk - Tq), 0), BQ)", CASE + "causal"),
    Mutation("Triton: invalid keys are seen", T_VISIBLE, "tl.maximum(b_i + (Tk - Tq + 1) - window, low)",
             "tl.maximum(b_i + (Tk - Tq + 1) - window, 0)", SMALL),
    Mutation("Triton: invalid keys in the middle", T_VISIBLE, "full_end = tl.where(j < low, full, full_end)", "",
             CASE + "full"),
    Mutation("Triton: packed, the neighbour's last key is seen", T_VISIBLE,
             "b_first = tl.maximum(b_first, tl.load(p_first + b_i, mask=b_i < Tq, other=0))",
             "b_first = tl.maximum(b_first, tl.load(p_first + b_i, mask=b_i < Tq, other=0) - 1)", PACKED),
    Mutation("Triton: packed, the last query is lost", T_VISIBLE, "end = tl.minimum(end, tl.load(p_end + j))",
             "end = tl.minimum(end, tl.load(p_end + j)) - 1", PACKED),
    Mutation("Triton: backward loses a head of the group", T_BACKWARD, "for member in range(group):",
             "for member in range(group - 1 + (group == 1)):", SMALL),
    Mutation("Triton: double backward loses a head of the group", T_DOUBLE, "for member in range(group):",
             "for member in range(group - 1 + (group == 1)):", SMALL),
    Mutation("Triton: values of the first head for all", T_FORWARD, "head_of(t_v, sequence, head // group)",
             "head_of(t_v, sequence, 0)", GROUPS),
    Mutation("Triton: the sum does not decay", T_FORWARD, "scaled(b_acc, b_decay[:, None])", "b_acc",
             CASE + "causal"),
    Mutation("Triton: invalid rows are loaded in pieces", T_TILES, "(b_row >= low) & (b_row < high)",
             "(b_row >= 0) & (b_row < high)", ABSENT),
    Mutation("Triton: invalid rows are loaded in columns", T_TILES, "(b_row >= b_x[3]) & (b_row < b_x[4])",
             "(b_row >= 0) & (b_row < b_x[4])", ABSENT),
    Mutation("Triton: cotangents count from key 0", T_TILES, "p_first - tl.cast(start, tl.int64) * stride",
             "p_first", LAST),
    Mutation("Triton: a column too many in pieces", T_TILES, "m_column = (b_column < D)[None, :]",
             "m_column = (b_column < D + 1)[None, :]", "test_within_budget_in_16_bits or " + SMALL),
    Mutation("Triton: swiglu's slope loses its second term", S_PASS, "b_dh * b_u * (b_s + b_silu * (1 - b_s))",
             "b_dh * b_u * b_s", S_SMALL),
    Mutation("Triton: swiglu's curvature", S_PASS, "2 + b_g * (b_rest - b_s)", "2 + b_g * b_rest", S_SMALL),
    Mutation("Triton: swiglu's cotangent of G loses H's", S_PASS, " + b_hbar * b_slope * b_u", "", S_SMALL),
    Mutation("Triton: swiglu's cotangent of U loses dH's", S_PASS, "b_dh * b_slope * b_tg + b_hbar", "b_hbar",
             S_SMALL),
    Mutation("Triton: what G carries is lost", S_PASS, "(1 - b_s)) + b_gbar", "(1 - b_s))", S_SMALL),
    Mutation("Triton: what U carries is lost", S_PASS, "b_dh * b_silu + b_ubar", "b_dh * b_silu", S_SMALL),
    Mutation("Triton: swiglu reads x of the first sequence", S_PRODUCTS, "sequence.to(tl.int64) * t[1]",
             "sequence.to(tl.int64) * 0", S_SMALL),
    Mutation("Triton: swiglu sums what is behind a row", S_PRODUCTS, "mask=b_k < left", "mask=b_k < left + 1",
             S_SMALL),
    Mutation("Triton: swiglu's tiles are not as tall at the end", S_PRODUCTS, "tl.minimum(down - top, _TALL)", "_TALL",
             "test_tiles_in_every_place"),
    Mutation("Triton: the loss's sums do not decay", L_PASS, "tl.load(p_sum + row) * decay", "tl.load(p_sum + row)",
             "test_online"),
    Mutation("Triton: the slope's sums do not decay", L_PASS, "0.0, BLOCK) * decay", "0.0, BLOCK)",
             "test_online"),
    Mutation("Triton: the target is among the others", L_PASS, "== own, 0.0, b_p)", "== own, b_p, b_p)", L_SMALL),
    Mutation("Triton: the loss reads behind a row", L_PASS, "mask=b_column < cols, other",
             "mask=b_column <= cols, other", L_SMALL),
    Mutation("Triton: the loss's mean is forgotten", L_PASS, "(b_along - middle)", "b_along", L_SMALL),
    Mutation("Triton: P - 1 cancels", L_PASS, "tl.abs(x) < 0.35", "tl.abs(x) < 0.0", "test_a_certain_target"),
    Mutation("Triton: a row of -inf", L_PASS, "tl.where(top == _NONE, 0.0, top)", "top",
             "test_logits_of_minus_infinity"),
    Mutation("Triton: a column too many", T_TILES, "(b_column < D)[None, :]\n    return tl.load(_row",
             "(b_column < D + 1)[None, :]\n    return tl.load(_row", SMALL),
    Mutation("Triton: norm, x_bar loses 3 m p", N_KERNELS, "b_of_h = b_r * (mean(b_a * b_dh, N) - 3.0 * b_m * b_p)",
             "b_of_h = b_r * (mean(b_a * b_dh, N) - b_m * b_p)", BUDGET),
    Mutation("Triton: norm's twin, x_bar loses 3 m p", N_KERNELS,
             "b_of_h += b_r * (mean(b_a * b_dh, N) - 3.0 * b_m * b_p)", "b_of_h += b_r * mean(b_a * b_dh, N)",
             NORM_TWIN),
    Mutation("Triton: norm's twin, w's cotangent loses h p", N_KERNELS, "b_of_w += b_r * (b_a - b_h * b_p) * b_u",
             "b_of_w += b_r * b_a * b_u", NORM_TWIN),
    Mutation("Triton: norm's twin, x_bar loses b u", N_KERNELS, "b_to_h += b_b * b_u", "b_to_h += 0.0", NORM_TWIN),
    Mutation("Triton: norm, x_bar loses b dy h", N_KERNELS, "b_of_h += mean(b_b * b_dy * b_h, N)", "b_of_h += 0.0",
             BUDGET),
    Mutation("Triton: norm, dx loses its mean", N_KERNELS, "b_dh - b_h * mean(b_dh * b_h, N)", "b_dh", BUDGET),
    Mutation("Triton: norm, dw loses the last partial sum", N_LAUNCH, '"count": len(partial),',
             '"count": len(partial) - 1,', BUDGET),
    Mutation("Triton: norm, rows of another stride", N_LOCATED, "tuple(size * stride for stride in strides)",
             "(size * strides[0], *found[-1][1][1:])", "test_within_budget_of_anything"),
    Mutation("Triton: norm, sequences of the first", "ttt_kernels/rms_norm/triton_rows.py",
             "(b_outer // middle).to(tl.int64) * t[1]", "0", "test_rows_of_three_strides"),
    Mutation("Triton: rope, halves turn the other way", R_KERNELS, "b_high * b_cos + b_low * b_sin",
             "b_high * b_cos - b_low * b_sin", BUDGET),
    Mutation("Triton: rope, the backward turns forward", R_KERNELS, "b_sin = -b_sin", "b_sin = b_sin", BUDGET),
    Mutation("Triton: rope, a quarter with the wrong sign", R_ANGLES, "(b_quarter == 1) | (b_quarter == 2)",
             "b_quarter == 2", "test_every_quarter"),
    Mutation("Triton: rope, angles in float32", R_ANGLES, "b_position.to(tl.float64)[:, None] * b_quarters[None, :]",
             "(b_position.to(tl.float32)[:, None] * b_quarters[None, :].to(tl.float32)).to(tl.float64)", ANGLES),
    Mutation("Triton: rope, positions of the first sequence", R_LAUNCH,
             "positions.stride(0) if positions.dim() == 2 else 0", "0", BUDGET),
    Mutation("Triton: heads, keys have queries' weight", R_HEADS, "b_heads[i][1], b_wk,", "b_heads[i][1], b_wq,",
             "test_forward"),
    Mutation("Triton: heads, the backward turns forward", R_HEADS, "b_cos, -b_sin", "b_cos, b_sin", "test_backward"),
    Mutation("Triton: heads, a norm without its mean's gradient", R_HEADS, " - b_h * mean(b_dh * b_h, D)", "",
             "test_backward"),
    Mutation("Triton: heads, reciprocals of the first sequence", R_HEADS,
             "tl.load(p_rstd + ((sequence * T + b_t)", "tl.load(p_rstd + ((b_t)", "test_backward"),
    Mutation("sweep: keys that are not there are not copied", CACHES, "mine.copy_(new)", "pass", SWEEPS),
    Mutation("Triton: SGD, squares in float32", C_SUMS, "b_gg += b_g * b_g",
             "b_gg += (b_g.to(tl.float32) * b_g.to(tl.float32)).to(tl.float64)", "test_norm_of_extreme"),
    Mutation("Triton: SGD, the threshold in float32", C_SUMS, "threshold = number(max_norm)",
             "threshold = number(max_norm).to(tl.float32).to(tl.float64)", THRESHOLD),
    Mutation("Triton: SGD, at the threshold nothing is clipped", C_SUMS, "norm < threshold, zero",
             "norm <= threshold, zero", THRESHOLD),
    Mutation("Triton: SGD, G loses 3 h a / n^2", C_KERNELS, "eta * b - 3.0 * eta * h * a", "eta * b - eta * h * a",
             BUDGET),
    Mutation("Triton: SGD, sequences that rest move", C_KERNELS, "blocks = tl.where(active, blocks, 0)", "",
             "test_update_in_place"),
    Mutation("Triton: SGD, the last block is lost", C_TUPLES, "tl.cdiv(count - start, BLOCK)",
             "(count - start) // BLOCK", BUDGET),
    Mutation("Triton: SGD, all chunks of the first tensor", C_TUPLES, "chunk - begin, first)", "chunk, first)",
             BUDGET),
    Mutation("SGD: a norm that is NaN does not clip", "csrc/common/clipped_sgd.h", "!(norm < max_norm)",
             "norm >= max_norm", "test_bad_gradients_show"),
    Mutation("CUDA: sums of warps are read early", GRID, "scratch[warp] = value;\n    __syncthreads();",
             "scratch[warp] = value;", BLOCK_SUMS),
    Mutation("CUDA: sums of warps are written early", GRID, "    __syncthreads();\n    return value;",
             "    return value;", BLOCK_SUMS),
    Mutation("CUDA: a block does not wait for itself at the grid's barrier", GRID,
             "    together();\n    if (threadIdx.x == 0 &&", "    if (threadIdx.x == 0 &&", GRID_BARRIER),
    Mutation("CUDA: a block leaves the grid's barrier early", GRID, "between_looks();\n    }\n    together();",
             "between_looks();\n    }", GRID_BARRIER),
    Mutation("CUDA: the grid's barrier is one block short", GRID, "kTop - (blocks - 1)", "kTop - (blocks - 2)",
             GRID_BARRIER),
    Mutation("CUDA: SGD, squares in float32", CUDA_SGD, "sum = add_product(sum, value, value);",
             "sum += static_cast<float>(value) * static_cast<float>(value);", "test_squares_that"),
    Mutation("CUDA: SGD, parts of the first tensor", CUDA_SGD, "(part - tensor.first_part) * length", "part * length",
             BUDGET),
    Mutation("CUDA: SGD, what lies behind a tensor counts", CUDA_SGD,
             "row.count < begin + length ? row.count : begin + length", "begin + length", BUDGET),
    Mutation("CUDA: SGD, vectors wherever they are", CUDA_SGD, "const bool vectors = aligned<L>(g);",
             "const bool vectors = true;", BUDGET),
    Mutation("CUDA: SGD, the last piece is lost", CUDA_SGD, "divide_up(rows[i].count, kPiece)",
             "rows[i].count / kPiece", BUDGET),
    Mutation("CUDA: SGD, sequences that rest move", CUDA_SGD, "if (!moves) continue;", "", BUDGET),
    Mutation("CUDA: SGD, every sequence has the first one's norm", CUDA_SGD,
             "square += scratch[sequence * tuple.all_parts + part];", "square += scratch[part];", BUDGET),
    Mutation("CUDA: SGD, later launches overwrite the first one's parts", CUDA_SGD,
             "if (i < begin) tuple.before_parts += parts;", "", "test_many_tensors"),
    Mutation("CUDA: SGD, lr in memory is not read", CUDA_SGD, "if (!rate.at) return rate.value;",
             "return rate.value;", "test_lr_where"),
    Mutation("CUDA: attention does not wait for its queries", D_BLOCK, "if (!is_first) grid_barrier",
             "if (!is_first && kind != kOut) grid_barrier", BUDGET),
    Mutation("CUDA: pieces of attention are joined early", D_BLOCK,
             "attention(layer);\n                grid_barrier(s.counter, Together{});", "attention(layer);", BUDGET),
    Mutation("CUDA: bytes of one row are announced", COPIES, "announce(own.end, kRows * own.bytes)",
             "announce(own.end, own.bytes)", COPIED),
    Mutation("CUDA: a lane arrives for all that copy", COPIES, "return copies_in_bulk() ? 1 : kWarp;", "return 1;",
             COPIED),
    Mutation("CUDA: what lies behind a row is copied too", D_WEIGHTS,
             "left < rings_.segment ? left : rings_.segment};", "rings_.segment};", "test_every_weight_is_copied_once"),
    Mutation("CUDA: a slot's phase has always the same parity", D_WEIGHTS, "parity ^= 1;", "", BUDGET),
    Mutation("CUDA: a slot is asked for a turn late", D_WEIGHTS, "turn_.slot), turn_.parity ^ 1)",
             "turn_.slot), turn_.parity)", BUDGET),
    Mutation("CUDA: a slot is never given back", D_WEIGHTS,
             "if (lane == 0) arrive(rings_.used(warp_, turn_.slot));", "", BUDGET),
    Mutation("CUDA: who asks begins every product with the first warp", D_WEIGHTS,
             "            share_.end(product_);\n", "", BUDGET),
    Mutation("CUDA: weights are used before they have come", D_WEIGHTS,
             "wait_for_phase(rings_.come(warp_, turn_.slot), turn_.parity);", "", BUDGET),
    Mutation("CUDA: weights come before those before them are used", D_WEIGHTS,
             "more_ && has_ended(rings_.used(warp_, turn_.slot), turn_.parity ^ 1)", "more_", BUDGET),
    Mutation("CUDA: a slot is given back by its fastest lane", D_WEIGHTS, "            __syncwarp();\n", "",
             "test_rows_of_several_segments"),
    Mutation("CUDA: every segment of a row has the first one's operand", D_WEIGHTS,
             "x + done / static_cast<int>(sizeof(T))", "x", "test_rows_of_several_segments"),
    Mutation("CUDA: a product's operand is read early", D_BLOCK,
             "            Together{}();\n            const Product", "            const Product", BUDGET),
    Mutation("CUDA: keys are read before the newest is written", D_BLOCK,
             "            Together{}();\n            const int64_t back", "            const int64_t back", BUDGET),
    Mutation("CUDA: what warps have of attention is joined early", D_ATTENTION,
             "    Together{}();\n    // Every lane", "    // Every lane", BUDGET),
    Mutation("CUDA: sums of squares are written early", D_BLOCK, "place_ ^= 1;", "",
             "test_rows_of_several_warps"),
    Mutation("CUDA: a key too many", D_ATTENTION, "u * apart >= left) continue", "u * apart > left) continue",
             BUDGET),
    Mutation("CUDA: groups of lanes are lost", D_ATTENTION, "step < kWarp; step *= 2", "step < kWarp / 2; step *= 2",
             BUDGET),
    Mutation("CUDA: gates are not rounded", D_BLOCK, "silu_times(rounded<T>(sum), rounded<T>(other))",
             "silu_times(sum, other)", ROUNDS),
    Mutation("CUDA: every sequence's fast MLP has the first one's operand", D_WEIGHTS, "x + matrix * product.n", "x",
             BUDGET),
    Mutation("CUDA: the last rows of a matrix are lost", D_WEIGHTS,
             "divide_up(product.rows, R / 2) : divide_up(product.rows, R)", "product.rows / (R / 2) : product.rows / R",
             BUDGET),
    Mutation("CUDA: the prefix ends elsewhere", D_BLOCK, "layer == s.n_prefix)", "layer + 1 == s.n_prefix)", BUDGET),
    Mutation("CUDA: the grid has a part in the order of sums", D_ATTENTION,
             "return divide_up(divide_up(keys, most_pieces(heads)), kLeastKeys) * kLeastKeys;",
             "return gridDim.x * 32;", SAME_BITS),
    Mutation("the user's weights are tried on", "ttt_kernels/clipped_sgd/update.py", "[w.clone() for w in weights]",
             "weights", FASTER),
)  # fmt: skip


def build(copy: Path) -> None:
    """Builds the extension in place, for as little as the tests need."""
    flags = {**os.environ, "TTT_KERNELS_CXXFLAGS": "-O1", "TTT_KERNELS_INSTRUCTION_SETS": "avx2"}
    flags["TTT_KERNELS_CUDA_ARCHITECTURES"] = ""
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    subprocess.run(command, cwd=copy, env=flags, check=True, capture_output=True)
    loads = "from ttt_kernels import extension; assert extension.cpu is not None, extension.missing"
    subprocess.run([sys.executable, "-c", loads], cwd=copy, check=True)


def fails(copy: Path, module: str, test: str) -> bool:
    """Whether a test fails (exit status 1; any other than 0 and 1 is an error of this script)."""
    command = [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", module, "-k", test]
    environment = {**os.environ, "PYTHONPATH": "."}
    done = subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True)
    if done.returncode not in (0, 1):
        raise SystemExit(f"{test} could not be run:\n{done.stdout}{done.stderr}")
    return done.returncode == 1


def main(asked: list[str]) -> int:
    chosen = [m for m in MUTATIONS if not asked or any(words in m.what for words in asked)]
    survivors = 0
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "checkout"
        shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".git", "build", "*.so"))
        build(copy)
        for module, test in sorted({(m.module(), m.test) for m in chosen}):
            if fails(copy, module, test):
                raise SystemExit(f"{test} fails before anything is broken")
        for mutation in chosen:
            file = copy / mutation.file
            whole = file.read_text()
            if whole.count(mutation.old) != 1:
                raise SystemExit(f"{mutation.file} does not hold {mutation.old!r} once")
            file.write_text(whole.replace(mutation.old, mutation.new))
            # The tests of CUDA kernels compile them.
            if mutation.file.startswith("csrc") and "cuda" not in mutation.file:
                build(copy)
            caught = fails(copy, mutation.module(), mutation.test)
            file.write_text(whole)
            survivors += not caught
            print(f"{'caught' if caught else 'SURVIVED':10}{mutation.what:55}{mutation.test}", flush=True)
    print(f"{len(chosen)} mutations, {survivors} survived")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
