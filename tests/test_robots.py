"""Many robots in one run: statistics and outputs that do not mix, masks, shares, words, and a robot added later."""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from vla.answers import Answers
from vla.config import load_config
from vla.embodiment import Camera, Channel, EmbodimentSpec, load_embodiment
from vla.episodes import EpisodeStore
from vla.errors import DataError, UsageError
from vla.mixture import BLOCK, SHARDS_AT_ONCE, DatasetConfig, Mixture, MixtureConfig, all_datasets, open_mixture
from vla.policy import PolicyConfig, build_policy, load_policy
from vla.preview import preview
from vla.recording import LeRobotWriter
from vla.schema import Episode
from vla.train import TrainConfig, train

SMALL = {"hidden": 32, "layers": 1, "heads": 2, "mlp": 64, "tower_channels": (8, 8, 16), "keypoints": 8, "text_vocab": 400,
         "image_size": 32}  # fmt: skip


def channel(name: str, dims: int, convention: str, low: float = -10, high: float = 10) -> Channel:
    return Channel(name=name, dims=tuple(f"d{i}" for i in range(dims)), convention=convention, unit="rad", low=(low,) * dims,
                   high=(high,) * dims)  # fmt: skip


def two_arms(mode: str = "joint", hz: float = 20, name: str = "two_arms") -> EmbodimentSpec:
    convention = {"joint": "joint_position", "delta": "joint_delta"}[mode]
    return EmbodimentSpec(
        name=name, mode=mode, cameras={c: Camera(height=32, width=32) for c in ("top", "wrist")},
        state=(channel("joints", 6, "joint_position"),), action=(channel("joints", 6, convention),), control_hz=hz,
    )  # fmt: skip


def write(root: Path, spec: EmbodimentSpec, seed: int, episodes: int = 5, cameras: tuple[str, ...] = ("top", "wrist")) -> Path:
    rng = np.random.default_rng(seed)
    spec = spec.model_copy(update={"cameras": {c: Camera(height=32, width=32) for c in cameras}})
    with LeRobotWriter(root, spec) as writer:
        for e in range(episodes):
            T = 6 + e
            frames = {c: rng.integers(0, 256, (T, 32, 32, 3), dtype=np.uint8) for c in cameras}
            state = rng.normal(seed, 1, (T, spec.state_dim)).astype(np.float32)
            action = rng.normal(10 * seed, 1 + seed, (T, spec.action_dim)).astype(np.float32)
            writer.add(Episode(frames, state, action, f"wave the arms {e % 2}", spec.name))
    return root


@pytest.fixture(scope="module")
def arms(tmp_path_factory) -> dict[str, Path]:
    """Three datasets: one robot in two control modes, and another with one camera of the two."""
    root = tmp_path_factory.mktemp("arms")
    return {"joint": write(root / "joint", two_arms(), 1), "delta": write(root / "delta", two_arms("delta"), 2),
            "half": write(root / "half", two_arms(name="half"), 3, cameras=("up",))}  # fmt: skip


@pytest.fixture(scope="module")
def opened(arms, tmp_path_factory) -> dict[str, EpisodeStore]:
    cache = tmp_path_factory.mktemp("cache")
    return {name: EpisodeStore.open(path, cache, progress=False) for name, path in arms.items()}


def make(mixture: Mixture, **config):
    torch.manual_seed(0)
    base = {"backbone": SMALL, "chunk": 4, "execute": 2, "soft_tokens": 2, "prompt": "robot-1"}
    return build_policy(PolicyConfig.model_validate({**base, **config}), mixture).eval()


def seen(mixture: Mixture, dataset: int) -> dict:
    window = mixture.window_at(dataset, 0, 0)
    return {"images": window.images, "state": window.state}


# --- statistics and outputs stay apart -------------------------------------------------------------------------------


