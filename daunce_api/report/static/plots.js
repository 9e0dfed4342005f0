// The three plots. The library stands compressed in this file; the policy knows its hash.

const REST = 'all others';
let plotly = null;
let paperWidth = null; // pixels while the page is printed: paper does not resize plots

async function startPlots() {
  const code = new TextDecoder().decode(await inflate('plots'));
  styleThroughObjects();
  const script = document.createElement('script');
  script.textContent = code;
  document.head.append(script);
  plotly = window.Plotly;
  for (const input of document.querySelectorAll('input[name="heat"]')) input.addEventListener('input', drawHeat);
  byId('heat-fold').addEventListener('toggle', heatTable);
  let fitted = JSON.stringify(room());
  window.addEventListener('resize', () => {
    const now = JSON.stringify(room());
    if (now !== fitted) { fitted = now; drawPlots(); }
  });
  drawPlots();
}

// The policy refuses style attributes that a script writes as text; the same text through the style object is allowed.
function styleThroughObjects() {
  const write = Element.prototype.setAttribute;
  Element.prototype.setAttribute = function setAttribute(name, value) {
    if (name === 'style') this.style.cssText = value;
    else write.call(this, name, value);
  };
}

function drawPlots() {
  if (!plotly) return;
  byId('sources').hidden = byId('sources-link').hidden = data.heat.row_source.length < 2;
  if (data.heat.row_source.length > 1) drawHeat();
  drawCurve();
  drawPicture();
}

// What the heat map has room for: numbers in its cells, names above its columns, letters of a name.
function room() {
  const width = paperWidth || byId('heat').clientWidth;
  const columns = data.heat.columns_count.length;
  const letters = width < 700 ? 16 : 28;
  return { numbers: width - 90 >= 72 * columns, names: (width - 7 * letters - 70) / columns >= 12, letters };
}

function layout(extra) {
  const axis = { gridcolor: color('line'), zeroline: false, linecolor: color('line'), tickcolor: color('line'), automargin: true, fixedrange: true };
  const title = (given) => ({ text: (given && given.label) || '', font: { size: 13 }, standoff: 10 });
  return {
    width: paperWidth, paper_bgcolor: 'rgba(0,0,0,0)', plot_bgcolor: 'rgba(0,0,0,0)', showlegend: false, dragmode: false,
    font: { family: getComputedStyle(document.body).fontFamily, size: 13, color: color('soft') },
    hoverlabel: { bgcolor: color('paper'), bordercolor: color('line'), font: { color: color('ink') } },
    margin: { l: 50, r: 12, t: 12, b: 44 }, ...extra, xaxis: { ...axis, ...(extra.xaxis || {}), title: title(extra.xaxis) }, yaxis: { ...axis, ...(extra.yaxis || {}), title: title(extra.yaxis) },
  };
}
const options = { displayModeBar: false, responsive: true };
const diverging = () => [[0, color('hurt')], [0.5, color('paper')], [1, color('help')]];
// Plot labels understand a little markup, so names are made harmless first.
const plain = (text) => text.replace(/[<>&]/g, (c) => ({ '<': '‹', '>': '›', '&': '＆' })[c]);

// Names that are too long lose what all of them end with and begin with, as far as needed, and then their middle.
function shortened(names, letters) {
  const all = names.filter((name) => name !== REST);
  const most = all.length > 1 ? Math.min(...all.map((name) => name.length)) : 0;
  const shared = (at, limit) => { let n = 0; while (n < limit && all.every((name) => name.at(at(n)) === all[0].at(at(n)))) n++; return n; };
  const start = shared((n) => n, most);
  const end = shared((n) => -1 - n, most - start);
  return names.map((name) => {
    if (name.length <= letters || name === REST) return plain(name);
    const to = name.length - end;
    const from = Math.min(start, Math.max(0, to - letters + 2));
    const [before, after] = [from ? '…' : '', end ? '…' : ''];
    const kept = name.slice(from, to);
    const space = letters - before.length - after.length;
    const half = Math.floor(space / 2);
    return plain(before + (kept.length > space ? kept.slice(0, half) + '…' + kept.slice(kept.length - space + half + 1) : kept) + after);
  });
}

