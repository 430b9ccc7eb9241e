"""Reads an export folder: `export.json`, the files it vouches for, and ONNX graphs, each judged before it is believed.

Written by `vla export POLICY --to onnx` (`vla/export/folder.py`), read by a robot (`serve/edge.py`) and by who judges an export
(`vla/export/actor.py`). Needs numpy, and onnxruntime once a graph is opened; nothing else.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vla.durable import digest_of
from vla.errors import CheckpointError, DataError, MachineError, UsageError
from vla.images import ImagePreparation
from vla.normalize import Normalizer
from vla.prompt import PROMPTS

FORMAT = 1
_NEEDED = ("format", "embodiments", "normalizers", "image", "prompt", "chunk", "execute", "chunk_seconds", "action_dim",
           "state_dim", "state_token", "robots", "text", "files", "graphs", "runtime", "policy")  # fmt: skip
_AGAIN = "copy the whole folder again"


@dataclass(frozen=True)
class ExportFolder:
    """What an export folder says, understood."""

    path: Path
    meaning: Mapping[str, Any]
    """`export.json` as it is."""
    normalizers: Mapping[str, Mapping[str, Normalizer]]
    """Robot -> {"action", "state"}, in the order that numbers the robots."""
    image: ImagePreparation

    def graph(self, runtime: str) -> str:
        """The file of the policy's graph in `runtime` ("float32", "int8"); `UsageError` when there is none."""
        graphs = self.meaning["graphs"]["policy"]
        if runtime not in graphs:
            raise UsageError(f"{self.path}: runtime {runtime!r}", found="no such graph", expected=f"one of {sorted(graphs)}",
                             fix="leave it out, or export the policy with it (`vla export ... --int8`)")  # fmt: skip
        return graphs[runtime]

    def verify(self, names: Iterable[str] | None = None) -> int:
        """Compare files (default: all that are listed) with their sizes and sha256; returns the bytes read.

        Raises `CheckpointError` naming every file that is missing, cut short or altered.
        """
        files, problems, read = self.meaning["files"], [], 0
        for name in files if names is None else names:
            entry, path = files.get(name), self.path / name
            if entry is None:
                problems.append(f"{name}: not among the files export.json vouches for")
            elif not path.is_file():
                problems.append(f"{name}: missing")
            elif (size := path.stat().st_size) != entry["bytes"]:
                problems.append(f"{name}: {size:,} bytes, not {entry['bytes']:,}")
            else:
                read += size
                with open(path, "rb") as file:
                    if hashlib.file_digest(file, "sha256").hexdigest() != entry["sha256"]:
                        problems.append(f"{name}: other content (sha256) than was written")
        if problems:
            raise CheckpointError(self.path, found="; ".join(problems), expected="the files as they were exported", fix=_AGAIN)
        return read


def read_export(folder: str | Path) -> ExportFolder:
    """Read `export.json`. Raises `CheckpointError` when it is missing, broken, newer than this program, or incomplete."""
    path = Path(folder)
    file = path / "export.json"
    try:
        meaning = json.loads(file.read_bytes())
    except FileNotFoundError:
        raise CheckpointError(path, found="no export.json", expected="a folder made by `vla export POLICY --to onnx`",
                              fix="vla export POLICY --to onnx --out DIR: a policy folder is none yet") from None  # fmt: skip
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(file, found=f"{type(error).__name__}: {error}", expected="JSON", fix=_AGAIN) from error
    if not isinstance(meaning, dict):
        raise CheckpointError(file, found=type(meaning).__name__, expected="a JSON object", fix=_AGAIN)
    if isinstance(meaning.get("format"), int) and meaning["format"] > FORMAT:
        raise CheckpointError(file, found=f"format {meaning['format']}", expected=f"format {FORMAT}",
                              fix="pip install --no-deps -U tendon-vla: the folder was written by a newer version")  # fmt: skip
    if meaning.get("parts"):
        raise CheckpointError(file, found="parts of a teacher (vla export --parts)", expected="a whole policy",
                              fix="give an export made without --parts")  # fmt: skip
    if missing := [key for key in _NEEDED if key not in meaning]:
        raise CheckpointError(file, found=f"no {missing}", expected=f"keys {list(_NEEDED)}", fix=_AGAIN)
    if meaning.get("digest", digest := digest_of(meaning)) != digest:
        raise CheckpointError(file, found="another content than was written", expected="what `vla export` wrote",
                              fix=f"{_AGAIN}; export.json is not meant to be edited")  # fmt: skip
    return understand(path, meaning)


def understand(path: Path, meaning: Mapping[str, Any]) -> ExportFolder:
    """What `meaning` says of the folder `path`, before it is written there too. Raises `CheckpointError` where it is nonsense."""
    file = path / "export.json"
    try:
        return _understand(path, file, meaning)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(file, found=f"{type(error).__name__}: {error}", expected="what `vla export` wrote",
                              fix=f"{_AGAIN}; export.json is not meant to be edited") from error  # fmt: skip


