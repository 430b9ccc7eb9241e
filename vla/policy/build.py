"""A fresh policy for the robots, sentences and statistics of a mixture; or a trained one that also knows further robots."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from vla.actions import ActionCodec, BinCodec, is_sequence, read_codec
from vla.backbones import build_backbone
from vla.embodiment import explain
from vla.errors import UsageError
from vla.mixture import Mixture
from vla.normalize import Normalizer, Stats
from vla.policy.config import NormalizationConfig, PolicyConfig
from vla.policy.model import VLAPolicy
from vla.policy.sizes import check_cameras, sizes_of
from vla.prompt import PROMPTS, act_prompt


def build_policy(
    config: PolicyConfig, mixture: Mixture, normalizers: Mapping[str, dict[str, Normalizer]] | None = None
) -> VLAPolicy:  # fmt: skip
    """A fresh policy for the robots, sentences and statistics of `mixture`, or those `normalizers` say (a teacher's). Draws from
    torch's global generator.

    Raises `UsageError` when `policy.action_dim` or `policy.state_dim` leave no room for one of the robots.
    """
    embodiments = mixture.embodiments
    _check_answers(config, mixture)
    codec = build_codec(config)
    spoken = [(key, text) for key, texts in _sentences(mixture).items() for text in texts]
    corpus = [act_prompt(text, version, key) for key, text in spoken for version in PROMPTS]
    if mixture.answers is not None:
        corpus += [text for _, question, answer in mixture.answers.pairs for text in (question, answer)]
    model, writer = build_backbone(config.backbone, sizes_of(config, embodiments, codec, corpus))
    check_cameras(embodiments, model.max_cameras)
    normalizers = normalizers or {}
    own = {key: normalizers.get(key) or normalizers_of(key, mixture, config.normalization) for key in embodiments}
    return VLAPolicy(config, model, writer, embodiments, own, codec, _provenance(mixture))


def build_codec(config: PolicyConfig) -> ActionCodec:
    """The codec of a fresh policy. Raises `CheckpointError` for a file that cannot be read, `UsageError` for one that was fitted
    for other chunks or numbers."""
    wanted = config.codec
    if wanted.kind == "bins":
        return BinCodec(wanted.bins, wanted.variant)
    assert wanted.path is not None
    codec = read_codec(wanted.path)
    kind = codec.to_json()["kind"]
    if kind != wanted.kind or not is_sequence(codec):
        raise UsageError("policy.codec", found=f"kind {wanted.kind}, and {wanted.path} of kind {kind}", expected="the same kind",
                         fix=f"policy.codec.kind={kind}, or another file")  # fmt: skip
    asked = {"chunk": config.chunk, "seconds": config.chunk_seconds, "normalization": config.normalization.action}
    flags = {"chunk": "--chunk", "seconds": "--seconds", "normalization": "--normalization"}
    # Other numbers could be said too, but badly: what was fitted are the chunks of one length and one scale.
    if other := [key for key in asked if codec.fitted.get(key, asked[key]) != asked[key]]:
        raise UsageError(f"policy.codec: {wanted.path}", found="; ".join(f"{key} {codec.fitted[key]}" for key in other),
                         expected="; ".join(f"{key} {asked[key]}, as the policy has it" for key in other),
                         fix="fit it again: vla data tokenizer DATASET ... "
                         + " ".join(f"{flags[key]} {asked[key]}" for key in other if asked[key] is not None))  # fmt: skip
    return codec


def extend_policy(policy: VLAPolicy, mixture: Mixture) -> VLAPolicy:
    """`policy` with the robots of `mixture` it does not know yet: their statistics, and fresh soft tokens.

    What it answers to the robots it knows does not change by a bit: their statistics, their rows of soft tokens and every
    other weight stay as they are. Robots of the mixture that it knows keep the policy's statistics, not the data's; but a
    dimension that never moved so far (a gripper in a policy that only pushes) takes the data's, or it never could.
    Raises `UsageError` when a robot does not fit: too many dimensions, no soft tokens, or a known name that means another
    robot now.
    """
    config, model, width = policy.config, policy.model, policy.encoder
    if policy.adapter is not None:
        raise UsageError("start.policy", found="an adapter", expected="a whole policy",
                         fix="merge it first: vla merge ADAPTER --out DIR")  # fmt: skip
    _check_answers(config, mixture)
    problems = []
    for key, spec in mixture.embodiments.items():
        if key in policy.embodiments:
            known = policy.embodiments[key]
            free = {"cameras": {}}  # any picture size will do
            problems += [f"{key}: {line}" for line in explain(known.model_copy(update=free), spec.model_copy(update=free))]
            if other := sorted(spec.cameras.keys() ^ known.cameras.keys()):
                problems.append(f"{key}: cameras {other} are only in one of its descriptions")
        elif spec.action_dim > width.action_dim or spec.state_dim > width.state_dim:
            problems.append(f"{key}: {spec.action_dim} action and {spec.state_dim} state dimensions")
    new = [key for key in mixture.embodiments if key not in policy.embodiments]
    if new and not config.soft_tokens:
        problems.append("no soft tokens, so nothing could tell a new robot from the known ones")
    check_cameras(mixture.embodiments, model.max_cameras)
    if problems:
        raise UsageError("start.policy", found="; ".join(problems),
                         expected=f"robots it knows as {sorted(policy.embodiments)}, or new ones of at most {width.action_dim} "
                         f"action and {width.state_dim} state dimensions, and policy.soft_tokens",
                         fix="train a policy with policy.soft_tokens and room (policy.action_dim, policy.state_dim), or give the "
                         "other robot its own name")  # fmt: skip
    policy.codec.slots(config.chunk, width.action_dim, [mixture.embodiments[key].action_dim for key in new])
    if new:
        model.add_robots(len(new))
    embodiments = policy.embodiments | {key: mixture.embodiments[key] for key in new}
    theirs = {key: normalizers_of(key, mixture, config.normalization) for key in mixture.embodiments}
    known = {key: {part: one.completed(theirs[key][part]) if key in theirs else one for part, one in parts.items()}
             for key, parts in policy.normalizers.items()}  # fmt: skip
    normalizers = known | {key: theirs[key] for key in new}
    provenance = _joined(policy.provenance, _provenance(mixture))
    return VLAPolicy(config, model, policy.writer, embodiments, normalizers, policy.codec, provenance).adopt(policy)


def _check_answers(config: PolicyConfig, mixture: Mixture) -> None:
    if config.backbone.kind == "student" and mixture.answers is not None:
        raise UsageError("mixture.answers", found=f"{len(mixture.answers)} questions for a student", expected="none: a student "
                         "says actions and no words", fix="leave mixture.answers out, or teach another backbone")  # fmt: skip


def _sentences(mixture: Mixture) -> dict[str, list[str]]:
    """Robot -> every instruction given to it."""
    found: dict[str, set[str]] = {}
    for store, spec in zip(mixture.stores, mixture.specs, strict=True):
        found.setdefault(spec.key, set()).update(store.sentences)
    return {key: sorted(texts) for key, texts in found.items()}


def _provenance(mixture: Mixture) -> dict:
    seeds: dict[str, dict[str, list[list[int]]]] = {}
    for store, spec in zip(mixture.stores, mixture.specs, strict=True):
        for task, numbers in store.recorded_seeds.items():
            ranges = seeds.setdefault(store.suite or spec.key, {}).setdefault(task, [])
            ranges += _ranges(numbers)
    datasets = [{"path": str(s.root), "robot": spec.key, "fingerprint": s.fingerprint, "episodes": s.num_episodes,
                 "frames": s.num_frames, **({"language": s.language} if s.language != "task" else {})}
                for s, spec in zip(mixture.stores, mixture.specs, strict=True)]  # fmt: skip
    if mixture.answers is not None:
        datasets.append({"path": str(mixture.answers.path), "robot": "-", "fingerprint": mixture.answers.fingerprint,
                         "episodes": 0, "frames": len(mixture.answers)})  # fmt: skip
    sentences = sorted({text for texts in _sentences(mixture).values() for text in texts})
    return {"datasets": datasets, "recorded_seeds": seeds, "instructions": sentences}


def _joined(before: dict, after: dict) -> dict:
    seeds = {suite: dict(tasks) for suite, tasks in before.get("recorded_seeds", {}).items()}
    for suite, tasks in after["recorded_seeds"].items():
        for task, ranges in tasks.items():
            own = seeds.setdefault(suite, {})
            own[task] = [*own.get(task, []), *(r for r in ranges if r not in own.get(task, []))]
    known = {d["fingerprint"] for d in before.get("datasets", [])}
    return {"datasets": [*before.get("datasets", []), *(d for d in after["datasets"] if d["fingerprint"] not in known)],
            "recorded_seeds": seeds,
            "instructions": sorted({*before.get("instructions", []), *after["instructions"]})}  # fmt: skip


def normalizers_of(key: str, mixture: Mixture, config: NormalizationConfig) -> dict[str, Normalizer]:
    """Statistics of one robot in one control mode: its dataset's own; recomputed exactly from the columns when it has several."""
    stores = [store for store, spec in zip(mixture.stores, mixture.specs, strict=True) if spec.key == key]
    made = {}
    for part, feature in (("action", "action"), ("state", "observation.state")):
        where = f"{stores[0].root}/meta/stats.json: {feature}"
        if not getattr(stores[0].spec, f"{part}_dim"):
            stats = Stats({name: np.zeros(0) for name in ("min", "max", "mean", "std", "q01", "q99")}, 0)
        elif len(stores) == 1:
            stats = Stats.from_json(stores[0].stats[feature], where)
        else:
            stats = Stats.of(np.concatenate([getattr(store, part) for store in stores]))
        made[part] = Normalizer(stats, getattr(config, part), where=where)
    return made


def _ranges(numbers: Sequence[int]) -> list[list[int]]:
    """[1, 2, 3, 7] -> [[1, 3], [7, 7]]."""
    ranges: list[list[int]] = []
    for number in sorted(numbers):
        if ranges and number == ranges[-1][1] + 1:
            ranges[-1][1] = number
        else:
            ranges.append([number, number])
    return ranges
