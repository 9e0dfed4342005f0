// The heat map (a table), the curve and the loss matrix.

const REST = 'all others';

function drawPlots() {
  if (!data) return;
  byId('sources').hidden = byId('sources-link').hidden = data.heat.row_source.length < 2;
  if (data.heat.row_source.length > 1) drawHeat();
  drawCurve();
  drawPicture();
}

function startPlots() {
  for (const input of document.querySelectorAll('input[name="heat"]')) input.addEventListener('input', drawHeat);
  drawPlots();
}

// A cell's shade grows with the square root, so that one strong cell does not turn all others white; cells that are not
// significant stay pale.
function shade(value, limit, clear) {
  if (value === null || !value) return '';
  const share = Math.round((clear ? 60 : 25) * Math.sqrt(Math.abs(value) / limit));
  return 'color-mix(in srgb, var(--' + (value > 0 ? 'help' : 'hurt') + ') ' + share + '%, transparent)';
}

function drawHeat() {
  const heat = data.heat;
  const each = document.querySelector('input[name="heat"]:checked').value === 'each';
  const scale = (s) => (each ? 1 / heat.rows_count[s] : 1);
  const named = (s) => (s === null ? REST : sourceName(s));
  const rows = heat.row_source.map(named);
  const columns = heat.column_answer.length ? heat.column_answer.map((j) => (j === null ? REST : data.test.id[j])) : heat.column_source.map(named);
  const z = heat.total.map((row, s) => row.map((v) => (v === null ? null : v * scale(s))));
  const clear = (s, t) => heat.stderr[s][t] === null || Math.abs(heat.total[s][t]) >= heat.threshold * heat.stderr[s][t];
  const limit = z.flat().reduce((most, v) => Math.max(most, Math.abs(v || 0)), 0) || 1;
  const few = columns.length <= 12;
  const number = aligned(limit);
  const plus = (v) => (v > 0 ? '+' : '') + number(v);
  const cell = (s, t) => {
    const value = z[s][t];
    const half = heat.stderr[s][t] === null ? '' : ' ± ' + number(heat.threshold * heat.stderr[s][t] * scale(s));
    const label = value === null ? 'unknown' : clear(s, t) ? plus(value) : '(' + plus(value) + ')';
    const said = rows[s] + ' (' + heat.rows_count[s] + ') on ' + columns[t] + ' (' + heat.columns_count[t] + '): ' + label + half;
    const button = element('button', { type: 'button', title: said, 'aria-label': said, onclick: () => openCell(s, t) }, few ? label : ' ');
    button.style.backgroundColor = shade(value, limit, clear(s, t));
    return element('td', { class: clear(s, t) ? '' : 'unclear' }, button);
  };
  byId('heat').className = few ? 'heat' : 'heat many';
  byId('heat').replaceChildren(element('table', {},
    element('thead', {}, element('tr', {}, element('td', {}), ...columns.map((name) => element('th', { scope: 'col', title: name }, element('span', {}, name))))),
    element('tbody', {}, ...rows.map((name, s) => element('tr', {}, element('th', { scope: 'row', title: name }, element('span', {}, name)), ...columns.map((_, t) => cell(s, t)))))));
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

// Round numbers between two ends, about as many as fit.
function ticks(from, to, about) {
  const rough = (to - from) / about;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((n) => n * power).find((n) => n >= rough);
  const out = [];
  for (let x = Math.ceil(from / step - 1e-9) * step; x <= to + 1e-9; x += step) out.push(Number(x.toPrecision(6)));
  return out;
}

function drawCurve() {
  const curve = data.curve;
  if (!curve.length) {
    byId('curve').replaceChildren(element('p', { class: 'none' }, 'Quality can be estimated from 8 members on.'));
    return;
  }
  const all = [...curve, ...data.expected];
  const [width, height, left, right, top, bottom] = [560, 300, 46, 14, 14, 40];
  const most = Math.max(...all.map((p) => p[0]), data.members_asked || 0) * 1.03;
  const least = Math.min(0, ...all.map((p) => p[2]));
  const x = (v) => left + (v / most) * (width - left - right);
  const y = (v) => top + ((1 - v) / (1 - least)) * (height - top - bottom);
  const line = (points) => points.map((p) => x(p[0]).toFixed(1) + ',' + y(p[1]).toFixed(1)).join(' ');
  const band = (points) => [...points.map((p) => [p[0], p[3]]), ...[...points].reverse().map((p) => [p[0], p[2]])];
  const said = (p, more) => p[0] + ' members: ' + p[1].toFixed(2) + ' [' + p[2].toFixed(2) + ', ' + p[3].toFixed(2) + ']' + more;
  const dots = (points, kind, more) => points.map((p) => drawing('circle', { class: kind, cx: x(p[0]), cy: y(p[1]), r: kind === 'dot' ? 3.5 : 6 }, drawing('title', {}, said(p, more))));
  const word = (cx, cy, anchor, value, kind = 'tick') => drawing('text', { class: kind, x: cx, y: cy, 'text-anchor': anchor }, value);
  const last = curve[curve.length - 1];
  const stopped = data.members_asked && data.members_asked > last[0];
  const nodes = [
    ...ticks(least, 1, 5).map((v) => drawing('line', { class: 'rule', x1: left, x2: width - right, y1: y(v), y2: y(v) })),
    ...ticks(least, 1, 5).map((v) => word(left - 8, y(v) + 4, 'end', String(v).replace('-', '−'))),
    ...ticks(0, most, 6).map((v) => word(x(v), height - bottom + 18, 'middle', String(v))),
    word((left + width) / 2, height - 4, 'middle', 'members', 'axis-name'),
    drawing('polygon', { class: 'band', points: line(band(curve)) }),
    ...(data.expected.length ? [drawing('polygon', { class: 'band faint', points: line(band(data.expected)) }),
      drawing('polyline', { class: 'curve dotted', points: line(data.expected) })] : []),
    drawing('polyline', { class: 'curve', points: line(curve) }),
    ...dots(data.expected, 'ghost', ', expected'), ...dots(curve, 'dot', ''),
    ...(stopped ? [drawing('line', { class: 'mark', x1: x(last[0]), x2: x(last[0]), y1: top, y2: height - bottom }),
      word(x(last[0]) - 6, height - bottom - 8, 'end', (data.stopped ? 'stopped at ' : '') + last[0] + ' of ' + data.members_asked + (data.stopped ? '' : ' scored'))] : []),
  ];
  byId('curve').replaceChildren(drawing('svg', { viewBox: '0 0 ' + width + ' ' + height, role: 'img', 'aria-label': 'self-LDS: ' + said(last, '') }, ...nodes));
}

// Members down, examples across; each cell against the mean of its column.
function drawPicture() {
  const picture = numbers.picture;
  const [rows, columns] = picture.shape;
  const channels = (name) => color(name).match(/[\da-f]{2}/gi).map((c) => parseInt(c, 16));
  const [low, middle, high] = ['help', 'paper', 'hurt'].map(channels);
  const canvas = element('canvas', { width: columns, height: rows, role: 'img', 'aria-label': 'Loss matrix: ' + data.picture.members + ' members, ' + columns + ' columns' });
  const image = new ImageData(columns, rows);
  picture.forEach((value, at) => {
    const share = Math.abs(value) / 127;
    const end = value < 0 ? low : high;
    for (let c = 0; c < 3; c++) image.data[4 * at + c] = middle[c] + (end[c] - middle[c]) * share;
    image.data[4 * at + 3] = 255;
  });
  canvas.getContext('2d').putImageData(image, 0, 0);
  const sides = data.picture.widths.map((width, side) => {
    const name = element('span', {}, side ? 'answers' : data.heat.row_source.length > 1 ? 'training, by source' : 'training');
    name.style.flex = String(Math.max(width, columns / 6));
    return name;
  });
  const limit = digits(data.picture.limit) + ' nats';
  byId('picture').replaceChildren(
    element('div', { class: 'matrix' }, element('span', { class: 'ends' }, element('span', {}, '1'), element('span', {}, 'member'), element('span', {}, String(data.picture.members))), canvas),
    element('div', { class: 'sides' }, ...sides),
    element('div', { class: 'key' }, '−' + limit, element('span', { class: 'ramp', 'aria-hidden': 'true' }), '+' + limit));
}
