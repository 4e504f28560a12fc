"""Patterns of module paths: what PEFT decides, in bounded time."""

from __future__ import annotations

import random
import re
import time
import warnings
from pathlib import Path

import pytest

from adaptermix.adapters import open_adapter
from adaptermix.adapters.patterns import MAX_GENERAL, MAX_LENGTH, Patterns
from adaptermix.errors import AdapterFormatError

from ..factories import write_lora
from .test_hostile import bounded, check_line

PIECES = ["a", "b", ".", "\\.", "q", "[ab]", "[^a]", "[a-]", "\\d", "1", "(", "(?:", ")", "|", "*", "+", "?", "^", "$"]
PIECES += ["\\b", "\\B", "(?=", "(?!", "(?P<x>"]
PIECES += ["{2}", "{1,2}", "{,}", "{,1}", "{}", "{", ".*", "??", "layers", "_", "\\w", "-", "\\-"]
SIGNS = ["a", "b", ".", "q", "1", "layers", "_", "-"]


def peft(keys: dict[str, int], module: str) -> int | None:
    """PEFT's rule, by Python's own engine."""
    for index, key in enumerate(keys):
        if re.match(rf"(.*\.)?({key})$", module):
            return index
    return None


@pytest.mark.parametrize("seed", range(8))
def test_random_patterns_match_what_peft_matches(seed: int) -> None:
    rng = random.Random(seed)
    decided = 0
    while decided < 400:
        keys = {"".join(rng.choices(PIECES, k=rng.randint(1, 6))): 0 for _ in range(rng.randint(1, 3))}
        try:
            patterns = Patterns.of(keys)
        except ValueError:
            continue
        module = "".join(rng.choices(SIGNS, k=rng.randint(1, 7)))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert patterns.first(module) == peft(keys, module), (keys, module)
        decided += 1


@pytest.mark.parametrize(
    ("key", "module"),
    [
        ("q_proj", "model.layers.0.q_proj"),
        ("layers.1.q_proj", "model.layers.1.q_proj"),
        (r"model\.layers\.(0|1)\..*", "model.layers.1.mlp.up"),
        (r".*\.layers\.[0-9]+\.q_proj", "model.layers.17.q_proj"),
        (r"^model\.layers\.\d{1,2}\.q_proj$", "model.layers.17.q_proj"),
        (r"q_proj|v_proj", "x.v_proj"),
        (r"(.*q|.*k)_proj", "x.k_proj"),
        (r".*\bq_proj\b", "x.q_proj"),
        (r"(?!.*vision).*q_proj", "text.q_proj"),
        (r"(?P<which>q|k)_proj", "x.k_proj"),
    ],
)
def test_patterns_of_daily_use_are_handled(key: str, module: str) -> None:
    assert Patterns.of({key: 0}).first(module) == 0 == peft({key: 0}, module)


@pytest.mark.parametrize(
    "key", ["(a+)+b", "(a|a)*b", "(.*.*.*.*)*x", "((((a*)*)*)*)*b", "(a?){64}a{64}b", "(.*a){30}b", "(a|aa)+$b"]
)
def test_patterns_that_trap_a_backtracking_matcher_are_harmless(key: str) -> None:
    # CPU time, which other processes do not lengthen; a backtracking matcher takes hours
    start = time.process_time()
    assert Patterns.of({key: 0}).first("a" * 900) is None
    assert time.process_time() - start < 5


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        (["("], "not a regular expression"),
        (["a)(b"], "unbalanced"),
        ([r"(a)\1"], "not handled"),
        (["(?<=a)b"], "not handled"),
        (["(?i:a)"], "not handled"),
        ([r"q\Z"], "not handled"),
        (["(?=(a+)+b)a"], "repetitions in repetitions"),
        (["a++"], "possessive"),
        (["a{65}"], "limited to 64"),
        (["((a{60}){60})"], "too large"),
        (["(" * 9 + "a" + ")" * 9], "deep"),
        (["[[a]"], "not a regular expression"),
        (["a" * (MAX_LENGTH + 1)], "longer than"),
        ([f"a|b{n}" for n in range(MAX_GENERAL + 1)], "at most"),
    ],
)
def test_what_cannot_be_bounded_is_refused(keys: list[str], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Patterns.of(dict.fromkeys(keys, 0))


def test_one_key_per_module_is_looked_up_and_not_searched() -> None:
    """What the writer makes after ranks were cut: 5000 modules, each with its own pattern."""
    modules = [f"model.layers.{layer}.experts.{expert}.up_proj" for layer in range(50) for expert in range(100)]
    start = time.process_time()
    patterns = Patterns.of({"^" + re.escape(module): 0 for module in modules})
    assert [patterns.first(module) for module in modules] == list(range(len(modules)))
    assert patterns.first("x." + modules[0]) is None
    # 0.1 s; a search among all keys for each module takes minutes
    assert time.process_time() - start < 10


TRAPS = ["(a+)+$", "(.*)*x", "(a|a)*$", "(.*.*.*.*.*)*z", "((a*)*)*b", "(a?){50}a{50}", r"([a-z]+\.)*z"]


@pytest.mark.parametrize("trap", TRAPS)
@pytest.mark.parametrize("name", ["rank_pattern", "alpha_pattern"])
def test_patterns_that_trap_a_matcher_end_at_once(tmp_path: Path, name: str, trap: str) -> None:
    """They are sound regular expressions, so the adapter is read or refused: what counts is that it ends."""
    module = "a" * 200 + "." + "a" * 200
    write_lora(tmp_path, {module: (4, 3, 2)}, **{name: {trap: 2}})
    with bounded():
        try:
            open_adapter(tmp_path).read()
        except AdapterFormatError as error:
            check_line(error)
