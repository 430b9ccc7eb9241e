"""The house itself: what ships, who may import whom, what no line may say. The rules are in CONTRIBUTING.md."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from children import LIMIT

PACKAGES = ("vla", "serve", "data_tools")


def tracked(root: Path) -> list[Path]:
    """Every file that is or would be committed."""
    git = shutil.which("git")
    if git and (root / ".git").exists():
        done = subprocess.run([git, "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=root,
                              capture_output=True, text=True, check=True, timeout=LIMIT)
        return [root / name for name in done.stdout.split("\0") if name and (root / name).is_file()]
    skip = {".venv", "data", "runs"}
    return [p for p in root.rglob("*") if p.is_file() and not skip & set(p.relative_to(root).parts)]


def sources(root: Path) -> list[Path]:
    return [p for package in PACKAGES for p in sorted((root / package).rglob("*.py"))]


# --- what ships ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def wheel(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    out = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(out)]
    subprocess.run(command, cwd=checkout, check=True, capture_output=True, timeout=LIMIT)
    return zipfile.ZipFile(next(out.glob("*.whl")))


def test_the_wheel_holds_exactly_three_packages(wheel: zipfile.ZipFile):
    tops = {name.split("/")[0] for name in wheel.namelist()}
    assert {t for t in tops if not t.endswith(".dist-info")} == set(PACKAGES)
    assert len(tops) == 4
    assert not [n for n in wheel.namelist() if n.endswith((".pyc", ".so")) or "/tests/" in n]


def test_the_wheel_holds_every_file_and_config(wheel: zipfile.ZipFile, checkout: Path):
    names = set(wheel.namelist())
    files = [p.relative_to(checkout).as_posix() for p in tracked(checkout)]
    configs = ["vla/" + f for f in files if f.startswith("configs/")]
    inside = [f for f in files if f.split("/")[0] in PACKAGES]  # sources, scenes, templates
    assert configs and inside
    assert not set(configs + inside) - names


def test_the_wheel_declares_command_licence_and_floors(wheel: zipfile.ZipFile):
    info = next(n.split("/")[0] for n in wheel.namelist() if ".dist-info/" in n)
    assert "vla = vla.cli:main" in wheel.read(f"{info}/entry_points.txt").decode()
    assert any(n.startswith(f"{info}/") and n.endswith("LICENSE") for n in wheel.namelist())
    required = re.findall(r"^Requires-Dist: ([\w.-]+)(.*)$", wheel.read(f"{info}/METADATA").decode(), re.M)
    core = {name: rest for name, rest in required if "extra ==" not in rest}
    assert ">=2.10" in core["torch"] and ">=5.3" in core["transformers"]  # security floors, docs/decisions.md
    assert not {"tensorflow", "lerobot"} & {name.lower() for name, _ in required}


# --- who may import whom ---------------------------------------------------------------------------------------------


@pytest.fixture()
def copy(checkout: Path, tmp_path: Path) -> Path:
    """The sources and their contracts, to be spoiled."""
    for package in PACKAGES:
        shutil.copytree(checkout / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(checkout / "pyproject.toml", tmp_path)
    return tmp_path


def lint(root: Path) -> subprocess.CompletedProcess[str]:
    command = Path(sys.executable).parent / "lint-imports"
    return subprocess.run([str(command), "--no-logo", "--no-cache"], cwd=root, capture_output=True, text=True, timeout=LIMIT)


def test_the_contracts_hold(copy: Path):
    done = lint(copy)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("file", "line", "contract"),
    [
        ("vla/schema.py", "import serve", "vla never imports serve or data_tools"),
        ("vla/train.py", "def late():\n    import data_tools", "vla never imports serve or data_tools"),
        ("data_tools/__init__.py", "import serve", "serve and data_tools never import each other"),
        ("serve/__init__.py", "import vla.checkpoint", "serve never imports the training side"),
        ("vla/normalize.py", "import vla.policy", "imports go downward only"),
        ("vla/newcomer.py", '"""A file nobody gave a place."""', "imports go downward only"),
        ("vla/embodiment.py", "import torch", "No torch where"),
        ("data_tools/newcomer.py", "from vla.batch import *", "No torch where"),  # torch at one remove
    ],
)
def test_a_planted_violation_breaks_its_contract(copy: Path, file: str, line: str, contract: str):
    path = copy / file
    path.write_text((path.read_text() if path.exists() else "") + "\n" + line + "\n")
    done = lint(copy)
    assert done.returncode == 1, done.stdout + done.stderr
    assert re.search(re.escape(contract) + r".* BROKEN", done.stdout.replace("\n", " ")), done.stdout


def light_modules(root: Path) -> list[str]:
    """Every importable module that the contract `no-torch` names, folders opened."""
    contracts = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    (contract,) = [c for c in contracts if c["id"] == "no-torch"]
    modules = []
    for name in contract["source_modules"]:
        path = root.joinpath(*name.split("."))
        found = sorted(path.rglob("*.py")) if path.is_dir() else [path.with_suffix(".py")]
        modules += [".".join(p.relative_to(root).with_suffix("").parts).removesuffix(".__init__") for p in found]
    return [m for m in modules if not m.endswith("__main__")]


def test_light_modules_load_no_torch(checkout: Path):
    code = "import importlib, sys\nfor m in sys.argv[1:]: importlib.import_module(m)\nprint('torch' in sys.modules)"
    modules = light_modules(checkout)
    assert "vla.schema" in modules and len(modules) > 8
    done = subprocess.run([sys.executable, "-c", code, *modules], capture_output=True, text=True, cwd=checkout, timeout=LIMIT)
    assert done.stdout.strip() == "False", done.stdout + done.stderr


# --- what no line may say --------------------------------------------------------------------------------------------

UNSAFE = re.compile(
    r"trust_remote_code\s*=\s*True|\bpickle\.loads?\b|\bimport pickle\b|\btorch\.load\(|\byaml\.(unsafe_)?load\("
    r"|\ballow_pickle\s*=\s*True|\bshell\s*=\s*True|\bmarshal\.loads?\b|(?<!\.)\bdill\b"
)


def test_no_unsafe_loading(checkout: Path):
    said = [
        f"{path.relative_to(checkout)}:{number}: {line.strip()}"
        for path in [*sources(checkout), *sorted((checkout / "benchmarks").rglob("*.py"))]
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if UNSAFE.search(line)
    ]
    assert not said


def test_unsafe_pattern_finds_what_it_is_for():
    for line in ("AutoModel.from_pretrained(x, trust_remote_code=True)", "pickle.load(f)", "torch.load(p)",
                 "yaml.load(text)", "yaml.unsafe_load(text)", "np.load(p, allow_pickle=True)"):
        assert UNSAFE.search(line), line
    for line in ("yaml.safe_load(text)", "safetensors.torch.load_file(p)", "allow_pickle=False"):
        assert not UNSAFE.search(line), line


def test_no_local_paths_and_no_package_hosts(checkout: Path):
    paths = re.compile(r"(?<![\w.~-])/(home|Users|mnt|work|root|tmp)/\w+")
    hosts = re.compile(r"(extra-)?index-url\s*[= ]\s*http|find-links|trusted-host|@ file:|file:///")
    own = str(checkout) + os.sep
    said = []
    for path in tracked(checkout):
        if path.suffix in {".png", ".jpg", ".mp4", ".parquet", ".safetensors", ".gif"} or path == Path(__file__):
            continue
        text = path.read_text(errors="replace")
        said += [f"{path.relative_to(checkout)}: {m.group()}" for m in [*paths.finditer(text), *hosts.finditer(text)]]
        said += [f"{path.relative_to(checkout)}: this checkout's path"] if own in text and len(own) > 5 else []
    assert not said


def test_every_module_says_what_it_is(checkout: Path):
    assert not [p for p in sources(checkout) if not ast.get_docstring(ast.parse(p.read_text()))]


def test_no_room_for_anything(checkout: Path):
    """`utils` is where code goes that nobody placed."""
    vague = {"utils", "util", "common", "helpers", "helper", "misc", "core"}
    assert not [p for p in sources(checkout) if vague & set(p.relative_to(checkout).with_suffix("").parts)]


def test_constraints_admit_what_is_declared(checkout: Path):
    """A pin outside its own range would make `make setup` unsolvable; a direct dependency without a pin would drift."""
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    project = tomllib.loads((checkout / "pyproject.toml").read_text())["project"]
    pins: dict[str, str] = {}
    for line in (checkout / "constraints.txt").read_text().splitlines():
        if line.strip() and not line.startswith("#"):
            assert re.fullmatch(r"[\w.-]+==[\w.+!]+", line), line
            name, version = line.split("==")
            pins[canonicalize_name(name)] = version
    extras = project["optional-dependencies"]
    declared = [*project["dependencies"], *extras["sim"], *extras["quant"], *extras["dev"]]
    for requirement in map(Requirement, declared):
        pin = pins.get(canonicalize_name(requirement.name))
        assert pin and requirement.specifier.contains(pin), f"{requirement} against {pin}"


def test_messages_name_only_commands_that_exist(checkout: Path):
    """A fix that cannot be typed is worse than none."""
    from vla.cli import DATA_VERBS, VERBS

    for path in [*(checkout / "vla").rglob("*.py"), *(checkout / "data_tools").rglob("*.py"), checkout / "README.md"]:
        for verb, word in re.findall(r"`vla ([a-z][a-z-]*)(?: ([a-z][a-z-]*))?", path.read_text()):
            assert verb in VERBS, (path, verb)
            assert verb != "data" or word in {*DATA_VERBS, ""}, (path, word)
