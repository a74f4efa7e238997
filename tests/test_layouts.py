"Every set on disk, in small: people's layouts, own ids, converted labels, archives, and each bad input to be named."
import os
import re
import shutil
import zipfile
from contextlib import contextmanager
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from reinpp.data.catalog import DATASETS, OnDisk, open_dataset
from reinpp.data.datasets import concat
from reinpp.files import BadFile, Member

IGNORE = 255
CITYSCAPES = {7: 0, 8: 1, 11: 2, 12: 3, 13: 4, 17: 5, 19: 6, 20: 7, 21: 8, 22: 9, 23: 10, 24: 11, 25: 12, 26: 13,
              27: 14, 28: 15, 31: 16, 32: 17, 33: 18}
SYNTHIA = {3: 0, 4: 1, 2: 2, 21: 3, 5: 4, 7: 5, 15: 6, 9: 7, 6: 8, 16: 9, 1: 10, 10: 11, 17: 12, 8: 13, 18: 14,
           19: 15, 20: 16, 12: 17, 11: 18}
MAPILLARY = {i: t for t, ids in enumerate(
    ("7 8 10 13 14 23 24", "2 9 11 15", "17", "6", "3", "44 45 47", "48", "46 49 50", "30", "29", "27", "19",
    "20 21 22", "55", "61", "54", "58", "57", "52")) for i in map(int, ids.split())}
TRAIN = {i: i for i in range(19)}
H, W = 8, 10


def picture(seed=0, h=H, w=W):
    return np.random.default_rng(seed).integers(0, 256, (h, w, 3), dtype=np.uint8)


def one_line(error):
    assert "\n" not in str(error.value)
    return str(error.value)


def save(array, path, **options):
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    if array.dtype == np.uint16 and array.ndim == 3:
        assert cv2.imwrite(str(path), array[..., ::-1])
    else:
        Image.fromarray(array).save(path, **options)


def palette_label(array, path):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(array).convert("P")
    image.putpalette(list(range(255, -1, -1)) * 3)
    image.putdata(array.flatten().tolist())
    image.save(path)


def red16(ids):
    return np.stack([ids, np.arange(ids.size).reshape(ids.shape) * 700 % 65536, np.zeros_like(ids)],
        -1).astype(np.uint16)


# name, split: (folder, image, label or None, {id: trainId}, highest id, number)
SETS = {
    ("gtav", "train"): ("gta", "images/0000{}.png", "labels/0000{}.png", CITYSCAPES, 34, 24966),
    ("synthia", "train"): ("synthia", "RGB/000000{}.png", "GT/LABELS/000000{}.png", SYNTHIA, 22, 9400),
    ("urbansyn", "train"): ("urbansyn", "rgb/rgb_000{}.png", "ss/ss_000{}.png", TRAIN, 19, 7539),
    ("cityscapes", "train"): ("cityscapes", "leftImg8bit/train/ulm/ulm_00000{}_000019_leftImg8bit.png",
    "gtFine/train/ulm/ulm_00000{}_000019_gtFine_labelIds.png", CITYSCAPES, 33, 2975),
    ("cityscapes", "val"): ("cityscapes", "leftImg8bit/val/lindau/lindau_00000{}_000019_leftImg8bit.png",
    "gtFine/val/lindau/lindau_00000{}_000019_gtFine_labelTrainIds.png", TRAIN, 18, 500),
    ("cityscapes", "test"): ("cityscapes", "leftImg8bit/test/bonn/bonn_00000{}_000019_leftImg8bit.png", None, None,
    None, 1525),
    ("bdd100k", "train"): ("bdd100k", "images/10k/train/0a0a0b1a-7c39d84{}.jpg",
    "labels/sem_seg/masks/train/0a0a0b1a-7c39d84{}.png", TRAIN, 18, 7000),
    ("bdd100k", "val"): ("bdd100k", "images/10k/val/7d06fefd-f7be05a{}.jpg",
    "labels/sem_seg/masks/val/7d06fefd-f7be05a{}.png", TRAIN, 18, 1000),
    ("mapillary", "train"): ("mapillary", "training/images/__CRyFzoDOXn6unQ6a3Dn{}.jpg",
    "training/v1.2/labels/__CRyFzoDOXn6unQ6a3Dn{}.png", MAPILLARY, 65, 18000),
    ("mapillary", "val"): ("mapillary", "validation/images/a_{}.jpg", "validation/v1.2/labels/a_{}.png", MAPILLARY, 65,
    2000),
    ("acdc", "night/val"): ("acdc", "rgb_anon/night/val/GOPR0356/GOPR0356_frame_00032{}_rgb_anon.png",
    "gt/night/val/GOPR0356/GOPR0356_frame_00032{}_gt_labelTrainIds.png", TRAIN, 18, 106),
    ("acdc", "fog/train"): ("acdc", "rgb_anon/fog/train/GOPR0475/GOPR0475_frame_00004{}_rgb_anon.png",
    "gt/fog/train/GOPR0475/GOPR0475_frame_00004{}_gt_labelIds.png", CITYSCAPES, 33, 400),
    ("acdc", "rain/test"): ("acdc", "rgb_anon/rain/test/GP010571/GP010571_frame_00004{}_rgb_anon.png", None, None, None,
    500),
    ("darkzurich", "train"): ("dark_zurich", "rgb_anon/train/night/GOPR0351/GOPR0351_frame_00000{}_rgb_anon.png", None,
    None, None, 2416),
    ("darkzurich", "val"): ("dark_zurich", "rgb_anon/val/night/GP010397/GP010397_frame_00000{}_rgb_anon.png",
    "gt/val/night/GP010397/GP010397_frame_00000{}_gt_labelTrainIds.png", TRAIN, 18, 50),
    ("darkzurich", "test"): ("dark_zurich", "rgb_anon/test/night/GOPR0364/GOPR0364_frame_00000{}_rgb_anon.png", None,
    None, None, 151),
}


