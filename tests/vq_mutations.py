"""The rows of `tests.mutations` for image tokenizers with a codebook."""

ROWS = [
    ("dalle_jax/models/vq/config.py", "convert/test_vqgan.py models/test_vq.py -k 'published or haikus'", [
        ("vocab: int = 16_384", "vocab: int = 8_192"),
        ("code_dim: int = 256", "code_dim: int = 128"),
        ("width: int = 128", "width: int = 64"),
        ("(1, 1, 2, 2, 4)", "(1, 2, 2, 2, 4)"),
        ("blocks: int = 2", "blocks: int = 3"),
        ("attention_levels: tuple[int, ...] = (4,)", "attention_levels: tuple[int, ...] = (3,)"),
        ("latent: int = 256", "latent: int = 128"),
        ("BOTTLENECK = 4", "BOTTLENECK = 2"),
    ]),
    ("dalle_jax/models/vq/config.py", "models/test_vq.py -k group_norm", [("NORM_GROUPS = 32", "NORM_GROUPS = 16")]),
    ("dalle_jax/models/vq/vqgan.py", "models/test_vq.py -k group_norm", [("EPSILON = 1e-6", "EPSILON = 1e-5")]),
    ("dalle_jax/models/vq/vqgan.py", "convert/test_vqgan.py -k numbers_of", [("C**-0.5", "C**-1.0")]),
    ("dalle_jax/models/vq/patches.py", "models/test_vq.py -k 'patches or folded'", [
        ("EPSILON = 1e-6", "EPSILON = 1e-5"),
        ("BRANCH_GAIN = 0.1", "BRANCH_GAIN = 1.0"),
        ("FINE_PATCH = 4", "FINE_PATCH = 2"),
    ]),
    ("dalle_jax/models/vq/quantizer.py", "models/test_vq_quantizer.py -k 'unit or never or haikus'", [
        ("MIN_LENGTH = 1e-12", "MIN_LENGTH = 1e-14"),
        ("MAX_DISTANCES = 1 << 24", "MAX_DISTANCES = 1 << 26"),
        ("3.0 / config.code_dim", "1.0 / config.code_dim"),
        ("1.0 / config.vocab", "2.0 / config.vocab"),
    ]),
    ("dalle_jax/pixels.py", "models/test_vq_config.py -k ranges", [
        ('"symmetric": (-1.0, 1.0)', '"symmetric": (0.0, 1.0)'),
        ('"centered": (-0.5, 0.5)', '"centered": (-1.0, 1.0)'),
    ]),
]  # fmt: skip
