"""The page of a run at every stage: complete, self-contained, with everything escaped."""

from __future__ import annotations

import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import pytest

from ftlib.core import files, jsonl
from ftlib.core.paths import Site
from ftlib.reports.exports import score_lines
from ftlib.reports.gallery import _expected, evenly_spaced
from ftlib.reports.run_report import calibration_context, render
from ftlib.runs.run import Run
from tests.reports.fake_runs import AFTER_ROWS, BEFORE_ROWS, CONFIG, evaluate, finish, new_run, record_of, row, train

Page = Callable[[Run], str]
NASTY = "<script>alert('x')</script> \"quoted\" & </style><img src=x onerror=y>"


class Outline(HTMLParser):
    """The elements of a page, and whether each that is opened is closed in order."""

    VOID = frozenset({"meta", "img"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def text_of(page: str) -> str:
    """What a reader sees, roughly: without elements, spaces made one."""
    return re.sub(r"\s+", " ", re.sub(r"<[^>]*>", " ", page.partition("<main>")[2]))


def test_page_needs_nothing_but_itself(finished: Run, page: Page) -> None:
    made = page(finished)
    outline = Outline(made)
    assert outline.open == []
    assert not {"script", "link", "iframe", "object", "embed", "base", "form"} & set(outline.tags)
    loading = ("src", "srcset", "href", "action", "poster", "data")
    sources = [value for name, value in outline.attributes if name in loading]
    assert sources
    assert all(value and value.startswith("data:image/") for value in sources)
    assert not [name for name, _ in outline.attributes if name.startswith("on")]
    assert not re.search(r"https?://|@import|url\(|<script", made)
    assert ("content", "default-src 'none'; style-src 'unsafe-inline'; img-src data:") in outline.attributes


def test_headline_scores_and_state(finished: Run, page: Page) -> None:
    made = page(finished)
    assert "valid accuracy 0.500 → 0.750 (n = 4)" in text_of(made)
    assert re.search(r"done\s+30 steps", text_of(made))
    assert finished.folder.name in made
    assert "0.301–0.987" in made  # Wilson's interval of 3 of 4, modified for one miss
    assert "0.750, 95 % interval 0.301 to 0.987" in made
    assert re.search(
        r"valid before 0\.500 .*? 4 2 – valid after 0\.750 .*? 4 0 – accuracy: share of answers", text_of(made)
    )


def test_sections_stand_in_order(finished: Run, page: Page) -> None:
    made = page(finished)
    titles = re.findall(r"<h2>(.*?)</h2>", made)
    assert titles == ["Scores", "Training", "Classes", "Answers", "Provenance"]


def test_curves_and_the_mark_of_a_resumed_attempt(finished: Run, page: Page) -> None:
    made = page(finished)
    assert made.count('class="chart"') == 5
    assert made.count('<g class="mark">') == 5
    assert "from a checkpoint, at step 20 (resumed once)." in made
    assert "0.1333 at step 30" in made


def test_the_loss_on_valid_stands_beside_that_of_training(run: Run, page: Page) -> None:
    train(run)
    for step, value in ((10, 1.5), (20, 0.75), (30, 0.875)):
        line = {"step": step, "attempt": 0, "split": "valid", "metric": "loss", "value": value, "perplexity": 2 * value}
        jsonl.append_jsonl(run.metrics, line)
    made = page(run)
    told = "0.1333 at step 30; on valid 0.875 at step 30, lowest 0.75 at step 20"
    assert told in text_of(made) and "Loss over 30 steps; 0.1333 at step 30; on valid, 3 times: 0.875" in made
    assert made.count('class="beside"') == 1 and made.count('class="beside-dot"') == 3
    assert "Perplexity on valid over 3 steps; 1.75 at step 30" in made
    assert "loss on valid over" not in made, "it has no chart of its own"
    assert made.count('class="chart"') == 6
    undefined = {"step": 31, "attempt": 0, "split": "valid", "metric": "loss", "value": None, "perplexity": None}
    jsonl.append_jsonl(run.metrics, undefined)
    assert told in text_of(page(run))


def test_confusion_matrix_counts(finished: Run, page: Page) -> None:
    matrix = page(finished).partition('class="confusion')[2].partition("</table>")[0]
    rows = [re.findall(r'<td class="(\w+)"[^>]*>([^<]*)', line) for line in matrix.split("<tr>")[2:]]
    assert rows == [[("right", "2"), ("none", "·")], [("wrong", "1"), ("right", "1")]]
    assert "(invalid)" not in matrix


def test_invalid_answers_have_a_column_when_there_are_any(run: Run, page: Page) -> None:
    evaluate(run, "valid", "before", BEFORE_ROWS)
    assert "(invalid)" in page(run).partition('class="confusion')[2].partition("</table>")[0]


def test_too_many_classes_become_a_list_of_confusions(run: Run, page: Page) -> None:
    rows = [row(number, f"label-{number}" if number else "label-1", f"label-{number}") for number in range(60)]
    evaluate(run, "valid", "after", rows)
    made = page(run)
    assert 'class="confusion' not in made
    assert "label-0 label-1 1" in text_of(made)


def test_answers_fall_into_groups_and_no_row_is_shown_twice(finished: Run, page: Page) -> None:
    answers = page(finished).partition("<h2>Answers")[2].partition("</section>")[0]
    groups = [re.findall(r"row-\d", part) for part in answers.split("<h3>")[1:]]
    titles = re.findall(r"<h3>(.*?) <span", answers)
    assert titles == [
        "Wrong answers",
        "Wrong before training, right after",
        "Right before training, wrong after",
        "Right answers",
    ]
    assert groups == [["row-2"], ["row-1", "row-3"], [], ["row-4"]]
    assert "1, shown above" in answers
    assert answers.count("which pet?") == 1


def test_graded_answers_stand_by_their_scores(site: Site, tmp_path: Path, page: Page) -> None:
    run = new_run(site, tmp_path, CONFIG.replace("task: classify", "task: caption"))
    after = {number: number / 10 for number in range(1, 9)}
    before = {**after, 2: 0.9, 7: 0.1, 6: 0.2}
    for when, scores in (("before", before), ("after", after)):
        evaluate(run, "valid", when, [row(n, f"{when} {n}", "cat", score=score) for n, score in scores.items()])
    answers = page(run).partition("<h2>Answers")[2].partition("</section>")[0]
    groups = [re.findall(r"row-\d", part) for part in answers.split("<h3>")[1:]]
    assert re.findall(r"<h3>(.*?) <span", answers) == [
        "Lowest scores",
        "Most improved by training",
        "Most worsened by training",
        "Highest scores",
    ]
    assert groups == [["row-1", "row-2", "row-3", "row-4"], ["row-7", "row-6"], [], ["row-8", "row-5"]]
    assert "<strong>after 7</strong>\u00a0(0.70)" in answers and "<dd>before 7\u00a0(0.10)</dd>" in answers
    assert "✓" not in answers and "✗" not in answers


def test_of_errors_the_highest_are_the_worst(run: Run, site: Site, tmp_path: Path, page: Page) -> None:
    rows = [row(number, "x", "y", score=number / 10) for number in range(4)]
    evaluate(run, "valid", "before", [{**one, "score": 0.1} for one in rows], higher_is_better=False)
    evaluate(run, "valid", "after", rows, higher_is_better=False)
    made = text_of(page(run))
    assert made.index("Wrong answers 3") < made.index("row-3") < made.index("row-2") < made.index("row-1")
    assert "Wrong before training, right after 1" in made and made.count("row-0") == 1
    graded = new_run(site, tmp_path, CONFIG.replace("task: classify", "task: caption"))
    evaluate(graded, "valid", "before", [{**one, "score": 0.15} for one in rows], higher_is_better=False)
    evaluate(graded, "valid", "after", rows, higher_is_better=False)
    made = text_of(page(graded))
    places = [made.index(title) for title in ("Highest scores 2 of 4", "row-3", "row-2", "Most improved by training")]
    assert places == sorted(places) and made.index("Most improved by training") < made.index("row-0")


def test_prompts_that_differ_stand_on_the_cards(run: Run, page: Page) -> None:
    evaluate(run, "valid", "after", [row(1, "cat", "cat", prompt="first?"), row(2, "dog", "dog", prompt="second?")])
    answers = text_of(page(run)).partition("Answers")[2]
    assert "prompt first?" in answers
    assert "prompt second?" in answers


def test_sample_is_spread_over_all_rows() -> None:
    rows = [row(number, "a", "a") for number in range(100)]
    assert [item["id"] for item in evenly_spaced(rows, 4)] == ["row-0", "row-25", "row-50", "row-75"]
    assert evenly_spaced(rows[:3], 4) == rows[:3]


def test_test_split_comes_first(finished: Run, page: Page) -> None:
    evaluate(finished, "test", "after", AFTER_ROWS[:2])
    assert "test accuracy 0.500 (n = 2)" in page(finished).partition("</title>")[0]
    assert "ftlib evaluate config.yaml --split valid --split test" in page(finished)


def test_what_was_done(finished: Run, page: Page) -> None:
    text = text_of(page(finished))
    pieces = ("train 1,234 feed0001", "node7 node8", "torch 2.9.1", "NVIDIA A100", "4711", "base: ftlib/tiny-paligemma")
    assert [piece for piece in pieces if piece not in text] == []
    assert "git checkout 0123456789ab ftlib stage config.yaml" in text
    assert "used 3 CPU threads" in text
    assert "done 30 12.5" in text
    assert "Made 1970-01-01 00:00:00Z" in text


def test_everything_a_user_wrote_is_escaped(site: Site, tmp_path: Path, page: Page) -> None:
    config = CONFIG.replace('"{prefix}"', "'" + NASTY.replace("'", "''") + " {prefix}'")
    run = new_run(site, tmp_path, config)
    train(run)
    run.log_event("diverged", attempt=0, step=6, reason=NASTY)
    nasty = row(1, NASTY, "cat", prompt=NASTY, image=NASTY, id=NASTY)
    evaluate(run, "valid", "before", [nasty, row(2, "cat", NASTY)])
    evaluate(run, "valid", "after", [nasty, row(2, NASTY, NASTY)], settings={"prompt": NASTY})
    made = page(run)
    outline = Outline(made)
    assert "script" not in outline.tags
    assert outline.tags.count("style") == 1
    assert "onerror" not in dict(outline.attributes)
    assert made.count("&lt;script&gt;alert(&#39;x&#39;)&lt;/script&gt; &#34;quoted&#34; &amp;") >= 8


def test_a_run_that_was_never_started(run: Run, page: Page) -> None:
    text = text_of(page(run))
    assert "not started" in text
    assert "Not evaluated yet" in text
    assert f"No training step has been logged yet. Run ftlib train {run.config_file}" in text
    assert f"ftlib evaluate {run.folder.parent.name}/{run.folder.name} --before" in text


def test_a_run_that_is_not_finished(run: Run, page: Page) -> None:
    train(run, steps=7)
    evaluate(run, "valid", "before", BEFORE_ROWS)
    with run.metrics.open("a") as file:
        file.write('{"step": 8, "los')
    text = text_of(page(run))
    assert "died disappeared without reporting" in text
    assert f"last logged step 7; resume with: ftlib train {run.config_file}" in text
    assert "valid accuracy 0.500 before training (n = 4)" in text
    assert "no scores after training, because this run is not finished" in text


def test_a_finished_run_without_scores_says_how_to_get_them(run: Run, page: Page) -> None:
    train(run)
    finish(run)
    evaluate(run, "valid", "before", BEFORE_ROWS)
    assert "There are no scores after training yet. Run ftlib evaluate pets/" in text_of(page(run))


def test_a_run_that_diverged_in_every_attempt(run: Run, page: Page) -> None:
    train(run, steps=5)
    for attempt in range(4):
        run.log_event("diverged", attempt=attempt, step=6, reason=f"loss nan ({attempt})")
    run.log_event("gave up", command="train")
    assert "diverged in every attempt (4), last: loss nan (3); no result was written" in text_of(page(run))


def test_attempts_stand_one_behind_the_other(run: Run, page: Page) -> None:
    train(run, steps=5)
    run.log_event("diverged", attempt=0, step=5, reason="loss 101 is above 100")
    assert "died disappeared without reporting, before anything was saved; run or submit it again" in text_of(page(run))
    files.write_text(run.checkpoint_root() / "checkpoint-3" / files.COMPLETE_MARKER, "{}")
    assert "died disappeared without reporting; run or submit it again to resume; last logged step 5" in text_of(
        page(run)
    )
    run.log_event("restart", attempt=1, step=0, seed=99, learning_rate=1e-4)
    run.log_event("start", attempt=1, step=3)
    for step in range(1, 9):
        jsonl.append_jsonl(run.metrics, {"step": step, "attempt": 1, "loss": 1 / step, "learning_rate": 1e-4})
    asked = {"step": 8, "attempt": 1, "round": 0, "split": "valid", "metric": "accuracy", "value": 0.75}
    jsonl.append_jsonl(run.metrics, asked)
    made = page(run)
    assert "Loss over 13 steps; 0.125 at step 8" in made and "accuracy on valid over 1 steps; 0.75 at step 8" in made
    assert (
        "restarted (attempt 1 at 5)" in made and "from a checkpoint, at step 8 (resumed once, diverged once)." in made
    )
    assert "reason: loss 101 is above 100" in made and "seed: 99" in made
    run.log_event("done", step=8, seconds=1)
    best = {"step": 4, "metric": "accuracy", "value": 0.75}
    files.write_json(run.done_marker, {"step": 8, "result": "adapter", "threads": 1, "best": best})
    finished = "8 steps; the result is from step 4, accuracy on valid 0.75; attempt 1: training diverged once before"
    assert finished in text_of(page(run))


def test_speed_and_memory_are_curves_and_preemptions_are_told(run: Run, page: Page) -> None:
    train(run, steps=12, resumed_at=5)
    run.log_event("preempted", command="train", signal="SIGUSR1")
    asked = {"step": 12, "attempt": 0, "split": "valid", "metric": "accuracy", "value": 0.5, "seconds": 900.0}
    jsonl.append_jsonl(run.metrics, asked)
    made = page(run)
    assert "Seconds per step over 12 steps; 0.25 at step 12" in made  # those of an evaluation are no step's
    assert "GPU memory, GiB over 12 steps; 3 at step 12" in made
    assert "resumed from a checkpoint, at step 5 (resumed once, preempted once)." in made
    assert made.count('class="mark"') == 5  # the evaluation's chart has one point only, and so no room for a mark


def test_what_a_run_has_cost(run: Run, page: Page, monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([0, 3600 * 1.5, 3600 * 2, 3600 * 2.25])
    monkeypatch.setattr("time.time", lambda: next(times))
    run.log_event("start", command="train", gpus=2, step=0, attempt=0)
    run.log_event("done", command="train", step=1, seconds=5400)
    run.log_event("evaluating", command="evaluate", gpus=1)
    run.log_event("evaluated", seconds=900)
    monkeypatch.undo()
    monkeypatch.setenv("FTLIB_RUNS", str(run.folder.parent.parent))
    assert "3.25 GPU-hours (3.00 of training, 0.25 of evaluation)." in page(run)


@pytest.mark.parametrize("damage", ["marker", "cut", "same size"])
def test_damaged_scores_are_named_and_no_other_score_stands_in(finished: Run, page: Page, damage: str) -> None:
    folder = finished.evaluation_folder("jsonl", "valid", "after")
    text = (folder / "scores.json").read_text()
    if damage == "marker":
        (folder / files.COMPLETE_MARKER).unlink()
    else:
        (folder / "scores.json").write_text(text[:-9] + ("" if damage == "cut" else "x" * 9))
    found = page(finished)
    assert "valid: the scores after training are damaged" in found
    assert "eval/jsonl/valid/after: the files are damaged and not shown" in found
    assert "before training (n" not in found


OWN = {"decode": "generate", "num_beams": 1, "max_new_tokens": 16, "generation": {}, "positive": None}


def test_scores_of_other_settings_stand_apart(finished: Run, site: Site, page: Page) -> None:
    settings = {"fingerprint": "feed0002", "prompt": "{prefix}", **OWN}
    for when, rows in (("before", BEFORE_ROWS), ("after", AFTER_ROWS)):
        evaluate(finished, "valid", when, rows, settings=settings)
    evaluate(finished, "test", "after", BEFORE_ROWS, settings=settings | {"max_new_tokens": 2})
    found = page(finished)
    assert "valid accuracy 0.500 → 0.750" in found
    assert "test (max_new_tokens 2)" in found
    assert "which have the config&#39;s: decode generate, num_beams 1, max_new_tokens 16" in found
    record = record_of(finished, site)
    assert [split.split for split in record.splits] == ["valid"]
    assert record.other_splits[0].settings == "max_new_tokens 2"
    lines = score_lines([record]).splitlines()
    assert lines[0].endswith("main,settings") and sum(line.endswith(",0,max_new_tokens 2") for line in lines) == 7


def test_without_scores_of_its_own_settings_a_run_has_no_headline(finished: Run, site: Site, page: Page) -> None:
    for when in ("before", "after"):
        settings = {"fingerprint": "feed0002", "prompt": "{prefix}", **OWN, "num_beams": 3}
        evaluate(finished, "valid", when, AFTER_ROWS, settings=settings)
    assert "Not evaluated with its config&#39;s settings, only with num_beams 3" in page(finished)


@pytest.mark.parametrize("value", [None, 0.5])
def test_an_undefined_score_or_interval_is_none(finished: Run, page: Page, value: float | None) -> None:
    evaluate(finished, "valid", "after", AFTER_ROWS, value=value, interval=None)
    shown = "–" if value is None else "0.500"
    assert f"valid accuracy 0.500 → {shown} (n = 4)" in page(finished)


def test_scores_of_different_rows_are_called_not_comparable(finished: Run, page: Page) -> None:
    assert "not comparable" not in page(finished)
    evaluate(finished, "valid", "after", AFTER_ROWS, settings={"fingerprint": "feed0009", "prompt": "{prefix}"})
    assert "the fingerprint differs (feed0002 before, feed0009 after)" in page(finished)
    evaluate(finished, "valid", "after", AFTER_ROWS, settings={"fingerprint": "feed0002", "num_beams": 4})
    assert "not comparable: the num_beams differs (None before, 4 after)" in page(finished)


@pytest.mark.parametrize("value", [0.5, 1.32])
def test_a_task_without_a_confusion_matrix(run: Run, page: Page, value: float) -> None:
    found = {"value": value, "interval": [value - 0.1, value + 0.1]}
    caption = {"metric": "cider", **found, "metrics": {"cider": found}, "tables": {}}
    evaluate(run, "valid", "after", [row(1, "a cat", "a cat", image=None, score=0.4)], **caption)
    made = page(run)
    assert "<h2>Classes" not in made
    assert f"valid cider {value:.3f} (n = 1)" in made
    assert ('class="bar after"' in made) == (value < 1)
    assert re.search(r"score 0\.40", text_of(made))


def test_breakdowns_have_tables_of_their_own(run: Run, page: Page) -> None:
    for when, share in (("before", 0.25), ("after", 0.5)):
        found = {"value": share, "interval": [share - 0.1, share + 0.1]}
        metrics = {"accuracy": found, "answer type: number": found, "answer type: yes/no": found}
        evaluate(run, "valid", when, BEFORE_ROWS, metrics=metrics, tables={})
    made = page(run)
    titles = re.findall(r"<summary>(.*?)</summary>", made)
    assert titles[:2] == ["All metrics on jsonl valid", "By answer type on jsonl valid"]
    assert "number 0.250 0.150–0.350 0.500 0.400–0.600 yes/no 0.250 0.150–0.350" in text_of(made)


def test_missing_image_leaves_a_placeholder(finished: Run, page: Page, site: Site) -> None:
    (site.store / "datasets" / "pets" / "images" / "a.png").unlink()
    assert "images/a.png: this image file is missing" in page(finished)


def test_a_dataset_of_very_many_answers_has_no_list_of_them(run: Run, page: Callable[[Run], str]) -> None:
    train(run, labels=None)
    assert "more than 10,000 different answers" in page(run)


def test_calibration_is_shown_where_confidences_are_known(site: Site, tmp_path: Path) -> None:
    """Among labels, or of generated answers; older answers have none, and other tasks no closed set."""
    run = new_run(site, tmp_path, CONFIG)
    train(run)
    sure = {"cat": 0.9, "dog": 0.1}
    evaluate(run, "valid", "after", [{**one, "probabilities": sure} for one in AFTER_ROWS])
    (found,) = calibration_context(record_of(run, site))
    counts = {cells[0]: cells[1:] for cells in found["bins"].rows}
    assert len(counts) == 15 and counts["0.87–0.93"][:3] == ["3", "0.900", "0.667"]
    assert counts["0.07–0.13"][:3] == ["1", "0.100", "1.000"]
    assert "ECE 0.400 (95 % interval" in found["errors"] and "among the labels" in found["errors"]
    page = render(record_of(run, site), 0.0)
    assert "<h2>Calibration</h2>" in page and "Reliability diagram of valid after training, n = 4" in page
    generated = {"mean_logprob": -0.05, "min_logprob": -0.1, "answer_tokens": 2}
    evaluate(run, "valid", "after", [{**one, **generated} for one in AFTER_ROWS])
    (found,) = calibration_context(record_of(run, site))
    assert "mean confidence 0.905, accuracy 0.750" in found["errors"] and "among all texts" in found["errors"]
    evaluate(run, "valid", "after", AFTER_ROWS)
    assert calibration_context(record_of(run, site)) == []
    assert "Calibration" not in render(record_of(run, site), 0.0)


def test_blanks_around_expected_answers_are_not_shown() -> None:
    assert _expected({"references": [" Paris", "Paris ", " "]}) == "Paris, (empty)"
