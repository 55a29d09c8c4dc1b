"""A released pipeline's parts, its weights read when they are asked for.

  released folder -> networks, weights, tokenizers, recipe -> `pipeline.load`

A text encoder of 4.8 billion parameters, a denoiser and an autoencoder do not
fit one small device together, and need not: they run one after another.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from etils import epath

from vdit_jax import writing
from vdit_jax.models import networks
from vdit_jax.weights import adapters as adapter_files
from vdit_jax.weights import component, diffusers_folder, parts


def read(
  path: epath.PathLike,
  *,
  param_dtype: Any = None,
  dtype: Any = None,
  adapters: adapter_files.Given | None = None,
) -> parts.Parts:
  """Check a pipeline's folder; no weights are read yet.

  What takes no time is looked at first, of all networks: their configs, their
  tokenizers and the headers of their files; then networks are built of them.

  Args:
    path: folder of a released pipeline; see `diffusers_folder`.
    param_dtype: of the weights; None is as stored, but bfloat16 for float16
      where `dtype` is None too and the system does not compute in that.
    dtype: of computations, bfloat16 or float32; None is that of the weights.
    adapters: files of low-rank adapters; None is none. They are computed
      beside the weights and not merged with them: see `nn.lora`.

  Raises:
    ValueError: if the folder is not whole, of an unknown class, or its parts
      do not fit each other; or the adapters are of another model.
  """
  folder = diffusers_folder.read(path)
  system = folder.system
  known = {
    name: component.describe(found, networks.kind_of(name), "float32")[0]
    for name, found in folder.networks.items()
  }
  tokenizers = {
    name: known[name].read_tokenizer(found, system.text[name].clean)
    for name, found in folder.tokenizers.items()
  }
  stored = {k: component.stored_dtype(v) for k, v in folder.networks.items()}
  dtypes = {
    name: _dtypes(stored[name], param_dtype, dtype, system.not_float16)
    for name in stored
  }
  checked = {
    name: component.check(found, **dtypes[name])
    for name, found in folder.networks.items()
  }
  modules = networks.gather({name: c.module for name, c in checked.items()})
  system.check(modules, str(path))
  cfg = modules.denoiser.cfg
  recipe = system.recipe(cfg, writing.absolute(path))
  readers = {name: part.read for name, part in checked.items()}
  if adapters is not None:
    found = adapter_files.read(adapters, system, folder.networks)
    for name, factors in found.items():
      readers[name] = functools.partial(_adapted, readers[name], factors)
  return parts.Parts(
    modules=modules,
    params=parts.Weights(readers),
    tokenizers=tokenizers,
    recipe=dataclasses.replace(recipe, **folder.sampling),
    max_lengths=system.max_lengths(cfg),
    sequential=True,
  )


def _adapted(read_params: Callable[[], Any], factors: Any) -> Any:
  """Read a network's params with adapters beside them."""
  return adapter_files.attach(read_params(), factors)


def _dtypes(
  stored: Any, param_dtype: Any, dtype: Any, not_float16: str
) -> dict[str, Any]:
  """Settle a network's dtypes, of its weights and of computations."""
  given = param_dtype, dtype
  if not_float16 and given == (None, None) and stored == jnp.float16:
    param_dtype = jnp.bfloat16
  dtype = next(x for x in (dtype, param_dtype, stored) if x is not None)
  known = (jnp.bfloat16, jnp.float32) + (() if not_float16 else (jnp.float16,))
  if jnp.dtype(dtype) not in known:
    raise ValueError(
      f"dtype must be bfloat16 or float32, got {jnp.dtype(dtype)}: "
      f"{not_float16}"
    )
  return {"param_dtype": param_dtype, "dtype": dtype}
