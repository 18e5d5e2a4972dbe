"""The benchmark of codes: each code it times is searched and deleted from, at a small size."""

from benchmarks import codes


def test_every_made_code_is_timed():
    rows = codes.made(2000)
    said = [row["what"] for row in rows]
    assert len(set(said)) == len(said) == 9 and all(row["seconds"] >= 0 for row in rows)
    for name in ("64 bits, product", "256 bits, product", "256 bits, binary", "2048 bits, binary"):
        assert any(text.startswith(name) and "real-valued" in text for text in said)
