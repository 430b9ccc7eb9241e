"""Simulators that cannot live in this interpreter: a stand-in here, the real one in another environment's Python.

robosuite needs numpy below 2, everything else here numpy 2. A process that makes such a simulator starts one child with
`.venv-robosuite/bin/python` (or $VLA_ROBOSUITE_PYTHON) that hosts all of its simulators of that environment; requests go
over a private socket (`vla/sims/remote_wire.py`, no pickle), about 0.1 ms each. The child ends with its parent.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import socket
import subprocess
import tempfile
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import vla
from vla import errors
from vla.errors import MachineError
from vla.sims.base import Simulator
from vla.sims.remote_child import PROTOCOL
from vla.sims.remote_wire import WireError, receive, send

PATIENCE = 300.0
"""Seconds after which a silent child is taken for dead; a first scene on a busy machine takes tens."""


@dataclass(frozen=True)
class Environment:
    """Another Python and what is in it."""

    name: str
    packages: str
    """What it must have, for messages."""
    module: str = "vla.sims"
    """Where the child finds `local_sim(suite, task, **kw)`."""

    @property
    def variable(self) -> str:
        """The environment variable that names its interpreter."""
        return f"VLA_{self.name.upper()}_PYTHON"

    @property
    def fix(self) -> str:
        """What to type when it is missing or broken."""
        return f"make setup-{self.name}"

    def python(self) -> Path | None:
        """Its interpreter: the variable's, or that of `.venv-<name>` in this checkout or folder; None without one."""
        if named := os.environ.get(self.variable):
            return Path(named) if Path(named).is_file() else None
        for folder in (Path(vla.__file__).parents[1], Path.cwd()):
            path = folder / f".venv-{self.name}" / "bin" / "python"
            if path.is_file():
                return path
        return None


ROBOSUITE = Environment("robosuite", "robosuite 1.5.2 and this package, numpy below 2")


class RemoteSimulator(Simulator):
    """A `Simulator` whose world is in the child. Same interface, same errors; a dead child is a `MachineError`."""

    camera = ""  # told by the child
    max_steps = 0

    def __init__(self, environment: Environment, suite: str, task: str, **kw: Any) -> None:
        self._closed = True
        self._room = _room(environment)
        self._number = self._room.number()
        asked = {"op": "make", "suite": suite, "task": task, "arguments": kw}
        reply, _ = self._room.ask({**asked, "sim": self._number})
        self._closed = False
        self.suite, self.camera, self.max_steps = suite, reply["camera"], reply["max_steps"]
        super().__init__(task, **kw)
        if reply["spec"] != self.spec.model_dump(mode="json"):
            raise MachineError(f"suite {suite!r}", found=f"another description of {self.spec.name!r} in {self._room.python}",
                               expected="the same package on both sides", fix=environment.fix)  # fmt: skip

    def _ask(self, op: str, arrays: dict[str, np.ndarray] | None = None, **more: Any) -> tuple[Any, dict[str, np.ndarray]]:
        return self._room.ask({"op": op, "sim": self._number, **more}, arrays)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """As `Simulator.reset`."""
        reply, arrays = self._ask("reset", seed=None if seed is None else int(seed), options=dict(options or {}))
        self.task, self.instruction = reply["task"], reply["instruction"]
        return _observation(arrays), reply["info"]

    def step(self, action: Any, render: bool = True) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        """As `Simulator.step`."""
        reply, arrays = self._ask("step", {"action": np.asarray(action, np.float64)}, render=bool(render))
        return _observation(arrays), reply["reward"], reply["terminated"], reply["truncated"], reply["info"]

    def expert(self) -> np.ndarray:
        """As `Simulator.expert`."""
        return self._ask("expert")[1]["action"]

    def frame(self, size: int = 240) -> np.ndarray:
        """As `Simulator.frame`."""
        return self._ask("frame", size=int(size))[1]["frame"]

    def close(self) -> None:
        """Free the world in the child; the child itself stays for the next simulator of this process."""
        if not self._closed:
            self._closed = True
            with contextlib.suppress(MachineError):  # it died before: nothing is left to free
                self._ask("close")

    def _elsewhere(self, *_: Any, **__: Any) -> Any:
        raise AssertionError("this is done in the child")

    _scene = _act = _state = _start_judging = _judge = _watched = _change_task = _elsewhere


def _observation(arrays: dict[str, np.ndarray]) -> dict[str, Any]:
    images = {name.removeprefix("images/"): a for name, a in arrays.items() if name.startswith("images/")}
    return {"images": images, "state": arrays["state"]}


