"""Ten processes at one run, ten at one ledger, a loader's process that is killed, and two thousand steps.

Not a part of `make test`: `make proofs`."""

import json
import multiprocessing
import os
import signal
from pathlib import Path

import pytest
import torch
from noted import note
from proof_killed import ITERATIONS, ended, objective, train
from test_experiments import small

from reinpp.data.catalog import open_dataset
from reinpp.data.transforms import TrainTransform
from reinpp.models.segmenter import tiny_segmenter
from reinpp.paper.experiments import Ledger
from reinpp.paper.runs import run
from reinpp.training.generalize import Generalize
from reinpp.training.train import fit

PROCESSES, STEPS = 10, 2000


def told(folder, work):
    "A child that does `work(folder)` and writes what came of it, or the error, into its own file."
    pid = os.fork()
    if pid: return pid
    said = "nothing"
    try:
        said = json.dumps(work(folder))
    except Exception as error:
        said = f"{type(error).__name__}: {error}"
    finally:
        (folder / f"said.{os.getpid()}").write_text(said)
        os._exit(0)


def all_said(folder, pids):
    for pid in pids: assert ended(pid) == 0
    return [(folder / f"said.{pid}").read_text() for pid in pids]


def test_ten_processes_in_one_run_folder(tmp_path):
    "One trains; nine are refused in a line that says where and by whom; the end is the undisturbed one."
    expected = train("rein_g", tmp_path / "whole")
    pids = [told(tmp_path, lambda folder: train("rein_g", folder / "run")) for _ in range(PROCESSES)]
    said = all_said(tmp_path, pids)
    ends = [json.loads(one) for one in said if one.startswith('"')]
    refused = [one for one in said if one.startswith("RuntimeError") and "under way in another run, process" in one]
    others = sum(end != expected for end in ends)
    note(**{"ten processes in one run folder": dict(
        processes=PROCESSES, trained=len(ends), refused=len(refused), other_states=others)})
    assert len(ends) + len(refused) == PROCESSES and ends and not others, said
    assert not any("\n" in one or str(tmp_path / "run") not in one for one in refused)


def record_of(folder):
    return run(small("rein_g"), Ledger(folder / "results"), folder / "runs", progress="none", device="cpu")


def without_clock(record):
    "A record without what differs from one machine and hour to the next."
    training = {k: v for k, v in record["training"].items() if not k.startswith("seconds")}
    return {k: v for k, v in record.items() if k not in ("seconds", "date")} | dict(training=training)


def test_ten_processes_and_one_ledger(tmp_path):
    "One makes the run and nine wait for its record, which is that of a run alone."
    (tmp_path / "alone").mkdir()
    expected = record_of(tmp_path / "alone")
    said = all_said(tmp_path, [told(tmp_path, record_of) for _ in range(PROCESSES)])
    records = [json.loads(one) for one in said]
    log = tmp_path / "runs" / small("rein_g").training_key / "log.jsonl"
    trained = len(log.read_text().splitlines())
    others = sum(without_clock(record) != without_clock(expected) for record in records)
    note(**{"ten processes and one ledger": dict(processes=PROCESSES, trained=trained, other_states=others)})
    assert trained == 1 and not others
    assert len({json.dumps(record, sort_keys=True) for record in records}) == 1
    assert len(Ledger(tmp_path / "results").all()) == 1


@pytest.mark.parametrize("method", ["rein_g", "rein_a"])
def test_a_killed_loader_process(method, tmp_path):
    "One line that says what to do; the next call ends as the undisturbed run does."
    expected = train(method, tmp_path / "whole")
    made = objective(method)
    after = made.after_step
    def kill(iteration):
        after(iteration)
        if iteration == 10: os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)
    made.after_step = kill
    with pytest.raises(RuntimeError) as said:
        fit(made, ITERATIONS, 2, run_dir=tmp_path / "run", lr=1e-3, log_every=5, checkpoint_every=3, workers=2,
            progress="none", device="cpu")
    text = str(said.value)
    assert "\n" not in text and "process" in text and str(tmp_path / "run") in text, text
    others = int(train(method, tmp_path / "run", workers=2) != expected)
    note(**{f"a loader's process is killed, {method}": dict(kills=1, other_states=others)})
    assert not others


def state_of_process():
    "Resident bytes, and open descriptors."
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE"), len(os.listdir("/proc/self/fd"))


def test_two_thousand_steps_in_flat_memory(tmp_path):
    "From step 500 on memory grows by less than 8 MB, and no descriptor stays open."
    torch.manual_seed(0)
    small_vit = dict(depth=4, embed_dim=32, num_heads=2)
    segmenter = tiny_segmenter(image_size=32, backbone_args=small_vit, head_args=dict(decoder_layers=1))
    day = open_dataset("scenes", "train", count=4, size=(32, 64))
    made = Generalize(segmenter, day, TrainTransform(crop=32, base=32, min_class_pixels=4), num_points=16)
    after, seen = made.after_step, []
    def look(iteration):
        after(iteration)
        if iteration % 250 == 249: seen.append(state_of_process())
    made.after_step = look
    fit(made, STEPS, 2, run_dir=tmp_path / "run", log_every=1, checkpoint_every=250, progress="none", device="cpu")
    (first, fds), (last, still) = seen[1], seen[-1]
    grown = max(0, last - first)
    note(**{"2,000 steps": dict(steps=STEPS, kilobytes_grown_after_500=grown // 1000,
        descriptors_left=still - fds)})
    assert grown < 8_000_000 and still == fds, seen
