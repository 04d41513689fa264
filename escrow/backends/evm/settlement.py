"""The settlement port over the escrow contract, at any endpoint of an EVM chain."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from eth_abi.exceptions import DecodingError

from coase.escrow.funding import (
    BY_ALLOWANCE,
    Funding,
    Purpose,
    by_authorization,
    by_permit,
    deadline_of,
)
from coase.escrow.lifecycle import job_id_of
from coase.escrow.ports import ChainEvent, FundingKind, Receipt, Settlement, chain_terms
from coase.protocol.effects import (
    Answer,
    Call,
    Cancel,
    ClaimRefund,
    Decline,
    Dispute,
    Invalidate,
    Open,
    Poke,
    Rule,
    Settle,
    Submit,
    Withdraw,
)
from coase.protocol.errors import CallReverted, ConfigurationError
from coase.protocol.terms import Domain, Terms
from coase.protocol.types import AgentId, Asset, Head, JobView

from .abi import escrow_abi, token_abi
from .artifacts import artifact
from .chain import EvmChain, Request, TxReceipt, other_call
from .jobs import JobLog

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    from coase.escrow.ports import TxStore
    from coase.protocol.identity import Identity

# Far above what was measured with our token (a first open takes 200,000), since other tokens cost
# more, and far below a block. What is not used is not paid.
GAS: Final = {
    Open: 600_000,
    Submit: 200_000,
    Settle: 400_000,
    Decline: 300_000,
    Dispute: 450_000,
    Answer: 450_000,
    Rule: 500_000,
    Poke: 400_000,
    ClaimRefund: 200_000,
    Withdraw: 300_000,
    Cancel: 200_000,
    Invalidate: 150_000,
}
APPROVE_GAS: Final = 120_000
UINT256_MAX: Final = 2**256 - 1
_FUNDED: Final = ("open", "dispute", "answer")
_NOBODY: Final = "0x" + "00" * 19 + "01"


@dataclass(frozen=True, slots=True)
class TokenFacts:
    """What was found out about a token."""

    asset: Asset
    domain: Domain
    kinds: tuple[FundingKind, ...]
    """How it can be paid, the best last."""


class EvmSettlement(Settlement):
    """Deals on a real escrow contract. Make it with ``connect``."""

    def __init__(
        self,
        chain: EvmChain,
        token: TokenFacts,
        *,
        escrow: str,
        confirmations: int,
        from_block: int,
        funding: FundingKind,
    ) -> None:
        self.chain = chain
        self.asset = token.asset
        self.domain = Domain(chain.chain_id, escrow)
        self.confirmations = confirmations
        self.token_domain = token.domain
        """The domain in which the token's holders sign payments, where it takes signatures."""
        self.kinds = token.kinds
        """How the token can be paid, the best last."""
        self._funding = funding
        self._log = JobLog(
            chain.endpoint, escrow, confirmations=confirmations, from_block=from_block
        )
        self._permits: dict[str, asyncio.Lock] = {}
        self._times: dict[str, int] = {}

    @classmethod
    async def connect(
        cls,
        url: str | Sequence[str],
        *,
        escrow: str,
        store: TxStore,
        chain_id: int | None = None,
        confirmations: int = 0,
        from_block: int = 0,
        funding: FundingKind | None = None,
        poll_s: float = 0.2,
        **options: Any,
    ) -> EvmSettlement:
        """Return the settlement of the escrow at ``url``, one endpoint or several.

        ``from_block`` is the block of its deployment, or later: deals before it are not seen.
        Without ``funding`` it takes the best that the token offers.

        :raises ChainUnavailable: if the endpoint does not answer
        :raises ConfigurationError: if there is no such escrow, or the chain is another one
        """
        chain = await EvmChain.connect(
            url, store=store, chain_id=chain_id, poll_s=poll_s, **options
        )
        try:
            if not artifact("JobEscrow").same_code(await chain.code(escrow)):
                raise ConfigurationError(
                    f"at {escrow} on chain {chain.chain_id} is no escrow of this version: check "
                    "the address, or start a local chain with a fresh state directory"
                )
            found = await chain.call(escrow, escrow_abi().encode("token"), escrow_abi())
            token = await token_facts(chain, "0x" + found[12:32].hex())
            if funding not in (None, *token.kinds):
                raise ConfigurationError(
                    f"the token {token.asset.token} cannot be paid by {funding}: it takes"
                    f" {' or '.join(token.kinds)}; set funding in the network file so, or leave it"
                    " out"
                )
        except BaseException:
            await chain.close()
            raise
        return cls(
            chain,
            token,
            escrow=escrow,
            confirmations=confirmations,
            from_block=from_block,
            funding=funding or token.kinds[-1],
        )

    async def close(self) -> None:
        """Release the connections. Safe to repeat."""
        await self._log.close()
        await self.chain.close()

    # -- reading -----------------------------------------------------------------------------

    async def head(self) -> Head:
        """Return the newest block.

        :raises ChainUnavailable: if the endpoint does not answer
        """
        block = await self.chain.endpoint.latest()
        return Head(block.number, block.time_s)

    async def balance(self, owner: AgentId) -> int:
        """Return the token units that ``owner`` holds outside of any escrow."""
        return await self._number(self.asset.token, token_abi().encode("balanceOf", owner))

    async def owed(self, owner: AgentId) -> int:
        """Return the units that a failed payout left with the escrow for ``owner``."""
        return await self._number(self.domain.contract, escrow_abi().encode("owed", owner))

    async def held(self) -> int:
        """Return all token units that the escrow itself holds."""
        return await self.balance(self.domain.contract)

    async def supply(self) -> int:
        """Return all units of the token that exist, wherever they are."""
        return await self._number(self.asset.token, token_abi().encode("totalSupply"))

    async def _number(self, to: str, data: bytes) -> int:
        return int.from_bytes(await self.chain.call(to, data, escrow_abi()), "big")

    async def jobs(self, job_ids: Sequence[bytes]) -> dict[bytes, JobView]:
        """Return what the chain says of each deal, ``confirmations`` below the newest block."""
        return await self._log.views(list(job_ids))

    async def events(self, from_block: int) -> tuple[list[ChainEvent], int]:
        """Return the escrow's events from ``from_block`` on, oldest first, and the next block."""
        return await self._log.events(from_block)

    # -- writing -----------------------------------------------------------------------------

    async def perform(self, effect_id: str, call: Call, identity: Identity) -> Receipt:
        """Send ``call`` from ``identity`` and return its receipt once it is in a block.

        :raises CallReverted: if the escrow or the token refuses it; it is tried before it is sent
        :raises LocalProtocolError: if that id stands for another call
        :raises ChainUnavailable: if it cannot be told whether it went through; repeat it
        """
        if self._funding is FundingKind.PERMIT and isinstance(call, Open | Dispute | Answer):
            # A permit carries the token's next nonce: one owner's must go one after the other.
            async with self._permits.setdefault(identity.address, asyncio.Lock()):
                return await self._perform(effect_id, call, identity)
        return await self._perform(effect_id, call, identity)

    async def _perform(self, effect_id: str, call: Call, identity: Identity) -> Receipt:
        kept = await self.chain.kept(effect_id)
        if kept is not None and not same_call(kept[0], call_data(call, self.domain, BY_ALLOWANCE)):
            raise other_call(effect_id)
        if kept is None or kept[1]:
            data = call_data(call, self.domain, await self._fund(effect_id, call, identity))
        else:
            data = kept[0]
        request = Request(self.domain.contract, data, GAS[type(call)])
        receipt = await self.chain.send(effect_id, identity, request, escrow_abi())
        return Receipt(receipt.tx_hash, receipt.block, await self._time_of(receipt), receipt.gas)

    async def _time_of(self, receipt: TxReceipt) -> int:
        known = self._times.get(receipt.block_hash)
        if known is None:
            known = (await self.chain.endpoint.block(hex(receipt.block))).time_s
            self._times = {receipt.block_hash: known}  # A block is asked for many times in a row.
        return known

    async def _fund(self, effect_id: str, call: Call, identity: Identity) -> Funding:
        """Return what the escrow needs to take the money of ``call``, signed by its sender."""
        match call:
            case Open():
                units, purpose = call.terms.price_units, Purpose.PRICE
            case Dispute():
                units, purpose = call.terms.bond_units, Purpose.DISPUTE_BOND
            case Answer():
                units, purpose = call.terms.bond_units, Purpose.ANSWER_BOND
            case _:
                return BY_ALLOWANCE
        if units == 0:
            return BY_ALLOWANCE
        escrow, deadline_s = self.domain.contract, deadline_of(call.terms, purpose)
        if self._funding is FundingKind.AUTHORIZATION:
            return by_authorization(
                identity,
                self.token_domain,
                escrow=escrow,
                units=units,
                job_id=job_id_of(call, self.domain),
                purpose=purpose,
                deadline_s=deadline_s,
            )
        if self._funding is FundingKind.PERMIT:
            nonce = await self._number(
                self.asset.token, token_abi().encode("nonces", identity.address)
            )
            return by_permit(
                identity,
                self.token_domain,
                escrow=escrow,
                units=units,
                nonce=nonce,
                deadline_s=deadline_s,
            )
        await self._approve(effect_id, identity, units)
        return BY_ALLOWANCE

    async def _approve(self, effect_id: str, identity: Identity, units: int) -> None:
        """See to it that the escrow may draw ``units``: a standing allowance, given once."""
        escrow, token = self.domain.contract, self.asset.token
        allowance = token_abi().encode("allowance", identity.address, escrow)
        if await self._number(token, allowance) >= units:
            return
        data = token_abi().encode("approve", escrow, UINT256_MAX)
        await self.chain.send(
            f"{effect_id}/approve", identity, Request(token, data, APPROVE_GAS), token_abi()
        )


