"Augmentation: order and ranges, geometry, the two conditions on crops, class-mix, masks, and purity in the seed."
import math

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader
from torchvision import tv_tensors
from torchvision.transforms.v2 import functional as F

from reinpp.data import transforms
from reinpp.data.transforms import (
    TrainTransform,
    adv_style,
    class_mix,
    pasta,
    photometric_distortion,
    random_block_mask,
    resize_label,
    shift_hsv,
    short_edge_size,
    strong_augment,
)

MEAN = torch.tensor([.485, .456, .406]).view(3, 1, 1)
GOLDEN = [(108, 25, 1, True, 0.022326), (64, 2, 1, True, 0.011225), (83, 15, 74, True, 0.533229),
    (96, 26, 0, True, 0.26088),
          # of seeds 0 to 7: height after resizing, top, left, flip, and the number that the generator would give next
          (96, 20, 46, True, 0.318912), (51, 0, 3, True, 0.166135), (96, 7, 128, False, 0.464752),
          (128, 28, 5, True, 0.628589)]


def pair(h=64, w=128, seed=0):
    g = torch.Generator().manual_seed(seed)
    return (tv_tensors.Image(torch.randint(0, 256, (3, h, w), dtype=torch.uint8, generator=g)),
            tv_tensors.Mask(torch.randint(0, 19, (h // 8, w // 8), dtype=torch.uint8, generator=g).repeat_interleave(8,
            0).repeat_interleave(8, 1)))


# ---------------------------------------------------------------- geometry

@pytest.mark.parametrize("height,width,k,expected", [(1024, 2048, 5, (256, 512)), (1024, 2048, 20, (1024, 2048)),
(1052, 1914, 10, (512, 932)), (1052, 1914, 20, (1024, 1863)),
                                                     (720, 1280, 7, (358, 636)), (1080, 1920, 20, (1024, 1820)),
                                                     (500, 2000, 20, (512, 2048)), (2000, 500, 20, (2048, 512))])
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
        assert x.shape == (3, crop, crop) and x.dtype == torch.float32 and type(x) is torch.Tensor and y.shape == (crop,
            crop) and y.dtype == torch.int64 and type(y) is torch.Tensor
        big = F.resize(image, list(g.size), antialias=False)[:, g.top:g.top + crop, g.left:g.left + crop]
        ids = F.resize(label[None], list(g.size), interpolation=F.InterpolationMode.NEAREST)[0][g.top:g.top + crop,
            g.left:g.left + crop]
        if g.flip:
            big, ids = big.flip(-1), ids.flip(-1)
        h, w = g.inside
        assert (h, w) == ids.shape
        assert torch.equal(x[:, :h, :w], big.float() / 255) and torch.equal(y[:h, :w], ids.long())
        assert (y[h:] == 255).all() and (y[:, w:] == 255).all()
        if h < crop or w < crop:
            padding = torch.ones(crop, crop, dtype=torch.bool)
            padding[:h, :w] = False
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
    def draw(seed):
        torch.manual_seed(seed)
        return t(image, label, 3)
    one = draw(5)
    np.random.seed(0)
    import random
    random.seed(0)
    two = draw(5)
    assert torch.equal(one[0], two[0]) and torch.equal(one[1], two[1]) and one[2] == two[2]
    assert not torch.equal(draw(6)[0], one[0])
    assert torch.equal(image, pair()[0]) and torch.equal(label, pair()[1])  # the input is left alone


class Seeded(torch.utils.data.Dataset):
    def __len__(self):
        return 6
    def __getitem__(self, key):
        torch.manual_seed(1000 + key)
        x, y, g = TrainTransform(crop=48, base=64)(*pair())
        return strong_augment(x), random_block_mask(48, 48, 16), torch.tensor([g.top, g.left])


def test_workers_do_not_change_samples():
    for a, b in zip(DataLoader(Seeded()), DataLoader(Seeded(), num_workers=2)):
        assert all(torch.equal(p, q) for p, q in zip(a, b))


# ---------------------------------------------------------------- the recipe: order, ranges, seeds

def test_recipe_is_the_default():
    t = TrainTransform()
    assert (t.crop, t.base, t.scales, t.max_long, t.flip, t.photometric, t.max_class_share, t.tries) == (512, 512,
        tuple(range(5, 21)), 2048, .5, True, .75, 10)
    assert [int(512 * k / 10) for k in t.scales] == [256, 307, 358, 409, 460, 512, 563, 614, 665, 716, 768, 819, 870,
        921, 972, 1024]
    assert t.fill.flatten().tolist() == pytest.approx([.485, .456, .406])


def test_recipe_at_1024():
    t = TrainTransform(crop=1024, base=1024, max_long=4096, photometric=False)
    image, label = pair(256, 512)
    torch.manual_seed(0)
    for _ in range(4):
        x, y, g = t(image, label)
        assert x.shape == (3, 1024, 1024) and y.shape == (1024,
            1024) and 512 <= g.size[0] <= 2048 and g.size[1] == 2 * g.size[0]
    assert short_edge_size(1024, 2048, int(1024 * 20 / 10), 4096) == (2048, 4096) and short_edge_size(720, 1280, 2048,
        4096) == (2048, 3641)
    assert short_edge_size(500, 2000, 2048, 4096) == (1024, 4096)


def test_steps_come_in_the_order_of_the_recipe(monkeypatch):
    "Scale, crop (and what it asks of the label), flip, colours on the crop alone, padding last and never coloured."
    steps = []
    def record(name, detail=lambda *a: None):
        inner = getattr(transforms, name)
        monkeypatch.setattr(transforms, name, lambda *a: (steps.append((name, detail(*a))), inner(*a))[1])
    record("_randint", lambda n: n)
    record("resize_image")
    record("resize_label")
    record("_coin", lambda p=.5: p)
    record("photometric_distortion", lambda x: tuple(x.shape))
    image, label = pair(32, 64)
    t = TrainTransform(crop=300, base=64)  # larger than anything it is cut from: the rest is padding
    torch.manual_seed(0)
    x, y, g = t(image, label)
    h, w = g.inside
    assert (h, w) == g.size != (300, 300)
    names = [n for n, _ in steps]
    assert names[:6] == ["_randint", "resize_image", "resize_label", "_randint", "_randint",
        "_coin"] and names[6] == "photometric_distortion" and set(names[7:]) <= {"_coin"}
    assert [d for n, d in steps if n == "_randint"] == [16, 1, 1] and steps[5][1] == .5 and steps[6][1] == (3, h, w)
    padding = torch.ones(300, 300, dtype=torch.bool)
    padding[:h, :w] = False
    # normalised, the padding is exactly 0 whatever the colours did
    assert ((x - MEAN)[:, padding] == 0).all() and (y[padding] == 255).all()
    steps.clear()
    t(image)
    # without a label: the same draws
    assert [n for n, _ in steps][:5] == ["_randint", "resize_image", "_randint", "_randint", "_coin"]


def test_colours_are_drawn_in_the_order_of_the_recipe(monkeypatch):
    draws = []
    monkeypatch.setattr(transforms, "_uniform", lambda low, high: draws.append((low, high)) or (low + high) / 2)
    x = torch.rand(3, 4, 4)
    monkeypatch.setattr(transforms, "_coin", lambda p=.5: True)  # contrast before saturation and hue
    photometric_distortion(x)
    assert draws == [(-32, 32), (.5, 1.5), (.5, 1.5), (-18, 18)]
    coins = iter([False, False, True, False, True])  # no brightness, contrast last, saturation, no hue, contrast
    monkeypatch.setattr(transforms, "_coin", lambda p=.5: next(coins))
    draws.clear()
    photometric_distortion(x)
    assert draws == [(.5, 1.5), (.5, 1.5)]
    coins = iter([False] * 5)
    draws.clear()
    assert torch.equal(photometric_distortion(x), x) and not draws


def test_draws_of_a_seed_stay_what_they_were():
    "Recorded runs were trained on these draws; another number or order of them would be another method."
    image, label = pair()
    t, seen = TrainTransform(crop=48, base=64), []
    for seed in range(8):
        torch.manual_seed(seed)
        _, _, g = t(image, label, 3 if seed % 2 else None)
        seen.append((g.size[0], g.top, g.left, g.flip, round(torch.rand(()).item(), 6)))
    assert seen == GOLDEN


def test_proposals_follow_the_geometry():
    """Whatever has the image's shape goes through the same resize, crop, flip and padding.

    A mask painted into the image stays on its pixels."""
    image, label = pair()
    mask = torch.zeros(64, 128, dtype=torch.uint8)
    mask[16:48, 32:80] = 255
    image = tv_tensors.Image(mask.expand(3, -1, -1).contiguous())
    t = TrainTransform(crop=72, base=64, photometric=False)
    torch.manual_seed(3)
    for _ in range(20):
        x, y, g = t(image, label)
        follows = g.cut(resize_label(mask, g.size))
        h, w = g.inside
        assert ((x[0] > .5) == (follows > 0))[:h, :w].float().mean() > .97 and not follows[h:].any() and not follows[:,
            w:].any()


# ---------------------------------------------------------------- conditions on the crop

def test_no_class_over_three_quarters_when_avoidable():
    label = torch.zeros(64, 256, dtype=torch.uint8)
    label[:, 192:] = torch.arange(64)[None] // 8
    t = TrainTransform(crop=64, base=64, scales=(10,), photometric=False)
    torch.manual_seed(0)
    lefts = [t.place((64, 256), label).left for _ in range(200)]
    def share(left):
        n = torch.bincount(label[:, left:left + 64].flatten().long())
        return (n.max() / n.sum()).item()
    # a quarter of the places will do, so ten tries find one in 94 %
    assert np.mean([share(l) < .75 for l in lefts]) > .8
    free = TrainTransform(crop=64, base=64, tries=1)
    assert np.mean([share(free.place((64, 256), label).left) < .75 for _ in range(200)]) < .4


def test_ignored_pixels_do_not_count_in_the_share():
    label = torch.full((64, 64), 255, dtype=torch.uint8)
    label[0, :4] = torch.tensor([1, 1, 2, 2])
    calls = []
    t = TrainTransform(crop=32, base=64)
    original = transforms._randint
    try:
        transforms._randint = lambda n: calls.append(n) or 0
        t.place((64, 64), label)
    finally:
        transforms._randint = original
    assert len(calls) == 2  # the first crop at (0, 0) holds two classes at one half each: accepted at once


def test_ten_tries_at_most(monkeypatch):
    calls = []
    original = transforms._randint
    monkeypatch.setattr(transforms, "_randint", lambda n: calls.append(n) or original(n))
    t = TrainTransform(crop=32, base=64)
    t.place((64, 64), torch.zeros(64, 64, dtype=torch.uint8))
    assert len(calls) == 2 * 10
    calls.clear()
    t.place((64, 64), torch.zeros(64, 64, dtype=torch.uint8), 5)
    assert len(calls) == 2 * 10 * 10
    calls.clear()
    t.place((20, 30), torch.zeros(20, 30, dtype=torch.uint8), 5)
    assert len(calls) == 2  # there is only one crop to take


def test_wanted_class_is_in_the_crop():
    label = torch.arange(5, dtype=torch.uint8).repeat(40)[None].repeat(100, 1)  # stripes of many classes
    label[40:60, 90:110] = 12
    t = TrainTransform(crop=64, base=100, min_class_pixels=200)
    torch.manual_seed(0)
    held = [(label[g.top:g.top + 64, g.left:g.left + 64] == 12).sum().item()
        for g in (t.place((100, 200), label, 12) for _ in range(200))]
    unwanted = [(label[g.top:g.top + 64, g.left:g.left + 64] == 12).sum().item()
        for g in (t.place((100, 200), label) for _ in range(200))]
    assert np.mean(np.array(held) >= 100) > .97 and np.mean(np.array(unwanted) >= 100) < .7
    greedy = TrainTransform(crop=64, base=100, min_class_pixels=10**6)  # cannot be met: the best of ten is taken
    best = [(label[g.top:g.top + 64, g.left:g.left + 64] == 12).sum().item()
        for g in (greedy.place((100, 200), label, 12) for _ in range(100))]
    assert np.mean(best) > 1.5 * np.mean(unwanted)


# ---------------------------------------------------------------- colours

def test_photometric_ranges_and_probabilities():
    torch.manual_seed(0)
    grey = torch.full((3, 1, 1), .5)
    values = torch.stack([photometric_distortion(grey)[:, 0, 0] for _ in range(4000)])
    # saturation and hue do nothing to grey
    assert torch.equal(values[:, 0], values[:, 1]) and torch.equal(values[:, 0], values[:, 2])
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
    hsv = np.stack([colors.rgb_to_hsv(shift_hsv(colour, s, h).flatten().clamp(0, 1).numpy()) for s,
        h in ((1, 0), (1.5, 0), (.5, 0), (5, 0), (1, .1), (1, -.1))])
    np.testing.assert_allclose(hsv[:4, 1], [s0, 1.5 * s0, .5 * s0, 1], atol=1e-5)
    np.testing.assert_allclose(hsv[4:, 0], [.1, .9], atol=1e-5)
    np.testing.assert_allclose(hsv[:, 2], .6, atol=1e-6)
    hues = np.array([colors.rgb_to_hsv(photometric_distortion(colour).flatten().numpy())[0] for _ in range(3000)])
    hues = np.where(hues > .5, hues - 1, hues)
    assert abs((np.abs(hues) < 1e-4).mean() - .5) < .04 and -.1001 <= hues.min() < -.095 and .095 < hues.max() <= .1001


def test_hue_agrees_with_torchvision():
    x = torch.rand(3, 40, 40, generator=torch.Generator().manual_seed(0))
    for turn in (-.5, -.1, 0, .03, .5):
        torch.testing.assert_close(shift_hsv(x, 1., turn), F.adjust_hue(x, turn), atol=1e-5, rtol=0)
    for y in (torch.zeros(3, 2, 2), torch.ones(3, 2, 2)):
        assert torch.equal(shift_hsv(y, 1.5, .1), y)


def test_outputs_stay_in_range():
    torch.manual_seed(0)
    x = torch.rand(3, 20, 20)
    for _ in range(100):
        for y in (photometric_distortion(x), strong_augment(x)):
            assert y.shape == x.shape and -1e-6 <= y.min() and y.max() <= 1 + 1e-6


def test_strong_augmentation_probabilities(monkeypatch):
    torch.manual_seed(0)
    flat = torch.rand(3, 1, 1).expand(3, 12, 12)
    colours = torch.stack([strong_augment(flat) for _ in range(600)])
    assert abs(((colours - flat).abs().amax((1, 2, 3)) > 1e-5).float().mean() - .8) < .05  # a blur does nothing to it
    monkeypatch.setattr(transforms, "_jitter", lambda x: x)
    spot = torch.zeros(3, 15, 15)
    spot[:, 7, 7] = 1
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
    x, y, w, pasted = class_mix(torch.rand(3, 8, 8), torch.full((8, 8), 255), other,
        torch.zeros(8, 8, dtype=torch.int64), .3)
    assert not pasted.any() and torch.equal(x, other) and (y == 0).all() and torch.allclose(w,
        torch.tensor(.3)) and w.shape == (8, 8)


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


# ---------------------------------------------------------------- PASTA and AdvStyle

def soft(batch=2, h=24, w=32):
    "Images of little contrast, so that nothing is clamped."
    return .5 + .01 * torch.randn(batch, 3, h, w, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("shape", [(2, 3, 24, 32), (3, 15, 9), (1, 3, 16, 7)])
def test_pasta_without_noise_is_the_identity(shape):
    x = torch.rand(shape)
    torch.testing.assert_close(pasta(x, alpha=0, beta=0), x, atol=1e-5, rtol=0)


def test_pasta_keeps_phases_and_does_not_touch_its_input():
    x = soft()
    before = x.clone()
    torch.manual_seed(0)
    y = pasta(x, alpha=3, beta=.1)
    assert 0 < y.min() and y.max() < 1 and y.shape == x.shape and y.dtype == x.dtype and torch.equal(x,
        before) and not torch.equal(x, y)
    a, b = torch.fft.fft2(x.double()), torch.fft.fft2(y.double())
    ratio = (b / a)[a.abs() > a.abs().median()]
    # a real gain: the phase stays, but for the sign where the gain is negative
    assert (ratio.imag.abs() < 1e-3 * ratio.abs().clamp(min=1)).all()
    gentle = torch.fft.fft2(pasta(x, alpha=.3, beta=.05).double())
    assert ((gentle / a)[a.abs() > a.abs().median()].angle().abs() < 1e-2).all()


def test_pasta_follows_the_seed_and_disturbs_images_and_channels_apart():
    x = soft(1).expand(2, -1, -1, -1)
    def draw(seed):
        torch.manual_seed(seed)
        return pasta(x)
    assert torch.equal(draw(0), draw(0)) and not torch.equal(draw(0), draw(1))
    y = draw(0) - x
    assert not torch.allclose(y[0], y[1], atol=1e-3)
    grey = torch.full((1, 3, 8, 8), .5)
    assert pasta(grey).std(1).max() > 1e-3  # the mean colour too: beta


def test_pasta_gains_grow_with_frequency():
    "Deviations of the gains by frequency, against the formula; the real part averages the gains of m and -m."
    h, w = 16, 32
    x = torch.zeros(3, h, w)
    x[:, 0, 0] = 1e-3  # a flat spectrum; far from the limits after the shift
    x = .5 + x
    torch.manual_seed(0)
    spectrum = torch.fft.fft2(x.double())
    gains = torch.stack(
        [(torch.fft.fft2(pasta(x, alpha=3, beta=.25, k=2).double()) / spectrum).real for _ in range(300)])
    m, n = torch.fft.fftfreq(h) * h, torch.fft.fftfreq(w) * w
    sigma = (2 * 3 * ((m[:, None] ** 2 + n ** 2) / (h ** 2 + w ** 2)).sqrt()) ** 2 + .25
    assert abs(sigma.max() - 9.25) < 1e-4 and sigma[0, 0] == .25
    inner = torch.ones(h, w, dtype=torch.bool)
    inner[0::h // 2, 0::w // 2] = False  # all but the four that are their own mirror image
    deviation = gains.std((0, 1))
    expected = torch.where(inner, sigma / math.sqrt(2), sigma)
    assert (deviation / expected - 1)[1:].abs().mean() < .05 and abs(gains.mean() - 1) < .1
    low, high = sigma < 1, sigma > 5
    assert deviation[low].max() < deviation[high].min()


def tiny_network():
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3, padding=1), torch.nn.ReLU(), torch.nn.Conv2d(8, 4, 1))
    images, labels = torch.rand(2, 3, 16, 16), torch.randint(0, 4, (2, 16, 16))
    return net, images, lambda x: torch.nn.functional.cross_entropy(net((x - MEAN) / .225), labels)


def test_adv_style_raises_the_loss_and_keeps_the_content():
    net, images, loss = tiny_network()
    before = images.clone()
    styled = adv_style(images, loss)
    with torch.no_grad():
        assert loss(styled) > loss(images)
    assert torch.equal(
        images, before) and not styled.requires_grad and styled.shape == images.shape and styled.dtype == images.dtype
    def content(x):
        return (x - x.mean((2, 3), keepdim=True)) / x.std((2, 3), keepdim=True)
    torch.testing.assert_close(content(styled), content(images), atol=1e-3, rtol=0)
    assert all(p.grad is None for p in net.parameters())
    torch.testing.assert_close(adv_style(images, loss, lr=0.), images, atol=1e-5, rtol=0)
    flat = torch.full((1, 3, 8, 8), .4)
    assert adv_style(flat, lambda x: x.mean()).isfinite().all()  # no contrast, no division by 0
    with torch.no_grad():
        assert torch.equal(adv_style(images, loss), styled)  # also where gradients are off


def test_adv_style_step_is_gradient_ascent_in_normalised_units():
    net, images, loss = tiny_network()
    std = torch.tensor([.229, .224, .225]).view(1, 3, 1, 1)
    x = (images - MEAN) / std
    mu, sigma = x.mean((2, 3), keepdim=True), x.var((2, 3), keepdim=True).sqrt()
    content = (x - mu) / sigma
    mu, sigma = mu.requires_grad_(), sigma.requires_grad_()
    loss((content * sigma + mu) * std + MEAN).backward()
    by_hand = (content * (sigma + 3 * sigma.grad) + mu + 3 * mu.grad) * std + MEAN
    torch.testing.assert_close(adv_style(images, loss, lr=3.), by_hand.detach(), atol=1e-4, rtol=0)
