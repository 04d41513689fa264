"""The engine's own process: llama.cpp's server, on loopback, behind a key, until stdin closes.

Run as a script, not as a module, so that it loads the engine and nothing of ours. A process of
its own because (measured on two cores) the engine's threads spin at barriers, which slows it a
hundredfold when something else needs the cores unless OMP_WAIT_POLICY is passive *before* its
runtime loads; because a crash in its C++ must not take the agents along; and because closing
it is the only way to get all of its memory back.

It reads one JSON line of settings, writes one JSON line (``address`` or ``error``), and ends
when its parent closes the pipe or dies.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any


def start(settings: dict[str, Any]) -> Any:
    """Load the model and return the running server.

    :raises ImportError: if the engine or a system library of it is missing
    :raises RuntimeError: if the engine refuses the model
    """
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = settings["model"]
    params.model_alias = settings["name"]
    params.hostnames = ["127.0.0.1"]
    params.port = 0  # The system picks a free one.
    params.api_keys = [settings["api_key"]]
    params.ui = False
    params.cors_origins = ""
    params.offline = True
    params.verbosity = -1
    if settings.get("chat_template"):
        params.chat_template = settings["chat_template"]
    params.n_parallel = settings["slots"]
    params.n_ctx = settings["slots"] * settings["context_tokens"]
    params.cpuparams.n_threads = settings["threads"]
    params.cpuparams_batch.n_threads = settings["threads"]
    if settings.get("embedding"):
        params.embedding = True
        # A text that is embedded is read at once, whatever its length.
        params.n_batch = params.n_ubatch = settings["context_tokens"]
        if not settings["pooled"]:
            params.pooling_type = xllamacpp.llama_pooling_type.LLAMA_POOLING_TYPE_MEAN
        return xllamacpp.Server(params)
    # Same seed, same text, also when other requests share the batch or a prefix is cached. With
    # the engine's own choice, numbers are added up in another order for a batch of one, and 5 to
    # 21 of 24 answers changed beside other requests; without flash attention, 3 of 12 changed
    # with the cache. Flash attention over an 8-bit cache, not shared by the slots, takes one
    # path only: 44 of 44 agreed, and the cache is half the size.
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_ENABLED
    params.cache_type_k = xllamacpp.ggml_type.GGML_TYPE_Q8_0
    params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_Q8_0
    params.kv_unified = False
    # Slots keep their last prompt; the second cache in memory may grow to 8 GiB by default.
    params.cache_ram_mib = 0
    return xllamacpp.Server(params)


def main() -> None:
    """Serve until the parent goes."""
    answer = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # Whatever the engine prints goes to the log, not into our one line.
    settings = json.loads(sys.stdin.readline())
    try:
        server = start(settings)
    except ImportError as error:
        print(json.dumps({"error": "import", "why": str(error)}), file=answer, flush=True)
        return
    except RuntimeError as error:
        print(json.dumps({"error": "load", "why": str(error)}), file=answer, flush=True)
        return
    print(json.dumps({"address": server.listening_address}), file=answer, flush=True)
    sys.stdin.read()  # Ends when the parent closes the pipe, or is no more.
    # No tidy end: it would wait for requests that nobody reads any more.
    os._exit(0)


if __name__ == "__main__":
    main()
