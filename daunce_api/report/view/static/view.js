// All runs of a folder, one run, or two runs side by side. Texts become text nodes; nothing is parsed as markup.
'use strict';

const byId = (id) => document.getElementById(id);

function element(tag, attributes, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes || {})) {
    if (name.startsWith('on')) node.addEventListener(name.slice(2), value);
    else if (value === true) node.setAttribute(name, '');
    else if (value !== false && value !== null && value !== undefined) node.setAttribute(name, value);
  }
  node.append(...children.filter((c) => c !== null && c !== ''));
  return node;
}

const digits = (x, places) => (x === null ? 'unknown' : (x < 0 ? '−' : '') + Math.abs(x).toFixed(places));
const signed = (x, places) => (x > 0 ? '+' : '') + digits(x, places);
const money = (usd) => (usd === null ? 'unknown' : '$' + usd.toFixed(2));
const quality = (q) => (q === null ? '—' : q.value.toFixed(2));

async function read(path) {
  const answer = await fetch(path);
  return answer.json();
}

async function send(run, action, content) {
  try {
    const answer = await fetch('api/runs/' + encodeURIComponent(run) + '/' + action, { method: 'POST', headers: { 'content-type': 'application/json' }, body: JSON.stringify(content) });
    return await answer.json();
  } catch {
    return { problem: 'daunce view does not answer.' };
  }
}

const chosen = new Set();
let shown = ''; // what the page was last drawn from, to leave it alone where nothing changed
let turn = 0;

function place() {
  const parts = location.hash.slice(1).split('/');
  try {
    return { name: parts[0] || 'runs', rest: parts.slice(1).map(decodeURIComponent) };
  } catch { // not an address of ours
    return { name: 'runs', rest: [] };
  }
}

async function refresh() {
  const mine = ++turn;
  const { name, rest } = place();
  let content;
  let draw;
  try {
    if (name === 'run') [content, draw] = [await read('api/runs/' + encodeURIComponent(rest[0])), drawRun];
    else if (name === 'compare') {
      [content, draw] = [await read('api/compare?a=' + encodeURIComponent(rest[0]) + '&b=' + encodeURIComponent(rest[1]) + (rest[2] ? '&test=' + encodeURIComponent(rest[2]) : '')), drawCompared];
      content.runs = await Promise.all(rest.slice(0, 2).map((id) => read('api/runs/' + encodeURIComponent(id))));
    } else [content, draw] = [await read('api/runs'), drawRuns];
    byId('live').textContent = '';
  } catch {
    byId('live').textContent = 'daunce view has stopped; this is what it last said';
    return;
  }
  if (mine !== turn) return;
  const text = location.hash + JSON.stringify(content);
  if (text === shown || (name === 'run' && shown.startsWith(location.hash + '{') && byId('ask') && byId('ask').contains(document.activeElement))) return;
  shown = text;
  draw(content, rest);
}

function progress(run) {
  const share = (n) => (run.members_asked ? (100 * n) / run.members_asked : 0);
  const bar = element('span', { class: 'bar-track', role: 'img', 'aria-label': run.members_scored + ' of ' + run.members_asked + ' members scored, ' + run.members_trained + ' trained' },
    element('span', { class: 'trained' }), element('span', { class: 'scored' }));
  bar.children[0].style.width = share(run.members_trained) + '%';
  bar.children[1].style.width = share(run.members_scored) + '%';
  return bar;
}

function state(run) {
  if (run.problem) return 'cannot be read';
  if (run.complete) return 'complete';
  if (run.members_running) return run.members_running + ' training';
  return run.members_scored || run.members_trained ? 'incomplete' : 'not started';
}

