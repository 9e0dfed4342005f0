// The answers, and for the selected one its proponents and opponents side by side.

const answers = { list: null, hay: null, trainHay: null, selected: -1, shown: { pro: 10, opp: 10 }, chosen: null };
const SIDES = ['pro', 'opp'];

function startAnswers() {
  answers.hay = haystack(data.test);
  answers.trainHay = haystack(data.train);
  fillSources(byId('test-source'), data.test);
  fillSources(byId('pair-source'), data.train);
  answers.list = new VirtualList(byId('test-list'), 52, (j) => [
    element('span', { class: 'one' }, data.test.answer[j]),
    element('span', { class: 'under' }, element('span', { class: 'id one' }, data.test.id[j]), tag(data.test, j)),
  ], showAnswer);
  for (const id of ['test-search', 'test-source']) byId(id).addEventListener('input', filterAnswers);
  for (const id of ['pair-search', 'pair-source', 'pair-marked']) {
    byId(id).addEventListener('input', () => { answers.shown = { pro: 10, opp: 10 }; drawPairs(); });
  }
  shareButtons(byId('pair-share'), 'pairs', 'the listed pairs');
  const shared = data.sharedSystem;
  if (shared) byId('shared-system').replaceChildren(element('details', { class: 'system' }, element('summary', {}, 'System prompt of all examples'), element('p', { class: 'prompt' }, shared)));
  filterAnswers();
  answers.list.pick(0);
}

function filterAnswers() {
  const words = byId('test-search').value.toLowerCase().trim();
  const source = Number(byId('test-source').value);
  const found = [];
  for (let j = 0; j < answers.hay.length; j++) {
    if (ofSource(data.test, j, source) && (!words || answers.hay[j].includes(words))) found.push(j);
  }
  byId('test-count').textContent = !found.length ? 'None of the answers on this page' : found.length === answers.hay.length
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
  setLink({ answer: data.test.id[j] });
}

function drawAnswer() {
  const j = answers.selected;
  const legend = element('p', { class: 'legend' });
  byId('answer').replaceChildren(
    element('div', { class: 'meta' },
      element('span', { class: 'id' }, data.test.id[j]), tag(data.test, j),
      element('span', {}, 'mean loss ' + digits(numbers.test_loss[j]) + ' nats, standard deviation ' + digits(numbers.test_spread[j]) + ' over members'),
      element('button', { type: 'button', class: 'small', title: 'Copy a link to this answer', onclick: (e) => copy(e.target, linkTo({ answer: data.test.id[j] })) }, 'Link')),
    element('p', { class: 'reply' }, ...answerTokens(j, legend)),
    element('p', { class: 'prompt' }, data.test.prompt[j]),
    system(data.test, j, false),
    legend);
}

// The text of an answer, and the words below it that say what its colours mean.
function answerTokens(j, legend) {
  const tokens = tokensOf('test', j);
  const chosen = answers.chosen;
  if (!tokens) {
    legend.textContent = 'Token log-probabilities were not kept, so tokens have no colours.';
    return [data.test.answer[j]];
  }
  const parts = chosen && partsOf(chosen, 'test');
  if (parts) {
    const total = totalOf(chosen);
    legend.replaceChildren('Parts of the score of ', element('span', { class: 'id' }, data.train.id[chosen.train]),
      ' on this answer, token by token: ', swatch('help'), ' raises the score, ', swatch('hurt'), ' lowers it. All parts add up to ', element('b', {}, signed(total)),
      data.tokens.final_only ? ', the score that the final models give without the earlier checkpoints' : '', '. Largest: ', ...largestParts(tokens, parts, total), '.');
    return tokensByPart(tokens, parts);
  }
  legend.replaceChildren(swatch('soft'), ' The darker a token, the higher its loss, as a mean over members (darkest: 8 nats and more). ');
  if (!data.tokens.depth) legend.append('Scores are not split over tokens here: ' + data.tokens.why + '.');
  else if (chosen) legend.append('Scores are split over tokens for the first ' + data.tokens.depth + ' on each side.');
  else legend.append('Select a training example to see which tokens carry its score.');
  return tokensByLoss(tokens);
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
    const [low, high] = [numbers[side + '_low'][at], numbers[side + '_high'][at]];
    const clear = numbers[side + '_clear'][at] > 0;
    if (ofSource(data.train, train, source) && (!marked || clear) && (!words || answers.trainHay[train].includes(words))) {
      found.push({ side, place, train, score, low, high, clear, bm25: numbers[side + '_bm25'][at], prior: numbers[side + '_prior'] ? numbers[side + '_prior'][at] : null });
    }
  }
  return found;
}

