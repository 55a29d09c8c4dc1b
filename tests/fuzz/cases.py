"""Bad inputs, by entry point and kind: seeded, and made one by one.

A case is a command line and what lies in the folder where it is run. Kinds:

  flag     a value that a flag cannot have, misspelt, missing or too much
  output   a path that nothing could be written to
  input    a path with nothing, a folder, a pipe, noise or half a file
  field    a config's field with a value that it cannot have
  folder   a released folder of which one file or field is bad
  table    prompts, captions, pictures that are none
"""

import dataclasses
import json
import os
import pathlib
import random
import shutil
from collections.abc import Callable, Iterator
from typing import Any

from configs import digits

ROOT = pathlib.Path(__file__).resolve().parents[2]
DIGITS = ROOT / "configs" / "digits.py"

Make = Callable[[pathlib.Path], None]


@dataclasses.dataclass(frozen=True)
class Given:
  """Good inputs that cases begin from: a released folder, and a dataset."""

  pipe: pathlib.Path
  data_dir: pathlib.Path


@dataclasses.dataclass(frozen=True)
class Case:
  """A bad input.

  Attributes:
    entry: command of `vdit_jax.cli`.
    kind: of the list above.
    name: what is bad.
    argv: of the command.
    make: puts what the case needs into the folder where it is run.
  """

  entry: str
  kind: str
  name: str
  argv: tuple[str, ...]
  make: Make = lambda folder: None


@dataclasses.dataclass(frozen=True)
class Entry:
  """A command line that would go well, and which of its flags are paths."""

  argv: dict[str, str]
  outputs: tuple[str, ...] = ()
  inputs: tuple[str, ...] = ()
  positional: tuple[str, ...] = ()


def entries(given: Given) -> dict[str, Entry]:
  """Command lines by command."""
  data = {"data": "moving_digits/tiny", "data_dir": str(given.data_dir)}
  config = {"config.data.name": data["data"]}
  config |= {"config.data.data_dir": data["data_dir"]}
  return {
    "sample": Entry(
      {"prompt": "a red seven moving left", "out": "out/a.mp4", "steps": "1"},
      outputs=("out",),
      inputs=("checkpoint", "image", "prompts_file", "lora"),
    ),
    "train": Entry(
      {"config": f"{DIGITS}:vae", "workdir": "out/run", **config},
      outputs=("workdir",),
      inputs=("config", "config.data.data_dir"),
    ),
    "evaluate": Entry(
      {**data, "json": "out/m.json", "metrics": "vae", "num_clips": "2"},
      outputs=("json",),
      inputs=("checkpoint", "data_dir", "prompts"),
    ),
    "cache": Entry(
      {"autoencoder": f"{given.pipe}/vae", "name": "latents/x", **data},
      inputs=("autoencoder", "data_dir", "text_encoder"),
    ),
    "convert": Entry({}, positional=(f"{given.pipe}/vae", "out/c")),
    "compare": Entry(
      {"checkpoint": str(given.pipe), "prompt": "x", "json": "out/c.json"},
      outputs=("json",),
      inputs=("checkpoint", "image"),
    ),
    "export": Entry(
      {"checkpoint": "run", "out": "out/e"},
      outputs=("out",),
      inputs=("checkpoint",),
    ),
    "aot": Entry(
      {"config": f"{DIGITS}:vae", "topology": "v5e:2x2", "json": "out/a.json"},
      outputs=("json",),
      inputs=("config",),
    ),
    "data": Entry(
      {"videos": "clips", "data_dir": "out", "name": "mine/clips"},
      outputs=("data_dir",),
      inputs=("videos", "captions"),
    ),
    "digits": Entry(
      {"config": "tiny", "data_dir": "out"}, outputs=("data_dir",)
    ),
    "tokenizer": Entry(
      {**data, "out": "out/t.model"}, outputs=("out",), inputs=("data_dir",)
    ),
    "tiny": Entry({}, positional=("out/pipe",)),
  }


def cases(
  given: Given, types: dict[str, dict[str, str]], seed: int = 0
) -> list[Case]:
  """Make every case, in an order that is random but always the same.

  Args:
    given: good inputs.
    types: of the flags, by command and name, as --helpxml has them.
    seed: of the order.
  """
  found = []
  for name, entry in entries(given).items():
    found += _flags(name, entry, types[name])
    found += _outputs(name, entry)
    found += _inputs(name, entry)
  found += [*_fields(given), *_folders(given), *_tables()]
  random.Random(seed).shuffle(found)
  return found


