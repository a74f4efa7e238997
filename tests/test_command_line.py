"""The command line: what it writes, what it answers, and that every error is one line with exit status 2."""

import json
import sys
import tomllib
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from reinpp import prediction
from reinpp.command_line import CALLS, HANDED_ON, main
from reinpp.data.catalog import open_dataset
from reinpp.labels import ID_MAPS
from reinpp.models.segmenter import load_segmenter, tiny_segmenter

ROOT = Path(__file__).resolve().parent.parent
ADAPTER = str(ROOT / "data" / "weights" / "scenes_rein_g_seed0")


@pytest.fixture
def photo(tmp_path):
    image = open_dataset("scenes", "val", count=1)[0][0].permute(1, 2, 0).numpy()
    Image.fromarray(image).save(tmp_path / "street.png")
    return tmp_path / "street.png"


def fails(capsys, *arguments):
    "The one line that a wrong command says."
    capsys.readouterr()
    status = main([str(a) for a in arguments])
    said = capsys.readouterr().err
    assert status == 2 and said.count("\n") == 1 and said.endswith("\n"), said
    return said


def test_the_command_is_installed():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["scripts"]["reinpp"] == "reinpp.command_line:main" and "video" in project["optional-dependencies"]


@pytest.mark.parametrize("command", [*CALLS, *HANDED_ON])
def test_help_has_an_example(command, capsys):
    try:
        status = main([command, "--help"])
    except SystemExit as stop:
        status = stop.code
    said = capsys.readouterr().out
    assert not status and f"example: reinpp {command}" in said and "usage" in said


def test_predict_writes_what_the_segmenter_says(photo, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["predict", str(photo), "--adapter", ADAPTER, "--out", str(out), "--scores"]) == 0
    image = torch.from_numpy(np.array(Image.open(photo))).permute(2, 0, 1)[None] / 255
    segmenter = load_segmenter(ADAPTER)
    scores = segmenter.predict(image, segmenter.config["image_size"])[0]
    label = np.asarray(Image.open(out / "trainids" / "street.png"))
    assert label.dtype == np.uint8 and (label == scores.argmax(0).numpy()).all()
    with np.load(out / "scores" / "street.npz") as file:
        assert np.allclose(file["scores"], scores, atol=1e-3) and file["classes"][0] == "road"
    overlay = Image.open(out / "overlay" / "street.png")
    assert overlay.width == label.shape[1] and overlay.height > label.shape[0], "the legend is below"
    assert (out / "montage.png").exists() and "1 of 1 images" in capsys.readouterr().out


