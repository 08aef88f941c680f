"""Figures for people: bytes, seconds and two-column tables on stderr."""

from collections.abc import Sequence

import click


def format_bytes(count: int) -> str:
    """For example "1.5 GiB"."""
    size = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.0f} B" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"


def format_seconds(seconds: float | None) -> str:
    """For example "12.3 ms" or "4.56 s"; "-" for None."""
    if seconds is None:
        return "-"
    return f"{1000 * seconds:.1f} ms" if seconds < 1 else f"{seconds:.2f} s"


def print_table(rows: Sequence[tuple[str, str]], *, to_stdout: bool = False) -> None:
    """Two aligned columns; on stderr unless the table is the command's result."""
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        click.echo(f"{name:<{width}}  {value}", err=not to_stdout)
