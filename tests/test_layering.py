"""Imports point down, and files stay small and named after a thing.

The imports are read from the source, those inside functions too, so nothing
is hidden by what happens to be installed.
"""

import ast
import graphlib
import os
import pathlib
import re
import sys

import pytest

from vdit_jax.models import families

ROOT = pathlib.Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "vdit_jax"

# Each part of vdit_jax, and the parts that it may import beside itself.
# What comes in, and what goes out.
_LOWEST = {"schema", "inputs", "strict_json", "writing"}
_OF_TOOLS = {"tool", "config_flag"}  # flags are defined and parsed here
_ARRAYS = {"types", "trees", "sharding", "kernels", "nn"}
_NETWORKS = _ARRAYS | {"text", "convert", "models"}
_READERS = {"types", "trees", "data", "media", "text"}
_WEIGHTS = _NETWORKS | _READERS | {"checkpoint", "weights", "diffusion"}
_PIPELINE = _WEIGHTS | {"conditioning", "encoding", "sampling", "batches"}
_TRAINING = _PIPELINE | {"pipeline", "metrics", "cost"}
_TOOLS = _TRAINING | {"training", "launch"}
LAYERS = {
  "schema": set(),
  "inputs": set(),
  "strict_json": set(),
  "writing": set(),
  "tool": set(),
  "config_flag": {"training"},
  "types": set(),
  "trees": set(),
  "launch": set(),
  "cost": set(),
  "diffusion": set(),
  "text": {"types"},
  "media": {"types", "trees"},
  "sharding": {"types", "trees"},
  "kernels": {"types", "trees", "sharding"},
  "nn": {"types", "trees", "sharding", "kernels"},
  "checkpoint": {"types", "trees", "convert"},
  # The engine, which knows no network.
  "convert": _ARRAYS,
  "models": _NETWORKS,
  "data": {"types", "trees", "media", "text"},
  "metrics": {"types", "trees", "sharding", "kernels", "nn", "data", "media"},
  "weights": _WEIGHTS,
  "conditioning": {"types", "models"},
  "encoding": _NETWORKS,
  "sampling": {"types", "diffusion"},
  "batches": {"types", "conditioning", "sampling"},
  "pipeline": _PIPELINE,
  "editing": set(),
  "given_files": _PIPELINE | {"pipeline", "editing"},
  "training": _TRAINING,
  "evaluate": _TOOLS,
  "compare": _TOOLS,
  "cache": _TOOLS,
  "export": _TOOLS,
  "aot": _TOOLS,
  "tiny": {"weights"},
  "train": _TOOLS,
  "sample": _TOOLS | {"given_files"},
  "cli": {"", "configs"},  # the version, the names of files; no more
  "configs": set(),
}

_TORCH = {"torch", "diffusers", "transformers"}
NEVER = {"configs", "tensorflow"} | _TORCH
# A process of its own, which `compare` starts: nothing else imports it.
_TORCH_SIDE = "vdit_jax.compare.torch_side"
_BASELINE = re.compile(r"vdit_jax\.models\.\w+\.baseline")
FLAGS = ("absl.flags", "ml_collections.config_flags")
# `diffusion` is mathematics on arrays.
DIFFUSION_NEEDS = {"jax", "numpy", "flax.struct"}
VAGUE = {"utils", "util", "common", "misc", "base", "helpers", "helper"}
MOST_LINES = {"package": 500, "rest": 600}


def _module(path: pathlib.Path) -> str:
  """Name of a file's module; a package's is that of its folder."""
  parts = path.relative_to(ROOT).with_suffix("").parts
  return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _imports(module: str, source: str) -> set[str]:
  """Dotted names of all that a module imports, wherever it does."""
  found = set()
  for node in ast.walk(ast.parse(source)):
    if isinstance(node, ast.Import):
      found |= {alias.name for alias in node.names}
    elif isinstance(node, ast.ImportFrom):
      above = module.split(".")[: -node.level] if node.level else []
      head = [*above, *([node.module] if node.module else [])]
      found |= {".".join([*head, alias.name]) for alias in node.names}
    elif isinstance(node, ast.Call) and _called(node.func) in (
      "import_module",
      "__import__",
    ):
      found.add(_literal(node.args[0]).rstrip("."))
  return found - {""}


def _called(func: ast.expr) -> str:
  return getattr(func, "attr", getattr(func, "id", ""))


