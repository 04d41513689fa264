"""Two plans that many need: a long text made short, and many texts put under labels."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import anyio

from .compute.ports import Prompt, read_json
from .plans import FAN_IN_DEFAULT, Covered, Plan, first_cause

if TYPE_CHECKING:
    from collections.abc import Sequence

# With its instruction and a summary of 150 words, a chunk fits the context of 2,048 tokens that
# the smallest engines give to each of their callers.
CHUNK_MAX_CHARS: Final = 4_000
CHUNK_MIN_CHARS: Final = 200
WORDS_DEFAULT: Final = 120
# English has about 1.4 tokens a word; models that are told a length overshoot it.
TOKENS_PER_WORD: Final = 2
# For joining the notes at the end, of the whole time.
JOIN_SHARE: Final = 3
LABELS_MAX: Final = 100
LABEL_MAX_CHARS: Final = 100
LABEL_TOKENS: Final = 24  # Braces, the name of the field, and room for quotes.
VOTES_MAX: Final = 15

TextPlan = Plan[Prompt, str]


@dataclass(frozen=True, slots=True)
class Digest:
    """A long text made short, and what of it the short one covers."""

    text: str
    notes: Covered[str]
    """The chunks' own summaries."""
    joined: bool
    """False if there was no time or money to join the notes: then the text is the notes."""

    @property
    def complete(self) -> bool:
        """Whether all of the text is in it."""
        return self.joined and self.notes.complete

    @property
    def covers(self) -> str:
        """What it covers, for people."""
        missing = sorted(self.notes.missing)
        said = f"{self.notes} parts"
        if missing:
            said += f", without {', '.join(f'part {n + 1}' for n in missing[:10])}"
            said += f" and {len(missing) - 10} more" if len(missing) > 10 else ""
        return said if self.joined else f"{said}; the summaries of the parts could not be joined"


@dataclass(frozen=True, slots=True)
class Labelled:
    """One text and the label that was put on it; no label if none was found."""

    text: str
    label: str
    voices: int = 0
    of: int = 0
    why: str = ""


def chunks_of(text: str, *, size_max_chars: int = CHUNK_MAX_CHARS) -> list[str]:
    """Return ``text`` in pieces of at most that size, cut where people would cut it.

    Nothing but blanks at the cuts is lost.

    :raises ValueError: if a piece would be too small to hold a thought
    """
    if size_max_chars < CHUNK_MIN_CHARS:
        raise ValueError(f"a chunk has at least {CHUNK_MIN_CHARS} characters")
    chunks: list[str] = []
    rest = text.strip()
    while len(rest) > size_max_chars:
        cut = _cut(rest, size_max_chars)
        chunks.append(rest[:cut].rstrip())
        rest = rest[cut:].lstrip()
    return [*chunks, rest] if rest else chunks


def _cut(text: str, most: int) -> int:
    """Return where to cut: after a paragraph, else a line, a sentence, a word, or anywhere."""
    for mark in (r"\n\s*\n", r"\n", r"[.!?]\s", r"\s"):
        ends = [found.end() for found in re.finditer(mark, text[:most])]
        if ends and ends[-1] > most // 2:
            return ends[-1]
    return most


