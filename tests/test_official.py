"Released CVPR'24 checkpoints: names, orders, refusals."
import pickle
import sys
import types

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from reinpp.files import read_checkpoint
from reinpp.models.backbones import create_backbone
from reinpp.models.mask2former import sine_position
from reinpp.models.official import load_official, official_names
from reinpp.models.segmenter import create_segmenter, load_segmenter

DIM, HEADS, QUERIES, CLASSES = 32, 4, 12, 5
OLD = (
    ("pixel_decoder.encoder.layers.{}.self_attn.", "pixel_decoder.encoder.layers.{}.attentions.0."),
    ("transformer_decoder.layers.{}.cross_attn.", "transformer_decoder.layers.{}.attentions.0."),
    ("transformer_decoder.layers.{}.self_attn.", "transformer_decoder.layers.{}.attentions.1."),
    (".layers.{}.ffn.", ".layers.{}.ffns.0."),
)


def checkpoint(width=128, depth=8, encoder=2, decoder=4):
    "A state dict with the names and shapes of a released file, written out by hand, and random numbers."
    torch.manual_seed(3)
    state = {}
    def add(name, *shape, spread=None, around=0.0):
        state[name] = torch.randn(*shape) * (spread if spread is not None else shape[-1] ** -0.5) + around
    def linear(name, out, into):
        add(f"{name}.weight", out, into)
        add(f"{name}.bias", out, spread=0.2)
    def norm(name):
        add(f"{name}.weight", DIM, spread=0.1, around=1.0)
        add(f"{name}.bias", DIM, spread=0.1)
    r, h, p, t = "backbone.reins.", "decode_head.", "decode_head.pixel_decoder.", "decode_head.transformer_decoder."
    add(r + "learnable_tokens_a", depth, QUERIES, 4)
    add(r + "learnable_tokens_b", depth, 4, width, spread=0.5)
    state[r + "scale"] = torch.tensor(0.4)
    linear(r + "mlp_token2feat", width, width)
    linear(r + "mlp_delta_f", width, width)
    linear(r + "transform", DIM, width)
    linear(r + "merge", DIM, 3 * DIM)
    for i in range(3):
        add(f"{p}input_convs.{i}.conv.weight", DIM, width, 1, 1, spread=0.1)
        add(f"{p}input_convs.{i}.conv.bias", DIM, spread=0.1)
        norm(f"{p}input_convs.{i}.gn")
    for n in range(encoder):
        a = f"{p}encoder.layers.{n}."
        linear(a + "self_attn.sampling_offsets", HEADS * 3 * 4 * 2, DIM)
        linear(a + "self_attn.attention_weights", HEADS * 3 * 4, DIM)
        linear(a + "self_attn.value_proj", DIM, DIM)
        linear(a + "self_attn.output_proj", DIM, DIM)
        linear(a + "ffn.layers.0.0", 48, DIM)
        linear(a + "ffn.layers.1", DIM, 48)
        norm(a + "norms.0")
        norm(a + "norms.1")
    add(p + "level_encoding.weight", 3, DIM, spread=1)
    add(p + "lateral_convs.0.conv.weight", DIM, width, 1, 1, spread=0.1)
    norm(p + "lateral_convs.0.gn")
    add(p + "output_convs.0.conv.weight", DIM, DIM, 3, 3, spread=0.1)
    norm(p + "output_convs.0.gn")
    add(p + "mask_feature.weight", DIM, DIM, 1, 1, spread=0.2)
    add(p + "mask_feature.bias", DIM)
    for n in range(decoder):
        a = f"{t}layers.{n}."
        for kind in ("self_attn", "cross_attn"):
            add(f"{a}{kind}.attn.in_proj_weight", 3 * DIM, DIM)
            add(f"{a}{kind}.attn.in_proj_bias", 3 * DIM)
            linear(f"{a}{kind}.attn.out_proj", DIM, DIM)
        linear(a + "ffn.layers.0.0", 40, DIM)
        linear(a + "ffn.layers.1", DIM, 40)
        for i in range(3):
            norm(f"{a}norms.{i}")
    norm(t + "post_norm")
    add(h + "level_embed.weight", 3, DIM, spread=1)
    linear(h + "cls_embed", CLASSES + 1, DIM)
    linear(h + "querys2feat", DIM, DIM)
    for i in (0, 2, 4):
        linear(f"{h}mask_embed.{i}", DIM, DIM)
    return state


