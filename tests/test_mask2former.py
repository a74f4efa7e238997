"""The Mask2Former head: parity with `transformers`, parameter counts, linked queries, masks, precision."""
import copy
import itertools
import math

import pytest
import torch
import torch.nn.functional as F

from reinpp.models import mask2former
from reinpp.models.mask2former import (
    DecoderLayer,
    DeformableAttention,
    HeadOutput,
    Mask2Former,
    MaskedDecoder,
    PixelDecoder,
    open_rows,
    sine_position,
)
from reinpp.paper.costs import KeptForBackward


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def small_head(**changes):
    sizes = dict(hidden_dim=64, num_queries=12, encoder_layers=1, decoder_layers=3, num_heads=4, encoder_ffn=64,
        decoder_ffn=96)
    return Mask2Former(32, **(sizes | changes))


def small_features(batch=2, height=8, width=12, channels=32):
    return [F.interpolate(torch.randn(batch, channels, 4, 6), size=(height, width), mode="bicubic") for _ in range(4)]


def test_samples_of_deformable_attention_are_read_again(monkeypatch):
    shapes, found, kept = ((2, 3), (4, 6), (8, 12)), [], []
    attention = DeformableAttention(32, 4)
    torch.nn.init.normal_(attention.offsets.weight, std=0.3)
    tokens, query = torch.randn(2, 2, 6 + 24 + 96, 32, requires_grad=True)
    for call in (mask2former.checkpoint, lambda function, *given, **_: function(*given)):
        monkeypatch.setattr(mask2former, "checkpoint", call)
        with KeptForBackward([*attention.parameters(), tokens, query]) as books:
            out = attention(query, tokens, shapes)
        kept.append(books.peak)
        found.append([out, *torch.autograd.grad(out.square().sum(), [tokens, query, *attention.parameters()])])
    assert all(torch.equal(a, b) and b.abs().max() > 0 for a, b in zip(*found)), "the same, bit for bit"
    samples = 12 * tokens.nbytes  # four points on three levels
    assert kept[0] + samples == kept[1]


# ---- parity

def reference(in_channels, hidden_dim=64, num_queries=12, encoder_layers=2, decoder_layers=4, num_heads=4,
        encoder_ffn=96, decoder_ffn=128, num_classes=19):
    "The modules of transformers, with every parameter set: built alone, they leave some uninitialised."
    pytest.importorskip("transformers")
    from transformers import Mask2FormerConfig, SwinConfig
    from transformers.models.mask2former import modeling_mask2former as hf
    config = Mask2FormerConfig(
        backbone_config=SwinConfig(), feature_size=hidden_dim, mask_feature_size=hidden_dim, hidden_dim=hidden_dim,
        encoder_feedforward_dim=encoder_ffn,
        dim_feedforward=decoder_ffn, encoder_layers=encoder_layers, decoder_layers=decoder_layers + 1,
        num_attention_heads=num_heads, num_queries=num_queries,
        dropout=0.0, pre_norm=False, enforce_input_projection=False, common_stride=4, feature_strides=[4, 8, 16, 32],
        num_labels=num_classes)
    pixel, transformer = hf.Mask2FormerPixelDecoder(config,
        [in_channels] * 4), hf.Mask2FormerTransformerModule(hidden_dim, config)
    classes = torch.nn.Linear(hidden_dim, num_classes + 1)
    modules = torch.nn.ModuleDict({"pixel": pixel, "transformer": transformer, "classes": classes}).eval()
    with torch.no_grad():
        for name, p in modules.named_parameters():
            if p.ndim > 1 and "embed" in name and "mask_embedder" not in name:
                p.normal_()
            elif p.ndim > 1:
                p.normal_(std=p[0].numel() ** -.5)
            elif name.endswith("sampling_offsets.bias"):
                p.normal_(std=3)  # points reach over the borders of the maps
            else:
                p.normal_(1 if "norm" in name.lower() and name.endswith("weight") else 0, .1)
    return modules


