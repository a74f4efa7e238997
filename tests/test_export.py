"Exported programs: equal to the segmenter, for any number of images, alone; what differs leaves no file."
import subprocess
import sys

import pytest
import torch

from reinpp.models import export as module
from reinpp.models.export import MergedReinG, export, load_program, merged
from reinpp.models.rein_g import ReinG
from reinpp.models.segmenter import create_segmenter

pytestmark = pytest.mark.usefixtures("one_thread")
SMALL = dict(hidden_dim=64, encoder_layers=1, decoder_layers=2, encoder_ffn=32, decoder_ffn=32, num_heads=4)
NARROW = dict(depth=4, embed_dim=48, num_heads=3)


def make(backbone="tiny", adapter="rein_g", head="mask2former", hold="fp32"):
    "Weights large enough that every part of the model shows in its scores."
    own = {} if backbone == "tiny" else dict(patch_size=16)
    segmenter = create_segmenter(
        backbone, adapter, head, num_classes=5, image_size=64, pretrained=False,
        head_args=SMALL if head == "mask2former" else dict(hidden_dim=16),
        backbone_args=NARROW | own | dict(hold=hold))
    with torch.no_grad():
        for p in segmenter.trained_state().values():
            p.add_(.02 * torch.randn(p.shape))
        if adapter == "rein_g":
            segmenter.adapter.scale.fill_(.5)
    return segmenter


@pytest.mark.parametrize("options", [
    {}, dict(share_mlp=False), dict(low_rank=False), dict(gelu=False, num_heads=1), dict(link_queries=False)])
def test_merged_rein_g_is_rein_g(options):
    options = dict(num_tokens=10, num_heads=4, **{} if "low_rank" in options else dict(rank=4)) | options
    adapter = ReinG(32, 3, query_dim=16, num_prefix_tokens=2, **options).eval()
    constant, x = MergedReinG(adapter), torch.randn(2, 9, 32)
    with torch.no_grad():
        for layer in range(3):
            assert (constant(x, layer) - adapter(x, layer)).abs().max() < 1e-6
            assert (constant(x, layer) - x)[:, 2:].abs().max() > 1e-5
        if adapter.queries() is None:
            assert constant.queries() is None
        else:
            assert torch.equal(constant.queries(), adapter.queries())
    names = {n for n, _ in constant.named_parameters()}
    assert names and all(n.startswith("mlp.") for n in names), "tokens, W_T and W_Q are gone"


def test_merged_gives_everything_back():
    segmenter, images = make().train(), torch.rand(1, 3, 64, 64)
    own, before = segmenter.adapter, {n: p.clone() for n, p in segmenter.state_dict().items()}
    hooks = [len(block._forward_hooks) for block in segmenter.backbone.blocks]
    scores = segmenter.predict(images)
    with pytest.raises(KeyboardInterrupt), merged(segmenter):
        assert isinstance(segmenter.adapter, MergedReinG) and not segmenter.training
        assert (segmenter.predict(images) - scores).abs().max() < 1e-6
        with torch.no_grad():
            own.scale.mul_(3)  # of the original: the constants do not follow
        assert (segmenter.predict(images) - scores).abs().max() < 1e-6
        with torch.no_grad():
            own.scale.div_(3)
        raise KeyboardInterrupt
    assert segmenter.adapter is own and segmenter.training
    assert [len(block._forward_hooks) for block in segmenter.backbone.blocks] == hooks == [1] * 4
    assert all(torch.equal(p, before[n]) for n, p in segmenter.state_dict().items())
    assert torch.equal(segmenter.predict(images), scores)
    segmenter(images).loss(torch.zeros(1, 64, 64, dtype=torch.long), 5, 16)["total"].backward()
    assert own.tokens_a.grad.abs().max() > 0, "it trains on"


@pytest.mark.parametrize("what, size", [
    (dict(backbone="dinov2_large"), None),
    (dict(adapter="lora", head="semantic_fpn"), (64, 96)),
    (dict(backbone="dinov2_large", hold="bf16"), 96)])
