"""PyTorch's side of `benchmarks.accelerator`: diffusers' own classes.

float32 is computed as XLA's default is on a GPU, its matmuls in TF32.
"""

import contextlib
import functools
import pathlib
from collections.abc import Callable
from typing import Any

import diffusers
import numpy as np
import torch
from absl import app, flags

from benchmarks import accelerator_case as cases

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
  rows = cases.Rows(_JSON.value, about)
  kind, _, argument = _ITEM.value.partition("_")
  scratch = pathlib.Path(_SCRATCH.value)
  if kind == "weights":
    _weights(rows, scratch)
  elif argument == "decode":
    _decode(rows, scratch, "bfloat16", ("compiled",))
  elif argument.startswith("train"):
    _train(rows, scratch, argument.rpartition("_")[2])
  else:
    _compare(rows, scratch, argument)
  rows.done()


def _weights(rows: cases.Rows, scratch: pathlib.Path) -> None:
  """Save networks whose every parameter is random, in bfloat16."""
  found = cases.case("bfloat16", _TINY.value)
  for name, kind, config in (
    ("transformer", diffusers.CogVideoXTransformer3DModel, found.transformer),
    ("vae", diffusers.AutoencoderKLCogVideoX, found.vae),
  ):
    with torch.device(DEVICE):
      module = kind(**config).to(torch.bfloat16)
    generator = torch.Generator(DEVICE).manual_seed(0)
    with torch.no_grad():
      for path, p in module.named_parameters():
        p.normal_(generator=generator)
        if p.ndim > 1:
          p.div_(p[0].numel() ** 0.5)
        else:
          p.mul_(0.1).add_(float(path.endswith("weight")))
    module.save_pretrained(scratch / name)
    count = sum(p.numel() for p in module.parameters())
    rows.add(name, parameters=count)


def _compare(rows: cases.Rows, scratch: pathlib.Path, dtype: str) -> None:
  """Time each part, eager and compiled; keep what the networks give."""
  found = cases.case(dtype, _TINY.value)
  given = cases.inputs(found)
  network = _load(diffusers.CogVideoXTransformer3DModel, scratch, dtype)
  kept = {}
  for how in ("eager", "compiled"):
    if how == "compiled":
      for block in network.transformer_blocks:  # one compilation for all
        block.compile()
    forward = functools.partial(_forward, network, given, dtype)
    rows.attempt(f"forward {how}", functools.partial(_time, forward))
    sample = _sampler(network, given, dtype)
    rows.attempt(f"sample {how}", functools.partial(_time, sample, cases.STEPS))
    if how == "eager":
      kept["forward"] = forward().float().cpu().numpy()
      kept["sample"] = sample().float().cpu().numpy()
  if dtype == "bfloat16":
    kept["decode"] = _decode(rows, scratch, dtype, ("eager",))
  np.savez(scratch / f"theirs_{dtype}.npz", **kept)


def _train(rows: cases.Rows, scratch: pathlib.Path, dtype: str) -> None:
  """Time a training step, activations computed again as diffusers does."""
  given = cases.inputs(cases.case(dtype, _TINY.value))
  network = _load(diffusers.CogVideoXTransformer3DModel, scratch, "float32")
  network.enable_gradient_checkpointing()
  step = _trainer(network.train(), given, dtype)
  rows.attempt("train eager", lambda: _time(step))
  for block in network.transformer_blocks:
    block.compile()
  rows.attempt("train compiled", lambda: _time(step))


def _load(kind, scratch: pathlib.Path, dtype: str) -> torch.nn.Module:
  name = "vae" if kind is diffusers.AutoencoderKLCogVideoX else "transformer"
  module = kind.from_pretrained(
    scratch / name, torch_dtype=getattr(torch, dtype)
  )
  return module.to(DEVICE).eval()


