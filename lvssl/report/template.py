"""The page's frame, style sheet and script. No outside resource is named, and the policy forbids any."""

from string import Template

STYLE = """
:root {
  color-scheme: light dark;
  --paper: #ffffff; --panel: #f4f5f7; --ink: #15181d; --soft: #5a626d; --rule: #d9dde2;
  --run: #0f6b6f; --code: #b5530c; --control: #79818c; --wrong: #a3162a; --wash: #e2f0ef;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #121418; --panel: #1b1e24; --ink: #e8eaed; --soft: #a0a8b3; --rule: #32373f;
    --run: #55c4bd; --code: #f0a25a; --control: #98a0ab; --wrong: #ff8b93; --wash: #17312f;
  }
}
* { box-sizing: border-box; }
html { scroll-behavior: smooth; }
@media (prefers-reduced-motion: reduce) { html { scroll-behavior: auto; } }
body {
  margin: 0 auto; padding: 40px 32px 80px; max-width: 1120px; background: var(--paper); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", sans-serif;
}
h1 { font-size: 34px; line-height: 1.15; letter-spacing: -0.02em; margin: 0 0 10px; text-wrap: balance; }
h2 { font-size: 22px; letter-spacing: -0.01em; margin: 64px 0 6px; }
h3 { font-size: 15px; margin: 0 0 2px; }
p { margin: 6px 0 14px; max-width: 72ch; }
a { color: inherit; text-underline-offset: 3px; }
a:focus-visible, button:focus-visible, summary:focus-visible {
  outline: 2px solid var(--run); outline-offset: 2px;
}
.soft { color: var(--soft); }
.small { font-size: 13.5px; }
nav { display: flex; flex-wrap: wrap; gap: 4px 20px; margin: 22px 0 0; font-size: 14px; color: var(--soft); }
code, pre { font: 13px/1.5 ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace; }
pre {
  background: var(--panel); padding: 12px 14px; border-radius: 6px; margin: 8px 0 14px;
  white-space: pre-wrap; overflow-wrap: anywhere;
}

.verdicts {
  display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 400px), 1fr)); gap: 16px;
  margin: 26px 0 8px;
}
.verdict {
  display: flex; flex-direction: column; justify-content: space-between; background: var(--panel);
  border-radius: 10px; padding: 20px 22px;
}
.verdict.ahead { background: var(--wash); }
.verdict p { margin: 0 0 14px; font-size: 17px; line-height: 1.4; font-weight: 600; text-wrap: pretty; }
.deltas { display: grid; grid-template-columns: 1fr 1fr; gap: 12px 24px; margin: 0; }
.deltas div { display: flex; flex-direction: column-reverse; }
.deltas dt { font-size: 13.5px; line-height: 1.4; color: var(--soft); margin-top: 4px; }
.deltas dt b { color: var(--ink); font-weight: 600; }
.deltas dd {
  margin: 0; font-size: 38px; line-height: 1.1; font-weight: 650; letter-spacing: -0.03em;
  font-variant-numeric: tabular-nums;
}

.table { overflow-x: auto; margin: 14px 0 6px; }
table { border-collapse: collapse; width: 100%; font-size: 15px; }
th { text-align: left; font-weight: 500; font-size: 13.5px; color: var(--soft); white-space: nowrap; }
th, td { padding: 9px 18px 9px 0; border-bottom: 1px solid var(--rule); vertical-align: middle; }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
tr.ours td:first-child { font-weight: 600; }
td.best { font-weight: 700; }
td.wide { width: 240px; padding-right: 0; }
.settings td { padding: 5px 18px 5px 0; font-size: 14px; overflow-wrap: anywhere; }
.settings td:last-child {
  font-family: ui-monospace, Menlo, Consolas, "DejaVu Sans Mono", monospace; font-size: 13px;
}
.columns {
  display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 340px), 1fr)); gap: 8px 56px;
  align-items: start;
}
.below {
  display: flex; flex-wrap: wrap; justify-content: space-between; align-items: baseline; gap: 4px 20px;
  font-size: 13.5px; color: var(--soft);
}
.columns td:last-child, .columns th:last-child { padding-right: 0; }
.pics + .below, .certainty + .below, .columns + .below, .queries + .below { margin-top: 14px; }
.below code { overflow-wrap: anywhere; }
button {
  font: inherit; font-size: 13.5px; color: var(--ink); background: none; border: 1px solid var(--rule);
  border-radius: 6px; padding: 3px 12px; cursor: pointer;
}
button:hover { border-color: var(--soft); }

.charts {
  display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 420px), 1fr)); gap: 30px 48px;
  margin: 18px 0 10px;
}
figure { margin: 0; }
svg { display: block; width: 100%; height: auto; }
svg text {
  font: 12px system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", sans-serif; fill: var(--soft);
  font-variant-numeric: tabular-nums;
}
.grid { stroke: var(--rule); stroke-width: 1; fill: none; }
.line { fill: none; stroke-width: 2; stroke-linejoin: round; stroke-linecap: round; }
.line.run {
  stroke: var(--run); } .line.code { stroke: var(--code); stroke-dasharray: 7 4;
  } .line.control { stroke: var(--control); stroke-dasharray: 2 4;
}
.end.run { fill: var(--run); } .end.code { fill: var(--code); } .end.control { fill: var(--control); }
.mark.linear { fill: var(--run); } .mark.knn { fill: var(--paper); stroke: var(--run); stroke-width: 2; }
.strip { width: 240px; max-width: 100%; }
.legend {
  display: flex; flex-wrap: wrap; gap: 2px 18px; font-size: 13.5px; color: var(--soft); margin: 0 0 6px;
  padding: 0; list-style: none;
}
.legend svg { display: inline-block; width: 26px; height: 10px; margin-right: 7px; vertical-align: 0; }
.legend b { color: var(--ink); font-weight: 600; font-variant-numeric: tabular-nums; }

.queries {
  display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 480px), 1fr)); gap: 12px 32px;
  margin: 16px 0 10px;
}
.query {
  display: grid; grid-template-columns: 84px 1fr; gap: 4px 18px; padding: 14px 0;
  border-top: 1px solid var(--rule);
}
.query > .pic { --side: 84px; }
.by { display: grid; gap: 8px; min-width: 0; }
.row { display: grid; grid-template-columns: 72px 1fr; align-items: start; gap: 8px; }
.row > span { font-size: 12.5px; line-height: 1.25; color: var(--soft); padding-top: 12px; }
.pics { display: flex; flex-wrap: wrap; gap: 6px; }
.pic { --side: 50px; width: var(--side); margin: 0; }
.pic img {
  display: block; width: var(--side); height: var(--side); object-fit: contain; border-radius: 4px;
  background: var(--panel); image-rendering: pixelated; border: 2px solid transparent;
}
.pic figcaption {
  font-size: 11px; line-height: 1.2; color: var(--soft); margin-top: 2px; overflow: hidden;
  text-overflow: ellipsis; white-space: nowrap;
}
.query > .pic figcaption { font-size: 13px; color: var(--ink); font-weight: 600; white-space: normal; }
.pic.wrong img { border: 2px dashed var(--wrong); padding: 1px; }
.pic.wrong figcaption { color: var(--wrong); font-weight: 600; }
.certainty {
  display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 440px), 1fr)); gap: 24px 48px;
  margin-top: 16px;
}
.certainty .pic { --side: 68px; }
.certainty .pics { gap: 10px; margin-top: 6px; }
.picks { display: flex; flex-wrap: wrap; gap: 6px; margin: 14px 0; }
.pick { padding: 3px; line-height: 1.25; text-align: left; }
.pick.bit { padding: 5px 10px; font-size: 12.5px; }
.pick .pic figcaption { text-align: center; }
.pick[aria-pressed="true"] { border-color: var(--run); background: var(--wash); }
.card[hidden] { display: none; }
.card { margin: 0 0 10px; }
.bit-card { padding: 14px 0; border-top: 1px solid var(--rule); }
summary { cursor: pointer; font-size: 15px; margin: 10px 0; }

@media (max-width: 640px) {
  body { padding: 24px 18px 60px; }
  h1 { font-size: 27px; }
  h2 { margin-top: 48px; }
  .verdict { padding: 18px; }
  .deltas dd { font-size: 32px; }
  td.wide, th.wide { display: none; }
  th, td { padding-right: 9px; }
  th { font-size: 12px; }
  table { font-size: 13.5px; }
  svg text { font-size: 15px; }
  .query { grid-template-columns: 1fr; gap: 8px; }
  .query > .pic { width: auto; display: flex; align-items: center; gap: 14px; }
  .query > .pic figcaption { font-size: 15px; }
  .row { grid-template-columns: 1fr; gap: 2px; }
  .row > span { padding: 0; }
}
.legend.inline { flex-wrap: nowrap; gap: 10px; margin: 0; }
.legend.inline svg { width: 14px; margin-right: 5px; }
@media print { nav, button { display: none; } }
"""

