"""Adapters in files: read as peft and diffusers do, written as they read."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vdit_jax import types
from vdit_jax.convert import adapters, files
from vdit_jax.models.cogvideox import keys as table
from vdit_jax.models.cogvideox import system
from vdit_jax.nn import lora
from vdit_jax.weights import adapters as adapter_files
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
LAYER = "transformer_blocks.1.attn1.to_q"
UNDERSCORED = LAYER.replace(".", "_")
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
def bases(folders):
  """The first of them, as adapters are read for it."""
  return adapter_files.bases(system.SYSTEM, {"denoiser": folders["2b"]})


@pytest.fixture(scope="module")
def written(folders, factors, tmp_path_factory):
  """The folder of the adapters' file."""
  path = tmp_path_factory.mktemp("written") / "lora"
  _write(path, folders["2b"], lora.scaled(factors, CFG.scale))
  return path


def _write(path, folder, tree, **kwargs):
  given = {"denoiser": folder}, {"denoiser": tree}
  adapter_files.write(path, system.SYSTEM, *given, **kwargs)


def _read(path, folder):
  found = adapter_files.read(path, system.SYSTEM, {"denoiser": folder})
  assert list(found) == ["denoiser"]
  return found["denoiser"]


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
  """Apply our network with its params changed."""
  x_t, n, embeds = _inputs()
  text = types.Text(embeds=embeds, mask=np.ones((2, M), bool))
  t = jnp.asarray(n / 1000, jnp.float32)
  return jax.jit(lambda p: base.module.apply({"params": p}, x_t, t, text))


def _load(folder, *lora_dirs):
  model = diffusers.CogVideoXTransformer3DModel.from_pretrained(folder)
  for i, lora_dir in enumerate(lora_dirs):
    kind = diffusers.CogVideoXPipeline
    state, said = kind.lora_state_dict(lora_dir, return_lora_metadata=True)
    kind.load_lora_into_transformer(
      state, model, adapter_name=f"n{i}", metadata=said
    )
  return model


def test_diffusers_gives_the_same_with_them(
  base, folders, factors, written, run
):
  ours = run(lora.attach(base.params, factors, CFG.scale))
  assert np.abs(ours - run(base.params)).max() > 1e-2
  model = _load(folders["2b"], written)
  np.testing.assert_allclose(_torch(model), ours, atol=2e-5)
  merged = lora.merge(base.params, factors, CFG.scale)
  np.testing.assert_allclose(run(merged), ours, atol=2e-5)
  model.fuse_lora()
  theirs = dict(model.named_parameters())
  for i in range(2):
    np.testing.assert_allclose(
      merged["blocks"]["attention"]["v"]["kernel"][i],
      theirs[f"transformer_blocks.{i}.attn1.to_v.base_layer.weight"]
      .detach()
      .numpy()
      .T,
      atol=1e-5,
    )


def test_they_come_back_and_count_once(folders, factors, written):
  want = lora.scaled(factors, CFG.scale)
  for path in (written, written / adapter_files.FILE):
    read = _read(path, folders["2b"])
    jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a, b, 1e-6), read, want
    )


def test_several_with_a_scale_each_are_diffusers_s(
  base, folders, factors, written, tmp_path, run
):
  other = jax.tree.map(lambda x: -0.5 * x[..., ::-1, :], factors)
  _write(tmp_path / "b", folders["2b"], other)
  files = [f"{written}:0.8", adapter_files.File(tmp_path / "b", 1 / 256)]
  ours = run(lora.merge(base.params, _read(files, folders["2b"]), 1.0))
  model = _load(folders["2b"], written, tmp_path / "b")
  model.set_adapters(["n0", "n1"], weights=[0.8, 1 / 256])
  np.testing.assert_allclose(_torch(model), ours, atol=2e-5)
  twice = f"{written},{written}:-0.2"
  np.testing.assert_allclose(
    run(lora.merge(base.params, _read(twice, folders["2b"]), 1.0)),
    run(lora.merge(base.params, factors, 0.8 * CFG.scale)),
    atol=2e-5,
  )


_LAYERS = ["transformer_blocks.1.attn1.to_q", "attn1.to_k", "ff.net.2"]


