"""Rein-A: one test for each way to ruin it silently. Each states the trap, and fails when the trap is put back."""

import copy

import pytest
import torch

import reinpp.adaptation.rein_a as module
from reinpp.adaptation.masks import pad, unpack
from reinpp.adaptation.proposals import ProposalStore
from reinpp.adaptation.rein_a import (
    Adaptation,
    Collapse,
    CollapseGuard,
    ReinA,
    agreement,
    pseudo_label,
)
from reinpp.adaptation.stm import STM, query_targets, stm_label
from reinpp.data.catalog import open_dataset
from reinpp.data.datasets import Dataset
from reinpp.data.sampling import fold
from reinpp.data.transforms import TrainTransform, hide_blocks, mix_images, random_block_mask
from reinpp.files import BadFile
from reinpp.models.losses import mask_classification_loss, paired_loss, targets_from_labels
from reinpp.models.mask2former import HeadOutput
from reinpp.models.segmenter import create_segmenter
from reinpp.training.ema import run_teacher, start_teacher

HEAD = dict(hidden_dim=32, encoder_layers=1, decoder_layers=2, encoder_ffn=32, decoder_ffn=32, num_heads=4)


def fresh(adapter="rein_g"):
    torch.manual_seed(0)
    options = dict(num_tokens=10, rank=2) if adapter == "rein_g" else {}
    return create_segmenter("tiny", adapter, image_size=64, pretrained=False, adapter_args=options, head_args=HEAD)


@pytest.fixture(scope="module")
def data():
    source, target = open_dataset("scenes", "train", count=6), open_dataset("scenes", "night/train", count=5,
        labels=False)
    return source, target, [ProposalStore(dataset=d, engine="instances", reduction=2) for d in (source, target)]


def objective(data, stm=True, adapter="rein_g", **options):
    source, target, stores = data
    segmenter = fresh(adapter)
    stm = STM.like(segmenter, decoder_layers=1) if stm else None
    transform = TrainTransform(crop=64, base=64, scales=(8, 12, 16), min_class_pixels=12)
    settings = dict(tau=0.2, ema=0.9, mask_block=16, limit=20, pool=60, num_points=64) | options
    return ReinA(segmenter, source, target, transform, *stores, stm=stm, settings=Adaptation(**settings))


def batch_of(objective, first=0, size=2, seed=0):
    samples = []
    for key in range(first, first + size):
        torch.manual_seed(fold(seed, key))
        samples.append(objective.sample(key, seed))
    return torch.utils.data.default_collate(samples)


def optimizer_of(objective, lr=1e-2):
    return torch.optim.AdamW([p for _, p in objective.named_trainables()], lr)


def train(objective, steps, optimizer=None, first=0):
    optimizer = optimizer or optimizer_of(objective)
    logs = []
    for iteration in range(first, first + steps):
        batch = batch_of(objective, 2 * iteration)
        logs.append({k: float(v) for k, v in objective.step(batch, iteration).items()})
        optimizer.step()
        optimizer.zero_grad()
        objective.after_step(iteration)
    return logs


# ---- the scores are no logits

def test_a_sure_teacher_gets_weight():
    "Trap: softmax over the scores. Its top is 0.131 for a perfect one-hot, q is 0 and all target weights are 0."
    scores = torch.zeros(1, 19, 8, 8)
    scores[:, 3] = 1
    inside = torch.ones(1, 32, 32, dtype=torch.bool)
    pseudo = pseudo_label(scores, inside, tau=0.968)
    assert pseudo.q.item() == 1 and (pseudo.weight == 1).all()
    trapped = pseudo_label(scores.softmax(1), inside, tau=0.968)
    assert trapped.q.item() == 0 and not trapped.weight.any()  # what the trap does


def test_mix_loss_has_no_floor(data, monkeypatch):
    "Trap: cross_entropy on the scores has a floor of 2.03. Perfect predictions must cost nothing, in the step itself."
    seen = {}
    real = module.normalized_score_loss
    monkeypatch.setattr(module, "normalized_score_loss", lambda s, y, w: seen.update(scores=s, labels=y, weights=w)
        or real(s, y, w))
    train(objective(data, stm=False), 1)
    assert (seen["scores"] >= 0).all() and seen["scores"].requires_grad
    perfect = torch.nn.functional.one_hot(seen["labels"].clamp(max=18), 19).permute(0, 3, 1, 2).float()
    assert real(perfect, seen["labels"], seen["weights"]) < 1e-4
    assert torch.nn.functional.cross_entropy(perfect, seen["labels"].clamp(max=18)) > 2.0


