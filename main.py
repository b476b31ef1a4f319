"""Runs one experiment: python main.py --config=configs/NAME.py[:variant] --workdir=DIR [--config.key=value …]"""

import os
import sys

from absl import app, flags, logging
from ml_collections import config_flags

from tokenprune_jax.errors import UserError

CONFIG = config_flags.DEFINE_config_file('config', None, 'File of the experiment, with an optional :variant.')
WORKDIR = flags.DEFINE_string('workdir', None, 'Folder of the run; the same one again continues it.')


def parse(arguments):
  """(config, workdir) of the flags. Raises UserError for whatever is wrong in them or in the config file."""
  try:
    rest = flags.FLAGS(arguments)[1:]
    given = {'config': CONFIG.value, 'workdir': WORKDIR.value}
  except (flags.Error, AttributeError, LookupError, OSError, TypeError, ValueError) as error:
    raise UserError(cause(error)) from error
  missing = ' and '.join(f'--{name}' for name, value in given.items() if not value)
  if missing or rest:
    raise UserError(f'{missing} is missing. {__doc__}' if missing else f'{rest[0]!r} is no flag. {__doc__}')
  return given['config'].to_dict(), given['workdir']


def cause(error):
  """What a config file itself raised, where config_flags wrapped it in a traceback; else the message, on one line."""
  while 'Traceback' in str(error) and error.__context__ is not None:
    error = error.__context__
  return ' '.join(str(error).split())


def main(arguments):
  """Exit status: 0 finished, 2 wrong input, 128 + signal stopped and saved."""
  logging.set_verbosity(logging.FATAL)  # Orbax logs a traceback for each error that is also raised
  app.define_help_flags()
  try:
    config, workdir = parse(arguments)
    # Only now: a mistyped flag should not take the seconds that importing JAX takes.
    from tokenprune_jax import data, settings, sharding, train

    os.environ.setdefault('JAX_COMPILATION_CACHE_DIR', str(data.cache_dir() / 'xla'))
    sharding.initialize(settings.check(config)['parallel'])
    train.run(config, workdir)
  except UserError as error:
    return print(f'error: {error}', file=sys.stderr) or 2
  return 0


if __name__ == '__main__':
  sys.exit(main(sys.argv))