def build(root, name, split, count=3):
    "A tree of that layout with every id that may occur; the labels to expect."
    folder, image, label, ids, highest, _ = SETS[name, split]
    expected = []
    for k in range(count):
        save(picture(k), root / folder / image.format(k))
        if label is None: continue
        values = np.resize([*range(highest + 1), *([255] if ids is TRAIN else [])], H * W).reshape(H,
            W).astype(np.uint8)
        values = np.roll(values, k)
        path = root / folder / label.format(k)
        if name == "synthia":
            save(red16(values), path)
        elif name in ("gtav", "mapillary"):
            palette_label(values, path)
        else:
            save(values, path)
        expected.append(np.vectorize(lambda v: ids.get(int(v), IGNORE))(values))
    if name == "cityscapes" and label:  # what else lies in gtFine
        for extra in ("_gtFine_color.png", "_gtFine_instanceIds.png", "_gtFine_polygons.json"):
            (root / folder / re.sub("_gtFine.*", extra, label.format(0))).write_bytes(b"x")
    return root / folder, expected


@pytest.mark.parametrize("name, split", SETS)
def test_layout(name, split, tmp_path):
    folder, expected = build(tmp_path, name, split)
    for root in (tmp_path, folder):
        ds = open_dataset(name, split, root=root)
        assert len(ds) == 3 and ds.labelled == bool(expected) and len(ds.classes) == 19
        for k in range(3):
            image, label, _ = ds[k]
            assert image.shape == (3, H, W)
            if not ds.reader.image_paths[k].suffix == ".jpg":
                assert np.array_equal(image.permute(1, 2, 0).numpy(), picture(k))
            if expected:
                assert label.dtype == torch.uint8 and np.array_equal(label.numpy(), expected[k])
            else:
                assert label is None
    assert DATASETS[name].splits[split].count == SETS[name, split][5]
    assert len(ds.evaluated) == (16 if name == "synthia" else 19)


@pytest.mark.parametrize("name, split", [key for key, value in SETS.items() if value[2]])
def test_without_labels_the_label_folder_is_not_needed(name, split, tmp_path):
    folder, _ = build(tmp_path, name, split)
    labels = folder / SETS[name, split][2].partition("/")[0]
    shutil.rmtree(labels / "v1.2" if name == "mapillary" else labels)
    assert all(label is None for _, label, _ in open_dataset(name, split, root=tmp_path, labels=False))
    with pytest.raises(FileNotFoundError, match="labels=False"):
        open_dataset(name, split, root=tmp_path)


