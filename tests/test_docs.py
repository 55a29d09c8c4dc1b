"""What the documents say holds: commands, flags, fields, links, paths.

  *.md ──► blocks ──► commands ──► a module, its flags, its config's fields
  *.md ──► links, names in backticks ──► files, headings, modules

A block of bash or Python below `<!-- test -->` is run as printed, with those
above it in the same document, in a folder that has what a clone has; one below
`<!-- test: slow -->` where slow tests are.
"""

import ast
import configparser
import dataclasses
import functools
import importlib.util
import itertools
import os
import pathlib
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from unittest import mock

import pytest
from absl import flags
from ml_collections import config_flags

ROOT = pathlib.Path(__file__).resolve().parent.parent
DOCUMENTS = sorted(
  [
    *ROOT.glob("*.md"),
    *ROOT.glob("docs/*.md"),
    ROOT / "vdit_jax" / "packaged" / "README.md",
  ]
)
MOST_COLUMNS = 119
MOST_LINES = {"README.md": 150, "CHANGELOG.md": 10_000}
MOST_LINES_ELSEWHERE = 250
SECONDS = 600  # of one block

# What documents say already and the code will. Empty is best; what has come
# must go.
COMING: set[str] = set()

# A pipeline's folder in a config's argument, and the size that it stands for.
FOLDERS = {"CogVideoX-2b": "2b", "Wan2.1-T2V-1.3B": "1_3b"}

_OF_ABSL = {"help", "helpfull", "flagfile"}
_PLACES = "vdit_jax|tests|configs|benchmarks|docs|notebooks"
_PLACEHOLDER = r"(?:^|[./ ])[A-Z]+\b(?!\.md)"  # vdit_jax.COMMAND, models/NAME/


@dataclasses.dataclass(frozen=True)
class Block:
  """A fenced block: its language, its text, and the mark above it."""

  language: str
  text: str
  mark: str


@dataclasses.dataclass(frozen=True)
class Command:
  """A module that is run, and what it is told."""

  module: str
  arguments: tuple[str, ...]


def split(text: str) -> tuple[list[Block], str]:
  """Take the fenced blocks out of a document: the blocks, and the rest."""
  blocks, rest, mark = [], [], ""
  lines = iter(text.splitlines())
  for line in lines:
    if fence := re.fullmatch(r"( *)```(\w*)", line):
      inside = itertools.takewhile(lambda x: x.strip() != "```", lines)
      indent = len(fence[1])
      body = "".join(f"{x[indent:]}\n" for x in inside)
      blocks.append(Block(fence[2], body, mark))
    else:
      rest.append(line)
    if line.strip():
      found = re.fullmatch(r" *<!-- (test.*) -->", line)
      mark = found[1] if found else ""
  return blocks, "\n".join(rest)


def calls(script: str) -> Iterator[list[str]]:
  """Go through the simple commands of a script, nested ones too."""
  for line in script.replace("\\\n", " ").splitlines():
    words = shlex.shlex(line, posix=True, punctuation_chars=True)
    words.whitespace_split = True
    words = list(words)
    for is_end, call in itertools.groupby(words, lambda w: w[0] in "&|;()<>"):
      if not is_end:
        yield list(call)
    for word in words:
      if word.startswith("--command="):
        yield from calls(word.partition("=")[2])


def commands(script: str) -> Iterator[Command]:
  """Go through what a script runs of this repository."""
  for words in calls(script):
    while words and re.match(r"[A-Z_]+=", words[0]):
      words = words[1:]
    program, *rest = [*words, "", ""]
    rest = tuple(word for word in rest if word not in ("", "..."))
    if re.search(r"(^|/)python3?$", program) and rest:
      if rest[0] == "-m":
        yield Command(rest[1], rest[2:])
      else:
        yield Command(rest[0], rest[1:])
    elif program in ("vdit", "make") and rest:
      yield Command(f"{program} {rest[0]}", rest[1:])


