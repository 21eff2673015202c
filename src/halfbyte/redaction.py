"""Secrets, hidden in whatever is written or shown.

Tokens, passwords and webhook URLs come from the environment. Libraries put them into the messages
of their errors, a user types one into a command, and records outlive both. So what leaves halfbyte
goes through ``redact``: events, the recipe as asked, the sentences of errors, tracebacks, what
trackers are told.

Hidden are the values of environment variables whose names say that they are secrets, what the hub
client and ``.netrc`` keep on disk, what ``remember`` was told, and what has the form of a secret:
tokens with a known beginning, a user in a URL, a webhook's path, a signature in a query.
"""

from __future__ import annotations

import json
import os
import re
from dataclasses import fields, is_dataclass, replace
from functools import cache
from itertools import pairwise
from typing import Any
from urllib.parse import quote, unquote, urlsplit

HIDDEN = "[hidden]"
# A shorter value, such as "1" or "false", is a switch, and would be found in every text.
SHORTEST = 8

_NAMES = re.compile(
    r"(?:^|_)(?:TOKENS?|SECRETS?|PASSWORD|PASSWD|PASSPHRASE|PASS|(?<=_)PWD|PAT|CREDENTIALS?|DSN"
    r"|WEBHOOK(?:_URL)?|CONNECTION_STRING|(?:API|ACCESS|SECRET|PRIVATE|AUTH|ACCOUNT)_?KEY)(?:_\d+)?$",
    re.IGNORECASE,
)

# What goes whole.
_FORMS = re.compile(
    r"hf_[A-Za-z0-9]{20,}"
    r"|(?<![a-z0-9])(?:api_org_[A-Za-z0-9]{20,}"
    r"|gh[pousr]_[A-Za-z0-9]{20,}|github_pat_\w{20,}|glpat-[\w-]{20,}|pypi-[\w-]{60,}"
    r"|wandb_v\d+_\w{20,}|dapi[0-9a-f]{32}|AIza[\w-]{35}|xox[a-z]-[\w-]{10,}"
    r"|sk-(?:[a-z0-9]+-){0,3}(?=[A-Za-z_]*\d)[A-Za-z0-9_]{20,}[\w-]*"
    r"|A[KS]IA[0-9A-Z]{16}(?![A-Za-z0-9]))"
    r"|(?<![\w-])eyJ[\w-]{10,}\.[\w-]{10,}\.[\w-]{10,}"
    r"|-----BEGIN [A-Z ]{0,30}PRIVATE KEY-----.*?(?:-----END [A-Z ]{0,30}PRIVATE KEY-----|\Z)",
    re.DOTALL,
)
# What goes behind the first group, but for punctuation at its end.
_BEHIND = [
    re.compile(r"(://)[^\s/'\"<>\\]{1,512}(?=@)"),
    re.compile(
        r"((?:hooks\.slack\.com/(?:services|workflows|triggers)|discord(?:app)?\.com/api/webhooks"
        r"|\.webhook\.office\.com|outlook\.office\.com/webhook)/|api\.telegram\.org/bot)"
        r"[^\s'\"<>\\]*[^\s'\"<>\\:;,.)]"
    ),
    re.compile(
        r"([?&](?:[\w-]{0,40}(?:token|api_?key|secret|password|signature|credential)|sig|key|auth)=)"
        r"[^&\s'\"<>\\]*[^&\s'\"<>\\:;,.)]",
        re.IGNORECASE,
    ),
    re.compile(
        r"(authorization['\"]?\s{0,3}[:=]\s{0,3}b?['\"]?(?:(?:bearer|basic|token)\s{1,3})?)"
        r"[\w.~+/=-]{8,}",
        re.IGNORECASE,
    ),
    re.compile(r"(\b(?:Bearer|Basic) )(?=[\w.~+/-]*\d)[\w.~+/-]{16,}={0,2}"),
    re.compile(
        r"((?:password|passwd|api_?key|secret_key|access_token|auth_token)=)"
        r"[^\s&,;'\"<>\\]{3,}[^\s&,;'\"<>\\:.)]",
        re.IGNORECASE,
    ),
]

