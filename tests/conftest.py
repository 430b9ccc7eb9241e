"""What every test can rely on: one thread, no network, an offscreen renderer, and the same random numbers each time."""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Generator
from pathlib import Path

# Before numpy, torch or mujoco is imported anywhere. Two test processes of two threads each fight for two cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

import pytest  # noqa: E402
from hypothesis import HealthCheck, settings  # noqa: E402

# No deadlines: a slow machine is not a wrong program. Derandomised: a red test is red for everybody.
settings.register_profile(
    "house", deadline=None, derandomize=True, max_examples=60, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("house")

ROOT = Path(__file__).parents[1]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="also run tests that take longer than a minute")
    parser.addoption("--hub", action="store_true", help="also run tests that reach the Hugging Face Hub")


def pytest_configure(config: pytest.Config) -> None:
    if not config.getoption("--hub"):
        # Not a hope but a switch: a test that reaches for the Hub fails at once instead of hanging.
        os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    no_gpu = None
    for item in items:
        for marker in ("slow", "hub"):
            if marker in item.keywords and not config.getoption(f"--{marker}"):
                item.add_marker(pytest.mark.skip(reason=f"run with --{marker}"))
        if "gpu" in item.keywords:
            if no_gpu is None:
                import torch

                no_gpu = not torch.cuda.is_available()
            if no_gpu:
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.hookimpl(optionalhook=True)
def pytest_handlecrashitem(crashitem: str, sched: object) -> None:
    """A test that took its process along (as one that hangs does in the end) has failed; xdist would try it again and again."""
    unit = getattr(sched, "workqueue", {}).get(crashitem.split("::")[0])
    if unit and crashitem in unit:
        unit[crashitem] = True


_STOPPING = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


_SPEAKING = (logging.getLogger(), logging.getLogger("uvicorn"))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol() -> Generator[None, object, object]:
    """What a command takes over for its process, no later test inherits: the signals that stop it, and what is logged where."""
    signals = {number: signal.getsignal(number) for number in _STOPPING}
    logs = [(logger, logger.level, logger.handlers[:]) for logger in _SPEAKING]
    try:
        return (yield)
    finally:
        for number, handler in signals.items():
            if signal.getsignal(number) is not handler:
                signal.signal(number, handler)
        for logger, level, handlers in logs:
            logger.setLevel(level)
            logger.handlers[:] = handlers


@pytest.fixture(scope="session")
def checkout() -> Path:
    """The repository's root; skips where the tests run against an installed wheel (`make test-wheel`)."""
    if not (ROOT / "pyproject.toml").exists():
        pytest.skip("not in a checkout")
    return ROOT


@pytest.fixture(scope="session")
def demos(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two tiny recorded datasets: {"tabletop": 30 episodes, "metaworld": 3 episodes}, recorded here and now."""
    from data_tools.record import record

    root = tmp_path_factory.mktemp("demos")
    record("tabletop", None, 30, 0, root / "tabletop", workers=1, progress=False)
    record("metaworld", ["button-press-topdown-v3"], 3, 0, root / "metaworld", workers=1, progress=False)
    return {"tabletop": root / "tabletop", "metaworld": root / "metaworld"}


@pytest.fixture(scope="session")
def stores(demos: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> list:
    """`demos` opened: [tabletop, metaworld]."""
    from vla.episodes import EpisodeStore

    cache = tmp_path_factory.mktemp("cache")
    return [EpisodeStore.open(demos[name], cache_dir=cache, progress=False) for name in ("tabletop", "metaworld")]


@pytest.fixture(scope="module")
def table():
    """One tabletop, reset by every test that uses it."""
    from vla.sims import make_sim

    return make_sim("tabletop", "touch-red")


@pytest.fixture(scope="module")
def button():
    """One Meta-World button."""
    pytest.importorskip("metaworld")
    from vla.sims import make_sim

    return make_sim("metaworld", "button-press-topdown-v3")
