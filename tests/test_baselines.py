"Every adapter on every backbone: neutral at first, removable, gradients only where they belong; each one's own things."
import copy
import functools

import pytest
import torch
import torch.nn.functional as F
from reduced import NAMES, reduced

from reinpp.models.backbones import extract_features
from reinpp.models.baselines import ADAPTERS, VPT, BitFit, LoRA, create_adapter
from reinpp.models.segmenter import tiny_segmenter
from reinpp.training.ema import run_teacher, start_teacher

# registers; qkv fused, its bias in parts; the same with layer scale; plain
MORE = ("vit_small_patch14_reg4_dinov2", "eva02_tiny_patch14_224", "vit_small_patch16_dinov3_qkvb", "test_vit")
SOME = ("dinov2_large", "clip_large", "eva02_large", "eva02_tiny_patch14_224", "dinov3_small", "sam_base",
    "internvl_6b")
SMALL = dict(rein_g=dict(num_tokens=10, rank=4, num_heads=4, query_dim=16), lora=dict(rank=4),
    adaptformer=dict(width=8), vpt=dict(num_tokens=6))
RIVALS = tuple(name for name in ADAPTERS if name not in ("freeze", "full"))
cached = functools.lru_cache(None)(reduced)


def make(name, adapter):
    "A reduced backbone, its state before, and the adapter, not attached. Skips what cannot be."
    vit = copy.deepcopy(cached(name))
    if adapter == "vpt" and name.startswith("sam"):
        pytest.skip("no place for prompts among maps")
    torch.manual_seed(0)
    tune = create_adapter(adapter, vit, **SMALL.get(adapter, {}))
    if adapter == "rein_g":
        tune.scale.data.zero_()  # its neutral start
    return vit, {k: v.clone() for k, v in vit.state_dict().items()}, tune


def trained(vit, tune):
    return {n: p for m in (vit, tune) for n, p in m.named_parameters() if p.requires_grad}


@torch.no_grad()
def disturb(vit, tune):
    "As if it had been trained."
    torch.manual_seed(1)
    for name, p in trained(vit, tune).items():
        p.fill_(0.5) if name == "scale" else p.add_(torch.randn(p.shape).to(p) * 0.2)


def last(vit, images):
    return extract_features(vit, images)[-1]


def hooks(vit):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in vit.modules())


@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("name", NAMES + MORE)
def test_neutral_trained_and_detached(name, adapter):
    vit, before, tune = make(name, adapter)
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        base = last(vit, images)
    count, attributes = hooks(vit), {n: set(m.__dict__) for n, m in vit.named_modules()}
    tune.attach(vit)
    assert list(vit.state_dict()) == list(before), "no key of the base changes"
    if adapter != "vpt":  # prompts take attention whatever they are: VPT has no neutral start
        with torch.no_grad():
            assert torch.equal(last(vit, images), base), "neutral at first"
    out = last(vit, images)
    biases = {n for n in before if n.startswith("blocks.") and n.endswith("bias") and "k_bias" not in n}
    own = {n for n, _ in tune.named_parameters() if not n.startswith(("merge", "token_to_query"))}  # theirs is the head
    if adapter == "freeze":
        assert not out.requires_grad
    else:
        out.square().mean().backward()
        moved = {n for m in (vit, tune) for n, p in m.named_parameters() if p.grad is not None}
        assert all(p.grad.isfinite().all() for p in trained(vit, tune).values() if p.grad is not None)
        if adapter == "full":
            assert {n for n in before if n.startswith("blocks.") and n.endswith("weight")} <= moved
        else:
            assert moved == (biases if adapter == "bitfit" else own)
    if adapter == "full": return
    disturb(vit, tune)
    with torch.no_grad():
        assert adapter == "freeze" or not torch.allclose(last(vit, images), base, atol=1e-3)
    tune.detach()
    with torch.no_grad():
        assert torch.equal(last(vit, images), base), "detached is the base model"
    after = vit.state_dict()
    assert list(after) == list(before) and all(torch.equal(after[k], before[k]) for k in before)
    assert hooks(vit) == count and not any(p.requires_grad for p in vit.parameters())
    left = {n: set(m.__dict__) - {"_reinpp_adapter"} for n, m in vit.named_modules()}
    assert left == attributes, "nothing is left behind"