function drawPairs() {
  const j = answers.selected;
  let reach = 0;
  let largest = 0;
  for (const side of SIDES) {
    if (!numbers[side + '_index'].shape[1]) continue;
    const at = j * numbers[side + '_index'].shape[1];
    largest = Math.max(largest, Math.abs(numbers[side + '_score'][at]) || 0);
    for (const end of ['_score', '_low', '_high']) reach = Math.max(reach, Math.abs(numbers[side + end][at]) || 0);
  }
  for (const side of SIDES) {
    const found = pairsOf(side);
    const shown = found.slice(0, answers.shown[side]);
    const box = byId(side);
    box.className = side;
    byId(side + '-count').textContent = found.length.toLocaleString('en');
    const rest = found.length - shown.length;
    box.replaceChildren(
      ...shown.map((pair) => card(pair, reach, aligned(largest))),
      found.length ? '' : element('p', { class: 'none' }, 'None that fits these filters.'),
      rest <= 0 ? '' : element('button', { class: 'more', type: 'button', onclick: () => { answers.shown[side] += 20; drawPairs(); } },
        Math.min(20, rest) + ' more'));
  }
}

function card(pair, reach, number) {
  const chosen = isChosen(pair);
  const node = element('article', {
    class: 'card' + (pair.clear ? '' : ' faint') + (chosen ? ' chosen' : ''), 'data-train': data.train.id[pair.train], 'data-place': pair.place,
    onclick: (event) => { if (!event.target.closest('button, details') && !String(getSelection())) choosePair(pair); },
  },
  element('div', { class: 'meta' },
    element('button', { class: 'open', type: 'button', 'aria-expanded': String(chosen), title: chosen ? 'Fold' : 'Unfold, with the tokens that carry the score', onclick: () => choosePair(pair) },
      element('span', { class: 'place' }, String(pair.place + 1)), element('span', { class: 'id' }, data.train.id[pair.train])),
    tag(data.train, pair.train),
    element('span', { class: 'bm25', title: pair.bm25 ? 'place in a text search (BM25) for this answer' : 'shares no word with this answer' },
      pair.bm25 ? 'BM25 #' + pair.bm25.toLocaleString('en') : 'BM25 —')),
  element('div', { class: 'measure' },
    element('span', { class: 'number ' + (pair.clear ? (pair.side === 'pro' ? 'helpful' : 'harmful') : '') }, (pair.score > 0 ? '+' : '') + number(pair.score)),
    element('span', { class: 'spread' + (symmetric(pair) ? '' : ' wide'), title: '95 % interval ' + interval(pair) }, spread(pair, number)), intervalBar(pair, reach),
    pair.clear ? '' : element('span', { class: 'zero' }, 'not significant')),
  pair.prior === null ? '' : element('div', { class: 'meta prior' }, 'evidence ' + (pair.score - pair.prior > 0 ? '+' : '') + number(pair.score - pair.prior) + ', prior ' + (pair.prior > 0 ? '+' : '') + number(pair.prior)),
  element('div', { class: chosen ? 'whole' : 'clamp' },
    element('p', { class: 'reply' }, ...(chosen ? trainingTokens(pair) : [data.train.answer[pair.train]])),
    element('p', { class: 'prompt' }, data.train.prompt[pair.train]),
    chosen ? system(data.train, pair.train, false) : ''),
  chosen ? element('p', { class: 'legend' }, ...trainingLegend(pair)) : '');
  return node;
}

