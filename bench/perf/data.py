"""How fast the data arrive: `python -m bench perf data`. Caches and pictures are made up, and removed at the end.

Shapes: B batch, 4x32x32 latents as of images of 256 pixels, moments (8,32,32): mean, then log variance.
"""

from __future__ import annotations

import atexit
import importlib
import importlib.util
import io
import json
import shutil
import tempfile
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from bench.console import say
from datamodules.base import LatentDataModule, float32, permutation
from datamodules.cache import LABELS, MANIFEST, CacheMeta, LatentCache, file_sha256
from datamodules.crops import crop, decode
from datamodules.prepare import prepare_cache

if TYPE_CHECKING:
    from bench.perf.perf import Duel  # which imports this module

COUNT, BATCH = 4096, 64
LATENT = (4, 32, 32)
LOGVAR = -30.0  # the least that an autoencoder gives: two posterior samples agree to 1e-6, and cost what others cost
SIDE, PHOTO = 256, (500, 375)  # pixels: of the cropped square; width and height of a middling ImageNet picture

Epoch = Sequence[tuple[Any, ...]]  # batches of (rows (B,), one or more arrays (B,C,H,W) float32)

# --- cached latents --------------------------------------------------------------------------------------------------


def gather(count: int = COUNT) -> list[Duel]:
    """Moments by row out of the cache, as they are kept and as float32, five epochs; the last batch is compared.

    A cache as small as this one is read whole; larger ones are memory-mapped shard by shard.
    """
    from bench.perf.perf import Duel

    path, moments = random_cache(count)
    cache, mapped, batches = LatentCache(path), LatentCache(path, read_whole=0), np.tile(_batches(count), (5, 1))
    moments.tofile(path / "moments.raw")
    raw = np.memmap(path / "moments.raw", np.float16, "r", shape=moments.shape)

    def ours(cache: LatentCache) -> Tensor:
        for rows in batches:
            moments = cache.moments(rows)
        return _channels(moments)

    def ours_converted() -> Tensor:
        for rows in batches:
            moments = float32(cache.moments(rows))
        return _channels(moments)

    def bare() -> Tensor:
        for rows in batches:
            batch = raw[rows]
        return torch.from_numpy(batch)

    def bare_converted() -> Tensor:
        for rows in batches:
            batch = torch.from_numpy(raw[rows]).float()
        return batch

    note = f", {len(batches)} batches of {BATCH}"
    return [
        Duel(name, peer, one, other, _largest, "largest difference", note)
        for name, peer, one, other in (
            ("gather", "numpy memmap of one file", partial(ours, cache), bare),
            ("gather, mapped", "the same", partial(ours, mapped), bare),
            ("gather, float32", "the same, made float32", ours_converted, bare_converted),
        )
    ]


def npy(count: int = COUNT) -> list[Duel]:
    """One file per sample, as fast-DiT and U-ViT keep their features."""
    path, moments = random_cache(count)
    for row, sample in enumerate(moments):
        np.save(path / f"{row}.npy", sample)

    class Files(Dataset):
        def __len__(self) -> int:
            return count

        def __getitem__(self, row: int) -> tuple[np.ndarray, int]:
            return np.load(path / f"{row}.npy"), row

    return _against("npy", "one npy file per sample", path, lambda: DataLoader(Files(), BATCH, shuffle=True))


def litdata(count: int = COUNT) -> list[Duel]:
    """Lightning's streaming format, shuffled as it does that; an extra of the developers."""
    if importlib.util.find_spec("litdata") is None:
        say("litdata is not installed, so it is not measured. Add it with: pip install litdata")
        return []
    peer: Any = importlib.import_module("litdata")
    writers: Any = importlib.import_module("litdata.streaming.writer")
    path, moments = random_cache(count)

    def loader(folder: Path) -> Iterable[Any]:
        stream = peer.StreamingDataset(str(folder), shuffle=True)
        return peer.StreamingDataLoader(stream, batch_size=BATCH, num_workers=0)

    duels = []
    for form, given in (("array", np.asarray), ("tensor", torch.from_numpy)):  # it is far faster at arrays
        writer = writers.BinaryWriter(str(path / form), chunk_bytes=2**26)
        for row, sample in enumerate(moments):
            writer[row] = (given(sample), row)
        writer.done()
        writer.merge()
        duels += _against(f"litdata {form}", f"litdata of {form}s", path, partial(loader, path / form))
    return duels