@pytest.mark.parametrize("adapter", RIVALS)
@pytest.mark.parametrize("name", SOME)
def test_other_sizes_checkpointing_and_precisions(name, adapter):
    vit, _, tune = make(name, adapter)
    images, gradients = torch.randn(2, 3, 96, 160), []
    with torch.no_grad():
        base = last(vit, images)
    tune.attach(vit)
    if adapter != "vpt":
        with torch.no_grad():
            assert torch.equal(last(vit, images), base)
    disturb(vit, tune)
    for checkpointing in (False, True):
        vit.set_grad_checkpointing(checkpointing)
        last(vit, images).square().mean().backward()
        gradients.append({n: p.grad for n, p in trained(vit, tune).items() if p.grad is not None})
        for p in trained(vit, tune).values():
            p.grad = None
    assert gradients[0].keys() == gradients[1].keys()
    assert all(torch.allclose(g, gradients[1][n], atol=1e-5, rtol=1e-3) for n, g in gradients[0].items())
    vit.set_grad_checkpointing(False)
    with torch.no_grad():
        full = last(vit, images)
        with torch.autocast("cpu", torch.bfloat16):
            assert (last(vit, images) - full).norm() < 0.1 * full.norm()
        vit.to(torch.bfloat16)
        half = last(vit, images.bfloat16())
        assert half.dtype == torch.bfloat16 and (half - full).norm() < 0.1 * full.norm()
    with torch.autocast("cpu", torch.bfloat16):
        out = last(vit, images.bfloat16())
    assert out.dtype == torch.bfloat16
    out.float().square().mean().backward()
    for p in tune.parameters():
        assert p.dtype == torch.float32 and (p.grad is None or p.grad.dtype == torch.float32)


def changed_weights(vit, tune):
    "The base model with LoRA's changes written into the q and v rows of its weights."
    for layer, block in zip(tune.layers, vit.blocks):
        q, v = (layer[n].lora_B.weight @ layer[n].lora_A.weight * tune.config["alpha"] / tune.config["rank"]
            for n in "qv")
        attention = block.attn
        if getattr(attention, "qkv", None) is not None:
            attention.qkv.weight += torch.cat([q, torch.zeros_like(q), v])
        else:
            attention.q_proj.weight += q
            attention.v_proj.weight += v
    return vit


@pytest.mark.parametrize("name", NAMES + MORE)
def test_lora_changes_q_and_v_and_never_k(name):
    vit, _, tune = make(name, "lora")
    images, x = torch.randn(1, 3, 64, 64), torch.randn(1, 7, 48)
    tune.attach(vit)
    disturb(vit, tune)
    with torch.no_grad():
        for block in vit.blocks:
            if getattr(block.attn, "qkv", None) is not None:
                qkv = block.attn.qkv(x)
                before = F.linear(x, block.attn.qkv.weight, block.attn.qkv.bias)
                q, k, v = (qkv - before).chunk(3, -1)
                assert (k == 0).all() and q.abs().min() > 0 and v.abs().min() > 0
                assert torch.equal(qkv.chunk(3, -1)[1], before.chunk(3, -1)[1]), "bit for bit"
                # biases that are no part of the layer are added behind it
                assert getattr(block.attn, "q_bias", None) is None or block.attn.qkv_bias_separate
            else:
                assert torch.equal(block.attn.k_proj(x), F.linear(x, block.attn.k_proj.weight, block.attn.k_proj.bias))
        ours = last(vit, images)
        tune.detach()
        assert torch.allclose(last(changed_weights(vit, tune), images), ours, atol=1e-4)


