"""Libraries that few tests need and that take a second to load.

Each worker collects all tests, so what a test module imports at its head is loaded by every worker.
"""

from __future__ import annotations

import importlib
from typing import Any


class Late:
    """A module that is loaded when something of it is asked for."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):  # Whoever collects tests looks at everything, and wants nothing.
            raise AttributeError(name)
        return getattr(importlib.import_module(self._name), name)