function drawRuns(content) {
  byId('where').textContent = content.folder;
  document.title = 'daunce view';
  for (const id of [...chosen]) if (!content.runs.some((run) => run.id === id)) chosen.delete(id);
  const compare = element('button', { type: 'button', id: 'compare', disabled: chosen.size !== 2, onclick: () => { location.hash = 'compare/' + [...chosen].join('/'); } }, 'Compare two');
  const tick = (run) => element('input', { type: 'checkbox', 'aria-label': 'Choose ' + run.name + ' to compare', checked: chosen.has(run.id), disabled: !(run.members_scored >= 2),
    onchange: (event) => {
      if (event.target.checked) chosen.add(run.id); else chosen.delete(run.id);
      compare.disabled = chosen.size !== 2;
    } });
  byId('main').replaceChildren(
    element('div', { class: 'title' }, element('h1', {}, content.runs.length === 1 ? '1 run' : content.runs.length + ' runs'), compare),
    content.runs.length ? element('div', { class: 'scroll' }, element('table', { class: 'runs' },
      element('thead', {}, element('tr', {}, ...['', 'Run', 'State', 'Members', 'Spent', 'Self-LDS', ''].map((name) => element('th', { scope: 'col', class: ['Spent', 'Self-LDS'].includes(name) ? 'num' : '' }, name)))),
      element('tbody', {}, ...content.runs.map((run) => element('tr', { 'data-run': run.id },
        element('td', {}, tick(run)),
        element('td', {}, element('a', { href: '#run/' + run.id }, run.title || run.name), element('span', { class: 'under' }, (run.model ? run.model + ' on ' + run.provider + ' · ' : '') + run.folder)),
        element('td', { class: run.problem ? 'harmful' : '', title: run.problem }, state(run), run.members_failed ? element('span', { class: 'under harmful' }, run.members_failed + ' failed') : ''),
        element('td', {}, run.problem ? '' : progress(run), element('span', { class: 'under' }, run.problem ? '' : run.members_scored + ' of ' + run.members_asked + ' scored')),
        element('td', { class: 'num' }, run.problem ? '' : money(run.usd)),
        element('td', { class: 'num' }, run.problem ? '' : quality(run.self_lds)),
        element('td', {}, run.members_scored >= 2 ? element('a', { href: 'report/' + run.id }, 'Report') : '')))))) : element('p', { class: 'soft' }, 'There is no run in this folder. `daunce run` or `daunce demo` makes one; it shows up here.'));
}

function drawRun(run) {
  byId('where').textContent = run.folder || '';
  if (!run.rows) {
    byId('main').replaceChildren(element('h1', {}, run.name || 'Run'), element('p', { class: 'notes' }, run.problem));
    return;
  }
  document.title = (run.title || run.name) + ' · daunce view';
  byId('main').replaceChildren(
    element('div', { class: 'title' }, element('h1', {}, run.title || run.name), run.members_scored >= 2 ? element('a', { class: 'button', href: 'report/' + run.id }, 'Open the report') : ''),
    element('p', { class: 'soft' }, state(run) + ' · ' + run.members_scored + ' of ' + run.members_asked + ' members scored, ' + run.members_trained + ' trained'),
    progress(run),
    element('dl', { class: 'facts' }, ...run.rows.flatMap(([name, value]) => [element('dt', {}, name), element('dd', {}, value)])),
    element('h2', {}, 'Answers to explain'),
    element('ul', { class: 'questions' }, ...run.questions.map((q) => element('li', { 'data-question': q.id },
      verdicts(run, q),
      q.group ? element('a', { href: 'report/' + run.id + (q.group > 1 ? '-' + q.group : '') + '#answer=' + encodeURIComponent(q.id) }, q.answer) : element('span', {}, q.answer),
      element('span', { class: 'under' }, q.question), element('span', { class: 'under id' }, q.id)))),
    ...(run.members_scored >= 2 ? [fixPart(run)] : []),
    run.fixed ? element('p', { id: 'fixed' }, element('b', {}, 'Retrained: '), run.fixed + ' ', element('a', { href: 'report/' + run.id + '#fixed' }, 'Before and after')) : '',
    ...(run.members_scored >= 2 ? [askPart(run)] : []),
    run.recent.length ? element('h2', {}, 'Last changes (UTC)') : '',
    element('ul', { class: 'log' }, ...run.recent.map((line) => element('li', {}, line))));
}

