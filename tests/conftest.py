"""What every test runs under: the CPU, caches beside pytest's own, no network.

JAX reads its settings from the environment when it is first imported, so they are set before any test file
is. The processes that tests start inherit them.
"""

import gc
import ipaddress
import os
import socket

import pytest

PEERS = ('torch', 'weights')  # markers of tests that skip where the peer or the samples are missing

# A third of the time that fused loops take with the default emitters.
QUICK_TO_COMPILE = '--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1'


def pytest_configure(config):
  gc.set_threshold(100_000, 20, 20)  # traced programs are many objects that stay: collecting took an eighth
  os.environ.setdefault('JAX_PLATFORMS', 'cpu')
  if config.pluginmanager.has_plugin('cacheprovider'):
    os.environ.setdefault('JAX_COMPILATION_CACHE_DIR', str(config.cache.mkdir('jax')))
    os.environ.setdefault('TOKENPRUNE_CACHE', str(config.cache.mkdir('tokenprune')))
  # Most programs are small, but writing those too takes a tenth of the time of tests/test_reducers.py.
  os.environ.setdefault('JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS', '0.5')
  os.environ.setdefault('JAX_TRACEBACK_IN_LOCATIONS_LIMIT', '0')  # no source lines in HLO: less to lower
  # Most of the suite's time is XLA compiling small programs once: quick to compile beats quick to run. CI's parity
  # tests on real weights, and every real run, have it at full optimisation.
  if os.environ.setdefault('JAX_DISABLE_MOST_OPTIMIZATIONS', '1') == '1':
    os.environ.setdefault('XLA_FLAGS', QUICK_TO_COMPILE)
  os.environ['HF_HUB_OFFLINE'] = '1'


@pytest.fixture(autouse=True, scope='session')
def no_network():
  """Connections from Python reach this machine only: a test that needs another one fails and says so."""
  connect = socket.socket.connect

  def connect_here(self, address):
    if self.family in (socket.AF_INET, socket.AF_INET6) and not is_loopback(address[0]):
      raise OSError(f'tests must not use the network: connection to {address[0]}')
    return connect(self, address)

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(socket.socket, 'connect', connect_here)
    yield


def is_loopback(host: str) -> bool:
  try:
    return ipaddress.ip_address(host).is_loopback
  except ValueError:
    return host == 'localhost'


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item):
  """With REQUIRE_PEERS=1 a parity test that skips has failed: a run meant to compare cannot pass empty."""
  report = yield
  skipped = report.skipped and not hasattr(report, 'wasxfail')
  if skipped and os.environ.get('REQUIRE_PEERS') == '1' and any(map(item.get_closest_marker, PEERS)):
    report.outcome = 'failed'
    report.longrepr = f'{item.nodeid} was skipped with REQUIRE_PEERS=1: {report.longrepr}'
  return report
