"""Settings of the commands that use a trained run: encode, search, curate and export."""

from dataclasses import dataclass
from pathlib import Path

from tyro.conf import Positional

from lvssl.settings.fields import ReadsImages


@dataclass(frozen=True)
class EncodeSettings(ReadsImages):
    """Write the packed code and the uncertainty of every image of a set. No labels are needed. Resumable:
    rerun the command after an interruption.

    The uncertainty is the negative log-density, in nats per dimension, under Gaussians fitted to the
    activations of the training images. The first call fits them, for which it needs the training images, and
    keeps them in RUN/density.safetensors.
    """

    run: Positional[Path]
    """Run whose encoder is used; or embeddings in the formats of `lvssl knn`, on which the quantiser is
    fitted: --images are then embeddings as well, and --bits is required."""
    images: Path
    """Images to encode: a folder, searched recursively; or a .beton, tars, a parquet ..., or several of these
    ('train-*.beton')."""
    out: Path | None = None
    """Code file to write. If omitted, RUN/codes.lvcodes."""
    bits: int = 0
    """Length of the codes; 0 means the run's own code."""
    code: str = "auto"
    """With --bits, the kind of code: auto (opq if the length is in whole bytes and faiss is installed,
    otherwise itq, or bits where neither reaches the length), bits (the first bits of the run's own code), opq
    (product quantisation, needs the extra `faiss`), itq or pca. The first call fits it on the training images
    and keeps it in RUN/quantisers."""
    train: Path | None = None
    """Training images, of which at most 50,000 are used to fit density and quantiser. If omitted, the
    run's."""
    fit: bool = True
    """Fit what needs the training images. With --no-fit, there are no uncertainties, and searches can only
    use Hamming distance."""
    means: bool = False
    """Also store the posterior means as fp16, 16 times the size of the code's bits, for `search --rerank`."""
    csv: Path | None = None
    """Also write names and uncertainties to this file."""
    faiss: Path | None = None
    """Also write the codes to this file as an index for `faiss.read_index` (opq) or
    `faiss.read_index_binary`."""
    on_error: str | None = None
    """What to do with an image that can't be decoded: raise (stop and name it), skip (leave it out, with a
    warning), or keep (as skip, but use what Pillow decodes from a damaged JPEG). If omitted, as in the
    pretraining."""
    workers: int = 0
    """Threads that decode images; 0 means the number of cores minus two, but 2 to 12."""


@dataclass(frozen=True)
class SearchSettings(ReadsImages):
    """Find the images whose codes are nearest to one or more queries.

    Queries that are images stay real-valued (asymmetric distance): the distance is the squared Euclidean
    distance to the vector that a code represents. Hamming distance is used for queries that are codes, with
    --symmetric, --staged or --rerank, and for code files written with --no-fit.
    """

    run: Positional[Path]
    """Run that made the codes."""
    query: Path
    """An image; or a folder, a .beton or a code file (.lvcodes), of which each image is a query."""
    codes: Path | None = None
    """Code file to search. If omitted, RUN/codes.lvcodes."""
    k: int = 10
    """Number of neighbours to show."""
    symmetric: bool = False
    """Compare codes with codes: by Hamming distance or, for product codes, by the distance between the
    vectors that they represent."""
    staged: bool = False
    """Compare 512 bits with all codes and the remaining bits only with the nearest: faster, but may miss a
    neighbour."""
    rerank: bool = False
    """Re-rank the nearest 10 k codes (at least 100) by the similarity of their posteriors (needs encode
    --means)."""
    on_error: str | None = None
    """What to do with a query in a folder or set that can't be decoded: raise, skip or keep, as in encode. If
    omitted, as in the pretraining."""
    csv: Path | None = None
    """Write the neighbours to this file instead: query, rank, name, distance, similarity (cosine between a
    real-valued query and the vector that the code represents; with --rerank, of the posteriors' means), and
    the uncertainties of both."""
    page: Path | None = None
    """Write an HTML page to this file instead, with pictures of the first 60 queries and their neighbours."""
    images: Path | None = None
    """With --page: the images that were encoded. If omitted, the run's training images."""


@dataclass(frozen=True)
class CurateSettings(ReadsImages):
    """Inspect a data set: near-duplicates within and between training and test images, outliers, labels that
    their neighbours contradict, and a diverse subset. Writes tables (.csv) and a page with pictures.
    Resumable: rerun the command after an interruption."""

    run: Positional[Path]
    """Run whose encoder is used; or embeddings in the formats of `lvssl knn`, which give no pictures."""
    train: Path | None = None
    """Images (or embeddings) to inspect. If omitted, the run's training images."""
    test: Path | None = None
    """Test images (or embeddings), which should have no duplicates among the images to inspect. None if
    omitted."""
    out: Path | None = None
    """Folder for the results. If omitted, RUN/curate or, for a file of embeddings, FILE-curate."""
    pixels: float = 0.89
    """Two neighbours are duplicates if their pixels agree at least this much, in (0, 1]. 0 means to compare
    features only, as is always done for embeddings, which have no pixels."""
    crops: float = 0.0
    """Two neighbours are also duplicates if the pixels of one agree at least this much with a crop of the
    other (84 to 96 % of its side), in (0, 1]. 0 means not to look for crops. 0.75 finds most, and some pairs
    that are merely similar."""
    cosine: float | None = None
    """Minimum cosine similarity of duplicates' features, in (0, 1]. If omitted, 0.9, or 0.98 if only features
    are compared."""
    top_n: int = 1000
    """Maximum number of rows in the tables of outliers and of labels."""
    subset: int = 100
    """Number of images in the diverse subset."""
    on_error: str | None = None
    """What to do with an image that can't be decoded: raise, or skip (leave it out). If omitted, as in the
    pretraining."""
    overwrite: bool = False
    """Embed the images again, even if there are embeddings of the same images."""
    workers: int = 0
    """Threads that decode images; 0 means the number of cores minus two, but 2 to 12."""


@dataclass(frozen=True)
class ExportSettings:
    """Export a run's encoder for torchvision, timm, torch.hub and ONNX, with a model card."""

    run: Positional[Path]
    """Folder of the run."""
    out: Path = Path("export")
    """Folder to write. It must not exist yet."""
    onnx: bool = True
    """Also write encoder.onnx, which maps images to packed codes. Needs the extra `export`."""
    bits: int = 0
    """Length of the codes that encoder.onnx computes; 0 means the run's own code."""
    code: str = "auto"
    """With --bits, the kind of code, which `lvssl encode` must have fitted: auto, bits, opq, itq or pca."""
    push: str = ""
    """USER/NAME: also upload the folder to the Hugging Face Hub, to a new private repository unless it exists
    already. Uses the token of `hf auth login`, or $HF_TOKEN."""
    public: bool = False
    """Make a repository that --push creates public."""
