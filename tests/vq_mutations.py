"""The rows of `tests.mutations` for image tokenizers with a codebook."""

PAPER = "test_vq_paper.py"

ROWS = [
    ("configs/vq.py", PAPER, [
        ("CIFAR_VARIANCE = 0.0633", "CIFAR_VARIANCE = 0.25"),
        ("weight=0.8, learns_from=240_000, start=250_000", "weight=0.4, learns_from=240_000, start=250_000"),
        ("learns_from=240_000, start=250_000", "learns_from=240_000, start=260_000"),
        ("vocab=512,", "vocab=1_024,"),
        ("learning_rate=3e-4, b2=0.999, weight_decay=0.0, clip_norm=None", "learning_rate=1e-4, clip_norm=None"),
        ("run=Run(steps=10_000)", "run=Run(steps=20_000)"),
        ("learning_rate=4.5e-6 * batch_size, b1=0.5", "learning_rate=4.5e-6, b1=0.5"),
        ("b1=0.5, b2=0.9,", "b1=0.9, b2=0.999,"),
        ("code_dim=4,", "code_dim=8,"),
        ("kl=5e-4", "kl=5e-3"),
        ("Cosine(1.0, 1 / 16, 150_000)", "Cosine(1.0, 1 / 16, 15_000)"),
        ("decay=0.98", "decay=0.99"),
        ("noise=0.3", "noise=0.03"),
        ("dead_every=50", "dead_every=500"),
        ("start=1_080", "start=108"),
        ("edges=0.5", "edges=5.0"),
    ]),
    ("dalle_jax/train/codebook.py", PAPER, [
        ("commitment: float = 0.25", "commitment: float = 1.0"),
        ("codebook_weight: float = 1.0", "codebook_weight: float = 0.25"),
        ("decay: float = 0.99", "decay: float = 0.9"),
        ("epsilon: float = 1e-5", "epsilon: float = 1e-3"),
    ]),
    ("dalle_jax/train/adversary.py", PAPER, [
        ("DELTA = 1e-4", "DELTA = 1e-6"),
        ("weight: float = 0.8", "weight: float = 1.0"),
        ("max_weight: float = 1e4", "max_weight: float = 1.0"),
        ("start: int = 10_000", "start: int = 1_000"),
        ("width: int = 64", "width: int = 32"),
        ("layers: int = 3", "layers: int = 4"),
    ]),
    ("dalle_jax/train/objectives/vq.py", PAPER, [("CHARBONNIER = 1e-3", "CHARBONNIER = 1e-2")]),
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
