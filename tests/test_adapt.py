"""The page for data of one's own, nbs/adapt.ipynb: two tiny folders with three classes, its cells run in this process.

Faults are refused with one line."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import nbformat
import numpy as np
import pytest
import torch
from PIL import Image

from reinpp.adaptation.rein_a import ReinA
from reinpp.command_line import main
from reinpp.labels import PALETTE
from reinpp.models.segmenter import load_segmenter

matplotlib.use("Agg")

ROOT = Path(__file__).resolve().parent.parent
SMALL = dict(crop=64, source_iterations=2, iterations=2, batch_size=1)


def write(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Three labelled images (values 7, 11, 23 and 0 for what is ignored) and two darker ones without labels, and one
    more for later."""
    base = tmp_path_factory.mktemp("mine")
    draw = np.random.default_rng(0)
    for k in range(6):
        mask = np.full((80, 112), 7, np.uint8)
        mask[:30], mask[40:70, 10 * k:10 * k + 40], mask[-4:] = 23, 11, 0
        colours = np.zeros((256, 3), np.uint8)
        colours[[0, 7, 11, 23]] = [40, 40, 40], [90, 90, 100], [200, 60, 40], [120, 170, 230]
        image = np.clip(colours[mask] + draw.normal(0, 12, (80, 112, 3)), 0, 255)
        if k < 3:
            write(base / "day" / "images" / f"{k}.png", image.astype(np.uint8))
            write(base / "day" / "masks" / f"{k}.png", mask)
        else:
            write(base / ("night" if k < 5 else "june") / f"{k}.png", (image * 0.4).astype(np.uint8))
    (base / "classes.csv").write_text("id,name\n0,ignore\n7,road\n11,car\n23,sky\n")
    return base


def cells():
    return [c.source for c in nbformat.read(ROOT / "nbs" / "adapt.ipynb", 4).cells if c.cell_type == "code"]


def page(until=None, **parameters):
    """The page's cells in this process, with these parameters; all of them, or up to the one that holds `until`.

    Returns its names."""
    space = {"__name__": "page"}
    exec(cells()[0], space)
    space |= parameters
    for source in cells()[1:]:
        source = "\n".join(line for line in source.splitlines() if not line.startswith("%"))
        exec(source.partition(until)[0] if until else source, space)
        if until and until in source: break
    plt.close("all")
    return space


def mine(folders, out, **more):
    return dict(source=str(folders / "day"), target=str(folders / "night"), classes=str(folders / "classes.csv"),
        start=None, output=str(folders / out)) | SMALL | more


@pytest.fixture(scope="module")
def finished(folders):
    "The page on the two folders, from nothing."
    page(**mine(folders, "out"))
    return folders


def test_through_papermill_a_misspelt_parameter_is_refused(tmp_path):
    command = [sys.executable, "-m", "papermill", str(ROOT / "nbs" / "adapt.ipynb"), str(tmp_path / "out.ipynb")]
    done = subprocess.run([*command, "--no-progress-bar", "-p", "iteration", "2"], capture_output=True, text=True,
        cwd=ROOT, timeout=600)
    said = "unknown parameter iteration: this notebook takes source, target"
    assert done.returncode != 0 and said in done.stderr, done.stderr[-2000:]


def test_everything_comes_out(finished):
    out = finished / "out"
    labels = sorted((out / "predictions" / "trainids").glob("*.png"))
    coloured = sorted((out / "predictions" / "colour").glob("*.png"))
    assert [f.name for f in labels] == ["3.png", "4.png"] == [f.name for f in coloured]
    for file in labels:
        label = np.asarray(Image.open(file))
        assert label.shape == (80, 112) and label.max() < 3
    assert (out / "classes.csv").read_text().split() == ["value,name", "0,road", "1,car", "2,sky"]
    assert (out / "predictions" / "legend.png").stat().st_size > 500
    segmenter = load_segmenter(out / "adapter")
    assert segmenter.num_classes == 3 and sum(f.stat().st_size for f in (out / "adapter").iterdir()) < 8e6
    rein_g = load_segmenter(out / "rein_g")
    assert not torch.equal(rein_g.adapter.scale, segmenter.adapter.scale)
    (run,) = out.glob("rein_a-*")
    assert (run / "views" / "000000.png").exists() and "agreement" in json.loads(
        (run / "log.jsonl").read_text().splitlines()[0])
    assert json.loads((out / "record.json").read_text())["training"]["finished"]
    assert not (finished / "night" / "masks").exists()


def test_reinpp_predict_gives_the_pages_labels_pixel_for_pixel(finished, tmp_path):
    out = finished / "out"
    assert main(["predict", str(finished / "night"), "--adapter", str(out / "adapter"), "--out", str(tmp_path)]) == 0
    for file in sorted((out / "predictions" / "trainids").glob("*.png")):
        assert (np.asarray(Image.open(file)) == np.asarray(Image.open(tmp_path / "trainids" / file.name))).all()
    use = json.loads((out / "adapter" / "use.json").read_text())
    assert use["classes"] == ["road", "car", "sky"] and use["colours"] == PALETTE[[0, 13, 10]].tolist()
    assert use["window"] == 64 and use["fit"][1] == 64


