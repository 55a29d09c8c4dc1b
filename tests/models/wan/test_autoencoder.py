"""Wan's autoencoders: diffusers' numbers, streams, tiles, refusals."""

import copy
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.models import parity
from vdit_jax import sharding
from vdit_jax.models.wan import autoencoder, keys
from vdit_jax.nn import posterior
from vdit_jax.weights import component

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

KIND = parity.Kind(keys.AUTOENCODER)
c = 3
CONFIGS = {
  "2_1": dict(
    base_dim=4,
    z_dim=c,
    dim_mult=[1, 2, 3, 3],
    num_res_blocks=1,
    latents_mean=[0.1, -0.2, 0.3],
    latents_std=[0.5, 1.5, 2.5],
  ),
  "2_2": dict(
    base_dim=4,
    decoder_base_dim=6,
    z_dim=c,
    dim_mult=[1, 2, 2],
    temperal_downsample=[True, True],
    num_res_blocks=1,
    is_residual=True,
    in_channels=12,
    out_channels=12,
    patch_size=2,
    scale_factor_spatial=8,
    latents_mean=[0.1, -0.2, 0.3],
    latents_std=[0.5, 1.5, 2.5],
  ),
}
# Where attention's frame is not square and the video has no chunk's length.
SIZES = {"2_1": (24, 16), "2_2": (16, 24)}