def source(module: str) -> pathlib.Path | None:
  """Find the file that `python -m` runs; None if it has none."""
  path = ROOT / module.replace(".", "/")
  found = [path.with_suffix(".py"), path / "__main__.py"]
  return next((p for p in found if p.exists()), None)


def defined(text: str) -> set[str]:
  """Names of the flags that a source defines, in loops over names too."""
  loops, names = {}, set()
  nodes = list(ast.walk(ast.parse(text)))
  for node in nodes:
    if isinstance(node, ast.For | ast.comprehension):
      if isinstance(node.iter, ast.Tuple | ast.List):
        values = [getattr(value, "value", None) for value in node.iter.elts]
        loops.setdefault(getattr(node.target, "id", ""), set()).update(values)
  for node in nodes:
    called = getattr(getattr(node, "func", None), "attr", "")
    if called.startswith("DEFINE_"):
      name = node.args[0]
      names |= loops.get(getattr(name, "id", None), set())
      names |= {getattr(name, "value", None)}
    elif called == "define" and node.func.value.id == "config_flag":
      names.add("config")
  return names - {None}


@functools.cache
def helped(module: str) -> set[str]:
  """Names of the flags that a module lists when asked for help."""
  asked = [sys.executable, "-m", module, "--helpfull"]
  env = os.environ | {"PYTHONPATH": str(ROOT)}
  done = subprocess.run(
    asked, cwd=ROOT, env=env, capture_output=True, text=True, timeout=SECONDS
  )
  return set(re.findall(r"^ +--(?:\[no\])?(\w+):", done.stdout, re.MULTILINE))


def knows(module: str, name: str) -> bool:
  """Tell whether a module has a flag: by its source, or else by asking it."""
  path = source(module)
  for known in (name, name.removeprefix("no")):
    if known in defined(path.read_text()) | _OF_ABSL:
      return True
  return name in helped(module)


def of_script(name: str) -> str:
  """Module that is run by a script, or by a word behind `vdit`."""
  if name.startswith("vdit "):
    word = name.removeprefix("vdit ")
    if importlib.util.find_spec("vdit_jax.cli"):
      commands = importlib.import_module("vdit_jax.cli").COMMANDS
      return commands[word].module if word in commands else name
    return f"vdit_jax.{word}"
  if name.endswith(".py") and (ROOT / name).exists():
    short = f"vdit_jax.{name.removesuffix('.py')}"
    return short if source(short) else name.removesuffix(".py")
  return name


def of_command(command: Command) -> Iterator[str]:
  """Say what is wrong with a command."""
  if re.search(_PLACEHOLDER, command.module):
    return
  module = of_script(command.module)
  if module.startswith("make "):
    yield from of_target(module.removeprefix("make "))
  elif command.module.startswith("vdit ") and not (
    "vdit" in COMING or is_installed("vdit")
  ):
    yield "the package installs no vdit"
  elif module.partition(".")[0] in ("vdit_jax", "benchmarks"):
    yield from of_flags(module, command)
  elif module.startswith("vdit ") or module.endswith(".py"):
    yield f"there is no {module}"


def of_target(name: str) -> Iterator[str]:
  """Say so if the Makefile lacks a target."""
  makefile = (ROOT / "Makefile").read_text()
  if not re.search(rf"^{re.escape(name)}:", makefile, re.MULTILINE):
    yield f"the Makefile has no {name}"


def of_flags(module: str, command: Command) -> Iterator[str]:
  """Say which flags and fields of a command its module has not."""
  if source(module) is None:
    yield f"{module} is nothing to run"
    return
  words = [a for a in command.arguments if a.startswith("--")]
  if command.module.startswith("vdit "):  # which finds packaged configs
    named = re.compile(r"(?<=^--config=)(\w+)(?=:|$)")
    words = [named.sub(r"configs/\1.py", word) for word in words]
  fields = [a for a in words if re.match(r"--config[.=]", a)]
  names = [a[2:].partition("=")[0] for a in words if a not in fields]
  for name in [*names, *(["config"] if fields else [])]:
    if f"{module} --{name}" not in COMING and not knows(module, name):
      yield f"{module} has no flag {name}"
  if fields and "config_flag.define()" in source(module).read_text():
    yield from of_fields(fields)


