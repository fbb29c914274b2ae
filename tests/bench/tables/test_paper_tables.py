"""Tables of papers: printed rows with their sources and doubts, rows of ours beside them, every format."""

from __future__ import annotations

import csv
import io
import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from bench import cli, flops, registry
from bench.config import changed_settings, load_run
from bench.errors import UserError
from bench.store import Result, ResultStore
from bench.tables import formats
from bench.tables.command import print_named
from bench.tables.counted import _stored, count_run, counted
from bench.tables.formats import Cell, TableData, render
from bench.tables.own_rows import find_own
from bench.tables.paper import build, paper_table
from bench.tables.specs import RUN_FILE, load_table, paper_tables
from bench.training.plan import plan_training

NAMES = paper_tables()
SCORED = {"fid": 2.31, "sfid": 4.55, "inception_score": 275.0, "precision_float16": 0.829, "recall_float16": 0.571}
CI95 = {"fid": 0.05, "sfid": 0.06, "inception_score": 3.0, "precision_float16": 0.004, "recall_float16": 0.005}


def row(table: TableData, label: str) -> dict[str, str]:
    """The texts of the only row whose name starts so, by header."""
    (found,) = (row for row in table.rows if row[0].text.startswith(label))
    return {key: cell.text for key, cell in zip(table.header, found, strict=True)}


def printed(name: str, low_confidence: bool = False) -> TableData:
    return build(load_table(name), [], Path("no runs"), low_confidence)


@pytest.fixture
def dit_xl(make_result) -> Result:
    """DiT-XL/2 after 7M steps, guided by 1.5, as `evaluate` stores it."""
    protocol = {"name": "fid50k", "num_samples": 50_000, "labels": "iid", "cfg_scale": 1.5, "cfg_channels": "3"}
    protocol |= {"sampler": "ddpm", "sampler_steps": 250, "decoder": "sd-vae-ft-ema", "extractor": "inception"}
    protocol |= {"reference": "adm", "reference_n": 0}  # as its file has none
    own = make_result(
        run_id="dit-xl-2-imagenet256-aaaa0000",
        comparison="",
        size="XL/2",
        data="imagenet256",
        recipe="paper",
        steps=7_000_000,
        images_seen=1_792_000_000,
        batch_size=256,
        params_m=674.83472,
        gflops=118.621421,
        train_gflops_papers=2.1257e11,
        protocol=protocol,
    )
    return replace(own, scores=SCORED, ci95=CI95, gflops_parts={"linear": 118.6, "ssm_kernel": 0.0, "fft": 0.0})


def record(runs: Path, run_id: str, overrides: list[str], **about: object) -> Path:
    """What a training, or an import, leaves of its settings."""
    config, directory = load_run(RUN_FILE, overrides), runs / run_id
    directory.mkdir(parents=True)
    (directory / "config.yaml").write_text(config.to_yaml())
    (directory / "run.json").write_text(json.dumps({"state": "finished", "changed": changed_settings(config)} | about))
    return runs


DIT_XL = ["use.recipe=paper", "model.size=XL/2", "data.autoencoder=sd-vae-ft-ema", "budget.steps=7000000"]


@pytest.fixture
def runs(tmp_path, dit_xl) -> Path:
    return record(tmp_path / "runs", dit_xl.run_id, DIT_XL)


# --- what is printed --------------------------------------------------------------------------------------------------


def test_every_system_of_diffussm_has_its_row():
    labels = [cells[0].text.split(" †")[0] for cells in printed("diffussm-table1").rows]
    at_256 = ["BigGAN-deep", "MaskGIT", "StyleGAN-XL", "ADM", "ADM-U", "CDM", "LDM-8", "LDM-4", "DiT-XL/2"]
    at_256.append("DiffuSSM-XL")
    guided = ["ADM-G", "ADM-G, ADM-U", "LDM-8-G", "LDM-4-G", "U-ViT-H/2-G", "DiT-XL/2-G", "DiffuSSM-XL-G"]
    assert labels[: len(at_256) + len(guided)] == at_256 + guided
    assert {"ADM", "ADM-U", "U-ViT/2-G", "DiT-XL/2-G", "DiffuSSM-XL-G"} <= set(labels[len(at_256) + len(guided) :])
    lsun = [(cells[0].text.split(" †")[0], cells[1].text) for cells in printed("diffussm-table2-lsun").rows]
    for data, names in {
        "LSUN-Church": {"StyleGAN", "StyleGAN2", "DDPM", "LDM-8", "DiffuSSM"},
        "LSUN-Bedroom": {"StyleGAN", "DDPM", "LDM-4", "ADM", "DiffuSSM"},
    }.items():
        assert names <= {model for model, where in lsun if where == data}


