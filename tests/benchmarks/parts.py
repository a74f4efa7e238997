"""Which part of a step takes how long.

The boundaries between parts are marked in the graph itself: an identity that switches the clock when it is passed on
the way forward and when its gradient is passed on the way back. So forward and backward of each part add up, to the
whole step and nothing but."""
import contextlib
from unittest import mock

import torch

from reinpp.models import losses
from reinpp.models.mask2former import HeadOutput
from reinpp.models.rein_g import ReinG
from reinpp.paper.costs import Clock, Job

from .reference import PlainReinA, PlainReinG

PARTS = ("backbone", "rein_g", "head", "matching", "loss", "stm", "scores", "optimizer", "other")


class _Mark(torch.autograd.Function):
    @staticmethod
    def forward(ctx, clock, now, later, *tensors):
        ctx.clock, ctx.later = clock, later
        ctx.set_materialize_grads(False)
        clock.switch(now)
        return tuple(t.view_as(t) for t in tensors)

    @staticmethod
    def backward(ctx, *grads):
        ctx.clock.switch(ctx.later)
        return None, None, None, *grads


def _around(clock, module, name, before, after):
    "Hooks that give a module's time to `name`; `before` and `after` are the parts around it."
    def enter(m, args):
        maps, rest = args[0], args[1:]
        one = isinstance(maps, torch.Tensor)
        if name == "head" and rest and rest[0] is not None:
            # the queries first, so that their gradient comes last
            rest = (*_Mark.apply(clock, name, "rein_g", rest[0]), *rest[1:])
        maps = _Mark.apply(clock, name, before, *([maps] if one else maps))
        return (maps[0] if one else list(maps), *rest)

    def leave(m, args, out):
        if isinstance(out, torch.Tensor): return _Mark.apply(clock, after, name, out)[0]
        count, flat = len(out.class_logits), _Mark.apply(clock, after, name, *out.class_logits, *out.mask_logits)
        return HeadOutput(list(flat[:count]), list(flat[count:]), out.padding)
    return module.register_forward_pre_hook(enter), module.register_forward_hook(leave)


def _timed(clock, function, part, then):
    "The function, with the clock switched around it."
    def call(*args, **options):
        clock.switch(part)
        try:
            return function(*args, **options)
        finally:
            clock.switch(then)
    return call


@contextlib.contextmanager
def dissect(job: Job, clock: Clock):
    "Within this context the steps of a job tell the clock which part they are in. Nothing of it stays."
    model, inference = job.model, job.row.what == "inference"
    adapters, heads = [getattr(model, "adapter", None)], [model.head]
    if isinstance(job.objective, PlainReinA):  # its teacher has its own modules
        adapters.append(job.objective.teacher[0])
        heads.append(job.objective.teacher[1])
    adapters = [m for m in adapters if isinstance(m, (ReinG, PlainReinG))]
    matcher = (model.loss.set_loss.matcher, "forward") if hasattr(model, "loss") else (losses, "match")
    timed = [(*matcher, "matching", "loss")]
    timed += [(module, "queries", "rein_g", "other") for module in adapters]
    before = "backbone" if hasattr(model, "features") else "other"
    if before == "backbone":
        timed.append((model, "features", "backbone", "other"))
    hooks = []
    with contextlib.ExitStack() as patches:
        for owner, name, part, then in timed:
            patches.enter_context(mock.patch.object(owner, name, _timed(clock, getattr(owner, name), part, then)))
        for module in adapters:
            hooks += _around(clock, module, "rein_g", "backbone", "backbone")
        for module in heads:
            hooks += _around(clock, module, "head", before, "scores" if inference else "loss")
        if job.stm is not None:
            hooks += _around(clock, job.stm, "stm", "other", "loss")
        if not inference:
            hooks.append(job.optimizer.register_step_pre_hook(lambda *_: clock.switch("optimizer")))
            hooks.append(torch.autograd.graph.register_multi_grad_hook(job.trained(),
                lambda grads: clock.switch("other")))  # once a backward is done
        try:
            clock.switch("other")
            yield
        finally:
            for hook in hooks:
                hook.remove()


def shares(job: Job, steps: int = 3) -> dict[str, float]:
    "Fractions of a step's time by part, over a few steps."
    spent = dict.fromkeys(PARTS, 0.0)
    for _ in range(steps):
        clock = Clock(job.device)
        with dissect(job, clock):
            job.run()
        for part, seconds in clock.seconds().items():
            spent[part] += seconds
    return {part: s / sum(spent.values()) for part, s in spent.items() if s}
