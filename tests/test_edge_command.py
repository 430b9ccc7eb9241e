"""`vla-edge`: what a person types on the robot."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from edge_folder import edge_spec, look, write_edge_folder
from PIL import Image
from serving import started

from serve.edge import EdgePolicy
from serve.edge_command import main


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for the tabletop's robot, which sees through one camera."""
    return write_edge_folder(tmp_path_factory.mktemp("edge") / "export", {"tabletop": edge_spec(("front",))})


def test_check_measures_every_graph(folder: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["check", str(folder), "--runs", "3", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert set(said["measured"]) == {"float32", "int8"} and said["measured"]["int8"]["look_ms"]["p50"] > 0
    assert said["files"] == 5 and said["robots"]["tabletop"]["cameras"] == ["front"]
    assert main(["check", str(folder), "--runs", "3", "--runtime", "int8", "--threads", "2"]) == 0
    text = capsys.readouterr().out
    assert "5 files" in text and "int8, 2 thread(s): a look p50" in text and "float32" not in text


def test_check_finds_damage_in_files_it_does_not_need(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    folder = write_edge_folder(tmp_path / "e")
    (folder / "policy.onnx").write_bytes(b"")
    EdgePolicy.load(folder, "int8")
    assert main(["check", str(folder)]) == 4
    assert "policy.onnx: 0 bytes, not" in capsys.readouterr().err


def test_act_says_what_the_policy_says(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    seen = look(0, ("front",))
    Image.fromarray(seen["images"]["front"]).save(tmp_path / "f.png")
    state = ",".join(map(repr, map(float, seen["state"])))
    command = ["act", str(folder), "--image", f"front={tmp_path / 'f.png'}", f"--state={state}", "--instruction", "do thing 1"]
    assert main([*command, "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    np.testing.assert_array_equal(said["actions"], EdgePolicy.load(folder).act(seen, "do thing 1").actions)
    assert main(command) == 0 and "eef.dx" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "code", "part"),
    [
        (["--instruction", "go"], 3, "camera 'front' missing"),
        (["--instruction", "go", "--image", "f.png"], 2, "CAMERA=FILE"),
        (["--instruction", "go", "--image", "front=missing.png"], 3, "missing.png"),
        (["--instruction", "", "--image", "front={png}", "--state", "0,0,0,0"], 3, "instruction"),
        (["--instruction", "go", "--image", "front={png}", "--state", "0,0"], 3, "state has shape (2,)"),
        (["--instruction", "go", "--image", "front={png}", "--state", "0,0,0,nan"], 3, "not finite"),
        (["--instruction", "go", "--image", "front={png}", "--state", "0;1"], 2, "numbers with commas"),
        (["--instruction", "go", "--image", "front={text}"], 3, "a picture"),
        (["--instruction", "go", "--image", "front={huge}"], 3, "9000 x 9000"),
    ],
)
def test_act_says_what_is_wrong(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], words, code, part):
    names = {"png": tmp_path / "f.png", "text": tmp_path / "t.png", "huge": tmp_path / "h.png"}
    Image.fromarray(look()["images"]["front"]).save(names["png"])
    names["text"].write_text("no picture")
    if "{huge}" in words[-1]:
        Image.new("1", (9000, 9000)).save(names["huge"])
    assert main(["act", str(folder), *(word.format(**names) for word in words)]) == code
    assert part in capsys.readouterr().err


def test_run_plays_episodes_in_a_simulator(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    command = ["run", str(folder), "--sim", "tabletop", "--task", "push-red-left", "--task", "touch-red", "--episodes", "3"]
    assert main([*command, "--ensemble", "0.01", "--video", str(tmp_path / "clip.mp4")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines[:3]] == ["push-red-left 900000", "touch-red 900001", "push-red-left 900002"]
    assert lines[3].startswith("success 0/3 = 0 % (0..56, Wilson 95 %)") and "0 of" in lines[4]
    assert (tmp_path / "clip.mp4").stat().st_size > 1000
    results = []
    for _ in range(2):
        assert main([*command, "--json"]) == 0
        results.append(json.loads(capsys.readouterr().out))
    assert results[0]["n"] == 3 and results[0]["loop"]["holds"] == 0
    kept = ("task", "seed", "success", "ticks", "looks", "confidence")
    assert [[r[k] for k in kept] for r in results[0]["records"]] == [[r[k] for k in kept] for r in results[1]["records"]]


def test_run_shows_the_policy_every_camera(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    two = write_edge_folder(tmp_path / "two", {"tabletop_wrist": edge_spec(name="tabletop_wrist")})
    assert main(["run", str(two), "--sim", "tabletop-wrist", "--task", "touch-red", "--episodes", "1", "--json"]) == 0
    loop = json.loads(capsys.readouterr().out)["loop"]
    assert loop["ticks"] > 1 and loop["looks"] > 1 and loop["holds"] == 0


def test_run_says_what_is_wrong(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    two = write_edge_folder(tmp_path / "two")
    seen = write_edge_folder(tmp_path / "seen", {"tabletop": edge_spec(("front",))},
                             recorded_seeds={"tabletop": {"touch-red": [[899_990, 900_010]]}})  # fmt: skip
    for where, words, code, part in (
        (folder, ["--sim", "tabletopp"], 2, "no such suite"),
        (folder, ["--sim", "tabletop", "--task", "fly"], 2, "no such task"),
        (folder, ["--sim", "metaworld"], 2, "'metaworld_sawyer', this suite's robot"),
        (two, ["--sim", "tabletop"], 2, "camera 'wrist': none here"),
        (seen, ["--sim", "tabletop"], 2, "seeds the policy was trained on"),
        (folder, ["--sim", "tabletop", "--asynchronous"], 2, "no --realtime"),
        (folder, ["--sim", "tabletop", "--jump", "arm=1"], 2, "jump 'arm': no such channel"),
        (folder, ["--sim", "tabletop", "--jump", "arm"], 2, "CHANNEL=NUMBER"),
        (folder, ["--sim", "tabletop", "--execute", "9"], 2, "1..4"),
        (folder, ["--sim", "tabletop", "--episodes", "0"], 2, "at least 1"),
        (folder, ["--sim", "tabletop", "--robot", "metaworld_sawyer"], 2, "'tabletop', the robot of --sim tabletop"),
        (folder, ["--sim", "tabletop", "--help-below", "1.5"], 2, "0 to 1"),
        (folder, ["--sim", "tabletop", "--help-below", "nan"], 2, "0 to 1"),
        (folder, ["--sim", "tabletop", "--video", str(folder)], 2, "there already"),
        (folder, ["--sim", "tabletop", "--video", str(folder / "export.json" / "x.mp4")], 2, "export.json is a file"),
        (tmp_path, ["--sim", "tabletop"], 4, "no export.json"),
    ):
        assert main(["run", str(where), *words]) == code, words
        assert part in capsys.readouterr().err, words


def test_run_asks_a_server_and_plays_the_same(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """The folder here, and the same folder behind `vla serve`: what is seen, said and done is one and the same."""
    token = "0123456789abcdef"
    (tmp_path / "token").write_text(f"# ours\n\nadmin:{token}\n")
    play, kept = ["--sim", "tabletop", "--task", "touch-red", "--episodes", "2"], ("task", "seed", "ticks", "looks", "confidence")
    assert main(["run", str(folder), *play, "--json"]) == 0
    here = json.loads(capsys.readouterr().out)
    with started(folder, "--token-file", tmp_path / "token", token=token) as server:
        ask = ["run", "--server", server.address, "--token-file", str(tmp_path / "token")]
        assert main([*ask, *play, "--json"]) == 0
        there = json.loads(capsys.readouterr().out)
        assert [[r[k] for k in kept] for r in here["records"]] == [[r[k] for k in kept] for r in there["records"]]
        assert there["policy"] == here["policy"] and there["connections"] == 1 and there["loop"]["holds"] == 0
        assert main([*ask, *play[:-1], "1", "--realtime", "--asynchronous", "--ensemble", "0.01"]) == 0
        assert f"{server.address.replace('http', 'ws')}: inference p50" in capsys.readouterr().out
        assert main([*ask, "--sim", "metaworld"]) == 2 and "'metaworld_sawyer', this suite's robot" in capsys.readouterr().err
        assert main([*ask, *play, "--threads", "2"]) == 2 and "a server, without" in capsys.readouterr().err
        assert main(["run", str(folder), *ask[1:], *play]) == 2 and "a server, without" in capsys.readouterr().err
        assert main([*ask[:3], *play]) == 1 and "Bearer" in capsys.readouterr().err
    assert main(["run", *play]) == 2 and "run --server ADDRESS" in capsys.readouterr().err
    (tmp_path / "token").write_text("#\n")
    assert main([*ask, *play]) == 2 and "no token" in capsys.readouterr().err


def test_help_has_examples(capsys: pytest.CaptureFixture[str]):
    for words in (["--help"], ["run", "--help"], ["act", "--help"], ["check", "--help"]):
        with pytest.raises(SystemExit) as caught:
            main(words)
        assert caught.value.code == 0 and "vla-edge run exports/student --sim tabletop" in capsys.readouterr().out