def test_lora_is_pefts_on_projections_of_their_own():
    "Names, initial values, results and gradients, on a backbone whose q and v are layers of their own."
    peft = pytest.importorskip("peft")
    vit, _, tune = make("eva02_large", "lora")
    theirs, images = copy.deepcopy(vit), torch.randn(1, 3, 64, 64)
    torch.manual_seed(0)
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"])
    peft.inject_adapter_in_model(config, theirs)
    tune.attach(vit)
    ours = dict(tune.named_parameters())
    for name, p in theirs.named_parameters():
        if "lora_" in name:
            _, block, _, projection, matrix, _, _ = name.split(".")
            mine = ours.pop(f"layers.{block}.{projection[0]}.{matrix}.weight")
            assert torch.equal(mine, p) and p.any() == (matrix == "lora_A"), "drawn alike, B = 0"
            with torch.no_grad():
                p.add_(torch.randn(p.shape) * 0.2)
                mine.copy_(p)
            mine.peft = p
    assert not ours, "none but these"
    out = last(vit, images)
    assert torch.equal(out, last(theirs, images))
    out.square().mean().backward()
    last(theirs, images).square().mean().backward()
    assert all(torch.equal(p.grad, p.peft.grad) and p.grad.any() for p in tune.parameters())


ROWS = ("dinov2_large", "vit_small_patch14_reg4_dinov2", "eva02_large", "eva02_tiny_patch14_224", "dinov3_small",
    "pe_spatial_large")


