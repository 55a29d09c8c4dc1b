"""Read first: the two directions of the whole system.

  TRAIN   batch -> encode_video -> latents x0;  encode_text -> Text
  SAMPLE  prompts -> tokens -> Text -> sampler over the guided denoiser
          -> latents -> decode -> video

Training uses the functions, with params as arguments. Sampling and evaluation
use `Pipeline`, which holds loaded weights; `load` makes one from a workdir or
a release.
"""

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from etils import epath

from vdit_jax import checkpoint, networks, sampling, trees, types
from vdit_jax import text_encoder as text_encoders
from vdit_jax.data import tokenizer as tokenizers
from vdit_jax.models import causal_vae

AUTOENCODER_FILE = "autoencoder.safetensors"
RELEASE_FILE = "model.safetensors"
TOKENIZER_FILE = "tokenizer.model"
RELEASE = epath.Path(__file__).parent / "released"  # the packaged model

CHUNK = 8  # latent frames decoded at once: bounds the decoder's memory


def to_float(video: jax.Array) -> jax.Array:
  """Convert uint8 video to float32 in [-1, 1]; the inverse of media's."""
  return video.astype(jnp.float32) / 127.5 - 1.0


def encode_video(
  modules: networks.Modules,
  params: Any,
  batch: types.Batch,
  key: jax.Array | None,
) -> jax.Array:
  """Encode a batch to latents x0 [B, f, h, w, c], gradients stopped.

  From pixels, or from the cached posterior: its mean without a key, a sample
  with a key or one for each clip [B].
  """
  if batch.moments is None:
    mean, logvar = modules.autoencoder.apply(
      {"params": params["autoencoder"]}, to_float(batch.video), method="moments"
    )
  else:
    mean, logvar = batch.moments
  mean, logvar = mean.astype(jnp.float32), logvar.astype(jnp.float32)
  if key is not None:
    mean = causal_vae.sample(mean, logvar, key)
  return jax.lax.stop_gradient(mean)


def latents_of(
  modules: networks.Modules, batch: types.Batch
) -> tuple[int, ...]:
  """Shape (f, h, w, c) of the latents of a batch's clips."""
  if batch.moments is not None:
    return batch.moments[0].shape[1:]
  return networks.latent_shape(modules.autoencoder, *batch.video.shape[1:4])


def batch_text(
  modules: networks.Modules, params: Any, batch: types.Batch
) -> types.Text:
  """Encode a batch's captions, unless it came with their embeddings."""
  if batch.embeds is not None:
    return types.Text(embeds=batch.embeds, mask=batch.mask)
  return encode_text(
    modules.text_encoder, params["text_encoder"], batch.tokens, batch.mask
  )


def encode_text(
  module: nn.Module, params: Any, tokens: jax.Array, mask: jax.Array
) -> types.Text:
  """Encode tokens [B, M]; a row whose mask [B, M] is all False is the null."""
  embeds = module.apply({"params": params}, tokens, mask)
  return types.Text(embeds=embeds, mask=mask)


