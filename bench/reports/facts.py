"""What the report states in words: the protocol and what its terms mean, where the numbers come from, how to repeat."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from bench.reports.data import distinct
from bench.store import Result
from bench.tables.comparison import finals

NOTES = (
    "Scores with another extractor, reference, sample count or sampler are not comparable with these.",
    "Scores whose column names an extractor are not FID: only the Inception network of 2015-12-05 gives FID.",
    "Gflops count a multiply-add once. Training is three forwards an image; papers that total images x forward print "
    "a third.",
    "Equal Gflops are not equal seconds.",
)
MEANINGS = {  # key of a protocol -> what it means
    "name": "the protocol's name, as in configs/eval/",
    "version": "raised when the meaning of a protocol changes",
    "num_samples": "images drawn from each run",
    "labels": "classes asked for. balanced: sample i is of class i mod the number of classes; iid: drawn uniformly and "
    "independently, as DiT and ADM draw them",
    "seed": "of sampling: label, starting noise and step noise of sample i depend on (seed, i) alone, so the same "
    "index is the same sample in every run",
    "cfg_scale": "classifier-free guidance, eps_u + cfg_scale (eps_c - eps_u); 1 is unguided, and U-ViT prints "
    "cfg_scale - 1",
    "cfg_channels": "latent channels that guidance acts on: all, or 3 as in DiT's published samples",
    "sampler": "how latents are drawn",
    "sampler_steps": "backbone evaluations an image; a guided one, which costs twice, counts once",
    "sampler_eta": "ddim only: 0 is deterministic",
    "sampler_spacing": "ddpm and ddim only: which timesteps are visited",
    "sampler_clip_denoised": "ddpm and ddim only: whether the data estimate is clipped to [-1, 1]",
    "batch_size": "samples drawn in one forward; changes rounding only",
    "decoder": "autoencoder that turns latents into images",
    "decoder_sha256": "of its weights, leading digits",
    "quantisation": "float images in [-1, 1] to uint8, before anything is scored",
    "precision": "of the extractor's arithmetic",
    "extractor": "network whose features are compared",
    "extractor_sha256": "of its weights, leading digits",
    "resize": "of images, before the extractor",
    "reference": "real images that samples are compared with",
    "reference_n": "number of real images",
    "reference_images": "what was done to the real images",
    "reference_sha256": "of the reference's features, leading digits",
    "metrics": "scores that were asked for",
}


class Fact(NamedTuple):
    key: str
    value: str
    meaning: str


def protocol_facts(protocol: Mapping[str, Any]) -> list[Fact]:
    """Every setting of the protocol beside what it means."""
    return [Fact(key, str(value), MEANINGS.get(key, "")) for key, value in protocol.items()]


def made_by(results: Sequence[Result], runs: Path) -> dict[str, str]:
    """Where the numbers come from: code, versions, machine, seeds, hashes, dates."""
    protocol = results[0].protocol
    latents = [state["latents"] for row in finals(results) if "latents" in (state := _state(runs / row.run_id))]
    facts = {
        "git commit": distinct(row.git_commit for row in results),
        "device": distinct(row.device for row in results),
        "processes": distinct(row.world_size for row in results),
        **{name: distinct(row.versions.get(name, "unknown") for row in results) for name in results[0].versions},
        "training seed": distinct(row.seed for row in results),
        "sampling seed": str(protocol["seed"]),
        "sha256 of the latents": distinct(latents) if latents else "not on disk",
    }
    for key in ("decoder", "extractor", "reference"):
        facts[f"sha256 of the {key}"] = str(protocol[f"{key}_sha256"])
    return facts | {"scored": distinct((min(row.created for row in results), max(row.created for row in results)))}


def _state(directory: Path) -> dict[str, Any]:
    path = directory / "run.json"
    return json.loads(path.read_text()) if path.is_file() else {}


def commands(name: str, results: Sequence[Result], configs: Mapping[str, str], command: str) -> list[str]:
    """Lines for a shell that lead to these numbers again, comments included."""
    newest = max(results, key=lambda row: row.created)
    commit, _, changed = newest.git_commit.partition("+")
    run_ids = list(dict.fromkeys(row.run_id for row in results))
    lines = []
    if commit != "unknown":
        note = "  # and changes that were not committed" if changed else ""
        lines.append(f"git checkout {commit}{note}")
    if command:
        lines += ["# all of it:", command, "# or run by run, from the configurations below:"]
    else:
        lines.append("# each configuration below, saved as <run>.yaml:")
    for run_id in run_ids:
        lines.append(f"python -m bench train {run_id}.yaml")
        extra = _overrides(yaml.safe_load(configs[run_id]), newest.protocol) if run_id in configs else []
        steps = [row.steps for row in results if row.run_id == run_id]
        words = ["python", "-m", "bench", "evaluate", f"runs/{run_id}", *extra]
        lines += [f"{shlex.join(words)} --step {step}" for step in steps]
    compared = newest.comparison == name
    page = shlex.join([name] if compared else [f"runs/{run_id}" for run_id in run_ids])
    return [*lines, "# this page from what is stored:", f"python -m bench report {page} --out report.html"]


def _overrides(config: Mapping[str, Any], protocol: Mapping[str, Any]) -> list[str]:
    """What must be said beside a run's own configuration to score it by `protocol`."""
    scored, recipe = config["eval"], config["recipe"]
    keys = ("num_samples", "batch_size", "labels", "seed", "cfg_scale", "extractor", "precision")
    words = [f"eval.{key}={protocol[key]}" for key in keys if key in protocol and protocol[key] != scored[key]]
    if protocol["cfg_channels"] != (scored["cfg_channels"] or recipe["cfg_channels"]):
        words.append(f"eval.cfg_channels={protocol['cfg_channels']}")
    sampler = scored["sampler"] or recipe["sampler"]
    for key, value in sampler.items():
        used = protocol.get("sampler" if key == "name" else f"sampler_{key}", value)
        if used != value:
            words.append(f"eval.sampler.{key}={used}")
    return words
