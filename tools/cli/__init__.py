"""The command line: ``coase``. Each command has ``--json``, ``--help`` with an example, and
exit codes that mean something."""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command line; the console script calls this."""
    try:
        from .app import run  # Late: --help and shell completion load nothing else.

        run()
    except KeyboardInterrupt:  # While loading, or once more while ending.
        sys.exit(130)
