"""Vouchers: one deposit pays many calls, by signatures over growing totals.

The typed data is that of x402's scheme ``batch-settlement``, at its canonical address, so that a
voucher signed here is claimed there. What is easily misread: the balance of a channel is gross, a
voucher that was not claimed reserves nothing, and an initiated withdrawal stays armed for ever.
``escrow.accounts`` has the rules that follow for each side.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Final

from coase.protocol.identity import keccak256, recover
from coase.protocol.terms import Domain, address_word, word
from coase.protocol.types import ZERO_BYTES32, AgentId

if TYPE_CHECKING:
    from collections.abc import Sequence

CHANNELS: Final = "0x4020074e9df2ce1dee5a9c1b5c3f541d02a10003"
"""Where the contract is, on every chain: clients have it built in."""
WITHDRAW_DELAY_MIN_S: Final = 900
WITHDRAW_DELAY_MAX_S: Final = 30 * 24 * 3600
_CONFIG_TYPEHASH: Final = keccak256(
    b"ChannelConfig(address payer,address payerAuthorizer,address receiver,"
    b"address receiverAuthorizer,address token,uint40 withdrawDelay,bytes32 salt)"
)
_VOUCHER_TYPEHASH: Final = keccak256(b"Voucher(bytes32 channelId,uint128 maxClaimableAmount)")
_REFUND_TYPEHASH: Final = keccak256(b"Refund(bytes32 channelId,uint256 nonce,uint128 amount)")
_ENTRY_TYPE: Final = (
    b"ClaimEntry(bytes32 channelId,uint128 maxClaimableAmount,uint128 totalClaimed)"
)
_PERMIT2_DOMAIN_TYPEHASH: Final = keccak256(
    b"EIP712Domain(string name,uint256 chainId,address verifyingContract)"
)
_PERMITTED_TYPE: Final = b"TokenPermissions(address token,uint256 amount)"
_WITNESS_TYPE: Final = b"DepositWitness(bytes32 channelId)"
_PERMIT2_TYPEHASH: Final = keccak256(
    b"PermitWitnessTransferFrom(TokenPermissions permitted,address spender,uint256 nonce,"
    b"uint256 deadline,DepositWitness witness)" + _WITNESS_TYPE + _PERMITTED_TYPE
)
_ENTRY_TYPEHASH: Final = keccak256(_ENTRY_TYPE)
_BATCH_TYPEHASH: Final = keccak256(b"ClaimBatch(ClaimEntry[] claims)" + _ENTRY_TYPE)


def channels_domain(chain_id: int, contract: str = CHANNELS) -> Domain:
    """Return the EIP-712 domain of the channels on a chain."""
    return Domain(chain_id, contract, "x402 Batch Settlement", "1")


@dataclass(frozen=True, slots=True)
class ChannelConfig:
    """All that a channel is. Two that differ in anything are two channels."""

    payer: AgentId
    payer_authorizer: AgentId
    """Signs vouchers by ECDSA. Zero leaves it to the payer, whose signature can be revoked."""
    receiver: AgentId
    receiver_authorizer: AgentId
    """May claim, and may refund whatever is not claimed: the seller's own key, or not safe."""
    token: str
    withdraw_delay_s: int
    salt: bytes = ZERO_BYTES32

    @property
    def struct_hash(self) -> bytes:
        """The EIP-712 hashStruct."""
        return _config_hash(self)

    def channel_id(self, domain: Domain) -> bytes:
        """Return the channel's id on the chain of ``domain``."""
        return domain.digest(_config_hash(self))


@lru_cache(maxsize=4096)
def _config_hash(config: ChannelConfig) -> bytes:
    return keccak256(
        _CONFIG_TYPEHASH
        + address_word(config.payer)
        + address_word(config.payer_authorizer)
        + address_word(config.receiver)
        + address_word(config.receiver_authorizer)
        + address_word(config.token)
        + word(config.withdraw_delay_s)
        + config.salt
    )


@dataclass(frozen=True, slots=True)
class Voucher:
    """A signed total: what the receiver may have claimed by then in the channel's whole life."""

    channel_id: bytes
    units: int
    signature: bytes

    def signer(self, domain: Domain) -> AgentId:
        """Return the address whose key signed it.

        :raises BadSignature: if that is no plain signature
        """
        return recover(voucher_digest(domain, self.channel_id, self.units), self.signature)