def test_predict_json_is_one_document_and_ids_are_cityscapes(photo, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["predict", str(photo), "--adapter", ADAPTER, "--out", str(out), "--values", "ids", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert sum(report["images"]["street.png"].values()) == pytest.approx(1, abs=0.01) and report["failed"] == 0
    assert set(np.unique(Image.open(out / "ids" / "street.png"))) <= set(ID_MAPS["cityscapes"])


def test_a_folder_with_odd_sizes_a_turned_photo_and_a_bad_file(tmp_path, capsys):
    folder, out = tmp_path / "photos", tmp_path / "out"
    folder.mkdir()
    exif = Image.Exif()
    exif[0x0112] = 6  # a camera held upright
    Image.new("RGB", (61, 40), "gray").save(folder / "turned.jpg", exif=exif)
    Image.new("L", (1, 1)).save(folder / "dot.png")
    (folder / "bad.png").write_bytes(b"no picture")
    (folder / "notes.txt").write_text("not an image")
    said = fails(capsys, "predict", folder, "--adapter", ADAPTER, "--out", out)
    assert "bad.png" in said
    sizes = {p.stem: Image.open(p).size for p in (out / "trainids").iterdir()}
    assert sizes == {"turned": (40, 61), "dot": (1, 1)}


def test_predict_refuses(photo, tmp_path, capsys, monkeypatch):
    def wrong(*more):
        return fails(capsys, "predict", *more, "--out", tmp_path / "out")
    assert "no such image" in wrong(tmp_path / "none.png", "--adapter", ADAPTER)
    assert "no adapter_config.json" in wrong(photo, "--adapter", tmp_path)
    assert "--adapter" in wrong(photo)
    assert "--stride 300 is larger" in wrong(photo, "--adapter", ADAPTER, "--window", 64, "--stride", 300)
    assert "from 1 up" in wrong(photo, "--adapter", ADAPTER, "--window", 0)
    assert "between 0 and 1" in wrong(photo, "--adapter", ADAPTER, "--opacity", 2)
    (tmp_path / "empty").mkdir()
    assert "no image with" in wrong(tmp_path / "empty", "--adapter", ADAPTER)
    for name in ("a.png", "a.jpg"):
        Image.new("RGB", (8, 8)).save(tmp_path / "empty" / name)
    assert "same stem" in wrong(tmp_path / "empty", "--adapter", ADAPTER)
    monkeypatch.setattr(prediction, "load_segmenter", lambda folder: tiny_segmenter(num_classes=3))
    assert "use trainids" in wrong(photo, "--adapter", "x", "--values", "ids")
    assert not (tmp_path / "out").exists()


def test_a_video_without_pyav_is_one_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(prediction.importlib.util, "find_spec", lambda name: None)
    assert "pip install 'reinpp[video]'" in fails(capsys, "predict", tmp_path / "a.mp4", "--adapter", ADAPTER)


def test_a_video_goes_frame_by_frame(tmp_path, capsys, monkeypatch):
    "With a stand-in for PyAV: a frame is encoded before the next is decoded."
    order = []

    class Media:
        streams = types.SimpleNamespace(video=[types.SimpleNamespace(average_rate=25, frames=2)])
        def __enter__(self): return self
        def __exit__(self, *error): pass
        def mux(self, packets): pass
        def add_stream(self, codec, rate): return self
        def encode(self, frame=None):
            order.append("end" if frame is None else frame.shape)
        def decode(self, video):
            for _ in range(2):
                order.append("decode")
                yield types.SimpleNamespace(to_ndarray=lambda format: np.zeros((33, 48, 3), np.uint8))

    av = types.ModuleType("av")
    av.open = lambda *a: Media()
    av.VideoFrame = types.SimpleNamespace(from_ndarray=lambda array, format: array)
    monkeypatch.setitem(sys.modules, "av", av)
    monkeypatch.setattr(prediction.importlib.util, "find_spec", lambda name: av)
    (tmp_path / "a.mp4").write_bytes(b"")
    assert main(["predict", str(tmp_path / "a.mp4"), "--adapter", ADAPTER, "--out", str(tmp_path), "--json"]) == 0
    assert order == ["decode", (32, 48, 3), "decode", (32, 48, 3), "end"]
    assert json.loads(capsys.readouterr().out)["frames"] == 2


def test_evaluate(capsys):
    assert main(["evaluate", "scenes:snow/val[:2]", "--adapter", ADAPTER, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["images"] == 2 and 0 < report["miou"] < 1 and len(report["confusion"]) == 19
    values = [v for v in report["iou"].values() if v is not None]
    assert report["miou"] == pytest.approx(sum(values) / len(values))
    assert "atlantis" in fails(capsys, "evaluate", "atlantis:val", "--adapter", ADAPTER)


def test_others_commands_are_handed_on(tmp_path, capsys):
    root = tmp_path / "proposals"
    assert main(["proposals", "--dataset", "scenes", "--split", "val", "--dataset-options", "count=1", "--engine",
        "classical", "--reduction", "2", "--root", str(root)]) == 0
    assert (root / "manifest.json").exists() and (root / "000000.safetensors").exists()
    assert "dataset='scenes' is unknown" in fails(capsys, "check", "scenes:val")
    assert "--dataset" in fails(capsys, "proposals")
    assert "invalid choice" in fails(capsys, "run", "huge", "rein_g")
    assert "only rein_a" in fails(capsys, "run", "tiny", "rein_g", "--target", "snow")


def test_export_refuses_another_suffix(tmp_path, capsys):
    assert ".pt2 file" in fails(capsys, "export", tmp_path / "a.onnx", "--adapter", ADAPTER)


def test_explore_names_the_page(capsys):
    assert main(["explore"]) == 0 and "explore.ipynb" in capsys.readouterr().out


def test_doctor(tmp_path, capsys):
    assert main(["doctor", "--json", "--data-root", str(tmp_path)]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["presets"]["tiny"] == [] and report["datasets"]["camvid"] is None
    assert any("camvid" in line for line in report["presets"]["camvid"]) and report["versions"]["torch"]
    assert main(["doctor"]) == 0 and "preset     tiny: ready" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [[], ["predictt"], ["doctor", "--no-such"]])
def test_wrong_commands_are_one_line(arguments, capsys):
    assert "--help says more" in fails(capsys, *arguments)


def test_a_clip_comes_back_with_its_labels_painted(tmp_path, capsys, monkeypatch):
    av = pytest.importorskip("av", reason="needs PyAV: pip install 'reinpp[video]'")
    clip, adapter = tmp_path / "clip.mp4", load_segmenter(ADAPTER)
    with av.open(str(clip), "w") as sink:
        stream = sink.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p"
        for k in range(4):
            frame = np.full((64, 96, 3), 40 * k, np.uint8)
            sink.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        sink.mux(stream.encode())
    made = ["--adapter", ADAPTER, "--out", str(tmp_path), "--labels", "--json"]
    assert main(["predict", str(clip), *made]) == 0
    report = json.loads(capsys.readouterr().out)
    labels = sorted((tmp_path / "trainids" / "clip").glob("*.png"))
    assert report["frames"] == 4 == len(labels) and labels[0].name == "000000.png"
    with av.open(str(clip)) as source, av.open(report["out"]) as painted:
        frames = [f.to_ndarray(format="rgb24") for f in source.decode(video=0)]
        assert len([f for f in painted.decode(video=0)]) == 4 and painted.streams.video[0].average_rate == 10
    image = torch.from_numpy(frames[2].copy()).permute(2, 0, 1)[None] / 255
    label = adapter.predict(image, adapter.config["image_size"])[0].argmax(0)
    assert (np.asarray(Image.open(labels[2])) == label.numpy()).all()
    monkeypatch.setattr(prediction, "load_segmenter", lambda folder: tiny_segmenter(num_classes=3))
    assert "use trainids" in fails(capsys, "predict", clip, *made, "--values", "ids")
    (tmp_path / "bad.mp4").write_bytes(b"no video")
    assert "bad.mp4" in fails(capsys, "predict", tmp_path / "bad.mp4", "--adapter", ADAPTER, "--out", tmp_path)
