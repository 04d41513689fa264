"""A test of the code base itself: what style, types and layers do not see.

Each rule is a function from one file to its offences. Beside every rule stands a sample that breaks
it, so that a rule which has gone blind fails as well.
"""

from __future__ import annotations

import ast
import json
import re
import statistics
import subprocess
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Final

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

ROOT: Final = Path(__file__).resolve().parent.parent
PACKAGES: Final = ("protocol", "negotiation", "escrow", "agents", "tools", "examples")
PURE_PACKAGES: Final = ("protocol", "negotiation", "escrow")
OTHER_TEST_FOLDERS: Final = ("conformance", "simulation", "live", "lan", "bench", "vectors")

MODULE_MAX_LINES: Final = 800
MODULE_MEDIAN_MAX_LINES: Final = 300
FUNCTION_MAX_LINES: Final = 70
FILE_SIZE_MAX_BYTES: Final = 1_000_000

FunctionNode = (ast.FunctionDef, ast.AsyncFunctionDef)

pytestmark = pytest.mark.xdist_group("tidy")  # Each file is read and parsed once.


# ---- Reading the repository ------------------------------------------------------------------


@cache
def files() -> tuple[Path, ...]:
    """Everything that is in the repository or is about to be."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    try:
        listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("a copy without its history cannot tell its own files from others")
    paths = (ROOT / name for name in listed.stdout.split("\0") if name)
    return tuple(sorted(path for path in paths if path.is_file() and not path.is_symlink()))


def of_kind(*suffixes: str, under: tuple[str, ...] = ()) -> list[Path]:
    """The files with one of these suffixes, in some of the folders at the root or in all."""
    return [
        path
        for path in files()
        if path.suffix in suffixes and (not under or path.relative_to(ROOT).parts[0] in under)
    ]


@cache
def parsed(path: Path) -> ast.Module:
    """The syntax tree of a file of Python."""
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def offences(paths: list[Path], rule: Callable[[ast.Module], Iterator[str]]) -> list[str]:
    """What a rule has to say about these files, each line with its place."""
    return [f"{path.relative_to(ROOT)}:{found}" for path in paths for found in rule(parsed(path))]


def is_pure(path: Path) -> bool:
    """Whether a file lies directly in one of the packages that take the world as arguments."""
    package, *rest = path.relative_to(ROOT).parts
    return package in PURE_PACKAGES and len(rest) == 1


def pure_modules() -> list[Path]:
    """The modules of the core: neither backends nor contracts."""
    return [path for path in of_kind(".py", under=PURE_PACKAGES) if is_pure(path)]


# ---- Size ------------------------------------------------------------------------------------


def long_functions(tree: ast.Module) -> Iterator[str]:
    """Functions that do not fit on a screen and a half."""
    for node in ast.walk(tree):
        if isinstance(node, FunctionNode):
            lines = (node.end_lineno or node.lineno) - node.lineno + 1
            if lines > FUNCTION_MAX_LINES:
                yield f"{node.lineno}: {node.name} has {lines} lines"


def line_count(path: Path) -> int:
    """Lines of a text file."""
    return len(path.read_text(encoding="utf-8").splitlines())


def test_no_function_is_long() -> None:
    assert offences(of_kind(".py"), long_functions) == []


def test_no_module_is_long() -> None:
    counts = {path.relative_to(ROOT): line_count(path) for path in of_kind(".py", ".sol")}
    assert {path: lines for path, lines in counts.items() if lines > MODULE_MAX_LINES} == {}


def test_modules_are_few_and_deep_but_not_huge() -> None:
    counts = [line_count(p) for p in of_kind(".py", under=PACKAGES) if p.name != "__init__.py"]
    assert statistics.median(counts) <= MODULE_MEDIAN_MAX_LINES


def test_no_file_is_heavy() -> None:
    heavy = [path for path in files() if path.stat().st_size > FILE_SIZE_MAX_BYTES]
    assert [str(path.relative_to(ROOT)) for path in heavy] == []


# ---- Errors ----------------------------------------------------------------------------------


def broad_catches(tree: ast.Module) -> Iterator[str]:
    """Handlers that would swallow a defect. To clean up and raise again is no swallowing."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.ExceptHandler):
            continue
        caught = node.type.elts if isinstance(node.type, ast.Tuple) else [node.type]
        names = {ast.unparse(kind) if kind else "" for kind in caught}
        if "Exception" in names:
            yield f"{node.lineno}: catches Exception"
        elif names & {"", "BaseException"} and not _raises_again(node):
            yield f"{node.lineno}: swallows everything"


def _raises_again(handler: ast.ExceptHandler) -> bool:
    last = handler.body[-1]
    return isinstance(last, ast.Raise) and last.exc is None


