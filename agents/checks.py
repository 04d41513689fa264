"""The deterministic check of a result: the same for the buyer, the arbiter and anybody else."""

from __future__ import annotations

import asyncio
import json
import resource
import signal
import sys
from typing import Any, Final

import anyio
from pydantic_core import from_json

RESULT_SIZE_MAX_BYTES: Final = 8 * 1024 * 1024
COUNTS: Final = ("input_tokens", "output_tokens")
"""Fields of a result that say what it took, as in ``inference``."""


def result_fault(result: str, output_schema: str) -> str:
    """Return what is wrong with ``result`` by its JSON schema, or nothing if it fits."""
    if len(result.encode()) > RESULT_SIZE_MAX_BYTES:
        return f"the result is over {RESULT_SIZE_MAX_BYTES} bytes"
    # Slow to load, and mostly it is the process of a check that needs them.
    import jsonschema
    from jsonschema.validators import validator_for
    from referencing import Registry
    from referencing.exceptions import Unresolvable

    # References within a schema are followed; nothing is ever fetched from anywhere.
    nothing_else: Registry[Any] = Registry()
    try:
        # This parser bounds how deep it goes; the standard library's can end the interpreter.
        made, schema = from_json(result), from_json(output_schema)
        validator = validator_for(schema, default=jsonschema.Draft202012Validator)
        validator.check_schema(schema)
        fault = next(iter(validator(schema, registry=nothing_else).iter_errors(made)), None)
    except (ValueError, RecursionError):
        return "the result or its schema is no JSON"
    except (jsonschema.SchemaError, Unresolvable, TypeError):
        return "the schema itself is not valid"
    return "" if fault is None else f"the result does not fit its schema: {fault.message[:120]}"


# Of the processor, the interpreter's start included: an honest check takes milliseconds, and what
# a busy machine does beside it must not decide who is right.
CHECK_MAX_S: Final = 3
_WAIT_MAX_S: Final = 30.0
ENDLESS: Final = "the check of the result does not end"
_CHECK_MEMORY_MAX_BYTES: Final = 2 * 1024**3


async def fault_in_time(result: str, output_schema: str) -> str:
    """Return what ``result_fault`` returns, from a process of its own with a limit on its time.

    A schema is somebody else's program: a pattern or a nest of references can run for ever, and
    nothing in this process could stop it.
    """
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "coase.agents.checks", str(CHECK_MAX_S)),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL,
    )
    try:
        with anyio.fail_after(_WAIT_MAX_S):
            said, _ = await process.communicate(json.dumps([result, output_schema]).encode())
    except TimeoutError:
        return ENDLESS
    finally:
        if process.returncode is None:
            process.kill()
            with anyio.CancelScope(shield=True):
                await process.wait()
    if process.returncode == 0:
        return str(json.loads(said))
    return ENDLESS if process.returncode == -signal.SIGXCPU else "the check of the result broke off"


def _main(limit_s: int) -> None:
    """Check what standard input says; die with whoever asked."""
    resource.setrlimit(resource.RLIMIT_AS, (_CHECK_MEMORY_MAX_BYTES, _CHECK_MEMORY_MAX_BYTES))
    resource.setrlimit(resource.RLIMIT_CPU, (limit_s, limit_s + 1))
    result, output_schema = json.loads(sys.stdin.read())
    sys.stdout.write(json.dumps(result_fault(result, output_schema)))


if __name__ == "__main__":
    _main(int(sys.argv[1]))
