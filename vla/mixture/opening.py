"""From a mixture's config to its stream: every dataset opened, wherever it lies, as the robot it is said to show."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from vla.answers import Answers
from vla.embodiment import EmbodimentSpec, load_embodiment
from vla.episodes import EpisodeStore
from vla.episodes.hub import resolve
from vla.episodes.streaming import StreamingStore
from vla.episodes.surface import Language, Store
from vla.errors import DataError, UsageError, VLAError
from vla.mixture.config import DatasetConfig, MixtureConfig, all_datasets
from vla.mixture.stream import Mixture


def open_mixture(
    config: MixtureConfig, horizon: int, seed: int, progress: bool = True, seconds: float | None = None
) -> tuple[Mixture, Mixture]:
    """Open every dataset (building caches) and return the training and the held-out mixture.

    All datasets that cannot be opened are reported in one `DataError`.
    """
    stores: list[Store] = []
    weights: list[float] = []
    specs: list[EmbodimentSpec] = []
    cameras: list[Mapping[str, str | None]] = []
    problems: list[VLAError] = []
    answers: Answers | None = None
    datasets, temperature = all_datasets(config)
    for entry in datasets:
        try:
            store, spec, names = _open(entry, config, progress)
            spoken: tuple[Language, ...] = ("task", "subtask") if entry.language == "both" else (entry.language,)
            stores += [store.speaking(language) for language in spoken]
            weights += [entry.weight / len(spoken)] * len(spoken)
            specs += [spec] * len(spoken)
            cameras += [names] * len(spoken)
        except (DataError, UsageError) as error:
            problems.append(error)
    try:
        answers = Answers(config.answers.path, config.answers.images) if config.answers else None
    except DataError as error:
        problems.append(error)
    if len(problems) == 1:
        raise problems[0]
    if problems:
        raise DataError("mixture", found="\n".join(map(str, problems)), expected="datasets that open",
                        fix="mend each dataset named above")  # fmt: skip
    asked = (answers, config.answers.share) if answers and config.answers else None

    def part(name: str) -> Mixture:
        return Mixture(stores, weights, horizon, seed, config.holdout, name, seconds=seconds, temperature=temperature,
                       specs=specs, cameras=cameras, answers=asked)  # fmt: skip

    return part("train"), part("holdout")


def recorded_as(entry: DatasetConfig) -> tuple[EmbodimentSpec | None, dict[str, str | None]]:
    """(the robot `entry` names, with the dataset's own names for its cameras; its cameras -> those names). (None, {}) when the
    dataset is to speak for itself. Raises `UsageError` for cameras the robot does not have."""
    spec = load_embodiment(entry.embodiment) if entry.embodiment else None
    if not entry.cameras:
        return spec, {}
    if spec is None:
        raise UsageError(f"dataset {entry.path}", found="cameras without an embodiment", expected="both",
                         fix="say which robot it is: embodiment: NAME_OR_YAML")  # fmt: skip
    if unknown := sorted(entry.cameras.keys() - spec.cameras.keys()):
        raise UsageError(f"dataset {entry.path}, cameras", found=f"{unknown}",
                         expected=f"cameras of {spec.key!r}: {sorted(spec.cameras)}",
                         fix="name the embodiment's camera on the left, the dataset's on the right")  # fmt: skip
    names = {name: entry.cameras.get(name, name) for name in spec.cameras}
    recorded = {own: spec.cameras[name] for name, own in names.items() if own is not None}
    if not recorded:
        raise UsageError(f"dataset {entry.path}, cameras", found="all of them null", expected="at least one camera",
                         fix="leave the dataset out: a policy that sees nothing learns nothing")  # fmt: skip
    return spec.model_copy(update={"cameras": recorded}), names


def _open(
    entry: DatasetConfig, config: MixtureConfig, progress: bool
) -> tuple[Store, EmbodimentSpec, dict[str, str | None]]:  # fmt: skip
    """(store, the robot it shows, that robot's cameras -> the dataset's names) of one dataset."""
    cache = Path(config.cache_dir) if config.cache_dir else None
    spec, names = recorded_as(entry)
    store = _reach(entry, config, cache, spec, progress)
    if not names:
        return store, store.spec, {name: name for name in store.spec.cameras}
    whole = load_embodiment(entry.embodiment or "")
    sizes = {name: store.spec.cameras[own] if own is not None else whole.cameras[name] for name, own in names.items()}
    return store, store.spec.model_copy(update={"cameras": sizes}), names


def _reach(
    entry: DatasetConfig, config: MixtureConfig, cache: Path | None, spec: EmbodimentSpec | None, progress: bool
) -> Store:  # fmt: skip
    """The dataset wherever it lies: here, or on the Hub, fetched whole or as it is needed."""
    if entry.stream:
        return StreamingStore.open(entry.path, cache, entry.stream_gb, progress, embodiment=spec)
    folder = resolve(entry.path, cache, progress=progress)
    return EpisodeStore.open(folder, cache, config.frames, progress, embodiment=spec)
