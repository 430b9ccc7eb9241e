"""The README is run, not believed: its commands parse, its Python imports, its YAML validates, its tree is the tree."""

from __future__ import annotations

import ast
import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from children import LIMIT

from vla.embodiment import EmbodimentSpec
from vla.mixture import MixtureConfig
from vla.policy import AdapterConfig, PolicyConfig


@pytest.fixture(scope="module")
def readme(checkout: Path) -> str:
    return (checkout / "README.md").read_text()


def blocks(text: str, language: str) -> list[str]:
    """The fenced blocks of a language; `""` for those that name none."""
    fenced = re.findall(r"^```(\w*)\n(.*?)^```$", text, re.M | re.S)
    return [body for name, body in fenced if name == language]


def commands(text: str, word: str) -> list[str]:
    """Lines of the bash blocks that start with `word`, comments off."""
    lines = [line.split("  #")[0].strip() for block in blocks(text, "bash") for line in block.splitlines()]
    return [line for line in lines if line.split() and line.split()[0] == word]


def vla(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "vla.cli", *words], capture_output=True, text=True, timeout=LIMIT)


def verb(command: str) -> tuple[str, ...]:
    words = command.split()[1:]
    return tuple(words[:2] if words[0] == "data" else words[:1])


def test_every_verb_of_the_readme_has_help_with_an_example(readme: str):
    verbs = sorted({verb(command) for command in commands(readme, "vla")})
    assert ("train",) in verbs and ("data", "record") in verbs and ("doctor",) in verbs
    top = vla("--help")
    assert top.returncode == 0, top.stderr
    for words in verbs:
        assert words[0] in top.stdout
        done = vla(*words, "--help")
        assert done.returncode == 0, done.stderr
        assert "example" in done.stdout.lower() and "--json" in done.stdout, words


def test_every_option_of_the_readme_exists(readme: str):
    for command in commands(readme, "vla"):
        text = vla(*verb(command), "--help").stdout
        for option in re.findall(r"--[\w-]+", command):
            assert re.search(rf"{option}\b", text), f"{command}: {option}"


def test_every_make_target_of_the_readme_exists_and_sets_up_first(readme: str, checkout: Path):
    makefile = (checkout / "Makefile").read_text()
    targets = set(re.findall(r"`?make ([a-z-]+)", readme)) - {"in"}
    assert {"setup", "demo", "demo-full", "smoke", "test", "check"} <= targets
    for target in targets:
        rule = re.search(rf"^{target}:(.*?)##", makefile, re.M)
        assert rule, target
        assert target in ("setup", "help") or "setup" in rule[1].split(), target


def test_make_demo_is_the_readme_step_by_step(readme: str, checkout: Path):
    makefile = (checkout / "Makefile").read_text()
    rule = re.search(r"^demo:.*?\n\n", makefile, re.M | re.S)
    assert rule
    recipe = [line.strip() for line in rule[0].splitlines() if line.startswith("\tvla ")]
    (story,) = [block for block in blocks(readme, "bash") if "vla report" in block]
    assert recipe == story.strip().splitlines()


def test_make_example_is_the_readme_line_by_line(readme: str, checkout: Path):
    makefile = (checkout / "Makefile").read_text()
    rule = re.search(r"^example:.*?\n\n", makefile, re.M | re.S)
    assert rule and "make example\n" in (checkout / ".ci/run").read_text()
    recipe = [line.strip() for line in rule[0].splitlines() if re.match(r"\t(?!\$|rm )", line)]
    (story,) = [block for block in blocks(readme, "bash") if "vla push" in block]
    assert recipe == story.strip().splitlines()
    text = vla("eval", "--help").stdout
    assert all(option in text for option in re.findall(r"--[\w-]+", recipe[-1]))


def test_the_example_trains_the_model_it_makes(readme: str, checkout: Path):
    from vla.config import load_config
    from vla.train import TrainConfig

    (made,) = re.findall(r"small_smolvlm\.py --out (\S+)", readme)
    config = load_config(checkout / "configs/smoke/smolvlm_lora.yaml", [], TrainConfig)
    assert config.policy.backbone.kind == "hf" and config.policy.backbone.path == made and config.adapter
    assert f"--out {config.mixture.datasets[0].path}\n" in readme and f"vla merge {config.run.out} " in readme


