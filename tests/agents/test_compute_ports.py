"""What a prompt may carry, and what is refused before an engine sees it."""

from __future__ import annotations

from typing import Any

import jsonschema
import pytest

from coase.agents.compute.echo import EchoCompute
from coase.agents.compute.ports import (
    EMBED_SIZE_MAX_BYTES,
    EMBED_TEXTS_MAX,
    IMAGE_SIZE_MAX_BYTES,
    IMAGES_MAX,
    IMAGES_SIZE_MAX_BYTES,
    PROMPT_SIZE_MAX_BYTES,
    SCHEMA_DEPTH_MAX,
    SCHEMA_SIZE_MAX_BYTES,
    TOOL_CALLS_MAX,
    TOOLS_MAX,
    Image,
    Message,
    ModelInfo,
    Prompt,
    PromptRefused,
    Tool,
    ToolCall,
    check_schema,
    check_texts,
    read_json,
)

PNG = b"\x89PNG\r\n\x1a\n"
PICTURE = Image(PNG + b"whatever")
WEATHER = Tool(
    name="weather",
    description="The weather of a town",
    parameters={"type": "object", "properties": {"town": {"type": "string"}}},
)


def nested(levels: int) -> dict[str, object]:
    """Return a schema of so many levels."""
    schema: dict[str, object] = {"type": "string"}
    for _ in range(levels):
        schema = {"type": "array", "items": schema}
    return schema


def test_a_prompt_that_carries_everything_is_in_order() -> None:
    call = ToolCall(name="weather", arguments='{"town": "Ulm"}', id="1")
    prompt = Prompt(
        messages=(
            Message("user", "Is it raining here?", images=(PICTURE,)),
            Message("assistant", "", thinking="I had better look", tool_calls=(call,)),
            Message("tool", "dry", tool_call_id="1", tool_name="weather"),
        ),
        tools=(WEATHER,),
        tool_choice="required",
        thinking="high",
        response_schema={"type": "object"},
        logprobs=True,
        top_logprobs=3,
        top_p_permille=900,
        top_k=40,
        min_p_permille=100,
        frequency_penalty_permille=-1500,
        presence_penalty_permille=500,
        repeat_penalty_permille=1100,
    )
    assert prompt.sampling() == {
        "top_k": 40,
        "top_p": 0.9,
        "min_p": 0.1,
        "frequency_penalty": -1.5,
        "presence_penalty": 0.5,
        "repeat_penalty": 1.1,
    }
    prompt.check()
    assert prompt.needs() == ("completion", "tools", "vision", "thinking")
    assert prompt.images == (PICTURE,)


def test_what_the_model_reads_is_counted_and_pictures_are_not() -> None:
    bare = Prompt.ask("Is it raining?")
    thought = Message("assistant", "No", thinking="dry", tool_calls=(ToolCall(name="w"),))
    assert Prompt(messages=(*bare.messages, thought)).size_bytes() == bare.size_bytes() + 8
    seen = Prompt(messages=(Message("user", "Is it raining?", images=(PICTURE,)),))
    assert seen.size_bytes() == bare.size_bytes()
    with_tools = Prompt.ask("Is it raining?", tools=(WEATHER,))
    assert with_tools.size_bytes() > bare.size_bytes() + len(WEATHER.description)
    unused = Prompt.ask("Is it raining?", tools=(WEATHER,), tool_choice="none")
    assert unused.size_bytes() == bare.size_bytes()
    assert unused.needs() == ("completion",)