@dataclass(frozen=True, slots=True)
class Claim:
    """One row of a claim: raise the channel's claimed total to ``units``, by this voucher."""

    config: ChannelConfig
    voucher: Voucher
    units: int


@dataclass(frozen=True, slots=True)
class ChannelView:
    """What the chain said of a channel, and when: ``time_s`` is the time of that block."""

    balance_units: int = 0
    """Gross: all deposits less withdrawals and refunds; what was claimed is still in it."""
    claimed_units: int = 0
    withdrawing_units: int = 0
    withdraw_since_s: int = 0
    """When the pending withdrawal was asked for; 0 if none is."""
    refund_nonce: int = 0
    time_s: int = 0

    @property
    def free_units(self) -> int:
        """What is neither claimed nor given back."""
        return self.balance_units - self.claimed_units

    @property
    def is_withdrawing(self) -> bool:
        """Whether a withdrawal is armed: it may be finalised at any time after its delay."""
        return self.withdraw_since_s != 0

    @property
    def solid_units(self) -> int:
        """The highest total that a voucher may reach and be paid, whatever the payer does."""
        return max(self.claimed_units, self.balance_units - self.withdrawing_units)


@dataclass(frozen=True, slots=True)
class Fund:
    """Put ``units`` into the channel; the payer sends it. ``salt`` tells deposits apart."""

    config: ChannelConfig
    units: int
    salt: bytes
    deadline_s: int


@dataclass(frozen=True, slots=True)
class ClaimAll:
    """Claim several channels, all or none; their receiver or its authorizer sends it."""

    rows: tuple[Claim, ...]


@dataclass(frozen=True, slots=True)
class PayOut:
    """Pay a receiver what was claimed for it and not yet paid. Anybody may send it."""

    receiver: AgentId


@dataclass(frozen=True, slots=True)
class AskWithdrawal:
    """Start the delay after which the payer may take ``units`` back; the payer sends it."""

    config: ChannelConfig
    units: int


@dataclass(frozen=True, slots=True)
class TakeWithdrawal:
    """Take back what was asked for, or what is free if that is less; the payer sends it."""

    config: ChannelConfig


@dataclass(frozen=True, slots=True)
class GiveBack:
    """Return up to ``units`` of what is free to the payer at once; the receiver sends it."""

    config: ChannelConfig
    units: int


ChannelCall = Fund | ClaimAll | PayOut | AskWithdrawal | TakeWithdrawal | GiveBack


def voucher_digest(domain: Domain, channel_id: bytes, units: int) -> bytes:
    """Return what the payer signs to let the receiver claim up to ``units`` in all."""
    return domain.digest(keccak256(_VOUCHER_TYPEHASH + channel_id + word(units)))


def refund_digest(domain: Domain, channel_id: bytes, nonce: int, units: int) -> bytes:
    """Return what the receiver's authorizer signs to have ``units`` given back."""
    return domain.digest(keccak256(_REFUND_TYPEHASH + channel_id + word(nonce) + word(units)))


def claims_digest(domain: Domain, rows: Sequence[Claim]) -> bytes:
    """Return what the receiver's authorizer signs to have somebody else send a claim."""
    entries = b"".join(
        keccak256(
            _ENTRY_TYPEHASH + row.voucher.channel_id + word(row.voucher.units) + word(row.units)
        )
        for row in rows
    )
    return domain.digest(keccak256(_BATCH_TYPEHASH + keccak256(entries)))


def deposit_nonce(channel_id: bytes, salt: bytes) -> bytes:
    """Return the EIP-3009 nonce that binds an authorisation to one deposit into one channel."""
    return keccak256(channel_id + salt)


def permit2_deposit_digest(
    *,
    chain_id: int,
    permit2: str,
    collector: str,
    token: str,
    units: int,
    nonce: int,
    deadline_s: int,
    channel_id: bytes,
) -> bytes:
    """Return what the payer signs for a deposit by Permit2, good for one channel."""
    separator = keccak256(
        _PERMIT2_DOMAIN_TYPEHASH + keccak256(b"Permit2") + word(chain_id) + address_word(permit2)
    )
    permitted = keccak256(keccak256(_PERMITTED_TYPE) + address_word(token) + word(units))
    witness = keccak256(keccak256(_WITNESS_TYPE) + channel_id)
    struct_hash = keccak256(
        _PERMIT2_TYPEHASH
        + permitted
        + address_word(collector)
        + word(nonce)
        + word(deadline_s)
        + witness
    )
    return keccak256(b"\x19\x01" + separator + struct_hash)
