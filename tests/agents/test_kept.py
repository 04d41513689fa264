"""Files that are kept for people: broken ones are put aside, and keep nobody from starting."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from typing import TYPE_CHECKING

import pytest

from coase.agents.backends.kept import Broken, failure
from coase.agents.compute.calllog import CALLS_FILE, CallLog
from coase.agents.compute.explain import Explanation
from coase.protocol.errors import ConfigurationError, JournalFailed
from coase.tools.gateway.usage import USAGE_FILE, UsageJournal, Used

if TYPE_CHECKING:
    from pathlib import Path


def garbage(path: Path) -> None:
    path.write_bytes(b"no database at all " * 999)


def another(path: Path) -> None:
    with closing(sqlite3.connect(path)) as file:
        file.execute("CREATE TABLE calls (other)")


def torn(path: Path) -> None:
    """Write a file whose first page is good and whose others are not."""
    with closing(sqlite3.connect(path)) as file:
        file.execute("CREATE TABLE learnt (one, document)")
        file.execute("CREATE TABLE t (x)")
        file.executemany("INSERT INTO t VALUES (?)", [("y" * 900,)] * 50)
        file.commit()
    whole = path.read_bytes()
    path.write_bytes(whole[:4096] + b"\xff" * (len(whole) - 4096))


@pytest.mark.parametrize("spoil", [garbage, another, torn])
@pytest.mark.parametrize(("kind", "name"), [(CallLog, CALLS_FILE), (UsageJournal, USAGE_FILE)])
def test_a_broken_file_is_put_aside_by_who_writes_and_left_by_who_looks(
    tmp_path: Path, spoil: object, kind: type[CallLog | UsageJournal], name: str
) -> None:
    assert callable(spoil)
    spoil(tmp_path / name)
    with pytest.raises(Broken, match="coase gateway puts it aside"):
        kind(tmp_path)
    before = (tmp_path / name).read_bytes()
    said: list[str] = []
    kind(tmp_path, say=said.append).close()
    (aside,) = tmp_path.glob(f"{name}.damaged-*[0-9]")
    assert aside.read_bytes() == before
    assert aside.name in said[0]
    kind(tmp_path, say=said.append).close()  # What was begun is in order, and stays.
    assert len(said) == 1


def test_what_was_begun_anew_can_be_written(tmp_path: Path) -> None:
    garbage(tmp_path / CALLS_FILE)
    garbage(tmp_path / USAGE_FILE)
    with closing(CallLog(tmp_path, say=print)) as calls:
        calls.keep(Explanation(call="one", at_ms=1))
        assert calls.find("o") is not None
    with closing(UsageJournal(tmp_path, say=print)) as usage:
        usage.call(Used(call="one", at_ms=1))
        assert [found.calls for found in usage.sums(["key"])] == [1]


def test_of_a_full_disk_it_is_said_that_it_is_the_disk(tmp_path: Path) -> None:
    full = OSError(28, "No space left on device")
    assert type(failure(tmp_path, "opened", full)) is JournalFailed
    assert "free some space" in str(failure(tmp_path, "opened", full))
    refused = failure(tmp_path, "opened", OSError(13, "Permission denied"))
    assert type(refused) is ConfigurationError
