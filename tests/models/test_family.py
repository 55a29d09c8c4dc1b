"""What a family of a few files may say of itself that others do not.

`tests/models/toy` is one. What every system gets by its row in the list is in
`test_systems.py`.
"""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest

from configs import defaults
from tests.models.toy import system as toy
from vdit_jax import checkpoint, conditioning, encoding, pipeline, train, types
from vdit_jax.cache import dataset
from vdit_jax.data import moving_digits, reading
from vdit_jax.diffusion import objectives
from vdit_jax.evaluate import evaluation
from vdit_jax.models import families, system
from vdit_jax.training import captions, denoiser, images, learner, resolve
from vdit_jax.weights import base_model, component, parts, run_config, tiny
from vdit_jax.weights import text_encoder as text_encoders

PROMPTS = ["a red seven moving left", "two dogs run"]
DIGITS, LATENTS = "moving_digits/tiny", "latents/toy"
SHOWN = "latents/shown"


@pytest.fixture(scope="module", autouse=True)
def row():
  """The family's row."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setitem(families.SYSTEMS, "toy", toy.SYSTEM)
    yield


@pytest.fixture(scope="module")
def folder(row, tmp_path_factory):
  """A random pipeline of it."""
  path = tmp_path_factory.mktemp("toy") / "pipe"
  tiny.write(path, "toy:small")
  return path


@pytest.fixture(scope="module")
def second(row, tmp_path_factory):
  """The same pipeline with a second denoiser."""
  path = tmp_path_factory.mktemp("toy") / "pipe2"
  tiny.write(path, "toy:small2")
  return path


@pytest.fixture(scope="module")
def own(row, tmp_path_factory):
  """The same pipeline in a layout of the family's own."""
  path = tmp_path_factory.mktemp("toy") / "own"
  tiny.write(path, "toy:own")
  return path


@pytest.fixture(scope="module")
def shown(row, tmp_path_factory):
  """The same pipeline, given first and last frame, with an image encoder."""
  path = tmp_path_factory.mktemp("toy") / "shown"
  tiny.write(path, "toy:shown")
  return path


@pytest.fixture(scope="module")
def latents(folder, shown, tmp_path_factory):
  """A data directory with clips, and latents and embeddings of two of them."""
  path = tmp_path_factory.mktemp("data")
  builder = moving_digits.MovingDigits(
    config="tiny", data_dir=path, file_format="array_record"
  )
  builder.download_and_prepare()
  splits = ["train", "validation"]
  for pipe, name in ((folder, LATENTS), (shown, SHOWN)):
    text = dataset.TextOptions(pipe, dtype="float32")
    vae = pipe / "vae"
    dataset.build(vae, DIGITS, path, name, splits, text, "float32")
  return path


def _config(folder, data_dir, name=LATENTS):
  config = defaults.tune_folder(toy.SYSTEM, str(folder))
  config.data.update({"name": name, "data_dir": str(data_dir)})
  config.mesh.fsdp, config.batch_size, config.log_every = 1, 8, 1
  config.optim.update({"lr": 1e-2, "total_steps": 2, "warmup_steps": 1})
  config.validation.update({"every": 0, "clips": 8, "levels": (0.3, 0.8)})
  return config


def test_it_samples_with_two_encoders_two_experts_and_three_branches(folder):
  pipe = pipeline.load(folder)
  assert pipe.system is toy.SYSTEM and len(pipe.tokenizers) == 2
  video = pipe.generate(PROMPTS, seed=1)
  assert video.shape == (2, 3, 32, 32, 3) and np.isfinite(video).all()
  frames = np.zeros_like(video)
  mask = np.arange(3)[None].repeat(2, 0) == 0
  shown = pipe.generate(PROMPTS, seed=1, frames=frames, frame_mask=mask)
  assert np.abs(shown - video).max() > 1e-3
  more = pipe.generate(
    PROMPTS, seed=1, frames=frames, frame_mask=mask, image_guidance=4.0
  )
  assert np.abs(more - shown).max() > 1e-3
  with pytest.raises(
    ValueError, match="first frame of every clip and no other"
  ):
    pipe.generate(PROMPTS, frames=frames, frame_mask=mask | True)


