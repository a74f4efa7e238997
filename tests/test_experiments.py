"Runs as values, the ledger, and what happens to wrong parameters."

import dataclasses
import hashlib
import json
import multiprocessing
import shutil
import subprocess
import sys

import pandas as pd
import pytest

from reinpp.files import data_folder
from reinpp.paper import experiments, runs
from reinpp.paper.experiments import EVALUATION_VERSION, METHOD_VERSION, METHODS, PRESETS, Ledger, plan
from reinpp.paper.runs import estimate, find_adapter, run
from reinpp.paper.tables import check_parameters, choose_preset, missing_for_paper
from reinpp.training.run_folder import locked

RECORDS = sorted((data_folder() / "results").rglob("????????????.json"))


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
    assert record["training_key"] == experiment.training_key and record["scores"].keys() == {domain}
    card = record["scores"][domain]
    assert all(0 <= card[name] <= 1 for name in ("mirror_agreement", "mask_agreement", "purity", "confidence"))
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


def test_a_record_keeps_the_parts_of_a_set(monkeypatch):
    part = dict(miou=.5, pixel_accuracy=.6, iou=dict(road=.5), images=3, confusion=[[3]])
    monkeypatch.setattr(runs, "evaluate_set", lambda *a, **k: part | dict(parts=dict(fog=part, night=part)))
    kept = runs._evaluate(None, "acdc:val", plan("paper", "control", setting="cityscapes"), None)
    assert kept.keys() == {"miou", "pixel_accuracy", "iou", "images", "parts"}
    assert kept["parts"] == dict.fromkeys(("fog", "night"), {k: part[k] for k in kept if k != "parts"})


def test_records_do_not_depend_on_what_ran_before(tmp_path):
    a = run(small("rein_g"), Ledger(tmp_path / "a"), tmp_path / "runs_a", progress="none")
    run(small("rein_g", seed=1), Ledger(tmp_path / "b"), tmp_path / "runs_b", progress="none")
    b = run(small("rein_g"), Ledger(tmp_path / "b"), tmp_path / "runs_b", progress="none")
    assert a["metrics"] == b["metrics"] and a["training"]["loss_last_1000"] == b["training"]["loss_last_1000"]


def test_the_environment_names_folders(tmp_path, monkeypatch):
    monkeypatch.setenv("REINPP_RESULTS", str(tmp_path / "results"))
    monkeypatch.setenv("REINPP_DATA_ROOT", str(tmp_path / "sets"))
    assert Ledger().folder == tmp_path / "results" and Ledger(tmp_path).folder == tmp_path
    with pytest.raises(FileNotFoundError, match="camvid: no folder .*sets"):
        experiments.open_domain("camvid:day_val")
    with pytest.raises(FileNotFoundError, match="camvid: no folder .*other"):
        experiments.open_domain("camvid:day_val", tmp_path / "other")


def test_an_engine_without_its_checkpoint_stops_before_anything_trains(tmp_path, monkeypatch):
    e = small("rein_a", "night")
    e = dataclasses.replace(e, adaptation=e.adaptation | dict(engine="sam2"))
    monkeypatch.setattr(runs, "lacking_engine", lambda engine: [f"{engine} is not here"])
    with pytest.raises(FileNotFoundError, match="no proposals in .* yet, and sam2 is not here"):
        run(e, Ledger(tmp_path / "results"), tmp_path / "runs", progress="none")
    assert not list((tmp_path / "runs").rglob("*")), "the source model was not trained"
    for domain in (e.source, e.target):
        manifest = runs.proposals_folder(e, domain, tmp_path / "runs") / "manifest.json"
        manifest.parent.mkdir(parents=True)
        manifest.touch()
    runs._check_engine(e, tmp_path / "runs")  # made before: the engine is not needed
    without = dataclasses.replace(e, adaptation=e.adaptation | dict(use_stm=False))
    runs._check_engine(without, tmp_path / "elsewhere")


def _run(folder):
    return run(small("freeze"), Ledger(folder / "results"), folder / "runs", progress="none")["date"], None


def test_two_at_once_make_one_record(tmp_path):
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        pool.map(_run, [tmp_path, tmp_path])
    assert len(Ledger(tmp_path / "results").all()) == 1
    log = tmp_path / "runs" / small("freeze").training_key / "log.jsonl"
    assert len(log.read_text().splitlines()) == 1, "trained once"


def test_a_start_model_whose_adapter_is_gone_is_trained_again_and_compared(tmp_path, capsys):
    "As in a fresh clone, which has the record of the model that is started from, and not its adapter."
    control, ledger = small("control"), Ledger(tmp_path / "results")
    run(control.start, ledger, tmp_path / "runs", progress="none")
    before = ledger.path(control.start).read_bytes()
    shutil.rmtree(tmp_path / "runs")
    capsys.readouterr()
    record = run(control, ledger, tmp_path / "runs", progress="none")
    assert "was trained again: the same mIoU; its record stays" in capsys.readouterr().out
    assert ledger.path(control.start).read_bytes() == before and record["key"] == control.key
    other = json.loads(before)
    other["metrics"][control.start.evaluate_on[0]]["miou"] = 0.5
    ledger.path(control.start).write_text(json.dumps(other))
    shutil.rmtree(tmp_path / "runs")
    ledger.path(control).unlink()
    run(control, ledger, tmp_path / "runs", progress="none")
    assert "recorded 50.00; its record stays" in capsys.readouterr().out


