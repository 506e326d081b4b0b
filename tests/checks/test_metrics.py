"""Text metrics against hand-counted cases, and their laws under hypothesis."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trivium.checks import metrics

JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 9) | st.sampled_from([0.5, 1.0, 2.0]) | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ('{"a": 1}', {"a": 1}),
        ('Sure, here it is:\n```json\n{"a": {"b": "}"}}\n``` {"c": 2}', {"a": {"b": "}"}}),
        ("{not json} {'a': 1} {\"a\":\t[1, 2]} rest", {"a": [1, 2]}),
        ('{"a": NaN} {"a": 2}', {"a": 2}),
        ('{"a": 1', None),
        ("[1, 2]", None),
        ("", None),
        ("{" * 50_000, None),
        ('{"a":' * 20_00, None),
    ],
)
def test_first_json(text, found):
    assert metrics.first_json(text) == found


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ('{"a":1,"b":[1,2]}', '{ "b" : [1, 2], "a" : 1.0 }', True),
        ('{"a":1}', '{"a":"1"}', False),
        ('{"a":1}', '{"a":true}', False),
        ('{"a":0}', '{"a":false}', False),
        ('{"a":null}', "{}", False),
        ('{"a":[1,2]}', '{"a":[2,1]}', False),
        ('{"a":"x "}', '{"a":"x"}', False),
    ],
)
def test_same_json_is_tolerant_of_form_and_not_of_values(one, other, same):
    assert metrics.same_json(json.loads(one), json.loads(other)) is same
    assert metrics.same_json(json.loads(other), json.loads(one)) is same


@given(JSON)
@settings(max_examples=100, deadline=None)
def test_a_value_equals_its_own_text_again(value):
    again = json.loads(json.dumps(value, indent=1, sort_keys=True))
    assert metrics.same_json(value, again)
    assert metrics.fields(value) == metrics.fields(again)


@given(JSON, JSON)
@settings(max_examples=100, deadline=None)
def test_field_terms_agree_with_equality_and_stay_in_bounds(one, other):
    terms = metrics.field_terms(one, other)
    precision, recall, f1 = (metrics.value([terms[f"field_{name}"]]) for name in ("precision", "recall", "f1"))
    assert 0 <= f1 <= 1
    if precision + recall:
        assert f1 == pytest.approx(2 * precision * recall / (precision + recall))
    if one is not None and metrics.same_json(one, other):
        assert f1 == 1


def test_field_terms_counted_by_hand():
    wanted = {"type": "order", "count": 3, "tags": ["a", "a", "b"], "to": {"street": "Mill Road"}}
    given_ = {"type": "order", "count": "3", "tags": ["a", "b", "c"], "to": {"street": "Mill Road", "zip": 1}}
    # hits: type, tag a, tag b, street; given has 7 leaves, wanted 6
    terms = metrics.field_terms(given_, wanted)
    assert terms["field_precision"] == (4, 7)
    assert terms["field_recall"] == (4, 6)
    assert metrics.value([terms["field_f1"]]) == pytest.approx(2 * 4 / 13)
    assert metrics.field_terms(None, wanted)["field_f1"] == (0, 6)


def test_micro_values_add_numerators_and_denominators():
    assert metrics.value([(1, 2), (3, 4)]) == pytest.approx(4 / 6)
    assert metrics.value([(0, 0), (0, 0)]) == 0


def test_a_key_with_a_slash_is_not_a_path():
    assert metrics.fields({"a/b": 1}) != metrics.fields({"a": {"b": 1}})


def test_normalized_exact_match():
    assert metrics.normalize("  The Quick, (brown) FOX! ") == "quick brown fox"
    assert metrics.normalized_exact("The answer.", "answer")
    assert not metrics.normalized_exact("another", "other")
    assert metrics.exact(" a \n", "a") and not metrics.exact("A", "a")


def test_accuracy_counts_and_refuses_unequal_lengths():
    assert metrics.accuracy([1, 2, 3, 4], [1, 2, 0, 4]) == 0.75
    with pytest.raises(ValueError, match="argument 2"):
        metrics.accuracy([1], [1, 2])


@pytest.mark.parametrize(
    ("tags", "found"),
    [
        ("O O O", set()),
        ("B-a I-a O B-b", {("a", 0, 2), ("b", 3, 4)}),
        ("B-a B-a I-a", {("a", 0, 1), ("a", 1, 3)}),
        ("I-a I-a O I-b", {("a", 0, 2), ("b", 3, 4)}),  # a stray I- begins a span
        ("B-a I-b I-b", {("a", 0, 1), ("b", 1, 3)}),  # as does one of another kind
        ("O B-a", {("a", 1, 2)}),
        ("", set()),
    ],
)
def test_spans_of_tags(tags, found):
    assert metrics.spans(tags.split()) == found


def test_span_f1_is_of_whole_spans():
    """seqeval's own example: of a MISC with a wrong start and a right PER, one of two counts."""
    expected = ["O O O B-MISC I-MISC I-MISC O", "B-PER I-PER O"]
    answers = ["O O B-MISC I-MISC I-MISC I-MISC O", "B-PER I-PER O"]
    terms = [metrics.span_terms(a.split(), e.split()) for a, e in zip(answers, expected, strict=True)]
    assert [term["span_f1"] for term in terms] == [(0, 2), (2, 2)]
    for name in ("span_precision", "span_recall", "span_f1"):
        assert metrics.value(term[name] for term in terms) == 0.5
    assert metrics.value([metrics.span_terms(["O"], ["O"])["span_f1"]]) == 0.0  # nothing to find
    missed = metrics.span_terms(["B-a", "O", "B-a"], ["B-a", "O", "O"])
    assert missed == {"span_precision": (1, 2), "span_recall": (1, 1), "span_f1": (2, 3)}
