"Evaluation against other implementations, absent classes, sizes, batches, and what it refuses."
import json
import math

import numpy as np
import pytest
import torch
from torch.nn.functional import interpolate
from torchmetrics.classification import MulticlassJaccardIndex

from reinpp.datasets import Dataset, open_dataset
from reinpp.evaluate import evaluate, iou_from_confusion


class Maps:
    "Reader of given images and labels."
    def __init__(self, pairs): self.pairs, self.names = pairs, [str(i) for i in range(len(pairs))]
    def image(self, i): return self.pairs[i][0]
    def label(self, i): return self.pairs[i][1]


class Table(torch.nn.Module):
    "Predicts the class that the red channel names, and records how it is called."
    def __init__(self, num_classes=19): super().__init__(); self.num_classes, self.calls = num_classes, []
    def predict(self, images, window=None, stride=None):
        assert not self.training and torch.is_inference_mode_enabled()
        self.calls.append((tuple(images.shape), window, stride))
        return torch.nn.functional.one_hot((images[:, 0] * 255).round().long(), self.num_classes).permute(0, 3, 1, 2).float()


def random_set(sizes, K=19, evaluated=None, labels=True, seed=0, classes=None):
    rng = np.random.default_rng(seed)
    pairs = []
    for h, w in sizes:
        label = rng.integers(0, K - 2, (h, w), dtype=np.uint8)  # two classes are nowhere in the truth
        guess = np.where(rng.random((h, w)) < .6, label, rng.integers(0, K - 1, (h, w), dtype=np.uint8)).astype(np.uint8)  # and one nowhere at all
        label[rng.random((h, w)) < .1] = 255
        pairs.append((np.repeat(guess[..., None], 3, 2), label))
    return Dataset("random", "val", Maps(pairs), evaluated, labels, classes or [f"class {i}" for i in range(K)])


SIZES = [(8, 12)] * 5 + [(12, 8)] * 2 + [(8, 12)] * 3


def test_agrees_with_torchmetrics_and_numpy():
    ds = random_set(SIZES)
    result = evaluate(Table(), ds)
    metric = MulticlassJaccardIndex(19, ignore_index=255, average=None)
    union, hit, right, counted = np.zeros(19), np.zeros(19), 0, 0
    for image, label in ds.reader.pairs:
        guess = image[..., 0]
        metric.update(torch.from_numpy(guess.copy()).long(), torch.from_numpy(label).long())
        valid = label != 255
        right, counted = right + (guess == label)[valid].sum(), counted + valid.sum()
        for c in range(19): hit[c] += ((guess == c) & (label == c)).sum(); union[c] += (((guess == c) | (label == c)) & valid).sum()
    iou = np.array(list(result["iou"].values()))
    with np.errstate(invalid="ignore"): np.testing.assert_allclose(iou, hit / union, atol=1e-12)
    np.testing.assert_allclose(np.nan_to_num(iou), np.nan_to_num(metric.compute().numpy()), atol=1e-6)
    assert math.isnan(iou[18]) and iou[17] == 0  # absent from both; predicted but never true
    assert result["miou"] == pytest.approx(np.nanmean(iou)) and result["pixel_accuracy"] == pytest.approx(right / counted)
    assert result["images"] == 10 and np.array(result["confusion"]).shape == (19, 19) and np.array(result["confusion"]).sum() == counted
    json.dumps(result)


@pytest.mark.parametrize("batch", [1, 3, 100])
def test_batches_change_nothing(batch):
    ds, table = random_set(SIZES), Table()
    assert json.dumps(evaluate(table, ds, batch=batch)) == json.dumps(evaluate(Table(), ds))
    assert sum(shape[0] for shape, *_ in table.calls) == 10 and max(shape[0] for shape, *_ in table.calls) <= batch
    assert len(table.calls) == {1: 10, 3: 4, 100: 3}[batch]


def test_only_the_sets_classes_count():
    full, part = evaluate(Table(), random_set(SIZES)), evaluate(Table(), random_set(SIZES, evaluated=(0, 5, 18)))
    assert {n for n, v in part["iou"].items() if v == v} == {"class 0", "class 5"} and part["iou"]["class 5"] == full["iou"]["class 5"]
    assert part["miou"] == pytest.approx((full["iou"]["class 0"] + full["iou"]["class 5"]) / 2) and part["confusion"] == full["confusion"]


def test_perfect_and_empty():
    label = np.arange(19, dtype=np.uint8).repeat(4).reshape(4, 19)
    image = np.repeat(label[..., None], 3, 2)
    result = evaluate(Table(), Dataset("one", "val", Maps([(image, label)])))
    assert result["miou"] == result["pixel_accuracy"] == 1
    nothing = evaluate(Table(), Dataset("one", "val", Maps([(image, np.full((4, 19), 255, np.uint8))])))
    assert math.isnan(nothing["miou"]) and math.isnan(nothing["pixel_accuracy"])


def test_size_and_windows_reach_the_model_and_scores_reach_the_label():
    class Soft(Table):
        def predict(self, images, window=None, stride=None):
            self.calls.append((tuple(images.shape), window, stride))
            return torch.stack([images[:, 0], images[:, 1], images[:, 2]], 1)
    rng = np.random.default_rng(0)
    image, label = rng.integers(0, 256, (16, 24, 3), dtype=np.uint8), rng.integers(0, 3, (16, 24), dtype=np.uint8)
    ds, model = Dataset("soft", "val", Maps([(image, label)]), classes="abc"), Soft(3)
    result = evaluate(model, ds, window=6, stride=4, size=(8, 12))
    assert model.calls == [((1, 3, 8, 12), 6, 4)]
    from torchvision.transforms.v2 import functional as F
    small = F.resize(torch.from_numpy(image).permute(2, 0, 1), [8, 12], antialias=False).float() / 255
    guess = interpolate(small[None], (16, 24), mode="bilinear", align_corners=False)[0].argmax(0).numpy()
    confusion = np.zeros((3, 3), int); np.add.at(confusion, (label, guess), 1)
    assert result["confusion"] == confusion.tolist()


def test_mode_is_restored_and_no_graph_is_kept():
    table = Table().train()
    evaluate(table, random_set(SIZES[:1]))
    assert table.training
    table.eval(); evaluate(table, random_set(SIZES[:1]))
    assert not table.training


def test_refusals():
    with pytest.raises(ValueError, match="without labels"): evaluate(Table(), open_dataset("scenes", "val", count=1, labels=False))
    with pytest.raises(ValueError, match="7 classes.*19"): evaluate(Table(7), open_dataset("scenes", "val", count=1))


def test_iou_by_hand():
    iou = iou_from_confusion([[3, 1, 0], [2, 4, 0], [0, 0, 0]])
    assert iou[:2].tolist() == [3 / 6, 4 / 7] and iou[2].isnan()