def test_a_row_of_the_table_and_one_that_another_paper_prints():
    table = printed("diffussm-table1")
    ours = row(printed("dit-imagenet512"), "DiT-XL/2 †")
    assert ours == {
        "model": "DiT-XL/2 †",
        "guidance": "–",
        "Gflops": "524.6ᵇ",
        "Gflops counted": "524.5",
        "fid ↓": "12.03¹",
        "sfid ↓": "7.12",
        "inception_score ↑": "105.25",
        "precision ↑": "0.75",
        "recall ↑": "0.64",
    }
    assert "ᵇ DiT Table 4." in " ".join(printed("dit-imagenet512").notes)
    assert any(
        note.startswith("¹ 12.03 in DiT Table 3, 11.93 in DiT Table 4") for note in printed("dit-imagenet512").notes
    )
    masked = row(table, "MaskGIT")
    assert (masked["model"], masked["fid ↓"]) == ("MaskGIT †ᵇ", "6.18")
    assert "ᵇ MaskGIT Table 1." in table.notes[1]


def test_unconfirmed_values_show_only_where_asked_for_and_are_marked():
    sure, all_of_it = printed("diffussm-table1"), printed("diffussm-table1", low_confidence=True)
    assert not any("?" in cell.text for cells in sure.rows for cell in cells)
    assert "8.44?" in row(all_of_it, "U-ViT/2-G")["sfid ↓"]
    assert row(sure, "U-ViT/2-G")["sfid ↓"].startswith("6.44")
    assert row(sure, "U-ViT-H/2-G")["Gflops × images"] == "–"
    assert row(all_of_it, "U-ViT-H/2-G")["Gflops × images"].startswith("6.81e10?")
    assert not any("Not confirmed" in note for note in sure.notes)
    assert any("Not confirmed" in note for note in all_of_it.notes)


def test_a_value_that_another_print_confirms_is_not_doubted():
    assert row(printed("diffussm-table1", low_confidence=True), "StyleGAN-XL †ᵃ")["fid ↓"] == "2.30"


def test_contradictions_stand_below_the_cells_they_touch():
    table = printed("diffussm-table1")
    (note,) = (note for note in table.notes if "13.1 % fewer" in note)
    assert row(table, "DiffuSSM-XL †")["Gflops × images"] == f"1.85e11{note.split()[0]}"
    (note,) = (note for note in table.notes if "DiT Table 2 prints 2.27" in note)
    assert note.split()[0] in [cells[7].text[-1] for cells in table.rows if cells[0].text.startswith("DiT-XL/2-G")]
    assert not any("two stages saw" in note for note in table.notes)  # about a value that is not shown
    assert any("two stages saw" in note for note in printed("diffussm-table1", low_confidence=True).notes)


def test_totals_are_said_to_hold():
    assert "Every printed total is images × Gflops within 0.5 %." in printed("diffussm-table1").notes


@pytest.mark.parametrize("name", [name for name in NAMES if name.startswith("ablation-")])
def test_ablations_say_that_nothing_is_printed(name):
    table = printed(name)
    assert "without numbers" in table.notes[0]
    assert {cells[table.header.index("fid ↓")].text for cells in table.rows} == {"–"}
    assert {cells[table.header.index("Gflops × images")].text for cells in table.rows} == {"3.000e10"}  # 9e10 / 3


# --- rows of ours -----------------------------------------------------------------------------------------------------


