"""The tokenizer of a model folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from halfbyte.errors import ModelError, gave_up
from halfbyte.foreign_json import read_json
from halfbyte.model.sentencepiece_file import FILE, sentencepiece_tokenizer
from halfbyte.model.wording import reason

# Characters; those of models have up to 20,000.
LONGEST_TEMPLATE = 1 << 18


def load_tokenizer(folder: Path, name: str, model_type: str) -> Any:
    """The fast tokenizer in ``folder``; a padding token is not needed, as nothing is padded.

    Raises ModelError where there is none, or where it is not a fast one (label positions follow
    from character offsets, which only those give), or has no end-of-sequence token.
    """
    from transformers import AutoTokenizer

    if (folder / FILE).exists() and not (folder / "tokenizer.json").exists():
        return require_usable(sentencepiece_tokenizer(folder, name, model_type), name)
    _require_fast_class(folder, name)
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False)
    except BaseException as error:  # transformers raises many kinds, each about the files' content
        if not isinstance(error, Exception) and not gave_up(error):
            raise
        raise ModelError(f"the tokenizer of {name} cannot be read: {reason(error)}.") from error
    return require_usable(tokenizer, name)


def _require_fast_class(folder: Path, name: str) -> None:
    """Raise ModelError where the files ask for a tokenizer that is written in Python.

    Some of those load dictionaries from wherever the files say, or start programs; none of them
    could be used here, so that none is made.
    """
    from transformers import PreTrainedTokenizerFast
    from transformers.models.auto.tokenization_auto import tokenizer_class_from_name

    for file in ("tokenizer_config.json", "config.json"):
        path = folder / file
        try:
            asked = read_json(path).get("tokenizer_class") if path.exists() else None
        except (OSError, ValueError, AttributeError) as error:
            raise ModelError(f"{path} cannot be read as JSON: {reason(error)}.") from error
        known = tokenizer_class_from_name(asked) if isinstance(asked, str) else None
        if known is not None and not issubclass(known, PreTrainedTokenizerFast):
            if known.__name__ == "PythonBackend":  # of which transformers makes a fast one
                continue
            raise _not_fast(name, f"is a {asked}")


def _not_fast(name: str, why: str) -> ModelError:
    return ModelError(
        f"the tokenizer of {name} gives no character offsets (it {why}, not a fast one), so labels "
        "cannot be placed; add its tokenizer.json to the model's folder."
    )


def require_usable(tokenizer: Any, name: str) -> Any:
    """``tokenizer`` if rows can be made with it, else ModelError."""
    if not tokenizer.is_fast:
        raise _not_fast(name, f"is a {type(tokenizer).__name__}")
    longest = tokenizer.model_max_length
    if isinstance(longest, bool) or not isinstance(longest, (int, float)) or not longest >= 1:
        raise ModelError(
            f"the tokenizer of {name} has the model_max_length {longest!r}, which is no number of "
            "tokens: mend its tokenizer_config.json."
        )
    if tokenizer.eos_token_id is None:
        raise ModelError(
            f"the tokenizer of {name} names no end-of-sequence token, so no answer could end; set "
            "eos_token in its tokenizer_config.json."
        )
    try:  # what it says of itself may be of any kind
        tokenizer("a b", add_special_tokens=False)
        whole = tokenizer("a b")["input_ids"]
        [*map(int, tokenizer.convert_tokens_to_ids(tokenizer.convert_ids_to_tokens(whole)))]
        dict(tokenizer.special_tokens_map)
        tokenizer.added_tokens_decoder.items()
    except BaseException as error:
        if not isinstance(error, Exception) and not gave_up(error):
            raise
        raise ModelError(f"the tokenizer of {name} cannot be used: {reason(error)}.") from error
    template = tokenizer.chat_template
    lengths = map(len, template.values() if isinstance(template, dict) else [template or ""])
    if max(lengths, default=0) > LONGEST_TEMPLATE:
        raise ModelError(
            f"the chat template of {name} is longer than {LONGEST_TEMPLATE:,} characters, which "
            "none is: get the model's files again."
        )
    return tokenizer
