"""Proposals: engines without weights, what is stored and refused, crops bend masks as labels. (SAM: test_sam.py.)"""

import contextlib
import json
import runpy
import shutil
import sys
import warnings
from collections import namedtuple
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from reinpp.adaptation import proposals
from reinpp.adaptation.engines import classical, instances, merge_tree
from reinpp.adaptation.masks import boxes_of, cell_size, compose, coverage, grid_size, pack, pad, unpack, warp
from reinpp.adaptation.proposals import (
    ProposalStore,
    check_proposals,
    main,
    make_proposals,
    read_proposals,
    write_proposals,
)
from reinpp.adaptation.sam import sam2
from reinpp.data.catalog import open_dataset
from reinpp.data.transforms import Geometry, TrainTransform, resize_label


@pytest.fixture(scope="module")
def scenes():
    return open_dataset("scenes", "night/train", count=3)


def brute_force(ids, n, reduction):
    h, w = grid_size(ids.shape, reduction)
    out = np.zeros((n, h, w), bool)
    for k in range(n):
        for y in range(h):
            for x in range(w):
                cell = ids[y * reduction:(y + 1) * reduction, x * reduction:(x + 1) * reduction] == k
                out[k, y, x] = 2 * cell.sum() >= cell.size
    return out


@pytest.mark.parametrize("size, reduction", [((12, 16), 4), ((13, 18), 4), ((9, 7), 2), ((5, 5), 1)])
def test_coverage_and_boxes_equal_brute_force(size, reduction):
    ids = np.random.default_rng(0).integers(0, 5, size)
    ids[:6, :4] = 1
    ids[-1, -5:] = range(5)  # every region occurs
    counts, total = coverage(ids, 6, reduction)  # region 5 does not occur
    assert ((counts * 2 >= total)[:5] == brute_force(ids, 5, reduction)).all() and not counts[5].any()
    assert (counts.sum(0) == total).all() and (total == cell_size(size, reduction)).all()
    boxes = boxes_of(ids, 6)
    for k in range(5):
        y, x = np.nonzero(ids == k)
        assert boxes[k].tolist() == [x.min(), y.min(), x.max() + 1, y.max() + 1]
    assert not boxes[5].any()


@pytest.mark.parametrize("shape", [(3, 5, 7), (2, 4, 6, 16), (0, 4, 9)])
def test_bits_round_trip(shape):
    masks = torch.rand(shape) > 0.5
    assert torch.equal(unpack(pack(masks), shape[-1]), masks)
    shift = torch.arange(7, -1, -1, dtype=torch.uint8)  # the form used on a GPU
    assert torch.equal(((pack(masks)[..., None] >> shift) & 1).bool().flatten(-2)[..., :shape[-1]], masks)


def test_merge_tree_joins_what_is_alike():
    ids = np.repeat(np.arange(4)[None], 6, 0).repeat(6, 1)  # four stripes: dark, dark, bright, bright
    colour = np.array([0.0, 1.0, 50.0, 51.0])[ids][..., None]
    children, cost = merge_tree(ids, colour)
    assert {tuple(sorted(c)) for c in children[:2].tolist()} == {(0, 1), (2, 3)} and sorted(children[2]) == [4, 5]
    assert (np.diff(cost) >= 0).all()


@pytest.mark.parametrize("engine", [instances, classical])
def test_engines(engine, scenes):
    found = engine(scenes, 1, 2)
    assert found.masks.shape[1:] == (64, 128) and found.masks.dtype == torch.bool and found.image_size == (128, 256)
    assert len(found.masks) == len(found.scores) == len(found.boxes) > 10
    area = found.masks.flatten(1).sum(1)
    assert (area > 0).all() and (area[:-1] >= area[1:]).all()
    for mask, box in zip(found.masks, found.boxes):  # the box holds the mask
        y, x = mask.nonzero().T
        assert box[0] // 2 <= x.min() and x.max() < -(-box[2] // 2)
        assert box[1] // 2 <= y.min() and y.max() < -(-box[3] // 2)
    few = engine(scenes, 1, 2, limit=7)
    assert len(few.masks) == 7


