"""Is every number of the papers held by a test? Changes them one at a time in a copy of the tree, and runs tests there.

    python -m tests.mutations                  # all of them, two at a time: minutes on two quiet cores
    python -m tests.mutations powersgd 4.5e-2  # those whose file or text holds one of these words

A row of MUTATIONS is a file, the tests that should notice (arguments of pytest below tests/), and pairs of a text that
stands exactly once in the file and what it becomes. First the tests have to pass on an unchanged copy. Exit status 1
where a change survives its tests, or where a row does not fit the tree any more.
"""

import concurrent.futures
import os
import pathlib
import queue
import shlex
import shutil
import subprocess
import sys
import tempfile

from tests import diffusion_mutations, vq_mutations
from tests.support import ROOT

WORKERS = 2
PAPER, TRANSFORMER = "test_paper.py", "models/test_transformer.py -k initial_values"
READING = "train/test_transformer_objective.py"
PRECISION = "train/test_precision.py -k 'scales_rise or overflow_moves or formats_of'"

MUTATIONS = [
    ("dalle_jax/layout.py", "test_layout.py", [
        ("TEXT_LOSS_WEIGHT, IMAGE_LOSS_WEIGHT = 1 / 8, 7 / 8", "TEXT_LOSS_WEIGHT, IMAGE_LOSS_WEIGHT = 7 / 8, 1 / 8"),
        ("text_len: int = 256", "text_len: int = 128"),
        ("text_vocab: int = 16_384", "text_vocab: int = 8_192"),
        ("grid: int = 32", "grid: int = 16"),
        ("image_vocab: int = 8_192", "image_vocab: int = 16_384"),
        ('begin = 1 if self.first == "start" else 0', "begin = 0"),
        ("(self.text_len if self.pad is None else 0)", "(1 if self.pad is None else 0)"),
        ("*tokens, self.marks[1]]", "*tokens, self.marks[0]]"),
        ("np.insert(ids, 0, self.marks[0])", "np.insert(ids, 0, self.marks[1])"),
    ]),
    ("dalle_jax/train/objectives/transformer.py", READING, [
        ("TEXT_LOSS_WEIGHT * text + IMAGE_LOSS_WEIGHT * image", "IMAGE_LOSS_WEIGHT * text + TEXT_LOSS_WEIGHT * image"),
        ("text_logits[:, : text_BT.shape[1] - 1], text_BT[:, 1:]", "text_logits, text_BT[:, : text_logits.shape[1]]"),
    ]),
    ("dalle_jax/models/transformer.py", TRANSFORMER, [
        ("INIT = 0.125", "INIT = 0.25"),
        ("token, text_position = INIT * width**-0.5,", "token, text_position = 3 * INIT * width**-0.5,"),
        (", INIT * width**-0.5\n", ", 5 * INIT * width**-0.5\n"),
        ("INIT * (2 * width) ** -0.5", "INIT * width**-0.5"),
        ("(2 * config.num_layers) ** -0.5", "1.0"),
        ('"qkv": INIT', '"qkv": 2 * INIT'),
        ('"out": INIT * (config.heads * config.head_size) ** -0.5', '"out": INIT * config.head_size ** -0.5'),
        ('"up": INIT', '"up": 2 * INIT'),
        ('"down": INIT * (4 * width)', '"down": INIT * (width)'),
        ('layout.image_vocab), axes=("embed", "vocab"))', 'layout.image_vocab), axes=("embed", "vocab"), std=0.02)'),
    ]),
    ("dalle_jax/models/transformer.py", READING, [
        ("constant_values=layout.start_of_image", "constant_values=0"),
        ("image_BI[:, :-1], [(0, 0), (1, 0)]", "image_BI[:, 1:], [(0, 0), (0, 1)]"),
        ('tables["row_position"][index // grid]', 'tables["row_position"][index % grid]'),
    ]),
    ("dalle_jax/models/transformer.py", PAPER, [
        ("num_layers: int = 64", "num_layers: int = 60"),
        ("width: int = 3968", "width: int = 3840"),
        ("heads: int = 62", "heads: int = 60"),
        ("head_size: int = 64", "head_size: int = 128"),
        ('pattern: str = "paper"', 'pattern: str = "full"'),
        ('remat: str = "full"', 'remat: str = "none"'),
    ]),
    ("dalle_jax/models/layers.py", READING, [
        ("jax.nn.sigmoid(1.702 * x)", "jax.nn.sigmoid(1.5 * x)"),
        ("EPSILON = 1e-5", "EPSILON = 1e-3"),
    ]),
    ("dalle_jax/models/blocks.py", READING, [
        ('ops.norm(block, "norm2", x)', "x"),
        ("ops.add(block, ops.add(block, x, ATTENTION, attention), MLP, mlp)",
         "ops.add(block, ops.add(block, x, MLP, mlp), ATTENTION, attention)"),
    ]),
    ("dalle_jax/models/blocks.py", "models/test_transformer.py -k parameter_count", [
        ('"mlp": 4 * width', '"mlp": 3 * width'),
    ]),
    ("dalle_jax/attention_pattern.py", "test_attention_pattern.py", [
        ('PERIOD = ("row", "column", "row", "row")', 'PERIOD = ("column", "row", "row", "row")'),
        ("CONV_SIZE = 11", "CONV_SIZE = 9"),
        ("tuple(range(grid + 1))", "tuple(range(grid))"),
        ("range(0, grid * grid, grid)", "range(0, grid * grid, grid + 1)"),
        ('"paper": "conv"', '"paper": "row"'),
        ('"malevich": "window"', '"malevich": "conv"'),
        ("np.minimum(apart, grid - apart)", "apart"),
        ('or last != "column"', 'or last == "column"'),
    ]),
    ("dalle_jax/models/families.py", "convert/test_decoders.py -k 'original or mask'", [
        ("approximate=False", "approximate=True"),
        ("marks = (2, 3)", "marks = (3, 2)"),
        ('"mindalle": Family("none"', '"mindalle": Family("start"'),
        ("sandwich=True", "sandwich=False"),
    ]),
    ("dalle_jax/models/dvae.py", "test_paper.py models/test_dvae.py -k 'test_the or defaults'", [
        ("image_size: int = 256", "image_size: int = 128"),
        ("vocab: int = 8_192", "vocab: int = 4_096"),
        ("width: int = 256", "width: int = 128"),
        ("groups: int = 4", "groups: int = 3"),
        ("blocks_per_group: int = 2", "blocks_per_group: int = 1"),
        ("stem: int = 128", "stem: int = 64"),
        ("stem_kernel: int = 7", "stem_kernel: int = 5"),
        ("hidden = after // 4", "hidden = after // 2"),
        ("(self.groups * self.blocks_per_group) ** 2", "(self.groups * self.blocks_per_group)"),
        ("OUTPUTS = 6", "OUTPUTS = 3"),
    ]),
    ("dalle_jax/models/dvae.py", "convert/test_openai_dvae.py -k golden", [
        ("(3, 3, 3, 1), _max_pool", "(1, 3, 3, 3), _max_pool"),
        ("(1, 3, 3, 3), _double", "(3, 3, 3, 1), _double"),
        (".max((2, 4))", ".mean((2, 4))"),
        ("jax.nn.relu(x_BRCD).astype(jnp.float32)", "x_BRCD.astype(jnp.float32)"),
        ("y_BHWC = conv(jax.nn.relu(y_BHWC))", "y_BHWC = jax.nn.relu(conv(y_BHWC))"),
    ]),
    ("dalle_jax/models/convolutions.py", "models/test_dvae.py -k initialisation", [
        ("(kernel * kernel * channels[0]) ** -0.5", "(channels[0]) ** -0.5"),
    ]),
    ("dalle_jax/models/dvae.py", "models/test_dvae.py -k formula", [("pixel_BHWC[..., :3]", "pixel_BHWC[..., 3:]")]),
    ("dalle_jax/models/dvae.py", "models/test_dvae.py -k 'bfloat16'", [
        ("**_trunk(config))\n\n    def pixels", "dtype=compute_dtype(config.precision))\n\n    def pixels"),
        ('{"dtype": jnp.float32, "precision": jax.lax.Precision.HIGH}', '{"dtype": jnp.bfloat16}'),
    ]),
    ("dalle_jax/pixels.py", "models/test_dvae.py -k formula", [("EPSILON = 0.1", "EPSILON = 0.2")]),
    ("dalle_jax/train/objectives/dvae.py", "models/test_dvae.py -k 'formula or kl_is or cold or integrates'", [
        ("kl_BGG.sum() / x_BHWC.size", "kl_BGG.mean()"),
        ("-jnp.log(2.0) - log_scale", "- log_scale"),
        ("+ jnp.log(logits.shape[-1])", ""),
        ("(logits + noise) / temperature", "logits / temperature + noise"),
        ("loss = nll + beta * kl", "loss = nll + kl"),
    ]),
    ("dalle_jax/train/settings.py", "models/test_dvae.py -k schedules", [
        ("Cosine(0.0, 6.6, 5_000)", "Cosine(0.0, 0.6, 5_000)"),
        ("beta: Cosine = Cosine(0.0, 6.6, 5_000)", "beta: Cosine = Cosine(0.0, 6.6, 50_000)"),
        ("Cosine(1.0, 1 / 16, 150_000)", "Cosine(1.0, 1 / 8, 150_000)"),
        ("temperature: Cosine = Cosine(1.0, 1 / 16, 150_000)", "temperature: Cosine = Cosine(1.0, 1 / 16, 15_000)"),
    ]),
    ("configs/dvae.py", PAPER, [
        ("batch_size=512", "batch_size=256"),
        ("learning_rate=1e-4,\n            weight_decay=1e-4,\n            schedule=Schedule(name=\"cosine\"",
         "learning_rate=3e-4,\n            weight_decay=1e-4,\n            schedule=Schedule(name=\"cosine\""),
        ("weight_decay=1e-4,\n            schedule=Schedule(name=\"cosine\"",
         "weight_decay=0.0,\n            schedule=Schedule(name=\"cosine\""),
        ("decay_steps=1_200_000", "decay_steps=3_000_000"),
        ("end_learning_rate=1.25e-6", "end_learning_rate=0.0"),
        ("Ema(decay=0.999)", "Ema(decay=0.99)"),
        ("steps=3_000_000", "steps=1_000_000"),
        ("image_size=256", "image_size=128"),
        ('image_size=256, augment="dvae"', 'image_size=256, augment="center"'),
        ("**PAPER_FILTERS", "max_aspect_ratio=2.0"),
    ]),
    ("configs/base.py", PAPER, [
        ("min_caption_words=2", "min_caption_words=0"),
        ("english_only=True", "english_only=False"),
        ("drop_boilerplate=True", "drop_boilerplate=False"),
        ("max_aspect_ratio=2.0", "max_aspect_ratio=9.0"),
    ]),
    ("dalle_jax/data/filters.py", "data/test_filters.py", [
        ("(0.99, 0.07)", "(0.99, 0.01)"),
        ("(0.8, 0.004)", "(0.8, 0.003)"),
        ("(0.0, 0.003)", "(0.0, 0.00003)"),
    ]),
    ("dalle_jax/train/optimizer/build.py", PAPER, [
        ("b1: float = 0.9 ", "b1: float = 0.95 "),
        ("b2: float = 0.999", "b2: float = 0.99"),
        ("eps: float = 1e-8", "eps: float = 1e-7"),
    ]),
    ("dalle_jax/train/optimizer/build.py", "train/test_optimizer.py -k 'clipping or without_gradient'", [
        ("g / norm.astype(g.dtype) * max_norm", "g / norm.astype(g.dtype)"),
        ("mask=decays)", "mask=None)"),
    ]),
    ("dalle_jax/train/optimizer/schedule.py", "train/test_optimizer.py -k 'cosine or warm_up or plateau'", [
        ("factor=0.5", "factor=0.25"),
        ("0.5**plateau.halvings", "0.5 ** (plateau.halvings + 1)"),
        ("peak * (count + 1) / warmup_steps", "peak * count / warmup_steps"),
        ("(1.0 + jnp.cos(jnp.pi * done)) / 2.0", "(1.0 - done)"),
    ]),
    ("dalle_jax/train/optimizer/schedule.py", PAPER, [
        ("window: int = 1_000", "window: int = 100"),
        ("patience: int = 10", "patience: int = 2"),
        ("min_improvement: float = 1e-3", "min_improvement: float = 1e-2"),
        ("halvings: int = 5", "halvings: int = 4"),
    ]),
    ("dalle_jax/train/ema.py", "train/test_step.py -k average", [
        ("step % self.every == 0", "step % self.every == 1"),
        ("self.decay * jnp.expm1((moves - 1) * log) / jnp.expm1(moves * log)", "self.decay"),
        ("decay * old + (1.0 - decay) * new", "(1.0 - decay) * old + decay * new"),
    ]),
    ("configs/transformer.py", PAPER, [
        ("bpe_dropout=0.1,\n            **", "bpe_dropout=0.3,\n            **"),
        ("**PAPER_FILTERS", "max_aspect_ratio=2.0"),
        ('augment="transformer",\n            bpe', 'augment="dvae",\n            bpe'),
        ("batch_size=1_024", "batch_size=512"),
        ("learning_rate=4.5e-4", "learning_rate=3e-4"),
        ("b2=0.96,\n            weight_decay=4.5e-2,\n            clip_norm=4.0",
         "b2=0.95,\n            weight_decay=4.5e-2,\n            clip_norm=4.0"),
        ("weight_decay=4.5e-2,\n            clip_norm=4.0", "weight_decay=1e-2,\n            clip_norm=4.0"),
        ("clip_norm=4.0", "clip_norm=1.0"),
        ("warmup_steps=5_000", "warmup_steps=3_000"),
        ('name="plateau"', 'name="warmup_constant"'),
        ("Ema(decay=0.99, every=25)", "Ema(decay=0.999, every=25)"),
        ("ema=Ema(decay=0.99, every=25)", "ema=Ema(decay=0.99, every=1)"),
        ("steps=430_000", "steps=400_000"),
        ("image_size=256", "image_size=128"),
        ("rank=896", "rank=512"),
        ('precision="fp16-paper"', 'precision="bf16"'),
        ('moments="paper"', 'moments="bf16"'),
        ("MeshSizes(replica=128, fsdp=8)", "MeshSizes(replica=64, fsdp=16)"),
        ("width=2_688, heads=42", "width=2_560, heads=40"),
        ("width=1_920, heads=30", "width=2_048, heads=32"),
    ]),
    ("dalle_jax/data/transforms.py", "data/test_transforms.py", [
        ("DVAE_SHORTEST, DVAE_LONGEST = Fraction(9, 8), Fraction(12, 8)",
         "DVAE_SHORTEST, DVAE_LONGEST = Fraction(8, 8), Fraction(12, 8)"),
        ("Fraction(9, 8), Fraction(12, 8)", "Fraction(9, 8), Fraction(11, 8)"),
        ("TRANSFORMER_LONGEST = Fraction(9, 8)", "TRANSFORMER_LONGEST = Fraction(10, 8)"),
        ("low=Fraction(3, 8), high=Fraction(5, 8)", "low=Fraction(2, 8), high=Fraction(5, 8)"),
        ("high=Fraction(5, 8), end_included=False", "high=Fraction(6, 8), end_included=False"),
        ("if rng.random() < 0.5 else crop", "if rng.random() < 0.1 else crop"),
        ("(length - 1) / (side - 1)", "length / side"),
        ("round(ratio * height), round(ratio * width)", "int(ratio * height), int(ratio * width)"),
        ("round((length - size) / 2)", "math.ceil((length - size) / 2)"),
    ]),
    ("dalle_jax/train/optimizer/moments.py", "train/test_formats.py -k second_moment", [
        ("MAX_NU = 5.0", "MAX_NU = 50.0"),
    ]),
    ("dalle_jax/train/optimizer/formats.py", "train/test_formats.py -k 'every_code_is or outside'", [
        ("EXPONENT_BITS, BIAS = 6, 59", "EXPONENT_BITS, BIAS = 6, 60"),
        ("significand=9, signed=True", "significand=10, signed=True"),
        ("significand=10, signed=False", "significand=9, signed=False"),
    ]),
    ("dalle_jax/train/optimizer/loss_scale.py", PRECISION, [
        ("replicas * 2.0**13", "replicas * 2.0**10"),
        ("replicas * 2.0**7", "replicas * 2.0**6"),
        ("replicas * 2.0**24", "replicas * 2.0**20"),
        ("start=replicas * ", "start="),
        ("2.0 ** (1 / 1_000)", "2.0 ** (1 / 2_000)"),
        ("backoff=2.0**-0.5", "backoff=0.5"),
        ("hold=125", "hold=100"),
    ]),
    ("dalle_jax/models/scaled.py", "train/test_precision.py -k 'overflow_moves or a_scale_a_branch'", [
        ("jnp.where(jnp.isfinite(cotangent), cotangent, 0) if zero_overflow else cotangent", "cotangent"),
        ("(cotangent * scale).astype", "cotangent.astype"),
    ]),
    ("dalle_jax/models/layers.py", PRECISION, [
        ('jnp.float32 if keeps_stream(precision) else compute_dtype(precision)', "compute_dtype(precision)"),
    ]),
    ("dalle_jax/train/optimizer/powersgd.py",
     "train/test_powersgd.py -k 'diagonal or drawn_once or full_rank or add_up or formats or ranks'", [
        ("EPSILON = 1e-6", "EPSILON = 1e-1"),
        ("jax.random.key(KEY)", "key"),
        ('p += EPSILON * jnp.eye(rows, pieces.rank)[None]', "pass"),
        ("formats.encode(x, formats.FIRST, key)", "formats.encode(x, formats.SECOND, key)"),
        ("jnp.linalg.qr(p)[0]", "p"),
        ("count, compression.rank // count)", "count, compression.rank)"),
    ]),
    ("dalle_jax/train/optimizer/matrices.py", "train/test_powersgd.py -k ranks", [
        ('TABLES = ("vocab", "image_input", "position")', 'TABLES = ("vocab", "position")'),
    ]),
    ("dalle_jax/sample/autoregressive.py", PAPER, [('"temperature", float, 1.0', '"temperature", float, 0.9')]),
    ("dalle_jax/evaluate/fidelity.py", "evaluate/test_fidelity.py", [
        ("PEAK = 255", "PEAK = 256"),
        ("WINDOW, DEVIATION = 11, 1.5", "WINDOW, DEVIATION = 9, 1.5"),
        ("WINDOW, DEVIATION = 11, 1.5", "WINDOW, DEVIATION = 11, 1.6"),
        ("K_1, K_2 = 0.01, 0.03", "K_1, K_2 = 0.03, 0.03"),
        ("K_1, K_2 = 0.01, 0.03", "K_1, K_2 = 0.01, 0.01"),
    ]),
    ("configs/evaluate.py", PAPER, [
        ("BEST_OF = 512", "BEST_OF = 256"),
        ("COCO_PICTURES = 40_504", "COCO_PICTURES = 40_000"),
        ("count=30_000", "count=10_000"),
        ("RADII = (0.0, 1.0, 2.0, 4.0, 8.0)", "RADII = (0.0, 1.0, 2.0, 3.0, 8.0)"),
        ("SIDE = 256", "SIDE = 299"),
    ]),
    ("dalle_jax/models/clip.py", "test_paper.py models/test_clip.py -k 'clips or released or initial'", [
        ("math.log(1 / 0.07)", "math.log(1 / 0.1)"),
        ("math.log(100.0)", "math.log(50.0)"),
        ("0.48145466", "0.5"),
        ("0.26862954", "0.25"),
        ("text_len: int = 77", "text_len: int = 76"),
        ("text_vocab: int = 49_406", "text_vocab: int = 49_152"),
        ("embed: int = 512", "embed: int = 768"),
        ("image_size: int = 224", "image_size: int = 256"),
        ("patch: int = 32", "patch: int = 16"),
        ("image_layers: int = 12", "image_layers: int = 10"),
        ("image_width: int = 768", "image_width: int = 512"),
        ("image_heads: int = 12", "image_heads: int = 8"),
        ("text_layers: int = 12", "text_layers: int = 10"),
        ("text_width: int = 512", "text_width: int = 768"),
        ("text_heads: int = 8", "text_heads: int = 4"),
        ('"embed"), std=0.02)', '"embed"), std=0.04)'),
        ('"embed"), std=0.01)', '"embed"), std=0.02)'),
        ('"qkv": width**-0.5', '"qkv": 3 * width**-0.5'),
        ("(6 / (4 * width)) ** 0.5", "width**-0.5"),
        ('"up_bias": by_width', '"up_bias": 0.0'),
        ("bound=inputs**-0.5", "std=(3 * inputs) ** -0.5"),
        ("out = (2 * width * config.text_layers) ** -0.5", "out = width**-0.5"),
        ("(6 / (4 * width)) ** 0.5", "(6 / (2 * width)) ** 0.5"),
        ("by_width, by_hidden = width**-0.5, (4 * width) ** -0.5", "by_width, by_hidden = width**-0.5, width**-0.5"),
        ('"up": (2 * width) ** -0.5', '"up": width**-0.5'),
    ]),
    ("configs/clip.py", PAPER, [
        ("batch_size=32_768", "batch_size=16_384"),
        ("b2=0.98", "b2=0.999"),
        ("eps=1e-6", "eps=1e-8"),
        ("weight_decay=0.2", "weight_decay=0.02"),
        ("warmup_steps=2_000", "warmup_steps=200"),
        ("learning_rate: float = 5e-4", "learning_rate: float = 1e-3"),
        ("learning_rate=4e-4", "learning_rate=5e-4"),
        ("steps=390_625", "steps=300_000"),
        ("image_size=224", "image_size=256"),
        ("_paper(patch=16)", "_paper(patch=8)"),
        ("embed=768", "embed=512"),
        ("patch=14", "patch=16"),
        ("image_layers=24", "image_layers=12"),
        ("image_width=1_024", "image_width=768"),
        ("image_heads=16,\n        text_width=768", "image_heads=8,\n        text_width=768"),
        ("text_width=768", "text_width=512"),
        ("text_heads=12", "text_heads=8"),
        ("decay_tables=True,  #", "decay_tables=False,  #"),
    ]),
    ("dalle_jax/cli/tokenizer.py", PAPER, [("default=16_384", "default=8_192")]),
    *vq_mutations.ROWS,
    *diffusion_mutations.ROWS,
]  # fmt: skip


