"""The benchmark: the reference path is the same computation, the parts add up, records stay out of the ledger, the
notebook runs."""
import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from benchmarks.bench import ROWS, arithmetic, bench, paths, save
from benchmarks.levers import LEVERS, Sizes, measure_levers
from benchmarks.parts import dissect, shares
from benchmarks.reference import PlainHead, PlainReinG, make_job
from benchmarks.show import levers_table, skipped, table

from reinpp.models import losses
from reinpp.models.mask2former import Mask2Former
from reinpp.models.rein_g import ReinG
from reinpp.paper.costs import Clock, Job, KeptForBackward, Row, kept_bytes, operations, ratios
from reinpp.paper.experiments import Ledger

pytestmark = pytest.mark.usefixtures("one_thread")
ROOT = Path(__file__).resolve().parent.parent
SMALL = dict(model=dict(backbone_args=dict(depth=4), image_size=64), data=dict(crop=64, num_points=64, limit=8))
CPU = torch.device("cpu")


@pytest.fixture
def same_points(monkeypatch):
    """torch.rand returns one fixed pattern for its last two axes, so that two implementations draw equal points
    whatever their order."""
    pytest.importorskip("transformers")
    pattern, rand = torch.rand(4096, 3), torch.rand

    def fixed(*shape, device=None, **options):
        shape = tuple(shape[0]) if len(shape) == 1 and not isinstance(shape[0], int) else shape
        if len(shape) > 1 and shape[-1] in (2, 3) and shape[-2] > 3:  # points, not the values of an image
            return pattern[: shape[-2], : shape[-1]].expand(shape).contiguous().to(device)
        return rand(shape, device=device, **options)
    monkeypatch.setattr(torch, "rand", fixed)


def gradients(job, monkeypatch):
    "Loss and trained parameters' gradients of one step."
    kept = {}

    def keep():
        kept.update({n: p.grad.clone() for n, p in job.model.named_parameters() if p.grad is not None})
    monkeypatch.setattr(job.optimizer, "step", keep)
    return float(job.run()), kept


@pytest.mark.parametrize("what", ["rein_g", "rein_a"])
def test_the_reference_is_the_same_step(what, same_points, monkeypatch):
    row = Row(what, batch=2, **SMALL)
    made = [gradients(make_job(row, path), monkeypatch) for path in ("ours", "reference")]
    (ours, g), (theirs, h) = made
    assert abs(ours - theirs) < 1e-4 * max(1, abs(ours)), made
    adapter = {name: name for name in ("tokens_a", "tokens_b", "scale", "merge.weight")}
    adapter |= {"token_to_value.0.weight": "token_to_value.weight", "mlp.0.0.weight": "mlp.0.weight"}
    head = {"decoder.class_head.weight": "classes.weight", "querys2feat.weight": "querys2feat.weight",
        "pixel_decoder.smooth.weight": "pixel.theirs.layer_1.0.weight"}
    pairs = {f"adapter.{mine}": f"adapter.{other}" for mine, other in adapter.items()}
    pairs |= {f"head.{mine}": f"head.{other}" for mine, other in head.items()}
    for mine, other in pairs.items():
        assert (g[mine] - h[other]).abs().max() < 1e-4 * max(1, g[mine].abs().max()), mine
    assert len(g) > 100 and {n for n in h if n.startswith("backbone")} == set()


def test_head_and_loss_are_the_same(same_points):
    row = Row("head", "tiny", data=dict(crop=128, num_points=200))
    jobs = {path: make_job(row, path) for path in ("ours", "reference")}
    assert torch.equal(jobs["ours"].model.map0, jobs["reference"].model.map0)
    losses = {path: float(job.run()) for path, job in jobs.items()}
    assert abs(losses["ours"] - losses["reference"]) < 1e-4 * losses["ours"], losses

    def count(m):
        return sum(p.numel() for p in m.parameters() if p.requires_grad)
    assert count(jobs["ours"].model) == count(jobs["reference"].model)


def test_every_weight_of_a_linked_head_is_copied():
    pytest.importorskip("transformers")
    head = Mask2Former(32, 19, 64, encoder_layers=1, decoder_layers=3, num_heads=4, encoder_ffn=64, decoder_ffn=96)
    with torch.no_grad():
        for p in head.parameters():
            p.normal_()

    def total(m):
        return sum(p.double().square().sum() for p in m.parameters() if p.requires_grad)
    assert torch.allclose(total(head), total(PlainHead(head)))


