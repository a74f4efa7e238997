"""Pages as a person uses them, in JupyterLab and a Chromium. Not a part of `make test`: `make browser`.

Pictures of what was seen lie in the folder that `REINPP_PICTURES` names, or in pytest's own."""

import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
from lab import PATIENCE, Lab, Notebook, chromium
from PIL import Image

from reinpp.adaptation.rein_a import Adaptation, ReinA
from reinpp.data.catalog import open_dataset
from reinpp.models.segmenter import load_segmenter
from reinpp.training.train import fit

REFERENCES = Path(__file__).parent / "references"


@pytest.fixture(scope="module")
def browser():
    with chromium() as found:
        yield found


@pytest.fixture(scope="module")
def lab(tmp_path_factory, browser):
    running = Lab(tmp_path_factory.mktemp("lab"))
    yield running.wait()
    running.close()


@pytest.fixture(scope="session")
def pictures(tmp_path_factory):
    "A function: a locator's or page's screenshot, kept under a name."
    folder = Path(os.environ.get("REINPP_PICTURES") or tmp_path_factory.mktemp("pictures"))

    def keep(what, name):
        what.screenshot(path=folder / f"{name}.png")
        return folder / f"{name}.png"
    return keep


@pytest.fixture
def page(browser, pictures, request):
    page = browser.new_page(viewport=dict(width=1280, height=1000))
    yield page
    pictures(page, f"{request.node.name}_last")
    page.close()


def alike(path, name, tolerance=12):
    "Whether a screenshot is like its reference: grey values of a quarter of the size, apart by less on average."
    reference = Image.open(REFERENCES / f"{name}.png").convert("L")
    shown = Image.open(path).convert("L").resize(reference.size, Image.Resampling.BOX)
    apart = np.abs(np.asarray(shown, float) - np.asarray(reference, float)).mean()
    assert apart < tolerance, f"{path} differs from {name}.png by {apart:.1f} grey values on average"


def in_sight(page, what):
    "Wait until the top of it is in the window; nothing is scrolled here. A TimeoutError where it stays outside."
    page.wait_for_function("""e => {
        const top = e.getBoundingClientRect().top;
        return top > 0 && top < window.innerHeight - 100; }""", arg=what.element_handle(), timeout=30_000)


class Shown:
    "The explorer's panel in a page."

    def __init__(self, page):
        self.page, self.box = page, page.locator(".reinpp-picture").first
        self.box.wait_for()
        self.says("layer prediction")

    def control(self, name):
        "The widget with this label."
        label = self.page.locator("label", has_text=re.compile(f"^{name}$"))
        return self.page.locator(".widget-inline-hbox", has=label).first

    def says(self, *words):
        "Wait until the picture is there whose words (its `alt`) have these patterns; its bytes' sha256."
        self.page.wait_for_function("""words => {
            const img = document.querySelector('.reinpp-picture img');
            return img.complete && img.naturalWidth && words.every(w => new RegExp(w).test(img.alt)); }""",
            arg=list(words))
        return self.page.evaluate("""async () => {
            const source = document.querySelector('.reinpp-picture img').src;
            const bytes = new Uint8Array(await (await fetch(source)).arrayBuffer());
            return Array.from(new Uint8Array(await crypto.subtle.digest('SHA-256', bytes))).join(); }""")

    def choose(self, layer):
        "Click a layer; what `says` says then."
        self.page.get_by_role("button", name=layer, exact=True).click()
        return self.says(f"layer {layer} ")


def make_run(folder):
    "A run of Rein-A that is not finished: one of two iterations, from a bundled adapter."
    day, snow = open_dataset("scenes", "train", count=2), open_dataset("scenes", "snow/train", count=2, labels=False)
    settings = Adaptation(tau=0.9, weighting="pixel", num_points=64, rcs=False)
    fit(ReinA(load_segmenter("scenes_rein_g_seed0"), day, snow, settings=settings), iterations=2, stop_at=1,
        batch_size=2, lr=2e-3, run_dir=folder, device="cpu", progress="none")