// What the cells of the heat map say: names of rows and columns, and text of a cell, for the chosen unit.
function heatTexts() {
  const heat = data.heat;
  const each = document.querySelector('input[name="heat"]:checked').value === 'each';
  const scale = (s) => (each ? 1 / heat.rows_count[s] : 1);
  const named = (s) => (s === null ? REST : data.sources[s]);
  const z = heat.total.map((row, s) => row.map((v) => (v === null ? null : v * scale(s))));
  const clear = (s, t) => heat.stderr[s][t] === null || Math.abs(heat.total[s][t]) >= heat.threshold * heat.stderr[s][t];
  return {
    z, clear,
    rows: heat.row_source.map(named),
    columns: heat.column_answer.length ? heat.column_answer.map((j) => (j === null ? REST : data.test.id[j])) : heat.column_source.map(named),
    label: (s, t) => (clear(s, t) ? signed(z[s][t]) : '(' + signed(z[s][t]) + ')'),
    half: (s, t) => (heat.stderr[s][t] === null ? '' : ' ± ' + digits(heat.threshold * heat.stderr[s][t] * scale(s))),
  };
}

function drawHeat() {
  const heat = data.heat;
  const { z, clear, rows, columns, label, half } = heatTexts();
  const limit = z.flat().reduce((most, v) => Math.max(most, Math.abs(v || 0)), 0) || 1;
  const { numbers: few, names: named, letters } = room();
  heatTable();
  // Shades grow with the square root, so that one strong cell does not turn all others white.
  const shade = (v) => (v === null ? null : Math.sign(v) * Math.sqrt(Math.abs(v) / limit));
  const ticks = [-1, -0.5, 0, 0.5, 1];
  const trace = {
    type: 'heatmap', z: z.map((row) => row.map(shade)), zmin: -1, zmax: 1, colorscale: diverging(), xgap: named ? 2 : 0.5, ygap: named ? 2 : 0.5, showscale: !few,
    x: columns.map((_, t) => t), y: rows.map((_, s) => s),
    hovertext: z.map((row, s) => row.map((_, t) => plain(rows[s]) + ' (' + heat.rows_count[s] + ') on ' + plain(columns[t])
      + ' (' + heat.columns_count[t] + ')<br><b>' + label(s, t) + '</b>' + half(s, t))),
    hoverinfo: 'text',
    colorbar: { thickness: 10, outlinewidth: 0, tickfont: { size: 11 }, tickvals: ticks, ticktext: ticks.map((t) => signed(t * Math.abs(t) * limit)) },
  };
  const notes = [];
  if (few) {
    z.forEach((row, s) => row.forEach((v, t) => notes.push({
      x: t, y: s, text: label(s, t), showarrow: false,
      font: { size: 13, color: Math.abs(shade(v)) > 0.7 ? color('paper') : clear(s, t) ? color('ink') : color('soft') },
    })));
  }
  const box = byId('heat');
  plotly.react(box, [trace], layout({
    height: 90 + Math.max(18 * rows.length, Math.min(44 * rows.length, 810)), annotations: notes,
    xaxis: { showgrid: false, tickvals: columns.map((_, t) => t), ticktext: shortened(columns, letters), showticklabels: named, side: 'top', showline: false, ticks: '' },
    yaxis: { showgrid: false, tickvals: rows.map((_, s) => s), ticktext: shortened(rows, letters), autorange: 'reversed', showline: false, ticks: '' },
    margin: { l: 60, r: 10, t: 36, b: 10 },
  }), options);
  box.removeAllListeners('plotly_click');
  box.on('plotly_click', (event) => openCell(event.points[0].y, event.points[0].x));
}

// The heat map for keys, for screen readers, and for windows in which its numbers do not fit; made once it is unfolded.
function heatTable() {
  if (!byId('heat-fold').open) return;
  const { rows, columns, label, half } = heatTexts();
  byId('heat-table').replaceChildren(element('table', {},
    element('thead', {}, element('tr', {}, element('th', { scope: 'col' }, 'training data'), ...columns.map((name) => element('th', { scope: 'col' }, name)))),
    element('tbody', {}, ...rows.map((name, s) => element('tr', {}, element('th', { scope: 'row' }, name),
      ...columns.map((_, t) => element('td', {}, element('button', { type: 'button', onclick: () => openCell(s, t) }, label(s, t) + half(s, t)))))))));
}

