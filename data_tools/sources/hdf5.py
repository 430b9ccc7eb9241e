"""HDF5 datasets in the LIBERO, robomimic and ALOHA layouts, read one episode at a time.

    source = Hdf5Source.open("downloads/libero_spatial")     # a folder of files, or one file
    raw = source.read("pick_up_the_black_bowl_demo.hdf5:demo_0")

Values stay as the file holds them: dtypes kept, pictures RGB but not turned. What has to be done to them is said in
`info.attributes`: `pairing` (`observation_before_action` or `observation_after_action`), `image_orientation`
(`upright` or `bottom_up`), `left_out` (arrays that are no per-step numbers, and why), `masks` (robomimic's filter lists:
name -> keys), `mask_strangers` (list -> how many names it holds of demonstrations that are in no file), `env_args`.
Nothing but metadata is read on opening; `read` opens the file, reads one episode, closes it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from data_tools.sources import RawEpisode, SourceInfo
from data_tools.sources.hdf5_layouts import (
    FileFacts,
    check_lengths,
    contradicts_pairing,
    episode_attributes,
    natural,
    read_facts,
)
from data_tools.sources.hdf5_reading import jpeg_size, load_h5py, members, named, opened, read_array, read_jpegs
from vla.errors import DataError

SUFFIXES = (".hdf5", ".h5")
_ACTION = {"aloha": "action", "libero": "actions", "robomimic": "actions"}
_PER_STEP = ("action", "base_action", "actions", "states", "robot_states", "rewards", "dones", "obs/", "next_obs/",
             "action_dict/", "observations/")  # fmt: skip
"""Paths that hold one row per step by the layout's definition: another length there is damage, elsewhere not."""
_SIMULATOR = "states"
"""The whole simulator's state: as wide as the scene has joints, so it differs between the tasks of one dataset."""
_REPAIR = "fetch or record this file again, or leave this episode out"


@dataclass
class _Schema:
    """What one episode's group holds, by its metadata alone."""

    steps: int
    fields: dict[str, tuple[str, tuple[int, ...]]] = field(default_factory=dict)
    images: dict[str, tuple[int, int]] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    problems: list[DataError] = field(default_factory=list)

    @property
    def form(self) -> frozenset[str]:
        """What episodes of one dataset have in common."""
        fields = {f"{path} {dtype}{list(shape)}" for path, (dtype, shape) in self.fields.items() if path != _SIMULATOR}
        return frozenset(fields | {f"{path} {h}x{w}" for path, (h, w) in self.images.items()})


