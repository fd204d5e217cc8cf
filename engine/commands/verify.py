"""`python -m engine verify`: is what this installation computes what the official implementation computes?"""

from __future__ import annotations

import argparse
from pathlib import Path

from engine.device import checked_device
from engine.golden import carried_cases, load_golden
from engine.loss import METHODS
from engine.verify import Check, verify

HELP = "check golden cases: exit status 0 only if all hold"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `verify`."""
    parser.add_argument(
        "files", nargs="*", type=Path, metavar="FILE", help="default: the cases in the package"
    )
    parser.add_argument("--backend", metavar="NAME", help="default: the best that can run")
    parser.add_argument("--device", default="cpu", metavar="NAME", help="(default: cpu)")
    parser.add_argument(
        "--method", choices=METHODS, default=METHODS[0], help="of the meta-gradient (default: %(default)s)"
    )


def run(args: argparse.Namespace) -> int:
    """Prints the worst error of every group of every case against its tolerance; 0 if all hold, else 1."""
    device = checked_device(args.device)
    cases = [load_golden(path) for path in args.files or carried_cases()]
    failed = 0
    for case in cases:
        # Cases are short: with a longer stretch there would be no snapshot to go back to.
        checks = verify(case, args.backend, device, method=args.method, snapshot_every=1)
        print(f"{case.path.name} ({case.config.compute_dtype})")
        print(_table(checks), flush=True)
        failed += any(not check.ok for check in checks)
    print(f"{failed} of {len(cases)} cases FAIL" if failed else f"all {len(cases)} cases hold")
    return 1 if failed else 0


def _table(checks: list[Check]) -> str:
    header = f"  {'group':24} {'worst error':>11}  {'tolerance':>9}"
    rows = [
        f"  {check.group:24} {check.error:11.2e}  {check.tolerance:9.0e}  {'ok' if check.ok else 'FAIL'}"
        for check in checks
    ]
    return "\n".join([header, *rows])
