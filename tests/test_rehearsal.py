"A slice of the rehearsal: each kind of run once, what fails in the middle, and what is filled from whole records."
import dataclasses
import os
import shutil
import types
from pathlib import Path

import numpy as np
import pytest
import rehearsal
import torch
from PIL import Image

from reinpp.adaptation.engines import instances
from reinpp.data.catalog import open_dataset
from reinpp.data.check import check
from reinpp.data.sampling import STATISTICS, Sampler, class_statistics
from reinpp.data.transforms import TrainTransform
from reinpp.models.segmenter import create_segmenter
from reinpp.paper.cells import BACKBONES, ONE_HEAD, tables
from reinpp.paper.experiments import Ledger, plan
from reinpp.paper.runs import run
from reinpp.paper.servers import asked
from reinpp.paper.tables import fill, lacking, preflight, reason_of
from reinpp.training.evaluation import evaluate, proposal_purity

REAL = Path(__file__).resolve().parents[2] / "shared" / "data"  # four frames of Cityscapes, where they are
NEW, IN_1024 = dict(model=dict(adapter_args=ONE_HEAD)), dict(setting="cityscapes 1024")
SMALL = ("bdd100k:val",)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    "A folder with generated trees of every set, and the synthetic checkpoint."
    root = tmp_path_factory.mktemp("rehearsal")
    rehearsal.make_trees(root / "data")
    rehearsal.make_checkpoint(root / "data")
    for corruption in ("brightness", "fog"):  # in the layout of what `make_cityscapes_c` makes
        shutil.copytree(root / "data" / "cityscapes" / "leftImg8bit" / "val",
            root / "data" / "cityscapes_c" / corruption / "5")
    return root


def planned(method, evaluate_on=SMALL, scorecard=0, **more):
    "A run of the rehearsal with smaller batches, on fewer domains, and its start likewise."
    def cut(e, domains):
        training = e.training | (dict(batch_size=1) if e.training.get("batch_size", 1) > 2 else {})
        return dataclasses.replace(e, evaluate_on=domains, training=training, start=e.start and cut(e.start, SMALL),
            data=e.data | dict(scorecard=scorecard))
    return cut(plan("rehearsal", method, **more), evaluate_on)


def made(place, experiment):
    return run(experiment, Ledger(place / "results"), place / "runs", place / "data", progress="none")


@pytest.mark.parametrize("backbone", BACKBONES)
def test_rein_g_on_each_backbone(backbone, place):
    record = made(place, planned("rein_g", model=dict(backbone=backbone)))
    assert record["metrics"]["bdd100k:val"]["images"] == 1 and record["scores"] == {}
    assert all(v is not None for v in record["metrics"]["bdd100k:val"]["iou"].values()), "every class occurs"


@pytest.mark.parametrize("what", [
    dict(method="freeze", augment="pasta"), dict(method="full", setting="three sources"), dict(method="bitfit"),
    dict(method="lora"), dict(method="adaptformer"), dict(method="vpt", augment="advstyle"),
    dict(method="rein_g", model=dict(head="semantic_fpn"))], ids=str)
def test_each_kind_of_source_model(what, place):
    record = made(place, planned(**what))
    assert record["training"]["seconds"] > 0 and record["metrics"].keys() == {"bdd100k:val"}


def test_every_protocol_and_a_scorecard(place):
    domains = "gtav:source_val", "cityscapes:val", "mapillary:val", "darkzurich:val", "acdc:val"
    record = made(place, planned("freeze", domains, scorecard=1))
    assert list(record["metrics"]) == list(domains) == list(record["scores"])
    assert record["metrics"]["acdc:val"]["parts"].keys() == {"fog", "night", "rain", "snow"}


def test_rein_a_with_sam_its_control_and_an_archive(place):
    target = dict(setting="cityscapes", target="acdc")
    record = made(place, planned("rein_a", **target))
    assert record["archives"] == dict(acdc="acdc.zip, 4 images") and record["config"]["target"] == "acdc:train"
    folder = place / "runs" / planned("rein_a", **target).training_key
    assert (folder / "acdc.zip").exists() and not list(folder.glob("*.partial.json"))
    assert any((place / "runs" / "proposals" / "acdc_train_sam2_4").glob("*.safetensors"))
    control = made(place, planned("control", setting="cityscapes"))
    assert control["start_iterations"] == record["start_iterations"] == 2


