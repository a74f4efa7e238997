"""Killed at random, asked to stop, and short of disk: what a training loses. Not a part of `make test`: `make proofs`.

A training is a forked child of this process, so that thirty kills take minutes. Its end state must be that of a run
that nobody disturbed, bit for bit."""

import dataclasses
import hashlib
import json
import os
import random
import shutil
import signal
import time

import pytest
import torch
from noted import note

from reinpp.adaptation.proposals import ProposalStore
from reinpp.adaptation.rein_a import Adaptation, ReinA
from reinpp.adaptation.stm import STM
from reinpp.data.catalog import open_dataset
from reinpp.data.transforms import TrainTransform
from reinpp.models.adapter_files import WEIGHTS
from reinpp.models.segmenter import tiny_segmenter
from reinpp.paper import runs
from reinpp.paper.experiments import Ledger, plan
from reinpp.training.generalize import Generalize
from reinpp.training.run_folder import Stopped
from reinpp.training.train import fit

KILLS, ITERATIONS = 30, 40
RUN = dataclasses.replace(plan("tiny", "rein_g", limit_iterations=3), source="scenes:train[:4]",
    evaluate_on=("scenes:val[:1]", "scenes:night/val[:1]"))
torch.set_num_threads(1)


def objective(method):
    torch.manual_seed(0)
    segmenter, transform = tiny_segmenter(), TrainTransform(crop=64, base=64, min_class_pixels=12)
    day = open_dataset("scenes", "train", count=4)
    if method == "rein_g": return Generalize(segmenter, day, transform, num_points=64)
    night = open_dataset("scenes", "night/train", count=4, labels=False)
    stores = [ProposalStore(dataset=d, engine="instances", reduction=2) for d in (day, night)]
    settings = Adaptation(tau=0.2, ema=0.9, mask_block=16, limit=20, pool=40, num_points=64, rcs=False)
    stm = STM.like(segmenter, decoder_layers=1)
    return ReinA(segmenter, day, night, transform, *stores, stm=stm, settings=settings)


def train(method, folder, **options):
    "The sha256 of everything that training changed."
    made = objective(method)
    record = fit(made, ITERATIONS, 2, run_dir=folder, lr=1e-3, log_every=5, progress="none", device="cpu",
        **dict(checkpoint_every=3) | options)
    assert record["finished"]
    digest = hashlib.sha256()
    state = made.state_dict()
    for part in state.values() if method == "rein_a" else [state]:
        for name, value in part.items():
            if isinstance(value, torch.Tensor): digest.update(name.encode() + value.numpy().tobytes())
    return digest.hexdigest()


def forked(method, folder, **options):
    "A child that trains; its exit status is 0 where it came to the end."
    pid = os.fork()
    if pid: return pid
    status = 1
    try:
        (folder.parent / "end").write_text(train(method, folder, **options))
        status = 0
    except Stopped:
        status = 3
    except SystemExit as error:
        status = error.code
    finally:
        os._exit(status)


def ended(pid):
    "Exit status, or minus the signal."
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


@pytest.fixture(scope="module", params=["rein_g", "rein_a"])
def undisturbed(request, tmp_path_factory):
    folder, began = tmp_path_factory.mktemp("whole"), time.time()
    return request.param, train(request.param, folder / "run"), time.time() - began


def test_killed_at_random(undisturbed, tmp_path):
    method, expected, seconds = undisturbed
    draw, kills, writing, ends, others, folder = random.Random(0), 0, 0, 0, 0, tmp_path / "run"
    while kills < KILLS:
        pid = forked(method, folder)
        time.sleep(draw.uniform(0, seconds))
        os.kill(pid, signal.SIGKILL)
        if ended(pid) == -signal.SIGKILL:
            kills += 1
            writing += bool(list(folder.glob(".*new*")) + list(folder.glob("*.tmp*")))
        if (tmp_path / "end").exists():
            others += (tmp_path / "end").read_text() != expected
            ends += 1
            (tmp_path / "end").unlink()
            shutil.rmtree(folder)
    assert ended(forked(method, folder)) == 0
    others += (tmp_path / "end").read_text() != expected
    logged = [json.loads(line)["iteration"] for line in (folder / "log.jsonl").read_text().splitlines()]
    assert logged == list(range(5, ITERATIONS + 1, 5)), "each line once"
    note(**{f"killed, {method}": dict(kills=kills, while_writing=writing, ends=ends + 1, other_states=others)})
    assert others == 0

