"""Whole released pipelines: pixels of diffusers, stages, refusals."""

import functools
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from absl import flags
from absl.testing import flagsaver
from PIL import Image

from vdit_jax import conditioning, pipeline, sample, types
from vdit_jax.media import formats
from vdit_jax.weights import parts, tiny

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

B, STEPS, H, W, C = 2, 4, 32, 48, 4
PROMPTS = ["a red seven moving left", "two dogs run along the beach"]
NEGATIVE = ["a car in the rain", ""]
DPM = ("5b", "1_5_5b_i2v")  # sampled by the other scheduler
DPM_CLASS = "CogVideoXDPMScheduler"
_INDEX, _SCHEDULER = "model_index.json", "scheduler/scheduler_config.json"
# Frames asked for and given: a chunk of the decoder, two of them, four latents
# that decode to sixteen frames, padded latents (5 + 1 and 3 + 1).
NUM_FRAMES = {
  "2b": (13, 16),
  "5b": (9, 9),
  "5b_i2v": (9, 9),
  "1_5_5b": (17, 17),
  "1_5_5b_i2v": (9, 9),
}


def _draw(*shape, seed=0):
  return np.random.default_rng(seed).standard_normal(shape).astype("f4")


def _image():
  """An image [B, H, W, 3] for each prompt, uint8."""
  rng = np.random.default_rng(2)
  return rng.integers(0, 256, (B, H, W, 3)).astype(np.uint8)


def _step_noise(shape, generator, steps):
  """What the DPM scheduler uses of a generator: the last draw of a step."""
  noises = []
  for i in range(steps):
    for _ in range(1 + (0 < i < steps - 1)):
      noise = torch.randn(shape, generator=generator)
    noises.append(np.moveaxis(noise.numpy(), 2, -1))
  return np.stack(noises)


class Case:
  """A style's two pipelines with the same weights, and one run of each."""

  def __init__(self, style, folder):
    tiny.write(folder, style)
    if style in DPM:
      _change(folder, _INDEX, "scheduler", ["diffusers", DPM_CLASS])
    self.style, self.folder = style, folder
    self.pipe = pipeline.load(folder)
    self.num_frames = NUM_FRAMES[style][0]
    self.arguments = dict(
      num_frames=self.num_frames, height=H, width=W, steps=STEPS
    )
    shape = self.pipe.latent_shape(self.num_frames, H, W)
    self.noise = _draw(B, *shape)
    noises = dict(initial=self.noise)
    self.given = {}
    witness = torch.Generator().manual_seed(7)
    if style.endswith("_i2v"):
      video, mask = conditioning.first(_image(), self.num_frames)
      self.given = dict(frames=video, frame_mask=mask)
      one = (1, shape[-1], 1, *shape[1:3])
      drawn = [torch.randn(one, generator=witness) for _ in range(B)]
      drawn = np.moveaxis(torch.cat(drawn).numpy(), 1, -1)
      noises["image"] = drawn
    if self.pipe.recipe.sampler == "dpmpp_2m_sde":
      torch_shape = B, shape[0], shape[-1], *shape[1:3]
      noises["steps"] = _step_noise(torch_shape, witness, STEPS)
    self.noises = pipeline.Noise(**noises)

  @functools.cached_property
  def ours(self):
    return self.generate()

  def generate(self, **changes):
    arguments = self.arguments | self.given | {"noise": self.noises} | changes
    return self.pipe.generate(PROMPTS, **arguments)

  @functools.cached_property
  def theirs(self):
    """Video of diffusers in [-1, 1], and its latents after each step."""
    pipe, states = _torch_pipeline(self.folder), []

    def watch(pipe, step, n, kept):
      states.append(np.moveaxis(kept["latents"].numpy(), 2, -1).copy())
      return kept

    images = [Image.fromarray(x) for x in _image()]
    found = pipe(
      **(dict(image=images) if self.given else {}),
      prompt=PROMPTS,
      num_frames=self.num_frames,
      height=H,
      width=W,
      num_inference_steps=STEPS,
      latents=torch.tensor(np.moveaxis(self.noise, -1, 2)),
      generator=torch.Generator().manual_seed(7),
      output_type="pt",
      callback_on_step_end=watch,
    ).frames
    return np.moveaxis(found.numpy(), 2, -1) * 2 - 1, np.stack(states)


