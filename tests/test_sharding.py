"""What cannot be placed is refused; what can be is where the rules say."""

import dataclasses
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from vdit_jax import sharding, types
from vdit_jax.models.vdit import denoiser as vdit

CFG = vdit.Config(
  latent_channels=3,
  width=32,
  depth=2,
  heads=4,
  mlp_width=64,
  text_width=16,
  dtype="float32",
)
CONSTRAINT = "sdy.sharding_constraint"


def _inputs(batch=8):
  text = types.Text(
    embeds=jnp.ones((batch, 4, CFG.text_width)), mask=jnp.ones((batch, 4), bool)
  )
  return jnp.ones((batch, 2, 4, 4, 3)), jnp.ones(batch), text


def _init():
  key = jax.random.key(0, impl="rbg")  # compiles in a tenth of the time
  return vdit.Denoiser(CFG).init(key, *_inputs(1))["params"]


def _box(shape, *names):
  value = jax.ShapeDtypeStruct(shape, jnp.float32)
  return nn.LogicallyPartitioned(value, names)


@pytest.mark.parametrize(
  "use",
  [
    lambda: sharding.spec(["batch", "depth"]),
    lambda: sharding.boxed(nn.initializers.zeros, ("embed", "depth")),
    lambda: sharding.constrain(jnp.ones((2, 2)), "batch", "depth"),
  ],
)
def test_unknown_axis_is_refused(use):
  with pytest.raises(ValueError, match=r"unknown logical axes \['depth'\]"):
    use()


def test_unknown_axis_of_a_tree_is_refused():
  mesh = sharding.make_mesh(sharding.MeshShape())
  with pytest.raises(ValueError, match="depth"):
    sharding.shardings(mesh, {"kernel": _box((8, 8), "depth", "mlp")})


def test_constrain_needs_a_name_for_each_axis():
  with pytest.raises(ValueError, match=r"1 axes .* \(2, 3\)"):
    sharding.constrain(jnp.ones((2, 3)), "batch")


@pytest.mark.parametrize(
  "shape, taken",
  [
    (sharding.MeshShape(data=4), 4),
    (sharding.MeshShape(data=4, fsdp=4), 16),
    (sharding.MeshShape(fsdp=3), 3),
  ],
)
def test_mesh_must_use_all_devices(shape, taken):
  with pytest.raises(
    ValueError, match=f"takes {taken} devices, but there are 8"
  ):
    sharding.make_mesh(shape)


@pytest.mark.parametrize(
  "shape",
  [
    sharding.MeshShape(data=-1, fsdp=-1),
    sharding.MeshShape(fsdp=0),
    sharding.MeshShape(fsdp=-2),
  ],
)
def test_mesh_sizes_must_be_positive(shape):
  with pytest.raises(ValueError, match="positive, at most one -1"):
    sharding.make_mesh(shape)


def test_rest_of_the_devices_go_where_minus_one_stands():
  mesh = sharding.make_mesh(sharding.MeshShape(fsdp=2, tensor=2))
  assert dict(mesh.shape) == {"data": 2, "fsdp": 2, "context": 1, "tensor": 2}
  assert mesh.size == 8


def test_every_rule_names_mesh_axes():
  for axes in sharding.RULES.values():
    axes = (axes,) if isinstance(axes, str) else axes or ()
    assert set(axes) <= set(sharding.MESH_AXES)


def test_indivisible_parameter_is_named():
  mesh = sharding.make_mesh(sharding.MeshShape(fsdp=4, tensor=2))
  tree = {"mlp": {"kernel": _box((6, 8), "embed", "mlp")}}
  with pytest.raises(ValueError, match=r"mlp.*kernel.*\(6, 8\).*fsdp=4.*2"):
    sharding.shardings(mesh, tree)


def test_mesh_size_counts_the_devices_of_a_logical_axis():
  assert sharding.mesh_size("batch") == 1
  mesh = sharding.make_mesh(sharding.MeshShape(data=2, fsdp=2, context=2))
  with jax.set_mesh(mesh):
    sizes = [sharding.mesh_size(n) for n in ("batch", "sequence", "heads")]
  assert sizes == [4, 2, 1]


def test_platform_is_that_of_the_mesh(monkeypatch):
  mesh = sharding.make_mesh(sharding.MeshShape())
  monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
  assert sharding.platform() == "tpu"
  with jax.set_mesh(mesh):
    assert sharding.platform() == "cpu"


