"""A tokenizer as the metadata of a GGUF file, for llama.cpp to make the tokens that were trained.

Two kinds are known: byte-level BPE, which llama.cpp calls ``gpt2``, and BPE over characters with
bytes to fall back on, as SentencePiece makes it, which it calls ``llama``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import gguf
from gguf import TokenType

from halfbyte.data.tokenize import leading_ids
from halfbyte.errors import ModelError
from halfbyte.export.gguf.pre_tokenizer import pre_tokenizer_name

_BYTE = re.compile(r"<0x[0-9A-F]{2}>")
_SPACE = "\u2581"  # SentencePiece's letter for a space
# Below every score that stands for a merge.
_NEVER_MERGED = -1e6
_MOST_ENDS = 3  # eos, eot and eom


@dataclass(frozen=True)
class Vocabulary:
    """What a file says of its tokenizer.

    ``tokens`` and ``types`` have an entry for each row of the embedding. ``scores`` (of ``llama``)
    are minus the place of the merge that makes a token: llama.cpp merges the pair with the highest
    score first. ``ends`` are the tokens that end an answer, the tokenizer's end of sequence first.
    """

    model: str  # gpt2 or llama
    pre: str
    tokens: list[str]
    types: list[int]
    scores: list[float] | None
    merges: list[str] | None
    bos: int | None
    pad: int | None
    unknown: int | None
    ends: tuple[int, ...]
    add_bos: bool
    add_space_prefix: bool
    notes: tuple[str, ...]

    def add_to(self, writer: gguf.GGUFWriter, chat_template: str | None) -> None:
        """Write it, with the chat template that was trained."""
        writer.add_tokenizer_model(self.model)
        writer.add_tokenizer_pre(self.pre)
        writer.add_token_list(self.tokens)
        writer.add_token_types(self.types)
        if self.scores is not None:
            writer.add_token_scores(self.scores)
        if self.merges is not None:
            writer.add_token_merges(self.merges)
        if self.bos is not None:
            writer.add_bos_token_id(self.bos)
        # llama.cpp ends an answer at any of the three.
        for add, token in zip(
            (writer.add_eos_token_id, writer.add_eot_token_id, writer.add_eom_token_id),
            self.ends,
            strict=False,
        ):
            add(token)
        if self.unknown is not None:
            writer.add_unk_token_id(self.unknown)
        if self.pad is not None:
            writer.add_pad_token_id(self.pad)
        writer.add_add_bos_token(self.add_bos)
        # An answer follows a prompt, and no end of sequence.
        writer.add_add_eos_token(False)
        writer.add_add_space_prefix(self.add_space_prefix)
        if chat_template is not None:
            writer.add_chat_template(chat_template)


def vocabulary_of(tokenizer: Any, rows: int, ends: Collection[int], model: str) -> Vocabulary:
    """What a GGUF file has to say of ``tokenizer`` (transformers, fast).

    ``rows`` is the embedding's number of rows, which is often more than there are tokens; ``ends``
    are the tokens that end an answer. Raises ModelError for a tokenizer that llama.cpp has no place
    for.
    """
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    kind = _kind(backend, model)
    lead = leading_ids(tokenizer)
    bos = tokenizer.bos_token_id
    if lead not in ([], [bos]):
        raise ModelError(
            f"the tokenizer of {model} puts {tokenizer.convert_ids_to_tokens(lead)} before a text, "
            "where llama.cpp can put its bos_token alone: it cannot be exported to GGUF."
        )
    by_id = {number: token for token, number in tokenizer.get_vocab().items()}
    if by_id and max(by_id) >= rows:
        raise ModelError(
            f"the tokenizer of {model} has a token {max(by_id)}, and its embedding {rows} rows: "
            "they are not of one model."
        )
    tokens = [by_id.get(number, f"[PAD{number}]") for number in range(rows)]
    added = tokenizer.added_tokens_decoder
    types = [_type(n, tokens[n], n in by_id, added, kind, tokenizer) for n in range(rows)]
    eos = tokenizer.eos_token_id
    merges = [_pair(merge) for merge in backend["model"]["merges"]]
    prefix, notes = _normalized(backend, kind, model)
    ends = (eos, *sorted(end for end in set(ends) if end != eos))
    if len(ends) > _MOST_ENDS:
        left = ", ".join(tokens[end] for end in ends[_MOST_ENDS:])
        notes.append(f"a file names {_MOST_ENDS} tokens that end an answer; left out is {left}")
    return Vocabulary(
        model=kind,
        pre=pre_tokenizer_name(backend, model) if kind == "gpt2" else "default",
        tokens=tokens,
        types=types,
        scores=_scores(tokens, merges) if kind == "llama" else None,
        merges=[" ".join(pair) for pair in merges] if kind == "gpt2" else None,
        bos=bos,
        pad=tokenizer.pad_token_id,
        unknown=tokenizer.unk_token_id,
        ends=ends,
        add_bos=bool(lead),
        add_space_prefix=prefix,
        notes=tuple(notes),
    )


def _kind(backend: dict[str, Any], model: str) -> str:
    made = backend["model"]
    if made["type"] == "BPE" and not made.get("continuing_subword_prefix"):
        if made.get("byte_fallback"):
            return "llama"
        if "ByteLevel" in json.dumps(backend.get("pre_tokenizer")):
            return "gpt2"
    raise ModelError(
        f"the tokenizer of {model} ({made['type']}) is neither byte-level BPE nor SentencePiece's "
        "BPE, the two kinds that halfbyte writes into GGUF: it cannot be exported."
    )


def _pair(merge: Any) -> tuple[str, str]:
    left, right = merge.split(" ", 1) if isinstance(merge, str) else merge
    return left, right


def _type(
    number: int, token: str, there: bool, added: dict[int, Any], kind: str, tokenizer: Any
) -> int:
    if not there:
        return int(TokenType.UNUSED)
    if kind == "llama" and number == tokenizer.unk_token_id:
        return int(TokenType.UNKNOWN)
    if number in added:
        special = added[number].special
        return int(TokenType.CONTROL if special else TokenType.USER_DEFINED)
    if kind == "llama" and _BYTE.fullmatch(token):
        return int(TokenType.BYTE)
    return int(TokenType.NORMAL)


def _scores(tokens: list[str], merges: list[tuple[str, str]]) -> list[float]:
    """Minus the place of the first merge that makes each token."""
    place: dict[str, int] = {}
    for number, (left, right) in enumerate(merges):
        place.setdefault(left + right, number)
    return [-float(place[token]) if token in place else _NEVER_MERGED for token in tokens]


def _normalized(backend: dict[str, Any], kind: str, model: str) -> tuple[bool, list[str]]:
    """Whether a text begins with a space of its own, and what to say of other changes."""
    steps = list(_flat(backend.get("normalizer"), "normalizers"))
    steps += [s for s in _flat(backend.get("pre_tokenizer"), "pretokenizers") if kind == "llama"]
    prefix, notes = False, []
    for step in steps:
        what = step["type"]
        if kind == "llama" and what == "Prepend" and step.get("prepend") == _SPACE:
            prefix = True
        elif kind == "llama" and what == "Metaspace" and step.get("replacement") == _SPACE:
            prefix = prefix or step.get("prepend_scheme", "always") != "never"
        elif kind == "llama" and what == "Replace" and step.get("content") == _SPACE:
            continue
        elif kind == "gpt2" and what == "NFC":
            notes.append(
                "the tokenizer joins letters with their accents (NFC) and llama.cpp does not: text "
                "that is not so already gives other tokens there"
            )
        else:
            raise ModelError(
                f"the tokenizer of {model} changes text by {what!r}, which llama.cpp does not: it "
                "cannot be exported to GGUF."
            )
    return prefix, notes


def _flat(node: Any, key: str) -> list[dict[str, Any]]:
    if not node:
        return []
    if node["type"] == "Sequence":
        return [step for inner in node[key] for step in _flat(inner, key)]
    return [node]