@pytest.mark.parametrize("key, value", [
    ("window", "64"), ("stride", 100), ("colours", [[0, 0, 256]] * 3), ("classes", ["a"]), ("more", 1)])
def test_a_use_of_another_form_is_refused(finished, tmp_path, capsys, key, value):
    shutil.copytree(finished / "out" / "adapter", tmp_path / "adapter")
    path = tmp_path / "adapter" / "use.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    assert main(["predict", str(finished / "night"), "--adapter", str(tmp_path / "adapter")]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "use.json" in said


def test_killed_half_way_it_goes_on(finished, monkeypatch):
    """Interrupted in the second iteration of Rein-A.

    The second start trains what is missing only, and ends with the same adapter, bit for bit."""
    whole = (finished / "out" / "adapter" / "adapter_model.safetensors").read_bytes()
    again = finished / "again"
    shutil.copytree(finished / "out", again, ignore=shutil.ignore_patterns("adapter", "predictions", "rein_a-*"))
    (source_run,) = again.glob("rein_g-*")
    before = (source_run / "checkpoint.pt").stat().st_mtime_ns
    steps, real = [], ReinA.step

    def step(self, batch, iteration):
        steps.append(iteration)
        if steps == [0, 1]:
            raise KeyboardInterrupt
        return real(self, batch, iteration)

    monkeypatch.setattr(ReinA, "step", step)
    with pytest.raises(KeyboardInterrupt):
        page(**mine(finished, "again"))
    assert not (again / "adapter").exists()
    page(**mine(finished, "again"))
    assert steps == [0, 1, 1], "only what was missing is trained"
    assert (source_run / "checkpoint.pt").stat().st_mtime_ns == before
    assert (again / "adapter" / "adapter_model.safetensors").read_bytes() == whole


def test_more_images_arrive(finished):
    "From the saved adapter, on old and new images; the proposals of the old ones are kept."
    page(**mine(finished, "later", target=[str(finished / "night"), str(finished / "june")],
        start=str(finished / "out" / "adapter"), proposals=str(finished / "out" / "proposals")))
    labels = sorted((finished / "later" / "predictions" / "trainids").glob("*.png"))
    assert [f.name for f in labels] == ["3.png", "4.png", "5.png"]
    assert len(list((finished / "out" / "proposals").iterdir())) == 3 and not (finished / "later" / "rein_g").exists()


def first_cells(folder, **parameters):
    "The page up to where a model is made: its error, or None."
    try:
        page("torch.manual_seed", **dict(output=str(folder / "refused")) | parameters)
    except (ValueError, OSError) as error:
        return str(error)


def test_the_pages_own_start_is_fine(tmp_path):
    assert first_cells(tmp_path, source="scenes:train[:2]", target="scenes:night/train[:2]") is None


@pytest.mark.parametrize("wrong, says", [
    (dict(source="nowhere"), "source: no folder nowhere"), (dict(target="nowhere"), "target: no folder nowhere"),
    (dict(sorce="x"), "unknown parameter sorce"),
    (dict(iterations=0), "iterations=0"), (dict(iterations="2"), "iterations='2'"), (dict(crop=-1), "crop=-1"),
    (dict(seed=-1), "seed=-1"), (dict(preset="huge"), "preset='huge'"),
    (dict(engine="sam9"), "engine='sam9'"), (dict(options="tau"), "options='tau'"),
    (dict(options={"tau": "0.9"}), "options: Rein-A's settings: tau='0.9'"), (dict(options={"thau": 1}), "thau"),
    (dict(classes=3), "classes=3"), (dict(classes=["road", 3]), "classes="), (dict(target=[]), "no datasets"),
    (dict(target=3), "target=3"), (dict(source=None), "source=None"), (dict(output=3), "output=3"),
    (dict(seed=2**64), "seed="), (dict(workers=10**6), "workers=1000000"),
    (dict(classes="none.csv"), "classes: no file none.csv"), (dict(start="nowhere"), "nowhere"),
    (dict(backbone="dinov2_large", source="scenes:train[:2]", target="scenes:night/train[:2]"), "not dinov2_large")])
def test_wrong_parameters_are_refused(wrong, says, folders):
    given = dict(source=str(folders / "day"), target=str(folders / "night"), classes=str(folders / "classes.csv"),
        start=None) if "source" not in wrong else {}
    error = first_cells(folders, **given | wrong)
    assert error and says in error and "\n" not in error, error


def test_wrong_folders_are_refused(folders, tmp_path):
    given = dict(target=str(folders / "night"), classes=str(folders / "classes.csv"))
    # the bundled start
    assert "19 classes and the table 3" in first_cells(folders, source=str(folders / "day"), **given)
    assert "has no masks/" in first_cells(tmp_path, source=str(folders / "night"), **given)
    shutil.copytree(folders / "day", tmp_path / "day")
    write(tmp_path / "day" / "masks" / "1.png", np.full((80, 112), 99, np.uint8))
    error = first_cells(tmp_path, source=str(tmp_path / "day"), **given)
    assert "99" in error and "1.png" in error and "\n" not in error
    (tmp_path / "bad.csv").write_text("value;name\n1;road\n")
    bad = given | dict(classes=str(tmp_path / "bad.csv"))
    assert "header id,name" in first_cells(tmp_path, source=str(folders / "day"), **bad)
