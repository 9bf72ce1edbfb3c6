"""Pictures carry their own bytes, or say why not."""

from __future__ import annotations

import base64
import io
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from ftlib.reports.gallery import EMBED_BYTES, picture
from tests.reports.fake_runs import PNG


def shown(found: dict[str, Any]) -> bytes:
    return base64.b64decode(found["source"].partition("base64,")[2])


def test_small_file_is_encoded_without_loss(tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    original = image.frombytes("RGB", (20, 10), os.urandom(600))
    original.save(tmp_path / "a.jpg", "PNG")
    found = picture(tmp_path, "a.jpg")
    assert found["source"].startswith("data:image/png;base64,") and not found["missing"]
    assert image.open(io.BytesIO(shown(found))).convert("RGB").tobytes() == original.tobytes()


@pytest.mark.parametrize("edge", [40, 700])
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "GIF"])
def test_nothing_of_a_file_but_its_picture_is_shown(tmp_path: Path, kind: str, edge: int) -> None:
    image = pytest.importorskip("PIL.Image")
    exif = image.Exif()
    exif[0x010F], exif[0x0110], exif[0x013B] = "planted maker", "planted camera", "planted artist"
    exif[0x0112] = 6 if kind != "GIF" else 1
    exif.get_ifd(0x8825)[1] = "N"
    exif.get_ifd(0x8825)[2] = (35.0, 41.0, 22.0)
    options: dict[str, Any] = {} if kind == "GIF" else {"exif": exif, "icc_profile": b"planted profile" * 20}
    if kind in ("GIF", "JPEG"):
        options["comment"] = b"planted comment"
    noise = image.frombytes("RGB", (edge, edge // 2), os.urandom(edge * (edge // 2) * 3))
    noise.save(tmp_path / "a.img", kind, **options)
    assert b"planted" in (tmp_path / "a.img").read_bytes()
    content = shown(picture(tmp_path, "a.img"))
    seen = image.open(io.BytesIO(content))
    assert b"planted" not in content and not seen.getexif() and not {"icc_profile", "comment"} & set(seen.info)
    assert (seen.width < seen.height) == (kind != "GIF")  # turned as the file says


def test_large_file_is_shrunk(tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    image.frombytes("RGB", (400, 300), os.urandom(400 * 300 * 3)).save(tmp_path / "noise.png")
    assert (tmp_path / "noise.png").stat().st_size > EMBED_BYTES
    source = picture(tmp_path, "noise.png")["source"]
    assert source.startswith("data:image/jpeg;base64,")
    assert len(source) < (tmp_path / "noise.png").stat().st_size


def test_without_pillow_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "PIL", None)
    (tmp_path / "small.png").write_bytes(PNG)
    found = picture(tmp_path, "small.png")
    assert "Pillow" in found["missing"] and not found["source"]


def test_missing_file_says_so(tmp_path: Path) -> None:
    assert "gone.png: this image file is missing" in picture(tmp_path, "gone.png")["missing"]


def test_path_out_of_the_data_folder_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "secret.png").write_bytes(PNG)
    (tmp_path / "data").mkdir()
    found = picture(tmp_path / "data", "../secret.png")
    assert "is outside the data folder" in found["missing"] and not found["source"]


def test_a_file_that_is_no_image_says_so(tmp_path: Path) -> None:
    (tmp_path / "page.png").write_bytes(b"<svg onload='x'>")
    found = picture(tmp_path, "page.png")
    assert "SVG is not supported" in found["missing"] and not found["source"]