def test_our_row_follows_the_printed_one_with_what_it_is_off_by(dit_xl, runs):
    table = build(load_table("dit-imagenet256"), [dit_xl], runs)
    labels = [cells[0].text for cells in table.rows]
    start = labels.index("DiT-XL/2-G, ours (seed 0)")
    assert labels[start - 1 : start + 2] == [
        "DiT-XL/2-G †",
        "DiT-XL/2-G, ours (seed 0)",
        "DiT-XL/2-G, ours less printed",
    ]
    ours, off = row(table, "DiT-XL/2-G, ours (seed"), row(table, "DiT-XL/2-G, ours less")
    assert (ours["guidance"], ours["fid ↓"], off["fid ↓"]) == ("cfg 1.5", "2.31 ± 0.05", "+0.04 ± 0.05")
    assert (ours["inception_score ↑"], off["inception_score ↑"]) == ("275.00 ± 3.00", "-3.24 ± 3.00")
    assert off["precision ↑"] == "-0.001 ± 0.004"  # of precision_float16, ADM's arithmetic
    assert any(note.startswith("Rows of ours: results of EMA weights under protocol fid50k") for note in table.notes)
    (protocol,) = (note for note in table.notes if note.startswith("Protocol fid50k"))
    assert "250 steps; cfg_channels 3;" in protocol  # the scale differs from row to row, which say it


def test_csv_has_our_row_in_full_precision(dit_xl, runs):
    text = render(build(load_table("dit-imagenet256"), [dit_xl], runs), "csv")
    (ours,) = (line for line in csv.DictReader(io.StringIO(text)) if line["row"] == "ours")
    assert (ours["model"], ours["run_id"], ours["fid"], ours["fid_ci95"]) == (
        "DiT-XL/2-G",
        dit_xl.run_id,
        "2.31",
        "0.05",
    )
    assert float(ours["fid_less_printed"]) == pytest.approx(0.04)
    (line,) = (
        line
        for line in csv.DictReader(io.StringIO(text))
        if (line["row"], line["model"], line["scale"]) == ("printed", "DiT-XL/2-G", "1.5")
    )
    assert (line["fid"], line["sources"]) == (
        "2.27",
        "params_m gflops: DiT Table 4; images_m fid sfid inception_score precision recall: DiT Table 2",
    )


@pytest.mark.parametrize(
    "changes, reason",
    [
        ({"images_seen": 102_400_000, "steps": 400_000}, "102.4M images seen, not 1792M"),
        ({"recipe": "shared"}, "recipe shared, not paper"),
        ({"protocol": {"num_samples": 5000}}, "samples 5000, not 50000"),
        ({"protocol": {"decoder": "sd-vae-ft-mse"}}, "decoder sd-vae-ft-mse, not sd-vae-ft-ema"),
        ({"protocol": {"cfg_scale": 4.0}}, "cfg_scale 4.0, not 1.0"),
        ({"protocol": {"cfg_channels": "all"}}, "cfg_channels all, not 3"),
        ({"protocol": {"labels": "balanced"}}, "labels balanced, not iid"),
        ({"protocol": {"sampler_clip_denoised": True}}, "sampler_clip_denoised True, not False"),
        ({"protocol": {"reference_n": 5000}}, "a reference of 5,000 images, not of all"),
        ({"gflops": 60.0}, "Gflops 60, not 118.6"),
    ],
)
def test_a_result_that_differs_is_no_row_and_the_difference_is_named(dit_xl, runs, changes, reason):
    other = replace(dit_xl, **changes | {"protocol": dit_xl.protocol | changes.get("protocol", {})})
    own, strangers = find_own(load_table("dit-imagenet256"), [other], runs)
    assert own == []
    assert len(strangers) == 1 and reason in strangers[0]


@pytest.mark.parametrize(
    "field, inside, outside",
    [
        ("images_seen", (0.9901 * 1.792e9, 1.0099 * 1.792e9), (0.9899 * 1.792e9, 1.0101 * 1.792e9)),  # 7M steps of 256
        ("params_m", (0.9991 * 674.83472, 1.0009 * 674.83472), (0.9989 * 674.83472, 1.0011 * 674.83472)),
        ("gflops", (0.9991 * 118.621421, 1.0009 * 118.621421), (0.9989 * 118.621421, 1.0011 * 118.621421)),
        ("reference_n", (1_281_167, 1_000_000), (999_999, 50_000)),  # ImageNet's training split has 1,281,167
    ],
)
def test_a_result_belongs_within_the_tolerances_that_the_note_states(dit_xl, runs, field, inside, outside):
    """1 % of the images, 0.1 % of parameters and Gflops; the whole training split."""
    spec = load_table("dit-imagenet256")
    for value in (*inside, *outside):
        changed = {"protocol": dit_xl.protocol | {field: value}} if field == "reference_n" else {field: value}
        own, _ = find_own(spec, [replace(dit_xl, **changed)], runs)
        assert len(own) == (value in inside), value


