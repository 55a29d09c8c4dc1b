"""The autoencoder: causal, streamed == whole, normalised at its border."""

import dataclasses
import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vdit_jax import sharding, trees
from vdit_jax.models.vdit import autoencoder as causal_vae
from vdit_jax.nn import posterior

CFG = causal_vae.Config(
  latent_channels=3,
  patch=2,
  channels=(4, 6, 8),
  blocks=1,
  halve_space=(True, False),
  dtype="float32",
)
SIDE = 8
F, f = 13, 4

# Most of the time is LLVM's, which need not try hard on arrays this small.
_jit = functools.partial(
  jax.jit, compiler_options={"xla_backend_optimization_level": 0}
)


def _with(**changes):
  return dataclasses.replace(CFG, **changes)


def _boxed(cfg):
  side = cfg.space_stride
  video = jnp.zeros((1, cfg.time_stride + 1, side, side, 3))
  key = jax.random.key(0)
  return jax.eval_shape(causal_vae.Autoencoder(cfg).init, key, video, key)[
    "params"
  ]


def _shapes(cfg):
  return nn.meta.unbox(_boxed(cfg))


@pytest.fixture(scope="module")
def params(randomise):
  return randomise(_shapes(CFG))


def _random(*shape, seed=0):
  return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), "f4")


def _video(batch=1, frames=F):
  return jnp.tanh(_random(batch, frames, SIDE, SIDE, 3))


def _latents(cfg=CFG, batch=1, frames=f):
  shape = causal_vae.Autoencoder(cfg).latent_shape(1, SIDE, SIDE)
  return _random(batch, frames, *shape[1:], seed=1)


@functools.partial(_jit, static_argnums=(0, 1))
def _apply(cfg, method, params, x):
  module = causal_vae.Autoencoder(cfg)
  return module.apply({"params": params}, x, method=method)


@functools.partial(_jit, static_argnums=(0, 1))
def _step(cfg, method, params, state, x):
  return getattr(causal_vae.Autoencoder(cfg), method)(params, state, x)


def _stream(cfg, method, params, x, chunks):
  """Put x through in chunks; returns the whole and each state's shapes."""
  assert sum(chunks) == x.shape[1]
  state, parts, shapes = causal_vae.Autoencoder(cfg).init_stream(), [], []
  for chunk in np.split(x, np.cumsum(chunks)[:-1], axis=1):
    state, part = _step(cfg, method, params, state, chunk)
    parts.append(part)
    shapes.append([s.shape for s in jax.tree.leaves(state)])
  return np.concatenate(parts, axis=1), shapes


def _close(a, b):
  assert a.shape == b.shape
  np.testing.assert_allclose(a, b, atol=1e-5 * np.abs(b).max())


def _changed(cfg, method, params, x):
  """Which output frames [k, j] each input frame [k] changes, at most."""
  n = x.shape[1]
  rows = jnp.concatenate([x] * (n + 1))
  k = jnp.arange(n)
  rows = rows.at[k + 1, k].add(0.5)
  y = _apply(cfg, method, params, rows)
  return np.abs(y[1:] - y[:1]).max(axis=(2, 3, 4))


def test_latents_see_no_later_frame(params):
  changed = _changed(CFG, "encode", params, _video())
  assert changed.shape == (F, f)
  for k in range(F):
    own = math.ceil(k / 4)  # latent 0 is frame 0; latent n is 4n-3..4n
    assert changed[k, :own].max(initial=0.0) == 0
    assert changed[k, own] > 1e-4


def test_frames_see_no_later_latent(params):
  changed = _changed(CFG, "decode", params, _latents())
  assert changed.shape == (f, F)
  for k in range(f):
    begin, end = max(4 * k - 3, 0), 4 * k + 1
    assert changed[k, :begin].max(initial=0.0) == 0
    assert changed[k, begin:end].min() > 1e-4


def test_image_is_a_video_of_one_frame(params):
  whole = _apply(CFG, "encode", params, _video())
  _close(_apply(CFG, "encode", params, _video()[:, :1]), whole[:, :1])
  latents = _latents()
  image = _apply(CFG, "decode", params, latents[:, :1])
  assert image.shape == (1, 1, SIDE, SIDE, 3)
  _close(image, _apply(CFG, "decode", params, latents)[:, :1])


@pytest.mark.parametrize("chunks", [(5, 4, 4), (1, 8, 4), (1, 4, 8), (13,)])
def test_streamed_encoding_is_whole(chunks, params):
  video = _video()
  y, shapes = _stream(CFG, "encode_step", params, video, chunks)
  _close(y, _apply(CFG, "encode", params, video))
  assert all(s == shapes[0] for s in shapes)


@pytest.mark.parametrize("chunks", [(1, 1, 1, 1), (2, 2), (1, 2, 1), (4,)])
def test_streamed_decoding_is_whole(chunks, params):
  latents = _latents()
  y, shapes = _stream(CFG, "decode_step", params, latents, chunks)
  _close(y, _apply(CFG, "decode", params, latents))
  assert all(s == shapes[0] for s in shapes)


