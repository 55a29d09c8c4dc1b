"""Build a dataset of captioned video files, on one machine or many.

  rows --parts.spool--> WORK/rows-*/ --probe--> part-*.probes.jsonl
       --> part-*.plan.json --> train.* validation.* --> part-*.json
       --join--> DATA/NAME/1.0.0

What is built, of what, and by which flags is said by `vdit_jax.data.build`'s
command, in `__main__`.
"""

import collections
import dataclasses
import itertools
import json
import math
import os
from collections.abc import Iterator, Sequence
from typing import Any

import tqdm
from absl import logging
from etils import epath

from vdit_jax import strict_json, writing
from vdit_jax.data import index, shards
from vdit_jax.data.build import (
  clip_records,
  jobs,
  layouts,
  manifest,
  parts,
  pool,
  probe,
  splits,
  tables,
)

Split = tuple[list[shards.Shard], index.Index]

REJECTED = "rejected.jsonl"

_SPEC = "build.json"
_FORM = 2  # of the files in the work folder


def build(
  spec: jobs.Spec,
  data_dir: epath.PathLike,
  name: str,
  *,
  shard: int = 0,
  strict: bool = False,
  workers: int | None = None,
) -> None:
  """Build a dataset, or one machine's share of it; go on where it was.

  Args:
    spec: what it is made of.
    data_dir: TFDS data directory, local.
    name: of the dataset, NAME or NAME/CONFIG.
    shard: whose share, of spec.num_shards. Where there are several, `join`
      makes the dataset when all are done.
    strict: raise a ValueError at the first file or line that is left out.
    workers: processes; None is one for each core, 0 works in this one.
  """
  place = _place(data_dir, name)
  if not 0 <= shard < spec.num_shards:
    raise ValueError(
      f"shard must be 0..{spec.num_shards - 1} of {spec.num_shards}, got "
      f"{shard}; count from 0"
    )
  layout = _open(spec)
  survey = manifest.survey(layout)
  described = describe(spec, survey)
  if place.is_finished():
    _check_same(place, place.target / "metadata.json", described)
    shards.clear(place)
    logging.info("already there: %s", place.target)
    return
  place.work.mkdir(parents=True, exist_ok=True)
  _check_same(place, place.work / _SPEC, described)
  written = {"made_from": described, "form": _FORM}
  writing.write(place.work / _SPEC, strict_json.dumps(written))
  num_parts = described["num_parts"]
  job = jobs.Job(
    spec=spec,
    place=place,
    survey=survey,
    own=parts.of_shard(num_parts, shard, spec.num_shards),
    num_parts=num_parts,
    workers=_cores() if workers is None else workers,
    strict=strict,
  )
  rows = manifest.rows(layout, survey.scores)
  _build_parts(job, shard, itertools.chain(manifest.scan(layout), rows))
  if spec.num_shards == 1:
    join(data_dir, name)


def join(data_dir: epath.PathLike, name: str) -> None:
  """Make the dataset of what all machines have built; refuse if one is not.

  Args:
    data_dir, name: see `build`.
  """
  place = _place(data_dir, name)
  if place.is_finished():
    shards.clear(place)
    logging.info("already there: %s", place.target)
    return
  if not (place.work / _SPEC).exists():
    raise ValueError(f"name={name!r} has not been built in {data_dir}; do that")
  begun = json.loads((place.work / _SPEC).read_text())
  _check_form(place, begun)
  made_from = begun["made_from"]
  written = [_done(place, part) for part in range(made_from["num_parts"])]
  _check_done(written, made_from)
  share = made_from["validation"]
  found = _load_splits(place, written, share)
  reasons = collections.Counter()
  for part in written:
    reasons.update(part["reasons"])
  _check_splits(found, reasons, place)
  with writing.opened(place.target / REJECTED) as listed:
    for part in range(len(written)):
      listed.write(jobs.part_file(place, part, REJECTED).read_bytes())
  shards.finish(
    place,
    clip_records.features(made_from["scores"]),
    {split: own for split, own in found.items() if len(own[1])},
    {
      "scores": made_from["scores"],
      "left_out": dict(reasons),
      "validation_share": _share(found),
      "made_from": made_from,
    },
    "Captioned clips of video files.",
  )
  _report(place.target, found, reasons, share)


