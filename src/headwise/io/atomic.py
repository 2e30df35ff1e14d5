"""Files and folders that are either wholly there or not there at all.

What is written goes to a temporary sibling, is flushed to the disk (fsync of every file and folder) and only then
renamed to its name. A kill, a crash or a full disk at any moment leaves the previous content, never half of the new.

A writer holds an advisory lock (flock) on its temporary file or folder for as long as it lives. The kernel drops the
lock when the process dies, however it dies; an unlocked temporary sibling is therefore a leftover, and the next write
of the same name removes it. Process numbers would not do: they are reused, and mean nothing on a shared disk. On file
systems without locks nothing is ever taken for a leftover.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import json
import os
import secrets
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from headwise.errors import HeadwiseError

_ADVICE = {
    errno.ENOSPC: "free some space or choose a folder on another disk",
    errno.EDQUOT: "your quota is used up: free some space or choose a folder on another disk",
    errno.EFBIG: "the file size limit is reached (see `ulimit -f`)",
    errno.EACCES: "choose a folder you may write to",
    errno.EPERM: "choose a folder you may write to",
    errno.EROFS: "choose a folder that is not read-only",
    errno.EEXIST: "a part of this path is a file, not a folder: choose another name",
    errno.ENOTDIR: "a part of this path is a file, not a folder: choose another name",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.EIO: "the disk reports a fault: choose another one",
}
_RENAME_EXCHANGE = 2  # linux/fs.h
_AT_FDCWD = -100  # fcntl.h
_ATTEMPTS = 20


class WriteError(HeadwiseError):
    """A file or folder that cannot be written: the disk is full, permission is missing, the path is taken."""


def write_error(path: Path | str, error: OSError) -> WriteError:
    """One line for `error`, met while `path` was written: the path, the reason and what to do about it."""
    reason = error.strerror or str(error) or type(error).__name__
    advice = _ADVICE.get(error.errno or 0, "check the path and the disk it is on")
    return WriteError(f"cannot write {str(path)!r}: {reason}; {advice}")


@contextmanager
def atomic_dir(path: Path | str, *, replace: bool = True) -> Iterator[Path]:
    """A temporary folder beside `path` to write into; it becomes `path` when the block ends without an exception.

    An existing folder `path` is replaced in one step where the file system can exchange two names, else by two
    renames, and a kill between them is mended by the next call. With `replace=False` a folder that has meanwhile
    appeared is kept and ours dropped: any number of processes may build the same thing at once and all end up with
    the first one's.

    The block may write subfolders. Raises WriteError for an OSError in the flush, or in the block where it does not
    name a file elsewhere (a source that the block reads). Whatever happens, the temporary folder is gone afterwards
    and `path` holds either what it held before or all that the block wrote.
    """
    target = _real(path)
    with _reported(target):
        if target.is_file():  # one look: a racing writer may move it between two
            raise WriteError(
                f"cannot write the folder {str(target)!r}: a file of that name exists; choose another name"
            )
        temporary, lock = _claim(target, _new_folder)
    try:
        try:
            yield temporary
        except OSError as error:
            if isinstance(error.filename, str) and not error.filename.startswith(str(temporary)):
                raise
            raise write_error(target, error) from error
        with _reported(target):
            _sync_tree(temporary)
            _install(temporary, target, replace)
            _sync(target.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        os.close(lock)


@contextmanager
def atomic_file(path: Path | str) -> Iterator[Path]:
    """A temporary file beside `path` to write into; it becomes `path` when the block ends without an exception. The
    folder is made where needed. Raises WriteError for an OSError, in the block too."""
    target = _real(path)
    with _reported(target):
        if target.is_dir():
            raise WriteError(
                f"cannot write the file {str(target)!r}: a folder of that name exists; choose another name"
            )
        temporary, lock = _claim(target, _new_file)
        try:
            yield temporary
            _sync(temporary)
            os.replace(temporary, target)
            _sync(target.parent)
        finally:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)
            os.close(lock)


def write_bytes(path: Path | str, data: bytes) -> None:
    """Writes `data` to the file `path` atomically, making its folder where needed. Raises WriteError."""
    with atomic_file(path) as temporary:
        temporary.write_bytes(data)


def write_text(path: Path | str, text: str) -> None:
    """Writes `text` as UTF-8, line ends as they are. Raises WriteError."""
    write_bytes(path, text.encode("utf-8"))


def write_json(path: Path | str, value: Any, *, indent: int | None = 2) -> None:
    """Writes `value` as strict JSON (NaN and infinity are a ValueError: nobody could read them)."""
    write_text(path, json.dumps(value, indent=indent, ensure_ascii=False, allow_nan=False) + "\n")


@contextmanager
def _reported(target: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise write_error(target, error) from error


def _real(path: Path | str) -> Path:
    """The absolute path behind symbolic links: a link to a folder keeps pointing where it points."""
    return Path(os.path.realpath(path))


def _new_folder(path: Path) -> int:
    os.mkdir(path)
    return os.open(path, os.O_RDONLY)


def _new_file(path: Path) -> int:
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)


def _claim(target: Path, create: Callable[[Path], int]) -> tuple[Path, int]:
    """Makes a locked temporary sibling of `target`, after clearing leftovers; returns it and its lock."""
    target.parent.mkdir(parents=True, exist_ok=True)
    _sweep(target)
    for attempt in range(_ATTEMPTS):
        temporary = target.with_name(f".{target.name}.tmp-{secrets.token_hex(4)}")
        try:
            lock = create(temporary)
        except (FileExistsError, FileNotFoundError):  # the name is taken, or was swept between mkdir and open
            if attempt == _ATTEMPTS - 1:
                raise
            continue
        with suppress(OSError):  # no locks on this file system: nobody sweeps there either
            fcntl.flock(lock, fcntl.LOCK_EX)
        # Another process may have swept the path after it was made and before it was locked.
        if temporary.exists():
            return temporary, lock
        os.close(lock)
    raise FileNotFoundError(errno.ENOENT, "the temporary file vanishes as soon as it is made")


def _sweep(target: Path) -> None:
    """Removes what killed writers of `target` left, and puts back a folder they had moved aside."""
    prefixes = (f".{target.name}.tmp-", f".{target.name}.old-")
    with os.scandir(target.parent) as entries:
        leftovers = sorted(Path(e.path) for e in entries if e.name.startswith(prefixes))
    for leftover in leftovers:
        with suppress(OSError):  # another process may sweep too, or may not let us
            lock = os.open(leftover, os.O_RDONLY)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if leftover.name.startswith(prefixes[1]) and not target.exists():
                    os.rename(leftover, target)
                elif leftover.is_dir():
                    shutil.rmtree(leftover)
                else:
                    leftover.unlink()
            finally:
                os.close(lock)


def _install(temporary: Path, target: Path, replace: bool) -> None:
    """Gives the finished folder its name. What it replaces ends under the temporary name, or removed."""
    aside = target.with_name(f".{target.name}.old-{secrets.token_hex(4)}")
    while True:
        try:
            os.rename(temporary, target)  # takes the name of a missing or an empty folder
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                if aside.exists():
                    os.rename(aside, target)
                raise
        else:
            shutil.rmtree(aside, ignore_errors=True)
            return
        if not replace or _exchange(temporary, target):
            return
        shutil.rmtree(aside, ignore_errors=True)  # second time round: another process has put its own in place
        with suppress(FileNotFoundError):
            os.rename(target, aside)


def _exchange(one: Path, other: Path) -> bool:
    """Swaps two names in one step (Linux renameat2); False where the system or file system cannot."""
    if not sys.platform.startswith("linux"):
        return False
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is None:
        return False
    return rename(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sync_tree(folder: Path) -> None:
    """Flushes every file below `folder`, then every folder, the deepest first."""
    for parent, _, files in os.walk(folder, topdown=False):
        for name in files:
            _sync(Path(parent, name))
        _sync(Path(parent))
