"""Folders of the store and of runs, made and used by several users of a machine."""

from __future__ import annotations

import ctypes
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import pytest

from ftlib import doctor
from ftlib.cli.main import main
from ftlib.core import files, hashes, permissions, trust
from ftlib.core.lease import acquire_lease
from ftlib.core.paths import Site, site_settings
from ftlib.errors import UserError
from ftlib.runs import pinning
from ftlib.runs.run import Run
from tests.reports import fake_runs
from tests.test_host_script import bash
from tests.users import ALICE, BOB, OTHER, VISION, User, hand_down, place, rights

pytestmark = pytest.mark.users
__all__ = ["place"]
MAKERS = ("python", "bash")


def site_of(store: Path, user: User) -> Site:
    return Site(store, store / "runs" / str(user.number))


def publish(folder: Path, text: str = "text") -> None:
    with files.atomic_directory(folder) as temporary:
        (temporary / "file").write_text(text)


def make(how: str, user: User, store: Path, umask: int, **settings: str) -> None:
    """The first command of a user: their own folders, and what is missing of the store."""
    if how == "python":
        user.does(permissions.open_runs, site_of(store, user), umask=umask)
    else:
        script = "set -e; jobs=jobs root=.; source jobs/run.sh; make_store runs; make_runs"
        where = {"FTLIB_STORE": store, "FTLIB_RUNS": site_of(store, user).runs}
        done = user.bash(script, umask, **where, **settings)
        assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("umask", [0o022, 0o077])
@pytest.mark.parametrize("how", MAKERS)
def test_the_first_command_makes_what_the_second_user_can_use(place: Path, how: str, umask: int) -> None:
    hand_down(place / "group")
    store = place / "group" / "store"
    make(how, ALICE, store, umask)
    make("python", BOB, store, umask)
    for name in ("", *permissions.STICKY_FOLDERS, *permissions.RECORD_FOLDERS):
        folder = store / name
        wanted = "2770" if name in permissions.RECORD_FOLDERS else "3770"
        assert (rights(folder), folder.stat().st_gid) == (wanted, VISION), folder
    runs = store / "runs"
    assert [rights(runs / str(user.number)) for user in (ALICE, BOB)] == ["2700", "2700"]

    def stage(name: str) -> None:
        with permissions.group_writable(site_of(store, BOB)):
            publish(store / "models" / name)

    ALICE.does(stage, "first", umask=umask)
    BOB.does(stage, "second", umask=umask)
    for name in ("first", "second"):
        file = store / "models" / name / "file"
        assert (rights(file), file.stat().st_gid) == ("660", VISION)
    BOB.does((store / "models" / "first" / "file").read_text)


@pytest.mark.parametrize("how", MAKERS)
def test_a_group_that_is_named(
    place: Path, monkeypatch: pytest.MonkeyPatch, how: str, capfd: pytest.CaptureFixture[str]
) -> None:
    """Of a user in two groups that is not the primary one; others may read what they can read of the store."""
    store = place / "group" / "store"
    monkeypatch.setenv("FTLIB_GROUP", str(VISION))
    os.chown(place / "group", BOB.number, OTHER)
    make(how, BOB, store, 0o022, FTLIB_GROUP=str(VISION))
    assert (rights(store), store.stat().st_gid, (store / "runs").stat().st_gid) == ("3770", VISION, VISION)
    store.chmod(0o3775)
    shutil.rmtree(store / "runs")
    make(how, BOB, store, 0o077, FTLIB_GROUP=str(VISION))
    assert (rights(store / "runs"), (store / "runs").stat().st_gid) == ("3775", VISION)
    foreign = place / "group" / "foreign"
    monkeypatch.setenv("FTLIB_GROUP", "70097")
    make(how, BOB, foreign, 0o022, FTLIB_GROUP="70097")
    told = capfd.readouterr().err
    assert int(rights(foreign), 8) & 0o077 == 0, "not of that group, and so shared with no other"
    assert how == "bash" or (
        f"{foreign}: this file system, or your groups" in told and f"chgrp 70097 {foreign}" in told
    )
    monkeypatch.setenv("FTLIB_GROUP", "no-such-group")
    with pytest.raises(UserError, match="FTLIB_GROUP=no-such-group: no such group"):
        permissions.store_sharing(store)
    done = BOB.bash("source jobs/run.sh; make_store", FTLIB_STORE=store, FTLIB_GROUP="no-such-group")
    assert done.returncode == 2 and "FTLIB_GROUP=no-such-group: no such group" in done.stderr


