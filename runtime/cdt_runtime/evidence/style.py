"""How a page of evidence looks: light, dark, narrow and on paper. No script."""

from __future__ import annotations

STYLE = """
:root { color-scheme: light dark; --ink: #16202a; --paper: #ffffff; --edge: #c9d2da;
  --tint: #eef2f5; --quiet: #52606d; --warn: #8a4b00; --bar: #0072b2; --other: #8fa3b3; }
@media (prefers-color-scheme: dark) { :root { --ink: #e8edf2; --paper: #12171c; --edge: #37424d;
  --tint: #1b232b; --quiet: #a3b1bd; --warn: #f2b866; --bar: #56b4e9; --other: #5d7080; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 70rem; padding: 1.25rem; background: var(--paper);
  color: var(--ink); font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.35rem; margin: 0; overflow-wrap: anywhere; }
h2 { font-size: 1.05rem; margin: 1.8rem 0 .5rem; }
.answer { font-size: 1.7rem; font-weight: 700; margin: .4rem 0 0; overflow-wrap: anywhere; }
.reason, .notice { color: var(--warn); margin: .2rem 0; overflow-wrap: anywhere; }
.quiet, figcaption, caption { color: var(--quiet); font-size: .9rem; }
.top { display: grid; grid-template-columns: minmax(0, 20rem) minmax(0, 1fr); gap: 1.5rem; }
figure { margin: 0; }
.seen { position: relative; }
.seen img { display: block; width: 100%; image-rendering: auto; border: 1px solid var(--edge); }
.seen img.over { position: absolute; inset: 0; border: 0; mix-blend-mode: normal; }
#plain:checked ~ .seen .over { display: none; }
.strip { margin-top: .8rem; }
.strip img { width: 100%; max-width: 60rem; display: block; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
caption { text-align: left; padding-bottom: .3rem; }
th, td { text-align: left; padding: .3rem .7rem .3rem 0; border-bottom: 1px solid var(--edge);
  vertical-align: top; }
td.number, th.number { text-align: right; white-space: nowrap; padding-right: 1.2rem; }
.bars { list-style: none; margin: .6rem 0; padding: 0; }
.bars li { margin: .35rem 0; }
.bars .line { display: flex; justify-content: space-between; gap: 1rem; }
.track { background: var(--tint); height: .7rem; }
.fill { background: var(--other); height: 100%; }
.first .fill { background: var(--bar); }
dl { display: grid; grid-template-columns: max-content minmax(0, 1fr); gap: .2rem 1rem; margin: 0; }
dt { color: var(--quiet); }
dd { margin: 0; overflow-wrap: anywhere; }
code { font-size: .9em; }
@media (max-width: 42rem) { .top { grid-template-columns: minmax(0, 1fr); }
  dl { grid-template-columns: minmax(0, 1fr); } dd { margin-bottom: .4rem; } }
@media print { :root { --ink: #000; --paper: #fff; --tint: #e6e6e6; --edge: #999; --quiet: #333;
    --warn: #5a3000; --bar: #000; --other: #888; }
  body { max-width: none; padding: 0; font-size: 11pt; }
  table, figure, .bars li { break-inside: avoid; } label, input { display: none; }
  .track { print-color-adjust: exact; } .fill { print-color-adjust: exact; } }
"""
