"""What the shapes of a config say before anything runs: operations, attention's share of them, logits.

    python -m benchmarks.speed.counts

By the counting rule of `dalle-jax preflight` (`preflight/flops.py`), of one training sequence. All pairs: if attention
counted every query with every key, as some do.
"""

from dalle_jax import config as configs
from dalle_jax.models import build
from dalle_jax.models.transformer import TransformerConfig
from dalle_jax.preflight import flops

CONFIGS = ("12b", "5b6", "2b8", "1b3", "400m")


def count(config: TransformerConfig) -> dict[str, float]:
    """FLOPs of a training sequence, shares of them, and bytes of its float32 logits."""
    total, layout = flops.transformer(config), config.layout
    attention = flops.TRAINING_PASSES * flops.attention(config)
    every = flops.TRAINING_PASSES * 4 * config.num_layers * config.heads * config.head_size * layout.length**2
    return {
        "flops": total,
        "attention": attention / total,
        "all_pairs": (every - attention) / total,
        "logits_bytes": 4 * layout.logits,
    }


def main() -> None:
    print("| config | GFLOP | attention | all pairs | logits, MB |\n|---|---|---|---|---|")
    for name in CONFIGS:
        found = count(build("transformer", configs.load(f"configs/transformer.py:{name}").model).config)
        shares = " | ".join(f"{found[share]:.1%}" for share in ("attention", "all_pairs"))
        print(f"| {name} | {found['flops'] / 1e9:,.0f} | {shares} | {found['logits_bytes'] / 1e6:.0f} |")


if __name__ == "__main__":
    main()
