"""How well an attack did, against numbers by hand and SciPy's."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from fedpeat.tuning.measures import rouge_1, rouge_l, separation, words


def test_the_auc_is_the_share_of_pairs_that_are_in_order() -> None:
    found = separation(np.array([3.0, 1.0]), np.array([2.0, 1.0, 0.0]), seed=0)
    assert found.auc == pytest.approx((3 + 1.5) / 6)  # 3 beats all; 1 ties one and beats one


def test_the_auc_is_that_of_the_mann_whitney_statistic() -> None:
    rng = np.random.default_rng(0)
    members, others = rng.normal(0.7, 1, 300), rng.normal(0, 1, 200)
    found = separation(members, others, seed=0)
    want = stats.mannwhitneyu(members, others).statistic / (300 * 200)
    assert found.auc == pytest.approx(want)
    assert found.low < want < found.high


def test_the_interval_is_as_wide_as_the_standard_error_says() -> None:
    rng = np.random.default_rng(1)
    members, others = rng.normal(0, 1, 400), rng.normal(0, 1, 400)
    found = separation(members, others, seed=0)
    error = np.sqrt((400 + 400 + 1) / (12 * 400 * 400))  # of the statistic, without any difference
    assert found.high - found.low == pytest.approx(2 * 1.96 * error, rel=0.15)
    assert found.low < 0.5 < found.high


def test_hits_are_counted_above_the_highest_scores_of_others_but_one_in_a_hundred() -> None:
    others = np.arange(200.0)
    members = np.array([196.5, 197.0, 197.5, 198.5, 250.0])
    assert separation(members, others, seed=0).tpr == pytest.approx(3 / 5)  # above 197
    few = np.arange(50.0)
    assert separation(np.array([48.5, 49.5]), few, seed=0).tpr == 0.5  # no false alarm at all


def test_scores_that_say_nothing_find_nobody() -> None:
    found = separation(np.zeros(30), np.zeros(200), seed=0)
    assert (found.auc, found.low, found.high) == pytest.approx((0.5, 0.5, 0.5))
    assert found.tpr == 0


def test_rouge_1_by_hand() -> None:
    found, true = "the cat the dog".split(), "the cat sat".split()
    assert rouge_1(found, true) == pytest.approx(2 * (2 / 4) * (2 / 3) / (2 / 4 + 2 / 3))
    assert rouge_1(true, true) == 1
    assert rouge_1([], true) == rouge_1(["x"], true) == 0


def test_rouge_l_by_hand() -> None:
    found, true = "a x b y c".split(), "a b c d".split()
    assert rouge_l(found, true) == pytest.approx(2 * 3 / 9)  # a b c, in order
    assert rouge_l("c b a".split(), "a b c".split()) == pytest.approx(2 / 6)
    assert rouge_l("a a a".split(), ["a"]) == pytest.approx(2 / 4)  # no word counts twice
    assert rouge_l(true, true) == 1
    assert rouge_l(found, []) == 0


def test_words_are_words_and_marks_without_case() -> None:
    assert words("def Read(self, n=-1):") == "def read ( self , n = - 1 ) :".split()