def test_each_robot_and_control_mode_has_statistics_of_its_own(opened):
    together = Mixture([opened["joint"], opened["delta"], opened["half"]], [1, 1, 1], 4, 0)
    policy = make(together)
    assert list(policy.normalizers) == ["two_arms/joint", "two_arms/delta", "half/joint"]
    for name, key in (("joint", "two_arms/joint"), ("delta", "two_arms/delta"), ("half", "half/joint")):
        alone = make(Mixture([opened[name]], [1], 4, 0))
        for part in ("action", "state"):
            assert policy.normalizers[key][part].fingerprint == alone.normalizers[key][part].fingerprint
        assert np.array_equal(policy.normalizers[key]["action"].low,
                              np.quantile(opened[name].action.astype(np.float64), 0.01, axis=0).astype(np.float32))  # fmt: skip


def test_two_modes_of_one_robot_without_a_mode_are_refused(opened):
    def plain(name):
        return opened[name].spec.model_copy(update={"mode": ""})

    with pytest.raises(DataError, match="joint_position against joint_delta"):
        Mixture([opened["joint"], opened["delta"]], [1, 1], 4, 0, specs=[plain("joint"), plain("delta")])


def test_the_robot_is_told_by_words_and_by_soft_tokens(opened):
    """Same picture, state and sentence: the same numbers in unit space only if nothing said which robot it is."""
    mixture = Mixture([opened["joint"], opened["delta"]], [1, 1], 4, 0)
    for settings, differ in (({"soft_tokens": 0, "prompt": "plain-1"}, False), ({"soft_tokens": 2, "prompt": "plain-1"}, True),
                             ({"soft_tokens": 0}, True)):  # fmt: skip
        policy = make(mixture, **settings)
        example = policy.encoder.observation(seen(mixture, 0), "wave", "two_arms/joint")
        other = replace(policy.encoder.observation(seen(mixture, 0), "wave", "two_arms/delta"), state=example.state)
        a, b = (policy.action_logits(policy.collate([e])) for e in (example, other))
        assert torch.equal(a, b) != differ


def test_one_robots_soft_tokens_are_nobody_elses(opened):
    mixture = Mixture([opened["joint"], opened["delta"]], [1, 1], 4, 0)
    policy = make(mixture)
    before = [policy.act(seen(mixture, d), "wave", key).symbols for d, key in enumerate(policy.embodiments)]
    logits = policy.action_logits(policy.collate([policy.encode(mixture.window_at(d, 0, 0)) for d in (0, 1)]))
    with torch.no_grad():
        policy.get_parameter("model.robots.weight")[1] += 1.0
    after = policy.action_logits(policy.collate([policy.encode(mixture.window_at(d, 0, 0)) for d in (0, 1)]))
    assert torch.equal(logits[0], after[0]) and not torch.allclose(logits[1], after[1], atol=1e-3)
    assert np.array_equal(policy.act(seen(mixture, 0), "wave", "two_arms/joint").symbols, before[0])


# --- masks -----------------------------------------------------------------------------------------------------------


def test_a_camera_that_was_not_recorded_is_masked_and_another_name_is_mapped(arms, tmp_path):
    (tmp_path / "robot.yaml").write_text(yaml.safe_dump(two_arms(name="half").model_dump(mode="json")))

    def entry(cameras):
        return {"path": str(arms["half"]), "embodiment": str(tmp_path / "robot.yaml"), "cameras": cameras}

    def opened_with(cameras):
        config = MixtureConfig.model_validate({"datasets": [entry(cameras)], "cache_dir": str(tmp_path / "cache")})
        return open_mixture(config, 4, 0, progress=False)[0]

    mixture = opened_with({"wrist": "up", "top": None})
    assert list(mixture.embodiments["half/joint"].cameras) == ["top", "wrist"]
    window = mixture.window_at(0, 0, 0)
    assert list(window.images) == ["wrist"] and np.array_equal(window.images["wrist"], mixture.stores[0].frame("up", 0))
    policy = make(mixture)
    example = policy.encode(window)
    assert example.slots.tolist() == [1] and len(example.images) == 1  # the second camera, and no tokens for the first
    both = {"images": {"top": window.images["wrist"], "wrist": window.images["wrist"]}, "state": window.state}
    assert policy.encoder.observation(both, "wave", "half/joint").slots.tolist() == [0, 1]
    with pytest.raises(UsageError, match="no_such"):
        opened_with({"no_such": "up"})
    with pytest.raises(DataError, match="'top' missing"):
        opened_with({"wrist": "up"})
    with pytest.raises(UsageError, match="all of them null"):
        opened_with({"wrist": None, "top": None})