def copied(theirs, head):
    "Copies the reference's weights into an own-query head; every parameter of both is used exactly once."
    pixel, transformer = theirs["pixel"], theirs["transformer"]
    decoder = transformer.decoder
    used = set()
    ours = dict(head.named_parameters())

    def take(name, *tensors):
        value = torch.cat([t.detach() for t in tensors])
        assert ours[name].shape == value.shape, (name, ours[name].shape, value.shape)
        with torch.no_grad():
            ours.pop(name).copy_(value)
        used.update(id(t._base if t._base is not None else t) for t in tensors)

    def layer(name, module):
        for key, p in module.named_parameters(recurse=False):
            take(f"{name}.{key}", p)

    for i in range(3):
        layer(f"pixel_decoder.project.{i}", pixel.input_projections[i][0])
        layer(f"pixel_decoder.norms.{i}", pixel.input_projections[i][1])
    take("pixel_decoder.level_embed", pixel.level_embed)
    for i, block in enumerate(pixel.encoder.layers):
        here = f"pixel_decoder.layers.{i}"
        for mine, their in (("offsets", "sampling_offsets"), ("weights", "attention_weights"), ("value", "value_proj"),
                ("out", "output_proj")):
            layer(f"{here}.attention.{mine}", getattr(block.self_attn, their))
        for mine, their in (("norm1", block.self_attn_layer_norm), ("ffn.0", block.fc1), ("ffn.2", block.fc2),
                ("norm2", block.final_layer_norm)):
            layer(f"{here}.{mine}", their)
    layer("pixel_decoder.lateral", pixel.adapter_1[0])
    layer("pixel_decoder.lateral_norm", pixel.adapter_1[1])
    layer("pixel_decoder.smooth", pixel.layer_1[0])
    layer("pixel_decoder.smooth_norm", pixel.layer_1[1])
    layer("pixel_decoder.mask_features", pixel.mask_projection)
    take("decoder.level_embed", transformer.level_embed.weight)
    take("query_embed", transformer.queries_embedder.weight)
    take("query_feat", transformer.queries_features.weight)
    for i, block in enumerate(decoder.layers):
        here = f"decoder.layers.{i}"
        for j, part in enumerate(("query", "key", "value")):
            n = head.hidden_dim
            take(f"{here}.cross.{part}.weight", block.cross_attn.in_proj_weight[j * n:(j + 1) * n])
            take(f"{here}.cross.{part}.bias", block.cross_attn.in_proj_bias[j * n:(j + 1) * n])
        layer(f"{here}.cross.out", block.cross_attn.out_proj)
        for mine, their in (("query", "q_proj"), ("key", "k_proj"), ("value", "v_proj"), ("out", "out_proj")):
            layer(f"{here}.attend.{mine}", getattr(block.self_attn, their))
        for mine, their in (("norm1", block.cross_attn_layer_norm), ("norm2", block.self_attn_layer_norm),
                ("norm3", block.final_layer_norm),
                            ("ffn.0", block.fc1), ("ffn.2", block.fc2)):
            layer(f"{here}.{mine}", their)
    layer("decoder.norm", decoder.layernorm)
    layer("decoder.class_head", theirs["classes"])
    for i in range(3):
        layer(f"decoder.mask_head.{2 * i}", decoder.mask_predictor.mask_embedder.layers[i].layers[0])
    assert not ours, f"not copied: {list(ours)}"
    missed = [name for name, p in theirs.named_parameters() if id(p) not in used]
    assert not missed, f"not used: {missed}"
    return head


def their_predictions(theirs, features, scales):
    "The reference resizes the wide maps first and projects them afterwards."
    pyramid = [f if s == 1 else F.interpolate(f, scale_factor=s, mode="bilinear", align_corners=False) for f,
        s in zip(features, scales)]
    pixels = theirs["pixel"](pyramid, return_dict=True, output_hidden_states=False, output_attentions=False)
    out = theirs["transformer"](list(pixels.multi_scale_features), pixels.mask_features)
    return [theirs["classes"](x.transpose(0, 1)) for x in out.intermediate_hidden_states], list(
        out.masks_queries_logits)


def assert_equal_predictions(theirs, head, features, predictions):
    with torch.no_grad():
        classes, masks = their_predictions(theirs, features, head.pixel_decoder.scales)
        ours = head(features)
    assert len(classes) == len(masks) == len(ours.class_logits) == len(ours.mask_logits) == predictions
    for i in range(predictions):
        assert classes[i].shape == ours.class_logits[i].shape and masks[i].shape == ours.mask_logits[i].shape
        assert (classes[i] - ours.class_logits[i]).abs().max() < 1e-4, f"classes of prediction {i}"
        assert (masks[i] - ours.mask_logits[i]).abs().max() < 1e-4 * max(1,
            masks[i].abs().max()), f"masks of prediction {i}"


@pytest.mark.parametrize(
"scales, size", [((4, 2, 1, .5), (8, 12)), ((2, 1, .5, .25), (16, 16)), ((4, 2, 1, .5), (7, 9))])
def test_parity_small(scales, size):
    theirs = reference(32)
    head = copied(theirs, small_head(linked=False, encoder_layers=2, decoder_layers=4, encoder_ffn=96, decoder_ffn=128,
        scales=scales)).eval()
    assert_equal_predictions(theirs, head, small_features(2, *size), 5)


