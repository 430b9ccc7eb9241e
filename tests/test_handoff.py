"""Hand-off: promises kept over many trials, detectors that see what is there, a gate that refuses what is not its own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from handoffs import POLICY, bare_policy, calibrated, rollouts
from hypothesis import given
from hypothesis import strategies as st
from small_policies import seen, small_policy, write_policy

from vla.cli import main
from vla.errors import CheckpointError, DataError, UsageError
from vla.handoff.calibrating import calibrate
from vla.handoff.conformal import beta_cdf, coverage_band, guarantee, needed, observed_band, rank, threshold
from vla.handoff.detectors import FUSED, Fitted, Gauss
from vla.handoff.gate import FILE, WEIGHTS, Gate, Handoff, read_handoff, renamed, write_handoff
from vla.handoff.learning import choose, cross_validated, fit, fit_head
from vla.handoff.measures import Pairs, area, asked_at, curve, detection, outcome_of, values_of
from vla.handoff.report import draw, report, report_text
from vla.handoff.rollouts import load, save
from vla.handoff.scores import NEEDS, Running, Scorer, running, usable
from vla.policy import load_policy
from vla.policy.inside import act_inside

# ------------------------------------------------------------------------------------------------------- the promise


@pytest.mark.parametrize(("n", "low", "high"), [(50, 0.784, 0.973), (200, 0.845, 0.943), (1000, 0.872, 0.924)])
def test_true_coverage_lies_in_its_band_over_many_trials(n: int, low: float, high: float):
    """The bands of split conformal prediction at alpha 0.1, as simulated elsewhere, and here."""
    band = coverage_band(n, 0.1)
    assert abs(band.low - low) < 0.006 and abs(band.high - high) < 0.006
    rng = np.random.default_rng(n)
    true = np.array([threshold(rng.random(n), 0.1) for _ in range(2000)])  # of uniform scores, the coverage itself
    assert abs(true.mean() - band.mean) < 0.005 and band.mean >= 0.9
    inside = ((true >= band.low) & (true <= band.high)).mean()
    assert 0.97 <= inside <= 0.99


def test_coverage_seen_on_further_episodes_lies_in_a_wider_band():
    n, m, rng = 200, 120, np.random.default_rng(3)
    band, narrow = observed_band(n, m, 0.1), coverage_band(n, 0.1)
    assert band.low < narrow.low and band.high > narrow.high
    trials = np.array([(rng.normal(size=m) <= threshold(rng.normal(size=n), 0.1)).mean() for _ in range(2000)])
    assert 0.975 <= ((trials >= band.low) & (trials <= band.high)).mean() <= 1.0
    assert ((trials >= narrow.low) & (trials <= narrow.high)).mean() < 0.95, "the chance of the second sample counts"


def test_a_threshold_is_the_kth_score_and_infinite_where_there_are_too_few():
    assert threshold(range(1, 10), 0.1) == 9 and threshold(range(1, 9), 0.1) == np.inf
    assert needed(0.1) == 9 and needed(0.02) == 49 and rank(199, 0.1) == 180
    for alpha in (0.0, 1.0, -0.5, float("nan")):
        with pytest.raises(UsageError):
            threshold([1.0], alpha)


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=60), st.floats(0.01, 0.99))
def test_no_more_calibration_scores_exceed_it_than_promised(scores: list[float], alpha: float):
    assert np.mean(np.array(scores) > threshold(scores, alpha)) <= alpha + 1e-9
    assert threshold(scores, alpha) >= threshold(scores, min(0.995, alpha + 0.1))


def test_beta_distribution_of_whole_numbers():
    assert beta_cdf(0.3, 1, 1) == pytest.approx(0.3) and beta_cdf(0.3, 2, 1) == pytest.approx(0.09)
    assert beta_cdf(0.3, 1, 2) == pytest.approx(1 - 0.49) and beta_cdf(0.0, 3, 4) == 0 and beta_cdf(1.0, 3, 4) == 1
    draws = np.random.default_rng(0).beta(181, 20, 40_000)
    assert beta_cdf(0.9, 181, 20) == pytest.approx((draws <= 0.9).mean(), abs=0.01)


def test_the_sentence_says_when_the_promise_fails():
    said = guarantee(200, 0.1, ["noise"])
    assert "n=200" in said and "84.6 to 94.3" in said and "distribution shift" in said and "noise" in said


# ---------------------------------------------------------------------------------------------------------- scores


def chunk(actions, sure: float = 0.8) -> SimpleNamespace:
    actions = np.asarray(actions, np.float32)
    return SimpleNamespace(actions=actions, confidence=np.full(actions.shape, sure, np.float32))


def test_chunks_that_agree_on_their_common_steps_have_no_overlap():
    scorer, way = Scorer(np.array([2.0, 1.0, 0.0])), np.random.default_rng(0).normal(size=(20, 3))
    assert scorer(0, chunk(way[:8]))["overlap"] == 0
    assert scorer(4, chunk(way[4:12]))["overlap"] == 0
    off = way[8:16].copy()
    off[:, 0] += 1.0  # half of its range
    off[:, 2] += 9.0  # never moves, never counts
    assert scorer(8, chunk(off))["overlap"] == pytest.approx(0.25)
    assert scorer(30, chunk(off))["overlap"] == 0, "nothing in common"
    scorer.reset()
    assert scorer(4, chunk(way[:8]))["overlap"] == 0


def test_entropy_is_what_confidence_lacks_and_absent_where_there_is_none():
    sure = chunk(np.zeros((4, 2)))
    sure.confidence[1, 1] = 0.3
    found = Scorer(np.ones(2))(0, sure)
    assert found["entropy"] == pytest.approx(1 - (7 * 0.8 + 0.3) / 8) and found["entropy_max"] == pytest.approx(0.7)
    assert "entropy" not in Scorer(np.ones(2))(0, chunk(np.zeros((4, 2)), np.nan))


def test_draws_that_scatter_and_draws_that_depart():
    rng, scorer = np.random.default_rng(1), Scorer(np.ones(2))
    tight = 0.01 * rng.normal(size=(16, 8, 2))
    assert scorer(0, chunk(tight[0]), samples=tight)["spread"] == pytest.approx(0.01, rel=0.2)
    same = scorer(4, chunk(tight[0]), samples=0.01 * rng.normal(size=(16, 8, 2)))["stac"]
    apart = scorer(8, chunk(tight[0] + 0.5), samples=tight + 0.5)["stac"]
    assert 0 <= same < 0.01 and apart > 0.8
    assert "stac" not in Scorer(np.ones(2))(0, chunk(tight[0])) and "spread" not in Scorer(np.ones(2))(0, chunk(tight[0]))


def test_a_distance_is_one_where_it_was_fitted_and_grows_beyond():
    rng = np.random.default_rng(2)
    mixing = rng.normal(size=(12, 12))
    gauss = Gauss.fit(rng.normal(size=(2000, 12)) @ mixing)
    inside = gauss(rng.normal(size=(500, 12)) @ mixing)
    assert inside.mean() == pytest.approx(1, abs=0.1)
    assert (gauss((5 + rng.normal(size=(500, 12))) @ mixing) > 3).mean() > 0.95


def test_running_values():
    assert running([1, 3, 2], "max").tolist() == [1, 3, 3] and running([1, 3, 2], "mean").tolist() == [1, 2, 2]
    so_far = Running("mean")
    assert so_far(4.0) == 4.0 and so_far(0.0) == 2.0
    assert usable(["entropy", "stac", "learned"], features=False, samples=True) == ["entropy", "stac"]
    assert set(NEEDS.values()) == {"features", "samples"}


# ---------------------------------------------------------------------------------------------------- hidden states


@pytest.mark.parametrize("config", [{}, {"decoding": "autoregressive"}, {"head": "l1"}], ids=["parallel", "symbols", "l1"])
def test_a_chunk_with_its_hidden_states_is_the_same_chunk(tmp_path: Path, config: dict):
    policy = small_policy(tmp_path / "data", **config)
    looks = [seen(n) for n in range(3)]
    told = ["do thing 0", "do thing 1", "do thing 2"]
    plain = policy.act_batch(looks, told, "tabletop", seeds=[5, 6, 7])
    found = act_inside(policy, looks, told, "tabletop", seeds=[5, 6, 7], samples=3)
    for one, other in zip(plain, found, strict=True):
        np.testing.assert_array_equal(one.actions, other.chunk.actions)
        np.testing.assert_array_equal(one.confidence, other.chunk.confidence)
        assert other.features.shape == (32,) and np.isfinite(other.features).all()
        assert other.samples.shape == (3, *one.actions.shape)
    assert not np.allclose(found[0].features, found[1].features)
    again = act_inside(policy, looks, told, "tabletop", seeds=[5, 6, 7], samples=3)
    np.testing.assert_array_equal(found[2].samples, again[2].samples)
    if "head" not in config:
        assert len({found[0].samples[k].tobytes() for k in range(3)}) == 3, "three draws are three"


def test_features_are_the_mean_of_what_symbols_are_read_from(tmp_path: Path):
    policy = small_policy(tmp_path / "data")
    batch = policy.batch_of([seen()], ["do thing 0"], "tabletop")
    (found,) = act_inside(policy, [seen()], ["do thing 0"], "tabletop")
    np.testing.assert_allclose(found.features, policy.acts(batch)[0].mean(0).detach().numpy(), atol=1e-6)
    assert found.samples.shape == (0, *found.chunk.actions.shape)


# -------------------------------------------------------------------------------------------------------- measures


def test_auroc_counts_pairs():
    pairs = Pairs.of(np.array([1.0, 2.0, 3.0, 2.0]), np.array([False, False, True, True]))
    assert pairs.value == pytest.approx((1 + 1 + 1 + 0.5) / 4)
    share = pairs.share()
    assert share.low <= share.value <= share.high


def test_a_clock_tells_long_episodes_apart_and_nothing_at_the_same_look():
    found = rollouts(600, 5)
    whole, matched = detection(found, values_of(found, "clock", "max"))
    assert whole.value == 1.0 and matched.value == 0.5
    entropy, noise = (detection(found, values_of(found, name, "mean")) for name in ("entropy", "overlap"))
    assert entropy[1].value > 0.75 and abs(noise[1].value - 0.5) < 0.06
    assert detection(found, values_of(found, "overlap", "max"))[0].value > 0.7, "a maximum of noise grows with the time"


def test_asking_ends_in_what_help_would_have_done():
    found = rollouts(60, 6)
    values = values_of(found, "entropy", "max")
    never = asked_at(found, values, np.inf)
    assert (never == -1).all() and (outcome_of(found, never) == found.success).all()
    always = asked_at(found, values, -np.inf)
    assert (always == 0).all() and outcome_of(found, always).all()
    last = np.where(found.success, -1, found.looks - 1)
    assert (outcome_of(found, last) == found.success).all(), "asked when it is too late"
    points = curve(found, values)
    assert points[0] == {"questions": 0.0, "success": pytest.approx(found.success.mean())}
    assert [p["questions"] for p in points] == sorted(p["questions"] for p in points)


def test_the_area_is_one_for_who_knows_and_nothing_at_random():
    never, always = 0.6, 1.0
    knows = [{"questions": 0.0, "success": 0.6}, {"questions": 0.4, "success": 1.0}, {"questions": 1.0, "success": 1.0}]
    assert area(knows, never, always) == pytest.approx(1.0)
    assert area([{"questions": 0.5, "success": 0.8}], never, always) == pytest.approx(0.0)


# ------------------------------------------------------------------------------------------------ learned, calibrated


def test_the_head_learns_and_cross_validation_does_not_flatter():
    train, fresh = rollouts(200, 1, features=24), rollouts(200, 2, features=24)
    assert train.features is not None
    head = fit_head(train, train.features, epochs=60)
    told = fresh.judged(Fitted(head=head))
    figure = detection(told, values_of(told, "learned", "mean"))[1].value
    assert figure > 0.75
    judged = cross_validated(train)
    held, flattered = (detection(r, values_of(r, "learned", "mean"))[1].value for r in (judged, train.judged(Fitted(head=head))))
    assert held < flattered and abs(held - figure) < 0.15
    best, figures = choose(judged)
    assert (
        list(best)[0] in ("entropy", "fused") and figures["entropy"]["max"]["matched"] > 0.7 > figures["stac"]["max"]["matched"]
    )


def test_a_head_is_the_same_in_the_file(tmp_path: Path):
    train = rollouts(80, 1)
    fitted = fit(train)
    again, looks = Fitted.from_arrays(fitted.arrays()), {name: train.scores[name] for name in FUSED}
    told, same = (some.said(train.features, looks) for some in (fitted, again))
    assert told.keys() == {"distance", "learned", "fused"}
    for name, values in told.items():
        np.testing.assert_allclose(same[name], values, rtol=1e-6)
    assert Fitted().said(train.features, looks) == {} and fitted.said(None, {}) == {}
    for wrong in ({"gauss.std": np.array([np.nan])}, {"gauss.width": np.ones(2)}, {"soul.mean": np.ones(2)}):
        with pytest.raises(ValueError):
            Fitted.from_arrays({**fitted.arrays(), **wrong})


def test_calibration_keeps_its_promise_on_fresh_episodes(tmp_path: Path):
    folder = calibrated(tmp_path)
    meaning = json.loads((folder / FILE).read_text())
    assert meaning["score"] in ("learned", "entropy", "fused") and meaning["policy"] == POLICY
    assert meaning["n"] == len(meaning["scores"]["learned"]["successes"]) and meaning["perturb"].keys() == {"none", "noise"}
    found = report(rollouts(600, 9), read_handoff(folder))
    # Forty figures that are inside with 98 % each, and not independent.
    assert sum(entry["inside"] for rates in found["coverage"].values() for entry in rates.values()) >= 36
    best = found["detectors"][meaning["score"]]["matched"]
    assert best["low"] > 0.65 > 0.55 > found["detectors"]["overlap"]["matched"]["value"]
    asked = found["asking"][meaning["score"]]["0.1"]
    assert asked["success"]["rate"] > found["never_asking"]["rate"] + 0.1 and asked["questions_in_successes"]["rate"] < 0.2
    assert found["detectors"]["clock"]["matched"]["value"] == 0.5
    assert "overlap" in report_text(found) and draw(found).count("<polyline") == 5


def test_whole_episodes_keep_the_promise_over_many_calibrations():
    """Running maxima of episodes of any length are exchangeable, whatever the looks within one do."""
    inside = []
    for seed in range(60):
        both = (rollouts(n, 100 + 2 * seed + k, features=1) for k, n in enumerate((120, 200)))
        held, fresh = (some.where(some.success) for some in both)
        quiet = fresh.largest("entropy", "max") <= threshold(held.largest("entropy", "max"), 0.15)
        band = observed_band(len(held), len(fresh), 0.15)
        inside.append(band.low <= quiet.mean() <= band.high)
    assert np.mean(inside) >= 0.93


def test_left_out_words_are_fitted_without(tmp_path: Path):
    handoff = read_handoff(calibrated(tmp_path))
    found = report(rollouts(200, 9), handoff, rollouts(200, 1), ["push", "noise"])
    push, noise = found["left_out"]
    assert push["fitted_on"] == 100 and push["episodes"] == 100 and noise["word"] == "noise"
    assert push["detectors"]["learned"]["against_entropy"]["matched"]["low"] < 0.3
    with pytest.raises(UsageError, match="violet"):
        report(rollouts(200, 9), handoff, rollouts(200, 1), ["violet"])


def test_rollouts_go_through_their_files(tmp_path: Path):
    for n, some in enumerate((rollouts(20, 1), rollouts(30, 2))):
        save(some, tmp_path / str(n))
    both = load([tmp_path / "0", tmp_path / "1"])
    assert len(both) == 50 and both.features is not None and both.relief is not None
    np.testing.assert_array_equal(both.where(np.arange(50) >= 20).scores["entropy"], rollouts(30, 2).scores["entropy"])
    np.testing.assert_array_equal(both.features[: len(rollouts(20, 1).step)], rollouts(20, 1).features)
    assert both.episodes["task"].tolist()[:2] == ["touch-red", "push-red-left"] and both.about("push").sum() == 25
    with pytest.raises(UsageError, match="more than one"):
        load([tmp_path / "0", tmp_path / "0"])
    save(rollouts(20, 3, policy="b" * 64), tmp_path / "other")
    with pytest.raises(UsageError, match="policy"):
        load([tmp_path / "0", tmp_path / "other"])
    (tmp_path / "0" / "looks.parquet").write_bytes(b"PAR1")
    with pytest.raises(DataError, match="collect"):
        load([tmp_path / "0"])


def test_what_does_not_belong_together_is_refused(tmp_path: Path):
    folder = bare_policy(tmp_path)
    with pytest.raises(UsageError, match="policy"):
        calibrate(folder, None, rollouts(100, 2, policy="b" * 64))
    with pytest.raises(UsageError, match="other scenes"):
        calibrate(folder, rollouts(100, 2), rollouts(100, 2))
    with pytest.raises(DataError, match="successful"):
        calibrate(folder, None, rollouts(40, 2), alpha=0.001)
    with pytest.raises(UsageError, match="--score"):
        calibrate(folder, None, rollouts(40, 2), score="learned")
    assert not (folder / FILE).exists()
    meaning = calibrate(folder, None, rollouts(100, 2))  # what needs no fitting
    assert meaning["scores"].keys() == set(FUSED) and not (folder / WEIGHTS).exists()
    with pytest.raises(UsageError, match="made of"):
        report(rollouts(100, 2), read_handoff(folder))
    with pytest.raises(DataError, match="relief"):
        report(rollouts(100, 3, relief=False), read_handoff(folder))


# ------------------------------------------------------------------------------------------------------------ the gate


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return calibrated(tmp_path_factory.mktemp("gate"), score="entropy")


def test_the_rarest_response_that_is_reached_is_said_and_stands(folder: Path):
    gate = Gate.load(folder, {"hold": 0.02, "ask": 0.3, "retreat": 0.006})
    (ask, low), (hold, middle), (retreat, high) = gate.thresholds
    assert (ask, hold, retreat) == ("ask", "hold", "retreat") and low < middle < high
    gate.thresholds = [("ask", 0.3), ("hold", 0.5), ("retreat", 0.9)]
    gate._kind = "max"
    gate.reset()

    def says(unsure: float) -> str:
        return gate.look(chunk(np.zeros((8, 4)), 1 - unsure)).say

    assert [says(u) for u in (0.1, 0.4, 0.1, 0.6, 0.2, 0.95)] == ["fine", "ask", "ask", "hold", "hold", "retreat"]
    assert gate.questions == 1, "one call, however it grows"
    gate.answered()
    assert says(0.1) == "fine" and says(0.4) == "ask" and gate.questions == 2
    gate.reset()
    assert gate.questions == 0 and says(0.2) == "fine"
    ruling = gate.look(chunk(np.zeros((8, 4)), 0.5))
    assert ruling.score == "entropy" and "0.5, above" in ruling.reason and ruling.scores["overlap"] == 0


def test_a_gate_fires_as_often_as_it_was_told_to(folder: Path):
    """Over whole episodes of fresh looks, from the numbers a robot would have."""
    gate, fresh = Gate.load(folder, {"ask": 0.2}), rollouts(500, 11)
    good = fresh.where(fresh.success)
    asked = 0
    for a, b in zip(good.starts[:-1], good.starts[1:], strict=True):
        gate.reset()
        asked += any(gate.look(chunk(np.zeros((8, 4)), 1 - score)).say != "fine" for score in good.scores["entropy"][a:b])
    band = observed_band(gate.handoff.n("entropy"), len(good), 0.2)
    assert 1 - band.high <= asked / len(good) <= 1 - band.low


def test_what_a_detector_looks_at_must_be_there(tmp_path: Path):
    gate = Gate.load(calibrated(tmp_path, score="learned"))
    assert gate.needs == "features" and gate.samples == 0
    with pytest.raises(UsageError, match="a look without features"):
        gate.look(chunk(np.zeros((8, 4))))
    gate.reset()
    rulings = gate.look(chunk(np.zeros((8, 4))), features=np.zeros(6, np.float32))
    assert rulings.scores.keys() == {"entropy", "entropy_max", "overlap", "learned", "distance"}
    fused = Gate.load(tmp_path, score="fused")
    assert (fused.needs, fused.samples) == ("samples", 8)
    assert "fused" in fused.look(chunk(np.zeros((8, 4))), samples=np.zeros((8, 8, 4))).scores
    with pytest.raises(UsageError, match="without confidence"):
        Gate.load(tmp_path, score="entropy").look(chunk(np.zeros((8, 4)), np.nan))
    for respond, score in (({"shout": 0.1}, None), ({"ask": 0.0001}, None), ({"ask": 2.0}, None), ({"ask": 0.1}, "luck")):
        with pytest.raises(UsageError):
            Gate.load(tmp_path, respond, score)


def test_another_policys_thresholds_and_edited_ones_are_refused(tmp_path: Path):
    folder = calibrated(tmp_path)
    whole = json.loads((folder / FILE).read_text())

    def refused(words: str) -> None:
        with pytest.raises(CheckpointError, match=words):
            Gate.load(folder)

    bare_policy(folder, "c" * 64)
    refused("calibrated on policy aaaaaaaaaaaa")
    bare_policy(folder)
    Gate.load(folder)
    (folder / FILE).write_text(json.dumps({**whole, "alpha": 0.5}))
    refused("another content")
    (folder / FILE).write_text(json.dumps({k: v for k, v in whole.items() if k != "scale"}))
    refused("scale")
    (folder / FILE).write_text("{")
    refused("JSON")
    (folder / FILE).write_text(json.dumps(whole))
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-8])
    refused("another content")
    (folder / WEIGHTS).unlink()
    refused(WEIGHTS)
    (folder / FILE).unlink()
    refused("no handoff.json")
    (folder / "policy.json").unlink()
    (folder / FILE).write_text(json.dumps(whole))
    refused("no policy.json")
    (folder / "export.json").write_text(json.dumps({"policy": POLICY}))  # beside an export of the policy
    refused(WEIGHTS)


def test_a_robot_needs_no_torch_for_it(folder: Path):
    code = (
        "import sys, numpy as np; from types import SimpleNamespace as N; from vla.handoff.gate import Gate\n"
        "gate = Gate.load(sys.argv[1]); c = N(actions=np.zeros((8, 4)), confidence=np.full((8, 4), .5))\n"
        "print(gate.look(c, features=np.zeros(6)).say, sorted({'torch', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code, str(folder)], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() in ("fine []", "ask []"), done.stderr


def test_facts_for_a_card(folder: Path):
    facts = read_handoff(folder).facts()
    assert facts["score"] == "entropy" and facts["n"] > 200 and "distribution shift" in facts["says"]
    assert isinstance(read_handoff(folder), Handoff)


def test_a_pushed_policy_takes_its_gate_along(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    policy = write_policy(tmp_path)
    name = calibrated(tmp_path / "made")
    handoff = read_handoff(name)
    write_handoff(tmp_path / "policy", {**handoff.meaning, "policy": policy.fingerprint}, handoff.fitted.arrays())
    assert main(["push", str(tmp_path / "policy"), "you/gated", "--hub", str(tmp_path / "hub"), "--no-latency", "--json"]) == 0
    there = Path(json.loads(capsys.readouterr().out)["where"])
    card = (there / "README.md").read_text()
    assert "## When it asks" in card and read_handoff(tmp_path / "policy").says() in card and "touch-red, push-red-left" in card
    assert Gate.load(there).score == handoff.meaning["score"] and load_policy(there, "cpu").fingerprint == policy.fingerprint
    (there / FILE).unlink()
    (there / FILE).write_text(renamed(handoff, policy.fingerprint))
    Gate.load(there)
    write_handoff(tmp_path / "policy", handoff.meaning, handoff.fitted.arrays())
    assert main(["push", str(tmp_path / "policy"), "you/gated", "--hub", str(tmp_path / "hub"), "--no-latency"]) == 4


def test_the_command_calibrates_and_reports(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    folder = bare_policy(tmp_path / "policy")
    for name, some in (("train", rollouts(80, 1)), ("held", rollouts(120, 2)), ("report", rollouts(120, 3))):
        save(some, tmp_path / name)
    place = {name: str(tmp_path / name) for name in ("train", "held", "report")}
    said = ["handoff", "calibrate", str(folder), "--calibrate", place["held"], "--alpha", "0.2", "--json"]
    assert main(said) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["alpha"] == 0.2 and told["n"] > 50 and "successes" not in told["scores"]["entropy"]
    svg, figures = tmp_path / "curve.svg", tmp_path / "figures.json"
    said = ["handoff", "report", str(folder), "--rollouts", place["report"], "--leave-out", "push"]
    assert main([*said, "--train", place["train"], "--out", str(figures), "--svg", str(svg)]) == 0
    assert "coverage of" in capsys.readouterr().out and svg.read_text().startswith("<svg")
    assert json.loads(figures.read_text())["left_out"][0]["word"] == "push"
    assert main(said) == 2, "nothing to fit to without it"