def _understand(path: Path, file: Path, meaning: Mapping[str, Any]) -> ExportFolder:
    if meaning["format"] != FORMAT:
        raise ValueError(f"format {meaning['format']!r}")
    names = list(map(str, meaning["robots"]))
    if not names or set(names) != set(meaning["embodiments"]):
        raise ValueError(f"robots {names}, embodiments {sorted(meaning['embodiments'])}")
    normalizers, short = {}, []
    for name in names:
        entries = meaning["normalizers"].get(name, {})
        short += [f"{name}.{part}" for part in ("action", "state") if part not in entries]
        try:
            normalizers[name] = {p: Normalizer.from_json(e, f"{file}: normalizers.{name}.{p}") for p, e in entries.items()}
        except DataError as error:
            raise CheckpointError(error.where, found=error.found, expected=error.expected, fix=_AGAIN) from error
        for part in ("action", "state"):
            width = sum(len(channel["dims"]) for channel in meaning["embodiments"][name][part])
            known, room = normalizers[name].get(part), meaning[f"{part}_dim"]
            if known is not None and not known.dims == width <= room:
                raise ValueError(f"{part} of {name}: {width} dimensions, statistics of {known.dims}, room for {room}")
    if short:
        raise CheckpointError(file, found=f"no statistics of {', '.join(short)}",
                              expected="statistics of action and state of each robot",
                              fix="export the policy again; without them nobody knows what its actions mean")  # fmt: skip
    prompt, graphs = meaning["prompt"], meaning["graphs"]
    if PROMPTS.get(prompt["version"]) != prompt["template"]:
        raise CheckpointError(file, found=f"prompt {prompt['version']!r}: {prompt['template']!r}",
                              expected=f"{PROMPTS.get(prompt['version'])!r}, as this version of tendon-vla words it",
                              fix="pip install --no-deps -U tendon-vla: the folder was written by a newer version")  # fmt: skip
    for name in [*meaning["files"], graphs["sentence"], *graphs["policy"].values()]:
        if Path(name).name != name or "\\" in name or name in ("", ".", ".."):
            raise ValueError(f"{name!r} does not lie in the folder")
    if vague := [name for name, entry in meaning["files"].items() if not {"sha256", "bytes"} <= entry.keys()]:
        raise ValueError(f"no sha256 and bytes of {vague}")
    if not (meaning["chunk"] >= 1 and 1 <= meaning["execute"] <= meaning["chunk"]):
        raise ValueError(f"chunk {meaning['chunk']}, execute {meaning['execute']}")
    if (seconds := meaning["chunk_seconds"]) is not None and not float(seconds) > 0:
        raise ValueError(f"chunk_seconds {seconds}")
    if not (isinstance(meaning["runtime"]["graph"], str) and meaning["runtime"]["threads"] >= 1 <= meaning["text"]["vocab"]):
        raise ValueError(f"runtime {meaning['runtime']}, text {meaning['text']}")
    return ExportFolder(path, meaning, normalizers, ImagePreparation(**meaning["image"]))


class Graph:
    """An ONNX graph in onnxruntime, on the processor."""

    def __init__(
        self, path: Path, threads: int, inputs: Mapping[str, str], outputs: Iterable[str], optional: tuple[str, ...] = ()
    ) -> None:
        """`inputs`: name -> type ("uint8", "int64", "float"); the graph may leave out the `optional` ones.

        Raises `MachineError` where onnxruntime is missing or too old for the graph, `CheckpointError` for a graph that is
        damaged or another one than expected.
        """
        ort = load_onnxruntime(path.parent)
        options = ort.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
        options.log_severity_level = 3
        try:
            self.session: Any = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime's errors have a dozen classes that share no base but this
            raise _explain(path, error, ort.__version__) from error
        found = {i.name: i.type.removeprefix("tensor(").removesuffix(")") for i in self.session.get_inputs()}
        known = set(o.name for o in self.session.get_outputs())
        wrong = [f"input {name} is {found.get(name, 'missing')}" for name, kind in inputs.items()
                 if found.get(name) != kind and not (name in optional and name not in found)]  # fmt: skip
        wrong += [f"an input {name}" for name in found if name not in inputs]
        wrong += [f"no output {name}" for name in outputs if name not in known]
        if wrong:
            raise CheckpointError(path, found="; ".join(wrong),
                                  expected=f"inputs {dict(inputs)}, outputs {list(outputs)}", fix=_AGAIN)  # fmt: skip
        self.inputs, self.outputs = tuple(found), list(outputs)

    def __call__(self, **feeds: np.ndarray) -> list[np.ndarray]:
        """The outputs in the order asked for; feeds the graph has no input for are left out."""
        return self.session.run(self.outputs, {name: feeds[name] for name in self.inputs})


def load_onnxruntime(folder: Path) -> Any:
    """The package, or `MachineError` with the line that installs it."""
    try:
        import onnxruntime
    except ImportError as error:
        raise MachineError("onnxruntime", found=str(error), expected="the packages of the folder's requirements.txt",
                           fix=f"pip install -r {folder / 'requirements.txt'}") from error  # fmt: skip
    return onnxruntime


def _explain(path: Path, error: Exception, version: str) -> CheckpointError | MachineError:
    text = str(error).replace(str(path), path.name)  # a folder may be called anything, opset too
    said = " ".join(text.split())[-300:]  # what is wrong stands at the end, behind names of its own functions
    if any(sign in text.lower() for sign in ("opset", "ir version")):
        return MachineError(path, found=f"onnxruntime {version} says: {said}", expected="an onnxruntime that knows its opset",
                            fix=f"pip install -U -r {path.parent / 'requirements.txt'}, or export with --opset")  # fmt: skip
    return CheckpointError(path, found=f"onnxruntime {version} says: {said}", expected="a whole ONNX graph", fix=_AGAIN)
