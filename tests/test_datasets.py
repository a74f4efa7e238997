"Readers on small trees, bad files, labels that must not be read, rare class sampling, and the sampler's purity."
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader
from torchvision import tv_tensors

from reinpp.data import datasets, sampling
from reinpp.data.catalog import DATASETS, open_dataset
from reinpp.data.datasets import concat
from reinpp.data.sampling import (
    STATISTICS,
    Sampler,
    class_frequencies,
    class_pixels,
    class_statistics,
    fold,
    rare_class_probabilities,
)

SHARED = Path(__file__).resolve().parents[2] / "shared"
CAMVID_TO_TRAIN = {0: 10, 1: 2, 2: 5, 3: 0, 4: 1, 5: 8, 6: 7, 7: 4, 8: 13, 9: 11, 10: 12, 11: 255}


def picture(h=6, w=8, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (h, w, 3), dtype=np.uint8)


def save(array, path, **options):
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path, **options)


@pytest.fixture
def camvid(tmp_path):
    for split in ("day_train", "dusk_train"):
        for k, suffix in enumerate((".png", ".jpg", ".png")):
            save(picture(seed=k), tmp_path / split / f"f{k}{suffix}")
            save((np.arange(48).reshape(6, 8) % 12).astype(np.uint8), tmp_path / f"{split}annot" / f"f{k}.png")
    return tmp_path


def one_line(error):
    assert "\n" not in str(error.value)
    return str(error.value)


# ---------------------------------------------------------------- camvid

def test_camvid_reads_png_and_jpeg_and_maps_ids(camvid):
    ds = open_dataset("camvid", "day_train", root=camvid)
    assert len(ds) == 3 and len(ds.classes) == 19
    image, label, name = ds[0]
    assert type(image) is tv_tensors.Image and image.dtype == torch.uint8 and image.shape == (3, 6, 8) and name == "f0"
    assert np.array_equal(image.permute(1, 2, 0).numpy(), picture(seed=0))
    assert type(label) is tv_tensors.Mask and label.dtype == torch.uint8
    assert label.flatten().tolist() == [CAMVID_TO_TRAIN[i % 12] for i in range(48)]
    assert sorted(ds.evaluated) == [0, 1, 2, 4, 5, 7, 8, 10, 11, 12, 13]
    assert ds[1][0].shape == (3, 6, 8) and [n for *_, n in ds] == ["f0", "f1", "f2"]


def test_root_may_hold_the_set_under_its_name(camvid, tmp_path_factory):
    above = tmp_path_factory.mktemp("data")
    camvid.rename(above / "camvid")
    assert len(open_dataset("camvid", "day_train", root=above)) == len(
        open_dataset("camvid", "day_train", root=above / "camvid")) == 3


@pytest.mark.parametrize("damage", ["deleted", "garbage", "a file"])
def test_without_labels_no_label_is_opened(camvid, damage, monkeypatch):
    import shutil
    folder = camvid / "dusk_trainannot"
    if damage == "garbage":
        for p in folder.iterdir():
            p.write_text("no image")
    else:
        shutil.rmtree(folder)
        if damage == "a file":
            folder.write_text("not a folder")
    monkeypatch.setattr(datasets, "read_label", lambda *a: pytest.fail("a label was opened"))
    ds = open_dataset("camvid", "dusk_train", root=camvid, labels=False)
    assert len(ds) == 3 and all(label is None for _, label, _ in ds)
    with pytest.raises(ValueError, match="opened with labels=False"):
        ds.read_label(0)


def test_unknown_names_say_what_exists(camvid):
    with pytest.raises(ValueError) as e:
        open_dataset("camvit", "x")
    assert all(n in one_line(e) for n in DATASETS)
    with pytest.raises(ValueError) as e:
        open_dataset("camvid", "night", root=camvid)
    assert "day_train, dusk_train" in one_line(e) and "annot" not in one_line(e)
    with pytest.raises(ValueError) as e:
        open_dataset("scenes", "dawn/train")
    assert "night/train" in one_line(e)
    with pytest.raises(ValueError, match="style"):
        open_dataset("scenes", "train", style="oil")
    with pytest.raises(ValueError, match="count"):
        open_dataset("scenes", "train", count=0)


