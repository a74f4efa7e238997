"Every named backbone, reduced: with and without Rein-G, gradients, precisions, sizes; weights from files; InternVL."
import json
import sys

import pytest
import torch
import torch.nn.functional as F
from benchmarks.levers import held_bytes
from reduced import NAMES, reduced
from safetensors.torch import save_file

from reinpp.files import read_checkpoint
from reinpp.models.backbones import (
    BACKBONES,
    convert_internvit,
    create_backbone,
    extract_features,
    official_resize,
    other_spec,
    patch_size_of,
)
from reinpp.models.rein_g import ReinG

SIZES = ((64, 64), (96, 160))
FEW = dict(embed_dim=48, depth=4, num_heads=3)


def rein_for(vit, scale=0.0):
    torch.manual_seed(1)
    return ReinG(vit.embed_dim, len(vit.blocks), num_tokens=10, rank=4, num_heads=4, query_dim=16,
        num_prefix_tokens=vit.num_prefix_tokens, scale=scale).attach(vit)


def pictures(size=(64, 64), count=2):
    return torch.randn(count, 3, *size, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("name", NAMES)
def test_rein_g_on_every_backbone(name):
    vit = reduced(name)
    keys = vit.state_dict().keys()
    patch, prefix = patch_size_of(vit), vit.num_prefix_tokens
    for size in SIZES:
        images = pictures(size)
        base = extract_features(vit, images)
        assert all(m.shape == (2, 48, size[0] // patch, size[1] // patch) and m.isfinite().all() for m in base)
        assert not torch.allclose(base[0][0], base[0][1], atol=1e-3), "two images, two answers"
        rein = rein_for(vit)
        with torch.no_grad():  # with gradients SAM's attention takes another kernel, which rounds otherwise
            off = extract_features(vit, images)
        assert all(torch.equal(a, b) for a, b in zip(base, off)), "scale 0 is the base model, bit for bit"
        assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(base, extract_features(vit, images)))
        rein.scale.data.fill_(0.5)
        refine, seen = rein.forward, {}

        def watched(tokens, layer, refine=refine, seen=seen):
            out = refine(tokens, layer)
            seen[layer] = tokens.detach().clone(), out.detach()
            return out

        rein.forward = watched
        given = vit.blocks[-1].register_forward_pre_hook(
            lambda module, args, seen=seen: seen.update(given=args[0].detach().clone()))
        changed = extract_features(vit, images)
        given.remove()
        assert torch.equal(seen.pop("given"), seen[len(vit.blocks) - 2][1]), "the next block reads the refined tokens"
        assert seen.keys() == set(range(len(vit.blocks)))
        for before, refined in seen.values():
            assert not torch.equal(before, refined)
            if before.ndim == 3:
                assert torch.equal(before[:, :prefix], refined[:, :prefix]), "prefix tokens pass untouched"
        assert all(not torch.allclose(a, b, atol=1e-3) for a, b in zip(base, changed))
        sum(m.square().mean() for m in changed).backward()
        rein.queries().sum().backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in rein.parameters()), "Rein-G is trained"
        assert all(p.grad is None and not p.requires_grad for p in vit.parameters()), "and nothing else"
        rein.detach()
        off = extract_features(vit, images)
        assert all(torch.equal(a, b) for a, b in zip(base, off)), "detached is the base model, bit for bit"
        assert vit.state_dict().keys() == keys


@pytest.mark.parametrize("name", NAMES)
def test_checkpointing_and_precision(name):
    vit, images, gradients, maps = reduced(name), pictures(count=1), [], []
    rein = rein_for(vit, scale=0.5)
    for checkpointing in (False, True):
        vit.set_grad_checkpointing(checkpointing)
        rein.zero_grad()
        out = extract_features(vit, images)
        sum(m.square().mean() for m in out).backward()
        gradients.append(torch.cat([p.grad.flatten() for p in (rein.tokens_a, rein.tokens_b, rein.scale)]))
        maps.append(out[-1].detach())
    assert torch.equal(*maps) and torch.allclose(*gradients, atol=1e-7, rtol=1e-5) and gradients[0].abs().max() > 0
    half = reduced(name, hold="bf16")
    rein.detach()
    rein.zero_grad()
    rein.attach(half)
    matrices = {id(m.weight) for m in half.blocks.modules() if isinstance(m, torch.nn.Linear)}
    assert len(matrices) >= 4 * len(half.blocks) and not any(p.requires_grad for p in half.parameters())
    assert all((p.dtype == torch.bfloat16) == (id(p) in matrices) for p in half.parameters()), "the rest stays in fp32"
    out = extract_features(half, images)
    assert all(m.dtype == torch.float32 for m in out) and ((out[-1] - maps[0]).norm() / maps[0].norm()) < 0.05
    sum(m.square().mean() for m in out).backward()
    gradient = torch.cat([p.grad.flatten() for p in (rein.tokens_a, rein.tokens_b, rein.scale)])
    assert gradient.dtype == torch.float32 and F.cosine_similarity(gradient, gradients[0], dim=0) > 0.97


def changed_by_the_first_refinement(vit, images):
    "Share of a stream's numbers that Rein-G changes after block 0 at the scale it starts with; the stream's type."
    rein, seen = rein_for(vit, scale=0.001), []
    refine = rein.forward
    rein.forward = lambda tokens, layer: seen.append((tokens, refine(tokens, layer))) or seen[-1][1]
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        extract_features(vit, images)
    rein.detach()
    before, after = seen[0]
    prefix = vit.num_prefix_tokens if before.ndim == 3 else 0
    return (before != after)[:, prefix:].float().mean().item(), after.dtype


@pytest.mark.parametrize("hold", ["fp32", "bf16"])
@pytest.mark.parametrize("name", NAMES)
def test_the_stream_keeps_the_first_refinements(name, hold):
    "Trap: a residual stream in bfloat16, where nearly all of a refinement of a thousandth is rounded away."
    share, dtype = changed_by_the_first_refinement(reduced(name, hold=hold), pictures())
    assert dtype == torch.float32 and share >= .99
    share, dtype = changed_by_the_first_refinement(reduced(name).to(torch.bfloat16), pictures().bfloat16())
    assert dtype == torch.bfloat16 and share < .1


@pytest.mark.parametrize("hold", ["bf16", "int8", "int4"])
def test_learned_weights_keep_the_first_refinements(hold):
    if hold != "bf16": pytest.importorskip("torchao")
    vit = create_backbone("tiny", image_size=64, hold=hold)
    share, dtype = changed_by_the_first_refinement(vit, pictures())
    print(f"{hold}: {share:.2%} of the first refinement arrives")
    assert dtype == torch.float32 and share >= .99


@pytest.mark.parametrize("hold", ["int8", "int4"])
@pytest.mark.parametrize("name", ["dinov2_large", "eva02_large", "dinov3_7b", "internvl_6b", "sam_large"])
def test_held_in_few_bits(name, hold):
    pytest.importorskip("torchao")
    sizes = dict(embed_dim=64, num_heads=4)
    full, held, images = reduced(name, **sizes), reduced(name, hold=hold, **sizes), pictures()
    assert held_bytes(held.blocks) < {"int8": 0.45, "int4": 0.4}[hold] * held_bytes(full.blocks)
    rein = rein_for(held)
    reference, maps = extract_features(full, images)[-1], extract_features(held, images)
    assert (maps[-1] - reference).norm() / reference.norm() < {"int8": 0.06, "int4": 0.35}[hold]
    rein.scale.data.fill_(0.5)
    sum(m.square().mean() for m in extract_features(held, images)).backward()
    reached = rein.tokens_a.grad.abs().amax((1, 2)).min() > 0
    assert reached, "gradients reach the first layer's tokens through the packed blocks"


def test_few_bits_without_torchao(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchao.quantization", None)
    with pytest.raises(ImportError, match="pip install"):
        create_backbone("tiny", pretrained=False, hold="int8")


def test_wrong_arguments_say_so():
    refusals = (
        (dict(name="dinov2_huge"), "unknown: use one of"),
        (dict(name="tiny", hold="int3"), "use one of fp32"),
        (dict(name="tiny", patch_resize="nearest"), "patch_resize='nearest' is unknown: use one of timm, official"),
        (dict(name="tiny", device="meta"), "pretrained=False"),
        (dict(name="sam2_hiera_tiny"), "stages of different widths"),
        (dict(name="resnet18"), "Rein-G"),
        (dict(name="naflexvit_base_patch16_siglip"), "no plain vision transformer"),
        (dict(name="vit_base_patch16_224.nobody"), "nobody"),
    )
    for arguments, message in refusals:
        with pytest.raises(ValueError, match=message) as caught:
            create_backbone(**arguments)
        assert "\n" not in str(caught.value)
    vit = reduced("dinov2_small")
    with pytest.raises(ValueError, match="64x70 is not a multiple of the patch"):
        extract_features(vit, torch.zeros(1, 3, 64, 70))


def test_any_timm_name():
    for name in ("vit_small_patch14_reg4_dinov2", "samvit_base_patch16", "test_vit"):
        sizes = FEW if not name.startswith("sam") else FEW | dict(window_size=3, global_attn_indexes=(3,))
        vit = create_backbone(name, 64, 16, pretrained=False, **sizes)
        assert extract_features(vit, pictures((32, 48)))[0].shape == (2, 48, 2, 3)
    assert other_spec("vit_base_patch16_224").patch_size is None


def test_meta_takes_no_memory():
    for name, millions in (("internvl_6b", 5906), ("dinov3_7b", 6716)):
        vit = create_backbone(name, device="meta", pretrained=False)
        assert all(p.is_meta for p in vit.parameters())
        assert round(sum(p.numel() for p in vit.parameters()) / 1e6) == millions


# ---- weights

def test_weights_from_files(tmp_path):
    source = reduced("dinov2_large")
    state = {k: v.clone() for k, v in source.state_dict().items()}
    save_file(state, tmp_path / "a.safetensors")
    torch.save(state, tmp_path / "b.pth")
    torch.save({"model": state}, tmp_path / "c.bin")
    torch.save(state, tmp_path / "d.pt", _use_new_zipfile_serialization=False)
    shards = tmp_path / "shards"
    shards.mkdir()
    keys = list(state)
    for i in range(3):
        torch.save({k: state[k] for k in keys[i::3]}, shards / f"pytorch_model-{i}.bin")
    index = dict(weight_map={k: f"pytorch_model-{i % 3}.bin" for i, k in enumerate(keys)})
    (shards / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    for file in ("a.safetensors", "b.pth", "c.bin", "d.pt", "shards", "shards/pytorch_model.bin.index.json"):
        loaded = create_backbone("dinov2_large", 64, weights=tmp_path / file, **FEW)
        assert all(torch.equal(v, state[k]) for k, v in loaded.state_dict().items()), file
    (shards / "pytorch_model-1.bin").unlink()
    with pytest.raises(FileNotFoundError, match="pytorch_model-1.bin"):
        read_checkpoint(shards)
    (tmp_path / "a.safetensors").write_bytes((tmp_path / "a.safetensors").read_bytes()[:-9])
    (tmp_path / "b.pth").write_bytes((tmp_path / "b.pth").read_bytes()[:5000])
    for file in ("a.safetensors", "b.pth"):
        with pytest.raises(ValueError, match=f"{file}: .*damaged") as caught:
            read_checkpoint(tmp_path / file)
        assert "\n" not in str(caught.value)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        create_backbone("dinov2_large", weights=tmp_path / "nowhere.pth", **FEW)
    (empty := tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="no .index.json"):
        read_checkpoint(empty)


def test_keys_that_do_not_fit_are_named(tmp_path):
    state = {k: v.clone() for k, v in reduced("clip_large").state_dict().items()}
    save_file({k: v for k, v in state.items() if "blocks.2.attn.qkv" not in k} | {"surprise": torch.zeros(1)},
        tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match="missing 2 keys .blocks.2.attn.qkv.weight.*unexpected 1 keys .surprise"):
        create_backbone("clip_large", 64, weights=tmp_path / "a.safetensors", **FEW)
    save_file(state | {"blocks.1.norm1.weight": torch.zeros(7)}, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match="a.safetensors does not fit .*blocks.1.norm1.weight"):
        create_backbone("clip_large", 64, weights=tmp_path / "a.safetensors", **FEW)
    save_file(state | {"head.weight": torch.zeros(10, 48), "head.bias": torch.zeros(10)}, tmp_path / "a.safetensors")
    create_backbone("clip_large", 64, weights=tmp_path / "a.safetensors", **FEW)  # nobody here wants a classifier


class Bomb:
    def __reduce__(self):
        return (exec, ("import builtins; builtins.bomb_went_off = True",))


def test_pickles_are_not_executed(tmp_path):
    import builtins
    torch.save({"state_dict": {"a": torch.zeros(1)}, "bomb": Bomb()}, tmp_path / "bomb.pth")
    with pytest.raises(ValueError, match="bomb.pth: not loaded.*more than tensors"):
        create_backbone("dinov2_large", weights=tmp_path / "bomb.pth")
    assert not hasattr(builtins, "bomb_went_off")


def test_no_network_says_where_to_get_and_where_to_put(monkeypatch, tmp_path):
    import reinpp.models.backbones as module
    monkeypatch.setattr(module, "data_folder", lambda: tmp_path)
    def offline(hub, **options): raise OSError("no route to host")
    monkeypatch.setattr(module.timm.models, "load_state_dict_from_hf", offline)
    monkeypatch.setattr(module.timm, "create_model", lambda *args, **options: pytest.fail("made without its weights"))
    with pytest.raises(FileNotFoundError) as caught:
        create_backbone("dinov2_large")
    message = str(caught.value)
    assert all(part in message for part in ("huggingface.co/timm/vit_large_patch14_dinov2.lvd142m",
        str(tmp_path / "weights" / "vit_large_patch14_dinov2.lvd142m.safetensors"), "weights=<file>"))
    with pytest.raises(FileNotFoundError, match="pretrain_tiny"):
        create_backbone("tiny")


def test_a_file_in_the_data_folder_is_found(monkeypatch, tmp_path):
    import reinpp.models.backbones as module
    monkeypatch.setattr(module, "data_folder", lambda: tmp_path)
    (tmp_path / "weights").mkdir()
    state = {k: v.clone() for k, v in reduced("dinov3_small").state_dict().items()}
    save_file(state, tmp_path / "weights" / f"{BACKBONES['dinov3_small'].timm_name}.safetensors")
    loaded = create_backbone("dinov3_small", 64, **FEW)
    assert all(torch.equal(v, state[k]) for k, v in loaded.state_dict().items())


# ---- patches of another size

@pytest.mark.parametrize("old, new", [(14, 16), (16, 14)])
@pytest.mark.parametrize("name", ["dinov2_large", "eva02_large"])
def test_patch_resize_both_ways(name, old, new, tmp_path):
    own = 518 if name == "dinov2_large" else 224
    source = create_backbone(name, own, old, pretrained=False, **FEW)
    with torch.no_grad():
        source.patch_embed.proj.bias.zero_()
        source.pos_embed.normal_()
    file = tmp_path / "w.safetensors"
    save_file({k: v.clone() for k, v in source.state_dict().items()}, file)
    def make(way):
        return create_backbone(name, (new * 8, new * 4), new, weights=file, patch_resize=way, **FEW)
    if old == 16:  # made at its own patch first, which for this test's file is not the published one
        official = official_resize(create_backbone(name, own, old, weights=file, **FEW), (new * 8, new * 4), new)
    else:
        official = make("official")
    timms = make("timm")
    kernel, positions = source.patch_embed.proj.weight, source.pos_embed
    assert torch.equal(official.patch_embed.proj.weight,
        F.interpolate(kernel, (new, new), mode="bicubic", align_corners=False))
    grid = source.patch_embed.grid_size
    old_map = positions[:, 1:].reshape(1, *grid, -1).permute(0, 3, 1, 2)
    new_map = F.interpolate(old_map, (8, 4), mode="bicubic", align_corners=False)
    assert torch.equal(official.pos_embed[:, 1:], new_map.permute(0, 2, 3, 1).reshape(1, 32, -1))
    assert torch.equal(official.pos_embed[:, 0], positions[:, 0])
    assert official.pos_embed.shape == timms.pos_embed.shape == (1, 33, 48)
    # the answer to a flat patch is the kernel's sum: timm keeps it, the official way scales it by the number of pixels
    def flat(model):
        return model.patch_embed.proj.weight.sum((1, 2, 3))

    def slope(model):
        return ((flat(model) @ flat(source)) / (flat(source) @ flat(source))).item()
    assert abs(slope(timms) - 1) < 0.02 and abs(slope(official) - (new / old) ** 2) < 0.02
    assert all(not p.requires_grad for p in official.parameters())
    assert extract_features(official, pictures((new * 3, new * 5)))[0].shape == (2, 48, 3, 5)


def test_official_resize_refuses_sam():
    with pytest.raises(ValueError, match="cannot be resized"):
        official_resize(reduced("sam_base"), 64, 14)


# ---- InternVL

def published_internvit(depth=4, width=48, side=4, seed=0):
    "Random weights under the published names; nothing is at its initial value."
    g = torch.Generator().manual_seed(seed)
    def r(*shape):
        return torch.randn(*shape, generator=g) * shape[-1] ** -0.5
    state = {"embeddings.class_embedding": r(1, 1, width), "embeddings.position_embedding": r(1, side**2 + 1, width),
             "embeddings.patch_embedding.weight": r(width, 3, 14, 14) / 14, "embeddings.patch_embedding.bias": r(width)}
    for i in range(depth):
        state |= {f"encoder.layers.{i}.{k}": v for k, v in {
            "attn.qkv.weight": r(3 * width, width), "attn.q_norm.weight": 1 + r(width),
            "attn.k_norm.weight": 1 + r(width), "attn.proj.weight": r(width, width), "attn.proj.bias": r(width),
            "ls1": 0.1 + r(width), "ls2": 0.1 + r(width), "mlp.fc1.weight": r(4 * width, width),
            "mlp.fc1.bias": r(4 * width), "mlp.fc2.weight": r(width, 4 * width), "mlp.fc2.bias": r(width),
            "norm1.weight": 1 + r(width), "norm2.weight": 1 + r(width)}.items()}
    return state


def plain_internvit(state, images, heads, depth=4):
    "The same model from its description, one sum at a time: what every block puts out, without the class token."
    s = {k: v.double() for k, v in state.items()}
    def rms(x, w):
        return w * x / (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt()
    b, _, h, w = images.shape
    cut = images.double().reshape(b, 3, h // 14, 14, w // 14, 14).permute(0, 2, 4, 1, 3, 5).reshape(b, -1, 3 * 14 * 14)
    x = cut @ s["embeddings.patch_embedding.weight"].flatten(1).T + s["embeddings.patch_embedding.bias"]
    x = torch.cat([s["embeddings.class_embedding"].expand(b, -1, -1), x], 1) + s["embeddings.position_embedding"]
    maps = []
    for i in range(depth):
        p = {k.removeprefix(f"encoder.layers.{i}."): v for k, v in s.items() if k.startswith(f"encoder.layers.{i}.")}
        qkv = rms(x, p["norm1.weight"]) @ p["attn.qkv.weight"].T
        width = x.shape[-1]
        q, k, v = qkv[..., :width], qkv[..., width:2 * width], qkv[..., 2 * width:]
        q, k = rms(q, p["attn.q_norm.weight"]), rms(k, p["attn.k_norm.weight"])  # over the whole width
        out, size = [], width // heads
        for head in range(heads):
            at = slice(head * size, (head + 1) * size)
            out.append((q[..., at] @ k[..., at].transpose(1, 2) / size**0.5).softmax(-1) @ v[..., at])
        x = x + p["ls1"] * (torch.cat(out, -1) @ p["attn.proj.weight"].T + p["attn.proj.bias"])
        y = rms(x, p["norm2.weight"]) @ p["mlp.fc1.weight"].T + p["mlp.fc1.bias"]
        y = 0.5 * y * (1 + torch.erf(y / 2**0.5))
        x = x + p["ls2"] * (y @ p["mlp.fc2.weight"].T + p["mlp.fc2.bias"])
        maps.append(x[:, 1:].transpose(1, 2).reshape(b, width, h // 14, w // 14))
    return maps


def test_internvl_equals_a_plain_recomputation(tmp_path):
    state, images = published_internvit(), pictures((56, 56))
    halves = list(state)[::2], list(state)[1::2]
    for i, keys in enumerate(halves):
        save_file({k: state[k] for k in keys}, tmp_path / f"model-0000{i + 1}-of-00002.safetensors")
    index = {k: f"model-0000{i + 1}-of-00002.safetensors" for i, keys in enumerate(halves) for k in keys}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(dict(weight_map=index)))
    vit = create_backbone("internvl_6b", 56, patch_size=14, weights=tmp_path, **FEW)
    want = plain_internvit(state, images, heads=3)
    maps = extract_features(vit.double(), images.double(), (0, 1, 2, 3))
    assert all((a - b).abs().max() < 1e-10 for a, b in zip(maps, want))
    keys = vit.state_dict().keys()
    # normalising a head at a time, as timm's own option does, is another model
    for block in vit.blocks:
        block.attn.q_norm = HeadNorm(block.attn.q_norm, 3)
    assert (extract_features(vit, images.double(), (3,))[0] - want[3]).abs().max() > 1e-3
    # inside a whole InternVL the same keys carry a prefix, and the language model beside them is none of ours
    whole = {f"vision_model.{k}": v for k, v in state.items()} | {"language_model.x": torch.zeros(1)}
    assert convert_internvit(whole).keys() == keys
    for change, message in (({}, "missing 1 keys .blocks.3.norm2.weight"),
            ({"encoder.layers.9.ls1": torch.zeros(48)}, "unexpected 1 keys .blocks.9.ls1.gamma"),
            ({"logit_scale": torch.zeros(1)}, "unexpected 1 keys .logit_scale")):
        save_file({k: v for k, v in state.items() if change or k != "encoder.layers.3.norm2.weight"} | change,
            tmp_path / "one.safetensors")
        with pytest.raises(ValueError, match=message):
            create_backbone("internvl_6b", 56, patch_size=14, weights=tmp_path / "one.safetensors", **FEW)


class HeadNorm(torch.nn.Module):
    def __init__(self, norm, heads):
        super().__init__()
        self.norm, self.heads = norm, heads

    def forward(self, x):
        x, w = x.unflatten(-1, (self.heads, -1)), self.norm.weight.unflatten(0, (self.heads, -1))
        return (w * x / (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt()).flatten(-2)


def test_internvl_is_the_published_size():
    vit = create_backbone("internvl_6b", 224, patch_size=14, device="meta", pretrained=False)
    block = vit.blocks[0]
    assert (vit.embed_dim, len(vit.blocks), block.attn.num_heads, block.mlp.fc1.out_features) == (3200, 48, 25, 12800)
    assert block.attn.qkv.bias is None and block.attn.q_norm.weight.shape == (3200,)
    assert vit.pos_embed.shape == (1, 257, 3200)
    names = convert_internvit(published_internvit(depth=48))
    assert names.keys() == vit.state_dict().keys()