@pytest.mark.parametrize("how", MAKERS)
def test_a_primary_group_is_never_taken(place: Path, how: str, capfd: pytest.CaptureFixture[str]) -> None:
    """Without a group that somebody chose the store is private, which is said once."""
    store, both = place / "group" / "new" / "store", User(ALICE.number, (VISION,))
    if how == "python":
        both.does(permissions.open_runs, site_of(store, both), umask=0o002)
        both.does(permissions.open_runs, site_of(store, both), umask=0o002)
        told = capfd.readouterr().err
    else:
        again = "jobs=jobs root=.; source jobs/run.sh; make_store runs; make_store runs"
        told = both.bash(again, 0o002, FTLIB_STORE=store).stderr
    assert rights(store) == rights(store / "runs") == "700"
    assert told.count("nobody else can use this store. To share it: FTLIB_GROUP=") == 1


def acl(*entries: tuple[int, int, int]) -> bytes:
    """An access control list as the kernel keeps it: (tag, rights, id)."""
    return struct.pack("<I", 2) + b"".join(struct.pack("<HHI", *entry) for entry in entries)


NOBODY = 0xFFFFFFFF
DEFAULT = acl((1, 7, NOBODY), (4, 5, NOBODY), (8, 7, OTHER), (16, 7, NOBODY), (32, 0, NOBODY))
"""What is made in a folder can be written to by OTHER, too."""


@pytest.mark.parametrize("how", MAKERS)
def test_an_access_control_list_that_is_handed_down_stays(place: Path, how: str) -> None:
    hand_down(place / "group")
    os.setxattr(place / "group", "system.posix_acl_default", DEFAULT)
    store = place / "group" / "store"
    make(how, ALICE, store, 0o077)
    make("python", ALICE, store, 0o077)
    assert os.getxattr(store / "models", "system.posix_acl_default") == DEFAULT
    guest = User(70_099, (70_099, OTHER))
    guest.does(publish, store / "models" / "theirs")
    ALICE.does((store / "models" / "theirs" / "file").read_text)
    own = site_of(store, ALICE)
    ALICE.does(permissions.open_run_folder, own.runs / "digits" / "abc", own)
    with pytest.raises(OSError, match="Permission denied"):
        guest.does(os.listdir, own.runs)
    if how == "python":
        assert "system.posix_acl_default" not in os.listxattr(own.runs)


def test_nobody_can_replace_what_is_another_s(place: Path) -> None:
    hand_down(place / "group")
    store = place / "group" / "store"
    make("python", ALICE, store, 0o022)
    make("python", BOB, store, 0o022)
    (store / "images" / "ftlib.sif").write_text("")
    os.chown(store / "images" / "ftlib.sif", ALICE.number, VISION)
    (store / "images" / "ftlib.sif").chmod(0o664)
    for name in ("images/ftlib.sif", f"runs/{ALICE.number}", "images", "runs", "models"):
        with pytest.raises(OSError, match=r"not permitted|denied"):
            BOB.does(os.rename, store / name, store / f"{name}.old")

    def stage(text: str) -> None:
        with permissions.group_writable(site_of(store, ALICE)):
            publish(store / "models" / "base", text)

    ALICE.does(stage, "one")
    BOB.does(stage, "one")  # both made the same: the second is content
    assert (store / "models" / "base").stat().st_uid == ALICE.number
    with pytest.raises(UserError, match=f"belongs to {ALICE.number}"):
        BOB.does(stage, "another")


