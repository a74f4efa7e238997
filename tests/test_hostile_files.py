"Files that are not what their names say are refused, in one line that names them."
import contextlib
import io
import json
import pickle
import re
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from reinpp.adaptation import sam
from reinpp.adaptation.sam import SAM2
from reinpp.data.datasets import LabelForm, read_image, read_label
from reinpp.files import BadFile
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
