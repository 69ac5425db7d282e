"""Nothing in, the style sheet of the page out: one measure, two fonts of the system, one accent the colour of wine."""

CSS = """\
:root {
  --ink: #211d1e; --muted: #6f6769; --hair: #ded8d5; --paper: #fdfcfa; --wine: #7b1e3a; --wash: #f6f1ee;
  --serif: Charter, "Bitstream Charter", "Iowan Old Style", "Source Serif 4", "Palatino Linotype", Cambria, Georgia, serif;
  --sans: Inter, "Helvetica Neue", "Segoe UI", "Liberation Sans", Arial, sans-serif;
}
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 17px/1.55 var(--serif); }
main { max-width: 1080px; margin: 0 auto; padding: 72px 40px 96px; }
h1 { font-size: 44px; line-height: 1.05; font-weight: 400; letter-spacing: -0.015em; margin: 0 0 14px; }
.standfirst { font-size: 21px; line-height: 1.42; color: var(--muted); max-width: 44em; margin: 0; text-wrap: pretty; }
.standfirst::first-letter { text-transform: uppercase; }
section { margin-top: 72px; }
h2 { font: 600 13px/1.3 var(--sans); letter-spacing: 0.04em; color: var(--wine); margin: 0 0 14px;
  padding-top: 14px; border-top: 1px solid var(--ink); }
h3 { font: 600 14px/1.3 var(--sans); margin: 36px 0 8px; }
p { margin: 0 0 12px; max-width: 42em; text-wrap: pretty; }
ul { margin: 0; padding: 0; list-style: none; columns: 2; column-gap: 48px; }
li { break-inside: avoid; margin: 0 0 12px; font-size: 15.5px; line-height: 1.5; }
.note { color: var(--muted); font-size: 15.5px; }
.headline { display: grid; grid-template-columns: repeat(4, 1fr); gap: 0 36px; margin-top: 48px; }
.headline div { border-top: 1px solid var(--ink); padding-top: 14px; }
.headline b { display: block; font-size: 42px; line-height: 1; font-weight: 400; letter-spacing: -0.02em;
  font-variant-numeric: lining-nums; white-space: nowrap; }
.headline b small { font-size: 0.55em; letter-spacing: 0; }
.headline span { display: block; font: 600 14px/1.3 var(--sans); margin: 12px 0 5px; }
.headline p { font: 13px/1.45 var(--sans); color: var(--muted); margin: 0; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font: 14px/1.35 var(--sans); font-variant-numeric: lining-nums tabular-nums; }
th, td { text-align: left; font-weight: 400; padding: 8px 0 8px 20px; vertical-align: baseline; white-space: nowrap; }
th:first-child, td:first-child { padding-left: 0; }
thead th { color: var(--muted); font-size: 12.5px; padding-bottom: 7px; border-bottom: 1px solid var(--ink);
  vertical-align: bottom; }
tbody tr + tr > * { border-top: 1px solid var(--hair); }
.num { text-align: right; }
.results thead tr:first-child th { border-bottom: 0; padding-bottom: 3px; }
.results thead th.task[colspan] { color: var(--ink); font-weight: 600; font-size: 14px; }
.results .task { padding-left: 36px; }
.results thead th.task[colspan] { text-align: left; padding-left: 36px; }
.results .group th { font-size: 12.5px; color: var(--wine); font-weight: 600; padding-top: 22px; }
.results tbody tr.group:first-child th { padding-top: 14px; }
.results tr.group + tr > *, .results tr:has(+ tr.group) > * { border-bottom-color: var(--hair); }
.results tbody tr.group > * { border-top: 0; }
.results tbody tr.group + tr > * { border-top: 0; }
.results tbody th[scope=row] { font-weight: 600; }
.results .sd { color: var(--muted); display: inline-block; min-width: 3.6em; text-align: left; padding-left: 0.45em; }
.results td.task b { font-weight: 700; color: var(--wine); }
.results .plot { width: 112px; padding-left: 12px; }
.results thead .plot { font-size: 11px; }
.results thead .plot i { float: right; font-style: normal; }
.results .plot svg { display: block; width: 100px; height: 16px; position: relative; top: 3px; }
.results.dense .task, .results.dense thead th.task[colspan] { padding-left: 9px; }
.results.dense .sd { min-width: 3.1em; padding-left: 0.3em; }
.results.dense .plot { width: 50px; padding-left: 3px; } .results.dense .plot svg { width: 50px; }
.results.dense .aside { padding-left: 4px; }
.results td.task strong { font-weight: 700; }
.results abbr { text-decoration: none; }
.results.dense { font-size: 12.5px; } .results.dense th, .results.dense td { padding-left: 9px; }
.results.dense th:first-child, .results.dense td:first-child { padding-left: 0; }
#certainty .plot { width: 70px; padding-left: 12px; } #certainty .plot svg { width: 64px; }
.misses { margin: 0 0 8px; padding: 0; list-style: none; }
.misses li { display: grid; grid-template-columns: 300px 1fr; gap: 0 24px; align-items: start; columns: 1;
  border-top: 1px solid var(--hair); padding: 10px 0; margin: 0; }
.misses .players { display: grid; gap: 8px; } .misses audio { width: 100%; height: 32px; display: block; }
.misses figcaption { margin-top: 3px; font-size: 11.5px; overflow-wrap: anywhere; }
.misses .words span { display: block; font: 14px/1.45 var(--sans); } .misses .words i { color: var(--muted); font-style: normal;
  display: inline-block; min-width: 5.2em; }
.pareto + .pareto { margin-top: 36px; }
.axis { stroke: var(--hair); stroke-width: 1; } .tick { stroke: var(--muted); stroke-width: 1; }
.bar { stroke: var(--wine); stroke-width: 1.6; } .plot circle { fill: var(--wine); }
.results .num.lr { color: var(--muted); padding-right: 0.6em; } .lr abbr { text-decoration: none; margin-right: -0.45em; }
.results .floor > * { color: var(--muted); font-weight: 400 !important; }
.results .chance > * { border-top: 1px solid var(--ink) !important; }
.results .majority > * { border-top: 0; padding-top: 0; }
.aside { font-size: 12.5px; padding-left: 12px; }
.tag { font: 12px var(--sans); color: var(--muted); font-weight: 400; margin-left: 0.35em; }
code, pre { font: 12.5px/1.5 ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace; }
code { color: var(--muted); }
figure { margin: 0; } figure svg { display: block; width: 100%; height: auto; overflow: visible; }
figcaption { font: 13px/1.45 var(--sans); color: var(--muted); margin-top: 12px; max-width: 52em; }
.pipeline { min-width: 900px; }
.pipeline text { font-family: var(--sans); fill: var(--ink); font-variant-numeric: lining-nums tabular-nums; }
.pipeline .stage { font-size: 13px; font-weight: 600; fill: var(--wine); }
.pipeline .figure { font: 22px var(--serif); letter-spacing: -0.01em; }
.pipeline .detail { font-size: 12px; fill: var(--muted); }
.pipeline .branch, .pipeline .half { font-size: 11.5px; fill: var(--muted); }
.pipeline .half { font-style: italic; font-family: var(--serif); font-size: 13px; }
.pipeline path { fill: none; stroke: var(--ink); stroke-width: 1.1; }
.pipeline .side { stroke: #b9b0ad; } .pipeline .meeting { stroke: var(--wine); stroke-dasharray: 3 3; }
.pipeline .station { fill: var(--paper); stroke: var(--ink); stroke-width: 1.4; } .pipeline .ours {
  fill: var(--wine); stroke: var(--wine); }
details { border-top: 1px solid var(--hair); } details:last-child { border-bottom: 1px solid var(--hair); }
summary { font: 14px/1.3 var(--sans); padding: 10px 0; cursor: pointer; }
summary::marker { color: var(--wine); font-size: 0.8em; }
pre { margin: 0 0 16px; padding: 16px 18px; background: var(--wash); overflow-x: auto; }
@media (max-width: 860px) { .misses li { grid-template-columns: 1fr; } }
@media (max-width: 860px) { main { padding: 40px 20px; } .headline { grid-template-columns: 1fr 1fr; gap: 28px 24px;
  } ul { columns: 1; } h1 { font-size: 36px; } }
@media print { body { font-size: 11pt; background: white; } main { padding: 0; max-width: none; } section {
  break-inside: avoid; } }
"""
