"""A page is whole by itself: texts escaped, videos inside, curves in place."""

import base64
import html.parser
import io
import re

import numpy as np
import pytest

from vdit_jax.media import formats, page, plots

HOSTILE = "<script>&\"'</td>"
VOID = {"meta"}


class _Reader(html.parser.HTMLParser):
  """Collects tags and texts; refuses tags that do not close as they open."""

  def __init__(self, text):
    super().__init__()
    self.open, self.tags, self.texts = [], [], []
    self.feed(text)
    self.close()
    assert self.open == []

  def handle_starttag(self, tag, attrs):
    self.tags.append((tag, dict(attrs)))
    if tag not in VOID:
      self.open.append(tag)

  def handle_startendtag(self, tag, attrs):
    self.tags.append((tag, dict(attrs)))

  def handle_endtag(self, tag):
    assert self.open.pop() == tag

  def handle_data(self, data):
    self.texts.append(data)


def _clip():
  ramp = np.linspace(-1, 1, 5 * 16 * 24 * 3, dtype=np.float32)
  return ramp.reshape(5, 16, 24, 3)


def test_page_is_whole_and_fetches_nothing(tmp_path):
  path = tmp_path / "new" / "index.html"
  curves = plots.curves("a<b", HOSTILE, {HOSTILE: [1.0, 2.0]})
  pieces = [
    page.heading(HOSTILE),
    page.paragraph(HOSTILE),
    page.table([HOSTILE, "b"], [[HOSTILE, 1.5]]),
    page.grid([page.video(_clip(), 8, HOSTILE), curves]),
  ]
  page.write(path, HOSTILE, pieces)
  read = _Reader(path.read_text())
  assert read.texts.count(HOSTILE) >= 7
  assert not [tag for tag, _ in read.tags if tag in ("script", "link", "img")]
  for tag, attributes in read.tags:
    for name in ("src", "href"):
      assert attributes.get(name, "data:").startswith("data:"), tag
  assert not re.search(r"https?://|url\(|@import", path.read_text())
  assert [p.name for p in path.parent.iterdir()] == ["index.html"]


def test_video_is_inside():
  piece = page.video(_clip(), 8, "ramp", enlarge=2)
  data = re.search(r'src="data:video/mp4;base64,([^"]*)"', piece).group(1)
  frames, fps = formats._read_mp4(io.BytesIO(base64.b64decode(data)))
  assert frames.shape == (5, 32, 48, 3) and fps == 8
  wanted = formats.sheets.enlarge(formats.sheets.to_uint8(_clip()), 2)
  assert np.abs(frames.astype(int) - wanted).mean() < 2


def test_table_writes_numbers_short():
  read = _Reader(page.table(["", "x"], [["pi", 3.14159265], ["none", None]]))
  texts = [text for text in read.texts if text.strip()]
  assert texts == ["x", "pi", "3.142", "none", "–"]
  with pytest.raises(ValueError, match="rows must have 2 cells, got 1"):
    page.table(["", "x"], [["alone"]])


def _points(svg):
  lines = re.findall(r'<polyline points="([^"]*)"', svg)
  return [
    [tuple(map(float, p.split(","))) for p in line.split()] for line in lines
  ]


@pytest.mark.parametrize("log", [False, True])
def test_curves_stand_where_the_values_are(log):
  svg = plots.curves("t", "step", {"a": [1.0, 10.0, 100.0]}, log=log)
  _Reader(svg)
  ((first, middle, last),) = _points(svg)
  assert first[0] < middle[0] < last[0]
  assert first[1] > middle[1] > last[1]  # down is up
  share = (first[1] - middle[1]) / (first[1] - last[1])
  np.testing.assert_allclose(share, 0.5 if log else 1 / 11, atol=0.01)


def test_curves_leave_out_what_has_no_place():
  values = [0.0, np.nan, np.inf, 1e-7, 1e-5]
  svg = plots.curves("t", "step", {"a": values}, log=True)
  assert [len(points) for points in _points(svg)] == [2]
  plots.curves("t", "step", {"a": [0.0, 0.0]}, log=True)  # all left out
  plots.curves("t", "step", {"a": [2.0]})
  with pytest.raises(ValueError, match="series must have 1 values each"):
    plots.curves("t", "step", {"a": [1.0], "b": []})


def test_axes_have_round_ticks():
  assert plots._Scale(0.0, 7.3, 0, 1, False).ticks() == [0, 2, 4, 6]
  ticks = plots._Scale(1e-8, 1e-2, 0, 1, True).ticks()
  np.testing.assert_allclose(ticks, 10.0 ** np.arange(-8, -1))
