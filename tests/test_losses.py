"""Losses: parity with `transformers`, corner cases, eq. 15, eq. 16, precision, several processes."""
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from reinpp.models.losses import (
    average_count,
    mask_classification_loss,
    match,
    normalize_scores,
    normalized_score_loss,
    paired_loss,
    point_sample,
    targets_from_labels,
    uncertain_points,
    uniform_points,
)
from reinpp.models.mask2former import HeadOutput
from reinpp.models.semantic_fpn import PixelOutput


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def blocks(batch=2, size=64, classes=(0, 2, 8, 10, 13)):
    "Labels of rectangles, with an ignored band."
    labels = torch.full((batch, size, size), 255)
    for i in range(batch):
        for k in classes[: len(classes) - i]:
            y, x = torch.randint(0, size * 3 // 4, (2,)).tolist()
            labels[i, y:y + size // 2, x:x + size // 3] = k
    labels[:, :4] = 255
    return labels


def predictions(number=3, batch=2, queries=12, size=16, grad=False):
    def make(*shape):
        return [torch.randn(shape).requires_grad_(grad) for _ in range(number)]
    return HeadOutput(make(batch, queries, 20), [m for m in make(batch, queries, size, size)])


def same_points(monkeypatch):
    """torch.rand returns one fixed pattern for its last two axes, so that two implementations draw equal points
    whatever their order."""
    pattern = torch.rand(4096, 3)

    def rand(*shape, device=None, **_):
        shape = tuple(shape[0]) if len(shape) == 1 else shape
        return pattern[: shape[-2], : shape[-1]].expand(shape).contiguous().to(device)
    monkeypatch.setattr(torch, "rand", rand)


# ---- parity

def their_loss(num_points):
    pytest.importorskip("transformers")
    from transformers import Mask2FormerConfig, SwinConfig
    from transformers.models.mask2former.modeling_mask2former import Mask2FormerLoss
    config = Mask2FormerConfig(backbone_config=SwinConfig(), num_labels=19, train_num_points=num_points,
        class_weight=2.0, mask_weight=5.0, dice_weight=5.0, no_object_weight=.1)
    return Mask2FormerLoss(config, {})


@pytest.mark.parametrize("queries", [12, 3])  # fewer queries than targets: some targets stay unmatched
@pytest.mark.parametrize("num_points", [256, 1000])
def test_parity_of_matching_and_loss(monkeypatch, num_points, queries):
    output, targets = predictions(queries=queries, grad=True), targets_from_labels(blocks(), 19)
    theirs = their_loss(num_points)
    same_points(monkeypatch)
    masks, classes = [t.masks.float() for t in targets], [t.classes for t in targets]

    matched, start = match(output, targets, num_points), 0
    for image, t in enumerate(targets):
        ours = matched[:, start:start + len(t.classes)]
        for i, (c, m) in enumerate(zip(output.class_logits, output.mask_logits)):
            query, target = theirs.matcher(m, c, masks, classes)[image]
            expected = torch.full((len(t.classes),), -1)
            expected[target] = query
            assert ours[i].equal(expected)
        start += len(t.classes)

    expected = [theirs(m, c, masks, classes) for c, m in zip(output.class_logits, output.mask_logits)]
    loss = mask_classification_loss(output, targets, num_points)
    for name, key, weight in (("class", "loss_cross_entropy", 2), ("mask", "loss_mask", 5), ("dice", "loss_dice", 5)):
        assert abs(loss[name] - weight * sum(e[key] for e in expected)) < 1e-4, name
    leaves = [*output.class_logits, *output.mask_logits]
    ours = torch.autograd.grad(loss["total"], leaves)
    total = sum(2 * e["loss_cross_entropy"] + 5 * e["loss_mask"] + 5 * e["loss_dice"] for e in expected)
    for a, b in zip(torch.autograd.grad(total, leaves), ours):
        assert (a - b).abs().max() < 1e-5


# ---- targets

def test_one_mask_per_class_and_255_is_background():
    labels = blocks()
    for label, target in zip(labels, targets_from_labels(labels, 19)):
        assert target.classes.tolist() == [k for k in label.unique().tolist() if k != 255]
        assert all(m.equal(label == k) for k, m in zip(target.classes, target.masks))
        assert not target.masks[:, label == 255].any()
    assert targets_from_labels(labels.to(torch.uint8), 19)[0].classes.dtype == torch.int64


def test_ignored_pixels_push_masks_down():
    label = torch.full((1, 32, 32), 255)
    label[:, 16:] = 4
    mask = torch.zeros(1, 1, 32, 32, requires_grad=True)
    mask_classification_loss(HeadOutput([torch.zeros(1, 1, 20)], [mask]), targets_from_labels(label, 19),
        2048)["total"].backward()
    assert mask.grad[0, 0, 17:].max() <= 0 and mask.grad[0, 0, :15].min() >= 0 and mask.grad[0, 0, :15].max() > 0


def test_labels_outside_the_classes_are_refused():
    with pytest.raises(ValueError, match=r"\[19\].*19 classes"):
        targets_from_labels(torch.full((1, 2, 2), 19), 19)
    with pytest.raises(ValueError, match="2 targets for a batch of 3"):
        mask_classification_loss(predictions(batch=3), targets_from_labels(blocks(2), 19), 64)


# ---- what is not valid

def halves(grad=True):
    """Above, STM (or whoever) says 'road'; below, nobody knows. Two queries: 'road' above, and 'car' below."""
    label, valid = torch.zeros(1, 64, 64, dtype=torch.int64), torch.zeros(1, 64, 64, dtype=torch.bool)
    label[:, 32:], valid[:, :32] = 13, True
    classes, masks = torch.full((1, 2, 20), -8.0), torch.full((1, 2, 16, 16), -8.0)
    classes[0, 0, 0] = classes[0, 1, 13] = 8
    masks[0, 0, :8] = masks[0, 1, 8:] = 8
    return label, valid, classes.requires_grad_(grad), masks.requires_grad_(grad)


def silent(classes, masks):
    "The same student, which says nothing of the lower half."
    classes, masks = classes.detach().clone(), masks.detach().clone()
    classes[0, 1], masks[0, 1] = -8, -8
    classes[0, 1, 19] = 8
    return HeadOutput([classes], [masks])


def test_who_names_the_unsure_half_pays_no_more_than_who_is_silent():
    "Trap: 255 in eq. 19. There the unsure half is background, and to name it costs."
    label, valid, classes, masks = halves(grad=False)
    names = HeadOutput([classes], [masks])
    targets = targets_from_labels(label, 19, valid)
    assert targets[0].classes.tolist() == [0]
    paid, free = (mask_classification_loss(o, targets, 1024)["total"] for o in (names, silent(classes, masks)))
    assert paid <= free + 1e-4
    trapped = targets_from_labels(label.masked_fill(~valid, 255), 19)
    paid, free = (mask_classification_loss(o, trapped, 1024)["total"] for o in (names, silent(classes, masks)))
    assert paid > free + 1


def test_a_road_that_reaches_into_the_unsure_half_costs_nothing():
    label, valid, classes, masks = halves(grad=False)
    wide = masks.clone()
    wide[0, 0] = 8
    loss, trapped = (mask_classification_loss(HeadOutput([classes], [wide]), targets, 1024) for targets in
                     (targets_from_labels(label, 19, valid), targets_from_labels(label.masked_fill(~valid, 255), 19)))
    assert loss["mask"] < 0.1 and loss["dice"] < 0.1 and trapped["mask"] > 1


def test_padding_has_no_gradient():
    label, valid, classes, masks = halves()
    label[:] = torch.randint(0, 19, label.shape)
    mask_classification_loss(HeadOutput([classes], [masks]), targets_from_labels(label, 19, valid), 4096)[
        "total"].backward()
    assert not masks.grad[:, :, 9:].any() and masks.grad[:, :, :7].any()  # row 8 is interpolated into the upper half
    masks.grad = None
    nothing = targets_from_labels(label, 19, torch.zeros_like(valid))
    loss = mask_classification_loss(HeadOutput([classes], [masks]), nothing, 64)
    classes.grad = None
    loss["total"].backward()
    assert loss["total"] == 0 and not classes.grad.any() and not masks.grad.any()


def test_all_valid_is_plain():
    output, labels = predictions(), blocks()
    losses = []
    for valid in (None, torch.ones_like(labels, dtype=torch.bool)):
        generators = [torch.Generator().manual_seed(k) for k in range(2)]
        targets = targets_from_labels(labels, 19, valid)
        losses.append(mask_classification_loss(output, targets, 256, generators))
    assert all(torch.equal(losses[0][name], losses[1][name]) for name in losses[0])


def test_points_are_uniform_over_what_is_valid():
    valid = torch.zeros(8, 8, dtype=torch.bool)
    valid[2:5, 1:7] = True
    points = uniform_points(3, 20_000, torch.device("cpu"), valid, torch.Generator().manual_seed(0))
    x, y = (points * 8).long().unbind(-1)
    hits = torch.bincount((y * 8 + x).flatten(), minlength=64).view(8, 8)
    assert hits[~valid].sum() == 0 and ((hits[valid] / 60_000 * 18 - 1).abs() < 0.06).all()


def test_draws_belong_to_the_image():
    "Alone or in a batch, first or last: an image's generator gives it the same points."
    output, targets = predictions(2), targets_from_labels(blocks(), 19)

    def loss(pick):
        generators = [torch.Generator().manual_seed(10 + i) for i in pick]
        return mask_classification_loss(output[pick], [targets[i] for i in pick], 128, generators)
    both, swapped, (one, other) = loss([0, 1]), loss([1, 0]), (loss([i]) for i in (0, 1))
    assert both["mask"] == pytest.approx(swapped["mask"].item(), rel=1e-6)
    sizes = [len(t.classes) for t in targets]
    mean = (sizes[0] * one["mask"] + sizes[1] * other["mask"]) / sum(sizes)
    assert both["mask"] == pytest.approx(mean.item(), rel=1e-5)


def test_no_targets_at_all_and_in_one_image():
    labels = blocks()
    labels[0] = 255
    for lab in (labels, torch.full_like(labels, 255)):
        output = predictions(grad=True)
        loss = mask_classification_loss(output, targets_from_labels(lab, 19), 128)
        loss["total"].backward()
        assert all(v.isfinite() for v in loss.values())
        assert all(x.grad is not None and x.grad.isfinite().all() for x in (*output.class_logits, *output.mask_logits))
    assert loss["mask"] == loss["dice"] == 0 < loss["class"]


# ---- matching

def test_perfect_queries_are_found_in_any_order():
    targets = targets_from_labels(blocks(), 19)
    output, order = predictions(1), [torch.randperm(12) for _ in targets]
    for i, t in enumerate(targets):
        query = order[i][: len(t.classes)]
        output.mask_logits[0][i, query] = 40 * F.interpolate(t.masks[None].float(), size=16, mode="area")[0] - 20
        output.class_logits[0][i, query, t.classes] = 20
    assert match(output, targets, 2048)[0].tolist() == torch.cat(
        [q[: len(t.classes)] for q, t in zip(order, targets)]).tolist()


def test_padded_queries_are_never_matched_and_learn_nothing():
    output, targets = predictions(grad=True), targets_from_labels(blocks(), 19)
    padding = torch.zeros(2, 12, dtype=torch.bool)
    padding[0, 4:] = True
    padding[1, 2:] = True
    output = replace(output, padding=padding)
    matched, sizes = match(output, targets, 256), [len(t.classes) for t in targets]
    assert (matched[:, : sizes[0]] < 4).all() and (matched[:, sizes[0]:] < 2).all()
    # more targets than queries: the rest stays unmatched
    assert (matched[:, sizes[0]:] >= 0).sum(1).tolist() == [min(2, sizes[1])] * 3
    mask_classification_loss(output, targets, 256)["total"].backward()
    for x in (*output.class_logits, *output.mask_logits):
        assert x.grad[padding].abs().sum() == 0 < x.grad[~padding].abs().sum()


def test_padding_equals_leaving_out(monkeypatch):
    same_points(monkeypatch)
    output, targets = predictions(batch=1), targets_from_labels(blocks(1), 19)
    padded = replace(output, padding=torch.arange(12)[None] >= 7)
    short = HeadOutput([c[:, :7] for c in output.class_logits], [m[:, :7] for m in output.mask_logits])
    a, b = mask_classification_loss(padded, targets, 256), mask_classification_loss(short, targets, 256)
    assert all(torch.allclose(a[k], b[k], atol=1e-5) for k in a)
    everything = mask_classification_loss(replace(output, padding=torch.ones(1, 12, dtype=torch.bool)), targets, 256)
    assert everything["total"] == 0


def test_broken_predictions_do_not_stop_the_matching():
    output, targets = predictions(1), targets_from_labels(blocks(), 19)
    output.mask_logits[0][0, 3] = torch.nan
    matched = match(output, targets, 128)
    assert (matched >= 0).all() and 3 not in matched[0, : len(targets[0].classes)]


def test_one_copy_to_the_host(monkeypatch):
    output, targets = predictions(5), targets_from_labels(blocks(), 19)
    copies, cpu = [], torch.Tensor.cpu
    monkeypatch.setattr(torch.Tensor, "cpu", lambda self, *a, **k: copies.append(self.shape) or cpu(self, *a, **k))
    for name in ("item", "tolist", "__bool__", "nonzero"):
        monkeypatch.setattr(torch.Tensor, name, lambda self, *a, **k: pytest.fail("another synchronisation"))
    mask_classification_loss(replace(output, padding=torch.zeros(2, 12, dtype=torch.bool)), targets, 128)
    assert copies == [(5, 2, 12, 5)]


# ---- points

def test_uncertain_points():
    logits = torch.linspace(-8, 8, 64).expand(1, 1, 64, 64)  # the border is the column in the middle
    points = uncertain_points(logits, 400)
    x = points[0, :, 0]
    assert points.shape == (1, 400, 2) and points.min() >= 0 and points.max() <= 1
    assert ((x - .5).abs() < .2).float().mean() > .75 and (x[-100:] - .5).abs().max() > .4
    assert torch.allclose(point_sample(logits, torch.tensor([[[.5, .5]]])), torch.zeros(1, 1, 1), atol=1e-6)


# ---- eq. 15

def test_normalized_score_loss():
    scores, labels, weights = torch.rand(2, 19, 8, 8), torch.randint(0, 19, (2, 8, 8)), torch.rand(2, 8, 8)
    labels[:, :2] = 255
    p = scores / scores.sum(1, keepdim=True)
    picked = p.gather(1, labels.clamp(max=18)[:, None])[:, 0]
    # over all pixels, ignored ones included
    expected = (-picked.log() * weights * (labels != 255)).sum() / labels.numel()
    assert torch.allclose(normalized_score_loss(scores, labels, weights), expected, atol=1e-4)
    assert torch.allclose(normalize_scores(scores), p, atol=1e-4)
    large = F.interpolate(scores, size=(32, 32), mode="bilinear")
    grown, ones = torch.randint(0, 19, (2, 32, 32)), torch.ones(2, 32, 32)
    assert torch.allclose(normalized_score_loss(scores, grown, ones), normalized_score_loss(large, grown, ones),
        atol=1e-5)


def test_normalized_score_loss_is_finite_where_nobody_claims_a_pixel():
    scores = torch.zeros(1, 19, 4, 4, requires_grad=True)
    loss = normalized_score_loss(scores, torch.zeros(1, 4, 4, dtype=torch.int64), torch.ones(1, 4, 4))
    loss.backward()
    assert loss.isfinite() and scores.grad.isfinite().all() and scores.grad[0, 0].max() < 0
    assert torch.allclose(normalize_scores(scores), torch.full_like(scores, 1 / 19))
    assert normalized_score_loss(scores, torch.full((1, 4, 4), 255), torch.ones(1, 4, 4)) == 0


def test_no_softmax_over_scores():
    perfect = F.one_hot(torch.arange(16).view(1, 4, 4), 19).permute(0, 3, 1, 2).float()
    # a softmax over scores would make every weight 0
    assert perfect.softmax(1).max() < .132 and (normalize_scores(perfect).amax(1) >= .968).all()
    assert F.cross_entropy(perfect, perfect.argmax(1)) > 2.03 and normalized_score_loss(perfect, perfect.argmax(1),
        torch.ones(1, 4, 4)) < 1e-4


# ---- eq. 16

def test_paired_loss_by_hand():
    student, teacher = predictions(10, queries=6), predictions(1, queries=6)
    teacher_class, teacher_mask = teacher.class_logits[0], teacher.mask_logits[0]
    teacher_class[:, 2:, 19] = 9.
    loss = paired_loss(student, teacher_class, teacher_mask)
    wanted, weight = teacher_class.argmax(-1), torch.ones(20)
    weight[19] = .1
    real, number = wanted < 19, 4
    t = (teacher_mask.sigmoid() > .5).float()[real].flatten(1)
    total = 0
    for c, m in zip(student.class_logits, student.mask_logits):
        x = m[real].flatten(1)
        dice = 1 - (2 * (x.sigmoid() * t).sum(1) + 1) / (x.sigmoid().sum(1) + t.sum(1) + 1)
        total += 2 * F.cross_entropy(c.flatten(0, 1), wanted.flatten(), weight)
        total += 5 * F.binary_cross_entropy_with_logits(x, t,
            reduction="none").mean(1).sum() / number + 5 * dice.sum() / number
    assert torch.allclose(loss["total"], total, rtol=1e-5) and torch.allclose(loss["total"], loss["class"]
        + loss["mask"] + loss["dice"])


def test_paired_loss_pairs_by_index_and_knows_no_object():
    output = predictions(10, queries=6, grad=True)
    teacher_class, teacher_mask = torch.full((2, 6, 20), -9.), torch.randn(2, 6, 16, 16) * 9
    teacher_class[:, :3, 4] = teacher_class[:, 3:, 19] = 9.
    same = HeadOutput([teacher_class] * 10, [teacher_mask.sign() * 30] * 10)
    swapped = HeadOutput([c.flip(1) for c in same.class_logits], [m.flip(1) for m in same.mask_logits])
    assert paired_loss(same, teacher_class, teacher_mask)["total"] < .01 < 10 < paired_loss(swapped, teacher_class,
        teacher_mask)["total"]
    paired_loss(output, teacher_class, teacher_mask)["total"].backward()
    # every prediction learns; 'no object' queries learn a class but no mask
    for c, m in zip(output.class_logits, output.mask_logits):
        assert (c.grad.abs().sum(-1) > 0).all() and m.grad[:,
            3:].abs().sum() == 0 and (m.grad[:, :3].abs().sum((2, 3)) > 0).all()
    with pytest.raises(ValueError, match="by index"):
        paired_loss(output, teacher_class[:, :5], teacher_mask[:, :5])


def test_paired_loss_without_real_queries_and_without_padding_pixels():
    output = predictions(10, queries=6, grad=True)
    nothing = torch.zeros(2, 6, 20)
    nothing[..., 19] = 9
    loss = paired_loss(output, nothing, torch.randn(2, 6, 16, 16))
    loss["total"].backward()
    assert loss["mask"] == loss["dice"] == 0 and all(m.grad.abs().sum() == 0 for m in output.mask_logits)
    something = torch.randn(2, 6, 20)
    something[..., 19] = -9
    valid = torch.ones(2, 64, 64, dtype=torch.bool)
    valid[:, :, 32:] = False
    a = torch.randn(2, 6, 16, 16)
    b = a.clone()
    b[..., 8:] *= -1
    assert torch.equal(paired_loss(output, something, a, valid)["total"],
        paired_loss(output, something, b, valid)["total"])
    left = HeadOutput(output.class_logits, [m[..., :8] for m in output.mask_logits])
    assert torch.allclose(paired_loss(output, something, a, valid)["total"],
        paired_loss(left, something, a[..., :8])["total"], rtol=1e-5)


# ---- any head

def test_loss_of_masks_is_eq_14():
    output, labels = predictions(), blocks()
    torch.manual_seed(1)
    one = output.loss(labels, 19, num_points=256)
    torch.manual_seed(1)
    two = mask_classification_loss(output, targets_from_labels(labels, 19), num_points=256)
    assert one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)


def test_loss_of_pixels():
    labels, logits = blocks().to(torch.uint8), torch.randn(2, 19, 16, 16, requires_grad=True)
    loss = PixelOutput(logits).loss(labels, 19)["total"]
    big = F.interpolate(logits.detach(), (64, 64), mode="bilinear")
    # a mean over the labelled pixels of the whole batch
    assert torch.allclose(loss, F.cross_entropy(big, labels.long(), ignore_index=255), rtol=1e-5)
    loss.backward()
    assert logits.grad.abs().sum() > 0
    logits.grad = None
    PixelOutput(logits).loss(torch.where(torch.arange(64) < 32, labels, 255), 19)["total"].backward()
    assert logits.grad[..., 9:].abs().sum() == 0 < logits.grad[..., :8].abs().sum()  # pixels of 255 teach nothing


def test_loss_without_labels_and_with_strange_ones():
    logits = torch.randn(2, 19, 4, 4, requires_grad=True)
    for size in (8, 4):
        loss = PixelOutput(logits).loss(torch.full((2, size, size), 255), 19)["total"]
        loss.backward()
        assert loss == 0 and loss.requires_grad and logits.grad.abs().sum() == 0
    for value in (19, 33, 254, -1, 300):
        labels = torch.zeros(2, 8, 8, dtype=torch.int64)
        labels[1, 3, 3] = value
        with pytest.raises(ValueError, match=rf"contain \[{value}\], but the head has 19 classes \(0\.\.18\) and 255"):
            PixelOutput(logits).loss(labels, 19)
    with pytest.raises(ValueError, match="19 classes"):
        predictions().loss(torch.full((2, 64, 64), 33), 19)
    for wrong in (torch.zeros(2, 11, 4, 4), torch.zeros(1, 19, 4, 4)):
        with pytest.raises(ValueError, match=r"expected \(B, K, h, w\)"):
            PixelOutput(wrong).loss(torch.zeros(2, 8, 8), 19)


def test_loss_of_pixels_is_float32_under_autocast():
    logits, labels = (torch.randn(2, 19, 16, 16) * 50).bfloat16().requires_grad_(), blocks()
    with torch.autocast("cpu", torch.bfloat16):
        loss = PixelOutput(logits).loss(labels, 19)["total"]
    assert loss.dtype == torch.float32
    assert torch.equal(loss, PixelOutput(logits.float()).loss(labels, 19)["total"])
    loss.backward()
    assert logits.grad.isfinite().all()


# ---- precision, processes, devices

def test_losses_stay_finite_and_float32_under_bfloat16():
    labels = blocks()
    output = predictions(grad=True)
    half = HeadOutput([c.bfloat16() for c in output.class_logits], [(m * 100).bfloat16() for m in output.mask_logits])
    with torch.autocast("cpu", torch.bfloat16):
        losses = [mask_classification_loss(half, targets_from_labels(labels, 19), 256)["total"],
                  paired_loss(half, half.class_logits[-1], half.mask_logits[-1])["total"],
                  normalized_score_loss(torch.rand(2, 19, 16, 16).bfloat16(), labels, torch.ones(2, 64, 64))]
    assert all(x.dtype == torch.float32 and x.isfinite() for x in losses)
    (losses[0] + losses[1]).backward()
    assert all(x.grad.isfinite().all() for x in (*output.class_logits, *output.mask_logits))


def _process(rank, path, results):
    torch.distributed.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=2)
    torch.manual_seed(rank)
    empty = mask_classification_loss(
        predictions(1), targets_from_labels(blocks() if rank else torch.full((2, 64, 64), 255), 19), 64)
    results[rank] = float(empty["total"])
    torch.distributed.destroy_process_group()


def test_a_process_without_masks_does_not_hang(tmp_path):
    if not torch.distributed.is_available():
        pytest.skip("torch was built without distributed")
    assert average_count(0, torch.device("cpu")) == 1 and average_count(7, torch.device("cpu")) == 7
    with torch.multiprocessing.get_context("spawn").Manager() as manager:
        results = manager.dict()
        torch.multiprocessing.spawn(_process, (str(tmp_path / "store"), results), nprocs=2)
        assert 0 < results[0] < results[1]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_cuda_equals_cpu(monkeypatch):
    same_points(monkeypatch)
    output, labels = predictions(), blocks()
    there = HeadOutput([c.cuda() for c in output.class_logits], [m.cuda() for m in output.mask_logits])
    a, b = (mask_classification_loss(o, targets_from_labels(l, 19), 1000) for o,
        l in ((output, labels), (there, labels.cuda())))
    assert all(abs(a[k] - b[k].cpu()) < 1e-3 for k in a)