# Two places where one failure must not become everybody's: a child, and a transport's callback.
MAY_CATCH_EVERYTHING: Final = ("agents/supervisor.py", "protocol/backends/delivery.py")


def test_only_the_supervisor_catches_everything() -> None:
    paths = [p for p in of_kind(".py") if str(p.relative_to(ROOT)) not in MAY_CATCH_EVERYTHING]
    assert offences(paths, broad_catches) == []


# ---- Purity ----------------------------------------------------------------------------------

# A clock, chance, a network, a disk or an event loop each comes in through one of these.
WORLDLY: Final = frozenset(
    "aiohttp anyio asyncio concurrent datetime eth_tester fcntl glob http httpx io logging"
    " multiprocessing nats ollama os pathlib queue random requests rich sched secrets select"
    " selectors shutil signal socket socketserver sqlite3 ssl subprocess sys tempfile threading"
    " time trio typer urllib uuid web3 websockets xllamacpp zeroconf".split()
)
WORLDLY_CALLS: Final = frozenset({"open", "print", "input", "breakpoint", "exec", "eval"})


def worldly(tree: ast.Module) -> Iterator[str]:
    """Imports and calls by which time, chance, bytes or another thread could get in."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for name in (alias.name for alias in node.names):
                if name.split(".")[0] in WORLDLY or "backends" in name.split("."):
                    yield f"{node.lineno}: imports {name}"
        elif isinstance(node, ast.ImportFrom):
            parts = (node.module or "").split(".") + [alias.name for alias in node.names]
            if (parts[0] in WORLDLY and not node.level) or "backends" in parts:
                yield f"{node.lineno}: imports from {'.' * node.level}{node.module or ''}"
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            if node.func.id in WORLDLY_CALLS:
                yield f"{node.lineno}: calls {node.func.id}"


def test_the_core_is_pure() -> None:
    assert offences(pure_modules(), worldly) == []


# ---- Money -----------------------------------------------------------------------------------

MONEY: Final = frozenset(
    "amount balance bond budget cost deposit fee money payment penalty price stake units".split()
)
# price_ttl_s, bond_share and the like say how long or how much of money, and are not money.
NOT_MONEY_LAST: Final = frozenset(
    "bps bytes count digest factor hash id max min ms name ratio rounds s secs share text weight"
    .split()
)  # fmt: skip


def names_money(name: str) -> bool:
    """Whether an identifier is one of an amount."""
    words = name.lower().strip("_").split("_")
    while words and words[-1] in {"max", "min"}:
        words.pop()
    return bool(words) and words[-1] not in NOT_MONEY_LAST and not MONEY.isdisjoint(words)


def _is_money(node: ast.AST | None) -> bool:
    if isinstance(node, ast.Name):
        return names_money(node.id)
    return isinstance(node, ast.Attribute) and names_money(node.attr)


def _is_float(node: ast.AST | None) -> bool:
    if isinstance(node, ast.BinOp):
        return _is_float(node.left) or _is_float(node.right)
    if isinstance(node, ast.Call):
        return isinstance(node.func, ast.Name) and node.func.id == "float"
    return isinstance(node, ast.Constant) and isinstance(node.value, float)


def _says_float(annotation: ast.AST | None) -> bool:
    return annotation is not None and "float" in re.findall(r"\w+", ast.unparse(annotation))


def _float_meets_money(node: ast.AST) -> bool:
    match node:
        case ast.BinOp(left=left, right=right, op=op):
            divided = isinstance(op, ast.Div) and (_is_money(left) or _is_money(right))
            return divided or _one_of_each(left, right)
        case ast.Compare(left=left, comparators=[right]):
            return _one_of_each(left, right)
        case ast.Assign(targets=[target], value=value):
            return _is_money(target) and _is_float(value)
        case ast.AnnAssign(target=target, annotation=annotation, value=value):
            return _is_money(target) and (_is_float(value) or _says_float(annotation))
        case ast.arg(arg=name, annotation=annotation):
            return names_money(name) and _says_float(annotation)
        case ast.keyword(arg=str(name), value=value):
            return names_money(name) and _is_float(value)
        case ast.Call(func=ast.Name(id="float"), args=[value]):
            return _is_money(value)
    return False


def _one_of_each(left: ast.AST, right: ast.AST) -> bool:
    return (_is_money(left) and _is_float(right)) or (_is_float(left) and _is_money(right))


def float_money(tree: ast.Module) -> Iterator[str]:
    """Places where an amount is, becomes or meets a binary fraction."""
    for node in ast.walk(tree):
        if _float_meets_money(node):
            place = getattr(node, "lineno", 0)
            yield f"{place}: {ast.unparse(node)}"


def test_money_never_meets_a_float() -> None:
    assert offences(of_kind(".py", under=(*PURE_PACKAGES, "agents")), float_money) == []


# ---- Words -----------------------------------------------------------------------------------

# "Do not say" of the glossary, as far as no standard that we implement says it itself.
NOT_OUR_WORDS: Final = {
    "bot": "agent",
    "cheque": "voucher",
    "collateral": "stake",
    "finalise": "poke or settle",
    "finalize": "poke or settle",
    "provider": "seller",
    "quote": "offer",
    "rfq": "request",
    "skill": "capability",
}


def _defined_names(tree: ast.Module) -> Iterator[tuple[int, str]]:
    for node in ast.walk(tree):
        if isinstance(node, (*FunctionNode, ast.ClassDef)):
            yield node.lineno, node.name
        elif isinstance(node, ast.arg):
            yield node.lineno, node.arg
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            yield node.lineno, node.target.id


def foreign_words(tree: ast.Module) -> Iterator[str]:
    """Names that use another word for something that the glossary names."""
    for line, name in _defined_names(tree):
        for word in re.findall(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])", name):
            if better := NOT_OUR_WORDS.get(word.lower()):
                yield f"{line}: {name}: we say {better}"


def test_the_core_speaks_the_glossary() -> None:
    paths = [p for p in pure_modules() if p.relative_to(ROOT).parts[0] != "escrow"]
    assert offences(paths, foreign_words) == []


UNFINISHED: Final = re.compile(r"\b(?:TODO|FIXME|XXX|HACK)\b")
# Folders of a single machine, and places where packages come from: both differ elsewhere.
MACHINE_PATH: Final = re.compile(r"(?<![\w.$}~-])/(?:root|work|home/\w+)/\w")
REGISTRY: Final = re.compile(
    r"\b(?:pypi\.org|files\.pythonhosted\.org|registry\.npmjs\.org|registry\.yarnpkg\.com)\b"
)


def words_that(pattern: re.Pattern[str], *, but: tuple[Path, ...] = ()) -> list[str]:
    """Every line of text in the repository that matches."""
    found = []
    for path in files():
        if path in (Path(__file__).resolve(), *but):
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        for number, line in enumerate(text.splitlines(), start=1):
            if match := pattern.search(line):
                found.append(f"{path.relative_to(ROOT)}:{number}: {match.group()}")
    return found


def test_nothing_is_left_for_later_in_a_comment() -> None:
    assert words_that(UNFINISHED, but=(ROOT / "LICENSE",)) == []


def test_no_path_of_one_machine() -> None:
    assert words_that(MACHINE_PATH) == []


def test_no_address_of_a_registry() -> None:
    assert words_that(REGISTRY) == []


# ---- Links -----------------------------------------------------------------------------------

LINK: Final = re.compile(r"\[[^\]]*\]\((?!\w+:)([^)\s]+)(?:\s+\"[^\"]*\")?\)")
FENCED: Final = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)
HEADING: Final = re.compile(r"^#+\s+(.*?)\s*#*$", re.MULTILINE)


def anchors(text: str) -> set[str]:
    """The names by which a rendered page's headings are reached."""
    titles = (title.lower() for title in HEADING.findall(FENCED.sub("", text)))
    return {re.sub(r"[^\w\- ]", "", title).replace(" ", "-") for title in titles}


