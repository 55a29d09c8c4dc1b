"""Whatever is given to a command, it ends soon, in one line, and loses nothing.

Hundreds of bad inputs (tests/fuzz/cases.py), each in a process of its own. The
first of every entry point and kind are run by default, the rest by the slow
tests, which print the counts.
"""

import collections
import hashlib
import os
import pathlib
import re
import xml.etree.ElementTree

import pytest

from tests.fuzz import cases, forks
from vdit_jax import cli
from vdit_jax.data import moving_digits
from vdit_jax.weights import tiny

LIMIT, SOON, MIB = 20.0, 2.0, 1024  # seconds, and of memory
A_KIND = 2  # cases of an entry point and a kind that the default run tries
# What absl, Orbax and XLA log, and warnings; not what a command says itself.
_LOG = re.compile(r"^(\x1b|[IWE]\d{4} |WARNING|\s*warnings\.warn|.*Warning: )")


@pytest.fixture(scope="module")
def given(tmp_path_factory):
  folder = tmp_path_factory.mktemp("given")
  tiny.write(folder / "pipe", "2b")
  moving_digits.MovingDigits(
    config="tiny", data_dir=folder / "data", file_format="array_record"
  ).download_and_prepare()
  return cases.Given(folder / "pipe", folder / "data")


@pytest.fixture(scope="module")
def runner():
  found = forks.Forks()
  yield found
  found.close()


@pytest.fixture(scope="module")
def every(given, runner, tmp_path_factory):
  """All cases."""
  folder = tmp_path_factory.mktemp("flags")
  types = {name: _types(runner, name, folder) for name in cli.COMMANDS}
  return cases.cases(given, types)


def _types(runner, command, folder) -> dict[str, str]:
  """Types of a command's own flags, by name."""
  module = cli.COMMANDS[command].module
  ended = runner.run(module, ["--helpxml"], folder, LIMIT)
  text = ended.stderr[ended.stderr.index("<?xml") :]
  text = text[: text.index("</AllFlags>") + len("</AllFlags>")]
  found = {}
  for flag in xml.etree.ElementTree.fromstring(text).iter("flag"):
    get = lambda name, flag=flag: flag.findtext(name) or ""
    kind = "enum" if get("enum_value") else get("type").split()[-1:] or [""]
    kind = kind if isinstance(kind, str) else kind[0]
    if "absl" not in get("file") and "config" not in get("name"):
      found[get("name")] = kind
  return found


def _first(every):
  """Some of each entry point and kind, and the rest."""
  seen, first, rest = collections.Counter(), [], []
  for case in every:
    seen[case.entry, case.kind] += 1
    few = seen[case.entry, case.kind] <= A_KIND
    (first if few else rest).append(case)
  return first, rest


def _state(folder: pathlib.Path) -> dict[str, str]:
  """What lies in a folder: kinds and contents by path."""
  found = {}
  for path in sorted(folder.rglob("*")):
    name = str(path.relative_to(folder))
    if path.is_file():
      found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
    else:
      found[name] = "folder" if path.is_dir() else "other"
  return found


def _complaint(case, ended, before, after) -> str:
  """What is wrong with how a command ended; empty if nothing."""
  said = [x for x in ended.stderr.splitlines() if x and not _LOG.match(x)]
  if ended.seconds > LIMIT:
    return "hangs"
  if "Traceback" in ended.stderr or ended.status < 0:
    return "traceback"
  if ended.status != 2:
    return f"not refused, status {ended.status}"
  if not said or len(said[-1]) > 2000:
    return "says nothing, or too much"
  if before != after:
    return f"leaves {sorted(set(before.items()) ^ set(after.items()))[:3]}"
  if ended.seconds > SOON:
    return f"over {SOON} seconds: {ended.seconds:.1f}"
  return f"over {MIB} MiB: {ended.mib:.0f}" if ended.mib > MIB else ""


def _try(runner, tried, folder) -> tuple[list[str], collections.Counter]:
  wrong, counts = [], collections.Counter()
  for i, case in enumerate(tried):
    place = folder / str(i)
    place.mkdir()
    case.make(place)
    before = _state(place)
    module = cli.COMMANDS[case.entry].module
    ended = runner.run(module, list(case.argv), place, LIMIT + 1)
    found = _complaint(case, ended, before, _state(place))
    counts[case.entry, found.split(":")[0].split(",")[0] or "refused"] += 1
    if found:
      last = (ended.stderr.strip().splitlines() or [""])[-1][:300]
      wrong.append(f"{case.entry} {case.kind} {case.name}: {found}: {last}")
  return wrong, counts


def test_the_first_of_each_kind_are_refused(every, runner, tmp_path):
  first, _ = _first(every)
  wrong, _ = _try(runner, first, tmp_path)
  assert wrong == []


@pytest.mark.slow
def test_all_are_refused(every, runner, tmp_path, capsys):
  assert len(every) >= 300
  wrong, counts = _try(runner, every, tmp_path)
  with capsys.disabled():
    print()
    for (entry, what), count in sorted(counts.items()):
      print(f"{entry:10} {what:30} {count}")
  assert wrong == [], "\n".join(wrong)


@pytest.mark.slow
def test_what_is_good_is_not_refused(given, runner, tmp_path):
  """Or the cases would be refused for what is good in them."""
  for name in ("digits", "tiny", "convert"):
    entry = cases.entries(given)[name]
    argv = [f"--{n}={v}" for n, v in entry.argv.items()]
    argv += entry.positional
    place = tmp_path / name
    place.mkdir()
    module = cli.COMMANDS[name].module
    ended = runner.run(module, argv, place, 6 * LIMIT)
    assert ended.status == 0, ended.stderr
    assert os.listdir(place / "out")
