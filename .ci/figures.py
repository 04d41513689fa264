"""Writes the figures of a bench run into the README, with machine and date.

``make bench | .venv/bin/python .ci/figures.py``: lines that are no JSON are passed over.
"""

from __future__ import annotations

import json
import os
import platform
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Iterable

README: Final = Path(__file__).resolve().parent.parent / "README.md"
BEGIN: Final = "<!-- bench:begin -->\n"
END: Final = "<!-- bench:end -->"


def figures_of(lines: Iterable[str]) -> list[dict[str, Any]]:
    """Return the figures among the lines that the bench printed."""
    found = []
    for line in lines:
        try:
            figure = json.loads(line)
        except ValueError:
            continue
        if isinstance(figure, dict) and {"figure", "value", "unit"} <= figure.keys():
            if "source" not in figure:  # What a committed file says was not measured in this run.
                found.append(figure)
    return found


def table_of(figures: list[dict[str, Any]], *, machine: str, date: str) -> str:
    """Return the figures as a table of Markdown under a line that says where and when."""
    rows = [f"Measured on {date}, {machine}.", "", "| figure | value | beside |", "|---|---|---|"]
    for figure in figures:
        rest = {k: v for k, v in figure.items() if k not in ("figure", "value", "unit")}
        beside = ", ".join(f"{name} {value}" for name, value in rest.items())
        value = f"{figure['value']:g} {figure['unit']}"
        rows.append(f"| {figure['figure'].replace('_', ' ')} | {value} | {beside} |")
    return "\n".join(rows) + "\n"


def with_table(page: str, table: str) -> str:
    """Return the page with the table in its place.

    :raises ValueError: if the page has no such place
    """
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"no place for figures: {BEGIN.strip()} to {END}")
    return before + begin + table + end + after


def machine() -> str:
    """Return what this machine is, in a few words."""
    name = platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        named = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        name = named[0].partition(":")[2].strip() if named else name
    return f"{os.cpu_count()} cores of {name}, Python {platform.python_version()}"


def main() -> int:
    """Read a bench run from standard input and write it into the README."""
    figures = figures_of(sys.stdin)
    if not figures:
        sys.stderr.write("no figures on standard input: make bench | .ci/figures.py\n")
        return 2
    date = datetime.now(tz=UTC).date().isoformat()
    table = table_of(figures, machine=machine(), date=date)
    README.write_text(with_table(README.read_text(), table))
    return 0


if __name__ == "__main__":
    sys.exit(main())