def test_pixel_weighting_and_margins():
    scores = torch.rand(2, 19, 8, 8) ** 8
    inside = torch.ones(2, 32, 32, dtype=torch.bool)
    inside[:, 20:] = False
    by_image, by_pixel = pseudo_label(scores, inside, 0.4), pseudo_label(scores, inside, 0.4, "pixel", margins=(4, 16))
    assert torch.equal(by_image.q, by_pixel.q) and 0 < by_image.q[0] < 1
    assert torch.equal(by_image.weight, by_image.q[:, None, None].expand(2, 32, 32) * inside)
    sure = (by_pixel.top >= 0.4) & inside
    assert torch.equal(by_pixel.weight[:, 4:16], sure[:, 4:16].float()) and not by_pixel.weight[:,
        :4].any() and not by_pixel.weight[:, 16:].any()


def test_padding_has_no_weight_and_no_say_in_q():
    "Trap: padding counted in q, or learnt from."
    scores = torch.full((1, 19, 8, 8), 0.5)
    scores[:, 7, :, :4] = 1e3  # sure on the left; the right is padding
    inside = torch.zeros(1, 32, 32, dtype=torch.bool)
    inside[..., :12] = True
    pseudo = pseudo_label(scores, inside, 0.9)
    assert pseudo.q.item() == 1 and (pseudo.weight[..., :12] == 1).all() and not pseudo.weight[..., 12:].any()
    empty = pseudo_label(scores, torch.zeros_like(inside), 0.9)
    assert empty.q.item() == 0 and not empty.weight.any()
    scores = torch.zeros(2, 19, 4, 4)
    scores[:, 3] = 0.7
    scores[0, 5, :2] = 0.5
    valid = torch.zeros(2, 4, 4, dtype=torch.bool)
    valid[0, 1:] = True
    assert pseudo_label(scores, torch.ones_like(valid), 0.9).q.tolist() == [0.5, 1.0]
    assert torch.allclose(pseudo_label(scores, valid, 0.9).q, torch.tensor([2 / 3, 0.0]))


def test_padding_of_the_target_changes_no_loss(data):
    "Whatever the teacher thinks of the padding, L_mask and the pseudo weights do not see it."
    r = objective(data, stm=False)
    batch = batch_of(r)
    batch["target_inside"][:, 32:] = False
    seen = {}
    real = module.paired_loss

    def twice(student, p_t, m_t, valid):
        changed = m_t.clone()
        changed[..., 8:, :] = torch.randn_like(changed[..., 8:, :]) * 5
        seen["a"], seen["b"] = real(student, p_t, m_t, valid)["total"].item(), real(student, p_t, changed,
            valid)["total"].item()
        return real(student, p_t, m_t, valid)

    module.paired_loss = twice
    try:
        r.step(batch, 0)
    finally:
        module.paired_loss = real
    assert seen["a"] == pytest.approx(seen["b"], abs=1e-5)


# ---- the teacher

def test_teacher_covers_every_trained_tensor_and_no_other(data):
    """Trap: an EMA over modules or weight matrices forgets the scalar `scale`.

    An EMA over everything copies the frozen backbone."""
    r = objective(data)
    trained = {name for name, p in r.segmenter.named_parameters() if p.requires_grad}
    assert r.teacher.keys() == trained and "adapter.scale" in trained and r.teacher["adapter.scale"].numel() == 1
    assert not any(name.startswith(("backbone", "stm")) for name in r.teacher)
    before = r.teacher["adapter.scale"].clone()
    train(r, 2)
    assert r.teacher["adapter.scale"] != before
    storages = {p.data_ptr() for p in r.segmenter.parameters()}
    assert not storages & {t.data_ptr() for t in r.teacher.values()}  # copies, not views


def test_full_fine_tuning_has_its_own_backbone(data):
    r = objective(data, adapter="full")
    assert any(name.startswith("backbone") for name in r.teacher)
    before = {name: t.clone() for name, t in r.teacher.items() if name.startswith("backbone.blocks.0")}
    train(r, 1)
    assert all(not torch.equal(r.teacher[name], t) for name, t in before.items() if "weight" in name)


def test_teacher_equals_a_float64_average_after_50_steps(data):
    r = objective(data, stm=False, use_mask=False, ema=0.97)
    reference = {name: p.detach().double().clone() for name, p in r.segmenter.named_parameters() if p.requires_grad}
    optimizer = optimizer_of(r)
    generator = torch.Generator().manual_seed(0)
    for iteration in range(50):
        if iteration in (0, 25):
            train(r, 1, optimizer, iteration)  # a real step now and then
        else:
            with torch.no_grad():
                for p in (p for _, p in r.named_trainables()):
                    p.add_(0.05 * torch.randn(p.shape, generator=generator))
            r.after_step(iteration)
        for name, p in r.segmenter.named_parameters():
            if p.requires_grad:
                reference[name] = 0.97 * reference[name] + 0.03 * p.detach().double()
    for name, value in r.teacher.items():
        assert torch.allclose(value.double(), reference[name], rtol=1e-5, atol=1e-6), name