def test_what_fills_up_behind_is_decoded_and_left_out(folder):
  pipe = pipeline.load(folder)
  assert pipe.latent_shape(3, 32, 32) == (4, 4, 4, 3)
  latents = np.random.default_rng(0).normal(size=(1, 4, 4, 4, 3))
  whole, video = pipe.decode(latents), pipe.decode(latents, 3)
  assert whole.shape[1] == 4
  np.testing.assert_array_equal(video, whole[:, :3])


def test_an_optional_network_is_there_or_not(folder, second, tmp_path):
  without, pipe = pipeline.load(folder), pipeline.load(second)
  networks = {"autoencoder", "denoiser", *toy.NAMES}
  assert without.params.keys() == without.modules.networks.keys() == networks
  assert pipe.params.keys() == networks | {"denoiser_2"}
  assert {e.network for e in without.recipe.experts} == {"denoiser"}
  assert pipe.recipe.experts[1].network == "denoiser_2"
  video = pipe.generate(PROMPTS[:1], seed=1)
  assert np.abs(video - without.generate(PROMPTS[:1], seed=1)).max() > 1e-3
  shutil.copytree(second, tmp_path / "broken")
  shutil.rmtree(tmp_path / "broken" / "transformer_2")
  with pytest.raises(ValueError, match="without transformer_2/config.json"):
    pipeline.load(tmp_path / "broken")


@pytest.mark.parametrize("sampler", ["euler", "unipc"])
def test_one_of_two_denoisers_is_held_at_a_time(sampler, second, monkeypatch):
  read, held = [], []
  plain = parts.Weights.__getitem__

  def watched(self, name):
    found = plain(self, name)
    read.append(name)
    held.append({n for n in self.held if n.startswith("denoiser")})
    return found

  monkeypatch.setattr(parts.Weights, "__getitem__", watched)
  settings = {"seed": 1, "sampler": sampler, "batch_size": 1}
  both = pipeline.load(second).generate(PROMPTS, **settings)
  assert {"denoiser", "denoiser_2"} in held
  read.clear(), held.clear()
  pipe = pipeline.load(second, one_expert=True)
  one = pipe.generate(PROMPTS, **settings)
  np.testing.assert_allclose(one, both, atol=1e-5)
  assert max(map(len, held)) == 1
  experts = [name for name in read if name.startswith("denoiser")]
  assert experts == ["denoiser_2", "denoiser"] * 2  # of each batch
  with pytest.raises(ValueError, match="leave sequential out"):
    pipeline.load(second, one_expert=True, sequential=False)


@pytest.mark.parametrize(
  "network, guidance, times",
  [("denoiser", 3.0, (0.0, 0.5)), ("denoiser_2", 5.0, (0.5, 1.0))],
)
def test_a_run_is_of_the_denoiser_that_is_named_at_its_times(
  network, guidance, times, second, latents, tmp_path
):
  config = defaults.tune_folder(toy.SYSTEM, str(second), network)
  recipe = run_config.recipe(config)
  assert recipe.experts == (types.Expert(guidance=guidance),)  # it alone
  source = reading.open_source(DIGITS, "train", latents)
  config.data.update({"name": DIGITS, "data_dir": str(latents)})
  got = resolve.complete(config, source, tmp_path)
  folder = second / ("transformer" + network.removeprefix("denoiser"))
  assert got.init_fingerprint == component.fingerprint(folder)
  assert (got.objective.t_low, got.objective.t_high) == times
  assert resolve.complete(got, source, tmp_path) == got
  weights = base_model.load(got, np.float32)
  jax.tree.map(
    np.testing.assert_array_equal, weights, component.load(folder).params
  )
  drawn = objectives.sample_t(
    jax.random.key(0), (64,), interval=learner.objective(got).interval
  )
  assert times[0] <= drawn.min() < drawn.max() <= times[1]
  config.network = "denoiser_3"
  with pytest.raises(ValueError, match="network must be a denoiser of .*_3'"):
    resolve.complete(config, source, tmp_path)


