"""The rooms that a batch passes."""

from benchmarks import trace


def test_a_batch_passes_eight_rooms_at_most_and_comes_back_to_none():
    calls = trace.step()
    found = trace.rooms(calls)
    assert len(found) <= 8, list(found)
    passed = [room for room in found if room not in ("pipelines.kernels", "lvssl.settings")]
    assert passed[:4] == ["pipelines", "pipelines.decode", "pipelines.augment", "lvssl.training"]
    assert set(passed[4:]) == {"lvssl.models", "lvssl.latents", "lvssl.losses"}
    assert "gradients: backward" in found["lvssl.training"] and trace.page(calls).count("\n## ") == len(found)
