"Files that are not what their names say are refused, in one line that names them."
import contextlib
import io
import json
import os
import pickle
import random
import re
import struct
import warnings
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from reinpp import files
from reinpp.adaptation import sam
from reinpp.adaptation.masks import Proposals
from reinpp.adaptation.proposals import ProposalStore, make_proposals, read_proposals, write_proposals
from reinpp.adaptation.sam import SAM2
from reinpp.data.catalog import open_dataset
from reinpp.data.datasets import LabelForm, read_image, read_label
from reinpp.files import BadFile, list_files, read_bytes
from reinpp.models.export import export, load_program
from reinpp.models.segmenter import create_segmenter


@pytest.mark.parametrize("content", ["EPS", "GIF", "BMP", "TIFF", "PPM"])
def test_other_formats_under_a_png_name_are_no_images(content, tmp_path):
    Image.fromarray(np.zeros((4, 6, 3), np.uint8)).save(tmp_path / "a.png", content)
    with pytest.raises(BadFile, match="a.png: cannot be read as an image"):
        read_image(tmp_path / "a.png")


@pytest.mark.parametrize("content", ["GIF", "JPEG"])
def test_labels_are_png_whatever_their_name(content, tmp_path):
    Image.fromarray(np.zeros((4, 6), np.uint8)).save(tmp_path / "a.png", content)
    with pytest.raises(BadFile, match="a.png: cannot be read as an image"):
        read_label(tmp_path / "a.png", LabelForm({0: 0}))
    if content == "JPEG":
        assert read_image(tmp_path / "a.png").shape == (4, 6, 3)


# ---------------------------------------------------------------- exported programs

@pytest.fixture(scope="module")
def program(tmp_path_factory):
    "An exported program."
    path = tmp_path_factory.mktemp("program") / "a.pt2"
    head = dict(hidden_dim=16, branch_dim=8)
    export(create_segmenter("tiny", "freeze", "semantic_fpn", 3, 64, pretrained=False, head_args=head), path)
    return path


class Planted:
    "An object whose unpickling makes a file."
    def __init__(self, mark): self.mark = str(mark)
    def __reduce__(self): return open, (self.mark, "w")


def rewritten(program, path, change=lambda parts: None):
    "A copy of a program with other parts: `change` is given {name in the archive: bytes}."
    with zipfile.ZipFile(program) as file:
        root = file.namelist()[0].partition("/")[0]
        parts = {name.partition("/")[2]: file.read(name) for name in file.namelist()}
    change(parts)
    with zipfile.ZipFile(path, "w") as file:
        for name, data in parts.items():
            file.writestr(f"{root}/{name}", data)
    return path


def pickled(value):
    stream = io.BytesIO()
    torch.save(value, stream)
    return stream.getvalue()


def plant(where, mark):
    "Put a thing into an archive that would make the file `mark` when it is loaded."
    def change(parts):
        kind = {"weights": "weight_0", "constants": "tensor_0"}.get(where)
        if where == "example images":
            parts["data/sample_inputs/model.pt"] = pickled(((Planted(mark),), {}))
        elif kind:
            listed = f"data/{where}/model_{where}_config.json"
            config = json.loads(parts[listed])
            name, one = next(iter(config["config"].items()), ("planted", None))
            one = one or json.loads(parts["data/weights/model_weights_config.json"])["config"].popitem()[1]
            config["config"][name] = one | dict(path_name=kind, use_pickle=True)
            parts[listed] = json.dumps(config).encode()
            parts[f"data/{where}/{kind}"] = pickled(Planted(mark))
        elif where == "opaque object":
            listed = "data/constants/model_constants_config.json"
            one = json.loads(parts["data/weights/model_weights_config.json"])["config"].popitem()[1]
            one |= dict(path_name="opaque_obj_0", use_pickle=True)
            parts[listed] = json.dumps({"config": {"x": one}}).encode()
            parts["data/constants/opaque_obj_0"] = pickle.dumps(Planted(mark))
        elif where == "size":
            parts["models/model.json"] = re.sub(rb'"Symbol\([^"]*"', json.dumps(f"open({str(mark)!r}, 'w')").encode(),
                parts["models/model.json"])
        else:
            assert where == "older form"
            parts["data/weights/model.pt"] = pickled({"x": Planted(mark)})
    return change


