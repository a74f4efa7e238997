"""The printed numbers in data/paper: complete, and every contradiction noted."""

import csv
from pathlib import Path

import pytest

PAPER = Path(__file__).resolve().parent.parent / "data" / "paper"
TOLERANCE = 0.06  # one decimal is printed: rounding alone explains 0.05
CLASSES = "Road S.walk Build. Wall Fence Pole Tr.Light Sign Vege. Terrain Sky Person Rider Car Truck Bus Train M.bike Bike".split()


@pytest.fixture(scope="module")
def table9():
    with open(PAPER / "table9.csv", encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def numbers(row):
    return [float(row[name]) for name in [*CLASSES, "mIoU"]]


def test_table9_is_complete(table9):
    assert list(table9[0]) == ["setting", "method", "publication", *CLASSES, "mIoU", "note"]
    assert all(None not in row and None not in row.values() for row in table9)
    counts = {}
    for row in table9:
        counts[row["setting"]] = counts.get(row["setting"], 0) + 1
    assert counts == {"GTAV -> Cityscapes (val)": 18, "Cityscapes -> ACDC (test)": 15, "Cityscapes -> Dark Zurich (test)": 11}
    assert len({(row["setting"], row["method"]) for row in table9}) == len(table9)
    assert sum(row["method"].startswith("Rein-A (") for row in table9) == 14
    assert all(0 <= value <= 100 for row in table9 for value in numbers(row))


def test_table9_means(table9):
    """Every printed mean is the mean of its row, but where the note says that it is not: in this table, nowhere."""
    wrong = {(row["setting"], row["method"]) for row in table9 if abs(sum(numbers(row)[:-1]) / len(CLASSES) - numbers(row)[-1]) > TOLERANCE}
    noted = {(row["setting"], row["method"]) for row in table9 if "mean of the row" in row["note"]}
    assert wrong == noted == set()


def test_table9_repeated_rows(table9):
    """Rows that are printed twice with the same numbers are noted, and no others."""
    groups = {}
    for row in table9:
        groups.setdefault(tuple(numbers(row)), []).append((row["setting"], row["method"]))
    repeated = {key for group in groups.values() if len(group) > 1 for key in group}
    noted = {(row["setting"], row["method"]) for row in table9 if "repeat" in row["note"]}
    assert repeated == noted == {("Cityscapes -> ACDC (test)", f"Rein-A ({name})") for name in ("Radio-G", "InternVL-6B")}


def test_table9_gains_that_the_text_names(table9):
    """Sec. VI-B: over MIC by 2.3 on GTAV -> Cityscapes, 8.0 on ACDC, 11.3 on Dark Zurich (each the best Rein-A)."""
    for start, gain in ("GTAV", 2.3), ("Cityscapes -> ACDC", 8.0), ("Cityscapes -> Dark", 11.3):
        rows = {row["method"]: float(row["mIoU"]) for row in table9 if row["setting"].startswith(start)}
        best = max(value for name, value in rows.items() if name.startswith("Rein-A"))
        assert best - rows["MIC"] == pytest.approx(gain, abs=TOLERANCE)
