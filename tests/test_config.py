"""Configs: errors that name the line and the nearest key."""

import pytest

from vla.config import dump_config, find_config, load_config
from vla.distill import DistillConfig
from vla.errors import UsageError
from vla.train import TrainConfig

GOOD = """\
run: {out: runs/x, steps: 10}
mixture:
  datasets:
    - {path: data/a}
    - path: data/b
      weight: 2
"""


@pytest.fixture
def write(tmp_path):
    def _write(text):
        path = tmp_path / "c.yaml"
        path.write_text(text)
        return path

    return _write


def test_overrides_reach_dictionaries_lists_and_defaults(write):
    overrides = ["optim.lr=3e-4", "mixture.datasets.1.weight=5", "policy.decoding=autoregressive"]
    config = load_config(write(GOOD), overrides, TrainConfig)
    assert config.optim.lr == 3e-4 and config.mixture.datasets[1].weight == 5 and config.policy.decoding == "autoregressive"
    with pytest.raises(Exception, match="frozen"):
        config.run.steps = 3  # pyright: ignore


@pytest.mark.parametrize(
    ("text", "overrides", "words"),
    [
        (GOOD + "optim:\n  warmup_step: 5\n", [], ["c.yaml:8", "warmup_step", "did you mean 'warmup'"]),
        (GOOD + "optim:\n  lr: fast\n", [], ["c.yaml:8", "'fast'", "valid number"]),
        (GOOD.replace("weight: 2", "weigth: 2"), [], ["c.yaml:6", "mixture.datasets.1.weigth", "did you mean 'weight'"]),
        (GOOD, ["optim.lrr=1"], ["optim.lrr (the override)", "did you mean 'lr'"]),
        (GOOD, ["optim.lr=.nan"], ["optim.lr", "finite"]),
        (GOOD, ["nonsense"], ["a.b=value"]),
        ("run: {steps: 3}\n", [], ["run.out: missing", "mixture: missing"]),
        ("- 1\n", [], ["mapping"]),
        ("run: {out: [\n", [], ["valid YAML"]),
        ("run: !!python/object:os.system {}\n", [], ["valid YAML"]),
    ],
)
def test_bad_configs_name_place_and_remedy(write, text, overrides, words):
    with pytest.raises(UsageError) as error:
        load_config(write(text), overrides, TrainConfig)
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize(
    ("overrides", "found"),
    [
        (["run.processes=5", "optim.batch=32"], ["run.processes (the override) = 5", "optim.batch (the override) = 32"]),
        (["policy.backbone.hidden=101"], ["policy.backbone.hidden (the override) = 101"]),
        (["start.policy=x", "policy.chunk=4"], ["start.policy (the override) = 'x'", "policy: chunk"]),
        (["mixture.datasets=[]"], ["mixture.datasets (the override) = []"]),
        (["run.processes=nine"], ["run.processes (the override) = 'nine'"]),
        (["policy.backbone.kind=student", "policy.backbone.hiden=3"], ["policy.backbone.hiden (the override): no such key"]),
    ],
)
def test_what_does_not_go_together_is_shown_and_nothing_else(write, overrides, found):
    with pytest.raises(UsageError) as error:
        load_config(write(GOOD), overrides, TrainConfig)
    assert error.value.found.split("\n            ") == found


def test_unknown_file_names_the_nearest_shipped_one():
    with pytest.raises(UsageError, match="train/demo"):
        find_config("train/dmeo")


def test_every_shipped_training_config_is_valid_and_survives_a_round_trip(write):
    from vla.config import CONFIGS

    files = [file for folder in ("train", "distill", "smoke") for file in sorted((CONFIGS / folder).glob("*.yaml"))]
    files = [file for file in files if "mixture:" in file.read_text()]  # others are a server's
    assert files
    for file in files:
        kind = DistillConfig if "teacher:" in file.read_text() else TrainConfig
        config = load_config(file, [], kind)
        assert load_config(write(dump_config(config)), [], kind) == config
