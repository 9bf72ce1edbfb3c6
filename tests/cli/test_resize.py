"""`model.resize: bilinear`: pixels of training, of answers, of a result and of its merge."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from ftlib.config.loader import load_experiment
from ftlib.core.paths import find_site
from ftlib.hub.cache import image_resampling
from ftlib.models.paligemma import PaliGemmaInputProcessor
from tests.conftest import FULL, LORA

Ftlib = Callable[..., tuple[int, str, str]]
WriteConfig = Callable[..., Path]
STEPS = ("max_steps: 12", "max_steps: 2")


@pytest.mark.parametrize("adapter", [LORA, FULL], ids=["lora", "full"])
def test_a_result_says_how_images_are_resized(
    adapter: str, write_config: WriteConfig, store: Path, shared: Path, tmp_path: Path, ftlib: Ftlib
) -> None:
    config = write_config(adapter, replace=STEPS)
    plain = load_experiment(config, [], find_site()).identity
    assert load_experiment(config, ["model.resize=processor"], find_site()).identity == plain
    assert load_experiment(config, ["model.resize=bilinear"], find_site()).identity != plain
    for command in ("stage", "prepare"):
        assert ftlib(command, config)[0] == 0
    code, output, error = ftlib("train", config, "model.resize=bilinear")  # what is prepared serves both
    assert code == 0, error
    run = Path(output.strip())
    result = run / ("adapter" if adapter == LORA else "model")
    base = shared / "model"
    assert image_resampling(base) == Image.Resampling.BICUBIC
    assert image_resampling(result) == Image.Resampling.BILINEAR
    merged = tmp_path / "merged"
    code, _, error = ftlib("merge", "--base", base, "--model", run, "--method", "linear", "-o", merged)
    assert code == 0, error
    assert PaliGemmaInputProcessor.load(merged).processor.image_processor.resample == Image.Resampling.BILINEAR


def test_pixels(shared: Path) -> None:
    base = shared / "model"
    image = Image.radial_gradient("L").convert("RGB").resize((70, 50))
    processor, bilinear = PaliGemmaInputProcessor.load(base), PaliGemmaInputProcessor.load(base, resize="bilinear")
    side = processor.processor.image_processor.size["width"]
    expected = image.resize((side, side), Image.Resampling.BILINEAR)
    found = bilinear._image_inputs([image])["pixel_values"][0].permute(1, 2, 0).numpy()
    assert Image.fromarray(found).tobytes() == expected.tobytes()
    ours, theirs = (one._image_inputs([image])["pixel_values"] for one in (bilinear, processor))
    assert not ours.equal(theirs)


def test_only_for_paligemma(write_config: WriteConfig, store: Path, ftlib: Ftlib) -> None:
    config = write_config()
    code, _, error = ftlib("stage", config, "model.family=causal", "model.resize=bilinear")
    assert code == 2 and "resize: bilinear is only for family: paligemma" in error
