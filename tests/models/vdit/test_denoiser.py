"""The denoiser: who sees whom, scan == loop, remat == plain, shapes."""

import dataclasses
import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vdit_jax import sharding, trees, types
from vdit_jax.models.vdit import denoiser as vdit
from vdit_jax.models.vdit import numbers
from vdit_jax.nn import layers, patches

CFG = vdit.Config(
  latent_channels=3,
  patch=(1, 2, 2),
  width=32,
  depth=2,
  heads=4,
  mlp_width=64,
  text_width=16,
  pooled_text=True,
  rope_theta=100.0,
  dtype="float32",
)
SHAPE = (4, 4, 4, 3)  # f, h, w, c: four tokens a frame
B, M = 5, 5

# Most of the time is LLVM's, which need not try hard on arrays this small.
_jit = functools.partial(
  jax.jit, compiler_options={"xla_backend_optimization_level": 0}
)


def _with(**changes) -> vdit.Config:
  return dataclasses.replace(CFG, **changes)


def _inputs(batch=B, shape=SHAPE):
  """x_t, t [B, f] and text, whose second row has no token."""
  rng = np.random.default_rng(0)
  x_t = rng.standard_normal((batch, *shape)).astype(np.float32)
  t = rng.uniform(size=(batch, shape[0])).astype(np.float32)
  embeds = rng.standard_normal((batch, M, 16)).astype(np.float32)
  lengths = np.array([3, 0, 5, 1, 4, 2, 5, 3])[np.arange(batch) % 8]
  text = types.Text(
    embeds=jnp.asarray(embeds), mask=jnp.arange(M) < lengths[:, None]
  )
  return jnp.asarray(x_t), jnp.asarray(t), text


def _init(cfg):
  key = jax.random.key(0, impl="rbg")  # compiles in a tenth of the time
  x_t, t, text = _inputs(1)
  text = text.replace(embeds=jnp.zeros((1, M, cfg.text_width)))
  return vdit.Denoiser(cfg).init(key, x_t, t, text)["params"]


def _shapes(cfg):
  return jax.eval_shape(lambda: nn.meta.unbox(_init(cfg)))


@functools.partial(_jit, static_argnums=0)
def _apply(cfg, params, x_t, t, text):
  return vdit.Denoiser(cfg).apply({"params": params}, x_t, t, text)


def _loss(cfg, params, x_t, t, text):
  y = vdit.Denoiser(cfg).apply({"params": params}, x_t, t, text)
  return jnp.mean((y - x_t[..., ::-1]) ** 2)


def _loss_and_grads(cfg, params, *inputs):
  run = _jit(jax.value_and_grad(functools.partial(_loss, cfg)))
  return run(params, *inputs)


@pytest.fixture(scope="module")
def params(randomise):
  return randomise(_shapes(CFG))


@pytest.fixture(scope="module")
def plain(params):
  """Loss and gradients of a batch of 8 on one device."""
  return _loss_and_grads(CFG, params, *_inputs(8))


def _assert_same_gradients(found, expected):
  (loss, grads), (plain_loss, plain_grads) = found, expected
  np.testing.assert_allclose(loss, plain_loss, rtol=1e-5)
  plain_grads = trees.flatten(plain_grads)
  for name, g in trees.flatten(grads).items():
    want = np.asarray(plain_grads[name])
    error = np.linalg.norm(np.asarray(g) - want) / np.linalg.norm(want)
    assert error <= 1e-5, f"{name}: {error}"


def _reach(cfg, params):
  """Which frames' outputs [k, j] one patch of each frame [k] changes."""
  first = jax.tree.map(lambda x: jnp.stack([x[0]] * B), _inputs())
  x_t, t, text = first
  k = jnp.arange(SHAPE[0])
  x_t = x_t.at[k + 1, k, :2, :2].add(1.0)
  y = _apply(cfg, params, x_t, t, text)
  return np.abs(y[1:] - y[:1]).max(-1)  # [k, j, h, w]


