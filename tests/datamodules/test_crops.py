"""Crops: bit for bit those of the published code, whatever the size; a damaged file is refused by name.

The reference below computes Pillow's resize from its definition, in NumPy alone. `tests/golden/crops.npz` is its
`reference_arrays()`: whole squares of small targets, the SHA-256 of larger ones.
"""

from __future__ import annotations

import hashlib
import io
import math
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from golden_recipe import golden
from PIL import Image, ImageFile
from PIL.Image import Resampling

from datamodules.crops import RULES, crop, decode

# name -> file format, Pillow's mode, width, height, target
STORED = {
    "landscape": ("PNG", "RGB", 101, 67, 48),
    "halved-thrice": ("PNG", "RGB", 437, 263, 32),
    "halved-even": ("PNG", "RGB", 192, 136, 32),
    "square": ("PNG", "RGB", 97, 97, 32),
    "of-the-target": ("PNG", "RGB", 71, 48, 48),
    "tall": ("PNG", "RGB", 41, 333, 32),
    "wide": ("PNG", "RGB", 333, 13, 32),
    "small": ("PNG", "RGB", 19, 23, 48),
    "grey": ("PNG", "L", 83, 120, 32),
    "grey-alpha": ("PNG", "LA", 90, 61, 32),
    "alpha": ("PNG", "RGBA", 77, 53, 48),
    "palette": ("PNG", "P", 130, 99, 48),
    "cmyk": ("TIFF", "CMYK", 65, 80, 32),
    "imagenet": ("PNG", "RGB", 500, 375, 256),
    "imagenet-portrait": ("PNG", "RGB", 375, 500, 256),
    "imagenet-odd": ("PNG", "RGB", 1025, 687, 256),
}

# --- the reference ---------------------------------------------------------------------------------------------------


def box(x):
    return 1.0 if -0.5 < x <= 0.5 else 0.0


def bicubic(x):
    """Keys' cubic with a = -0.5."""
    a, x = -0.5, abs(x)
    if x < 1:
        return ((a + 2) * x - (a + 3)) * x * x + 1
    return (((x - 5) * x + 8) * x - 4) * a if x < 2 else 0.0


def resize_rows(pixels, length, kernel, support):
    """uint8 (n,m,3) -> (length,m,3): weights of 22 bits, sums rounded half up to bytes."""
    if length == len(pixels):
        return pixels
    scale = len(pixels) / length
    stretch = max(scale, 1.0)
    rows = []
    for row in range(length):
        centre = (row + 0.5) * scale
        first = max(int(centre - support * stretch + 0.5), 0)
        stop = min(int(centre + support * stretch + 0.5), len(pixels))
        weights = [kernel((at - centre + 0.5) * (1 / stretch)) for at in range(first, stop)]
        total = 0.0
        for weight in weights:
            total += weight
        fixed = [int(math.copysign(0.5, weight) + weight / total * 2**22) for weight in weights]
        sums = np.tensordot(np.array(fixed, np.int64), pixels[first:stop].astype(np.int64), 1)
        rows.append(np.clip((sums + 2**21) >> 22, 0, 255).astype(np.uint8))
    return np.stack(rows)


def resize(pixels, width, height, kernel, support):
    """Horizontally, then vertically."""
    across = resize_rows(pixels.swapaxes(0, 1), width, kernel, support).swapaxes(0, 1)
    return resize_rows(across, height, kernel, support)


def centre(pixels, size):
    top, left = (pixels.shape[0] - size) // 2, (pixels.shape[1] - size) // 2
    return pixels[top : top + size, left : left + size]


def square(pixels, rule, size, resize=resize):
    """The three rules as their papers' code has them, on uint8 (H,W,3)."""
    height, width = pixels.shape[:2]
    if rule == "ldm":
        return resize(centre(pixels, min(height, width)), size, size, bicubic, 2)
    if rule == "adm_lsun":
        scale = size / min(height, width)
        return centre(resize(pixels, round(scale * width), round(scale * height), box, 0.5), size)
    while min(height, width) >= 2 * size:
        height, width = height // 2, width // 2
        pixels = resize(pixels, width, height, box, 0.5)
    scale = size / min(height, width)
    return centre(resize(pixels, round(width * scale), round(height * scale), bicubic, 2), size)


