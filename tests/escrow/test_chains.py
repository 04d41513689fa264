"""The table of chains: what is not known to be worthless is money."""

from __future__ import annotations

import pytest

from coase.escrow.chains import (
    LOCAL_CHAINS,
    MAIN_CHAINS,
    TEST_CHAINS,
    ChainKind,
    kind_of_chain,
    name_of_chain,
)
from coase.escrow.presets import PRESETS


def test_an_unknown_chain_counts_as_a_main_one() -> None:
    assert kind_of_chain(123_456_789) is ChainKind.MAIN
    assert kind_of_chain(31337) is ChainKind.LOCAL
    assert kind_of_chain(123_456_789, own=True) is ChainKind.LOCAL
    assert {kind_of_chain(chain, own=True) for chain in MAIN_CHAINS} == {ChainKind.MAIN}
    assert {kind_of_chain(chain, own=True) for chain in TEST_CHAINS} == {ChainKind.TEST}
    assert not (set(MAIN_CHAINS) & set(TEST_CHAINS))
    assert not (LOCAL_CHAINS & set(MAIN_CHAINS))
    assert name_of_chain(8453) == "Base (8453)"
    assert name_of_chain(5) == "chain 5"


@pytest.mark.parametrize("name", PRESETS)
def test_presets_and_the_table_agree(name: str) -> None:
    preset = PRESETS[name]
    assert str(kind_of_chain(preset.chain_id)) == preset.kind