def test_averaging_starts_at_once_unless_asked_otherwise(data):
    "Trap: the ramp min(1 - 1/(t+1), ema) makes the teacher equal to the student after the first step."
    for ramp in (False, True):
        r = objective(data, stm=False, ema=0.999, ema_warmup=ramp)
        start = r.teacher["head.decoder.class_head.weight"].clone()
        train(r, 1)
        now, student = r.teacher["head.decoder.class_head.weight"], r.segmenter.head.decoder.class_head.weight
        assert torch.allclose(now, student) == ramp
        if not ramp:
            assert torch.allclose(now, 0.999 * start + 0.001 * student, atol=1e-7)


def test_frozen_backbone_is_neither_copied_nor_changed(data):
    r = objective(data)
    before = {name: t.clone() for name, t in r.segmenter.backbone.state_dict().items()}
    pointers = [p.data_ptr() for p in r.segmenter.backbone.parameters()]
    train(r, 3)
    assert all(torch.equal(t, before[name]) for name, t in r.segmenter.backbone.state_dict().items())
    assert pointers == [p.data_ptr() for p in r.segmenter.backbone.parameters()]
    assert all(p.grad is None for p in r.segmenter.backbone.parameters())


def test_teacher_runs_its_own_weights_in_eval_mode_without_gradient(data):
    segmenter = fresh().train()
    teacher = start_teacher(segmenter)
    images = torch.rand(3, 3, 64, 64)
    with torch.no_grad():
        expected = segmenter(images)
        for p in segmenter.parameters():
            if p.requires_grad:
                p.add_(0.05 * torch.randn_like(p))
    modes = []
    hook = segmenter.head.register_forward_pre_hook(lambda m, _: modes.append(m.training))
    features, out = run_teacher(segmenter, teacher, images, 2)
    hook.remove()
    assert torch.allclose(out.mask_logits[-1], expected.mask_logits[-1][:2], atol=1e-5) and len(features[0]) == 3
    assert modes == [False] and segmenter.training and not segmenter.backbone.training
    assert not out.mask_logits[-1].requires_grad and not features[0].requires_grad
    second = fresh()  # a second model with the teacher's weights
    with torch.no_grad():
        for name, p in second.named_parameters():
            if name in teacher:
                p.copy_(teacher[name])
    assert torch.allclose(second(images).mask_logits[-1][:2], out.mask_logits[-1], atol=1e-5)


# ---- pairing

def test_mask_loss_pairs_by_index(data, monkeypatch):
    """Trap: shuffled queries.

    If the step matched, sorted or shuffled queries, the teacher's would not be at the student's places."""
    r = objective(data, stm=False)
    with torch.no_grad():
        r.segmenter.adapter.merge.weight.normal_()  # untrained queries are almost equal: set them apart
        r.segmenter.head.decoder.class_head.weight.normal_()
    r.teacher = start_teacher(r.segmenter)
    seen = {}
    real = module.paired_loss
    monkeypatch.setattr(module, "paired_loss", lambda *a: seen.update(args=a) or real(*a))
    monkeypatch.setattr(module, "hide_blocks", lambda images, *_: images)  # the student sees what the teacher sees
    r.step(batch_of(r), 0)
    student, p_t, m_t, _ = seen["args"]
    assert torch.allclose(student.class_logits[-1], p_t, atol=1e-3) and torch.allclose(student.mask_logits[-1], m_t,
        atol=1e-2)
    assert not torch.allclose(p_t, p_t.roll(1, 1), atol=1e-2)


def test_shuffled_queries_change_the_mask_loss():
    torch.manual_seed(0)
    classes, masks = torch.randn(1, 6, 4), torch.randn(1, 6, 8, 8) * 3
    classes[..., -1] -= 3
    student, order = HeadOutput([classes], [masks], None), torch.tensor([1, 2, 3, 4, 5, 0])
    assert paired_loss(student, classes, masks)["total"] + 1 < paired_loss(student, classes[:, order],
        masks[:, order])["total"]


def test_teacher_and_student_queries_are_the_same_tokens():
    "Straight after the start teacher and student agree query by query on the same view."
    segmenter = fresh().eval()
    images = torch.rand(2, 3, 64, 64)
    _, teacher = run_teacher(segmenter, start_teacher(segmenter), images)
    student = segmenter(images)
    assert torch.allclose(teacher.class_logits[-1], student.class_logits[-1],
        atol=1e-5) and torch.allclose(teacher.mask_logits[-1], student.mask_logits[-1], atol=1e-4)


# ---- what is read, what is mixed

def test_target_labels_are_never_read(data):
    """Trap: a target that happens to have labels.

    It is refused, and a reader whose labels must not be touched is not touched."""
    source, _, stores = data
    with pytest.raises(ValueError, match="labels=False"):
        ReinA(fresh(), source, open_dataset("scenes", "night/train", count=5), TrainTransform(crop=64, base=64))
    target = open_dataset("scenes", "night/train", count=5, labels=False)

    def forbidden(*_):
        raise AssertionError("a target label was read")

    target.read_label = target.reader.label = forbidden
    r = objective((source, target, stores))
    train(r, 2)
    r.views(batch_of(r))
    assert not any("target_label" in key for key in batch_of(r))