def test_missing_folder_says_where_and_whence(tmp_path):
    with pytest.raises(FileNotFoundError) as e:
        open_dataset("camvid", "day_train", root=tmp_path / "nowhere")
    assert str(tmp_path / "nowhere") in one_line(e) and "SegNet" in one_line(e) and "data_root" in one_line(e)
    with pytest.raises(FileNotFoundError, match="masks"):
        open_dataset("folder", "train", root=tmp_path / "nowhere")
    with pytest.raises(ValueError, match="root"):
        open_dataset("folder", "train")


def test_missing_label_folder(camvid):
    import shutil
    shutil.rmtree(camvid / "day_trainannot")
    with pytest.raises(FileNotFoundError, match="day_trainannot"):
        open_dataset("camvid", "day_train", root=camvid)


def test_empty_folder_doubled_stem_and_lonely_files(camvid):
    (camvid / "none").mkdir()
    (camvid / "noneannot").mkdir()
    with pytest.raises(ValueError, match="none.*empty"):
        open_dataset("camvid", "none", root=camvid)
    (camvid / "day_trainannot" / "f1.png").unlink()
    with pytest.raises(ValueError, match="partner.*f1"):
        open_dataset("camvid", "day_train", root=camvid)
    save(picture(), camvid / "dusk_train" / "f1.png")
    with pytest.raises(ValueError, match="same stem"):
        open_dataset("camvid", "dusk_train", root=camvid)


def test_label_value_outside_the_map_names_file_and_value(camvid):
    bad = np.zeros((6, 8), np.uint8)
    bad[3, 3] = 12
    save(bad, camvid / "day_trainannot" / "f2.png")
    ds = open_dataset("camvid", "day_train", root=camvid)
    ds[0]
    with pytest.raises(ValueError) as e:
        ds[2]
    assert "f2.png" in one_line(e) and "value 12" in one_line(e)


def test_size_mismatch_names_the_file(camvid):
    save(np.zeros((6, 9), np.uint8), camvid / "day_trainannot" / "f1.png")
    with pytest.raises(ValueError) as e:
        open_dataset("camvid", "day_train", root=camvid)[1]
    assert "f1" in one_line(e) and "9x6" in one_line(e) and "8x6" in one_line(e)


# ---------------------------------------------------------------- files

@pytest.fixture
def folder(tmp_path):
    for k in range(2):
        save(picture(seed=k), tmp_path / "train" / "images" / f"{k}.png")
        save(np.full((6, 8), (0, 255)[k], np.uint8), tmp_path / "train" / "masks" / f"{k}.png")
    return tmp_path


def test_folder_with_and_without_masks(folder):
    ds = open_dataset("folder", "train", root=folder)
    assert ds[0][1].unique().tolist() == [0] and ds[1][1].unique().tolist() == [255] and len(ds.evaluated) == 19
    assert open_dataset("folder", "train", root=folder, labels=False)[0][1] is None
    assert open_dataset("folder", "train/images", root=folder)[0][1] is None
    assert len(open_dataset("folder", ".", root=folder / "train")) == 2


def test_folder_with_classes_of_its_own(folder):
    ds = open_dataset("folder", "train", root=folder, classes=("soil", "crop", "weed"), ids={0: 2, 255: 0, 9: 255})
    assert ds.classes == ("soil", "crop", "weed") and ds.evaluated == (0, 2)
    assert ds[0][1].unique().tolist() == [2] and ds[1][1].unique().tolist() == [0]
    many = tuple(f"class {i}" for i in range(150))
    assert open_dataset("folder", "train", root=folder, classes=many).evaluated == tuple(range(150))
    with pytest.raises(ValueError, match="ids maps 0 to 3"):
        open_dataset("folder", "train", root=folder, classes=("a", "b", "c"), ids={0: 3})


def test_readable_odd_images(folder):
    images = folder / "train" / "images"
    grey = np.arange(48, dtype=np.uint8).reshape(6, 8)
    save(grey, images / "0.png")
    Image.fromarray(picture(seed=1)).quantize(16).save(images / "1.png")
    ds = open_dataset("folder", "train", root=folder)
    assert np.array_equal(ds[0][0][2].numpy(), grey) and ds[1][0].shape == (3, 6, 8)
    palette = Image.fromarray(np.full((6, 8), 3, np.uint8), mode="L").convert("P")
    palette.putpalette(list(range(256)) * 3)
    palette.save(folder / "train" / "masks" / "0.png")
    assert ds[0][1].unique().tolist() == [3]


