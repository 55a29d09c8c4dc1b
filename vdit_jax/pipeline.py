"""Read first: the two directions of the whole system.

  TRAIN   batch -> `encoding` -> latents x0, Text -> `training.denoiser`
  SAMPLE  prompts -> tokens -> Text -> sampler over the guided denoiser
          -> latents -> decode -> video

Sampling and evaluation use `Pipeline`, which holds loaded weights; `load` makes
one from a workdir, a release of ours, or a pipeline released by others. What
differs from family to family is asked of `Modules.system`.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from vdit_jax import batches, conditioning, encoding, sampling, types
from vdit_jax.models import networks
from vdit_jax.models.system import Draw
from vdit_jax.text import prompts as texts
from vdit_jax.weights import adapters as adapter_files
from vdit_jax.weights import diffusers_folder, parts, released
from vdit_jax.weights import workdir as workdirs

RELEASE = epath.Path(__file__).parent / "packaged"  # the packaged model

Noise = batches.Noise
Size = batches.Size


@dataclasses.dataclass(frozen=True)
class Pipeline(parts.Parts):
  """Loaded weights that turn prompts into video.

  `stream` is three stages for one batch after another: `encode_text`, `sample`
  and `decode`, each of which can be called alone; `generate` collects them.
  """

  def generate(self, prompts: list[str], **asked: Any) -> np.ndarray:
    """Generate a video for each prompt, all of them at the end.

    Args:
      prompts: B texts.
      asked: what `stream` takes, by name.

    Returns:
      Video [B, F, H, W, 3], float32 in [-1, 1]; some autoencoders give a few
      frames more, which is logged.
    """
    return np.concatenate(list(self.stream(prompts, **asked)))

  def stream(
    self,
    prompts: list[str],
    *,
    num_frames: int | None = None,
    height: int | None = None,
    width: int | None = None,
    negative_prompts: list[str] | None = None,
    text: types.Text | None = None,
    frames: np.ndarray | Callable[[slice], np.ndarray] | None = None,
    frame_mask: np.ndarray | None = None,
    noise: np.ndarray | Noise | None = None,
    seed: int | Sequence[int] = 0,
    batch_size: int | None = None,
    numbers: Mapping[str, float] | None = None,
    **settings: Any,
  ) -> Iterator[np.ndarray]:
    """Generate a video for each prompt; what is not given is the recipe's.

    The call refuses what is to be refused; batches are made as asked for.

    Args:
      prompts, negative_prompts: B texts each, to lead to and away from; None
        is the recipe's, or the null. An empty one is the null, where that is
        learned.
      num_frames, height, width: of the videos, in pixels.
      text: the prompts as `encode_text` gives them, but for a learned null.
      frames, frame_mask: see `conditioning.Frames`; or what gives the frames
        of a part of the clips, asked once for each in order.
      noise: initial noise [B, f, h, w, c], or a `Noise`; None is the seeds'.
      seed: of the first clip's noise, the next clips having the next ones; or
        that of each. A clip is of its seed whatever else is in the batch, up
        to the rounding of programs for batches of several sizes.
      batch_size: clips encoded, sampled and decoded at once; None is all.
      numbers: told of the clips by name, such as motion_score, in place of
        the recipe's fps and the video's size; refused if it is not told them.
      settings: as `sampling.settle` takes them; strength below 1 edits frames.

    Yields:
      Videos of each batch, [b, F, H, W, 3], float32 in [-1, 1].

    Raises:
      ValueError: for sizes that the networks cannot take.
    """
    size, how = self.size(num_frames, height, width), self.settings(**settings)
    B = len(prompts)
    shape = B, *self.latent_shape(*size)
    encode = self._encoder(prompts, negative_prompts, text, how)
    noise = noise if isinstance(noise, Noise) else Noise(noise)
    keys = sampling.clip_keys(seed, B)
    if noise.initial is not None:
      sampling.initial_noise(keys, shape, noise.initial)  # refuses its shape
    if not callable(frames):
      conditioning.check_number(frames, frame_mask, (B, *size, 3))
    cond = self._numbers(B, size, how, numbers)
    asked = batches.Asked(
      encode, size, shape, how, frames, frame_mask, noise, keys, cond
    )
    parts = batches.parts(B, batch_size)
    return batches.make(self, asked, parts, self.modules.text_encoders)

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
      negative_prompts: B texts; None is the recipe's, or the null.
      guided: whether guidance will want the latter; None is as the recipe.
      batch_size: texts encoded at once; None is all.

    Returns:
      embeds [B, M, E] and mask [B, M]; guided [2B, ...], the prompts last.
    """
    guided = self.settings().guided if guided is None else guided
    self._check_prompts(prompts, negative_prompts, None, guided)
    return self._encode(prompts, negative_prompts, guided, batch_size)

  def _encode(
    self, prompts, negative_prompts, guided, batch_size
  ) -> types.Text:
    """Encode prompts that were checked."""
    found, own = {}, self.recipe.negative_prompt
    for name, rule in self.system.text.items():
      behind = negative_prompts or texts.behind(len(prompts), own, rule.null)
      tokens, mask = texts.encode(
        self.tokenizers[name],
        prompts,
        behind,
        self.max_lengths[name],
        learned=rule.null == "learned",
      )
      if not guided:
        tokens, mask = tokens[len(prompts) :], mask[len(prompts) :]
      module, params = self.modules[name], self.params[name]
      encoded = [
        encoding.encode_text_jit(
          module, params, tokens[rows], mask[rows], rule.padding
        )
        for rows in batches.parts(len(tokens), batch_size)
      ]
      found[name] = jax.tree.map(lambda *x: jnp.concatenate(x), *encoded)
    return self.system.join_text(found)

  def sample(
    self,
    text: types.Text,
    *,
    noise: jax.Array,
    how: sampling.Sampling | None = None,
    key: jax.Array | None = None,
    given: types.Given | None = None,
    step_noise: jax.Array | None = None,
    traced: bool = False,
  ) -> jax.Array | tuple[jax.Array, jax.Array]:
    """Sample latents of encoded prompts.

    Args:
      text: as `encode_text` gives it, of 2B rows where `how` is guided.
      noise: standard normal [B, f, h, w, c], of `latent_shape`.
      how: from `settings`; None is the recipe's.
      key: of the noise that a stochastic sampler adds, or one a clip [B].
      given: frames that are given, from `give`.
      step_noise, traced: as `sampling.sample_latents` takes them.

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
    names = [expert.network for expert in how.experts]
    denoisers = tuple(self.modules[name] for name in names)
    noise = jnp.asarray(noise)
    if how.guided and "stored" in self.system.nulls:
      text = self._stored_null(text, names[-1])  # the first that denoises
    if self.one_expert and len(set(names)) > 1:
      if traced:
        raise ValueError("traced needs all experts; load without one_expert")
      inputs = sampling.Inputs(text, noise, given, key, step_noise)
      read, free = self.params.__getitem__, self.free
      return sampling.sample_in_turn(denoisers, how, read, free, inputs)
    return sampling.sample_latents(
      denoisers,
      how,
      {name: self.params[name] for name in sorted(set(names))},
      text,
      noise,
      given,
      key,
      step_noise=step_noise,
      traced=traced,
    )

  def decode(
    self, latents: jax.Array, num_frames: int | None = None
  ) -> np.ndarray:
    """Decode latents in the autoencoder's chunks of time.

    Args:
      latents: [B, f, h, w, c].
      num_frames: of the video; what only fills up is left out, as the system
        says. None decodes all.

    Returns:
      Video [B, F, H, W, 3], near [-1, 1].
    """
    module, params = self.modules.autoencoder, self.params["autoencoder"]
    if num_frames is not None:
      latents = self.system.unfill(latents, module.latent_frames(num_frames))
    chunks = np.cumsum(module.decode_chunks(latents.shape[1]))
    state, video = module.init_stream(), []
    for chunk in np.split(latents, chunks[:-1], axis=1):
      state, frames = encoding.decode_step(
        module, params, state, jnp.asarray(chunk)
      )
      video.append(np.asarray(frames))
    whole = np.concatenate(video, axis=1)
    return whole if num_frames is None else self.system.trim(whole, num_frames)

  def encode(self, video: np.ndarray) -> jax.Array:
    """Encode video [B, F, H, W, 3] in [-1, 1] to latents (the mean)."""
    return self._apply(jnp.asarray(video), method="encode")

  def give(
    self,
    size: Size,
    shape: tuple[int, ...],
    frames: conditioning.Frames | None = None,
    *,
    draw: Draw = lambda shape: None,
  ) -> types.Given:
    """Encode given frames as the denoiser takes them; see `conditioning`."""
    given = conditioning.give(
      self.modules,
      self._apply,
      frames or conditioning.Frames(),
      size,
      shape,
      draw,
    )
    self.free("autoencoder", until=given)
    return given

  def free(self, *names: str, until: Any = None) -> None:
    """Let go of networks' weights if one is held at a time.

    Args:
      names: of the networks, as in `params`.
      until: arrays that are still being computed with them.
    """
    if self.sequential and isinstance(self.params, parts.Weights):
      jax.block_until_ready(until)
      for name in names:
        self.params.free(name)

  @property
  def restores(self) -> bool:
    """Whether frames that are given come back as they are."""
    return self.modules.takes > 0

  def size(
    self,
    num_frames: int | None = None,
    height: int | None = None,
    width: int | None = None,
  ) -> Size:
    """Settle frames, height and width; what is not given is the recipe's."""
    recipe, given = self.recipe, (num_frames, height, width)
    own = recipe.num_frames, recipe.height, recipe.width
    return tuple(b if a is None else a for a, b in zip(given, own, strict=True))  # pyright: ignore[reportReturnType]

  def latent_shape(
    self, num_frames: int, height: int, width: int
  ) -> tuple[int, int, int, int]:
    """Latents (f, h, w, c) to denoise; refuses a size that does not fit."""
    return self.system.latent_shape(self.modules, num_frames, height, width)

  def settings(self, **changes: Any) -> sampling.Sampling:
    """Settle how to sample, by `sampling.settle` from the recipe."""
    branches = self.system.branches(self.modules.denoiser.cfg)
    return sampling.settle(self.recipe, branches=branches, **changes)

  def _apply(
    self, *args: Any, method: str, network: str = "autoencoder"
  ) -> Any:
    """Run a method of a network with its weights."""
    module, params = self.modules[network], self.params[network]
    return encoding.apply(module, method, params, *map(_as_array, args))

  def _encoder(
    self, prompts, negative_prompts, text, how: sampling.Sampling
  ) -> Callable[[slice], types.Text]:
    """Check the texts; give what encodes those of some of the clips."""
    self._check_prompts(prompts, negative_prompts, text, how.guided)
    said = None if text is None else self._ready(text, len(prompts), how)

    def encode(rows: slice) -> types.Text:
      if said is not None:
        return batches.rows_of(said, rows, 1 + how.guided)
      behind = negative_prompts and negative_prompts[rows]
      own = prompts[rows]  # as many at once as there are clips
      return self._encode(own, behind, how.guided, len(own))

    return encode

  def _check_prompts(self, prompts, negative_prompts, text, guided) -> None:
    """Refuse prompts that cannot be encoded, before anything is computed."""
    texts.check(prompts, negative_prompts, text is not None)
    if text is not None:
      return
    behind = (negative_prompts or []) if guided else []
    for name, tokenizer in self.tokenizers.items():
      tokenizer.check(prompts, self.max_lengths[name])
      tokenizer.check(behind, self.max_lengths[name], "negative_prompts")

  def _ready(self, text, B, how: sampling.Sampling) -> types.Text:
    """Check prompts that came encoded; put the learned null before them."""
    learned = self.system.nulls == {"learned"}
    learned = learned and self.recipe.negative_prompt is None
    return texts.ready(text, B, how.guided, learned)

  def _numbers(self, B, size: Size, how, numbers) -> types.Cond | None:
    """Tell the denoiser numbers of the clips, if it takes any."""
    known = {"fps": self.recipe.fps, "guidance": how.guidance}
    known |= {"height": size[1], "width": size[2]}
    cfg = self.modules.denoiser.cfg
    return self.system.number_cond(cfg, B, known, dict(numbers or {}))

  def _stored_null(self, text, name) -> types.Text:
    """Put the null that lies with a denoiser's weights before the prompts."""
    prompts = jax.tree.map(lambda x: x[len(x) // 2 :], text)
    null = self.system.stored_null(self.params[name], prompts)
    return jax.tree.map(lambda *x: jnp.concatenate(x), null, prompts)


def load(
  path: epath.PathLike,
  *,
  step: int | None = None,
  param_dtype: Any = None,
  dtype: Any = None,
  sequential: bool | None = None,
  adapters: adapter_files.Given | None = None,
  tiled: bool = False,
  one_expert: bool = False,
) -> Pipeline:
  """Load a workdir's averaged weights, a release, or a released pipeline.

  Args:
    path: folder of a denoiser's run, of a release, or of a pipeline that
      others released (with model_index.json, or in a layout of its family).
    step: which checkpoint of a workdir; None is the newest.
    param_dtype: of the weights; None is as stored.
    dtype: of computations; None is what the run was trained with, and for a
      released pipeline the weights' own.
    sequential: whether weights are read when they are needed and one network
      is held at a time; None is so for a released pipeline and no other.
    adapters: of a released pipeline's networks: files of low-rank adapters,
      or their folders, summed. One is a path, a text such as "FILE:0.8" with
      what it counts, or a `weights.adapters.File`.
    tiled: whether a released autoencoder runs in overlapping tiles, as that
      of diffusers after `enable_tiling`: less memory, other numbers.
    one_expert: whether of several denoisers one is held at a time, each read
      when its steps begin; for released pipelines that are sequential.

  Raises:
    ValueError: for a folder that is none of these, or not whole; for the id
      of a model of the hub, with the command that downloads it.
  """
  diffusers_folder.check_local(path)
  dtypes = dict(param_dtype=param_dtype, dtype=dtype)
  if one_expert and sequential is False:
    raise ValueError("one_expert holds one network; leave sequential out")
  if diffusers_folder.is_one(path):
    if step is not None:
      raise ValueError(f"step is of a workdir; {path} is a released pipeline")
    found = released.read(path, adapters=adapters, **dtypes)
    if sequential is False:
      params = dict(found.params)
      found = dataclasses.replace(found, params=params, sequential=False)
    found = dataclasses.replace(found, one_expert=one_expert)
  else:
    _check_ours(path, adapters, sequential or one_expert)
    found = workdirs.read(path, step=step, **dtypes)
  if tiled:
    found = dataclasses.replace(found, modules=networks.tiled(found.modules))
  return Pipeline(**{f.name: getattr(found, f.name) for f in _FIELDS})


def _check_ours(path, adapters, sequential) -> None:
  """Refuse for a run of ours what is for released pipelines alone."""
  if adapters is not None:
    raise ValueError(
      f"adapters are for released pipelines; {path} has no model_index.json, "
      "and a workdir of adapters has its own"
    )
  if sequential:
    raise ValueError(
      f"sequential is for released pipelines, and one_expert; {path} has no "
      "model_index.json"
    )


_FIELDS = dataclasses.fields(parts.Parts)


def _as_array(x: Any) -> Any:
  return None if x is None else jnp.asarray(x)
