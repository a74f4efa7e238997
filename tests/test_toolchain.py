"""The tool chain's known traps, and that everything that must say the same thing does."""

import configparser
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import nbformat
import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT / "nbs").glob("*.ipynb"))
# Notebooks that nbdev_test runs (see the Makefile); all others take papermill parameters.
NUMBERED = re.compile(r"^([0-9][0-9][a-z]?_|index[.])")
WITH_PARAMETERS = [path for path in NOTEBOOKS if not NUMBERED.match(path.name)]
QUARTET = "nbdev", "fastcore", "execnb", "ghapi"

by_name = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def ours(*patterns):
    """The project's own files (not what is ignored, such as .venv and data sets) that match a pattern."""
    return sorted(path for pattern in patterns for path in ROOT.glob(pattern) if path.is_file())


def run(*command, cwd=ROOT):
    result = subprocess.run(command, cwd=cwd, capture_output=True, text=True)
    assert result.returncode == 0, f"{' '.join(map(str, command))}\n{result.stdout}\n{result.stderr}"
    return result.stdout


def tool(name):
    """A console script of the environment that runs the tests."""
    return str(Path(sys.executable).with_name(name))


# ---- Pins


def pins(lines):
    """{name: version} of lines `name==version`."""
    found = {}
    for line in lines:
        if line.strip() and not line.startswith(("#", "-")):
            name, version = line.strip().split("==")
            found[canonicalize_name(name)] = version
    return found


@pytest.fixture(scope="module")
def constraints():
    return pins((ROOT / "constraints.txt").read_text().splitlines())


@pytest.fixture(scope="module")
def requirements():
    """The requirements of `.[dev]`, by name."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    found = [Requirement(text) for text in project["dependencies"] + project["optional-dependencies"]["dev"]]
    return {canonicalize_name(requirement.name): requirement for requirement in found}


def test_constraints_pin_every_requirement(constraints, requirements):
    for name, requirement in requirements.items():
        assert name in constraints, f"constraints.txt lacks {name}"
        assert requirement.specifier.contains(
            constraints[name]), f"constraints.txt has {name} {constraints[name]}, not {requirement}"


def test_extras_have_the_same_pins(constraints):
    extras = pins((ROOT / "extras.txt").read_text().splitlines())
    assert extras and extras == {name: constraints[name] for name in extras}


def test_environment_has_the_same_pins(constraints, requirements):
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    pip = environment["dependencies"][-1]["pip"]
    assert {"-c constraints.txt", "-e .[dev]"} <= set(pip)
    assert pins(pip) == {name: constraints[name] for name in (*requirements, "sam2")}
    for line in pip:  # one call of pip installs them all: nothing but requirements and what a requirements file may say
        assert line in ("-c constraints.txt", "-e .[dev]") or Requirement(line).specifier, line
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    python = next(text for text in environment["dependencies"] if str(text).startswith("python"))
    assert python.removeprefix("python") == project["requires-python"]


def test_extras_are_a_part_of_dev(requirements):
    """Few hard dependencies; what `.[dev]` installs holds every extra.

    But the browser's, and those whose own requirements fight."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    assert {"notebooks", "onnx", "quantize", "video", "sam", "cluster", "docs", "tensorboard"} <= set(extras)
    hard = {canonicalize_name(Requirement(text).name) for text in project["dependencies"]}
    for name, texts in extras.items():
        for one in map(Requirement, texts if name not in ("sam", "corruptions", "browser") else ()):
            assert str(requirements[canonicalize_name(one.name)].specifier) == str(one.specifier), f"{name}: {one}"
            assert name == "dev" or canonicalize_name(one.name) not in hard, f"{name}: {one} is installed anyway"


def test_settings_pin_nbdev_and_its_companions(constraints, requirements):
    settings = configparser.ConfigParser(delimiters=["="])
    settings.read(ROOT / "settings.ini")
    dev = {requirement.name: requirement for requirement in map(Requirement,
        settings["DEFAULT"]["dev_requirements"].split())}
    assert set(dev) == set(QUARTET)
    for name in QUARTET:
        assert dev[name].specifier == requirements[name].specifier
        assert dev[name].specifier.contains(constraints[name])
    assert settings["DEFAULT"]["lib_name"] == "reinpp"
    assert settings["DEFAULT"]["update_pyproject"] == "False"


def test_pins_name_no_place_on_a_disk_or_a_network():
    for name in "constraints.txt", "environment.yml", "pyproject.toml":
        text = (ROOT / name).read_text()
        text = re.sub(r"(?m)^\[project\.urls\]\n(.+\n)+", "", text)  # the project's own pages
        assert not re.search(r"https?://|file:|--index-url|--find-links| @ ", text), name


