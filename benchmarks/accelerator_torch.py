"""PyTorch's side of `benchmarks.accelerator`: diffusers' own classes.

float32 is computed as XLA's default is on a GPU, its matmuls in TF32.
"""

import functools
import pathlib
from collections.abc import Callable
from typing import Any

import diffusers
import numpy as np
import torch
from absl import app, flags

from benchmarks import accelerator_case as cases
from benchmarks import cogvideox_torch as theirs
from benchmarks import rows

_ITEM = flags.DEFINE_string("item", None, "What to run.", required=True)
_SCRATCH = flags.DEFINE_string("scratch", None, "Folder.", required=True)
_JSON = flags.DEFINE_string("json", None, "File to write.", required=True)
_TINY = flags.DEFINE_bool("tiny", False, "Sizes for a CPU.")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def main(argv):
  """Run one item."""
  del argv
  torch.backends.cuda.matmul.allow_tf32 = True
  torch.backends.cudnn.allow_tf32 = True
  diffusers.utils.logging.disable_progress_bar()
  about = {
    "device": torch.cuda.get_device_name() if DEVICE == "cuda" else "cpu",
    "torch": torch.__version__,
    "diffusers": diffusers.__version__,
  }
  kept = rows.Rows(_JSON.value, about)
  kind, _, argument = _ITEM.value.partition("_")
  scratch = pathlib.Path(_SCRATCH.value)
  if kind == "weights":
    _weights(kept, scratch)
  elif argument == "decode":
    _decode(kept, scratch, "bfloat16", ("compiled",))
  elif argument.startswith("train"):
    _train(kept, scratch, argument.rpartition("_")[2])
  else:
    _compare(kept, scratch, argument)
  kept.done()


def _weights(kept: rows.Rows, scratch: pathlib.Path) -> None:
  """Save networks whose every parameter is random, in bfloat16."""
  found = cases.case("bfloat16", _TINY.value)
  for name, kind, config in (
    ("transformer", diffusers.CogVideoXTransformer3DModel, found.transformer),
    ("vae", diffusers.AutoencoderKLCogVideoX, found.vae),
  ):
    module = theirs.build(kind, config, "bfloat16", DEVICE)
    module.save_pretrained(scratch / name)
    count = sum(p.numel() for p in module.parameters())
    kept.add(name, parameters=count)


def _compare(kept: rows.Rows, scratch: pathlib.Path, dtype: str) -> None:
  """Time each part, eager and compiled; save what the networks give."""
  given = cases.inputs(cases.case(dtype, _TINY.value))
  network = _load(diffusers.CogVideoXTransformer3DModel, scratch, dtype)
  forward = theirs.forward(network, given)
  sample = theirs.sampler(network, given, cases.STEPS)
  gave = {}
  for how in ("eager", "compiled"):
    if how == "compiled":
      for block in network.transformer_blocks:  # one compilation for all
        block.compile()
    kept.attempt(f"forward {how}", functools.partial(_time, forward))
    kept.attempt(f"sample {how}", functools.partial(_time, sample, cases.STEPS))
    if how == "eager":
      gave["forward"] = forward().float().cpu().numpy()
      gave["sample"] = sample().float().cpu().numpy()
  if dtype == "bfloat16":
    gave["decode"] = _decode(kept, scratch, dtype, ("eager",))
  np.savez(scratch / f"theirs_{dtype}.npz", **gave)


def _train(kept: rows.Rows, scratch: pathlib.Path, dtype: str) -> None:
  """Time a training step, activations computed again as diffusers does."""
  given = cases.inputs(cases.case(dtype, _TINY.value))
  network = _load(diffusers.CogVideoXTransformer3DModel, scratch, "float32")
  network.enable_gradient_checkpointing()
  loss = theirs.denoising_loss(network.train(), given, dtype)
  step = theirs.trainer(network, loss)
  kept.attempt("train eager", lambda: _time(step))
  for block in network.transformer_blocks:
    block.compile()
  kept.attempt("train compiled", lambda: _time(step))


def _load(kind, scratch: pathlib.Path, dtype: str) -> theirs.Network:
  name = "vae" if kind is diffusers.AutoencoderKLCogVideoX else "transformer"
  module = kind.from_pretrained(
    scratch / name, torch_dtype=getattr(torch, dtype)
  )
  return module.to(DEVICE).eval()


def _time(run: Callable[[], Any], parts: int = 1) -> dict[str, Any]:
  """Time a run, one of its parts; and its peak of memory."""
  if DEVICE == "cuda":
    torch.cuda.reset_peak_memory_stats()
  found = cases.seconds(run, lambda _: _wait(), parts)
  if DEVICE == "cuda":
    found["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
  return found


def _wait() -> None:
  if DEVICE == "cuda":
    torch.cuda.synchronize()


def _decode(kept: rows.Rows, scratch, dtype, ways) -> np.ndarray:
  """Time the decoder; what it gives of the inputs' latents."""
  module = _load(diffusers.AutoencoderKLCogVideoX, scratch, dtype)
  given = cases.inputs(cases.case(dtype, _TINY.value))
  run = theirs.decoder(module, given["z"])
  for how in ways:
    if how == "compiled":
      module.decoder.compile()
    kept.attempt(f"decode {how}", functools.partial(_time, run))
  return run().float().cpu().numpy()


if __name__ == "__main__":
  app.run(main)
