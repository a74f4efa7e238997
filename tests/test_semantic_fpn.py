"Semantic FPN: a second implementation beside it, shapes, counts, refusals, precision, and training inside a segmenter."
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from reinpp.models.semantic_fpn import SemanticFPN


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def maps(h=8, w=12, channels=24, batch=2):
    return [torch.randn(batch, channels, h, w) for _ in range(4)]


def reference(head, features):
    "The head as the paper draws it: resize first, project then, enlarge by factors; sizes that two divides."
    pyramid = [F.conv2d(F.interpolate(f, scale_factor=s, mode="bilinear") if s != 1 else f, l.weight, l.bias) for f, s,
        l in zip(features, head.scales, head.laterals)]
    for fine, coarse in ((2, 3), (1, 2), (0, 1)):
        pyramid[fine] = pyramid[fine] + pyramid[coarse].repeat_interleave(2, -1).repeat_interleave(2, -2)
    result = 0
    for level, (x, smooth, branch) in enumerate(zip(pyramid, head.smooth, head.branches)):
        x = smooth(x)
        for conv, norm, _ in branch:
            x = F.relu(F.group_norm(F.conv2d(x, conv.weight, padding=1), norm.num_groups, norm.weight, norm.bias))
            if level:
                x = nn.Upsample(scale_factor=2, mode="bilinear")(x)
        result = result + x
    return head.classify(result)


@pytest.mark.parametrize("scales", [(4, 2, 1, .5), (2, 1, .5, .25)])
def test_equals_the_paper_without_its_order(scales):
    head, features = SemanticFPN(24, 19, scales, hidden_dim=32).double(), [f.double() for f in maps()]
    for p in head.parameters():
        nn.init.normal_(p, std=.2)  # biases and norms too
    out = head(features).logits
    assert out.shape == (2, 19, 8 * scales[0], 12 * scales[0])
    torch.testing.assert_close(out, reference(head, features), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("h,w,scales,size", [(37, 37, (14 / 4, 14 / 8, 14 / 16, 14 / 32), (129, 129)),
(9, 7, (4, 2, 1, .5), (36, 28)), (2, 3, (4, 2, 1, .5), (8, 12))])
def test_any_size(h, w, scales, size):
    assert SemanticFPN(8, 5, scales, hidden_dim=16)(maps(h, w, 8)).logits.shape == (2, 5, *size)


@pytest.mark.parametrize("channels,classes,hidden,branch",
[(1024, 19, 256, 128), (1536, 19, 256, None), (128, 11, 96, 32)])
def test_parameter_count(channels, classes, hidden, branch):
    with torch.device("meta"):
        head = SemanticFPN(channels, classes, hidden_dim=hidden, branch_dim=branch)
    b = branch or hidden // 2
    assert sum(p.numel() for p in head.parameters()) == 4 * (channels + 1 + 9 * hidden
        + 1) * hidden + 4 * 9 * hidden * b + 3 * 9 * b * b + 14 * b + (b + 1) * classes
    assert [len(branch) for branch in head.branches] == [1, 1, 2, 3]


def test_every_parameter_and_every_map_gets_a_gradient():
    head, features = SemanticFPN(24, 19, hidden_dim=32), [f.requires_grad_() for f in maps()]
    head(features).logits.square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in head.parameters()) and all(f.grad.abs().sum() > 0
        for f in features)


def test_refusals():
    head = SemanticFPN(24, 19, hidden_dim=16)
    with pytest.raises(ValueError, match=r"adapter_args=dict\(link_queries=False\)"):
        head(maps(), torch.zeros(100, 256))
    with pytest.raises(ValueError, match="four factors"):
        SemanticFPN(24, 19, scales=(4, 2, 1))
    with pytest.raises(ValueError, match=r"expected four maps \(B, 24, h, w\)"):
        head(maps()[:3])
    with pytest.raises(ValueError, match=r"expected four maps \(B, 24, h, w\)"):
        head(maps(channels=16))
    with pytest.raises(ValueError, match="cannot be resized by 0.5"):
        head(maps(1, 1))
    with torch.no_grad():
        assert head(maps(), None).logits.isfinite().all()


def test_bfloat16_and_channels_that_32_does_not_divide():
    head = SemanticFPN(24, 19, hidden_dim=24, branch_dim=12)
    assert head.branches[0][0][1].num_groups == 4
    with torch.autocast("cpu", torch.bfloat16):
        out = head(maps())
        loss = out.loss(torch.randint(0, 19, (2, 128, 192)), 19)["total"]
    assert out.logits.dtype == torch.bfloat16 and loss.dtype == torch.float32 and loss.isfinite()
    loss.backward()


def test_learns_one_picture():
    "The loss falls to nothing on features that hold the answer."
    labels = torch.zeros(1, 32, 48, dtype=torch.int64)
    labels[:, 8:] = 1
    labels[:, 16:, 24:] = 2
    labels[:, :4] = 255
    grid = labels[:, 2::4, 2::4].clamp(max=2)
    features = [F.one_hot(grid, 24).permute(0, 3, 1, 2).float()] * 4
    head = SemanticFPN(24, 3, hidden_dim=32)
    optimizer = torch.optim.AdamW(head.parameters(), 3e-3)
    for _ in range(40):
        loss = head(features).loss(labels, 3)["total"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < .15


@pytest.mark.parametrize("adapter,arguments", [("freeze", {}), ("rein_g", dict(num_tokens=8, rank=2))])
def test_in_a_segmenter(tmp_path, adapter, arguments):
    from reinpp.models.segmenter import HEADS, create_segmenter, load_segmenter
    if "semantic_fpn" not in HEADS:
        pytest.skip("the segmenter does not offer this head")
    def make():
        return create_segmenter("tiny", adapter, "semantic_fpn", image_size=64, pretrained=False,
            adapter_args=arguments, head_args=dict(hidden_dim=32))
    segmenter, images = make(), torch.rand(2, 3, 50, 70)
    scores = segmenter.predict(images)
    assert scores.shape == (2, 19, 50, 70) and scores.min() >= 0 and torch.allclose(scores.sum(1),
        torch.ones(2, 50, 70), atol=1e-4)
    segmenter(torch.rand(2, 3, 64, 64)).loss(torch.randint(0, 19, (2, 64, 64)), 19)["total"].backward()
    assert all(p.grad is not None for p in segmenter.parameters() if p.requires_grad)
    torch.manual_seed(0)
    segmenter = make()
    segmenter.save_adapter(tmp_path)
    torch.manual_seed(0)
    assert torch.equal(load_segmenter(tmp_path, pretrained=False).predict(images), segmenter.predict(images))
    assert segmenter.adapter.queries() is None
    with pytest.raises(ValueError, match="link_queries"):
        create_segmenter("tiny", "rein_g", "semantic_fpn", image_size=64, pretrained=False,
            adapter_args=dict(link_queries=True), head_args=dict(hidden_dim=32))
