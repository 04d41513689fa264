"""What sellers say of a capability, held against its id: anybody may answer with anything."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from coase.protocol.errors import ConfigurationError, DealFailed
from coase.protocol.messages import capability_id, schemas_hash

from .compute.ports import read_json
from .dispute import ARBITRATION
from .wares import FIXED

if TYPE_CHECKING:
    from collections.abc import Sequence

    from coase.protocol.messages import Description
    from coase.protocol.types import AgentId

    from .agent import Agent
    from .node import Node


@dataclass(frozen=True, slots=True)
class Form:
    """One pair of schemas that sellers describe a capability by."""

    capability: str
    """The whole id."""
    schemas: tuple[dict[str, Any], dict[str, Any]]

    @property
    def name(self) -> str:
        """The id without the hash of the schemas."""
        return self.capability.rpartition("-")[0]


def known_forms(
    found: Sequence[tuple[AgentId, Description]], capability: str
) -> tuple[list[Form], int]:
    """Return the forms of a capability, the one with most sellers first, and how many answers lie.

    Anybody may answer with anything: an answer counts only if its schemas hash to the id that it
    claims. That id holds four bytes of the hash, which can be ground to match, so that of forms
    with one id the one with more sellers counts.
    """
    sellers: Counter[str] = Counter()
    forms: dict[str, Form] = {}
    ignored = 0
    for _, description in found:
        form = form_of(description)
        if form is None or capability not in (form.capability, form.name):
            ignored += 1
            continue
        key = f"{form.capability} {schemas_hash(*form.schemas).hex()}"
        forms.setdefault(key, form)
        sellers[key] += 1
    best: dict[str, Form] = {}
    for key, count in sorted(sellers.items(), key=lambda item: (-item[1], item[0])):
        form = forms[key]
        if best.setdefault(form.capability, form) is not form:
            ignored += count
    return list(best.values()), ignored


async def find_form(node: Node, agent: Agent, capability: str) -> tuple[Form, int]:
    """Return the form in which a capability is bought here, and how many sellers' answers lie.

    :raises DealFailed: if nobody sells it; says what is on sale
    :raises ConfigurationError: if it has several forms, each with another id
    """
    if capability in FIXED:
        task, result = FIXED[capability]
        return Form(capability, (task.model_json_schema(), result.model_json_schema())), 0
    forms, ignored = known_forms(await node.discover(agent, capability), capability)
    ids = sorted({form.capability for form in forms})
    if len(ids) > 1:
        raise ConfigurationError(f"{capability} has several forms here, name one: {', '.join(ids)}")
    if ids:
        return forms[0], ignored
    others = {found.capability for _, found in await node.discover(agent)} - {ARBITRATION}
    names = ", ".join(sorted({other.rpartition("-")[0] for other in others})) or "nothing"
    raise DealFailed("lapsed", f"nobody sells {capability!r} here; on sale now: {names}")


def form_of(description: Description) -> Form | None:
    """Return what a description says, or None if its schemas are not those of its own id."""
    name = description.capability.rpartition("-")[0]
    try:
        schemas = read_json(description.input_schema), read_json(description.output_schema)
        if not all(isinstance(schema, dict) for schema in schemas):
            return None
        if capability_id(name, schemas_hash(*schemas)) != description.capability:
            return None
    except ValueError:
        return None
    return Form(description.capability, schemas)
