"""Files and folders are wholly there or not at all: after exceptions, full disks, kills and races."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from headwise.errors import HeadwiseError
from headwise.io import atomic
from headwise.io.atomic import WriteError, atomic_dir, write_bytes, write_json, write_text


def contents(folder: Path) -> dict[str, str]:
    return {str(p.relative_to(folder)): p.read_text() for p in sorted(folder.rglob("*")) if p.is_file()}


def put(path: Path, text: str = "new", *, replace: bool = True, then: Callable[[], object] = lambda: None) -> None:
    """Writes two files of content `text`, and calls `then` before the folder is finished."""
    with atomic_dir(path, replace=replace) as folder:
        (folder / "sub").mkdir()
        (folder / "a.txt").write_text(text)
        (folder / "sub" / "b.txt").write_text(text)
        then()


def raises(error: BaseException) -> Callable[[], object]:
    def function() -> None:
        raise error

    return function


@pytest.fixture(params=["exchange", "two renames"])
def either_way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways of replacing a folder: by swapping names, and where the file system cannot."""
    if request.param == "two renames":
        monkeypatch.setattr(atomic, "_exchange", lambda one, other: False)


def test_folder_appears_whole_with_parents(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "er" / "run"
    with atomic_dir(target) as folder:
        (folder / "a.txt").write_text("x")
        assert folder.parent == target.parent
        assert not target.exists()
    assert contents(target) == {"a.txt": "x"}
    assert os.listdir(target.parent) == ["run"]


@pytest.mark.usefixtures("either_way")
def test_folder_replaces_the_old_one_entirely(tmp_path: Path) -> None:
    target = tmp_path / "run"
    put(target, "old")
    (target / "extra.txt").write_text("only in the old one")
    put(target, "new")
    assert contents(target) == {"a.txt": "new", "sub/b.txt": "new"}
    assert os.listdir(tmp_path) == ["run"]


def test_exchange_is_used_where_the_system_has_it(tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    (tmp_path / "one" / "x").write_text("1")
    swapped = atomic._exchange(tmp_path / "one", tmp_path / "two")
    assert (tmp_path / ("two" if swapped else "one") / "x").exists()
    assert not atomic._exchange(tmp_path / "one", tmp_path / "missing")


def test_replace_false_keeps_the_first(tmp_path: Path) -> None:
    target = tmp_path / "run"
    put(target, "first", replace=False)
    put(target, "second", replace=False)
    assert contents(target) == {"a.txt": "first", "sub/b.txt": "first"}
    assert os.listdir(tmp_path) == ["run"]


@pytest.mark.parametrize("error", [RuntimeError("x"), KeyboardInterrupt()])
def test_exception_leaves_the_old_folder_and_no_litter(tmp_path: Path, error: BaseException) -> None:
    target = tmp_path / "run"
    put(target, "old")
    with pytest.raises(type(error)):
        put(target, "half", then=raises(error))
    assert contents(target) == {"a.txt": "old", "sub/b.txt": "old"}
    assert os.listdir(tmp_path) == ["run"]


def test_symbolic_link_is_written_through(tmp_path: Path) -> None:
    put(tmp_path / "real", "old")
    (tmp_path / "link").symlink_to("real")
    put(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink()
    assert contents(tmp_path / "real")["a.txt"] == "new"
    (tmp_path / "file-link").symlink_to("real/a.txt")
    write_text(tmp_path / "file-link", "newer")
    assert contents(tmp_path / "real")["a.txt"] == "newer"


def test_files(tmp_path: Path) -> None:
    write_bytes(tmp_path / "new" / "b", b"\0\xff")
    assert (tmp_path / "new" / "b").read_bytes() == b"\0\xff"
    write_text(tmp_path / "t", "a\r\né")
    assert (tmp_path / "t").read_bytes() == "a\r\né".encode()
    write_json(tmp_path / "j", {"b": [1.5, None], "a": "é"})
    assert json.loads((tmp_path / "j").read_text()) == {"b": [1.5, None], "a": "é"}
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "j", {"loss": float("nan")})
    assert json.loads((tmp_path / "j").read_text())["a"] == "é"
    assert sorted(os.listdir(tmp_path)) == ["j", "new", "t"]


def test_permissions_follow_the_umask(tmp_path: Path) -> None:
    """mkdtemp and mkstemp make private files; a run folder on a shared disk must stay readable for the group."""
    write_text(tmp_path / "file", "x")
    put(tmp_path / "folder")
    (tmp_path / "plain").mkdir()
    (tmp_path / "plain" / "file").write_text("x")
    assert (tmp_path / "file").stat().st_mode == (tmp_path / "plain" / "file").stat().st_mode
    assert (tmp_path / "folder").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_full_disk_is_one_line_with_advice(tmp_path: Path) -> None:
    """/dev/full answers every write with a real ENOSPC."""
    target = tmp_path / "run"
    put(target, "old")
    with open("/dev/full", "wb", buffering=0) as disk, pytest.raises(HeadwiseError) as caught:
        put(target, "half", then=lambda: disk.write(b"x"))
    message = str(caught.value)
    assert str(target) in message
    assert "No space left" in message
    assert "free some space" in message
    assert "\n" not in message
    assert contents(target)["a.txt"] == "old"
    assert os.listdir(tmp_path) == ["run"]


@pytest.mark.parametrize("step", ["fsync", "rename"])
def test_disk_that_fills_up_while_flushing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    """A delayed allocation reports a full disk only at fsync; a folder may need a block at the rename."""
    target = tmp_path / "run"

    def full(*args: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, step, full)
        with pytest.raises(WriteError, match="No space left on device; free some space"):
            put(target)
        if step == "fsync":
            with pytest.raises(WriteError, match="free some space"):
                write_text(tmp_path / "file", "x")
    assert os.listdir(tmp_path) == []


def test_failing_second_rename_puts_the_old_folder_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "run"
    put(target, "old")
    rename = os.rename

    def fails_once_the_way_is_clear(source: Path, destination: Path) -> None:
        if ".tmp-" in str(source) and not target.exists():
            raise OSError(errno.ENOSPC, "No space left on device")
        rename(source, destination)

    monkeypatch.setattr(atomic, "_exchange", lambda one, other: False)
    monkeypatch.setattr(os, "rename", fails_once_the_way_is_clear)
    with pytest.raises(WriteError):
        put(target, "new")
    assert contents(target)["a.txt"] == "old"
    assert os.listdir(tmp_path) == ["run"]


def test_everything_is_flushed_before_the_rename(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    fsync, rename = os.fsync, os.rename

    def watched_fsync(descriptor: int) -> None:
        events.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
        fsync(descriptor)

    def watched_rename(source: Path, destination: Path) -> None:
        events.append("rename")
        rename(source, destination)

    monkeypatch.setattr(os, "fsync", watched_fsync)
    monkeypatch.setattr(os, "rename", watched_rename)
    put(tmp_path / "run")
    at = events.index("rename")
    assert set(events[: at - 1]) == {"a.txt", "b.txt", "sub"}
    assert events[at - 1].startswith(".run.tmp-")
    assert events[at + 1 :] == [tmp_path.name]


def test_taken_or_forbidden_paths(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "folder").mkdir()
    with pytest.raises(WriteError, match="a file of that name exists"):
        put(tmp_path / "file")
    with pytest.raises(WriteError, match="a folder of that name exists"):
        write_text(tmp_path / "folder", "x")
    with pytest.raises(WriteError, match="choose another name"):
        put(tmp_path / "file" / "below")
    with pytest.raises(WriteError, match="choose a shorter name"):
        write_text(tmp_path / ("x" * 300), "x")
    with pytest.raises(WriteError, match="cannot write '/proc/nothing'"):
        write_text("/proc/nothing", "x")


def test_permission_denied_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(path: Path, *args: object) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr(os, "mkdir", denied)
    with pytest.raises(WriteError, match="Permission denied; choose a folder you may write to"):
        put(tmp_path / "run")


def test_error_about_a_source_is_not_taken_for_a_write_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        put(tmp_path / "run", then=(tmp_path / "source.txt").read_text)
    with pytest.raises(WriteError), atomic_dir(tmp_path / "run") as folder:
        (folder / "missing" / "x").write_text("x")
    assert os.listdir(tmp_path) == []


KILLED = """
import os, signal, sys
from headwise.io import atomic
target, when = sys.argv[1:]
if when == "file":
    def die(*args): os.kill(os.getpid(), signal.SIGKILL)
    atomic.os.replace = die
    atomic.write_text(target, "half")
rename = os.rename
def dies_between(source, destination):
    rename(source, destination)
    if ".old-" in str(destination): os.kill(os.getpid(), signal.SIGKILL)
if when == "between":
    atomic._exchange = lambda one, other: False
    atomic.os.rename = dies_between
with atomic.atomic_dir(target) as folder:
    (folder / "a.txt").write_text("half")
    if when == "wait":
        print("ready", flush=True)
        sys.stdin.read()
    if when == "body": os.kill(os.getpid(), signal.SIGKILL)
"""


def killed(target: Path, when: str) -> None:
    done = subprocess.run([sys.executable, "-c", KILLED, str(target), when], capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr


def test_sigkill_leaves_the_old_folder_and_the_next_write_clears_up(tmp_path: Path) -> None:
    target = tmp_path / "run"
    put(target, "old")
    killed(target, "body")
    assert contents(target) == {"a.txt": "old", "sub/b.txt": "old"}
    assert len(os.listdir(tmp_path)) == 2  # the killed process could not clear up
    put(target, "new")
    assert contents(target)["a.txt"] == "new"
    assert os.listdir(tmp_path) == ["run"]


def test_sigkill_between_two_renames_is_mended(tmp_path: Path) -> None:
    target = tmp_path / "run"
    put(target, "old")
    killed(target, "between")
    assert not target.exists()
    with pytest.raises(RuntimeError):
        put(target, "new", then=raises(RuntimeError()))
    assert contents(target)["a.txt"] == "old"
    assert os.listdir(tmp_path) == ["run"]


def test_sigkill_while_writing_a_file(tmp_path: Path) -> None:
    target = tmp_path / "state.json"
    write_text(target, "old")
    killed(target, "file")
    assert target.read_text() == "old"
    assert len(os.listdir(tmp_path)) == 2
    write_text(target, "new")
    assert os.listdir(tmp_path) == ["state.json"]
    assert target.read_text() == "new"


def test_a_living_writer_is_not_swept(tmp_path: Path) -> None:
    target = tmp_path / "run"
    writer = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(target), "wait"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert writer.stdout is not None
    assert writer.stdout.readline() == "ready\n"
    put(target, "mine")
    assert len(os.listdir(tmp_path)) == 2
    writer.communicate("")
    assert writer.returncode == 0
    assert contents(target) == {"a.txt": "half"}  # the last to finish wins
    assert os.listdir(tmp_path) == ["run"]


RACE = """
import sys
from headwise.io import atomic
target, name, way = sys.argv[1:]
if way == "renames": atomic._exchange = lambda one, other: False
for i in range(60):
    with atomic.atomic_dir(target) as folder:
        (folder / "one").write_text(f"{name}{i}")
        (folder / "two").write_text(f"{name}{i}")
    atomic.write_text(target + ".txt", name * 1000)
"""


@pytest.mark.parametrize("way", ["exchange", "renames"])
def test_racing_writers_all_succeed(tmp_path: Path, way: str) -> None:
    target = tmp_path / "run"
    racers = [
        subprocess.Popen([sys.executable, "-c", RACE, str(target), name, way], stderr=subprocess.PIPE, text=True)
        for name in "abc"
    ]
    for racer in racers:
        _, errors = racer.communicate()
        assert racer.returncode == 0, errors
    found = contents(target)
    assert found["one"] == found["two"]
    text = (tmp_path / "run.txt").read_text()
    assert text == text[0] * 1000
    put(target, "last")
    assert sorted(os.listdir(tmp_path)) == ["run", "run.txt"]
