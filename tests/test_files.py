"The ground floor: whole files, checkpoints that run nothing, progress in each mode, a pool that says what died."
import io
import json
import os
import pickle
import random
import signal
import sys
import types
import zipfile
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from reinpp import files
from reinpp.files import (
    PROGRESS,
    BadFile,
    Member,
    Progress,
    check_choice,
    cores,
    data_folder,
    device_name,
    duration,
    each,
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


# ---------------------------------------------------------------- progress

@pytest.fixture
def clock(monkeypatch):
    "Seconds that pass only when they are told to."
    now = types.SimpleNamespace(seconds=0.0)
    monkeypatch.setattr(files.time, "monotonic", lambda: now.seconds)
    return now


def work(progress, clock, seconds=1.0, pieces=100):
    with progress:
        for i in range(pieces):
            clock.seconds += seconds
            progress.update(loss=i)


def test_lines_are_ten(clock, capsys):
    work(Progress(100, "iteration", show="lines"), clock)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 10 and lines[0] == "iteration 10/100  loss 9.000  1 s each, 2 min left"
    assert lines[-1] == "iteration 100/100  loss 99.000  1 s each, 0 s left"


def test_slow_work_has_a_line_every_ten_minutes(clock, capsys):
    work(Progress(100, "", "image", show="lines"), clock, seconds=250.0)
    lines = capsys.readouterr().out.splitlines()
    assert 30 <= len(lines) <= 40 and lines[0] == "image 3/100  loss 2.000  2.5e+02 s each, 6.7 h left"


def test_what_was_there_before_counts_for_nothing(clock, capsys):
    work(Progress(100, "iteration", done=90, show="lines"), clock, pieces=10)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 10 and lines[0] == "iteration 91/100  loss 0.000  1 s each, 9 s left"


def test_none_is_silent(clock, capsys):
    progress = Progress(100, show="none")
    work(progress, clock)
    progress.say("nothing")
    assert capsys.readouterr() == ("", "") and progress.done == 100


def test_a_bar_is_tqdms_and_is_closed_by_an_error(capsys):
    progress = Progress(4, "training", "step", done=1, show="bar")
    with pytest.raises(KeyError):
        with progress:
            progress.update(2, loss=1.5)
            progress.say("half way")
            raise KeyError
    out, err = capsys.readouterr()
    assert out == "" and "half way\n" in err and "training" in err and "3/4" in err and "loss=1.50" in err
    assert progress.bar.disable and progress.bar.n == 3, "tqdm's mark of a bar that is closed"


def test_a_notebook_has_one_output_that_is_written_over(clock, monkeypatch, capsys):
    shown = []

    class Handle:
        def update(self, data, raw):
            shown.append(("again", data["text/plain"]))

    def display(data, raw, display_id):
        shown.append(("first", data["text/plain"]))
        return Handle()

    monkeypatch.setitem(sys.modules, "IPython", types.ModuleType("IPython"))
    monkeypatch.setitem(sys.modules, "IPython.display", types.SimpleNamespace(display=display))
    progress = Progress(100, "iteration", show="notebook")
    work(progress, clock, seconds=0.1)
    assert [kind for kind, _ in shown] == ["first"] + ["again"] * (len(shown) - 1) and 10 <= len(shown) <= 20
    assert shown[-1][1] == "iteration 100/100  loss 99.000  0.1 s each, 0 s left" and capsys.readouterr().out == ""
    progress.say("a line of its own")
    assert capsys.readouterr().out == "a line of its own\n"


@pytest.mark.parametrize("kernel, terminal, expected", [
    (object(), True, "notebook"), (None, True, "bar"), (None, False, "lines"), ("no IPython", False, "lines")])
def test_auto_is_what_goes_with_the_place(kernel, terminal, expected, monkeypatch):
    shell = types.SimpleNamespace(kernel=kernel)
    ipython = None if kernel == "no IPython" else types.SimpleNamespace(get_ipython=lambda: shell)
    monkeypatch.setitem(sys.modules, "IPython", ipython)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal, raising=False)
    assert Progress(1).show == expected


