"""Pictures carry their own bytes, or say why not."""

from __future__ import annotations

import base64
import os
import sys
from pathlib import Path

import pytest

from ftlib.reporting.pictures import EMBED_BYTES, picture
from tests.reporting.fake_runs import PNG


def test_small_file_is_embedded_as_it_is_with_the_type_of_its_bytes(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(PNG)
    assert f'src="data:image/png;base64,{base64.b64encode(PNG).decode()}"' in picture(tmp_path, "a.jpg").markup


def test_large_file_is_shrunk(tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    image.frombytes("RGB", (400, 300), os.urandom(400 * 300 * 3)).save(tmp_path / "noise.png")
    assert (tmp_path / "noise.png").stat().st_size > EMBED_BYTES
    markup = picture(tmp_path, "noise.png").markup
    assert "data:image/jpeg;base64," in markup
    assert len(markup) < (tmp_path / "noise.png").stat().st_size


def test_large_file_without_pillow_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "PIL", None)
    (tmp_path / "big.png").write_bytes(PNG + bytes(EMBED_BYTES))
    markup = picture(tmp_path, "big.png").markup
    assert "Pillow" in markup
    assert "<img" not in markup


def test_missing_file_says_so(tmp_path: Path) -> None:
    assert "gone.png: this image file is missing" in picture(tmp_path, "gone.png").markup


def test_path_out_of_the_data_folder_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "secret.png").write_bytes(PNG)
    (tmp_path / "data").mkdir()
    markup = picture(tmp_path / "data", "../secret.png").markup
    assert "<img" not in markup
    assert "leads out of the data folder" in markup


def test_a_file_that_is_no_image_says_so(tmp_path: Path) -> None:
    (tmp_path / "page.png").write_bytes(b"<svg onload='x'>")
    markup = picture(tmp_path, "page.png").markup
    assert "not an image" in markup
    assert "<img" not in markup
