"""What the tree itself promises: sound configs, imports that point one way, no large file."""

import ast
import importlib
import importlib.metadata
import pathlib
import re
import subprocess
import sys
import tomllib

import pytest

from tokenprune_jax import models, settings, stages
from tokenprune_jax.errors import UserError

ROOT = pathlib.Path(__file__).parents[1]
PACKAGE = sorted((ROOT / 'tokenprune_jax').rglob('*.py'))
WORKER_MODULES = sorted((ROOT / 'tokenprune_jax/data').rglob('*.py'))
PROGRAMS = sorted(
  [*PACKAGE, *ROOT.glob('main.py'), *ROOT.glob('configs/*.py'), *ROOT.glob('benchmarks/*.py')]
)
CONFIGS = sorted(file.stem for file in ROOT.glob('configs/*.py') if file.stem != '__init__')
DISTRIBUTIONS = importlib.metadata.packages_distributions()
LARGEST = 1_000_000  # bytes

# What must not be written down: hosts of package registries and folders of one machine. Joined here from
# parts, so that this file passes its own test.
REGISTRIES = (('pypi', 'org'), ('pythonhosted', 'org'), ('npmjs', 'org'), ('debian', 'org'))
HOSTS = [r'\.'.join(parts) for parts in REGISTRIES]
MACHINE_PATH = r'(?<![\w.~/:-])/(?:home|root|opt|mnt|work|Users)/\w'
FORBIDDEN = re.compile('|'.join([*HOSTS, MACHINE_PATH]))


def tracked() -> list[pathlib.Path]:
  """The files that git has, or would take with `git add .`."""
  command = ['git', 'ls-files', '-z', '--cached', '--others', '--exclude-standard']
  try:
    names = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
  except (OSError, subprocess.CalledProcessError):
    pytest.skip('not a git work tree')
  return [ROOT / name for name in names.split('\0') if name and (ROOT / name).is_file()]


def normal(package: str) -> str:
  """A distribution's name in the spelling that all of its spellings share."""
  return re.sub(r'[-_.]+', '-', package).lower()


def imports(file: pathlib.Path, only_top_level: bool = False) -> set[str]:
  """The first names of all modules that a file imports."""
  tree = ast.parse(file.read_text())
  nodes = tree.body if only_top_level else list(ast.walk(tree))
  names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
  names |= {node.module for node in nodes if isinstance(node, ast.ImportFrom) and not node.level}
  return {name.split('.')[0] for name in names}


@pytest.mark.parametrize('file', PACKAGE, ids=lambda file: str(file.relative_to(ROOT)))
def test_package_imports_point_one_way(file):
  unwanted = {'torch', 'tensorflow', 'ml_collections', 'configs', 'benchmarks', 'tests', 'main'}
  assert not imports(file) & unwanted


@pytest.mark.parametrize('file', WORKER_MODULES, ids=lambda file: file.name)
def test_worker_modules_import_without_jax(file):
  assert not imports(file, only_top_level=True) & {'jax', 'flax', 'optax', 'orbax'}


@pytest.mark.parametrize('file', PROGRAMS, ids=lambda file: str(file.relative_to(ROOT)))
def test_imports_are_declared(file):
  project = tomllib.loads((ROOT / 'pyproject.toml').read_text())['project']
  declared = {normal(re.split(r'[<>=!~\[; ]', line)[0]) for line in project['dependencies']}
  ours = {'tokenprune_jax', 'configs', 'benchmarks', 'main', 'torch'}  # torch: a peer that benchmarks measure
  for name in imports(file) - ours - sys.stdlib_module_names:
    assert {normal(package) for package in DISTRIBUTIONS.get(name, [])} & declared, name


def variants(name: str) -> list[str]:
  """What a config file offers: its default, the variants it lists and those in its docstring's commands."""
  module = importlib.import_module(f'configs.{name}')
  listed = getattr(module, 'VARIANTS', None) or getattr(module, 'REDUCERS', ())
  return ['', *sorted({*listed, *re.findall(rf'--config=configs/{name}\.py:(\S+)', module.__doc__ or '')})]


@pytest.mark.parametrize(
  'name, variant',
  # configs/prune.py reads a finished run: tests/test_prune.py
  [(name, variant) for name in CONFIGS if name != 'prune' for variant in variants(name)],
)
def test_config_is_sound(name, variant):
  get_config = importlib.import_module(f'configs.{name}').get_config
  config = settings.check((get_config(variant) if variant else get_config()).to_dict())
  stages.check(config['stages'])
  for stage in config['stages']:
    models.make_reducer(stages.reducer_spec(config['reducer'], [], stage))


@pytest.mark.parametrize('name', CONFIGS)
def test_config_names_its_command_and_refuses_other_variants(name):
  module = importlib.import_module(f'configs.{name}')
  assert f'python main.py --config=configs/{name}.py' in module.__doc__
  with pytest.raises(UserError, match='no_such_variant'):
    module.get_config('no_such_variant')


def test_package_imports_without_its_peers():
  code = """if True:
    import sys
    sys.modules.update(dict.fromkeys(('torch', 'sklearn', 'pytest', 'beartype')))  # None: not importable
    import importlib, pkgutil, tokenprune_jax
    for module in pkgutil.walk_packages(tokenprune_jax.__path__, 'tokenprune_jax.'):
      importlib.import_module(module.name)
    assert 'tensorflow' not in sys.modules
  """
  subprocess.run([sys.executable, '-c', code], cwd=ROOT, check=True)


def test_no_large_file():
  assert not {file.name: file.stat().st_size for file in tracked() if file.stat().st_size > LARGEST}


def test_no_registry_host_and_no_machine_path():
  found = []
  for file in tracked():
    try:
      text = file.read_text()
    except UnicodeDecodeError:
      continue  # not a text file
    for number, line in enumerate(text.splitlines(), start=1):
      if FORBIDDEN.search(line):
        found.append(f'{file.relative_to(ROOT)}:{number}: {line[:120]}')
  assert not found