def _against(name: str, peer: str, path: Path, loader: Callable[[], Iterable[Any]]) -> list[Duel]:
    """An epoch of the cache at `path` beside the same out of `loader()`: moments (B,8,32,32) float16, rows (B,)."""
    from bench.perf.perf import Duel

    cache, module = LatentCache(path), LatentDataModule(path, batch_size=BATCH)
    batches = _batches(cache.count)

    def read() -> Epoch:
        return [(rows, _channels(float32(cache.moments(rows)))) for rows in batches]

    def read_theirs() -> Epoch:
        return [(rows, moments.float()) for moments, rows in loader()]

    def train() -> Epoch:
        return [(batch.labels, batch.latents) for batch in islice(module.loader(), len(batches))]

    def train_theirs() -> Epoch:
        epoch = []
        for moments, rows in loader():
            mean, logvar = moments.float().chunk(2, dim=1)
            epoch.append((rows, mean + torch.exp(0.5 * logvar) * torch.randn_like(mean)))
        return epoch

    note = f", {len(batches)} batches of {BATCH}, no workers"
    unit = "largest difference"
    return [
        Duel(f"{name} read", peer, read, read_theirs, _epochs_apart, unit, note),
        Duel(f"{name} train", f"{peer} + randn", train, train_theirs, _epochs_apart, unit, note),
    ]


def first_batch(shards: int = 1251) -> list[Duel]:
    """From nothing to the first batch of 1,281,024 images: sparse files, as large as those of ImageNet at 256."""
    from bench.perf.perf import Duel

    path = _sparse_cache(shards)
    count = LatentCache(path).count
    with (path / "moments.raw").open("wb") as file:
        file.truncate(count * 2 * 2 * int(np.prod(LATENT)))

    def ours() -> tuple[LatentDataModule, Any]:
        permutation.cache_clear()
        module = LatentDataModule(path, batch_size=BATCH)
        return module, next(iter(module.loader()))

    def theirs() -> Tensor:
        raw = np.memmap(path / "moments.raw", np.float16, "r", shape=(count, 2 * LATENT[0], *LATENT[1:]))
        rows = np.random.default_rng(0).permutation(count)[:BATCH]
        mean, logvar = torch.from_numpy(raw[rows]).float().chunk(2, dim=1)
        torch.randn_like(logvar)
        return mean

    def apart(first: tuple[LatentDataModule, Any], mean: Tensor) -> float:
        module, batch = first
        return _largest(torch.from_numpy(module.cache.moments(batch.labels.numpy())[:, 0]), mean)  # its labels are rows

    peer = "numpy memmap of one file, a permutation and randn"
    return [
        Duel("first batch", peer, ours, theirs, apart, "largest difference of means", f", cache of {count:,} images")
    ]


def random_cache(count: int) -> tuple[Path, np.ndarray]:
    """A cache whose labels are the row numbers, in a folder of its own -> folder, moments (count,8,32,32) float16."""
    channels, *side = LATENT
    moments = np.random.default_rng(0).standard_normal((count, 2 * channels, *side), np.float32).astype(np.float16)
    moments[:, channels:] = LOGVAR
    samples = iter(torch.from_numpy(moments))

    def encode(images: Tensor) -> tuple[Tensor, Tensor]:
        mean, logvar = torch.stack(list(islice(samples, len(images)))).chunk(2, dim=1)
        return mean, logvar

    return _prepare(torch.arange(count), encode), moments


def _sparse_cache(shards: int, shard_rows: int = 1024) -> Path:
    """A cache of zeros that takes a shard's room: the others are holes behind copies of its header."""

    def encode(images: Tensor) -> tuple[Tensor, Tensor]:
        return torch.zeros(len(images), *LATENT), torch.zeros(len(images), *LATENT)

    path = _prepare(torch.zeros(shard_rows, dtype=torch.long), encode, shard_rows)
    manifest = json.loads((path / MANIFEST).read_text())
    (shard,) = manifest["shards"]
    with (path / shard["file"]).open("rb") as file:
        length = file.read(8)
        header = length + file.read(int.from_bytes(length, "little"))
    manifest["shards"] = [shard | {"file": f"moments-{k:05d}.safetensors"} for k in range(shards)]
    for entry in manifest["shards"][1:]:
        with (path / entry["file"]).open("wb") as file:
            file.write(header)
            file.truncate(entry["bytes"])
    np.save(path / LABELS, np.arange(shards * shard_rows))
    manifest |= {"count": shards * shard_rows, "num_classes": 0, "labels_sha256": file_sha256(path / LABELS)}
    (path / MANIFEST).write_text(json.dumps(manifest))
    return path


def _prepare(labels: Tensor, encode: Callable[[Tensor], tuple[Tensor, Tensor]], shard_rows: int | None = None) -> Path:
    path, count = _folder(), len(labels)
    unit, zero = (1.0,) * LATENT[0], (0.0,) * LATENT[0]
    meta = CacheMeta("perf", count, SIDE, "random", "none", "none", LATENT, unit, zero, dtype="float16")
    images = torch.zeros(count, 3, 1, 1, dtype=torch.uint8)
    prepare_cache(images, labels, encode, path, meta, shard_rows=shard_rows, progress=False)
    return path