@pytest.mark.parametrize("name", ROWS)
def test_prompts_nobody_looks_at_change_nothing(name):
    "With the prompts masked out of the attention every other token is as without them, and so are rotated positions."
    vit, _, tune = make(name, "vpt")
    block, prefix, m = vit.blocks[1], vit.num_prefix_tokens, tune.config["num_tokens"]
    n = prefix + 12
    rope = dict(rope=torch.randn(12, 2 * 48 // 3)) if getattr(vit, "rope", None) is not None else {}
    x, mask = torch.randn(2, n, 48), torch.ones(n + m, n + m, dtype=torch.bool)
    mask[:, prefix : prefix + m] = False
    with torch.no_grad():
        base = block(x, **rope)
        tune.attach(vit)
        assert torch.allclose(block(x, attn_mask=mask, **rope), base, atol=1e-5)
        assert block(x, **rope).shape == base.shape and not torch.allclose(block(x, **rope), base, atol=1e-4)
        tune.detach()
        assert torch.equal(block(x, **rope), base)


def test_prompts_need_rows():
    vit = copy.deepcopy(cached("sam_base"))
    count = hooks(vit)
    with pytest.raises(ValueError, match="pass maps"):
        create_adapter("vpt", vit).attach(vit)
    assert hooks(vit) == count
    create_adapter("adaptformer", vit).attach(vit)


def test_adaptformer_is_its_equation():
    vit, _, tune = make("dinov2_large", "adaptformer")
    block, x = vit.blocks[2], torch.randn(2, 9, 48)
    tune.attach(vit)
    disturb(vit, tune)
    with torch.no_grad():
        y = x + block.ls1(block.attn(block.norm1(x)))
        z = block.norm2(y)
        expected = y + block.ls2(block.mlp(z)) + 0.1 * tune.up[2](F.relu(tune.down[2](z)))
        tune._inputs.clear()
        assert torch.allclose(block(x), expected, atol=1e-5) and not tune._inputs


def test_bitfit_keeps_what_it_learned():
    vit, before, tune = make("eva02_tiny_patch14_224", "bitfit")
    images = torch.randn(1, 3, 64, 64)
    tune.attach(vit)
    names = set(trained(vit, tune))
    assert {"blocks.0.attn.q_bias", "blocks.0.attn.v_bias", "blocks.3.norm2.bias"} <= names
    assert all(n.startswith("blocks.") for n in names)
    disturb(vit, tune)
    with torch.no_grad():
        learned = last(vit, images)
    tune.detach()
    assert all(torch.equal(v, before[k]) for k, v in vit.state_dict().items())
    tune.attach(vit)
    with torch.no_grad():
        assert torch.equal(last(vit, images), learned)


@pytest.mark.parametrize("hold", ["int8", "int4"])
def test_beside_packed_weights(hold):
    pytest.importorskip("torchao")
    vit = reduced("dinov2_large", embed_dim=64, num_heads=4, hold=hold)
    for adapter in RIVALS:
        tune = create_adapter(adapter, vit, **SMALL.get(adapter, {})).attach(vit)
        with torch.autocast("cpu", torch.bfloat16):
            last(vit, torch.randn(1, 3, 64, 64)).float().square().mean().backward()
        gradients = [p.grad for n, p in trained(vit, tune).items() if not n.startswith(("merge", "token_to_query"))]
        assert gradients and all(g is not None and g.isfinite().all() for g in gradients), adapter
        tune.detach()
    with pytest.raises(ValueError, match="packed into integers"):
        create_adapter("full", vit).attach(vit)
    assert not any(p.requires_grad for p in vit.parameters())


def test_one_adapter_at_a_time_and_readable_refusals():
    vit = copy.deepcopy(cached("dinov2_large"))
    for adapter in ADAPTERS:
        tune = create_adapter(adapter, vit, **SMALL.get(adapter, {})).attach(vit)
        with pytest.raises(ValueError, match="attached already"):
            tune.attach(vit)
        with pytest.raises(ValueError, match="carries another adapter"):
            create_adapter("lora", vit).attach(vit)
        tune.detach()
    with pytest.raises(ValueError, match="is unknown: use one of rein_g, freeze"):
        create_adapter("prefix", vit)
    for adapter in ADAPTERS:
        with pytest.raises(ValueError, match=f"adapter='{adapter}' does not take these arguments"):
            create_adapter(adapter, vit, colour=1)
    with pytest.raises(ValueError, match="embed_dim is 64, the backbone's is 48"):
        LoRA(64, 4).attach(vit)
    with pytest.raises(ValueError, match="depth is 3, the backbone's is 4"):
        VPT(48, 3).attach(vit)
    for block in vit.blocks:
        block.attn = torch.nn.Identity()
    with pytest.raises(ValueError, match="no qkv of width 144"):
        LoRA(48, 4).attach(vit)
    assert vit._reinpp_adapter is None and hooks(vit) == 0
    with pytest.raises(ValueError, match="no bias to train"):
        BitFit().attach(copy.deepcopy(vit).apply(lambda m: hasattr(m, "bias") and setattr(m, "bias", None)))


def segmenter_with(adapter):
    torch.manual_seed(0)
    return tiny_segmenter(adapter)


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_in_a_segmenter(adapter, tmp_path):
    segmenter, images = segmenter_with(adapter), torch.rand(1, 3, 64, 64)
    untrained = segmenter.predict(images)
    teacher = start_teacher(segmenter)
    with torch.no_grad():
        for p in teacher.values():
            p.add_(torch.randn_like(p) * 0.05)
    with torch.no_grad():
        seen = run_teacher(segmenter, teacher, images)[1].mask_logits[-1]
    assert torch.equal(segmenter.predict(images), untrained), "the student is left as it was"
    with torch.no_grad():
        for name, p in segmenter.named_parameters():
            if name in teacher:
                p.copy_(teacher[name])
        assert torch.equal(segmenter(images).mask_logits[-1], seen), "the teacher's parameters reach every part"
    learned = segmenter.predict(images)
    segmenter.save_adapter(tmp_path)
    again = segmenter_with(adapter).load_adapter(tmp_path)
    assert torch.equal(again.predict(images), learned) and set(again.trained_state()) == set(teacher)
    twin = copy.deepcopy(segmenter)
    with torch.no_grad():
        for p in twin.trained_state().values():
            p.add_(0.1)
    assert torch.equal(segmenter.predict(images), learned)
    assert not torch.equal(twin.predict(images), learned), "a copy has an adapter of its own"
