"""A family is one file and one line: a planted one goes through every stage, and no list names families."""

import ast
import dataclasses
import json
import math
import pickle
import re
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from lvssl.codes.file import open_codes
from lvssl.evaluation.codes import encode
from lvssl.evaluation.embedding import embed
from lvssl.export import export
from lvssl.latents import FAMILIES, described, family
from lvssl.latents.noise import Noise, keyed, normal
from lvssl.latents.posterior import Family, Posterior, constant
from lvssl.plan import plan
from lvssl.report.page import write_report
from lvssl.runs.progress import read_metrics
from lvssl.runs.run import load_run
from lvssl.settings import measure, start
from lvssl.settings import pretrain as config
from lvssl.settings.apply import EncodeSettings, ExportSettings
from lvssl.settings.pretrain import PRESETS, LatentSettings
from lvssl.training.pretrain import pretrain
from pipelines.decode import open_reader
from pipelines.errors import InputError

ROOT = Path(__file__).resolve().parents[2]


# ---- a family that the project has never heard of


@dataclass(frozen=True)
class Narrow(Family):
    """z ~ N(mu, s^2), with s the same for all images; `components` copies of the code's bits."""

    components: int = 1
    about = "a planted latent"

    def code_bits(self, dim: int) -> int:
        return self.components * dim

    def validation_error(self, dim: int) -> str:
        return "an even number" if dim % 2 else ""

    def initial_head(self, dim: int, init_scale: float) -> tuple[torch.Tensor, torch.Tensor]:
        return constant(dim, init_scale), constant(0, 0.0)

    def posterior(self, parameters: torch.Tensor) -> "NarrowPosterior":
        return NarrowPosterior(parameters, self.components)


class NarrowPosterior(Posterior):
    def __init__(self, parameters: torch.Tensor, copies: int) -> None:
        super().__init__(parameters)
        self.copies = copies

    def sample(self, count: int, noise: Noise, temperature: float = 0.5) -> torch.Tensor:
        return self.parameters + 0.5 * normal((count, *self.parameters.shape), self.parameters, noise)

    def mean(self) -> torch.Tensor:
        return self.parameters

    def unit_kl(self) -> torch.Tensor:
        return 0.5 * (self.parameters.square() + 0.25 - 1 - math.log(0.25))

    def entropy(self) -> torch.Tensor:
        return torch.full_like(self.parameters, 0.5 * math.log(2 * math.pi * math.e * 0.25)).sum(dim=1)

    def code(self) -> torch.Tensor:
        return (self.parameters > 0).repeat(1, self.copies)


@pytest.fixture
def planted(monkeypatch) -> None:
    monkeypatch.setitem(FAMILIES, "narrow", Narrow)


@pytest.mark.usefixtures("planted")
def test_a_new_family_is_validated_and_planned():
    latent = LatentSettings("narrow", components=2, dim=6)
    latent.validate()
    assert latent.distribution == Narrow(components=2) and latent.final_beta == 1e-3
    LatentSettings("narrow+bernoulli", estimator="relaxed").validate()
    for changes, said in (
        ({"dim": 5}, "an even number"),
        ({"estimator": "relaxed"}, "straight-through for narrow"),
        ({"init_scale_start": 1.0}, "no logits"),
        ({"objective": "ceb", "site": "proj"}, "on the sphere"),
    ):
        with pytest.raises(InputError, match=said):
            LatentSettings("narrow", **changes).validate()
    with pytest.raises(InputError, match=r"known: none, .*, narrow, or two"):
        LatentSettings("nope").validate()
    assert "family narrow" in plan(start.PlanSettings(8, 1, "tiny", resolution=8, family="narrow"))


@pytest.mark.usefixtures("planted")
def test_a_new_family_is_trained_encoded_exported_and_reported(digits, tmp_path):
    base, out = PRESETS["digits"], tmp_path / "run"
    count = len(open_reader(digits["train"]))
    latent = dataclasses.replace(base.latent, family="narrow", components=2)
    settings = dataclasses.replace(
        base, data=digits["train"], out=out, latent=latent, epochs=1, batch_size=count // 2, log_every=1
    )
    pretrain(settings)
    rows = read_metrics(out / "metrics.jsonl")
    assert rows[-1]["step"] == 2 and all(math.isfinite(row["loss"]) for row in rows)
    run, test = load_run(out), open_reader(digits["test"])
    bits = 2 * run.network.dim
    embedded = embed(run.network, test, settings.view)
    assert embedded.bits == bits and embedded.bit_means is None
    codes = open_codes(encode(EncodeSettings(out, digits["test"])))
    assert (codes.family, codes.bits, codes.count) == ("narrow", bits, len(test))
    assert (codes.rows == embedded.codes).all()
    folder = export(ExportSettings(out, tmp_path / "export", onnx=False))
    assert "latent family `narrow`" in (folder / "README.md").read_text()
    assert json.loads((folder / "config.json").read_text())
    assert "encoder with a planted latent was trained" in write_report(out).read_text()


# ---- what a family is


def made(distribution: Family) -> Posterior:
    return distribution.posterior(
        torch.randn(3, distribution.parameter_count(16), generator=torch.Generator().manual_seed(0))
    )


@pytest.mark.parametrize("name", [*FAMILIES, "gaussian+categorical"])
def test_a_family_is_a_value(name):
    """Equal where its options are, hashable, picklable, unchangeable; and no class is made for it."""
    one, two = family(name, depth=2, categories=4), family(name, depth=2, categories=4)
    assert one == two and hash(one) == hash(two) and type(one) is type(two)
    assert pickle.loads(pickle.dumps(one)) == one
    with pytest.raises(dataclasses.FrozenInstanceError):
        one.depth = 3
    assert one.about and one.parameter_count(8) == one.location_count(8) + one.scale_count(8)


