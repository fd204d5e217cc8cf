"""`python -m engine train`: Hydra reads its arguments, not argparse."""

from __future__ import annotations

from collections.abc import Sequence

HELP = "train a model, in the syntax of Hydra"


def main(argv: Sequence[str]) -> int:
    """Trains what `argv` describes; returns the exit status."""
    from engine.training import app

    return app.main(argv, prog="python -m engine train")
