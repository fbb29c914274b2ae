"""report.html: complete, self-contained, well-formed, and text stays text. What scripts do: test_report_browser.py."""

from __future__ import annotations

import base64
import html
import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from conftest import CONFIG
from PIL import Image

from bench import cli
from bench.reports.data import picture, script_json
from bench.reports.plotting import png
from bench.reports.report import write_report, write_stored
from bench.reports.selection import select
from bench.tables import comparison as tables

VOID = {"meta", "img", "link"}
NAME = "digits: </script><b>&"


class Page(HTMLParser):
    """Checks that every tag is closed in order; collects tags with attributes, and the text."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.open, self.tags, self.text = [], [], ""
        self.feed(source)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


@pytest.fixture
def results(runs):
    return select(["digits"], runs).results


@pytest.fixture
def source(runs, results, tmp_path) -> str:
    command = "python -m bench compare 'mine & yours.yaml'"
    write_report(tmp_path / "report.html", name=NAME, results=results, runs=runs, command=command)
    return (tmp_path / "report.html").read_text()


def data_of(source: str) -> dict:
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', source, re.S)[1])


def test_the_page_is_well_formed_and_fit_for_phones(source):
    tags = Page(source).tags
    assert source.startswith("<!doctype html>\n")
    assert ("meta", {"name": "viewport", "content": "width=device-width, initial-scale=1"}) in tags
    wide = [attributes for tag, attributes in tags if tag == "div" and attributes.get("class") == "scroll"]
    assert len(wide) == [tag for tag, _ in tags].count("table") == 6
    ids = [attributes["id"] for _, attributes in tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert {attributes["href"] for tag, attributes in tags if tag == "a"} <= {f"#{name}" for name in ids}


def test_nothing_is_loaded_from_outside(source):
    tags = Page(source).tags
    addresses = [
        value for tag, attributes in tags for key, value in attributes.items() if key in ("src", "href") and tag != "a"
    ]
    assert len(addresses) == 1 + 2 + 5  # icon, two figures, five grids
    assert all(address.startswith("data:") for address in addresses)
    assert "url(" not in source and "@import" not in source and "fetch(" not in source
    assert set(re.findall(r"https?://[^\s\"'<]*", source)) == {"http://www.w3.org/2000/svg"}  # a name, not an address
    (policy,) = [attributes["content"] for _, attributes in tags if attributes.get("http-equiv")]
    assert policy.startswith("default-src 'none'; img-src data:;")


def test_the_data_are_the_stored_results_to_the_last_digit(source, runs):
    data = data_of(source)
    assert data["results"] == [json.loads(line) for line in (runs / "results.jsonl").read_text().splitlines()]
    for run_id, log in data["losses"].items():
        lines = [json.loads(line) for line in (runs / run_id / "metrics.jsonl").read_text().splitlines()]
        for name in ("train/loss", "train/mse"):
            assert log["losses"][name] == log["smooth"][name] == [line[name] for line in lines]
        for name in ("images_seen", "train_gflops"):
            assert log[name] == [line[name] for line in lines]
        assert log["first"] == log["steps"] == [line["train/step"] for line in lines]
    assert [run["label"] for run in data["runs"]] == ["DiT-T/2", "DiffuSSM-T"]
    assert [score["name"] for score in data["scores"]] == ["fd500[effnet-lite0]", "precision[effnet-lite0]"]


def test_json_cannot_end_its_element_and_keeps_every_digit():
    value = {"</script><!--": ["&amp;", "\u2028", 0.1 + 0.2, 5e-324, 1.7976931348623157e308]}
    text = script_json(value)
    assert not set("<>&\u2028") & set(text)
    assert json.loads(text) == value
    assert json.loads(script_json([float("nan"), float("inf"), (1, -0.5)])) == [None, None, [1, -0.5]]


def test_cells_sort_by_the_values_of_the_records(source, results):
    head = re.search(r"<thead>\n<tr>(.*?)</tr>", source)[1]
    titles = re.findall(r'<th scope="col" data-first="(\w+)">(.*?)</th>', head)
    assert [title for _, title in titles] == list(tables.build(results).header)
    assert [title for first, title in titles if first == "descending"] == ["precision[effnet-lite0] ↑"]
    body = re.search(r"<tbody>(.*?)</tbody>", source, re.S)[1]
    rows = [re.findall(r'data-value="(.*?)"', row) for row in body.strip().splitlines()]
    keys = ["params_m", "gflops", "gflops_ssm", "images_seen", "train_gflops", "train_gflops_papers", "sample_gflops"]
    keys += ["fd500[effnet-lite0]", "precision[effnet-lite0]", "untrained_fd500[effnet-lite0]"]
    for values, record in zip(rows, tables.build(results).records, strict=True):
        assert [float(value) for value in values] == [record[key] for key in keys]


def test_grids_lie_at_equal_compute_and_a_missing_one_is_said(source, runs):
    levels = source.split('<div class="level">')[1:]
    assert [re.search("<h3>(.*?)</h3>", level)[1] for level in levels] == [
        "untrained",
        "288 training Gflops",
        "576 training Gflops",
    ]
    shown = [re.findall(r'<img src="data:image/png;base64,([^"]*)" width="40" height="32"', level) for level in levels]
    grids = [[path.read_bytes() for path in sorted(runs.glob(f"*/samples/step-{steps}*/grid.png"))[::-1]] for steps in
             ("00000000", "00000050", "00000100")]  # fmt: skip
    assert [[base64.b64decode(code) for code in level] for level in shown] == grids
    assert [level.count("These samples are no longer on disk.") for level in levels] == [0, 0, 1]


def test_a_level_that_a_run_was_not_scored_at_says_so(runs, results, tmp_path):
    write_report(tmp_path / "r.html", name="r", results=results[1:], runs=runs)
    page = (tmp_path / "r.html").read_text()
    assert page.count("No scored checkpoint here.") == 1


def test_large_grids_are_embedded_smaller(tmp_path):
    noise = Image.effect_noise((1600, 800), 80)
    noise.save(tmp_path / "grid.png")
    found = picture(tmp_path / "grid.png")
    assert (found.width, found.height, found.smaller) == (1600, 800, True)
    assert found.uri.startswith("data:image/jpeg;base64,")
    assert picture(tmp_path / "none.png") is None


def test_static_figures_stand_for_the_curves(source, results):
    from bench.reports.figures import score_against_compute

    code = re.search(r'id="score-chart">\n<figure>\n<img src="data:image/png;base64,([^"]*)"', source)[1]
    assert base64.b64decode(code) == png(score_against_compute(results, "fd500[effnet-lite0]"))


def test_names_and_notes_stay_text(source):
    assert f"<title>{html.escape(NAME)}: DiT-T/2, DiffuSSM-T at equal training Gflops</title>" in source
    assert source.count("</script>") == 2 and "<b>" not in source


def test_it_says_all_that_is_stored(source, results):
    text = Page(source).text
    for row in results:
        assert f"{row.scores['fd500[effnet-lite0]']:.2f} ± {row.ci95['fd500[effnet-lite0]']:.2f}" in text
        assert row.run_id in text
    for key, value in results[0].protocol.items():
        escaped = html.escape(str(value)).replace("&#x27;", "&#39;")
        meaning = re.search(
            rf'<th scope="row">{key}</th><td>{re.escape(escaped)}</td><td class="soft">(.+?)</td>', source
        )
        assert meaning, key
    for note in tables.build(results).notes:
        assert note in text
    assert "<strong>58.00 ± 1.25</strong>" in source
    for value in ("0123abc", "3.11.7", "2.14.1", "cpu (2 threads)", "61.5", "2026-01-01T00:00:00+00:00", "dd44"):
        assert value in text
    assert CONFIG.replace("LR", "0.001") in text and CONFIG.replace("LR", "0.002") in text


def test_settings_that_differ_between_runs_are_marked(source):
    marked = re.findall(r'<tr class="differs"><th scope="row">(.*?)</th><td>(.*?)</td><td>(.*?)</td></tr>', source)
    assert marked == [("recipe.optimizer.lr", "0.001", "0.002")]
    plain = re.findall(r'<tr><th scope="row">(.*?)</th><td>(.*?)</td><td>(.*?)</td></tr>', source)
    assert ("recipe.optimizer.betas", "[0.9, 0.99]", "[0.9, 0.99]") in plain
    assert ("budget.train_gflops", "576", "576") in plain


def commands_of(page: str) -> list[str]:
    return html.unescape(re.search(r"<h3>To repeat it</h3>\n<pre>(.*?)</pre>", page, re.S)[1]).splitlines()


def test_commands_lead_to_the_numbers_again(source, runs, results, tmp_path):
    dit, ssm = "dit-t-2-digits-0000aaaa", "diffussm-t-digits-0000bbbb"
    lines = commands_of(source)
    assert lines[:3] == ["git checkout 0123abc", "# all of it:", "python -m bench compare 'mine & yours.yaml'"]
    assert [line for line in lines if " train " in line] == [f"python -m bench train {run}.yaml" for run in (dit, ssm)]
    assert f"python -m bench evaluate runs/{ssm} --step 80" in lines
    assert lines[-1] == f"python -m bench report runs/{dit} runs/{ssm} --out report.html"
    write_stored(["digits"], tmp_path / "stored.html", runs)
    stored = commands_of((tmp_path / "stored.html").read_text())
    assert stored[-1] == "python -m bench report digits --out report.html"
    assert "python -m bench compare" not in "\n".join(stored)


def test_settings_of_the_protocol_that_a_configuration_lacks_are_in_the_commands(runs, make_result, tmp_path):
    other = {"cfg_scale": 4.0, "sampler_steps": 50, "cfg_channels": "3"}
    write_report(tmp_path / "r.html", name="r", results=[make_result(protocol=other)], runs=runs)
    (line,) = [line for line in commands_of((tmp_path / "r.html").read_text()) if " evaluate " in line]
    assert line.split()[5:] == ["eval.cfg_scale=4.0", "eval.cfg_channels=3", "eval.sampler.steps=50", "--step", "100"]


def test_runs_of_unequal_compute_get_a_warning_and_a_lone_run_no_verdict(runs, make_result, tmp_path):
    rows = [make_result(), make_result(run_id="b", size="S/2", train_gflops=1000.0, images_seen=20000, steps=200)]
    write_report(tmp_path / "r.html", name="runs", results=rows, runs=runs)
    page = (tmp_path / "r.html").read_text()
    assert "<title>runs: DiT-T/2, DiT-S/2</title>" in page and page.count('<p class="warning">') == 1
    write_report(tmp_path / "one.html", name="runs", results=rows[:1], runs=runs)
    page = (tmp_path / "one.html").read_text()
    assert 'class="verdict"' not in page and 'class="warning"' not in page
    assert tables.build(rows[:1]).notes[0] in page


def test_a_page_of_results_alone_says_what_is_missing(results, tmp_path):
    write_report(tmp_path / "r.html", name="digits", results=results, runs=tmp_path / "none")
    page = Page((tmp_path / "r.html").read_text()).text
    assert "metrics.jsonl are no longer on disk" in page and "config.yaml are no longer on disk" in page
    assert page.count("These samples are no longer on disk.") == 6


def test_a_score_that_is_no_number_sorts_last_and_is_null(runs, make_result, tmp_path):
    rows = [make_result(), make_result(run_id="b", size="S/2", fd=(float("nan"), float("nan")))]
    write_report(tmp_path / "r.html", name="r", results=rows, runs=runs)
    page = (tmp_path / "r.html").read_text()
    assert 'data-value="">nan ± nan</td>' in page
    assert data_of(page)["results"][1]["scores"]["fd500[effnet-lite0]"] is None


def test_the_command_needs_no_torch_and_no_matplotlib_state(runs, tmp_path):
    code = (
        "import sys\nfrom bench import cli\ncli.main()\n"
        "print(sorted({'torch', 'lightning', 'matplotlib.pyplot', 'wandb'} & set(sys.modules)))"
    )
    words = ["report", "digits", "--runs", str(runs), "--out", str(tmp_path / "r.html")]
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, check=True)
    assert done.stdout == f"{tmp_path / 'r.html'}\n[]\n"
    write_stored(["digits"], tmp_path / "again.html", runs)
    assert (tmp_path / "r.html").read_bytes() == (tmp_path / "again.html").read_bytes()


def test_a_name_that_is_not_stored_writes_nothing(runs, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(
        sys, "argv", ["bench", "report", "dgits", "--runs", str(runs), "--out", str(tmp_path / "r.html")]
    )
    with pytest.raises(SystemExit, match="2"):
        cli.main()
    assert "Did you mean digits?" in capsys.readouterr().err
    assert not (tmp_path / "r.html").exists()


def test_every_file_that_the_page_is_made_of_is_packaged():
    text = (Path(__file__).parents[3] / "pyproject.toml").read_text()
    packaged = re.search(r'"\*" = (\[.*?\])', text)[1]
    assert {".html", ".css", ".js"} <= {suffix.lstrip("*") for suffix in json.loads(packaged)}
