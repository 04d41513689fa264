"""What the tables of SPEC.md must say, read out of the code."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Final, get_args

from pydantic import StringConstraints, TypeAdapter

from coase.agents import admission, desk, heard, outbox, pieces
from coase.protocol import messages, subjects, types
from coase.protocol.messages import BODIES, NackReason, Piece, TermsBody, WorkBody
from coase.protocol.states import DEAL, SILENCE, STREAM_SILENCE, THREAD

SPEC: Final = Path(messages.__file__).resolve().parent / "SPEC.md"
MODELS: Final = {
    "header": messages.Header,
    **BODIES,
    "piece": Piece,
    "terms": TermsBody,
    "work": WorkBody,
}
TYPES: Final[dict[str, Any]] = {
    "address": types.AddressText,
    "bytes32": types.Bytes32Text,
    "signature": types.SignatureText,
    "id": types.IdText,
    "units": types.UnitsText,
    "net": types.NetText,
    "capability": types.CapabilityText,
    "key": messages.KeyText,
    "id or nothing": Annotated[str, StringConstraints(pattern=r"^([0-9a-f]{32})?$")],
    "kind": Annotated[str, StringConstraints(pattern=r"^[a-z]{1,16}$")],
    "uint40": messages.Count,
    "uint53": messages.Millis,
}
LIMITS: Final = (
    (heard, ("SEEN_MAX", "ANSWERS_MAX")),
    (desk, ("ACK_DELAY_MS", "THREADS_MAX")),
    (outbox, ("RENEW_BEFORE_EXPIRY_MS",)),
    (pieces, ("PARTIAL_MAX", "PARTIAL_AGE_MAX_MS")),
    (admission, ("STRANGERS_PER_S", "STRANGERS_BURST", "ADDRESS_PER_S", "ADDRESS_BURST")),
    (subjects, ("LEVELS",)),
    (types, ("UNITS_MAX",)),
)


def limits() -> dict[str, str]:
    """Return every limit and its value."""
    found: dict[str, str] = {}
    every = [(messages, name) for name in vars(messages) if _is_limit(name)]
    every += [(module, name) for module, names in LIMITS for name in names]
    for module, name in every:
        value = getattr(module, name)
        if isinstance(value, tuple):
            found[name] = ", ".join(str(item) for item in value)
        elif value == types.UNITS_MAX:
            found[name] = "2**128 - 1"
        else:
            found[name] = f"{value:,}".replace(",", " ")
    return found


def _is_limit(name: str) -> bool:
    return not name.startswith("_") and name.endswith(("_MAX", "_BYTES", "_MS", "_S", "_CHARS"))


def _known() -> dict[str, str]:
    return {_key(TypeAdapter(kind).json_schema()): name for name, kind in TYPES.items()}


def _key(schema: dict[str, Any]) -> str:
    kept = {k: v for k, v in schema.items() if k not in ("title", "description", "default")}
    return json.dumps(kept, sort_keys=True)


def spell(schema: dict[str, Any]) -> str:
    """Return a JSON schema in the words of the specification."""
    known = _known().get(_key(schema))
    if known is not None:
        return known
    if "$ref" in schema:
        return {"TermsBody": "terms", "WorkBody": "work"}[schema["$ref"].rsplit("/", 1)[1]]
    if "enum" in schema:
        return "one of " + ", ".join(
            f"`{value}`" if value else "nothing" for value in schema["enum"]
        )
    match schema.get("type"):
        case "array":
            low, high = schema.get("minItems", 0), schema["maxItems"]
            return f"list of {low} to {high}: {spell(schema['items'])}"
        case "object":
            of = spell(schema["additionalProperties"])
            name = schema["propertyNames"]["maxLength"]
            return f"map of up to {schema['maxProperties']}: text up to {name} to {of}"
        case "integer":
            return f"integer {schema['minimum']} to {schema['maximum']}"
        case "string":
            if "pattern" in schema:
                return f"text `{schema['pattern']}`".replace("|", "\\|")
            return f"text up to {schema['maxLength']}" if "maxLength" in schema else "text"
    raise AssertionError(schema)


def fields(kind: str) -> dict[str, str]:
    """Return every field of a model and how the specification spells its type."""
    schema = MODELS[kind].model_json_schema()
    return {name: spell(field) for name, field in schema["properties"].items()}


def type_rows() -> dict[str, str]:
    """Return the named types and what they must match."""
    found = {}
    for name, kind in TYPES.items():
        schema = TypeAdapter(kind).json_schema()
        if "pattern" in schema:
            found[name] = f"text `{schema['pattern']}`".replace("|", "\\|")
        else:
            found[name] = f"integer from {schema['minimum']} below {schema['exclusiveMaximum']}"
    return found


def moves() -> set[tuple[str, str, str, str]]:
    """Return every row of the tables of states."""
    rows = {**THREAD, **DEAL["escrow"]}
    return {(str(s), str(role), move, str(after)) for (s, role, move), after in rows.items()}


def stream_moves() -> set[tuple[str, str, str, str]]:
    """Return every row of the deals that have no escrow."""
    assert DEAL["channel"] == DEAL["none"]
    return {(str(s), str(r), move, str(after)) for (s, r, move), after in DEAL["channel"].items()}


def silences() -> set[tuple[str, str, str, str, str]]:
    """Return the table of silence."""
    return {(str(s), row.who, row.by, row.outcome, row.call) for s, row in SILENCE.items()}


def stream_silences() -> set[tuple[str, str, str, str, str]]:
    """Return the table of silence of the deals that have no escrow."""
    return {(str(s), row.who, row.by, row.outcome, row.call) for s, row in STREAM_SILENCE.items()}


def reasons() -> set[str]:
    """Return all reasons of a NACK."""
    return set(get_args(NackReason))


# ---- the page --------------------------------------------------------------------------------


def tables() -> dict[str, list[list[str]]]:
    """Return the rows of each table on the page, by the heading or bold name before it."""
    found: dict[str, list[list[str]]] = {}
    title = ""
    for line in SPEC.read_text(encoding="utf-8").splitlines():
        if line.startswith("#"):
            title = line.lstrip("# ").strip()
        elif line.startswith("|"):
            cells = [cell.replace("\0", "\\|").strip() for cell in _cells(line)]
            if not set("".join(cells)) <= set("-: "):
                found.setdefault(title, []).append(cells)
    return {name: rows[1:] for name, rows in found.items()}


def _cells(line: str) -> list[str]:
    return line.strip().strip("|").replace("\\|", "\0").split("|")