def test_the_recipe_and_the_released_checkpoint(place):
    trained = made(place, planned("rein_g", ("acdc:fog/val",), **NEW, **IN_1024))
    released = made(place, planned("official", ("acdc:fog/val",), **NEW, **IN_1024))
    assert released["archives"] == trained["archives"] == dict(acdc="acdc.zip, 4 images")
    assert len(released["training"]["checkpoint"]) == 64 and released["training"]["seconds"] == 0
    before = released["parameters"]
    assert before["adapter"] == trained["parameters"]["adapter"] and before["head"] == trained["parameters"]["head"]
    corrupted = ("cityscapes_c:brightness/5", "cityscapes_c:fog/5")
    record = made(place, planned("rein_g", corrupted, **NEW, setting="cityscapes-c 1024"))
    assert record["training_key"] == trained["training_key"] and tuple(record["metrics"]) == corrupted
    assert record["training"] == trained["training"], "trained once, evaluated on both"


def test_an_evaluation_that_was_cut_goes_on(place, tmp_path, monkeypatch):
    from reinpp.paper import runs
    experiment, seen, real = planned("freeze", ("bdd100k:val", "darkzurich:val"), seed=5), [], runs._evaluate

    def stops(segmenter, domain, *rest):
        seen.append(domain)
        if len(seen) == 2: raise KeyboardInterrupt
        return real(segmenter, domain, *rest)
    monkeypatch.setattr(runs, "_evaluate", stops)
    with pytest.raises(KeyboardInterrupt):
        made(place, experiment)
    record = made(place, experiment)
    assert seen == ["bdd100k:val", "darkzurich:val", "darkzurich:val"] and len(record["metrics"]) == 2


def test_one_failing_run_and_one_without_data_do_not_hinder_the_others(place, tmp_path, capsys):
    data = tmp_path / "data"
    shutil.copytree(place / "data", data, ignore=shutil.ignore_patterns("urbansyn", "mapillary"))
    foreign = place / "runs" / "proposals" / "gtav_train_classical_4"
    foreign.mkdir(parents=True)
    (foreign / "manifest.json").write_text("{}")
    start = ("mapillary:val",)  # cannot be evaluated, and is trained for what starts from it
    whole = planned("rein_a", target="citys", seed=7, engine="classical")
    fails = dataclasses.replace(whole, start=dataclasses.replace(whole.start, evaluate_on=start))
    control = dataclasses.replace(planned("control", seed=7), start=fails.start)
    lacks = planned("freeze", setting="three sources", seed=7)
    ledger = Ledger(tmp_path / "results")
    failed = fill([fails.start, lacks, fails, control], ledger, True, data, place / "runs", progress="none")
    assert failed.keys() == {fails.start.key, lacks.key, fails.key} and ledger.get(control)
    assert "mapillary" in failed[fails.start.key] and "urbansyn" in failed[lacks.key]
    assert "gtav_train_classical_4" in failed[fails.key] and all("\n" not in why for why in failed.values())
    said = capsys.readouterr().out
    assert "is trained, and not evaluated" in said and "of training here" in said, "the estimate comes first"


