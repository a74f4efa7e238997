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
from reinpp.explore import Explorer
from reinpp.labels import IGNORE, PALETTE, class_colours, class_list
from reinpp.models.segmenter import load_segmenter
from reinpp.own_data import OwnData, Task
from reinpp.paper import tables
from reinpp.prediction import read_use

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
    else:
        assert not until, f"no cell of the page holds {until}"
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
    assert (out / "classes.csv").read_text().split() == [
        "value,name,colour", "0,road,#804080", "1,car,#00008e", "2,sky,#4682b4"]
    assert Image.open(out / "before_after.png").width >= 3 * 400  # image, before, after
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
    monkeypatch.setattr(OwnData, "estimate", lambda self: "")  # which makes steps of its own
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
    "The page up to where a step is timed, and its look at all files: the error, or None."
    try:
        page("print(f", **dict(output=str(folder / "refused")) | parameters)["work"].check()
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
    (dict(classes=3), "classes=3"), (dict(classes=["road", 3]), "classes="), (dict(target=[]), "target=[]"),
    (dict(target=3), "target=3"), (dict(source=None), "source=None"), (dict(output=3), "output=3"),
    (dict(seed=2**64), "seed="), (dict(workers=10**6), "workers=1000000"),
    (dict(classes="none.csv"), "classes: no file none.csv"), (dict(classes=None), "say what the values in"),
    (dict(start="nowhere"), "nowhere"),
    (dict(backbone="dinov2_large", source="scenes:train[:2]", target="scenes:night/train[:2]"), "not dinov2_large")])
def test_wrong_parameters_are_refused(wrong, says, folders):
    given = dict(source=str(folders / "day"), target=str(folders / "night"), classes=str(folders / "classes.csv"),
        start=None) if "source" not in wrong else {}
    error = first_cells(folders, **given | wrong)
    assert error and says in error and "\n" not in error, error


def test_wrong_folders_are_refused(folders, tmp_path):
    given = dict(target=str(folders / "night"), classes=str(folders / "classes.csv"))
    # the bundled start
    assert "19 classes and the list 3" in first_cells(folders, source=str(folders / "day"), **given)
    given["start"] = None
    assert "has no masks/" in first_cells(tmp_path, source=str(folders / "night"), **given)
    shutil.copytree(folders / "day", tmp_path / "day")
    write(tmp_path / "day" / "masks" / "1.png", np.full((80, 112), 99, np.uint8))
    error = first_cells(tmp_path, source=str(tmp_path / "day"), **given)
    assert "99" in error and "1.png" in error and "\n" not in error
    (tmp_path / "bad.csv").write_text("value;name\n1;road\n")
    bad = given | dict(classes=str(tmp_path / "bad.csv"))
    assert "header name,colour,id" in first_cells(tmp_path, source=str(folders / "day"), **bad)


# ---------------------------------------------------------------- class lists

def test_a_class_list_of_names_colours_and_ids(tmp_path):
    file = tmp_path / "classes.csv"
    file.write_text("\ufeffName,Color,Id\nignore,,0\nroad,,7\nhedge,#00a040,21\nhedge,,22\npond,1 2 3,30\n")
    names, ids, colours = class_list(str(file))
    assert names == ("road", "hedge", "pond") and ids == {0: IGNORE, 7: 0, 21: 1, 22: 1, 30: 2, IGNORE: IGNORE}
    assert colours.tolist() == [PALETTE[0].tolist(), [0, 160, 64], [1, 2, 3]]
    file.write_text("name,colour\nroad,\nhedge,\n")
    names, ids, colours = class_list(str(file))
    assert ids == {0: 0, 1: 1, IGNORE: IGNORE} and (colours == class_colours(names)).all()
    assert colours[1].tolist() not in PALETTE.tolist(), "an unknown class has no known class's colour"
    assert class_list("cityscapes").ids is None and len(class_list("cityscapes").names) == 19


@pytest.mark.parametrize("text, says", [
    ("name,colour\nroad,#80408\nsky,\n", "no class list"), ("name,colour\nroad,300 0 0\nsky,\n", "colour '300 0 0'"),
    ("name,id\nroad,seven\nsky,2\n", "no class list"), ("name,id\nroad,7\nsky,7\n", "value 7 has two rows"),
    ("name,id\nroad,7\n", "1 classes"), ("id\n1\n", "header name,colour,id")])
def test_a_wrong_class_list_is_one_line(text, says, tmp_path):
    (tmp_path / "classes.csv").write_text(text)
    with pytest.raises(ValueError) as told:
        class_list(str(tmp_path / "classes.csv"))
    assert says in str(told.value) and "\n" not in str(told.value)


def test_the_classes_are_counted_by_name_before_anything_trains(folders):
    work = OwnData(Task(str(folders / "day"), classes=str(folders / "classes.csv"), output=folders / "counted"))
    table = work.histogram()
    assert list(table.index) == ["road", "car", "sky"] and table["source images"].tolist() == [3, 3, 3]
    assert table["source %"].sum() == pytest.approx(100, abs=0.1)
    assert table["source %"]["sky"] == pytest.approx(100 * 30 / 76, abs=0.1), "the ignored rows do not count"


# ---------------------------------------------------------------- what a machine lacks, said at once

def lacks(**task):
    with pytest.raises((ValueError, FileNotFoundError)) as told:
        OwnData(Task("scenes:train[:2]", "scenes:night/train[:2]", **task))
    assert "\n" not in str(told.value)
    return str(told.value)


