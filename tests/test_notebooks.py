"Whole notebooks through papermill, as a user runs them."

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from reinpp.paper.experiments import Ledger, plan

ROOT = Path(__file__).resolve().parent.parent


def papermill(name, out, *arguments):
    command = [sys.executable, "-m", "papermill", str(ROOT / "nbs" / f"{name}.ipynb"), str(out), "--no-progress-bar"]
    return subprocess.run([*command, *arguments], capture_output=True, text=True, cwd=ROOT, timeout=900)


def outputs(notebook):
    cells = json.loads(Path(notebook).read_text())["cells"]
    return "\n".join("".join(o.get("text", "")) + "".join(o.get("data", {}).get("text/plain", "")) for c in cells
        for o in c.get("outputs", []))


def test_quickstart(tmp_path):
    done = papermill("quickstart", tmp_path / "out.ipynb", "-p", "limit_iterations", "2", "-p", "short_iterations", "2",
        "-p", "images", "4", "-p", "output", str(tmp_path / "quickstart"))
    assert done.returncode == 0, done.stderr[-2000:]
    there = {p.name for p in (tmp_path / "quickstart").iterdir()}
    assert {"domains.png", "source_model.png", "before_after.png", "table.md"} <= there
    assert "Rein-A" in (tmp_path / "quickstart" / "table.md").read_text()
    records = list((tmp_path / "quickstart" / "records").glob("*.json"))
    assert len(records) >= 3, "every figure of the page has its record"


def test_table9_shows_the_ledger(tmp_path):
    done = papermill("table9", tmp_path / "out.ipynb", "-p", "preset", "tiny", "-p", "run_missing", "False")
    assert done.returncode == 0, done.stderr[-2000:]
    said = outputs(tmp_path / "out.ipynb")
    assert "Rein-A" in said and "GTAV -> Cityscapes" in said and "not run: needs the datasets" in said


def test_table9_from_an_empty_ledger(tmp_path):
    done = papermill("table9", tmp_path / "out.ipynb", "-p", "preset", "tiny", "-p", "run_missing", "False", "-p",
        "results", str(tmp_path / "empty"))
    assert done.returncode == 0, done.stderr[-2000:]
    assert "not run" in outputs(tmp_path / "out.ipynb")


@pytest.mark.parametrize("wrong, says", [
    (["-p", "preset", "huge"], "use one of auto, tiny, camvid, idd, paper"),
    (["-p", "preset", "tiny", "-p", "seeds", "[3,4]"], "not a list"),
    (["-p", "prest", "tiny"], "unknown parameter prest")])
def test_table9_refuses(wrong, says, tmp_path):
    done = papermill("table9", tmp_path / "out.ipynb", "-p", "results", str(tmp_path / "empty"), *wrong)
    assert done.returncode != 0
    assert re.search(says, done.stderr), done.stderr[-1500:]


def fake_records(folder, miou, seeds=(0, 1)):
    "Records of the search: mIoU by what is changed (none: `as preset`)."
    ledger = Ledger(folder)
    for change, value in miou.items():
        for seed, target in [(seed, target) for seed in seeds for target in ("game", "mono")]:
            e = plan("tiny", "rein_a", seed, target, setting="search", **dict(change))
            one = dict(miou=value + seed / 100, pixel_accuracy=.9, iou={}, images=100)
            ledger.put(e, dict(key=e.key, config=e.config(), metrics=dict.fromkeys(e.evaluate_on, one), parameters={},
                training=dict(device="cpu", precision="float32", seconds=1.0), seconds=1.0, commit="", date="",
                versions=dict(torch="2", timm="1")))


def test_search_chooses_by_its_rule(tmp_path):
    first = dict(alpha=.5, beta=.1, stm_least=.5)
    changes = [tuple((first | change).items()) for change in ({}, dict(alpha=1.0), dict(beta=1.0), dict(stm_least=0.0))]
    fake_records(tmp_path / "results", dict.fromkeys(changes, .30))
    arguments = "-p", "results", str(tmp_path / "results"), "-y", "seeds: [0, 1]"
    done = papermill("search", tmp_path / "part.ipynb", *arguments)
    assert done.returncode == 0, done.stderr[-2000:]
    said = outputs(tmp_path / "part.ipynb")
    assert "not yet chosen: not yet run are alpha 1.5" in said and "+0.0 ± 0.0" in said
    fake_records(tmp_path / "results", {tuple((first | dict(alpha=1.5)).items()): .32})
    done = papermill("search", tmp_path / "whole.ipynb", *arguments)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "alpha 1.5: +2.0 ± 0.0 over 4 pairs, more than its spread: it is taken" in outputs(tmp_path / "whole.ipynb")


def test_search_makes_what_is_missing(tmp_path):
    done = papermill("search", tmp_path / "out.ipynb", "-p", "results", str(tmp_path / "results"), "-p", "runs",
        str(tmp_path / "runs"), "-p", "limit_iterations", "2", "-p", "run_missing", "True", "-y",
        "{rows: [Rein-G (source)], seeds: [0]}")
    assert done.returncode == 0, done.stderr[-2000:]
    record, = Ledger(tmp_path / "results").all()
    assert record["scores"].keys() == {"scenes:val", "scenes:game/val", "scenes:mono/val"}
    assert re.search(r"Rein-G \(source\) .* measured", outputs(tmp_path / "out.ipynb"))


def test_pretrain_tiny_in_small(tmp_path):
    done = papermill("pretrain_tiny", tmp_path / "out.ipynb", "-p", "iterations", "4", "-p", "save_to",
        str(tmp_path / "tiny.safetensors"))
    assert done.returncode == 0, done.stderr[-2000:]
    from safetensors.torch import load_file

    from reinpp.models.backbones import create_backbone
    assert load_file(tmp_path / "tiny.safetensors").keys() == create_backbone("tiny").state_dict().keys()


def test_reproduce_plans_everything(tmp_path):
    done = papermill("reproduce", tmp_path / "out.ipynb", "-p", "preset", "tiny", "-p", "measure", "False")
    assert done.returncode == 0, done.stderr[-2000:]
    text = outputs(tmp_path / "out.ipynb")
    pages = [f"table{n}" for n in range(1, 14)] + [f"fig{n}" for n in range(1, 7)]
    assert [name for name in pages if not re.search(rf"\b{name}\b", text)] == [], "every page is planned"