def test_no_server_is_open_to_others():
    "JupyterLab listens on loopback and asks for a token unless it is told otherwise: nothing here tells it so."
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout.splitlines()
    texts = [name for name in tracked if name.endswith((".py", ".yml", ".md", ".toml", "Makefile", ".ci/run"))]
    assert "Makefile" in texts
    opened = re.compile(r"0\.0\.0\.0|\bip=(?!127\.0\.0\.1)|(token|password)=(''|\"\"|$| )|allow_(remote|origin)|"
        r"Server\(\((\"\"|'')")
    for name in texts:
        if name == "tests/test_toolchain.py" or not (ROOT / name).is_file(): continue
        for number, line in enumerate((ROOT / name).read_text().splitlines(), 1):
            assert not opened.search(line), f"{name}:{number}: {line.strip()}"


# ---- Notebooks


def test_cleaning_keeps_the_parameters_tag(tmp_path):
    """nbdev_clean with our settings, then papermill -p: the parameter must arrive."""
    (tmp_path / "nbs").mkdir()
    (tmp_path / "settings.ini").write_bytes((ROOT / "settings.ini").read_bytes())
    notebook = nbformat.v4.new_notebook(
        metadata={"kernelspec": {"name": "python3", "display_name": "x", "language": "python"}})
    notebook.cells = [nbformat.v4.new_code_cell("preset = 'auto'", metadata={"tags": ["parameters"], "trusted": True},
        execution_count=7)]
    notebook.cells.append(nbformat.v4.new_code_cell("print('preset is', preset)"))
    path = tmp_path / "nbs" / "page.ipynb"
    nbformat.write(notebook, path)
    run(tool("nbdev_clean"), cwd=tmp_path)
    cell = nbformat.read(path, as_version=4).cells[0]
    assert cell.metadata == {"tags": ["parameters"]} and cell.execution_count is None
    run(tool("papermill"), path, tmp_path / "out.ipynb", "-p", "preset", "tiny", "--no-progress-bar", cwd=tmp_path)
    assert "preset is tiny" in (tmp_path / "out.ipynb").read_text()


@pytest.mark.parametrize("path", WITH_PARAMETERS, ids=lambda path: path.stem)
def test_has_one_parameters_cell(path):
    tagged = [cell for cell in nbformat.read(path, as_version=4).cells if "parameters" in cell.metadata.get("tags", [])]
    assert len(tagged) == 1, f"{path.name}: papermill needs exactly one cell tagged `parameters`, it has {len(tagged)}"
    for line in tagged[0].source.splitlines():
        assert "=" not in line.partition("#")[
            2], f"{path.name}: a `=` in a parameter's comment hides it from papermill --help-notebook: {line}"


@pytest.mark.parametrize("path", WITH_PARAMETERS, ids=lambda path: path.stem)
def test_is_run_by_a_test(path):
    """nbdev_test does not run it, so a test must (through papermill, on the small preset)."""
    tests = [other.read_text() for other in ours("tests/*.py") if other != Path(__file__)]
    assert any(re.search(rf"\b{path.stem}\b", text) for text in tests), f"no test runs {path.name}"


@by_name
def test_opens_with_a_title_and_a_quoted_line(path):
    first = nbformat.read(path, as_version=4).cells[0]
    assert first.cell_type == "markdown" and re.match(r"# \S.*\n\n> \S",
        first.source), f"{path.name}: the first cell must be `# Title`, an empty line, `> one line`"


@by_name
def test_saved_outputs_hold_no_error_and_no_path_of_a_machine(path):
    machine = re.compile(r"(?<![\w.~])(?:/(?:work|root|home|Users|tmp|var|private|mnt|opt|usr)/\w|[A-Z]:\\\\?Users)")
    for number, cell in enumerate(nbformat.read(path, as_version=4).cells):
        texts = [cell.source]
        for output in cell.get("outputs", []):
            saved = f"{path.name}, cell {number}: saved error {output.get('ename')}: {output.get('evalue')}"
            assert output.output_type != "error", saved
            texts += [output.get("text", "")] + [str(value) for kind, value in output.get("data", {}).items()
                if not kind.startswith("image/")]
        for text in texts:
            found = machine.search(text)
            assert not found, f"{path.name}, cell {number}: {text[found.start():found.start() + 60]!r}"


