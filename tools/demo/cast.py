"""The cast of the demonstration: who sells what to whom, at which price and by which strategy.

Three levels of supply. A reader buys digests of documents from editors; editors split each
document and buy summaries of its parts; summarisers buy inference. Two of the summarisers cheat:
one takes work and never delivers, one delivers what does not fit the schema.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Final

import anyio
from pydantic import BaseModel, ConfigDict, Field

from coase.agents import Agent, Job
from coase.agents.bargain import SellerBargain, Style
from coase.agents.inference import inference_agent
from coase.agents.seller import Quote, Windows
from coase.agents.wares import Completion, Inference, Summarise, Summary
from coase.negotiation.pricing import Price
from coase.protocol.messages import Request
from coase.protocol.session import Margins

# Short windows, so that silence has its outcome while somebody watches.
WINDOWS: Final = Windows(lock_s=6, dispute_s=8, answer_s=8, rule_s=12)
MARGINS: Final = Margins(halt_s=0)
SYSTEM: Final = "You summarise texts. Answer with one short sentence."
ASK: Final = "Summarise this text in one short sentence:\n\n"
LEAD_QUALITY_MIN: Final = 60  # Of a hundred: the first part of a document is what people read.
PART_CHARACTERS_MAX: Final = 1_400
PARTS_MAX: Final = 4


class _Ware(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Digest(_Ware):
    """Input of ``digest``: a document."""

    title: Annotated[str, Field(max_length=200)]
    text: Annotated[str, Field(min_length=1, max_length=100_000)]
    number: Annotated[int, Field(ge=0)] = 0


class DigestText(_Ware):
    """Output of ``digest``: one line for each part."""

    title: str
    lines: Annotated[list[str], Field(min_length=1)]


@dataclass(frozen=True, slots=True)
class Document:
    """A text of the user's, or one that comes with the project."""

    title: str
    text: str


def parts_of(text: str) -> list[str]:
    """Return a document's parts: paragraphs, joined while short, cut where too long."""
    parts: list[str] = []
    for paragraph in (p.strip() for p in text.split("\n\n")):
        while paragraph:
            piece, paragraph = paragraph[:PART_CHARACTERS_MAX], paragraph[PART_CHARACTERS_MAX:]
            if parts and len(parts[-1]) < PART_CHARACTERS_MAX // 10:
                parts[-1] += "\n" + piece
            else:
                parts.append(piece)
    return parts[:PARTS_MAX]


def inference_seller(name: str, *, price: Price, style: Style) -> Agent:
    """Return an agent that sells what its engine generates, by the token."""
    return inference_agent(
        name,
        price=price,
        strategy=style,
        deliver_within=30,
        capacity=64,
        windows=WINDOWS,
        about="a small language model, by the token",
        by_rounds=True,
    )


