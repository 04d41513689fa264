"""``coase keys``: make, bring in, list and take out the keys of agents."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, TypeVar

import typer

from coase.protocol.errors import CoaseError, ConfigurationError

from .app import Json, app, emit, fail, out, raise_user, say

if TYPE_CHECKING:
    from coase.agents.config import Network
    from coase.escrow.backends.keystore import KeyFacts, KeyRing
    from coase.escrow.chains import ChainKind
    from coase.protocol.identity import Identity

T = TypeVar("T")

RAW_MAX_BYTES: Final = 256  # 64 digits, a prefix, and somebody's blanks.

keys = typer.Typer(help="Make, import, list and export the keys of agents.", no_args_is_help=True)
app.add_typer(keys, name="keys")

Name = Annotated[str, typer.Argument(help="The agent's name, as its program says it.")]
State = Annotated[
    Path | None,
    typer.Option(help="Directory of one node; without it, those of the network's agents."),
]
PassphraseFd = Annotated[
    int | None,
    typer.Option(
        "--passphrase-fd", min=0, help="Open file descriptor with the pass phrase of the keystore."
    ),
]
FilePassphraseFd = Annotated[
    int | None,
    typer.Option(
        "--file-passphrase-fd", min=0, help="The same for the file that is read or written."
    ),
]
Keyring = Annotated[
    bool, typer.Option("--keyring", help="The pass phrase lies in the system's keyring.")
]


@keys.command("new")
def new(
    name: Name,
    state: State = None,
    passphrase_fd: PassphraseFd = None,
    keyring: Keyring = False,
    json_: Json = False,
) -> None:
    """Make the key of an agent before it first runs, so that it can be funded.

    Example: [b]coase keys new oracle[/b]
    """

    def work() -> dict[str, Any]:
        with _Place(name, state) as place:
            place.require_unknown(name)
            place.open(passphrase_fd, keyring).derive(name)
            return place.document(name)

    _tell(_guarded(work), "made", as_json=json_)


@keys.command("import")
def import_(
    name: Name,
    file: Annotated[
        Path | None, typer.Argument(help="Key file of another wallet (Web3 Secret Storage).")
    ] = None,
    raw: Annotated[
        bool,
        typer.Option("--raw", help="Read 64 hex digits from standard input; not on main chains."),
    ] = False,
    state: State = None,
    passphrase_fd: PassphraseFd = None,
    file_passphrase_fd: FilePassphraseFd = None,
    keyring: Keyring = False,
    json_: Json = False,
) -> None:
    """Take in a key that was made elsewhere; from now on it is that agent's.

    Example: [b]coase keys import oracle UTC--2026-01-01.json[/b]
    """
    if raw == (file is not None):
        raise_user("name the key file of another wallet, or say --raw and give the key on stdin")

    def work() -> dict[str, Any]:
        asked = _Place(name, state)
        asked.require_unknown(name)
        if file is None:
            asked.require_raw()
            identity = _raw_key()
        else:
            identity = _foreign_key(file, file_passphrase_fd)
        with asked as place:
            place.open(passphrase_fd, keyring).add(name, identity)
            return place.document(name)

    _tell(_guarded(work), "imported", as_json=json_)


@keys.command("list")
def list_(state: State = None, json_: Json = False) -> None:
    """List the keys of this user's nodes. Needs no pass phrase.

    Example: [b]coase keys list[/b]
    """
    found = _guarded(lambda: keys_below(state))
    if json_:
        emit([_document(path, facts) for path, facts in found])
        return
    if not found:
        out.print("no keys yet: coase keys new NAME, or run an agent", soft_wrap=True)
        return
    from .look_commands import _table

    table = _table("keys", "agent", "address", "", "node")
    for path, facts in found:
        made = "imported" if facts.imported else ""
        table.add_row(facts.name, facts.address, made, path.name)
    out.print(table)


@keys.command("export")
def export(
    name: Annotated[str, typer.Argument(help="The agent's name, or its address.")],
    to: Annotated[
        Path | None, typer.Option("--out", help="File to write; standard output without.")
    ] = None,
    raw: Annotated[
        bool, typer.Option("--raw", help="64 hex digits in plain; not on main chains.")
    ] = False,
    state: State = None,
    passphrase_fd: PassphraseFd = None,
    file_passphrase_fd: FilePassphraseFd = None,
    keyring: Keyring = False,
    json_: Json = False,
) -> None:
    """Write one key as a file that other wallets read, under a pass phrase of its own.

    Example: [b]coase keys export oracle --out oracle.json[/b]
    """

    def work() -> tuple[dict[str, Any], str]:
        from coase.agents.passphrase import ask_new, read_descriptor
        from coase.escrow.backends.keystore import seal_key, write_secret

        path, facts = _one_key(name, state)
        place = _Place(facts.name, path)
        if raw:
            place.require_raw()
        identity = place.open(passphrase_fd, keyring).derive(facts.name)
        if raw:
            content = identity.secret_for_keystore().hex() + "\n"
        elif file_passphrase_fd is not None:
            content = seal_key(identity, read_descriptor(file_passphrase_fd))
        else:
            content = seal_key(identity, ask_new("pass phrase for the exported file: "))
        if to is not None:
            write_secret(to, content)
        return _document(path, facts) | {"out": str(to) if to is not None else ""}, content

    document, content = _guarded(work)
    if json_:
        emit(document if to is not None else document | {"key": content.strip()})
    elif to is None:
        sys.stdout.write(content)
        sys.stdout.flush()
    else:
        say(f"wrote the key of {document['name']} {document['address']} to {to}")


def keys_below(state: Path | None) -> list[tuple[Path, KeyFacts]]:
    """Return the keys of one node, or of all nodes of this user, with the nodes' directories."""
    from coase.agents.config import state_home
    from coase.escrow.backends.keystore import NAMES_FILE, list_keys

    if state is not None:
        if not state.is_dir():
            raise ConfigurationError(f"{state} is no directory of a node")
        places = [state]
    else:
        places = sorted(path.parent for path in state_home().glob(f"nodes/*/*/{NAMES_FILE}"))
    return [(place, facts) for place in places for facts in list_keys(place)]


