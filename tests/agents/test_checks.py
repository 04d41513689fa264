"""The check that buyer, arbiter and anybody else make alike."""

from __future__ import annotations

import pytest

from coase.agents.checks import result_fault

SCHEMA = '{"type":"object","properties":{"n":{"type":"integer"}},"required":["n"]}'


def test_what_fits_has_no_fault() -> None:
    assert result_fault('{"n": 7}', SCHEMA) == ""


@pytest.mark.parametrize(
    "result",
    ["", "{", "7", '{"n": "7"}', "{}", "[" * 100_000 + "]" * 100_000, "\x00", '{"n": 1e400}'],
)
def test_what_does_not_fit_is_named_and_nothing_breaks(result: str) -> None:
    assert result_fault(result, SCHEMA)


@pytest.mark.parametrize("schema", ["", "{", '{"type": "nothing"}', "[" * 100_000])
def test_a_schema_that_is_none_is_a_fault(schema: str) -> None:
    assert result_fault('{"n": 7}', schema)


def test_no_schema_is_fetched_from_anywhere() -> None:
    # A reference to another document must not make the arbiter open a connection.
    assert result_fault("1", '{"$ref": "http://127.0.0.1:9/schema.json"}')
