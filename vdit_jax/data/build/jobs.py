"""A machine's share of a build: what each part's files are, decided once.

  parts.File --probe, in processes--> part-*.probes.jsonl --> part-*.plan.json

See `build`, which has the whole of it.
"""

import dataclasses
import functools
import itertools
import json
import os
import sys
from collections.abc import Sequence
from typing import Any

import tqdm
from etils import epath

from vdit_jax import strict_json, writing
from vdit_jax.data import shards
from vdit_jax.data.build import cuts, manifest, parts, pool, probe, splits
from vdit_jax.text import escapes

_SHARD = 2**28  # bytes of a file of records, about
_CUT = 1800.0  # seconds of video that one process cuts into a file of records


@dataclasses.dataclass(frozen=True)
class Spec:
  """What a dataset is made of; the same on all machines that build it.

  Attributes:
    videos: folder or glob of the files; a manifest.
    captions: file or folder of their captions; what `videos` is again, or "",
      for those that lie there.
    min_frames: of a video.
    validation: share of the clips that are for validation, see `splits`.
    length: of the clips that videos are cut into; None keeps them whole.
    num_shards: machines that build.
  """

  videos: str
  captions: str
  min_frames: int = 2
  validation: float = 0.02
  length: cuts.Length | None = None
  num_shards: int = 1

  def __post_init__(self):
    if self.min_frames < 1:
      raise ValueError(f"min_frames must be at least 1, got {self.min_frames}")
    if not 0 <= self.validation < 1:
      raise ValueError(
        f"validation must be a share in [0, 1), got {self.validation}; try 0.02"
      )
    if self.num_shards < 1:
      raise ValueError(f"num_shards must be at least 1, got {self.num_shards}")


@dataclasses.dataclass(frozen=True)
class Job:
  """A machine's share of a build.

  Attributes:
    spec, place: of the dataset.
    survey: of its captions.
    own: parts that this machine builds.
    num_parts: of all.
    workers: processes; 0 is this one.
    strict: whether to stop at a file that is no clip.
  """

  spec: Spec
  place: shards.Place
  survey: manifest.Survey
  own: range
  num_parts: int
  workers: int
  strict: bool


def plan(
  job: Job, folder: epath.Path, part: int, bar: tqdm.tqdm
) -> dict[str, Any]:
  """Decide a part's files of records: once, for some may be written then.

  Returns:
    rejected: fields of `parts.Rejected`, what is left out.
    tasks: the files of records, in order; of each the split's label, the draw
      of its first file, and pairs of the fields of a `parts.File` and of its
      `probe.Clip`.
  """
  path = part_file(job.place, part, "plan.json")
  if path.exists():
    return json.loads(path.read_text())
  files, rejected = parts.gather(
    folder, part, not os.path.exists(job.spec.videos)
  )
  check_strict(job, rejected)
  probes = _probe_files(job, part, files, bar)
  pairs = []
  for file in files:
    found = probes[file.key]
    if isinstance(found, probe.Clip):
      pairs.append((file, found))
    else:
      rejected.append(parts.reject(file, found))
  check_strict(job, rejected)  # of an earlier run that was not strict
  found = {"rejected": rejected, "tasks": _tasks(job, pairs)}
  writing.write(path, strict_json.dumps(found, default=dataclasses.asdict))
  return json.loads(path.read_text())


def part_file(place: shards.Place, part: int, suffix: str) -> epath.Path:
  """Give a part's file of a kind."""
  return place.work / f"part-{part:05d}.{suffix}"


def check_strict(job: Job, rejected: Sequence[parts.Rejected]) -> None:
  """Raise a ValueError for the first that is left out, if the job is strict."""
  if job.strict and rejected:
    first = rejected[0]
    line = f", line {first.line} of the captions," if first.line else ""
    raise ValueError(
      f"{escapes.escape(first.file)}{line} is left out: {first.reason}, "
      f"{escapes.escape(first.detail)}; mend it, or remove {job.place.work} "
      "and build without --strict"
    )


