"""A process knows whether it is one of several, and refuses half an answer."""

import socket

import jax
import pytest

from vdit_jax import launch


def _refuse(name):
  raise AssertionError(f"asked for {name}")


@pytest.mark.parametrize(
  ("environment", "hosts"),
  [
    ({"JAX_PLATFORMS": "cpu", "TPU_WORKER_HOSTNAMES": "a,b"}, 1),
    ({"TPU_WORKER_HOSTNAMES": "localhost"}, 1),
    ({"TPU_WORKER_HOSTNAMES": "a,b,c,d"}, 4),
    ({"TPU_PROCESS_ADDRESSES": "a:1,b:1"}, 2),
    ({"TPU_WORKER_HOSTNAMES": "a,b", "MEGASCALE_NUM_SLICES": "4"}, 8),
    ({"TPU_WORKER_HOSTNAMES": "a", "MEGASCALE_NUM_SLICES": "2"}, 2),
    ({"TPU_SKIP_MDS_QUERY": "1"}, 1),
  ],
)
def test_the_environment_tells_how_many_hosts(environment, hosts):
  assert launch.count_tpu_hosts(environment, _refuse) == hosts


@pytest.mark.parametrize(
  ("endpoints", "tpu_env", "hosts"),
  [
    ("10.0.0.2", "", 1),
    ("", "", 1),
    ("unknown:8470:10.0.0.2,unknown:8470:10.0.0.3", "ZONE: 'x'", 2),
    ("a,b,c,d", "ZONE: 'x'\nMEGASCALE_NUM_SLICES: '2'\n", 8),
    ("a", "MEGASCALE_NUM_SLICES: '3'", 3),
  ],
)
def test_a_tpu_vm_asks_its_metadata_server(endpoints, tpu_env, hosts):
  answers = {
    "attributes/worker-network-endpoints": endpoints,
    "attributes/tpu-env": tpu_env,
  }
  assert launch.count_tpu_hosts({}, answers.__getitem__) == hosts


def test_without_chips_nobody_is_asked(monkeypatch):
  monkeypatch.setattr(launch.glob, "glob", lambda _: [])
  monkeypatch.setattr(launch, "_read_metadata", _refuse)
  assert launch.count_tpu_hosts({}) == 1


def test_a_server_that_does_not_answer_leaves_this_host_alone(monkeypatch):
  def fail(*_, timeout):
    assert timeout <= 10
    raise OSError("no route")

  monkeypatch.setattr(launch.glob, "glob", lambda _: ["/dev/accel0"])
  monkeypatch.setattr(launch.urllib.request, "urlopen", fail)
  assert launch.count_tpu_hosts({}) == 1


def test_a_host_alone_starts_without_the_others(monkeypatch):
  monkeypatch.setattr(jax.distributed, "initialize", _refuse)
  launch.start()


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    ({"coordinator": "a:1"}, "give num_processes, process_id too"),
    ({"num_processes": 2, "process_id": 0}, "give coordinator too"),
    (("a:1", 2, 2), "process_id must be 0..num_processes - 1, got 2"),
    (("a", 2, 0), "coordinator must be host:port .* try a:8476"),
  ],
)
def test_half_an_answer_is_refused(monkeypatch, arguments, message):
  monkeypatch.setattr(jax.distributed, "initialize", _refuse)
  with pytest.raises(ValueError, match=message):
    if isinstance(arguments, tuple):
      launch.start(*arguments)
    else:
      launch.start(**arguments)


def test_a_pod_starts_by_itself(monkeypatch):
  calls = []
  monkeypatch.setattr(launch, "count_tpu_hosts", lambda _: 4)
  monkeypatch.setattr(
    jax.distributed, "initialize", lambda *args, **_: calls.append(args)
  )
  launch.start()
  assert calls == [()]


@pytest.fixture
def cache_settings():
  names = ("jax_compilation_cache_dir", "jax_enable_compilation_cache")
  before = {name: getattr(jax.config, name) for name in names}
  yield
  for name, value in before.items():
    jax.config.update(name, value)


def test_compiled_programs_are_kept_where_one_says(tmp_path, cache_settings):
  launch.cache_compiled(tmp_path / "new" / "cache")
  assert jax.config.jax_compilation_cache_dir == str(tmp_path / "new/cache")
  assert (tmp_path / "new" / "cache").is_dir()
  launch.cache_compiled("")
  assert not jax.config.jax_enable_compilation_cache


@pytest.mark.parametrize("place", ["a file", "below a file"])
def test_a_cache_that_cannot_be_written_is_warned_of(
  tmp_path, cache_settings, monkeypatch, place
):
  (tmp_path / "file").touch()
  path = tmp_path / "file" / ("cache" if place == "below a file" else "")
  said = []
  monkeypatch.setattr(
    launch.logging, "warning", lambda text, *args: said.append(text % args)
  )
  launch.cache_compiled(path)
  assert not jax.config.jax_enable_compilation_cache
  assert "compiled programs are not kept" in said[0] and str(path) in said[0]


def _started(monkeypatch, process, address="127.0.0.1:0"):
  calls = []
  monkeypatch.setattr(
    jax.distributed, "initialize", lambda *a, **k: calls.append(k)
  )
  launch.start(address, 2, process)
  (found,) = calls
  return found["coordinator_bind_address"]


def test_process_0_listens_where_it_is_told_and_nowhere_else(monkeypatch):
  assert _started(monkeypatch, 0) == "127.0.0.1:0"
  assert _started(monkeypatch, 1, "elsewhere.invalid:1") == (
    "elsewhere.invalid:1"
  )
  monkeypatch.setenv("JAX_COORDINATOR_BIND_ADDRESS", "127.0.0.1:0")
  assert _started(monkeypatch, 0, "elsewhere.invalid:1") == "127.0.0.1:0"


def test_an_address_that_is_not_its_own_is_refused_at_once(monkeypatch):
  monkeypatch.setattr(jax.distributed, "initialize", _refuse)
  with socket.socket() as taken:
    taken.bind(("127.0.0.1", 0))
    taken.listen()
    port = taken.getsockname()[1]
    for address in ("192.0.2.1:1234", f"127.0.0.1:{port}"):
      with pytest.raises(ValueError, match=f"{address} is where process 0"):
        launch.start(address, 2, 0)


def test_a_process_alone_fails_in_the_ordinary_way():
  with pytest.raises(KeyError), launch.ending_together():
    raise KeyError("a")


def test_one_of_several_ends_at_once(monkeypatch):
  class Ended(BaseException):
    pass

  def end(status):
    raise Ended(status)

  monkeypatch.setattr(jax, "process_count", lambda: 2)
  monkeypatch.setattr(launch.os, "_exit", end)
  with pytest.raises(Ended, match="1"), launch.ending_together():
    raise KeyError("a")
  with pytest.raises(SystemExit), launch.ending_together():
    raise SystemExit(launch.PREEMPTED)
