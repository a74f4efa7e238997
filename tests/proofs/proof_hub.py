"""A hub that answers with other names, sizes and contents than were asked for: a local one, on loopback.

What does not fit is refused in one line; nothing is fetched but the files that were asked for, nothing is written
outside the cache, and nothing that was fetched is run. Not a part of `make test`: `make proofs`."""

import hashlib
import http.server
import io
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from noted import note
from safetensors.torch import save
from test_hostile_files import Planted

from reinpp.models.adapter_files import SETTINGS, WEIGHTS
from reinpp.models.segmenter import tiny_segmenter

BACKBONE = "test_vit.r160_in1k"  # 0.4 M parameters


class Hub(http.server.ThreadingHTTPServer):
    "A hub whose repositories all hold the same `files` {name: bytes}; what it lists, and what it says about them."
    def __init__(self):
        super().__init__(("127.0.0.1", 0), Answer)
        threading.Thread(target=self.serve_forever, daemon=True).start()
        self.hold("", {})

    def hold(self, case, files, listed=(), headers={}):
        self.commit, self.asked = hashlib.sha1(case.encode()).hexdigest(), []
        self.files, self.listed, self.headers = files, listed or list(files), headers


class Answer(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments): pass

    def do_HEAD(self): self.answer(False)

    def do_GET(self): self.answer(True)

    def answer(self, whole):
        hub, path = self.server, self.path.partition("?")[0]
        hub.asked.append(path)
        name = asked_file(path)
        if "/tree/" in path: found = [dict(type="file", path=n, size=3, oid="0" * 40) for n in hub.listed]
        else: found = dict(id="a/b", sha=hub.commit, siblings=[dict(rfilename=n) for n in hub.listed])
        data = hub.files.get(name) if name else json.dumps(found).encode()
        self.send_response(404 if data is None else 200)
        data = data or b""
        said = {"Content-Length": len(data), "X-Repo-Commit": hub.commit, "Content-Type": "application/json",
                "ETag": f'"{hashlib.sha1(data).hexdigest()}"'} | (hub.headers if name else {})
        for key, value in said.items(): self.send_header(key, str(value))
        self.end_headers()
        if whole: self.wfile.write(data)
        self.close_connection = True


def asked_file(path):
    "The file of a repository that a request is for, if it is for one."
    return path.partition("/resolve/")[2].partition("/")[2]


CODE = """
import json, sys
from reinpp.models.adapter_files import pull_adapter
from reinpp.models.backbones import create_backbone
from reinpp.models.segmenter import load_segmenter
for line in sys.stdin:
    what, name = json.loads(line)
    try:
        if what == "adapter": load_segmenter(pull_adapter(name))
        else: create_backbone(name, 64)
        said = "taken"
    except (ValueError, OSError) as error: said = f"refused: {error}"
    except BaseException as error: said = f"{type(error).__name__}: {error}"
    print(json.dumps(said), flush=True)
"""


class Client:
    "A process of its own, which is told that `hub` is the hub."
    def __init__(self, folder):
        self.hub, self.folder, work = Hub(), folder, folder / "work"
        environment = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGINGFACE"))}
        environment |= dict(HF_ENDPOINT=f"http://127.0.0.1:{self.hub.server_address[1]}", HF_HOME=str(folder / "hf"),
            HF_HUB_DISABLE_XET="1", HF_HUB_ETAG_TIMEOUT="5", HF_HUB_DOWNLOAD_TIMEOUT="5", NO_PROXY="127.0.0.1",
            HOME=str(folder / "home"))
        work.mkdir()
        self.process = subprocess.Popen([sys.executable, "-c", CODE], cwd=work, env=environment, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)

    def take(self, what, name):
        "What it says, the files that it asked for, and those that it wrote outside its cache."
        print(json.dumps((what, name)), file=self.process.stdin, flush=True)
        said = json.loads(self.process.stdout.readline())
        outside = [p for p in self.folder.rglob("*") if p.is_file() and not p.is_relative_to(self.folder / "hf")]
        return said, {file for path in self.hub.asked if (file := asked_file(path))}, outside


@pytest.fixture(scope="module")
def client(tmp_path_factory):
    made = Client(tmp_path_factory.mktemp("client"))
    yield made
    made.process.stdin.close()
    made.process.wait()
    made.hub.shutdown()


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    torch.manual_seed(0)
    folder = tiny_segmenter(num_classes=3).save_adapter(tmp_path_factory.mktemp("adapter"))
    return {name: (folder / name).read_bytes() for name in (SETTINGS, WEIGHTS)}