@dataclasses.dataclass(frozen=True)
class Pipeline:
  """Loaded weights that turn prompts into video.

  Attributes:
    modules: the networks.
    params: weights of "autoencoder", "text_encoder" and "denoiser".
    tokenizer: of the prompts. It and the text encoder may be None if all
      prompts come encoded.
    recipe: how to sample when a caller does not say.
    max_length: tokens of a prompt.
  """

  modules: networks.Modules
  params: Any = dataclasses.field(repr=False)
  tokenizer: tokenizers.Tokenizer | None = dataclasses.field(repr=False)
  recipe: types.Recipe
  max_length: int

  def generate(
    self,
    prompts: list[str],
    *,
    num_frames: int | None = None,
    height: int | None = None,
    width: int | None = None,
    steps: int | None = None,
    guidance: float | None = None,
    rescale: float | None = None,
    interval: tuple[float, float] = (0.0, 1.0),
    sampler: str | None = None,
    shift: float | None = None,
    negative_prompts: list[str] | None = None,
    text: types.Text | None = None,
    frames: np.ndarray | None = None,
    frame_mask: np.ndarray | None = None,
    strength: float = 1.0,
    noise: np.ndarray | None = None,
    seed: int = 0,
  ) -> np.ndarray:
    """Generate a video for each prompt; what is not given is the recipe's.

    Args:
      prompts: B texts.
      num_frames, height, width: of the videos, in pixels.
      steps, sampler, shift, guidance, rescale, interval: see
        `sampling.Sampling`.
      negative_prompts: B texts that guidance leads away from; None is the
        learned null.
      text: the prompts, encoded before: embeds [B, M, E] and mask [B, M];
        None encodes them. It goes with the learned null alone.
      frames: given frames, or a clip to edit, [B, F, H, W, 3] in [-1, 1].
      frame_mask: frames that are given and stay, bool [B, F]. Every latent
        frame must be given whole or not at all.
      strength: below 1, begins from `frames` noised to that time.
      noise: initial noise [B, f, h, w, c] in place of the seed's.
      seed: of the noise. The noise of a prompt depends on its place in the
        batch and on nothing else.

    Returns:
      Video [B, F, H, W, 3], float32 in [-1, 1].

    Raises:
      ValueError: for sizes the networks cannot take, and blank prompts.
    """
    recipe = self.recipe
    size = (
      num_frames or recipe.num_frames,
      height or recipe.height,
      width or recipe.width,
    )
    how = self.settings(
      steps=steps,
      guidance=guidance,
      rescale=rescale,
      interval=interval,
      sampler=sampler,
      shift=shift,
      strength=strength,
    )
    shape = len(prompts), *self.latent_shape(*size)
    text = self._text(prompts, negative_prompts, text, how.guided)
    given, given_mask = self._given(shape, frames, frame_mask, strength)
    key = jax.random.key(seed)
    latents = sampling.sample_latents(
      self.modules.denoiser,
      how,
      self.params["denoiser"],
      text,
      sampling.initial_noise(key, shape, noise),
      given,
      given_mask,
      jax.random.fold_in(key, 1),
    )
    return np.clip(self.decode(latents), -1, 1)

  def encode(self, video: np.ndarray) -> jax.Array:
    """Encode video [B, F, H, W, 3] in [-1, 1] to latents (the mean)."""
    return encode(self.modules.autoencoder, self.params["autoencoder"], video)

  def decode(self, latents: jax.Array) -> np.ndarray:
    """Decode latents [B, f, h, w, c] in chunks of time, exactly as a whole."""
    module, params = self.modules.autoencoder, self.params["autoencoder"]
    state, video = module.init_stream(), []
    start = latents.shape[1] % CHUNK or CHUNK
    for chunk in np.split(latents, range(start, latents.shape[1], CHUNK), 1):
      state, frames = decode_step(module, params, state, jnp.asarray(chunk))
      video.append(np.asarray(frames))
    return np.concatenate(video, axis=1)

  def latent_shape(
    self, num_frames: int, height: int, width: int
  ) -> tuple[int, int, int, int]:
    """Latents (f, h, w, c) of a video; refuses a size that does not fit."""
    shape = networks.latent_shape(
      self.modules.autoencoder, num_frames, height, width
    )
    self._check_patches(shape)
    return shape

  def _check_patches(self, shape: tuple[int, int, int, int]) -> None:
    cfg, stride = self.modules.denoiser.cfg, self.modules.autoencoder.cfg
    per = stride.time_stride, stride.space_stride, stride.space_stride
    names = "num_frames", "height", "width"
    for name, n, p, s in zip(names, shape[:3], cfg.patch, per, strict=True):
      if n % p:
        near = max(round(n / p), 1) * p
        size, near = (
          ((m - 1) * s + 1 if name == "num_frames" else m * s)
          for m in (n, near)
        )
        raise ValueError(
          f"{name} {size} gives {n} latents, which patches of {p} do not "
          f"divide; try {near}"
        )

  def settings(self, **changes: Any) -> sampling.Sampling:
    """Settle how to sample, by `sampling.settle` from the recipe."""
    return sampling.settle(self.recipe, **changes)

  def _text(self, prompts, negative_prompts, text, guided: bool) -> types.Text:
    """Encode the prompts, behind the negative ones or the null if guided."""
    if text is None:
      tokens, mask = self._tokens(prompts, negative_prompts, guided)
      module, params = self.modules.text_encoder, self.params["text_encoder"]
      return _encode_text(module, params, tokens, mask)
    if negative_prompts is not None:
      raise ValueError("negative_prompts need text=None; leave one of them out")
    if len(text.embeds) != len(prompts):
      raise ValueError(
        f"text must be of the {len(prompts)} prompts, got {len(text.embeds)}"
      )
    if not guided:
      return text
    return jax.tree.map(lambda x: np.concatenate([np.zeros_like(x), x]), text)

  def _tokens(self, prompts, negative_prompts, guided: bool):
    self.tokenizer.check(prompts, self.max_length)
    tokens, mask = self.tokenizer.encode(prompts, self.max_length)
    if not guided:
      return tokens, mask
    if negative_prompts is None:
      return np.concatenate([tokens] * 2), np.concatenate([mask & False, mask])
    if len(negative_prompts) != len(prompts):
      raise ValueError(
        f"negative_prompts must be one a prompt, got {len(negative_prompts)} "
        f"for {len(prompts)}"
      )
    negative = self.tokenizer.encode(negative_prompts, self.max_length)
    pairs = zip(negative, (tokens, mask), strict=True)
    return tuple(np.concatenate(pair) for pair in pairs)

  def _given(self, shape, frames, frame_mask, strength):
    """Encode the given frames and tell which latent frames they fix."""
    B, f = shape[:2]
    if frames is None:
      if strength < 1 or frame_mask is not None:
        raise ValueError("strength < 1 and frame_mask need frames; pass frames")
      return jnp.zeros(shape), jnp.zeros((B, f), bool)
    latents = self.encode(jnp.asarray(frames))
    if latents.shape != shape:
      raise ValueError(f"frames give latents {latents.shape}, wanted {shape}")
    if frame_mask is None:
      return latents, jnp.zeros((B, f), bool)
    stride = self.modules.autoencoder.cfg.time_stride
    return latents, jnp.asarray(latent_mask(np.asarray(frame_mask), stride))


