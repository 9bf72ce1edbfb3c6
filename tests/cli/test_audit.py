"""An audit as a user runs it: folds, a page and CSV files, the corrected file applied; no model is trained here."""

from __future__ import annotations

import csv
import json
import shlex
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ftlib.cli.audit import _folds
from ftlib.config.loader import read_raw_config
from ftlib.core import files
from ftlib.core.paths import find_site
from ftlib.data.dataset import open_prepared
from ftlib.runs.run import create_run
from ftlib.slurm.sweep import expand_sweep
from tests.conftest import read_lines

Ftlib = Callable[..., tuple[int, str, str]]

CONFIG = """\
name: pets
task: classify
model: {family: paligemma, base: ftlib/tiny-paligemma}
adapter: {method: full}
data: {source: jsonl, root: ROOT, prompt: "{prefix}", split: {test: 0.2}}
training: {max_steps: 2}
"""
WRONG = {"7", "21"}
EVIL = "<b>cat</b>"
LABELS = [EVIL, "dog"]


@pytest.fixture
def config(tmp_path: Path, store: Path) -> Path:
    """Forty rows, of which 7 and 21 have the other label; 31 shows, behind another image, that of 30 a little
    brighter."""
    root = tmp_path / "data"
    root.mkdir()
    draw = np.random.default_rng(0)
    lines, before = [], np.zeros((32, 32, 3), dtype=np.uint8)
    for number in range(40):
        pixels = np.minimum(before + 9, 255) if number == 31 else draw.integers(0, 240, (32, 32, 3), dtype=np.uint8)
        before = pixels
        Image.fromarray(pixels.astype(np.uint8)).save(root / f"{number}.png")
        right = number % 2 if str(number) not in WRONG else 1 - number % 2
        shown = {"images": ["other.png", "31.png"]} if number == 31 else {"image": f"{number}.png"}
        lines.append({"id": str(number), **shown, "prefix": "which pet?", "suffix": [EVIL, "dog"][right]})
    Image.fromarray(draw.integers(0, 240, (32, 32, 3), dtype=np.uint8)).save(root / "other.png")
    (root / "data.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    path = tmp_path / "pets.yaml"
    path.write_text(CONFIG.replace("ROOT", str(root)))
    return path


def answer(ftlib: Ftlib, config: Path, decode: str = "choose") -> None:
    """Leave what training and evaluation of every fold leave: a model that knows the true label."""
    site = find_site()
    for member in expand_sweep(_folds(read_raw_config(config, []), 2), site):
        experiment = member.experiment
        own, rule = config.with_name("fold.yaml"), experiment.config.data.split
        own.write_text(config.read_text().replace("{test: 0.2}", f"{{test: 0.2, folds: 2, fold: {rule.fold}}}"))
        assert ftlib("prepare", own)[0] == 0
        prepared, run = open_prepared(experiment.config, site), create_run(experiment, site)
        for split in ("valid", "test"):
            records = []
            for row in prepared.rows(split):
                share, truth = 0.95 - 0.01 * (int(row.id) % 7), int(row.id) % 2
                shares = {LABELS[truth]: share, LABELS[1 - truth]: 1 - share}
                known = {"probabilities": shares} if decode == "choose" else {}
                record = {"id": row.id, "image": row.image, "prompt": row.prefix, "prediction": LABELS[truth]}
                records.append({**record, "references": [row.suffix], **known})
            with files.atomic_directory(run.evaluation_folder("jsonl", split, "after")) as folder:
                text = "".join(json.dumps(one) + "\n" for one in records)
                files.write_text(folder / "predictions.jsonl", text, urls=False)
        files.write_json(run.done_marker, {"step": 2, "result": "model"})


def read_csv(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(path.open(newline="")))


def test_a_cross_validation_finds_wrong_labels_and_its_csv_is_applied(
    config: Path, ftlib: Ftlib, store: Path, tmp_path: Path
) -> None:
    code, _, error = ftlib("audit", config, "--folds", "2")
    assert code == 2 and "2 of 2 runs" in error and "--executor slurm" in error
    answer(ftlib, config)
    code, output, error = ftlib("audit", config, "--folds", "2")
    assert code == 0 and "2 of 40 labels are likely wrong" in error, error
    page = Path(output.strip())
    assert page.parent.name == "pets-audit" and page.name == "audit.html"
    text = page.read_text()
    assert "2 of 40 labels are likely wrong" in text and EVIL not in text and "&lt;b&gt;cat" in text
    assert text.count("data:image") >= 2 and "not audited" not in text
    rows = read_csv(page.with_name("audit-labels.csv"))
    assert {row["id"] for row in rows} == WRONG and {row["label"] for row in rows} == {""}
    assert text.count('<img src="data:image/') == len(rows) + 2  # and a pair of near-duplicates
    assert {(row["given"], row["suggested"]) for row in rows} == {(EVIL, "dog")}
    assert {row["split"] for row in rows} <= {"fold 1", "fold 2", "test"}
    pairs = page.with_name("audit-near-duplicates.csv")
    (pair,) = read_csv(pairs)
    assert {(pair["id_1"], pair["image_1"]), (pair["id_2"], pair["image_2"])} == {("30", "30.png"), ("31", "31.png")}
    corrected = tmp_path / "corrected.csv"
    corrected.write_text("id;label;drop\n7;dog;\n21;;x\n")
    target = tmp_path / "data" / "corrected.jsonl"
    code, _, error = ftlib("audit", "pets-audit", "--apply", corrected, "-o", target)
    assert code == 0 and "1 labels changed, 1 rows left out" in error and "data.file=corrected.jsonl" in error
    before = {line["id"]: line for line in read_lines(tmp_path / "data" / "data.jsonl")}
    after = {line["id"]: line for line in read_lines(target)}
    assert before.pop("21") and after.pop("7") == {**before.pop("7"), "suffix": "dog"} and after == before
    assert ftlib("prepare", config, "data.file=corrected.jsonl")[0] == 0


def test_of_a_single_run_only_what_it_did_not_see_is_judged(config: Path, ftlib: Ftlib, store: Path) -> None:
    answer(ftlib, config)
    run = sorted((store / "runs").glob("*/pets-audit/*/DONE"))[0].parent
    code, output, error = ftlib("audit", run, "--no-duplicates")
    assert code == 0 and "pairs" not in error
    assert "rows are not audited, because every model was trained on them" in Path(output.strip()).read_text()


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("id,label\n7,dog\n", "column drop is missing"),
        ("id,label,drop\n7,dog,\n7,,x\n", "id 7 occurs twice"),
        ("id,label,drop\n99,dog,\n", "id 99: no such row"),
        ("id,label,drop\n7,dog, or cat,\n", "bad.csv:2: more cells than columns"),
        ("id,given,label,drop\n8,mouse,dog,\n", "its label is '<b>cat</b>', but the column given has 'mouse'"),
        ("id,label,drop\n7,\xe9,\n", "bad.csv: is not UTF-8"),
    ],
)
def test_mistakes(config: Path, ftlib: Ftlib, store: Path, tmp_path: Path, text: str, told: str) -> None:
    answer(ftlib, config, "generate")
    code, _, error = ftlib("audit", "pets-audit")
    assert code == 2 and "no evaluation with the probabilities" in error and "evaluation.decode=choose" in error
    (tmp_path / "bad.csv").write_text(text, encoding="latin-1")
    target = tmp_path / "data" / "new.jsonl"
    code, _, error = ftlib("audit", "pets-audit", "--apply", tmp_path / "bad.csv", "-o", target)
    assert code == 2 and told in error and not target.exists()
    for place in (tmp_path / "elsewhere.jsonl", tmp_path / "data" / "data.jsonl"):
        code, _, error = ftlib("audit", "pets-audit", "--apply", tmp_path / "bad.csv", "-o", place)
        assert code == 2 and ("in the dataset's folder" in error or "is a file of the dataset" in error)
    code, _, error = ftlib("audit", "pets-audit", "data.prompt=x")
    assert code == 2 and "for a CONFIG" in error and "Traceback" not in error


