"""Pages in a real browser: nothing sticks out or overlaps at a phone's and at a desktop's width, no script runs."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

import pytest

from ftlib.cli.report import main
from ftlib.core.paths import Site
from ftlib.data.location_tokens import LocatedObject, format_objects
from ftlib.runs.run import Run
from tests.reports.fake_runs import CONFIG, evaluate, finish, new_run, row, train

LONG = "a_very_long_label_without_any_place_to_break_it_" * 4
EVIL = "<img src=x onerror=\"document.title='hacked'\"><script>document.title='hacked'</script>"
WRAPPER = """<body><iframe id="page" style="width: WIDTHpx; height: 900px; border: 0"></iframe><script>
page.onload = () => {
  const root = page.contentDocument.documentElement;
  const cells = [...page.contentDocument.querySelectorAll('[aria-label^="Leaderboard"] td, [aria-label="scores"] td')];
  const text = cell => {
    const range = page.contentDocument.createRange();
    range.selectNodeContents(cell);
    return range.getBoundingClientRect();
  };
  const overlaps = [];
  for (const row of page.contentDocument.querySelectorAll("table:not(.confusion) tbody tr")) {
    const boxes = [...row.children].map(text).filter(box => box.width);
    boxes.slice(1).forEach((box, index) => {
      const before = boxes[index];
      const beside = before.bottom > box.top + 1 && box.bottom > before.top + 1;
      if (beside && before.right > box.left + 1 && box.right > before.left + 1) overlaps.push(row.textContent);
    });
  }
  document.body.dataset.found = JSON.stringify({
    wide: root.scrollWidth, window: root.clientWidth,
    title: page.contentDocument.title, scripts: page.contentDocument.scripts.length,
    overlaps, outside: cells.filter(cell => text(cell).right > root.clientWidth).map(cell => cell.textContent),
    images: [...page.contentDocument.images].map(image => image.naturalWidth)});
};
page.src = "PAGE";
</script></body>"""

pytestmark = pytest.mark.browser


def _open(page: Path, width: int, folder: Path) -> dict[str, object]:
    """What the browser finds on the page in a window of that width."""
    wrapper = folder / "wrapper.html"
    wrapper.write_text(WRAPPER.replace("WIDTH", str(width)).replace("PAGE", page.as_uri()), encoding="utf-8")
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--allow-file-access-from-files"]
    command = [
        "chromium",
        *flags,
        "--virtual-time-budget=10000",
        f"--window-size={width},900",
        "--dump-dom",
        wrapper.as_uri(),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    found = re.search(r'data-found="([^"]*)"', done.stdout)
    assert found, done.stderr[-2000:]
    return json.loads(found[1].replace("&quot;", '"').replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&"))


@pytest.mark.parametrize("width", [390, 1300])
@pytest.mark.parametrize("several", [False, True])
def test_nothing_sticks_out_and_nothing_runs(
    width: int, several: bool, site: Site, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    box = format_objects([LocatedObject((0.1, 0.1, 0.9, 0.9), "cat")])
    for seed in range(1 + several):
        run = new_run(site, tmp_path, CONFIG.replace("name: pets", f"name: pets\nseed: {seed}"))
        _fill(run, [row(1, EVIL, LONG), row(2, LONG, "dog"), row(3, box, box), row(4, "cat", "cat")])
    page = tmp_path / "page.html"
    assert main(["pets", "-o", str(page)]) == 0
    found = _open(page, width, tmp_path)
    assert found["wide"] == found["window"]
    assert (found["overlaps"], found["outside"]) == ([], [])
    assert (found["scripts"], "hacked" in str(found["title"])) == (0, False)
    if not several:
        assert found["images"] and all(found["images"])  # type: ignore[call-overload]


@pytest.mark.parametrize("width", [390, 1300])
def test_settings_with_long_names_leave_room_for_the_numbers(
    width: int, site: Site, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = [
        LONG,
        "次の画像に写っている動物の種類を日本語で一語だけ答えてください" * 3,
        "What is shown in this picture? " * 8,
    ]
    for number, prompt in enumerate(prompts):
        config = CONFIG.replace('prompt: "{prefix}"', f'prompt: "{prompt}"').replace(
            "epochs: 2", f"epochs: {number + 2}"
        )
        run = new_run(site, tmp_path, config)
        _fill(run, [row(1, "cat", "cat"), row(2, "cat", "dog"), row(3, "dog", "dog")])
    page = tmp_path / "page.html"
    assert main(["pets", "-o", str(page)]) == 0
    found = _open(page, width, tmp_path)
    assert found["wide"] == found["window"]
    assert (found["overlaps"], found["outside"]) == ([], [])


def _fill(run: Run, rows: list[dict[str, object]]) -> None:
    train(run, resumed_at=20)
    finish(run)
    for when in ("before", "after"):
        evaluate(run, "valid", when, rows)
