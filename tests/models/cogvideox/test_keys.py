"""CogVideoX's denoiser is diffusers': keys, outputs, gradients, training."""

import copy
import dataclasses
import functools
import json
import re
import types as stdlib_types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.models import parity
from vdit_jax import sharding, trees, types
from vdit_jax.convert import rules
from vdit_jax.models.cogvideox import denoiser as cogvideox
from vdit_jax.models.cogvideox import keys
from vdit_jax.weights import component

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

KIND = parity.Kind(keys.TRANSFORMER)
B, M, C, E = 2, 5, 3, 12

# Small and odd; a norm_eps so large that every norm must honour it.
_TINY = dict(
  num_attention_heads=3,
  attention_head_dim=16,
  in_channels=C,
  out_channels=C,
  time_embed_dim=20,
  text_embed_dim=E,
  num_layers=2,
  sample_width=10,
  sample_height=6,
  sample_frames=9,
  max_text_seq_length=M,
  norm_eps=0.02,
  spatial_interpolation_scale=1.5,
  temporal_interpolation_scale=1.25,
)
_ROTARY = dict(use_rotary_positional_embeddings=True)
_1_5 = dict(patch_size_t=2, patch_bias=False, **_ROTARY)
TINY = {
  "2b": _TINY,
  "5b": _TINY | _ROTARY | dict(attention_bias=False),
  "5b_i2v": _TINY
  | _ROTARY
  | dict(use_learned_positional_embeddings=True, in_channels=2 * C),
  "1_5_5b": _TINY | _1_5,
  "1_5_5b_i2v": _TINY | _1_5 | dict(in_channels=2 * C, ofs_embed_dim=20),
}

# Latents (f, h, w): the first of each is that of the gradients.
SIZES = {
  "2b": [(3, 6, 10), (1, 10, 6), (2, 10, 6)],
  "5b": [(2, 6, 14), (1, 10, 6), (3, 10, 6)],
  "5b_i2v": [(3, 6, 10), (2, 6, 10), (1, 6, 10)],
  "1_5_5b": [(4, 6, 10), (2, 6, 10)],
  "1_5_5b_i2v": [(2, 6, 6), (6, 6, 10)],
}

# config.json of the releases, but for what starts with "_".
_BIG = dict(
  activation_fn="gelu-approximate",
  attention_bias=True,
  attention_head_dim=64,
  dropout=0.0,
  flip_sin_to_cos=True,
  freq_shift=0,
  in_channels=16,
  max_text_seq_length=226,
  norm_elementwise_affine=True,
  norm_eps=1e-05,
  num_attention_heads=48,
  num_layers=42,
  out_channels=16,
  patch_size=2,
  sample_frames=49,
  sample_height=60,
  sample_width=90,
  spatial_interpolation_scale=1.875,
  temporal_compression_ratio=4,
  temporal_interpolation_scale=1.0,
  text_embed_dim=4096,
  time_embed_dim=512,
  timestep_activation_fn="silu",
)
_BIG_1_5 = _1_5 | dict(sample_frames=81, sample_height=300, sample_width=300)
RELEASED = {
  "2b": _BIG | dict(num_attention_heads=30, num_layers=30),
  "5b": _BIG | _ROTARY,
  "5b_i2v": _BIG
  | _ROTARY
  | dict(use_learned_positional_embeddings=True, in_channels=32),
  "1_5_5b": _BIG | _BIG_1_5,
  "1_5_5b_i2v": _BIG | _BIG_1_5 | dict(in_channels=32, ofs_embed_dim=512),
}
BILLIONS = {
  "2b": 1.694,
  "5b": 5.570,
  "5b_i2v": 5.625,
  "1_5_5b": 5.571,
  "1_5_5b_i2v": 5.572,
}


