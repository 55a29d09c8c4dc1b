"""A clone's configs, which lie beside the package; a wheel has them here."""

import pathlib

__path__ = [str(pathlib.Path(__file__).resolve().parents[2] / "configs")]
