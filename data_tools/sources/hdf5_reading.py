"""Arrays out of HDF5 files that may be damaged: every failure becomes a `DataError` that names file, episode and field.

HDF5 hides damage well. An array whose writer died keeps its full shape and reads as zeros where no chunk was ever
stored, and an array may point at bytes outside of its file. Both are refused here. What HDF5 cannot tell: a flipped
bit in an array stored without compression or checksum is a different number, nothing more.
"""

from __future__ import annotations

import importlib
import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from vla.errors import DataError, MachineError, VLAError

_DAMAGE = (OSError, RuntimeError, KeyError, ValueError, TypeError, MemoryError, OverflowError)
"""What h5py raises on damaged files, depending on which part of the file is hit."""
_DEEPEST = 8
_FETCH = "fetch or record this file again, or leave it out"


def load_h5py() -> Any:
    """The h5py module. Raises `MachineError` when it is not installed."""
    try:
        return importlib.import_module("h5py")
    except ImportError as error:
        raise MachineError("reading HDF5", found=f"no h5py ({error})", expected="h5py 3.12 or newer",
                           fix='pip install "tendon-vla[hdf5]"') from error  # fmt: skip


@contextmanager
def named(where: str, fix: str = _FETCH) -> Iterator[None]:
    """Turn what h5py raises inside into a `DataError` at `where`."""
    try:
        yield
    except VLAError:
        raise
    except _DAMAGE as error:
        words = str(error).strip("'\"") or type(error).__name__
        raise DataError(where, found=words, expected="readable HDF5", fix=fix) from error


@contextmanager
def opened(path: Path) -> Iterator[Any]:
    """The file, open for reading only while the block lasts: no handle outlives it, so sources pickle and fork.

    Raises `DataError` for a file that is missing, truncated, or no HDF5.
    """
    h5py = load_h5py()
    with named(str(path)):
        try:
            file = h5py.File(path, "r")
        except OSError as error:
            if "lock" not in str(error):
                raise
            # Read-only and network drives often cannot lock; finished files need none. Not asked for at first: HDF5
            # refuses a file that this process has open elsewhere with another setting.
            file = h5py.File(path, "r", locking=False)
    with file:
        yield file


