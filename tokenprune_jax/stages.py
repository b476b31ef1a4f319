"""Stages and objectives: what a run trains, from what, and for what.

A method brings its own in `reducers/NAME.py`, beside its module, as plain values:

  OBJECTIVES = {'soft': soft, …}      soft(apply, params, batch, rng, teacher) -> (loss, {name: scalar})
  def finish(spec: Mapping[str, Any], validation: Callable[[], Validation]) -> dict[str, dict[str, Any]]:
  """{reducer: fields} that the stage's reducers hand on; validation() loads the best parameters."""
  fields = {}
  for member in members(spec):
    end = getattr(module(member['name']), 'finish', None)
    if end is not None:
      fields[member['name']] = end(member, validation())
  return fields


def module(name: str) -> ModuleType:
  """The file of a method."""
  return importlib.import_module(f'{reducers.__name__}.{name}')


def members(spec: Mapping[str, Any]) -> list[Mapping[str, Any]]:
  """A reducer's spec and, in a chain, those of its members."""
  return [spec, *(inner for member in spec.get('reducers', ()) for inner in members(member))]


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


def reducer_spec(
  spec: Mapping[str, Any], handed_on: Sequence[Mapping[str, Mapping[str, Any]]], stage: Mapping[str, Any]
) -> dict[str, Any]:
  """A stage's reducer: config.reducer, then what earlier stages handed on, then its own fields."""
  for fields in handed_on:
    spec = with_handed_on(spec, fields)
  return with_fields(spec, stage['reducer'])


def with_handed_on(spec: Mapping[str, Any], fields: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
  """`spec` with what `finish` found."""
  for name in names(spec):
    if name in fields:
      spec = with_fields(spec, {name: fields[name]} if 'reducers' in spec else fields[name])
  return dict(spec)


def check(stages: Sequence[Mapping[str, Any]]) -> None:
  """Raises UserError where a teacher is not an earlier stage."""
  earlier: list[str] = []
  for stage in stages:
    if stage['teacher'] and stage['teacher'] not in earlier:
      raise UserError(
        f"stage {stage['name']!r}: teacher is '{stage['teacher']}'; expected an earlier stage"
        f' ({", ".join(earlier) or "there is none"}).'
      )
    earlier.append(stage['name'])


def forward(model: Classifier) -> Apply:
  """`apply(params, batch, rng)` of a model."""

  def apply(params, batch, rng=None):
    if rng is None:
      return model.apply({'params': params}, batch)
    dropout, reduce = jax.random.split(rng)
    return model.apply({'params': params}, batch, train=True, rngs={'dropout': dropout, 'reduce': reduce})

  return apply
