"""Laws of what may be chosen anew for the same weights."""

import dataclasses

import pytest

from vdit_jax.models import families
from vdit_jax.nn import attention, compute, layers


@pytest.mark.parametrize(
  "field, known",
  [
    ("kernel", attention.KERNELS),
    ("context", attention.CONTEXTS),
    ("remat", layers.REMAT),
  ],
)
def test_a_field_is_one_of_the_known(field, known):
  for value in known:
    assert getattr(compute.Compute(**{field: value}), field) == value
  with pytest.raises(ValueError, match=f"{field} must be one of") as error:
    compute.Compute(**{field: "fast"})
  assert str(known) in str(error.value) and "got 'fast'" in str(error.value)


def test_every_denoisers_config_has_the_fields_and_refuses_the_same():
  assert compute.FIELDS == ("kernel", "context", "remat", "unroll", "dtype")
  found = [n for n in families.networks() if n.kind == "denoiser"]
  assert len(found) > 1
  for network in found:
    names = {field.name for field in dataclasses.fields(network.config)}
    assert names > set(compute.FIELDS)
    with pytest.raises(ValueError, match="remat must be one of"):
      network.config(remat="some")


def test_a_choice_is_of_the_values_that_are_given():
  config = compute.Compute(unroll=3)
  compute.check_choice(config, "unroll", (1, 3))
  with pytest.raises(
    ValueError, match=r"unroll must be one of \(1, 2\), got 3"
  ):
    compute.check_choice(config, "unroll", (1, 2))