def test_plain_rein_g_refuses_what_it_is_not():
    with pytest.raises(ValueError, match="low-rank"):
        PlainReinG(ReinG(32, 2, num_tokens=4, num_heads=2, low_rank=False))
    adapter = ReinG(32, 2, num_tokens=4, rank=2, num_heads=2, normalize_link=True)
    assert torch.allclose(adapter.queries(), PlainReinG(adapter).queries(), atol=1e-5)


def test_plain_rein_g_is_rein_g():
    adapter = ReinG(64, 3, num_tokens=8, rank=4, num_heads=4, query_dim=32)
    plain, x = PlainReinG(adapter), torch.randn(2, 1 + 16, 64)
    with torch.no_grad():
        for layer in range(3):
            assert torch.allclose(adapter(x, layer), plain(x, layer), rtol=0, atol=1e-5)
        assert torch.allclose(adapter.queries(), plain.queries(), rtol=0, atol=1e-5)


STEPS = [("rein_g", "ours"), ("rein_a", "ours"), ("rein_a", "reference"), ("inference", "reference"), ("full", "ours")]


@pytest.mark.parametrize("what, path", STEPS)
def test_parts_add_up_and_nothing_stays(what, path):
    if path == "reference":
        pytest.importorskip("transformers")
    job, match = make_job(Row(what, **SMALL), path), losses.match
    names = {id(m): len(m._forward_hooks) for m in job.model.modules()}
    found = shares(job)
    assert abs(sum(found.values()) - 1) < 1e-6 and all(v > 0 for v in found.values())
    expected = dict(rein_g="backbone rein_g head matching loss optimizer",
        rein_a="backbone rein_g head matching loss stm optimizer", inference="backbone rein_g head scores",
        full="backbone head matching loss optimizer")[what]
    assert set(expected.split()) <= set(found)
    assert losses.match is match and "features" not in vars(job.model)
    assert {id(m): len(m._forward_hooks) for m in job.model.modules()} == names
    if what == "rein_g":  # being watched changes nothing
        first, second = make_job(job.row, path), make_job(job.row, path)
        a = first.run()
        with dissect(second, Clock(CPU)):
            b = second.run()
        assert torch.equal(a, b)
        for p, q in zip(first.trained(), second.trained()):
            assert torch.equal(p, q)


def test_kept_bytes_and_operations():
    ours, full = Job(Row("rein_g", **SMALL)), Job(Row("full", **SMALL))
    assert 0 < kept_bytes(ours).peak < kept_bytes(full).peak, "a frozen backbone keeps less"
    a, b = operations(ours), operations(Job(Row("rein_g", **SMALL, batch=2)))
    assert 1.5 * a < b < 2.1 * a
    assert operations(Job(Row("full", **SMALL))) > a
    assert kept_bytes(ours).now == 0
    x = torch.randn(1000, requires_grad=True)
    with KeptForBackward([x]) as kept:
        y = x.exp().exp()
    assert kept.now == kept.peak == 2 * 4000
    y.sum().backward()
    del y
    assert kept.now == 0 and kept.total == 8000


def test_a_branch_at_a_time_keeps_less():
    kept = kept_bytes(Job(Row("rein_a", **SMALL)))
    assert kept.peak < .6 * kept.total


def test_levers():
    small = Sizes(channels=64, grid=8, classes=3, predictions=2, points=64, row_g=Row("rein_g", **SMALL),
        row_a=Row("rein_a", **SMALL), repeats=1)
    found = {r["lever"]: r for r in measure_levers(CPU, small)}
    assert set(found) == set(LEVERS)
    assert all("skipped" in r or r["bytes"]["without"] >= r["bytes"]["given"] for r in found.values()), found
    held = found["frozen weights held in bf16"]["bytes"]
    assert .5 < held["given"] / held["without"] < .6, "all but the blocks' matrices stays in float32"
    assert "NVIDIA GPU" in found["CUDA graphs"]["skipped"]


def test_rows_that_need_a_gpu_are_skipped_by_name(capsys):
    large = [name for name, row in ROWS.items() if row.gpu]
    record = bench(large, levers=False, reference=False, device="cpu")
    assert [r["row"] for r in record["rows"]] == large
    assert all(r["skipped"] == "needs an NVIDIA GPU" for r in record["rows"])
    assert "internvl_6b_rein_a_int4: skipped, needs an NVIDIA GPU" in capsys.readouterr().out
    said = skipped(record)
    assert said.startswith("not measured, needs an NVIDIA GPU: ") and all(name in said for name in large)
    assert not len(table(record)) and not len(ratios(record)) and not len(levers_table(record))
    row, cuda = ROWS["dinov2_large_rein_g"], torch.device("cuda")
    assert row.sizes["crop"] == 512 and row.batch == 4
    assert paths(row, cuda) == [("ours", "bf16"), ("ours", "float32"), ("reference", "tf32"), ("reference", "float32")]
    assert paths(ROWS["internvl_6b_rein_a_int8"], cuda) == [("ours", "bf16")]


