// The answers, and for the selected one its proponents and opponents side by side.

const answers = { list: null, hay: null, trainHay: null, selected: -1, shown: { pro: 10, opp: 10 }, chosen: null };
const SIDES = ['pro', 'opp'];

function startAnswers() {
  answers.hay = haystack(data.test);
  answers.trainHay = haystack(data.train);
  fillSources(byId('test-source'), data.test, 'all sources');
  fillSources(byId('pair-source'), data.train, 'all sources');
  answers.list = new VirtualList(byId('test-list'), 52, (j) => [
    element('span', { class: 'one' }, data.test.answer[j]),
    element('span', { class: 'under' }, element('span', { class: 'id one' }, data.test.id[j]), tag(data.test, j)),
  ], showAnswer);
  for (const id of ['test-search', 'test-source']) byId(id).addEventListener('input', filterAnswers);
  for (const id of ['pair-search', 'pair-source', 'pair-marked']) {
    byId(id).addEventListener('input', () => { answers.shown = { pro: 10, opp: 10 }; drawPairs(); });
  }
  filterAnswers();
  answers.list.pick(0);
}

function filterAnswers() {
  const words = byId('test-search').value.toLowerCase().trim();
  const source = Number(byId('test-source').value);
  const found = [];
  for (let j = 0; j < answers.hay.length; j++) {
    if ((source < 0 || data.test.source[j] === source) && (!words || answers.hay[j].includes(words))) found.push(j);
  }
  byId('test-count').textContent = found.length === answers.hay.length
    ? found.length.toLocaleString('en') + (found.length === 1 ? ' answer' : ' answers')
    : found.length.toLocaleString('en') + ' of ' + answers.hay.length.toLocaleString('en') + ' answers';
  answers.list.show(found);
}

function showAnswer(j) {
  answers.selected = j;
  answers.chosen = null;
  answers.shown = { pro: 10, opp: 10 };
  drawAnswer();
  drawPairs();
}

function drawAnswer() {
  const j = answers.selected;
  const legend = element('p', { class: 'legend' });
  byId('answer').replaceChildren(
    element('div', { class: 'meta' },
      element('span', { class: 'id' }, data.test.id[j]), tag(data.test, j),
      element('span', {}, 'mean loss ' + digits(numbers.test_loss[j]) + ' ± ' + digits(numbers.test_spread[j]) + ' over members')),
    element('p', { class: 'prompt' }, data.test.prompt[j]),
    element('p', { class: 'reply' }, ...answerTokens(j, legend)),
    legend);
}

// Without a chosen training example: the darker, the higher the loss. With one: what it helps and what it hurts.
function answerTokens(j, legend) {
  if (!data.tokens) {
    legend.hidden = true;
    return [data.test.answer[j]];
  }
  const from = numbers.token_edges[j];
  const count = numbers.token_edges[j + 1] - from;
  const chosen = answers.chosen;
  let share = (t) => Math.min(1, numbers.token_loss[from + t] / 8) * 0.5;
  let hue = () => 'soft';
  legend.textContent = 'Darker tokens are harder: their loss is higher, as a mean over members. '
    + 'Select a training example to see which tokens it moves.';
  if (chosen && chosen.place < data.tokens.depth) {
    const parts = numbers['token_' + chosen.side];
    const at = data.tokens.depth * from + chosen.place * count;
    share = (t) => Math.abs(parts[at + t]) / 127 * 0.55;
    hue = (t) => (parts[at + t] < 0 ? 'hurt' : 'help');
    legend.replaceChildren('Tokens that ', element('span', { class: 'id' }, data.train.id[chosen.train]), ' ',
      element('b', { class: 'helpful' }, 'helps'), ' and ', element('b', { class: 'harmful' }, 'hurts'),
      '; the stronger the colour, the larger the token’s part of the score.');
  } else if (chosen) {
    legend.textContent = 'Token parts are kept for the first ' + data.tokens.depth + ' on each side only.';
  }
  const out = [];
  for (let t = 0; t < count; t++) {
    const span = element('span', { class: 't', title: digits(numbers.token_loss[from + t]) + ' nats' }, data.tokens.pieces[from + t]);
    const part = share(t);
    if (part > 0.02) span.style.backgroundColor = 'color-mix(in srgb, var(--' + hue(t) + ') ' + Math.round(part * 100) + '%, transparent)';
    out.push(span);
  }
  return out;
}

