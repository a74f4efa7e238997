"""Tables from what is on the disk: the ledger, the bundled adapters, and what docs/card.py counted."""

import csv
import json
from pathlib import Path

from reinpp.paper.experiments import METHODS, PRESETS, Ledger, plan
from reinpp.paper.report import found, in_percent

ROOT = Path(__file__).resolve().parent.parent
SMALL = "tiny", "camvid", "idd"
# Method, target and setting of the paper preset's main runs.
MAIN = (("rein_g", None, None), ("rein_a", "citys", None), ("rein_a", "acdc", "cityscapes"),
    ("rein_a", "darkzurich", "cityscapes"))


def table(rows):
    "A Markdown table of dictionaries with the same keys."
    lines = [list(rows[0]), ["---"] * len(rows[0]), *([str(value) for value in row.values()] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def scores(records, split):
    "The mIoU of a split over records, in per cent; empty without any."
    values = [r["metrics"][split]["miou"] for r in records if split in r["metrics"]]
    return f"{in_percent(values)} (n={len(values)})" if values else ""


def planned(preset, method, target=None, **changes):
    "A zoo's row: a preset's run, and what the ledger has of it over seeds."
    return plan(preset, method, target=target, **changes), found(preset, dict(method=method) | changes, target)


def measured():
    "One row for each run of a small preset that the ledger has, and each of its test splits."
    rows, seen = [], set()
    for preset in SMALL:
        for method in METHODS:
            for target in PRESETS[preset].targets if method == "rein_a" else (None,):
                run, records = planned(preset, method, target)
                if run.key in seen: continue  # one run that serves two targets
                seen.add(run.key)
                for split in run.evaluate_on if records else ():
                    rows.append({"preset": preset, "method": method, "source": run.source,
                        "adapted to": run.target or "", "proposals": (run.adaptation or {}).get("engine", ""),
                        "tested on": split, "mIoU": scores(records, split)})
    earlier = [len(list(folder.glob("*.json"))) for folder in sorted((ROOT / "data" / "results").glob("v*/"))]
    note = f"\n\nBesides, {sum(earlier)} records of earlier versions, which do not count here." if earlier else ""
    return (table(rows) if rows else "No run of this version is in the ledger yet.") + note


def weights():
    "One row for each bundled adapter."
    by_key = {}
    for preset in SMALL[:2]:
        for method, target in (("rein_g", None), *(("rein_a", t) for t in PRESETS[preset].targets)):
            for seed in range(3):
                run = plan(preset, method, seed, target)
                by_key[run.training_key] = run
    rows = []
    for file in sorted((ROOT / "data" / "weights").glob("*/adapter_config.json")):
        config = json.loads(file.read_text())
        run = by_key.get(config["record"]["key"])
        record = run and Ledger().get(run)
        tested = record["metrics"] if record else ()
        said = "; ".join(f"{split} {scores([record], split).split()[0]}" for split in tested)
        size = file.with_name("adapter_model.safetensors").stat().st_size
        rows.append({"folder": f"`{file.parent.name}`", "run": config["record"]["run"], "MB": f"{size / 1e6:.1f}",
            "sha256": f"`{config['sha256'][:12]}`", "mIoU": said})
    return table(rows)


def paper():
    "One row for each main run of the paper preset, with an empty cell where the ledger has none."
    rows = []
    for backbone in ("clip_large", "eva02_large", "dinov2_large", "dinov2_giant", "radio_giant", "internvl_6b"):
        for method, target, setting in MAIN:
            run, records = planned("paper", method, target, setting=setting, model=dict(backbone=backbone))
            for split in run.evaluate_on if method == "rein_g" else run.evaluate_on[-1:]:
                rows.append({"backbone": backbone, "method": method, "source": run.source, "tested on": split,
                    "mIoU": scores(records, split)})
    return table(rows)


# ---- What `make proofs` found

LOST = ("other_states", "accepted", "silent_differences", "other_errors", "hangs", "deaths", "lost_files", "not_named",
        "made_anew", "fetched_elsewhere", "written_outside", "descriptors_left")  # counts of what went wrong


def proofs():
    "One row for each count that tests/proofs/ has noted."
    file = ROOT / "tests" / "proofs" / "results.json"
    if not file.exists(): return "No results yet: `make proofs` notes them."
    rows = []
    for what, counts in json.loads(file.read_text()).items():
        often = ", ".join(f"{number} {name.replace('_', ' ')}" for name, number in counts.items() if name not in LOST)
        lost = [f"{counts[name]} {name.replace('_', ' ')}" for name in LOST if counts.get(name)]
        rows.append({"what was tried": what, "how often": often, "what was lost": ", ".join(lost) or "nothing"})
    return table(rows)


# ---- What fits a card


def card(what="rein_g"):
    "One row for each backbone, way to hold it and batch: gigabytes counted, and which cards they fit."
    rows = []
    with (ROOT / "docs" / "card.csv").open() as file:
        for r in csv.DictReader(file):
            if r["what"] != what: continue
            parts = [int(r[key]) / 1e9 for key in ("frozen", "trained", "kept")]
            again = "yes" if r["checkpointing"] == "True" else "no"
            row = {"backbone": r["backbone"], "batch": r["batch"], "hold": r["hold"], "checkpointing": again}
            row |= {name: f"{part:.1f}" for name, part in zip(("weights", "trained", "for backward"), parts)}
            row["sum"] = f"**{sum(parts):.1f}**"
            for size in (12, 24, 48, 80):
                row[f"{size} GB"] = "fits" if sum(parts) <= .8 * size else "tight" if sum(parts) <= size else "no"
            rows.append(row)
    return table(rows)
