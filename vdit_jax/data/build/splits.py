"""Which files are for validation: a share of the clips, in whole files.

  draw of a file's key --label--> train, validation, either
  number of clips, when all are counted --divide--> train, validation

Of many files those whose draw is below the share are for validation, so that
each is decided by itself. Of a few that may be none, or half of the clips. So
those that may be for validation are kept apart until all are counted, and then
those are taken, of the least draws if there is a choice, that come nearest to
the share.
"""

import dataclasses
from collections.abc import Sequence

from vdit_jax.data import shards

SPLITS = ("train", "validation")

_EITHER = "either"
_FEW = 2**12  # rows: of more, the share of draws is within a tenth of 0.02
_SPARE = 32  # files that may be for validation beyond the share
_TRIED = 64  # files of which every choice is tried
_MARGIN = 4  # largest files that are left for that


@dataclasses.dataclass(frozen=True)
class Group:
  """A file of records, and what is known of its split.

  Attributes:
    shard: the file.
    label: of its records.
    draw: of the file of clips that it is of, if that is yet to be decided.
  """

  shard: shards.Shard
  label: str
  draw: float


def label(draw: float, share: float, num_rows: int) -> str:
  """Tell a file's split before all are counted, as far as that is known.

  Args:
    draw: of its key, in [0, 1).
    share: of the clips that is for validation.
    num_rows: of all captions.
  """
  if num_rows > _FEW or not share:
    return SPLITS[draw < share]
  return _EITHER if draw < share + _SPARE / num_rows else SPLITS[0]


def is_decided(label: str) -> bool:
  """Tell whether files of a label may share a file of records."""
  return label != _EITHER


def divide(
  groups: Sequence[Group], share: float
) -> dict[str, list[shards.Shard]]:
  """Give the files of records of each split, in order.

  Args:
    groups: of all records; those that hold none are left out.
    share: of the clips that is for validation.
  """
  groups = [group for group in groups if group.shard.num_records]
  counts = [group.shard.num_records for group in groups]
  open_ones = [i for i, group in enumerate(groups) if group.label == _EITHER]
  open_ones.sort(key=lambda i: groups[i].draw)
  taken = _nearest([counts[i] for i in open_ones], share, sum(counts))
  chosen = {open_ones[i] for i in taken}
  found = {split: [] for split in SPLITS}
  for i, group in enumerate(groups):
    own = SPLITS[i in chosen] if group.label == _EITHER else group.label
    found[own].append(group.shard)
  return found


def _nearest(counts: Sequence[int], share: float, total: int) -> list[int]:
  """Choose counts, first ones first, whose sum is nearest to share * total.

  At least one is chosen, and not all of the total.
  """
  if not counts or not share:
    return []
  wanted, had, most, chosen = share * total, 0, max(counts), 0
  while chosen < len(counts) - _TRIED and had < wanted - _MARGIN * most:
    had += counts[chosen]
    chosen += 1
  # Of the next ones every sum is tried: bit n says whether n can be reached.
  tail, sums = counts[chosen : chosen + _TRIED], [1]
  for count in tail:
    sums.append(sums[-1] | sums[-1] << count)
  end = min(total - had, int(wanted - had) + most + 1)
  reached = (n for n in range(0 if chosen else 1, end) if sums[-1] >> n & 1)
  best = min(reached, key=lambda n: abs(had + n - wanted), default=0)
  found = list(range(chosen))
  for i in reversed(range(len(tail))):
    if not sums[i] >> best & 1:
      found.append(chosen + i)
      best -= tail[i]
  return found