@pytest.mark.parametrize("name, split", [("gtav", "train"), ("synthia", "train"), ("cityscapes", "train"),
("mapillary", "val"), ("acdc", "fog/train")])
def test_converted_labels_win(name, split, tmp_path):
    folder, expected = build(tmp_path, name, split)
    original = folder / SETS[name, split][2].format(1)
    converted = original.with_name(original.name.replace("_labelIds", "").removesuffix(".png") + "_labelTrainIds.png")
    save(np.full((H, W), 7, np.uint8), converted)
    ds = open_dataset(name, split, root=tmp_path)
    assert ds[1][1].unique().tolist() == [7] and np.array_equal(ds[0][1].numpy(), expected[0])
    original.unlink()
    assert open_dataset(name, split, root=tmp_path)[1][1].unique().tolist() == [7]


def pack(folder, top=""):
    "What lies in each subfolder of `folder` into a zip of its own, as downloads are."
    for below in [p for p in folder.iterdir() if p.is_dir()]:
        with zipfile.ZipFile(folder / f"{below.name}.zip", "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr(f"{top}license.txt", "-")
            for path in sorted(below.rglob("*")):
                archive.write(path, top + path.relative_to(folder).as_posix())
        shutil.rmtree(below)


@pytest.mark.parametrize("top", ["", "download/"])
@pytest.mark.parametrize("name, split", [("gtav", "train"), ("synthia", "train"), ("cityscapes", "train"),
("bdd100k", "val"), ("mapillary", "val"), ("acdc", "night/val")])
def test_archives_may_stay_packed(name, split, top, tmp_path):
    folder, expected = build(tmp_path, name, split)
    unpacked = [ds for ds in open_dataset(name, split, root=tmp_path)]
    pack(folder, top)
    ds = open_dataset(name, split, root=tmp_path)
    assert len(ds) == 3 and all(type(p) is Member for p in ds.reader.image_paths)
    for a, b in zip(unpacked, ds):
        assert torch.equal(a[0], b[0]) and torch.equal(a[1], b[1]) and a[2] == b[2]


def test_archives_in_several_processes(tmp_path):
    folder, expected = build(tmp_path, "cityscapes", "train", 8)
    pack(folder)
    ds = open_dataset("cityscapes", "train", root=tmp_path)
    ds[0]  # open here as well
    for (image, label, _), k in zip(DataLoader(ds, batch_size=None, num_workers=2, collate_fn=lambda x: x), range(8)):
        assert np.array_equal(image.permute(1, 2, 0).numpy(), picture(k)) and np.array_equal(label.numpy(), expected[k])
    (folder / "gtFine.zip").write_bytes(b"no archive")
    with pytest.raises(ValueError) as e:
        open_dataset("cityscapes", "train", root=tmp_path)
    assert "gtFine.zip" in one_line(e)


@pytest.mark.parametrize("name", [n for n, s in DATASETS.items() if isinstance(s, OnDisk) and s.splits])
def test_folder_names_that_people_have(name, tmp_path):
    if name == "idd_lite": return  # its tree and classes are in test_evidence.py
    split = next(s for n, s in SETS if n == name)
    for k, alias in enumerate(DATASETS[name].folders):
        folder, _ = build(tmp_path / str(k), name, split, 1)
        (tmp_path / str(k) / "moved").mkdir()
        shutil.move(folder, tmp_path / str(k) / "moved" / "x")
        (tmp_path / str(k) / alias).parent.mkdir(exist_ok=True, parents=True)
        shutil.move(tmp_path / str(k) / "moved" / "x", tmp_path / str(k) / alias)
        assert len(open_dataset(name, split, root=tmp_path / str(k))) == 1


def test_acdc_joined_splits(tmp_path):
    for n, condition in enumerate(("snow", "fog", "rain", "night")):
        save(picture(n), tmp_path / f"acdc/rgb_anon/{condition}/val/GOPR1/GOPR1_frame_0_rgb_anon.png")
        save(np.full(
            (H, W), n, np.uint8), tmp_path / f"acdc/gt/{condition}/val/GOPR1/GOPR1_frame_0_gt_labelTrainIds.png")
    ds = open_dataset("acdc", "val", root=tmp_path)
    assert [int(label[0, 0]) for _, label, _ in ds] == [1, 3, 2, 0], "fog, night, rain, snow"
    shutil.rmtree(tmp_path / "acdc/rgb_anon/rain")
    with pytest.raises(FileNotFoundError, match="rain"):
        open_dataset("acdc", "val", root=tmp_path)
    assert len(open_dataset("acdc", "night/val", root=tmp_path)) == 1
    with pytest.raises(ValueError) as e:
        open_dataset("acdc", "dusk/val", root=tmp_path)
    assert "night/val" in one_line(e)


@pytest.mark.parametrize("where", ["beside", "inside"])
def test_cityscapes_c(where, tmp_path):
    folder, expected = build(tmp_path, "cityscapes", "val", 2)
    for corruption, severity in (("fog", 3), ("fog", 5), ("gaussian_noise", 1)):
        for k in range(2):
            save(picture(10 * severity + k),
                tmp_path / f"cityscapes_c/{corruption}/{severity}/lindau/lindau_00000{k}_000019_leftImg8bit.png")
    (tmp_path / "cityscapes_c" / "manifest.json").write_text("{}")
    if where == "inside":
        shutil.move(folder / "gtFine", tmp_path / "cityscapes_c" / "gtFine")
        shutil.rmtree(folder)
    for root in (tmp_path, tmp_path / "cityscapes_c"):
        ds = open_dataset("cityscapes_c", "fog/5", root=root)
        assert np.array_equal(ds[1][0].permute(1, 2, 0).numpy(), picture(51))
        assert np.array_equal(ds[1][1].numpy(), expected[1])
    with pytest.raises(ValueError) as e:
        open_dataset("cityscapes_c", "fog/2", root=tmp_path)
    assert "fog/3, fog/5, gaussian_noise/1" in one_line(e)
    shutil.rmtree(folder if where == "beside" else tmp_path / "cityscapes_c" / "gtFine")
    with pytest.raises(FileNotFoundError, match="labels are those of Cityscapes"):
        open_dataset("cityscapes_c", "fog/5", root=tmp_path)
    assert open_dataset("cityscapes_c", "fog/5", root=tmp_path, labels=False)[0][1] is None


def test_mapping_of_a_whole_byte():
    for name, ids, highest in (("gtav", CITYSCAPES, 34), ("cityscapes", CITYSCAPES, 33), ("synthia", SYNTHIA, 22),
            ("mapillary", MAPILLARY, 65), ("acdc", CITYSCAPES, 33)):
        form = DATASETS[name].forms[-1]
        assert form.table.tolist() == [ids.get(i, IGNORE) for i in range(256)]
        assert form.known.tolist() == [i <= highest for i in range(256)]


# ---------------------------------------------------------------- what is missing, or another dataset's

@pytest.mark.parametrize("name", [n for n, s in DATASETS.items() if isinstance(s, OnDisk)])
def test_a_missing_set_says_where_it_goes_and_where_it_is_had(name, tmp_path):
    for root in (tmp_path, tmp_path / "nowhere"):
        if name == "camvid" and root == tmp_path: continue  # any folder may hold splits
        with pytest.raises(FileNotFoundError) as e:
            open_dataset(name, "train", root=root)
        said = one_line(e)
        assert str(root / DATASETS[name].folders[0]) in said and "data_root" in said
        assert "http" in said or "README" in said


@pytest.mark.parametrize(
"name", ["gtav", "synthia", "urbansyn", "cityscapes", "bdd100k", "mapillary", "acdc", "darkzurich"])
def test_the_folder_of_another_set(name, tmp_path):
    for other, split in (("cityscapes", "train"), ("bdd100k", "val"), ("gtav", "train")):
        if other == name or (name, other) in (("gtav", "bdd100k"),): continue
        folder, _ = build(tmp_path / other, other, split, 1)
        with pytest.raises(FileNotFoundError) as e:
            open_dataset(name, next(iter(DATASETS[name].splits)), root=folder)
        assert str(folder) in one_line(e) and "itself is not it" in one_line(e)
        folder.rename(tmp_path / other / "kept")
        (tmp_path / other / "kept").rename(tmp_path / other / DATASETS[name].folders[0])
        with pytest.raises(ValueError) as e:
            open_dataset(name, next(iter(DATASETS[name].splits)), root=tmp_path / other)
        assert "another dataset's folder" in one_line(e)


def test_bdd_is_not_gtav(tmp_path):
    folder, _ = build(tmp_path, "bdd100k", "val", 1)
    with pytest.raises(ValueError, match="empty or another folder"):
        open_dataset("gtav", "train", root=folder)


def test_original_ids_under_the_name_of_converted_ones(tmp_path):
    folder, _ = build(tmp_path, "cityscapes", "train")
    for path in list((folder / "gtFine").rglob("*_labelIds.png")):
        path.rename(path.with_name(path.name.replace("labelIds", "labelTrainIds")))
    with pytest.raises(BadFile, match="value 19 is not in the map"):
        open_dataset("cityscapes", "train", root=tmp_path)[0]


# ---------------------------------------------------------------- bad files

def truncate(path):
    path.write_bytes(path.read_bytes()[:-60])


FAULTS = {  # fault: (what is done to image 1 or label 1, what is said)
    "truncated image": (lambda i, m: truncate(i), "cannot be read"),
    "truncated label": (lambda i, m: truncate(m), "cannot be read"),
    "no image": (lambda i, m: i.write_text("<html>404</html>"), "cannot be read"),
    "empty file": (lambda i, m: m.write_bytes(b""), "cannot be read"),
    "label of another size": (lambda i, m: save(np.zeros((H, W + 2), np.uint8), m), "12x8 and the image 10x8"),
    "turned label": (lambda i, m: save(np.zeros((W, H), np.uint8), m), "8x10 and the image 10x8"),
    "unknown id": (lambda i, m: save(np.full((H, W), 77, np.uint8), m), "label value 77"),
    "16-bit label": (lambda i, m: save(np.zeros((H, W), np.uint16), m), "mode I;16"),
    "16-bit colour label": (lambda i, m: save(np.zeros((H, W, 3), np.uint16), m), "mode RGB"),
    "colour label": (lambda i, m: save(picture(), m), "mode RGB"),
    "16-bit grey image": (lambda i, m: save(np.zeros((H, W), np.uint16), i), "mode I;16"),
    "CMYK image": (lambda i, m: Image.fromarray(picture()).convert("CMYK").save(i, format="JPEG"), "mode CMYK"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_bad_files_stop_or_are_left_out(fault, tmp_path, recwarn):
    folder, _ = build(tmp_path, "cityscapes", "train", 4)
    ds = open_dataset("cityscapes", "train", root=tmp_path)
    image, label = ds.reader.image_paths[1], ds.reader.label_paths[1]
    damage, says = FAULTS[fault]
    damage(image, label)
    with pytest.raises(BadFile) as e:
        ds[1]
    assert says in one_line(e) and image.stem.removesuffix("_leftImg8bit") in one_line(e)
    lenient = open_dataset("cityscapes", "train", root=tmp_path, on_error="skip")
    assert [name for *_, name in lenient] == [ds.reader.names[i] for i in (0, 2, 2, 3)]
    assert lenient.skipped == [ds.reader.names[1]] and [lenient.actual(i) for i in range(4)] == [0, 2, 2, 3]
    assert [says in str(w.message) for w in recwarn.list if "left out" in str(w.message)] == [True], "said once"
    if "image" in fault and "label" not in fault:
        assert torch.equal(lenient.read_image(1), ds.read_image(2))
    sizes = open_dataset("cityscapes", "train", root=tmp_path, on_error="skip sizes")
    if "and the image" in says:
        assert sizes[1][2] == ds.reader.names[2]
    else:
        with pytest.raises(BadFile):
            sizes[1]


def test_odd_images_that_are_read(tmp_path):
    folder, _ = build(tmp_path, "cityscapes", "train")
    ds = open_dataset("cityscapes", "train", root=tmp_path)
    grey = picture()[..., 0]
    save(grey, ds.reader.image_paths[0])
    paletted = Image.fromarray(picture(1)).quantize(16)
    paletted.save(ds.reader.image_paths[1])
    Image.fromarray(np.dstack([picture(2), grey])).save(ds.reader.image_paths[2])
    assert all(np.array_equal(ds[0][0][c].numpy(), grey) for c in range(3))
    assert np.array_equal(ds[1][0].permute(1, 2, 0).numpy(), np.asarray(paletted.convert("RGB")))
    assert np.array_equal(ds[2][0].permute(1, 2, 0).numpy(), picture(2))


def test_rotation_is_refused_applied_or_ignored_but_never_silent(tmp_path):
    folder, _ = build(tmp_path, "bdd100k", "val")
    path = folder / SETS["bdd100k", "val"][1].format(1)
    tag = Image.Exif()
    tag[0x0112] = 6  # a quarter turn
    save(picture(), path, exif=tag)
    stored = np.asarray(Image.open(path))
    with pytest.raises(BadFile) as e:
        open_dataset("bdd100k", "val", root=tmp_path)[1]
    assert str(path) in one_line(e) and "EXIF" in one_line(e)
    assert np.array_equal(
        open_dataset("bdd100k", "val", root=tmp_path, rotation="ignore")[1][0].permute(1, 2, 0).numpy(), stored)
    turned = open_dataset("bdd100k", "val", root=tmp_path, rotation="apply")
    with pytest.raises(BadFile, match="8x10|10x8"):
        turned[1]  # the label is not turned with it
    assert np.array_equal(turned.read_image(1).permute(1, 2, 0).numpy(), np.rot90(stored, -1))
    tag[0x0112] = 1
    save(picture(), path, exif=tag)
    assert open_dataset("bdd100k", "val", root=tmp_path)[1][0].shape == (3, H, W)
    with pytest.raises(ValueError, match="rotation='turn' is unknown"):
        open_dataset("bdd100k", "val", root=tmp_path, rotation="turn")


def test_synthia_wants_sixteen_bits(tmp_path):
    folder, _ = build(tmp_path, "synthia", "train")
    ds = open_dataset("synthia", "train", root=tmp_path)
    path = ds.reader.label_paths[1]
    for array, says in ((picture(), "8 bits and 3"), (np.zeros((H, W), np.uint16), "16 bits and 1"),
            (red16(np.full((H, W), 23)), "value 23"), (red16(np.full((H, W), 300)), "value 300")):
        save(array, path)
        with pytest.raises(BadFile) as e:
            ds[1]
        assert str(path) in one_line(e) and says in one_line(e)
    save(red16(np.random.default_rng(0).integers(0, 23, (H, W))), path)
    truncate(path)
    with pytest.raises(BadFile) as e:
        ds[1]
    assert str(path) in one_line(e)


def test_gtav_leaves_out_pairs_of_different_size(tmp_path, recwarn):
    folder, expected = build(tmp_path, "gtav", "train", 4)
    save(picture(1, H, W + 1), folder / "images/00001.png")
    ds = open_dataset("gtav", "train", root=tmp_path)
    assert [name for *_, name in ds] == ["00000", "00002", "00002", "00003"]
    assert ds.skipped == ["00001"] and len(ds) == 4
    assert sum("00001" in str(w.message) for w in recwarn.list) == 1
    with pytest.raises(BadFile):
        open_dataset("gtav", "train", root=tmp_path, on_error="stop")[1]
    truncate(folder / "images/00002.png")
    with pytest.raises(BadFile, match="00002.png"):
        ds[2]


def test_gtavs_source_val_is_every_50th_training_image(tmp_path):
    for k in range(1, 128):
        save(picture(k), tmp_path / f"gtav/images/{k:05}.png")
        save(np.full((H, W), k % 5, np.uint8), tmp_path / f"gtav/labels/{k:05}.png")
    ds, train = (open_dataset("gtav", split, tmp_path, on_error="stop") for split in ("source_val", "train"))
    assert [name for *_, name in ds] == ["00001", "00051", "00101"] and len(train) == 127
    assert all(torch.equal(a, b) for k in range(3) for a, b in zip(ds[k][:2], train[50 * k][:2]))
    assert len(open_dataset("gtav", "source_val", tmp_path, labels=False)) == 3
    assert len(range(0, DATASETS["gtav"].splits["train"].count, 50)) == DATASETS["gtav"].splits["source_val"].count
    assert not {15188, 17705} & set(range(1, 24967, 50)), "the pairs of two sizes are not among them"
    (tmp_path / "gtav/labels/00051.png").unlink()
    with pytest.raises(ValueError, match="00051"):
        open_dataset("gtav", "source_val", tmp_path)
    with pytest.raises(ValueError, match="split='val' is unknown: use one of train, source_val"):
        open_dataset("gtav", "val", tmp_path)


@pytest.mark.filterwarnings("ignore:.*left out")
def test_too_many_bad_files_stop_after_all(tmp_path):
    folder, _ = build(tmp_path, "gtav", "train", 3)
    for k in range(3):
        save(picture(k, H, W + 1), folder / f"images/0000{k}.png")
    with pytest.raises(BadFile, match="3 of 3 images are bad"):
        open_dataset("gtav", "train", root=tmp_path)[0]
    with pytest.raises(ValueError, match="on_error='never' is unknown"):
        open_dataset("gtav", "train", root=tmp_path, on_error="never")


@pytest.mark.filterwarnings("ignore:.*left out")
def test_what_is_left_out_is_known_to_all_processes(tmp_path):
    folder, _ = build(tmp_path, "gtav", "train", 8)
    for k in (1, 6):
        save(picture(k, H, W + 1), folder / f"images/0000{k}.png")
    ds = open_dataset("gtav", "train", root=tmp_path)
    names = [name for *_, name in DataLoader(ds, batch_size=None, num_workers=2, collate_fn=lambda x: x)]
    assert names == [f"0000{k}" for k in (0, 2, 2, 3, 4, 5, 7, 7)]
    assert ds.skipped == ["00001", "00006"] and ds.actual(6) == 7
    both = concat([open_dataset("gtav", "train", root=tmp_path), open_dataset("gtav", "train", root=tmp_path)])
    assert [name for *_, name in both] == names * 2 and len(both.skipped) == 4


def test_files_without_partner(tmp_path):
    folder, _ = build(tmp_path, "cityscapes", "train", 4)
    next((folder / "gtFine").rglob("*_000002_*labelIds.png")).unlink()
    with pytest.raises(ValueError) as e:
        open_dataset("cityscapes", "train", root=tmp_path)
    assert "1 files have no partner" in one_line(e) and "ulm_000002" in one_line(e)
    with pytest.warns(UserWarning, match="ulm_000002"):
        ds = open_dataset("cityscapes", "train", root=tmp_path, on_error="skip")
    assert len(ds) == 3 and "ulm_000002_000019_leftImg8bit" not in ds.reader.names


def test_an_empty_folder(tmp_path):
    folder, _ = build(tmp_path, "cityscapes", "train", 1)
    for path in (folder / "leftImg8bit").rglob("*.png"):
        path.unlink()
    with pytest.raises(ValueError) as e:
        open_dataset("cityscapes", "train", root=tmp_path)
    assert "leftImg8bit/train" in one_line(e) and "empty" in one_line(e)


@contextmanager
def locked(path):
    "No permission to read `path`, for root as well."
    modes = {p: p.stat().st_mode for p in (path, *(path.parents if os.geteuid() == 0 else ()))}
    for above in list(modes)[1:]:
        if modes[above] & 0o55 != 0o55:
            above.chmod(modes[above] | 0o55)
    path.chmod(0)
    if os.geteuid() == 0:
        try:
            os.seteuid(65534)
        except PermissionError:
            pytest.skip("root that cannot become another user")
    try:
        yield
    finally:
        if os.getuid() == 0:
            os.seteuid(0)
        for p, mode in modes.items():
            if p.stat().st_mode != mode:
                p.chmod(mode)


def test_no_permission(tmp_path):
    folder, _ = build(tmp_path, "cityscapes", "train", 1)
    ds = open_dataset("cityscapes", "train", root=tmp_path)
    ds[0]
    for path in (folder, *folder.rglob("*")):
        path.chmod(0o755 if path.is_dir() else 0o644)
    for path in (ds.reader.image_paths[0], ds.reader.label_paths[0]):
        with locked(path), pytest.raises(BadFile) as e:
            ds[0]
        assert str(path) in one_line(e) and "ermission" in one_line(e)
    for path in (folder / "leftImg8bit" / "train" / "ulm", folder / "leftImg8bit", folder):
        with locked(path), pytest.raises(PermissionError) as e:
            open_dataset("cityscapes", "train", root=tmp_path)
        assert str(path) in one_line(e) and "ermission" in one_line(e)


# ---------------------------------------------------------------- the page about data

def test_the_page_about_data_names_every_set():
    page = (Path(__file__).resolve().parents[1] / "data" / "README.md").read_text()
    for name, source in DATASETS.items():
        assert f"`{name}`" in page
        if not isinstance(source, OnDisk): continue
        for url in re.findall(r"https?://\S+", source.where):
            assert url.rstrip(").") in page, name
        for part in source.splits.values():
            if part.count:
                assert f"{part.count:,}" in page, (name, part)
