"""Device mesh and the rules from logical axis names to mesh axes.

Models name logical axes on their parameters (`boxed`) and activations
(`constrain`); this file alone knows the mesh. Enter a mesh with
`jax.set_mesh(mesh)`: outside of one, `constrain` does nothing, so the same
model runs on one device without a mesh.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
from jax.experimental import mesh_utils
from jax.sharding import NamedSharding, PartitionSpec

MESH_AXES = ("data", "fsdp", "context", "tensor")

RULES: dict[str, str | tuple[str, ...] | None] = {
  # activations
  "batch": ("data", "fsdp"),
  "sequence": "context",
  "rows": "context",  # of pixels or latents: the neighbours swap their edges
  "act_heads": "tensor",
  "act_mlp": "tensor",
  # parameters
  "layers": None,
  "embed": "fsdp",
  "heads": "tensor",
  "mlp": "tensor",
  "vocab": None,
  "conv_out": "fsdp",
}
# Parameters so small that they may be whole on every device instead.
_OR_WHOLE = {"conv_out"}


@dataclasses.dataclass(frozen=True)
class MeshShape:
  """Devices along each mesh axis; -1 (at most once) takes what is left."""

  data: int = -1
  fsdp: int = 1
  context: int = 1
  tensor: int = 1


def make_mesh(
  shape: MeshShape,
  devices: Sequence[jax.Device] | None = None,  # pyright: ignore[reportInvalidTypeForm]
) -> jax.sharding.Mesh:
  """Arrange all devices into a mesh; refuse a shape that leaves any unused.

  Devices of several TPU slices are joined along `data`, whose collectives
  alone then cross the slow network between slices.
  """
  devices = jax.devices() if devices is None else devices
  sizes = _sizes(shape, devices)
  slices = len({getattr(device, "slice_index", 0) for device in devices})
  arrange = mesh_utils.create_device_mesh
  if slices == 1:
    return _mesh(functools.partial(arrange, sizes, devices))
  if sizes[0] % slices:
    raise ValueError(
      f"mesh.data={sizes[0]} must be a multiple of the {slices} slices that "
      f"the devices are of; the other axes may take at most "
      f"{len(devices) // slices} devices, those of one slice"
    )
  inside, between = [sizes[0] // slices, *sizes[1:]], [slices, 1, 1, 1]
  arrange = mesh_utils.create_hybrid_device_mesh
  return _mesh(functools.partial(arrange, inside, between, devices))


def spec(names: Sequence[str | None]) -> PartitionSpec:
  """Map logical names to mesh axes; refuse a name that has no rule."""
  unknown = [n for n in names if n is not None and n not in RULES]
  if unknown:
    raise ValueError(f"unknown logical axes {unknown}; known: {sorted(RULES)}")
  return PartitionSpec(*(RULES[n] if n else None for n in names))


def boxed(
  init: Callable[..., jax.Array], names: Sequence[str | None]
) -> Callable[..., Any]:
  """Wrap a parameter's initialiser so that it carries its logical axes."""
  spec(names)
  return nn.with_logical_partitioning(init, tuple(names))


def constrain(x: jax.Array, *names: str | None) -> jax.Array:
  """Constrain an activation to its logical axes under the current mesh."""
  if len(names) != x.ndim:
    raise ValueError(f"{len(names)} axes {names} for an array {x.shape}")
  wanted = spec(names)
  if jax.sharding.get_abstract_mesh().empty:
    return x
  return jax.lax.with_sharding_constraint(x, wanted)


def mesh_size(name: str) -> int:
  """Devices over which the current mesh splits a logical axis; 1 without."""
  mesh = jax.sharding.get_abstract_mesh()
  return 1 if mesh.empty else _size(dict(mesh.shape), RULES[name])


def platform() -> str:
  """Platform that the computation under trace will run on."""
  mesh = jax.sharding.get_abstract_mesh()
  return jax.default_backend() if mesh.empty else mesh.abstract_device.platform