class Hdf5Source:
    """A `Source` (see `data_tools.sources`) over one HDF5 file or a folder of them, all of one layout.

    Keys are `<file below the folder>:<demo>`, for ALOHA `<file>`; files and demos in numeric order.
    """

    missing = 0

    def __init__(self, root: Path, kind: str, info: SourceInfo, facts: dict[str, FileFacts], damage: list[DataError]) -> None:
        self.root, self.kind, self.info, self.damage = root, kind, info, damage
        self._instructions = {name: f.instruction for name, f in facts.items()}
        self._pairing = {name: f.attributes["pairing"] for name, f in facts.items()}
        self._episodes = {_key(name, demo): (name, demo) for name, f in facts.items() for demo in f.demos}
        self._masks: dict[str, list[str]] = {}
        for mask, keys in info.attributes.get("masks", {}).items():
            for key in keys:
                self._masks.setdefault(key, []).append(mask)

    @staticmethod
    def recognises(path: Path) -> bool:
        """Is `path` an HDF5 file, or a folder that holds some (up to two levels down)? By name alone."""
        try:
            return path.suffix in SUFFIXES if path.is_file() else bool(_files(path))
        except OSError:
            return False

    @classmethod
    def open(cls, path: str | Path) -> Hdf5Source:
        """List the episodes at `path`. Files that cannot be listed go to `damage`.

        Raises `MachineError` without h5py, `DataError` when no file can be listed or the files are not one dataset
        (other layouts, fields, control rates or robots).
        """
        path = Path(path)
        load_h5py()
        names = [path.name] if path.is_file() else _files(path)
        if not names:
            raise DataError(path, found="no .hdf5 or .h5 file", expected="HDF5 files, at most two folders down",
                            fix="point at the folder that holds them")  # fmt: skip
        facts: dict[str, FileFacts] = {}
        schemas: dict[str, _Schema] = {}
        damage: list[DataError] = []
        for name in names:
            file_path = path if path.is_file() else path / name
            try:
                with opened(file_path) as file:
                    found = read_facts(file, str(file_path), Path(name).stem)
                    schemas[name] = _describe_file(file, found, str(file_path))
            except DataError as error:
                damage.append(error)
                continue
            facts[name] = found
            damage += found.problems
        if not facts:
            raise together(str(path), damage)
        info = _info(facts, _common_form(path, facts, schemas))
        return cls(path, next(iter(facts.values())).kind, info, facts, damage)

    def keys(self) -> list[str]:
        """One key per episode, files and demonstrations in numeric order."""
        return list(self._episodes)

    def read(self, key: str, only: Collection[str] | None = None) -> RawEpisode:
        """One episode; of its fields and pictures `only` those named, when given.

        Raises `DataError` naming file, episode and field(s), all problems at once: arrays of different lengths, a field
        that is missing or of another shape or dtype than elsewhere, values that cannot be read or were never written, a
        broken JPEG, a LIBERO episode whose pairing is not the one its file is taken for.
        """
        if key not in self._episodes:
            raise DataError(f"{self.root} {key}", found="no such episode", expected=f"one of {self.keys()[:3]} ...",
                            fix="use a key that keys() lists")  # fmt: skip
        name, demo = self._episodes[key]
        path = self.root if self.root.is_file() else self.root / name
        where = f"{path} {demo}".rstrip()
        with opened(path) as file:
            with named(where):
                group = file[f"data/{demo}"] if demo else file
            attributes, instruction = episode_attributes(group, where)
            schema = _describe(group, self.kind, where)
            problems = [*schema.problems, *self._differences(schema, where), *_miscounted(attributes, schema, where)]
            fields, images = self._arrays(file, group, schema, where, only, problems)
            if not problems and self.kind == "libero":
                problems += self._wrong_pairing(group, name, where)
        if problems:
            raise together(where, problems)
        attributes |= {"masks": self._masks.get(key, []), "left_out": schema.left_out}
        return RawEpisode(fields, images, instruction or self._instructions[name], where, key, attributes)

    def _arrays(
        self, file: Any, group: Any, schema: _Schema, where: str, only: Collection[str] | None, problems: list[DataError],
    ) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:  # fmt: skip
        fields: dict[str, np.ndarray] = {}
        images: dict[str, np.ndarray] = {}
        lengths: dict[str, np.ndarray] = {}
        for path in [*self.info.fields, *self.info.images]:
            if path not in schema.fields and path not in schema.images or (only is not None and path not in only):
                continue
            at = f"{where} {path}"
            try:
                with named(at):
                    dataset = group[path]
                if path in schema.fields:
                    fields[path] = read_array(dataset, at)
                elif dataset.ndim == 2:
                    images[path], lengths[path] = read_jpegs(dataset, at, swap=True)
                else:
                    images[path] = read_array(dataset, at)
            except DataError as error:
                problems.append(error)
        if lengths and (wrong := check_lengths(file, lengths, where)):
            problems.append(wrong)
        for path, frames in images.items():
            if frames.shape[1:3] != self.info.images[path]:
                size = f"{self.info.images[path]} as elsewhere"
                problems.append(_problem(f"{where} {path}", f"pictures of {frames.shape[1:3]}", size))
        return fields, images

    def _differences(self, schema: _Schema, where: str) -> list[DataError]:
        """What this episode lacks of the dataset's fields, or holds in another form. More than them is named as left out."""
        problems = []
        accused = {problem.where for problem in schema.problems}  # each of them is told once
        for path, expected in self.info.fields.items():
            if f"{where} {path}" not in accused and (found := schema.fields.get(path)) != expected:
                words = f"{found[0]} {found[1]} per step" if found else schema.left_out.get(path, "no such field")
                problems.append(_problem(f"{where} {path}", words, f"{expected[0]} {expected[1]} per step"))
        for path in self.info.images:
            if f"{where} {path}" not in accused and path not in schema.images:
                words = schema.left_out.get(path, "no such camera")
                problems.append(_problem(f"{where} {path}", words, "one picture per step"))
        known = {*self.info.fields, *self.info.images}
        known_reasons = self.info.attributes["left_out"]
        for path in [p for p in (*schema.fields, *schema.images) if p not in known]:
            schema.left_out[path] = known_reasons.get(path, "not in the dataset's other episodes")
        return problems

    def _wrong_pairing(self, group: Any, name: str, where: str) -> list[DataError]:
        paths = ("obs/joint_states", _SIMULATOR)
        if not all(path in group for path in paths):
            return []
        joints, states = (read_array(group[path], f"{where} {path}") for path in paths)
        evidence = contradicts_pairing(joints, states, self._pairing[name])
        if evidence is None:
            return []
        return [DataError(f"{where} obs", found=evidence, expected=self._pairing[name].replace("_", " "),
                          fix="find out which tool wrote this file; LIBERO's own carry `problem_info` on data")]  # fmt: skip


