"""The rows of `tests.mutations` for diffusion."""

ROWS = [
    ("dalle_jax/diffusion.py", "test_diffusion.py", [
        ("OFFSET, MAX_BETA = 0.008, 0.999", "OFFSET, MAX_BETA = 0.008, 0.9999"),
        ("OFFSET, MAX_BETA = 0.008,", "OFFSET, MAX_BETA = 0.0,"),
        ("LINEAR = (1e-4, 2e-2)", "LINEAR = (1e-4, 1e-2)"),
        ("1_000 / length * beta", "beta"),
        ('FAST27 = "10,10,3,2,2"', 'FAST27 = "10,10,3,3,1"'),
        ("length - 3]", "length - 1]"),
        ("share = (range_output + 1) / 2", "share = range_output"),
        ("share * self.max_log_variance + (1 - share)", "(1 - share) * self.max_log_variance + share"),
        ("np.append(self.posterior_variance[1], self.posterior_variance[1:])", "self.posterior_variance + 1e-20"),
        ("small = large = np.append(small[0], large[1:])", "small = large"),
        ("np.append(self.alpha_bar[1:], 0.0)", "np.append(self.alpha_bar[1:], self.alpha_bar[-1])"),
        ("levels.posterior_x0**2 * x0_variance", "levels.posterior_x0 * x0_variance"),
        ("(index < length % len(counts))", "(index >= len(counts) - length % len(counts))"),
        ("range(length - 1, 0, -1)", "range(1, length)"),
        ('schedule: str = "cosine"', 'schedule: str = "linear"'),
        ("length: int = 1_000", "length: int = 4_000"),
        ('prediction: str = "eps"', 'prediction: str = "x0"'),
        ("eta: float = 0.0", "eta: float = 1.0"),
    ]),
    ("dalle_jax/train/variational.py", "train/test_variational.py", [
        ("HALF_BIN = 1 / 255", "HALF_BIN = 1 / 127.5"),
        ("EDGE = 0.999", "EDGE = 1.001"),
        ("MIN_PROBABILITY = 1e-12", "MIN_PROBABILITY = 1e-20"),
        ("CUBIC = 0.044715", "CUBIC = 0.0"),
        ("/ math.log(2)", ""),
        ("jax.lax.stop_gradient(output)", "output"),
    ]),
]  # fmt: skip
