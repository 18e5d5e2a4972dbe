import json
import struct

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lvssl.codes.file import ROWS_AT, CodeFileError, open_codes, require_checkpoint
from lvssl.codes.search import hamming_search
from lvssl.codes.statistics import binary_entropy, code_statistics, compression_ratios
from lvssl.codes.writer import CodeWriter
from pipelines.kernels.pack import pack_bits, unpack_bits

DIGEST = "ab" * 32


def random_bits(n, d, seed=0, on=0.5):
    return np.random.default_rng(seed).random((n, d)) < on


# --- packing --------------------------------------------------------------------------------------


@given(n=st.integers(0, 5), d=st.integers(1, 70), seed=st.integers(0, 99))
def test_packing_round_trips_and_pads_with_zeros(n, d, seed):
    bits = random_bits(n, d, seed)
    packed = pack_bits(bits)
    assert packed.shape == (n, -(-d // 8)) and packed.dtype == np.uint8
    assert np.array_equal(unpack_bits(packed, d), bits)
    assert np.bitwise_count(packed).sum() == bits.sum()  # no bit set in the padding


def test_bit_order_is_the_documented_one():
    bits = np.zeros((1, 10), dtype=np.uint8)
    bits[0, [1, 9]] = 1
    assert pack_bits(bits).tolist() == [[2, 2]]


def test_torch_and_numpy_pack_alike():
    bits = random_bits(3, 9)
    for same in (torch.from_numpy(bits), bits.astype(np.uint8), torch.from_numpy(bits).float()):
        assert np.array_equal(pack_bits(same), pack_bits(bits))


def test_logits_and_wrong_widths_are_refused():
    with pytest.raises(ValueError, match="threshold the logits"):
        pack_bits(np.array([[0.3, -2.0]]))
    with pytest.raises(ValueError, match=r"\[N, D\]"):
        pack_bits(np.zeros(8, dtype=bool))
    with pytest.raises(ValueError, match=r"uint8 \[N, 2\]"):
        unpack_bits(np.zeros((1, 1), dtype=np.uint8), 9)


# --- the file -------------------------------------------------------------------------------------


def write(path, n=5, bits=13, names=None, digest=DIGEST):
    rows = pack_bits(random_bits(n, bits))
    names = names or [f"image {i}.png" for i in range(n)]
    with CodeWriter(path, family="bernoulli", bits=bits, checkpoint=digest, created_by="test") as writer:
        for i in range(0, n, 2):  # in pieces, as an encoder writes
            writer.append(rows[i : i + 2], names[i : i + 2])
    return rows, names


@pytest.mark.parametrize(("n", "bits"), [(0, 8), (1, 1), (5, 13), (4, 64), (9, 2048)])
def test_code_file_round_trip(tmp_path, n, bits):
    odd = ["", "Zürich/海.jpg", "with\nnewline", "not utf-8 \udcff", *[f"{i}" for i in range(5)]][:n]
    rows, names = write(tmp_path / "a.lvcodes", n, bits, odd)
    codes = open_codes(tmp_path / "a.lvcodes")
    assert (codes.family, codes.bits, codes.count, codes.checkpoint) == ("bernoulli", bits, n, DIGEST)
    assert codes.created_by == "test"
    assert np.array_equal(codes.rows, rows)
    assert list(codes.names) == names and codes.names[:2] == names[:2]
    assert n == 0 or (isinstance(codes.rows, np.memmap) and codes.names[-1] == names[-1])
    assert [p.name for p in tmp_path.iterdir()] == ["a.lvcodes"]


def test_search_runs_on_the_mapped_file(tmp_path):
    rows, _ = write(tmp_path / "a.lvcodes", 9, 64)
    found, distances = hamming_search(rows[4:5], open_codes(tmp_path / "a.lvcodes").rows, 1)
    assert (found.item(), distances.item()) == (4, 0)


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    rows, _ = write(tmp_path / "a.lvcodes")
    before = (tmp_path / "a.lvcodes").read_bytes()
    with (
        pytest.raises(KeyboardInterrupt),
        CodeWriter(tmp_path / "a.lvcodes", family="x", bits=13, checkpoint="", created_by="") as writer,
    ):
        writer.append(rows, ["n"] * 5)
        raise KeyboardInterrupt
    with (
        pytest.raises(ValueError, match="2 names"),
        CodeWriter(tmp_path / "b.lvcodes", family="x", bits=13, checkpoint="", created_by="") as writer,
    ):
        writer.append(rows, ["one", "two"])
    with (
        pytest.raises(ValueError, match="header"),
        CodeWriter(tmp_path / "c.lvcodes", family="x" * 5000, bits=13, checkpoint="", created_by=""),
    ):
        pass
    assert [p.name for p in tmp_path.iterdir()] == ["a.lvcodes"]
    assert (tmp_path / "a.lvcodes").read_bytes() == before


def test_truncation_anywhere_is_an_error_naming_the_offset(tmp_path):
    write(tmp_path / "a.lvcodes")
    whole = (tmp_path / "a.lvcodes").read_bytes()
    for size in [*range(1, 24), ROWS_AT - 1, *range(ROWS_AT, len(whole))]:
        (tmp_path / "cut.lvcodes").write_bytes(whole[:size])
        with pytest.raises(CodeFileError, match=f"cut.lvcodes: truncated at byte {size}\\b"):
            open_codes(tmp_path / "cut.lvcodes")


def altered(whole, **fields):
    length = struct.unpack("<Q", whole[8:16])[0]
    text = json.dumps(json.loads(whole[16 : 16 + length]) | fields).encode()
    return whole[:8] + struct.pack("<Q", len(text)) + text.ljust(ROWS_AT - 16) + whole[ROWS_AT:]


def test_what_is_no_good_code_file_is_refused(tmp_path):
    path = tmp_path / "a.lvcodes"
    with pytest.raises(CodeFileError, match="No such file"):
        open_codes(path)
    write(path)
    whole = path.read_bytes()
    for content, message in [
        (b"", "not a code file"),
        (b"\x89PNG\r\n\x1a\n" + bytes(5000), "not a code file"),
        (altered(whole, version=2), "format version 2, this release reads 1"),
        (altered(whole, bits=0), "no valid bits"),
        (altered(whole, count=-1), "no valid bits"),
        (altered(whole, count="5"), "no valid bits"),
        (altered(whole, family=None), "no valid family"),
        (whole[:16] + b"{" * (ROWS_AT - 16) + whole[ROWS_AT:], "can't be read"),
        (whole[:8] + b"\xff" * 8 + whole[16:], "can't be read"),
        (whole + b"x", "1 bytes follow"),
    ]:
        path.write_bytes(content)
        with pytest.raises(CodeFileError, match=message) as error:
            open_codes(path)
        assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_unknown_header_fields_are_ignored(tmp_path):
    rows, _ = write(tmp_path / "a.lvcodes")
    (tmp_path / "a.lvcodes").write_bytes(altered((tmp_path / "a.lvcodes").read_bytes(), later=1))
    assert np.array_equal(open_codes(tmp_path / "a.lvcodes").rows, rows)


def test_codes_of_another_checkpoint_are_refused(tmp_path):
    write(tmp_path / "a.lvcodes")
    codes = open_codes(tmp_path / "a.lvcodes")
    require_checkpoint(codes, DIGEST)
    with pytest.raises(CodeFileError, match="made by checkpoint abababababab, not by cdcdcdcdcdcd"):
        require_checkpoint(codes, "cd" * 32)


# --- statistics -----------------------------------------------------------------------------------


def test_statistics_on_a_case_solved_by_hand():
    #                 copies of each other | constant | complement
    bits = np.array([[0, 0, 1, 1], [1, 1, 1, 0], [0, 0, 1, 1], [1, 1, 1, 0]])
    p = np.array([[0.0, 0.5, 1.0, 1.0], [1.0, 0.5, 1.0, 0.0]] * 2)
    figures = code_statistics(bits, p)
    assert figures == {
        "count": 4,
        "nominal_bits": 4,
        "entropy_bits": 3.0,
        "entropy_per_bit": 0.75,
        "dead_bits": 1,
        "mean_absolute_correlation": pytest.approx(1.0),
        "collisions": 2,
        "information_bound_bits": 2.0,  # bits 0 and 3 certain and balanced, bit 1 pure noise, bit 2 constant
    }
    json.dumps(figures)


def test_correlation_agrees_with_numpy():
    bits = random_bits(200, 12, on=0.3)
    truth = np.abs(np.corrcoef(bits.T))[np.triu_indices(12, 1)].mean()
    assert code_statistics(bits)["mean_absolute_correlation"] == pytest.approx(truth, rel=1e-5)
    assert code_statistics(np.ones((3, 4)))["mean_absolute_correlation"] is None


def test_bits_are_dead_below_one_in_a_hundred_and_above_99():
    on = np.array([0, 9, 10, 500, 990, 991, 1000])
    assert code_statistics(np.arange(1000)[:, None] < on)["dead_bits"] == 4


def test_entropy_agrees_with_scipy():
    from scipy.stats import entropy

    p = np.linspace(0, 1, 11)
    assert np.allclose(binary_entropy(p), entropy(np.stack([p, 1 - p]), base=2), atol=1e-12)


def test_the_papers_ratio():
    ratios = compression_ratios(2048, 224, feature_dim=2048, jpeg_bytes=25600)
    assert ratios == {"raw_pixels": 588.0, "fp32_feature": 32.0, "stored_jpeg": 100.0}
    assert "stored_jpeg" not in compression_ratios(256, 32, feature_dim=256)
    with pytest.raises(ValueError, match="at least 1"):
        compression_ratios(0, 32, feature_dim=256)