def _torch_pipeline(folder):
  pipe = diffusers.DiffusionPipeline.from_pretrained(folder)
  pipe.set_progress_bar_config(disable=True)
  return pipe


def _change(folder, file, field, value):
  config = json.loads((folder / file).read_text())
  config[field] = value
  (folder / file).write_text(json.dumps(config))


@pytest.fixture(scope="module")
def cases(tmp_path_factory):
  make = lambda style: Case(style, tmp_path_factory.mktemp("pipes") / style)
  return functools.cache(make)


def _psnr(found, wanted):
  """Of videos in [-1, 1], in dB."""
  return 10 * np.log10(4 / max(np.mean((found - wanted) ** 2), 1e-20))


@pytest.mark.parametrize("style", NUM_FRAMES)
def test_pixels_are_diffusers(style, cases):
  case = cases(style)
  want, _ = case.theirs
  assert case.ours.shape == want.shape == (B, NUM_FRAMES[style][1], H, W, 3)
  assert _psnr(case.ours, want) >= 60
  # It is a picture, which says something.
  assert np.mean(np.abs(want) < 1) > 0.5 and want.std() > 0.1
  assert np.abs(want[0] - want[1]).mean() > 0.05


@pytest.mark.parametrize("style", ["5b", "1_5_5b_i2v"])
def test_each_step_is_diffusers(style, cases):
  """And the stages, one by one, give what `generate` does."""
  case, pipe = cases(style), cases(style).pipe
  how = pipe.settings(steps=STEPS)
  text = pipe.encode_text(PROMPTS)
  given = {"step_noise": case.noises.steps}
  if case.given:
    size, noise = (case.num_frames, H, W), case.noises.image
    draw = lambda shape: jnp.asarray(noise)
    frames = conditioning.Frames(*case.given.values())
    given["given"] = pipe.give(size, case.noise.shape, frames, draw=draw)
  latents, states = pipe.sample(
    text, noise=case.noise, how=how, traced=True, **given
  )
  _, want = case.theirs
  assert states.shape == want.shape == (STEPS, *case.noise.shape)
  for found, wanted in zip(states, want, strict=True):
    error = np.linalg.norm(found - wanted) / np.linalg.norm(wanted)
    assert error <= 1e-4
  np.testing.assert_array_equal(latents, states[-1])
  video = pipe.decode(latents, case.num_frames)
  assert _psnr(np.clip(video, -1, 1), case.ours) >= 100


def test_one_network_is_in_memory_at_a_time(cases, monkeypatch):
  pipe, most, read = cases("5b_i2v").pipe, [], []
  get = parts.Weights.__getitem__

  def watched(weights, name):
    params = get(weights, name)
    most.append(weights.held)
    if read[-1:] != [name]:
      read.append(name)
    return params

  monkeypatch.setattr(parts.Weights, "__getitem__", watched)
  cases("5b_i2v").generate()
  assert pipe.params.held == () and {len(names) for names in most} == {1}
  order = ["autoencoder", "text_encoder", "denoiser", "autoencoder"]
  assert read == order


def test_freed_weights_leave_memory(cases):
  case = cases("5b_i2v")
  case.generate()
  before = {id(x) for x in jax.live_arrays()}
  params = case.pipe.params["denoiser"]
  leaves = {id(x) for x in jax.tree.leaves(params)}
  assert leaves and not leaves & before
  del params
  case.pipe.free("denoiser")
  assert not leaves & {id(x) for x in jax.live_arrays()}