def together(where: str, problems: Iterable[DataError]) -> DataError:
    """Several problems as one error; a single one as it is."""
    problems = list(problems)
    if len(problems) == 1:
        return problems[0]
    lines = [f"\n    {p.where.removeprefix(where).strip() or where}: {p.found} (expected {p.expected})" for p in problems]
    found = "".join(lines)
    return DataError(where, found=f"{len(problems)} problems{found}", expected="a whole dataset", fix=problems[0].fix)


def _problem(where: str, found: str, expected: str) -> DataError:
    return DataError(where, found=found, expected=expected, fix=_REPAIR)


def _key(name: str, demo: str) -> str:
    return f"{name}:{demo}" if demo else name


def _files(folder: Path) -> list[str]:
    patterns = [f"{depth}*{suffix}" for depth in ("", "*/", "*/*/") for suffix in SUFFIXES]
    return sorted({p.relative_to(folder).as_posix() for pattern in patterns for p in folder.glob(pattern)}, key=natural)


def _describe_file(file: Any, facts: FileFacts, where: str) -> _Schema:
    """The form of the file's episodes, by at most five of them: the most frequent one, the fuller one of equals.

    Not the first one's: one demonstration that lost a camera must not put all the others in the wrong.
    """
    n = len(facts.demos)
    chosen = [facts.demos[i] for i in sorted({i * (n - 1) // 4 for i in range(5)})]
    found = [_describe(file[f"data/{d}"] if d else file, facts.kind, f"{where} {d}".rstrip()) for d in chosen]
    whole = [schema for schema in found if not schema.problems] or found
    forms = [schema.form for schema in whole]
    return max(whole, key=lambda s: (forms.count(s.form), len(s.fields) + len(s.images)))


def _describe(group: Any, kind: str, where: str) -> _Schema:
    problems: list[DataError] = []
    datasets = dict(members(group, where, problems))
    action = datasets.get(_ACTION[kind])
    counts = [len(d) for d in datasets.values() if d.ndim]
    steps = len(action) if action is not None and action.ndim else max(counts, key=counts.count, default=0)
    schema = _Schema(steps, problems=problems)
    if action is None and not any(p.where.endswith(f" {_ACTION[kind]}") for p in problems):
        schema.problems.append(_problem(f"{where} {_ACTION[kind]}", "no actions", "one row per step"))
    elif action is not None and schema.steps == 0:
        schema.problems.append(_problem(f"{where} {_ACTION[kind]}", "an episode of 0 steps", "at least 1 step"))
    for path, dataset in datasets.items():
        try:
            _place(schema, path, dataset, kind, f"{where} {path}")
        except DataError as error:
            schema.problems.append(error)
    return schema


def _place(schema: _Schema, path: str, dataset: Any, kind: str, where: str) -> None:
    """Enter one dataset as a field, as pictures, or among what is left out and why."""
    with named(where):
        shape: tuple[int, ...] = tuple(map(int, dataset.shape))
        ndim, dtype = len(shape), dataset.dtype
    picture = dtype == np.uint8 and ndim == 4 and shape[-1] == 3
    jpeg = kind == "aloha" and path.startswith("observations/images/") and dtype == np.uint8 and ndim == 2
    if path == "compress_len" and kind == "aloha":
        schema.left_out[path] = "lengths of the JPEGs; the pictures are held against them"
    elif picture and path.startswith("next_obs/"):
        schema.left_out[path] = "pictures stored twice: next_obs at t is obs at t + 1"
    elif dtype.kind not in "biuf":
        schema.left_out[path] = f"not numbers ({dtype})"
    elif ndim == 0 or (shape[0] != schema.steps and not path.startswith(_PER_STEP)):
        schema.left_out[path] = f"not one row per step (shape {list(shape)}, {schema.steps} steps)"
    elif not (picture or jpeg or ndim <= 2):
        schema.left_out[path] = f"neither numbers per step nor RGB pictures ({dtype} {list(shape)})"
    elif shape[0] != schema.steps:
        schema.problems.append(_problem(where, f"{shape[0]} rows", f"{schema.steps}, one per action"))
    elif picture:
        schema.images[path] = (shape[1], shape[2])
    elif jpeg:
        schema.images[path] = jpeg_size(dataset, where)
    else:
        schema.fields[path] = (str(dtype), shape[1:])


def _miscounted(attributes: dict[str, Any], schema: _Schema, where: str) -> list[DataError]:
    told = attributes.get("num_samples")
    if told is None or told == schema.steps:
        return []
    return [_problem(f"{where} @num_samples", f"{schema.steps} actions", f"{told}, as the file says")]


def _common_form(root: Path, facts: dict[str, FileFacts], schemas: dict[str, _Schema]) -> _Schema:
    """The form of the dataset's episodes. Raises `DataError` when the files are not one dataset.

    Layout, pairing, orientation, rate and robot have to be equal. Of several forms the one that more than half of the
    files have is the dataset's; `read` refuses the others' episodes one by one.
    """
    whole = {name: schema for name, schema in schemas.items() if not schema.problems} or schemas
    groups: dict[str, list[str]] = {}
    for name in whole:
        groups.setdefault(repr(_identity(facts[name])), []).append(name)
    if len(groups) == 1:
        forms: dict[frozenset[str], list[str]] = {}
        for name, schema in whole.items():
            forms.setdefault(schema.form, []).append(name)
        largest = max(forms.values(), key=len)
        if 2 * len(largest) > len(whole):
            common = whole[largest[0]]
            if len({schema.fields.get(_SIMULATOR) for schema in whole.values()}) > 1:
                common.fields.pop(_SIMULATOR, None)
                common.left_out[_SIMULATOR] = "the simulator's whole state, of another width in other files"
            return common
        groups = {str(sorted(form)): names for form, names in forms.items()}
    first, *others = groups.values()
    unlike = "; ".join(_unlike(facts, schemas, first[0], names) for names in others)
    raise DataError(root, found=f"{len(first)} like {first[0]}, unlike them {unlike}",
                    expected="files of one dataset: one layout, form, control rate and robot",
                    fix=f"read them apart, e.g. vla data convert {root / first[0]} OUT")  # fmt: skip


def _identity(facts: FileFacts) -> dict[str, Any]:
    return {"layout": facts.kind, **{k: facts.attributes[k] for k in ("pairing", "image_orientation")}, **facts.agree}


def _unlike(facts: dict[str, FileFacts], schemas: dict[str, _Schema], one: str, others: list[str]) -> str:
    mine, theirs = _identity(facts[one]), _identity(facts[others[0]])
    words = [key for key in {**mine, **theirs} if mine.get(key) != theirs.get(key)]
    words += sorted(schemas[one].form ^ schemas[others[0]].form)[:4]
    return f"{others[0]}{f' and {len(others) - 1} more' if others[1:] else ''} (other {', '.join(words)})"


def _info(facts: dict[str, FileFacts], schema: _Schema) -> SourceInfo:
    first = next(iter(facts.values()))
    attributes = {k: v for k, v in first.attributes.items() if k not in ("num_demos", "total", "problem_info", "bddl_file_name")}
    masks: dict[str, list[str]] = {}
    strangers: dict[str, int] = {}
    for name, found in facts.items():
        for mask, demos in found.masks.items():
            masks.setdefault(mask, []).extend(_key(name, demo) for demo in demos)
        for mask, count in found.strangers.items():
            strangers[mask] = strangers.get(mask, 0) + count
    attributes |= {"layout": first.kind, "files": len(facts), "masks": masks, "mask_strangers": strangers,
                   "left_out": schema.left_out}  # fmt: skip
    if any(f.instruction for f in facts.values()):
        attributes["instructions"] = {name: f.instruction for name, f in facts.items()}
    return SourceInfo(first.fps, schema.fields, schema.images, attributes)