def _channels(moments: np.ndarray) -> Tensor:
    """(B,2,C,H,W) -> (B,2C,H,W), as peers keep them"""
    return torch.from_numpy(moments).flatten(1, 2)


def _batches(count: int) -> np.ndarray:
    """Every row once, in a random order -> (count / BATCH, BATCH)"""
    return np.random.default_rng(1).permutation(count).reshape(-1, BATCH)


def _folder() -> Path:
    """Empty, and removed when the program ends."""
    folder = Path(tempfile.mkdtemp(prefix="isodiff-perf-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def _epochs_apart(ours: Epoch, theirs: Epoch) -> float:
    """Whatever the order; infinite if a row was seen twice or not at all."""
    (rows, one), (other_rows, other) = (_by_row(epoch) for epoch in (ours, theirs))
    return _largest(one, other) if torch.equal(rows, other_rows) else float("inf")


def _by_row(epoch: Epoch) -> tuple[Tensor, Tensor]:
    rows = torch.cat([torch.as_tensor(rows) for rows, *_ in epoch])
    values = torch.cat([torch.cat([torch.as_tensor(part) for part in parts], dim=1) for _, *parts in epoch])
    order = rows.argsort()
    return rows[order], values[order]


def _largest(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).abs().max())


# --- pictures --------------------------------------------------------------------------------------------------------


def crops(count: int = 32) -> list[Duel]:
    """JPEG file -> ADM's square, on one core. Peer: as ADM and DiT do it, all in Pillow."""
    from bench.perf.perf import Duel

    files = _photos(count)

    def ours() -> Tensor:
        return _squares(files)

    def theirs() -> Tensor:
        return torch.from_numpy(np.stack([_plain_square(file) for file in files]))

    def apart(one: Tensor, other: Tensor) -> float:
        return _largest(one.int(), other.int())

    width, height = PHOTO
    note = f", {count} JPEG files of {width}x{height}, {sum(map(len, files)) // count // 1000} kB each"
    return [Duel("JPEG to square", "Pillow's decoder and resize", ours, theirs, apart, "largest difference", note)]


def feeding(count: int = 2, coder: Any = None) -> list[Duel]:
    """Whether pictures arrive faster than the encoder takes them, both on this machine; `coder` is an Autoencoder."""
    from bench.perf.perf import Duel

    files = _photos(count)
    images = _squares(files).movedim(-1, 1)  # (B,3,256,256)
    coder = coder or _stable_diffusion()
    width, height = PHOTO
    return [
        Duel(
            "JPEG to encoder",
            "Stable Diffusion's encoder (random weights) taking such squares",
            lambda: _squares(files),
            lambda: coder.moments(images)[0],
            lambda ours, theirs: abs(len(ours) - len(theirs)),
            "difference in images",
            f", {count} images of {width}x{height}; one core reads, {torch.get_num_threads()} encode",
        )
    ]


def _photos(count: int) -> list[bytes]:
    """JPEG files of blurred colours under fine noise, about as large as photographs of that size."""
    rng, (width, height) = np.random.default_rng(2), PHOTO
    files = []
    for _ in range(count):
        coarse = Image.fromarray(rng.integers(0, 256, (height // 12, width // 12, 3), dtype=np.uint8))
        smooth = np.asarray(coarse.resize(PHOTO, Image.Resampling.BICUBIC), np.float32)
        pixels = smooth + rng.normal(0, 8, smooth.shape)
        stream = io.BytesIO()
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(stream, "JPEG", quality=92)
        files.append(stream.getvalue())
    return files


def _squares(files: Sequence[bytes]) -> Tensor:
    """-> (B,256,256,3) uint8"""
    return torch.from_numpy(np.stack([crop(decode(file, "a picture"), "adm_imagenet", SIDE) for file in files]))


def _plain_square(file: bytes) -> np.ndarray:
    """Halved by BOX, short side resized by BICUBIC, centre cut out -> (256,256,3) uint8"""
    image = Image.open(io.BytesIO(file)).convert("RGB")
    while min(image.size) >= 2 * SIDE:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = SIDE / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - SIDE) // 2, (image.height - SIDE) // 2
    return np.array(image)[top : top + SIDE, left : left + SIDE]


def _stable_diffusion() -> Any:
    from diffusers import AutoencoderKL

    from models.autoencoder import SD_CONFIG, stable_diffusion

    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(7)
        return stable_diffusion("sd-vae", AutoencoderKL(**SD_CONFIG))


DATA: dict[str, Callable[[], list[Duel]]] = {
    "gather": gather,
    "npy": npy,
    "litdata": litdata,
    "first_batch": first_batch,
    "crops": crops,
    "feeding": feeding,
}
