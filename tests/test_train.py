"The loop: groups, schedule, checkpoints, errors."
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from torch import nn

from reinpp.adaptation.rein_a import Adaptation, Collapse, ReinA
from reinpp.data.catalog import open_dataset
from reinpp.data.sampling import fold
from reinpp.data.transforms import TrainTransform, adv_style, pasta
from reinpp.files import BadFile
from reinpp.models.losses import normalized_score_loss
from reinpp.models.segmenter import create_segmenter, tiny_segmenter
from reinpp.training import train
from reinpp.training.evaluation import evaluate
from reinpp.training.generalize import Generalize
from reinpp.training.train import (
    TrainingError,
    adapt_each,
    default_workers,
    fit,
    learning_rate,
    parameter_groups,
    tf32,
)


class Toy:
    "An objective of one linear layer, with a term that begins later and, if asked, a loss that explodes."

    def __init__(self, explode_at=None):
        torch.manual_seed(0)
        self.segmenter, self.explode_at, self.seen = nn.Linear(3, 1), explode_at, []

    def sample(self, key, seed):
        return dict(x=torch.randn(3), key=torch.tensor(key))

    def step(self, batch, iteration):
        self.seen += batch["key"].tolist()
        loss = self.segmenter(batch["x"]).square().mean() * (float("inf") if iteration == self.explode_at else 1)
        loss.backward()
        return dict(total=loss.detach()) | (dict(late=torch.tensor(1.0)) if iteration >= 3 else {})

    def after_step(self, iteration):
        pass
    def named_trainables(self):
        return self.segmenter.named_parameters()
    def state_dict(self):
        return {n: p.detach() for n, p in self.named_trainables()}
    def load_state_dict(self, state):
        self.segmenter.load_state_dict(state)


def test_every_sample_once_and_terms_may_begin_late(tmp_path):
    toy = Toy()
    fit(toy, iterations=6, batch_size=2, run_dir=tmp_path, log_every=5, progress="none")
    assert toy.seen == list(range(12))
    first, last = (json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines())
    assert first["iteration"] == 5 and first["late"] == 1.0 and last["iteration"] == 6


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_samples_do_not_depend_on_workers(workers, tmp_path):
    toy = Toy()
    fit(toy, iterations=4, batch_size=3, workers=workers, progress="none", lr=0.1)
    reference = Toy()
    fit(reference, iterations=4, batch_size=3, progress="none", lr=0.1)
    assert all(torch.equal(a, b) for a, b in zip(toy.state_dict().values(), reference.state_dict().values()))


def test_a_gpu_has_workers_of_its_own_and_a_cpu_none(monkeypatch):
    for there, processes, wanted in ((2, 1, 2), (32, 1, 8), (16, 4, 4), (2, 4, 1)):
        monkeypatch.setattr(train, "cores", lambda there=there: there)
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
        assert default_workers(torch.device("cuda", 1)) == wanted
    assert default_workers(torch.device("cpu")) == 0
    assert fit(Toy(), iterations=1, batch_size=1, progress="none")["workers"] == 0


def test_the_record_says_how_long_the_loop_waited(tmp_path):
    toy, draw = Toy(), Toy.sample

    def sample(key, seed):
        time.sleep(0.06)
        return draw(toy, key, seed)
    toy.sample = sample
    go = dict(iterations=4, batch_size=1, run_dir=tmp_path, progress="none")
    half = fit(toy, stop_at=2, **go)["seconds_waiting"]
    made = fit(toy, **go)
    assert 0.1 <= half < made["seconds_waiting"] <= made["seconds"] + 0.1, "both halves, and not the steps"


def test_tf32_goes_with_bf16_and_is_put_back():
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    for allowed, said in ((True, "high"), (False, "highest")):
        with pytest.raises(KeyError), tf32(torch.device("cuda"), allowed):
            assert (torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32) == (said, allowed)
            raise KeyError
        assert (torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32) == before
    with tf32(torch.device("cpu"), True):
        assert torch.get_float32_matmul_precision() == before[0], "a CPU computes as it does"