@pytest.mark.parametrize("where", ["example images", "weights", "constants", "opaque object", "size", "older form"])
def test_a_planted_thing_in_a_program_is_not_run(where, program, tmp_path):
    mark = tmp_path / "it ran"
    bad = rewritten(program, tmp_path / "bad.pt2", plant(where, mark))
    with pytest.raises(ValueError, match="bad.pt2: not loaded, because it holds more than a program") as told:
        load_program(bad)
    assert "\n" not in str(told.value) and not mark.exists()
    with contextlib.suppress(Exception):
        torch.export.load(bad)
    assert mark.exists(), "the plant is a real one"


def added(name, content=b"\x7fELF"):
    return lambda parts: parts.update({name: content})


def without(name):
    return lambda parts: parts.pop(name)


def changed_json(old, new):
    def change(parts):
        assert old in parts["models/model.json"]
        parts["models/model.json"] = parts["models/model.json"].replace(old, new)
    return change


@pytest.mark.parametrize("change", [
    added("data/aotinductor/model/a.so"), added("extra/a"), added("data/weights/../../a"),
    without("models/model.json"), without("archive_format"),
    changed_json(b"torch.ops.aten.conv2d.default", b"torch.ops.aten.from_file.default"),
    changed_json(b"torch.ops.aten.conv2d.default", b"torch.hub.load"),
    changed_json(b"torch.ops.aten.conv2d.default", b"_operator.methodcaller"),
    changed_json(b"builtins.dict", b"collections.defaultdict"),
    changed_json(b'"guards_code": []', b'"guards_code": ["1"]'), changed_json(b"{", b"["),
    changed_json(b'"name": "conv2d"', b'"name": "a; import os"'), added("models/model.json", b"[" * 100_000)])
def test_programs_of_other_parts_are_refused(change, program, tmp_path):
    with pytest.raises(ValueError, match="bad.pt2: not loaded") as told:
        load_program(rewritten(program, tmp_path / "bad.pt2", change))
    assert "\n" not in str(told.value) and len(str(told.value)) < 600


def test_a_bit_flipped_in_a_program_is_noticed(program, tmp_path):
    whole, bad = program.read_bytes(), tmp_path / "bad.pt2"
    for at in range(len(whole) // 9, len(whole), len(whole) // 4):
        bad.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1:])
        with pytest.raises(ValueError, match="bad.pt2: not loaded.*(checksum|damaged)"):
            load_program(bad)


def test_two_parts_of_one_name_and_no_archive_are_refused(program, tmp_path):
    bad = rewritten(program, tmp_path / "bad.pt2")
    load_program(bad)
    with zipfile.ZipFile(bad, "a") as file, pytest.warns(UserWarning, match="Duplicate"):
        file.writestr(next(name for name in file.namelist() if name.endswith("model.pt")), b"")
    for content in (bad.read_bytes(), b"", b"text", program.read_bytes()[:-100]):
        bad.write_bytes(content)
        with pytest.raises(ValueError, match="bad.pt2: not loaded"):
            load_program(bad)


# ---------------------------------------------------------------- SAM 2's configurations

@pytest.fixture
def configuration():
    "The package's smallest, as a text."
    package = pytest.importorskip("sam2")
    return Path(package.__path__[0], SAM2["tiny"][0]).read_text()


@pytest.mark.parametrize("target", [
    "builtins.open", "os.system", "sam2.modeling.sam2_base.torch.hub.load", "sam2.build_sam.build_sam2",
    "sam2.modeling", "sam2.modeling.backbones.hieradet.Hiera.load_state_dict", "sam2.modeling.sam2_base.None", "${a}",
    "3"])
def test_a_configuration_of_sam2_calls_nothing_foreign(target, configuration, tmp_path):
    file, deep = tmp_path / "mine.yaml", "sam2.modeling.backbones.hieradet.Hiera"
    assert configuration.count(deep) == 1
    file.write_text("a: builtins.open\n" + configuration.replace(deep, target))
    with pytest.raises(ValueError, match="mine.yaml is no configuration of SAM 2.*_target_=") as told:
        sam._sam2_net(str(file), 256)
    assert "\n" not in str(told.value)


