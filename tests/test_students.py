"""Sizes of students: presets and their bounds, what a config may say, and one that fits a latency budget."""

import json
from typing import Any, get_args

import pytest
import torch
import yaml
from pydantic import ValidationError

from vla.backbones import Sizes, StudentConfig
from vla.backbones.student import StudentNet, network_config
from vla.cli import main
from vla.config import validate
from vla.errors import MachineError, UsageError
from vla.policy import PolicyConfig
from vla.students import LIMITS, PRESETS, Budget, StudentChoice, cost, fit, parameters, preset, resolve
from vla.students.budget import GRID, grid
from vla.students.presets import SIZES
from vla.students.presets import __doc__ as table
from vla.students.timing import TORCH, timed

COUNTS = {"xs": 7_767_232, "s": 21_740_608, "m": 56_418_624, "rt1": 33_800_824}


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_within_their_bounds_and_cost_what_is_said(name):
    config = preset(name)
    before = torch.get_rng_state()
    found = cost(config, SIZES)
    assert torch.equal(torch.get_rng_state(), before)
    assert found["parameters"] == COUNTS[name] == parameters(config, SIZES) <= LIMITS[name]
    assert config.image_size == 224 and config.text_vocab == 512
    said = next(line.split() for line in str(table).splitlines() if line.strip().startswith(f"{name} "))
    assert said == [name, f"{found['parameters'] / 1e6:.1f}", "M", f"{LIMITS[name] // 10**6}", "M", str(found["image_tokens"]),
                    str(found["tokens"]), f"{found['gflop']:.1f}"]  # fmt: skip
    assert cost(config, SIZES, cameras=1)["gflop"] < 0.75 * found["gflop"]


def test_what_is_counted_is_what_is_built():
    network = StudentNet(network_config(preset("xs"), SIZES))
    assert sum(p.numel() for p in network.parameters()) == COUNTS["xs"]
    network = StudentNet(network_config(preset("xs", layers=3, image_size=128), SIZES))
    found = next(c for c in grid(SIZES, 10**9, 2, {"hidden": 256}) if (c.config.image_size, c.config.patch, c.config.layers)
                 == (128, 32, 4))  # fmt: skip
    four = StudentNet(network_config(found.config, SIZES))
    assert found.parameters == sum(p.numel() for p in four.parameters()) > sum(p.numel() for p in network.parameters())


def test_a_choice_is_a_preset_with_anything_said_by_hand():
    mine = set(StudentChoice.model_fields) - {"preset", "budget"}
    assert mine == set(StudentConfig.model_fields) - {"kind"}
    assert get_args(StudentChoice.model_fields["preset"].annotation) == tuple(PRESETS)
    chosen = resolve(StudentChoice(), SIZES)
    assert chosen.config == preset("s") and chosen.record["parameters"] == COUNTS["s"] and chosen.record["by_hand"] == {}
    chosen = resolve(StudentChoice(preset="xs", image_size=128, tower="mobilenetv4_conv_small", tokens=8, layers=4), SIZES)
    assert (chosen.config.image_size, chosen.config.tokens, chosen.config.hidden) == (128, 8, 256)
    json.dumps(chosen.record)
    PolicyConfig.model_validate({"backbone": chosen.record["backbone"]})
    small = Sizes(symbols=100, slots=6, chunk=2, state=3, robots=2, soft_tokens=4, state_token=False, end_token=False)
    assert resolve(StudentChoice(preset="xs"), small).record["parameters"] < COUNTS["xs"]


def test_what_does_not_go_together_is_said_where_it_is_written():
    for wrong, words in (({"heads": 5}, "multiple of heads"), ({"image_size": 100}, "multiple of patch"), ({"layers": 0}, "lay"),
                         ({"preset": "l"}, "preset"), ({"widht": 3}, "width|Extra"), ({"budget": {"p95_ms": 0}}, "p95_ms"),
                         ({"budget": {"p95_ms": 5}, "tower": "patch"}, "a budget picks"),
                         ({"budget": {"p95_ms": 5}, "preset": "rt1"}, "rt1 is none of them")):  # fmt: skip
        with pytest.raises(ValidationError, match=words):
            StudentChoice.model_validate(wrong)
    with pytest.raises(UsageError, match="keypoints of 1 or more"):
        validate({"tower": "patch", "keypoints": 0}, StudentChoice, "config.yaml")


