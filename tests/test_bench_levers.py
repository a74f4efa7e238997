"""Levers that stay change no result: float32 to 1e-5, bfloat16 within what another seed changes. And the records that
tables VII and XII show."""
import copy
import json
import shutil
from pathlib import Path

import pandas as pd
import pytest
import torch
from benchmarks.bench import save
from benchmarks.levers import LEVERS, Sizes, compare

from reinpp.models.mask2former import open_rows
from reinpp.models.segmenter import tiny_segmenter
from reinpp.paper.costs import Job, Row, paper_costs, ratios, records

pytestmark = pytest.mark.usefixtures("one_thread")
SMALL = dict(model=dict(backbone_args=dict(depth=4), image_size=64), data=dict(crop=64, num_points=64, limit=8))
SIZES = Sizes(channels=64, grid=8, classes=3, predictions=2, points=64, row_g=Row("rein_g", **SMALL),
    row_a=Row("rein_a", **SMALL), repeats=1)
CPU = torch.device("cpu")
ROOT = Path(__file__).resolve().parent.parent


def segmenter_like_a_trained_one():
    segmenter = tiny_segmenter(num_classes=5, backbone_args=dict(depth=4))
    with torch.no_grad():
        segmenter.adapter.scale.fill_(.5)
    return segmenter


PLAIN = ["fused attention", "masked attention through a fused kernel", "gradient checkpointing per block",
    "teacher without a graph"]


@pytest.mark.parametrize("name", PLAIN)
def test_results_are_those_of_the_plain_path(name):
    measure, _ = LEVERS[name]
    found = measure(CPU, SIZES)
    assert set(found["seconds"]) == {"without", "given"} and found["difference"] < 1e-5
    assert found["bytes"]["given"] <= found["bytes"]["without"]


def test_differences_are_seen():
    def way(factor):
        return [factor * torch.ones(3, requires_grad=True), torch.zeros(2)]
    found = compare(CPU, 1, without=lambda: way(1.0), given=lambda: way(1.5))
    assert found["difference"] == pytest.approx(1 / 3)
    assert compare(CPU, 1, without=lambda: None, given=lambda: None)["difference"] is None


def test_the_plain_masked_attention_would_be_nan_without_open_rows():
    nothing = torch.zeros(1, 1, 2, 4, dtype=torch.bool)
    assert open_rows(nothing).all()
    assert torch.zeros(1, 1, 2, 4).masked_fill(~nothing, -torch.inf).softmax(-1).isnan().all()


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_blocks(backend):
    if backend == "inductor" and not any(map(shutil.which, ("g++", "clang++", "c++"))):
        pytest.skip("no C++ compiler")
    segmenter, images = segmenter_like_a_trained_one(), torch.rand(2, 3, 64, 64)
    names, expected = list(segmenter.state_dict()), segmenter.predict(images)

    def gradient():
        return torch.autograd.grad(sum(m.square().mean() for m in segmenter.features(images)),
            [segmenter.adapter.tokens_a])[0]
    plain = gradient()
    assert segmenter.compile_blocks(backend=backend) is segmenter and list(segmenter.state_dict()) == names
    assert (segmenter.predict(images) - expected).abs().max() < 1e-5 * expected.max()
    assert (gradient() - plain).abs().max() < 1e-5 * plain.abs().max() and plain.abs().max() > 0
    other = copy.deepcopy(segmenter)
    with torch.no_grad():
        for p in other.backbone.blocks.parameters():
            p.mul_(1.1)
    assert (segmenter.predict(images) - expected).abs().max() < 1e-5 * expected.max(), "a copy has its own blocks"
    tokens = torch.rand(1, 65, 128)
    assert (other.backbone.blocks[0](tokens) - segmenter.backbone.blocks[0](tokens)).abs().max() > 1e-3