def _literal(node: ast.expr) -> str:
  """The text of a string, or what an f-string begins with."""
  if isinstance(node, ast.JoinedStr):
    node = node.values[0]
  return str(node.value) if isinstance(node, ast.Constant) else ""


def _within(name: str, parents) -> bool:
  return any(name == p or name.startswith(p + ".") for p in parents)


def _target(name: str, modules) -> str:
  """Module that an imported name is, or is of: the longest that fits."""
  return max((m for m in modules if _within(name, [m])), key=len, default="")


def _part(module: str) -> str:
  return module.split(".")[1] if "." in module else ""


def violations(module: str, source: str) -> list[str]:
  """Say what a module of vdit_jax imports that it may not."""
  part, found = _part(module), []
  if part and part not in LAYERS:
    found.append(f"{module}: has no row in LAYERS")
  allowed = LAYERS.get(part, set()) | {part} | _LOWEST
  is_tool = 'if __name__ == "__main__":' in source
  if is_tool:
    allowed = allowed | _OF_TOOLS
  if module.endswith(".__main__"):
    allowed = set(LAYERS)  # a command is above all that it calls
  apart = _BASELINE.fullmatch(module) or module == _TORCH_SIDE
  if apart:  # on top of `compare`, in a process of its own
    allowed = allowed | {"compare"}
  never = NEVER - (_TORCH if apart else set())
  for name in sorted(_imports(module, source)):
    inside = _within(name, ["vdit_jax"])
    standard = name.split(".")[0] in sys.stdlib_module_names
    if inside and _part(name) not in allowed:
      found.append(f"{module}: {part} may not import {name}")
    elif _within(name, never) or (
      _BASELINE.fullmatch(name) or (name == _TORCH_SIDE and not apart)
    ):
      found.append(f"{module}: nothing may import {name}")
    elif _within(name, FLAGS) and not (is_tool or part in _OF_TOOLS):
      found.append(f"{module}: flags are for tools, not {name}")
    elif part == "diffusion" and not (
      inside or standard or _within(name, DIFFUSION_NEEDS)
    ):
      found.append(f"{module}: diffusion may not import {name}")
  return found


def _sources() -> dict[str, str]:
  return {_module(p): p.read_text() for p in sorted(PACKAGE.rglob("*.py"))}


def _python_files() -> list[pathlib.Path]:
  folders = [PACKAGE, ROOT / "tests", ROOT / "configs"]
  files = [p for folder in folders for p in folder.rglob("*.py")]
  return sorted([*files, *ROOT.glob("*.py")])


def test_imports_point_down():
  sources = _sources()
  assert {"vdit_jax.pipeline", "vdit_jax.models.vdit.denoiser"} <= set(sources)
  assert [v for m, s in sources.items() for v in violations(m, s)] == []


def test_layers_have_no_cycle():
  order = {part: below - {part} for part, below in LAYERS.items()}
  assert list(graphlib.TopologicalSorter(order).static_order())


def test_modules_have_no_cycle():
  sources = _sources()
  graph = {
    module: {_target(name, sources) for name in _imports(module, source)}
    - {module, "vdit_jax", ""}
    for module, source in sources.items()
  }
  assert graph["vdit_jax.models.vdit.denoiser"] >= {"vdit_jax.nn.attention"}
  assert list(graphlib.TopologicalSorter(graph).static_order())


