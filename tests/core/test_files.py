"""Whole-or-absent files and folders, logs with torn lines, full and read-only storage."""

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from ftlib.core import files, jsonl
from ftlib.errors import UserError

WRITER = """
import os, signal, sys
from pathlib import Path
from ftlib.core import files
calls = 0
def count(event, arguments):
    global calls
    if event in ("os.rename", "os.remove", "os.mkdir") or (event == "open" and set("wx") & set(str(arguments[1]))):
        calls += 1
        if calls == int(sys.argv[2]):
            os.kill(os.getpid(), signal.SIGKILL)
sys.addaudithook(count)
with files.atomic_directory(Path(sys.argv[1])) as folder:
    for name in "abc":
        (folder / name).write_text(name * 1000)
"""


def test_a_writer_killed_at_any_point_leaves_all_or_nothing(tmp_path: Path) -> None:
    target = tmp_path / "folder"
    for number in range(1, 100):
        code = subprocess.run([sys.executable, "-c", WRITER, target, str(number)]).returncode
        if target.exists():
            assert files.is_complete(target, thorough=True)
        if code == 0:
            break
        assert code == -signal.SIGKILL
    assert code == 0
    assert number > 6, "the writer was killed at fewer points than it has files and renames"
    assert [path.name for path in tmp_path.iterdir()] == ["folder"], "leftovers of killed writers remain"


def test_folders_of_others_with_such_names_stay(tmp_path: Path) -> None:
    """Only what is called as ftlib calls it, by a process that is gone, is a leftover."""
    mine = f"{socket.gethostname()}-{os.getpid()}-0123abcd"
    kept = [
        "data.tmp-old",
        "data.tmp-",
        "data.tmp-a-b-c",
        f"data.tmp-{mine}",
        f"data.tmp-{mine}.old",
        "data.tmp-Ab12cd",
    ]
    for name in kept:
        (tmp_path / name).mkdir()
    gone = f"{socket.gethostname()}-{2**22 + 1}-0123abcd"
    (tmp_path / f"data.tmp-{gone}").mkdir()
    (tmp_path / f"data.tmp-{gone[:-1]}e").touch()
    (tmp_path / "victim").mkdir()
    (tmp_path / f"data.tmp-{gone[:-1]}f").symlink_to(tmp_path / "victim")
    with files.atomic_directory(tmp_path / "data") as folder:
        (folder / "a").touch()
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(["data", "victim", *kept])


def test_leftovers_of_a_name_with_brackets(tmp_path: Path) -> None:
    leftover = f".tmp-{socket.gethostname()}-{2**22 + 1}-0123abcd"
    for name in ("a[b]", "ab"):
        (tmp_path / f"{name}{leftover}").mkdir()
    with files.atomic_directory(tmp_path / "a[b]"):
        pass
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a[b]", f"ab{leftover}"]


