"""What comes from elsewhere is data: no such file makes the package run code, start a program, connect to anything, or
write or read outside its folder.

Python itself reports what is opened, started, connected to or looked up by a pickle while a hostile file is read."""

import io
import json
import os
import pickle
import site
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from test_adapt import page
from test_hostile_adapters import signed
from test_hostile_files import Planted, plant, rewritten

from reinpp.adaptation import sam
from reinpp.adaptation.proposals import ProposalStore, make_proposals
from reinpp.data.catalog import open_dataset
from reinpp.data.check import check
from reinpp.data.datasets import LabelForm, read_image, read_label
from reinpp.files import list_files, read_checkpoint
from reinpp.models.export import export, load_program
from reinpp.models.segmenter import load_segmenter, tiny_segmenter
from reinpp.paper.experiments import Ledger, plan
from reinpp.training.run_folder import RunFolder

ROOT = Path(__file__).resolve().parents[1]
OWN = [str(ROOT), sys.prefix, sys.base_prefix, *site.getsitepackages(), "/proc", "/sys", "/dev", "/usr", "/lib"]
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
ACTS = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "socket.connect",
        "socket.getaddrinfo", "socket.bind", "os.remove", "os.rename", "os.mkdir", "os.link", "os.symlink")
_watching = []  # the folder of the file that is read, and what was seen


def _watch(event, arguments):
    if not _watching: return
    folder, seen = _watching
    if event == "open" and isinstance(arguments[0], (str, bytes, os.PathLike)):
        path, flags = os.path.abspath(os.fsdecode(arguments[0])), arguments[2] or 0
        if flags & WRITES: seen.append(("written", path))
        elif not path.startswith((folder, *OWN)): seen.append(("read", path))
    elif event == "pickle.find_class" and not arguments[0].startswith(("torch", "collections")):
        seen.append(("looked up", ".".join(arguments)))
    elif event in ACTS:
        seen.append((event, str(arguments[:2])))


sys.addaudithook(_watch)


def seen_while(read, folder, *arguments):
    "What reading did, and the error that it ended with."
    seen, said = [], None
    _watching[:] = os.path.realpath(folder), seen
    try: read(*arguments)
    except (ValueError, OSError) as error: said = str(error)
    finally: _watching.clear()
    return seen, said


def mark_of(folder): return folder.parent / "it ran"


def pickled(folder):
    stream = io.BytesIO()
    torch.save({"x": Planted(mark_of(folder))}, stream)
    return stream.getvalue()


def adapters(folder):
    "Settings that name addresses and places; weights that are a pickle."
    segmenter = tiny_segmenter(num_classes=5)
    config, state = segmenter.config, segmenter.trained_state()
    for key, value in (("backbone", "hf-hub:a/b"), ("backbone", f"local-dir:{folder.parent}"),
                       ("backbone_args", dict(pretrained_cfg=dict(url="http://127.0.0.1:9/x"),
                           cache_dir=str(folder.parent / "x"))),
                       ("backbone_args", dict(checkpoint_path=str(folder.parent / "x.pth"))),
                       ("record", dict(key="../../x", __class__="os.system"))):
        signed(folder, config | {key: value}, state)
        yield lambda: load_segmenter(folder)
    signed(folder, config, state)
    (folder / "adapter_model.safetensors").write_bytes(pickled(folder))
    yield lambda: load_segmenter(folder)


def checkpoints(folder):
    "Pickles, under every name; shards that lie elsewhere."
    save_file(dict(x=torch.ones(1)), folder.parent / "outside.safetensors")
    for name in ("a.pth", "a.pt", "a.bin", "a.safetensors"):
        (folder / name).write_bytes(pickled(folder))
        yield lambda name=name: read_checkpoint(folder / name)
        (folder / name).write_bytes(pickle.dumps(Planted(mark_of(folder))))
        yield lambda name=name: read_checkpoint(folder / name)
    index = folder / "model.safetensors.index.json"
    for shard in ("../outside.safetensors", str(folder.parent / "outside.safetensors")):
        index.write_text(json.dumps(dict(weight_map=dict(x=shard))))
        yield lambda: read_checkpoint(index)


def own_checkpoints(folder):
    "A checkpoint of a run that somebody else has put there."
    for name in ("checkpoint.pt", "checkpoint.previous.pt"):
        (folder / name).write_bytes(pickled(folder))
        run = RunFolder(folder, None, None, {}, 10, None, 1)
        run.writes = False
        yield run.last_checkpoint


def pictures(folder, read):
    "A PostScript program, other formats, and a pipe, under the name of a PNG."
    program = f"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n({mark_of(folder)}) (w) file closefile showpage\n"
    (folder / "a.png").write_text(program)
    yield lambda: read(folder / "a.png")
    for content in ("GIF", "TIFF", "PPM", "PDF"):
        Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(folder / "a.png", content)
        yield lambda: read(folder / "a.png")
    (folder / "a.png").write_bytes(pickled(folder))
    yield lambda: read(folder / "a.png")


def archives(folder):
    "Members that lead elsewhere, as names and as links; nothing is unpacked."
    stream = io.BytesIO()
    Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(stream, "PNG")
    link = zipfile.ZipInfo("images/link.png")
    link.external_attr = 0o120777 << 16
    with zipfile.ZipFile(folder / "a.zip", "w") as file:
        for name in ("images/../../evil.png", "/images/evil.png", "../images/evil.png", "images/..\\evil.png"):
            file.writestr(name, stream.getvalue())
        file.writestr(link, str(folder.parent / "secret.png"))
        file.writestr("images/pickle.png", pickled(folder))
    def read_all(deep):
        for member in list_files(folder, "images", deep): read_image(member)
    yield lambda: read_all(False)
    yield lambda: read_all(True)
    yield lambda: open_dataset("gtav", "train", folder, labels=False)[0]
    yield lambda: check("gtav:train", folder, workers=0, progress="none", cache=None)


