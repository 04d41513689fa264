"""How a network's chain is asked and how far it is believed: its file, else a preset, else care.

A chain of one's own machine is believed in everything; one that others run is not.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any, Final

from coase.escrow.backends.evm.chain import FEE_MAX_WEI
from coase.escrow.backends.evm.endpoints import Trust
from coase.escrow.ports import FundingKind
from coase.escrow.presets import preset_of
from coase.protocol.errors import ConfigurationError

if TYPE_CHECKING:
    from coase.escrow.backends.evm.settlement import EvmSettlement

    from .config import Network

log = logging.getLogger(__name__)

# For a chain of which nothing is known: a minute on Ethereum itself, seconds on most others.
CONFIRMATIONS: Final = 5
HEAD_AGE_MAX_S: Final = 300
HEAD_BACK_MAX_BLOCKS: Final = 64  # Two epochs of Ethereum; no fork that one survives is longer.


def connect_options(network: Network) -> dict[str, Any]:
    """Return what to give ``EvmSettlement.connect`` for the chain of ``network``.

    :raises ConfigurationError: if the file asks for a kind of funding that does not exist
    """
    preset, own = preset_of(network.chain_id), network.faucet
    age_s, fee_wei = HEAD_AGE_MAX_S, FEE_MAX_WEI
    if own:
        age_s = 0
    elif preset is not None:
        age_s, fee_wei = preset.head_age_max_s, preset.fee_max_wei
    if network.head_age_max_s is not None:
        age_s = network.head_age_max_s
    return {
        "chain_id": network.chain_id,
        "confirmations": confirmations_of(network),
        "from_block": network.from_block,
        "funding": funding_of(network),
        "fee_max_wei": network.fee_max_wei or fee_wei,
        "trust": Trust(
            head_age_max_s=age_s, head_back_max_blocks=0 if own else HEAD_BACK_MAX_BLOCKS
        ),
    }


def confirmations_of(network: Network) -> int:
    """Return how many blocks deep a deal must lie on the chain of ``network`` to be believed."""
    if network.confirmations is not None:
        return network.confirmations
    preset = preset_of(network.chain_id)
    if network.faucet:
        return 0
    return CONFIRMATIONS if preset is None else preset.confirmations


def funding_of(network: Network) -> FundingKind | None:
    """Return how the file wants the escrow to be funded, or None for the token's best.

    :raises ConfigurationError: if it names no kind of funding
    """
    try:
        return FundingKind(network.funding) if network.funding else None
    except ValueError:
        raise ConfigurationError(
            f"funding in the network file is {network.funding!r}: write one of"
            f" {', '.join(FundingKind)}, or leave it out"
        ) from None


def check_token(settlement: EvmSettlement, network: Network) -> None:
    """Return if the escrow's token is the network's, and what it is known to be.

    :raises ConfigurationError: if it is another; says what to do
    """
    token, domain = settlement.asset, settlement.token_domain
    if token.token != network.token:
        remedy = "start a fresh network with: coase up" if network.faucet else "check the file"
        raise ConfigurationError(
            f"the escrow {network.escrow} holds {token.token}, and the network file"
            f" says {network.token}; {remedy}"
        )
    preset = preset_of(network.chain_id)
    known = preset.token if preset is not None else None
    if known is not None and known.address == token.token:
        told = (domain.name, domain.version, token.decimals)
        if told != (known.name, known.version, known.decimals):
            raise ConfigurationError(
                f"{known.symbol} on chain {network.chain_id} is {known.name!r} of version"
                f" {known.version!r} with {known.decimals} decimals, and the endpoint says"
                f" {told[0]!r}, {told[1]!r}, {told[2]}: it lies, or the token has changed; try"
                " another endpoint"
            )
    if token.decimals != network.decimals:
        raise ConfigurationError(
            f"the token {token.token} has {token.decimals} decimals, and the network file says"
            f" {network.decimals}: prices would be read wrongly; mend the file"
        )
    if settlement.kinds == (FundingKind.ALLOWANCE,):
        log.warning(
            "%s takes no signatures (neither EIP-3009 nor EIP-2612): a wallet's first deal"
            " approves the escrow in a transaction of its own",
            token.symbol,
        )
