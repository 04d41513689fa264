"""Ask the registry whether everything installs without a compiler on every platform we name.

Each Python and each processor is resolved with wheels only, under ``constraints.txt``. Three
outcomes: all is well; something has no wheel, or is not pinned, which fails; or the registry does
not answer, which is said and does not fail, since it says nothing about this code.
"""

from __future__ import annotations

import subprocess
import sys
import tomllib
from itertools import product
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).resolve().parent.parent
UV: Final = Path(sys.executable).parent / "uv"
PYTHONS: Final = ("3.11", "3.12", "3.13")
# glibc 2.28 is that of Debian 10 and below that of every Ubuntu since 18.10.
PLATFORMS: Final = ("x86_64-manylinux_2_28", "aarch64-manylinux_2_28")
UNSOLVABLE: Final = 1  # uv's exit code for "no solution"; 2 is everything else, the network first.


def compile_for(python: str, platform: str, *arguments: str, text: str = "") -> tuple[int, str]:
    """Resolve with wheels only; the exit code of uv, and its answer or its complaint."""
    command = [str(UV), "pip", "compile", "--quiet", "--no-header", "--no-annotate"]
    command += ["--only-binary", ":all:", "--python-version", python, "--python-platform", platform]
    done = subprocess.run(
        [*command, *arguments], cwd=ROOT, input=text, capture_output=True, text=True
    )
    return done.returncode, done.stdout if done.returncode == 0 else done.stderr


def pins(text: str) -> set[str]:
    """The ``name==version`` parts of a list of requirements."""
    return {line.split(";")[0].strip() for line in text.splitlines() if "==" in line}


def main() -> int:
    """Check every combination; stop at the first that fails."""
    pinned = pins((ROOT / "constraints.txt").read_text())
    with (ROOT / "pyproject.toml").open("rb") as file:
        model: str = tomllib.load(file)["tool"]["coase"]["model"]
    project = ("pyproject.toml", "--all-extras", "--group", "dev", "-c", "constraints.txt")
    for python, platform in product(PYTHONS, PLATFORMS):
        code, answer = compile_for(python, platform, *project)
        if code == 0:
            if loose := pins(answer) - pinned:
                print(f"not in constraints.txt: {', '.join(sorted(loose))}: make lock")
                return 1
            code, answer = compile_for(python, platform, "--no-deps", "-", text=model)
        if code == UNSOLVABLE:
            print(f"Python {python} on {platform}:\n{answer}")
            return 1
        if code != 0:
            print(f"wheels NOT CHECKED, the registry does not answer: {answer.splitlines()[0]}")
            return 0
    print(f"wheels for {len(PYTHONS)} Pythons on {len(PLATFORMS)} platforms: all there")
    return 0


if __name__ == "__main__":
    sys.exit(main())
