"""What was heard of sellers, kept beside the journal: a command that runs for seconds has it too.

It may be lost or thrown away at any time: it is only what can be heard again.
"""

from __future__ import annotations

import json
import logging
from typing import TYPE_CHECKING, Any, Final

from pydantic_core import from_json

from coase.protocol.errors import ConfigurationError

from .config import write_private

if TYPE_CHECKING:
    from pathlib import Path

    from coase.protocol.types import AgentId

log = logging.getLogger(__name__)

HEARSAY_FILE: Final = "heard.json"
SIZE_MAX_BYTES: Final = 1024 * 1024
SELLERS_MAX: Final = 2_000  # Of all agents of a node; what was heard longest ago goes first.
AGE_MAX_S: Final = 30 * 24 * 3600


class Hearsay:
    """A small file of (good, bad) by agent and seller, each as of some time of the chain."""

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._rows: dict[tuple[AgentId, AgentId], tuple[int, int, int]] = {}
        self._changed = False
        if path is not None:
            self._load(path)

    def of(self, agent: AgentId, *, now_s: int) -> dict[AgentId, tuple[int, int]]:
        """Return what an agent has heard, by seller, if it is not too old."""
        return {
            seller: (good, bad)
            for (who, seller), (good, bad, at_s) in self._rows.items()
            if who == agent and now_s - at_s <= AGE_MAX_S
        }

    def keep(self, agent: AgentId, seller: AgentId, *, good: int, bad: int, at_s: int) -> None:
        """Take note of what an agent heard of a seller now."""
        self._rows.pop((agent, seller), None)
        self._rows[agent, seller] = (good, bad, at_s)
        while len(self._rows) > SELLERS_MAX:
            del self._rows[next(iter(self._rows))]
        self._changed = True

    def save(self) -> None:
        """Write what has changed. A disk that refuses costs nothing but this."""
        if self._path is None or not self._changed:
            return
        self._changed = False
        rows = [[*key, *row] for key, row in self._rows.items()]
        try:
            write_private(self._path, json.dumps(rows) + "\n")
        except ConfigurationError as error:
            log.info("what was heard of sellers is not kept: %s", error)

    def _load(self, path: Path) -> None:
        try:
            if path.stat().st_size > SIZE_MAX_BYTES:
                return
            rows: Any = from_json(path.read_bytes())
            for agent, seller, good, bad, at_s in rows:
                numbers = (int(good), int(bad), int(at_s))
                if min(numbers) >= 0:
                    self._rows[str(agent), str(seller)] = numbers
        except FileNotFoundError:
            return
        except (OSError, ValueError, TypeError) as error:
            log.info("%s is left aside: %s", path, error)