def test_an_unknown_kind_of_progress_is_refused():
    with pytest.raises(ValueError, match="progress='loud' is unknown: use one of auto, bar, notebook, lines, none"):
        Progress(1, show="loud")
    assert PROGRESS[0] == "auto"


def test_sizes_and_times():
    assert [duration(s) for s in (0, 89, 90, 5399, 5400, 360_000)] == ["0 s", "89 s", "2 min", "90 min", "1.5 h",
                                                                       "100.0 h"]
    assert [file_size(b) for b in (10, 3100, 20_400_000, 1.07e9)] == ["0.0 kB", "3.1 kB", "20.4 MB", "1.07 GB"]
    assert 1 <= cores() <= (os.cpu_count() or 1)
    assert device_name("cpu") == f"CPU ({os.uname().machine}, {torch.get_num_threads()} threads)"


# ---------------------------------------------------------------- many processes

def square(number):
    return number * number


def process(number):
    return os.getpid()


def bad(number):
    if number == 5:
        raise BadFile("street.png: is rotated: turn it", "rotated")
    return number


def dies(number):
    if number == 5:
        os.kill(os.getpid(), signal.SIGKILL)
    return number


SEEN = []


def remember(*values):
    SEEN[:] = values


def recall(number):
    return tuple(SEEN), number, torch.get_num_threads()


@pytest.mark.parametrize("workers", [0, 1, 2])
@pytest.mark.parametrize("ordered", [True, False])
def test_each_is_map(workers, ordered):
    numbers = list(range(20))
    random.Random(0).shuffle(numbers)
    found = list(each(square, numbers, workers, ordered=ordered))
    assert (found if ordered else sorted(found)) == [n * n for n in (numbers if ordered else sorted(numbers))]
    assert list(each(square, [], workers)) == []


def test_each_chooses_its_workers():
    assert set(each(process, range(63))) == {os.getpid()}, "few items are not worth a process"
    assert os.getpid() not in set(each(process, range(64)))


def test_each_starts_no_more_workers_than_there_are_items(monkeypatch):
    asked = []
    class Pool(files.ProcessPoolExecutor):
        def __init__(self, workers, *arguments):
            asked.append(workers)
            super().__init__(min(workers, 2), *arguments)
    monkeypatch.setattr(files, "ProcessPoolExecutor", Pool)
    assert list(each(abs, [-1, 2], workers=10**6)) == [1, 2] and asked == [2]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("ordered", [True, False])
def test_an_error_keeps_its_kind_across_processes(workers, ordered):
    with pytest.raises(BadFile) as error:
        list(each(bad, range(20), workers, ordered=ordered))
    assert str(error.value) == "street.png: is rotated: turn it" and error.value.kind == "rotated"


@pytest.mark.parametrize("ordered", [True, False])
def test_a_killed_worker_ends_the_work_with_a_line(ordered):
    with pytest.raises(RuntimeError, match="a worker died: out of memory, killed"):
        list(each(dies, range(20), 2, ordered=ordered))


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_workers_are_set_up_once(start):
    found = list(each(recall, range(6), 2, start, remember, ("a", 1)))
    assert found == [(("a", 1), number, 1) for number in range(6)] and SEEN == []


def test_without_workers_it_is_set_up_here(monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "SEEN", [])
    assert [seen for seen, *_ in each(recall, range(2), 0, set_up=remember, set_up_arguments=("b",))] == [("b",)] * 2
    assert list(each(recall, [], 0, set_up=remember, set_up_arguments=("c",))) == [] and SEEN == ["b"]


def test_what_cannot_be_imported_is_refused_before_a_process_starts():
    with pytest.raises(ValueError, match="another process must be able to import .*: use workers=0"):
        list(each(lambda number: number, range(4), 2, "spawn"))
    assert list(each(partial(pow, 2), range(4), 2)) == [1, 2, 4, 8]


def test_one_may_stop_early():
    stream = each(square, range(1000), 2)
    assert [next(stream) for _ in range(3)] == [0, 1, 4]
    stream.close()