def call_data(call: Call, domain: Domain, funding: Funding) -> bytes:
    """Return the calldata of ``call``. An empty signature stands for the sender's own."""
    abi, money = escrow_abi(), funding.as_tuple()
    match call:
        case Open(terms, signature):
            return abi.encode("open", _tuple(terms), b"", signature, money)
        case Submit(terms, deliverable):
            return abi.encode("submit", _number(terms.digest(domain)), deliverable, b"")
        case Settle(terms, deliverable, units, buyer, seller):
            return abi.encode("settle", _tuple(terms), deliverable, units, buyer, seller)
        case Decline(terms):
            return abi.encode("decline", _tuple(terms))
        case Dispute(terms, evidence):
            return abi.encode("dispute", _tuple(terms), evidence, b"", money)
        case Answer(terms, evidence):
            return abi.encode("answer", _tuple(terms), evidence, b"", money)
        case Rule(terms, units, penalty, evidence):
            return abi.encode("rule", _tuple(terms), units, penalty, evidence, b"")
        case Poke(terms):
            return abi.encode("poke", _tuple(terms))
        case ClaimRefund(job_id):
            return abi.encode("claimRefund", _number(job_id))
        case Withdraw(owner):
            return abi.encode("withdraw", owner)
        case Cancel(terms):
            return abi.encode("cancel", _tuple(terms))
        case Invalidate(word, mask):
            return abi.encode("invalidate", word, mask)