def test_all_weights_are_held_where_asked(cases):
  case = cases("2b")
  pipe = pipeline.load(case.folder, sequential=False)
  assert set(pipe.params) == {"autoencoder", "text_encoder", "denoiser"}
  assert isinstance(pipe.params, dict) and not pipe.sequential
  pipe.free("denoiser")
  assert jax.tree.leaves(pipe.params["denoiser"])


def test_a_batch_in_parts_is_the_same(cases, monkeypatch):
  """Of noise from the seed: a stochastic sampler's too."""
  case, found = cases("5b"), []

  def decode(pipe, latents, num_frames):
    found.append(np.asarray(latents))
    return found[-1]

  monkeypatch.setattr(pipeline.Pipeline, "decode", decode)
  for arguments in ({"seed": 3}, {"seed": 3, "batch_size": 1}, {"seed": 4}):
    arguments |= case.arguments
    case.pipe.generate(PROMPTS, **arguments)
  whole, first, second, other = found
  np.testing.assert_allclose(np.concatenate([first, second]), whole, atol=1e-3)
  assert np.abs(whole - other).mean() > 0.1


def test_negative_prompts_are_the_recipe_s_or_the_caller_s(cases):
  """The recipe's is the empty text, and the padding behind it is seen."""
  pipe = cases("2b").pipe
  found = pipe.encode_text(PROMPTS)
  np.testing.assert_array_equal(
    found.embeds, pipe.encode_text(PROMPTS, ["", ""]).embeds
  )
  other = pipe.encode_text(PROMPTS, NEGATIVE).embeds
  np.testing.assert_array_equal(other[1:], found.embeds[1:])
  assert np.abs(other[0] - found.embeds[0]).max() > 0.1
  alone = pipe.encode_text(PROMPTS, guided=False)
  np.testing.assert_allclose(alone.embeds, found.embeds[2:], atol=1e-6)
  with torch.no_grad():
    want, behind = _torch_pipeline(cases("2b").folder).encode_prompt(
      PROMPTS, NEGATIVE
    )
  np.testing.assert_allclose(other, np.concatenate([behind, want]), atol=1e-4)


def test_recipes_are_the_scheduler_s_and_the_size_s(cases):
  ddim, dpm = (cases(style).pipe.recipe for style in ("2b", "1_5_5b_i2v"))
  assert (ddim.sampler, dpm.sampler) == ("ddim", "dpmpp_2m_sde")
  assert ddim.schedule["snr_shift"] == 3 and dpm.schedule["snr_shift"] == 1
  assert ddim.objective == dpm.objective == "v"
  assert (ddim.num_frames, ddim.height, ddim.width) == (9, H, W)
  assert (ddim.fps, dpm.fps) == (8, 16)
  assert ddim.steps == 50 and ddim.experts[0].guidance == 6


def test_the_tool_samples_from_an_image(cases, tmp_path):
  case = cases("5b_i2v")
  image, out = tmp_path / "image.png", tmp_path / "clip.npy"
  # Twice the size in the same proportion, turned by its camera.
  big = Image.fromarray(np.repeat(np.repeat(_image()[0], 2, 0), 2, 1))
  exif = Image.Exif()
  exif[274] = 6
  big.transpose(Image.Transpose.ROTATE_90).save(image, exif=exif)
  flags.FLAGS.mark_as_parsed()
  with flagsaver.as_parsed(
    prompt=PROMPTS,
    checkpoint=str(case.folder),
    image=str(image),
    out=str(out),
    steps=str(STEPS),
    batch_size=str(B),
  ):
    sample.main(["sample.py"])
  found = np.load(tmp_path / "clip_000.npy")
  assert found.shape == (9, H, W, 3)
  shown = formats.read_image(image, H, W)
  want = big.resize((W, H), Image.Resampling.LANCZOS)
  np.testing.assert_array_equal(shown, want)
  video, mask = conditioning.first(np.stack([shown] * B), 9)
  want = case.pipe.generate(PROMPTS, steps=STEPS, frames=video, frame_mask=mask)
  np.testing.assert_allclose(found, want[0], atol=1e-5)