@pytest.mark.parametrize(
    "setting, reason",
    [
        ("recipe.optimizer.lr=3e-4", "recipe.optimizer.lr 0.0003, not the usual"),
        ("data.subset=1000", "data.subset 1000, not the usual"),
        ("data.mirrors=false", "data.mirrors False, not the usual"),
        ("model.pos_embed=none", "model.pos_embed none, not the usual"),  # which costs nothing
        ("recipe.sampler.steps=50", ""),  # of sampling: the protocol says it
    ],
)
def test_a_run_of_other_settings_is_no_row_and_the_setting_is_named(dit_xl, tmp_path, setting, reason):
    name, settings = "dit-imagenet256", [*DIT_XL, setting]
    if setting.startswith("model.pos_embed"):
        run = load_table("ablation-parts").runs["direction=bi"]
        name, settings = "ablation-parts", [*run.overrides, setting]
        changes = {"model": "diffussm", "size": "XL", "recipe": "shared"}
        dit_xl = replace(dit_xl, **changes, protocol=dit_xl.protocol | {"cfg_scale": 1.0})
    runs = record(tmp_path, dit_xl.run_id, settings)
    own, strangers = find_own(load_table(name), [dit_xl], runs)
    assert (len(own), len(strangers)) == ((0, 1) if reason else (1, 0))
    assert reason in "".join(strangers)


def test_a_run_without_its_record_is_no_row(dit_xl, tmp_path):
    (text,) = find_own(load_table("dit-imagenet256"), [dit_xl], tmp_path)[1]
    assert f"settings not on record (python -m bench train {tmp_path}/{dit_xl.run_id}/config.yaml adds them)" in text


def test_every_run_of_every_table_is_found_by_its_own_settings():
    """Values of settings are compared, not how a file writes them."""
    for run in (run for name in NAMES for run in load_table(name).runs.values()):
        assert (
            changed_settings(load_run(RUN_FILE, run.overrides)).keys() - {"data.autoencoder"} <= run.settings.keys()
        ), run


def test_a_result_of_several_comparisons_is_one_row(dit_xl, runs):
    own, _ = find_own(load_table("dit-imagenet256"), [dit_xl, replace(dit_xl, comparison="other")], runs)
    assert len(own) == 1
    seeds = [dit_xl, replace(dit_xl, seed=1, run_id="dit-xl-2-imagenet256-bbbb0000")]
    record(runs, seeds[1].run_id, [*DIT_XL, "seed=1"])
    assert len(find_own(load_table("dit-imagenet256"), seeds, runs)[0]) == 2


def test_a_result_of_another_data_set_is_not_mentioned(make_result):
    assert find_own(load_table("dit-imagenet256"), [make_result()], Path("runs")) == ([], [])


def test_imported_weights_are_called_official(dit_xl, tmp_path):
    record(tmp_path, dit_xl.run_id, DIT_XL, imported={"weights": "official weights, by the name of the file"})
    ResultStore(tmp_path / "results.jsonl").append(dit_xl)
    assert row(paper_table("dit-imagenet256", tmp_path), "DiT-XL/2-G, official weights (seed 0)")


def test_runs_of_a_sweep_find_their_points(dit_xl, tmp_path):
    spec = load_table("ablation-parts")
    run = spec.runs["direction=forward"]
    cost = counted(run)
    result = replace(
        dit_xl,
        model="diffussm",
        size="XL",
        recipe="shared",
        params_m=cost.params_m,
        gflops=cost.gflops,
        images_seen=run.images(cost.gflops),
        protocol=dit_xl.protocol | {"cfg_scale": 1.0, "decoder": "sd-vae-ft-mse"},
    )
    own, strangers = find_own(spec, [result], record(tmp_path, result.run_id, run.overrides))
    assert ([row.place.model for row in own], strangers) == (["direction=forward"], [])


# --- counts that are kept ---------------------------------------------------------------------------------------------

with (Path(__file__).parents[2] / "golden" / "gflops.csv").open(newline="") as file:
    GOLDEN = [
        row for row in csv.DictReader(file) if row["counted"] in ("all", "weights") and row["num_classes"] == "1000"
    ]


