"""The weighted stream over datasets and robots: `config` says what is drawn, `opening` opens it, `stream` draws."""

from vla.mixture.config import DatasetConfig, MixtureConfig, all_datasets
from vla.mixture.opening import open_mixture, recorded_as
from vla.mixture.stream import BLOCK, SHARDS_AT_ONCE, Mixture, split_episodes

__all__ = ["BLOCK", "SHARDS_AT_ONCE", "DatasetConfig", "Mixture", "MixtureConfig", "all_datasets", "open_mixture", "recorded_as",
           "split_episodes"]  # fmt: skip