def test_parity_of_gradients():
    theirs = reference(32)
    head = copied(theirs, small_head(linked=False, encoder_layers=2, decoder_layers=4, encoder_ffn=96, decoder_ffn=128))
    features = small_features()
    for f in features:
        f.requires_grad_()
    classes, masks = their_predictions(theirs, features, head.pixel_decoder.scales)
    probes = [torch.randn_like(c) for c in classes], [torch.randn_like(m) for m in masks]
    def weigh(c, m):
        return sum((a * b).sum() for a, b in zip((*c, *m), (*probes[0], *probes[1])))
    expected = torch.autograd.grad(weigh(classes, masks), features)
    out = head(features)
    got = torch.autograd.grad(weigh(out.class_logits, out.mask_logits), features)
    for a, b in zip(expected, got):
        assert (a - b).abs().max() < 1e-4 * a.abs().max()


def test_parity_full_size():
    sizes = dict(hidden_dim=256, num_queries=100, encoder_layers=6, decoder_layers=9, num_heads=8, encoder_ffn=1024,
        decoder_ffn=2048)
    theirs = reference(1024, **sizes)
    head = copied(theirs, Mask2Former(1024, linked=False)).eval()
    assert_equal_predictions(theirs, head, small_features(1, 8, 10, 1024), 10)


# ---- counts and queries

def test_parameter_counts():
    with torch.device("meta"):
        def count(**k):
            return sum(p.numel() for p in Mask2Former(1024, 19, **k).parameters())
        assert count(linked=True) == 20_579_796
        assert count(linked=False) == 20_565_204


def test_linked_queries():
    head, features, queries = small_head(), small_features(), torch.randn(7, 64, requires_grad=True)
    out = head(features, queries)
    assert [c.shape for c in out.class_logits] == [(2, 7, 20)] * 4 and [m.shape
        for m in out.mask_logits] == [(2, 7, 32, 48)] * 4
    out.class_logits[-1].sum().backward()
    assert queries.grad.abs().sum() > 0
    with pytest.raises(ValueError, match="linked=True"):
        head(features)
    with pytest.raises(ValueError, match="64"):
        head(features, torch.randn(7, 32))
    with pytest.raises(ValueError, match="linked=False"):
        small_head(linked=False)(features, torch.randn(7, 64))


def test_linked_equals_own_queries_with_the_same_values():
    own, linked, features = small_head(linked=False), small_head(), small_features()
    linked.load_state_dict({k: v for k, v in own.state_dict().items() if not k.startswith("query_")}
        | {k: v for k, v in linked.state_dict().items() if "querys2feat" in k})
    with torch.no_grad():
        own.query_feat.copy_(linked.querys2feat(own.query_embed))
    for a, b in zip(own(features).mask_logits, linked(features, own.query_embed).mask_logits):
        assert torch.allclose(a, b, atol=1e-5)


@pytest.mark.parametrize("hidden", [64, 80, 96])
def test_other_widths(hidden):
    out = small_head(hidden_dim=hidden, num_heads=8)(small_features(), torch.randn(5, hidden))
    assert out.mask_logits[-1].shape == (2, 5, 32, 48)


def test_bad_input():
    with pytest.raises(ValueError, match="four maps"):
        small_head()(small_features()[:3], torch.randn(5, 64))
    with pytest.raises(ValueError, match="32"):
        small_head()(small_features(channels=16), torch.randn(5, 64))
    with pytest.raises(ValueError, match="cannot be resized"):
        small_head(scales=(2, 1, .5, .25))(small_features(height=2, width=2), torch.randn(5, 64))
    with pytest.raises(ValueError, match="multiple of 4"):
        sine_position(2, 2, 6)
    with pytest.raises(ValueError, match="num_heads"):
        small_head(num_heads=7)


# ---- attention

def test_projection_commutes_with_resizing():
    decoder, features = PixelDecoder(32, 64, num_layers=1, num_heads=4, ffn=64), small_features()
    for scale, conv in ((.5, decoder.project[0]), (2, decoder.project[2]), (4, decoder.lateral)):
        def resize(x, scale=scale):
            return F.interpolate(x, scale_factor=scale, mode="bilinear", align_corners=False)
        assert torch.allclose(conv(resize(features[0])), resize(conv(features[0])), atol=1e-5)


