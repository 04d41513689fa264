"""The supervisor: the only place where any exception at all is caught, counted and answered."""

from __future__ import annotations

import logging
from collections import deque
from typing import TYPE_CHECKING, Final, TypeVar

import anyio

from coase.protocol.errors import CoaseError, JournalFailed, LocalError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

log = logging.getLogger(__name__)

RESTARTS_MAX: Final = 5  # As in OTP: what fails more often than this needs a person.
RESTART_WINDOW_S: Final = 60.0
RESTART_PAUSE_S: Final = 0.5

T = TypeVar("T")


class TooManyRestarts(LocalError):
    """A part of the node failed again and again; the node stops and says which."""

    def __init__(self, name: str, last: BaseException) -> None:
        super().__init__(
            f"{name} failed {RESTARTS_MAX + 1} times within {RESTART_WINDOW_S:.0f} s,"
            f" the last time with {type(last).__name__}: {last}"
        )
        self.name = name


async def attempt(
    work: Callable[[], Awaitable[T]], *, name: str, level: int = logging.WARNING
) -> T | Exception:
    """Return what ``work`` gives, or the exception that it raised; cancellation passes.

    Somebody else's code runs under this: an agent's handler, a buyer's check, a callback. An
    error of ours is logged at ``level``, all others with where they come from.
    """
    try:
        return await work()
    except JournalFailed:
        raise
    except CoaseError as error:
        log.log(level, "%s: %s", name, error)
        return error
    except Exception as error:
        log.exception("%s failed", name)
        return error


def tell(listener: Callable[[], None], *, name: str) -> None:
    """Call ``listener``, which hears of something and answers for nothing.

    Whatever it raises is logged and ends here: who is told must not stop who acts.

    :raises JournalFailed: if it acted after all, and the disk refused
    """
    try:
        listener()
    except JournalFailed:
        raise
    except Exception:
        log.exception("%s failed", name)


async def supervise(name: str, child: Callable[[], Awaitable[None]]) -> None:
    """Run ``child`` until it returns; start it again when it fails, but not for ever.

    :raises JournalFailed: at once: the node must start again from its journal
    :raises TooManyRestarts: if it fails too often in a short time
    """
    failures: deque[float] = deque(maxlen=RESTARTS_MAX + 1)
    while True:
        try:
            await child()
            return
        except JournalFailed:
            raise
        except Exception as error:
            log.exception("%s failed and is started again", name)
            failures.append(anyio.current_time())
            if len(failures) > RESTARTS_MAX and failures[-1] - failures[0] < RESTART_WINDOW_S:
                raise TooManyRestarts(name, error) from error
            await anyio.sleep(RESTART_PAUSE_S)
