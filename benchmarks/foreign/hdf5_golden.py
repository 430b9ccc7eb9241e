"""The small files in tests/golden/hdf5: what the other scripts here wrote, without the simulators' model texts.

    python benchmarks/foreign/hdf5_robomimic.py write R --demos 3 --size 16 --steps 5               # each in its own
    python benchmarks/foreign/hdf5_libero.py write L --libero LIBERO --size 16 --demos 2 --steps 13 --task STUDY_SCENE1_...
    python benchmarks/foreign/hdf5_libero.py replay V --libero LIBERO --openvla OPENVLA --source L   # environment
    python benchmarks/foreign/hdf5_aloha.py sim A --act ACT --episodes 1 --steps 5 --size 60 80
    python benchmarks/foreign/hdf5_aloha.py replay M --recorder MOBILE/aloha_scripts --frames A --size 60 80
    .venv/bin/python benchmarks/foreign/hdf5_golden.py R/image.hdf5 tests/golden/hdf5/robomimic.hdf5.gz

Every dataset and attribute is copied as it is, except that `model_file` and `bddl_file_content` (up to a megabyte of
XML) become empty and folders of the machine that wrote the file are taken out of texts. The copy is gzipped.
"""

from __future__ import annotations

import argparse
import gzip
import io
import re
from pathlib import Path
from typing import Any

import h5py

_FOLDERS = re.compile(r"/[\w./-]*/(?=bddl_files/|bddl_files\\)")


def copy(source: Any, target: Any) -> None:
    for name, value in source.attrs.items():
        if name in ("model_file", "bddl_file_content"):
            value = ""
        elif isinstance(value, str):
            value = _FOLDERS.sub("", value)
        target.attrs[name] = value
    for name, item in source.items():
        if isinstance(item, h5py.Dataset):
            source.copy(item, target, name)
        else:
            copy(item, target.create_group(name))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("out", type=Path)
    arguments = parser.parse_args()
    buffer = io.BytesIO()
    with h5py.File(arguments.source, "r") as source, h5py.File(buffer, "w") as target:
        copy(source, target)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_bytes(gzip.compress(buffer.getvalue(), mtime=0))
    print(f"{arguments.out}: {arguments.out.stat().st_size / 1e3:.1f} kB of {len(buffer.getvalue()) / 1e3:.1f}")


if __name__ == "__main__":
    main()
