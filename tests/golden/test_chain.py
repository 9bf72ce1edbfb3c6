"""The chain on the embedded digits and tiny model: what every command prints and writes, and the losses.

Held exactly: messages, tables, files, events, fields, settings, splits. With a tolerance: losses, norms of gradients
and scores. Not held: times, places, versions and what the model answers, since CPUs round differently.
"""

from __future__ import annotations

import html
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import read_lines
from tests.golden.conftest import Command, Golden, Result, run_process
from tests.golden.normal import blank_decimals, said, squeezed

CONFIG = """\
name: digits
task: classify
seed: 0
model: {family: paligemma, base: ftlib/tiny-paligemma}
adapter: {method: full}
data:
  source: digits
  root: ${store}/datasets/digits
  split: {valid: 0.02, test: 0.03, seed: 0, stratify_by: suffix, max_train: 200}
training:
  max_steps: 30
  per_device_train_batch_size: 8
  learning_rate: 1.0e-3
  lr_scheduler_type: cosine
  warmup_steps: 0.1
  weight_decay: 0.01
checkpoint: {steps: 10, keep: 2}
evaluation: {splits: [valid, test], max_new_tokens: 4, batch_size: 64, loss: true}
"""
LORA = [
    "name=sweep",
    "adapter={method: lora, r: 4, alpha: 8, freeze: []}",
    "training.max_steps=4",
    "evaluation.loss=false",
]
LORA += ["evaluation.splits=[valid]", "evaluation.batch_size=36"]
SEEDS = [*LORA, "sweep.seed=[0, 1]"]

LOSSES = {"loss": (1e-3, 1e-4), "grad_norm": (1e-2, 1e-3), "perplexity": (1e-2, 0.0)}
_SCORE, _COUNT = (0.0, 0.35), (0.0, 54.0)
SCORES = {"value": _SCORE, "interval": _SCORE, "metrics": _SCORE, "difference": _SCORE, "p": (0.0, 1.0)}
SCORES |= {"classes": _SCORE, "support": (0.0, 0.0), "confusion": _COUNT, "invalid": _COUNT}
"""How far scores may be off: a single other answer of some 40 changes them."""


MERGED = {"norm": (1e-2, 0.0), "squares": (2e-2, 0.0), "cosine": (0.0, 1e-2), "dots": (0.0, 1e-5)}
MERGED |= {"nonzero": (1e-3, 0.0), "conflicts": (5e-2, 1e-2)}
"""How far what is told of a merge may be off: it depends on how the adapters were trained."""


@dataclass(frozen=True)
class Chain:
    """What was run: the answers of all commands by name, and where."""

    store: Path
    folder: Path
    config: Path
    answers: Mapping[str, Result]
    files: Sequence[str]

    @property
    def runs(self) -> Path:
        return self.store / "runs" / "alice"

    def run(self, name: str, number: int = 0) -> Path:
        """The folder of the only run of a name, or one of several in the order of their seeds."""
        found = sorted(
            self.runs.glob(f"{name}/*/config.yaml"), key=lambda path: re.findall("^seed: .*", path.read_text(), re.M)
        )
        return found[number].parent

    def said(self, text: str) -> str:
        """See `normal.said`."""
        return said(text, {"store": self.store, "folder": self.folder})


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory, heavy: Command) -> Chain:
    """Run everything once."""
    folder = tmp_path_factory.mktemp("chain")
    store, config = folder / "store", folder / "config.yaml"
    config.write_text(CONFIG)
    answers: dict[str, Result] = {}
    files: list[str] = []
    chain = Chain(store, folder, config, answers, files)

    def torch(name: str, *words: object, code: int = 0) -> None:
        answers[name] = found = heavy(*words, store=store, folder=folder)
        assert found.code == code, f"{name}: {found.text}"

    def light(name: str, *words: object, code: int = 0) -> None:
        answers[name] = found = run_process(*words, store=store, folder=folder)
        assert found.code == code, f"{name}: {found.text}"

    light("train, not prepared", "train", config, code=2)
    torch("stage", "stage", config)
    torch("prepare", "prepare", config)
    torch("prepare again", "prepare", config)
    torch("plan", "plan", config, "--gpu", "1GiB")
    torch("plan --json", "plan", config, "model.dtype=bfloat16", "training.bf16=true", "--json", "--gpu", "12GiB")
    torch("prompts", "prompts", config, "--prompt", "digit?", "evaluation.batch_size=36")
    torch("evaluate --before", "evaluate", config, "--before")
    torch("train", "train", config)
    light("train again", "train", config)
    torch("evaluate", "evaluate", "digits")
    torch("evaluate --json", "evaluate", "digits", "--json")
    light("report", "report", "digits")
    light("status --json", "status", "--json")
    image = store / "datasets" / "digits" / "images" / "0000.png"
    torch("predict", "predict", "digits", "--image", image, "--prompt", "which digit is this?", "--max-new-tokens", "1")
    torch("train, diverges", "train", config, "name=diverges", "guard.max_loss=5", "guard.restarts=1", code=1)
    for seed in (0, 1):
        torch(f"sweep: train {seed}", "train", config, *LORA, f"seed={seed}")
        torch(f"sweep: evaluate {seed}", "evaluate", f"sweep/{chain.run('sweep', seed).name}")
    light("sweep: report", "report", "sweep")
    light("sweep: submit --dry-run", "submit", config, *SEEDS, "--dry-run")
    models = [f"sweep/{chain.run('sweep', seed).name}" for seed in (0, 1)]
    base = store / "models" / "ftlib" / "tiny-paligemma"
    merge = ["merge", "--base", base, "--model", *models]
    torch("merge linear", *merge, "--method", "linear", "-o", folder / "linear")
    torch("merge ties", *merge, "--method", "ties", "--density", "0.3", "-o", folder / "ties")
    torch("merge again", *merge, "--method", "ties", "--density", "0.3", "-o", folder / "ties")
    light("merge, a mistake", *merge, "--method", "tie", "-o", folder / "ties", code=2)
    light("status", "status")
    light("status --usage", "status", "--usage")
    light("logs", "logs", "digits", "-n", "3")
    light("cancel", "cancel", "digits")
    files.extend(listing(store))
    light("clean", "clean", "--yes")
    return chain


