"""Who answers at an address: asked beside the loop, before a broker is sent there.

A broker knocks once a second at each of its routes and logs each refusal. So an address that
was merely heard is tried once by ourselves, with both certificates shown, and its refusal has a
reason that can be told.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from coase.protocol.backends.mesh_tls import prove_peer
from coase.protocol.errors import CoaseError, ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from anyio.abc import TaskGroup

    from coase.protocol.backends.mesh_tls import MeshFiles

AT_ONCE_MAX: Final = 16  # Half a mesh; a forger's addresses wait their turn.


class Proofs:
    """What is known of addresses. Those that are asked about no more are forgotten."""

    def __init__(self, files: MeshFiles | None, on_proof: Callable[[], None]) -> None:
        self._files, self._on_proof = files, on_proof
        self._nodes: dict[str, str] = {}
        self._troubles: dict[str, str] = {}
        self._asking: set[str] = set()

    @property
    def pending(self) -> bool:
        """Whether an answer is still awaited."""
        return bool(self._asking)

    def node_at(self, address: str) -> str:
        """Return the id of the machine that proved itself there, or nothing."""
        return self._nodes.get(address, "")

    def trouble_at(self, address: str) -> str:
        """Return why nobody proved himself there, or nothing. It is told once."""
        return self._troubles.pop(address, "")

    def look(self, addresses: Iterable[str], group: TaskGroup) -> None:
        """Ask at each address that is not known yet; an open mesh has nothing to ask."""
        wanted = set(addresses)
        for known in (self._nodes, self._troubles):
            for address in [a for a in known if a not in wanted]:
                del known[address]
        fresh = sorted(wanted - set(self._nodes) - set(self._troubles) - self._asking)
        for address in fresh[: AT_ONCE_MAX - len(self._asking)]:
            self._asking.add(address)
            group.start_soon(self._ask, address)

    async def _ask(self, address: str) -> None:
        try:
            if self._files is None:
                return
            host, _, port = address.rpartition(":")
            self._nodes[address] = await prove_peer(self._files, host.strip("[]"), int(port))
        except ConfigurationError as error:  # Our own files: renewed just now, perhaps.
            self._troubles[address] = str(error)
        except (CoaseError, OSError) as error:
            self._troubles[address] = str(error) or type(error).__name__
        finally:
            self._asking.discard(address)
            self._on_proof()
