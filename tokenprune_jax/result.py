"""The end of a run: the test split read once, time measured beside dense, the model exported."""

import itertools
import json
import pathlib
from collections.abc import Mapping
from typing import Any

import jax

from tokenprune_jax import evaluate, predict, pretrained, sharding, timing, workdir, writer
from tokenprune_jax.models import Classifier
from tokenprune_jax.session import Session, batches, make_model

# Of the test split, spread over its lengths: enough for a median, seconds instead of minutes.
TIMED_BATCHES = 4
SCORES = (
  'accuracy', 'precision', 'recall', 'f1', 'macro_f1', 'micro_f1', 'macro_f1_batch16', 'confusion', 'loss',
)  # fmt: skip


def evaluated(session: Session, model: Classifier, params: Any, split: str) -> tuple[dict, list]:
  """(metrics, records) of a split, as `evaluate.evaluate`."""
  return evaluate.evaluate(
    model,
    params,
    session.dataset.splits[split],
    session.task,
    batch_size=session.config['eval']['batch_size'],
    buckets=session.buckets,
    pad_id=session.weights.config.pad_id,
    sharding=sharding.batch_sharding(session.mesh),
    rerun=session.config['eval']['rerun'],
  )


def test(
  session: Session, spec: Mapping[str, Any], params: Any, step: int, about: Mapping[str, Any]
) -> dict[str, Any]:
  """Tests the model with the reducer `spec`, exports it and, last, writes result.json. Returns its content.

  params: global arrays. step: of the run. about: entries that the training adds to the result.
  """
  folder, config = session.folder, session.config
  model = make_model(session, spec)
  metrics, records = evaluated(session, model, params, 'test')
  host = sharding.to_host(params, session.mesh)
  result = summary(metrics, time_beside_dense(session, model, host)) | {
    'labels': list(session.dataset.labels),
    'executor': config['model']['executor'],
    'dtype': model.config.dtype,
    'seed': config['seed'],
    **about,
  }

  def leave() -> None:
    session.out.go_on_after(step)
    session.out.write(step, config['stages'][-1]['name'], 'test', result['metrics'])
    session.out.flush()
    lines = [json.dumps(record) + '\n' for record in records]
    workdir.write_text(folder / 'predictions_test.jsonl', ''.join(lines))
    models = {'model': (model.config, host, spec)}
    if spec['name'] == 'student' and spec.get('layers'):
      models['student'] = (*pretrained.alone(model.config, host, spec['layers']), {'name': 'none'})
    for name, (encoder, values, reducer) in models.items():
      pretrained.export(
        folder / name,
        encoder,
        values,
        session.weights.tokenizer,
        session.dataset.labels,
        readout=model.readout,
        head=model.head,
        reducer_spec=reducer,
        max_length=config['data']['max_length'],
        constrained=config['task']['constrained'],
      )
    workdir.write_json(folder / 'result.json', result)

  sharding.on_first(leave)
  writer.say(report(result, folder))
  return result


def summary(metrics: Mapping[str, Any], times: Mapping[str, Any] | None) -> dict[str, Any]:
  """result.json's figures of the test split: scores apart from cost; null where nothing was timed."""
  models = times['models'] if times else {}
  seconds = {name: row['seconds_per_example'] for name, row in models.items()}
  rest = {name: value for name, value in metrics.items() if name not in SCORES}
  return {
    'split': 'test',
    'metrics': {name: metrics[name] for name in SCORES if name in metrics},
    **rest,
    'seconds_per_example': seconds.get('model', seconds.get('dense')),
    'dense_seconds_per_example': seconds.get('dense'),
    'timing': times,
  }


def time_beside_dense(session: Session, model: Classifier, params: Any) -> dict[str, Any] | None:
  """`timing.beside_dense` of the model and the dense one with the same weights, on a few test batches.

  Under the executor `serve` the model gets them through a server. None where config.eval.timing is off, or where several
  processes share the machine's cores.
  """
  if not session.config['eval']['timing'] or jax.process_count() > 1:
    return None
  plan = batches(session, 'test', session.config['eval']['batch_size'])
  every = max(plan.steps_per_epoch // TIMED_BATCHES, 1)
  some = list(itertools.islice(plan.iterator(0), 0, every * TIMED_BATCHES, every))
  models = {'dense': (make_model(session, {'name': 'none'}), params)}
  if model != models['dense'][0]:
    models['model'] = (model, params)
  served = ('model',) if session.config['model']['executor'] == 'serve' else ()
  if served:  # of a method that decides in most layers for minutes
    writer.say('timing: compiling what `serve` needs; --config.eval.timing=False leaves it out')
  return timing.beside_dense(models, some, served=served)


def report(result: Mapping[str, Any], folder: pathlib.Path) -> str:
  """The result in a few lines, for a person."""
  scores = '  '.join(
    f'{name} {value:.4f}' for name, value in result['metrics'].items() if isinstance(value, float)
  )
  cost = f'keep ratio {result["keep_ratio"]:.3f}  MACs {result["mac_ratio"]:.3f} of dense'
  if result['seconds_per_example']:
    ratio = result['dense_seconds_per_example'] / result['seconds_per_example']
    cost += f'  {1000 * result["seconds_per_example"]:.2f} ms an example, {ratio:.2f} times as fast as dense'
  return f'test  {scores}\n      {cost}\n      {folder / "result.json"}'


def label_file(config: Mapping[str, Any], folder: pathlib.Path) -> None:
  """Labels the texts of config.predict, if there are any, with the run's model."""
  if config['predict']:
    out = folder / 'predicted.jsonl'
    count = sharding.on_first(lambda: predict.predict_file(folder, config['predict'], out))
    writer.say(f'{count} texts of {config["predict"]} labelled: {out}')
