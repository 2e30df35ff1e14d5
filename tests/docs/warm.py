"""A process that has torch and headwise loaded, and forks a child for each command: Python's start is paid for once.

`start` gives a function that runs one of `JOBS`. In the environment it gives them, `headwise` is a small client of the
same process, so that the bash of a page stays bash, loops and pipes and all.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

LOADED = (
    "headwise.cli.compare",
    "headwise.cli.generate",
    "headwise.cli.train",
    "headwise.distill.run",
    "headwise.lab.report.ab",
)
# -I and -S: it needs nothing but the standard library, and starts in a hundredth of a second.
CLIENT = """#!{python} -IS
import json, os, socket, sys
with socket.socket(socket.AF_UNIX) as server:
    server.connect({address!r})
    socket.send_fds(server, [b"!"], [0, 1, 2])
    request = {{"job": "headwise", "argument": sys.argv[1:], "cwd": os.getcwd(), "environment": dict(os.environ)}}
    server.sendall(json.dumps(request).encode() + b"\\n")
    sys.exit(int(server.makefile().readline() or 1))
"""
Run = Callable[..., int]


def headwise(arguments: list[str]) -> int:
    from headwise.cli import main

    return main(arguments)


def blocks(about: dict[str, Any]) -> int:
    from tutorial_blocks import run

    sys.path.insert(0, "")
    return run(**about)


JOBS: dict[str, Callable[[Any], int]] = {"headwise": headwise, "blocks": blocks}


@contextlib.contextmanager
def start(folder: Path) -> Iterator[Run]:
    """`run(job, argument, output, cwd=…, environment=…)` until the block ends; stdout and stderr go to `output`."""
    address, client = str(folder / "socket"), folder / "headwise"
    client.write_text(CLIENT.format(python=sys.executable, address=address))
    client.chmod(0o755)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(address)
        listener.listen()
        server = subprocess.Popen(
            [sys.executable, __file__, str(listener.fileno())],
            stdin=subprocess.PIPE,
            pass_fds=[listener.fileno()],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            start_new_session=True,
        )

    def run(job: str, argument: Any, output: IO[bytes], *, cwd: Path, environment: Mapping[str, str]) -> int:
        with socket.socket(socket.AF_UNIX) as connection, open(os.devnull) as nothing:
            connection.settimeout(600)
            connection.connect(address)
            socket.send_fds(connection, [b"!"], [nothing.fileno(), output.fileno(), output.fileno()])
            path = f"{folder}{os.pathsep}{environment['PATH']}"
            request = {"job": job, "argument": argument, "cwd": str(cwd), "environment": {**environment, "PATH": path}}
            connection.sendall(json.dumps(request).encode() + b"\n")
            return int(connection.makefile().readline() or 1)

    try:
        yield run
    finally:
        os.killpg(server.pid, signal.SIGKILL)  # with what still runs after a failure
        server.communicate()


def serve(listener: socket.socket) -> None:
    """Fork a child for each connection, until nobody holds the other end of stdin."""
    for name in LOADED:
        importlib.import_module(name)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the children
    while sys.stdin not in select.select([listener, sys.stdin], [], [])[0]:
        connection, _ = listener.accept()
        if not os.fork():
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            answer(connection)
        connection.close()


def answer(connection: socket.socket) -> None:
    """Do what is asked, with the asker's input, output, folder and environment, and end."""
    status = 1
    try:
        _, descriptors, *_ = socket.recv_fds(connection, 1, 3)
        for own, given in enumerate(descriptors):
            os.dup2(given, own)
        request = json.loads(connection.makefile().readline())
        os.chdir(request["cwd"])
        os.environ.clear()
        os.environ.update(request["environment"])
        sys.path[:0] = filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))
        importlib.invalidate_caches()
        status = JOBS[request["job"]](request["argument"])
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        connection.sendall(f"{status}\n".encode())
        os._exit(0)


if __name__ == "__main__":
    serve(socket.socket(fileno=int(sys.argv[1])))
