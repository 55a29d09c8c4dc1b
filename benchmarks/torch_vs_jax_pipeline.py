"""Prompt to mp4, a row of `benchmarks.torch_vs_jax`.

A whole pipeline's folder is loaded by both sides: 2b's widths with random
weights and fewer layers. Frames are written by the same encoder.
"""

import copy
import dataclasses
import json
import pathlib
import shutil
import tempfile
from typing import Any

import diffusers
import numpy as np
import torch

from benchmarks import cogvideox_case as cases
from benchmarks import cogvideox_torch as theirs
from benchmarks import torch_vs_jax_autoencoder as autoencoder
from benchmarks import torch_vs_jax_sides as sides
from benchmarks import torch_vs_jax_text as text
from vdit_jax import pipeline
from vdit_jax.media import formats
from vdit_jax.weights import tiny as tinies

_PROMPT, _FPS = "two dogs run along the beach at sunset", 8


@dataclasses.dataclass(frozen=True)
class Case:
  """Networks and what is made with them."""

  heads: int = 30
  layers: int = 4
  channels: tuple[int, ...] = (128, 256, 256, 512)
  vae_layers: int = 3
  text_width: int = cases.TEXT[1]
  clip: tuple[int, int, int] = (9, 64, 96)  # frames, height, width
  steps: int = 8


TINY = Case(2, 2, (32,) * 4, 1, 32, (9, 16, 32), 2)


def run(how: sides.How) -> dict[str, Any]:
  """Measure a clip from its prompt to its file; loading is not timed."""
  case = TINY if how.tiny else Case()
  with tempfile.TemporaryDirectory() as name:
    folder = pathlib.Path(name)
    _write(folder / "pipeline", case, how)
    F, H, W = case.clip
    noise = cases.decoded(((F - 1) // 4 + 1, H // 8, W // 8))
    runs = {
      way: _ours(pipe, noise, case, folder / f"{way}.mp4")
      for way, pipe in _our_ways(folder / "pipeline").items()
    }
    for way, pipe in _their_ways(folder / "pipeline", how).items():
      runs[way] = _theirs(pipe, noise, case, folder / f"{way}.mp4")
    return sides.compare(runs, how)


def _write(folder: pathlib.Path, case: Case, how: sides.How) -> None:
  """Write a small pipeline, with other networks in the place of its own."""
  tinies.write(folder, "2b")
  shown = json.loads((folder / "text_encoder/config.json").read_text())
  transformer = dict(
    num_attention_heads=case.heads,
    num_layers=case.layers,
    text_embed_dim=case.text_width,
  )
  vae = cases.vae(case.channels, case.vae_layers)
  networks = {
    "text_encoder": text.build(how.tiny, shown["vocab_size"]),
    "transformer": theirs.build(
      diffusers.CogVideoXTransformer3DModel, transformer
    ),
    "vae": theirs.build(diffusers.AutoencoderKLCogVideoX, vae),
  }
  for name, network in networks.items():
    shutil.rmtree(folder / name)
    network.save_pretrained(folder / name)


def _our_ways(folder: pathlib.Path) -> dict[str, pipeline.Pipeline]:
  pipe = pipeline.load(folder, sequential=False)
  denoiser = pipe.modules["denoiser"]
  cfg = dataclasses.replace(denoiser.cfg, unroll=denoiser.cfg.depth)
  networks = pipe.modules.networks | {"denoiser": denoiser.clone(cfg=cfg)}
  modules = dataclasses.replace(pipe.modules, networks=networks)
  return {"ours": pipe, "unrolled": dataclasses.replace(pipe, modules=modules)}


def _ours(pipe, noise, case: Case, path: pathlib.Path):
  def run():
    video = pipe.generate(
      [_PROMPT],
      **_size(case),
      steps=case.steps,
      guidance=cases.GUIDANCE,
      noise=noise,
    )
    formats.write(path, video[0], _FPS)
    return video

  return run


def _their_ways(folder: pathlib.Path, how: sides.How) -> dict[str, Any]:
  kind = diffusers.CogVideoXPipeline
  found = {"eager": kind.from_pretrained(folder)}
  if how.compiled:
    parts = found["eager"].components
    vae = autoencoder.compiled(copy.deepcopy(parts["vae"]))
    pipe = kind(**parts | {"vae": vae})
    for name in ("text_encoder", "transformer"):
      setattr(pipe, name, torch.compile(parts[name], dynamic=False))
    found["compiled"] = pipe
  for pipe in found.values():
    pipe.set_progress_bar_config(disable=True)
  return found


def _theirs(pipe, noise, case: Case, path: pathlib.Path):
  latents = torch.tensor(noise).permute(0, 1, 4, 2, 3).contiguous()

  def run():
    video = pipe(
      prompt=[_PROMPT],
      negative_prompt="",
      **_size(case),
      num_inference_steps=case.steps,
      guidance_scale=cases.GUIDANCE,
      latents=latents,
      output_type="np",
    ).frames
    video = 2 * np.asarray(video) - 1
    formats.write(path, video[0], _FPS)
    return video

  return run


def _size(case: Case) -> dict[str, int]:
  names = "num_frames", "height", "width"
  return dict(zip(names, case.clip, strict=True))
