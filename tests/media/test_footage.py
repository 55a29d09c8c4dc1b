"""What a file is and how it is shown, of every form that people have."""

import fractions
import io
import os
import pathlib
import socket
import zlib

import av
import numpy as np
import pytest
from PIL import Image

from tests.data import videos
from vdit_jax.media import display, footage, formats, pictures

CLIPS = pathlib.Path(__file__).parent / "clips"
PICTURE = videos.picture(0, 64, 96)
LOSSLESS = {"WEBP": {"lossless": True}, "JPEG2000": {"irreversible": False}}
LOSSY = {"JPEG": 95, "MPO": 95, "AVIF": 100}


def save(form, image=PICTURE, **options):
  """Give the bytes of a picture."""
  options = LOSSLESS.get(form, {}) | options
  if form in LOSSY:
    options = {"quality": LOSSY[form]} | options
  file = io.BytesIO()
  picture = Image.fromarray(image) if isinstance(image, np.ndarray) else image
  picture.save(file, form, **options)
  return file.getvalue()


def animate(form, durations):
  """Give the bytes of an animation of so many different pictures."""
  first, *rest = [
    Image.fromarray(videos.picture(i, 64, 96)) for i in range(len(durations))
  ]
  options = {"duration": durations} if form != "TIFF" else {}
  return save(form, first, save_all=True, append_images=rest, **options)


def encode(codec, pix_fmt, planes):
  """Give the bytes of one picture that FFmpeg encodes from its planes."""
  frame = av.VideoFrame(96, 64, pix_fmt)
  for plane, values in zip(frame.planes, planes, strict=True):
    rows = np.zeros((64, plane.line_size), np.uint8)
    values = np.ascontiguousarray(values).view(np.uint8).reshape(64, -1)
    rows[:, : values.shape[1]] = values
    plane.update(rows.tobytes())
  encoder = av.CodecContext.create(codec, "w")
  encoder.width, encoder.height, encoder.pix_fmt = 96, 64, pix_fmt
  encoder.time_base = fractions.Fraction(1, 25)
  return b"".join(map(bytes, [*encoder.encode(frame), *encoder.encode(None)]))


def read(data):
  """All frames as shown [F, H, W, 3], and their seconds."""
  with footage.open(io.BytesIO(data)) as found:
    show = display.shower()
    frames = [(show(f), f.time) for f in footage.frames(found)]
    footage.check(found, io.BytesIO(data), len(frames))
  return np.stack([f for f, _ in frames]), [seconds for _, seconds in frames]


def fault(data):
  with pytest.raises(footage.FootageError) as raised:
    read(data)
  return raised.value.fault


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "AVIF", "TIFF", "MPO"])
def test_eight_orientations_of_stills(form):
  for number, turn in display.EXIF.items():
    exif = Image.Exif()
    exif[0x112] = number
    data = save(form, exif=exif)
    found = footage.still(io.BytesIO(data))
    want = turn.apply(PICTURE)
    assert found.shape == want.shape, number
    error = np.abs(found.astype(int) - want).mean()
    assert error < (5 if form in LOSSY else 1e-9), number
    if form != "MPO":
      picture = pictures.open(io.BytesIO(data))
      assert pictures.size(picture) == want.shape[:2]


def test_numbers_of_exif_are_those_of_pillow():
  image = Image.fromarray(PICTURE)
  for number, method in enumerate(
    (
      Image.Transpose.FLIP_LEFT_RIGHT,
      Image.Transpose.ROTATE_180,
      Image.Transpose.FLIP_TOP_BOTTOM,
      Image.Transpose.TRANSPOSE,
      Image.Transpose.ROTATE_270,
      Image.Transpose.TRANSVERSE,
      Image.Transpose.ROTATE_90,
    ),
    2,
  ):
    want = np.asarray(image.transpose(method))
    np.testing.assert_array_equal(display.EXIF[number].apply(PICTURE), want)


def test_broken_exif_turns_nothing():
  data = save("JPEG", exif=b"Exif\0\0MM\0\x2a\xff\xff\xff\xff")
  assert footage.still(io.BytesIO(data)).shape == PICTURE.shape


