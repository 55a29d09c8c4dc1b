"""Laws of a released pipeline's folder: all its parts, or what is missing."""

import json
import shutil

import pytest

from vdit_jax.diffusion import schedules
from vdit_jax.models import families
from vdit_jax.weights import diffusers_folder, tiny


@pytest.fixture(scope="module")
def released(tmp_path_factory):
  path = tmp_path_factory.mktemp("released") / "pipe"
  tiny.write(path, "2b")
  return path


@pytest.fixture
def folder(released, tmp_path):
  """A copy, to be harmed."""
  shutil.copytree(released, tmp_path / "pipe")
  return tmp_path / "pipe"


def change(path, **fields):
  path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def test_a_whole_folder_says_where_its_parts_are(released):
  assert diffusers_folder.is_one(released)
  found = diffusers_folder.read(released)
  assert found.system is families.system("cogvideox")
  folders = {"autoencoder": "vae", "denoiser": "transformer"}
  folders |= {"text_encoder": "text_encoder"}
  assert found.networks == {k: released / v for k, v in folders.items()}
  assert found.tokenizers == {"text_encoder": released / "tokenizer"}


def test_its_scheduler_says_how_it_is_sampled(released, folder):
  got = diffusers_folder.read(released).sampling
  assert (got["sampler"], got["objective"]) == ("ddim", "v")
  schedule = schedules.Schedule(**got["schedule"])
  assert schedule.zero_terminal_snr and schedule.snr_shift == 3.0
  config = folder / "scheduler" / "scheduler_config.json"
  change(config, snr_shift_scale=1.0, timestep_spacing="linspace")
  got = diffusers_folder.read(folder).sampling
  assert got["schedule"]["snr_shift"] == 1.0
  assert got["spacing"]["kind"] == "linspace"


def test_the_index_names_the_scheduler_whoever_wrote_its_config(folder):
  scheduler = ["diffusers", "CogVideoXDPMScheduler"]
  change(folder / "model_index.json", scheduler=scheduler)
  assert diffusers_folder.read(folder).sampling["sampler"] == "dpmpp_2m_sde"
  change(folder / "model_index.json", scheduler=["diffusers", "Euler"])
  with pytest.raises(ValueError, match="class 'Euler', which is not known"):
    diffusers_folder.read(folder)
  change(folder / "model_index.json", scheduler=None)
  with pytest.raises(ValueError, match="scheduler must be a list of 2"):
    diffusers_folder.read(folder)


def test_all_that_is_missing_is_listed(folder):
  (folder / "vae" / "config.json").unlink()
  shutil.rmtree(folder / "scheduler")
  for file in (folder / "tokenizer").iterdir():
    file.unlink()
  with pytest.raises(ValueError, match="CogVideoXPipeline without") as error:
    diffusers_folder.read(folder)
  said = str(error.value)
  assert "vae/config.json" in said and "scheduler/scheduler_config" in said
  assert "tokenizer/" in said and "transformer" not in said


def test_a_part_is_found_in_a_pipeline_or_is_the_folder(released):
  vae = released / "vae"
  assert diffusers_folder.part(released, "autoencoder") == vae
  assert diffusers_folder.part(vae, "autoencoder") == vae
  assert not diffusers_folder.is_one(vae)


def test_an_unknown_pipeline_names_those_that_are_known(folder):
  change(folder / "model_index.json", _class_name="SoraPipeline")
  for call in (
    diffusers_folder.read,
    lambda path: diffusers_folder.part(path, "denoiser"),
  ):
    message = "class 'SoraPipeline', .*CogVideoXImageToVideo.*CogVideoXPipeline"
    with pytest.raises(ValueError, match=message):
      call(folder)


def test_what_is_not_here_is_said_how_to_get(released, tmp_path, monkeypatch):
  diffusers_folder.check_local(released)
  monkeypatch.chdir(tmp_path)
  message = "no folder here; .*hf download zai-org/X-2b --local-dir=X-2b"
  with pytest.raises(ValueError, match=message):
    diffusers_folder.check_local("zai-org/X-2b")
  with pytest.raises(ValueError, match="gone does not exist"):
    diffusers_folder.check_local(tmp_path / "gone")
