"""compare: the same numbers on both sides, and what is made of them."""

import dataclasses
import importlib.util
import json
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from vdit_jax import pipeline
from vdit_jax.compare import jobs, report, stages
from vdit_jax.compare import ours as sides
from vdit_jax.media import formats
from vdit_jax.weights import tiny

pytest.importorskip("diffusers")

_DPM = "CogVideoXDPMScheduler"
JOB = jobs.Job(
  checkpoint="somewhere/pipe",
  prompt="a <red> seven",
  negative_prompt="",
  images=(),
  steps=3,
  guidance=(6.0,),
  num_frames=5,
  height=16,
  width=24,
  dtype="float32",
  seed=0,
)


def _run(seed):
  """A made-up run; with another seed, one a little off."""
  rng, off = np.random.default_rng(0), np.random.default_rng(seed)
  draw = lambda *s: (
    rng.standard_normal(s) + 1e-3 * off.standard_normal(s)
  ).astype(np.float32)
  return jobs.Run(
    text=draw(2, 4, 3),
    latents=draw(3, 2, 2, 3, 4),
    video=np.clip(draw(5, 16, 24, 3), 0, 1),
    seconds={"text": 0.5, "sample": 2.0, "decode": 1.0},
    compile_seconds={"text": 1.0, "sample": 4.0, "decode": 2.0},
    peak_bytes={"host": 2**30},
    about={"fps": 8.0},
  )


def test_errors_are_what_they_say():
  wanted = np.array([[0.0, 3.0], [4.0, 0.0]])
  error = stages.measure(wanted + [[0, 0], [0, 0.5]], wanted)
  assert error.max_abs == 0.5
  assert error.relative == pytest.approx(0.1)
  assert error.psnr == pytest.approx(10 * np.log10(4**2 / (0.25 / 4)))
  error = stages.measure(wanted + 0.1, wanted, peak=1.0)
  assert error.psnr == pytest.approx(20)
  assert stages.measure(wanted, wanted) == stages.Error(0, 0, None)


def test_refuses_what_cannot_be_compared():
  with pytest.raises(ValueError, match=r"found is \(3,\), but wanted \(2,\)"):
    stages.measure(np.zeros(3), np.zeros(2))
  for bad in (np.nan, np.inf):
    with pytest.raises(ValueError, match="not finite.*--dtype=float32"):
      stages.measure(np.array([bad]), np.zeros(1))


def test_files_hold_jobs_and_runs(tmp_path):
  jobs.write_job(tmp_path, JOB)
  assert jobs.read_job(tmp_path) == JOB
  run = _run(1)
  jobs.write_run(tmp_path, "side", run)
  again = jobs.read_run(tmp_path, "side")
  for field in dataclasses.fields(jobs.Run):
    a, b = getattr(run, field.name), getattr(again, field.name)
    np.testing.assert_equal(a, b)


_PEAKS = """
import numpy as np
from vdit_jax.compare import jobs
before = jobs.peak_host_bytes()
np.ones(2 * 10**8, np.uint8)
print(before, jobs.peak_host_bytes())
"""


def test_peak_is_the_process_own():
  """A child's is not that of its parent, which holds more."""
  command = [sys.executable, "-c", _PEAKS]
  done = subprocess.run(command, capture_output=True, text=True, check=True)
  before, after = map(int, done.stdout.split())
  assert 2**20 < before < 150 * 2**20 < jobs.peak_host_bytes()
  assert 190_000_000 < after - before < 210_000_000


def test_page_shows_what_was_measured(tmp_path):
  ours, theirs = _run(1), _run(2)
  report.write(tmp_path, JOB, ours, theirs, 8.0)
  text = (tmp_path / report.PAGE).read_text()
  assert text.count("<video") == 3 and text.count("<polyline") == 3
  assert "a &lt;red&gt; seven" in text
  for row in report.rows(ours, theirs):
    assert f"<td>{row[0]}</td><td>{row[1]:.4g}</td>" in text
  joined, fps = formats.read(tmp_path / report.VIDEO)
  assert fps == 8 and len(joined) == 5
  width = joined.shape[2] * 24 // (2 * 24 + 4)
  left, right = joined[:, :, :width], joined[:, :, -width:]
  assert np.abs(left.astype(int) - right).mean() < 2
  assert left.std() > 20


def _baseline(*given, **named):
  from vdit_jax.compare import torch_side  # needs torch
  from vdit_jax.models.cogvideox import baseline

  return torch_side.run(baseline.SIDE, *given, **named)


