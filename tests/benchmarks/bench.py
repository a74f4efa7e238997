"""Runs the rows and the levers, and keeps a record. `nbs/bench.ipynb` shows it; from a shell, in the repository's root:

    PYTHONPATH=tests python -m benchmarks.bench --rows '["head_512"]'
"""
import argparse
import contextlib
import json
import os
import platform
import re
import statistics
import time
from pathlib import Path

import torch
from torch.utils.benchmark import Timer

from reinpp.data.transforms import TrainTransform
from reinpp.files import check_choice, data_folder, write_atomically
from reinpp.paper import costs
from reinpp.paper.costs import Row, kept_bytes, operations, time_once
from reinpp.paper.experiments import commit, versions

from .levers import Sizes, measure_levers
from .parts import shares
from .reference import hugging_face, make_job

ROWS = {"head_512": Row("head", "paper")} | costs.ROWS
CPU = torch.device("cpu")


@contextlib.contextmanager
def arithmetic(
    precision: str,  # bf16, tf32 or float32
    device: torch.device,
):
    """Within this context matrix products and convolutions of float32 run in a precision; bf16 is a `Job`'s autocast,
    beside which the rest is TF32, as in `fit`.

    Everything is as before afterwards. Raises ValueError for another precision."""
    check_choice("precision", precision, ("bf16", "tf32", "float32"))
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("highest" if precision == "float32" else "high")
    torch.backends.cudnn.allow_tf32 = precision != "float32"
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]


def peak_speed(
    device: torch.device,
    precision: str,
    size: int | None = None,  # of the square matrices; None: 1024 on a CPU, 8192 on a GPU
) -> float:
    "Floating-point operations a second in one large matrix product: the best of a few."
    size = size or (8192 if device.type == "cuda" else 1024)
    with arithmetic(precision, device):
        a = torch.randn(size, size, device=device, dtype=torch.bfloat16 if precision == "bf16" else torch.float32)
        timer = Timer("a @ a", globals=dict(a=a), num_threads=torch.get_num_threads())
        return 2 * size**3 / min(timer.timeit(1).mean for _ in range(6))


def paths(row: Row, device: torch.device, reference: bool = True) -> list[tuple[str, str]]:
    "What is measured of a row on a device, as (path, precision)."
    reference = reference and row.reference
    if device.type != "cuda": return [("ours", "float32")] + [("reference", "float32")] * reference
    ours = [("ours", "bf16")] + [("ours", "float32")] * (row.hold == "fp32")
    return ours + [("reference", "tf32"), ("reference", "float32")] * reference


