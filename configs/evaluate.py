"""Protocols of evaluation, complete. Launch:

    dalle-jax evaluate runs/transformer --config configs/evaluate.py:coco --config.source=coco:/data/coco \
        --config.weights=runs/inception_torchvision --config.score_weights=runs/inception --out runs/coco
    dalle-jax evaluate --pictures others/ --config configs/evaluate.py:coco --config.source=coco:/data/coco \
        --config.weights=runs/inception_torchvision --out others_coco
    dalle-jax evaluate demo/transformer --config configs/evaluate.py:demo --config.clip=demo/clip --out demo_evaluation
    dalle-jax evaluate --reconstructions runs/dvae --data scenes:val@64 --config.count=200 --out runs/reconstructions

coco     dalle-coco-30k: Ramesh et al. 2021, section 3.1 and figure 9: 30,000 captions of the validation set of MS-COCO
         2014, the best of 512 candidates each, against all 40,504 of its pictures, cropped about their centers
         (Nichol et al. 2021, appendix A.2); the DM-GAN code's networks and resizes; both sets blurred by growing radii
dm-gan   the same captions as the DM-GAN code scores them (Zhu et al. 2019): the reference squeezed, not cropped
pytorch  the network of FID with pytorch-fid's resize, cropped about the center
clean    the same with clean-fid's
tf1      the same with that of the first TensorFlow code
cub      section 3.1: every different caption of a source, all pictures of it as the reference; scored as coco
sets     no protocol: --pictures against --reference, each as it is
demo     scenes: 200 captions, small enough for a CPU; features of the demo's CLIP, no Inception
reconstructions  no protocol, of image tokenizers: what --reconstructions takes

The numbers of two protocols do not compare with each other. docs/evaluation.md says what each leaves open, and
dalle_jax/evaluate/protocol.py what each key means.
"""

from typing import Any

from ml_collections import ConfigDict

from dalle_jax.configs.base import fields
from dalle_jax.evaluate.protocol import PROCESSES, Draw, Evaluation, Metrics
from dalle_jax.evaluate.reconstructions import Reconstructions

COCO_PICTURES = 40_504  # of val2014
RADII = (0.0, 1.0, 2.0, 4.0, 8.0)  # figure 9; that they are Pillow's radii in pixels is our reading
BEST_OF = 512  # section 2.6
SIDE = 256  # of the paper's pictures


def _protocol(name: str | None, draw: Draw | None, measure: Metrics, **values) -> ConfigDict:
    config = fields(Evaluation(protocol=name, draw=draw, measure=measure, **values))
    del config.departures
    config.name, config.processes = "evaluate", fields(PROCESSES)
    return config


def _coco(name: str, **measure) -> ConfigDict:
    draw = Draw(count=30_000, best_of=BEST_OF)
    return _protocol(name, draw, Metrics(**measure), reference_exactly=COCO_PICTURES)


def _fid(name: str) -> ConfigDict:
    return _coco(f"coco-30k-{name}", pools="fid", resize=name, crop="center", side=SIDE)


DM_GAN: dict[str, Any] = dict(pools="torchvision", resize="dm-gan", blur=RADII)
DM_GAN_SCORE = dict(score_pools="fid", score_resize="dm-gan-score")  # on MS-COCO; on CUB a network of birds
PAPER: dict[str, Any] = dict(**DM_GAN, crop="center", side=SIDE)


def _cub() -> ConfigDict:
    return _protocol("dalle-cub", Draw(unique=True, best_of=BEST_OF), Metrics(**PAPER))


def _demo() -> ConfigDict:
    measure = Metrics(features="clip", blur=(0.0, 1.0, 2.0))
    return _protocol("demo-scenes", Draw(count=200), measure, source="scenes:val@64", reference_count=1_000)


def _sets() -> ConfigDict:
    return _protocol(None, None, Metrics(), pictures="")


def _reconstructions() -> ConfigDict:
    config = fields(Reconstructions())
    config.name = "reconstructions"
    return config


VARIANTS = {
    "coco": lambda: _coco("dalle-coco-30k", **PAPER, **DM_GAN_SCORE),
    "dm-gan": lambda: _coco("dm-gan-coco-30k", **DM_GAN, **DM_GAN_SCORE),
    "pytorch": lambda: _fid("pytorch"),
    "clean": lambda: _fid("clean"),
    "tf1": lambda: _fid("tf1"),
    "cub": _cub,
    "sets": _sets,
    "demo": _demo,
    "reconstructions": _reconstructions,
}
VARIANTS["dalle-coco-30k"] = VARIANTS["coco"]


def get_config(variant: str = "coco") -> ConfigDict:
    return VARIANTS[variant]()
