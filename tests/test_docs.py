"""The site: built once, then read as a browser without a network would read it."""

import csv
import html
import importlib
import json
import re
import statistics
import subprocess
import sys
from pathlib import Path
from urllib.parse import unquote, urlsplit

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_notebook, new_output

import reinpp
from reinpp.paper.costs import Row

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted((ROOT / "docs").rglob("*.md"))
# Where outside links may lead: a new host is looked at once, and entered here.
HOSTS = set("""
acdc.vision.ee.ethz.ch anywidget.dev arxiv.org bdd-data.berkeley.edu codalab.lisn.upsaclay.fr
download.visinf.tu-darmstadt.de github.com huggingface.co idd.insaan.iiit.ac.in semver.org synthia-dataset.net
www.cityscapes-dataset.com www.mapillary.com www.trace.ethz.ch www.urbansyn.org
""".split())


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    "The folder of the built pages, and Sphinx's warnings."
    folder = tmp_path_factory.mktemp("docs")
    command = [sys.executable, "-m", "sphinx", "-q", "-c", "docs", "-d", folder / "doctrees", "-w", folder / "warnings",
        ".", folder / "html"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder / "html", (folder / "warnings").read_text().splitlines()


@pytest.fixture(scope="module")
def pages(site):
    "{path below the site: its HTML}."
    return {path.relative_to(site[0]).as_posix(): path.read_text() for path in site[0].rglob("*.html")}


def links(text):
    "What a page's tags refer to: (attribute, value)."
    return [(name, html.unescape(value)) for name, value in re.findall(r'<[a-z][^>]*?\b(href|src)="([^"]*)"', text)]


def test_it_builds_without_warnings(site):
    assert not site[1]


def test_every_notebook_and_page_is_there(pages):
    notebooks = {f"nbs/{path.stem}.html" for path in (ROOT / "nbs").glob("*.ipynb")} - {"nbs/index.html"}
    assert notebooks and notebooks | {f"{p.relative_to(ROOT).with_suffix('')}.html" for p in PAGES} <= set(pages)
    assert "#|" not in re.sub("<[^>]+>", "", pages["nbs/21_rein_g.html"]), "nbdev's directives are left out"


def test_links_inside_lead_somewhere(site, pages):
    anchors = {page: set(re.findall(r'\bid="([^"]*)"', text)) for page, text in pages.items()}
    wrong, seen, root = [], 0, site[0].resolve()
    for page, text in pages.items():
        for _, link in links(text):
            target = urlsplit(link)
            if target.scheme or target.netloc or link in ("", "#"):
                continue
            seen += 1
            file = (site[0] / page).parent.joinpath(unquote(target.path)).resolve() if target.path else root / page
            inside = file.relative_to(root).as_posix() if file.exists() and file.is_relative_to(root) else None
            anchor = unquote(target.fragment)
            if inside is None or anchor and inside in anchors and html.unescape(anchor) not in anchors[inside]:
                wrong.append(f"{page}: {link}")
    assert seen > 1000 and not wrong


def test_links_outside_have_a_known_form(pages):
    outside = {link for text in pages.values() for name, link in links(text) if urlsplit(link).netloc}
    shaped = re.compile(r"https?://[\w.-]+(/[\w./~%#?=&+:,()-]*)?")
    assert not [link for link in outside if not shaped.fullmatch(link) or link.endswith((".", ","))]
    hosts = {urlsplit(link).netloc for link in outside}
    assert hosts <= HOSTS, f"look at these, and enter their hosts: {sorted(hosts - HOSTS)}"


def test_nothing_is_loaded_from_a_network(site, pages):
    for page, text in pages.items():
        loaded = re.findall(r'<(?:script|img|iframe|source)\b[^>]*?\bsrc="([^"]*)"', text)
        loaded += re.findall(r'<link\b(?=[^>]*rel="(?:stylesheet|preload|icon)")[^>]*?href="([^"]*)"', text)
        assert not [link for link in loaded if urlsplit(link).netloc], page
    for style in site[0].rglob("*.css"):
        assert not re.search(r"(?:@import|url\()[^;)]*//", style.read_text()), style.name


def test_mathematics_is_rendered_from_local_files(site, pages):
    for page in "nbs/21_rein_g.html", "nbs/45_rein_a.html":
        assert 'class="math ' in pages[page]
        script = next(link for _, link in links(pages[page]) if "mathjax" in link)
        file = (site[0] / page).parent.joinpath(urlsplit(script).path).resolve()
        assert file.stat().st_size > 500_000
        assert len(list((file.parent / "output/chtml/fonts/woff-v2").glob("*.woff"))) > 20


def test_a_formula_is_a_paragraph(pages):
    "Anything else is drawn in JupyterLab, and falls apart on the site; so do numbered formulas of several lines."
    wrong = []
    for file in sorted((ROOT / "nbs").glob("*.ipynb")):
        for cell in json.loads(file.read_text())["cells"]:
            source = "".join(cell["source"])
            if cell["cell_type"] != "markdown": continue
            parts = re.split(r"(?s)(\$\$.*?\$\$)", source)
            for before, formula, after in zip(parts[::2], parts[1::2], parts[2::2]):
                alone = before.endswith("\n\n") and (after.startswith("\n\n") or not after.strip())
                if not alone or r"\tag" in formula and r"\\" in formula: wrong.append(f"{file.name}: {formula}")
    assert not wrong
    for page, text in pages.items():
        prose = re.sub(r'(?s)<(pre|script|code|title)\b.*?</\1>|<(span|div) class="math.*?</\2>', "", text)
        assert "$$" not in prose and r"\frac" not in prose, page


def test_what_is_printed_in_pieces_is_one_output_and_a_title_stays_above_its_table(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "docs")
    made = importlib.import_module("made")
    pieces = [new_output("stream", name="stdout", text=text) for text in ("1/2\n", "2/2\n", "a title\n")]
    table, after = new_output("display_data", {"text/html": "<table>"}), new_output("stream", name="stdout", text="end")
    nb = new_notebook(cells=[new_code_cell("show()", outputs=[*pieces, table, after])])
    first, second, last = json.loads(made.clean(nbformat.writes(nb)))["cells"][0]["outputs"]
    assert "".join(first["text"]) == "1/2\n2/2\na title\n" and "data" in second and "".join(last["text"]) == "end"


def test_the_reference_has_every_public_name(pages):
    named = re.findall(r'class="sig-name descname"><span class="pre">(\w+)<', pages["docs/api.html"])
    assert set(reinpp.__all__) <= set(named)


def test_the_reference_has_every_exported_name(pages):
    reference = "".join(text for page, text in pages.items() if page.startswith("docs/api/"))
    ids = set(re.findall(r'\bid="(reinpp[\w.]*)"', reference))
    modules = [path for path in (ROOT / "reinpp").rglob("*.py") if not path.name.startswith("_")]
    for path in modules:
        module = importlib.import_module(".".join(path.relative_to(ROOT).with_suffix("").parts))
        for name in module.__all__:
            if getattr(getattr(module, name), "__module__", module.__name__) == module.__name__:
                assert f"{module.__name__}.{name}" in ids


def test_a_parameters_comment_is_its_documentation(pages):
    text = html.unescape(re.sub("<[^>]+>", "", pages["docs/api.html"]))
    assert "a key of BACKBONES or the name of a timm vision transformer" in text
    assert "changes -- of create_segmenter's arguments" in text, "that of **changes, too"


def test_the_zoo_is_the_ledger(pages):
    text = html.unescape(re.sub("<[^>]+>", " ", pages["docs/zoo.html"]))
    for folder in (ROOT / "data" / "weights").glob("*/"):
        assert folder.name in text
    measured, _, preset = text.partition("The paper preset")
    records = [json.loads(file.read_text()) for file in (ROOT / "data" / "results").glob("*.json")]
    trained = [r for r in records if r["config"]["method"] == "rein_g" and r["config"]["source"] == "scenes:train"
        and r["config"]["training"]["iterations"] == 4000 and "scenes:night/val" in r["metrics"]]
    miou = [100 * r["metrics"]["scenes:val"]["miou"] for r in trained]
    spread = f" ± {statistics.stdev(miou):.1f}" if len(miou) > 1 else ""
    said = f"{sum(miou) / len(miou):.1f}{spread} (n={len(miou)})" if miou else "No run of this version"
    assert said in measured
    assert ("(n=" in preset) == any(r["config"]["source"].startswith(("gtav", "cityscapes")) for r in records)


@pytest.mark.parametrize("what, batch, checkpointing", [("rein_g", 4, False), ("rein_a", 1, True)])
def test_the_card_is_what_is_counted(what, batch, checkpointing, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "docs")
    model = dict(backbone="dinov2_small", backbone_args=dict(hold="bf16"))
    counted = importlib.import_module("card").count(Row(what, "paper", batch, model), checkpointing)
    about = dict(what=what, backbone="dinov2_small", batch=batch, hold="bf16", checkpointing=checkpointing)
    with (ROOT / "docs" / "card.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {key: str(value) for key, value in (about | counted).items()} in rows, "python docs/card.py counts again"


def test_broken_names_tests_that_exist():
    named = re.findall(r"`(tests/\w+\.py)::(\w+)`", (ROOT / "docs" / "broken.md").read_text())
    assert len(named) > 20
    for file, test in named:
        assert f"def {test}(" in (ROOT / file).read_text(), f"{file} has no {test}"