def test_refuses(monkeypatch):
    with pytest.raises(ValueError, match="nonsense.*head_512"):
        bench(["nonsense"])
    with pytest.raises(ValueError, match="not a list"):
        bench("head_512")
    with pytest.raises(ValueError, match="steps=0"):
        bench([], steps=0)
    with pytest.raises(ValueError, match="precision"), arithmetic("fp8", CPU):
        pass
    monkeypatch.setitem(sys.modules, "transformers.models.mask2former", None)
    with pytest.raises(ImportError, match=r"reinpp\[dev\].*reference=False"):
        bench(["head_512"])


def test_arithmetic_leaves_no_trace():
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    with arithmetic("tf32", CPU):
        assert torch.get_float32_matmul_precision() == "high"
    assert (torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32) == before


def test_records_stay_out_of_the_ledger(tmp_path):
    row = dict(small=Row("rein_g", **SMALL))
    record = bench(["small"], steps=1, warmup=1, levers=False, reference=False, device="cpu", known=row)
    file = save(record, tmp_path / "bench")
    assert json.loads(file.read_text()) == json.loads(json.dumps(record))
    assert record["rows"][0]["row"] == "small" and [f.name for f in file.parent.iterdir()] == [file.name]
    assert Ledger(tmp_path).all() == []
    assert save(record, tmp_path / "bench") == file
    r = record["rows"][0]
    assert r["peak_memory"] is None and 0 < r["share_of_peak"] and r["data_seconds"] > 0
    assert r["fastest"] <= r["seconds"] <= r["slowest"]
    assert "not measured" in table(record).to_string()


def code_cells():
    cells = json.loads((ROOT / "nbs" / "bench.ipynb").read_text())["cells"]
    return [("".join(c["source"]), c["metadata"].get("tags", [])) for c in cells if c["cell_type"] == "code"]


def run_notebook(**parameters):
    "The cells of bench.ipynb in this process, as papermill would run them."
    import matplotlib
    matplotlib.use("agg")
    shown = []
    namespace = {"__name__": "__main__", "display": shown.append}
    for source, tags in code_cells():
        tree = ast.parse(source)
        value = ast.Expression(tree.body.pop().value) if isinstance(tree.body[-1], ast.Expr) else None
        exec(compile(tree, "bench", "exec"), namespace)
        if value is not None and (value := eval(compile(value, "bench", "eval"), namespace)) is not None:
            shown.append(value)
        if "parameters" in tags:
            namespace |= parameters
    matplotlib.pyplot.close("all")
    return shown, namespace


def test_the_notebook(tmp_path, capsys):
    shown, names = run_notebook(rows=["tiny_inference", "dinov2_giant_rein_a"], steps=1, warmup=1, levers=False,
        results=str(tmp_path), device="cpu")
    assert len(list(tmp_path.glob("*.json"))) == 1
    text = "\n".join(t.to_string() for t in shown if hasattr(t, "to_string"))
    assert "tiny_inference" in text and "not measured here" in text
    assert "not measured, needs an NVIDIA GPU: dinov2_giant_rein_a" in capsys.readouterr().out
    assert len(names["ratios"](names["record"])) == 1
    with pytest.raises(ValueError, match="unknown parameter row"):
        run_notebook(row=["head_512"])


def test_from_a_shell(tmp_path):
    done = subprocess.run([sys.executable, "-m", "benchmarks.bench", "--rows", '["internvl_6b_rein_g"]', "--no-levers",
        "--no-reference", "--device", "cpu", "--out", str(tmp_path)], capture_output=True, text=True, cwd=ROOT,
        env=os.environ | dict(PYTHONPATH=os.pathsep.join([str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])))
    assert done.returncode == 0, done.stderr[-2000:]
    assert "needs an NVIDIA GPU" in done.stdout and len(list(tmp_path.glob("*.json"))) == 1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("what", ["head", "rein_g", "rein_a"])
def test_both_paths_run_on_a_gpu(what):
    for path in ("ours", "reference"):
        make_job(Row(what, **SMALL), path, device=torch.device("cuda")).run()
