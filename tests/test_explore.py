"""The explorer: looks are what the model says, pictures are what the state says, and no slider runs a model."""

import io
import json
import subprocess
import sys
from dataclasses import FrozenInstanceError, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from reinpp.data.catalog import open_dataset
from reinpp.explore import LAYERS, Explorer, State, adapters, domains, render
from reinpp.labels import IGNORE, colorize
from reinpp.models.segmenter import Segmenter, tiny_segmenter
from reinpp.panel import Panel
from reinpp.training.looks import confusion_table, explain, look, mistakes, similarity_map, survey

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
    assert np.allclose(seen.scores, scores, atol=1e-3)
    assert np.allclose(seen.confidence, (scores / scores.sum(0)).amax(0), atol=1e-5)
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


# The panel


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