def test_255_is_no_class_in_class_mix(data):
    "Trap: 255 drawn as a class pastes the unlabelled parts, and padding, of the source."
    source, label = torch.zeros(3, 64, 64), torch.full((64, 64), 255)
    label[10:20, 10:40] = 5
    for seed in range(8):
        torch.manual_seed(seed)
        _, pasted = mix_images(source, label, torch.ones(3, 64, 64))
        assert torch.equal(pasted, label == 5)  # one class: half of one, rounded up, is one


def test_mixed_labels_and_weights(data, monkeypatch):
    "Source pixels: ground truth with weight 1. Target pixels: the teacher's label with weight q, 0 in padding."
    r = objective(data, stm=False)
    batch = batch_of(r)
    batch["target_inside"][:, 48:] = False
    seen = {}
    real, real_pseudo = module.normalized_score_loss, module.pseudo_label
    monkeypatch.setattr(module, "normalized_score_loss", lambda s, y, w: seen.update(y=y, w=w) or real(s, y, w))
    monkeypatch.setattr(module, "pseudo_label", lambda *a: seen.update(pseudo=real_pseudo(*a)) or seen["pseudo"])
    r.step(batch, 0)
    pasted, pseudo = batch["pasted"], seen["pseudo"]
    assert pasted.any() and not pasted.all()
    assert torch.equal(seen["y"][pasted], batch["source_label"][pasted]) and (seen["w"][pasted] == 1).all()
    assert torch.equal(seen["y"][~pasted], pseudo.label[~pasted])
    expected = pseudo.q[:, None, None] * batch["target_inside"]
    assert torch.equal(seen["w"][~pasted], expected[~pasted])


def test_mixed_proposals_take_no_cell_from_both(data, monkeypatch):
    r = objective(data)
    seen = []
    real = module.compose
    monkeypatch.setattr(module, "compose", lambda s, t, p: seen.append((s, t, p, real(s, t, p))) or seen[-1][-1])
    train(r, 2)
    for source, target, _, mixed in seen:
        count = source.shape[1]
        assert mixed.shape[1] == count + target.shape[1]
        from_source, from_target = mixed[:, :count].any(1), mixed[:, count:].any(1)
        assert from_source.any() and from_target.any() and not (from_source & from_target).any()


def test_masked_view_hides_with_the_mean(data):
    segmenter = fresh()
    torch.manual_seed(0)
    images = torch.rand(2, 3, 128, 128)
    drawn = torch.stack([random_block_mask(128, 128, 16, 0.7) for _ in images])
    masked = hide_blocks(images, drawn, segmenter.mean)
    hidden = (masked == segmenter.mean).all(1)
    assert torch.equal(masked[~hidden[:, None].expand_as(masked)],
        images[~hidden[:, None].expand_as(images)]) and 0.5 < hidden.float().mean() < 0.9
    blocks = hidden.float().reshape(2, 8, 16, 8, 16).mean((2, 4))
    assert ((blocks == 0) | (blocks == 1)).all() and not torch.equal(hidden[0], hidden[1])


# ---- STM

def test_stm_reads_the_teachers_features_without_gradient(data, monkeypatch):
    """In all three branches.

    So STM's losses on source and mix move STM only, and what STM teaches moves the student only."""
    r = objective(data)
    with torch.no_grad():  # student and teacher differ
        for p in r.segmenter.head.pixel_decoder.parameters():
            p.add_(0.1)
        r.segmenter.adapter.scale.add_(0.5)
    calls = []
    real = r.stm.forward
    monkeypatch.setattr(r.stm, "forward", lambda f, m, k: calls.append((f, m, k)) or real(f, m, k))
    batch = batch_of(r)
    r.step(batch, 0)
    assert len(calls) == 3  # target, source, mix
    with torch.no_grad():
        for (features, _, _), name in zip(calls, ("target", "source")):
            expected, _ = run_teacher(r.segmenter, r.teacher, batch[name])
            assert all(not f.requires_grad and torch.allclose(f, e, atol=1e-4) for f, e in zip(features, expected))
    assert all(not f.requires_grad for f in calls[2][0])


def test_gradients_go_where_they_should(data):
    full = objective(data, stm_least=0.0)  # STM teaches everywhere
    batch = batch_of(full)
    terms = full.step(batch, 0)
    assert terms["stm_mask"] > 0 and all(p.grad is not None for _, p in full.named_trainables())
    silent = objective(data, stm_least=2.0)  # STM teaches nowhere
    terms = silent.step(batch, 0)
    assert terms["stm_mask"] == 0
    pairs = list(zip(full.named_trainables(), silent.named_trainables()))
    same = [torch.allclose(a.grad, b.grad, atol=1e-6) for (name, a), (_, b) in pairs if name.startswith("stm.")]
    assert all(same)  # L^stm_mask is no business of STM's
    assert not all(torch.allclose(a.grad, b.grad, atol=1e-6) for (name, a), (_, b) in pairs
        if not name.startswith("stm."))


