"""The Stanford PTB tokenizer itself, which needs Java and pycocoevalcap, and English text that is on any machine."""

from __future__ import annotations

import functools
import gzip
import importlib.util
import os
import random
import subprocess
import sysconfig
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from tests import needs

FOLDERS = ("/usr/share/doc", "/usr/share/common-licenses", "/usr/share/man", "/usr/share/perl", "/usr/share/perl5")
NO_TEXT = {".so", ".pyc", ".a", ".o", ".png", ".jpg", ".gif", ".whl", ".exe", ".jar"}
LINE_BREAKS = dict.fromkeys(map(ord, "\n\r\v\f\x85\u2028\u2029"), " ")
DROPPED = "'' ' `` ` -LRB- -RRB- -LCB- -RCB- . ? ! , : - -- ... ;"
_FOUND = importlib.util.find_spec("pycocoevalcap")
PACKAGE = Path(_FOUND.submodule_search_locations[0]) if _FOUND and _FOUND.submodule_search_locations else None


def public_example() -> Path:
    """The folder of coco-caption's public example (references.json, results.json), if somebody has it."""
    folder = Path(os.environ.get("COCO_CAPTION_EXAMPLE", "coco-caption-example"))
    if not folder.is_dir():
        needs.lack("example")
    return folder


def stanford(captions: Sequence[str]) -> list[list[str]]:
    """Its tokens of every caption, punctuation included."""
    assert PACKAGE is not None
    jar = PACKAGE / "tokenizer" / "stanford-corenlp-3.4.1.jar"
    command = ["java", "-cp", str(jar), "edu.stanford.nlp.process.PTBTokenizer", "-preserveLines", "-lowerCase"]
    with tempfile.NamedTemporaryFile() as file:
        file.write("\n".join(caption.translate(LINE_BREAKS) for caption in captions).encode())
        file.flush()
        done = subprocess.run([*command, file.name], capture_output=True, encoding="utf-8", check=True)
    lines = done.stdout.split("\n")
    assert len(lines) == len(captions)
    return [line.split(" ") if line else [] for line in lines]


def counted(tokens: Sequence[str]) -> list[str]:
    """What the official evaluation makes of a line of its tokens."""
    return [token for token in " ".join(tokens).rstrip().split(" ") if token and token not in DROPPED.split(" ")]


@functools.cache
def english(wanted: int) -> list[str]:
    """Different lines of documentation, manual pages, licences and Python's own library, as they stand."""
    files = [path for folder in (*FOLDERS, sysconfig.get_path("stdlib")) for path in sorted(Path(folder).rglob("*"))]
    random.Random(0).shuffle(files)
    found: dict[str, None] = {}
    for path in files:
        lines = [line for line in _lines(path) if 20 <= len(line) < 400 and len(line.split()) >= 4]
        found |= dict.fromkeys(random.Random(0).sample(lines, min(len(lines), 60)))
        if len(found) >= wanted:
            break
    return list(found)[:wanted]


def _lines(path: Path) -> Iterator[str]:
    if not path.is_file() or path.suffix in NO_TEXT or path.stat().st_size > 2_000_000:
        return
    try:
        content = path.read_bytes()
        text = (gzip.decompress(content) if path.suffix == ".gz" else content).decode()
    except (OSError, EOFError, UnicodeDecodeError):
        return
    if "\0" not in text:
        yield from (line.strip() for line in text.splitlines())
