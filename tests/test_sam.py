"""SAM 2 and SAM 1 as engines: both packages' real code, with random weights; what is missing or unfit is named."""

import importlib.metadata

import numpy as np
import pytest
import torch

from reinpp.adaptation import engines, sam
from reinpp.adaptation.engines import ENGINES, engine_options, engine_settings
from reinpp.adaptation.proposals import make_proposals
from reinpp.adaptation.sam import agree, generated, sam1, sam2
from reinpp.data.catalog import open_dataset

TINY = dict(model="tiny", checkpoint="random", image_size=256, points_per_side=2, pred_iou_thresh=0.0,
    stability_score_thresh=0.0, box_nms_thresh=1.0, device="cpu")


@pytest.fixture(scope="module")
def scenes():
    return open_dataset("scenes", "train", count=2)


def forget():
    "Nothing stays loaded."
    sam.release()


def holds(found, size, reduction):
    "Proposals on the right grid, ordered, each within its box."
    h, w = -(-size[0] // reduction), -(-size[1] // reduction)
    assert found.image_size == size and found.masks.shape[1:] == (h, w)
    assert len(found.masks) == len(found.scores) == len(found.boxes) > 0
    area = found.masks.flatten(1).sum(1)
    assert (area > 0).all() and (area[:-1] >= area[1:]).all() and 0 <= found.scores.min() and found.scores.max() <= 1
    for mask, (left, top, right, bottom) in zip(found.masks, found.boxes.tolist()):
        y, x = mask.nonzero().T
        assert top // reduction <= y.min() and y.max() < -(-bottom // reduction)
        assert left // reduction <= x.min() and x.max() < -(-right // reduction)
        assert 0 <= left < right <= size[1] and 0 <= top < bottom <= size[0]


def test_sam2_from_image_to_stored_proposals(scenes, tmp_path):
    pytest.importorskip("sam2")
    store = make_proposals(scenes, "sam2", tmp_path, reduction=2, **TINY)
    assert store.manifest["package"] == "sam2 1.1.0" and store.manifest["checkpoint"] == "random"
    assert store.manifest["options"]["points_per_side"] == 2 and "device" not in store.manifest["options"]
    for index in range(2):
        holds(store[index], (128, 256), 2)
    direct = sam2(scenes, 1, 2, **TINY)
    assert torch.equal(store[1].bits, direct.bits) and torch.equal(store[1].boxes, direct.boxes)
    assert len(direct.masks) > 3
    with pytest.raises(ValueError, match="points_per_side 2 .asked: 3.*another folder"):
        make_proposals(scenes, "sam2", tmp_path, reduction=2, **TINY | dict(points_per_side=3))
    make_proposals(scenes, "sam2", tmp_path, reduction=2, **TINY | dict(points_per_batch=1))  # only how fast
    assert len(sam2(scenes, 1, 2, limit=2, **TINY).masks) == 2
    halves = sam2(scenes, 1, 2, **TINY | dict(halves=True))
    holds(halves, (128, 256), 2)
    assert not torch.equal(halves.bits[0], direct.bits[0])
    holds(sam2(scenes, 0, 4, **TINY | dict(points_per_side=1, crop_n_layers=1, use_m2m=True)), (128, 256), 4)
    none = sam2(scenes, 1, 2, **TINY | dict(pred_iou_thresh=0.999))  # nothing found is no error
    assert none.masks.shape == (0, 64, 128)


def test_sam2_checkpoint(scenes, tmp_path):
    "A file of Meta's form; the hash is in the manifest; the store outlives the file; a wrong or broken file is named."
    pytest.importorskip("sam2")
    plain = sam2(scenes, 0, 2, **TINY)
    state = sam._net("sam2", "tiny", "random", 256, torch.device("cpu")).state_dict()
    file, options = tmp_path / "sam2.1_hiera_tiny.pt", TINY | dict(checkpoint=tmp_path / "sam2.1_hiera_tiny.pt")
    torch.save({"model": {name: value + 0.02 if value.ndim == 1 else value for name, value in state.items()}}, file)
    store = make_proposals(scenes, "sam2", tmp_path / "store", reduction=2, **options)
    assert not torch.equal(store[0].bits, plain.bits)  # other weights
    assert sam._generator.cache_info().currsize == sam._net.cache_info().currsize == 0, "the device is free again"
    assert store.manifest["checkpoint"].startswith("sam2.1_hiera_tiny.pt ")
    assert "checkpoint" not in store.manifest["options"]
    with pytest.raises(ValueError, match="checkpoint 'sam2.1_hiera_tiny.pt .*asked: 'random'.*another folder"):
        make_proposals(scenes, "sam2", tmp_path / "store", reduction=2, **TINY)
    with pytest.raises(ValueError, match="model 'small'.*another model.*name the model"):
        sam2(scenes, 0, 2, **options | dict(model="small"))
    file.write_bytes(file.read_bytes()[:100_000])
    forget()
    with pytest.raises(ValueError, match="hiera_tiny.pt: .*damaged"):
        sam2(scenes, 0, 2, **options)
    file.unlink()
    again = make_proposals(scenes, "sam2", tmp_path / "store", reduction=2, **options)
    assert len(again[0].masks) == len(store[0].masks)
    (tmp_path / "store" / "000001.safetensors").unlink()  # now there is something to do
    with pytest.raises(FileNotFoundError, match="no checkpoint .*https://.*sam2.1_hiera_tiny.pt"):
        make_proposals(scenes, "sam2", tmp_path / "store", reduction=2, **options)


def test_sam2_configuration_by_path(scenes, tmp_path):
    sam2_package = pytest.importorskip("sam2")
    file = tmp_path / "mine.yaml"
    with open(f"{sam2_package.__path__[0]}/{sam.SAM2['tiny'][0]}") as text:
        file.write_text(text.read())
    holds(sam2(scenes, 0, 2, **TINY | dict(model=str(file), points_per_side=1)), (128, 256), 2)


def test_sam1_from_image_to_stored_proposals(scenes, tmp_path, monkeypatch):
    """The package's own classes.

    Only the encoder is a small one, since its smallest takes 20 seconds an image on a core."""
    package = pytest.importorskip("segment_anything")
    from segment_anything.modeling import ImageEncoderViT, MaskDecoder, PromptEncoder, Sam, TwoWayTransformer

    def small(checkpoint=None):
        encoder = ImageEncoderViT(img_size=256, patch_size=16, embed_dim=32, depth=2, num_heads=2, out_chans=256,
            use_rel_pos=True, global_attn_indexes=(1,), window_size=7)
        prompts = PromptEncoder(embed_dim=256, image_embedding_size=(16, 16), input_image_size=(256, 256),
            mask_in_chans=16)
        transformer = TwoWayTransformer(depth=2, embedding_dim=256, num_heads=8, mlp_dim=512)
        return Sam(encoder, prompts, MaskDecoder(transformer_dim=256, transformer=transformer))

    monkeypatch.setitem(package.sam_model_registry, "vit_b", small)
    options = dict(model="base", checkpoint="random", points_per_side=2, pred_iou_thresh=-9.0,
        stability_score_thresh=0.0, box_nms_thresh=1.0, device="cpu")
    store = make_proposals(scenes, "sam1", tmp_path / "store", reduction=2, **options)
    for index in range(2):
        holds(store[index], (128, 256), 2)
    assert store.manifest["package"].startswith("segment_anything 1")
    file = tmp_path / "sam.pth"
    torch.save(small().state_dict(), file)
    assert len(sam1(scenes, 0, 2, **options | dict(checkpoint=file)).masks) > 0
    with pytest.raises(ValueError, match="sam1: model='giant' is unknown: use one of base, large, huge"):
        sam1(scenes, 0, 2, **options | dict(model="giant"))


@pytest.mark.parametrize("engine, package, model, url",
    [("sam2", "sam2", "large", "segment_anything_2/092824/sam2.1_hiera_large.pt"),
        ("sam1", "segment_anything", "huge", "segment_anything/sam_vit_h_4b8939.pth")])
def test_what_is_missing_is_named(engine, package, model, url, scenes, tmp_path, monkeypatch):
    forget()
    monkeypatch.setattr(sam, "data_folder", lambda: tmp_path / "data")
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "1.0")
    with pytest.raises(FileNotFoundError) as error:
        make_proposals(scenes, engine, tmp_path / "store")
    text = str(error.value)
    assert "\n" not in text and f"https://dl.fbaipublicfiles.com/{url}" in text
    assert f"data/weights/{url.split('/')[-1]}" in text and "checkpoint=" in text
    assert not (tmp_path / "store").exists()
    with pytest.raises(FileNotFoundError, match="nowhere.pt"):
        ENGINES[engine](scenes, 0, checkpoint="nowhere.pt")
    with pytest.raises(ValueError, match=f"{engine}: model='enormous' is unknown: use one of .*{model}"):
        ENGINES[engine](scenes, 0, model="enormous")

    def absent(name):
        raise importlib.metadata.PackageNotFoundError(name)
    monkeypatch.setattr(importlib.metadata, "version", absent)
    for attempt in (lambda: make_proposals(scenes, engine, tmp_path / "store"), lambda: ENGINES[engine](scenes, 0)):
        with pytest.raises(ImportError, match=f"package {package} is not installed: .*pip install") as error:
            attempt()
        assert "\n" not in str(error.value) and not (tmp_path / "store").exists()


