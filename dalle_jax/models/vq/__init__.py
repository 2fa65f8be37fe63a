"""Image tokenizers with a codebook of vectors: VQ-VAE, VQGAN, and a small one on folded pixels.

`config` has the sizes, `quantizer` the codebook, `vqgan`, `vqvae` and `patches` the networks around it, and `model`
joins them. Knows nothing of losses or of how a codebook learns.
"""