@pytest.mark.parametrize("by", ["diffusers", "peft"])
@pytest.mark.parametrize(
  "fields",
  [
    dict(r=2, lora_alpha=5),
    dict(
      r=2,
      lora_alpha=5,
      rank_pattern={"transformer_blocks.0.attn1.to_k": 4, "ff.net.2": 1},
      alpha_pattern={r"transformer_blocks.\d+.attn1.to_k": 3, "net.2": 0.5},
      use_rslora=True,
    ),
  ],
)
def test_what_peft_wrote_is_read(base, folders, tmp_path, run, fields, by):
  """With scales of their own, and of some layers and blocks alone."""
  model = _load(folders["2b"])
  config = peft.LoraConfig(
    target_modules=_LAYERS, init_lora_weights=False, **fields
  )
  torch.manual_seed(0)
  if by == "peft":
    wrapped = peft.get_peft_model(model, config)
    wrapped.save_pretrained(tmp_path)
  else:
    model.add_adapter(config)
    said = model.peft_config["default"].to_dict()
    diffusers.CogVideoXPipeline.save_lora_weights(
      tmp_path,
      transformer_lora_layers=peft.get_peft_model_state_dict(model),
      transformer_lora_adapter_metadata={
        k: list(v) if isinstance(v, set) else v for k, v in said.items()
      },
    )
  read = _read(tmp_path, folders["2b"])
  assert lora.paths(read) == [
    *("blocks/attention/k", "blocks/attention/q", "blocks/mlp/out")
  ]
  assert not read["blocks"]["attention"]["q"]["a"][0].any()
  ours = run(lora.merge(base.params, read, 1.0))
  np.testing.assert_allclose(ours, _torch(model), atol=2e-5)
  assert np.abs(ours - run(lora.merge(base.params, read, 0.4))).max() > 2e-4


_SIDES = {"A": "down", "B": "up"}
FORMS = {
  "diffusers": lambda n, x: f"transformer.{n}.lora_{x}.weight",
  "diffusers, older": lambda n, x: f"transformer.{n}.lora.{_SIDES[x]}.weight",
  "peft": lambda n, x: f"base_model.model.{n}.lora_{x}.weight",
  "of a name": lambda n, x: f"{n}.lora_{x}.default.weight",
  "ComfyUI": lambda n, x: f"diffusion_model.{n}.lora_{_SIDES[x]}.weight",
  "ComfyUI, A": lambda n, x: f"model.diffusion_model.{n}.lora_{x}.weight",
  "kohya": lambda n, x: (
    f"lora_unet_{n.replace('.', '_')}.lora_{_SIDES[x]}.weight"
  ),
  "kohya, diffusers": lambda n, x: (
    f"lora_transformer_{n.replace('.', '_')}.lora_{_SIDES[x]}.weight"
  ),
}


@pytest.mark.parametrize("form", FORMS)
def test_names_are_read_as_programs_write_them(
  form, bases, factors, written, tmp_path
):
  """With and without a tensor that says what a layer counts."""
  tensors = files.read(written / adapter_files.FILE)
  named = {}
  for key, tensor in tensors.items():
    layer, _, side = key.removesuffix(".weight").rpartition(".lora_")
    layer = layer.removeprefix("transformer.")
    named[FORMS[form](layer, side)] = tensor
  file = tmp_path / "mine.safetensors"
  for scale, alpha in ((1.0, None), (0.5, np.float16(1.5)), (2.0, np.int64(6))):
    own = dict(named)
    if alpha is not None:
      names = {key.split(".lora")[0] for key in named}
      own |= {f"{name}.alpha": _array(alpha) for name in names}
    files.write(file, own)
    read = adapters.read(tmp_path, bases)["denoiser"]
    want = lora.scaled(factors, CFG.scale * scale)
    jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a, b, 1e-6), read, want
    )


def test_a_pickle_of_torch_is_read(bases, factors, written, tmp_path):
  tensors = files.read(written / adapter_files.FILE)
  state = {k: torch.tensor(np.array(x.read())) for k, x in tensors.items()}
  torch.save(state, tmp_path / "pytorch_lora_weights.bin")
  read = adapters.read(tmp_path / "pytorch_lora_weights.bin", bases)
  want = lora.scaled(factors, CFG.scale)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, 1e-6), read["denoiser"], want
  )


def _array(x):
  return adapters._Array(np.asarray(x))


def test_layers_of_several_ranks_are_filled_up(bases, tmp_path):
  rng = np.random.default_rng(0)
  tensors, products = {}, {}
  for block, rank in ((0, 2), (1, 5)):
    a, b = (rng.standard_normal(s) for s in ((rank, 48), (48, rank)))
    products[block] = (b @ a).T
    for name, x in (("A", a), ("B", b)):
      tensors[KEY.format(block, "q", name)] = _array(x.astype(np.float32))
  files.write(tmp_path / "x", tensors)
  found = adapters.read(tmp_path / "x", bases)["denoiser"]["blocks"]
  a, b = (found["attention"]["q"][name] for name in "ab")
  assert a.shape == (2, 48, 5) and not a[0, :, 2:].any()
  for block, product in products.items():
    np.testing.assert_allclose(a[block] @ b[block], product, atol=1e-5)


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
    _read(written, folders[name])
  assert str(error.value) == (
    f"lora {written / adapter_files.FILE} is of another model: it is of one "
    f"with {theirs}, but {folders[name]} has {ours}; take the model that it "
    "was trained on"
  )


