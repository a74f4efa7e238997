"""The paper preset's day, rehearsed: every run and page on generated data of the real layouts, with reduced models.

`make rehearsal` runs this file; `test_rehearsal.py` takes a slice of it. Nothing is written into the ledger."""
import argparse
import os
import re
import shutil
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from test_layouts import SETS, palette_label, red16, save

from reinpp.data.catalog import DATASETS
from reinpp.data.cityscapes_c import make_cityscapes_c
from reinpp.models.official import official_names
from reinpp.models.segmenter import create_segmenter
from reinpp.paper.cells import cells, tables
from reinpp.paper.experiments import Experiment, Ledger, plan
from reinpp.paper.launch import launch_local
from reinpp.paper.page import numbers, parameters_of
from reinpp.paper.runs import CHECKPOINT
from reinpp.paper.servers import PARTS, asked, enter_answer
from reinpp.training.evaluation import CONDITIONS

PRESET = "rehearsal"
ROOT = Path(__file__).resolve().parent.parent
FRAMES = {"train": 2, "val": 1, "test": 1}  # images of a split
MAPILLARY = (3264, 2448)  # width, height: its images have many sizes, this is a frequent one


def parts():
    "(set, split, folder, image, label or None, ids, highest id) of every layout, ACDC's for each condition."
    for (name, split), (folder, image, label, ids, highest, _) in SETS.items():
        if name != "acdc":
            yield name, split, folder, image, label, ids, highest
    acdc = {split.partition("/")[2]: row for (name, split), row in SETS.items() if name == "acdc"}
    for split, (folder, image, label, ids, highest, _) in acdc.items():
        for n, condition in enumerate(CONDITIONS, 1):  # a frame's name occurs once in the whole set
            own = [text and re.sub(r"\b(night|fog|rain)\b", condition, text).replace("frame_0", f"frame_{n}")
                for text in (image, label)]
            yield "acdc", f"{condition}/{split}", folder, *own, ids, highest


