"""The flag --config of the tools that take one, and its fields as flags.

`ml_collections.config_flags` reads `--config=FILE.py:ARG` and what follows of
`--config.optim.lr=1e-4`. Here what it cannot read is said in a line: a file
that is not there, what `get_config` refuses, a field that there is not.
"""

import os
import re
import sys

import flax.traverse_util
import ml_collections
from absl import flags
from ml_collections.config_flags import config_flags  # pyright: ignore[reportAttributeAccessIssue]

from vdit_jax import schema
from vdit_jax.training import fields


def define(name: str = "config") -> flags.FlagHolder:
  """Define the flag; what is a field of the file's config is one too."""
  holder = config_flags.DEFINE_config_file(name, lock_config=True)
  flags.FLAGS[name].parser = _Parser(name)
  flags.mark_flag_as_required(name)
  return holder


class _Parser(config_flags.ConfigFileFlagParser):
  """Reads a file's config, and looks whether it has the fields that are set."""

  def parse(self, path):
    file = path.partition(":")[0]
    if not os.path.isfile(file):
      raise ValueError(f"{file} is no file; give a config's, see {fields.LIST}")
    try:
      config = super().parse(path)
    except SyntaxError as error:
      raise ValueError(f"{file} is not Python: {error}") from None
    except (TypeError, ValueError) as error:
      # It puts the traceback into the text.
      raise ValueError(str(error.__context__ or error)) from None
    except AttributeError as error:
      if "get_config" not in str(error):
        raise
      raise ValueError(f"{file} has no get_config; see configs/") from None
    for override in _overrides(self.name):
      _check(self.name, override, config)
    return config


def _overrides(name: str) -> list[str]:
  """List the fields that the command line sets, as they are written there."""
  arguments = flags.FLAGS.read_flags_from_files(sys.argv[1:], force_gnu=False)
  pattern = re.compile(rf"--?(?:no)?{re.escape(name)}\.([^=]+)")
  found = (pattern.match(argument) for argument in arguments)
  return [each[1] for each in found if each]


def _check(name: str, override: str, config) -> None:
  """Refuse a field that a config does not have."""
  group, above, flag = config, name, f"--{name}.{override}"
  for part in override.split("."):
    field = part.partition("[")[0]
    if not isinstance(group, ml_collections.ConfigDict):
      raise ValueError(f"{flag}: {above} is no group; see {fields.LIST}")
    if field not in group:
      known = flax.traverse_util.flatten_dict(config.to_dict(), sep=".")
      same = [f"--{name}.{k}" for k in known if f".{k}".endswith(f".{field}")]
      meant = f"did you mean {' or '.join(same)}? " if same else ""
      raise ValueError(
        f"{flag}: {above} has no field {schema.quote(field)}, "
        f"{meant or schema.near(field, sorted(group))}; see {fields.LIST}"
      )
    group, above = group[field], f"{above}.{field}"