def _probe_files(
  job: Job, part: int, files: Sequence[parts.File], bar: tqdm.tqdm
) -> dict[str, probe.Clip | probe.Reject]:
  """Probe files, but those that a run which was broken off has; by key."""
  journal = part_file(job.place, part, "probes.jsonl")
  known = _read_journal(journal)
  results, left = {}, []
  for file in files:
    stamp, found = known.get(file.key, (None, None))
    if found is None or stamp != _stamp(file.path):
      left.append(file)
    else:
      results[file.key] = found
  bar.update(len(results))
  function = functools.partial(_probe, spec=job.spec)
  with journal.open("a") as out:
    for file, found in pool.each(function, left, job.workers):
      found = found or probe.Reject(probe.Reason.CRASHED, "its process died")
      if isinstance(found, probe.Reject):
        check_strict(job, [parts.reject(file, found)])
      line = {"key": file.key, "stamp": _stamp(file.path)}
      line[type(found).__name__] = dataclasses.asdict(found)
      out.write(strict_json.dumps(line) + "\n")
      out.flush()
      results[file.key] = found
      bar.update()
  return results


def _probe(file: parts.File, spec: Spec) -> probe.Clip | probe.Reject:
  # What is cut needn't fit into a record.
  most = probe.MOST_BYTES if spec.length is None else sys.maxsize
  found = probe.probe(file.path, spec.min_frames, most)
  if spec.length and isinstance(found, probe.Clip) and found.fps:
    if not cuts.count(found, spec.length):
      detail = f"{found.num_frames} frames, {found.seconds:.2f} s: no clip"
      return probe.Reject(probe.Reason.SHORT, detail)
  return found


def _read_journal(
  path: epath.Path,
) -> dict[str, tuple[Any, probe.Clip | probe.Reject]]:
  """Read stamps and results by key; mend a line that was broken off."""
  if not path.exists():
    return {}
  lines = path.read_text().splitlines(keepends=True)
  whole = [line for line in lines if line.endswith("\n")]
  if whole != lines:
    writing.write(path, "".join(whole))
  found = {}
  for fields in map(json.loads, whole):
    if "Clip" in fields:
      result = probe.Clip(**fields["Clip"])
    else:
      reason, detail = fields["Reject"]["reason"], fields["Reject"]["detail"]
      result = probe.Reject(probe.Reason(reason), detail)
    found[fields["key"]] = fields["stamp"], result
  return found


def _stamp(path: str) -> list[int] | None:
  """Give what changes when a file does; None if there is none."""
  try:
    status = os.stat(path)
  except OSError:
    return None
  return [status.st_size, status.st_mtime_ns]


def _tasks(job: Job, pairs: list) -> list[dict[str, Any]]:
  """Divide files into those of records: by label, and by size."""
  share, num_rows = job.spec.validation, job.survey.num_rows
  draws = {file.key: manifest.draw(file.key) for file, _ in pairs}
  labels = {k: splits.label(d, share, num_rows) for k, d in draws.items()}
  decided = all(map(splits.is_decided, labels.values()))
  if decided:  # else neighbours alone, for the order is to stay
    pairs = sorted(pairs, key=lambda pair: labels[pair[0].key])

  def kind(pair) -> tuple[str, str]:
    key = pair[0].key
    return labels[key], "" if splits.is_decided(labels[key]) else key

  return [
    {"split": label, "draw": draws[files[0][0].key], "files": files}
    for (label, _), group in itertools.groupby(pairs, kind)
    for files in _shares(list(group), job.spec)
  ]


def _shares(pairs: list, spec: Spec) -> list[list]:
  """Divide files into the files of records that they are written to."""
  shares, num_bytes, seconds = [], 0, 0.0
  for file, clip in pairs:
    full = num_bytes >= _SHARD or (spec.length and seconds >= _CUT)
    if full or not shares:
      shares.append([])
      num_bytes, seconds = 0, 0.0
    shares[-1].append((file, clip))
    num_bytes += clip.num_bytes
    seconds += clip.seconds
  return shares
