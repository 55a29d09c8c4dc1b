"""A run that is taken up again: what may have changed since, and its record.

  config of the workdir, config as given --changes--> logged, or refused

What may change is decided by what would make the result wrong: the checkpoint
is of certain parameters, trained for an objective on certain data. How fast
they learn, on how many devices and what is looked at meanwhile is free: the
schedule, the plan of batches and the noise are functions of the step, and go
on from it as if they had always been so. `history.json` of the workdir keeps
each start with what changed and with what the run stood on; `config.json` is
that of the newest.
"""

import dataclasses
import datetime
import fnmatch
import json
import os
from collections.abc import Mapping
from typing import Any

import flax.traverse_util
import jax
import ml_collections
from etils import epath

from vdit_jax import checkpoint, schema, strict_json, writing
from vdit_jax.schema import Field
from vdit_jax.weights import run_config

FILE = "history.json"  # of the workdir

_NONE = "absent"
_STARTS = Field(list, each=Field(dict))
_STANDS_ON = Field(dict, each=Field(str))


@dataclasses.dataclass(frozen=True)
class Rule:
  """Whether fields may change when a run is taken up again.

  Attributes:
    fields: patterns of dotted names, in which * stands for anything.
    may_change: whether they may.
    why: they may, or what would be wrong.
    named_by: a field that names what these only point to; they may change
      while it is there and stays.
  """

  fields: tuple[str, ...]
  may_change: bool
  why: str
  named_by: str = ""


_PLACES = Rule(
  ("data.data_dir", "autoencoder_workdir", "*_encoder_dir"),
  True,
  "where it lies; it is compared by its content",
)
_BEGUN = Rule(
  ("init_from",),
  False,
  "a run begins once; the same released weights may lie elsewhere",
  named_by="init_fingerprint",
)

# The first that fits a field counts.
RULES = (
  Rule(
    ("*.kernel", "*.context", "*.remat", "*.unroll", "*.dtype", "*.base_dtype"),
    True,
    "how it is computed, not what",
  ),
  Rule(
    ("mesh.*", "accumulate", "steps_a_call", "data.workers", "data.threads"),
    True,
    "where, and in which parts",
  ),
  Rule(
    ("optim.*", "guard.*"),
    True,
    "a schedule is a function of the step, the state's arrays are the same",
  ),
  Rule(
    ("batch_size", "data.buckets.*", "data.shape", "data.crop", "data.flip"),
    True,
    "the plan goes on at the same step",
  ),
  Rule(
    ("log_every", "checkpoint.*", "profile.*", "data.max_unreadable"),
    True,
    "what is written down, and when",
  ),
  Rule(
    ("validation.*", "samples.*", "sampling.*"),
    True,
    "what is looked at; no update sees it",
  ),
  _PLACES,
  _BEGUN,
  Rule(("lora.init_from",), False, "a run begins once"),
  Rule(("seed",), False, "it decides every batch and every random number"),
  Rule(("ema_decay",), False, "the average would be of two decays"),
  Rule(("data.*",), False, "the records and what is said of them: other data"),
  Rule(
    ("task", "objective.*", "l2_weight", "kl_weight", "image.*", "given.*"),
    False,
    "the loss: weights of another one",
  ),
  Rule(("*",), False, "the networks: their parameters, or what they compute"),
)


def changes(
  old: Mapping[str, Any], new: Mapping[str, Any], where: str
) -> dict[str, tuple[Any, Any]]:
  """Say what differs between two configs of a run: field -> (old, new).

  Args:
    old: of the checkpoint, as plain dicts.
    new: as given, completed.
    where: the subject of the error.

  Raises:
    ValueError: if what must stay differs; names fields, values and reasons.
  """
  old, new = _dotted(old), _dotted(new)
  found = {
    name: (old.get(name, _NONE), new.get(name, _NONE))
    for name in sorted(old.keys() | new.keys())
    if (name in old, old.get(name)) != (name in new, new.get(name))
  }
  fixed = [name for name in found if not _may_change(name, old, new)]
  if fixed:
    rows = [
      f"{name}: {_told(found[name], '{} there, {} given')} "
      f"({rule_of(name).why})"
      for name in fixed
    ]
    raise ValueError(
      f"{where} has a checkpoint of a run with another config:\n  "
      + "\n  ".join(rows)
      + "\n  use another workdir, or the values that are there"
    )
  return found