def describe(spec: jobs.Spec, survey: manifest.Survey) -> dict[str, Any]:
  """Say what a dataset is made of, for its metadata."""
  rows = math.ceil(survey.num_rows / parts.FILES)
  return dataclasses.asdict(spec) | {
    "captions_digest": survey.digest,
    "scores": list(survey.scores),
    "num_parts": max(rows, spec.num_shards),
  }


def _place(data_dir: epath.PathLike, name: str) -> shards.Place:
  if "://" in os.fspath(data_dir):
    raise ValueError(
      f"data_dir must be a local folder, got {data_dir}; build locally and "
      "copy it with gcloud storage cp -r"
    )
  return shards.place(data_dir, name)


def _open(spec: jobs.Spec) -> layouts.Layout:
  """Find the clips and their captions."""
  for name in ("videos", "captions"):
    if "://" in getattr(spec, name):
      raise ValueError(
        f"{name} must be local, got {getattr(spec, name)}; mount the bucket "
        "with gcsfuse, or copy it here"
      )
  layout = layouts.find(spec.videos, spec.captions)
  for said in layout.captions:
    where = said.path if isinstance(said, tables.Table) else "texts of clips"
    logging.info("captions: %s", where)
  return layout


def _cores() -> int:
  return len(os.sched_getaffinity(0))


def _check_same(
  place: shards.Place, path: epath.Path, described: dict[str, Any]
) -> None:
  """Refuse to go on with what was begun otherwise."""
  if not path.exists() and not place.is_finished():
    return
  found = json.loads(path.read_text()) if path.exists() else {}
  if path.name == _SPEC:
    _check_form(place, found)
  found = found.get("made_from", {})
  for what, wanted in json.loads(strict_json.dumps(described)).items():
    if what not in found or found[what] != wanted:
      raise ValueError(
        f"{path.parent} was made with {what}={found.get(what)!r}, not "
        f"{wanted!r}; remove it or give another --name"
      )


def _check_form(place: shards.Place, begun: dict[str, Any]) -> None:
  if begun.get("form") != _FORM:
    raise ValueError(
      f"{place.work} was begun by another version; remove it, or go on with "
      "that one"
    )


def _build_parts(
  job: jobs.Job, shard: int, rows: Iterator[manifest.Row]
) -> None:
  """Build a machine's parts, one after another."""
  folder = job.place.work / f"rows-{shard:05d}-of-{job.spec.num_shards:05d}"
  total = parts.spool(rows, folder, job.own, job.num_parts)
  name, lines = f"{job.place.dataset}/{job.place.config}", 0
  with (
    tqdm.tqdm(total=total, unit="files", desc=f"{name}: probe") as probed,
    tqdm.tqdm(total=total, unit="files", desc=f"{name}: write") as written,
  ):
    for part in job.own:
      done = _done(job.place, part)
      if not done:
        plan = jobs.plan(job, folder, part, probed)
        done = _write_part(job, part, plan, written)
      lines += done["lines"]
      for bar in (probed, written):
        bar.update(lines - bar.n)


def _done(place: shards.Place, part: int) -> dict[str, Any] | None:
  path = jobs.part_file(place, part, "json")
  return json.loads(path.read_text()) if path.exists() else None


