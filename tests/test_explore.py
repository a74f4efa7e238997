"""The explorer: looks are what the model says, pictures are what the state says, and no slider runs a model."""

import io
import json
import subprocess
import sys
import threading
from dataclasses import FrozenInstanceError, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from reinpp.adaptation.rein_a import Adaptation, ReinA, pseudo_label
from reinpp.command_line import main
from reinpp.data.catalog import open_dataset
from reinpp.data.transforms import TrainTransform
from reinpp.explore import Explorer, adapters, domains, own_teaching
from reinpp.labels import CLASSES, IGNORE, colorize
from reinpp.models.losses import normalize_scores
from reinpp.models.segmenter import Segmenter, load_segmenter, tiny_segmenter
from reinpp.panel import Panel
from reinpp.prediction import Use, scores_of, write_use
from reinpp.render import LAYERS, State, caption, describe, heat, render
from reinpp.training.generalize import Generalize
from reinpp.training.looks import confusion_table, explain, look, mistakes, similarity_map, survey
from reinpp.training.train import fit

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def segmenter():
    torch.manual_seed(0)
    return tiny_segmenter()


@pytest.fixture(scope="module")
def scenes():
    return open_dataset("scenes", "snow/val", count=3, size=(96, 176))


@pytest.fixture(scope="module")
def seen(segmenter, scenes):
    image, label, _ = scenes[0]
    return look(segmenter, image, label, window=64)


@pytest.fixture(scope="module")
def explorer():
    e = Explorer(count=2)
    e.change(layer="proposals").picture()
    return e.change(layer="prediction")


@pytest.fixture
def no_model(monkeypatch):
    "From here on a model that predicts is an error."
    def refuse(*args, **options):
        raise AssertionError("a model ran")
    monkeypatch.setattr(Segmenter, "forward", refuse)


# Looks


def test_a_look_is_what_predict_says(segmenter, scenes, seen):
    scores = segmenter.predict(scenes[0][0][None] / 255, 64)[0]
    assert (seen.prediction == scores.argmax(0).numpy()).all()
    assert (seen.scores == scores.numpy()).all()
    assert (seen.confidence == normalize_scores(scores[None])[0].amax(0).numpy()).all()
    assert 0 <= seen.entropy.min() and seen.entropy.max() <= 1 + 1e-5


def test_listening_leaves_nothing_behind(segmenter, seen):
    assert not segmenter.head._forward_hooks and not segmenter.adapter._forward_pre_hooks


