"`check` finds each fault, names the file, and remembers what it has seen."
import os
import shutil
import subprocess
import sys
import zipfile

import numpy as np
import pytest
from PIL import Image

import reinpp.data.check
from reinpp.data.catalog import open_dataset
from reinpp.data.check import KINDS, check, main
from reinpp.data.datasets import concat


def save(array, path, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path, **options)


def picture(k):
    return np.random.default_rng(k).integers(0, 256, (8, 10, 3), dtype=np.uint8)


@pytest.fixture
def city(tmp_path):
    "Cityscapes with four pairs in train, two in val, two images in test."
    folder = tmp_path / "data" / "cityscapes"
    for n, (split, count) in enumerate((("train", 4), ("val", 2), ("test", 2))):
        for k in range(count):
            save(picture(10 * n + k), folder / f"leftImg8bit/{split}/ulm/ulm_{k}_000019_leftImg8bit.png")
            save(np.full((8, 10), 7 + k, np.uint8), folder / f"gtFine/{split}/ulm/ulm_{k}_000019_gtFine_labelIds.png")
    return folder


def look_at(city, **options):
    return check("cityscapes", city.parent, **dict(published=False, cache=city.parent / "seen") | options)


def test_a_whole_set(city):
    report = look_at(city)
    table = report.table
    assert report.ok and report.problems.empty and table.split.tolist() == ["train", "val", "test"]
    assert table.images.tolist() == [4, 2, 2] and table.labels.tolist() == [4, 2, 0]
    assert set(table.sizes) == {"10x8 (published: 2048x1024)"} and set(table.status) == {"ok"}
    assert "train" in str(report) and "<table" in report._repr_html_()


def test_published_numbers(city):
    report = look_at(city, published=True)
    assert not report.ok and report.table.published.tolist() == [2975, 500, 1525]
    assert set(report.table.status) == {"incomplete"}


def truncated(i, m):
    i.write_bytes(i.read_bytes()[:-60])


def rotated(i, m):
    tag = Image.Exif()
    tag[0x0112] = 6
    save(picture(1), i, exif=tag)


FAULTS = {
    "unreadable": truncated,
    "no partner": lambda i, m: m.unlink(),
    "rotated": rotated,
    "unknown value": lambda i, m: save(np.full((8, 10), 200, np.uint8), m),
    "other size": lambda i, m: save(np.zeros((8, 9), np.uint8), m),
    "twice": lambda i, m: shutil.copy(i, str(i).replace("ulm_2", "ulm_3")),
}


@pytest.mark.parametrize("kind", KINDS)
def test_each_fault_is_found_and_named(city, kind):
    ds = open_dataset("cityscapes", "train", root=city)
    FAULTS[kind](ds.reader.image_paths[2], ds.reader.label_paths[2])
    report = look_at(city)
    assert not report.ok and report.problems.kind.tolist() == [kind] and report.problems.split.tolist() == ["train"]
    assert ("ulm_3" if kind == "twice" else "ulm_2") in report.problems.file[0]
    assert report.table[kind].tolist() == [1, 0, 0] and report.table.status.tolist() == [kind, "ok", "ok"]
    if kind == "unknown value":
        assert "value 200" in report.problems.what[0]
    assert main(["cityscapes", "--data-root", str(city.parent), "--any-number", "--again"]) == 1


def test_labels_without_images_and_lists_that_fail(city):
    next((city / "leftImg8bit/val").rglob("*.png")).unlink()
    shutil.rmtree(city / "gtFine/train")
    for path in (city / "leftImg8bit/test").rglob("*.png"):
        path.unlink()
    report = look_at(city)
    assert report.table.status.tolist() == ["not found", "no partner", "cannot be listed"] and not report.ok
    for what, said in zip(report.problems.what, ("gtFine/train", "a label without an image", "empty"), strict=True):
        assert said in what


