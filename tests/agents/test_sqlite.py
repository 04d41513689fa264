"""The journal on a real file: order, groups, failure, locks, and what a restart finds."""

from __future__ import annotations

import sqlite3
import subprocess
import sys
from typing import TYPE_CHECKING

import anyio
import pytest

from coase.agents.backends.sqlite import (
    SqliteJournal,
    SqliteTxStore,
    StateDirectory,
    read_summaries,
)
from coase.agents.ports import Record
from coase.protocol.errors import ConfigurationError, JournalFailed

if TYPE_CHECKING:
    from pathlib import Path

ME, YOU = "0x" + "11" * 20, "0x" + "22" * 20


def record(number: int, *, agent: str = ME, deal: str = "d1") -> Record:
    return Record(agent, deal, "heard", number, str(number).encode())


@pytest.mark.anyio
async def test_what_is_durable_is_found_in_order_by_the_next_process(tmp_path: Path) -> None:
    journal = SqliteJournal(tmp_path / "j.sqlite")
    for number in range(50):
        group = journal.append([record(number)])
    journal.append([record(1, agent=YOU)])
    await journal.durable(group)
    await journal.close()
    again = SqliteJournal(tmp_path / "j.sqlite")
    assert [found.at_ms for found in again.open_records(ME)] == list(range(50))
    assert len(again.open_records(YOU)) == 1
    await again.close()


@pytest.mark.anyio
async def test_many_groups_share_a_commit(tmp_path: Path) -> None:
    journal = SqliteJournal(tmp_path / "j.sqlite")
    groups = [journal.append([record(number)]) for number in range(200)]
    async with anyio.create_task_group() as waiting:
        for group in groups:
            waiting.start_soon(journal.durable, group)
    assert journal.commits < 20
    await journal.close()


@pytest.mark.anyio
async def test_an_empty_group_waits_for_all_before_it(tmp_path: Path) -> None:
    journal = SqliteJournal(tmp_path / "j.sqlite")
    journal.append([record(1)])
    await journal.durable(journal.append(()))
    assert len(journal.open_records(ME)) == 1
    await journal.close()


@pytest.mark.anyio
async def test_a_closed_deal_is_not_replayed_and_leaves_its_summary(tmp_path: Path) -> None:
    journal = SqliteJournal(tmp_path / "j.sqlite")
    journal.append([record(1), record(2, deal="d2")])
    journal.close_deals(ME, [("d1", b'{"deal": "d1"}')])
    await journal.durable(journal.close_deals(ME, [("d1", b'{"deal": "again"}')]))
    assert [found.deal for found in journal.open_records(ME)] == ["d2"]
    assert journal.summaries(ME) == [(ME, "d1", b'{"deal": "d1"}')]
    assert journal.summaries(YOU) == []
    assert read_summaries(tmp_path / "j.sqlite") == [{"deal": "d1", "agent": ME}]
    await journal.close()


@pytest.mark.anyio
async def test_after_a_failed_commit_nothing_is_taken_any_more(tmp_path: Path) -> None:
    path = tmp_path / "j.sqlite"
    journal = SqliteJournal(path)
    await journal.durable(journal.append([record(1)]))
    # Another connection holds the file's write lock for longer than the journal waits.
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    journal._writer.execute("PRAGMA busy_timeout = 50")
    group = journal.append([record(2)])
    with pytest.raises(JournalFailed, match="nothing of it was done"):
        await journal.durable(group)
    other.execute("ROLLBACK")
    other.close()
    with pytest.raises(JournalFailed):
        journal.append([record(3)])
    with pytest.raises(JournalFailed):
        await journal.durable(1)
    await journal.close()
    again = SqliteJournal(path)
    assert [found.at_ms for found in again.open_records(ME)] == [1]
    await again.close()


@pytest.mark.anyio
async def test_transactions_are_kept_before_they_are_sent(tmp_path: Path) -> None:
    journal = SqliteJournal(tmp_path / "j.sqlite")
    store = SqliteTxStore(journal)
    await store.save("e", ME, 7, b"raw", "0x1")
    await store.save("e", ME, 7, b"raw", "0x1")
    await store.save("e", ME, 7, b"dearer", "0x2")
    assert [sent.raw for sent in await store.load("e")] == [b"raw", b"dearer"]
    assert len(await store.all_open()) == 2
    await store.finish("e")
    await journal.durable(journal.append(()))
    assert await store.all_open() == ()
    await store.forget("e", "0x2")
    assert [sent.tx_hash for sent in await store.load("e")] == ["0x1"]
    await journal.close()


FULL = """
import resource, signal, sys
from pathlib import Path
from coase.agents.backends.sqlite import SqliteJournal, StateDirectory
from coase.protocol.errors import JournalFailed
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]),) * 2)
try:
    {open}
except JournalFailed as error:
    print(error)
"""


@pytest.mark.parametrize(
    ("opens", "limit", "made_before"),
    [
        ("SqliteJournal(Path(sys.argv[1]) / 'j.sqlite')", 4_096, False),
        ("SqliteJournal(Path(sys.argv[1]) / 'j.sqlite')", 4_096, True),
        ("StateDirectory(Path(sys.argv[1]))", 0, False),
    ],
)
@pytest.mark.anyio
async def test_a_disk_that_takes_nothing_is_not_a_damaged_file(
    tmp_path: Path, opens: str, limit: int, made_before: bool
) -> None:
    if made_before:
        await SqliteJournal(tmp_path / "j.sqlite").close()
    program = FULL.format(open=opens)
    done = await anyio.run_process(
        [sys.executable, "-c", program, str(tmp_path), str(limit)], check=False
    )
    assert b"nothing is lost: free some space, or mend the disk, and start again" in done.stdout
    assert b"damaged" not in done.stdout
    assert (done.returncode, done.stderr) == (0, b"")


@pytest.mark.anyio
async def test_garbage_in_place_of_a_journal_is_named(tmp_path: Path) -> None:
    path = tmp_path / "j.sqlite"
    path.write_bytes(b"this is no database" * 100)
    with pytest.raises(ConfigurationError, match="cannot be opened"):
        SqliteJournal(path)
    with pytest.raises(ConfigurationError, match="no journal can be read"):
        read_summaries(path)


def test_a_directory_serves_one_process_and_is_free_after_its_death(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path;"
        "from coase.agents.backends.sqlite import StateDirectory;"
        "held = StateDirectory(Path(sys.argv[1])); print('held', flush=True); sys.stdin.read()"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert child.stdout is not None
    assert child.stdout.readline() == "held\n"
    with pytest.raises(ConfigurationError, match=f"held by process {child.pid}"):
        StateDirectory(tmp_path)
    child.kill()
    child.communicate()
    StateDirectory(tmp_path).release()
    assert tmp_path.stat().st_mode & 0o777 == 0o700


def test_a_file_in_place_of_a_directory_says_so(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigurationError, match="choose another with --state"):
        StateDirectory(tmp_path / "file" / "deep")