def test_classical_needs_no_label_and_gives_the_same_twice(scenes):
    unlabelled = open_dataset("scenes", "night/train", count=3, labels=False)
    a, b = classical(scenes, 0), classical(unlabelled, 0)
    assert torch.equal(a.bits, b.bits) and torch.equal(a.scores, b.scores)


def test_instances_of_real_images_are_refused(tmp_path):
    from PIL import Image
    (tmp_path / "x").mkdir()
    Image.new("RGB", (16, 16)).save(tmp_path / "x" / "a.png")
    data = open_dataset("folder", "x", root=tmp_path)
    with pytest.raises(ValueError, match="instances"):
        instances(data, 0)
    assert len(classical(data, 0).masks) <= 1  # one colour: nothing stands out, and nothing breaks


def test_store_resumes_and_repairs(scenes, tmp_path):
    calls = []

    def counting(dataset, index, reduction, limit):
        calls.append(index)
        return instances(dataset, index, reduction, limit)

    make_proposals(scenes, counting, tmp_path, reduction=2, shard=(1, 3))
    assert calls == [1] and not list(tmp_path.glob(".*"))  # only its share, no temporary file left
    with pytest.raises(FileNotFoundError, match="000000"):
        ProposalStore(tmp_path)[0]
    store = make_proposals(scenes, counting, tmp_path, reduction=2)
    assert calls == [1, 0, 2] and len(store) == 3 and store[2].name == scenes[2][2]
    assert torch.equal(store[2].masks, instances(scenes, 2, 2).masks)

    cut, foreign, swapped = (tmp_path / f"00000{i}.safetensors" for i in range(3))
    cut.write_bytes(cut.read_bytes()[:200])
    write_proposals(foreign, instances(scenes, 1, 2), "sam2")
    write_proposals(swapped, store[2]._replace(name="another"), "counting", store.manifest["key"])
    with pytest.raises(ValueError, match="000000.*make_proposals again"):
        store[0]
    with pytest.warns(UserWarning) as said:
        make_proposals(scenes, counting, tmp_path, reduction=2)
    text = " ".join(str(w.message) for w in said)
    assert calls[3:] == [0, 1, 2] and cut.name in text and foreign.name in text and "another" in text
    assert all(torch.equal(store[i].masks, instances(scenes, i, 2).masks) for i in range(3))
    with pytest.raises(IndexError, match="3 images"):
        store[3]


@pytest.mark.parametrize("changed", [dict(engine="classical"), dict(reduction=4), dict(limit=9)])
def test_store_of_other_settings_is_refused(changed, scenes, tmp_path):
    make_proposals(scenes, "instances", tmp_path, reduction=2)
    before = sorted(p.read_bytes() for p in tmp_path.iterdir())
    with pytest.raises(ValueError, match="another folder"):
        make_proposals(scenes, **dict(engine="instances", reduction=2) | changed, root=tmp_path)
    assert sorted(p.read_bytes() for p in tmp_path.iterdir()) == before


def test_unknown_engine_and_missing_folder(scenes, tmp_path):
    with pytest.raises(ValueError, match="sam9.*instances, classical"):
        make_proposals(scenes, "sam9")
    with pytest.raises(FileNotFoundError, match="make_proposals"):
        ProposalStore(tmp_path / "nothing")
    (tmp_path / "x").write_bytes(b"not a safetensors file at all")
    with pytest.raises(ValueError, match="x is not a readable"):
        read_proposals(tmp_path / "x")


@pytest.mark.parametrize("fails", [False, True])
def test_an_engine_is_released_when_all_are_made_or_one_fails(fails, scenes, tmp_path):
    released = []

    def engine(dataset, index, reduction=4, limit=400):
        if fails and index == 1: raise OSError("no room")
        return instances(dataset, index, reduction, limit)
    engine.release = lambda: released.append(len(list(tmp_path.glob("*.safetensors"))))
    with pytest.raises(OSError, match="no room") if fails else contextlib.nullcontext():
        make_proposals(scenes, engine, tmp_path)
    assert released == [1 if fails else 3]


