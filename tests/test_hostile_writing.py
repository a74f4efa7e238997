"Nothing lost: saves that are killed half way, full disks, what was left aside; weights that are what they say."
import errno
import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file

import reinpp.files as files
from reinpp.files import read_checkpoint, write_atomically, write_together
from reinpp.models import adapter_files, backbones
from reinpp.models.adapter_files import BEFORE, SETTINGS, WEIGHTS, read_adapter, write_adapter

CONFIG = dict(
    backbone="tiny", adapter="rein_g", head="semantic_fpn", num_classes=3, image_size=64, backbone_args={},
    adapter_args=dict(rank=4), head_args=dict(hidden_dim=32), normalization="own")


def state(value): return {"adapter.scale": torch.tensor(float(value)), "head.x": torch.full((4,), float(value))}


@pytest.mark.parametrize("links", [True, False])
@pytest.mark.parametrize("step", range(1, 11))
def test_a_save_that_is_killed_anywhere_leaves_one_whole_adapter(step, links, tmp_path, monkeypatch):
    "Again and again: every start finds the last adapter, or the one before it."
    write_adapter(tmp_path, state(0), CONFIG)
    if not links: monkeypatch.setattr(os, "link", lambda *_: (_ for _ in ()).throw(OSError(errno.EPERM, "no links")))
    class Killed(BaseException): pass
    for value in range(1, 5):
        left = step
        def counted(real):
            def call(*arguments, **options):
                nonlocal left
                left -= 1
                if left <= 0: raise Killed  # from here on nothing more is done, no tidying either
                return real(*arguments, **options)
            return call
        before = float(read_adapter(tmp_path)[1]["adapter.scale"])
        with monkeypatch.context() as patch:
            for name in ("replace", "link", "unlink", "fsync"):
                patch.setattr(os, name, counted(getattr(os, name)))
            try:
                write_adapter(tmp_path, state(value), CONFIG, record=dict(value=value))
                done = True
            except Killed: done = False
        config, found = read_adapter(tmp_path)
        assert float(found["adapter.scale"]) in ((value,) if done else (before, value))
        assert config["record"].get("value", 0) == float(found["adapter.scale"]) == float(found["head.x"][0])
    write_adapter(tmp_path, state(9), CONFIG)
    assert sorted(f.name for f in tmp_path.iterdir() if f.suffix != ".tmp") == [SETTINGS, WEIGHTS]


def test_older_weights_are_no_excuse_for_damage(tmp_path):
    write_adapter(tmp_path, state(0), CONFIG)
    (tmp_path / BEFORE).write_bytes(b"other")
    (tmp_path / WEIGHTS).write_bytes((tmp_path / WEIGHTS).read_bytes()[:-1])
    with pytest.raises(ValueError, match=f"{WEIGHTS} is truncated or was altered"):
        read_adapter(tmp_path)


def test_a_full_disk_is_named_with_the_file(tmp_path, monkeypatch):
    write_atomically(tmp_path / "record.json", b"old")
    def full(descriptor): raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left on device.*record.json"):
        write_atomically(tmp_path / "record.json", b"new")
    assert [f.name for f in tmp_path.iterdir()] == ["record.json"]
    assert (tmp_path / "record.json").read_bytes() == b"old"


def test_what_a_killed_process_left_aside_is_removed_at_the_next_write(tmp_path):
    code = ("import os, sys, signal; from reinpp.files import write_together\n"
            "os.fsync = lambda descriptor: os.kill(os.getpid(), signal.SIGKILL)\n"
            "write_together({sys.argv[1]: b'half'})")
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "a[1].pt")], check=False)
    left, = tmp_path.iterdir()
    assert left.name.startswith(".a[1].pt.") and left.name.endswith(".tmp")
    other = tmp_path / f".a[1].pt.{files._MACHINE}-{os.getpid()}.12345678.tmp"  # of a process that is alive
    elsewhere, old = tmp_path / ".a[1].pt.elsewhere-1.12345678.tmp", tmp_path / ".a[1].pt.elsewhere-2.12345678.tmp"
    for file in (other, elsewhere, old): file.touch()
    os.utime(old, (0, 0))
    write_together({tmp_path / "a[1].pt": b"whole"})
    assert {f.name for f in tmp_path.iterdir()} == {"a[1].pt", other.name, elsewhere.name}


@pytest.mark.parametrize("shard", [
    "/etc/passwd", "../a.safetensors", "sub/a.safetensors", "..", "", "model.safetensors.index.json", "sub", 3, None,
    "..\\a.safetensors"])
def test_shards_lie_beside_their_index(shard, tmp_path):
    (tmp_path / "in" / "sub").mkdir(parents=True)
    for place in (tmp_path, tmp_path / "in", tmp_path / "in" / "sub"):
        save_file({"a": torch.zeros(1)}, place / "a.safetensors")
    index = tmp_path / "in" / "model.safetensors.index.json"
    index.write_text(json.dumps(dict(weight_map=dict(a="a.safetensors"))))
    assert list(read_checkpoint(index)) == ["a"]
    index.write_text(json.dumps(dict(weight_map=dict(a=shard))))
    with pytest.raises(ValueError, match="index.json: this checkpoint is damaged") as told:
        read_checkpoint(index)
    assert "\n" not in str(told.value)


def test_the_bundled_backbone_is_known_by_its_sha256(tmp_path, monkeypatch):
    data = (files.data_folder() / "weights" / "tiny.safetensors").read_bytes()
    (tmp_path / "weights").mkdir()
    file = tmp_path / "weights" / "tiny.safetensors"
    file.write_bytes(data)
    monkeypatch.setattr(backbones, "data_folder", lambda: tmp_path)
    right = backbones.create_backbone("tiny", 64)
    file.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    os.utime(file, (1, 1))
    with pytest.raises(ValueError, match="tiny.safetensors is damaged or another file.*from the repository again"):
        backbones.create_backbone("tiny", 64)
    own = backbones.create_backbone("tiny", 64, weights=file)
    assert any(not torch.equal(a, b) for a, b in zip(own.state_dict().values(), right.state_dict().values()))
    assert adapter_files.BACKBONES is backbones.BACKBONES
