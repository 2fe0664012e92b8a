"""Secrets in what sayo-verl writes and prints: their values become ``<redacted>``.

A secret is recognised by the name in front of it (``WANDB_API_KEY=``, ``'auth_token': ``), by its place in an address
(``https://user:password@host``), by its form (``hf_...``, ``sk-...``), or because a variable of the environment or an
argument of this process with such a name has the same value. A secret under a plain name and without such a form is not
found: docs/security.md says so. Imports the standard library only, since errors are redacted too.
"""

import os
import re
import sys
from collections.abc import Mapping
from itertools import pairwise
from typing import Any

REDACTED = "<redacted>"
_LEAST = 8  # characters of a value that is searched for everywhere
_ALWAYS = {"secret", "secrets", "password", "passwd", "passphrase", "credential", "credentials", "authorization"}
_ALWAYS |= {"apikey", "apitoken", "authtoken", "accesstoken", "accesskey"}
# Words in front of "key" or "token": of a column, a mapping or a token of a text. Behind other words it is a secret.
_PLAIN = re.compile(
    "images?|prompt|videos?|audios?|response|reward|fn|input|output|messages?|sort|group|cache|parent|teacher|row|column"
    "|record|metric|pad|eos|bos|sep|unk|cls|mask|focus|special|vision|next|first|last|new|per|a|the"
)
_WORDS = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+")
# A name, = or : (also behind a closing quote), and a reference, a text in quotes, or what has no space or bracket.
_PAIR = re.compile(
    r"""(?P<name>[A-Za-z_][\w.-]*)(?P<between>\\?["']?\s*[=:]\s*)"""
    r"""(?P<value>\$\{[^}]*\}|\\"(?:(?!\\").)*\\"|"(?:[^"\\]|\\.)*"|'(?:[^'\\]|\\.)*'"""
    r"""|(?:Bearer |Basic )?[^\s,;|&"'(){}\[\]]+)"""
)
_ADDRESS = re.compile(r"(?P<scheme>[A-Za-z][A-Za-z0-9+.-]*://)[^\s/:@\"']*:[^\s/@\"']+@")
_FORMS = re.compile(
    r"\b(?:hf_[A-Za-z0-9]{20,}|sk-[A-Za-z0-9_-]{20,}|gh[opsur]_[A-Za-z0-9]{20,}|github_pat_\w{20,}|glpat-[\w-]{20,}"
    r"|AKIA[0-9A-Z]{16}|AIza[\w-]{35}|xox[abeprs]-[\w-]{10,}|wandb_v1_\w{20,})"
)
_NOTHING = ("", "null", "None", "True", "False", "true", "false")
_REFERENCE = re.compile(r"\$\{(?:oc\.env:)?[\w.]+\}")


def is_secret(name: str) -> bool:
    """Whether a value under this name is a secret; of a dotted name the last part counts.

    An environment variable (in capitals) with the word KEY or TOKEN is one. A setting is one if it ends in key or
    token, except for a column or a token of a text, such as ``image_key`` and ``pad_token``.
    """
    last = name.rpartition(".")[2]
    words = [word for word in _WORDS.findall(last) if not word.isdigit()]
    low = [word.lower() for word in words]
    if _ALWAYS & {*low, *map("".join, pairwise(low))}:
        return True
    if last.isupper():
        return bool({"key", "token"} & set(low))
    return bool(low) and low[-1] in ("key", "token") and not (len(low) > 1 and _PLAIN.fullmatch(low[-2]))


def redact(text: str) -> str:
    """A text without the secrets that are found in it. It is idempotent."""
    for value in _values_here():
        text = text.replace(value, REDACTED)
    text = _ADDRESS.sub(rf"\g<scheme>{REDACTED}@", _FORMS.sub(REDACTED, text))
    return _PAIR.sub(_without_value, text)


def redact_values(value: Any, name: str = "") -> Any:
    """Nested mappings and lists with the same keys, and without the secrets; ``name`` is the key of ``value``.

    null, true, false and a reference such as ``${oc.env:HF_TOKEN}`` are no secrets.
    """
    if isinstance(value, Mapping):
        return {key: redact_values(part, str(key)) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [redact_values(part, name) for part in value]
    if value is None or isinstance(value, bool) or value in _NOTHING:
        return value
    if is_secret(name):
        return value if isinstance(value, str) and _REFERENCE.fullmatch(value) else REDACTED
    return redact(value) if isinstance(value, str) else value


def redact_override(override: str) -> str:
    """A Hydra override: the whole value of a secret's key, else what ``redact`` finds."""
    key, equals, value = override.partition("=")
    return f"{key}={redact_values(value, key.strip())}" if equals else redact(override)


def _without_value(found: re.Match[str]) -> str:
    name, between, value = found["name"], found["between"], found["value"]
    sentence = between == ": " and name in ("key", "token")  # such as "unknown key: x"
    if sentence or not is_secret(name) or redact_values(value.strip("\"'"), name) != REDACTED:
        return found[0]
    return f"{name}{between}{REDACTED}"


def _values_here() -> list[str]:
    """Values of this process's secret variables and arguments, the longest first; a path that exists is none."""
    pairs = [*os.environ.items(), *(argument.partition("=")[::2] for argument in sys.argv)]
    found = {value.strip("\"'") for name, value in pairs if len(value) >= _LEAST and is_secret(name)}
    secret = {v for v in found if not os.path.exists(v) and not _REFERENCE.fullmatch(v) and v != REDACTED}
    return sorted(secret, key=len, reverse=True)