def test_joint_attention_joins_every_patch_with_every_other(randomise):
  cfg = _with(depth=1)
  reach = _reach(cfg, randomise(_shapes(cfg)))
  assert reach.min() > 1e-4


def test_factorised_attention_alternates_frames_and_places(randomise):
  cfg = _with(depth=1, attention="factorised")
  reach = _reach(cfg, randomise(_shapes(cfg)))
  own = np.eye(SHAPE[0], dtype=bool)
  assert reach[own].min() > 1e-4
  assert reach[~own].max() < 1e-6
  cfg = _with(depth=2, attention="factorised")
  assert _reach(cfg, randomise(_shapes(cfg))).min() > 1e-5


def test_both_kinds_of_attention_have_the_same_parameters():
  found = _shapes(_with(attention="factorised"))
  assert trees.compare(_shapes(CFG), found) == []


def test_t_of_clips_is_equal_t_of_frames(params):
  x_t, t, text = _inputs()
  clips = _apply(CFG, params, x_t, t[:, 0], text)
  frames = _apply(CFG, params, x_t, jnp.tile(t[:, :1], (1, 4)), text)
  np.testing.assert_allclose(clips, frames, atol=1e-5)


def test_t_of_a_frame_is_that_frames(randomise):
  """Inside a frame nothing else tells of the others' noise levels."""
  cfg = _with(depth=1, attention="factorised")
  params, (x_t, t, text) = randomise(_shapes(cfg)), _inputs()
  y = _apply(cfg, params, x_t, t, text)
  other = _apply(cfg, params, x_t, t.at[0, 2].set(0.0), text)
  change = np.abs(other - y).max(axis=(2, 3, 4))
  assert change[0, 2] > 1e-2
  change[0, 2] = 0
  assert change.max() < 1e-6


def test_t_of_a_frame_matters_to_every_frame(params):
  x_t, t, text = _inputs()
  y = _apply(CFG, params, x_t, t, text)
  other = _apply(CFG, params, x_t, t.at[:, 1].set(0.0), text)
  assert np.abs(other - y).max(axis=(2, 3, 4)).min() > 1e-3


def test_tokens_behind_the_mask_do_not_matter(params):
  x_t, t, text = _inputs()
  y = _apply(CFG, params, x_t, t, text)
  other = text.embeds + 10 * ~text.mask[..., None]
  same = _apply(CFG, params, x_t, t, text.replace(embeds=other))
  np.testing.assert_array_equal(same, y)
  other = text.embeds + 0.1 * text.mask[..., None]
  moved = _apply(CFG, params, x_t, t, text.replace(embeds=other))
  change = np.abs(moved - y).max(axis=(1, 2, 3, 4))
  assert change[1] == 0
  assert np.delete(change, 1).min() > 1e-3


def test_row_without_a_token_is_the_learned_null(params):
  x_t, t, text = _inputs()
  y = _apply(CFG, params, x_t, t, text)
  null = jnp.broadcast_to(params["null_text"]["embedding"], text.embeds.shape)
  one = jnp.zeros_like(text.mask).at[:, 0].set(True)
  z = _apply(CFG, params, x_t, t, types.Text(embeds=null, mask=one))
  np.testing.assert_allclose(y[1], z[1], atol=1e-5)
  assert np.abs(y[0] - z[0]).max() > 1e-2


def test_output_is_zero_at_initialisation():
  params = _jit(lambda: nn.meta.unbox(_init(CFG)))()
  y = _apply(CFG, params, *_inputs())
  np.testing.assert_array_equal(y, 0)


