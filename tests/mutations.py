"""
One-line faults in the helpers and in the checks of claims, each of which a named test must see: run
`python tests/mutations.py` from the root.

Each fault is put into a scratch copy of the package, never into the working tree, and the one test that should fail is
run there. Exit status 1 unless all faults are seen. `results/mutations.json` and `book/mutations.md` hold the outcome.
With words as arguments, only the faults whose description, file or test holds one of them; nothing is written then.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS, PAGE = ROOT / "results" / "mutations.json", ROOT / "book" / "mutations.md"
COPIED = ("iclgd_helpers", "tools", "tests", "pyproject.toml", "_toc.yml", "_config.yml")
COPIED += ("results/claims.json", "results/theory/greedy_layers.json")  # what checks of claims read
AT_ONCE = 2
LONGEST, LONGEST_IN_ALL = 120, 1200  # seconds: of one test, of everything on a slow machine
MARK = "<!-- What follows is written by `python tests/mutations.py`. -->\n"


@dataclass(frozen=True)
class Fault:
    """In `file` of the package or of the checks of claims, `before` (once, within a line) becomes `after`."""

    what: str
    file: str
    before: str
    after: str
    test: str  # must fail

    @property
    def path(self) -> str:
        """From the repository's root."""
        return self.file if self.file.startswith("tests/") else f"iclgd_helpers/{self.file}"


def _faults(file: str, tests: str, *rows: tuple[str, str, str, str]) -> list[Fault]:
    return [Fault(what, file, before, after, f"tests/{tests}::{test}") for what, before, after, test in rows]