@pytest.mark.parametrize("workers", [0, 2])
def test_a_bad_file_is_one_line_whoever_reads_it(workers, tmp_path):
    toy, draw = Toy(), Toy.sample

    def sample(key, seed):
        if key == 3:
            raise BadFile("street.png is damaged: delete it", kind="other size")
        return draw(toy, key, seed)
    toy.sample = sample
    with pytest.raises(BadFile) as error:
        fit(toy, iterations=4, batch_size=2, run_dir=tmp_path, checkpoint_every=1, workers=workers, progress="none")
    assert str(error.value) == "street.png is damaged: delete it" and error.value.kind == "other size"
    assert torch.load(tmp_path / "checkpoint.pt", weights_only=True)["iteration"] == 1 and toy.seen == [0, 1]


def test_a_loss_that_is_not_finite_stops_and_leaves_the_checkpoint(tmp_path):
    with pytest.raises(TrainingError, match="iteration 4: total is not finite.*stays"):
        fit(Toy(explode_at=4), iterations=6, batch_size=1, run_dir=tmp_path, checkpoint_every=2, progress="none")
    assert torch.load(tmp_path / "checkpoint.pt", weights_only=True)["iteration"] == 4
    assert fit(Toy(), iterations=6, batch_size=1, run_dir=tmp_path, checkpoint_every=2, progress="none")["finished"]


def test_a_gradient_that_is_not_finite_moves_nothing(tmp_path):
    "Of a loss that is finite: seen before the optimiser's step, so the checkpoint is not overwritten with NaN."
    class Spoilt(Toy):
        def step(self, batch, iteration):
            terms = super().step(batch, iteration)
            if iteration == 4: self.segmenter.weight.grad[0, 1] = torch.nan
            return terms
    spoilt = Spoilt()
    with pytest.raises(TrainingError, match="iteration 4: the gradient is not finite; its batch is .*stays"):
        fit(spoilt, iterations=6, batch_size=1, run_dir=tmp_path, checkpoint_every=1, progress="none")
    assert all(p.isfinite().all() for p in spoilt.segmenter.parameters())
    state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert state["iteration"] == 4 and all(t.isfinite().all() for t in state["objective"].values())


def test_the_log_has_each_iteration_once_whatever_was_left_in_it(tmp_path):
    "Lines after the checkpoint, and one that was half written."
    options = dict(iterations=6, batch_size=1, run_dir=tmp_path, log_every=1, checkpoint_every=2, progress="none")
    fit(Toy(), stop_at=2, **options)
    log = tmp_path / "log.jsonl"
    later = log.read_text().splitlines(keepends=True)[1].replace('"iteration": 2', '"iteration": 3')
    log.write_text(log.read_text() + later + '{"iteration": 4, "se')
    fit(Toy(), **options)
    assert [json.loads(line)["iteration"] for line in log.read_text().splitlines()] == [1, 2, 3, 4, 5, 6]


def test_a_killed_loader_process_is_one_line(tmp_path):
    options = dict(iterations=12, batch_size=1, run_dir=tmp_path, checkpoint_every=1, workers=1, progress="none")
    toy = Toy()
    def kill(iteration):
        if iteration == 3: os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)
        if iteration > 3: time.sleep(0.2)  # until torch has seen it
    toy.after_step = kill
    with pytest.raises(TrainingError, match="a process that loads samples died.*stays: start again") as told:
        fit(toy, **options)
    assert "\n" not in str(told.value) and str(tmp_path) in str(told.value)
    again, undisturbed = Toy(), Toy()
    fit(again, **options)
    fit(undisturbed, **options | dict(run_dir=None, checkpoint_every=None))
    assert all(torch.equal(a, b) for a, b in zip(again.state_dict().values(), undisturbed.state_dict().values()))


def test_a_checkpoint_of_other_settings_is_refused(tmp_path):
    fit(Toy(), iterations=2, batch_size=1, run_dir=tmp_path, progress="none")
    with pytest.raises(ValueError, match="lr was 0.0001, now 0.001"):
        fit(Toy(), iterations=2, batch_size=1, lr=1e-3, run_dir=tmp_path, progress="none")


def test_a_finished_run_is_not_trained_again(tmp_path):
    fit(Toy(), iterations=3, batch_size=1, run_dir=tmp_path, progress="none")
    toy = Toy()
    record = fit(toy, iterations=3, batch_size=1, run_dir=tmp_path, progress="none")
    assert toy.seen == [] and record["finished"]


@pytest.mark.parametrize("wrong", [
    dict(iterations=0), dict(iterations="ten"), dict(iterations=2.5), dict(batch_size=True), dict(batch_size=0),
    dict(precision="half"), dict(progress="loud")])
