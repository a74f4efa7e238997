"Tables and the picture of a record."
import matplotlib.pyplot as plt
import pandas as pd

from .parts import PARTS

COLORS = dict(zip(PARTS, ("#4e79a7", "#f28e2b", "#59a14f", "#e15759", "#76b7b2", "#b07aa1", "#edc948", "#9c755f",
    "#bab0ac")))


def _measured(record):
    return [r for r in record["rows"] if "seconds" in r]


def _rounded(value, digits=1, scale=1):
    return None if value is None else round(value / scale, digits)


def table(record: dict) -> pd.DataFrame:
    "The measured rows; `skipped` names the others."
    lines = [{
        "row": r["row"], "path": r["path"], "precision": r["precision"], "batch": r["batch"],
        "held": r.get("hold", ""), "s a step": round(r["seconds"], 4), "fastest": round(r["fastest"], 4),
        "slowest": round(r["slowest"], 4), "images/s": round(r["images_per_second"], 2),
        "peak memory, MB": "not measured" if r["peak_memory"] is None else _rounded(r["peak_memory"], scale=1e6),
        "kept for backward, MB": _rounded(r["kept_bytes"], scale=1e6),
        "GFLOP": _rounded(r["operations"], scale=1e9),
        "% of peak": _rounded(r.get("share_of_peak"), scale=.01),
        **{f"% {part}": round(100 * share) for part, share in r["shares"].items()},
        "data, s": _rounded(r["data_seconds"], 4), "loss": _rounded(r["loss"], 2)} for r in _measured(record)]
    index = ["row", "path", "precision"]
    found = pd.DataFrame(lines, columns=None if lines else index).set_index(index)
    return found.astype(object).where(found.notna(), "")


def skipped(record: dict) -> str:
    "One line for each reason, with the rows and levers that were not measured for it."
    reasons = {}
    for r in (*record["rows"], *record["levers"]):
        if "skipped" in r:
            reasons.setdefault(r["skipped"], []).append(r.get("row") or r["lever"])
    lines = [f"not measured, {reason}: {', '.join(names)}" for reason, names in reasons.items()]
    return "\n".join(lines) or "all rows were measured"


def levers_table(record: dict) -> pd.DataFrame:
    "What each lever gives: without it / with it."
    def times(pair):
        return f"{pair['without'] / pair['given']:.2f}x" if pair and pair["given"] and pair["without"] else ""

    def mega(pair):
        return f"{pair['without'] / 1e6:.1f} → {pair['given'] / 1e6:.1f}" if pair and pair["without"] else ""

    def apart(difference):
        return "" if difference is None else f"{difference:.0e}" if difference else "0"
    lines = [{"lever": r["lever"], "time without / with": times(r.get("seconds")),
        "bytes without / with": times(r.get("bytes")), "MB": mega(r.get("bytes")),
        "largest difference": apart(r.get("difference")), "note": r["note"]}
        for r in record["levers"] if "skipped" not in r]
    return pd.DataFrame(lines, columns=None if lines else ["lever"]).set_index("lever")


def chart(record: dict) -> plt.Figure:
    "Seconds of a step by part, ours and the reference one under the other. Each row has its own axis."
    measured = _measured(record)
    rows = {name: [r for r in measured if r["row"] == name] for name in dict.fromkeys(r["row"] for r in measured)}
    heights = [len(paths) + 1 for paths in rows.values()]
    figure, axes = plt.subplots(len(rows), 1, figsize=(8, .6 + sum(.32 * h + .23 for h in heights)), squeeze=False,
        layout="constrained", gridspec_kw=dict(height_ratios=heights), dpi=80)
    for ax, (name, paths) in zip(axes[:, 0], rows.items()):
        for y, r in enumerate(paths):
            left = 0
            for part in PARTS:
                width = r["shares"].get(part, 0) * r["seconds"]
                ax.barh(y, width, left=left, color=COLORS[part], height=.75)
                left += width
        ax.set_yticks(range(len(paths)), [f"{r['path']} {r['precision']}" for r in paths], fontsize=8)
        ax.set_title(name, fontsize=9, loc="left")
        ax.tick_params(axis="x", labelsize=8)
        ax.invert_yaxis()
        ax.spines[["top", "right"]].set_visible(False)
    axes[-1, 0].set_xlabel("seconds a step", fontsize=8)
    shown = [part for part in PARTS if any(part in r["shares"] for r in measured)]
    figure.legend([plt.Rectangle((0, 0), 1, 1, color=COLORS[part]) for part in shown],
        [part.replace("rein_g", "Rein-G").replace("stm", "STM") for part in shown], loc="outside upper center",
        ncols=len(shown), fontsize=8, frameon=False)
    return figure
