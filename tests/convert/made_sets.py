"""The same images in every form of source that the converter reads."""

import csv
import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from made_images import class_folders


def tar_of(path: Path, members: dict[str, bytes]) -> Path:
    """Write a tar as GNU tar or Python would."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def by_class(files: dict[str, bytes]) -> dict[str, dict[str, bytes]]:
    folders: dict[str, dict[str, bytes]] = {}
    for name, data in files.items():
        folder, _, file = name.partition("/")
        folders.setdefault(folder, {})[file] = data
    return folders


def train_tar(path: Path, files: dict[str, bytes]) -> Path:
    """Write ILSVRC2012_img_train.tar: a tar per class, not in the order of their names."""
    inner = {}
    for folder, members in reversed(by_class(files).items()):
        out = io.BytesIO()
        with tarfile.open(fileobj=out, mode="w") as archive:
            for name, data in members.items():
                info = tarfile.TarInfo(name)
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
        inner[f"{folder}.tar"] = out.getvalue()
    return tar_of(path, inner)


def validation_tar(folder: Path, files: dict[str, bytes]) -> Path:
    """Write ILSVRC2012_img_val.tar with its devkit, whose class numbers don't follow the order of wnids."""
    from scipy.io import savemat

    wnids = sorted(by_class(files))
    number = {wnid: i for i, wnid in enumerate(np.random.RandomState(3).permutation(wnids), start=1)}
    members = {f"ILSVRC2012_val_{i:08d}.JPEG": data for i, data in enumerate(files.values(), start=1)}
    dtype = [("ILSVRC2012_ID", "O"), ("WNID", "O"), ("words", "O"), ("num_children", "O")]
    rows = [(number[wnid], wnid, "a thing", 0) for wnid in sorted(number, key=number.__getitem__)]
    synsets = np.array([*rows, (len(rows) + 1, "n00001740", "entity", 3)], dtype).reshape(-1, 1)
    meta = io.BytesIO()
    savemat(meta, {"synsets": synsets})
    truth = "".join(f"{number[name.partition('/')[0]]}\n" for name in files)
    kit = {
        "ILSVRC2012_devkit_t12/data/meta.mat": meta.getvalue(),
        "ILSVRC2012_devkit_t12/data/ILSVRC2012_validation_ground_truth.txt": truth.encode(),
    }
    plain = tar_of(folder / "kit.tar", kit)
    import gzip

    (folder / "ILSVRC2012_devkit_t12.tar.gz").write_bytes(gzip.compress(plain.read_bytes()))
    plain.unlink()
    return tar_of(folder / "ILSVRC2012_img_val.tar", members)


def shards(folder: Path, files: dict[str, bytes], each: int = 7, json_label: bool = False) -> Path:
    """Write WebDataset shards with nested keys and dots in folder names."""
    classes = sorted(by_class(files))
    names = list(files)
    for number, start in enumerate(range(0, len(names), each)):
        members = {}
        for i, name in enumerate(names[start : start + each], start=start):
            label = classes.index(name.partition("/")[0])
            members[f"part.{number}/{i:05d}.jpg"] = files[name]
            if json_label:
                members[f"part.{number}/{i:05d}.json"] = json.dumps({"label": label}).encode()
            else:
                members[f"part.{number}/{i:05d}.cls"] = str(label).encode()
        tar_of(folder / f"train-{number:04d}.tar", members)
    return folder


def every_form(root: Path, files: dict[str, bytes]) -> dict[str, tuple[str, str | None]]:
    """Return {form: (source, split)} of the same images, in the order of files {"class/name.JPEG": bytes}."""
    classes = sorted(by_class(files))
    labels = [classes.index(name.partition("/")[0]) for name in files]
    folder = class_folders(root / "folder", files)
    rows = [{"path": f"folder/{name}", "label": label} for name, label in zip(files, labels)]
    with open(root / "table.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, ["path", "label"])
        writer.writeheader()
        writer.writerows(rows)
    (root / "table.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    named = "".join(f"folder/{name},{name.partition('/')[0]}\n" for name in files)
    (root / "named.csv").write_text("file,class\n" + named)
    cells = [{"bytes": data, "path": name} for name, data in files.items()]
    pq.write_table(pa.table({"image": cells, "label": labels}), root / "x.parquet", row_group_size=50)
    shards(root / "wds", files)
    shards(root / "wds-json", files, json_label=True)
    last = (len(files) - 1) // 7
    return {
        "folder": (str(folder), None),
        "train tar": (str(train_tar(root / "tars/ILSVRC2012_img_train.tar", files)), None),
        "validation tar": (str(validation_tar(root / "tars", files)), None),
        "folder of ILSVRC's tars, val": (str(root / "tars"), "validation"),
        "folder of ILSVRC's tars, train": (str(root / "tars"), None),
        "tar of class folders": (
            str(tar_of(root / "plain.tar", {f"./{n}": d for n, d in files.items()})),
            None,
        ),
        "WebDataset folder": (str(root / "wds"), None),
        "WebDataset range": (f"{root}/wds/train-{{0000..{last:04d}}}.tar", None),
        "WebDataset with JSON": (str(root / "wds-json"), "train"),
        "parquet": (str(root / "x.parquet"), None),
        "CSV of numbers": (str(root / "table.csv"), None),
        "CSV of names": (str(root / "named.csv"), None),
        "JSONL": (str(root / "table.jsonl"), None),
    }