def data_seconds(row: Row, repeats: int = 5) -> float | None:
    """Seconds to augment one batch in one process, from images in memory (128 x 256 for the small presets, 1052 x 1914
    for the paper's): reading a file is not in it. None for rows without data."""
    if row.what in ("head", "inference"): return None
    height, width = (1052, 1914) if row.preset == "paper" else (128, 256)
    transform = TrainTransform(**{name: row.sizes[name]
        for name in ("crop", "base", "scales", "max_long", "min_class_pixels")})
    image = torch.randint(0, 256, (3, height, width), dtype=torch.uint8)
    label = (torch.arange(width) * 12 // width).expand(height, width).to(torch.uint8)
    one = statistics.median(time_once(lambda: transform(image, label), CPU) for _ in range(repeats))
    return one * _images(row)


def _images(row):
    return row.batch * (2 if row.what == "rein_a" else 1)


def measure(
    name: str,  # a key of `ROWS`, for messages
    row: Row,
    device: torch.device,
    steps: int = 10,  # timed, after the warm-up
    warmup: int = 2,
    reference: bool = True,  # False: ours alone (transformers is not needed then)
) -> list[dict]:
    """Records of a row, one for each path.

    On a CPU the paths take turns, step by step; on a GPU they come one after the other, so that each has the memory for
    itself."""
    if row.gpu and device.type != "cuda": return [dict(row=name, skipped="needs an NVIDIA GPU")]
    chosen, records = paths(row, device, reference), []
    for group in [[one] for one in chosen] if device.type == "cuda" else [chosen]:
        about = [dict(row=name, what=row.what, path=path, precision=precision, batch=row.batch,
            crop=row.sizes["crop"], hold=row.hold) for path, precision in group]
        try:
            with arithmetic(group[0][1], device):  # on a CPU it is the same for all
                jobs = [make_job(row, *one, device) for one in group]
                records += [a | found for a, found in zip(about, _measure_jobs(jobs, steps, warmup))]
        except torch.OutOfMemoryError:
            records += [a | dict(skipped="out of memory") for a in about]
        except (ValueError, ImportError) as error:
            if row.hold not in ("int8", "int4"):
                raise
            records += [a | dict(skipped=str(error).splitlines()[0][:160]) for a in about]  # packing does not work here
        if device.type == "cuda":
            torch.cuda.empty_cache()
    wait = data_seconds(row)
    return [r | dict(data_seconds=wait) for r in records]


def _measure_jobs(jobs, steps, warmup):
    "Jobs in turns; what a record says of each."
    cuda, times = jobs[0].device.type == "cuda", [[] for _ in jobs]
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    first = [job.run() for job in jobs]
    for i in range(1, warmup + steps):
        for job, seconds in zip(jobs, times):
            one = time_once(job.run, job.device)
            if i >= warmup:
                seconds.append(one)
    peak = torch.cuda.max_memory_allocated() if cuda else None  # before the counting, which takes memory of its own
    for job, seconds, loss in zip(jobs, times, first):
        median = statistics.median(seconds)
        yield dict(seconds=median, fastest=min(seconds), slowest=max(seconds), steps=steps,
            images_per_second=_images(job.row) / median, peak_memory=peak,
            kept_bytes=None if job.row.what == "inference" else kept_bytes(job).peak,
            operations=operations(job), shares=shares(job), parameters=sum(p.numel() for p in job.trained()),
            loss=None if loss is None else float(loss))


def bench(
    rows: list | None = None,  # keys of `ROWS`; None: all (those that need a GPU are skipped by name without one)
    steps: int = 10,  # timed steps of each path
    warmup: int = 2,  # steps before that
    levers: bool = True,  # measure the levers too
    reference: bool = True,  # measure the reference path beside ours
    device: str | None = None,  # None: the GPU if there is one
    sizes: Sizes = Sizes(),  # of the levers
    known: dict = ROWS,  # what `rows` may name
) -> dict:  # the record
    """Measure, row by row, saying what comes.

    Raises `ValueError` for unknown rows and bad counts, `ImportError` without transformers (unless `reference=False`).
    """
    if isinstance(rows, str) or not (rows is None or hasattr(rows, "__iter__")):
        raise ValueError(f"rows={rows!r} is not a list: write -y 'rows: [head_512]'")
    for row in rows or ():
        check_choice("rows", row, known)
    for name, value in (("steps", steps), ("warmup", warmup)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name}={value!r}: use a whole number from 1 up")
    if reference:
        hugging_face()
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    made_by, records, random = commit(), [], torch.random.get_rng_state()
    try:
        for name in known if rows is None else rows:
            found = measure(name, known[name], device, steps, warmup, reference)
            records += found
            for r in found:
                print(f"{name}: " + (f"skipped, {r['skipped']}" if "skipped" in r
                    else f"{r['path']} {r['precision']} {r['seconds']:.3f} s a step"), flush=True)
        peaks = {p: peak_speed(device, p) for p in sorted({r["precision"] for r in records if "seconds" in r})}
        for r in records:
            if r.get("operations"):
                r["share_of_peak"] = r["operations"] / r["seconds"] / peaks[r["precision"]]
        found = measure_levers(device, sizes) if levers else []
    finally:
        torch.random.set_rng_state(random)
    made = versions()
    if reference:
        import transformers
        made["transformers"] = transformers.__version__
    about = torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name()
    return dict(kind="bench", device=about, device_type=device.type, threads=torch.get_num_threads(), commit=made_by,
        versions=made, date=time.strftime("%Y-%m-%d"), peak_speed=peaks, rows=records, levers=found)


def _cpu_name():
    "As the operating system calls it."
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return f"CPU ({platform.machine()})"


def save(
    record: dict,  # of `bench`
    folder: str | Path | None = None,  # None: data/results/bench
) -> Path:
    "Where a record was written, whole or not at all; one file for a device, a number of threads and a day."
    folder = Path(folder) if folder else data_folder() / "results" / "bench"
    name = f"{record['device']} {record['threads']} threads {record['date']}".lower()
    path = folder / (re.sub(r"[^a-z0-9]+", "-", name).strip("-") + ".json")
    write_atomically(path, (json.dumps(record, indent=1) + "\n").encode())
    return path


def main(
    arguments: list | None = None,  # None: the command line's
) -> dict:
    "Measure, print the tables, write the record."
    from .show import levers_table, skipped, table
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bench",
        description="Speed and memory of a step, ours beside the plain composition.")
    parser.add_argument("--rows", type=json.loads, help=f"a JSON list; the default is all of {', '.join(ROWS)}")
    parser.add_argument("--steps", type=int, default=10, help="timed steps of each path")
    parser.add_argument("--warmup", type=int, default=2, help="steps before that")
    parser.add_argument("--device", help="cpu or cuda; the default is the GPU if there is one")
    parser.add_argument("--threads", type=int, help="of the CPU; the default is torch's")
    parser.add_argument("--no-levers", action="store_true", help="rows only")
    parser.add_argument("--no-reference", action="store_true", help="ours only; transformers is not needed then")
    parser.add_argument("--out", help="folder of the record; the default is data/results/bench")
    a = parser.parse_args(arguments)
    if a.threads:
        torch.set_num_threads(a.threads)
    try:
        record = bench(a.rows, a.steps, a.warmup, not a.no_levers, not a.no_reference, a.device)
    except (ValueError, ImportError) as error:
        parser.error(str(error))
    for shown in (table, costs.ratios, levers_table):
        print(shown(record).to_string(), end="\n\n")
    print(skipped(record))
    print("written", os.path.relpath(save(record, a.out)))
    return record


if __name__ == "__main__":
    main()
