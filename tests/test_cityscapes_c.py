"Corruptions: reproducible and without side effects; the set on disk: resumable, parallel, with a manifest; tables."
import hashlib
import importlib.util
import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from reinpp.data import cityscapes_c
from reinpp.data.catalog import DATASETS, open_dataset
from reinpp.data.cityscapes_c import (
    CORRUPTION_GROUPS,
    CORRUPTIONS,
    SEVERITIES,
    corrupt,
    corrupted,
    file_seed,
    make_cityscapes_c,
    read_manifest,
)
from reinpp.data.scenes import draw_scene
from reinpp.training.evaluation import corruption_table, evaluate_corruptions

pytestmark = pytest.mark.skipif(importlib.util.find_spec("imagecorruptions") is None,
    reason="imagecorruptions is not installed")
FAST = ("gaussian_noise", "impulse_noise", "brightness")


@pytest.fixture
def source(tmp_path):
    for city, i in (("aachen", 0), ("bonn", 1)):
        (tmp_path / "val" / city).mkdir(parents=True)
        Image.fromarray(draw_scene(50_000 + i, size=(32, 64)).image).save(
            tmp_path / "val" / city / f"{city}_000000_000019_leftImg8bit.png")
    return tmp_path / "val"


def test_sixteen():
    assert len(CORRUPTIONS) == len(set(CORRUPTIONS)) == 16 and [len(g) for g in CORRUPTION_GROUPS.values()] == [4, 4, 4,
        4]
    cityscapes_c._corruptions()  # without the shim it cannot be imported
    import imagecorruptions
    assert set(imagecorruptions.corruption_dict) - set(CORRUPTIONS) == {"zoom_blur", "elastic_transform", "pixelate"}


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_reproducible_and_worse_with_severity(name):
    image = draw_scene(50_002, size=(64, 96)).image
    made = [corrupt(image, name, s, seed=5) for s in (1, 5)]
    for m in made:
        assert m.shape == image.shape and m.dtype == np.uint8
    assert (corrupt(image, name, 5, seed=5) == made[1]).all()
    error = [np.abs(m.astype(int) - image).mean() for m in made]
    assert 0 < error[0] < error[1]
    drawn = name not in ("defocus_blur", "gaussian_blur", "brightness", "contrast", "saturate", "jpeg_compression")
    assert (corrupt(image, name, 5, seed=6) != made[1]).any() == drawn


def test_pairs_from_blocks_are_single_draws():
    ours, single = cityscapes_c._Draws(3), np.random.RandomState(3)
    for _ in range(9000):
        assert list(ours.randint(-2, 2, size=(2,))) == single.randint(-2, 2, size=(2,)).tolist()
    assert cityscapes_c._Draws(3).randint(5) == np.random.RandomState(3).randint(5)


def test_nothing_outside_changes():
    import skimage.filters
    state, gaussian = np.random.get_state()[1].copy(), skimage.filters.gaussian
    corrupt(draw_scene(50_002, size=(32, 64)).image, "impulse_noise", 3)
    assert (np.random.get_state()[1] == state).all() and skimage.filters.gaussian is gaussian and not hasattr(np,
        "float_")
    assert "pkg_resources" not in sys.modules or hasattr(sys.modules["pkg_resources"], "iter_entry_points")


def test_seeds_of_files():
    seeds = {file_seed(f"aachen/{i}.png", c, s, k) for i in range(20) for c in CORRUPTIONS for s in SEVERITIES
        for k in (0, 1)}
    assert len(seeds) == 20 * 16 * 5 * 2 and all(0 <= s < 2**32 for s in seeds)
    assert file_seed("a.png", "fog", 1) == int.from_bytes(hashlib.sha256(b"0 fog 1 a.png").digest()[:4], "big")


def test_refusals(source, tmp_path, monkeypatch):
    image = np.zeros((32, 32, 3), np.uint8)
    for call, words in ((lambda: corrupt(image, "mist", 1), "corruption='mist' is unknown: use one of motion_blur"),
            (lambda: corrupt(image, "fog", 6), "severity=6"),
                        (lambda: corrupt(image[:16], "fog", 1), "sides of at least 32"),
                        (lambda: corrupt(image.astype(float), "fog", 1), "float64"),
                        (lambda: make_cityscapes_c(source, tmp_path / "c", ("mist",)), "'mist'"),
                        (lambda: make_cityscapes_c(source, tmp_path / "c", severities=(0,)), "severity=0")):
        with pytest.raises(ValueError, match=words):
            call()
    with pytest.raises(FileNotFoundError, match="leftImg8bit_trainvaltest.zip"):
        make_cityscapes_c(tmp_path / "nowhere", tmp_path / "c")
    assert not (tmp_path / "c").exists()
    cityscapes_c._corruptions.cache_clear()
    monkeypatch.setattr(cityscapes_c.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="pip install"):
        corrupt(image, "fog", 1)


