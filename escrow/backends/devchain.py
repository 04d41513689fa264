"""The embedded chain as a process: ``python -m coase.escrow.backends.devchain``.

It prints one line of JSON when it is ready (endpoint, chain id, addresses) and seals one block a
second. ``start_devchain`` runs it as a child that ends with its parent.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import sys
from contextlib import suppress
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import IO, Any, Final

from coase.protocol.errors import CoaseError, ConfigurationError, JournalFailed

# Loading the machine takes a second; a kept chain is executed again, at 10 ms for a deal's step.
START_MAX_S: Final = 600.0
STOP_MAX_S: Final = 5.0
EXIT_CONFIGURATION: Final = 78  # As sysexits.h has it.
EXIT_JOURNAL: Final = 70
_LINE_MAX_BYTES: Final = 64 * 1024


@dataclass(slots=True)
class DevChain:
    """A running embedded chain and what a client needs to know of it."""

    rpc: str
    chain_id: int
    token: str
    factory: str
    escrow: str
    deployer: str
    vault: str
    """The vault of sellers' stakes; empty on a chain that was begun without."""
    panels: str
    """The factory of panels of arbiters; likewise."""
    channels: str
    """The payment channels; likewise."""
    identity_registry: str
    """ERC-8004's registry of agents; likewise."""
    reputation_registry: str
    """Its registry of what was said of them; likewise."""
    facts: dict[str, Any] = field(repr=False)
    process: asyncio.subprocess.Process = field(repr=False)

    async def close(self) -> None:
        """Stop the process and wait for its end. Safe to repeat."""
        if self.process.stdin is not None:
            self.process.stdin.close()
        try:
            async with asyncio.timeout(STOP_MAX_S):
                await self.process.wait()
        except TimeoutError:
            self.process.kill()
            await self.process.wait()


async def start_devchain(
    *,
    state: Path | None = None,
    chain_id: int | None = None,
    port: int = 0,
    manual: bool = False,
    time_s: int | None = None,
    place: Path | None = None,
    log: IO[bytes] | None = None,
) -> DevChain:
    """Start the embedded chain as a child process and return it once it answers.

    It ends when this process ends, however that ends. ``place`` is a JSON file of accounts for
    the first block: ``{"0x...": {"code": "0x...", "storage": {"0x0": "0x1"}}}``.

    :raises ConfigurationError: if it does not start; with the reason that it gave
    """
    command = [sys.executable, "-m", "coase.escrow.backends.devchain", "--with-parent"]
    command += ["--port", str(port)]
    for name, value in (("state", state), ("chain-id", chain_id), ("time", time_s)):
        command += [] if value is None else [f"--{name}", str(value)]
    command += ["--manual"] if manual else []
    command += [] if place is None else ["--place", str(place)]
    process = await asyncio.create_subprocess_exec(
        *command,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=log,
        limit=_LINE_MAX_BYTES,
        env={"ETH_HASH_BACKEND": "pysha3"} | os.environ,
    )
    if process.stdout is None:
        raise ConfigurationError("the embedded chain has no output")
    try:
        async with asyncio.timeout(START_MAX_S):
            line = await process.stdout.readline()
        facts = json.loads(line) if line.strip() else {}
    except (TimeoutError, ValueError) as error:
        process.kill()
        await process.wait()
        raise ConfigurationError("the embedded chain did not start: see its log") from error
    if "rpc" not in facts:
        await process.wait()
        raise ConfigurationError(str(facts.get("error", "the embedded chain did not start")))
    names = [one.name for one in fields(DevChain) if one.name not in ("facts", "process")]
    return DevChain(**{name: facts[name] for name in names}, facts=facts, process=process)


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m coase.escrow.backends.devchain",
        description="An Ethereum chain for one machine, with Coase's contracts and a faucet.",
    )
    parser.add_argument("--port", type=int, default=0, help="0 takes a free one (loopback only)")
    parser.add_argument("--state", type=Path, help="directory that keeps the chain")
    parser.add_argument("--chain-id", type=int, default=31337)
    parser.add_argument("--manual", action="store_true", help="for tests: blocks on demand")
    parser.add_argument("--time", type=int, help="for tests: where the manual clock begins")
    parser.add_argument("--place", type=Path, help="JSON file of accounts for the first block")
    parser.add_argument(
        "--with-parent", action="store_true", help="end when standard input is closed"
    )
    return parser.parse_args(argv)


def _place(path: Path | None) -> dict[str, Any]:
    from .devchain_engine import Account

    if path is None:
        return {}
    try:
        content = json.loads(path.read_text())
        return {
            where.lower(): Account(
                balance=int(account.get("balance", "0x0"), 16),
                code=bytes.fromhex(account.get("code", "0x")[2:]),
                storage=tuple(
                    sorted((int(k, 16), int(v, 16)) for k, v in account.get("storage", {}).items())
                ),
            )
            for where, account in content.items()
        }
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise ConfigurationError(f"{path} is no file of accounts: {error}") from error


async def _serve(arguments: argparse.Namespace) -> int:
    from .devchain_node import MANUAL_TIME_S, DevNode

    manual_s = (arguments.time or MANUAL_TIME_S) if arguments.manual else None
    node = DevNode(
        state=arguments.state,
        chain_id=arguments.chain_id,
        manual_time_s=manual_s,
        place=_place(arguments.place),
    )
    try:
        try:
            facts = await node.serve(arguments.port)
        except OSError as error:
            raise ConfigurationError(
                f"port {arguments.port} on 127.0.0.1 cannot be used: {error.strerror}"
            ) from error
        sys.stdout.write(json.dumps(facts) + "\n")
        sys.stdout.flush()
        sealing = asyncio.ensure_future(node.run())
        stop = asyncio.ensure_future(_told_to_stop(arguments.with_parent))
        await asyncio.wait([sealing, stop], return_when=asyncio.FIRST_COMPLETED)
        stop.cancel()
        if sealing.done():
            sealing.result()  # It only ends by an error.
        sealing.cancel()
    finally:
        await node.close()
    return 0


async def _told_to_stop(with_parent: bool) -> None:
    loop = asyncio.get_running_loop()
    told = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, told.set)
    if with_parent:
        reader = asyncio.StreamReader()
        await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
        ended = asyncio.ensure_future(reader.read())
        ended.add_done_callback(lambda _: told.set())
    await told.wait()


def main(argv: list[str] | None = None) -> int:
    """Run the embedded chain until it is told to stop; return the exit status."""
    os.environ.setdefault("ETH_HASH_BACKEND", "pysha3")  # Read when the machine is loaded.
    arguments = _arguments(argv)
    try:
        return asyncio.run(_serve(arguments))
    except JournalFailed as error:
        # What it would be written to may lie on the same disk.
        with suppress(OSError):
            sys.stderr.write(f"devchain: {error}\n")
        return EXIT_JOURNAL
    except CoaseError as error:
        sys.stdout.write(json.dumps({"error": str(error)}) + "\n")
        sys.stderr.write(f"devchain: {error}\n")
        return EXIT_CONFIGURATION


if __name__ == "__main__":
    sys.exit(main())
