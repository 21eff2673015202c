"""Where a row begins and ends: tokens that are missing, doubled or never learned."""

from __future__ import annotations

import numpy as np

from halfbyte.data.audit.subject import Subject, fields_of
from halfbyte.data.chat_template import own_template
from halfbyte.events.types import Found

# An end that fewer rows than this share learn is not learned.
ENDED = 0.5


def find_tokens(subject: Subject) -> list[Found]:
    """Findings on the beginning- and end-of-sequence tokens."""
    return [*_begin(subject), *_end(subject)]


def _begin(subject: Subject) -> list[Found]:
    tokenizer = subject.tokenizer
    begin = tokenizer.bos_token_id
    if begin is None or not len(subject.rows):
        return []
    mark = tokenizer.bos_token
    doubled, missing = [], []
    for place in subject.looked_at:
        ids = subject.tokenized[place].input_ids
        if len(ids) < 2 or ids[0] != begin:
            missing.append(place)
        elif ids[1] == begin:
            doubled.append(place)
        elif np.count_nonzero(ids == begin) > 1:
            # Behind the template's own words, as "<s>" at the start of a question.
            own = next(iter(fields_of(subject.rows[place])), "")
            if own.lstrip().startswith(mark):
                doubled.append(place)
    found = []
    if doubled:
        found.append(
            subject.found(
                "doubled-begin",
                "error",
                f"{subject.of(doubled)} begin with {mark} twice: once as their own text and once "
                "as halfbyte puts it there",
                f"remove {mark} from the text of the rows",
                doubled,
            )
        )
    if missing and "bos_token" in (own_template(tokenizer) or ""):
        found.append(
            subject.found(
                "missing-begin",
                "warning",
                f"{subject.of(missing)} do not begin with {mark}, which the model's own chat "
                "template writes before each text",
                f"take data.template: chat, or write {mark} at the start of a template of your own",
                missing,
            )
        )
    return found


def _end(subject: Subject) -> list[Found]:
    ends = _ends(subject)
    if not ends:
        return _no_end(subject)
    tokenizer = subject.tokenizer
    unlearned, doubled = [], []
    for place in subject.looked_at:
        row = subject.tokenized[place]
        ids = row.input_ids
        at = np.concatenate([np.flatnonzero(ids == end) for end in ends])
        if not row.loss_mask[at].any():
            unlearned.append(place)
        if len(at) > 1 and (ids[at[1:]] == ids[at[:-1]])[np.diff(at) == 1].any():
            doubled.append(place)
    marks = " or ".join(str(tokenizer.convert_ids_to_tokens(end)) for end in sorted(ends))
    found = []
    if subject.share(unlearned) > 1 - ENDED:
        cut = sum(subject.tokenized[place].cut > 0 for place in unlearned)
        todo = (
            "raise data.max_length, or set data.long_rows to drop what is longer"
            if cut * 2 > len(unlearned)
            else "let the template write it behind the answer, and the loss be taken there"
        )
        found.append(
            subject.found(
                "end-not-learned",
                "error",
                f"{subject.of(unlearned)} never learn {marks}, which ends an answer, so that the "
                "model will not stop",
                todo,
                unlearned,
            )
        )
    if doubled:
        found.append(
            subject.found(
                "doubled-end",
                "warning",
                f"{subject.of(doubled)} hold {marks} twice in a row: the answer brings its own "
                "and the template writes another",
                "remove it from the text of the rows",
                doubled,
            )
        )
    return found


def _ends(subject: Subject) -> set[int]:
    """The tokenizer's end of sequence and what else ends a whole row, a special token."""
    tokenizer = subject.tokenizer
    ends = set() if tokenizer.eos_token_id is None else {int(tokenizer.eos_token_id)}
    # Not only those with a name: of most models, an end of turn has none.
    known = tokenizer.added_tokens_decoder.items()
    special = {number for number, token in known if token.special} - {tokenizer.bos_token_id}
    blank: dict[int, bool] = {}
    for place in subject.looked_at[:50]:
        row = subject.tokenized[place]
        if row.cut:
            continue
        for token in reversed(row.input_ids[-4:].tolist()):
            if token in special:
                ends.add(token)
                break
            if token not in blank:
                blank[token] = not tokenizer.decode([token]).strip()
            if not blank[token]:
                break
    return ends


def _no_end(subject: Subject) -> list[Found]:
    if subject.tokenizer.eos_token_id is not None:
        return []
    return [
        subject.found(
            "end-not-learned",
            "error",
            "the tokenizer names no end-of-sequence token, so the model does not learn to end its "
            "answers",
            "set eos_token in the model's tokenizer_config.json",
        )
    ]