FAULTS = [
    *_faults(
        "theory/gradient_step.py", "unit/test_one_step.py",
        ("The step climbs.", "(weight - learning_rate * gradient)", "(weight + learning_rate * gradient)",
         "test_a_step_is_the_written_out_one"),
        ("The half is missing from the loss.", "/ (2 * residual.shape[1])", "/ residual.shape[1]",
         "test_a_step_is_the_written_out_one"),
        ("The loss is a mean over entries, not over samples.", "/ (2 * residual.shape[1])", "/ (2 * residual.numel())",
         "test_a_step_is_the_written_out_one"),
        ("Labels lack the base.", "/ learning_rate * values + predicted", "/ learning_rate * values",
         "test_one_step_on_the_implied_set_is_attention_to_the_demonstrations"),
        ("Labels lack the factor M.", "values.shape[-1] / learning_rate * values", "values / learning_rate",
         "test_one_step_on_the_implied_set_is_attention_to_the_demonstrations"),
        ("Labels are multiplied by the rate.", "/ learning_rate * values + predicted",
         "* learning_rate * values + predicted", "test_implied_labels_keep_the_values_and_the_base"),
        ("The base enters the labels with the wrong sign.", "_implied(values, keys, base @ keys",
         "_implied(values, keys, -base @ keys", "test_one_step_on_the_implied_set_is_attention_to_the_demonstrations"),
        ("A softmax is left in linear attention.", "values @ (keys.T @ query)", "values @ (keys.T @ query).softmax(0)",
         "test_linear_attention_is_a_sum_over_tokens"),
        ("The last token writes nothing.", "return values @ keys.T", "return values[:, :-1] @ keys[:, :-1].T",
         "test_linear_attention_is_a_sum_over_tokens"),
        ("The step in function space climbs.", "added = -learning_rate", "added = learning_rate",
         "test_a_kernel_step_is_a_step_in_its_features"),
        ("A step of heads side by side is averaged over value entries.", "added = -learning_rate / residual.shape[-1]",
         "added = -learning_rate / residual.shape[1]", "test_heads_side_by_side_are_the_heads_one_by_one"),
        ("The step in function space is not averaged.", "-learning_rate / residual.shape[-1] *", "-learning_rate *",
         "test_softmax_is_a_ratio_of_two_kernel_steps"),
        ("The kernel's query is not scaled.", "torch.exp(scale * keys.mT @ queries - shift)",
         "torch.exp(keys.mT @ queries - shift)", "test_softmax_is_a_ratio_of_two_kernel_steps"),
        ("The denominator does not count tokens.", "torch.ones_like(values[..., :1, :])",
         "torch.zeros_like(values[..., :1, :])",
         "test_ones_row_and_ratio"),
        ("The ratio divides by the wrong row.", "stacked[..., :-1, :] / stacked[..., -1:, :]",
         "stacked[..., :-1, :] / stacked[..., :1, :]",
         "test_ones_row_and_ratio"),
        ("The base of softmax is written by the demonstrations.",
         "KernelExpansion(kernel, own[1], with_ones_row(own[0]))",
         "KernelExpansion(kernel, demonstrations[1], with_ones_row(demonstrations[0]))",
         "test_softmax_is_a_ratio_of_two_kernel_steps"),
        ("The gate opens where it should close.", "torch.sigmoid(shown - own)", "torch.sigmoid(own - shown)",
         "test_softmax_is_a_ratio_of_two_kernel_steps"),
        ("elu + 1 without the 1.", "functional.elu(x) + 1", "functional.elu(x)", "test_plain_feature_maps"),
        ("Positive features lack a half.", "x.square().sum(0) / 2)", "x.square().sum(0))",
         "test_random_features_estimate_their_kernels[favor-exponential]"),
        ("Fourier features are scaled by their number, not by that of the pairs.", "math.sqrt(2 / n_features)",
         "math.sqrt(1 / n_features)", "test_random_features_estimate_their_kernels[rff-gaussian]"),
        ("The factorials of the exponential's series multiply.", "- torch.lgamma(", "+ torch.lgamma(",
         "test_monomials_are_the_series_of_the_exponential"),
    ),
    *_faults(
        "theory/transformer.py", "unit/test_transformer.py",
        ("The norm's bias is left out.", "gain.shape, gain, bias)", "gain.shape, gain)",
         "test_forward_is_the_plain_loop"),
        ("RoPE does not rotate.", "(even * angles.cos() - odd * angles.sin(),",
         "(even * angles.cos() + odd * angles.sin(),", "test_rotation_depends_on_differences_only"),
        ("Softmax scores are not scaled.", "torch.exp(scores / config.d_head**0.5)", "torch.exp(scores)",
         "test_forward_is_the_plain_loop"),
        ("ALiBi prefers what is far.", "torch.exp(-slopes", "torch.exp(slopes", "test_forward_is_the_plain_loop"),
        ("Biases of queries, keys and values are left out.", '@ inputs + layer[f"b_{name}"]', "@ inputs",
         "test_forward_is_the_plain_loop"),
        ("The causal mask hides the token itself.", "counts.triu()", "counts.triu(1)",
         "test_forward_is_the_plain_loop"),
        ("The mask is anti-causal.", "counts.triu()", "counts.tril()", "test_forward_is_the_plain_loop"),
        ("A demonstration is not trained on itself.", "range(0), range(token + 1)", "range(0), range(token)",
         "test_training_tokens"),
        ("Demonstrations are trained on all of them (Lemma 6.1 as printed).", "range(0), range(token + 1)",
         "range(0), range(n_demonstrations)", "test_one_step_a_layer_is_the_forward_pass"),
        ("The base ends one token early.", "token + 1 if causal else n_tokens", "token if causal else n_tokens",
         "test_one_step_a_layer_is_the_forward_pass"),
        ("Every token asks the first one's question.", "heads.queries[head, :, token : token + 1]",
         "heads.queries[head, :, :1]", "test_one_step_a_layer_is_the_forward_pass"),
        ("The residual around attention is lost.", 'x = x + (layer["w_o"]', 'x = (layer["w_o"]',
         "test_forward_is_the_plain_loop"),
        ("The residual around the feed-forward layer is added twice (erratum 7).", 'x = x + layer["w_2"]',
         'x = 2 * x + layer["w_2"]', "test_forward_is_the_plain_loop"),
        ("Attention reads states that were not normed.", "norms[0](x) if pre else x, positions", "x, positions",
         "test_forward_is_the_plain_loop"),
        ("The feed-forward layer uses attention's norm.", "(norms[1](x) if pre else x)", "(norms[0](x) if pre else x)",
         "test_forward_is_the_plain_loop"),
        ("The output includes the demonstrations.", "self.states[-1][:, self.n_demonstrations :]", "self.states[-1]",
         "test_forward_is_the_plain_loop"),
        ("The written weight is transposed.", "heads.values[..., tokens] @ heads.keys[..., tokens].mT",
         "heads.keys[..., tokens] @ heads.values[..., tokens].mT", "test_written_weight_adds_up_over_tokens"),
        ("Positions always start at zero.", "torch.arange(first_position, first_position + x.shape[1])",
         "torch.arange(x.shape[1])", "test_forward_is_the_plain_loop"),
    ),
    *_faults(
        "engine/prefix_attention.py", "exactness/test_exactness.py",
        ("Recorded scores lack the scale.", "grouped, key) * scoring.scaling)", "grouped, key))",
         "test_scores_through_softmax_are_attention_weights[float64-llama]"),
        ("The sliding window is one token too wide.", "(distance < (window or n_tokens))",
         "(distance <= (window or n_tokens))", "test_cached_equals_recomputed[float64-gemma3-60]"),
        ("The window cuts one token too many off the prefix.", "n_prefix + 1 - window", "n_prefix + 2 - window",
         "test_cached_equals_recomputed[float64-gemma3-60]"),
        ("The gate between prefix and query is the wrong way round.",
         "torch.sigmoid(prefix_normaliser[..., None] - own_normaliser)",
         "torch.sigmoid(own_normaliser - prefix_normaliser[..., None])",
         "test_cached_equals_recomputed[float64-llama-23]"),
        ("Query heads are dealt to key/value heads in turn.", "tensor.repeat_interleave(group, 1)",
         "tensor.repeat(1, group, 1, 1)", "test_cached_equals_recomputed[float64-llama-23]"),
    ),
    *_faults(
        "engine/models.py", "exactness/test_exactness.py",
        ("Every row of a fused projection is trained.", "if bool(makes_kv.all()):", "if True:",
         "test_query_rows_of_fused_projections_stay[gpt_neox-standard]"),
        ("Biases of key and value projections are left out.", "for part, parameter in projection.named_parameters()",
         'for part, parameter in projection.named_parameters() if part == "weight"',
         "test_finetuning_equals_naive[float64-opt-standard-all]"),
        ("The logit lens skips the final norm.", "normed: Tensor = self.final_norm(states)", "normed: Tensor = states",
         "test_observation_equals_naive[float64-gpt2-0-label]"),
        ("The untrained control leaves its weights behind.", " parameter.data = data", " pass",
         "test_untrained_weights[llama-blocks]"),
    ),
    *_faults(
        "engine/prefix_attention.py", "exactness/test_families.py",
        ("The sink takes nothing.", "return output * torch.sigmoid(normaliser - self.sink[:, None])[",
         "return output + 0 * torch.sigmoid(normaliser - self.sink[:, None])[", "test_a_tested_type_is_exact[gpt_oss]"),
        ("The sink sees the query's own tokens only.", "torch.logaddexp(prefix_normaliser, own_normaliser[..., 0])",
         "own_normaliser[..., 0]", "test_a_tested_type_is_exact[gpt_oss]"),
        ("Attention is not capped.", "torch.tanh(scores / self.softcap) * self.softcap", "scores",
         "test_a_tested_type_is_exact[gemma2]"),
        ("ALiBi begins anew behind the prefix.", "self.positions[self.packing.take]",
         "self.packing.positions[self.packing.take]", "test_a_tested_type_is_exact[bloom]"),
        ("Recorded scores leave ALiBi out.", "(bias - bias[each, :, read][..., None])",
         "0 * (bias - bias[each, :, read][..., None])", "test_a_tested_type_is_exact[bloom]"),
    ),
    *_faults(
        "engine/own_attention.py", "exactness/test_families.py",
        ("XGLM's query is scaled twice.", "_heads(module.q_proj(hidden_states) * module.scaling, module.head_dim)",
         "_heads(module.q_proj(hidden_states) * module.scaling**2, module.head_dim)",
         "test_a_tested_type_is_exact[xglm]"),
        ("GPT-Neo's local layers see everything.", 'if module.attention_type == "local" else None',
         'if module.attention_type == "nowhere" else None', "test_a_tested_type_is_exact[gpt_neo]"),
        ("Falcon's groups take each other's keys.", "key[:, ::group], value[:, ::group]",
         "key[:, ::group].flip(1), value[:, ::group].flip(1)", "test_a_tested_type_is_exact[falcon, groups]"),
        ("BLOOM's residual is left out.", "return residual + module.dense(", "return module.dense(",
         "test_a_tested_type_is_exact[bloom]"),
    ),
    *_faults(
        "engine/parts.py", "exactness/test_families.py",
        ("Value projections are not trained.", 'return module, ("k_proj", "v_proj")', 'return module, ("k_proj",)',
         "test_a_tested_type_is_exact[llama]"),
        ("Keys may be made of queries, too.", "if bool(outputs.any()) and bool((outputs == into_q[name]).any()):",
         "if False:", "test_families_whose_keys_are_made_of_more_are_refused"),
        ("Attention outputs are those of the first projection.", "list(leaves[layer])[-1]", "list(leaves[layer])[0]",
         "test_a_tested_type_is_exact[phi]"),
    ),
    *_faults(
        "engine/models.py", "exactness/test_families.py",
        ("Granite's logits are multiplied, not divided.", "or 1.0) / float(", "or 1.0) * float(",
         "test_a_tested_type_is_exact[granite]"),
        ("Labels' logits lack the bias of the head.", "None if bias is None else bias[list(words)]", "None",
         "test_losses_over_labels_are_exact_whatever_is_behind_the_head[phi-label_space]"),
        ("An untested type need not be exact.", "self_check.check(model, name, self._read, expected, windows)", "pass",
         "test_families_without_a_test_are_refused_where_they_differ"),
    ),
    *_faults(
        "engine/finetune.py", "exactness/test_families.py",
        ("The cap of logits has slope 1.", "return share * cap, 1 - share.square()",
         "return share * cap, torch.ones_like(share)", "test_a_tested_type_is_exact[gemma2]"),
        ("The loss forgets the multiplier of logits.", "rows, bias = rows * scale,", "rows, bias = rows,",
         "test_a_tested_type_is_exact[cohere]"),
    ),
    *_faults(
        "engine/self_check.py", "exactness/test_families.py",
        ("A window that is not handed on is not missed.", 'if kept == "sliding_attention" and window is None:',
         "if False:", "test_families_without_a_test_are_refused_where_they_differ"),
    ),
    *_faults(
        "engine/observe.py", "exactness/test_exactness.py",
        ("Attention outputs are read where the label is predicted.", "at_predict = packing.start + read",
         "at_predict = packing.start + predict", "test_observation_equals_naive[float64-llama-1-label]"),
        ("Questions stand at the first positions, not behind their prefix.", "start=prefix.length, call",
         "start=0, call", "test_observation_equals_naive[float64-gpt2-1-label]"),
        ("The head's labels are the first rows of the vocabulary.", "logits(lens[which], first)",
         "logits(lens[which], range(len(first)))", "test_observation_equals_naive[float64-llama-0-label]"),
    ),
    *_faults(
        "engine/finetune.py", "exactness/test_exactness.py",
        ("Finetuning climbs.", "length, value=-1)", "length, value=1)",
         "test_finetuning_equals_naive[float64-llama-standard-all]"),
        ("Layers are not detached from those below.", "return (inputs[0].detach(),", "return (inputs[0],",
         "test_a_layers_loss_has_no_gradient_in_other_layers[llama]"),
        ("Of the products with the head's parts, one is kept.", "words).sum(0)", "words)[0]",
         "test_the_vocabulary_loss_in_parts[40-3-products3-None]"),
        ("The loss asks for the present token, not the next one.", "row[place + 1] for", "row[place] for",
         "test_finetuning_equals_naive[float64-llama-standard-all]"),
        ("The label loss reads the state of the label itself.", "places[start - 1 : start - 1 +",
         "places[start : start +",
         "test_finetuning_equals_naive[float64-llama-standard-label]"),
        ("The loss is summed over tokens.", "losses.mean(1) if", "losses.sum(1) if",
         "test_finetuning_equals_naive[float64-llama-standard-all]"),
        ("Gradient norms pile up over steps.", " norms.append(norm)", " norms.append(norm + sum(norms))",
         "test_gradient_norms_are_of_one_step_alone[llama-standard]"),
        ("Global clipping looks at one layer.", "norms.square().sum().sqrt().expand_as(norms) if", "norms if",
         "test_clipping_equals_naive_and_bounds_the_step[llama-global-standard]"),
        ("Elementwise clipping bounds one side only.", "clamp(-bound, bound)", "clamp(max=bound)",
         "test_clipping_equals_naive_and_bounds_the_step[llama-elementwise-standard]"),
        ("Every learner takes the first one's rate.", "self.rates[:, None]", "self.rates[:1, None]",
         "test_learners_together_equal_each_alone[llama-standard-1073741824]"),
        ("Every learner's states meet the first one's weights.", "(weight.transpose(1, 2) if",
         "(weight[:1].transpose(1, 2) if", "test_learners_together_equal_each_alone[llama-joint-1073741824]"),
        ("A learner's own starting weights are forgotten.", "learner.start or language_model.original()",
         "language_model.original()", "test_learners_together_equal_each_alone[llama-sequential-1073741824]"),
        ("What was summed before a larger logit came is not scaled down.", "normaliser * shrink +", "normaliser +",
         "test_the_vocabulary_loss_in_parts"),
        ("The expected row of the head is not scaled down with it.", "expected.mul_(shrink)", "expected",
         "test_the_vocabulary_loss_in_parts"),
        ("The sequential reading passes on what the layer gave before its step.", "return recompute()", "return None",
         "test_sequential_differs_from_joint[llama]"),
    ),
    *_faults(
        "experiments/comparison.py", "exactness/test_exactness.py",
        ("The delta of attention maps compares swapped arms.", "sim_am_delta(maps_without, maps_shown, maps_tuned,",
         "sim_am_delta(maps_tuned, maps_shown, maps_without,", "test_record_equals_naive[gpt2-as the original]"),
    ),
    *_faults(
        "experiments/updates.py", "exactness/test_exactness.py",
        ("The norm-matched control rescales the standard update.", 'scaled_to(model, updates["joint"]',
         'scaled_to(model, updates["standard"]', "test_record_equals_naive[gpt2-as the original]"),
    ),
    *_faults(
        "measures/metrics.py", "unit/test_metrics.py",
        ("The null of SimAOU lacks its half.", "return 0.5 * (", "return 1.0 * (",
         "test_null_is_what_independent_updates_score"),
        ("SimAOU forgets to subtract zero-shot once.", "return cosine(in_context - zero_shot, finetuned - zero_shot)",
         "return cosine(in_context, finetuned - zero_shot)", "test_similarities_equal_naive"),
        ("A cosine with a zero vector is zero, not undefined.", "/ norms, torch.nan)", "/ norms, 0.0)",
         "test_zero_vectors_are_undefined_not_zero"),
        ("One undefined head spoils the mean over heads.", "cosine(in_context, other).nanmean(-1)",
         "cosine(in_context, other).mean(-1)", "test_zero_vectors_are_undefined_not_zero"),
        ("The union of changes is counted as a set in the code's rule.", "a.sum() + b.sum() - shared.sum()",
         "(a | b).sum()", "test_jaccard_equals_naive_within_bounds"),
        ("Rec2FTP counts what was right before.", "(zero_shot != labels) & (finetuned == labels)",
         "(finetuned == labels)", "test_rec2ftp_equals_its_definition"),
    ),
    *_faults(
        "measures/intervals.py", "unit/test_statistics.py",
        ("All values are averaged at once, not layers after examples.", '"mean": _mean(per_layer)',
         '"mean": float(np.nanmean(values))', "test_layer_means_average_examples_first_then_layers"),
        ("The lower end of an interval leaves out too much.", "[(1 - LEVEL) / 2,", "[(1 - LEVEL) * 2,",
         "test_coverage[accuracy]"),
        ("Columns are resampled apart.", "*(column[i] for column in columns)",
         "*(column[(i + n) % len(i)] for n, column in enumerate(columns))", "test_columns_are_resampled_jointly"),
        ("A mean is taken over resamples.", "columns[0][draws].mean(1)", "columns[0][draws].mean(0)",
         "test_the_mean_has_no_call_a_resample_and_the_same_ends[7]"),
    ),
    *_faults(
        "measures/intervals.py", "unit/test_statistics.py",
        ("The interval over seeds takes the spread for the error of the mean.", ".std(ddof=1) / np.sqrt(len(found))",
         ".std(ddof=1)", "test_interval_over_seeds_is_students"),
        ("The interval over seeds has one degree of freedom too many.", "len(found) - 1)", "len(found))",
         "test_interval_over_seeds_is_students"),
    ),
    *_faults(
        "experiments/learning_rates.py", "grids/test_grid.py",
        ("Of equal rates the larger one is chosen.", '-point["learning_rate"]', 'point["learning_rate"]',
         "test_the_best_rate_wins_and_ties_go_to_the_smaller[values3-0]"),
        ("The gate reads the rows of the demonstrations.", "for example in drawn[n_shown:]]", "for example in drawn]",
         "test_the_gate_equals_an_independent_computation"),
    ),
    *_faults(
        "experiments/sweeps.py", "grids/test_grid.py",
        ("A label's log-probability is not compared with the other labels'.", " - np.logaddexp.reduce(scores, -1)", "",
         "test_a_point_of_the_rates_equals_an_independent_computation"),
        ("A sweep of an older engine counts as stored.", '"engine": provenance.engine_hash(),', "",
         "test_a_sweep_of_other_helpers_data_settings_or_rule_is_made_again"),
    ),
    *_faults(
        "experiments/plans.py", "grids/test_grid.py",
        ("A run is computed before its rates are compared.", "after = () if known.chosen else (known.first,)",
         "after = ()", "test_a_run_is_not_stored_before_its_rates_are_chosen"),
        ("A stored sweep counts though its points are not those of the protocol.",
         "is_stored = stored is not None and is_whole(stored)", "is_stored = stored is not None",
         "test_a_sweep_of_other_helpers_data_settings_or_rule_is_made_again"),
        ("Rates are taken from a sweep that is not whole.",
         "if stored is not None and learning_rates.is_whole(stored) else None", "if stored is not None else None",
         "test_a_sweep_of_other_helpers_data_settings_or_rule_is_made_again"),
    ),
    *_faults(
        "experiments/grids.py", "grids/test_sweep.py",
        ("The estimate counts what is stored.", '(groups | {"all": waiting})', '(groups | {"all": planned})',
         "test_what_is_stored_costs_nothing"),
    ),
    *_faults(
        "experiments/cost.py", "unit/test_cost.py",
        ("A pass moves its matrices once for each token.", "(shape._matrices + head_read",
         "(tokens * shape._matrices + head_read", "test_moved_bytes_are_those_of_the_models_own_tensors"),
        ("A joint step reads the head once, however many rows it has.",
         "-(-shape.n_layers * tokens // finetune.STEP_TOKENS)", "1", "test_moved_bytes_of_a_step"),
    ),
    *_faults(
        "experiments/performing.py", "grids/test_runner.py",
        ("A lock that another process holds is taken for ours.", "error.errno not in (errno.EAGAIN, errno.EACCES)",
         "True", "test_a_lock_is_held_once_and_removed"),
        ("A lock that was removed meanwhile is taken for one.", "st_nlink > 0", "st_nlink >= 0",
         "test_a_lock_that_was_removed_since_it_was_opened_guards_nothing"),
        ("A worker does not compare its helpers with the command's.", "if identities().get(name) != wanted]",
         "if False]", "test_a_worker_with_other_helpers_refuses"),
    ),
    *_faults(
        "experiments/runner.py", "grids/test_runner.py",
        ("What needs a failed job waits for ever.", "monotonic(), {*self.failed, *self.untried}",
         "monotonic(), {*self.untried}",
         "test_what_needs_a_failed_job_is_not_tried"),
        ("More jobs are handed out than workers take.", "elif taken[kind] < sum(", "elif taken[kind] <= sum(",
         "test_no_more_jobs_are_handed_out_than_workers_take"),
        ("Who refused a job is forgotten.", "self.order(job, threads), refused)", "self.order(job, threads), set())",
         "test_a_refused_job_goes_to_others_until_none_is_left"),
        ("A job that another process computes is asked for without a pause.", "BUSY_SECONDS if state == BUSY else 0",
         "0", "test_a_busy_job_is_asked_for_again_after_a_while"),
        ("What was stored before says how fast jobs are.", "if message != STORED:", "if message:",
         "test_the_rest_takes_as_long_as_what_was_computed"),
    ),
    *_faults(
        "experiments/dask_workers.py", "grids/test_runner.py",
        ("It is not said how far a job is.", "found = progress.noted(", "found = None and progress.noted(",
         "test_it_is_said_how_far_a_job_is"),
        ("A result that died with its worker counts as a failure.", 'if future.status == "lost":',
         'if future.status == "":', "test_what_a_future_says_of_its_job"),
        ("A refused job is handed to who refused it.", "not in refused_by]", "not in ()]",
         "test_a_job_is_handed_out_past_workers_that_refused_it"),
        ("The settings are not read: a job may kill as many workers as Dask lets it.",
         'yaml.safe_load(SETTINGS.read_text(encoding="utf-8")))', "{})", "test_settings_are_those_of_the_file"),
        ("Workers are started for whom there is no memory.", "memory // (peak_memory + WORKER_BYTES)",
         "memory // WORKER_BYTES", "test_no_more_workers_than_cores_memory_and_jobs"),
    ),
    *_faults(
        "pages/selection.py", "notebooks/test_reproduction.py",
        ("A record of older helpers comes before the present one.", "return is_current(record), found",
         "return not is_current(record), found", "test_current_helpers_come_first_then_more_rows"),
        ("The gate opens when the difference itself is above 0.", '_minus_zero_shot"]["interval"][0]',
         '_minus_zero_shot"]["value"]', "test_gate_is_an_interval_above_zero_on_training_rows"),
        ("Random weights count as evidence.", 'startswith(("random-", "tiny-")):', 'startswith("tiny-"):',
         "test_notes_name_what_is_missing_older_or_random"),
    ),
    *_faults(
        "measures/calibration.py", "unit/test_calibration.py",
        ("The prior is a mean of log-probabilities.", "logsumexp(among_labels, axis=0) - np.log(len(among_labels))",
         "among_labels.mean(0)", "test_prior_is_the_mean_label_distribution"),
        ("The prior is added.", "np.asarray(log_probabilities, float) - np.asarray(prior, float)",
         "np.asarray(log_probabilities, float) + np.asarray(prior, float)", "test_a_planted_bias_is_removed_exactly"),
        ("The prior is that of the vocabulary.", "log_softmax(np.asarray(log_probabilities, float), axis=-1)",
         "np.asarray(log_probabilities, float)", "test_prior_is_the_mean_label_distribution"),
        ("Priors are exchanged the wrong way round.", "np.stack([a + difference, b - difference, b])",
         "np.stack([a - difference, b + difference, b])", "test_changes_of_a_prior_alone_are_all_its_own"),
        ("The prior's share is its effect taken first.", "(first + whole - without) / 2", "first",
         "test_both_shares_add_up_and_do_not_depend_on_names"),
    ),
    *_faults(
        "measures/hierarchical.py", "unit/test_hierarchical.py",
        ("Answers are taken one by one.", "max(0.0, float(square - squares[2])) / n", "0.0 * float(square) / n",
         "test_intervals_cover"),
        ("Questions add nothing to the variance.", "(seeds, questions, residual), parts)",
         "(seeds, 0.0, residual), parts)",
         "test_variances_are_those_that_were_planted"),
        ("A mean over tasks has the variance of one task.", "for task in tasks.values()) / len(tasks) ** 2",
         "for task in tasks.values())", "test_intervals_cover"),
        ("Degrees of freedom are forgotten.", "stats.t.ppf((1 + intervals.LEVEL) / 2, degrees)", "NORMAL",
         "test_an_effect_without_questions_varies_between_seeds_alone"),
        ("A tiny effect is reproduced.", "if -bound < found.low and found.high < bound:", "if False:", "test_verdict"),
        ("A negative effect is reproduced.", "return REPRODUCED if found.value > 0 else REFUTED", "return REPRODUCED",
         "test_verdict"),
        ("P values are not adjusted.", "np.asarray(stats.false_discovery_control(values))", "values",
         "test_false_discoveries_are_held_down_over_all_statements"),
        ("A ratio is that of the first seed.", "means, statistic = values.mean((0, 2))",
         "means, statistic = values[0].mean(-1)",
         "test_a_ratio_is_that_of_all_answers_together"),
        ("A hole counts with the other seeds.", "~np.isnan(values).any((0, 1))", "~np.isnan(values[0]).any(0)",
         "test_what_is_undefined_has_no_effect"),
    ),
    *_faults(
        "pages/decisions.py", "notebooks/test_decisions.py",
        ("Draws are taken for all that there are.", "from_interval(effect(of_task), n, without)",
         "from_interval(effect(of_task), n)", "test_draws_and_orders_are_samples_too"),
        ("Rows that were seen pass for unseen ones.", "key[1] not in SEEN_TASKS", "key[1] not in ()",
         "test_effects_on_unseen_rows_leave_three_tasks_out"),
        ("Seeds with other questions are crossed.", "for record in of_task}) > 1:", "for record in of_task}) > 99:",
         "test_seeds_are_crossed_with_the_same_questions_or_not_at_all"),
        ("A gate that is closed lets through.", "if opened is not None and one.statement.gated and not",
         "if False and not", "test_a_gated_statement_needs_three_open_tasks"),
        ("An effect is read from the wrong reading.", "_estimate(one, grids[one.reading], opened, stored) for",
         "_estimate(one, grids[RAW], opened, stored) for", "test_effects_are_those_of_the_reading"),
    ),
    *_faults(
        "experiments/readings.py", "exactness/test_priors.py",
        ("Texts without content enter the prior.", 'table[table["row"] >= 0]', "table", "test_priors_of_other_sources"),
    ),
    *_faults(
        "data/demonstrations.py", "exactness/test_priors.py",
        ("Demonstrations are texts of the prior.", "if train[i].row not in shown)", ")",
         "test_texts_are_neither_demonstrations_nor_questions"),
    ),
    *_faults(
        "experiments/comparison.py", "exactness/test_priors.py",
        ("Texts without content enter the calibrated reading.", "query.row >= 0 for query in run.calibration",
         "True for query in run.calibration", "test_calibrated_predictions_equal_naive"),
    ),
    *_faults(
        "measures/resampling.py", "unit/test_verdicts.py",
        ("What the choice of questions adds stays in a spread.", "(sums**2 - squares).sum(0)", "(sums**2).sum(0)",
         "test_variance_between_cells_is_that_of_all_pairs_of_questions"),
        ("The jackknife forgets how many are left out.", "np.sqrt((n - 1) * np.var", "np.sqrt(np.var",
         "test_jackknife_of_a_mean_is_the_textbook_interval"),
    ),
    *_faults(
        "measures/verdicts.py", "unit/test_verdicts.py",
        ("One seed decides a task.", "least: int = 2", "least: int = 1", "test_status_of_a_task"),
        ("A majority is enough for a statement.", '3 * judged.count("for")', '4 * judged.count("for")',
         "test_verdict_of_a_model"),
    ),
    *_faults(
        "engine/prefix_attention.py", "exactness/test_labels.py",
        ("A label sees the tokens of another one.", "torch.where(same, distance, -1)", "distance",
         "test_observation_equals_naive[float64-llama-label-sum]"),
        ("The last token of a label sees its own padding.", "masked_fill(~within[:, None], -1)",
         "masked_fill(~within[:, None] & False, -1)", "test_observation_equals_naive[float64-llama-label-sum]"),
    ),
    *_faults(
        "data/token_layout.py", "exactness/test_labels.py",
        ("A label is predicted where its own token stands.", "range(len(depth), len(depth) + n_label - 1)",
         "range(len(depth) + 1, len(depth) + n_label)", "test_observation_equals_naive[float64-llama-label-sum]"),
        ("Labels stand one behind the other.", "depth += range(trunk, trunk + n_shown)",
         "depth += range(len(depth), len(depth) + n_shown)",
         "test_observation_equals_naive[float64-llama-label-sum]"),
    ),
    *_faults(
        "data/task_files.py", "unit/test_task_files.py",
        ("Of two fields of one name the last one counts.", "if names.count(name) > 1)", "if names.count(name) > 2)",
         "test_what_yaml_would_take_silently_is_refused"),
        ("A task file may nest as deep as it likes.", "if depth > MAX_DEPTH:", "if False:",
         "test_what_yaml_would_take_silently_is_refused"),
    ),
    *_faults(
        "data/tasks.py", "unit/test_task_files.py",
        ("A template may show the answer.", "if task.label_column in columns:", "if False:",
         "test_a_template_may_not_show_the_answer"),
    ),
    *_faults(
        "experiments/parameters.py", "unit/test_formats.py",
        ("With a chat template a separator counts that nobody reads.", "values |= CHAT_FORMAT |", "values |=",
         "test_a_chat_says_what_stands_before_a_label"),
    ),
    *_faults(
        "engine/observe.py", "exactness/test_labels.py",
        ("The mean of a label's tokens is their sum.", "1 / len(label) if", "1 if",
         "test_observation_equals_naive[float64-llama-label-mean]"),
    ),
    *_faults(
        "engine/finetune.py", "exactness/test_labels.py",
        ("Class scores have the wrong sign.", "-(one.mean(1) if", "(one.mean(1) if",
         "test_finetuning_equals_naive[llama-standard-label_space-sum]"),
    ),
    *_faults(
        "data/token_layout.py", "unit/test_sequences.py",
        ("A token over the boundary is cut off.", "n = min(_n_shared(alone, whole[:-1]) for whole in wholes)",
         "n = min(n, min(map(len, wholes)) - 1)", "test_a_token_over_the_boundary_belongs_to_the_label"),
    ),
    *_faults(
        "pages/published.py", "notebooks/test_published.py",
        ("A printed digit is taken for exact to a whole unit.", "tolerance=0.5 * 10.0**-decimals",
         "tolerance=10.0**-decimals", "test_tolerance_is_half_a_unit_of_the_last_printed_digit"),
    ),
    *_faults(
        "data/token_layout.py", "unit/test_sequences.py",
        ("Attention is read one token early.", "read = predict + len(labels[0]) if",
         "read = predict if",
         "test_query_and_its_two_positions"),
        ("The prediction is read one token late.", "predict, scored = len(trunk) - 1,",
         "predict, scored = len(trunk),",
         "test_query_and_its_two_positions"),
        ("Finetuning sequences carry the first class's label.", "labels[example.label], self._scored",
         "labels[0], self._scored",
         "test_training_sequence_is_bos_prompt_label"),
        ("The beginning-of-sequence token is not counted twice.", "length + 1 + longest_query >= limit",
         "length + longest_query >= limit", "test_demonstrations_that_do_not_fit_are_dropped_in_order"),
    ),
    *_faults(
        "data/token_layout.py", "exactness/test_exactness.py",
        ("Demonstrations are not separated.", "(*self.demonstration(example), *self.separator)",
         "self.demonstration(example)", "test_separators[llama-eos]"),
    ),
    *_faults(
        "data/token_layout.py", "exactness/test_prompt_formats.py",
        ("An instruction is not closed by the separator.", "_encode(tokenizer, (instruction,))[0], *between)",
         "_encode(tokenizer, (instruction,))[0])", "test_a_format_equals_naive[llama-an instruction-3]"),
        ("What stands before a label is not in demonstrations.", "label_score, blank, before, pieces, pieces)",
         "label_score, blank, before, (), pieces)", "test_a_format_equals_naive[llama-words before the label-3]"),
        ("A chat's question is not closed.", 'label_score, "", start, answer, ask, chat)',
         'label_score, "", start, answer, (), chat)', "test_a_chat_equals_naive[llama-no instruction-3]"),
        ("A step does not see the instruction.", "tuple(before) or self.prefix()", "tuple(before) or (self.bos,)",
         "test_finetuning_equals_naive[all of them-all-llama]"),
    ),
    *_faults(
        "data/chat.py", "exactness/test_prompt_formats.py",
        ("An instruction that is no system's turn is lost.", 'f"{instruction}\\n\\n{turns[0][1]}"', 'turns[0][1]',
         "test_a_chat_equals_naive[llama-no system's turn-3]"),
    ),
    *_faults(
        "data/chat.py", "unit/test_formats.py",
        ("A template may write a question otherwise behind others.", "alone != [head, ask] or", "False or",
         "test_a_template_that_cannot_be_used_is_one_line"),
        ("A template may change a text.", "shown, prompt) != text:", "shown, prompt) != text and False:",
         "test_a_template_that_changes_a_text_is_refused"),
    ),
    *_faults(
        "data/token_layout.py", "unit/test_formats.py",
        ("A separator that the tokenizer changes is taken.", "    if found != text:",
         "    if found is None:", "test_a_separator_that_a_tokenizer_changes_is_refused"),
        ("Half of the context is more than half.", "len(self.separator) - 2) // 2", "len(self.separator)) // 2",
         "test_two_texts_that_are_not_too_long_fit_together"),
    ),
    *_faults(
        "experiments/runs.py", "unit/test_formats.py",
        ("What is left out is not counted.", "len(everything) - len(short)", "0",
         "test_texts_that_are_too_long_end_the_run_or_are_left_out_and_counted"),
    ),
    *_faults(
        "data/task_files.py", "unit/test_task_files.py",
        ("A task file may refer to itself.", "isinstance(event, yaml.AliasEvent)", "event is None",
         "test_a_file_that_is_none_is_one_line"),
    ),
    *_faults(
        "experiments/inputs.py", "unit/test_task_files.py",
        ("Balanced demonstrations may lack a class.", "if given.balanced and (missing :=",
         "if not given.balanced and (missing :=", "test_a_class_without_training_rows_is_said"),
    ),
    *_faults(
        "experiments/provenance.py", "unit/test_task_files.py",
        ("A record's name says where the task file lies.", '"data_file", "task_file", "device")',
         '"data_file", "device")',
         "test_a_record_is_named_by_what_a_file_says_and_not_by_where_it_lies"),
    ),
    *_faults(
        "data/sources.py", "unit/test_tasks.py",
        ("Evaluation rows are shuffled with another seed.", "EVALUATION_SEED = 1 ", "EVALUATION_SEED = 2 ",
         "test_evaluation_is_shuffled_with_seed_1_and_capped"),
    ),
    *_faults(
        "data/demonstrations.py", "unit/test_tasks.py",
        ("Balancing gives the places left over to one class.", "left_over -= 1", "left_over -= 0",
         "test_balanced_demonstrations"),
        ("Shuffled labels may be the same as before.", "while permuted == labels and", "while permuted is labels and",
         "test_shuffled_labels_differ_and_stay_the_same_multiset"),
    ),
    *_faults(
        "experiments/parameters.py", "unit/test_parameters.py",
        ("Of two caps on rows the larger one holds.", 'min(settings.pop("row_cap")', 'max(settings.pop("row_cap")',
         "test_given_before_task_before_preset[subj-smoke]"),
    ),
    *_faults(
        "experiments/provenance.py", "exactness/test_engines.py",
        ("A docstring changes the engine's hash.", "for line in _lines(source) if _computes(line)]",
         "for line in _lines(source)]", "test_what_computes_nothing_is_not_hashed"),
        ("Indentation is not hashed.", 'yield ["{" if found.type == token.INDENT else "}"]', "pass",
         "test_what_computes_is_hashed"),
    ),
    *_faults(
        "experiments/provenance.py", "grids/test_records.py",
        ("A record's identity leaves out the model's content.", '{"model": model, "device": "auto"}',
         '{"device": "auto"}', "test_identity_depends_on_every_parameter_on_the_data_and_on_the_model"),
    ),
    *_faults(
        "storage.py", "grids/test_records.py",
        ("The checksum of stored JSON is not compared.", "if content.pop(CHECKSUM) != checksum(content):",
         "if not content.pop(CHECKSUM):", "test_json_beside_the_records"),
        ("What a living process is writing is removed.", "not _is_running(int(process))", "True",
         "test_leftovers_of_a_killed_process_are_removed_and_a_living_ones_are_not"),
    ),
    *_faults(
        "experiments/records.py", "grids/test_records.py",
        ("A record of another run is taken for its folder's.", 'if not content["id"] == found == path.name:',
         'if not content["id"] == path.name:', "test_a_record_that_is_not_its_folders_is_refused"),
        ("A sound record is written again.", "    if _is_sound(final):", "    if False:",
         "test_a_sound_record_stays_and_a_damaged_one_is_replaced"),
    ),
    *_faults(
        "engine/checkpoints.py", "unit/test_checkpoints.py",
        ("A folder's configuration is not part of its content.",
         '"pytorch_model*.bin", "*.json", ', '"pytorch_model*.bin", ', "test_a_changed_folder_is_another_model"),
        ("A file's checksum is kept whatever happens to the file.", "if entry and entry[:-1] == state:", "if entry:",
         "test_files_are_read_again_only_when_they_have_changed"),
        ("Tensors may be missing.", '{"missing_keys": "are missing", ', "{",
         "test_a_checkpoint_that_is_not_what_it_says_is_refused_in_one_line"),
        ("An adapter is ignored.", 'if (folder / "adapter_config.json").is_file():', "if False:",
         "test_a_checkpoint_that_is_not_what_it_says_is_refused_in_one_line"),
    ),
    *_faults(
        "engine/models.py", "unit/test_checkpoints.py",
        ("Weights that are no numbers are taken.", "if not bool(weight.isfinite().all())]", "if False]",
         "test_a_checkpoint_that_is_not_what_it_says_is_refused_in_one_line"),
    ),
    *_faults(
        "engine/models.py", "exactness/test_model_edges.py",
        ("Every model's layer 0 sees the prompt.", "return bool((scores[1] - scores[0]).norm() >",
         "return bool((scores[1] - scores[0]).norm() >= 0 *",
         "test_whether_the_first_layer_sees_the_prompt_is_measured"),
        ("A sequence may be longer than the context.", "if start + length > self.context:", "if False:",
         "test_nothing_is_computed_beyond_the_context"),
    ),
    *_faults(
        "data/token_layout.py", "exactness/test_model_edges.py",
        ("The spelling of a special token becomes the token.", "split_special_tokens=True",
         "split_special_tokens=False", "test_the_spelling_of_a_special_token_is_text"),
        ("A prompt may be empty.", "if not trunk:", "if False:", "test_a_prompt_without_tokens_is_refused"),
    ),
    *_faults(
        "experiments/comparison.py", "exactness/test_model_edges.py",
        ("An arm that has diverged gets an accuracy.", "if is_diverged(log_probabilities):", "if False:",
         "test_an_arm_that_diverges_is_marked_and_has_no_numbers"),
    ),
    *_faults(
        "engine/observe.py", "exactness/test_model_edges.py",
        ("A model without numbers answers class 0.", "if arm.update is None and not", "if False and not",
         "test_a_model_whose_own_numbers_are_not_finite_ends_the_run"),
    ),
    *_faults(
        "experiments/sweeps.py", "exactness/test_model_edges.py",
        ("A rate that diverges gets an accuracy.", "if not np.isfinite(scores).all():", "if False:",
         "test_rates_that_diverge_are_marked_and_never_chosen"),
    ),
    *_faults(
        "experiments/kernel_server.py", "unit/test_warm_kernels.py",
        ("All kernels draw the same numbers.", "numpy.random.seed()", "pass",
         "test_each_kernel_draws_its_own_numbers"),
        ("A kernel keeps the number of threads of its server.", "torch.set_num_threads(int(threads))", "pass",
         "test_a_forked_kernel_is_like_one_that_was_started"),
        ("A kernel leads no group, so what it starts outlives it.", "os.setsid()", "pass",
         "test_a_server_that_imports_ends_at_once_and_its_kernels_end_with_it"),
    ),
    *_faults(
        "progress.py", "unit/test_progress.py",
        ("Steps are not noted.", "self._steps += int(n or 0)", "self._steps += 0",
         "test_steps_are_noted_whether_the_bar_is_shown_or_not"),
        ("What a job notes goes where the environment says.", "_named.set(file)", "_named.set(None)",
         "test_each_thread_notes_in_the_file_that_it_was_given"),
    ),
    *_faults(
        "pages/figures.py", "unit/test_one_dimension.py",
        ("A still picture is left out of the page.", "*([still] if still else [])", "*[]",
         "test_where_no_script_runs_the_still_picture_stands"),
    ),
    *_faults(
        "pages/alt_texts.py", "unit/test_alt_texts.py",
        ("A picture's text leaves out how low a line goes between its ends.", "if low[1] < min(first, last)",
         "if low[1] < -1e9", "test_a_line_tells_its_ends_and_what_goes_beyond_them"),
        ("A picture's text gives a row's value to the next row.", "names.get(round(place), '')",
         "names.get(round(place) + 1, '')", "test_rows_are_told_by_name"),
    ),
    *_faults(
        "pages/paper_tables.py", "notebooks/test_reproduction.py",
        ("The smallest number of questions stands for all.", "sorted({numbers.min(), numbers.max()})",
         "sorted({numbers.min()})", "test_tables_say_their_sizes_once_and_where_they_differ"),
    ),
    *_faults(
        "pages/one_dimension.py", "unit/test_one_dimension.py",
        ("The loss after the step is that before it.", "for weight in (start, moved)]",
         "for weight in (start, start)]", "test_the_numbers_are_those_made_by_hand"),
        ("The first label of the picture is drawn at both points.", 'ax.plot(key, label, "s"',
         'ax.plot(key, found.labels[0], "s"', "test_the_figure_draws_what_it_says"),
    ),
    *_faults(
        "tests/claims/c01_one_step.py", "claims/test_claims.py",
        ("The errors of the dual form are not averaged.", "d.attention(d.rate / d.n * errors, softmax=softmax)",
         "d.attention(d.rate * errors, softmax=softmax)", "test_claim[P2.1-dual]"),
        ("The proposition asks for the label minus the output as gradient.", "wanted.append((u - y).detach())",
         "wanted.append((y - u).detach())", "test_claim[P2.1-half]"),
        ("Residuals are as long as the second one, the rate as the first.",
         "residuals / lengths * lengths[0] if equal", "residuals / lengths * lengths[1] if equal",
         "test_claim[P2.1-unsquared]"),
        ("Every step has a little weight decay.", "step = d.update(loss) - d.rate * decay * d.weight",
         "step = d.update(loss) - d.rate * (decay + 1e-6) * d.weight", "test_claim[B1-outer]"),
        ("The output gradients are always those after the step.",
         "outputs = ((d.weight + step if after else d.weight) @ d.inputs)",
         "outputs = ((d.weight + step) @ d.inputs)", "test_claim[B2-attention]"),
    ),
    *_faults(
        "tests/claims/c02_fast_weight.py", "claims/test_claims.py",
        ("The implied labels have one demonstration too many in their factor.",
         "added = sign * (d.m / rate if scaled else 1)", "added = sign * ((d.m + 1) / rate if scaled else 1)",
         "test_claim[T3.1]"),
        ("The largest pseudo-demonstration is left out, never the smallest.", "kept = slice(rank - fewer)",
         "kept = slice(1, rank - fewer + 1)", "test_claim[T3.1-svd]"),
        ("Values are taken for positive meta-gradients.",
         "errors.append(error(change @ torch.linalg.pinv(xi).T, shown_values))",
         "errors.append(error(-change @ torch.linalg.pinv(xi).T, shown_values))", "test_claim[B4-values]"),
        ("The values are sought for one demonstration more than there are features.", "count = d.d_k + more",
         "count = d.d_k + 1 + more", "test_claim[B4-values]"),
    ),
    *_faults(
        "tests/claims/c03_rate.py", "claims/test_claims.py",
        ("Of the losses that fit at one base, all have the wrong sign.",
         "value = -(d.values * outputs).sum() / rate + stationary(outputs - anchor)",
         "value = (d.values * outputs).sum() / rate + stationary(outputs - anchor)", "test_claim[R-one-base]"),
        ("The loss for every base is curved.", "(moved.square().sum() / (2 * d.m) if squared else 0)",
         "(moved.square().sum() / (2 * d.m) if not squared else 0)", "test_claim[R-every-base]"),
        ("The rate that a task fixes lacks the factor of the values.", "w_k @ tokens, factor * c * d.m",
         "w_k @ tokens, factor * d.m", "test_claim[R-task-gauge]"),
        ("Values that should cancel lie in the span of the keys.",
         "values @ (torch.eye(d.d_k + 3) - torch.linalg.pinv(keys) @ keys)",
         "values @ (torch.linalg.pinv(keys) @ keys)", "test_claim[R-no-update]"),
        ("Another update with the same answers is as short as the least.",
         "longer = taken.square().sum() + (another - taken).square().sum()", "longer = taken.square().sum()",
         "test_claim[R-min-norm]"),
        ("The least update is compared with the update of other queries.", '{"own": asked, "others": others',
         '{"own": others, "others": others', "test_claim[R-min-norm]"),
        ("Demonstrations are read by their queries' features in the layer itself.",
         "self.features(self.shown).T, strict=True)", "self.features(self.shown, self.w_q).T, strict=True)",
         "test_claim[R-observation-3]"),
        ("The linear loss rises.", "float(value(d.base) - value(moved))", "float(value(moved) - value(d.base))",
         "test_claim[R-linear-fall]"),
        ("Labels at each rate lack M.", "step(weight, d.keys, d.m / rate * d.values + outputs, rate)",
         "step(weight, d.keys, d.values + outputs, rate)", "test_claim[R-gauge]"),
        ("The rate of the many steps is above the bound.", "def limit(seed, of_bound=0.5)",
         "def limit(seed, of_bound=1.2)", "test_claim[R-limit]"),
        ("The second layer reads states that the first one has not changed.",
         "states = states + torch.cat([values, weight], 1) @ scores", "states = self.start", "test_claim[R-stack]"),
        ("Under the mask demonstrations read the later tokens, among them those that write the base.",
         "scores = scores.triu() if mask else scores", "scores = scores.tril() if mask else scores",
         "test_claim[R-stack]"),
        ("The common loss under a mask has the wrong sign.", "return error(-gradient, wanted.detach())",
         "return error(gradient, wanted.detach())", "test_claim[R-stack]"),
        ("The step matrices of the layers are not divided out.", "torch.linalg.solve(p, block.flatten(1))",
         "block.flatten(1)", "test_claim[R-stack]"),
    ),
    *_faults(
        "tests/claims/c04_softmax.py", "claims/test_claims.py",
        ("The delta rule forgets twice what it writes.", "delta @ (torch.eye(5) - 0.5 * torch.outer(x, x))",
         "delta @ (torch.eye(5) - torch.outer(x, x))", "test_claim[S-test-time]"),
        ("The noise does not reach the risk.", "bias.square().mean() + noise**2 * weights",
         "bias.square().mean() + 0 * weights", "test_claim[S-bandwidth-noise]"),
        ("Scores are not divided by the temperature.", "scores = inverse_temperature * torch.einsum",
         "scores = 1.0 * torch.einsum", "test_claim[S-bandwidth-examples]"),
        ("Weights are not divided by the rate.", "weights = d.pull / total / (1 if kept else rate)",
         "weights = d.pull / total", "test_claim[S-output-step]"),
    ),
    *_faults(
        "tests/claims/c05_causal.py", "claims/test_claims.py",
        ("The samples include demonstrations behind the window.", "shown = [j for j in sight[i] if j < m] if",
         "shown = list(range(min(i + 1, m))) if", "test_claim[L6.1-window]"),
        ("Labels are made for all demonstrations, not for those in sight.", "labels = [len(shown) / 0.7 * rows",
         "labels = [m / 0.7 * rows", "test_claim[L6.1-window]"),
        ("The mask lets an example see the later ones only.", "counts = (x.T @ x).triu() if causal",
         "counts = (x.T @ x).tril() if causal", "test_claim[D-kaczmarz]"),
        ("The query takes steps of twice the rate.", "answer + eta / n * slots @ (x.T @ asked)",
         "answer + 2 * eta / n * slots @ (x.T @ asked)", "test_claim[D-least-squares]"),
        ("The examples are taken for orthogonal.", "w = x @ torch.linalg.solve(torch.tril(x.T @ x), x.T @ w_true)",
         "w = x @ torch.linalg.solve(torch.diag((x * x).sum(0)), x.T @ w_true)", "test_claim[D-kaczmarz-mean]"),
        ("The label of a sample holds the base of the sample.",
         'own = base(i) if label == "of the token" else base(m + j)',
         'own = base(m + j) if label == "of the token" else base(m + j)', "test_claim[L6.1-prompt]"),
    ),
    *_faults(
        "tests/claims/c06_depth.py", "claims/test_claims.py",
        ("The labels of greedy training leave out the layer's own output.",
         "m / rate * w_v @ z[:, :m] + base @ inputs", "m / rate * w_v @ z[:, :m]", "test_claim[T4.1-sweep]"),
        ("In greedy training the columns pass without what attention adds.",
         "z = z + (base if at_once else matrix) @ stack.phi(w_q @ z)",
         "z = z + 0 * (base if at_once else matrix) @ stack.phi(w_q @ z)", "test_claim[T4.1-sweep]"),
        ("A second step on labels made anew is expected to change nothing.", "2 * once - start", "once",
         "test_claim[T4.1-second-step]"),
        ("The prompt as it was is learned once more instead of unlearned.", 'samples="all", sign=-1',
         'samples="all", sign=1', "test_claim[T4.1-learn-learn-unlearn]"),
    ),
    *_faults(
        "tests/claims/c07_blocks.py", "claims/test_claims.py",
        ("The bias of the values is left out of the labels.", "inputs, labels = inputs + b_k, labels + b_v",
         "inputs, labels = inputs + b_k, labels", "test_claim[X-norm]"),
    ),
    *_faults(
        "tests/claims/c08_compile.py", "claims/test_claims.py",
        ("The window hides no demonstration, so that its control tests nothing.", "t >= queries.shape[1] // 2",
         "t > queries.shape[1]", "test_claim[K-every-query]"),
        ("Larger scores leave the scores as they are.", "layer |= {name: stretch * layer[name]",
         "layer |= {name: layer[name]", "test_claim[K-degree]"),
    ),
    *_faults(
        "tests/claims/c09_learning.py", "claims/test_claims.py",
        ("The implied labels forget the number of demonstrations.", "implied = torch.stack([n / eta * W_V @ e",
         "implied = torch.stack([1 / eta * W_V @ e", "test_claim[V-labels]"),
        ("A mask among the demonstrations is ignored, so its control is no control.",
         "for other in seen[: i + 1] if causal else seen:", "for other in seen:", "test_claim[V-tied]"),
        ("The even part keeps half of the odd entries.", "even[:d, d] = even[d, :d] = 0", "even[d, :d] = 0",
         "test_claim[V-even]"),
        ("Pairs of different demonstrations are counted too often.",
         "return same / n + (n - 1) / n * Lambda @ C @ Lambda", "return same / n + Lambda @ C @ Lambda",
         "test_claim[V-gamma-isotropic]"),
        ("With the mean as base the whole task is asked for, not what is left of it.",
         "target = w if base is None else w - base", "target = w", "test_claim[V-prior-mean]"),
        ("The scaling direction stays among the curvatures.", "lifted = H + 1e3 * torch.outer",
         "lifted = H + 0 * torch.outer", "test_claim[V-trap]"),
        ("The heads hold a direction at another size.", "v[i, d] = gamma[i] ** (1 / 3)",
         "v[i, d] = gamma[i] ** (1 / 2)", "test_claim[V-saddles]"),
        ("The loss of a rate is said to be a tenth less.", "formulas = [d * ((1 - rate) ** 2",
         "formulas = [0.9 * d * ((1 - rate) ** 2", "test_claim[V-rate]"),
        ("The formula of the second moment is a tenth too small.",
         "formula = UNEQUAL @ UNEQUAL if many else second_moment(UNEQUAL, n)",
         "formula = UNEQUAL @ UNEQUAL if many else 0.9 * second_moment(UNEQUAL, n)", "test_claim[V-moments]"),
        ("What a layer without a base loses is claimed with another number of demonstrations.",
         "return about(loss_without_base(mu, n) -", "return about(loss_without_base(mu, 2 * n) -",
         "test_claim[V-base]"),
    ),
    *_faults(
        "tests/claims/c10_pretrained.py", "claims/test_claims.py",
        ("The question's first token is not in the base.", "own = [0, *range(run.M + 1, i + 1)]",
         "own = [0, *range(run.M + 2, i + 1)]", "test_claim[Q-logits]"),
        ("The labels do not know the rate.", "labels = len(keys) / run.rate * shown", "labels = len(keys) * shown",
         "test_claim[Q-rate]"),
    ),
    *_faults(
        "tests/claims/c12_similarity.py", "claims/test_claims.py",
        ("The zero-shot state is not subtracted.", "return near_one(cosine(a - c, b - c) / expected)",
         "return near_one(cosine(a, b) / expected)", "test_claim[M-null]"),
        ("The random state is not subtracted from.", "else near_one(cosine(a - c, unit(r) - c) / about)",
         "else near_one(cosine(a - c, unit(r)) / about)", "test_claim[M-random]"),
    ),
    *_faults(
        "tests/plain_stack.py", "claims/test_claims.py",
        ("The base of Algorithm 1 is written by all columns, demonstrations included.",
         'own = alone[number] if fault.get("base") == "zero-shot" else z[:, m:]',
         'own = alone[number] if fault.get("base") == "zero-shot" else z', "test_claim[T4.1]"),
        ("Labels are made for the rate M, whatever rate the step takes.", 'labels_rate=fault.get("labels_rate", m)',
         "labels_rate=m", "test_claim[T4.1-any-rate]"),
    ),
    *_faults(
        "theory/regression_transformer.py", "unit/test_regression_transformer.py",
        ("Questions see the question that stands first.", "(torch.arange(n) < demos.shape[2])",
         "(torch.arange(n) <= demos.shape[2])", "test_questions_see_demonstrations_and_themselves_only"),
        ("Shuffled labels are the true ones.", '"shuffled": known.roll(1, -1)', '"shuffled": known.roll(0, -1)',
         "test_an_untrained_network_of_the_record_comes_out_again"),
        ("A greedy step has the whole length in each layer.", "length and length / LAYERS**0.5", "length",
         "test_a_step_has_the_length_asked_for_and_lowers_the_loss"),
    ),
]  # fmt: skip