def _one_key(name: str, state: Path | None) -> tuple[Path, KeyFacts]:
    found = [
        (path, facts)
        for path, facts in keys_below(state)
        if name == facts.name or name.lower() == facts.address
    ]
    if not found:
        raise ConfigurationError(f"there is no key {name!r}; see them with: coase keys list")
    if len(found) > 1:
        named = ", ".join(f"{facts.address} in {path}" for path, facts in found)
        raise ConfigurationError(f"several keys are called {name!r}: {named}; name the address")
    return found[0]


class _Place:
    """The directory of a node, held while its keys change; and what is at stake there."""

    def __init__(self, name: str, state: Path | None) -> None:
        from coase.agents.config import load_network, network_path
        from coase.escrow.backends.keystore import require_key_name

        from .journals import node_home

        require_key_name(name)
        self.network: Network | None = None
        if state is None or network_path().exists():
            self.network = load_network()
        if state is None and self.network is not None:
            state = node_home(self.network) / name
        assert state is not None
        self.path = state

    def __enter__(self) -> _Place:
        from coase.agents.backends.sqlite import StateDirectory

        self._held = StateDirectory(self.path)
        return self

    def __exit__(self, *_: object) -> None:
        self._held.release()

    @property
    def chain(self) -> ChainKind:
        from coase.agents.wiring import chain_kind
        from coase.escrow.chains import ChainKind

        return ChainKind.MAIN if self.network is None else chain_kind(self.network)

    def require_unknown(self, name: str) -> None:
        """Return if there is no key of that name here."""
        from coase.escrow.backends.keystore import names_in

        if known := names_in(self.path).get(name):
            raise ConfigurationError(
                f"{name} has a key already: {known} in {self.path}; nothing was changed"
            )

    def require_raw(self) -> None:
        """Return if keys may be seen in plain here; warn where that is unwise."""
        from coase.escrow.chains import ChainKind, name_of_chain

        if self.network is None:
            where = "without a network file it is not known on which chain this key holds money"
        else:
            where = name_of_chain(self.network.chain_id) + " is a main chain"
        if self.chain is ChainKind.MAIN:
            raise ConfigurationError(
                f"{where}, and there no key is read or shown in plain: use an encrypted key file"
            )
        if self.chain is ChainKind.TEST:
            say("a key that was seen in plain: never use it where money is real", style="yellow")

    def open(self, passphrase_fd: int | None, keyring: bool) -> KeyRing:
        from coase.agents.passphrase import find_passphrase
        from coase.agents.wiring import is_local
        from coase.escrow.backends.keystore import open_keyring

        local = self.network is not None and is_local(self.network)
        phrase = find_passphrase(self.path, local=local, fd=passphrase_fd, keyring=keyring)
        return open_keyring(self.path, passphrase=phrase)

    def document(self, name: str) -> dict[str, Any]:
        from coase.escrow.backends.keystore import list_keys

        facts = next(facts for facts in list_keys(self.path) if facts.name == name)
        return _document(self.path, facts)


def _raw_key() -> Identity:
    """Return the key on standard input, or the one that is typed unseen."""
    from coase.agents.passphrase import ask, can_ask
    from coase.escrow.backends.keystore import identity_from_hex

    if can_ask():
        text = ask("private key (64 hex digits, not shown): ")
    else:
        text = sys.stdin.buffer.read(RAW_MAX_BYTES).decode("ascii", errors="replace")
    return identity_from_hex(text)


def _foreign_key(file: Path, fd: int | None) -> Identity:
    from coase.agents.passphrase import ask, read_descriptor
    from coase.escrow.backends.keystore import open_key_file, read_key_file

    read_key_file(file)  # What is wrong with the file is said before anybody is asked.
    phrase = read_descriptor(fd) if fd is not None else ask(f"pass phrase of {file}: ")
    return open_key_file(file, phrase)


def _document(path: Path, facts: KeyFacts) -> dict[str, Any]:
    return {
        "name": facts.name,
        "address": facts.address,
        "imported": facts.imported,
        "node": path.name,
        "state": str(path),
    }


def _guarded(work: Callable[[], T]) -> T:
    try:
        return work()
    except (CoaseError, OSError) as error:
        fail(error)


def _tell(document: dict[str, Any], did: str, *, as_json: bool) -> None:
    if as_json:
        emit(document)
        return
    out.print(
        f"{did} {document['name']} {document['address']}, kept in {document['state']}",
        highlight=False,
        soft_wrap=True,
    )
