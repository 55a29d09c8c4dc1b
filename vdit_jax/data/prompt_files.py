"""Prompts in files: one a line (see `text_files`), or as VBench writes them.

VBench (arXiv:2311.17982) has a JSON list of objects, each with the prompt and
what it is meant to measure:

  [{"prompt_en": "a bird and a cat", "dimension": ["multiple_objects"]}, ...]
"""

import dataclasses
import json
from typing import Any

from etils import epath

from vdit_jax import schema
from vdit_jax.data import text_files


@dataclasses.dataclass(frozen=True)
class Prompt:
  """A prompt, and the dimensions that it is meant to measure, if any."""

  text: str
  dimensions: tuple[str, ...] = ()


def read(path: epath.PathLike) -> list[Prompt]:
  """Read a file of prompts: VBench's form if it ends in .json, else lines.

  Raises:
    ValueError: if there is no prompt, or one is empty; says which.
  """
  path = epath.Path(path)
  text = text_files.read(path, "prompts_file")
  if path.suffix == ".json":
    prompts = _objects(path, text)
  else:
    prompts = _lines(path, text)
  if not prompts:
    raise ValueError(f"{path} has no prompt; write one a line")
  return prompts


def _lines(path: epath.Path, text: str) -> list[Prompt]:
  lines = text_files.lines(text)
  for number, line in enumerate(lines, 1):
    if not line.strip():
      raise ValueError(
        f"{path}:{number} is empty; remove the line (--prompt= is the empty "
        "prompt)"
      )
  return [Prompt(line.strip()) for line in lines]


def _objects(path: epath.Path, text: str) -> list[Prompt]:
  form = 'a list of {"prompt_en": text, "dimension": [names]}'
  try:
    rows = json.loads(text)
  except RecursionError as error:
    raise ValueError(f"{path} is JSON nested too deep; write {form}") from error
  except ValueError as error:
    raise ValueError(f"{path} is not JSON: {error}; write {form}") from error
  if not isinstance(rows, list):
    raise ValueError(f"{path} holds a {type(rows).__name__}; write {form}")
  return [
    _prompt(f"{path}, entry {i}", row, form) for i, row in enumerate(rows)
  ]


def _prompt(where: str, row: Any, form: str) -> Prompt:
  text = row.get("prompt_en") if isinstance(row, dict) else None
  if not isinstance(text, str) or not text.strip():
    raise ValueError(
      f"{where} has no text in prompt_en: {schema.quote(row)}; write {form}"
    )
  names = row.get("dimension", [])
  names = [names] if isinstance(names, str) else names
  if not isinstance(names, list) or not all(isinstance(n, str) for n in names):
    raise ValueError(
      f"{where} has dimension {schema.quote(names)}; write {form}"
    )
  return Prompt(text.strip(), tuple(names))
