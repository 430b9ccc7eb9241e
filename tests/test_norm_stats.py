"""OpenVLA's and openpi's statistics: golden numbers, both ways, keys chosen readably, broken files named; the named mixtures."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import yaml

from data_tools.norm_stats import DatasetStats, read_all_norm_stats, read_norm_stats, write_norm_stats
from vla.config import CONFIGS
from vla.errors import DataError, UsageError
from vla.normalize import Normalizer, Stats

# bridge_orig as openvla-7b's config.json and other public files have it.
Q01 = [-0.02872725307941437, -0.04170349963009357, -0.026093858778476715, -0.08092105075716972, -0.09288699507713317,
       -0.20718276381492615, 0.0]  # fmt: skip
Q99 = [0.028309678435325586, 0.040855254605412394, 0.040161586627364146, 0.08192047759890528, 0.07792850524187081,
       0.20382574498653397, 1.0]  # fmt: skip
MASK = [True] * 6 + [False]

NAMES = """austin_buds_dataset_converted_externally_to_rlds austin_sailor_dataset_converted_externally_to_rlds
austin_sirius_dataset_converted_externally_to_rlds bc_z berkeley_autolab_ur5 berkeley_cable_routing berkeley_fanuc_manipulation
bridge_orig cmu_stretch dlr_edan_shared_control_converted_externally_to_rlds dobbe fmb_dataset fractal20220817_data
furniture_bench_dataset_converted_externally_to_rlds iamlab_cmu_pickup_insert_converted_externally_to_rlds jaco_play kuka
nyu_franka_play_dataset_converted_externally_to_rlds roboturk stanford_hydra_dataset_converted_externally_to_rlds taco_play toto
ucsd_kitchen_dataset_converted_externally_to_rlds utaustin_mutex viola""".split()
"""The 25 keys of openvla-7b's norm_stats."""


def entry(**action: object) -> dict:
    values = {"mean": [0.0] * 7, "std": [0.1] * 7, "max": [1.0] * 7, "min": [-1.0] * 7, "q01": Q01, "q99": Q99, "mask": MASK}
    zeros = {k: [0.0] * 7 for k in values if k != "mask"}
    return {"action": values | action, "proprio": zeros, "num_transitions": 2135463, "num_trajectories": 60064}


def put(path: Path, content: object) -> Path:
    path.write_text(json.dumps(content))
    return path


def stats(width: int = 7, seed: int = 0) -> Stats:
    return Stats.of(np.random.default_rng(seed).normal(size=(500, width)))


def test_bridge_of_a_base_checkpoint_normalises_as_openvla_does(tmp_path):
    put(tmp_path / "config.json", {"model_type": "openvla", "norm_stats": {"bridge_orig": entry(), "kuka": entry()}})
    read = read_norm_stats(tmp_path, "bridge_orig")
    assert read.action.values["q01"].tolist() == Q01 and read.action.values["q99"].tolist() == Q99
    assert read.mask is not None and read.mask.tolist() == MASK
    assert (read.num_transitions, read.num_trajectories, read.action.count) == (2135463, 60064, 2135463)
    assert read.state is None, "a proprio block of zeros means that none was loaded"
    normalizer = Normalizer(read.action, "q99", read.mask)
    # OpenVLA's inverse: 0.5 * (a + 1) * (q99 - q01) + q01 where masked, the number itself where not.
    a = np.array([-0.99607843, 0.0, 0.99607843, 0.5, -0.5, 0.25, 0.99607843])
    expected = np.where(MASK, 0.5 * (a + 1) * (np.array(Q99) - Q01) + Q01, a)
    np.testing.assert_allclose(normalizer.from_unit(a), expected, rtol=1e-6)


def test_writing_and_reading_loses_nothing(tmp_path):
    datasets = {"one": DatasetStats(stats(), np.array(MASK), stats(8, 1), 500, 4), "two": (stats(7, 2), None, None, 500, 9)}
    write_norm_stats(tmp_path / "dataset_statistics.json", datasets)
    written = json.loads((tmp_path / "dataset_statistics.json").read_text())
    assert list(written) == ["one", "two"] and set(written["one"]) == {"action", "proprio", "num_transitions", "num_trajectories"}
    assert set(written["one"]["action"]) == {"mean", "std", "max", "min", "q01", "q99", "mask"}
    assert "mask" not in written["one"]["proprio"] and written["two"]["proprio"]["q99"] == [0.0] * 7
    back = read_all_norm_stats(tmp_path)
    for name in datasets:
        for field in ("mean", "std", "min", "max", "q01", "q99"):
            np.testing.assert_array_equal(back[name].action.values[field], datasets[name][0].values[field])
    assert back["one"].state is not None and back["two"].state is None
    np.testing.assert_array_equal(back["one"].state.values["q01"], stats(8, 1).values["q01"])
    assert back["two"].mask is not None and back["two"].mask.all() and back["one"].num_trajectories == 4


def test_the_fine_tune_beats_the_base_in_one_folder(tmp_path):
    put(tmp_path / "config.json", {"norm_stats": {"bridge_orig": entry()}})
    put(tmp_path / "dataset_statistics.json", {"mine": entry()})
    assert read_norm_stats(tmp_path, "mine").num_transitions == 2135463
    with pytest.raises(UsageError, match="mine"):
        read_norm_stats(tmp_path, "bridge_orig")


