"""T5's encoders against transformers': numbers, gradients, files' keys."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
import safetensors.numpy

from vdit_jax import trees
from vdit_jax.convert import rules
from vdit_jax.models.t5 import encoder as t5
from vdit_jax.models.t5 import keys as tables
from vdit_jax.weights import component

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

# No two sizes are alike, and none is what transformers takes by default.
TINY = dict(
  vocab_size=29,
  d_model=10,
  d_kv=6,
  d_ff=14,
  num_layers=2,
  num_heads=3,
  relative_attention_num_buckets=10,
  relative_attention_max_distance=13,
  layer_norm_epsilon=0.05,
)
B, M = 2, 23
RNG = np.random.default_rng(0)
TOKENS = RNG.integers(0, TINY["vocab_size"], (B, M))
WEIGHTS = RNG.standard_normal((B, M, TINY["d_model"])).astype(np.float32)
MASKS = {"padded": np.arange(M) < np.array([[M], [9]]), "no_mask": None}
LR = 0.01

# Class, activation, and what the released network of that shape is.
FORMS = {
  "T5 v1.1": ("T5", "gated-gelu"),
  "T5 v1.0": ("T5", "relu"),
  "mT5": ("MT5", "gated-gelu"),
  "UMT5": ("UMT5", "gated-gelu"),
}


def _theirs(form, kind="EncoderModel", **changes):
  """A network of transformers' with every parameter random."""
  family, activation = FORMS[form]
  config = getattr(transformers, f"{family}Config")(
    **TINY, feed_forward_proj=activation, **changes
  )
  model = getattr(transformers, f"{family}{kind}")(config).eval()
  generator = torch.Generator().manual_seed(1)
  with torch.no_grad():
    for name, p in model.named_parameters():
      x = torch.randn(p.shape, generator=generator)
      if "norm" in name:
        x = 1 + 0.3 * x
      elif "SelfAttention.q" in name:
        x = x * 0.5  # attention neither even nor on one token alone
      elif "embed" not in name and "shared" not in name and "bias" not in name:
        x = x / p.shape[1] ** 0.5
      p.copy_(x)
  return model


def _component(model):
  return tables.COMPONENTS[type(model).__name__]


def _module(model, dtype="float32"):
  config = model.config.to_dict()
  return _component(model).build(config, np.dtype(dtype))


def _check(model, module):
  """Match a network's keys with ours, as reading its file does."""
  return _match(_component(model), module, _tensors(model))


def _match(known, module, tensors):
  table, ignored = known.rules(module), known.ignored
  return rules.check(table, _shapes(module), tensors, ignored=ignored)


def _tensors(model):
  return {
    key: jax.ShapeDtypeStruct(tuple(x.shape), np.float32)
    for key, x in model.state_dict().items()
  }


@functools.cache
def _shapes(module):
  known = tables.COMPONENTS["T5EncoderModel"]
  return trees.flatten(nn.meta.unbox(known.abstract(module)))


def _tree(model, module, values):
  """Lay tensors of a network, by key, out as our params."""
  return trees.unflatten(
    {
      slot.path: slot.transform.forward(_numpy(values[key]))
      for key, slot in _check(model, module).items()
    }
  )


def _numpy(x):
  x = x.detach()
  if x.dtype == torch.bfloat16:
    return x.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
  return x.numpy().copy()


def _run_theirs(model, mask):
  mask = None if mask is None else torch.tensor(mask)
  found = model(input_ids=torch.tensor(TOKENS), attention_mask=mask)
  return found.last_hidden_state


def _loss(y, weights):
  # Of a size at which float32's noise is far below AdamW's eps.
  return (y * weights).sum() / (B * M)


@functools.partial(jax.jit, static_argnums=0)
def _run(module, params, mask):
  return module.apply({"params": params}, TOKENS, mask)


