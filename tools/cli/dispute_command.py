"""``coase dispute``: the whole file of a deal, and a person's word in it."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from coase.protocol.errors import ChainUnavailable, ConfigurationError

from .app import Json, app, emit, out, perform, raise_user, say

if TYPE_CHECKING:
    from coase.agents.agent import Agent
    from coase.agents.config import Network
    from coase.protocol.session import Thread

    from .journals import Row

WAIT_DEFAULT_S: Final = 60
ID_SHOWN: Final = 8
SHOWN_MAX_CHARS: Final = 400


@app.command()
def dispute(
    deal: Annotated[str, typer.Argument(help="The beginning of a deal's id; see coase replay.")],
    object_: Annotated[
        str, typer.Option("--open", help="Object to the result, for this reason; with a bond.")
    ] = "",
    answer: Annotated[
        str,
        typer.Option(
            help="Stand by your result, with a bond: FILE[:NAME] of the agent that made it."
        ),
    ] = "",
    wait: Annotated[
        int, typer.Option(min=1, help="Seconds to wait for the chain, and then for the arbiter.")
    ] = WAIT_DEFAULT_S,
    journal: Annotated[
        Path | None, typer.Option(help="A journal.sqlite; all of this user without.")
    ] = None,
    json_: Json = False,
) -> None:
    """Show the whole file of a deal: terms, hashes, messages, evidence, chain, ruling.

    A running agent objects and answers by itself, by its check; --open and --answer are for when
    it does not run, or when you see what no check sees. The arbiter rules by what both show.

    Example: [b]coase dispute 8fe282 --open "it is in the wrong language"[/b]
    """
    if object_ and answer:
        raise_user("--open is the buyer's and --answer the seller's: give one of them")
    row = perform(lambda: _find(deal, journal, "seller" if answer else "buyer"))
    path, agent, deal_id = Path(row["journal"]), str(row["agent"]), str(row["deal"])
    if object_ or answer:
        perform(lambda: _act(path, agent, deal_id, object_, answer, wait))
    document = perform(lambda: _file(path, agent, deal_id))
    if json_:
        emit(document)
    else:
        _show(document)


async def _find(deal: str, journal: Path | None, side: str) -> Row:
    """Return the one deal that begins so.

    :raises ConfigurationError: if there is none, or more than one
    """
    from coase.agents.config import state_home

    from .journals import deals_below, deals_in

    rows = deals_in(journal) if journal is not None else deals_below(state_home())
    found = [row for row in rows if deal and str(row["deal"]).startswith(deal)]
    if not found:
        raise ConfigurationError(f"no deal begins with {deal!r}; see them with: coase replay")
    ids = {str(row["deal"]) for row in found}
    if len(ids) > 1:
        raise ConfigurationError(f"{len(ids)} deals begin with {deal!r}: write more of its id")
    # Both sides may be this user's own.
    return min(found, key=lambda row: row["side"] != side)


async def _file(path: Path, agent: str, deal: str) -> dict[str, Any]:
    """Return the file from journal and chain; of the journal alone where no chain answers."""
    from coase.agents.casefile import case_file, on_chain, read_deal, waiting_for
    from coase.agents.config import load_network
    from coase.agents.wiring import view_settlement

    thread, records = read_deal(path, agent, deal)
    document = case_file(thread, records) | {
        "journal": str(path),
        "waiting_for": waiting_for(thread),
        "chain": None,
    }
    if not thread.job_id:
        return document
    try:
        network = load_network()
        if network.domain != thread.domain:
            say(f"the deal is on escrow {thread.domain.contract}: another network's, not asked")
            return document
        settlement = await view_settlement(network)
        try:
            document["chain"] = await on_chain(settlement, thread.job_id, network.from_block)
        finally:
            await settlement.close()
    except (ChainUnavailable, ConfigurationError) as error:
        say(f"the chain is not shown: {error}")
    return document


async def _act(path: Path, agent: str, deal: str, why: str, file: str, wait_s: int) -> None:
    """Object or answer in the agent's name, and stay for the arbiter a while."""
    from coase.agents.casefile import read_deal
    from coase.agents.config import load_network
    from coase.agents.node import open_node
    from coase.agents.objection import (
        IN_DISPUTE,
        Objector,
        object_to,
        require_answerable,
        require_objectionable,
        until,
    )
    from coase.protocol.errors import DealFailed
    from coase.protocol.states import State

    thread, _ = read_deal(path, agent, deal)
    (require_objectionable if why else require_answerable)(thread)
    network = load_network()
    name = _free_name(path.parent, agent, thread, network)
    async with open_node(network=network, state=path.parent) as node:
        objector = Objector(name, deal=deal, why=why) if why else _maker(file, name)
        await node.add(objector)
        if objector.address != agent:
            raise ConfigurationError(f"the key of {name!r} in {path.parent} is not that of {agent}")
        if isinstance(objector, Objector):
            say("objecting …")
            thread = await object_to(objector, deal, wait_s=wait_s)
        else:
            say("answering …")
            thread = await until(objector, deal, (State.ANSWERED,), wait_s=wait_s)
        say(f"the deal is {thread.state}; showing the evidence to {thread.agreed_terms.arbiter}")
        try:
            await until(objector, deal, (), wait_s=wait_s)
        except DealFailed as error:
            if error.state not in IN_DISPUTE:
                return  # It is over: the file says how.
    say("no ruling yet: keep your agent running, it shows the evidence until it was taken")


