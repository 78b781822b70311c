"""Stateless random numbers: each is a hash of its keys, such as (seed, epoch, index, stream).

No generator is advanced, so a run depends neither on the number of workers, nor on the device, nor on where it was
interrupted.
"""

from __future__ import annotations

import torch
from torch import Tensor

_MASK = (1 << 64) - 1
_GAMMA = 0x9E3779B97F4A7C15
_FACTOR_1 = 0xBF58476D1CE4E5B9
_FACTOR_2 = 0x94D049BB133111EB


def _signed(value: int) -> int:
    """Return the int64 with the same 64 bits as the unsigned ``value``."""
    return value - (1 << 64) if value >> 63 else value


def _shift(x: Tensor, bits: int) -> Tensor:
    """Shift int64 to the right logically; torch's own shift repeats the sign bit."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def mix(*keys: int) -> int:
    """Hash integers to a 63-bit seed (SplitMix64, one round per key).

    Args:
        keys: Integers, such as seed, epoch and index; their order matters.

    Examples:
        >>> mix(0, 1, 2) == mix(0, 1, 2), mix(0, 1, 2) == mix(0, 2, 1), mix(0) == mix(0, 0)
        (True, False, False)
    """
    state = 0
    for key in keys:
        state = ((state + _GAMMA) ^ (key & _MASK)) & _MASK
        state = ((state ^ (state >> 30)) * _FACTOR_1) & _MASK
        state = ((state ^ (state >> 27)) * _FACTOR_2) & _MASK
        state ^= state >> 31
    return state >> 1


def seed_device(seed: int, device: torch.device) -> None:
    """Seed torch's own generators of the CPU and of one device.

    ``torch.manual_seed`` seeds all devices, and records a stack trace, which takes 2 ms, for each that is unused.

    Args:
        seed: Seed, as `mix` returns it.
        device: Device of the networks.
    """
    if device.type not in ("cpu", "cuda"):
        torch.manual_seed(seed)
        return
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)


def image_keys(index: Tensor) -> Tensor:
    """Return a key for every image of a batch: its position in the training set, or else its place in the batch.

    Args:
        index: Positions in the training set, ``B`` int64, -1 where unknown.

    Examples:
        >>> image_keys(torch.tensor([7, -1, -1])).tolist()
        [7, 1, 2]
    """
    return torch.where(index < 0, torch.arange(len(index), device=index.device), index)


def stateless_bits(*keys: int | Tensor) -> Tensor:
    """Hash the keys of each sample: `mix` for tensors, with the same bits on every device.

    Args:
        keys: Integers and ``B`` int64 tensors, such as seed, epoch, index, stream; at least one tensor.

    Returns:
        ``B`` int64 in ``[0, 2^63)``.
    """
    like = next(key for key in keys if isinstance(key, Tensor))
    state = torch.zeros_like(like, dtype=torch.int64)
    for key in keys:
        state = (state + _signed(_GAMMA)) ^ (key if isinstance(key, Tensor) else _signed(key & _MASK))
        state = (state ^ _shift(state, 30)) * _signed(_FACTOR_1)
        state = (state ^ _shift(state, 27)) * _signed(_FACTOR_2)
        state = state ^ _shift(state, 31)
    return _shift(state, 1)


def stateless_integers(high: int, *keys: int | Tensor) -> Tensor:
    """Return ``B`` int64 in ``[0, high)`` that depend only on the keys.

    Args:
        high: Upper bound, itself excluded.
        keys: Integers and ``B`` int64 tensors, as for `stateless_bits`.
    """
    return stateless_bits(*keys) % high


def stateless_uniform(*keys: int | Tensor) -> Tensor:
    """Return ``B`` float32 in ``[0, 1)`` with 24 random bits that depend only on the keys.

    Args:
        keys: Integers and ``B`` int64 tensors, as for `stateless_bits`.
    """
    return (stateless_bits(*keys) >> 39).to(torch.float32) * 2.0**-24
