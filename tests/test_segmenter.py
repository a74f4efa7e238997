"Predictions on any size; adapter files: exact, small, refused when they do not fit; copies; the Hub."
import copy
import json
import os

import pytest
import torch
import torch.nn.functional as F

from reinpp.files import data_folder, write_together
from reinpp.models.adapter_files import pull_adapter, push_adapter, read_adapter
from reinpp.models.backbones import create_backbone, extract_features
from reinpp.models.baselines import ADAPTERS
from reinpp.models.segmenter import HEADS, create_segmenter, load_segmenter, tiny_segmenter, window_starts
from reinpp.paper.costs import KeptForBackward

IMAGES = torch.rand(2, 3, 64, 96, generator=torch.Generator().manual_seed(1))


def make(adapter="rein_g", head="mask2former", seed=0, **arguments):
    "The same backbone for every `seed`: 0 unless the head and adapter should start from other numbers."
    torch.manual_seed(seed)
    return tiny_segmenter(adapter, head, **dict(num_classes=5, pretrained=True) | arguments)


def train_a_step(segmenter):
    labels = torch.randint(0, 5, (2, 64, 96), generator=torch.Generator().manual_seed(2))
    optimizer = torch.optim.SGD([p for p in segmenter.parameters() if p.requires_grad], lr=1e-2)
    torch.manual_seed(5)  # of the points
    segmenter.train()(IMAGES).loss(labels, 5, 64)["total"].backward()
    torch.nn.utils.clip_grad_norm_(segmenter.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return segmenter.eval()


@pytest.fixture
def saved(tmp_path):
    segmenter = make()
    with torch.no_grad():
        for t in segmenter.trained_state().values():
            t.add_(0.02 * torch.randn(t.shape))
    return segmenter, segmenter.save_adapter(tmp_path / "adapter", record=dict(note="disturbed"))


@pytest.fixture(scope="module")
def plain():
    return make(head_args=dict(hidden_dim=64))  # two channels a group: one image of 32 pixels can be normalised


# ---------------------------------------------------------------- every adapter with every head

@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("adapter", ADAPTERS)
def test_every_adapter_with_every_head(adapter, head, tmp_path):
    "Made, trained for a step, saved, loaded bit for bit, trained on, copied, detached."
    segmenter = make(adapter, head)
    fresh = segmenter.predict(IMAGES)
    assert fresh.shape == (2, 5, 64, 96) and fresh.dtype == torch.float32
    assert fresh.isfinite().all() and fresh.min() >= 0
    trained = train_a_step(segmenter).predict(IMAGES)
    assert not torch.equal(trained, fresh)

    other = make(adapter, head, seed=9)
    assert not torch.equal(other.predict(IMAGES), trained)
    assert other.load_adapter(segmenter.save_adapter(tmp_path, record=dict(seed=0))) is other
    assert torch.equal(other.predict(IMAGES), trained) and read_adapter(tmp_path)[0]["record"] == dict(seed=0)
    assert torch.equal(load_segmenter(tmp_path).predict(IMAGES), trained)
    steps = [train_a_step(s).parameters() for s in (segmenter, other)]
    assert all(torch.equal(a, b) for a, b in zip(*steps)), "it trains on the same"

    before, twin = other.predict(IMAGES), copy.deepcopy(other)
    assert torch.equal(twin.predict(IMAGES), before)
    changed = train_a_step(twin).predict(IMAGES)
    with torch.no_grad():
        for p in twin.adapter.parameters():
            p.add_(0.5)
    if list(twin.adapter.parameters()):
        assert not torch.equal(twin.predict(IMAGES), changed), "a copy is refined by its own adapter"
    assert not torch.equal(changed, before) and torch.equal(other.predict(IMAGES), before)

    other.adapter.detach()
    if adapter != "full":  # which trains the backbone itself
        base = create_backbone("tiny", 64)
        assert base.state_dict().keys() == other.backbone.state_dict().keys()
        found, wanted = (extract_features(vit, IMAGES) for vit in (other.backbone, base))
        assert all(torch.equal(a, b) for a, b in zip(found, wanted)), "detached, the backbone is the untouched model"


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_checkpointing_keeps_less_and_changes_no_gradient(adapter):
    found, kept = [], []
    for checkpointing in (False, True):
        segmenter = make(adapter, checkpointing=checkpointing).train()
        there = [*segmenter.parameters(), *segmenter.buffers(), IMAGES]
        torch.manual_seed(1)
        with KeptForBackward(there) as books:
            loss = segmenter(IMAGES).pixel_loss(torch.zeros(len(IMAGES), *IMAGES.shape[2:], dtype=torch.long))
        kept.append(books.peak)
        loss.backward()
        found.append({name: p.grad for name, p in segmenter.named_parameters() if p.grad is not None})
        assert "checkpointing" not in segmenter.config
    plain, again = found
    assert plain.keys() == again.keys() and all(torch.equal(plain[name], again[name]) for name in plain)
    inside = [name for name in plain if name.startswith(("adapter.", "backbone.blocks."))]
    assert bool(inside) == (adapter != "freeze") == any(plain[name].any() for name in inside)
    assert kept[1] < 0.8 * kept[0] if inside else kept[1] == kept[0], "without anything to train, no block keeps any"


def test_tiny_segmenter_is_small_and_takes_changes():
    segmenter = tiny_segmenter(head_args=dict(decoder_layers=1), num_classes=3, image_size=72)
    counts, config = segmenter.trainable_parameters(), segmenter.config
    assert counts["total"] < 200_000 and not segmenter.training and config["backbone"] == "tiny"
    assert (config["image_size"], config["num_classes"], config["head_args"]["decoder_layers"]) == (72, 3, 1)
    assert segmenter.predict(torch.rand(1, 3, 72, 64)).shape == (1, 3, 72, 64)
    with pytest.raises(ValueError, match="head='fcn' is unknown: use one of mask2former, semantic_fpn"):
        tiny_segmenter(head="fcn")
    with pytest.raises(ValueError, match="adapter='none' is unknown"):
        tiny_segmenter("none")


# ---------------------------------------------------------------- predictions

@pytest.mark.parametrize("size", [(64, 64), (61, 97), (7, 130), (5, 3)])
@pytest.mark.parametrize("window, stride", [(None, None), (48, 32), (50, None), (512, 341)])
def test_any_size_and_window(size, window, stride, plain):
    images = torch.rand(2, 3, *size)
    scores = plain.predict(images, window, stride)
    assert scores.shape == (2, 5, *size) and scores.dtype == torch.float32
    assert scores.isfinite().all() and scores.min() >= 0
    if window is None or window >= max(size):
        assert torch.equal(scores, plain.predict(images))


@pytest.mark.parametrize("size", [(64, 64), (61, 97)])
def test_a_window_is_resized_before_sigmoid_and_softmax(size, plain):
    images = torch.rand(2, 3, *size)
    for segmenter in (plain, make(head="semantic_fpn")):
        padded = segmenter.mean.expand(2, 3, 64, -(-size[1] // 8) * 8).clone()
        padded[..., :size[0], :size[1]] = images
        with torch.no_grad():
            output = segmenter(padded)
            logits = output.mask_logits[-1] if hasattr(output, "mask_logits") else output.logits
            large = F.interpolate(logits, padded.shape[-2:], mode="bilinear", align_corners=False)
            if hasattr(output, "mask_logits"):
                classes = output.class_logits[-1].softmax(-1)[..., :-1]
                expected = torch.einsum("bqk,bqhw->bkhw", classes, large.sigmoid())
            else:
                expected = large.softmax(1)
        assert torch.allclose(segmenter.predict(images), expected[..., :size[0], :size[1]], atol=1e-5)


def test_windows_are_averaged_and_batching_changes_nothing(plain):
    segmenter, images = plain, torch.rand(2, 3, 60, 100)
    together = segmenter.predict(images, 48, 32, batch=5)
    assert torch.allclose(together, segmenter.predict(images, 48, 32, batch=1), atol=1e-5)
    total, seen = torch.zeros(2, 5, 60, 100), torch.zeros(60, 100)
    for y in (0, 12):
        for x in (0, 32, 52):
            total[..., y : y + 48, x : x + 48] += segmenter.predict(images[..., y : y + 48, x : x + 48])
            seen[y : y + 48, x : x + 48] += 1
    assert torch.allclose(together, total / seen, atol=1e-5)


@pytest.mark.parametrize("window, stride", [(512, 341), (1024, 683)])
@pytest.mark.parametrize("length", [400, 512, 540, 720, 853, 854, 960, 1024, 1280, 1920, 2048])
def test_windows_of_the_paper_cover_every_pixel_once_or_more(window, stride, length):
    starts = window_starts(length, window, stride)
    assert starts[0] == 0 and starts[-1] + window == max(length, window) and len(set(starts)) == len(starts)
    assert all(0 < b - a <= stride for a, b in zip(starts, starts[1:]))
    assert len(starts) == max(0, -(-(length - window) // stride)) + 1


@pytest.mark.parametrize("window, stride", [(512, 341), (1024, 683)])
def test_default_stride_is_the_papers(window, stride, plain, monkeypatch):
    import reinpp.models.segmenter as module
    asked = []
    monkeypatch.setattr(module, "window_starts", lambda *a: asked.append(a) or [0])
    plain.predict(torch.rand(1, 3, 40, 40), window)
    assert {a[2] for a in asked} == {stride}


@pytest.mark.parametrize("head", ["mask2former", "semantic_fpn"])
def test_bfloat16(head):
    segmenter, images = make(head=head), torch.rand(1, 3, 61, 70)
    exact = segmenter.predict(images, 48, 32)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = segmenter.predict(images, 48, 32)
    assert rounded.dtype == torch.float32 and rounded.isfinite().all()
    assert (rounded - exact).abs().mean() < 0.2 * exact.mean()
    held = make(head=head, backbone_args=dict(hold="bf16"))
    assert held.predict(images, 48, 32).isfinite().all() and held.config["backbone_args"] == dict(hold="bf16")


# ---------------------------------------------------------------- heads

def test_the_head_per_pixel(tmp_path):
    segmenter = make(head="semantic_fpn")
    assert segmenter.config["adapter_args"]["link_queries"] is False and segmenter.adapter.queries() is None
    scores = segmenter.scores(IMAGES)
    assert scores.shape == (2, 5, 16, 24) and torch.allclose(scores.sum(1), torch.ones(2, 16, 24), atol=1e-5)
    with pytest.raises(ValueError, match="has no queries to link"):
        make(head="semantic_fpn", adapter_args=dict(link_queries=True))
    segmenter.save_adapter(tmp_path)
    with pytest.raises(ValueError, match="head is 'semantic_fpn', this segmenter has 'mask2former'"):
        make().load_adapter(tmp_path)


# ---------------------------------------------------------------- adapter files

def test_what_a_file_holds_does_not_depend_on_freezing(saved, tmp_path):
    segmenter, folder = saved
    frozen = copy.deepcopy(segmenter).requires_grad_(False)
    again = frozen.save_adapter(tmp_path / "frozen")
    first, second = ((f / "adapter_model.safetensors").read_bytes() for f in (folder, again))
    assert first == second
    other = make(seed=9).requires_grad_(False).load_adapter(folder)
    assert torch.equal(other.predict(IMAGES), segmenter.predict(IMAGES))


def test_an_adapter_comes_in_its_segmenters_dtype(saved):
    segmenter, folder = saved
    other = make(seed=9).to(torch.bfloat16).load_adapter(folder)
    assert all(p.dtype == torch.bfloat16 for p in other.parameters())
    full = segmenter.trained_state()
    assert all(torch.equal(t, full[n].to(torch.bfloat16)) for n, t in other.trained_state().items())


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision(dtype, saved, tmp_path):
    segmenter, folder = saved
    half = segmenter.save_adapter(tmp_path / "half", dtype=dtype)
    small, large = ((f / "adapter_model.safetensors").stat().st_size for f in (half, folder))
    tensors = sum(t.nbytes for t in segmenter.trained_state().values())
    assert abs(large - small - tensors // 2) < 4096
    config, state = read_adapter(half)
    assert config["dtype"] == dtype and all(t.dtype == getattr(torch, dtype) for t in state.values())
    other, full = make(seed=9).load_adapter(half), segmenter.trained_state()
    assert all(p.dtype == torch.float32 for p in other.parameters())
    assert all(torch.equal(t, full[n].to(getattr(torch, dtype)).float()) for n, t in other.trained_state().items())


def test_numbers_that_a_type_cannot_hold_are_not_saved(saved, tmp_path):
    segmenter, folder = saved
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    with torch.no_grad():
        segmenter.head.decoder.class_head.weight[0, 0] = 1e5
    with pytest.raises(ValueError, match="head.decoder.class_head.weight is not finite in float16.*bfloat16"):
        segmenter.save_adapter(folder, dtype="float16")
    segmenter.save_adapter(tmp_path / "other", dtype="bfloat16")
    with torch.no_grad():
        segmenter.head.decoder.class_head.weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match="is not finite"):
        segmenter.save_adapter(folder)
    with pytest.raises(ValueError, match="dtype='half'"):
        segmenter.save_adapter(folder, dtype="half")
    assert before == {p.name: p.read_bytes() for p in folder.iterdir()}


def altered(**changes):
    def change(folder):
        file = folder / "adapter_config.json"
        config = json.loads(file.read_text())
        for key, value in changes.items():
            config[key] = config[key] | value if isinstance(value, dict) else value
        file.write_text(json.dumps(config))
    return change


def cut(name, keep):
    def change(folder):
        (folder / name).write_bytes((folder / name).read_bytes()[:keep])
    return change


def flipped(folder):
    file = folder / "adapter_model.safetensors"
    data = bytearray(file.read_bytes())
    data[-100] ^= 1
    file.write_bytes(data)


@pytest.mark.parametrize("spoil, says", [
    (cut("adapter_model.safetensors", -1), "truncated or was altered"),
    (cut("adapter_model.safetensors", 10), "truncated or was altered"), (flipped, "truncated or was altered"),
    (cut("adapter_config.json", -40), "adapter_config.json is damaged"),
    (cut("adapter_config.json", 1), "adapter_config.json is damaged"),
    (lambda f: (f / "adapter_config.json").write_text("[1]"), "adapter_config.json is damaged"),
    (lambda f: (f / "adapter_config.json").write_text("{}"), r"adapter_config.json is damaged \(no backbone"),
    (altered(num_classes=6), "adapter_config.json was altered"),
    (altered(head_args=dict(num_heads=8)), "adapter_config.json was altered"),  # of the same shapes
    (altered(backbone="dinov2_large"), "adapter_config.json was altered"),
    (lambda f: (f / "adapter_model.safetensors").unlink(), "no adapter_model.safetensors")])
def test_a_damaged_file_is_refused_and_nothing_changes(spoil, says, saved):
    segmenter, folder = saved
    spoil(folder)
    before = {n: p.clone() for n, p in segmenter.state_dict().items()}
    with pytest.raises((ValueError, FileNotFoundError), match=says) as told:
        segmenter.load_adapter(folder)
    assert "\n" not in str(told.value) and str(folder) in str(told.value)
    assert all(torch.equal(p, before[n]) for n, p in segmenter.state_dict().items())
    with pytest.raises((ValueError, FileNotFoundError)):
        load_segmenter(folder, pretrained=False)


@pytest.mark.parametrize("other, says", [
    (dict(adapter="freeze"), "adapter is 'rein_g', this segmenter has 'freeze'"),
    (dict(num_classes=6), "num_classes is 5, this segmenter has 6"),
    (dict(head_args=dict(hidden_dim=64)), "head_args is .*'hidden_dim': 32.* this segmenter has .*'hidden_dim': 64"),
    (dict(adapter_args=dict(num_tokens=12)), "adapter_args is"),
    (dict(normalization="imagenet"), "normalization is"),
    (dict(backbone_args=dict(patch_size=16)), "backbone_args is")])
def test_another_segmenter_refuses(other, says, saved):
    segmenter = make(**other)
    before = {n: p.clone() for n, p in segmenter.state_dict().items()}
    with pytest.raises(ValueError, match=says + ".*load_segmenter"):
        segmenter.load_adapter(saved[1])
    assert all(torch.equal(p, before[n]) for n, p in segmenter.state_dict().items())


def test_another_backbone_refuses(saved, tmp_path):
    kind = {key: saved[0].config[key] for key in ("num_classes", "image_size", "adapter_args", "head_args")}
    other = create_segmenter("test_vit", pretrained=False, **kind)
    with pytest.raises(ValueError, match="backbone is 'tiny', this segmenter has 'test_vit'"):
        other.load_adapter(saved[1])
    other.save_adapter(tmp_path / "test_vit")
    with pytest.raises(ValueError, match="backbone is 'test_vit', this segmenter has 'tiny'"):
        saved[0].load_adapter(tmp_path / "test_vit")
    other.config["backbone"] = "tiny"  # a backbone of another width under the same name
    with pytest.raises(
            ValueError, match=r"tensors have another shape, first adapter.\S+: \(.*\) in the file, \(.*\) here"):
        saved[0].load_adapter(other.save_adapter(tmp_path / "liar"))
    del other.head.querys2feat
    other.trained = tuple(n for n in other.trained if "querys2feat" not in n)
    with pytest.raises(ValueError, match="2 tensors are missing or unexpected, first head.querys2feat.bias"):
        saved[0].load_adapter(other.save_adapter(tmp_path / "liar"))


def test_how_the_backbone_is_held_does_not_matter(saved):
    held = make(seed=9, backbone_args=dict(hold="bf16")).load_adapter(saved[1])
    assert all(torch.equal(t, saved[0].trained_state()[n]) for n, t in held.trained_state().items())


def test_a_load_that_fails_half_way_leaves_no_trace(saved, monkeypatch):
    import reinpp.models.segmenter as module
    config, state = read_adapter(saved[1])
    late = list(saved[0].trained)[-3]
    state[late] = torch.empty(state[late].shape, device="meta")  # has the right shape and no numbers
    monkeypatch.setattr(module, "read_adapter", lambda folder: (config, state))
    segmenter = make(seed=9)
    before = {n: p.clone() for n, p in segmenter.state_dict().items()}
    with pytest.raises(NotImplementedError):
        segmenter.load_adapter(saved[1])
    assert all(torch.equal(p, before[n]) for n, p in segmenter.state_dict().items())


def test_a_save_that_fails_half_way_leaves_the_old_files(saved, monkeypatch):
    segmenter, folder = saved
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    sync, calls = os.fsync, []
    def full(descriptor):
        calls.append(descriptor)
        if len(calls) == 2:
            raise OSError("no space left")
        sync(descriptor)
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="no space"):
        train_a_step(segmenter).save_adapter(folder)
    assert before == {p.name: p.read_bytes() for p in folder.iterdir()}
    monkeypatch.undo()
    write_together({folder / "a": b"1", folder / "b": b"2"})
    assert (folder / "a").read_bytes() == b"1" and (folder / "b").read_bytes() == b"2"


def test_one_backbone_two_domains(saved, tmp_path):
    segmenter, first = saved
    day = segmenter.predict(IMAGES)
    night = train_a_step(segmenter).predict(IMAGES)
    second = segmenter.save_adapter(tmp_path / "night")
    places = {n: p.data_ptr() for n, p in segmenter.named_parameters()}
    for folder, scores in ((first, day), (second, night), (first, day)):
        assert torch.equal(segmenter.load_adapter(folder).predict(IMAGES), scores) and not torch.equal(day, night)
    now = {n: p.data_ptr() for n, p in segmenter.named_parameters()}
    assert places == now, "nothing moved: optimisers and copies on a device stay valid"


@pytest.mark.parametrize("folder", sorted((data_folder() / "weights").glob("*_rein_g_seed0")), ids=lambda f: f.name)
def test_bundled_adapters(folder):
    segmenter = load_segmenter(folder)
    config, state = read_adapter(folder)
    assert all(torch.equal(t, state[n]) for n, t in segmenter.trained_state().items()) and config["dtype"] == "float32"


@pytest.mark.parametrize("wrong, says", [
    (dict(head="fcn"), "use one of mask2former, semantic_fpn"), (dict(normalization="none"), "normalization"),
    (dict(num_classes=0), "at least one class"), (dict(image_size=100), "multiple of the patch"),
    (dict(adapter="full", backbone_args=dict(hold="bf16")), "hold='bf16' is for a backbone that stays frozen"),
    (dict(head_args=dict(colour=1)), "does not take"), (dict(adapter_args=dict(rank=torch.ones(1))), "plain numbers")])
def test_create_segmenter_refuses(wrong, says):
    with pytest.raises(ValueError, match=says):
        create_segmenter("tiny", pretrained=False, **dict(image_size=64) | wrong)


def test_a_module_for_a_backbone_is_one_clear_line():
    with pytest.raises(ValueError, match=r"^backbone is a Linear: give a name.*ReinG\(") as told:
        create_segmenter(torch.nn.Linear(1, 1))
    assert "\n" not in str(told.value)


# ---------------------------------------------------------------- the Hub, without a network

@pytest.fixture
def hub(tmp_path, monkeypatch):
    import huggingface_hub
    root, made = tmp_path / "hub", {}
    def create_repo(self, repo_id, *, private=None, exist_ok=False, **_):
        made[repo_id] = private
    def create_commit(self, repo_id, operations, *, commit_message, **_):
        target = root / repo_id
        target.mkdir(parents=True, exist_ok=True)
        for added in operations:
            (target / added.path_in_repo).write_bytes(added.path_or_fileobj)
        return f"https://huggingface.co/{repo_id}/commit/1"
    def snapshot_download(repo_id, *, revision=None, token=None, allow_patterns=None):
        if not (root / repo_id).is_dir():
            raise huggingface_hub.errors.LocalEntryNotFoundError("no network\nand a long story")
        return str(root / repo_id)
    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", create_repo)
    monkeypatch.setattr(huggingface_hub.HfApi, "create_commit", create_commit)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return root, made


def test_push_and_pull(saved, hub):
    segmenter, folder = saved
    root, made = hub
    segmenter.save_adapter(folder, record=dict(miou=48.07))
    assert push_adapter(folder, "me/rain").startswith("https://huggingface.co/me/rain")
    assert push_adapter(folder, "me/fog", private=False) and made == {"me/rain": True, "me/fog": False}
    assert (root / "me" / "fog" / "adapter_model.safetensors").read_bytes() == (
        folder / "adapter_model.safetensors").read_bytes()
    card = (root / "me" / "rain" / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: reinpp\n") and "48.07" in card and "load_segmenter(<" in card
    assert torch.equal(make(seed=9).load_adapter(pull_adapter("me/rain")).predict(IMAGES), segmenter.predict(IMAGES))


def test_load_segmenter_takes_a_name_on_the_hub(saved, hub, monkeypatch, tmp_path):
    """Pushed and loaded by its name; a folder of that name comes first; how it is used travels with it."""
    segmenter, folder = saved
    (folder / "use.json").write_text("{}")
    push_adapter(folder, "me/rain")
    assert (hub[0] / "me" / "rain" / "use.json").read_text() == "{}"
    monkeypatch.chdir(tmp_path)
    assert torch.equal(load_segmenter("me/rain").predict(IMAGES), segmenter.predict(IMAGES))
    other = make(seed=9)
    other.save_adapter("me/rain")
    assert torch.equal(load_segmenter("me/rain").predict(IMAGES), other.predict(IMAGES))
    with pytest.raises(FileNotFoundError, match=r"^me/none: no such folder here, and from the Hub me/none could not"):
        load_segmenter("me/none")
    with pytest.raises(FileNotFoundError, match="no adapter_config.json"):
        load_segmenter("none")


def test_what_the_hub_refuses_is_one_line(saved, hub, monkeypatch):
    import huggingface_hub
    root, _ = hub
    with pytest.raises(ConnectionError, match=r"me/none at v1 could not be fetched \(.*no network and a long story\)"):
        pull_adapter("me/none", revision="v1")
    (root / "me" / "empty").mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match="no adapter_config.json"):
        pull_adapter("me/empty")
    flipped(saved[1])
    with pytest.raises(ValueError, match="truncated or was altered"):
        push_adapter(saved[1], "me/rain")
    def denied(self, *a, **k):
        raise PermissionError("401: invalid token")
    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", denied)
    saved[0].save_adapter(saved[1])
    with pytest.raises(ConnectionError, match=r"me/rain could not be pushed \(.*401: invalid token\): log in"):
        push_adapter(saved[1], "me/rain")
