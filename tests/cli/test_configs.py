"""Every shipped config of a release: prepare, two steps of training, evaluate – on a tiny model and small files."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from ftlib.config.schema import Data
from ftlib.data.example import Example
from ftlib.data.sources.registry import iter_examples
from tests.conftest import REPOSITORY
from tests.data.sources import releases

Ftlib = Callable[..., tuple[int, str, str]]


def advertisements(root: Path) -> Path:
    """Stills and an animated GIF."""
    draw = random.Random(0)
    rows = []
    for number in range(24):
        frames = [Image.new("RGB", (20, 20), tuple(draw.choices(range(256), k=3))) for _ in range(3)]
        name = f"{number}.{('png', 'jpg', 'gif')[number % 3]}"
        more = {"save_all": True, "append_images": frames[1:]} if number % 3 == 2 else {}
        frames[0].save(root / name, **more)
        rows.append({"image": name, "prefix": "", "suffix": "yes" if number % 2 else "no"})
    (root / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root


TWO_IMAGES = ["data.split.official=false", "data.split.valid=1", "data.split.test=0", "evaluation.splits=[valid]"]
"""One to learn from, one to be asked about."""

RELEASES: dict[str, tuple[Callable[[Path], Path], list[str], str]] = {
    "ad_screening": (advertisements, [], "accuracy"),
    "coco_captions": (releases.coco_captions, ["data.split.valid=1"], "CIDEr-D"),
    "docvqa": (releases.docvqa, TWO_IMAGES, "anls"),
    "gqa": (releases.gqa, [], "accuracy"),
    "refcoco": (releases.refcoco, [], "accuracy@.5"),
    "vqav2": (releases.vqav2, TWO_IMAGES, "accuracy"),
}
"""Config → what writes its files, overrides for so few rows, its headline metric."""


@pytest.mark.parametrize("name", sorted(RELEASES))
def test_a_release_goes_through_the_chain(name: str, shared: Path, store: Path, tmp_path: Path, ftlib: Ftlib) -> None:
    make, few, headline = RELEASES[name]
    root = make(tmp_path)
    path = REPOSITORY / "configs" / f"{name}.yaml"
    section = Data(source="jsonl" if name == "ad_screening" else name, root=str(root))
    rows: list[Any] = [row for row in iter_examples(section) if isinstance(row, Example)]
    releases.draw(root, rows)
    small = [f"model.base={shared}/model", "model.dtype=float32", "model.max_length=null", f"data.root={root}"]
    small += ["training.max_steps=2", "training.bf16=false", "evaluation.before=false", *few]
    for command in ("prepare", "train"):
        code, _, error = ftlib(command, path, *small)
        assert code == 0, error
    code, output, error = ftlib("evaluate", name, "--json")
    assert code == 0, error
    results = json.loads(output)
    assert all(scores["metric"] == headline and scores["n"] > 0 for scores in results)
    assert "Only" in error and "these scores are rough" in error
    picture = next(root / row.image for row in rows)
    assert ftlib("predict", name, "--image", picture, "--prompt", "what?")[0] == 0
