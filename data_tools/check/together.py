"""Several datasets: whether they can be trained on together, and what nobody has declared."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from data_tools.check.cameras import TURNS, apart, usual
from data_tools.check.dataset import Dataset
from data_tools.check.finding import Finding, register
from vla.embodiment import explain


@register("undeclared", "robots whose conventions nobody has declared")
def undeclared(data: Dataset) -> Iterator[Finding]:
    """Without conventions nothing can be said about delta and absolute, grippers, rotations and limits."""
    if not data.declared:
        described = (data.root / "meta" / "embodiment.json").is_file()  # by a conversion without a card
        yield Finding(
            "note",
            "meta/embodiment.json",
            f"{'no channel with a convention or limits' if described else 'no such file'}: units, frames, signs and limits are "
            "unknown, and the checks on them were left out",
            "an embodiment",
            f"vla data check {data.root} --embodiment configs/embodiments/ROBOT.yaml, or convert with a "
            "dataset card (`vla data convert --help`)",
        )


@register("older-format", "older LeRobot formats")
def older_format(data: Dataset) -> Iterator[Finding]:
    """Read as they are, but not by current lerobot."""
    version = str(data.layout.info.get("codebase_version", "")) if data.layout else ""
    if version and not version.removeprefix("v").startswith("3"):
        yield Finding(
            "note",
            "meta/info.json",
            f"codebase_version {version}",
            "v3.0",
            f"nothing needs to be done here; for current lerobot: vla data convert {data.root} {data.root}-v3",
        )


@register("mismatch", "datasets of one robot that contradict each other", "several")
def mismatch(datasets: Sequence[Dataset]) -> Iterator[Finding]:
    """One robot has one description; every difference at once, before anything is trained."""
    known: dict[str, Dataset] = {}
    for data in datasets:
        if data.layout is None:
            continue
        first = known.setdefault(data.spec.key, data)
        for line in explain(first.spec, data.spec) if first is not data else ():
            limits = not (first.declared and data.declared) and line.split(":")[0].endswith((".low", ".high"))
            if not limits:  # limits of a derived description are the data's own range
                yield Finding(
                    "error",
                    "meta/embodiment.json",
                    line,
                    f"one description of robot {data.spec.key!r}, as in {first.root}",
                    "give the other robot its own name or mode, or convert one to the other's conventions",
                    root=str(data.root),
                )


@register("camera-names", "cameras that only some of the datasets have", "several")
def camera_names(datasets: Sequence[Dataset]) -> Iterator[Finding]:
    """Missing cameras are masked in a mixture; one view under two names is a waste."""
    opened = [data for data in datasets if data.layout is not None]
    everywhere = set.intersection(*(set(d.spec.cameras) for d in opened)) if len(opened) > 1 else set()
    for data in opened if len(opened) > 1 else ():
        if not everywhere and data is not opened[0]:
            yield Finding(
                "note",
                "meta/info.json",
                f"cameras {sorted(data.spec.cameras)}, none of which {opened[0].root} has ({sorted(opened[0].spec.cameras)})",
                "at least one name in common",
                "rename the cameras that show the same view, in a dataset card",
                root=str(data.root),
            )


@register("turned-between", "one camera that is upside down in one of the datasets", "several")
def turned_between(datasets: Sequence[Dataset]) -> Iterator[Finding]:
    """Same robot, same camera, and its usual picture fits the other dataset's only when turned."""
    known: dict[tuple[str, str], tuple[Dataset, object]] = {}
    for data in datasets:
        for camera, films in data.films.items():
            mean = usual(films)
            if mean is None:
                continue
            first, other = known.setdefault((data.spec.name, camera), (data, mean))
            straight = apart(mean, other) if first is not data else 0.0  # type: ignore[arg-type]
            ways = {name: apart(turn(mean), other) for name, turn in TURNS.items()} if straight > 6 else {}  # type: ignore[arg-type]
            best = min(ways, key=lambda name: ways[name], default="")
            if ways and ways[best] < 0.5 * straight:
                yield Finding(
                    "error",
                    f"videos, camera {camera!r}",
                    f"{best} against {first.root}",
                    "one orientation",
                    "turn the pictures of one of the two in its dataset card",
                    root=str(data.root),
                )