def test_a_program_is_the_segmenter(what, size, tmp_path, capsys):
    segmenter, tolerance = make(**what), 1e-5 if "hold" not in what else 1e-2
    made = export(segmenter, tmp_path / "new" / "a.pt2", image_size=size, tolerance=tolerance)
    size = made["image_size"]
    images = torch.rand(3, 3, *size)
    scores, expected = load_program(tmp_path / "new" / "a.pt2")(images), segmenter.predict(images)
    assert scores.shape == (3, 5, *size) and not scores.requires_grad and scores.dtype == torch.float32
    assert (scores - expected).abs().max() <= tolerance * expected.max()
    assert (expected[0] - expected[1]).abs().max() > 1e-3, "it sees the image"
    assert made["difference"] <= tolerance * max(1, expected.max())
    assert [f.name for f in (tmp_path / "new").iterdir()] == ["a.pt2"] and "a.pt2" in capsys.readouterr().out


def test_without_this_package(tmp_path):
    segmenter = make()
    export(segmenter, tmp_path / "a.pt2")
    images = torch.rand(1, 3, 64, 64)
    torch.save((images, segmenter.predict(images)), tmp_path / "both.pt")
    code = ("import sys, torch; images, scores = torch.load('both.pt'); program = torch.export.load('a.pt2').module()\n"
            "with torch.no_grad(): assert (program(images) - scores).abs().max() < 1e-5 * scores.max()\n"
            "assert not {'reinpp', 'timm'} & set(sys.modules)")
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


def test_a_program_that_differs_is_not_kept(tmp_path, monkeypatch):
    segmenter, images, real = make(), torch.rand(1, 3, 64, 64), module.load_program
    (tmp_path / "a.pt2").write_text("an older file")
    scores, own = segmenter.predict(images), segmenter.adapter
    monkeypatch.setattr(module, "load_program", lambda path: lambda x: real(path)(x) * 1.001)
    with pytest.raises(ValueError, match=r"differs from the segmenter by .*nothing was written"):
        export(segmenter, tmp_path / "a.pt2")
    monkeypatch.setattr(module, "load_program", lambda path: lambda x: real(path)(x) * float("nan"))
    with pytest.raises(ValueError, match="by nan"):
        export(segmenter, tmp_path / "a.pt2")
    assert [f.name for f in tmp_path.iterdir()] == ["a.pt2"] and (tmp_path / "a.pt2").read_text() == "an older file"
    assert segmenter.adapter is own and torch.equal(segmenter.predict(images), scores)


def test_refuses(tmp_path, monkeypatch):
    segmenter = make()
    for options, says in (
            (dict(format="tflite"), "format='tflite' is unknown: use one of torch, onnx"),
            (dict(format="onnx"), "name it a.onnx"),
            (dict(image_size=60), r"multiples of the patch \(8\)"), (dict(image_size=24), "32 or more"),
            (dict(image_size=(64, 64, 3)), "multiples")):
        with pytest.raises(ValueError, match=says):
            export(segmenter, tmp_path / "a.pt2", **options)
    segmenter.config["backbone_args"]["hold"] = "int8"
    with pytest.raises(ValueError, match="held in int8.*bf16"):
        export(segmenter, tmp_path / "a.pt2")
    segmenter.config["backbone_args"]["hold"] = "fp32"
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ImportError, match="pip install onnx onnxscript onnxruntime"):
        export(segmenter, tmp_path / "a.onnx", "onnx")
    with pytest.raises(FileNotFoundError, match="no such program"):
        load_program(tmp_path / "b.onnx")
    assert not list(tmp_path.iterdir())


def test_onnx(tmp_path):
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package)
    segmenter = make()
    made = export(segmenter, tmp_path / "a.onnx", "onnx")
    images = torch.rand(3, 3, 64, 64)
    expected = segmenter.predict(images)
    assert made["difference"] <= 1e-4 * expected.max()
    assert (load_program(tmp_path / "a.onnx")(images) - expected).abs().max() < 1e-4 * expected.max()
    assert [f.name for f in tmp_path.iterdir()] == ["a.onnx"]