def latent_mask(frame_mask: np.ndarray, stride: int) -> np.ndarray:
  """Given latent frames [B, f] of given frames, bool [B, F = stride n + 1]."""
  rest = frame_mask[:, 1:].reshape(frame_mask.shape[0], -1, stride)
  whole = rest.all(-1)
  if (rest.any(-1) != whole).any():
    raise ValueError(
      f"frame_mask must give all {stride} frames of a latent frame or none: "
      f"frame 0 alone, then 1..{stride}, {stride + 1}..{2 * stride} and so on"
    )
  return np.concatenate([frame_mask[:, :1], whole], axis=1)


def load(path: epath.PathLike, *, step: int | None = None) -> Pipeline:
  """Load a workdir's averaged weights, or a release.

  Args:
    path: folder of a denoiser's run, or of a release.
    step: which checkpoint of a workdir; None is the newest.
  """
  path = epath.Path(path)
  config, modules, params = load_trained(path, step=step)
  if folder := text_encoder_dir(config):
    dtype, made_by = config.text_encoder.dtype, config.text_encoder_fingerprint
    frozen = text_encoders.load(folder, dtype, made_by)
    params["text_encoder"], tokenizer = frozen.params, frozen.tokenizer
  else:
    tokenizer = tokenizers.load(path / TOKENIZER_FILE)
  return Pipeline(
    modules=modules,
    params=jax.tree.map(jnp.asarray, params),
    tokenizer=tokenizer,
    recipe=recipe(config),
    max_length=config.data.max_length,
  )


def load_trained(
  path: epath.PathLike, *, step: int | None = None
) -> tuple[ml_collections.ConfigDict, networks.Modules, dict[str, Any]]:
  """Load what lies in a workdir or a release: config, modules, weights.

  The weights are all but those of a text encoder that was not trained.
  """
  path = epath.Path(path)
  config = checkpoint.read_config(path)
  if "denoiser" not in config:
    raise ValueError(
      f"{path} is the workdir of an autoencoder, which cannot sample; pass "
      "the workdir of a denoiser trained on it"
    )
  if (path / RELEASE_FILE).exists():
    params, _ = checkpoint.load_release(path / RELEASE_FILE)
  else:
    params = checkpoint.restore_params(path, "ema", step)
  params["autoencoder"], _ = checkpoint.load_release(path / AUTOENCODER_FILE)
  modules = networks.build(config)
  _check_params(modules, params, path, bool(text_encoder_dir(config)))
  return config, modules, params


def text_encoder_dir(config: ml_collections.ConfigDict) -> str:
  """Folder of the text encoder that a run does not train; "" if it does."""
  # Runs and releases older than this choice have no such key: they trained it.
  return config.text_encoder_dir if "text_encoder_dir" in config else ""


def recipe(config: ml_collections.ConfigDict) -> types.Recipe:
  """Read a config's sampling defaults."""
  fields = dict(config.sampling)
  return types.Recipe(
    denoisers=((0.0, 1.0, fields.pop("guidance")),),
    objective=config.objective.objective,
    schedule=dict(config.objective.schedule),
    **fields,
  )


def _check_params(
  modules: networks.Modules, params: Any, path: epath.Path, frozen: bool
) -> None:
  """Refuse weights that are not those of the config's networks."""

  def expected():
    key = jax.random.key(0)
    autoencoder = networks.init_autoencoder(modules.autoencoder, key)
    boxed = networks.init_denoiser(modules, key) | {"autoencoder": autoencoder}
    if frozen:
      del boxed["text_encoder"]
    return nn.meta.unbox(boxed)

  trees.check_match(
    jax.eval_shape(expected),
    params,
    f"weights in {path}",
    remedy="use the config.json that they were saved with",
  )


_encode_text = jax.jit(encode_text, static_argnums=0)


@functools.partial(jax.jit, static_argnums=0)
def encode(module, params, video):
  """Encode video [B, F, H, W, 3] in [-1, 1] to latents (the mean)."""
  return module.apply({"params": params}, video, method="encode")


@functools.partial(jax.jit, static_argnums=0)
def decode_step(module, params, state, latents):
  """Decode the next latents of a stream: (state, video)."""
  return module.decode_step(params, state, latents)
