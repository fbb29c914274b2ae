"""The command line. Parsing needs the standard library only; each command imports what it needs."""

from __future__ import annotations

import argparse
import os
import re
import shlex
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from bench import signals
from bench.console import is_main_process, notices_aside, say
from bench.errors import Paused, SharedError, UserError

Run = TypeVar("Run", bound=Callable[[argparse.Namespace], None])


class Option(NamedTuple):
    """An argument of a command, as `add_argument` takes it."""

    names: tuple[str, ...]
    settings: dict[str, Any]


class Command(NamedTuple):
    run: Callable[[argparse.Namespace], None]
    help: str
    examples: str
    options: tuple[Option, ...]


COMMANDS: list[Command] = []  # in the order of --help


def option(*names: str, **settings: Any) -> Option:
    return Option(names, settings)


def command(help: str, examples: str, *options: Option) -> Callable[[Run], Run]:
    """Makes the function below it a command of its name."""

    def register(run: Run) -> Run:
        COMMANDS.append(Command(run, help, examples, options))
        return run

    return register


FORMAT = option("--format", choices=("terminal", "md", "csv", "latex", "html"), default="terminal")
OVERRIDES = option(
    "overrides",
    nargs="*",
    default=[],
    metavar="key=value",
    help="key=value settings over the config, such as model.size=S/2 budget.train_gflops=2e4",
)
DRY_RUN = option("--dry-run", action="store_true", help="print resolved config, budget, steps and estimated time")
STEP = option("--step", type=int, help="checkpoint after this many steps (default: the last one)")
STORED = (
    option("names", nargs="+", metavar="NAME", help="a comparison, or run ids or runs/<run_id>, any number"),
    option("--runs", default="runs", help="directory with results.jsonl (default: runs)"),
)


def main() -> None:
    """Run one command; a bad input is one sentence on stderr and exit code 2, a signal is 128 + its number."""
    # Overrides may stand anywhere; argparse would refuse positional arguments behind an option.
    overrides = [word for word in sys.argv[1:] if re.match(r"[a-z][\w.]*=", word)]
    args = _parser().parse_args([word for word in sys.argv[1:] if word not in overrides])
    args.overrides = overrides = [*getattr(args, "overrides", ()), *overrides]  # the first ones are no settings
    try:
        if overrides and (not args.takes_overrides or getattr(args, "action", "") in ("status", "cancel")):
            raise UserError(
                f"{' '.join(overrides)} changes nothing here: this command takes no settings. Leave it out."
            )
        args.run(args)
    except UserError as error:
        if isinstance(error, SharedError) and not is_main_process():
            sys.exit()  # Lightning would kill the first process for another code of this one, before it has ended
        print(f"isodiff {args.command}: {error}", file=sys.stderr)
        sys.exit(2)
    except BrokenPipeError:  # the reader, such as `head`, has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:
        print(f"isodiff {args.command}: {_sentence(error)}", file=sys.stderr)
        sys.exit(2)
    except Paused as pause:
        say(f"{pause} The same command goes on from there.")
    except (KeyboardInterrupt, ImportError) as error:
        if isinstance(error, ImportError) and not signals.asked():  # else a signal broke an import off
            raise
        if not is_main_process():
            sys.exit()  # as above
        print(f"\nInterrupted. The same command goes on where it was: {' '.join(['python -m bench', *sys.argv[1:]])}")
        sys.exit(signals.exit_code())


def _sentence(error: OSError) -> str:
    """What the system refused, and of which file."""
    if error.filename is None or error.strerror is None:
        return f"{str(error) or type(error).__name__}."
    return f"{error.filename}: {error.strerror}. Give a path that can be read, or written, by you."


@command(
    "Train several architectures to one budget, score them by one protocol, write table, figure and report.",
    """
    python -m bench compare digits                                the embedded comparison: 10 minutes on 2 cores
    python -m bench compare digits --dry-run                      what it would do, and how long it would take
    python -m bench compare digits budget.train_gflops=2e4        another budget for every row
    python -m bench compare digits models.dit.size=S/2            another size for one row
    """,
    option("name", help="a file of configs/compare/, or a path to a YAML file"),
    OVERRIDES,
    DRY_RUN,
)
def compare(args: argparse.Namespace) -> None:
    from bench.compare import compare, describe
    from bench.config import load_comparison

    comparison = load_comparison(args.name, args.overrides)
    if args.dry_run:
        print(describe(comparison))
    else:
        compare(comparison, shlex.join(["python", "-m", "bench", "compare", args.name, *args.overrides]))


