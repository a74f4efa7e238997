"""Two processes with gloo do what one process does with the same batch.

Whatever goes wrong in one of them ends all, with a line that says why.

`torchrun` runs this very file: `main` is what each process does, once for all tests of `run`."""
import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from unittest import mock

import pytest
import torch
from test_resume import flat
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from reinpp.adaptation.proposals import make_proposals
from reinpp.adaptation.rein_a import Adaptation, ReinA
from reinpp.adaptation.stm import STM
from reinpp.data.catalog import open_dataset
from reinpp.data.transforms import TrainTransform
from reinpp.models.losses import average_count
from reinpp.models.segmenter import Segmenter, tiny_segmenter
from reinpp.paper import experiments, runs
from reinpp.processes import barrier, get_rank, init_process_group
from reinpp.training.evaluation import evaluate
from reinpp.training.generalize import Generalize
from reinpp.training.train import adapt_each, fit

TAU = 0.3  # some of the pixels are above it
SMALL = TrainTransform(crop=64, base=64, min_class_pixels=12)


def segmenter(adapter="rein_g", head="mask2former", seed=0):
    torch.manual_seed(seed)
    linked = adapter == "rein_g"
    head_args = dict(decoder_layers=1) | ({} if linked else dict(num_queries=10)) if head == "mask2former" else {}
    return tiny_segmenter(adapter, head, adapter_args=dict(num_tokens=10, rank=2) if linked else {},
                          head_args=head_args)


def day():
    return open_dataset("scenes", "train", count=6)


def night():
    return open_dataset("scenes", "night/train", count=6, labels=False)


def generalize(adapter="rein_g", head="mask2former", **options):
    objective = Generalize(segmenter(adapter, head), day(), SMALL, num_points=64, **options)
    return _with_gaps(objective, "label")


def rein_a(**options):
    stores = [make_proposals(d, "instances", reduction=2) for d in (day(), night())]
    student = segmenter()
    with torch.no_grad():  # queries that differ; some of them find a class, in some images
        student.adapter.tokens_a.mul_(30)
        student.head.decoder.class_head.weight.mul_(2)
        student.head.decoder.class_head.bias[-1] -= 0.8
    settings = dict(rcs=False, tau=TAU, ema=0.9, mask_block=16, num_points=64, stm_least=0.0) | options
    stm = STM.like(student, decoder_layers=1)
    objective = ReinA(student, day(), night(), SMALL, *stores, stm=stm, settings=Adaptation(**settings))
    return _with_gaps(objective, "source_label")


def _with_gaps(objective, label):
    """Every fourth sample has no labels, every fourth other one a target that is nearly all padding.

    With one sample a process, one of them has nothing to match, or nothing that STM knows."""
    draw = objective.sample

    def sample(key, seed):
        sample = draw(key, seed)
        if key % 4 == 1:
            sample[label][:] = 255
        if key % 4 == 3 and "target_inside" in sample:
            sample["target_inside"][:] = False
        return sample

    objective.sample = sample
    return objective


class Toy:
    "One linear layer; `bad` is a (process, iteration) whose loss is not finite."

    def __init__(self, bad=None, seed=0, pause=0):
        torch.manual_seed(seed)
        self.segmenter, self.bad, self.pause, self.keys = nn.Linear(3, 1), bad, pause, []
        self.unused = nn.Parameter(torch.ones(2))

    def sample(self, key, seed):
        return dict(x=torch.randn(3), key=torch.tensor(key))

    def step(self, batch, iteration):
        time.sleep(self.pause)
        self.keys += batch["key"].tolist()
        loss = self.segmenter(batch["x"]).square().mean() * (float("nan") if (get_rank(), iteration) == self.bad else 1)
        loss.backward()
        return dict(total=loss.detach())

    def after_step(self, iteration):
        pass
    def named_trainables(self):
        return [*self.segmenter.named_parameters(), ("unused", self.unused)]
    def state_dict(self):
        return {n: p.detach() for n, p in self.named_trainables()}

    def load_state_dict(self, state):
        for n, p in self.state_dict().items():
            p.copy_(state[n])