def test_configs_named_in_the_readme_and_makefile_exist(readme: str, checkout: Path):
    named = set(re.findall(r"configs/[\w/]+\.yaml", readme + (checkout / "Makefile").read_text()))
    assert len(named) >= 2
    assert not [name for name in named if not (checkout / name).is_file()]


def test_overrides_of_the_readme_are_accepted(readme: str):
    from vla.config import load_config
    from vla.train import TrainConfig

    (line,) = [c for c in commands(readme, "vla") if c.startswith("vla train") and "=" in c]
    path, *overrides = line.split()[2:]
    config = load_config(Path(path).relative_to("configs").with_suffix(""), overrides, TrainConfig)
    given = dict(item.split("=") for item in overrides)
    assert config.run.seed == int(given["run.seed"]) != 0
    assert config.optim.lr == float(given["optim.lr"])


def test_python_of_the_readme_imports_and_names_what_exists(readme: str):
    for block in blocks(readme, "python"):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and node.module:
                module = importlib.import_module(node.module)
                assert all(hasattr(module, alias.name) for alias in node.names), node.module


def test_the_instruction_in_the_readme_is_the_tasks_own(readme: str):
    from vla.sims import SUITES

    assert f'"{SUITES["tabletop"].instruction("push-red-left")}"' in readme


def test_the_robot_of_the_readme_is_valid(readme: str):
    foreign, text, mixture = blocks(readme, "yaml")
    settings = yaml.safe_load(foreign)
    assert PolicyConfig.model_validate(settings["policy"]).backbone.kind == "hf"
    assert AdapterConfig.model_validate(settings["adapter"]).rank == 32
    spec = EmbodimentSpec.model_validate(yaml.safe_load(text))
    config = MixtureConfig.model_validate(yaml.safe_load(mixture)["mixture"])
    assert config.datasets[0].embodiment == text.split()[1]  # the file the comment in the first line names
    assert spec.action_dim == 7 and spec.state_dim == 6


def test_the_families_of_the_readme_are_those_tested(readme: str):
    """The table is printed by benchmarks/families.py; its rows are the tests' parameters, and each of them passes all."""
    from tests.families import FAMILIES

    rows = re.findall(r"^\| ([\w .-]+?)(?: \(one camera\))? \|((?: yes \|){4})$", readme, re.M)
    assert [name for name, _ in rows] == list(FAMILIES)


def test_the_controls_of_the_readme_are_those_of_the_evaluator(readme: str):
    from vla.evaluate import CONDITIONS

    rows = re.findall(r"^\| (\w+) \| ", readme.split("keeps itself honest")[1].split("\n## ")[0], re.M)
    assert [row for row in rows if row != "row"] == list(CONDITIONS)


def test_the_tree_of_the_readme_is_the_tree(readme: str, checkout: Path):
    (tree,) = [block for block in blocks(readme, "") if block.startswith("vla/")]
    rooms = {m[1]: m[0] for m in re.finditer(r"^(\w+)/ .*\n(?:  .*\n)*", tree, re.M)}
    assert all((checkout / room).is_dir() for room in rooms)
    told = {m[1] for m in re.finditer(r"^  (\S+) ", rooms["vla"], re.M)}
    assert told == {name for name in _names(checkout / "vla") if name.endswith((".py", "/"))}
    told = set(re.findall(r"\b(\w+\.py|\w+/)", rooms["serve"].partition("\n")[2]))
    assert told == {name for name in _names(checkout / "serve") if name.endswith((".py", "/"))}


def _names(folder: Path) -> set[str]:
    return {p.name + "/" * p.is_dir() for p in folder.iterdir() if p.name not in {"__init__.py", "__pycache__"}}


def test_links_of_the_documents_lead_somewhere(checkout: Path):
    for page in [*checkout.glob("*.md"), *(checkout / "docs").glob("*.md")]:
        text = re.sub(r"<!--.*?-->", "", page.read_text(), flags=re.S)
        for link in re.findall(r"\]\(([^)#\s]+)", text):
            assert link.startswith(("http://", "https://")) or (page.parent / link).exists(), f"{page.name}: {link}"
