"""What counts as a secret, and that every form of it is masked."""

from __future__ import annotations

import html
import json
from pathlib import Path
from urllib.parse import quote

import pytest

from ftlib.core.redaction import names_secret, redact, redact_values, secrets

AWKWARD = 'pl"anted<\\secret>&é'


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("GITHUB_PAT", "planted-1"),
        ("AWS_SECRET_ACCESS_KEY", "/not/a/file/planted+key"),
        ("AWS_ACCESS_KEY_ID", "AKIAPLANTEDPLANTED00"),
        ("PGPASSWORD", "hunter2"),
        ("OPENAI_KEY", "sk-planted-0123456789abcdef"),
        ("GOOGLE_APPLICATION_CREDENTIALS_JSON", '{"private": "planted"}'),
        ("HF_AUTH", "planted0123"),
        ("MY_HF_TOKEN", "Planted"),
        ("SLACK_WEBHOOK_URL", "https://hooks.example/services/T0/planted"),
        ("SLURM_JWT", "planted.planted.planted"),
        ("db_pass", "planted-"),
        ("githubPat", "planted-"),
        ("CURL_OPTIONS", "hf_planted0123456789secret"),
    ],
)
def test_secrets_are_masked_in_every_form(name: str, value: str) -> None:
    text = f"a {value} b {json.dumps(value)} c {html.escape(value)} d {quote(value, safe='')} e {value!r}"
    masked = redact(text, {name: value})
    assert "plant" not in masked.lower() and "hunter2" not in masked and masked.count("***") == 5


def test_awkward_characters() -> None:
    for text in (AWKWARD, json.dumps(AWKWARD), json.dumps(AWKWARD, ensure_ascii=False), repr(AWKWARD)):
        assert "anted" not in redact(text, {"GITHUB_PAT": AWKWARD})


def test_plain_data(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GITHUB_PAT", AWKWARD)
    assert redact_values({"a": [f"is {AWKWARD}", 3, None]}) == {"a": ["is ***", 3, None]}
    answer = {"prediction": f"ftp://me:mine@host {AWKWARD}"}
    assert redact_values(answer) == {"prediction": "ftp://***@host ***"}
    assert redact_values(answer, urls=False) == {"prediction": "ftp://me:mine@host ***"}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("TOKENIZERS_PARALLELISM", "true"),
        ("MAX_TOKENS", "100000"),
        ("USE_AUTH", "1"),
        ("AUTH_METHOD", "kerberos5"),
        ("KEY_TYPE", "ed25519ab"),
        ("GIT_AUTHOR_NAME", "Ada Lovelace 1"),
        ("SSH_AUTH_SOCK", "/tmp/agent.0123"),
        ("HF_TOKEN_PATH", "/home/me/private token"),
        ("PATH", "/usr/bin:/bin"),
        ("PWD", "/home/me/work"),
        ("OLDPWD", "/home/me/work"),
        ("DB_PASSWORD", "training"),
        ("HTTP_PROXY", "http://proxy.example:3128"),
        ("PASSWORD", ""),
    ],
)
def test_what_is_no_secret_stays(name: str, value: str) -> None:
    assert secrets({name: value}) == []


def test_a_folder_is_no_secret(tmp_path: Path) -> None:
    assert secrets({"MY_SECRET_PLACE": str(tmp_path)}) == []


def test_user_information_of_urls() -> None:
    for url in ("https://me:pa@ss@h.example/x", "http://0123token@h.example", "postgres://me:p%40ss@h:5432/d"):
        assert redact(f"see {url}", {}) == f"see {url.partition('://')[0]}://***@{url.rpartition('@')[2]}"
    for url in ("https://h.example/@me", "ssh://git@h.example/x", "http://a,b@c", "https://h.example/a@b?c=d@e"):
        assert redact(url, {}) == url
    assert redact("password p@ss0rd", {"HTTPS_PROXY": "http://me:p%40ss0rd@proxy:1"}) == "password ***"


def test_names() -> None:
    assert all(
        map(
            names_secret,
            ["HF_TOKEN", "AWS_REGION", "HF_AUTH", "OPENAI_KEY", "GITHUB_PAT", "PGPASSFILE", "MY_CREDENTIALS"],
        )
    )
    assert not any(map(names_secret, ["PATH", "PATTERN", "MONKEY", "TOKENIZER", "GIT_AUTHOR_NAME", "HOME", "DATA"]))