def test_kept_counts_agree_with_an_independent_count():
    found = 0
    for stored in _stored().values():
        settings = dict(part.split("=") for part in stored.settings.split())
        side = {"imagenet256": "32", "imagenet512": "64"}.get(stored.data)
        for golden in GOLDEN:
            same = (golden["name"], golden["size"], golden["latent_size"]) == (stored.model, stored.size, side)
            asked = {"M": settings.pop("M", "2"), "patch_size": settings.pop("patch_size", "1")} if same else {}
            if same and stored.model == "diffussm":
                same = not settings and all(golden[key] == value for key, value in asked.items())
                settings |= asked
            if same and golden["channels"] == "4":
                assert stored.gflops_weights == pytest.approx(float(golden["gflops"]), rel=1e-3), stored
                found += 1
    assert found >= 24


@pytest.mark.parametrize(
    "table, name", [("dit-table4", "s-4"), ("uvit-imagenet", "l-2-256"), ("ablation-parts", "gating=false")]
)
def test_kept_counts_are_those_of_bench_flops(table, name):
    run = load_table(table).runs[name]
    config = load_run(RUN_FILE, run.overrides)
    planned = plan_training(config)
    report = flops.count(run.model, config.model, planned.spec)
    stored = counted(run)
    assert stored.params_m == pytest.approx(report.params_m, abs=6e-4)
    assert stored.gflops == pytest.approx(report.gflops, rel=1e-4)
    assert stored.gflops_weights == pytest.approx(report.gflops_weights, rel=1e-4)


def test_memory_of_activations_is_counted_tensor_by_tensor():
    run = load_table("dit-table4").runs["s-8"]
    again = count_run(run)
    assert again == counted(run)
    # DiT-S/8 has 16 tokens of 384 numbers; of a block autograd keeps the inputs of two norms, of two modulated sums and
    # two gates, q k v, attention's output and the MLP's two activations: between 10 and 40 numbers a token and width.
    numbers = 1e6 * again.activations_mb / 2 / (12 * 16 * 384)
    assert 10 < numbers < 40


def test_a_run_that_was_never_counted_says_how():
    run = replace(load_table("dit-table4").runs["s-8"], size="S/16")
    with pytest.raises(UserError, match=r"no line for run s-8 \(dit S/16 .*plan <table> --count"):
        counted(run)


# --- formats ----------------------------------------------------------------------------------------------------------


def test_the_command_line_offers_every_format():
    assert tuple(formats.FORMATS) == cli.FORMAT.settings["choices"]


def everything(name: str, dit_xl: Result, runs: Path) -> TableData:
    return build(load_table(name), [dit_xl], runs, low_confidence=True)


@pytest.mark.parametrize("name", NAMES)
def test_latex_has_even_rows_and_nothing_unescaped(name, dit_xl, runs):
    table = everything(name, dit_xl, runs)
    text = render(table, "latex")
    assert text.isascii()
    opened, closed = (re.findall(rf"\\{word}{{(\w+)}}", text) for word in ("begin", "end"))
    assert sorted(opened) == sorted(closed) == ["table", "tabular"]
    rows = [line for line in text.splitlines() if line.endswith(r"\\")]
    assert len(rows) == len(table.rows) + 1
    assert {len(re.findall(r"(?<!\\)&", line)) for line in rows} == {len(table.header) - 1}
    body = text.split("\n", 1)[1]  # the first line is a comment
    assert not re.search(r"(?<!\\)[%#_]", body)
    assert body.count("{") == body.count("}")


@pytest.mark.skipif(shutil.which("pdflatex") is None, reason="pdflatex is not installed; the structure is tested above")
def test_latex_compiles(tmp_path, dit_xl, runs):
    body = "\n".join(render(everything(name, dit_xl, runs), "latex") for name in NAMES)
    preamble = "\\documentclass{article}\n\\usepackage{booktabs}\n\\begin{document}\n"
    (tmp_path / "tables.tex").write_text(f"{preamble}{body}\n\\end{{document}}\n")
    words = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "tables.tex"]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:]
    assert (tmp_path / "tables.pdf").stat().st_size > 10_000


