"""What ``coase doctor`` says of a local network, with what mends it."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any, Final

from coase.agents.card import LanStateFile
from coase.agents.config import load_network, state_home
from coase.agents.lan import OPEN_MESH
from coase.agents.neighbours import ask_view
from coase.protocol.backends.broker import EmbeddedBroker
from coase.protocol.backends.calls import Calls
from coase.protocol.backends.interfaces import local_addresses
from coase.protocol.errors import CoaseError, ConfigurationError, TransportUnavailable
from coase.protocol.joincode import JoinCode
from coase.protocol.messages import CLOCK_SKEW_MAX_MS

from .checkup import Finding

BROKER_DIRECTORY: Final = "broker"
DEFAULT_STATE: Final = "lan"
SKEW_NOTED_MS: Final = 2_000  # A clock that is set by the network is within a tenth of it.
# Somebody answered there, and showed no code of ours: no firewall is in the way.
FOREIGN: Final = (
    "is no node of this network",
    "is not the one that",
    "is no broker",
    "another machine (",
)
SETTLING_S: Final = 15  # Before that, silence says nothing yet.
EXPIRY_NOTED_S: Final = 24 * 3600
_OPEN_UDP: Final = (
    "let UDP 5353 in and out (ufw: sudo ufw allow 5353/udp; firewalld: sudo firewall-cmd"
    " --add-service=mdns), or name the other machine with --peer HOST:PORT"
)


def places() -> list[Path]:
    """Return the state directories in which a local network may be running, likeliest first."""
    found = []
    try:
        if state := load_network().state:
            found.append(Path(state))
    except ConfigurationError:
        pass
    return [*found, state_home() / DEFAULT_STATE]


async def view_of_this_machine() -> dict[str, Any]:
    """Return what the process that runs the network on this machine sees.

    It also answers while it still looks for the network.

    :raises ConfigurationError: if this machine is in none
    :raises TransportUnavailable: if the process does not run, or does not answer
    """
    for place in places():
        kept = LanStateFile(place).load()
        config = EmbeddedBroker.find(place / BROKER_DIRECTORY)
        if kept is None or config is None:
            continue
        mesh = JoinCode.parse(kept.code).net if kept.code else OPEN_MESH
        if config.net != mesh:
            continue  # It ran for this machine alone the last time.
        again = "up --lan" if kept.net else "join"
        try:
            calls = await Calls.connect(config)
        except TransportUnavailable as error:
            raise TransportUnavailable(
                f"the local network of {place} does not run here: coase {again}"
            ) from error
        try:
            return await ask_view(calls, mesh, kept.node)
        finally:
            await calls.close()
    raise ConfigurationError(
        "this machine is in no local network: coase up --lan begins one, coase join CODE joins one"
    )


async def examine_lan() -> list[Finding]:
    """Return how this machine's part in a local network is; nothing if it has none."""
    try:
        view = await view_of_this_machine()
    except ConfigurationError:
        return []
    except CoaseError as error:
        return [Finding("note", "lan", str(error))]
    return [*findings_of(view, now_s=int(time.time())), *_addresses(view)]


def _addresses(view: dict[str, Any]) -> list[Finding]:
    loopback = any(address.startswith(("127.", "::1")) for address in view["addresses"])
    here = local_addresses(loopback=loopback)
    if not here:
        text = "this machine has no network now: plug it in, or join a Wi-Fi; agents wait"
        return [Finding("bad", "lan address", text)]
    if not set(here) & set(view["addresses"]):
        text = f"it is {', '.join(here)} now; the others are being told"
        return [Finding("note", "lan address", text)]
    return []


def findings_of(view: dict[str, Any], *, now_s: int) -> list[Finding]:
    """Return what is to be said of a view."""
    met, settled = view["met"], view["running_s"] >= SETTLING_S
    found = [_joined(view)]
    if view["open"]:
        text = "open to everybody without a code: whoever reaches this machine reads and takes part"
        found.append(Finding("note", "lan", text))
    for trouble in filter(None, (view["clash"], view["full"])):
        found.append(Finding("bad", "lan", trouble))
    if not view["mdns"]["heard_self"] and settled:
        text = f"our own announcements do not come back, so nobody finds us: {_OPEN_UDP}"
        found.append(Finding("bad", "mdns", text))
    elif complaint := view["mdns"]["last_complaint"]:
        found.append(Finding("note", "mdns", complaint))
    if not view["chain"] and met and not any(machine["chain"] for machine in met):
        text = (
            "the machine that holds the chain is away: deals wait, and end by their deadlines;"
            " start coase up --lan there"
        )
        found.append(Finding("bad", "lan chain", text))
    for machine in met:
        found += _machine(view, machine)
    known = {machine["node"] for machine in met}
    for row in view["heard"]:
        if row["ours"] and row["announced"] and not row["joined"] and row["node"] not in known:
            found.append(_not_joined(view, row))
    found += [Finding("bad", "lan peer", f"{p}: {why}") for p, why in view["peers"].items() if why]
    ends_s = view["certificate_ends_s"]
    if ends_s and ends_s - now_s < EXPIRY_NOTED_S:
        text = "this machine's certificate ends within a day and was not renewed: is the clock set?"
        found.append(Finding("bad", "lan certificate", text))
    return found


def _joined(view: dict[str, Any]) -> Finding:
    count = len(view["met"])
    where = f"{', '.join(view['addresses'])} port {view['port']}"
    if count:
        names = ", ".join(machine["name"] or machine["node"][:8] for machine in view["met"])
        return Finding("ok", "lan", f"{view['mesh']} at {where}, joined with {names}")
    text = f"{view['mesh']} at {where}, joined with nobody yet"
    if view["running_s"] < SETTLING_S:
        return Finding("note", "lan", text)
    return Finding(
        "note",
        "lan",
        f"{text}: check that the others run, that all are on one network (a guest Wi-Fi keeps its"
        f" machines apart), and that firewalls let UDP 5353 and TCP {view['port']} through",
    )


def _machine(view: dict[str, Any], machine: dict[str, Any]) -> list[Finding]:
    name, found = machine["name"] or machine["node"][:8], []
    skew_ms = abs(machine["skew_ms"])
    if skew_ms > max(SKEW_NOTED_MS, machine["rtt_ms"]):
        bad = skew_ms > CLOCK_SKEW_MAX_MS
        text = (
            f"{name} and this machine are {skew_ms / 1_000:.1f} s apart"
            + (", and refuse each other's messages" if bad else "")
            + ": set the clock of whichever is wrong (timedatectl set-ntp true)"
        )
        found.append(Finding("bad" if bad else "note", "lan clock", text))
    if machine["version"] != view["version"]:
        text = f"{name} runs Coase {machine['version']}, this machine {view['version']}: update one"
        found.append(Finding("note", "lan version", text))
    return found


def _not_joined(view: dict[str, Any], row: dict[str, Any]) -> Finding:
    name = row["name"] or row["node"][:8]
    port = row["addresses"][0].rpartition(":")[2] if row["addresses"] else "its port"
    why = row["why"] or "not yet"
    if any(sign in why for sign in FOREIGN):
        # Whoever answers there and has no code of ours is nobody's fault here, or a forger.
        return Finding("note", "lan", f"{name} was heard and is not joined: {why}")
    return Finding(
        "bad" if view["running_s"] >= SETTLING_S else "note",
        "lan",
        f"{name} was heard and is not joined: {why}. One direction is enough:"
        f" let TCP {port} in on {name} (sudo ufw allow {port}/tcp), or TCP {view['port']} here;"
        " --lan-port keeps a port the same",
    )
