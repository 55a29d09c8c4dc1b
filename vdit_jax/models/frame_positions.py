"""Which frames of a clip a denoiser is given: their positions and their mask.

A position counts from the first frame, or from the last one where it is
negative: (0, -1) are the first and the last.
"""

import numpy as np


def resolve(positions: tuple[int, ...], num_frames: int) -> list[int]:
  """Count positions of frames from the first, where some are from the last."""
  found = [p + num_frames * (p < 0) for p in positions]
  if found != sorted(set(found)) or not 0 <= found[0] <= found[-1] < num_frames:
    raise ValueError(
      f"num_frames must be enough for given frames {positions}, got "
      f"{num_frames}; ask for more"
    )
  return found


def mask(positions: tuple[int, ...], num_frames: int) -> np.ndarray:
  """Say of each frame whether it is at one of the positions, bool [F]."""
  found = resolve(positions, num_frames) if positions else []
  return np.isin(np.arange(num_frames), found)


def check(who: str, given: np.ndarray, positions: tuple[int, ...]) -> None:
  """Refuse clips of which other frames are given than those at positions.

  Args:
    who: is given them, for the error.
    given: which frames are, bool [B, F].
    positions: of those that must be.
  """
  if (given == mask(positions, given.shape[1])).all():
    return
  names = {0: "first", -1: "last"}
  said = " and the ".join(names.get(p, f"{p}th") for p in positions)
  frames = "frame" if len(positions) == 1 else "frames"
  raise ValueError(
    f"{who} is given the {said} {frames} of every clip and no other, got "
    f"frames {np.flatnonzero(given.any(0)).tolist()}; give those alone "
    "(sample.py: --image for each) and a mask that is True there alone"
  )