def test_made_resumed_and_checked(source, tmp_path):
    out = tmp_path / "c"
    first = make_cityscapes_c(source, out, FAST, (1, 5))
    manifest = read_manifest(out)
    assert first == len(manifest) == len(list(out.rglob("*.png"))) == 12
    assert all(hashlib.sha256((out / p).read_bytes()).hexdigest() == h for p, h in manifest.items())
    path = "brightness/5/bonn/bonn_000000_000019_leftImg8bit.png"
    image = np.asarray(Image.open(source / "bonn" / "bonn_000000_000019_leftImg8bit.png"))
    name = "bonn/bonn_000000_000019_leftImg8bit.png"
    assert (np.asarray(Image.open(out / path)) == corrupt(image, "brightness", 5,
        file_seed(name, "brightness", 5))).all()
    kept = (out / path).stat().st_mtime_ns
    # killed while it ran: a file missing, a half-written one, a manifest that was cut off in a line
    gone = "impulse_noise/1/aachen/aachen_000000_000019_leftImg8bit.png"
    (out / gone).unlink()
    (out / "fog").mkdir()
    (out / "fog" / ".x.png.1.tmp").write_bytes(b"half")
    (out / "SHA256SUMS").write_text((out / "SHA256SUMS").read_text()[:-40])
    again = make_cityscapes_c(source, out, FAST, (1, 5))
    assert again == 1 and read_manifest(out) == manifest and (out / path).stat().st_mtime_ns == kept
    checked = subprocess.run(["sha256sum", "-c", "--strict", "SHA256SUMS"], cwd=out, capture_output=True, text=True)
    assert checked.returncode == 0 and checked.stdout.count(": OK") == 12
    assert not list(out.rglob("*.tmp"))
    # more corruptions later; another seed never
    assert make_cityscapes_c(source, out, FAST + ("contrast",), (1, 5)) == 4
    with pytest.raises(ValueError, match="made with seed 0, now it would be 1"):
        make_cityscapes_c(source, out, FAST, seed=1)
    assert json.loads((out / "made_with.json").read_text())["imagecorruptions"]


def test_processes_make_the_same(source, tmp_path, capsys):
    one = make_cityscapes_c(source, tmp_path / "one", FAST, (2,))
    assert "3 corruptions x 1 severities x 2 images = 6 files, 6 to make" in capsys.readouterr().out
    two = make_cityscapes_c(source, tmp_path / "two", FAST, (2,), workers=2)
    assert one == two == 6 and read_manifest(tmp_path / "one") == read_manifest(tmp_path / "two")


def test_damaged_source_names_the_file(source, tmp_path):
    (source / "bonn" / "bonn_000000_000019_leftImg8bit.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match="bonn_000000_000019_leftImg8bit.png: cannot be read"):
        make_cityscapes_c(source, tmp_path / "c", ("contrast",), (1,))
    assert len(read_manifest(tmp_path / "c")) == 1


class Road(torch.nn.Module):
    num_classes = 19
    def predict(self, images, window=None, stride=None):
        assert (window, stride) == (512, 341)
        return torch.nn.functional.one_hot((images[:, 0] < .4).long(), 19).permute(0, 3, 1, 2).float()


@pytest.mark.skipif("cityscapes_c" not in DATASETS, reason="no reader of Cityscapes-C")
def test_read_and_evaluated(source, tmp_path):
    make_cityscapes_c(source, tmp_path / "cityscapes_c", FAST, (1, 5))
    for city in ("aachen", "bonn"):
        (tmp_path / "cityscapes" / "gtFine" / "val" / city).mkdir(parents=True)
        Image.fromarray(np.full((32, 64), 7, np.uint8)).save(
            tmp_path / "cityscapes" / "gtFine" / "val" / city / f"{city}_000000_000019_gtFine_labelIds.png")
    results = evaluate_corruptions(Road(), tmp_path, FAST, (1, 5), size=(32, 64))
    assert set(results) == {(c, s) for c in FAST for s in (1, 5)} and all(r["images"] == 2 for r in results.values())
    ds = open_dataset("cityscapes_c", "brightness/5", root=tmp_path)
    bright = torch.stack([ds[i][0][0] for i in range(2)]) / 255
    assert results["brightness", 5]["iou"]["road"] == pytest.approx((bright >= .4).double().mean().item())


def test_table():
    table = corruption_table({(c, s): (k + 10 * s) / 100 for k, c in enumerate(CORRUPTIONS) for s in SEVERITIES})
    assert table.shape == (6, 17) and [c for _, c in table.columns[:16]] == list(CORRUPTIONS)
    assert table.loc[5, ("all", "mean")] == pytest.approx(57.5) and table.loc["mean",
        ("all", "mean")] == pytest.approx(37.5) and table.loc["mean", ("weather", "frost")] == pytest.approx(45)
    five = corruption_table({(c, 5): dict(miou=.5) for c in CORRUPTIONS})
    assert five.shape == (1, 17) and (five == 50).all(axis=None)
    gap = corruption_table({("fog", 1): .5, ("fog", 5): .4, ("snow", 5): .2})
    # a mean over fewer corruptions is none
    assert np.isnan(gap.loc[1, ("all", "mean")]) and gap.loc[5, ("all", "mean")] == pytest.approx(30)


def test_corrupted_while_read():
    scenes = open_dataset("scenes", "val", count=2, size=(32, 64))
    noisy = corrupted(scenes, "gaussian_noise", 3)
    assert noisy.name == "scenes gaussian_noise 3" and len(noisy) == 2 and noisy.evaluated == scenes.evaluated
    assert torch.equal(noisy[1][1], scenes[1][1]) and torch.equal(noisy[1][0],
        noisy[1][0]) and not torch.equal(noisy[1][0], scenes[1][0])
    assert not torch.equal(noisy[0][0] - scenes[0][0], noisy[1][0] - scenes[1][0])
