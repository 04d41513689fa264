"""The deterministic check of a result: the same for the buyer, the arbiter and anybody else."""

from __future__ import annotations

import json
from typing import Final

import jsonschema

RESULT_SIZE_MAX_BYTES: Final = 8 * 1024 * 1024


def result_fault(result: str, output_schema: str) -> str:
    """Return what is wrong with ``result`` by its JSON schema, or nothing if it fits."""
    if len(result.encode()) > RESULT_SIZE_MAX_BYTES:
        return f"the result is over {RESULT_SIZE_MAX_BYTES} bytes"
    try:
        jsonschema.validate(json.loads(result), json.loads(output_schema))
    except (ValueError, RecursionError):
        return "the result is no JSON"
    except jsonschema.ValidationError as error:
        return f"the result does not fit its schema: {error.message[:120]}"
    except jsonschema.SchemaError:
        return "the schema itself is not valid"
    return ""
