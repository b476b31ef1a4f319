"""Prune a model that another run has fine-tuned: the same data, weights and read-out, a method, and its own training.

    python main.py --config=configs/prune.py:ltp,runs/dense --workdir=runs/ltp --config.reducer.target_macs=0.4

After the colon: a method (dense: trained on as long as most of them; pf, c_late, c_early, pfc_late, pfc_early, ltp, power,
sttabt, abt: back-tracking without thresholds, approx: their ApproxNet alone, oracle: abt by the true attention, topk,
topk_light, cascade, spatten, manual, exits, pyramid, student, student_third; of a dense tagger also tokee, sentee), the
workdir of a finished dense run and, where there is one, that of a run which the method's first stage need not repeat: for
sttabt and abt one of approx, for tokee one of sentee.
approx itself goes on from a given one, of other texts or of the pretrained encoder (`imdb_sttabt.py:approx`). A method's
recipe is that of its own config without the fine-tune at the beginning, so that one dense run serves them all.
exits of a run that prunes are trained on what it leaves, and chained with its method as it is: `exits,runs/topk_light`; a
method that would leave out the run's own is refused.
`topk+distil`, and so for each, learns half from the dense run's answers where the recipe learns from labels alone;
`topk+states` also from what the dense run's head reads, which takes longer: the last stage that does has 5 epochs.
"""

import json
import pathlib
from collections.abc import Sequence
from typing import Any

import ml_collections

from configs import (
  conll_tokee,
  imdb_exits,
  imdb_fuzzy,
  imdb_ltp,
  imdb_power,
  imdb_pyramid,
  imdb_sttabt,
  imdb_student,
  imdb_topk,
)
from tokenprune_jax import export
from tokenprune_jax.errors import UserError
from tokenprune_jax.models import make_reducer

RECIPES = {
  'dense': (imdb_fuzzy, 'dense'),
  'pf': (imdb_fuzzy, 'pf'),
  'c_late': (imdb_fuzzy, 'c_late'),
  'c_early': (imdb_fuzzy, 'c_early'),
  'pfc_late': (imdb_fuzzy, 'pfc_late'),
  'pfc_early': (imdb_fuzzy, 'pfc_early'),
  'ltp': (imdb_ltp, 'budget'),
  'power': (imdb_power, 'searched'),
  'sttabt': (imdb_sttabt, 'concrete'),
  'abt': (imdb_sttabt, 'topk'),
  'approx': (imdb_sttabt, 'approx'),
  'oracle': (imdb_sttabt, 'oracle'),
  'topk': (imdb_topk, 'third'),
  'topk_light': (imdb_topk, 'light'),
  'cascade': (imdb_topk, 'cascade'),
  'spatten': (imdb_topk, 'spatten'),
  'manual': (imdb_topk, 'manual'),
  'exits': (imdb_exits, 'exits'),
  'pyramid': (imdb_pyramid, 'fastbert'),
  'student': (imdb_student, 'half'),
  'student_third': (imdb_student, 'third'),
  'tokee': (conll_tokee, 'tokee,ner'),
  'sentee': (conll_tokee, 'sentee,ner'),
}
TAUGHT = {'distil': 'distil', 'states': 'distil_states'}  # after a plus: the objective
STATES_EPOCHS = 5  # what a head reads goes on telling more when labels are known
KEPT = ('seed', 'task', 'data')  # of the dense run


def read(folder: str) -> dict:
  """The config of a finished run. Raises UserError where there is none."""
  file = pathlib.Path(folder) / 'config.json'
  if not folder or not file.exists():
    raise UserError(
      'the config needs the workdir of a finished dense run, as in --config=configs/prune.py:ltp,runs/dense'
      + (f'; there is no {file}' if folder else '')
    )
  return json.loads(file.read_text(encoding='utf-8'))


