"""The house: five wings on a small ground floor, and imports that only ever point down."""

import ast
import graphlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "reinpp"
# What a wing may import besides itself. Rooms directly in the package are the ground floor, or stand on top.
BELOW = {
    "ground": set(),
    "data": {"ground"},
    "models": {"ground"},
    "training": {"ground", "data", "models"},
    "adaptation": {"ground", "data", "models", "training"},
    "paper": {"ground", "data", "models", "training", "adaptation"},
    "top": {"ground", "data", "models", "training", "adaptation", "paper"},
}
TOP = {"explore", "render", "panel", "command_line", "prediction", "own_data", "doctor", "watch"}


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
                raise ValueError(f"{room} imports {name}, which is no room: import from the room that defines it")


GRAPH = {room: set(arrows(room, path)) for room, path in rooms().items()}


def test_no_cycle():
    assert len(list(graphlib.TopologicalSorter(GRAPH).static_order())) == len(rooms())


@pytest.mark.parametrize("room", GRAPH)
def test_imports_point_down(room):
    own = wing(room)
    for other in GRAPH[room]:
        there = wing(other)
        assert there in BELOW[own] | {own}, f"{room} ({own}) imports {other} ({there})"


def test_no_arrow_between_models_and_data():
    for room, others in GRAPH.items():
        for other in others:
            assert {wing(room), wing(other)} != {"models", "data"}, f"{room} imports {other}"


def test_every_room_has_a_wing():
    assert {wing(room) for room in GRAPH} <= BELOW.keys()
    assert {room for room in GRAPH if wing(room) == "ground"} == {"labels", "files", "processes", "work"}


def test_the_page_of_the_architecture_names_every_room():
    picture = (ROOT / "docs" / "architecture.md").read_text().split("```")[1]
    left = [room for room in GRAPH if room.rpartition(".")[2].replace("_", " ") not in picture.replace("_", " ")]
    assert not left, f"docs/architecture.md leaves out {', '.join(left)}"


def test_the_loop_knows_no_method():
    "`training.train` runs any objective: no segmenter, head, loss or adapter, and neither of the two objectives."
    methods = {room for room in GRAPH if room.startswith(("models.", "adaptation."))}
    assert not GRAPH["training.train"] & (methods | {"training.generalize", "training.ema"})


@pytest.mark.parametrize("room, path", rooms().items(), ids=list(GRAPH))
def test_imports_at_the_top_are_relative(room, path):
    "An import over several lines is not: nbdev turns single ones alone."
    for node in ast.parse(path.read_text()).body:
        absolute = isinstance(node, ast.ImportFrom) and not node.level and node.module.split(".")[0] == "reinpp"
        assert not absolute, f"{path.name}:{node.lineno} names reinpp: write the import in single lines"


@pytest.mark.parametrize("room, path", rooms().items(), ids=list(GRAPH))
def test_private_names_stay_at_home(room, path):
    "What another room imports has no leading underscore."
    for node in ast.walk(ast.parse(path.read_text())):
        inside = isinstance(node, ast.ImportFrom) and (node.level or (node.module or "").startswith("reinpp"))
        private = [alias.name for alias in node.names if alias.name.startswith("_")] if inside else []
        assert not private, f"{room} imports {private[0]} of {node.module}"


@pytest.mark.parametrize("source", ["from ..models.heads import Head", "import reinpp.nothing", "from .. import data"])
def test_an_import_of_no_room_is_noticed(source, tmp_path):
    (tmp_path / "train.py").write_text(source)
    with pytest.raises(ValueError, match="no room"):
        list(arrows("training.train", tmp_path / "train.py"))


@pytest.mark.parametrize("source, room", [
    ("from ..data.sampling import fold", "data.sampling"), ("from .ema import use_weights", "training.ema"),
    ("from .. import processes", "processes"), ("import reinpp.files", "files"),
    ("def f():\n    from reinpp.models.losses import matching", "models.losses")])
def test_an_arrow_is_seen_however_it_is_written(source, room, tmp_path):
    (tmp_path / "train.py").write_text(source)
    assert list(arrows("training.train", tmp_path / "train.py")) == [room]


STARTS_NOTHING = """
import importlib, multiprocessing, os, random, sys, threading
import numpy, torch, torch.optim.optimizer as optimizer, torch.nn.modules.module as module
import cv2, pandas, scipy, skimage, timm, torchmetrics, torchvision

def state():
    hooks = {f"{m.__name__}.{n}": len(getattr(m, n)) for m in (optimizer, module) for n in dir(m)
             if n.startswith("_global_") and hasattr(getattr(m, n), "__len__")}
    return dict(hooks=hooks, threads=threading.active_count(), processes=len(multiprocessing.active_children()),
                grad=torch.is_grad_enabled(), dtype=torch.get_default_dtype(), torch_threads=torch.get_num_threads(),
                draws=(random.getstate(), torch.get_rng_state().tolist(), numpy.random.get_state()[1].tolist()),
                environment=dict(os.environ), cuda=torch.cuda.is_initialized())

before, done = state(), []
def audit(event, arguments):
    writes = event == "open" and isinstance(arguments[1], str) and set(arguments[1]) & set("wax+")
    if writes and "__pycache__" not in str(arguments[0]) or event in ("subprocess.Popen", "os.fork", "socket.connect"):
        done.append((event, str(arguments[0])))
sys.addaudithook(audit)
for room in ROOMS:
    importlib.import_module(f"reinpp.{room}" if room else "reinpp")
    changed = [name for name, value in state().items() if value != before[name]]
    assert not changed and not done, (room, changed, done)
"""


def test_importing_starts_nothing():
    """No module registers a hook on optimisers or modules, starts a thread or a process, draws a random number, changes
    a setting or writes a file."""
    code = STARTS_NOTHING.replace("ROOMS", repr(["", *rooms()]))
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


def test_no_line_over_120():
    """What ruff says of the notebooks holds for what is exported; only nbdev's own lists (`__all__`) may be longer."""
    for path in sorted(PACKAGE.rglob("*.py")):
        if path.name == "_modidx.py":
            continue
        for number, line in enumerate(path.read_text().splitlines(), 1):
            assert len(line) <= 120 or line.startswith("__all__ = "), f"{path.name}:{number} has {len(line)} columns"


def test_pages_fit_the_window():
    "JupyterLab cuts code off at about 110 columns; lessons, which are read as modules too, may be wider."
    for path in sorted((ROOT / "nbs").glob("[a-z]*.ipynb")):
        for cell in json.loads(path.read_text())["cells"]:
            for line in "".join(cell["source"]).splitlines() if cell["cell_type"] == "code" else ():
                assert len(line) <= 110, f"{path.name}: {line}"