def device_kind() -> str:
  """Kind of the devices that the computation under trace will run on."""
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty:
    return jax.devices()[0].device_kind
  return mesh.abstract_device.device_kind


def shardings(mesh: jax.sharding.Mesh, abstract: Any) -> Any:
  """Give every leaf of a boxed abstract tree its NamedSharding.

  Args:
    mesh: the mesh to place on.
    abstract: ShapeDtypeStructs, boxed with logical axes where a model named
      them, as `jax.eval_shape` of an initialiser returns them. A leaf without
      axes is replicated.

  Raises:
    ValueError: an axis is not divisible; names the parameter and the numbers.
      A convolution's parameters are whole on every device then.
  """
  is_box = lambda x: isinstance(x, nn.LogicallyPartitioned)

  def place(path, leaf):
    if not is_box(leaf):
      return NamedSharding(mesh, PartitionSpec())
    names, sizes = list(leaf.names), dict(mesh.shape)
    for i, (size, axes) in enumerate(
      zip(leaf.value.shape, spec(names), strict=True)
    ):
      parts = _size(sizes, axes)
      if size % parts and names[i] in _OR_WHOLE:
        names[i] = None
      elif size % parts:
        raise ValueError(
          f"{jax.tree_util.keystr(path)} {leaf.value.shape}: {size} does not "
          f"divide over {axes}={parts}; one that does is "
          f"{math.gcd(size, parts)}"
        )
    return NamedSharding(mesh, spec(names))

  return jax.tree_util.tree_map_with_path(place, abstract, is_leaf=is_box)


def place(mesh: jax.sharding.Mesh, abstract: Any) -> Any:
  """Take a boxed abstract tree out of its boxes, each leaf's sharding set."""
  is_box = lambda x: isinstance(x, nn.LogicallyPartitioned)

  def leaf(x, wanted):
    x = x.value if is_box(x) else x
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=wanted)

  return jax.tree.map(leaf, abstract, shardings(mesh, abstract), is_leaf=is_box)


def batch_sharding(mesh: jax.sharding.Mesh) -> NamedSharding:
  """Sharding of a batch's leading axis."""
  return NamedSharding(mesh, spec(["batch"]))


def _size(sizes: dict[str, int], axes: str | Sequence[str] | None) -> int:
  axes = (axes,) if isinstance(axes, str) else axes or ()
  return math.prod(sizes[axis] for axis in axes)


def _sizes(shape: MeshShape, devices: Sequence[jax.Device]) -> list[int]:  # pyright: ignore[reportInvalidTypeForm]
  """Devices along each axis, the one of -1 worked out."""
  sizes = [getattr(shape, axis) for axis in MESH_AXES]
  if sizes.count(-1) > 1 or any(n == 0 or n < -1 for n in sizes):
    raise ValueError(f"mesh sizes must be positive, at most one -1: {shape}")
  fixed = math.prod(n for n in sizes if n != -1)
  if len(devices) % fixed or (-1 not in sizes and len(devices) != fixed):
    raise ValueError(
      f"mesh {dict(zip(MESH_AXES, sizes, strict=True))} takes {fixed} devices,"
      f" but there are {len(devices)}; set mesh.data=-1 and let the product of"
      f" the others be {math.gcd(fixed, len(devices))}"
    )
  return [len(devices) // fixed if n == -1 else n for n in sizes]


def _mesh(arrange: Callable[..., Any]) -> jax.sharding.Mesh:
  """Arrange devices so that neighbours in the mesh are so in the torus.

  An axis of the torus is split between axes of the mesh only if it must be.
  """
  try:
    grid = arrange()
  except NotImplementedError:
    grid = arrange(allow_split_physical_axes=True)
  auto = (jax.sharding.AxisType.Auto,) * len(MESH_AXES)
  return jax.sharding.Mesh(grid, MESH_AXES, axis_types=auto)
