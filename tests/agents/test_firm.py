"""Within a firm work is given away, outside of it sold: the same agents, messages and journal."""

from __future__ import annotations

import json
from contextlib import aclosing
from typing import TYPE_CHECKING

import pytest

from coase.agents import Agent, Price
from coase.agents.compute.echo import EchoCompute
from coase.agents.compute.market import MarketCompute
from coase.agents.compute.ports import Prompt
from coase.agents.firm import FirmFile, joined_firm, new_firm
from coase.agents.inference import inference_agent
from coase.protocol.errors import ConfigurationError

from .market import SHORT, market

if TYPE_CHECKING:
    from pathlib import Path

PRICE = Price.per_million(input="20", output="80")


@pytest.mark.anyio
async def test_a_firm_costs_nothing_and_its_use_is_journalled(tmp_path: Path) -> None:
    writer = inference_agent("writer", price=PRICE, compute=EchoCompute(), windows=SHORT)
    reader = Agent("reader")
    async with market(tmp_path) as place:
        place.node.firm = FirmFile(tmp_path / "firm.json")
        place.node.firm.write(new_firm("home"))
        await place.join(writer)
        await place.join(reader, units=0)  # Who has no money at all is served as well.
        bought = MarketCompute(reader, max_price="0", settlements=("none",))
        async with aclosing(bought.stream(Prompt.ask("hello there", max_tokens=20))) as stream:
            text = "".join([chunk.text async for chunk in stream])
        assert "hello there" in text
        await place.rest()
        rows = [json.loads(data) for _, _, data in place.node.journal.summaries() if data]
        used = [row for row in rows if row["state"] == "settled"]
        assert {row["side"] for row in used} == {"buyer", "seller"}
        assert all(row["price_units"] == 0 and row["usage"]["output_tokens"] for row in used)
        # Without the firm there is no such purchase.
        place.node.firm.forget()
        with pytest.raises(ConfigurationError, match="coase firm"):
            async with aclosing(bought.stream(Prompt.ask("hello"))) as stream:
                [chunk async for chunk in stream]


def test_a_firm_is_kept_for_its_owner_alone_and_seen_when_it_changes(tmp_path: Path) -> None:
    file = FirmFile(tmp_path / "firm.json")
    assert file.read() is None
    firm = new_firm("home").with_key("0x" + "aa" * 20, "ann")
    file.write(firm)
    assert file.path.stat().st_mode & 0o777 == 0o600
    other = FirmFile(file.path)
    assert other.read() == firm
    file.write(firm.without_key("0x" + "aa" * 20))
    assert other.current() != firm
    file.path.chmod(0o644)
    file.path.write_text(file.path.read_text() + " ")
    assert other.current() is None
    with pytest.raises(ConfigurationError, match="chmod"):
        other.read()
    file.forget()
    file.path.write_text("{")
    file.path.chmod(0o600)
    with pytest.raises(ConfigurationError, match="join again"):
        file.read()


@pytest.mark.parametrize("bad", ["", "no code", "AAAA-" * 7, "0x" + "aa" * 20])
def test_what_is_no_code_joins_nothing(bad: str) -> None:
    with pytest.raises(ConfigurationError, match="code"):
        joined_firm(bad)


def test_a_list_takes_addresses_only() -> None:
    with pytest.raises(ConfigurationError, match="no address"):
        new_firm("home").with_key("0xAA", "ann")
    with pytest.raises(ConfigurationError, match="not on"):
        new_firm("home").without_key("0x" + "aa" * 20)
    with pytest.raises(ConfigurationError, match="no name"):
        new_firm(" ")
