"""``coase join``, ``leave`` and ``lan``: several machines, one market."""

from __future__ import annotations

import os
import shutil
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer
from rich.text import Text

from coase.protocol.errors import ConfigurationError

from .app import Json, app, emit, err, out, perform, raise_user, say
from .lan_host import Interfaces, LanPort, LanWish, Peers, lan_line, show_code
from .up_command import (
    Ports,
    keep_ports,
    known_network,
    ready_line,
    require_free_place,
    say_ready,
    serve,
)

if TYPE_CHECKING:
    from coase.agents.card import LanState
    from coase.agents.config import Network
    from coase.protocol.joincode import JoinCode

DEFAULT_STATE: Final = "lan"
ID_SHOWN: Final = 8
SKEW_NOTED_MS: Final = 2_000  # A tenth of what the protocol bears; a clock that is set is within.

lan = typer.Typer(help="Look at the machines of a local network.", no_args_is_help=True)
app.add_typer(lan, name="lan")


@app.command()
def join(
    code: Annotated[
        str, typer.Argument(help="The join code; - reads it from standard input.")
    ] = "",
    state: Annotated[
        Path | None, typer.Option(help="Directory that keeps the membership (…/coase/lan).")
    ] = None,
    rpc: Annotated[
        str, typer.Option(help="An endpoint of the chain of your own, not the holder's.")
    ] = "",
    open_: Annotated[
        bool, typer.Option("--open", help="Join a network that was opened to everybody.")
    ] = False,
    nats_port: Annotated[
        int, typer.Option(min=0, max=65535, help="Port of the broker; 0 takes a free one.")
    ] = 0,
    rpc_port: Annotated[
        int, typer.Option(min=0, max=65535, help="Port of the chain; 0 takes a free one.")
    ] = 0,
    lan_port: LanPort = 0,
    interface: Interfaces = None,
    peer: Peers = None,
    json_: Json = False,
) -> None:
    """Join the market of another machine on the local network, with the code that it shows.

    Prints one line of JSON when it is ready, and runs until it is interrupted. Without a code it
    returns to the network that it was in.

    Example: [b]coase join 1B2C-…[/b]
    """
    wish = LanWish(
        lan=True,
        open=open_,
        port=lan_port,
        interfaces=tuple(interface or ()),
        peers=tuple(peer or ()),
    )
    wish.require_sense()

    async def work() -> None:
        require_free_place()
        path = _state(state)
        await _join(path, _code(path, code, open_), wish, Ports(nats_port, rpc_port), rpc, json_)

    perform(work)


def _state(state: Path | None) -> Path:
    from coase.agents.config import state_home

    return state.absolute() if state is not None else state_home() / DEFAULT_STATE


def _kept(path: Path) -> LanState | None:
    from coase.agents.card import LanStateFile

    return LanStateFile(path).load()


def _code(path: Path, given: str, is_open: bool) -> JoinCode | None:
    """Return the code that was given, typed or kept.

    :raises ConfigurationError: if there is none, or it is mistyped
    """
    from coase.protocol.joincode import JoinCode

    if is_open:
        if given:
            raise ConfigurationError("--open knows no code: leave one of the two out")
        return None
    kept = _kept(path)
    if not given and kept is not None and kept.code:
        return JoinCode.parse(kept.code)
    if given in ("", "-"):
        if sys.stdin.isatty():
            err.print("join code: ", end="")
        given = sys.stdin.readline(1024).strip()
        if not given:
            raise ConfigurationError(
                "no join code: coase up --lan shows it on the other machine, coase lan code again"
            )
    return JoinCode.parse(given)


async def _join(
    path: Path, code: JoinCode | None, wish: LanWish, ports: Ports, rpc: str, as_json: bool
) -> None:
    from coase.agents.backends.sqlite import StateDirectory
    from coase.agents.card import LanState, LanStateFile
    from coase.agents.member import member_of

    directory = StateDirectory(path)
    try:
        file = LanStateFile(path)
        kept = file.load() or LanState()
        if kept.net:
            raise ConfigurationError(
                f"{path} holds a chain of its own: open it with coase up --lan --state {path}, or"
                " join with another --state"
            )
        text = code.text if code else ""
        if text != kept.code:
            kept = kept.model_copy(update={"code": text, "card": ""})
        lan = wish.open_lan(path, kept, code, ports.choose(path, "broker"), chain=False)
        file.save(kept)

        def keep(card: bytes) -> None:
            port = lan.broker.route_port
            file.save(kept.model_copy(update={"card": card.hex(), "port": port}))

        async with member_of(
            lan,
            path,
            card=bytes.fromhex(kept.card),
            rpc=rpc,
            rpc_port=ports.choose(path, "chain"),
            say=say,
            keep=keep,
        ) as network:
            if not rpc:
                keep_ports(path, network)

            def announce() -> None:
                emit(ready_line(network) | {"lan": lan_line(lan)}, indent=None)
                if not as_json:
                    say_ready()

            await serve(network, announce)
    finally:
        directory.release()


