"""CogVideoX's denoiser by itself: scan == loop, sharded == single, borders."""

import dataclasses
import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vdit_jax import sharding, trees, types
from vdit_jax.models.cogvideox import denoiser as cogvideox
from vdit_jax.nn import patches, positions

# 1.5's image-to-video, which has the most parts; 6 + 6 tokens.
CFG = cogvideox.Config(
  latent_channels=3,
  image_channels=2,
  patch=(2, 2, 2),
  depth=2,
  heads=4,
  head_dim=16,
  text_width=16,
  text_tokens=6,
  time_width=16,
  ofs=True,
  positions="slice",
  sample=(2, 4, 6),
  eps=0.01,
  dtype="float32",
)
M = 6

_jit = functools.partial(
  jax.jit, compiler_options={"xla_backend_optimization_level": 0}
)


def _with(**changes) -> cogvideox.Config:
  return dataclasses.replace(CFG, **changes)


def _inputs(cfg=CFG, batch=8, size=(2, 4, 6)):
  rng = np.random.default_rng(0)
  draw = lambda *s: rng.standard_normal(s).astype(np.float32)
  x_t = draw(batch, *size, cfg.latent_channels)
  t = rng.uniform(size=batch).astype(np.float32)
  mask = np.ones((batch, cfg.text_tokens), bool)
  text = types.Text(embeds=draw(*mask.shape, cfg.text_width), mask=mask)
  latents = draw(batch, *size, cfg.image_channels)
  cond = types.Cond(latents=latents if cfg.image_channels else None)
  return jax.tree.map(jnp.asarray, (x_t, t, text, cond))


def _abstract(cfg, size=None):
  """Shapes of the params, boxed with their logical axes."""
  inputs = _inputs(cfg, 1, size or cfg.patch)
  init = functools.partial(cogvideox.Denoiser(cfg).init, jax.random.key(0))
  return jax.eval_shape(init, *inputs)["params"]


def _loss(cfg, params, x_t, *rest):
  y = cogvideox.Denoiser(cfg).apply({"params": params}, x_t, *rest)
  return jnp.mean((y - x_t[..., ::-1]) ** 2)


def _loss_and_grads(cfg, params, *inputs):
  run = _jit(jax.value_and_grad(functools.partial(_loss, cfg)))
  return run(params, *inputs)


@functools.partial(_jit, static_argnums=0)
def _apply(cfg, params, *inputs):
  return cogvideox.Denoiser(cfg).apply({"params": params}, *inputs)


@pytest.fixture(scope="module")
def params(randomise):
  return randomise(nn.meta.unbox(_abstract(CFG)))


@pytest.fixture(scope="module")
def plain(params):
  """Loss and gradients of a batch of 8 on one device."""
  return _loss_and_grads(CFG, params, *_inputs())


def _assert_same_gradients(found, expected, null=None):
  """Compare losses and gradients; that of the leaf `null` is truly zero."""
  (loss, grads), (plain_loss, plain_grads) = found, expected
  np.testing.assert_allclose(loss, plain_loss, rtol=1e-5)
  plain_grads = trees.flatten(plain_grads)
  for name, g in trees.flatten(grads).items():
    want = np.asarray(plain_grads[name])
    if name == null:
      assert max(np.abs(g).max(), np.abs(want).max()) <= 1e-6
      continue
    error = np.linalg.norm(np.asarray(g) - want) / np.linalg.norm(want)
    assert error <= 1e-5, f"{name}: {error}"