_remembered: set[str] = set()


def remember(secret: str) -> None:
    """Hide ``secret``, from wherever it came, from now on; of a URL its path too."""
    _remembered.add(secret)


def redact(text: str) -> str:
    """``text`` with every secret in it replaced by ``[hidden]``."""
    for secret in _known():
        if secret in text:
            text = text.replace(secret, HIDDEN)
    text = _FORMS.sub(HIDDEN, text)
    for form in _BEHIND:
        text = form.sub(rf"\1{HIDDEN}", text)
    return text


def redact_all(value: Any) -> Any:
    """``value`` with the texts in it redacted: in lists, dictionaries and dataclasses as well.

    A dataclass that holds no secret is given back as it is.
    """
    if isinstance(value, str):
        return redact(value)
    if isinstance(value, dict):
        return {redact_all(key): redact_all(inside) for key, inside in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(redact_all(inside) for inside in value)
    if is_dataclass(value) and not isinstance(value, type):
        held = {f.name: getattr(value, f.name) for f in fields(value)}
        texts = {k: v for k, v in held.items() if not isinstance(v, int | float | None)}
        changed = {k: r for k, v in texts.items() if (r := redact_all(v)) != v}
        return replace(value, **changed) if changed else value
    return value


def _known() -> list[str]:
    """The secrets known by their value, the longest first, since one may hold another."""
    found: set[str] = set(_on_disk())
    for name, value in os.environ.items():
        if _is_secret(name):
            found |= _forms_of(value)
        elif "@" in value and "://" in value:
            found |= _of_user(value)
    for value in _remembered:
        found |= _forms_of(value)
    return sorted(found, key=lambda secret: (-len(secret), secret))


@cache
def _is_secret(name: str) -> bool:
    return _NAMES.search(name) is not None


@cache
def _forms_of(value: str) -> frozenset[str]:
    """``value`` as it may stand in a text: plain, escaped, and of a URL what names the secret."""
    value = value.strip()
    is_path = os.sep in value and os.path.exists(value)  # to a file that holds the secret
    if len(value) < SHORTEST or is_path:
        return frozenset()
    found = {value, quote(value, safe=""), quote(value), json.dumps(value)[1:-1], repr(value)[1:-1]}
    if "://" in value:
        found |= _of_user(value)
        try:
            parts = urlsplit(value)
        except ValueError:
            return frozenset(found)
        # Errors of connections name the path without the host.
        found |= {parts.path, f"{parts.path}?{parts.query}", parts.query}
    return frozenset(form for form in found if len(form) >= SHORTEST)


@cache
def _of_user(value: str) -> frozenset[str]:
    """User and password of a URL together, and the password alone."""
    try:
        user, at, _ = urlsplit(value).netloc.rpartition("@")
    except ValueError:
        return frozenset()
    password = user.partition(":")[2]
    forms = {user, password, unquote(password)} if at else set()
    return frozenset(form for form in forms if len(form) >= SHORTEST)


def _on_disk() -> frozenset[str]:
    """What the hub client's log-in and ``.netrc`` (Weights & Biases keeps its key there) hold."""
    home = os.path.expanduser("~")
    hub = os.environ.get("HF_HOME") or os.path.join(
        os.environ.get("XDG_CACHE_HOME") or os.path.join(home, ".cache"), "huggingface"
    )
    token = os.environ.get("HF_TOKEN_PATH") or os.path.join(hub, "token")
    netrc = os.environ.get("NETRC") or os.path.join(home, ".netrc")
    return _token_file(token) | _netrc_file(netrc)


@cache
def _token_file(path: str) -> frozenset[str]:
    try:
        with open(path, encoding="utf-8") as file:
            return _forms_of(file.read(10_000))
    except (OSError, ValueError):
        return frozenset()


@cache
def _netrc_file(path: str) -> frozenset[str]:
    try:
        with open(path, encoding="utf-8") as file:
            words = file.read(100_000).split()
    except (OSError, ValueError):
        return frozenset()
    after = (second for first, second in pairwise(words) if first == "password")
    return frozenset().union(*(_forms_of(word) for word in after))
