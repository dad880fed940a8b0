"""The metric of repetition as `evaluate` loads it."""

import doctest
from pathlib import Path

import evaluate
import pytest


ROOT = Path(__file__).parents[1]


@pytest.fixture
def metric(tmp_path):
    return evaluate.load(str(ROOT / "evaluation" / "text_repetition"), cache_dir=str(tmp_path))


def test_means_over_texts_that_are_long_enough(metric):
    metric.add_batch(predictions=["The the lung", "a b"])
    metric.add_batch(predictions=[" "])
    metric.add(prediction="heart")
    results = metric.compute(ngram_sizes=[1, 2, 5])
    assert results["distinct_1"] == pytest.approx((2 / 3 + 1 + 1) / 3) and results["num_scored_1"] == 3
    assert results["distinct_2"] == 1 and results["num_scored_2"] == 2
    assert results["distinct_5"] is None and results["rep_5"] is None and results["num_scored_5"] == 0
    assert results["rep_1"] == pytest.approx(1 / 9) and results["longest_run"] == 2 and results["mean_longest_run"] == 1
    assert results["words_per_answer"] == 1.5 and results["num_texts"] == 4 and results["num_empty"] == 1
    assert "distinct_3" not in results


def test_runs_need_not_be_at_the_start_and_do_not_add_up(metric):
    results = metric.compute(predictions=["x y y x x x y"], return_items=True)
    assert results["longest_run"] == 3
    assert results["items"] == [
        {"distinct_1": 2 / 7, "distinct_2": 4 / 6, "distinct_3": 5 / 5, "distinct_4": 1, "longest_run": 3, "words": 7}
    ]


@pytest.mark.parametrize(
    "predictions, options, message",
    [
        ([], {}, "no text"),
        (["a", None], {}, "number 1 is not a string but None"),
        (["a", 3], {}, "number 1 is not a string but 3"),
        (["a"], {"ngram_sizes": [0]}, "at least one word"),
    ],
)
def test_bad_input(metric, predictions, options, message):
    with pytest.raises(ValueError, match=message):
        metric.compute(predictions=predictions, **options)


def test_example_of_the_description(metric, monkeypatch):
    monkeypatch.chdir(ROOT)
    test = doctest.DocTestParser().get_doctest(metric.inputs_description, {}, "text_repetition", None, 0)
    assert len(test.examples) == 5
    assert doctest.DocTestRunner().run(test) == doctest.TestResults(0, 5)