def test_which_camera_a_picture_comes_from_matters(opened):
    mixture = Mixture([opened["joint"]], [1], 4, 0)
    policy = make(mixture)
    with torch.no_grad():
        policy.model.camera_positions.normal_()
    example = policy.encode(mixture.window_at(0, 0, 0))
    swapped = replace(example, slots=example.slots[::-1].copy())
    a, b = (policy.action_logits(policy.collate([e])) for e in (example, swapped))
    assert not torch.allclose(a, b, atol=1e-3)


def test_narrow_robots_are_padded_and_the_padding_is_not_learned(opened, stores):
    mixture = Mixture([opened["joint"], stores[0]], [1, 1], 4, 0)
    policy = make(mixture)
    example = policy.encode(mixture.window_at(1, 0, 0))
    assert policy.encoder.action_dim == 6 and example.valid[:, 4:].sum() == 0 and not example.unit[:, 4:].any()
    assert policy.act(seen(mixture, 1), "lift", "tabletop").actions.shape == (4, 4)
    with pytest.raises(UsageError, match="at least 6"):
        make(mixture, action_dim=5)
    assert make(mixture, action_dim=9).encoder.action_dim == 9


def test_positions_no_robot_of_a_batch_has_are_left_out_and_change_nothing(opened, stores):
    """Four of six dimensions: alone its positions are 4 x 4, beside a wider robot 4 x 6, and what it is told is the same."""
    mixture = Mixture([opened["joint"], stores[0]], [1, 1], 4, 0)
    policy = make(mixture, action_dim=9)
    wide, narrow = (policy.encode(mixture.window_at(d, 0, 0)) for d in (0, 1))
    alone, both = policy.collate([narrow]), policy.collate([wide, narrow])
    assert alone.symbols.shape == (1, 16) and both.symbols.shape == (2, 24)
    told, before = policy.action_logits(alone)[0], policy.action_logits(both)
    beside = before[1]
    assert torch.allclose(told.view(4, 4, -1), beside.view(4, 6, -1)[:, :4], atol=1e-4)
    slots = policy.writer.ids.slots
    with torch.no_grad():  # what stands at the two dimensions only the wide robot has; the narrow one must not see it
        rows = [slots[step * 9 + dim] for step in range(4) for dim in (4, 5)]
        policy.model.get_input_embeddings().weight[rows] += 1.0
    after = policy.action_logits(both)
    assert torch.equal(after[1].view(4, 6, -1)[:, :4], beside.view(4, 6, -1)[:, :4])
    assert not torch.allclose(after[0], before[0], atol=1e-3)
    together, apart = policy.loss(both), [policy.loss(policy.collate([e])) for e in (wide, narrow)]
    assert together.action_count == sum(one.action_count for one in apart)
    assert torch.allclose(together.action, torch.stack([one.action for one in apart]).sum(), rtol=1e-4)
    stepwise = make(mixture, action_dim=9, decoding="autoregressive")  # one symbol follows another there: all are kept
    assert stepwise.collate([narrow]).symbols.shape == (1, 36) and not stepwise.narrows


def test_a_chunk_in_seconds_is_each_robots_own_number_of_steps(opened, stores):
    mixture = Mixture([opened["joint"], stores[0]], [1, 1], 4, 0, seconds=0.4)
    policy = make(mixture, chunk_seconds=0.4)
    assert policy.steps("two_arms/joint") == (8, 4) and policy.steps("tabletop") == (4, 2)
    assert policy.act(seen(mixture, 0), "wave", "two_arms/joint").actions.shape == (8, 6)
    window = mixture.window_at(0, 4, 0)  # absolute targets: the policy's first step is the recording's second
    start = int(opened["joint"].episode_starts[4])
    assert np.allclose(window.actions, opened["joint"].action[start + 1 : start + 8 : 2], atol=1e-5)
    assert mixture.window_at(0, 0, 5).valid[:, 0].tolist() == [True, False, False, False]


