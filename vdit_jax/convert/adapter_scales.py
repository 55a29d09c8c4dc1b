"""What the product of a layer's low-rank factors counts, by a file's own word.

  peft       alpha / r, or alpha / sqrt(r): LoraConfig, as adapter_config.json
             beside the file, or by diffusers in the file's metadata
  kohya      alpha / r, of a tensor `alpha` of each layer
  none       once

A field that changes what the factors mean in another way is refused, and so is
one that is not known and not empty.
"""

import dataclasses
import json
import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from etils import epath

from vdit_jax import schema
from vdit_jax.nn import lora

PEFT_CONFIG = "adapter_config.json"
_DIFFUSERS = "lora_adapter_metadata"  # a file's entry: LoraConfig, as JSON
AGAIN = "fetch the file again"
_MERGE = "merge them with peft and give the merged model"

_RANK = schema.Field(int, 1, lora.MOST_RANK)
_ALPHA = schema.Field(float, 1e-9)
_NUMBERS = {
  "r": _RANK,
  "lora_alpha": _ALPHA,
  "rank_pattern": schema.Field(dict, 0, 2_000, each=_RANK, optional=True),
  "alpha_pattern": schema.Field(dict, 0, 2_000, each=_ALPHA, optional=True),
  "use_rslora": schema.Field(bool, optional=True),
}
_KINDS = {
  "peft_type": schema.Field(str, choices=("LORA",), optional=True),
  "bias": schema.Field(str, choices=("none",), optional=True),
  # "pissa", "olora" and others change the weights that the factors are of.
  "init_lora_weights": schema.Field(
    str, choices=(True, False, "gaussian", "orthogonal", "eva"), optional=True
  ),
}
# Of peft 0.21's LoraConfig: how it was trained, and where it is from.
_HARMLESS = {
  *("auto_mapping", "base_model_name_or_path", "corda_config", "eva_config"),
  *("ensure_weight_tying", "exclude_modules", "fan_in_fan_out"),
  *("inference_mode", "layers_pattern", "layers_to_transform"),
  *("loftq_config", "lora_dropout", "lora_ga_config", "megatron_core"),
  *("peft_version", "qalora_group_size", "revision", "runtime_config"),
  *("target_modules", "task_type"),
}
# A pattern is a regex of the file's: one that cannot take for ever.
_PATTERN = re.compile(r"(?!.*\)[*+?{])(?!(?:.*[*+{]){3}).{1,300}", re.DOTALL)

Scale = Callable[[str, str, int], float | None]


@dataclasses.dataclass(frozen=True)
class _Config:
  """A LoraConfig: rank and alpha, and of which layers they are others."""

  where: str
  rank: int
  alpha: float
  ranks: list[tuple[re.Pattern[str], int]]
  alphas: list[tuple[re.Pattern[str], float]]
  by_root: bool

  def scale(self, layer: str, rank: int) -> float:
    """What the product of a layer's factors of a rank counts."""
    said = _first(self.ranks, layer, self.rank)
    if said != rank:
      raise ValueError(
        f"{self.where}: r must be {rank} of {layer}, whose factors have that "
        f"rank, got {said}; give the file that is of this one"
      )
    alpha = _first(self.alphas, layer, self.alpha)
    return alpha / (math.sqrt(rank) if self.by_root else rank)


def said_by(path: epath.Path, metadata: Mapping[str, str]) -> Scale:
  """Read what the products of a file's layers count.

  Args:
    path: of the file.
    metadata: that it has.

  Returns:
    (prefix of the network, layer, rank) -> what the layer's product counts;
    None if nothing is said of it.

  Raises:
    ValueError: for a word that is not that of plain adapters. The function
      raises one for a rank that is not the layer's.
  """
  beside = path.parent / PEFT_CONFIG
  if beside.exists():
    config = _read(
      str(beside),
      parse(str(beside), beside.read_bytes().decode(errors="replace")),
    )
    return lambda prefix, layer, rank: config.scale(layer, rank)
  if path.stem == "adapter_model":
    raise ValueError(
      f"lora {path}: {PEFT_CONFIG} must lie beside it, which says what the "
      "factors count; fetch it too"
    )
  if _DIFFUSERS not in metadata:
    return lambda prefix, layer, rank: None
  where = f"lora {path}: {_DIFFUSERS}"
  configs = {
    prefix: _read(f"{where} of {schema.quote(prefix)}", config)
    for prefix, config in _by_prefix(parse(where, metadata[_DIFFUSERS])).items()
  }
  return lambda prefix, layer, rank: (
    configs[prefix].scale(layer, rank) if prefix in configs else None
  )


def of_alpha(alpha: np.ndarray, rank: int) -> float:
  """Return what a layer's tensor `alpha` makes its product count.

  NaN is for a tensor that is not one number.
  """
  return float(alpha.reshape(())) / rank if alpha.size == 1 else math.nan


def parse(where: str, text: str) -> dict[str, Any]:
  """Read an object of JSON; refuse what is none, naming where it is from."""
  try:
    found = json.loads(text)
  except (ValueError, RecursionError) as error:
    raise ValueError(
      f"{where} must be JSON, got {schema.quote(text)}; {AGAIN}"
    ) from error
  if not isinstance(found, dict):
    raise ValueError(
      f"{where} must be an object of JSON, got {schema.quote(found)}; {AGAIN}"
    )
  return found


def _by_prefix(said: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
  """Part a config of several networks: {"transformer.r": 4} is of one."""
  configs: dict[str, dict[str, Any]] = {}
  for name, value in said.items():
    prefix, dot, field = name.rpartition(".")
    configs.setdefault(prefix + dot, {})[field] = value
  return configs


def _read(where: str, config: Mapping[str, Any]) -> _Config:
  """Read a LoraConfig; refuse one that is not of plain adapters."""
  if missing := [k for k in ("r", "lora_alpha") if config.get(k) is None]:
    raise ValueError(
      f"{where}: {' and '.join(missing)} must be there, to say what the "
      f"factors count; {AGAIN}"
    )
  schema.check(where, config, _NUMBERS, AGAIN)
  schema.check(where, config, _KINDS, _MERGE)
  known = {*_HARMLESS, *_NUMBERS, *_KINDS}
  if other := {k: v for k, v in config.items() if v and k not in known}:
    raise ValueError(
      f"{where}: {schema.quote(other)} is not done here; {_MERGE}"
    )
  return _Config(
    where,
    config["r"],
    config["lora_alpha"],
    _patterns(where, config, "rank_pattern"),
    _patterns(where, config, "alpha_pattern"),
    bool(config.get("use_rslora")),
  )


def _patterns(where: str, config: Mapping[str, Any], name: str) -> list[Any]:
  """Compile a LoraConfig's patterns as peft does."""
  found = []
  for pattern, value in (config.get(name) or {}).items():
    try:
      if not _PATTERN.fullmatch(pattern):
        raise ValueError("it could take for ever")
      found.append((re.compile(rf"(.*\.)?({pattern})$"), value))
    except (ValueError, re.error, RecursionError, OverflowError) as error:
      raise ValueError(
        f"{where}: {name} must be of layers' names or of simple regexes, got "
        f"{schema.quote(pattern)}; {_MERGE}"
      ) from error
  return found


def _first(patterns: list[Any], layer: str, other: Any) -> Any:
  """Return the value of the first pattern that is a layer's; else another."""
  return next((v for regex, v in patterns if regex.match(layer)), other)
