"""The machine's load, beside which a time was taken."""

import os
import pathlib
import time

ALLOWED = 0.3  # cores that other programs may use; above it ratios are not worth writing down


def others_load(seconds: float = 2.0) -> float | None:
  """Cores that other programs use, over some seconds in which this one sleeps; None where the system does not tell."""
  listing = pathlib.Path('/proc/stat')
  if not listing.exists():
    return None

  def busy() -> float:
    user, nice, system, _, _, irq, soft, steal, *_ = map(int, listing.read_text().split('\n')[0].split()[1:])
    return (user + nice + system + irq + soft + steal) / os.sysconf('SC_CLK_TCK')

  before, own, start = busy(), time.process_time(), time.monotonic()
  time.sleep(seconds)
  used = busy() - before - (time.process_time() - own)
  return round(max(used, 0.0) / (time.monotonic() - start), 2)


def quiet(allow: bool = False) -> float | None:
  """`others_load`. Exits where it is above ALLOWED, unless that is allowed."""
  load = others_load()
  if load is not None and load > ALLOWED and not allow:
    raise SystemExit(
      f'error: other programs use {load} cores; stop them, or pass --allow_load to measure all the same.'
    )
  return load