class Case:
  """Both networks with the same weights."""

  def __init__(self, name, folder):
    self.name, self.config = name, CONFIGS[name]
    self.torch = diffusers.AutoencoderKLWan(**self.config).float().eval()
    # Pixels stay within [-1, 1]: diffusers clips them in training too.
    gains = {r"decoder.conv_out": 0.1, r"to_qkv": 3.0}
    self.tensors = parity.draw(self.torch.state_dict(), gains)
    self.reset()
    self.torch.save_pretrained(folder)
    self.folder, self.loaded = folder, component.load(folder)
    self.module, self.params = self.loaded.module, self.loaded.params
    cfg = self.module.cfg
    self.mean, self.std = np.array(cfg.mean), np.array(cfg.std)

  def reset(self):
    state = {k: torch.tensor(v) for k, v in self.tensors.items()}
    self.torch.load_state_dict(state)

  def video(self, frames, batch=2):
    shape = batch, frames, *SIZES[self.name], 3
    x = np.random.default_rng(0).standard_normal(shape)
    return np.tanh(x).astype(np.float32)

  def latents(self, frames, batch=2):
    stride = self.module.cfg.space_stride
    h, w = (n // stride for n in SIZES[self.name])
    x = np.random.default_rng(1).standard_normal((batch, frames, h, w, c))
    return x.astype(np.float32)

  @torch.no_grad()
  def want(self, method, x, model=None):
    """What diffusers gives: normalised moments as one, or video."""
    model = model or self.torch
    dtype = next(model.parameters()).dtype
    if method == "decode":
      z = _torch(x * self.std + self.mean, dtype)
      return _numpy(model.decode(z).sample)
    found = model.encode(_torch(x, dtype)).latent_dist
    mean, logvar = _numpy(found.mean), _numpy(found.logvar)
    mean = (mean - self.mean) / self.std
    return np.stack([mean, logvar - 2 * np.log(self.std)])


def _torch(x, dtype=torch.float32):
  return torch.from_numpy(np.moveaxis(x, -1, 1).copy()).to(dtype)


def _numpy(x):
  return np.moveaxis(x.detach().float().numpy(), 1, -1)


@functools.partial(parity.jit, static_argnums=(0, 1))
def _apply(module, method, params, x):
  """Decode, or encode to moments as one array."""
  method = {"encode": "moments"}.get(method, method)
  y = module.apply({"params": params}, x, method=method)
  return y if method == "decode" else jnp.stack(y)


@functools.partial(parity.jit, static_argnums=(0, 1))
def _step(module, method, params, state, x):
  return getattr(module, f"{method}_step")(params, state, x)


def _stream(module, method, params, x, chunks):
  state, parts = module.init_stream(), []
  assert sum(chunks) == x.shape[1]
  for chunk in np.split(x, np.cumsum(chunks)[:-1], axis=1):
    state, part = _step(module, method, params, state, chunk)
    parts.append(part)
  return np.concatenate(parts, axis=1)


@pytest.fixture(scope="module")
def cases(tmp_path_factory):
  make = lambda name: Case(name, tmp_path_factory.mktemp(name))
  return functools.cache(make)


@pytest.fixture(params=CONFIGS)
def case(request, cases):
  return cases(request.param)


@pytest.mark.parametrize("frames", [1, 5, 13])
def test_encoding_is_diffusers(frames, case):
  video = case.video(frames)
  found = _apply(case.module, "encode", case.params, video)
  assert found.shape[2] == (frames - 1) // 4 + 1
  for moment, want in zip(found, case.want("encode", video), strict=True):
    assert parity.error(moment, want) < 1e-4


@pytest.mark.parametrize("latents", [1, 2, 5])
def test_decoding_is_diffusers(latents, case):
  z = case.latents(latents)
  found = _apply(case.module, "decode", case.params, z)
  assert found.shape == (2, 4 * (latents - 1) + 1, *SIZES[case.name], 3)
  assert case.module.latent_shape(*found.shape[1:4]) == z.shape[1:]
  assert parity.error(found, case.want("decode", z)) < 1e-4


def test_pixels_are_clipped_as_released(case):
  params = jax.tree.map(lambda x: x, case.params)
  conv = params["decoder"]["conv_out"]
  conv["kernel"] = 30 * conv["kernel"]
  found = _apply(case.module, "decode", params, case.latents(2))
  assert np.abs(found).max() == 1.0


def _training(case, batch=2):
  """Videos, keys of the noise, and what two outputs are weighed with."""
  keys = jax.random.split(jax.random.key(0), batch)
  rng = np.random.default_rng(4)
  normal = lambda x: rng.standard_normal(x.shape).astype(np.float32)
  video, z = case.video(9, batch), case.latents(3, batch)
  return video, keys, normal(video), normal(z)


@functools.partial(parity.jit, static_argnums=0)
@functools.partial(jax.grad, argnums=1, has_aux=True)
def _gradients(module, params, video, keys, side_y, side_z):
  """Gradients through a sample of the posterior, and the output."""
  y, (mean, logvar) = module.apply({"params": params}, video, keys)
  return jnp.mean(y * side_y) + jnp.mean((mean + logvar) * side_z), y


def _torch_gradients(model, video, keys, side_y, side_z):
  zeros = jnp.zeros(side_z.shape)
  eps = np.asarray(posterior.sample(zeros, zeros, keys))
  model.zero_grad()
  found = model.encode(_torch(video)).latent_dist
  mean, logvar = found.mean, found.logvar
  y = model.decode(mean + found.std * _torch(eps)).sample
  assert y.abs().max() < 1
  loss = (y * _torch(side_y)).mean()
  (loss + ((mean + logvar) * _torch(side_z)).mean()).backward()
  return _numpy(y), {k: p.grad.numpy() for k, p in model.named_parameters()}


def test_training_and_its_gradients_are_diffusers(case):
  """Through a sample of the posterior; each leaf of the gradient."""
  batch = _training(case)
  want_y, want = _torch_gradients(case.torch, *batch)
  found, y = _gradients(case.module, case.params, *batch)
  assert parity.error(y, want_y) < 1e-4
  parity.check_gradients(found, KIND.params(case.module, want))


@pytest.mark.slow
def test_adamw_steps_are_torchs(case):
  batch = _training(case)
  found = parity.train(
    case.params, lambda p: _gradients(case.module, p, *batch)[0]
  )
  how = parity.LR, (0.9, 0.999)
  theirs = torch.optim.AdamW(case.torch.parameters(), *how, **parity.ADAMW)
  for _ in range(3):
    _torch_gradients(case.torch, *batch)
    theirs.step()
  final = {k: v.detach().numpy() for k, v in case.torch.state_dict().items()}
  wanted = parity.moved(KIND.params(case.module, final), case.params)
  case.reset()
  parity.check_steps(found, wanted)


@pytest.mark.parametrize("method", ["encode", "decode"])
def test_streamed_is_whole(method, case):
  """In chunks as released, and in others."""
  x = case.video(17) if method == "encode" else case.latents(5)
  whole = _apply(case.module, method, case.params, x)
  whole = whole if method == "decode" else whole[0]
  own = getattr(case.module, f"{method}_chunks")(x.shape[1])
  others = (5, 8, 4) if method == "encode" else (2, 3)
  for chunks in (own, others):
    found = _stream(case.module, method, case.params, x, chunks)
    assert parity.error(found, whole) < 1e-5


def test_state_does_not_grow(case):
  """It is two frames of each convolution; a step is compiled twice at most."""
  state, shapes = case.module.init_stream(), []
  for _ in range(4):
    run = functools.partial(case.module.decode_step, case.params)
    state, _ = jax.eval_shape(run, state, case.latents(1))
    shapes.append([leaf.shape for leaf in jax.tree.leaves(state)])
  assert all(s == shapes[0] for s in shapes)
  assert {shape[1] for shape in shapes[0]} == {2}


def test_a_longer_video_is_no_longer_program(case):
  """And holds no more than the output: all else is what chunks carry."""

  def count(latents):
    run = functools.partial(case.module.apply, method="decode")
    z = case.latents(latents)
    jaxpr = jax.make_jaxpr(run)({"params": case.params}, z).jaxpr
    scans = [e for e in jaxpr.eqns if e.primitive.name == "scan"]
    stacked = [e.outvars[-1].aval.shape for e in scans]
    assert all(shape[0] == latents - 1 for shape in stacked)
    return len(jaxpr.eqns), sum(len(e.outvars) for e in scans)

  assert count(5) == count(21)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["encode", "decode"])