@command(
    "Encode a data set into its latent cache, once. The same command goes on where it was, with any number of "
    "processes. Later it looks at the pictures again, and encodes nothing where they are as they were. "
    "`train` and `compare` prepare on their own what is not there.",
    """
    python -m bench prepare imagenet256 data.root=/data/imagenet data.autoencoder_path=/models/sd-vae-ft-mse
    python -m bench prepare lsun_bedrooms256 data.root=/data/lsun data.autoencoder_path=/models/sd-vae-ft-mse
    torchrun --nproc-per-node 8 -m bench prepare imagenet512 data.root=/data/imagenet data.autoencoder_path=vae/
    python -m bench prepare folder data.root=photos/ data.resolution=64 data.autoencoder=identity
    python -m bench prepare folder data.root=photos/ data.resolution=32 data.on_error=skip trainer.devices=2
    """,
    option("name", help="a data set, datamodules/<name>.py"),
    OVERRIDES,
)
def prepare(args: argparse.Namespace) -> None:
    from bench.prepare import prepare

    prepare(args.name, args.overrides)


@command(
    "check: verify a latent cache (counts, hashes, statistics, classes), or the raw images where there is none. "
    "show: a PNG of raw, cropped and decoded images.",
    """
    python -m bench data check imagenet256
    python -m bench data check imagenet256 data.root=/data/imagenet
    python -m bench data show digits --out digits.png
    python -m bench data show folder --out photos.png data.root=photos/ data.resolution=64 data.autoencoder=identity
    """,
    option("action", choices=("check", "show")),
    option("name", help="a data set, datamodules/<name>.py"),
    option("--out", metavar="PNG", help="the file that `show` writes"),
    OVERRIDES,
)
def data(args: argparse.Namespace) -> None:
    if (args.action == "show") != (args.out is not None):
        raise UserError("--out names the PNG of `data show`; `data check` prints only.")
    from bench import data_tools
    from bench.prepare import load_data

    config = load_data(args.name, args.overrides)
    if args.action == "show":
        data_tools.show(config, Path(args.out))
    else:
        data_tools.check(config)


@command(
    "Train one architecture. The same command resumes an interrupted run and does nothing for a finished one.",
    """
    python -m bench train digits                                  the run of configs/run/digits.yaml
    python -m bench train digits use.model=uvit model.size=T/2    another architecture
    python -m bench train digits use.recipe=paper budget.steps=1000 --dry-run
    python -m bench train digits trainer.devices=2                two processes
    python -m bench train digits --max-time 00:30:00              half an hour now; the same command goes on
    """,
    option("name", help="a file of configs/run/, or a path such as runs/<run_id>/config.yaml"),
    option("--max-time", metavar="HH:MM:SS", help="stop with a checkpoint after it; or DD:HH:MM:SS"),
    OVERRIDES,
    DRY_RUN,
)
def train(args: argparse.Namespace) -> None:
    from bench.config import load_run, require_even_batches
    from bench.training.checkpoints import require_unchanged
    from bench.training.dry_run import describe
    from bench.training.train import train

    if Path(args.name).name == "config.yaml":
        require_unchanged(Path(args.name).parent, load_run(args.name))
    stop_at = None if args.max_time is None else time.monotonic() + _seconds(args.max_time)
    config = load_run(args.name, args.overrides)
    require_even_batches(config)
    if args.dry_run:
        print(describe(config))
    else:
        train(config, stop_at=stop_at)