def _random(key, shape, rng):
  """Numbers that hide no path: none is zero, and attention is peaky.

  Queries and keys are so small before their norms that the norms' eps shows.
  """
  x = rng.standard_normal(shape)
  if re.search(r"norm_[qk]\.weight", key):
    x = 2 * (1 + 0.3 * x)
  elif re.search(r"norm\w*(\.norm)?\.weight", key) and len(shape) == 1:
    x = 1 + 0.3 * x
  elif len(shape) > 1:
    x = x / np.sqrt(np.prod(shape[1:]))
  else:
    x = 0.3 * x
  if re.search(r"to_[qk]\.", key):
    x = 0.01 * x
  if "pos_embedding" in key:
    x = rng.standard_normal(shape)
  return x.astype(np.float32)


class Case(parity.Case):
  """A variant's two networks with the same weights, and inputs for them."""

  def __init__(self, name, folder):
    self.config, rng = TINY[name], np.random.default_rng(0)
    model = diffusers.CogVideoXTransformer3DModel(**self.config).float()
    state = model.state_dict()
    tensors = {k: _random(k, v.shape, rng) for k, v in state.items()}
    super().__init__(model, tensors, folder)

  def trained(self):
    """Tensors that are trained, by key: ours trains the learned table too."""
    state = self.torch.state_dict(keep_vars=True)
    return {k: v.requires_grad_(True) for k, v in state.items()}

  def inputs(self, size):
    rng = np.random.default_rng(1)
    draw = lambda *s: rng.standard_normal(s).astype(np.float32)
    x_t, embeds = draw(B, *size, C), draw(B, M, E)
    n = np.array([999, 357])
    images = self.module.cfg.image_channels
    latents = draw(B, *size, images) if images else None
    return x_t, n, embeds, latents

  def run_torch(self, x_t, n, embeds, latents, dtype=torch.float32, model=None):
    x = x_t if latents is None else np.concatenate([x_t, latents], -1)
    y = (model or self.torch)(
      torch.tensor(x).permute(0, 1, 4, 2, 3).to(dtype),
      torch.tensor(embeds).to(dtype),
      torch.tensor(n),
      ofs=torch.full((1,), 2.0, dtype=dtype),
      image_rotary_emb=self._rotary(*x_t.shape[1:4]),
    ).sample
    return y.permute(0, 1, 3, 4, 2)

  def _rotary(self, f, h, w):
    """What the released pipelines hand to the network."""
    if not self.config.get("use_rotary_positional_embeddings"):
      return None
    holder = stdlib_types.SimpleNamespace(
      transformer=self.torch, vae_scale_factor_spatial=8
    )
    prepare = diffusers.CogVideoXPipeline._prepare_rotary_positional_embeddings
    return prepare(holder, 8 * h, 8 * w, f, torch.device("cpu"))


def _forward(module, params, x_t, n, embeds, latents):
  text = types.Text(embeds=embeds, mask=jnp.zeros(embeds.shape[:2], bool))
  cond = None if latents is None else types.Cond(latents=latents)
  t = jnp.asarray(n, jnp.float32) / 1000
  return module.apply({"params": params}, x_t, t, text, cond)


_apply = parity.jit(_forward, static_argnums=0)


_gradients = parity.gradients_of(_forward)


@pytest.fixture(scope="session")
def cases(tmp_path_factory):
  make = lambda name: Case(name, tmp_path_factory.mktemp(name))
  return functools.cache(make)


def _is_null(config, path):
  """Whether a leaf's gradient is zero: a shift of all logits of a query."""
  rotary = config.get("use_rotary_positional_embeddings")
  return path == "blocks/attention/norm_k/bias" and not rotary


@pytest.mark.parametrize("name", TINY)
def test_outputs_and_gradients_are_diffusers(name, cases):
  case = cases(name)
  inputs = case.inputs(SIZES[name][0])
  y, grads = _gradients(case.module, case.params, *inputs)
  want, want_grads = case.gradients(*inputs)
  assert parity.error(y, want) <= 2e-5
  want_grads = trees.flatten(KIND.params(case.module, want_grads))
  for path, g in trees.flatten(grads).items():
    if _is_null(case.config, path):
      assert max(np.abs(g).max(), np.abs(want_grads[path]).max()) <= 1e-6
    else:
      assert parity.error(g, want_grads[path]) <= 1e-4, path


