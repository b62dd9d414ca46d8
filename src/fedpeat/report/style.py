"""The look of a page: system fonts, light and dark, narrow and wide, screen and paper."""

from __future__ import annotations

from typing import Final

__all__ = ["STYLE"]

# Text keeps a contrast of 4.5 or more, marks one of 3 or more, in both schemes. The hues follow
# Okabe and Ito (2008), "Color Universal Design"; each comes with a shape, a dash or a word.
STYLE: Final = """
:root {
  color-scheme: light dark; --page: #fff; --panel: #f6f7f9; --line: #e2e5ea; --ink: #14171c;
  --muted: #59616e; --blue: #0864b8; --orange: #a85a00; --green: #007a5a; --red: #c03a00;
  --purple: #9c3f80; --faint: #858d9a; --wash: #fff7ea; --r0: #1d2b6b; --r1: #0864b8;
  --r2: #0a878c; --r3: #5f9440;
}
@media (prefers-color-scheme:dark) {
  :root {
    --page: #0f1216; --panel: #171b21; --line: #2a3039; --ink: #e7eaee; --muted: #9ba5b3;
    --blue: #63b3f5; --orange: #eda63b; --green: #35c99b; --red: #ff8358; --purple: #e296c9;
    --faint: #6d7785; --wash: #241d10; --r0: #d6ecff; --r1: #63b3f5; --r2: #2d9ca3;
    --r3: #5d8a42;
  }
}
* { box-sizing: border-box }
html { -webkit-text-size-adjust: 100% }
body {
  margin: 0; background: var(--page); color: var(--ink);
  font: 15px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif;
  font-variant-numeric: tabular-nums;
}
main { max-width: 1080px; margin: 0 auto; padding: 56px 28px 72px }
header .over { margin: 0 0 14px; color: var(--muted); font-size: 13px; overflow-wrap: anywhere }
header .over b { color: var(--ink); font-weight: 600 }
h1 {
  margin: 0; max-width: 30em; font-size: clamp(23px,3.4vw,32px); line-height: 1.24;
  font-weight: 640; letter-spacing: -.018em; text-wrap: balance;
}
header .meta { margin: 14px 0 0; color: var(--muted); overflow-wrap: anywhere }
h2 {
  margin: 0 0 4px; font-size: 18px; line-height: 1.35; font-weight: 620; letter-spacing: -.008em;
}
h3 { margin: 0 0 8px; font-size: 14px; font-weight: 620 }
section { margin-top: 48px }
section>h2 { margin-bottom: 14px }
section>p.lead { margin: -8px 0 18px; max-width: 46em; color: var(--muted) }
.empty, .note { color: var(--muted) }
.remarks {
  margin: 24px 0 0; padding: 12px 16px 12px 34px; border-left: 3px solid var(--orange);
  border-radius: 0 8px 8px 0; background: var(--wash);
}
.remarks.single { list-style: none; padding-left: 16px }
dl, dd, ul { margin: 0; padding: 0 }
ul { list-style: none }
.figures {
  display: grid; grid-template-columns: repeat(auto-fit,minmax(156px,1fr)); gap: 1px;
  margin-top: 36px; border: 1px solid var(--line); border-radius: 12px; overflow: hidden;
  background: var(--line);
}
.figures>div { padding: 16px 18px 15px; background: var(--page) }
.figures dt { color: var(--muted); font-size: 13px }
.figures dd {
  margin-top: 2px; font-size: 20px; line-height: 1.4; font-weight: 620; letter-spacing: -.015em;
  white-space: nowrap;
}
.figures dd.absent { font-size: 16px; font-weight: 500; letter-spacing: 0; line-height: 1.75 }
.figures dd.note {
  margin-top: 4px; font-size: 12.5px; line-height: 1.4; font-weight: 400; letter-spacing: 0;
  white-space: normal;
}
.dense th, .dense td { padding-right: 14px; font-size: 14px }
.dense thead th { font-size: 12.5px }
.absent { color: var(--muted) }
.scroll { overflow-x: auto }
.scroll+.scroll { margin-top: 24px }
.scroll.tall { max-height: 460px; overflow-y: auto }
.scroll:focus-visible, pre:focus-visible, summary:focus-visible {
  outline: 2px solid var(--blue); outline-offset: 2px;
}
table { width: 100%; border-collapse: collapse }
caption { padding: 0 0 6px; text-align: left; color: var(--muted); font-size: 13px }
th, td {
  padding: 9px 20px 9px 0; border-bottom: 1px solid var(--line); text-align: left;
  vertical-align: baseline; unicode-bidi: isolate;
}
th:last-child, td:last-child { padding-right: 0 }
thead th { color: var(--muted); font-size: 13px; font-weight: 500; white-space: nowrap }
tbody th { font-weight: 500; white-space: nowrap }
.n { text-align: right; white-space: nowrap }
td.absent { font-size: 13px }
tr.result th, tr.result td.n { font-weight: 660 }
tr.result th { color: var(--blue) }
.checks { display: grid; gap: 10px }
.checks li { display: grid; grid-template-columns: 9.5em 1fr; gap: 10px; align-items: start }
.checks small { display: block; color: var(--muted); font-size: 13px }
.verdict { display: inline-flex; gap: 6px; align-items: center; font-weight: 600 }
.verdict svg {
  flex: none; fill: none; stroke: currentColor; stroke-width: 2.2; stroke-linecap: round;
  stroke-linejoin: round;
}
.verdict.pass { color: var(--green) }
.verdict.fail { color: var(--red) }
.verdict.open { color: var(--muted); font-weight: 500 }
.legend {
  display: flex; flex-wrap: wrap; gap: 4px 22px; margin-bottom: 16px; color: var(--muted);
  font-size: 13px;
}
.legend li { display: inline-flex; gap: 8px; align-items: center }
.legend svg { flex: none }
.charts {
  display: grid; grid-template-columns: repeat(auto-fit,minmax(280px,1fr)); gap: 24px 20px;
}
figure { margin: 0; min-width: 0 }
figcaption { margin-bottom: 6px; font-size: 13px; font-weight: 600 }
svg text { fill: var(--muted); font-size: 11.5px }
.charts svg { display: block; width: 100%; max-width: 460px; height: auto }
text.y { text-anchor: end }
text.x { text-anchor: middle }
.grid { stroke: var(--line); stroke-width: 1 }
.axis { stroke: var(--faint); stroke-width: 1 }
.line { fill: none; stroke-width: 2; stroke-linejoin: round; stroke-linecap: round }
.plug { stroke: var(--blue) }
.zero { stroke: var(--muted); stroke-width: 1.5; stroke-dasharray: 6 4; stroke-linecap: butt }
.full { stroke: var(--green); stroke-width: 1.5; stroke-dasharray: 1.5 4 }
.tuned { stroke: var(--green); stroke-width: 1.5 }
.bad { stroke: var(--red) }
.mark { fill: var(--blue); stroke: var(--page); stroke-width: 1 }
.s-accepted { fill: var(--blue) }
.s-rejected { fill: none; stroke: var(--red); stroke-width: 2.2; stroke-linecap: round }
.s-failed { fill: var(--red) }
.s-late { fill: var(--purple) }
.s-dropped { fill: none; stroke: var(--orange); stroke-width: 1.8 }
.s-none { fill: var(--faint) }
.r-none { fill: var(--muted) }
.r-0 { fill: var(--r0) }
.r-1 { fill: var(--r1) }
.r-2 { fill: var(--r2) }
.r-3 { fill: var(--r3) }
.who th, .who td { padding: 3px 16px 3px 0; border: 0; vertical-align: middle }
.who td svg, .who thead svg { display: block }
.who tbody th, .who thead th:first-child { position: sticky; left: 0; background: var(--page) }
.who { width: auto }
.who.many th, .who.many td { padding-top: 1px; padding-bottom: 1px; line-height: 1.3 }
.who.many tbody th, .who.many .n { font-size: 12px }
.who .n { color: var(--muted); font-size: 13px }
.name {
  display: inline-block; max-width: 14em; overflow: hidden; text-overflow: ellipsis;
  vertical-align: bottom;
}
.badge {
  margin-left: 8px; padding: 1px 7px; border: 1px solid var(--line); border-radius: 99px;
  color: var(--muted); font-size: 11.5px;
}
.reasons { margin-top: 24px }
.reasons td:first-child { white-space: nowrap }
td svg { vertical-align: -2px }
.groups {
  display: grid; grid-template-columns: repeat(auto-fit,minmax(250px,1fr)); gap: 28px 40px;
}
.facts>div {
  display: flex; justify-content: space-between; gap: 16px; padding: 7px 0;
  border-bottom: 1px solid var(--line);
}
.facts dt { color: var(--muted) }
.facts dd { text-align: right; overflow-wrap: anywhere }
.columns { columns: 3 240px; column-gap: 40px }
.columns>div { break-inside: avoid }
details { margin-top: 16px }
summary {
  width: fit-content; padding: 4px 0; color: var(--blue); cursor: pointer; font-weight: 500;
  border-radius: 4px;
}
details[open]>summary { margin-bottom: 10px }
pre {
  margin: 0; padding: 16px 18px; max-height: 520px; overflow: auto;
  border: 1px solid var(--line); border-radius: 10px; background: var(--panel);
  font: 13px/1.6 ui-monospace,SFMono-Regular,Menlo,Consolas,monospace;
}
.glossary {
  display: grid; grid-template-columns: repeat(auto-fit,minmax(290px,1fr)); gap: 16px 40px;
}
.glossary dt { font-weight: 600 }
.glossary dd { color: var(--muted) }
footer {
  margin-top: 56px; padding-top: 16px; border-top: 1px solid var(--line); color: var(--muted);
  font-size: 13px;
}
.strips { display: block; width: 100% }
.area { stroke: var(--page); stroke-width: 1; stroke-linejoin: round }
.band { fill: var(--blue); fill-opacity: .2 }
.legend.below { margin: 10px 0 0 }
.charts .legend svg { width: 28px }
.charts+h3 { margin-top: 28px }
.charts+.note, .charts+.empty { margin-top: 16px }
.worths .label { fill: var(--ink) }
.thin { stroke-width: 1.4 }
.dashed { stroke-dasharray: 6 3 }
.dotted { stroke-dasharray: 1.5 3.5 }
.m-0 { stroke: var(--blue) }
.m-1 { stroke: var(--orange) }
.m-2 { stroke: var(--green) }
.m-3 { stroke: var(--purple) }
.m-4 { stroke: var(--red) }
.m-5 { stroke: var(--ink) }
.end { fill: var(--page); stroke-width: 2; stroke-dasharray: none }
.pareto { display: block; width: 100%; max-width: 720px; height: auto }
.strips text { paint-order: stroke; stroke: var(--page); stroke-width: 4px }
.strips .label { fill: var(--ink); font-size: 14px; font-weight: 500 }
.strips .range { stroke: var(--blue); stroke-width: 3; stroke-linecap: round }
.strips .seed { fill: var(--page); stroke: var(--blue); stroke-width: 1.5 }
.strips .mean { fill: var(--blue); stroke: var(--page); stroke-width: 1.5 }
.scroll small { display: block; color: var(--muted); font-size: 12.5px }
@media (max-width:600px) {
  main { padding: 32px 18px 48px }
  section { margin-top: 40px }
  .figures { grid-template-columns: 1fr 1fr; margin-top: 28px }
  .figures>div { padding: 13px 14px }
  .figures dd { font-size: 19px }
  .checks li { grid-template-columns: 1fr; gap: 0 }
  .name { max-width: 8em }
  th, td { padding-right: 14px }
  .who th, .who td { padding-right: 10px }
  .qualities tr {
    display: grid; grid-template-columns: 1fr auto auto; column-gap: 16px; padding: 8px 0;
    border-bottom: 1px solid var(--line);
  }
  .qualities th, .qualities td { padding: 0; border: 0 }
  .qualities td:last-child { grid-column: 1/-1; color: var(--muted); font-size: 13px }
  .qualities thead th:last-child { display: none }
  .qualities th.n, .qualities td.n { min-width: 5.4em; max-width: 6.4em; white-space: normal }
  .qualities thead tr { align-items: end }
}
@media print {
  :root {
    color-scheme: light; --page: #fff; --panel: #fff; --line: #ccc; --ink: #000; --muted: #444;
    --blue: #0864b8; --orange: #a85a00; --green: #007a5a; --red: #c03a00; --purple: #9c3f80;
    --faint: #aaa; --wash: #fff; --r0: #1d2b6b; --r1: #0864b8; --r2: #0a878c; --r3: #5f9440;
  }
  body { font-size: 10.5pt; -webkit-print-color-adjust: exact; print-color-adjust: exact }
  main { max-width: none; padding: 0 }
  section { margin-top: 26px }
  .charts { grid-template-columns: repeat(3,1fr) }
  .figures { grid-template-columns: repeat(3,1fr) }
  figure, tr, .figures>div, .facts>div { break-inside: avoid }
  h2, h3, .lead { break-after: avoid }
  .scroll, .scroll.tall, pre { max-height: none; overflow: visible }
  pre { white-space: pre-wrap }
  .who svg { width: 100%; height: auto; max-width: 440px }
}
"""
