"""A prepared dataset: checked, split, fingerprinted rows in the store.

`<store>/prepared/<source>-<key>/` holds train.jsonl, valid.jsonl, test.jsonl and data.json. The key is the hash of the
config's data section (but for the prompt, which is applied when rows are read) and of the annotation file. Images that
are replaced in place are not noticed.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ftlib import files
from ftlib.config import Config
from ftlib.console import tracked
from ftlib.data.examples import Example, load_prepared, raise_faults, write_examples
from ftlib.data.images import image_path, open_image
from ftlib.data.prompts import prompt_of
from ftlib.data.sources import MAKERS, annotation_file, read_source
from ftlib.data.splits import SPLITS, split_examples
from ftlib.errors import UserError
from ftlib.site import Site


@dataclass(frozen=True)
class Prepared:
    """A prepared dataset.

    Attributes:
        folder: where it lies.
        root: what the images' paths are relative to.
        facts: data.json: source, fingerprint and number of rows per split, labels.
    """

    folder: Path
    root: Path
    facts: dict[str, Any]

    def rows(self, split: str) -> list[Example]:
        """The rows of a split."""
        return load_prepared(self.folder / f"{split}.jsonl")

    @property
    def labels(self) -> list[str]:
        """Every answer that occurs, sorted."""
        return list(self.facts["labels"])


def prepared_folder(config: Config, site: Site) -> Path:
    """Where the prepared form of a config's dataset lies, or would lie.

    Raises:
        UserError: the annotation file is missing.
    """
    source = annotation_file(config.data)
    if not source.is_file():
        made = config.data.source in MAKERS
        remedy = "Run `ftlib stage CONFIG` first." if made else "Check data.root and data.file."
        raise UserError(f"{source}: no such file", remedy)
    rule = config.data.model_dump(exclude={"prompt"})
    key = files.fingerprint([rule, files.sha256(source)])[:12]
    return site.store / "prepared" / f"{config.data.source}-{key}"


def open_prepared(config: Config, site: Site) -> Prepared:
    """The prepared form of a config's dataset.

    Raises:
        UserError: it has not been prepared.
    """
    folder = prepared_folder(config, site)
    if not files.is_complete(folder):
        raise UserError(f"the dataset of this config is not prepared ({folder})", "Run `ftlib prepare CONFIG` first.")
    return Prepared(folder=folder, root=Path(config.data.root), facts=files.read_json(folder / "data.json"))


def check_rows(config: Config) -> tuple[list[Example], dict[str, str]]:
    """Read every row and decode every image once.

    Returns:
        The rows, and the SHA-256 of each image file by its name.

    Raises:
        UserError: every faulty line or image (the first 20 in words); a prompt that names fields the rows lack.
    """
    examples = read_source(config.data)
    prompt_of(examples[0], config.data.prompt)
    root = Path(config.data.root)
    faults, digests = [], {}
    for name in tracked(sorted({example.image for example in examples if example.image}), "checking images"):
        try:
            path = image_path(root, name)
            open_image(path)
            digests[name] = files.sha256(path)
        except UserError as error:
            row = next(example for example in examples if example.image == name)
            faults.append(f"{annotation_file(config.data)}: row {row.id}: {error.problem}")
    raise_faults(faults, "Mend or remove these rows; nothing was written.")
    return examples, digests


def prepare(config: Config, site: Site) -> Prepared:
    """Check, split and write a dataset.

    Raises:
        UserError: faulty rows, impossible splits, storage full or read-only.
    """
    examples, digests = check_rows(config)
    examples = [replace(example, digest=digests.get(example.image, "")) for example in examples]
    splits = split_examples(examples, config.data.split)
    with files.publish_folder(prepared_folder(config, site)) as folder:
        for split, rows in splits.items():
            write_examples(folder / f"{split}.jsonl", rows)
        files.write_json(folder / "data.json", _facts(config, splits))
    return open_prepared(config, site)


def _facts(config: Config, splits: dict[str, list[Example]]) -> dict[str, Any]:
    prints = {split: {"rows": len(splits[split]), "fingerprint": _print(splits[split])} for split in SPLITS}
    return {
        "source": config.data.source,
        "rule": config.data.split.model_dump(),
        "labels": sorted({example.suffix for rows in splits.values() for example in rows}),
        "splits": prints,
    }


def _print(rows: list[Example]) -> str:
    """Fingerprint of a split: every field of its rows and the images' bytes, in any order."""
    return files.fingerprint(sorted(files.fingerprint(asdict(row)) for row in rows))[:16]