def _time(run: Callable[[], Any], parts: int = 1) -> dict[str, Any]:
  """Time a run, one of its parts; and its peak of memory."""
  if DEVICE == "cuda":
    torch.cuda.reset_peak_memory_stats()
  found = cases.seconds(run, lambda _: _wait())
  for name in ("median", "least", "most"):
    found[name] /= parts
  if DEVICE == "cuda":
    found["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
  return found


def _wait() -> None:
  if DEVICE == "cuda":
    torch.cuda.synchronize()


def _forward(network, given, dtype) -> torch.Tensor:
  """One call of the denoiser, [B, f, h, w, c]."""
  with torch.no_grad():
    y = network(*_arguments(given, dtype), return_dict=False)[0]
  return y.permute(0, 1, 3, 4, 2)


def _arguments(given, dtype):
  embeds = _tensor(given["embeds"][1:], dtype)
  t = torch.tensor([500], device=DEVICE)
  return _channels_second(given["x_t"], dtype), embeds, t


def _trainer(network, given, dtype) -> Callable[[], Any]:
  """Loss, gradients and an AdamW step; parameters float32."""
  x, embeds, t = _arguments(given, "float32")
  wanted = _channels_second(given["target"], "float32")
  adamw = torch.optim.AdamW(
    network.parameters(), cases.LR, fused=DEVICE == "cuda"
  )
  mixed = contextlib.nullcontext()
  if dtype != "float32":
    mixed = torch.autocast(DEVICE, getattr(torch, dtype))

  def step():
    adamw.zero_grad()
    with mixed:
      y = network(x, embeds, t, return_dict=False)[0]
    torch.nn.functional.mse_loss(y.float(), wanted).backward()
    adamw.step()

  return step


def _sampler(network, given, dtype) -> Callable[[], torch.Tensor]:
  """DDIM with guidance, by diffusers' pipeline: latents [B, f, h, w, c]."""
  scheduler = diffusers.CogVideoXDDIMScheduler(
    beta_start=0.00085,
    beta_end=0.012,
    beta_schedule="scaled_linear",
    prediction_type="v_prediction",
    rescale_betas_zero_snr=True,
    snr_shift_scale=3.0,
    timestep_spacing="trailing",
  )
  pipe = diffusers.CogVideoXPipeline(None, None, None, network, scheduler)
  pipe.set_progress_bar_config(disable=True)
  f, h, w = given["x_t"].shape[1:4]
  latents = _channels_second(given["x_t"], dtype)
  negative, prompt = _tensor(given["embeds"], dtype)

  def sample():
    found = pipe(
      height=8 * h,
      width=8 * w,
      num_frames=4 * (f - 1) + 1,
      num_inference_steps=cases.STEPS,
      guidance_scale=cases.GUIDANCE,
      latents=latents,
      prompt_embeds=prompt[None],
      negative_prompt_embeds=negative[None],
      output_type="latent",
    ).frames
    return found.permute(0, 1, 3, 4, 2)

  return sample


def _decode(rows, scratch, dtype, ways) -> np.ndarray:
  """Time the decoder; what it gives of the inputs' latents."""
  found = cases.case(dtype, _TINY.value)
  module = _load(diffusers.AutoencoderKLCogVideoX, scratch, dtype)
  z = _tensor(cases.inputs(found)["z"], dtype).permute(0, 4, 1, 2, 3)

  @torch.no_grad()
  def run():
    return module.decode(z.contiguous()).sample.permute(0, 2, 3, 4, 1)

  for how in ways:
    if how == "compiled":
      module.decoder.compile()
    rows.attempt(f"decode {how}", functools.partial(_time, run))
  return run().float().cpu().numpy()


def _tensor(x: np.ndarray, dtype: str) -> torch.Tensor:
  return torch.tensor(x, device=DEVICE, dtype=getattr(torch, dtype))


def _channels_second(x: np.ndarray, dtype: str) -> torch.Tensor:
  """Our layout [B, f, h, w, c] to theirs, [B, f, c, h, w]."""
  return _tensor(x, dtype).permute(0, 1, 4, 2, 3).contiguous()


if __name__ == "__main__":
  app.run(main)
