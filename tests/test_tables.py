"The notebooks of the paper's tables and figures: one each, one form, honest about what is missing, and quick to open."

import ast
import dataclasses
import json
import re
from pathlib import Path

import pandas as pd
import pytest

ROOT = Path(__file__).resolve().parent.parent
NAMES = ("table1 table2 table3 table4 table5 table6 table7 table8 table9 table10 table11 table12 table13 "
    "fig1 fig2 fig3 fig4 fig5 fig6").split()
# these look at a model or measure its steps: nothing of theirs is in the ledger
OF_ONE_MODEL = ("table12", "fig3", "fig4", "fig5")
PARAMETERS = {"preset", "rows", "seeds", "run_missing", "data_root", "limit_iterations"}
OF_GENERALIZATION = [f"table{n}" for n in range(1, 9)] + ["fig1", "fig2", "fig6"]  # these have all parameters of table9


def code_cells(name):
    "Source, without IPython's `%` lines, and tags of every code cell."
    cells = json.loads((ROOT / "nbs" / f"{name}.ipynb").read_text())["cells"]
    return [(re.sub(r"(?m)^%.*$", "", "".join(c["source"])), c["metadata"].get("tags", [])) for c in cells
        if c["cell_type"] == "code"]


def defaults(name):
    "Names and defaults of a notebook's parameters."
    source = next(source for source, tags in code_cells(name) if "parameters" in tags)
    return {line.targets[0].id: ast.literal_eval(line.value) for line in ast.parse(source).body}


def run(name, cells=None, **parameters):
    """Run a notebook's cells in this process, as papermill would: parameters after the tagged cell.

    What it displayed, and its names."""
    import matplotlib
    matplotlib.use("agg")
    import matplotlib.pyplot as plt
    shown = []
    namespace = {"__name__": "__main__", "display": lambda *values: shown.extend(values)}
    try:
        for source, tags in code_cells(name)[:cells]:
            tree = ast.parse(source)
            value = ast.Expression(tree.body.pop().value) if isinstance(tree.body[-1], ast.Expr) else None
            exec(compile(tree, name, "exec"), namespace)
            if value is not None and (value := eval(compile(value, name, "eval"), namespace)) is not None:
                shown.append(value)
            if "parameters" in tags:
                namespace |= parameters
        for value in shown:
            if hasattr(value, "_repr_html_"):
                value._repr_html_()  # as it would be shown
    finally:
        plt.close("all")
    styled = [hasattr(value, "set_table_styles") for value in shown]  # in small print, with the table in it
    return [value.data if small else value for value, small in zip(shown, styled)], namespace


@pytest.fixture(autouse=True)
def exports(tmp_path, monkeypatch):
    "What a page without a parameter `output` writes goes aside, not into the checkout."
    from reinpp.files import data_folder
    from reinpp.paper import page
    real, own = page.export_table, data_folder() / "runs"

    def aside(table, folder, name):
        return real(table, tmp_path / "exports" if Path(folder).is_relative_to(own) else folder, name)
    monkeypatch.setattr(page, "export_table", aside)


def quiet(tmp_path, name, **more):
    output = dict(output=str(tmp_path)) if "output" in defaults(name) else {}
    return dict(preset="tiny", run_missing=False) | output | more


