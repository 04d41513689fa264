"""The market of one machine: what it says, and does, when its disk takes nothing more."""

from __future__ import annotations

import logging
import shutil
from collections import namedtuple
from typing import TYPE_CHECKING

import anyio
import pytest

from coase.agents import local
from coase.agents.room import ROOM_MIN_BYTES

if TYPE_CHECKING:
    from pathlib import Path

Usage = namedtuple("Usage", "total used free")


@pytest.mark.anyio
async def test_a_chain_whose_disk_is_full_says_so_and_waits_for_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    rooms = iter((0, ROOM_MIN_BYTES - 1, ROOM_MIN_BYTES))
    monkeypatch.setattr(local, "ROOM_LOOK_S", 0)
    monkeypatch.setattr(shutil, "disk_usage", lambda place: Usage(1, 1, next(rooms)))
    with caplog.at_level(logging.ERROR), anyio.fail_after(60):
        await local.room(tmp_path)
    assert next(rooms, None) is None
    full, again = (record.getMessage() for record in caplog.records)
    assert f"{tmp_path} cannot be written, its disk is full" in full
    assert "there is room again" in again