def losses_of(precision, seed, steps=100):
    "The losses of a short training on one batch, points drawn anew in every step; the mean of each quarter."
    job = Job(Row("rein_g", **SMALL), precision=precision)
    for group in job.optimizer.param_groups:
        group["lr"] = 1e-3
    job.batch["draw"] += 1000 * seed  # other points
    found = []
    for step in range(steps):
        found.append(job.objective.step(job.batch, step)["total"])
        job.optimizer.step()
        job.optimizer.zero_grad()
    return torch.stack(found).view(4, -1).mean(1)


def test_bf16_learns_as_float32_does():
    exact = torch.stack([losses_of("float32", seed) for seed in (1, 2, 3)])
    rounded, mean = losses_of("bf16", 1), exact.mean(0)
    noise = 3 * exact.std(0) + .02 * mean
    assert mean[-1] < .8 * mean[0], "there is something to compare"
    assert ((rounded - mean).abs() < noise).all(), (rounded, mean, noise)


def record(date, device="A card", kind="cuda", threads=2, gigabytes=4e9):
    "A record with the rows of Table VII and XII that matter here; invented numbers."
    def made(row, what, path, batch, seconds):
        return dict(row=row, what=what, path=path, precision="bf16", batch=batch, seconds=seconds, fastest=seconds,
            slowest=seconds, peak_memory=gigabytes, kept_bytes=1, operations=1)
    rows = [made("dinov2_large_rein_g", "rein_g", path, 4, s) for path, s in (("ours", .1), ("reference", .4))]
    rows += [made("dinov2_large_rein_a", "rein_a", path, 1, s) for path, s in (("ours", .2), ("reference", .6))]
    return dict(kind="bench", device=device, device_type=kind, threads=threads, date=date, commit="0", versions={},
        peak_speed={}, rows=rows, levers=[])


def test_tables_show_the_newest_record_of_each_device(tmp_path):
    assert records(tmp_path / "none") == {}
    for r in (record("2030-01-02"), record("2030-01-01", gigabytes=9e9), record("2029-01-01", "A processor", "cpu")):
        save(r, tmp_path)
    found = records(tmp_path)
    assert list(found) == ["A processor, 2 threads, 2029-01-01", "A card, 2030-01-02"]
    assert [r["device"] for r in found.values()] == ["A processor", "A card"]
    card = found["A card, 2030-01-02"]
    seven, twelve = (paper_costs(card, number).loc["DINOv2 (Large)"] for number in (7, 12))
    assert seven.loc["Rein-G"].here.tolist() == ["bf16 0.10 s, 4.0 GB"]
    assert "not measured here" in seven.loc["Full"].here.tolist()
    assert twelve.loc["Rein-A"].here.tolist() == ["bf16 0.20 s, 4.0 GB"]
    measured = ratios(card, ("rein_a",))
    assert measured.loc["dinov2_large_rein_a", "time"] == 3 and "dinov2_large_rein_g" not in measured.index
    assert json.loads(next(tmp_path.glob("*.json")).read_text())["kind"] == "bench"


SHOWN = [("table7", "bf16 0.10 s, 4.0 GB", 4), ("table12", "bf16 0.20 s, 4.0 GB", 3)]


@pytest.mark.parametrize("page, row, ratio", SHOWN)
def test_the_pages_show_the_record(page, row, ratio, tmp_path):
    cells = json.loads((ROOT / "nbs" / f"{page}.ipynb").read_text())["cells"]
    sources = ["".join(c["source"]) for c in cells if c["cell_type"] == "code"]
    first = next(i for i, source in enumerate(sources) if "paper_costs(" in source)
    assert first == len(sources) - 2

    def shown(folder):
        names = dict(results=str(folder), pd=pd)
        for source in sources[first:]:
            *_, last = source.strip().splitlines()
            exec(source, names)
            yield eval(last, names)
    assert all("run nbs/bench.ipynb" in text for text in shown(tmp_path / "empty"))
    save(record("2030-01-02"), tmp_path / "bench")
    costs, ratios = shown(tmp_path)
    assert row in costs.here.tolist() and ratios.time.tolist() == [ratio]