def draw(seed: int, width: int, height: int, highest: int) -> tuple[np.ndarray, np.ndarray]:
    "An image of coarse blocks, and a label map in which every id has several thousand pixels."
    draws = np.random.default_rng(seed)
    across, down = -(-width // 64), -(-height // 64)
    image = draws.integers(0, 256, (down, across, 3), dtype=np.uint8).repeat(64, 0).repeat(64, 1)[:height, :width]
    ids = np.resize(draws.permutation(highest + 1), across * down).reshape(down, across).astype(np.uint8)
    return image, ids.repeat(64, 0).repeat(64, 1)[:height, :width]


def make_trees(root: Path, without: tuple = ()) -> None:
    "A few images of every set but those that are left out, as people have them on their disks."
    for name, split, folder, image_name, label_name, _, highest in parts():
        if name in without: continue
        width, height = DATASETS[name].size or MAPILLARY
        for k in range(1 if name == "acdc" else FRAMES[split.rpartition("/")[2]]):
            image, ids = draw(k, width, height, highest or 1)
            save(image, root / folder / image_name.format(k))
            if label_name is None: continue
            path = root / folder / label_name.format(k)
            if name == "synthia": save(red16(ids), path)
            elif name in ("gtav", "mapillary"): palette_label(ids, path)
            else: save(ids, path)


def make_checkpoint(root: Path) -> Path:
    "A file with the names of the authors' released ones, and random numbers."
    model = plan(PRESET, "official", setting="cityscapes 1024", model=dict(
        adapter_args=dict(num_heads=1, gelu=False))).model
    own = create_segmenter(**model).state_dict()
    names = official_names(model["head_args"]["encoder_layers"], model["head_args"]["decoder_layers"])
    state, thirds = {}, {}
    for ours, (theirs, third) in names.items():
        if third is None: state[theirs] = own[ours]
        else: thirds.setdefault(theirs, {})[third] = own[ours]
    state |= {theirs: torch.cat([found[i] for i in range(3)]) for theirs, found in thirds.items()}
    file = root / "weights" / CHECKPOINT
    file.parent.mkdir(parents=True, exist_ok=True)
    torch.save(state, file)
    return file


def every_run() -> dict[str, Experiment]:
    "Key -> run, of every table and figure."
    runs = {}
    for table in tables().values():
        for row in table.rows(PRESET).values():
            own = row["method"] != "rein_a" or "target" in row
            for target in [row.get("target")] if own else table.about(PRESET) or ["citys"]:
                one = plan(PRESET, **row | dict(target=target))
                runs[one.key] = one
    return runs


def run_pages(folder: Path, names: list[str]) -> dict[str, str]:
    "Execute pages through papermill: name -> why it failed."
    import papermill
    failed = {}
    for name in names:
        known, began = parameters_of(name), time.time()
        given = dict(preset=PRESET, run_missing=True, short_iterations=None, targets=None, rows=None, steps=1,
            data_root=str(folder / "data"), results=str(folder / "results"), output=str(folder / "pages" / name))
        if "adapt" in name: given.pop("preset")
        (folder / "pages").mkdir(exist_ok=True)
        try:
            papermill.execute_notebook(str(ROOT / "nbs" / f"{name}.ipynb"), str(folder / "pages" / f"{name}.ipynb"),
                parameters={k: v for k, v in given.items() if k in known}, progress_bar=False, log_output=False)
        except Exception as error:
            failed[name] = (str(error).strip().splitlines() or [type(error).__name__])[-1]
        print(f"{name}: {failed.get(name, 'executed')}, {time.time() - began:.0f} s", flush=True)
    return failed


def answer(ledger: Ledger) -> None:
    "Enter an answer for every archive, as somebody would who got one; its numbers mean nothing."
    from reinpp.labels import CLASSES
    for key, row in asked(ledger).iterrows():
        if row.archive.startswith("none"): continue
        for part in PARTS:
            if part.partition(":")[0] == row.server:
                enter_answer(key, part, dict.fromkeys(("miou", *CLASSES), 1.0), ledger)


def filled(ledger: Ledger, preset: str = PRESET) -> pd.DataFrame:
    "For each table and figure: numbers that are ours, the runs planned for them, numbers there, and what is not."
    lines = []
    for name, table in tables().items():
        ours = numbers(name, ledger, preset) | numbers(name, ledger, preset, released=True)
        printed_cells = cells(name)
        counted = sum(c.kind == "count" for c in printed_cells)
        empty = [cell for cell, values in ours.items() if not values]
        why = {}
        for cell in empty:
            reason = f"{cell.metric} of {cell.kind}" if cell.kind == "cost" else f"{cell.kind}: {cell.label}"
            why[reason] = why.get(reason, 0) + 1
        lines.append({"page": name, "printed": sum(c.row is not None for c in printed_cells),
            "quoted": sum(c.kind == "quoted" for c in printed_cells), "counted on the page": counted,
            "of runs": len(ours), "rows planned": len(table.rows(preset)), "filled": len(ours) - len(empty),
            "not filled": "; ".join(f"{n} {reason}" for reason, n in list(why.items())[:4])})
    return pd.DataFrame(lines).set_index("page")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=ROOT / "data" / "runs" / "rehearsal")
    parser.add_argument("--without", nargs="*", default=[], help="sets to leave out, e.g. urbansyn mapillary")
    parser.add_argument("--only", nargs="*", help="pages, e.g. table4; default: all")
    parser.add_argument("--processes", type=int, default=2)
    a = parser.parse_args()
    os.environ |= {"REINPP_RUNS": str(a.folder / "runs"), "MPLBACKEND": "agg"}
    began, data, ledger = time.time(), a.folder / "data", Ledger(a.folder / "results")
    if not data.exists():
        make_trees(data, a.without)
        make_checkpoint(data)
        make_cityscapes_c(data / "cityscapes" / "leftImg8bit" / "val", data / "cityscapes_c", severities=(5,),
            progress="none")
    print(f"data: {time.time() - began:.0f} s", flush=True)
    foreign = a.folder / "runs" / "proposals" / "cityscapes_train_sam1_4"  # its run fails, the others go on
    if not foreign.exists():
        foreign.mkdir(parents=True)
        (foreign / "manifest.json").write_text("{}")
    runs = every_run()
    for attempt in (1, 2):
        failed = launch_local(runs.values(), a.processes, ledger, None, data, progress="none", workers=0)
        made = sum(ledger.path(e).exists() for e in runs.values())
        print(f"attempt {attempt}: {made} of {len(runs)} runs, {time.time() - began:.0f} s", flush=True)
        for why in dict.fromkeys(failed.values()):
            print(f"  {sum(w == why for w in failed.values())} failed: {why}", flush=True)
        shutil.rmtree(foreign, ignore_errors=True)
    answer(ledger)
    pages = run_pages(a.folder, a.only or list(tables()))
    table = filled(ledger)
    with pd.option_context("display.width", 250, "display.max_colwidth", 90): print(table.to_string())
    table.to_csv(a.folder / "filled.csv")
    for name, why in pages.items(): print(f"{name} failed: {why}")
    print(f"in all {(time.time() - began) / 60:.1f} min")
    hindered = [why for why in failed.values() if not any(why.startswith(name) for name in a.without)]
    return len(pages) + len(hindered)


if __name__ == "__main__":
    sys.exit(min(main(), 1))
