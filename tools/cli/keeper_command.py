"""``coase keeper``: end what silence has ended, for everybody on an escrow."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from .app import Json, app, emit, out, perform, say

if TYPE_CHECKING:
    from coase.agents.config import Network
    from coase.agents.keeper import Keeper, Poked
    from coase.escrow.backends.evm.settlement import EvmSettlement

KEEPER: Final = "keeper"
JOURNAL: Final = "journal.sqlite"
GRACE_DEFAULT_S: Final = 10


@app.command()
def keeper(
    once: Annotated[
        bool, typer.Option("--once", help="Look once, do what is due, and end.")
    ] = False,
    grace: Annotated[
        int,
        typer.Option(min=0, help="Seconds after its time that a deal is left to its parties."),
    ] = GRACE_DEFAULT_S,
    state: Annotated[
        Path | None, typer.Option(help="Directory of the keeper's key and journal.")
    ] = None,
    json_: Json = False,
) -> None:
    """Poke every deal on the escrow whose time has passed, other people's too.

    Nobody's money can be kept by silence, but somebody has to say so to the contract: parties do,
    and when both are away this does. Slices of stakes that ended deals still hold it closes too. It
    needs no broker, gets nothing for it, and pays only gas.

    Example: [b]coase keeper --once[/b]
    """
    document = perform(lambda: _keep(state, grace, once, json_))
    if once and json_:
        emit(document)
    elif once:
        count, left = len(document["poked"]), document["open"]
        out.print(f"{count} deals ended by {document['keeper']}; {left} are open", highlight=False)


async def _keep(state: Path | None, grace: int, once: bool, as_json: bool) -> dict[str, Any]:
    import time

    from coase.agents.backends.sqlite import SqliteJournal, StateDirectory
    from coase.agents.beside import open_beside
    from coase.agents.config import load_network
    from coase.agents.keeper import Keeper
    from coase.agents.wiring import open_settlement, unlock_keys

    from .journals import node_home

    network = load_network()
    home = state or node_home(network) / KEEPER
    directory = StateDirectory(home)
    try:
        journal = SqliteJournal(home / JOURNAL)
        try:
            settlement = await open_settlement(network, journal)
            try:
                identity = unlock_keys(network, home).derive(KEEPER)
                await _require_coin(settlement, network, identity.address)
                keeping = Keeper(
                    settlement,
                    identity,
                    journal,
                    now_ms=lambda: time.time_ns() // 1_000_000,
                    grace_s=grace,
                    from_block=network.from_block,
                    stake=(await open_beside(network, settlement)).stake,
                )
                return await _look(keeping, once, as_json)
            finally:
                await settlement.close()
        finally:
            await journal.close()
    finally:
        directory.release()


async def _look(keeping: Keeper, once: bool, as_json: bool) -> dict[str, Any]:
    address = keeping.identity.address

    def tell(poked: Poked) -> None:
        if as_json and not once:
            emit(asdict(poked), indent=None)
        elif not as_json:
            _show(poked)

    if not once:
        if as_json:
            emit({"keeper": address, "escrow": keeping.settlement.domain.contract}, indent=None)
        say(f"keeper {address} watches {keeping.settlement.domain.contract}; Ctrl-C ends it")
        await keeping.run(tell)
    found = await keeping.look()
    for poked in found:
        tell(poked)
    ended = [asdict(poked) for poked in found if not poked.refused]
    return {
        "keeper": address,
        "escrow": keeping.settlement.domain.contract,
        "chain_time_s": keeping.seen_s,
        "poked": ended,
        "refused": [asdict(poked) for poked in found if poked.refused],
        "open": len(keeping.open) - len(ended),
    }


def _show(poked: Poked) -> None:
    what = f"refused: {poked.refused}" if poked.refused else poked.outcome
    text = f"{poked.job_id[:16]} {poked.late_s} s late in {poked.phase}: {what}"
    out.print(text + (f" ({poked.tx_hash[:14]})" if poked.tx_hash else ""), highlight=False)


async def _require_coin(settlement: EvmSettlement, network: Network, address: str) -> None:
    """See to it that the keeper can pay for gas; test coin on a local chain."""
    from coase.escrow.backends.evm.deploy import give
    from coase.protocol.errors import ConfigurationError

    if await settlement.chain.coin(address):
        return
    if network.faucet:
        await give(settlement.chain, address, token=network.token, units=0)
        return
    raise ConfigurationError(
        f"the keeper {address} has none of the chain's coin to pay for gas: send it a little"
    )
