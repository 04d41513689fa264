"""An event loop whose clock jumps to the next timer when nothing else is left to do.

For code without threads, network or disk: it then takes no time to wait, and what happens does not
depend on how busy the machine is.
"""

from __future__ import annotations

import asyncio
import selectors
from typing import Any


class _Selector(selectors.DefaultSelector):
    def __init__(self) -> None:
        super().__init__()
        self.jumped_s = 0.0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        ready: list[tuple[selectors.SelectorKey, int]] = super().select(0)
        if not ready and timeout is None:
            return super().select(None)
        if not ready and timeout is not None:
            self.jumped_s += max(timeout, 0)
        return ready


class JumpingLoop(asyncio.SelectorEventLoop):
    """An event loop in which hours of waiting pass in a moment."""

    def __init__(self) -> None:
        self._jumping = _Selector()
        super().__init__(self._jumping)

    def time(self) -> float:
        return self._jumping.jumped_s


def jumping_backend() -> tuple[str, dict[str, Any]]:
    """Return what the fixture ``anyio_backend`` gives for this loop."""
    return "asyncio", {"loop_factory": JumpingLoop}
