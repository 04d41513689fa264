"""Room on a disk that was full: who cannot write waits for it, and goes on."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING, Final

import anyio

if TYPE_CHECKING:
    from pathlib import Path

ROOM_MIN_BYTES: Final = 1024 * 1024  # Less is gone with the next few calls or blocks.


async def wait_for_room(*directories: Path, every_s: float) -> None:
    """Return when the disks of all ``directories`` may take something again; looks every so often.

    :raises OSError: if one of them is no more
    """
    while True:
        await anyio.sleep(every_s)
        if all(shutil.disk_usage(place).free >= ROOM_MIN_BYTES for place in directories):
            return
