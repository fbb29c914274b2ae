"""Finished images: read from npz and PNG as they were written, block by block, and refused in one sentence."""

from __future__ import annotations

import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from metric_recipe import images
from PIL import Image

from bench.errors import UserError
from bench.scoring.images import NpzImages, open_images, write_npz

PIXELS = images(30, 7, 5, 4, 1)  # (30, 7, 5, 3) uint8


def as_tensor(pixels: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(pixels.copy()).permute(0, 3, 1, 2)


def png_folder(path: Path, pixels: np.ndarray) -> Path:
    path.mkdir()
    for i, image in enumerate(pixels):
        Image.fromarray(image).save(path / f"{i}.png")  # not padded: 10.png sorts before 2.png by characters
    return path


@pytest.mark.parametrize("kind", ["savez", "savez_compressed", "folder"])
def test_blocks_come_as_they_were_written_in_any_order(tmp_path, kind):
    path = tmp_path / "set.npz"
    if kind == "folder":
        path = png_folder(tmp_path / "folder", PIXELS)
    else:
        getattr(np, kind)(path, arr_0=PIXELS)
    given = open_images(path)
    assert (given.n, given.size) == (30, (7, 5))
    for block in (range(10, 13), range(0, 4), range(29, 30), range(4, 29)):
        read = given.read(block)
        assert read.dtype == torch.uint8
        assert torch.equal(read, as_tensor(PIXELS[block.start : block.stop]))


def test_the_same_pixels_have_the_same_hash_however_an_npz_stores_them(tmp_path):
    np.savez(tmp_path / "a.npz", PIXELS)
    np.savez_compressed(tmp_path / "b.npz", PIXELS)
    np.savez(tmp_path / "c.npz", PIXELS[::-1].copy())
    hashes = [open_images(tmp_path / f"{name}.npz").sha256() for name in "abc"]
    assert hashes[0] == hashes[1] != hashes[2]


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_reading_a_block_does_not_load_the_file(tmp_path, save):
    save(tmp_path / "large.npz", np.zeros((4000, 64, 64, 3), np.uint8))  # 49 MB
    tracemalloc.start()
    given = NpzImages(tmp_path / "large.npz")
    given.read(range(3990, 4000))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 36e6  # two reads of 16 MB to skip what comes before a compressed block


def test_written_in_blocks_equals_numpys_own_file(tmp_path):
    labels = np.arange(30)
    with (tmp_path / "blocks.npz").open("wb") as file:
        write_npz(file, 30, (PIXELS[i : i + 7] for i in range(0, 30, 7)), {"labels": labels})
    with np.load(tmp_path / "blocks.npz", allow_pickle=False) as read:
        np.testing.assert_array_equal(read["arr_0"], PIXELS)
        np.testing.assert_array_equal(read["labels"], labels)
    # ADM's evaluator opens the member itself and reads rows behind the header.
    with zipfile.ZipFile(tmp_path / "blocks.npz") as archive, archive.open("arr_0.npy") as member:
        assert np.lib.format.read_magic(member) == (1, 0)
        shape, fortran, dtype = np.lib.format.read_array_header_1_0(member)
        assert (shape, fortran, dtype) == ((30, 7, 5, 3), False, np.uint8)
        assert member.read() == PIXELS.tobytes()


def test_grey_and_palette_pngs_are_read_as_rgb(tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    Image.fromarray(PIXELS[0, ..., 0]).save(folder / "0.png")
    Image.fromarray(PIXELS[0]).quantize(256).save(folder / "1.png")
    read = open_images(folder).read(range(2))
    assert torch.equal(read[0], torch.from_numpy(PIXELS[0, ..., 0]).expand(3, 7, 5))
    assert torch.equal(read[1], as_tensor(np.asarray(Image.open(folder / "1.png").convert("RGB"))[None])[0])


def truncated(path: Path) -> None:
    np.savez(path, PIXELS)
    path.write_bytes(path.read_bytes()[:-400])


def shortened(path: Path) -> None:
    """A whole zip whose header promises more images than there are."""
    with zipfile.ZipFile(path, "w") as archive, archive.open("arr_0.npy", "w") as member:
        np.lib.format.write_array_header_1_0(member, {"descr": "|u1", "fortran_order": False, "shape": (30, 7, 5, 3)})
        member.write(PIXELS[:20].tobytes())


@pytest.mark.parametrize(
    "write, sentence",
    [
        (lambda path: np.savez(path, PIXELS.astype(np.float32)), "arr_0 is float32; .* uint8 .*Quantise them first"),
        (lambda path: np.savez(path, np.array([{}], dtype=object)), "pickled objects, which are never loaded"),
        (lambda path: np.savez(path, PIXELS[..., :1]), r"should be images \(N, H, W, 3\), it is \(30, 7, 5, 1\)"),
        (lambda path: np.savez(path, PIXELS.transpose(0, 3, 1, 2)), r"should be images \(N, H, W, 3\)"),
        (lambda path: np.savez(path, samples=PIXELS), "holds no arr_0, the key of the images; it holds samples"),
        (lambda path: path.write_bytes(b"not a zip"), "cannot be read as an npz"),
        (truncated, "cut off, or another kind of file"),
        (shortened, "is cut off: its header says 30 images"),
    ],
)
def test_what_is_no_set_of_images_is_named(tmp_path, write, sentence):
    write(tmp_path / "set.npz")
    with pytest.raises(UserError, match=sentence):
        open_images(tmp_path / "set.npz")


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("read", [NpzImages.sha256, lambda given: given.read(range(given.n))], ids=["sha256", "read"])
def test_a_changed_byte_is_told_with_the_file(tmp_path, save, read):
    path = tmp_path / "set.npz"
    pixels = images(40, 32, 32, 4, 1) // 64  # few values, so that compression changes their bytes
    save(path, pixels)
    whole = path.read_bytes()
    for place in (len(whole) * 3 // 4, len(whole) // 2 + 1):  # behind the block that is unpacked with the header
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 255]) + whole[place + 1 :])
        given = NpzImages(path)
        if save is np.savez and read is not NpzImages.sha256:
            assert (read(given) != as_tensor(pixels)).sum() == 1  # mapped, so not checked: the hash is taken first
        else:
            with pytest.raises(UserError, match=r"set\.npz is damaged: .*Copy or make it again\.$"):
                read(given)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_no_changed_byte_ends_in_a_traceback(tmp_path, save):
    path = tmp_path / "set.npz"
    save(path, np.zeros((2, 3, 2, 3), np.uint8))
    whole, told = path.read_bytes(), 0
    for place in range(len(whole)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 255]) + whole[place + 1 :])
        try:
            NpzImages(path).sha256()
        except UserError as error:
            assert str(path) in str(error)
            told += 1
    assert told > len(whole) / 2  # the others are dates, attributes and the like