@functools.partial(jax.jit, static_argnums=0)
def _run_and_grad(module, params, mask):
  def loss(params):
    y = module.apply({"params": params}, TOKENS, mask)
    return _loss(y, WEIGHTS), y

  grads, y = jax.grad(loss, has_aux=True)(params)
  return y, grads


def _error(found, want):
  found, want = (np.asarray(x, np.float32) for x in (found, want))
  return np.linalg.norm(found - want) / np.linalg.norm(want)


@pytest.fixture(scope="module", params=FORMS)
def model(request):
  return _theirs(request.param)


@pytest.mark.parametrize("mask", MASKS)
def test_output_and_every_gradient_equal_transformers(model, mask):
  module = _module(model)
  params = _tree(model, module, model.state_dict())
  model.zero_grad()
  y = _run_theirs(model, MASKS[mask])
  _loss(y, torch.tensor(WEIGHTS)).backward()
  grads = {name: p.grad for name, p in model.named_parameters()}
  want = trees.flatten(_tree(model, module, grads))
  found_y, found = _run_and_grad(module, params, MASKS[mask])
  assert found_y.shape == y.shape and found_y.dtype == np.float32
  assert _error(found_y, y.detach()) < 1e-5
  found = trees.flatten(found)
  assert found.keys() == want.keys()
  for name, g in want.items():
    assert np.abs(g).max() > 1e-5, name
    assert _error(found[name], g) < 1e-4, name


def test_a_mask_matters(model):
  with torch.no_grad():
    a, b = (_run_theirs(model, mask)[1].numpy() for mask in MASKS.values())
  assert _error(a, b) > 0.05


@pytest.mark.parametrize("form", FORMS)
def test_three_optimiser_steps_equal_torch(form):
  model = _theirs(form)
  module = _module(model)
  params = _tree(model, module, model.state_dict())
  how = dict(eps=1e-4, weight_decay=0.01)
  theirs = torch.optim.AdamW(model.parameters(), lr=LR, **how)
  ours = optax.adamw(LR, **how)
  state = ours.init(params)
  for _ in range(3):
    theirs.zero_grad()
    y = _run_theirs(model, MASKS["padded"])
    _loss(y, torch.tensor(WEIGHTS)).backward()
    theirs.step()
    _, grads = _run_and_grad(module, params, MASKS["padded"])
    updates, state = ours.update(grads, state, params)
    params = optax.apply_updates(params, updates)
  want = trees.flatten(_tree(model, module, model.state_dict()))
  for name, p in trees.flatten(params).items():
    assert np.abs(p - want[name]).max() <= 1e-3 * LR, name


def test_bfloat16_is_as_near_as_torch(model):
  half = _theirs_as(model, torch.bfloat16)
  exact = _theirs_as(half, torch.float32)  # of the same, rounded weights
  module = _module(model, ml_dtypes.bfloat16)
  params = _tree(model, module, half.state_dict())
  assert {str(x.dtype) for x in jax.tree.leaves(params)} == {"bfloat16"}
  with torch.no_grad():
    want = _run_theirs(exact, MASKS["padded"]).numpy()
    theirs = _run_theirs(half, MASKS["padded"]).float().numpy()
  found = _run(module, params, MASKS["padded"])
  assert 1e-4 < _error(found, want) < 2 * _error(theirs, want)


def _theirs_as(model, dtype):
  other = type(model)(model.config).eval()
  other.load_state_dict(model.state_dict())
  return other.to(dtype)


@pytest.mark.parametrize(
  "change",
  [
    {"eps": 0.06},
    {"gated": False},
    {"max_distance": 14},
  ],
)
def test_comparison_sees_what_a_config_says(change):
  model = _theirs("T5 v1.1")
  module = _module(model)
  params = _tree(model, module, model.state_dict())
  other = t5.TextEncoder(dataclasses.replace(module.cfg, **change))
  found, want = (_run(m, params, MASKS["padded"]) for m in (other, module))
  assert _error(found, want) > 1e-3


