// All training examples: sortable and searchable; candidates for removal first where there are any.

const training = { list: null, order: 'self_influence' };
const ORDERS = {
  id: { label: 'Example', value: (i) => -i },
  text: { label: 'Answer', value: null },
  effect: { label: 'Unwanted (z)', value: (i) => numbers.effect[i], num: true },
  mean_score: { label: 'Mean score', value: (i) => -numbers.mean_score[i], num: true },
  self_influence: { label: 'Self-influence', value: (i) => numbers.self_influence[i], num: true },
  included: { label: 'Subsets', value: (i) => numbers.included[i], num: true },
};

function startTraining() {
  const largest = (name) => numbers[name].reduce((most, v) => Math.max(most, Math.abs(v) || 0), 0);
  const mean = aligned(largest('mean_score'));
  const effect = numbers.effect ? aligned(largest('effect')) : digits;
  const plus = (v, number) => (v > 0 ? '+' : '') + number(v);
  if (numbers.effect) training.order = 'effect';
  else delete ORDERS.effect;
  byId('training').classList.toggle('ranked', Boolean(numbers.effect));
  shareButtons(byId('train-share'), 'training', 'the listed examples');
  fillSources(byId('train-source'), data.train);
  const head = byId('train-head');
  head.classList.add('grid');
  head.append(...Object.entries(ORDERS).map(([name, entry]) => (!entry.value ? element('span', {}, entry.label) : element('button', {
    type: 'button', class: entry.num ? 'num' : '', 'data-order': name, title: 'Sort by this',
    onclick: () => { training.order = name; drawTraining(); byId('train-list').scrollTop = 0; },
  }, entry.label))));
  training.list = new VirtualList(byId('train-list'), 38, (i) => [element('div', { class: 'grid' },
    element('span', { class: 'one' }, element('span', { class: 'id' }, data.train.id[i])),
    element('span', { class: 'one' }, data.train.answer[i]),
    ...(numbers.effect ? [element('span', { class: 'num' + (numbers.proposed[i] ? ' harmful' : '') }, plus(numbers.effect[i], effect))] : []),
    element('span', { class: 'num ' + (numbers.mean_score[i] < 0 ? 'harmful' : '') }, plus(numbers.mean_score[i], mean)),
    element('span', { class: 'num' }, digits(numbers.self_influence[i])),
    element('span', { class: 'num' }, String(numbers.included[i])))], showTraining);
  for (const id of ['train-search', 'train-source']) byId(id).addEventListener('input', drawTraining);
  drawTraining();
  training.list.pick(training.list.items[0]);
}

function goToExample(i) {
  byId('train-search').value = '';
  byId('train-source').value = ANY;
  drawTraining();
  training.list.pick(i);
  byId('training').scrollIntoView();
}

function drawTraining() {
  const words = byId('train-search').value.toLowerCase().trim();
  const source = Number(byId('train-source').value);
  const value = ORDERS[training.order].value;
  const found = [];
  for (let i = 0; i < answers.trainHay.length; i++) {
    if (ofSource(data.train, i, source) && (!words || answers.trainHay[i].includes(words))) found.push(i);
  }
  const known = (x) => (Number.isFinite(x) ? x : -Infinity);
  found.sort((a, b) => known(value(b)) - known(value(a)) || a - b);
  for (const button of byId('train-head').querySelectorAll('button')) {
    button.setAttribute('aria-pressed', String(button.dataset.order === training.order));
  }
  byId('train-count').textContent = found.length.toLocaleString('en') + ' of ' + answers.trainHay.length.toLocaleString('en');
  training.list.show(found);
}

function showTraining(i) {
  byId('train-detail').replaceChildren(
    element('div', { class: 'meta' }, element('span', { class: 'id' }, data.train.id[i]), tag(data.train, i),
      element('button', { type: 'button', class: 'small', title: 'Copy a link to this example', onclick: (e) => copy(e.target, linkTo({ example: data.train.id[i] })) }, 'Link')),
    element('p', { class: 'reply' }, data.train.answer[i]),
    element('p', { class: 'prompt' }, data.train.prompt[i]),
    system(data.train, i, false),
    element('dl', { class: 'facts' },
      ...(numbers.effect ? [element('dt', {}, ORDERS.effect.label), element('dd', {}, signed(numbers.effect[i]) + (numbers.proposed[i] ? ', proposed for removal' : ''))] : []),
      element('dt', {}, 'Mean score'), element('dd', {}, signed(numbers.mean_score[i])),
      element('dt', {}, 'Self-influence'), element('dd', {}, digits(numbers.self_influence[i]) + ' nats'),
      element('dt', {}, 'In subsets'), element('dd', {}, numbers.included[i] + ' of ' + data.picture.members)),
    ...partners(i, 'helps', 'Helps most'), ...partners(i, 'hurts', 'Hurts most'));
  setLink({ example: data.train.id[i] });
}

function partners(i, name, title) {
  const width = numbers[name + '_index'].shape[1];
  const rows = [];
  for (let place = 0; place < width; place++) {
    const j = numbers[name + '_index'][i * width + place];
    if (j < 0) continue;
    const score = element('span', { class: 'number ' + (name === 'helps' ? 'helpful' : 'harmful') }, signed(numbers[name + '_score'][i * width + place]));
    const away = j - data.test.id.length; // the page holds the first answers; of others it knows the id
    rows.push(element('li', {}, away < 0
      ? element('button', { type: 'button', onclick: () => goToAnswer(j) }, score, element('span', { class: 'one' }, data.test.answer[j]))
      : element('span', { class: 'away' }, score, element('span', { class: 'id one' }, data.elsewhere[away]), 'not on this page')));
  }
  return rows.length ? [element('h3', {}, title), element('ul', { class: 'links' }, ...rows)] : [];
}

function goToAnswer(j) {
  byId('test-search').value = '';
  byId('test-source').value = ANY;
  filterAnswers();
  answers.list.pick(j);
  byId('answers').scrollIntoView();
}