@app.command()
def leave(
    state: Annotated[
        Path | None, typer.Option(help="Directory that keeps the membership (…/coase/lan).")
    ] = None,
    json_: Json = False,
) -> None:
    """Leave the local network: the code is forgotten, and joining again needs it anew.

    Agents keep their keys and deals. Others shut this machine out with a new code.

    Example: [b]coase leave[/b]
    """

    async def work() -> None:
        network = known_network()
        path = _state(state)
        if state is None and network is not None and network.pid and _kept(Path(network.state)):
            path = Path(network.state)
        document = await _leave(path, network)
        if json_:
            emit(document)

    perform(work)


async def _leave(path: Path, network: Network | None) -> dict[str, Any]:
    from coase.agents.card import LanStateFile
    from coase.agents.lan import TLS_DIRECTORY

    kept = _kept(path)
    if kept is None:
        raise ConfigurationError(f"{path} is in no network; see coase lan status")
    if kept.net:
        raise ConfigurationError(
            f"{path} holds the network's chain, which cannot leave itself: coase up --lan"
            " --new-code shuts the others out, coase up without --lan keeps to this machine"
        )
    ended = await _end(path, network)
    LanStateFile(path).remove()
    # The certificate is as good as the code, for as long as it is valid.
    shutil.rmtree(path / TLS_DIRECTORY, ignore_errors=True)
    say("left; the code is forgotten here" + (", and coase join has ended" if ended else ""))
    return {"left": True, "ended": ended}


async def _end(path: Path, network: Network | None) -> bool:
    """End the ``coase join`` that runs on this state, and return when it has let go."""
    import anyio

    from coase.agents.backends.sqlite import StateDirectory

    ended = False
    if network is not None and network.pid and Path(network.state) == path:
        try:
            os.kill(network.pid, signal.SIGTERM)
            ended = True
        except ProcessLookupError:
            pass
    with anyio.move_on_after(15 if ended else 0.1):
        while True:
            try:
                StateDirectory(path).release()
            except ConfigurationError:
                await anyio.sleep(0.1)
                continue
            return ended
    raise ConfigurationError(f"a process still runs on {path}: end it, then leave again")


@lan.command("code")
def code_(
    state: Annotated[Path | None, typer.Option(help="Directory of coase up or join.")] = None,
    json_: Json = False,
) -> None:
    """Show the join code of this machine's network again.

    Example: [b]coase lan code[/b]
    """

    async def work() -> str:
        network = known_network()
        path = _state(state)
        if state is None and network is not None and network.state:
            path = Path(network.state)
        kept = _kept(path)
        if kept is None or not kept.code:
            raise_user(f"{path} has no join code: make one with coase up --lan")
        return kept.code

    found = perform(work)
    if json_:
        emit({"code": found})
    else:
        show_code(found)


@lan.command("status")
def lan_status(json_: Json = False) -> None:
    """Show the machines of the local network, and those that were heard and not joined.

    Example: [b]coase lan status[/b]
    """

    async def work() -> dict[str, Any]:
        from .lan_checkup import view_of_this_machine

        return await view_of_this_machine()

    view = perform(work)
    if json_:
        emit(view)
        return
    _print_view(view)


def _print_view(view: dict[str, Any]) -> None:
    from .look_commands import clean, table

    addresses = ", ".join(view["addresses"])
    out.print(
        f"[b]{view['mesh']}[/b]: this is {view['node'][:ID_SHOWN]}"
        f"{', with the chain' if view['chain'] else ''}, at {addresses} port {view['port']}",
        highlight=False,
        soft_wrap=True,
    )
    if view["open"]:
        out.print("open to everybody, without a code or encryption", style="yellow")
    if view["clash"]:
        out.print(clean(view["clash"]), style="red", soft_wrap=True)
    where = {row["node"]: ", ".join(row["addresses"]) for row in view["heard"]}
    if view["met"]:
        shown = table("joined", "machine", "id", "address")
        for column in ("away", "clock"):
            shown.add_column(column, justify="right", no_wrap=True)
        shown.add_column("version")
        for met in view["met"]:
            shown.add_row(
                clean(met["name"] + (" (chain)" if met["chain"] else "")),
                met["node"][:ID_SHOWN],
                clean(where.get(met["node"], "")),
                f"{met['rtt_ms']:.1f} ms",
                _skew(met["skew_ms"]),
                clean(met["version"]),
            )
        out.print(shown)
    else:
        out.print("nobody else is joined; on another machine: coase join CODE", soft_wrap=True)
    known = {met["node"] for met in view["met"]}
    others = [row for row in view["heard"] if row["node"] not in known and row["why"]]
    if others:
        shown = table("heard, not joined", "machine", "id", "address")
        shown.add_column("why")
        for row in others:
            shown.add_row(
                clean(row["name"]),
                row["node"][:ID_SHOWN],
                clean(", ".join(row["addresses"])),
                clean(row["why"]),
            )
        out.print(shown)


def _skew(skew_ms: int) -> Text:
    text = f"{skew_ms / 1_000:+.1f} s"
    return Text(text, style="red" if abs(skew_ms) > SKEW_NOTED_MS else "")
