"""The deterministic check of a result: the same for the buyer, the arbiter and anybody else."""

from __future__ import annotations

from typing import Any, Final

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
