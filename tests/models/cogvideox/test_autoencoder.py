"""CogVideoX's autoencoder: diffusers' numbers, chunks, tiles, refusals."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from vdit_jax import sharding, trees
from vdit_jax.convert import rules
from vdit_jax.models.cogvideox import autoencoder as cogvideox_vae
from vdit_jax.models.cogvideox.keys import AUTOENCODER as COMPONENT
from vdit_jax.nn import posterior

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

CONFIG = dict(  # its eps is not that of the norms which do not heed it
  block_out_channels=(8, 8, 16, 16),
  latent_channels=3,
  layers_per_block=1,
  norm_num_groups=4,
  norm_eps=1e-5,
  scaling_factor=0.7,
)
H, W, h, w, c = 24, 16, 3, 2, 3
# Two levels, which compile sooner, and tiles of 4 x 3 latents.
SMALL = CONFIG | dict(
  block_out_channels=(8, 16),
  temporal_compression_ratio=2,
  sample_height=16,
  sample_width=12,
)
OVERLAP = (1 / 4, 1 / 3)

# Most of the time is LLVM's, which need not try hard on arrays this small.
_jit = functools.partial(
  jax.jit, compiler_options={"xla_backend_optimization_level": 0}
)


def _random(*shape, seed=0):
  return np.random.default_rng(seed).standard_normal(shape).astype("f4")


def _fill(model, least=0.03):
  """Give every parameter a value of its own.

  What a norm gets is small, so that its eps counts.
  """
  rng = np.random.default_rng(0)
  with torch.no_grad():
    for name, p in model.named_parameters():
      x = rng.standard_normal(tuple(p.shape))
      small = 1 if "conv_y" in name or "conv_b" in name else least
      if p.ndim > 1:
        x *= small / np.sqrt(np.prod(p.shape[1:]))
      elif "norm" in name and "conv" not in name:
        x = 0.3 * x + name.endswith("weight")
      else:
        x *= 0.3 * small
      p.copy_(torch.from_numpy(x))
  return model.eval()


def _types(config):
  levels = len(config["block_out_channels"])
  return {
    f"{way.lower()}_block_types": (f"CogVideoX{way}Block3D",) * levels
    for way in ("Down", "Up")
  }


def _model(config):
  return diffusers.AutoencoderKLCogVideoX(**config, **_types(config))


def _module(config=CONFIG, dtype="float32", **changes):
  config = config | _types(config)
  cfg = COMPONENT.build(config, np.dtype(jnp.dtype(dtype))).cfg
  return cogvideox_vae.Autoencoder(dataclasses.replace(cfg, **changes))


MODULE = _module()
TILED = _module(SMALL, tiled=True, tile_overlap=OVERLAP)
CFG = MODULE.cfg


def _convert(module, tensors):
  """Params of torch's tensors, by key, through the table."""
  found = {k: x.detach().numpy() for k, x in tensors.items()}
  shapes = trees.flatten(nn.meta.unbox(COMPONENT.abstract(module)))
  slots = rules.check(COMPONENT.rules(module), shapes, found).values()
  return trees.unflatten(
    {s.path: jnp.asarray(s.transform.forward(found[s.key])) for s in slots}
  )


@pytest.fixture(scope="module")
def model():
  return _fill(_model(CONFIG))


@pytest.fixture(scope="module")
def params(model):
  return _convert(MODULE, model.state_dict())


@pytest.fixture(scope="module")
def tiled_model():
  model = _fill(_model(SMALL))
  height, width = OVERLAP
  model.enable_tiling(
    tile_overlap_factor_height=height, tile_overlap_factor_width=width
  )
  return model


@pytest.fixture(scope="module")
def tiled_params(tiled_model):
  return _convert(TILED, tiled_model.state_dict())


def _video(frames, height=H, width=W, batch=2):
  return np.tanh(_random(batch, frames, height, width, 3))


def _latents(frames, height=h, width=w, batch=2):
  return _random(batch, frames, height, width, c, seed=1)


