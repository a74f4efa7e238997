"A run killed with SIGKILL half way and started again ends with the same weights, bit for bit."
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

SCRIPT = r"""
import sys, time, torch
from pathlib import Path
from reinpp.data.catalog import open_dataset
from reinpp.adaptation.proposals import make_proposals
from reinpp.adaptation.rein_a import Adaptation, ReinA
from reinpp.models.segmenter import tiny_segmenter
from reinpp.adaptation.stm import STM
from reinpp.training.generalize import Generalize
from reinpp.training.train import fit
from reinpp.data.transforms import TrainTransform

kind, folder, slow = sys.argv[1], Path(sys.argv[2]), float(sys.argv[3])
torch.set_num_threads(1)
torch.manual_seed(0)
segmenter = tiny_segmenter(head_args=dict(decoder_layers=1))
source = open_dataset("scenes", "train", count=6)
transform = TrainTransform(crop=64, base=64, min_class_pixels=20)
if kind == "rein_a":
    target = open_dataset("scenes", "night/train", count=6, labels=False)
    stores = [make_proposals(d, "instances", reduction=2) for d in (source, target)]
    settings = Adaptation(tau=0.05, num_points=128, limit=20, ema=0.9, weighting="pixel", mask_block=16)
    objective = ReinA(segmenter, source, target, transform, *stores, stm=STM.like(segmenter), settings=settings)
else:
    objective = Generalize(segmenter, source, transform, num_points=128)
after = objective.after_step
def linger(iteration):
    after(iteration)
    time.sleep(slow)
objective.after_step = linger
fit(objective, iterations=12, batch_size=2, lr=1e-3, run_dir=folder, checkpoint_every=3, log_every=1, progress="none",
    seed=5)
"""


def run(kind, folder, slow=0.0, **options):
    environment = dict(os.environ, OMP_NUM_THREADS="1")
    return subprocess.Popen([sys.executable, "-c", SCRIPT, kind, str(folder), str(slow)], env=environment,
                            stderr=subprocess.PIPE, **options)


def finish(process):
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors.decode()[-2000:]


def flat(state, prefix=""):
    for key, value in state.items():
        if isinstance(value, dict):
            yield from flat(value, f"{prefix}{key}/")
        elif isinstance(value, torch.Tensor):
            yield f"{prefix}{key}", value


@pytest.mark.parametrize("kind", ["generalize", "rein_a"])
def test_killed_and_resumed_equals_undisturbed(kind, tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    undisturbed = run(kind, whole)
    victim = run(kind, cut, slow=0.5)
    log = cut / "log.jsonl"
    deadline = time.time() + 240
    while time.time() < deadline and not (log.exists() and log.read_text().count("\n") >= 5):
        time.sleep(0.05)
    victim.send_signal(signal.SIGKILL)
    victim.wait()
    assert victim.returncode == -signal.SIGKILL, "it was to be killed half way, not to end by itself"
    at = torch.load(cut / "checkpoint.pt", weights_only=True)["iteration"]
    assert 0 < at < 12
    finish(run(kind, cut))
    finish(undisturbed)
    a, b = (torch.load(folder / "checkpoint.pt", weights_only=True) for folder in (whole, cut))
    assert a["iteration"] == b["iteration"] == 12
    first, second = dict(flat(a["objective"])), dict(flat(b["objective"]))
    assert first.keys() == second.keys() and len(first) > 50
    assert all(torch.equal(first[k], second[k]) for k in first)
    assert a["recent"] == b["recent"]
    entries = [[{k: v for k, v in json.loads(line).items() if k != "seconds"}
                for line in (folder / "log.jsonl").read_text().splitlines()] for folder in (whole, cut)]
    assert entries[0] == entries[1], "the log of a resumed run has every iteration once"
    assert not list(Path(cut).glob("*.tmp"))
