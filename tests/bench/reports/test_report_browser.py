"""The report in a real browser: it sorts, answers and slides, fits a phone, and complains of nothing."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess

import pytest

from bench.reports.report import write_stored
from bench.store import ResultStore

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
pytestmark = pytest.mark.skipif(BROWSER is None, reason="no chromium or chrome on this machine")

# Runs before the page's own scripts: what they complain of.
LISTEN = """<script>
window.problems = [];
addEventListener("error", (event) => problems.push(event.message));
addEventListener("securitypolicyviolation", (event) => problems.push(event.violatedDirective));
for (const level of ["error", "warn"]) console[level] = (...words) => problems.push(words.join(" "));
</script>"""

# Holds the report in a frame as wide as a desktop's or phone's screen and uses it: the answers end in #answers.
PROBE = """<!doctype html><body><pre id="answers"></pre><script>
const source = %s, answers = {};
function open(width) {
  const frame = document.createElement("iframe");
  frame.style = `width:${width}px;height:800px`;
  frame.srcdoc = source;
  document.body.append(frame);
  return new Promise((resolve) => frame.addEventListener("load", () => resolve(frame.contentWindow)));
}
(async () => {
  const page = await open(1200), find = (selector) => page.document.querySelector(selector);
  const first = (cells) => [...cells].map((row) => row.cells[0].textContent);
  const table = find("table.sortable");
  const click = (column) => {
    table.tHead.rows[0].cells[column].querySelector("button").click();
    const sorted = [...table.tHead.rows[0].cells].map((head) => head.getAttribute("aria-sort"));
    return [first(table.tBodies[0].rows), sorted[column], sorted.filter((order) => order !== "none").length];
  };
  answers.sorts = [1, 1, 8, 9, 9, 0].map(click);
  answers.focusable = table.tHead.querySelectorAll("th > button").length;

  const chart = find("#score-chart"), picture = chart.querySelector(".plot svg"), tip = chart.querySelector(".tip");
  answers.pictures_hidden = [...page.document.querySelectorAll(".chart figure")].map((figure) => figure.hidden);
  const said = () => (tip.hidden ? null : [...tip.children].map((line) => line.textContent));
  const move = (type, at, pointerType) => picture.dispatchEvent(
    new page.PointerEvent(type, { clientX: at.x, clientY: at.y, pointerType, bubbles: true }));
  answers.hover = [...chart.querySelectorAll(".point")].map((point) => {
    const box = point.getBoundingClientRect();
    move("pointermove", { x: box.x + box.width / 2, y: box.y + box.height / 2 }, "mouse");
    return said();
  });
  move("pointerleave", { x: 0, y: 0 }, "mouse");
  answers.left = said();
  const press = (key) => {
    picture.dispatchEvent(new page.KeyboardEvent("keydown", { key, bubbles: true }));
    return said()?.slice(0, 2) ?? null;
  };
  answers.keys = ["ArrowLeft", "ArrowDown", "Home", "ArrowRight", "End", "Escape"].map(press);
  const select = chart.querySelector("select");
  answers.choices = [...select.options].map((option) => option.textContent);
  select.value = 1;
  select.dispatchEvent(new page.Event("change"));
  answers.other_score = press("End");
  const legend = chart.querySelectorAll(".legend button");
  legend[0].click();
  answers.hidden_curve = [legend[0].getAttribute("aria-pressed"), chart.querySelectorAll(".point").length];

  const loss = find("#loss-chart .plot svg");
  loss.dispatchEvent(new page.KeyboardEvent("keydown", { key: "Home", bubbles: true }));
  answers.loss = [...find("#loss-chart .tip").children].map((line) => line.textContent);

  const slider = find("#level"), output = find("output");
  const shown = () => [...page.document.querySelectorAll(".level")].filter((level) => level.offsetHeight).length;
  answers.levels = [output.textContent, shown()];
  for (const k of [0, 1]) {
    slider.value = k;
    slider.dispatchEvent(new page.Event("input"));
    answers.levels.push(output.textContent, shown());
  }
  answers.problems = page.problems;

  answers.phones = [];
  for (const width of [320, 400]) {
    const phone = await open(width);
    const box = phone.document.querySelector("#score-chart .point").getBoundingClientRect();
    phone.document.querySelector("#score-chart .plot svg").dispatchEvent(new phone.PointerEvent("pointerdown",
      { clientX: box.x + box.width / 2, clientY: box.y + box.height / 2, pointerType: "touch", bubbles: true }));
    const told = phone.document.querySelector("#score-chart .tip");
    const root = phone.document.documentElement;
    const over = [root, ...[...phone.document.querySelectorAll(".facts")].map((table) => table.parentNode)]
      .map((box) => box.scrollWidth - box.clientWidth);
    answers.phones.push([phone.innerWidth, over, told.hidden, phone.problems]);
  }
  document.getElementById("answers").textContent = JSON.stringify(answers);
})();
</script>"""


@pytest.fixture(scope="module")
def browse(tmp_path_factory):
    """Opens a file -> (its document after the scripts have run, what the browser logged)."""

    def browse(path) -> tuple[str, str]:
        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--dump-dom"]
        size = ["--window-size=1300,900", "--virtual-time-budget=10000"]
        profile = f"--user-data-dir={tmp_path_factory.mktemp('profile')}"
        done = subprocess.run(
            [BROWSER, *flags, *size, profile, path.as_uri()],
            capture_output=True, text=True, timeout=120, check=True,
        )  # fmt: skip
        return done.stdout, done.stderr

    return browse


@pytest.fixture
def page(runs, tmp_path):
    write_stored(["digits"], tmp_path / "report.html", runs)
    return tmp_path / "report.html"


def test_the_page_answers_in_a_browser(page, tmp_path, browse, comparison):
    source = page.read_text().replace("<head>", f"<head>{LISTEN}", 1)
    inside = json.dumps(source).replace("</", "<\\/")  # the page as a string in the probe's script
    (tmp_path / "probe.html").write_text(PROBE.replace("%s", inside, 1))
    document, _ = browse(tmp_path / "probe.html")
    answers = json.loads(html.unescape(re.search(r'<pre id="answers">(.*?)</pre>', document, re.S)[1]))
    assert answers["problems"] == []

    dit, ssm = "DiT-T/2", "DiffuSSM-T"
    assert answers["sorts"] == [
        [[dit, ssm], "ascending", 1],  # params: 1.25, 1.5
        [[ssm, dit], "descending", 1],
        [[ssm, dit], "ascending", 1],  # fd: 58.0 before 61.2
        [[ssm, dit], "descending", 1],  # precision: the best first
        [[dit, ssm], "ascending", 1],
        [[ssm, dit], "ascending", 1],  # by name: f before T, whatever the case
    ]
    assert answers["focusable"] == 11
    assert answers["pictures_hidden"] == [True, True]

    assert len(answers["hover"]) == len(comparison)
    for row, lines in zip(comparison, answers["hover"], strict=True):
        value, ci = row.scores["fd500[effnet-lite0]"], row.ci95["fd500[effnet-lite0]"]
        assert lines[0] == (dit if row.model == "dit" else ssm)
        assert lines[1] == f"fd500[effnet-lite0] {value:.2f} ± {ci:.2f}"
        stored = lines[3].removeprefix("stored: ").split(" ± ")
        assert [float(part) for part in stored] == [value, ci]
    assert answers["hover"][2][2] == "95 % interval 60.13 to 62.34"
    assert answers["hover"][2][-1] == f"{ssm}: 58.00 ± 1.25"  # beside it, at the same compute
    assert answers["left"] is None

    def told(name: str, score: str) -> list[str]:
        return [name, f"fd500[effnet-lite0] {score}"]

    assert answers["keys"] == [
        told(dit, "120.00 ± 1.50"),  # from the first curve's end one to the left
        told(ssm, "110.00 ± 1.50"),
        told(ssm, "311.25 ± 2.00"),
        told(ssm, "110.00 ± 1.50"),
        told(ssm, "58.00 ± 1.25"),
        None,
    ]
    assert answers["choices"] == ["fd500[effnet-lite0] (lower is better)", "precision[effnet-lite0] (higher is better)"]
    assert answers["other_score"] == [dit, "precision[effnet-lite0] 0.701 ± 0.021"]
    assert answers["hidden_curve"] == ["false", 3]
    assert answers["loss"][:4] == [dit, "loss 0.1", "running mean 0.1", "step 10"]
    ends = ["576 training Gflops", 1, "untrained", 1, "288 training Gflops", 1]
    assert answers["levels"] == ends
    assert answers["phones"] == [[320, [0, 0, 0], False, []], [400, [0, 0, 0], False, []]]


def test_the_page_itself_logs_nothing(page, browse):
    document, log = browse(page)
    assert "CONSOLE" not in log
    assert document.count('aria-sort="none"') == 11 + 8 + 12  # the scripts have run: scores, checkpoints, costs


def test_more_curves_than_styles_and_scores_that_are_no_numbers_draw_all_the_same(runs, make_result, tmp_path, browse):
    store = ResultStore(runs / "results.jsonl")
    nan = float("nan")
    for k in range(9):
        fd = (nan, nan) if k == 4 else (60.0 + k, 1.0)
        store.append(make_result(run_id=f"x-{k}", size=f"{k}", comparison="many", checkpoint=f"x-{k}", fd=fd))
    write_stored(["many"], tmp_path / "many.html", runs)
    document, log = browse(tmp_path / "many.html")
    assert "CONSOLE" not in log and "NaN" not in re.search('<div class="plot">.*?</svg>', document, re.S)[0]
    assert document.count('class="point"') == 8
