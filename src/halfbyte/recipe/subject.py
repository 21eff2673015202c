"""What a run is about, as far as its own words tell."""

from __future__ import annotations

import re

# Beginnings of words, as they stand in names of data sets and in objectives. A warning too many
# costs a sentence, one too few may cost more, so that a doubtful word counts.
_MEDICAL = re.compile(
    r"\b(?:(?:bio|para|tele)?medic(?:al|ine|in|ation|ations|ament|o)?\b|(?:bio|pub)med|clinic"
    r"|med ?(?:qa|mcqa|quad|alpaca|dialog|instruct|text|chat|gpt|llm|llama)|icliniq|wikidoc\b"
    r"|doctors?\b|chat ?doctor|physicians?\b|surge(?:on|ry)|nurs(?:e|es|ing)\b|hospital"
    r"|health(?!y|ier|iest|ily)|pharma|diseases?\b|illness|symptom|diagnos(?:is|es)\b|patholog"
    r"|oncolog|radiolog|cardiolog|dermatolog|neurolog|psychiatr|pediatric|therap(?:y|ist|eutic)"
    r"|mimic[ -]?(?:iii|iv|cxr)\b|prescriptions?\b|dosages?\b|patients?\b)"
)
# Where such a word speaks of something else.
_OTHERWISE = re.compile(
    r"\bhealth[ -]?(?:checks?|endpoints?|probes?|points)\b"
    r"|\b(?:server|service|cluster|node|system|project|repo|repository|code|data|battery|financial"
    r"|economic|soil)s? health\b"
    r"|\bdoctor who\b|\b(?:spin|script|witch) doctors?\b"
    r"|\b(?:be|being|stays?|staying|very|more|always|kind|calm|polite|friendly|infinitely)"
    r"(?: and|,)? patient\b"
    r"|\bpatient(?:,| and)? (?:teacher|tutor|tone|assistant|voice|style|manner|guide|friend"
    r"|explanations?|answers?|repl(?:y|ies)|friendly|kind|calm|polite|helpful)\b"
)


def is_medical(text: str) -> bool:
    """Whether a data source or an objective speaks of medicine, which calls for a warning.

    Names are taken apart where their spelling does: ``HealthCareMagic-100k``, ``pubmed_qa``.
    """
    parts = re.sub(r"[_/.:]+", " ", text)
    by_case = re.sub(r"(?<=[a-z])(?=[A-Z])|(?<=[A-Za-z])(?=\d)", " ", parts)
    return any(
        _MEDICAL.search(_OTHERWISE.sub(" ", " ".join(words.lower().split())))
        for words in (parts, by_case)
    )