@pytest.mark.parametrize(
  "module, source",
  [
    ("vdit_jax.nn.norms", "from vdit_jax.models import vdit"),
    ("vdit_jax.nn.norms", "import vdit_jax.models.vdit.denoiser as m"),
    ("vdit_jax.nn.norms", "from ..models import vdit"),
    ("vdit_jax.nn.norms", "def f():\n  from vdit_jax import models"),
    ("vdit_jax.nn.norms", "importlib.import_module('vdit_jax.models.x')"),
    ("vdit_jax.nn.norms", "importlib.import_module(f'vdit_jax.models.{x}')"),
    ("vdit_jax.types", "from vdit_jax import trees"),
    ("vdit_jax.sharding", "from vdit_jax.nn import norms"),
    ("vdit_jax.checkpoint", "from vdit_jax.nn import lora"),
    ("vdit_jax.data.reading", "from vdit_jax.models.t5 import encoder"),
    ("vdit_jax.media.formats", "from vdit_jax import pipeline"),
    ("vdit_jax.metrics.frames", "from vdit_jax.training import loop"),
    ("vdit_jax.pipeline", "from vdit_jax.training import loop"),
    ("vdit_jax.training.loop", "from vdit_jax import evaluate"),
    ("vdit_jax.diffusion.samplers", "from vdit_jax import types"),
    ("vdit_jax.diffusion.samplers", "import optax"),
    ("vdit_jax.diffusion.samplers", "import flax.linen as nn"),
    ("vdit_jax.pipeline", "def f():\n  import torch.nn"),
    ("vdit_jax.pipeline", "def f():\n  import diffusers"),
    ("vdit_jax.compare.ours", "import torch"),
    ("vdit_jax.compare.__main__", "from vdit_jax.compare import torch_side"),
    ("vdit_jax.compare.ours", "from vdit_jax.models.any import baseline"),
    ("vdit_jax.models.any.baseline", "import tensorflow"),
    ("vdit_jax.models.any.system", "from vdit_jax.compare import jobs"),
    ("vdit_jax.pipeline", "from tensorflow import io"),
    ("vdit_jax.pipeline", "from configs import digits"),
    ("vdit_jax.pipeline", "from vdit_jax.configs import digits"),
    ("vdit_jax.pipeline", "from absl import flags, logging"),
    ("vdit_jax.pipeline", "from ml_collections import config_flags"),
    ("vdit_jax.pipeline", "from vdit_jax import tool"),
    ("vdit_jax.schema", "from vdit_jax import types"),
    ("vdit_jax.novelty", "import jax"),
  ],
)
def test_checker_refuses(module, source):
  assert len(violations(module, source)) == 1


@pytest.mark.parametrize(
  "module, source",
  [
    ("vdit_jax.models.vdit.denoiser", "from vdit_jax.nn import attention"),
    ("vdit_jax.models.vdit.denoiser", "from ..nn import attention"),
    ("vdit_jax.data.reading", "import tensorflow_datasets as tfds"),
    ("vdit_jax.diffusion.samplers", "from vdit_jax.diffusion import guidance"),
    ("vdit_jax.diffusion.samplers", "import dataclasses, jax.numpy, numpy"),
    ("vdit_jax.diffusion.samplers", "import flax.struct"),
    ("vdit_jax.pipeline", "from absl import logging"),
    ("vdit_jax.models.any.baseline", "import torch\nfrom diffusers import x"),
    ("vdit_jax.models.any.baseline", "from vdit_jax.compare import torch_side"),
    (
      "vdit_jax.cache.__main__",
      'from absl import flags\nif __name__ == "__main__":\n  pass',
    ),
  ],
)
def test_checker_allows(module, source):
  assert violations(module, source) == []


def test_no_family_is_named_outside_its_folder():
  """Families of others: what is of one is in its folder, or asked of it."""
  others = [s for s in families.SYSTEMS.values() if s.pipelines]
  assert others
  for system in others:
    prefix = os.path.commonprefix(system.pipelines)
    # As a word, and at the beginning of a class.
    called = rf"(?i:(?<![a-z]){system.name}(?![a-z]))|{prefix}(?=[A-Z])"
    own = PACKAGE / "models" / system.name, PACKAGE / "models" / "families.py"
    named = [
      str(path.relative_to(ROOT))
      for path in PACKAGE.rglob("*.py")
      if not any(path.is_relative_to(p) for p in own)
      and re.search(called, path.read_text())
    ]
    assert named == []


def test_a_family_is_a_folder():
  folders = {p.name for p in (PACKAGE / "models").iterdir() if p.is_dir()}
  known = families.SYSTEMS.keys() | families.ENCODERS.keys()
  assert folders - {"__pycache__"} == known
  for name in families.SYSTEMS:
    files = {p.name for p in (PACKAGE / "models" / name).glob("*.py")}
    assert {"denoiser.py", "autoencoder.py", "system.py"} <= files


def test_files_are_short():
  lines = {p: len(p.read_text().splitlines()) for p in _python_files()}
  most = lambda p: MOST_LINES["package" if PACKAGE in p.parents else "rest"]
  assert {str(p): n for p, n in lines.items() if n > most(p)} == {}


def test_modules_are_nouns():
  assert [p for p in _python_files() if p.stem in VAGUE] == []