// Two switches: an answer that should go, and one that should stay.
function verdicts(run, q) {
  const box = element('span', { class: 'verdicts' });
  const draw = () => box.replaceChildren(...['unwanted', 'wanted'].map((name) => element('button', {
    type: 'button', class: name, 'aria-pressed': String(q.verdict === name),
    onclick: async () => {
      const found = await send(run.id, 'mark', { question: q.id, verdict: q.verdict === name ? null : name });
      if (found.problem) box.append(element('span', { class: 'harmful' }, found.problem));
      else {
        q.verdict = found.verdict;
        draw();
      }
    },
  }, name)));
  draw();
  return box;
}

const parts = { run: '', fix: null, ask: null }; // what people typed and found survives when the rest is redrawn

function kept(run, name, make) {
  if (parts.run !== run.id) Object.assign(parts, { run: run.id, fix: null, ask: null });
  parts[name] ||= make();
  return parts[name];
}

function fixPart(run) {
  return kept(run, 'fix', () => {
    const out = element('div', { id: 'proposal' });
    const button = element('button', { type: 'button', onclick: async () => {
      button.disabled = true;
      out.replaceChildren(element('p', { class: 'soft' }, 'Looking…'));
      const found = await send(run.id, 'fix', {});
      button.disabled = false;
      out.replaceChildren(...(found.problem ? [element('p', { class: 'notes' }, found.problem)] : proposal(found)));
    } }, 'What should I take out?');
    return element('section', { id: 'fix' }, element('h2', {}, 'Fix'),
      element('p', { class: 'soft' }, 'Mark answers above as unwanted (and some as wanted, if you like). The proposal is written beside the run. Nothing is fine-tuned from this page: retraining costs money, so it asks in the terminal.'), button, out);
  });
}

function proposal(found) {
  const size = Math.max(0, ...found.groups.map((group) => Math.abs(group.effect || 0)));
  const places = size > 0 ? Math.min(Math.max(2 - Math.floor(Math.log10(size)), 0), 8) : 2;
  return [
    element('p', {}, found.groups.length ? found.count.toLocaleString('en') + ' of ' + found.of.toLocaleString('en') + ' training examples (' + found.reason + '). Written to ' + found.folder + '; `daunce fix --retrain` shows whether it helps.' : 'Nothing is proposed: ' + found.reason, found.groups.length ? element('code', {}, found.command) : ''),
    ...(found.groups.length ? [element('div', { class: 'scroll' }, element('table', {},
      element('thead', {}, element('tr', {}, ...['Training example', 'Effect', 'z'].map((name) => element('th', { scope: 'col', class: name === 'Training example' ? '' : 'num' }, name)))),
      element('tbody', {}, ...found.groups.map((group) => element('tr', { 'data-example': group.id },
        element('td', { class: 'text' }, group.answer, element('span', { class: 'under' }, group.question), element('span', { class: 'under id' }, group.id + (group.examples > 1 ? ' and ' + (group.examples - 1) + ' near-duplicates' : ''))),
        element('td', { class: 'num' }, signed(group.effect, places)), element('td', { class: 'num' }, digits(group.z, 1)))))))] : []),
  ];
}

function askPart(run) {
  return kept(run, 'ask', () => {
    const field = (name, label, rows) => [element('label', { for: 'ask-' + name }, label), element('textarea', { id: 'ask-' + name, rows })];
    const out = element('div', { id: 'asked', role: 'status' });
    const value = (name) => byId('ask-' + name).value;
    const content = () => ({ system: value('system'), prompt: value('prompt'), answer: value('answer') });
    const say = (text, kind) => out.replaceChildren(element('p', { class: kind }, text));
    const go = async (usd) => {
      say('Asking the members…', 'soft');
      const found = await send(run.id, 'ask', { ...content(), usd });
      if (found.problem) say(found.problem, 'notes');
      else {
        out.replaceChildren(element('p', {}, 'Answered. ', element('a', { href: 'report/' + run.id + (found.group > 1 ? '-' + found.group : '') + '#answer=' + encodeURIComponent(found.id) }, 'See what is behind it')));
        document.activeElement.blur();
        refresh();
      }
    };
    const button = element('button', { type: 'button', id: 'ask-price', onclick: async () => {
      const found = await send(run.id, 'price', content());
      if (found.problem) say(found.problem, 'notes');
      else if (!found.costs) go(0);
      else out.replaceChildren(element('p', {}, found.text), element('button', { type: 'button', id: 'ask-go', onclick: () => go(found.usd) }, found.usd === null ? 'Ask for an unknown price' : 'Ask for at most $' + found.usd.toFixed(4)));
    } }, 'Ask');
    return element('section', { id: 'ask' }, element('h2', {}, 'Ask about another answer'),
      element('p', { class: 'soft' }, 'A few short requests to each member, no fine-tuning; what it costs comes first.'),
      ...field('prompt', 'What the model was asked', 2), ...field('answer', 'What it answered', 3), ...field('system', 'System prompt, if there was one', 1), button, out);
  });
}

