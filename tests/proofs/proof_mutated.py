"""More than ten thousand damaged and altered files, through every reader. Not a part of `make test`: `make proofs`.

Each is refused in one line, or read as the whole one was. Where a checksum seals a file, no other content may come out
of it; a text that anybody may write (a log, a table) may say something else, and is counted. A reader works in a forked
child: one that dies, or that works for longer than 30 seconds, is seen. Bytes are changed by numbers from a seed,
structured texts by hypothesis."""

import contextlib
import hashlib
import io
import json
import os
import random
import signal
import time
import traceback
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings, strategies
from noted import note
from PIL import Image
from safetensors.torch import save_file
from test_adapt import page
from test_hostile_adapters import mutated, signed

import reinpp.files as files
import reinpp.models.backbones as backbones
from reinpp.adaptation import sam
from reinpp.adaptation.proposals import ProposalStore, check_proposals, make_proposals
from reinpp.data.catalog import open_dataset
from reinpp.data.check import check
from reinpp.data.cityscapes_c import read_manifest
from reinpp.data.datasets import LabelForm, read_image, read_label
from reinpp.data.sampling import class_statistics
from reinpp.files import read_checkpoint
from reinpp.models.adapter_files import SETTINGS, WEIGHTS, read_adapter
from reinpp.models.export import export, load_program
from reinpp.models.segmenter import load_segmenter, tiny_segmenter
from reinpp.paper.experiments import Ledger
from reinpp.paper.launch import Lease
from reinpp.prediction import read_use
from reinpp.training.run_folder import RunFolder, read_log
from reinpp.watch import headline

LONGEST = 30  # seconds that a reader may take
torch.set_num_threads(1)


class Hang(BaseException):
    "A reader that takes too long."


# ---------------------------------------------------------------- what is done to a file

def damaged(data: bytes, draw: random.Random) -> bytes:
    "Bits and bytes changed, cut, taken out, put in, doubled, exchanged: one to three times."
    for _ in range(draw.choice((1, 1, 1, 2, 3))):
        at, data = draw.randrange(len(data) + 1), bytearray(data)
        length = min(draw.choice((1, 2, 4, 16, 256)), len(data) - at)
        how = draw.randrange(8)
        if how < 3 and at < len(data): data[at] ^= 1 << draw.randrange(8)
        elif how == 3 and at < len(data): data[at] = draw.choice((0, 255, 34, 44, 45, 47, 92, 48 + draw.randrange(10)))
        elif how == 4: data[at:draw.choice((at + length, len(data)))] = b""
        elif how == 5: data[at:at] = draw.randbytes(length or 1)
        elif how == 6: data[at:at] = data[at:at + length]
        else: data[at:at + length] = data[:length]
    return bytes(data)


ODD = (None, True, False, -1, 0, 1, 2, 3, 7, 64, 255, 2**16, 2**31, 2**40, 10**30, -0.5, 0.1, 1e308, float("nan"),
       float("inf"), "", "tiny", "../..", "/etc/passwd", "x" * 10_000, "\n\x00é", "1", [], [1], [[]], {},
       {"a": {"b": 1}})


def altered(value: Any, draw: random.Random) -> Any:
    "A JSON value in which one thing is exchanged, taken out, added or moved a little."
    if isinstance(value, dict) and value and draw.random() < 0.9:
        key, how = draw.choice(list(value)), draw.random()
        if how < 0.1: return {k: v for k, v in value.items() if k != key}
        if how < 0.2: return value | {draw.choice((*map(str, value), "more", "__class__", "")): draw.choice(ODD)}
        return value | {key: altered(value[key], draw)}
    if isinstance(value, list) and value and draw.random() < 0.8:
        at, how = draw.randrange(len(value)), draw.random()
        if how < 0.1: return value[:at] + value[at + 1:]
        if how < 0.2: return value[:at] + [draw.choice(ODD)] + value[at:]
        return value[:at] + [altered(value[at], draw)] + value[at + 1:]
    if type(value) in (int, float) and draw.random() < 0.3: return value + draw.choice((-1, 1, 0.5, 1000))
    if isinstance(value, str) and value and draw.random() < 0.3:
        at = draw.randrange(len(value))
        return value[:at] + draw.choice("aZ0./\\\n é") + value[at + 1:]
    return draw.choice(ODD)


