"""Robots as data: compared before anything moves, refused with the reason."""

from types import MappingProxyType

import numpy as np
import pytest

from vla.config import CONFIGS
from vla.embodiment import EmbodimentSpec, explain, load_embodiment
from vla.errors import DataError, UsageError


def test_every_shipped_robot_loads_and_equals_itself():
    names = [path.stem for path in (CONFIGS / "embodiments").glob("*.yaml")]
    assert {"tabletop", "metaworld_sawyer"} <= set(names)
    for name in names:
        spec = load_embodiment(name)
        assert explain(spec, load_embodiment(name)) == [] and EmbodimentSpec.model_validate(spec.model_dump()) == spec
        low, high = spec.limits("action")
        assert low.shape == high.shape == (spec.action_dim,) and (low < high).all()


def test_differences_are_named_one_by_one():
    spec = load_embodiment("tabletop")
    gripper = spec.action[1].model_copy(update={"convention": "gripper_open_positive", "unit": "m"})
    other = spec.model_copy(update={"action": (spec.action[0], gripper), "control_hz": 5.0})
    lines = "\n".join(explain(spec, other))
    assert "control_hz: 10.0 against 5.0" in lines and "action.gripper.convention" in lines and "action.gripper.unit" in lines
    assert explain(spec, other.model_copy(update={"action": spec.action[:1]}))


def test_dimensions_are_found_by_convention():
    spec = load_embodiment("tabletop")
    assert spec.dims_with("state", "eef_position") == [0, 1, 2] and spec.dims_with("action", "gripper_closed_positive") == [3]
    assert spec.action_names == ["eef.dx", "eef.dy", "eef.dz", "gripper.close"]


@pytest.mark.parametrize(
    ("old", "new", "word"),
    [("eef_position", "eef_somewhere", "unknown convention"), ("low: [-1, -1, -0.1]", "low: [-1, -1]", "same length"),
     ("low: [-1, -1, -0.1]", "low: [2, -1, -0.1]", "below its high"), ("control_hz: 10", "control_hz: 0", "control_hz"),
     ("robot:", "robott:", "robott"), ("control_hz: 10", "control_hz: .nan", "control_hz")],
)  # fmt: skip
def test_a_wrong_description_is_refused(tmp_path, old, new, word):
    text = (CONFIGS / "embodiments/tabletop.yaml").read_text()
    assert old in text
    (tmp_path / "arm.yaml").write_text(text.replace(old, new))
    with pytest.raises(UsageError, match=word):
        load_embodiment(tmp_path / "arm.yaml")


def test_an_unknown_robot_names_the_known_ones():
    with pytest.raises(UsageError, match="metaworld_sawyer"):
        load_embodiment("franka")


def test_all_problems_of_an_observation_come_at_once():
    spec = load_embodiment("tabletop")
    with pytest.raises(DataError) as error:
        spec.check_observation({"images": {"wrist": np.zeros((4, 4), np.uint8)}, "state": np.full(4, np.nan)}, "here")
    for word in ("camera 'front' missing", "camera 'wrist' is uint8 (4, 4)", "not finite"):
        assert word in str(error.value)
    frame = np.zeros((4, 4, 3), np.uint8)
    spec.check_observation(MappingProxyType({"images": MappingProxyType({"front": frame}), "state": [0, 0, 0, 0]}), "here")
    with pytest.raises(DataError, match="images"):
        spec.check_observation([], "here")
