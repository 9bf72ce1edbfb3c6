"""Rows with two images, one and none through every command; a conversation with images and labels on all answers."""

from __future__ import annotations

import json
from base64 import b64encode
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ftlib.models.generation import generate_answers
from ftlib.models.loading import load_weights
from ftlib.models.vlm import VisionLanguageProcessor
from tests.conftest import LORA, read_lines
from tests.fake_hub import serving
from tests.models import tiny_vlm

Ftlib = Callable[..., tuple[int, str, str]]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    (folder / "images").mkdir(parents=True)
    noise = np.random.default_rng(0)
    for number in range(36):
        pixels = noise.integers(0, 255, (20 + number % 3, 24, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "images" / f"{number}.png")
    return folder


def write(data: Path, rows: list[dict[str, object]]) -> None:
    (data / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def images_of(number: int) -> list[str]:
    return [f"images/{one}.png" for one in (number, 24 + number % 12)][: 2 - number % 3]


def test_paligemma(data: Path, store: Path, write_config: Callable[..., Path], ftlib: Ftlib) -> None:
    write(data, [{"images": images_of(n), "prefix": f"which {n}?", "suffix": "ab"[n % 2]} for n in range(24)])
    config = write_config(LORA, root=str(data), replace=("max_steps: 12", "max_steps: 4"))
    for command in ("stage", "prepare", "plan", "train", "evaluate"):
        code, _, error = ftlib(command, config, *(["--gpu", "4GiB"] if command == "plan" else []))
        assert code == 0, error
    (run,) = (store / "runs").glob("*/tiny/*")
    records = read_lines(next(run.glob("eval/*/valid/after/predictions.jsonl")))
    split_of = {record["id"]: record for record in records}
    assert {len(record.get("images", [1])) for record in split_of.values()} >= {1, 2}
    pair = next(record for record in records if "images" in record)
    assert pair["images"] == images_of(int(pair["prompt"][6:-1]))
    lengths = np.load(next((store / "lengths").glob("*.npy")))
    assert len(set(lengths[:, 0])) >= 3
    pictures = [data / name for name in pair["images"]]
    code, answer, error = ftlib(
        "predict", run, "--prompt", pair["prompt"], *(word for path in pictures for word in ("--image", path)), "--json"
    )
    assert code == 0, error
    assert json.loads(answer)[0]["answer"] == pair["prediction"]
    questions = data / "questions.json"
    write_questions = [{"prompt": pair["prompt"], "images": list(map(str, pictures))}, {"prompt": "x", "images": []}]
    questions.write_text(json.dumps(write_questions))
    code, answer, error = ftlib("predict", run, "--file", questions, "--json")
    assert code == 0, error
    assert json.loads(answer)[0]["answer"] == pair["prediction"] and len(json.loads(answer)) == 2
    assert "needs an image" in ftlib("predict", run, "--prompt", "x")[2]
    assert ftlib("report", run)[0] == 0
    page = next(run.glob("**/*.html")).read_text()
    assert all(f'alt="{name}"' in page for name in pair["images"])


def test_a_shared_image_keeps_rows_together(
    data: Path, store: Path, write_config: Callable[..., Path], ftlib: Ftlib
) -> None:
    """Also as the second of several, and under another name."""
    (data / "images" / "copy.png").write_bytes((data / "images" / "0.png").read_bytes())
    rows = [{"images": [f"images/{n}.png", "images/20.png"], "prefix": "q", "suffix": "a"} for n in (0, 1, 2)]
    rows += [{"images": ["images/3.png", "images/copy.png"], "prefix": "q", "suffix": "b"}]
    rows += [{"image": f"images/{n}.png", "prefix": "q", "suffix": "ab"[n % 2]} for n in range(4, 20)]
    write(data, rows)
    config = write_config(LORA, root=str(data))
    for command in ("stage", "prepare"):
        code, _, error = ftlib(command, config)
        assert code == 0, error
    from datasets import load_from_disk

    (folder,) = (store / "prepared").iterdir()
    splits = load_from_disk(str(folder))
    together = [name for name, split in splits.items() for other in split["other_images"] if other]
    assert len(together) == 4 and len(set(together)) == 1
    digests = [one for split in splits.values() for row in split["other_digests"] if row for one in row]
    assert all(len(digest) == 64 for digest in digests)
    (data / "images" / "20.png").write_bytes((data / "images" / "5.png").read_bytes())
    assert ftlib("train", config, "training.max_steps=1")[0] != 0 or together[0] != "train"


def test_labels_on_all_answers_of_a_conversation(
    data: Path, tmp_path: Path, store: Path, write_config: Callable[..., Path], ftlib: Ftlib
) -> None:
    tiny_vlm.save("gemma3", tmp_path / "gemma3")
    rows = []
    for n in range(18):
        said = [f"{'<image>' * len(images_of(n))}what?", "a digit", "which?", "ab"[n % 2]]
        turns = [{"from": who, "value": text} for who, text in zip(["human", "gpt"] * 2, said, strict=True)]
        rows.append({"conversations": turns, "images": images_of(n), "system": "Be brief."})
    write(data, rows)  # type: ignore[arg-type]
    config = write_config(LORA, str(tmp_path / "gemma3"), str(data), ("family: paligemma", "family: vlm"))
    text = config.read_text().replace("max_steps: 12", "max_steps: 2").replace("task: classify", "task: instruct")
    chat = "source: instructions\n  prompt: chat\n  chat_turns: all"
    config.write_text(text.replace("source: jsonl", chat))
    for command in ("stage", "prepare", "train", "evaluate"):
        code, _, error = ftlib(command, config)
        assert code == 0, error
    (run,) = (store / "runs").glob("*/tiny/*")
    records = read_lines(next(run.glob("eval/*/valid/after/predictions.jsonl")))
    assert all(record["references"][0] in ("a", "b") for record in records)
    lengths = np.load(next((store / "lengths").glob("*.npy")))
    assert lengths[:, 1].min() > 10, "labels from the first answer on"


def test_conversations_with_images_of_a_hub_dataset(
    data: Path, tmp_path: Path, store: Path, write_config: Callable[..., Path], ftlib: Ftlib,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """From a list column of images and messages in parts, as the hub has them, to the report's pictures."""
    import datasets

    tiny_vlm.save("gemma3", tmp_path / "gemma3")
    text, number = datasets.Value("string"), datasets.Value("int64")
    features = {
        "messages": [{"role": text, "content": [{"type": text, "text": text, "index": number}]}],
        "images": datasets.List(datasets.Image()),
    }
    rows = []
    for n in range(18):
        parts = [{"type": "image", "text": None, "index": at} for at in range(len(images_of(n)))]
        said = [[*parts, {"type": "text", "text": f"what {n}?", "index": None}]]
        said += [[{"type": "text", "text": words, "index": None}] for words in ("a digit", "which?", "ab"[n % 2])]
        turns = [{"role": ("user", "assistant")[at % 2], "content": each} for at, each in enumerate(said)]
        rows.append({"messages": turns, "images": [{"bytes": (data / name).read_bytes()} for name in images_of(n)]})
    dataset = tmp_path / "hub" / "datasets" / "lab" / "chats"
    datasets.Dataset.from_list(rows, datasets.Features(features)).to_parquet(dataset / "data" / "train.parquet")
    chat = "source: hub\n  file: lab/chats\n  columns: {image: images}\n  prompt: chat\n  chat_turns: all"
    config = write_config(LORA, str(tmp_path / "gemma3"), str(tmp_path / "extracted"), ("source: jsonl", chat))
    few = config.read_text().replace("max_steps: 12", "max_steps: 1").replace("task: classify", "task: instruct")
    config.write_text(few.replace("family: paligemma", "family: vlm").replace("valid: 0.2, test: 0.2", "valid: 0.8"))
    with serving(tmp_path / "hub", tmp_path, monkeypatch):
        code, _, error = ftlib("stage", config)
    assert code == 0, error
    for command in ("prepare", "train", "evaluate"):
        code, _, error = ftlib(command, config)
        assert code == 0, error
    (run,) = (store / "runs").glob("*/tiny/*")
    records = read_lines(next(run.glob("eval/*/valid/after/predictions.jsonl")))
    for record in records:
        asked = json.loads(record["prompt"])[0]["content"]
        n = int((asked if isinstance(asked, str) else asked[-1]["text"])[5:-1])
        shown = record.get("images", [record["image"]] if record["image"] else [])
        extracted = [(tmp_path / "extracted" / name).read_bytes() for name in shown]
        assert extracted == [(data / name).read_bytes() for name in images_of(n)]
        assert record["references"] == ["ab"[n % 2]]
    assert len(records) >= 3 and any("images" in record for record in records)
    assert ftlib("report", run)[0] == 0
    page = next(run.glob("**/*.html")).read_text()
    assert all(f'alt="{name}"' in page for record in records for name in record.get("images", []))


def test_a_model_s_folder_without_a_run_is_asked_about_several_images(data: Path, tmp_path: Path, ftlib: Ftlib) -> None:
    """About none, one and two images; answers are those of the processor's own rows."""
    folder = tmp_path / "gemma3"
    tiny_vlm.save("gemma3", folder)
    asked = [{"prompt": "what?", "images": [f"images/{one}.png" for one in range(count)]} for count in (2, 1, 0)]
    (data / "questions.json").write_text(json.dumps(asked))
    code, answers, error = ftlib(
        "predict", folder, "--file", data / "questions.json", "--json", "--max-new-tokens", "6"
    )
    assert code == 0, error
    processor, model = VisionLanguageProcessor.load(folder), load_weights(folder, "float32", "vlm").eval()
    for question, answer in zip(asked, json.loads(answers), strict=True):
        pictures = [Image.open(data / name).convert("RGB") for name in question["images"]]
        (row,) = processor.encode_prompts([question["prompt"]], pictures)
        assert answer["answer"] == generate_answers(model, processor, [row], 6)[0].strip()
    assert len({answer["mean_logprob"] for answer in json.loads(answers)}) == 3
    for image in ("https://host/a.png?key=secret", "data:image/png;base64,AAAA"):
        (data / "questions.json").write_text(json.dumps([{"prompt": "what?", "image": image}]))
        code, _, error = ftlib("predict", folder, "--file", data / "questions.json")
        assert code == 2 and "record 1: images of questions are paths" in error and "secret" not in error


def test_check_and_prepare_read_images_inside_rows(
    data: Path, store: Path, write_config: Callable[..., Path], ftlib: Ftlib
) -> None:
    """`data:` URIs, one and two of a row; with `privacy.images: false` the report shows none."""
    uris = ["data:image/png;base64," + b64encode(path.read_bytes()).decode() for path in sorted(data.glob("images/*"))]
    write(data, [{"images": uris[n : n + n % 3], "prefix": "q", "suffix": "ab"[n % 2]} for n in range(24)])
    config = write_config(LORA, root=str(data), replace=("max_steps: 12", "max_steps: 1"))
    config.write_text(config.read_text() + "privacy: {images: false}\n")
    code, output, error = ftlib("prepare", config, "--check")
    assert code == 0 and "24" in output, error
    assert not (data / ".images").exists()
    for command in ("prepare", "train", "evaluate"):
        code, _, error = ftlib(command, config)
        assert code == 0, error
    (run,) = (store / "runs").glob("*/tiny/*")
    records = read_lines(next(run.glob("eval/*/valid/after/predictions.jsonl")))
    assert {len(record.get("images", [1] if record["image"] else [])) for record in records} >= {0, 1}
    assert ftlib("report", run)[0] == 0
    assert "data:image/" not in next(run.glob("**/*.html")).read_text().replace("data:image/svg", "")