@pytest.mark.parametrize("fault", ["truncated", "text", "cmyk", "exif", "deep"])
def test_bad_images_name_the_file(folder, fault):
    path = folder / "train" / "images" / "0.png"
    if fault == "truncated":
        save(picture(64, 64), path)
        path.write_bytes(path.read_bytes()[:2000])
    if fault == "text":
        path.write_text("hello")
    if fault == "deep":
        save(np.zeros((6, 8), np.uint16), path)
    if fault in ("cmyk", "exif"):
        path.unlink()
        path = path.with_suffix(".jpg")
        exif = Image.Exif()
        exif[0x0112] = 6 if fault == "exif" else 1
        Image.fromarray(picture()).convert("CMYK" if fault == "cmyk" else "RGB").save(path, exif=exif)
    with pytest.raises(ValueError) as e:
        open_dataset("folder", "train", root=folder)[0]
    assert str(path) in one_line(e)


@pytest.mark.parametrize(
"array", [np.zeros((6, 8), np.uint16), np.zeros((6, 8, 3), np.uint8), np.full((6, 8), 19, np.uint8)])
def test_bad_labels_name_the_file(folder, array):
    save(array, folder / "train" / "masks" / "0.png")
    with pytest.raises(ValueError) as e:
        open_dataset("folder", "train", root=folder)[0]
    assert str(folder / "train" / "masks" / "0.png") in one_line(e)


def test_only_scenes_have_instances(folder):
    with pytest.raises(ValueError, match="0.png"):
        open_dataset("folder", "train", root=folder).instances(0)


# ---------------------------------------------------------------- the real CamVid, where it is

@pytest.mark.skipif(not (SHARED / "data" / "camvid").is_dir(), reason="no CamVid beside the checkout")
def test_real_camvid():
    root = SHARED / "data" / "camvid"
    for split, n in (("day_train", 153), ("day_val", 22), ("dusk_train", 62)):
        ds = open_dataset("camvid", split, root=root)
        assert len(ds) == n and ds[0][0].shape == (3, 360, 480)
        for i in (0, n - 1):
            own = np.asarray(Image.open(root / f"{split}annot" / f"{ds[i][2]}.png"))
            assert np.array_equal(np.vectorize(CAMVID_TO_TRAIN.get)(own), ds[i][1].numpy())
    counts = class_pixels(open_dataset("camvid", "day_train", root=root))
    assert set(torch.nonzero(counts.sum(0)).flatten().tolist()) == set(ds.evaluated)


# ---------------------------------------------------------------- scenes

def test_scenes_are_the_same_in_any_order_and_worker():
    ds = open_dataset("scenes", "rain/val", count=6, size=(32, 64))
    straight = [ds[i] for i in range(6)]
    again = open_dataset("scenes", "rain/val", count=6, size=(32, 64))
    loaded = list(DataLoader(again, batch_size=None, num_workers=2, collate_fn=lambda x: x))
    for i in (4, 0, 5, 1, 3, 2):
        for a, b, c in zip(straight[i], again[i], loaded[i]):
            assert a == b == c if isinstance(a, str) else torch.equal(a, b) and torch.equal(a, c)
    assert straight[0][0].shape == (3, 32, 64) and len({n for *_, n in straight}) == 6
    changed = ds[0][0]
    changed.zero_()
    assert torch.equal(ds[0][0], straight[0][0])


def test_scenes_splits():
    assert len(open_dataset("scenes", "train")) == 800 and len(open_dataset("scenes", "snow/val")) == 100
    assert list(open_dataset("scenes", "fog/val", count=2, style="game").reader.seeds) == [1_250_000, 1_250_001]
    assert open_dataset("scenes", "day/val", count=2).reader.names == open_dataset("scenes", "val",
        count=2).reader.names
    ds = open_dataset("scenes", "train", count=2, labels=False, size=(32, 64))
    instances = ds.instances(1)
    assert ds[1][1] is None and instances.dtype == torch.int32 and instances.shape == (32, 64) and instances.min() > 0
    assert all(label is None for _, label in ds.reader.kept.values())
    with pytest.raises(IndexError):
        ds[2]
    assert torch.equal(ds[-1][0], ds[1][0])