def test_a_killed_write_leaves_nothing(scenes, tmp_path, monkeypatch):
    import os
    monkeypatch.setattr(os, "replace", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        write_proposals(tmp_path / "a", instances(scenes, 0), "instances")
    assert not list(tmp_path.iterdir())


def test_manifest_says_what_decides_about_the_masks(scenes, tmp_path):
    store = make_proposals(scenes, "classical", tmp_path, scale=80.0, shard=(0, 3))
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert manifest["engine"] == "classical" and manifest["package"].startswith("scikit-image ")
    assert manifest["options"] == dict(long_edge=256, scale=80.0, min_size=20) and manifest["checkpoint"] is None
    assert (manifest["reduction"], manifest["limit"], manifest["images"]) == (4, 400, 3)
    name = check_proposals(tmp_path / "000000.safetensors", "classical", manifest["key"])["name"]
    assert name == store[0].name == scenes[0][2]
    make_proposals(scenes, "classical", tmp_path, scale=80, long_edge=256, shard=(0, 3))  # a default, named


def test_a_folder_of_other_images_or_without_manifest_is_refused(scenes, tmp_path):
    make_proposals(scenes, "instances", tmp_path, reduction=2)
    assert len(ProposalStore(tmp_path)) == 3
    for engine, reduction, limit, says in (("classical", 2, 400, "engine 'instances' .asked: 'classical'"),
            ("instances", 4, 400, "reduction 2 .asked: 4"), ("instances", 2, 100, "limit 400 .asked: 100")):
        with pytest.raises(ValueError, match=f"{says}.*another folder"):
            make_proposals(scenes, engine, tmp_path, reduction, limit)
    with pytest.raises(ValueError, match="images 3 .asked: 2.*another folder"):
        make_proposals(open_dataset("scenes", "night/train", count=2), "instances", tmp_path, reduction=2)
    for arguments in (dict(), dict(root=tmp_path, dataset=scenes)):
        with pytest.raises(ValueError, match="a folder of proposals, or a dataset"):
            ProposalStore(**arguments)
    with pytest.raises(ValueError, match="names .*another folder"):  # as many images, but others
        make_proposals(open_dataset("scenes", "train", count=3), "instances", tmp_path, reduction=2)
    (tmp_path / "manifest.json").write_text('{"format"')
    with pytest.raises(ValueError, match="manifest.json is not a manifest"):
        ProposalStore(tmp_path)
    with pytest.raises(ValueError, match="manifest.json is not a manifest"):
        make_proposals(scenes, "instances", tmp_path, reduction=2)


def test_another_version_of_the_package_is_refused(scenes, tmp_path, monkeypatch):
    import importlib.metadata
    make_proposals(scenes, "classical", tmp_path, shard=(0, 3))
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "99.0")
    with pytest.raises(ValueError, match="package 'scikit-image .*asked: 'scikit-image 99.0'"):
        make_proposals(scenes, "classical", tmp_path)


def test_a_file_made_with_other_options_is_named_and_made_again(scenes, tmp_path):
    a = make_proposals(scenes, "classical", tmp_path / "a", shard=(0, 3))
    b = make_proposals(scenes, "classical", tmp_path / "b", scale=200.0, shard=(0, 3))
    assert a.manifest["key"] != b.manifest["key"] and not torch.equal(a[0].scores, b[0].scores)
    wanted = a[0].scores.clone()
    shutil.copy(tmp_path / "b" / "000000.safetensors", tmp_path / "a" / "000000.safetensors")
    with pytest.raises(ValueError, match="000000.safetensors was made with other settings.*make_proposals again"):
        a[0]
    with pytest.warns(UserWarning, match="other settings.*again"):
        make_proposals(scenes, "classical", tmp_path / "a", shard=(0, 3))
    assert torch.equal(a[0].scores, wanted)


