"""What single decisions give: each lever is measured without it and with it, on sizes of its own."""
import statistics
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from reinpp.models import losses
from reinpp.models.losses import match, point_sample, targets_from_labels
from reinpp.models.mask2former import HeadOutput, open_rows
from reinpp.models.segmenter import create_segmenter
from reinpp.paper.costs import ROWS, Job, KeptForBackward, Row, kept_bytes, time_once
from reinpp.paper.experiments import PRESETS
from reinpp.training.ema import run_teacher


@dataclass(frozen=True)
class Sizes:
    "How large the levers are measured."
    channels: int = 1024  # of the backbone's maps
    grid: int = 32  # their side
    classes: int = 10  # masks an image
    predictions: int = 10
    points: int = 12544
    row_g: Row = ROWS["tiny_rein_g"]  # steps in which a lever is switched
    row_a: Row = ROWS["tiny_rein_a"]
    repeats: int = 3


def compare(device: torch.device, repeats: int, **ways) -> dict:
    """What a record says of two ways, by name: median `seconds`, in turns, and the `bytes` kept for a backward.

    Of ways that return tensors also the largest `difference`, as a share of the largest number (None: they return
    nothing)."""
    times, kept, results = {name: [] for name in ways}, {}, []
    for name, way in ways.items():
        with KeptForBackward() as books:
            results.append(way())
        kept[name] = books.peak
    for _ in range(repeats):
        for name, way in ways.items():
            times[name].append(time_once(way, device))
    return dict(seconds={name: statistics.median(t) for name, t in times.items()}, bytes=kept,
        difference=_difference(*results))


def _difference(one, other):
    if one is None: return None
    pairs = [(a.detach().float(), b.detach().float()) for a, b in zip(one, other, strict=True)]
    return max(float((a - b).abs().max() / b.abs().max().clamp(min=1e-12)) for a, b in pairs)


def _project_first(device, s: Sizes):
    maps = [torch.randn(1, s.channels, s.grid, s.grid, device=device, requires_grad=True) for _ in range(3)]
    project = nn.Conv2d(s.channels, 256, 1, device=device)

    def run(*order):
        total = 0
        for x, scale in zip(maps, (4, 2, .5)):
            resize = partial(F.interpolate, scale_factor=scale, mode="bilinear", align_corners=False)
            for step in order:
                x = project(x) if step == "project" else resize(x)
            total = total + x.square().mean()
        total.backward()
    return compare(device, s.repeats, without=lambda: run("resize", "project"), given=lambda: run("project", "resize"))


