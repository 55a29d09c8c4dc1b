"""PyTorch's side: diffusers' CogVideoX as functions that can be timed.

What goes in and comes out is in our layout, channels last. Type and device are
the network's.
"""

import contextlib
from collections.abc import Callable
from typing import Any

import diffusers
import numpy as np
import torch

from benchmarks import cogvideox_case as cases

Run = Callable[[], torch.Tensor]
Network = Any  # a torch.nn.Module, whose attributes are of any type


def build(
  kind: type[Network],
  config: dict[str, Any],
  dtype: str = "float32",
  device: str = "cpu",
) -> Network:
  """Make one of diffusers' networks, every parameter random."""
  with torch.device(device):
    module = kind(**config).to(getattr(torch, dtype))
  return draw(module).eval()


def draw(module: Network, seed: int = 0) -> Network:
  """Draw every parameter as a trained one might be."""
  device = next(module.parameters()).device
  generator = torch.Generator(device).manual_seed(seed)
  with torch.no_grad():
    for name, p in module.named_parameters():
      p.normal_(generator=generator)
      if p.ndim > 1:
        p.div_(p[0].numel() ** 0.5)
      else:
        p.mul_(0.1).add_(float(name.endswith("weight")))
  return module


def forward(network: Network, given: dict[str, np.ndarray]) -> Run:
  """One call of the denoiser: [B, f, h, w, c]."""
  arguments = _arguments(network, given)

  @torch.no_grad()
  def run():
    return network(**arguments)[0].permute(0, 1, 3, 4, 2)

  return run


def denoising_loss(
  network: Network, given: dict[str, np.ndarray], dtype: str
) -> Run:
  """The denoiser's loss, computed in a type, the parameters in theirs."""
  arguments = _arguments(network, given)
  wanted = _channels_second(network, given["target"]).float()
  mixed = contextlib.nullcontext()
  if dtype != "float32":
    mixed = torch.autocast(network.device.type, getattr(torch, dtype))

  def loss():
    with mixed:
      y = network(**arguments)[0]
    return torch.nn.functional.mse_loss(y.float(), wanted)

  return loss


def trainer(network: Network, loss: Run) -> Run:
  """Loss, gradients and an AdamW step: the loss."""
  # On the CPU too the fused one is the faster.
  adamw = torch.optim.AdamW(network.parameters(), cases.LR, fused=True)

  def step():
    adamw.zero_grad()
    value = loss()
    value.backward()
    adamw.step()
    return value.detach()

  return step


def sampler(network: Network, given: dict[str, np.ndarray], steps: int) -> Run:
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
  latents = _channels_second(network, given["x_t"])
  negative, prompt = _tensor(network, given["embeds"])

  def run():
    output: Any = pipe(
      height=8 * h,
      width=8 * w,
      num_frames=4 * (f - 1) + 1,
      num_inference_steps=steps,
      guidance_scale=cases.GUIDANCE,
      latents=latents,
      prompt_embeds=prompt[None],
      negative_prompt_embeds=negative[None],
      output_type="latent",
    )
    return output.frames.permute(0, 1, 3, 4, 2)

  return run


def decoder(vae: Network, z: np.ndarray) -> Run:
  """Decode latents [B, f, h, w, c], not normalised: [B, F, H, W, 3]."""
  given = _channels_first(vae, z)

  @torch.no_grad()
  def run():
    return vae.decode(given).sample.permute(0, 2, 3, 4, 1)

  return run


def encoder(vae: Network, video: np.ndarray) -> Run:
  """Encode video [B, F, H, W, 3]: the mean, not normalised."""
  given = _channels_first(vae, video)

  @torch.no_grad()
  def run():
    return vae.encode(given).latent_dist.mean.permute(0, 2, 3, 4, 1)

  return run


def reconstruction_loss(vae: Network, video: np.ndarray) -> Run:
  """Mean square error of a video that went through the posterior's mean."""
  given = _channels_first(vae, video)

  def loss():
    found = vae.decode(vae.encode(given).latent_dist.mean).sample
    return torch.nn.functional.mse_loss(found, given)

  return loss


def _arguments(network, given) -> dict[str, Any]:
  """A denoiser's, with the rotary positions that the pipeline makes."""
  f, h, w = given["x_t"].shape[1:4]
  rotary = None
  if network.config.use_rotary_positional_embeddings:
    pipe = diffusers.CogVideoXPipeline(None, None, None, network, None)
    rotary = pipe._prepare_rotary_positional_embeddings(
      8 * h, 8 * w, f, network.device
    )
  return dict(
    hidden_states=_channels_second(network, given["x_t"]),
    encoder_hidden_states=_tensor(network, given["embeds"][1:]),
    timestep=torch.tensor([cases.TIME], device=network.device),
    image_rotary_emb=rotary,
    return_dict=False,
  )


def _tensor(network, x: np.ndarray) -> torch.Tensor:
  return torch.tensor(x, device=network.device, dtype=network.dtype)


def _channels_second(network, x: np.ndarray) -> torch.Tensor:
  """Our layout [B, f, h, w, c] to the denoiser's, [B, f, c, h, w]."""
  return _tensor(network, x).permute(0, 1, 4, 2, 3).contiguous()


def _channels_first(network, x: np.ndarray) -> torch.Tensor:
  """Our layout [B, F, H, W, C] to the autoencoder's, [B, C, F, H, W]."""
  return _tensor(network, x).permute(0, 4, 1, 2, 3).contiguous()