@pytest.mark.parametrize(
  "name, size", [(n, s) for n, sizes in SIZES.items() for s in sizes[1:]]
)
def test_other_sizes_are_diffusers(name, size, cases):
  case = cases(name)
  inputs = case.inputs(size)
  y = _apply(case.module, case.params, *inputs)
  with torch.no_grad():
    want = case.run_torch(*inputs)
  assert parity.error(y, want) <= 2e-5


@pytest.mark.parametrize("name", TINY)
def test_adamw_steps_are_torchs(name, cases):
  case = cases(name)
  inputs = case.inputs(SIZES[name][0])
  # A step must be small beside the weights, or rounding grows with each one.
  tensors = {
    k: v * 100 if re.search(r"to_[qk]\.", k) else v
    for k, v in case.tensors.items()
  }
  adamw = dict(eps=1e-4, weight_decay=0.1)
  parity.check_adamw(case, KIND, _gradients, tensors, inputs, adamw)


@pytest.mark.parametrize("name", TINY)
def test_bfloat16_is_as_near_as_torchs(name, cases):
  case = cases(name)
  inputs = case.inputs(SIZES[name][0])
  with torch.no_grad():
    exact = case.run_torch(*inputs).numpy()
    # A copy: its table of positions, a buffer, would stay rounded.
    narrow = copy.deepcopy(case.torch).to(torch.bfloat16)
    theirs = case.run_torch(*inputs, dtype=torch.bfloat16, model=narrow)
    theirs = theirs.float().numpy()
  params = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), case.params)
  y = _apply(KIND.module(case.config, "bfloat16"), params, *inputs)
  parity.check_bfloat16(y, theirs, exact)


@pytest.mark.parametrize("name", RELEASED)
def test_released_sizes_are_diffusers(name):
  config = RELEASED[name] | {"_class_name": "CogVideoXTransformer3DModel"}
  module = KIND.module(config, "bfloat16")
  assert module.cfg == cogvideox.VARIANTS[name]
  with torch.device("meta"):
    model = diffusers.CogVideoXTransformer3DModel(**RELEASED[name])
  count = KIND.check_size(module, model)
  assert count == pytest.approx(BILLIONS[name] * 1e9, rel=1e-3)


@pytest.mark.parametrize("name", TINY)
def test_diffusers_reads_back_what_it_wrote(name, cases, tmp_path):
  case = cases(name)
  inputs = case.inputs(SIZES[name][0])
  model = case.check_reads_back(tmp_path / "saved", *inputs)
  config = dict(model.config)
  assert {k: config[k] for k in TINY[name]} == TINY[name]


def test_autoencoder_goes_there_and_back_to_the_bit(tmp_path):
  model = diffusers.AutoencoderKLCogVideoX(
    block_out_channels=(8, 16),
    down_block_types=("CogVideoXDownBlock3D",) * 2,
    up_block_types=("CogVideoXUpBlock3D",) * 2,
    latent_channels=3,
    layers_per_block=1,
    norm_num_groups=4,
    temporal_compression_ratio=2,
  )
  with torch.no_grad():
    for p in model.parameters():
      p.normal_()
  model.save_pretrained(tmp_path / "theirs")
  component.save(component.load(tmp_path / "theirs"), tmp_path / "ours")
  back = diffusers.AutoencoderKLCogVideoX.from_pretrained(tmp_path / "ours")
  configs = [
    json.loads((tmp_path / name / "config.json").read_text())
    for name in ("theirs", "ours")
  ]
  assert configs[0] == configs[1]
  expected, found = model.state_dict(), back.state_dict()
  assert found.keys() == expected.keys()
  for key, x in expected.items():
    assert torch.equal(found[key], x), key
  z = torch.randn(1, 3, 2, 4, 4)
  with torch.no_grad():
    y, want = (m.decode(z).sample for m in (back, model))
  assert torch.equal(y, want)


