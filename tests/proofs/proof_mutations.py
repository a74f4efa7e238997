"""Mutations: each equation of the method and each of its traps, broken on purpose, and the test that sees it.

Every case copies package and tests into a temporary folder, breaks one line there, and runs one test, which must fail.
The same test passes on the copy as it is. Not a part of `make test`: `make proofs`."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
REIN_G, LOSSES, REIN_A = "models/rein_g.py", "models/losses.py", "adaptation/rein_a.py"
STM, HEAD, TRANSFORMS = "adaptation/stm.py", "models/mask2former.py", "data/transforms.py"

# what is broken: file, line as it is, line as it becomes, the test that must fail
MUTATIONS = {
    # Rein-G
    "eq. 2: the refinement replaces f": (
        REIN_G, "refined = patches + self.scale * ", "refined = self.scale * ",
        "test_rein_g.py::test_equals_the_reference"),
    "eq. 2: the scale is left out": (
        REIN_G, "patches + self.scale * self", "patches + self", "test_rein_g.py::test_equals_the_reference"),
    "eq. 2: prefix tokens are refined, too": (
        REIN_G, "return torch.cat([prefix, refined.to(patches.dtype)], dim=1)",
        "return torch.cat([prefix * (1 + self.scale), refined.to(patches.dtype)], dim=1)",
        "test_rein_g.py::test_prefix_tokens_pass_untouched"),
    "eq. 5: no division by the root of the width": (
        REIN_G, "F.scaled_dot_product_attention(self._heads(f), k, v)",
        "F.scaled_dot_product_attention(self._heads(f), k, v, scale=1.0)",
        "test_rein_g.py::test_equals_the_reference"),
    "eq. 6: token 0 gives its value": (
        REIN_G, "return torch.cat([torch.zeros_like(v[:1]), v[1:]])", "return v",
        "test_rein_g.py::test_equals_the_reference"),
    "eq. 7, 13: the MLP sees delta f alone": (
        REIN_G, "(given + f)", "(given)", "test_rein_g.py::test_equals_the_reference"),
    "eq. 8: the mean over layers for the maximum": (
        REIN_G, "[q.amax(0), q.mean(0), q[-1]]", "[q.mean(0), q.mean(0), q[-1]]",
        "test_rein_g.py::test_equals_the_reference"),
    "eq. 9: the first layer for the last": (
        REIN_G, "q.mean(0), q[-1]]", "q.mean(0), q[0]]", "test_rein_g.py::test_equals_the_reference"),
    "eq. 10: three blocks, not interleaved": (
        REIN_G, "dim=-1).flatten(-2))", "dim=-2).flatten(-2))", "test_rein_g.py::test_equals_the_reference"),
    "eq. 11: one MLP a layer": (
        REIN_G, "layers = range(1 if self.share_mlp else self.depth)", "layers = range(self.depth)",
        "test_rein_g.py::test_every_row_of_table_v_equals_its_definition"),
    "eq. 12: A alone": (
        REIN_G, "return self.tokens_a[at] @ self.tokens_b[at] if",
        "return 2 * self.tokens_a[at] @ self.tokens_b[at] if",
        "test_rein_g.py::test_equals_the_reference"),
    "eq. 13: no GELU": (
        REIN_G, "nn.GELU()", "nn.Identity()", "test_rein_g.py::test_gelu_stands_between_the_two_layers"),
    # matching and losses
    "eq. 14: the class cost is left out": (
        LOSSES, "return _BCE * bce - _CLASS * chance + _DICE * dice", "return _BCE * bce + _DICE * dice",
        "test_losses.py::test_parity_of_matching_and_loss"),
    "eq. 14: 'no object' counts fully": (
        LOSSES, "_NO_OBJECT = 0.1", "_NO_OBJECT = 1.0", "test_losses.py::test_parity_of_matching_and_loss"),
    "eq. 14: 255 of a dataset is left out": (
        LOSSES, "known = [None] * len(labels) if valid is None else valid",
        "known = (labels != IGNORE) if valid is None else valid",
        "test_losses.py::test_ignored_pixels_push_masks_down"),
    "eq. 15: a softmax over the scores": (
        LOSSES, "return scores / scores.sum(1, keepdim=True)", "return scores.softmax(1)",
        "test_losses.py::test_no_softmax_over_scores"),
    "eq. 16: queries are shuffled": (
        REIN_A, "return paired_loss(output, p_t, m_t, inside)",
        "return paired_loss(output, p_t.roll(1, 1), m_t.roll(1, 1), inside)",
        "test_rein_a.py::test_mask_loss_pairs_by_index"),
    "eq. 16: padding counts": (
        REIN_A, "return paired_loss(output, p_t, m_t, inside)",
        "return paired_loss(output, p_t, m_t, torch.ones_like(inside))",
        "test_rein_a.py::test_padding_of_the_target_changes_no_loss"),
    "eq. 19: what STM is unsure of is background": (
        REIN_A, "targets_from_labels(label, stm.num_classes, valid)",
        "targets_from_labels(label.masked_fill(~valid, IGNORE), stm.num_classes)",
        "test_rein_a.py::test_the_step_leaves_out_what_stm_is_unsure_of"),
    "eq. 19: points are drawn where nothing is known": (
        LOSSES, "return torch.where((count > 0) & (count < flat.numel()), centre, points)", "return points",
        "test_losses.py::test_points_are_uniform_over_what_is_valid"),
    "eq. 19: who names the unknown is taught 'no object'": (
        LOSSES, "wanted = wanted.masked_fill(unknowable, -100)", "pass",
        "test_losses.py::test_who_names_the_unsure_half_pays_no_more_than_who_is_silent"),
    "eq. 20: alpha does not weigh the mix branch": (
        REIN_A, "mix=alpha, stm_mix=alpha", "mix=1, stm_mix=1",
        "test_rein_a.py::test_gradient_per_branch_is_the_gradient_of_the_total"),
    # the teacher
    "the teacher never moves": (
        REIN_A, "update_teacher(self.teacher, self.segmenter, min(ramp, self.settings.ema))", "pass",
        "test_rein_a.py::test_averaging_starts_at_once"),
    "a softmax before the threshold": (
        REIN_A, "top, label = normalize_scores(scores).max(1)\n    sure",
        "top, label = scores.softmax(1).max(1)\n    sure",
        "test_rein_a.py::test_a_sure_teacher_gets_weight"),
    "padding has a say in q": (
        REIN_A, "sure = (top >= tau) & inside\n    q", "sure = top >= tau\n    q",
        "test_rein_a.py::test_padding_has_no_weight_and_no_say_in_q"),
    "STM and pseudo label read the student, not the teacher": (
        REIN_A, "run_teacher(self.segmenter, self.teacher, torch.cat(seen), len(x_t))",
        "run_teacher(self.segmenter, {n: p.detach() for n, p in self.segmenter.named_parameters() if p.requires_grad}, "
        "torch.cat(seen), len(x_t))",
        "test_rein_a.py::test_stm_reads_the_teachers_features_without_gradient"),
    # prediction, samples
    "the sigmoid before the resize": (
        HEAD, "large.sigmoid_().flatten(2)",
        "F.interpolate(few.float().sigmoid(), tuple(size), mode='bilinear').flatten(2)",
        "test_mask2former.py::test_predicted_scores_are_resized_before_the_sigmoid"),
    "a row of the mask that blocks everything": (
        HEAD, "return allowed | ~allowed.any(-1, keepdim=True)", "return allowed",
        "test_mask2former.py::test_rows_that_block_everything_are_opened"),
    "STM's first layer looks everywhere": (
        HEAD, "allowed = F.adaptive_max_pool2d(first_mask.float(), maps[0].shape[-2:]).flatten(2) > 0",
        "allowed = torch.ones_like(F.adaptive_max_pool2d(first_mask.float(), maps[0].shape[-2:]).flatten(2)) > 0",
        "test_stm.py::test_the_first_layer_looks_at_the_proposal"),
    "255 is a class of class-mix": (
        TRANSFORMS, "minlength=IGNORE + 1)[:IGNORE].nonzero().flatten().cpu()",
        "minlength=IGNORE + 1).nonzero().flatten().cpu()", "test_rein_a.py::test_255_is_no_class_in_class_mix"),
    "half of the classes, rounded down": (
        TRANSFORMS, "(len(present) + 1) // 2", "len(present) // 2",
        "test_transforms.py::test_class_mix_pastes_half_rounded_up"),
}


def run(folder: Path, test: str) -> subprocess.CompletedProcess:
    environment = dict(os.environ, PYTHONPATH=str(folder), OMP_NUM_THREADS="1")
    file, _, name = test.partition("::")
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", str(folder / "tests" / file)]
    return subprocess.run([*command, "-k", name], cwd=folder, env=environment, capture_output=True, text=True)


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    folder = tmp_path_factory.mktemp("copy")
    for name in ("reinpp", "tests"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "settings.ini"):
        shutil.copy(ROOT / name, folder)
    (folder / "data").symlink_to(ROOT / "data")
    if (ROOT.parent / "shared").is_dir(): (folder.parent / "shared").symlink_to(ROOT.parent / "shared")
    return folder


@pytest.mark.parametrize("what", MUTATIONS)
def test_a_broken_line_is_seen(what, copy):
    file, old, new, test = MUTATIONS[what]
    path = copy / "reinpp" / file
    text = path.read_text()
    assert text.count(old) == 1, f"{file} has {text.count(old)} times: {old}"
    path.write_text(text.replace(old, new))
    try:
        broken = run(copy, test)
    finally:
        path.write_text(text)
    if "skipped" in broken.stdout and "failed" not in broken.stdout: pytest.skip(f"{test} needs a fixture")
    assert broken.returncode == 1, broken.stdout[-800:]


@pytest.mark.parametrize("test", sorted({test for *_, test in MUTATIONS.values()}))
def test_unbroken_it_passes(test, copy):
    result = run(copy, test)
    assert result.returncode == 0, result.stdout[-800:]
