"""Where arrays lie: one mesh of all devices of all processes, with the axes 'data' and 'fsdp'.

Batches are split over both axes. Parameters and optimizer state are whole on every device; where fsdp > 1,
each large tensor is split over 'fsdp' and gathered by XLA where it is used.
"""

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from tokenprune_jax.errors import UserError

FSDP_MIN_SIZE = 2**14  # elements; splitting biases and norms would cost more messages than memory

T = TypeVar('T')


def initialize(parallel: Mapping[str, Any]) -> None:
  """Joins the processes of config.parallel, if there are several. Call before the first array exists."""
  if parallel['processes'] == 1:
    return
  jax.config.update('jax_cpu_collectives_implementation', 'gloo')
  try:
    jax.distributed.initialize(parallel['coordinator'], parallel['processes'], parallel['process'])
  except RuntimeError as error:
    raise UserError(
      f'process {parallel["process"]} of {parallel["processes"]} could not join '
      f"config.parallel.coordinator='{parallel['coordinator']}': {error}. "
      'Start all of them, process 0 at that address.'
    ) from error


def make_mesh(fsdp: int) -> Mesh:
  """All devices as [data fsdp]. Raises UserError where `fsdp` does not divide their number."""
  devices = jax.device_count()
  if devices % fsdp:
    raise UserError(f'config.parallel.fsdp is {fsdp}, which does not divide the {devices} devices.')
  return jax.make_mesh((devices // fsdp, fsdp), ('data', 'fsdp'), axis_types=(AxisType.Auto, AxisType.Auto))


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """Axis b over all devices."""
  return NamedSharding(mesh, PartitionSpec(('data', 'fsdp')))


def replicated(mesh: Mesh | AbstractMesh) -> NamedSharding:
  """The whole array on every device."""
  return NamedSharding(mesh, PartitionSpec())


def state_shardings(mesh: Mesh | AbstractMesh, tree: Any) -> Any:
  """A sharding for each leaf: in large tensors, the largest axis that 'fsdp' divides is split.

  By shape alone, so that a parameter and its optimizer moments always lie alike.
  """
  parts = mesh.shape['fsdp']

  def place(leaf: Any) -> NamedSharding:
    axes = [axis for axis, size in enumerate(leaf.shape) if size % parts == 0]
    if parts == 1 or leaf.size < FSDP_MIN_SIZE or not axes:
      return replicated(mesh)
    axis = max(axes, key=lambda axis: leaf.shape[axis])
    return NamedSharding(mesh, PartitionSpec(*[None] * axis, 'fsdp'))

  return jax.tree.map(place, tree)


def placed(shapes: Any, shardings: Any) -> Any:
  """Abstract arrays with their shardings, as a checkpoint is read into."""
  return jax.tree.map(
    lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), shapes, shardings
  )


def put(tree: Any, shardings: Any) -> Any:
  """Host arrays, equal on all processes, as global arrays."""

  def place(leaf: Any, sharding: NamedSharding) -> jax.Array:
    host = np.asarray(leaf)
    return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])

  return jax.tree.map(place, tree, shardings)


def global_batch(batch: Mapping[str, np.ndarray], sharding: NamedSharding) -> dict[str, jax.Array]:
  """This process's rows of a batch, together with the others', as global arrays [b …]."""
  return {name: jax.make_array_from_process_local_data(sharding, x) for name, x in batch.items()}


def to_host(tree: Any, mesh: Mesh) -> Any:
  """NumPy copies of global arrays, whole on every process."""
  if jax.process_count() > 1:
    tree = jax.jit(lambda tree: tree, out_shardings=replicated(mesh))(tree)
  return jax.tree.map(np.array, tree)


def on_first(function: Callable[[], T]) -> T | None:
  """Calls `function` on process 0 only, and lets every process fail if it failed there.

  Files are written by one process; without this the others would wait forever for one that has stopped.
  """
  if jax.process_count() == 1:
    return function()
  result, failure = None, None
  if jax.process_index() == 0:
    try:
      result = function()
    except UserError as error:
      failure = error
  failed = agreed(failure is not None)
  if failure is not None:
    raise failure
  if failed:
    raise UserError('process 0 stopped; its message says why.')
  return result


def agreed(flag: bool) -> bool:
  """What process 0 says, on every process."""
  if jax.process_count() == 1:
    return flag
  return bool(multihost_utils.broadcast_one_to_all(jnp.int32(flag)))


def check_batch(name: str, size: int, parts: int = 1) -> None:
  """Raises UserError unless `size` rows (config key `name`) can be cut into `parts` on all devices."""
  divisor = jax.device_count() * parts
  if size % divisor:
    spread = f'{jax.device_count()} devices' + (f' times accumulate={parts}' if parts > 1 else '')
    raise UserError(f'config.{name} is {size}, which {spread} do not divide; choose a multiple of {divisor}.')