def test_state_remembers_two_frames_of_a_convolution(params):
  """So its size does not know how long the video is or its chunks are."""
  _, long = _stream(CFG, "decode_step", params, _latents(), (2, 2))
  _, short = _stream(CFG, "decode_step", params, _latents(frames=1), (1,))
  assert long[-1] == short[-1]
  assert {shape[1] for shape in short[-1]} == {2}


@pytest.mark.parametrize(
  "changes",
  [
    dict(halve_time=(False, True)),
    dict(halve_time=(True, False), halve_space=(False, True)),
    dict(halve_time=(False, False), kernels=((1, 3, 3), (3, 1, 1), (3, 3, 3))),
  ],
  ids=str,
)
def test_other_strides_stream_too(changes, randomise):
  cfg = _with(**changes)
  params, n = randomise(_shapes(cfg)), cfg.time_stride
  video = _video(frames=2 * n + 1)
  latents = _apply(cfg, "encode", params, video)
  shape = causal_vae.Autoencoder(cfg).latent_shape(2 * n + 1, SIDE, SIDE)
  assert latents.shape[1:] == shape and shape[0] == 3
  y, _ = _stream(cfg, "encode_step", params, video, (1, n, n))
  _close(y, latents)
  whole = _apply(cfg, "decode", params, latents)
  assert whole.shape == video.shape
  y, _ = _stream(cfg, "decode_step", params, latents, (1, 1, 1))
  _close(y, whole)


@pytest.mark.parametrize(
  "size, match",
  [
    ((48, 64, 64), r"num_frames must be 4n\+1, got 48; try 49"),
    ((2, 64, 64), r"got 2; try 1$"),
    ((0, 64, 64), r"num_frames .* got 0; try 1$"),
    ((5, 63, 64), r"height must be a multiple of 4, got 63; try 64"),
    ((5, 64, 1), r"width must be a multiple of 4, got 1; try 4"),
  ],
)
def test_size_that_does_not_fit_is_refused(size, match):
  with pytest.raises(ValueError, match=match):
    causal_vae.Autoencoder(CFG).latent_shape(*size)


def test_nearest_size_is_taken():
  assert causal_vae.Autoencoder(CFG).latent_shape(49, 64, 4) == (13, 16, 1, 3)
  assert causal_vae.Autoencoder(CFG).latent_shape(1, 4, 4) == (1, 1, 1, 3)


def test_encoding_refuses_frames_left_over(params):
  module = causal_vae.Autoencoder(CFG)
  with pytest.raises(ValueError, match="got 4; try 5"):
    module.apply({"params": params}, _video(frames=4), method="encode")
  state, _ = jax.eval_shape(
    lambda: module.encode_step(params, module.init_stream(), _video(frames=1))
  )
  with pytest.raises(ValueError, match=r"4n\+1"):
    jax.eval_shape(
      lambda s: module.encode_step(params, s, _video(frames=5)), state
    )


def test_config_with_uneven_levels_is_refused():
  with pytest.raises(ValueError, match="3 channels .* 3 kernels and 2"):
    _with(halve_time=(True,))


