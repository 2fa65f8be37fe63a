"""`python -m dalle_jax.cli` is the `dalle-jax` command."""

from dalle_jax.cli.main import command

command()