def test_rows_of_text_and_of_renamed_fields(config: Path, ftlib: Ftlib, store: Path, tmp_path: Path) -> None:
    """The printed fields make the config fit the corrected file; rows without an image say so there, too."""
    lines = [{"id": str(n), "q": f"pet {n}?", "a": LABELS[n % 2], "image": None} for n in range(40)]
    (tmp_path / "data" / "data.jsonl").write_bytes("".join(json.dumps(line) + "\n" for line in lines).encode("utf-16"))
    columns = "source: jsonl, encoding: utf-16, columns: {prefix: q, suffix: a}"
    config.write_text(config.read_text().replace("source: jsonl", columns))
    answer(ftlib, config)
    corrected = tmp_path / "corrected.csv"
    corrected.write_text(f"id,given,label,drop\n7,dog,bird,\n21,dog,,x\n8,{EVIL},,\n", encoding="utf-8-sig")
    target = tmp_path / "data" / "new" / "corrected.jsonl"
    target.parent.mkdir()
    code, _, error = ftlib("audit", "pets-audit", "--apply", corrected, "-o", target)
    assert code == 0 and "do not have yet: 'bird'; check their spelling" in error, error
    fields = shlex.split(error.partition("use it with: ")[2].splitlines()[0])
    assert "data.file=new/corrected.jsonl" in fields and "data.encoding=utf-8" in fields
    code, _, error = ftlib("prepare", config, "--check", *fields)
    assert code == 0, error
    assert {(line["prefix"], line["suffix"]) for line in read_lines(target)} >= {("pet 7?", "bird"), ("pet 9?", "dog")}


