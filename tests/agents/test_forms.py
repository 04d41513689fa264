"""What is sold is what its id says: a stranger's other schemas break nobody's purchase."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coase.agents.forms import known_forms
from coase.protocol.messages import Description, canonical_json, capability_id, schemas_hash

TASK = {"type": "object", "properties": {"text": {"type": "string"}}, "required": ["text"]}
RESULT = {"type": "object", "properties": {"words": {"type": "integer"}}}
ID = capability_id("count", schemas_hash(TASK, RESULT))
OTHER = capability_id("count", schemas_hash(RESULT, TASK))


def described(
    capability: str, task: str = canonical_json(TASK), result: str = canonical_json(RESULT)
) -> Description:
    return Description.model_construct(
        agent="a", capability=capability, input_schema=task, output_schema=result
    )


HONEST = ("0x" + "ff" * 20, described(ID))
LOW = "0x" + "00" * 20


@pytest.mark.parametrize("asked", ["count", ID])
@pytest.mark.parametrize(
    "lie",
    [
        described(ID, result='{"type":"object"}'),
        described(ID, task='{"title":"T","type":"object"}'),
        described(ID, task="no JSON"),
        described(ID, task="[" * 9_000),
        described(ID, task='{"enum":["\\ud800"]}'),
        described(ID, task="[]", result="7"),
        described(ID, task="null"),
        described("count-00000000"),
        described("count"),
        described("other-" + ID.rpartition("-")[2]),
    ],
)
def test_who_describes_an_id_by_schemas_of_another_is_ignored(lie: Description, asked: str) -> None:
    forms, ignored = known_forms([(LOW, lie), HONEST], asked)
    assert [(form.capability, *form.schemas) for form in forms] == [(ID, TASK, RESULT)]
    assert ignored == 1
    assert known_forms([(LOW, lie)], asked) == ([], 1)


def test_of_several_honest_forms_all_are_named_and_an_id_chooses_one() -> None:
    turned = described(OTHER, canonical_json(RESULT), canonical_json(TASK))
    forms, ignored = known_forms([(LOW, turned), HONEST], "count")
    assert ({form.capability for form in forms}, ignored) == ({ID, OTHER}, 0)
    forms, ignored = known_forms([(LOW, turned), HONEST], ID)
    assert ([form.capability for form in forms], ignored) == ([ID], 1)


def test_annotations_are_not_part_of_what_is_sold() -> None:
    titled = described(ID, canonical_json({"title": "Task", **TASK}))
    forms, ignored = known_forms([(LOW, titled), HONEST], "count")
    assert (len(forms), ignored) == (1, 0)


def test_of_schemas_ground_to_one_id_those_of_more_sellers_count(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("coase.protocol.messages.capability_id", lambda name, digest: ID)
    ground = described(ID, result='{"type":"object"}')
    found = [(LOW, ground), HONEST, ("0x" + "ee" * 20, described(ID))]
    forms, ignored = known_forms(found, "count")
    assert ([form.schemas for form in forms], ignored) == ([(TASK, RESULT)], 1)


@given(st.text(max_size=40), st.text(max_size=40), st.text(max_size=40))
def test_nothing_that_a_stranger_writes_raises(name: str, task: str, result: str) -> None:
    forms, ignored = known_forms([(LOW, described(name, task, result)), HONEST], "count")
    assert (len(forms), ignored) == (1, 1)
