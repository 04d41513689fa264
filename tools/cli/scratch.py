"""Directories that are lost at the end, and those that a killed process could not remove."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def scratch(prefix: str) -> Iterator[Path]:
    """Yield a fresh directory that only we can read, and remove it whatever happens.

    What others of our user left, whose processes were killed, is removed as well.
    """
    _sweep(prefix)
    name = f"{prefix}{os.getpid()}-"
    with tempfile.TemporaryDirectory(prefix=name, ignore_cleanup_errors=True) as path:
        yield Path(path)


def _sweep(prefix: str) -> None:
    shape = re.compile(rf"{re.escape(prefix)}([0-9]+)-\w+\Z")
    for path in Path(tempfile.gettempdir()).glob(f"{prefix}*"):
        match = shape.match(path.name)
        if match is None or alive(int(match[1])) or path.is_symlink():
            continue
        try:
            ours = path.stat().st_uid == os.getuid()
        except OSError:
            continue
        if ours:
            shutil.rmtree(path, ignore_errors=True)


def alive(pid: int) -> bool:
    """Return whether a process runs, as far as we may know."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True