def test_only_what_no_run_asks_for_is_optional():
  places = toy.SYSTEM.places | {
    name: system.Place(name, optional=True) for name in ("denoiser", "vae")
  }
  with pytest.raises(ValueError, match="not be optional for denoiser, which"):
    dataclasses.replace(toy.SYSTEM, places=places)


def test_texts_are_as_long_as_it_says_or_as_t5s():
  cfg, some = toy.SYSTEM.network("denoiser").config(), {"text_encoder": 7}
  own = dict(zip(toy.NAMES, (12, 7), strict=True))
  assert toy.SYSTEM.max_lengths(cfg) == own
  silent = dataclasses.replace(toy.SYSTEM, text_lengths=lambda cfg: some)
  assert silent.max_lengths(cfg) == some | {"text_encoder_2": 512}


def test_a_layout_of_its_own_is_the_same_pipeline(folder, own):
  assert not (own / "model_index.json").exists()
  pipe, same = pipeline.load(own), pipeline.load(folder)
  assert pipe.system is toy.SYSTEM and pipe.sequential
  assert pipe.recipe == same.recipe
  assert pipe.recipe.spacing == {"kind": "flow_euler"}
  one, two = (p.generate(PROMPTS[:1], seed=1) for p in (pipe, same))
  np.testing.assert_array_equal(one, two)
  config = defaults.tune_folder(toy.SYSTEM, str(own))
  assert config.autoencoder == _config(folder, "").autoencoder
  assert text_encoders.names(own) == list(toy.NAMES)
  with pytest.raises(ValueError, match="step is of a workdir"):
    pipeline.load(own, step=1)