WRITES = ("replace", "link", "unlink", "fsync")  # each changes what lies on the disk


def run_until(step, folder):
    "A child that makes a run of the ledger and kills itself at its `step`-th call that writes; its exit status."
    pid = os.fork()
    if pid: return ended(pid)
    left, real = step, {name: getattr(os, name) for name in WRITES}

    def counted(name):
        def call(*arguments, **options):
            nonlocal left
            left -= 1
            if left == 0: os.kill(os.getpid(), signal.SIGKILL)
            return real[name](*arguments, **options)
        return call

    for name in WRITES: setattr(os, name, counted(name))
    status = 1
    try:
        runs.run(RUN, Ledger(folder / "results"), folder / "runs", progress="none", device="cpu", checkpoint_every=1)
        status = 0
    finally:
        os._exit(status)


def test_killed_inside_every_write(tmp_path):
    "At each write of a run in turn: of its checkpoints, its adapter, the parts of its evaluation, its record."
    assert run_until(0, tmp_path / "whole") == 0
    (whole,) = Ledger(tmp_path / "whole" / "results").all()
    kept = tmp_path / "whole" / "runs" / RUN.training_key / "adapter" / WEIGHTS
    kills, others, status = 0, 0, -signal.SIGKILL
    while status == -signal.SIGKILL:
        folder = tmp_path / str(kills)
        status = run_until(kills + 1, folder)
        kills += status == -signal.SIGKILL
        assert run_until(0, folder) == 0
        (record,) = Ledger(folder / "results").all()
        same = [record[part] == whole[part] for part in ("key", "config", "metrics", "scores")]
        found = folder / "runs" / RUN.training_key / "adapter" / WEIGHTS
        others += not (all(same) and found.read_bytes() == kept.read_bytes())
        shutil.rmtree(folder)
    assert status == 0
    note(**{"killed inside every write of a run": dict(kills=kills, other_states=others)})
    assert kills >= 30 and others == 0


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGUSR1", "SIGUSR2", "SIGHUP"])
def test_asked_to_stop(undisturbed, name, tmp_path):
    "At most a step is lost: the checkpoint is of the iteration at which it left."
    method, expected, seconds = undisturbed
    pid = forked(method, tmp_path / "run", checkpoint_every=None)
    while not (tmp_path / "run" / "log.jsonl").exists(): time.sleep(0.02)
    os.kill(pid, getattr(signal, name))
    assert ended(pid) in (3, 128 + getattr(signal, name))
    assert (tmp_path / "run" / "checkpoint.pt").exists()
    assert ended(forked(method, tmp_path / "run")) == 0
    others = int((tmp_path / "end").read_text() != expected)
    note(**{f"{name}, {method}": dict(stops=1, other_states=others)})
    assert others == 0


def test_a_bit_flipped_in_a_checkpoint(undisturbed, tmp_path):
    "Forty flips: each is seen, and the checkpoint before is used."
    method, expected, _ = undisturbed
    pid = forked(method, tmp_path / "run")
    while not (tmp_path / "run" / "checkpoint.previous.pt").exists(): time.sleep(0.02)
    os.kill(pid, signal.SIGTERM)
    ended(pid)
    accepted, draw, whole = 0, random.Random(1), (tmp_path / "run" / "checkpoint.pt").read_bytes()
    for _ in range(40):
        shutil.rmtree(tmp_path / "copy", ignore_errors=True)
        shutil.copytree(tmp_path / "run", tmp_path / "copy")
        data = bytearray(whole)
        data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
        (tmp_path / "copy" / "checkpoint.pt").write_bytes(data)
        made = objective(method)
        record = fit(made, ITERATIONS, 2, run_dir=tmp_path / "copy", lr=1e-3, log_every=5, checkpoint_every=3,
            stop_at=1, progress="none", device="cpu")
        assert record["done"] > 0
        accepted += not (tmp_path / "copy" / "checkpoint.damaged.pt").exists()
    note(**{f"bit flips in a checkpoint, {method}": dict(flips=40, accepted=accepted)})
    assert accepted == 0
