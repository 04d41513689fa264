"""The capabilities whose schemas are fixed for everybody, so that strangers can trade them."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from coase.protocol.messages import capability_id, schemas_hash


class _Ware(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Turn(_Ware):
    """What was said before the prompt."""

    role: Literal["system", "user", "assistant"]
    content: Annotated[str, Field(max_length=200_000)]


class Inference(_Ware):
    """Input of ``inference``: one prompt for a language model, and what was said before it."""

    prompt: Annotated[str, Field(min_length=1, max_length=200_000)]
    system: Annotated[str, Field(max_length=200_000)] = ""
    history: Annotated[tuple[Turn, ...], Field(max_length=1_022)] = ()
    begun: Annotated[str, Field(max_length=200_000)] = ""
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


class Completion(_Ware):
    """Output of ``inference``: what the model wrote, and what it used."""

    text: str
    model: str
    input_tokens: Annotated[int, Field(ge=0)]
    output_tokens: Annotated[int, Field(ge=0)]
    finish: str = "stop"


class Summarise(_Ware):
    """Input of ``summarise``: a text, and how long the summary may be."""

    text: Annotated[str, Field(min_length=1, max_length=1_000_000)]
    words_max: Annotated[int, Field(ge=1, le=1_000)] = 60


class Summary(_Ware):
    """Output of ``summarise``."""

    summary: Annotated[str, Field(min_length=1)]


FIXED: dict[str, tuple[type[BaseModel], type[BaseModel]]] = {
    "inference": (Inference, Completion),
    "summarise": (Summarise, Summary),
}


def capability_of(name: str, task: type[BaseModel], result: type[BaseModel]) -> str:
    """Return the capability id of ``name`` with these two models."""
    return capability_id(name, schemas_hash(task.model_json_schema(), result.model_json_schema()))
