"""Counts what a step of training needs on a GPU, without one, into card.csv: `python docs/card.py`, minutes on a CPU.

The tensors are PyTorch's fake ones: they have sizes and no numbers, so that nothing is computed."""

import contextlib
import csv
from functools import partial
from pathlib import Path
from unittest import mock

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from reinpp.adaptation import stm
from reinpp.models import losses, mask2former
from reinpp.models.backbones import hold_in
from reinpp.models.losses import Target, mask_classification_loss, paired_loss
from reinpp.models.segmenter import create_segmenter
from reinpp.paper.costs import KeptForBackward, Row

FILE = Path(__file__).with_name("card.csv")
BACKBONES = ("dinov2_small", "dinov2_base", "dinov2_large", "dinov2_giant", "internvl_6b")
BATCHES = (1, 2, 4, 8)
PRESENT = 12  # classes in an image, as in the benchmark's
PACKED = 0.5 + 1 / 64 + 4 / 2048  # bytes a weight: 4 bits, a byte for each block of 64, a float32 for 32 blocks


def attention(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, **_):
    "PyTorch's fused attention, which keeps no attention matrix: what a GPU takes, and a fake tensor does not."
    q, k, v = (t.to(torch.bfloat16) for t in (q, k, v))
    if attn_mask is None:
        return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, dropout_p, is_causal, scale=scale)[0]
    bias = torch.zeros_like(attn_mask, dtype=q.dtype).expand(*q.shape[:-1], k.shape[-2])
    return torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, bias, True, dropout_p, scale=scale)[0]


def no_match(output, targets, *_):
    "Matching needs numbers and keeps nothing: every target gets query 0."
    return torch.zeros(len(output.class_logits), sum(len(t.classes) for t in targets), dtype=torch.int64)


def all_pairs(mask, as_tuple=True):
    "`nonzero` as if every query had a class: the most that the index-paired loss can keep."
    return torch.unravel_index(torch.arange(mask.numel(), device=mask.device), mask.shape)


@contextlib.contextmanager
def on_a_gpu():
    "Autocast does not switch itself off, attention is fused, what needs numbers has some, and no cache gets a fake."
    fakes = [(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False),
        (torch.cuda, "is_bf16_supported", lambda *_: True),
        (torch.nn.functional, "scaled_dot_product_attention", attention),
        (losses, "match", no_match), (torch.Tensor, "nonzero", all_pairs),
        (stm, "sine_position", mask2former.sine_position.__wrapped__),
        (mask2former, "sine_position", mask2former.sine_position.__wrapped__),
        (mask2former, "_reference_grid", mask2former._reference_grid.__wrapped__)]
    with contextlib.ExitStack() as stack:
        for place, name, fake in fakes: stack.enter_context(mock.patch.object(place, name, fake))
        stack.enter_context(torch.autocast("cuda", torch.bfloat16))
        yield


def make(row, checkpointing):
    "Segmenter and STM (or None) of a row, of sizes alone, and the bytes that its frozen weights take as they are held."
    arguments = row.arguments
    args = dict(arguments.pop("backbone_args", {}))
    hold = args.pop("hold", "fp32")
    if hold == "int8": raise ValueError("int8 keeps copies for backward that cannot be counted")
    with torch.device("meta"):
        segmenter = create_segmenter(**arguments, backbone_args=args | dict(device="meta"), checkpointing=checkpointing)
        module = stm.STM.like(segmenter) if row.what == "rein_a" else None
    hold_in(segmenter.backbone, "fp32" if hold == "fp32" else "bf16", None)  # packed: computes in bf16
    packed = [p.numel() for p in segmenter.backbone.parameters() if p.dtype == torch.bfloat16 and hold == "int4"]
    frozen = sum(p.numel() * p.element_size() for p in segmenter.parameters() if not p.requires_grad)
    return segmenter.train(), module, frozen + int(sum(packed) * (PACKED - 2))


def targets(batch, crop):
    "As many classes in each image as the benchmark's have."
    return [Target(torch.zeros(PRESENT, dtype=torch.int64, device="cuda"),
        torch.zeros(PRESENT, crop, crop, dtype=torch.bool, device="cuda"),
        torch.ones(crop, crop, dtype=torch.bool, device="cuda")) for _ in range(batch)]


def largest_branch(row, output, images):
    "The losses of a step's largest graph: eq. 14; of Rein-A's student the masked view's, eq. 16 and 19."
    crop, points = images.shape[-1], row.sizes["num_points"]
    loss = mask_classification_loss(output, targets(len(images), crop), points)["total"]
    if row.what == "rein_a":
        inside = torch.ones(len(images), crop, crop, dtype=torch.bool, device="cuda")
        last = output.class_logits[-1].detach(), output.mask_logits[-1].detach()
        loss = loss + paired_loss(output, *last, inside)["total"]
    return loss


def count(row: Row, checkpointing=False) -> dict:
    """Bytes of a step under bf16 autocast: held weights, trained parameters with AdamW, kept for backward.

    A step of Rein-A keeps one branch at a time: the largest counts."""
    segmenter, module, frozen = make(row, checkpointing)
    own = sum(p.numel() for p in segmenter.parameters() if p.requires_grad)
    more = sum(p.numel() for p in module.parameters()) if module else 0
    crop, batch = row.sizes["crop"], row.batch
    with FakeTensorMode(allow_non_fake_inputs=True), on_a_gpu():
        segmenter.to_empty(device="cuda")
        images = torch.rand(batch, 3, crop, crop, device="cuda")
        there = [*segmenter.parameters(), *segmenter.buffers(), images]
        block, given = segmenter.backbone.blocks[-1], {}
        hook = block.register_forward_pre_hook(lambda _, args, named: given.update(args=args, named=named),
            with_kwargs=True)
        with KeptForBackward(there) as kept: largest_branch(row, segmenter(images), images)
        hook.remove()
        with KeptForBackward([*there, *given["args"]]) as again: block(*given["args"], **given["named"])
    teacher = 4 * own if row.what == "rein_a" else 0
    once = again.peak if checkpointing else 0  # backward computes one block again at a time
    return dict(frozen=frozen, trained=16 * (own + more) + teacher, kept=kept.peak + once)


def rows_of(what, backbone, hold, checkpointing, batches):
    "A row for each batch; what is kept grows by the same for each further image, so two are counted."
    step = partial(Row, what, "paper", model=dict(backbone=backbone, backbone_args=dict(hold=hold)))
    first, *others = batches
    one = count(step(first), checkpointing)
    more = count(step(first + 1), checkpointing)["kept"] - one["kept"] if others else 0
    about = dict(what=what, backbone=backbone, hold=hold, checkpointing=checkpointing)
    return [about | dict(batch=n) | one | dict(kept=one["kept"] + (n - first) * more) for n in batches]


def main():
    ways = [("fp32", False), ("bf16", False), ("bf16", True)]
    kinds = [("rein_g", backbone, *way, BATCHES) for backbone in BACKBONES for way in ways]
    kinds += [("rein_a", backbone, "bf16", True, (1,)) for backbone in BACKBONES]
    kinds += [("rein_a", "internvl_6b", "int4", True, (1,))]
    rows = []
    for kind in kinds:
        rows += rows_of(*kind)
        print(rows[-1], flush=True)
    with FILE.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