def is_installed(script: str) -> bool:
  """Tell whether the package installs a console script."""
  files = [ROOT / "setup.cfg", ROOT / "pyproject.toml"]
  return any(
    re.search(rf"^ *{script} *=", file.read_text(), re.MULTILINE)
    for file in files
  )


def extras() -> set[str]:
  """Names of the package's extras."""
  setup = configparser.ConfigParser()
  setup.read(ROOT / "setup.cfg")
  project = tomllib.loads((ROOT / "pyproject.toml").read_text())
  ours = project.get("project", {}).get("optional-dependencies", {})
  name = "options.extras_require"
  return set(ours) | set(setup[name] if setup.has_section(name) else ())


def of_fields(fields: list[str]) -> Iterator[str]:
  """Say what is wrong with the fields of a config that are set."""
  for folder, size in FOLDERS.items():
    fields = [a.replace(f".py:{folder}", f".py:{size}") for a in fields]
  values = flags.FlagValues()
  config_flags.DEFINE_config_file("config", flag_values=values)
  argv = ["train.py", *fields]
  here = os.getcwd()
  os.chdir(ROOT)
  try:
    with mock.patch.object(sys, "argv", argv):
      values(argv)
      values.config.keys()  # fails where there is no such file
  except Exception as error:  # whatever a config or a field's type says
    yield f"{' '.join(fields)}: {error}"
  finally:
    os.chdir(here)


def of_python(text: str) -> Iterator[str]:
  """Say what of vdit_jax a block of Python imports that is not there."""
  for node in ast.walk(ast.parse(text)):
    if isinstance(node, ast.Import):
      names = [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom):
      names = [f"{node.module}.{alias.name}" for alias in node.names]
    else:
      continue
    yield from itertools.chain.from_iterable(map(of_name, names))


def of_name(name: str) -> Iterator[str]:
  """Say so if a dotted name is neither a module nor in one."""
  parts = name.split(".")
  if parts[0] != "vdit_jax" or re.search(_PLACEHOLDER, name):
    return
  for end in range(len(parts), 0, -1):
    path = ROOT.joinpath(*parts[:end])
    file = path.with_suffix(".py")
    if not file.exists():
      file = path / "__init__.py"
    if file.exists():
      rest = parts[end : end + 1]
      if rest and not re.search(rf"\b{rest[0]}\b", file.read_text()):
        break
      return
  yield f"there is no {name}"


def of_place(name: str) -> Iterator[str]:
  """Say so if a path in backticks does not exist."""
  path = name.partition(":")[0]
  if path in COMING or re.search(_PLACEHOLDER, path):
    return
  if not (ROOT / path).exists():
    yield f"there is no {path}"


def anchor(heading: str) -> str:
  """The part behind # in a link to a heading, as GitHub makes it."""
  kept = re.sub(r"[^\w\- ]", "", heading.strip().lower())
  return kept.replace(" ", "-")


def of_link(target: str, path: pathlib.Path, text: str) -> Iterator[str]:
  """Say so if a link within the repository leads nowhere."""
  if re.match(r"https?://|mailto:", target):
    return
  name, _, part = target.partition("#")
  place = (path.parent / name).resolve() if name else path
  if name and str(place.relative_to(ROOT)) in COMING:
    return
  if not place.exists():
    yield f"link to {target}: there is no {name}"
  elif part:
    inside = place.read_text() if name else text
    headings = re.findall(r"^#+ (.*)$", split(inside)[1], re.MULTILINE)
    if part not in map(anchor, headings):
      yield f"link to {target}: there is no such heading"


def of_extras(text: str) -> Iterator[str]:
  """Say which extras are named that the package has not."""
  for found in re.findall(r"(?:vdit_jax|\.)\[([a-z,]+)\]", text):
    for extra in set(found.split(",")) - extras():
      yield f"there is no extra {extra}"


