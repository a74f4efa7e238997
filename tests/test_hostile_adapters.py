"An adapter from anybody: what its settings may say is on a closed list, and nothing large is made before all fits."
import copy
import hashlib
import inspect
import json
import random

import pytest
import torch
from safetensors.torch import save

from reinpp.files import read_object
from reinpp.models.adapter_files import ADAPTER_ARGS, HEAD_ARGS, SETTINGS, WEIGHTS, config_digest, write_adapter
from reinpp.models.baselines import ADAPTERS
from reinpp.models.segmenter import HEADS, create_segmenter, load_segmenter, tiny_segmenter

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def good():
    "Config and tensors of a small segmenter."
    segmenter = tiny_segmenter(num_classes=5, head_args=dict(encoder_layers=1, decoder_layers=1))
    return segmenter.config, {name: t.clone() for name, t in segmenter.trained_state().items()}


def signed(folder, config, state):
    "The folder, with both files made to belong together, as somebody who means harm would."
    folder.mkdir(exist_ok=True)
    try:
        digest = config_digest(config)
    except (KeyError, TypeError, AttributeError):
        digest = "0" * 64
    data = save(state, dict(config=digest))
    (folder / WEIGHTS).write_bytes(data)
    (folder / SETTINGS).write_text(json.dumps(dict(config, sha256=hashlib.sha256(data).hexdigest())))
    return folder


def test_the_lists_name_what_the_classes_take():
    filled_in = {"embed_dim", "depth", "num_prefix_tokens", "in_channels", "num_classes", "scales", "linked"}
    for listed, classes in ((ADAPTER_ARGS, ADAPTERS), (HEAD_ARGS, HEADS)):
        assert set(listed) == set(classes)
        for name, kind in classes.items():
            assert set(listed[name]) == set(inspect.signature(kind).parameters) - filled_in, name


@pytest.mark.parametrize("name", [
    "hf-hub:somebody/model", "hf_hub:somebody/model", "local-dir:model", "timm/vit_tiny_patch16_224", "../tiny",
    "/etc/passwd", "https://example.org/x", "vit tiny", "tiny\n", "", "x" * 101, 3, None, ["tiny"], "resnet50", "..",
    "vit_no"])
def test_a_backbone_is_a_plain_name(name, good, tmp_path):
    with pytest.raises(ValueError, match=SETTINGS + ".*backbone=") as told:
        load_segmenter(signed(tmp_path, good[0] | dict(backbone=name), good[1]), pretrained=False)
    assert "\n" not in str(told.value) and repr(name)[:20] in str(told.value)


@pytest.mark.parametrize("key, value", [
    ("checkpoint_path", "/etc/passwd"), ("pretrained_cfg", {"url": "https://example.org/x"}), ("weights", "x.pth"),
    ("pretrained_cfg_overlay", {"file": "x"}), ("cache_dir", "/else"), ("norm_layer", "os.system"), ("device", "cuda"),
    ("pretrained", True), ("img_size", 64), ("depth", True), ("depth", 8.0), ("depth", "8"), ("hold", "int2"),
    ("global_attn_indexes", ["a"]), ("global_attn_indexes", [1] * 1000)])
def test_backbone_args_are_on_a_list(key, value, good, tmp_path):
    with pytest.raises(ValueError, match=f"{SETTINGS}: backbone_args.*{key}") as told:
        load_segmenter(signed(tmp_path, good[0] | dict(backbone_args={key: value}), good[1]), pretrained=False)
    assert len(str(told.value)) < 600


@pytest.mark.parametrize("change, says", [
    (dict(num_classes=True), "num_classes=True: must be a whole number from 1 to 255"), (dict(run="x"), "take 'run'"),
    (dict(num_classes=5.0), "num_classes=5.0"), (dict(image_size=10**9), "image_size=1000000000"),
    (dict(head_args=dict(hidden_dim=10**6)), "head_args.hidden_dim=1000000"), (dict(record=[1]), "record=.*an object"),
    (dict(adapter_args=dict(rank=0)), "adapter_args.rank=0"), (dict(adapter_args=[]), r"adapter_args=\[\]"),
    (dict(adapter="sum"), "adapter='sum'"), (dict(head=["mask2former"]), "head="), (dict(dtype="../x"), "dtype="),
    (dict(adapter_args=dict(scale=float("nan"))), "adapter_args.scale=nan")])
def test_other_values_are_named_with_file_and_key(change, says, good, tmp_path):
    with pytest.raises(ValueError, match=f"{SETTINGS}: .*{says}"):
        load_segmenter(signed(tmp_path, good[0] | change, good[1]), pretrained=False)