# --- shares ----------------------------------------------------------------------------------------------------------


def test_temperature_and_natural_shares(opened, stores):
    some = [opened["joint"], stores[0]]
    sizes = np.array([s.num_frames for s in some], float)
    for temperature, power in ((1.0, 1.0), (2.0, 0.5)):
        shares = Mixture(some, [3, 1], 4, 0, temperature=temperature).shares
        expected = np.array([3, 1]) * sizes**power
        assert np.allclose(shares, expected / expected.sum())
    assert Mixture(some, [3, 1], 4, 0).shares == [0.75, 0.25]


def test_a_named_mixture_weights_natural_shares(tmp_path):
    config = MixtureConfig(named="oxe_magic_soup_plus_minus", root=str(tmp_path), datasets=[DatasetConfig(path="mine", weight=2)])
    datasets, temperature = all_datasets(config)
    weights = {Path(d.path).name: d.weight for d in datasets}
    assert len(datasets) == 26 and temperature == 1.0
    assert weights["nyu_franka_play_dataset_converted_externally_to_rlds"] == 3.0 and weights["mine"] == 2
    with pytest.raises(UsageError, match="oxe_magic_soup_plus"):
        all_datasets(MixtureConfig(named="oxe_magic_soup_plu"))
    with pytest.raises(ValueError, match="no datasets"):
        MixtureConfig()
    (tmp_path / "mine.yaml").write_text("balanse: frames\ndatasets: [{nam: a}]")
    with pytest.raises(UsageError, match="did you mean 'balance'"):
        all_datasets(MixtureConfig(named=str(tmp_path / "mine.yaml")))


class Sharded:
    """A store of E episodes of 10 frames whose pictures lie in shards of 3 episodes."""

    def __init__(self, episodes: int) -> None:
        self.num_episodes, self.root, self.spec = episodes, Path("streamed"), load_embodiment("tabletop")
        self.episode_starts = np.arange(episodes + 1) * 10
        self.shards = np.unique(np.append(self.episode_starts[::3], episodes * 10))
        self.asked: list[tuple[int, ...]] = []

    def prefetch(self, *shards: int) -> None:
        self.asked.append(shards)


