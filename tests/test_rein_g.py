"Rein-G against the reference numbers, and on backbones of several timm classes."
import copy
from pathlib import Path

import pytest
import timm
import torch
from reduced import reduced
from safetensors import safe_open
from torch import nn
from torch.func import functional_call

from reinpp.models.backbones import extract_features
from reinpp.models.rein_g import ReinG, sizes_of

FIXTURE = Path(__file__).resolve().parents[2] / "shared" / "fixtures" / "rein_reference.safetensors"
CLASSES = ("dinov2_large", "vit_small_patch14_reg4_dinov2", "clip_large", "eva02_large", "eva02_tiny_patch14_224",
    "radio_giant", "internvl_6b", "sam_base", "dinov3_small", "pe_spatial_large")
TABLE_V = {
    "core": dict(num_heads=1, gelu=False, low_rank=False, share_mlp=False, link_queries=False),
    "link": dict(num_heads=1, gelu=False, low_rank=False),
    "lora": dict(num_heads=1, gelu=False),
    "multi-head": dict(gelu=False),
    "gelu": {},
}


def small_for(vit, **arguments):
    torch.manual_seed(1)
    return ReinG(vit.embed_dim, len(vit.blocks), num_tokens=10, rank=4, query_dim=16,
        num_prefix_tokens=getattr(vit, "num_prefix_tokens", 0), **dict(num_heads=4) | arguments)


@pytest.mark.skipif(not FIXTURE.exists(), reason="no reference file beside the checkout")
@pytest.mark.parametrize("prefix", ["", "backbone.reins."])
def test_equals_the_reference(prefix):
    with safe_open(FIXTURE, "pt") as f:
        numbers, meta = {k: f.get_tensor(k) for k in f.keys()}, f.metadata()
    state = {prefix + k.removeprefix("state."): v for k, v in numbers.items() if k.startswith("state.")}
    rein = ReinG.from_official(state | ({"decode_head.x": torch.zeros(1)} if prefix else {}),
        num_prefix_tokens=int(meta["prefix_tokens"]))
    for layer in range(int(meta["num_layers"])):
        assert (rein(numbers[f"feats.{layer}"], layer) - numbers[f"refined.{layer}"]).abs().max() < 1e-9
    assert (rein.queries() - numbers["queries"]).abs().max() < 1e-9
    # the link is interleaved: reading `merge` as three blocks gives other queries
    q = rein.token_to_query(rein.tokens())
    blocks = rein.merge(torch.cat([q.amax(0), q.mean(0), q[-1]], -1))
    assert (blocks - numbers["queries"]).abs().max() > 1e-3


@pytest.mark.parametrize("row", TABLE_V)
def test_every_row_of_table_v_equals_its_definition(row):
    torch.manual_seed(0)
    rein = ReinG(32, 3, num_tokens=7, rank=4, query_dim=8, **dict(num_heads=4) | TABLE_V[row]).double()
    f = torch.randn(2, 10, 32, dtype=torch.float64)
    for layer in range(3):
        t, at = rein.tokens(layer), 0 if rein.share_mlp else layer
        v = rein.token_to_value[at](t).unflatten(-1, (rein.num_heads, -1)).transpose(0, 1)
        d = (rein.attention(f[:, 1:], layer)[..., 1:] @ v[:, 1:]).transpose(1, 2).flatten(-2)
        expected = torch.cat([f[:, :1], f[:, 1:] + rein.scale * rein.mlp[at](d + f[:, 1:])], 1)
        assert torch.allclose(rein(f, layer), expected, atol=1e-12)
    assert (rein.queries() is None) == (row == "core")
    assert len({id(m) for m in rein.mlp}) == (3 if row == "core" else 1)


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("size", [(64, 64), (96, 160)])
def test_attach_and_detach(name, size):
    vit, images = reduced(name), torch.randn(2, 3, *size)
    base = extract_features(vit, images)[-1]
    rein = small_for(vit, scale=0.0).attach(vit)
    with torch.no_grad():  # with gradients SAM's attention takes another kernel
        assert torch.equal(base, extract_features(vit, images)[-1]), "scale 0 is the base model"
    rein.scale.data.fill_(0.5)
    changed = extract_features(vit, images)[-1]
    assert not torch.allclose(base, changed, atol=1e-3)
    changed.square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for n, p in rein.named_parameters()
        if not n.startswith(("merge", "token_to_query")))
    assert all(p.grad is None for p in vit.parameters())
    with torch.no_grad():
        assert torch.allclose(extract_features(vit, images)[-1], changed, atol=1e-5), "without gradients the same"
    rein.detach()
    assert torch.equal(base, extract_features(vit, images)[-1]), "detached is the base model"