def test_rows_that_block_everything_are_opened():
    allowed = torch.tensor([[True, False, False], [False, False, False]])
    assert open_rows(allowed).tolist() == [[True, False, False], [True, True, True]]
    head = small_head(linked=False)
    # mask features are one large constant and embeddings point the other way: every mask blocks everything
    with torch.no_grad():
        head.pixel_decoder.mask_features.weight.zero_()
        head.pixel_decoder.mask_features.bias.fill_(10)
        head.decoder.mask_head[-1].weight.zero_()
        head.decoder.mask_head[-1].bias.fill_(-1)
    out = head(small_features())
    assert all((m < 0).all() for m in out.mask_logits)
    assert all(x.isfinite().all() for x in (*out.class_logits, *out.mask_logits))
    sum(x.sum() for x in out.class_logits).backward()
    assert all(p.grad.isfinite().all() for p in head.parameters() if p.grad is not None)


def test_a_query_looks_only_where_its_mask_allows():
    layer = DecoderLayer(32, 4, 64)
    x, memory, allowed = torch.randn(1, 3, 32), torch.randn(1, 20, 32), torch.zeros(1, 3, 20, dtype=torch.bool)
    allowed[..., :8] = True
    position = torch.zeros(1, 3, 32)
    changed = memory.clone()
    changed[:, 8:] += 5
    assert torch.allclose(layer(x, position, memory, memory, allowed), layer(x, position, changed, changed, allowed),
        atol=1e-6)
    assert not torch.allclose(layer(x, position, memory, memory), layer(x, position, changed, changed), atol=1e-2)


def test_padded_queries_do_not_disturb_real_ones():
    decoder = MaskedDecoder(19, 32, 3, 4, 64)
    fine, maps = torch.randn(1, 32, 16, 16), [torch.randn(1, 32, n, n) for n in (2, 4, 8)]
    query, position, first = torch.randn(1, 5, 32), torch.randn(1, 5, 32), torch.rand(1, 5, 16, 16) > .5
    padding = torch.tensor([[False, False, False, True, True]])
    full = decoder(fine, maps, query, position, first, padding)
    alone = decoder(fine, maps, query[:, :3], position[:, :3], first[:, :3])
    assert full.padding is padding
    for a, b in zip(full.class_logits, alone.class_logits):
        assert torch.allclose(a[:, :3], b, atol=1e-5)
    for a, b in zip(full.mask_logits, alone.mask_logits):
        assert torch.allclose(a[:, :3], b, atol=1e-4)
    everything = decoder(fine, maps, query, position, first, torch.ones(1, 5, dtype=torch.bool))
    assert all(x.isfinite().all() for x in everything.class_logits)


def test_first_mask_is_where_the_first_layer_looks():
    decoder = MaskedDecoder(19, 32, 1, 4, 64)
    seen = []
    decoder.layers[0].register_forward_pre_hook(lambda module, args: seen.append(args[4]))
    fine, maps = torch.randn(1, 32, 16, 16), [torch.randn(1, 32, n, n) for n in (4, 8, 16)]
    first = torch.zeros(1, 2, 16, 16, dtype=torch.bool)
    first[0, 0, :8, :8] = True
    decoder(fine, maps, torch.randn(1, 2, 32), torch.randn(2, 32), first)
    region = seen[0][0].view(2, 4, 4)
    assert region[0, :2, :2].all() and region[0].sum() == 4 and region[1].all()  # the empty proposal is opened


def test_attention_starts_as_torchs_one_projection_does():
    "mmdet: xavier_normal_ on every matrix of the decoder, where q, k and v are one (3 dim, dim): 1 / sqrt(2 dim)."
    theirs = torch.nn.MultiheadAttention(256, 8)
    for p in theirs.requires_grad_(False).parameters():
        if p.ndim > 1: torch.nn.init.xavier_normal_(p)
    decoder = MaskedDecoder(19).requires_grad_(False)
    def spread(weight): return pytest.approx(weight.std().item(), rel=.02)

    assert spread(theirs.in_proj_weight) == .0442 and spread(theirs.out_proj.weight) == .0625
    for layer in decoder.layers:
        for attention in (layer.cross, layer.attend):
            for one in (attention.query, attention.key, attention.value):
                assert one.weight.std().item() == spread(theirs.in_proj_weight)
            assert attention.out.weight.std().item() == spread(theirs.out_proj.weight)
            assert not any(one.bias.any() for one in (attention.query, attention.key, attention.value, attention.out))


# ---- precision, caches, copies

def test_bfloat16_autocast():
    head, features, queries = small_head(), small_features(), torch.randn(6, 64)
    exact = head(features, queries)
    with torch.autocast("cpu", torch.bfloat16):
        rough = head(features, queries)
    assert all(x.isfinite().all() for x in (*rough.class_logits, *rough.mask_logits))
    assert (rough.class_logits[0].float() - exact.class_logits[0]).abs().max() < .1
    with torch.autocast("cpu", torch.bfloat16):
        scores = rough.scores()
    assert scores.dtype == torch.float32 and scores.min() >= 0


