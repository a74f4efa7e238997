"Every printed number is covered once, by a run that can be planned; and nothing is planned that no number wants."

import csv
import re
from collections import Counter
from pathlib import Path

import pytest

from reinpp.data.cityscapes_c import CORRUPTIONS
from reinpp.labels import CLASSES
from reinpp.paper.cells import KINDS, cells, tables
from reinpp.paper.experiments import OF_PAPER, OFFICIAL, PRESETS, plan
from reinpp.paper.servers import servers_of
from reinpp.training.submissions import SERVERS

PAPER = Path(__file__).resolve().parent.parent / "data" / "paper"
EVERY = {name: cells(name) for name in tables()}
# columns that name a row, and what is no number in the others
LABELS = {"note", "setting", "method", "reference", "publication", "backbone", "backbone_reference", "alpha",
    "Batch Size", "panel", "stage", "quantity", "unit"}


def numbers(name):
    "(row, column, text) of every number of a CSV, found without the rules' help."
    if not (PAPER / f"{name}.csv").exists(): return
    with open(PAPER / f"{name}.csv", encoding="utf-8", newline="") as file:
        for i, row in enumerate(csv.DictReader(file)):
            for k, (column, value) in enumerate(row.items()):
                words = name == "table1" and i < 3  # group, reference, publication
                if column not in LABELS and value not in ("", "-") and not words and not (
                        k == 0 and name in ("table1", "table8")) and column != "Rank r":
                    yield i, column, value


def experiments(name, **more):
    "Label -> the runs that a row of the paper preset stands for."
    table, runs = tables()[name], {}
    for label, row in table.paper.items():
        targets = table.targets.get("paper", [None]) if row["method"] == "rein_a" and "target" not in row else [None]
        runs[label] = [plan("paper", **dict(target=t) | row | more) for t in targets]
    return runs


@pytest.mark.parametrize("name", EVERY)
def test_every_number_once(name):
    told = [(c.row, c.column, c.printed) for c in EVERY[name] if c.row is not None]
    assert Counter(told) == Counter(numbers(name))
    assert {c.kind for c in EVERY[name]} <= set(KINDS)


def test_every_file_is_looked_at():
    assert {p.stem for p in PAPER.glob("*.csv")} - {"text"} == {n for n, cs in EVERY.items() if any(
        c.row is not None for c in cs)}
    assert sum(c.row is not None for cs in EVERY.values() for c in cs) > 1700


@pytest.mark.parametrize("name", EVERY)
def test_every_run_can_be_planned_and_gives_its_metric(name):
    "A cell's run evaluates on each of its domains, or trains on the target whose server is asked."
    runs = experiments(name)
    for cell in EVERY[name]:
        if cell.kind in ("count", "quoted") or not cell.label:
            assert not cell.label and (cell.kind in ("count", "quoted") or cell.table == "fig2")
            continue
        assert cell.label in runs, f"{name}: {cell.label} is no row"
        row = tables()[name].paper[cell.label]
        p = PRESETS["paper"]
        targets = p.settings.get(row.get("setting"), {}).get("targets", p.targets)
        for run in runs[cell.label]:
            for t in cell.targets:
                assert targets[t][1] in run.evaluate_on or cell.kind == "server", (cell, run)
                assert run.method != "rein_a" or run.target == targets[t][0]
            if cell.kind == "server": assert cell.server.partition(":")[0] in servers_of(run)
        assert cell.metric in ("miou", "hours", "memory", "loss_last_1000", "images", *CLASSES)
        if cell.official: assert tables()[name].paper[cell.official] == row | dict(method=OFFICIAL)
        assert (cell.kind == "server") == (cell.server.partition(":")[0] in SERVERS)


@pytest.mark.parametrize("name", EVERY)
def test_nothing_is_planned_that_no_number_wants(name):
    "A row is wanted by a cell, or it is the start, the control or the named upper bound of one that is."
    table, runs = tables()[name], experiments(name)
    wanted = {label for c in EVERY[name] for label in (c.label, c.official) if label}
    assert table.roles.keys().isdisjoint(wanted) and wanted | table.roles.keys() == set(table.paper)
    starts = {run.start.key for label in wanted for run in runs[label] if run.start}
    for label, role in table.roles.items():
        assert role in ("start", "control", "upper bound")
        for run in runs[label]:
            assert role != "start" or run.key in starts
            assert role != "control" or run.method == "control" and run.start.key in starts


def test_particular_cells():
    "What the issue names: Table IV's recipe, VII's Full at batch 2, IX's three settings, XII's four rows."
    recipe = experiments("table4")["Rein-G"][0]
    assert (recipe.data["crop"], recipe.window, recipe.stride) == (1024, 1024, 683)
    assert (recipe.training["batch_size"], recipe.training["lr"]) == (8, 6e-5)
    assert recipe.model["adapter_args"] == dict(num_heads=1, gelu=False)
    assert all(c.official for c in EVERY["table4"] if c.label)
    corrupted = experiments("table4")["Rein-G, Cityscapes-C"][0]
    assert corrupted.training_key == recipe.training_key, "one training"
    assert corrupted.evaluate_on[1:] == tuple(f"cityscapes_c:{c}/5" for c in CORRUPTIONS)
    seven = experiments("table7")
    assert seven["DINOv2 (Giant), Full, batch 2"][0].training["batch_size"] == 2
    assert seven["DINOv2 (Large), Rein-G, batch 4"][0].key == plan("paper", "rein_g").key
    nine = experiments("table9")
    assert Counter(run.target for (run,) in nine.values()) == {
        "cityscapes:train": 6, "acdc:train": 6, "darkzurich:train": 2, None: 12}
    assert len(experiments("table12")) == 4 and len(experiments("table13")) == 15
    assert experiments("table13")["alpha 1, beta 10^0"][0].key == experiments("table10")["Rein-A"][0].key
    assert experiments("table11")["with SAM2"][0].key == experiments("table10")["Rein-A"][0].key


def test_a_number_that_no_rule_knows_is_refused(monkeypatch):
    from reinpp.paper import cells as room
    known, row = room.printed, room.printed("table2")[0] | dict(method="Nobody's", reference="")
    monkeypatch.setattr(room, "printed", lambda name: [row] if name == "table2" else known(name))
    with pytest.raises(ValueError, match="neither a row of ours nor a citation"):
        room.cells("table2")


@pytest.mark.parametrize("preset", [name for name in PRESETS if name != "paper"])
@pytest.mark.parametrize("name", EVERY)
def test_rows_of_the_small_presets(name, preset):
    table = tables()[name]
    rows = table.rows(preset)
    assert set(table.first) <= set(table.small) and (not table.base or table.base in rows or preset in OF_PAPER)
    for label, row in rows.items():
        target = next(iter(PRESETS[preset].targets)) if row["method"] == "rein_a" else None
        assert re.fullmatch(r"[0-9a-f]{12}", plan(preset, **dict(target=target) | row).key), label
