"""Every type of block against its definition, read byte by byte. Source: ggml, src/ggml-common.h and ggml-quants.c.

The blocks are random bytes with sane scales, so every bit of a block matters; the K types cannot be written otherwise.
"""

import pathlib
import struct
import tracemalloc

import gguf as package
import numpy as np
import pytest
import torch
from gguf.constants import GGML_QUANT_SIZES
from transformers.integrations.gguf.dequant import dequantize

from kardia_jax.hf import gguf, gguf_file
from kardia_jax.hf.tables import HfError

F = np.float32
SCALES = {
    "Q4_0": (0,),
    "Q4_1": (0, 2),
    "Q5_0": (0,),
    "Q5_1": (0, 2),
    "Q8_0": (0,),
    "Q2_K": (80, 82),
    "Q3_K": (108,),
    "Q4_K": (0, 2),
    "Q5_K": (0, 2),
    "Q6_K": (208,),
}
"""Where the float16 scales of a block stand; everything else may be any bytes."""


def half(block, at):
    return F(struct.unpack_from("<e", block, at)[0])


def signed(byte):
    return byte - 256 if byte > 127 else byte


def nibbles(packed):
    """Low halves of all bytes, then high halves."""
    return [byte & 15 for byte in packed] + [byte >> 4 for byte in packed]


def q4_0(block):
    return [half(block, 0) * F(q - 8) for q in nibbles(block[2:18])]


def q4_1(block):
    return [half(block, 0) * F(q) + half(block, 2) for q in nibbles(block[4:20])]


def q5_0(block):
    (fifth,) = struct.unpack_from("<I", block, 2)
    return [half(block, 0) * F((q | (fifth >> i & 1) << 4) - 16) for i, q in enumerate(nibbles(block[6:22]))]


def q5_1(block):
    (fifth,) = struct.unpack_from("<I", block, 4)
    quants = [q | (fifth >> i & 1) << 4 for i, q in enumerate(nibbles(block[8:24]))]
    return [half(block, 0) * F(q) + half(block, 2) for q in quants]


def q8_0(block):
    return [half(block, 0) * F(signed(byte)) for byte in block[2:34]]


def q2_k(block):
    """16 groups of 16; a byte of each group holds four bits of scale and four of minimum."""
    d, least, out = half(block, 80), half(block, 82), []
    for at in range(256):
        group, byte, shift = at // 16, 16 + at // 128 * 32 + at % 32, at % 128 // 32 * 2
        scale, minimum = block[group] & 15, block[group] >> 4
        out.append(d * F(scale) * F(block[byte] >> shift & 3) - least * F(minimum))
    return out


def q3_k(block):
    """16 groups of 16; the third bit is a mask whose absence takes 4 away; scales of six bits in 12 bytes."""
    d, out = half(block, 108), []
    for at in range(256):
        group, byte, shift = at // 16, 32 + at // 128 * 32 + at % 32, at % 128 // 32 * 2
        low = block[96 + group % 8] >> group // 8 * 4 & 15
        high = block[104 + group % 4] >> group // 4 * 2 & 3
        borrow = 0 if block[at % 32] >> at // 32 & 1 else 4
        out.append(d * F((low | high << 4) - 32) * F((block[byte] >> shift & 3) - borrow))
    return out


def k_scale(packed, group):
    """Scale and minimum, six bits each, of group 0 to 7 in 12 bytes."""
    if group < 4:
        return packed[group] & 63, packed[group + 4] & 63
    low = packed[group + 4]
    return low & 15 | packed[group - 4] >> 6 << 4, low >> 4 | packed[group] >> 6 << 4


