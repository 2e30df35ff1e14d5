"""Python processes that need not load torch and headwise first: a server has them loaded, and forks for each process.

`start` makes a folder with two programs. `python` is an interpreter for `-c …` and `-m headwise …`: with the input,
output, folder, environment, signals, end and exit status of a process of its own. For anything else it becomes the
real one. `headwise` is the command. Tests of what a process loads, or holds in memory, have no use for them.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

LOADED = (
    "headwise.cli.compare",
    "headwise.cli.generate",
    "headwise.cli.train",
    "headwise.distill.run",
    "headwise.lab.measure",
    "headwise.lab.report.ab",
    "headwise.lab.worker",
)
# -I and -S: it needs nothing but the standard library, and starts in a hundredth of a second.
CLIENT = """#!{real} -IS
import contextlib, json, os, signal, socket, sys
words = {first!r} + sys.argv[1:]
bare = words[words[:1] == ["-P"]:]
if bare[:1] != ["-c"] and bare[:2] != ["-m", "headwise"]:
    os.execv({real!r}, [{real!r}, *words])
with socket.socket(socket.AF_UNIX) as server:
    server.connect({address!r})
    socket.send_fds(server, [b"!"], [0, 1, 2])
    request = {{"words": words, "cwd": os.getcwd(), "environment": dict(os.environ)}}
    server.sendall(json.dumps(request).encode() + b"\\n")
    answers = server.makefile()
    pid = int(answers.readline())

    def pass_on(number, frame):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, pass_on)
    status = int(answers.readline() or 1)
if status < 0:
    with contextlib.suppress(OSError):
        signal.signal(-status, signal.SIG_DFL)
    os.kill(os.getpid(), -status)
sys.exit(status)
"""


@contextlib.contextmanager
def start(folder: Path) -> Iterator[Path]:
    """`folder` with the two programs, which work until the block ends."""
    address = str(folder / "socket")
    for name, first in {"python": [], "headwise": ["-P", "-m", "headwise"]}.items():
        client = folder / name
        client.write_text(CLIENT.format(real=sys.executable, first=first, address=address))
        client.chmod(0o755)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(address)
        listener.listen()
        server = subprocess.Popen(
            [sys.executable, __file__, str(listener.fileno()), str(folder / "python")],
            stdin=subprocess.PIPE,
            pass_fds=[listener.fileno()],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            start_new_session=True,
        )
    try:
        yield folder
    finally:
        os.killpg(server.pid, signal.SIGKILL)  # with what still runs after a failure
        server.communicate()


def serve(listener: socket.socket) -> None:
    """Fork for each connection, until nobody holds the other end of stdin."""
    for name in LOADED:
        importlib.import_module(name)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the children
    while sys.stdin not in select.select([listener, sys.stdin], [], [])[0]:
        connection, _ = listener.accept()
        if not os.fork():
            listener.close()
            watch(connection)
        connection.close()


def watch(connection: socket.socket) -> NoReturn:
    """Start the process that is asked for, and tell of its end; with the one who asks it ends too."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    _, descriptors, *_ = socket.recv_fds(connection, 1, 3)
    for own, given in enumerate(descriptors):
        os.dup2(given, own)
        os.close(given)
    request = json.loads(connection.makefile().readline())
    alive, held = os.pipe()  # at an end once the process is
    pid = os.fork()
    if not pid:
        connection.close()
        become(**request)
    os.close(held)
    connection.sendall(f"{pid}\n".encode())
    if alive not in select.select([alive, connection], [], [])[0]:
        os.kill(pid, signal.SIGKILL)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    with contextlib.suppress(BrokenPipeError):
        connection.sendall(f"{status}\n".encode())
    os._exit(0)


def become(words: list[str], cwd: str, environment: dict[str, str]) -> NoReturn:
    """What Python does with these words."""
    status: Any = 0
    try:
        os.chdir(cwd)
        os.environ.clear()
        os.environ.update(environment)
        sys.path[:1] = filter(None, environment.get("PYTHONPATH", "").split(os.pathsep))
        if words[0] == "-P":
            words = words[1:]
        else:
            sys.path.insert(0, "")
        importlib.invalidate_caches()
        how, what, *rest = words
        sys.argv = [how, *rest]
        if how == "-m":
            runpy.run_module(what, run_name="__main__", alter_sys=True)
        else:
            exec(compile(what, "<string>", "exec"), {"__name__": "__main__"})
    except SystemExit as end:
        status = end.code or 0
    except BaseException:
        traceback.print_exc()
        status = 1
    finally:
        with contextlib.suppress(BrokenPipeError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(status if isinstance(status, int) else 1)


if __name__ == "__main__":
    sys.executable = sys.argv[2]  # what its children start is as warm
    serve(socket.socket(fileno=int(sys.argv[1])))