def summariser(name: str, *, price: Price, style: Style, quality: int, tokens_max: int) -> Agent:
    """Return an agent that summarises with inference that it buys, at most so many tokens."""
    agent = Agent(name, by_rounds=True)

    @agent.offers(
        "summarise",
        price=price,
        deliver_within=40,
        strategy=style,
        quality=quality,
        capacity=64,
        windows=WINDOWS,
        about="one sentence, with bought inference",
    )
    async def summarise(task: Summarise, job: Job) -> Summary:
        prompt = ASK + task.text
        completion = await job.hire(
            "inference",
            Inference(
                prompt=prompt,
                system=SYSTEM,
                max_tokens=tokens_max,
                seed=len(task.text),
            ),
            returns=Completion,
            max_price="0.004",
            deliver_within=30,
            # No tokenizer makes more than a token of two bytes; the system's words come on top.
            input_max=len(prompt.encode()) // 2 + 64,
            output_max=tokens_max,
            features={"tokens": len(task.text) // 4},
            # Many small calls: one deposit pays them all, each by a signature.
            settlements=("channel",),
            decide_after_ms=1_000,
            strategy="boulware",
            rounds=4,
            shortlist=2,
            tries=2,
        )
        return Summary(summary=" ".join(completion.text.split()) or "(nothing)")

    return agent


def editor(name: str, *, price: Price, style: Style, quality: int) -> Agent:
    """Return an agent that makes digests out of summaries that it buys."""
    agent = Agent(name, by_rounds=True)

    @agent.offers(
        "digest",
        price=price,
        deliver_within=75,
        strategy=style,
        quality=quality,
        capacity=64,
        windows=WINDOWS,
        about="one line for each part of a document",
    )
    async def digest(task: Digest, job: Job) -> DigestText:
        parts = parts_of(task.text)
        lines = [""] * len(parts)

        async def one(number: int, part: str) -> None:
            bought = await job.hire(
                "summarise",
                Summarise(text=part, words_max=40),
                returns=Summary,
                max_price="0.02",
                deliver_within=50,
                quality_min=0 if number else LEAD_QUALITY_MIN,
                features={
                    "characters": len(part),
                    "document": task.number,
                    "part": number,
                },
                decide_after_ms=1_000,
                strategy="boulware",
                rounds=4,
                shortlist=2,
                tries=3,
            )
            lines[number] = bought.summary

        async with anyio.create_task_group() as group:
            for number, part in enumerate(parts):
                group.start_soon(one, number, part)
        return DigestText(title=task.title, lines=lines)

    return agent


class _OnlyFor(SellerBargain):
    """Bids on one part of one document only, so that a demonstration shows each fault once."""

    document, part = 0, 0

    def quote(self, request: Request, buyer: str, *, load: int, now_ms: int) -> Quote | None:
        """Return a quote for the part that was chosen, None for all others."""
        where = (request.features.get("document"), request.features.get("part"))
        if where != (self.document, self.part):
            return None
        return super().quote(request, buyer, load=load, now_ms=now_ms)


def cheat(
    name: str,
    *,
    price: Price,
    deliver_within_s: int,
    document: int,
    part: int,
    does: Callable[[Summarise, Job], object],
) -> Agent:
    """Return a summariser that undercuts the honest ones and then does what ``does`` does."""
    agent = Agent(name, by_rounds=True)

    @agent.offers(
        "summarise",
        price=price,
        deliver_within=deliver_within_s,
        quality=90,
        capacity=64,
        windows=WINDOWS,
        about="cheap and good, it says",
    )
    async def summarise(task: Summarise, job: Job) -> Summary:
        made = does(task, job)
        if made is None:
            await anyio.sleep_forever()
        return made  # type: ignore[return-value] # That it is none is the point.

    agent.bargain_class = type("_Only", (_OnlyFor,), {"document": document, "part": part})
    return agent


def cast(documents: list[Document]) -> list[Agent]:
    """Return all sellers of the demonstration; each cheat takes one part of ``documents``."""
    places = [(d, p) for d, document in enumerate(documents) for p in range(_parts(document))]
    silent, senseless = places[1 % len(places)], places[2 % len(places)]
    return [
        editor(
            "editor-north",
            price=Price.per_task("0.080", floor_permille=700),
            style="boulware",
            quality=80,
        ),
        editor(
            "editor-south",
            price=Price.per_task("0.075", floor_permille=800),
            style="linear",
            quality=55,
        ),
        summariser(
            "scribe-ada",
            price=Price.per_task("0.016", floor_permille=600),
            style="conceder",
            quality=70,
            tokens_max=48,
        ),
        summariser(
            "scribe-ben",
            price=Price.per_task("0.011", floor_permille=700),
            style="linear",
            quality=50,
            tokens_max=28,
        ),
        cheat(
            "scribe-sloth",
            price=Price.per_task("0.004"),
            deliver_within_s=8,
            document=silent[0],
            part=silent[1],
            does=lambda task, job: None,
        ),
        cheat(
            "scribe-parrot",
            price=Price.per_task("0.005"),
            deliver_within_s=8,
            document=senseless[0],
            part=senseless[1],
            # Built without a check, as somebody would who wants to be paid for nothing.
            does=lambda task, job: Summary.model_construct(summary=""),
        ),
        # Dear words and cheap reading, or the other way round: who is best depends on the prompt.
        inference_seller(
            "engine-ant", price=Price.per_million(input="0.6", output="16"), style="fixed"
        ),
        inference_seller(
            "engine-bee",
            price=Price.per_million(input="2.4", output="9", floor_permille=600),
            style="conceder",
        ),
        inference_seller(
            "engine-cicada",
            price=Price.per_million(input="3", output="12", floor_permille=500),
            style="boulware",
        ),
    ]


def _parts(document: Document) -> int:
    return max(len(parts_of(document.text)), 1)
