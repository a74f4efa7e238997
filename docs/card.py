"""Counts what a step of Rein-G needs on a GPU, without one, into card.csv: `python docs/card.py`, minutes on a CPU.

The tensors are PyTorch's fake ones: they have sizes and no numbers, so that nothing is computed."""

import contextlib
import csv
from pathlib import Path
from unittest import mock

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from reinpp.models.backbones import hold_in
from reinpp.models.segmenter import create_segmenter
from reinpp.paper.costs import KeptForBackward

FILE = Path(__file__).with_name("card.csv")
BACKBONES = ("dinov2_small", "dinov2_base", "dinov2_large", "dinov2_giant", "internvl_6b")
BATCHES = (1, 2, 4, 8)
HOLDS = ("fp32", "bf16")


def attention(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, **_):
    "PyTorch's fused attention, which keeps no attention matrix: what a GPU takes, and a fake tensor does not."
    q, k, v = (t.to(torch.bfloat16) for t in (q, k, v))
    if attn_mask is None:
        return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, dropout_p, is_causal, scale=scale)[0]
    bias = torch.zeros_like(attn_mask, dtype=q.dtype).expand(*q.shape[:-1], k.shape[-2])
    return torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, bias, True, dropout_p, scale=scale)[0]


@contextlib.contextmanager
def on_a_gpu():
    "Autocast does not switch itself off, and attention is fused, though there is no GPU."
    with (mock.patch("torch.cuda.amp.common.amp_definitely_not_available", lambda: False),
            mock.patch("torch.cuda.is_bf16_supported", lambda *_: True),
            mock.patch("torch.nn.functional.scaled_dot_product_attention", attention)):
        yield


def count(backbone, batch, hold, crop=512):
    """Bytes of a step under bf16 autocast: held weights, trained parameters with AdamW, kept for backward.

    The losses are not in it: their matching needs numbers."""
    with torch.device("meta"):
        segmenter = create_segmenter(backbone, image_size=crop, pretrained=False, backbone_args=dict(device="meta"))
    hold_in(segmenter.backbone, hold, None)
    segmenter.train()
    with FakeTensorMode(allow_non_fake_inputs=True), on_a_gpu():
        segmenter.to_empty(device="cuda")
        images = torch.rand(batch, 3, crop, crop, device="cuda")
        there = [*segmenter.parameters(), *segmenter.buffers()]
        with KeptForBackward([*there, images]) as kept, torch.autocast("cuda", torch.bfloat16):
            output = segmenter(images)
        assert output.mask_logits[-1].shape[:2] == (batch, 100)
        peak = kept.peak
    frozen = sum(p.numel() * p.element_size() for p in segmenter.parameters() if not p.requires_grad)
    trained = sum(p.numel() for p in segmenter.parameters() if p.requires_grad)
    return dict(backbone=backbone, batch=batch, hold=hold, frozen=frozen, trained=16 * trained, kept=peak)


def main():
    rows = []
    for backbone in BACKBONES:
        for hold in HOLDS:
            one, two = (count(backbone, batch, hold) for batch in (1, 2))
            more = two["kept"] - one["kept"]  # of each further image: what is kept besides does not depend on the batch
            rows += [one | dict(batch=batch, kept=one["kept"] + (batch - 1) * more) for batch in BATCHES]
            print(rows[-1], flush=True)
    with FILE.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