def faulty_line(fault: Fault) -> tuple[str, str]:
    """
    The line as it stands and with the fault, both stripped.

    Raises
    ------
    ValueError
        if the text is not found exactly once, or spans lines: the fault has to be written again.
    """
    found = (ROOT / fault.path).read_text(encoding="utf-8")
    if found.count(fault.before) != 1 or "\n" in fault.before + fault.after:
        raise ValueError(f"{fault.file}: {fault.before!r} is there {found.count(fault.before)} times, not once")
    (line,) = (line for line in found.splitlines() if fault.before in line)
    return line.strip(), line.replace(fault.before, fault.after).strip()


def described(fault: Fault) -> dict[str, str]:
    """The fault's entry in `results/mutations.json`."""
    before, after = faulty_line(fault)
    return {"fault": fault.what, "file": fault.path, "before": before, "after": after,
            "test": fault.test}  # fmt: skip


def page(entries: Sequence[dict[str, str]]) -> str:
    """The list of faults in Markdown: what follows the mark on the book's page."""
    files = list(dict.fromkeys(entry["file"] for entry in entries))
    lines = ["| Module | Faults |", "|---|---:|"]
    for file in [*files, None]:
        n_faults = sum(file in (entry["file"], None) for entry in entries)
        lines.append(f"| {f'`{file}`' if file else 'all'} | {n_faults} |")
    for file in files:
        lines += ["", f"## `{file}`"]
        for entry in (entry for entry in entries if entry["file"] == file):
            lines += ["", entry["fault"], "", "```diff", f"- {entry['before']}", f"+ {entry['after']}", "```", "",
                      f"Seen by `{entry['test'].removeprefix('tests/')}`."]  # fmt: skip
    return "\n".join(lines) + "\n"