CASES = {  # name -> (objective, options of fit)
    "generalize": (generalize, dict(batch_size=4)),
    "pasta, average": (lambda: generalize("full", augment="pasta", ema=0.5), dict(batch_size=2)),
    "per pixel, advstyle": (lambda: generalize("freeze", "semantic_fpn", augment="advstyle"), dict(batch_size=2)),
    "rein_a": (rein_a, dict(batch_size=2)),
    "rein_a, batch 4": (lambda: rein_a(weighting="pixel"), dict(batch_size=4, clip=20.0)),
    "rein_a, beyond the paper": (partial(rein_a, teacher_flip=True, soft_masks=True, q_on_mask=True),
                                 dict(batch_size=2)),
    "toy": (Toy, dict(batch_size=2)),
}
OF_THREE = {"rein_a, batch 3": (rein_a, dict(batch_size=3))}  # for three processes
EXPERIMENT = dataclasses.replace(experiments.plan("tiny", "rein_a", target="snow", adapt_iterations=2),
    evaluate_on=("scenes:snow/val",))
GO = dict(iterations=2, lr=1e-5, backbone_lr=1e-5, log_every=1, progress="lines", device="cpu")


def train(name, folder):
    "Gradients of each step, weights at the end, and the record."
    make, options = (CASES | OF_THREE)[name]
    objective, gradients = make(), []

    def note(*_):
        gradients.append({n: None if p.grad is None else p.grad.clone() for n, p in objective.named_trainables()})

    hook = register_optimizer_step_pre_hook(note)
    try:
        record = fit(objective, run_dir=folder / name, **GO, **options)
    finally:
        hook.remove()
    return dict(gradients=gradients, state=objective.state_dict(), record=record)


def scores():
    "Of five images, two at a time: the last batch is smaller."
    result = evaluate(segmenter(), open_dataset("scenes", "val", count=5), window=128, stride=128, batch=2)
    return {k: str(v) if k == "iou" else v for k, v in result.items()}


def refusals(folder):
    "What goes wrong, and what is said in this process."
    wrong = {
        "shares": lambda: fit(Toy(), iterations=1, batch_size=3, progress="none", device="cpu"),
        "run shares": lambda: runs.run(
            dataclasses.replace(EXPERIMENT, training=EXPERIMENT.training | dict(batch_size=3)),
            experiments.Ledger(folder / "none"), folder / "no runs"),
        "nan here": lambda: fit(Toy(bad=(0, 1)), batch_size=2, run_dir=folder / "nan", checkpoint_every=1, **GO),
        "nan there": lambda: fit(Toy(bad=(1, 1)), batch_size=2, **GO),
        "weights": lambda: fit(Toy(seed=get_rank()), batch_size=2, **GO),
        "folders": lambda: fit(Toy(), batch_size=2, run_dir=folder / "toy" if get_rank() else None, **GO),
        "collapse": lambda: fit(rein_a(tau=1.1, patience=2), batch_size=2, **GO),
    }
    said = {}
    for name, call in wrong.items():
        try:
            said[name] = ("nothing", str(call()))
        except Exception as error:
            said[name] = (type(error).__name__, str(error))
    return said


def main(kind, folder):
    torch.set_num_threads(1)
    init_process_group("cpu", timeout=1)
    if kind == "slow":
        (folder / f"{get_rank()}.pid").write_text(str(os.getpid()))
        return fit(Toy(pause=0.05), iterations=2000, batch_size=2, progress="none", device="cpu")
    if kind == "three":
        torch.save({name: train(name, folder) for name in OF_THREE}, folder / f"{get_rank()}.pt")
        return barrier()
    made = {name: train(name, folder) for name in CASES}
    made["count"] = [average_count(number, torch.device("cpu")).item()
        for number in (1 - get_rank(), 4 * get_rank(), 0)]
    made["scores"], made["refusals"] = scores(), refusals(folder)
    made["halves"] = fit(generalize(), batch_size=4, run_dir=folder / "halves", stop_at=1, **GO)
    fit(objective := generalize(), batch_size=4, run_dir=folder / "second half", **GO)  # one process made the first
    made["second half"] = objective.state_dict()
    student = segmenter()
    def adapt(student, target):
        return ReinA(student, day(), target, SMALL, settings=Adaptation(rcs=False, tau=TAU, num_points=64))

    adapt_each(student, dict(night=night()), adapt, folder / "each", batch_size=2, **GO | dict(iterations=1))
    made["adapter"] = student.load_adapter(folder / "each" / "night" / "adapter").trained_state()
    with mock.patch.object(Segmenter, "save_adapter", autospec=True, side_effect=Segmenter.save_adapter) as save:
        made["record"] = runs.run(EXPERIMENT, experiments.Ledger(folder / "results"), folder / "runs", progress="none")
    made["saved"] = [call.args[1] for call in save.call_args_list]
    torch.save(made, folder / f"{get_rank()}.pt")
    barrier()