def test_a_file_cut_by_one_byte_is_noticed_without_reading_it(scenes, tmp_path):
    file = tmp_path / "a"
    size = write_proposals(file, instances(scenes, 0, 2), "instances")
    assert size == file.stat().st_size
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(ValueError, match="not a readable"):
        check_proposals(file)


def test_shards_share_a_folder_and_nothing_else(scenes, tmp_path):
    for k in (2, 0, 1):
        make_proposals(scenes, "instances", tmp_path, reduction=2, shard=(k, 3))
        assert (tmp_path / f"{k:06d}.safetensors").exists()
    assert len(list(tmp_path.glob("*.safetensors"))) == 3
    for wrong in ((3, 3), (-1, 3), (0, 0)):
        with pytest.raises(ValueError, match="shard"):
            make_proposals(scenes, "instances", tmp_path, reduction=2, shard=wrong)


def test_workers_make_what_one_process_makes(scenes, tmp_path):
    store = make_proposals(scenes, "classical", tmp_path, reduction=2, processes=2)
    for index in range(3):
        alone = classical(scenes, index, 2)
        assert torch.equal(store[index].bits, alone.bits) and torch.equal(store[index].scores, alone.scores)
        assert store[index].name == scenes[index][2]
    assert not list(tmp_path.glob(".*"))
    with pytest.raises(ValueError, match="function of a module"):
        make_proposals(scenes, lambda dataset, index, reduction, limit: None, tmp_path / "x", processes=2)


def test_every_worker_has_a_gpu_of_its_own(monkeypatch):
    "Where there are several, for an engine that has a model, unless the device is chosen."
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(proposals, "_job", {})
    given = []
    for number, engine, options in ((3, sam2, {}), (4, sam2, {}), (5, classical, {}), (5, sam2, dict(device="cpu"))):
        monkeypatch.setattr(proposals.multiprocessing, "current_process", lambda k=number: Named(f"SpawnProcess-{k}"))
        proposals._start(partial(proposals._make, None, engine, None, "", (2, 400), **options), 2)
        given.append(proposals._job["make"].keywords.get("device"))
    assert given == ["cuda:1", "cuda:0", None, "cpu"]


Named = namedtuple("Named", "name")


def slow(dataset, index, reduction, limit):
    return instances(dataset, 0, reduction, limit)


def test_says_how_far_it_is_and_only_when_asked(tmp_path, capsys):
    many = open_dataset("scenes", "night/train", count=12)
    make_proposals(many, slow, tmp_path, reduction=2, shard=(0, 3))
    assert not capsys.readouterr().out  # silent unless asked
    make_proposals(many, slow, tmp_path, reduction=2, progress=True)
    said = capsys.readouterr().out.splitlines()
    assert "(slow) 5/12 " in said[0] and said[-1].startswith("proposals (slow) 12/12 ")


def test_says_what_it_will_cost_before_the_bulk_and_stops_at_a_full_disk(tmp_path, monkeypatch, capsys):
    many = open_dataset("scenes", "night/train", count=12)
    make_proposals(many, slow, tmp_path / "a", reduction=2, shard=(0, 3), progress=True)
    make_proposals(many, slow, tmp_path / "a", reduction=2, progress=True)
    said = capsys.readouterr().out.splitlines()
    cost = next(k for k, line in enumerate(said) if "of disk to come" in line and "(slow) 7/12" in line)
    assert " s each, " in said[cost] and " left; " in said[cost] and " are free" in said[cost]
    assert "(slow) 8/12 " in said[cost + 1]  # after three of the eight
    assert said[-1].startswith("proposals (slow) 12/12 ")
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9, 1000))
    with pytest.raises(OSError, match="9 more images need about .*1.0 kB are free.*what was made so far stays"):
        make_proposals(many, slow, tmp_path / "b", reduction=2)
    assert len(list((tmp_path / "b").glob("*.safetensors"))) == 3
    monkeypatch.undo()
    make_proposals(many, slow, tmp_path / "b", reduction=2)
    assert len(list((tmp_path / "b").glob("*.safetensors"))) == 12
    assert not capsys.readouterr().out  # silent unless asked