class Reader(HTMLParser):
    """Cells by row, and tags that are open."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self.open: list[str] = []

    def handle_starttag(self, tag, attrs):
        if tag != "meta":
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if {"td", "th"} & set(self.open):
            self.rows[-1][-1] += data


@pytest.mark.parametrize("name", NAMES)
def test_html_reads_back_as_the_same_cells(name, dit_xl, runs):
    table, reader = everything(name, dit_xl, runs), Reader()
    reader.feed(render(table, "html"))
    assert reader.open == []
    assert reader.rows == [list(table.header), *([cell.text for cell in cells] for cells in table.rows)]


def test_html_escapes_and_bolds():
    text = render(TableData(("a<b",), ((Cell("x & y", bold=True),),), ("<note>",), ({"a": 1},), "T & U"), "html")
    for piece in ("<th>a&lt;b</th>", "<td><b>x &amp; y</b></td>", "<p>&lt;note&gt;</p>", "<title>T &amp; U</title>"):
        assert piece in text


@pytest.mark.parametrize("fmt", ["md", "terminal", "csv"])
def test_the_other_formats_have_every_printed_value(fmt):
    text = render(printed("dit-imagenet256"), fmt)
    assert all(value in text for value in ("171.4", "278.24", "2.27", "118.64", "StyleGAN-XL"))


# --- the command ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name, nearest", [("dit-tabel4", "dit-table4"), ("difussm-table1", "diffussm-table1")])
def test_an_unknown_name_is_answered_with_the_nearest(tmp_path, name, nearest):
    with pytest.raises(UserError, match=rf"neither a paper's table .*Did you mean {nearest}\?"):
        print_named(name, "md", tmp_path)


def test_a_comparison_has_no_printed_values(tmp_path, make_result):
    ResultStore(tmp_path / "results.jsonl").append(make_result())
    with pytest.raises(UserError, match="--low-confidence is for values that papers print"):
        print_named("digits", "md", tmp_path, low_confidence=True)


@pytest.mark.parametrize(
    "change, words",
    [
        (("fid, ", "fit, "), ["'fit' is not a column", "Did you mean fid?"]),
        (("run: dit-xl-2}", "run: dit-xl}"), ["names the run 'dit-xl'", "dit-xl-2"]),
        (("title:", "titel:"), ["lacks title"]),
        (("{steps: 7_000_000}", "{steps: 1, images: 2}"), ["runs.dit-xl-2.budget", "train_gflops"]),
        (("guidance: classifier}", "guidanc: classifier}"), ["'guidanc'", "Did you mean guidance?"]),
    ],
)
def test_a_file_that_is_not_well_formed_is_one_sentence(tmp_path, change, words):
    text = (registry.CONFIGS / "table" / "dit-imagenet256.yaml").read_text()
    (tmp_path / "mine.yaml").write_text(text.replace(*change))
    with pytest.raises(UserError) as error:
        load_table(str(tmp_path / "mine.yaml"))
    assert all(word in str(error.value) for word in ("mine.yaml", *words)), str(error.value)


def test_two_rows_of_one_source_must_be_told_apart(tmp_path):
    text = (registry.CONFIGS / "table" / "dit-table4.yaml").read_text()
    (tmp_path / "mine.yaml").write_text(text.replace(", variant: 7000K steps", ""))
    with pytest.raises(UserError, match=r"3 rows of DiT-XL/2 at 256\. Tell them apart by variant: 400K steps, 2352K"):
        build(load_table(str(tmp_path / "mine.yaml")), [], tmp_path)


@pytest.mark.parametrize("words", [["table", "diffussm-table1", "--low-confidence"], ["plan", "dit-table4"]])
def test_the_commands_load_no_torch(words):
    code = (
        f"import runpy, sys\nsys.argv = ['bench', *{words!r}]\nrunpy.run_module('bench', run_name='__main__')\n"
        "print('loaded', sorted({'torch', 'omegaconf', 'pandas'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=registry.ROOT, capture_output=True, text=True)
    assert done.stdout.rstrip().endswith("loaded []"), done.stderr


def test_a_table_goes_to_wandb_offline(tmp_path):
    code = (
        "from pathlib import Path\nimport sys\nfrom bench.tables.command import print_named\n"
        "print_named('dit-imagenet512', 'md', Path(sys.argv[1]), wandb='offline')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], cwd=registry.ROOT, capture_output=True, text=True
    )
    assert f"W&B: {tmp_path}/tables/dit-imagenet512" in done.stdout, done.stderr
    (logged,) = tmp_path.glob("tables/dit-imagenet512/wandb/offline-run-*/files/media/table/*.json")
    content = json.loads(logged.read_text())
    column = content["columns"].index("fid")
    assert [line[column] for line in content["data"]][-2:] == ["4.64", "3.04"]
