"""Numbers as a person reads them."""

from __future__ import annotations

from collections.abc import Sequence


def format_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns under their names, numbers to the right; the first two columns, names, to the left."""
    table = [header, *rows]
    widths = [max(len(row[column]) for row in table) for column in range(len(header))]
    lines = [
        "  ".join(
            cell.ljust(width) if column < 2 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in table
    ]
    lines.insert(1, "-" * (sum(widths) + 2 * (len(widths) - 1)))
    return "\n".join(lines)


def rate(per_second: float) -> str:
    """Operations or bytes per second, in thousand millions."""
    return f"{per_second / 1e9:.1f}"


def size(count: int) -> str:
    """Bytes in MiB."""
    return f"{count / 2**20:,.0f} MiB"


def tokens(count: int) -> str:
    """A number of tokens, in Ki where it is whole."""
    return f"{count // 1024}K" if count % 1024 == 0 else str(count)
