// Tokens in colour: how hard each is, or its part in the score of a pair.

// A text that was cut to keep the page small, and the mark at its end.
function cutAt(text) {
  const found = / … \[\+[\d,]+ characters\]$/.exec(text);
  return found ? [text.slice(0, found.index), found[0]] : [text, ''];
}

// The units of a text, and what of it has no tokens; null where the page has no tokens of it.
function tokensOf(side, i) {
  if (!data.tokens) return null;
  const edges = numbers[side + '_token_edges'];
  const count = edges[i + 1] - edges[i];
  if (!count) return null;
  const answer = data[side].answer[i];
  const around = data.tokens[side][i];
  let body;
  let rest;
  let [start, end] = [0, Infinity]; // of the text itself: what a template writes around it is shown smaller
  if (typeof around === 'number') {
    [body, rest] = cutAt(data.tokens.instead[around]);
    if (!rest && answer.startsWith(body)) rest = answer.slice(body.length);
  } else {
    const [before, after] = around || ['', ''];
    const [kept, mark] = cutAt(answer);
    [body, rest] = [before + kept + (mark ? '' : after), mark];
    [start, end] = [before.length, before.length + kept.length];
  }
  const units = [];
  let at = 0;
  for (let u = 0; u < count && at < body.length; u++) {
    const length = numbers[side + '_token_lengths'][edges[i] + u];
    units.push({ u, text: body.slice(at, at + length), around: at + length <= start || at >= end });
    at += length;
  }
  return { units, rest: body.slice(at) + rest, from: edges[i] };
}

// The parts of a pair's score on one side, in units of the score; null where they are not kept.
function partsOf(pair, side) {
  if (!data.tokens || pair.place >= data.tokens.depth) return null;
  const at = answers.selected * data.tokens.depth + pair.place;
  const edges = numbers[pair.side + '_' + side + '_edges'];
  if (edges[at] === edges[at + 1]) return null;
  const scale = numbers[pair.side + '_token_scale'][3 * at + (side === 'train' ? 1 : 0)];
  return Array.from(numbers[pair.side + '_' + side + '_parts'].subarray(edges[at], edges[at + 1]), (v) => (v / 127) * scale);
}

// What the parts of a pair add up to: its score, or what the final models alone make of it.
const totalOf = (pair) => numbers[pair.side + '_token_scale'][3 * (answers.selected * data.tokens.depth + pair.place) + 2];

function token(unit, hue, share, title) {
  const span = element('span', { class: 't' + (unit.around ? ' around' : ''), title }, unit.text);
  if (share > 0.02) span.style.backgroundColor = 'color-mix(in srgb, var(--' + hue + ') ' + Math.round(share * 100) + '%, transparent)';
  return span;
}

// The darker, the higher the loss.
function tokensByLoss(tokens) {
  const loss = (unit) => numbers.token_loss[tokens.from + unit.u];
  return [...tokens.units.map((unit) => token(unit, 'soft', Math.min(1, loss(unit) / 8) * 0.5, 'loss ' + digits(loss(unit)) + ' nats')), tokens.rest];
}

// What raises the score of the pair and what lowers it.
function tokensByPart(tokens, parts) {
  const largest = Math.max(...parts.map(Math.abs)) || 1;
  return [...tokens.units.map((unit) => token(unit, parts[unit.u] < 0 ? 'hurt' : 'help', (Math.abs(parts[unit.u]) / largest) * 0.55,
    signed(parts[unit.u]) + ' of the score')), tokens.rest];
}

// The same in words: the three largest parts, as shares of the score.
function largestParts(tokens, parts, total) {
  const found = tokens.units.filter((unit) => unit.text.trim() && parts[unit.u]).sort((a, b) => Math.abs(parts[b.u]) - Math.abs(parts[a.u])).slice(0, 3);
  const out = [];
  for (const unit of found) {
    const part = parts[unit.u];
    out.push(out.length ? ', ' : '', element('q', {}, brief(unit.text.trim(), 24)), ' ',
      element('b', { class: part < 0 ? 'harmful' : 'helpful' }, signed(part)),
      total ? ' (' + digits(Math.round((100 * part) / total)) + ' %)' : '');
  }
  return out;
}

function swatch(hue) {
  return element('span', { class: 'swatch ' + hue, 'aria-hidden': 'true' });
}
