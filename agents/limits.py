"""The budgets of one node: what its programs declare, and what its owner says over them.

The owner's word lies in a file of the node's directory and is read again before every purchase. All
agents of a node share the limits of its swarm; an agent under another shares that one's as well, so
that however deep work is handed on, no more is signed away than the top allows.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, Final

from coase.escrow.book import SpendEnvelope
from coase.protocol.errors import ConfigurationError

from .config import write_private
from .purse import Budget, Purse

if TYPE_CHECKING:
    from pathlib import Path

    from coase.protocol.types import Asset

BUDGETS_FILE: Final = "budget.json"
DECLARED_FILE: Final = "declared.json"
SIZE_MAX_BYTES: Final = 4 * 1024 * 1024
SWARM: Final = "swarm"
LIMITS: Final = tuple(field.name for field in fields(Budget))
"""The kinds of limits: total, per_deal and so on."""


@dataclass(frozen=True, slots=True)
class Overrides:
    """What the owner says: by agent, which limits take the place of the declared ones."""

    swarm: dict[str, str | None] = field(default_factory=dict)
    agents: dict[str, dict[str, str | None]] = field(default_factory=dict)

    def over(self, declared: Budget, name: str | None) -> Budget:
        """Return the budget that counts for an agent, or for the swarm if ``name`` is None."""
        said = self.swarm if name is None else self.agents.get(name, {})
        return Budget(**{limit: said.get(limit, getattr(declared, limit)) for limit in LIMITS})

    def changed(self, name: str | None, change: dict[str, str | None], drop: set[str]) -> Overrides:
        """Return these with ``change`` for one of them, and without its limits in ``drop``."""
        said = dict(self.swarm if name is None else self.agents.get(name, {})) | change
        said = {limit: value for limit, value in said.items() if limit not in drop}
        if name is None:
            return Overrides(said, self.agents)
        agents = {other: limits for other, limits in self.agents.items() if other != name}
        return Overrides(self.swarm, agents | ({name: said} if said else {}))


@dataclass(frozen=True, slots=True)
class Declared:
    """What a program says of one of its agents."""

    name: str
    budget: Budget
    under: str = ""


class Budgets:
    """The purses of a node's agents, kept to what program and owner say."""

    def __init__(
        self, asset: Asset, *, swarm: Budget | str | None = None, directory: Path | None = None
    ) -> None:
        self.asset, self.directory = asset, directory
        self._swarm = Budget.of(swarm)
        self._stamp: tuple[int, int] | None = None
        self._said = Overrides()
        self._declared: dict[str, Declared] = {}
        self.purses: dict[str, Purse] = {}
        self._all: list[tuple[Declared, Purse]] = []
        self._damage = ""
        self._read()
        limits = self._said.over(self._swarm, None).limits(asset)
        self.swarm = SpendEnvelope(asset, limits, name=SWARM)

    def open(self, name: str, declared: Budget, *, under: str = "") -> Purse:
        """Return the purse of an agent, whose limits are its own, its superior's and the swarm's.

        :raises ConfigurationError: if it is under an agent that is not here, or the owner's file
            cannot be read
        """
        self.refresh()
        if under and under not in self.purses:
            raise ConfigurationError(
                f"{name} is under {under!r}, which is not in this node: add that one first"
            )
        parent = self.purses[under].envelope if under else self.swarm
        budget = self._said.over(declared, name)
        purse = self.purses[name] = Purse(budget, self.asset, name=name, parent=parent)
        told = self._declared[name] = Declared(name, declared, under)
        self._all.append((told, purse))
        return purse

    def refresh(self) -> None:
        """Take note of what the owner has changed.

        :raises ConfigurationError: if the owner's file cannot be read: until it can, nothing is
            bought, since nobody knows the limits
        """
        if not self._read():
            return
        self.swarm.change(self._said.over(self._swarm, None).limits(self.asset))
        for told, purse in self._all:
            purse.change(self._said.over(told.budget, told.name))

    def _read(self) -> bool:
        """Read the owner's file if it is another than before; return whether it is.

        :raises ConfigurationError: if it is damaged
        """
        if self.directory is None:
            return False
        path = self.directory / BUDGETS_FILE
        try:
            found = path.stat()
            stamp: tuple[int, int] | None = (found.st_mtime_ns, found.st_ino)
        except FileNotFoundError:
            stamp = None
        except OSError as error:
            raise ConfigurationError(
                f"{self.directory / BUDGETS_FILE}: {error.strerror}"
            ) from error
        if stamp == self._stamp and not self._damage:
            return False
        try:
            said = read_overrides(self.directory)
            for name in (None, *said.agents):
                said.over(Budget(), name).limits(self.asset)  # Each has to be an amount.
        except ConfigurationError as error:
            self._damage = str(error)
            raise
        self._said, self._stamp, self._damage = said, stamp, ""
        return True

    def state(self) -> tuple[Budget, dict[str, Budget]]:
        """Return the budgets that count now: the swarm's, and each agent's by its name."""
        agents = {name: self._said.over(t.budget, name) for name, t in self._declared.items()}
        return self._said.over(self._swarm, None), agents

    def tell(self) -> None:
        """Write down what the programs declare, for whoever looks from outside.

        Agents that ran here before stay in the list: they have keys and money still.

        :raises ConfigurationError: if the disk refuses
        """
        if self.directory is None:
            return
        path = self.directory / DECLARED_FILE
        try:
            before = _load(path) or {}
        except ConfigurationError:
            before = {}  # It is only for looking at, and written anew.
        known = before.get("agents")
        rows = {
            name: {"under": told.under, "budget": _limits_of(told.budget)}
            for name, told in self._declared.items()
        }
        rows = (known if isinstance(known, dict) else {}) | rows
        told_now = {SWARM: _limits_of(self._swarm), "agents": rows}
        if told_now != before:
            write_private(path, json.dumps(told_now, indent=1) + "\n")


