"""Several methods, one after the other at every hook: fuzzy pruning + combining, Magic Pyramid = LTP + exits, …"""

from collections.abc import Sequence

import jax.numpy as jnp

from tokenprune_jax.attention import Evidence
from tokenprune_jax.errors import UserError
from tokenprune_jax.reducer import Half, Inputs, Memory, Reducer
from tokenprune_jax.tokens import Tokens

TINY: dict = {
  'reducers': ({'name': 'fuzzy', 'ratio': 0.7, 'rule': 'rank'}, {'name': 'combine', 'slots': 3, 'layer': 3})
}
NEUTRAL: dict = {'reducers': ({'name': 'fuzzy', 'ratio': 1.0}, {'name': 'none'})}
SUMMED = ('loss',)  # memory entries to which several methods may contribute


class Method(Reducer):
  """Calls every hook of each reducer in the order given; a layer runs where all of them run it."""

  reducers: Sequence[Reducer] = ()

  def check(self, depth: int, heads: int) -> None:
    for place, reducer in enumerate(self.reducers):
      try:
        reducer.check(depth, heads)
      except UserError as error:
        raise UserError(str(error).replace('reducer.', f'reducer.reducers[{place}].')) from error
    run = self.blocks(depth)
    for reducer in self.reducers:
      if missing := [l for l in reducer.exits() if l not in run]:
        raise UserError(
          f'reducer.layers names exits behind the layers {missing}, which another method of the chain leaves out: there run '
          f'{", ".join(map(str, run))}'
        )
    for place, reducer in enumerate(self.reducers):
      others = [other for other in self.reducers if other is not reducer]
      keys = ['capacity_batch', *(['capacities', 'overflow_rate'] if reducer.needs_words() else [])]
      given = [key for key in keys if getattr(reducer, key, 0)]
      if given and any('rows' in other.separates() for other in others):
        raise UserError(
          f'reducer.reducers[{place}].{given[0]} takes a slot that is seen and not updated for one that found no room, '
          f'but another method of the chain leaves such slots: set it to {"()" if given[0] == "capacities" else 0}'
        )

  def readouts(self) -> tuple[str, ...]:
    left = [reducer.readouts() for reducer in self.reducers]
    return tuple(name for name in super().readouts() if all(name in names for names in left))

  def needs_words(self) -> bool:
    return any(reducer.needs_words() for reducer in self.reducers)

  def copies(self) -> dict[str, str]:
    return {
      f'reducers_{place}/{own}': other
      for place, reducer in enumerate(self.reducers)
      for own, other in reducer.copies().items()
    }

  def soft(self) -> str:
    return next((reducer.soft() for reducer in self.reducers if reducer.soft()), '')

  def blocks(self, depth: int) -> tuple[int, ...]:
    kept = [reducer.blocks(depth) for reducer in self.reducers]
    return tuple(l for l in range(1, depth + 1) if all(l in blocks for blocks in kept))

  def decides(self, depth: int) -> tuple[Half, ...]:
    asked = {half for reducer in self.reducers for half in reducer.decides(depth)}
    later = {half: [l for l in (0, *self.blocks(depth)) if l >= half.layer] for half in asked}
    # What a layer decides that another method leaves out waits for the next one that runs.
    cuts = {half._replace(layer=rest[0]) for half, rest in later.items() if rest}
    last = max(self.blocks(depth), default=0)
    gathers = 'rows' in self.separates()  # in the feed-forward, by what is counted behind attention

    def waits(half):
      # Two cuts in a layer cost more than its feed-forward gains by what attention prunes. The last one has no second.
      return half.attention and half.layer < last and half._replace(attention=False) in cuts and not gathers

    return tuple(sorted(half for half in cuts if not waits(half)))

  def shortens(self) -> bool:
    return any(reducer.shortens() for reducer in self.reducers)

  def separates(self) -> tuple[str, ...]:
    return tuple(sorted({name for reducer in self.reducers for name in reducer.separates()}))

  def exits(self) -> tuple[int, ...]:
    return tuple(l for reducer in self.reducers for l in reducer.exits())

  def reads(self, layer: int) -> tuple[str, ...]:
    since = range(max((l for l in self.blocks(layer) if l < layer), default=0) + 1, layer + 1)
    return tuple(sorted({name for reducer in self.reducers for l in since for name in reducer.reads(l)}))

  def start(self, tokens: Tokens, inputs: Inputs, train: bool) -> tuple[Tokens, Memory]:
    memory: Memory = {}
    for reducer in self.reducers:
      tokens, opened = reducer.start(tokens, inputs, train)
      memory = merge(memory, opened)
    return tokens, memory

  def after_attention(
    self, tokens: Tokens, memory: Memory, evidence: Evidence, layer: int
  ) -> tuple[Tokens, Memory]:
    for reducer in self.reducers:
      tokens, memory = reducer.after_attention(tokens, memory, evidence, layer)
    return tokens, memory

  def after_block(self, tokens: Tokens, memory: Memory, layer: int, train: bool) -> tuple[Tokens, Memory]:
    for reducer in self.reducers:
      tokens, memory = reducer.after_block(tokens, memory, layer, train)
    return tokens, memory


def merge(memory: Memory, opened: Memory) -> Memory:
  """Both memories; what both may add to is summed, any other name may be opened once."""
  twice = set(memory) & set(opened) - set(SUMMED)
  if twice:
    raise ValueError(
      f'two methods of a chain both open the memory {sorted(twice)}; each name belongs to one method'
    )
  summed = {name: jnp.add(memory[name], opened[name]) for name in set(memory) & set(opened)}
  return {**memory, **opened, **summed}
