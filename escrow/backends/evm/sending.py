"""One call of one contract, sent once under an effect's id: what the smaller ports share."""

from __future__ import annotations

from typing import TYPE_CHECKING

from coase.escrow.ports import Receipt

from .chain import EvmChain, Request, other_call

if TYPE_CHECKING:
    from coase.protocol.identity import Identity

    from .abi import Abi


async def send_once(
    chain: EvmChain, effect_id: str, identity: Identity, request: Request, abi: Abi
) -> Receipt:
    """Bring ``request`` into a block, once, and return its receipt with the block's time.

    :raises CallReverted: if the contract refuses it; it is tried before it is sent
    :raises LocalProtocolError: if that id stands for another call
    :raises ChainUnavailable: if it cannot be told whether it went through; repeat it
    """
    kept = await chain.kept(effect_id)
    if kept is not None and kept[0] != request.data:
        raise other_call(effect_id)
    receipt = await chain.send(effect_id, identity, request, abi)
    block = await chain.endpoint.block(hex(receipt.block))
    return Receipt(receipt.tx_hash, receipt.block, block.time_s, receipt.gas)


async def ask_address(chain: EvmChain, to: str, name: str, abi: Abi) -> str:
    """Return the address that the view ``name`` without arguments gives."""
    return "0x" + (await chain.call(to, abi.encode(name), abi))[12:32].hex()
