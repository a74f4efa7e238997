"What judges a method fairly: IDD-Lite's folding, parts of a set, a domain of no table, and scores without labels."

import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from reinpp.data.catalog import open_dataset
from reinpp.data.datasets import take
from reinpp.data.scenes import draw_scene
from reinpp.labels import IDD_LITE_CLASSES, IDD_LITE_FOLD
from reinpp.paper.experiments import PRESETS, Ledger, open_domain, plan
from reinpp.training.evaluation import evaluate, fold_scores, scorecard

IDD = Path(__file__).resolve().parents[2] / "shared" / "data" / "idd_lite"
GROUPS = {0: [0], 1: [1, 9], 2: [11, 12], 3: [18, 17, 13, 14, 15, 16], 4: [3, 4, 5, 6, 7], 5: [2, 8], 6: [10]}


def idd_tree(root, labelled=("val",)):
    "IDD-Lite's layout, two images a split."
    for split in ("train", "val"):
        for n, name in ((17, "000123"), (32, "000123")):
            image = root / "leftImg8bit" / split / str(n) / f"{name}_image.jpg"
            image.parent.mkdir(parents=True)
            Image.new("RGB", (20, 12), (n * 5, 60, 90)).save(image)
            if split not in labelled: continue
            label = root / "gtFine" / split / str(n) / f"{name}_label.png"
            label.parent.mkdir(parents=True)
            ids = np.arange(240).reshape(12, 20) % 8
            Image.fromarray(np.where(ids == 7, 255, ids).astype(np.uint8)).save(label)
    return root


class Fixed(torch.nn.Module):
    "Predicts from the image by a function (B, 3, H, W) -> scores (B, 19, H, W)."

    num_classes = 19

    def __init__(self, function):
        super().__init__()
        self.function = function

    def predict(self, images, window=None, stride=None): return self.function(images)


def test_the_folding_is_the_published_one():
    assert {j: sorted(ids) for j, ids in GROUPS.items()} == {
        j: [c for c in range(19) if IDD_LITE_FOLD[c] == j] for j in range(7)}


@pytest.mark.parametrize("name", ["idd_lite", "IDD-Lite", "idd20k_lite"])
def test_the_folder_of_idd_lite_has_several_names(name, tmp_path):
    idd_tree(tmp_path / name)
    assert len(open_dataset("idd_lite", "val", tmp_path)) == 2


def test_idd_lite_is_read_and_a_split_without_labels_opens(tmp_path):
    root = idd_tree(tmp_path / "idd_lite")
    val, train = (open_dataset("idd_lite", split, tmp_path) for split in ("val", "train"))
    assert val.labelled and not train.labelled and len(val) == len(train) == 2 and train[0][1] is None
    assert val.classes == IDD_LITE_CLASSES and val.fold.tolist() == list(IDD_LITE_FOLD)
    assert sorted(val[1][1].unique().tolist()) == [0, 1, 2, 3, 4, 5, 6, 255]
    Image.fromarray(np.full((12, 20), 7, np.uint8)).save(root / "gtFine" / "val" / "17" / "000123_label.png")
    with pytest.raises(ValueError, match="label value 7"):
        val[0]


def test_scores_are_summed_before_the_largest_is_taken(tmp_path):
    idd_tree(tmp_path / "idd_lite")
    scores = torch.zeros(19)
    scores[[10, 13, 14, 15]] = torch.tensor([.4, .2, .2, .2])  # sky is the largest, vehicles together are larger
    assert fold_scores(scores[None], torch.tensor(IDD_LITE_FOLD))[0].argmax() == 3
    model = Fixed(lambda x: scores[None, :, None, None].expand(len(x), 19, *x.shape[-2:]))
    result = evaluate(model, open_dataset("idd_lite", "val", tmp_path))
    assert len(result["iou"]) == 7 and np.array(result["confusion"])[:, 3].sum() == np.sum(result["confusion"])
    assert result["iou"]["vehicles"] == pytest.approx(1 / 7) and result["iou"]["sky"] == 0


@pytest.mark.skipif(not IDD.is_dir(), reason="IDD-Lite is not here")
def test_the_real_idd_lite():
    train, val = (open_dataset("idd_lite", split, IDD) for split in ("train", "val"))
    assert (len(train), len(val)) == (1403, 102) and val.labelled and not train.labelled
    assert train[0][0].shape == (3, 227, 320) and val[0][1].shape == (227, 320)


def test_parts_of_a_domain():
    whole = open_domain("scenes:night/val[:8]")
    part = open_domain("scenes:night/val[3:8]")
    assert part.reader.names == whole.reader.names[3:8] and torch.equal(part[0][1], whole[3][1])
    assert len(open_domain("scenes:val[95:]")) == 5
    for wrong in ("scenes:val[5]", "scenes:val[a:]", "scenes:val[1:", "scenes:val[-3:]"):
        with pytest.raises(ValueError, match="a part is written"):
            open_domain(wrong)
    with pytest.raises(ValueError, match="8 images"):
        take(whole, 8, 9)


def test_parts_of_files(tmp_path):
    idd_tree(tmp_path / "idd_lite")
    second = open_domain("idd_lite:val[1:]", tmp_path)
    assert second.reader.names == ["32_000123_image"] and second.fold is not None and second[0][1] is not None


