"""The style sheet of report.html: system fonts, two themes by the reader's preference, no
images.
"""

from __future__ import annotations

STYLE = """
:root {
  color-scheme: light dark;
  --bg: #fbfbfa; --card: #ffffff; --ink: #1d2330; --muted: #667085; --line: #e4e6ea;
  --accent: #3b63d9; --base: #a9b2c3; --good: #18794e; --good-bg: #e3f5ea; --warn: #9a5b00;
  --warn-bg: #fdf1dc; --bad: #c0362c; --allowed: #18794e14; --code: #f2f3f5;
}
@media (prefers-color-scheme: dark) {
  :root {
    --bg: #14161b; --card: #1b1e25; --ink: #e6e8ec; --muted: #98a1b2; --line: #2c313b;
    --accent: #7d9bff; --base: #596377; --good: #5cc98d; --good-bg: #16301f; --warn: #e5b160;
    --warn-bg: #33270f; --bad: #ff8a7d; --allowed: #5cc98d1a; --code: #22262f;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0; background: var(--bg); color: var(--ink);
  font: 15px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif;
}
main { max-width: 960px; margin: 0 auto; padding: 40px 24px 80px; }
h1 { font-size: 27px; line-height: 1.25; margin: 10px 0 6px; letter-spacing: -0.01em; }
h2 { font-size: 18px; margin: 0 0 4px; }
h3 { font-size: 14px; margin: 22px 0 6px; }
p { margin: 6px 0; }
.muted, .lead { color: var(--muted); }
.lead { margin-bottom: 22px; }
.badge {
  display: inline-block; padding: 2px 11px; border-radius: 99px; font-size: 13px; font-weight: 600;
  background: var(--warn-bg); color: var(--warn);
}
.badge.good { background: var(--good-bg); color: var(--good); }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(165px, 1fr)); gap: 12px; }
.card, section {
  background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 16px 18px;
}
.card .name, .card .figure { overflow: hidden; text-overflow: ellipsis; white-space: nowrap; }
.card .name { font-size: 13px; color: var(--muted); }
.card .figure { font-size: 20px; font-weight: 650; letter-spacing: -0.02em; }
.card .note { font-size: 13px; color: var(--muted); line-height: 1.4; }
section { margin-top: 18px; padding: 22px 24px; }
.callout {
  margin-top: 18px; padding: 12px 18px; border-radius: 10px;
  background: var(--warn-bg); color: var(--ink); border-left: 4px solid var(--warn);
}
.scroll { overflow-x: auto; margin-top: 10px; }
table { border-collapse: collapse; width: 100%; font-size: 13.5px; }
table { font-variant-numeric: tabular-nums; }
th, td { text-align: left; vertical-align: top; padding: 6px 14px 6px 0; }
th { font-weight: 600; color: var(--muted); white-space: nowrap; }
thead th { border-bottom: 1px solid var(--line); }
tr + tr td { border-top: 1px solid var(--line); }
td:last-child, th:last-child { padding-right: 0; }
code, pre { font: 12.5px/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
code { overflow-wrap: anywhere; }
pre {
  background: var(--code); border-radius: 8px; padding: 11px 14px; margin: 10px 0;
  white-space: pre-wrap; overflow-wrap: anywhere;
}
details { margin-top: 12px; }
summary { cursor: pointer; color: var(--accent); }
.ok { color: var(--good); } .no { color: var(--muted); } .bad { color: var(--bad); }
svg { display: block; width: 100%; height: auto; max-width: 860px; margin: 12px 0 4px; }
svg text { font: 13px system-ui, sans-serif; fill: var(--ink); }
svg .small { font-size: 12px; fill: var(--muted); } svg .tiny { font-size: 11px; }
svg .end { text-anchor: end; } svg .mid { text-anchor: middle; } svg .on { fill: var(--card); }
.bar { fill: var(--base); } .bar.result { fill: var(--accent); }
.whisker { stroke: var(--ink); stroke-width: 1.3; } .whisker.thick { stroke-width: 3; }
.axis, .grid { stroke: var(--line); } .bound { stroke: var(--good); stroke-dasharray: 4 3; }
.allowed { fill: var(--allowed); } .heat { fill: var(--bad); } .heat.gain { fill: var(--good); }
.empty { fill: var(--code); } .cool { fill: var(--accent); }
.curve { fill: none; stroke: var(--accent); stroke-width: 1.6; }
.dot { fill: var(--base); stroke: var(--card); stroke-width: 1.5; }
.dot.miss { fill: none; stroke: var(--base); } .dot.front { fill: var(--ink); }
.dot.chosen, .dot.pass { fill: var(--accent); } .dot.fail { fill: var(--bad); }
.dot.inconclusive { fill: var(--warn); }
.front-line { fill: none; stroke: var(--ink); stroke-width: 1; opacity: 0.35; }
.key { font-size: 13px; color: var(--muted); }
.key span { display: inline-block; width: 10px; height: 10px; border-radius: 9px; }
.key span { margin: 0 5px 0 14px; }
.key .chosen { background: var(--accent); } .key .front { background: var(--ink); }
.key .try { background: var(--base); } .key .miss { border: 1.5px solid var(--base); }
@media print { body { background: none; } section, .card { break-inside: avoid; } }
"""