def test_work_that_another_began_is_gone_on_with(place: Path) -> None:
    """In a folder that one user made the next one may write, and take over from a dead owner."""
    hand_down(place / "group")
    store = place / "group" / "store"
    make("python", ALICE, store, 0o077)
    work = store / "hf" / "staging" / "model-1"

    def begin() -> None:
        with permissions.group_writable(site_of(store, ALICE)):
            work.mkdir()
            (work / "files").mkdir()
            (work / "files" / "weights").write_text("half")
            files.write_json(work / "owner.json", {"host": "gone", "pid": 1, "started": "1", "job": None, "token": "a"})
            os.utime(work / "owner.json", (1, 1))

    def go_on() -> None:
        with permissions.group_writable(site_of(store, BOB)), acquire_lease(work):
            os.link(work / "files" / "weights", store / "models" / "weights")
            shutil.rmtree(work / "files")

    ALICE.does(begin, umask=0o077)
    BOB.does(go_on, umask=0o077)
    digest = {"weights": files.file_sha256(store / "models" / "weights")}
    for user in (ALICE, BOB):  # one record, replaced by the next
        user.does(hashes.store_hashes, store / "models", digest, site_of(store, user), umask=0o077)
        os.utime(store / "models" / "weights", (user.number, user.number))
    (record,) = (store / "hashes").iterdir()
    assert record.stat().st_uid == BOB.number


@pytest.mark.parametrize("umask", [0o002, 0o077])
def test_runs_are_private_or_shared(place: Path, monkeypatch: pytest.MonkeyPatch, umask: int) -> None:
    hand_down(place / "group")
    store, own = place / "group" / "store", site_of(place / "group" / "store", ALICE)

    def train(name: str) -> Path:
        permissions.limit_umask()
        folder = own.runs / name / "abc"
        permissions.open_run_folder(folder, own)
        files.write_text(folder / "config.yaml", "name: x\n")
        Run(folder).log_event("start")
        return folder

    folder = ALICE.does(train, "digits", umask=umask)
    assert rights(own.runs) == rights(folder) == rights(folder.parent) == "2700"
    with pytest.raises(OSError, match="denied"):
        BOB.does((folder / "config.yaml").read_text)
    shutil.rmtree(own.runs)
    monkeypatch.setenv("FTLIB_SHARE_RUNS", "1")
    folder = ALICE.does(train, "digits", umask=umask)
    assert rights(own.runs) == rights(folder) == "2750" and folder.stat().st_gid == VISION
    assert BOB.does((folder / "config.yaml").read_text) == "name: x\n"
    assert not [path for path in (own.runs, *own.runs.rglob("*")) if path.stat().st_mode & 0o022]
    assert rights(ALICE.does(permissions.open_jobs_folder, own, umask=umask)) == "2700"
    shutil.rmtree(store)
    monkeypatch.setenv("FTLIB_GROUP", "")
    hand_down(place)
    (place / "group").chmod(0o755)
    assert rights(ALICE.does(train, "digits", umask=umask)) == "700", "the group of a private store is nobody's choice"


def test_a_runs_folder_that_somebody_else_has_made(place: Path) -> None:
    hand_down(place / "group")
    store, own = place / "group" / "store", site_of(place / "group" / "store", ALICE)
    make("python", ALICE, store, 0o022)
    own.runs.rmdir()

    def plant() -> None:
        own.runs.mkdir()
        own.runs.chmod(0o3777)

    BOB.does(plant)
    with pytest.raises(UserError, match=f"is owned by {BOB.number}, who could run code in your name"):
        ALICE.does(permissions.open_runs, own)


@pytest.fixture
def store(place: Path) -> Path:
    """Alice's, shared with VISION, with an image."""
    hand_down(place / "group")
    store = place / "group" / "store"
    make("python", ALICE, store, 0o022)
    make("python", BOB, store, 0o022)
    return store


