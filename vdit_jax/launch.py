"""How a process starts, ends and finds its fellows.

`start` comes before any other call of JAX. One process a host joins the
others of a run; a host alone does nothing. Then nobody is left hanging: a
process that fails ends at once (`ending_together`), its heartbeats stop, and
the others end with a message within `HEARTBEAT_SECONDS`.
"""

import contextlib
import glob
import os
import socket
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping

import jax
from absl import logging
from etils import epath

from vdit_jax import writing

# A process that was silent for so long counts as lost.
HEARTBEAT_SECONDS = 60

# Exit status of a run that was asked to leave and saved its state: EX_TEMPFAIL
# of sysexits.h, "try again later"; the same command resumes it.
PREEMPTED = 75

# https://cloud.google.com/compute/docs/metadata/predefined-metadata-keys
_METADATA = "http://metadata.google.internal/computeMetadata/v1/instance/"
_BIND = "JAX_COORDINATOR_BIND_ADDRESS"
_CHIPS = ("/dev/accel[0-9]*", "/dev/vfio/[0-9]*")


def start(
  coordinator: str | None = None,
  num_processes: int | None = None,
  process_id: int | None = None,
  *,
  heartbeat_seconds: int = HEARTBEAT_SECONDS,
) -> None:
  """Join the other processes of the run, if there are any.

  Args:
    coordinator: "host:port" of process 0; None asks the TPU platform.
    num_processes: of the run.
    process_id: 0..num_processes - 1, which one this is. Process 0 listens at
      the coordinator's address alone, where JAX by itself would listen at all
      of the machine's; $JAX_COORDINATOR_BIND_ADDRESS names another one.
    heartbeat_seconds: after how long a silent process counts as lost.

  Raises:
    ValueError: if only some of the three are given, or they cannot be.
  """
  given = {
    "coordinator": coordinator,
    "num_processes": num_processes,
    "process_id": process_id,
  }
  missing = [name for name, value in given.items() if value is None]
  if not missing:
    _check(coordinator, num_processes, process_id)
    bind = os.environ.get(_BIND, coordinator)
    if process_id == 0:
      _check_bind(bind)
    jax.distributed.initialize(
      coordinator,
      num_processes,
      process_id,
      cluster_detection_method="deactivate",
      heartbeat_timeout_seconds=heartbeat_seconds,
      coordinator_bind_address=bind,
    )
  elif len(missing) < len(given):
    raise ValueError(
      f"coordinator, num_processes and process_id belong together, got {given};"
      f" give {', '.join(missing)} too, or none on a TPU pod"
    )
  elif count_tpu_hosts(os.environ) > 1:
    jax.distributed.initialize(heartbeat_timeout_seconds=heartbeat_seconds)
  else:
    return
  logging.info(
    "process %d of %d, %d of %d devices",
    jax.process_index(),
    jax.process_count(),
    jax.local_device_count(),
    jax.device_count(),
  )


def count_tpu_hosts(
  environment: Mapping[str, str],
  read_metadata: Callable[[str], str] | None = None,
) -> int:
  """Count the hosts of the TPU slices that this host is of; 1 without TPU.

  Kubernetes tells it in the environment, a TPU VM by its metadata server,
  which is asked only where there are TPU chips.

  Args:
    environment: as `os.environ`.
    read_metadata: value of an attribute of this machine, "" if it has none;
      None asks the machine's metadata server.
  """
  platforms = environment.get("JAX_PLATFORMS")
  if platforms and "tpu" not in platforms.split(","):
    return 1
  slices = int(environment.get("MEGASCALE_NUM_SLICES") or 1)
  for name in ("TPU_PROCESS_ADDRESSES", "TPU_WORKER_HOSTNAMES"):
    if hosts := environment.get(name):
      return slices * len(hosts.split(","))
  if environment.get("TPU_SKIP_MDS_QUERY"):  # JAX sets it without chips
    return slices
  if read_metadata is None:
    if not any(glob.glob(pattern) for pattern in _CHIPS):
      return slices
    read_metadata = _read_metadata
  hosts = read_metadata("attributes/worker-network-endpoints")
  slices = max(slices, _slices(read_metadata("attributes/tpu-env")))
  return slices * max(1, len([h for h in hosts.split(",") if h]))