def test_wrong_settings(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        fit(Toy(), **dict(iterations=1, batch_size=1) | wrong)


def test_what_decays_and_what_does_not():
    head = dict(hidden_dim=32, encoder_layers=1, decoder_layers=1, encoder_ffn=32, decoder_ffn=32, num_heads=4)
    segmenter = create_segmenter("tiny", "full", image_size=64, pretrained=False, head_args=head | dict(num_queries=10))
    rein = create_segmenter("tiny", "rein_g", image_size=64, pretrained=False, adapter_args=dict(num_tokens=10, rank=4),
        head_args=head)
    for model in (segmenter, rein):
        names = {id(p): n for n, p in model.named_parameters()}
        decay = {names[id(p)]: (g["lr"], g["weight_decay"])
            for g in parameter_groups(((n, p) for n, p in model.named_parameters() if p.requires_grad), 1e-4, 1e-5,
            0.05) for p in g["params"]}
        assert len(decay) == sum(p.requires_grad for p in model.parameters())
        for module_name, module in model.named_modules():
            for n, p in module.named_parameters(recurse=False):
                name = f"{module_name}.{n}"
                if not p.requires_grad: continue
                rate, weight_decay = decay[name]
                assert rate == (1e-5 if name.startswith("backbone.") else 1e-4), name
                special = isinstance(module, (nn.LayerNorm, nn.GroupNorm)) or n in ("level_embed", "query_embed",
                    "query_feat", "tokens_a", "tokens_b", "scale")
                assert weight_decay == (0.0 if special else 0.05), name


def test_schedule():
    assert learning_rate(0, 100) == 1 and learning_rate(50, 100) == pytest.approx(0.5 ** 0.9) and 0 < learning_rate(99,
        100) < 0.02
    assert [learning_rate(i, 12, warmup=4) for i in range(5)] == [0.25, 0.5, 0.75, 1.0, 1.0], "no decay meanwhile"
    factors = [learning_rate(i, 40_000, warmup=10_000) for i in range(40_000)]
    assert factors[0] == 1e-4 and factors[9_999] == factors[10_000] == 1 and 0 < factors[-1] < 1e-3
    assert factors[20_000] == pytest.approx(0.694, abs=5e-4), "decay over the remaining 30,000"
    assert factors[5_000] == pytest.approx(0.5, abs=1e-3), "the trap of both at once: 0.44"
    assert [learning_rate(i, 2, warmup=10_000) for i in range(2)] == [1e-4, 2e-4], "a run shorter than its warm-up"


# ---- real objectives, small

HEAD = dict(hidden_dim=32, encoder_layers=1, decoder_layers=1, encoder_ffn=32, decoder_ffn=32, num_heads=4)
GO = dict(iterations=4, batch_size=2, lr=1e-3, progress="none", log_every=2)


def small(adapter="rein_g", head="mask2former"):
    torch.manual_seed(0)
    linked = adapter == "rein_g" and head == "mask2former"
    head_args = HEAD | ({} if linked else dict(num_queries=10)) if head == "mask2former" else {}
    return create_segmenter("tiny", adapter, head, image_size=64, pretrained=False,
        adapter_args=dict(num_tokens=10, rank=2) if adapter == "rein_g" else {}, head_args=head_args)


def crops():
    return TrainTransform(crop=64, base=64, min_class_pixels=12)


@pytest.fixture(scope="module")
def day():
    return open_dataset("scenes", "train", count=4)


@pytest.fixture(scope="module")
def night():
    return open_dataset("scenes", "night/train", count=4, labels=False)


def batch_of(objective):
    samples = []
    for key in range(2):
        torch.manual_seed(fold(0, key))
        samples.append(objective.sample(key, 0))
    return torch.utils.data.default_collate(samples)


def adapts(segmenter, day, night, **options):
    settings = dict(rcs=False, tau=0.1, ema=0.9, mask_block=16, num_points=64) | options
    return ReinA(segmenter, day, night, crops(), settings=Adaptation(**settings))


# ---- pictures

def test_checkpointing_ends_at_the_same_weights(day):
    ends, passes = [], []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        segmenter = tiny_segmenter()
        count = [0]
        segmenter.backbone.blocks[3].register_forward_pre_hook(lambda *_, n=count: n.append(1))
        record = fit(Generalize(segmenter, day, TrainTransform(crop=64, base=64), num_points=64), iterations=2,
            batch_size=1, lr=1e-3, checkpointing=checkpointing, progress="none")
        ends.append(list(segmenter.trained_state().values()))
        passes.append(sum(count))
        assert record["checkpointing"] == checkpointing
    assert passes == [2, 4], "each block is computed twice a step"
    assert all(torch.equal(a, b) for a, b in zip(*ends))


def test_pictures_leave_the_run_as_it_is(day, night, tmp_path):
    "Trap: a picture that takes from the random stream, or leaves the student in another mode."
    pytest.importorskip("matplotlib").use("Agg")
    plain, drawn = adapts(small(), day, night), adapts(small(), day, night)
    fit(plain, run_dir=tmp_path / "plain", **GO)
    fit(drawn, run_dir=tmp_path / "drawn", pictures_every=2, **GO)
    a, b = plain.state_dict(), drawn.state_dict()
    assert all(torch.equal(a[part][n], b[part][n]) for part in ("trained", "teacher") for n in a[part])
    logs = [[{k: v for k, v in json.loads(l).items() if k != "seconds"}
        for l in (tmp_path / name / "log.jsonl").read_text().splitlines()] for name in ("plain", "drawn")]
    assert logs[0] == logs[1] and {"q", "above_tau", "agreement", "share_road", "share_traffic_light",
        "mix"} <= logs[0][0].keys()
    assert sorted(f.name for f in (tmp_path / "drawn" / "views").iterdir()) == ["000000.png", "000002.png"]
    assert not (tmp_path / "plain" / "views").exists()
    assert (tmp_path / "drawn" / "views" / "000002.png").read_bytes().startswith(b"\x89PNG")


def test_pictures_need_a_place_and_a_painter(tmp_path):
    for run_dir in (None, tmp_path):
        with pytest.raises(ValueError, match="pictures_every=1"):
            fit(Toy(), iterations=1, run_dir=run_dir, pictures_every=1, progress="none")


def test_checks_leave_the_run_as_it_is(day, night, tmp_path):
    "Trap: an evaluation between steps that takes from the random stream, or leaves the student in another mode."
    plain, checked = adapts(small(), day, night), adapts(small(), day, night)
    options = GO | dict(log_every=1)
    fit(plain, run_dir=tmp_path / "plain", **options)
    def check(segmenter):
        assert not segmenter.training
        torch.rand(3)
        return dict(miou=evaluate(segmenter, day)["miou"])
    fit(checked, run_dir=tmp_path / "checked", check=check, check_every=2, **options)
    a, b = plain.state_dict(), checked.state_dict()
    assert all(torch.equal(a[part][n], b[part][n]) for part in ("trained", "teacher") for n in a[part])
    log = [json.loads(l) for l in (tmp_path / "checked" / "log.jsonl").read_text().splitlines()]
    found = {row["iteration"]: row["check miou"] for row in log if "check miou" in row}
    assert len(log) == GO["iterations"] == 4 and list(found) == [2, 4]
    assert found[4] == evaluate(checked.segmenter.eval(), day)["miou"]


@pytest.mark.parametrize("wrong", [{}, dict(run_dir=None), dict(check=None)])
def test_checks_need_a_place_a_rhythm_and_a_question(wrong, tmp_path):
    given = dict(run_dir=tmp_path, check=lambda segmenter: {}, check_every=50 if wrong else 3) | wrong
    with pytest.raises(ValueError, match="check_every="):
        fit(Toy(), iterations=1, progress="none", **given)


def test_tensorboard_says_what_the_log_says(day, night, tmp_path):
    "Cut off after four iterations and gone on with: each iteration once, pictures too."
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    pytest.importorskip("matplotlib").use("Agg")
    options = GO | dict(iterations=6, log_every=1, run_dir=tmp_path, tensorboard=True, pictures_every=3)
    fit(adapts(small(), day, night), stop_at=4, **options)
    (tmp_path / "log.jsonl").write_text((tmp_path / "log.jsonl").read_text() + '{"iteration": 5}\n')
    fit(adapts(small(), day, night), **options)
    log = [json.loads(l) for l in (tmp_path / "log.jsonl").read_text().splitlines()]
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    told = events.Scalars("total")
    assert [e.step for e in told] == [row["iteration"] for row in log] == list(range(1, 7))
    assert [e.value for e in told] == pytest.approx([row["total"] for row in log])
    assert [e.step for e in events.Images("views")] == [0, 3]


def test_tensorboard_that_is_not_installed_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(train, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"pip install 'reinpp\[tensorboard\]'"):
        fit(Toy(), iterations=1, run_dir=tmp_path, tensorboard=True, progress="none")


def test_collapse_leaves_the_last_good_checkpoint(day, night, tmp_path):
    """Sure of nothing for two iterations.

    The run ends with a line that says what to try, and what was saved before is whole."""
    fit(adapts(small(), day, night, tau=1.1, patience=3), run_dir=tmp_path, checkpoint_every=1, stop_at=2, **GO)
    good = (tmp_path / "checkpoint.pt").read_bytes()
    with pytest.raises(Collapse, match="lower tau"):
        fit(adapts(small(), day, night, tau=1.1, patience=3), run_dir=tmp_path, checkpoint_every=1, **GO)
    assert (tmp_path / "checkpoint.pt").read_bytes() == good and torch.load(tmp_path / "checkpoint.pt",
        weights_only=True)["iteration"] == 2
    # goes on once tau is lower
    assert fit(adapts(small(), day, night, tau=0.05, patience=30), run_dir=tmp_path, checkpoint_every=1,
        **GO)["finished"]


# ---- PASTA, AdvStyle, averaged weights

@pytest.mark.parametrize(
"adapter, head", [("freeze", "mask2former"), ("full", "mask2former"), ("freeze", "semantic_fpn")])
@pytest.mark.parametrize("augment", ["pasta", "advstyle"])
def test_augmentations_train_every_parameter(augment, adapter, head, day, monkeypatch):
    objective = Generalize(small(adapter, head), day, crops(), num_points=64, augment=augment)
    batch, seen = batch_of(objective), []
    real = objective.segmenter.forward
    monkeypatch.setattr(objective.segmenter, "forward", lambda images: seen.append(images.detach().clone())
        or real(images))
    terms = objective.step(batch, 0)
    assert torch.isfinite(terms["total"]) and all(p.grad is not None for n, p in objective.named_trainables()
        if not n.startswith("backbone."))
    if augment == "pasta":
        plain = batch_of(Generalize(objective.segmenter, day, crops(), num_points=64))["image"]
        assert seen[0].equal(batch["image"]) and not seen[0].equal(plain)
        torch.manual_seed(3)
        once = pasta(plain[0])
        torch.manual_seed(3)
        assert once.equal(pasta(plain[0])) and not once.equal(plain[0])
    else:
        searched, trained_on = seen
        assert torch.allclose(searched, batch["image"], atol=1e-4) and torch.equal(trained_on[:2],
            batch["image"]) and not torch.allclose(trained_on[2:], searched, atol=1e-6)


def test_advstyle_climbs_the_right_loss(day):
    """With masks: the normalised scores' loss; the style it finds is worse, and the same as called by hand.

    The search leaves no gradient behind."""
    objective = Generalize(small("freeze"), day, crops(), num_points=64, augment="advstyle")
    segmenter, batch = objective.segmenter, batch_of(objective)

    def loss(images):
        scores = segmenter(images).scores()
        return normalized_score_loss(scores, batch["label"], torch.ones(batch["label"].shape))

    styled = objective._styled(batch["image"], batch["label"])
    assert all(p.grad is None for p in segmenter.parameters())
    by_hand = adv_style(batch["image"], loss, std=segmenter.std.flatten().tolist())
    assert torch.allclose(styled, by_hand, atol=1e-5)
    with torch.no_grad():
        assert loss(styled) > loss(batch["image"])


def test_without_augmentation_the_batch_is_the_batch(day, monkeypatch):
    objective = Generalize(small(), day, crops(), num_points=64)
    batch, seen, real = batch_of(objective), [], objective.segmenter.forward
    monkeypatch.setattr(objective.segmenter, "forward", lambda images: seen.append(images) or real(images))
    objective.step(batch, 0)
    assert len(seen) == 1 and seen[0] is batch["image"]


def test_averaged_weights(day, tmp_path):
    """They do not disturb training, follow as Rein-A's teacher does, are evaluated in a context, and come back from a
    checkpoint."""
    plain, averaged = Generalize(small(), day, crops(), num_points=64), Generalize(small(), day, crops(), num_points=64,
        ema=0.5)
    start = averaged.teacher["adapter.scale"].clone()
    fit(plain, **GO)
    fit(averaged, run_dir=tmp_path, stop_at=2, **GO)
    resumed = Generalize(small(), day, crops(), num_points=64, ema=0.5)
    fit(resumed, run_dir=tmp_path, **GO)
    own = dict(resumed.named_trainables())
    assert all(torch.equal(p, own[n]) for n, p in plain.named_trainables())
    assert resumed.teacher["adapter.scale"] not in (start, own["adapter.scale"])
    straight = Generalize(small(), day, crops(), num_points=64, ema=0.5)
    fit(straight, **GO)
    assert all(torch.equal(straight.teacher[n], t) for n, t in resumed.teacher.items())
    scale = own["adapter.scale"].item()
    with resumed.teacher_weights() as segmenter:
        assert segmenter.adapter.scale.item() == resumed.teacher["adapter.scale"].item() != scale
    assert resumed.segmenter.adapter.scale.item() == scale
    with pytest.raises(ValueError, match="choice of ema"):
        fit(Generalize(small(), day, crops(), num_points=64), run_dir=tmp_path, **GO)
    with pytest.raises(ValueError, match="no averaged weights"):
        plain.teacher_weights()


@pytest.mark.parametrize("wrong", [dict(augment="advstyl"), dict(ema=1.0)])
def test_wrong_options_of_generalize(wrong, day):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Generalize(small(), day, crops(), **wrong)


# ---- several targets

def test_adapt_each_starts_each_from_the_same_weights(day, night, tmp_path):
    segmenter = small()
    start = {n: t.clone() for n, t in segmenter.state_dict().items()}
    backbone = [p.data_ptr() for p in segmenter.backbone.parameters()]
    go = GO | dict(iterations=2)
    made = adapt_each(segmenter, dict(first=night, second=night), lambda s, target: adapts(s, day, target), tmp_path,
        **go)
    assert all(torch.equal(start[n], t) for n, t in segmenter.state_dict().items()) and backbone == [p.data_ptr()
        for p in segmenter.backbone.parameters()]
    a, b = ({n: t.clone() for n, t in segmenter.load_adapter(folder).trained_state().items()}
        for folder in made.values())
    # the same target twice: nothing of the first in the second
    assert all(torch.equal(a[n], b[n]) for n in a) and not torch.equal(a["adapter.scale"], start["adapter.scale"])
    segmenter.load_state_dict(start)
    # finished: nothing is trained, the same comes out
    again = adapt_each(segmenter, dict(first=night), lambda s, target: adapts(s, day, target), tmp_path, **go)
    assert all(torch.equal(t, a[n]) for n, t in segmenter.load_adapter(again["first"]).trained_state().items())


def test_adapt_each_gives_the_start_back_after_an_error(day, night, tmp_path):
    segmenter = small()
    scale = segmenter.adapter.scale.item()
    with pytest.raises(Collapse):
        adapt_each(segmenter, dict(one=night), lambda s, target: adapts(s, day, target, tau=1.1, patience=3), tmp_path,
            **GO)
    assert segmenter.adapter.scale.item() == scale


def test_the_stop_button_leaves_one_line_in_a_notebook(capsys):
    from IPython.core.interactiveshell import InteractiveShell
    line = "stopped by SIGINT after iteration 3 of 9; call fit again to go on"
    InteractiveShell().run_cell(f"from reinpp.training.run_folder import Stopped\nraise Stopped({line!r})")
    assert "".join(capsys.readouterr()).strip().splitlines() == [line]


FAILS = """
import multiprocessing, os, signal, sys, time
from reinpp import Generalize, fit, open_dataset
from reinpp.models.segmenter import tiny_segmenter

made = Generalize(tiny_segmenter(), open_dataset("scenes", "train", count=4), num_points=64)


def fails(iteration):
    if sys.argv[1] == "a step fails": raise ValueError("a step fails")
    os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)


made.after_step = fails
try:
    fit(made, 40, 2, run_dir=sys.argv[2], workers=2, device="cpu", progress="none")
except (ValueError, RuntimeError) as error:
    kept = error  # as a notebook and the interpreter itself do
    print(error)
"""


@pytest.mark.parametrize("what", ["a step fails", "a process that loads samples died"])
def test_a_kept_error_does_not_hold_up_the_exit(what, tmp_path):
    "The loader's processes are deaf to signals: they must have ended before the main one waits for them."
    command = [sys.executable, "-c", FAILS, what, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0 and what in done.stdout, done.stderr[-2000:]
