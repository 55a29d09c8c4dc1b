"""A released config's fields: with defaults, strictly."""

from collections.abc import Mapping
from typing import Any


def fields(
  config: Mapping[str, Any],
  defaults: Mapping[str, Any],
  fixed: Mapping[str, Any],
) -> dict[str, Any]:
  """Fill a released config up with defaults; refuse what cannot be honoured.

  Args:
    config: content of a config.json or scheduler_config.json.
    defaults: fields that are honoured, and what they are where it is silent.
    fixed: fields that no release sets otherwise, with the one value that is
      honoured.

  Raises:
    ValueError: names fields that are unknown or have another value.
  """
  given = {k: v for k, v in config.items() if not k.startswith("_")}
  unknown = sorted(given.keys() - defaults.keys() - fixed.keys())
  other = [
    f"{name}={given[name]!r} (only {value!r} is supported)"
    for name, value in fixed.items()
    if given.get(name, value) != value
  ]
  if unknown or other:
    raise ValueError(
      f"config.json of {config.get('_class_name')} has fields that this "
      f"network does not honour: {', '.join(unknown + other)}; use diffusers "
      "for this checkpoint"
    )
  return {**defaults, **given}