def _loop(cfg, params, x_t, t, text):
  """The network as a Python loop over the layers' own parameters."""
  grid = tuple(n // p for n, p in zip(x_t.shape[1:4], cfg.patch, strict=True))
  dense = lambda p, x: x @ p["kernel"] + p["bias"]
  part = lambda module, name, *args: module(cfg).apply(
    {"params": params[name]}, *args
  )
  x = dense(params["patch_in"], patches.cut(x_t, cfg.patch))
  text = part(vdit.NullText, "null_text", text)
  vector = part(vdit.Conditioning, "conditioning", t, text, None)
  modulation = dense(params["modulation"], nn.silu(vector))
  context = vdit.Context(
    modulation=modulation.reshape(*vector.shape[:2], 6, cfg.width),
    angles=vdit.positions.rotary_angles(
      grid, cfg.width // cfg.heads, cfg.rope_theta
    ),
    text=text,
    grid=grid,
  )
  for i in range(cfg.depth):
    layer = jax.tree.map(lambda p, i=i: p[i], params["blocks"])
    inside_frame = jnp.asarray(i % 2 == 0)
    x, _ = vdit.Block(cfg).apply({"params": layer}, x, inside_frame, context)
  x = part(vdit.FinalLayer, "final", x, vector, grid)
  return patches.join(x, grid, cfg.patch)


@pytest.mark.parametrize("attention", vdit.ATTENTION)
def test_scan_is_a_loop(attention, randomise):
  cfg = _with(attention=attention)
  params, inputs = randomise(_shapes(cfg)), _inputs()
  want = _jit(functools.partial(_loop, cfg))(params, *inputs)
  scale = np.abs(want).max()
  assert scale > 0.1
  for unroll in (1, cfg.depth):
    y = _apply(dataclasses.replace(cfg, unroll=unroll), params, *inputs)
    np.testing.assert_allclose(y, want, atol=1e-5 * scale)


@pytest.mark.parametrize("remat", ["attention", "full"])
def test_remat_is_plain(remat, params, plain):
  found = _loss_and_grads(_with(remat=remat), params, *_inputs(8))
  _assert_same_gradients(found, plain)


def test_remat_saves_less():
  def saved(cfg):
    run = functools.partial(_loss, cfg)
    pull = jax.eval_shape(
      lambda params: jax.vjp(lambda p: run(p, *_inputs(8)), params)[1],
      _shapes(cfg),
    )
    return trees.num_bytes(pull)

  none, attention, full = (saved(_with(remat=r)) for r in layers.REMAT)
  assert full < attention < none / 2


@pytest.mark.parametrize(
  "mesh",
  [
    pytest.param(dict(data=8), marks=pytest.mark.slow),
    pytest.param(dict(data=1, fsdp=8), marks=pytest.mark.slow),
    dict(data=2, fsdp=2, context=2),
    dict(data=1, fsdp=2, tensor=2, context=2),
  ],
  ids=str,
)
def test_sharded_is_single_device(mesh, params, plain):
  mesh = sharding.make_mesh(sharding.MeshShape(**mesh))
  placed = sharding.shardings(mesh, jax.eval_shape(lambda: _init(CFG)))
  inputs = jax.device_put(_inputs(8), sharding.batch_sharding(mesh))
  with jax.set_mesh(mesh):
    found = _loss_and_grads(CFG, jax.device_put(params, placed), *inputs)
  _assert_same_gradients(found, plain)


# A grid of 3 x 2 x 3 patches, which no number of devices divides.
UNEVEN = (3, 4, 6, 3)


def _sharded(cfg, mesh, params, inputs):
  mesh = sharding.make_mesh(sharding.MeshShape(**mesh))
  placed = sharding.shardings(mesh, jax.eval_shape(lambda: _init(cfg)))
  inputs = jax.device_put(inputs, sharding.batch_sharding(mesh))
  with jax.set_mesh(mesh):
    return _loss_and_grads(cfg, jax.device_put(params, placed), *inputs)


@pytest.mark.parametrize(
  "mesh, changes",
  [
    (dict(data=2, fsdp=1, context=4), dict(context="ulysses")),
    (dict(data=1, fsdp=2, tensor=2, context=2), dict(context="gather")),
    *(
      pytest.param(*case, marks=pytest.mark.slow)
      for case in (
        (dict(data=1, fsdp=1, context=8), dict(context="gather")),
        (dict(data=2, fsdp=1, context=4), dict(attention="factorised")),
        (dict(data=2, fsdp=2, tensor=2), dict(kernel="splash")),
        (dict(data=2, fsdp=1, context=4), dict(kernel="splash")),
      )
    ),
  ],
  ids=str,
)
def test_kernels_and_context_are_a_single_device(mesh, changes, params):
  inputs, cfg = _inputs(8, UNEVEN), _with(**changes)
  single = _loss_and_grads(_with(attention=cfg.attention), params, *inputs)
  _assert_same_gradients(_sharded(cfg, mesh, params, inputs), single)


@pytest.mark.slow
def test_kernels_of_whole_tiles_are_plain(randomise):
  """Heads of 128: norms, rotary positions and attention in kernels."""
  cfg = _with(depth=1, width=256, heads=2, text_width=128)
  params, (x_t, t, text) = randomise(_shapes(cfg)), _inputs(4, UNEVEN)
  text = text.replace(embeds=jnp.tile(text.embeds, (1, 1, 8)))
  inputs = x_t, t[:, 0], text
  plain = _loss_and_grads(cfg, params, *inputs)
  cfg = dataclasses.replace(cfg, kernel="splash", remat="attention")
  mesh = dict(data=2, fsdp=2, context=2)
  _assert_same_gradients(_sharded(cfg, mesh, params, inputs), plain)


@pytest.mark.parametrize(
  "kernel", [pytest.param("dot", marks=pytest.mark.slow), "splash"]
)
def test_remat_of_split_attention_is_plain(kernel, params, plain):
  mesh = dict(data=2, fsdp=2, context=2)
  cfg = _with(kernel=kernel, remat="attention")
  found = _sharded(cfg, mesh, params, _inputs(8))
  _assert_same_gradients(found, plain)


def test_every_parameter_of_every_layer_gets_a_gradient(plain):
  for name, g in trees.flatten(plain[1]).items():
    layers = g if name.startswith("blocks/") else g[None]
    power = np.abs(np.asarray(layers)).reshape(len(layers), -1).max(axis=1)
    assert power.min() > 1e-7, name


def test_bfloat16_computes_and_float32_keeps(params):
  cfg = _with(dtype="bfloat16")
  assert trees.compare(_shapes(CFG), _shapes(cfg)) == []
  assert {x.dtype for x in jax.tree.leaves(_shapes(cfg))} == {jnp.float32.dtype}
  want = _apply(CFG, params, *_inputs())
  y = _apply(cfg, params, *_inputs())
  assert y.dtype == want.dtype == jnp.float32
  error = np.linalg.norm(y - want) / np.linalg.norm(want)
  assert 1e-4 < error < 3e-2


def test_what_must_be_float32_asks_for_it(params):
  """A float32 dot on TPU is not float32 unless it says so."""
  text = _apply.lower(_with(dtype="bfloat16"), params, *_inputs()).as_text()
  dots = [line for line in text.splitlines() if "dot_general" in line]
  exact = [line for line in dots if "HIGHEST" in line]
  # Two of time's, pooled text, modulation, the last layer's modulation.
  assert len(exact) == 5
  wide = [line for line in dots if "xf32>" in line.split("->")[0]]
  assert wide == exact  # by operands: logits are a float32 sum of bfloat16


def test_unpatchify_inverts_patchify():
  x = jax.random.normal(jax.random.key(0), (2, 4, 6, 6, 5))
  for patch in ((1, 2, 2), (2, 3, 1), (1, 1, 1)):
    grid = tuple(n // p for n, p in zip(x.shape[1:4], patch, strict=True))
    tokens = patches.cut(x, patch)
    assert tokens.shape == (2, math.prod(grid), 5 * math.prod(patch))
    np.testing.assert_array_equal(patches.join(tokens, grid, patch), x)


def test_token_holds_a_patch_of_one_place():
  x = jnp.zeros((1, 4, 4, 4, 3)).at[0, 2, 2:, :2].set(1.0)
  tokens = patches.cut(x, (1, 2, 2))
  np.testing.assert_array_equal(np.flatnonzero(tokens.sum(-1)), [2 * 4 + 2])
  np.testing.assert_array_equal(tokens[0, 10], 1)


@pytest.mark.parametrize("size", [(3, 8, 8), (5, 8, 12), (9, 12, 8)])
def test_same_weights_take_any_grid(size, params):
  x_t, t, text = _inputs(shape=(*size, 3))
  y = _apply(CFG, params, x_t, t, text)
  assert y.shape == x_t.shape
  assert np.isfinite(y).all() and np.std(y) > 0.1


def _refuse(match, cfg=CFG, **changes):
  x_t, t, text = _inputs()
  call = dict(x_t=x_t, t=t, text=text) | changes
  with pytest.raises(ValueError, match=match):
    vdit.Denoiser(cfg).init(jax.random.key(0), **call)


def test_what_does_not_fit_is_refused():
  _refuse(r"5 channels.* 3", x_t=jnp.ones((B, 4, 4, 4, 5)))
  _refuse(r"h=5 .*2; try 6", x_t=jnp.ones((B, 4, 5, 4, 3)))
  _refuse(r"w=7 .*2; try 8", x_t=jnp.ones((B, 4, 4, 7, 3)))
  x_t = jnp.ones((B, 1, 4, 4, 3))
  _refuse(r"f=1 .*2; try 2", _with(patch=(2, 2, 2)), x_t=x_t)
  _refuse(r"\(5,\) or \(5, 4\), got \(3,\)", t=jnp.ones(3))
  _refuse(r"\(5,\) or \(5, 4\), got \(5, 1\)", t=jnp.ones((B, 1)))
  _refuse("takes no cond", cond=types.Cond(fps=jnp.ones(B)))
  text = types.Text(embeds=jnp.ones((B, M, 9)), mask=jnp.ones((B, M), bool))
  _refuse("9 wide.*16", text=text)


def test_empty_cond_is_no_cond():
  run = functools.partial(vdit.Denoiser(CFG).apply, cond=types.Cond())
  y = jax.eval_shape(lambda p: run({"params": p}, *_inputs()), _shapes(CFG))
  assert y.shape == (B, *SHAPE)


@pytest.mark.parametrize(
  "changes, match",
  [
    (dict(attention="local"), "attention must be .*'local'"),
    (dict(remat="some"), "remat must be .*'some'"),
    (dict(kernel="fast"), "kernel must be .*'fast'"),
    (dict(context="ring"), "context must be .*'ring'"),
    (dict(heads=5), "width 32 .* heads 5"),
    (dict(heads=8), "at least 6, got 4"),
  ],
)
def test_config_that_cannot_be_is_refused(changes, match):
  with pytest.raises(ValueError, match=match):
    _with(**changes)


def _abstract(cfg):
  x_t = jnp.zeros((1, *cfg.patch, cfg.latent_channels))
  text = types.Text(jnp.zeros((1, 1, cfg.text_width)), jnp.ones((1, 1), bool))
  init = functools.partial(vdit.Denoiser(cfg).init, jax.random.key(0))
  return jax.eval_shape(init, x_t, jnp.zeros(1), text)["params"]


def test_5b_is_of_that_size():
  count = trees.count(nn.meta.unbox(_abstract(vdit.VARIANTS["5b"])))
  assert 4.5e9 < count < 5.5e9


@pytest.mark.parametrize("variant", vdit.VARIANTS)
def test_variants_can_be_placed(variant):
  """Every axis has a rule and divides; the blocks' matrices are split."""
  mesh = sharding.make_mesh(sharding.MeshShape(data=1, fsdp=4, tensor=2))
  abstract = _abstract(vdit.VARIANTS[variant])
  placed = trees.flatten(sharding.shardings(mesh, abstract))
  for name, leaf in trees.flatten(nn.meta.unbox(abstract)).items():
    if name.startswith("blocks/") and name.endswith("/kernel"):
      local = math.prod(placed[name].shard_shape(leaf.shape))
      assert local == math.prod(leaf.shape) // 8, name


CONDITIONED = _with(cond=("fps", "size", "motion_score"), depth=1)
KNOWN = types.Cond(
  fps=jnp.array([8.0, 16.0, 24.0, 30.0, 60.0]),
  size=jnp.array([[32.0, 48.0]] * B),
  scores=jnp.arange(float(B))[:, None],
)


@functools.partial(_jit, static_argnums=0)
def _conditioned(cfg, params, cond):
  return vdit.Denoiser(cfg).apply({"params": params}, *_inputs(), cond)


def test_numbers_begin_without_effect(randomise):
  """Weights of before load, with zeros for what is new."""
  plain = _shapes(_with(depth=1))
  missing = trees.flatten(_shapes(CONDITIONED)).keys() - trees.flatten(plain)
  assert missing and all("conditioning/numbers/" in name for name in missing)
  embedding = vdit.Numbers(CONDITIONED)
  first = embedding.init(jax.random.key(0), jnp.zeros((1, 4)))["params"]
  old = randomise(plain)
  new = jax.tree.map(lambda x: x, old)
  new["conditioning"]["numbers"] = nn.meta.unbox(first)
  want = _apply(_with(depth=1), old, *_inputs())
  np.testing.assert_array_equal(_conditioned(CONDITIONED, new, KNOWN), want)


def test_each_number_of_a_clip_changes_that_clip(randomise):
  params = randomise(_shapes(CONDITIONED))
  whole = _conditioned(CONDITIONED, params, KNOWN)
  for field in ("fps", "size", "scores"):
    for change in (1.0, 0.1, jnp.nan):
      value = getattr(KNOWN, field)
      last = (2,) + (-1,) * (value.ndim - 1)
      other = KNOWN.replace(**{field: value.at[last].add(change)})
      moved = _conditioned(CONDITIONED, params, other)
      difference = np.abs(moved - whole).max((1, 2, 3, 4))
      assert difference[2] > 1e-4 and not difference[[0, 1, 3, 4]].any()
  unknown = jax.tree.map(lambda x: x * jnp.nan, KNOWN)
  np.testing.assert_array_equal(
    _conditioned(CONDITIONED, params, unknown),
    _conditioned(CONDITIONED, params, None),
  )


def test_clips_to_be_made_are_told_numbers():
  cond = numbers.cond_of(CONDITIONED.cond, 2, {"fps": 8.0, "width": 48.0})
  np.testing.assert_array_equal(cond.fps, [8, 8])
  np.testing.assert_array_equal(cond.size, [[np.nan, 48]] * 2)
  np.testing.assert_array_equal(cond.scores, [[np.nan]] * 2)
  with pytest.raises(ValueError, match=r"got \['beauty'\]"):
    numbers.cond_of(CONDITIONED.cond, 2, {"beauty": 5.0})
  assert numbers.cond_of(CFG.cond, 2, {}) == types.Cond()


def test_numbers_that_no_input_is_for_are_refused(randomise):
  params = _shapes(CONDITIONED)

  def refuse(match, cfg, **fields):
    apply = functools.partial(_conditioned, cfg)
    with pytest.raises(ValueError, match=match):
      jax.eval_shape(apply, params, types.Cond(**fields))

  refuse("no cond \\['mask'\\]", CONDITIONED, mask=jnp.ones((B, 4, 4, 4, 1)))
  refuse("cond.scores must be \\(5, 1\\)", CONDITIONED, scores=jnp.ones((B, 2)))
  with pytest.raises(ValueError, match="different names"):
    _with(cond=("fps", "fps"))
  with pytest.raises(ValueError, match="different names"):
    _with(cond="fps")
