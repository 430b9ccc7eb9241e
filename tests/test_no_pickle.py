"""Nothing in the tree turns bytes into code: no pickle in any dress, nothing evaluated, no remote code. Read off the syntax.

LeRobot's asynchronous inference unpickles what comes from the network (CVE-2026-25874); a flag that forbids remote code was
passed over three times in 2026. What is not there cannot be reached. `tests/test_house.py` looks for the same words in text.

`multiprocessing.connection.Connection` pickles: between a process and the children it made itself, over a socket without a
name, it may. What listens, or calls an address, may not.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGES = ("vla", "serve", "data_tools")
MODULES = {
    "pickle", "_pickle", "cPickle", "marshal", "shelve", "dill", "cloudpickle", "jsonpickle", "joblib",
    "multiprocessing.managers", "multiprocessing.connection.Listener", "multiprocessing.connection.Client", "xmlrpc", "code",
    "codeop", "imp", "runpy",
}  # fmt: skip
"""What loads code, or objects that bring their own."""
CALLS = {"eval", "exec", "compile", "execfile"}
LOADERS = {
    "torch.load", "torch.jit.load", "torch.package", "joblib.load", "pandas.read_pickle", "pd.read_pickle", "yaml.load",
    "yaml.unsafe_load", "yaml.full_load", "os.system", "os.popen",
}  # fmt: skip
"""Calls that are refused, whatever they are given."""
PICKLED = {"Pickler", "Unpickler", "to_pickle", "read_pickle", "BaseManager", "SyncManager", "Listener"}


def faults(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """(line, what) of everything in a module that must not be there."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, f"import {a.name}") for a in node.names if _is(a.name, MODULES))
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module, *(f"{node.module}.{a.name}" for a in node.names)]
            yield from ((node.lineno, f"from {name}") for name in names if _is(name, MODULES))
        elif isinstance(node, ast.Call):
            yield from ((node.lineno, what) for what in _of_call(node))
        elif isinstance(node, (ast.Name, ast.Attribute)):
            name = node.id if isinstance(node, ast.Name) else node.attr
            if name in PICKLED:
                yield node.lineno, name
        elif isinstance(node, ast.Dict):
            said = [(k.value, v) for k, v in zip(node.keys, node.values, strict=True) if isinstance(k, ast.Constant)]
            yield from ((node.lineno, f"{key!r} in a mapping") for key, value in said if _lets_in(str(key), value))


def _of_call(node: ast.Call) -> Iterator[str]:
    name = ast.unparse(node.func)
    if name in CALLS or name in {f"builtins.{call}" for call in CALLS}:
        yield f"{name}()"
    if name in LOADERS:
        yield f"{name}()"
    for keyword in node.keywords:
        if keyword.arg and _lets_in(keyword.arg, keyword.value):
            yield f"{keyword.arg}={ast.unparse(keyword.value)}"


def _lets_in(name: str, value: ast.expr) -> bool:
    """Whether an argument of that name and value lets code in. What is no literal is not believed."""
    if name in ("trust_remote_code", "allow_pickle"):
        return not (isinstance(value, ast.Constant) and value.value is False)
    if name in ("weights_only",):
        return not (isinstance(value, ast.Constant) and value.value is True)
    return name == "shell" and not (isinstance(value, ast.Constant) and value.value is False)


def _is(name: str, modules: set[str]) -> bool:
    return name in modules or any(name.startswith(f"{module}.") for module in modules)


def test_nothing_in_the_tree_turns_bytes_into_code(checkout: Path):
    files = [path for package in PACKAGES for path in sorted((checkout / package).rglob("*.py"))]
    assert len(files) > 100
    said = [
        f"{path.relative_to(checkout)}:{line}: {what}" for path in files for line, what in faults(ast.parse(path.read_text()))
    ]
    assert not said, "\n".join(said)


def test_no_file_that_ships_is_a_pickle(checkout: Path):
    suffixes = {".pkl", ".pickle", ".pt", ".pth", ".ckpt", ".joblib", ".npy", ".npz", ".bin"}
    shipped = [p for part in ("vla", "serve", "data_tools", "configs", "models") for p in (checkout / part).rglob("*")]
    assert not [p for p in shipped if p.suffix in suffixes]


@pytest.mark.parametrize("line", [
    "import pickle", "import pickle as p", "from pickle import loads", "import dill", "from multiprocessing import managers",
    "from multiprocessing.managers import BaseManager", "import shelve", "import marshal",
    "import cloudpickle.cloudpickle", "x = eval(text)", "exec(code)", "builtins.exec(code)", "compile(a, b, 'exec')",
    "torch.load(path)", "torch.load(path, weights_only=True)", "np.load(path, allow_pickle=True)",
    "np.load(p, allow_pickle=flag)",
    "AutoModel.from_pretrained(name, trust_remote_code=True)", "f(**{'trust_remote_code': True})", "f(trust_remote_code=flag)",
    "subprocess.run(text, shell=True)", "os.system(text)", "pd.read_pickle(p)", "frame.to_pickle(p)", "yaml.load(text)",
    "load(path, weights_only=False)", "from multiprocessing.connection import Client",
    "multiprocessing.connection.Listener(a)",
])  # fmt: skip
def test_what_it_is_for_is_found(line: str):
    assert list(faults(ast.parse(line))), line


@pytest.mark.parametrize("line", [
    "import json", "model.eval()", "re.compile(text)", "torch.compile(model)", "np.load(path)", "np.load(p, allow_pickle=False)",
    "AutoModel.from_pretrained(name, trust_remote_code=False)", "yaml.safe_load(text)", "import multiprocessing",
    "'import pickle'  # words", "from multiprocessing.connection import Connection, wait", "cursor.execute(text)",
    "{'trust_remote_code': False}", "sh.load(p)",
])  # fmt: skip
def test_what_is_innocent_is_not(line: str):
    assert not list(faults(ast.parse(line))), line