def test_stm_label_leaves_the_unsure_out():
    classes = torch.full((1, 2, 6), -9.0)
    classes[0, 0, 2] = classes[0, 1, 4] = 9
    masks = torch.full((1, 2, 8, 8), -9.0)
    masks[0, 0, :4], masks[0, 1, 4:] = 9, 9
    masks[0, :, :, 6:] = 9  # both claim the right: half each
    out = HeadOutput([classes], [masks], torch.zeros(1, 2, dtype=torch.bool))
    inside = torch.ones(1, 32, 32, dtype=torch.bool)
    inside[:, :4] = False
    label, valid = stm_label(out, inside, 0.6)
    assert not valid[:, :4].any() and not valid[..., 28:].any()
    assert valid[:, 4:14, :20].all() and (label[:, 4:14, :20] == 2).all()
    assert valid[:, 18:, :20].all() and (label[:, 18:, :20] == 4).all()


def test_stm_that_knows_nothing_teaches_nothing():
    "Trap: an image without targets would push every query to no-object."
    torch.manual_seed(0)
    student = HeadOutput([torch.randn(2, 5, 4, requires_grad=True)], [torch.randn(2, 5, 8, 8, requires_grad=True)],
        None)
    label, valid = torch.full((2, 32, 32), 2), torch.zeros(2, 32, 32, dtype=torch.bool)
    assert student.loss(label, 3, 64, valid)["total"].item() == 0
    valid[1, :16] = True
    student.loss(label, 3, 64, valid)["total"].backward()
    assert not student.class_logits[0].grad[0].any() and student.class_logits[0].grad[1].any()


def test_the_step_leaves_out_what_stm_is_unsure_of(data, monkeypatch):
    "Trap: 255 as background in eq. 19."
    seen = []
    real = module.mask_classification_loss
    monkeypatch.setattr(module, "mask_classification_loss", lambda *a: seen.append(a[1]) or real(*a))
    r = objective(data, stm_least=0.06)
    taught = r.teach(batch_of(r), 0)
    r.step(batch_of(r), 0)
    for target, label in zip(seen[0], taught.c_stm):
        assert torch.equal(target.valid, label != 255) and 0 < target.valid.float().mean() < 1


def test_queries_of_stm_one_by_one(data):
    "The option `stm_queries`: a target for each query with a class; padding and queries without one are none."
    classes, masks = torch.full((2, 3, 6), -9.0), torch.full((2, 3, 8, 8), -9.0)
    classes[0, 0, 2] = classes[0, 1, 2] = classes[0, 2, 5] = classes[1, :, 5] = 9
    masks[0, 0, :4], masks[0, 1, 4:], masks[0, 2] = 9, 9, 9
    padding = torch.tensor([[False, False, False], [False, False, True]])
    inside = torch.ones(2, 32, 32, dtype=torch.bool)
    one, other = query_targets(HeadOutput([classes], [masks], padding), inside)
    assert one.classes.tolist() == [2, 2] and torch.equal(one.masks[0], masks[0, 0] > 0) and one.valid.all()
    assert len(other.classes) == 0 and not other.valid.any()
    (log,) = train(objective(data, stm_queries=True), 1)
    assert log["stm_mask"] > 0


def test_stm_warm_up(data):
    r = objective(data, stm_least=0.0, stm_warmup=1)
    logs = train(r, 2)
    assert "stm_mask" not in logs[0] and logs[1]["stm_mask"] > 0 and logs[0]["stm_src"] > 0


def test_proposals_travel_as_bits(data):
    r = objective(data)
    sample = batch_of(r, size=1)
    assert sample["source_masks"].shape == (1, 60, 16, 2) and sample["source_masks"].dtype == torch.uint8
    masks = unpack(sample["source_masks"], 16)
    kept, padding = pad(masks, 20)
    assert masks.any() and kept.shape == (1, 20, 16, 16)
    few = objective(data, pool=3)
    assert unpack(batch_of(few, size=1)["target_masks"], 16).flatten(2).any(-1).sum() == 3