def test_a_planted_call_in_a_list_is_not_made(configuration, tmp_path):
    file, mark = tmp_path / "mine.yaml", tmp_path / "it ran"
    call = f"{{_target_: builtins.open, file: {mark}, mode: w}}"
    assert "stages: [1, 2, 7, 2]" in configuration
    file.write_text(configuration.replace("stages: [1, 2, 7, 2]", f"stages: [1, 2, 7, {call}]"))
    with pytest.raises(ValueError, match="_target_='builtins.open' is no class of sam2.modeling"):
        sam._sam2_net(str(file), 256)
    assert not mark.exists()
    file.write_text(configuration.replace("stages: [1, 2, 7, 2]", "weights_path: weights.pt"))
    with pytest.raises(ValueError, match="weights_path: name the weights with checkpoint"):
        sam._sam2_net(str(file), 256)


@pytest.mark.parametrize("content", ["", "[1]", "model: 3", "model: {", "model: !!python/object/apply:os.getcwd []"])
def test_what_is_no_configuration_is_named(content, configuration, tmp_path):
    (tmp_path / "mine.yaml").write_text(content)
    for model in (str(tmp_path / "mine.yaml"), str(tmp_path), "configs", "configs/none.yaml", "/etc/passwd"):
        with pytest.raises(ValueError, match="sam2: model=") as told:
            sam._sam2_net(model, 256)
        assert "\n" not in str(told.value)


# ---------------------------------------------------------------- images, labels, archives

def png(pixels, **options):
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG", **options)
    return stream.getvalue()


def chunks_of(data):
    "Start and length of a PNG's IDAT body."
    at = data.index(b"IDAT")
    return at + 4, int.from_bytes(data[at - 4:at])


IDS = LabelForm({i: 0 for i in range(256)})


@pytest.mark.parametrize("read", [lambda path: read_label(path, IDS), read_image])
def test_every_flipped_bit_of_a_png_is_noticed(read, tmp_path):
    data, path = png(np.arange(48, dtype=np.uint8).reshape(6, 8)), tmp_path / "a.png"
    path.write_bytes(data)
    right = read(path)
    for at in range(len(data)):
        path.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1:])
        with pytest.raises(BadFile, match="a.png: "):
            read(path)
    for length in range(len(data)):
        path.write_bytes(data[:length])
        with pytest.raises(BadFile, match="a.png: cannot be read"):
            read(path)
    path.write_bytes(data + b"and more")
    assert (read(path) == right).all()


def test_the_checksum_of_a_labels_pixels_is_checked_too(tmp_path):
    "A writer that signs damaged pixels: only zlib's own checksum can tell."
    data, path = png(np.arange(48, dtype=np.uint8).reshape(6, 8)), tmp_path / "a.png"
    start, length = chunks_of(data)
    body = data[start:start + length]
    end = bytes([body[-1] ^ 1])
    for wrong in (body[:-1] + end, body[:-4], zlib.compress(bytes(54 * 100)), zlib.compress(bytes(20))):
        crc = zlib.crc32(b"IDAT" + wrong).to_bytes(4)
        path.write_bytes(data[:start - 8] + len(wrong).to_bytes(4) + b"IDAT" + wrong + crc + data[start + length + 4:])
        with pytest.raises(BadFile, match="a.png: cannot be read"):
            read_label(path, IDS)


@pytest.mark.parametrize("mode, bits", [("1", 1), ("L", 2), ("L", 4)])
def test_grey_labels_of_few_bits_are_refused(mode, bits, tmp_path):
    path = tmp_path / "a.png"
    Image.fromarray(np.array([[0, 1], [1, 0]], np.uint8) * 255).convert(mode).save(path, "PNG")
    data = bytearray(path.read_bytes())
    if mode == "L":  # what PIL does not write itself: two pixels in a row of one byte
        rows = zlib.compress(b"".join(b"\0" + bytes([value << 4]) for value in (1, 2)))
        head = struct.pack(">IIBBBBB", 2, 2, bits, 0, 0, 0, 0)
        parts = ((b"IHDR", head), (b"IDAT", rows), (b"IEND", b""))
        data = data[:8] + b"".join(
            len(body).to_bytes(4) + kind + body + zlib.crc32(kind + body).to_bytes(4) for kind, body in parts)
    path.write_bytes(data)
    with pytest.raises(BadFile, match=f"a.png: a grey label of {bits} bits"):
        read_label(path, IDS)