def _copy(case, tmp_path, *, without=None, changed=()):
  """Copy a pipeline's folder, without a part or with other fields."""
  folder = tmp_path / "copy"
  shutil.copytree(case.folder, folder)
  if without:
    path = folder / without
    shutil.rmtree(path) if path.is_dir() else path.unlink()
  for change in changed:
    _change(folder, *change)
  return folder


@pytest.mark.parametrize(
  ("without", "changed", "message"),
  [
    ("vae", (), "is a CogVideoXPipeline without vae/config.json"),
    ("text_encoder", (), "without text_encoder/config.json"),
    ("tokenizer", (), "without tokenizer/spiece.model or tokenizer"),
    (_SCHEDULER, (), "without scheduler/scheduler_config.json"),
    (
      None,
      ((_INDEX, "_class_name", "SoraPipeline"),),
      "'SoraPipeline', which is not known; known are .*CogVideoXImageToVideo",
    ),
    (
      None,
      ((_INDEX, "scheduler", ["diffusers", "UniPCMultistepScheduler"]),),
      "'UniPCMultistepScheduler'.*known are CogVideoXDDIMScheduler",
    ),
    (
      None,
      ((_SCHEDULER, "prediction_type", "flow"),),
      "prediction_type .* got 'flow'",
    ),
    (None, ((_SCHEDULER, "trained_betas", [0.1]),), "trained_betas"),
    (
      None,
      (("transformer/config.json", "_class_name", "SoraTransformer3DModel"),),
      "'SoraTransformer3DModel', which is no known denoiser",
    ),
    (
      None,
      (("transformer/config.json", "num_layers", 3),),
      "missing: transformer_blocks.2",
    ),
    (
      None,
      (("vae/config.json", "temporal_compression_ratio", 8),),
      "frames a latent frame of transformer and vae .* 4 and 8",
    ),
  ],
)
def test_a_folder_that_is_not_whole_is_refused(
  without, changed, message, cases, tmp_path
):
  folder = _copy(cases("2b"), tmp_path, without=without, changed=changed)
  with pytest.raises(ValueError, match=message):
    pipeline.load(folder)


def test_what_is_no_folder_is_refused(cases, tmp_path):
  with pytest.raises(ValueError, match="hf download THUDM/CogVideoX-2b --loc"):
    pipeline.load("THUDM/CogVideoX-2b")
  with pytest.raises(ValueError, match="does not exist"):
    pipeline.load(tmp_path / "nowhere")
  with pytest.raises(ValueError, match="component .* give .* model_index"):
    pipeline.load(cases("2b").folder / "transformer")
  with pytest.raises(ValueError, match="step is of a workdir"):
    pipeline.load(cases("2b").folder, step=3)
  with pytest.raises(ValueError, match="sequential is for released"):
    pipeline.load(pipeline.RELEASE, sequential=True)


def _frames(dtype=np.float32, shape=(B, 9, H, W, 3)):
  mask = np.broadcast_to(np.arange(9) == 0, (B, 9))
  return dict(frames=np.zeros(shape, dtype), frame_mask=mask)


