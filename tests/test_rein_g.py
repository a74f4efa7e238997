"Rein-G against the reference numbers, and on backbones of several timm classes."
from pathlib import Path

import pytest
import timm
import torch
from safetensors import safe_open

from reinpp.backbones import extract_features
from reinpp.rein_g import ReinG

FIXTURE = Path(__file__).resolve().parents[2] / "shared" / "fixtures" / "rein_reference.safetensors"


@pytest.mark.skipif(not FIXTURE.exists(), reason="no reference file beside the checkout")
@pytest.mark.parametrize("prefix", ["", "backbone.reins."])
def test_equals_the_reference(prefix):
    with safe_open(FIXTURE, "pt") as f:
        numbers, meta = {k: f.get_tensor(k) for k in f.keys()}, f.metadata()
    state = {prefix + k.removeprefix("state."): v for k, v in numbers.items() if k.startswith("state.")}
    rein = ReinG.from_official(state | ({"decode_head.x": torch.zeros(1)} if prefix else {}), num_prefix_tokens=int(meta["prefix_tokens"]))
    for layer in range(int(meta["num_layers"])):
        assert (rein(numbers[f"feats.{layer}"], layer) - numbers[f"refined.{layer}"]).abs().max() < 1e-9
    assert (rein.queries() - numbers["queries"]).abs().max() < 1e-9
    # the link is interleaved: reading `merge` as three blocks gives other queries
    q = rein.token_to_query(rein.tokens())
    blocks = rein.merge(torch.cat([q.amax(0), q.mean(0), q[-1]], -1))
    assert (blocks - numbers["queries"]).abs().max() > 1e-3


BACKBONES = {
    "plain": dict(name="test_vit", patch_size=16),
    "dinov2": dict(name="vit_small_patch14_dinov2", embed_dim=48, depth=3, num_heads=3, patch_size=16),
    "registers": dict(name="vit_small_patch14_reg4_dinov2", embed_dim=48, depth=3, num_heads=3, patch_size=16),
    "clip": dict(name="vit_base_patch16_clip_quickgelu_224", embed_dim=48, depth=3, num_heads=3),
    "eva02": dict(name="eva02_tiny_patch14_224", embed_dim=48, depth=3, num_heads=3, patch_size=16),
}


def reduced(kind):
    options = dict(BACKBONES[kind])
    torch.manual_seed(0)
    return timm.create_model(options.pop("name"), num_classes=0, img_size=64, dynamic_img_size=True, **options).eval().requires_grad_(False)


@pytest.mark.parametrize("kind", BACKBONES)
def test_attach_and_detach(kind):
    vit = reduced(kind)
    depth, last = len(vit.blocks), (len(vit.blocks) - 1,)
    for size in ((64, 64), (96, 160)):
        images = torch.randn(2, 3, *size)
        base = extract_features(vit, images, last)[0]
        rein = ReinG(vit.embed_dim, depth, num_tokens=10, rank=4, num_heads=4, query_dim=16, num_prefix_tokens=vit.num_prefix_tokens, scale=0.0).attach(vit)
        assert torch.equal(base, extract_features(vit, images, last)[0]), "scale 0 is the base model"
        rein.scale.data.fill_(0.5)
        changed = extract_features(vit, images, last)[0]
        assert not torch.allclose(base, changed, atol=1e-3)
        changed.square().mean().backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for n, p in rein.named_parameters() if not n.startswith(("merge", "token_to_query")))
        assert all(p.grad is None for p in vit.parameters())
        rein.detach()
        assert torch.equal(base, extract_features(vit, images, last)[0]), "detached is the base model"


@pytest.mark.parametrize("kind", BACKBONES)
def test_gradient_checkpointing_gives_the_same_gradients(kind):
    vit, images, gradients = reduced(kind), torch.randn(1, 3, 64, 64), []
    torch.manual_seed(1)
    rein = ReinG(vit.embed_dim, len(vit.blocks), num_tokens=10, rank=4, num_heads=4, query_dim=16, num_prefix_tokens=vit.num_prefix_tokens, scale=0.5).attach(vit)
    for checkpointing in (False, True):
        vit.set_grad_checkpointing(checkpointing)
        rein.zero_grad()
        extract_features(vit, images, (len(vit.blocks) - 1,))[0].square().mean().backward()
        gradients.append(rein.tokens_a.grad.clone())
    assert torch.allclose(*gradients, atol=1e-7) and gradients[0].abs().max() > 0


def test_wrong_backbone_is_refused():
    vit = reduced("plain")
    with pytest.raises(ValueError, match="blocks, width"): ReinG(32, 2).attach(vit)
    rein = ReinG(vit.embed_dim, len(vit.blocks), num_prefix_tokens=vit.num_prefix_tokens).attach(vit)
    with pytest.raises(ValueError, match="attached already"): rein.attach(vit)
    with pytest.raises(ValueError, match="another adapter"): ReinG(vit.embed_dim, len(vit.blocks), num_prefix_tokens=vit.num_prefix_tokens).attach(vit)


def test_prefix_tokens_pass_untouched():
    rein = ReinG(32, 2, num_tokens=6, rank=2, num_heads=2, query_dim=8, num_prefix_tokens=5, scale=1.0)
    tokens = torch.randn(2, 5 + 9, 32)
    out = rein(tokens, 1)
    assert torch.equal(out[:, :5], tokens[:, :5]) and not torch.equal(out[:, 5:], tokens[:, 5:])
