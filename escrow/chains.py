"""Which chains carry real money, by their ids: what may be careless on one is refused on another.

Only chains that are known to be worthless are treated so; an id that is not here counts as main.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Final


class ChainKind(StrEnum):
    """What a mistake costs on a chain."""

    LOCAL = "local"
    """Nothing: the chain is one machine's own."""
    TEST = "test"
    """A nuisance: its coin is given away, and keys are often used again elsewhere."""
    MAIN = "main"
    """Money."""


LOCAL_CHAINS: Final = frozenset((1337, 31337))
"""The ids that development chains take by themselves: Ganache, Geth --dev, Hardhat, Anvil, ours."""

TEST_CHAINS: Final = {
    11_155_111: "Sepolia",
    560_048: "Hoodi",
    17_000: "Holesky",
    84_532: "Base Sepolia",
    11_155_420: "OP Sepolia",
    421_614: "Arbitrum Sepolia",
    80_002: "Polygon Amoy",
    97: "BNB Smart Chain Testnet",
    43_113: "Avalanche Fuji",
    10_200: "Gnosis Chiado",
    300: "ZKsync Sepolia",
    59_141: "Linea Sepolia",
    534_351: "Scroll Sepolia",
    44_787: "Celo Alfajores",
    11_142_220: "Celo Sepolia",
}

MAIN_CHAINS: Final = {
    1: "Ethereum",
    10: "OP Mainnet",
    56: "BNB Smart Chain",
    100: "Gnosis",
    137: "Polygon",
    324: "ZKsync",
    8_453: "Base",
    42_161: "Arbitrum One",
    42_220: "Celo",
    43_114: "Avalanche",
    59_144: "Linea",
    534_352: "Scroll",
}


def kind_of_chain(chain_id: int, *, own: bool = False) -> ChainKind:
    """Return what kind of chain that is. ``own`` says that this machine itself made the chain.

    What is known by its id is that, whoever says to have made it; an unknown one is a main chain.
    """
    if chain_id in MAIN_CHAINS:
        return ChainKind.MAIN
    if chain_id in TEST_CHAINS:
        return ChainKind.TEST
    return ChainKind.LOCAL if own or chain_id in LOCAL_CHAINS else ChainKind.MAIN


def name_of_chain(chain_id: int) -> str:
    """Return a chain's name for people, with its id."""
    name = MAIN_CHAINS.get(chain_id) or TEST_CHAINS.get(chain_id)
    return f"{name} ({chain_id})" if name else f"chain {chain_id}"