@pytest.mark.parametrize(
  ("style", "arguments", "message"),
  [
    ("5b_i2v", {}, "first frame .* got frames \\[\\]"),
    ("5b_i2v", _frames(np.uint8), r"floats in \[-1, 1\], got uint8"),
    ("5b_i2v", _frames(shape=(B, 9, W, H, 3)), "frames must be .* resize them"),
    (
      "5b_i2v",
      _frames() | {"frame_mask": np.ones((B, 9), bool)},
      "first frame of every clip and no other",
    ),
    ("5b_i2v", {"frame_mask": np.ones((B, 9), bool)}, "need frames"),
    ("2b", _frames(), "takes text alone, .* use one of .*5b_i2v"),
    ("2b", {"num_frames": 10}, r"num_frames must be 4n\+1, got 10; try 9"),
    ("2b", {"width": 50}, "width must be a multiple of 16, got 50; try 48"),
    ("5b_i2v", _frames() | {"height": 48}, "frames must be"),
    (
      "2b",
      {"noise": pipeline.Noise(steps=np.zeros((4, B, 3, 4, 6, 4)))},
      "dpmpp_2m_sde",
    ),
    ("2b", {"negative_prompts": ["x"]}, "one a prompt"),
    ("2b", {"batch_size": 0}, "batch_size must be at least 1"),
  ],
)
def test_generate_refuses(style, arguments, message, cases):
  arguments = {"steps": STEPS} | arguments
  with pytest.raises(ValueError, match=message):
    cases(style).pipe.generate(PROMPTS, **arguments)


def test_a_noise_level_for_each_frame_is_refused(cases):
  pipe, noise = cases("2b").pipe, _draw(B, 3, 4, 6, C)
  text = pipe.encode_text(PROMPTS)
  given = types.Given(jnp.asarray(noise), jnp.ones((B, 3), bool))
  with pytest.raises(ValueError, match="one noise level for a clip"):
    pipe.sample(text, noise=noise, given=given)
  with pytest.raises(ValueError, match="text must have 4 rows"):
    pipe.sample(jax.tree.map(lambda x: x[:B], text), noise=noise)


@pytest.mark.parametrize(
  ("arguments", "params", "compute"),
  [
    ({}, "bfloat16", "bfloat16"),
    ({"dtype": "float32"}, "float16", "float32"),
    ({"param_dtype": "float32", "dtype": "bfloat16"}, "float32", "bfloat16"),
  ],
)
def test_dtypes_of_a_release_in_float16(arguments, params, compute, half):
  pipe = pipeline.load(half, **arguments)
  for name in ("autoencoder", "text_encoder", "denoiser"):
    assert pipe.modules[name].cfg.dtype == compute
  dtypes = {x.dtype.name for x in jax.tree.leaves(pipe.params["text_encoder"])}
  assert dtypes == {params}


def test_other_dtypes_are_the_stored_ones_or_refused(half, cases):
  pipe = cases("2b").pipe
  assert pipe.modules.denoiser.cfg.dtype == "float32"
  with pytest.raises(ValueError, match="dtype must be bfloat16 or float32"):
    pipeline.load(half, dtype="float16")


@pytest.fixture(scope="module")
def half(tmp_path_factory):
  """A pipeline's folder in float16, as 2B was released."""
  folder = tmp_path_factory.mktemp("half") / "pipe"
  tiny.write(folder, "2b")
  for file in folder.glob("*/*.safetensors"):
    tensors = safetensors.numpy.load_file(file)
    half = {key: x.astype(np.float16) for key, x in tensors.items()}
    safetensors.numpy.save_file(half, file)
  return folder


def test_images_of_another_kind_or_size_are_refused(tmp_path):
  path = tmp_path / "image.png"
  with pytest.raises(ValueError, match="is not a file"):
    formats.read_image(path, H, W)
  path.write_text("no image")
  with pytest.raises(ValueError, match="cannot be read as an image"):
    formats.read_image(path, H, W)
  Image.new("RGB", (W, W)).save(path)
  with pytest.raises(ValueError, match="another proportion .* 48 and 32; crop"):
    formats.read_image(path, H, W)
  pictures = [Image.new("RGB", (W, H), colour) for colour in ("red", "blue")]
  pictures[0].save(
    tmp_path / "image.gif", save_all=True, append_images=pictures[1:]
  )
  with pytest.raises(ValueError, match="several frames"):
    formats.read_image(tmp_path / "image.gif", H, W)