def test_keys_are_chosen_readably(tmp_path):
    file = put(tmp_path / "dataset_statistics.json", {name: entry() for name in NAMES})
    with pytest.raises(UsageError) as error:
        read_norm_stats(file, "bridge")
    assert "bridge_orig" in error.value.expected and "25 datasets" in error.value.found and "viola" in error.value.found
    with pytest.raises(UsageError, match="one of these names"):
        read_norm_stats(file)
    assert read_norm_stats(put(tmp_path / "one.json", {"only": entry()})).num_trajectories == 60064


def test_openpi_is_read(tmp_path):
    block = {"mean": [0.0, 1.0], "std": [1.0, 2.0], "q01": [-1.0, -2.0], "q99": [1.0, 2.0]}
    put(tmp_path / "norm_stats.json", {"norm_stats": {"state": block, "actions": block | {"q01": None, "q99": None}}})
    read = read_norm_stats(tmp_path)
    assert read.state is not None and read.mask is None
    assert read.state.values["q99"].tolist() == [1.0, 2.0] and sorted(read.action.values) == ["mean", "std"]
    assert Normalizer(read.action, "meanstd").low.tolist() == [-3.0, -5.0]
    with pytest.raises(DataError, match="q01"):
        Normalizer(read.action, "q99")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"q01": Q01[:6]}, "lengths"),
        ({"mask": [True] * 6}, r"mask .* for 7 dimensions"),
        ({"mask": ["yes"] * 7}, "mask"),
        ({"mean": [float("nan")] * 7}, "mean is"),
        ({"q01": Q99, "q99": Q01}, "q01 above q99 in dimension 0"),
        ({"min": ["a"] * 7}, "min holds no numbers"),
        ({"std": None}, "no std"),
    ],
)
def test_broken_statistics_are_named(tmp_path, changes, message):
    file = put(tmp_path / "dataset_statistics.json", {"mine": entry(**changes), "fine": entry()})
    with pytest.raises(DataError, match=message) as error:
        read_norm_stats(file, "mine")
    assert "mine" in error.value.where
    with pytest.raises(DataError, match="mine: "):
        read_all_norm_stats(file)
    assert read_norm_stats(file, "fine").mask is not None


def test_all_problems_at_once(tmp_path):
    file = put(tmp_path / "s.json", {"a": entry(min=[2.0] * 7, std=[float("inf")] * 7), "b": {"action": 3}})
    with pytest.raises(DataError) as error:
        read_all_norm_stats(file)
    assert all(text in error.value.found for text in ("min above max", "std is", "b: action is int"))


@pytest.mark.parametrize("content", [{}, [], {"model_type": "llama"}, {"mine": {"q01": []}}])
def test_a_file_of_something_else_is_refused(tmp_path, content):
    put(tmp_path / "config.json", content)
    with pytest.raises(DataError, match="without statistics"):
        read_norm_stats(tmp_path)
    with pytest.raises(DataError, match="no such file"):
        read_norm_stats(tmp_path / "nowhere")


def test_half_statistics_are_not_written(tmp_path):
    half = Stats({"mean": np.zeros(3), "std": np.ones(3)}, 9)
    with pytest.raises(DataError) as error:
        write_norm_stats(tmp_path / "s.json", {"half": (half, [True], None, 9, 1), "more": (stats(), None, half, 1, 1)})
    assert "half.action: no max, min, q01, q99" in error.value.found and "a mask of 1 for 3" in error.value.found
    assert "more.proprio" in error.value.found and not (tmp_path / "s.json").exists()


# --- the named mixtures -----------------------------------------------------------------------------------------------


def mixture(name: str) -> dict[str, float]:
    content = yaml.safe_load((CONFIGS / "mixtures" / f"{name}.yaml").read_text())
    assert set(content) == {"balance", "datasets"} and content["balance"] == "frames"
    assert all(set(d) == {"name", "weight"} for d in content["datasets"])
    weights = {d["name"]: d["weight"] for d in content["datasets"]}
    assert len(weights) == len(content["datasets"]) and all(w > 0 for w in weights.values())
    return weights


def test_magic_soup_plus_minus_is_the_25_datasets_of_openvla():
    weights = mixture("oxe_magic_soup_plus_minus")
    assert sorted(weights) == sorted(NAMES)
    assert weights["kuka"] == 0.8341046294 and weights["nyu_franka_play_dataset_converted_externally_to_rlds"] == 3.0
    assert weights["bc_z"] == weights["dobbe"] == 0.2 and weights["fractal20220817_data"] == 1.0
    assert sum(weights.values()) == pytest.approx(31.3341046294)
    assert "0.1.0" in (CONFIGS / "mixtures" / "oxe_magic_soup_plus_minus.yaml").read_text()


def test_magic_soup_plus_differs_in_three_datasets():
    minus, plus = mixture("oxe_magic_soup_plus_minus"), mixture("oxe_magic_soup_plus")
    changed = {name: weight for name, weight in plus.items() if minus.get(name) != weight}
    assert changed == {"fractal20220817_data": 0.54087122203, "language_table": 0.1, "droid": 0.06}
    assert set(minus) < set(plus)
