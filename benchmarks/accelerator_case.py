"""What both sides of `benchmarks.accelerator` agree on: sizes and timing.

Imports neither jax nor torch.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks import cogvideox_case, race

STEPS = 4  # of sampling
_TURNS = race.Turns(least=3, most=10, seconds=4.0, warm=2)


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
      cogvideox_case.vae((32, 32, 32, 32), 1, scaling_factor=_SCALE),
      *((3, 4, 6), (3, 4, 6)),
    )
  latents = (13, 60, 90) if dtype == "bfloat16" else (5, 60, 90)
  return Case(
    dict(num_attention_heads=30, num_layers=30),
    cogvideox_case.vae((128, 256, 256, 512), 3, scaling_factor=_SCALE),
    *(latents, (5, 60, 90)),
  )


_SCALE = 1.15258426


def inputs(found: Case) -> dict[str, np.ndarray]:
  """Draw latents in our layout, and the negative and a prompt's text."""
  width = found.transformer.get("text_embed_dim", cogvideox_case.TEXT[1])
  given = cogvideox_case.inputs(found.latents, width)
  return given | {"z": cogvideox_case.decoded(found.decoded)}


def seconds(
  run: Callable[[], Any], wait: Callable[[Any], Any], parts: int = 1
) -> dict[str, Any]:
  """Time one of a function's parts, after two calls; see `race.summary`."""
  found = race.run({"": run}, _TURNS, wait)[""]
  return {k: v if k == "times" else v / parts for k, v in found.items()}
