// Small helpers: elements without markup strings, numbers as text, and the compressed blocks of this file.

const byId = (id) => document.getElementById(id);

// Children that are strings become text nodes: whatever a text contains, it is never parsed as markup.
function element(tag, attributes, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes || {})) {
    if (name.startsWith('on')) node.addEventListener(name.slice(2), value);
    else if (value === true) node.setAttribute(name, '');
    else if (value !== false && value !== null) node.setAttribute(name, value);
  }
  node.append(...children.filter((c) => c !== null && c !== ''));
  return node;
}

function drawing(tag, attributes, ...children) {
  const node = document.createElementNS('http://www.w3.org/2000/svg', tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children);
  return node;
}

async function inflate(id) {
  const binary = atob(byId(id).textContent);
  const bytes = new Uint8Array(binary.length);
  for (let i = 0; i < binary.length; i++) bytes[i] = binary.charCodeAt(i);
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream('gzip'));
  return new Response(stream).arrayBuffer();
}

function views(directory, buffer) {
  const kinds = { f: Float32Array, i: Int32Array, h: Uint16Array, b: Int8Array };
  const out = {};
  for (const [name, entry] of Object.entries(directory)) {
    out[name] = new kinds[entry.kind](buffer, entry.at, entry.count);
    out[name].shape = entry.shape;
  }
  return out;
}

// Three significant digits and a real minus sign; very small numbers keep their exponent.
function digits(x) {
  if (!Number.isFinite(x)) return 'unknown';
  if (x === 0) return '0';
  const size = Math.abs(x);
  const text = size < 1e-4 || size >= 1e6 ? size.toExponential(1) : String(Number(size.toPrecision(3)));
  return (x < 0 ? '−' : '') + text;
}
// One number format for scores that stand below each other: as many decimals as the largest needs for three digits.
function aligned(reach) {
  const order = reach > 0 ? Math.floor(Math.log10(reach)) : 0;
  if (order < -4 || order > 5) return digits;
  const decimals = Math.max(2 - order, 0);
  return (x) => (Number.isFinite(x) ? (x < 0 ? '−' : '') + Math.abs(x).toFixed(decimals) : 'unknown');
}
const signed = (x) => (x > 0 ? '+' : '') + digits(x);
const brief = (text, limit = 140) => (text.length > limit ? text.slice(0, limit - 1) + '…' : text);
const color = (name) => getComputedStyle(document.documentElement).getPropertyValue('--' + name).trim();

// A source that is an empty text needs a name that can be seen.
const sourceName = (s) => data.sources[s] || '(empty)';

// The source of an example; nothing where all have the same, or it has none.
function tag(side, i) {
  if (data.sources.length < 2 || data.sources[side.source[i]] === '(none)') return '';
  return element('span', { class: 'tag' }, sourceName(side.source[i]));
}

// The system prompt, folded; nothing where all examples share it (the page says it once).
function system(side, i, open) {
  if (data.sharedSystem !== null || side.system[i] < 0) return '';
  return element('details', { class: 'system', open }, element('summary', {}, 'system prompt'), element('p', { class: 'prompt' }, data.systems[side.system[i]]));
}

// Choices in a list of sources: any, or those that the heat map adds up under "all others".
const ANY = -1;
const OTHERS = -2;
const ofSource = (side, i, chosen) => chosen === ANY || (chosen === OTHERS ? !side.named.has(side.source[i]) : side.source[i] === chosen);

function fillSources(select, side) {
  const used = new Set(side.source);
  for (const s of side.named) if (s !== null) used.add(s);
  select.append(element('option', { value: ANY }, 'all sources'));
  for (const s of [...used].sort((a, b) => a - b)) select.append(element('option', { value: s }, sourceName(s)));
  if (side.named.has(null)) select.append(element('option', { value: OTHERS }, 'all others in the heat map'));
  select.hidden = used.size < 2;
}

// Lower-case text of each example, made once: what searches look at.
function haystack(side) {
  return side.id.map((id, i) => (id + '\n' + (data.sharedSystem === null && side.system[i] >= 0 ? data.systems[side.system[i]] + '\n' : '') + side.prompt[i] + '\n' + side.answer[i]).toLowerCase());
}

let data = null;
let numbers = null;