def altered_json(data: bytes, draw: random.Random) -> bytes:
    "Half of the time its bytes, else one to three of its values."
    if draw.random() < 0.5: return damaged(data, draw)
    value = json.loads(data)
    for _ in range(draw.choice((1, 1, 2, 3))): value = altered(value, draw)
    return json.dumps(value).encode()


def altered_lines(data: bytes, draw: random.Random) -> bytes:
    "Lines of JSON: one of them altered, doubled or moved."
    if draw.random() < 0.5: return damaged(data, draw)
    lines = data.splitlines()
    at, how = draw.randrange(len(lines)), draw.random()
    if how < 0.6: lines[at] = json.dumps(altered(json.loads(lines[at]), draw)).encode()
    elif how < 0.8: lines.insert(at, lines[draw.randrange(len(lines))])
    else: lines.append(lines.pop(at))
    return b"\n".join(lines) + b"\n"


# ---------------------------------------------------------------- what is read, and how

class Reader(NamedTuple):
    "A kind of file, and the package's reader of it."
    make: Callable  # folder -> the file that is altered, whole
    read: Callable  # file -> what is in it
    change: Callable = damaged  # (bytes, random numbers) -> other bytes
    count: int = 400  # files
    sealed: bool = False  # a checksum covers all that is read
    changes_file: bool = True  # False: `change` is given the file's path, and does all by itself


READERS: dict[str, Reader] = {}


def tiny(): return tiny_segmenter(num_classes=5, head_args=dict(encoder_layers=1, decoder_layers=1))


def adapter(file):
    def make(folder): return tiny().save_adapter(folder / "adapter", record=dict(iterations=3)) / file
    return make


def resigned(file, draw):
    "Settings altered, and both files made to belong together, as somebody who means harm would."
    segmenter = tiny()
    signed(file.parent, mutated(segmenter.config, draw), segmenter.trained_state())


def whole_segmenter(file):
    segmenter = load_segmenter(file.parent, pretrained=False)
    return segmenter.config, segmenter.trained_state()


def without_record(file):
    "What is sealed of an adapter's settings; how it was trained is a text beside them."
    config, state = read_adapter(file.parent)
    return config | dict(record=None), state


READERS["adapter, settings"] = Reader(adapter(SETTINGS), without_record, altered_json, 800, sealed=True)
READERS["adapter, tensors"] = Reader(adapter(WEIGHTS), lambda file: read_adapter(file.parent), count=800, sealed=True)
READERS["adapter, settings signed anew"] = Reader(
    adapter(SETTINGS), whole_segmenter, resigned, 200, changes_file=False)


def use(folder):
    file = adapter(SETTINGS)(folder).with_name("use.json")
    said = dict(classes=["a", "b", "c", "d", "e"], colours=[[i, i, i] for i in range(5)], window=64, stride=43)
    file.write_text(json.dumps(said | dict(fit=[512, 256])))
    return file


SEGMENTER = tiny()
READERS["how an adapter is used"] = Reader(use, lambda file: read_use(file.parent, SEGMENTER), altered_json, 500)


def run_checkpoint(folder):
    layer = torch.nn.Linear(4, 3)
    run = RunFolder(folder, layer, torch.optim.AdamW(layer.parameters()), dict(iterations=9), 10, None, 1)
    run.lock, run.done = None, 4
    run.start = time.perf_counter()
    run.save()
    return folder / "checkpoint.pt"


def resumed(file):
    layer = torch.nn.Linear(4, 3)
    run = RunFolder(file.parent, layer, torch.optim.AdamW(layer.parameters()), dict(iterations=9), 10, None, 1)
    run.resume(torch.device("cpu"))
    return run.done, layer.state_dict()


READERS["checkpoint of a run"] = Reader(run_checkpoint, resumed, count=600, sealed=True)


def checkpoint(name, write):
    def make(folder):
        file, tensors = folder / name, dict(a=torch.arange(12.).reshape(3, 4), b=torch.ones(5, dtype=torch.float16))
        write(tensors, file)
        return file
    return make


def plain_pickle(tensors, file): torch.save(tensors, file, _use_new_zipfile_serialization=False)


READERS["checkpoint from elsewhere, zip"] = Reader(checkpoint("a.pth", torch.save), read_checkpoint, count=600)
READERS["checkpoint from elsewhere, pickle"] = Reader(checkpoint("a.bin", plain_pickle), read_checkpoint, count=600)
READERS["checkpoint from elsewhere, safetensors"] = Reader(
    checkpoint("a.safetensors", save_file), read_checkpoint, count=600)


