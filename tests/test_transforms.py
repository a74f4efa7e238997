"Augmentation: order and ranges, geometry, the two conditions on crops, class-mix, masks, and purity in the seed."
import math

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader
from torchvision import tv_tensors
from torchvision.transforms.v2 import functional as F

from reinpp import transforms
from reinpp.transforms import (Geometry, TrainTransform, class_mix, photometric_distortion, random_block_mask, resize_image, resize_label, shift_hsv, short_edge_size, strong_augment)

MEAN = torch.tensor([.485, .456, .406]).view(3, 1, 1)


def pair(h=64, w=128, seed=0):
    g = torch.Generator().manual_seed(seed)
    return (tv_tensors.Image(torch.randint(0, 256, (3, h, w), dtype=torch.uint8, generator=g)),
            tv_tensors.Mask(torch.randint(0, 19, (h // 8, w // 8), dtype=torch.uint8, generator=g).repeat_interleave(8, 0).repeat_interleave(8, 1)))


# ---------------------------------------------------------------- geometry

@pytest.mark.parametrize("height,width,k,expected", [(1024, 2048, 5, (256, 512)), (1024, 2048, 20, (1024, 2048)), (1052, 1914, 10, (512, 932)), (1052, 1914, 20, (1024, 1863)),
                                                     (720, 1280, 7, (358, 636)), (1080, 1920, 20, (1024, 1820)), (500, 2000, 20, (512, 2048)), (2000, 500, 20, (2048, 512))])
def test_sizes_of_the_recipe(height, width, k, expected):
    assert short_edge_size(height, width, int(512 * k / 10), 2048) == expected


def test_every_scale_is_drawn_and_no_other():
    t = TrainTransform(crop=32, base=50, max_long=10_000, photometric=False)
    image, label = pair(100, 150)
    torch.manual_seed(0)
    geometries = [t(image, label)[2] for _ in range(500)]
    assert {g.size[0] for g in geometries} == {int(50 * k / 10) for k in range(5, 21)}
    assert all(g.size[1] == int(g.size[0] * 1.5 + .5) for g in geometries)
    assert .4 < np.mean([g.flip for g in geometries]) < .6
    tall = [g for g in geometries if g.size[0] == 100]
    assert min(g.top for g in tall) >= 0 and max(g.top for g in tall) <= 68 and len({g.top for g in tall}) > 10


@pytest.mark.parametrize("crop", [32, 100, 200])
def test_result_follows_its_geometry(crop):
    image, label = pair()
    t = TrainTransform(crop=crop, base=64, photometric=False)
    torch.manual_seed(1)
    for _ in range(20):
        x, y, g = t(image, label)
        assert x.shape == (3, crop, crop) and x.dtype == torch.float32 and type(x) is torch.Tensor and y.shape == (crop, crop) and y.dtype == torch.int64 and type(y) is torch.Tensor
        big = F.resize(image, list(g.size), antialias=False)[:, g.top:g.top + crop, g.left:g.left + crop]
        ids = F.resize(label[None], list(g.size), interpolation=F.InterpolationMode.NEAREST)[0][g.top:g.top + crop, g.left:g.left + crop]
        if g.flip: big, ids = big.flip(-1), ids.flip(-1)
        h, w = g.inside
        assert (h, w) == ids.shape
        assert torch.equal(x[:, :h, :w], big.float() / 255) and torch.equal(y[:h, :w], ids.long())
        assert (y[h:] == 255).all() and (y[:, w:] == 255).all()
        if h < crop or w < crop:
            padding = torch.ones(crop, crop, dtype=torch.bool); padding[:h, :w] = False
            assert ((x - MEAN)[:, padding] == 0).all()  # the mean colour: 0 after normalisation
        assert g.top == 0 or g.top + crop <= g.size[0]
        assert torch.equal(g.cut(resize_label(label, g.size), 255).long(), y)


def test_image_and_label_stay_aligned():
    _, label = pair()
    image = tv_tensors.Image((label * 13).expand(3, -1, -1).contiguous())
    t = TrainTransform(crop=48, base=64, photometric=False)
    torch.manual_seed(2)
    for _ in range(20):
        x, y, g = t(image, label)
        close = ((x[0] * 255 / 13) - y).abs() < .05
        assert close[y != 255].float().mean() > .6  # all but the blended borders of 8-pixel blocks


def test_without_label_the_map_is_validity():
    image, label = pair()
    for crop in (48, 150):
        t = TrainTransform(crop=crop, base=64)
        torch.manual_seed(3)
        x, v, g = t(image)
        h, w = g.inside
        assert v.dtype == torch.int64 and (v[:h, :w] == 0).all() and (v == 255).sum() == crop * crop - h * w


def test_same_seed_same_sample_and_no_other_generator():
    image, label = pair()
    t = TrainTransform(crop=48, base=64)
    def draw(seed): torch.manual_seed(seed); return t(image, label, 3)
    one = draw(5)
    np.random.seed(0); import random; random.seed(0)
    two = draw(5)
    assert torch.equal(one[0], two[0]) and torch.equal(one[1], two[1]) and one[2] == two[2]
    assert not torch.equal(draw(6)[0], one[0])
    assert torch.equal(image, pair()[0]) and torch.equal(label, pair()[1])  # the input is left alone


class Seeded(torch.utils.data.Dataset):
    def __len__(self): return 6
    def __getitem__(self, key):
        torch.manual_seed(1000 + key)
        x, y, g = TrainTransform(crop=48, base=64)(*pair())
        return strong_augment(x), random_block_mask(48, 48, 16), torch.tensor([g.top, g.left])


def test_workers_do_not_change_samples():
    for a, b in zip(DataLoader(Seeded()), DataLoader(Seeded(), num_workers=2)): assert all(torch.equal(p, q) for p, q in zip(a, b))


# ---------------------------------------------------------------- conditions on the crop

def test_no_class_over_three_quarters_when_avoidable():
    label = torch.zeros(64, 256, dtype=torch.uint8); label[:, 192:] = torch.arange(64)[None] // 8
    t = TrainTransform(crop=64, base=64, scales=(10,), photometric=False)
    torch.manual_seed(0)
    lefts = [t.place((64, 256), label).left for _ in range(200)]
    def share(left):
        n = torch.bincount(label[:, left:left + 64].flatten().long())
        return (n.max() / n.sum()).item()
    assert np.mean([share(l) < .75 for l in lefts]) > .8  # a quarter of the places will do, so ten tries find one in 94 %
    free = TrainTransform(crop=64, base=64, tries=1)
    assert np.mean([share(free.place((64, 256), label).left) < .75 for _ in range(200)]) < .4


def test_ignored_pixels_do_not_count_in_the_share():
    label = torch.full((64, 64), 255, dtype=torch.uint8); label[0, :4] = torch.tensor([1, 1, 2, 2])
    calls = []
    t = TrainTransform(crop=32, base=64)
    original = transforms._randint
    try:
        transforms._randint = lambda n: calls.append(n) or 0
        t.place((64, 64), label)
    finally: transforms._randint = original
    assert len(calls) == 2  # the first crop at (0, 0) holds two classes at one half each: accepted at once


def test_ten_tries_at_most(monkeypatch):
    calls = []
    original = transforms._randint
    monkeypatch.setattr(transforms, "_randint", lambda n: calls.append(n) or original(n))
    t = TrainTransform(crop=32, base=64)
    t.place((64, 64), torch.zeros(64, 64, dtype=torch.uint8))
    assert len(calls) == 2 * 10
    calls.clear(); t.place((64, 64), torch.zeros(64, 64, dtype=torch.uint8), 5)
    assert len(calls) == 2 * 10 * 10
    calls.clear(); t.place((20, 30), torch.zeros(20, 30, dtype=torch.uint8), 5)
    assert len(calls) == 2  # there is only one crop to take


def test_wanted_class_is_in_the_crop():
    label = torch.arange(5, dtype=torch.uint8).repeat(40)[None].repeat(100, 1)  # stripes of many classes
    label[40:60, 90:110] = 12
    t = TrainTransform(crop=64, base=100, min_class_pixels=200)
    torch.manual_seed(0)
    held = [(label[g.top:g.top + 64, g.left:g.left + 64] == 12).sum().item() for g in (t.place((100, 200), label, 12) for _ in range(200))]
    unwanted = [(label[g.top:g.top + 64, g.left:g.left + 64] == 12).sum().item() for g in (t.place((100, 200), label) for _ in range(200))]
    assert np.mean(np.array(held) >= 100) > .97 and np.mean(np.array(unwanted) >= 100) < .7
    greedy = TrainTransform(crop=64, base=100, min_class_pixels=10**6)  # cannot be met: the best of ten is taken
    best = [(label[g.top:g.top + 64, g.left:g.left + 64] == 12).sum().item() for g in (greedy.place((100, 200), label, 12) for _ in range(100))]
    assert np.mean(best) > 1.5 * np.mean(unwanted)


# ---------------------------------------------------------------- colours

def test_photometric_ranges_and_probabilities():
    torch.manual_seed(0)
    grey = torch.full((3, 1, 1), .5)
    values = torch.stack([photometric_distortion(grey)[:, 0, 0] for _ in range(4000)])
    assert torch.equal(values[:, 0], values[:, 1]) and torch.equal(values[:, 0], values[:, 2])  # saturation and hue do nothing to grey
    v = values[:, 0]
    assert abs((v == .5).float().mean() - .25) < .03  # neither brightness nor contrast
    low, high = (.5 - 32 / 255) * .5, (.5 + 32 / 255) * 1.5
    assert low <= v.min() < low + .02 and high - .02 < v.max() <= high
    product = torch.full((3, 1, 1), 1.)  # white: brightness can only darken it, contrast above 1 is cut
    w = torch.stack([photometric_distortion(product)[0, 0, 0] for _ in range(2000)])
    assert w.max() == 1 and w.min() >= (1 - 32 / 255) * .5


def test_photometric_saturation_and_hue():
    torch.manual_seed(1)
    import matplotlib.colors as colors
    colour = torch.tensor([.6, .4, .4]).view(3, 1, 1)
    h0, s0, _ = colors.rgb_to_hsv(colour.flatten().numpy())
    hsv = np.stack([colors.rgb_to_hsv(shift_hsv(colour, s, h).flatten().clamp(0, 1).numpy()) for s, h in ((1, 0), (1.5, 0), (.5, 0), (5, 0), (1, .1), (1, -.1))])
    np.testing.assert_allclose(hsv[:4, 1], [s0, 1.5 * s0, .5 * s0, 1], atol=1e-5)
    np.testing.assert_allclose(hsv[4:, 0], [.1, .9], atol=1e-5)
    np.testing.assert_allclose(hsv[:, 2], .6, atol=1e-6)
    hues = np.array([colors.rgb_to_hsv(photometric_distortion(colour).flatten().numpy())[0] for _ in range(3000)])
    hues = np.where(hues > .5, hues - 1, hues)
    assert abs((np.abs(hues) < 1e-4).mean() - .5) < .04 and -.1001 <= hues.min() < -.095 and .095 < hues.max() <= .1001


def test_hue_agrees_with_torchvision():
    x = torch.rand(3, 40, 40, generator=torch.Generator().manual_seed(0))
    for turn in (-.5, -.1, 0, .03, .5): torch.testing.assert_close(shift_hsv(x, 1., turn), F.adjust_hue(x, turn), atol=1e-5, rtol=0)
    for y in (torch.zeros(3, 2, 2), torch.ones(3, 2, 2)): assert torch.equal(shift_hsv(y, 1.5, .1), y)


def test_outputs_stay_in_range():
    torch.manual_seed(0)
    x = torch.rand(3, 20, 20)
    for _ in range(100):
        for y in (photometric_distortion(x), strong_augment(x)): assert y.shape == x.shape and -1e-6 <= y.min() and y.max() <= 1 + 1e-6


def test_strong_augmentation_probabilities(monkeypatch):
    torch.manual_seed(0)
    flat = torch.rand(3, 1, 1).expand(3, 12, 12)
    colours = torch.stack([strong_augment(flat) for _ in range(600)])
    assert abs(((colours - flat).abs().amax((1, 2, 3)) > 1e-5).float().mean() - .8) < .05  # a blur does nothing to it
    monkeypatch.setattr(transforms, "_jitter", lambda x: x)
    spot = torch.zeros(3, 15, 15); spot[:, 7, 7] = 1
    spots = torch.stack([strong_augment(spot)[0] for _ in range(600)])
    assert abs((spots[:, 7, 7] < 1).float().mean() - .5) < .06
    ratio = spots[:, 7, 8] / spots[:, 7, 7]  # exp(-1 / (2 sigma^2))
    sigma = (-.5 / ratio[ratio > 1e-9].log()).sqrt()
    assert .15 < sigma.min() < .25 and 1.1 < sigma.max() < 1.1501


# ---------------------------------------------------------------- class-mix and masks

@pytest.mark.parametrize("classes", [1, 2, 3, 4, 7])
def test_class_mix_pastes_half_rounded_up(classes):
    g = torch.Generator().manual_seed(0)
    label = torch.randint(0, classes, (32, 32), generator=g) * 2
    label[:5] = 255
    image, other, pseudo = torch.rand(3, 32, 32), torch.rand(3, 32, 32), torch.full((32, 32), 18)
    weight = torch.rand(32, 32)
    torch.manual_seed(0)
    seen = set()
    for _ in range(30):
        x, y, w, pasted = class_mix(image, label, other, pseudo, weight)
        taken = set(label[pasted].tolist())
        seen.add(tuple(sorted(taken)))
        assert len(taken) == math.ceil(classes / 2) and 255 not in taken and taken.isdisjoint(label[~pasted].tolist())
        assert torch.equal(x, torch.where(pasted, image, other)) and torch.equal(y, torch.where(pasted, label, pseudo))
        assert (w[pasted] == 1).all() and torch.equal(w[~pasted], weight[~pasted]) and pasted.dtype == torch.bool
    assert classes == 1 or len(seen) > 1


def test_class_mix_with_nothing_to_paste():
    other = torch.rand(3, 8, 8)
    x, y, w, pasted = class_mix(torch.rand(3, 8, 8), torch.full((8, 8), 255), other, torch.zeros(8, 8, dtype=torch.int64), .3)
    assert not pasted.any() and torch.equal(x, other) and (y == 0).all() and torch.allclose(w, torch.tensor(.3)) and w.shape == (8, 8)


@pytest.mark.parametrize("height,width,block", [(512, 512, 32), (1024, 512, 64), (100, 70, 32)])
def test_block_masks(height, width, block):
    torch.manual_seed(0)
    masks = torch.stack([random_block_mask(height, width, block) for _ in range(40)])
    assert masks.dtype == torch.bool and masks.shape[1:] == (height, width) and abs(masks.float().mean() - .7) < .03
    for i in range(0, height, block):
        for j in range(0, width, block):
            part = masks[:, i:i + block, j:j + block].flatten(1)
            assert torch.equal(part.all(1), part.any(1))
    assert not random_block_mask(64, 64, ratio=0.).any() and random_block_mask(64, 64, ratio=1.).all()
