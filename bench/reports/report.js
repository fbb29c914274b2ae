// Makes the finished page answer: sortable tables, curves in place of their pictures, samples on a slider of compute.
"use strict";

const data = JSON.parse(document.getElementById("data").textContent);

for (const table of document.querySelectorAll("table.sortable")) {
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => {
    const button = node("button", { type: "button" }, ...head.childNodes);
    head.replaceChildren(button);
    head.setAttribute("aria-sort", "none");
    button.addEventListener("click", () => {
      const other = { ascending: "descending", descending: "ascending" };
      const order = other[head.getAttribute("aria-sort")] ?? head.dataset.first;
      heads.forEach((one) => one.setAttribute("aria-sort", one === head ? order : "none"));
      sort(table.tBodies[0], column, order === "ascending" ? 1 : -1);
    });
  });
}

// By the value of a cell, not by its text; what has none goes last in either order.
function sort(body, column, sign) {
  const value = (row) => {
    const cell = row.cells[column];
    if (cell.dataset.value === undefined) return cell.textContent;
    return cell.dataset.value === "" ? NaN : Number(cell.dataset.value);
  };
  const compare = (a, b) => {
    if (typeof a === "string") return sign * a.localeCompare(b, "en", { numeric: true });
    if (Number.isNaN(a) || Number.isNaN(b)) return Number.isNaN(a) - Number.isNaN(b);
    return sign * (a - b);
  };
  body.append(...[...body.rows].sort((a, b) => compare(value(a), value(b))));
}

const spent = (point) => `${number(point.images_seen)} images, ${number(point.train_gflops)} training Gflops`;

function scoreCurves(score, field) {
  return data.runs.map((run) => ({
    ...run,
    points: data.results
      .filter((row) => row.run_id === run.run_id)
      .sort((a, b) => a.steps - b.steps)
      .map((row) => {
        const [y, ci] = [row.scores[score.name], row.ci95[score.name]];
        const text = (value) => value.toFixed(score.decimals);
        const told = y === null ? ["no finite score"] : [
          `${score.name} ${text(y)} ± ${text(ci)}`,
          `95 % interval ${text(y - ci)} to ${text(y + ci)}`,
          `stored: ${y} ± ${ci}`,
        ];
        const lines = [...told, row.steps ? `step ${number(row.steps)}, ${row.weights}` : row.weights, spent(row)];
        const brief = y === null ? told[0] : `${text(y)} ± ${text(ci)}`;
        return { x: row[field], y: y ?? NaN, ci, open: !row.train_gflops, brief, lines };
      }),
  }));
}

function lossCurves(loss, field) {
  return data.runs.filter((run) => data.losses[run.run_id]).map((run) => {
    const log = data.losses[run.run_id];
    const points = log.steps.map((step, k) => {
      const [first, y, smooth] = [log.first[k], log.losses[loss.name][k], log.smooth[loss.name][k]];
      const when = first < step ? `mean of the logged steps ${number(first)} to ${number(step)}` : `step ${number(step)}`;
      const spend = { images_seen: log.images_seen[k], train_gflops: log.train_gflops[k] };
      const lines = [`${loss.title} ${y}`, `running mean ${smooth}`, when, spent(spend)];
      return { x: log[field][k], y: y ?? NaN, smooth, brief: number(y), lines };
    });
    return { ...run, noisy: true, points };
  });
}

for (const [id, name, quantities, curves] of [
  ["score-chart", "scores", data.scores, scoreCurves],
  ["loss-chart", "training losses", data.loss_names, lossCurves],
]) {
  const box = document.getElementById(id);
  if (!box) continue;
  chart(box.appendChild(node("div")), name, quantities, data.axes, curves);
  box.querySelector("figure").hidden = true; // the same as a picture, for pages without scripts
}

const levels = [...document.querySelectorAll(".level")];
if (levels.length > 1) {
  const slider = node("input", { type: "range", id: "level", min: 0, max: levels.length - 1, step: 1, value: levels.length - 1 });
  const told = node("output", { for: "level" });
  const choose = () => {
    levels.forEach((level, k) => { level.classList.toggle("away", k !== Number(slider.value)); });
    told.textContent = levels[slider.value].querySelector("h3").textContent;
    slider.setAttribute("aria-valuetext", told.textContent);
  };
  slider.addEventListener("input", choose);
  levels[0].before(node("div", { class: "controls" }, node("label", { for: "level" }, "compute"), slider, told));
  choose();
}