def noise(key, *shape):
    """Seeded bytes."""
    words = np.random.Philox(key=key).random_raw(math.prod(shape) // 8 + 1)
    return words.view(np.uint8)[: math.prod(shape)].reshape(shape)


def stored(name):
    """The raw values of a case of STORED: noise over a coarse pattern, as large as the mode has channels."""
    _, mode, width, height, _ = STORED[name]
    key, channels = list(STORED).index(name), len(Image.new(mode, (1, 1)).getbands())
    coarse = noise(100 + key, -(-height // 7), -(-width // 7), channels).repeat(7, 0).repeat(7, 1)[:height, :width]
    return np.where(noise(200 + key, height, width, channels) < 128, noise(key, height, width, channels), coarse)


def in_rgb(values, mode):
    """Stored values (H,W,C) -> (H,W,3): alpha dropped, palettes looked up, CMYK multiplied out in bytes."""
    if mode in ("L", "LA"):
        return values[..., :1].repeat(3, 2)
    if mode == "P":
        return PALETTE[values[..., 0]]
    if mode == "CMYK":
        light = 255 - values[..., 3:].astype(int)
        product = values[..., :3] * light + 128
        return (light - ((product + (product >> 8)) >> 8)).clip(0, 255).astype(np.uint8)
    return values[..., :3]


PALETTE = noise(99, 256, 3)


def reference_arrays():
    arrays = {}
    for name, (_, mode, _, _, size) in STORED.items():
        for rule in RULES:
            result = square(in_rgb(stored(name), mode), rule, size)
            arrays[f"{name}.{rule}"] = result if size < 64 else sha256(result)
    return arrays


def sha256(pixels):
    return np.array(hashlib.sha256(np.ascontiguousarray(pixels).tobytes()).hexdigest())


# --- crops -----------------------------------------------------------------------------------------------------------


def encoded(image, file_format, **options):
    file = io.BytesIO()
    image.save(file, file_format, **options)
    return file.getvalue()


def file_of(name):
    """The bytes of a case of STORED as a file, lossless."""
    file_format, mode, width, height, _ = STORED[name]
    image = Image.frombytes(mode, (width, height), stored(name).tobytes())
    if mode == "P":
        image.putpalette(PALETTE.tobytes())
    return encoded(image, file_format)


def noise_image(key, width, height):
    return Image.fromarray(noise(key, height, width, 3))


def photograph(width, height, mode="RGB", **options):
    """A JPEG of smooth colours with a little grain."""
    coarse = noise_image(1, width // 16 + 2, height // 16 + 2).resize((width, height), Resampling.BICUBIC)
    grain = noise(2, height, width, 3) % 16
    return encoded(Image.fromarray(np.asarray(coarse) // 16 * 15 + grain).convert(mode), "JPEG", quality=90, **options)


def pillow_in_two(pixels, width, height, kernel, _):
    image = Image.fromarray(pixels)
    return np.asarray(image.resize((width, image.height), FILTERS[kernel]).resize((width, height), FILTERS[kernel]))


def pillow(pixels, width, height, kernel, _):
    return np.asarray(Image.fromarray(pixels).resize((width, height), FILTERS[kernel]))


FILTERS = {box: Resampling.BOX, bicubic: Resampling.BICUBIC}


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", STORED)
def test_crops_of_every_mode_are_the_golden_ones(name, rule):
    result = crop(decode(file_of(name), name), rule, STORED[name][-1])
    expected = golden("crops")[f"{name}.{rule}"]
    np.testing.assert_array_equal(result if expected.ndim else sha256(result), expected)


def test_the_golden_arrays_are_the_references():
    arrays, expected = reference_arrays(), golden("crops")
    assert arrays.keys() == expected.keys()
    for key, array in arrays.items():
        np.testing.assert_array_equal(array, expected[key], err_msg=key)


@pytest.mark.parametrize("rule", RULES)
def test_crops_equal_pillows_resizes_at_any_size(rule):
    """Sides of 1 to 700 pixels: all aspect ratios, targets below and above, odd and even halvings."""
    rng = np.random.Generator(np.random.Philox(3))
    for key in range(150):
        width, height = np.exp(rng.uniform(0, math.log(700), 2)).astype(int).tolist()
        size = min(int(rng.integers(1, 130)), 8000 * min(width, height) // max(width, height))  # bounds the reference
        image = noise_image(key, width, height)
        expected = square(np.asarray(image), rule, size, pillow_in_two)
        np.testing.assert_array_equal(crop(image, rule, size), expected, err_msg=f"{width}x{height} to {size}")


@pytest.mark.parametrize("rule", RULES)
def test_crops_equal_pillows_own_order_of_passes_unless_the_image_is_tall(rule):
    rng = np.random.Generator(np.random.Philox(4))
    for key in range(60):
        width = int(rng.integers(20, 500))
        height, size = int(width * rng.uniform(0.3, 1.8)), int(rng.integers(8, 200))
        image = noise_image(key, width, height)
        expected = square(np.asarray(image), rule, size, pillow)
        np.testing.assert_array_equal(crop(image, rule, size), expected, err_msg=f"{width}x{height} to {size}")


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("width, height", [(500, 375), (333, 500), (640, 514), (1024, 768), (256, 341), (160, 120)])
def test_photographs_at_256_are_those_of_the_plain_procedure(width, height, rule):
    file = photograph(width, height)
    with Image.open(io.BytesIO(file)) as opened:
        expected = square(np.asarray(opened.convert("RGB")), rule, 256, pillow)
    np.testing.assert_array_equal(crop(decode(file, "photograph"), rule, 256), expected)


def test_a_very_long_image_is_never_resized_as_a_whole():
    image = Image.new("RGB", (6000, 2), (1, 2, 3))  # 768,000 columns at 256
    assert (crop(image, "adm_imagenet", 256) == (1, 2, 3)).all()


@pytest.mark.parametrize("rule, size", [("center", 32), ("adm_imagenet", 0)])
def test_an_impossible_crop_is_refused(rule, size):
    words = (
        "no crop rule 'center'. Choose one of adm_imagenet, adm_lsun, ldm" if size else "is 0; it must be at least 1"
    )
    with pytest.raises(ValueError, match=words):
        crop(Image.new("RGB", (64, 64)), rule, size)


# --- decode ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["L", "CMYK", "RGB"])
def test_jpegs_come_as_pillow_converts_them(mode):
    file = photograph(60, 44, mode)
    with Image.open(io.BytesIO(file)) as opened:
        assert opened.mode == mode
        expected = np.asarray(opened.convert("RGB"))
    image = decode(file, "photograph.JPEG")
    assert image.mode == "RGB"
    np.testing.assert_array_equal(np.asarray(image), expected)


def test_the_content_decides_the_format():
    image = noise_image(0, 31, 17)
    np.testing.assert_array_equal(np.asarray(decode(encoded(image, "PNG"), "n02105855_2933.JPEG")), np.asarray(image))


def test_exif_orientation_is_ignored():
    exif = Image.Exif()
    exif[0x0112] = 6  # Orientation: turn by 90 degrees
    turned, plain = (np.asarray(decode(photograph(60, 44, **extra), "a")) for extra in ({"exif": exif}, {}))
    assert turned.shape == (44, 60, 3)
    np.testing.assert_array_equal(turned, plain)


@pytest.fixture(params=[False, True], ids=["strict", "tolerant"])
def tolerant(request, monkeypatch):
    """Pillow's process-wide switch, as another library may have set it."""
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", request.param)
    return request.param


FORMATS = {
    "JPEG": {},
    "JPEG, progressive": {"progressive": True},
    "PNG": {},
    "WEBP": {},
    "WEBP, lossless": {"lossless": True},
}


@pytest.mark.parametrize("variant", FORMATS)
def test_a_truncated_file_is_refused_unless_all_its_pixels_are_there(tolerant, variant):
    file = encoded(noise_image(0, 61, 47), variant.split(",")[0], **FORMATS[variant])
    whole = np.asarray(decode(file, "whole"))
    for end in [*range(0, len(file) - 30, 83), *range(len(file) - 30, len(file))]:
        try:
            image = decode(file[:end], "n01/a.JPEG")
        except ValueError as error:
            assert str(error).startswith("n01/a.JPEG cannot be decoded: ") and str(error).endswith(".")
        else:
            assert variant == "PNG" and end >= len(file) - 20  # checksums and the end mark
            np.testing.assert_array_equal(np.asarray(image), whole)
    assert tolerant == ImageFile.LOAD_TRUNCATED_IMAGES


def test_a_damaged_png_is_refused(tolerant):
    file = bytearray(encoded(noise_image(0, 64, 64), "PNG"))
    file[len(file) // 2 :: 97] = bytes(len(file[len(file) // 2 :: 97]))
    with pytest.raises(ValueError, match=r"row 7 cannot be decoded: .*\w\.$"):
        decode(bytes(file), "row 7")


@pytest.mark.parametrize("data", [b"", b"404: Not Found"])
def test_a_file_of_something_else_is_refused(data):
    with pytest.raises(ValueError, match=rf"^a\.JPEG cannot be decoded: its {len(data)} bytes are no image"):
        decode(data, "a.JPEG")


def test_threads_decode_strictly_and_leave_pillow_as_it_was(monkeypatch):
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    file = photograph(200, 150)

    def refused(end):
        try:
            return not decode(file[:end], "a")
        except ValueError:
            return True

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(refused, range(2000, len(file) - 1, 50)))
    assert ImageFile.LOAD_TRUNCATED_IMAGES is True
