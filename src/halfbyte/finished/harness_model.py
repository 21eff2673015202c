"""Our model as lm-evaluation-harness asks for one.

The harness (EleutherAI, https://github.com/EleutherAI/lm-evaluation-harness) asks a model for three
things: the log-likelihood of a text behind another, that of a whole text, and a text that goes on
from a prompt. Rows lie end to end here and are not padded, and logits are made where a token is
asked for and nowhere else.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from halfbyte.data.batch import TokenizedRow
from halfbyte.data.chat_render import ChatRender, TemplateFailed
from halfbyte.data.chat_template import own_template
from halfbyte.errors import ModelError
from halfbyte.evaluate.row_losses import row_losses
from halfbyte.finished.opened import OpenedAdapter
from halfbyte.generate.answer import answer
from halfbyte.generate.prompt import prompt_ids
from halfbyte.model.source import context_length

# What the harness itself asks for where a task does not say.
MOST_NEW_TOKENS = 256
# A model whose configuration does not say how long its rows may be.
LONGEST = 1 << 15

# (what stands before and behind, tokens before, tokens behind)
Request = tuple[Any, list[int], list[int]]


def make_language_model(
    opened: OpenedAdapter,
    *,
    seed: int = 0,
    on_progress: Callable[[int, int], None] = lambda done, of: None,
    on_ignored: Callable[[str], None] = lambda setting: None,
) -> Any:
    """An ``lm_eval.api.model.LM`` of the model in ``opened``, as it is when it is asked.

    ``on_progress`` hears how many of the requests are done, ``on_ignored`` the names of settings of
    a task that have no counterpart here. Needs the package lm-eval.
    """
    from lm_eval.api.model import TemplateLM
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

    class Halfbyte(TemplateLM):
        backend = "causal"

        def __init__(self) -> None:
            super().__init__()
            self.tokenizer = opened.tokenizer
            self._device = opened.qlora.device
            # The last token of a row is predicted, and runs through the model here all the same.
            self.max_length = min(context_length(opened.model.config), LONGEST) - 1
            self.max_gen_toks = MOST_NEW_TOKENS

        @property
        def eot_token_id(self) -> int:
            found = self.tokenizer.eos_token_id
            return self.prefix_token_id if found is None else int(found)

        @property
        def prefix_token_id(self) -> int:
            for found in (self.tokenizer.bos_token_id, self.tokenizer.eos_token_id):
                if found is not None:
                    return int(found)
            raise ModelError(
                f"the tokenizer of {opened.source.name} has neither a token that begins nor one "
                "that ends a text, which this task needs; choose another task."
            )

        @property
        def tokenizer_name(self) -> str:
            return str(opened.source.name).replace("/", "__")

        def tok_encode(
            self, string: str, add_special_tokens: bool | None = None, **unused: Any
        ) -> list[int]:
            if add_special_tokens is None:
                return prompt_ids(self.tokenizer, string)
            encoded: Any = self.tokenizer(
                string, add_special_tokens=add_special_tokens, verbose=False
            )
            return list(encoded["input_ids"])

        def tok_decode(self, tokens: Sequence[int], skip_special_tokens: bool = True) -> str:
            return str(self.tokenizer.decode(tokens, skip_special_tokens=skip_special_tokens))

        def _loglikelihood_tokens(
            self, requests: Sequence[Request], **unused: Any
        ) -> list[tuple[float, bool]]:
            rows = [
                _row(number, before, behind, self.max_length)
                for number, (_, before, behind) in enumerate(requests)
            ]
            found = row_losses(
                opened.qlora,
                rows,
                labels_only=True,
                after_batch=lambda done: on_progress(done, len(rows)),
            )
            likelihoods = [
                (-float(loss), bool(right == labels))
                for loss, right, labels in zip(
                    found.label_loss, found.label_right, found.labels, strict=True
                )
            ]
            for (asked, _, _), likelihood in zip(requests, likelihoods, strict=True):
                if asked is not None:
                    self.cache_hook.add_partial("loglikelihood", asked, likelihood)
            return likelihoods

        def loglikelihood_rolling(
            self, requests: Sequence[Any], disable_tqdm: bool = False
        ) -> list[float]:
            windows: list[Request] = []
            ends = []
            for request in requests:
                (text,) = request.args
                for pair in get_rolling_token_windows(
                    token_list=self.tok_encode(text),
                    prefix_token=self.prefix_token_id,
                    max_seq_len=self.max_length,
                    context_len=1,
                ):
                    windows.append((None, *make_disjoint_window(pair)))
                ends.append(len(windows))
            parts = self._loglikelihood_tokens(windows)
            begins = [0, *ends[:-1]]
            return [
                sum(likelihood for likelihood, _ in parts[begin:end])
                for begin, end in zip(begins, ends, strict=True)
            ]

        def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
            texts = [""] * len(requests)
            alike: dict[str, list[int]] = {}
            for place, request in enumerate(requests):
                alike.setdefault(repr(request.args[1]), []).append(place)
            done = 0
            for places in alike.values():
                settings, stops = _generation(requests[places[0]].args[1], on_ignored)
                given = answer(
                    opened.model,
                    self.tokenizer,
                    [requests[place].args[0] for place in places],
                    seed=seed,
                    **settings,
                )
                for place, said in zip(places, given, strict=True):
                    texts[place] = _until(said.text, stops)
                    self.cache_hook.add_partial(
                        "generate_until", requests[place].args, texts[place]
                    )
                done += len(places)
                on_progress(done, len(requests))
            return texts

        def apply_chat_template(
            self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
        ) -> str:
            return _rendered(self.tokenizer, chat_history, add_generation_prompt)

    return Halfbyte()


def _row(number: int, before: list[int], behind: list[int], most: int) -> TokenizedRow:
    """``behind`` learned behind ``before``, of which the beginning goes where it is too long."""
    if len(behind) > most:
        raise ModelError(
            f"a task asks for a text of {len(behind):,} tokens and the model takes {most:,} at a "
            "time; leave the task out."
        )
    ids = np.array((before + behind)[-(most + 1) :], dtype=np.int32)
    mask = np.zeros(len(ids), dtype=bool)
    mask[len(ids) - len(behind) :] = True
    return TokenizedRow(ids, mask, number)


_KNOWN = {"until", "max_gen_toks", "max_new_tokens", "do_sample", "temperature", "top_p", "top_k"}


def _generation(
    asked: Mapping[str, Any], on_ignored: Callable[[str], None]
) -> tuple[dict[str, Any], list[str]]:
    """A task's settings in our words, and the texts that end an answer."""
    for name in asked.keys() - _KNOWN:
        on_ignored(name)
    stops = asked.get("until") or []
    temperature = float(asked.get("temperature") or 0.0)
    if not asked.get("do_sample", temperature > 0.0):
        temperature = 0.0
    settings = {
        "max_new_tokens": int(
            asked.get("max_gen_toks") or asked.get("max_new_tokens") or MOST_NEW_TOKENS
        ),
        "temperature": temperature,
        "top_p": float(asked.get("top_p") or 1.0),
        "top_k": int(asked.get("top_k") or 0),
    }
    return settings, [stops] if isinstance(stops, str) else [str(stop) for stop in stops if stop]


def _until(text: str, stops: Sequence[str]) -> str:
    """``text`` up to where the first of ``stops`` stands in it."""
    for stop in stops:
        text = text.partition(stop)[0]
    return text


def _rendered(tokenizer: Any, messages: list[dict[str, str]], generate: bool) -> str:
    """Messages in the trained format; without ``generate`` up to the end of the last of them."""
    chat = ChatRender(own_template(tokenizer) or "", tokenizer)
    try:
        (text,) = chat([messages], generate=generate)
    except TemplateFailed as error:
        raise ModelError(
            f"the chat template does not take a conversation of this task ({error}); leave out "
            "--lm-eval-chat."
        ) from error
    if generate:
        return text
    last = messages[-1]["content"].strip()
    return text[: text.rindex(last) + len(last)] if last and last in text else text
