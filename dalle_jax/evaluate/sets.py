"""The sets of pictures of an evaluation: where they are, which rows of them count, their features by any network."""

import dataclasses
import pathlib

import numpy as np

from dalle_jax.data.record import Source
from dalle_jax.data.sources import open_source
from dalle_jax.errors import UserError
from dalle_jax.evaluate import store
from dalle_jax.evaluate.crew import Crew
from dalle_jax.evaluate.features import Extractor, Found, Preparation, counted, refuse_none
from dalle_jax.evaluate.protocol import Measure


def open_pictures(spec: str) -> Source:
    """Pictures with or without captions. spec: a source, or the path of a folder.

    Raises:
      UserError: no such source.
    """
    return open_source(f"folder:{spec}" if pathlib.Path(spec).is_dir() else spec, captions_required=False)


@dataclasses.dataclass(frozen=True)
class PictureSet:
    """Rows of a source. name: 'pictures', 'reference' or 'training', for people. crop: of `protocol.CROPS`.

    asked: how many pictures were asked for by number, 0 if all.
    """

    name: str
    source: Source
    rows: np.ndarray
    crop: str
    asked: int = 0

    @classmethod
    def of(cls, name: str, source: Source, *, crop: str, count: int, seed: int) -> "PictureSet":
        """count: drawn by the seed, 0 for all.

        Raises:
          UserError: the source has no so many.
        """
        rows = np.arange(len(source))
        if count:
            if not 2 <= count <= len(rows):
                key = "reference_count" if name == "reference" else "count"
                raise UserError(
                    f"expected 2 to {len(rows)} pictures of {source.name}, as it has, got a count of {count}: give "
                    f"more pictures, or another number by --config.{key}=N (--count N)"
                )
            rows = np.sort(np.random.default_rng(seed).choice(len(rows), count, replace=False))
        return cls(name, source, rows, crop, count)

    def check(self, found: Found) -> Found:
        """The same features, if they are as many as were asked for.

        Raises:
          UserError: fewer, or none.
        """
        refuse_none(found, self.source)
        if self.asked and len(found) < self.asked:
            raise UserError(
                f"expected {self.asked} pictures of {self.source.name}, got {len(found)}, as the rest cannot be read "
                f"({counted(found.dropped)}): mend or remove those, see `dalle-jax data`"
            )
        return found


@dataclasses.dataclass(frozen=True)
class Features:
    """Makes and loads features of sets, in parts below `folder`; this process's part of them (`Crew`)."""

    measure: Measure
    folder: pathlib.Path
    crew: Crew
    tell: bool

    def make(self, extractor: Extractor, pictures: PictureSet, radius: float = 0.0) -> list[pathlib.Path]:
        """Files of the set's features at a radius of blur. Raises UserError for features that are not finite."""
        prepare = self.preparation(pictures, radius)
        tell = f"{pictures.name} by {extractor.network}" + (f", blur {radius:g}" if radius else "")
        return store.parts(
            extractor,
            pictures.source,
            prepare=prepare,
            rows=pictures.rows,
            folder=self.folder,
            crew=self.crew,
            tell=tell if self.tell else "",
        )

    def load(self, files: list[pathlib.Path], pictures: PictureSet) -> Found:
        """All features, once every process has made its own.

        Raises:
          UserError: fewer pictures than were asked for, or none.
        """
        self.crew.wait(files)
        return pictures.check(Found.joined([store.load(file) for file in files]))

    def preparation(self, pictures: PictureSet, radius: float) -> Preparation:
        return Preparation(resize=self.measure.resize, crop=pictures.crop, side=self.measure.side, blur=radius)