def _predictions(device, s: Sizes, images):
    side = s.grid * 4
    crop = side * 4
    labels = (torch.arange(crop, device=device) * s.classes // crop).expand(images, crop, crop)
    classes = [torch.randn(images, 100, 20, device=device, requires_grad=True) for _ in range(s.predictions)]
    masks = [torch.randn(images, 100, side, side, device=device, requires_grad=True) for _ in range(s.predictions)]
    return HeadOutput(classes, masks), targets_from_labels(labels, 19)


def _one_transfer(device, s: Sizes):
    output, targets = _predictions(device, s, 2)

    def apart():
        for c, m in zip(output.class_logits, output.mask_logits):
            for i, target in enumerate(targets):
                match(HeadOutput([c[i : i + 1]], [m[i : i + 1]]), [target], s.points)
    return compare(device, s.repeats, without=apart, given=lambda: match(output, targets, s.points))


def _sampled_points(device, s: Sizes):
    (output, (target,)), rows = _predictions(device, s, 1), torch.arange(s.classes, device=device)
    truth = target.masks[None].float()

    def loss(x, t):
        p = x.sigmoid()
        dice = 1 - (2 * (p * t).sum(-1) + 1) / (p.sum(-1) + t.sum(-1) + 1)
        return F.binary_cross_entropy_with_logits(x, t) + dice.mean()

    def dense():
        for m in output.mask_logits:
            whole = F.interpolate(m[:, rows], truth.shape[-2:], mode="bilinear", align_corners=False)
            loss(whole.flatten(2), truth.flatten(2)).backward()

    def sampled():
        for m in output.mask_logits:
            points = losses.uncertain_points(m[0, rows, None].detach(), s.points)
            loss(point_sample(m[0, rows, None], points), point_sample(truth[0, :, None], points)).backward()
    return compare(device, s.repeats, without=dense, given=sampled)


def _masked_attention(device, s: Sizes):
    cells, heads = (2 * s.grid)**2, 8
    q, k, v = (torch.randn(1, heads, n, 256 // heads, device=device, requires_grad=True) for n in (100, cells, cells))
    allowed = open_rows(torch.rand(1, 1, 100, cells, device=device) < .3)

    def plain():
        weights = (q @ k.transpose(-2, -1) / q.shape[-1] ** .5).masked_fill(~allowed, -torch.inf).softmax(-1)
        return [out := weights @ v, *torch.autograd.grad(out.square().sum(), [q, k, v])]

    def fused():
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=allowed)
        return [out, *torch.autograd.grad(out.square().sum(), [q, k, v])]
    return compare(device, s.repeats, without=plain, given=fused)


def _switched(device, s: Sizes, switch):
    "Forward and backward of a Rein-G step's features, with something switched off and on before."
    job = Job(s.row_g, device=device)
    model, images = job.model, job.batch["image"]

    def way(on):
        switch(model.backbone, on)
        maps = model.features(images)
        gradient, = torch.autograd.grad(sum(m.square().mean() for m in maps), [model.adapter.tokens_a])
        return [*(m.detach() for m in maps), gradient]
    return compare(device, s.repeats, without=partial(way, False), given=partial(way, True))


def _fuse(backbone, on):
    for block in backbone.blocks:
        block.attn.fused_attn = on


def _checkpoint(backbone, on):
    backbone.set_grad_checkpointing(on)


def held_bytes(model: nn.Module) -> int:
    "Bytes that the weights of a model take, packed ones counted as they are stored."
    def inside(t):
        if not hasattr(t, "__tensor_flatten__"): return t.numel() * t.element_size()
        return sum(inside(getattr(t, name)) for name in t.__tensor_flatten__()[0])
    return sum(inside(p.data) for p in model.parameters())


def _held(device, s: Sizes, hold):
    def size(hold):
        args = s.row_g.model.get("backbone_args", {}) | dict(hold=hold)
        model = PRESETS[s.row_g.preset].model | dict(pretrained=False) | s.row_g.model | dict(backbone_args=args)
        return held_bytes(create_segmenter(**model).backbone)
    return dict(bytes=dict(without=size("fp32"), given=size(hold)))


@torch.no_grad()
def _cuda_graphs(device, s: Sizes):
    if device.type != "cuda":
        raise ValueError("needs an NVIDIA GPU")
    job = Job(s.row_g, device=device)
    model, images = job.model.eval(), job.batch["image"].clone()
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        for _ in range(3):
            model.features(images)  # tables are there before the capture
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        maps = model.features(images)

    def replay():
        graph.replay()
        return [m.clone() for m in maps]
    return compare(device, s.repeats, without=lambda: model.features(images), given=replay)


def _one_teacher_pass(device, s: Sizes):
    o, side = Job(s.row_a, device=device).objective, s.row_a.sizes["crop"]
    views = [torch.rand(s.row_a.batch, 3, side, side, device=device) for _ in range(3)]

    def apart():
        run_teacher(o.segmenter, o.teacher, views[0])
        for view in views[1:]:
            o.segmenter.features(view)  # the same weights still

    def at_once():
        run_teacher(o.segmenter, o.teacher, torch.cat(views), s.row_a.batch)
    with torch.no_grad():
        return compare(device, s.repeats, without=apart, given=at_once)


def _backward_per_branch(device, s: Sizes):
    kept = kept_bytes(Job(s.row_a, device=device))
    return dict(bytes=dict(without=kept.total, given=kept.peak))


def _no_graph(device, s: Sizes):
    job = Job(s.row_g, device=device)
    model, images = job.model, job.batch["image"]

    def way(record):
        with torch.set_grad_enabled(record):
            return [m.detach() for m in model.features(images)]
    return compare(device, s.repeats, without=partial(way, True), given=partial(way, False))


LEVERS = {  # name -> (measurement, what is compared)
    "1x1 projection before upsampling": (_project_first, "three of the pyramid's maps, forward and backward"),
    "one copy to the host for all matching": (_one_transfer, "against one for each prediction and image; on a CPU "
        "nothing is copied, what is left is fewer calls"),
    "losses on sampled points": (_sampled_points, "BCE and dice of matched masks, against every pixel of the crop"),
    "teacher's three views in one pass": (_one_teacher_pass, "features of three views and predictions for one, "
        "against three passes"),
    "backward per branch": (_backward_per_branch, "bytes of a Rein-A step's graphs: one backward at the end would "
        "keep all, now one branch is alive at a time"),
    "frozen weights held in bf16": (partial(_held, hold="bf16"), "bytes of the backbone's weights"),
    "frozen weights held in int8": (partial(_held, hold="int8"), "bytes of the backbone's weights"),
    "frozen weights held in int4": (partial(_held, hold="int4"), "bytes of the backbone's weights"),
    "fused attention": (partial(_switched, switch=_fuse), "features of a Rein-G step, forward and backward; against "
        "attention written out"),
    "masked attention through a fused kernel": (_masked_attention, "100 queries on the finest level, forward and "
        "backward, 30 % of its cells open; against softmax written out"),
    "gradient checkpointing per block": (partial(_switched, switch=_checkpoint), "features of a Rein-G step, forward "
        "and backward; costs time and saves memory: off unless `segmenter.backbone.set_grad_checkpointing()`"),
    "teacher without a graph": (_no_graph, "features of a batch; inference mode, a little leaner still, is not "
        "possible: STM learns from the teacher's features"),
    "CUDA graphs": (_cuda_graphs, "features of a batch without gradient: the launches of all kernels as one"),
}


def measure_levers(device: torch.device, sizes: Sizes = Sizes()) -> list[dict]:
    """One record for each of `LEVERS`: seconds and kept bytes without and with it, and by how much the results differ
    where both ways give one; or in words why not."""
    found = []
    for name, (measure, note) in LEVERS.items():
        record = dict(lever=name, note=note)
        try:
            record |= measure(device, sizes)
        except (ImportError, ValueError) as error:
            record["skipped"] = str(error).splitlines()[0][:160]
        found.append(record)
    return found
