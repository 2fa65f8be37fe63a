"""The sizes of an image tokenizer with a codebook of vectors."""

import dataclasses
import numbers

from dalle_jax import pixels
from dalle_jax.errors import MAX_SIZE, check_sizes
from dalle_jax.models.layers import check_no_paper, compute_dtype

NETWORKS = ("vqgan", "vqvae", "patches")
QUANTIZERS = ("nearest", "gumbel")
MAX_LEVELS = 16
NORM_GROUPS = 32  # of the VQGAN's group norms (taming-transformers)
BOTTLENECK = 4  # the VQ-VAE's residual blocks have a quarter of its channels inside (DeepMind's example for CIFAR)


@dataclasses.dataclass(frozen=True)
class VQConfig:
    """Sizes of the networks and the codebook. The defaults are those of taming's `vqgan_imagenet_f16_16384`.

    image_size: pixels per side that it is trained on. vocab: entries of the codebook. code_dim: length of each.
    network: 'vqgan' (Esser et al. 2021), 'vqvae' (van den Oord et al. 2017) or 'patches', a small one on folded pixels.
    width: channels that `multipliers` are multiples of, one per level, the finest first; each level has half the
    positions per side of the one before. A 'vqvae' has one per halving, so that its first level is halved already.
    blocks: residual blocks per level; at the coarsest alone for a 'vqvae'; one more in a VQGAN's decoder.
    attention_levels: levels with attention behind each block, 0 for the finest; 'vqgan' alone, which has it between its
    two middle blocks too. latent: channels that its encoder ends with and its decoder begins with; 'vqgan' alone.
    patch: pixels per side that are folded into channels; 'patches' alone.
    quantizer: 'nearest', or 'gumbel', where the encoder gives logits over the codes. unit_codes: latents and codes have
    length 1 wherever they meet, and in the decoder.
    pixel_range: of what the networks read and give, see `pixels.RANGES`.
    precision: 'fp32', 'bf16' or 'fp16-global', see `layers.compute_dtype`; norms and the quantizer are float32.
    """

    image_size: int = 256
    vocab: int = 16_384
    code_dim: int = 256
    network: str = "vqgan"
    width: int = 128
    multipliers: tuple[int, ...] = (1, 1, 2, 2, 4)
    blocks: int = 2
    attention_levels: tuple[int, ...] = (4,)
    latent: int = 256
    patch: int = 1
    quantizer: str = "nearest"
    unit_codes: bool = False
    pixel_range: str = "symmetric"
    precision: str = "fp32"

    def __post_init__(self):
        check_sizes(self, "image_size", "vocab", "code_dim", "width", "blocks", "latent", "patch")
        for name, allowed in (
            ("network", NETWORKS),
            ("quantizer", QUANTIZERS),
            ("pixel_range", tuple(pixels.RANGES)),
            ("unit_codes", (False, True)),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {allowed}, got {getattr(self, name)!r}")
        self._check_levels("multipliers", max=MAX_SIZE // self.width, min=1)
        if not 1 <= len(self.multipliers) <= MAX_LEVELS:
            raise ValueError(f"multipliers must be 1 to {MAX_LEVELS} numbers, one per level, got {self.multipliers}")
        last = len(self.multipliers) - 1 if self.network == "vqgan" else MAX_LEVELS  # of others nothing reads them
        self._check_levels("attention_levels", max=last, min=0)
        getattr(self, f"_check_{self.network}")()
        if self.quantizer == "gumbel" and self.unit_codes:
            raise ValueError("unit_codes must be False with quantizer 'gumbel', whose codes are chosen by logits")
        if self.image_size % self.stride:
            raise ValueError(
                f"image_size must be a multiple of the stride {self.stride} of {self.network} with {self.multipliers}, "
                f"got {self.image_size}"
            )
        compute_dtype(self.precision)
        check_no_paper(self.precision, "VQ")

    def _check_levels(self, name: str, *, max: int, min: int) -> None:
        """Whole numbers, kept as a tuple, which lists from json files and configs become."""
        values = getattr(self, name)
        if not isinstance(values, (tuple, list)):
            raise ValueError(f"{name} must be several numbers like (1, 2), got {values!r}")
        if not all(isinstance(value, numbers.Integral) and min <= int(value) <= max for value in values):
            raise ValueError(f"{name} must be whole numbers of at least {min}, at most {max:,}, got {values!r}")
        object.__setattr__(self, name, tuple(map(int, values)))

    def _check_vqgan(self) -> None:
        if any(width % NORM_GROUPS for width in (self.width, *self.widths)):
            raise ValueError(
                f"width and every product with multipliers must be multiples of {NORM_GROUPS} (the groups of a norm), "
                f"got {self.width} and {self.widths}"
            )
        self._check_no_patch()

    def _check_vqvae(self) -> None:
        if self.widths[-1] % BOTTLENECK:
            raise ValueError(
                f"width times the last of multipliers must be a multiple of {BOTTLENECK} (the bottleneck), "
                f"got {self.widths[-1]}"
            )
        self._check_no_patch()

    def _check_no_patch(self) -> None:
        if self.patch != 1:
            raise ValueError(f"patch must be 1 for network {self.network!r}, got {self.patch}: 'patches' folds pixels")

    def _check_patches(self) -> None:
        if self.patch >= 4 and (self.patch % 2 or self.widths[0] % 2):
            raise ValueError(
                f"patch and the finest level's channels must be even where patch is 4 or more, whose decoder ends at "
                f"half of both, got {self.patch} and {self.widths[0]}"
            )

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels of each level, the finest first."""
        return tuple(self.width * multiplier for multiplier in self.multipliers)

    @property
    def stride(self) -> int:
        """Pixels per grid position and side."""
        if self.network == "vqvae":
            return 2 ** len(self.multipliers)
        return self.patch * 2 ** (len(self.multipliers) - 1)

    @property
    def grid(self) -> int:
        """Grid positions per side of a picture of the trained size."""
        return self.image_size // self.stride
