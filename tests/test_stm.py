"""STM: queries from proposals, whatever their number; gradients; what fits what."""

import pytest
import torch
import torch.nn.functional as F

from reinpp.adaptation.masks import pad
from reinpp.adaptation.stm import STM, mask_boxes, pool_under
from reinpp.models.losses import mask_classification_loss, normalized_score_loss, targets_from_labels
from reinpp.models.mask2former import sine_position
from reinpp.models.segmenter import create_segmenter

SMALL = dict(hidden_dim=32, encoder_layers=1, num_heads=4, encoder_ffn=32, decoder_ffn=32)


@pytest.fixture
def stm():
    torch.manual_seed(0)
    return STM(16, num_classes=5, scales=(2, 1, 0.5, 0.25), **SMALL)


def features(batch=2, grid=8):
    return [torch.randn(batch, 16, grid, grid) for _ in range(4)]


def blobs(batch=2, count=6, size=16):
    centre, radius = torch.rand(batch, count, 2, 1, 1) * size, 1 + torch.rand(batch, count, 1, 1) * 5
    y, x = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    return ((y - centre[:, :, 0]) ** 2 + (x - centre[:, :, 1]) ** 2) < radius**2


def scores(out):
    return out.scores()


def test_boxes_and_pooling_equal_a_loop():
    torch.manual_seed(0)
    masks, maps = blobs(2, 5, 12), torch.randn(2, 3, 12, 12)
    masks[1, 2] = False
    boxes, means = mask_boxes(masks), pool_under(masks, maps)
    for b in range(2):
        for i in range(5):
            y, x = masks[b, i].nonzero().T
            if not len(y):
                assert not boxes[b, i].any() and not means[b, i].any()
                continue
            expected = torch.stack([x.min(), y.min(), x.max() + 1, y.max() + 1]) / 12
            assert torch.allclose(boxes[b, i], expected) and torch.allclose(means[b, i], maps[b][:, y, x].mean(1),
                atol=1e-6)
    sine = sine_position(12, 12, 8).T.unflatten(1, (12, 12))
    assert torch.allclose(pool_under(masks, sine[None])[0, 0], sine[:, masks[0, 0]].mean(1), atol=1e-6)


def test_shapes_and_four_predictions(stm):
    masks, padding = pad(blobs(), 10)
    out = stm(features(), masks, padding)
    assert len(out.class_logits) == len(out.mask_logits) == 4
    assert out.class_logits[-1].shape == (2, 10, 6) and out.mask_logits[-1].shape == (2, 10, 16,
        16) and torch.equal(out.padding, padding)


def test_proposals_matter(stm):
    "Same features, other proposals: another answer. The queries come from nowhere else."
    f = features()
    masks, padding = pad(blobs(), 10)
    assert not torch.allclose(scores(stm(f, masks, padding)), scores(stm(f, masks.roll(5, -1), padding)), atol=1e-4)
    assert not any("query" in name.split(".")[-1] for name, _ in stm.named_parameters())


def test_the_first_layer_looks_at_the_proposal(stm):
    "Only under a proposal's cells may the first layer read: features elsewhere change nothing in the first attention."
    seen = []
    stm.decoder.layers[0].cross.register_forward_hook(lambda module, args, out: seen.append(args[3]))
    masks, padding = pad(blobs(), 10)
    stm(features(), masks, padding)
    expected = F.adaptive_max_pool2d(masks.float(), (2, 2)).flatten(2) > 0
    allowed = seen[0].squeeze(1)
    # an empty mask would look nowhere: it is opened
    assert torch.equal(allowed[~padding], expected[~padding]) and allowed[padding].all()


def test_order_of_proposals_does_not_matter(stm):
    f = features()
    masks, padding = pad(blobs(), 10)
    order = torch.randperm(10)
    assert torch.allclose(scores(stm(f, masks, padding)), scores(stm(f, masks[:, order], padding[:, order])), atol=1e-4)


@pytest.mark.parametrize("limit", [7, 12, 40])
def test_padding_changes_nothing(stm, limit):
    f, found = features(), blobs()
    labels = torch.randint(0, 5, (2, 64, 64))
    a, b = stm(f, *pad(found, 6)), stm(f, *pad(found, limit))
    assert torch.allclose(scores(a), scores(b), atol=1e-4)
    assert torch.allclose(normalized_score_loss(scores(a), labels, torch.ones(2, 64, 64)),
        normalized_score_loss(scores(b), labels, torch.ones(2, 64, 64)), atol=1e-4)


@pytest.mark.parametrize("counts", [(0, 0), (0, 4), (1, 3)])
def test_few_or_no_proposals_stay_finite(stm, counts):
    masks, padding = pad(blobs(), 6)
    for i, n in enumerate(counts):
        masks[i, n:], padding[i, n:] = False, True
    labels = torch.randint(0, 5, (2, 64, 64))  # five targets, fewer queries
    out = stm(features(), masks, padding)
    loss = mask_classification_loss(out, targets_from_labels(labels, 5),
        num_points=64)["total"] + normalized_score_loss(scores(out), labels, torch.ones(2, 64, 64))
    loss.backward()
    assert torch.isfinite(loss) and all(torch.isfinite(p.grad).all() for p in stm.parameters())
    assert all((scores(out)[i] == 0).all() for i, n in enumerate(counts) if n == 0)


def test_every_parameter_learns(stm):
    masks, padding = pad(blobs(), 8)
    out = stm(features(), masks, padding)
    mask_classification_loss(out, targets_from_labels(torch.randint(0, 5, (2, 64, 64)), 5),
        num_points=256)["total"].backward()
    later = "pixel_decoder.level_embed"  # acts through sampling weights that start at 0
    dead = [name for name, p in stm.named_parameters() if (p.grad is None or not p.grad.any()) and name != later]
    assert not dead, dead


def test_grid_that_does_not_fit_is_refused(stm):
    with pytest.raises(ValueError, match=r"\(8, 8\).*\(16, 16\)"):
        stm(features(), torch.zeros(2, 3, 8, 8, dtype=torch.bool), torch.zeros(2, 3, dtype=torch.bool))


def test_like_fits_its_segmenter():
    segmenter = create_segmenter("tiny", image_size=64, pretrained=False, num_classes=7,
        adapter_args=dict(num_tokens=10, rank=2), head_args=dict(SMALL, decoder_layers=2))
    stm = STM.like(segmenter)
    with torch.no_grad():
        out = stm(segmenter.features(torch.rand(1, 3, 64, 64)), *pad(blobs(1), 9))
    assert len(stm.decoder.layers) == 3 and out.class_logits[-1].shape == (1, 9, 8)
    assert len(STM.like(segmenter, decoder_layers=1).decoder.layers) == 1
    assert sum(p.numel() for p in STM(1024).parameters()) < 20_579_796  # lighter than the head beside it
