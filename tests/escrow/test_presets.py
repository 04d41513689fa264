"""Presets hold facts: addresses without a slip, hashes that fit, and no chain twice."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path

import pytest
from eth_utils.address import to_checksum_address

from coase.escrow import presets
from coase.escrow.presets import (
    DEPLOYER_PROXY,
    DEPLOYER_PROXY_CODE,
    PRESETS,
    Preset,
    preset_named,
    preset_of,
)
from coase.protocol.errors import ConfigurationError
from coase.protocol.identity import keccak256
from coase.protocol.terms import Domain

SOURCE = Path(presets.__file__).read_text()


def test_every_mixed_case_address_has_its_checksum() -> None:
    # EIP-55: one wrong digit, and the letters' cases no longer fit.
    mixed = [one for one in re.findall(r"0x[0-9a-fA-F]{40}", SOURCE) if one != one.lower()]
    assert len(mixed) >= 10
    assert [one for one in mixed if to_checksum_address(one.lower()) != one] == []


@pytest.mark.parametrize("preset", PRESETS.values(), ids=lambda preset: preset.name)
def test_a_preset_is_whole(preset: Preset) -> None:
    assert preset_named(preset.name) is preset
    assert preset_of(preset.chain_id) is preset
    for field in fields(preset):
        value = getattr(preset, field.name)
        if isinstance(value, str) and value.startswith("0x"):
            assert re.fullmatch("0x[0-9a-f]{40}", value), field.name
    public = preset.kind != "local"
    # A public chain names its money, believes no newest block and bounds what it pays.
    assert (preset.token is not None) is public
    assert (preset.confirmations > 0) is public
    assert (preset.head_age_max_s > 0) is public
    assert 0 < preset.fee_max_wei <= 1_000 * presets.GWEI
    assert preset.block_ms * 10 <= max(preset.head_age_max_s * 1000, 10_000)


@pytest.mark.parametrize(
    ("name", "separator"),
    [
        ("base", "02fa7265e7c5d81118673727957699e4d68f74cd74b7db77da710fe8a2c7834f"),
        ("base-sepolia", "71f17a3b2ff373b803d70a5a07c046c1a2bc8e89c09ef722fcb047abe94c9818"),
    ],
)
def test_the_tokens_domains_are_those_that_their_contracts_tell(name: str, separator: str) -> None:
    # DOMAIN_SEPARATOR() of USDC on both chains, as it was read there and published many times.
    preset = preset_named(name)
    token = preset.token
    assert token is not None
    domain = Domain(preset.chain_id, token.address, token.name, token.version)
    assert domain.separator.hex() == separator


def test_the_embedded_chain_has_everything_where_the_preset_says() -> None:
    from coase.escrow.backends.evm.fixed import code_at_fixed_addresses

    local = preset_named("local")
    placed = code_at_fixed_addresses()
    for field in fields(local):
        value = getattr(local, field.name)
        if isinstance(value, str) and value.startswith("0x"):
            assert value in placed, field.name


def test_the_proxy_is_made_by_the_code_that_its_transaction_carries() -> None:
    # The well-known deployment puts exactly these bytes there: 14 bytes of loader before them.
    assert len(DEPLOYER_PROXY_CODE) == 69
    maker = bytes.fromhex("3fab184622dc19b6109349b94811493bf2a45362")
    made = keccak256(b"\xd6\x94" + maker + b"\x80")[12:]
    assert "0x" + made.hex() == DEPLOYER_PROXY


def test_an_unknown_preset_is_named_and_an_unknown_chain_is_no_fault() -> None:
    with pytest.raises(ConfigurationError, match="no preset 'sepolia', only local, base, base-s"):
        preset_named("sepolia")
    assert preset_of(5) is None
