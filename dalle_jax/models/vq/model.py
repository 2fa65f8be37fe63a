"""An image tokenizer with a codebook of vectors: an encoder, the codebook and a decoder."""

import functools

import jax.numpy as jnp
from flax import nnx

from dalle_jax import pixels
from dalle_jax.models.convolutions import Conv
from dalle_jax.models.layers import Model, Params
from dalle_jax.models.vq import patches, vqgan, vqvae
from dalle_jax.models.vq.config import VQConfig
from dalle_jax.models.vq.quantizer import Quantizer

_NETWORKS = {"vqgan": vqgan, "vqvae": vqvae, "patches": patches}


@functools.cache
def model(config: VQConfig) -> Model:
    """The tokenizer as pure functions, the same one for the same config; methods: those of `VQ`."""
    return Model(config, lambda rngs: VQ(config, rngs))


def encode_images(model: Model, params: Params, image_uint8):
    """uint8 [B, H, W, 3] -> image tokens int32 [B, R, C], the nearest codes or the largest logits; no noise."""
    x_BHWC = pixels.to_range(pixels.to_unit(image_uint8), model.config.pixel_range)
    return model.apply(params, x_BHWC, method="encode_tokens")


def decode_images(model: Model, params: Params, tokens_BRC):
    """Image tokens [B, R, C] -> uint8 [B, H, W, 3]."""
    x_BHWC = model.apply(params, tokens_BRC, method="decode_tokens")
    return pixels.to_uint8(pixels.from_range(x_BHWC, model.config.pixel_range))


def last_weight(config: VQConfig) -> tuple[str, ...]:
    """The path in the parameters of the decoder's last convolution, whose results are pixels."""
    return "decoder", "up_0" if config.network == "vqvae" else "conv_out", "weight"


class VQ(nnx.Module):
    """Parameters: {'encoder', 'quant_conv', 'quantizer', 'decoder'}, and for 'vqgan' {'post_quant_conv'}.

    H and W are any multiples of the config's stride, R = H / stride and C = W / stride; pixels are in the config's
    range.
    """

    def __init__(self, config: VQConfig, rngs: nnx.Rngs):
        network = _NETWORKS[config.network]
        torch_like = config.network == "vqgan"
        features = config.latent if torch_like else config.widths[-1]
        self.encoder = network.Encoder(config, rngs)
        self.quant_conv = Conv(1, (features, config.code_dim), rngs, uniform=torch_like)
        self.quantizer = Quantizer(config, rngs)
        self.post_quant_conv = Conv(1, (config.code_dim, features), rngs, uniform=True) if torch_like else None
        self.decoder = network.Decoder(config, rngs)
        self.stride = config.stride

    def encode(self, x_BHWC):
        """Images [B, H, W, 3] -> float32 vectors [B, R, C, D], not normalized, or for 'gumbel' logits [B, R, C, K].

        Raises:
          ValueError: another shape, or sides that are no multiples of the stride.
        """
        if x_BHWC.ndim != 4 or x_BHWC.shape[-1] != 3 or any(side % self.stride for side in x_BHWC.shape[1:3]):
            raise ValueError(
                f"the encoder takes images [B, H, W, 3] with sides that are multiples of {self.stride}, "
                f"got {x_BHWC.shape}"
            )
        return self.quantizer(self.quant_conv(self.encoder(x_BHWC)))

    def look_up(self, tokens_BRC):
        """Image tokens [B, R, C] -> codes [B, R, C, D] as the decoder gets them, of length 1 with `unit_codes`."""
        return self.quantizer.codes()[tokens_BRC]

    def decode(self, q_BRCD):
        """Codes [B, R, C, D] -> images float32 [B, H, W, 3], not clipped."""
        x_BRCD = q_BRCD if self.post_quant_conv is None else self.post_quant_conv(q_BRCD)
        return self.decoder(x_BRCD).astype(jnp.float32)

    def encode_tokens(self, x_BHWC):
        """Images [B, H, W, 3] -> image tokens int32 [B, R, C]."""
        return self.quantizer.tokens(self.encode(x_BHWC))

    def decode_tokens(self, tokens_BRC):
        """Image tokens [B, R, C] -> images float32 [B, H, W, 3], not clipped."""
        return self.decode(self.look_up(tokens_BRC))