def configurations(folder):
    "Calls, in every place where hydra or YAML would make one."
    package = pytest.importorskip("sam2")
    whole, file = Path(package.__path__[0], sam.SAM2["tiny"][0]).read_text(), folder / "a.yaml"
    call = f"{{_target_: builtins.open, file: {mark_of(folder)}, mode: w}}"
    for old, new in (("stages: [1, 2, 7, 2]", f"stages: [1, 2, 7, {call}]"), ("model:", f"x: {call}\nmodel:"),
                     ("stages: [1, 2, 7, 2]", f"stages: !!python/object/apply:os.mkdir ['{mark_of(folder)}']"),
                     ("stages: [1, 2, 7, 2]", "stages: ${oc.env:HOME}")):
        file.write_text(whole.replace(old, new, 1))
        yield lambda: sam._sam2_net(str(file), 256)


def programs(folder):
    "Pickles in the parts of a .pt2; an ONNX program whose weights lie elsewhere."
    good = folder / "good.pt2"
    export(tiny_segmenter("freeze", "semantic_fpn", num_classes=3), good)
    for where in ("example images", "weights", "constants", "opaque object", "size", "older form"):
        bad = rewritten(good, folder / f"{where}.pt2", plant(where, mark_of(folder)))
        yield lambda bad=bad: load_program(bad)
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")  # which reads about the system when it is imported
    secret = np.ones(4, np.float32)
    secret.tofile(folder.parent / "outside.bin")
    for place in ("../outside.bin", str(folder.parent / "outside.bin")):
        tensor = onnx.helper.make_tensor("w", onnx.TensorProto.FLOAT, [4], secret)
        tensor.ClearField("float_data")
        tensor.data_location = onnx.TensorProto.EXTERNAL
        for key, value in (("location", place), ("offset", "0"), ("length", "16")):
            tensor.external_data.add(key=key, value=value)
        info = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [4]) for name in ("images", "scores")]
        graph = onnx.helper.make_graph([onnx.helper.make_node("Add", ["images", "w"], ["scores"])], "g", info[:1],
            info[1:], [tensor])
        model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8)
        (folder / "a.onnx").write_bytes(model.SerializeToString())
        yield lambda: load_program(folder / "a.onnx")


def records(folder):
    "Records that are something else, and manifests of proposals that name other places."
    experiment = plan("tiny", "freeze")
    file = Ledger(folder).path(experiment)
    for text in ("{}", "[]", json.dumps(dict(key="../../x", config={}, metrics={})), "__import__('os').getcwd()"):
        file.write_text(text)
        yield lambda: Ledger(folder).get(experiment)
    file.unlink()
    make_proposals(open_dataset("scenes", "val", count=1, size=(32, 48)), "instances", folder / "store")
    manifest = folder / "store" / "manifest.json"
    said = json.loads(manifest.read_text())
    for change in (dict(engine="os.system"), dict(key="../../x"), dict(checkpoint="/etc/passwd")):
        manifest.write_text(json.dumps(said | change))
        yield lambda: ProposalStore(folder / "store")[0]


def parameters(folder):
    "What a page's parameters may not name."
    given = dict(source="scenes:train[:2]", target="scenes:night/train[:2]", output=str(folder / "out"))
    for wrong in (dict(engine="os:system"), dict(preset="__import__('os')"), dict(start=None, backbone="hf-hub:a/b"),
                  dict(start=None, backbone=f"local-dir:{folder}"), dict(source=["scenes:train[:2]"]),
                  dict(options={"__class__": "os.system"}), dict(options={"tau": "__import__('os')"}),
                  dict(source="scenes:train[:__import__('os')]"), dict(seed="$(touch x)"), dict(workers=10**9)):
        yield lambda wrong=wrong: page("if start is None:\n    key", **given | wrong)


KINDS = {
    "adapter": adapters, "checkpoint": checkpoints, "checkpoint of a run": own_checkpoints,
    "image": lambda folder: pictures(folder, read_image),
    "label": lambda folder: pictures(folder, lambda path: read_label(path, LabelForm({0: 0}))),
    "zip": archives, "yaml": configurations, "program": programs, "record": records, "parameter": parameters}


@pytest.mark.parametrize("kind", KINDS)
def test_a_foreign_file_is_only_read(kind, tmp_path):
    folder = tmp_path / "foreign"
    folder.mkdir()
    page("NAMES =")  # what is imported, is imported
    for number, read in enumerate(KINDS[kind](folder)):
        seen, said = seen_while(read, folder)
        assert not seen, (kind, number, seen)
        assert said is None or "\n" not in said, (kind, number, said)
    assert not mark_of(folder).exists()


@pytest.mark.parametrize("act", [
    lambda folder: pickle.loads(pickle.dumps(Planted(mark_of(folder)))),
    lambda folder: subprocess.run(["true"]), lambda folder: (folder.parent / "x").write_text(""),
    lambda folder: Path("/etc/passwd").read_bytes(), lambda folder: os.mkdir(folder.parent / "y"),
    lambda folder: __import__("socket").create_connection(("127.0.0.1", 9), 1)])
def test_what_is_not_to_happen_would_be_seen(act, tmp_path):
    (tmp_path / "foreign").mkdir()
    seen, _ = seen_while(act, tmp_path / "foreign", tmp_path / "foreign")
    assert seen
