"""Whether a JSON Schema can be read, told in microseconds.

The reader of the standard's own schema takes ten milliseconds for each; a program that hands over
all of its tools with every prompt would hold up everybody else's. What is looked at is what engines
read; what else stands in a schema is theirs to pass over.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

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


def fault_of(schema: Any, *, levels: int, where: str = "#") -> str | None:
    """Return what is wrong with a schema, and where; None if it can be read.

    ``levels`` is how deep it may be.
    """
    if isinstance(schema, bool):
        return None
    if not isinstance(schema, dict):
        return f"{where} is no object"
    if levels < 1:
        return "it is too many levels deep"
    for key, value in schema.items():
        fault = _own_fault(key, value)
        if fault is not None:
            return f"{where}/{key} {fault}"
        for name, inner in _inner(key, value):
            fault = fault_of(inner, levels=levels - 1, where=f"{where}/{key}{name}")
            if fault is not None:
                return fault
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
        return None if isinstance(value, list) else "is no list"
    if key in _NAMED:
        return None if isinstance(value, dict) else "is no object"
    if key in _TEXTS:
        return None if isinstance(value, str) else "is no text"
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
