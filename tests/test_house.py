"""The house: five wings on a small ground floor, and imports that only ever point down."""

import ast
import graphlib
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "reinpp"
# What a wing may import: itself, and what stands here. Rooms directly in the package are the ground floor, or stand on
# top.
BELOW = {
    "ground": set(),
    "data": {"ground"},
    "models": {"ground"},
    "training": {"ground", "data", "models"},
    "adaptation": {"ground", "data", "models", "training"},
    "paper": {"ground", "data", "models", "training", "adaptation"},
    "top": {"ground", "data", "models", "training", "adaptation", "paper"},
}
TOP = {"explore", "panel", "command_line"}


def rooms():
    """{dotted name below the package: its file}; `_modidx` and the packages' own files aside."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        if not path.name.startswith("_"):
            found[".".join(path.relative_to(PACKAGE).with_suffix("").parts)] = path
    return found


def wing(room):
    head, _, rest = room.partition(".")
    if rest:
        return head
    return "top" if room in TOP else "ground"


def arrows(room, path):
    """The rooms that a room imports, wherever in the file.

    Raises ValueError for an import of anything else in the package."""
    package = ["reinpp", *room.split(".")[:-1]]
    known = rooms()
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names if alias.name.split(".")[0] == "reinpp"]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) + 1 - node.level] if node.level else []
            full = ".".join([*base, *(node.module.split(".") if node.module else [])])
            if full.split(".")[0] == "reinpp":
                inside = full.removeprefix("reinpp").removeprefix(".")
                names = [full] if inside in known else [f"{full}.{alias.name}" for alias in node.names]
        for name in names:
            inside = name.removeprefix("reinpp").removeprefix(".")
            if inside in known:
                yield inside
            elif inside:
                raise ValueError(
                    f"{room} imports {name}, which is no room: import names from the room that defines them")


GRAPH = {room: set(arrows(room, path)) for room, path in rooms().items()}


def test_no_cycle():
    assert len(list(graphlib.TopologicalSorter(GRAPH).static_order())) == len(rooms())


@pytest.mark.parametrize("room", GRAPH)
def test_imports_point_down(room):
    own = wing(room)
    for other in GRAPH[room]:
        there = wing(other)
        assert there in BELOW[own] | {own}, f"{room} ({own}) imports {other} ({there})"


def test_the_loop_knows_no_method():
    methods = {"training.generalize", "training.ema", "adaptation.rein_a", "models.losses", "models.rein_g",
        "models.mask2former"}
    assert not GRAPH["training.train"] & methods


def test_importing_starts_nothing():
    """No module registers a hook on optimisers or modules, starts a thread or a process, changes a setting of torch, or
    writes."""
    code = """
import importlib, os, sys, threading, multiprocessing, warnings
import torch, torch.optim.optimizer as optimizer, torch.nn.modules.module as module
def state():
    hooks = [len(getattr(optimizer, n)) for n in dir(optimizer) if n.startswith("_global_optimizer_")]
    hooks += [len(getattr(module, n)) for n in dir(module) if n.startswith("_global_") and hasattr(getattr(module, n), "__len__")]
    return hooks, threading.active_count(), len(multiprocessing.active_children()), torch.is_grad_enabled(), torch.get_default_dtype(), torch.get_num_threads()
import timm, torchvision, cv2, skimage, scipy, pandas, torchmetrics
before = state()
opened = []
def audit(event, arguments):
    writes = event == "open" and isinstance(arguments[1], str) and set(arguments[1]) & set("wax+")
    if (writes and "__pycache__" not in str(arguments[0])) or event in ("subprocess.Popen", "os.fork", "socket.connect"):
        opened.append((event, str(arguments[0])))
sys.addaudithook(audit)
for room in ROOMS:
    importlib.import_module("reinpp." + room)
assert state() == before, (before, state())
assert not opened, opened
"""
    done = subprocess.run([sys.executable, "-c", code.replace("ROOMS", repr(list(rooms())))], capture_output=True,
        text=True)
    assert done.returncode == 0, done.stderr[-2000:]
