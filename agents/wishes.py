"""What the owner of a node that runs wishes of its agents' registration, as files in its directory.

Only the owner can write there. A wish stays until the node has granted it, or said why not.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from pydantic_core import from_json

from .config import write_private
from .profile import Profile

if TYPE_CHECKING:
    from pathlib import Path

    from coase.protocol.types import AgentId

WISHES_DIRECTORY: Final = "identity"
WISH_SIZE_MAX_BYTES: Final = 64 * 1024
_FIELDS: Final = ("description", "image", "uri", "services")


@dataclass(frozen=True, slots=True)
class Wish:
    """That an agent of the node be registered as ``profile`` says."""

    id: str
    agent: AgentId
    profile: Profile

    def place(self, directory: Path) -> None:
        """Lay it where the node that holds ``directory`` looks for it. Safe to repeat.

        :raises ConfigurationError: if the disk refuses
        """
        told = {name: getattr(self.profile, name) for name in _FIELDS}
        told["services"] = dict(self.profile.services)
        row = {"id": self.id, "agent": self.agent, "profile": told}
        write_private(_path(directory, self.id, "wish"), json.dumps(row) + "\n")

    def take_back(self, directory: Path) -> bool:
        """Return whether it was still lying there, and is gone now."""
        try:
            _path(directory, self.id, "wish").unlink()
        except FileNotFoundError:
            return False
        return True

    def grant(self, directory: Path, *, why: str = "") -> None:
        """Say that it was done, or why it cannot be, and take it away.

        :raises ConfigurationError: if the disk refuses
        """
        write_private(_path(directory, self.id, "done"), json.dumps({"why": why}) + "\n")
        self.take_back(directory)

    def answer(self, directory: Path) -> str | None:
        """Return why it was refused, nothing if it was done, and None while it is neither."""
        path = _path(directory, self.id, "done")
        try:
            why = str(from_json(path.read_bytes())["why"])
        except (OSError, ValueError, LookupError, TypeError):
            return None
        path.unlink(missing_ok=True)
        return why


def wishes_in(directory: Path) -> list[Wish]:
    """Return the wishes that lie there; what is none is thrown away."""
    found = []
    for path in sorted((directory / WISHES_DIRECTORY).glob("*.wish.json")):
        try:
            row = from_json(path.read_bytes()[:WISH_SIZE_MAX_BYTES])
            told = {key: row["profile"][key] for key in _FIELDS}
            wish = Wish(path.name.partition(".")[0], str(row["agent"]), Profile(**told))
            if wish.id == row["id"]:
                found.append(wish)
                continue
        except OSError:
            continue
        except (ValueError, LookupError, TypeError):
            pass
        path.unlink(missing_ok=True)
    return found


def _path(directory: Path, wish_id: str, kind: str) -> Path:
    return directory / WISHES_DIRECTORY / f"{wish_id}.{kind}.json"