def moved(stage: dict, dense: str, other: str) -> dict:
  """A stage that starts from the given runs where it started from earlier stages."""
  if other and (stage['init'] == 'approx' or stage['name'] == 'approx'):
    stage |= {'init': dense, 'init_reducer': other}
  if stage['init'] == 'joint' and other:
    stage |= {'init': other, 'teacher': other}
  first = {key: dense for key in ('init', 'teacher') if stage[key] in ('tune', 'pretrained')}
  return {**stage, **first}


def taught(stages: Sequence[Any], dense: str, objective: str) -> tuple[dict, ...]:
  """Stages that learn from the dense run in that way where they learned from labels alone, or from answers."""
  found = [dict(stage) for stage in stages]
  changed = [stage for stage in found if stage['objective'] in ('default', 'distil')]
  for stage in changed:
    stage |= {'objective': objective, 'teacher': dense}
  if changed and objective == TAUGHT['states']:
    changed[-1]['epochs'] = STATES_EPOCHS
  return tuple(found)


def members_of(spec: dict) -> tuple[dict, ...]:
  """The methods of a spec in their order; of a dense one none."""
  return spec.get('reducers', (spec,) if spec['name'] != 'none' else ())


def names_of(members: Sequence[dict]) -> set[str]:
  """Their names."""
  return {member['name'] for member in members}


def methods_of(folder: str) -> tuple[dict, ...]:
  """The methods that a finished run left, set as they are."""
  model = pathlib.Path(folder) / 'model'
  spec = export.load_reducer_spec(model) if model.is_dir() else {'name': 'none'}
  return tuple(
    {**member, **({'target_macs': 0.0} if 'target_macs' in member else {})} for member in members_of(spec)
  )


def chained(config: ml_collections.ConfigDict, before: tuple[dict, ...]) -> None:
  """Exits behind the methods of a run that prunes and behind layers that these run: they alone are trained."""
  exits, place = config.reducer.to_dict(), f'reducers_{len(before)}'
  if exits['name'] in names_of(before):
    raise UserError('the run has exits already; name the run without them that it was made from')
  run = make_reducer({'name': 'chain', 'reducers': before}).blocks(len(exits['layers']) + 1)
  exits['layers'] = tuple(layer for layer in run if layer < max(run))
  config.reducer = {'name': 'chain', 'reducers': (*before, exits)}
  config.stages = tuple({**stage, 'train': f'reducer/{place}/.*'} for stage in config.stages)


def get_config(argument: str = '') -> ml_collections.ConfigDict:
  """The config of 'method[+distil|+states],dense run[,run of the first stage]'."""
  name, _, folders = argument.partition(',')
  dense, _, other = folders.partition(',')
  method, plus, teaching = name.partition('+')
  if method not in RECIPES:
    raise UserError(f'the config has no method {method!r}; choose one of {", ".join(RECIPES)}')
  if plus and teaching not in TAUGHT:
    raise UserError(f'the config has no {method}+{teaching}; after the plus is one of {", ".join(TAUGHT)}')
  given, (recipe, variant) = read(dense), RECIPES[method]
  left_out = {'tune', 'approx', 'joint'} - {method} if other else {'tune'}
  config = recipe.get_config(f'{variant},{given["model"]["weights"]}')
  with config.unlocked():
    for key in KEPT:
      config[key] = ml_collections.ConfigDict(given[key]) if isinstance(given[key], dict) else given[key]
    config.model = ml_collections.ConfigDict({**given['model'], 'executor': config.model.executor})
    config.stages = tuple(
      moved(dict(stage), dense, other) for stage in config.stages if stage['name'] not in left_out
    )
    before = methods_of(dense)
    if method == 'exits' and before:
      chained(config, before)
    if left := names_of(before) - names_of(members_of(config.reducer.to_dict())):
      raise UserError(
        f'{dense} is a run of {", ".join(sorted(left))}, which {method} would leave out: name the dense run that it was made '
        f'from. Only exits can be put behind its method: exits,{dense}'
      )
    if config.reducer.get('name') == 'power':  # ranks are those of the dense run's texts
      config.reducer.slots = config.data.max_length
    if plus:
      config.stages = taught(config.stages, dense, TAUGHT[teaching])
  return config
