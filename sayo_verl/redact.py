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
from itertools import accumulate, pairwise, zip_longest
from typing import Any

REDACTED = "<redacted>"
_LEAST = 8  # characters of a value that is searched for everywhere
_ALWAYS = {"secret", "secrets", "password", "passwd", "passphrase", "credential", "credentials", "authorization"}
_ALWAYS |= {"apikey", "apikeys", "apitoken", "apitokens", "authtoken", "accesstoken", "accesskey", "amzsignature"}
# Words that make a setting in small letters that ends in key or token a secret; "answer_key" and "stop_token" are none.
_OWNERS = {
    "api",
    "access",
    "auth",
    "private",
    "secret",
    "bearer",
    "session",
    "refresh",
    "signing",
    "encryption",
    "deploy",
}
_OWNERS |= {"account", "service", "ssh", "bot", "ray", "hf", "hub", "huggingface", "modelscope", "wandb", "swanlab"}
_OWNERS |= {"openai", "anthropic", "azure", "aws", "google", "gemini", "github", "gitlab", "dashscope", "deepseek"}
_OWNERS |= {"openrouter", "serper", "tavily"}
_WORDS = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+")
_NAME = re.compile(r"""(?<![\w.-])(?P<name>[\w.-]+)(?P<between>\\?["']?\s*[=:]\s*)""")
# A reference, a text in quotes, a list, or what has no space or bracket, with what follows a comma and is no pair.
_VALUE = re.compile(
    r"""\$\{[^}]*\}|\\"(?:(?!\\").)*\\"|"(?:[^"\\]|\\.)*"|'(?:[^'\\]|\\.)*'|\[[^\[\]\n]*\]"""
    r"""|(?:Bearer |Basic )?[^\s,;|&"'(){}\[\]]+(?:,(?![\w.-]*["']?[=:])[^\s,;|&"'(){}\[\]]+)*"""
)
_OPTION = re.compile(r"(?<!\S)(?P<name>--[\w-]+)(?P<between>\s+)(?=\S*\d)[^\s-]\S{5,}")  # --token VALUE
_ADDRESS = re.compile(
    r"(?P<scheme>(?<![A-Za-z0-9+.-])[A-Za-z0-9+.-]+://)(?:[^\s/:@\"']*:[^\s/\"']+|(?<=http://|ttps://)[^\s/:@\"'?#]+)@"
)
_QUERY = re.compile(r"(?P<name>[?&](?:sig|signature|key)=)[^&\s\"'#]+")
_FORMS = re.compile(
    r"\b(?:hf_[A-Za-z0-9]{20,}|sk-[A-Za-z0-9_-]{20,}|gh[opsur]_[A-Za-z0-9]{20,}|github_pat_\w{20,}|glpat-[\w-]{20,}"
    r"|AKIA[0-9A-Z]{16}|AIza[\w-]{35}|xox[abeprs]-[\w-]{10,}|wandb_v1_\w{20,}|eyJ[\w-]{5,}\.[\w-]+\.[\w-]+"
    r"|(?<=(?i:bearer) )(?=\S*\d)[\w.~+/=-]{8,})"
    r"|-----BEGIN [A-Z ]*PRIVATE KEY-----(?s:.*?)(?:-----END [A-Z ]*PRIVATE KEY-----|\Z)"
)
_NOTHING = ("", "null", "None", "True", "False", "true", "false")
_REFERENCE = re.compile(r"\$\{(?:oc\.env:)?[\w.]+\}")


def is_secret(name: str) -> bool:
    """Whether a value under this name is a secret; of a dotted name the last part counts.

    An environment variable (in capitals) is one with the word KEY or TOKEN, or if it ends in PASS or PWD. Another name
    is one if it is "token", or ends in key or token behind a word such as "api": ``answer_key`` and ``stop_token`` are
    none.
    """
    last = name.rpartition(".")[2]
    low = [word.lower() for word in _WORDS.findall(last) if not word.isdigit()]
    if _ALWAYS & {*low, *map("".join, pairwise(low))}:
        return True
    if not low:
        return False
    if last.isupper():
        ends = low[-1].endswith(("pass", "pwd")) and low[-1] not in ("bypass", "compass", "oldpwd")
        return bool({"key", "token"} & set(low)) or (ends and low not in (["pass"], ["pwd"]))
    return low == ["token"] or (low[-1] in ("key", "token") and bool(_OWNERS & set(low)))


def redact(text: str) -> str:
    """A text without the secrets that are found in it. It is idempotent."""
    for value in _values_here():
        text = text.replace(value, REDACTED)
    text = _ADDRESS.sub(rf"\g<scheme>{REDACTED}@", _FORMS.sub(REDACTED, text))
    text = _OPTION.sub(_without_value, _QUERY.sub(rf"\g<name>{REDACTED}", text))
    parts, end = [], 0
    for found in _NAME.finditer(text):
        secret = _VALUE.match(text, found.end()) if found.start() >= end and _names_secret(found) else None
        if secret and redact_values(secret[0].strip("\"'[]"), found["name"]) == REDACTED:
            parts += [text[end : found.end()], REDACTED]
            end = secret.end()
    return "".join([*parts, text[end:]])


def redact_command(line: str) -> str:
    """A line with a command of the shell: the placeholder is in quotes there, since ``<`` opens a file."""
    text = redact(line)
    pieces = text.split(REDACTED)
    quotes = accumulate((piece.count("'") for piece in pieces[:-1]), initial=0)
    marks = (REDACTED if count % 2 else f"'{REDACTED}'" for count in list(quotes)[1:])
    return "".join(piece + mark for piece, mark in zip_longest(pieces, marks, fillvalue=""))


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


def _names_secret(found: re.Match[str]) -> bool:
    sentence = found["between"] == ": " and found["name"] == "token"  # such as "unknown token: x"
    return not sentence and is_secret(found["name"])


def _without_value(found: re.Match[str]) -> str:
    return f"{found['name']}{found['between']}{REDACTED}" if is_secret(found["name"]) else found[0]


def _values_here() -> list[str]:
    """Values of this process's secret variables, and of its secret arguments if they have a digit and a letter.

    The longest is first. A path that exists is none. A word such as ``not-needed`` of an argument may be anywhere.
    """
    arguments = [argument.partition("=")[::2] for argument in sys.argv]
    random = [(name, value) for name, value in arguments if re.search(r"\d", value) and re.search("[A-Za-z]", value)]
    pairs = [*os.environ.items(), *random]
    found = {value.strip("\"'") for name, value in pairs if len(value) >= _LEAST and is_secret(name)}
    secret = {v for v in found if not os.path.exists(v) and not _REFERENCE.fullmatch(v) and v != REDACTED}
    return sorted(secret, key=len, reverse=True)