def test_urls_with_a_password_stay_whole_in_the_csv_and_in_the_corrected_rows(
    config: Path, ftlib: Ftlib, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In labels and prompts; a row with a secret of the environment, which is masked everywhere, is an error."""
    labels = ["https://me:pw7890@host/cat", "dog"]
    monkeypatch.setattr(f"{__name__}.LABELS", labels)
    lines = [
        {"id": str(n), "prefix": f"https://me:pw7890@host/{n}?", "suffix": labels[n % 2], "image": None}
        for n in range(40)
    ]
    lines[8]["suffix"] = "dog"
    (tmp_path / "data" / "data.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    answer(ftlib, config)
    code, output, error = ftlib("audit", config, "--folds", "2")
    assert code == 0, error
    page = Path(output.strip())
    assert "pw7890" not in page.read_text()
    rows = read_csv(page.with_name("audit-labels.csv"))
    assert [(row["id"], row["given"], row["suggested"]) for row in rows] == [("8", "dog", labels[0])]
    corrected, target = tmp_path / "corrected.csv", tmp_path / "data" / "corrected.jsonl"
    corrected.write_text(f"id,given,label,drop\n8,dog,{labels[0]},\n9,dog,,\n10,{labels[0]},dog,\n")
    words = ("audit", "pets-audit", "--apply", corrected, "-o", target)
    monkeypatch.setenv("DB_PASSWORD", "pw7890")
    code, _, error = ftlib(*words)
    assert code == 2 and "contains a secret of this environment" in error and not target.exists()
    monkeypatch.delenv("DB_PASSWORD")
    code, _, error = ftlib(*words)
    assert code == 0 and "2 labels changed" in error, error
    lines[8]["suffix"], lines[10]["suffix"] = labels[0], "dog"
    found = {str(line["id"]): line for line in read_lines(target)}
    assert found == {str(line["id"]): line for line in lines}
