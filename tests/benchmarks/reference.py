"""The reference: the method as one would write it from the paper's text.

A timm backbone, Rein-G one layer at a time, the Mask2Former modules and loss of Hugging Face's `transformers`, and for
Rein-A six separate passes. Everything has the weights of ours, so both must give the same loss."""
import contextlib
import copy
from collections.abc import Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from reinpp.adaptation.masks import compose, pad, unpack
from reinpp.adaptation.rein_a import ReinA, pseudo_label, stm_label
from reinpp.data.transforms import TrainTransform, hide_blocks
from reinpp.labels import IGNORE
from reinpp.models.backbones import extract_features
from reinpp.models.losses import normalized_score_loss, paired_loss
from reinpp.models.mask2former import HeadOutput, Mask2Former
from reinpp.models.rein_g import ReinG
from reinpp.models.segmenter import Segmenter
from reinpp.paper.costs import Job, Row
from reinpp.paper.experiments import PRESETS
from reinpp.training.generalize import Generalize


class PlainReinG(nn.Module):
    "Rein-G in the steps of the paper's equations, with the weights of a `ReinG` (low-rank tokens, shared MLP)."

    def __init__(self, adapter: ReinG):
        super().__init__()
        if not (adapter.low_rank and adapter.share_mlp and hasattr(adapter, "merge")):
            raise ValueError("PlainReinG: the reference is Rein-G with low-rank tokens, one MLP and linked queries")
        for name in ("tokens_a", "tokens_b", "scale", "token_to_query", "merge"):
            setattr(self, name, copy.deepcopy(getattr(adapter, name)))
        self.token_to_value, self.mlp = copy.deepcopy(adapter.token_to_value[0]), copy.deepcopy(adapter.mlp[0])
        self.heads, self.prefix, self.normalize = adapter.num_heads, adapter.num_prefix_tokens, adapter.normalize_link

    def tokens(self, layer: int) -> torch.Tensor:
        "Eq. 11: (m, c)."
        return self.tokens_a[layer] @ self.tokens_b[layer]

    def forward(self, x: torch.Tensor, layer: int) -> torch.Tensor:
        "(B, prefix + n, c) -> the same."
        prefix, f = x[:, :self.prefix], x[:, self.prefix:]

        def split(t):
            return t.unflatten(-1, (self.heads, -1)).transpose(-3, -2)
        t = self.tokens(layer)
        v = self.token_to_value(t)
        s = torch.softmax(split(f) @ split(t).transpose(-2, -1) / (f.shape[-1] / self.heads) ** .5, dim=-1)  # eq. 5
        d = (s[..., 1:] @ split(v)[:, 1:]).transpose(-3, -2).flatten(-2)  # eq. 6
        return torch.cat([prefix, f + self.scale * self.mlp(d + f)], dim=1)  # eq. 13

    def queries(self) -> torch.Tensor:
        "Eq. 8-10: (m, query_dim)."
        layers = []
        for layer in range(len(self.tokens_a)):
            t = self.tokens(layer)
            layers.append(self.token_to_query(F.layer_norm(t, t.shape[-1:]) if self.normalize else t))
        q = torch.stack(layers)
        return self.merge(torch.stack([q.max(0).values, q.mean(0), q[-1]], dim=-1).flatten(-2))


def hugging_face():
    "The Mask2Former modules of transformers. Raises `ImportError` with what to do."
    try:
        from transformers.models.mask2former import modeling_mask2former
    except ImportError as error:
        raise ImportError(
            f"the reference path needs transformers, a development dependency ({error}): pip install 'reinpp[dev]', "
            "or measure with reference=False") from error
    return modeling_mask2former


def _configuration(pixels, **settings):
    "transformers' configuration with the sizes of a pixel decoder."
    from transformers import Mask2FormerConfig, SwinConfig
    dim, layer = pixels.hidden_dim, pixels.layers[0]
    sizes = dict(feature_size=dim, mask_feature_size=dim, hidden_dim=dim, encoder_layers=len(pixels.layers),
        encoder_feedforward_dim=layer.ffn[0].out_features, num_attention_heads=layer.attention.num_heads)
    fixed = dict(dropout=0.0, enforce_input_projection=False, common_stride=4, feature_strides=[4, 8, 16, 32])
    return Mask2FormerConfig(backbone_config=SwinConfig(), **sizes | fixed | settings)


@torch.no_grad()
def _copy(pairs):
    "Weights of pairs of modules (theirs, ours), every own parameter of each, or of tensors."
    for theirs, ours in pairs:
        if isinstance(theirs, torch.Tensor):
            theirs.copy_(ours)
            continue
        for a, b in zip(theirs.parameters(recurse=False), ours.parameters(recurse=False), strict=True):
            a.copy_(b)