@command(
    "Draw the samples of a run's protocol with its EMA weights: samples.npz (uint8 NHWC, arr_0) and a grid PNG.",
    """
    python -m bench sample runs/dit-t-2-digits-1a2b3c4d
    python -m bench sample runs/dit-t-2-digits-1a2b3c4d eval.num_samples=100 eval.cfg_scale=2
    python -m bench sample runs/dit-xl-2-imagenet256-1a2b3c4d --classes 207,360 --cfg-scale 4 --out grid.png
    """,
    option("run_directory", help="runs/<run_id>"),
    option("--classes", metavar="N,N", help="instead, only a grid of these classes, one row each"),
    option("--count", type=int, metavar="N", help="images of each class in that grid (default: 4)"),
    option("--out", metavar="PNG", help="the file of that grid"),
    option("--cfg-scale", type=float, metavar="S", help="short for eval.cfg_scale=S; 1 is unguided"),
    OVERRIDES,
    STEP,
)
def sample(args: argparse.Namespace) -> None:
    if (args.classes is None) != (args.out is None) or (args.count is not None and args.classes is None):
        raise UserError("--classes and --out go together, and --count with them: a grid of chosen classes.")
    from bench.evaluate import load_trained, sample

    scale = [] if args.cfg_scale is None else [f"eval.cfg_scale={args.cfg_scale}"]
    config = load_trained(args.run_directory, [*args.overrides, *scale])
    if args.classes is None:
        sample(config, step=args.step)
    else:
        from bench.scoring import looking

        count = looking.COUNT if args.count is None else args.count
        looking.look(config, looking.parse_classes(args.classes), count, Path(args.out), args.step)


@command(
    "Make a run of weights trained elsewhere: released files of DiT and U-ViT, checkpoints of their trainers and "
    "of fast-DiT, DiT folders of diffusers, exports of IsoDiff. Names, shapes and positions are checked; code in "
    "a file is never run. `sample` and `evaluate` take the run like any other.",
    """
    python -m bench import DiT-XL-2-256x256.pt --model dit --size XL/2
    python -m bench import DiT-XL-2-512x512.pt --model dit --size XL/2 --resolution 512
    python -m bench import imagenet256_uvit_huge.pth --model uvit --size H/2 data.autoencoder_path=vae/
    python -m bench import results/000-DiT-S-2/checkpoints/0400000.pt --model dit --size S/2 recipe.batch_size=256
    python -m bench import 50000.ckpt/ --model uvit --size L/2                 U-ViT's trainer: nnet_ema.pth
    python -m bench import DiT-XL-2-256/ --model dit --size XL/2               diffusers' folder
    python -m bench import my-export/ paths.runs=elsewhere                     of `export`
    """,
    option("path", help="file or folder of the weights"),
    option("--model", metavar="NAME", help="architecture, models/<name>.py"),
    option("--size", help="size of it, such as XL/2"),
    option("--resolution", type=int, metavar="PIXELS", help="image side (default: 256)"),
    option("--data", metavar="NAME", help="data set they were trained on (default: imagenet<resolution>)"),
    option("--steps", type=int, help="optimizer steps they were trained for (default: as published)"),
    OVERRIDES,
)
def import_(args: argparse.Namespace) -> None:
    from bench.exchange.imported import Claim, import_run

    claim = Claim(args.model, args.size, args.resolution, args.data, args.steps)
    import_run(Path(args.path), claim, args.overrides)


@command(
    "Write the EMA weights of a run for others: safetensors and config, or the folder of diffusers' DiTPipeline.",
    """
    python -m bench export runs/uvit-t-2-digits-1a2b3c4d --out uvit-t-2/
    python -m bench export runs/dit-xl-2-imagenet256-1a2b3c4d --format diffusers --out dit/
    """,
    option("run_directory", help="runs/<run_id>"),
    option("--out", required=True, metavar="FOLDER", help="the folder to write; it must not be there yet"),
    option("--format", choices=("safetensors", "diffusers"), default="safetensors"),
    OVERRIDES,
    STEP,
)
def export(args: argparse.Namespace) -> None:
    from bench.evaluate import load_trained
    from bench.exchange.export import export_run

    export_run(load_trained(args.run_directory, args.overrides), Path(args.out), args.format, args.step)