def listing(store: Path) -> list[str]:
    """All files of a store, but for a dataset's images and the modules of pinned code."""
    found = sorted(str(path.relative_to(store)) for path in store.rglob("*") if path.is_file())
    kept = [name for name in found if "/images/" not in name and not re.search(r"/code/ftlib/(?!__main__)", name)]
    return [
        re.sub(r"((?:hashes|lengths|\.before)/|\.jobs/transformers-)[0-9a-f-]+", r"\1<hash>", name) for name in kept
    ]


NEEDS = {"activations": (0.05, 0.0), "total": (0.05, 0.0)}
"""Bytes of activations are those of transformers' code."""

AS_JSON = ("plan --json", "evaluate --json", "status --json")


def test_what_commands_say(chain: Chain, golden: Golden) -> None:
    told = []
    for name, answer in chain.answers.items():
        text = answer.err if name in AS_JSON else answer.text
        text = re.sub(r"\b(noise|real)\b", "<verdict>", blank_decimals(chain.said(text)))
        told.append(f"##### {name}\n{text}")
    golden.text("chain/said.txt", "\n".join(told))


def without(value: Any, *keys: str) -> Any:
    """A JSON value without some keys, wherever they stand."""
    if isinstance(value, dict):
        return {key: without(each, *keys) for key, each in value.items() if key not in keys}
    return [without(each, *keys) for each in value] if isinstance(value, list) else value


@pytest.mark.parametrize("name", AS_JSON)
def test_what_commands_print_for_programs(chain: Chain, golden: Golden, name: str) -> None:
    timed = ("seconds_per_step", "rows_per_second", "tokens_per_second", "goodput")
    found = without(json.loads(chain.said(chain.answers[name].out)), *timed, "weights", "of", "sentence", "verdict")
    golden.json(f"chain/{name.replace(' --', '-')}.json", found, **SCORES, **LOSSES, **NEEDS)


def test_metrics_of_every_step(chain: Chain, golden: Golden) -> None:
    lines = without(read_lines(chain.run("digits") / "metrics.jsonl"), "seconds", "checkpoint_seconds")
    golden.json("chain/metrics.json", lines, **LOSSES, value=LOSSES["loss"])


def data_of(run: Path) -> dict[str, Any]:
    """data.json with few of its labels, and without hashes of images: another Pillow may write other files."""
    found: dict[str, Any] = json.loads((run / "data.json").read_text())
    labels = [*found["labels"][:10], len(found["labels"])]
    return {**found, "labels": labels, "sample": [name for name, _ in found["sample"]]}


def test_facts_of_the_data(chain: Chain, golden: Golden) -> None:
    golden.json("chain/data.json", data_of(chain.run("digits")))


CONFIDENCE_FIELDS = ("mean_logprob", "min_logprob", "answer_tokens")
ROW_FIELDS = ("id", "image", "prompt", "prediction", "references")


