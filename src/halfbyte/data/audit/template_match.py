"""Whether the rows, the template and the model speak the same format."""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

from halfbyte.data.audit.subject import EXAMPLES, Subject, fields_of, snippet
from halfbyte.data.batch import Segment
from halfbyte.data.chat_template import own_template
from halfbyte.data.example import Example
from halfbyte.data.tokenize import tokenize_rows, whole_characters
from halfbyte.data.turns import last_assistant, learned_messages
from halfbyte.errors import DataError
from halfbyte.events.types import Found

# What each family of formats writes around a turn. Where two write the same, the first is named.
FAMILIES: dict[str, tuple[str, ...]] = {
    "ChatML": ("<|im_start|>", "<|im_end|>"),
    "Llama 2 and Mistral": ("[INST]", "[/INST]", "<<SYS>>"),
    "Llama 3": ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    "Llama 4": ("<|header_start|>", "<|header_end|>", "<|eot|>"),
    "Gemma": ("<start_of_turn>", "<end_of_turn>"),
    "Phi and Zephyr": ("<|user|>", "<|assistant|>", "<|system|>"),
    "Granite": ("<|start_of_role|>", "<|end_of_role|>"),
    "gpt-oss": ("<|channel|>", "<|message|>"),
    "DeepSeek": ("<｜User｜>", "<｜Assistant｜>"),
    "Command R": ("<|START_OF_TURN_TOKEN|>", "<|END_OF_TURN_TOKEN|>"),
    "Alpaca": ("### Instruction:", "### Response:"),
    "Guanaco": ("### Human:", "### Assistant:"),
    "Vicuna": ("\nUSER: ", "ASSISTANT: "),
    "Human and Assistant": ("\n\nHuman:", "\n\nAssistant:"),
}
# These are plain words, which any model reads; the others are tokens of the family's own.
PLAIN_FAMILIES = ("Alpaca", "Guanaco", "Vicuna", "Human and Assistant")
# Of the plain ones, both must stand in a row: a heading or a play may hold one of them.
_MARKS = {mark: family for family, marks in FAMILIES.items() for mark in marks}
# A text that holds none of these holds no mark: each is found far faster than an alternation.
_HINTS = ("<|", "INST]", "<<SYS", "_of_turn>", "<｜", "### ", "USER: ", "Human:")
_MARK = re.compile("|".join(map(re.escape, sorted(_MARKS, key=len, reverse=True))))
_LIKE_A_TOKEN = re.compile(r"<[|｜][\w▁ ]{2,40}[|｜]>|<(?:start|end)_of_turn>")

# In so many rows it is how the file was made; in fewer, rows that speak of templates.
MADE_SO = 0.1
# Rows whose prompts are also tokenized alone, and the share of them from which it is said.
JOINTS, MANY_JOINED = 100, 0.05
LABELLED_ROWS = 50


def find_template(subject: Subject) -> list[Found]:
    """Findings on the format."""
    return [
        *_in_rows(subject),
        *_foreign(subject),
        *_special_tokens(subject),
        *_joined(subject),
        *_wrong_labels(subject),
    ]


def family_of(text: str) -> tuple[str, re.Match[str]] | None:
    """The family whose marks ``text`` holds, and the first of them."""
    if not any(hint in text for hint in _HINTS):
        return None
    first: dict[str, re.Match[str]] = {}
    seen: dict[str, set[str]] = {}
    for match in _MARK.finditer(text):
        family = _MARKS[match[0]]
        first.setdefault(family, match)
        seen.setdefault(family, set()).add(match[0])
    for family, match in first.items():
        if family not in PLAIN_FAMILIES or len(seen[family]) > 1:
            return family, match
    return None


def _in_rows(subject: Subject) -> list[Found]:
    """Rows whose own text was rendered already."""
    written = _written_by(subject)
    known = _marks_of_model(subject.tokenizer)
    end = subject.tokenizer.eos_token or ""  # an answer may bring it along
    places: list[int] = []
    examples: list[str] = []
    families: Counter[str] = Counter()
    for place, row in subject.seen():
        for text in fields_of(row):
            found = family_of(text.removesuffix(end))
            if found is None:
                continue
            family, match = found
            if row.text is not None and (family in PLAIN_FAMILIES or family in known):
                continue  # a text as the model knows it, of which every token is learned
            places.append(place)
            families[family] += 1
            if len(examples) < EXAMPLES:
                examples.append(snippet(text, match.start(), match.end()))
            break
    if not places:
        return []
    family = families.most_common(1)[0][0]
    mark = FAMILIES[family][0].strip()
    twice = written == family
    if twice:
        what = f"already hold {family}'s marks ({mark}), which the template writes around them too"
    else:
        around = f"{written}'s" if written else f"those of the template {subject.template.name}"
        what = f"already hold the marks of {family} ({mark}) inside of {around}"
    return [
        subject.found(
            "template-in-rows",
            "error" if subject.share(places) >= MADE_SO else "warning",
            f"{subject.of(places)} {what}",
            "take the marks out of the rows, or name the columns of what stands between them",
            places,
            examples,
        )
    ]


def _written_by(subject: Subject) -> str | None:
    """The family of what the template itself writes."""
    found = family_of(_blank_row(subject))
    return found[0] if found else None


def _blank_row(subject: Subject) -> str:
    """What the template writes of a row whose every part is a letter; empty if it takes none."""
    blank = Example.question_and_answer(0, "a", "a", "a")
    try:
        return "".join(s.text for s in subject.template.segments(blank, "all"))
    except DataError:
        return ""


