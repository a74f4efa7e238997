"Archives for the test servers: names, ids, sizes; what is refused; nothing half-written."
import io
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

from reinpp.data.datasets import Dataset
from reinpp.labels import ID_MAPS
from reinpp.training.submissions import SERVERS, check_submission, write_submission

NAMES = {"cityscapes": ["berlin_000000_000019_leftImg8bit", "bonn_000001_000019_leftImg8bit"],
         "acdc": ["GOPR0351_frame_000159_rgb_anon", "GP010400_frame_000017_rgb_anon"],
         "darkzurich": ["GOPR0364_frame_000001_rgb_anon", "GOPR0364_frame_000321_rgb_anon"]}
MEMBERS = {"cityscapes": [""], "acdc": ["labelTrainIds/"],
    "darkzurich": ["labelTrainIds/", "labelTrainIds_invalid/", "confidence/"]}
SIZES = {"cityscapes": (1024, 2048), "acdc": (1080, 1920), "darkzurich": (1080, 1920)}


class Names:
    "Reader of nothing but names: a test split is never opened to be submitted."
    def __init__(self, names):
        self.names = names


def split_of(server):
    return Dataset(server, "test", Names(NAMES[server]), labels=False)


def maps(server):
    "All 19 classes, in blocks that a PNG packs fast."
    height, width = SIZES[server]
    rows = np.arange(height)[:, None] // 64
    return [(name, ((rows + np.arange(width)[None] // 64 + i) % 19).astype(np.uint8))
            for i, name in enumerate(NAMES[server])]


def png(pixels):
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


@pytest.mark.parametrize("server", SERVERS)
@pytest.mark.parametrize("given", ["pairs", "folder"])
def test_form(server, given, tmp_path):
    pairs, archive = maps(server), tmp_path / "out" / "archive.zip"
    if given == "folder":
        (tmp_path / "trainids").mkdir()
        for name, found in pairs:
            (tmp_path / "trainids" / f"{name}.png").write_bytes(png(found))
        predictions = tmp_path / "trainids"
    else:
        predictions = ((name, torch.from_numpy(found)) for name, found in pairs)
    result = write_submission(server, predictions, split_of(server), archive, partial=True)
    assert result == dict(images=2, bytes=archive.stat().st_size)
    assert result == check_submission(server, archive, split_of(server), partial=True)
    with zipfile.ZipFile(archive) as file:
        names = sorted(f"{folder}{name}.png" for folder in MEMBERS[server] for name in NAMES[server])
        assert sorted(file.namelist()) == names
        for name, found in pairs:
            for folder in MEMBERS[server]:
                sent = np.asarray(Image.open(file.open(f"{folder}{name}.png")))
                if folder == "confidence/":
                    assert sent.dtype == np.uint16 and (sent == 65535).all() and sent.shape == found.shape
                else:
                    assert sent.dtype == np.uint8
                    back = np.full(256, 255)
                    back[list(ID_MAPS["cityscapes"])] = list(ID_MAPS["cityscapes"].values())
                    assert ((back[sent] if server == "cityscapes" else sent) == found).all()
    assert [p.name for p in archive.parent.iterdir()] == ["archive.zip"]


def test_the_judge_finds_the_files(tmp_path):
    "cityscapesScripts' own look-up, by the name of the ground truth."
    judge = pytest.importorskip("cityscapesscripts.evaluation.evalPixelLevelSemanticLabeling")
    write_submission("cityscapes", maps("cityscapes"), split_of("cityscapes"), tmp_path / "a.zip", partial=True)
    with zipfile.ZipFile(tmp_path / "a.zip") as file:
        file.extractall(tmp_path / "results")
    args = judge.CArgs()
    args.predictionPath, args.predictionWalk = str(tmp_path / "results"), None
    for name in NAMES["cityscapes"]:
        truth = f"gtFine/test/x/{name.removesuffix('_leftImg8bit')}_gtFine_labelIds.png"
        assert judge.getPrediction(args, truth) == str(tmp_path / "results" / f"{name}.png")


def refused(call, *args, **options):
    with pytest.raises(ValueError) as error:
        call(*args, **options)
    return str(error.value)


def test_refused_before_writing(tmp_path):
    (first, a), (second, b) = maps("acdc")
    ds, archive = split_of("acdc"), tmp_path / "a.zip"
    archive.write_bytes(b"what was there")
    def attempt(pairs):
        return refused(write_submission, "acdc", pairs, ds, archive, partial=True)
    assert f"{second}: no prediction" in attempt([(first, a)])
    message = attempt([(first, a[:540, :960]), ("GOPR9999_frame_000001_rgb_anon", b)])
    assert "960x540; the server wants 1920x1080" in message and "no such image" in message
    assert f"{second}: no prediction" in message and "3 problems" in message
    assert "came twice" in attempt([(first, a), (first, a), (second, b)])
    ignored = b.copy()
    ignored[0, 0] = 255
    assert "0 to 255" in attempt([(first, a), (second, ignored)])
    assert "float32" in attempt([(first, a.astype(np.float32)), (second, b)])
    both = [(first, a), (second, b)]
    assert "wants predictions for all 2,000" in refused(write_submission, "acdc", both, ds, archive)
    assert archive.read_bytes() == b"what was there" and len(list(tmp_path.iterdir())) == 1
    def interrupted():
        yield first, a
        raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt):
        write_submission("acdc", interrupted(), ds, archive, partial=True)
    assert archive.read_bytes() == b"what was there" and len(list(tmp_path.iterdir())) == 1
    assert "server='kitti' is unknown: use one of cityscapes, acdc, darkzurich" in refused(
        write_submission, "kitti", [], ds, archive)


def test_refused_folder(tmp_path):
    folder = tmp_path / "trainids"
    folder.mkdir()
    (first, a), (second, b) = maps("acdc")
    (folder / f"{first}.png").write_bytes(png(a))
    def attempt():
        return refused(write_submission, "acdc", folder, split_of("acdc"), tmp_path / "a.zip", partial=True)
    assert f"{second}.png: no such file" in attempt()
    (folder / f"{second}.png").write_bytes(png(np.repeat(b[..., None], 3, 2)))
    assert f"{second}: the prediction is 3x1920x1080" in attempt()
    (folder / f"{second}.png").write_bytes(png(b)[:500])
    assert f"{second}.png" in attempt()
    assert not (tmp_path / "a.zip").exists()


def test_archive_is_checked(tmp_path):
    path, ds = tmp_path / "a.zip", split_of("cityscapes")
    (first, a), (second, b) = maps("cityscapes")
    own = np.array([{t: i for i, t in ID_MAPS["cityscapes"].items()}[t] for t in range(19)], np.uint8)
    def check(members):
        with zipfile.ZipFile(path, "w") as file:
            for name, data in members.items():
                file.writestr(name, data)
        return refused(check_submission, "cityscapes", path, ds, partial=True)
    good = {f"{first}.png": png(own[a]), f"results/bonn/{second}.png": png(own[b])}
    with zipfile.ZipFile(path, "w") as file:
        for name, data in good.items():
            file.writestr(name, data)
    assert check_submission("cityscapes", path, ds, partial=True)["images"] == 2  # any folder will do
    assert f"{second}.png: missing" in check({f"{first}.png": png(own[a])})
    assert "2 files for it" in check(good | {"again/bonn_000001_000019_pred.png": png(own[b])})
    assert "ulm_000000_000019.png: belongs to no image" in check(good | {"ulm_000000_000019.png": png(own[b])})
    assert "readme.txt: belongs to no image" in check(good | {"readme.txt": b"hello"})
    assert "value 0 is no label id" in check(good | {f"{first}.png": png(a)})
    assert "one channel of uint8" in check(good | {f"{first}.png": png(np.repeat(own[a][..., None], 3, 2))})
    assert "1024x512; wanted is 2048x1024" in check(good | {f"{first}.png": png(own[a][::2, ::2])})
    assert "cannot be read" in check(good | {f"{first}.png": b"no picture"})
    path.write_bytes(b"no archive")
    assert "no zip archive" in refused(check_submission, "cityscapes", path, ds, partial=True)


def test_dark_zurich_wants_all_three_folders(tmp_path):
    archive, ds = tmp_path / "a.zip", split_of("darkzurich")
    write_submission("darkzurich", maps("darkzurich"), ds, archive, partial=True)
    with zipfile.ZipFile(archive) as file, zipfile.ZipFile(tmp_path / "b.zip", "w") as less:
        for name in file.namelist():
            if not name.startswith("confidence"):
                less.writestr(name, file.read(name))
    message = refused(check_submission, "darkzurich", tmp_path / "b.zip", ds, partial=True)
    assert "2 problems" in message and f"confidence/{NAMES['darkzurich'][0]}.png: missing" in message


def test_names_that_the_server_could_not_tell_apart():
    names = Names(["GOPR0351_frame_000159_rgb_anon", "GOPR0351_frame_000159_rgb"])
    twice = Dataset("acdc", "test", names, labels=False)
    assert "could not tell it from" in refused(write_submission, "acdc", [], twice, "never.zip", partial=True)
    strange = Dataset("cityscapes", "test", Names(["IMG_0001"]), labels=False)
    message = refused(write_submission, "cityscapes", [], strange, "never.zip", partial=True)
    assert "IMG_0001: the server looks for names" in message
