"""Whose turn it is on the embedded chain: many ask, and none may keep it from the rest.

Whoever has used least of it lately goes first, so that a client that asks little waits for one
running call at most, whatever others ask. What nobody pays for may take only so much.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import signal
import threading
import time
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Self
from weakref import WeakKeyDictionary

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable
    from types import FrameType, TracebackType

HALF_LIFE_S: Final = 10.0  # A flood is forgiven in a minute, and remembered between two requests.
# What has arrived meanwhile is read and put in line within so many rounds of the event loop.
SETTLE_ROUNDS: Final = 3


@dataclass(slots=True, eq=False)
class _Use:
    """What one client has used lately, in seconds as of ``at_s``."""

    used_s: float
    at_s: float

    def now(self, at_s: float) -> float:
        return float(self.used_s * 0.5 ** ((at_s - self.at_s) / HALF_LIFE_S))

    def add(self, spent_s: float, at_s: float) -> None:
        self.used_s, self.at_s = self.now(at_s) + spent_s, at_s


class Turns:
    """One turn at a time, to whoever has used least. Each task of the event loop is a client.

    Who is new begins with what the heaviest of those that wait has used: to come back under a new
    connection is no way to the front.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._busy = False
        self._running = _Use(0.0, clock())
        self._uses: WeakKeyDictionary[asyncio.Task[Any], _Use] = WeakKeyDictionary()
        self._waiting: dict[int, tuple[_Use, asyncio.Future[None]]] = {}
        self._numbers = itertools.count()

    @asynccontextmanager
    async def turn(self) -> AsyncIterator[None]:
        """Wait for the current task's turn, and count what is done in it."""
        use = self._use()
        await self._wait(use)
        self._running = use
        began_s = self._clock()
        try:
            yield
        finally:
            now_s = self._clock()
            use.add(now_s - began_s, now_s)
            try:
                for _ in range(SETTLE_ROUNDS):
                    await asyncio.sleep(0)
            finally:
                self._busy = False
                self._next()

    def _use(self) -> _Use:
        task = asyncio.current_task()
        if task is None:
            raise RuntimeError("a turn is taken by a task")
        use = self._uses.get(task)
        if use is None:
            now_s = self._clock()
            others = [self._running] if self._busy else []
            others += [other for other, _ in self._waiting.values()]
            heaviest_s = max((other.now(now_s) for other in others), default=0.0)
            use = self._uses[task] = _Use(heaviest_s, now_s)
        return use

    async def _wait(self, use: _Use) -> None:
        if not self._busy:
            self._busy = True
            return
        number, granted = next(self._numbers), asyncio.get_running_loop().create_future()
        self._waiting[number] = (use, granted)
        try:
            await granted
        except asyncio.CancelledError:
            if granted.done() and not granted.cancelled():
                self._busy = False  # It had its turn already, and passes it on.
                self._next()
            raise
        finally:
            self._waiting.pop(number, None)

    def _next(self) -> None:
        now_s = self._clock()
        line = sorted(
            self._waiting, key=lambda number: (self._waiting[number][0].now(now_s), number)
        )
        for number in line:
            _, granted = self._waiting.pop(number)
            if not granted.done():
                self._busy = True
                granted.set_result(None)
                return


_ENGINE: Final = f"{os.sep}eth{os.sep}"
"""Only where the engine itself computes is it broken off."""
_AGAIN_S: Final = 0.002


class _TooLong(BaseException):
    """Raised in the midst of whatever takes too long."""


class CpuLimit:
    """Ends its block by ``_TooLong`` once this process has used ``limit_s`` of the processor in it.

    Only in the main thread, which alone hears signals; elsewhere it does nothing. The block may
    be left at any place, so that nothing it worked on is to be used again; ``fired`` says so.
    """

    def __init__(self, limit_s: float) -> None:
        self._limit_s = limit_s
        self._armed = False
        self.fired = False
        self._before: Any = None

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGVTALRM, self._fire)
            self._armed = True
            signal.setitimer(signal.ITIMER_VIRTUAL, self._limit_s)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if not self._armed and not self.fired:
            return
        self._armed = False
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, self._before)

    def _fire(self, number: int, frame: FrameType | None) -> None:
        if not self._armed:
            return
        if frame is None or _ENGINE not in frame.f_code.co_filename:
            # In a callback of the interpreter's own, say, where what is raised is lost.
            signal.setitimer(signal.ITIMER_VIRTUAL, _AGAIN_S)
            return
        self._armed, self.fired = False, True
        raise _TooLong
