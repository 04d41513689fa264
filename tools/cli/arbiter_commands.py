"""``coase arbiter`` and ``coase panel``: who rules disputes, alone or as k of n."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from coase.protocol.errors import CallReverted, ConfigurationError

from .app import Json, app, emit, out, perform, raise_user, say

if TYPE_CHECKING:
    from coase.agents.config import Network, PanelOfArbiters
    from coase.escrow.panel import Constitution
    from coase.protocol.messages import Description
    from coase.protocol.types import AgentId

ARBITER: Final = "arbiter"
AWAKE_MAX_S: Final = 10  # For the members of a panel to answer, on a slow network too.
ASK_EVERY_S: Final = 1


@app.command()
def arbiter(
    name: Annotated[str, typer.Option(help="Of the arbiter; a key belongs to it.")] = ARBITER,
    state: Annotated[
        Path | None, typer.Option(help="Directory for key and journal; the user's own without.")
    ] = None,
    json_: Json = False,
) -> None:
    """Rule the disputes in which both sides named this key, or a panel that it sits on.

    It checks by itself what was agreed, signs what it finds, and gets the bond of whoever was
    wrong. Deals name it once their network lists it: see coase panel.

    Example: [b]coase arbiter --name judy[/b]
    """

    async def work() -> None:
        from coase.agents.config import load_network
        from coase.agents.node import open_node
        from coase.agents.panels import follow_panel
        from coase.agents.wiring import ensure_funds
        from coase.escrow.backends.evm.settlement import EvmSettlement

        from .agent_command import place_for

        network = load_network()
        async with open_node(network=network, state=place_for(network, name, state)) as node:
            identity = node.seed.derive(name)
            await ensure_funds(node.settlement, network, identity.address)
            await node.add_arbiter(identity)
            _announce(network, identity.address, as_json=json_)
            assert isinstance(node.settlement, EvmSettlement)

            def seated(panel: PanelOfArbiters) -> None:
                if identity.address in panel.members:
                    say(f"sits on the panel {panel.address} now")

            await follow_panel(node, node.settlement, seated=seated)

    perform(work)


def _announce(network: Network, address: AgentId, *, as_json: bool) -> None:
    panel = network.panel
    sits = panel is not None and address in panel.members
    alone = address in network.arbiters
    if as_json:
        told = {"arbiter": address, "panel": panel.address if panel and sits else None}
        emit(told | {"listed": alone or sits}, indent=None)
        return
    out.print(f"arbiter {address}; Ctrl-C ends it", highlight=False, soft_wrap=True)
    if panel is not None and sits:
        say(f"sits on the panel {panel.address}, {panel.threshold} of {len(panel.members)}")
    elif not alone:
        say("no deal names it yet: coase panel 1 ADDRESS puts it into the network file")


@app.command()
def panel(
    threshold: Annotated[int, typer.Argument(min=1, max=16, help="How many must agree.")],
    members: Annotated[list[str], typer.Argument(help="The addresses of the arbiters.")],
    json_: Json = False,
) -> None:
    """Let k of n arbiters rule the disputes of this network's next deals.

    The panel's address follows from them; it goes first into the list of arbiters of this
    machine's network file. A deal names it where both sides list it, so give the same to the
    others. It is put on the chain by the first ruling. As many as must agree have to run.

    Example: [b]coase panel 2 0x… 0x… 0x…[/b]
    """
    document = perform(lambda: _panel(threshold, [member.lower() for member in members]))
    if json_:
        emit(document)
        return
    count = len(document["members"])
    out.print(f"panel {document['address']}: {threshold} of {count}", soft_wrap=True)
    say(
        "agents that start from now on name it in their deals; coase up and coase arbiter of its"
        f" members that run have seen it in a moment, and {threshold} of them must run"
    )


async def _require_awake(network: Network, constitution: Constitution) -> None:
    """Return if as many members answer as must agree: nothing is locked under whom nobody serves.

    :raises ConfigurationError: with those who do not answer
    """
    import anyio

    from .purchases import looker

    awake: set[AgentId] = set()
    enough = anyio.Event()
    members = constitution.members

    def heard(sender: AgentId, _: Description) -> None:
        if sender in members:
            awake.add(sender)
        if len(awake) >= constitution.threshold:
            enough.set()

    async with looker(network) as (node, agent):
        assert agent.seat is not None
        assert agent.advocate is not None
        agent.advocate.listeners.append(heard)
        with anyio.move_on_after(AWAKE_MAX_S):
            while not enough.is_set():
                for member in members:
                    body: dict[str, object] = {"name": ""}
                    now_ms = node.runtime.now_ms()
                    step = agent.seat.desk.tell(member, "describe", body, now_ms=now_ms)
                    node.runtime.apply(agent.seat, step)
                with anyio.move_on_after(ASK_EVERY_S):
                    await enough.wait()
    if not enough.is_set():
        away = ", ".join(member for member in members if member not in awake)
        raise ConfigurationError(
            f"{constitution.threshold} members must agree, and {len(awake)} run: there is no answer"
            f" from {away}. Start them first, each with: coase arbiter"
        )


async def _panel(threshold: int, members: list[AgentId]) -> dict[str, Any]:
    from coase.agents.backends.sqlite import SqliteJournal
    from coase.agents.config import PanelOfArbiters, load_network, save_network
    from coase.agents.wiring import open_settlement
    from coase.escrow.backends.evm.panel import EvmPanel
    from coase.escrow.panel import Constitution

    from .scratch import scratch

    network = load_network()
    if not network.panels:
        raise ConfigurationError("this network has no factory of panels: coase deploy --stakes")
    try:
        constitution = Constitution.of(threshold, members)
        PanelOfArbiters(address=network.escrow, threshold=threshold, members=constitution.members)
    except (CallReverted, ValueError):
        raise_user(
            f"{threshold} of {len(members)} is no panel: name 1 to 16 different addresses, 0x and"
            " 40 hex digits, and no more that must agree than there are"
        )
    await _require_awake(network, constitution)
    with scratch("coase-panel-") as place:
        journal = SqliteJournal(place / "journal.sqlite")
        settlement = await open_settlement(network, journal)
        try:
            made = await EvmPanel.connect(
                settlement, panels=network.panels, constitution=constitution
            )
        finally:
            await settlement.close()
            await journal.close()
    named = PanelOfArbiters(address=made.address, threshold=threshold, members=constitution.members)
    before = network.panel.address if network.panel is not None else ""
    others = [one for one in network.arbiters if one not in (made.address, before)]
    save_network(network.model_copy(update={"panel": named, "arbiters": (made.address, *others)}))
    return named.model_dump(mode="json")
