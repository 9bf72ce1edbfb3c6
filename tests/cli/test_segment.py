"""Segmentation from RefCOCO's own files: their outlines become the codes that are learned."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ftlib.config.schema import Data
from ftlib.data.dataset import SplitRows
from ftlib.data.example import Example
from ftlib.data.location_tokens import parse_objects
from ftlib.data.sources.registry import iter_examples
from ftlib.metrics.segmentation import from_run_lengths
from tests.conftest import REPOSITORY
from tests.data.sources import releases
from tests.models.literal_masks import encode
from tests.models.test_mask_codec import random_arrays

Ftlib = Callable[..., tuple[int, str, str]]
SQUARE = [40.0, 20.0, 360.0, 20.0, 360.0, 180.0, 40.0, 180.0]
TRIANGLE = [40.0, 20.0, 360.0, 20.0, 40.0, 180.0]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Every object a square in polygons, but 1003 a square in run lengths and 1005 a triangle."""
    releases.refcoco(tmp_path)
    pixels = np.zeros((200, 400), dtype=np.uint8)
    pixels[20:180, 40:360] = 1
    runs = np.flatnonzero(np.diff(np.concatenate([[0], pixels.T.ravel(), [0]]))).tolist()
    counts = np.diff([0, *runs, 200 * 400]).tolist()

    def outline(content: dict[str, Any]) -> None:
        for one in content["annotations"]:
            one["segmentation"] = {1003: {"counts": counts, "size": [200, 400]}, 1005: [TRIANGLE]}.get(
                one["id"], [SQUARE]
            )

    releases.change(tmp_path / "refcoco" / "instances.json", outline)
    rows = iter_examples(Data(source="refcoco", root=str(tmp_path)))
    releases.draw(tmp_path, [row for row in rows if isinstance(row, Example)])
    return tmp_path


@pytest.fixture
def overrides(root: Path, shared: Path, store: Path) -> list[str]:
    np.savez(root / "vae-oid.npz", **random_arrays())
    model = [f"model.base={shared}/model", "model.dtype=float32"]
    return [*model, "task=segment", f"data.root={root}", f"evaluation.mask_decoder={root}/vae-oid.npz"]


def test_outlines_become_codes(overrides: list[str], root: Path, ftlib: Ftlib) -> None:
    config = REPOSITORY / "configs" / "refcoco.yaml"
    code, output, error = ftlib("prepare", config, *overrides)
    assert code == 0, error
    assert "expressions of part train about images that occur in valid or test" in error
    rows = [row for split in ("train", "valid", "test") for row in SplitRows(Path(output.strip()) / split)]
    assert len(rows) == 5
    full = encode(random_arrays(), np.ones((64, 64)))
    for row in rows:
        facts: dict[str, Any] = row.facts
        (one,) = parse_objects(row.suffix).objects
        assert one.box == pytest.approx((0.1, 0.1, 0.9, 0.9), abs=0.006)
        triangular = facts["ann_id"] == 1005
        assert (list(one.mask) == full) != triangular
        assert from_run_lengths(facts["mask"]["counts"], 200, 400).area == pytest.approx(
            25_600 if triangular else 51_200, rel=0.02 if triangular else 0
        )


def test_through_the_chain(overrides: list[str], ftlib: Ftlib) -> None:
    config = REPOSITORY / "configs" / "refcoco.yaml"
    assert ftlib("prepare", config, *overrides)[0] == 0
    more = ["training.max_steps=1", "training.bf16=false", "evaluation.before=false", "evaluation.max_new_tokens=21"]
    code, _, error = ftlib("train", config, *overrides, *more)
    assert code == 0, error
    code, output, error = ftlib("evaluate", "refcoco", "--split", "test", "--json")
    assert code == 0, error
    (scores,) = json.loads(output)
    assert scores["metric"] == "mIoU" and scores["n"] == 2


def test_without_what_makes_codes(overrides: list[str], ftlib: Ftlib, root: Path) -> None:
    config = REPOSITORY / "configs" / "refcoco.yaml"
    code, _, error = ftlib("prepare", config, *overrides[:-1])
    assert code == 2 and "refs(unc).p: ref 1: " in error and "evaluation.mask_decoder makes them" in error
    code, _, error = ftlib("prepare", config, *overrides, "evaluation.mask_decoder=/no/such.npz")
    assert code == 2 and "/no/such.npz: no such file" in error
    releases.change(
        root / "refcoco" / "instances.json", lambda content: content["annotations"][0].update(segmentation=[])
    )
    code, _, error = ftlib("prepare", config, *overrides)
    assert code == 2 and "refs(unc).p: ref 1: field segmentation: polygons must be" in error