# Each table goes out as it stands: `data-csv` holds a cell's exact value where the page shows a rounded one.
SCRIPT = """
for (const button of document.querySelectorAll("button[data-table]")) {
  button.addEventListener("click", () => {
    const quoted = (text) => /[",\\n]/.test(text) ? '"' + text.replaceAll('"', '""') + '"' : text;
    const rows = [...document.getElementById(button.dataset.table).rows].map((row) => [...row.cells]
      .filter((cell) => !cell.classList.contains("wide"))
      .map((cell) => quoted((cell.dataset.csv ?? cell.textContent).trim())).join(","));
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([rows.join("\\r\\n") + "\\r\\n"], {type: "text/csv"}));
    link.download = button.dataset.table + ".csv";
    link.click();
    URL.revokeObjectURL(link.href);
  });
}
"""

# Explorers: without a script every card shows; with it, the one that was chosen.
SCRIPT += """
for (const explorer of document.querySelectorAll(".explorer")) {
  const picks = [...explorer.querySelectorAll(".pick")], cards = [...explorer.querySelectorAll(".card")];
  const choose = (chosen) => {
    picks.forEach((pick, i) => pick.setAttribute("aria-pressed", String(i === chosen)));
    cards.forEach((card, i) => { card.hidden = i !== chosen; });
  };
  picks.forEach((pick, i) => pick.addEventListener("click", () => choose(i)));
  choose(0);
}
"""

PAGE = Template("""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:;
  style-src 'unsafe-inline'; script-src 'unsafe-inline'">
<link rel="icon" href="data:,">
<title>$title</title>
<style>$style</style>
</head>
<body>
$body
<script>$script</script>
</body>
</html>
""")