def test_a_stand_in_brings_its_own_proposals(data):
    "Where a bad file is left out, another image takes its place, and the proposals must be that image's."
    class OneBad:
        def __init__(self, reader):
            self.reader, self.names = reader, reader.names
        def image(self, i):
            if i == 1:
                raise BadFile("image 1 is damaged")
            return self.reader.image(i)
        def label(self, i):
            return self.reader.label(i)

    class Asked:
        def __init__(self, store):
            self.store, self.numbers = store, []
        def __len__(self):
            return len(self.store)
        def __getitem__(self, i):
            self.numbers.append(i)
            return self.store[i]

    source, target, stores = data
    lenient = [Dataset(d.name, d.split, OneBad(d.reader), labels=d.labelled, on_error="skip") for d in (source, target)]
    asked = [Asked(store) for store in stores]
    rein_a = objective((*lenient, asked))
    rein_a.source_sampler.draw = lambda key, seed: (key, None)
    rein_a.target_sampler.draw = lambda key, seed: (key, None)
    with pytest.warns(UserWarning, match="image 1 is damaged"):
        for key in (0, 1):
            rein_a.sample(key, 0)
    assert [store.numbers for store in asked] == [[0, 2], [0, 2]], "image 2 stands in for image 1"


def test_proposals_that_do_not_fit_are_refused(data):
    source, target, stores = data
    segmenter, transform = fresh(), TrainTransform(crop=64, base=64)
    stm = STM.like(segmenter)
    with pytest.raises(ValueError, match="target_proposals"):
        ReinA(segmenter, source, target, transform, stores[0], None, stm=stm)
    with pytest.raises(ValueError, match="5 images, the source has 6"):
        ReinA(segmenter, source, target, transform, stores[1], stores[1], stm=stm)
    other = ProposalStore(dataset=open_dataset("scenes", "train", count=6, size=(64, 128)), engine="instances",
        reduction=2)
    r = ReinA(segmenter, source, target, transform, other, stores[1], stm=stm)
    with pytest.raises(ValueError, match="make them again"):
        r.sample(0, 0)
    with pytest.raises(ValueError, match="weighting"):
        Adaptation(weighting="area")


@pytest.mark.parametrize("name, value", [
    ("tau", "0.9"), ("tau", None), ("tau", float("nan")), ("ema", -1), ("mask_block", 0), ("mask_block", 1.5),
    ("rcs", 1), ("limit", True), ("num_points", 1e3), ("margins", 3), ("margins", (1, 2, 3)), ("margins", (1, "2"))])
def test_settings_of_another_kind_are_refused(name, value):
    with pytest.raises(ValueError, match=f"{name}=") as told:
        Adaptation(**{name: value})
    assert "\n" not in str(told.value)


# ---- the step

TERMS = {"src", "mix", "mask", "stm_src", "stm_mix", "stm_mask"}


@pytest.mark.parametrize("options, missing", [
    (dict(), set()), (dict(use_mix=False), {"mix", "stm_mix"}), (dict(use_mask=False), {"mask", "stm_mask"}),
    (dict(stm=False), {"stm_src", "stm_mix", "stm_mask"}),
    (dict(use_mix=False, use_mask=False, stm=False), TERMS - {"src"}),
])
def test_every_branch_can_be_switched_off(data, options, missing):
    (log,) = train(objective(data, **options), 1)
    watched = {"q", "above_tau", "largest_class"} | ({"agreement"} if options.get("use_mix", True) else set())
    assert {name for name in log if not name.startswith("share_")} == (TERMS - missing) | {"total"} | watched
    assert log["total"] == pytest.approx(sum(log[name] for name in TERMS - missing), rel=1e-5)


def test_gradient_per_branch_is_the_gradient_of_the_total(data):
    """Backward per branch, with alpha and beta, adds up to eq. 20.

    Doubling alpha or beta adds exactly that branch's gradient once more."""
    def gradients(**options):
        r = objective(data, stm=False, **options)
        batch = batch_of(r)
        terms = r.step(batch, 0)
        return terms, torch.cat([p.grad.flatten() for _, p in r.named_trainables()])
    terms, base = gradients()
    more_terms, more = gradients(alpha=3.0)
    _, none = gradients(alpha=0.0)
    assert torch.allclose(more - base, 2 * (base - none), atol=1e-4) and (base - none).abs().max() > 1e-4
    assert more_terms["total"] == pytest.approx((terms["total"] + 2 * terms["mix"]).item(), rel=1e-5)


def test_source_loss_is_plain_supervision(data):
    "The source branch is what `Generalize` would do."
    r = objective(data, use_mix=False, use_mask=False, stm=False)
    batch = batch_of(r)
    terms = r.step(batch, 0)
    targets = targets_from_labels(batch["source_label"], 19, batch["source_inside"])
    expected = mask_classification_loss(r.segmenter(batch["source"]), targets, 64, r.generators(batch, 0))["total"]
    assert terms["src"] == pytest.approx(expected.item(), rel=1e-4)


def test_samples_are_a_function_of_key_and_seed(data):
    r, other = objective(data), objective(data)
    a, b, c = batch_of(r, 3), batch_of(other, 3), batch_of(r, 3, seed=1)
    assert all(torch.equal(a[k], b[k]) for k in a) and not torch.equal(a["target"], c["target"])
    keys = [r.target_sampler.draw(k, fold(0, 1))[0] for k in range(5)]
    assert sorted(keys) == [0, 1, 2, 3, 4]  # every target image once an epoch


