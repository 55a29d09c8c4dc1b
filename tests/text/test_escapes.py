"""Texts from outside, in logs."""

import pytest

from vdit_jax.text import escapes


@pytest.mark.parametrize(
  "text, shown",
  [
    ("a cat, ünïcödé 字幕 👩‍🚀 '\"\\", "a cat, ünïcödé 字幕 👩‍🚀 '\"\\"),
    ("\x1b[31mred\x07", "\\x1b[31mred\\x07"),
    ("two\nlines\r\t\0", "two\\nlines\\r\\t\\x00"),
    ("\x85\x9b\u2028\u2029", "\\x85\\x9b\\u2028\\u2029"),
    ("turned \u202eround\u2066", "turned \\u202eround\\u2066"),
    ("\udcff\ufeff", "\\udcff\\ufeff"),
    ("a" * 300, "a" * 200 + "..."),
  ],
)
def test_what_would_control_a_terminal_is_spelled_out(text, shown):
  assert escapes.escape(text) == shown