# ------------------------------------------------------------------------------------------------------------ running
def warm_up() -> None:
    """Import what all tests need, once, before processes are forked; none of it is the package's own."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    import datasets  # noqa: F401
    import hypothesis  # noqa: F401
    import nbformat  # noqa: F401
    import pandas  # noqa: F401
    import pydantic  # noqa: F401
    import pytest  # noqa: F401
    import torch
    import transformers
    import yaml  # noqa: F401

    torch.set_num_threads(1)
    for family in (
        "Llama",
        "GPT2LMHead",
        "GPTNeoX",
        "OPT",
        "Gemma3",
        "XGLM",
        "Bloom",
        "Falcon",
    ):  # these names import the modules
        for suffix in ("Model", "ForCausalLM"):
            getattr(transformers, family + suffix, None)


def scratch_copy(folder: Path, fault: Fault | None) -> None:
    """The package and its tests in `folder`, with the fault if there is one."""
    for name in COPIED:
        source, target = ROOT / name, folder / name
        if source.is_dir():
            shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints"))
        else:
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source, target)
    if fault is not None:
        path = folder / fault.path
        path.write_text(path.read_text(encoding="utf-8").replace(fault.before, fault.after), encoding="utf-8")


class NoShrinking:
    """A found counterexample is enough: hypothesis need not make it small."""

    @staticmethod
    def pytest_pycollect_makemodule() -> None:
        import hypothesis
        from hypothesis import Phase

        hypothesis.settings.register_profile(
            "mutations", hypothesis.settings(), phases=(Phase.explicit, Phase.generate)
        )
        hypothesis.settings.load_profile("mutations")


def run_tests(folder: Path, tests: Iterable[str]) -> int:
    """In a child process: pytest's exit status for `tests` in the scratch copy. 99 if another package was imported."""
    import pytest

    os.chdir(folder)
    os.environ["PYTHONPATH"] = str(folder)
    here = {ROOT, ROOT / "tests"}
    sys.path[:] = [str(folder), str(folder / "tests"), *(p for p in sys.path if p and Path(p).resolve() not in here)]
    sys.meta_path[:] = [finder for finder in sys.meta_path if "editable" not in repr(finder).lower()]
    log = os.open(folder / "log", os.O_WRONLY | os.O_CREAT)
    os.dup2(log, 1)
    os.dup2(log, 2)
    options = ["-q", "-x", "--tb=line", "-p", "no:cacheprovider", "-p", "no:nbval", "-p", "no:xdist", "-o", "addopts="]
    status = pytest.main([*options, *tests], plugins=[NoShrinking])
    import iclgd_helpers

    return int(status) if Path(iclgd_helpers.__file__).parent.parent == folder else 99