def _pixel_pairs(theirs, ours):
    "What belongs together in two pixel decoders."
    yield theirs.level_embed, ours.level_embed
    for i in range(3):
        yield theirs.input_projections[i][0], ours.project[i]
        yield theirs.input_projections[i][1], ours.norms[i]
    for a, b in zip(theirs.encoder.layers, ours.layers, strict=True):
        yield from ((a.self_attn.sampling_offsets, b.attention.offsets), (a.self_attn.value_proj, b.attention.value),
            (a.self_attn.attention_weights, b.attention.weights), (a.self_attn.output_proj, b.attention.out),
            (a.self_attn_layer_norm, b.norm1), (a.fc1, b.ffn[0]), (a.fc2, b.ffn[2]), (a.final_layer_norm, b.norm2))
    yield from ((theirs.adapter_1[0], ours.lateral), (theirs.adapter_1[1], ours.lateral_norm),
        (theirs.layer_1[0], ours.smooth), (theirs.layer_1[1], ours.smooth_norm),
        (theirs.mask_projection, ours.mask_features))


def _decoder_pairs(theirs, ours):
    "What belongs together in two masked-attention decoders."
    yield theirs.layernorm, ours.norm
    for i in range(3):
        yield theirs.mask_predictor.mask_embedder.layers[i].layers[0], ours.mask_head[2 * i]
    for a, b in zip(theirs.layers, ours.layers, strict=True):
        inside = b.cross.query, b.cross.key, b.cross.value
        yield a.cross_attn.in_proj_weight, torch.cat([p.weight for p in inside])
        yield a.cross_attn.in_proj_bias, torch.cat([p.bias for p in inside])
        yield from ((a.cross_attn.out_proj, b.cross.out), (a.self_attn.q_proj, b.attend.query),
            (a.self_attn.k_proj, b.attend.key), (a.self_attn.v_proj, b.attend.value),
            (a.self_attn.out_proj, b.attend.out), (a.cross_attn_layer_norm, b.norm1),
            (a.self_attn_layer_norm, b.norm2), (a.final_layer_norm, b.norm3), (a.fc1, b.ffn[0]), (a.fc2, b.ffn[2]))


class PlainPixels(nn.Module):
    "The pixel decoder of transformers behind the interface of ours, with its weights."

    def __init__(self, pixels: nn.Module, **settings):
        super().__init__()
        self.scales, channels = pixels.scales, [pixels.in_channels] * 4
        self.theirs = hugging_face().Mask2FormerPixelDecoder(_configuration(pixels, **settings), channels)
        _copy(_pixel_pairs(self.theirs, pixels))

    def forward(self, features: list) -> tuple:
        "Four maps at the patch stride -> mask features, and three maps at strides 32, 16, 8."
        pyramid = [f if s == 1 else F.interpolate(f, scale_factor=s, mode="bilinear", align_corners=False)
            for f, s in zip(features, self.scales)]
        out = self.theirs(pyramid, return_dict=True, output_hidden_states=False, output_attentions=False)
        return out.mask_features, list(out.multi_scale_features)


class PlainHead(nn.Module):
    "The Mask2Former modules of transformers behind the interface of our head, with its weights."

    def __init__(self, head: Mask2Former):
        super().__init__()
        decoder, dim, self.linked, self.num_classes = head.decoder, head.hidden_dim, head.linked, head.num_classes
        config = _configuration(head.pixel_decoder, dim_feedforward=decoder.layers[0].ffn[0].out_features,
            decoder_layers=len(decoder.layers) + 1, num_attention_heads=decoder.layers[0].cross.num_heads,
            num_queries=1 if head.linked else len(head.query_embed), num_labels=head.num_classes, pre_norm=False)
        self.pixel = PlainPixels(head.pixel_decoder)
        self.transformer = hugging_face().Mask2FormerTransformerModule(dim, config)
        self.classes = nn.Linear(dim, head.num_classes + 1)
        own = self.transformer.queries_embedder, self.transformer.queries_features
        _copy([*_decoder_pairs(self.transformer.decoder, decoder), (self.classes, decoder.class_head),
            (self.transformer.level_embed.weight, decoder.level_embed)])
        if head.linked:
            self.querys2feat = copy.deepcopy(head.querys2feat)
            for unused in own:
                unused.requires_grad_(False)
        else:
            _copy([(own[0].weight, head.query_embed), (own[1].weight, head.query_feat)])

    def forward(self, features: list, queries: torch.Tensor | None = None) -> HeadOutput:
        "Four maps at the patch stride, and linked queries -> all predictions."
        mask_features, maps = self.pixel(features)
        linked = {"queries_embedder.weight": queries, "queries_features.weight": self.querys2feat(queries)} \
            if self.linked else {}
        out = torch.func.functional_call(self.transformer, linked, (maps, mask_features))
        classes = [self.classes(x.transpose(0, 1)) for x in out.intermediate_hidden_states]
        return HeadOutput(classes, list(out.masks_queries_logits))


