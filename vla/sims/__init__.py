"""Real simulators behind one gymnasium-style adapter, each with a scripted expert and an instruction per task.

`SUITES` and `expand_tasks` need nothing but this package; `make_sim` needs the `sim` extra and an offscreen renderer.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from vla.errors import MachineError, UsageError
from vla.sims.suites import SUITES, Suite, expand_tasks, find_suite

if TYPE_CHECKING:
    from vla.sims.base import Simulator

__all__ = ["SUITES", "Suite", "expand_tasks", "find_suite", "local_sim", "make_sim"]

_ADAPTERS = {
    "tabletop": ("vla.sims.tabletop", "Tabletop"),
    "tabletop-wrist": ("vla.sims.tabletop", "TabletopWrist"),
    "tabletop-long": ("vla.sims.tabletop", "TabletopLong"),
    "metaworld": ("vla.sims.metaworld", "MetaWorld"),
    "fetch": ("vla.sims.fetch", "Fetch"),
    "aloha": ("vla.sims.aloha", "Aloha"),
    "robosuite-panda": ("vla.sims.robosuite", "PandaLift"),
    "robosuite-ur5e": ("vla.sims.robosuite", "UR5eLift"),
}
_ELSEWHERE = {"robosuite-panda": "ROBOSUITE", "robosuite-ur5e": "ROBOSUITE"}
"""Suites of another interpreter, and its name in `vla/sims/remote.py`."""


def make_sim(suite: str, task: str, **kw: Any) -> Simulator:
    """One simulator of `task`; `kw` are `Simulator`'s keyword arguments (`image_size`, `randomise`, ...).

    Suites whose packages live in another environment come as a stand-in with the same interface (`vla/sims/remote.py`).
    Raises `UsageError` for an unknown suite, task or argument, `MachineError` when a package or a renderer is missing.
    """
    tasks = expand_tasks(suite, [task])
    if tasks != [task]:
        raise UsageError(f"task {task!r} of suite {suite!r}", found=f"a group of {len(tasks)} tasks",
                         expected="one task", fix=f"make one simulator per task, e.g. {tasks[0]}")  # fmt: skip
    if suite in _ELSEWHERE:
        from vla.sims import remote

        return remote.RemoteSimulator(getattr(remote, _ELSEWHERE[suite]), suite, task, **kw)
    return local_sim(suite, task, **kw)


def local_sim(suite: str, task: str, **kw: Any) -> Simulator:
    """As `make_sim`, in this very interpreter whatever the suite needs."""
    module, name = _ADAPTERS[suite]
    try:
        from vla.sims.render import check_renderer

        check_renderer()
        return getattr(importlib.import_module(module), name)(task, **kw)
    except ModuleNotFoundError as error:
        raise MachineError(
            f"suite {suite!r}", found=f"Python package {error.name!r} is not installed",
            expected="the simulator packages",
            fix="make setup-robosuite" if suite in _ELSEWHERE else "pip install 'tendon-vla[sim]'",
        ) from error  # fmt: skip