def test_comparison_sees_exchanged_parameters(model):
  module = _module(model)
  params = _tree(model, module, model.state_dict())
  want = _run(module, params, MASKS["padded"])
  first, second = params["block_0"], params["block_1"]
  pairs = [("norm_1", "norm_2"), ("attention", "attention"), ("mlp", "mlp")]
  for a, b in pairs:
    swapped = params | {
      "block_0": first | {a: second[b]},
      "block_1": second | {b: first[a]},
    }
    assert _error(_run(module, swapped, MASKS["padded"]), want) > 1e-2


@pytest.mark.parametrize(
  "buckets, far", [(32, 128), (10, 13), (64, 256), (16, 20)]
)
def test_buckets_are_those_of_transformers(buckets, far):
  distance = np.arange(-700, 701)
  bucket = transformers.models.t5.modeling_t5.T5Attention
  want = bucket._relative_position_bucket(
    torch.tensor(distance), num_buckets=buckets, max_distance=far
  )
  found = t5.relative_bucket(jnp.asarray(distance), buckets, far)
  np.testing.assert_array_equal(found, want)


# The config.json of the releases, without what a decoder or training needs.
XXL = dict(
  d_ff=10240,
  d_kv=64,
  d_model=4096,
  layer_norm_epsilon=1e-6,
  num_heads=64,
  num_layers=24,
  relative_attention_num_buckets=32,
)
RELEASES = {
  "v1_1_xl": ("T5", XXL | dict(vocab_size=32128, d_model=2048, d_ff=5120)),
  "v1_1_xxl": ("T5", XXL | dict(vocab_size=32128)),
  "mt5_xxl": ("MT5", XXL | dict(vocab_size=250112)),
  "umt5_xxl": ("UMT5", XXL | dict(vocab_size=256384)),
}
RELEASES["v1_1_xl"][1]["num_heads"] = 32
COUNTS = {
  "v1_1_xl": 1_223_527_424,
  "v1_1_xxl": 4_762_310_656,
  "mt5_xxl": 5_655_173_120,
  "umt5_xxl": 5_680_910_336,
}


@pytest.mark.parametrize(
  "variant, kind",
  [
    *((variant, "EncoderModel") for variant in RELEASES),
    ("v1_1_xxl", "ForConditionalGeneration"),
    ("umt5_xxl", "ForConditionalGeneration"),
  ],
)
def test_released_shapes_fit_key_for_key(variant, kind):
  family, config = RELEASES[variant]
  config = config | {"feed_forward_proj": "gated-gelu"}
  with torch.device("meta"):
    cls = getattr(transformers, f"{family}{kind}")
    model = cls(getattr(transformers, f"{family}Config")(**config))
  known = tables.COMPONENTS[cls.__name__]
  module = known.build(config, np.dtype(ml_dtypes.bfloat16))
  assert module.cfg == t5.VARIANTS[variant]
  slots = _check(model, module)
  params = _shapes(module)
  assert sorted(slot.path for slot in slots.values()) == sorted(params)
  used = model.encoder.state_dict().keys() - {"embed_tokens.weight"}
  assert {"shared.weight", *(f"encoder.{key}" for key in used)} == set(slots)
  assert trees.count(list(params.values())) == COUNTS[variant]


def test_missing_and_left_over_keys_are_listed():
  model = _theirs("UMT5")
  known, module = _component(model), _module(model)
  tensors = _tensors(model)
  bias = "encoder.block.1.layer.0.SelfAttention.relative_attention_bias.weight"
  tensors["encoder.block.1.extra.weight"] = tensors.pop(bias)
  tensors["decoder.final_layer_norm.weight"] = tensors["shared.weight"]
  with pytest.raises(ValueError) as error:
    _match(known, module, tensors)
  assert f"missing: {bias}" in str(error.value)
  assert "left over: encoder.block.1.extra.weight" in str(error.value)
  assert "left over: decoder.final_layer_norm.weight" in str(error.value)


