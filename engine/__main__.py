"""`python -m engine COMMAND`; an error of the user's is one line on stderr and exit status 2."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from engine.commands import data, evaluate, fit, generate, info, train, verify

_COMMANDS = {"verify": verify, "info": info, "generate": generate, "evaluate": evaluate, "data": data}
_BY_HYDRA = {"train": train, "fit": fit}
"""Their arguments are in Hydra's syntax."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command that `argv` (None: the process's arguments) names; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m engine", description="TTT-E2E: long text into fast weights."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, module in _COMMANDS.items():
        module.add_arguments(commands.add_parser(name, help=module.HELP, description=module.HELP))
    for name, by_hydra in _BY_HYDRA.items():
        commands.add_parser(name, help=by_hydra.HELP)
    arguments = sys.argv[1:] if argv is None else list(argv)
    if arguments and arguments[0] in _BY_HYDRA:
        return _BY_HYDRA[arguments[0]].main(arguments[1:])
    args = parser.parse_args(arguments)
    try:
        return _COMMANDS[args.command].run(args)
    except (ValueError, OSError) as error:
        message = " ".join(str(error).split())
        print(f"python -m engine {args.command}: {message}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
