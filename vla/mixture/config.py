"""What a mixture is made of: datasets, shares, named lists of them. Values only; `opening.py` makes them a stream."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from vla.answers import AnswersConfig
from vla.config import Config, load_config


class DatasetConfig(Config):
    """One dataset of the mixture."""

    path: str = Field(min_length=1)
    """Folder of a LeRobot dataset, or `hub:user/name@revision`."""
    embodiment: str | None = None
    """Which robot it is: a shipped name or a YAML file. Default: the dataset's own `meta/embodiment.json`, else a spec derived
    from its features (convention `scalar`)."""
    weight: float = Field(default=1.0, gt=0, le=1e6)
    """Share of the samples, relative to the other datasets' weights; multiplied by size where `mixture.temperature` is set."""
    cameras: dict[str, str | None] = Field(default_factory=dict)
    """The embodiment's camera -> this dataset's name for it; `null`: it was not recorded, and is masked."""
    language: Literal["task", "subtask", "both"] = "task"
    """What the policy is told: the sentence of the whole episode; that of the subtask under way, every subtask then a
    demonstration of its own (a chunk ends where it does); or each in half of the samples. Subtasks are the dataset's own, or
    found by `vla data segment`."""
    stream: bool = False
    """Of a Hub dataset, fetch videos file by file while training instead of everything before it."""
    stream_gb: float = Field(default=20.0, gt=0)
    """Room for streamed videos on this machine; the least recently used go first."""


class MixtureConfig(Config):
    """What is drawn, and in which shares."""

    datasets: list[DatasetConfig] = Field(default_factory=list)
    named: str | None = None
    """A shipped list of datasets and weights (`oxe_magic_soup_plus_minus`) or a YAML file of that form, read from `root`."""
    root: str = "data"
    """Where the datasets of `named` lie, each in a folder of its name."""
    temperature: float | None = Field(default=None, ge=0.1, le=1e6)
    """None: weights alone decide. T: weight times frames ** (1 / T). 1 is every frame alike (OpenVLA's balancing, where a weight
    multiplies a dataset's natural share); larger is flatter."""
    answers: AnswersConfig | None = None
    """Image-text data to train on beside the robots'."""
    holdout: float = Field(default=0.02, ge=0, lt=1)
    """Share of each dataset's episodes kept out of training (at least one), chosen by a keyed hash; for open-loop figures."""
    frames: Literal["raw", "jpeg", "video", "none"] = "raw"
    """How pictures are kept for training: decoded, as JPEG (about ten times smaller), or not at all (videos are read). `none`
    opens the numbers alone, to look at a mixture."""
    cache_dir: str | None = None

    @model_validator(mode="after")
    def _check(self) -> MixtureConfig:
        if not self.datasets and not self.named:
            raise ValueError("no datasets: give `datasets`, `named`, or both")
        return self


class NamedDataset(Config):
    """One entry of a named mixture."""

    name: str = Field(min_length=1)
    weight: float = Field(default=1.0, gt=0, le=1e6)


class NamedMixture(Config):
    """A list of datasets and weights as `configs/mixtures/` ships them."""

    balance: Literal["frames", "weights"] = "weights"
    """`frames`: weights multiply a dataset's natural share, as OpenVLA means them."""
    datasets: list[NamedDataset] = Field(min_length=1)


def all_datasets(config: MixtureConfig) -> tuple[list[DatasetConfig], float | None]:
    """Every dataset of a mixture, those of its named list included, and the temperature that holds."""
    if config.named is None:
        return config.datasets, config.temperature
    path = Path(config.named) if config.named.endswith((".yaml", ".yml")) else Path("mixtures") / config.named
    listed = load_config(path, (), NamedMixture)
    entries = [DatasetConfig(path=str(Path(config.root) / e.name), weight=e.weight) for e in listed.datasets]
    natural = 1.0 if listed.balance == "frames" else None
    return [*entries, *config.datasets], config.temperature or natural
