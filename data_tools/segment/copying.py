"""A copy of a LeRobot v3.0 dataset with another language column. Videos, statistics and every other column stay as they are."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from data_tools.sources.inside import leads_out
from vla.durable import clear_stale, disk_full, flush, is_disk_full, replace_file, temporary_name
from vla.errors import DataError
from vla.recording.language import COLUMN, FEATURE, ROW, to_column


def copy_with_language(root: Path, out: Path, said: Mapping[int, Sequence[dict[str, Any]]], header: Mapping[str, Any]) -> None:
    """Copy the dataset `root` to `out`, which is made whole or not at all; `said[e]` are the rows of episode e.

    `header` is added to `meta/recording.json` where there is one, so that nobody goes on recording into the copy as it was.
    Raises `DataError` for a file that leads out of the dataset, `MachineError` on a full disk.
    """
    for path, found, expected, fix in leads_out(root):
        raise DataError(path, found=found, expected=expected, fix=fix)
    clear_stale(out)
    temporary = temporary_name(out)
    temporary.parent.mkdir(parents=True, exist_ok=True)
    try:
        shutil.copytree(root, temporary, ignore=lambda folder, names: ["data"] if Path(folder) == root else [])
        for path in sorted((root / "data").glob("*/*.parquet")):
            _rewrite(path, temporary / path.relative_to(root), said)
        info = json.loads((temporary / "meta" / "info.json").read_text())
        info["features"][COLUMN] = FEATURE
        replace_file(temporary / "meta" / "info.json", json.dumps(info, indent=4))
        recording = temporary / "meta" / "recording.json"
        if recording.is_file():
            replace_file(recording, json.dumps(dict(header) | {"language": True} | json.loads(recording.read_text())))
        flush(temporary)
        os.replace(temporary, out)
        flush(out.parent)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if is_disk_full(error):
            raise disk_full(out, error, f"{root} is as it was") from error
        raise


def _fitting(row: dict[str, Any]) -> dict[str, Any]:
    """A row as the column takes it: what calls a tool is kept as JSON text."""
    calls = row.get("tool_calls")
    return {**row, "tool_calls": calls and [call if isinstance(call, str) else json.dumps(call) for call in calls]}


def _rewrite(source: Path, target: Path, said: Mapping[int, Sequence[dict[str, Any]]]) -> None:
    """One data file, row group by row group."""
    target.parent.mkdir(parents=True, exist_ok=True)
    file, writer = pq.ParquetFile(source, page_checksum_verification=True), None
    for group in range(file.num_row_groups):
        table = file.read_row_group(group)
        numbers = table["episode_index"].to_numpy()
        edges = np.flatnonzero(np.diff(numbers, prepend=numbers[:1] - 1, append=numbers[-1:] + 1))
        episodes = numbers[edges[:-1]].tolist()
        column = to_column([[_fitting(row) for row in said.get(number, [])] for number in episodes], np.diff(edges).tolist())
        if COLUMN in table.column_names:
            table = table.drop_columns([COLUMN])
        table = table.append_column(pa.field(COLUMN, pa.list_(ROW)), column)
        # Hugging Face's own note of the columns would be wrong by one now; readers go by info.json.
        kept = {key: value for key, value in (table.schema.metadata or {}).items() if key != b"huggingface"}
        table = table.replace_schema_metadata(kept or None)
        writer = writer or pq.ParquetWriter(target, table.schema, compression="snappy", write_page_checksum=True)
        writer.write_table(table, row_group_size=max(len(table), 1))
    if writer is not None:
        writer.close()
        flush(target)