@pytest.mark.parametrize("name", FAMILIES)
def test_what_a_family_says_of_itself_is_what_its_posterior_does(name):
    distribution = family(name)
    posterior = made(distribution)
    assert distribution.signs == torch.equal(posterior.code(), posterior.parameters > 0)
    assert distribution.stochastic == bool((posterior.kl() > 0).any())
    unread = distribution.unread
    assert ("clean_path_weight" in unread) == (not distribution.stochastic)
    if not distribution.stochastic:
        assert ("decorrelation" in unread) == (posterior.straight_through_bits() is None)
        assert distribution.own_code == (posterior.straight_through_bits() is not None)
    assert distribution.discrete == ("relaxed" in {field.name for field in dataclasses.fields(distribution)})
    if distribution.on_sphere:
        assert torch.allclose(posterior.sample(1, keyed(0, 3)).norm(dim=2), torch.ones(1, 3))


def test_what_is_relaxed_has_no_kernel():
    assert family("bernoulli").fused and not family("bernoulli", relaxed=True).fused
    assert not family("gaussian+bernoulli").fused


def test_a_family_is_described_whoever_wrote_its_name():
    assert described("gaussian+bernoulli") == "a Gaussian latent and a Bernoulli latent"
    assert described("of another version") == "a of another version latent"


# ---- and nothing else names families

# Also the names of a setting (the rate's weight) and of a baseline code (the signs of the features).
AMBIGUOUS = {"beta", "sign"}
# What names runs and arms: choices of what to train, that a new family needn't be among.
CHOICES = {"lvssl/commands/demo.py", "lvssl/settings/measure.py", "lvssl/evaluation/pairs.py"}


def named(root: Path) -> list[str]:
    """Lists and comparisons outside `lvssl.latents` with a family's name, and imports of a family's class."""
    names = set(FAMILIES) - AMBIGUOUS
    classes = {kind.__name__ for kind in FAMILIES.values()}
    classes |= {type(made(family(name))).__name__ for name in FAMILIES}
    found = []
    for file in sorted((root / "lvssl").rglob("*.py")):
        where = file.relative_to(root).as_posix()
        if where.startswith("lvssl/latents/"):
            continue
        for node in ast.walk(ast.parse(file.read_text())):
            inside: list[ast.expr | None] = []
            if isinstance(node, ast.Tuple | ast.List | ast.Set):
                inside = [*node.elts]
            elif isinstance(node, ast.Dict):
                inside = [*node.keys]
            elif isinstance(node, ast.Compare):
                inside = [node.left, *node.comparators]
            elif isinstance(node, ast.MatchValue):
                inside = [node.value]
            constants = {each.value for each in inside if isinstance(each, ast.Constant)}
            if where not in CHOICES and constants & names:
                found.append(f"{where}:{node.lineno}: {', '.join(sorted(constants & names))}")
            if isinstance(node, ast.ImportFrom) and classes & {alias.name for alias in node.names}:
                found.append(f"{where}:{node.lineno}: imports {node.module}")
    return found


def test_no_other_module_has_a_list_of_families():
    assert named(ROOT) == []


@pytest.mark.parametrize(
    "text, said",
    [
        ('DISCRETE = ("none", "bernoulli")\n', "bernoulli, none"),
        ('ABOUT = {"gaussian": "a Gaussian latent"}\n', "gaussian"),
        ('def f(run):\n    return run.family == "none"\n', "none"),
        ('def f(run):\n    return run.family in {"vmf", "power_spherical"}\n', "power_spherical, vmf"),
        ("from lvssl.latents.bernoulli import BernoulliPosterior\n", "imports lvssl.latents.bernoulli"),
    ],
)
def test_a_list_of_families_is_found(tmp_path, text, said):
    """The test of the test above."""
    (tmp_path / "lvssl").mkdir()
    (tmp_path / "lvssl" / "other.py").write_text(text)
    assert [line.partition(": ")[2] for line in named(tmp_path)] == [said]


def helps(module) -> dict[str, str]:
    """Setting -> its help, of the classes of a module: `Class.setting`."""
    found = {}
    for each in ast.parse(Path(module.__file__).read_text()).body:
        if isinstance(each, ast.ClassDef):
            for setting, text in zip(each.body, each.body[1:]):
                if isinstance(setting, ast.AnnAssign) and isinstance(text, ast.Expr):
                    found[f"{each.name}.{setting.target.id}"] = ast.literal_eval(text.value)
    return found


def has_bits(distribution: Family) -> bool:
    return made(distribution).straight_through_bits() is not None


def has_option(name: str):
    return lambda distribution: name in {field.name for field in dataclasses.fields(distribution)}


@pytest.mark.parametrize(
    "module, setting, concerned",
    [
        (config, "LatentSettings.family", lambda distribution: True),
        (start, "PlanSettings.family", lambda distribution: True),
        (config, "LatentSettings.beta", lambda distribution: distribution.default_beta > 0),
        (config, "LatentSettings.depth", has_option("depth")),
        (config, "LatentSettings.categories", has_option("categories")),
        (config, "LatentSettings.components", has_option("components")),
        (config, "LatentSettings.init_scale_start", lambda distribution: distribution.discrete),
        (config, "LatentSettings.decorrelation", has_bits),
        (measure, "MeasuringSettings.control", lambda distribution: not distribution.stochastic),
    ],
)
def test_the_help_of_a_setting_names_the_families_that_it_concerns(module, setting, concerned):
    said = re.findall(rf"(?<![\w+])(?:{'|'.join(FAMILIES)})(?!\w)", helps(module)[setting])
    assert list(dict.fromkeys(said)) == [name for name in FAMILIES if concerned(family(name))]