def test_engines_need_no_package_to_be_imported():
    assert "sam2" in ENGINES and "sam1" in ENGINES  # whatever is installed
    packages = "import sam2", "from sam2", "import segment_anything", "from segment_anything"
    for module in (engines, sam):
        with open(module.__file__) as source:
            assert not any(line.startswith(packages) for line in source)


@pytest.mark.parametrize("engine, options", [
    ("classical", dict(scale="60")), ("classical", dict(long_edge=2.5)), ("classical", dict(min_size=None)),
    ("classical", dict(scale=float("nan"))), ("sam2", dict(halves=1)), ("sam2", dict(points_per_side="8")),
    ("sam2", dict(model=3)), ("sam1", dict(box_nms_thresh=[0.7]))])
def test_options_of_another_kind_are_refused(engine, options):
    with pytest.raises(ValueError, match=f"engine '{engine}': {next(iter(options))}="):
        engine_options(engine, **options)


def test_options_that_no_engine_has_are_refused(scenes, tmp_path):
    for engine, options in (("classical", dict(points=3)), ("sam2", dict(points=3)), ("instances", dict(scale=1))):
        with pytest.raises(ValueError, match=f"engine '{engine}' has no option '{next(iter(options))}'"):
            make_proposals(scenes, engine, tmp_path / "x", **options)
        with pytest.raises(ValueError, match="has no option"):
            make_proposals(scenes, engine, **options)
    assert not (tmp_path / "x").exists()
    assert engine_options("classical", scale=1.0)["min_size"] == 20
    assert engine_settings("instances") == dict(engine="instances", options={}, package=None, checkpoint=None)