def _lowered() -> str:
  params = nn.meta.unbox(jax.eval_shape(_init))
  inputs = jax.eval_shape(_inputs)
  apply = jax.jit(lambda p, *a: vdit.Denoiser(CFG).apply({"params": p}, *a))
  return apply.lower(params, *inputs).as_text()


def test_denoiser_constrains_activations_under_a_mesh():
  shape = sharding.MeshShape(data=1, fsdp=2, context=2, tensor=2)
  with jax.set_mesh(sharding.make_mesh(shape)):
    text = _lowered()
  tokens = '[{"data", "fsdp"}, {"context"}, {}]'
  heads = '[{"data", "fsdp"}, {"context"}, {"tensor"}, {}, {}]'
  # Removing any one of them from the network changes this list.
  assert sorted(
    re.findall(rf"{CONSTRAINT}.*(\[.*\])> : tensor<(.*)xf", text)
  ) == (
    sorted(
      [
        (tokens, "8x8x32"),  # patches
        ('[{"data", "fsdp"}, {}, {}]', "8x1x32"),  # conditioning
        (heads, "8x8x4x3x8"),  # q, k, v
        (heads, "8x8x4x1x8"),  # q to the text
        (heads, "8x4x4x2x8"),  # its k, v
        (tokens, "8x8x32"),  # a block's output
        (tokens, "8x8x12"),  # the network's
      ]
    )
  )


def test_denoiser_constrains_nothing_without_a_mesh():
  assert CONSTRAINT not in _lowered()


def test_parameters_get_their_shardings():
  mesh = sharding.make_mesh(sharding.MeshShape(data=1, fsdp=4, tensor=2))
  placed = sharding.shardings(mesh, jax.eval_shape(_init))
  params = jax.jit(lambda: nn.meta.unbox(_init()), out_shardings=placed)()
  block = params["blocks"]
  for leaf, spec, part in (
    (block["mlp"]["in"]["kernel"], (None, "fsdp", "tensor"), (2, 8, 32)),
    (block["mlp"]["out"]["kernel"], (None, "tensor", "fsdp"), (2, 32, 8)),
    (
      block["self_attention"]["out"]["kernel"],
      (None, "tensor", "fsdp"),
      (2, 16, 8),
    ),
    (block["scale_shift_table"], (None, None, None), (2, 6, 32)),
    (params["patch_in"]["kernel"], (None, "fsdp"), (12, 8)),
    (params["null_text"]["embedding"], (None,), (16,)),
  ):
    assert leaf.sharding.spec == PartitionSpec(*spec)
    assert leaf.addressable_shards[0].data.shape == part
    assert len(leaf.sharding.device_set) == 8


def test_batch_is_split_over_data_and_fsdp():
  mesh = sharding.make_mesh(sharding.MeshShape(data=2, fsdp=2, context=2))
  x = jax.device_put(np.zeros((8, 3)), sharding.batch_sharding(mesh))
  assert {s.data.shape for s in x.addressable_shards} == {(2, 3)}


def test_a_torus_axis_is_split_only_if_it_must_be(monkeypatch):
  asked = []

  def arrange(sizes, devices, allow_split_physical_axes=False):
    asked.append(allow_split_physical_axes)
    if not allow_split_physical_axes:
      raise NotImplementedError("32 is not a product of axes of 4x4x4")
    return np.array(devices).reshape(sizes)

  monkeypatch.setattr(sharding.mesh_utils, "create_device_mesh", arrange)
  mesh = sharding.make_mesh(sharding.MeshShape(fsdp=4))
  assert asked == [False, True]
  assert dict(mesh.shape) == {"data": 2, "fsdp": 4, "context": 1, "tensor": 1}


@dataclasses.dataclass(frozen=True)
class _Device:
  """What is asked of a TPU device of one of several slices."""

  id: int
  slice_index: int
  platform: str = "tpu"
  device_kind: str = "TPU v5 lite"


def test_slices_are_joined_along_data(monkeypatch):
  asked = []

  def arrange(inside, between, devices, **_):
    asked.append((inside, between))
    raise RuntimeError("seen")

  monkeypatch.setattr(sharding.mesh_utils, "create_hybrid_device_mesh", arrange)
  devices = [_Device(i, i // 4) for i in range(8)]
  with pytest.raises(RuntimeError, match="seen"):
    sharding.make_mesh(sharding.MeshShape(fsdp=2), devices)
  assert asked == [([2, 2, 1, 1], [2, 1, 1, 1])]
  with pytest.raises(ValueError, match=r"mesh.data=1 .*2 slices.*4 devices"):
    sharding.make_mesh(sharding.MeshShape(fsdp=8), devices)
