"""Pickles: plain data is read as it is, anything else is refused before it can do anything."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ftlib.data.sources.refcoco import read_plain_pickle
from ftlib.errors import UserError

PLAIN: list[Any] = [None, True, 3, -(2**70), 0.5, "naïve 犬", b"\xff\x00x", (1, "b"), {"a": [1, {"b": 2}]}, [], {}]


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_plain_data(tmp_path: Path, protocol: int) -> None:
    (tmp_path / "x.p").write_bytes(pickle.dumps(PLAIN, protocol))
    assert read_plain_pickle(tmp_path / "x.p") == PLAIN


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("kind", ["i1", "<i8", ">i4", "u2", ">f8", "f4", "?"])
def test_numpy_scalars_become_numbers(tmp_path: Path, protocol: int, kind: str) -> None:
    value = np.array([1], dtype=kind)[0]
    (tmp_path / "x.p").write_bytes(pickle.dumps([value], protocol))
    (found,) = read_plain_pickle(tmp_path / "x.p")
    assert found == value and type(found) in (int, float, bool)


def test_texts_and_scalars_of_python_2(tmp_path: Path) -> None:
    r"""What Python 2 writes: byte strings, of UTF-8 or not, and a scalar's bytes as a string (here 8-byte 300)."""
    (tmp_path / "x.p").write_bytes(
        b"(lp0\nS'caf\\xc3\\xa9'\np1\naS'\\xff'\np2\naV\\u72ac\np3\naI5\na"
        b"cnumpy.core.multiarray\nscalar\np4\n(cnumpy\ndtype\np5\n(S'i8'\nI0\nI1\ntR(I3\nS'<'\nNNNI-1\nI-1\nI0\ntb"
        b"S',\\x01\\x00\\x00\\x00\\x00\\x00\\x00'\ntRa."
    )
    assert read_plain_pickle(tmp_path / "x.p") == ["café", "\udcff", "犬", 5, 300]


@pytest.mark.parametrize(("order", "value"), [("<", 300), (">", 44 * 256 + 1)])
def test_scalars_of_either_byte_order(tmp_path: Path, order: str, value: int) -> None:
    (tmp_path / "x.p").write_bytes(
        b"cnumpy._core.multiarray\nscalar\n(cnumpy\ndtype\n(Vi2\nI0\nI1\ntR(I3\nV%b\nNNNI-1\nI-1\nI0\ntb"
        b"c_codecs\nencode\n(V,\x01\nVlatin1\ntRtR." % order.encode()
    )
    assert read_plain_pickle(tmp_path / "x.p") == value


class Evil:
    """Makes a folder when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> Any:
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_nothing_is_run(tmp_path: Path, protocol: int) -> None:
    (tmp_path / "x.p").write_bytes(pickle.dumps([{"a": Evil(tmp_path / "made")}], protocol))
    with pytest.raises(UserError, match=r"x\.p: contains (posix|nt)\.mkdir, which is not plain data"):
        read_plain_pickle(tmp_path / "x.p")
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize(
    "content",
    [
        b"cbuiltins\neval\n(S'1'\ntR.",
        b"c__builtin__\neval\n(S'1'\ntR.",
        b"cos\nsystem\n(S'true'\ntR.",
        b"(S'true'\nios\nsystem\n.",
        b"\x80\x04\x8c\x08builtins\x8c\x04eval\x93.",
        b"\x80\x04\x8c\x05numpy\x8c\x0fdtype.__class__\x93.",
        b"ccopyreg\n_reconstructor\n.",
        b"c_codecs\ndecode\n.",
        b"cnumpy\nload\n.",
        b"cftlib.data.sources.refcoco\n_scalar\n.",
    ],
)
def test_other_names_are_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.p").write_bytes(content)
    with pytest.raises(UserError, match="which is not plain data"):
        read_plain_pickle(tmp_path / "x.p")


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"x",
        b"\x80",
        b"I12",
        pickle.dumps(PLAIN)[:-5],
        b"\x80\x04\x8e" + b"\xff" * 8 + b".",
        b"I" + b"9" * 5000 + b"\n.",
    ],
)
def test_damaged_pickles(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.p").write_bytes(content)
    with pytest.raises(UserError, match=r"x\.p: not a pickle, or damaged"):
        read_plain_pickle(tmp_path / "x.p")


def test_objects_and_encodings_that_are_no_numbers(tmp_path: Path) -> None:
    for content in (
        b"cnumpy.core.multiarray\nscalar\n(cnumpy\ndtype\n(S'O8'\ntRS'x'\ntR.",
        b"c_codecs\nencode\n(Vx\nVrot13\ntR.",
    ):
        (tmp_path / "x.p").write_bytes(content)
        with pytest.raises(UserError, match="contains a"):
            read_plain_pickle(tmp_path / "x.p")


def test_missing(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be read: No such file"):
        read_plain_pickle(tmp_path / "x.p")