@pytest.mark.parametrize("split", ["valid", "test"])
def test_evaluation_files(chain: Chain, golden: Golden, split: str) -> None:
    folder = chain.run("digits") / "eval" / "digits" / split
    scores = {when: json.loads((folder / when / "scores.json").read_text()) for when in ("before", "after")}
    comparison = json.loads((folder / "comparison.json").read_text())
    found = without({**scores, "comparison": comparison}, "weights", "of", "sentence", "verdict")
    golden.json(f"chain/scores-{split}.json", found, **SCORES, **LOSSES)
    rows = {when: read_lines(folder / when / "predictions.jsonl") for when in ("before", "after")}
    held = {
        when: without(each, "prediction", "score", "finish_reason", *CONFIDENCE_FIELDS) for when, each in rows.items()
    }
    assert held["before"] == held["after"]
    assert {type(row["prediction"]) for row in rows["after"]} == {str}
    assert {row["score"] for row in rows["after"]} <= {0.0, 1.0}
    golden.json(f"chain/predictions-{split}.json", held["after"])
    assert list(rows["after"][0]) == [*ROW_FIELDS, "finish_reason", *CONFIDENCE_FIELDS, "score"]


NOT_HELD = ("time", "host", "log", "seconds")


@pytest.mark.parametrize("name", ["digits", "diverges", "sweep"])
def test_history(chain: Chain, golden: Golden, name: str) -> None:
    events = read_lines(chain.run(name) / "history.jsonl")
    for event in events:
        event.update({key: "…" for key in NOT_HELD if key in event})
        event.update({"reason": blank_decimals(chain.said(str(event["reason"])))} if "reason" in event else {})
    golden.json(f"chain/history-{name}.json", events)


def test_files(chain: Chain, golden: Golden) -> None:
    """Of the run and the store, before `clean`; images of the dataset and modules of the pinned code are left out."""
    golden.text("chain/files.txt", "".join(f"{line}\n" for line in chain.files))


def test_run_files(chain: Chain, golden: Golden) -> None:
    run = chain.run("digits")
    environment = json.loads((run / "environment.json").read_text())
    found = {
        "config.yaml": (run / "config.yaml").read_text().splitlines(),
        "DONE": json.loads((run / "DONE").read_text()),
        "base.json": sorted(json.loads((run / "base.json").read_text())),
        "environment.json": [dict.fromkeys(start, "…") for start in environment],
        "COMPLETE.json": sorted(json.loads((run / "model" / "COMPLETE.json").read_text())),
    }
    golden.json("chain/run.json", found)


def test_model_card(chain: Chain, golden: Golden) -> None:
    golden.text("chain/card.md", blank_decimals((chain.run("digits") / "model" / "README.md").read_text()))
    golden.text("chain/card-adapter.md", blank_decimals((chain.run("sweep") / "adapter" / "README.md").read_text()))


TITLES = re.compile(r"<(title|h1|h2|h3|summary|figcaption|th scope=\"(?:col|row)\")[^>]*>(.*?)</(?:t|h|s|f)", re.DOTALL)


def skeleton(page: str) -> str:
    """Headings, captions and the heads of tables, in their order; without times and how many answers were wrong."""
    text = re.sub(r'<span class="count">.*?</span>|\d{4}-\d\d-\d\d \d\d:\d\d:\d\dZ', "…", page.split("</style>")[-1])
    found = [(tag.split()[0], re.sub(r"<[^>]*>", " ", content)) for tag, content in TITLES.findall(text)]
    return "".join(f"{tag}: {' '.join(html.unescape(content).split())}\n" for tag, content in found)


@pytest.mark.parametrize("name", ["digits", "sweep"])
def test_report(chain: Chain, golden: Golden, name: str) -> None:
    folder = chain.run("digits") if name == "digits" else chain.runs / "sweep"
    golden.text(f"chain/report-{name}.md", blank_decimals((folder / "report.md").read_text()))
    lines = [line.split(",") for line in (folder / "report.csv").read_text().splitlines()]
    assert lines[0][6:9] == ["value", "low", "high"]
    golden.text(f"chain/report-{name}.csv", "".join(f"{','.join(line[:6] + line[9:])}\n" for line in lines))
    golden.text(f"chain/report-{name}.html.txt", blank_decimals(skeleton((folder / "report.html").read_text())))


@pytest.mark.parametrize("method", ["linear", "ties"])
def test_merge(chain: Chain, golden: Golden, method: str) -> None:
    folder = chain.folder / method
    found = json.loads(chain.said((folder / "merge.json").read_text()))
    found["inputs"] = {name: sorted(files) for name, files in found["inputs"].items()}
    found["environment"] = dict.fromkeys(found["environment"], "…")
    golden.json(f"chain/merge-{method}.json", without(found, "identity"), **MERGED)
    card = blank_decimals(squeezed((folder / "README.md").read_text()))
    golden.text(f"chain/merge-{method}.md", re.sub(r"`[0-9a-f]{64}`|(?<=^Made with ).*", "…", card, flags=re.MULTILINE))
