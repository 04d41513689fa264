"""Whether a JSON Schema can be read, told in microseconds.

The reader of the standard's own schema takes ten milliseconds for each; a program that hands over
all of its tools with every prompt would hold up everybody else's. What is looked at is what engines
read; what else stands in a schema is theirs to pass over.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import unquote

if TYPE_CHECKING:
    from collections.abc import Iterator

_TYPES: Final = frozenset("null boolean object array number string integer".split())
_INNER: Final = frozenset(
    "items additionalProperties propertyNames contains not if then else unevaluatedItems"
    " unevaluatedProperties".split()
)
_LISTED: Final = frozenset("anyOf oneOf allOf prefixItems".split())
_NAMED: Final = frozenset("properties patternProperties $defs definitions dependentSchemas".split())
_TEXTS: Final = frozenset("$ref $schema $id pattern format description title".split())
_NUMBERS: Final = frozenset("minimum maximum multipleOf".split())
_RANGES: Final = (
    ("minLength", "maxLength"),
    ("minItems", "maxItems"),
    ("minProperties", "maxProperties"),
    ("minContains", "maxContains"),
    ("minimum", "maximum"),
)
_COUNTS: Final = frozenset(name for pair in _RANGES[:-1] for name in pair)
# A repetition in a pattern; more digits than that nobody counts to, and reading them takes long.
_REPEATED: Final = re.compile(r"\{(\d{1,9})(?:,(\d{0,9}))?\}")


def fault_of(schema: Any, *, levels: int) -> str | None:
    """Return what is wrong with a schema, and where; None if it can be read.

    ``levels`` is how deep it may be.
    """
    return _fault(schema, schema, levels=levels, where="#")


def _fault(schema: Any, root: Any, *, levels: int, where: str) -> str | None:
    if isinstance(schema, bool):
        return None
    if not isinstance(schema, dict):
        return f"{where} is no object"
    if levels < 1:
        return "it is too many levels deep"
    for key, value in schema.items():
        fault = _own_fault(key, value)
        if fault is None and key == "$ref":
            fault = _lost(value, root)
        if fault is not None:
            return f"{where}/{key} {fault}"
        for name, inner in _inner(key, value):
            fault = _fault(inner, root, levels=levels - 1, where=f"{where}/{key}{name}")
            if fault is not None:
                return fault
    # Of all faults this one does most harm: there are engines that count from one to the other,
    # and fill the memory of their machine when they never come there.
    for least, most in _RANGES:
        if least in schema and most in schema and schema[least] > schema[most]:
            return f"{where}/{least} is over {most}"
    return None


def _own_fault(key: str, value: Any) -> str | None:
    if key == "type":
        types = value if isinstance(value, list) else [value]
        wrong = [kind for kind in types if not isinstance(kind, str) or kind not in _TYPES]
        if wrong or not types:
            return f"is no type: {str((wrong or ['none'])[0])[:50]!r}"
        return None
    if key == "required":
        texts = isinstance(value, list) and all(isinstance(name, str) for name in value)
        return None if texts else "is no list of names"
    if key in _LISTED or key == "enum":
        if not isinstance(value, list):
            return "is no list"
        return None if value or key == "prefixItems" else "is an empty list"
    if key in _NUMBERS:
        number = isinstance(value, int | float) and not isinstance(value, bool)
        return None if number else "is no number"
    if key in _COUNTS:
        count = isinstance(value, int) and not isinstance(value, bool) and value >= 0
        return None if count else "is no whole number from 0"
    if key in _NAMED:
        return None if isinstance(value, dict) else "is no object"
    if key in _TEXTS:
        if not isinstance(value, str):
            return "is no text"
        return _torn(value) if key == "pattern" else None
    return None


def _lost(reference: str, root: Any) -> str | None:
    """Return why what a reference names is not in the schema; None if it is, or it is by a name."""
    seen: set[str] = set()
    while reference not in seen:
        if not reference.startswith("#"):
            return "is elsewhere: nothing is fetched, so it must begin with #"
        if reference != "#" and not reference.startswith("#/"):
            return None  # By an anchor.
        seen.add(reference)
        found = root
        for step in reference.split("/")[1:]:
            found = _step(found, unquote(step).replace("~1", "/").replace("~0", "~"))
            if found is None:
                return f"names {reference[:50]!r}, which is not there"
        if not isinstance(found, dict) or not isinstance(found.get("$ref"), str):
            return None
        reference = found["$ref"]
    return "leads back to itself"


def _step(held: Any, name: str) -> Any:
    """Return what is under a name in an object, or at a number in a list; None if nothing is."""
    if isinstance(held, dict):
        return held.get(name)
    if isinstance(held, list) and name.isascii() and name.isdecimal() and len(name) < 6:
        return held[int(name)] if int(name) < len(held) else None
    return None


def _torn(pattern: str) -> str | None:
    """Return why a regular expression cannot be read, by what all dialects have in common."""
    groups, chars, at = 0, False, 0
    while at < len(pattern):
        letter = pattern[at]
        if letter == "\\":
            at += 1
            if at == len(pattern):
                return "ends in a backslash"
        elif chars:
            chars = letter != "]"
        elif letter == "[":
            chars = True
        elif letter in "()":
            groups += 1 if letter == "(" else -1
            if groups < 0:
                return "closes a group that it did not open"
        elif letter == "{" and (found := _REPEATED.match(pattern, at)) is not None:
            if found[2] and int(found[1]) > int(found[2]):
                return f"has {found[0]}, of which the first number is the larger one"
        at += 1
    if groups or chars:
        return f"does not close a {'set of letters' if chars else 'group'}"
    return None


def _inner(key: str, value: Any) -> Iterator[tuple[str, Any]]:
    if key in _NAMED:
        yield from ((f"/{name[:50]}", inner) for name, inner in value.items())
    elif key in _LISTED:
        yield from ((f"/{at}", inner) for at, inner in enumerate(value))
    elif key == "items" and isinstance(value, list):  # As it was until 2019.
        yield from ((f"/{at}", inner) for at, inner in enumerate(value))
    elif key in _INNER:
        yield "", value