def test_more_parameters_than_the_name_says_are_refused():
    with pytest.raises(UsageError, match=r"(?s)39\.\d M.*at most 25 M.*preset=m"):
        resolve(StudentChoice(layers=20), SIZES)
    with pytest.raises(UsageError, match=r"at most 8 M(?s:.*)preset=s"):
        resolve(StudentChoice(preset="xs", hidden=384), SIZES)
    with pytest.raises(UsageError, match="where nothing is bounded"):
        resolve(StudentChoice(preset="m", layers=30), SIZES)


# ------------------------------------------------------------------------------------------------ a latency budget


class Machine:
    """A clock that a step moves by what its products, attention and pixels would take; every seventh step takes longer."""

    def __init__(self, speed: float = 1.0) -> None:
        self.now, self.speed, self.steps, self.prepared = 0.0, speed, 0, []

    def clock(self) -> float:
        return self.now

    def took(self, network: StudentNet, cameras: int) -> float:
        c = network.config
        T = cameras * network.image_tokens + 1 + c.state_token + c.end_token + c.chunk
        work = 20 * T * c.layers * c.hidden**2 + 9 * c.layers * T * T * c.hidden + 8e3 * cameras * c.image_size**2
        return (0.3 + work / 1e9) * self.speed / 1e3

    def runner(self, network: StudentNet, sizes: Sizes, cameras: int, threads: int):
        self.prepared.append((network.config.image_size, network.config.patch, network.config.hidden, network.config.layers))

        def step() -> None:
            self.steps += 1
            self.now += self.took(network, cameras) * (1.3 if self.steps % 7 == 0 else 1.0)

        return step


@pytest.mark.parametrize("ms", [4.0, 15.0])
def test_a_budget_finds_the_most_capable_that_fits(ms):
    machine = Machine()
    budget = Budget(p95_ms=ms)
    found = fit(budget, SIZES, LIMITS["s"], {}, {"torch": machine.runner}, machine.clock)
    record = found.record
    assert record["chosen"]["p95_ms"] <= ms and record["chosen"]["rounds"] == 200
    assert record["cost"]["parameters"] == record["chosen"]["parameters"] <= LIMITS["s"]
    assert len(record["measured"]) == len({json.dumps([r[n] for n in GRID]) for r in record["measured"]}) <= 26
    # Nothing more capable would have fitted, by the truth the measuring does not know.
    for candidate in grid(SIZES, LIMITS["s"], 2, {}):
        if candidate.capacity > record["chosen"]["capacity"] + 1e-3:
            assert truth(candidate) * 1.3 > 0.97 * ms
    again = Machine()
    same = fit(budget, SIZES, LIMITS["s"], {}, {"torch": again.runner}, again.clock)
    assert same.record == record | {"load_a_core": same.record["load_a_core"]} and again.prepared == machine.prepared
    json.dumps(record)


def truth(candidate: Any) -> float:
    """Milliseconds, from what a candidate consists of."""
    _, products, attention, pixels = candidate.terms
    return 0.3 + 20.0 * products + 9.0 * attention + 8 * pixels


def test_a_burst_of_something_else_is_met_twice(monkeypatch):
    calm = fit(Budget(p95_ms=8), SIZES, LIMITS["xs"], {}, {"torch": (m := Machine()).runner}, m.clock).record
    monkeypatch.setattr("vla.students.budget._AT_ONCE", 1)
    machine, best = Machine(), tuple(calm["chosen"][name] for name in GRID)

    def disturbed(network, sizes, cameras, threads):
        step = machine.runner(network, sizes, cameras, threads)
        first = machine.prepared[-1] == best and machine.prepared.count(best) == 1

        def slower() -> None:
            before = machine.now
            step()
            machine.now += 3 * (machine.now - before) * first

        return slower

    record = fit(Budget(p95_ms=8), SIZES, LIMITS["xs"], {}, {"torch": disturbed}, machine.clock).record
    assert record["chosen"]["capacity"] == calm["chosen"]["capacity"] and machine.prepared.count(best) == 2


def test_what_is_said_by_hand_stays():
    machine = Machine()
    own: dict[str, Any] = {"image_size": 128, "hidden": 256, "text_layers": 0, "keypoints": 16}
    chosen = resolve(StudentChoice(preset="xs", budget=Budget(p95_ms=10, runtime="torch"), **own), SIZES,
                     {"torch": machine.runner}, None, machine.clock)  # fmt: skip
    assert {name: getattr(chosen.config, name) for name in own} == own
    assert chosen.record["parameters"] <= LIMITS["xs"] and chosen.record["by_hand"] == own
    assert all((size, hidden) == (128, 256) for size, _, hidden, _ in machine.prepared)