def _torch(x, dtype=torch.float32):
  return torch.from_numpy(np.moveaxis(x, -1, 1).copy()).to(dtype)


def _numpy(x):
  return np.moveaxis(x.detach().float().numpy(), 1, -1)


@torch.no_grad()
def _want(model, method, x):
  """What diffusers gives, its scale put in: moments as one, or video."""
  dtype, scale = next(model.parameters()).dtype, CFG.scale
  if method == "decode":
    return _numpy(model.decode(_torch(x / scale, dtype)).sample)
  found = model.encode(_torch(x, dtype)).latent_dist
  mean, logvar = _numpy(found.mean), _numpy(found.logvar)
  return np.stack([mean * scale, logvar + 2 * np.log(scale)])


@functools.partial(_jit, static_argnums=(0, 1))
def _apply(module, method, params, x):
  """Decode, or encode to moments as one array."""
  method = {"encode": "moments"}.get(method, method)
  y = module.apply({"params": params}, x, method=method)
  return y if method == "decode" else jnp.stack(y)


@functools.partial(_jit, static_argnums=(0, 1))
def _step(module, method, params, state, x):
  return getattr(module, f"{method}_step")(params, state, x)


def _stream(module, method, params, x):
  state, parts = module.init_stream(), []
  chunks = getattr(module, f"{method}_chunks")(x.shape[1])
  assert sum(chunks) == x.shape[1]
  for chunk in np.split(x, np.cumsum(chunks)[:-1], axis=1):
    state, part = _step(module, method, params, state, chunk)
    parts.append(part)
  return np.concatenate(parts, axis=1)


def _error(found, want):
  assert found.shape == want.shape
  assert np.isfinite(found).all()
  return np.linalg.norm(found - want) / np.linalg.norm(want)