def rule_of(name: str) -> Rule:
  """Find the rule of a field, by its dotted name."""
  fits = lambda rule: any(fnmatch.fnmatchcase(name, p) for p in rule.fields)
  return next(filter(fits, RULES))


def table() -> str:
  """Write the rules in Markdown, as docs/training.md has them."""
  lines = ["| field | may change | why |", "|---|---|---|"]
  for rule in RULES:
    fields = ", ".join(f"`{name}`" for name in rule.fields)
    fields = "all others" if rule.fields == ("*",) else fields
    may = "yes" if rule.may_change else "no"
    lines.append(f"| {fields} | {may} | {rule.why} |")
  return "\n".join(lines)


def check(
  workdir: epath.PathLike,
  config: ml_collections.ConfigDict,
  stands_on: Mapping[str, str],
) -> dict[str, tuple[Any, Any]]:
  """Say what changes in a run that is taken up again; nothing in a new one.

  Args:
    workdir: of the run, which may have begun.
    config: of this start, completed.
    stands_on: what the run's data and frozen weights are, by their content.

  Raises:
    ValueError: if something must not change.
  """
  if not checkpoint.has_begun(workdir):
    return {}
  old, new = run_config.read(workdir).to_dict(), config.to_dict()
  found = changes(old, new, f"workdir {workdir}")
  starts = _read(workdir)
  before = starts[-1].get("stands_on", {}) if starts else {}
  other = [
    f"{name}: {before[name]} there, {now} now"
    for name, now in stands_on.items()
    if before.get(name, now) != now
  ]
  if other:
    raise ValueError(
      f"workdir {workdir} has a checkpoint of a run that stood on other "
      "data or weights:\n  "
      + "\n  ".join(other)
      + "\n  put back what it had, or begin in another workdir with init_from="
      f"{workdir}"
    )
  return found


def flat(config: ml_collections.ConfigDict) -> dict[str, str]:
  """Write down a config's fields, but for those that say where things lie.

  Args:
    config: completed.
  """
  fields = _dotted(config.to_dict()).items()
  return {
    f"config.{name}": json.dumps(value)
    for name, value in fields
    if rule_of(name) not in (_PLACES, _BEGUN)
  }


def lines(changed: Mapping[str, tuple[Any, Any]], step: int) -> list[str]:
  """Say what changes from a step on, a line a field."""
  return [
    f"from step {step} on, {name}: {_told(values, '{} -> {}')} "
    f"({rule_of(name).why})"
    for name, values in changed.items()
  ]


def write(
  workdir: epath.PathLike,
  step: int,
  changed: Mapping[str, tuple[Any, Any]],
  stands_on: Mapping[str, str],
  code: str,
) -> None:
  """Add a start to a workdir's record; process 0 alone does.

  Args:
    workdir: of the run.
    step: that it goes on from; 0 begins the record anew.
    changed: see `changes`.
    stands_on: see `check`.
    code: that runs.
  """
  if jax.process_index() > 0:
    return
  now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
  start = {
    "step": step,
    "time": now,
    "code": code,
    "changed": changed,
    "stands_on": stands_on,
  }
  starts = [*(_read(workdir) if step else ()), start]
  text = strict_json.dumps(starts, indent=2) + "\n"
  writing.write(epath.Path(workdir) / FILE, text)


def _read(workdir: epath.PathLike) -> list[dict[str, Any]]:
  path = epath.Path(workdir) / FILE
  try:
    starts = json.loads(path.read_text()) if path.exists() else []
    schema.check(os.fspath(path), {"starts": starts}, {"starts": _STARTS})
    for start in starts:
      schema.check(os.fspath(path), start, {"stands_on": _STANDS_ON})
  except ValueError as error:
    raise ValueError(
      f"{path} is not the record of a run's starts ({error}); put it aside"
    ) from error
  return starts


def _dotted(config: Mapping[str, Any]) -> dict[str, Any]:
  """Name all fields; as JSON has them, in which tuples are lists."""
  plain = json.loads(strict_json.dumps(config))
  return flax.traverse_util.flatten_dict(plain, sep=".")


def _may_change(name: str, old, new) -> bool:
  rule = rule_of(name)
  named = rule.named_by and old.get(rule.named_by)
  return rule.may_change or bool(named and named == new.get(rule.named_by))


def _told(values: tuple[Any, Any], text: str) -> str:
  return text.format(*map(schema.quote, values))