def _argv(entry: Entry, **changes: str | None) -> tuple[str, ...]:
  named = entry.argv | changes
  flags = [f"--{n}={v}" for n, v in named.items() if v is not None]
  return (*flags, *entry.positional)


def _flags(name: str, entry: Entry, types: dict[str, str]) -> Iterator[Case]:
  bad = {
    "int": ("x", "1.5", "1e3", ""),
    "float": ("x", "nan", "inf", ""),
    "bool": ("maybe", "2"),
    "enum": ("nonsense", ""),
  }
  for flag, kind in types.items():
    for value in bad.get(kind, ()):
      argv = _argv(entry, **{flag: value})
      yield Case(name, "flag", f"--{flag}={value!r}", argv)
  for flag in ("prompts_fil", "stepss", "zzz"):
    yield Case(name, "flag", f"--{flag}", (*_argv(entry), f"--{flag}=1"))
  yield Case(name, "flag", "an argument", (*_argv(entry), "more", "and more"))
  for flag in entry.argv:
    if flag in ("name", "data_dir", "out", "workdir", "json", "config"):
      if (name, flag) not in (("aot", "json"), ("compare", "json")):
        if (name, flag) != ("digits", "config"):
          yield Case(name, "flag", f"no {flag}", _argv(entry, **{flag: None}))
  for flag in ("height", "width", "num_frames", "steps", "batch_size"):
    if flag in types and name in ("sample", "compare"):
      for value in ("-1", "0", str(10**12)):
        argv = _argv(entry, **{flag: value})
        yield Case(name, "flag", f"--{flag}={value}", argv)


def _outputs(name: str, entry: Entry) -> Iterator[Case]:
  def make(folder: pathlib.Path) -> None:
    (folder / "file").write_text("mine")
    (folder / "full").mkdir()
    (folder / "full" / "mine").write_text("mine")
    os.mkfifo(folder / "pipe")

  paths = {
    "below a file": "file/a/b",
    "a pipe": "pipe",
    "a long name": "x" * 300,
    "no place": "/proc/self/a/b",
    "nothing": "",
  }
  if name in ("sample", "evaluate", "aot", "compare", "tokenizer"):
    paths["a folder"] = "full"
  else:
    paths["a file"] = "file"
  for said, path in paths.items():
    suffix = ".mp4" if (name, path[:1]) in (("sample", "/"),) else ""
    for flag in entry.outputs:
      argv = _argv(entry, **{flag: path + suffix})
      yield Case(name, "output", f"{flag}: {said}", argv, make)
    if entry.positional:
      argv = (*_argv(entry)[:-1], path)
      yield Case(name, "output", said, argv, make)


def _inputs(name: str, entry: Entry) -> Iterator[Case]:
  def make(folder: pathlib.Path) -> None:
    (folder / "noise").write_bytes(random.Random(1).randbytes(5000))
    (folder / "empty").write_bytes(b"")
    (folder / "folder").mkdir()
    (folder / "noises").mkdir()
    for file in ("config.json", "model_index.json", "tokenizer.model"):
      (folder / "noises" / file).write_bytes(random.Random(2).randbytes(999))
    os.mkfifo(folder / "pipe")

  for flag in entry.inputs:
    for path in ("absent", "noise", "empty", "folder", "noises", "pipe", "\n"):
      argv = _argv(entry, **{flag: path})
      yield Case(name, "input", f"{flag}: {path!r}", argv, make)


def _fields(given: Given) -> Iterator[Case]:
  base = entries(given)["train"]
  for arg in ("vae", "dit"):
    config = digits.get_config(arg)
    for path, value in _flat(config.to_dict()).items():
      if path == "seed":
        continue
      for bad in _bad(value):
        argv = _argv(base, config=f"{DIGITS}:{arg}")
        argv = (*argv, f"--config.{path}={bad}")
        yield Case("train", "field", f"{arg}: {path}={bad}", argv)
    for path in ("learning_rate", "optim.rate", "data.batch", "x.y.z"):
      argv = (*_argv(base, config=f"{DIGITS}:{arg}"), f"--config.{path}=1")
      yield Case("train", "field", f"{arg}: {path}", argv)


def _bad(value: Any) -> tuple[str, ...]:
  if isinstance(value, bool):
    return ("maybe",)
  if isinstance(value, int):
    return ("-5", "x")
  if isinstance(value, float):
    return ("nan", "-1e9")
  return ()


def _flat(config: dict[str, Any], above: str = "") -> dict[str, Any]:
  found = {}
  for name, value in config.items():
    path = f"{above}{name}"
    if isinstance(value, dict):
      found |= _flat(value, f"{path}.")
    else:
      found[path] = value
  return found


