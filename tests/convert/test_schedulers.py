"""Laws of scheduler_config.json: what it says is what is sampled."""

import pytest

from vdit_jax.convert import schedulers
from vdit_jax.diffusion import schedules

DEFAULTS = dict(
  num_train_timesteps=1000,
  beta_start=0.001,
  beta_end=0.02,
  beta_schedule="linear",
  set_alpha_to_one=True,
  steps_offset=0,
  prediction_type="epsilon",
  timestep_spacing="leading",
  rescale_betas_zero_snr=False,
  snr_shift_scale=1.0,
)
KNOWN = {
  "One": schedulers.Scheduler(
    "ddim",
    DEFAULTS,
    {"trained_betas": None},
    schedulers.discrete,
    options={"eta": 1.0},
  ),
  "Two": schedulers.Scheduler("euler", {"a": 1}, {}, lambda given: dict(given)),
}


def read(**fields):
  return schedulers.recipe_fields({"_class_name": "One", **fields}, KNOWN)


def test_a_silent_file_is_the_defaults():
  got = read()
  assert got["sampler"] == "ddim" and got["objective"] == "eps"
  assert got["sampler_options"] == {"eta": 1.0}
  assert schedules.Schedule(**got["schedule"]) == schedules.Schedule(
    "linear", 1000, 0.001, 0.02, zero_terminal_snr=False, snr_shift=1.0
  )
  assert schedules.Spacing(**got["spacing"]) == schedules.Spacing("leading")


def test_every_field_reaches_its_own():
  got = read(
    num_train_timesteps=500,
    beta_start=0.002,
    beta_end=0.03,
    beta_schedule="scaled_linear",
    set_alpha_to_one=False,
    steps_offset=1,
    prediction_type="v_prediction",
    timestep_spacing="trailing",
    rescale_betas_zero_snr=True,
    snr_shift_scale=3.0,
  )
  assert got["objective"] == "v"
  schedule = schedules.Schedule(**got["schedule"])
  assert schedule == schedules.Schedule(
    "scaled_linear", 500, 0.002, 0.03, zero_terminal_snr=True, snr_shift=3.0
  )
  spacing = schedules.Spacing(**got["spacing"])
  assert spacing == schedules.Spacing("trailing", 1, clean_end=False)


def test_a_scheduler_without_options_sets_none():
  got = schedulers.recipe_fields({"_class_name": "Two", "a": 5}, KNOWN)
  assert got == {"sampler": "euler", "a": 5}


def test_options_are_a_copy():
  read()["sampler_options"]["eta"] = 0.0
  assert read()["sampler_options"] == {"eta": 1.0}


@pytest.mark.parametrize(
  "fields, message",
  [
    ({"_class_name": "Three"}, "class 'Three', .* known are One, Two"),
    ({"prediction_type": "flow"}, "prediction_type of .* got 'flow'"),
    ({"beta_schedule": "cosine"}, "beta_schedule of .* got 'cosine'"),
    ({"thresholding": True}, "does not honour: thresholding"),
    ({"trained_betas": [0.1]}, r"trained_betas=\[0.1\] \(only None"),
  ],
)
def test_what_cannot_be_honoured_is_refused(fields, message):
  with pytest.raises(ValueError, match=message):
    read(**fields)