def test_concat(camvid):
    parts = [open_dataset("scenes", "train", count=2, size=(32, 64)), open_dataset("camvid", "day_train", root=camvid),
        open_dataset("scenes", "night/train", count=1, size=(32, 64))]
    both = concat(parts)
    assert len(both) == 6 and [n for *_, n in both] == [n for ds in parts for *_, n in ds]
    assert torch.equal(both[4][0], parts[1][2][0]) and torch.equal(both.read_label(2), parts[1].read_label(0))
    assert both.evaluated == tuple(range(19))
    assert class_pixels(both).shape == (6, 19) and both.instances(5).shape == (32, 64)
    assert not concat([parts[0], open_dataset("scenes", "train", count=1, labels=False)]).labelled
    with pytest.raises(ValueError):
        concat([])


# ---------------------------------------------------------------- rare class sampling

@pytest.mark.skipif(not (SHARED / "fixtures" / "rcs_reference.json").is_file(),
reason="no reference values beside the checkout")
@pytest.mark.parametrize("name", ["cityscapes", "synthia", "acdc"])
def test_reference_probabilities(name):
    reference = json.loads((SHARED / "fixtures" / "rcs_reference.json").read_text())[name]
    counts = torch.tensor([[reference["pixels"].get(str(c), 0) for c in range(19)]])
    p = rare_class_probabilities(class_frequencies(counts))
    expected = torch.tensor([reference["probability_T001"].get(str(c), 0.) for c in range(19)], dtype=torch.float64)
    torch.testing.assert_close(p, expected, atol=1.1e-6, rtol=0)
    assert p.sum() == pytest.approx(1) and all(p[c] == 0 for c in range(19) if counts[0, c] == 0)


def test_known_largest_probabilities():
    "Synthia's five rarest, from pixel counts of the whole set."
    pixels = torch.tensor([1649822552, 1796774124, 2684148181, 23665508, 24576213, 95487082, 3800553, 9759128,
        950722944, 0, 633876892, 390711925, 43147132, 376979506, 0, 129164165, 0, 18669401, 19245847])
    p = rare_class_probabilities(class_frequencies(pixels[None]))
    for c, value in {6: .154, 7: .144, 17: .131, 18: .130, 3: .123}.items():
        assert p[c] == pytest.approx(value, abs=6e-4)
    assert p[[9, 14, 16]].sum() == 0 and p[[0, 1, 2]].max() < .0005


class Counted:
    "A set of which only the length is ever used."
    name, split = "counted", "train"

    def __init__(self, n):
        self.n = n

    def __len__(self):
        return self.n


def test_sampler_draws_by_class():
    counts = torch.zeros(50, 19, dtype=torch.int64)
    counts[:, 0] = 100_000
    counts[:25, 1] = 40_000
    counts[3:6, 12] = 4_000
    counts[6, 12] = 3_000  # not more than 3,000
    counts[7, 17] = 100  # nowhere enough
    sampler = Sampler(Counted(50), rcs=True, counts=counts)
    drawn = [sampler.draw(k, 11) for k in range(4000)]
    assert all(counts[i, c] > 3000 for i, c in drawn) and sampler.probabilities[17] == 0
    share = torch.bincount(torch.tensor([c for _, c in drawn]), minlength=19) / 4000
    torch.testing.assert_close(share.double(), sampler.probabilities, atol=.02, rtol=0)
    rider = torch.bincount(torch.tensor([i for i, c in drawn if c == 12]), minlength=50)
    assert set(torch.nonzero(rider).flatten().tolist()) == {3, 4, 5} and rider[3:6].min() > .28 * rider.sum()
    flat = rare_class_probabilities(class_frequencies(counts) * (sampler.probabilities > 0), temperature=1e6)
    torch.testing.assert_close(flat[[0, 1, 12]], torch.full((3,), 1 / 3, dtype=torch.float64), atol=1e-4, rtol=0)