def planted(mark):
    stream = io.BytesIO()
    torch.save({"x": Planted(mark)}, stream)
    return stream.getvalue()


CASES = {  # name -> (the files, given a good adapter and a mark; what is listed; what is said about each)
    "as it should be": (lambda good, mark: good, (), {}),
    "more files, some with ../": (
        lambda good, mark: good | {"pytorch_model.bin": planted(mark), "run.py": b"1", "../../evil": b"1"},
        (SETTINGS, WEIGHTS, "pytorch_model.bin", "run.py", "../../evil", "/evil", "..\\evil", f"../{WEIGHTS}"), {}),
    "names that lead elsewhere": (
        lambda good, mark: good, (f"../../{SETTINGS}", f"/{WEIGHTS}", f"a/../../{SETTINGS}"), {}),
    "other names": (lambda good, mark: {"other.json": b"{}"}, (), {}),
    "shorter than it says": (lambda good, mark: good | {WEIGHTS: good[WEIGHTS][:-100]}, (), {}),
    "a length that is not its own": (lambda good, mark: good, (), {"Content-Length": 100}),
    "a length that never comes": (lambda good, mark: good, (), {"Content-Length": 10**9}),
    "settings of another adapter": (
        lambda good, mark: good | {SETTINGS: good[SETTINGS].replace(b'"num_classes": 3', b'"num_classes": 4')}, (), {}),
    "settings that name an address": (
        lambda good, mark: good | {SETTINGS: good[SETTINGS].replace(b'"tiny"', b'"hf-hub:a/b"')}, (), {}),
    "a pickle under the name of the weights": (lambda good, mark: good | {WEIGHTS: planted(mark)}, (), {}),
    "a page of text": (lambda good, mark: dict.fromkeys(good, b"<html>log in</html>"), (), {}),
    "nothing": (lambda good, mark: {}, (), {})}


@pytest.mark.parametrize("case", CASES)
def test_an_adapter_from_a_hub(case, adapter, client, tmp_path):
    change, listed, headers = CASES[case]
    client.hub.hold(case, change(adapter, tmp_path / "it ran"), listed, headers)
    said, asked, outside = client.take("adapter", f"a/b{list(CASES).index(case)}")
    elsewhere = asked - {SETTINGS, WEIGHTS, "README.md"}
    right = case in ("as it should be", "more files, some with ../")
    wrong = int(not said.startswith("taken" if right else "refused") or "\n" in said)
    note(**{f"a hub, an adapter: {case}": dict(requests=len(client.hub.asked), refused=int(not right and not wrong),
        fetched_elsewhere=len(elsewhere), written_outside=len(outside), accepted=wrong)})
    assert not wrong, said
    assert not elsewhere and not outside and not (tmp_path / "it ran").exists()


WEIGHTS_OF = {  # name -> the repository's files, given a mark
    "no weights": lambda mark: {},
    "tensors of another model": lambda mark: {"model.safetensors": save({"x": torch.zeros(3)})},
    "no safetensors": lambda mark: {"model.safetensors": b"\x10\0\0\0\0\0\0\0<html>"},
    "a pickle under the name of safetensors": lambda mark: {"model.safetensors": planted(mark)},
    "a planted pickle": lambda mark: {"pytorch_model.bin": planted(mark)}}


@pytest.mark.parametrize("case", WEIGHTS_OF)
def test_a_backbone_from_a_hub(case, client, tmp_path):
    client.hub.hold(case, WEIGHTS_OF[case](tmp_path / "it ran"))
    said, _, outside = client.take("backbone", BACKBONE)
    elsewhere = {p for p in client.hub.asked if asked_file(p) and not p.startswith(f"/timm/{BACKBONE}/resolve/")}
    accepted = int(not said.startswith("refused") or "\n" in said)
    note(**{f"a hub, a backbone: {case}": dict(requests=len(client.hub.asked), refused=1 - accepted,
        fetched_elsewhere=len(elsewhere), written_outside=len(outside), accepted=accepted)})
    assert not accepted and BACKBONE in said, said
    assert not elsewhere and not outside and not (tmp_path / "it ran").exists()


def test_the_plant_is_a_real_one(tmp_path):
    (tmp_path / "a.pt").write_bytes(planted(tmp_path / "it ran"))
    torch.load(tmp_path / "a.pt", weights_only=False)
    assert Path(tmp_path / "it ran").exists()
