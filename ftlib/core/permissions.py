"""Permissions of the store and of the runs folder.

The store's group is FTLIB_GROUP or, without it, the group of the store (of its parent before the store exists), if that
has the setgid bit. Without a group the store is private to its creator. Shared folders have the setgid bit and, where
users create subfolders, the sticky bit: nobody can rename or replace those of another user. Run folders are private;
with FTLIB_SHARE_RUNS=1 the store's group can read them. Nothing else that ftlib creates is group-writable.
`jobs/lib.sh` creates the store by the same rules.
"""

from __future__ import annotations

import contextlib
import grp
import os
import pwd
import shlex
import stat
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ftlib.core import files, log, trust
from ftlib.core.paths import Site, site_settings
from ftlib.errors import UserError

STICKY_FOLDERS = ("runs", "hf", "hf/hub", "hf/staging", "models", "datasets", "prepared", "cache", "images")
"""Folders of the store in which users create their own folders."""
RECORD_FOLDERS = ("hashes", "lengths")
"""Folders of the store whose files every member of the group may replace."""
_DEFAULT_ACL = "system.posix_acl_default"


@dataclass(frozen=True)
class Sharing:
    """How a store is shared.

    Attributes:
        group: the group's id; None if the store is not shared.
        rights: mode of its folders: 0o770 or 0o775, or that of a store that is not shared.
    """

    group: int | None
    rights: int

    def mode(self, name: str = "") -> int:
        """The mode of the store, or of one of its folders."""
        if self.group is None:
            return self.rights
        return self.rights | stat.S_ISGID | (0 if name in RECORD_FOLDERS else stat.S_ISVTX)


def store_sharing(store: Path) -> Sharing:
    """How a store is shared, or will be once it is created.

    Raises:
        UserError: FTLIB_GROUP is no group.
    """
    named = site_settings().get("FTLIB_GROUP")
    place = store if store.is_dir() else store.parent
    facts = place.stat() if place.is_dir() else None
    mode = facts.st_mode if facts and place == store else 0o700
    handed_down = facts and facts.st_mode & (stat.S_ISGID | (0o020 if place == store else 0))
    if named or (facts and handed_down):
        others = mode if place == store else 0
        return Sharing(_group_number(named) if named else facts.st_gid, 0o770 | others & 0o005)  # type: ignore[union-attr]
    return Sharing(None, 0o700 | mode & 0o055)


def _group_number(name: str) -> int:
    if name.isdigit():
        return int(name)
    try:
        return grp.getgrnam(name).gr_gid
    except KeyError:
        raise UserError(f"FTLIB_GROUP={name}: no such group", "See `id -Gn` for yours.") from None


def group_name(gid: int) -> str:
    """A group's name, or its id if it has no name here."""
    try:
        return grp.getgrgid(gid).gr_name
    except KeyError:
        return str(gid)


@contextlib.contextmanager
def group_writable(site: Site) -> Iterator[None]:
    """Files that the body creates are readable and writable by the store's group, whatever the user's umask.

    Raises:
        UserError: the store cannot be created.
    """
    open_store(site)
    before = os.umask(~store_sharing(site.store).rights & 0o077)
    try:
        yield
    finally:
        os.umask(before)


def open_store(site: Site) -> None:
    """Create the store and its folders, if they do not exist.

    Raises:
        UserError: the store cannot be created.
    """
    who = store_sharing(site.store)
    if not site.store.is_dir():
        with files.storage_errors(site.store):
            make_folder(site.store, who.mode(), who.group)
        if who.group is None:
            log.info(
                f"{site.store}: nobody else can use this store. To share it: FTLIB_GROUP=… in jobs/site.env, "
                "then `ftlib doctor` tells the commands"
            )
    for name in (*STICKY_FOLDERS, *RECORD_FOLDERS):
        with contextlib.suppress(OSError):  # a store may be read-only to this user
            make_folder(site.store / name, who.mode(name), who.group)


def make_folder(folder: Path, mode: int, group: int | None) -> None:
    """Create a folder that has its mode from the first moment; an existing folder is not changed.

    If the file system refuses mode or group, that is logged. An inherited setgid bit is kept, and so is an inherited
    default ACL where the folder is shared.

    Raises:
        OSError: the parent cannot be written to.
    """
    if folder.is_dir():
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    new = folder.with_name(f"{folder.name}{files.TEMPORARY_PREFIX}{uuid.uuid4().hex[:8]}")
    new.mkdir(mode=0o700)
    mode |= new.stat().st_mode & stat.S_ISGID
    if not mode & 0o020:
        with contextlib.suppress(OSError):
            os.removexattr(new, _DEFAULT_ACL)
    if group is not None and not belongs_to_group(new.stat(), group):
        with contextlib.suppress(OSError):
            os.chown(new, -1, group)
    # If the group could not be set, the folder must not be shared with another group.
    reached = group is None or belongs_to_group(new.stat(), group)
    with contextlib.suppress(OSError):
        new.chmod(mode if reached else mode & ~0o070)
    try:
        new.rename(folder)
    except OSError:  # another process has created it
        new.rmdir()
        if not folder.is_dir():
            raise
        return
    if fix := repair_commands(folder, mode, group):
        log.warning(f"{folder}: this file system, or your groups, did not allow its permissions: {fix}")


