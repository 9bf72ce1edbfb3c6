"""The chain of a text model and of a detector, three steps long: what is said and prepared, the losses, the scores."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY, read_lines
from tests.golden.conftest import Command, Golden
from tests.golden.normal import blank_decimals, said
from tests.golden.test_chain import LOSSES, data_of, without

SHORT = ["training.max_steps=3", "training.per_device_train_batch_size=4", "training.warmup_steps=1"]
SMALL = "data.split={valid: 8, test: 8, seed: 0, max_train: 40, max_eval: 8}"
CONFIGS = {
    "instruct_tiny": [*SHORT, SMALL, "loss.packing=true", "evaluation.without_context=true", "evaluation.batch_size=8"],
    "digits_detect": [*SHORT, SMALL, "evaluation.max_new_tokens=5", "evaluation.batch_size=8"],
}


@dataclass(frozen=True)
class Done:
    """A config's run, and what the commands said."""

    name: str
    run: Path
    told: str


@pytest.fixture(scope="module", params=CONFIGS)
def done(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, heavy: Command) -> Done:
    """Stage, prepare, train and evaluate a shipped config, made small."""
    folder = tmp_path_factory.mktemp(request.param)
    store, config = folder / "store", REPOSITORY / "configs" / f"{request.param}.yaml"
    told = []
    for command in ("stage", "prepare", "train", "evaluate"):
        found = heavy(command, config, *CONFIGS[request.param], store=store, folder=folder)
        assert found.code == 0, found.err
        told.append(f"##### {command}\n{blank_decimals(said(found.text, {'store': store, 'folder': folder}))}")
    (run,) = (path.parent for path in store.glob("runs/alice/*/*/DONE"))
    return Done(request.param, run, "\n".join(told))


def test_what_commands_say(done: Done, golden: Golden) -> None:
    golden.text(f"tasks/{done.name}.txt", done.told)


def test_data_and_losses(done: Done, golden: Golden) -> None:
    found = {
        "data.json": data_of(done.run),
        "metrics.jsonl": without(read_lines(done.run / "metrics.jsonl"), "seconds"),
    }
    golden.json(f"tasks/{done.name}.json", found, **LOSSES)


OF_THE_ANSWERS = ("prediction", "score", "mean_logprob", "min_logprob", "answer_tokens", "box_scores")


def test_evaluation_files(done: Done, golden: Golden) -> None:
    """Which scores and fields there are, and what was asked; the answers are those of three steps."""
    found = {}
    for path in sorted(done.run.glob("eval/*/*/*/scores.json")):
        scores = json.loads(path.read_text())
        rows = without(read_lines(path.with_name("predictions.jsonl")), *OF_THE_ANSWERS)
        known = {key: scores[key] for key in ("metric", "rule", "unit", "n", "groups", "settings") if key in scores}
        held = {"fields": list(scores), "metrics": list(scores["metrics"]), **without(known, "weights")}
        found[str(path.parent.relative_to(done.run))] = {**held, "predictions": rows}
    golden.json(f"tasks/{done.name}-evaluation.json", found)