def _loop(cfg, params, x_t, t, text, cond):
  """The network as a Python loop over the layers' own parameters."""
  dense = lambda p, x: x @ p["kernel"] + p["bias"]
  part = lambda module, name, *args: module(cfg).apply(
    {"params": params[name]}, *args
  )
  x = jnp.concatenate([x_t, cond.latents], axis=-1)
  grid = tuple(n // p for n, p in zip(x.shape[1:4], cfg.patch, strict=True))
  video = dense(params["patch_in"], patches.cut(x, cfg.patch, "first"))
  x = jnp.concatenate([dense(params["text_in"], text.embeds), video], axis=1)
  dims = cfg.head_dim // 4, cfg.head_dim // 8 * 3, cfg.head_dim // 8 * 3
  places = [np.arange(n) for n in grid]
  angles = positions.place_angles(places, dims, 10_000.0)
  vector = nn.silu(part(cogvideox.Conditioning, "conditioning", t))
  context = cogvideox.Context(
    vector=vector,
    angles=jnp.concatenate([jnp.zeros((M, cfg.head_dim // 2)), angles]),
    is_text=jnp.arange(x.shape[1])[:, None] < M,
  )
  for i in range(cfg.depth):
    layer = jax.tree.map(lambda p, i=i: p[i], params["blocks"])
    x, _ = cogvideox.Block(cfg).apply({"params": layer}, x, context)
  x = part(cogvideox.FinalLayer, "final", x[:, M:], vector)
  return patches.join(x, grid, cfg.patch, "first")


def test_scan_is_a_loop(params):
  inputs = _inputs(batch=2)
  want = _jit(functools.partial(_loop, CFG))(params, *inputs)
  y = _apply(CFG, params, *inputs)
  scale = np.abs(want).max()
  assert scale > 0.1
  np.testing.assert_allclose(y, want, atol=1e-5 * scale)


@pytest.mark.parametrize("remat", ["attention", "full"])
def test_remat_is_plain(remat, params, plain):
  found = _loss_and_grads(_with(remat=remat), params, *_inputs())
  _assert_same_gradients(found, plain)


@pytest.mark.parametrize(
  "mesh",
  [
    pytest.param(dict(data=2, fsdp=2, context=2), marks=pytest.mark.slow),
    dict(data=1, fsdp=2, tensor=2, context=2),
  ],
  ids=str,
)
def test_sharded_is_single_device(mesh, params, plain):
  _assert_sharded_is_plain(CFG, mesh, params, plain)


@pytest.mark.parametrize(
  "positions",
  [
    pytest.param("sincos", marks=pytest.mark.slow),
    pytest.param("crop", marks=pytest.mark.slow),
    "crop_learned",
  ],
)
def test_other_positions_shard_too(positions, randomise):
  cfg = _with(positions=positions, patch=(1, 2, 2), ofs=False, image_channels=0)
  params = randomise(nn.meta.unbox(_abstract(cfg, cfg.sample)))
  plain = _loss_and_grads(cfg, params, *_inputs(cfg))
  mesh = dict(data=1, fsdp=2, tensor=2, context=2)
  _assert_sharded_is_plain(cfg, mesh, params, plain)


def _assert_sharded_is_plain(cfg, mesh, params, plain):
  mesh = sharding.make_mesh(sharding.MeshShape(**mesh))
  placed = sharding.shardings(mesh, _abstract(cfg, cfg.sample))
  inputs = jax.device_put(_inputs(cfg), sharding.batch_sharding(mesh))
  with jax.set_mesh(mesh):
    params = jax.device_put(params, placed)
    found = _loss_and_grads(cfg, params, *inputs)
    y = _apply(cfg, params, *inputs)
  # Without rotation a bias on the keys shifts all logits of a query alike.
  null = "blocks/attention/norm_k/bias" if cfg.positions == "sincos" else None
  _assert_same_gradients(found, plain, null)
  want = _apply(cfg, jax.device_get(params), *_inputs(cfg))
  assert np.linalg.norm(y - want) <= 1e-5 * np.linalg.norm(want)


def test_heads_that_do_not_divide_over_devices_are_refused(params):
  mesh = sharding.make_mesh(sharding.MeshShape(data=1, fsdp=1, context=8))
  run = functools.partial(_apply, CFG, params)
  with (
    jax.set_mesh(mesh),
    pytest.raises(ValueError, match="4 heads.*context=8"),
  ):
    run(*_inputs())


def test_tokens_that_do_not_divide_over_devices_are_padded(params, plain):
  mesh = dict(data=1, fsdp=1, context=8)
  _assert_sharded_is_plain(_with(context="gather"), mesh, params, plain)


def test_every_parameter_of_every_layer_gets_a_gradient(plain):
  for name, g in trees.flatten(plain[1]).items():
    layers = g if name.startswith("blocks/") else g[None]
    power = np.abs(np.asarray(layers)).reshape(len(layers), -1).max(axis=1)
    assert power.min() > 1e-7, name


def test_what_must_be_float32_asks_for_it(params):
  """A float32 dot on TPU is not float32 unless it says so."""
  cfg = _with(dtype="bfloat16")
  text = _apply.lower(cfg, params, *_inputs(batch=2)).as_text()
  dots = [line for line in text.splitlines() if "dot_general" in line]
  exact = [line for line in dots if "HIGHEST" in line]
  # Two of time's, two of ofs', two modulations of a block, the last one's.
  assert len(exact) == 7
  wide = [line for line in dots if "xf32>" in line.split("->")[0]]
  assert wide == exact


def test_padding_of_the_text_is_seen(params):
  x_t, t, text, cond = _inputs(batch=2)
  y = _apply(CFG, params, x_t, t, text, cond)
  unmasked = text.replace(mask=jnp.zeros_like(text.mask))
  np.testing.assert_array_equal(_apply(CFG, params, x_t, t, unmasked, cond), y)
  other = text.replace(embeds=text.embeds.at[:, -1].add(1.0))
  change = np.abs(_apply(CFG, params, x_t, t, other, cond) - y)
  assert change.max(axis=(2, 3, 4)).min() > 1e-3


def _embedding(t):
  """Embedding of the noise level, the layers behind it being identities."""
  cfg = _with(heads=1, ofs=False)
  one = {"kernel": jnp.eye(16), "bias": jnp.zeros(16)}
  variables = {"params": {"time_in": one, "time_out": one}}
  return cogvideox.Conditioning(cfg).apply(variables, t)


def test_t_is_its_timestep():
  """In float32, n / 1000 * 1000 is not always n."""
  n = np.arange(1000, dtype=np.float32)
  exact = positions.time_embedding(jnp.asarray(n), 16, scale=1.0)
  found = _embedding(jnp.asarray(n) / 1000)
  np.testing.assert_array_equal(found, nn.silu(exact))
  np.testing.assert_array_equal(_embedding(jnp.ones(1)), found[-1:])


def test_crop_of_the_sample_is_the_sample():
  rows, columns = positions.crop((30, 45), (30, 45))
  np.testing.assert_allclose(rows, np.arange(30), atol=1e-12)
  np.testing.assert_allclose(columns, np.arange(45), atol=1e-12)


def test_crop_keeps_the_aspect_ratio_and_the_centre():
  rows, columns = positions.crop((30, 30), (30, 45))
  np.testing.assert_allclose(rows, np.arange(30), atol=1e-12)
  assert columns[0] == round((45 - 30) / 2)
  rows, columns = positions.crop((30, 90), (30, 45))
  np.testing.assert_allclose(columns, np.arange(90) / 2, atol=1e-12)
  assert rows[0] == round((30 - 15) / 2)


def _refuse(match, cfg=CFG, **changes):
  x_t, t, text, cond = _inputs(cfg, 3)
  call = dict(x_t=x_t, t=t, text=text, cond=cond) | changes
  with pytest.raises(ValueError, match=match):
    cogvideox.Denoiser(cfg).init(jax.random.key(0), **call)


def test_what_does_not_fit_is_refused():
  _refuse(r"one noise level.*\(3, 2\).*image-to-video", t=jnp.ones((3, 2)))
  _refuse(r"t must be \[B\] = \(3,\), got \(2,\)", t=jnp.ones(2))
  _refuse(r"4 channels.* 3", x_t=jnp.ones((3, 2, 4, 6, 4)))
  _refuse(r"f=3 .*2; try 4", x_t=jnp.ones((3, 3, 4, 6, 3)))
  _refuse(r"h=5 .*2; try 6", x_t=jnp.ones((3, 2, 5, 6, 3)))
  _refuse(r"conditions \['latents'\], got \[\]", cond=None)
  latents = jnp.ones((3, 2, 4, 6, 2))
  both = types.Cond(latents=latents, mask=latents)
  _refuse(r"\['latents'\], got \['latents', 'mask'\]", cond=both)
  _refuse("cond.latents must be", cond=types.Cond(latents=latents[:, :1]))
  alone = _with(image_channels=0)
  cond = types.Cond(latents=latents)
  _refuse(r"conditions \[\], got \['latents'\]", alone, cond=cond)
  text = types.Text(embeds=jnp.ones((3, M, 9)), mask=jnp.ones((3, M), bool))
  _refuse("9 wide.*16", text=text)
  text = types.Text(embeds=jnp.ones((3, 4, 16)), mask=jnp.ones((3, 4), bool))
  table = _with(patch=(1, 2, 2), positions="sincos")
  _refuse("4 tokens.* 6; pad or cut", table, text=text)
  learned = _with(patch=(1, 2, 2), positions="crop_learned", sample=(2, 6, 6))
  _refuse(r"\(6, 6\).*got \(4, 6\)", learned)


@pytest.mark.parametrize(
  "changes, match",
  [
    (dict(positions="rope"), "positions must be .*'rope'"),
    (dict(remat="some"), "remat must be .*'some'"),
    (dict(head_dim=24), "multiple of 16.* 24"),
    (dict(positions="crop"), r"patch \(2, 2, 2\).*'crop'.*'slice'"),
  ],
)
def test_config_that_cannot_be_is_refused(changes, match):
  with pytest.raises(ValueError, match=match):
    _with(**changes)


@pytest.mark.parametrize("variant", cogvideox.VARIANTS)
def test_variants_can_be_placed(variant):
  """Every axis has a rule and divides; the blocks' matrices are split."""
  mesh = sharding.make_mesh(sharding.MeshShape(data=1, fsdp=4, tensor=2))
  cfg = cogvideox.VARIANTS[variant]
  size = cfg.sample if cfg.positions == "crop_learned" else cfg.patch
  abstract = _abstract(cfg, size)
  placed = trees.flatten(sharding.shardings(mesh, abstract))
  for name, leaf in trees.flatten(nn.meta.unbox(abstract)).items():
    if name.startswith("blocks/") and name.endswith("/kernel"):
      local = math.prod(placed[name].shard_shape(leaf.shape))
      assert local == math.prod(leaf.shape) // 8, name
