"""Runs one config: python main.py --config=configs/NAME.py[:variant] --workdir=DIR [--config.key=value …]"""

import re
import sys
import traceback

from absl import app, flags, logging
from ml_collections import config_flags

from tokenprune_jax import host_memory
from tokenprune_jax.errors import UserError

CONFIG = config_flags.DEFINE_config_file('config', None, 'File of the experiment, with an optional :variant.')
WORKDIR = flags.DEFINE_string('workdir', None, 'Folder of the run; the same one again continues it.')


def parse(arguments):
  """(config, workdir) of the flags. Raises UserError for whatever is wrong in them or in the config file."""
  try:
    words = flags.FLAGS(arguments)[1:]
    given = {'config': CONFIG.value and CONFIG.value.to_dict(), 'workdir': WORKDIR.value}
  except (AssertionError, ImportError, NameError, SyntaxError) as error:
    raise UserError(place(error)) from error
  except (flags.Error, AttributeError, LookupError, OSError, TypeError, ValueError) as error:
    raise UserError(cause(error, arguments)) from error
  wrong = [f'--{name} is missing' for name, value in given.items() if not value]
  if wrong or words:
    raise UserError(f'{", ".join(wrong) or f"{words[0]!r} is no flag"}. {__doc__}')
  return given['config'], given['workdir']


def place(error):
  """FILE:LINE: message, of a config file that is wrong Python."""
  if isinstance(error, SyntaxError):
    return f'{error.filename}:{error.lineno}: {error.msg}'
  last = traceback.extract_tb(error.__traceback__)[-1]
  return f'{last.filename}:{last.lineno}: {error or type(error).__name__}'


def cause(error, arguments):
  """In one line: what a config file raised, where that came wrapped in a traceback, else the message."""
  unknown = isinstance(error, (AttributeError, LookupError))
  while 'Traceback' in str(error) and error.__context__ is not None:
    error = error.__context__
  while isinstance(error, Exception) and error.args:
    error = error.args[0]
  message = ' '.join(str(error).split())
  if not unknown:
    return message
  name = message.split()[0].strip('\'"')
  keys = (word.split('=')[0] for word in arguments if word.startswith('--config.'))
  key = next((key for key in keys if name in re.split(r'[.\[\]]+', key)), '--config')
  return f'{key}: no such config key: {message}'


def main(arguments):
  """Exit status: 0 finished, 2 wrong input, 128 + signal where it was stopped (training saves first)."""
  host_memory.keep()
  logging.set_verbosity(logging.FATAL)  # Orbax logs a traceback for each error that is also raised
  app.define_help_flags()
  try:
    config, workdir = parse(arguments)
    from tokenprune_jax import settings  # only now: a mistyped flag should not take their seconds

    config = settings.check(config)
    from tokenprune_jax import compile_cache, sharding, train

    sharding.initialize(config['parallel'])
    compile_cache.turn_on()
    train.run(config, workdir)
  except (UserError, KeyboardInterrupt) as error:
    print(f'error: {str(error) or "interrupted, with nothing to save"}', file=sys.stderr)
    return 2 if isinstance(error, UserError) else 130
  return 0


if __name__ == '__main__':
  sys.exit(main(sys.argv))
