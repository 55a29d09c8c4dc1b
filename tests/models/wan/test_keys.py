"""Wan's denoiser is diffusers': keys, outputs, gradients, training."""

import copy
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.models import parity
from vdit_jax import types
from vdit_jax.models.wan import denoiser, keys
from vdit_jax.weights import component

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

KIND = parity.Kind(keys.TRANSFORMER)
B, M, C, E, IMAGE = 2, 512, 3, 12, 10

# Small and odd; an eps so large that every norm must honour it.
_TINY = dict(
  num_attention_heads=3,
  attention_head_dim=16,
  in_channels=C,
  out_channels=C,
  text_dim=E,
  freq_dim=20,
  ffn_dim=28,
  num_layers=2,
  eps=0.02,
)
_SHOWN = _TINY | dict(in_channels=2 * C + 4)
_CLIP = _SHOWN | dict(image_dim=IMAGE, added_kv_proj_dim=48)
TINY = {
  "t2v": _TINY,
  "plain": _TINY | dict(cross_attn_norm=False, patch_size=(2, 1, 2)),
  "i2v": _CLIP,
  "flf2v": _CLIP | dict(pos_embed_seq_len=14),
  "a14b_i2v": _SHOWN,
}
# Latents (f, h, w): the first of each is that of the gradients.
SIZES = {
  "t2v": [(3, 6, 10), (1, 10, 6), (2, 2, 14)],
  "plain": [(4, 5, 6), (2, 3, 10)],
  "i2v": [(3, 6, 10), (1, 4, 6)],
  "flf2v": [(2, 6, 6), (3, 4, 10)],
  "a14b_i2v": [(3, 4, 6), (1, 6, 4)],
}

_BIG = dict(
  added_kv_proj_dim=None,
  attention_head_dim=128,
  cross_attn_norm=True,
  eps=1e-06,
  ffn_dim=13824,
  freq_dim=256,
  image_dim=None,
  in_channels=16,
  num_attention_heads=40,
  num_layers=40,
  out_channels=16,
  patch_size=[1, 2, 2],
  qk_norm="rms_norm_across_heads",
  rope_max_seq_len=1024,
  text_dim=4096,
)
_BIG_CLIP = dict(in_channels=36, image_dim=1280, added_kv_proj_dim=5120)
RELEASED = {  # config.json of the releases, but for what starts with "_"
  "1_3b": _BIG | dict(ffn_dim=8960, num_attention_heads=12, num_layers=30),
  "14b": _BIG,
  "14b_i2v": _BIG | _BIG_CLIP,
  "14b_flf2v": _BIG | _BIG_CLIP | dict(pos_embed_seq_len=514),
  "a14b": _BIG | dict(pos_embed_seq_len=None),
  "a14b_i2v": _BIG | dict(in_channels=36, pos_embed_seq_len=None),
  "5b": _BIG
  | dict(
    in_channels=48,
    out_channels=48,
    ffn_dim=14336,
    num_attention_heads=24,
    num_layers=30,
    pos_embed_seq_len=None,
  ),
}
BILLIONS = {
  "1_3b": 1.419,
  "14b": 14.289,
  "14b_i2v": 16.394,
  "14b_flf2v": 16.395,
  "a14b": 14.289,
  "a14b_i2v": 14.289,
  "5b": 5.000,
}


