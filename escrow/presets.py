"""What is known of chains before anybody asks one: ids, tokens, standard contracts, limits.

A preset saves typing and catches a wrong address or the wrong chain; any other EVM chain works by
configuration alone. Where a fact was read stands beside it. What is no fact about a chain but our
own caution (confirmations, fees, ages) is marked so, and a network file may say otherwise.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Literal

from coase.protocol.errors import ConfigurationError

if TYPE_CHECKING:
    from coase.protocol.types import AgentId

GWEI: Final = 10**9

# The proxy that puts code at an address which follows from the code alone, on every chain that has
# it: call it with a salt of 32 bytes and the code that makes the contract. Address and bytes as
# github.com/Arachnid/deterministic-deployment-proxy has them.
DEPLOYER_PROXY: Final = "0x4e59b44847b379578588920ca78fbf26c0b4956c"
DEPLOYER_PROXY_CODE: Final = bytes.fromhex(
    "7fffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffe03601600081602082378035828234f5"
    "8015156039578182fd5b8082525050506014600cf3"
)


@dataclass(frozen=True, slots=True)
class PresetToken:
    """A token that deals may be made in, as its contract must describe itself."""

    address: AgentId
    symbol: str
    decimals: int
    name: str
    """With ``version`` the EIP-712 domain in which its holders sign payments."""
    version: str


@dataclass(frozen=True, slots=True)
class Preset:
    """One chain. Empty addresses are of what is not there, or what ``coase`` puts there."""

    name: str
    chain_id: int
    kind: Literal["local", "test", "main"]
    block_ms: int
    token: PresetToken | None = None
    identity_registry: AgentId = ""
    reputation_registry: AgentId = ""
    channels: AgentId = ""
    erc3009_collector: AgentId = ""
    permit2_collector: AgentId = ""
    permit2: AgentId = ""
    multicall3: AgentId = ""
    confirmations: int = 0
    """Ours: how many blocks a deal's state lies below the newest before it is believed."""
    fee_max_wei: int = 500 * GWEI
    """Ours: the most that a unit of gas may cost before nothing is sent."""
    head_age_max_s: int = 0
    """Ours: how old the newest block may be before the endpoint counts as stale; 0 never."""


# As the Python package x402 2.25.0 (MIT) has them in mechanisms/evm: constants.py for Permit2,
# batch_settlement/constants.py for the rest, "CREATE2 deterministic across chains"; Multicall3 as
# its multicall.py. On a local chain the same contracts are placed at the same addresses.
_CHANNELS: Final = "0x4020074e9dF2ce1deE5A9C1b5c3f541D02a10003".lower()
_ERC3009_COLLECTOR: Final = "0x4020806089470a89826cB9fB1f4059150b550004".lower()
_PERMIT2_COLLECTOR: Final = "0x4020425FAf3B746C082C2f942b4E5159887B0005".lower()
_PERMIT2: Final = "0x000000000022D473030F116dDEE9F6B43aC78BA3".lower()
_MULTICALL3: Final = "0xcA11bde05977b3631167028862bE2a173976CA11".lower()

LOCAL: Final = Preset(
    name="local",
    chain_id=31337,  # The number that development chains share.
    kind="local",
    block_ms=1_000,
    # The interface is the same, the code our own; at the addresses of main chains.
    identity_registry="0x8004A169FB4a3325136EB29fA0ceB6D2e539a432".lower(),
    reputation_registry="0x8004BAa17C55a88189AE136b182e5fdA19dE9b63".lower(),
    channels=_CHANNELS,
    erc3009_collector=_ERC3009_COLLECTOR,
    permit2_collector=_PERMIT2_COLLECTOR,
    permit2=_PERMIT2,
    multicall3=_MULTICALL3,
)

BASE: Final = Preset(
    name="base",
    chain_id=8453,  # docs.base.org, "Connecting to Base"
    kind="main",
    block_ms=2_000,  # docs.base.org, "Base Protocol Overview"
    # Address: developers.circle.com, "USDC contract addresses". Name and version of its EIP-712
    # domain: x402 2.25.0, mechanisms/evm/default_assets.py.
    token=PresetToken(
        address="0x833589fCD6eDb6E08f4c7C32D4f71b54bdA02913".lower(),
        symbol="USDC",
        decimals=6,
        name="USD Coin",
        version="2",
    ),
    # github.com/erc-8004/erc-8004-contracts, registry-addresses.json, under eip155:8453.
    identity_registry="0x8004A169FB4a3325136EB29fA0ceB6D2e539a432".lower(),
    reputation_registry="0x8004BAa17C55a88189AE136b182e5fdA19dE9b63".lower(),
    channels=_CHANNELS,
    erc3009_collector=_ERC3009_COLLECTOR,
    permit2_collector=_PERMIT2_COLLECTOR,
    permit2=_PERMIT2,
    multicall3=_MULTICALL3,
    confirmations=5,  # Ten seconds: the one sequencer hardly ever takes a sealed block back.
    fee_max_wei=20 * GWEI,  # Some hundred times what a quiet hour asks.
    head_age_max_s=60,  # Thirty blocks: by then the endpoint, or the sequencer, has stopped.
)

BASE_SEPOLIA: Final = Preset(
    name="base-sepolia",
    chain_id=84532,  # docs.base.org, "Connecting to Base"
    kind="test",
    block_ms=2_000,
    # Sources as for Base; the test token calls itself by another name.
    token=PresetToken(
        address="0x036CbD53842c5426634e7929541eC2318f3dCF7e".lower(),
        symbol="USDC",
        decimals=6,
        name="USDC",
        version="2",
    ),
    # github.com/erc-8004/erc-8004-contracts, registry-addresses.json, under eip155:84532.
    identity_registry="0x8004A818BFB912233c491871b3d84c89A494BD9e".lower(),
    reputation_registry="0x8004B663056A597Dffe9eCcC1965A193B7388713".lower(),
    channels=_CHANNELS,
    erc3009_collector=_ERC3009_COLLECTOR,
    permit2_collector=_PERMIT2_COLLECTOR,
    permit2=_PERMIT2,
    multicall3=_MULTICALL3,
    confirmations=5,
    fee_max_wei=20 * GWEI,
    head_age_max_s=60,
)

PRESETS: Final = {preset.name: preset for preset in (LOCAL, BASE, BASE_SEPOLIA)}


def preset_named(name: str) -> Preset:
    """Return the preset of that name.

    :raises ConfigurationError: if there is none; says which there are
    """
    if name not in PRESETS:
        raise ConfigurationError(
            f"there is no preset {name!r}, only {', '.join(PRESETS)}; any other chain needs none:"
            " give its endpoint and its token"
        )
    return PRESETS[name]


def preset_of(chain_id: int) -> Preset | None:
    """Return what is known of a chain, or None: that is no fault, it only needs more settings."""
    return next((preset for preset in PRESETS.values() if preset.chain_id == chain_id), None)