def test_explore(lab, page, pictures):
    make_run(lab.folder / "runs" / "snow")
    url = lab.copy("explore", count=4, output=str(lab.folder / "explore"), runs=str(lab.folder / "runs"))
    notebook = Notebook(page, url)
    notebook.run_all(600)
    shown = Shown(page)
    in_sight(page, shown.box)  # though Run All went on to the last cell
    pictures(page, "explore_after_run_all")
    seen = [shown.says("layer prediction at opacity 0.60")]
    alike(pictures(shown.box.locator("img"), "explore_picture"), "explore_picture")

    handle = shown.control("opacity").locator(".noUi-handle")
    handle.focus()
    handle.press("ArrowRight")
    seen.append(shown.says("opacity 0.65"))
    assert shown.control("opacity").locator(".widget-readout").inner_text() == "0.65"

    road = page.get_by_role("button", name=re.compile("^road"))
    road.click()
    seen.append(shown.says("without road"))
    page.locator("button[style*='line-through']", has_text="road").wait_for()
    road.click()
    assert shown.says("opacity 0.65(?!.*without)") == seen[1], "the class is back"

    size = shown.box.locator("img").bounding_box()
    shown.box.locator("img").click(position=dict(x=size["width"] * 0.25, y=size["height"] * 0.75))
    seen.append(shown.says(r"pixel 6[345], 9[567] marked"))
    page.get_by_text(re.compile(r"pixel \(6[345], 9[567]\)")).wait_for()
    page.get_by_text("tokens it attends to").wait_for()

    wiper = page.locator(".reinpp-wiper").bounding_box()
    x, y = wiper["x"] + wiper["width"] / 2, wiper["y"] + wiper["height"] / 2
    page.mouse.move(x, y)
    page.mouse.down()
    page.mouse.move(x - size["width"] / 4, y, steps=4)
    page.mouse.up()
    seen.append(shown.says("from 0.2[456] of the width"))
    moved = page.locator(".reinpp-wiper").bounding_box()["x"] - wiper["x"]
    assert moved == pytest.approx(-size["width"] / 4, abs=6)
    pictures(page, "explore_pixel_and_wiper")

    chosen = shown.control("images").locator("select")
    first = chosen.input_value()
    shown.box.locator("img").click(position=dict(x=9, y=9))
    seen.append(shown.says(r"pixel [234], [234] marked"))
    shown.box.press("ArrowRight")
    page.wait_for_function("([e, was]) => e.value != was", arg=[chosen.element_handle(), first])

    shown.control("adapter").locator("select").select_option("scenes_rein_a_snow_seed0")
    seen.append(shown.says("adapter scenes_rein_a_snow_seed0"))
    seen.append(shown.choose("pseudo label"))
    assert len(set(seen)) == len(seen), "each step shows another picture"
    page.locator("td[data-cell]", has_text=re.compile(r"\d")).first.click()
    shown.control("in").locator("option").first.wait_for(state="attached")
    pictures(page, "explore_end")
    page.locator("td[data-cell]").last.scroll_into_view_if_needed()
    pictures(page, "explore_matrix")
    _weights_and_teacher(page, shown, pictures)


def _weights_and_teacher(page, shown, pictures):
    "The weight layer in both weightings and at another τ; a run's student beside its teacher."
    shown.box.scroll_into_view_if_needed()
    seen = [shown.choose("weight")]
    for weighting in ("image", "pixel"):
        shown.control("weighting").locator("select").select_option(weighting)
        seen.append(shown.says(f"weighting {weighting}"))
        page.locator(".widget-html-content", has_text=f"weighting '{weighting}'").wait_for()
        pictures(page, f"explore_weight_{weighting}")
    assert len(set(seen)) == 2 and seen[0] == seen[2], "the small presets weigh pixels"
    page.get_by_text("No teacher to choose").wait_for(state="detached")
    shown.control("adapter").locator("select").select_option("snow: student")
    shown.control("beside").locator("select").select_option("snow: teacher")
    seen.append(shown.says("adapter snow: student; beside it.* snow: teacher", "τ 0.900, weighting pixel"))
    assert shown.control("τ").locator(".widget-readout").inner_text() == "0.900", "that of the run"
    handle = shown.control("τ").locator(".noUi-handle")
    handle.focus()
    handle.press("ArrowLeft")
    seen.append(shown.says("τ 0.896"))
    seen += [shown.choose("error"), shown.choose("prediction")]
    assert len(set(seen)) == len(seen) - 1
    pictures(page, "explore_student_and_teacher")


def test_quickstart_moves_stops_and_goes_on(lab, page, pictures):
    made = lab.folder / "quickstart"
    url = lab.copy("quickstart", short_iterations=80, adapt_iterations=2, images=2, output=str(made))
    notebook = Notebook(page, url)
    notebook.start_all()
    log = made / "first_stretch_80_seed0" / "log.jsonl"
    text = page.locator(".jp-OutputArea-output .widget-html-content", has_text="iteration").first
    text.wait_for(timeout=2 * PATIENCE)
    first = text.inner_text()
    in_sight(page, text)
    page.wait_for_function("([e, was]) => e.innerText != was", arg=[text.element_handle(), first])
    page.locator(".jp-OutputArea-output img").last.scroll_into_view_if_needed()
    pictures(page, "quickstart_moves")
    notebook.interrupt()
    error = page.locator(".jp-OutputArea-output", has_text="the same call goes on").first
    error.wait_for()
    assert len(error.inner_text().strip().splitlines()) == 1, "one line, no traceback"
    error.scroll_into_view_if_needed()
    pictures(page, "quickstart_stopped")
    before = log.read_text()
    reached = json.loads(before.splitlines()[-1])["iteration"]
    assert reached < 80, "it was stopped on the way"

    notebook.start_all()
    page.get_by_text("iteration 80 of 80").first.wait_for(timeout=4 * PATIENCE)
    assert log.read_text().startswith(before), "it went on, and did not start again"
    notebook.interrupt()  # the rest of the page is the work of tests/test_notebooks.py
    page.get_by_text("iteration 80 of 80").first.scroll_into_view_if_needed()
    pictures(page, "quickstart_goes_on")


def test_table9(lab, page, pictures):
    notebook = Notebook(page, lab.copy("table9", run_missing=False))
    notebook.run_all(600)
    tables = page.locator(".jp-OutputArea-output table", has_text="Rein-A")
    assert tables.count() >= 3
    tables.first.scroll_into_view_if_needed()
    pictures(page, "table9")