def of_size(path: pathlib.Path, text: str) -> Iterator[str]:
  """Say which lines are too long, and whether there are too many."""
  lines = text.splitlines()
  name = str(path.relative_to(ROOT))
  most = MOST_LINES.get(name, MOST_LINES_ELSEWHERE)
  if len(lines) > most:
    yield f"{len(lines)} lines, the most are {most}"
  for number, line in enumerate(lines, 1):
    if len(line) > MOST_COLUMNS:
      yield f"line {number} has {len(line)} characters"


def of_quoted(text: str) -> Iterator[str]:
  """Say what is wrong with a path, module or command in backticks."""
  if re.fullmatch(rf"({_PLACES})/[\w./-]*(:\w+)?", text):
    yield from of_place(text)
  elif re.fullmatch(r"vdit_jax(\.\w+)+", text):
    yield from of_name(text)
  elif re.match(r"python3? |make |vdit ", text):
    yield from itertools.chain.from_iterable(map(of_command, commands(text)))


def complaints(path: pathlib.Path, text: str) -> list[str]:
  """Say all that is wrong with a document."""
  blocks, rest = split(text)
  found = [*of_size(path, text), *of_extras(text)]
  for block in blocks:
    if block.mark not in ("", "test", "test: slow"):
      found.append(f"mark {block.mark!r} is unknown")
    if block.language == "bash":
      for command in commands(block.text):
        found += of_command(command)
    elif block.language == "python":
      found += of_python(block.text)
    elif block.language not in ("text", "mermaid"):
      found.append(f"a block's language is {block.language!r}")
  if path.name != "CHANGELOG.md":  # which names what was, too
    for quoted in re.findall(r"`([^`\n]+)`", rest):
      found += of_quoted(quoted)
  prose = re.sub(r"`[^`\n]+`", "", rest)
  for target in re.findall(r"\]\(([^)\s]+)\)", prose):
    found += of_link(target, path, text)
  return found


def run(document: pathlib.Path, marks: set[str], folder: pathlib.Path) -> None:
  """Run the marked blocks of a document, in order, in a folder."""
  for name in ("benchmarks", "configs", "sample.py", "train.py"):
    (folder / name).symlink_to(ROOT / name)
  programs = pathlib.Path(sys.executable).parent
  env = os.environ | {
    "PATH": f"{programs}:{os.environ['PATH']}",
    "PYTHONPATH": str(ROOT),
    # Processes of their own, each as on one device.
    "XLA_FLAGS": "--xla_backend_optimization_level=0",
  }
  for block in split(document.read_text())[0]:
    if block.mark in marks:
      shell = ["bash", "-euo", "pipefail", "-c", block.text]
      python = [sys.executable, "-c", block.text]
      done = subprocess.run(
        python if block.language == "python" else shell,
        cwd=folder,
        env=env,
        capture_output=True,
        text=True,
        timeout=SECONDS,
      )
      said = f"{block.text}\n{done.stdout}\n{done.stderr[-4000:]}"
      assert done.returncode == 0, said


def _with(mark: str) -> list[pathlib.Path]:
  """Documents that have a block below a mark."""
  return [d for d in DOCUMENTS if f"<!-- {mark} -->" in d.read_text()]


def _name(path: pathlib.Path) -> str:
  return str(path.relative_to(ROOT))


@pytest.mark.parametrize("document", DOCUMENTS, ids=_name)
def test_what_a_document_says_holds(document):
  assert complaints(document, document.read_text()) == []