def cache_compiled(folder: epath.PathLike) -> None:
  """Keep compiled programs in a folder, gs:// or local, for later starts.

  Several processes may share it: JAX lets one of them write, and a program
  that cannot be read is compiled again. What lies in it is run: share it with
  none but those who may run code here.

  Args:
    folder: made if it is not there; "" keeps nothing. One that cannot be
      written to is warned of, and nothing is kept.
  """
  path = None
  try:
    if folder:
      path = writing.check_folder(folder, "folder", free=False)
      path.mkdir(parents=True, exist_ok=True)
  except (ValueError, OSError) as error:
    logging.warning("compiled programs are not kept: %s", error)
    path = None
  jax.config.update("jax_enable_compilation_cache", path is not None)
  if path is not None:
    jax.config.update("jax_compilation_cache_dir", os.fspath(path))


@contextlib.contextmanager
def ending_together() -> Iterator[None]:
  """End a process of several at once when it fails.

  Leaving in the ordinary way would wait for the others, which wait for this
  one in their next collective: none would end before a timeout of minutes.
  """
  try:
    yield
  except (Exception, KeyboardInterrupt) as error:
    if jax.process_count() == 1:
      raise
    logging.exception(
      "process %d of %d fails, maybe because another one did (see its log), "
      "and ends: %s; the others end within %d s",
      jax.process_index(),
      jax.process_count(),
      str(error).partition("\n")[0],
      HEARTBEAT_SECONDS,
    )
    logging.flush()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1)


def _check(coordinator: str, num_processes: int, process_id: int) -> None:
  host, _, port = coordinator.rpartition(":")
  if not host or not port.isdigit():
    raise ValueError(
      f"coordinator must be host:port of process 0, got {coordinator!r}; try "
      f"{host or coordinator}:8476"
    )
  if not 0 <= process_id < num_processes:
    raise ValueError(
      f"process_id must be 0..num_processes - 1, got {process_id} for "
      f"num_processes={num_processes}; count from 0"
    )


def _check_bind(address: str) -> None:
  """Refuse an address of another machine, or a port that is taken."""
  host, _, port = address.rpartition(":")
  try:
    found = socket.getaddrinfo(
      host.strip("[]"), int(port), type=socket.SOCK_STREAM
    )
    family, kind, proto, _, where = found[0]
    with socket.socket(family, kind, proto) as probe:
      probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
      probe.bind(where)
  except OSError as error:
    raise ValueError(
      f"coordinator {address} is where process 0 listens, and it cannot "
      f"({error.strerror}); give a free port at an address of this machine, "
      f"or in ${_BIND} what stands behind the coordinator's name"
    ) from error


def _slices(tpu_env: str) -> int:
  """Read MEGASCALE_NUM_SLICES out of lines such as `NAME: 'value'`."""
  rows = dict(
    line.split(":", 1) for line in tpu_env.splitlines() if ":" in line
  )
  return int(rows.get("MEGASCALE_NUM_SLICES", "1").strip(" '") or 1)


def _read_metadata(name: str) -> str:
  request = urllib.request.Request(
    _METADATA + name, headers={"Metadata-Flavor": "Google"}
  )
  try:
    with urllib.request.urlopen(request, timeout=5) as reply:
      return reply.read().decode()
  except urllib.error.HTTPError:
    return ""  # this machine has no such attribute
  except OSError as error:
    logging.warning(
      "this host has TPU chips, but no metadata server answers (%s); taking it "
      "for the only host: if it is not, pass --coordinator, --num_processes "
      "and --process_id",
      error,
    )
    return ""