def test_other_weights_of_the_same_shape_are_told(
  folders, factors, written, tmp_path, caplog
):
  _read(written, folders["2b"])
  assert "trained on weights" not in caplog.text
  other = {"denoiser": "elsewhere"}
  _write(tmp_path / "x", folders["2b"], factors, trained_on=other)
  _read(tmp_path / "x", folders["2b"])
  assert "trained on weights elsewhere, and" in caplog.text


A, B = (KEY.format(1, "q", name) for name in "AB")
_NAN = np.full((48, 3), np.nan, np.float32)
_BIG = np.full((48, 3), 1e300)
# What a file has besides or in place of what it should, and what is said of it.
WRONG = {
  "no such dense layer: 'transformer.transformer_blocks.7.x.lora_A.weight'": {
    "transformer.transformer_blocks.7.x.lora_A.weight": A
  },
  f"half a pair: transformer.{LAYER} has no b": {B: None},
  f"differs: transformer.{LAYER} A (48, 3), B (48, 3); the layer is": {A: B},
  "not understood: 'text_encoder.x'": {"text_encoder.x": A},
  f"a second a of {LAYER}: '{LAYER}.lora_A.weight'": {
    f"{LAYER}.lora_A.weight": A
  },
  f"a second b of {LAYER}: 'lora_unet_": {
    f"lora_unet_{UNDERSCORED}.lora_up.weight": B
  },
  "DoRA: ": {f"transformer.{LAYER}.lora_magnitude_vector": A},
  "DoRA: 'lora_unet_x.dora_scale'": {"lora_unet_x.dora_scale": A},
  "LoHa: ": {f"lora_unet_{UNDERSCORED}.hada_w1_a": A},
  "LoKr: ": {f"lora_unet_{UNDERSCORED}.lokr_w1": A},
  "a convolution's LoRA: ": {f"lora_unet_{UNDERSCORED}.lora_mid.weight": A},
  "a change of a bias: ": {f"transformer.{LAYER}.lora_B.bias": A},
  "a change of a bias: 'diffusion_model.x.diff_b'": {
    "diffusion_model.x.diff_b": A
  },
  "a change that is not of low rank: ": {f"diffusion_model.{LAYER}.diff": A},
  f"not finite: B of transformer.{LAYER}": {B: _NAN},
  f"not finite: B of transformer.{LAYER} ": {B: _BIG},
  f"not of floats: transformer.{LAYER} float32, int32": {
    B: np.ones((48, 3), np.int32)
  },
  f"alpha of transformer.{LAYER} is no positive number": {
    f"transformer.{LAYER}.alpha": np.float32(math.nan)
  },
  f"alpha of transformer.{LAYER} is no positive number ": {
    f"transformer.{LAYER}.alpha": np.float32(-4)
  },
  f"alpha of transformer.{LAYER} is no positive number  ": {
    f"transformer.{LAYER}.alpha": np.ones(2, np.float32)
  },
  f"rank 0 of transformer.{LAYER} is not from 1 to 8192": {
    A: np.ones((0, 48), np.float32),
    B: np.ones((48, 0), np.float32),
  },
}


@pytest.mark.parametrize("match", WRONG)
def test_what_is_not_understood_is_listed(match, bases, written, tmp_path):
  tensors = dict(files.read(written / adapter_files.FILE))
  for key, change in WRONG[match].items():
    if change is None:
      del tensors[key]
    else:
      known = isinstance(change, str)
      tensors[key] = tensors[change] if known else _array(change)
  files.write(tmp_path / "x", tensors)
  with pytest.raises(ValueError) as error:
    adapters.read(tmp_path / "x", bases)
  assert f"lora {tmp_path / 'x'} does not fit " in str(error.value)
  assert f"in {len(str(error.value).splitlines()) - 1} places" in str(
    error.value
  )
  assert match.strip() in str(error.value)


