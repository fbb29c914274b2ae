"""Small picture sets in every layout that is read, from seeded synthetic pictures of mixed sizes and modes."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from dataclasses import dataclass
from pathlib import Path

import lmdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet
from PIL import Image

SYNSETS = ("n01440764", "n01443537", "n02105855", "n06596364", "n15075141")
PER_CLASS = 44
HUB_SHARDS, HUB_ROWS = 3, 16  # Parquet shards; rows of a row group
ORIENTATION = 0x0112  # the EXIF tag


@dataclass(frozen=True)
class Picture:
    synset: str
    stem: str  # n01440764_10026
    content: bytes

    @property
    def name(self) -> str:
        return f"{self.synset}/{self.stem}.JPEG"


def encode(image: Image.Image, **options) -> bytes:
    stream = io.BytesIO()
    image.save(stream, **{"format": "JPEG", "quality": 85} | options)
    return stream.getvalue()


def draw(generator: np.random.Generator, mode: str = "RGB") -> Image.Image:
    """A smooth texture with sides of 17 to 96 pixels."""
    width, height = generator.integers(17, 97, 2).tolist()
    coarse = generator.integers(256, size=(4, 5, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC).convert(mode)


def imagenet_pictures(seed: int = 0, per_class: int = PER_CLASS, synsets=SYNSETS) -> list[Picture]:
    """Pictures of each synset, sorted by synset and name; the second synset's first five are the awkward ones."""
    generator = np.random.default_rng(seed)
    pictures = []
    for synset in synsets:
        numbers = generator.choice(20_000, per_class, replace=False).tolist()  # of 1 to 5 digits, as in ImageNet
        for stem in sorted(f"{synset}_{number}" for number in numbers):
            pictures.append(Picture(synset, stem, encode(draw(generator))))
    for offset, content in enumerate(awkward(generator)):
        index = per_class + offset
        pictures[index] = Picture(pictures[index].synset, pictures[index].stem, content)
    return pictures


def awkward(generator: np.random.Generator) -> list[bytes]:
    """Grey, CMYK, EXIF orientation 6, a PNG to be named .JPEG, a truncated JPEG."""
    turned = Image.Exif()
    turned[ORIENTATION] = 6
    return [
        encode(draw(generator, "L")),
        encode(draw(generator, "CMYK")),
        encode(draw(generator), exif=turned),
        encode(draw(generator), format="PNG"),
        encode(draw(generator))[:-60],
    ]


# --- ImageNet: each writer makes one layout below the empty folder `root` -------------------------------------------


def write_tree(root: Path, pictures: list[Picture]) -> None:
    for picture in pictures:
        file = root / picture.name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(picture.content)


def write_split_tree(root: Path, pictures: list[Picture]) -> None:
    """train/ and val/, both with synset folders."""
    write_tree(root / "train", pictures)
    write_tree(root / "val", pictures[::7])


def write_kaggle(root: Path, pictures: list[Picture]) -> None:
    """With annotations in synset folders of their own, and flat validation pictures."""
    base = root / "ILSVRC"
    write_tree(base / "Data" / "CLS-LOC" / "train", pictures)
    for picture in pictures[::11]:
        for file in (
            base / "Annotations" / "CLS-LOC" / "train" / picture.synset / f"{picture.stem}.xml",
            base / "Data" / "CLS-LOC" / "val" / f"ILSVRC2012_val_{picture.stem[10:]:0>8}.JPEG",
        ):
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(picture.content)


def write_nested_tar(root: Path, pictures: list[Picture]) -> None:
    """The official tar: members in no useful order."""
    with tarfile.open(root / "ILSVRC2012_img_train.tar", "w") as outer:
        for synset in sorted({picture.synset for picture in pictures}, key=lambda name: name[::-1]):
            add(outer, f"{synset}.tar", tar_bytes([p for p in reversed(pictures) if p.synset == synset]))


def write_synset_tars(root: Path, pictures: list[Picture]) -> None:
    """The official tar, unpacked half-way."""
    folder = root / "train"
    folder.mkdir()
    for synset in {picture.synset for picture in pictures}:
        content = tar_bytes([p for p in reversed(pictures) if p.synset == synset])
        (folder / f"{synset}.tar").write_bytes(content)