class PlainLoss(nn.Module):
    "Eq. 14 with the loss of transformers: prediction by prediction, image by image."

    def __init__(self, num_classes: int, num_points: int):
        super().__init__()
        theirs = hugging_face()
        from transformers import Mask2FormerConfig, SwinConfig
        config = Mask2FormerConfig(backbone_config=SwinConfig(), num_labels=num_classes, train_num_points=num_points,
            class_weight=2.0, mask_weight=5.0, dice_weight=5.0, no_object_weight=.1)
        self.set_loss = theirs.Mask2FormerLoss(config, {})

    def forward(self, output: HeadOutput, labels: torch.Tensor) -> torch.Tensor:
        "Labels (B, H, W), 255 = ignore; every image has a class."
        classes = [[k for k in label.unique().tolist() if k != IGNORE] for label in labels]
        masks = [torch.stack([label == k for k in present]).float() for label, present in zip(labels, classes)]
        classes = [torch.tensor(present, device=labels.device) for present in classes]
        total = 0
        for c, m in zip(output.class_logits, output.mask_logits):
            terms = self.set_loss(m, c, masks, classes)
            total = total + 2 * terms["loss_cross_entropy"] + 5 * terms["loss_mask"] + 5 * terms["loss_dice"]
        return total


class Plain(nn.Module):
    "The reference segmenter: takes over a `Segmenter`'s backbone, and copies the weights of adapter and head."

    def __init__(
        self,
        segmenter: Segmenter,  # with Rein-G and the Mask2Former head; it loses its adapter
        num_points: int = 12544,  # of the loss
    ):
        super().__init__()
        segmenter.adapter.detach()
        self.backbone, self.num_classes = segmenter.backbone, segmenter.num_classes
        for name in ("mean", "std"):
            self.register_buffer(name, getattr(segmenter, name))
        self.adapter, self.head = PlainReinG(segmenter.adapter), PlainHead(segmenter.head)
        self.loss = PlainLoss(segmenter.num_classes, num_points)
        for layer, block in enumerate(self.backbone.blocks):
            block.register_forward_hook(partial(self._refine, layer))

    def _refine(self, layer, block, args, output):
        return self.adapter(output, layer)

    def train(self, mode: bool = True) -> "Plain":
        "As usual, but the backbone stays in eval mode."
        super().train(mode)
        self.backbone.eval()
        return self

    def features(self, images: torch.Tensor) -> list:
        return extract_features(self.backbone, (images - self.mean) / self.std)

    def forward(self, images: torch.Tensor) -> HeadOutput:
        return self.head(self.features(images), self.adapter.queries())

    def predict(self, images: torch.Tensor) -> torch.Tensor:
        "(B, 3, H, W) in [0, 1] -> scores (B, K, H, W)."
        output = self(images)
        masks = F.interpolate(output.mask_logits[-1], images.shape[-2:], mode="bilinear", align_corners=False)
        return torch.einsum("bqk,bqhw->bkhw", output.class_logits[-1].softmax(-1)[..., :-1], masks.sigmoid())


class PlainTraining:
    "A training step of the reference, behind what a `Job` uses of an objective."

    def __init__(self, segmenter: nn.Module):  # with its `loss`
        self.segmenter, self.stm, self.autocast = segmenter, None, contextlib.nullcontext

    def to(self, device: torch.device) -> None:
        self.segmenter.to(device)

    def named_trainables(self) -> Iterator[tuple[str, nn.Parameter]]:
        modules = [m for m in (self.segmenter, self.stm) if m is not None]
        return ((name, p) for m in modules for name, p in m.named_parameters() if p.requires_grad)

    def step(self, batch: dict, iteration: int) -> dict:
        with self.autocast():
            output = self.segmenter(batch["image"])
        loss = self.segmenter.loss(output, batch["label"])
        loss.backward()
        return dict(total=loss.detach())

    def after_step(self, iteration: int) -> None:
        pass