def test_a_set_that_comes_later_is_added_to_the_record(place, tmp_path, capsys, monkeypatch):
    "What is evaluated has its numbers at once; nothing is trained, and nothing evaluated, a second time."
    from reinpp.paper import runs
    seen = []
    for name in ("_evaluate", "_score"):
        def watched(segmenter, domain, *more, real=getattr(runs, name)):
            seen.append(domain)
            return real(segmenter, domain, *more)
        monkeypatch.setattr(runs, name, watched)
    data = tmp_path / "data"
    shutil.copytree(place / "data", data, ignore=shutil.ignore_patterns("mapillary"))
    e = planned("freeze", seed=11)
    e = dataclasses.replace(e, evaluate_on=("mapillary:val", "bdd100k:val"), data=e.data | dict(scorecard=1))
    ledger = Ledger(tmp_path / "results")
    assert not fill([e], ledger, True, data, tmp_path / "runs", progress="none")
    first, said = ledger.get(e), capsys.readouterr().out
    assert list(first["metrics"]) == list(first["scores"]) == ["bdd100k:val"]
    assert "not on mapillary:val, until it is here: mapillary: no folder" in said
    lines = lacking(e, data, tmp_path / "runs", ledger.folder)
    assert len(lines) == 1 and lines[0].startswith("no numbers on mapillary: mapillary: no folder")
    assert lacking(e, data, tmp_path / "runs", ledger.folder, tests=False) == []
    assert ledger.has(e, data) and not ledger.has(e, place / "data")
    assert not fill([e], ledger, True, data, tmp_path / "runs") and "0 not in the ledger" in capsys.readouterr().out

    assert not fill([e], ledger, True, place / "data", tmp_path / "runs", progress="none")
    whole, said = ledger.get(e), capsys.readouterr().out
    assert list(whole["metrics"]) == ["mapillary:val", "bdd100k:val"] and ledger.has(e, place / "data")
    assert whole["scores"].keys() == whole["metrics"].keys() and first["scores"].items() < whole["scores"].items()
    assert whole["metrics"]["bdd100k:val"] == first["metrics"]["bdd100k:val"]
    assert whole["training"] == first["training"] and "training freeze" not in said
    assert seen == ["bdd100k:val"] * 2 + ["mapillary:val"] * 2, "each is evaluated once, and scored once"