def same_call(left: bytes, right: bytes) -> bool:
    """Return whether two calldata ask for the same, however it is funded."""
    if left == right or left[:4] != right[:4]:
        return left == right
    for name in _FUNDED:
        function = escrow_abi().functions[name]
        if function.selector == left[:4]:
            return function.decode_input(left)[:-1] == function.decode_input(right)[:-1]
    return False


def _number(job_id: bytes) -> int:
    return int.from_bytes(job_id, "big")


def _tuple(terms: Terms) -> tuple[object, ...]:
    told = chain_terms(terms)
    return tuple(getattr(told, name) for name in told.__slots__)


async def token_facts(chain: EvmChain, token: str) -> TokenFacts:
    """Find out how a token is called and how it can be paid with a signature.

    :raises ConfigurationError: if there is no token at that address
    """
    abi = token_abi()

    async def ask(name: str, *values: object) -> tuple[Any, ...] | None:
        try:
            data = await chain.call(token, abi.encode(name, *values), abi)
            return abi.functions[name].decode(data)
        except (CallReverted, DecodingError, ValueError):  # No such function there, or another.
            return None

    decimals, symbol, name = await asyncio.gather(ask("decimals"), ask("symbol"), ask("name"))
    if decimals is None:
        raise ConfigurationError(f"at {token} on chain {chain.chain_id} is no token")
    asset = Asset(chain.chain_id, token, str((symbol or ("?",))[0]), int(decimals[0]))
    domain = Domain(chain.chain_id, token, *await _domain_name(ask, name))
    separator = await ask("DOMAIN_SEPARATOR")
    if separator is None or separator[0] != domain.separator:
        return TokenFacts(asset, domain, (FundingKind.ALLOWANCE,))
    kinds = [FundingKind.ALLOWANCE]
    if await ask("nonces", _NOBODY) is not None:
        kinds.append(FundingKind.PERMIT)
    if await ask("authorizationState", _NOBODY, bytes(32)) is not None:
        kinds.append(FundingKind.AUTHORIZATION)
    return TokenFacts(asset, domain, tuple(kinds))


async def _domain_name(
    ask: Callable[..., Awaitable[tuple[Any, ...] | None]], name: tuple[Any, ...] | None
) -> tuple[str, str]:
    """Return name and version of a token's typed data: by EIP-5267, else as most do it."""
    told = await ask("eip712Domain")
    if told is not None:
        return str(told[1]), str(told[2])
    version = await ask("version")
    return str((name or ("",))[0]), str((version or ("1",))[0])