def broken_links(page: Path) -> Iterator[str]:
    """Relative links of a page that lead nowhere."""
    for target in LINK.findall(FENCED.sub("", page.read_text(encoding="utf-8"))):
        name, _, fragment = target.partition("#")
        reached = (page.parent / name).resolve() if name else page
        if not reached.exists():
            yield target
        elif fragment and reached.suffix == ".md":
            if fragment not in anchors(reached.read_text(encoding="utf-8")):
                yield target


def test_links_lead_somewhere() -> None:
    pages = of_kind(".md")
    assert [f"{p.relative_to(ROOT)}: {link}" for p in pages for link in broken_links(p)] == []


# ---- Where things lie ------------------------------------------------------------------------


def misplaced_tests(names: list[str], folders: set[str]) -> list[str]:
    """Files under tests/ that mirror no package and are in no known folder."""
    found = []
    for name in names:
        *above, _ = Path(name).parts
        known = not above or above[0] in OTHER_TEST_FOLDERS or "/".join(above) in folders
        if not known or name.endswith("__init__.py"):
            found.append(name)
    return found


def test_tests_mirror_the_packages() -> None:
    names = [str(p.relative_to(ROOT / "tests")) for p in of_kind(".py", under=("tests",))]
    folders = {str(path.parent.relative_to(ROOT)) for path in of_kind(".py", under=PACKAGES)}
    assert misplaced_tests(names, folders) == []


