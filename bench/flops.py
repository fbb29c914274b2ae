"""Gflops and parameters of backbones, beside what their papers print.

gflops: 1e9 multiply-adds (a multiply and its add are one), one image, one unguided forward, backbone only, as in the
DiT and U-ViT tables; `opcounter.py` has the rules. The counters that papers use see no FFT and no S4D kernel, so
`gflops_weights`, which leaves both out, is what is held against published values. An S4D kernel depends on the
parameters alone, and a forward of one image pays for all of it; in a batch, or cached in sampling, it costs less.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from bench import registry
from bench.config import model_config
from bench.errors import UserError
from bench.merging import parse_overrides
from bench.opcounter import count_ops
from bench.tables.published import PrintedGflops, printed_gflops
from models.base import BackboneSpec

LATENT_FACTOR = 8  # image side / latent side of the Stable Diffusion autoencoder
MAX_RESOLUTION = 65_536  # image side; the attention of one image far above it has more elements than 64 bits address
RESOLUTIONS = (128, 256, 512, 1024)  # image sides of the figure
PUBLISHED_RESOLUTIONS = (256, 512)  # image sides of the papers' latents
# Lines of the figure: label, architecture, its settings (DiffuSSM, Fig. 3: patches against the hourglass).
SERIES: tuple[tuple[str, str, dict[str, Any]], ...] = (
    *((f"DiT-XL, patch {patch}", "dit", {"size": "XL/2", "patch_size": patch}) for patch in (1, 2, 4)),
    *((f"DiffuSSM-XL, M = {ratio}", "diffussm", {"size": "XL", "M": ratio}) for ratio in (1, 2, 4)),
)


@dataclass(frozen=True)
class GflopsReport:
    """Cost of one unguided forward of one image, and the size of the backbone that ran it."""

    parts: dict[str, float]  # gflops: linear, attention, convolution, ssm_kernel, fft
    params_m: float  # trainable parameters, millions
    params_total_m: float  # all that a checkpoint stores; DiT's Table 4 counts its frozen positions

    @property
    def gflops(self) -> float:
        return sum(self.parts.values())

    @property
    def gflops_weights(self) -> float:
        """Without S4D kernels and FFTs, as the counters behind published values see it."""
        return self.gflops - self.parts["ssm_kernel"] - self.parts["fft"]


class CostRow(NamedTuple):
    """A named size at an image resolution, beside what its paper prints."""

    model: str  # such as DiT-XL/2
    resolution: int
    report: GflopsReport
    published: float | None  # gflops
    note: str

    @property
    def deviation(self) -> float | None:
        """`gflops_weights` against published, relative."""
        return self.report.gflops_weights / self.published - 1 if self.published else None


def count(name: str, config: Any, spec: BackboneSpec) -> GflopsReport:
    """Count the backbone of models/<name>.py.

    Raises: UserError for an unknown name, a latent size that the backbone refuses, or an op of unknown cost.
    """
    architecture = registry.architecture(name)
    with torch.device("meta"):
        try:
            backbone = architecture.backbone(config, spec)
        except ValueError as error:
            raise UserError(str(error)) from None
        x = torch.empty(1, spec.in_channels, spec.latent_size, spec.latent_size)
        labels = torch.zeros(1, dtype=torch.int64) if spec.num_classes else None
        parts = count_ops(backbone, x, torch.zeros(1), labels)
    trainable = sum(p.numel() for p in backbone.parameters() if p.requires_grad)
    stored = sum(value.numel() for value in backbone.state_dict().values())
    return GflopsReport({part: n / 1e9 for part, n in parts.items()}, trainable / 1e6, stored / 1e6)


def published_spec(name: str, config: Any, resolution: int) -> BackboneSpec:
    """ImageNet latents of `resolution` x `resolution` images, with learned variance where the paper has it."""
    if resolution < LATENT_FACTOR or resolution % LATENT_FACTOR:
        raise UserError(f"A resolution of {resolution} has no latents: it must be a multiple of {LATENT_FACTOR}.")
    if resolution > MAX_RESOLUTION:
        raise UserError(f"A resolution of {resolution} is not counted; give at most {MAX_RESOLUTION}.")
    learn_sigma = registry.architecture(name).module.recipe_for(config).process.learn_sigma
    return BackboneSpec(latent_size=resolution // LATENT_FACTOR, learn_sigma=learn_sigma)


def published() -> dict[tuple[str, str, int], PrintedGflops]:
    """(architecture name, size, resolution) -> what configs/published.csv has for a forward of it."""
    found = {}
    for name in registry.names("models"):
        architecture = registry.architecture(name)
        for size in architecture.sizes:
            for resolution in PUBLISHED_RESOLUTIONS:
                if printed := printed_gflops(f"{architecture.title}-{size}", resolution):
                    found[name, size, resolution] = printed
    return found


def rows(models: Sequence[str] = (), resolutions: Sequence[int] = (), overrides: Sequence[str] = ()) -> list[CostRow]:
    """One row per model ("dit", every size, or "dit/XL/2") and resolution; no models: every published size.

    Resolutions default to the published ones of a size, else 256. Overrides such as "model.M=4" change every row,
    which then has nothing published beside it. Raises: UserError for an unknown name, size or setting.
    """
    settings = parse_overrides(overrides)
    if set(settings) - {"model"}:
        raise UserError(f"{' '.join(overrides)}: only model.<setting>=<value> changes the cost of a forward.")
    printed = published()
    for model in models:
        if model.startswith("/") or model.endswith("/"):
            raise UserError(f"'{model}' lacks a name or a size. Give an architecture, such as dit, or dit/XL/2.")
    wanted = [model.partition("/")[::2] for model in models] or list(dict.fromkeys(key[:2] for key in printed))
    result = []
    for name, named_size in wanted:
        architecture = registry.architecture(name)
        for size in [named_size] if named_size else architecture.sizes:
            values = {"size": size, **settings.get("model", {})}
            config = model_config(architecture, [("command line", {"model": values})])
            known = [key[2] for key in printed if key[:2] == (name, size) and not settings]
            for resolution in resolutions or known or [256]:
                report = count(name, config, published_spec(name, config, resolution))
                row = printed[name, size, resolution] if resolution in known else None
                gflops, note = (row.gflops, row.note) if row else (None, "")
                result.append(CostRow(f"{architecture.title}-{size}", resolution, report, gflops, note))
    return result


def render(table: Sequence[CostRow]) -> str:
    """A table for the terminal, its convention and its notes below."""
    line = "{:<16} {:>10} {:>9} {:>9} {:>10} {:>8} {:>9} {:>9}".format
    lines = [line("model", "resolution", "params M", "Gflops", "SSM kernel", "FFT", "published", "deviation")]
    for row in table:
        report, parts = row.report, row.report.parts
        costs = [f"{value:.3f}" for value in (report.params_m, report.gflops, parts["ssm_kernel"], parts["fft"])]
        beside = [f"{row.published:.2f}", f"{row.deviation:+.2%}"] if row.published else ["-", "-"]
        lines.append(line(row.model, row.resolution, *costs, *beside))
    lines += [
        "",
        "Gflops: 1e9 multiply-adds, one image, one unguided forward; norms, softmax and elementwise not counted.",
        "Deviation from published: of Gflops less SSM kernel and FFT, which the papers' counters do not see.",
        *dict.fromkeys(row.note for row in table if row.note),
    ]
    return "\n".join(lines)


def resolution_series(resolutions: Sequence[int] = RESOLUTIONS) -> list[tuple[str, list[tuple[int, float]]]]:
    """(label, [(image side, gflops)]) of every line of `SERIES`."""
    result = []
    for label, name, settings in SERIES:
        config = registry.architecture(name).config(**settings)
        points = [(side, count(name, config, published_spec(name, config, side)).gflops) for side in resolutions]
        result.append((label, points))
    return result


def print_table(models: Sequence[str], resolutions: Sequence[int] | None, overrides: Sequence[str]) -> None:
    """The command `flops`: `rows` rendered to the terminal."""
    print(render(rows(models, resolutions or (), overrides)))


def write_figure(path: Path) -> None:
    """The command `flops --figure`: Gflops against resolution as PNG, PDF or SVG, by the suffix of `path`."""
    from bench.reports.figures import gflops_against_resolution  # matplotlib loads here
    from bench.reports.plotting import require_format, save

    require_format(path)
    save(gflops_against_resolution(resolution_series()), path)
    print(path)
