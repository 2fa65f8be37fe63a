"""`dalle-jax convert`: published weights as a model directory of this package."""

import argparse
import dataclasses
import pathlib
from typing import Any

import jax

from dalle_jax import model_dir
from dalle_jax.checkpoint import digest
from dalle_jax.convert import clip, inception, lpips, openai_dvae, vqgan, weights
from dalle_jax.errors import UserError, check_number
from dalle_jax.models import Params
from dalle_jax.text.clip import MERGES, VOCAB

MAX_IMAGE_SIZE = 65_536  # pixels
Converted = tuple[str, Any, Params, str]  # name of the model, its sizes as a dataclass, parameters, a line for people


def add_arguments(parser: argparse.ArgumentParser) -> None:
    families = parser.add_subparsers(metavar="FAMILY", required=True)
    dvae = _family(families, "openai-dvae", "the released dVAE of OpenAI", convert_dvae)
    dvae.add_argument("--encoder", required=True, metavar="FILE", help="state dict of the encoder")
    dvae.add_argument("--decoder", required=True, metavar="FILE", help="state dict of the decoder")
    _add_image_size(dvae)
    dvae.add_argument(
        "--allow-pickle",
        action="store_true",
        help="also read whole pickled modules (default: no); such a file can run any code, so trust its origin",
    )
    hf_clip = _family(families, "hf-clip", "a CLIP of OpenAI or Hugging Face", convert_clip)
    hf_clip.add_argument("weights", metavar="FILE_OR_DIR", help=f"a file, or a folder with {weights.FILES[0]}")
    hf_clip.add_argument(
        "--tokenizer",
        metavar="PATH",
        help=f"bpe_simple_vocab_16e6.txt.gz, or a folder with {VOCAB} and {MERGES} (default: beside the weights)",
    )
    network = _family(families, "inception", "the network of FID, IS and KID", convert_inception)
    network.add_argument("weights", metavar="FILE", help=f"{inception.PUBLISHED}; or the same arrays as .safetensors")
    perceptual = _family(families, "lpips", "the perceptual distance LPIPS with VGG16", convert_lpips)
    perceptual.add_argument(
        "weights",
        metavar="VGG",
        help=f"{lpips.PUBLISHED}, or a state dict of all of LPIPS; or the same as .safetensors",
    )
    perceptual.add_argument(
        "linear", metavar="LIN", nargs="?", help=f"its linear weights, {lpips.LINEAR} (default: they are in VGG)"
    )
    for name, summary, convert in (
        (
            "taming",
            "a VQGAN of taming-transformers, or one with its names (minDALL-E, latent-diffusion)",
            convert_taming,
        ),
        ("llamagen-vq", "the image tokenizer of LlamaGen", convert_llamagen_vq),
    ):
        tokenizer = _family(families, name, summary, convert)
        tokenizer.add_argument("weights", metavar="FILE", help="its checkpoint or state dict; or a .safetensors file")
        _add_image_size(tokenizer)


def _add_image_size(family: argparse.ArgumentParser) -> None:
    family.add_argument("--image-size", type=int, default=256, help="pixels per side it is used at (default: 256)")


def _family(families, name: str, summary: str, convert) -> argparse.ArgumentParser:
    summary = f"{summary} as a model directory"
    parser = families.add_parser(name, help=summary, description=summary, allow_abbrev=False)
    parser.add_argument("--out", required=True, metavar="DIR", help="where the model directory is written")
    parser.set_defaults(convert=convert)
    return parser


def main(args: argparse.Namespace) -> int:
    """Writes the model directory and says what is in it.

    Raises:
      UserError: weights that cannot be read or are of another model, or an --out that is not empty.
    """
    out = pathlib.Path(args.out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"expected --out to be a new or empty directory, got {out}: choose another")
    name, config, params, summary = args.convert(args)
    model_dir.save(out, {"name": name, "model": dataclasses.asdict(config)}, params)
    print(summary)
    print(f"written to {out}")
    return 0


def convert_dvae(args: argparse.Namespace) -> Converted:
    check_number("--image-size", args.image_size, min=1, max=MAX_IMAGE_SIZE, whole=True)
    encoder, decoder = (weights.read(path, allow_pickle=args.allow_pickle) for path in (args.encoder, args.decoder))
    config, params = openai_dvae.convert(encoder, decoder, image_size=args.image_size)
    summary = f"{_count(params)} parameters, {config.vocab} codes, {config.grid} x {config.grid} grid"
    return "dvae", config, params, summary


def convert_taming(args: argparse.Namespace) -> Converted:
    return _convert_vqgan(args, "taming")


def convert_llamagen_vq(args: argparse.Namespace) -> Converted:
    return _convert_vqgan(args, "llamagen")


def _convert_vqgan(args: argparse.Namespace, layout: str) -> Converted:
    check_number("--image-size", args.image_size, min=1, max=MAX_IMAGE_SIZE, whole=True)
    config, params = vqgan.convert(weights.read(args.weights), layout, image_size=args.image_size)
    codes = f"{config.vocab} {config.quantizer} codes of {config.code_dim}"
    return "vq", config, params, f"{_count(params)} parameters, {codes}, {config.grid} x {config.grid} grid"


def convert_clip(args: argparse.Namespace) -> Converted:
    config, params, tokenizer = clip.load_published(args.weights, tokenizer=args.tokenizer)
    tokenizer.save(args.out)
    images = f"images of {config.image_size} pixels in patches of {config.patch}"
    return "clip", config, params, f"{_count(params)} parameters, {images}, vectors of {config.embed}"


def convert_inception(args: argparse.Namespace) -> Converted:
    config, params = inception.load_published(args.weights)
    summary = f"{config.pools} network, {config.classes} classes, sha256 of its parameters {digest.of_tree(params)}"
    return "inception", config, params, summary


def convert_lpips(args: argparse.Namespace) -> Converted:
    config, params = lpips.load_published(args.weights, args.linear)
    return "lpips", config, params, f"{_count(params)} parameters, sha256 {digest.of_tree(params)}"


def _count(params: Params) -> str:
    return f"{sum(leaf.size for leaf in jax.tree.leaves(params)):,}"