def _write_part(
  job: jobs.Job, part: int, plan: dict[str, Any], bar: tqdm.tqdm
) -> dict[str, Any]:
  """Write a part's files of records, then what it has."""
  names = [
    f"{task['split']}-{part:05d}-{i:05d}"
    for i, task in enumerate(plan["tasks"])
  ]
  tasks = [
    clip_records.Task(
      job.place.work / name,
      job.survey.scores,
      job.spec.length,
      _pairs(task["files"]),
    )
    for name, task in zip(names, plan["tasks"], strict=True)
  ]
  for task, is_done in pool.each(clip_records.write, tasks, job.workers):
    if not is_done:
      raise RuntimeError(
        f"a process died while it wrote {task.path}; give fewer --workers if "
        "memory is short, or find the file with --workers=0"
      )
    bar.update(len(task.files))
  rejected, count = plan["rejected"], sum(len(task.files) for task in tasks)
  lines = count + sum(found["line"] > 0 for found in rejected)
  for task in tasks:
    rejected += shards.read(task.path).note["rejected"]
  jobs.check_strict(job, [parts.Rejected(**fields) for fields in rejected])
  listed = "".join(strict_json.dumps(found) + "\n" for found in rejected)
  writing.write(jobs.part_file(job.place, part, REJECTED), listed)
  reasons = collections.Counter(found["reason"] for found in rejected)
  labels = [(task["split"], task["draw"]) for task in plan["tasks"]]
  names = [(name, *of) for name, of in zip(names, labels, strict=True)]
  done = {"shards": names, "reasons": reasons, "lines": lines}
  writing.write(
    jobs.part_file(job.place, part, "json"), strict_json.dumps(done)
  )
  return done


def _pairs(share: list) -> list[tuple[parts.File, probe.Clip]]:
  return [(parts.make_file(a), probe.Clip(**b)) for a, b in share]


def _check_done(written: Sequence[Any], made_from: dict[str, Any]) -> None:
  """Refuse to join while a machine has not built all of its parts."""
  lacking, num_shards = [], made_from["num_shards"]
  for shard in range(num_shards):
    own = parts.of_shard(len(written), shard, num_shards)
    if not all(written[part] for part in own):
      lacking.append(f"--shard={shard}/{num_shards}")
  if lacking:
    raise ValueError(
      f"not built yet: {', '.join(lacking)}; run those again, or copy what "
      "they wrote to this data_dir"
    )


def _load_splits(
  place: shards.Place, written: Sequence[dict[str, Any]], share: float
) -> dict[str, Split]:
  """Give each split's files that have records, and its index."""
  groups = [
    splits.Group(shards.read(place.work / name), label, draw)
    for part in written
    for name, label, draw in part["shards"]
  ]
  found = splits.divide(groups, share)
  return {split: (own, shards.read_index(own)) for split, own in found.items()}


def _share(found: dict[str, Split]) -> float:
  """Give the share of the clips that are for validation."""
  counts = [len(found[split][1]) for split in splits.SPLITS]
  return counts[1] / max(sum(counts), 1)


def _check_splits(
  found: dict[str, Split], reasons: collections.Counter, place: shards.Place
) -> None:
  keys = collections.Counter()
  for _, known in found.values():
    keys.update(known.keys.tolist())
  if not keys:
    raise ValueError(
      f"no clip is left of videos, {_listed(reasons)}; see "
      f"{place.work}/*.{REJECTED}"
    )
  key, count = keys.most_common(1)[0]
  if count > 1:
    raise ValueError(
      f"key {key!r} is that of {count} clips: a file is named as a clip of "
      "another; rename it"
    )


def _report(
  target: epath.Path,
  found: dict[str, Split],
  reasons: collections.Counter,
  share: float,
) -> None:
  for split, (own, known) in found.items():
    size = sum(shard.num_bytes for shard in own) / 2**20
    logging.info("%s: %d clips, %.1f MiB", split, len(known), size)
    if not len(known):
      logging.warning("no %s split: no clip is in it", split)
  logging.info(
    "validation has %.3g of the clips, for --validation=%.3g: all clips of a "
    "file are in one split",
    _share(found),
    share,
  )
  if reasons:
    logging.warning("%s; see %s", _listed(reasons), target / REJECTED)
  logging.info("written: %s", target)


def _listed(reasons: collections.Counter) -> str:
  counts = [f"{count} {reason}" for reason, count in reasons.most_common()]
  return f"{reasons.total()} left out: {', '.join(counts) or 'none'}"


def _shard(text: str) -> tuple[int, int]:
  shard, slash, num_shards = text.partition("/")
  if not (shard.isdecimal() and slash and num_shards.isdecimal()):
    raise ValueError(f"shard must be I/N, got {text!r}; try 0/1")
  return int(shard), int(num_shards)