@pytest.mark.parametrize("n", [1, 2, 4])
def test_channels_to_space_inverts(n):
  x = _random(2, 3, 8, 4, 5)
  y = causal_vae.space_to_channels(x, n)
  assert y.shape == (2, 3, 8 // n, 4 // n, 5 * n * n)
  np.testing.assert_array_equal(causal_vae.channels_to_space(y, n), x)
  np.testing.assert_array_equal(y[:, :, 0, 0, -5:], x[:, :, n - 1, n - 1])


@pytest.mark.parametrize("n", [1, 2, 4])
@pytest.mark.parametrize("first", [True, False])
def test_channels_to_time_inverts(n, first):
  x = _random(2, 2 * n + first, 3, 2, 5)
  y = causal_vae.time_to_channels(x, n, first)
  assert y.shape == (2, 2 + first, 3, 2, 5 * n)
  np.testing.assert_array_equal(causal_vae.channels_to_time(y, n, first), x)


def test_first_frame_stands_alone():
  x = _random(1, 5, 3, 2, 5)
  y = causal_vae.time_to_channels(x, 2, True)
  np.testing.assert_array_equal(y[:, 0], jnp.concatenate([x[:, 0]] * 2, -1))
  pair = jnp.concatenate([x[:, 1], x[:, 2]], -1)
  np.testing.assert_array_equal(y[:, 1], pair)


def test_kl_is_zero_for_a_standard_normal_alone():
  grid = jnp.linspace(-2, 2, 9)
  mean, logvar = jnp.meshgrid(grid, grid)
  kl = np.asarray(posterior.kl(mean, logvar))
  assert kl[4, 4] == 0
  assert np.delete(kl.ravel(), 40).min() > 1e-3


def test_kl_is_its_integral():
  """Sum p log(p / q) over a fine grid."""
  for mean, logvar in ((0.7, -1.0), (-1.5, 0.5), (0.0, 1.2)):
    std = math.exp(0.5 * logvar)
    x = np.linspace(mean - 12 * std, mean + 12 * std, 20_001)
    log_p = -0.5 * ((x - mean) / std) ** 2 - math.log(std)
    p = np.exp(log_p) / math.sqrt(2 * math.pi)
    want = np.sum(p * (log_p + 0.5 * x**2)) * (x[1] - x[0])
    found = posterior.kl(jnp.array(mean), jnp.array(logvar))
    np.testing.assert_allclose(found, want, rtol=1e-4)


def test_sample_has_the_posteriors_moments():
  mean, logvar = jnp.array([1.0, -2.0]), jnp.array([-3.0, 1.0])
  shape = (200_000, 2)
  x = posterior.sample(
    jnp.broadcast_to(mean, shape),
    jnp.broadcast_to(logvar, shape),
    jax.random.key(0),
  )
  std = np.exp(0.5 * np.asarray(logvar))
  np.testing.assert_allclose(x.mean(0), mean, atol=4 * std.max() / 447)
  np.testing.assert_allclose(x.std(0), std, rtol=1e-2)


def test_latents_are_normalised_at_the_border(params):
  """latent_mean and latent_std leave and enter with the latents alone."""
  mean, std = params["latent_mean"], params["latent_std"]
  raw = params | {"latent_mean": 0 * mean, "latent_std": 0 * std + 1}
  video, latents = _video(), _latents()
  raw_mean, raw_logvar = _apply(CFG, "moments", raw, video)
  found_mean, found_logvar = _apply(CFG, "moments", params, video)
  _close(found_mean, (raw_mean - mean) / std)
  _close(found_logvar, raw_logvar - 2 * jnp.log(std))
  np.testing.assert_array_equal(
    _apply(CFG, "encode", params, video), found_mean
  )
  _close(
    _apply(CFG, "decode", params, latents),
    _apply(CFG, "decode", raw, latents * std + mean),
  )


def test_sample_is_normalised_as_the_mean_is(params):
  mean, std = params["latent_mean"], params["latent_std"]
  raw = params | {"latent_mean": 0 * mean, "latent_std": 0 * std + 1}
  key = jax.random.key(0)
  x, z = (
    posterior.sample(*_apply(CFG, "moments", p, _video()), key)
    for p in (raw, params)
  )
  _close(z, (x - mean) / std)


def test_training_reconstructs_what_a_sample_decodes_to(params):
  module, key, video = causal_vae.Autoencoder(CFG), jax.random.key(0), _video()
  run = _jit(lambda p: module.apply({"params": p}, video, key))
  found, (mean, logvar) = run(params)
  z = posterior.sample(mean, logvar, key)
  z = (z - params["latent_mean"]) / params["latent_std"]
  _close(found, _apply(CFG, "decode", params, z))


def test_every_parameter_gets_a_gradient(params):
  module, key, video = causal_vae.Autoencoder(CFG), jax.random.key(0), _video()

  @_jit
  @jax.grad
  def gradient(params):
    y, moments = module.apply({"params": params}, video, key)
    return jnp.mean((y - video) ** 2) + jnp.mean(posterior.kl(*moments))

  for name, g in trees.flatten(gradient(params)).items():
    if name.startswith("latent_"):  # measured after training, not trained
      np.testing.assert_array_equal(g, 0)
    else:
      assert np.abs(g).max() > 1e-6, name


def test_bfloat16_computes_and_float32_keeps(params):
  cfg = _with(dtype="bfloat16")
  assert trees.compare(_shapes(CFG), _shapes(cfg)) == []
  y, want = (_apply(c, "decode", params, _latents()) for c in (cfg, CFG))
  assert y.dtype == jnp.float32
  error = np.linalg.norm(y - want) / np.linalg.norm(want)
  assert 1e-4 < error < 3e-2


@pytest.mark.parametrize("shape", [{"context": 8}, {"fsdp": 2, "context": 4}])
@pytest.mark.parametrize("height", [8, 9])
def test_decoding_in_strips_is_decoding(shape, height, params):
  latents = _random(1, f, height, 3, CFG.latent_channels)
  mesh = sharding.make_mesh(sharding.MeshShape(data=1, **shape))
  with jax.set_mesh(mesh):
    compiled = _apply.lower(CFG, "decode", params, latents).compile()
    found = compiled(params, latents)
  # Neighbours give each other the rows at their edges.
  assert "collective-permute" in compiled.as_text()
  _close(found, _apply(CFG, "decode", params, latents))


@pytest.mark.parametrize("variant", causal_vae.VARIANTS)
def test_variants_can_be_placed(variant):
  cfg = causal_vae.VARIANTS[variant]
  mesh = sharding.make_mesh(sharding.MeshShape(data=1, fsdp=8))
  sharding.shardings(mesh, _boxed(cfg))


def test_4x8x8_has_those_strides():
  cfg = causal_vae.VARIANTS["4x8x8"]
  assert (cfg.time_stride, cfg.space_stride) == (4, 8)
  assert causal_vae.Autoencoder(cfg).latent_shape(49, 480, 720) == (
    13,
    60,
    90,
    16,
  )