_PLAIN = {"r": 3, "lora_alpha": 3}
SAID = {
  "must be JSON, got '{'; fetch": "{",
  "must be an object of JSON, got [1]": "[1]",
  "r must be a whole number from 1 to 8192, got 0;": {"r": 0},
  "r must be a whole number from 1 to 8192, got 'x'": {"r": "x"},
  "r must be a whole number from 1 to 8192, got 1e+300": {"r": 1e300},
  "got a whole number of ": {"r": 10**400},
  "got 1000000000000": {"r": 10**12},
  "r must be a whole number from 1 to 8192, got True": {"r": True},
  "r must be there": {"r": None},
  "lora_alpha must be a finite number from 1e-09 up, got nan": {
    "lora_alpha": math.nan
  },
  "lora_alpha must be a finite number from 1e-09 up, got -3": {
    "lora_alpha": -3
  },
  "rank_pattern must be an object": {"rank_pattern": [1]},
  "alpha_pattern must be an object": {"alpha_pattern": {"x": "y"}},
  "or of simple regexes, got '(a+)+'": {"rank_pattern": {"(a+)+": 3}},
  "or of simple regexes, got '('": {"rank_pattern": {"(": 3}},
  "use_rslora must be true or false": {"use_rslora": "yes"},
  "{'use_dora': True} is not done here; merge them": {"use_dora": True},
  "{'lora_bias': True} is not done here": {"lora_bias": True},
  "{'made_up': {'x': 1}} is not done here": {"made_up": {"x": 1}},
  "bias must be one of 'none' or null, got 'all'": {"bias": "all"},
  "peft_type must be one of 'LORA'": {"peft_type": "LOHA"},
  "init_lora_weights must be one of": {"init_lora_weights": "pissa"},
  f"r must be 3 of {LAYER}, whose factors have that rank, got 4": {
    "rank_pattern": {"1.attn1.to_q": 4}
  },
}


@pytest.mark.parametrize("by", ["diffusers", "peft"])
@pytest.mark.parametrize("match", SAID)
def test_what_a_file_says_of_itself_is_checked(
  match, by, bases, written, tmp_path
):
  tensors = files.read(written / adapter_files.FILE)
  said, metadata = SAID[match], {}
  if isinstance(said, dict):
    said = _PLAIN | said
    prefix = "transformer." if by == "diffusers" else ""
    said = json.dumps({f"{prefix}{k}": v for k, v in said.items()})
  if by == "peft":
    (tmp_path / "adapter_config.json").write_text(said)
  else:
    metadata["lora_adapter_metadata"] = said
  files.write(tmp_path / "adapter_model.safetensors", tensors, metadata)
  if by == "diffusers":
    (tmp_path / "adapter_model.safetensors").rename(tmp_path / "x.safetensors")
  with pytest.raises(ValueError, match="lora .*|.*adapter_config") as error:
    adapters.read(tmp_path, bases)
  assert match in str(error.value) and len(str(error.value)) < 500


@pytest.mark.parametrize(
  "said, match",
  [
    ("[", "vdit_jax must be JSON"),
    ("[]", "vdit_jax must be an object of JSON"),
    ('{"transformer": 3}', "transformer must be an object, got 3"),
    ('{"transformer": {"base": {}}}', r"must say \['weights'\]"),
    ('{"transformer": {"base": 1, "weights": ""}}', "base must be an object"),
    ('{"transformer": {"base": {}, "weights": ""}}', "has neither _class_name"),
  ],
)
def test_what_we_say_of_a_file_is_checked_too(
  said, match, bases, written, tmp_path
):
  tensors = files.read(written / adapter_files.FILE)
  files.write(tmp_path / "x", tensors, {"vdit_jax": said})
  with pytest.raises(ValueError, match=match):
    adapters.read(tmp_path / "x", bases)


def test_files_from_before_there_were_several_networks_are_read(
  folders, factors, written, tmp_path
):
  tensors = files.read(written / adapter_files.FILE)
  said = files.metadata(written / adapter_files.FILE)
  own = json.loads(said["vdit_jax"])["transformer"]
  files.write(tmp_path / "x", tensors, {"vdit_jax": json.dumps(own)})
  _read(tmp_path / "x", folders["2b"])
  with pytest.raises(ValueError, match="is of another model"):
    _read(tmp_path / "x", folders["deeper"])


def test_which_file_is_meant_must_be_plain(bases, written, tmp_path):
  with pytest.raises(ValueError, match="lora .* does not exist; give the file"):
    adapters.read(tmp_path / "none", bases)
  with pytest.raises(ValueError, match=r"but has \[\]; give the file"):
    adapters.read(tmp_path, bases)
  file = written / adapter_files.FILE
  for name in ("one.safetensors", "two.safetensors"):
    (tmp_path / name).write_bytes(file.read_bytes())
  with pytest.raises(ValueError, match="one.safetensors', 'two"):
    adapters.read(tmp_path, bases)
  (tmp_path / "adapter_model.safetensors").write_bytes(file.read_bytes())
  with pytest.raises(ValueError, match="adapter_config.json must lie beside"):
    adapters.read(tmp_path, bases)


def test_a_file_is_not_overwritten(folders, factors, written):
  with pytest.raises(ValueError, match="is there and not an empty folder"):
    _write(written, folders["2b"], factors)