@pytest.mark.parametrize(
    ("prompt", "why"),
    [
        (Prompt.ask("?", tools=(WEATHER,) * 2), "same name"),
        (Prompt.ask("?", tools=(Tool(name="a b"),)), "name"),
        (
            Prompt.ask("?", tools=tuple(Tool(name=f"t{n}") for n in range(TOOLS_MAX + 1))),
            f"over {TOOLS_MAX} tools",
        ),
        (Prompt.ask("?", tools=(Tool(name="a", parameters={"type": 7}),)), "schema of the tool"),
        (
            Prompt.ask("?", tools=(Tool(name="a", description="x" * PROMPT_SIZE_MAX_BYTES),)),
            "its text is over",
        ),
        (Prompt.ask("?", tool_choice="required"), "has none"),
        (Prompt(text="?", tools=(WEATHER,)), "without tools"),
        (Prompt(text="?", thinking=True), "without thinking"),
        (Prompt.ask("?", response_schema={"type": "nothing"}), "schema of the answer is none"),
        (Prompt.ask("?", response_schema=nested(SCHEMA_DEPTH_MAX)), "levels deep"),
        (
            Prompt.ask("?", response_schema={"description": "x" * SCHEMA_SIZE_MAX_BYTES}),
            "KiB",
        ),
        (Prompt.ask("?", top_p_permille=1_001), "top_p_permille"),
        (Prompt.ask("?", temperature=float("nan")), "temperature"),
        (Prompt.ask("?", top_logprobs=21), "top_logprobs"),
        (Prompt.ask("?", frequency_penalty_permille=-2001), "frequency_penalty"),
        (Prompt(messages=(Message("user", "?", images=(Image(b"text"),)),)), "no PNG"),
        (Prompt(messages=(Message("user", "", images=(PICTURE,) * (IMAGES_MAX + 1)),)), "images"),
        (
            Prompt(messages=(Message("user", "", images=(Image(PNG + bytes(2**23)),)),)),
            f"an image is over {IMAGE_SIZE_MAX_BYTES >> 20} MiB",
        ),
        (
            Prompt(messages=(Message("user", "", images=(Image(PNG + bytes(2**22)),) * 3),)),
            f"together are over {IMAGES_SIZE_MAX_BYTES >> 20} MiB",
        ),
        (
            Prompt(
                messages=(
                    Message("assistant", "", tool_calls=(ToolCall(name="w"),) * 65),
                    Message("user", "?"),
                )
            ),
            f"over {TOOL_CALLS_MAX} tool calls",
        ),
    ],
)
def test_what_breaks_a_limit_is_refused_with_the_limit(prompt: Prompt, why: str) -> None:
    with pytest.raises(PromptRefused, match=why):
        prompt.check()


GOOD: tuple[Any, ...] = (
    {},
    {"type": ["string", "null"], "default": None, "minimum": 0.5, "x-own": {"type": 7}},
    {"type": "array", "items": {"type": "integer"}, "prefixItems": [True]},
    {"properties": {"type": {"enum": [1, None]}}, "required": ["type"]},
    {"additionalProperties": False, "patternProperties": {"^a": {"pattern": "b"}}},
    {"$defs": {"N": {"anyOf": [{"$ref": "#/$defs/N"}, {"const": {"type": 7}}]}}},
    {"$defs": {"a/b": True}, "$ref": "#/$defs/a~1b", "items": {"$ref": "#/x%24/1"}, "x$": [1, {}]},
    {"minLength": 2, "maxLength": 2, "pattern": r"^[(\]{3,1}]\({2,}a{1,2}(?:b|[^c])*{x$"},
)


@pytest.mark.parametrize("schema", GOOD)
def test_schemas_that_are_in_order_are_taken(schema: dict[str, Any]) -> None:
    jsonschema.Draft202012Validator.check_schema(schema)
    check_schema(schema, what="it")
    check_schema({**schema, "items": [{}]}, what="as it was written until 2019")


BAD: tuple[tuple[Any, str], ...] = (
    ({"type": "text"}, "#/type is no type: 'text'"),
    ({"type": []}, "#/type is no type"),
    ({"properties": ["a"]}, "#/properties is no object"),
    ({"properties": {"a": 3}}, "#/properties/a is no object"),
    ({"properties": {"a": {"items": {"type": 3}}}}, "#/properties/a/items/type is no type"),
    ({"anyOf": {"type": "string"}}, "#/anyOf is no list"),
    ({"oneOf": [{"enum": "a"}]}, "#/oneOf/0/enum is no list"),
    ({"required": True}, "#/required is no list of names"),
    ({"$ref": 1}, r"#/\$ref is no text"),
    ({"maxLength": "many"}, "#/maxLength is no whole number"),
    ({"properties": {"a": {"minItems": -1}}}, "#/properties/a/minItems is no whole number"),
    ({"minimum": True}, "#/minimum is no number"),
    ({"anyOf": []}, "#/anyOf is an empty list"),
    ({"not": None}, "#/not is no object"),
    ({"not": {"not": {"$defs": {"a": {"pattern": []}}}}}, "/a/pattern is no text"),
)


@pytest.mark.parametrize(("schema", "why"), BAD)
def test_of_a_schema_that_is_none_it_is_said_where(schema: dict[str, Any], why: str) -> None:
    with pytest.raises(jsonschema.SchemaError):
        jsonschema.Draft202012Validator.check_schema(schema)
    with pytest.raises(PromptRefused, match=why):
        check_schema(schema, what="it")


