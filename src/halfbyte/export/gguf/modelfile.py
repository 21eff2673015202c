"""The Modelfile that Ollama makes a model of.

Ollama's templates are in the language of Go's ``text/template``. Where the trained template is
fixed texts between messages, it is written in that language and renders the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from halfbyte.export.gguf.turn_format import Around, TurnFormat

_LAST = "eq (len (slice $.Messages $i)) 1"
_SYSTEM = "{{ $.System }}"
NO_TEMPLATE = (
    "the trained chat template is more than fixed texts between messages, so the Modelfile has no "
    "TEMPLATE: Ollama takes the one in the GGUF file where it knows it, and says so when the model "
    "is created"
)


@dataclass(frozen=True)
class Modelfile:
    """``file`` is the GGUF file's name beside it; ``template`` in Go's language, None: left out."""

    file: str
    template: str | None
    stop: Sequence[str]
    system: str | None

    def text(self) -> str:
        lines = [f"FROM ./{self.file}"]
        if self.template is not None:
            lines.append(f'TEMPLATE """{self.template}"""')
        lines += [f"PARAMETER stop {_quoted(token)}" for token in self.stop]
        if self.system:
            lines.append(f"SYSTEM {_quoted(self.system)}")
        return "\n".join(lines) + "\n"


def go_template(format: TurnFormat) -> str | None:
    """``format`` in Go's language; None where its texts cannot stand in a Modelfile."""
    # The texts stand as they are: nothing of this template trims white space.
    last = _LAST
    plain = _either("$first", format.first, format.again)
    if format.where is None:
        before = plain
    elif format.where == "first":
        opening = _either("$.System", _around(format.first_system), _text(format.first), raw=True)
        before = _either("$first", opening, _text(format.again), raw=True)
    else:
        framed = _either(
            "$first", _around(format.first_system), _around(format.again_system), raw=True
        )
        test = "$.System" if format.where == "each" else f"and $.System ({last})"
        before = _either(test, framed, plain, raw=True)
    behind = _either(last, format.generate, format.answer)
    found = (
        "{{ $first := true }}{{ range $i, $m := .Messages }}"
        '{{ if eq $m.Role "user" }}'
        f"{before}{{{{ $first = false }}}}{{{{ $m.Content }}}}{behind}"
        '{{ else if eq $m.Role "assistant" }}{{ $m.Content }}{{ end }}{{ end }}'
    )
    return None if '"""' in found else found


def _either(test: str, one: str, other: str, *, raw: bool = False) -> str:
    """``one`` where ``test`` holds, else ``other``; ``raw``: they are Go's language already."""
    if not raw:
        one, other = _text(one), _text(other)
    if one == other:
        return one
    return f"{{{{ if {test} }}}}{one}{{{{ else }}}}{other}{{{{ end }}}}"


def _around(texts: Around) -> str:
    return _SYSTEM.join(map(_text, texts))


def _text(text: str) -> str:
    """Fixed text; what would open an action is written by one."""
    return text.replace("{{", '{{ "{{" }}')


def _quoted(text: str) -> str:
    """A value of a Modelfile, which has no escapes: three quotes hold line breaks and quotes."""
    return f'"""{text}"""' if '"' in text or "\n" in text else f'"{text}"'