class Case(parity.Case):
  """A variant's two networks with the same weights, and inputs for them."""

  def __init__(self, name, folder):
    self.config = TINY[name]
    model = diffusers.WanTransformer3DModel(**self.config).float()
    # Queries and keys are so small before their norms that eps shows, and
    # attention is peaky behind them.
    gains = {r"to_[qk]\.|add_k": 0.1, r"norm_(q|k|added_k)": 2.0}
    super().__init__(model, parity.draw(model.state_dict(), gains), folder)

  def inputs(self, size, each=False):
    """x_t, timesteps [B] or [B, f], embeds, what images are shown by."""
    rng, cfg = np.random.default_rng(1), self.module.cfg
    normal = lambda *s: rng.standard_normal(s).astype(np.float32)
    x_t, embeds = normal(B, *size, C), normal(B, M, E)
    embeds[:, 40:] = 0
    n = np.array([999.0, 357.0], np.float32)
    if each:
      n = np.stack([n * (i > 0) for i in range(size[0])], 1)
    cond = {}
    if cfg.shows_images:
      cond = dict(latents=normal(B, *size, C), mask=normal(B, *size, 4))
    if cfg.image_width:
      S = cfg.image_tokens or 5
      cond["image_embeds"] = normal(B, S, IMAGE)
    return x_t, n, embeds, cond

  def run_torch(self, x_t, n, embeds, cond, dtype=torch.float32, model=None):
    parts = [cond[k] for k in ("mask", "latents") if k in cond]
    x = np.concatenate([x_t, *parts], -1)
    images = cond.get("image_embeds")
    if images is not None:
      images = torch.tensor(images).to(dtype)
      if self.module.cfg.image_tokens:  # as two images a clip
        images = images.reshape(2 * B, -1, IMAGE)
    p_f, p_h, p_w = self.module.cfg.patch
    if n.ndim == 2:
      places = x.shape[2] // p_h * (x.shape[3] // p_w)
      n = np.repeat(n[:, ::p_f], places, axis=1)
    y = (model or self.torch)(
      torch.tensor(x).permute(0, 4, 1, 2, 3).to(dtype),
      torch.tensor(n),
      torch.tensor(embeds).to(dtype),
      images,
    ).sample
    return y.permute(0, 2, 3, 4, 1)


def _forward(module, params, x_t, n, embeds, cond):
  text = types.Text(embeds=embeds, mask=jnp.zeros(embeds.shape[:2], bool))
  t = jnp.asarray(n, jnp.float32) / 1000
  given = types.Cond(**cond) if cond else None
  return module.apply({"params": params}, x_t, t, text, given)


_apply = parity.jit(_forward, static_argnums=0)


_gradients = parity.gradients_of(_forward)


@pytest.fixture(scope="session")
def cases(tmp_path_factory):
  make = lambda name: Case(name, tmp_path_factory.mktemp(name))
  return functools.cache(make)


@pytest.mark.parametrize("name", TINY)
def test_outputs_and_gradients_are_diffusers(name, cases):
  case = cases(name)
  inputs = case.inputs(SIZES[name][0])
  y, grads = _gradients(case.module, case.params, *inputs)
  want, want_grads = case.gradients(*inputs)
  assert parity.error(y, want) <= 2e-5
  parity.check_gradients(grads, KIND.params(case.module, want_grads))


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


def test_a_noise_level_for_each_frame_is_one_for_each_token(cases):
  """2.2's TI2V-5B: diffusers is told one for each token, ours for a frame."""
  case = cases("t2v")
  inputs = case.inputs((3, 6, 10), each=True)
  y, grads = _gradients(case.module, case.params, *inputs)
  want, want_grads = case.gradients(*inputs)
  assert parity.error(y, want) <= 2e-5
  parity.check_gradients(grads, KIND.params(case.module, want_grads))
  alike = _apply(case.module, case.params, *case.inputs((3, 6, 10)))
  assert parity.error(alike, want) > 1e-3


@pytest.mark.parametrize("name", ["t2v", "flf2v"])
def test_adamw_steps_are_torchs(name, cases):
  case = cases(name)
  inputs = case.inputs(SIZES[name][0])
  # A step must be small beside the weights, or rounding grows with each one.
  tensors = {
    k: v * 10 if "to_q." in k or "to_k." in k or "add_k" in k else v
    for k, v in case.tensors.items()
  }
  parity.check_adamw(case, KIND, _gradients, tensors, inputs)


