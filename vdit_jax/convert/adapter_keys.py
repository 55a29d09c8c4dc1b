r"""How tensors of low-rank adapters are named, by the programs that write them.

A key is a network's prefix, a layer of it and what the tensor is of the layer:

  diffusers  transformer.blocks.0.attn1.to_q.lora_A.weight
  peft       base_model.model.blocks.0.attn1.to_q.lora_A.weight
  ComfyUI    diffusion_model.blocks.0.attn1.to_q.lora_down.weight
  kohya      lora_unet_blocks_0_attn1_to_q.lora_down.weight
  or none    blocks.0.attn1.to_q.lora_A.weight

Layers are called as a network's released keys call them, or as another layout
of its family does. What is not understood is told, and never left out.
"""

import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from vdit_jax import schema
from vdit_jax.convert import rules

_PEFT = "base_model.model."  # around a model that peft has wrapped
_PARTS = (
  (r"lora_A(?:\.\w+)?\.weight", "a"),
  (r"lora_B(?:\.\w+)?\.weight", "b"),
  (r"lora[_.]down\.weight", "a"),
  (r"lora[_.]up\.weight", "b"),
  (r"alpha", "alpha"),
)
# What other kinds of adapter have, which change what a layer computes.
_OTHERS = (
  (r"lora_magnitude_vector|dora_scale|magnitude", "DoRA"),
  (r"hada_", "LoHa"),
  (r"lokr_", "LoKr"),
  (r"oft_|boft_", "OFT"),
  (r"ia3_", "IA3"),
  (r"lora_mid", "a convolution's LoRA"),
  (r"lora_embedding", "an embedding's LoRA"),
  (r"bias$|diff_b$", "a change of a bias"),
  (r"diff$|diff_m$|set_weight$", "a change that is not of low rank"),
  (r"modules_to_save", "a layer that was trained whole"),
)


@dataclasses.dataclass(frozen=True)
class Place:
  """A dense layer of a network, as a file calls it.

  Attributes:
    network: of the layer.
    folder: of the network in a pipeline.
    prefix: of the network, in the file.
    layer: the layer's name behind it.
    slot: of its kernel.
  """

  network: str
  folder: str
  prefix: str
  layer: str
  slot: rules.Slot


@dataclasses.dataclass
class Found:
  """What a file has of a layer.

  Attributes:
    place: the layer.
    tensors: "a", "b" and perhaps "alpha", each as the file stores it.
  """

  place: Place
  tensors: dict[str, Any] = dataclasses.field(default_factory=dict)


def places(
  network: str,
  slots: Mapping[str, rules.Slot],
  prefixes: Sequence[str],
  spellings: Sequence[Mapping[str, str]] = (),
) -> Iterable[tuple[str, Place]]:
  """Yield all names of a network's dense layers.

  Args:
    network: its name.
    slots: of the layers' kernels, by their released names.
    prefixes: of the network, its folder's first; behind one that ends with "_"
      a layer's dots are underscores.
    spellings: how other layouts call the layers, each by regex and what stands
      in its place in a released name.
  """
  for stem, slot in slots.items():
    folder = prefixes[0].rstrip(".")
    names = dict.fromkeys([stem, *(_spelled(stem, how) for how in spellings)])
    for prefix in prefixes:
      for layer in names:
        name = layer.replace(".", "_") if prefix.endswith("_") else layer
        yield prefix + name, Place(network, folder, prefix, layer, slot)


def may_be_of(keys: Iterable[str], prefixes: Sequence[str]) -> bool:
  """Whether some keys begin as those of a network do."""
  return any(
    key.removeprefix(_PEFT).startswith(tuple(prefixes)) for key in keys
  )


def gather(
  tensors: Mapping[str, Any], known: Iterable[tuple[str, Place]]
) -> tuple[list[Found], list[str]]:
  """Find what layers a file's tensors are of.

  Args:
    tensors: by the file's keys.
    known: names of layers, of all networks that there are.

  Returns:
    What was found of each layer, and a line for each tensor that is of none,
    of several, there twice, or of another kind of adapter.
  """
  table: dict[str, dict[tuple[str, str], Place]] = {}
  for name, place in known:
    own = place.network, str(place.slot)
    table.setdefault(name, {}).setdefault(own, place)
  found: dict[tuple[str, str], Found] = {}
  problems = []
  for key, tensor in tensors.items():
    name, part = _split(key)
    if not part or name not in table:
      problems.append(_unknown(key, tensor, bool(part)))
    elif len(table[name]) > 1:
      own = " or ".join(f"FILE:{p.folder}" for p in table[name].values())
      problems.append(f"of which network? {schema.quote(key)}; write {own}")
    else:
      ((own, place),) = table[name].items()
      layer = found.setdefault(own, Found(place))
      if part in layer.tensors:
        problems.append(
          f"a second {part} of {place.layer}: {schema.quote(key)}"
        )
      layer.tensors[part] = tensor
  return list(found.values()), problems


def _split(key: str) -> tuple[str, str]:
  """Split a key into its layer with the prefix, and what it is of the layer."""
  name = key.removeprefix(_PEFT)
  for regex, part in _PARTS:
    if match := re.search(rf"\.{regex}$", name):
      return name[: match.start()], part
  return name, ""


def _spelled(stem: str, how: Mapping[str, str]) -> str:
  for regex, other in how.items():
    stem = re.sub(regex, other, stem)
  return stem


def _unknown(key: str, tensor: Any, is_factor: bool) -> str:
  """Say what a tensor is that is of no layer."""
  kinds = (kind for regex, kind in _OTHERS if re.search(regex, key))
  what = "no such dense layer" if is_factor else next(kinds, "not understood")
  return f"{what}: {schema.quote(key)} {schema.quote(tuple(tensor.shape))}"