def test_labels_of_a_palette_are_read_as_they_are(tmp_path):
    ids, path = np.arange(16, dtype=np.uint8).reshape(4, 4), tmp_path / "a.png"
    file = Image.fromarray(ids, "P")
    file.putpalette([255 - i for i in range(48)])
    form = LabelForm({i: i for i in range(16)})
    for options in ({}, dict(bits=4), dict(optimize=True)):
        file.save(path, "PNG", **options)
        assert (read_label(path, form) == ids).all()


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_the_number_of_pixels_is_limited_before_they_are_decoded(kind, tmp_path, monkeypatch):
    path = tmp_path / "a.png"
    Image.fromarray(np.zeros((60, 100), np.uint8)).save(path, kind)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 6000)
    assert read_image(path).shape == (60, 100, 3)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 5999)
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("decoded"))
    with warnings.catch_warnings(), pytest.raises(BadFile, match="a.png: 100x60 pixels, more than PIL.Image.MAX_IMAGE"):
        warnings.simplefilter("ignore")
        read_image(path)


def test_names_are_shown_in_one_line(tmp_path):
    for name in ("a\nb.png", "a\x1b[2Jb.png", os.fsdecode(b"a\xffb.png")):
        (tmp_path / name).write_text("none")
        with pytest.raises(BadFile) as told:
            read_image(tmp_path / name)
        assert str(told.value).isprintable() and "cannot be read" in str(told.value)


def test_what_is_no_plain_file_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "a.png")
    (tmp_path / "b.png").mkdir()
    (tmp_path / "c.png").symlink_to(tmp_path / "nowhere")
    for name in ("a.png", "b.png", "c.png"):
        with pytest.raises(BadFile, match=f"{name}: cannot be read"):
            read_image(tmp_path / name)
    os.mkfifo(tmp_path / "d.zip")
    assert list_files(tmp_path, "images") is None


def test_links_in_circles_are_walked_once(tmp_path):
    base = tmp_path / "set" / "images"
    (base / "ulm").mkdir(parents=True)
    (base / "ulm" / "a.png").touch()
    for name, to in (("up", base), ("top", tmp_path), ("again", base / "ulm"), ("other", tmp_path / "elsewhere")):
        (base / name).symlink_to(to)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "b.png").touch()
    (tmp_path / "elsewhere" / "back").symlink_to(base)
    (tmp_path / "elsewhere" / "round").symlink_to(tmp_path / "elsewhere")
    found = sorted(str(path.relative_to(base)) for path in list_files(tmp_path / "set", "images", deep=True))
    assert found == ["other/b.png", "ulm/a.png"]


def packed(path, content=b"x" * 1000, method=zipfile.ZIP_DEFLATED):
    with zipfile.ZipFile(path, "w", method) as file:
        file.writestr("images/a.png", content)
    return bytearray(path.read_bytes())


@pytest.mark.parametrize("fault", ["damaged", "encrypted", "method", "bomb", "gone", "header"])
def test_members_of_strange_archives_are_named(fault, tmp_path, monkeypatch):
    path = tmp_path / f"{fault}.zip"
    data = packed(path)
    local, central = data.index(b"PK\x03\x04"), data.index(b"PK\x01\x02")
    if fault == "damaged": data[local + 30 + len("images/a.png") + 2] ^= 255
    if fault == "encrypted": data[local + 6] = data[central + 8] = 1
    if fault == "method": data[local + 8] = data[central + 10] = 99
    if fault == "header": data[local] = 0
    if fault == "bomb": monkeypatch.setattr(files, "MOST_BYTES", 999)
    path.write_bytes(data)
    member, = list_files(tmp_path, "images")
    if fault == "gone": member = member._replace(inside="images/b.png")
    with pytest.raises(BadFile, match=rf"{fault}.zip/images/.\.png: cannot be read") as told:
        read_image(member)
    assert "\n" not in str(told.value)


def test_an_archive_of_any_damage_is_named(tmp_path):
    data, path = bytes(packed(tmp_path / "a.zip")), tmp_path / "a.zip"
    rng, refused = random.Random(0), 0
    for turn in range(150):
        bad = bytearray(data)
        for _ in range(rng.choice((1, 3))): bad[rng.randrange(len(bad))] = rng.randrange(256)
        path.write_bytes(bad[:rng.randrange(len(bad))] if turn % 3 == 0 else bad)
        os.utime(path, ns=(turn, turn))
        files._ARCHIVES.clear()
        try:
            for member in list_files(tmp_path, "images") or []: read_bytes(member)
        except BadFile as error:
            refused += 1
            assert "a.zip" in str(error) and str(error).isprintable()
    assert refused > 30


# ---------------------------------------------------------------- proposals

@pytest.fixture
def kept(tmp_path):
    "Two scenes and their proposals."
    scenes = open_dataset("scenes", "val", count=2, size=(32, 48))
    make_proposals(scenes, "instances", tmp_path / "store", reduction=2)
    return scenes, tmp_path / "store"