@command(
    "Score runs (sampling what is missing) or anybody's images and print one table; what is stored is not computed "
    "again, and a pass that was interrupted goes on where it was.",
    """
    python -m bench evaluate runs/dit-t-2-digits-1a2b3c4d
    python -m bench evaluate runs/dit-* runs/uvit-* eval.num_samples=1000
    python -m bench evaluate runs/dit-t-2-digits-1a2b3c4d --step 500
    python -m bench evaluate --samples admnet_guided.npz my_samples/ --reference VIRTUAL_imagenet256_labeled.npz
    python -m bench evaluate --samples a.npz b.npz --reference real.npz eval.extractor=effnet-lite0
    """,
    option("run_directories", nargs="*", metavar="run_directory", help="runs/<run_id>, one or several"),
    option(
        "--samples", nargs="+", metavar="PATH", help="finished images: npz (arr_0, uint8 NHWC), folder of PNG, or a run"
    ),
    option("--reference", metavar="PATH", help="npz with statistics (ADM's, or of `reference`) or images, or a folder"),
    FORMAT,
    OVERRIDES,
    STEP,
)
def evaluate(args: argparse.Namespace) -> None:
    overrides = [*args.overrides, *([f"eval.reference={args.reference}"] if args.reference else [])]
    if bool(args.samples) == bool(args.run_directories):
        raise UserError("Give run directories, or --samples with images that are finished; one of the two.")
    if args.samples and args.step is not None:
        raise UserError("--step names a checkpoint of a run; --samples are finished images. Leave it out.")
    with notices_aside():  # stdout has the table alone, for a file of its format
        if args.samples:
            from bench.config import load_scoring
            from bench.scoring.sample_sets import score_sets

            score_sets([Path(path) for path in args.samples], load_scoring(overrides), args.format)
        else:
            from bench.evaluate import evaluate_runs, load_trained

            configs = [load_trained(path, overrides) for path in args.run_directories]
            evaluate_runs(configs, step=args.step, fmt=args.format)


@command(
    "Make a reference from real images: moments for fid and sfid, rows for precision and recall, and the images; "
    "ADM's evaluator reads the file, too.",
    """
    python -m bench reference digits --out digits.npz eval.extractor=effnet-lite0
    python -m bench reference photos/ --out photos.npz eval.extractor_weights=pt_inception-2015-12-05-6726825d.pth
    python -m bench reference synthetic --out tiny.npz eval.extractor=random data.subset=50
    """,
    option("images", help="a data set (datamodules/<name>.py), an npz or a folder of PNG files"),
    option("--out", required=True, metavar="NPZ", help="the file to write"),
    OVERRIDES,
)
def reference(args: argparse.Namespace) -> None:
    from bench.config import load_reference
    from bench.scoring.scorer import write_reference

    write_reference(args.images, Path(args.out), load_reference(args.overrides))


@command(
    "Train and score every run of a sweep: here, on SLURM, or as printed commands. The same command goes on where "
    "it was; status, cancel and export act on the sweep of that name, run does one point of it.",
    """
    python -m bench sweep digits-parts --dry-run                  its runs and what they cost
    python -m bench sweep digits-parts --at-once 2                here, two runs at a time
    python -m bench sweep digits-parts --launcher slurm sweep.slurm.partition=gpu sweep.slurm.timeout_min=600
    python -m bench sweep digits-parts --launcher print           the commands of what is not finished
    python -m bench sweep digits-parts --retry-failed             failed runs again, too
    python -m bench sweep status digits-parts
    python -m bench sweep cancel digits-parts --only diffussm-t-digits-1a2b3c4d
    python -m bench sweep export digits-hourglass --wandb > wandb-sweep.yaml
    python -m bench sweep run digits-hourglass model.M=2 model.patch_size=1
    """,
    option("action", nargs="?", choices=("start", "status", "cancel", "export", "run"), default="start"),
    option("name", help="a file of configs/sweep/, or a path to a YAML file"),
    option("--launcher", choices=("local", "slurm", "print"), default="local"),
    option("--at-once", type=int, metavar="N", help="jobs that run at a time (default: 1 here, all on SLURM)"),
    option("--retry-failed", action="store_true", help="start failed runs again"),
    option("--only", nargs="+", default=(), metavar="RUN_ID", help="cancel only these"),
    option("--runs", default="runs", help="where status and cancel look (default: runs)"),
    option("--wandb", action="store_true", help="export as a sweep config of Weights & Biases"),
    OVERRIDES,
    DRY_RUN,
)
def sweep(args: argparse.Namespace) -> None:
    from bench.sweeps import status as sweep_status
    from bench.sweeps.jobs import run_and_score
    from bench.sweeps.launch import cancel, launch
    from bench.sweeps.printed import describe, wandb_config
    from bench.sweeps.sweep import load_sweep, one_run

    if args.action == "status":
        print(sweep_status.table(sweep_status.find(args.name, args.runs)))
    elif args.action == "cancel":
        print(f"{cancel(sweep_status.find(args.name, args.runs), args.only)} jobs cancelled")
    elif args.action == "export":
        if not args.wandb:
            raise UserError("Say what the export is for: --wandb.")
        print(wandb_config(args.name, args.overrides), end="")
    elif args.action == "run":
        name, run = one_run(args.name, args.overrides)
        run_and_score(name, [run])
    elif args.dry_run:
        print(describe(load_sweep(args.name, args.overrides)))
    else:
        found = load_sweep(args.name, args.overrides)
        launch(found, args.launcher, at_once=args.at_once, retry_failed=args.retry_failed)


