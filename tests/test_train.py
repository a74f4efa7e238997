"The loop: groups, schedule, checkpoints, errors."
import json

import pytest
import torch
from torch import nn

from reinpp.segmenter import create_segmenter
from reinpp.train import TrainingError, fit, learning_rate, parameter_groups


class Toy:
    "An objective of one linear layer, with a term that begins later and, if asked, a loss that explodes."

    def __init__(self, explode_at=None):
        torch.manual_seed(0)
        self.segmenter, self.explode_at, self.seen = nn.Linear(3, 1), explode_at, []

    def sample(self, key, seed): return dict(x=torch.randn(3), key=torch.tensor(key))

    def step(self, batch, iteration):
        self.seen += batch["key"].tolist()
        loss = self.segmenter(batch["x"]).square().mean() * (float("inf") if iteration == self.explode_at else 1)
        loss.backward()
        return dict(total=loss.detach()) | (dict(late=torch.tensor(1.0)) if iteration >= 3 else {})

    def after_step(self, iteration): pass
    def named_trainables(self): return self.segmenter.named_parameters()
    def state_dict(self): return {n: p.detach() for n, p in self.named_trainables()}
    def load_state_dict(self, state): self.segmenter.load_state_dict(state)


def test_every_sample_once_and_terms_may_begin_late(tmp_path):
    toy = Toy()
    fit(toy, iterations=6, batch_size=2, run_dir=tmp_path, log_every=5, progress="none")
    assert toy.seen == list(range(12))
    first, last = (json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines())
    assert first["iteration"] == 5 and first["late"] == 1.0 and last["iteration"] == 6


@pytest.mark.parametrize("workers", [0, 2])
def test_samples_do_not_depend_on_workers(workers, tmp_path):
    toy = Toy()
    fit(toy, iterations=4, batch_size=3, workers=workers, progress="none", lr=0.1)
    reference = Toy()
    fit(reference, iterations=4, batch_size=3, progress="none", lr=0.1)
    assert all(torch.equal(a, b) for a, b in zip(toy.state_dict().values(), reference.state_dict().values()))


def test_a_loss_that_is_not_finite_stops_and_leaves_the_checkpoint(tmp_path):
    with pytest.raises(TrainingError, match="iteration 4: total is not finite.*stays"):
        fit(Toy(explode_at=4), iterations=6, batch_size=1, run_dir=tmp_path, checkpoint_every=2, progress="none")
    assert torch.load(tmp_path / "checkpoint.pt", weights_only=True)["iteration"] == 4
    assert fit(Toy(), iterations=6, batch_size=1, run_dir=tmp_path, checkpoint_every=2, progress="none")["finished"]


def test_a_checkpoint_of_other_settings_is_refused(tmp_path):
    fit(Toy(), iterations=2, batch_size=1, run_dir=tmp_path, progress="none")
    with pytest.raises(ValueError, match="lr was 0.0001, now 0.001"): fit(Toy(), iterations=2, batch_size=1, lr=1e-3, run_dir=tmp_path, progress="none")


def test_a_finished_run_is_not_trained_again(tmp_path):
    fit(Toy(), iterations=3, batch_size=1, run_dir=tmp_path, progress="none")
    toy = Toy()
    record = fit(toy, iterations=3, batch_size=1, run_dir=tmp_path, progress="none")
    assert toy.seen == [] and record["finished"]


@pytest.mark.parametrize("wrong", [dict(iterations=0), dict(batch_size=0), dict(precision="half"), dict(progress="loud")])
def test_wrong_settings(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))): fit(Toy(), **dict(iterations=1, batch_size=1) | wrong)


def test_what_decays_and_what_does_not():
    head = dict(hidden_dim=32, encoder_layers=1, decoder_layers=1, encoder_ffn=32, decoder_ffn=32, num_heads=4)
    segmenter = create_segmenter("tiny", "full", image_size=64, pretrained=False, head_args=head | dict(num_queries=10))
    rein = create_segmenter("tiny", "rein_g", image_size=64, pretrained=False, adapter_args=dict(num_tokens=10, rank=4), head_args=head)
    for model in (segmenter, rein):
        names = {id(p): n for n, p in model.named_parameters()}
        decay = {names[id(p)]: (g["lr"], g["weight_decay"]) for g in parameter_groups(((n, p) for n, p in model.named_parameters() if p.requires_grad), 1e-4, 1e-5, 0.05) for p in g["params"]}
        assert len(decay) == sum(p.requires_grad for p in model.parameters())
        for module_name, module in model.named_modules():
            for n, p in module.named_parameters(recurse=False):
                name = f"{module_name}.{n}"
                if not p.requires_grad: continue
                rate, weight_decay = decay[name]
                assert rate == (1e-5 if name.startswith("backbone.") else 1e-4), name
                special = isinstance(module, (nn.LayerNorm, nn.GroupNorm)) or n in ("level_embed", "query_embed", "query_feat", "tokens_a", "tokens_b", "scale")
                assert weight_decay == (0.0 if special else 0.05), name


def test_schedule():
    assert learning_rate(0, 100) == 1 and learning_rate(50, 100) == pytest.approx(0.5 ** 0.9) and 0 < learning_rate(99, 100) < 0.02
    assert [learning_rate(i, 10**9, warmup=4) for i in range(4)] == pytest.approx([0.25, 0.5, 0.75, 1.0], abs=1e-6)
