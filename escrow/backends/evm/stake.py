"""The port of stakes over the vault contract, beside the settlement whose deals reserve there."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from coase.escrow.ports import StakeRegistry, chain_terms
from coase.escrow.stake import (
    Allow,
    Allowance,
    CloseSlice,
    Deposit,
    Release,
    Stake,
    StakeCall,
    Unbond,
    WithdrawStake,
)
from coase.protocol.errors import ConfigurationError

from .abi import factory_abi, token_abi, vault_abi
from .artifacts import artifact
from .chain import EvmChain, Request
from .sending import ask_address, send_once
from .settlement import APPROVE_GAS, UINT256_MAX, EvmSettlement, token_facts

if TYPE_CHECKING:
    from coase.escrow.ports import Receipt
    from coase.protocol.identity import Identity
    from coase.protocol.terms import Terms
    from coase.protocol.types import AgentId, Asset

# Some three times what was measured with our token, since other tokens cost more.
GAS: Final = {
    Deposit: 250_000,
    Allow: 250_000,
    Unbond: 150_000,
    Release: 250_000,
    CloseSlice: 400_000,
    WithdrawStake: 250_000,
}


class EvmStakeRegistry(StakeRegistry):
    """Stakes in a real vault, as one escrow sees them. Make it with ``connect``."""

    def __init__(self, settlement: EvmSettlement, vault: str, asset: Asset) -> None:
        self.chain = settlement.chain
        self.domain = settlement.domain
        self.vault = vault
        self._asset = asset

    @classmethod
    async def connect(cls, settlement: EvmSettlement, *, vault: str) -> EvmStakeRegistry:
        """Return the stakes in ``vault`` for the deals of ``settlement``, whose connection it uses.

        A buyer who relies on a stake asks here whether its vault is what it should be.

        :raises ConfigurationError: if there is no vault of this version, or for another's escrows
        """
        chain, escrow = settlement.chain, settlement.domain.contract
        where = f"at {vault} on chain {chain.chain_id}"
        if not artifact("StakeVault").same_code(await chain.code(vault)):
            raise ConfigurationError(f"{where} is no vault of stakes of this version")
        factory = await ask_address(chain, vault, "factory", vault_abi())
        await require_escrow_of(chain, escrow, factory, f"the vault {where}")
        token = await ask_address(chain, vault, "token", vault_abi())
        if token == settlement.asset.token:
            return cls(settlement, vault, settlement.asset)
        return cls(settlement, vault, (await token_facts(chain, token)).asset)

    @property
    def asset(self) -> Asset:
        """The token of the stakes."""
        return self._asset

    async def stake(self, owner: AgentId) -> Stake:
        """Return what ``owner`` has in the vault."""
        return Stake(*await self._numbers("stakeOf", owner))

    async def allowance(self, owner: AgentId) -> Allowance:
        """Return what the escrow keeps and may keep reserved of ``owner``'s stake."""
        return Allowance(*await self._numbers("allowanceOf", owner, self.domain.contract))

    async def slice_units(self, job_id: bytes) -> int:
        """Return what is reserved for a deal; 0 before it opened and after its slice was closed."""
        number = int.from_bytes(job_id, "big")
        return (await self._numbers("sliceOf", self.domain.contract, number))[0]

    async def owed(self, owner: AgentId) -> int:
        """Return the units that a failed payout left with the vault for ``owner``."""
        return (await self._numbers("owed", owner))[0]

    async def held(self) -> int:
        """Return all token units that the vault holds."""
        return await self._of_token("balanceOf", self.vault)

    async def perform(self, effect_id: str, call: StakeCall, identity: Identity) -> Receipt:
        """Send ``call`` from ``identity`` and return its receipt once it is in a block."""
        if isinstance(call, Deposit):
            await self._approve(effect_id, identity, call.units)
        request = Request(self.vault, self._data(call), GAS[type(call)])
        return await send_once(self.chain, effect_id, identity, request, vault_abi())

    async def close(self) -> None:
        """Do nothing: the settlement's connection has a life of its own."""

    def _data(self, call: StakeCall) -> bytes:
        abi = vault_abi()
        match call:
            case Deposit(units):
                return abi.encode("deposit", units)
            case Allow(token, units):
                return abi.encode("allow", token, units)
            case Unbond(units):
                return abi.encode("unbond", units)
            case Release():
                return abi.encode("release")
            case CloseSlice(terms, task, signature):
                return abi.encode(
                    "close", self.domain.contract, terms_tuple(terms), task, signature
                )
            case WithdrawStake(owner):
                return abi.encode("withdraw", owner)

    async def _approve(self, effect_id: str, identity: Identity, units: int) -> None:
        """See to it that the vault may take ``units``: a standing allowance, given once."""
        if await self._of_token("allowance", identity.address, self.vault) >= units:
            return
        data = token_abi().encode("approve", self.vault, UINT256_MAX)
        request = Request(self._asset.token, data, APPROVE_GAS)
        await self.chain.send(f"{effect_id}/approve", identity, request, token_abi())

    async def _numbers(self, name: str, *values: object) -> tuple[int, ...]:
        abi = vault_abi()
        data = await self.chain.call(self.vault, abi.encode(name, *values), abi)
        return abi.functions[name].decode(data)

    async def _of_token(self, name: str, *values: object) -> int:
        data = token_abi().encode(name, *values)
        return int.from_bytes(await self.chain.call(self._asset.token, data, token_abi()), "big")


def terms_tuple(terms: Terms) -> tuple[object, ...]:
    """Return ``terms`` as the ABI's tuple of the same name."""
    told = chain_terms(terms)
    return tuple(getattr(told, name) for name in told.__slots__)


async def require_escrow_of(chain: EvmChain, escrow: str, factory: str, what: str) -> None:
    """Return if ``factory`` is ours by its code and deployed ``escrow``.

    :raises ConfigurationError: if not; ``what`` says who trusts the factory
    """
    abi = factory_abi()
    if artifact("EscrowFactory").same_code(await chain.code(factory)):
        found = await chain.call(factory, abi.encode("isEscrow", escrow), abi)
        if int.from_bytes(found, "big") == 1:
            return
    raise ConfigurationError(f"{what} does not serve the escrow {escrow}")
