"""Texts of a clip: which of its captions, and what is said beside them.

captions or a label --one, with numbers in words--> text --> tokenizer
"""

import math
import re
import string
from collections.abc import Mapping, Sequence

import numpy as np

from vdit_jax import schema
from vdit_jax.text import escapes

# English words that are false of a clip that was mirrored.
_SIDES = re.compile(
  r"\b((left|right)(wards?|most|hand(ed)?|er|ers)?"
  r"|(anti|counter)?-?clockwise)\b",
  re.IGNORECASE,
)
_WORD_ENDS = re.compile(r"(?<=[a-z0-9])(?=[A-Z])|[\s_-]+")


def draw(captions: Sequence[str], rng: np.random.Generator | None) -> str:
  """Draw one of a clip's captions; without `rng`, the first."""
  if rng is None:
    return captions[0]
  return captions[int(rng.integers(len(captions)))]


def of_label(template: str, label: str) -> str:
  """Make a caption of a class's name: "JumpRope" is said as "jump rope"."""
  words = _WORD_ENDS.sub(" ", label).strip().lower()
  return template.format(label=words)


def with_numbers(
  caption: str, templates: Sequence[str], numbers: Mapping[str, float]
) -> str:
  """Append what is known of a clip, in words.

  Args:
    caption: of the clip.
    templates: such as "motion score: {motion_score:.1f}."; one that names a
      number which is not known of this clip is left out.
    numbers: known of it, by name; NaN is not known.
  """
  for template in templates:
    values = {name: numbers.get(name, math.nan) for name in fields(template)}
    if not any(map(math.isnan, values.values())):
      caption = f"{caption} {template.format(**values)}".strip()
  return caption


def fields(template: str) -> list[str]:
  """List the names in a template's braces; refuse a broken template."""
  try:
    parsed = string.Formatter().parse(template)
    names = [name for _, name, _, _ in parsed if name is not None]
    template.format(**dict.fromkeys(names, 1.0))
  except (ValueError, LookupError, AttributeError) as error:
    raise ValueError(
      f"template {template!r} is broken ({error!r}); write it as 'motion "
      "score: {motion_score:.1f}.'"
    ) from error
  return names


def refuse_sides(captions: Sequence[str], key: str) -> None:
  """Refuse to mirror a clip whose captions tell left from right.

  English is what this knows.
  """
  for caption in captions:
    if found := _SIDES.search(caption):
      raise ValueError(
        f"flip mirrors clips, but caption {schema.quote(caption)} of record "
        f"{escapes.escape(key)} says {found.group()!r}; train on these "
        "captions with "
        "--config.data.flip=False"
      )