def plant_run(store: Path, owner: User, mode: int) -> Path:
    """A run of Bob's with pinned code and a valid marker, as somebody may have put it there."""
    folder = site_of(store, BOB).runs / "digits" / "abc"

    def fill() -> None:
        publish(folder / "code" / "inner")
        publish(folder / "code")

    folder.mkdir(parents=True)
    for path in (folder.parent, folder):
        os.chown(path, owner.number, VISION)
    site_of(store, BOB).runs.chmod(0o2777)
    owner.does(fill)
    site_of(store, BOB).runs.chmod(0o2700)
    for path in (folder, *folder.rglob("*")):
        path.chmod(mode if path.is_dir() else mode & 0o666)
    return folder


@pytest.mark.parametrize(
    ("owner", "mode", "told", "remedy"),
    [
        (BOB, 0o755, None, None),
        (User(0, (0,)), 0o755, None, None),
        (ALICE, 0o755, None, None),
        (User(70_098, (70_098, VISION)), 0o755, "is owned by 70098", "FTLIB_OWNER=70098"),
        (BOB, 0o775, "can be written to by others", "chmod -R go-w "),
        (BOB, 0o757, "can be written to by others", "chmod -R go-w "),
    ],
    ids=["own", "of root", "of the store's owner", "planted", "open to the group", "open to all"],
)
def test_pinned_code(store: Path, owner: User, mode: int, told: str | None, remedy: str | None) -> None:
    code = plant_run(store, owner, mode) / "code"
    own = site_of(store, BOB)
    script = f"source jobs/lib.sh; FTLIB_STORE='{store}' FTLIB_RUNS='{own.runs}' require_trusted 'the code' '{code}'"
    done = BOB.bash(script)
    if told is None:
        BOB.does(permissions.require_trusted, code, "the code", own)
        assert (done.returncode, done.stderr) == (0, "")
        return
    with pytest.raises(UserError) as caught:
        BOB.does(permissions.require_trusted, code, "the code", own)
    assert told in caught.value.problem and str(remedy) in caught.value.remedy
    assert done.returncode == 2 and told in done.stderr and str(remedy).partition("=")[0] in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("what", "mode", "remedy"),
    [("", 0o2775, "chmod +t "), ("runs", 0o2775, "chmod +t "), ("runs/70012", 0o2770, "chmod go-w ")],
)
def test_folders_in_which_others_can_replace_the_code(store: Path, what: str, mode: int, remedy: str) -> None:
    code = plant_run(store, BOB, 0o755) / "code"
    own = site_of(store, BOB)
    (store / what).chmod(mode)
    with pytest.raises(UserError, match="others can replace what is in") as caught:
        BOB.does(permissions.require_trusted, code, "the code", own)
    script = f"source jobs/lib.sh; FTLIB_STORE='{store}' require_trusted 'the code' '{code}'"
    done = BOB.bash(script)
    assert caught.value.remedy.rstrip("'") == f"{remedy}{store / what}" and f"{remedy}'{store / what}'" in done.stderr
    (store / what).chmod(mode | 0o1000 if "+t" in remedy else mode & ~0o022)
    BOB.does(permissions.require_trusted, code, "the code", own)
    assert BOB.bash(script).returncode == 0