def test_the_same_image_in_two_splits(city):
    shutil.copy(next((city / "leftImg8bit/train").rglob("ulm_0*")), next((city / "leftImg8bit/val").rglob("ulm_1*")))
    report = look_at(city)
    assert report.problems[["split", "kind"]].values.tolist() == [["val", "twice"]]
    assert "train" in report.problems.what[0]


def test_second_look_opens_nothing(city, monkeypatch):
    opened = []
    once = reinpp.data.check.look
    monkeypatch.setattr(reinpp.data.check, "look", lambda image, *rest: opened.append(image.name[:5])
        or once(image, *rest))
    truncated(next((city / "leftImg8bit/train").rglob("ulm_0*")), None)
    first = look_at(city)
    assert len(opened) == 8
    second = look_at(city)
    assert len(opened) == 8 and second.problems.equals(first.problems) and second.table.equals(first.table)
    save(picture(99), next((city / "leftImg8bit/train").rglob("ulm_0*")))  # mended
    label = next((city / "gtFine/val").rglob("ulm_1*labelIds*"))
    os.utime(label, ns=(1, label.stat().st_mtime_ns + 10**9))
    assert look_at(city).ok and opened[8:] == ["ulm_0", "ulm_1"]
    assert look_at(city, cache=None).ok and len(opened) == 18, "without a memory everything is opened"
    check(open_dataset("cityscapes", "train", root=city, rotation="ignore"), cache=city.parent / "seen")
    assert len(opened) == 22, "another rule, another look"
    for path in (city.parent / "seen").iterdir():
        path.write_text("{ damaged")
    assert look_at(city).ok and len(opened) == 30


def test_what_was_seen_is_believed_only_whole(city):
    "Any byte changed in the memory, and all is looked at again: nothing else comes out."
    first, (memory, *_) = look_at(city), (city.parent / "seen").iterdir()
    whole = memory.read_bytes()
    for at in range(0, len(whole), 97):
        memory.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1:])
        again = look_at(city)
        assert again.ok and again.table.equals(first.table)
        assert memory.read_bytes() == whole


def test_what_was_seen_before_an_interruption_stays_seen(city, monkeypatch):
    once, opened = reinpp.data.check.look, []

    def interrupted(image, *rest):
        if len(opened) == 2:
            raise KeyboardInterrupt
        opened.append(image)
        return once(image, *rest)
    monkeypatch.setattr(reinpp.data.check, "look", interrupted)
    with pytest.raises(KeyboardInterrupt):
        look_at(city)
    monkeypatch.setattr(reinpp.data.check, "look", lambda image, *rest: opened.append(image) or once(image, *rest))
    assert look_at(city).ok and len(opened) == 8


def test_processes_find_the_same(city):
    label = next((city / "gtFine/train").rglob("ulm_0*"))
    for k in range(4, 80):
        shutil.copy(label, city / f"gtFine/train/ulm/ulm_{k}_000019_gtFine_labelIds.png")
        save(picture(100 + k), city / f"leftImg8bit/train/ulm/ulm_{k}_000019_leftImg8bit.png")
    truncated(city / "leftImg8bit/train/ulm/ulm_50_000019_leftImg8bit.png", None)
    one, two = look_at(city, cache=None, workers=1), look_at(city, cache=None, workers=2)
    assert one.table.equals(two.table) and one.problems.equals(two.problems) and "ulm_50" in one.problems.file[0]


def test_archives(city):
    for top in ("leftImg8bit", "gtFine"):
        with zipfile.ZipFile(city / f"{top}.zip", "w") as archive:
            for path in (city / top).rglob("*.png"):
                archive.write(path, path.relative_to(city))
        shutil.rmtree(city / top)
    assert look_at(city).ok and look_at(city).table.images.tolist() == [4, 2, 2]
    path = city / "leftImg8bit.zip"
    data = bytearray(path.read_bytes())
    data[data.index(b"PK\x03\x04") + 100] ^= 255
    path.write_bytes(data)
    reinpp.files._ARCHIVES.clear()  # as in another process
    report = look_at(city)
    assert not report.ok and report.problems.kind.tolist() == ["unreadable"] and "zip" in report.problems.file[0]
    path.write_bytes(data[:-30])
    report = look_at(city)
    assert not report.ok and "cannot be listed" in report.table.status.tolist()


