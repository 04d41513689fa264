"""The port of panels over the panel contract and its factory, beside a settlement."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from coase.escrow.ports import Panel
from coase.protocol.errors import ConfigurationError

from .abi import panel_abi, panels_abi
from .artifacts import artifact
from .chain import Request
from .sending import ask_address, send_once
from .stake import require_escrow_of, terms_tuple

if TYPE_CHECKING:
    from collections.abc import Mapping

    from coase.escrow.panel import Constitution
    from coase.escrow.ports import Receipt
    from coase.protocol.effects import Rule
    from coase.protocol.identity import Identity
    from coase.protocol.types import AgentId

    from .settlement import EvmSettlement

# Some three times what was measured; each member is a signature, and a payment if it signed.
DEPLOY_GAS: Final = 250_000
DEPLOY_MEMBER_GAS: Final = 20_000
RULE_GAS: Final = 600_000
RULE_MEMBER_GAS: Final = 120_000
WITHDRAW_GAS: Final = 250_000


class EvmPanel(Panel):
    """One panel on a real chain, there or not yet. Make it with ``connect``."""

    def __init__(
        self, settlement: EvmSettlement, panels: str, code: str, constitution: Constitution
    ) -> None:
        self.chain = settlement.chain
        self.domain = settlement.domain
        self.constitution = constitution
        self.address = constitution.address(factory=panels, code=code)
        self._panels = panels
        self._token = settlement.asset.token

    @classmethod
    async def connect(
        cls, settlement: EvmSettlement, *, panels: str, constitution: Constitution
    ) -> EvmPanel:
        """Return that panel for the deals of ``settlement``, whose connection it uses.

        ``panels`` is the factory of panels.

        :raises ConfigurationError: if there is no such factory, or for another's escrows
        """
        chain, escrow = settlement.chain, settlement.domain.contract
        where = f"at {panels} on chain {chain.chain_id}"
        if not artifact("PanelFactory").same_code(await chain.code(panels)):
            raise ConfigurationError(f"{where} is no factory of panels of this version")
        code = await ask_address(chain, panels, "panelCode", panels_abi())
        factory = await ask_address(chain, code, "escrows", panel_abi())
        await require_escrow_of(chain, escrow, factory, f"the factory of panels {where}")
        return cls(settlement, panels, code, constitution)

    async def is_deployed(self) -> bool:
        """Return whether the panel is on the chain."""
        return bool(await self.chain.code(self.address))

    async def owed(self, owner: AgentId) -> int:
        """Return the units that a failed payout left with the panel for ``owner``."""
        if not await self.is_deployed():
            return 0
        data = panel_abi().encode("owed", self._token, owner)
        return int.from_bytes(await self.chain.call(self.address, data, panel_abi()), "big")

    async def rule(
        self,
        effect_id: str,
        ruling: Rule,
        signatures: Mapping[AgentId, bytes],
        identity: Identity,
    ) -> Receipt:
        """Rule with these members' signatures, after putting the panel on the chain."""
        if not await self.is_deployed():
            await self._deploy(effect_id, identity)
        data = panel_abi().encode(
            "rule",
            self.domain.contract,
            terms_tuple(ruling.terms),
            ruling.to_seller_units,
            ruling.penalty_units,
            ruling.evidence,
            self.constitution.places(signatures),
        )
        gas = RULE_GAS + RULE_MEMBER_GAS * len(self.constitution.members)
        request = Request(self.address, data, gas)
        return await send_once(self.chain, effect_id, identity, request, panel_abi())

    async def withdraw(self, effect_id: str, owner: AgentId, identity: Identity) -> Receipt:
        """Pay out what a failed transfer left with the panel for ``owner``."""
        data = panel_abi().encode("withdraw", self._token, owner)
        request = Request(self.address, data, WITHDRAW_GAS)
        return await send_once(self.chain, effect_id, identity, request, panel_abi())

    async def close(self) -> None:
        """Do nothing: the settlement's connection has a life of its own."""

    async def _deploy(self, effect_id: str, identity: Identity) -> None:
        threshold, members = self.constitution.threshold, self.constitution.members
        data = panels_abi().encode("deploy", threshold, members)
        gas = DEPLOY_GAS + DEPLOY_MEMBER_GAS * len(members)
        request = Request(self._panels, data, gas)
        await send_once(self.chain, f"{effect_id}/deploy", identity, request, panels_abi())
