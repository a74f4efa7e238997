"""The site in a Chromium, 1280 and 800 pixels wide: nothing is cut off. Not a part of `make test`: `make browser`."""

import subprocess
import sys

import pytest
from lab import ROOT, chromium

WIDER = """() => {
  const scrolls = e => ["auto", "scroll"].includes(getComputedStyle(e).overflowX);
  const wide = e => e.clientWidth > 0 && e.scrollWidth > e.clientWidth + 12;  // 12: the mark beside a heading
  const found = [];
  for (const e of document.querySelectorAll("article *")) {
    if (e.closest("mjx-container") || !wide(e)) continue;
    let box = e;
    while (box.tagName !== "ARTICLE" && !scrolls(box)) box = box.parentElement;
    if (box.tagName !== "ARTICLE" && e.tagName !== "PRE") continue;
    found.push(`${e.tagName} ${e.scrollWidth} > ${e.clientWidth}: ${e.textContent.trim().slice(0, 60)}`);
  }
  for (const e of document.querySelectorAll("mjx-merror")) found.push(`no mathematics: ${e.textContent}`);
  const page = document.documentElement;
  if (page.scrollWidth > page.clientWidth) found.push(`the page itself: ${page.scrollWidth} > ${page.clientWidth}`);
  return found;
}"""

SCROLLED = """() => [...document.querySelectorAll("article :is(table, .cell_output, .output, div.math)")]
  .filter(e => e.clientWidth && e.scrollWidth > e.clientWidth + 2)
  .map(e => `${e.tagName} scrolls, ${e.scrollWidth} > ${e.clientWidth}: ${e.textContent.trim().slice(0, 60)}`)"""


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "sphinx", "-q", "-c", "docs", "-d", folder / "doctrees", ".", folder / "html"]
    subprocess.run(command, cwd=ROOT, check=True)
    return folder / "html"


@pytest.mark.parametrize("width", [1280, 800])
def test_nothing_is_cut_off(site, width):
    "Code and text fit or wrap; no page is wider than the window. Tables and formulas fit, or scroll in 800 pixels."
    paths = sorted([*(site / "docs").glob("*.html"), *(site / "nbs").glob("*.html")])
    wrong = {}
    with chromium() as browser:
        page = browser.new_page(viewport=dict(width=width, height=900))
        for path in paths:
            page.goto(path.as_uri())
            page.wait_for_function("!document.querySelector('.math') || document.querySelector('mjx-container')")
            if found := page.evaluate(WIDER) + (page.evaluate(SCROLLED) if width == 1280 else []):
                wrong[path.stem] = found
    assert len(paths) > 60 and not wrong, wrong