def test_a_shared_bias_is_not_one_for_each_layer():
  model = _theirs("UMT5")
  known = tables.COMPONENTS["T5EncoderModel"]
  module = known.build(model.config.to_dict(), np.dtype(np.float32))
  with pytest.raises(ValueError, match="in 1 places(.|\n)*block.1.*_bias"):
    _match(known, module, _tensors(model))


@pytest.mark.parametrize("form", FORMS)
def test_folder_round_trip_to_the_bit(form, tmp_path):
  model = _theirs(form)
  model.save_pretrained(tmp_path / "theirs")
  loaded = component.load(tmp_path / "theirs")
  with torch.no_grad():
    want = _run_theirs(model, MASKS["padded"]).numpy()
  found = _run(loaded.module, loaded.params, MASKS["padded"])
  assert _error(found, want) < 1e-5
  component.save(loaded, tmp_path / "ours")
  a, b = (
    safetensors.numpy.load_file(tmp_path / name / "model.safetensors")
    for name in ("theirs", "ours")
  )
  assert a.keys() == b.keys() and "shared.weight" in a
  assert all(np.array_equal(a[key], b[key]) for key in a)
  again = type(model).from_pretrained(tmp_path / "ours").eval()
  with torch.no_grad():
    np.testing.assert_array_equal(_run_theirs(again, MASKS["padded"]), want)


def test_encoder_of_a_whole_model_with_the_embedding_twice(tmp_path):
  whole = _theirs("mT5", "ForConditionalGeneration")
  whole.save_pretrained(tmp_path / "whole")
  (tmp_path / "whole" / "model.safetensors").unlink()
  state = whole.state_dict()
  assert {"shared.weight", "encoder.embed_tokens.weight"} < state.keys()
  torch.save(state, tmp_path / "whole" / "pytorch_model.bin")
  loaded = component.load(tmp_path / "whole")
  want = loaded.module.apply({"params": loaded.params}, TOKENS, None)
  component.save(loaded, tmp_path / "ours")
  written = safetensors.numpy.load_file(tmp_path / "ours/model.safetensors")
  assert not [k for k in written if not k.startswith(("shared.", "encoder."))]
  assert "encoder.embed_tokens.weight" not in written
  encoder = transformers.MT5EncoderModel.from_pretrained(tmp_path / "ours")
  with torch.no_grad():
    found = _run_theirs(encoder.eval(), None).numpy()
  assert _error(found, want) < 1e-5


def test_an_embedding_under_its_second_name_alone_is_read(tmp_path):
  _theirs("mT5").save_pretrained(tmp_path)
  path = tmp_path / "model.safetensors"
  state = safetensors.numpy.load_file(path)
  state["encoder.embed_tokens.weight"] = state.pop("shared.weight")
  safetensors.numpy.save_file(state, path)
  found = component.load(tmp_path).params["embedding"]
  np.testing.assert_array_equal(found, state["encoder.embed_tokens.weight"])


def test_what_a_config_may_be_silent_on():
  config = {k: v for k, v in TINY.items() if "max_distance" not in k}
  built = {
    name: known.build(config, np.dtype(np.float32)).cfg
    for name, known in tables.COMPONENTS.items()
  }
  assert {cfg.max_distance for cfg in built.values()} == {128}
  for name, cfg in built.items():
    assert cfg.gated == ("MT5" in name) and cfg.layer_bias == ("UMT5" in name)


@pytest.mark.parametrize(
  "change, message",
  [
    ({"feed_forward_proj": "gated-silu"}, "feed_forward_proj .* 'gated-silu'"),
    ({"d_kv": ...}, "d_kv must be there"),
  ],
)
def test_other_configs_are_refused(change, message):
  config = {k: v for k, v in (TINY | change).items() if v is not ...}
  build = tables.COMPONENTS["T5EncoderModel"].build
  with pytest.raises(ValueError, match=message):
    build(config, np.dtype(np.float32))