def test_hooks_go_when_prediction_fails(segmenter, monkeypatch):
    monkeypatch.setattr(Segmenter, "predict", lambda *a: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        look(segmenter, torch.zeros(3, 64, 64, dtype=torch.uint8))
    assert not segmenter.head._forward_hooks and not segmenter.adapter._forward_pre_hooks


@pytest.mark.parametrize("window", [None, 64])
@pytest.mark.parametrize("size", [(50, 70), (64, 128), (33, 70)])
def test_queries_add_up_to_the_score_at_any_size(segmenter, size, window):
    image = torch.randint(0, 256, (3, *size), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    found = look(segmenter, image, window=window)
    for x, y in ((0, 0), (size[1] - 1, size[0] - 1), (size[1] // 2, size[0] // 3)):
        why = explain(found, x, y)
        assert np.allclose(why.queries.sum(0), why.scores, atol=0.02)
        assert np.allclose(why.tokens.sum(-1), 1, atol=0.01)


@pytest.mark.parametrize(("fit", "size"), [((100, 80), (60, 100)), ((80, 1000), (80, 133)), ((300, 180), (180, 300))])
def test_a_look_in_another_size_is_that_of_predict_and_its_queries_add_up(segmenter, fit, size):
    image = torch.randint(0, 256, (3, 90, 150), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    found = look(segmenter, image, window=64, stride=50, fit=fit)
    use = Use(CLASSES, ((0, 0, 0),) * 19, 64, 50, fit)
    assert (found.scores == scores_of(segmenter, image.permute(1, 2, 0).numpy(), use).numpy()).all()
    assert found.size == size and found.prediction.shape == (90, 150)
    for x, y in ((0, 0), (149, 89), (70, 31)):
        why = explain(found, x, y)
        assert np.allclose(why.queries.sum(0), why.scores, atol=0.02)
        assert np.allclose(why.tokens.sum(-1), 1, atol=0.01)
    everything = sum(similarity_map(found, token=t) for t in range(found.attention.shape[3]))
    assert everything.shape == (90, 150) and np.allclose(everything, 1, atol=0.02)


def test_tokens_are_those_of_the_pixels_patch(segmenter):
    "On one whole window the map's value at a patch's centre is eq. 5 there."
    found = look(segmenter, torch.randint(0, 256, (3, 64, 64), dtype=torch.uint8))
    rows = found.attention.shape[-2]
    side = 64 // rows
    if side % 2 == 0:  # the centre lies between pixels: their mean
        middle = similarity_map(found, 1, 2, 3)[side // 2 - 1:side // 2 + 1, side // 2 - 1:side // 2 + 1].mean()
    else:
        middle = similarity_map(found, 1, 2, 3)[side // 2, side // 2]
    assert middle == pytest.approx(found.attention[0, 1, 2, 3, 0, 0], rel=0.05)


def test_a_pixel_outside_is_refused(seen):
    with pytest.raises(ValueError, match="x goes to 175, y to 95"):
        explain(seen, 176, 0)


def test_heads_without_queries_and_adapters_without_tokens(scenes):
    found = look(tiny_segmenter("freeze", "semantic_fpn"), *scenes[0][:2])
    why = explain(found, 3, 3)
    assert why.queries is None and why.tokens is None and similarity_map(found) is None
    assert (render(State(layer="similarity"), found) == found.image).all()


def test_worst_first_and_cells_know_their_images(segmenter, scenes):
    rows = survey(segmenter, scenes, window=64)
    assert [r.miou for r in rows] == sorted(r.miou for r in rows) and len(rows) == 3
    for m in mistakes(rows):
        counts = [int(r.confusion[m.truth, m.predicted]) for r in m.images]
        assert sum(counts) == m.pixels and counts == sorted(counts, reverse=True) and m.truth != m.predicted
    assert "truth" in confusion_table(rows, scenes.classes)


def test_without_labels_least_sure_first(segmenter):
    rows = survey(segmenter, open_dataset("scenes", "val", count=3, labels=False), 2)
    assert len(rows) == 2 and rows[0].miou is None and rows[0].confidence <= rows[1].confidence
    assert mistakes(rows) == [] and "No labels" in confusion_table(rows, ["a"] * 19)


# Pictures


def test_a_state_cannot_be_changed():
    with pytest.raises(FrozenInstanceError):
        State().layer = "truth"


def test_pixels_of_each_layer(seen):
    assert (render(State(layer="image"), seen) == seen.image).all()
    full = State(opacity=1.0)
    known = seen.truth != IGNORE
    assert (render(replace(full, layer="truth"), seen)[known] == colorize(seen.truth)[known]).all()
    assert (render(replace(full, layer="prediction"), seen) == colorize(seen.prediction)).all()
    wrong = (seen.truth != seen.prediction) & known
    error = render(replace(full, layer="error"), seen)
    assert (error[wrong] == (230, 30, 60)).all() and (error[~wrong][:, 0] == error[~wrong][:, 1]).all()
    pseudo = render(replace(full, layer="pseudo label", tau=float(np.median(seen.confidence))), seen)
    taken = seen.confidence >= np.median(seen.confidence)
    assert (pseudo[taken] == colorize(seen.prediction)[taken]).all() and (pseudo[~taken] == seen.image[~taken]).all()
    sure = render(replace(full, layer="confidence"), seen).astype(int).sum(-1)
    assert sure.flat[seen.confidence.argmax()] > sure.flat[seen.confidence.argmin()]


@pytest.mark.parametrize("weighting", ["image", "pixel"])
def test_weights_are_those_that_training_gives(seen, weighting):
    "Those of `pseudo_label`, of the look's scores: one or nothing a pixel, or q everywhere."
    tau = float(np.quantile(seen.confidence, 0.3))
    inside = torch.ones(1, *seen.prediction.shape, dtype=torch.bool)
    taught = pseudo_label(torch.from_numpy(seen.scores)[None], inside, tau, weighting)
    shown = render(State(layer="weight", opacity=1.0, tau=tau, weighting=weighting), seen)
    assert (shown == heat(taught.weight[0].numpy())).all()
    assert len(np.unique(shown.reshape(-1, 3), axis=0)) == (1 if weighting == "image" else 2)
    said = caption(State(tau=tau, weighting=weighting), seen, seen)
    assert f"q = {float(taught.q):.2f} | {float(taught.q):.2f}" in said and 0.6 < float(taught.q) < 0.8
    assert ("every pixel of the image weighs q" in said) == (weighting == "image")


def test_pseudo_labels_are_those_that_training_takes(seen, monkeypatch):
    "Label, weight and q come from nowhere else: another `pseudo_label` shows another picture."
    import reinpp.render
    state = State(layer="pseudo label", opacity=1.0, tau=0.0)
    assert (render(state, replace(seen)) == colorize(seen.prediction)).all()

    def other(scores, inside, tau, weighting):
        made = pseudo_label(scores, inside, tau, weighting)
        return made._replace(label=torch.full_like(made.label, 3), weight=made.weight * 0.5, q=made.q * 0)
    monkeypatch.setattr(reinpp.render, "pseudo_label", other)
    assert (render(state, replace(seen)) == colorize(np.full_like(seen.prediction, 3))).all()
    assert (render(replace(state, layer="weight"), replace(seen)) == heat(np.array([[0.5]]))).all()
    assert "q = 0.00" in caption(state, replace(seen))


def test_classes_have_the_looks_own_colours(seen):
    mine = np.random.default_rng(0).integers(0, 256, (19, 3), np.uint8)
    shown = render(State(opacity=1.0), replace(seen, colours=mine))
    assert (shown == mine[seen.prediction]).all() and (shown != colorize(seen.prediction)).any()


@pytest.mark.parametrize("layer", LAYERS)
def test_opacity_0_is_the_image_and_render_is_pure(seen, layer):
    before = {k: v.copy() for k, v in vars(seen).items() if isinstance(v, np.ndarray)}
    assert (render(State(layer=layer, opacity=0.0), seen) == seen.image).all() or layer == "error"
    one, two = (render(State(layer=layer, pixel=(4, 4)), seen) for _ in range(2))
    assert one.dtype == np.uint8 and (one == two).all()
    assert all((vars(seen)[k] == v).all() for k, v in before.items())


def test_hidden_classes_keep_the_image(seen):
    some = int(seen.prediction[0, 0])
    shown = render(State(hidden=(some,), opacity=1.0), seen)
    at = seen.prediction == some
    assert (shown[at] == seen.image[at]).all() and (shown[~at] == colorize(seen.prediction)[~at]).all()


@pytest.mark.parametrize("wiper", [0.0, 0.3, 1.0])
def test_the_wiper_parts_two_looks(seen, wiper):
    other = replace(seen, prediction=np.full_like(seen.prediction, 10))
    shown = render(State(wiper=wiper), seen, other)
    cut = round(wiper * shown.shape[1])
    left, right = render(State(), seen), render(State(), other)
    assert (shown[:, :max(0, cut - 1)] == left[:, :max(0, cut - 1)]).all()
    assert (shown[:, cut + 1:] == right[:, cut + 1:]).all()


def test_an_unknown_layer_is_refused(seen):
    with pytest.raises(ValueError, match="use one of image, truth"):
        render(State(layer="depth"), seen)
    with pytest.raises(ValueError, match="weighting='patch' is unknown: use one of image, pixel"):
        render(State(weighting="patch"), seen)


# The explorer


def test_opens_on_the_worst_image_of_a_bundled_adapter(explorer):
    assert explorer.state.adapter in adapters() and explorer.state.index == explorer.rows()[0].index


def test_no_slider_runs_a_model(explorer, no_model):
    "What is looked at was looked at when the fixture made it."
    for layer in LAYERS:
        for changes in (dict(opacity=0.1), dict(block=0, head=1, token=2), dict(hidden=(0,)), dict(pixel=(5, 6))):
            explorer.change(layer=layer, **changes).picture()
            explorer.explanation()
    explorer.change(hidden=(), pixel=None, layer="prediction", opacity=0.6)


def test_adapters_are_swapped_on_one_backbone(explorer):
    backbone = explorer.use("scenes_rein_g_seed0").backbone
    first = explorer.view("scenes_rein_g_seed0")
    assert explorer.use("scenes_rein_a_snow_seed0").backbone is backbone
    assert explorer.view("scenes_rein_g_seed0") is first, "kept"
    explorer.looks.clear()
    assert (explorer.view("scenes_rein_g_seed0").scores == first.scores).all()


def test_what_cannot_be_shown_is_refused_and_nothing_changes(explorer):
    before = explorer.state
    for changes in (dict(layer="depth"), dict(adapter="none"), dict(index=10**6), dict(domain="atlantis:val")):
        with pytest.raises(ValueError):
            explorer.change(**changes)
    assert explorer.state == before


def test_an_adapter_predicts_as_the_command_does(tmp_path):
    "Windows, stride and scale of its `use.json`: the labels are those of `reinpp predict`, and other ones without it."
    picture = np.random.default_rng(0).integers(0, 256, (12, 16, 3), np.uint8)
    Image.fromarray(picture).resize((320, 200), Image.Resampling.BICUBIC).save(tmp_path / "a.png")
    e = Explorer("camvid_rein_g_seed0", domain=str(tmp_path))
    assert main(["predict", str(tmp_path / "a.png"), "--adapter", "camvid_rein_g_seed0", "--out", str(tmp_path / "out")
                 ]) == 0
    made = np.asarray(Image.open(tmp_path / "out" / "trainids" / "a.png"))
    assert (e.view().prediction == made).all() and e.view().size == (150, 240)
    segmenter = load_segmenter("camvid_rein_g_seed0")
    plain = look(segmenter, e.dataset()[0][0], window=128)
    assert (plain.prediction != made).any(), "the folder's use.json makes a difference here"
    kept = e.rows()[0].confidence
    assert kept == pytest.approx(float(e.view().confidence.mean()), abs=1e-6), "the survey sees what is shown"


def test_own_classes_have_their_names_and_colours(tmp_path):
    torch.manual_seed(0)
    folder = tiny_segmenter(num_classes=3).save_adapter(tmp_path / "mine" / "own")
    colours = ((9, 8, 7), (200, 10, 10), (0, 250, 0))
    write_use(folder, Use(("ground", "thing", "air"), colours, 64, 40))
    e = Explorer("own", folder=tmp_path / "mine", count=1)
    assert e.view().truth is None and e.rows()[0].miou is None, "numbers of 19 classes are no truth for 3"
    panel = Panel(e)
    assert {b.description.split()[0] for b in panel.legend.children} <= {"ground", "thing", "air"}
    shown = e.change(opacity=1.0, pixel=(3, 3)).picture()
    assert {tuple(c) for c in shown[:3, :3].reshape(-1, 3)} <= set(colours)
    assert "thing" in e.explanation()


def test_a_window_that_is_asked_for_is_taken():
    e = Explorer("camvid_rein_g_seed0", window=96, count=1)
    assert (e.how().window, e.how().stride, e.how().fit) == (96, 64, (240, 180))


def test_looks_do_not_pile_up(explorer):
    for index in range(10):
        explorer.change(index=index).view()
    assert len(explorer.looks) <= 8
    explorer.change(index=explorer.rows()[0].index)


def test_save_writes_the_picture_and_its_state(explorer, tmp_path):
    path = explorer.change(layer="entropy").save(tmp_path / "view.png")
    with Image.open(path) as file:
        assert (np.asarray(file) == explorer.picture()).all() and "'layer': 'entropy'" in file.text["reinpp"]
    explorer.change(layer="prediction")


def test_a_folder_of_photos(tmp_path):
    "Without labels, turned as EXIF says, of different sizes."
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (60, 40), "gray").save(tmp_path / "turned.jpg", exif=exif)
    Image.new("RGB", (50, 40), "blue").save(tmp_path / "b.png")
    e = Explorer(domain=str(tmp_path))
    shapes = set()
    for _ in range(2):
        shapes.add(e.step().picture().shape)
        assert e.iou() and all(v != v for v in e.iou().values())
    assert shapes == {(60, 40, 3), (40, 50, 3)}


def test_domains_are_the_scenes_and_camvid_where_it_lies(tmp_path):
    assert all(d.startswith("scenes:") for d in domains(tmp_path))
    (tmp_path / "camvid" / "val").mkdir(parents=True)
    assert "camvid:val" in domains(tmp_path)


# τ, and runs that are not finished


def small_run(folder, settings=Adaptation(tau=0.9, weighting="pixel", ema=0.9, num_points=64, rcs=False), stop_at=1):
    "The objective of a Rein-A in `folder`, stopped after an iteration."
    day = open_dataset("scenes", "train", count=2, size=(96, 176))
    snow = open_dataset("scenes", "snow/train", count=2, size=(96, 176), labels=False)
    torch.manual_seed(1)
    transform = TrainTransform(crop=64, base=64, scales=(10, 12))
    objective = ReinA(tiny_segmenter(pretrained=True), day, snow, transform, settings=settings)
    fit(objective, iterations=3, stop_at=stop_at, batch_size=2, run_dir=folder, progress="none")
    return objective


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    "A folder of runs, and the objective of the one in it."
    folder = tmp_path_factory.mktemp("runs")
    return folder, small_run(folder / "adapt" / "snow")


def test_tau_is_that_of_the_record(explorer, tmp_path):
    assert own_teaching(dict(adaptation=dict(tau=0.7, weighting="pixel", ema=0.9))) == dict(tau=0.7, weighting="pixel")
    assert own_teaching({}) == own_teaching(dict(adaptation=None)) == own_teaching(dict(key="no such run")) == {}
    for wrong in (dict(tau=2), dict(tau="high"), dict(weighting="patch")):
        with pytest.raises(ValueError, match="the adapter's record: "):
            own_teaching(dict(adaptation=wrong))
    assert explorer.state.other == "" and (explorer.state.tau, explorer.state.weighting) == (0.968, "image")
    explorer.change(other="scenes_rein_a_snow_seed0")  # the ledger knows its run
    assert (explorer.state.tau, explorer.state.weighting) == (0.8, "pixel")
    assert explorer.change(tau=0.5, layer="weight").state.tau == 0.5
    assert explorer.change(adapter="scenes_rein_a_snow_seed0", other="").state.tau == 0.5, "set by hand, it stays"
    assert explorer.change(adapter="scenes_rein_g_seed0").state.tau == 0.968
    explorer.change(layer="prediction")


def test_student_and_teacher_of_a_run_are_choices(run):
    folder, objective = run
    e = Explorer(count=1, runs=folder)
    assert [n for n in e.adapters if "adapt/" in n] == ["adapt/snow: student", "adapt/snow: teacher"] and not e.note()
    e.change(adapter="adapt/snow: student", other="adapt/snow: teacher")
    assert (e.state.tau, e.state.weighting) == (0.9, "pixel"), "those of the run"
    image = e.dataset()[e.state.index][0]
    size = objective.segmenter.config["image_size"]
    student = look(objective.segmenter, image, window=size)
    with objective.teacher_weights():
        teacher = look(objective.segmenter, image, window=size)
    assert (e.view("adapt/snow: student").scores == student.scores).all()
    assert (e.view("adapt/snow: teacher").scores == teacher.scores).all()
    assert (student.scores != teacher.scores).any()
    assert e.use("adapt/snow: student").backbone is e.use("adapt/snow: teacher").backbone, "swapped on one backbone"


def test_a_checkpoint_is_read_again_when_it_is_chosen_again(tmp_path):
    "And not before: a training that goes on moves nothing under a slider."
    folder = tmp_path / "snow"
    small_run(folder)
    e = Explorer(count=1, runs=tmp_path)
    first = e.change(adapter="snow: student").view().scores
    small_run(folder, stop_at=2)
    assert (e.change(layer="weight").view().scores == first).all()
    e.change(adapter="scenes_rein_g_seed0")
    assert (e.change(adapter="snow: student").view().scores != first).any()
    (folder / "checkpoint.pt").unlink()
    (folder / "checkpoint.previous.pt").unlink()
    assert (e.change(adapter="snow: student").view().scores != first).any(), "what was read stays"


def test_a_run_without_a_teacher_offers_its_student(tmp_path):
    source = open_dataset("scenes", "train", count=2, size=(96, 176))
    for name, ema in (("plain", None), ("averaged", 0.9)):
        torch.manual_seed(1)
        objective = Generalize(tiny_segmenter(pretrained=True), source, num_points=64, ema=ema)
        fit(objective, iterations=2, stop_at=1, batch_size=1, run_dir=tmp_path / name, progress="none")
    e = Explorer(count=1, runs=tmp_path)
    assert [n for n in e.adapters if ":" in n] == ["averaged: student", "averaged: teacher", "plain: student"]
    e.change(adapter="averaged: teacher")
    teacher = load_segmenter(e.folder("averaged: teacher")).trained_state()
    assert all(torch.equal(t, objective.teacher[name]) for name, t in teacher.items())
    student = load_segmenter(e.folder("averaged: student")).trained_state()
    assert all(torch.equal(t, objective.segmenter.trained_state()[name]) for name, t in student.items())
    assert any((student[name] != t).any() for name, t in teacher.items())


def test_what_is_wrong_with_a_run_is_said(run, tmp_path):
    folder = tmp_path / "snow"
    small_run(folder)
    e = Explorer(count=1, runs=tmp_path)
    before, data = e.state, (folder / "checkpoint.pt").read_bytes()
    (folder / "checkpoint.pt").write_bytes(data[:len(data) // 2])
    with pytest.raises(ValueError, match="checkpoint.pt: this checkpoint is damaged or of another kind"):
        e.change(adapter="snow: teacher")
    assert e.state == before
    (folder / "checkpoint.pt").unlink()
    with pytest.raises(FileNotFoundError, match="no checkpoint in this folder"):
        e.change(adapter="snow: teacher")
    said = json.loads((folder / "run.json").read_text())
    (folder / "checkpoint.pt").write_bytes(data)
    for wrong, message in ((dict(said, run="rm"), "does not take 'run'"), (dict(said, teacher="yes"), "teacher='yes'"),
                           (dict(said, segmenter={}), "damaged .no backbone"),
                           (dict(said, segmenter=said["segmenter"] | dict(head="x")), "head='x'")):
        (folder / "run.json").write_text(json.dumps(wrong))
        e = Explorer(count=1, runs=tmp_path)  # it opens, and shows what else is there
        with pytest.raises(ValueError, match=message):
            e.change(adapter="snow: student")
        assert e.state == before


# The panel


def test_where_there_is_no_teacher_the_panel_says_so(run, tmp_path):
    assert "only in the checkpoint of a run" in Panel(Explorer(count=1, runs=tmp_path)).note.value
    panel = Panel(Explorer(count=1, runs=run[0]))
    assert panel.note.value == ""
    panel.controls["adapter"].value = "adapt/snow: teacher"
    assert (panel.controls["tau"].value, panel.controls["weighting"].value) == (0.9, "pixel") and not panel.said.value
    panel.controls["layer"].value = "weight"
    panel.controls["tau"].value = float(np.median(panel.explorer.view().confidence))
    picture = panel.image.value
    panel.controls["weighting"].value = "image"
    assert panel.image.value != picture and "every pixel of the image weighs q" in panel.why.value


@pytest.fixture
def panel():
    return Panel(Explorer(other="scenes_rein_a_snow_seed0", count=2))


def test_the_panel_drives_the_state(panel, monkeypatch):
    pytest.importorskip("ipywidgets")
    e, picture = panel.explorer, panel.image.value
    panel.next.click()
    assert panel.image.value != picture and e.state.index == panel.images.value
    panel.images.value = e.rows()[0].index
    for name, value in dict(layer="entropy", opacity=0.2, tau=0.5, token=5, block=1, head=2).items():
        panel.controls[name].value = value
        assert getattr(e.state, name) == value
    panel.image.wiper = 0.9
    assert e.state.wiper == 0.9 and panel.image.double
    panel.image.pixel = [7, 5]
    assert e.state.pixel == (7, 5) and "query" in panel.why.value and "tokens" in panel.why.value
    assert panel.said.value == ""


def test_a_legend_button_hides_and_shows(panel):
    panel.legend.children[0].click()
    hidden = panel.explorer.state.hidden
    assert len(hidden) == 1 and panel.legend.children[0].style.text_decoration == "line-through"
    panel.legend.children[0].click()
    assert panel.explorer.state.hidden == ()


def test_a_mistake_lists_images_that_can_be_opened(panel):
    panel.mistakes.value = panel.mistakes.options[-1][1]
    index = panel.found.options[-1][1]
    panel.found.value = index
    assert panel.explorer.state.index == index and panel.said.value == ""


def test_a_cell_of_the_matrix_lists_its_images_only(panel):
    rows, (truth, predicted) = panel.explorer.rows(), panel.mistakes.options[0][1]
    assert f'data-cell="{truth},{predicted}"' in panel.matrix.value
    panel.matrix.cell = [truth, predicted]
    assert [i for _, i in panel.found.options] == [
        r.index for r in sorted(rows, key=lambda r: -r.confusion[truth, predicted]) if r.confusion[truth, predicted]]
    empty = next((t, p) for t in range(19) for p in range(19) if not sum(r.confusion[t, p] for r in rows))
    panel.matrix.cell = list(empty)
    assert panel.found.options == ()


def test_keys_go_to_the_next_image_and_the_picture_is_what_is_rendered(panel):
    before = panel.explorer.state.index
    panel.image._handle_custom_msg({"step": 1}, [])
    assert panel.explorer.state.index != before
    assert (np.asarray(Image.open(io.BytesIO(panel.image.value))) == panel.explorer.picture()).all()
    panel.image._handle_custom_msg({"step": -1}, [])
    assert panel.explorer.state.index == before


def test_events_of_two_threads_wait_for_each_other(panel, monkeypatch):
    "JupyterLab hands them to different threads, and adapters are swapped on one backbone: neither is lost or mixed."
    import reinpp.explore
    inside, together, plain = [], threading.Event(), reinpp.explore.look

    def slow_look(*arguments):
        inside.append(1)
        if len(inside) > 1: together.set()
        together.wait(0.5)
        found = plain(*arguments)
        inside.pop()
        return found
    monkeypatch.setattr(reinpp.explore, "look", slow_look)
    before = panel.explorer.state.index
    key = threading.Thread(target=panel.image._handle_custom_msg, args=({"step": 1}, []))
    key.start()
    panel.controls["adapter"].value = "camvid_rein_g_seed0"
    key.join()
    state = panel.explorer.state
    assert not together.is_set() and panel.said.value == ""
    assert state.adapter == "camvid_rein_g_seed0" and state.index != before
    assert "adapter camvid_rein_g_seed0" in panel.image.alt and f"image {state.index} " in panel.image.alt


def test_the_words_of_the_picture_are_those_of_its_state(panel):
    state = panel.explorer.state
    assert panel.image.alt == describe(state, CLASSES)
    panel.controls["layer"].value = "weight"
    panel.image.pixel = [7, 5]
    panel.legend.children[0].click()
    said, name = panel.image.alt, panel.legend.children[0].description.rsplit(" ", 3)[0]
    assert all(part in said for part in ("layer weight at opacity 0.60", "τ 0.800, weighting pixel",
        "pixel 7, 5 marked", f"without {name}", "beside it, from 0.50 of the width on, scenes_rein_a_snow_seed0"))


def test_a_slider_that_counts_in_steps_sets_the_tau_that_it_shows(panel):
    panel.controls["tau"].value = 0.9680000000000001
    assert panel.explorer.state.tau == 0.968


def test_an_upload_and_a_bad_one(panel, tmp_path):
    Image.new("RGB", (40, 30), "green").save(tmp_path / "a.png")
    panel.take([dict(name="a.png", content=memoryview((tmp_path / "a.png").read_bytes()))])
    assert panel.said.value == "" and panel.explorer.state.domain == "upload:a.png"
    assert panel.explorer.picture().shape == (30, 40, 3)
    panel.take([dict(name="b.png", content=b"nothing")])
    assert "cannot be read" in panel.said.value and panel.explorer.state.domain == "upload:a.png"


def test_a_wrong_folder_is_said_and_nothing_changes(panel):
    before = panel.explorer.state
    panel.folder.value = "no such folder"
    assert panel.said.value and panel.explorer.state == before


# The page


def test_page_explore(tmp_path):
    command = [sys.executable, "-m", "papermill", str(ROOT / "nbs" / "explore.ipynb"), str(tmp_path / "out.ipynb"),
        "--no-progress-bar", "-p", "count", "2", "-p", "output", str(tmp_path / "made")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    assert {p.name for p in (tmp_path / "made").iterdir()} == {"layers.png", "pixel.png", "iou.csv"}
    assert "taken for" in json.dumps(json.loads((tmp_path / "out.ipynb").read_text())["cells"])
