"""Text from tokens as they come, never half a character."""

from __future__ import annotations

from typing import Any

_UNFINISHED = "\ufffd"  # what a decoder writes for bytes that are no character (yet)
_LONGEST_WAIT = 64  # tokens: so many in a row that make no character never will


class TextStream:
    """Turns token ids into pieces of text; all pieces together are the decoded text.

    A token is no unit of text: it can be a part of a character's UTF-8 bytes, and what it reads
    as can depend on the one before it (a word's leading space). So each token is decoded together
    with a window of tokens before it, the text of which is known, and only what is complete is
    given out. The window moves on with every complete piece, so a token's cost does not grow with
    the length of the answer. Special tokens are left out.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._window: list[int] = []  # known tokens, then those not yet given out
        self._known = 0  # tokens of the window that were given out
        self._given = 0  # characters of the window's text that were given out

    def push(self, token: int) -> str:
        """The text that is complete with ``token``; often one word, sometimes nothing."""
        self._window.append(token)
        text = self._decode(self._window)
        waiting = len(self._window) - self._known
        if text.endswith(_UNFINISHED) and waiting < _LONGEST_WAIT:
            return ""
        return self._give(text)

    def end(self) -> str:
        """What is left at the end of the tokens, less a character that was cut in its midst."""
        return self._give(self._decode(self._window).rstrip(_UNFINISHED))

    def _give(self, text: str) -> str:
        piece = text[self._given :]
        if piece:
            self._window = self._window[self._known :]
            self._known = len(self._window)
            self._given = len(self._decode(self._window))
        return piece

    def _decode(self, tokens: list[int]) -> str:
        return str(
            self._tokenizer.decode(
                tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False
            )
        )