class PlainReinA(PlainTraining):
    """A step of Rein-A as Algorithm 1 is written: three teacher passes and three student passes, one after the other,
    and one backward at the end.

    It takes over a `ReinA` with its STM. STM's pixel decoder is transformers' too; its decoder stays, since theirs
    knows no queries of a single image: for that part a ratio understates."""

    def __init__(self, objective: ReinA):
        super().__init__(Plain(objective.segmenter, objective.settings.num_points))
        self.o, self.stm = objective, objective.stm
        self.stm.pixel_decoder = PlainPixels(self.stm.pixel_decoder)
        self.own = self.segmenter.adapter, self.segmenter.head
        self.teacher = tuple(copy.deepcopy(m).requires_grad_(False) for m in self.own)

    def to(self, device: torch.device) -> None:
        for module in (self.segmenter, self.stm, *self.teacher):
            module.to(device)

    @contextlib.contextmanager
    def _as_teacher(self):
        self.segmenter.adapter, self.segmenter.head = self.teacher
        try:
            yield
        finally:
            self.segmenter.adapter, self.segmenter.head = self.own

    def step(self, batch: dict, iteration: int) -> dict:
        "Algorithm 1 with its gradients; the loss."
        o, segmenter, stm, limit = self.o, self.segmenter, self.stm, self.o.settings.limit
        x_s, y_s, x_t, inside = (batch[k] for k in ("source", "source_label", "target", "target_inside"))
        x_mix, pasted = batch["mixed"], batch["pasted"]
        with torch.no_grad(), self._as_teacher():
            f_t = segmenter.features(x_t)
            answer = segmenter.head(f_t, segmenter.adapter.queries())
            f_s, f_mix = segmenter.features(x_s), segmenter.features(x_mix)
            pseudo = pseudo_label(answer.scores(), inside, o.settings.tau, o.settings.weighting, o.settings.margins)
            masks_s, masks_t = (unpack(batch[name], x_s.shape[-1] // 4) for name in ("source_masks", "target_masks"))
            c_stm, valid = stm_label(stm(f_t, *pad(masks_t, limit)), inside, o.settings.stm_least)
            c_stm = c_stm.masked_fill(~valid, IGNORE)  # their loss knows no `valid`: it draws its points there, too
        total = segmenter.loss(segmenter(x_s), y_s) + segmenter.loss(stm(f_s, *pad(masks_s, limit)), y_s)
        y_mix, weight = torch.where(pasted, y_s, pseudo.label), pseudo.weight.masked_fill(pasted, 1)
        total = total + o.settings.alpha * normalized_score_loss(segmenter(x_mix).scores(), y_mix, weight)
        output = stm(f_mix, *pad(compose(masks_s, masks_t, pasted), limit))
        total = total + o.settings.alpha * normalized_score_loss(output.scores(), y_mix, weight)
        output = segmenter(hide_blocks(x_t, batch["hidden"], segmenter.mean))
        paired = paired_loss(output, answer.class_logits[-1], answer.mask_logits[-1], inside)["total"]
        total = total + o.settings.beta * paired + o.settings.beta * segmenter.loss(output, c_stm)
        total.backward()
        return dict(total=total.detach())

    @torch.no_grad()
    def after_step(self, iteration: int) -> None:
        "The teacher follows, parameter by parameter."
        for mine, average in zip(self.own, self.teacher):
            for p, a in zip(mine.parameters(), average.parameters()):
                a.mul_(self.o.settings.ema).add_(p, alpha=1 - self.o.settings.ema)


class PlainJob(Job):
    "The reference's step of a row."

    def make(self):
        ours = super().make()
        if self.row.what == "rein_a": return PlainReinA(ours)
        return PlainTraining(Plain(ours.segmenter, self.row.sizes["num_points"]))


class HeadAlone(nn.Module):
    "A Mask2Former head with own queries whose features, of 1,024 channels, are given."

    def __init__(self, row: Row):
        super().__init__()
        self.head = Mask2Former(1024, linked=False, **PRESETS[row.preset].model.get("head_args", {}))
        side, self.num_classes = row.sizes["crop"] // 16, self.head.num_classes
        for i in range(4):
            self.register_buffer(f"map{i}", torch.randn(row.batch, 1024, side, side, requires_grad=True))

    def forward(self, images: torch.Tensor) -> HeadOutput:
        "The images do not matter."
        return self.head(list(self.buffers(recurse=False)))


class HeadJob(Job):
    "Forward and backward of head and loss alone."

    def make(self):
        return Generalize(HeadAlone(self.row), [None], TrainTransform(), num_points=self.row.sizes["num_points"])

    def run(self) -> torch.Tensor:
        torch.manual_seed(1)
        loss = self.objective.step(self.batch, 0)["total"]
        for tensor in (*self.trained(), *self.model.buffers(recurse=False)):
            tensor.grad = None
        return loss


class PlainHeadJob(HeadJob):
    "The same of the reference."

    def make(self):
        model = super().make().segmenter
        model.head = PlainHead(model.head)
        model.loss = PlainLoss(model.num_classes, self.row.sizes["num_points"])
        return PlainTraining(model)


def make_job(
    row: Row,
    path: str = "ours",  # or "reference"
    precision: str = "float32",
    device: torch.device = torch.device("cpu"),
) -> Job:
    "One path of one row, ready to run."
    kinds = {"ours": Job, "reference": PlainJob}
    if row.what == "head":
        kinds = {"ours": HeadJob, "reference": PlainHeadJob}
    return kinds[path](row, precision, device)