def _both(job):
  """Run both sides in this process; the tool does so in two of their own."""
  pipe = pipeline.load(job.checkpoint, dtype="float32")
  job = sides.settle(job, pipe.recipe)
  noises = sides.draw(job, pipe)
  return job, noises, sides.run(job, pipe, **noises), _baseline(job, **noises)


@pytest.mark.slow
def test_image_to_video(tmp_path):
  """1.5's: an image, and a latent frame of padding that is dropped."""
  tiny.write(tmp_path / "pipe", "1_5_5b_i2v")
  pixels = np.random.default_rng(0).integers(0, 256, (32, 48, 3), np.uint8)
  Image.fromarray(pixels).save(tmp_path / "first.png")
  job = dataclasses.replace(
    JOB,
    checkpoint=str(tmp_path / "pipe"),
    images=(str(tmp_path / "first.png"),),
    guidance=None,
    **dict(num_frames=9, height=32, width=48),
  )
  job, _, ours, theirs = _both(job)
  assert job.guidance == (6.0,)  # the release's
  assert ours.latents.shape == (3, 4, 4, 6, 4)
  assert ours.video.shape == (9, 32, 48, 3)
  found = stages.summary(job, ours, theirs)
  assert [s["name"] for s in found["stages"]] == ["text", "sample", "decode"]
  assert len(found["steps"]) == 3
  for error in (*found["steps"], *(s["error"] for s in found["stages"])):
    assert 0 < error["relative"] < 1e-4 and error["psnr"] > 60
  json.dumps(found)


@pytest.mark.slow
def test_stochastic_scheduler_draws_the_same(tmp_path):
  """Of one image, without guidance."""
  tiny.write(tmp_path / "pipe", "2b")
  path = tmp_path / "pipe" / "scheduler" / "scheduler_config.json"
  fields = json.loads(path.read_text())
  path.write_text(json.dumps(fields | {"_class_name": _DPM}))
  path = tmp_path / "pipe" / "model_index.json"
  fields = json.loads(path.read_text())
  path.write_text(json.dumps(fields | {"scheduler": ["diffusers", _DPM]}))
  changes = dict(
    checkpoint=str(tmp_path / "pipe"), num_frames=1, guidance=(1.0,)
  )
  job = dataclasses.replace(JOB, height=16, width=16, **changes)
  job, noises, found, wanted = _both(job)
  assert noises["step_noise"].shape == (3, 1, 1, 2, 2, 4)
  assert found.text.shape == wanted.text.shape == (1, 226, 16)
  for error in stages.steps(found, wanted):
    assert 0 < error.relative < 1e-4
  assert stages.measure(found.video, wanted.video, 1.0).psnr > 60
  other = _baseline(job, noises["noise"], noises["step_noise"][::-1])
  assert stages.measure(other.latents, wanted.latents).relative > 0.01


def test_tool_ends_with_a_sides_error(tmp_path):
  command = [sys.executable, "-m", "vdit_jax.compare", "--prompt=two dogs run"]
  command += ["--checkpoint=THUDM/CogVideoX-2b", f"--json={tmp_path}/x.json"]
  done = subprocess.run(command, capture_output=True, text=True, check=False)
  assert done.returncode == 2 and not (tmp_path / "x.json").exists()
  assert "hf download" in done.stderr


def test_what_a_side_refuses_is_refused_in_one_line(tmp_path):
  """What it takes the networks to know: a size that they do not take."""
  tiny.write(tmp_path / "pipe", "2b")
  command = [sys.executable, "-m", "vdit_jax.compare", "--prompt=two dogs run"]
  command += [f"--checkpoint={tmp_path}/pipe", "--height=17"]
  done = subprocess.run(command, capture_output=True, text=True, check=False)
  assert done.returncode == 2 and "Traceback" not in done.stderr
  last = done.stderr.splitlines()[-1]
  assert last.startswith("compare: --height must be a multiple of 16, got 17")


def test_says_what_to_install(monkeypatch):
  tool = importlib.import_module("vdit_jax.compare.__main__")
  plain = importlib.util.find_spec
  gone = lambda name: None if name == "diffusers" else plain(name)
  monkeypatch.setattr(importlib.util, "find_spec", gone)
  with pytest.raises(ValueError, match=r"needs diffusers.*vdit_jax\[torch\]"):
    tool.check_installed()