@command(
    "Print the table of a comparison from the stored results, or a paper's table with stored results beside it.",
    """
    python -m bench table digits
    python -m bench table digits --format latex > table.tex
    python -m bench table diffussm-table1                         configs/table/diffussm-table1.yaml
    python -m bench table diffussm-table1 --low-confidence        with values not confirmed against the print
    python -m bench table dit-table4 --wandb offline              as a table of Weights & Biases, too
    """,
    option("name", help="a file of configs/table/, or the name of a comparison as in results.jsonl"),
    FORMAT,
    option("--runs", default="runs", help="directory with results.jsonl (default: runs)"),
    option("--low-confidence", action="store_true", help="show values that nothing confirms, marked ?"),
    option("--wandb", choices=("off", "offline", "online"), default="off", help="log it there, too"),
)
def table(args: argparse.Namespace) -> None:
    from bench.tables.command import print_named

    with notices_aside():
        print_named(args.name, args.format, Path(args.runs), low_confidence=args.low_confidence, wandb=args.wandb)


@command(
    "What the rows of ours in a paper's table take: commands, Gflops, hours, disk, memory. Nothing is run without "
    "--launch.",
    """
    python -m bench plan diffussm-table1                          on 8 A100 at an MFU of 40 %
    python -m bench plan dit-table4 --gpus 4 --gpu h100 --mfu 0.35
    python -m bench plan dit-table4 data.autoencoder_path=/models/sd-vae-ft-mse seed=1
    python -m bench plan ablation-parts --launch slurm sweep.slurm.partition=gpu
    """,
    option("name", help="a file of configs/table/"),
    option("--gpus", type=int, default=8, metavar="N", help="GPUs of each run (default: 8)"),
    option("--gpu", default="a100", metavar="KIND", help="kind of GPU (default: a100)"),
    option("--mfu", type=float, default=0.4, help="share of the GPU's peak that is used (default: 0.4)"),
    option("--launch", choices=("local", "slurm", "print"), help="start the runs as a sweep, or print it"),
    option("--count", action="store_true", help="count and keep Gflops and memory of new runs"),
    OVERRIDES,
)
def plan(args: argparse.Namespace) -> None:
    from bench.plans.command import count, launch_plan, print_plan

    if args.count:
        count(args.name)
    elif args.launch:
        launch_plan(args.name, args.launch, args.gpus, args.gpu, args.overrides)
    else:
        print_plan(args.name, args.gpus, args.gpu, args.mfu, args.overrides)


@command(
    "Draw stored results as PNG, PDF or SVG, by the suffix of --out; the same results give the same bytes.",
    """
    python -m bench figure digits --out score.pdf                 score against training Gflops, 95 % intervals
    python -m bench figure digits --score 'precision[effnet-lite0]' --out precision.png
    python -m bench figure runs/dit-* runs/uvit-* --out runs.png  runs that were never compared
    python -m bench figure digits --kind loss --out loss.pdf      training loss against training Gflops
    python -m bench figure digits --kind grids --out grids.png    samples at equal compute, side by side
    python -m bench figure digits --kind grids --every-checkpoint --out grids.png
    python -m bench figure digits --kind gflops --out cost.pdf    one forward by kind of operation
    """,
    *STORED,
    option("--kind", choices=("score", "loss", "grids", "gflops"), default="score"),
    option("--score", metavar="COLUMN", help="which score (default: the protocol's first)"),
    option("--every-checkpoint", action="store_true", help="grids of all scored checkpoints, not of the last"),
    option("--out", required=True, metavar="FILE", help="what to write: .png, .pdf or .svg"),
)
def figure(args: argparse.Namespace) -> None:
    from bench.reports.figures import draw
    from bench.reports.plotting import require_format, save
    from bench.reports.selection import select

    out = Path(args.out)
    require_format(out)
    selection = select(args.names, Path(args.runs))
    save(draw(args.kind, selection, column=args.score, every=args.every_checkpoint), out)
    print(out)