def _limits_of(budget: Budget) -> dict[str, str | None]:
    return {limit: getattr(budget, limit) for limit in LIMITS}


def read_overrides(directory: Path) -> Overrides:
    """Return what the owner of the node in ``directory`` says of its budgets.

    :raises ConfigurationError: if the file is damaged; says what to do
    """
    path = directory / BUDGETS_FILE
    row = _load(path)
    if row is None:
        return Overrides()
    try:
        if not set(row) <= {SWARM, "agents"} or not isinstance(row.get("agents", {}), dict):
            raise ValueError("it has other parts than swarm and agents")
        agents = {name: _limits(said) for name, said in row.get("agents", {}).items()}
        return Overrides(_limits(row.get(SWARM, {})), agents)
    except (ValueError, ConfigurationError) as error:
        raise ConfigurationError(
            f"{path} is no file of budgets ({error}); nothing is bought until it is mended with"
            " coase budget, or removed"
        ) from error


def write_overrides(directory: Path, said: Overrides) -> None:
    """Say so in the name of the owner. A node that runs takes note before its next purchase.

    :raises ConfigurationError: if the disk refuses
    """
    row = {SWARM: said.swarm, "agents": said.agents}
    write_private(directory / BUDGETS_FILE, json.dumps(row, indent=1) + "\n")


def read_declared(directory: Path) -> tuple[Budget, list[Declared]]:
    """Return what the programs of a node declared when they last ran: swarm and agents.

    :raises ConfigurationError: if that cannot be read
    """
    path = directory / DECLARED_FILE
    row = _load(path)
    if row is None:
        return Budget(), []
    try:
        agents = [
            Declared(name, Budget(**_limits(told["budget"])), str(told["under"]))
            for name, told in row["agents"].items()
        ]
        return Budget(**_limits(row[SWARM])), agents
    except (KeyError, TypeError, ValueError, AttributeError, ConfigurationError) as error:
        raise ConfigurationError(
            f"{path} is damaged ({error}): remove it, and the node writes it anew"
        ) from error


def _load(path: Path) -> dict[str, Any] | None:
    try:
        if path.stat().st_size > SIZE_MAX_BYTES:
            raise ConfigurationError(f"{path} is too large")
        row = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ConfigurationError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise ConfigurationError(f"{path} is no JSON: mend it, or remove it") from error
    if not isinstance(row, dict):
        raise ConfigurationError(f"{path} is no JSON object: mend it, or remove it")
    return row


def _limits(row: object) -> dict[str, str | None]:
    if not isinstance(row, dict) or not set(row) <= set(LIMITS):
        raise ValueError(f"a budget has {', '.join(LIMITS)}")
    Budget(**row)  # Raises if an amount is none.
    return dict(row)
