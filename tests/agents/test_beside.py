"""What a node finds on the chain beside the escrow, and says where it is something else."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from coase.agents.backends.sqlite import SqliteJournal
from coase.agents.beside import Beside, open_beside
from coase.agents.wiring import open_settlement
from coase.escrow.feedback import RegisterAgent
from coase.escrow.stake import Deposit
from coase.escrow.voucher import CHANNELS, ChannelConfig, Fund, channels_domain
from coase.protocol.errors import ConfigurationError
from coase.protocol.identity import Identity
from tests.agents.realmarket import real_market

if TYPE_CHECKING:
    from pathlib import Path

OWNER, OTHER = (Identity(bytes((n,)) * 32) for n in (0x61, 0x62))
ELSEWHERE = "0x" + "66" * 20


@pytest.mark.anyio
async def test_a_node_has_channels_registries_and_stake(tmp_path: Path) -> None:
    async with real_market(tmp_path) as market:
        await market.fund(OWNER.address)
        async with market.node() as node:
            assert node.channels is not None
            assert node.registries is not None
            assert node.stake is not None
            # All of one key's transactions go through one client, so none takes another's place.
            config = ChannelConfig(
                payer=OWNER.address,
                payer_authorizer=OWNER.address,
                receiver=OTHER.address,
                receiver_authorizer=OTHER.address,
                token=node.network.token,
                withdraw_delay_s=900,
            )
            head = await node.settlement.head()
            fund = Fund(config, 1_000, bytes(32), head.time_s + 600)
            await node.channels.perform("fund", fund, OWNER)
            channel_id = config.channel_id(channels_domain(node.network.chain_id, CHANNELS))
            assert (await node.channels.views([channel_id]))[channel_id].balance_units == 1_000
            await node.stake.perform("stake", Deposit(500), OWNER)
            assert (await node.stake.stake(OWNER.address)).bonded_units == 500
            await node.registries.perform("who", RegisterAgent("data:,"), OWNER)
            record = await node.registries.agent(0)
            assert record is not None
            assert record.owner == OWNER.address

        journal = SqliteJournal(tmp_path / "other.sqlite")
        settlement = await open_settlement(market.network, journal)
        try:
            bare = dict.fromkeys(("vault", "channels", "identity_registry"), "")
            assert await open_beside(market.network.model_copy(update=bare), settlement) == Beside()
            for name, why in (
                ("channels", "are no payment channels"),
                ("reputation_registry", "is no reputation registry"),
                ("vault", "is no vault of stakes"),
            ):
                wrong = market.network.model_copy(update={name: ELSEWHERE})
                with pytest.raises(ConfigurationError, match=why):
                    await open_beside(wrong, settlement)
        finally:
            await settlement.close()
            await journal.close()
