"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const bytes = (text) => Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
  const palettes = Object.fromEntries(Object.entries(data.palettes).map(([name, text]) => [name, bytes(text)]));
  const strongest = { heat: 75, jet: 50 };
  const opacity = document.getElementById("opacity");
  const choice = document.getElementById("palette");
  const shown = new Set();
  const signed = data.items.some((item) => item.prompts.some((prompt) => prompt.palette === "signed"));
  const table = (map) => palettes[map.palette === "signed" ? "signed" : choice.value];

  const make = (tag, className, text) => {
    const element = document.createElement(tag);
    if (className) element.className = className;
    if (text !== undefined) element.textContent = text;
    return element;
  };

  // Decoded once for each map, on its first showing.
  async function levels(shownMap) {
    if (!shownMap.levels) {
      const image = new Image();
      image.src = shownMap.map;
      await image.decode();
      const canvas = make("canvas");
      canvas.width = image.width;
      canvas.height = image.height;
      const context = canvas.getContext("2d", { willReadFrequently: true });
      context.drawImage(image, 0, 0);
      const rgba = context.getImageData(0, 0, image.width, image.height).data;
      const grey = new Uint8Array(rgba.length / 4);
      for (let i = 0; i < grey.length; i++) grey[i] = rgba[4 * i];
      shownMap.levels = { grey, width: image.width, height: image.height };
    }
    return shownMap.levels;
  }

  // Between map cells, heat is interpolated first and coloured after, as between patch centres.
  function axis(pixels, cells) {
    const low = new Int32Array(pixels), high = new Int32Array(pixels), weight = new Float32Array(pixels);
    for (let i = 0; i < pixels; i++) {
      const at = Math.min(Math.max(((i + 0.5) * cells) / pixels - 0.5, 0), cells - 1);
      low[i] = Math.floor(at);
      high[i] = Math.min(low[i] + 1, cells - 1);
      weight[i] = at - low[i];
    }
    return { low, high, weight };
  }

  function paint(canvas, map, table) {
    const { width, height } = canvas;
    const context = canvas.getContext("2d");
    const out = context.createImageData(width, height);
    const x = axis(width, map.width), y = axis(height, map.height);
    for (let j = 0, o = 0; j < height; j++) {
      const upper = y.low[j] * map.width, lower = y.high[j] * map.width, v = y.weight[j];
      for (let i = 0; i < width; i++, o += 4) {
        const a = x.low[i], b = x.high[i], u = x.weight[i];
        const top = map.grey[upper + a] * (1 - u) + map.grey[upper + b] * u;
        const bottom = map.grey[lower + a] * (1 - u) + map.grey[lower + b] * u;
        const at = 4 * Math.round(top * (1 - v) + bottom * v);
        out.data[o] = table[at];
        out.data[o + 1] = table[at + 1];
        out.data[o + 2] = table[at + 2];
        out.data[o + 3] = table[at + 3];
      }
    }
    context.putImageData(out, 0, 0);
  }

  function wordsOf(prompt, bothWays) {
    const box = make("div", "words");
    box.append(make("p", "", `Words: ${bothWays ? data.legends.signed : data.legends.plain}`));
    for (const { word, value, strength } of prompt.words) {
      const [r, g, b] = !bothWays ? data.colours.counts : strength > 0 ? data.colours.for : data.colours.against;
      const span = make("span", "", word);
      span.style.background = `rgba(${r}, ${g}, ${b}, ${Math.abs(strength) * 0.75})`;
      span.title = (bothWays && value > 0 ? "+" : "") + value.toPrecision(3);
      box.append(span);
    }
    return box;
  }

  // A sentence as small pictures, one a word; pressing one shows its map large, pressing it again the sentence's.
  function stripOf(prompt, image, aspect, choose) {
    const box = make("section", "strip"), head = make("header"), tiles = make("div", "tiles");
    head.append(make("h3", "", "Word by word"));
    head.append(make("p", "", "One scale for the whole sentence. Choose a word to see its map large."));
    box.append(head, tiles);
    box.setAttribute("aria-label", `Word by word: ${prompt.text}`);
    const drawn = prompt.strip.map((word, index) => {
      const tile = make("button", "tile"), thumb = make("span", "thumb"), photo = make("canvas"), heat = make("canvas");
      tile.type = "button";
      tile.setAttribute("aria-pressed", "false");
      tile.title = `Similarity ${word.score.toFixed(3)}`;
      tile.addEventListener("click", () => choose(index));
      thumb.style.setProperty("--aspect", aspect);
      for (const canvas of [photo, heat]) {
        canvas.width = Math.round(224 * aspect);
        canvas.height = 224;
        canvas.setAttribute("aria-hidden", "true");
      }
      heat.className = "heat";
      thumb.append(photo, heat);
      tile.append(thumb, make("span", "word", word.text));
      tiles.append(tile);
      return { tile, word, photo, heat };
    });
    return {
      box,
      press(index) { drawn.forEach(({ tile }, i) => tile.setAttribute("aria-pressed", String(i === index))); },
      async draw() {
        await image.decode();
        for (const { word, photo, heat } of drawn) {
          const context = photo.getContext("2d");
          context.imageSmoothingQuality = "high";
          context.drawImage(image, 0, 0, photo.width, photo.height);
          paint(heat, await levels(word), table(word));
        }
      },
    };
  }

  function card(item, number) {
    const article = make("article", "card");
    const picture = make("div", "picture"), stack = make("div", "stack");
    const image = make("img"), canvas = make("canvas");
    image.src = item.image;
    image.alt = item.title;
    // Beyond 8 to 1 a picture is shown less narrow than it is, or nothing of it could be made out.
    const aspect = Math.min(Math.max(item.width / item.height, 1 / 8), 8);
    stack.style.setProperty("--aspect", aspect);
    canvas.width = Math.round(640 * Math.min(aspect, 1));
    canvas.height = Math.round(640 / Math.max(aspect, 1));
    canvas.className = "heat";
    canvas.setAttribute("aria-hidden", "true");
    stack.append(image, canvas);
    picture.append(stack);

    const side = make("div", "side"), head = make("div");
    head.append(make("h2", "", item.title), make("p", "meta", `${item.width} × ${item.height} pixels`));
    side.append(head);
    const list = make("fieldset", "prompts"), words = make("div");
    const legend = make("legend"), order = make("button", "order", "Similarity ↕");
    order.type = "button";
    order.setAttribute("aria-pressed", "false");
    order.title = "Most similar first, or in the order given";
    legend.append(make("span", "", "Prompt"), order);
    list.append(legend);
    const lowest = Math.min(0, ...item.prompts.map((p) => p.score));
    const highest = Math.max(0, ...item.prompts.map((p) => p.score));
    const span = highest - lowest || 1;
    const inputs = item.prompts.map((prompt, index) => {
      const row = make("label", "prompt"), input = make("input");
      input.type = "radio";
      input.name = `image-${number}`;
      input.addEventListener("change", () => state.show(index));
      const track = make("span", "track"), fill = make("i");
      fill.style.left = `${(100 * (Math.min(prompt.score, 0) - lowest)) / span}%`;
      fill.style.width = `${(100 * Math.abs(prompt.score)) / span}%`;
      track.append(fill);
      row.append(input, make("span", "text", prompt.text), make("span", "score", prompt.score.toFixed(3)), track);
      const more = Object.entries(prompt.extras).map(([name, value]) => `${name} ${value}`);
      if (more.length) row.append(make("span", "extras", more.join(" · ")));
      list.append(row);
      return input;
    });
    const rows = inputs.map((input) => input.parentElement);
    order.addEventListener("click", () => {
      const sorted = order.getAttribute("aria-pressed") !== "true";
      order.setAttribute("aria-pressed", String(sorted));
      order.textContent = sorted ? "Similarity ↓" : "Similarity ↕";
      const ranks = rows.map((_, i) => i);
      if (sorted) ranks.sort((a, b) => item.prompts[b].score - item.prompts[a].score);
      list.append(...ranks.map((i) => rows[i]));
    });
    if (item.prompts.length > 12) {
      const search = make("input");
      search.type = "search";
      search.placeholder = `Find among ${item.prompts.length.toLocaleString("en")} prompts`;
      search.setAttribute("aria-label", search.placeholder);
      search.addEventListener("input", () => {
        const wanted = search.value.toLowerCase();
        rows.forEach((row, i) => { row.hidden = !item.prompts[i].text.toLowerCase().includes(wanted); });
      });
      side.append(search);
    }
    side.append(list, words);
    article.append(picture, side);

    const state = {
      index: -1,
      word: -1,
      strip: null,
      length: item.prompts.length,
      async draw() {
        const prompt = item.prompts[state.index];
        if (!prompt || !shown.has(state)) return;
        const wanted = () => (state.word < 0 ? item.prompts[state.index] : item.prompts[state.index].strip[state.word]);
        const map = wanted(), found = await levels(map);
        if (map === wanted()) paint(canvas, found, table(map));
      },
      // All of it, where what is seen has come into view or changed its colours; else the large map alone.
      redraw() {
        state.draw();
        if (state.strip && shown.has(state)) state.strip.draw();
      },
      choose(word) {
        state.word = word === state.word ? -1 : word;
        const prompt = item.prompts[state.index];
        const asked = state.word < 0 ? prompt.text : `the word ${prompt.strip[state.word].text} of ${prompt.text}`;
        image.alt = `${item.title}, heat map for: ${asked}`;
        if (state.strip) state.strip.press(state.word);
        state.draw();
      },
      show(index) {
        state.index = index;
        inputs[index].checked = true;
        const prompt = item.prompts[index];
        words.replaceChildren();
        if (prompt.words && prompt.words.length) words.append(wordsOf(prompt, item.signedWords));
        if (state.strip) state.strip.box.remove();
        state.strip = prompt.strip && stripOf(prompt, image, Math.min(Math.max(aspect, 1 / 2), 2), state.choose);
        if (state.strip) article.append(state.strip.box);
        state.word = -1;
        state.choose(-1);
        if (state.strip && shown.has(state)) state.strip.draw();
      },
      article,
    };
    if (!item.prompts.length) list.replaceWith(make("p", "empty", "No prompts."));
    return state;
  }

  const cards = data.items.map(card);
  document.getElementById("items").append(...cards.map((c) => c.article));

  // Maps off the screen wait: a report may hold thousands.
  const watcher = new IntersectionObserver((entries) => {
    for (const entry of entries) {
      const state = cards[Number(entry.target.dataset.index)];
      if (entry.isIntersecting) { shown.add(state); state.redraw(); } else { shown.delete(state); }
    }
  }, { rootMargin: "400px" });
  cards.forEach((state, index) => {
    state.article.dataset.index = index;
    if (state.length) state.show(0);
    watcher.observe(state.article);
  });

  function fade() {
    document.getElementById("percent").value = `${opacity.value} %`;
    document.body.style.setProperty("--opacity", opacity.value / 100);
  }

  function legend() {
    const context = document.getElementById("legend").getContext("2d");
    const out = context.createImageData(256, 1);
    out.data.set(palettes[signed ? "signed" : choice.value]);
    context.putImageData(out, 0, 0);
  }

  function step(by) {
    for (const state of cards) {
      if (state.length) state.show((state.index + by + state.length) % state.length);
    }
  }

  opacity.addEventListener("input", fade);
  choice.addEventListener("change", () => {
    opacity.value = strongest[choice.value];
    fade();
    legend();
    cards.forEach((state) => state.redraw());
  });
  if (signed) {
    document.getElementById("choice").hidden = true;
    document.getElementById("least").textContent = "against";
    document.getElementById("most").textContent = "for";
  }
  document.getElementById("previous").addEventListener("click", () => step(-1));
  document.getElementById("next").addEventListener("click", () => step(1));
  document.getElementById("bar").hidden = !cards.some((state) => state.length);
  fade();
  legend();
})();
