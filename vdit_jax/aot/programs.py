"""The programs of a config that `vdit_jax.aot` compiles, described.

A training step, the sampling loop, a decoder's step, a clip's encoding, the
text encoder: the functions that train.py, sample.py and cache.py run, and
ShapeDtypeStructs for what they are given, placed on a mesh.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from vdit_jax import encoding, sampling, sharding, types
from vdit_jax.cost import flops
from vdit_jax.models import frame_positions, networks
from vdit_jax.training import learner, optim
from vdit_jax.training import state as states
from vdit_jax.weights import run_config
from vdit_jax.weights import text_encoder as text_encoders

WHAT = ("train", "sample", "decode", "encode", "text")


@dataclasses.dataclass(frozen=True)
class Clip:
  """Size of the clips, in pixels."""

  num_frames: int
  height: int
  width: int


@dataclasses.dataclass(frozen=True)
class Job:
  """A jitted function and its arguments, described.

  Attributes:
    lower: makes the program, to be called under the mesh.
    model_flops: that it cannot do without, of all devices.
    clips: that one run of it takes.
    parameters: that it is given.
    note: what one run is.
  """

  lower: Callable[[], jax.stages.Lowered]
  model_flops: int
  clips: int
  parameters: int
  note: str


def describe(
  config: ml_collections.ConfigDict,
  what: str,
  mesh: jax.sharding.Mesh,
  clip: Clip,
  clips: int,
  param_dtype: str = "bfloat16",
) -> Job:
  """Describe what to compile; call it under the mesh.

  Args:
    config: of a file in configs/.
    what: one of `WHAT`.
    mesh: of the topology's devices.
    clip: size of the clips.
    clips: in all.
    param_dtype: of the weights in sampling, decoding and encoding.
  """
  if what not in WHAT:
    raise ValueError(f"what must be one of {WHAT}, got {what!r}")
  if what == "train":
    return _train(config, mesh, clip)
  learned = learner.make(config)
  if what == "sample":
    return _sample(config, learned, mesh, clip, clips, param_dtype)
  if what == "text":
    return _text(config, learned.modules, mesh, clips, param_dtype)
  return _autoencoder(learned, what, mesh, clip, clips, param_dtype)


def _train(config, mesh, clip: Clip) -> Job:
  learned = learner.make(config)
  tx, rate = optim.make(optim.Optim(**config.optim))
  state, placed = states.describe(learned.init, tx, mesh)
  frozen = sharding.place(mesh, learned.frozen)
  batch = learner.batch(config, clip.num_frames, clip.height, clip.width)
  batch = jax.tree.map(lambda x: _struct(mesh, x, "batch"), batch)
  step = learner.make_step(config, learned.loss, tx, rate)
  loss = lambda *args: learned.loss(*args)[0]
  needed = flops.model_flops(loss, state.params, frozen, batch, _key())
  return Job(
    lower=lambda: states.jit_step(step, placed).lower(state, frozen, batch),
    model_flops=needed,
    clips=config.batch_size,
    parameters=_number(state.params),
    note=f"a training step of {_size(config, learned, clip)}",
  )


def _sample(config, learned, mesh, clip, clips, param_dtype) -> Job:
  modules = learned.modules
  denoiser, system = modules.denoiser, modules.system
  boxed = jax.eval_shape(lambda: networks.init(denoiser, jax.random.key(0)))
  weights = _cast(sharding.place(mesh, boxed), param_dtype)
  sizes = system.latent_shape(modules, *dataclasses.astuple(clip))
  branches = system.branches(denoiser.cfg)
  how = sampling.settle(run_config.recipe(config), branches=branches)
  rows = clips * (1 + how.guided)
  like = lambda *shape, dtype=jnp.float32: _struct(
    mesh, jax.ShapeDtypeStruct(shape, dtype), "batch"
  )
  text = jax.tree.map(
    lambda x: like(*x.shape, dtype=x.dtype),
    _described_text(config, modules, rows),
  )
  noise = like(clips, *sizes)
  given = None
  if positions := learner.needs(config):
    given = _given(mesh, modules, positions, clip, clips)
  names = {expert.network for expert in how.experts}
  params = dict.fromkeys(sorted(names), weights)
  denoisers = tuple(modules[expert.network] for expert in how.experts)
  run = functools.partial(sampling.sample_latents, denoisers, how)
  arrays = params, text, noise, given, _key()
  return Job(
    lower=lambda: sampling.sample_latents.lower(denoisers, how, *arrays),
    model_flops=flops.model_flops(
      lambda _, given, *args: run(*args[:3], given, args[3]),
      {},
      given,
      *arrays[:3],
      arrays[4],
    ),
    clips=clips,
    parameters=_number(params),
    note=f"{how.steps} sampling steps of {_size(config, learned, clip)}",
  )


def _described_text(config, modules, rows: int) -> types.Text:
  """Describe what a denoiser is told of texts."""
  lengths = run_config.text_lengths(config)
  found = {
    name: encoding.describe_text(module, rows, lengths[name])
    for name, module in modules.text_encoders.items()
  }
  return jax.eval_shape(modules.system.join_text, found)


def _given(mesh, modules, positions, clip, clips) -> types.Given:
  """Describe what a denoiser is shown of the frames at positions."""
  weights = jax.eval_shape(
    lambda: {
      name: networks.init(module, jax.random.key(0))
      for name, module in modules.frame_encoders.items()
    }
  )
  size = dataclasses.astuple(clip)
  mask = np.tile(frame_positions.mask(positions, clip.num_frames), (clips, 1))

  def show(weights, frames):
    apply = lambda *args, method, network="autoencoder": modules[network].apply(
      {"params": weights[network]}, *args, method=method
    )
    draw = lambda shape: jnp.zeros((clips, *shape))
    return modules.system.condition(modules, apply, frames, mask, draw)

  frames = jax.ShapeDtypeStruct((clips, *size, 3), jnp.float32)
  with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), ())):
    given = jax.eval_shape(show, nn.meta.unbox(weights), frames)
  return jax.tree.map(lambda x: _struct(mesh, x, "batch"), given)


def _text(config, modules, mesh, clips, param_dtype) -> Job:
  """Prompts and negative prompts, encoded by all text encoders."""
  encoders = modules.text_encoders
  if not encoders:
    raise ValueError(
      "what='text' needs a config with a text encoder; this one trains an "
      "autoencoder"
    )
  rows, lengths = 2 * clips, run_config.text_lengths(config)
  boxed = jax.eval_shape(
    lambda: {
      name: networks.init(module, jax.random.key(0))
      for name, module in encoders.items()
    }
  )
  params = _cast(sharding.place(mesh, boxed), param_dtype)
  texts = {
    name: tuple(
      _struct(mesh, jax.ShapeDtypeStruct((rows, lengths[name]), dtype), "batch")
      for dtype in (jnp.int32, jnp.bool_)
    )
    for name in encoders
  }

  @jax.jit
  def run(params, texts):
    apply = text_encoders.apply
    return {k: apply(encoders[k], params[k], *texts[k]) for k in encoders}

  tokens = " + ".join(str(lengths[name]) for name in encoders)
  return Job(
    lower=lambda: run.lower(params, texts),
    model_flops=flops.flops(run, params, texts),
    clips=clips,
    parameters=_number(params),
    note=f"encoding of {rows} texts of {tokens} tokens",
  )


def _autoencoder(learned, what, mesh, clip, clips, param_dtype) -> Job:
  """A decoder's largest step, or a whole clip's encoding."""
  module = learned.modules.autoencoder
  boxed = jax.eval_shape(lambda: networks.init(module, jax.random.key(0)))
  params = _cast(sharding.place(mesh, boxed), param_dtype)
  size = dataclasses.astuple(clip)
  latents = module.latent_shape(*size)
  like = lambda *shape: _struct(
    mesh, jax.ShapeDtypeStruct(shape, jnp.float32), "batch", None, "rows"
  )
  if what == "encode":
    run, static = encoding.apply, (module, "encode")
    args = (like(clips, *size, 3),)
    note = f"encoding of {clip}"
  else:
    run, static = encoding.decode_step, (module,)
    chunks = module.decode_chunks(latents[0])
    state, chunk = module.init_stream(), max(chunks)
    z = like(clips, chunk, *latents[1:])
    if chunks[0] < chunk or len(set(chunks)) == 1 < len(chunks):
      state, _ = jax.eval_shape(
        lambda p, z: module.decode_step(p, module.init_stream(), z), params, z
      )
      state = jax.tree.map(
        lambda x: _struct(mesh, x, "batch", None, "rows"), state
      )
    args, note = (state, z), f"{chunk} of {latents[0]} latent frames decoded"
  return Job(
    lower=lambda: run.lower(*static, params, *args),
    model_flops=flops.flops(lambda *a: run(*static, *a), params, *args),
    clips=clips,
    parameters=_number(params),
    note=note,
  )


def _struct(mesh, x: jax.ShapeDtypeStruct, *names) -> jax.ShapeDtypeStruct:
  """Split an array's first axes over the mesh, where they divide."""
  sizes = dict(mesh.shape)

  def parts(axes) -> int:
    axes = (axes,) if isinstance(axes, str) else axes or ()
    return int(np.prod([sizes[axis] for axis in axes]))

  split = [
    axes if n % parts(axes) == 0 else None
    for n, axes in zip(x.shape, sharding.spec(names[: x.ndim]), strict=False)
  ]
  placed = jax.sharding.NamedSharding(mesh, jax.P(*split))
  return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=placed)


def _cast(tree: Any, dtype: str) -> Any:
  return jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, dtype, sharding=x.sharding), tree
  )


def _key() -> Any:
  return jax.eval_shape(lambda: jax.random.key(0))


def _number(params: Any) -> int:
  return sum(x.size for x in jax.tree.leaves(nn.meta.unbox(params)))


def _size(config, learned: learner.Learner, clip: Clip) -> str:
  """A clip in words: pixels, and tokens where there is a denoiser."""
  text = f"{clip.num_frames}x{clip.height}x{clip.width}"
  if learned.modules.denoiser is None:
    return text
  latents = learned.modules.autoencoder.latent_shape(*dataclasses.astuple(clip))
  tokens = learner.tokens(learned.modules, latents)
  M = _described_text(config, learned.modules, 1).embeds.shape[1]
  return f"{text}, {tokens} + {M} tokens"
