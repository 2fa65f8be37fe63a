"""What others have printed about DALL-E and its rivals on MS-COCO, with who printed it. They do not agree.

The paper prints curves and no figures (section 3.1, figure 9), so every figure of its FID is somebody's reading.
"""

import dataclasses

WARNING = (
    "The paper prints no figures, only curves, and those that circulate for DALL-E conflict: 27.5, about 28, 34.6 and "
    "17.89 for the same model without blur. They differ in network, resize, captions and reference, and what a radius "
    "of blur means was never said. None of them is known to come from this protocol."
)


@dataclasses.dataclass(frozen=True)
class Curve:
    """FID by radius of blur, and the Inception score without, as a paper prints them."""

    model: str
    source: str
    fid: dict[float, float]
    inception_score: float


COGVIEW = "Ding et al. 2021 (CogView), table 1"
CURVES = tuple(
    Curve(model, COGVIEW, dict(zip((0.0, 1.0, 2.0, 4.0, 8.0), fid, strict=True)), score)
    for model, fid, score in (
        ("AttnGAN", (35.2, 44.0, 72.0, 108.0, 100.0), 23.3),
        ("DM-GAN", (26.5, 39.0, 73.0, 119.0, 112.3), 32.2),
        ("DF-GAN", (26.5, 33.8, 55.9, 91.0, 97.0), 18.7),
        ("DALL-E", (27.5, 28.0, 45.5, 83.5, 85.0), 17.9),
        ("CogView", (27.1, 19.4, 13.9, 19.4, 23.6), 18.2),
    )
)
# FID of DALL-E on MS-COCO without blur, by who says so.
CONFLICTING = (
    ("27.5", "CogView (Ding et al. 2021), NUWA (Wu et al. 2021), ERNIE-ViLG (Zhang et al. 2021), minDALL-E (2021)"),
    ("about 28", "GLIDE (Nichol et al. 2021), DALL-E 2 (Ramesh et al. 2022)"),
    ("34.60", "Make-A-Scene (Gafni et al. 2022), of their own reimplementation"),
    ("17.89", "tables of Muse (Chang et al. 2023) and Kandinsky (Razzhigaev et al. 2023); where from is not said"),
)
CUB_PROTOCOL = "dalle-cub"
CUB = "about 56: 16.09 of DM-GAN (its repository) and the nearly 40 more of section 3.1"
CUB_SCORE = (
    "Published Inception scores on CUB are by a network trained on birds, which is not here: this one's does not "
    "compare with them."
)
PROTOCOLS = ("dalle-coco-30k", "dm-gan-coco-30k", "coco-30k-pytorch", "coco-30k-clean", "coco-30k-tf1")  # of MS-COCO
