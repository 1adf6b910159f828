"""How the HTML report looks: light, dark and on paper."""

from __future__ import annotations

STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --paper: #fff; --line: #d0d7de;
  --soft: #f3f5f7; --faint: #57606a; --mark: #9a5b00; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6edf3; --paper: #14181d; --line: #3a424c;
  --soft: #1e242b; --faint: #9aa6b2; --mark: #f0b25c; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.5rem; max-width: 76rem; background: var(--paper);
  color: var(--ink); font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.5rem; margin: 0 0 .3rem; }
h2 { font-size: 1.15rem; margin: 2rem 0 .6rem; border-bottom: 1px solid var(--line); }
h3 { font-size: 1rem; margin: 1rem 0 .3rem; }
.notice { color: var(--mark); font-weight: 600; margin: .3rem 0; }
.verdict { background: var(--soft); border-left: 4px solid var(--mark); margin: .5rem 0;
  padding: .5rem .8rem; }
.wide { overflow-x: auto; margin-bottom: 1.2rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
caption { text-align: left; color: var(--faint); padding-bottom: .3rem; }
th, td { padding: .3rem .6rem; text-align: right; border-bottom: 1px solid var(--line);
  white-space: nowrap; }
thead th { white-space: normal; vertical-align: bottom; font-size: .85rem; }
th[scope=row] { text-align: left; font-weight: 600; }
tbody tr:nth-child(odd) { background: var(--soft); }
small, figcaption { color: var(--faint); }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .2rem 1rem; margin: 0; }
dt { color: var(--faint); }
dd { margin: 0; overflow-wrap: anywhere; }
.warn { color: var(--mark); margin: 0; overflow-wrap: anywhere; }
figure { display: inline-block; margin: 0 1rem 1rem 0; vertical-align: top; max-width: 100%; }
img { max-width: 100%; background: #fff; border: 1px solid var(--line); }
figcaption { max-width: 46rem; font-size: .9rem; }
pre { background: var(--soft); padding: .8rem; overflow-x: auto; }
@media print { body { max-width: none; padding: 0; font-size: 11px; }
  figure, table { break-inside: avoid; } .wide { overflow: visible; } }
"""
