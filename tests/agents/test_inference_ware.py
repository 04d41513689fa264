"""A prompt as it is bought: what a seller makes of it is what the buyer asked for."""

from __future__ import annotations

import base64
import struct

import pytest

from coase.agents.compute.ports import (
    Completion,
    Image,
    Message,
    Prompt,
    PromptRefused,
    Tool,
    ToolCall,
    Usage,
)
from coase.agents.inference import (
    IMAGE_TOKENS_MAX,
    completion_of,
    input_tokens_max,
    packed,
    prompt_of,
    task_of,
    tool_calls_of,
    unpacked,
)
from coase.agents.wares import Embedding, Function, Inference, Vectors

PICTURE = Image(b"\x89PNG\r\n\x1a\n" + bytes(range(256)))
CALL = ToolCall(name="weather", arguments='{"town": "Ulm"}', id="call_1")
TOOL = Tool(
    name="weather",
    description="The weather of a town",
    parameters={"type": "object", "properties": {"town": {"type": "string"}}},
)


def everything(*last: Message) -> Prompt:
    return Prompt(
        messages=(
            Message("system", "Be brief"),
            Message("user", "Is it raining here?", images=(PICTURE,)),
            Message("assistant", "", thinking="let me see", tool_calls=(CALL,)),
            Message("tool", "dry", tool_call_id="call_1", tool_name="weather"),
            *last,
        ),
        model="m",
        max_tokens=77,
        temperature=0.25,
        seed=5,
        stop=("x",),
        response_schema={"type": "object", "properties": {"a": {"minimum": 0.1}}},
        tools=(TOOL,),
        tool_choice="required",
        thinking="low",
        top_k=3,
        top_p_permille=900,
        min_p_permille=10,
        frequency_penalty_permille=-2,
        presence_penalty_permille=4,
        repeat_penalty_permille=1_100,
    )


@pytest.mark.parametrize(
    "last",
    [
        (),
        (Message("user", "And tomorrow?"),),
        (Message("user", "", images=(PICTURE, PICTURE)),),
        (Message("user", ""),),
        (Message("user", "And tomorrow?"), Message("assistant", "It will")),
    ],
)
def test_what_a_seller_is_asked_is_what_the_buyer_asked(last: tuple[Message, ...]) -> None:
    prompt = everything(*last)
    prompt.check()
    task = task_of(prompt, seed=5)
    sent = Inference.model_validate_json(task.model_dump_json())
    assert prompt_of(sent) == prompt
    assert prompt_of(sent).tools == prompt.tools
    assert prompt_of(sent).response_schema == prompt.response_schema


@pytest.mark.parametrize("thinking", [None, False, True, "low", "medium", "high"])
def test_thinking_is_bought_as_it_is_asked_for(thinking: bool | None) -> None:
    prompt = Prompt.ask("?", thinking=thinking, seed=0)
    assert prompt_of(task_of(prompt, seed=0)).thinking is thinking


def test_a_plain_text_and_a_begun_answer_are_gone_on_with() -> None:
    text = Prompt(text="One, two,", seed=1)
    assert prompt_of(task_of(text, seed=1, begun=" three")).text == "One, two, three"
    asked = Prompt.ask("Count", seed=1)
    begun = prompt_of(task_of(asked, seed=1, begun="One,", max_tokens=9))
    assert begun.messages[-1] == Message("assistant", "One,")
    assert begun.max_tokens == 9


@pytest.mark.parametrize(
    ("prompt", "why"),
    [
        (Prompt.ask("?", logprobs=True), "log-probabilities"),
        (Prompt(messages=(Message("system", "x"),)), "must be a user's"),
        (Prompt(messages=(Message("assistant", "", tool_calls=(CALL,)),)), "must be a user's"),
        (Prompt.ask("x" * 200_001), "prompt"),
        (Prompt.ask("x", tools=(Tool(name="t", description="x" * 200_001),)), "description"),
    ],
)
def test_what_the_ware_has_no_words_for_is_refused(prompt: Prompt, why: str) -> None:
    with pytest.raises(PromptRefused, match=why):
        task_of(prompt, seed=0)


def test_a_task_asks_for_something() -> None:
    with pytest.raises(ValueError, match="neither a prompt"):
        Inference()
    with pytest.raises(ValueError, match="neither a prompt"):
        Inference.model_validate({"raw": True, "history": [{"role": "user", "content": "x"}]})


@pytest.mark.parametrize(
    ("task", "why"),
    [
        (Inference(prompt="x", images=("no base64!",)), "picture"),
        (Inference(prompt="x", response_schema="[]"), "schema"),
        (Inference(prompt="x", response_schema='{"a":'), "schema"),
        (Inference(prompt="x", tools=(Function(name="t", parameters="[" * 60_000),)), "schema"),
    ],
)
def test_a_seller_refuses_what_it_cannot_read(task: Inference, why: str) -> None:
    with pytest.raises(PromptRefused, match=why):
        prompt_of(task)


def test_an_answer_is_sold_whole() -> None:
    made = completion_of(
        Completion(
            text="no\x1etool_call\n",
            done_reason="tool_calls",
            usage=Usage(input_tokens=3, output_tokens=4, cached_input_tokens=2),
            thinking="hm",
            tool_calls=(CALL, ToolCall(name="n" * 99)),
        ),
        model="m",
    )
    assert (made.text, made.thinking, made.finish) == ("notool_call\n", "hm", "tool_calls")
    assert (made.input_tokens, made.output_tokens, made.cached_input_tokens) == (3, 4, 2)
    assert tool_calls_of(made) == (CALL, ToolCall(name="n" * 64))


def test_pictures_count_as_tokens_and_not_by_their_bytes() -> None:
    bare = input_tokens_max(Inference(prompt="what is this?"))
    seen = input_tokens_max(Inference(prompt="what is this?", images=("A" * 1_000_000,)))
    assert seen == bare + IMAGE_TOKENS_MAX


def test_vectors_come_as_they_were_made() -> None:
    made = ((0.5, -0.25, 3.0), (0.0, 1e-3, -1.0))
    ware = Vectors(vectors=tuple(packed(vector) for vector in made), model="m", input_tokens=2)
    found = unpacked(Vectors.model_validate_json(ware.model_dump_json()), texts=2)
    assert found[0] == made[0]
    assert found[1][1] == pytest.approx(1e-3)


NOT_A_NUMBER = base64.b64encode(struct.pack("<f", float("nan"))).decode()


@pytest.mark.parametrize(
    "vectors",
    [
        (packed((1.0,)),),
        (packed((1.0,)), packed((1.0, 2.0))),
        ("", ""),
        ("AAA=", "AAA="),
        ("????", "????"),
        (packed((1.0,)), NOT_A_NUMBER),
    ],
)
def test_vectors_that_are_none_are_found_out(vectors: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match=r"vector|base64"):
        unpacked(Vectors(vectors=vectors, model="m", input_tokens=1), texts=2)


def test_an_embedding_is_asked_of_some_text() -> None:
    for texts in ((), ("",), ("x",) * 2_049):
        with pytest.raises(ValueError, match="texts"):
            Embedding(texts=texts)
