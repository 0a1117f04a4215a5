"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const { levels, silent, summary } = data;
  const R = data.about.num_thoughts;
  const last = data.piece.length; // the place of the token to come

  // -- helpers
  const el = (tag, name, ...children) => {
    const made = document.createElement(tag);
    if (name) made.className = name;
    made.append(...children);
    return made;
  };
  const button = (name, label, act, ...children) => {
    const made = el("button", name, ...children);
    made.type = "button";
    made.setAttribute("aria-label", label);
    made.addEventListener("click", act);
    return made;
  };
  const put = (id, ...children) => document.getElementById(id).replaceChildren(...children);
  const places = (x) => (Math.abs(x) < 0.0995 ? 3 : 2);
  const number = (x) => (Math.abs(x) < 0.0005 ? "0" : x.toFixed(places(x)).replace("-", "−"));
  const signed = (x) => (x < 0.0005 ? "" : "+") + number(x);
  const percent = (p) => {
    if (p < 0.001) return p === 0 ? "0" : "<0.1 %";
    return `${(100 * p).toFixed(p < 0.0995 ? 1 : 0)} %`;
  };
  const mean = (values) => values.reduce((a, b) => a + b, 0) / values.length;
  const code = (c) => `⟨U+${c.codePointAt(0).toString(16).toUpperCase().padStart(4, "0")}⟩`;
  // names control characters, and those that would turn the text around them
  const tame = (s) => s.replace(/[\0-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]/g, code);
  const visible = (s) => tame(s).replaceAll("\n", "↵").replaceAll("\t", "⇥").replace(/[^\S ]/g, code);
  const level = (gain) => {
    const reached = levels.filter((x) => Math.abs(gain) >= x).length;
    return reached === 0 ? "g0" : (gain > 0 ? "g" : "l") + reached;
  };

  // -- figures of the token in place i; its thoughts were written after token i - 1
  const known = (i) => i > 0 && i < last;
  const gain = (i) => data.base_nll[i - 1] - mean(data.mixed_nll[i - 1]);
  const weight = (i) => mean(data.mix_weight[i - 1]);
  const word = (i) => {
    if (i === last) return "what comes next";
    return visible(data.piece[i]).trim() || visible(data.table[data.token[i]]).replaceAll(" ", "·");
  };

  // -- the top of the page
  const figure = (name, value, note, kind = "") =>
    el("div", kind, el("dt", "", name), el("dd", "", el("b", "", value), note));
  const { about } = data;
  const thoughts = `${R} thought${R > 1 ? "s" : ""} of ${about.thought_length} tokens before each token`;
  const drawn = `drawn at temperature ${about.thought_temperature}, seed ${about.seed}`;
  put("about", ` · ${about.model} · ${thoughts}, ${about.thought_temperature ? drawn : "the likeliest"}`);
  put("talk", about.talk_length > 1 ? `up to ${about.talk_length}` : "one");
  put("figures",
    figure("Gain from thinking", signed(summary.gain), "nats per token", summary.gain > 0 ? "first up" : "first"),
    figure("Without thoughts", number(summary.base_nll), "NLL per token"),
    figure("With thoughts", number(summary.mixed_nll), "NLL per token"),
    figure("With other thoughts", number(summary.shuffled_nll), "NLL, thoughts shuffled"),
    figure("Tokens that gain", percent(summary.gaining_share),
      `${percent(summary.losing_share)} lose; ${summary.tokens} tokens`));
  if (silent) {
    const note = document.getElementById("silent");
    note.hidden = false;
    note.append(`This model has not learned to use its thoughts: w is 0 everywhere, so every prediction is the one
      without a thought, and no token has a colour. The bars under a thought show what it would predict alone
      (w = 1): ${number(summary.alone_nll)} nats per token.`);
  }
  put("hardest", ...data.hardest.map((i) => {
    const both = [data.base_nll[i - 1], mean(data.mixed_nll[i - 1])];
    const bar = el("i"); // the rest of the track is the gain or loss
    bar.style.width = `${(100 * Math.min(...both)) / Math.max(...both)}%`;
    const figures = both.map(number).join(" → ");
    const track = el("span", `track ${level(gain(i))}`, bar);
    const label = `${word(i)}, token ${i + 1}: NLL ${figures}. Go there`;
    return button("", label, () => choose(i, true), el("span", "word", word(i)), track, el("small", "", figures));
  }));

  // -- the legend
  const short = (x) => String(x).replace("-", "−").replace("0.", ".");
  const losses = levels.map((x, j) => [`l${j + 1}`, -x]).reverse(); // each step with the border on its right
  const gains = ["g0", ...levels.map((_, j) => `g${j + 1}`)].map((name, j) => [name, levels[j] ?? ""]);
  const scale = [...losses, ...gains].map(([name, x]) => el("li", "", el("i", name), el("em", "", short(x))));
  const weights = [0.1, 0.5, 1, -0.5].map((w) => underline(el("span", "", `w ${short(w)}`), w));
  put("legend", el("div", "scale", el("span", "", "gain, nats"), el("ol", "", ...scale)),
    el("div", "weights", ...weights));

  function underline(element, w) {
    element.style.setProperty("--w", Math.min(Math.abs(w), 1).toFixed(3));
    element.classList.toggle("minus", w < 0);
    return element;
  }

  // -- the text
  const tokens = [];
  const text = document.getElementById("text");
  for (let i = 0; i <= last; i++) {
    const piece = i < last && !data.ends.includes(i) ? data.piece[i] : "";
    // blanks before a word stay outside, without colour
    const blank = piece.trim() ? piece.length - piece.trimStart().length : 0;
    const token = el("span", "t", tame(piece.slice(blank)));
    if (known(i)) token.classList.add(level(gain(i)));
    if (i === last) token.classList.add("next");
    if (data.special.includes(i)) token.classList.add("special");
    if (i > 0) underline(token, weight(i));
    if (!piece.trim()) token.dataset.mark = mark(i, piece);
    token.setAttribute("role", "option");
    token.setAttribute("aria-selected", "false");
    token.setAttribute("aria-label", label(i));
    token.tabIndex = i === 0 ? 0 : -1;
    tokens.push(token);
    text.append(piece.slice(0, blank), token);
    if (data.ends.includes(i)) text.append(el("br"));
  }

  // the mark of a token without visible letters
  function mark(i, piece) {
    if (i === last) return "next";
    if (data.ends.includes(i)) return "¶";
    return piece === "" ? data.table[data.token[i]] : visible(piece).replaceAll(" ", "·");
  }

  function label(i) {
    return known(i) ? `${word(i)}: gain ${signed(gain(i))} nats, w ${number(weight(i))}` : word(i);
  }

  // -- the panel
  const pairs = (flat) => flat.flatMap((id, j) => (j % 2 ? [] : [[id, flat[j + 1]]])); // of a prediction
  const bars = (flat, i, nll, before) => {
    const rows = pairs(flat);
    const target = known(i) ? data.token[i] : -1;
    if (known(i) && !rows.some(([id]) => id === target)) rows.push([target, Math.exp(-nll)]);
    return el("ul", "bars", ...rows.map(([id, p]) => {
      const bar = el("i");
      bar.style.width = `${100 * p}%`;
      const track = el("span", "track", bar);
      const earlier = before && before.get(id);
      if (earlier !== undefined) {
        const tick = el("u");
        tick.style.left = `min(${100 * earlier}%, 100% - 2px)`;
        track.append(tick);
      }
      const name = visible(data.table[id]);
      const blanks = name.length - name.trimStart().length;
      const [kind, sign] = id === target ? ["true", " ✓"] : ["", ""];
      const cell = el("span", "name", el("span", "blank", "·".repeat(blanks)), name.slice(blanks), sign);
      return el("li", kind, cell, track, el("span", "share", percent(p)));
    }));
  };
  const pair = (name, value) => el("div", "", el("dt", "", name), el("dd", "", value));

  function fill(i) {
    const t = i - 1;
    const heading = el("p", "word", el("span", known(i) ? level(gain(i)) : "", word(i)));
    const where = i === last ? "After the text" : `Token ${i + 1} of ${last}`;
    const close = button("close", "Close", leave, "×");
    const found = [el("header", "", el("div", "", el("h2", "", where), heading), close)];
    if (i === 0) {
      found.push(el("p", "context", "Nothing comes before the first token: no thought, no prediction."));
    } else {
      const context = data.piece.slice(Math.max(0, i - 12), i).join("").replace(/\s+/g, " ");
      found.push(el("p", "context", `after “${i > 12 ? "…" : ""}${tame(context.trim())}”`));
      if (known(i)) {
        const mixed = mean(data.mixed_nll[t]);
        found.push(el("dl", "change", pair("NLL", `${number(data.base_nll[t])} → ${number(mixed)}`),
          pair("gain", signed(gain(i))), pair("w", number(weight(i)))));
      }
      const before = new Map(pairs(data.before[t]));
      if (known(i)) before.set(data.token[i], Math.exp(-data.base_nll[t]));
      const title = el("h3", "", "Without a thought", el("span", "key", "✓ the text’s token"));
      found.push(el("div", "view", title, bars(data.before[t], i, data.base_nll[t])));
      for (let r = 0; r < R; r++) found.push(thought(i, r, before));
    }
    put("panel", ...found);
    document.getElementById("panel").scrollTop = 0;
  }

  function thought(i, r, before) {
    const t = i - 1;
    const title = el("h3", "", R > 1 ? `Thought ${r + 1}` : "Thought");
    const facts = [`w ${number(data.mix_weight[t][r])}`];
    let after = 0;
    if (known(i)) {
      const reward = data.reward[t][r];
      title.append(el("span", `reward ${level(reward)}`, `reward ${signed(reward)}`));
      after = (silent ? data.alone_nll : data.mixed_nll)[t][r];
      facts.push(`NLL ${number(data.mixed_nll[t][r])}`, `by the thought alone ${number(data.alone_nll[t][r])}`);
    }
    const said = data.thought[t][r].trim();
    return el("div", "view", title, el("p", "thought", said ? `“${tame(said)}”` : "(a thought without words)"),
      el("p", "small", facts.join(" · ")), bars(data.after[t][r], i, after, before));
  }

  // -- pointing, tapping, keys
  let chosen = null;
  const phone = matchMedia("(max-width: 60rem)").matches;

  function show(i) {
    fill(i);
    tokens.forEach((token, j) => token.setAttribute("aria-selected", String(j === i)));
    document.body.classList.add("open");
  }

  function choose(i, focus) {
    tokens.forEach((token, j) => (token.tabIndex = j === i ? 0 : -1));
    chosen = i;
    show(i);
    if (focus) {
      tokens[i].focus({ preventScroll: true });
      tokens[i].scrollIntoView({ block: "nearest" });
    }
  }

  function leave() {
    const from = chosen;
    chosen = null;
    put("panel", el("h2", "", "Thoughts"),
      el("p", "context", "Choose a token to read what the model thought before it."));
    tokens.forEach((token) => token.setAttribute("aria-selected", "false"));
    document.body.classList.remove("open");
    if (from !== null) tokens[from].focus({ preventScroll: true });
  }

  // the token nearest to i, sideways, in the line above (-1) or below (1)
  function line(i, direction) {
    const at = tokens[i].getClientRects()[0];
    const middle = (at.left + at.right) / 2;
    let best = i, distance = Infinity, row = null;
    for (let j = i + direction; j >= 0 && j <= last; j += direction) {
      const box = tokens[j].getClientRects()[0];
      if (!box || Math.abs(box.top - at.top) < at.height / 2) continue;
      if (row !== null && Math.abs(box.top - row) > at.height / 2) break;
      row = row ?? box.top;
      const away = Math.abs((box.left + box.right) / 2 - middle);
      if (away < distance) [best, distance] = [j, away];
    }
    return best;
  }

  const MOVES = {
    ArrowRight: (i) => Math.min(i + 1, last), ArrowLeft: (i) => Math.max(i - 1, 0),
    ArrowDown: (i) => line(i, 1), ArrowUp: (i) => line(i, -1), Home: () => 0, End: () => last,
    Enter: (i) => i, " ": (i) => i,
  };
  text.addEventListener("keydown", (event) => {
    const i = tokens.indexOf(event.target);
    const move = MOVES[event.key];
    if (i < 0 || !move || event.ctrlKey || event.metaKey || event.altKey) return;
    event.preventDefault();
    choose(move(i), true);
  });
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape") leave();
  });
  text.addEventListener("click", (event) => {
    const i = tokens.indexOf(event.target);
    if (i >= 0) choose(i, true);
  });
  text.addEventListener("pointerover", (event) => {
    const i = tokens.indexOf(event.target);
    if (i >= 0 && event.pointerType === "mouse") show(i);
  });
  text.addEventListener("pointerleave", (event) => {
    if (event.pointerType === "mouse" && chosen !== null) show(chosen);
  });

  // at first the token that gained most, or, if none did, the hardest; on a phone the text has the whole page
  leave();
  if (!phone) {
    let best = 1;
    for (let i = 2; i < last; i++) if (gain(i) > gain(best)) best = i;
    choose(level(gain(best)) === "g0" ? data.hardest[0] : best, false);
  }
})();
