"""Spans and schemes against seqeval and against loops."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenprune_jax import metrics
from tokenprune_jax.data import tags
from tokenprune_jax.data.tags import Span

ANY = st.lists(st.sampled_from(['O', 'B-A', 'I-A', 'B-B', 'I-B', 'E-A', 'S-A', 'E-B', 'S-B']), max_size=9)


@settings(max_examples=300, deadline=None)
@given(ANY)
def test_spans_are_those_of_seqeval(given_tags):
  from seqeval.metrics.sequence_labeling import get_entities

  expected = [(kind, start, stop + 1) for kind, start, stop in get_entities(given_tags)]
  assert tags.spans(given_tags) == expected


@settings(max_examples=200, deadline=None)
@given(ANY, st.sampled_from(['bio', 'bioes']))
def test_what_is_written_keeps_to_its_scheme_and_says_the_same(given_tags, scheme):
  found = tags.spans(given_tags)
  written = tags.written(found, len(given_tags), scheme)
  assert tags.spans(written) == found and tags.first_illegal(written, scheme) is None
  assert tags.scheme_of(written) in ('bio', scheme) or not found
  back = tags.written(
    tags.spans(tags.written(tags.spans(written), len(written), 'bioes')), len(written), 'bio'
  )
  assert back == tags.written(found, len(given_tags), 'bio')


def legal(before, tag, after, scheme):
  """Whether a tag may stand between two others, from the definition of the scheme."""
  (mark, kind), (last, last_kind), (following, next_kind) = (
    (t[:1], t[2:]) for t in (tag, before or 'O', after or 'O')
  )
  opened = last in 'BI' and last_kind == kind
  goes_on = following in 'IE' and next_kind == kind
  if scheme == 'bio':
    return mark != 'I' or opened
  return {'O': True, 'S': True, 'B': goes_on, 'I': opened and goes_on, 'E': opened}[mark]


@settings(max_examples=300, deadline=None)
@given(ANY, st.sampled_from(['bio', 'bioes']))
def test_a_sentence_is_legal_where_every_tag_is(given_tags, scheme):
  if scheme == 'bio':
    given_tags = [tag.replace('E-', 'I-').replace('S-', 'B-') for tag in given_tags]
  padded = ['', *given_tags, '']
  expected = all(legal(*padded[i : i + 3], scheme) for i in range(len(given_tags)))
  assert (tags.first_illegal(given_tags, scheme) is None) == expected


def test_examples():
  assert tags.spans(['B-PER', 'I-PER', 'O', 'I-LOC', 'B-LOC', 'S-ORG']) == [
    Span('PER', 0, 2), Span('LOC', 3, 4), Span('LOC', 4, 5), Span('ORG', 5, 6)
  ]  # fmt: skip
  assert tags.written([Span('PER', 0, 3), Span('A-B', 3, 4)], 5, 'bioes') == (
    'B-PER',
    'I-PER',
    'E-PER',
    'S-A-B',
    'O',
  )
  assert tags.first_illegal(['O', 'I-PER', 'I-PER'], 'bio') == 1
  assert tags.first_illegal(['B-PER', 'O'], 'bioes') == 0
  assert tags.first_illegal(['O', 'NN'], 'bio') == 1 and tags.first_illegal(['I-PER'], 'plain') is None
  assert tags.spans(['B', 'I', 'O']) == [Span('', 0, 2)] and tags.written([Span('', 0, 2)], 2, 'bioes') == (
    'B',
    'E',
  )


@pytest.mark.parametrize(
  'known, scheme',
  [
    (('O', 'B-PER', 'I-PER'), 'bio'),
    (('O', 'I-PER'), 'bio'),  # the older way, in which B- is rare
    (('O', 'B-PER', 'E-PER'), 'bioes'),
    (('O', 'S-PER'), 'bioes'),
    (('NN', 'VB', 'O'), 'plain'),
    (('O',), 'plain'),
  ],
)
def test_the_scheme_is_known_by_its_tags(known, scheme):
  assert tags.scheme_of(known) == scheme


def test_span_scores_count_whole_spans():
  gold = [['B-A', 'I-A', 'O', 'B-B'], ['B-A', 'O']]
  found = [['B-A', 'I-A', 'O', 'B-A'], ['O', 'O']]
  assert metrics.span_scores(gold, found) == pytest.approx({'precision': 1 / 2, 'recall': 1 / 3, 'f1': 0.4})
  nothing = [['O', 'O']]
  assert metrics.span_scores(nothing, nothing) == {'precision': 0, 'recall': 0, 'f1': 0}


@settings(max_examples=30, deadline=None)
@given(st.lists(ANY.filter(bool), min_size=1, max_size=4), st.randoms())
def test_span_scores_against_a_count_of_spans(gold, random):
  found = [[random.choice(gold[0] + sentence) for _ in sentence] for sentence in gold]
  ours, theirs = (
    {(i, *span) for i, sentence in enumerate(given) for span in tags.spans(sentence)}
    for given in (gold, found)
  )
  right = len(ours & theirs)
  expected = {
    'precision': right / max(len(theirs), 1),
    'recall': right / max(len(ours), 1),
    'f1': 2 * right / max(len(ours) + len(theirs), 1),
  }
  assert metrics.span_scores(gold, found) == pytest.approx(expected)