function pairsOf(side) {
  const j = answers.selected;
  const index = numbers[side + '_index'];
  const width = index.shape[1];
  const words = byId('pair-search').value.toLowerCase().trim();
  const source = Number(byId('pair-source').value);
  const marked = byId('pair-marked').checked;
  const found = [];
  for (let place = 0; place < width; place++) {
    const at = j * width + place;
    const train = index[at];
    if (train < 0) break;
    const score = numbers[side + '_score'][at];
    const half = numbers[side + '_half'][at];
    const clear = Math.abs(score) >= half;
    if ((source < 0 || data.train.source[train] === source) && (!marked || clear) && (!words || answers.trainHay[train].includes(words))) {
      found.push({ side, place, train, score, half, clear, bm25: numbers[side + '_bm25'][at] });
    }
  }
  return found;
}

function drawPairs() {
  const j = answers.selected;
  let reach = 0;
  for (const side of SIDES) {
    if (!numbers[side + '_index'].shape[1]) continue;
    const at = j * numbers[side + '_index'].shape[1];
    reach = Math.max(reach, Math.abs(numbers[side + '_score'][at]) + (numbers[side + '_half'][at] || 0));
  }
  for (const side of SIDES) {
    const found = pairsOf(side);
    const shown = found.slice(0, answers.shown[side]);
    const box = byId(side);
    box.className = side;
    byId(side + '-count').textContent = found.length.toLocaleString('en');
    const rest = found.length - shown.length;
    box.replaceChildren(
      ...shown.map((pair) => card(pair, reach)),
      found.length ? '' : element('p', { class: 'none' }, 'None that fits these filters.'),
      rest <= 0 ? '' : element('button', { class: 'more', type: 'button', onclick: () => { answers.shown[side] += 20; drawPairs(); } },
        Math.min(20, rest) + ' more'));
  }
}

function card(pair, reach) {
  const name = pair.bm25 ? 'BM25 #' + pair.bm25.toLocaleString('en') : 'BM25 —';
  const chosen = answers.chosen && answers.chosen.side === pair.side && answers.chosen.place === pair.place;
  const body = element('div', { class: 'clamp' },
    element('p', { class: 'prompt' }, data.train.prompt[pair.train]), element('p', { class: 'reply' }, data.train.answer[pair.train]));
  const node = element('article', {
    class: 'card' + (pair.clear ? '' : ' faint') + (chosen ? ' chosen' : ''), tabindex: '0', 'data-train': data.train.id[pair.train],
    'aria-label': (pair.place + 1) + ': ' + data.train.id[pair.train] + ', score ' + signed(pair.score) + (pair.clear ? '' : ', not distinguishable from zero'),
    title: pair.clear ? null : 'not distinguishable from zero',
    onclick: () => choosePair(pair, node, body),
    onkeydown: (event) => { if (event.key === 'Enter') choosePair(pair, node, body); },
  },
  element('div', { class: 'meta' },
    element('span', {}, String(pair.place + 1)), element('span', { class: 'id' }, data.train.id[pair.train]), tag(data.train, pair.train),
    element('span', { class: 'bm25', title: pair.bm25 ? 'place in a text search for this answer' : 'shares no word with this answer' }, name)),
  element('div', { class: 'measure' },
    element('span', { class: 'number ' + (pair.clear ? (pair.side === 'pro' ? 'helpful' : 'harmful') : '') }, signed(pair.score)),
    element('span', { class: 'spread', title: '95 % interval' }, '± ' + digits(pair.half)), intervalBar(pair, reach)),
  body);
  if (chosen) body.classList.remove('clamp');
  return node;
}

function choosePair(pair, node, body) {
  for (const other of document.querySelectorAll('.card.chosen')) other.classList.remove('chosen');
  node.classList.add('chosen');
  body.classList.remove('clamp');
  answers.chosen = pair;
  drawAnswer();
}

// The bar runs from zero to the score, the whisker over its interval; zero stands a fifth from the left.
function intervalBar(pair, reach) {
  const x = (value) => 20 + Math.max(-20, Math.min(80, (value / reach) * 80));
  const size = Math.abs(pair.score);
  return drawing('svg', { viewBox: '0 0 100 12', preserveAspectRatio: 'none', 'aria-hidden': 'true' },
    drawing('line', { class: 'axis', x1: 20, x2: 20, y1: 0, y2: 12, 'vector-effect': 'non-scaling-stroke' }),
    drawing('rect', { class: 'bar-fill', x: 20, y: 2, width: x(size) - 20, height: 8 }),
    drawing('line', { class: 'whisker', x1: x(size - pair.half), x2: x(size + pair.half), y1: 6, y2: 6, 'vector-effect': 'non-scaling-stroke' }));
}
