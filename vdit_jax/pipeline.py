"""Read first: the two directions of the whole system.

  TRAIN   batch -> encode_video -> latents x0;  encode_text -> Text
  SAMPLE  prompts -> tokens -> Text -> sampler over the guided denoiser
          -> latents -> decode -> video

Training uses the functions, with params as arguments. Sampling and evaluation
use `Pipeline`, which holds loaded weights; `load` makes one from a workdir, a
release of ours, or a pipeline released by others.
"""

import dataclasses
import functools
from collections.abc import Iterable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import tqdm
from absl import logging
from etils import epath

from vdit_jax import conditioning as given_frames
from vdit_jax import sampling, types
from vdit_jax.models import networks
from vdit_jax.models.vdit import autoencoder as causal_vae
from vdit_jax.text import prompts as texts
from vdit_jax.text import tokenizer as tokenizers
from vdit_jax.weights import diffusers_folder, released, workdir
from vdit_jax.weights import text_encoder as text_encoders

RELEASE = epath.Path(__file__).parent / "packaged"  # the packaged model


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
  mean, logvar = mean.astype(jnp.float32), logvar.astype(jnp.float32)  # pyright: ignore[reportAttributeAccessIssue]
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
  module: nn.Module,
  params: Any,
  tokens: jax.Array,
  mask: jax.Array,
  sees_padding: bool = False,
) -> types.Text:
  """Encode tokens [B, M]; a row whose mask [B, M] is all False is the null.

  With `sees_padding` the network is not told the mask.
  """
  seen = None if sees_padding else mask
  embeds = module.apply({"params": params}, tokens, seen)
  return types.Text(embeds=embeds, mask=mask)


