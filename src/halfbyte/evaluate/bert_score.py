"""BERTScore: words compared by what a model of the BERT kind makes of them in their context.

Zhang et al., 2020, "BERTScore: Evaluating Text Generation with BERT", arXiv 1904.09675, equations
in section 3, without importance weights and without rescaling. The package ``bert-score`` gives the
same figures, but loads a model in whatever format it finds, pickles included.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from halfbyte.errors import ModelError, gave_up
from halfbyte.foreign_json import read_json
from halfbyte.model.hub import find_hub_model, looks_like_hub_name
from halfbyte.model.plausible import require_plausible
from halfbyte.model.wording import reason

_TEXTS_AT_ONCE = 16
_PAIRS_AT_ONCE = 64


@dataclass(frozen=True)
class BertScorer:
    """A model with its tokenizer, and the layer whose states are compared."""

    name: str
    model: Any  # of transformers
    tokenizer: Any
    layer: int  # counted from 1
    longest: int  # tokens; of a longer text the beginning is compared

    def f1(self, answers: Sequence[str], references: Sequence[str]) -> list[float]:
        """The F1 of each pair; 0 where either text is empty.

        Each token is matched with the one of the other text whose state is most alike (cosine);
        precision is the mean over the answer's tokens, recall that over the reference's. Special
        tokens may be matched and are not averaged over, as in ``bert-score``.
        """
        pairs = list(zip(answers, references, strict=True))
        found: list[float] = []
        for begin in range(0, len(pairs), _PAIRS_AT_ONCE):  # the states of all would be gigabytes
            some = pairs[begin : begin + _PAIRS_AT_ONCE]
            texts = sorted({text for pair in some for text in pair if text.strip()}, key=len)
            states = self._states(texts)
            found += [
                _greedy_f1(states[one], states[other]) if one in states and other in states else 0.0
                for one, other in some
            ]
        return found

    @torch.no_grad()
    def _states(self, texts: Sequence[str]) -> dict[str, tuple[Tensor, Tensor]]:
        """Of each text the normalized states [tokens, hidden], and which count, bool [tokens]."""
        found: dict[str, tuple[Tensor, Tensor]] = {}
        for begin in range(0, len(texts), _TEXTS_AT_ONCE):
            some = texts[begin : begin + _TEXTS_AT_ONCE]
            encoded = self.tokenizer(
                list(some),
                padding=True,
                truncation=True,
                max_length=self.longest,
                return_special_tokens_mask=True,
                return_tensors="pt",
            )
            special = encoded.pop("special_tokens_mask").bool()
            mask = encoded["attention_mask"].bool()
            inputs = {name: value.to(self.model.device) for name, value in encoded.items()}
            out = self.model(**inputs, output_hidden_states=True).hidden_states[self.layer]
            states = torch.nn.functional.normalize(out.float().cpu(), dim=-1)
            for i, text in enumerate(some):
                found[text] = states[i, mask[i]], ~special[i, mask[i]]
        return found


def _greedy_f1(answer: tuple[Tensor, Tensor], reference: tuple[Tensor, Tensor]) -> float:
    (one, one_counts), (other, other_counts) = answer, reference
    if not one_counts.any() or not other_counts.any():
        return 0.0
    alike = one @ other.t()
    precision = alike.max(dim=1).values[one_counts].mean().item()
    recall = alike.max(dim=0).values[other_counts].mean().item()
    return 2 * precision * recall / (precision + recall) if precision + recall > 0 else 0.0


def open_bert(name: str, layer: int | None = None) -> BertScorer:
    """The model in the folder ``name``, or of that name on the hub, on the CPU.

    ``layer`` is by default three quarters of the way up, where those lie that the paper's authors
    found best (the 9th of BERT base's 12, the 18th of BERT large's 24). Only safetensors and
    ``tokenizer.json`` are read and no code is run. Raises ModelError.
    """
    folder = Path(name).expanduser()
    if not folder.is_dir():
        if not looks_like_hub_name(name):
            raise ModelError(
                f"there is no model {name} for BERTScore: it is no folder of this machine, and not "
                "of the form of a name on the hub."
            )
        found = find_hub_model(name, None)
        found.fetch_weights()
        folder = found.folder
    config = _read_config(folder)
    for file in ("tokenizer.json", "model.safetensors"):
        if not (folder / file).is_file():
            raise ModelError(
                f"{folder} holds no {file}, so that it cannot be used for BERTScore: name a model "
                "of the BERT kind in safetensors."
            )
    from transformers import AutoModel, PreTrainedTokenizerFast
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(str(folder))
        model = AutoModel.from_pretrained(
            str(folder),
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=True,
            dtype=torch.float32,
        )
        model.eval()
    except BaseException as error:  # transformers raises many kinds, each about the files' content
        if not isinstance(error, Exception) and not gave_up(error):
            raise
        raise ModelError(f"the model {name} for BERTScore cannot be read: {reason(error)}.") from (
            error
        )
    finally:
        if shown:
            logging.enable_progress_bar()
    layers = int(getattr(model.config, "num_hidden_layers", 0))
    if layers < 1 or tokenizer.pad_token_id is None:
        raise ModelError(f"{name} is no model of the BERT kind, which BERTScore takes.")
    positions = int(getattr(model.config, "max_position_embeddings", 512) or 512)
    # RoBERTa's positions begin behind its padding token.
    if "roberta" in str(config.get("model_type")):
        positions -= tokenizer.pad_token_id + 1
    return BertScorer(name, model, tokenizer, layer or ceil(layers * 3 / 4), positions)


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    try:
        config = read_json(path)
    except (OSError, ValueError) as error:
        raise ModelError(
            f"{path} cannot be read ({reason(error)}), so that BERTScore cannot be computed with "
            "that model."
        ) from error
    if not isinstance(config, dict):
        raise ModelError(f"{path} is not a model's configuration: it holds no JSON object.")
    require_plausible(config, str(path))
    return config
