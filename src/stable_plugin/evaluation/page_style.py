"""Skeleton and style of the HTML report, for :class:`string.Template`."""

PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>$title</title>
<style>
:root { color-scheme: light dark; $light --page: #f4f5f7; --wash: #f4f5f7; }
@media screen and (prefers-color-scheme: dark) {
  :root { $dark --page: #12151a; --wash: #21262d; }
}
* { box-sizing: border-box; }
body {
  margin: 0; background: var(--page); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", "Noto Sans", sans-serif;
  font-variant-numeric: tabular-nums; -webkit-text-size-adjust: 100%;
}
main { max-width: 1000px; margin: 0 auto; padding: 40px 24px 64px; }
h1 { margin: 0 0 10px; font-size: 1rem; font-weight: 600; color: var(--muted); overflow-wrap: anywhere; }
h2 { margin: 0 0 14px; font-size: 1.15rem; font-weight: 650; line-height: 1.3; overflow-wrap: anywhere; }
.lead { padding-left: 18px; border-left: 4px solid var(--reference); }
.lead.better { border-color: var(--after); }
.lead.worse { border-color: var(--before); }
.lead p {
  margin: 0; font-size: clamp(1.4rem, 3.4vw, 2rem); font-weight: 650; line-height: 1.22; letter-spacing: -0.012em;
  text-wrap: balance;
}
.lead ul { margin: 14px 0 0; padding: 0 0 0 1.1em; color: var(--muted); }
.lead li { margin: 3px 0; text-wrap: pretty; overflow-wrap: anywhere; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(225px, 1fr)); gap: 14px; margin: 30px 0 14px; }
.tile, figure, section, details { background: var(--paper); border: 1px solid var(--rule); border-radius: 10px; }
.tile { padding: 15px 16px; }
.tile h3 { margin: 0; font-size: 0.86rem; font-weight: 600; color: var(--muted); }
.tile p { margin: 0; font-size: 0.8rem; line-height: 1.45; color: var(--muted); }
.tile .value { margin: 6px 0 8px; font-size: 1.45rem; font-weight: 680; line-height: 1.15; color: var(--ink); }
.tile .value > span { white-space: nowrap; letter-spacing: -0.015em; }
.tile small { font-size: 0.86rem; font-weight: 450; color: var(--muted); white-space: nowrap; }
.before { color: var(--before); } .control { color: var(--control); }
.after, .evaluation { color: var(--after); } .to { color: var(--muted); font-weight: 400; }
figure, section, details { margin: 14px 0; padding: 22px 24px; }
.plot { overflow-x: auto; }
.plot svg { display: block; width: 100%; min-width: 620px; height: auto; }
.plot svg text { font-family: inherit !important; font-variant-numeric: tabular-nums; }
figcaption { margin-top: 12px; max-width: 52em; font-size: 0.9rem; color: var(--muted); text-wrap: pretty; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: 0.9rem; }
th, td { padding: 6px 14px 6px 0; text-align: left; vertical-align: top; font-weight: 400; }
.numbers, .windows { width: 100%; }
thead th { border-bottom: 1.5px solid var(--muted); font-weight: 650; }
.numbers td, .numbers tbody th, .windows td { border-bottom: 1px solid var(--rule); }
.numbers tbody th { color: var(--muted); min-width: 11em; overflow-wrap: anywhere; }
.numbers .group th { padding-top: 18px; color: var(--ink); font-weight: 650; }
.windows td, .windows th { text-align: right; vertical-align: bottom; font-size: 0.84rem; }
.windows td { white-space: nowrap; }
.settings th { color: var(--muted); white-space: nowrap; }
.settings th, .settings td { border-top: 1px solid var(--rule); overflow-wrap: anywhere; }
.settings > tbody > tr:first-child > * { border-top: 0; }
.settings .settings th, .settings .settings td { padding-top: 3px; padding-bottom: 3px; }
.settings td:has(> .settings) { padding-top: 3px; }
details { padding: 14px 24px; }
summary { cursor: pointer; font-weight: 650; }
details[open] summary { margin-bottom: 12px; }
dl { margin: 0; display: grid; grid-template-columns: minmax(9em, 14em) 1fr; gap: 8px 22px; font-size: 0.9rem; }
dt { color: var(--muted); } dd { margin: 0; max-width: 42em; text-wrap: pretty; }
footer { margin-top: 26px; font-size: 0.84rem; color: var(--muted); overflow-wrap: anywhere; }
footer p { margin: 4px 0; }
@media (max-width: 640px) {
  main { padding: 24px 12px 40px; } figure, section { padding: 16px 14px; }
  dl { grid-template-columns: 1fr; gap: 2px; } dd { margin-bottom: 10px; }
}
@media print { figure, .tile, section { break-inside: avoid; } :root { --page: #fff; } .plot svg { min-width: 0; } }
</style>
</head>
<body>
<main>
<header>
<h1>$title</h1>
<div class="lead $outcome"><p>$headline</p><ul>$findings</ul></div>
</header>
<div class="tiles">$tiles</div>
$figures
<section><h2>All numbers</h2>$numbers</section>
$rounds
$settings
<section><h2>How the numbers are defined</h2><dl>$definitions</dl></section>
<footer>$footer</footer>
</main>
</body>
</html>
"""
