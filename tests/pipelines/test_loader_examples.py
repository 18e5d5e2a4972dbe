"""Every public name of `pipelines.loader` has a docstring whose example gives what it says."""

import doctest
import inspect

import numpy as np
import pytest
import torch
from PIL import Image

from pipelines import loader
from pipelines.decode import open_reader
from pipelines.loader import LoaderSettings, TwoViewLoader
from pipelines.views import ViewSettings


def public() -> list[str]:
    """The names, and those of the classes' own methods and properties."""
    names = []
    for name in loader.__all__:
        names.append(name)
        if inspect.isclass(found := getattr(loader, name)):
            members = {
                m: v for m, v in vars(found).items() if isinstance(v, property) or inspect.isfunction(v)
            }
            names += [f"{name}.{member}" for member in members if not member.startswith("_")]
    return names


@pytest.mark.parametrize("name", public())
def test_the_example_of_each_public_name_gives_what_it_says(name, tmp_path, monkeypatch):
    (tmp_path / "photos").mkdir()
    for i in range(12):
        grey = np.random.default_rng(i).integers(0, 256, (40, 50, 3), np.uint8)
        Image.fromarray(grey).save(tmp_path / f"photos/{i:02d}.png")
    monkeypatch.chdir(tmp_path)
    found: object = loader
    for part in name.split("."):
        found = getattr(found, part)
    with TwoViewLoader(open_reader("photos"), ViewSettings(resolution=32), LoaderSettings(4)) as made:
        known = {
            **{each: getattr(loader, each) for each in loader.__all__},
            "loader": made, "batch": next(iter(made)), "open_reader": open_reader,
            "ViewSettings": ViewSettings, "np": np, "torch": torch,
        }  # fmt: skip
        text = (found.fget if isinstance(found, property) else found).__doc__ or ""
        test = doctest.DocTestParser().get_doctest(text, known, name, None, 0)
        assert test.examples, f"{name} has no example"
        said: list[str] = []
        doctest.DocTestRunner(verbose=False).run(test, out=said.append)
    assert not said, "".join(said)
