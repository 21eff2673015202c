"""What llama.cpp is asked, in a process of its own: it ends the process where a file is wrong.

Run by its path, by a Python that has llama-cpp-python and perhaps no halfbyte. It reads one job as
JSON from standard input and writes what came of it as JSON to standard output.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import sys
from typing import Any


def quantize(job: dict[str, Any]) -> dict[str, Any]:
    """The file ``source`` in the type with the number ``type``, written as ``target``."""
    import llama_cpp

    settings = llama_cpp.llama_model_quantize_default_params()
    settings.ftype, settings.nthread = job["type"], job["threads"]
    code = llama_cpp.llama_model_quantize(
        os.fsencode(job["source"]), os.fsencode(job["target"]), ctypes.byref(settings)
    )
    return {"code": int(code)}


def ask(job: dict[str, Any]) -> dict[str, Any]:
    """Tokens of ``texts``, and logits of ``rows`` of ids, into the file ``logits`` (npz)."""
    import llama_cpp
    import numpy as np

    _use_plain_weights(llama_cpp.llama_cpp)
    rows = job["rows"]
    longest = max([len(row) for row in rows], default=8)
    model = llama_cpp.Llama(
        model_path=job["model"],
        lora_path=job.get("lora"),
        n_ctx=max(longest, 8),
        n_batch=max(longest, 8),
        n_threads=job["threads"],
        logits_all=True,
        type_k=0,  # fp32, so that the cache rounds nothing
        type_v=0,
        verbose=False,
    )
    tokens = [
        model.tokenize(text.encode("utf-8"), add_bos=job["special"], special=True)
        for text in job["texts"]
    ]
    logits: dict[str, Any] = {}
    for number, row in enumerate(rows):
        model.reset()
        model.eval(row)
        logits[str(number)] = np.array(model.scores[: len(row)], dtype=np.float32)
    np.savez(job["logits"], **logits)
    return {"tokens": tokens, "version": llama_cpp.__version__}


def _use_plain_weights(library: Any) -> None:
    """Without copies of the weights in the order of a processor's own instructions.

    The file is asked about, not the copies, and those for AMX ended the process with a
    segmentation fault at the first token of a Q8_0 file (llama-cpp-python 0.3.36).
    """
    defaults = library.llama_model_default_params

    def plain() -> Any:
        settings = defaults()
        if hasattr(settings, "use_extra_bufts"):  # not in older versions
            settings.use_extra_bufts = False
        return settings

    library.llama_model_default_params = plain


if __name__ == "__main__":
    asked = json.load(sys.stdin)
    answers = os.dup(1)
    os.dup2(2, 1)  # llama.cpp writes wherever it likes
    with contextlib.redirect_stdout(sys.stderr):
        answer = {"quantize": quantize, "ask": ask}[asked["do"]](asked)
    with os.fdopen(answers, "w", encoding="utf-8") as file:
        json.dump(answer, file)
