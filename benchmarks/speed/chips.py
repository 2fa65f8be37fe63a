"""The data sheet of the device that is here."""

import jax

from dalle_jax.preflight.hardware import CHIPS, Chip, find_chip

# Marks in a device's kind -> our name of the chip, the first that fits.
KINDS = (
    ("h200", "h200"), ("h100", "h100"), ("a100-sxm4-80", "a100-80"), ("a100 80", "a100-80"), ("a100", "a100-40"),
    ("v100-sxm2-32", "v100-32"), ("v100", "v100-16"), ("tpu v6", "v6e"), ("tpu v5 lite", "v5e"), ("tpu v5", "v5p"),
    ("tpu v4", "v4"),
)  # fmt: skip


def of_device(device: jax.Device) -> Chip | None:
    """The chip's figures; None for a CPU or an unknown one."""
    kind = device.device_kind.lower()
    name = next((name for mark, name in KINDS if mark in kind), None)
    return next((chips[name] for chips in CHIPS.values() if name in chips), None)


def named_or_found(named: str | None, device: jax.Device) -> Chip:
    """The figures of the chip that is named, e.g. gpu:h200, else of the device.

    Raises:
      UserError: an unknown name; SystemExit: a device that is in no table and was not named.
    """
    chip = find_chip(*named.partition(":")[::2]) if named else of_device(device)
    if chip is None:
        raise SystemExit(f"no figures for {device.device_kind!r}: name the chip that is most like it, --chip gpu:h200")
    return chip
