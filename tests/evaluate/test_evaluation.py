"""The whole of evaluate on the packaged model and a few tiny clips."""

import dataclasses
import json
import re

import numpy as np
import pytest

from vdit_jax import pipeline
from vdit_jax.data import moving_digits, prompt_files
from vdit_jax.evaluate import evaluation
from vdit_jax.metrics import classifier
from vdit_jax.weights import tiny

_DATA = "moving_digits/tiny"
_ENTRY = {"value", "ci95", "ceiling", "n"}


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
  """A data folder with the tiny dataset and a hasty digit classifier."""
  folder = tmp_path_factory.mktemp("data")
  config = moving_digits.MovingDigits.builder_configs["tiny"]
  short = moving_digits.MovingDigitsConfig(
    name="short", num_frames=5, digit_size=14, clips=config.clips
  )
  wide = dataclasses.replace(config, name="wide", width=48)
  for each in (config, short, wide):
    moving_digits.MovingDigits(
      config=each, data_dir=folder, file_format="array_record"
    ).download_and_prepare()
  classifier.load(folder / "classifier_14.npz", 14, steps=20)
  return folder


@pytest.fixture(scope="module")
def measured(data_dir, tmp_path_factory):
  """Every metric of the packaged model: results, and the folder written."""
  out = tmp_path_factory.mktemp("out")
  plan = evaluation.Plan(
    metrics=evaluation.choose([], _DATA, None),
    num_prompts=2,
    num_clips=2,
    batch_size=2,  # one size of everything: each is compiled once
  )
  results, pieces = evaluation.run(
    plan, pipeline.RELEASE, _DATA, data_dir, sheet=out / "metrics.png"
  )
  evaluation.write(out / "metrics.json", results, pieces, "a <title>")
  return results, out


def test_every_metric_has_one_form(measured):
  results, out = measured
  assert json.loads((out / "metrics.json").read_text()) == results
  for name, row in results.items():
    assert set(row) == _ENTRY, name
    assert row["n"] > 0 and (row["value"] is None or np.isfinite(row["value"]))
    low, high = row["ci95"] or (row["value"], row["value"])
    assert row["value"] is None or low <= row["value"] <= high


def test_values_are_those_of_a_trained_model(measured):
  results, _ = measured
  value = {name: row["value"] for name, row in results.items()}
  assert 0.3 < value["validation_loss"] < 0.5  # its card: 0.387
  levels = [v for name, v in value.items() if "loss_t" in name]
  np.testing.assert_allclose(np.mean(levels), value["validation_loss"])
  assert 30 < value["vae_psnr"] < 38 and 0.9 < value["vae_ssim"] < 1
  assert 0 < value["vae_lpips_alex"] < 0.1
  assert results["vae_lpips_alex"]["ceiling"] == 0
  for name in ("neighbour", "first"):
    row = results[f"consistency_alexnet_{name}"]
    assert 0.5 < row["value"] <= 1 and 0.5 < row["ceiling"] <= 1
  assert 0.005 < value["motion_amount"] < 0.09
  assert value["fvd"] > 0 and results["fvd"]["ceiling"] > 0
  assert results["fvd"]["n"] == results["motion_amount"]["n"] == 2
  assert {"identity", "all", "classifier", "seconds_a_clip"} <= set(value)


def test_page_holds_all_and_fetches_nothing(measured):
  results, out = measured
  text = (out / "metrics.html").read_text()
  assert "a &lt;title&gt;" in text and all(name in text for name in results)
  assert "<script" not in text
  sources = re.findall(r'(?:src|href)="([^"]{0,30})', text)
  assert len(sources) == 2 + 4  # generated, and twice as many real ones
  assert all(s.startswith("data:video/mp4;base64,") for s in sources)
  assert "http" not in text
  assert (out / "metrics.png").exists()


@pytest.mark.slow
def test_released_image_to_video_pipeline(data_dir, tmp_path):
  tiny.write(tmp_path / "5b_i2v", "5b_i2v")
  plan = evaluation.Plan(
    metrics=("loss", "vae", "consistency"),
    num_prompts=1,
    num_clips=2,
    batch_size=2,
  )
  arguments = tmp_path / "5b_i2v", "moving_digits/wide", data_dir
  results, pieces = evaluation.run(plan, *arguments)
  value = {name: row["value"] for name, row in results.items()}
  names = {f"validation_loss_t{t:g}" for t in evaluation.LEVELS}
  assert names < set(value) and value["validation_loss"] > 0.1
  assert np.isfinite(list(value.values())).all() and len(pieces) == 4
  given = (prompt_files.Prompt("a cat"),)
  with pytest.raises(ValueError, match="shown an image"):
    evaluation.run(dataclasses.replace(plan, prompts=given), *arguments)


def test_default_is_all_that_goes_with_the_data():
  everything = tuple(m for m in evaluation.METRICS if m != "lpips_vgg")
  assert evaluation.choose([], _DATA, None) == everything
  given = (prompt_files.Prompt("a cat"),)
  for data, texts in (("clips/mine", None), (_DATA, given)):
    assert evaluation.choose([], data, texts) == everything[:-1]
  asked = ["frechet", "lpips_vgg", "loss"]
  assert evaluation.choose(asked, _DATA, None) == (
    "loss",
    "lpips_vgg",
    "frechet",
  )


@pytest.mark.parametrize(
  "asked, data, words",
  [
    (["loss", "fvd"], _DATA, "got fvd"),
    (["digits"], "clips/mine", "needs data=moving_digits"),
  ],
)
def test_metrics_that_cannot_be_are_refused(asked, data, words):
  with pytest.raises(ValueError, match=words):
    evaluation.choose(asked, data, None)


@pytest.mark.parametrize("name", ["num_prompts", "num_clips", "batch_size"])
def test_numbers_below_one_are_refused(name):
  with pytest.raises(ValueError, match=name):
    evaluation.Plan(metrics=("loss",), **{name: 0})


def test_clips_that_are_too_short_are_refused(data_dir):
  plan = evaluation.Plan(metrics=("consistency", "frechet"))
  with pytest.raises(ValueError, match="at least 9 frames.*have 5"):
    evaluation.run(plan, pipeline.RELEASE, "moving_digits/short", data_dir)


def test_missing_packages_are_said_before_loading(data_dir, monkeypatch):
  monkeypatch.setattr(pipeline, "load", None)
  monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
  plan = evaluation.Plan(metrics=("loss", "frechet"))
  with pytest.raises(ValueError, match=r"pip install 'vdit_jax\[metrics\]'"):
    evaluation.run(plan, "nowhere", _DATA, data_dir)
