"""report.html: complete, self-contained, well-formed, and text stays text."""

from __future__ import annotations

import base64
import html
import re
from html.parser import HTMLParser

import pytest
from PIL import Image

from bench import tables
from bench.report import write_report

CONFIG = "seed: 0\nrecipe:\n  batch_size: 96\n  optimizer: {lr: %s, betas: [0.9, 0.99]}\nbudget: {train_gflops: 576}\n"
VOID = {"meta", "img"}


class Page(HTMLParser):
    """Checks that every tag is closed in order; collects tags with attributes, and the text."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.open, self.tags, self.text = [], [], ""
        self.feed(source)
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
def files(tmp_path):
    for k, name in enumerate(("curve", "dit", "diffussm")):
        Image.new("RGB", (4, 4), (k, 0, 0)).save(tmp_path / f"{name}.png")
    return tmp_path


@pytest.fixture
def source(files, comparison) -> str:
    write_report(
        files / "report.html",
        title="digits: <DiT> & DiffuSSM",
        results=comparison,
        table=tables.build(comparison),
        figures={"fd against Gflops": files / "curve.png"},
        grids={"DiT T/2": files / "dit.png", "DiffuSSM T": files / "gone.png"},
        configs={comparison[0].run_id: CONFIG % 0.001, comparison[3].run_id: CONFIG % 0.002},
        notes=["Scores of another <extractor> are not comparable."],
    )
    return (files / "report.html").read_text()


def test_the_page_is_well_formed_and_fit_for_phones(source):
    tags = Page(source).tags
    assert source.startswith("<!doctype html>\n")
    assert ("meta", {"name": "viewport", "content": "width=device-width, initial-scale=1"}) in tags
    assert [tag for tag, _ in tags].count("table") == [a.get("class") for tag, a in tags if tag == "div"].count(
        "scroll"
    )


def test_nothing_is_loaded_from_outside(source):
    tags = Page(source).tags
    assert {"script", "link", "iframe"} & {tag for tag, _ in tags} == set()
    addresses = [value for _, attributes in tags for key, value in attributes.items() if key in ("src", "href")]
    assert len(addresses) == 2
    assert all(address.startswith("data:image/png;base64,") for address in addresses)
    assert "url(" not in source and "@import" not in source


def test_pictures_are_embedded_byte_by_byte_and_a_missing_grid_is_said(files, source):
    pictures = [base64.b64decode(code) for code in re.findall(r'src="data:image/png;base64,([^"]*)"', source)]
    assert pictures == [(files / "curve.png").read_bytes(), (files / "dit.png").read_bytes()]
    assert source.count("These samples are no longer on disk.") == 1


def test_names_and_notes_stay_text(source):
    assert "<title>digits: &lt;DiT&gt; &amp; DiffuSSM</title>" in source
    assert "<li>Scores of another &lt;extractor&gt; are not comparable.</li>" in source


def test_it_says_all_that_is_stored(source, comparison):
    text = Page(source).text
    for row in comparison:
        assert f"{row.scores['fd500[effnet-lite0]']:.2f} ± {row.ci95['fd500[effnet-lite0]']:.2f}" in text
        assert row.run_id in text
    for key, value in comparison[0].protocol.items():
        assert f'<th scope="row">{key}</th><td>{html.escape(str(value)).replace("&#x27;", "&#39;")}</td>' in source
    for note in tables.build(comparison).notes:
        assert note in text
    assert "<strong>58.00 ± 1.25</strong>" in source
    for value in ("0123abc", "3.11.7", "2.14.1", "cpu (2 threads)", "61.5", "2026-01-01T00:00:00+00:00"):
        assert value in text
    assert CONFIG % 0.001 in text and CONFIG % 0.002 in text


def test_settings_that_differ_between_runs_are_marked(source):
    marked = re.findall(r'<tr class="differs"><th scope="row">(.*?)</th><td>(.*?)</td><td>(.*?)</td></tr>', source)
    assert marked == [("recipe.optimizer.lr", "0.001", "0.002")]
    plain = re.findall(r'<tr><th scope="row">(.*?)</th><td>(.*?)</td><td>(.*?)</td></tr>', source)
    assert ("recipe.optimizer.betas", "[0.9, 0.99]", "[0.9, 0.99]") in plain
    assert ("budget.train_gflops", "576", "576") in plain