def test_draws_are_pure_functions():
    counts = torch.randint(0, 9000, (20, 19), generator=torch.Generator().manual_seed(0))
    for options in (dict(), dict(rcs=True, counts=counts)):
        one, two = Sampler(Counted(20), **options), Sampler(Counted(20), **options)
        keys = list(range(100))
        forward = [one.draw(k, 5) for k in keys]
        torch.manual_seed(1)
        torch.rand(3)  # other draws change nothing
        assert [two.draw(k, 5) for k in reversed(keys)] == forward[::-1]
        assert [one.draw(k, 6) for k in keys] != forward
    plain = [Sampler(Counted(20)).draw(k, 5) for k in range(40)]
    assert sorted(i for i, _ in plain[:20]) == sorted(i for i, _ in plain[20:]) == list(range(20))
    assert plain[:20] != plain[20:] and {c for _, c in plain} == {None}


def test_sampler_refuses_what_cannot_work():
    with pytest.raises(ValueError, match="lower min_pixels"):
        Sampler(Counted(2), rcs=True, counts=torch.ones(2, 19, dtype=torch.int64))
    with pytest.raises(ValueError, match="count again"):
        Sampler(Counted(2), rcs=True, counts=torch.ones(3, 19, dtype=torch.int64))
    with pytest.raises(ValueError, match="labels=False"):
        Sampler(open_dataset("scenes", "train", count=2, labels=False), rcs=True)


def test_fold_is_stable_and_spread():
    assert (fold(0), fold(0, 1), fold(7, 123456789, -3)) == (4761921975702974394, 1506311409109703068,
        3253648628107706771)
    values = {fold(s, a, b) for s in range(10) for a in range(30) for b in range(30)}
    assert len(values) == 9000 and 0 <= min(values) and max(values) < 2**63
    assert abs(np.mean(list(values)) / 2**63 - .5) < .02
    torch.manual_seed(fold(3, 4))


def test_kept_scenes_are_not_shared():
    ds = open_dataset("scenes", "train", count=2)
    first, again = ds[1], open_dataset("scenes", "train", count=2)
    copies = first[0].clone(), first[1].clone()
    first[0].zero_()
    first[1].zero_()
    assert all(torch.equal(a, b) for other in (ds, again) for a, b in zip(other[1], copies))


# ---------------------------------------------------------------- class statistics on disk

@pytest.fixture
def gta(tmp_path):
    """Three pairs of GTAV in its own ids.

    Road everywhere, `k` rows of riders (25) in number k, one row of number plates (34)."""
    for k in range(3):
        label = np.full((6, 8), 7, np.uint8)
        label[:k] = 25
        label[5] = 34
        save(picture(seed=k), tmp_path / "gta" / "images" / f"0000{k}.png")
        save(label, tmp_path / "gta" / "labels" / f"0000{k}.png")
    return tmp_path / "gta"


def no_reading(*a):
    pytest.fail("a label was read")


def test_statistics_have_the_shared_form(gta, monkeypatch):
    ds = open_dataset("gtav", "train", root=gta)
    sampler = Sampler(ds, rcs=True, min_pixels=4)
    stats, by_file, with_class = (json.loads((gta / name).read_text()) for name in STATISTICS)
    assert stats == [{"0": 40, "file": "labels/00000_labelTrainIds.png"},
        {"0": 32, "12": 8, "file": "labels/00001_labelTrainIds.png"},
        {"0": 24, "12": 16, "file": "labels/00002_labelTrainIds.png"}]
    assert by_file == {e["file"]: {k: v for k, v in e.items() if k != "file"} for e in stats}
    assert with_class == {"0": [[e["file"], e["0"]] for e in stats], "12": [[e["file"], e["12"]] for e in stats[1:]]}
    assert sorted(p.name for p in gta.iterdir()) == ["images", "labels", *STATISTICS]
    assert sampler.images[12] == [1, 2] and torch.equal(class_statistics(ds), class_pixels(ds))
    monkeypatch.setattr(sampling, "class_pixels", no_reading)
    again = Sampler(open_dataset("gtav", "train", root=gta), rcs=True, min_pixels=4)
    assert torch.equal(again.probabilities, sampler.probabilities)
    assert [again.draw(k, 0) for k in range(50)] == [sampler.draw(k, 0) for k in range(50)]


