"""What the commands that open this machine to its local network have in common."""

from __future__ import annotations

import io
import secrets
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from coase.protocol.errors import ConfigurationError

from .app import err, say

if TYPE_CHECKING:
    from coase.agents.card import LanState
    from coase.agents.config import Network
    from coase.agents.lan import Lan
    from coase.protocol.backends.broker import EmbeddedBroker
    from coase.protocol.identity import Identity
    from coase.protocol.joincode import JoinCode

LanPort = Annotated[
    int, typer.Option(min=0, max=65535, help="Port for other machines; 0 takes a free one.")
]
Interfaces = Annotated[
    list[str] | None,
    typer.Option(help="Address of this machine to use, again for more; all without."),
]
Peers = Annotated[
    list[str] | None,
    typer.Option(help="HOST:PORT of a machine to join where mDNS does not reach, again for more."),
]
OPEN_WARNING = (
    "open to everybody: whoever reaches this machine reads every request, takes part, and can give"
    " newcomers another chain; use it on a network where you know every machine"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class LanWish:
    """What the user said about the local network."""

    lan: bool
    new_code: bool = False
    open: bool = False
    port: int = 0
    interfaces: tuple[str, ...] = ()
    peers: tuple[str, ...] = ()

    def require_sense(self) -> None:
        """Return if the options fit together; else end the command."""
        from .app import raise_user

        more = {
            "--new-code": self.new_code,
            "--open": self.open,
            "--lan-port": self.port,
            "--interface": self.interfaces,
            "--peer": self.peers,
        }
        for name, given in more.items():
            if given and not self.lan:
                raise_user(f"{name} belongs to --lan: coase up --lan {name} …")
        if self.open and self.new_code:
            raise_user("--open knows no code, so there is none to make anew")
        for peer in self.peers:
            host, _, port = peer.rpartition(":")
            if not host or not port.isascii() or not port.isdigit() or not 0 < int(port) < 65536:
                raise_user(f"--peer {peer}: write HOST:PORT, such as 192.168.1.5:4248")

    def host(self, path: Path, net: str, nats_port: int) -> Hosted:
        """Return what a machine with the chain runs for the others.

        :raises ConfigurationError: if the state belongs to a network of another machine
        """
        from coase.agents.card import LanState, LanStateFile
        from coase.protocol.joincode import JoinCode

        file = LanStateFile(path)
        kept = file.load() or LanState()
        if kept.card:
            raise ConfigurationError(
                f"{path} joined the network of another machine: return to it with coase join"
                f" --state {path}, or choose another directory with --state"
            )
        if not self.lan:
            return Hosted(net or kept.net or "local")
        code = None
        if not self.open:
            fresh = self.new_code or not kept.code
            code = JoinCode.of(secrets.token_bytes(16)) if fresh else JoinCode.parse(kept.code)
        named = net or kept.net or (code.net if code else f"lan-{secrets.token_hex(6)}")
        lan = self.open_lan(path, kept, code, nats_port, chain=True)
        kept = kept.model_copy(update={"code": code.text if code else "", "net": named})
        file.save(kept)
        return Hosted(named, lan, path, kept)

    def open_lan(
        self, path: Path, kept: LanState, code: JoinCode | None, nats_port: int, *, chain: bool
    ) -> Lan:
        """Return this machine's part of the network, not started yet."""
        from coase.agents.lan import Lan, LanOptions

        from .up_command import is_free

        port = self.port or kept.port
        if not self.port and kept.port and not is_free(kept.port, "0.0.0.0"):  # noqa: S104
            say(f"port {kept.port} is taken: other machines find this one at another")
            port = 0
        if code is None:
            say(OPEN_WARNING, style="bold yellow")
        options = LanOptions(
            code=code,
            node=kept.node,
            port=port,
            nats_port=nats_port,
            interfaces=self.interfaces,
            peers=self.peers,
            chain=chain,
        )
        return Lan(path, options)


@dataclass(slots=True)
class Hosted:
    """A market that this machine runs, for itself or for a local network as well."""

    net: str
    lan: Lan | None = None
    path: Path = field(default_factory=Path)
    kept: LanState | None = None

    @property
    def broker(self) -> EmbeddedBroker | None:
        """The broker that is joined with others, or None for one of this machine alone."""
        return self.lan.broker if self.lan else None

    @asynccontextmanager
    async def running(self, network: Network, seed: Identity) -> AsyncIterator[None]:
        """Let other machines in for the length of the block."""
        if self.lan is None or self.kept is None:
            yield
            return
        import anyio

        from coase.agents.bridge import ChainDesk
        from coase.agents.card import Card, LanStateFile
        from coase.agents.lan import version
        from coase.agents.member import watch_clash
        from coase.agents.supervisor import supervise

        key = seed.derive("chain")
        card = Card.of(network, node=self.lan.node, key=key.address, version=version())
        sealed = card.sealed(key)
        async with self.lan.running(card=lambda: sealed), anyio.create_task_group() as group:
            kept = self.kept.model_copy(update={"port": self.lan.broker.route_port})
            LanStateFile(self.path).save(kept)
            desk = ChainDesk(self.lan.calls, network.net, network.rpc, identity=key)
            group.start_soon(supervise, "chain desk", desk.run)
            group.start_soon(watch_clash, self.lan, say)
            try:
                yield
            finally:
                group.cancel_scope.cancel()

    def ready_line(self) -> dict[str, object]:
        """Return what is added to the line of ``coase up``: no code."""
        if self.lan is None:
            return {}
        return {"lan": lan_line(self.lan)}

    def say_code(self) -> None:
        """Show a person the join code, if there is one."""
        if self.kept is not None and self.kept.code:
            show_code(self.kept.code)


def lan_line(lan: Lan) -> dict[str, object]:
    """Return where a machine is reached."""
    return {
        "node": lan.node,
        "mesh": lan.mesh,
        "addresses": list(lan.addresses),
        "port": lan.broker.route_port,
    }


def show_code(code: str) -> None:
    """Show a join code, and as a picture where the terminal can show one."""
    if err.is_terminal and (picture := picture_of(code)):
        err.print(picture, highlight=False, markup=False, soft_wrap=True)
    err.print(f"on another machine: [b]coase join {code}[/b]", highlight=False, soft_wrap=True)
    say("whoever has this code is in; coase up --lan --new-code ends it")


def picture_of(code: str) -> str:
    """Return the code as a QR picture made of letters; it holds nothing else."""
    import segno

    drawn = io.StringIO()
    segno.make(code.replace("-", ""), error="m", micro=False).terminal(
        drawn, border=2, compact=True
    )
    return drawn.getvalue().rstrip("\n")