def torchrun(*arguments, processes=2):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes),
               __file__, *map(str, arguments)]
    root = str(Path(__file__).resolve().parent.parent)
    path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    return subprocess.Popen(command, env=dict(os.environ, OMP_NUM_THREADS="1", PYTHONPATH=path),
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)


def finish(process, timeout=900):
    try:
        return process.communicate(timeout=timeout)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    "What two processes made: of each process, what `main` saved; then the folder, and what was printed."
    folder = tmp_path_factory.mktemp("two")
    fit(generalize(), batch_size=4, run_dir=folder / "second half", stop_at=1, **GO)
    process = torchrun("all", folder)
    said, errors = finish(process)
    assert process.returncode == 0, errors[-3000:]
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(2)], folder, said


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    "The same in this process, each case once."
    folder, made = tmp_path_factory.mktemp("one"), {}
    return lambda name: (made.setdefault(name, None) or made.update({name: train(name, folder)}) or made[name], folder)


def close(state, one):
    """Weights are those of `one`, wherever its gradients are more than rounding errors (a bias in front of a norm has
    no other): AdamW's steps, of 1e-5 here, do not depend on their size."""
    expected, seen = dict(flat(one["state"])), 0
    for n, found in state.items():
        sizes = [step[n.removeprefix("trained/").removeprefix("teacher/").removeprefix("ema.")]
            for step in one["gradients"]]
        sure = torch.stack([torch.zeros_like(found) if g is None else g.abs() for g in sizes]).amin(0) > 1e-4
        assert torch.allclose(found[sure], expected[n][sure], rtol=0, atol=1e-6), (n,
            (found - expected[n])[sure].abs().max())
        seen += sure.sum().item()
    assert seen > 0.5 * sum(t.numel() for t in expected.values())


