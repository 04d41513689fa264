"""The typed data of channels is what everybody else computes."""

from __future__ import annotations

from typing import Any

from eth_account.messages import _hash_eip191_message, encode_typed_data
from hypothesis import given
from hypothesis import strategies as st

from coase.escrow.voucher import (
    CHANNELS,
    ChannelConfig,
    ChannelView,
    Claim,
    Voucher,
    channels_domain,
    claims_digest,
    deposit_nonce,
    permit2_deposit_digest,
    refund_digest,
    voucher_digest,
)
from coase.protocol.identity import Identity, keccak256

addresses = st.binary(min_size=20, max_size=20).map(lambda raw: "0x" + raw.hex())
words = st.binary(min_size=32, max_size=32)
units = st.integers(0, 2**128 - 1)
configs = st.builds(
    ChannelConfig,
    addresses,
    addresses,
    addresses,
    addresses,
    addresses,
    st.integers(0, 2**40 - 1),
    words,
)
DOMAIN = channels_domain(31337)
TYPES: dict[str, list[dict[str, str]]] = {
    "ChannelConfig": [
        {"name": "payer", "type": "address"},
        {"name": "payerAuthorizer", "type": "address"},
        {"name": "receiver", "type": "address"},
        {"name": "receiverAuthorizer", "type": "address"},
        {"name": "token", "type": "address"},
        {"name": "withdrawDelay", "type": "uint40"},
        {"name": "salt", "type": "bytes32"},
    ],
    "Voucher": [
        {"name": "channelId", "type": "bytes32"},
        {"name": "maxClaimableAmount", "type": "uint128"},
    ],
    "Refund": [
        {"name": "channelId", "type": "bytes32"},
        {"name": "nonce", "type": "uint256"},
        {"name": "amount", "type": "uint128"},
    ],
    "ClaimEntry": [
        {"name": "channelId", "type": "bytes32"},
        {"name": "maxClaimableAmount", "type": "uint128"},
        {"name": "totalClaimed", "type": "uint128"},
    ],
}


def digest_of(name: str, message: dict[str, Any], types: dict[str, Any] | None = None) -> bytes:
    """What eth-account would sign."""
    domain = {
        "name": "x402 Batch Settlement",
        "version": "1",
        "chainId": 31337,
        "verifyingContract": CHANNELS,
    }
    signable = encode_typed_data(domain, types or {name: TYPES[name]}, message)
    return bytes(_hash_eip191_message(signable))


@given(configs)
def test_a_channel_is_its_configuration(config: ChannelConfig) -> None:
    message = {
        "payer": config.payer,
        "payerAuthorizer": config.payer_authorizer,
        "receiver": config.receiver,
        "receiverAuthorizer": config.receiver_authorizer,
        "token": config.token,
        "withdrawDelay": config.withdraw_delay_s,
        "salt": config.salt,
    }
    assert config.channel_id(DOMAIN) == digest_of("ChannelConfig", message)
    assert config.channel_id(channels_domain(1)) != config.channel_id(DOMAIN)


@given(words, units, units, st.integers(0, 2**256 - 1))
def test_digests(channel_id: bytes, most: int, total: int, nonce: int) -> None:
    voucher = {"channelId": channel_id, "maxClaimableAmount": most}
    assert voucher_digest(DOMAIN, channel_id, most) == digest_of("Voucher", voucher)
    refund = {"channelId": channel_id, "nonce": nonce, "amount": total}
    assert refund_digest(DOMAIN, channel_id, nonce, total) == digest_of("Refund", refund)


@given(st.lists(st.tuples(configs, units, units), max_size=3))
def test_batches(rows: list[tuple[ChannelConfig, int, int]]) -> None:
    claims = [Claim(c, Voucher(c.channel_id(DOMAIN), most, b""), total) for c, most, total in rows]
    entries = [
        {"channelId": c.channel_id(DOMAIN), "maxClaimableAmount": most, "totalClaimed": total}
        for c, most, total in rows
    ]
    types = {"ClaimBatch": [{"name": "claims", "type": "ClaimEntry[]"}]}
    types["ClaimEntry"] = TYPES["ClaimEntry"]
    assert claims_digest(DOMAIN, claims) == digest_of("ClaimBatch", {"claims": entries}, types)


@given(addresses, units, st.integers(0, 2**256 - 1), words)
def test_deposits_by_permit2(token: str, amount: int, nonce: int, channel_id: bytes) -> None:
    permit2, collector = "0x" + "22" * 20, "0x" + "33" * 20
    types = {
        "PermitWitnessTransferFrom": [
            {"name": "permitted", "type": "TokenPermissions"},
            {"name": "spender", "type": "address"},
            {"name": "nonce", "type": "uint256"},
            {"name": "deadline", "type": "uint256"},
            {"name": "witness", "type": "DepositWitness"},
        ],
        "TokenPermissions": [
            {"name": "token", "type": "address"},
            {"name": "amount", "type": "uint256"},
        ],
        "DepositWitness": [{"name": "channelId", "type": "bytes32"}],
    }
    message = {
        "permitted": {"token": token, "amount": amount},
        "spender": collector,
        "nonce": nonce,
        "deadline": 99,
        "witness": {"channelId": channel_id},
    }
    domain = {"name": "Permit2", "chainId": 31337, "verifyingContract": permit2}
    assert permit2_deposit_digest(
        chain_id=31337,
        permit2=permit2,
        collector=collector,
        token=token,
        units=amount,
        nonce=nonce,
        deadline_s=99,
        channel_id=channel_id,
    ) == bytes(_hash_eip191_message(encode_typed_data(domain, types, message)))


def test_a_voucher_names_its_signer() -> None:
    payer = Identity(keccak256(b"payer"))
    digest = voucher_digest(DOMAIN, bytes(32), 7)
    assert Voucher(bytes(32), 7, payer.sign(digest)).signer(DOMAIN) == payer.address
    assert Voucher(bytes(32), 8, payer.sign(digest)).signer(DOMAIN) != payer.address


def test_a_deposit_nonce_is_of_one_channel_and_salt() -> None:
    one, two = bytes(32), keccak256(b"two")
    assert len({deposit_nonce(a, b) for a in (one, two) for b in (one, two)}) == 4


def test_what_a_view_says() -> None:
    view = ChannelView(balance_units=100, claimed_units=30, withdrawing_units=90)
    assert view.free_units == 70
    assert view.solid_units == 30  # What is claimed stays claimed, whatever is withdrawn.
    assert not view.is_withdrawing
    assert ChannelView(100, 30, 20, withdraw_since_s=5).solid_units == 80