def test_the_teacher_sees_clean_target_crops(data):
    r = objective(data)
    assert r.transform.photometric and not r.target_transform.photometric


def test_steps_repeat_and_resume_bit_for_bit(data):
    straight, cut = objective(data), objective(data)
    train(straight, 4)
    optimizer = optimizer_of(cut)
    train(cut, 2, optimizer)
    resumed = objective(data)
    with torch.no_grad():
        for _, p in resumed.named_trainables():
            p.add_(1.0)  # nothing may survive from before
    resumed.load_state_dict(copy.deepcopy(cut.state_dict()))
    again = optimizer_of(resumed)
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(resumed, 2, again, 2)
    a, b = straight.state_dict(), resumed.state_dict()
    assert all(torch.equal(a[part][name], b[part][name]) for part in ("trained", "teacher")
        for name in a[part]) and a["guard"] == b["guard"]


def test_a_checkpoint_of_another_configuration_is_refused(data):
    with pytest.raises(ValueError, match="does not fit.*stm"):
        objective(data).load_state_dict(objective(data, stm=False).state_dict())


def test_names_of_trainables(data):
    names = [name for name, _ in objective(data).named_trainables()]
    assert len(names) == len(set(names)) and {"adapter.scale", "stm.what.weight"} <= set(names)
    assert not any(name.startswith("backbone") for name in names)  # `fit` gives `backbone.*` its own learning rate
    assert any(name.startswith("backbone") for name, _ in objective(data, adapter="full").named_trainables())


def test_bf16_autocast_stays_finite(data):
    r = objective(data)
    r.autocast = lambda: torch.autocast("cpu", torch.bfloat16)
    (log,) = train(r, 1)
    assert all(v == v and abs(v) != float("inf") for v in log.values())
    assert all(p.dtype == p.grad.dtype == torch.float32 for p in (q for _, q in r.named_trainables())
        if p.grad is not None)


# ---- what is watched

def test_agreement_is_counted_on_the_targets_pixels_only():
    scores = torch.zeros(1, 3, 8, 8)
    scores[:, 1, :4], scores[:, 2, 4:] = 1, 1
    label = torch.ones(1, 32, 32, dtype=torch.int64)
    where = torch.zeros(1, 32, 32, dtype=torch.bool)
    assert agreement(scores, label, where) == 0  # nothing to see
    where[:, 8:24] = True  # eight rows of each half
    assert agreement(scores, label, where) == 0.5
    label[:, :8] = 2  # outside: makes no difference
    assert agreement(scores, label, where) == 0.5


def test_pseudo_labels_are_counted_by_class(data, monkeypatch):
    r = objective(data, stm=False)
    batch = batch_of(r)
    batch["target_inside"][:, 40:] = False
    seen = {}
    real = module.pseudo_label
    monkeypatch.setattr(module, "pseudo_label", lambda *a: seen.update(pseudo=real(*a)) or seen["pseudo"])
    terms = r.step(batch, 0)
    shares = torch.stack([terms[f"share_{name.replace(' ', '_')}"] for name in r.source.classes])
    counts = torch.bincount(seen["pseudo"].label[batch["target_inside"]], minlength=19)
    assert torch.allclose(shares, counts / counts.sum(), atol=1e-6) and shares.max() == terms["largest_class"]
    assert 0 <= terms["agreement"] <= 1


# ---- options beyond the paper

def first_step(data, **options):
    r = objective(data, stm=False, **options)
    torch.manual_seed(11)
    with torch.no_grad():
        r.segmenter.adapter.merge.weight.normal_()  # so that masks are neither all on nor all off
        r.segmenter.head.decoder.class_head.weight.normal_()
    r.teacher = start_teacher(r.segmenter)
    batch = batch_of(r)
    return r, batch, r.step(batch, 0)


def test_mirrored_teacher(data, monkeypatch):
    seen = []
    real = module.pseudo_label
    monkeypatch.setattr(module, "pseudo_label", lambda *a: seen.append(a[0]) or real(*a))
    r, batch, _ = first_step(data, teacher_flip=True)
    with torch.no_grad():
        one, other = (run_teacher(r.segmenter, r.teacher, x)[1].scores()
                      for x in (batch["target"], batch["target"].flip(-1)))
    assert torch.allclose(seen[0], (one + other.flip(-1)) / 2, atol=1e-5) and not torch.allclose(seen[0], one,
        atol=1e-4)


