// Theme, keys, print, and the start.

function setTheme(name, keep) {
  document.documentElement.dataset.theme = name;
  byId('theme').textContent = name === 'dark' ? 'Light' : 'Dark';
  if (keep) {
    try { localStorage.setItem('daunce-theme', name); } catch { /* private windows have no storage */ }
  }
  drawPlots();
}

function startTheme() {
  const system = matchMedia('(prefers-color-scheme: dark)');
  let kept = null;
  try { kept = localStorage.getItem('daunce-theme'); } catch { /* the system's choice it is */ }
  setTheme(kept || (system.matches ? 'dark' : 'light'), false);
  system.addEventListener('change', () => { if (!kept) setTheme(system.matches ? 'dark' : 'light', false); });
  byId('theme').addEventListener('click', toggleTheme);
  // Paper is light, whatever the screen is, and pages are counted right after `beforeprint`.
  let before = null;
  window.addEventListener('beforeprint', () => {
    before = document.documentElement.dataset.theme;
    fillPrint();
    setTheme('light', false);
  });
  window.addEventListener('afterprint', () => setTheme(before, false));
}

function toggleTheme() {
  setTheme(document.documentElement.dataset.theme === 'dark' ? 'light' : 'dark', true);
}

function openHelp() {
  byId('help').showModal();
  byId('help-head').focus();
}

function startKeys() {
  byId('help-open').addEventListener('click', openHelp);
  document.addEventListener('keydown', (event) => {
    const typing = /^(INPUT|SELECT|TEXTAREA)$/.test(event.target.tagName);
    if (event.key === 'Escape' && event.target.type === 'search') {
      event.target.value = '';
      event.target.dispatchEvent(new Event('input'));
      event.target.blur();
    } else if (event.key === 'Escape' && answers.chosen && !byId('help').open) choosePair(answers.chosen);
    if (typing || event.metaKey || event.ctrlKey || event.altKey || byId('help').open) return;
    const action = {
      '/': () => byId('test-search').focus(), j: () => answers.list.step(1), k: () => answers.list.step(-1),
      t: toggleTheme, '?': openHelp,
    }[event.key];
    if (action) {
      event.preventDefault();
      action();
    }
  });
}

// Paper cannot be clicked: every answer (the first 60) with its three strongest on each side, and the candidates.
function fillPrint() {
  const line = (side, j, place) => {
    const at = j * numbers[side + '_index'].shape[1] + place;
    const train = numbers[side + '_index'][at];
    if (place >= numbers[side + '_index'].shape[1] || train < 0) return '';
    const score = numbers[side + '_score'][at];
    return element('li', {}, element('span', { class: 'number ' + (side === 'pro' ? 'helpful' : 'harmful') }, signed(score)),
      ' (' + interval({ low: numbers[side + '_low'][at], high: numbers[side + '_high'][at] }) + ')  ' + data.train.id[train] + ': ' + brief(data.train.answer[train]));
  };
  const count = Math.min(60, data.test.id.length);
  const worst = numbers.effect ? training.list.items.filter((i) => numbers.proposed[i]).slice(0, 40) : [];
  byId('print').replaceChildren(
    element('h2', {}, 'All answers, three strongest on each side'),
    ...Array.from({ length: count }, (_, j) => element('div', { class: 'brief' },
      element('p', {}, element('b', {}, data.test.id[j]), '  ' + brief(data.test.answer[j])),
      element('ul', {}, ...SIDES.flatMap((side) => [0, 1, 2].map((place) => line(side, j, place)))))),
    worst.length ? element('h2', {}, 'Training examples proposed for removal') : '',
    ...worst.map((i) => element('div', { class: 'brief' }, element('p', {}, element('b', {}, data.train.id[i]),
      '  effect ' + signed(numbers.effect[i]) + '  ' + brief(data.train.answer[i])))));
}

async function start() {
  const [text, buffer] = await Promise.all([inflate('data'), inflate('numbers')]);
  data = JSON.parse(new TextDecoder().decode(text));
  numbers = views(data.arrays, buffer);
  data.train.named = new Set(data.heat.row_source);
  data.test.named = new Set(data.heat.column_source);
  const prompts = new Set([...data.train.system, ...data.test.system]);
  data.sharedSystem = prompts.size === 1 ? data.systems[[...prompts][0]] || '' : null;
  for (const section of document.querySelectorAll('main > section[hidden]')) section.hidden = false;
  startTheme();
  startAnswers();
  startTraining();
  startKeys();
  startPlots();
  if (location.hash.includes('=')) followLink();
  link.quiet = false;
  window.addEventListener('hashchange', () => { if (location.hash.includes('=')) followLink(); });
  document.documentElement.dataset.ready = 'all';
}

start().catch((error) => {
  const box = byId('failed');
  box.textContent = 'This page could not be built (' + error.message + '). It needs a browser from 2023 or later.';
  box.hidden = false;
});
