"""What every system can do, by its row in the list.

Each system that has tiny pipelines goes through the package's flows with its
first one, and in slow tests with the others, and so does the family that these
tests bring along (`tests/models/toy`): loaded, sampled, converted, cached,
trained, exported, measured, compared and compiled for a TPU.
"""

import importlib.util
import json
import os
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest

from configs import defaults
from tests.models.toy import system as toy
from vdit_jax import checkpoint, export, pipeline, train
from vdit_jax.cache import dataset
from vdit_jax.compare import __main__ as compare
from vdit_jax.convert import __main__ as convert
from vdit_jax.convert import folders
from vdit_jax.data import moving_digits, reading
from vdit_jax.evaluate import evaluation
from vdit_jax.models import families, frame_positions
from vdit_jax.weights import component, diffusers_folder, tiny

ROOT = pathlib.Path(__file__).resolve().parents[2]
PROMPTS = ["a red seven moving left", "two dogs run"]
DIGITS, LATENTS = "moving_digits/tiny", "latents/mine"
FRAMES, SIZE = 9, 32  # of the clips


def _cases(first=True, marks=()):
  """The first tiny pipeline of each system, or all others."""
  for system in (toy.SYSTEM, *families.SYSTEMS.values()):
    for i, variant in enumerate(system.tiny):
      if (i == 0) == first:
        yield pytest.param(f"{system.name}:{variant}", marks=marks)


class Case:
  """A system, and a random pipeline of it in a folder."""

  def __init__(self, name: str, folder: pathlib.Path):
    self.system = families.system(name.partition(":")[0])
    self.folder = folder
    tiny.write(folder, name)
    self.pipe = pipeline.load(folder)
    cfg = self.pipe.modules.denoiser.cfg
    self.length = max(self.system.max_lengths(cfg).values())
    self.networks = diffusers_folder.read(folder).networks
    self.needs = self.system.needs(cfg)

  def frames(self, count: int, seed: int = 0) -> dict[str, np.ndarray]:
    """The frames of each clip that must be given, if any."""
    if not self.needs:
      return {}
    mask = np.tile(frame_positions.mask(self.needs, FRAMES), (count, 1))
    video = np.random.default_rng(seed).uniform(-1, 1, (*mask.shape, 1, 1, 1))
    shape = (*mask.shape, SIZE, SIZE, 3)
    video = np.broadcast_to(video, shape).astype(np.float32)
    return {"frames": video, "frame_mask": mask}

  def generate(self, pipe=None, prompts=PROMPTS, **changes):
    """Two steps of sampling."""
    given = {"num_frames": FRAMES, "height": SIZE, "width": SIZE, "steps": 2}
    given |= self.frames(len(prompts)) | changes
    return (pipe or self.pipe).generate(prompts, **given)


