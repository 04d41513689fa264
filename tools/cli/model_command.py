"""``coase model``: the small model of the embedded engine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .app import EXIT_FAILED, Json, app, emit, out, perform, say

models = typer.Typer(help="The model of the embedded engine.", no_args_is_help=True)
app.add_typer(models, name="model")


@models.command("get")
def get(
    dest: Annotated[
        Path | None, typer.Option(help="Folder for it; the user's data without.")
    ] = None,
    json_: Json = False,
) -> None:
    """Install SmolLM2-135M-Instruct (98 MB, Apache-2.0), checked by its hash.

    Example: [b]coase model get[/b]
    """

    async def work() -> tuple[Path, str]:
        import anyio

        from coase.agents.compute.model import digest_of, get_model

        path = await anyio.to_thread.run_sync(lambda: get_model(dest, progress=say))
        return path, digest_of(path)

    path, digest = perform(work)
    if json_:
        emit({"path": str(path), "sha256": digest})
    else:
        out.print(str(path), highlight=False, soft_wrap=True)


@models.command("where")
def where(json_: Json = False) -> None:
    """Say where the model lies.

    Example: [b]coase model where[/b]
    """
    from coase.agents.compute.model import find_model

    path = find_model()
    if json_:
        emit({"path": str(path) if path else None})
    else:
        out.print(str(path) if path else "not installed: coase model get", soft_wrap=True)
    if path is None:
        raise typer.Exit(EXIT_FAILED)
