// Links to an answer or an example, and what can be copied or saved.

const link = { quiet: true };

// The address after #: #answer=ID, #answer=ID&example=ID (unfolded there), or #example=ID (in the table of all).
function setLink(parts) {
  if (link.quiet) return;
  const text = Object.entries(parts).map(([name, id]) => name + '=' + encodeURIComponent(id)).join('&');
  history.replaceState(null, '', '#' + text);
}

function followLink() {
  const wanted = {};
  for (const part of location.hash.slice(1).split('&')) {
    const at = part.indexOf('=');
    if (at > 0) { try { wanted[part.slice(0, at)] = decodeURIComponent(part.slice(at + 1)); } catch { /* not one of ours */ } }
  }
  byId('missing').hidden = true;
  const train = 'example' in wanted ? data.train.id.indexOf(wanted.example) : -1;
  const test = 'answer' in wanted ? data.test.id.indexOf(wanted.answer) : -1;
  const absent = [['answer', test], ['example', train]].filter(([name, at]) => name in wanted && at < 0);
  if (absent.length) {
    byId('missing').textContent = 'This page has no ' + absent.map(([name]) => name + ' “' + brief(wanted[name], 60) + '”').join(' and no ') + '.';
    byId('missing').hidden = false;
  }
  if (test >= 0) {
    goToAnswer(test);
    if (train >= 0) unfold(train);
  } else if (train >= 0) goToExample(train);
}

const selection = {
  // The listed pairs of the selected answer, by the filters above them.
  pairs() {
    const j = answers.selected;
    return SIDES.flatMap((side) => pairsOf(side).map((pair) => ({
      answer_id: data.test.id[j], rank: pair.place + 1, id: data.train.id[pair.train], source: sourceName(data.train.source[pair.train]),
      score: exact(pair.score), low: exact(pair.low), high: exact(pair.high), significant: pair.clear, ...(pair.prior === null ? {} : { prior: exact(pair.prior) }), bm25_rank: pair.bm25 || null,
      prompt: data.train.prompt[pair.train], completion: data.train.answer[pair.train],
    })));
  },
  training() {
    return training.list.items.map((i) => ({
      id: data.train.id[i], source: sourceName(data.train.source[i]),
      ...(numbers.effect ? { effect: exact(numbers.effect[i]), proposed: numbers.proposed[i] > 0 } : {}),
      mean_score: exact(numbers.mean_score[i]), self_influence: exact(numbers.self_influence[i]), subsets: numbers.included[i],
      prompt: data.train.prompt[i], completion: data.train.answer[i],
    }));
  },
};

// Numbers as the page has them: seven digits of a float.
const exact = (x) => (Number.isFinite(x) ? Number(x.toPrecision(7)) : null);
const asJsonLines = (rows) => rows.map((row) => JSON.stringify(row) + '\n').join('');

// A spreadsheet must not take a text for a formula, so such a text gets an apostrophe before it.
function asCsv(rows) {
  if (!rows.length) return '';
  const cell = (value) => {
    if (value === null) return '';
    if (typeof value !== 'string') return String(value);
    const safe = /^ *[=+\-@\t\r\n＝＋－＠]/.test(value) ? "'" + value : value;
    return '"' + safe.replaceAll('"', '""') + '"';
  };
  return [Object.keys(rows[0]).map(cell), ...rows.map((row) => Object.values(row).map(cell))].map((row) => row.join(',') + '\r\n').join('');
}

function save(name, type, text) {
  const address = URL.createObjectURL(new Blob([text], { type: type + ';charset=utf-8' }));
  element('a', { href: address, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(address), 10000);
}

async function copy(button, text) {
  let done = true;
  try { await navigator.clipboard.writeText(text); } catch {
    const area = element('textarea', { class: 'skip' });
    area.value = text;
    document.body.append(area);
    area.select();
    done = document.execCommand('copy');
    area.remove();
  }
  const before = button.dataset.label || button.textContent;
  button.dataset.label = before;
  button.textContent = done ? 'Copied' : 'Not copied';
  setTimeout(() => { button.textContent = before; }, 1500);
}

// The three buttons beside a list.
function shareButtons(box, name, what) {
  const file = () => (name === 'pairs' ? 'pairs-' + data.test.id[answers.selected].replace(/[^\w.-]+/g, '_').slice(0, 60) : 'training');
  box.append(element('span', { class: 'share' },
    element('button', { type: 'button', title: 'Copy ' + what + ' as JSON Lines', onclick: (e) => copy(e.target, asJsonLines(selection[name]())) }, 'Copy'),
    element('button', { type: 'button', title: 'Save ' + what + ' as CSV', onclick: () => save(file() + '.csv', 'text/csv', asCsv(selection[name]())) }, 'CSV'),
    element('button', { type: 'button', title: 'Save ' + what + ' as JSON Lines', onclick: () => save(file() + '.jsonl', 'application/jsonl', asJsonLines(selection[name]())) }, 'JSONL')));
}
