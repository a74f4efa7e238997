"""The printed numbers in data/paper: complete, and noted exactly where the paper disagrees with itself."""

import csv
import re
from collections import Counter, defaultdict
from pathlib import Path

import pytest

PAPER = Path(__file__).resolve().parent.parent / "data" / "paper"
PRINTED = PAPER.parents[2] / "shared" / "paper.txt"  # the paper's text, where it lies beside the checkout
TOLERANCE = 0.06  # of a printed mean or difference with one decimal
KINDS = {"mean", "elsewhere", "repeats", "setting", "reference", "storage", "text", "caption", "remark"}
CLASSES = ("Road S.walk Build. Wall Fence Pole Tr.Light Sign Vege. Terrain Sky Person Rider Car Truck Bus Train M.bike "
    "Bike").split()
COST = ["backbone", "method", "Batch Size", "Training Time (h)", "GPU Memory (GB)",
    "Storage of Trainable Parameters (GB)"]
CITYS = ("Citys", "BDD", "Map", "Average")
GROUPS = {"GTAV (source)": CITYS, "Urbansyn + Synthia + GTAV": CITYS, "Cityscapes (source)": ("ACDC (val)", *CITYS[1:])}
WEATHERS = [f"ACDC (test): {c}" for c in "Night Snow Fog Rain".split()]
CORRUPTIONS = [f"Cityscapes-C (level-5): {group} {c}" for group, names in dict(
    Blur="Motion Defoc Glass Gauss", Noise="Gauss Impul Shot Speck", Digital="Bright Contr Satur JPEG",
    Weather="Snow Spatt Fog Frost").items() for c in names.split()]
LAYOUT = {  # table: columns in the printed order without the note, number of rows
    1: ("Methods GTR AdvStyle TLDR HRDA BlineNet SCSD CLIP-L EVA02-L DINOv2-l Radio-G DINOv2-G InternVL-6B".split(), 7),
    2: ("setting method reference publication Citys. ACDC BDD. Map. Avg.".split(), 42),
    3: (["backbone", "backbone_reference", "method", "reference", "Trainable Params",
    *(f"{g}: {c}" for g, names in GROUPS.items() for c in names)], 25),
    4: (["method", *WEATHERS, "ACDC (test): All", *CORRUPTIONS, "Cityscapes-C (level-5): Avg."], 2),
    5: (["backbone", "backbone_reference", "method", "Trainable Params", *CLASSES, "mIoU"], 7),
    6: ("backbone|backbone_reference|Rank r|4|8|16|32|64".split("|"), 5),
    7: (COST, 5),
    8: ("Token length (m)|25|50|100|150|200".split("|"), 2),
    9: (["setting", "method", "reference", "publication", *CLASSES, "mIoU"], 44),
    10: (["method", *CLASSES, "mIoU"], 5),
    11: (["method", "reference", *CLASSES, "mIoU"], 2),
    12: (COST, 4),
    13: (["alpha", *(f"beta = 10^{e}" for e in ("-1", "-0.5", "0", "0.5", "1"))], 3)}
WORDS = {"setting", "method", "reference", "publication", "backbone", "backbone_reference", "Methods", "Rank r",
    "Token length (m)", "alpha", "note"}
SETTINGS = {2: {"GTAV -> Citys.+BDD.+Map.": 19, "GTAV+Urbansyn+Synthia -> Citys.+BDD.+Map.": 9,
    "Citys -> ACDC (val)+BDD.+Map.": 14},
    9: {"GTAV -> Cityscapes (val)": 18, "Cityscapes -> ACDC (test)": 15, "Cityscapes -> Dark Zurich (test)": 11}}