def test_tiles_are_diffusers(method, case):
  """A tile of 256 pixels and one of what is left."""
  model = copy.deepcopy(case.torch)
  model.enable_tiling()
  stride = case.module.cfg.space_stride
  height, width = (320, 64) if method == "decode" else (544, 64)
  shape = 1, 1, height, width, 3
  if method == "decode":
    shape = 1, 2, height // stride, width // stride, c
  x = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
  x = np.tanh(x) if method == "encode" else x
  want = case.want(method, x, model)
  tiled = case.module.in_tiles()
  found = _apply(tiled, method, case.params, x)
  assert parity.error(found, want) < 1e-4
  plain = _apply(case.module, method, case.params, x)
  assert parity.error(plain, want) > 1e-4
  if method == "decode":
    found = _stream(tiled, method, case.params, x, (1, 1))
    assert parity.error(found, want) < 1e-4


@pytest.mark.parametrize("method", ["encode", "decode"])
def test_bfloat16_is_as_near_as_diffusers(method, case):
  x = case.video(5) if method == "encode" else case.latents(2)
  half = copy.deepcopy(case.torch).to(torch.bfloat16)
  want, theirs = case.want(method, x), case.want(method, x, half)
  module = KIND.module(case.config, "bfloat16")
  found = _apply(module, method, case.params, x)
  assert found.dtype == jnp.float32
  assert 1e-4 < parity.error(found, want) < 2 * parity.error(theirs, want)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["encode", "decode"])
def test_sharded_is_single_device(method, case):
  x = case.video(5, 8) if method == "encode" else case.latents(2, 8)
  want = _apply(case.module, method, case.params, x)
  mesh = sharding.make_mesh(sharding.MeshShape(data=2, fsdp=2, tensor=2))
  placed = sharding.shardings(mesh, KIND.component.abstract(case.module))
  x = jax.device_put(x, sharding.batch_sharding(mesh))
  with jax.set_mesh(mesh):
    params = jax.device_put(case.params, placed)
    found = _apply(case.module, method, params, x)
  assert parity.error(np.asarray(found), want) < 1e-5