def test_preflight_names_what_each_row_lacks(place, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(place / "data", data, ignore=shutil.ignore_patterns("urbansyn", "weights"))
    rows = tables()["table4"].paper | {k: v for k, v in tables()["table2"].paper.items() if "EVA" in k}
    lacks = preflight("rehearsal", rows, data_root=data)
    assert [label for label, lines in lacks.items() if any("urbansyn" in line for line in lines)] == [
        label for label in lacks if "Urbansyn" in label] != []
    assert [label for label, lines in lacks.items() if any("checkpoint" in line for line in lines)] == [
        "released checkpoint", "released checkpoint, Cityscapes-C"]
    assert lacks["Rein-G"] == [] and not any(preflight("rehearsal", rows, data_root=place / "data").values())


def test_a_data_set_that_cannot_be_written(place, tmp_path, monkeypatch, capsys):
    "Class statistics are kept where REINPP_CACHE_ROOT says. (Root may write anywhere: it is told otherwise.)"
    data, real = tmp_path / "data", os.access
    monkeypatch.setenv("REINPP_CACHE_ROOT", str(tmp_path / "cache"))
    shutil.copytree(place / "data", data)
    monkeypatch.setattr(os, "access", lambda path, mode: real(path, mode) and not (
        mode == os.W_OK and Path(path).is_relative_to(data)))
    before, folders = set(data.rglob("*")), [data, *filter(Path.is_dir, data.rglob("*"))]
    for folder in folders: folder.chmod(0o555)
    try:
        e = planned("rein_a", target="citys", seed=3, use_stm=False)
        record = run(e, Ledger(tmp_path / "results"), tmp_path / "runs", data, progress="none")
    finally:
        for folder in folders: folder.chmod(0o755)
    assert record["metrics"]["bdd100k:val"]["images"] == 1 and set(data.rglob("*")) == before
    assert "cannot be written: its class statistics are kept in" in capsys.readouterr().out
    assert (tmp_path / "cache" / "statistics" / "gtav" / STATISTICS[0]).exists()


def whole(e):
    "A record of a run that was never made, whole."
    from reinpp.labels import CLASSES
    from reinpp.paper.servers import servers_of
    one = dict(miou=.5, pixel_accuracy=.6, iou=dict.fromkeys(CLASSES, .5), images=1)
    archives = {server: f"{server}.zip, 4 images" for server in servers_of(e)}
    return dict(key=e.key, config=e.config(), metrics=dict.fromkeys(e.evaluate_on, one), seconds=1.0, parameters={},
        training=dict(seconds=7200.0, peak_memory=5e9, loss_last_1000=.1), versions={}, commit="", date="",
        archives=archives)


def test_whole_records_fill_every_cell(tmp_path):
    ledger = Ledger(tmp_path)
    for e in rehearsal.every_run().values(): ledger.put(e, whole(e))
    table = rehearsal.filled(ledger)
    empty = table["not filled"][table["not filled"] != ""]
    assert set(empty.index) == {"table4", "table9"} and empty.str.contains("server").all(), "they have not answered"
    rehearsal.answer(ledger)
    table = rehearsal.filled(ledger)
    assert (table.filled == table["of runs"]).all() and table.filled.sum() > 1000 and not any(table["not filled"])
    assert (asked(ledger).answered != "not yet").all()
    some = next(e for e in rehearsal.every_run().values() if e.method == "rein_a")
    ledger.path(some).unlink()
    assert any(rehearsal.filled(ledger)["not filled"]), "a record that is gone is seen"


def test_without_memory_it_says_what_would_fit():
    error = torch.OutOfMemoryError("CUDA out of memory")
    said = reason_of(error, plan("paper", "rein_g", model=dict(backbone="internvl_6b")))
    assert "4-bit" in said and "a batch of 2 (another run; not comparable)" in said and "bf16 weights" not in said
    full = reason_of(error, plan("paper", "full"))
    assert "4-bit" not in full and "checkpointing" in full and "\n" not in full


@pytest.mark.skipif(not (REAL / "cityscapes").is_dir(), reason="the four frames of Cityscapes are not here")
def test_genuine_frames(tmp_path):
    "Four frames of 2048 x 1024: check, reader, statistics, augmentation and windowed prediction."
    report = check("cityscapes:train", REAL, published=False, workers=1, progress="none", cache=None)
    assert report.ok and len(report.problems) == 0
    frames = open_dataset("cityscapes", "train", root=REAL)
    image, label, name = frames[0]
    assert len(frames) == 4 and image.shape == (3, 1024, 2048) and label.shape == (1024, 2048)
    counts = class_statistics(frames, tmp_path, workers=1, progress="none")
    assert counts.shape == (4, 19) and (counts.sum(1) > 1_500_000).all() and (counts[:, 0] > 100_000).all()
    assert torch.equal(counts, class_statistics(frames, tmp_path, workers=1, progress="none")), "read again"
    sampler = Sampler(frames, rcs=True, counts=counts)
    index, wanted = sampler.draw(3, 0)
    crop = TrainTransform(crop=512, base=512, scales=tuple(range(5, 21)), max_long=2048, min_class_pixels=3000)
    picture, truth = crop(*frames[index][:2], wanted)[:2]
    assert picture.shape[-2:] == truth.shape[-2:] == (512, 512) and wanted in truth.unique()
    file = REAL / "cityscapes/gtFine/train/aachen" / name.replace("leftImg8bit", "gtFine_instanceIds.png")
    ids = np.asarray(Image.open(file))
    official = types.SimpleNamespace(instances=lambda i: torch.from_numpy(ids.astype(np.int32)))
    inside, area = proposal_purity(label, instances(official, 0).masks)
    assert inside > .95 * area > 1000, "an official instance is of one class"
    segmenter = create_segmenter(**plan("rehearsal", "freeze").model).eval()
    result = evaluate(segmenter, open_dataset("cityscapes", "train", root=REAL), window=512, stride=341, batch=1)
    assert result["images"] == 4 and sum(map(sum, result["confusion"])) == counts.sum(), "each labelled pixel once"


def test_a_page_counts_the_reduced_models_too(capsys):
    "Rein-G's parameters as the page counts them, on the meta device, are those of the very segmenter of the run."
    from types import SimpleNamespace

    from reinpp.models.segmenter import create_segmenter
    from reinpp.paper.page import count_rows
    row, = (row for label, row in tables()["table6"].rows("rehearsal").items() if label == "rank 8")
    model = plan("rehearsal", **row).model
    record = dict(parameters=create_segmenter(**model).trainable_parameters())
    page = SimpleNamespace(rows={"rank 8": row}, preset="rehearsal", records=lambda label: [record])
    count_rows(page)
    assert capsys.readouterr().out == f"rank 8: {record['parameters']['adapter']:,}, as in its records\n"
    record["parameters"]["adapter"] += 1
    with pytest.raises(AssertionError): count_rows(page)