def test_every_package_says_that_it_is_typed() -> None:
    packages = [p.parent for p in of_kind(".py", under=PACKAGES) if p.name == "__init__.py"]
    untyped = [str(p.relative_to(ROOT)) for p in packages if not (p / "py.typed").exists()]
    assert packages
    assert untyped == []


def test_every_contract_has_its_artifact() -> None:
    contracts = ROOT / "escrow" / "contracts"
    declared = re.compile(r"^contract (\w+)", re.MULTILINE)
    sources = sorted((contracts / "src").rglob("*.sol"))
    names = {name for path in sources for name in declared.findall(path.read_text("utf-8"))}
    assert "JobEscrow" in names
    for name in sorted(names):
        artifact = json.loads((contracts / "artifacts" / f"{name}.json").read_text("utf-8"))
        assert artifact["abi"], name
        assert re.fullmatch(r"0x[0-9a-f]{200,}", artifact["bytecode"]), name


# ---- The rules themselves --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rule", "sample"),
    [
        (long_functions, "def f():\n" + "    pass\n" * FUNCTION_MAX_LINES),
        (broad_catches, "try:\n    f()\nexcept Exception:\n    pass"),
        (broad_catches, "try:\n    f()\nexcept (ValueError, Exception):\n    raise"),
        (broad_catches, "try:\n    f()\nexcept:\n    pass"),
        (broad_catches, "try:\n    f()\nexcept BaseException as error:\n    raise E from error"),
        (worldly, "import time"),
        (worldly, "def f():\n    from asyncio import sleep"),
        (worldly, "import web3.types"),
        (worldly, "from .backends import memory"),
        (worldly, "from coase.escrow.backends.memory import MemoryChain"),
        (worldly, "open('x')"),
        (float_money, "price_units = 0.5"),
        (float_money, "price_units: float = 1"),
        (float_money, "def f(*, budget_max: float | None) -> None: ..."),
        (float_money, "x = self.price / 2"),
        (float_money, "x = 1.1 * job.bond"),
        (float_money, "offer(price=2.5)"),
        (float_money, "if price_units > 0.1: ..."),
        (float_money, "float(voucher.units)"),
        (foreign_words, "class ProviderOffer: ..."),
        (foreign_words, "def finalize(x): ..."),
        (foreign_words, "def f(quote_units): ..."),
    ],
)
def test_a_rule_sees_its_sample(rule: Callable[[ast.Module], Iterator[str]], sample: str) -> None:
    assert len(list(rule(ast.parse(sample)))) >= 1


@pytest.mark.parametrize(
    ("rule", "sample"),
    [
        (long_functions, "def f():\n" + "    pass\n" * (FUNCTION_MAX_LINES - 1)),
        (broad_catches, "try:\n    f()\nexcept BaseException:\n    undo()\n    raise"),
        (worldly, "import json\nfrom .types import Money\nself.open('x')"),
        (float_money, "price_ttl_s = 0.5\nprice_units = units * 3 // 2\nratio = 0.5"),
        (foreign_words, "class Seller: ...\ndef settle(offer): ..."),
    ],
)
def test_a_rule_lets_good_code_pass(
    rule: Callable[[ast.Module], Iterator[str]], sample: str
) -> None:
    assert list(rule(ast.parse(sample))) == []


@pytest.mark.parametrize(
    ("pattern", "bad", "good"),
    [
        (UNFINISHED, "# TODO: later", "# Todor wrote this"),
        (MACHINE_PATH, 'open("/root/x")', "the files of /root and of ./work/x"),
        (MACHINE_PATH, "cd /work/main", "docs/work/main"),
        (REGISTRY, '"resolved": "https://registry.npmjs.org/x"', "the registry of npm"),
    ],
)
def test_a_pattern_sees_what_it_should(pattern: re.Pattern[str], bad: str, good: str) -> None:
    assert pattern.search(bad)
    assert not pattern.search(good)


def test_a_broken_link_is_seen(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "# One title\n[a](page.md) [b](gone.md) [c](#one-title) [d](#no) [e](https://x.y/z)\n"
        "```\n[f](not-a-link.md)\n```\n"
    )
    assert list(broken_links(page)) == ["gone.md", "#no"]


def test_a_misplaced_test_is_seen() -> None:
    names = ["test_tidy.py", "protocol/test_a.py", "elsewhere/test_b.py", "live/__init__.py"]
    assert misplaced_tests(names, {"protocol"}) == ["elsewhere/test_b.py", "live/__init__.py"]
