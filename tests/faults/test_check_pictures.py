"""Pictures: cameras that changed places, turned over, froze, went blind; each planted, found, and not found without its check."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from planted import Fault, judge
from sound_dataset import sound_spec, write_sound

from data_tools.check import check
from vla.schema import Episode


def filmed(folder: Path, change: Callable[[Episode], dict[str, np.ndarray]], which: Sequence[int], name: str = "d", **kw) -> Path:
    def apply(made: list[Episode]) -> None:
        for n in which:
            made[n] = dataclasses.replace(made[n], images=made[n].images | change(made[n]))

    return write_sound(folder / name, apply, **kw)


def swapped(folder: Path) -> Path:
    return filmed(folder, lambda e: {"front": e.images["wrist"], "wrist": e.images["front"]}, [5])


def upside_down(folder: Path) -> Path:
    return filmed(folder, lambda e: {"front": e.images["front"][:, ::-1, ::-1]}, [2])


def frozen(folder: Path) -> Path:
    return filmed(folder, lambda e: {"front": np.repeat(e.images["front"][:1], len(e), 0)}, [1])


def frozen_for_a_while(folder: Path) -> Path:
    def stop(e: Episode) -> dict[str, np.ndarray]:
        frames = e.images["wrist"].copy()
        frames[10:28] = frames[10]
        return {"wrist": frames}

    return filmed(folder, stop, [4])


def half_rate(folder: Path) -> Path:
    return filmed(folder, lambda e: {"wrist": np.repeat(e.images["wrist"][::2], 2, 0)}, range(8))


def black(folder: Path) -> Path:
    return filmed(folder, lambda e: {"wrist": np.zeros_like(e.images["wrist"])}, [3, 6])


def one_view_twice(folder: Path) -> Path:
    return filmed(folder, lambda e: {"wrist": e.images["front"]}, range(8))


def wrong_offsets(folder: Path) -> Path:
    def change(made: list[Episode]) -> None:
        made[6] = dataclasses.replace(made[6], images=made[2].images)

    return write_sound(folder / "d", change)


def elsewhere(folder: Path) -> Path:
    return filmed(folder, lambda e: {"front": 255 - e.images["front"]}, [7])


def turned_in_one_of_two(folder: Path) -> Sequence[Path]:
    one = write_sound(folder / "a", cameras=("front",))
    two = filmed(folder, lambda e: {"front": e.images["front"][:, ::-1]}, range(8), "b", cameras=("front",), first=50)
    return one, two


FAULTS = [
    Fault("cameras swapped", "camera-swap", swapped, place={"episode": 5}, frames=True),
    Fault("upside down", "camera-turned", upside_down, said="upside down", place={"episode": 2}, frames=True),
    Fault("frozen", "frozen-camera", frozen, place={"episode": 1}, frames=True),
    Fault("frozen for a while", "frozen-camera", frozen_for_a_while, "warning", place={"episode": 4, "frame": 10}, frames=True),
    Fault("every picture twice", "repeated-frames", half_rate, "warning", said="copies", frames=True),
    Fault("black", "blank-camera", black, said="2 of 8", place={"episode": 3}, frames=True),
    Fault("one view under two names", "same-camera", one_view_twice, "warning", said="8 of 8", frames=True),
    Fault(
        "pictures of another episode", "duplicate-pictures", wrong_offsets, said="episode 2", place={"episode": 6}, frames=True
    ),
    Fault("another scene", "other-scene", elsewhere, "note", place={"episode": 7}, frames=True),
    Fault("turned in one of two datasets", "turned-between", turned_in_one_of_two, said="top to bottom", frames=True),
]


@pytest.mark.parametrize("fault", FAULTS, ids=str)
def test_bad_pictures_are_found_out(fault: Fault, tmp_path: Path):
    judge(fault, tmp_path)


def test_a_sound_dataset_with_two_cameras_is_silent(tmp_path: Path):
    assert check(write_sound(tmp_path / "d")) == []


def test_without_frames_nothing_is_decoded(tmp_path: Path):
    assert not [f for f in check(frozen(tmp_path), frames=False) if f.code == "frozen-camera"]


def test_cameras_that_stand_still_with_the_robot_are_not_frozen(tmp_path: Path):
    def rest(made: list[Episode]) -> None:
        e = made[1]
        images = {c: np.repeat(f[:1], len(f), 0) for c, f in e.images.items()}
        made[1] = dataclasses.replace(e, images=images, state=np.repeat(e.state[:1], len(e), 0), action=0 * e.action)

    found = check(write_sound(tmp_path / "d", rest, sound_spec()))
    assert {f.code for f in found} == {"idle-start"}