def test_a_suffix_in_capitals_is_a_png_in_the_same_order(tmp_path):
    folder = png_folder(tmp_path / "folder", PIXELS)
    for i in (2, 10, 29):
        (folder / f"{i}.png").rename(folder / f"{i}.PNG")
    given = open_images(folder)
    assert given.n == 30
    assert torch.equal(given.read(range(30)), as_tensor(PIXELS))
    (folder / "010.png").write_bytes((folder / "0.png").read_bytes())  # the same number: told apart by the name
    assert [file.name for file in open_images(folder).files[9:13]] == ["9.png", "010.png", "10.PNG", "11.png"]
    Image.fromarray(PIXELS[0]).save(folder / "3.WEBP")
    with pytest.raises(UserError, match=r"3\.WEBP is compressed with loss"):
        open_images(folder)


def test_folders_that_cannot_be_scored_are_named(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        open_images(tmp_path / "nothing")
    (tmp_path / "list.txt").write_text("")
    with pytest.raises(UserError, match="is no npz and no folder"):
        open_images(tmp_path / "list.txt")
    with pytest.raises(UserError, match="holds no PNG files"):
        open_images(tmp_path)
    folder = png_folder(tmp_path / "folder", PIXELS[:3])
    Image.fromarray(PIXELS[0][:4]).save(folder / "1.png")
    with pytest.raises(UserError, match=r"1\.png is 5x4, 0\.png is 5x7"):
        open_images(folder).read(range(3))
    (folder / "2.png").write_bytes(b"\x89PNG torn")
    with pytest.raises(UserError, match=r"2\.png cannot be read as an image"):
        open_images(folder).read(range(2, 3))
    Image.fromarray(np.zeros((7, 5, 4), np.uint8)).save(folder / "0.png")
    with pytest.raises(UserError, match="mode RGBA"):
        open_images(folder)
    Image.fromarray(PIXELS[0]).save(folder / "3.jpg")
    with pytest.raises(UserError, match=r"3\.jpg is compressed with loss"):
        open_images(folder)
