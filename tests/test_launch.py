"""Several processes on one ledger: each run is made once, whoever dies; and what a cluster is handed."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from reinpp.paper import launch
from reinpp.paper.experiments import Ledger, plan

WORKER = """
import socket, sys, time
from pathlib import Path
from reinpp.paper import launch
from reinpp.paper.experiments import Ledger, plan

host, folder, seconds = sys.argv[1], Path(sys.argv[2]), float(sys.argv[3])
socket.gethostname = lambda: host


def run(e, ledger, runs, data_root, **options):
    with (folder / "made.txt").open("a") as file: file.write(f"{e.seed} {host}\\n")
    time.sleep(seconds)
    if e.seed == 3: raise ValueError("seed 3 is unlucky")
    metrics = dict.fromkeys(e.evaluate_on, dict(miou=.1, pixel_accuracy=.1, iou={}, images=1))
    ledger.put(e, dict(key=e.key, config=e.config(), metrics=metrics, training={}, seconds=1.0, parameters={},
        versions={}, commit="", date=""))


launch.run = run
runs = [plan("tiny", "freeze", seed) for seed in range(6)]
print(launch.work(runs, Ledger(folder / "results"), folder / "runs", poll=0.1))
"""


def worker(host, folder, seconds=0.3):
    root = str(Path(__file__).resolve().parent.parent)
    path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    return subprocess.Popen([sys.executable, "-c", WORKER, host, str(folder), str(seconds)], text=True,
        stdout=subprocess.PIPE, env=dict(os.environ, PYTHONPATH=path, OMP_NUM_THREADS="1"))


def made(folder):
    file = folder / "made.txt"
    return [line.split() for line in file.read_text().splitlines()] if file.exists() else []


def test_two_machines_share_the_runs(tmp_path):
    both = [worker(host, tmp_path) for host in ("one", "other")]
    said = [process.communicate(timeout=120)[0] for process in both]
    assert sorted(seed for seed, _ in made(tmp_path)) == list("012345"), "each once"
    assert {host for _, host in made(tmp_path)} == {"one", "other"}
    assert all("seed 3 is unlucky" in text for text in said), "who failed is known to both, and not tried again"
    assert len(list((tmp_path / "results").iterdir())) == 5


def test_what_a_dead_process_held_is_taken_over_once(tmp_path):
    first = worker("gone", tmp_path, seconds=60)
    for _ in range(600):
        if made(tmp_path): break
        time.sleep(0.1)
    first.send_signal(signal.SIGKILL)
    first.wait()
    held, = (tmp_path / "runs" / "leases").iterdir()
    assert launch.Lease.take(held.parent, held.stem) is None, "its host is another one: it may live"
    os.utime(held, (0, 0))
    both = [worker(host, tmp_path) for host in ("one", "other")]
    for process in both: process.communicate(timeout=120)
    seeds = [seed for seed, _ in made(tmp_path)]
    assert sorted(seeds) == sorted([*"012345", seeds[0]]), "the first twice, as its first maker was killed"


def test_a_process_that_is_gone_from_this_machine_holds_nothing(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    content = dict(host=launch.socket.gethostname(), pid=process.pid, since=time.time())
    (tmp_path / "x.0000").write_text(json.dumps(content))
    assert launch.Lease.take(tmp_path, "x").path.name == "x.0001"
    (tmp_path / "y.0000").write_text("")  # killed between making and writing it
    assert launch.Lease.take(tmp_path, "y") is None
    os.utime(tmp_path / "y.0000", (0, 0))
    assert launch.Lease.take(tmp_path, "y") is not None


def test_a_lease_beats(tmp_path, monkeypatch):
    monkeypatch.setattr(launch, "HEARTBEAT", 0.05)
    with launch.Lease.take(tmp_path, "x") as lease:
        os.utime(lease.path, (0, 0))
        for _ in range(200):
            if lease.path.stat().st_mtime: break
            time.sleep(0.05)
        assert lease.path.stat().st_mtime > 0


# ---- on the GPUs of this machine

def test_processes_of_this_machine_make_them(tmp_path, capsys):
    place = dict(ledger=Ledger(tmp_path / "results"), runs=tmp_path / "runs")
    two = [small(0), small(1), dataclasses.replace(small(2), source="nowhere:train")]
    launch.launch(two, gpus=2, poll=0.2, progress="none", **place)
    assert launch.status(two, **place).state.tolist() == ["done", "done", "failed"]
    assert f"{two[2].key} failed: " in capsys.readouterr().out


# ---- what is handed in

def small(seed=0):
    "A run of one iteration on a few images."
    e = plan("tiny", "freeze", seed, limit_iterations=1)
    return dataclasses.replace(e, source="scenes:train[:4]", evaluate_on=("scenes:val[:2]",))


@pytest.mark.parametrize("cluster", ["debug", "local"])
def test_submitit_runs_them(cluster, tmp_path, monkeypatch):
    pytest.importorskip("submitit")
    root = str(Path(__file__).resolve().parent.parent)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")])))
    place = dict(ledger=Ledger(tmp_path / "results"), runs=tmp_path / "runs")
    jobs = launch.submit([small()], cluster=cluster, progress="none", device="cpu", **place)
    assert [job.result() for job in jobs] == [{}]
    assert launch.status([small()], **place).state.tolist() == ["done"]
    assert launch.submit([small()], cluster=cluster, **place) == [], "nothing is missing"


STUB = """#!/bin/sh
for last; do :; done
cp "$last" "$STUB_FOLDER/job-$(ls "$STUB_FOLDER" | wc -l | tr -d ' ').sh"
echo "Submitted batch job $((100 + $(ls "$STUB_FOLDER" | wc -l)))"
"""


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    "Commands of Slurm that keep what they are given."
    pytest.importorskip("submitit")
    commands, kept = tmp_path / "bin", tmp_path / "kept"
    commands.mkdir()
    kept.mkdir()
    for name, text in (("sbatch", STUB), ("srun", "#!/bin/sh\n"), ("scontrol", "#!/bin/sh\n"),
            ("sacct", "#!/bin/sh\n")):
        (commands / name).write_text(text)
        (commands / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{commands}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("STUB_FOLDER", str(kept))
    return kept


def test_the_job_files(slurm, tmp_path):
    "Source models in a first array, and what starts from them in a second one that waits for it."
    runs = [plan("tiny", "control", seed) for seed in (7, 8)]
    jobs = launch.submit(runs, Ledger(tmp_path / "results"), tmp_path / "runs",
        parameters=dict(slurm_partition="gpu", timeout_min=600))
    assert [job.job_id for job in jobs] == ["101_0", "101_1", "102_0", "102_1"]
    files = [[line for line in file.read_text().splitlines() if line.startswith("#SBATCH")
        and not any(word in line for word in ("--error", "--output"))] for file in sorted(slurm.iterdir())]
    common = ["#SBATCH --array=0-1%2", "#SBATCH --cpus-per-task=8", "#SBATCH --gpus-per-node=1",
        "#SBATCH --job-name=reinpp", "#SBATCH --mem=64GB", "#SBATCH --nodes=1", "#SBATCH --open-mode=append",
        "#SBATCH --partition=gpu", "#SBATCH --signal=USR2@90", "#SBATCH --time=600", "#SBATCH --wckey=submitit"]
    assert sorted(files[0]) == common
    assert sorted(files[1]) == sorted([*common, "#SBATCH --dependency=afterany:101"])


def test_a_preempted_job_goes_back_into_the_queue(tmp_path, monkeypatch):
    "The run has written its checkpoint and left with 128 + the signal: then submitit's handler is called."
    seen, job = [], launch.Job(small(), str(tmp_path / "results"), str(tmp_path / "runs"), None, {})

    def preempted(*arguments, **options): raise SystemExit(128 + signal.SIGUSR2)

    monkeypatch.setattr(launch, "work", preempted)
    before = signal.signal(signal.SIGUSR2, lambda number, frame: seen.append(number))
    try:
        with pytest.raises(SystemExit):
            job()
    finally:
        signal.signal(signal.SIGUSR2, before)
    assert seen == [signal.SIGUSR2]
    again = job.checkpoint()
    assert again.function is job


def test_the_launcher_is_one_of_two():
    with pytest.raises(ValueError, match="launcher='cloud'"):
        launch.launch([], "cloud")


def test_status_says_who_waits_for_whom(tmp_path):
    place = dict(ledger=Ledger(tmp_path / "results"), runs=tmp_path / "runs")
    runs = [plan("tiny", "control", 9)]
    table = launch.status(runs, **place)
    assert table.state.tolist() == ["missing", "waiting"]
    with launch.Lease.take(tmp_path / "runs" / "leases", runs[0].start.key):
        folder = tmp_path / "runs" / runs[0].start.training_key
        folder.mkdir()
        line = json.dumps(dict(iteration=1000, seconds=60, total=1.5)) + "\n"
        (folder / "log.jsonl").write_text(line + '{"iteration": 1050, "sec')  # the last one is being written
        said = launch.status(runs, **place).what[0]
        assert said.startswith("1000/4000, 3 min left on ")