GREY, ALPHA = PICTURE[..., :1], np.full((64, 96, 1), 255, np.uint8)
CLEAR, CLEAR_GREY = (np.concatenate([x, ALPHA], -1) for x in (PICTURE, GREY))


def deep(image):
  return image.astype(np.uint16) * 257


@pytest.mark.parametrize(
  "data, want",
  [
    *[(save(f, deep(GREY[..., 0])), GREY) for f in ("PNG", "TIFF", "PPM")],
    (save("JPEG2000", deep(GREY[..., 0])), GREY),
    (encode("png", "rgb48be", [deep(PICTURE).byteswap()]), PICTURE),
    (encode("png", "gray16be", [deep(GREY).byteswap()]), GREY),
    (encode("png", "rgba64be", [deep(CLEAR).byteswap()]), PICTURE),
    (encode("png", "ya16be", [deep(CLEAR_GREY).byteswap()]), GREY),
    (encode("tiff", "rgb48le", [deep(PICTURE)]), PICTURE),
    (encode("tiff", "gray16le", [deep(GREY)]), GREY),
    (encode("tiff", "rgba64le", [deep(CLEAR)]), PICTURE),
    (save("PNG", np.concatenate([PICTURE, ALPHA // 2], -1)), PICTURE),
    (save("JPEG2000"), PICTURE),
    (save("JPEG", Image.fromarray(PICTURE).convert("CMYK")), PICTURE),
    (save("PNG", Image.fromarray(GREY[..., 0]).convert("LA")), GREY),
    (save("BMP"), PICTURE),
    (save("GIF"), PICTURE),
  ],
)
def test_depths_and_modes_show_the_same(data, want):
  found = footage.still(io.BytesIO(data)).astype(int)
  assert abs(found.mean() - want.mean()) < 1
  assert np.abs(found - want).mean() < 4


def test_white_of_a_tiff_may_be_zero():
  kept = save("TIFF", deep(GREY[..., 0]))
  at = kept.index(b"\x06\x01\x03\0\x01\0\0\0\x01") + 8
  turned = kept[:at] + b"\0" + kept[at + 1 :]
  white, black = (footage.still(io.BytesIO(x)) for x in (kept, turned))
  np.testing.assert_array_equal(black, 255 - white)


def test_palette_with_transparency_has_the_palettes_colours():
  image = Image.fromarray(PICTURE).quantize(16)
  data = save("PNG", image, transparency=bytes(range(0, 160, 10)))
  np.testing.assert_array_equal(
    footage.still(io.BytesIO(data)), np.asarray(image.convert("RGB"))
  )


def test_picture_ends_where_it_ends(tmp_path):
  """A gain map, a film of the moment, other pages are not the picture."""
  small = PICTURE[::2, ::2]
  behind = [
    save("JPEG", small),
    videos.write(tmp_path / "a.mp4").read_bytes(),
    b"any text " * 1000,
  ]
  for data in (
    *[save("JPEG") + tail for tail in behind],
    *[
      save(form, save_all=True, append_images=[Image.fromarray(small)])
      for form in ("MPO", "TIFF")
    ],
    save("PNG") + behind[0],
    save("WEBP") + behind[2],
  ):
    frames, _ = read(data)
    assert frames.shape == (1, *PICTURE.shape)
    assert np.abs(frames[0].astype(int) - PICTURE).mean() < 5
    (tmp_path / "given").write_bytes(data)
    given = formats.read_image(tmp_path / "given", 64, 96)
    np.testing.assert_array_equal(given, frames[0])


@pytest.mark.parametrize("form", ["GIF", "PNG", "WEBP", "AVIF"])
def test_animations_move(form, tmp_path):
  data = animate(form, [100, 100, 250, 0, 100])
  frames, seconds = read(data)
  want = np.stack([videos.picture(i, 64, 96) for i in range(5)])
  assert frames.shape == want.shape
  assert np.abs(frames.astype(int) - want).mean() < 6
  np.testing.assert_allclose(seconds, [0, 0.1, 0.2, 0.45, 0.55], atol=0.002)
  for share in (0.5, 0.9):
    data_cut = data[: int(len(data) * share)]
    assert fault(data_cut) in (footage.Fault.TRUNCATED, footage.Fault.FORMAT)
  (tmp_path / "given").write_bytes(data)
  with pytest.raises(ValueError, match="given .*several frames"):
    formats.read_image(tmp_path / "given", 64, 96)


def test_default_picture_of_an_animation_is_for_others():
  data = animate("PNG", [100, 100, 100])
  image = Image.fromarray(PICTURE[::-1])
  rest = [Image.fromarray(videos.picture(i, 64, 96)) for i in range(2)]
  data = save(
    "PNG", image, save_all=True, append_images=rest, default_image=True
  )
  frames, _ = read(data)
  assert len(frames) == 2
  np.testing.assert_array_equal(frames[0], PICTURE)


def test_one_frame_is_a_still_in_any_container(tmp_path):
  for name in ("a.mp4", "a.mkv", "a.avi", "a.ts"):
    path = videos.write(tmp_path / name, num_frames=1, height=64, width=96)
    picture = formats.read_image(path, 64, 96)
    assert (
      np.abs(picture.astype(int) - videos.picture([0, 0], 64, 96)).mean() < 9
    )
  for form in ("GIF", "WEBP", "AVIF", "PNG"):
    frames, _ = read(animate(form, [100]))
    assert frames.shape == (1, *PICTURE.shape)


@pytest.mark.parametrize("change", [-9, -8, 1, 8, 1000, 10**9])
def test_size_in_the_head_of_a_webp_is_not_looked_at(change):
  data = save("WEBP")
  length = max(len(data) - 8 + change, 0).to_bytes(4, "little")
  frames, _ = read(data[:4] + length + data[8:])
  np.testing.assert_array_equal(frames[0], PICTURE)


def test_damaged_stills_are_refused(tmp_path):
  """Decoders go on at wrong bits of a JPEG, and Pillow says nothing of it."""
  data = save("JPEG", videos.picture(0, 256, 256))
  half = data[: len(data) // 2]
  zeros = half + bytes(64) + data[len(data) // 2 + 64 :]
  assert fault(half) == footage.Fault.TRUNCATED
  assert fault(zeros) == footage.Fault.DAMAGED
  (tmp_path / "given").write_bytes(zeros)
  with pytest.raises(ValueError, match="given cannot be read .*damaged"):
    formats.read_image(tmp_path / "given", 256, 256)
  data = bytearray(save("PNG"))
  at = data.index(b"IDAT")
  data[at + 20] ^= 8
  assert fault(bytes(data)) in (footage.Fault.DAMAGED, footage.Fault.TRUNCATED)


def test_numbers_without_a_white_are_refused():
  data = save("TIFF", GREY[..., 0].astype(np.float32))
  with pytest.raises(footage.FootageError, match="known as its white"):
    footage.still(io.BytesIO(data))


LISTS = {
  "ffconcat": "ffconcat version 1.0\nfile ok.mp4\n",
  "m3u8": "#EXTM3U\n#EXT-X-VERSION:3\n#EXT-X-TARGETDURATION:2\n#EXTINF:2,\n"
  "ok.mp4\n#EXT-X-ENDLIST\n",
  "sdp": "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\n"
  "m=video 5004 RTP/AVP 96\na=rtpmap:96 H264/90000\n",
  "dash": '<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011" '
  'type="static"><Period><BaseURL>ok.mp4</BaseURL></Period></MPD>',
  "svg": '<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9">'
  '<image href="ok.mp4"/></svg>',
  "imf": '<?xml version="1.0"?><CompositionPlaylist xmlns='
  '"http://www.smpte-ra.org/schemas/2067-3/2016"></CompositionPlaylist>',
  "sap": "RTSP/1.0 200 OK\nContent-Type: application/sdp\n",
  "ansi": "\x1b[2J\x1b[31mtext that a terminal colours\x1b[0m\n" * 20,
  "eps": "%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n",
  "text": "nothing but words\n" * 99,
}


@pytest.mark.parametrize("name", LISTS)
def test_text_opens_no_other_file(name, tmp_path, monkeypatch):
  videos.write(tmp_path / "ok.mp4")
  monkeypatch.chdir(tmp_path)
  assert fault(LISTS[name].encode()) == footage.Fault.FORMAT


def test_demuxers_are_known_to_ffmpeg():
  known = {n for name in av.formats_available for n in name.split(",")}
  assert set(footage.DEMUXERS) <= known


def test_only_regular_files_are_opened(tmp_path, monkeypatch):
  (tmp_path / "folder.mp4").mkdir()
  os.mkfifo(tmp_path / "pipe.mp4")
  (tmp_path / "link.mp4").symlink_to(tmp_path / "pipe.mp4")
  listening = socket.socket(socket.AF_UNIX)
  monkeypatch.chdir(tmp_path)  # a socket's path is short
  listening.bind("socket.mp4")
  names = "folder.mp4 pipe.mp4 link.mp4 socket.mp4 none.mp4 a\0b".split(" ")
  for path in (*(tmp_path / name for name in names), "/dev/zero", "x" * 9999):
    with pytest.raises(footage.FootageError) as raised:
      footage.regular(path)
    assert raised.value.fault == footage.Fault.MISSING
    with pytest.raises(ValueError, match="is not a file"):
      formats.read_image(path, 8, 8)
  listening.close()


@pytest.mark.parametrize("name", ["open264_cut.mp4", "open264_cut.mkv"])
def test_messages_are_no_damage(name):
  """Cut by stream copy from open groups of pictures: all decodes."""
  data = (CLIPS / name).read_bytes()
  frames, seconds = read(data)
  assert frames.shape == (16, 48, 64, 3)
  np.testing.assert_allclose(np.diff(seconds), 0.125, atol=0.002)
  with av.open(io.BytesIO(data)) as container:
    want = [f.to_ndarray(format="rgb24") for f in container.decode(video=0)]
  np.testing.assert_array_equal(frames, want)


def test_recording_that_begins_between_key_frames(tmp_path):
  path = videos.write(tmp_path / "a.ts", num_frames=40, codec="mpeg2video")
  data = path.read_bytes()
  whole, _ = read(data)
  begun = len(data) // 3 // 188 * 188
  frames, _ = read(data[begun:])
  assert 5 < len(frames) < len(whole)
  np.testing.assert_array_equal(frames[-5:], whole[-5:])


def test_flipped_bits_of_a_video_are_damage(tmp_path):
  data = videos.write(tmp_path / "a.mp4", num_frames=30).read_bytes()
  rng, refused = np.random.default_rng(0), 0
  begin = data.index(b"mdat") + 800
  for place in rng.integers(begin, data.index(b"moov") - 8, 24).tolist():
    broken = data[:place] + rng.bytes(8) + data[place + 8 :]
    try:
      frames, _ = read(broken)
    except footage.FootageError as error:
      assert error.fault == footage.Fault.DAMAGED
      refused += 1
  assert refused >= 10


@pytest.mark.parametrize("curve", [16, 18], ids=["PQ", "HLG"])
def test_high_dynamic_range_is_shown_as_its_twin(curve, tmp_path):
  """A picture as light of 203 cd/m2 at most comes back."""
  picture = videos.picture(3, 64, 96)
  path = tmp_path / "a.mp4"
  videos.write_hdr(path, picture, curve)
  frames, _ = read(path.read_bytes())
  error = np.abs(frames.astype(int) - picture)
  assert error.mean() < 5 and error.max() < 25
  with av.open(str(path)) as container:
    plain = next(container.decode(video=0)).to_ndarray(format="rgb24")
  assert np.abs(plain.astype(int) - picture).mean() > 20


def test_colours_of_a_png_are_high_dynamic_range_too():
  plain = save("PNG")
  chunk = b"cICP" + bytes([9, 16, 0, 1])
  chunk = (4).to_bytes(4, "big") + chunk + zlib.crc32(chunk).to_bytes(4, "big")
  data = plain[:33] + chunk + plain[33:]
  bright, _ = read(data)
  assert not np.array_equal(bright[0], PICTURE)
