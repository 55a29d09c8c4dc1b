"""Texts from outside as logs, errors and names of files can show them."""

import unicodedata

# Of format characters these two join letters and emoji, and do nothing else.
_JOINERS = "\u200c\u200d"
# Control, format, surrogate; what ends lines and paragraphs.
_HIDDEN = ("Cc", "Cf", "Cs", "Zl", "Zp")


def escape(text: str, longest: int = 200) -> str:
  """Spell out what would control a terminal, end a line or turn letters round.

  Args:
    text: from outside.
    longest: letters of it that are shown.
  """
  cut = text[:longest] + "..." * (len(text) > longest)
  return "".join(map(_visible, cut))


def _visible(letter: str) -> str:
  hidden = unicodedata.category(letter) in _HIDDEN and letter not in _JOINERS
  return letter.encode("unicode_escape").decode() if hidden else letter
