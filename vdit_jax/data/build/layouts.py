"""Where the captions of a folder's clips are, as trainers lay them out.

  --videos, --captions --find--> Layout: the clips that are there, the captions

  DIR of clips   metadata.jsonl or .csv (Hugging Face's), in DIR or in each of
                 its folders; prompts.txt and videos.txt; a text beside a clip
  DIR, FILE      a file of captions in any form of `tables`
  DIR, TEXTS     a folder of texts, which lie in it as the clips do in DIR
  FILE           a manifest: a file of captions alone, or videos.txt

Names are relative to DIR, or else to the folder of FILE.
"""

import dataclasses
import glob
import os
import pathlib
from collections.abc import Iterator

from vdit_jax import schema
from vdit_jax.data.build import tables

# What of a folder is a clip, if its content is.
MEDIA = frozenset(
  ".3gp .apng .asf .avi .avif .bmp .flv .gif .heic .jp2 .jpeg .jpg .m2ts .m4v "
  ".mkv .mov .mp4 .mpeg .mpg .mts .mxf .ogv .png .tif .tiff .ts .webm .webp "
  ".wmv".split()
)

_METADATA = ("metadata.jsonl", "metadata.csv")
_OF_DIR = (*_METADATA, "metadata.json", "metadata.tsv")
_FILE_LISTS = ("videos.txt", "video.txt", "images.txt", "image.txt")
_CAPTION_LISTS = ("prompts.txt", "prompt.txt", "captions.txt", "caption.txt")


@dataclasses.dataclass(frozen=True)
class Layout:
  """Clips and captions.

  Attributes:
    root: folder that keys are relative to.
    captions: in the order in which they count.
    clips: pattern of the clips' paths, or their folder; "" where the captions
      alone name them.
  """

  root: pathlib.Path
  captions: tuple[tables.Captions, ...]
  clips: str = ""

  def scan(self) -> Iterator[str]:
    """Yield the paths of the clips that are there."""
    return _scan(self.clips) if self.clips else iter(())


def find(videos: str, captions: str) -> Layout:
  """Find clips and captions.

  Args:
    videos: folder or glob of the clips; a manifest.
    captions: file or folder of their captions; "" or `videos` again is what
      lies with the clips.

  Raises:
    ValueError: if they are not there, or could be several.
  """
  own = captions in ("", videos)
  if os.path.isfile(videos):
    return _manifest(pathlib.Path(videos).absolute(), captions, own)
  root = _root(videos)
  if own:
    return Layout(root, _beside(root, videos), videos)
  path = pathlib.Path(captions).absolute()
  if path.is_dir():
    found = _tables(path, (root, path), _OF_DIR) or (
      _texts(videos, root, path),
    )
  else:
    _check_captions(path, captions)
    found = (_table(path, (root, path.parent)),)
  return Layout(root, found, videos)


def _manifest(path: pathlib.Path, captions: str, own: bool) -> Layout:
  """Take a file that names the clips."""
  root = path.parent
  if path.suffix.lower() in tables.SUFFIXES:
    if not own:
      raise ValueError(
        f"captions must be left out, for videos={path} is a manifest and has "
        f"them, got {captions}"
      )
    return Layout(root, (tables.Table(path, (root,)),))
  if path.suffix.lower() != ".txt":
    raise ValueError(
      f"videos must be a folder, a glob or a manifest, got {path}; give the "
      "folder that has the file"
    )
  said = pathlib.Path(captions).absolute() if not own else None
  said = said or _one(root, _CAPTION_LISTS)
  if said is None or said.suffix.lower() != ".txt" or not said.is_file():
    raise ValueError(
      f"captions must be the list of the captions of {path}, line by line, "
      f"got {captions!r}; write {root / _CAPTION_LISTS[0]}"
    )
  return Layout(root, (tables.Table(said, (root,), path),))


def _beside(root: pathlib.Path, videos: str) -> tuple[tables.Captions, ...]:
  """Find the captions that lie with the clips of a folder or glob."""
  found = _tables(root, (root,), _OF_DIR)
  if found:
    return found
  nested = [
    table
    for folder, _, _ in _walk(root)
    for table in _tables(pathlib.Path(folder), (pathlib.Path(folder), root))
  ]
  return tuple(nested) or (_texts(videos, root, None),)