def test_sizes_that_the_tensors_do_not_have_are_found_before_anything_is_made(good, tmp_path, monkeypatch):
    import reinpp.models.segmenter as module
    made = []
    def watched(*arguments, **options):
        made.append(options.get("device"))
        return create_backbone(*arguments, **options)
    create_backbone = module.create_backbone
    monkeypatch.setattr(module, "create_backbone", watched)
    large = dict(embed_dim=16_000, depth=128, num_heads=4)
    with pytest.raises(ValueError, match="another shape|missing"):
        load_segmenter(signed(tmp_path, good[0] | dict(backbone_args=large), good[1]), pretrained=False)
    wide = good[0]["head_args"] | dict(hidden_dim=16_384, encoder_layers=64, decoder_layers=64)
    with pytest.raises(ValueError, match="another shape|missing"):
        load_segmenter(signed(tmp_path, good[0] | dict(head_args=wide), good[1]), pretrained=False)
    with pytest.raises(ValueError, match="no segmenter can be made.*divisible"):
        odd = dict(embed_dim=100, num_heads=7)
        load_segmenter(signed(tmp_path, good[0] | dict(backbone_args=odd), good[1]), pretrained=False)
    assert set(made) == {"meta"}


def test_tensors_are_finite_numbers(good, tmp_path):
    config, state = good
    for bad in (torch.full((), torch.nan), torch.tensor(3), torch.tensor(True)):
        with pytest.raises(ValueError, match=f"{WEIGHTS}: 'adapter.scale' holds"):
            load_segmenter(signed(tmp_path, config, state | {"adapter.scale": bad}), pretrained=False)


def test_a_settings_file_is_short_and_plain(good, tmp_path):
    folder = signed(tmp_path, *good)
    for text in ("[" * 100_000, '{"a":' * 50_000, "9" * 10_000, '"text"', "{}" + " " * 10_000_000, "\udcff{}"):
        (folder / SETTINGS).write_bytes(text.encode(errors="surrogateescape"))
        with pytest.raises(ValueError, match=f"{SETTINGS} is damaged") as told:
            load_segmenter(folder)
        assert len(str(told.value)) < 600 and "\n" not in str(told.value)
    with pytest.raises(ValueError, match="no plain file"):
        read_object(folder)


def test_what_could_not_be_loaded_is_not_made(tmp_path):
    with pytest.raises(ValueError, match="create_segmenter: backbone_args does not take 'norm_layer'"):
        create_segmenter("tiny", image_size=64, pretrained=False, backbone_args=dict(norm_layer="layernorm"))


def mutated(config, rng):
    "A copy with one or two values changed, taken away, moved or added."
    config = copy.deepcopy(config)
    values = [None, True, -1, 0, 1, 3, 7, 64, 2**16, 2**40, 10**30, -0.5, 1e308, float("nan"), "", "tiny", "x" * 10**4,
              "../..", "hf-hub:a/b", "vit_base_patch16_224", "test_vit", [], [1, 2], {}, {"a": {"b": 1}}, "\n\x00é"]
    for _ in range(rng.choice((1, 1, 2))):
        part = rng.choice([config, config, *(v for v in config.values() if isinstance(v, dict))])
        names = [*part, "checkpoint_path", "weights", "depth", "embed_dim", "patch_size", "hold", "rank", "__class__"]
        key, how = rng.choice(names), rng.random()
        if how < 0.1:
            part.pop(key, None)
        elif how < 0.3 and type(part.get(key)) is int:
            part[key] = max(0, part[key] + rng.choice((-1, 1))) * rng.choice((1, 2, 1000))
        else:
            part[key] = copy.deepcopy(rng.choice(values))
    return config


def test_several_hundred_mutations_load_or_are_refused_in_a_line(good, tmp_path):
    rng, outcomes = random.Random(0), {"loaded": 0, "refused": 0}
    for _ in range(400):
        config = mutated(good[0], rng)
        folder = signed(tmp_path, config, good[1])
        try:
            load_segmenter(folder, pretrained=False)
            outcomes["loaded"] += 1
        except ValueError as error:
            assert "\n" not in str(error) and len(str(error)) < 1000 and str(folder) in str(error), config
            outcomes["refused"] += 1
    assert outcomes["loaded"] >= 10 and outcomes["refused"] >= 250, outcomes


def test_what_is_written_can_be_read_and_predicts_the_same(good, tmp_path):
    config, state = good
    images = torch.rand(1, 3, 64, 64)
    one = load_segmenter(write_adapter(tmp_path / "a", state, config), pretrained=True)
    again = load_segmenter(one.save_adapter(tmp_path / "b"), pretrained=True)
    assert torch.equal(one.predict(images), again.predict(images))
