"""Real chat templates, a tokenizer for each, and the conversations that they are tried with."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from halfbyte.data.example import Example, Message

FOLDER = Path(__file__).resolve().parent / "chat_templates"


@dataclass(frozen=True)
class Family:
    """The special tokens of a model, of which its template writes some out and names others."""

    eos: str
    bos: str | None = None
    others: tuple[str, ...] = ()


LLAMA_3 = ("<|start_header_id|>", "<|end_header_id|>", "<|eom_id|>", "<|python_tag|>")
MISTRAL = (
    *("[INST]", "[/INST]", "[TOOL_CALLS]"),
    *("[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]"),
)
PHI_3 = ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>")
FAMILIES = {
    "llama-2": Family("</s>", "<s>"),
    "llama-3.1": Family("<|eot_id|>", "<|begin_of_text|>", LLAMA_3),
    "llama-3.2": Family("<|eot_id|>", "<|begin_of_text|>", LLAMA_3),
    "mistral-v0.3": Family("</s>", "<s>", MISTRAL),
    "mistral-nemo": Family("</s>", "<s>", MISTRAL),
    "qwen-2.5": Family("<|im_end|>", None, ("<|im_start|>", "<|endoftext|>")),
    "qwen-3": Family("<|im_end|>", None, ("<|im_start|>", "<|endoftext|>", "<think>", "</think>")),
    "gemma-2": Family("<eos>", "<bos>", ("<start_of_turn>", "<end_of_turn>")),
    "gemma-3": Family("<eos>", "<bos>", ("<start_of_turn>", "<end_of_turn>")),
    "phi-3.5": Family("<|endoftext|>", "<s>", PHI_3),
    "phi-4": Family("<|im_end|>", "<|endoftext|>", ("<|im_start|>", "<|im_sep|>")),
    "smollm-2": Family("<|im_end|>", "<|im_start|>"),
    "smollm-3": Family("<|im_end|>", None, ("<|im_start|>", "<think>", "</think>")),
    "granite-3.3": Family("<|end_of_text|>", None, ("<|start_of_role|>", "<|end_of_role|>")),
    "granite-4": Family("<|end_of_text|>", None, ("<|start_of_role|>", "<|end_of_role|>")),
    "olmo-2": Family("<|endoftext|>", "<|endoftext|>"),
    "falcon-3": Family("<|endoftext|>", None, ("<|system|>", "<|user|>", "<|assistant|>")),
    "zephyr": Family("</s>", "<s>"),
    "lfm-2.5": Family("<|im_end|>", "<|startoftext|>", ("<|im_start|>",)),
    "chatml-generation": Family("<|im_end|>", None, ("<|im_start|>",)),
    "deepseek-r1-distill": Family(
        "<｜end▁of▁sentence｜>", "<｜begin▁of▁sentence｜>", ("<｜User｜>", "<｜Assistant｜>")
    ),
}

SYSTEM = Message("system", "Be brief.")
TURNS = (
    Message("user", "Two plus two?"),
    Message("assistant", "Four."),
    Message("user", "And one more?"),
    Message("assistant", "Five."),
)
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Tells the weather.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}
CALLED = (
    Message("user", "Is it warm in Rome?"),
    Message(
        "assistant",
        "",
        tool_calls=({"id": "call00001", "name": "weather", "arguments": {"city": "Rome"}},),
    ),
    Message("tool", "31 degrees", tool_call_id="call00001", name="weather"),
    Message("assistant", "Yes, 31 degrees."),
)
CONVERSATIONS = {
    "turns": Example(0, TURNS),
    "system": Example(0, (SYSTEM, *TURNS)),
    "no thinking": Example(0, (Message("system", "Be brief. /no_think"), *TURNS)),
    "tools": Example(0, CALLED, tools=(WEATHER,)),
    "thoughts": Example(
        0,
        (
            TURNS[0],
            Message("assistant", "Four.", reasoning="2 and 2."),
            TURNS[2],
            Message("assistant", "Five.", reasoning="4 and 1."),
        ),
    ),
    "thoughtful tools": Example(
        0,
        (
            CALLED[0],
            replace(CALLED[1], reasoning="I look."),
            CALLED[2],
            replace(CALLED[3], reasoning="31 is warm."),
        ),
        tools=(WEATHER,),
    ),
}


@dataclass(frozen=True)
class Marked:
    """A hand-marked text: pieces, every second of them learned; None for any that is not."""

    text: str

    @property
    def pieces(self) -> list[tuple[str, bool]]:
        """The pieces and whether they are learned; empty ones are left out."""
        parts = re.split("[«»]", self.text)
        return [(part, at % 2 == 1) for at, part in enumerate(parts) if part]

    def only(self, which: int) -> Marked:
        """The same text with one of its marks alone."""
        spans = list(re.finditer("«([^»]*)»", self.text))
        kept = spans[which].span()
        bare = re.compile("[«»]")
        return Marked(
            bare.sub("", self.text[: kept[0]])
            + self.text[slice(*kept)]
            + bare.sub("", self.text[kept[1] :])
        )

    def matches(self, pieces: list[tuple[str, bool]]) -> bool:
        """Whether ``pieces`` are these, ``[…]`` being any text."""
        return len(pieces) == len(self.pieces) and all(
            learned == mine and re.fullmatch(_open(pattern), text, re.DOTALL)
            for (text, learned), (pattern, mine) in zip(pieces, self.pieces, strict=True)
        )


def _open(pattern: str) -> str:
    return ".*".join(map(re.escape, pattern.split("[…]")))


def marked_rows() -> list[tuple[str, str, list[Marked] | str]]:
    """Template, conversation, and the rows marked by hand, or why there are none."""
    found: list[tuple[str, str, list[Marked] | str]] = []
    for file in sorted(FOLDER.glob("*.txt")):
        for section in re.split("^== ", file.read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]:
            title, _, body = section.partition("\n")
            if body.startswith("REFUSED "):
                found.append((file.stem, title, body.removeprefix("REFUSED ").strip()))
            else:
                rows = body.removesuffix("\n").split("\n-- next row\n")
                found.append((file.stem, title, [Marked(row) for row in rows]))
    return found


@cache
def tokenizer_of(name: str) -> Any:
    """A byte-level tokenizer that knows the special tokens of ``name``, and its template."""
    family = FAMILIES[name]
    tokenizer = byte_tokenizer(family.eos, family.bos, family.others)
    tokenizer.chat_template = (FOLDER / f"{name}.jinja").read_text(encoding="utf-8")
    return tokenizer


def byte_tokenizer(eos: str, bos: str | None = None, others: tuple[str, ...] = ()) -> Any:
    """One token a byte, but for special tokens; it adds none by itself."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(dict.fromkeys([eos, *others])))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=eos, bos_token=bos)
