"""Checks that files which are executed or unpickled can be trusted, by owner and permissions.

They must be owned by this user, by root or by a named owner, and neither they nor their folders may be writable by
others, except folders with the sticky bit, in which nobody can rename or replace another user's files. `jobs/lib.sh`
has the same rule for files that bash executes.
"""

from __future__ import annotations

import contextlib
import functools
import grp
import os
import pwd
import shlex
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Literal

from ftlib.errors import UserError

TRUSTED = "FTLIB_TRUST_CODE"
"""Environment variable with the hashes of plugins that the user trusts, whoever wrote them: beginnings of at least 32
digits, separated by commas. `--trust-code HASH` adds one."""
_ACL = "system.posix_acl_access"


def trusted_uids(named: Iterable[int] = ()) -> frozenset[int]:
    """The users whose code may be run: this user, root, and the named ones.

    In a container that was started without root, all other users' files show the same overflow id.
    """
    return frozenset({os.getuid(), 0, *named}) - {hidden_id("uid")}


@functools.cache
def hidden_id(kind: Literal["uid", "gid"]) -> int | None:
    """The overflow id that stands for ids without a mapping in this user namespace; None if all ids are mapped."""
    with contextlib.suppress(OSError, ValueError):
        _, _, length = Path(f"/proc/self/{kind}_map").read_text().split()  # several lines hide some
        if int(length) >= 2**32 - 1:
            return None
    with contextlib.suppress(OSError):
        return int(Path(f"/proc/sys/kernel/overflow{kind}").read_text())
    return 65534


def user_name(uid: int) -> str:
    """A user's name, or its id if it has no name here."""
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


def require_trusted(path: Path, what: str, trusted: frozenset[int], top: Path) -> None:
    """Refuse code that others could have written.

    Args:
        path: a file, or a folder with its content.
        what: for the message.
        trusted: see `trusted_uids`.
        top: parents are checked up to this folder; if the path is elsewhere, only its parent.

    Raises:
        UserError: with the command that fixes it.
    """
    if fault := find_untrusted(path, trusted, top):
        problem, remedy = fault
        raise UserError(f"{what} is not used: {problem}", remedy)


def find_untrusted(path: Path, trusted: frozenset[int], top: Path) -> tuple[str, str] | None:
    """Who else could have written a file or folder, and the command that fixes it; None if nobody could."""
    real, top = path.resolve(), top.resolve()
    for each in dict.fromkeys([path, real, *_content(real)]):
        facts = each.lstat()
        if facts.st_uid not in trusted:
            return _describe_untrusted(each, facts)
        if writable_by_others(each, facts):
            return f"{each} can be written to by others", f"chmod -R go-w {shlex.quote(str(real))}"
    parents = [folder for folder in real.parents if folder.is_relative_to(top)] or [real.parent]
    for folder in parents:
        facts = folder.stat()
        sticky, of_store = facts.st_mode & stat.S_ISVTX, top in (folder, folder.parent)
        if sticky and of_store:  # any user of the store may have created it
            continue
        if facts.st_uid not in trusted:
            return _describe_untrusted(folder, facts)
        if writable_by_others(folder, facts) and not sticky:
            bits = "+t" if of_store and len(parents) > 1 else "go-w"
            return f"others can replace what is in {folder}", f"chmod {bits} {shlex.quote(str(folder))}"
    return None


def _describe_untrusted(path: Path, facts: os.stat_result) -> tuple[str, str]:
    name = user_name(facts.st_uid)
    remedy = f"Use one of your own; or, if {name} may run code in your name, set FTLIB_OWNER={name} in jobs/site.env."
    return f"{path} is owned by {name}", remedy


def _content(folder: Path) -> Iterator[Path]:
    for place, folders, names in os.walk(folder):
        yield from (Path(place, name) for name in (*folders, *names))


def writable_by_others(path: Path, facts: os.stat_result) -> bool:
    """Whether anybody but the owner may write; a private group of the owner does not count."""
    if stat.S_ISLNK(facts.st_mode):
        return False
    if facts.st_mode & 0o002:
        return True
    return bool(facts.st_mode & 0o020) and (not _own_group(facts.st_uid, facts.st_gid) or _has_acl(path))


@functools.cache
def _own_group(uid: int, gid: int) -> bool:
    """Whether a group is the private group of a user: same name, no other members."""
    try:
        user, group = pwd.getpwuid(uid), grp.getgrgid(gid)
    except KeyError:
        return False
    return user.pw_name == group.gr_name and set(group.gr_mem) <= {user.pw_name}


def _has_acl(path: Path) -> bool:
    try:
        return _ACL in os.listxattr(path)
    except OSError:
        return False


def remove_write_permission_of_others(folder: Path) -> None:
    """Remove write permission for all but the owner; copied files have the modes of their originals."""
    for path in (folder, *_content(folder)):
        if not path.is_symlink():
            path.chmod(stat.S_IMODE(path.stat().st_mode) & ~0o022)