def test_the_fastest_runtime_is_found_by_measuring():
    machine, slow = Machine(), Machine(3.0)
    slow.__dict__["clock"] = machine.clock

    def slowly(*args):
        step, before = slow.runner(*args), machine
        return lambda: (step(), setattr(before, "now", before.now + slow.took(args[0], args[2])))

    both = {"onnx": slowly, "torch": machine.runner}
    record = fit(Budget(p95_ms=20), SIZES, LIMITS["xs"], {}, both, machine.clock).record
    took = record["runtimes_p50_ms"]
    assert record["runtime"] == "torch" and took["onnx"] == pytest.approx(3 * took["torch"], rel=0.05)
    with pytest.raises(MachineError, match=r"no onnx-int8 here(?s:.*)tendon-vla\[edge\]"):
        fit(Budget(p95_ms=20, runtime="onnx-int8"), SIZES, LIMITS["xs"], {}, both, machine.clock)


def test_a_budget_that_nothing_meets_names_the_fastest():
    machine = Machine(40.0)
    with pytest.raises(UsageError, match=r"within 5 ms; the fastest of \d+ is 128 px, patch 32, 4 layers of 192, with a p95"):
        fit(Budget(p95_ms=5), SIZES, LIMITS["s"], {}, {"torch": machine.runner}, machine.clock)
    with pytest.raises(UsageError, match="nothing in the grid"):
        fit(Budget(p95_ms=5), SIZES, 1000, {}, {"torch": machine.runner}, machine.clock)


def test_candidates_run_for_real(monkeypatch):
    monkeypatch.setattr("vla.students.budget._ROUNDS", 10)
    threads = torch.get_num_threads()
    own = {"image_size": 128, "patch": 32, "hidden": 192, "layers": 4}
    found = fit(Budget(p95_ms=10_000), SIZES, LIMITS["s"], own, TORCH)
    assert found.record["candidates"] == 1 and found.record["chosen"]["p50_ms"] > 0 and torch.get_num_threads() == threads
    calls = []
    timings = timed([lambda: calls.append(0), lambda: calls.append(1)], 1, 3, warm_up=1)
    assert calls == [0, 1] + [0, 0, 1, 1] * 3 and [t.rounds for t in timings] == [3, 3]


def test_an_exported_candidate_runs():
    pytest.importorskip("onnxruntime")
    from vla.students.exported import runners

    known = runners()
    if "onnx" not in known:
        pytest.skip("without onnxscript")
    network = StudentNet(network_config(preset("xs", image_size=64, patch=32, layers=1, hidden=64, mlp=64), SIZES)).eval()
    for name in ("onnx", "onnx-int8"):
        unit, symbols, confidence = known[name](network, SIZES, 2, 1)()  # pyright: ignore
        assert unit.shape == symbols.shape == confidence.shape == (8, 7)


def test_the_command(capsys, monkeypatch):
    assert main(["students"]) == 0
    out = capsys.readouterr().out
    assert all(f"{name} " in out for name in PRESETS) and "21.7 M" in out
    assert main(["students", "--json", "--cameras", "1"]) == 0
    assert json.loads(capsys.readouterr().out)["presets"]["xs"]["parameters"] == COUNTS["xs"]
    assert main(["students", "--preset", "rt1"]) == 0
    out = capsys.readouterr().out
    assert "33.8 M" in out and "21.7 M" not in out
    for words, part in ((["--budget", "-1"], "above 0"), (["--budget", "nan"], "above 0"),
                        (["--budget", "5", "--preset", "rt1"], "has them already"),
                        (["--threads", "0"], "at least 1"), (["--budget", "5", "--threads", "0"], "at least 1"),
                        (["--cameras", "0"], "1 to 16")):  # fmt: skip
        assert main(["students", *words]) == 2
        assert part in capsys.readouterr().err, words
    import vla.students.command

    machine = Machine()
    monkeypatch.setattr(vla.students.command, "runners", lambda: {"torch": machine.runner})
    monkeypatch.setattr(vla.students.command, "CLOCK", machine.clock)
    assert main(["students", "--budget", "5", "--preset", "xs"]) == 0
    out, err = capsys.readouterr()
    assert "<- chosen" in out and "candidates" in err
    said = yaml.safe_load(out[out.index("policy:") :])
    PolicyConfig.model_validate(said["policy"])
    assert main(["students", "--budget", "0.01", "--json"]) == 2
    assert "the fastest of" in capsys.readouterr().err