def pieces_in(chunks: int, *, fan_in: int = FAN_IN_DEFAULT) -> int:
    """Return how many pieces of work it takes to digest so many chunks."""
    pieces, level = chunks, chunks
    while level > 1:
        groups = -(-level // fan_in)
        pieces += groups - (level % fan_in == 1)
        level = groups
    return pieces


async def summarise(
    plan: TextPlan, text: str, *, words: int = WORDS_DEFAULT, chunk_chars: int = CHUNK_MAX_CHARS
) -> Digest:
    """Return a digest of ``text``: of each chunk by itself, then of what these say.

    Chunks are shorter where a character takes several bytes, and so more tokens.

    :raises ValueError: if there is no text, or chunks would be too small
    """
    size = max(len(text.encode("utf-8", "replace")), 1)
    dense = max(chunk_chars * len(text) // size, min(chunk_chars, CHUNK_MIN_CHARS))
    chunks = chunks_of(text, size_max_chars=dense)
    if not chunks:
        raise ValueError("there is no text to summarise")
    plan.expect(pieces_in(len(chunks)))
    tokens = words * TOKENS_PER_WORD

    def ask(what: str, body: str) -> Prompt:
        return Prompt.ask(f"{what} in at most {words} words:\n\n{body}", max_tokens=tokens)

    def join(notes: Sequence[str]) -> Prompt:
        body = "\n\n".join(note.strip() for note in notes)
        return ask("These are summaries of the parts of one text. Join them into one summary", body)

    notes = await plan.map(
        [ask("Summarise this text", chunk) for chunk in chunks],
        check=_said_something,
        leave_s=plan.left_s / JOIN_SHARE if len(chunks) > 1 else 0,
        name="notes",
    )
    whole = await plan.reduce(notes.results, join, check=_said_something, name="joined")
    if whole is None:
        return Digest("\n\n".join(note.strip() for note in notes.results), notes, joined=False)
    return Digest(whole.strip(), notes, joined=True)


def _said_something(text: str) -> str | None:
    return None if text.strip() else "it is empty"


async def classify(
    plan: TextPlan,
    texts: Sequence[str],
    labels: Sequence[str],
    *,
    votes: int = 1,
    question: str = "Which label fits the text best?",
) -> list[Labelled]:
    """Return for each text the one of ``labels`` that fits it, by so many votes.

    Votes on one text come from different sellers as far as there are so many. Where no majority
    was found, or time or money was up, the label is empty and ``why`` says so.

    :raises ValueError: if there are no texts, or labels that cannot be told apart
    """
    labels = require_labels(labels)
    if not texts or not 1 <= votes <= VOTES_MAX:
        raise ValueError(f"there are no texts, or votes is not 1 to {VOTES_MAX}")
    plan.expect(len(texts) * votes)
    prompts = [_question(text, labels, question) for text in texts]

    def check(answer: str) -> str | None:
        return None if label_in(answer, labels) else "it names none of the labels, or several"

    if votes == 1:
        covered = await plan.map(prompts, check=check, name="labels")
        return [
            Labelled(text, label_in(made.result, labels), 1, 1)
            if made is not None
            else Labelled(text, "", why=covered.missing[n])
            for n, (text, made) in enumerate(zip(texts, covered.made, strict=True))
        ]
    found: list[Labelled] = [Labelled(text, "", why="there was no majority") for text in texts]

    async def decide(n: int) -> None:
        vote = await plan.vote(
            prompts[n],
            votes,
            of=lambda answer: label_in(answer, labels),
            check=check,
            name=f"label-{n:05}",
        )
        if vote is not None:
            found[n] = Labelled(texts[n], label_in(vote.result, labels), vote.voices, vote.of)

    try:
        async with anyio.create_task_group() as group:
            for n in range(len(texts)):
                group.start_soon(decide, n)
    except BaseExceptionGroup as several:
        raise first_cause(several) from None
    return found


def require_labels(labels: Sequence[str]) -> tuple[str, ...]:
    """Return the labels without blanks around them.

    :raises ValueError: if there are fewer than two, or two that read the same
    """
    clean = tuple(label.strip() for label in labels)
    if not 2 <= len(clean) <= LABELS_MAX:
        raise ValueError(f"there are 2 to {LABELS_MAX} labels, not {len(clean)}")
    if any(not 0 < len(label) <= LABEL_MAX_CHARS for label in clean):
        raise ValueError(f"a label has 1 to {LABEL_MAX_CHARS} characters")
    if len({label.lower() for label in clean}) < len(clean):
        raise ValueError("two labels read the same")
    return clean


def label_in(answer: str, labels: Sequence[str]) -> str:
    """Return the one label that an answer names, or nothing if it names none or several."""
    try:
        told = read_json(answer)
    except ValueError:
        told = answer
    if isinstance(told, dict):
        told = told.get("label")
    text = str(told).strip().lower()
    for label in labels:
        if text == label.lower():
            return label
    # A label may be part of another one: the longer ones are taken out of the text first.
    found = []
    for label in sorted(labels, key=len, reverse=True):
        shape = rf"(?<!\w){re.escape(label.lower())}(?!\w)"
        text, count = re.subn(shape, " ", text)
        found += [label] * bool(count)
    return found[0] if len(found) == 1 else ""


def _question(text: str, labels: Sequence[str], question: str) -> Prompt:
    longest = max(len(label.encode()) for label in labels)
    return Prompt.ask(
        f"{question} The labels are: {', '.join(labels)}.\n\nText: {text}\n\n"
        'Answer with JSON such as {"label": "..."} and nothing else.',
        max_tokens=LABEL_TOKENS + longest,
        response_schema={
            "type": "object",
            "properties": {"label": {"type": "string", "enum": list(labels)}},
            "required": ["label"],
            "additionalProperties": False,
        },
    )