def test_a_damaged_adapter_of_a_run_is_made_again(tmp_path, capsys):
    experiment, ledger = small("freeze"), Ledger(tmp_path / "results")
    run(experiment, ledger, tmp_path / "runs", progress="none")
    file = tmp_path / "runs" / experiment.training_key / "adapter" / "adapter_model.safetensors"
    whole = file.read_bytes()
    for damaged in (whole[:-1], whole[:-1] + bytes([whole[-1] ^ 1]), b""):
        file.write_bytes(damaged)
        ledger.path(experiment).unlink()
        capsys.readouterr()
        run(experiment, ledger, tmp_path / "runs", progress="none")
        assert f"{file.parent} is damaged: made again" in capsys.readouterr().out and file.read_bytes() == whole


def test_a_run_that_is_not_finished_makes_no_record(tmp_path):
    experiment, ledger = small("freeze"), Ledger(tmp_path / "results")
    with pytest.raises(RuntimeError, match="1 iterations are done, as asked.*run it again without stop_at"):
        run(experiment, ledger, tmp_path / "runs", progress="none", stop_at=1)
    assert ledger.all() == [] and find_adapter(experiment, tmp_path / "runs") is None
    assert run(experiment, ledger, tmp_path / "runs", progress="none")["key"] == experiment.key


@pytest.mark.parametrize("text", ["{}", "[]", "null", '{"metrics": {}}', '{"key": "x", "config": {}, "metrics": {}}'])
def test_a_record_of_something_else_is_not_believed(text, tmp_path):
    experiment = small("freeze")
    Ledger(tmp_path).path(experiment).write_text(text)
    with pytest.raises(ValueError, match=f"{experiment.key}.json is damaged"):
        run(experiment, Ledger(tmp_path), tmp_path / "runs")


