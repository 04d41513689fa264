"""The compiled contracts that ship with the package: ABI and bytecode."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

from coase.protocol.errors import ConfigurationError


@dataclass(frozen=True, slots=True)
class Artifact:
    """One compiled contract."""

    name: str
    abi: tuple[dict[str, Any], ...]
    bytecode: bytes
    runtime: bytes
    holes: tuple[tuple[int, int], ...]
    """(start, length) of what the constructor fills in: its immutable values."""

    def same_code(self, code: bytes) -> bool:
        """Return whether ``code`` is this contract's, immutable values aside."""
        if len(code) != len(self.runtime):
            return False
        mine, theirs = bytearray(self.runtime), bytearray(code)
        for start, length in self.holes:
            mine[start : start + length] = theirs[start : start + length] = bytes(length)
        return mine == theirs


@cache
def artifact(name: str) -> Artifact:
    """Return the compiled contract ``name``.

    :raises ConfigurationError: if this installation lacks it
    """
    place = files("coase.escrow") / "contracts" / "artifacts" / f"{name}.json"
    try:
        content = json.loads(place.read_text())
    except FileNotFoundError as error:
        raise ConfigurationError(f"this installation lacks the contract {name}") from error
    holes = content.get("immutableReferences", {})
    return Artifact(
        name=name,
        abi=tuple(content["abi"]),
        bytecode=bytes.fromhex(content["bytecode"].removeprefix("0x")),
        runtime=bytes.fromhex(content["deployedBytecode"].removeprefix("0x")),
        holes=tuple((int(h["start"]), int(h["length"])) for spots in holes.values() for h in spots),
    )
