"""Adapters as diffusers' file: what is written is what peft computes."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vdit_jax import types
from vdit_jax.convert import files
from vdit_jax.models.cogvideox import keys as table
from vdit_jax.models.cogvideox import system
from vdit_jax.nn import lora
from vdit_jax.weights import component

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
peft = pytest.importorskip("peft")

C, M, E = 3, 5, 12
SIZE = 2, 6, 10
CFG = lora.Lora(
  rank=3,
  alpha=4.5,
  targets=system.SYSTEM.adapters.targets,
  base_dtype="float32",
)

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
)
_ROTARY = dict(use_rotary_positional_embeddings=True)
MODELS = {
  "2b": _TINY,
  "deeper": _TINY | dict(num_layers=3),
  "5b_i2v": _TINY | _ROTARY | dict(in_channels=2 * C),
}
KEY = "transformer.transformer_blocks.{}.attn1.to_{}.lora_{}.weight"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
  """Folders of random transformers, none of whose parameters is zero."""
  found = {}
  for name, config in MODELS.items():
    torch.manual_seed(0)
    model = diffusers.CogVideoXTransformer3DModel(**config)
    with torch.no_grad():
      for p in model.parameters():
        p.copy_(torch.randn(p.shape) * p.shape[-1] ** -0.5)
    found[name] = tmp_path_factory.mktemp(name)
    model.save_pretrained(found[name])
  return found


@pytest.fixture(scope="module")
def base(folders):
  """The first of them, loaded."""
  return component.load(folders["2b"])


@pytest.fixture(scope="module")
def factors(base):
  """Random adapters of all its attentions."""
  boxed = table.TRANSFORMER.abstract(base.module)
  shapes = jax.eval_shape(lambda: lora.init(boxed, CFG, jax.random.key(0)))
  shapes = component.placement.unboxed(shapes)
  rng = np.random.default_rng(1)
  return jax.tree.map(lambda x: rng.standard_normal(x.shape) * 0.3, shapes)


@pytest.fixture(scope="module")
def written(base, folders, factors, tmp_path_factory):
  """The folder of the adapters' file."""
  path = tmp_path_factory.mktemp("written") / "lora"
  component.save_lora(path, folders["2b"], factors, CFG.scale)
  return path


def _inputs():
  rng = np.random.default_rng(0)
  draw = lambda *s: rng.standard_normal(s).astype(np.float32)
  return draw(2, *SIZE, C), np.array([999, 357]), draw(2, M, E)


@torch.no_grad()
def _torch(model):
  x_t, n, embeds = (torch.tensor(x) for x in _inputs())
  return model(x_t.movedim(-1, 2), embeds, n).sample.movedim(2, -1).numpy()


@pytest.fixture(scope="module")
def run(base):
  """Apply our network with adapters whose product counts `scale`."""
  x_t, n, embeds = _inputs()
  text = types.Text(embeds=embeds, mask=np.ones((2, M), bool))
  t = jnp.asarray(n / 1000, jnp.float32)
  apply = jax.jit(lambda v: base.module.apply(v, x_t, t, text))
  return lambda f, scale: apply(lora.variables(base.params, f, scale))


def _load(folder, lora_dir=None):
  model = diffusers.CogVideoXTransformer3DModel.from_pretrained(folder)
  if lora_dir:
    kind = diffusers.CogVideoXPipeline
    state, said = kind.lora_state_dict(lora_dir, return_lora_metadata=True)
    kind.load_lora_into_transformer(state, model, metadata=said)
  return model


def test_diffusers_gives_the_same_with_them(folders, factors, written, run):
  ours = run(factors, CFG.scale)
  assert np.abs(ours - run(factors, 0.0)).max() > 1e-2
  found = _torch(_load(folders["2b"], written))
  np.testing.assert_allclose(found, ours, atol=2e-5)


def test_they_come_back_and_count_once(base, folders, factors, written, run):
  for path in (written, written / component.LORA_FILE):
    read = component.load_lora(path, folders["2b"])
    want = lora.scaled(factors, CFG.scale)
    jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a, b, 1e-6), read, want
    )
  np.testing.assert_allclose(run(read, 1.0), run(factors, CFG.scale), atol=2e-5)
  merged = lora.merge(base.params, read, 1.0)
  out = written.parent / "merged"
  component.save(dataclasses.replace(base, params=merged), out)
  np.testing.assert_allclose(
    _torch(_load(out)), run(factors, CFG.scale), atol=2e-5
  )