def _maker(file: str, name: str) -> Agent:
    """Return the agent that made the result: its code holds the schemas that it was sold by.

    :raises ConfigurationError: if the file declares no agent of that name
    """
    from .agent_command import load_agents

    found = load_agents(file)
    for one in found:
        if one.name == name:
            return one
    names = ", ".join(one.name for one in found)
    raise ConfigurationError(f"{file} declares {names}, and the deal is of {name!r}")


def _free_name(place: Path, agent: str, thread: Thread, network: Network) -> str:
    """Return the agent's name in its state directory.

    :raises ConfigurationError: if a process holds it, or it is another network's
    """
    from coase.escrow.backends.keystore import names_in

    from .journals import held_by

    if holder := held_by(place):
        raise ConfigurationError(
            f"{place} is held by {holder}: that agent objects and answers by itself, by its own"
            " check; stop it to speak for it, and start it again afterwards"
        )
    if network.domain != thread.domain:
        raise ConfigurationError(
            f"the deal is on the escrow {thread.domain.contract} of chain {thread.domain.chain_id},"
            f" and the network file names {network.escrow}: name its file in COASE_NETWORK"
        )
    names = {address: name for name, address in names_in(place).items()}
    if agent not in names:
        raise ConfigurationError(f"{place} has no key of {agent}: is it another node's journal?")
    return names[agent]


def _show(document: dict[str, Any]) -> None:
    out.print(
        f"[b]{document['deal']}[/b]\n{document['side']} {document['agent']}, with"
        f" {document['counterparty']}",
        highlight=False,
        soft_wrap=True,
    )
    if "terms" in document:
        _show_terms(document)
    _show_messages(document["messages"])
    if document["chain"] is not None:
        _show_chain(document["chain"])
    waiting = document["waiting_for"]
    if waiting:
        text = f"{waiting['who']} must act by {_time(waiting['until_s'])}, by chain time;"
        line = f"{text} if not, {waiting['if_silent']}"
    else:
        line = f"{document['state']}: {document['why']}" if document["why"] else document["state"]
    out.print(line, highlight=False, soft_wrap=True, markup=False)


def _show_terms(document: dict[str, Any]) -> None:
    terms, hashes, evidence = document["terms"], document["hashes"], document["evidence"]
    table = _table("", "")
    rows = [
        ("what", document["capability"]),
        ("job", document["job_id"]),
        ("price, bond (units)", f"{terms['price_units']}, {terms['bond_units']}"),
        ("arbiter", terms["arbiter"] if document["arbitrated"] else "none was named"),
        ("if it stays silent", f"{terms['default_to_seller_units']} units to the seller"),
        ("deliver by", _time(terms["deliver_by_s"])),
        ("windows", f"dispute {terms['dispute_s']} s, answer {terms['answer_s']} s,"
                    f" rule {terms['rule_s']} s"),
        *((f"hash of {name}", value) for name, value in hashes.items() if value),
        ("verdict", document["verdict"] or "none yet"),
        ("task", _short(evidence["task"])),
        ("result", _short(evidence["result"])),
    ]  # fmt: skip
    for name, value in rows:
        table.add_row(name, _clean(value))
    out.print(table)


def _show_messages(messages: list[dict[str, Any]]) -> None:
    table = _table("time", "by", "message", "id", "answers", "taken, by the signed")
    kinds = {message["id"]: message["kind"] for message in messages}
    for message in messages:
        taken = [f"{kinds[one]} {one[:ID_SHOWN]}" for one in message["answered_by"]]
        table.add_row(
            _time(message["at_ms"] // 1000),
            message["by"],
            message["kind"],
            message["id"][:ID_SHOWN],
            message["re"][:ID_SHOWN],
            ", ".join(taken),
        )
    out.print(table)


def _show_chain(chain: dict[str, Any]) -> None:
    table = _table("chain time", "block", "event", "transaction", "evidence or result")
    for event in chain["events"]:
        table.add_row(
            _time(event["time_s"]),
            str(event["block"]),
            event["kind"],
            event["tx_hash"][:14],
            event["evidence"][:14],
        )
    out.print(table)
    if chain["ruling"] is not None:
        units = chain["ruling"]["to_seller_units"]
        out.print(f"ruled: {units} units to the seller ({chain['ruling']['tx_hash']})")
    if chain["phase"] == "closed":
        out.print(
            f"closed, {chain['how'].replace('_', ' ')}: {chain['to_seller_units']} units to the"
            f" seller, {chain['to_buyer_units']} to the buyer",
            highlight=False,
            soft_wrap=True,
        )


def _table(*columns: str) -> Any:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD if any(columns) else None, show_header=any(columns))
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


def _clean(text: object) -> Any:
    from rich.text import Text

    return Text("".join(c if c.isprintable() or c == "\n" else "?" for c in str(text)))


def _short(text: str) -> str:
    return text if len(text) <= SHOWN_MAX_CHARS else f"{text[:SHOWN_MAX_CHARS]} … (all by --json)"


def _time(time_s: int) -> str:
    when = datetime.fromtimestamp(time_s, tz=UTC).astimezone()
    return when.strftime("%Y-%m-%d %H:%M:%S")