@command(
    "Make the report page of a comparison, or of any runs scored alike, from what is stored.",
    """
    python -m bench report digits --out report.html
    python -m bench report runs/dit-* runs/uvit-* --out report.html
    """,
    *STORED,
    option("--out", required=True, metavar="HTML", help="the file to write"),
)
def report(args: argparse.Namespace) -> None:
    from bench.reports.report import write_stored

    write_stored(args.names, Path(args.out), Path(args.runs))


@command(
    "Count parameters and Gflops (1e9 multiply-adds, one forward) beside the published values.",
    """
    python -m bench flops                                         every published size
    python -m bench flops dit/XL/2 uvit/H/2 diffussm/XL           some of them
    python -m bench flops dit --resolution 256 512                every DiT size at two resolutions
    python -m bench flops diffussm/XL model.M=4                   with settings of the model
    python -m bench flops --figure gflops.png                     Gflops against resolution (DiffuSSM, Figure 3)
    """,
    option("models", nargs="*", metavar="MODEL[/SIZE]", help="architecture, or architecture/size"),
    OVERRIDES,
    option("--resolution", type=int, nargs="+", help="image side in pixels, behind an autoencoder of factor 8"),
    option(
        "--figure", metavar="FILE", help="draw Gflops against resolution (.png, .pdf, .svg) instead of printing a table"
    ),
)
def flops(args: argparse.Namespace) -> None:
    from bench.flops import print_table, write_figure

    if args.figure:
        write_figure(Path(args.figure))
    else:
        print_table(args.models, resolutions=args.resolution, overrides=args.overrides)


@command(
    "Measure speed beside well-known peers in one run: ratios, memory, and how far the results are apart.",
    """
    python -m bench perf evaluator                                five minutes on 2 cores
    python -m bench perf evaluator --only frechet --rounds 5
    python -m bench perf data                                     latents, crops, and the loader beside the encoder
    python -m bench perf overhead                                 the training loop beside a bare one
    """,
    option("area", help="what to measure: evaluator, data or overhead"),
    option("--only", metavar="NAME", help="one line of the table, such as frechet or crops"),
    option("--rounds", type=int, default=3, help="rounds after one to warm up (default: 3)"),
)
def perf(args: argparse.Namespace) -> None:
    from bench.perf.perf import run

    run(args.area, args.rounds, args.only)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench",
        description="IsoDiff compares diffusion backbones at equal compute: trains, samples, scores, prints tables.",
        epilog="`python -m bench COMMAND --help` shows the options of a command with examples.",
    )
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for run, help, examples, options in COMMANDS:
        sub = subparsers.add_parser(
            run.__name__.rstrip("_"),  # import is a word of Python's
            help=help,
            description=help,
            epilog="examples:\n" + textwrap.indent(textwrap.dedent(examples).strip(), "  "),
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        for names, settings in options:
            sub.add_argument(*names, **settings)
        sub.set_defaults(run=run, takes_overrides=OVERRIDES in options)
    return parser


def _seconds(text: str) -> int:
    """Seconds of HH:MM:SS or DD:HH:MM:SS. Raises: UserError for anything else."""
    found = re.fullmatch(r"(?:(\d+):)?(\d+):([0-5]\d):([0-5]\d)", text)
    if found is None:
        raise UserError(f"--max-time {text} is no time. Write HH:MM:SS or DD:HH:MM:SS, such as 00:30:00.")
    days, hours, minutes, seconds = (int(part or 0) for part in found.groups())
    return ((24 * days + hours) * 60 + minutes) * 60 + seconds