def test_one_notebook_for_each_table_and_figure():
    assert sorted(p.stem for p in (ROOT / "nbs").glob("*.ipynb") if re.match("table|fig", p.stem)) == sorted(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_its_parameters(name):
    assert sum("parameters" in tags for _, tags in code_cells(name)) == 1, "without the tag, -p is silently ignored"
    assert defaults(name) and (name in OF_ONE_MODEL or PARAMETERS <= defaults(name).keys()
        and defaults(name)["preset"] == "auto")
    assert not any("default_exp" in source or "#| export" in source for source, _ in code_cells(name))


@pytest.mark.parametrize("name", OF_GENERALIZATION)
def test_the_same_parameters_everywhere(name):
    assert list(defaults("table9")) == list(defaults(name))[:len(defaults("table9"))]


@pytest.mark.parametrize("name", OF_GENERALIZATION)
def test_it_shows_the_ledger(name, tmp_path, capsys):
    shown, _ = run(name, **quiet(tmp_path, name, **(dict(images=1) if name == "table4" else {})))
    said = capsys.readouterr().out
    text = said + "\n".join(v.to_string() for v in shown if hasattr(v, "to_string"))
    assert "1.6 M parameter backbone" in said, "what the small preset is"
    assert "not run: needs the" in text and "paper" in text and "ours" in text
    if name.startswith("fig"):
        assert all((tmp_path / f"{name}.{ending}").stat().st_size > 5000 for ending in ("svg", "png"))


@pytest.mark.parametrize("name", [name for name in NAMES if name not in OF_GENERALIZATION])
def test_it_opens(name, tmp_path):
    wanted = dict(preset="tiny", run_missing=False, models=["dinov2_large"], output=str(tmp_path))
    if name == "fig3":
        wanted |= dict(backbone="tiny", image_size=128)
    shown, _ = run(name, **{k: v for k, v in wanted.items() if k in defaults(name)})
    assert shown or name.startswith("fig")
    if name.startswith("fig"):
        assert all((tmp_path / f"{name}.{ending}").stat().st_size > 5000 for ending in ("svg", "png"))


@pytest.mark.parametrize("name", [name for name in NAMES if name not in ("fig3", "fig4", "fig5")])
def test_it_opens_with_the_papers_own_rows(name, tmp_path, capsys):
    "On the day when there is a GPU, too: before anything is trained."
    wanted = dict(preset="paper", run_missing=False, models=["dinov2_large"], output=str(tmp_path))
    shown, _ = run(name, **{k: v for k, v in wanted.items() if k in defaults(name)})
    assert shown and "preset tiny" not in capsys.readouterr().out
    assert defaults(name)["rows"] is None, "all of the paper's rows, not a small preset's few"


@pytest.mark.parametrize("name", ["table2", "table8", "fig2"])
def test_from_an_empty_ledger(name, tmp_path, capsys):
    run(name, **quiet(tmp_path, name, results=str(tmp_path / "empty")))
    assert "no records" in capsys.readouterr().out


@pytest.mark.parametrize("name, wrong, says", [
    ("table2", dict(preset="huge"), "use one of auto, tiny, camvid, idd, paper"),
    ("table5", dict(rows=["+ Rein-a"]), "Rein-core"),
    ("table6", dict(rows=["rank 64"]), "use one of rank 2, rank 4"),
    ("table3", dict(rows="LoRA"), "not a list"), ("table8", dict(seeds="[0, 1]"), "not a list"),
    ("fig6", dict(targets=["dawn"]), "night"), ("table1", dict(limit_iterations=0), "whole number"),
    ("table7", dict(steps=0), "steps"), ("table4", dict(images=-1), "images=-1"),
    ("fig1", dict(prest="tiny"), "unknown parameter prest")])
def test_wrong_parameters_are_refused_at_once(name, wrong, says):
    with pytest.raises((ValueError, FileNotFoundError), match=says):
        run(name, cells=2, **dict(preset="tiny", run_missing=False) | wrong)


def fake_record(experiment, miou):
    "A record as `runs.run` would write it, the same number for every class and domain."
    from reinpp.labels import CLASSES
    metrics = dict(miou=miou, pixel_accuracy=miou, iou={c: miou for c in CLASSES}, images=1)
    training = dict(seconds=36000., seconds_per_iteration=.9, loss_last_1000=20., device="a GPU", precision="bf16",
        peak_memory=9.9e9)
    return dict(
        key=experiment.key, config=experiment.config(), metrics={d: metrics for d in experiment.evaluate_on},
        training=training, parameters=dict(adapter=2_990_593, head=1, total=1, backbone=1, percent=1.), seconds=1.,
        versions=dict(torch="0", timm="0"), commit="0", date="")


@pytest.fixture
def two_presets(tmp_path):
    """A ledger with Rein-G of the paper preset (two seeds, mIoU 60 and 62, DINOv2-L from GTAV and from Cityscapes) and
    of the tiny one."""
    from reinpp.paper.experiments import Ledger, plan
    ledger = Ledger(tmp_path / "results")
    for seed, miou in ((0, .60), (1, .62)):
        for setting in (None, "cityscapes"):
            ledger.put(e := plan("paper", "rein_g", seed, setting=setting), fake_record(e, miou))
        tiny = fake_record(e := plan("tiny", "rein_g", seed), .1234)
        ledger.put(e, tiny | dict(parameters=tiny["parameters"] | dict(adapter=63_937)))
    return str(ledger.folder)


@pytest.mark.parametrize("name, where", [
    ("table2", ["Rein-G + DINOv2-Large"] * 2), ("table3", [("DINOv2 (Large)", "+ Rein-G")] * 2), ("table5", ["+ GELU"]),
    ("table6", ["rank 16"]), ("table7", [("DINOv2 (Large)", "Rein-G", 4)]),
    ("table8", ["100 tokens"]), ("fig2", ["DINOv2-L, Rein-G"]),
    ("fig6", [f"Rein-G, mask2former, DINOv2 (Large): {c}" for c in ("Citys", "BDD", "Map")])])
def test_ours_is_filled_by_the_paper_preset_only(name, where, two_presets, tmp_path, capsys):
    shown, _ = run(name, **quiet(tmp_path, name, results=two_presets))
    compared = [v for v in shown if hasattr(v, "columns") and {"ours", "status"} & set(v.columns.get_level_values(-1))
        and "status" in v.columns.get_level_values(0) and "n" in v.columns.get_level_values(0)]
    measured = [label for v in compared for label, n in zip(v.index, v["n"]) if str(n) not in ("0", "–", "")]
    assert measured == where
    text = "\n".join(v.to_string() for v in compared)
    assert "12.3" not in text, "a small preset never fills the paper's column"
    if name == "table7":
        assert "10.0" in text and "9.9" in text and "a GPU" in text
    elif name in ("table2", "table3", "table6"):
        assert "61.0 ± 1.4" in text and re.search(r"\b61\.0 ", text), "and its average"
    else:
        assert "61.0 ± 1.4" in text


def test_rows_of_other_length_are_not_compared(tmp_path, capsys):
    from reinpp.paper.experiments import Ledger, plan
    ledger = Ledger(tmp_path / "results")
    for method, limit, miou in (("rein_g", None, .3), ("freeze", 60, .1), ("full", None, .2)):
        ledger.put(e := plan("tiny", method, limit_iterations=limit), fake_record(e, miou))
    run("table2", **quiet(tmp_path, "table2", results=str(ledger.folder)))
    said = capsys.readouterr().out
    assert "against Full" in said and "against Freeze" not in said
    run("fig6", **quiet(tmp_path, "fig6", results=str(ledger.folder)))
    assert "runs of 60 and 4000 iterations: nothing is compared" in capsys.readouterr().out


def test_figure_6_compares_the_seeds_that_all_have(tmp_path, capsys):
    from reinpp.paper.experiments import Ledger, plan
    ledger = Ledger(tmp_path / "results")
    for method, seed, miou in (("rein_g", 0, .1), ("rein_g", 1, .3), ("freeze", 1, .2), ("full", 0, .2)):
        ledger.put(e := plan("tiny", method, seed), fake_record(e, miou))
    run("fig6", **quiet(tmp_path, "fig6", results=str(ledger.folder)))
    assert "runs of 4000 iterations, other seeds: nothing is compared" in capsys.readouterr().out
    ledger.put(e := plan("tiny", "full", 1), fake_record(e, .2))
    run("fig6", **quiet(tmp_path, "fig6", results=str(ledger.folder)))
    assert "mIoU peaks at Rein-G (20.0, 30.0, 20.0), 1 seed\n" in capsys.readouterr().out


@pytest.fixture
def few_scenes(tmp_path, monkeypatch):
    "The tiny preset with eight scenes to train on and one to test on, and folders of its own."
    from reinpp.paper import experiments, runs, tables
    p = experiments.PRESETS["tiny"]
    monkeypatch.setitem(experiments.PRESETS, "tiny", dataclasses.replace(
        p, source="scenes:train[:8]", source_val="scenes:val[:1]",
        targets={"night": ("scenes:night/train[:8]", "scenes:night/val[:1]")},
        data=p.data | dict(min_class_pixels=20)))
    (tmp_path / "data" / "weights").mkdir(parents=True)
    (tmp_path / "data" / "weights" / "tiny.safetensors").touch()  # the preflight only looks whether it is there
    for room in (experiments, runs, tables):
        monkeypatch.setattr(room, "data_folder", lambda: tmp_path / "data")
    monkeypatch.setenv("REINPP_RUNS", str(tmp_path / "data" / "runs"))
    return dict(results=str(tmp_path / "results"), run_missing=True, limit_iterations=2)


@pytest.mark.parametrize("name, rows", [
    ("table3", ["LoRA", "Freeze + PASTA"]), ("table5", ["+ Rein-core"]), ("fig6", ["Rein-G, semantic_fpn"])])
def test_it_makes_what_is_missing(name, rows, few_scenes, tmp_path, capsys):
    shown, _ = run(name, **quiet(tmp_path, name, rows=rows, **few_scenes))
    said = capsys.readouterr().out
    wanted = f"{len(rows)} run{'s' * (len(rows) > 1)} wanted"
    assert f"{wanted}, {len(rows)} not in the ledger" in said and "in total about" in said
    table = next(v for v in shown if "status" in getattr(v, "columns", []) or hasattr(v, "data"))
    table = getattr(table, "data", table)
    assert list(table.index[table.status == "measured"]) == [label for label in table.index if label in rows]
    run(name, cells=3, **quiet(tmp_path, name, rows=rows, **few_scenes))
    assert f"{wanted}, 0 not in the ledger" in capsys.readouterr().out, "nothing is run twice"


def test_table7_times_this_machine(tmp_path, capsys):
    shown, namespace = run("table7", **quiet(tmp_path, "table7", run_missing=True, steps=1, rows=["Freeze", "Rein-G"],
        results=str(tmp_path)))
    table = namespace["table"]
    assert list(table.index) == ["Freeze", "Rein-G"] and table.device.str.len().min() > 2
    assert table["trained, backbone's side"].tolist() == ["0", "63,937"] and float(table["file, MB"]["Rein-G"]) < 2


def test_table12_times_every_row_of_its_preset(tmp_path):
    _, namespace = run("table12", cells=5, **quiet(tmp_path, "table12", run_missing=True, steps=1))
    found = namespace["measured"]
    assert list(found.index) == ["Rein-A", "Full"] and float(found["s / iteration"]["Full"]) > 0
    assert float(found["stored (MB)"]["Full"]) > 4 * float(found["stored (MB)"]["Rein-A"])


def test_a_figure_is_the_same_file_twice(tmp_path):
    for folder in ("a", "b"):
        run("fig2", **quiet(tmp_path, "fig2", output=str(tmp_path / folder), results=str(tmp_path / "empty")))
    assert (tmp_path / "a" / "fig2.svg").read_bytes() == (tmp_path / "b" / "fig2.svg").read_bytes()


def test_a_page_goes_on_where_a_run_cannot_be_made(tmp_path, capsys):
    "Nothing is all or nothing: what is missing is the row's own reason, and the tables are drawn."
    folders = dict(data_root=str(tmp_path / "nowhere"), results=str(tmp_path / "results"))
    wanted = dict(preset="camvid", rows=["Freeze"]) | folders
    shown, _ = run("table2", **wanted)
    said = capsys.readouterr().out
    assert re.search(r"FAILED freeze camvid:day_train .*: camvid: no folder", said)
    table = next(v for v in shown if "status" in getattr(v, "columns", []))
    assert table.status["Freeze"].startswith("failed: camvid: no folder") and table.status["Rein-G"] == "not run"
    run("table6", **wanted | dict(preset="paper", rows=["rank 8"]))
    said = capsys.readouterr().out
    assert "FAILED rein_g gtav:train" in said and "gtav: no folder" in said


def test_one_failure_does_not_stop_the_others(few_scenes, tmp_path, capsys, monkeypatch):
    from reinpp.paper import tables
    makes = tables.run

    def run_or_fail(experiment, *rest, **options):
        if experiment.method == "full": raise RuntimeError("the loss is not finite\nsecond line")
        return makes(experiment, *rest, **options)
    monkeypatch.setattr(tables, "run", run_or_fail)
    shown, namespace = run("table2", **quiet(tmp_path, "table2", rows=["Full", "Freeze"], **few_scenes))
    table = namespace["page"].shown["measured"]
    assert dict(table.status) == {"Rein-G": "not run", "Freeze": "measured", "Full": "failed: the loss is not finite"}


@pytest.mark.parametrize("name", ["table2", "table10", "fig2"])
def test_a_page_is_opened_again_in_the_same_kernel(name, tmp_path, capsys):
    shown, namespace = run(name, **quiet(tmp_path, name))
    namespace["seeds"] = [1]
    for source, tags in code_cells(name):
        if "parameters" not in tags:
            exec(compile(source, name, "exec"), namespace)
    assert namespace["page"].given["seeds"] == [1]


LONG = ("fig3", "fig4", "fig5")  # two diagrams that are drawn by hand, and a grid of predictions


@pytest.mark.parametrize("name", [name for name in NAMES if name not in LONG])
def test_a_page_is_short(name):
    "At most 60 lines of code beside the parameters; the rest is said once, in `paper.page` and `paper.cost_page`."
    lines = [line for source, tags in code_cells(name) if "parameters" not in tags for line in source.splitlines()
        if line.strip() and not line.strip().startswith("#")]
    assert len(lines) <= 60


def test_a_wide_table_is_small_and_a_narrow_one_as_it_was():
    from reinpp.paper.report import mark_best, narrow
    wide = pd.DataFrame({f"class {i}": [i + 0.5, float("nan")] for i in range(19)}, index=["a", "b"])
    text = narrow(wide).to_html()
    assert "vertical-rl" in text and ">18.5<" in text and "nan" not in text
    few = wide[["class 1", "class 2"]]
    assert narrow(few) is few
    assert "vertical-rl" in narrow(mark_best(wide, ["class 1"])).to_html()


PLACED = [f"table{n}" for n in range(1, 14)] + ["fig1", "fig2", "fig5", "fig6", "reproduce", "search", "scorecard"]


@pytest.mark.parametrize("name", PLACED)
def test_every_page_says_where_its_runs_lie(name):
    assert "runs" in defaults(name)


def test_a_page_keeps_its_runs_where_it_is_told(few_scenes, tmp_path):
    given = few_scenes | dict(rows=["Freeze"], runs=str(tmp_path / "elsewhere"))
    run("table5", **quiet(tmp_path, "table5", **given))
    assert list((tmp_path / "elsewhere").glob("*/adapter")) and not (tmp_path / "data" / "runs").exists()
