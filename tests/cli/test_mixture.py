"""A mixture through the chain: what is learned, asked and reported of each part."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from ftlib.core import jsonl
from ftlib.data.dataset import SplitRows
from ftlib.data.example import write_records
from tests.conftest import REPOSITORY, read_lines
from tests.models.tiny_causal import save

Ftlib = Callable[..., tuple[int, str, str]]

CONFIG = """\
name: mixed
task: instruct
model: {family: causal, base: BASE}
adapter: {method: lora, r: 4, alpha: 16, targets: [query_key_value]}
data:
  source: mixture
  root: ROOT
  prompt: "{prefix} {input}:"
  split: {valid: 0.2, test: 0.2}
  parts:
    - {name: words, source: instructions, file: words.jsonl}
    - {name: sums, source: instructions, file: sums.json, prompt: "{prefix}=", weight: 0.5}
training: {num_train_epochs: 2, per_device_train_batch_size: 4, learning_rate: 1.0e-3}
evaluation: {splits: [test], max_new_tokens: 4, batch_size: 8}
"""


@pytest.fixture
def config(tmp_path: Path, store: Path) -> Path:
    """Twenty words, and forty sums of which those beginning with 9 are too long for the model."""
    root = tmp_path / "data"
    root.mkdir()
    words = [{"instruction": "reverse", "input": f"ab{n}", "output": f"{n}ba"} for n in range(20)]
    sums = [{"instruction": f"{n}+1", "output": str(n + 1)} for n in range(30)]
    long = [{"instruction": "9" * 600 + f"{n}", "output": "9"} for n in range(10)]
    write_records(root / "words.jsonl", words)
    (root / "sums.json").write_text(json.dumps(sums + long))
    path = tmp_path / "mixed.yaml"
    base = save("gpt_neox", tmp_path / "base", chat=False)
    path.write_text(CONFIG.replace("BASE", str(base)).replace("ROOT", str(root)))
    return path


def test_a_mixture_through_the_chain(config: Path, ftlib: Ftlib, monkeypatch: pytest.MonkeyPatch) -> None:
    from ftlib.training.data import SupervisedDataset

    seen: Counter[str] = Counter()
    read = SupervisedDataset.__getitem__

    def counted(rows: SupervisedDataset, index: int) -> object:
        seen[rows.examples[rows.indices[index]].id] += 1
        return read(rows, index)

    monkeypatch.setattr(SupervisedDataset, "__getitem__", counted)
    code, _, error = ftlib("prepare", config)
    table = [line.split() for line in error.splitlines()]
    assert (
        code == 0
        and ["words", "12", "4", "4", "1", "50.0%"] in table
        and ["sums", "24", "8", "8", "0.5", "50.0%"] in table
    )
    code, output, error = ftlib("train", config)
    assert code == 0, error
    run = Path(output.strip())
    (noted,) = [line for line in read_lines(run / "history.jsonl") if line["event"] == "too long"]
    sums = 24 - int(str(noted["dropped"]))
    assert noted["dropped"] and [n for name, n in seen.items() if name.startswith("words")] == [2] * 12
    drawn = [n for name, n in seen.items() if name.startswith("sums")]
    assert sum(drawn) == 2 * round(sums / 2) and max(drawn) == (1 if sum(drawn) <= sums else 2)
    code, output, error = ftlib("evaluate", "mixed", "--json")
    assert code == 0, error
    for scores in json.loads(output):
        assert {name: part["n"] for name, part in scores["parts"].items()} == {"words": 4, "sums": 8}
        parts = [scores["parts"][name]["metrics"]["token F1"]["value"] for name in ("words", "sums")]
        assert scores["metrics"]["token F1"]["value"] == pytest.approx((4 * parts[0] + 8 * parts[1]) / 12)
    assert "mixture/words" in error and "mixture/sums" in error
    records = read_lines(run / "eval" / "mixture" / "test" / "after" / "predictions.jsonl")
    prompts = {str(record["dataset"]): str(record["prompt"]) for record in records}
    assert prompts["words"].startswith("reverse ab") and prompts["sums"].endswith("=")
    assert ftlib("report", "mixed")[0] == 0
    assert "test words" in (run / "report.html").read_text()


def instruction_sets(root: Path) -> Path:
    """The two releases' own fields; one translation has no answer."""
    preferred = [
        {"instruction": f"{n}とは何ですか", "input": "", "output": f"数{n}です", "index": str(n), "ng_translation": "0"}
        for n in range(70)
    ]
    preferred[7]["output"] = ""
    dolly = [
        {"index": str(n), "category": "open_qa", "instruction": f"{n}を説明", "input": f"文脈{n}", "output": f"答え{n}"}
        for n in range(40)
    ]
    for file, rows in (("hh-rlhf-49k-ja.json", preferred), ("databricks-dolly-15k-ja.json", dolly)):
        (root / file).write_text(json.dumps(rows, ensure_ascii=False, indent=1))
    return root


SMALL = ["model.dtype=float32", "training.max_steps=2", "training.fp16=false", "evaluation.max_new_tokens=4"]


@pytest.mark.parametrize("name", ["opencalm_3b", "opencalm_7b", "opencalm_7b_full"])
def test_opencalm_learns_from_both_sets(name: str, tmp_path: Path, store: Path, ftlib: Ftlib) -> None:
    instruction_sets(tmp_path)
    config = REPOSITORY / "configs" / f"{name}.yaml"
    small = [f"model.base={save('gpt_neox', tmp_path / 'base')}", f"data.root={tmp_path}", *SMALL]
    code, output, error = ftlib("prepare", config, *small)
    assert code == 0 and "hh-rlhf-49k-ja.json: record 8: field output: is empty" in error, error
    found = json.loads((Path(output.strip()) / "data.json").read_text())
    assert found["bad"] == 1 and found["splits"]["train"]["parts"] == {"hh_rlhf_49k": 65, "dolly_15k": 38}
    code, _, error = ftlib("train", config, *small)
    assert code == 0, error
    code, output, error = ftlib("evaluate", name, "--json", "evaluation.before=false")
    assert code == 0, error
    (scores,) = json.loads(output)
    assert scores["n"] == 3 and scores["parts"].keys() == {"hh_rlhf_49k", "dolly_15k"}
    code, output, _ = ftlib("predict", name, "--prompt", "1とは何ですか", "--context", "文脈")
    assert code == 0 and "without context" in output and "with context" in output


def test_the_loss_on_valid_tells_each_part(config: Path, ftlib: Ftlib, store: Path) -> None:
    """Packed, and without the sums that are too long; the sums count half, as in training."""
    assert ftlib("prepare", config)[0] == 0
    code, _, error = ftlib("train", config, "evaluation.loss=true", "loss.packing=true")
    assert code == 0, error
    (metrics,) = store.glob("runs/*/mixed/*/metrics.jsonl")
    (line,) = [line for line in jsonl.read_jsonl_log(metrics) if "split" in line]
    words, sums = line["parts"]["words"], line["parts"]["sums"]
    (prepared,) = store.glob("prepared/*/valid")
    short = sum(len(row.prefix) < 600 for row in SplitRows(prepared) if row.dataset == "sums")
    assert (words["rows"], sums["rows"], line["rows"]) == (4, short, 4 + short) and short < 8
    assert f"of 12 valid rows, some are longer than 512 tokens: {8 - short} dropped" in error
    weighed = [(words, 1.0), (sums, 0.5)]
    tokens = sum(weight * part["tokens"] for part, weight in weighed)
    assert line["value"] == pytest.approx(sum(w * part["value"] * part["tokens"] for part, w in weighed) / tokens)