_DOCUMENTS = {
  "nothing": b"",
  "half": b'{"a": ',
  "a list": b"[1, 2]",
  "a number": b"7",
  "not UTF-8": b'{"a": "\xff"}',
  "nested": b"[" * 50_000,
}
_VALUES = (None, 0, -1, 10**9, 1.5, "x", [], {}, [[1]], True, float("nan"))


def _folders(given: Given) -> Iterator[Case]:
  argv = ("--checkpoint=pipe", "--prompt=x", "--out=out/a.mp4", "--steps=1")
  argv = (*argv, "--num_frames=9", "--height=32", "--width=32")
  files = sorted(p for p in given.pipe.rglob("*") if p.is_file())
  for file in files:
    path = file.relative_to(given.pipe)
    for said, data in _DOCUMENTS.items() if path.suffix == ".json" else ():
      yield _case(given, argv, path, said, data)
    if path.name.endswith(("config.json", "model_index.json")):
      yield from _values(given, argv, path)
    if path.suffix in (".safetensors", ".model"):
      data = file.read_bytes()
      for said, cut in (("empty", 0), ("cut", len(data) // 2), ("short", 7)):
        yield _case(given, argv, path, said, data[:cut])
      noise = random.Random(3).randbytes(len(data))
      yield _case(given, argv, path, "noise", noise)
    if path.name != "tokenizer_config.json":  # which nothing is read of
      yield _case(given, argv, path, "absent", None)


def _values(given: Given, argv, path: pathlib.Path) -> Iterator[Case]:
  """Each field with one bad value, another for each: there are many."""
  fields = json.loads((given.pipe / path).read_text())
  draw = random.Random(str(path))
  for name, value in fields.items():
    if name.startswith("_") and name != "_class_name":
      continue
    bad = draw.choice([v for v in _VALUES if _differs(v, value)])
    data = json.dumps(fields | {name: bad}).encode()
    yield _case(given, argv, path, f"{name}={bad!r}", data)


def _differs(bad: Any, value: Any) -> bool:
  """Whether a value is wrong for a field of another's kind."""
  if isinstance(value, float) and not isinstance(value, bool):
    return type(bad) not in (int, float) or bad != bad
  if value is None or isinstance(value, bool):
    return type(bad) in (list, dict, str)
  if isinstance(value, int):
    return type(bad) is not int or bad < 0 or bad == 10**9
  return type(bad) is not type(value)


def _case(given, argv, path: pathlib.Path, said: str, data) -> Case:
  def make(folder: pathlib.Path) -> None:
    target = folder / "pipe"
    shutil.copytree(given.pipe, target, copy_function=os.link)
    (target / path).unlink()
    if data is not None:
      (target / path).write_bytes(data)

  return Case("sample", "folder", f"{path}: {said}", argv, make)


def _tables() -> Iterator[Case]:
  prompts = {
    "nothing": b"",
    "blank lines": b"\n \n\n",
    "noise": random.Random(4).randbytes(300),
    "an object.json": b'{"a": 1}',
    "nested.json": b"[" * 50_000,
    "numbers.json": b"[1, 2]",
  }
  for said, data in prompts.items():
    name = said.replace(" ", "_")
    argv = (f"--prompts_file={name}", "--out=out/a.mp4", "--steps=1")
    yield Case("sample", "table", f"prompts: {said}", argv, _file(name, data))
  for said, data in {
    "nothing.png": b"",
    "noise.png": random.Random(5).randbytes(400),
    "half.png": b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR\0\0",
    "list.mp4": b"ffconcat version 1.0\nfile /etc/passwd\n",
  }.items():
    argv = (f"--image={said}", "--prompt=x", "--out=out/a.mp4", "--steps=1")
    yield Case("sample", "table", f"image: {said}", argv, _file(said, data))
  for said, data in {
    "nothing.jsonl": b"",
    "noise.jsonl": random.Random(6).randbytes(400),
    "utf16.jsonl": '{"file": "a.mp4", "caption": "x"}\n'.encode("utf-16-le"),
    "no_columns.csv": b"a,b\n1,2\n",
    "rows.txt": b"a.mp4 x\n",
  }.items():
    argv = ("--videos=.", f"--captions={said}", "--data_dir=out", "--name=m/c")
    yield Case("data", "table", f"captions: {said}", argv, _file(said, data))


def _file(name: str, data: bytes) -> Make:
  return lambda folder: (folder / name).write_bytes(data) and None