def main(words: list[str]) -> int:
    rows = [
        (file, tests, old, new)
        for file, tests, pairs in MUTATIONS
        for old, new in pairs
        if not words or any(word in f"{file} {old}" for word in words)
    ]
    unfit = misfits(rows)
    say(*(f"expected exactly once in {file}: {old}" for file, old in unfit))
    with tempfile.TemporaryDirectory() as folder, concurrent.futures.ThreadPoolExecutor(WORKERS) as pool:
        copies: queue.SimpleQueue[pathlib.Path] = queue.SimpleQueue()
        for number in range(WORKERS):
            copies.put(copied(pathlib.Path(folder) / str(number)))

        def passes(tests: str, *change: str) -> bool:
            tree = copies.get()
            try:
                return run(tree, tests, *change)
            finally:
                copies.put(tree)

        every = sorted({tests for _, tests, _, _ in rows})
        broken = [tests for tests, good in zip(every, pool.map(passes, every), strict=True) if not good]
        say(*(f"fails on the tree as it is: {tests}" for tests in broken))
        rows = [row for row in rows if row[1] not in broken and (row[0], row[2]) not in unfit]
        survivors = 0
        for row, survived in zip(rows, pool.map(lambda row: passes(row[1], row[0], *row[2:]), rows), strict=True):
            file, tests, old, new = row
            survivors += survived
            say(*[f"survives {tests}: {file}: {old} -> {new}"] * survived)
    say(f"{len(rows)} changes of {len({file for file, *_ in rows})} files, {survivors} survivors")
    return int(bool(unfit or broken or survivors))


def misfits(rows) -> list[tuple[str, str]]:
    """File and text of each row whose text does not stand exactly once in its file."""
    return [(file, old) for file, _, old, _ in rows if (ROOT / file).read_text().count(old) != 1]


def say(*lines: str) -> None:
    for line in lines:
        print(line, flush=True)


def copied(tree: pathlib.Path) -> pathlib.Path:
    """A copy of what git knows of the tree."""
    names = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    for name in filter(None, names.split("\0")):
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, tree / name, follow_symlinks=False)
    return tree


def run(tree: pathlib.Path, tests: str, file: str = "", old: str = "", new: str = "") -> bool:
    """Whether the tests pass in the copy, with a text of a file changed."""
    before = (tree / file).read_text() if file else ""
    words = [f"tests/{word}" if word.endswith(".py") else word for word in shlex.split(tests)]
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-n", "0", "-p", "no:cacheprovider", *words]
    try:
        if file:
            (tree / file).write_text(before.replace(old, new))
        environment = os.environ | {"PYTHONDONTWRITEBYTECODE": "1", "PYTHONPATH": str(tree)}
        return not subprocess.run(command, cwd=tree, env=environment, capture_output=True).returncode
    finally:
        if file:
            (tree / file).write_text(before)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