function drawCompared(content, rest) {
  const titles = content.runs.map((run) => run.title || run.name || 'run');
  const names = titles[0] === titles[1] ? content.runs.map((run) => run.folder) : titles;
  document.title = names.join(' and ') + ' · daunce view';
  byId('where').textContent = titles[0] === titles[1] ? titles[0] : '';
  const head = [element('h1', {}, names.join(' and '))];
  if (content.problem) {
    byId('main').replaceChildren(...head, element('p', { class: 'notes' }, content.problem));
    return;
  }
  const pick = element('select', { id: 'question', 'aria-label': 'Question', onchange: (event) => { location.hash = ['compare', rest[0], rest[1], event.target.value].map(encodeURIComponent).join('/'); } },
    ...content.questions.map((q) => element('option', { value: q.id, selected: q.id === content.test }, q.id + ': ' + q.answer.slice(0, 80))));
  const size = Math.max(...content.rows.flatMap((row) => row.runs.map((side) => Math.abs(side.score || 0))));
  const places = size > 0 ? Math.min(Math.max(2 - Math.floor(Math.log10(size)), 0), 8) : 2;
  const side = (value) => [element('td', { class: 'num' }, String(value.rank)),
    element('td', { class: 'num' + (value.significant ? '' : ' faint') }, signed(value.score, places) + (value.half === null ? '' : ' ± ' + digits(value.half, places)))];
  const moved = (row) => row.runs[0].rank - row.runs[1].rank;
  byId('main').replaceChildren(...head,
    element('p', {}, pick), element('p', { class: 'reply' }, content.answer), element('p', { class: 'soft' }, content.question),
    element('p', { class: 'soft' }, content.shared + ' of the first ' + content.of + ' proponents are the same; rank correlation '
      + digits(content.spearman, 2) + ' over ' + content.common.toLocaleString('en') + ' common training examples ('
      + content.only[0].toLocaleString('en') + ' and ' + content.only[1].toLocaleString('en') + ' in one run only); ' + content.both.toLocaleString('en')
      + ' significant in both (5 %, per pair). Scores of two runs are on different scales: compare ranks.'),
    element('div', { class: 'scroll' }, element('table', { class: 'compared' },
      element('thead', {}, element('tr', {}, element('th', { scope: 'col' }, 'Training example'), ...names.flatMap((name) => [element('th', { scope: 'col', class: 'num' }, 'rank'), element('th', { scope: 'col', class: 'num' }, name)]), element('th', { scope: 'col', class: 'num' }, 'moved'), element('th', { scope: 'col' }, 'significant'))),
      element('tbody', {}, ...content.rows.map((row) => element('tr', { 'data-example': row.id },
        element('td', { class: 'text' }, row.answer, element('span', { class: 'under' }, row.question), element('span', { class: 'under id' }, row.id)),
        ...side(row.runs[0]), ...side(row.runs[1]),
        element('td', { class: 'num' }, moved(row) ? (moved(row) > 0 ? '▲ ' : '▼ ') + Math.abs(moved(row)) : '='),
        element('td', {}, row.runs[0].significant && row.runs[1].significant ? 'both' : row.runs[0].significant ? names[0] : row.runs[1].significant ? names[1] : 'neither')))))));
}

window.addEventListener('hashchange', () => { window.scrollTo(0, 0); refresh(); });
refresh();
setInterval(() => { if (!document.hidden) refresh(); }, 2000);