def write_parquet(root: Path, pictures: list[Picture], *, numbers=None, titles=(), named: bool = True) -> None:
    """Shuffled hub shards of the training split beside an unlabelled test split.

    `numbers` are the labels to write, in the order of `pictures`; without `named` the paths have no synset.
    """
    labels = class_numbers(pictures) if numbers is None else numbers
    rows = [
        {
            "image": {"bytes": p.content, "path": f"{p.stem}_{p.synset}.JPEG" if named else f"{k:05d}.jpg"},
            "label": label,
        }
        for k, (p, label) in enumerate(zip(pictures, labels, strict=True))
    ]
    order = np.random.default_rng(1).permutation(len(rows))
    (root / "data").mkdir()
    for shard, part in enumerate(np.array_split(order, HUB_SHARDS)):
        file = root / "data" / f"train-{shard:05d}-of-{HUB_SHARDS:05d}.parquet"
        write_hub_shard(file, [rows[k] for k in part], titles)
    unlabelled = [row | {"label": -1} for row in rows[:3]]
    write_hub_shard(root / "data" / "test-00000-of-00001.parquet", unlabelled, titles)


def write_hub_shard(file: Path, rows: list[dict], titles=()) -> None:
    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    schema = pa.schema([("image", image), ("label", pa.int64())])
    if titles:
        features = {"label": {"names": list(titles), "_type": "ClassLabel"}}
        schema = schema.with_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    pyarrow.parquet.write_table(pa.Table.from_pylist(rows, schema), file, row_group_size=HUB_ROWS)


def write_webdataset(root: Path, pictures: list[Picture]) -> None:
    """Three shuffled shards of the training split, one of the validation split."""
    labels = class_numbers(pictures)
    order = np.random.default_rng(2).permutation(len(pictures))
    parts = {f"imagenet1k-train-{k:04d}.tar": part for k, part in enumerate(np.array_split(order, 3))}
    parts["imagenet1k-validation-00.tar"] = order[:5]
    for file, part in parts.items():
        with tarfile.open(root / file, "w") as tar:
            for k in part:
                add(tar, f"{pictures[k].stem}.cls", str(labels[k]).encode())
                add(tar, f"{pictures[k].stem}.jpg", pictures[k].content)


LAYOUTS = {
    "synset folders": write_tree,
    "train and val folders": write_split_tree,
    "Kaggle": write_kaggle,
    "tar of tars": write_nested_tar,
    "synset tars": write_synset_tars,
    "Parquet": write_parquet,
    "WebDataset": write_webdataset,
}


def class_numbers(pictures: list[Picture]) -> list[int]:
    synsets = sorted({picture.synset for picture in pictures})
    return [synsets.index(picture.synset) for picture in pictures]


def add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


def tar_bytes(pictures: list[Picture]) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as tar:
        for picture in pictures:
            add(tar, f"{picture.stem}.JPEG", picture.content)
    return stream.getvalue()


# --- LSUN -----------------------------------------------------------------------------------------------------------


def lsun_pictures(count: int = 60, seed: int = 0, form: str = "WEBP", style: str = "hex") -> dict[bytes, bytes]:
    """Key -> encoded picture; keys of 40 hex digits or, with style `sized`, of pictures resized to 256."""
    generator = np.random.default_rng(seed)
    keys = [
        f"256-{k:07d}" if style == "sized" else hashlib.sha1(f"{seed} {k}".encode()).hexdigest() for k in range(count)
    ]
    return {key.encode(): encode(draw(generator), format=form) for key in keys}


def write_lmdb(folder: Path, entries: dict[bytes, bytes]) -> Path:
    """A database with exactly these entries at `folder`, made anew."""
    folder.mkdir(parents=True, exist_ok=True)
    for file in folder.iterdir():
        file.unlink()
    with lmdb.open(str(folder), map_size=2**28) as environment, environment.begin(write=True) as transaction:
        for key, value in entries.items():
            transaction.put(key, value)
    return folder


# --- in other processes ---------------------------------------------------------------------------------------------


def read_all(images) -> list[bytes]:
    return [images.read(index) for index in range(len(images))]


def open_and_read(open_images, root: Path, cache: Path) -> list[bytes]:
    return read_all(open_images(root, cache, progress=False))


def has(warnings, text: str) -> bool:
    """Whether one of the warnings says so."""
    return any(text in warning for warning in warnings)


def index_file(cache: Path) -> Path:
    """The one file in the folder of indexes."""
    (file,) = cache.iterdir()
    return file
