"""A sampled picture: a PIL image with how it was made, which it writes into its PNG file."""

import json
from typing import Any

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

SOFTWARE = "dalle-jax"


class Picture(Image.Image):
    """An RGB image with `caption`, `seed`, `score`, `settings` and `tokens`; as a PNG file it has all but the last as
    text chunks.

    score: CLIP's cosine similarity of image and caption, -1 .. 1, None if it was not ranked. settings: those of the
    request and the digest of the checkpoint, as plain json values. tokens: the image tokens that it was decoded from,
    int32 [rows, columns]; None if it was drawn without.
    """

    caption: str
    seed: int
    score: float | None
    settings: dict[str, Any]
    tokens: np.ndarray | None

    @classmethod
    def from_array(
        cls,
        image_uint8: np.ndarray,
        *,
        caption: str,
        seed: int,
        settings: dict[str, Any],
        score: float | None = None,
        tokens: np.ndarray | None = None,
    ) -> "Picture":
        """The picture of an array uint8 [H, W, 3]."""
        picture = cls()
        picture.__dict__.update(Image.fromarray(image_uint8).__dict__)
        picture.caption, picture.seed, picture.score, picture.settings = caption, seed, score, settings
        picture.tokens = tokens
        picture.info.update(picture.metadata())
        return picture

    def __getstate__(self):
        """PIL's state and ours, for `pickle`, `deepcopy` and other processes."""
        return super().__getstate__(), (self.caption, self.seed, self.score, self.settings, self.tokens)

    def __setstate__(self, state) -> None:
        image, (self.caption, self.seed, self.score, self.settings, self.tokens) = state
        super().__setstate__(image)

    def metadata(self) -> dict[str, str]:
        """The PNG text chunks: caption, seed, score if there is one, settings (json) and software."""
        return {
            "caption": self.caption,
            "seed": str(self.seed),
            **({} if self.score is None else {"score": f"{self.score:.6f}"}),
            "settings": json.dumps(self.settings, sort_keys=True),
            "software": SOFTWARE,
        }

    def save(self, fp, format=None, **params):
        """Save as PIL does; a PNG gets the metadata unless `pnginfo` is passed."""
        if "pnginfo" not in params:
            params["pnginfo"] = PngInfo()
            for key, value in self.metadata().items():
                params["pnginfo"].add_itxt(key, value)
        super().save(fp, format, **params)
