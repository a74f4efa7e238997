"Rein-G against the reference numbers, on backbones of several timm classes, and what it keeps at inference."
import copy
from pathlib import Path

import pytest
import torch
from reduced import reduced
from safetensors import safe_open
from torch import nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from reinpp.models.backbones import extract_features
from reinpp.models.rein_g import ReinG

FIXTURE = Path(__file__).resolve().parents[2] / "shared" / "fixtures" / "rein_reference.safetensors"
CLASSES = ("dinov2_large", "vit_small_patch14_reg4_dinov2", "clip_large", "eva02_large", "eva02_tiny_patch14_224",
    "radio_giant", "internvl_6b", "sam_base", "dinov3_small", "pe_spatial_large")
TABLE_V = {"core": dict(num_heads=1, gelu=False, low_rank=False, share_mlp=False, link_queries=False),
    "link": dict(num_heads=1, gelu=False, low_rank=False),
           "lora": dict(num_heads=1, gelu=False), "multi-head": dict(gelu=False), "gelu": {}}


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
        with torch.no_grad():
            assert (rein(numbers[f"feats.{layer}"], layer) - numbers[
                f"refined.{layer}"]).abs().max() < 1e-9, "at inference, too"
    assert (rein.queries() - numbers["queries"]).abs().max() < 1e-9
    # the link is interleaved: reading `merge` as three blocks gives other queries
    q = rein.token_to_query(rein.tokens())
    blocks = rein.merge(torch.cat([q.amax(0), q.mean(0), q[-1]], -1))
    assert (blocks - numbers["queries"]).abs().max() > 1e-3


@pytest.mark.parametrize("row", TABLE_V)
def test_every_row_of_table_v_equals_its_definition(row):
    torch.manual_seed(0)
    rein, f = ReinG(32, 3, num_tokens=7, rank=4, query_dim=8, **dict(num_heads=4)
        | TABLE_V[row]).double(), torch.randn(2, 10, 32, dtype=torch.float64)
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
    with torch.no_grad():
        # with gradients SAM's attention takes another kernel
        assert torch.equal(base, extract_features(vit, images)[-1]), "scale 0 is the base model"
    rein.scale.data.fill_(0.5)
    changed = extract_features(vit, images)[-1]
    assert not torch.allclose(base, changed, atol=1e-3)
    changed.square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for n, p in rein.named_parameters()
        if not n.startswith(("merge", "token_to_query")))
    assert all(p.grad is None for p in vit.parameters())
    with torch.no_grad():
        assert torch.allclose(extract_features(vit, images)[-1], changed,
            atol=1e-5), "with and without gradients the same"
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
    assert all(torch.allclose(a, b, atol=1e-6, rtol=1e-4) for a,
        b in zip(*gradients)) and gradients[0][0].abs().max() > 0


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


# --- what is kept at inference
# ------------------------------------------------------------------------------------------------


def step(optimizer, **arguments):
    "An optimiser step whose gradients were there before the values were kept: no pass with gradients comes between."
    def change(rein):
        for p in rein.parameters():
            p.grad = torch.ones_like(p)
        optimizer(rein.parameters(), lr=0.1, **arguments).step()
    return change


@torch.no_grad()
def in_place(rein):
    [p.add_(0.1) for p in rein.parameters()]
def through_data(rein):
    [p.data.mul_(1.5) for p in rein.parameters()]
@torch.inference_mode()
def in_inference_mode(rein):
    [p.mul_(1.5) for p in rein.parameters()]
def load(rein):
    rein.load_state_dict({k: v + 0.1 for k, v in rein.state_dict().items()})
def load_assigned(rein):
    rein.load_state_dict({k: v + 0.1 for k, v in rein.state_dict().items()}, assign=True)
def other_parameter(rein):
    for linear in rein.token_to_value:
        linear.bias = nn.Parameter(linear.bias.detach() + 1)
def flat(rein):
    vector = parameters_to_vector(rein.parameters()).detach()
    vector_to_parameters(vector * 2, rein.parameters())
def lerp(rein):
    torch._foreach_lerp_([p.detach() for p in rein.parameters()], [torch.ones_like(p) for p in rein.parameters()], 0.1)
def to_double(rein):
    rein.double()
def to_half_and_back(rein):
    rein.bfloat16().float()


CHANGES = dict(sgd=step(torch.optim.SGD), adamw=step(torch.optim.AdamW),
    adamw_loop=step(torch.optim.AdamW, foreach=False), adamw_fused=step(torch.optim.AdamW, fused=True),
               in_place=in_place, through_data=through_data, in_inference_mode=in_inference_mode, load=load,
               load_assigned=load_assigned, other_parameter=other_parameter,
               flat=flat, lerp=lerp, to_double=to_double, to_half_and_back=to_half_and_back)


@pytest.mark.parametrize("row", ["gelu", "core"])
@pytest.mark.parametrize("change", CHANGES)
def test_kept_values_never_go_stale(change, row):
    torch.manual_seed(0)
    rein, f = ReinG(32, 3, num_tokens=7, rank=4, query_dim=8, scale=1.0, **dict(num_heads=4)
        | TABLE_V[row]).eval(), torch.randn(2, 10, 32)
    with torch.no_grad():
        before = [rein(f, layer) for layer in range(3)]
    CHANGES[change](rein)
    with torch.no_grad():
        for layer in (1, 0, 2, 1):
            now, fresh = rein(f, layer), copy.deepcopy(rein)(f, layer)
            assert torch.equal(now, fresh) and not torch.equal(now, before[layer])