def test_a_streamed_dataset_is_drawn_a_few_shards_at_a_time(stores):
    store: EpisodeStore = Sharded(40)  # pyright: ignore[reportAssignmentType]
    mixture = Mixture([store], [1.0], 4, 0, holdout=0.1)
    size = len(mixture)
    assert size == 360
    located = [mixture.locate(n) for n in range(2 * size)]
    frames = [e * 10 + t for _, e, t in located]
    assert len(set(frames[:size])) == len(set(frames[size:])) == size and frames[:size] != frames[size:]
    assert {e for _, e, _ in located} == set(mixture.episodes[0].tolist())
    shards = [e // 3 for _, e, _ in located[:size]]
    for at in range(0, size - 30, 10):  # any 30 draws in a row touch at most two groups of shards
        assert len(set(shards[at : at + 30])) <= 2 * SHARDS_AT_ONCE
    assert len(set(shards[:60])) > 1 and shards[:60] != sorted(shards[:60])
    for n in range(size):  # what `window` does before it reads
        mixture._look_ahead(0, n)
    assert len(store.asked) == -(-len(set(shards)) // SHARDS_AT_ONCE)  # pyright: ignore[reportAttributeAccessIssue]
    for at, group in enumerate(store.asked[:-1]):  # pyright: ignore[reportAttributeAccessIssue]
        assert set(group) == set(dict.fromkeys(shards).keys() & set(group)) and len(group) <= SHARDS_AT_ONCE
        first = min(i for i, shard in enumerate(shards) if shard in group)
        assert first > at * 30  # asked for before the first of its frames is drawn


def test_preview_counts_what_is_really_drawn(opened, stores):
    config = TrainConfig.model_validate({"run": {"out": "x", "steps": 100}, "mixture": {"datasets": [{"path": "x"}]},
                                         "policy": {"chunk": 4, "execute": 2, "chunk_seconds": 0.4}})  # fmt: skip
    mixture = Mixture([opened["joint"], stores[0]], [1, 3], 4, 0, seconds=0.4)
    result = preview(config, mixture)
    wasted = 0.0
    for d, line in enumerate(result["datasets"]):
        windows = [mixture.window_at(d, *mixture.place(d, i)) for i in range(mixture.sizes[d])]
        covered = np.mean([w.valid[:, 0].mean() for w in windows])
        assert line["padded_steps"] == pytest.approx(1 - covered)
        assert line["epochs"] == round(line["share"] * 100 * 32 / mixture.sizes[d], 2)
        wasted += line["share"] * (1 - covered * line["action_dim"] / 6)
    assert result["waste"] == pytest.approx(wasted, abs=1e-3) and [x["chunk"] for x in result["datasets"]] == [8, 4]
    outside = (opened["joint"].action < np.quantile(opened["joint"].action.astype(float), 0.01, axis=0)).mean()
    assert result["datasets"][0]["clipped"]["action"] == pytest.approx(2 * outside, abs=0.02)


# --- words -----------------------------------------------------------------------------------------------------------

COLOURS = {"red": (220, 30, 30), "green": (30, 200, 30), "blue": (30, 30, 230)}


@pytest.fixture(scope="module")
def quiz(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("quiz")
    entries = []
    for i in range(12):
        colour = list(COLOURS)[i % 3]
        Image.new("RGB", (40, 30), COLOURS[colour]).save(root / f"{i}.png")
        turns = [{"from": "human", "value": "<image>\nwhat colour is it?"}, {"from": "gpt", "value": f"it is {colour}"}]
        entries.append({"id": i, "image": f"{i}.png", "conversations": turns})
    (root / "quiz.json").write_text(json.dumps(entries))
    return root / "quiz.json"


def test_questions_have_exactly_their_share_and_the_stream_stays_pure(opened, quiz):
    mixture = Mixture([opened["joint"]], [1], 4, 0, answers=(Answers(quiz), 0.25))
    owners = Counter(mixture.locate(n)[0] for n in range(BLOCK))
    assert owners[-1] == BLOCK // 4 and mixture.report(10, 32)[1]["share"] == 0.25
    first = [mixture.locate(n) for n in range(500)]
    again = Mixture([opened["joint"]], [1], 4, 0, answers=(Answers(quiz), 0.25))
    assert [again.locate(n) for n in reversed(range(500))][::-1] == first
    asked = [pair for d, pair, _ in first if d == -1][:12]
    assert len(set(asked)) == 12  # each once in an epoch


def test_a_policy_learns_to_answer_beside_acting(opened, quiz):
    mixture = Mixture([opened["joint"]], [1], 4, 0, answers=(Answers(quiz), 0.5))
    policy = make(mixture).train()
    optimizer = torch.optim.AdamW(policy.parameters(), lr=3e-3)
    for step in range(60):
        loss = policy.loss(policy.collate([policy.encode(mixture.window(step * 16 + i)) for i in range(16)]))
        assert int(loss.answer_count) > 0 and int(loss.action_count) > 0
        optimizer.zero_grad()
        loss.total(policy.loss_weights, loss.counts).backward()
        optimizer.step()
    policy.eval()
    said = {name: policy.answer(np.full((30, 40, 3), rgb, np.uint8), "what colour is it?") for name, rgb in COLOURS.items()}
    assert said == {name: f"it is {name}" for name in COLOURS}


def test_an_answer_is_read_from_left_to_right(opened, quiz):
    mixture = Mixture([opened["joint"]], [1], 4, 0, answers=(Answers(quiz), 0.5))
    policy = make(mixture)
    example = policy.encoder.question(Answers(quiz).question(0))
    changed = replace(example, ids=np.append(example.ids[:-1], example.ids[-1] - 1))
    T = len(example.ids)
    a, b = (policy._hidden(policy.collate([e]))[0, :T] for e in (example, changed))
    assert torch.allclose(a[: T - 1], b[: T - 1], atol=1e-5) and not torch.allclose(a[T - 1], b[T - 1], atol=1e-3)


@pytest.mark.parametrize(("entries", "said"), [
    ([{"image": "../outside.png", "conversations": []}], "outside.png"),
    ([{"image": "0.png", "conversations": [{"from": "human", "value": "why"}]}], "no human turn"),
    ([{"conversations": [{"from": "human", "value": ""}, {"from": "gpt", "value": "x"}]}], "1 left out"),
    ([{"image": "/etc/passwd", "conversations": []}], "passwd"),
    ([], "no question"), ({"a": 1}, "no list of conversations"),
])  # fmt: skip
def test_broken_question_files_are_named(quiz, tmp_path, entries, said):
    Image.new("RGB", (4, 4)).save(tmp_path / "0.png")
    (tmp_path / "bad.json").write_text(json.dumps(entries))
    with pytest.raises(DataError, match=said):
        Answers(tmp_path / "bad.json")


def test_very_long_answers_are_left_out_and_counted(quiz):
    entries = json.loads(quiz.read_text())
    entries[3]["conversations"][1]["value"] = "x" * 2001
    (quiz.parent / "long.json").write_text(json.dumps(entries))
    answers = Answers(quiz.parent / "long.json")
    assert len(answers) == 11 and answers.left_out == 1


def test_a_batch_without_pictures_still_moves_every_gradient(opened, tmp_path):
    """Two ranks reduce the same tensors, and a checkpoint knows every parameter, whatever a batch holds."""
    turns = [{"from": "human", "value": "what is it?"}, {"from": "gpt", "value": "a cube"}]
    (tmp_path / "words.json").write_text(json.dumps([{"conversations": turns}]))
    mixture = Mixture([opened["joint"]], [1], 4, 0, answers=(Answers(tmp_path / "words.json"), 0.5))
    policy = make(mixture).train()
    asked = [n for n in range(40) if mixture.locate(n)[0] == -1][:2]
    batch = policy.collate([policy.encode(mixture.window(n)) for n in asked])
    assert len(batch.images) == 0
    loss = policy.loss(batch)
    loss.total(policy.loss_weights, loss.counts).backward()
    assert [name for name, p in policy.named_parameters() if p.grad is None] == []
    assert not policy.get_parameter("model.tower.early.0.weight").grad.any()  # pyright: ignore
    assert policy.get_parameter("model.lm_head.weight").grad.any()  # pyright: ignore


# --- a robot added later ---------------------------------------------------------------------------------------------


def run_config(out: Path, datasets: list[dict], cache: Path, **more) -> TrainConfig:
    return TrainConfig.model_validate({
        "run": {"out": str(out), "steps": 4, "log_every": 2, "eval_every": 4, "save_every": 4, "precision": "no", "processes": 1},
        "mixture": {"datasets": datasets, "cache_dir": str(cache)}, "optim": {"batch": 4, "warmup": 1, "lr": 1e-2}, **more,
    })  # fmt: skip


def test_a_new_robot_changes_no_other_robots_answers(arms, demos, tmp_path):
    cache = tmp_path / "cache"
    settings = {"backbone": SMALL, "chunk": 4, "execute": 2, "soft_tokens": 2, "prompt": "robot-1"}
    both = [{"path": str(arms["joint"])}, {"path": str(demos["tabletop"])}]
    train(run_config(tmp_path / "first", both, cache, policy=settings))
    start = {"policy": str(tmp_path / "first"), "train": "robots"}
    train(run_config(tmp_path / "second", [{"path": str(arms["delta"])}], cache, start=start))
    before, after = load_policy(tmp_path / "first"), load_policy(tmp_path / "second")
    assert list(after.embodiments) == ["two_arms/joint", "tabletop", "two_arms/delta"]
    mixture = Mixture([EpisodeStore.open(p, cache, progress=False) for p in (arms["joint"], demos["tabletop"], arms["delta"])],
                      [1, 1, 1], 4, 0)  # fmt: skip
    for d, key in enumerate(before.embodiments):
        for episode in (0, 3):
            look = mixture.window_at(d, episode, 0)
            one, two = (p.act({"images": look.images, "state": look.state}, look.instruction, key) for p in (before, after))
            assert np.array_equal(one.actions, two.actions) and np.array_equal(one.confidence, two.confidence)
        assert before.normalizers[key]["action"].fingerprint == after.normalizers[key]["action"].fingerprint
    (tmp_path / "first").rename(tmp_path / "elsewhere")  # a run that was started from a policy no longer needs it
    more = run_config(tmp_path / "second", [{"path": str(arms["delta"])}], cache, start=start)
    train(more.model_copy(update={"run": more.run.model_copy(update={"save_every": 2})}), resume=True)
    old, new = before.state_dict(), after.state_dict()
    changed = [name for name in new if name not in old or not torch.equal(old[name], new[name][: len(old[name])])]
    assert changed == [] and new["model.robots.weight"].shape[0] == 3
    assert after.act(seen(mixture, 2), "wave", "two_arms/delta").actions.shape == (4, 6)
    assert len(after.provenance["datasets"]) == 3


def test_what_does_not_fit_a_trained_policy_is_refused(arms, opened, tmp_path):
    from vla.policy import extend_policy

    policy = make(Mixture([opened["joint"]], [1], 4, 0))
    wide = two_arms(name="wide").model_copy(update={"action": (channel("joints", 9, "joint_position"),)})
    mixture = Mixture([opened["joint"]], [1], 4, 0, specs=[wide])
    with pytest.raises(UsageError, match="9 action"):
        extend_policy(policy, mixture)
    other = two_arms().model_copy(update={"control_hz": 5})
    with pytest.raises(UsageError, match="control_hz"):
        extend_policy(policy, Mixture([opened["joint"]], [1], 4, 0, specs=[other]))
    with pytest.raises(UsageError, match="no soft tokens"):
        extend_policy(make(Mixture([opened["joint"]], [1], 4, 0), soft_tokens=0), Mixture([opened["delta"]], [1], 4, 0))
    renamed = two_arms().model_copy(update={"cameras": {c: Camera(height=32, width=32) for c in ("up", "wrist")}})
    with pytest.raises(UsageError, match=r"cameras \['top', 'up'\]"):
        extend_policy(policy, Mixture([opened["joint"]], [1], 4, 0, specs=[renamed]))
    many = two_arms(name="many").model_copy(update={"cameras": {f"c{i}": Camera(height=8, width=8) for i in range(9)}})
    with pytest.raises(UsageError, match="at most 8"):
        make(Mixture([opened["joint"]], [1], 4, 0, specs=[many]))
    with pytest.raises(ValueError, match="exclude each other"):
        run_config(tmp_path, [{"path": "x"}], tmp_path, start={"policy": "x"}, policy={"chunk": 16})


def test_the_shipped_config_of_five_robots_is_valid():
    config = load_config("train/robots", [], TrainConfig)
    assert len(config.mixture.datasets) == 5 and config.policy.chunk_seconds and config.policy.soft_tokens
    assert SimpleNamespace(**config.policy.model_dump()).prompt == "robot-1"


def test_training_is_refused_before_the_first_step_when_a_dataset_is_at_fault(tmp_path, capsys):
    from vla.cli import main

    spec = two_arms("delta")
    with LeRobotWriter(tmp_path / "same", spec) as writer:
        rng = np.random.default_rng(0)
        for _ in range(4):  # recorded with the wrong source: the "action" is the state (GR00T#137)
            state = np.cumsum(rng.normal(0, 0.1, (20, 6)), 0).astype(np.float32)
            frames = {c: rng.integers(0, 256, (20, 32, 32, 3), dtype=np.uint8) for c in spec.cameras}
            writer.add(Episode(frames, state, state.copy(), "wave", spec.name))
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(run_config(tmp_path / "run", [{"path": str(tmp_path / "same")}],
                                                                 tmp_path / "cache").model_dump(mode="json")))  # fmt: skip
    assert main(["train", str(tmp_path / "run.yaml")]) == 3
    said = capsys.readouterr().err
    assert "before the first step" in said and "action-is-state" in said and "--no-check" in said
    assert not (tmp_path / "run").exists()
