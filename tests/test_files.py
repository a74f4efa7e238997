"The ground floor: whole files, archives, checkpoints that run nothing."
import io
import json
import os
import pickle
import sys
import types
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from reinpp import files
from reinpp.files import (
    BadFile,
    Member,
    check_choice,
    data_folder,
    file_size,
    list_files,
    read_bytes,
    read_checkpoint,
    write_atomically,
    write_together,
)


def test_a_choice_is_refused_with_the_others():
    assert check_choice("head", None, (None, "fpn")) is None
    with pytest.raises(ValueError, match="^head='x' is unknown: use one of None, fpn$"):
        check_choice("head", "x", (None, "fpn"))
    with pytest.raises(ValueError, match="use one of a, b"):
        check_choice("name", ["a"], {"a": 1, "b": 2})  # what cannot be hashed, either


def test_the_data_folder_is_the_checkouts():
    assert data_folder() == Path(__file__).resolve().parent.parent / "data"


def test_sizes():
    assert [file_size(b) for b in (10, 3100, 20_400_000, 1.07e9)] == ["0.0 kB", "3.1 kB", "20.4 MB", "1.07 GB"]


# ---------------------------------------------------------------- whole files or none

def listing(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def test_files_are_written_together(tmp_path):
    write_together({tmp_path / "a" / "one": b"1", str(tmp_path / "two"): b"2"})
    write_atomically(str(tmp_path / "two"), b"3")
    assert listing(tmp_path) == ["a/one", "two"] and (tmp_path / "two").read_bytes() == b"3"


@pytest.mark.parametrize("wrong", ["text", None, 3])
def test_after_a_failing_write_everything_is_as_it_was(wrong, tmp_path):
    write_together({tmp_path / "one": b"1", tmp_path / "two": b"2"})
    with pytest.raises(TypeError):
        write_together({tmp_path / "one": b"new", tmp_path / "two": wrong, tmp_path / "three": b"3"})
    assert listing(tmp_path) == ["one", "two"] and (tmp_path / "one").read_bytes() == b"1"


def test_a_full_disk_leaves_nothing_behind(tmp_path, monkeypatch):
    write_atomically(tmp_path / "one", b"1")
    def full(number):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_atomically(tmp_path / "one", b"new")
    assert listing(tmp_path) == ["one"] and (tmp_path / "one").read_bytes() == b"1"


# ---------------------------------------------------------------- archives

def test_members_answer_like_paths(tmp_path):
    with zipfile.ZipFile(tmp_path / "set.zip", "w") as archive:
        for name in ("images/val/a_1.png", "images/val/ulm/b.png", "images/val/", "other.txt"):
            archive.writestr(name, name.encode())
    (flat,) = list_files(tmp_path, "images/val")
    assert (flat.name, flat.stem, flat.suffix) == ("a_1.png", "a_1", ".png")
    assert read_bytes(flat) == b"images/val/a_1.png"
    assert str(flat) == f"{tmp_path}/set.zip/images/val/a_1.png" and flat == Member(tmp_path / "set.zip", flat.inside)
    assert len(list_files(tmp_path, "images/val", deep=True)) == 2 and list_files(tmp_path, "labels") is None
    (tmp_path / "images" / "val" / "deeper").mkdir(parents=True)
    (tmp_path / "images" / "val" / "deeper" / "c.png").write_bytes(b"unpacked")
    assert list_files(tmp_path, "images/val") == [], "a folder comes before an archive"
    (deep,) = list_files(tmp_path, "images/val", deep=True)
    assert read_bytes(deep) == b"unpacked"
    (tmp_path / "broken.zip").write_bytes(b"no archive")
    with pytest.raises(BadFile, match="broken.zip: cannot be read as a zip archive.*download it again"):
        list_files(tmp_path, "labels")


# ---------------------------------------------------------------- checkpoints

def foreign(package):
    "An instance whose class a pickle looks for in `package`."
    kind = type("MessageHub", (), {"__module__": f"{package}.logging"})
    module = types.ModuleType(f"{package}.logging")
    module.MessageHub = kind
    return kind(), {package: types.ModuleType(package), f"{package}.logging": module}


def save_foreign(package, path, monkeypatch):
    hub, modules = foreign(package)
    hub.history = [1.0, 2.0]
    with monkeypatch.context() as patched:
        for name, module in modules.items():
            patched.setitem(sys.modules, name, module)
        torch.save({"state_dict": {"a": torch.ones(2)}, "message_hub": hub}, path)


def test_known_objects_become_placeholders(tmp_path, monkeypatch):
    save_foreign("mmengine", tmp_path / "mm.pth", monkeypatch)
    assert "mmengine" not in sys.modules
    assert read_checkpoint(tmp_path / "mm.pth")["a"].tolist() == [1, 1]
    torch.save({"model": {"a": torch.ones(2)}, "random": np.random.RandomState(0).get_state(), "best": np.float64(0.5)},
               tmp_path / "np.pth")
    assert read_checkpoint(tmp_path / "np.pth").keys() == {"a"}


def test_tensors_that_lie_among_others_are_named(tmp_path):
    torch.save(dict(run=dict(teacher=dict(a=torch.ones(2)), steps=3), b=torch.zeros(1)), tmp_path / "run.pt")
    assert read_checkpoint(tmp_path / "run.pt", ("run", "teacher"))["a"].tolist() == [1, 1]
    for wrong in (("run",), ("run", "student"), ("b", "a"), ("run", "steps")):
        with pytest.raises(ValueError, match=f"run.pt: holds no {'.'.join(wrong)} of tensors"):
            read_checkpoint(tmp_path / "run.pt", wrong)


def test_other_objects_are_refused_and_run_nothing(tmp_path, monkeypatch):
    save_foreign("othertool", tmp_path / "other.pth", monkeypatch)
    with pytest.raises(ValueError, match=r"other.pth: not loaded.*could be code.*othertool\.logging"):
        read_checkpoint(tmp_path / "other.pth")

    class Runs:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path}/ran",)

    torch.save({"a": torch.ones(1), "hook": Runs()}, tmp_path / "bad.pth")
    (tmp_path / "plain.pth").write_bytes(pickle.dumps(Runs(), protocol=2))
    for name in ("bad.pth", "plain.pth"):
        with pytest.raises(ValueError, match=f"{name}: "):
            read_checkpoint(tmp_path / name)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name, content, message", [
    ("cut.pth", None, ": .*damaged"),
    ("empty.pth", b"", ": .*damaged"),
    ("text.safetensors", b"hello", ": .*damaged or of another kind.*fetch it again"),
    ("model.index.json", b"{", " is damaged .*: fetch or make it again"),
    ("other.index.json", b'{"no": "map"}', ": .*damaged or of another kind"),
])
def test_damaged_checkpoints_are_refused(name, content, message, tmp_path):
    if content is None:
        buffer = io.BytesIO()
        torch.save({"a": torch.ones(1000)}, buffer)
        content = buffer.getvalue()[:-500]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=name + message):
        read_checkpoint(tmp_path / name)


