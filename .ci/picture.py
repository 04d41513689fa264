"""Draws the pictures of the README out of a real run of the demo.

``.venv/bin/python .ci/picture.py`` plays ``coase demo --seed 7`` as the command does, keeps the
screen of a moment at which much is going on, and what is printed at the end. No font is embedded
or fetched: whoever shows the pictures uses a fixed-width one of his own.
"""

from __future__ import annotations

import argparse
import io
import re
from pathlib import Path
from typing import TYPE_CHECKING, Final

import anyio
from rich._export_format import CONSOLE_SVG_FORMAT
from rich.console import Console
from rich.terminal_theme import TerminalTheme

from coase.agents.compute.find import open_compute
from coase.tools.demo.report import conserved, report
from coase.tools.demo.show import Show, show_outcome
from coase.tools.demo.story import play, shipped_documents

if TYPE_CHECKING:
    from rich.layout import Layout

FOLDER: Final = Path(__file__).resolve().parent.parent / "examples" / "pictures"
COLUMNS: Final = 110
ROWS: Final = 34
FRAME_EVERY_S: Final = 0.25
VERBS: Final = {"agrees", "locks", "delivers", "pays", "refund", "refuses", "disputes", "answers"}
PICTURE_SIZE_MAX_BYTES: Final = 150_000
FONTS: Final = "ui-monospace, 'DejaVu Sans Mono', Menlo, Consolas, monospace"
THEME: Final = TerminalTheme(
    (22, 27, 34),
    (213, 219, 227),
    [
        (72, 79, 88),
        (255, 123, 114),
        (86, 211, 100),
        (227, 179, 65),
        (121, 192, 255),
        (210, 168, 255),
        (86, 212, 221),
        (213, 219, 227),
    ],
    [
        (110, 118, 129),
        (255, 161, 152),
        (126, 231, 135),
        (240, 200, 90),
        (165, 214, 255),
        (226, 197, 255),
        (131, 232, 238),
        (255, 255, 255),
    ],
)


def recording() -> Console:
    """Return a console that draws nothing and remembers everything."""
    return Console(
        record=True,
        file=io.StringIO(),
        width=COLUMNS,
        height=ROWS,
        force_terminal=True,
        color_system="truecolor",
        legacy_windows=False,
    )


def svg(console: Console, title: str, name: str) -> str:
    """Return what the console shows as an SVG that asks nobody for anything."""
    form = re.sub(r"@font-face \{\{.*?\}\}", "", CONSOLE_SVG_FORMAT, flags=re.DOTALL)
    form = re.sub(r"<!-- .*? -->", "", form)
    form = re.sub(r"font-family: (?:Fira Code, monospace|arial);", f"font-family: {FONTS};", form)
    drawn = console.export_svg(title=title, theme=THEME, code_format=form, unique_id=name)
    return "\n".join(line.strip() for line in drawn.splitlines() if line.strip()) + "\n"


class Filmed(Show):
    """The screen of the demo, of which still pictures can be taken."""

    def __init__(self) -> None:
        self.screen = recording()
        super().__init__(self.screen, live=False)
        self.liveliest = -1
        self.frame: Layout | None = None

    def look(self) -> None:
        """Keep the screen as it is now, if there was not more to see before."""
        stages = [stage for _, _, stage, _ in self._open.values()]
        words = {word for line in list(self._lines)[-ROWS:] for word in line.plain.split()}
        lively = 4 * len({*stages}) + 3 * len(words & VERBS) + min(len(stages), 12)
        if lively > self.liveliest:
            self.liveliest, self.frame = lively, self._render()

    def still(self) -> str:
        """Return the picture of the liveliest moment."""
        console = recording()
        console.print(self.frame, height=ROWS)
        return svg(console, "coase demo --seed 7", "live")


async def film(engine: str) -> tuple[Filmed, str]:
    """Play the demo and return its screen and its end, as a picture."""
    shown = Filmed()
    compute = await open_compute(engine)
    try:
        async with anyio.create_task_group() as group:

            async def watch() -> None:
                while True:
                    await anyio.sleep(FRAME_EVERY_S)
                    shown.look()

            group.start_soon(watch)
            outcome = await play(
                shipped_documents(),
                compute,
                seed=b"7",
                on_notice=shown.notice,
                on_progress=shown.progress,
                on_names=shown.know,
            )
            group.cancel_scope.cancel()
        models = await compute.models()
    finally:
        await compute.close()
    if not conserved(outcome) or outcome.failures:
        raise SystemExit(f"the run is none to show: {outcome.failures}")
    console = recording()
    figures = report(outcome, engine=compute.name, model=models[0].name if models else "")
    show_outcome(console, outcome, figures)
    return shown, svg(console, "coase demo --seed 7: the end", "end")


def main() -> None:
    """Write both pictures."""
    parser = argparse.ArgumentParser(description="Draw the pictures of the README.")
    parser.add_argument("--engine", default="llamacpp")
    parser.add_argument("--into", type=Path, default=FOLDER)
    given = parser.parse_args()
    shown, end = anyio.run(film, given.engine)
    given.into.mkdir(parents=True, exist_ok=True)
    for name, drawn in (("demo.svg", shown.still()), ("demo-end.svg", end)):
        if len(drawn) > PICTURE_SIZE_MAX_BYTES:
            raise SystemExit(f"{name} has {len(drawn)} bytes")
        (given.into / name).write_text(drawn)


if __name__ == "__main__":
    main()
