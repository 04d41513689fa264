"""Calls, errors and events by their names, out of a compiled contract's ABI."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, Final

from eth_abi.abi import decode as abi_decode
from eth_abi.abi import encode as abi_encode
from eth_abi.exceptions import DecodingError

from coase.protocol.errors import CallReverted
from coase.protocol.identity import keccak256

from .artifacts import artifact

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

_STANDARD_ERRORS: Final = ("Error(string)", "Panic(uint256)")


def _type_of(item: dict[str, Any]) -> str:
    kind = str(item["type"])
    if not kind.startswith("tuple"):
        return kind
    return f"({','.join(_type_of(part) for part in item['components'])}){kind[5:]}"


@dataclass(frozen=True, slots=True)
class Function:
    """One function: encodes its arguments, decodes its result."""

    selector: bytes
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]

    def encode(self, *values: object) -> bytes:
        """Return the calldata."""
        return self.selector + abi_encode(self.inputs, values)

    def decode_input(self, data: bytes) -> tuple[Any, ...]:
        """Return the arguments that are in ``data``, which starts with the selector."""
        return tuple(abi_decode(self.inputs, data[4:]))

    def decode(self, data: bytes) -> tuple[Any, ...]:
        """Return the results that are in ``data``."""
        return tuple(abi_decode(self.outputs, data))


@dataclass(frozen=True, slots=True)
class Event:
    """One event: decodes its indexed and its other fields, by name."""

    name: str
    topic: bytes
    indexed: tuple[tuple[str, str], ...]
    plain: tuple[tuple[str, str], ...]

    def decode(self, topics: Sequence[bytes], data: bytes) -> dict[str, Any]:
        """Return the fields of a log whose first topic is this event's."""
        fields: dict[str, Any] = {}
        for (name, kind), topic in zip(self.indexed, topics[1:], strict=True):
            # Of what has no fixed size only the hash is in a topic.
            hashed = kind in ("string", "bytes") or kind[0] == "(" or kind[-1] == "]"
            fields[name] = topic if hashed else abi_decode([kind], topic)[0]
        values = abi_decode([kind for _, kind in self.plain], data)
        fields.update(zip((name for name, _ in self.plain), values, strict=True))
        return fields


class Abi:
    """What one contract understands and says."""

    def __init__(self, items: Iterable[dict[str, Any]]) -> None:
        self.functions: dict[str, Function] = {}
        self.events: dict[bytes, Event] = {}
        self.errors: dict[bytes, tuple[str, tuple[str, ...]]] = {}
        for signature in _STANDARD_ERRORS:
            name, _, types = signature.rstrip(")").partition("(")
            self.errors[keccak256(signature.encode())[:4]] = (name, (types,))
        for item in items:
            self._add(item)

    def _add(self, item: dict[str, Any]) -> None:
        inputs = tuple(_type_of(part) for part in item.get("inputs", ()))
        signature = f"{item.get('name')}({','.join(inputs)})"
        digest = keccak256(signature.encode())
        if item["type"] == "function":
            outputs = tuple(_type_of(part) for part in item["outputs"])
            function = Function(digest[:4], inputs, outputs)
            # By its name, and where that is overloaded by its signature.
            self.functions.setdefault(item["name"], function)
            self.functions[signature] = function
        elif item["type"] == "error":
            self.errors[digest[:4]] = (item["name"], inputs)
        elif item["type"] == "event":
            fields = [(part["name"], _type_of(part), part["indexed"]) for part in item["inputs"]]
            self.events[digest] = Event(
                name=item["name"],
                topic=digest,
                indexed=tuple((name, kind) for name, kind, indexed in fields if indexed),
                plain=tuple((name, kind) for name, kind, indexed in fields if not indexed),
            )

    def encode(self, name: str, *values: object) -> bytes:
        """Return the calldata of a call of ``name``."""
        return self.functions[name].encode(*values)

    def topic(self, name: str) -> bytes:
        """Return the first topic of the event ``name``."""
        return next(topic for topic, event in self.events.items() if event.name == name)

    def reverted(self, data: bytes) -> CallReverted:
        """Return what a call's revert data says, by the names of this ABI."""
        if not data:
            return CallReverted("NoReason")
        known = self.errors.get(data[:4])
        if known is not None:
            name, types = known
            try:
                return CallReverted(name, *abi_decode(types, data[4:]))
            except DecodingError:
                return CallReverted(name)
        return CallReverted("UnknownError", "0x" + data.hex())


@cache
def escrow_abi() -> Abi:
    """Return the escrow's ABI, with the errors that a token or a vault may raise through it."""
    errors = [*_errors("CoaseToken"), *_errors("StakeVault")]
    return Abi([*errors, *artifact("JobEscrow").abi])


@cache
def vault_abi() -> Abi:
    """Return the ABI of a vault of stakes, with the errors that its token may raise through it."""
    return Abi([*_errors("CoaseToken"), *artifact("StakeVault").abi])


@cache
def panel_abi() -> Abi:
    """Return the ABI of a panel of arbiters, with the errors that pass through it."""
    errors = [*_errors("CoaseToken"), *_errors("JobEscrow")]
    return Abi([*errors, *artifact("ArbiterPanel").abi])


@cache
def panels_abi() -> Abi:
    """Return the ABI of the factory of panels."""
    return Abi(artifact("PanelFactory").abi)


def _errors(name: str) -> list[dict[str, Any]]:
    return [item for item in artifact(name).abi if item["type"] == "error"]


@cache
def token_abi() -> Abi:
    """Return the token's ABI, with what other tokens have beside it."""
    version = {"type": "function", "name": "version", "inputs": [], "outputs": [{"type": "string"}]}
    return Abi([*artifact("CoaseToken").abi, version])


@cache
def factory_abi() -> Abi:
    """Return the factory's ABI."""
    return Abi(artifact("EscrowFactory").abi)
