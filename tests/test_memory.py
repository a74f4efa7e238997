"What steps of the benchmark's rows keep and need on a GPU, counted without one: `docs/card.py` says how."
import importlib
from pathlib import Path

import pytest
import torch
from benchmarks.levers import held_bytes

from reinpp.models.segmenter import tiny_segmenter
from reinpp.paper.costs import ROWS, Job, KeptForBackward, Row, kept_bytes

ROOT = Path(__file__).resolve().parent.parent
SMALL = dict(model=dict(backbone_args=dict(depth=4), image_size=64), data=dict(crop=64, num_points=64, limit=8))


@pytest.fixture(scope="module")
def card():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "docs")
        yield importlib.import_module("card")


ROOM = [  # row, gigabytes that it may keep for backward, and need in all
    ("dinov2_large_rein_g", 3.0, 5), ("dinov2_giant_rein_g", 5.0, 12), ("internvl_6b_rein_g", 12, 24),
    ("dinov2_large_rein_a", 1.5, 3.0), ("dinov2_giant_rein_a", 2.5, 6.5), ("internvl_6b_rein_a_bf16", 5, 20),
    ("internvl_6b_rein_a_int4", 5, 12)]


@pytest.mark.parametrize("row, kept, all_of_it", ROOM)
def test_a_step_with_checkpointing_fits(row, kept, all_of_it, card):
    counted = card.count(ROWS[row], checkpointing=True)
    assert counted["kept"] <= kept * 1e9 and sum(counted.values()) <= all_of_it * 1e9
    assert counted["frozen"] > 0.5e9 and counted["trained"] > 0.3e9 and counted["kept"] > 0.5e9, "and all is counted"


@pytest.mark.parametrize("what", ["rein_g", "full"])
def test_what_is_counted_is_what_a_step_keeps(what, card):
    "The same step with numbers, on the CPU; its attention keeps a little more or less than a GPU's."
    row = Row(what, batch=2, **SMALL)
    counted, kept = card.count(row)["kept"], kept_bytes(Job(row, "bf16")).peak
    assert 0.95 < counted / kept < 1.15


def test_packed_weights_take_and_keep_what_is_counted(card):
    pytest.importorskip("torchao")
    held, kept = {}, {}
    for hold in ("bf16", "int4"):
        segmenter = tiny_segmenter(backbone_args=dict(depth=4, hold=hold)).train()
        held[hold] = held_bytes(segmenter.backbone)
        with KeptForBackward([t for t in (*segmenter.parameters(), *segmenter.buffers())]) as books:
            features = segmenter.features(torch.rand(2, 3, 64, 64))
        kept[hold] = books.peak
        assert all(f.requires_grad for f in features)
    packed = sum(m.weight.numel() for m in segmenter.backbone.blocks.modules() if isinstance(m, torch.nn.Linear))
    assert (held["bf16"] - held["int4"]) / packed == pytest.approx(2 - card.PACKED, rel=0.02)
    assert kept["int4"] <= kept["bf16"]