def test_a_run_is_planned_without_any_model():
    code = """
import sys
import reinpp.paper.experiments
above = ("reinpp.models", "reinpp.training", "reinpp.adaptation")
assert not [name for name in sys.modules if name.startswith(above)]
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("file", RECORDS, ids=lambda file: file.stem)
def test_a_record_says_why_it_has_its_name(file):
    record = json.loads(file.read_text())
    assert hashlib.sha256(json.dumps(record["config"], sort_keys=True).encode()).hexdigest()[:12] == file.stem
    versions = {name: record["config"].get(name) for name in ("method_version", "evaluation_version")}
    if file.parent.name == "v1":
        assert versions == dict(method_version=1, evaluation_version=None)
    else:
        assert versions == dict(method_version=METHOD_VERSION, evaluation_version=EVALUATION_VERSION)
        assert record["scores"].keys() == record["metrics"].keys() and record["training_key"]


def test_records_of_the_first_version_are_kept_and_shown_nowhere():
    old = {file.stem for file in RECORDS if file.parent.name == "v1"}
    assert len(old) == 89 and not old & {record["key"] for record in Ledger().all()}


def test_what_changes_no_result_is_in_no_key():
    e = plan("tiny", "rein_a", 0, "night")
    idle = dict(workers=3, checkpointing=True, device="cuda:1", checkpoint_minutes=1,
        checkpoint_every=5, log_every=7, check_every=7, tensorboard=True, progress="none")
    same = dataclasses.replace(e, training=e.training | idle)
    assert same.config() == e.config() and (same.key, same.training_key) == (e.key, e.training_key)
    assert dataclasses.replace(e, training=e.training | dict(lr=1.0)).training_key != e.training_key


def test_a_new_evaluation_makes_new_records_of_the_same_adapters(monkeypatch):
    e = plan("tiny", "rein_a", 0, "night")
    before = e.key, e.training_key, e.start.training_key
    monkeypatch.setattr(experiments, "EVALUATION_VERSION", EVALUATION_VERSION + 1)
    assert e.key != before[0] and (e.training_key, e.start.training_key) == before[1:]
    monkeypatch.setattr(experiments, "METHOD_VERSION", METHOD_VERSION + 1)
    assert e.training_key != before[1] and e.start.training_key != before[2]


def test_small_presets_are_fair_and_say_where_they_differ():
    tiny, camvid, idd, paper = (PRESETS[name] for name in ("tiny", "camvid", "idd", "paper"))
    assert tiny.adaptation == camvid.adaptation == idd.adaptation and tiny.adaptation["engine"] == "classical"
    for p in (tiny, camvid, idd):
        own = p.adaptation | p.adaptation["stm"] | p.data | p.training | p.model["adapter_args"] | p.model["head_args"]
        theirs = dict(normalize_link=False, alpha=1, beta=1, stm_warmup=0, stm_least=0.5, from_head=False, clip=None)
        theirs |= paper.data | paper.training | paper.adaptation | theirs
        different = [name for name, value in own.items() if name != "stm" and value != theirs.get(name)]
        assert len(different) > 25 and not [name for name in different if f"{name} " not in p.note]
    assert "alpha 0.5 (1)" in tiny.note and "tau 0.8 (0.968)" in tiny.note and "normalize_link True" in tiny.note


def test_the_paper_holds_what_is_frozen_in_sixteen_bits():
    for method in METHODS:
        held = plan("paper", method, target="citys" if method == "rein_a" else None).model.get("backbone_args")
        assert held == (None if method == "full" else dict(hold="bf16")), method
    assert "backbone_args" not in plan("paper", "rein_a", 0, "citys", model=dict(adapter="full")).model
    assert plan("paper", "rein_g").evaluate_on[0] == "gtav:source_val"


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
    e = dataclasses.replace(small("rein_g"), evaluate_on=("cityscapes:val", "gtav:source_val"))
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
    (["camvid", "rein_a", "--target", "dusk1-seen", "--data-root", "nowhere"], "runs: camvid")])
def test_the_command_line_ends_with_one_line(arguments, says, tmp_path):
    with pytest.raises(SystemExit, match=says):
        runs.main([*arguments, "--results", str(tmp_path)])


def test_the_module_is_a_command(tmp_path):
    command = [sys.executable, "-m", "reinpp.paper.runs", "tiny", "rein_a", "--results", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    assert done.stderr.startswith("runs: target=None is unknown: use one of night")


def test_a_run_looks_at_a_few_images_now_and_then(tmp_path, monkeypatch):
    "What it then logs is of no consequence: the record has the same metrics. Proposals lie where they are told to."
    monkeypatch.setenv("REINPP_CACHE_ROOT", str(tmp_path / "cache"))
    small = dataclasses.replace(plan("tiny", "rein_g", limit_iterations=4), source="scenes:train[:4]",
        evaluate_on=("scenes:val[:6]", "scenes:night/val[:1]"))
    options = dict(progress="none", log_every=2)
    found = {name: run(small, Ledger(tmp_path / name), tmp_path / f"runs of {name}", **options, **more)
        for name, more in dict(plain={}, watched=dict(check_every=2)).items()}
    assert found["plain"]["metrics"] == found["watched"]["metrics"]
    log = tmp_path / "runs of watched" / small.training_key / "log.jsonl"
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    assert [row["check mIoU of scenes:night/val[:1]"] >= 0 for row in rows] == [True, True]
    assert rows[1]["check mIoU of scenes:val[:6]"] != pytest.approx(found["plain"]["metrics"]["scenes:val[:6]"]["miou"])
    absent = dataclasses.replace(small, evaluate_on=(*small.evaluate_on, "gtav:train"))
    check = runs.check_of(absent, tmp_path)
    assert list(check(runs.build(small, tmp_path).eval())) == [f"mIoU of {d}" for d in small.evaluate_on]
    adapts = plan("tiny", "rein_a", target="night")
    assert runs.proposals_folder(adapts, adapts.source, tmp_path) == (
        tmp_path / "cache" / "proposals" / "scenes_train_classical_2")
    given = runs.proposals_folder(adapts, adapts.source, tmp_path, tmp_path / "given")
    assert given == tmp_path / "given" / "proposals" / "scenes_train_classical_2", "what is given comes first"


def test_a_page_hands_on_where_proposals_lie(tmp_path, monkeypatch):
    from reinpp.paper import page as pages
    said = {}
    monkeypatch.setattr(pages, "fill", lambda *given, **options: said.update(options) or {})
    namespace = dict(preset="tiny", run_missing=False, cache_root=str(tmp_path))
    pages.Page("table10", namespace).fill()
    assert said["cache_root"] == str(tmp_path)


def test_a_page_cuts_no_cell_off():
    from reinpp.paper import page as pages
    shown, long = [], " ".join(20 * ["reason"])
    namespace = dict(preset="tiny", run_missing=False, display=lambda table: shown.append(table.to_html()))
    pages.Page("table10", namespace).display(pd.DataFrame(dict(status=[long]), index=[long]))
    assert shown[-1].count(long) == 2


def test_proposals_are_made_where_the_run_is_told(tmp_path):
    adapts = plan("tiny", "rein_a", target="night", limit_iterations=1)
    few = dict(source="scenes:train[:2]", evaluate_on=("scenes:night/val[:1]",))
    adapts = dataclasses.replace(adapts, target="scenes:night/train[:2]", **few,
        start=dataclasses.replace(adapts.start, **few))
    run(adapts, Ledger(tmp_path / "results"), tmp_path / "runs", cache_root=tmp_path / "cache", progress="none")
    made = sorted(p.parent.name for p in (tmp_path / "cache" / "proposals").glob("*/manifest.json"))
    assert len(made) == 2 and not (tmp_path / "runs" / "proposals").exists()


def test_the_command_line_hands_on_what_is_to_be_logged(monkeypatch):
    said = {}
    monkeypatch.setattr(runs, "run", lambda *given, **options: said.update(options) or dict(metrics={}))
    runs.main(["tiny", "freeze", "--check-every", "100", "--tensorboard"])
    assert said == dict(workers=None, checkpointing=False, check_every=100, tensorboard=True)
