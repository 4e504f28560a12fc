"""Every value of an option that is a word has a test of what it means; a new value needs a line in this table.

Laws compare one way with another (a batch with each row alone), and an offset of one satisfies them. So each value has
a case with figures that a person has worked out, or one against a library or a plain loop that shares no code with it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from adaptermix.methods import METHODS
from adaptermix.options import all_settings
from adaptermix.options.registries import OneOf

TESTS = Path(__file__).parent
NOT_OF_MEANING = {"dtype", "task"}
"""Options that name a format of numbers, or the demo's data."""

BY_HAND = {
    "alignment": {
        "position end row-end last index": "what_stands_beside_each_token",
        "soft": "soft_alignment_finds_a_mean_of_the_source",
    },
    "source_alignment": {"position end row-end last index": "what_stands_beside_each_token"},
    "fusion": {
        "add mul add-relu mul-relu gated cross-attention cross-attention-paper": "fusions_of_one_number_a_token",
        "x-mixup": "x_mixup_of_one_number_a_token",
        "input": "sources_in_the_text_come_first",
    },
    "mixup_layer": {
        "middle last": "layers_by_number_and_name x_mixup_mixes_what_comes_out_of_its_block",
    },
    "layer": {"middle last": "layers_by_number_and_name the_loss_equals_that_of_a_full_forward"},
    "pooling": {
        "mean bos": "the_vector_of_a_sentence_by_hand the_vectors_that_a_closed_form_is_fitted_to",
        "auto": "sentence_vectors_are_those_of_training",
        "first last": "the_edge_token_of_a_text",
    },
    "standardize": {
        "none all languages": "the_vector_of_a_sentence_by_hand whose_z_scores_they_are_by_hand",
        "auto": "sentence_vectors_are_those_of_training",
    },
    "anchor": {
        "pair": "the_loss_equals_that_of_a_full_forward",
        "base": "the_fixed_teacher_is_the_base",
    },
    "balance": {"languages rows": "how_often_each_language_is_drawn the_languages_or_the_rows_weigh_the_same"},
    "objective": {
        "contrastive": "the_contrastive_loss_of_two_pairs",
        "distil": "distances_of_the_other_objectives",
        "both": "both_is_the_sum_without_the_dropout_of_the_base",
        "mean": "languages_count_the_same_whatever_their_rows the_worst_language_is_the_minimum",
        "worst-language": "the_worst_language_is_the_minimum",
        "agreement": "a_candidate_is_worth_its_agreement_with_the_task_adapter_on_the_source_side "
        "the_divergence_is_from_the_source_side_pooled_over_words",
        "task": "the_step_that_is_taken_and_its_gates_by_hand",
        "entropy": "the_entropy_is_that_of_each_word",
    },
    "engine": {"vllm sglang tensorrt-llm llama.cpp mlx": "each_engine_computes_the_deltas_of_the_adapter"},
    "fit": {
        "gradient": "updates_too_small_for_bfloat16_are_kept_in_the_masters",
        "least-squares": "the_adapter_that_peft_loads_explains_the_reported_share",
        "mean-shift": "the_mean_shift_of_two_pairs",
    },
    "init": {"kaiming gaussian orthogonal pissa olora": "what_a_lora_begins_with"},
    "schedule": {"constant linear cosine inverse_sqrt": "the_learning_rate_of_each_step"},
    "head_pooling": {"auto mean first last": "it_reads_the_pooled_last_state"},
    "aggregate": {
        "add mean concat": "two_states_without_a_gate",
        "aff": "a_constant_gate_of_one_half_is_the_mean aff_of_the_last_state_with_itself_is_the_last_state",
        "se": "se_by_hand",
    },
    "gate": {"both local global": "a_gate_lies_between_0_and_1_ignores_padding_and_has_as_many_parameters"},
    "head_norm": {
        "own none": "two_states_without_a_gate",
        "final": "final_norm_is_that_of_the_model",
    },
    "mode": {
        "states": "only_projection_and_lora_change_in_stage_1",
        "replace augment": "what_each_mode_reads an_encoder_that_returns_own_embeddings_changes_nothing",
    },
    "attention": {"causal both": "a_decoder_sees_both_sides"},
    "span": {
        "characters": "long_texts_are_cut_to_the_same_characters",
        "tokens": "each_model_reads_its_own_first_tokens",
    },
    "projection_init": {"least-squares random": "least_squares_starts_nearer_than_random"},
    "head": {
        "auto classes tokens span": "the_head_of_each_task",
        "choices": "the_tokens_of_each_choice_by_hand",
        "none": "encoders_get_a_head_and_language_models_answer",
    },
    "log_with": {"tensorboard wandb trackio": "what_a_tracker_receives"},
    "alternate": {"step batch sum": "whose_turn_each_batch_is what_each_batch_adds_to_the_loss_of_its_step"},
    "select": {
        "task align": "one_objective_does_not_decide_for_the_other_unless_asked",
        "sum": "the_dev_loss_of_select_sum one_objective_does_not_decide_for_the_other_unless_asked",
    },
    "choose": {"best one-se": "a_choice_by_hand"},
    "sampler": {
        "auto": "few_numbers_suit_gp",
        "random tpe cmaes gp": "samplers_propose_within_the_space planted_weights_are_found_within_a_tenth",
    },
    "space": {
        "simplex free sum both": "the_weights_of_a_grid_in_each_space what_a_sampler_proposes_in_each_space",
        "full core": "a_method_on_a_few_numbers",
    },
    "fill": {"weight one": "where_the_other_is_absent_or_zero_it_weighs_its_weight_or_one"},
    "form": {"concat lowrank dense": "each_form_of_three_numbers each_form_of_a_full_matrix"},
    "rank": {"auto": "each_form_of_three_numbers an_automatic_rank_counts_no_rounding_where_factors_cancel"},
    "order": {"elect-first scale-first": "a_method_on_a_few_numbers"},
    "scope": {"module model": "what_ties_trims_module_by_module_and_over_the_model"},
    "per": {
        "column": "a_method_on_a_few_numbers",
        "module": "a_method_on_a_few_numbers what_is_written_is_the_gated_model_as_a_plain_adapter",
        "layer adapter": "what_is_written_is_the_gated_model_as_a_plain_adapter",
    },
    "method": {
        "regmean": "regmean_is_the_mean_product_of_the_inputs a_method_of_statistics_on_two_numbers",
        "fisher": "fisher_is_the_mean_of_squared_gradients_of_single_rows a_method_of_statistics_on_two_numbers",
    },
    "action": {
        "ls": "ls_lists_every_recipe_with_its_first_line",
        "cat": "cat_prints_a_recipe_as_it_is",
        "cp": "cp_writes_a_new_file_and_replaces_none",
        "schema": "the_schema_is_printed",
    },
    "split": {"dev test": "the_split_is_told_where_it_was_given"},
    "quantize": {
        "none": "without_4_bits_it_is_the_sum_rounded_once",
        "nf4 fp4 int8": "the_nearest_codes_by_hand",
        "int4": "codes_scales_and_words_by_hand",
    },
    "strategy": {
        "auto": "which_strategy_auto_takes",
        "keep": "kept_apart_adapters_are_one_lora_and_no_code_is_touched",
        "merge-16": "without_4_bits_it_is_the_sum_rounded_once",
        "dequant-16": "onto_dequantised_weights_it_is_the_model_that_the_adapter_was_trained_with",
        "requantize stochastic": "a_delta_on_codes_that_are_whole_numbers",
        "calibrated residual": "a_delta_that_codes_hold_is_written_whole",
    },
}
"""By option and values the tests, without `test_` at the beginning of their names."""


