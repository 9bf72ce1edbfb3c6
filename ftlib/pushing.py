"""Put a run's result on the hub, with a card that says what it is: its base, its training, its scores."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from ftlib import files, hub
from ftlib.config import Config
from ftlib.errors import UserError
from ftlib.metrics.summary import number, span
from ftlib.reporting.collect import RunRecord
from ftlib.site import site_settings

_CARD = "README.md"


def push(record: RunRecord, folder: Path, name: str, private: bool) -> str:
    """Upload a result folder and its card in one commit, making the repository if need be.

    Args:
        folder: the adapter or model.
        name: OWNER/NAME, or NAME under the user's own.

    Returns:
        The address of the repository.

    Raises:
        UserError: no login, no permission, no connection.
    """
    from huggingface_hub import CommitOperationAdd, HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError

    api = HfApi(endpoint=site_settings().get("HF_ENDPOINT"))
    parts = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name not in (files.MARKER, _CARD)]
    operations = [CommitOperationAdd(str(path.relative_to(folder)), path) for path in parts]
    operations.append(CommitOperationAdd(_CARD, card(record, folder.name).encode()))
    login = "Log in with `hf auth login`, with a token that may write; run it where the hub can be reached."
    try:
        address = api.create_repo(name, private=private, exist_ok=True)
        api.create_commit(address.repo_id, operations, commit_message=f"ftlib run {record.handle}")
    except Exception as error:
        known = isinstance(error, (HfHubHTTPError, HFValidationError, LocalTokenNotFoundError))
        if not known and not hub.is_unreachable(error):
            raise
        raise UserError(f"{name}: cannot be pushed: {str(error).strip().splitlines()[0]}", login) from None
    return str(address)


def card(record: RunRecord, kind: str) -> str:
    """The model card, with the metadata that the hub reads (Hugging Face, Model Cards).

    Args:
        kind: adapter or model.
    """
    config = record.config
    facts: dict[str, Any] = {
        "library_name": "peft" if kind == "adapter" else "transformers",
        "tags": ["ftlib", config.task],
    }
    on_hub = not hub.is_embedded(config.model) and not hub.looks_local(config.model.base)
    if on_hub:
        facts |= {
            "base_model": config.model.base,
            "base_model_relation": "adapter" if kind == "adapter" else "finetune",
        }
    head = yaml.safe_dump(facts, sort_keys=False, allow_unicode=True)
    base = config.model.base if on_hub or hub.is_embedded(config.model) else Path(config.model.base).name
    lines = [f"# {config.name}", "", f"{config.adapter.method} fine-tuning of {base} on {config.data.source}.", ""]
    return "\n".join(["---", head + "---", "", *lines, *_scores(record), *_training(config, record)]) + "\n"


def _scores(record: RunRecord) -> Iterator[str]:
    if not record.splits:
        return
    yield from ("## Scores", "", "| dataset | split | metric | before | after | 95 % interval | n |")
    yield "|---|---|---|---|---|---|---|"
    for split in record.splits:
        scores = split.latest.scores
        unit = scores["unit"]
        values = [number(one.scores["value"], unit) if one else "–" for one in (split.before, split.after)]
        interval = span(scores["interval"], unit)
        cells = [split.dataset, split.split, scores["metric"], *values, interval, str(scores["n"])]
        yield f"| {' | '.join(cells)} |"
    yield ""


def _training(config: Config, record: RunRecord) -> Iterator[str]:
    done = record.done or {}
    facts: dict[str, Any] = {
        "steps": done.get("step"),
        "rows a step": config.effective_batch,
        "seed": config.seed,
        **{name: config.training[name] for name in ("learning_rate", "num_train_epochs") if name in config.training},
        **{name: value for name, value in config.adapter.model_dump().items() if value not in (None, [])},
        "prompt": config.data.prompt,
        "run": record.identity,
    }
    yield from ("## Training", "", *(f"- {name}: {value}" for name, value in facts.items()))