def _tables(
  folder: pathlib.Path,
  names_in: tuple[pathlib.Path, ...],
  metadata: tuple[str, ...] = _METADATA,
) -> tuple[tables.Captions, ...]:
  """Find the table of a folder, or its lists; none if there is none."""
  if path := _one(folder, metadata):
    return (tables.Table(path, names_in),)
  files, said = _one(folder, _FILE_LISTS), _one(folder, _CAPTION_LISTS)
  return (tables.Table(said, names_in, files),) if files and said else ()


def _one(folder: pathlib.Path, names: tuple[str, ...]) -> pathlib.Path | None:
  """Give the one file of some names that is there, or None."""
  found = [folder / name for name in names if (folder / name).is_file()]
  if len(found) > 1:
    raise ValueError(
      f"captions could be any of {', '.join(map(str, found))}; name one"
    )
  return found[0] if found else None


def _table(
  path: pathlib.Path, names_in: tuple[pathlib.Path, ...]
) -> tables.Table:
  """Take a file of captions, with the list of files that goes with a list."""
  if path.suffix.lower() in tables.SUFFIXES:
    return tables.Table(path, names_in)
  lists = [_one(folder, _FILE_LISTS) for folder in names_in[::-1]]
  files = next(filter(None, lists), None)
  if files is None:
    raise ValueError(
      f"captions {path} needs the list of their files, line by line; write "
      f"{path.parent / _FILE_LISTS[0]}"
    )
  return tables.Table(path, names_in, files)


def _texts(
  videos: str, root: pathlib.Path, folder: pathlib.Path | None
) -> tables.Texts:
  return tables.Texts(lambda: _scan(videos), root, folder)


def _check_captions(path: pathlib.Path, given: str) -> None:
  if not path.is_file():
    raise ValueError(
      f"captions must be a file or folder, got {schema.quote(given)}, which is "
      "not there; write one line for each file of --videos"
    )
  known = (*tables.SUFFIXES, ".txt")
  if path.suffix.lower() not in known:
    raise ValueError(
      f"captions must be one of {', '.join(known)}, got {path}; write a line "
      "for each file, with its name and caption"
    )


def _root(videos: str) -> pathlib.Path:
  """Give the folder that the names of a folder's or glob's clips are in."""
  if os.path.isdir(videos):
    return pathlib.Path(videos).absolute()
  root = pathlib.Path(_stem(videos)).absolute()
  if not glob.has_magic(videos) or not root.is_dir():
    raise ValueError(
      f"videos must be a folder, a glob or a manifest, got {videos}, which "
      "is not there; give the folder that has the files"
    )
  return root


def _stem(pattern: str) -> str:
  """Give the folder of a glob that is before its first wildcard."""
  parts = pathlib.PurePath(pattern).parts
  fixed = [glob.has_magic(part) for part in parts]
  return os.path.join(*parts[: fixed.index(True)], "") if any(fixed) else "."


def _scan(videos: str) -> Iterator[str]:
  """Find the media files of a folder or glob, hidden ones left out."""
  if os.path.isdir(videos):
    paths = _files(_root(videos))
  else:
    found = sorted(glob.glob(videos, recursive=True))
    paths = (os.path.abspath(p) for p in found if os.path.isfile(p))
  for path in paths:
    name = os.path.basename(path)
    if os.path.splitext(name)[1].lower() in MEDIA and name[0] != ".":
      yield path


def _files(root: pathlib.Path) -> Iterator[str]:
  for folder, _, files in _walk(root):
    yield from (os.path.join(folder, name) for name in sorted(files))


def _walk(root: pathlib.Path) -> Iterator[tuple[str, list[str], list[str]]]:
  """Walk through a folder in order, hidden folders left out."""
  for folder, folders, files in os.walk(root):
    folders[:] = sorted(name for name in folders if not name.startswith("."))
    yield folder, folders, files