def test_no_gpu_no_network_and_no_checkpoint_are_said_at_once(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "no NVIDIA GPU is visible" in lacks(device="cuda:0")
    assert "say device cpu" in lacks(backbone="dinov2_large")
    monkeypatch.setattr(tables, "_online", lambda: False)
    monkeypatch.setattr(tables, "data_folder", lambda: tmp_path)
    monkeypatch.setattr("reinpp.adaptation.sam.data_folder", lambda: tmp_path)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    tables.lacking_weights.cache_clear()
    try:
        said = lacks(backbone="dinov2_large", device="cpu")
        assert "nothing in the cache, and no network" in said and "sam2" in said, "all of it in one line"
        assert "no network" in lacks(backbone="vit_small_patch16_224", device="cpu", engine="classical")
    finally:
        tables.lacking_weights.cache_clear()


# ---------------------------------------------------------------- the commands

def test_generalize_then_adapt_to_photographs_of_any_size(folders, tmp_path, capsys):
    """Two commands: Rein-G on the labelled folder, then on from it, to a folder of photographs of mixed sizes, one of
    them taken upright, with masks to measure with; and `predict` gives the same labels."""
    target, rein_g, out = tmp_path / "street", tmp_path / "rein_g", tmp_path / "out"
    exif = Image.Exif()
    exif[0x0112] = 6
    for k, size in enumerate([(112, 80), (90, 70), (61, 40)]):
        dark = Image.open(folders / "night" / "3.png").resize(size)
        (target).mkdir(exist_ok=True)
        dark.save(target / f"{k}.jpg", exif=exif if k == 2 else Image.Exif())
    made = ["--classes", str(folders / "classes.csv"), "--crop", "64", "--batch-size", "1", "--json"]
    assert main(["generalize", str(folders / "day"), "--iterations", "2", "--out", str(rein_g), *made]) == 0
    told = capsys.readouterr()
    start = json.loads(told.out)["adapter"]
    assert "2 iterations of about" in told.err and "MB" in told.err and "sky" in told.err, "cost and classes are said"
    command = ["adapt", str(target), "--source", str(folders / "day"), "--start", start, "--iterations", "2", *made]
    assert main([*command, "--out", str(out)]) == 0
    told = capsys.readouterr()
    report = json.loads(told.out)
    assert report["images"] == 3 and report["miou"]["after"] is None and "class_entropy" in report["scores"]["after"]
    assert "Rein-A on the target: 2 iterations" in told.err and "Rein-G" not in told.err
    assert Image.open(report["picture"]).height > 300
    again = report["command"].split()[1:]
    again[again.index("FOLDER")] = str(target)
    assert main([*again, "--out", str(tmp_path / "again")]) == 0
    for k in range(3):
        both = (place / "trainids" / f"{k}.png" for place in (out / "predictions", tmp_path / "again"))
        labels = [np.asarray(Image.open(file)) for file in both]
        assert (labels[0] == labels[1]).all()
    assert labels[0].shape == (61, 40), "the upright photograph is upright"
    e = Explorer("adapter", domain=str(target), folder=out, runs=out)
    assert (e.state.tau, e.state.weighting) == (0.8, "pixel"), "as the adapter's record says"
    run = next(name for name in e.adapters if name.endswith(": student"))
    for name, k in ((name, k) for name in ("adapter", run) for k in range(3)):
        label = np.asarray(Image.open(out / "predictions" / "trainids" / f"{k}.png"))
        assert (e.change(adapter=name, index=k).view().prediction == label).all(), f"{name} in the explorer"
    kept = read_use(e.folder("adapter"), e.use("adapter"))
    assert e.how(run) == kept and (e.state.tau, e.state.weighting) == (0.8, "pixel"), "as the preset adapts"


def test_masks_of_the_target_measure_and_do_not_train(folders, tmp_path, monkeypatch):
    seen, real = [], ReinA.__init__

    def init(self, segmenter, source, target, *more, **others):
        seen.append(target.labelled)
        real(self, segmenter, source, target, *more, **others)

    monkeypatch.setattr(ReinA, "__init__", init)
    monkeypatch.setattr(OwnData, "estimate", lambda self: "")
    target = tmp_path / "labelled"
    shutil.copytree(folders / "day", target)
    made = ["--classes", str(folders / "classes.csv"), "--crop", "64", "--batch-size", "1", "--iterations", "1",
        "--source-iterations", "1", "--out", str(tmp_path / "out")]
    assert main(["adapt", str(target), "--source", str(folders / "day"), *made]) == 0
    miou = json.loads((tmp_path / "out" / "record.json").read_text())["miou"]
    assert seen == [False] and 0 <= miou["before"] <= 1 and 0 <= miou["after"] <= 1
    assert Image.open(tmp_path / "out" / "before_after.png").width >= 4 * 400, "the masks stand beside"


def test_stopped_the_command_says_that_it_goes_on(folders, tmp_path, monkeypatch, capsys):
    def step(self, batch, iteration):
        raise KeyboardInterrupt

    monkeypatch.setattr(OwnData, "estimate", lambda self: "")
    monkeypatch.setattr("reinpp.training.generalize.Generalize.step", step)
    status = main(["generalize", str(folders / "day"), "--classes", str(folders / "classes.csv"), "--crop", "64",
        "--iterations", "2", "--out", str(tmp_path / "out")])
    said = capsys.readouterr().err
    assert status == 130 and said.count("\n") == 1 and "the same command goes on from there" in said
