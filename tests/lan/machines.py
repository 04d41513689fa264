"""Machines on one network segment: namespaces of this machine, each with its own interface."""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import subprocess
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import pytest

from tests.tools.commands import Home

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

_NUMBERS = itertools.count()


def ip(*arguments: str, inside: str = "") -> subprocess.CompletedProcess[str]:
    """Run ``ip``, in a namespace if one is named."""
    where = ("-n", inside) if inside else ()
    return subprocess.run(["ip", *where, *arguments], capture_output=True, text=True, check=True)


def require_namespaces() -> None:
    """Skip the test where namespaces cannot be made, and say what it takes."""
    if shutil.which("ip") is None:
        pytest.skip("the program ip is missing, which makes network namespaces: iproute2 has it")
    name = f"coase-try-{os.getpid()}"
    try:
        ip("netns", "add", name)
        ip("link", "add", "try", "type", "bridge", inside=name)
        ip("link", "add", "one", "type", "veth", "peer", "name", "two", inside=name)
        ip("netns", "exec", name, "true")
    except subprocess.CalledProcessError as error:
        pytest.skip(
            f"network namespaces cannot be made here ({error.stderr.strip()}): run as root, in a"
            " container with CAP_SYS_ADMIN and CAP_NET_ADMIN (--privileged)"
        )
    finally:
        subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)


@dataclass
class Segment:
    """A switch, and the machines that are plugged into it."""

    place: Path
    name: str = ""
    machines: list[Home] = field(default_factory=list)

    def add(self, *, ipv4: bool = True, ipv6: bool = True) -> Home:
        """Plug in another machine and return what runs commands on it."""
        number = len(self.machines) + 1
        inside, port = f"{self.name}-{number}", f"p{number}"
        ip("netns", "add", inside)
        ip("link", "set", "lo", "up", inside=inside)
        ip("link", "add", port, "type", "veth", "peer", "name", "eth0", "netns", inside,
           inside=self.name)  # fmt: skip
        ip("link", "set", port, "master", "switch", "up", inside=self.name)
        ip("link", "set", "eth0", "up", inside=inside)
        if ipv4:
            ip("address", "add", f"10.77.0.{number}/24", "dev", "eth0", inside=inside)
        if ipv6:
            ip("address", "add", f"fd77::{number}/64", "dev", "eth0", "nodad", inside=inside)
        home = Home(self.place / f"machine-{number}", before=("ip", "netns", "exec", inside))
        home.path.mkdir()
        self.machines.append(home)
        return home

    def unplug(self, home: Home) -> None:
        """Pull a machine's cable out of the switch."""
        ip("link", "set", self._port(home), "down", inside=self.name)

    def plug(self, home: Home) -> None:
        """Put it in again."""
        ip("link", "set", self._port(home), "up", inside=self.name)

    def readdress(self, home: Home, address: str) -> None:
        """Give a machine another IPv4 address, as DHCP may."""
        ip("-4", "address", "flush", "dev", "eth0", inside=home.before[-1])
        ip("address", "add", f"{address}/24", "dev", "eth0", inside=home.before[-1])

    def _port(self, home: Home) -> str:
        return f"p{self.machines.index(home) + 1}"


@contextlib.contextmanager
def segment(place: Path) -> Iterator[Segment]:
    """Yield an empty segment; all of its namespaces are gone afterwards."""
    require_namespaces()
    made = Segment(place, f"coase{os.getpid()}-{next(_NUMBERS)}")
    ip("netns", "add", made.name)
    try:
        ip("link", "add", "switch", "type", "bridge", "mcast_snooping", "0", inside=made.name)
        ip("link", "set", "switch", "up", inside=made.name)
        yield made
    finally:
        for inside in (*(home.before[-1] for home in made.machines), made.name):
            subprocess.run(["ip", "netns", "del", inside], capture_output=True, check=False)
