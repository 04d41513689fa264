"""SPEC.md says what the code does: its tables are compared, cell by cell."""

from __future__ import annotations

import re

import pytest

from coase.protocol.messages import AWAITED, BODIES, SEALED
from coase.protocol.states import DEAL, THREAD
from tests.protocol import spec_tables as spec
from tests.vectors.make import HERE

PAGE = spec.SPEC.read_text(encoding="utf-8")
TABLES = spec.tables()


def bare(cell: str) -> str:
    return cell.strip("`")


@pytest.mark.parametrize("kind", sorted(spec.MODELS))
def test_every_field_of_every_message_is_there_with_its_type(kind: str) -> None:
    rows = {bare(name): written for name, written, _ in TABLES[kind]}
    assert rows == spec.fields(kind)
    assert list(rows) == list(spec.fields(kind))
    assert all(meaning for _, _, meaning in TABLES[kind])


def test_the_named_types_match_what_the_code_takes() -> None:
    assert dict(TABLES["types"]) == spec.type_rows()


def test_every_limit_is_there_with_its_value() -> None:
    rows = {bare(name): value for name, value, _ in TABLES["10. Limits"]}
    assert rows == spec.limits()
    assert all(why for _, _, why in TABLES["10. Limits"])


def test_the_tables_of_states_are_the_codes() -> None:
    threads = {tuple(row) for row in TABLES["threads"]}
    deals = {tuple(row) for row in TABLES["deals"]}
    assert threads | deals == spec.moves()
    assert (len(threads), len(deals)) == (len(THREAD), len(DEAL["escrow"]))


def test_the_tables_of_streams_are_the_codes() -> None:
    assert {tuple(row) for row in TABLES["streams"]} == spec.stream_moves()
    rows = {(*row[:4], "" if row[4] == "-" else row[4]) for row in TABLES["silence in streams"]}
    assert rows == spec.stream_silences()


def test_the_table_of_silence_is_the_codes() -> None:
    rows = {(*row[:4], "" if row[4] == "-" else row[4]) for row in TABLES["silence"]}
    assert rows == spec.silences()


def test_every_reason_of_a_nack_is_explained() -> None:
    assert {bare(reason) for reason, _ in TABLES["8. NACK"]} == spec.reasons()
    assert all(when for _, when in TABLES["8. NACK"])


@pytest.mark.parametrize("kind", [*BODIES, "piece"])
def test_it_says_of_every_kind_whether_it_is_sealed_and_waits(kind: str) -> None:
    found = re.search(rf"^### {kind}\n\nFrom: [^.]+\. (.+)\.$", PAGE, re.MULTILINE)
    assert found is not None
    assert found[1].startswith("Sealed") is (kind in SEALED)
    assert ("waits for the journal" in found[1]) is (kind in AWAITED)


def test_every_file_of_vectors_is_named() -> None:
    named = {bare(name) for name, _ in TABLES["11. Vectors"]}
    assert named == {path.name for path in HERE.glob("*.json")}


def test_a_changed_cell_would_be_seen() -> None:
    lines = [line for line in PAGE.splitlines() if line.startswith("| `ROUNDS_MAX`")]
    assert len(lines) == 1
    assert spec._cells(lines[0])[1].strip() == "16"
