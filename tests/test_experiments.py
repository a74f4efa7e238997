"Runs as values, the ledger, and what happens to wrong parameters."

import dataclasses
import hashlib
import json
import multiprocessing
import subprocess
import sys
from pathlib import Path

import pytest

from reinpp.files import data_folder
from reinpp.paper import runs
from reinpp.paper.experiments import METHODS, PRESETS, Ledger, plan
from reinpp.paper.runs import estimate, find_adapter, run
from reinpp.paper.tables import check_parameters, choose_preset, missing_for_paper
from reinpp.training.run_folder import locked

# record -> the arguments of `plan` that make it
FROZEN = json.loads((Path(__file__).parent / "frozen_keys.json").read_text())


def small(method, target=None, seed=0, iterations=2):
    "A run of a few seconds: the tiny preset's, two iterations, four evaluation scenes."
    def cut(e):
        return dataclasses.replace(
            e, source="scenes:train[:8]", target=e.target and e.target + "[:8]",
            evaluate_on=tuple(d + "[:4]" for d in e.evaluate_on[-1:]), data=e.data | dict(min_class_pixels=20),
            start=e.start and cut(e.start))
    return cut(plan("tiny", method, seed, target, limit_iterations=iterations))


@pytest.mark.parametrize("method", METHODS)
def test_every_method_makes_a_record_once(method, tmp_path, capsys):
    experiment, ledger = small(method, "night" if method == "rein_a" else None), Ledger(tmp_path / "results")
    record = run(experiment, ledger, tmp_path / "runs", progress="none")
    assert record["config"] == experiment.config() and record["key"] == experiment.key
    (domain, metrics), = record["metrics"].items()
    assert 0 <= metrics["miou"] <= 1 and metrics["images"] == 4 and len(metrics["iou"]) == 19
    assert record["training"]["seconds"] > 0 and {"torch", "timm"} <= record["versions"].keys()
    text = ledger.path(experiment).read_text()
    assert "NaN" not in text and json.loads(text)["key"] == experiment.key
    capsys.readouterr()
    again = run(experiment, ledger, tmp_path / "runs", progress="none")
    assert again == json.loads(text) and capsys.readouterr().out == "", "a run with a record is not repeated"
    other = dataclasses.replace(experiment, window=64, stride=42)
    run(other, ledger, tmp_path / "runs", progress="none")
    said = capsys.readouterr().out
    assert "evaluating" in said and "training" not in said, "evaluated otherwise, the adapter is used again"
    assert len(ledger.all()) == (3 if experiment.start else 2), "the model that it starts from has a record too"


def test_records_do_not_depend_on_what_ran_before(tmp_path):
    a = run(small("rein_g"), Ledger(tmp_path / "a"), tmp_path / "runs_a", progress="none")
    run(small("rein_g", seed=1), Ledger(tmp_path / "b"), tmp_path / "runs_b", progress="none")
    b = run(small("rein_g"), Ledger(tmp_path / "b"), tmp_path / "runs_b", progress="none")
    assert a["metrics"] == b["metrics"] and a["training"]["loss_last_1000"] == b["training"]["loss_last_1000"]


def _run(folder):
    return run(small("freeze"), Ledger(folder / "results"), folder / "runs", progress="none")["date"], None


def test_two_at_once_make_one_record(tmp_path):
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        pool.map(_run, [tmp_path, tmp_path])
    assert len(Ledger(tmp_path / "results").all()) == 1
    log = tmp_path / "runs" / small("freeze").training_key / "log.jsonl"
    assert len(log.read_text().splitlines()) == 1, "trained once"