def words(hint: Any) -> Iterator[str]:
    """Yield the words that a type allows."""
    for part in get_args(hint):
        if get_origin(hint) is Literal:
            yield from [part] if isinstance(part, str) else []
        else:
            yield from words(part)


def is_own(cls: type[Any]) -> bool:
    """Return whether a class is one of the package; tests have some of their own."""
    return cls.__module__.startswith("adaptermix.")


def test_every_word_of_an_option_has_a_line_in_the_table() -> None:
    found = set()
    for cls in filter(is_own, all_settings()):
        found |= {(name, word) for name, field in cls.model_fields.items() for word in words(field.annotation)}
        marks = [(name, mark) for name, field in cls.model_fields.items() for mark in field.metadata]
        found |= {(name, word) for name, mark in marks if isinstance(mark, OneOf) for word in mark.choices}
    for method in filter(is_own, METHODS.values()):
        hints = get_type_hints(method)
        found |= {(own.name, word) for own in fields(method) for word in words(hints[own.name])}
    named = {(name, word) for name, values in BY_HAND.items() for value in values for word in value.split()}
    assert named == {(name, word) for name, word in found if name not in NOT_OF_MEANING}


def test_every_test_of_the_table_is_there() -> None:
    text = "\n".join(path.read_text(encoding="utf-8") for path in sorted(TESTS.rglob("test_*.py")))
    there = set(re.findall(r"def test_(\w+)\(", text))
    assert {name for values in BY_HAND.values() for tests in values.values() for name in tests.split()} <= there
