"""Our side: CogVideoX as functions that can be timed; see `cogvideox_torch`."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks import cogvideox_case as cases
from vdit_jax import sampling, types
from vdit_jax.models.cogvideox import system
from vdit_jax.weights import component

Run = Callable[[], jax.Array]


def changed(loaded: component.Loaded, **fields: Any) -> component.Loaded:
  """The same weights, computed in another way."""
  cfg = dataclasses.replace(loaded.module.cfg, **fields)
  return dataclasses.replace(loaded, module=loaded.module.clone(cfg=cfg))


def forward(loaded: component.Loaded, given: dict[str, np.ndarray]) -> Run:
  """One call of the denoiser: [B, f, h, w, c]."""
  apply = jax.jit(functools.partial(_apply, loaded.module))
  # PyTorch is given its parameters' type.
  dtype = loaded.module.cfg.dtype
  args = [jnp.asarray(x, dtype) for x in (given["x_t"], given["embeds"][1:])]
  return lambda: apply(loaded.params, *args)


def denoising_loss(
  loaded: component.Loaded, given: dict[str, np.ndarray]
) -> tuple[Callable[..., jax.Array], list[jax.Array]]:
  """The denoiser's loss of (params, *args), and args."""

  def loss(params, x_t, embeds, target):
    y = _apply(loaded.module, params, x_t, embeds)
    return jnp.mean((y - target) ** 2)

  args = given["x_t"], given["embeds"][1:], given["target"]
  return loss, [jnp.asarray(x) for x in args]


def trainer(
  loss: Callable[..., jax.Array], params: Any, args: list[jax.Array]
) -> Run:
  """Loss, gradients and an AdamW step: the loss. The params are used up."""
  optimiser = optax.adamw(cases.LR, weight_decay=0.01)  # torch's default

  @functools.partial(jax.jit, donate_argnums=(0, 1))
  def step(params, state, *args):
    value, grads = jax.value_and_grad(loss)(params, *args)
    updates, state = optimiser.update(grads, state, params)
    return optax.apply_updates(params, updates), state, value

  state = jax.jit(optimiser.init)(params)

  def run():
    nonlocal params, state
    params, state, value = step(params, state, *args)
    # Or its update would still run where only the loss is waited for.
    return jax.block_until_ready((value, params, state))[0]

  return run


def sampler(
  loaded: component.Loaded, given: dict[str, np.ndarray], steps: int
) -> Run:
  """DDIM with guidance as 2b is published: latents [B, f, h, w, c]."""
  recipe, dtype = system.RECIPES["2b"], loaded.module.cfg.dtype
  how = sampling.settle(recipe, steps=steps, guidance=cases.GUIDANCE)
  embeds = jnp.asarray(given["embeds"], dtype)
  text = types.Text(embeds=embeds, mask=jnp.ones(embeds.shape[:2], bool))
  noise = jnp.asarray(given["x_t"], dtype).astype(jnp.float32)
  args = (loaded.module,), how, {"denoiser": loaded.params}, text, noise
  return lambda: sampling.sample_latents(*args)


def decoder(loaded: component.Loaded, z: np.ndarray) -> Run:
  """Decode latents [B, f, h, w, c], not normalised: [B, F, H, W, 3]."""
  cfg, apply = loaded.module.cfg, _method(loaded, "decode")
  given = jnp.asarray(z, cfg.dtype) * cfg.scale
  return lambda: apply(loaded.params, given)


def encoder(loaded: component.Loaded, video: np.ndarray) -> Run:
  """Encode video [B, F, H, W, 3]: the mean, not normalised."""
  cfg, apply = loaded.module.cfg, _method(loaded, "encode")
  given = jnp.asarray(video, cfg.dtype)
  return lambda: apply(loaded.params, given) / cfg.scale


def reconstruction_loss(
  loaded: component.Loaded, video: np.ndarray
) -> tuple[Callable[..., jax.Array], list[jax.Array]]:
  """Mean square error of a video that went through the posterior's mean."""

  def loss(params, video):
    apply = functools.partial(loaded.module.apply, {"params": params})
    found = apply(apply(video, method="encode"), method="decode")
    return jnp.mean((found - video) ** 2)

  return loss, [jnp.asarray(video)]


def _method(loaded: component.Loaded, name: str) -> Callable[..., jax.Array]:
  module = loaded.module
  return jax.jit(lambda p, x: module.apply({"params": p}, x, method=name))


def _apply(module, params, x_t, embeds) -> jax.Array:
  text = types.Text(embeds=embeds, mask=jnp.ones(embeds.shape[:2], bool))
  t = jnp.full(x_t.shape[0], cases.TIME / 1000)
  return module.apply({"params": params}, x_t, t, text)
