"""ChaCha20 in Triton: RFC 8439's vectors, and OpenSSL's keystream. Compiled where there is a GPU, else interpreted."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import Any
from unittest import mock

import pytest
import torch
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms

pytest.importorskip("triton", reason="triton is not installed: dpft[triton]")

pytestmark = pytest.mark.slow
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
COUNTED = bytes(range(32))
NONCE = bytes.fromhex("000000090000004a00000000")


@pytest.fixture(scope="module")
def run() -> Iterator[Callable[..., Any]]:
    """Calls a function with arguments: here on a GPU, else in a process whose Triton interprets."""
    if DEVICE == "cuda":
        yield lambda function, *args: function(*args)
        return
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        with mock.patch.dict(os.environ, {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}):
            pool.submit(int).result()
        yield lambda function, *args: pool.submit(function, *args).result()


def stream(key: bytes, nonce: bytes, blocks: int, counter: int) -> bytes:
    from dpft.kernels.chacha import chacha20

    return chacha20(key, nonce, blocks, torch.device(DEVICE), counter).cpu().numpy().tobytes()


def test_vector_of_the_rfc(run: Callable[..., Any]) -> None:
    """Section 2.3.2."""
    assert run(stream, COUNTED, NONCE, 1, 1).hex() == (
        "10f1e7e4d13b5915500fdd1fa32071c4c7d1f4c733c068030422aa9ac3d46c4e"
        "d2826446079faa0914c2d705d98b02a2b5129cd1de164eb9cbd083e8a2503c4e"
    )


@pytest.mark.parametrize("blocks", [0, 1, 127, 129, 300])
def test_is_the_keystream_of_openssl(blocks: int, run: Callable[..., Any]) -> None:
    cipher = Cipher(algorithms.ChaCha20(COUNTED[::-1], (7).to_bytes(4, "little") + NONCE), mode=None)
    assert run(stream, COUNTED[::-1], NONCE, blocks, 7) == cipher.encryptor().update(bytes(64 * blocks))
