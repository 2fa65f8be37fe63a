"""DALL-E (Ramesh et al. 2021) in JAX: pictures from captions, and everything needed to train the models that draw them.

`dalle_jax.Pipeline.load(DIR)("a red circle", n=4, seed=0)` samples from Python, `dalle_jax.ImageTokenizer.load(DIR)`
turns images into image tokens and back; the `dalle-jax` command does the rest.
"""

__version__ = "0.2.0"
__all__ = ["ImageTokenizer", "Pipeline", "__version__"]


def __getattr__(name: str):
    # Lazy, so that `import dalle_jax` and `dalle-jax --help` do not wait for JAX.
    if name == "Pipeline":
        from dalle_jax.sample.pipeline import Pipeline

        return Pipeline
    if name == "ImageTokenizer":
        from dalle_jax.sample.image_tokenizer import ImageTokenizer

        return ImageTokenizer
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