@pytest.mark.parametrize("engine", ["sam2", "sam1"])
def test_settings_name_what_the_generators_are_always_given(engine):
    "Stores made before these two options went have them in their manifests, and must still fit."
    options = engine_options(engine)
    assert options["crop_n_points_downscale_factor"] == 1 and options["min_mask_region_area"] == 0
    assert not {"checkpoint", "points_per_batch", "device"} & set(options)
    with pytest.raises(ValueError, match="has no option 'min_mask_region_area'"):
        engine_options(engine, min_mask_region_area=9)


class Answers:
    """Stands for a mask generator.

    Says for each image it is shown the masks it was given, in run lengths down the columns."""
    def __init__(self, *lists):
        self.lists = list(lists)

    def generate(self, image):
        masks = self.lists.pop(0)
        assert image.dtype == np.uint8 and image.flags.c_contiguous and all(m.shape == image.shape[:2] for m in masks)
        flat = [m.T.ravel().astype(np.int8) for m in masks]
        edges = [np.flatnonzero(np.diff(f, prepend=0, append=0)) for f in flat]
        counts = [np.diff([0, *e, f.size]).tolist() for e, f in zip(edges, flat)]
        return [dict(segmentation=dict(counts=c), predicted_iou=1.5 - k) for k, c in enumerate(counts)]


@pytest.mark.parametrize("size, reduction", [((37, 54), 4), ((36, 52), 4), ((13, 31), 2), ((9, 7), 1)])
def test_run_lengths_become_cells(size, reduction):
    rng = np.random.default_rng(0)
    masks = [rng.random(size) > level for level in (-1, 0.3, 0.6, 0.9, 2)]  # everything .. nothing
    found = generated(Answers(masks), torch.zeros(3, *size, dtype=torch.uint8), reduction)
    for mask in masks[:3]:
        across, down = range(0, size[1], reduction), range(0, size[0], reduction)
        parts = [[mask[y:y + reduction, x:x + reduction] for x in across] for y in down]
        cells = np.array([[2 * part.sum() >= part.size for part in row] for row in parts])
        assert any((cells == m).all() for m in found.masks.numpy())
    assert found.boxes[0].tolist() == [0, 0, size[1], size[0]] and found.scores.max() == 1 and found.scores.min() >= 0


@pytest.mark.parametrize("width", [100, 101, 97])
def test_halves_are_joined_where_they_agree(width):
    height, cut = 40, 4 * round(width / 8)

    def band(top, bottom, left, right):
        mask = np.zeros((height, width), bool)
        mask[top:bottom, left:right] = True
        return mask

    road, car = band(24, 40, 0, width), band(8, 20, cut - 8, cut + 10)
    pole, lone = band(0, 24, 4, 8), band(4, 8, cut - 12, cut)
    shown = [[m[:, :cut] for m in (road, car, pole, lone)], [m[:, cut:] for m in (car, road)]]
    image = torch.zeros(3, height, width, dtype=torch.uint8)
    found = generated(Answers(*shown), image, 4, halves=True)
    whole = generated(Answers([road, car, pole, lone]), image, 4)
    assert torch.equal(found.masks, whole.masks) and torch.equal(found.boxes, whole.boxes) and len(found.masks) == 4
    assert len(generated(Answers([], []), image, 4, halves=True).masks) == 0
    assert len(generated(Answers([road]), image, 4).masks) == 1  # one image unless asked
    square = generated(Answers([road[:, :cut]]), image[..., :cut], 4, halves=True)
    assert len(square.masks) == 1  # not wide: one image, too


def test_only_mutual_best_continuations_agree():
    left = np.array([[1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 0, 0], [0, 0, 0, 0, 0, 0]], bool)
    right = np.array([[1, 1, 1, 1, 0, 0], [0, 0, 0, 0, 1, 1]], bool)
    assert agree(left, right) == [(1, 0)] and agree(left[:0], right) == [] and agree(left, right[:0]) == []
