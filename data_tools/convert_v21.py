"""The last leg of `vla data convert --to lerobot-v2.1`: a LeRobot dataset written as v2.1, read back and compared.

`data_tools/lerobot_v21.py` writes; here every number, picture and instruction of the copy is held against the dataset it
was made from, bit by bit: v2.1 is cut out of v3.0 without loss, or it is wrong.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from data_tools.convert_pool import Job, Pool
from data_tools.lerobot_v21 import write_v21
from data_tools.sources.lerobot import LeRobotSource


def to_v21(root: Path, dst: Path, *, workers: int, verify: bool, progress: bool) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """Write the dataset at `root` as v2.1 at `dst`. Returns what `write_v21` says, and the proof (None without `verify`).

    Raises what `write_v21` raises: a damaged source is refused whole.
    """
    written = write_v21(root, dst, workers=workers, progress=progress)
    if not verify:
        return written, None
    with Pool(workers, Job(LeRobotSource(root), None, 0, "lossless")) as pool:
        return written, _verify_copy(pool, root, dst, progress)


def _verify_copy(pool: Pool, root: Path, dst: Path, progress: bool) -> dict[str, Any]:
    source, copy = LeRobotSource(root), LeRobotSource(dst)
    keys, differences, pictures = source.keys(), [], 0
    if keys != copy.keys():
        differences.append({"key": "", "where": str(dst), "found": f"{len(copy.keys())} episodes", "expected": str(len(keys))})
    with tqdm(total=len(keys), unit="ep", desc="verifying v2.1", disable=not progress) as bar:
        for found, count in pool.ordered(_same, ((dst, key) for key in copy.keys())):
            differences += found
            pictures += count
            bar.update()
    return {"episodes": len(copy.keys()), "pictures": pictures, "pictures_identical": not differences, "worst_psnr": None,
            "psnr_limit": None, "differences": differences}  # fmt: skip


# ---- in a worker ----


@functools.lru_cache(maxsize=1)
def _copy(root: Path, written: int) -> LeRobotSource:
    return LeRobotSource(root)


def _same(job: Job, dst: Path, key: str) -> tuple[list[dict[str, str]], int]:
    """(differences, pictures compared) of one episode."""
    differences, pictures = [], 0
    left, right = job.source.read(key), _copy(dst, (dst / "meta" / "info.json").stat().st_mtime_ns).read(key)
    if left.instruction != right.instruction:
        differences.append(_difference(key, dst, "instruction", right.instruction, left.instruction))
    for name, wanted in left.fields.items():
        values = right.fields.get(name)
        if name in ("index", "frame_index"):  # counted anew
            continue
        if values is None or wanted.dtype != values.dtype or wanted.tobytes() != values.tobytes():
            found = "no such column" if values is None else f"{values.dtype} {values.shape}"
            differences.append(_difference(key, dst, name, found, "the source's numbers"))
    for name, wanted in left.images.items():
        frames = right.images.get(name)
        pictures += len(wanted)
        if frames is None or not np.array_equal(frames, wanted):
            differences.append(_difference(key, dst, name, "other pictures", "the source's pictures"))
    return differences, pictures


def _difference(key: str, dst: Path, what: str, found: object, expected: object) -> dict[str, str]:
    return {"key": key, "where": f"{dst}, {key}, {what}", "found": str(found), "expected": str(expected)}
