"""The command line: light, with exit codes and without tracebacks."""

import json
import subprocess
import sys

import pytest

from vla.cli import VERBS, main
from vla.launch import ANSWER, answer_launcher, launch_line


def run(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "vla.cli", *words], capture_output=True, text=True, timeout=120)


def test_help_is_instant_because_it_imports_nothing_heavy():
    code = "import sys; from vla.cli import main\ntry: main(['--help'])\nexcept SystemExit: pass\n"
    code += "print([m for m in ('torch', 'transformers', 'mujoco', 'pyarrow') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip().endswith("[]") and all(verb in done.stdout for verb in VERBS)


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (("train", "no/such/config"), 2, "no such file"),
        (("report", "nowhere"), 4, "nowhere"),
        (("eval", "x", "--suite", "tabel"), 2, "tabletop"),
        (("eval", "nowhere", "--suite", "tabletop", "--episodes", "1"), 4, "policy.json"),
        (("data", "stats", "nowhere"), 3, "nowhere"),
        (("data", "record", "--suite", "tabletop", "--task", "push-pink", "--episodes", "1", "--out", "x"), 2, "push-"),
        ((), 2, "VERB"),
        (("fly",), 2, "invalid choice"),
    ],
)
def test_errors_have_their_code_and_no_traceback(words, code, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = run(*words)
    assert done.returncode == code, done.stderr
    assert said in done.stderr and "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_report_as_json(tmp_path, capsys):
    (tmp_path / "config.yaml").write_text("run: {out: x}\n")
    assert main(["report", str(tmp_path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["report"].endswith("report.html")


def test_the_launch_line_really_asks_for_two_processes_on_a_cpu(monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    command, environment = launch_line(2, 1)
    assert "--multi_gpu" in command and "--cpu" not in command
    assert environment == {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    assert "--cpu" in launch_line(1, None)[0]


def test_the_exit_code_goes_to_whoever_asked(tmp_path, monkeypatch):
    monkeypatch.delenv(ANSWER, raising=False)
    assert answer_launcher(3, speak=True) == 3 and answer_launcher(None, speak=False) == 1
    monkeypatch.setenv(ANSWER, str(tmp_path / "code"))
    assert answer_launcher(None, speak=False) == 0 and not (tmp_path / "code").exists()
    assert answer_launcher(75, speak=True) == 0 and (tmp_path / "code").read_text() == "75"


def test_overrides_may_follow_options_and_strangers_are_refused(capsys, tmp_path):
    from vla.cli import main

    assert main(["train", "train/demo", "--no-check", "run.steps=0"]) == 2  # reached the config: steps must be 1 or more
    assert "run.steps" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stop:
        main(["train", "train/demo", "--resume", "stranger"])
    assert stop.value.code == 2 and "stranger" in capsys.readouterr().err