def q4_k(block):
    d, least, out = half(block, 0), half(block, 2), []
    for at in range(256):
        scale, minimum = k_scale(block[4:16], at // 32)
        quant = block[16 + at // 64 * 32 + at % 32] >> at % 64 // 32 * 4 & 15
        out.append(d * F(scale) * F(quant) - least * F(minimum))
    return out


def q5_k(block):
    d, least, out = half(block, 0), half(block, 2), []
    for at in range(256):
        scale, minimum = k_scale(block[4:16], at // 32)
        quant = block[48 + at // 64 * 32 + at % 32] >> at % 64 // 32 * 4 & 15
        fifth = block[16 + at % 32] >> at // 32 & 1
        out.append(d * F(scale) * F(quant | fifth << 4) - least * F(minimum))
    return out


def q6_k(block):
    d, out = half(block, 208), []
    for at in range(256):
        part, inside = at // 128, at % 128
        low = block[part * 64 + inside % 64] >> inside // 64 * 4 & 15
        high = block[128 + part * 32 + inside % 32] >> inside // 32 * 2 & 3
        out.append(d * F(signed(block[192 + at // 16])) * F((low | high << 4) - 32))
    return out


BY_HAND = dict(
    zip(SCALES, (q4_0, q4_1, q5_0, q5_1, q8_0, q2_k, q3_k, q4_k, q5_k, q6_k), strict=True),
)
ROWS, WIDTH = 5, 512
BYTES_PER_NUMBER = 32
"""Of the temporaries in unpacking a chunk: several float32 and byte arrays of its length live at once."""


def random_blocks(kind):
    generator = np.random.default_rng(7)
    per_block, size = GGML_QUANT_SIZES[package.GGMLQuantizationType[kind]]
    blocks = generator.integers(0, 256, (ROWS * WIDTH // per_block, size), np.uint8)
    for at in SCALES[kind]:
        scales = generator.normal(0, 0.05, len(blocks)).astype(np.float16)
        blocks[:, at : at + 2] = scales[:, None].view(np.uint8)
    return blocks.reshape(ROWS, -1)


def write_one(path, data, kind):
    """A file of one tensor; ``data`` is in the bytes of its type."""
    writer = package.GGUFWriter(path, "qwen2")
    writer.add_tensor("token_embd.weight", data, raw_dtype=package.GGMLQuantizationType[kind])
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file):
        step()
    writer.close()


@pytest.mark.parametrize("kind", list(SCALES))
def test_packed_numbers_are_those_of_the_definition(tmp_path, kind):
    data = random_blocks(kind)
    write_one(tmp_path / "one.gguf", data, kind)
    held = gguf_file.read(tmp_path / "one.gguf")
    found = gguf_file.dequantised(held.stored["token_embd.weight"])
    size = GGML_QUANT_SIZES[package.GGMLQuantizationType[kind]][1]
    wanted = np.array([BY_HAND[kind](block.tobytes()) for block in data.reshape(-1, size)], F).reshape(ROWS, WIDTH)
    assert found.shape == (ROWS, WIDTH)
    assert np.isfinite(wanted).all()
    np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize("kind", [kind for kind in SCALES if not kind.startswith("Q5_") or kind == "Q5_K"])
def test_the_torch_kernels_of_transformers_agree(kind):
    """A second implementation, which shares no code with the gguf package; it has none for Q5_0 and Q5_1."""
    data, number = random_blocks(kind), package.GGMLQuantizationType[kind]
    theirs = dequantize(torch.from_numpy(data.reshape(-1)), int(number))
    stored = gguf_file.Stored("x", pathlib.Path("x.gguf"), number, (ROWS, WIDTH), data)
    np.testing.assert_array_equal(gguf_file.dequantised(stored).reshape(-1), theirs.numpy())


@pytest.mark.parametrize("chunk", [1, WIDTH, 3 * WIDTH, 1 << 22])
def test_the_size_of_the_chunks_changes_nothing(monkeypatch, chunk):
    stored = gguf_file.Stored(
        "x", pathlib.Path("x.gguf"), package.GGMLQuantizationType.Q4_K, (ROWS, WIDTH), random_blocks("Q4_K")
    )
    whole = gguf_file.dequantised(stored)
    monkeypatch.setattr(gguf_file, "CHUNK", chunk)
    np.testing.assert_array_equal(gguf_file.dequantised(stored), whole)


def test_halves_are_widened_exactly(tmp_path):
    values = np.array([[1.0, -2.5, 6.1035e-05, 65504.0, 0.0, 3.140625]], np.float16)
    write_one(tmp_path / "f16.gguf", values, "F16")
    bits = (values.astype(F).view(np.uint32) >> 16).astype(np.uint16)
    write_one(tmp_path / "bf16.gguf", bits.view(np.uint8), "BF16")
    for name, wanted in (("f16", values.astype(F)), ("bf16", (bits.astype(np.uint32) << 16).view(F))):
        found = gguf_file.dequantised(gguf_file.read(tmp_path / f"{name}.gguf").stored["token_embd.weight"])
        np.testing.assert_array_equal(found, wanted)


def test_every_type_that_is_read_is_tested_here():
    assert set(gguf_file.TYPES) == {"F32", "F16", "BF16", *SCALES}


@pytest.mark.parametrize("kind", ["IQ4_NL", "TQ1_0", "MXFP4", "F64"])
def test_other_types_are_refused_by_tensor_and_type(tmp_path, kind):
    per_block, size = GGML_QUANT_SIZES[package.GGMLQuantizationType[kind]]
    data = np.zeros((2, 256), np.float64) if kind == "F64" else np.zeros((2, 256 // per_block * size), np.uint8)
    write_one(tmp_path / "one.gguf", data, kind)
    with pytest.raises(HfError, match=rf"one.gguf: wanted tensors of types F32, .* got token_embd.weight \({kind}\)"):
        gguf.inspect(tmp_path / "one.gguf")


def test_one_tensor_is_in_memory_at_a_time(tmp_path, monkeypatch):
    """NumPy reports its buffers: beside the tensor that is handed over only the temporaries of one chunk."""
    data = np.tile(random_blocks("Q4_K"), (2000, 1))
    write_one(tmp_path / "one.gguf", data, "Q4_K")
    stored = gguf_file.read(tmp_path / "one.gguf").stored["token_embd.weight"]
    size, chunk = 4 * ROWS * 2000 * WIDTH, 1 << 16
    monkeypatch.setattr(gguf_file, "CHUNK", chunk)
    tracemalloc.start()
    gguf_file.dequantised(stored)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert size < peak < size + BYTES_PER_NUMBER * chunk