# One frame, an even chunk, an odd first chunk before others.
@pytest.mark.parametrize("frames", [1, 14, 25])
def test_encoding_is_diffusers(frames, model, params):
  video = _video(frames)
  found = _apply(MODULE, "encode", params, video)
  assert found.shape[2:] == (-(-frames // 4), h, w, c)
  for moment, want in zip(found, _want(model, "encode", video), strict=True):
    assert _error(moment, want) < 1e-4


@pytest.mark.parametrize("latents", [1, 6, 7])
def test_decoding_is_diffusers(latents, model, params):
  """An even number of latents gives 4 frames each, an odd one 3 fewer."""
  z, odd = _latents(latents), latents % 2
  found = _apply(MODULE, "decode", params, z)
  frames = 4 * (latents - odd) + odd
  assert found.shape == (2, frames, H, W, 3)
  shape = cogvideox_vae.Autoencoder(CFG).latent_shape(frames, H, W)
  assert shape == z.shape[1:]
  assert _error(found, _want(model, "decode", z)) < 1e-4


@pytest.fixture
def fixed(monkeypatch):
  """Let the encoder give this (mean, logvar), whatever it is shown."""
  moments = _random(1, 2, h, w, c), _random(1, 2, h, w, c, seed=1)
  moments = tuple(map(jnp.asarray, moments))
  monkeypatch.setattr(
    cogvideox_vae.Autoencoder, "_moments", lambda self, video: moments
  )
  return moments


def test_latents_are_scaled_at_the_border(fixed):
  mean, logvar = MODULE.apply({}, _video(1), method="moments")
  assert _error(mean, fixed[0] * CFG.scale) < 1e-6
  found = MODULE.apply({}, _video(1), method="encode")
  np.testing.assert_array_equal(found, mean)
  key = jax.random.key(0)
  found = MODULE.apply({}, _video(1), key, method="encode")
  assert _error(found, posterior.sample(*fixed, key) * CFG.scale) < 1e-6
  assert _error(found, posterior.sample(mean, logvar, key)) < 1e-6


@pytest.mark.parametrize("inverted", [False, True])
def test_images_latents_are_divided_where_released_so(inverted, fixed):
  module = _module(invert_scale_latents=inverted)
  want = fixed[0] / CFG.scale if inverted else fixed[0] * CFG.scale
  found = module.apply({}, _video(1), method="encode_condition")
  assert _error(found, want) < 1e-6


def _training(batch):
  """Videos, keys of the noise, and what two outputs are weighed with."""
  keys = jax.random.split(jax.random.key(0), batch)
  sides = _random(batch, 17, H, W, 3, seed=4), _random(batch, 5, h, w, c)
  return _video(17, batch=batch), keys, *sides


@_jit
@functools.partial(jax.grad, has_aux=True)
def _gradients(params, video, keys, side_y, side_z):
  """Gradients through a sample of the posterior, and the output."""
  y, (mean, logvar) = MODULE.apply({"params": params}, video, keys)
  return jnp.mean(y * side_y) + jnp.mean((mean + logvar) * side_z), y


def _torch_gradients(model, video, keys, side_y, side_z):
  zeros = jnp.zeros(side_z.shape)
  eps = np.asarray(posterior.sample(zeros, zeros, keys))
  model.zero_grad()
  found = model.encode(_torch(video)).latent_dist
  mean, logvar = found.mean, found.logvar
  y = model.decode(mean + found.std * _torch(eps)).sample
  loss = (y * _torch(side_y)).mean()
  (loss + ((mean + logvar) * _torch(side_z)).mean()).backward()
  return _numpy(y), {k: p.grad for k, p in model.named_parameters()}


def test_training_and_its_gradients_are_diffusers(model, params):
  """Through a sample of the posterior; each leaf of the gradient."""
  batch = _training(2)
  want_y, want = _torch_gradients(model, *batch)
  want = trees.flatten(_convert(MODULE, want))
  found, found_y = _gradients(params, *batch)
  assert _error(found_y, want_y) < 1e-4
  found = trees.flatten(found)
  errors = {name: _error(found[name], g) for name, g in want.items()}
  assert {k: e for k, e in errors.items() if not e < 1e-4} == {}


@pytest.mark.slow
def test_adamw_steps_are_torchs():
  """Each leaf moves as far: the difference is small in learning rates."""
  # A step must be small beside the weights, or rounding grows with each one.
  model, batch, lr = _fill(_model(CONFIG), least=1), _training(2), 1e-3
  params = start = _convert(MODULE, model.state_dict())
  how = dict(eps=1e-4, weight_decay=0.1)
  optimiser = optax.adamw(lr, b1=0.9, b2=0.999, **how)
  theirs = torch.optim.AdamW(model.parameters(), lr, (0.9, 0.999), **how)
  state, update = optimiser.init(params), _jit(optimiser.update)
  for _ in range(3):
    grads, _ = _gradients(params, *batch)
    updates, state = update(grads, state, params)
    params = optax.apply_updates(params, updates)
    _torch_gradients(model, *batch)
    theirs.step()
  moved, wanted = (
    trees.flatten(jax.tree.map(lambda x, y: np.asarray(x - y) / lr, p, start))
    for p in (params, _convert(MODULE, model.state_dict()))
  )
  for path, step in wanted.items():
    assert np.abs(step).max() > 0.05, path
    assert np.abs(moved[path] - step).max() <= 1e-3, path


@pytest.mark.parametrize(
  "method, x", [("encode", _video(25)), ("decode", _latents(7))]
)
def test_streamed_is_whole(method, x, params):
  whole = _apply(MODULE, method, params, x)
  whole = whole if method == "decode" else whole[0]
  assert _error(_stream(MODULE, method, params, x), whole) < 1e-5


def test_state_does_not_grow(params):
  """It is two frames of each convolution; a step is compiled twice at most."""
  chunks = [_latents(n) for n in MODULE.decode_chunks(9)]
  state, shapes = MODULE.init_stream(), []
  for chunk in chunks:
    run = functools.partial(MODULE.decode_step, params)
    state, _ = jax.eval_shape(run, state, chunk)
    shapes.append([leaf.shape for leaf in jax.tree.leaves(state)])
  assert all(s == shapes[0] for s in shapes)
  assert {shape[1] for shape in shapes[0]} == {2}


def test_a_longer_video_is_no_longer_program(params):
  """And holds no more than the output: all else is what chunks carry."""

  def count(latents):
    run = functools.partial(MODULE.apply, method="decode")
    jaxpr = jax.make_jaxpr(run)({"params": params}, _latents(latents)).jaxpr
    scans = [e for e in jaxpr.eqns if e.primitive.name == "scan"]
    outputs = [v.aval.shape for e in scans for v in e.outvars]
    length = (latents - 3) // 2
    stacked = [shape for shape in outputs if shape[0] == length]
    assert stacked == [(length, 2, 8, H, W, 3)]
    return len(jaxpr.eqns), len(outputs)

  assert count(5) == count(21)


def test_tiled_encoding_is_diffusers(tiled_model, tiled_params):
  """Tiles of four sizes; those of the last row have less than a blend."""
  video = _video(5, 14, 8)
  want = _want(tiled_model, "encode", video)
  found = _apply(TILED, "encode", tiled_params, video)
  assert _error(found, want) < 1e-4
  tiled_model.use_tiling = False
  plain = _want(tiled_model, "encode", video)
  tiled_model.use_tiling = True
  assert _error(plain, want) > 1e-2


@pytest.mark.slow
def test_tiled_decoding_is_diffusers_and_streams(tiled_model, tiled_params):
  latents = _latents(5, 5, 2)
  want = _want(tiled_model, "decode", latents)
  found = _apply(TILED, "decode", tiled_params, latents)
  assert _error(found, want) < 1e-4
  found = _stream(TILED, "decode", tiled_params, latents)
  assert _error(found, want) < 1e-4


def test_video_of_one_tile_has_no_tiles(tiled_params):
  step = functools.partial(TILED.decode_step, tiled_params)
  for width, sizes in ((3, {"whole"}), (4, {"4x3", "4x2", "1x3", "1x2"})):
    z = _latents(1, 4, width)
    state, _ = jax.eval_shape(step, TILED.init_stream(), z)
    assert set(state.past) == sizes


@pytest.mark.parametrize(
  "changes, match",
  [
    (dict(tile_overlap=(1 / 4, 1 / 6)), "width must be a whole .* try 1/3"),
    (dict(tile_overlap=(0.3, 1 / 3)), "height must be .* got 0.3; try 1/4"),
    (
      dict(tile=(15, 12)),
      "tile height must be a multiple of 2, got 15; try 16",
    ),
    (dict(tile=(16, 0)), "tile width must be a multiple of 2, got 0; try 2"),
  ],
)
def test_uneven_tiles_are_refused(changes, match):
  with pytest.raises(ValueError, match=match):
    dataclasses.replace(TILED.cfg, **changes)
  dataclasses.replace(TILED.cfg, tiled=False, **changes)


def test_uneven_tiles_have_wrong_sizes_in_diffusers():
  model = _model(SMALL)
  model.enable_tiling(tile_overlap_factor_width=1 / 6)
  assert _want(model, "decode", _latents(1, 3, 7)).shape[3] != 7 * 2


def test_released_tiles_are_even():
  for cfg in cogvideox_vae.VARIANTS.values():
    dataclasses.replace(cfg, tiled=True)


@pytest.mark.parametrize("method", ["encode", "decode"])
def test_bfloat16_is_as_near_as_diffusers(method, model, params):
  x = _video(9) if method == "encode" else _latents(3)
  found = _apply(_module(dtype="bfloat16"), method, params, x)
  assert found.dtype == jnp.float32
  want = _want(model, method, x)
  half = _model(CONFIG)
  half.load_state_dict(model.state_dict())
  theirs = _error(_want(half.to(torch.bfloat16), method, x), want)
  assert 1e-4 < _error(found, want) < 2 * theirs


@pytest.mark.parametrize(
  "method, frames, make", [("encode", 25, _video), ("decode", 1, _latents)]
)
def test_sharded_is_single_device(method, frames, make, params):
  x = make(frames, batch=8)
  pairs = [_apply(MODULE, method, params, p) for p in np.split(x, 4)]
  batch = 0 if method == "decode" else 1
  want = np.concatenate(pairs, batch)
  mesh = sharding.make_mesh(sharding.MeshShape(data=2, fsdp=4))
  placed = sharding.shardings(mesh, COMPONENT.abstract(MODULE))
  x = jax.device_put(x, sharding.batch_sharding(mesh))
  with jax.set_mesh(mesh):
    found = _apply(MODULE, method, jax.device_put(params, placed), x)
  shard = found.sharding.shard_shape(found.shape)
  assert shard[batch] == 1
  assert _error(np.asarray(found), want) < 1e-5


@pytest.mark.slow
def test_sharded_gradients_are_single_device(params):
  """Those of a mean over 8 videos: the mean of the gradients of pairs."""
  batch = _training(8)
  pairs = [
    _gradients(params, *(x[i : i + 2] for x in batch)) for i in range(0, 8, 2)
  ]
  want = jax.tree.map(lambda *g: sum(g) / 4, *(grads for grads, _ in pairs))
  mesh = sharding.make_mesh(sharding.MeshShape(data=2, fsdp=4))
  placed = sharding.shardings(mesh, COMPONENT.abstract(MODULE))
  batch = jax.device_put(batch, sharding.batch_sharding(mesh))
  with jax.set_mesh(mesh):
    found, y = _gradients(jax.device_put(params, placed), *batch)
  assert y.sharding.shard_shape(y.shape)[0] == 1
  assert _error(np.asarray(y), np.concatenate([y for _, y in pairs])) < 1e-5
  found, want = trees.flatten(found), trees.flatten(want)
  errors = {k: _error(np.asarray(found[k]), g) for k, g in want.items()}
  assert {k: e for k, e in errors.items() if not e <= 1e-5} == {}


def test_published_config_has_every_key():
  """Exactly once, each of its shape; the versions share one network."""
  with torch.device("meta"):
    model = diffusers.AutoencoderKLCogVideoX()
  module = COMPONENT.build(dict(model.config), np.dtype(jnp.bfloat16))
  assert module.cfg == cogvideox_vae.VARIANTS["2b"]
  like = lambda p: jax.ShapeDtypeStruct(tuple(p.shape), jnp.bfloat16)
  found = {k: like(p) for k, p in model.state_dict().items()}
  boxed = COMPONENT.abstract(module)
  shapes = nn.meta.unbox(boxed)
  flat = trees.flatten(shapes)
  slots = rules.check(COMPONENT.rules(module), flat, found)
  assert set(slots) == set(found)
  assert {s.path for s in slots.values()} == set(flat)
  assert trees.count(shapes) == sum(p.numel() for p in model.parameters())
  mesh = sharding.make_mesh(sharding.MeshShape(data=1, fsdp=8))
  sharding.shardings(mesh, boxed)
  for cfg in cogvideox_vae.VARIANTS.values():
    same = dataclasses.replace(
      cfg, scale=module.cfg.scale, invert_scale_latents=False
    )
    assert same == module.cfg


def test_table_goes_back_to_the_bit(model, params):
  flat = trees.flatten(params)
  slots = rules.keys(COMPONENT.rules(MODULE), flat)
  for key, tensor in model.state_dict().items():
    slot = slots[key]
    found = slot.transform.inverse(np.asarray(flat[slot.path]))
    np.testing.assert_array_equal(found, tensor.numpy())


def test_config_is_read_field_by_field():
  given = dict(
    _class_name="AutoencoderKLCogVideoX",
    block_out_channels=[8, 16],
    down_block_types=["CogVideoXDownBlock3D"] * 2,
    up_block_types=["CogVideoXUpBlock3D"] * 2,
    latent_channels=5,
    layers_per_block=2,
    norm_num_groups=2,
    norm_eps=1e-3,
    temporal_compression_ratio=2,
    sample_height=96,
    sample_width=64,
    scaling_factor=0.5,
    invert_scale_latents=True,
    mid_block_add_attention=True,
  )
  found = COMPONENT.build(given, np.dtype(jnp.bfloat16)).cfg
  assert found == cogvideox_vae.Config(
    latent_channels=5,
    channels=(8, 16),
    blocks=2,
    groups=2,
    eps=1e-3,
    time_stride=2,
    scale=0.5,
    invert_scale_latents=True,
    tile=(48, 32),
    dtype="bfloat16",
  )


@pytest.mark.parametrize(
  "field, value",
  [
    ("use_quant_conv", True),
    ("act_fn", "gelu"),
    ("latents_mean", [0.0]),
    ("novelty", 1),
    ("down_block_types", ["Other"] * 4),
    ("up_block_types", ["CogVideoXUpBlock3D"] * 3),
  ],
)
def test_config_that_cannot_be_honoured_is_refused(field, value):
  with pytest.raises(ValueError, match=field):
    COMPONENT.build(CONFIG | {field: value}, np.dtype("f4"))


@pytest.mark.parametrize(
  "size, match",
  [
    ((13, 16, 16), r"num_frames must be 8n or 8n\+1, got 13; try 16"),
    ((11, 16, 16), "got 11; try 9"),
    ((0, 16, 16), "got 0; try 1$"),
    ((9, 12, 16), "height must be a multiple of 8, got 12; try 16"),
    ((9, 16, 1), "width must be a multiple of 8, got 1; try 8"),
  ],
)
def test_size_that_does_not_come_back_is_refused(size, match):
  with pytest.raises(ValueError, match=match):
    cogvideox_vae.Autoencoder(CFG).latent_shape(*size)


def test_latent_shapes_of_the_releases():
  shape = cogvideox_vae.Autoencoder(cogvideox_vae.VARIANTS["5b"]).latent_shape
  assert shape(49, 480, 720) == (13, 60, 90, 16)
  assert shape(81, 768, 1360) == (21, 96, 170, 16)
  assert shape(8, 8, 8) == (2, 1, 1, 16)


@pytest.mark.parametrize(
  "method, first, later, match",
  [
    ("decode", 4, None, "1 to 3 frames and then 2 .* got 4; .*decode_chunks"),
    ("decode", 3, 3, "then 2 each time, got 3"),
    ("encode", 16, None, "1 to 15 frames and then 8 .* got 16"),
    ("encode", 9, 9, "then 8 each time, got 9; .*encode_chunks"),
  ],
)
def test_chunks_of_other_lengths_are_refused(
  method, first, later, match, params
):
  """GroupNorm looks at all of a chunk: other chunks, other numbers."""
  make = _latents if method == "decode" else _video
  step = functools.partial(getattr(MODULE, f"{method}_step"), params)
  state = MODULE.init_stream()
  if later:
    state, _ = jax.eval_shape(step, state, make(first))
  with pytest.raises(ValueError, match=match):
    jax.eval_shape(step, state, make(later or first))


def test_chunks_are_the_released_ones():
  assert MODULE.encode_chunks(49) == (9, *[8] * 5)
  assert MODULE.decode_chunks(13) == (3, *[2] * 5)
  assert MODULE.encode_chunks(16) == (8, 8)
  assert MODULE.encode_chunks(7) == (7,)
  assert MODULE.decode_chunks(1) == (1,)


@pytest.mark.parametrize("stride", [3, 16, 0])
def test_stride_that_levels_cannot_make_is_refused(stride):
  with pytest.raises(ValueError, match=f"up to 8 .* got {stride}; try 8"):
    dataclasses.replace(CFG, time_stride=stride)


def test_modulation_asks_for_float32(params):
  """A float32 dot on TPU is not float32 unless it says so."""
  half = _module(dtype="bfloat16")
  text = _apply.lower(half, "decode", params, _latents(1)).as_text()
  dots = [line for line in text.splitlines() if "dot_general" in line]
  wide = [line for line in dots if "xf32>" in line.split("->")[0]]
  norms = 2 * (2 + 4 * 2) + 1
  assert len(wide) == 2 * norms
  assert all("HIGHEST" in line for line in wide)
