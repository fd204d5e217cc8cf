"""`python -m engine fit`: what a training run will need, in the syntax of `train`."""

from __future__ import annotations

from collections.abc import Sequence

HELP = "predict memory and time of a training run, and choose what fits"


def main(argv: Sequence[str]) -> int:
    """Tries out what `argv`, as for `train`, describes; returns the exit status."""
    from engine.training import app
    from engine.training.fit import fit

    return app.main(argv, prog="python -m engine fit", work=fit)