@dataclass
class Run:
    """A scratch copy, what is run in it, and how that went: pytest's exit status (negative: out of time), its log."""

    fault: Fault | None
    tests: Sequence[str]
    folder: Path
    start: float = 0.0
    seconds: float = 0.0
    status: int = 0
    log: str = ""

    def fork(self) -> int:
        """Start the tests in a child process, whose id is returned."""
        self.folder.mkdir()
        scratch_copy(self.folder, self.fault)
        sys.stdout.flush()
        self.start = time.monotonic()
        child = os.fork()
        if not child:
            status = 98
            try:
                status = run_tests(self.folder, self.tests)
            finally:
                os._exit(status)
        return child

    def end(self, status: int) -> None:
        """Take down the outcome and drop the copy."""
        self.status, self.seconds = os.waitstatus_to_exitcode(status), time.monotonic() - self.start
        log = self.folder / "log"
        self.log = log.read_text(encoding="utf-8", errors="replace") if log.exists() else ""
        shutil.rmtree(self.folder)
        if self.fault:
            says = "killed" if self.status == 1 else f"NOT KILLED, status {self.status}"
            print(f"{self.seconds:6.1f} s  {says}  {self.fault.file}: {self.fault.what}", flush=True)
        if self.status != (1 if self.fault else 0):
            print("\n".join(self.log.splitlines()[-12:]), flush=True)


