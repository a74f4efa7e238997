"""A disk that fills, that may only be read, a folder that is gone: nothing that was there is lost, and the message
names the place. Not a part of `make test`: `make proofs`. Disks are mounted, so it takes a system that lets us."""

import contextlib
import os
import subprocess
from pathlib import Path

import pytest
import torch
from noted import note
from proof_killed import ITERATIONS, objective, train

from reinpp.adaptation.proposals import make_proposals
from reinpp.data.catalog import open_dataset
from reinpp.data.sampling import class_statistics
from reinpp.files import write_atomically
from reinpp.models.adapter_files import read_adapter
from reinpp.models.export import export
from reinpp.models.segmenter import tiny_segmenter
from reinpp.prediction import Use, write_use
from reinpp.training.evaluation import predict_to_folder
from reinpp.training.train import fit


def mounted(*arguments):
    done = subprocess.run(["mount", *map(str, arguments)], capture_output=True, text=True)
    if done.returncode: pytest.skip(f"a disk cannot be mounted here: {done.stderr.strip()}")


@pytest.fixture
def disk(tmp_path):
    "A disk of 24 MB in memory."
    place = tmp_path / "disk"
    place.mkdir()
    mounted("-t", "tmpfs", "-o", "size=24m", "tmpfs", place)
    yield place
    subprocess.run(["umount", str(place)], check=True)


@contextlib.contextmanager
def full(disk):
    "No byte is left on the disk."
    filler = disk / "filler"
    try:
        with open(filler, "wb", buffering=0) as file:
            for size in (1 << 20, 1 << 12, 1):
                with contextlib.suppress(OSError):
                    while file.write(b"\0" * size): pass
        yield
    finally:
        filler.unlink()


@contextlib.contextmanager
def read_only(disk):
    mounted("-o", "remount,ro", disk)
    try: yield
    finally: mounted("-o", "remount,rw", disk)


@contextlib.contextmanager
def gone(disk):
    "The folders are gone, and cannot be made again."
    places = [path for path in disk.iterdir() if path.is_dir()]
    for path in places:
        path.rename(path.with_suffix(".aside"))
        path.touch()
    mounted("-o", "remount,ro", disk)
    try: yield
    finally:
        mounted("-o", "remount,rw", disk)
        for path in places:
            path.unlink()
            path.with_suffix(".aside").rename(path)


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in sorted(folder.rglob("*"))
            if path.is_file() and path.name != "filler"}


def writers(place: Path) -> dict:
    "All that writes, as functions of no argument; each has written once before."
    segmenter, scenes = tiny_segmenter(head_args=dict(decoder_layers=1)), open_dataset("scenes", "val", count=2)
    plain = tiny_segmenter("freeze", "semantic_fpn", num_classes=3)
    use = Use(("a", "b"), ((0, 0, 0), (9, 9, 9)), 64, 43)
    return {
        "a file": lambda: write_atomically(place / "file.json", os.urandom(100)),
        "an adapter": lambda: segmenter.save_adapter(place / "adapter", record=dict(number=os.urandom(4).hex())),
        "how it is used": lambda: write_use(place / "adapter", use),
        "an exported program": lambda: export(plain, place / "a.pt2"),
        "proposals": lambda: make_proposals(scenes, "instances", place / f"store{os.urandom(2).hex()}", reduction=2),
        "class statistics": lambda: class_statistics(scenes, place / os.urandom(2).hex(), progress="none"),
        "predictions": lambda: predict_to_folder(segmenter, scenes, place / f"predictions{os.urandom(2).hex()}"),
        "a run": lambda: fit(objective("rein_g"), 2, 2, run_dir=place / f"run{os.urandom(2).hex()}", progress="none")}


@pytest.mark.parametrize("fault", [full, read_only, gone])
def test_no_file_is_lost_and_the_place_is_named(fault, disk):
    torch.manual_seed(0)
    made, refused, lost, unnamed = writers(disk), 0, 0, []
    for write in made.values(): write()
    before = contents(disk)
    with fault(disk):
        for what, write in made.items():
            try:
                write()
            except (OSError, ValueError, RuntimeError) as error:
                refused += 1
                if str(disk) not in str(error) or "\n" in str(error): unnamed.append(f"{what}: {error}")
            else: unnamed.append(f"{what}: it said nothing")
    after = contents(disk)
    lost = sum(after.get(path) != data for path, data in before.items())
    left = [str(path) for path in after.keys() - before.keys()]
    note(**{f"disk {fault.__name__.replace('_', ' ')}": dict(
        writers=len(made), refused=refused, lost_files=lost, not_named=len(unnamed))})
    assert not lost and not unnamed, unnamed
    assert not [path for path in left if "tmp" in path], left
    read_adapter(disk / "adapter")
    for write in made.values(): write()


def test_a_training_whose_disk_fills_goes_on_when_there_is_room(disk, tmp_path):
    expected, run = train("rein_g", tmp_path / "whole"), disk / "run"
    options = dict(run_dir=run, lr=1e-3, log_every=5, checkpoint_every=3, progress="none", device="cpu")
    fit(objective("rein_g"), ITERATIONS, 2, stop_at=9, **options)
    before, made = (run / "checkpoint.pt").read_bytes(), objective("rein_g")
    after = made.after_step
    with contextlib.ExitStack() as filled:
        def fill(iteration):
            after(iteration)
            if iteration == 10: filled.enter_context(full(disk))
        made.after_step = fill
        with pytest.raises(RuntimeError, match="could not be kept.*No space left") as told:
            fit(made, ITERATIONS, 2, **options)
    assert str(run) in str(told.value) and "\n" not in str(told.value)
    lost = int((run / "checkpoint.pt").read_bytes() != before)
    others = int(train("rein_g", run) != expected)
    note(**{"a training's disk fills": dict(times=1, lost_files=lost, other_states=others)})
    assert not lost and not others


def test_a_run_folder_that_is_gone_is_not_made_anew(tmp_path):
    "Removed while it trains: one line; moved back, the run goes on to the same end."
    expected, run, aside = train("rein_g", tmp_path / "whole"), tmp_path / "run", tmp_path / "aside"
    made = objective("rein_g")
    after = made.after_step
    def vanish(iteration):
        after(iteration)
        if iteration == 20: run.rename(aside)
    made.after_step = vanish
    with pytest.raises(RuntimeError, match="was removed or moved away") as told:
        fit(made, ITERATIONS, 2, run_dir=run, lr=1e-3, log_every=5, checkpoint_every=3, progress="none", device="cpu")
    anew = int(run.exists())
    assert str(run) in str(told.value) and "\n" not in str(told.value)
    aside.rename(run)
    others = int(train("rein_g", run) != expected)
    note(**{"a run's folder is moved away": dict(times=1, made_anew=anew, other_states=others)})
    assert not anew and not others