def belongs_to_group(facts: os.stat_result, group: int) -> bool:
    """Whether a file has a group, as far as a container shows it."""
    return facts.st_gid in (group, trust.hidden_id("gid"))


def repair_commands(folder: Path, mode: int, group: int | None) -> str:
    """The commands that set a folder's mode and group; empty if it has them (more setgid and sticky bits are fine)."""
    facts, place = folder.stat(), shlex.quote(str(folder))
    wanted = mode | facts.st_mode & (stat.S_ISGID | stat.S_ISVTX)
    found = [f"chgrp {group_name(group)} {place}"] if group is not None and not belongs_to_group(facts, group) else []
    if found or stat.S_IMODE(facts.st_mode) != wanted:
        found.append(f"chmod {mode:o} {place}")
    return " && ".join(found)


def private_mode(site: Site) -> int:
    """The mode of run folders: private, or readable by the store's group (FTLIB_SHARE_RUNS=1)."""
    return 0o2750 if _shares_runs() and store_sharing(site.store).group is not None else 0o700


def _shares_runs() -> bool:
    return site_settings().get("FTLIB_SHARE_RUNS", "") not in ("", "0")


def limit_umask() -> None:
    """Create nothing that the group can write to, except in the store (`group_writable`)."""
    os.umask(0o027 if _shares_runs() else read_umask() | 0o022)


def read_umask() -> int:
    """This process's umask."""
    found = os.umask(0o077)
    os.umask(found)
    return found


def open_runs(site: Site) -> None:
    """Create the user's runs folder, if it does not exist.

    Raises:
        UserError: it cannot be created, or another user owns it.
    """
    open_store(site)
    with files.storage_errors(site.runs):
        make_folder(site.runs, private_mode(site), store_sharing(site.store).group)
    _require_own(site.runs, site)


def open_run_folder(folder: Path, site: Site) -> None:
    """Create a run folder, if it does not exist.

    Raises:
        UserError: it cannot be created, or another user owns it.
    """
    open_runs(site)
    with files.storage_errors(folder):
        for each in (folder.parent, folder):  # <runs>/NAME/IDENTITY
            make_folder(each, private_mode(site), store_sharing(site.store).group)
    _require_own(folder, site)


def open_jobs_folder(site: Site) -> Path:
    """The folder for the code of jobs, `<runs>/.jobs`; private to the user.

    Raises:
        UserError: it cannot be created, or another user owns it.
    """
    open_runs(site)
    folder = site.runs / ".jobs"
    with files.storage_errors(folder):
        make_folder(folder, 0o700, None)
    _require_own(folder, site)
    return folder


def _require_own(folder: Path, site: Site) -> None:
    owner = folder.stat().st_uid
    if owner not in trusted_owners(site):
        problem = f"{folder}: is owned by {trust.user_name(owner)}, who could run code in your name by what is in it"
        raise UserError(problem, "Move it away, or set FTLIB_RUNS to a folder of your own.")


def trusted_owners(site: Site) -> frozenset[int]:
    """The users whose code may be run: this user, root, the store's owner and FTLIB_OWNER.

    Raises:
        UserError: FTLIB_OWNER is not a user.
    """
    name = site_settings().get("FTLIB_OWNER", "")
    try:
        named = [int(name) if name.isdigit() else pwd.getpwnam(name).pw_uid] if name else []
    except KeyError:
        raise UserError(f"FTLIB_OWNER={name}: no such user") from None
    return trust.trusted_uids([*named, *([site.store.stat().st_uid] if site.store.is_dir() else [])])


def require_trusted(path: Path, what: str, site: Site) -> None:
    """Refuse code that others could have written; see `ftlib.core.trust`.

    Raises:
        UserError: with the command that mends it.
    """
    trust.require_trusted(path, what, trusted_owners(site), root_of(path, site))


def root_of(path: Path, site: Site) -> Path:
    """The store or the runs folder that contains a path; else the path's own folder."""
    inside = [root for root in (site.store, site.runs) if path.resolve().is_relative_to(root.resolve())]
    return inside[0] if inside else path.parent
