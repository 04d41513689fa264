"""The capabilities whose schemas are fixed for everybody, so that strangers can trade them."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from coase.protocol.messages import capability_id, schemas_hash


class _Ware(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


# Schemas and arguments travel as text: their numbers are nobody's to round on the way.
_Text = Annotated[str, Field(max_length=200_000)]
_SchemaText = Annotated[str, Field(max_length=65_536)]
_ToolName = Annotated[str, Field(min_length=1, max_length=64)]
# Base64 of a file of 8 MiB.
_Image = Annotated[str, Field(min_length=1, max_length=11_184_812)]
_Images = Annotated[tuple[_Image, ...], Field(max_length=16)]
_Permille = Annotated[int, Field(ge=0, le=1_000)]
_Penalty = Annotated[int, Field(ge=-2_000, le=2_000)]


class Called(_Ware):
    """A function that the model wants to be called."""

    name: _ToolName
    arguments: _Text = "{}"
    """A JSON object as text, as the model wrote it."""
    id: Annotated[str, Field(max_length=128)] = ""


class Function(_Ware):
    """A function that the model may ask to be called."""

    name: _ToolName
    description: _Text = ""
    parameters: _SchemaText = "{}"
    """JSON Schema of the object that it is called with, as text."""


class Turn(_Ware):
    """What was said before the prompt."""

    role: Literal["system", "user", "assistant", "tool"]
    content: _Text
    images: _Images = ()
    thinking: _Text = ""
    tool_calls: Annotated[tuple[Called, ...], Field(max_length=64)] = ()
    tool_call_id: Annotated[str, Field(max_length=128)] = ""
    tool_name: Annotated[str, Field(max_length=64)] = ""


class Inference(_Ware):
    """Input of ``inference``: one prompt for a language model, and what was said before it."""

    prompt: _Text = ""
    """The last message of the user; empty where the last turn of ``history`` is to be answered."""
    system: _Text = ""
    history: Annotated[tuple[Turn, ...], Field(max_length=1_022)] = ()
    images: _Images = ()
    """Pictures that belong to the prompt: files in PNG, JPEG, GIF or WebP, as base64."""
    begun: _Text = ""
    """The beginning of the answer: the text goes on from its end and does not repeat it."""
    raw: bool = False
    """The prompt is a text to go on with, not a message; then there is nothing before it."""
    stop: Annotated[
        tuple[Annotated[str, Field(min_length=1, max_length=256)], ...], Field(max_length=16)
    ] = ()
    max_tokens: Annotated[int, Field(ge=1, le=32_768)] = 256
    temperature_permille: Annotated[int, Field(ge=0, le=2_000)] = 0
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    model: Annotated[str, Field(max_length=128)] = ""
    response_schema: _SchemaText = ""
    """JSON Schema that the answer has to follow, as text."""
    tools: Annotated[tuple[Function, ...], Field(max_length=128)] = ()
    tool_choice: Literal["auto", "none", "required"] = "auto"
    thinking: Literal["", "off", "on", "low", "medium", "high"] = ""
    """Whether, or how hard, the model thinks before it answers; nothing is as it likes."""
    top_p_permille: _Permille | None = None
    top_k: Annotated[int, Field(ge=0, le=1_000)] | None = None
    min_p_permille: _Permille | None = None
    frequency_penalty_permille: _Penalty | None = None
    presence_penalty_permille: _Penalty | None = None
    repeat_penalty_permille: Annotated[int, Field(ge=0, le=2_000)] | None = None

    @model_validator(mode="after")
    def _asks(self) -> Inference:
        if not (self.prompt or self.images or (self.history and not self.raw)):
            raise ValueError("there is neither a prompt nor anything before it")
        return self


class Completion(_Ware):
    """Output of ``inference``: what the model wrote, and what it used."""

    text: str
    model: str
    input_tokens: Annotated[int, Field(ge=0)]
    output_tokens: Annotated[int, Field(ge=0)]
    """Those of thinking and of tool calls are among them."""
    cached_input_tokens: Annotated[int, Field(ge=0)] = 0
    finish: str = "stop"
    thinking: str = ""
    tool_calls: Annotated[tuple[Called, ...], Field(max_length=64)] = ()


class Embedding(_Ware):
    """Input of ``embedding``: texts whose meaning is asked for as vectors."""

    texts: Annotated[
        tuple[Annotated[str, Field(min_length=1, max_length=200_000)], ...],
        Field(min_length=1, max_length=2_048),
    ]
    model: Annotated[str, Field(max_length=128)] = ""


class Vectors(_Ware):
    """Output of ``embedding``: a vector for each text, in their order, all of the same length."""

    vectors: Annotated[tuple[Annotated[str, Field(max_length=87_384)], ...], Field(min_length=1)]
    """Each the base64 of its numbers as 32-bit floats, little-endian."""
    model: str
    input_tokens: Annotated[int, Field(ge=0)]


class Summarise(_Ware):
    """Input of ``summarise``: a text, and how long the summary may be."""

    text: Annotated[str, Field(min_length=1, max_length=1_000_000)]
    words_max: Annotated[int, Field(ge=1, le=1_000)] = 60


class Summary(_Ware):
    """Output of ``summarise``."""

    summary: Annotated[str, Field(min_length=1)]


FIXED: dict[str, tuple[type[BaseModel], type[BaseModel]]] = {
    "embedding": (Embedding, Vectors),
    "inference": (Inference, Completion),
    "summarise": (Summarise, Summary),
}


def capability_of(name: str, task: type[BaseModel], result: type[BaseModel]) -> str:
    """Return the capability id of ``name`` with these two models."""
    return capability_id(name, schemas_hash(task.model_json_schema(), result.model_json_schema()))