def test_the_scenes_that_no_table_reports():
    game, mono, day = (open_dataset("scenes", s, count=3) for s in ("game/train", "mono/train", "train"))
    assert torch.equal(game[1][0], open_dataset("scenes", "train", style="game", count=3)[1][0])
    image, label, _ = mono[0]
    assert torch.equal(image[0], image[2]) and label.shape == (128, 256)
    assert not set(mono.reader.seeds) & (set(game.reader.seeds) | set(day.reader.seeds))
    assert (draw_scene(mono.reader.seeds[0]).label == label.numpy()).all()
    reported = {d for p in PRESETS.values() for pair in p.targets.values() for d in pair}
    assert not [d for d in reported if "game" in d or "mono" in d]


@pytest.mark.parametrize("preset, setting, target", [
    ("idd", None, "idd"), ("idd", "scenes", "idd"), ("camvid", None, "dusk1-unseen"), ("camvid", None, "dusk2-seen"),
    ("tiny", "search", "game"), ("tiny", "search", "mono")])
def test_new_settings_are_planned(preset, setting, target):
    made = {m: plan(preset, m, 0, target if m == "rein_a" else None, setting=setting)
            for m in ("rein_g", "control", "rein_a")}
    assert len({e.key for e in made.values()}) == 3
    assert made["rein_a"].start.training_key == made["control"].start.training_key == made["rein_g"].training_key
    assert made["rein_a"].adaptation["engine"] == "classical"


def test_the_halves_of_the_dusk_video_do_not_touch():
    halves = "camvid:dusk_train[:31]", "camvid:dusk_train[33:]"
    for number, adapted in zip((1, 2), halves):
        seen, unseen = (plan("camvid", "rein_a", 0, f"dusk{number}-{part}") for part in ("seen", "unseen"))
        assert seen == unseen and seen.target == adapted, "one run is reported on both halves"
        assert set(seen.evaluate_on) == {"camvid:day_val", *halves} and len(seen.evaluate_on) == 3
    assert plan("camvid", "control").evaluate_on == plan("camvid", "rein_g").evaluate_on == ("camvid:day_val", *halves)


# ---------------------------------------------------------------- scores without labels

def constructed(function, teacher=None, pixels=200):
    "The scorecard on three scenes whose proposals are those of the labels."
    dataset = open_dataset("scenes", "val", count=3)

    class Store:
        def __getitem__(self, i):
            label = dataset.read_label(i).as_subclass(torch.Tensor)
            return SimpleNamespace(masks=torch.stack([label == c for c in label.unique()]))

    return scorecard(Fixed(function), dataset, Store(), teacher and Fixed(teacher), pixels=pixels)


def perfect(images):
    "The labels of the three scenes: from the image that they belong to, whichever side is left and what is hidden."
    dataset, found = open_dataset("scenes", "val", count=3), []
    for x in images:
        distances = []
        for i in range(3):
            image, label, _ = dataset[i]
            for flipped in (False, True):
                a, b = (t.flip(-1) if flipped else t for t in (image.as_subclass(torch.Tensor) / 255, label))
                distances.append(((a - x).abs().median().item(), (a - x).abs().mean().item(), b))
        label = min(distances, key=lambda d: d[1])[2].as_subclass(torch.Tensor)
        found.append(torch.nn.functional.one_hot(label.long(), 19).permute(2, 0, 1).float())
    return torch.stack(found)


def collapsed(images):
    return torch.eye(19)[0][None, :, None, None].expand(len(images), 19, *images.shape[-2:])


def chance(images):
    seed = int(images.double().sum().item() * 1000) % 2**31 + int(images[..., :9].double().sum().item() * 1000)
    return torch.rand(len(images), 19, *images.shape[-2:], generator=torch.Generator().manual_seed(seed))


def test_a_perfect_predictor_scores_well():
    card = constructed(perfect, perfect)
    for name in ("mirror_agreement", "mask_agreement", "teacher_agreement", "purity", "confidence"):
        assert card[name] == 1, name
    assert card["entropy"] == 0 and 0.3 < card["class_entropy"] < 1


def test_a_collapsed_predictor_is_seen_in_the_histogram_alone():
    card = constructed(collapsed)
    assert card["class_entropy"] == 0 and "teacher_agreement" not in card
    assert card["mirror_agreement"] == card["mask_agreement"] == card["purity"] == card["confidence"] == 1
    assert card["density"] == pytest.approx(math.log(199)), "the highest there is"


def test_a_random_predictor_scores_badly():
    card, again = constructed(chance, collapsed), constructed(chance, collapsed)
    assert card == again, "the same arguments, the same scores"
    for name in ("mirror_agreement", "mask_agreement", "teacher_agreement"):
        assert card[name] == pytest.approx(1 / 19, abs=0.01), name
    assert card["purity"] < 0.2 and card["confidence"] < 0.2
    assert card["entropy"] > 0.9 and card["class_entropy"] > 0.99
    assert card["density"] < constructed(collapsed)["density"]


def test_a_run_in_two_ledgers_is_one_run():
    "What the ledger shares with the search's folder is the same, byte for byte."
    ledger = Ledger().folder
    both = [file for file in (ledger / "search").glob("*.json") if (ledger / file.name).exists()]
    assert both and all(file.read_bytes() == (ledger / file.name).read_bytes() for file in both)