def carry_out(runs: Sequence[Run], longest: float, deadline: float) -> None:
    """Carry out all runs, two at a time; end what takes longer than `longest` seconds, or goes past the deadline."""
    waiting, started = list(runs), {}
    while waiting or started:
        while waiting and len(started) < AT_ONCE:
            run = waiting.pop(0)
            started[run.fork()] = run
        child, status = os.waitpid(-1, os.WNOHANG)
        if child:
            started.pop(child).end(status)
            continue
        for late, run in started.items():
            if time.monotonic() > min(run.start + longest, deadline):
                os.kill(late, signal.SIGKILL)
        time.sleep(0.02)


def write(entries: Sequence[dict[str, str]]) -> None:
    """Store the outcome and the list on the book's page, each only where it differs."""
    from iclgd_helpers import storage  # only now: what is imported here, no faulty copy would import

    text = PAGE.read_text(encoding="utf-8")
    head = text[: text.index(MARK) + len(MARK)]
    for path, content in (
        (RESULTS, storage.json_bytes({"faults": list(entries)})),
        (PAGE, (head + "\n" + page(entries)).encode()),
    ):
        if not path.exists() or path.read_bytes() != content:
            storage.write_bytes(path, content)


def main(words: Sequence[str]) -> int:
    """Exit status 0 if the unchanged package passes and every fault is seen."""
    began = time.monotonic()
    chosen = [f for f in FAULTS if not words or any(w in f"{f.what} {f.file} {f.test}" for w in words)]
    try:
        for fault in FAULTS:
            faulty_line(fault)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    warm_up()
    deadline = began + LONGEST_IN_ALL
    tests = list(dict.fromkeys(fault.test for fault in chosen))
    with tempfile.TemporaryDirectory(prefix="mutations-") as name:
        folder = Path(name).resolve()
        parts = [tests[i::AT_ONCE] for i in range(AT_ONCE)]
        unchanged = [Run(None, part, folder / f"unchanged-{i}") for i, part in enumerate(parts) if part]
        carry_out(unchanged, LONGEST_IN_ALL, deadline)
        if any(run.status for run in unchanged):
            print("error: the unchanged package does not pass the named tests", file=sys.stderr)
            return 1
        print(f"{time.monotonic() - began:6.1f} s  the unchanged package passes the {len(tests)} tests", flush=True)
        mutants = [Run(fault, [fault.test], folder / str(i)) for i, fault in enumerate(chosen)]
        carry_out(mutants, LONGEST, deadline)
    killed = sum(run.status == 1 for run in mutants)
    print(f"mutants: {killed} of {len(chosen)} killed in {time.monotonic() - began:.0f} s")
    if killed < len(chosen):
        return 1
    if not words:
        write([described(fault) for fault in FAULTS])
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
