"""The denoiser's rows of `benchmarks.torch_vs_jax`."""

import copy
import dataclasses
from typing import Any

import diffusers
import jax
import jax.numpy as jnp
import torch

from benchmarks import cogvideox_case as cases
from benchmarks import cogvideox_jax as ours
from benchmarks import cogvideox_torch as theirs
from benchmarks import torch_vs_jax_sides as sides
from vdit_jax.cost import flops


@dataclasses.dataclass(frozen=True)
class Case:
  """A denoiser of a release's form, and the latents (f, h, w) it is given."""

  rotary: bool
  heads: int
  layers: int
  latents: tuple[int, int, int]
  text_width: int = cases.TEXT[1]
  steps: int = 8  # of sampling

  def config(self) -> dict[str, Any]:
    """Arguments of diffusers' class."""
    return dict(
      num_attention_heads=self.heads,
      num_layers=self.layers,
      text_embed_dim=self.text_width,
      use_rotary_positional_embeddings=self.rotary,
    )


CASES = {
  "2b-676": Case(False, 16, 2, (3, 20, 30)),
  "5b-1576": Case(True, 16, 2, (9, 20, 30)),
  "5b-wide": Case(True, 30, 2, (3, 20, 30)),
}
TINY = dict(heads=2, latents=(3, 4, 6), text_width=32, steps=2)


def run(what: str, name: str, how: sides.How) -> dict[str, Any]:
  """Measure a row.

  Args:
    what: "forward", "train" or "sample".
    name: of `CASES`.
    how: to measure.
  """
  case = CASES[name]
  if how.tiny:
    case = dataclasses.replace(case, **TINY)
  kind = diffusers.CogVideoXTransformer3DModel
  network = theirs.build(kind, case.config())
  given = cases.inputs(case.latents, case.text_width)
  return _PARTS[what](network, given, case, how)


def _forward(network, given, case, how) -> dict[str, Any]:
  """One call."""
  loops = sides.loops(sides.copied(network))
  runs = {k: ours.forward(loaded, given) for k, loaded in loops.items()}
  for name, way in sides.ways(network, how).items():
    runs[name] = theirs.forward(way, given)
  return sides.compare(runs, how, work=sides.work(runs["ours"]))


def _sample(network, given, case, how) -> dict[str, Any]:
  """Sampling with guidance."""
  loops = sides.loops(sides.copied(network))
  runs = {
    k: ours.sampler(loaded, given, case.steps) for k, loaded in loops.items()
  }
  for name, way in sides.ways(network, how).items():
    runs[name] = theirs.sampler(way, given, case.steps)
  return sides.compare(runs, how, work=sides.work(runs["ours"]))


def _train(network, given, case, how) -> dict[str, Any]:
  """Loss, gradients and an AdamW step."""
  runs, work = {}, 0
  for name, loaded in sides.loops(sides.copied(network)).items():
    loss, args = ours.denoising_loss(loaded, given)
    work = flops.model_flops(loss, loaded.params, *args)
    params = jax.tree.map(jnp.copy, loaded.params)
    runs[name] = ours.trainer(loss, params, args)
  for name, way in sides.ways(network, how, copy.deepcopy).items():
    loss = theirs.denoising_loss(way.train(), given, "float32")
    runs[name] = theirs.trainer(way, loss)
  # The second loss shows whether both learnt the same.
  return sides.compare(runs, how, work=work, calls=2)


_PARTS = {"forward": _forward, "sample": _sample, "train": _train}


def matmul(how: sides.How) -> dict[str, Any]:
  """A product of two square matrices."""
  n = 64 if how.tiny else 2048
  x = torch.randn((n, n), generator=torch.Generator().manual_seed(0))
  given, multiply = jnp.asarray(x.numpy()), jax.jit(jnp.matmul)
  runs = {"ours": lambda: multiply(given, given), "eager": lambda: x @ x}
  return sides.compare(runs, how, work=2 * n**3)