@by_name
def test_shows_its_outputs(path):
    """A lesson is read without running it, too."""
    code = [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
    assert path.stem == "index" or any(
        cell.outputs for cell in code), f"{path.name} has no saved outputs: run it and save"


@by_name
def test_is_small(path):
    assert path.stat().st_size < 1_000_000, f"{path.name} has {path.stat().st_size:,} bytes: save smaller pictures"


def test_modules_and_notebooks_match():
    """Every module comes from a notebook that is still there; __init__ alone is written by hand."""
    exported = {}
    for path in NOTEBOOKS:
        for cell in nbformat.read(path, as_version=4).cells:
            found = re.search(r"(?m)^#\|\s*default_exp ([\w.]+)", cell.source) if cell.cell_type == "code" else None
            if found:
                exported[found[1]] = path.name
    assert set(rooms()) == set(exported)


def test_readme_is_the_front_page(tmp_path):
    run(tool("jupyter"), "nbconvert", "--config", ".ci/readme.py", "--log-level", "WARN", "--output-dir", tmp_path,
        "nbs/index.ipynb")
    assert (tmp_path / "README.md").read_text() == (
        ROOT / "README.md").read_text(), "README.md and nbs/index.ipynb differ: make readme"


def test_the_front_page_hides_what_it_says():
    "Of a cell with `echo: false` the front page shows what comes out."
    cells = [c.source for c in nbformat.read(ROOT / "nbs" / "index.ipynb", as_version=4).cells]
    hidden = [source for source in cells if re.match(r"#\|\s*echo: false", source)]
    lines = [line for source in hidden for line in source.splitlines()[1:] if line.strip()]
    shown = (ROOT / "README.md").read_text().splitlines()
    assert len(hidden) > 3 and not set(lines) & set(shown)


def test_readme_links_lead_somewhere():
    text = (ROOT / "README.md").read_text()
    for link in re.findall(r"\]\((?!\w+:|#)([^)#]+)", text):
        assert (ROOT / link).exists(), f"README.md links to {link}"


# ---- The package


def test_no_large_file():
    result = subprocess.run(["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=ROOT,
        capture_output=True, text=True)
    if result.returncode:
        pytest.skip("not a git checkout")
    for name in filter(None, result.stdout.split("\0")):
        path = ROOT / name
        assert not path.is_file() or path.stat().st_size < 9_000_000, f"{name} has {path.stat().st_size:,} bytes"


def rooms():
    """The modules of the package by their dotted names below it, those written or made by a tool aside."""
    below = (path.relative_to(ROOT / "reinpp").with_suffix("") for path in ours("reinpp/**/*.py"))
    return sorted(".".join(path.parts) for path in below if not path.name.startswith("_"))


def python(code):
    return run(sys.executable, "-c", code)


def test_modules_import_on_a_bare_machine():
    """What training needs imports with torch, torchvision, timm, numpy and safetensors alone.

    The rest of the package without any notebook tool."""
    code = """
import importlib, sys
tools = "nbdev execnb papermill jupyter jupyter_client jupyter_core IPython ipykernel ipywidgets nbformat".split()
tools += "pytest sam2 matplotlib".split()
extra = "cv2 pandas skimage scipy torchmetrics transformers peft".split()
sys.modules.update(dict.fromkeys(tools + extra))  # None: importing it raises ModuleNotFoundError
for room in ROOMS:
    if room.startswith("paper.") or room in ("command_line", "doctor", "own_data"):
        for name in extra:
            sys.modules.pop(name, None)
    importlib.import_module("reinpp." + room)
"""
    python(code.replace("ROOMS", repr(rooms())))


def test_public_names():
    """Loaded on first use; and `evaluate` is the function, not its module, in any order of imports."""
    python("""
import importlib, sys, types
import reinpp
assert "torch" not in sys.modules, "import reinpp alone must be quick"
for name in reinpp.__all__:
    value = getattr(reinpp, name)
    assert not isinstance(value, types.ModuleType), name
    assert value is getattr(sys.modules["reinpp." + reinpp._HOME[name]], name), name
assert set(reinpp.__all__) <= set(dir(reinpp))
try:
    reinpp.no_such_name
except AttributeError as error:
    assert "no_such_name" in str(error)
else:
    raise AssertionError("an unknown name must raise AttributeError")
names = {}
exec("from reinpp import *", names)
assert set(reinpp.__all__) <= set(names)
""")


def test_help_shows_parameters_and_what_comes_back():
    """Of every public function and class, beside its docstring: what the comments in its signature say."""
    python("""
import inspect, pydoc, reinpp
def shown(name): return pydoc.plain(pydoc.render_doc(getattr(reinpp, name)))
assert "num_classes: K" in shown("create_segmenter") and "image_size: of the training" in shown("create_segmenter")
assert "returns: the run's record" in shown("fit") and shown("fit").count("Parameters:") == 1 == shown("fit").count(
    "returns:")
assert "source: labelled" in shown("ReinA") and "iterations" in shown("fit")
for name in reinpp.__all__:
    value = getattr(reinpp, name)
    if inspect.isfunction(value): assert value.__doc__ and "Parameters:" in shown(name), name
""")


def test_export_keeps_the_public_names(tmp_path):
    """nbdev_export writes the version into __init__.py and leaves the rest alone."""
    (tmp_path / "nbs").mkdir()
    (tmp_path / "reinpp").mkdir()
    settings = (ROOT / "settings.ini").read_text()
    version = re.search(r"(?m)^version = (.+)$", settings)[1]
    (tmp_path / "settings.ini").write_text(settings.replace(f"version = {version}", "version = 9.8.7"))
    source = (ROOT / "reinpp" / "__init__.py").read_text()
    (tmp_path / "reinpp" / "__init__.py").write_text(source)
    run(tool("nbdev_export"), cwd=tmp_path)
    assert f'__version__ = "{version}"' in source
    assert (tmp_path / "reinpp" / "__init__.py").read_text() == source.replace(f'"{version}"', '"9.8.7"')
    assert str(tmp_path) not in (tmp_path / "reinpp" / "_modidx.py").read_text()


# ---- The wheel


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """A wheel of this tree, unpacked somewhere else: its folder. Beside what is versioned, data/ holds what a user has
    there."""
    base = tmp_path_factory.mktemp("wheel")
    tree, unpacked = base / "tree", base / "site"
    tree.mkdir()
    for name in ("pyproject.toml", "settings.ini", "LICENSE", "README.md"):
        shutil.copy(ROOT / name, tree)
    shutil.copytree(ROOT / "reinpp", tree / "reinpp", ignore=shutil.ignore_patterns("__pycache__"))
    for part in ("paper", "weights", "results"):
        shutil.copytree(ROOT / "data" / part, tree / "data" / part, ignore=shutil.ignore_patterns("*.pt", "*.pth"))
    for theirs in ("runs/x/log.json", "camvid/day_val/0.png", "weights/sam2.1_hiera_large.pt"):
        (tree / "data" / theirs).parent.mkdir(parents=True, exist_ok=True)
        (tree / "data" / theirs).write_bytes(b"{}")
    run(sys.executable, "-c", f"from setuptools import build_meta; build_meta.build_wheel({str(base)!r})", cwd=tree)
    (file,) = base.glob("*.whl")
    with zipfile.ZipFile(file) as archive:
        archive.extractall(unpacked)
    return unpacked


def test_the_wheel_brings_what_is_small_and_nobodys_data(wheel):
    files = {path.relative_to(wheel).as_posix() for path in wheel.rglob("*") if path.is_file()}
    ours_in_data = {f"reinpp/bundled/{path.relative_to(ROOT / 'data').as_posix()}" for path in ours(
        "data/paper/*", "data/weights/tiny.*", "data/weights/*/adapter_*", "data/results/*.json")}
    assert len(ours_in_data) > 30 and ours_in_data <= files
    assert not [name for name in files if "/runs/" in name or "camvid/" in name or name.endswith((".pt", ".png"))]
    assert {f"reinpp/{path.relative_to(ROOT / 'reinpp').as_posix()}" for path in ours("reinpp/**/*.py")} <= files


def test_an_installed_package_finds_its_data_and_writes_to_the_cache_alone(wheel, tmp_path):
    code = """
import sys
from pathlib import Path
import reinpp
from reinpp import load_segmenter
from reinpp.command_line import main
from reinpp.files import data_folder
from reinpp.paper.experiments import Ledger, plan
from reinpp.paper.report import paper_table
assert Path(reinpp.__file__).is_relative_to(sys.argv[1]), reinpp.__file__
assert data_folder() == Path(sys.argv[2]) / "reinpp"
load_segmenter("scenes_rein_g_seed0")
assert Ledger().get(plan("tiny", "rein_g")) and len(paper_table(7)) == 5
(data_folder() / "weights" / "tiny.safetensors").write_bytes(b"another one")
data_folder.cache_clear()
load_segmenter("scenes_rein_g_seed0")
assert main(["doctor"]) == 0
"""
    def held():
        return {path: path.stat().st_mtime_ns for path in wheel.rglob("*") if "__pycache__" not in path.parts}
    before = held()
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "REINPP_DATA")}
    environment |= dict(PYTHONPATH=str(wheel), XDG_CACHE_HOME=str(tmp_path), PYTHONDONTWRITEBYTECODE="1")
    done = subprocess.run([sys.executable, "-c", code, str(wheel), str(tmp_path)], cwd=tmp_path, env=environment,
        capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "preset     tiny: ready" in done.stdout and held() == before


def test_ledger_and_paper_are_readable():
    for path in ours("data/results/*.json"):
        record = json.loads(path.read_text())
        assert isinstance(record, dict), path.name