@dataclasses.dataclass(frozen=True)
class Pipeline:
  """Loaded weights that turn prompts into video.

  `generate` is three stages one after the other: `encode_text`, `sample` and
  `decode`, each of which can be called alone.

  Attributes:
    modules: the networks.
    params: weights of "autoencoder", "text_encoder" and "denoiser", a mapping
      that may read them only when they are asked for.
    tokenizer: of the prompts. It and the text encoder may be None if all
      prompts come encoded.
    recipe: how to sample when a caller does not say.
    max_length: tokens of a prompt.
    sequential: whether one network is held at a time: `generate` frees each
      before it asks for the next.
  """

  modules: networks.Modules
  params: Mapping[str, Any] = dataclasses.field(repr=False)
  tokenizer: tokenizers.Tokenizer | None = dataclasses.field(repr=False)
  recipe: types.Recipe
  max_length: int
  sequential: bool = False

  def generate(
    self,
    prompts: list[str],
    *,
    num_frames: int | None = None,
    height: int | None = None,
    width: int | None = None,
    negative_prompts: list[str] | None = None,
    text: types.Text | None = None,
    frames: np.ndarray | None = None,
    frame_mask: np.ndarray | None = None,
    noise: np.ndarray | None = None,
    image_noise: np.ndarray | None = None,
    step_noise: np.ndarray | None = None,
    seed: int = 0,
    batch_size: int | None = None,
    numbers: Mapping[str, float] | None = None,
    **settings: Any,
  ) -> np.ndarray:
    """Generate a video for each prompt; what is not given is the recipe's.

    Args:
      prompts: B texts.
      num_frames, height, width: of the videos, in pixels.
      negative_prompts: B texts that guidance leads away from; None is the
        recipe's, or the learned null.
      text: the prompts, encoded before, embeds [B, M, E] and mask [B, M]; of
        a system without a learned null what `encode_text` gave. None encodes
        them.
      frames: given frames, or a clip to edit, [B, F, H, W, 3] in [-1, 1].
      frame_mask: frames that are given and stay, bool [B, F]. Every latent
        frame must be given whole or not at all, and a released
        image-to-video model takes the first frame alone.
      noise: initial noise [B, f, h, w, c] in place of the seed's.
      image_noise: of the posterior of a first frame that a released model is
        shown, [B, 1, h, w, c] in place of the seed's.
      step_noise: see `sample`.
      seed: of the noise. The noise of a prompt depends on its place in the
        batch and on nothing else.
      batch_size: clips encoded, sampled and decoded at once; None is all.
      numbers: told of the clips to a denoiser that takes some, by name, such
        as motion_score. Of fps and size the recipe's and the video's are told
        if no others are, and the rest is left open.
      settings: steps, sampler, shift, guidance, rescale, interval, dynamic,
        strength, as `sampling.settle` takes them. A strength below 1 begins
        from `frames` noised to that time.

    Returns:
      Video [B, F, H, W, 3], float32 in [-1, 1]. A released autoencoder may
      decode some frames more than were asked for, which is logged.

    Raises:
      ValueError: for sizes the networks cannot take, and blank prompts.
    """
    size = self.size(num_frames, height, width)
    how = self.settings(**settings)
    shape = len(prompts), *self.latent_shape(*size)
    keys = jax.random.split(jax.random.key(seed), shape[0])
    noise = sampling.initial_noise(keys, shape, noise)  # pyright: ignore[reportAssignmentType]
    self._check_prompts(prompts, negative_prompts, text)
    if text is not None:
      text = texts.ready(text, len(prompts), how.guided, self.recipe)
    told = {"fps": self.recipe.fps, "height": size[1], "width": size[2]}
    cond = networks.tell(self.modules.denoiser, shape[0], told, numbers)
    given = {} if cond is None else {"cond": cond}
    given |= self._given(
      size, shape, frames, frame_mask, image_noise, how, keys
    )
    if text is None:
      text = self.encode_text(
        prompts, negative_prompts, guided=how.guided, batch_size=batch_size
      )
      self.free("text_encoder", text)
    latents = [
      self.sample(
        _rows(text, part, 1 + how.guided),
        noise=noise[part],
        how=how,
        key=jax.vmap(jax.random.fold_in, (0, None))(keys[part], 1),
        step_noise=None if step_noise is None else step_noise[:, part],
        **_rows(given, part),
      )
      for part in _bar("sample", _parts(len(prompts), batch_size))
    ]
    self.free("denoiser", latents)
    video = [self.decode(z, size[0]) for z in _bar("decode", latents)]
    video = np.concatenate(video)
    self.free("autoencoder")
    if video.shape[1] != size[0]:
      logging.warning(
        "num_frames %d comes out as %d frames", size[0], video.shape[1]
      )
    return np.clip(video, -1, 1)

  def encode_text(
    self,
    prompts: list[str],
    negative_prompts: list[str] | None = None,
    *,
    guided: bool | None = None,
    batch_size: int | None = None,
  ) -> types.Text:
    """Encode prompts, behind what guidance leads away from.

    Args:
      prompts: B texts.
      negative_prompts: B texts; None is the recipe's, or the learned null.
      guided: whether guidance will want the latter; None is as the recipe.
      batch_size: texts encoded at once; None is all.

    Returns:
      embeds [B, M, E] and mask [B, M]; guided [2B, ...], the prompts last.
    """
    self._check_prompts(prompts, negative_prompts)
    if negative_prompts is None and self.recipe.negative_prompt is not None:
      negative_prompts = [self.recipe.negative_prompt] * len(prompts)
    tokens, mask = texts.encode(
      self.tokenizer, prompts, negative_prompts, self.max_length
    )
    if not (self.settings().guided if guided is None else guided):
      tokens, mask = tokens[len(prompts) :], mask[len(prompts) :]
    module, params = self.modules.text_encoder, self.params["text_encoder"]
    encode = functools.partial(
      _encode_text, module, sees_padding=self.recipe.sees_padding
    )
    parts = _parts(len(tokens), batch_size)
    encoded = [encode(params, tokens[part], mask[part]) for part in parts]
    return jax.tree.map(lambda *x: jnp.concatenate(x), *encoded)

  def sample(
    self,
    text: types.Text,
    *,
    noise: jax.Array,
    how: sampling.Sampling | None = None,
    key: jax.Array | None = None,
    **given: Any,
  ) -> jax.Array | tuple[jax.Array, jax.Array]:
    """Sample latents of encoded prompts.

    Args:
      text: as `encode_text` gives it, of 2B rows where `how` is guided.
      noise: standard normal [B, f, h, w, c], of `latent_shape`.
      how: from `settings`; None is the recipe's.
      key: of the noise that a stochastic sampler adds, or one a clip [B].
      given: cond (from `condition`), given, given_mask, step_noise and traced,
        as `sampling.sample_latents` takes them.

    Returns:
      Latents float32 [B, f, h, w, c]; traced, also those after each step
      [steps, B, f, h, w, c].
    """
    how = self.settings() if how is None else how
    rows = noise.shape[0] * (1 + how.guided)
    if len(text.embeds) != rows:
      raise ValueError(
        f"text must have {rows} rows for noise of {noise.shape[0]} clips with "
        f"guidance {how.guidance:g}, got {len(text.embeds)}; let encode_text's "
        f"guided be {how.guided}"
      )
    module, params = self.modules.denoiser, self.params["denoiser"]
    return sampling.sample_latents(
      module, how, params, text, jnp.asarray(noise), key=key, **given
    )

  def decode(
    self, latents: jax.Array, num_frames: int | None = None
  ) -> np.ndarray:
    """Decode latents in the autoencoder's chunks of time.

    Args:
      latents: [B, f, h, w, c].
      num_frames: of the video; the first latent frames, which only fill up a
        denoiser's patches, are left out. None decodes all.

    Returns:
      Video [B, F, H, W, 3], near [-1, 1].
    """
    module, params = self.modules.autoencoder, self.params["autoencoder"]
    if num_frames is not None:
      own = -(-num_frames // module.cfg.time_stride)
      latents = latents[:, latents.shape[1] - own :]
    chunks = np.cumsum(module.decode_chunks(latents.shape[1]))
    state, video = module.init_stream(), []
    for chunk in np.split(latents, chunks[:-1], axis=1):
      state, frames = decode_step(module, params, state, jnp.asarray(chunk))
      video.append(np.asarray(frames))
    return np.concatenate(video, axis=1)

  def encode(self, video: np.ndarray) -> jax.Array:
    """Encode video [B, F, H, W, 3] in [-1, 1] to latents (the mean)."""
    return encode(self.modules.autoencoder, self.params["autoencoder"], video)

  def condition(
    self,
    frames: np.ndarray,
    frame_mask: np.ndarray,
    noise: jax.Array | None = None,
  ) -> types.Cond:
    """Make what a released denoiser is shown of given frames.

    Args:
      frames: [B, F, H, W, 3] in [-1, 1].
      frame_mask: which of them are given, bool [B, F].
      noise: standard normal [B, 1, h, w, c] that samples the posterior of the
        first frame; None takes its mean.
    """
    file = networks.file(self.modules.denoiser)
    module = self.modules.autoencoder
    show = lambda video: encode_condition(  # noqa: E731
      module, self.params["autoencoder"], jnp.asarray(video), noise
    )
    cfg = self.modules.denoiser.cfg
    return file.condition(cfg, frames, np.asarray(frame_mask), show)

  def free(self, name: str, until: Any = None) -> None:
    """Let go of a network's weights if one is held at a time.

    Args:
      name: of the network, as in `params`.
      until: arrays that are still being computed with them.
    """
    if self.sequential:
      jax.block_until_ready(until)
      self.params.free(name)  # pyright: ignore[reportAttributeAccessIssue]

  def size(
    self,
    num_frames: int | None = None,
    height: int | None = None,
    width: int | None = None,
  ) -> tuple[int, int, int]:
    """Settle frames, height and width; what is not given is the recipe's."""
    recipe, given = self.recipe, (num_frames, height, width)
    own = recipe.num_frames, recipe.height, recipe.width
    return tuple(b if a is None else a for a, b in zip(given, own, strict=True))  # pyright: ignore[reportReturnType]

  def latent_shape(
    self, num_frames: int, height: int, width: int
  ) -> tuple[int, int, int, int]:
    """Latents (f, h, w, c) to denoise; refuses a size that does not fit."""
    return networks.denoised_shape(self.modules, num_frames, height, width)

  def settings(self, **changes: Any) -> sampling.Sampling:
    """Settle how to sample, by `sampling.settle` from the recipe."""
    return sampling.settle(self.recipe, **changes)

  def _check_prompts(self, prompts, negative_prompts, text=None) -> None:
    """Refuse prompts that cannot be encoded, before anything is computed."""
    texts.check(prompts, negative_prompts, text is not None)
    if text is None:
      self.tokenizer.check(prompts, self.max_length)

  def _given(self, size, shape, frames, frame_mask, image_noise, how, keys):
    """Encode the given frames as the denoiser takes them, for `sample`."""
    if frames is None and (how.strength < 1 or frame_mask is not None):
      raise ValueError("strength < 1 and frame_mask need frames; pass frames")
    wanted = shape[0], *size, 3
    given_frames.check(frames, frame_mask, wanted)
    given = {}
    if hasattr(networks.file(self.modules.denoiser), "condition"):
      if frame_mask is None:
        frame_mask = np.zeros(wanted[:2], bool)
      keys = jax.vmap(jax.random.fold_in, (0, None))(keys, 2)
      one = shape[0], 1, *shape[2:]
      shown = (
        np.broadcast_to(np.float32(0), wanted) if frames is None else frames
      )
      drawn = sampling.initial_noise(keys, one, image_noise, "image_noise")
      given["cond"] = self.condition(shown, frame_mask, drawn)
    elif frame_mask is not None:
      stride = self.modules.autoencoder.cfg.time_stride
      given["given_mask"] = jnp.asarray(
        given_frames.latent_mask(np.asarray(frame_mask), stride)
      )
    if how.strength < 1 or "given_mask" in given:
      given["given"] = self.encode(jnp.asarray(frames))
      if given["given"].shape != shape:
        raise ValueError(
          f"frames give latents {given['given'].shape}, wanted {shape}"
        )
    self.free("autoencoder", given)
    return given


def load(
  path: epath.PathLike,
  *,
  step: int | None = None,
  param_dtype: Any = None,
  dtype: Any = None,
  sequential: bool | None = None,
  adapters: epath.PathLike | None = None,
  tiled: bool = False,
) -> Pipeline:
  """Load a workdir's averaged weights, a release, or a released pipeline.

  Args:
    path: folder of a denoiser's run, of a release, or of a pipeline of
      diffusers (with model_index.json).
    step: which checkpoint of a workdir; None is the newest.
    param_dtype: of the weights; None is as stored.
    dtype: of computations; None is what the run was trained with, and for a
      released pipeline the weights' own.
    sequential: whether weights are read when they are needed and one network
      is held at a time; None is so for a released pipeline and no other.
    adapters: of a released pipeline's denoiser: a file of low-rank adapters
      that diffusers or `vdit_jax.export` wrote, or its folder.
    tiled: whether a released autoencoder runs in overlapping tiles, as that
      of diffusers after `enable_tiling`: less memory, other numbers.

  Raises:
    ValueError: for a folder that is none of these, or not whole; for the id
      of a model of the hub, with the command that downloads it.
  """
  diffusers_folder.check_local(path)
  if diffusers_folder.is_one(path):
    if step is not None:
      raise ValueError(f"step is of a workdir; {path} is a released pipeline")
    parts = released.read(
      path, param_dtype=param_dtype, dtype=dtype, adapters=adapters
    )
    held = sequential is False
    modules = parts.modules
    return Pipeline(
      modules=networks.tiled(modules) if tiled else modules,
      params=dict(parts.params) if held else parts.params,
      tokenizer=parts.tokenizer,
      recipe=parts.recipe,
      max_length=parts.max_length,
      sequential=not held,
    )
  if adapters is not None:
    raise ValueError(
      f"adapters are for released pipelines; {path} has no model_index.json, "
      "and a workdir of adapters has its own"
    )
  if sequential:
    raise ValueError(
      f"sequential is for released pipelines; {path} has no model_index.json"
    )
  return _load_trained(epath.Path(path), step, param_dtype, dtype, tiled)


def _load_trained(path, step, param_dtype, dtype, tiled) -> Pipeline:
  """Load a workdir or a release of ours, with its text encoder."""
  config, modules, params = workdir.load(path, step=step)
  modules = networks.tiled(modules) if tiled else modules
  if folder := workdir.text_encoder_dir(config):
    made_by = config.text_encoder_fingerprint
    stored = param_dtype or config.text_encoder.dtype
    frozen = text_encoders.load(folder, stored, made_by)
    params["text_encoder"], tokenizer = frozen.params, frozen.tokenizer
  else:
    tokenizer = tokenizers.load(path / workdir.TOKENIZER_FILE)
  return Pipeline(
    modules=networks.with_dtype(modules, dtype),
    params=jax.tree.map(lambda x: jnp.asarray(x, param_dtype), params),
    tokenizer=tokenizer,
    recipe=workdir.recipe(config),
    max_length=config.data.max_length,
  )


_encode_text = jax.jit(encode_text, static_argnums=(0, 4))


@functools.partial(jax.jit, static_argnums=0)
def encode(module, params, video) -> jax.Array:
  """Encode video [B, F, H, W, 3] in [-1, 1] to latents (the mean)."""
  return module.apply({"params": params}, video, method="encode")


@functools.partial(jax.jit, static_argnums=0)
def decode_step(module, params, state, latents) -> tuple[Any, jax.Array]:
  """Decode the next latents of a stream: (state, video)."""
  return module.decode_step(params, state, latents)


@functools.partial(jax.jit, static_argnums=0)
def encode_condition(module, params, video, noise) -> jax.Array:
  """Encode a frame [B, 1, H, W, 3] as an image-to-video denoiser sees it."""
  return module.apply(
    {"params": params}, video, noise, method="encode_condition"
  )


def _bar(what: str, parts: list[Any]) -> Iterable[Any]:
  """Show the progress through several parts."""
  return tqdm.tqdm(parts, what, unit="batch", disable=len(parts) == 1)


def _parts(total: int, size: int | None) -> list[slice]:
  """Divide a batch into parts of a size; None leaves it whole."""
  if size is not None and size < 1:
    raise ValueError(f"batch_size must be at least 1, got {size}")
  size = size or total
  return [slice(i, min(i + size, total)) for i in range(0, total, size)]


def _rows(tree: Any, part: slice, times: int = 1) -> Any:
  """Take a part of a batch that stands `times` behind itself."""
  take = lambda x: [y[part] for y in jnp.split(jnp.asarray(x), times)]  # noqa: E731
  return jax.tree.map(lambda x: jnp.concatenate(take(x)), tree)
