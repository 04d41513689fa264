"""``coase plan``: work in many pieces, made here and bought, under one budget and one deadline."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from coase.protocol.errors import ConfigurationError

from .app import EXIT_FAILED, Json, app, emit, err, out, perform, printable, raise_user, say

if TYPE_CHECKING:
    from rich.progress import Progress as Bar

    from coase.agents.answers import Buyer
    from coase.agents.plans import Plan, Progress
    from coase.agents.textplans import Digest, Labelled

NAME: Final = "planner"
TEXT_SHOWN_MAX_CHARS: Final = 60

plans = typer.Typer(help="Split big work over many sellers, within one budget.")
app.add_typer(plans, name="plan")

File = Annotated[str, typer.Argument(help="A text file; - reads standard input.")]
Budget = Annotated[
    str, typer.Option(help="The most for all of it, such as 0.2; without, nothing is bought.")
]
MaxPrice = Annotated[str, typer.Option(help="The most for one piece; without, an equal share.")]
Within = Annotated[int, typer.Option("--within", min=10, max=86400, help="Seconds for all of it.")]
AtOnce = Annotated[int, typer.Option(min=1, max=256, help="So many pieces at once.")]
Engine = Annotated[str, typer.Option(help="auto, ollama, llamacpp, echo, or none to buy all.")]
Key = Annotated[str, typer.Option(help="Another name makes it anew instead of going on.")]
Receipt = Annotated[Path | None, typer.Option(help="Write the receipt for all pieces there.")]
State = Annotated[
    Path | None, typer.Option(help="Directory for key and journal; the user's own without.")
]


@dataclass(frozen=True, slots=True)
class _Way:
    """How a plan is carried out."""

    budget: str
    max_price: str
    within: int
    at_once: int
    engine: str
    key: str
    receipt: Path | None
    state: Path | None
    as_json: bool


@plans.command()
def summarise(
    file: File,
    budget: Budget = "",
    max_price: MaxPrice = "",
    words: Annotated[int, typer.Option(min=10, max=1000, help="Of the digest.")] = 120,
    chunk: Annotated[
        int, typer.Option(min=200, max=100_000, help="Characters of a part; small models: fewer.")
    ] = 4_000,
    within: Within = 600,
    at_once: AtOnce = 8,
    engine: Engine = "auto",
    key: Key = "",
    receipt: Receipt = None,
    state: State = None,
    json_: Json = False,
) -> None:
    """Make a long text short: each part by itself, then what the parts say.

    Pieces go to the engine here while it has a place, the others are bought. What is not there in
    time is left out, and said. Killed, the same command goes on and buys nothing twice.

    Example: [b]coase plan summarise book.txt --budget 0.2[/b]
    """
    from .buy_commands import read_input

    text = read_input(file)
    way = _Way(budget, max_price, within, at_once, engine, key, receipt, state, json_)

    async def work(plan: Plan[Any, Any]) -> bool:
        from coase.agents.textplans import summarise as summarised

        digest: Digest = await summarised(plan, text, words=words, chunk_chars=chunk)
        missing = {str(n + 1): why for n, why in digest.notes.missing.items()}
        if json_:
            emit(_document(plan, text=digest.text, covers=digest.covers, missing=missing))
        else:
            out.print(printable(digest.text), highlight=False, markup=False, soft_wrap=True)
            say(f"covers {digest.covers}")
        return digest.complete

    _carry_out(way, ("summarise", words, chunk, text), work)


@plans.command()
def classify(
    file: File,
    labels: Annotated[str, typer.Option(help="With commas between, such as good,bad.")],
    budget: Budget = "",
    max_price: MaxPrice = "",
    votes: Annotated[int, typer.Option(min=1, max=15, help="So many opinions on each.")] = 1,
    question: Annotated[str, typer.Option(help="Asked of each text.")] = (
        "Which label fits the text best?"
    ),
    within: Within = 600,
    at_once: AtOnce = 8,
    engine: Engine = "auto",
    key: Key = "",
    receipt: Receipt = None,
    state: State = None,
    json_: Json = False,
) -> None:
    """Put each line of a file, or each text of a JSON list, under one of some labels.

    With votes, opinions on one text come from different sellers as far as there are so many.

    Example: [b]coase plan classify reviews.txt --labels good,bad --budget 0.1[/b]
    """
    from coase.agents.textplans import require_labels

    from .buy_commands import read_input

    texts = _texts(read_input(file), file)
    try:
        names = require_labels(labels.split(","))
    except ValueError as error:
        raise_user(f"--labels: {error}")
    way = _Way(budget, max_price, within, at_once, engine, key, receipt, state, json_)

    async def work(plan: Plan[Any, Any]) -> bool:
        from coase.agents.textplans import classify as classified

        found = await classified(plan, texts, names, votes=votes, question=question)
        if json_:
            rows = [_row(each) for each in found]
            emit(_document(plan, labels=rows))
        else:
            _show_labels(found, votes)
        return all(each.label for each in found)

    _carry_out(way, ("classify", names, votes, question, texts), work)


def _texts(text: str, file: str) -> list[str]:
    """Return the texts of a JSON list, else the lines that are not empty."""
    from coase.agents.compute.ports import read_json

    try:
        told = read_json(text)
    except ValueError:
        told = None
    if isinstance(told, list):
        if not told or not all(isinstance(each, str) and each.strip() for each in told):
            raise_user(f"{file} is a JSON list, but not of texts")
        return told
    return [line.strip() for line in text.splitlines() if line.strip()]


def _carry_out(way: _Way, what: Any, work: Callable[[Plan[Any, Any]], Any]) -> None:
    """Run a plan to its end or its deadline; what is missing makes the exit code."""
    from coase.agents.receipt import spelt
    from coase.protocol.identity import keccak256

    if way.max_price and not way.budget:
        raise_user("--max-price needs --budget: without it nothing is bought")
    key = f"{way.key or 'plan'}-{keccak256(spelt(list(what)).encode())[:8].hex()}"

    async def run() -> bool:
        async with AsyncExitStack() as stack:
            buyer = await stack.enter_async_context(_buyer(way))
            plan = buyer.plan(
                budget=way.budget,
                max_price=way.max_price,
                within_s=way.within,
                at_once=way.at_once,
                key=key,
                on_progress=stack.enter_context(_Shown()).tell,
            )
            try:
                complete: bool = await work(plan)
            except ValueError as error:
                raise ConfigurationError(str(error)) from None
            _end(way, buyer, plan)
            return complete

    if not perform(run):
        raise typer.Exit(EXIT_FAILED)


def _buyer(way: _Way) -> Buyer:
    from coase.agents.answers import Buyer
    from coase.agents.config import load_network
    from coase.agents.purse import Budget

    from .sell_command import kind_of

    engine = None if way.engine == "none" else kind_of(way.engine)
    if not way.budget:
        return Buyer(NAME, engine=engine, state=way.state)
    # The budget is this plan's alone; the owner may limit all plans: coase budget planner.
    limit, network = Budget(per_deal=way.budget), load_network()
    if network.asset.money(way.budget).units == 0:
        raise_user("--budget is 0: name what it is worth to you, or leave it out to buy nothing")
    return Buyer(NAME, budget=limit, engine=engine, network=network, state=way.state)


class _Shown:
    """How far a plan is: a bar on a terminal, nothing in a pipe."""

    def __init__(self) -> None:
        self._bar: Bar | None = None
        self._task: Any = None

    def __enter__(self) -> _Shown:
        if err.is_terminal:
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
            from rich.progress import Progress as Bar

            columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
            text = TextColumn("{task.description}")
            self._bar = Bar(*columns, text, console=err, transient=True)
            self._bar.start()
            self._task = self._bar.add_task("", total=None)
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def tell(self, progress: Progress) -> None:
        """Show one step more."""
        if self._bar is None:
            return
        text = f"{progress.failed} failed" if progress.failed else ""
        text += f" {progress.hedged} asked twice" if progress.hedged else ""
        self._bar.update(
            self._task,
            total=progress.pieces,
            completed=progress.done + progress.failed,
            description=text,
        )


def _end(way: _Way, buyer: Buyer, plan: Plan[Any, Any]) -> None:
    receipt = plan.receipt()
    if way.receipt is not None:
        from coase.agents.config import write_private

        write_private(way.receipt, receipt.to_json() + "\n")
    if way.as_json:
        return
    sellers = {part.seller for part in receipt.parts if part.deal}
    spent = buyer.money(plan.spent_units)
    many = "1 seller" if len(sellers) == 1 else f"{len(sellers)} sellers"
    pieces = "1 piece" if receipt.pieces == 1 else f"{receipt.pieces} pieces"
    say(f"{pieces}, {many}, at most {spent}; receipt {receipt.root}")


def _document(plan: Plan[Any, Any], **said: Any) -> dict[str, Any]:
    receipt = plan.receipt()
    document = {**said, "spent_units": str(plan.spent_units)}
    return {**document, "receipt": json.loads(receipt.to_json())}


def _row(each: Labelled) -> dict[str, Any]:
    return {
        "text": each.text,
        "label": each.label,
        "voices": each.voices,
        "of": each.of,
        "why": each.why,
    }


def _show_labels(found: list[Labelled], votes: int) -> None:
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for name in ("label", *(("votes",) if votes > 1 else ()), "text"):
        table.add_column(name)
    for each in found:
        voices = (f"{each.voices} of {each.of}",) if votes > 1 else ()
        label = printable(each.label) or f"none: {printable(each.why)}"
        text = printable(each.text)
        if len(text) > TEXT_SHOWN_MAX_CHARS:
            text = text[: TEXT_SHOWN_MAX_CHARS - 1] + "…"
        table.add_row(*(_plain(cell) for cell in (label, *voices, text)))
    out.print(table)


def _plain(text: str) -> str:
    return text.replace("[", r"\[")
