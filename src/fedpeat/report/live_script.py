"""What the live page runs and how it looks beside the report; both are part of the page itself."""

from __future__ import annotations

from typing import Final

__all__ = ["LIVE_STYLE", "POLL_SECONDS", "SCRIPT"]

POLL_SECONDS: Final = 2
"""How often an open page asks; the server says with a few bytes that nothing is new."""

# The page is fetched again and its parts are put in the place of those that changed. Markup that
# comes in is parsed without running anything, and the policy of the page lets only these bytes run.
SCRIPT: Final = """
"use strict";
(() => {
  const POLL = POLL_MILLISECONDS, known = new Map();
  let etag = "", offset = 0, failed = 0, timer = 0;
  const parts = root => [...root.querySelectorAll("main > [id]")];
  const note = document.getElementById("link");
  history.replaceState(null, "", location.pathname);  // the token goes on in the cookie

  const ago = seconds => {
    const s = Math.max(0, Math.round(seconds));
    if (s < 60) return s + " s ago";
    if (s < 3600) return Math.floor(s / 60) + " min " + s % 60 + " s ago";
    if (s < 86400) return Math.floor(s / 3600) + " h " + Math.floor(s % 3600 / 60) + " min ago";
    return Math.floor(s / 86400) + " d " + Math.floor(s % 86400 / 3600) + " h ago";
  };
  const tick = () => {
    for (const time of document.querySelectorAll("time[data-ago]"))
      time.textContent = ago((Date.now() + offset - Date.parse(time.dateTime)) / 1000);
  };
  const put = (part, old) => {
    const fresh = document.importNode(part, true);
    const open = [...old.querySelectorAll("details")].map(one => one.open);
    const boxes = [...old.querySelectorAll(".scroll")];
    const scrolled = boxes.map(one => [one.scrollLeft, one.scrollTop]);
    old.replaceWith(fresh);
    fresh.querySelectorAll("details").forEach((one, i) => { if (open[i]) one.open = true; });
    fresh.querySelectorAll(".scroll").forEach((one, i) => {
      if (scrolled[i]) [one.scrollLeft, one.scrollTop] = scrolled[i];
    });
  };
  const show = page => {
    document.title = page.title;
    for (const part of parts(page)) {
      const old = document.getElementById(part.id);
      if (old && known.get(part.id) !== part.outerHTML) put(part, old);
      known.set(part.id, part.outerHTML);
    }
    tick();
  };
  const say = text => { note.textContent = text; note.hidden = !text; };
  const ask = async () => {
    clearTimeout(timer);
    try {
      const headers = etag ? { "If-None-Match": etag } : {};
      const signal = AbortSignal.timeout(8000);
      const answer = await fetch("/", { headers, cache: "no-store", signal });
      const date = Date.parse(answer.headers.get("Date"));
      if (date) offset = date - Date.now();
      if (answer.ok) {
        show(new DOMParser().parseFromString(await answer.text(), "text/html"));
        etag = answer.headers.get("ETag") || "";
      } else if (answer.status !== 304 && answer.status !== 401) throw new Error(answer.status);
      say(answer.status === 401 ? "The token does not hold any more: open the new address." : "");
      failed = 0;
    } catch {
      failed += 1;
      say("No answer from the server: what is shown may be old. Trying again.");
    }
    timer = setTimeout(ask, document.hidden ? 30 * POLL : POLL * Math.min(1 + failed, 8));
  };
  for (const part of parts(document)) known.set(part.id, part.outerHTML);
  document.addEventListener("visibilitychange", () => { if (!document.hidden) ask(); });
  setInterval(tick, 1000);
  tick();
  timer = setTimeout(ask, POLL);
})();
""".replace("POLL_MILLISECONDS", str(1000 * POLL_SECONDS))

LIVE_STYLE: Final = """
.over { display: flex; flex-wrap: wrap; gap: 4px 12px; align-items: center }
.state { display: inline-flex; gap: 7px; align-items: center; font-weight: 600 }
.state::before {
  content: ""; flex: none; width: 9px; height: 9px; border-radius: 50%; background: currentColor;
}
.state.running { color: var(--green) }
.state.finished { color: var(--blue) }
.state.stopped { color: var(--red) }
.state.stopped::before { border-radius: 2px }
.state.unknown { color: var(--muted) }
.state.unknown::before { background: none; border: 2px solid currentColor }
@keyframes breathe { 50% { opacity: .35 } }
@media (prefers-reduced-motion:no-preference) {
  .state.running::before { animation: breathe 2s ease-in-out infinite }
}
header .log { margin-top: 4px; font-size: 13px }
.done { display: block; width: 100%; height: 6px; margin-top: 26px }
.done .all { fill: var(--line) }
.done .part { fill: var(--blue) }
.done+.figures { margin-top: 18px }
.progress .charts { grid-template-columns: repeat(auto-fit,minmax(270px,1fr)) }
#link {
  position: fixed; inset: auto 16px 16px; z-index: 1; max-width: 40em; margin: 0 auto;
  padding: 10px 16px; border-left: 3px solid var(--red); border-radius: 0 8px 8px 0;
  background: var(--wash); color: var(--ink); box-shadow: 0 2px 14px rgb(0 0 0/.25);
}
#link[hidden] { display: none }
.who .now svg { display: inline-block; margin-right: 7px; vertical-align: -1px }
.now { white-space: nowrap }
.now small, .events td:last-child { overflow-wrap: anywhere }
.now small { padding-left: 20px; white-space: normal; min-width: 14em; max-width: 26em }
.who td.n { color: var(--ink) }
.who.live { width: 100% }
.who.live td { padding-top: 5px; padding-bottom: 5px; font-size: 14px }
.who.live td:nth-child(6), .who.live th:nth-child(6) { padding-left: 8px }
.who.live thead th { padding-bottom: 6px }
.events td { padding-top: 6px; padding-bottom: 6px }
.events td:first-child, .events td:nth-child(2) { white-space: nowrap }
.kind-warning { color: var(--orange); font-weight: 600 }
.kind-fault { color: var(--red); font-weight: 600 }
.stages li { display: inline-flex; gap: 8px; margin-right: 28px }
@media (max-width:600px) {
  .now small { min-width: 10em }
  .done { margin-top: 20px }
}
"""
