"""What a reducer is made from, as data: {'name': method, field: value}; a chain's has those of its members in 'reducers'."""

import importlib
import sys
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any

from tokenprune_jax import reducers, request
from tokenprune_jax.data import Words
from tokenprune_jax.errors import UserError
from tokenprune_jax.models import Classifier, whole_spec
from tokenprune_jax.reducer import Reducer

# Fields that the executor `mask` does not read.
CAPACITIES = ('capacities', 'capacity_batch', 'batch_capacities', 'overflow_rate')


def module(name: str) -> ModuleType:
  """The file of a method."""
  return importlib.import_module(f'{reducers.__name__}.{name}')


def placed(
  spec: Mapping[str, Any], path: tuple[str, ...] = ()
) -> list[tuple[tuple[str, ...], Mapping[str, Any]]]:
  """(where its parameters lie, spec) of a reducer and, in a chain, of its members."""
  inside = enumerate(spec.get('reducers', ()))
  return [
    (path, spec),
    *(found for i, member in inside for found in placed(member, (*path, f'reducers_{i}'))),
  ]


def at(params: Mapping[str, Any], path: Sequence[str]) -> Mapping[str, Any]:
  """A part of a parameter tree; empty where there is none."""
  for name in path:
    params = params.get(name, {})
  return params


def members(spec: Mapping[str, Any]) -> list[Mapping[str, Any]]:
  """A reducer's spec and, in a chain, those of its members."""
  return [member for _, member in placed(spec)]


def names(spec: Mapping[str, Any]) -> list[str]:
  """The methods of a reducer spec, a chain's members included."""
  return [member['name'] for member in members(spec)]


def with_fields(spec: Mapping[str, Any], fields: Mapping[str, Any]) -> dict[str, Any]:
  """`spec` with other fields: {field: value}, or {reducer: {field: value}} for members of a chain by name.

  Fields with a 'name' are a whole spec that takes the place of `spec`. Raises UserError for an unknown
  member.
  """
  if 'name' in fields:
    return dict(fields)
  if 'reducers' not in spec or 'reducers' in fields:
    return {**spec, **fields}
  members = [member['name'] for member in spec['reducers']]
  for name, value in fields.items():
    if name not in members or not isinstance(value, Mapping):
      raise UserError(
        f'stage reducer fields {name}={value!r}: config.reducer is a chain of {", ".join(members)}; '
        f"write {{'{members[0]}': {{field: value}}}}."
      )
  return {
    **spec,
    'reducers': tuple({**member, **fields.get(member['name'], {})} for member in spec['reducers']),
  }


def with_handed_on(spec: Mapping[str, Any], fields: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
  """`spec` with what `finish` found."""
  for name in names(spec):
    if name in fields:
      spec = with_fields(spec, {name: fields[name]} if 'reducers' in spec else fields[name])
  return dict(spec)


def labelled(spec: Mapping[str, Any], labels: Sequence[str], words: Words | None) -> dict[str, Any]:
  """`spec` with what its methods have to know of the labels. Raises UserError where these do not suit one.

  words: of a split, where labels are tags of words.
  """
  scheme = '' if words is None else words.scheme
  fields = {
    member['name']: file.labelled(member, labels, scheme)
    for member in members(spec)
    if hasattr(file := module(member['name']), 'labelled')
  }
  return with_handed_on(spec, fields)


def sharing(spec: Mapping[str, Any], size: int, overflow_rate: float) -> dict[str, Any]:
  """`spec` where batches of `size` examples or more share capacities, which setting it to a budget then finds.

  Raises UserError where no member's examples stop in numbers of their own.
  """
  able = sharers(spec)
  if not able:
    raise UserError(
      f'{spec["name"]} has no capacities that a batch could share: its examples do not stop by themselves'
    )
  fields = {'capacity_batch': size, 'overflow_rate': overflow_rate}
  return with_handed_on(spec, {able[-1]: fields})


def sharers(spec: Mapping[str, Any]) -> list[str]:
  """The methods of a spec whose examples stop by themselves, so that a batch can share capacities."""
  return [name for name in names(spec) if hasattr(module(name).Method, 'capacity_batch')]


def controls(reducer: Reducer) -> tuple[str, ...]:
  """What a request may set of a method, and of the members of a chain: what their files name in CONTROLS."""
  own = getattr(sys.modules[type(reducer).__module__], 'CONTROLS', {})
  return (*own.values(), *(name for member in getattr(reducer, 'reducers', ()) for name in controls(member)))


def given_controls(model: Classifier, given: Mapping[str, Any]) -> dict[str, float]:
  """Controls as numbers. Raises UserError for one that the model's method has not, or a value that it cannot have."""
  known = controls(model.reducer)
  if unknown := sorted(set(given) - set(known)):
    raise UserError(f'unknown control {unknown[0]!r}; this method has: {", ".join(known) or "none"}.')
  found = request.checked_controls(given)
  check_controls(model.reducer, found, model.config.depth, model.config.heads)
  return found


def check_controls(reducer: Reducer, given: Mapping[str, float], depth: int, heads: int) -> None:
  """Raises UserError where a control has a value that the field of the method which it stands for cannot have."""
  for member in getattr(reducer, 'reducers', ()):
    check_controls(member, given, depth, heads)
  for field, control in getattr(sys.modules[type(reducer).__module__], 'CONTROLS', {}).items():
    if control in given:
      value, kind = given[control], type(getattr(reducer, field))
      if value != kind(value):
        raise UserError(f'the control {control} is {value}; expected a whole number')
      try:
        reducer.clone(**{field: kind(value)}).check(depth, heads)
      except UserError as error:
        raise UserError(str(error).replace(f'reducer.{field}', f'the control {control}')) from error


def by_controls(
  spec: Mapping[str, Any], known: Mapping[str, Any]
) -> tuple[Mapping[str, Any], dict[str, float]]:
  """(a spec, controls at which its program does what `spec` says): that of `known`, whose program is compiled already.

  (spec, {}) where the two differ in more than controls, or two members of a chain read the same one. For the executor
  `mask`, which does not read capacities.
  """
  ours, others = members(whole_spec(spec)), members(whole_spec(known))
  if [own['name'] for own in ours] != [other['name'] for other in others]:
    return spec, {}
  asked: dict[str, float] = {}
  for own, theirs in zip(ours, others):
    names = getattr(module(own['name']), 'CONTROLS', {})
    changed = {field for field in own if field != 'reducers' and own[field] != theirs[field]}
    if changed - {*names, *CAPACITIES} or set(asked) & set(names.values()):
      return spec, {}
    asked |= {control: own[field] for field, control in names.items()}
  return known, asked
