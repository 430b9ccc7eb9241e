"""Figures of an evaluation: Wilson intervals, percentages, the table for a terminal; and the command that prints it."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest
from fake_sims import FakePolicy, fake_pool, row, run
from hypothesis import given
from hypothesis import strategies as st

from vla.evaluate import text_table, wilson
from vla.evaluate.command import add_eval_parser, run_folder
from vla.report import write_report
from vla.report.lines import lines_of, percent


@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_matches_published_values(successes, n, low, high):
    # R. G. Newcombe 1998, "Two-sided confidence intervals for the single proportion", table I, method 3.
    assert wilson(successes, n) == pytest.approx((low, high), abs=5e-5)


@given(st.integers(1, 500).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_bounds_are_where_the_score_test_rejects(pair):
    successes, n = pair
    for bound in wilson(successes, n):
        assert (successes / n - bound) ** 2 == pytest.approx(1.959963984540054**2 * bound * (1 - bound) / n, abs=1e-9)


@given(st.integers(0, 500).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_holds_the_rate_and_is_symmetric(pair):
    successes, n = pair
    low, high = wilson(successes, n)
    assert 0 <= low <= (successes / n if n else 0.5) <= high <= 1
    assert wilson(n - successes, n) == pytest.approx((1 - high, 1 - low))


def test_wilson_refuses_nonsense():
    with pytest.raises(ValueError):
        wilson(3, 2)


def test_percent_never_claims_all_or_nothing_falsely():
    assert [percent(n / 200) for n in (0, 1, 195, 199, 200)] == ["0", "0.5", "98", "99.5", "100"]


@pytest.fixture(scope="module")
def pool():
    with fake_pool() as running:
        yield running


def test_text_table_has_every_line(pool):
    results = run(FakePolicy(), pool)
    text = text_table(results)
    for label in (
        "policy",
        "swap: does the given",
        "swap: does the original",
        "expert",
        "0/30    0 [0, 11]",
        "30/30  100 [89, 100]",
    ):
        assert label in text
    assert [label for label, _ in lines_of(results["rows"])][0] == "policy"
    assert "on the same seeds, only `train` the same tasks on recorded ones" in text
    fresh = {**results, "rows": [r for r in results["rows"] if r["condition"] != "train"]}
    assert "every line plays the same tasks on the same seeds\n" in text_table(fresh)
    many = {**results, "rows": [{**row(results, "policy"), "group": f"task-{i}"} for i in range(7)]}
    assert text_table(many).count("task-") == 7


def test_command_line():
    parser = argparse.ArgumentParser()
    add_eval_parser(parser.add_subparsers())
    args = parser.parse_args("eval runs/x --suite tabletop --task push lift --task touch --episodes 9 --out o.json".split())
    assert args.task == ["push", "lift", "touch"] and args.out == Path("o.json") and args.seed is None and args.run


def test_help_has_an_example(capsys):
    parser = argparse.ArgumentParser()
    add_eval_parser(parser.add_subparsers())
    with pytest.raises(SystemExit):
        parser.parse_args(["eval", "--help"])
    said = capsys.readouterr().out
    assert "vla eval runs/demo --suite tabletop" in said and "Wilson 95 % intervals" in " ".join(said.split())


def test_run_folder_is_recognised(tmp_path):
    (tmp_path / "run/policy").mkdir(parents=True)
    assert run_folder(tmp_path / "run") is None and run_folder(tmp_path / "run/policy") is None  # a checkpoint's folder
    (tmp_path / "run/config.yaml").write_text("{}")
    assert run_folder(tmp_path / "run") == run_folder(tmp_path / "run/policy") == tmp_path / "run"


def test_results_of_several_training_seeds_stand_side_by_side_in_the_report(pool, tmp_path):
    for kind in ("honest", "deaf"):
        run(FakePolicy(kind), pool, ("policy", "swap"), episodes=6, out=tmp_path / f"eval/{kind}.json", clips=0)
    page = write_report(tmp_path).read_text()
    assert "Not yet tried" not in page and "fake: the policy in 2 evaluations" in page
    assert '<p class="over">fake (deaf)</p>' in page and "<td>33–100<small> %</small></td>" in page
    run(FakePolicy(), pool, ("policy",), episodes=6, out=tmp_path / "eval/fake.json", clips=0)
    page = write_report(tmp_path).read_text()
    assert '<p class="over">fake</p>' in page and "the policy in 3 evaluations" in page
