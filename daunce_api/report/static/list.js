// A list of any length: only the rows in view exist.

class VirtualList {
  constructor(box, rowHeight, render, choose) {
    this.box = box;
    this.rowHeight = rowHeight;
    this.render = render;
    this.choose = choose;
    this.items = [];
    this.selected = -1;
    this.runway = element('div', {});
    this.runway.style.position = 'relative';
    this.rows = new Map();
    box.append(this.runway);
    box.addEventListener('scroll', () => this.draw(), { passive: true });
    box.addEventListener('keydown', (event) => this.key(event));
    new ResizeObserver(() => this.draw()).observe(box);
  }

  show(items) {
    this.items = items;
    this.runway.style.height = items.length * this.rowHeight + 'px';
    this.box.style.maxHeight = Math.max(items.length, 2) * this.rowHeight + 2 + 'px';
    for (const row of this.rows.values()) row.remove();
    this.rows.clear();
    this.box.scrollTop = Math.min(this.box.scrollTop, Math.max(0, items.length * this.rowHeight - this.box.clientHeight));
    this.draw();
  }

  draw() {
    const first = Math.max(0, Math.floor(this.box.scrollTop / this.rowHeight) - 6);
    const last = Math.min(this.items.length, Math.ceil((this.box.scrollTop + this.box.clientHeight) / this.rowHeight) + 6);
    for (const [place, row] of this.rows) {
      if (place < first || place >= last) {
        row.remove();
        this.rows.delete(place);
      }
    }
    for (let place = first; place < last; place++) {
      if (this.rows.has(place)) continue;
      const item = this.items[place];
      const row = element('div', {
        class: 'row', role: 'option', id: this.box.id + '-' + item, 'aria-setsize': this.items.length,
        'aria-posinset': place + 1, 'aria-selected': String(item === this.selected),
        onclick: () => this.pick(item),
      }, ...this.render(item));
      row.style.top = place * this.rowHeight + 'px';
      row.style.height = this.rowHeight + 'px';
      this.rows.set(place, row);
      this.runway.append(row);
    }
  }

  pick(item, quiet) {
    this.selected = item;
    const place = this.items.indexOf(item);
    if (place >= 0) {
      const top = place * this.rowHeight;
      if (top < this.box.scrollTop) this.box.scrollTop = top;
      else if (top + this.rowHeight > this.box.scrollTop + this.box.clientHeight) {
        this.box.scrollTop = top + this.rowHeight - this.box.clientHeight;
      }
    }
    this.draw();
    for (const [at, row] of this.rows) row.setAttribute('aria-selected', String(this.items[at] === item));
    this.box.setAttribute('aria-activedescendant', this.box.id + '-' + item);
    if (!quiet) this.choose(item);
  }

  step(distance) {
    if (!this.items.length) return;
    const here = this.items.indexOf(this.selected);
    const next = here < 0 ? 0 : Math.min(this.items.length - 1, Math.max(0, here + distance));
    this.pick(this.items[next]);
  }

  key(event) {
    const page = Math.max(1, Math.floor(this.box.clientHeight / this.rowHeight) - 1);
    const distance = { ArrowDown: 1, ArrowUp: -1, PageDown: page, PageUp: -page, Home: -Infinity, End: Infinity }[event.key];
    if (distance === undefined || event.metaKey || event.ctrlKey || event.altKey) return;
    event.preventDefault();
    if (Number.isFinite(distance)) this.step(distance);
    else if (this.items.length) this.pick(this.items[distance < 0 ? 0 : this.items.length - 1]);
  }
}
