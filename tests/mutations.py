"""Breaks attention in one place at a time and demands that a test fails: `python tests/mutations.py`.

Works on a copy. Every mutation names the test that must catch it; one that survives ends the run with status 1.
Needs pybind11 and a C++ compiler beside what the tests need; takes some minutes, most of them to build.
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


class Mutation(NamedTuple):
    """Replaces `old` by `new` in a file; some case of `test` must fail."""

    what: str
    file: str
    old: str
    new: str
    test: str


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
    Mutation("chunks do not wait for their turn", TURNS, "if (chunk == 0) return;", "return;",
             "test_same_bits_for_any_number_of_threads"),
    Mutation("S' loses A K^T", DOUBLE, "if (c.a) product<false>(kK, a_panels, some, seen, tiles.s1);",
             "if (c.a) fill(tiles.s1, seen.size() * kQueries, C(0));", SECOND),
    Mutation("S' loses Q B^T", DOUBLE, "product<true>(kB, of.q_panels, some, seen, tiles.s1)", "(void)0", SECOND),
    Mutation("P detached: S' without its mean", DOUBLE, "store(t.p + i, p * (s1 - of_r));", "store(t.p + i, p * s1);",
             SECOND),
    Mutation("dO_bar loses P C", DOUBLE, "if (c.c) add_rows(tiles.p, kC, some, seen);", "", SECOND),
    Mutation("dO_bar loses r O", DOUBLE, "load(m + d) - load(o + d)", "load(m + d)", SECOND),
    Mutation("E forgets the D correction", DOUBLE, " - 2 * of.delta[row] * r[row];", ";", SECOND),
    Mutation("G loses r dP", DOUBLE, "s1 * difference - of_r * d_p +", "s1 * difference +", SECOND),
    Mutation("G loses dO C^T", DOUBLE, "of_r * d_p + load(t.g + i) - of_e", "of_r * d_p - of_e", SECOND),
    Mutation("Q_bar loses dS B", DOUBLE, "if (c.b) add_rows(tiles.d_p, kB, some, seen);", "", SECOND),
    Mutation("K_bar loses dS^T A", DOUBLE, "if (c.a) add_keys(tiles.d_p, a, some, seen, origin, k_sum);", "",
             SECOND),
    Mutation("V_bar of P instead of P'", DOUBLE, "p * (s1 - of_r)", "p", SECOND),
    Mutation("cotangents of keys before key_start are read", DOUBLE, "c.key_start, C(1) / kUnit<C>}",
             "0, C(1) / kUnit<C>}", "test_backward_from_a_key_on_differentiates"),
)  # fmt: skip


def build(copy: Path) -> None:
    """Builds the extension in place, for as little as the tests need."""
    flags = {**os.environ, "TTT_KERNELS_CXXFLAGS": "-O1", "TTT_KERNELS_INSTRUCTION_SETS": "avx2"}
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    subprocess.run(command, cwd=copy, env=flags, check=True, capture_output=True)


def fails(copy: Path, test: str) -> bool:
    """Whether a case of the test fails (exit status 1; any other than 0 and 1 is an error of this script)."""
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-x",
        "-p",
        "no:cacheprovider",
        "tests/test_swa.py",
        "-k",
        test,
    ]
    done = subprocess.run(
        command, cwd=copy, env={**os.environ, "PYTHONPATH": "."}, capture_output=True, text=True
    )
    if done.returncode not in (0, 1):
        raise SystemExit(f"{test} could not be run:\n{done.stdout}{done.stderr}")
    return done.returncode == 1


def main() -> int:
    survivors = 0
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "checkout"
        shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".git", "build", "*.so"))
        build(copy)
        for test in sorted({m.test for m in MUTATIONS}):
            if fails(copy, test):
                raise SystemExit(f"{test} fails before anything is broken")
        for mutation in MUTATIONS:
            file = copy / mutation.file
            whole = file.read_text()
            if whole.count(mutation.old) != 1:
                raise SystemExit(f"{mutation.file} does not hold {mutation.old!r} once")
            file.write_text(whole.replace(mutation.old, mutation.new))
            if mutation.file.startswith("csrc"):
                build(copy)
            caught = fails(copy, mutation.test)
            file.write_text(whole)
            survivors += not caught
            print(f"{'caught' if caught else 'SURVIVED':10}{mutation.what:50}{mutation.test}", flush=True)
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())
