"""Masks secrets, by their value, in everything that is written or printed.

Secrets are the values of environment variables with names such as GITHUB_PAT, DB_PASSWORD or HF_AUTH, and tokens of a
known form (`hf_…`, `ghp_…`) and passwords of URLs in any variable. The settings of jobs/site.env count as variables
once they have been read. In text, the user information of every URL is masked too. `files` and `log` call `redact` for
all their output.
"""

from __future__ import annotations

import functools
import html
import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

MASK = "***"

_SECRET_NAME = re.compile(
    r"TOKEN(?!IZ)|SECRET|PASSW|PASSPHRASE|PGPASS|API_?KEY|ACCESS_?KEY|PRIVATE_?KEY|CREDENTIAL|COOKIE|WEBHOOK|JWT"
    r"|(?:^|_)(?:PASS|PAT)(?:_|$)|_PWD(?:_|$)"
)
"""Names whose values are secrets."""

_POSSIBLY_SECRET_NAME = re.compile(r"(?:^|_)KEYS?(?:_|$)|AUTH(?!OR)|BEARER")
"""Names whose values are secrets if they look random."""

_REFUSED = re.compile(r"^AWS_")
"""Further names that a config may not use."""

_LOCATION_NAME = re.compile(r"(?:PATH|FILE|DIR|HOME|SOCK|ASKPASS|PARALLELISM|TYPE|METHOD|MODE)$")
_TOKEN = re.compile(
    r"\b(?:hf_[A-Za-z0-9]{20,}|gh[oprsu]_[A-Za-z0-9]{20,}|github_pat_\w{20,}|glpat-[\w-]{20,}|sk-[\w-]{20,}"
    r"|xox[abprs]-[\w-]{10,}|A[KS]IA[0-9A-Z]{16}|AIza[\w-]{35}|pypi-[\w-]{20,}|eyJ[\w-]{8,}\.eyJ[\w-]+\.[\w-]*)"
)
"""Tokens with a known form."""

_USER_INFO = re.compile(
    r"""(?<=://)(?!git@)(?:[^\s/"'<>\\?#:]{0,256}:[^\s/"'<>\\?#]{0,512}|[\w.~%+-]{1,512})@(?=[\w\[])"""
)
"""`user:password@` or `token@` of a URL."""

_RANDOM = re.compile(r"(?=.*\d)(?=.*[A-Za-z]).{8}", re.DOTALL)
_SHORTEST = 6
_SHORTEST_WORD = 12
"""For values of only digits or only lower-case letters, which also occur as ordinary words, such as keys of files."""


_site_settings: dict[str, str] = {}


def add_site_settings(settings: Mapping[str, str]) -> None:
    """Also mask the secrets of a jobs/site.env from now on in this process."""
    _site_settings.update(settings)


def names_secret(name: str) -> bool:
    """Whether a variable's name says that its value is a secret, or a user's account."""
    words = _words(name)
    return any(pattern.search(words) for pattern in (_SECRET_NAME, _POSSIBLY_SECRET_NAME, _REFUSED))


def holds_secret(text: str, environment: Mapping[str, str] | None = None) -> bool:
    """Whether a text contains a secret of the environment, or the user information of a URL."""
    return redact(text, environment) != text


def redact(text: str, environment: Mapping[str, str] | None = None, urls: bool = True) -> str:
    """A text with every secret replaced by `***`.

    Args:
        environment: contains the secrets; default: this process's environment and the site's settings.
        urls: also the user information of every URL.
    """
    for secret in secrets({**_site_settings, **os.environ} if environment is None else environment):
        if secret in text:
            text = text.replace(secret, MASK)
    return _USER_INFO.sub(f"{MASK}@", text) if urls and "://" in text and "@" in text else text


def redact_values(value: Any, urls: bool = True) -> Any:
    """Plain data (dicts, lists and scalars) with all its strings redacted."""
    if isinstance(value, dict):
        return {redact_values(key, urls): redact_values(item, urls) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [redact_values(item, urls) for item in value]
    return redact(value, urls=urls) if isinstance(value, str) else value


def secrets(environment: Mapping[str, str]) -> list[str]:
    """The secrets of an environment in all forms in which they can occur in text, the longest first."""
    found: set[str] = set().union(*(_variable_secrets(name, value) for name, value in environment.items()))
    return sorted(found, key=lambda form: (-len(form), form))


@functools.lru_cache(maxsize=4096)
def _variable_secrets(name: str, value: str) -> frozenset[str]:
    return frozenset(form for secret in _secrets_in(name, value) for form in _forms(secret))


def _words(name: str) -> str:
    """githubPat → GITHUB_PAT."""
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).upper()


def _secrets_in(name: str, value: str) -> Iterator[str]:
    """The secrets in a variable."""
    words = _words(name)
    named = _SECRET_NAME.search(words) or (_POSSIBLY_SECRET_NAME.search(words) and _RANDOM.match(value))
    if named and _long_enough(value) and not _LOCATION_NAME.search(words) and not _is_path(value):
        yield value
        yield from (line for line in value.splitlines() if len(line) >= 16)  # of a private key
    if len(value) > _SHORTEST:
        yield from _TOKEN.findall(value)
    if "://" in value:
        for match in _USER_INFO.finditer(value):
            user, colon, password = match[0][:-1].partition(":")
            password = password if colon else user
            if _long_enough(password):
                yield from {password, unquote(password)}


def _long_enough(value: str) -> bool:
    plain = value.isdecimal() or (value.isascii() and value.isalpha() and value.islower())
    return len(value) >= (_SHORTEST_WORD if plain else _SHORTEST)


def _is_path(value: str) -> bool:
    """A base64 secret can begin with a slash, too, but then no such file exists."""
    return value.startswith(("/", "~/")) and len(value) < 1024 and Path(value).expanduser().exists()


def _forms(secret: str) -> set[str]:
    """A secret as it is, and as it is escaped in JSON, Python, HTML and URLs."""
    in_json = {json.dumps(secret, ensure_ascii=ascii_only)[1:-1] for ascii_only in (True, False)}
    return {secret, *in_json, repr(secret)[1:-1], html.escape(secret), quote(secret, safe="")}