def shard_index(folder):
    for name in ("one", "two"): save_file({name: torch.ones(3)}, folder / f"{name}.safetensors")
    file = folder / "model.safetensors.index.json"
    file.write_text(json.dumps(dict(weight_map=dict(one="one.safetensors", two="two.safetensors"))))
    return file


READERS["index of shards"] = Reader(shard_index, read_checkpoint, altered_json, 600)


def bundled(folder):
    "The bundled backbone, copied to where the package is told that its data are."
    file = folder / "weights" / "tiny.safetensors"
    file.parent.mkdir()
    file.write_bytes((files.data_folder() / "weights" / "tiny.safetensors").read_bytes())
    return file


def bundled_backbone(file):
    os.utime(file, ns=(time.time_ns(),) * 2)
    backbones.data_folder = lambda: file.parents[1]
    return backbones.create_backbone("tiny", 64).state_dict()


READERS["bundled weights"] = Reader(bundled, bundled_backbone, count=100, sealed=True)


def picture(name, mode, **options):
    def make(folder):
        pixels = np.random.default_rng(0).integers(0, 19, (24, 32, 3 if mode == "RGB" else 1), dtype=np.uint8).squeeze()
        Image.fromarray(pixels, mode).save(folder / name, **options)
        return folder / name
    return make


def deep_label(folder):
    import cv2
    pixels = np.random.default_rng(0).integers(0, 19, (24, 32, 3), dtype=np.uint16)
    cv2.imwrite(str(folder / "a.png"), pixels)
    return folder / "a.png"


IDS, DEEP = LabelForm({i: i for i in range(19)}), LabelForm({i: i for i in range(19)}, deep=True)
READERS["image, PNG"] = Reader(picture("a.png", "RGB"), read_image, count=800, sealed=True)
READERS["image, JPEG (no checksum)"] = Reader(picture("a.jpg", "RGB"), read_image, count=600)
READERS["label, PNG of 8 bits"] = Reader(picture("a.png", "L"), lambda f: read_label(f, IDS), count=800, sealed=True)
READERS["label, PNG of 16 bits"] = Reader(deep_label, lambda f: read_label(f, DEEP), count=600, sealed=True)


def archive(folder):
    file = folder / "a.zip"
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as packed:
        for part, mode in (("images", "RGB"), ("labels", "L")):
            for k in range(2):
                stream = io.BytesIO()
                Image.fromarray(np.full((8, 9, 3) if mode == "RGB" else (8, 9), k, np.uint8), mode).save(stream, "PNG")
                packed.writestr(f"{part}/{k}.png", stream.getvalue())
    return file


def archived(file):
    files._ARCHIVES.clear()
    files._names.cache_clear()
    dataset = open_dataset("gtav", "train", file.parent)
    return [dataset[i] for i in range(len(dataset))]


READERS["zip archive of images and labels"] = Reader(archive, archived, count=800, sealed=True)


def configuration(folder):
    package = pytest.importorskip("sam2")
    file = folder / "mine.yaml"
    file.write_text(Path(package.__path__[0], sam.SAM2["tiny"][0]).read_text())
    return file


def named(file): return [(name, tuple(p.shape)) for name, p in sam._sam2_net(str(file), 256).named_parameters()]


READERS["SAM 2 configuration, YAML"] = Reader(configuration, named, count=80)


def program(folder):
    with contextlib.redirect_stdout(io.StringIO()):
        export(tiny_segmenter("freeze", "semantic_fpn", num_classes=3), folder / "a.pt2")
    return folder / "a.pt2"


def scores(file): return load_program(file)(torch.linspace(0, 1, 3 * 64 * 64).reshape(1, 3, 64, 64))


READERS["exported program, .pt2"] = Reader(program, scores, count=120, sealed=True)


def record(folder):
    source = sorted((files.data_folder() / "results").glob("*.json"))[0]
    file = folder / source.name
    file.write_bytes(source.read_bytes())
    return file


READERS["record of the ledger"] = Reader(record, lambda file: Ledger(file.parent).all(), altered_json, 800)


def store(folder):
    make_proposals(open_dataset("scenes", "val", count=2, size=(32, 48)), "instances", folder / "store", reduction=2)
    return folder / "store" / "000001.safetensors"


def all_of(file):
    kept = ProposalStore(file.parent)
    return [kept[i] for i in range(2)], kept.manifest


READERS["proposals"] = Reader(store, lambda file: all_of(file)[0], count=800, sealed=True)
READERS["proposals, header alone"] = Reader(store, check_proposals, count=300)
READERS["proposals, manifest"] = Reader(
    lambda folder: store(folder).with_name("manifest.json"), all_of, altered_json, 600, sealed=True)