def test_a_bit_flipped_in_a_packed_checkpoint_is_noticed(tmp_path):
    "By the archive's own checksums, at which torch does not look."
    torch.save({"a": torch.ones(1000)}, tmp_path / "a.pth")
    whole = (tmp_path / "a.pth").read_bytes()
    at = whole.index(torch.ones(8).numpy().tobytes())
    (tmp_path / "a.pth").write_bytes(whole[:at + 9] + bytes([whole[at + 9] ^ 1]) + whole[at + 10:])
    assert not torch.equal(torch.load(tmp_path / "a.pth", weights_only=True)["a"], torch.ones(1000))
    with pytest.raises(ValueError, match="a.pth: this checkpoint is damaged.*the checksum of .* is wrong"):
        read_checkpoint(tmp_path / "a.pth")


def test_what_holds_no_tensors_is_refused(tmp_path):
    torch.save({"state_dict": {}}, tmp_path / "a.pth")
    torch.save([torch.ones(1)], tmp_path / "b.pth")
    torch.save({"epoch": 3}, tmp_path / "c.pth")
    for name in "abc":
        with pytest.raises(ValueError, match=f"{name}.pth: holds no state_dict of tensors"):
            read_checkpoint(tmp_path / f"{name}.pth")


def test_folders_and_shards(tmp_path):
    with pytest.raises(FileNotFoundError, match="no .index.json"):
        read_checkpoint(tmp_path)
    with pytest.raises(FileNotFoundError, match="none.pth: no such file"):
        read_checkpoint(tmp_path / "none.pth")
    save_file({"a": torch.zeros(1)}, tmp_path / "one.safetensors")
    assert read_checkpoint(tmp_path).keys() == {"a"}
    save_file({"b": torch.ones(1)}, tmp_path / "two.safetensors")
    with pytest.raises(ValueError, match="several checkpoints .one.safetensors, two.safetensors"):
        read_checkpoint(tmp_path)
    index = {"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert {name: t.item() for name, t in read_checkpoint(tmp_path).items()} == {"a": 0, "b": 1}
    (tmp_path / "two.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="two.safetensors: no such file"):
        read_checkpoint(tmp_path)
