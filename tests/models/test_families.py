"""Laws of the list of families: each thing is found by each of its names."""

import flax.linen as nn
import pytest

from vdit_jax.models import families
from vdit_jax.models.cogvideox import autoencoder as cogvideox_vae
from vdit_jax.models.cogvideox import denoiser as cogvideox
from vdit_jax.models.t5 import encoder as t5
from vdit_jax.models.vdit import autoencoder as vae
from vdit_jax.models.vdit import denoiser as vdit


@pytest.mark.parametrize(
  "name, kind, module",
  [
    ("vdit", "denoiser", vdit.Denoiser),
    ("vdit", "autoencoder", vae.Autoencoder),
    ("cogvideox", "denoiser", cogvideox.Denoiser),
    ("cogvideox", "autoencoder", cogvideox_vae.Autoencoder),
    ("t5", "text_encoder", t5.TextEncoder),
    # As older configs call them.
    ("causal_vae", "autoencoder", vae.Autoencoder),
    ("cogvideox_vae", "autoencoder", cogvideox_vae.Autoencoder),
  ],
)
def test_a_network_is_found_by_its_name_and_kind(name, kind, module):
  found = families.network(name, kind)
  assert found.module is module and found.kind == kind


def test_every_network_is_found_by_what_is_made_of_it():
  found = list(families.networks())
  assert len({(n.family, n.kind) for n in found}) == len(found) >= 5
  for network in found:
    assert families.network(network.family, network.kind) is network
    for cfg in network.variants.values():
      assert families.network_of(network.module(cfg)) is network
    for name in network.classes:
      assert families.of_class(name) is network
      assert families.component(name) is network.classes[name]
      assert name in families.classes() and name in families.classes(
        network.kind
      )


def test_every_system_is_found_by_its_name_and_its_pipelines():
  for name, system in families.SYSTEMS.items():
    assert families.system(name) is system and system.name == name
    assert {n.family for n in system.networks} == {name}
    for class_name in system.pipelines:
      assert families.of_pipeline(class_name) is system
  found = families.of_pipeline("CogVideoXImageToVideoPipeline")
  assert found is families.system("cogvideox")


def test_a_module_of_no_family_is_refused():
  with pytest.raises(ValueError, match="Dense is of no family of"):
    families.network_of(nn.Dense(2))


def test_a_former_name_is_of_its_kind_alone():
  with pytest.raises(ValueError, match="denoiser.name .* got 'causal_vae'"):
    families.network("causal_vae", "denoiser")
  with pytest.raises(ValueError, match="name must be one of"):
    families.system("causal_vae")


def test_an_unknown_name_lists_those_that_are_known():
  for kind, known in (
    ("denoiser", "'cogvideox', .*'vdit'"),
    ("autoencoder", "'cogvideox', .*'vdit'"),
    ("text_encoder", "'t5'"),
  ):
    message = rf"{kind}.name must be one of \[.*{known}.*\], got 'sora'"
    with pytest.raises(ValueError, match=message):
      families.network("sora", kind)
  with pytest.raises(
    ValueError, match=r"\['cogvideox', .*'vdit'.*\], got 'sora'"
  ):
    families.system("sora")


def test_an_unknown_class_is_none():
  assert families.of_class("SoraModel") is None
  assert families.component("SoraModel") is None
  assert families.of_pipeline("SoraPipeline") is None


def test_classes_of_a_kind_are_sorted_and_no_others():
  every = families.classes()
  assert every == sorted(every)
  kinds = {n.kind for n in families.networks()}
  split = [name for kind in kinds for name in families.classes(kind)]
  assert sorted(split) == every
  assert "CogVideoXTransformer3DModel" in families.classes("denoiser")
  assert "CogVideoXTransformer3DModel" not in families.classes("autoencoder")