const isChosen = (pair) => answers.chosen !== null && answers.chosen.side === pair.side && answers.chosen.place === pair.place;
const interval = (pair) => signed(pair.low) + ' to ' + signed(pair.high);

// Most intervals are symmetric and fit in one number; those of correlations are not.
function symmetric(pair) {
  return !(Math.abs(pair.high + pair.low - 2 * pair.score) > 0.01 * (pair.high - pair.low));
}

function spread(pair, number) {
  if (!Number.isFinite(pair.low)) return '± unknown';
  return symmetric(pair) ? '± ' + number((pair.high - pair.low) / 2) : interval(pair);
}

function trainingTokens(pair) {
  const tokens = tokensOf('train', pair.train);
  const parts = tokens && partsOf(pair, 'train');
  return parts ? tokensByPart(tokens, parts) : [data.train.answer[pair.train]];
}

function trainingLegend(pair) {
  const tokens = tokensOf('train', pair.train);
  const parts = tokens && partsOf(pair, 'train');
  if (parts) {
    return ['Parts of the score, token by token: ', swatch('help'), ' raises it, ', swatch('hurt'), ' lowers it. Largest: ', ...largestParts(tokens, parts, totalOf(pair)), '.'];
  }
  if (!data.tokens) return ['No token parts: token log-probabilities were not kept.'];
  if (data.tokens.depth && pair.place >= data.tokens.depth) return ['Token parts are kept for the first ' + data.tokens.depth + ' on each side.'];
  return ['No token parts: ' + data.tokens.why + '.'];
}

// A second choice of the same pair folds it again. The cards are redrawn, so the focus is carried over.
function choosePair(pair) {
  answers.chosen = isChosen(pair) ? null : pair;
  drawAnswer();
  drawPairs();
  setLink({ answer: data.test.id[answers.selected], ...(answers.chosen ? { example: data.train.id[pair.train] } : {}) });
  const button = document.querySelector('#' + pair.side + ' .card[data-place="' + pair.place + '"] .open');
  if (button) button.focus({ preventScroll: true });
}

// Unfold the pair of the selected answer with a training example, however far down it is.
function unfold(train) {
  for (const id of ['pair-search', 'pair-source']) byId(id).value = id === 'pair-search' ? '' : ANY;
  byId('pair-marked').checked = false;
  for (const side of SIDES) {
    const pair = pairsOf(side).find((other) => other.train === train);
    if (!pair) continue;
    answers.shown[side] = Math.max(answers.shown[side], pair.place + 1);
    if (!isChosen(pair)) choosePair(pair);
    const node = document.querySelector('#' + side + ' .card[data-place="' + pair.place + '"]');
    if (node) node.scrollIntoView({ block: 'center' });
    return;
  }
  goToExample(train);
}

const linkTo = (parts) => location.href.split('#')[0] + '#' + Object.entries(parts).map(([name, id]) => name + '=' + encodeURIComponent(id)).join('&');

// The bar runs from zero to the score, the whisker over its interval; zero stands a fifth from the left.
function intervalBar(pair, reach) {
  const sign = pair.score < 0 ? -1 : 1;
  const x = (value) => 20 + Math.max(-20, Math.min(80, (sign * value / reach) * 80));
  const line = (from, to) => drawing('line', { class: 'whisker', x1: from, x2: to, y1: 6, y2: 6, 'vector-effect': 'non-scaling-stroke' });
  return drawing('svg', { viewBox: '0 0 100 12', preserveAspectRatio: 'none', 'aria-hidden': 'true' },
    drawing('line', { class: 'axis', x1: 20, x2: 20, y1: 0, y2: 12, 'vector-effect': 'non-scaling-stroke' }),
    drawing('rect', { class: 'bar-fill', x: 20, y: 2, width: x(pair.score) - 20, height: 8 }),
    ...(Number.isFinite(pair.low) ? [line(x(pair.low), x(pair.high))] : []));
}