function openCell(s, t) {
  const heat = data.heat;
  const single = heat.column_answer.length > 0;
  byId('test-search').value = '';
  byId('test-source').value = single ? ANY : heat.column_source[t] ?? OTHERS;
  byId('pair-source').value = heat.row_source[s] ?? OTHERS;
  filterAnswers();
  const found = answers.list.items;
  const j = single ? heat.column_answer[t] ?? found.find((other) => !heat.column_answer.includes(other)) : found[0];
  if (j !== undefined) answers.list.pick(j);
  byId('answers').scrollIntoView();
}

function drawCurve() {
  const curve = data.curve;
  if (!curve.length) {
    byId('curve').replaceChildren(element('p', { class: 'none' }, 'Quality can be estimated from 8 members on.'));
    return;
  }
  const x = curve.map((p) => p[0]);
  const last = curve[curve.length - 1];
  const shapes = [];
  const notes = [];
  if (data.members_asked && data.members_asked > last[0]) {
    shapes.push({ type: 'line', x0: last[0], x1: last[0], yref: 'paper', y0: 0, y1: 1, line: { color: color('soft'), width: 1, dash: 'dot' } });
    notes.push({ x: last[0], yref: 'paper', y: 1, text: (data.stopped ? 'stopped at ' : '') + last[0] + ' of ' + data.members_asked + (data.stopped ? '' : ' scored'), showarrow: false, xanchor: 'right', xshift: -6, font: { color: color('soft') } });
  }
  const band = (points, opacity) => ({
    x: [...points.map((p) => p[0]), ...points.map((p) => p[0]).reverse()], y: [...points.map((p) => p[3]), ...points.map((p) => p[2]).reverse()],
    fill: 'toself', mode: 'lines', line: { width: 0 }, fillcolor: color('help-wash'), opacity, hoverinfo: 'skip',
  });
  plotly.react(byId('curve'), [
    band(curve, 1), band(data.expected, 0.5),
    { x, y: curve.map((p) => p[1]), mode: 'lines+markers', line: { color: color('help'), width: 2 }, marker: { size: 7 },
      hovertemplate: '%{x} members: %{y:.2f} [%{customdata[0]:.2f}, %{customdata[1]:.2f}]<extra></extra>', customdata: curve.map((p) => [p[2], p[3]]) },
    { x: data.expected.map((p) => p[0]), y: data.expected.map((p) => p[1]), mode: 'lines', line: { color: color('help'), width: 2, dash: 'dot' },
      hovertemplate: '%{x} members: %{y:.2f} [%{customdata[0]:.2f}, %{customdata[1]:.2f}] expected<extra></extra>', customdata: data.expected.map((p) => [p[2], p[3]]) },
  ], layout({
    height: 320, shapes, annotations: notes, xaxis: { label: 'members', rangemode: 'tozero', showgrid: false },
    yaxis: { label: 'self-LDS', range: [Math.min(0, ...[...curve, ...data.expected].map((p) => p[2])), 1] },
  }), options);
}

function drawPicture() {
  const picture = numbers.picture;
  const [rows, columns] = picture.shape;
  const z = [];
  for (let r = 0; r < rows; r++) z.push(Array.from(picture.subarray(r * columns, (r + 1) * columns), (v) => v / 127 * data.picture.limit));
  const edge = data.picture.widths[0];
  plotly.react(byId('picture'), [{
    type: 'heatmap', z, zmin: -data.picture.limit, zmax: data.picture.limit,
    colorscale: [[0, color('help')], [0.5, color('paper')], [1, color('hurt')]], hovertemplate: '%{z:+.3f} nats against the mean of the column<extra></extra>',
    colorbar: { thickness: 10, outlinewidth: 0, title: { text: 'nats', side: 'top', font: { size: 11 } }, tickfont: { size: 11 } },
  }], layout({
    height: 320,
    shapes: [{ type: 'line', x0: edge - 0.5, x1: edge - 0.5, yref: 'paper', y0: 0, y1: 1, line: { color: color('ink'), width: 1 } }],
    xaxis: { showgrid: false, ticks: '', showline: false, tickvals: [edge / 2, edge + data.picture.widths[1] / 2], ticktext: [data.heat.row_source.length > 1 ? 'training, by source' : 'training', 'answers'], tickangle: 0 },
    yaxis: { showgrid: false, ticks: '', showline: false, autorange: 'reversed', tickvals: [0, rows - 1], ticktext: ['1', String(data.picture.members)], label: 'member' },
  }), options);
}