def test_its_scheduler_may_be_another(folder, tmp_path):
  path = tmp_path / "pipe"
  shutil.copytree(folder, path)
  name, index = "UniPCMultistepScheduler", path / "model_index.json"
  fields = {"_class_name": name, "flow_shift": 3.0, "solver_order": 3}
  fields |= {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
  text = index.read_text().replace(toy.SCHEDULER["_class_name"], name)
  index.write_text(text)
  scheduler = path / "scheduler" / "scheduler_config.json"
  scheduler.write_text(json.dumps(fields))
  how = pipeline.load(path).settings()
  assert (how.sampler, how.shift, how.spacing.kind) == (
    *("unipc", 3.0),
    "flow_unipc",
  )
  assert dict(how.sampler_options) == {"order": 3, "lower_order_final": True}


def test_padding_is_zeros_and_both_texts_count(folder):
  pipe = pipeline.load(folder)
  text = pipe.encode_text(PROMPTS, guided=False)
  assert text.embeds.shape == (2, 12 + 7, 8) and np.all(text.mask)
  lengths = [
    t.encode(PROMPTS, pipe.max_lengths[name])[1]
    for name, t in pipe.tokenizers.items()
  ]
  said = np.concatenate([lengths[0], np.ones_like(lengths[1])], 1)
  assert not lengths[0].all() and not lengths[1].all()
  assert not np.any(np.asarray(text.embeds)[~said])
  assert np.abs(np.asarray(text.embeds)[said]).min() > 0


def test_a_pooled_embedding_reaches_the_denoiser(folder):
  pipe = pipeline.load(folder)
  text = pipe.encode_text(PROMPTS)
  assert text.pooled.shape == (4, 6)
  other = text.replace(pooled=text.pooled[::-1])
  a, b, c = (
    pipe.generate(PROMPTS, text=text, seed=1) for text in (text, text, other)
  )
  np.testing.assert_array_equal(a, b)
  assert np.abs(a - c).max() > 1e-3


def test_guidance_leads_away_from_the_empty_prompt(folder):
  pipe = pipeline.load(folder)
  assert pipe.recipe.negative_prompt is None
  ours, empty = pipe.encode_text(PROMPTS), pipe.encode_text(PROMPTS, ["", ""])
  jax.tree.map(np.testing.assert_array_equal, ours, empty)


def test_its_cache_holds_what_each_encoder_gave(latents):
  source = reading.open_source(LATENTS, "train", latents)
  assert source.text_widths == dict.fromkeys(toy.NAMES, 8)
  made = [
    [source.metadata[f"{name}_{what}"] for what in ("padding", "max_length")]
    for name in toy.NAMES
  ]
  assert made == [["zeroed", 12], ["seen", 7]]
  record = next(reading.records(source))
  assert record["mean"].shape == (9, 4, 4, 3)
  assert record["embeds_2"][0].shape == (7, 8)
  assert record["pooled_2"][0].shape == (6,) and "pooled" not in record


def _batch(name, data_dir, pipe, tokenizers):
  source = reading.open_source(name, "train", data_dir)
  words = {
    name: reading.Words(tokenizers.get(name), length)
    for name, length in pipe.max_lengths.items()
  }
  wanted = reading.Wanted(words, given=bool(pipe.modules.needs))
  batches = reading.batches(source, wanted, range(1), seed=3, batch_size=8)
  [(batch, _)] = batches
  return batch


def test_its_loss_from_the_cache_is_that_from_pixels(folder, latents):
  """Pooled embeddings too, and those of the empty caption."""
  pipe = pipeline.load(folder)
  weights = {name: pipe.params[name] for name in pipe.modules.networks}
  weights["null"] = {
    name: jax.tree.map(
      lambda x: np.asarray(x[0]),
      text_encoders.load(folder, "float32", name=name).encode(
        [""], pipe.max_lengths[name], rule.padding
      ),
    )
    for name, rule in toy.SYSTEM.text.items()
  }

  def losses(batch, dropout=0.0):
    goal = denoiser.Objective("flow", shift=1.0, caption_dropout=dropout)
    loss = denoiser.make_loss(pipe.modules, goal)
    drawn = loss.draw(batch, jax.random.key(1))
    return np.asarray(loss.terms(weights, weights, batch, drawn)["loss"])

  cached = _batch(LATENTS, latents, pipe, {})
  pixels = _batch(DIGITS, latents, pipe, pipe.tokenizers)
  kept = losses(cached)
  np.testing.assert_allclose(kept, losses(pixels), rtol=2e-3)
  two = cached.captions["text_encoder_2"]
  assert two.pooled.shape == (8, 6) and two.embeds.shape == (8, 7, 8)
  for field in ("pooled", "embeds"):
    rolled = two.replace(**{field: np.roll(getattr(two, field), 1, 0)})
    rolled = dict(cached.captions) | {"text_encoder_2": rolled}
    assert np.abs(losses(cached.replace(captions=rolled)) - kept).max() > 1e-3
  nulls = {
    name: types.Captions(
      **{k: np.stack([x] * 8) for k, x in vars(null).items() if x is not None}
    )
    for name, null in weights["null"].items()
  }
  want = losses(cached.replace(captions=nulls))
  np.testing.assert_allclose(losses(cached, dropout=0.999), want, rtol=1e-5)
  assert np.abs(want - kept).max() > 1e-3


def test_it_trains_from_a_layout_of_its_own(own, latents, tmp_path):
  config = _config(own, latents)
  config.data.name = DIGITS
  train.run(config, tmp_path / "run")
  assert (tmp_path / "run" / "checkpoints" / "2").exists()


def _given(video):
  """First and last frames of clips [B, F, H, W, 3]."""
  mask = np.zeros(video.shape[:2], bool)
  mask[:, [0, -1]] = True
  return {"frames": video, "frame_mask": mask}


def test_first_and_last_frame_and_their_embeddings_are_given(shown):
  pipe = pipeline.load(shown)
  assert pipe.modules.needs == (0, -1) and "image_encoder" in pipe.params
  frames = np.zeros((2, 3, 32, 32, 3), np.float32)
  one = pipe.generate(PROMPTS, seed=1, **_given(frames))
  frames[:, -1] = 0.5
  assert (
    np.abs(pipe.generate(PROMPTS, seed=1, **_given(frames)) - one).max() > 0
  )
  frames[:, 1] = 0.5  # is not given
  same = pipe.generate(PROMPTS, seed=1, **_given(frames))
  found = pipe.give(
    (3, 32, 32),
    (2, 4, 4, 4, 3),
    conditioning.Frames(frames, _given(frames)["frame_mask"]),
  )
  assert found.cond.image_embeds.shape == (2, 8, 8)
  np.testing.assert_array_equal(found.cond.latents[:, 2:], 0)
  assert np.isfinite(same).all()
  with pytest.raises(ValueError, match="given the first and the last frames"):
    pipe.generate(PROMPTS)


def test_a_cache_keeps_given_frames_and_their_embeddings(shown, latents):
  source = reading.open_source(SHOWN, "train", latents)
  known = source.metadata
  assert known["given"] == [0, -1] and known["given_stride"] == 8
  record = next(reading.records(source))
  assert "given_frames" not in next(
    reading.records(reading.open_source(LATENTS, "train", latents))
  )
  assert record["given_frames"].shape == (2, 32, 32, 3)
  assert record["given_image_encoder"].shape == (2, 4, 8)
  video = next(reading.records(reading.open_source(DIGITS, "train", latents)))
  np.testing.assert_array_equal(record["given_frames"], video["video"][[0, -1]])


def test_what_is_shown_is_that_of_sampling_from_pixels_and_cache(
  shown, latents
):
  pipe = pipeline.load(shown)
  cached = _batch(SHOWN, latents, pipe, {})
  pixels = _batch(DIGITS, latents, pipe, pipe.tokenizers)
  weights = {k: pipe.params[k] for k in ("autoencoder", "image_encoder")}
  show = lambda batch, weights: (
    images.show(pipe.modules, types.Image(), weights, batch, 9, None).cond
  )
  whole = show(pixels, weights)
  assert cached.video is None and list(cached.encoded) == ["image_encoder"]
  kept = show(cached, {"autoencoder": weights["autoencoder"]})
  video = encoding.to_float(pixels.video)
  sampled = pipe.give(
    (9, 32, 32), (8, 10, 4, 4, 3), conditioning.Frames(*_given(video).values())
  ).cond
  for other in (kept, sampled):
    for name in ("latents", "image_embeds"):
      a, b = getattr(whole, name), getattr(other, name)
      np.testing.assert_allclose(a, b, rtol=2e-3, atol=1e-3)
  assert np.ptp(whole.image_embeds) > 0.1


@pytest.mark.parametrize(
  "name", [SHOWN, pytest.param(DIGITS, marks=pytest.mark.slow)]
)
def test_it_trains_what_is_given_frames(name, shown, latents, tmp_path):
  config = _config(shown, latents, name)
  assert config.image.noise_mean == -4.0  # the system's
  train.run(config, tmp_path / "run")
  pipe = pipeline.load(tmp_path / "run")
  made_by = checkpoint.read_config(tmp_path / "run").image_encoder_fingerprint
  assert len(made_by) == 16 and "image_encoder" in pipe.params
  frames = np.zeros((1, 3, 32, 32, 3), np.float32)
  video = pipe.generate(PROMPTS[:1], **_given(frames))
  assert video.shape == frames.shape
  with pytest.raises(
    ValueError, match=r"frames \[\] .* given frames \[0, -1\]"
  ):
    train.run(_config(shown, latents), tmp_path / "other")


def test_a_batch_with_what_is_given_is_as_it_is_described(
  shown, latents, tmp_path
):
  """For the compiler, which sees no data."""
  source = reading.open_source(SHOWN, "train", latents)
  config = resolve.complete(_config(shown, latents, SHOWN), source, tmp_path)
  wanted = learner.wanted(config, captions.words(config, source, tmp_path))
  batches = reading.batches(source, wanted, range(1), seed=0, batch_size=8)
  batch, _ = next(batches)
  described = learner.batch(config, 9, 32, 32)
  assert batch.frames.shape == (8, 2, 32, 32, 3)
  shapes = lambda tree: jax.tree.map(lambda x: x.shape, tree)
  assert shapes(described) == shapes(batch)


def test_its_loss_is_measured_with_what_is_given(shown, latents):
  plan = evaluation.Plan(metrics=("loss",), num_clips=8, batch_size=8)
  values = []
  for name in (SHOWN, DIGITS):
    results, _ = evaluation.run(plan, shown, name, latents)
    values.append(results["validation_loss"]["value"])
  np.testing.assert_allclose(*values, rtol=1e-2)


@pytest.fixture
def mixed(monkeypatch):
  """The family with a learned null for its second encoder alone."""
  rules = {
    "text_encoder": system.TextRule("zeroed", "prompt"),
    "text_encoder_2": system.TextRule("masked", "learned"),
  }
  known = dataclasses.replace(toy.SYSTEM, text=rules)
  monkeypatch.setitem(families.SYSTEMS, "toy", known)
  return known


def test_each_encoder_has_its_own_null(mixed, folder, latents):
  pipe = pipeline.load(folder)
  text, empty = pipe.encode_text(PROMPTS), pipe.encode_text(PROMPTS, ["", ""])
  assert text.embeds.shape == (4, 12 + 7, 8)
  # Of the first the empty prompt's; of the second what the denoiser learns.
  np.testing.assert_array_equal(text.embeds[:2, :12], empty.embeds[:2, :12])
  assert not text.mask[:2, 12:].any() and not np.any(text.pooled[:2])
  assert text.mask[2:, 12].all() and np.all(text.pooled[2:] != 0)
  config = _config(folder, latents)
  config.samples.prompts = tuple(PROMPTS)
  config.text_encoder.dtype = config.text_encoder_2.dtype = "float32"
  before, frozen = captions.encode(config, PROMPTS, False)
  assert list(frozen["null"]) == ["text_encoder"]
  for name in ("mask", "pooled"):
    np.testing.assert_allclose(
      getattr(before, name), getattr(text, name), atol=1e-6
    )
  said = np.asarray(text.mask)
  np.testing.assert_allclose(
    np.asarray(before.embeds)[said], np.asarray(text.embeds)[said], atol=1e-6
  )


def test_a_learned_null_has_no_pooled_embedding_in_training(
  mixed, folder, latents
):
  """Neither from a cache, which has one, nor from tokens."""
  pipe = pipeline.load(folder)
  cached = _batch(LATENTS, latents, pipe, {}).captions
  pixels = _batch(DIGITS, latents, pipe, pipe.tokenizers).captions
  assert cached["text_encoder_2"].pooled.all()
  for given in (cached, pixels):
    unsaid = given["text_encoder_2"]
    unsaid = unsaid.replace(mask=unsaid.mask & (np.arange(8) % 2 == 0)[:, None])
    found = encoding.encode_each(
      pipe.modules, pipe.params, dict(given) | {"text_encoder_2": unsaid}
    )
    pooled = np.asarray(found["text_encoder_2"].pooled)
    assert pooled[::2].all() and not pooled[1::2].any()