def test_soft_masks_have_the_teachers_probabilities(data, monkeypatch):
    "Trap: noise that shifts the masks. Over many draws the share of hits is the sigmoid."
    seen = []
    real = module.ReinA._mask_loss
    monkeypatch.setattr(module.ReinA, "_mask_loss", lambda self, *a: seen.append(a[2]) or real(self, *a))
    r, batch, _ = first_step(data, soft_masks=True)
    taught, logits = r.teach(batch, 0), torch.tensor([-3.0, -1.0, 0.0, 0.5, 2.0]).view(1, 1, 5, 1)
    wide = logits.expand(*taught.answer.mask_logits[-1].shape[:2], 5, 4000)
    monkeypatch.setattr(module.ReinA, "_mask_loss", lambda self, *a: seen.append(a[2]) or a[2].sum() * 0)
    fake = HeadOutput(taught.answer.class_logits, [wide])
    monkeypatch.setattr(module.ReinA, "learn", lambda self, **losses: {})
    r.mask_branch(batch, taught._replace(answer=fake), 0)
    hits = (seen[-1] > 0).float().mean((0, 1, 3))
    assert torch.allclose(hits, logits.flatten().sigmoid(), atol=0.02)


def test_q_weighs_the_mask_branch_image_by_image(data, monkeypatch):
    seen = {}
    real = module.ReinA._mask_loss
    monkeypatch.setattr(module.ReinA, "_mask_loss", lambda self, *a: seen.update(args=a) or real(self, *a))
    r, batch, terms = first_step(data, q_on_mask=True)
    output, p_t, m_t, inside, q = seen["args"]
    each = [paired_loss(output[i:i + 1], p_t[i:i + 1], m_t[i:i + 1], inside[i:i + 1])["total"] for i in range(2)]
    assert terms["mask"] == pytest.approx(((q[0] * each[0] + q[1] * each[1]) / 2).item(), rel=1e-4)
    assert r._mask_loss(output, p_t, m_t, inside, torch.zeros(2)).item() == 0


def test_a_head_that_labels_pixels_is_refused(data):
    source, target, _ = data
    segmenter = create_segmenter("tiny", "freeze", "semantic_fpn", image_size=64, pretrained=False)
    with pytest.raises(ValueError, match="semantic_fpn.*mask2former") as error:
        ReinA(segmenter, source, target, TrainTransform(crop=64, base=64))
    assert "\n" not in str(error.value)


# ---- the guard

@pytest.mark.parametrize(
"q, largest, text", [(0.0, 0.4, "lower tau"), (1.0, 0.4, "raise tau"), (0.3, 1.0, "single class")])
def test_guard_names_what_is_stuck(q, largest, text):
    guard = CollapseGuard(patience=20)
    for i in range(19):
        guard.check(i, dict(src=1.0), q, largest)
    guard.check(19, dict(src=1.0), 0.3, 0.4)  # a recovery starts the count again
    for i in range(19):
        guard.check(i, dict(src=1.0), q, largest)
    with pytest.raises(Collapse, match=text) as error:
        guard.check(40, dict(src=1.0), q, largest)
    assert "\n" not in str(error.value) and "iteration 40" in str(error.value)


def test_guard_in_the_step(data):
    r = objective(data, tau=1.1, patience=2)
    with pytest.raises(Collapse, match="q = 0"):
        train(r, 2)
    r = objective(data)
    with torch.no_grad():
        r.segmenter.head.decoder.class_head.weight.fill_(float("nan"))
    weights = r.segmenter.head.querys2feat.weight.clone()
    with pytest.raises(Collapse, match="src.*not finite"):
        train(r, 1)
    assert torch.equal(weights, r.segmenter.head.querys2feat.weight)  # before the optimiser's step


# ---- pictures and borrowed weights

def test_views_change_nothing(data):
    r = objective(data)
    before = copy.deepcopy(r.state_dict())
    views = r.views(batch_of(r))
    after = r.state_dict()
    assert all(torch.equal(before[part][name], after[part][name]) for part in ("trained", "teacher")
        for name in before[part])
    assert {"target", "pseudo", "mixed", "mixed_label", "masked", "stm"} <= views.keys() and all(v.device.type == "cpu"
        for v in views.values())
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    assert len(r.picture(batch_of(r)).axes) == 2 * 6
    assert len(objective(data, stm=False).picture(batch_of(r), rows=1).axes) == 5
    matplotlib.pyplot.close("all")


def test_borrowed_teacher_weights_are_given_back(data):
    r = objective(data)
    train(r, 1)
    before = copy.deepcopy(r.state_dict()["trained"])
    with pytest.raises(KeyError):
        with r.teacher_weights() as segmenter:
            assert all(torch.equal(dict(segmenter.named_parameters())[name], value) for name,
                value in r.teacher.items())
            raise KeyError
    assert all(torch.equal(before[name], value) for name, value in r.state_dict()["trained"].items())


def test_saved_adapter_knows_nothing_of_stm_and_teacher(data, tmp_path):
    r = objective(data)
    train(r, 1)
    r.segmenter.save_adapter(tmp_path)
    from safetensors import safe_open
    with safe_open(tmp_path / "adapter_model.safetensors", "pt") as file:
        assert set(file.keys()) == set(r.teacher)