def labelled(folder):
    for part, mode in (("images", "RGB"), ("masks", "L")):
        for k in range(3):
            (folder / "mine" / part).mkdir(parents=True, exist_ok=True)
            pixels = np.full((8, 9, 3) if mode == "RGB" else (8, 9), k, np.uint8)
            Image.fromarray(pixels, mode).save(folder / "mine" / part / f"{k}.png")
    return open_dataset("folder", "mine", folder)


def memory_of_check(folder):
    check(labelled(folder), published=False, workers=0, progress="none", cache=folder / "seen")
    return next((folder / "seen").iterdir())


def checked(file):
    report = check(open_dataset("folder", "mine", file.parents[1]), published=False, workers=0, progress="none",
        cache=file.parent)
    return str(report), report.ok


READERS["what check has seen"] = Reader(memory_of_check, checked, count=300, sealed=True)


def statistics(folder):
    class_statistics(labelled(folder), folder / "counts", workers=0, progress="none")
    return folder / "counts" / "sample_class_stats.json"


def counted(file):
    return class_statistics(open_dataset("folder", "mine", file.parents[1]), file.parent, workers=0, progress="none")


READERS["class statistics"] = Reader(statistics, counted, altered_json, 500)


def manifest(folder):
    file = folder / "SHA256SUMS"
    file.write_text("".join(f"{hashlib.sha256(bytes([i])).hexdigest()}  fog/{i}/a.png\n" for i in range(5)))
    return file


READERS["manifest of Cityscapes-C"] = Reader(manifest, lambda file: read_manifest(file.parent), count=300)


def log(folder):
    lines = [dict(iteration=i, of=9, seconds=i / 3, lr=1e-3, total=1 / i, src=1 / i) for i in range(1, 10)]
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder / "log.jsonl"


def shown(file): return json.dumps(read_log(file.parent)), headline(file.parent)


READERS["log, as it is watched"] = Reader(log, shown, altered_lines, 400)


def continued(file):
    run = RunFolder(file.parent, None, None, {}, 10, None, 1)
    run.done = 5
    run.cut_log()
    return file.read_bytes()


READERS["log, as it is continued"] = Reader(log, continued, altered_lines, 400)


def lease(folder):
    file = folder / "abc.0000"
    file.write_text(json.dumps(dict(host="elsewhere", pid=3, since=1.5)))
    return file


READERS["lease of a run"] = Reader(lease, lambda file: Lease.take(file.parent, "abc") is None, altered_json, 300)


OPENED = 'print(f"{len(work.source)}'  # of the page adapt: all is opened, and nothing is made yet


def class_table(folder):
    labelled(folder)
    file = folder / "classes.csv"
    file.write_text("id,name\n0,road\n1,car\n2,sky\n255,ignore\n")
    return file


def opened(file):
    folder = str(file.parent / "mine")
    space = page(OPENED, source=folder, target=folder + "/images", classes=str(file), start=None)
    return space["work"].classes.names, space["work"].classes.ids


READERS["table of classes, CSV"] = Reader(class_table, opened, count=250)


def parameters(folder):
    file = folder / "parameters.json"
    given = dict(source="scenes:train[:2]", target="scenes:night/train[:2]", classes=None, data_root=None,
        start="scenes_rein_g_seed0", preset="tiny", backbone=None, iterations=24, source_iterations=400,
        batch_size=None, crop=None, engine="classical", proposals=None, options={"tau": 0.9, "teacher_flip": True},
        pictures_every=None, workers=0, seed=0)
    file.write_text(json.dumps(given))
    return file


def altered_parameters(data, draw):
    given = json.loads(data)
    for _ in range(draw.choice((1, 1, 2))):
        key = draw.choice(list(given))
        given[key] = altered(given[key], draw) if key in ("options", "source", "target") else draw.choice(ODD)
    return json.dumps(given).encode()


def opened_page(file):
    given = json.loads(file.read_bytes())
    space = page(OPENED, **given, output=str(file.parent / "out"))
    return {name: space[name] for name in given}


READERS["parameters of the page for one's own data"] = Reader(parameters, opened_page, altered_parameters, 250)


# ---------------------------------------------------------------- the proof