def _marks_of_model(tokenizer: Any) -> set[str]:
    """Families of which the model has a mark as one token."""
    vocabulary = tokenizer.get_added_vocab()
    own = family_of(own_template(tokenizer) or "")
    return {_MARKS[mark] for mark in _MARKS if mark in vocabulary} | ({own[0]} if own else set())


def _foreign(subject: Subject) -> list[Found]:
    """A template that the model was not trained with."""
    tokenizer, template = subject.tokenizer, subject.template
    written = _blank_row(subject)
    token_of = tokenizer.backend_tokenizer.token_to_id
    unknown = [mark for mark in _LIKE_A_TOKEN.findall(written) if token_of(mark) is None]
    if unknown and template.name != "chat":  # some models write such marks in letters themselves
        pieces = len(tokenizer(unknown[0], add_special_tokens=False)["input_ids"])
        return [
            subject.found(
                "foreign-template",
                "error",
                f"the template writes {unknown[0]}, which is no token of this model: it reads it "
                f"as {pieces:,} pieces that it has never seen so",
                "take data.template: auto",
            )
        ]
    own = own_template(tokenizer)
    if own is None or template.name == "chat" or all(row.text is not None for row in subject.rows):
        return []
    theirs, ours = family_of(own), family_of(written)
    if ours and ours[0] not in PLAIN_FAMILIES and (theirs is None or theirs[0] != ours[0]):
        their_words = f", and its own is {theirs[0]}'s" if theirs else ""
        return [
            subject.found(
                "foreign-template",
                "error",
                f"the template is {ours[0]}'s, which this model was not trained with{their_words}",
                "take data.template: chat",
            )
        ]
    return [
        subject.found(
            "foreign-template",
            "warning",
            f"the model has a chat template, and rows are rendered in another one "
            f"({template.name}), of which it knows nothing yet",
            "take data.template: chat, unless the rows are to teach it a new format",
        )
    ]


def _special_tokens(subject: Subject) -> list[Found]:
    """The rows' own text must not hold what ends or begins a turn."""
    tokenizer = subject.tokenizer
    special = sorted({t for t in tokenizer.all_special_tokens if t}, key=len, reverse=True)
    if not special:
        return []
    begin, end = tokenizer.bos_token or "", tokenizer.eos_token or ""  # judged as tokens
    places: list[int] = []
    examples: list[str] = []
    first = ""
    for place, row in subject.seen():
        text = "\n".join(fields_of(row)).removesuffix(end).removeprefix(begin)
        token = next((token for token in special if token in text), None)
        if token is None or (row.text is not None and family_of(text)):
            continue
        first = first or token
        places.append(place)
        if len(examples) < EXAMPLES:
            at = text.index(token)
            examples.append(snippet(text, at, at + len(token)))
    if not places:
        return []
    return [
        subject.found(
            "special-tokens-in-rows",
            "warning",
            f"{subject.of(places)} hold the text of a special token ({first}), which the model "
            "takes for the token itself",
            "remove it from the data unless it is meant so",
            places,
            examples,
        )
    ]


def _joined(subject: Subject) -> list[Found]:
    """Whether prompts, tokenized alone as they are after training, begin their rows.

    They do not where the prompt's last characters and the answer's first make one token: the
    answer would have to begin with a token that was never trained there.
    """
    places = [
        place
        for place in range(min(JOINTS, len(subject.rows)))
        if subject.rows[place].text is None and not subject.tokenized[place].start
    ]
    prompts = [subject.template.prompt(subject.rows[place]) for place in places]
    alone = tokenize_rows(
        subject.tokenizer, [[Segment(prompt, False)] for prompt in prompts], range(len(prompts))
    )
    crossed = [
        place
        for prompt, place in zip(alone, places, strict=True)
        if len(prompt) < len(row := subject.tokenized[place])
        and prompt.input_ids.tolist() != row.input_ids[: len(prompt)].tolist()
    ]
    if len(crossed) < max(1, MANY_JOINED * len(prompts)):
        return []
    return [
        subject.found(
            "joined-tokens",
            "warning",
            f"in {len(crossed):,} of {len(prompts):,} rows looked at the end of the prompt and the "
            "start of the answer make one token, so that what is prompted later is not what was "
            "trained",
            "end the text before {output} in data.template with a line break rather than a space, "
            "and have answers start without one",
            crossed,
        )
    ]


def _wrong_labels(subject: Subject) -> list[Found]:
    """Whether the tokens that are learned say the answer, read back by the tokenizer."""
    tokenizer = subject.tokenizer
    places = [
        place
        for place in range(min(LABELLED_ROWS, len(subject.rows)))
        if (row := subject.rows[place]).text is None
        and not subject.tokenized[place].cut
        and row.messages
        and last_assistant(row) in learned_messages(row, subject.data.loss_on)
    ]
    wrong = []
    for place in places:
        tokens = subject.tokenized[place]
        # The answer through the tokenizer too, which may write letters in another way.
        answer = whole_characters(subject.rows[place].answer)
        alone = tokenizer(answer, add_special_tokens=False)["input_ids"]
        said = _letters(tokenizer.decode(alone))
        learned = tokens.input_ids[tokens.loss_mask].tolist()
        if said not in _letters(tokenizer.decode(learned)):
            wrong.append(place)
    if len(wrong) * 2 <= len(places):
        return []
    return [
        subject.found(
            "wrong-labels",
            "error",
            f"in {len(wrong):,} of {len(places):,} rows looked at the tokens that are learned do "
            "not hold the answer",
            "mend what the chat template marks as generated, or take another data.template",
            wrong,
        )
    ]


def _letters(text: str) -> str:
    return "".join(text.split())
