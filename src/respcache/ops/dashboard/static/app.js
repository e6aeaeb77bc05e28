// The pages' script: live statistics, charts, keyboard shortcuts, theme. Pages work without it.
"use strict";

(() => {
  const KEPT_S = 3600;
  const root = document.documentElement;
  const one = (selector, within = document) => within.querySelector(selector);
  const all = (selector, within = document) => [...within.querySelectorAll(selector)];
  const color = (name) => getComputedStyle(root).getPropertyValue(`--${name}`).trim();

  // -- data: columns that grow at their end -------------------------------------------------------

  const columns = { at: [] };
  let minutes = Number(one("[data-minutes][aria-current]")?.dataset.minutes || 3);

  function merge(fresh) {
    const times = fresh.at || [];
    for (const name of Object.keys(fresh)) columns[name] ||= columns.at.map(() => null);
    times.forEach((at, i) => {
      const last = columns.at.length - 1;
      let position = last;
      while (position >= 0 && columns.at[position] > at) position--;
      if (columns.at[position] !== at) {
        if (position !== last) return;
        position = last + 1;
        for (const name of Object.keys(columns)) columns[name].push(null);
        columns.at[position] = at;
      }
      for (const name of Object.keys(fresh)) columns[name][position] = fresh[name][i];
    });
    const end = columns.at[columns.at.length - 1];
    while (columns.at.length && columns.at[0] < end - KEPT_S) {
      for (const name of Object.keys(columns)) columns[name].shift();
    }
  }

  // -- charts -------------------------------------------------------------------------------------

  const AREA = { fill: true };
  const CHARTS = {
    requests: {
      stacked: true,
      lines: [["hits", "hit", AREA], ["misses", "miss", AREA], ["bypasses", "bypass", AREA]],
      unit: "/s",
    },
    ratio: { lines: [["ratio", "hit", AREA]], top: 100, unit: "%" },
    latency: {
      log: true,
      lines: [
        ["hit_p50", "hit"], ["hit_p95", "time-2"], ["miss_p50", "miss"], ["miss_p95", "miss-2"],
      ],
      unit: " ms",
    },
    work: { lines: [["misses", "miss"], ["invalidations", "time"]], unit: "/s" },
    saved: { lines: [["saved", "saved", AREA]], unit: " s/s" },
  };
  const drawn = [];

  function format(value) {
    if (value == null) return "–";
    const size = Math.abs(value);
    if (size >= 10000) return `${(value / 1000).toFixed(size >= 100000 ? 0 : 1)}k`;
    if (size >= 100) return value.toFixed(0);
    if (size >= 10) return value.toFixed(1);
    return size === 0 ? "0" : value.toFixed(2);
  }

  function dataOf(chart) {
    const lines = chart.lines.map(([name]) => columns[name] || columns.at.map(() => null));
    if (!chart.stacked) return [columns.at, ...lines];
    let below = columns.at.map(() => 0);
    const piled = lines.map((line) => (below = below.map((value, i) => value + (line[i] || 0))));
    return [columns.at, ...piled.reverse()];
  }

  function build(holder) {
    const chart = CHARTS[holder.dataset.chart];
    const order = chart.stacked ? [...chart.lines].reverse() : chart.lines;
    const text = {
      stroke: () => color("faint"), font: "11px Inter, system-ui", ticks: { show: false },
      grid: { stroke: () => color("line-soft"), width: 1 },
    };
    const timeOfDay = (at) => new Date(at * 1000).toLocaleTimeString([], {
      hour: "2-digit", minute: "2-digit", second: minutes < 15 ? "2-digit" : undefined,
      hour12: false,
    });
    const timeRange = () => {
      const end = columns.at[columns.at.length - 1] || Date.now() / 1000;
      return [end - minutes * 60, end];
    };
    const decades = (u) => [0.01, 0.1, 1, 10, 100, 1000, 10000].filter(
      (mark) => mark >= u.scales.y.min * 0.99 && mark <= u.scales.y.max);
    const logRange = (u, low, high) =>
      [Math.max(0.01, Math.min(low || 0.1, 0.1)), Math.max(high || 1, 10)];
    const area14 = (hue) => `color-mix(in srgb, ${color(hue)} 14%, transparent)`;
    const options = {
      width: holder.clientWidth, height: holder.clientHeight, padding: [8, 4, 0, 0],
      legend: { show: false },
      cursor: {
        sync: { key: "time" }, y: false, points: { size: 6, width: 1.5 },
        drag: { x: false, y: false },
      },
      scales: {
        x: { time: true, range: timeRange },
        y: chart.log
          ? { distr: 3, log: 10, range: logRange }
          : { range: (u, low, high) => [0, chart.top || (high ? high * 1.12 : 1)] },
      },
      axes: [
        { ...text, size: 24, gap: 4, space: 70, values: (u, marks) => marks.map(timeOfDay) },
        {
          ...text, size: 38, gap: 5, space: 34, ...(chart.log && { splits: decades }),
          values: (u, marks) => marks.map(
            (mark) => (mark == null ? "" : String(Number(mark.toPrecision(3))))),
        },
      ],
      series: [{}, ...order.map(([name, hue, area]) => ({
        stroke: () => color(hue), width: 1.5, gaps: bridged, points: { show: false },
        fill: area && (() => (chart.stacked ? mix(color(hue)) : area14(hue))),
      }))],
      hooks: { setCursor: [(u) => tip(u, holder, chart)] },
    };
    one("svg.still", holder)?.remove();
    holder.classList.add("drawn");
    const plot = new uPlot(options, dataOf(chart), holder);
    const box = document.createElement("div");
    box.className = "tip";
    box.hidden = true;
    holder.append(box);
    new ResizeObserver(() => {
      const { clientWidth: width, clientHeight: height } = holder;
      if (width) plot.setSize({ width, height });
    }).observe(holder);
    drawn.push({ plot, chart, holder });
  }

  // lines bridge gaps of less than a minute
  const bridged = (u, series, first, last, gaps) => {
    const minute = u.valToPos(60, "x", true) - u.valToPos(0, "x", true);
    return gaps.filter(([from, to]) => to - from > minute);
  };

  const mix = (hue) => `color-mix(in srgb, ${hue} 32%, ${color("panel")})`;

  function tip(u, holder, chart) {
    const box = one(".tip", holder);
    const i = u.cursor.idx;
    if (!box) return;
    box.hidden = i == null || u.cursor.left < 0 || !holder.matches(":hover");
    if (box.hidden) return;
    box.replaceChildren();
    const when = document.createElement("time");
    when.textContent = new Date(columns.at[i] * 1000).toLocaleTimeString([], { hour12: false });
    box.append(when);
    for (const [name, hue] of chart.lines) {
      const line = document.createElement("span");
      line.className = `c-${hue}`;
      const value = document.createElement("b");
      value.textContent = format(columns[name]?.[i]) + chart.unit;
      line.append(document.createElement("i"), label(holder, name), value);
      box.append(line);
    }
    const right = u.cursor.left > u.over.clientWidth / 2;
    const left = u.over.offsetLeft + u.cursor.left + (right ? -box.offsetWidth - 12 : 12);
    box.style.left = `${Math.max(0, left)}px`;
  }

  function label(holder, name) {
    const entry = one(`[data-last="${holder.dataset.chart}.${name}"]`)?.parentElement;
    const text = holder.dataset.chart === "latency"
      ? name.replace("_", " ")
      : entry?.firstElementChild?.nextSibling?.textContent || name;
    return document.createTextNode(text);
  }

  function redraw() {
    if (!columns.at.length) return;
    if (!drawn.length) all("[data-chart]").forEach(build);
    for (const { plot, chart, holder } of drawn) {
      plot.setData(dataOf(chart));
      for (const [name] of chart.lines) {
        const last = one(`[data-last="${holder.dataset.chart}.${name}"]`);
        if (last) last.textContent = format((columns[name] || []).at(-1));
      }
    }
    all("[data-spark]").forEach(spark);
  }

  function spark(svg) {
    const values = (columns[svg.dataset.spark] || []).slice(-minutes * 6);
    const top = svg.dataset.spark === "ratio"
      ? 100
      : Math.max(...values.map((value) => value || 0)) || 1;
    const step = 600 / Math.max(1, values.length - 1);
    const runs = [[]];
    values.forEach((value, i) => {
      if (value == null) runs.push([]);
      else runs.at(-1).push(`${(i * step).toFixed(1)} ${(100 * (1 - value / top)).toFixed(1)}`);
    });
    const lines = runs.filter((run) => run.length);
    const [area, path] = svg.children;
    path.setAttribute("d", lines.map((run) => `M${run.join("L")}`).join(""));
    const x = (position) => position.split(" ")[0];
    area.setAttribute("d", lines.map(
      (run) => `M${x(run[0])} 100L${run.join("L")}L${x(run.at(-1))} 100Z`).join(""));
  }

  function write(texts) {
    for (const [id, [value, sub, tone, share]] of Object.entries(texts)) {
      const element = one(`[data-tile="${id}"], [data-state="${id}"]`);
      if (!element) continue;
      set(one("[data-value]", element), value);
      set(one("[data-sub]", element), sub);
      const dot = one(".dot", element);
      if (dot) dot.className = `dot ${tone}`;
      if (share != null) one(".share rect", element)?.setAttribute("width", `${100 * share}%`);
    }
  }

  const set = (element, text) => {
    if (element && element.textContent !== text) element.textContent = text;
  };

  // -- streams ------------------------------------------------------------------------------------

  function stream(address, handlers) {
    const source = new EventSource(address);
    const pill = one("#live");
    const show = (state, text) => {
      if (!pill) return;
      pill.hidden = false;
      pill.className = `live ${state}`;
      set(one("[data-live]", pill), text);
    };
    show("", "connecting");
    source.onopen = () => show("on", "live");
    source.onerror = () => show("off", source.readyState === EventSource.CLOSED
      ? "not live: reload the page" : "reconnecting");
    source.addEventListener("end", () => { source.close(); location.reload(); });
    source.addEventListener("problem", (event) => show("off", JSON.parse(event.data).message));
    for (const [name, handle] of Object.entries(handlers)) {
      source.addEventListener(name, (event) => {
        show("on", "live");
        handle(JSON.parse(event.data));
      });
    }
    addEventListener("pagehide", () => source.close());
  }

  function update({ text, columns: fresh }) {
    write(text);
    merge(fresh);
    redraw();
  }

  const live = one("[data-live-url]");
  if (live) stream(live.dataset.liveUrl, { stats: update });

  const feed = one("[data-feed]");
  if (feed) stream(feed.dataset.feed, { rows: ({ html }) => {
    one(".placeholder", feed)?.remove();
    const rows = document.createElement("template");
    rows.innerHTML = html;  // from the dashboard, which escapes its content
    for (const row of all("tr", rows.content).reverse()) {
      if (document.getElementById(row.id)) continue;
      row.classList.add("new");
      feed.prepend(row);
    }
    all("tr", feed).slice(200).forEach((row) => row.remove());
  } });

  all("[data-minutes]").forEach((link) => link.addEventListener("click", (event) => {
    event.preventDefault();
    all("[data-minutes]").forEach((other) => other.removeAttribute("aria-current"));
    link.setAttribute("aria-current", "true");
    minutes = Number(link.dataset.minutes);
    redraw();
  }));

  // -- theme --------------------------------------------------------------------------------------

  const theme = one("#theme");
  theme?.addEventListener("submit", (event) => {
    event.preventDefault();
    const order = ["auto", "light", "dark"];
    root.dataset.theme = order[(order.indexOf(root.dataset.theme) + 1) % order.length];
    const form = new URLSearchParams(new FormData(theme));
    form.set("theme", root.dataset.theme);
    fetch(theme.action, { method: "POST", body: form, redirect: "manual" });
    drawn.forEach(({ plot }) => plot.redraw(false));
  });
  const recolor = () => drawn.forEach(({ plot }) => plot.redraw(false));
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", recolor);

  // -- confirmations of forms ---------------------------------------------------------------------

  for (const input of all("[data-confirm]")) {
    const button = one("button.danger", input.form);
    const check = () => { button.disabled = input.value.trim() !== input.dataset.confirm; };
    input.addEventListener("input", check);
    check();
  }

  // -- keyboard shortcuts -------------------------------------------------------------------------

  const help = one("#help");
  let waiting = 0;
  let row = -1;

  function toRow(step) {
    const rows = all("table tbody tr").filter((candidate) => one("a", candidate));
    if (!rows.length) return;
    all("tr.at").forEach((other) => other.classList.remove("at"));
    row = Math.max(0, Math.min(rows.length - 1, row + step));
    rows[row].classList.add("at");
    one("a", rows[row]).focus({ preventScroll: true });
    rows[row].scrollIntoView({ block: "nearest" });
  }

  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const typing = event.target.matches("input, textarea, select");
    if (typing) {
      if (event.key === "Escape") event.target.blur();
      return;
    }
    if (Date.now() - waiting < 1200) {
      waiting = 0;
      const link = one(`.nav a[data-key="${CSS.escape(event.key)}"]`);
      if (link) { event.preventDefault(); link.click(); return; }
    }
    const actions = {
      g: () => { waiting = Date.now(); },
      "?": () => help?.showModal(),
      "/": () => one("[data-search], main input:not([type=hidden])")?.focus(),
      d: () => theme?.requestSubmit(),
      j: () => toRow(1),
      k: () => toRow(-1),
    };
    if (actions[event.key]) { event.preventDefault(); actions[event.key](); }
  });
  one("#help-open")?.addEventListener("click", () => help.showModal());
  help?.addEventListener("click", (event) => { if (event.target === help) help.close(); });
  all(".scripted").forEach((element) => { element.hidden = false; });
})();
