"""RLDS datasets written by the real tensorflow-datasets, read by us and by TensorFlow, value for value.

    python benchmarks/foreign/rlds.py write --python ENV/bin/python --out foreign/rlds
    python benchmarks/foreign/rlds.py check --dir foreign/rlds
    python benchmarks/foreign/rlds.py time --python ENV/bin/python --dir foreign/rlds
    python benchmarks/foreign/rlds.py golden --python ENV/bin/python --out tests/golden/rlds

`ENV` is a virtual environment with `tensorflow-cpu==2.21.0 tensorflow-datasets==4.9.10` (the versions that wrote the files in
tests/golden/rlds); TensorFlow is never a dependency of ours. `write` makes three datasets of moving blobs: `wide` (every kind
of feature, several shards and splits), `fractal` and `bridge` (the feature trees of two Open X-Embodiment datasets). Beside
each lies `<name>.npz`: what TensorFlow itself reads back, JPEG with `dct_method="INTEGER_ACCURATE"`.

What must agree: everything, bit for bit. `check` also prints how far TensorFlow's default JPEG decoding is away. `time` reads
the same files with TensorFlow held to one thread and with us, in turns, and prints the ratio of processor time.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

NAMES = ("wide", "fractal", "bridge")
INSTRUCTIONS = ("put the spoon on the towel", "open the middle drawer", "déplace la tasse à gauche", "move it")


# --- inside the environment with TensorFlow --------------------------------------------------------------------------


def scene(rng: np.random.Generator, steps: int, height: int, width: int) -> np.ndarray:
    """(steps, height, width, 3) uint8: blobs moving over a gradient, smooth enough to be compressed like a photograph."""
    y, x = np.mgrid[0:1:height * 1j, 0:1:width * 1j]
    frames = np.empty((steps, height, width, 3))
    frames[:] = np.stack([x, y, 1 - x], -1) * 120 + 60
    for _ in range(3):
        start, speed, colour = rng.uniform(0.2, 0.8, 2), rng.normal(0, 0.01, 2), rng.uniform(-100, 100, 3)
        for t in range(steps):
            distance = (x - start[0] - t * speed[0]) ** 2 + (y - start[1] - t * speed[1]) ** 2
            frames[t] += np.exp(-distance / 0.01)[..., None] * colour
    return np.clip(frames + rng.normal(0, 2, frames.shape), 0, 255).astype(np.uint8)


def wide_features(F: Any, size: int) -> Any:
    return F.FeaturesDict({
        "steps": F.Dataset({
            "observation": F.FeaturesDict({
                "image": F.Image(shape=(size, size, 3), encoding_format="jpeg"),
                "wrist_image": F.Image(shape=(size, size, 3), encoding_format="png"),
                "any_size": F.Image(),
                "grey": F.Image(shape=(size, size, 1), encoding_format="png"),
                "depth": F.Image(shape=(size, size, 1), dtype=np.uint16, encoding_format="png"),
                "depth_metres": F.Image(shape=(size, size, 1), dtype=np.float32, encoding_format="png"),
                "state": F.Tensor(shape=(8,), dtype=np.float32),
                "joints": F.Tensor(shape=(2, 3), dtype=np.float64),
                "packed": F.Tensor(shape=(2, 3), dtype=np.float32, encoding="zlib"),
                "raw": F.Tensor(shape=(4,), dtype=np.uint16, encoding="bytes"),
                "sized": F.Tensor(shape=(None, None), dtype=np.int32, encoding="zlib"),
                "big": F.Scalar(dtype=np.uint64),
                "small": F.Tensor(shape=(5,), dtype=np.int8),
                "pairs": F.Sequence(F.Tensor(shape=(2,), dtype=np.float32)),
                "box": F.BBoxFeature(),
                "uneven": F.Sequence(np.float32),
            }),
            "action": F.Tensor(shape=(7,), dtype=np.float32),
            "terminate_episode": F.Tensor(shape=(3,), dtype=np.int32),
            "phase": F.ClassLabel(names=["reach", "grasp", "lift"]),
            "language_instruction": F.Text(),
            "note": F.Tensor(shape=(), dtype=np.str_),
            "discount": F.Scalar(dtype=np.float32), "reward": F.Scalar(dtype=np.float32),
            "is_first": np.bool_, "is_last": np.bool_, "is_terminal": np.bool_,
        }),
        "episode_metadata": F.FeaturesDict({"file_path": F.Text(), "episode_id": np.int64, "success": np.bool_,
                                            "offset": F.Tensor(shape=(3,), dtype=np.float32)}),
    })  # fmt: skip


def ends(t: int, steps: int, number: int) -> dict[str, Any]:
    """The flags of RLDS. Every third episode is cut off: last, but not terminal."""
    last, cut = t == steps - 1, number % 3 == 2
    return {"discount": np.float32(1), "reward": np.float32(last and not cut), "is_first": t == 0, "is_last": last,
            "is_terminal": last and not cut}  # fmt: skip


def wide_episode(number: int, steps: int, size: int, bounding_box: Any) -> dict[str, Any]:
    rng = np.random.default_rng(number)
    image, wrist, other = (scene(rng, steps, size, size) for _ in range(3))
    box = bounding_box(0.1, 0.2, 0.5, 0.6)
    rows = []
    for t in range(steps):
        flags = ends(t, steps, number)
        rows.append({
            "observation": {
                "image": image[t], "wrist_image": wrist[t], "any_size": other[t, :, : size // 2],
                "grey": other[t, ..., :1], "depth": wrist[t, ..., :1].astype(np.uint16) * 257,
                "depth_metres": (1 + np.tri(size)[..., None] * rng.random()).astype(np.float32),
                "state": rng.normal(0, 1, 8).astype(np.float32), "joints": rng.normal(0, 1, (2, 3)),
                "packed": rng.normal(0, 1, (2, 3)).astype(np.float32), "raw": rng.integers(0, 65536, 4, dtype=np.uint16),
                "sized": rng.integers(-9, 9, (3, 2), dtype=np.int32), "big": np.uint64(2**63 + 11 * t),
                "small": rng.integers(-128, 128, 5, dtype=np.int8), "pairs": rng.normal(0, 1, (3, 2)).astype(np.float32),
                "box": box, "uneven": np.arange(t % 3, dtype=np.float32),
            },
            "action": rng.normal(0, 1, 7).astype(np.float32),
            "terminate_episode": np.eye(3, dtype=np.int32)[0 if flags["is_terminal"] else 2 if flags["is_last"] else 1],
            "phase": t % 3, "note": f"step {t}",
            "language_instruction": INSTRUCTIONS[(number + (number == 1 and t >= steps // 2)) % len(INSTRUCTIONS)],
            **flags,
        })  # fmt: skip
    metadata = {"file_path": f"raw/{number}.hdf5", "episode_id": number, "success": number % 3 != 2}
    return {"steps": rows, "episode_metadata": {**metadata, "offset": np.full(3, number, np.float32)}}


def fractal_features(F: Any, size: int) -> Any:
    vector = {"world_vector": 3, "rotation_delta": 3, "gripper_closedness_action": 1, "base_displacement_vector": 2,
              "base_displacement_vertical_rotation": 1}  # fmt: skip
    state = {"base_pose_tool_reached": 7, "gripper_closed": 1, "gripper_closedness_commanded": 1, "height_to_bottom": 1,
             "natural_language_embedding": 512, "orientation_box": (2, 3), "orientation_start": 4, "vector_to_go": 3,
             "src_rotation": 4, "robot_orientation_positions_box": (3, 3), "workspace_bounds": (3, 3)}  # fmt: skip
    floats = {name: F.Tensor(shape=n if isinstance(n, tuple) else (n,), dtype=np.float32)
              for name, n in (vector | state).items()}  # fmt: skip
    return F.FeaturesDict({
        "aspects": {"already_success": np.bool_, "feasible": np.bool_, "success": np.bool_, "undesirable": np.bool_},
        "attributes": {"collection_mode": np.int64, "data_type": np.int64, "task_family": np.int64},
        "steps": F.Dataset({
            "action": {**{n: floats[n] for n in vector}, "terminate_episode": F.Tensor(shape=(3,), dtype=np.int32)},
            "observation": {**{n: floats[n] for n in state}, "natural_language_instruction": F.Text(),
                            "image": F.Image(shape=(size * 4 // 5, size, 3), encoding_format="jpeg")},
            "is_first": np.bool_, "is_last": np.bool_, "is_terminal": np.bool_, "reward": F.Scalar(dtype=np.float32),
        }),
    })  # fmt: skip


def bridge_features(F: Any, size: int) -> Any:
    return F.FeaturesDict({
        "steps": F.Dataset({
            "observation": {**{f"image_{n}": F.Image(shape=(size, size, 3), encoding_format="jpeg") for n in range(4)},
                            "state": F.Tensor(shape=(7,), dtype=np.float32)},
            "action": F.Tensor(shape=(7,), dtype=np.float32), "language_instruction": F.Text(),
            "language_embedding": F.Tensor(shape=(512,), dtype=np.float32),
            "discount": F.Scalar(dtype=np.float32), "reward": F.Scalar(dtype=np.float32),
            "is_first": np.bool_, "is_last": np.bool_, "is_terminal": np.bool_,
        }),
        "episode_metadata": {"episode_id": np.int32, "file_path": F.Text(), "has_language": np.bool_,
                             **{f"has_image_{n}": np.bool_ for n in range(4)}},
    })  # fmt: skip


def filled(feature: Any, rng: np.random.Generator, text: str) -> Any:
    """Random values for any tree of numbers and one text."""
    if hasattr(feature, "items"):
        return {name: filled(child, rng, text) for name, child in feature.items()}
    if feature.np_dtype == np.bool_:
        return bool(rng.integers(2))
    if feature.np_dtype in (np.int32, np.int64):
        return rng.integers(0, 9, feature.shape, dtype=feature.np_dtype)
    if feature.np_dtype == np.float32:
        return rng.normal(0, 1, feature.shape).astype(np.float32)
    return text


def other_episode(features: Any, number: int, steps: int) -> dict[str, Any]:
    rng = np.random.default_rng(number)
    tree, text = features["steps"].feature, INSTRUCTIONS[number % len(INSTRUCTIONS)]
    pictures = {name: scene(rng, steps, *child.shape[:2]) for name, child in tree["observation"].items() if "image" in name}
    rows = []
    for t in range(steps):
        row = filled({name: child for name, child in tree.items() if name != "observation"}, rng, text) | ends(t, steps, number)
        rest = {name: child for name, child in tree["observation"].items() if name not in pictures}
        row["observation"] = filled(rest, rng, text) | {name: frames[t] for name, frames in pictures.items()}
        rows.append({name: row[name] for name in tree.keys()})
    return {"steps": rows, **filled({n: f for n, f in features.items() if n != "steps"}, rng, f"raw/{number}")}


def write_dataset(name: str, out: Path, size: int, episodes: int, steps: int, shards: int) -> None:
    """Write with tensorflow-datasets, read back with TensorFlow, keep what it read in `<name>.npz`."""
    os.environ["CUDA_VISIBLE_DEVICES"] = "-1"
    import tensorflow_datasets as tfds

    features = {"wide": wide_features, "fractal": fractal_features, "bridge": bridge_features}[name](tfds.features, size)

    wide = name == "wide"

    def episode(number: int) -> dict[str, Any]:
        length = steps + number % 3
        return wide_episode(number, length, size, tfds.features.BBox) if wide else other_episode(features, number, length)

    def generate(numbers: range) -> Any:
        return ((str(n), episode(n)) for n in numbers)

    class Dataset(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")
        name = "wide"

        def _info(self) -> Any:
            return tfds.core.DatasetInfo(builder=self, features=features, description="By benchmarks/foreign/rlds.py.")

        def _split_generators(self, dl_manager: Any) -> Any:
            return {"train": generate(range(episodes)), "val": generate(range(1000, 1000 + shards))}

        def _generate_examples(self) -> Any:
            raise AssertionError("the splits bring their own generators")  # abstract in TFDS, and never asked here

    Dataset.name = name
    shutil.rmtree(out / name, ignore_errors=True)
    builder = Dataset(data_dir=str(out))
    builder.download_and_prepare(download_config=tfds.download.DownloadConfig(num_shards=shards))
    read_back(out, name)


def read_back(out: Path, name: str) -> None:
    """Every value as TensorFlow reads it into `<name>.npz`: `<split>/<path>` of all steps, `<split>//<path>` of all episodes."""
    import tensorflow as tf
    import tensorflow_datasets as tfds

    builder = tfds.builder_from_directory(str(out / name / "1.0.0"))
    seen = builder.info.features["steps"].feature["observation"].items()
    jpeg = [n for n, f in seen if isinstance(f, tfds.features.Image) and f.encoding_format == "jpeg"]
    skip = {"steps": {"observation": {n: tfds.decode.SkipDecoding() for n in jpeg}}}
    values: dict[str, np.ndarray] = {}
    farthest = 0
    for split in builder.info.splits:
        config = tfds.ReadConfig(interleave_cycle_length=1, try_autocache=False)
        data = builder.as_dataset(split=split, shuffle_files=False, decoders=skip, read_config=config)
        lengths: list[int] = []
        steps: dict[str, list[np.ndarray]] = {}
        for episode in data:
            lengths.append(0)
            for step in episode["steps"]:
                lengths[-1] += 1
                for path, value in leaves(step):
                    if path.removeprefix("observation/") in jpeg:
                        exact = tf.io.decode_jpeg(value, channels=3, dct_method="INTEGER_ACCURATE").numpy().astype(int)
                        default = tf.io.decode_jpeg(value, channels=3).numpy()
                        farthest = max(farthest, int(np.abs(exact - default).max()))
                        value = exact.astype(np.uint8)
                    steps.setdefault(path, []).append(np.asarray(value))
            for path, value in leaves({n: v for n, v in episode.items() if n != "steps"}):
                steps.setdefault(f"/{path}", []).append(np.asarray(value))
        for path, rows in steps.items():
            if rows[0].dtype == object or rows[0].dtype.kind == "S":
                values[f"{split}/{path}"] = np.array([row.item().decode() for row in rows])
            elif len({row.shape for row in rows}) == 1:  # rows of uneven length have no array
                values[f"{split}/{path}"] = np.stack(rows)
        values[f"{split}/lengths"] = np.array(lengths)
    values["jpeg_default_differs_by"] = np.array(farthest)
    values["versions"] = np.array([f"tensorflow {tf.__version__}", f"tensorflow-datasets {tfds.__version__}"])
    np.savez_compressed(out / f"{name}.npz", **values)


def leaves(tree: Any, path: str = "") -> Any:
    if isinstance(tree, dict):
        for name, child in tree.items():
            yield from leaves(child, f"{path}/{name}" if path else name)
    else:
        yield path, tree.numpy()


def time_tensorflow(folder: Path) -> float:
    """Processor seconds in which TensorFlow, on one thread, reads and decodes every episode."""
    os.environ["CUDA_VISIBLE_DEVICES"] = "-1"
    import tensorflow as tf
    import tensorflow_datasets as tfds

    tf.config.threading.set_intra_op_parallelism_threads(1)
    tf.config.threading.set_inter_op_parallelism_threads(1)
    options = tf.data.Options()
    options.threading.private_threadpool_size = 1
    options.threading.max_intra_op_parallelism = 1
    options.autotune.enabled = False
    config = tfds.ReadConfig(interleave_cycle_length=1, try_autocache=False, options=options, num_parallel_calls_for_decode=1,
                             num_parallel_calls_for_interleave_files=1)  # fmt: skip
    builder = tfds.builder_from_directory(str(folder))
    data = builder.as_dataset(split="train", shuffle_files=False, read_config=config)

    def whole(episode: Any) -> Any:  # all steps as one batch: the quickest way to have an episode in memory
        return episode["steps"].batch(100_000).get_single_element()

    data = data.map(whole).with_options(options)
    for _ in data:
        pass
    start = time.process_time()  # of all threads; other processes do not count
    for _ in data:
        pass
    return time.process_time() - start


# --- in our environment ----------------------------------------------------------------------------------------------


def compare(folder: Path, reference: Path) -> dict[str, Any]:
    """Every value of the dataset against what TensorFlow read. Raises `AssertionError` at the first difference."""
    from data_tools.sources import open_source

    source = open_source(folder)
    known = np.load(reference)
    counted = {"episodes": 0, "fields": 0, "pictures": 0, "texts": 0}
    seen, left_out, position = set(), set(), {}
    assert not source.damage, source.damage
    for key in source.keys():
        split = key.partition("/")[0]
        number, first = position.get(split, (0, 0))
        raw = source.read(key)
        last = first + len(raw)
        assert len(raw) == known[f"{split}/lengths"][number], key
        position[split] = number + 1, last
        for kind, arrays in (("fields", raw.fields), ("pictures", raw.images)):
            for path, array in arrays.items():
                wanted = known[f"{split}/{path}"][first:last]
                assert array.dtype == wanted.dtype and array.shape == wanted.shape, (path, array.dtype, wanted.dtype, array.shape)
                assert array.tobytes() == wanted.tobytes(), f"{key} {path} differs"
                counted[kind] += len(array) if kind == "pictures" else array.size
                seen.add(f"{split}/{path}")
        for path, text in raw.attributes["texts"].items():
            lines = [text] * len(raw) if isinstance(text, str) else text
            assert lines == known[f"{split}/{path}"][first:last].tolist(), f"{key} {path} differs"
            counted["texts"] += len(lines)
            seen.add(f"{split}/{path}")
        for path, value in raw.attributes["episode"].items():
            assert np.array_equal(value, known[f"{split}//{path}"][number]), f"{key} {path} differs"
            seen.add(f"{split}//{path}")
        assert raw.instruction
        left_out |= set(raw.attributes.get("unread", {}))
        counted["episodes"] += 1
    assert all(number == len(known[f"{split}/lengths"]) for split, (number, _) in position.items()), position
    missed = set(known.files) - seen - {"jpeg_default_differs_by", "versions"} - {f"{split}/lengths" for split in position}
    assert not missed, f"TensorFlow reads values that we do not: {sorted(missed)[:5]}"
    return {**counted, "left_out": sorted(left_out), "jpeg_default_differs_by": int(known["jpeg_default_differs_by"]),
            "written_by": known["versions"].tolist()}  # fmt: skip


def time_ours(folder: Path) -> tuple[float, int, int]:
    """Processor seconds, episodes and bytes of reading every training episode."""
    from data_tools.sources import open_source

    source = open_source(folder)
    keys = [key for key in source.keys() if key.startswith("train/")]
    start = time.process_time()
    for key in keys:
        source.read(key)
    spent = time.process_time() - start
    return spent, len(keys), sum(path.stat().st_size for path in folder.glob("*-train.tfrecord-*"))


def inside(python: str, *arguments: object) -> str:
    """Run one of this file's own modes in the environment with TensorFlow; its last line."""
    environment = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([python, __file__, *map(str, arguments)], env=environment, text=True, stdout=subprocess.PIPE)
    if done.returncode:
        sys.exit(f"{python} {' '.join(map(str, arguments))} failed")
    return done.stdout.strip().rpartition("\n")[2]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("mode", choices=["write", "check", "time", "golden", "_write", "_time"])
    parser.add_argument("--python", help="the environment with tensorflow-datasets")
    parser.add_argument("--out", "--dir", dest="out", type=Path, required=True)
    parser.add_argument("--name", choices=NAMES, action="append")
    parser.add_argument("--size", type=int, default=128, help="width of the pictures")
    parser.add_argument("--episodes", type=int, default=12)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--shards", type=int, default=3)
    args = parser.parse_args()
    names = args.name or NAMES
    numbers = ["--size", args.size, "--episodes", args.episodes, "--steps", args.steps, "--shards", args.shards]
    if args.mode == "_write":
        write_dataset(names[0], args.out, args.size, args.episodes, args.steps, args.shards)
    elif args.mode == "_time":
        print(time_tensorflow(args.out))
    elif args.mode == "write":
        for name in names:
            inside(args.python, "_write", "--out", args.out, "--name", name, *numbers)
            print(f"{args.out / name}: {sum(p.stat().st_size for p in (args.out / name).rglob('*') if p.is_file()) / 1e6:.1f} MB")
    elif args.mode == "golden":
        tiny = ["--size", 16, "--episodes", 3, "--steps", 2, "--shards", 2]
        inside(args.python, "_write", "--out", args.out, "--name", "wide", *tiny)
    elif args.mode == "check":
        for name in names:
            print(name, json.dumps(compare(args.out / name / "1.0.0", args.out / f"{name}.npz")))
    else:
        for name in args.name or NAMES[1:]:  # `wide` has rows of uneven length, which TensorFlow cannot batch
            folder, theirs, ours = args.out / name / "1.0.0", [], []
            for _ in range(3):
                theirs.append(float(inside(args.python, "_time", "--out", folder)))
                seconds, episodes, size = time_ours(folder)
                ours.append(seconds)
            print(f"{name}: {episodes / min(ours):.1f} episodes, {size / min(ours) / 1e6:.1f} MB of files per processor second; "
                  f"TensorFlow needs {min(theirs) / min(ours):.2f} times as many seconds (best of 3 in turns)")  # fmt: skip


if __name__ == "__main__":
    main()
