"""`python -m engine COMMAND`; an error of the user's is one line on stderr and exit status 2."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from engine.commands import generate, info, verify

_COMMANDS = {"verify": verify, "info": info, "generate": generate}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command that `argv` (None: the process's arguments) names; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m engine", description="TTT-E2E: long text into fast weights."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, module in _COMMANDS.items():
        module.add_arguments(commands.add_parser(name, help=module.HELP, description=module.HELP))
    args = parser.parse_args(argv)
    try:
        return _COMMANDS[args.command].run(args)
    except (ValueError, OSError) as error:
        message = " ".join(str(error).split())
        print(f"python -m engine {args.command}: {message}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