def test_a_run_is_planned_without_any_model():
    code = """
import sys
import reinpp.paper.experiments
above = ("reinpp.models", "reinpp.training", "reinpp.adaptation")
assert not [name for name in sys.modules if name.startswith(above)]
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_frozen_records_are_all_there():
    assert len(FROZEN) == 89
    assert FROZEN.keys() <= {f.stem for f in (data_folder() / "results").glob("*.json")}


@pytest.mark.parametrize("key", FROZEN)
def test_a_frozen_key(key):
    "The record's settings hash to its name, and the arguments that made it still plan the same run."
    record = json.loads((data_folder() / "results" / f"{key}.json").read_text())
    assert hashlib.sha256(json.dumps(record["config"], sort_keys=True).encode()).hexdigest()[:12] == key
    experiment = plan(**FROZEN[key])
    assert experiment.key == key == record["key"] and experiment.config() == record["config"]


def test_keys():
    e = plan("tiny", "rein_a", 0, "night")
    assert e.key == plan("tiny", "rein_a", 0, "night").key
    others = [plan("tiny", "rein_a", 1, "night"), plan("tiny", "rein_a", 0, "fog"), plan("tiny", "control", 0),
        plan("tiny", "rein_a", 0, "night", beta=0.7), plan("tiny", "rein_a", 0, "night", limit_iterations=5)]
    assert len({x.key for x in [e, *others]}) == 6
    assert plan("tiny", "control", 0).start.key == plan("tiny", "rein_g", 0).key
    freeze, tokens = plan("tiny", "freeze", 0).model, PRESETS["tiny"].model["adapter_args"]["num_tokens"]
    assert "adapter_args" not in freeze and freeze["head_args"]["num_queries"] == tokens


def test_a_damaged_record_is_named(tmp_path):
    ledger, e = Ledger(tmp_path), plan("tiny", "freeze", 0)
    ledger.path(e).write_text('{"key": ')
    with pytest.raises(ValueError, match=f"{e.key}.json is damaged"):
        ledger.get(e)


@pytest.mark.parametrize("wrong, says", [
    (dict(preset="huge"), "auto, tiny, camvid, idd, paper"), (dict(rows=["prompts"]), "freeze, full, bitfit"),
    (dict(rows="rein_g"), "not a list"), (dict(targets=["dawn"]), "night"),
    (dict(seeds="[0, 1]"), "seeds: "), (dict(seeds=[-1]), "whole number"), (dict(seeds=[0.5]), "whole number"),
    (dict(limit_iterations=0), "limit_iterations"),
    (dict(preset="camvid", targets=["night"]), "dusk")])
def test_wrong_parameters_say_what_exists(wrong, says):
    with pytest.raises(ValueError, match=says):
        check_parameters(**wrong)


def test_the_paper_preset_lists_what_is_missing(tmp_path):
    lacks = missing_for_paper(tmp_path)
    assert any("gtav" in line and str(tmp_path / "gtav") in line and "http" in line for line in lacks)
    for name in ("gtav", "cityscapes", "bdd100k", "mapillary"):  # what it trains on and what it is evaluated on
        assert sum(line.startswith(f"{name}:") for line in lacks) == 1, name
    with pytest.raises(FileNotFoundError, match="cityscapes"):
        choose_preset("paper", tmp_path)
    here = str(data_folder().parent)
    assert not any(here in line for line in missing_for_paper()), "a saved notebook shows no path of this machine"


def test_what_a_run_is_evaluated_on_is_opened_before_it_trains(tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "fit", lambda *a, **k: pytest.fail("it trains first"))
    e = dataclasses.replace(small("rein_g"), evaluate_on=("scenes:val", "cityscapes:val"))
    with pytest.raises(FileNotFoundError, match="cityscapes"):
        run(e, Ledger(tmp_path / "results"), tmp_path / "runs", data_root=tmp_path)


def test_a_target_is_opened_before_the_source_is_trained(tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "fit", lambda *a, **k: pytest.fail("it trains first"))
    e = dataclasses.replace(small("rein_a", "night"), target="cityscapes:train")
    with pytest.raises(FileNotFoundError, match="cityscapes"):
        run(e, Ledger(tmp_path / "results"), tmp_path / "runs", data_root=tmp_path)


def test_every_bundled_adapter_is_a_run_of_a_preset_as_it_is_now():
    keys = set()
    for preset in ("tiny", "camvid"):
        for seed in range(3):
            keys.add(plan(preset, "rein_g", seed).training_key)
            keys |= {plan(preset, "rein_a", seed, target).training_key for target in PRESETS[preset].targets}
    bundled = {f.parent.name: json.loads(f.read_text())["record"]["key"]
        for f in (data_folder() / "weights").glob("*/adapter_config.json")}
    assert bundled and set(bundled.values()) <= keys, {name for name, key in bundled.items() if key not in keys}


def test_a_run_that_others_would_wait_with_is_refused(tmp_path):
    refused = pytest.raises(RuntimeError, match="another run, process .*: start this one again")
    with locked(tmp_path / ".lock", patient=True):
        with refused, locked(tmp_path / ".lock"):
            pass
    with locked(tmp_path / ".lock"):
        pass
    assert not list(tmp_path.iterdir())


def test_auto_says_what_it_chose(tmp_path, capsys):
    assert choose_preset("auto", tmp_path) == "tiny"
    assert "cannot run here" in capsys.readouterr().out


def test_estimate_counts_the_start(tmp_path):
    said = estimate([small("control")], tmp_path / "runs", steps=1)
    assert "rein_g" in said and "control" in said and "in total" in said
    assert find_adapter(small("control"), tmp_path / "runs") is None, "an estimate leaves nothing behind"


@pytest.mark.parametrize("arguments, says", [
    (["tiny", "rein_a"], "runs: target=None is unknown"),
    (["tiny", "freeze", "--setting", "sunny"], "runs: setting='sunny'"),
    (["tiny", "freeze", "--target", "night"], "target='night': freeze has none"),
    (["tiny", "freeze", "--limit-iterations", "0"], "limit_iterations=0: give a number"),
    (["camvid", "rein_a", "--target", "dusk", "--data-root", "nowhere"], "runs: camvid")])
def test_the_command_line_ends_with_one_line(arguments, says, tmp_path):
    with pytest.raises(SystemExit, match=says):
        runs.main([*arguments, "--results", str(tmp_path)])


def test_the_module_is_a_command(tmp_path):
    command = [sys.executable, "-m", "reinpp.paper.runs", "tiny", "rein_a", "--results", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    assert done.stderr.startswith("runs: target=None is unknown: use one of night")
