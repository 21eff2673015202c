"""The tokenizer that the metadata of a GGUF file describe.

transformers reads one too, but by other rules from version to version, and none of those up to 5.23
splits a text as ``smollm`` in ``tokenizer.ggml.pre`` says. Here tokens are those that llama.cpp
makes of the same file, with two kinds of vocabulary: ``gpt2`` (byte-level BPE) and ``llama``
(SentencePiece's BPE).
"""

from __future__ import annotations

from typing import Any

from halfbyte.errors import ModelError
from halfbyte.model.gguf_file import GgufFile
from halfbyte.model.gguf_split import RULES, SplitRule, lacking_bytes
from halfbyte.model.sentencepiece_merges import LONGEST_PIECE, merges_by_score
from halfbyte.model.tokenizer import require_usable
from halfbyte.model.wording import reason

# tokenizer.ggml.token_type
_UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = 2, 3, 4, 5, 6
_SPACE = "\u2581"  # SentencePiece's letter for a space
_NAMED = {
    "bos_token": "bos_token_id",
    "eos_token": "eos_token_id",
    "unk_token": "unknown_token_id",
    "pad_token": "padding_token_id",
}


def gguf_tokenizer(file: GgufFile, name: str) -> Any:
    """The fast tokenizer of ``file``, with its chat template.

    Raises ModelError for a vocabulary of another kind, a split that is not known, and for metadata
    that contradict themselves.
    """
    try:
        return require_usable(_Metadata(file, name).tokenizer(), name)
    except ModelError:
        raise
    except Exception as error:  # tokenizers raises many kinds, each about the file's content
        raise ModelError(
            f"the tokenizer in {file.path} cannot be read: {reason(error)}."
        ) from error


class _Metadata:
    """What a file says under ``tokenizer.``."""

    def __init__(self, file: GgufFile, name: str) -> None:
        self._file, self._name = file, name
        self._kind = self._get("model")
        if self._kind not in ("gpt2", "llama"):
            raise ModelError(
                f"the GGUF file of {name} has a tokenizer of the kind {self._kind!r}, and only "
                "gpt2 and llama are read from GGUF: name the model's safetensors folder."
            )
        self._tokens = file.texts("tokenizer.ggml.tokens")
        types = self._get("token_type")
        self._types = [1] * len(self._tokens) if types is None else [int(t) for t in types]
        if not self._tokens or len(self._types) != len(self._tokens):
            raise ModelError(
                f"{file.path} has {len(self._tokens)} tokens and {len(self._types)} types of "
                "them: get it again."
            )

    def tokenizer(self) -> Any:
        from tokenizers import AddedToken
        from transformers import PreTrainedTokenizerFast

        named = {key: self._token(id_key) for key, id_key in _NAMED.items()}
        rule = self._rule() if self._kind == "gpt2" else None
        backend = self._byte_level(rule) if rule is not None else self._sentencepiece(named)
        for kind, special in ((_CONTROL, True), (_USER_DEFINED, False)):
            tokens = [t for t, one in zip(self._tokens, self._types, strict=True) if one == kind]
            added = [AddedToken(token, normalized=False, special=special) for token in tokens]
            (backend.add_special_tokens if special else backend.add_tokens)(added)
        self._frame(backend, named, rule is None or rule.whole_words)
        template = self._file.metadata.get("tokenizer.chat_template")
        return PreTrainedTokenizerFast(
            tokenizer_object=backend,
            chat_template=template if isinstance(template, str) else None,
            clean_up_tokenization_spaces=False,
            **named,
        )

    def _get(self, key: str) -> Any:
        return self._file.metadata.get(f"tokenizer.ggml.{key}")

    def _token(self, key: str) -> str | None:
        number = self._get(key)
        if number is None:
            return None
        if not 0 <= int(number) < len(self._tokens):
            raise ModelError(
                f"{self._file.path} names the token {number} as its {key} and has "
                f"{len(self._tokens)}: get it again."
            )
        return self._tokens[int(number)]

    def _vocabulary(self) -> dict[str, int]:
        """Without the names of rows that no token has."""
        rows = zip(self._tokens, self._types, strict=True)
        return {token: i for i, (token, kind) in enumerate(rows) if kind != _UNUSED}

    def _rule(self) -> SplitRule:
        pre = self._get("pre")
        rule = RULES.get(pre) if isinstance(pre, str) else None
        if rule is None:
            said = f"names {pre!r}" if pre is not None else "does not say"
            raise ModelError(
                f"the GGUF file of {self._name} {said} how its tokenizer splits text "
                "(tokenizer.ggml.pre), which halfbyte does not know: name the model's safetensors "
                "folder."
            )
        return rule

    def _byte_level(self, rule: SplitRule) -> Any:
        from tokenizers import Tokenizer, decoders, models

        pairs = [merge.split(" ", 1) for merge in self._file.texts("tokenizer.ggml.merges")]
        merges = [(left, right) for left, right in pairs]
        vocabulary = self._vocabulary()
        model = models.BPE(vocab=vocabulary, merges=merges, ignore_merges=rule.whole_words)
        backend = Tokenizer(model)
        backend.pre_tokenizer = rule.pre_tokenizer(lacking_bytes(vocabulary))
        backend.decoder = decoders.ByteLevel()
        return backend

    def _sentencepiece(self, named: dict[str, str | None]) -> Any:
        from tokenizers import Tokenizer, decoders, models, normalizers

        vocabulary, scores = self._vocabulary(), self._get("scores")
        if scores is None or len(scores) != len(self._tokens):
            raise ModelError(f"{self._file.path} has no score of each of its tokens: get it again.")
        if max(map(len, self._tokens)) > LONGEST_PIECE:
            raise ModelError(
                f"{self._file.path} has a token of over {LONGEST_PIECE:,} characters: get it again."
            )
        unmerged = (_UNKNOWN, _CONTROL, _BYTE)
        scored = {
            token: float(scores[i])
            for token, i in vocabulary.items()
            if self._types[i] not in unmerged
        }
        model = models.BPE(
            vocab=vocabulary,
            merges=merges_by_score(vocabulary, scored),
            unk_token=named["unk_token"],
            fuse_unk=True,
            byte_fallback=True,
        )
        prefix = self._get("add_space_prefix")
        begins = prefix is None or bool(prefix)
        backend = Tokenizer(model)
        # A space before a text and behind every special token: SentencePiece puts one before each
        # text that it is given.
        written = normalizers.Replace(" ", _SPACE)
        backend.normalizer = (
            normalizers.Sequence([normalizers.Prepend(_SPACE), written]) if begins else written
        )
        steps = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
        if begins:
            steps.append(decoders.Strip(content=" ", left=1))
        backend.decoder = decoders.Sequence(steps)
        return backend

    def _frame(self, backend: Any, named: dict[str, str | None], begins: bool) -> None:
        """Put bos and eos around a text, as the file says; ``begins`` is what llama.cpp does about
        the first where it says nothing."""
        from tokenizers import processors

        asked = self._get("add_bos_token")
        first = named["bos_token"] if (begins if asked is None else bool(asked)) else None
        last = named["eos_token"] if self._get("add_eos_token") else None
        around = [token for token in (first, last) if token is not None]

        def framed(text: str) -> list[str]:
            return [*([first] if first else []), text, *([last] if last else [])]

        if around:
            backend.post_processor = processors.TemplateProcessing(
                single=framed("$A"),
                pair=[*framed("$A"), *framed("$B")],
                special_tokens=[(token, backend.token_to_id(token)) for token in around],
            )