class _Room:
    """One child and the connection to it."""

    def __init__(self, environment: Environment, python: Path) -> None:
        self.environment, self.python = environment, python
        self._lock, self._numbers, self.dead = threading.Lock(), 0, False
        self._log = tempfile.TemporaryFile()  # noqa: SIM115  closed with the room
        ours, theirs = socket.socketpair()
        command = [str(python), "-P", "-m", "vla.sims.remote_child", str(theirs.fileno()), environment.module]
        settings = {**os.environ, "PYTHONUNBUFFERED": "1"}
        settings.setdefault("OMP_NUM_THREADS", "1")
        try:
            self._child = subprocess.Popen(command, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL,
                                           stdout=self._log, stderr=self._log, env=settings)  # fmt: skip
        except OSError as error:
            raise MachineError(f"interpreter {python}", found=f"it does not start: {error}",
                               expected=environment.packages, fix=environment.fix) from error  # fmt: skip
        finally:
            theirs.close()
        ours.settimeout(PATIENCE)
        self._sock = ours
        reply, _ = self.ask({"op": "hello"})
        if (reply["version"], reply["protocol"]) != (vla.__version__, PROTOCOL):
            self.end()
            raise MachineError(f"interpreter {python}", found=f"version {reply['version']} of this package",
                               expected=f"version {vla.__version__}, as here", fix=environment.fix)  # fmt: skip

    def number(self) -> int:
        """A number no simulator of this room had."""
        self._numbers += 1
        return self._numbers

    def ask(self, header: dict[str, Any], arrays: dict[str, np.ndarray] | None = None) -> tuple[Any, dict[str, np.ndarray]]:
        """The child's reply, its error raised here as the class it was."""
        with self._lock:
            if self.dead:
                raise self._broken("it ended earlier")
            try:
                send(self._sock, header, arrays)
                reply, received = receive(self._sock)
            except TimeoutError as error:
                raise self._broken(f"no answer to {header['op']!r} within {PATIENCE:.0f} s") from error
            except WireError as error:
                raise self._broken(f"an answer that is not ours: {error}") from error
            except (EOFError, OSError) as error:
                raise self._broken(None) from error
            except BaseException:  # Ctrl-C between request and answer: the next answer would be the wrong one
                self.end()
                raise
        if "error" in reply:
            kind, where, found, expected, fix = reply["error"]
            raise getattr(errors, kind, MachineError)(where, found=found, expected=expected, fix=fix)
        if "crash" in reply:
            raise MachineError(f"{self.environment.name} in {self.python}", found=reply["crash"].strip(),
                               expected=self.environment.packages, fix=self.environment.fix)  # fmt: skip
        return reply, received

    def _broken(self, found: str | None) -> MachineError:
        """End the child and say what it said last."""
        code = self.end()
        found = found or (f"it was killed by signal {-code}" if code < 0 else f"it ended with code {code}")
        found += f"; it said last:\n{self._said}" if self._said else ""
        return MachineError(
            f"simulator process of {self.environment.name} ({self.python})", found=found,
            expected=f"a process that answers, with {self.environment.packages}", fix=self.environment.fix,
        )  # fmt: skip

    _said = ""

    def end(self) -> int:
        """Close the connection, which ends the child, and return its exit code."""
        if self.dead:
            return self._child.returncode
        self.dead = True
        self._sock.close()
        try:
            code = self._child.wait(2)
        except subprocess.TimeoutExpired:
            self._child.kill()
            code = self._child.wait()
        self._log.seek(0)
        self._said = self._log.read()[-1500:].decode(errors="replace").strip()
        self._log.close()
        return code


_rooms: dict[tuple[int, Environment, Path], _Room] = {}


def _room(environment: Environment) -> _Room:
    """This process's room of `environment`, started when there is none alive."""
    python = environment.python()
    if python is None:
        raise MachineError(
            f"simulators of {environment.name}", found=f"no .venv-{environment.name}/bin/python, and ${environment.variable} "
            f"is {os.environ.get(environment.variable) or 'not set'}",
            expected=f"an interpreter of its own with {environment.packages}",
            fix=f"{environment.fix} in a checkout, or {environment.variable}=/path/to/python",
        )  # fmt: skip
    key = (os.getpid(), environment, python)
    if key not in _rooms or _rooms[key].dead:
        _rooms[key] = _Room(environment, python)
    return _rooms[key]


@atexit.register
def _end_all() -> None:
    for (pid, _, _), room in list(_rooms.items()):
        if pid == os.getpid():  # a forked child leaves its parent's alone
            room.end()
