"""What ``data.loss_on`` learns, in words."""

from __future__ import annotations

_WORDS = {
    "answer": "the answers alone",
    "assistant": "all that the assistant says",
    "last": "each row's last answer alone",
    "flags": "the flagged answers alone",
    "all": "every token",
}


def learned_words(loss_on: str, template: str) -> str:
    """What is learned of rows in ``template``, to follow "loss on" or "to learn"."""
    return _WORDS["all"] if template == "text" else _WORDS.get(loss_on, loss_on)