def test_shapes_are_known_under_any_mesh():
  """One small example divides over no devices."""
  mesh = sharding.make_mesh(sharding.MeshShape(data=2, fsdp=2, context=2))
  module = KIND.module(TINY["1_5_5b_i2v"])
  with jax.set_mesh(mesh):
    found = KIND.shapes(module)
  assert found == KIND.shapes(module)


def test_layers_are_in_order_of_their_numbers():
  """Not of their names, where 10 comes before 2."""
  module = KIND.module(_TINY | dict(num_layers=12))
  key = "transformer_blocks.{}.norm1.norm.weight"
  shapes = KIND.shapes(module)
  slots = rules.keys(keys.TRANSFORMER.rules(module), shapes)
  rows = [slots[key.format(i)].row for i in range(12)]
  assert rows == list(range(12))


def test_layers_run_in_that_order(cases):
  case = cases("5b")
  inputs = case.inputs(SIZES["5b"][1])
  other = dict(case.params)
  other["blocks"] = jax.tree.map(lambda x: x[::-1], other["blocks"])
  y, z = (_apply(case.module, p, *inputs) for p in (case.params, other))
  assert parity.error(z, y) > 1e-2


def test_one_key_too_many_or_too_few_is_refused(cases):
  case = cases("2b")
  wrong = dict(case.tensors)
  wrong["transformer_blocks.1.attn1.to_z.weight"] = wrong.pop("norm_final.bias")
  with pytest.raises(ValueError, match="missing: norm_final.bias") as error:
    KIND.params(case.module, wrong)
  assert "left over: transformer_blocks.1.attn1.to_z.weight" in str(error.value)


def test_config_is_that_of_a_release_from_before_1_5():
  later = ("patch_size_t", "ofs_embed_dim", "patch_bias", "dropout")
  old = {k: v for k, v in RELEASED["5b"].items() if k not in later}
  assert KIND.module(old, "bfloat16").cfg == cogvideox.VARIANTS["5b"]
  assert (
    dataclasses.replace(KIND.module({}).cfg, dtype="bfloat16")
    == (cogvideox.VARIANTS["2b"])
  )


@pytest.mark.parametrize(
  "changes, match",
  [
    (dict(flip_sin_to_cos=False), r"flip_sin_to_cos=False \(only True"),
    (dict(freq_shift=1), "freq_shift=1"),
    (dict(dropout=0.1), r"dropout=0.1"),
    (dict(activation_fn="gelu"), "activation_fn='gelu'"),
    (dict(timestep_activation_fn="mish"), "timestep_activation_fn='mish'"),
    (dict(norm_elementwise_affine=False), "norm_elementwise_affine=False"),
    (dict(control_channels=3, dropout=1), "'control_channels', dropout=1"),
    (dict(ofs_embed_dim=7), "ofs_embed_dim must be .* 20, got 7"),
    (dict(out_channels=None), "out_channels must be .*, got None"),
    (dict(out_channels=4), "out_channels must be .* 3, got 4"),
    (dict(use_learned_positional_embeddings=True), "needs\n? ?use_rotary"),
    (dict(patch_size_t=2), "patch_size_t 2 needs"),
    (
      dict(use_learned_positional_embeddings=True, sample_frames=8, **_ROTARY),
      "sample_frames 8 is not",
    ),
    (
      dict(attention_head_dim=24, use_rotary_positional_embeddings=True),
      "head_dim must be .* 16.*24",
    ),
  ],
)
def test_fields_that_cannot_be_honoured_are_refused(changes, match):
  with pytest.raises(ValueError, match=match):
    KIND.module(_TINY | changes)