def test_an_owner_that_is_named(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = plant_run(store, User(70_098, (70_098, VISION)), 0o755) / "code"
    monkeypatch.setenv("FTLIB_OWNER", "70098")
    BOB.does(permissions.require_trusted, code, "the code", site_of(store, BOB))
    done = BOB.bash(f"source jobs/lib.sh; FTLIB_STORE='{store}' FTLIB_OWNER=70098 require_trusted x '{code}'")
    assert done.returncode == 0, done.stderr
    monkeypatch.setenv("FTLIB_OWNER", "no-such-user")
    with pytest.raises(UserError, match="FTLIB_OWNER=no-such-user: no such user"):
        permissions.trusted_owners(site_of(store, BOB))


def test_a_run_folder_that_was_replaced_is_not_gone_on_with(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With code of its own, and a valid marker."""
    site = Site(place / "store", place / "store" / "runs" / "me")
    run = Run(site.runs / "digits" / "abc")
    permissions.open_run_folder(run.folder, site)
    publish(run.code)
    executed: list[str] = []
    monkeypatch.setattr(pinning.os, "execv", lambda *command: executed.append("code"))
    monkeypatch.setattr(pinning.signal, "signal", lambda *arguments: None)
    pinning.exec_pinned_code(run, site, ["train"])
    assert executed == ["code"]
    os.chown(run.code / "file", BOB.number, VISION)
    with pytest.raises(UserError, match=f"the code that this run began with is not used: .* owned by {BOB.number}"):
        pinning.exec_pinned_code(run, site, ["train"])
    os.chown(run.folder, BOB.number, VISION)
    with pytest.raises(UserError, match=f"{run.folder}: is owned by {BOB.number}"):
        permissions.open_run_folder(run.folder, site)
    jobs = permissions.open_jobs_folder(site)
    os.chown(jobs, BOB.number, VISION)
    with pytest.raises(UserError, match=f"{jobs}: is owned by {BOB.number}"):
        permissions.open_jobs_folder(site)
    assert executed == ["code"]


def test_a_snapshot_that_was_changed_is_refused(place: Path) -> None:
    clone, site = place / "clone", Site(place / "store", place / "store" / "runs" / "me")
    for name in ("ftlib/module.py", "jobs/run.sh"):
        files.write_text(clone / name, "pass\n")
    (clone / "jobs" / "run.sh").chmod(0o666)
    target = pinning.snapshot_folder(clone, site)
    pinning.take_snapshot(clone, target, site)
    pinning.take_snapshot(clone, target, site)
    assert rights(target.parent) == "700" and rights(target / "jobs" / "run.sh") == "644"
    (target / "ftlib" / "module.py").write_text("evil\n")
    with pytest.raises(UserError, match="this snapshot of the code has been changed") as caught:
        pinning.take_snapshot(clone, target, site)
    assert caught.value.remedy.endswith(f"rm -rf {target}")


@pytest.mark.parametrize("owner", [0, ALICE.number])
def test_settings_that_somebody_else_may_have_written(place: Path, monkeypatch: pytest.MonkeyPatch, owner: int) -> None:
    file = place / "clone" / "jobs" / "site.env"
    files.write_text(file, "FTLIB_HOOK=/planted\n")
    monkeypatch.chdir(place / "clone")
    read = f"source jobs/lib.sh; read_site_env '{file}' && echo $FTLIB_HOOK"
    assert site_settings({})["FTLIB_HOOK"] == "/planted" and bash(read).stdout == "/planted\n"
    os.chown(file, owner, VISION)
    file.chmod(0o664)
    told = "can be written to by others" if owner == 0 else f"is owned by {owner}"
    with pytest.raises(UserError, match=f"jobs/site.env is not used: .* {told}"):
        site_settings({})
    done = bash(read)
    assert done.returncode == 2 and done.stdout == "" and f"jobs/site.env is not used: {file} " in done.stderr
    assert done.stderr.count("\n") == 1


ENTER = """
jobs=$PWD/jobs root=$PWD; source jobs/run.sh
find_container() { echo "$PROGRAM"; }
enter_runtime && echo entered
"""


@pytest.fixture
def started(store: Path) -> Callable[..., tuple[int, str, str]]:
    """Enter the container as Bob: exit code, output, errors."""
    program = store.parent.parent / "apptainer"
    program.write_text("#!/bin/bash\necho org.ftlib.revision: abc\n")
    program.chmod(0o755)

    def start(**settings: object) -> tuple[int, str, str]:
        own = {"FTLIB_STORE": store, "FTLIB_RUNS": site_of(store, BOB).runs, "PROGRAM": program, "HOME": "/nowhere"}
        done = BOB.bash(ENTER, **{**own, **settings})
        return done.returncode, done.stdout, done.stderr

    return start


def test_the_image_and_the_hook(store: Path, started: Callable[..., tuple[int, str, str]]) -> None:
    image, hook = store / "images" / "ftlib.sif", store / "modules.sh"
    image.write_text("image")
    hook.write_text("echo hooked\n")
    for path in (image, hook):
        os.chown(path, ALICE.number, VISION)
        path.chmod(0o644)
    assert started(FTLIB_HOOK=hook)[:2] == (0, "hooked\nentered\n")
    digest = files.file_sha256(image)
    assert started(FTLIB_IMAGE_SHA256=digest)[:2] == (0, "entered\n")
    known = site_of(store, BOB).runs / ".jobs" / "image"
    assert known.read_text().startswith(digest)
    code, _, error = started(FTLIB_IMAGE_SHA256="0" * 64)
    assert code == 2 and f"{image} is not the image that FTLIB_IMAGE_SHA256 names" in error
    image.write_text("other")
    code, _, error = started(FTLIB_IMAGE_SHA256=digest)
    assert code == 2 and "is not the image that" in error, "the same size, and remembered"
    for path, what in ((image, "the image"), (hook, "FTLIB_HOOK")):
        path.chmod(0o664)
        code, output, error = started(FTLIB_HOOK=hook)
        assert code == 2 and f"{what} is not used: {path} can be written to by others: chmod -R go-w" in error
        assert "hooked" not in output or what == "the image"
        path.chmod(0o644)
    os.chown(image, 70_098, VISION)
    code, _, error = started()
    assert code == 2 and "the image is not used" in error and "is owned by" in error
    assert started(FTLIB_OWNER=70_098)[:2] == (0, "entered\n")
    planted = store / "images" / "link.sif"
    planted.symlink_to(image)
    os.lchown(planted, 70_097, VISION)
    assert started(FTLIB_OWNER=70_098, FTLIB_IMAGE=planted)[0] == 2


def test_doctor_judges_as_another_member_would(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As root, who may do everything."""
    monkeypatch.setenv("FTLIB_STORE", str(store))
    monkeypatch.setenv("FTLIB_RUNS", str(site_of(store, ALICE).runs))

    def found() -> list[tuple[str, str]]:
        every = (*doctor.sharing(), *doctor.runs(), *doctor.executed())
        return [(one.state, one.remedy) for one in every if one.remedy]

    assert found() == []
    (store / "models" / "moved").mkdir()
    (store / "models" / "moved" / "weights").write_text("")
    os.chown(store / "models" / "moved" / "weights", BOB.number, OTHER)
    (store / "models" / "moved" / "weights").chmod(0o600)
    os.chown(store / "models" / "moved", BOB.number, OTHER)
    (store / "models" / "moved").chmod(0o755)
    (store / "runs").chmod(0o2775)
    site_of(store, ALICE).runs.chmod(0o2755)
    told = found()
    assert [state.partition(":")[0] for state, _ in told] == [
        f"{store}/runs is 2775, {ALICE.number}'s, of the group {VISION}",
        f"2 not of the group {VISION}, of {BOB.number}",
        f"1 folders that do not hand their group down, of {BOB.number}",
        f"1 not readable by the group, of {BOB.number}",
        "1 folders are not private",
    ]
    for _, remedy in told:
        done = bash(remedy.rpartition("root: ")[2])
        assert done.returncode == 0, done.stderr
    assert found() == []
    assert (store / "models" / "moved" / "weights").stat().st_gid == VISION
    monkeypatch.setenv("FTLIB_SHARE_RUNS", "1")
    ((state, remedy),) = found()
    assert "1 folders are not readable by the store's group" in state and "chmod 2750" in remedy
    bash(remedy)
    assert found() == []
    (store / "images" / "ftlib.sif").write_text("")
    os.chown(store / "images" / "ftlib.sif", BOB.number, VISION)
    ((state, remedy),) = found()
    assert "the image is not used" in state and f"is owned by {BOB.number}" in state and "FTLIB_OWNER" in remedy


def test_doctor_on_an_older_store(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of it 2775; the commands that doctor tells make it what a new one is."""
    monkeypatch.setenv("FTLIB_STORE", str(store))
    monkeypatch.setenv("FTLIB_RUNS", str(site_of(store, BOB).runs))
    publish(store / "models" / "base")
    for path in (store, *store.rglob("*")):
        os.chown(path, BOB.number, VISION)
        path.chmod(0o2775 if path.is_dir() else 0o664)
    remedies = [one.remedy for check in (doctor.sharing, doctor.runs) for one in check() if one.remedy]
    for remedy in remedies:
        assert bash(remedy.rpartition("root: ")[2]).returncode == 0, remedy
    assert rights(store) == rights(store / "runs") == "3775" and rights(store / "hashes") == "2775"
    assert not [one for check in (doctor.sharing, doctor.runs) for one in check() if one.remedy]


def enter_namespace() -> None:
    """As a container that was started without root: only this user and their primary group have a number inside."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(4, 1)  # this process has been root's: only then its /proc files are its own
    if libc.unshare(0x10000000):
        raise AssertionError(os.strerror(ctypes.get_errno()))
    for name, text in (("setgroups", "deny"), ("uid_map", "{0} {0} 1"), ("gid_map", "{1} {1} 1")):
        Path(f"/proc/self/{name}").write_text(text.format(BOB.number, BOB.groups[0]))
    trust.hidden_id.cache_clear()


def test_inside_a_container_that_hides_who_owns_what(store: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """The files of all others show the same owner: the store's is not told from them, and so not trusted."""
    own, code = site_of(store, BOB), plant_run(store, BOB, 0o755) / "code"
    (store / "models").rmdir()
    (store / "prepared").rmdir()

    def work() -> list[str]:
        enter_namespace()
        permissions.limit_umask()
        permissions.open_run_folder(own.runs / "digits" / "abd", own)
        permissions.require_trusted(code, "the code", own)
        with permissions.group_writable(own):
            publish(store / "models" / "base")
        return [rights(store / "models"), rights(store / "models" / "base"), rights(own.runs / "digits" / "abd")]

    assert BOB.does(work, umask=0o077) == ["3770", "2770", "2700"]
    assert (store / "models" / "base" / "file").stat().st_gid == VISION
    assert capfd.readouterr().err == ""
    for path in (code, *code.rglob("*")):
        os.chown(path, 70_098, VISION)

    def be_fooled() -> None:
        enter_namespace()
        permissions.require_trusted(code, "the code", own)

    with pytest.raises(UserError, match=r"the code is not used: .* is owned by"):
        BOB.does(be_fooled)


def test_reports_across_users(
    store: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Of runs that their owner shares; without, the other user is told that there is nothing to be read."""
    monkeypatch.setenv("FTLIB_STORE", str(store))
    monkeypatch.setenv("FTLIB_RUNS", str(site_of(store, BOB).runs))
    place = store.parent.parent

    def trained() -> str:
        run = fake_runs.new_run(site_of(store, ALICE), place / "group", fake_runs.CONFIG)
        fake_runs.train(run)
        fake_runs.finish(run)
        return str(run.folder)

    def say(*arguments: str) -> int:
        return main(list(arguments))

    (place / "bob").mkdir()
    os.chown(place / "bob", BOB.number, OTHER)
    output = place / "bob" / "report.html"
    assert main(["status"]) == 0  # imports what commands need, which only root may read here
    folder = ALICE.does(trained)
    assert BOB.does(say, "report", folder, "-o", str(output)) == 2
    assert "you may not read this folder\nIts owner can share it: FTLIB_SHARE_RUNS=1" in capfd.readouterr().err
    monkeypatch.setenv("FTLIB_SHARE_RUNS", "1")
    monkeypatch.setenv("FTLIB_RUNS", str(site_of(store, ALICE).runs))
    (remedy,) = [one.remedy for one in doctor.runs()]
    assert bash(remedy).returncode == 0 and not [one for one in doctor.runs() if one.remedy]
    monkeypatch.setenv("FTLIB_RUNS", str(site_of(store, BOB).runs))
    assert main(["report", folder, "-o", str(tmp_path / "report.html")]) == 0
    assert BOB.does(say, "report", folder, "-o", str(output)) == 0
    assert "pets" in output.read_text()
