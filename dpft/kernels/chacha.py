"""The keystream of ChaCha20 (RFC 8439) in Triton: one program computes a run of blocks, all in registers."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK_BYTES = 64
_LANES = 128  # blocks of one program


@triton.jit
def _rotated(x: tl.tensor, left: tl.constexpr) -> tl.tensor:
    return (x << left) | (x >> (32 - left))


@triton.jit
def _quarter(
    a: tl.tensor, b: tl.tensor, c: tl.tensor, d: tl.tensor
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor]:
    """RFC 8439, 2.1, on uint32."""
    a += b
    d = _rotated(d ^ a, 16)
    c += d
    b = _rotated(b ^ c, 12)
    a += b
    d = _rotated(d ^ a, 8)
    c += d
    b = _rotated(b ^ c, 7)
    return a, b, c, d


@triton.jit
def _chacha20(start, out, blocks, LANES: tl.constexpr):  # type: ignore[no-untyped-def]  # Triton's arguments
    """Blocks ``counter`` to ``counter + blocks`` of the state ``start [16]`` to ``out [blocks, 16]``, int32."""
    number = tl.program_id(0) * LANES + tl.arange(0, LANES)
    zero = tl.zeros([LANES], tl.uint32)
    s0 = zero + tl.load(start + 0).to(tl.uint32, bitcast=True)
    s1 = zero + tl.load(start + 1).to(tl.uint32, bitcast=True)
    s2 = zero + tl.load(start + 2).to(tl.uint32, bitcast=True)
    s3 = zero + tl.load(start + 3).to(tl.uint32, bitcast=True)
    s4 = zero + tl.load(start + 4).to(tl.uint32, bitcast=True)
    s5 = zero + tl.load(start + 5).to(tl.uint32, bitcast=True)
    s6 = zero + tl.load(start + 6).to(tl.uint32, bitcast=True)
    s7 = zero + tl.load(start + 7).to(tl.uint32, bitcast=True)
    s8 = zero + tl.load(start + 8).to(tl.uint32, bitcast=True)
    s9 = zero + tl.load(start + 9).to(tl.uint32, bitcast=True)
    s10 = zero + tl.load(start + 10).to(tl.uint32, bitcast=True)
    s11 = zero + tl.load(start + 11).to(tl.uint32, bitcast=True)
    s12 = zero + tl.load(start + 12).to(tl.uint32, bitcast=True) + number.to(tl.uint32)
    s13 = zero + tl.load(start + 13).to(tl.uint32, bitcast=True)
    s14 = zero + tl.load(start + 14).to(tl.uint32, bitcast=True)
    s15 = zero + tl.load(start + 15).to(tl.uint32, bitcast=True)
    x0, x1, x2, x3, x4, x5, x6, x7 = s0, s1, s2, s3, s4, s5, s6, s7
    x8, x9, x10, x11, x12, x13, x14, x15 = s8, s9, s10, s11, s12, s13, s14, s15
    for _ in range(10):
        x0, x4, x8, x12 = _quarter(x0, x4, x8, x12)
        x1, x5, x9, x13 = _quarter(x1, x5, x9, x13)
        x2, x6, x10, x14 = _quarter(x2, x6, x10, x14)
        x3, x7, x11, x15 = _quarter(x3, x7, x11, x15)
        x0, x5, x10, x15 = _quarter(x0, x5, x10, x15)
        x1, x6, x11, x12 = _quarter(x1, x6, x11, x12)
        x2, x7, x8, x13 = _quarter(x2, x7, x8, x13)
        x3, x4, x9, x14 = _quarter(x3, x4, x9, x14)
    to, inside = out + number.to(tl.int64) * 16, number < blocks
    tl.store(to + 0, (x0 + s0).to(tl.int32, bitcast=True), mask=inside)
    tl.store(to + 1, (x1 + s1).to(tl.int32, bitcast=True), mask=inside)
    tl.store(to + 2, (x2 + s2).to(tl.int32, bitcast=True), mask=inside)
    tl.store(to + 3, (x3 + s3).to(tl.int32, bitcast=True), mask=inside)
    tl.store(to + 4, (x4 + s4).to(tl.int32, bitcast=True), mask=inside)
    tl.store(to + 5, (x5 + s5).to(tl.int32, bitcast=True), mask=inside)
    tl.store(to + 6, (x6 + s6).to(tl.int32, bitcast=True), mask=inside)
    tl.store(to + 7, (x7 + s7).to(tl.int32, bitcast=True), mask=inside)
    tl.store(to + 8, (x8 + s8).to(tl.int32, bitcast=True), mask=inside)
    tl.store(to + 9, (x9 + s9).to(tl.int32, bitcast=True), mask=inside)
    tl.store(to + 10, (x10 + s10).to(tl.int32, bitcast=True), mask=inside)
    tl.store(to + 11, (x11 + s11).to(tl.int32, bitcast=True), mask=inside)
    tl.store(to + 12, (x12 + s12).to(tl.int32, bitcast=True), mask=inside)
    tl.store(to + 13, (x13 + s13).to(tl.int32, bitcast=True), mask=inside)
    tl.store(to + 14, (x14 + s14).to(tl.int32, bitcast=True), mask=inside)
    tl.store(to + 15, (x15 + s15).to(tl.int32, bitcast=True), mask=inside)


def chacha20(key: bytes, nonce: bytes, blocks: int, device: torch.device, counter: int = 0) -> Tensor:
    """``[16 blocks]`` int32, little-endian: the keystream of ``blocks`` blocks from number ``counter`` on.

    Args:
        key: 32 bytes.
        nonce: 12 bytes.
        blocks: ``counter + blocks`` is at most 2^32: the counter has 32 bits.
        device: a CUDA device, or the CPU in Triton's interpreter.
        counter: number of the first block.
    """
    state = b"expand 32-byte k" + key + counter.to_bytes(4, "little") + nonce
    start = torch.frombuffer(bytearray(state), dtype=torch.int32).to(device)
    out = torch.empty(blocks * 16, dtype=torch.int32, device=device)
    if blocks:
        _chacha20[(triton.cdiv(blocks, _LANES),)](start, out, blocks, LANES=_LANES)
    return out