def test_a_flipped_bit_in_proposals_is_noticed_and_mended(kept):
    scenes, root = kept
    file = root / "000001.safetensors"
    good, right = file.read_bytes(), read_proposals(file)
    store = make_proposals(scenes, "instances", root, reduction=2)
    assert file.read_bytes() == good, "nothing is made again"
    for at in (len(good) - 1, len(good) // 2, good.index(b"day_"), good.index(b"sha256")):
        file.write_bytes(good[:at] + bytes([good[at] ^ 1]) + good[at + 1:])
        with pytest.raises(ValueError, match="000001.safetensors.*make_proposals again"):
            store[1]
        with pytest.warns(UserWarning, match="000001.safetensors.*computing it again"):
            make_proposals(scenes, "instances", root, reduction=2)
        assert torch.equal(store[1].bits, right.bits) and torch.equal(store[1].boxes, right.boxes)


@pytest.mark.parametrize("change, says", [
    (dict(image_size=(64, 48)), "bits of"), (dict(image_size=(32, 47), boxes=None), "boxes of"),
    (dict(scores=torch.full((1,), 1.5)), "scores of"), (dict(scores=torch.full((1,), torch.nan)), "scores of"),
    (dict(scores=torch.ones(1, dtype=torch.float64)), "scores of"), (dict(bits=torch.ones(1, 16, 3)), "bits of"),
    (dict(boxes=torch.ones(2, 4)), "boxes of"), (dict(reduction=0), "no size"), (dict(image_size=(-1, 8)), "no size")])
def test_tensors_that_are_no_proposals_are_refused(change, says, tmp_path):
    bits, box = torch.zeros(1, 16, 3, dtype=torch.uint8), torch.tensor([[0., 0, 48, 32]])
    right = Proposals(bits, torch.ones(1), box, (32, 48), 2)
    write_proposals(tmp_path / "right", right, "x")
    assert read_proposals(tmp_path / "right").image_size == (32, 48)
    write_proposals(tmp_path / "wrong", right._replace(**{k: v for k, v in change.items() if v is not None}), "x")
    with pytest.raises(ValueError, match=f"wrong .*{says}") as told:
        read_proposals(tmp_path / "wrong")
    assert "\n" not in str(told.value)


def test_proposals_that_are_cut_while_they_are_used_end_nothing(kept):
    "They are read, not mapped: what was read stays, and the next read is refused."
    store = ProposalStore(kept[1])
    read = store[0]
    os.truncate(kept[1] / "000000.safetensors", 64)
    assert 0 <= int(read.bits.sum()) and read.boxes.isfinite().all()
    with pytest.raises(ValueError, match="000000.safetensors.*make_proposals again"):
        store[0]


def test_a_manifest_whose_key_is_not_its_own_is_refused(kept):
    file = kept[1] / "manifest.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | dict(images=1)))
    with pytest.raises(ValueError, match="manifest.json is not a manifest of proposals .its key"):
        ProposalStore(kept[1])


def test_proposals_of_another_size_are_made_again(kept):
    scenes, root = kept
    other = open_dataset("scenes", "val", count=2, size=(64, 96))
    made = make_proposals(other, "instances", root.parent / "other", reduction=2)
    key = ProposalStore(root).manifest["key"]
    write_proposals(root / "000000.safetensors", made[0], "instances", key)
    with pytest.warns(UserWarning, match=r"\(64, 96\) pixels.*is .*\(32, 48\) in cells of 2: computing it again"):
        store = make_proposals(scenes, "instances", root, reduction=2)
    assert store[0].image_size == (32, 48)


@pytest.mark.parametrize("change", [
    dict(images="2"), dict(images=-1), dict(reduction=0), dict(options=[]), dict(engine=None), dict(format="x"),
    dict(run=1)])
def test_a_manifest_of_other_types_is_refused(change, kept):
    file = kept[1] / "manifest.json"
    manifest = json.loads(file.read_text())
    less = {k: v for k, v in manifest.items() if k not in change}
    for text in (json.dumps(manifest | change), json.dumps(less), "[]"):
        if text == json.dumps(manifest): continue
        file.write_text(text)
        with pytest.raises(ValueError, match="manifest.json is not a manifest of proposals") as told:
            ProposalStore(kept[1])
        assert "\n" not in str(told.value)