@pytest.mark.parametrize("name", CLASSES)
def test_gradient_checkpointing_gives_the_same_gradients(name):
    vit, images, gradients = reduced(name), torch.randn(1, 3, 64, 64), []
    rein = small_for(vit, scale=0.5).attach(vit)
    for checkpointing in (False, True):
        vit.set_grad_checkpointing(checkpointing)
        rein.zero_grad()
        extract_features(vit, images)[-1].square().mean().backward()
        gradients.append(
            [p.grad.clone() for n, p in rein.named_parameters() if not n.startswith(("merge", "token_to_query"))])
    assert all(torch.allclose(a, b, atol=1e-6, rtol=1e-4) for a, b in zip(*gradients))
    assert gradients[0][0].abs().max() > 0


def test_wrong_backbone_is_refused():
    vit = reduced("tiny")
    with pytest.raises(ValueError, match="embed_dim is 32, the backbone's is 48, depth is 2, the backbone's is 4"):
        ReinG(32, 2).attach(vit)
    with pytest.raises(ValueError, match="num_prefix_tokens is 5"):
        ReinG(48, 4, num_prefix_tokens=5).attach(vit)
    rein = small_for(vit).attach(vit)
    with pytest.raises(ValueError, match="attached already"):
        rein.attach(vit)
    with pytest.raises(ValueError, match="another adapter"):
        small_for(vit).attach(vit)
    rein.detach()
    rein.detach()  # twice is once
    small_for(vit).attach(vit)


def test_prefix_tokens_pass_untouched():
    rein = ReinG(32, 2, num_tokens=6, rank=2, num_heads=2, query_dim=8, num_prefix_tokens=5, scale=1.0)
    tokens = torch.randn(2, 5 + 9, 32)
    for x in (tokens, tokens.bfloat16()):
        out = rein(x, 1)
        assert torch.equal(out[:, :5], x[:, :5]) and not torch.equal(out[:, 5:], x[:, 5:])