def test_no_symbolic_link_is_written_through(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither at the target nor at the name beside it, even if somebody knew that."""
    victim = tmp_path / "victim"
    victim.write_text("mine")
    (tmp_path / "source").write_text("theirs")
    for target in (tmp_path / "copied", tmp_path / "written"):
        target.symlink_to(victim)
    (tmp_path / "copied.tmp-").symlink_to(victim)
    files.copy_file(tmp_path / "source", tmp_path / "copied")
    files.write_text(tmp_path / "written", "theirs")
    for target in (tmp_path / "copied", tmp_path / "written"):
        assert target.read_text() == "theirs" and not target.is_symlink()
    foreseen = tmp_path / "foreseen"
    foreseen.symlink_to(victim)
    monkeypatch.setattr(files, "_temporary_path", lambda path: foreseen)
    with pytest.raises(UserError, match="File exists"):
        files.copy_file(tmp_path / "source", tmp_path / "x")
    foreseen.unlink(missing_ok=True)
    foreseen.symlink_to(victim)
    with pytest.raises(UserError, match="File exists"):
        files.write_text(tmp_path / "x", "")
    assert victim.read_text() == "mine" and not (tmp_path / "x").exists()


def test_a_damaged_file_is_noticed(tmp_path: Path) -> None:
    with files.atomic_directory(tmp_path / "x") as folder:
        (folder / "weights").write_bytes(b"1234")
    assert files.is_complete(tmp_path / "x", thorough=True)
    (tmp_path / "x" / "weights").write_bytes(b"1235")
    assert not files.is_complete(tmp_path / "x", thorough=True)
    (tmp_path / "x" / "weights").write_bytes(b"123")
    assert not files.is_complete(tmp_path / "x")


@pytest.mark.parametrize(("umask", "mode"), [(0o002, 0o664), (0o022, 0o644), (0o077, 0o600)])
def test_files_made_for_their_owner_alone_are_opened_as_the_umask_says(tmp_path: Path, umask: int, mode: int) -> None:
    before = os.umask(umask)
    try:
        with files.atomic_directory(tmp_path / "folder") as folder:
            (folder / "inner").mkdir()
            os.close(os.open(folder / "inner" / "weights", os.O_CREAT | os.O_WRONLY, 0o600))
            os.close(os.open(folder / "program", os.O_CREAT | os.O_WRONLY, 0o700))
    finally:
        os.umask(before)
    found = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "folder").rglob("*") if path.is_file()}
    assert found == {"weights": mode, "program": mode | 0o100, "COMPLETE.json": mode}


def test_a_failing_body_leaves_the_old_folder(tmp_path: Path) -> None:
    with files.atomic_directory(tmp_path / "x") as folder:
        (folder / "a").write_text("old")
    with pytest.raises(RuntimeError), files.atomic_directory(tmp_path / "x") as folder:
        (folder / "a").write_text("new")
        raise RuntimeError
    assert (tmp_path / "x" / "a").read_text() == "old"
    assert len(list(tmp_path.iterdir())) == 1


def test_logs_lose_only_a_torn_last_line_and_what_is_not_to_be_kept(tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    for step in range(1, 6):
        jsonl.append_jsonl(log, {"step": step})
    with log.open("a") as file:
        file.write('{"step": 6, "lo')
    assert [record["step"] for record in jsonl.read_jsonl_log(log)] == [1, 2, 3, 4, 5]
    jsonl.filter_jsonl_log(log, keep=lambda record: record["step"] <= 3)
    assert log.read_text() == '{"step": 1}\n{"step": 2}\n{"step": 3}\n'


def test_a_log_that_was_torn_and_goes_on_loses_the_torn_line_only(tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    log.write_text('{"step": 1}\n{"step": 2, "lo')
    for step in (3, 4):
        jsonl.append_jsonl(log, {"step": step})
    assert [record["step"] for record in jsonl.read_jsonl_log(log)] == [1, 3, 4]
    jsonl.filter_jsonl_log(log)
    assert log.read_text() == '{"step": 1}\n{"step": 3}\n{"step": 4}\n'


def test_what_is_added_while_a_whole_log_is_looked_at_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = tmp_path / "log.jsonl"
    jsonl.append_jsonl(log, {"step": 1})
    read = Path.read_bytes

    def read_before_somebody_adds(path: Path) -> bytes:
        text = read(path)
        if b"2" not in text:
            jsonl.append_jsonl(path, {"step": 2})
        return text

    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_bytes", read_before_somebody_adds)
        jsonl.filter_jsonl_log(log)
    assert [record["step"] for record in jsonl.read_jsonl_log(log)] == [1, 2]


def test_fingerprint_ignores_the_order_of_keys_only() -> None:
    assert files.json_sha256({"a": 1, "b": [1, 2]}) == files.json_sha256({"b": [1, 2], "a": 1})
    assert files.json_sha256({"a": [1, 2]}) != files.json_sha256({"a": [2, 1]})


def test_errors_of_libraries_about_a_full_disk_become_user_errors(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no space left"), files.storage_errors(tmp_path):
        raise RuntimeError("I/O error: No space left on device (os error 28)")
    with pytest.raises(UserError, match=r"no space left.*quota"), files.storage_errors(tmp_path):
        raise RuntimeError("Error while serializing: I/O error: Disk quota exceeded (os error 122)")
    with pytest.raises(UserError, match="no space left"), files.storage_errors(tmp_path):
        raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 8448 vs 8342")
    with pytest.raises(RuntimeError, match="something else"), files.storage_errors(tmp_path):
        raise RuntimeError("something else")


def test_a_storage_that_an_unfinished_folder_fills_is_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.save hides the system's error behind its own, and there is room again once what it wrote is removed."""
    monkeypatch.setattr(
        "ftlib.core.files.find_shortage", lambda place, size: "full" if list(tmp_path.iterdir()) else None
    )
    with pytest.raises(UserError, match="no space left"), files.atomic_directory(tmp_path / "x"):
        raise RuntimeError("unexpected pos 4216512 vs 4216404")
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_written_to(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="not writable"):
        files.write_json(tmp_path / "file" / "x.json", {})
    if os.geteuid() != 0:  # root may write anywhere
        (tmp_path / "closed").mkdir(mode=0o500)
        with pytest.raises(UserError, match="not writable"):
            files.write_json(tmp_path / "closed" / "x.json", {})


def test_many_writers_of_the_same_folder_leave_one_whole_copy(tmp_path: Path) -> None:
    code = WRITER.replace("calls == int(sys.argv[2])", "False")
    writers = [subprocess.Popen([sys.executable, "-c", code, tmp_path / "x", "0"]) for _ in range(8)]
    assert [writer.wait() for writer in writers] == [0] * 8
    assert files.is_complete(tmp_path / "x", thorough=True)
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_half_surrogates_can_be_written(tmp_path: Path) -> None:
    """As of a file name that is not UTF-8, in a message that becomes an event."""
    record = {"event": "failed", "reason": "\udce9.png: no image, 犬 \ud800"}
    jsonl.append_jsonl(tmp_path / "history.jsonl", record)
    files.write_json(tmp_path / "bad.json", record)
    assert (
        jsonl.read_jsonl_log(tmp_path / "history.jsonl") == [record]
        and files.read_json(tmp_path / "bad.json") == record
    )
    assert "犬" in (tmp_path / "history.jsonl").read_text(encoding="utf-8")
    jsonl.filter_jsonl_log(tmp_path / "history.jsonl", lambda _: True)
    assert jsonl.read_jsonl_log(tmp_path / "history.jsonl") == [record]