_TORCH_2_2 = dict(
  base_dim=160,
  decoder_base_dim=256,
  z_dim=48,
  is_residual=True,
  in_channels=12,
  out_channels=12,
  patch_size=2,
  scale_factor_spatial=16,
  scale_factor_temporal=4,
)


@pytest.mark.parametrize("name, millions", [("2_1", 126.9), ("2_2", 704.7)])
def test_published_sizes_are_diffusers(name, millions):
  cfg = autoencoder.VARIANTS[name]
  numbers = dict(latents_mean=list(cfg.mean), latents_std=list(cfg.std))
  config = {"2_1": {}, "2_2": _TORCH_2_2 | numbers}[name]
  with torch.device("meta"):
    model = diffusers.AutoencoderKLWan(**config)
  module = KIND.module(dict(model.config), "bfloat16")
  assert module.cfg == cfg
  count = KIND.check_size(module, model)
  assert count == pytest.approx(millions * 1e6, rel=1e-3)


def test_diffusers_reads_back_what_it_wrote(case, tmp_path):
  component.save(case.loaded, tmp_path / "saved")
  model = diffusers.AutoencoderKLWan.from_pretrained(tmp_path / "saved")
  found = model.state_dict()
  assert found.keys() == case.tensors.keys()
  for key, x in case.tensors.items():
    np.testing.assert_array_equal(found[key].numpy(), x, key)
  assert {k: model.config[k] for k in case.config} == case.config


def test_the_first_latent_is_not_doubled(case):
  """Its frame is alone, and the convolution along time does not look at it."""
  z = case.latents(2)
  params = jax.tree.map(lambda x: x, case.params)
  for name, conv in params["decoder"].items():
    if name.endswith("_time"):
      conv["kernel"] = conv["kernel"] + 1.0
  one, other = (
    _apply(case.module, "decode", p, z) for p in (case.params, params)
  )
  np.testing.assert_array_equal(one[:, 0], other[:, 0])
  assert np.abs(one[:, 1:] - other[:, 1:]).max() > 1e-4
  first = _apply(case.module, "decode", case.params, z[:, :1])
  np.testing.assert_allclose(one[:, :1], first, atol=1e-5)


@pytest.mark.parametrize(
  "changes, match",
  [
    (dict(attn_scales=[1.0]), "attn_scales"),
    (dict(in_channels=4), "in_channels must be 3"),
    (dict(scale_factor_spatial=16), "scale_factor_spatial must be 8"),
    (dict(latents_mean=[0.0]), "mean must have 3"),
    (dict(temperal_downsample=[True]), "halve_time must have 3"),
    (dict(is_residual=True), "shortcuts from 2 to 3"),
    (dict(novelty=1), "novelty"),
  ],
)
def test_config_that_cannot_be_honoured_is_refused(changes, match):
  with pytest.raises(ValueError, match=match):
    KIND.module(CONFIGS["2_1"] | changes)


@pytest.mark.parametrize(
  "size, match",
  [
    ((12, 16, 16), r"num_frames must be 4n\+1, got 12; try 13"),
    ((13, 12, 16), "height must be a multiple of 8, got 12; try 16"),
    ((13, 16, 0), "width must be a multiple of 8, got 0; try 8"),
  ],
)
def test_size_that_does_not_fit_is_refused(size, match, cases):
  module = cases("2_1").module
  with pytest.raises(ValueError, match=match):
    module.latent_shape(*size)
  video = jnp.zeros((1, *size, 3))
  with pytest.raises(ValueError, match=match):
    module.apply({}, video, method="encode")


def test_tiles_have_the_released_size():
  cfg = dataclasses.replace(autoencoder.VARIANTS["2_2"], tiled=True)
  assert autoencoder.Autoencoder(cfg).in_tiles().cfg == cfg