@pytest.mark.parametrize("name", ["t2v", "i2v"])
def test_bfloat16_is_as_near_as_torchs(name, cases):
  case = cases(name)
  inputs = case.inputs(SIZES[name][0])
  with torch.no_grad():
    exact = case.run_torch(*inputs).numpy()
    narrow = copy.deepcopy(case.torch).to(torch.bfloat16)
    for part, module in narrow.named_modules():  # as from_pretrained keeps them
      kept = ("time_embedder", "norm1", "norm2", "norm3")
      if part.rpartition(".")[2] in kept:
        module.float()
    theirs = case.run_torch(*inputs, dtype=torch.bfloat16, model=narrow)
    theirs = theirs.float().numpy()
  params = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), case.params)
  y = _apply(KIND.module(case.config, "bfloat16"), params, *inputs)
  parity.check_bfloat16(y, theirs, exact)


@pytest.mark.parametrize("name", RELEASED)
def test_released_sizes_are_diffusers(name):
  config = RELEASED[name] | {"_class_name": "WanTransformer3DModel"}
  module = KIND.module(config, "bfloat16")
  assert module.cfg == denoiser.VARIANTS[name]
  with torch.device("meta"):
    model = diffusers.WanTransformer3DModel(**RELEASED[name])
  count = KIND.check_size(module, model)
  assert count == pytest.approx(BILLIONS[name] * 1e9, rel=1e-3)


@pytest.mark.parametrize("name", TINY)
def test_diffusers_reads_back_what_it_wrote(name, cases, tmp_path):
  case = cases(name)
  case.check_reads_back(tmp_path / "saved", *case.inputs(SIZES[name][0]))


def test_a_norm_that_nothing_looks_at_may_be_there(cases, tmp_path):
  """The first image-to-video releases have one of image tokens' queries."""
  case = cases("i2v")
  config = {**case.loaded.config}
  component.save(case.loaded, tmp_path / "saved")
  from safetensors import numpy as safe

  file = next((tmp_path / "saved").glob("*.safetensors"))
  extra = {"blocks.0.attn2.norm_added_q.weight": np.ones(48, np.float32)}
  safe.save_file(safe.load_file(file) | extra, file)
  loaded = component.load(tmp_path / "saved")
  jax.tree.map(np.testing.assert_array_equal, loaded.params, case.params)
  assert loaded.config == config


@pytest.mark.parametrize(
  "changes, match",
  [
    (dict(qk_norm="rms_norm"), "qk_norm='rms_norm'"),
    (dict(image_dim=8), "added_kv_proj_dim must be 48"),
    (dict(added_kv_proj_dim=48), "added_kv_proj_dim must be None"),
    (dict(in_channels=5), "in_channels must be .* 3"),
    (dict(attention_head_dim=5), "head_dim"),
    (dict(pos_embed_seq_len=14), "image_tokens 14 need"),
    (dict(novelty=1), "'novelty'"),
  ],
)
def test_fields_that_cannot_be_honoured_are_refused(changes, match):
  with pytest.raises(ValueError, match=match):
    KIND.module(_TINY | changes)


# Each must change the output by more than the tolerance allows, or the tests
# above would not see the difference.
def test_what_a_porter_gets_wrong_shows(cases, monkeypatch):
  case = cases("i2v")
  inputs = case.inputs(SIZES["i2v"][0])
  want = _apply(case.module, case.params, *inputs)

  def changed(name, value, module=denoiser):
    with monkeypatch.context() as patch:
      patch.setattr(module, name, value)
      run = parity.jit(functools.partial(_forward, case.module))
      return parity.error(run(case.params, *inputs), want)

  def per_head(cfg, x, name, norm=None):
    x = denoiser._dense(cfg, cfg.width, ("embed", "heads"), name)(x)
    if norm is None:
      return x
    scale = denoiser.norms.Scale(axis="heads", name=norm)(cfg.width)
    scale = scale.reshape(cfg.heads, cfg.head_dim)
    cut = x.reshape(*x.shape[:2], cfg.heads, cfg.head_dim)
    return denoiser.norms.rms_norm(cut, scale, cfg.eps).reshape(x.shape)

  assert changed("_project", per_head) > 1e-3
  thirds = lambda n: (6, 6, 4)
  split = ("split_head_dim", thirds, denoiser.positions)
  assert changed(*split) > 1e-3
  halves = ("rotate_pairs", denoiser.positions.rotate, denoiser.positions)
  assert changed(*halves) > 1e-3