def members(group: Any, where: str, problems: list[DataError], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(path below `group`, dataset) of every dataset in it and in its sub-groups, in name order.

    A link that leads nowhere or out of the file goes to `problems`.
    """
    h5py = load_h5py()
    if prefix.count("/") > _DEEPEST:  # a hard link to a group above never ends
        problems.append(DataError(f"{where} {prefix}", found=f"groups more than {_DEEPEST} deep", expected="a tree of groups",
                                  fix=_FETCH))  # fmt: skip
        return
    try:
        with named(where):
            names = sorted(group)
    except DataError as error:
        problems.append(error)
        return
    for name in names:
        path = f"{prefix}{name}"
        try:
            with named(f"{where} {path}"):
                if isinstance(group.get(name, getlink=True), h5py.ExternalLink):
                    raise _outside(f"{where} {path}", "a link to another file")
                item = group[name]
        except DataError as error:
            problems.append(error)
            continue
        if isinstance(item, h5py.Group):
            yield from members(item, where, problems, f"{path}/")
        elif isinstance(item, h5py.Dataset):
            yield path, item


def _outside(where: str, what: str) -> DataError:
    return DataError(where, found=what, expected="values inside this file",
                     fix="copy the dataset whole, e.g. h5repack -m 1 IN.hdf5 OUT.hdf5, on the machine that has them")  # fmt: skip


def refuse_unreadable(dataset: Any, where: str) -> None:
    """Raise unless all of `dataset`'s values are stored in its own file and can be decompressed here.

    Raises `DataError` (values outside of the file, or never written), `MachineError` (a filter that is not installed).
    """
    with named(where):
        if dataset.is_virtual or dataset.external:
            raise _outside(where, "values kept in other files (virtual or external storage)")
        if dataset.size == 0:
            return
        _require_filters(dataset, where)
        if dataset.chunks is not None:
            whole = int(np.prod([-(-n // c) for n, c in zip(dataset.shape, dataset.chunks, strict=True)]))
            stored, unit = dataset.id.get_num_chunks(), "chunks"
        else:
            whole, stored, unit = dataset.nbytes, dataset.id.get_storage_size(), "bytes"
        if stored < whole:
            raise DataError(where, found=f"{stored} of {whole} {unit} were ever written; HDF5 would read the rest as zeros",
                            expected="a finished recording", fix=_FETCH)  # fmt: skip


def _require_filters(dataset: Any, where: str) -> None:
    h5py = load_h5py()
    plist = dataset.id.get_create_plist()
    needed = [plist.get_filter(i) for i in range(plist.get_nfilters())]
    if all(h5py.h5z.filter_avail(code) for code, *_ in needed):
        return
    try:
        importlib.import_module("hdf5plugin")  # registers its filters with the library as it is imported
    except ImportError:
        pass
    for code, _, _, name in needed:
        if not h5py.h5z.filter_avail(code):
            raise MachineError(where, found=f"compressed with filter {code} ({name.decode(errors='replace')}), not installed",
                               expected="a filter this HDF5 library has", fix="pip install hdf5plugin")  # fmt: skip


def read_array(dataset: Any, where: str) -> np.ndarray:
    """All of `dataset` in its own dtype. Raises `DataError` when a part of it cannot be read or was never written."""
    refuse_unreadable(dataset, where)
    with named(where):
        return np.asarray(dataset[()])


def jpeg_size(dataset: Any, where: str) -> tuple[int, int]:
    """(height, width) by the header of the first row of a `(T, bytes)` dataset of zero-padded JPEGs."""
    refuse_unreadable(dataset, where)
    with named(where):
        row = dataset[0].tobytes()
    with _broken_jpeg(f"{where}, frame 0"), Image.open(io.BytesIO(row), formats=["JPEG"]) as picture:
        return picture.height, picture.width


def read_jpegs(dataset: Any, where: str, swap: bool) -> tuple[np.ndarray, np.ndarray]:
    """Zero-padded JPEG rows `(T, bytes)` -> (`(T, h, w, 3)` uint8, `(T,)` lengths of the JPEGs in bytes).

    `swap` exchanges red and blue. A JPEG ends in FF D9, so what is left after stripping zeros is the JPEG itself.
    Raises `DataError` on a broken JPEG, or one of another size than the first.
    """
    rows = read_array(dataset, where)
    frames: list[np.ndarray] = []
    lengths = np.zeros(len(rows), np.int64)
    for t, row in enumerate(rows):
        at = f"{where}, frame {t}"
        data = row.tobytes().rstrip(b"\0")
        lengths[t] = len(data)
        if not data.endswith(b"\xff\xd9"):
            raise DataError(at, found=f"{len(data)} bytes of JPEG without its end marker", expected="a whole JPEG",
                            fix=_FETCH)  # fmt: skip
        with _broken_jpeg(at), Image.open(io.BytesIO(data), formats=["JPEG"]) as picture:
            frame = np.asarray(picture.convert("RGB"))
        if frames and frame.shape != frames[0].shape:
            raise DataError(at, found=f"a picture of {frame.shape[:2]}", expected=f"{frames[0].shape[:2]} as in frame 0",
                            fix=_FETCH)  # fmt: skip
        frames.append(frame[..., ::-1] if swap else frame)
    return np.stack(frames) if frames else np.zeros((0, 0, 0, 3), np.uint8), lengths


@contextmanager
def _broken_jpeg(where: str) -> Iterator[None]:
    try:
        yield
    except (OSError, UnidentifiedImageError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(where, found=f"a broken JPEG ({error})", expected="a picture", fix=_FETCH) from error
