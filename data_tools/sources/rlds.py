"""RLDS datasets (Open X-Embodiment and others written by tensorflow-datasets) read without TensorFlow.

    <name>/<version>/dataset_info.json                              splits, and how many records each shard holds
                     features.json                                  the tree of features
                     <name>-<split>.tfrecord-00000-of-00003         one record per episode

Field paths are those of the features without `steps/`: `action`, `observation/state`. Pictures of three channels of uint8
are `images`, everything else with numbers (depth maps too) is a field, texts are attributes. A control rate is nowhere.

Pictures are decoded as TensorFlow does with `dct_method="INTEGER_ACCURATE"`; its default differs by up to 7 of 255.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from data_tools.sources import RawEpisode, SourceInfo
from data_tools.sources.rlds_features import Features, NoArray, count_steps, leaf_values, parse_features
from data_tools.sources.tfrecord import RESTORE, Shard, index_shard, parse_example
from vla.errors import DataError

INFO, FEATURES = "dataset_info.json", "features.json"
TEMPLATE = "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"
_INSTRUCTIONS = ("language_instruction", "natural_language_instruction", "instruction", "language")
"""Last names under which datasets of Open X-Embodiment keep the instruction, the surest first."""
_TRIED = 3  # episodes looked at for sizes that features.json leaves open


class RldsSource:
    """One version of an RLDS dataset, all its splits. Holds the offsets of its records and no data; pickles small."""

    kind = "rlds"

    def __init__(self, root: Path, features: Features, shards: dict[str, Shard], damage: list[DataError], missing: int,
                 attributes: Mapping[str, Any]) -> None:  # fmt: skip
        self.root = root
        self.features = features
        self.shards = shards
        self.damage = damage
        self.missing = missing
        self.info = self._describe(attributes)

    @classmethod
    def recognises(cls, path: Path) -> bool:
        """Whether `path` or a version folder in it looks like RLDS."""
        try:
            return bool(_versions(Path(path)))
        except OSError:
            return False

    @classmethod
    def open(cls, path: Path) -> RldsSource:
        """The dataset in the version folder `path`, or in the only version folder below it.

        Raises `DataError` when there are several versions, or its two JSON files do not say what the records are.
        """
        root = _one_version(Path(path))
        problems: list[tuple[str, str]] = []
        described, tree = _json(root / INFO, problems), _json(root / FEATURES, problems)
        features = None
        if tree is not None:
            try:
                features = parse_features(tree)
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                problems.append((FEATURES, f"not the features of an RLDS dataset: {error}"))
        splits: list[_Split] = []
        if described is not None:
            try:
                splits = _splits(described)
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                problems.append((INFO, f"no splits and shards to be read from it: {error}"))
        if problems or features is None or described is None:
            raise DataError(root, found="; ".join(f"{name}: {what}" for name, what in problems),
                            expected=f"{INFO} and {FEATURES} as tensorflow-datasets writes them", fix=RESTORE)  # fmt: skip
        shards, damage, missing = _list_shards(root, splits)
        attributes = {"name": described.get("name", ""), "version": described.get("version", ""),
                      "splits": {split.name: sum(split.lengths) for split in splits},
                      "unread": dict(features.unread)}  # fmt: skip
        return cls(root, features, shards, damage, missing, attributes)

    def keys(self) -> list[str]:
        """`<split>/<shard>/<record>` of every record that could be found, in the order of splits, shards and records."""
        return [f"{name}/{number}" for name, shard in self.shards.items() for number in range(len(shard))]

    def read(self, key: str, only: Collection[str] | None = None) -> RawEpisode:
        """One episode, whole whatever `only` says: everything that is wrong in its record is found.

        Raises `DataError` naming file, record and byte offset, with all of that."""
        name, _, number = key.rpartition("/")
        shard = self.shards.get(name)
        if shard is None or not number.isdecimal() or int(number) >= len(shard):
            raise DataError(self.root, found=f"no episode {key!r}", expected="one of keys()", fix="list the keys again")
        where = f"{shard.path}, record {number} at byte {shard.offsets[int(number)]}"
        data = shard.read(int(number))
        try:
            example = parse_example(data)
            steps = count_steps(example, self.features)
            if not steps:
                raise ValueError("an episode without steps")
        except ValueError as error:
            raise DataError(where, found=error, expected="a tf.train.Example holding the steps of an episode",
                            fix=RESTORE) from error  # fmt: skip
        fields: dict[str, np.ndarray] = {}
        images: dict[str, np.ndarray] = {}
        texts: dict[str, list[str]] = {}
        absent: list[str] = []
        unread: dict[str, str] = {}
        problems: list[str] = []
        for leaf in self.features.steps:
            if leaf.optional and leaf.name not in example:
                absent.append(leaf.path)
                continue
            try:
                values = leaf_values(example, leaf, steps)
            except NoArray as error:
                unread[leaf.path] = str(error)
                continue
            except ValueError as error:
                problems.append(f"{leaf.path}: {error}")
                continue
            if isinstance(values, list):
                texts[leaf.path] = values
            else:
                (images if leaf.is_picture else fields)[leaf.path] = values
        outer: dict[str, Any] = {}
        for leaf in self.features.episode:
            if leaf.optional and leaf.name not in example:
                continue
            try:
                values = leaf_values(example, leaf, 1)[0]
                outer[leaf.path] = values.item() if isinstance(values, np.generic) else values
            except NoArray as error:
                unread[leaf.path] = str(error)
            except ValueError as error:
                problems.append(f"{leaf.path}: {error}")
        problems += [f"{path}: {why}" for path, why in unread.items() if path.rpartition("/")[2] in _INSTRUCTIONS]
        if problems:
            raise DataError(where, found="; ".join(problems), expected=f"{steps} steps as {FEATURES} has them", fix=RESTORE)
        attributes: dict[str, Any] = {"split": name.partition("/")[0], "episode": outer,
                                      "texts": {path: _constant(lines) for path, lines in texts.items()}}  # fmt: skip
        attributes |= {name: value for name, value in (("absent", absent), ("unread", unread)) if value}
        instruction, spoken = _instruction(texts, outer)
        if spoken:
            attributes |= {"instruction_changes": True, "instructions": spoken}
        return RawEpisode(fields, images, instruction, where, key, attributes)

    def _describe(self, attributes: Mapping[str, Any]) -> SourceInfo:
        """Types and sizes as `features.json` has them; what it leaves open is looked up in an episode."""
        numbers = [leaf for leaf in self.features.steps if leaf.kind != "text" and not leaf.is_picture]
        pictures = [leaf for leaf in self.features.steps if leaf.is_picture]
        fields = {leaf.path: (leaf.dtype, leaf.shape) for leaf in numbers}
        images = {leaf.path: (leaf.shape[0], leaf.shape[1]) for leaf in pictures}
        texts = [leaf.path for leaf in (*self.features.steps, *self.features.episode) if leaf.kind == "text"]
        if any(-1 in leaf.shape for leaf in (*numbers, *pictures)):
            for key in self.keys()[:_TRIED]:
                try:
                    raw = self.read(key)
                except DataError:
                    continue  # whoever reads this episode is told; here only sizes are wanted
                fields |= {path: (str(values.dtype), values.shape[1:]) for path, values in raw.fields.items()}
                images |= {path: (frames.shape[1], frames.shape[2]) for path, frames in raw.images.items()}
                break
        return SourceInfo(None, fields, images, {**attributes, "texts": texts})


def _constant(lines: list[str]) -> str | list[str]:
    return lines[0] if len(set(lines)) == 1 else lines


def _instruction(texts: Mapping[str, list[str]], outer: Mapping[str, Any]) -> tuple[str, list[str]]:
    """The instruction of an episode, and those of all steps if they are not the same. The first that is not empty counts."""
    def rank(path: str) -> tuple[int, int]:
        return _INSTRUCTIONS.index(path.rpartition("/")[2]), path.count("/")

    for path in sorted((p for p in texts if p.rpartition("/")[2] in _INSTRUCTIONS), key=rank):
        lines = texts[path]
        said = [line for line in lines if line]
        if said:
            return said[0], lines if len(set(lines)) > 1 else []
    for path in sorted((p for p in outer if p.rpartition("/")[2] in _INSTRUCTIONS), key=rank):
        if isinstance(outer[path], str) and outer[path]:
            return outer[path], []
    return "", []


# --- files -----------------------------------------------------------------------------------------------------------


class _Split:
    def __init__(self, name: str, files: list[str], lengths: list[int]) -> None:
        self.name, self.files, self.lengths = name, files, lengths


def _versions(path: Path) -> list[Path]:
    """Folders with the files of TFDS: `path` itself, else those one or two levels below."""
    if not path.is_dir():
        return []
    for folders in ([path], sorted(path.glob("*/")), sorted(path.glob("*/*/"))):
        # not by dataset_info.json: Hugging Face's `save_to_disk` writes one of its own
        found = [f for f in folders if (f / FEATURES).is_file() or any(f.glob("*.tfrecord-*-of-*"))]
        found = [f for f in found if not f.name.startswith(("incomplete.", "."))]
        if found:
            return found
    return []


def _one_version(path: Path) -> Path:
    found = _versions(path)
    if len(found) == 1:
        return found[0]
    if found:
        raise DataError(path, found=f"{len(found)} datasets or versions: {[str(f.relative_to(path)) for f in found[:8]]}",
                        expected="one", fix=f"name one of them, for example {found[-1]}")  # fmt: skip
    raise DataError(path, found=f"no {FEATURES} or TFRecords in it or up to two folders below", expected="an RLDS dataset",
                    fix="point at the version folder, for example <name>/1.0.0")  # fmt: skip


def _json(path: Path, problems: list[tuple[str, str]]) -> dict[str, Any] | None:
    try:
        value = json.loads(path.read_text())
    except FileNotFoundError:
        problems.append((path.name, "missing"))
        return None
    except (OSError, ValueError) as error:
        problems.append((path.name, f"unreadable ({error})"))
        return None
    if not isinstance(value, dict):
        problems.append((path.name, "no JSON object"))
        return None
    return value


def _splits(described: Mapping[str, Any]) -> list[_Split]:
    """File names and record counts of every split. Counts are strings in JSON. Raises when something is missing."""
    splits = []
    for split in described["splits"]:
        form = described.get("fileFormat") or "tfrecord"
        if form != "tfrecord":
            raise ValueError(f"its files are {form}, only tfrecord is read")
        lengths = [int(length) for length in split.get("shardLengths", [])]
        shape = split.get("filepathTemplate") or TEMPLATE
        files = []
        for number in range(len(lengths)):
            index, of = f"{number:05d}", f"{len(lengths):05d}"
            names = {"DATASET": described["name"], "SPLIT": split["name"], "FILEFORMAT": form, "SHARD_INDEX": index,
                     "NUM_SHARDS": of, "SHARD_X_OF_Y": f"{index}-of-{of}"}  # fmt: skip
            name = re.sub(r"\{(\w+)\}", lambda match: names[match[1]], shape)  # noqa: B023
            if Path(name).name != name:
                raise ValueError(f"a file name template {shape!r} that leads out of the folder")
            files.append(name)
        splits.append(_Split(str(split["name"]), files, lengths))
    if not splits:
        raise ValueError("no splits")
    return splits


def _list_shards(root: Path, splits: list[_Split]) -> tuple[dict[str, Shard], list[DataError], int]:
    """Index every shard that is promised and there; name what is missing, cut off, of another length, or not promised.

    Last comes how many of the promised records were not found."""
    shards: dict[str, Shard] = {}
    damage: list[DataError] = []
    missing = 0
    present = {p.name for p in root.iterdir() if re.search(r"\.tfrecord(-|$)", p.name)}
    for split in splits:
        for number, (name, length) in enumerate(zip(split.files, split.lengths, strict=True)):
            if name not in present:
                missing += length
                damage.append(DataError(root / name, found="no such file", expected=f"a shard of {length} episodes, as {INFO} "
                                        f"says of split {split.name!r}", fix=RESTORE))  # fmt: skip
                continue
            shard = index_shard(root / name)
            shards[f"{split.name}/{number:05d}"] = shard
            missing += max(0, length - len(shard))
            if len(shard) == length:
                damage += shard.damage
                continue
            # What broke a shard off and how much that cost is one finding.
            broken = shard.damage[0] if shard.damage else None
            where, what = (broken.where, f"{broken.found}; ") if broken else (root / name, "")
            damage.append(DataError(where, found=f"{what}{len(shard)} whole records",
                                    expected=f"{length}, as shardLengths of split {split.name!r} in {INFO} says",
                                    fix=RESTORE))  # fmt: skip
    for name in sorted(present - {name for split in splits for name in split.files}):
        damage.append(DataError(root / name, found=f"a shard that no split of {INFO} names",
                                expected=f"only the shards that {INFO} counts",
                                fix=f"restore {INFO} of this version, or remove the file"))  # fmt: skip
    return shards, damage, missing