@pytest.mark.parametrize("document", _with("test"), ids=_name)
def test_blocks_run(document, tmp_path):
  run(document, {"test"}, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("document", _with("test: slow"), ids=_name)
def test_slow_blocks_run(document, tmp_path):
  run(document, {"test", "test: slow"}, tmp_path)


def test_what_has_come_is_no_longer_coming():
  come = set()
  for name in COMING:
    module, _, flag = name.partition(" --")
    if flag and knows(module, flag) or not flag and (ROOT / name).exists():
      come.add(name)
  if is_installed("vdit"):
    come.add("vdit")
  assert come & COMING == set()


def _bash(script: str) -> str:
  return f"```bash\n{script}\n```\n"


@pytest.mark.parametrize(
  "text",
  [
    _bash("python -m vdit_jax.samples --out=x.mp4"),
    _bash("python trains.py --config=configs/digits.py:dit"),
    _bash("vdit smaple --out=x.mp4"),
    _bash("vdit train --config=digits:vea --workdir=w"),
    _bash("make dmeo"),
    _bash("python sample.py --prompts=x --out=x.mp4"),
    _bash("cd x && python sample.py \\\n  --promt=x"),
    _bash('ssh --command="cd x && python sample.py --promt=x"'),
    _bash("python train.py --config=configs/digits.py:dti --workdir=w"),
    _bash("python train.py --config=configs/digit.py:dit --workdir=w"),
    _bash("python train.py --config=configs/digits.py:dit --config.lr=1"),
    _bash(
      "python train.py --config=configs/digits.py:dit --config.mesh.fsdp=x"
    ),
    _bash("pip install 'vdit_jax[tup]'"),
    "```python\nfrom vdit_jax import pipelines\n```\n",
    "```python\nfrom vdit_jax.weights.component import lod\n```\n",
    "```sh\nmake demo\n```\n",
    "`vdit_jax/pipelines.py`",
    "`vdit_jax.pipelines`",
    "`python -m vdit_jax.samples`",
    "[x](docs/nothing.md)",
    "# One\n[x](#two)",
    "[x](README.md#no-such-heading)",
    "x" * (MOST_COLUMNS + 1),
    "x\n" * (MOST_LINES["README.md"] + 1),
    "<!-- test: fast -->\n```bash\nmake demo\n```\n",
  ],
)
def test_checker_refuses(text):
  assert len(complaints(ROOT / "README.md", text)) == 1


@pytest.mark.parametrize(
  "text",
  [
    _bash("python -m vdit_jax.sample --prompt='a --b' --out=x.mp4  # --c"),
    _bash("X=1 .venv/bin/python sample.py --num_frames=9 --height=8 --notiled"),
    _bash("python3 -m venv .venv\npip install -e '.[tpu,gcs]'"),
    _bash("vdit sample --out=x.mp4 && make demo"),
    _bash("vdit train --config=digits:vae --config.batch_size=2 --workdir=w"),
    _bash(
      "python train.py --config=configs/digits.py:dit --workdir=w ... \\\n"
      '  --config.mesh.fsdp=8 --config.data.buckets.shapes="((9,64,64),)"'
    ),
    _bash("python train.py --config=configs/cogvideox.py:CogVideoX-2b"),
    _bash("python -m vdit_jax.data.moving_digits --config=one --data_dir=d"),
    "```python\nfrom vdit_jax import pipeline\n```\n",
    "# One, `two` (three)\n[x](#one-two-three) [y](https://x.y/z#w)",
    "`[x](y.md)` `vdit_jax/pipeline.py` `configs/digits.py:vae`",
  ],
)
def test_checker_allows(text):
  assert complaints(ROOT / "README.md", text) == []


def test_blocks_and_marks_are_found():
  text = (
    "a\n<!-- test -->\n\n```bash\nx \\\n  y\n```\n- b\n  ```text\n  c\n  ```"
  )
  blocks, rest = split(text)
  assert blocks == [
    Block("bash", "x \\\n  y\n", "test"),
    Block("text", "c\n", ""),
  ]
  assert "x" not in rest and "a" in rest and "- b" in rest


def test_a_block_that_fails_fails(tmp_path):
  document = tmp_path / "x.md"
  document.write_text("<!-- test -->\n" + _bash("false\ntrue"))
  folder = tmp_path / "folder"
  folder.mkdir()
  with pytest.raises(AssertionError):
    run(document, {"test"}, folder)
