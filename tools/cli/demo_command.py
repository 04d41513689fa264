"""``coase demo``: the whole market on one machine, in one command."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from .app import EXIT_FAILED, Json, app, emit, err, out, perform


@app.command()
def demo(
    json_: Json = False,
    seed: Annotated[
        str | None,
        typer.Option(help="Fixes keys, strategies, sampling and the award: same seed, same deals."),
    ] = None,
    input_: Annotated[
        Path | None, typer.Option("--input", help="Your own text file, or a folder of them.")
    ] = None,
    engine: Annotated[
        str, typer.Option(help="llamacpp (embedded), ollama, openai or echo.")
    ] = "llamacpp",
) -> None:
    """Watch agents find each other, haggle, lock money, work, cheat, and settle.

    Everything is real: a NATS broker, an EVM with the escrow contracts, a language model.

    Example: [b]coase demo --seed 7[/b], or [b]coase demo --input notes.txt --json[/b]
    """
    figures = perform(lambda: _demo(json_, seed, input_, engine))
    if not figures["conserved"] or figures["failures"]:
        raise typer.Exit(EXIT_FAILED)


async def _demo(as_json: bool, seed: str | None, path: Path | None, engine: str) -> dict[str, Any]:
    from coase.agents.compute.find import open_compute
    from coase.tools.demo.report import report
    from coase.tools.demo.show import Show, show_outcome
    from coase.tools.demo.story import documents_at, play, shipped_documents

    documents = documents_at(path) if path is not None else shipped_documents()
    console: Console = err if as_json else out
    compute = await open_compute(engine)
    try:
        with Show(console, live=console.is_terminal and not as_json) as show:
            show.progress(f"engine: {compute.name}")
            outcome = await play(
                documents,
                compute,
                seed=seed.encode() if seed is not None else None,
                on_notice=show.notice,
                on_progress=show.progress,
                on_names=show.know,
            )
        models = await compute.models()
    finally:
        await compute.close()
    figures = report(outcome, engine=compute.name, model=models[0].name if models else "")
    if as_json:
        emit(figures)
    else:
        show_outcome(out, outcome, figures)
    return figures
