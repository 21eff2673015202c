"""What a model is shown, and where its answer ends."""

from __future__ import annotations

from typing import Any

from halfbyte.data.batch import Segment
from halfbyte.data.chat_render import ChatRender, TemplateFailed
from halfbyte.data.chat_template import own_template
from halfbyte.data.tokenize import tokenize_rows


def prompt_ids(tokenizer: Any, prompt: str) -> list[int]:
    """Token ids of a rendered prompt, as training makes them.

    The beginning-of-sequence token stands there where the tokenizer adds it, once: a template may
    have written it already. Nothing is added at the end, since an answer follows.
    """
    (row,) = tokenize_rows(tokenizer, [[Segment(prompt, False)]], [0])
    return [int(token) for token in row.input_ids]


def end_ids(network: Any, tokenizer: Any) -> set[int]:
    """The tokens that end an answer.

    Those that the model's files name (its generation settings, its configuration), the
    tokenizer's end of sequence, and the one that the chat template writes after an answer: a base
    model's end of sequence is often another than the end of its turns.
    """
    found: set[int] = set()
    for config in (
        getattr(network, "generation_config", None),
        network.config,
        network.config.get_text_config(),
    ):
        named = getattr(config, "eos_token_id", None)
        found.update([named] if isinstance(named, int) else named or [])
    if tokenizer.eos_token_id is not None:
        found.add(tokenizer.eos_token_id)
    turn = _end_of_turn(tokenizer)
    if turn is not None:
        found.add(turn)
    return found


def _end_of_turn(tokenizer: Any) -> int | None:
    template = own_template(tokenizer)
    if template is None:
        return None
    said = "halfbyte"
    messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": said}]
    try:
        [text] = ChatRender(template, tokenizer)([messages], generate=False)
    except TemplateFailed:
        return None  # a template that does not take these two messages says nothing about them
    after = text.rpartition(said)[2].lstrip()
    ids = tokenizer(after, add_special_tokens=False, verbose=False)["input_ids"] if after else []
    return ids[0] if ids and ids[0] in tokenizer.added_tokens_decoder else None
