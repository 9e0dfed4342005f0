// The three plots. The library stands compressed in this file; the policy knows its hash.

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
  let fitted = roomy();
  window.addEventListener('resize', () => { if (roomy() !== fitted) { fitted = roomy(); drawPlots(); } });
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
  byId('sources').hidden = byId('sources-link').hidden = data.heat.rows.length < 2;
  if (data.heat.rows.length > 1) drawHeat();
  drawCurve();
  drawPicture();
}

// Room for the numbers of the heat map: they stand in its cells where they fit.
const roomy = () => (paperWidth || byId('heat').clientWidth) - 90 >= 72 * data.heat.columns.length;

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
const short = (text) => plain(text.length > 28 ? text.slice(0, 27) + '…' : text);

function drawHeat() {
  const heat = data.heat;
  const each = document.querySelector('input[name="heat"]:checked').value === 'each';
  const scale = (s) => (each ? 1 / heat.rows_count[s] : 1);
  const z = heat.total.map((row, s) => row.map((v) => (v === null ? null : v * scale(s))));
  const limit = Math.max(...z.flat().map((v) => Math.abs(v || 0))) || 1;
  const clear = (s, t) => heat.stderr[s][t] === null || Math.abs(heat.total[s][t]) >= heat.threshold * heat.stderr[s][t];
  const label = (s, t) => (clear(s, t) ? signed(z[s][t]) : '(' + signed(z[s][t]) + ')');
  const few = roomy();
  const half = (s, t) => (heat.stderr[s][t] === null ? '' : ' ± ' + digits(heat.threshold * heat.stderr[s][t] * scale(s)));
  heatTable(label, half);
  // Shades grow with the square root, so that one strong cell does not turn all others white.
  const shade = (v) => (v === null ? null : Math.sign(v) * Math.sqrt(Math.abs(v) / limit));
  const ticks = [-1, -0.5, 0, 0.5, 1];
  const trace = {
    type: 'heatmap', z: z.map((row) => row.map(shade)), zmin: -1, zmax: 1, colorscale: diverging(), xgap: 2, ygap: 2, showscale: !few,
    x: heat.columns.map((_, t) => t), y: heat.rows.map((_, s) => s),
    hovertext: z.map((row, s) => row.map((_, t) => plain(heat.rows[s]) + ' (' + heat.rows_count[s] + ') on ' + plain(heat.columns[t])
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
    height: Math.min(900, 90 + 44 * heat.rows.length), annotations: notes,
    xaxis: { showgrid: false, tickvals: heat.columns.map((_, t) => t), ticktext: heat.columns.map(short), side: 'top', showline: false, ticks: '' },
    yaxis: { showgrid: false, tickvals: heat.rows.map((_, s) => s), ticktext: heat.rows.map(short), autorange: 'reversed', showline: false, ticks: '' },
    margin: { l: 60, r: 10, t: 36, b: 10 },
  }), options);
  box.removeAllListeners('plotly_click');
  box.on('plotly_click', (event) => openCell(event.points[0].y, event.points[0].x));
}

// The heat map for keys, for screen readers, and for windows in which its numbers do not fit.
function heatTable(label, half) {
  const heat = data.heat;
  byId('heat-table').replaceChildren(element('table', {},
    element('thead', {}, element('tr', {}, element('th', { scope: 'col' }, 'training data'), ...heat.columns.map((name) => element('th', { scope: 'col' }, name)))),
    element('tbody', {}, ...heat.rows.map((name, s) => element('tr', {}, element('th', { scope: 'row' }, name),
      ...heat.columns.map((_, t) => element('td', {}, element('button', { type: 'button', onclick: () => openCell(s, t) }, label(s, t) + half(s, t)))))))));
}

function openCell(s, t) {
  const test = data.sources.indexOf(data.heat.columns[t]);
  const bySource = [...byId('test-source').options].some((o) => o.value === String(test));
  byId('test-source').value = bySource ? String(test) : '-1';
  byId('test-search').value = bySource ? '' : data.heat.columns[t];
  byId('pair-source').value = String(data.sources.indexOf(data.heat.rows[s]));
  filterAnswers();
  if (answers.list.items.length) answers.list.pick(answers.list.items[0]);
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
    notes.push({ x: last[0], yref: 'paper', y: 1, text: 'stopped at ' + last[0] + ' of ' + data.members_asked, showarrow: false, xanchor: 'right', xshift: -6, font: { color: color('soft') } });
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
    xaxis: { showgrid: false, ticks: '', showline: false, tickvals: [edge / 2, edge + data.picture.widths[1] / 2], ticktext: [data.heat.rows.length > 1 ? 'training, by source' : 'training', 'answers'], tickangle: 0 },
    yaxis: { showgrid: false, ticks: '', showline: false, autorange: 'reversed', tickvals: [0, rows - 1], ticktext: ['1', String(data.picture.members)], label: 'member' },
  }), options);
}