@pytest.fixture(scope="module", autouse=True)
def row():
  """The row of the family that these tests bring along."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setitem(families.SYSTEMS, "toy", toy.SYSTEM)
    yield


@pytest.fixture(
  scope="module", params=[*_cases(), *_cases(False, pytest.mark.slow)]
)
def case(row, request, tmp_path_factory):
  """A pipeline of each system, the first by default."""
  return Case(request.param, tmp_path_factory.mktemp("systems") / "pipe")


@pytest.fixture(scope="module")
def data_dir(case, tmp_path_factory):
  """A data folder with clips, and their latents and captions by the case."""
  path = tmp_path_factory.mktemp("data")
  builder = moving_digits.MovingDigits(
    config="tiny", data_dir=path, file_format="array_record"
  )
  builder.download_and_prepare()
  text = dataset.TextOptions(case.folder, case.length, "float32")
  splits = ["train", "validation"]
  vae = case.networks["autoencoder"]
  dataset.build(vae, DIGITS, path, LATENTS, splits, text, "float32")
  return path


def _config(case, data_dir):
  config = defaults.tune_folder(case.system, str(case.folder))
  config.data.update({"name": LATENTS, "data_dir": str(data_dir)})
  config.denoiser.dtype = config.autoencoder.dtype = "float32"
  config.mesh.fsdp, config.batch_size, config.log_every = 1, 8, 1
  config.optim.update({"lr": 1e-2, "total_steps": 2, "warmup_steps": 1})
  config.validation.update({"every": 0, "clips": 8, "levels": (0.3, 0.8)})
  return config


def test_a_video_is_its_prompts_and_its_seeds(case):
  assert case.pipe.system is case.system
  one = case.generate(seed=1)
  assert one.shape == (2, FRAMES, SIZE, SIZE, 3) and np.isfinite(one).all()
  np.testing.assert_array_equal(one, case.generate(seed=1))
  for other in (
    case.generate(seed=2),
    case.generate(seed=1, prompts=PROMPTS[::-1]),
    case.generate(seed=1, guidance=1.0),
  ):
    assert np.abs(other - one).max() > 1e-3


def test_what_must_be_given_is_asked_for(case):
  if not case.needs:
    assert case.generate(frames=None, frame_mask=None).shape[0] == 2
    return
  with pytest.raises(ValueError, match=r"frame"):
    case.generate(frames=None, frame_mask=None)
  shown = case.generate(seed=1)
  other = case.generate(seed=1, **case.frames(2, seed=1))
  assert np.abs(other - shown).max() > 1e-3


def test_every_network_converts_there_and_back(case, tmp_path):
  assert {"autoencoder", "denoiser", *case.system.text} <= set(case.networks)
  for name, path in case.networks.items():
    orbax, back = tmp_path / name / "orbax", tmp_path / name / "back"
    convert.run(path, orbax)
    convert.run(orbax, back)
    one, two = (component.load(folder).params for folder in (path, back))
    jax.tree.map(np.testing.assert_array_equal, one, two)
    assert component.load(back).config == folders.read_config(path)


def test_its_cache_holds_latents_and_each_encoder_s_captions(case, data_dir):
  source = reading.open_source(LATENTS, "train", data_dir)
  shape = case.pipe.modules.autoencoder.latent_shape(FRAMES, SIZE, SIZE)
  record = next(reading.records(source))
  assert record["mean"].shape == shape
  assert set(source.text_widths) == set(case.system.text)
  for i, width in enumerate(source.text_widths.values()):
    name = f"embeds_{i + 1}" if i else "embeds"
    assert record[name][0].shape[-1] == width
  assert ("given_frames" in record) == bool(case.needs)
  if case.needs:
    assert record["given_frames"].shape == (len(case.needs), SIZE, SIZE, 3)
    assert source.metadata["given"] == list(case.needs)


# Our own toy alone in the default run; of the others parity and the tests of
# fine-tuning say that they train.
_TRAINED = [
  pytest.param(*row.values, marks=[] if i == 0 else pytest.mark.slow)
  for i, row in enumerate([*_cases(), *_cases(False)])
]


@pytest.mark.parametrize("case", _TRAINED, indirect=True)
@pytest.mark.parametrize("rank", [pytest.param(0, marks=pytest.mark.slow), 2])
def test_it_trains_and_what_it_leaves_samples(rank, case, data_dir, tmp_path):
  config = _config(case, data_dir)
  config.lora.rank, config.lora.base_dtype = rank, "float32"
  size = {"num_frames": FRAMES, "height": SIZE, "width": SIZE}
  config.sampling.update(size)
  if not case.needs:
    config.samples.update({"every": 2, "prompts": PROMPTS})
  train.run(config, tmp_path / "run")
  text = (tmp_path / "run" / "metrics.jsonl").read_text()
  rows = [json.loads(line) for line in text.splitlines()]
  losses = [row["loss"] for row in rows if "loss" in row]
  assert len(losses) == 2 and np.isfinite(losses).all()
  config = checkpoint.read_config(tmp_path / "run")
  assert config.denoiser.name == case.system.name
  pipe = pipeline.load(tmp_path / "run")
  video = case.generate(pipe, PROMPTS[:1])
  assert video.shape == (1, FRAMES, SIZE, SIZE, 3)
  assert np.abs(video - case.generate(prompts=PROMPTS[:1])).max() > 1e-6
  export.export(tmp_path / "run", tmp_path / "out", merge=rank > 0)
  component.load(tmp_path / "out")


@pytest.mark.slow
def test_it_trains_from_pixels_and_captions(case, data_dir, tmp_path):
  config = _config(case, data_dir)
  config.data.name = DIGITS
  train.run(config, tmp_path / "run")
  assert (tmp_path / "run" / "checkpoints" / "2").exists()


def test_its_loss_is_measured(case, data_dir):
  plan = evaluation.Plan(metrics=("loss",), num_clips=8, batch_size=8)
  results, _ = evaluation.run(plan, case.folder, DIGITS, data_dir)
  assert np.isfinite(results["validation_loss"]["value"])


def test_it_is_compared_with_pytorch_or_says_why_not(case):
  if case.system.baseline:
    assert compare.baseline(str(case.folder)) == case.system.baseline
    assert importlib.util.find_spec(case.system.baseline)
    return
  with pytest.raises(ValueError, match="no package of PyTorch has"):
    compare.baseline(str(case.folder))


_COMPILE = """
import sys
import jax
from configs import defaults
from tests.models.toy import system as toy
from vdit_jax import sharding
from vdit_jax.aot import programs, report
from vdit_jax.models import families
from vdit_jax.models import system as systems
families.SYSTEMS["toy"] = toy.SYSTEM
report.quiet()
name, folder, length, frames, size = sys.argv[1:]
config = defaults.tune_folder(families.system(name), folder)
config.mesh.fsdp, config.batch_size = 1, 4
config.data.max_length = int(length)
mesh = sharding.make_mesh(
  sharding.MeshShape(**config.mesh), report.devices("v5e:2x2")
)
clip = programs.Clip(int(frames), int(size), int(size))
with jax.set_mesh(mesh):
  for what in ("train", "sample", "decode", "encode", "text"):
    job = programs.describe(config, what, mesh, clip, 4)
    program, _ = report.compiled(job.lower())
    print(what, report.report(program, job, mesh)["peak_gib"] > 0)
"""


@pytest.mark.parametrize(
  "name",
  [
    pytest.param(case.values[0], marks=pytest.mark.slow if i else ())
    for i, case in enumerate(_cases())
  ],
)
def test_it_compiles_for_a_tpu(name, tmp_path):
  case = Case(name, tmp_path / "pipe")
  sizes = map(str, (case.length, FRAMES, SIZE))
  done = subprocess.run(
    [
      *(sys.executable, "-c", _COMPILE, case.system.name),
      *(str(case.folder), *sizes),
    ],
    cwd=ROOT,
    env=os.environ | {"PYTHONPATH": str(ROOT)},
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.stdout.split()[1::2] == ["True"] * 5, done.stderr[-2000:]