def load(name):
    with open(PAPER / f"{name}.csv", encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


TABLES, CLAIMS = {n: load(f"table{n}") for n in LAYOUT}, load("text")
FIGURES = {name: load(name) for name in ("fig1", "fig2", "fig6")}


def number(cell):
    "A printed cell as a number (parameters in millions); None for a dash, N/A or an empty cell."
    if cell in ("", "-", "N/A"): return None
    return float(cell.rstrip("MB")) * (1000 if cell.endswith("B") else 1)


def markers(rows, kind):
    "(row index, argument) of every marker of a kind, e.g. `[mean Avg. = 66.73]`."
    return [(i, argument) for i, row in enumerate(rows)
        for found, argument in re.findall(r"\[([a-z]+)(?: ([^\[\]]+))?\]", row["note"]) if found == kind]


def noted(kind):
    return Counter((n, i, argument) for n, rows in TABLES.items() for i, argument in markers(rows, kind))


# --- form

@pytest.mark.parametrize("n", LAYOUT)
def test_form(n):
    columns, count = LAYOUT[n]
    rows = TABLES[n]
    assert list(rows[0]) == [*columns, "note"] and len(rows) == count
    assert all(None not in row and None not in row.values() for row in rows), "a row is too long or too short"
    assert len({tuple(row[c] for c in columns) for row in rows}) == count, "a row is there twice"
    names = [tuple(row[c] for c in columns if c in WORDS or c in ("Trainable Params", "Batch Size")) for row in rows]
    assert len(set(names)) == count, "two rows have one name"
    assert "setting" not in columns or Counter(row["setting"] for row in rows) == SETTINGS[n]
    for i, row in enumerate(rows):
        for c in columns:
            if c in WORDS or (n == 1 and i < 3): continue
            where = f"table{n}.csv, row {i}, {c}: {row[c]!r}"
            if row[c] == "-":
                assert n in (2, 3), where
            elif row[c] == "N/A":
                assert n in (7, 12), where
            elif row[c] == "":
                assert n == 2 and (c == "ACDC") == (not row["setting"].startswith("Citys ->")) and c in ("ACDC",
                    "Citys."), where
            elif c == "Trainable Params" or row.get("Rank r") == "Params":
                assert re.fullmatch(r"\d+(\.\d+)?[MB]", row[c]), where
            elif n in (7, 12):
                assert re.fullmatch(r"\d+(\.\d+)?", row[c]), where
            elif row.get("Token length (m)", "").startswith("Trainable"):
                assert re.fullmatch(r"\d\.\d\d", row[c]), where
            else:
                assert re.fullmatch(r"\d+\.\d", row[c]) and 0 <= number(row[c]) <= 100, where


def test_files():
    assert {f.name for f in PAPER.iterdir()} == {f"table{n}.csv" for n in range(1, 14)} | {f"{name}.csv"
        for name in FIGURES} | {"text.csv", "README.md"}
    for rows in [*TABLES.values(), *FIGURES.values(), CLAIMS]:
        for row in rows:
            assert (row["note"] == "") == (
                re.match(r"\[[a-z]+( |\])", row["note"]) is None), f"a note begins with its marker: {row['note']}"
            assert {kind for kind, _ in re.findall(r"\[([a-z]+)( [^\[\]]+)?\]", row["note"])} <= KINDS


def test_table9_rows_of_rein_a():
    assert sum(row["method"].startswith("Rein-A (") for row in TABLES[9]) == 14
    assert all((row["publication"] == "") == (row["reference"] == "") == row["method"].startswith("Rein-A")
        for row in TABLES[9])


# --- means

def means():
    "Every printed mean: table, row of the mean, column, the numbers it is the mean of, the mean."
    def block(n, columns, mean, keep=lambda row: True):
        return [(n, i, mean, [number(row[c]) for c in columns if row[c]], number(row[mean])) for i,
            row in enumerate(TABLES[n]) if keep(row) and number(row[mean]) is not None]
    found = block(2, ("Citys.", "ACDC", "BDD.", "Map."), "Avg.") + block(4, CORRUPTIONS, "Cityscapes-C (level-5): Avg.")
    for group, names in GROUPS.items():
        found += block(3, [f"{group}: {c}" for c in names[:3]], f"{group}: Average")
    for n in (5, 9, 10, 11):
        found += block(n, CLASSES, "mIoU")
    for n, first, last in (1, 3, 6), (6, 1, 4):  # here a column has its mean in the last row
        found += [(n, last, c, [number(TABLES[n][i][c]) for i in range(first, last)], number(TABLES[n][last][c]))
            for c in LAYOUT[n][0] if c not in WORDS]
    return found


def test_means():
    """Every printed mean is the mean of its numbers, but where a note says that it is not, and what it is.

    The numbers are rounded before they are averaged here, so less than 0.1 need not be a mistake; the words of the note
    tell the two apart."""
    assert len(means()) == 12 + 39 + 73 + 2 + 7 + 5 + 44 + 5 + 2
    wrong = {(n, i, f"{c} = {sum(v) / len(v):.2f}"): abs(sum(v) / len(v) - m) for n, i, c, v, m in means()
        if abs(sum(v) / len(v) - m) > TOLERANCE}
    assert Counter(wrong.keys()) == noted("mean")
    for (n, i, argument), off in wrong.items():
        part = TABLES[n][i]["note"].split(f"[mean {argument}]")[1].split("[")[0]
        assert ("more than rounding can explain" in part) == (off > .1 - 1e-6), (n, i, argument)
    assert sorted((n, round(off, 1)) for (n, _, _), off in wrong.items() if off > .1 - 1e-6) == [(1, .2), (2, .1),
        (2, .1), (2, .1), (2, .2), (3, .2), (5, .1), (5, .7), (10, 2.0)]


def test_all_of_acdc_is_no_mean_of_its_weathers():
    "ACDC (test) `All` is one IoU over all images: 1.4 above the mean of the four in both rows of Table IV."
    assert [round(number(row["ACDC (test): All"]) - sum(number(row[c]) for c in WEATHERS) / 4, 1)
        for row in TABLES[4]] == [1.4, 1.4]


# --- the same result in several tables

BACKBONES = {"CLIP-L": "CLIP-L CLIP-Large CLIP (ViT-Large)", "EVA02-L": "EVA02-L EVA02-Large EVA02 (Large)",
    "DINOv2-L": "DINOv2-L DINOv2-l DINOv2-Large DINOv2 (Large)",
             "DINOv2-G": "DINOv2-G DINOv2-Giant DINOv2 (Giant)", "Radio-G": "Radio-G Radio-Giant Radio (Giant)",
             "InternVL-6B": "InternVL-6B InternVL-c (6B)"}
BACKBONES = {name: short for short, names in BACKBONES.items() for name in re.findall(r"\S+(?: \(\S+\))?", names)}
# as the text cites the backbones
CITED = {"CLIP-L": "[1]", "EVA02-L": "[40]", "DINOv2-L": "[2]", "DINOv2-G": "[2]", "Radio-G": "[36]",
    "InternVL-6B": "[3]"}


def results():
    "Every number that another table may print too: (source, target, method, backbone), table, row, column, value."
    targets = dict(zip(("Citys.", "ACDC", "BDD.", "Map.", "Avg."), ("Citys", "ACDC (val)", "BDD", "Map", "Average")))
    def named(method, backbone=""):
        return {"GTR-LTR": "GTR"}.get(method, method), BACKBONES.get(backbone, backbone)
    for i, target in enumerate(("Citys", "BDD", "Map", "Average"), 3):
        for c in LAYOUT[1][0][1:]:
            yield ("GTAV", target, *(named("Freeze", c) if c in BACKBONES else named(c))), 1, i, c, TABLES[1][i][c]
    for i, row in enumerate(TABLES[2]):
        method = named(*row["method"].split(" + ")) if " + " in row["method"] else named(row["method"])
        for c, target in targets.items():
            yield (row["setting"].split(" ->")[0], target, *method), 2, i, c, row[c]
    for i, row in enumerate(TABLES[3]):
        method = row["method"].removeprefix("+ ") + (" " + row["Trainable Params"]
            if row["method"] in ("+ AdvStyle", "+ PASTA") else "")
        for (group, names), source in zip(GROUPS.items(), ("GTAV", "GTAV+Urbansyn+Synthia", "Citys")):
            for c in names:
                yield (source, c, *named(method, row["backbone"])), 3, i, f"{group}: {c}", row[f"{group}: {c}"]
    for i, row in enumerate(TABLES[5]):
        if row["method"] in ("Full", "Freeze", "+ GELU"):
            yield ("GTAV", "Citys", row["method"].replace("+ GELU", "Rein-G"), "DINOv2-L"), 5, i, "mIoU", row["mIoU"]
    for i, target in enumerate(CITYS, 1):
        yield ("GTAV", target, "Rein-G", "DINOv2-L"), 6, i, "16", TABLES[6][i]["16"]
    yield ("GTAV", "Citys", "Rein-G", "DINOv2-L"), 8, 1, "100", TABLES[8][1]["100"]
    for n, rows in (9, TABLES[9]), (10, TABLES[10]), (11, TABLES[11]):
        for i, row in enumerate(rows):
            rein_a = row["method"] in ("Rein-A", "with SAM2")
            key = (row.get("setting", "GTAV -> Cityscapes (val)"), "Rein-A (DINOv2-L)" if rein_a else row["method"])
            for c in (*CLASSES, "mIoU"):
                yield (*key, c), n, i, c, row[c]


def test_tables_agree_with_each_other():
    "One method in one setting has one number in all tables, but where both sides note the other's."
    groups, wanted, shared = defaultdict(list), Counter(), 0
    for key, *place, value in results():
        if value not in ("", "-"):
            groups[key].append((*place, value))
    for key, group in groups.items():
        assert len({n for n, *_ in group}) == len(group), f"{key} is twice in one table"
        shared += len(group) > 1
        for n, i, c, value in group:
            wanted.update((n, i, c, other, m) for m, _, _, other in group if other != value)
    found = Counter()
    for n, i, argument in noted("elsewhere"):
        column, value, tables = re.fullmatch(r"(.+) = (\S+) in (.+)", argument).groups()
        found.update((n, i, column, value, int(t.removeprefix("table"))) for t in tables.split(", "))
    assert found == wanted and shared > 100
    parameters = {r["method"].removeprefix("+ "): number(r["Trainable Params"]) for r in TABLES[5]}
    assert parameters["GELU"] == number(TABLES[6][0]["16"]) == number(TABLES[8][0]["100"]) == number(
        next(r for r in TABLES[3] if r["method"] == "+ Rein-G")["Trainable Params"])


def test_repeated_rows():
    "Rows of one table with the same numbers are noted, each with the name of the other."
    wanted = Counter()
    for n in (2, 3, 4, 5, 9, 10, 11):
        numbers = [c for c in LAYOUT[n][0] if c not in WORDS and c != "Trainable Params"]
        keys = [tuple(number(row[c]) for c in numbers if row[c]) for row in TABLES[n]]
        for i, a in enumerate(TABLES[n]):
            for j, b in enumerate(TABLES[n]):
                if a is not b and keys[i] == keys[j]:
                    wanted[n, i, b["method"] if a["method"] != b["method"] else b["setting"]] += 1
    assert wanted == noted("repeats") and len(wanted) == 4


def test_references_of_the_backbones():
    cited = {(1, 1, c, TABLES[1][1][c]) for c in LAYOUT[1][0] if c in BACKBONES}
    wanted = {(n, i, f"{c} = {CITED[BACKBONES[c]][1:-1]}") for n, i, c, r in cited if r != CITED[BACKBONES[c]]}
    for n, column in (2, "reference"), (3, "backbone_reference"), (5, "backbone_reference"), (6, "backbone_reference"):
        for i, row in enumerate(TABLES[n]):
            name = BACKBONES.get(row["method"].split(" + ")[-1] if n == 2 else row["backbone"])
            if name and row[column] != CITED[name]:
                wanted.add((n, i, f"{column} = {CITED[name][1:-1]}"))
    wanted |= {(4, i, "Cityscapes-C = 110, 111") for i in range(2)}  # the head of Table IV says [105]
    assert noted("reference") == Counter(wanted) and len(wanted) == 5


def test_storage():
    "Trained parameters at four bytes: no reading (GB or GiB, with or without the head) gives both of Full's figures."
    parameters = {row["backbone"]: number(row["Trainable Params"]) for row in TABLES[3] if row["method"] == "Full"}
    printed = {row["backbone"]: row[COST[-1]] for n in (7, 12) for row in TABLES[n] if row["method"] == "Full"}
    assert printed == {"DINOv2 (Large)": "1.22", "DINOv2 (Giant)": "4.35"}
    for unit in (1e9, 2 ** 30):
        for head in (0, 20_565_204):  # Mask2Former on ViT-L features
            given = {b for b, p in printed.items() if f"{4 * (1e6 * parameters[b] + head) / unit:.2f}" == p}
            assert given != set(printed)
    wanted = {(n, i, f"{COST[-1]} = 4.56") for n in (7, 12) for i, row in enumerate(TABLES[n])
        if (row["backbone"], row["method"]) == ("DINOv2 (Giant)", "Full")}
    assert noted("storage") == Counter(wanted) and 4 * parameters["DINOv2 (Giant)"] / 1000 == pytest.approx(4.56)


def test_settings_that_cannot_be():
    "Table VI's ranks look tested in different settings; Table XIII's caption names another target than its number's."
    citys, bdd, average = (TABLES[6][i] for i in (1, 2, 3))
    assert all(number(bdd[r]) - number(bdd["16"]) > 2 and number(citys["16"]) - number(citys[r]) > 1
        and number(average["16"]) - number(average[r]) > 1 for r in ("4", "8", "32", "64"))
    centre = TABLES[13][1]["beta = 10^0"]
    assert [row["setting"] for row in TABLES[9] if row["method"] == "Rein-A (DINOv2-L)"
        and row["mIoU"] == centre] == ["GTAV -> Cityscapes (val)"]
    assert noted("setting") == Counter([(6, 2, "16 = 61.1"), (13, 1, "beta = 10^0 = 76.9 in table9")])


def test_read_only():
    "What no arithmetic shows: a name in a caption, and rows that are known from elsewhere."
    assert noted("caption") == Counter([(10, 0, "")]) and noted("remark") == Counter([(4, 1, "")])


# --- what the text says about the tables

def select(n, keys):
    hits = [i for i, row in enumerate(TABLES[n]) if all(k in row.values() for k in keys.split("; "))]
    assert len(hits) == 1, f"table{n}{{{keys}}} selects {len(hits)} rows"
    return hits[0]


CELL = re.compile(r"table(\d+)\{([^}]*)\}\[([^\]]*)\]")


def computed(expression):
    "The value of an expression over `tableN{row; row}[column]`."
    plain = CELL.sub(lambda m: repr(number(TABLES[int(m[1])][select(int(m[1]), m[2])][m[3]])), expression)
    assert re.fullmatch(r"(?:[\d.+*/(), -]|min|max)+", plain), plain
    return eval(plain, {"__builtins__": {}, "min": min, "max": max})


def test_text():
    """Every figure and comparison of the text is what the tables give, but where its note says that it is not.

    `printed relation computed` holds: with `=` to 0.6 of the last printed digit; `0 < min(...)` says that something is
    always ahead."""
    assert list(CLAIMS[0]) == ["id", "place", "quote", "printed", "relation", "expression", "computed", "note"]
    assert len({row["id"] for row in CLAIMS}) == len(CLAIMS)
    wrong = set()
    for row in CLAIMS:
        if row["relation"] == "read":
            assert row["expression"] == row["computed"] == ""
            if all(r["reference"] != f"[{row['printed']}]" for r in TABLES[9]):
                wrong.add(row["id"])
            continue
        p, v = float(row["printed"]), computed(row["expression"])
        assert row["computed"] == f"{v:.2f}", row["id"]
        digit = 10.0 ** -len(row["printed"].partition(".")[2])
        if not {"=": abs(p - v) <= .6 * digit + 1e-9, "<": p < v - 1e-9, ">": p > v + 1e-9}[row["relation"]]:
            wrong.add(row["id"])
    assert wrong == {CLAIMS[i]["id"] for i, _ in markers(CLAIMS, "text")}
    assert not any(row["note"] and row["id"] not in wrong for row in CLAIMS)
    assert wrong >= {"over_tqdm", "over_resnet101", "params_rein_g", "memory_6b_fig2", "memory_6b_full"}
    # a row that a wrong claim is about names the claim
    pointed = {(argument, n) for n, rows in TABLES.items() for _, argument in markers(rows, "text")}
    assert {argument for argument, _ in pointed} <= wrong
    for row in CLAIMS:
        tables = {int(n) for n, *_ in CELL.findall(row["expression"])}
        assert {n for argument, n in pointed if argument == row["id"]} == (tables if row["id"] in wrong else set()), row
    of_figures = {argument for rows in FIGURES.values() for _, argument in markers(rows, "text")}
    assert of_figures == {"memory_6b_fig2", "params_rein_g", "params_full"}


def test_table9_gains_are_those_of_the_best_rows():
    "Sec. VI-B: over MIC by 2.3 on GTAV -> Cityscapes, 8.0 on ACDC, 11.3 on Dark Zurich, each by the best Rein-A."
    for start, gain in ("GTAV", 2.3), ("Cityscapes -> ACDC", 8.0), ("Cityscapes -> Dark", 11.3):
        rows = {row["method"]: float(row["mIoU"]) for row in TABLES[9] if row["setting"].startswith(start)}
        best = max(value for name, value in rows.items() if name.startswith("Rein-A"))
        assert best - rows["MIC"] == pytest.approx(gain, abs=TOLERANCE)


def test_readme_lists_every_contradiction():
    text = (PAPER / "README.md").read_text(encoding="utf-8")
    for n, _, argument in noted("mean"):
        assert argument.rsplit(" = ", 1)[1] in text, f"table{n}: {argument}"
    for row in CLAIMS:
        assert (f"`{row['id']}`" in text) == bool(row["note"]), row["id"]
    for n, rows in TABLES.items():
        assert f"`table{n}.csv` | {len(rows)} |" in text, n


# --- against the paper's own text

def squeeze(text):
    return re.sub(r"\s+", "", text)


@pytest.fixture(scope="module")
def regions():
    if not PRINTED.exists():
        pytest.skip("the paper's text is not here")
    lines, at = PRINTED.read_text(encoding="utf-8").splitlines(), {}
    roman = dict(zip("I II III IV V VI VII VIII IX X XI XII XIII".split(), range(1, 14)))
    for k, line in enumerate(lines):
        if (m := re.fullmatch(r"\s*TABLE ([IVX]+)\s*", line)):
            at[roman[m[1]]] = k
    assert sorted(at) == list(range(1, 14))
    # a table ends where the next begins, or after 80 lines; prose between them has no lines of the tables' form
    return {n: [line for line in lines[k:min([j for j in at.values() if j > k] + [k + 80])]] for n, k in at.items()}


@pytest.mark.parametrize("n", LAYOUT)
def test_against_the_paper(regions, n):
    "Every row is a printed line, cell by cell and in order; every printed line that looks like a row is one."
    region, rows = regions[n], TABLES[n]
    def cells(row):
        return [row[c] for c in LAYOUT[n][0] if c != "setting"]
    if n in (7, 12):  # merged cells: look for time, memory and storage
        text = " ".join(region).split("ERRORS.")[1]
        for row in rows:
            time, memory = (row[c] for c in COST[3:5])
            assert re.search(r"\bN/A N/A\b" if time == "N/A" else rf"\b{time} h {memory} GB", text), row
        assert Counter(re.findall(r"\d+(?:\.\d+)?(?= ?(?:h|GB))|N/A", text)) == Counter(
            [row[c] for row in rows for c in COST[3:5]]
            + [row[COST[-1]] for i, row in enumerate(rows) if not (n == 7 and i == 3)])
        return
    region = [squeeze(line) for line in region]
    first = {3: 2, 5: 2, 6: 2}.get(n, 0)  # cells of the backbone are merged over rows: leave them out
    lines = ["".join(cells(row)[first:]) for row in rows]
    if n == 1:
        lines = ["Methods" + "".join(c + TABLES[1][1][c] for c in LAYOUT[1][0][1:]), *lines[2:]]
    block, at = -1, 0
    for i, line in enumerate(map(squeeze, lines)):
        for k in range(at, len(region)):
            block += region[k].startswith(("Synthetic-to-Real:", "Real-to-Real:", "Day-to-"))
            if region[k] == line or n == 3 and region[k].endswith("]" + line): break
        else:
            pytest.fail(f"table{n}.csv: {line} is not printed after the row before it")
        assert n not in SETTINGS or rows[i]["setting"] == list(SETTINGS[n])[block], line
        at = k + 1
    decimals = {1: 12, 2: 2, 3: 8, 4: 20, 5: 20, 6: 5, 8: 5, 9: 20, 10: 20, 11: 20, 13: 5}[n]
    looks = [line for line in region if len(re.findall(r"\d+\.\d(?!%)", line)) >= decimals and "→" not in line]
    assert len(looks) == len(rows) - (3 if n == 1 else 0), looks


def test_quotes(regions):
    "Every quote of text.csv stands in the paper."
    def plain(text):
        for a, b in ("α", "alpha"), ("β", "beta"), ("−", "-"):
            text = text.replace(a, b)
        return re.sub(r"[^a-z0-9.%]", "", re.sub(r"\[\d+\]", "", text).lower())
    paper = plain(PRINTED.read_text(encoding="utf-8"))
    missing = [row["quote"] for row in CLAIMS if not all(plain(part) in paper for part in row["quote"].split("[...]"))]
    assert not missing
