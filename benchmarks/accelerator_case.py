"""What both sides of `benchmarks.accelerator` agree on: sizes, timing, rows.

Imports neither jax nor torch.
"""

import dataclasses
import json
import os
import pathlib
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np

STEPS, GUIDANCE, LR = 4, 6.0, 1e-4
TEXT = (226, 4096)  # tokens, width
_LEAST, _MOST = 3, 10  # times that a thing is timed
_ENOUGH = 4.0  # seconds of timing


@dataclasses.dataclass(frozen=True)
class Case:
  """Networks of CogVideoX 2b's form and what they are run on.

  Attributes:
    transformer, vae: arguments of diffusers' classes.
    latents: (f, h, w) of the denoiser's.
    decoded: (f, h, w) of the decoder's.
  """

  transformer: dict[str, Any]
  vae: dict[str, Any]
  latents: tuple[int, int, int]
  decoded: tuple[int, int, int]


def case(dtype: str, tiny: bool) -> Case:
  """Size of a comparison: 49x480x720 in bfloat16, 17x480x720 in float32."""
  if tiny:
    return Case(
      dict(num_attention_heads=2, num_layers=2, text_embed_dim=32),
      _vae((32, 32, 32, 32), 1),
      *((3, 4, 6), (3, 4, 6)),
    )
  latents = (13, 60, 90) if dtype == "bfloat16" else (5, 60, 90)
  return Case(
    dict(num_attention_heads=30, num_layers=30),
    _vae((128, 256, 256, 512), 3),
    *(latents, (5, 60, 90)),
  )


def _vae(channels, layers):
  return dict(
    block_out_channels=channels,
    down_block_types=("CogVideoXDownBlock3D",) * 4,
    up_block_types=("CogVideoXUpBlock3D",) * 4,
    latent_channels=16,
    layers_per_block=layers,
    temporal_compression_ratio=4,
    scaling_factor=1.15258426,
  )


def inputs(found: Case) -> dict[str, np.ndarray]:
  """Draw latents in our layout, and the negative and a prompt's text."""
  rng = np.random.default_rng(1)
  draw = lambda *shape: rng.standard_normal(shape, np.float32)
  width = found.transformer.get("text_embed_dim", TEXT[1])
  return {
    "x_t": draw(1, *found.latents, 16),
    "target": draw(1, *found.latents, 16),
    "embeds": draw(2, TEXT[0], width),
    "z": draw(1, *found.decoded, 16),
  }


def seconds(
  run: Callable[[], Any], wait: Callable[[Any], Any]
) -> dict[str, Any]:
  """Time a function after two calls of it: median, least, most, how often."""
  for _ in range(2):
    wait(run())
  times: list[float] = []
  while len(times) < _LEAST or (len(times) < _MOST and sum(times) < _ENOUGH):
    began = time.perf_counter()
    wait(run())
    times.append(time.perf_counter() - began)
  return {
    "median": statistics.median(times),
    "least": min(times),
    "most": max(times),
    "times": len(times),
  }


class Rows:
  """Collects rows of an item and writes them after each.

  Args:
    path: of the JSON file.
    about: device and versions.
  """

  def __init__(self, path: str, about: dict[str, Any]):
    self._path = pathlib.Path(path)
    self._found: dict[str, Any] = {"about": about, "rows": []}

  def add(self, name: str, **values: Any) -> None:
    """Add a row."""
    print(name, values, flush=True)
    self._found["rows"].append({"name": name} | values)
    self._write()

  def attempt(self, name: str, run: Callable[[], dict[str, Any]]) -> None:
    """Add the row that a function returns, or what it fails with."""
    try:
      self.add(name, **run())
    except Exception as error:  # the other rows are worth having
      self.add(name, error=f"{type(error).__name__}: {error}"[:600])

  def done(self) -> None:
    """Say that the item is whole."""
    self._found["done"] = True
    self._write()

  def _write(self) -> None:
    temporary = self._path.with_suffix(".part")
    temporary.write_text(json.dumps(self._found))
    os.replace(temporary, self._path)