def test_maps_are_refined_like_rows():
    rein = ReinG(32, 2, num_tokens=6, rank=2, num_heads=2, query_dim=8, num_prefix_tokens=0, scale=1.0)
    maps = torch.randn(2, 3, 4, 32)
    assert torch.equal(rein(maps, 0), rein(maps.flatten(1, 2), 0).view(2, 3, 4, 32))


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("backbone", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("adapter", [torch.float32, torch.bfloat16])
def test_precisions_mix(backbone, adapter, autocast):
    vit, images = reduced("dinov2_large").to(backbone), torch.randn(1, 3, 64, 64).to(backbone)
    rein = small_for(vit, scale=0.5).to(adapter).attach(vit)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        out = extract_features(vit, images)[-1]
        with torch.no_grad():
            assert torch.allclose(out, extract_features(vit, images)[-1], atol=0.05, rtol=0.05)
    assert out.dtype == backbone and out.isfinite().all(), "blocks go on in the precision they came in"
    out.float().square().mean().backward()
    assert rein.tokens_a.grad.dtype == adapter and rein.tokens_a.grad.abs().max() > 0


def test_half_precision_backbone_gets_a_full_precision_correction():
    rein = ReinG(32, 1, num_tokens=6, rank=2, num_heads=2, query_dim=8, num_prefix_tokens=0, scale=0.5)
    tokens = torch.randn(2, 9, 32).bfloat16()
    assert torch.equal(rein(tokens, 0), rein(tokens.float(), 0).bfloat16()), "rounded once, at the end"


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # of vmap
def test_the_teacher_of_functional_call_computes_with_its_own_parameters():
    torch.manual_seed(0)
    rein, f = ReinG(32, 3, num_tokens=7, rank=4, num_heads=4, query_dim=8, scale=1.0), torch.randn(2, 10, 32)
    teacher = {name: p.detach() * 2 for name, p in rein.named_parameters()}
    alone = copy.deepcopy(rein)
    alone.load_state_dict(teacher)
    with torch.no_grad():
        student = rein(f, 1)
        for _ in range(2):  # in turn
            assert torch.equal(functional_call(rein, teacher, (f, 1)), alone(f, 1))
            assert torch.equal(rein(f, 1), student)
        torch._foreach_lerp_(list(teacher.values()), [p.detach() for p in rein.parameters()], 0.5)
        alone.load_state_dict(teacher)
        assert torch.equal(functional_call(rein, teacher, (f, 1)), alone(f, 1)), "the average moved"
        stacked = {name: torch.stack([p.detach(), teacher[name]]) for name, p in rein.named_parameters()}
        both = torch.func.vmap(lambda parameters: functional_call(rein, parameters, (f, 1)))(stacked)
        assert torch.allclose(both[0], student, atol=1e-5) and torch.allclose(both[1], alone(f, 1), atol=1e-5)


def test_a_copy_refines_its_own_backbone():
    vit, images = reduced("tiny"), torch.randn(1, 3, 64, 64)
    rein = small_for(vit, scale=0.5).attach(vit)
    model = nn.ModuleDict(dict(vit=vit, rein=rein))
    with torch.no_grad():
        before = extract_features(vit, images)[-1]
        twin = copy.deepcopy(model)
        for p in twin["rein"].parameters():
            p.add_(0.5)
        assert torch.equal(extract_features(vit, images)[-1], before)
        assert not torch.equal(extract_features(twin["vit"], images)[-1], before)
        twin["rein"].detach()
        assert torch.equal(extract_features(vit, images)[-1], before), "the original stays attached"
    assert set(rein.state_dict()) == {n for n, _ in rein.named_parameters()}


def test_gelu_stands_between_the_two_layers():
    "Eq. 13: W (GELU (W x)); without it one layer, eq. 7."
    torch.manual_seed(0)
    first, _, last = mlp = ReinG(32, 2, num_tokens=4, rank=2, num_heads=2).mlp[0]
    x = torch.randn(3, 32)
    assert torch.equal(mlp(x), last(torch.nn.functional.gelu(first(x))))
    assert isinstance(ReinG(32, 2, num_tokens=4, rank=2, num_heads=2, gelu=False).mlp[0], torch.nn.Linear)


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "eva02_tiny_patch14_224", "vit_small_patch16_dinov3"])
def test_alone_on_timms_own_model(name):
    """Of three families: it moves the features, it alone gets gradients, and detached the model is what it was."""
    torch.manual_seed(0)
    vit = timm.create_model(name, num_classes=0, depth=4).eval().requires_grad_(False)
    images = torch.randn(1, 3, *vit.pretrained_cfg["input_size"][1:])
    before = vit.forward_features(images)
    rein = ReinG(**sizes_of(vit)).attach(vit)
    with torch.no_grad():
        rein.scale += 0.1
    features = vit.forward_features(images)
    features.square().mean().backward()
    assert not torch.equal(features, before) and all(p.grad is None for p in vit.parameters())
    assert {n for n, p in rein.named_parameters() if p.grad is not None and p.grad.any()} >= {"scale"}
    rein.detach()
    assert torch.equal(vit.forward_features(images), before)