def counted(rein):
    calls = []
    for linear in rein.token_to_value:
        linear.register_forward_hook(lambda *_: calls.append(1))
    return calls


def test_values_are_computed_once_without_gradients_and_anew_with():
    rein, f = ReinG(32, 3, num_tokens=7, rank=4, num_heads=4, query_dim=8), torch.randn(2, 10, 32)
    calls = counted(rein)
    for context in (torch.no_grad(), torch.inference_mode(), torch.no_grad()):
        with context:
            [rein(f, layer) for layer in range(3) for _ in range(4)]
    assert len(calls) == 3
    for _ in range(2):
        rein(f, 1).sum().backward()
    assert len(calls) == 5 and rein.tokens_a.grad.abs().max() > 0
    with torch.no_grad():
        rein(f, 1)
    assert len(calls) == 6, "a pass with gradients forgets"
    rein.eval()
    with torch.no_grad():
        rein(f, 1)
    assert len(calls) == 7, "so does eval()"


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # of vmap
def test_the_teacher_of_functional_call_gets_its_own_values():
    torch.manual_seed(0)
    rein, f = ReinG(32, 3, num_tokens=7, rank=4, num_heads=4, query_dim=8, scale=1.0).eval(), torch.randn(2, 10, 32)
    teacher = {name: p.detach() * 2 for name, p in rein.named_parameters()}
    alone = copy.deepcopy(rein)
    alone.load_state_dict(teacher)
    with torch.no_grad():
        student = rein(f, 1)
        for _ in range(2):  # in turn
            assert torch.equal(torch.func.functional_call(rein, teacher, (f, 1)), alone(f, 1))
            assert torch.equal(rein(f, 1), student)
        torch._foreach_lerp_(list(teacher.values()), [p.detach() for p in rein.parameters()], 0.5)
        alone.load_state_dict(teacher)
        assert torch.equal(torch.func.functional_call(rein, teacher, (f, 1)), alone(f, 1)), "the average moved"
        for scale in (3, 4):  # tensors that die at once may leave their address to the next ones
            fresh = {name: p.detach() * scale for name, p in rein.named_parameters()}
            alone.load_state_dict(fresh)
            assert torch.equal(torch.func.functional_call(rein, fresh, (f, 1)), alone(f, 1))
            del fresh
        stacked = {name: torch.stack([p.detach(), teacher[name]]) for name, p in rein.named_parameters()}
        both = torch.func.vmap(lambda parameters: torch.func.functional_call(rein, parameters, (f, 1)))(stacked)
        assert torch.allclose(both[0], student, atol=1e-5) and torch.allclose(both[1],
            torch.func.functional_call(rein, teacher, (f, 1)), atol=1e-5)
    with torch.inference_mode():
        odd = {name: p * 5 for name, p in rein.named_parameters()}  # these have no version counter
        first = torch.func.functional_call(rein, odd, (f, 1))
        for p in odd.values():
            p.mul_(2)
        assert not torch.equal(torch.func.functional_call(rein, odd, (f, 1)), first)


def test_autocast_and_types_do_not_share_values():
    rein, f = ReinG(32, 3, num_tokens=7, rank=4, num_heads=4, query_dim=8, scale=1.0).eval(), torch.randn(2, 10, 32)
    with torch.no_grad():
        plain = rein(f, 1)
        with torch.autocast("cpu", torch.bfloat16):
            cast = rein(f, 1)
            assert torch.equal(cast, copy.deepcopy(rein)(f, 1)) and not torch.equal(cast, plain)
            assert rein(f.bfloat16(), 1).dtype == torch.bfloat16
        with torch.autocast("cpu", torch.float16):
            assert torch.equal(rein(f, 1), copy.deepcopy(rein)(f, 1))
        assert torch.equal(rein(f, 1), plain)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_kept_values_move_to_the_gpu():
    rein, f = ReinG(32, 3, num_tokens=7, rank=4, num_heads=4, query_dim=8, scale=1.0).eval(), torch.randn(2, 10, 32)
    with torch.no_grad():
        here = rein(f, 1)
        rein.cuda()
        assert torch.allclose(rein(f.cuda(), 1).cpu(), here, atol=1e-3)
        for name in ("sgd", "adamw", "adamw_fused", "in_place", "load", "flat", "lerp", "to_half_and_back"):
            with torch.enable_grad():
                CHANGES[name](rein)
            assert torch.equal(rein(f.cuda(), 1), copy.deepcopy(rein)(f.cuda(), 1)), name
        rein.cpu()
        assert torch.equal(rein(f, 1), copy.deepcopy(rein)(f, 1))


def test_a_copy_keeps_nothing_and_refines_its_own_backbone():
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
    assert set(rein.state_dict()) == {n for n, _ in rein.named_parameters()}, "nothing kept is saved"
