"""AdamW over the parameters that are trained: which ones, how fast, and nothing for the others.

A parameter is named by its path, such as 'encoder/block_1/query/kernel'; a regex matches whole paths.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import traverse_util

from tokenprune_jax.errors import UserError

Params = Mapping[str, Any]

ADAM = {'b1': 0.9, 'b2': 0.999, 'eps': 1e-8}  # as in BERT and every fine-tuning recipe after it


def flatten(params: Params) -> dict[str, Any]:
  """{path: leaf} in the order of the tree's leaves."""
  return dict(
    sorted(traverse_util.flatten_dict(params, sep='/').items(), key=lambda item: item[0].split('/'))
  )


def unflatten(flat: Mapping[str, Any]) -> dict[str, Any]:
  """The tree of {path: leaf}."""
  return traverse_util.unflatten_dict(dict(flat), sep='/')


def trainable(params: Params, regex: str, unused_blocks: Sequence[int]) -> frozenset[str]:
  """The paths that `regex` trains, without blocks that never run. Raises UserError where that is none."""
  unused = tuple(f'encoder/block_{layer}/' for layer in unused_blocks)
  matched = {path for path in flatten(params) if re.fullmatch(regex, path)}
  paths = frozenset(path for path in matched if not path.startswith(unused))
  if not paths:
    raise UserError(f"the stage's train='{regex}' matches none of the parameters that run.{examples(params)}")
  return paths


def split(params: Params, paths: frozenset[str]) -> tuple[dict[str, Any], dict[str, Any]]:
  """(trained, frozen): two trees that `merge` joins again."""
  flat = flatten(params)
  trained = {path: leaf for path, leaf in flat.items() if path in paths}
  frozen = {path: leaf for path, leaf in flat.items() if path not in paths}
  return unflatten(trained), unflatten(frozen)


def merge(trained: Params, frozen: Params) -> dict[str, Any]:
  """The whole tree of what `split` took apart."""
  return unflatten({**flatten(trained), **flatten(frozen)})


def rates(params: Params, groups: Sequence[tuple[str, float]]) -> dict[str, float]:
  """{path: learning-rate factor} by the first regex that matches, 1 without any."""
  return {
    path: next((factor for regex, factor in groups if re.fullmatch(regex, path)), 1.0)
    for path in flatten(params)
  }


def check_groups(groups: Sequence[tuple[str, float]], stages: Iterable[Params]) -> None:
  """Raises UserError for a regex that matches no parameter of any stage: it would be silently without effect."""
  left = [regex for regex, _ in groups]
  for params in stages:
    left = [regex for regex in left if not any(re.fullmatch(regex, path) for path in flatten(params))]
    if not left:
      return
  if left:
    raise UserError(f"config.optimizer.groups: '{left[0]}' matches no parameter.{examples(params)}")


def examples(params: Params) -> str:
  """The end of a message about a regex: what paths look like."""
  paths = list(flatten(params))
  shown = [paths[i * (len(paths) - 1) // 4] for i in range(5)] if len(paths) > 5 else paths
  return f' It has to match a whole path, such as {", ".join(shown)}.'


def decays(path: str) -> bool:
  """Weight decay is for matrices and tables: not for biases, the scales of norms, and what a method learns to prune by."""
  return path.rsplit('/', 1)[-1] in ('kernel', 'embedding')


def schedule(learning_rate: float, steps: int, warmup: float) -> Callable[[jax.Array | int], jax.Array]:
  """Linear from 0 to `learning_rate` over the share `warmup` of `steps`, then linear to 0. Step 0 learns."""
  rise = max(round(warmup * steps), 1)

  def rate(count: jax.Array | int) -> jax.Array:
    fall = (steps - count) / max(steps - rise, 1)
    return learning_rate * jnp.clip(jnp.minimum((count + 1) / rise, fall), 0, 1)

  return rate


def adamw(
  params: Params,
  rate: Callable[[jax.Array | int], jax.Array],
  *,
  groups: Sequence[tuple[str, float]],
  weight_decay: float,
  clip: float,
) -> optax.GradientTransformation:
  """AdamW for any part of the tree `params`: clip by global norm, decoupled decay, one rate for each group.

  rate: step -> learning rate. groups: (regex, factor). clip: largest global norm, 0 = none.
  """
  factors = rates(params, groups)

  def decayed(part: Params) -> Params:
    return unflatten({path: decays(path) for path in flatten(part)})

  def by_group(updates: Params, _: Any) -> Params:
    return unflatten({path: update * factors[path] for path, update in flatten(updates).items()})

  return optax.chain(
    optax.clip_by_global_norm(clip) if clip else optax.identity(),
    optax.scale_by_adam(**ADAM),
    optax.add_decayed_weights(weight_decay, mask=decayed),
    optax.stateless(by_group),
    optax.scale_by_learning_rate(rate),
  )
