"""The deterministic check of a result: the same for the buyer, the arbiter and anybody else."""

from __future__ import annotations

import asyncio
import json
import resource
import sys
from typing import Any, Final

import anyio
import jsonschema
from jsonschema.validators import validator_for
from pydantic_core import from_json
from referencing import Registry
from referencing.exceptions import Unresolvable

RESULT_SIZE_MAX_BYTES: Final = 8 * 1024 * 1024
# References within a schema are followed; nothing is ever fetched from anywhere.
_NOTHING_ELSE: Final[Registry[Any]] = Registry()


def result_fault(result: str, output_schema: str) -> str:
    """Return what is wrong with ``result`` by its JSON schema, or nothing if it fits."""
    if len(result.encode()) > RESULT_SIZE_MAX_BYTES:
        return f"the result is over {RESULT_SIZE_MAX_BYTES} bytes"
    try:
        # This parser bounds how deep it goes; the standard library's can end the interpreter.
        made, schema = from_json(result), from_json(output_schema)
        validator = validator_for(schema, default=jsonschema.Draft202012Validator)
        validator.check_schema(schema)
        fault = next(iter(validator(schema, registry=_NOTHING_ELSE).iter_errors(made)), None)
    except (ValueError, RecursionError):
        return "the result or its schema is no JSON"
    except (jsonschema.SchemaError, Unresolvable, TypeError):
        return "the schema itself is not valid"
    return "" if fault is None else f"the result does not fit its schema: {fault.message[:120]}"


CHECK_MAX_S: Final = 10.0  # The interpreter's start included; an honest check takes milliseconds.
_CHECK_MEMORY_MAX_BYTES: Final = 2 * 1024**3


async def fault_in_time(result: str, output_schema: str) -> str:
    """Return what ``result_fault`` returns, from a process of its own with a limit on its time.

    A schema is somebody else's program: a pattern or a nest of references can run for ever, and
    nothing in this process could stop it.
    """
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "coase.agents.checks"),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL,
    )
    try:
        with anyio.fail_after(CHECK_MAX_S):
            work = json.dumps([result, output_schema]).encode()
            said, _ = await process.communicate(work)
            if process.returncode == 0:
                return str(json.loads(said))
        return "the check of the result broke off"
    except TimeoutError:
        return f"the check of the result took over {CHECK_MAX_S:.0f} s"
    finally:
        if process.returncode is None:
            process.kill()
            with anyio.CancelScope(shield=True):
                await process.wait()


def _main() -> None:
    """Check what standard input says; die with whoever asked."""
    resource.setrlimit(resource.RLIMIT_AS, (_CHECK_MEMORY_MAX_BYTES, _CHECK_MEMORY_MAX_BYTES))
    resource.setrlimit(resource.RLIMIT_CPU, (int(CHECK_MAX_S), int(CHECK_MAX_S) + 1))
    result, output_schema = json.loads(sys.stdin.read())
    sys.stdout.write(json.dumps(result_fault(result, output_schema)))


if __name__ == "__main__":
    _main()