def aged(state):
    "The names that mmcv 1.x gave."
    for new, old in OLD:
        for n in range(9):
            state = {name.replace(new.format(n), old.format(n)): tensor for name, tensor in state.items()}
    return state


def reference(s, features):
    """The head's ten (here five) predictions from its definition, read straight from the authors' names.

    `features` are four maps at stride 8."""
    r, h, p, t = "backbone.reins.", "decode_head.", "decode_head.pixel_decoder.", "decode_head.transformer_decoder."
    def linear(x, k):
        return F.linear(x, s[k + ".weight"], s[k + ".bias"])
    def layer_norm(x, k):
        return F.layer_norm(x, (DIM,), s[k + ".weight"], s[k + ".bias"])
    def conv_norm(x, k):
        kernel = s[k + ".conv.weight"]
        x = F.conv2d(x, kernel, s.get(k + ".conv.bias"), padding=kernel.shape[-1] // 2)
        return F.group_norm(x, 32, s[k + ".gn.weight"], s[k + ".gn.bias"])
    def ffn(x, k):
        return linear(F.relu(linear(x, k + ".layers.0.0")), k + ".layers.1")

    tokens = s[r + "learnable_tokens_a"] @ s[r + "learnable_tokens_b"]
    q = torch.stack([linear(t, r + "transform") for t in tokens])  # (N, m, DIM)
    queries = linear(torch.stack((q.max(0).values, q.mean(0), q[-1]), -1).flatten(1), r + "merge")

    pyramid = [f if x == 1 else F.interpolate(f, scale_factor=x, mode="bilinear", align_corners=False)
               for f, x in zip(features, (2, 1, 0.5, 0.25))]  # strides 4 to 32
    maps = [conv_norm(pyramid[3 - i], f"{p}input_convs.{i}") for i in range(3)]  # strides 32, 16, 8
    shapes = [m.shape[-2:] for m in maps]
    x = torch.cat([m.flatten(2).transpose(1, 2) for m in maps], 1)
    position = torch.cat(
        [sine_position(*shape, DIM) + level for shape, level in zip(shapes, s[p + "level_encoding.weight"])])
    sides = [((torch.arange(b) + 0.5) / b, (torch.arange(a) + 0.5) / a) for a, b in shapes]
    centre = torch.cat([torch.stack(torch.meshgrid(x, y, indexing="xy"), -1).flatten(0, 1) for x, y in sides])
    for n in range(2):
        k = f"{p}encoder.layers.{n}."
        value = linear(x, k + "self_attn.value_proj").unflatten(2, (HEADS, -1))
        offset = linear(x + position, k + "self_attn.sampling_offsets").unflatten(2, (HEADS, 3, 4, 2))
        weight = linear(x + position, k + "self_attn.attention_weights").unflatten(2, (HEADS, 12))
        weight = weight.softmax(-1).unflatten(3, (3, 4))
        out = torch.zeros_like(value)
        for level, ((a, b), v) in enumerate(zip(shapes, value.split([a * b for a, b in shapes], 1))):
            for head in range(HEADS):
                place = centre[None, :, None] + offset[:, :, head, level] / torch.tensor([b, a])
                there = v[:, :, head].transpose(1, 2).unflatten(2, (a, b))
                seen = F.grid_sample(there, 2 * place - 1, align_corners=False)  # (B, d, n, 4)
                out[:, :, head] += (seen * weight[:, None, :, head, level]).sum(-1).transpose(1, 2)
        x = layer_norm(x + linear(out.flatten(2), k + "self_attn.output_proj"), k + "norms.0")
        x = layer_norm(x + ffn(x, k + "ffn"), k + "norms.1")
    maps = [m.transpose(1, 2).unflatten(2, shape) for m, shape in zip(x.split([a * b for a, b in shapes], 1), shapes)]
    fine = conv_norm(pyramid[0], p + "lateral_convs.0")
    fine = fine + F.interpolate(maps[2], size=fine.shape[-2:], mode="bilinear", align_corners=False)
    fine = F.relu(conv_norm(fine, p + "output_convs.0"))
    fine = F.conv2d(fine, s[p + "mask_feature.weight"], s[p + "mask_feature.bias"])

    def attend(k, query, key, value, mask=None):
        m = torch.nn.MultiheadAttention(DIM, HEADS, batch_first=True)
        m.load_state_dict({name: s[f"{k}.attn.{name}"]
            for name in ("in_proj_weight", "in_proj_bias", "out_proj.weight", "out_proj.bias")})
        return query_features + m(query, key, value, attn_mask=mask)[0]
    def predict(x, shape):
        x = layer_norm(x, t + "post_norm")
        e = linear(F.relu(linear(F.relu(linear(x, h + "mask_embed.0")), h + "mask_embed.2")), h + "mask_embed.4")
        masks = torch.einsum("bqc,bchw->bqhw", e, fine)
        hidden = F.interpolate(masks, size=shape, mode="bilinear", align_corners=False).flatten(2).sigmoid() < 0.5
        hidden[hidden.all(-1)] = False
        predictions.append((linear(x, h + "cls_embed"), masks))
        return hidden.repeat_interleave(HEADS, 0)
    predictions, query_features = [], linear(queries, h + "querys2feat").expand(len(fine), -1, -1)
    hidden = predict(query_features, shapes[0])
    for n in range(4):
        k, level = f"{t}layers.{n}.", n % 3
        memory = maps[level].flatten(2).transpose(1, 2) + s[h + "level_embed.weight"][level]
        keys = memory + sine_position(*shapes[level], DIM)
        seen = attend(k + "cross_attn", query_features + queries, keys, memory, hidden)
        query_features = layer_norm(seen, k + "norms.0")
        here = query_features + queries
        query_features = layer_norm(attend(k + "self_attn", here, here, query_features), k + "norms.1")
        query_features = layer_norm(query_features + ffn(query_features, k + "ffn"), k + "norms.2")
        hidden = predict(query_features, shapes[(n + 1) % 3])
    return queries, predictions


def write(path, state, **beside):
    torch.save(dict(state_dict=state, **beside), path)
    return path


def load(path, **arguments):
    return load_official(path, **dict(backbone="tiny", image_size=64, num_heads=HEADS, pretrained=False) | arguments)


@pytest.mark.parametrize("generation", ["mmdet 3", "mmcv 1"])
def test_it_computes_what_the_names_say(generation, tmp_path):
    state = checkpoint()
    segmenter = load(write(tmp_path / "rein.pth", state if generation == "mmdet 3" else aged(dict(state))))
    if generation == "mmcv 1":
        assert any("attentions.1" in k for k in aged(dict(state))) and not any("ffn." in k for k in aged(dict(state)))
    with torch.no_grad():
        images = torch.rand(2, 3, 96, 64)
        queries, wanted = reference(state, segmenter.features(images))
        assert torch.allclose(segmenter.adapter.queries(), queries, atol=1e-5)
        out = segmenter(images)
        assert len(wanted) == len(out.mask_logits) == 5
        for (classes, masks), c, m in zip(wanted, out.class_logits, out.mask_logits):
            assert torch.allclose(c, classes, atol=2e-3) and torch.allclose(m, masks, atol=5e-3)
        r, f = "backbone.reins.", torch.randn(1, 7, 128)  # Rein itself, eq. 5-7 with one head
        for layer in (0, 7):
            tokens = state[r + "learnable_tokens_a"][layer] @ state[r + "learnable_tokens_b"][layer]
            similar = (f @ tokens.T * 128**-0.5).softmax(-1)[..., 1:]
            d = similar @ F.linear(tokens[1:], state[r + "mlp_token2feat.weight"], state[r + "mlp_token2feat.bias"])
            wanted = f + 0.4 * F.linear(d + f, state[r + "mlp_delta_f.weight"], state[r + "mlp_delta_f.bias"])
            assert torch.allclose(segmenter.adapter(torch.cat((f[:, :1], f), 1), layer)[:, 1:], wanted, atol=1e-5)


def official_state(segmenter):
    "Adapter and head under the authors' names: the inverse of `load_official`."
    own, parts, head = segmenter.trained_state(), {}, segmenter.head
    names = official_names(len(head.pixel_decoder.layers), len(head.decoder.layers))
    assert names.keys() == own.keys()
    for ours, (theirs, _) in names.items():
        parts.setdefault(theirs, []).append(own[ours])  # query, key, value follow each other
    return {theirs: torch.cat(tensors) if len(tensors) > 1 else tensors[0] for theirs, tensors in parts.items()}


def test_names_and_sizes_of_the_large_model():
    with torch.device("meta"):
        segmenter = create_segmenter("dinov2_large", pretrained=False, adapter_args=dict(num_heads=1, gelu=False))
    state = {name: tuple(t.shape) for name, t in official_state(segmenter).items()}
    assert sum(t.numel() for t in official_state(segmenter).values()) == 2_990_081 + 20_579_796
    assert state["backbone.reins.learnable_tokens_a"] == (24, 100, 16) and state["backbone.reins.scale"] == ()
    assert state["decode_head.pixel_decoder.encoder.layers.5.self_attn.sampling_offsets.weight"] == (192, 256)
    assert state["decode_head.transformer_decoder.layers.8.cross_attn.attn.in_proj_weight"] == (768, 256)
    assert state["decode_head.cls_embed.bias"] == (20,) and not any(k.startswith("decode_head.query_") for k in state)


def test_there_and_back_and_into_an_adapter_file(tmp_path):
    state = checkpoint()
    segmenter = load(write(tmp_path / "rein.pth", state))
    again = official_state(segmenter)
    assert again.keys() == state.keys() and all(torch.equal(again[k], state[k]) for k in state)
    save_file(state, tmp_path / "rein.safetensors")
    images = torch.rand(1, 3, 64, 64)
    torch.manual_seed(0)
    one = load(tmp_path / "rein.safetensors")
    one.save_adapter(tmp_path / "ours")
    torch.manual_seed(0)
    two = load_segmenter(tmp_path / "ours", pretrained=False)
    assert torch.equal(one.predict(images), two.predict(images))


def test_a_file_with_its_backbone(tmp_path):
    vit = create_backbone("dinov2_small", 96, pretrained=False)
    frozen = {f"backbone.{n}": t for n, t in vit.state_dict().items()}
    assert {"backbone.pos_embed", "backbone.cls_token", "backbone.blocks.11.ls2.gamma",
        "backbone.blocks.0.attn.qkv.bias", "backbone.patch_embed.proj.weight"} <= frozen.keys()
    state = checkpoint(384, 12) | frozen | {"backbone.mask_token": torch.zeros(1, 384),
        "data_preprocessor.mean": torch.zeros(3, 1, 1)}
    segmenter = load_official(write(tmp_path / "whole.pth", state), "dinov2_small", num_heads=HEADS)
    assert segmenter.config["image_size"] == 96 and segmenter.config["normalization"] == "imagenet"
    assert all(torch.equal(t, frozen[f"backbone.{n}"]) for n, t in segmenter.backbone.state_dict().items())
    del state["backbone.norm.bias"]
    with pytest.raises(ValueError, match=r"1 keys not found \[backbone.norm.bias\]"):
        load_official(write(tmp_path / "part.pth", state), "dinov2_small", num_heads=HEADS)


def test_a_backbone_from_elsewhere_is_resized_as_the_authors_did(tmp_path):
    import timm
    reduced = dict(embed_dim=48, depth=4, num_heads=3)
    vit = timm.create_model("vit_small_patch14_dinov2", num_classes=0, **reduced)
    save_file(vit.state_dict(), tmp_path / "vit.safetensors")
    segmenter = load_official(write(tmp_path / "rein.pth", checkpoint(48, 4)), "dinov2_small", 64, HEADS,
        weights=tmp_path / "vit.safetensors", backbone_args=reduced)
    assert torch.equal(segmenter.backbone.patch_embed.proj.weight,
        F.interpolate(vit.patch_embed.proj.weight, (16, 16), mode="bicubic", align_corners=False))
    assert segmenter.config["backbone_args"] == dict(patch_resize="official") | reduced
    assert segmenter.predict(torch.rand(1, 3, 64, 64)).shape == (1, CLASSES, 64, 64)


@pytest.mark.parametrize("change, says", [
    (lambda s: s.pop("decode_head.querys2feat.bias"),
     r"1 keys not found \[decode_head.querys2feat.bias\], 0 not expected"),
    (lambda s: s.update({"decode_head.query_feat.weight": torch.zeros(12, 32)}),
     r"0 keys not found \[\], 1 not expected \[decode_head.query_feat.weight\]"),
    (lambda s: [s.pop(k) for k in list(s) if "encoder.layers.0." in k],
     r"16 keys not found \[decode_head.pixel_decoder.encoder.layers.0.ffn"),
    (lambda s: [s.pop(k) for k in list(s) if k.startswith("decode_head")], "keys not found .* and .* more"),
    (lambda s: s.update({"backbone.reins.learnable_tokens_b": torch.zeros(8, 4, 64)}),
     r"tensors do not fit tiny, first adapter.tokens_b \(8, 4, 64\) instead of \(8, 4, 128\)")])
def test_keys_that_do_not_fit_are_listed(change, says, tmp_path):
    state = checkpoint()
    change(state)
    with pytest.raises(ValueError, match=says):
        load(write(tmp_path / "rein.pth", state))


def test_other_files_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such file"):
        load(tmp_path / "rein.pth")
    file = write(tmp_path / "rein.pth", checkpoint())
    file.write_bytes(file.read_bytes()[:5000])
    with pytest.raises(ValueError, match="rein.pth: this checkpoint is damaged"):
        load(file)
    (tmp_path / "x.safetensors").write_bytes(b"12345678{}")
    with pytest.raises(ValueError, match="x.safetensors: this checkpoint is damaged"):
        load(tmp_path / "x.safetensors")
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(ValueError, match="list.pth: holds no state_dict of tensors"):
        load(tmp_path / "list.pth")
    with pytest.raises(ValueError, match="give the head's own num_heads"):
        load(write(tmp_path / "rein.pth", checkpoint()), num_heads=8)


class Evil:
    def __reduce__(self):
        return open, (str(Evil.path), "w")


def test_nothing_in_a_file_is_run(tmp_path, monkeypatch):
    Evil.path = tmp_path / "trace"
    with pytest.raises(ValueError, match=r"not loaded.* more than tensors.*\(it asks for (io|_io|builtins).open\)"):
        load(write(tmp_path / "evil.pth", checkpoint(), surprise=Evil()))
    assert not Evil.path.exists()
    # what a training checkpoint brings: objects of mmengine that hold NumPy arrays
    module = types.ModuleType("mmengine.history")
    class History:
        pass
    History.__module__, History.__qualname__ = "mmengine.history", "History"
    module.History = History
    monkeypatch.setitem(sys.modules, "mmengine", types.ModuleType("mmengine"))
    monkeypatch.setitem(sys.modules, "mmengine.history", module)
    history = History()
    history.values = np.arange(3.0)
    write(tmp_path / "training.pth", checkpoint(), message_hub=dict(loss=history, last=np.float64(2)),
        meta=dict(iter=3))
    monkeypatch.delitem(sys.modules, "mmengine.history")
    monkeypatch.delitem(sys.modules, "mmengine")
    assert read_checkpoint(tmp_path / "training.pth").keys() == checkpoint().keys()
    with open(tmp_path / "plain.pkl", "wb") as f:
        pickle.dump(Evil(), f)
    with pytest.raises(ValueError, match="not loaded, because it is damaged or holds more than tensors"):
        read_checkpoint(tmp_path / "plain.pkl")
    assert not Evil.path.exists()