@pytest.mark.parametrize("name", ["data/gta/labels/0000{}_labelTrainIds.png",
"D:\\data\\gta\\labels\\0000{}_labelTrainIds.png", "/elsewhere/0000{}.png"])
def test_statistics_of_other_converters_are_used(gta, monkeypatch, name):
    counts = [{"0": 40}, {"0": 32, "12": 8}, {"0": 24, "12": 16}]
    (gta / STATISTICS[0]).write_text(
        json.dumps([row | {"file": name.format(k)} for k, row in reversed(list(enumerate(counts)))]
        + [{"3": 9, "file": "data/gta/labels/00077_labelTrainIds.png"}]))
    monkeypatch.setattr(sampling, "class_pixels", no_reading)
    found = class_statistics(open_dataset("gtav", "train", root=gta))
    assert found[:, 0].tolist() == [40, 32, 24] and found[:, 12].tolist() == [0, 8, 16] and found.sum() == 120


def test_statistics_that_do_not_fit_stop(gta):
    ds = open_dataset("gtav", "train", root=gta)
    class_statistics(ds)
    path = gta / STATISTICS[0]
    good = json.loads(path.read_text())
    for bad, says in ((good[:2], "no entry for labels/00002"),
            ([good[0] | {"0": 41}, *good[1:]], "not those of the label"),
            ([*good[:2], good[2] | {"0": 41}], "labels/00002_labelTrainIds.png are not those of the label"),
            ([good[0] | {"31": 2}, *good[1:]], "no count of pixels"),
            ([good[0] | {"0": 1.5}, *good[1:]], "no count of pixels"), ({"0": 3}, "no class statistics")):
        path.write_text(json.dumps(bad))
        with pytest.raises(ValueError) as e:
            Sampler(ds, rcs=True)
        assert str(path) in one_line(e) and says in one_line(e) and "statistics=" in one_line(e)
    path.write_text("[{")
    with pytest.raises(ValueError, match="no class statistics"):
        class_statistics(ds)


def test_statistics_elsewhere(gta, tmp_path, monkeypatch):
    elsewhere = tmp_path / "kept" / "gta"
    ds = open_dataset("gtav", "train", root=gta, statistics=elsewhere)
    counts = class_statistics(ds)
    assert (elsewhere / STATISTICS[2]).is_file() and not (gta / STATISTICS[0]).exists()
    monkeypatch.setattr(sampling.os, "access", lambda *a: False)
    monkeypatch.setattr(sampling, "class_pixels", no_reading)
    with pytest.raises(PermissionError) as e:
        class_statistics(open_dataset("gtav", "train", root=gta))
    assert str(gta) in one_line(e) and "statistics=" in one_line(e)
    assert torch.equal(class_statistics(ds), counts)
    assert torch.equal(class_statistics(concat([ds, ds])), torch.cat([counts, counts]))


def test_statistics_are_not_kept_unasked_for_small_sets(camvid):
    before = sorted(camvid.iterdir())
    Sampler(open_dataset("camvid", "day_train", root=camvid), rcs=True, min_pixels=1)
    assert sorted(camvid.iterdir()) == before
    with pytest.raises(ValueError, match="labels=False"):
        class_statistics(open_dataset("camvid", "day_train", root=camvid, labels=False))


def test_counting_in_processes(tmp_path):
    for k in range(70):
        save(picture(seed=k), tmp_path / "train" / "images" / f"{k}.png")
        save(np.full((6, 8), k % 19, np.uint8), tmp_path / "train" / "masks" / f"{k}.png")
    ds = open_dataset("folder", "train", root=tmp_path)
    assert torch.equal(class_pixels(ds, workers=2), class_pixels(ds, workers=0))
    assert class_pixels(ds).dtype == torch.int64
    save(np.full((6, 8), 99, np.uint8), tmp_path / "train" / "masks" / "66.png")
    with pytest.raises(ValueError) as e:
        class_pixels(ds, workers=2)
    assert "66.png" in one_line(e) and "value 99" in one_line(e)
    counts = class_pixels(open_dataset("folder", "train", root=tmp_path, on_error="skip"), workers=2)
    assert counts.sum(1).tolist() == [48 * (name != "66") for name in ds.reader.names]