def test_what_peft_wrote_is_read(folders, tmp_path, run):
  """With a scale of its own, and of some layers and blocks alone."""
  model = _load(folders["2b"])
  config = peft.LoraConfig(
    r=2,
    lora_alpha=5,
    target_modules=["transformer_blocks.1.attn1.to_q", "ff.net.2"],
    init_lora_weights=False,
  )
  torch.manual_seed(0)
  model.add_adapter(config)
  layers = peft.get_peft_model_state_dict(model)
  said = model.peft_config["default"].to_dict()
  diffusers.CogVideoXPipeline.save_lora_weights(
    tmp_path,
    transformer_lora_layers=layers,
    transformer_lora_adapter_metadata={
      k: list(v) if isinstance(v, set) else v for k, v in said.items()
    },
  )
  read = component.load_lora(tmp_path, folders["2b"])
  assert lora.paths(read) == ["blocks/attention/q", "blocks/mlp/out"]
  assert not read["blocks"]["attention"]["q"]["a"][0].any()
  ours = run(read, 1.0)
  np.testing.assert_allclose(ours, _torch(model), atol=2e-5)
  assert np.abs(ours - run(read, 0.4)).max() > 1e-3  # 5 / 2 of alpha / r
  file = tmp_path / component.LORA_FILE
  tensors, said = files.read(file), files.metadata(file)
  theirs = json.loads(said["lora_adapter_metadata"])
  theirs["transformer.use_rslora"] = True
  said["lora_adapter_metadata"] = json.dumps(theirs)
  files.write(tmp_path / "other.safetensors", tensors, said)
  with pytest.raises(ValueError, match="has use_rslora=True, which is not"):
    component.load_lora(tmp_path / "other.safetensors", folders["2b"])


@pytest.mark.parametrize(
  "name, theirs, ours",
  [
    ("deeper", "depth=2", "depth=3"),
    (
      "5b_i2v",
      "image_channels=0, positions='sincos'",
      "image_channels=3, positions='crop'",
    ),
  ],
)
def test_those_of_another_model_are_refused(
  name, theirs, ours, folders, written
):
  with pytest.raises(ValueError) as error:
    component.load_lora(written, folders[name])
  assert str(error.value) == (
    f"lora {written / component.LORA_FILE} is of another model: it is of one "
    f"with {theirs}, but {folders[name]} has {ours}; take the model that it "
    "was trained on"
  )


def test_other_weights_of_the_same_shape_are_told(
  folders, factors, written, tmp_path, caplog
):
  component.load_lora(written, folders["2b"])
  assert not caplog.records
  component.save_lora(tmp_path / "x", folders["2b"], factors, 1.0, "elsewhere")
  component.load_lora(tmp_path / "x", folders["2b"])
  assert "trained on weights elsewhere, and" in caplog.text


def test_what_does_not_say_of_what_it_is_must_fit(folders, written, tmp_path):
  tensors = files.read(written / component.LORA_FILE)
  a, b = (KEY.format(1, "q", name) for name in "AB")
  cases = {
    "no such layer: transformer.transformer_blocks.7.attn1.to_q": {
      k.replace("blocks.1.", "blocks.7."): v for k, v in tensors.items()
    },
    "half a pair: transformer_blocks.1.attn1.to_q has lora_A alone": {
      k: v for k, v in tensors.items() if k != b
    },
    "differs: transformer_blocks.1.attn1.to_q A": tensors | {a: tensors[b]},
    "no such layer: text_encoder.x": tensors | {"text_encoder.x": tensors[a]},
  }
  for i, (match, found) in enumerate(cases.items()):
    files.write(tmp_path / f"{i}", found)
    with pytest.raises(ValueError, match=f"is not of .*(?s:.*){match}"):
      component.load_lora(tmp_path / f"{i}", folders["2b"])
  with pytest.raises(ValueError, match="lora .* does not exist; give the file"):
    component.load_lora(tmp_path, folders["2b"])


def test_a_file_is_not_overwritten(folders, factors, written):
  with pytest.raises(ValueError, match="is there and not an empty folder"):
    component.save_lora(written, folders["2b"], factors, 1.0)