UNREADABLE: tuple[tuple[dict[str, Any], str], ...] = (
    ({"items": {"$ref": "#/nowhere"}}, r"#/items/\$ref names '#/nowhere', which is not there"),
    ({"$ref": "https://example.com/s"}, "is elsewhere: nothing is fetched"),
    ({"$defs": {"a": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"}, "leads back to itself"),
    ({"$ref": "#"}, "leads back to itself"),
    ({"type": "array", "minItems": 5, "maxItems": 2}, "#/minItems is over maxItems"),
    ({"minimum": 5, "maximum": 1.5}, "#/minimum is over maximum"),
    ({"pattern": "^a{5,2}$"}, r"#/pattern has \{5,2}, of which the first number is the larger"),
    ({"pattern": "("}, "#/pattern does not close a group"),
    ({"pattern": "a)"}, "#/pattern closes a group that it did not open"),
    ({"pattern": "[a"}, "#/pattern does not close a set of letters"),
    ({"pattern": "a\\"}, "#/pattern ends in a backslash"),
    ({"enum": []}, "#/enum is an empty list"),
)


@pytest.mark.parametrize(("schema", "why"), UNREADABLE)
def test_a_schema_that_no_engine_can_keep_is_refused_before_one_tries(
    schema: dict[str, Any], why: str
) -> None:
    with pytest.raises(PromptRefused, match=why):
        check_schema(schema, what="it")


def test_a_schema_as_deep_as_a_body_can_be_is_refused_and_no_more() -> None:
    deep: Any = {"default": []}
    for _ in range(100_000):
        deep = {"default": deep}
    with pytest.raises(PromptRefused, match="deep"):
        check_schema(deep, what="it")
    while deep:  # Taken apart by hand: the interpreter would go down as deep.
        deep = deep["default"]


def test_the_kind_of_a_picture_is_what_its_bytes_say() -> None:
    kinds = {
        PNG: "image/png",
        b"\xff\xd8\xff\xe0": "image/jpeg",
        b"GIF89a": "image/gif",
        b"RIFF\0\0\0\0WEBPVP8 ": "image/webp",
        b"RIFF\0\0\0\0WAVE": "",
        b"": "",
    }
    assert {data: Image(data).media_type for data in kinds} == kinds


def test_arguments_that_are_no_object_are_read_as_none() -> None:
    texts = ('{"town": "Ulm"}', "", "[1]", '{"town":', "[" * 100_000)
    read = [ToolCall(name="w", arguments=text).read() for text in texts]
    assert read == [{"town": "Ulm"}, {}, None, None, None]


@pytest.mark.parametrize(
    ("count", "shown"),
    [
        (0, ""),
        (999, ""),
        (45_000, "45K"),
        (134_515_008, "134M"),
        (7_615_616_512, "7.6B"),
        (70_000_000_000, "70B"),
    ],
)
def test_the_size_of_a_model_is_said_as_people_say_it(count: int, shown: str) -> None:
    assert ModelInfo(name="m", parameter_count=count).parameter_size == shown


@pytest.mark.parametrize(
    ("texts", "why"),
    [
        ([], "no text"),
        (["a", ""], "empty"),
        (["a"] * (EMBED_TEXTS_MAX + 1), "over"),
        (["a" * EMBED_SIZE_MAX_BYTES, "b"], "over 4 MiB"),
    ],
)
def test_texts_beyond_the_limits_are_not_embedded(texts: list[str], why: str) -> None:
    with pytest.raises(PromptRefused, match=why):
        check_texts(texts)
    check_texts(["a" * EMBED_SIZE_MAX_BYTES])


@pytest.mark.parametrize(
    ("text", "read"),
    [
        (r'"a\ud83d"', "a?"),
        (r'"\ude00b\uD83D\ude00\uD83D"', "?b\U0001f600?"),
        (r'"\ud83d\ud83d\ude00"', "?\U0001f600"),
        (r'"\\ud83d \ud83d"', r"\ud83d ?"),
        (r'["\ud83d", {"a": "\"\udc00"}]', ["?", {"a": '"?'}]),
    ],
)
def test_half_a_character_is_no_reason_not_to_read_the_rest(text: str, read: Any) -> None:
    assert read_json(text) == read
    assert read_json(text.encode()) == read


@pytest.mark.parametrize("text", ["", "{", "[" * 100_000, '"\\ud83d', '{"a": NaN}', r'"\ud8"'])
def test_what_is_no_json_is_a_value_error(text: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        read_json(text)


@pytest.mark.anyio
async def test_a_whole_answer_has_all_that_its_chunks_had() -> None:
    completion = await EchoCompute().complete(Prompt.ask("one two"))
    assert (completion.text, completion.thinking, completion.tool_calls) == ("one two", "", ())
