"""Laws of weights that are read when they are asked for."""

import pytest

from vdit_jax.weights import parts


def weights(*names):
  """Weights, and a log of what is read of them."""
  log = []
  reader = lambda name: lambda: log.append(name) or {"of": name, "n": len(log)}
  return parts.Weights({name: reader(name) for name in names}), log


def test_what_is_not_asked_for_is_not_read():
  found, log = weights("denoiser", "autoencoder")
  assert list(found) == ["denoiser", "autoencoder"] and len(found) == 2
  assert found.held == () and not log
  assert found["autoencoder"] == {"of": "autoencoder", "n": 1}
  assert found.held == ("autoencoder",) and log == ["autoencoder"]


def test_to_ask_for_a_name_reads_nothing():
  weights = parts.Weights({"one": lambda: pytest.fail("read")})
  assert "one" in weights and "two" not in weights


def test_what_is_held_is_read_once():
  found, log = weights("denoiser")
  assert found["denoiser"] is found["denoiser"] is found.get("denoiser")
  assert log == ["denoiser"]


def test_what_is_freed_is_read_again():
  found, log = weights("denoiser", "autoencoder")
  first, _ = found["denoiser"], found["autoencoder"]
  found.free("denoiser")
  assert found.held == ("autoencoder",) and list(found)[0] == "denoiser"
  assert found["denoiser"] is not first
  assert log == ["denoiser", "autoencoder", "denoiser"]


def test_to_free_what_is_not_held_is_nothing():
  found, log = weights("denoiser")
  found.free("denoiser")
  found.free("autoencoder")
  assert found.held == () and not log


def test_a_network_that_is_not_there_is_none():
  found, log = weights("denoiser")
  with pytest.raises(KeyError, match="vocoder"):
    found["vocoder"]
  assert "vocoder" not in found and found.get("vocoder") is None and not log


def test_a_reading_that_fails_is_tried_again():
  tries = iter([OSError("gone"), "weights"])

  def read():
    found = next(tries)
    if isinstance(found, Exception):
      raise found
    return found

  found = parts.Weights({"denoiser": read})
  with pytest.raises(OSError, match="gone"):
    found["denoiser"]
  assert found.held == () and found["denoiser"] == "weights"
