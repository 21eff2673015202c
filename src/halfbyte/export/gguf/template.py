"""The chat template of a GGUF file, and whether llama.cpp puts a space before its text.

SentencePiece's tokenizers put a space before a text. transformers does so at its very beginning;
llama.cpp does so behind every special token too, or nowhere. A chat template that writes the space
itself, because transformers puts none behind a beginning-of-sequence token, would get two of them.
So the ways that there are are tried on conversations, and the one is taken whose tokens are those
that were trained.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Any

from halfbyte.data.chat_render import ChatRender, TemplateFailed
from halfbyte.export.gguf.turn_format import Messages, trial_conversations
from halfbyte.export.gguf.vocabulary import Vocabulary
from halfbyte.generate.prompt import prompt_ids

_SPACE = "\u2581"
_WITH_SPACE, _WITHOUT = "bos_token + ' '", "bos_token"
LATER_TURNS = (
    "llama.cpp puts a space behind each special token, which the tokenizer does not: questions "
    "after the first have one token more there than in training"
)
NO_FIRST_SPACE = (
    "llama.cpp puts no space before a text of this file, as conversations need it: write one "
    "before a prompt that no chat template makes"
)


@dataclass(frozen=True)
class FileTemplate:
    """The template and the vocabulary that make the trained tokens in llama.cpp."""

    template: str | None
    vocabulary: Vocabulary
    notes: tuple[str, ...] = ()


def choose_template(
    tokenizer: Any, template: str | None, vocabulary: Vocabulary, *, texts: bool = False
) -> FileTemplate:
    """What of ``template`` (Jinja, as it was trained) and the space before a text goes into a file.

    ``tokenizer`` (transformers) is the one that was trained with; ``texts``: what was trained are
    texts and no conversations. Where a prompt is plain text that people also write by hand, as in
    the instruction formats, it gets its space from llama.cpp, though later turns then have one too.
    """
    as_it_is = FileTemplate(template, vocabulary)
    if template is None or vocabulary.model != "llama" or not vocabulary.add_space_prefix:
        return as_it_is
    talks = trial_conversations(system=False)
    try:
        wanted = [prompt_ids(tokenizer, text) for text in _texts(template, tokenizer, talks)]
    except TemplateFailed:
        return as_it_is
    spaceless = template.replace(_WITH_SPACE, _WITHOUT)
    tried = [
        FileTemplate(template, vocabulary),
        FileTemplate(spaceless, vocabulary),
        FileTemplate(template, replace(vocabulary, add_space_prefix=False), (NO_FIRST_SPACE,)),
    ]
    equal = [_equal(one, tokenizer, talks, wanted) for one in tried]
    whole = [one for one, same in zip(tried, equal, strict=True) if all(same)]
    begun = [one for one, same in zip(tried, equal, strict=True) if same[0]]
    if texts or _is_plain(tokenizer, _texts(template, tokenizer, talks)[0], wanted[0]):
        whole = [one for one in whole if one.vocabulary.add_space_prefix]
    if whole:
        return whole[0]
    return replace((begun or tried)[0], notes=(LATER_TURNS,))


def _is_plain(tokenizer: Any, text: str, ids: list[int]) -> bool:
    """Whether ``text`` without the beginning of sequence is a text of the same tokens ``ids``."""
    bare = text.removeprefix(tokenizer.bos_token or "").removeprefix(" ")
    special = any(bare.startswith(t.content) for t in tokenizer.added_tokens_decoder.values())
    return not special and prompt_ids(tokenizer, bare) == ids


def llama_cpp_ids(tokenizer: Any, text: str, vocabulary: Vocabulary) -> list[int]:
    """Token ids of ``text`` as llama.cpp makes them of a file with ``vocabulary`` (``llama``).

    Special tokens are looked for in ``text``; the beginning-of-sequence token is put before it
    where the file says so and it is not there already.
    """
    added = {t.content: i for i, t in tokenizer.added_tokens_decoder.items()}
    pattern = "|".join(re.escape(t) for t in sorted(added, key=len, reverse=True))
    parts = re.split(f"({pattern})", text) if added else [text]
    ids: list[int] = []
    behind_special = True
    for part in parts:
        if part in added:
            ids.append(added[part])
            behind_special = True
        elif part:
            spaced = f" {part}" if vocabulary.add_space_prefix and behind_special else part
            model = tokenizer.backend_tokenizer.model
            ids += [token.id for token in model.tokenize(spaced.replace(" ", _SPACE))]
            behind_special = False
    lead = [vocabulary.bos] if vocabulary.add_bos and vocabulary.bos is not None else []
    return ids if not lead or ids[:1] == lead else [*lead, *ids]


def _texts(template: str, tokenizer: Any, talks: list[Messages]) -> list[str]:
    return ChatRender(template, tokenizer)(talks, generate=True)


def _equal(
    one: FileTemplate, tokenizer: Any, talks: list[Messages], wanted: list[list[int]]
) -> list[bool]:
    assert one.template is not None
    texts = _texts(one.template, tokenizer, talks)
    return [
        llama_cpp_ids(tokenizer, text, one.vocabulary) == ids
        for text, ids in zip(texts, wanted, strict=True)
    ]