def test_gtavs_sizes_are_listed_and_not_wrong(tmp_path):
    for k in range(3):
        save(picture(k), tmp_path / f"gta/images/{k}.png")
        save(np.full((8, 10 + (k == 1)), 7, np.uint8), tmp_path / f"gta/labels/{k}.png")
    report = check("gtav", tmp_path, published=False, cache=None)
    assert report.ok and report.table["other size"].tolist() == [1] and "1.png" in report.problems.file[0]
    assert report.table.split.tolist() == ["train"], "source_val is some of the same files"
    for what in ("gtav:source_val", open_dataset("gtav", "source_val", tmp_path)):
        assert check(what, tmp_path, published=False, cache=None).table.images.tolist() == [1]


def test_opened_sets(city, tmp_path):
    parts = [open_dataset("cityscapes", s, root=city) for s in ("train", "val")]
    assert check(concat(parts), published=False, cache=None).table.images.tolist() == [4, 2]
    assert check(parts, cache=None).table.status.tolist() == ["incomplete"] * 2
    unlabelled = open_dataset("cityscapes", "train", root=city, labels=False)
    for path in (city / "gtFine/train").rglob("*.png"):
        path.write_text("x")
    report = check(unlabelled, published=False, cache=None)
    assert report.ok and report.table.labels.tolist() == [0], "labels of a target are not looked at"
    assert check(open_dataset("scenes", "train", count=3)).table.status.tolist() == ["drawn"]
    save(picture(0), tmp_path / "mine/x/images/a.png")
    save(np.full((8, 10), 3, np.uint8), tmp_path / "mine/x/masks/a.png")

    def mine(n):
        return check(open_dataset("folder", "x", root=tmp_path / "mine", classes=tuple("abcd")[:n]), cache=None)

    assert mine(4).ok and mine(3).problems.kind.tolist() == ["unknown value"]


def test_absent_sets_and_splits(city):
    shutil.rmtree(city / "leftImg8bit/test")
    report = look_at(city)
    assert report.ok and report.table.status.tolist() == ["ok", "ok", "absent"]
    assert check("cityscapes:val", city, published=False, cache=None).table.split.tolist() == ["val"]
    missing = check(["cityscapes:test", "gtav"], city.parent, cache=None)
    assert not missing.ok and missing.table.status.tolist() == ["not found"] * 2 and "http" in missing.problems.what[1]
    (city.parent / "gta").mkdir()
    assert check("gtav", city.parent, cache=None).table.status.tolist() == ["cannot be listed"]
    with pytest.raises(ValueError, match="cityscapes"):
        check("citiscapes")
    with pytest.raises(ValueError, match="cityscapes: split='dev' is unknown: use one of train, val"):
        check("cityscapes:dev", city)
    with pytest.raises(ValueError, match="dataset='folder' is unknown: use one of gtav"):
        check("folder")


def test_exit_status(city, tmp_path, capsys):
    def shell(*a):
        return main([*a, "--again"])

    assert shell("--data-root", str(city.parent), "--any-number") == 0 and "cityscapes" in capsys.readouterr().out
    assert shell("--data-root", str(city.parent)) == 1 and "incomplete" in capsys.readouterr().out
    assert shell("nothing", "--data-root", str(city.parent)) == 2
    assert "dataset='nothing' is unknown" in capsys.readouterr().err
    assert shell("--data-root", str(tmp_path / "empty")) == 1 and "--data-root" in capsys.readouterr().err
    done = subprocess.run([sys.executable, "-m", "reinpp.data.check", "gtav", "--data-root", str(city.parent),
        "--again"], capture_output=True, text=True)
    assert done.returncode == 1 and "no folder" in done.stdout and not done.stderr