def test_position_cache_survives_inference_mode_and_stays_out_of_the_state():
    head, features, queries = small_head(), small_features(1, 12, 20), torch.randn(6, 64)
    before = set(head.state_dict())
    with torch.inference_mode():
        head(features, queries)
    loss = head(features, queries).class_logits[-1].sum()
    loss.backward()  # a tensor cached in inference mode would raise here
    assert set(head.state_dict()) == before
    assert torch.equal(copy.deepcopy(head)(features, queries).mask_logits[-1], head(features, queries).mask_logits[-1])


def test_functional_call_runs_other_weights():
    head, features, queries = small_head(), small_features(), torch.randn(6, 64)
    other = {name: p + 1e-2 for name, p in head.named_parameters()}
    out = torch.func.functional_call(head, other, (features, queries))
    twin = copy.deepcopy(head)
    twin.load_state_dict(other)
    assert torch.equal(out.mask_logits[-1], twin(features, queries).mask_logits[-1])


def test_semantic_scores():
    classes, masks = torch.randn(2, 5, 20), torch.randn(2, 5, 3, 4)
    expected = torch.einsum("bqk,bqhw->bkhw", classes.softmax(-1)[..., :19], masks.sigmoid())
    assert torch.allclose(HeadOutput([classes], [masks]).scores(), expected, atol=1e-6)
    padding = torch.tensor([[False] * 4 + [True]] * 2)
    padded, short = HeadOutput([classes], [masks], padding), HeadOutput([classes[:, :4]], [masks[:, :4]])
    assert torch.allclose(padded.scores(), short.scores(), atol=1e-6)


@pytest.mark.parametrize("size", [(24, 40), (6, 10), (13, 7)])
@pytest.mark.parametrize("queries", [3, 8, 21])
def test_predicted_scores_are_resized_before_the_sigmoid(size, queries):
    "The authors' order, whatever the number of chunks; the scores resized afterwards are something else."
    classes, masks = torch.randn(2, queries, 20), 8 * torch.randn(2, queries, 6, 10)
    large = F.interpolate(masks, size, mode="bilinear", align_corners=False)
    expected = torch.einsum("bqk,bqhw->bkhw", classes.softmax(-1)[..., :19], large.sigmoid())
    output = HeadOutput([classes], [masks])
    assert torch.allclose(output.scores(size), expected, atol=1e-5)
    trap = F.interpolate(output.scores(), size, mode="bilinear", align_corners=False)
    assert ((trap - expected).abs().max() > .1) == (size != (6, 10))
    padding = torch.tensor([[False] * (queries - 1) + [True]] * 2)
    short = HeadOutput([classes[:, :-1]], [masks[:, :-1]])
    assert torch.allclose(HeadOutput([classes], [masks], padding).scores(size), short.scores(size), atol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(output.scores(size), HeadOutput([classes], [masks]).scores(size))
    assert output.scores(size).dtype == torch.float32


def peak_bytes(function):
    "The most memory that a function holds at a time on the CPU, beyond what was there before."
    with torch.profiler.profile(profile_memory=True) as profile:
        function()
    events = sorted((e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"),
                    key=lambda e: e.start_ns())
    return max(itertools.accumulate(e.nbytes() for e in events))


def test_predicted_scores_need_little_memory():
    "Batches of a 512 window: at most 150 MB over scores resized at the end; all masks at once would be 100 MB each."
    output = HeadOutput([torch.randn(2, 100, 20)], [torch.randn(2, 100, 128, 128)])
    size = (512, 512)
    whole = 2 * 100 * 512 * 512 * 4
    after = peak_bytes(lambda: F.interpolate(output.scores(), size, mode="bilinear", align_corners=False))
    before = peak_bytes(lambda: output.scores(size))
    at_once = peak_bytes(lambda: F.interpolate(output.mask_logits[-1], size, mode="bilinear", align_corners=False))
    assert at_once >= whole > before, "the count sees memory"
    assert before - after < 2 * 150e6 / 8, f"{(before - after) / 1e6:.0f} MB more for two windows"


def test_softmax_over_scores_is_a_trap():
    one_hot = F.one_hot(torch.tensor([3]), 19).float()
    assert math.isclose(one_hot.softmax(-1).max(), math.e / (math.e + 18),
        rel_tol=1e-5) and one_hot.softmax(-1).max() < .132