def test_a_failing_image_stops_the_run_and_keeps_the_rest(tmp_path, scenes):
    def failing(dataset, index, reduction, limit):
        if index == 1:
            raise RuntimeError("image 1 is bad")
        return instances(dataset, index, reduction, limit)
    with pytest.raises(RuntimeError, match="image 1 is bad"):
        make_proposals(scenes, failing, tmp_path, reduction=2)
    assert [p.name for p in sorted(tmp_path.iterdir())] == ["000000.safetensors", "manifest.json"]


def test_command_line(tmp_path, monkeypatch, capsys):
    "One shard as `python -m` runs it, the other through the function."
    arguments = ["--dataset", "scenes", "--split", "night/train", "--dataset-options", "count=3", "--engine",
        "instances", "--reduction", "2", "--root", str(tmp_path / "store")]
    monkeypatch.setattr(sys, "argv", ["proposals", *arguments, "--shard", "0/2"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # runpy: the module is already imported
        runpy.run_module("reinpp.adaptation.proposals", run_name="__main__", alter_sys=False)
    assert "proposals (instances) 2/2 " in capsys.readouterr().out
    assert len(list((tmp_path / "store").glob("*.safetensors"))) == 2
    store = main([*arguments, "--shard", "1/2", "--no-labels"])
    assert len(store) == 3 and len(store[1].masks) > 10 and store.manifest["reduction"] == 2
    for extra, says in ((["--limit", "7"], "proposals: .*limit 400 .asked: 7"),
            (["--options", "scale=1"], "has no option 'scale'"), (["--shard", "2/2"], "numbered 0 to 1"),
            (["--split", "dawn/train"], "proposals: .*dawn/train"), (["--dataset", "mars"], "proposals: .*'mars'")):
        with pytest.raises(SystemExit, match=says):
            main([*arguments, *extra])
    for extra in (["--shard", "2"], ["--options", "scale"], ["--engine", "sam9"]):
        with pytest.raises(SystemExit, match="2"):  # argparse's own
            main([*arguments, *extra])


def test_command_line_takes_options_as_json(tmp_path):
    store = main(["--dataset", "scenes", "--split", "train", "--dataset-options", "count=1", "size=[64,128]",
        "--engine", "classical", "--options", "scale=80.5", "--limit", "9", "--root", str(tmp_path)])
    assert store.manifest["options"]["scale"] == 80.5 and store[0].image_size == (64, 128) and len(store[0].masks) == 9


def test_memory_store_computes_once(scenes):
    calls = []

    def counting(dataset, index, reduction, limit=400):
        calls.append(index)
        return instances(dataset, index, reduction, limit)

    store = make_proposals(scenes, counting, reduction=2)
    a, b = store[1], store[1]
    assert calls == [1] and a.name == scenes[1][2] and torch.equal(a.bits, b.bits)


def reference(ids, k, geometry, stride=4):
    "The label way: nearest resize of the full-resolution mask, crop, flip, pad; then which cells are covered by half."
    mask = geometry.cut(resize_label(torch.from_numpy((ids == k).astype(np.uint8)), geometry.size))
    return mask.bool(), F.avg_pool2d(mask[None].float(), stride)[0] >= 0.5


GEOMETRIES = [
    Geometry((512, 1024), 0, 256, (512, 512), False),
    Geometry((768, 1536), 130, 401, (512, 512), True),
    Geometry((1024, 2048), 377, 1033, (512, 512), True),
    Geometry((410, 820), 0, 200, (512, 512), False),  # padding below
    Geometry((256, 512), 0, 0, (512, 512), True),  # padding below
    Geometry((300, 600), 0, 300, (512, 512), True),  # padding below and right, after a flip
]


@pytest.fixture(scope="module")
def large():
    "Instance map of a 2048 x 1024 scene, and its proposals one at a time, so that warping loses track of none."
    scene = open_dataset("scenes", "train", count=1, size=(1024, 2048))
    found = instances(scene, 0)
    single = [found._replace(bits=bits[None], boxes=box[None]) for bits, box in zip(found.bits, found.boxes)]
    return scene.instances(0).numpy(), single


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_warp_equals_doing_it_at_full_resolution(geometry, large):
    """Masks over 1,000 px in the crop.

    A pole a few pixels wide may lose or gain a column of cells, so the bound for a single mask holds for those that are
    not thin."""
    ids, single = large
    warped = [w[0] for w in (warp(p, geometry) for p in single) if len(w)]
    every, area = [], []
    for value in np.unique(ids):
        full, wanted = reference(ids, value, geometry)
        if full.sum() <= 1000:
            continue
        best = max(((w & wanted).sum() / (w | wanted).sum()).item() for w in warped)
        every.append(best)
        area.append(full.sum().item())
        edge = (full[1:] != full[:-1]).sum() + (full[:, 1:] != full[:, :-1]).sum()
        if area[-1] > 12 * edge:  # pixels per pixel of outline
            assert best >= 0.9, f"instance {value} of {area[-1]} px: IoU {best:.3f}"
    assert len(every) >= 8 and np.mean(every) >= 0.9, sorted(zip(every, area))
    assert np.average(every, weights=area) >= 0.95, sorted(zip(every, area))


def ious(masks, full, wanted, least=1000):
    "Best IoU with the masks, for every wanted mask over `least` pixels that is not thin: areas and values."
    for pixels, cells in zip(full, wanted):
        edge = (pixels[1:] != pixels[:-1]).sum() + (pixels[:, 1:] != pixels[:, :-1]).sum()
        if pixels.sum() > max(least, 12 * edge):
            yield max((((m & cells).sum() / (m | cells).sum()).item() for m in masks), default=0.0)


@pytest.mark.parametrize("size, reduction, geometry", [
    ((515, 1021), 4, Geometry((515, 1021), 3, 201, (512, 512), True)),
    ((515, 1021), 4, Geometry((701, 1390), 189, 77, (512, 512), False)),
    ((511, 1023), 4, Geometry((400, 801), 0, 289, (512, 512), True)),  # padding, beyond the last, cut cells
    ((501, 999), 2, Geometry((333, 664), 0, 131, (256, 512), False)),
    ((479, 641), 2, Geometry((642, 859), 130, 347, (512, 512), True)),
])
def test_warp_at_odd_sizes(size, reduction, geometry):
    scene = open_dataset("scenes", "train", count=1, size=size)
    ids, found = scene.instances(0).numpy(), instances(scene, 0, reduction)
    assert found.masks.shape[1:] == (-(-size[0] // reduction), -(-size[1] // reduction))
    pairs = [reference(ids, value, geometry) for value in np.unique(ids)]
    values = list(ious(warp(found, geometry), *zip(*pairs)))
    assert len(values) >= 3 and min(values) >= 0.9, values


@pytest.fixture(scope="module")
def two():
    """Two scenes of an odd size, twice the crop's as in the paper's settings, so that no resize goes beyond the
    original: images with labels, instance maps, proposals."""
    scene = open_dataset("scenes", "train", count=2, size=(1031, 2046))
    pairs, maps = [scene[i][:2] for i in (0, 1)], [scene.instances(i).numpy() for i in (0, 1)]
    return pairs, maps, [instances(scene, i) for i in (0, 1)]


@pytest.mark.parametrize("seed", range(6))
def test_class_mix_cuts_proposals_as_it_cuts_labels(seed, two):
    """Real classes of one scene pasted onto another, each bent by its own resize, crop and flip.

    The reference does all of it on full-resolution masks."""
    torch.manual_seed(seed)
    pairs, maps, stores = two
    transform = TrainTransform(crop=512, base=512, min_class_pixels=None)
    (_, label, g_source), (_, _, g_target) = (transform(*pair) for pair in pairs)
    present = [c for c in label.unique().tolist() if c != 255]
    pasted = torch.isin(label, torch.tensor(present[::2]))
    masks = [warp(store, g) for store, g in zip(stores, (g_source, g_target))]
    mixed = compose(*masks, pasted)
    both = [mixed[:len(masks[0])], mixed[len(masks[0]):]]
    assert not (both[0].any(0) & both[1].any(0)).any()  # no cell from both
    values = []
    for k, (geometry, region) in enumerate(((g_source, pasted), (g_target, ~pasted))):
        full = [reference(maps[k], value, geometry)[0] & region for value in np.unique(maps[k])]
        values += list(ious(both[k], full, [F.avg_pool2d(f[None].float(), 4)[0] >= 0.5 for f in full]))
    assert len(values) >= 4 and np.mean(values) >= 0.95 and min(values) >= 0.9, values


def test_warp_follows_the_transform_it_is_given():
    "Through TrainTransform itself: the proposals that come out agree with the label that comes out."
    scene = open_dataset("scenes", "train", count=4, size=(256, 512))
    transform = TrainTransform(crop=256, base=256, min_class_pixels=None)
    store = ProposalStore(dataset=scene, engine="instances", reduction=2)
    for seed in range(12):
        torch.manual_seed(seed)
        image, label, _ = scene[seed % 4]
        _, y, geometry = transform(image, label)
        masks = warp(store[seed % 4], geometry)
        h, w = geometry.inside
        assert not masks[:, -(-h // 4):].any() and not masks[:, :, -(-w // 4):].any()  # padding belongs to no proposal
        cells = y[2::4, 2::4]
        good = total = 0
        for mask in masks:  # every object has one class: the label under a mask is nearly constant
            under = cells[mask]
            if len(under) >= 20:
                good, total = good + (under == under.mode().values).sum().item(), total + len(under)
        assert good / total > 0.9


def test_warp_off_the_grid_is_refused(scenes):
    with pytest.raises(ValueError, match="multiple of 4"):
        warp(instances(scenes, 0), Geometry((128, 256), 0, 0, (126, 126), False))


def test_composed_proposals_take_no_cell_from_both():
    torch.manual_seed(0)
    source, target = torch.rand(2, 30, 16, 16) > 0.6, torch.rand(2, 20, 16, 16) > 0.6
    pasted = (torch.rand(2, 8, 8) > 0.5).repeat_interleave(8, 1).repeat_interleave(8, 2)
    pasted[:, 10:13, 7:30] = True  # off the grid, too
    mixed = compose(source, target, pasted)
    region = F.avg_pool2d(pasted.float(), 4) >= 0.5
    a, b = mixed[:, :30].any(1), mixed[:, 30:].any(1)
    assert mixed.shape == (2, 50, 16, 16) and not (a & b).any()
    assert not (a & ~region).any() and not (b & region).any() and a.any() and b.any()
    assert torch.equal(compose(source[0], target[0], pasted[0]), mixed[0])  # batch or not


def test_crumbs_are_dropped_but_small_wholes_stay():
    source, target = torch.zeros(2, 8, 8, dtype=torch.bool), torch.zeros(1, 8, 8, dtype=torch.bool)
    source[0, 1, 1:3] = True  # two cells, entirely pasted: a pole
    source[1, 0:8, 3:8] = True  # cut down to two cells: a crumb
    target[0] = True
    pasted = torch.zeros(32, 32, dtype=torch.bool)
    pasted[4:8, 4:12] = True
    pasted[12:20, 12:16] = True
    mixed = compose(source, target, pasted)
    assert mixed[0].sum() == 2 and mixed[1].sum() == 0 and mixed[2].sum() == 64 - 4


def test_pad_keeps_the_largest():
    masks = torch.zeros(3, 6, 6, dtype=torch.bool)
    masks[0, :1], masks[2, :3] = True, True  # areas 6, 0, 18
    out, padding = pad(masks, 5)
    assert out.flatten(1).sum(1).tolist() == [18, 6, 0, 0, 0] and padding.tolist() == [False, False, True, True, True]
    out, padding = pad(masks[None].expand(2, -1, -1, -1), 1)
    assert out.shape == (2, 1, 6, 6) and out.flatten(1).sum(1).tolist() == [18, 18] and not padding.any()
    out, padding = pad(masks[:0], 2)
    assert out.shape == (2, 6, 6) and padding.all()