def log(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("name", CASES)
def test_gradients_weights_and_log_are_those_of_one_process(name, run, alone, one_thread):
    made, folder, _ = run
    compare(name, made, folder, *alone(name))


def test_three_processes(tmp_path, alone, one_thread):
    process = torchrun("three", tmp_path, processes=3)
    _, errors = finish(process)
    assert process.returncode == 0, errors[-3000:]
    made = [torch.load(tmp_path / f"{rank}.pt", weights_only=False) for rank in range(3)]
    for name in OF_THREE: compare(name, made, tmp_path, *alone(name))


def compare(name, made, folder, one, where):
    "What several processes `made`, with what one did: gradients, weights, log and record."
    for step, expected in enumerate(one["gradients"]):
        largest = max(g.abs().max() for g in expected.values() if g is not None)
        for n, gradient in expected.items():
            for there in made:
                found = there[name]["gradients"][step][n]
                assert (found is None) == (gradient is None), (step, n)
                if gradient is not None:
                    assert (found - gradient).abs().max() <= 1e-5 * largest, (step, n, (found - gradient).abs().max(),
                        largest)
    a, b, *others = (dict(flat(m["state"])) for m in (one, *(m[name] for m in made)))
    assert a.keys() == b.keys()
    assert all(torch.equal(b[n], c[n]) for c in others for n in b), "all processes hold the same weights, bit for bit"
    close(b, one)
    lines = [log(f / name) for f in (where, folder)]
    assert [line["iteration"] for line in lines[0]] == [line["iteration"] for line in lines[1]] == [1, 2]
    for mine, theirs in zip(*lines):
        assert list(mine) == list(theirs)
        for key in mine.keys() - {"seconds"}:
            assert mine[key] == pytest.approx(theirs[key], rel=1e-4, abs=1e-5), key
    record = made[0][name]["record"]
    assert {k: v for k, v in record.items() if k in one["record"]
        and "seconds" not in k} == pytest.approx({k: v for k, v in one["record"].items() if "seconds" not in k})
    assert record["processes"] == len(made) and "processes" not in one["record"]


def test_one_process_writes_and_speaks(run):
    _, folder, said = run
    assert said.count("iteration 2/2") == len(CASES) + 1, "each training, and the second half of one, is told once"
    assert [line["iteration"] for line in log(folder / "halves")] == [1]
    for name in CASES:  # the toy does not say what it is
        said = [] if name == "toy" else ["run.json"]
        assert sorted(f.name for f in (folder / name).iterdir()) == ["checkpoint.pt", "log.jsonl", *said]


def test_two_processes_go_on_where_one_stopped_and_the_other_way_round(run, alone):
    (first, second), folder, _ = run
    objective = generalize()
    record = fit(objective, batch_size=4, run_dir=folder / "halves", **GO)
    assert first["halves"]["done"] == 1 and record["finished"]
    for state in (objective.state_dict(), first["second half"], second["second half"]):
        close(state, alone("generalize")[0])
    assert [line["iteration"] for line in log(folder / "second half")] == [1, 2]


def test_a_count_is_a_mean_and_at_least_one_in_all(run):
    # of 1 and 0, 0 and 4, 0 and 0: two gradients divided by it and averaged are one divided by 1, 4, 1
    assert [made["count"] for made in run[0]] == [[0.5, 2, 0.5]] * 2


def test_evaluation_is_that_of_one_process_to_the_last_bit(run):
    one = scores()
    assert [made["scores"] for made in run[0]] == [one,
        one] and one["images"] == 5 and sum(map(sum, one["confusion"])) > 4 * 128 * 256


def test_an_adapter_is_saved_by_one_and_found_by_all(run):
    first, second = (made["adapter"] for made in run[0])
    assert all(torch.equal(first[n], second[n]) for n in first)


def test_a_run_of_the_ledger_is_made_together_and_kept_by_one(run, tmp_path):
    (first, second), folder, _ = run
    assert first["record"] == second["record"] == json.loads(
        next((folder / "results").glob("*.json")).read_text()) and len(list((folder / "results").iterdir())) == 1
    assert [len(made["saved"]) for made in (first, second)] == [1,
        0] and first["saved"][0] == folder / "runs" / EXPERIMENT.training_key / "adapter"
    one = runs.run(EXPERIMENT, experiments.Ledger(tmp_path / "results"), tmp_path / "runs", progress="none")
    assert first["record"]["training"]["processes"] == 2 and "processes" not in one["training"] and first["record"][
        "start_iterations"] == one["start_iterations"] == 4000
    (a,), (b,) = (r["metrics"].values() for r in (first["record"], one))
    assert a["images"] == b["images"] == 100 and a["miou"] == pytest.approx(b["miou"],
        abs=5e-3) and a["pixel_accuracy"] == pytest.approx(b["pixel_accuracy"], abs=5e-3)


@pytest.mark.parametrize("what, error, line", [
    ("shares", "ValueError", "batch_size=3 is the batch of all processes together and cannot be shared by 2"),
    ("run shares", "ValueError", "batch_size=3 is the batch of all processes together"),
    ("nan here", "TrainingError", "iteration 1: total is not finite"),
    ("nan there", "TrainingError", "iteration 1: total is not finite"),
    ("weights", "ValueError", "start from different weights: call torch.manual_seed"),
    ("folders", "ValueError", "run_dir must be a folder that all of them see"),
    ("collapse", "Collapse", "sure of no pixel"),
])
def test_what_goes_wrong_in_one_process_stops_both_with_the_same_line(what, error, line, run):
    for made in run[0]:
        kind, said = made["refusals"][what]
        assert kind == error and line in said


def test_a_loss_that_is_not_finite_leaves_the_checkpoint(run):
    assert torch.load(run[1] / "nan" / "checkpoint.pt", weights_only=True)["iteration"] == 1


def test_a_killed_process_ends_the_run(tmp_path):
    process = torchrun("slow", tmp_path)
    for _ in range(1200):
        if all((tmp_path / f"{rank}.pid").exists() for rank in range(2)) or process.poll() is not None:
            break
        time.sleep(0.1)
    time.sleep(1)  # into the loop
    victim, other = (int((tmp_path / f"{rank}.pid").read_text()) for rank in (1, 0))
    os.kill(victim, signal.SIGKILL)
    _, errors = finish(process, timeout=60)  # a hang would be a TimeoutExpired
    assert process.returncode != 0 and "SIGKILL" in errors, errors[-2000:]
    with pytest.raises(ProcessLookupError):
        os.kill(other, 0)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