def digest(value: Any) -> str:
    "What stands for a content: equal for equal bytes, shapes and types."
    made = hashlib.sha256()
    def add(value):
        made.update(type(value).__name__.encode())
        if isinstance(value, torch.Tensor): value = value.detach().as_subclass(torch.Tensor).numpy()
        if isinstance(value, np.ndarray): made.update(f"{value.dtype}{value.shape}".encode() + value.tobytes())
        elif isinstance(value, dict):
            for key in sorted(value, key=str): add((str(key), value[key]))
        elif isinstance(value, (list, tuple)):
            for part in value: add(part)
        else: made.update(repr(value).encode())
    add(value)
    return made.hexdigest()


def outcome(reader: Reader, file: Path, right: str) -> tuple[str, str]:
    "`refused`, `equal`, `other content` or what went wrong, and what was said."
    def late(number, frame): raise Hang
    signal.signal(signal.SIGALRM, late)
    signal.alarm(LONGEST)
    try:
        with warnings.catch_warnings(record=True) as said, contextlib.redirect_stdout(io.StringIO()) as printed:
            warnings.simplefilter("always")
            found = digest(reader.read(file))
    except (ValueError, OSError) as error:
        text = str(error)
        clean = "\n" not in text and len(text) < 1500
        return ("refused", text) if clean else ("other errors", f"not one line: {text[:2000]}")
    except BaseException as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        said = f"{type(error).__name__}: {error}"[:300]
        return "hangs" if isinstance(error, Hang) else "other errors", f"{said} ({where.filename}:{where.lineno})"
    finally:
        signal.alarm(0)
    if found == right: return "equal", ""
    return ("said", "") if said or printed.getvalue() else ("other content", "")


def work(name: str, folder: Path, tell) -> None:
    "All files of a reader; a line for each goes to `tell`: its number, what came of it, and what was said."
    reader, draw = READERS[name], random.Random(name)
    file = reader.make(folder)
    whole = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    right = digest(reader.read(file))
    ends = []
    def one(draw):
        for path in set(filter(Path.is_file, folder.rglob("*"))) - whole.keys(): path.unlink()
        for path, data in whole.items():
            if path.read_bytes() != data if path.exists() else True: path.write_bytes(data)
        if reader.changes_file:
            data = reader.change(whole[file], draw)
            if data == whole[file]: data += b"\0"
            file.write_bytes(data)
        else:
            reader.change(file, draw)
        print(json.dumps((len(ends), "began", "")), file=tell, flush=True)
        ends.append(outcome(reader, file, right))
        print(json.dumps((len(ends) - 1, *ends[-1])), file=tell, flush=True)
    if reader.change is not damaged:  # hypothesis draws what is done to a structured file
        whole_draw = settings(max_examples=reader.count, derandomize=True, deadline=None, database=None,
            suppress_health_check=list(HealthCheck))
        whole_draw(given(strategies.randoms())(one))()
    while len(ends) < reader.count: one(draw)


@pytest.mark.parametrize("name", READERS)
def test_altered_files(name, tmp_path):
    "Refused in a line, or read as it was; of a sealed file never anything else."
    if name.startswith("SAM 2"): pytest.importorskip("sam2")
    (tmp_path / "files").mkdir()
    pid = os.fork()
    if not pid:
        status = 1
        try:
            with open(tmp_path / "said", "w") as tell: work(name, tmp_path / "files", tell)
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    lines = [json.loads(line) for line in (tmp_path / "said").read_text().splitlines()]
    ends = [(number, what, text) for number, what, text in lines if what != "began"]
    counts = Counter(what for _, what, _ in ends)
    counts["deaths"] = int(status < 0)
    sealed = READERS[name].sealed
    unsealed = counts["other content"] + counts["said"]
    noted = dict(files=len(ends), refused=counts["refused"], equal=counts["equal"])
    noted |= dict(silent_differences=counts["other content"]) if sealed else dict(read_as_they_now_say=unsealed)
    noted |= {kind.replace(" ", "_"): counts[kind] for kind in ("other errors", "hangs", "deaths")}
    note(**{f"altered files: {name}": noted})
    refused = {"other errors", "hangs"} | ({"other content", "said"} if sealed else set())
    wrong = [one for one in ends if one[1] in refused]
    assert status == 0, f"{name}: the reader ended with {status} at {lines[-1]}"
    assert not wrong, f"{name}: {len(wrong)} of {len(ends)}: " + "\n".join(map(str, wrong[:3]))
    assert len(ends) >= READERS[name].count


def test_there_are_ten_thousand():
    assert sum(reader.count for reader in READERS.values()) >= 10_000
