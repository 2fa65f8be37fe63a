"""The paper's 16-bit floating-point formats, packed in uint16 (Ramesh et al. 2021, section 2.4, appendix E).

    1-6-9     sign, 6 bits of exponent, 9 of significand: first moments, and what PowerSGD keeps and sends
    0-6-10    no sign, 6 bits of exponent, 10 of significand: second moments, which are never negative

What the paper leaves open is chosen here as in IEEE 754. The largest exponent code means infinity (significand 0) or
NaN, the smallest one zero and subnormal numbers, whose spacing is that of the smallest normal ones. The exponent's
bias is 59, from the only figure the paper gives, a largest value slightly below 16:

    1-6-9     largest 15.984, smallest normal 2^-58, smallest 2^-67, neighbors 0.10 to 0.20 % apart
    0-6-10    largest 15.992, smallest normal 2^-58, smallest 2^-68, neighbors 0.05 to 0.10 % apart

That suits second moments too: they are clipped at 5, and below 1e-16 = 2^-53 Adam's epsilon of 1e-8 outweighs their
root. Numbers beyond the largest become the largest; only an infinity is an infinity. In 0-6-10 negative numbers are 0.
"""

import dataclasses

import jax
import jax.numpy as jnp

EXPONENT_BITS, BIAS = 6, 59
_EXPONENTS = 2**EXPONENT_BITS - 1  # the code of infinities and NaN


@dataclasses.dataclass(frozen=True)
class Format:
    """A 16-bit format. significand: bits stored of it. signed: is the highest bit a sign?"""

    name: str
    significand: int
    signed: bool

    @property
    def infinity(self) -> int:
        """The code of +infinity; the largest finite number is the one below."""
        return _EXPONENTS << self.significand

    @property
    def smallest(self) -> float:
        return 2.0 ** (1 - BIAS - self.significand)


FIRST = Format("1-6-9", significand=9, signed=True)
SECOND = Format("0-6-10", significand=10, signed=False)


def encode(x, form: Format, key=None):
    """float32 -> uint16 codes of the same shape.

    key: None rounds to the nearest, ties to even. A jax.random.key rounds to the number below or above with the
      probabilities that make the mean x (for numbers that are neither exact nor beyond the largest).
    """
    bits = jax.lax.bitcast_convert_type(x.astype(jnp.float32), jnp.uint32)
    magnitude = bits & jnp.uint32(0x7FFFFFFF)
    exponent = (magnitude >> 23).astype(jnp.int32)
    lowest = 128 - BIAS  # float32's exponent code of the smallest normal number
    # The significand as an integer of 24 bits; float32's own subnormal numbers are far below half the smallest.
    digits = jnp.where(exponent > 0, (magnitude & 0x7FFFFF) | 0x800000, 0).astype(jnp.uint32)
    drop = 23 - form.significand + jnp.maximum(lowest - exponent, 0)  # bits that are cut off
    digits = digits >> jnp.clip(drop - 31, 0, 31).astype(jnp.uint32)
    drop = jnp.minimum(drop, 31).astype(jnp.uint32)
    one = jnp.uint32(1)
    if key is None:
        up = (one << (drop - 1)) - 1 + ((digits >> drop) & 1)
    else:
        up = jax.random.bits(key, x.shape, jnp.uint32) & ((one << drop) - 1)
    code = ((digits + up) >> drop) + (jnp.maximum(exponent - lowest, 0).astype(jnp.uint32) << form.significand)
    code = jnp.minimum(code, form.infinity - 1)
    code = jnp.where(magnitude == 0x7F800000, form.infinity, code)
    code = jnp.where(magnitude > 0x7F800000, form.infinity + 2 ** (form.significand - 1), code)
    negative = bits >> 31
    if form.signed:
        code = code | (negative << 15)
    else:
        code = jnp.where((negative == 1) & (magnitude <= 0x7F800000), 0, code)
    return code.astype(jnp.uint16)


def decode(code, form: Format):
    """uint16 codes -> float32, exactly."""
    code = code.astype(jnp.uint32)
    exponent = (code >> form.significand) & _EXPONENTS
    digits = code & (2**form.significand - 1)
    normal = ((exponent + (127 - BIAS)) << 23) | (digits << (23 - form.significand))
    special = jnp.uint32(0x7F800000) | (digits << (23 - form.significand))
    wide = jax.lax.bitcast_convert_type(jnp.where(exponent == _EXPONENTS, special, normal), jnp.float32)
    wide = jnp.where(exponent == 0, digits.astype(jnp.float32) * form.smallest, wide)
    return jnp.where((code >> 15) == 1, -wide, wide) if form.signed else wide
