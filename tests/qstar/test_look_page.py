"""The page of `qstar look` in a real browser: on a desk with a mouse and a keyboard, on a small phone, in the
dark and on paper."""

import json
import re
import struct

import pytest
import torch
from browser import DESKTOP, SMALL_PHONE, Browser, find_browser
from look_picture import draw
from tiny_models import thinking_model
from tiny_tokenizer import tiny_tokenizer

from qstar.look.page import LEVELS, page
from qstar.look.thoughts import look

pytestmark = pytest.mark.slow
TEXT = (
    "<script>console.error('run')</script><b onclick=1>“we” meet</b> 😀 & \"x\"\n\n\tthe people\n"
    f"{'long' * 60} the roads, the farms and the schools. "
)
TURNING = "a\u202eb\x07 c\u2028d"
SELECTED = "[aria-selected=true]"
TOKENS = "[...document.querySelectorAll('.t')]"


@pytest.fixture(scope="module")
def found():
    """(figures, tokenizer) of a text with markup, half characters and a word without end."""
    tokenizer = tiny_tokenizer()
    model = thinking_model(base={"vocab_size": len(tokenizer), "max_position_embeddings": 512})
    return look(model, tokenizer(TEXT)["input_ids"], None, torch.Generator().manual_seed(0)), tokenizer


@pytest.fixture(scope="module")
def path(found, tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "look.html"
    path.write_text(page(*found, {"model": "tiny", "seed": 0}), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def desk_browser(tmp_path_factory):
    with Browser(tmp_path_factory.mktemp("browser"), DESKTOP) as browser:
        yield browser


@pytest.fixture(scope="module")
def phone_browser(tmp_path_factory):
    with Browser(tmp_path_factory.mktemp("browser"), SMALL_PHONE) as browser:
        yield browser


def at_the_page(browser, path):
    browser.colours(dark=False)
    browser.open(path)
    return browser


@pytest.fixture
def desk(desk_browser, path):
    return at_the_page(desk_browser, path)


@pytest.fixture
def phone(phone_browser, path):
    return at_the_page(phone_browser, path)


def panel(browser):
    return browser.run("return document.getElementById('panel').innerText")


def chosen(browser):
    """The places of the selected tokens."""
    return browser.run(f"return {TOKENS}.flatMap((x, i) => x.matches('{SELECTED}') ? [i] : [])")


def active(browser):
    """The place of the token that has the focus, or -1."""
    return browser.run(f"return {TOKENS}.indexOf(document.activeElement)")


def token(i):
    return f".t:nth-of-type({i + 1})"


def shows(browser, found, i):
    """Whether the panel tells of the thoughts before token i, and the text marks it."""
    look, tokenizer = found
    text = panel(browser)
    said = [tokenizer.decode(x).strip() for x in look.thought[i - 1].tolist()]
    rewards = [f"{x:.3f}" if abs(x) < 0.0995 else f"{x:.2f}" for x in look.reward[i - 1].abs().tolist()]
    heading = f"Token {i + 1} of {len(look.token)}"
    wanted = [
        heading,
        *(x for thought in said for x in re.split(r"[\x00-\x1f\x7f-\x9f\s]", thought)),
        *rewards,
    ]
    return chosen(browser) == [i] and all(x in text for x in wanted)


def test_nothing_is_run_refused_or_fetched(desk, path, found):
    assert desk.run("return document.title") == "qstar look"
    desk.run("document.querySelectorAll('#hardest button').forEach(x => x.click())")
    desk.key("ArrowRight")
    assert desk.requests() == [path.as_uri()]
    assert desk.run("return performance.getEntriesByType('resource').length") == 0
    assert desk.console() == []
    assert desk.run("return document.querySelectorAll('script').length") == 2
    assert desk.run("return document.querySelectorAll('img, link, iframe, #text b').length") == 0


def test_what_the_policy_forbids_would_be_seen(desk):
    desk.run("const x = document.createElement('script'); x.textContent = '1'; document.body.append(x)")
    desk.run("document.body.setAttribute('style', 'color: red')")
    desk.run("const x = new Image(); x.src = 'https://example.org/x.png'; document.body.append(x)")
    told = desk.console()
    assert len(told) == 3 and all("Content Security Policy" in line for line in told)


def test_the_text_is_shown_as_it_is_with_its_colours_and_underlines(desk, found):
    look, _ = found
    assert desk.run("return document.getElementById('text').textContent") == TEXT
    count = desk.run(f"return {TOKENS}.length")
    assert count == len(look.token) + 1
    for i, gain in enumerate(look.gain.tolist(), 1):
        if i % 17 == 0:
            reached = sum(abs(gain) >= level for level in LEVELS)
            name = f"{'g' if gain > 0 else 'l'}{reached}" if reached else "g0"
            kinds = desk.run(f"return [...{TOKENS}[{i}].classList]")
            assert name in kinds
            w = float(look.mix_weight[i - 1].mean())
            assert ("minus" in kinds) == (w < 0)
            style = f"getComputedStyle({TOKENS}[{i}])"
            width, line = desk.run(f"return [{style}.borderBottomWidth, {style}.borderBottomStyle]")
            assert abs(float(width.removesuffix("px")) - 4 * min(abs(w), 1)) <= 1
            assert line == ("dashed" if w < 0 else "solid")
    assert len(desk.run(f"return [...new Set({TOKENS}.map(x => getComputedStyle(x).backgroundColor))]")) > 4
    marks = desk.run(f"return {TOKENS}.filter(x => !x.textContent).map(x => x.dataset.mark)")
    assert "⟨F0⟩" in marks and marks[-1] == "next"  # 😀 takes four tokens


def test_control_characters_are_named_and_do_not_turn_the_text(desk_browser, tmp_path):
    tokenizer = tiny_tokenizer()
    model = thinking_model(base={"vocab_size": len(tokenizer)})
    document = page(look(model, tokenizer(TURNING)["input_ids"]), tokenizer, {"model": "tiny", "seed": 0})
    (tmp_path / "look.html").write_text(document, encoding="utf-8")
    desk_browser.open(tmp_path / "look.html")
    assert desk_browser.run("return document.getElementById('text').textContent") == (
        "a⟨U+202E⟩b⟨U+0007⟩ c\u2028d"
    )


def test_the_means_of_all_tokens_stand_on_top(desk, found):
    means = found[0].summary()
    told = desk.run("return document.getElementById('figures').innerText")
    for name in ("base_nll", "mixed_nll", "shuffled_nll"):
        assert f"{means[name]:.2f}" in told
    gain = desk.run("return document.querySelector('#figures b').textContent")
    assert (
        gain.replace("−", "-").replace("+", "")
        == f"{means['gain']:.{3 if abs(means['gain']) < 0.0995 else 2}f}"
    )


def test_at_first_the_token_that_gained_most_is_shown(desk, found):
    assert shows(desk, found, int(found[0].gain.argmax()) + 1)


def test_a_mouse_shows_what_it_points_at_and_keeps_what_it_clicks(desk, found):
    desk.run("document.querySelector('#text').scrollIntoView()")
    desk.point(token(5))
    assert shows(desk, found, 5)
    desk.point(token(9), click=True)
    assert shows(desk, found, 9) and active(desk) == 9
    desk.point(token(12))
    assert shows(desk, found, 12)
    desk.point("#legend")
    assert shows(desk, found, 9)


def test_the_keyboard_alone_reaches_everything(desk, found):
    last = len(found[0].token)
    order = []
    for _ in range(30):
        desk.key("Tab")
        order.append(desk.run("const x = document.activeElement; return x.className || x.id || x.tagName"))
        if order[-1] == "SUMMARY":
            break
    hardest = len(desk.run("return [...document.querySelectorAll('#hardest button')].map(x => 0)"))
    assert order[:hardest] == ["BUTTON"] * hardest
    assert order[hardest].split()[0] == "t" and order[hardest + 1 :] == ["panel", "close", "SUMMARY"]
    desk.run(f"{TOKENS}[{chosen(desk)[0]}].focus()")
    desk.key("Home")
    assert chosen(desk) == [0] and "Nothing comes before the first token" in panel(desk)
    desk.key("ArrowRight")
    desk.key("ArrowRight")
    assert shows(desk, found, 2) and active(desk) == 2
    ring = f"const x = getComputedStyle({TOKENS}[2]); return [x.outlineStyle, parseFloat(x.outlineWidth)]"
    style, width = desk.run(ring)
    assert style == "solid" and width >= 2
    desk.key("ArrowLeft")
    assert shows(desk, found, 1)
    tops = f"{TOKENS}.map(x => x.offsetTop)"
    desk.key("ArrowDown")
    below = chosen(desk)[0]
    first, second = desk.run(f"return [{tops}[1], {tops}[{below}]]")
    assert second > first + 10 and shows(desk, found, below)
    desk.key("ArrowUp")
    assert abs(desk.run(f"return {tops}[{chosen(desk)[0]}]") - first) < 10
    desk.key("End")
    assert chosen(desk) == [last] and "AFTER THE TEXT" in panel(desk).upper()
    desk.key("ArrowRight")
    assert chosen(desk) == [last]
    desk.key("Escape")
    assert chosen(desk) == [] and "Choose a token" in panel(desk) and active(desk) == last
    desk.key("Enter")
    assert chosen(desk) == [last]


def test_a_hardest_token_leads_to_its_place(desk, found):
    hardest = int(found[0].base_nll.argmax()) + 1
    desk.point("#hardest button", click=True)
    assert shows(desk, found, hardest) and active(desk) == hardest
    box = f"{TOKENS}[{hardest}].getBoundingClientRect()"
    assert desk.run(f"return {box}.top >= 0 && {box}.bottom <= innerHeight")


def test_the_bars_are_the_predictions_before_and_after(desk, found):
    look, _ = found
    i = int(look.gain.argmax()) + 1
    rows = (
        "[...document.querySelectorAll('.bars')].map(x => [...x.children].map(y => y.innerText.split('\\n')))"
    )
    before, *after = desk.run(f"return {rows}")
    assert len(after) == 2

    def percent(p):
        return "<0.1 %" if p < 0.001 else f"{100 * p:.{1 if p < 0.0995 else 0}f} %"

    assert [row[-1] for row in before[:4]] == [percent(p) for p in look.before[0][i - 1].tolist()]
    for r in range(2):
        assert [row[-1] for row in after[r][:4]] == [percent(p) for p in look.after[0][i - 1, r].tolist()]
    for told, nll in zip((before, *after), (look.base_nll[i - 1], *look.mixed_nll[i - 1])):
        (true,) = [row for row in told if row[0].endswith("✓")]
        assert true[-1] == percent(float((-nll).exp()))
    widths = (
        "[...document.querySelectorAll('.bars .track i')].map(x => x.offsetWidth / x.parentNode.offsetWidth)"
    )
    top = float(look.before[0][i - 1, 0])
    assert abs(desk.run(f"return {widths}")[0] - top) < 0.02


def test_everything_has_a_name_for_a_screen_reader(desk, found):
    nodes = desk.command("Accessibility.getFullAXTree")["nodes"]
    named = {}
    for node in nodes:
        named.setdefault(node.get("role", {}).get("value"), []).append(node.get("name", {}).get("value"))
    assert len(named["option"]) == len(found[0].token) + 1
    assert all(re.search(r": gain [+−]?[\d.]+ nats, w −?[\d.]+$", name) for name in named["option"][1:-1])
    assert all(named["button"]) and named["listbox"] == ["The text, token by token"]
    assert "Thoughts before the token" in named["region"]


LUMINANCE = """
const light = (colour) => {
  const canvas = new OffscreenCanvas(1, 1).getContext('2d');
  canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1);
  return [...canvas.getImageData(0, 0, 1, 1).data].slice(0, 3).map(x => x / 255)
    .map(x => x <= .04045 ? x / 12.92 : ((x + .055) / 1.055) ** 2.4)
    .reduce((sum, x, i) => sum + x * [.2126, .7152, .0722][i], 0);
};
const ratio = (a, b) => (Math.max(light(a), light(b)) + .05) / (Math.min(light(a), light(b)) + .05);
const value = (name) => getComputedStyle(document.documentElement).getPropertyValue('--' + name).trim();
"""


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_letters_stand_out_from_every_ground(desk, dark):
    desk.colours(dark)
    pairs = [
        ("ink", ground)
        for ground in ("paper", "card", "track", *(f"{s}{i}" for s in "gl" for i in (1, 2, 3, 4)))
    ]
    pairs += [(ink, ground) for ink in ("soft", "accent") for ground in ("paper", "card")]
    ratios = desk.run(f"{LUMINANCE} return {json.dumps(pairs)}.map(([a, b]) => ratio(value(a), value(b)))")
    assert len(ratios) == len(pairs)
    assert min(zip(ratios, pairs))[0] >= 4.5, min(zip(ratios, pairs))
    shown = desk.run(
        f"{LUMINANCE} return {TOKENS}.map(x => getComputedStyle(x)).map(x => [x.color, x.backgroundColor])"
        ".filter(x => !x[1].endsWith(', 0)')).map(x => ratio(...x))"
    )
    assert shown and min(shown) >= 4.5
    paper = desk.run(f"{LUMINANCE} return light(getComputedStyle(document.body).backgroundColor)")
    assert (paper < 0.1) == dark


@pytest.mark.parametrize("screen", ["desk", "phone"])
def test_on_paper_all_is_there_in_its_colours_with_the_chosen_thoughts(request, screen, found):
    browser = request.getfixturevalue(screen)
    browser.colours(dark=True)
    browser.run(f"{TOKENS}[5].click()")
    browser.command("Emulation.setEmulatedMedia", media="print")
    try:
        style = "return getComputedStyle(document.querySelector('{}')).{}"
        assert browser.run(style.format("#panel", "position")) == "static"
        assert browser.run(style.format("#panel .close", "display")) == "none"
        assert browser.run(style.format(".t", "printColorAdjust")) == "exact"
        assert browser.run(style.format("body", "color")) == "rgb(26, 29, 33)"  # dark letters on white
        assert shows(browser, found, 5)
        cut = "filter(x => x.scrollWidth > x.clientWidth + 1 || x.scrollHeight > x.clientHeight + 1)"
        assert browser.run(f"return [...document.querySelectorAll('#hardest, #panel')].{cut}.length") == 0
    finally:
        browser.command("Emulation.setEmulatedMedia", media="")


# -- on a phone


def test_a_phone_scrolls_in_one_direction_only(phone):
    assert phone.run("return innerWidth") == SMALL_PHONE["width"]
    assert phone.run("return document.documentElement.scrollWidth") == SMALL_PHONE["width"]
    assert phone.run("scrollTo(500, 0); return scrollX") == 0
    outside = f"{TOKENS}.filter(x => x.getBoundingClientRect().right > innerWidth).length"
    assert phone.run(f"return {outside}") == 0


def test_a_tap_opens_the_thoughts_beside_the_token_and_a_button_closes_them(phone, found):
    sheet = "return getComputedStyle(document.getElementById('panel')).display"
    assert phone.run(sheet) == "none"
    phone.run(
        f"scrollBy(0, {TOKENS}[40].getBoundingClientRect().bottom - innerHeight + 40)"
    )  # low on the screen
    phone.tap(token(40))
    assert phone.run(sheet) == "block" and shows(phone, found, 40)
    apart = (
        f"return [{TOKENS}[40].getBoundingClientRect().bottom,"
        " document.getElementById('panel').getBoundingClientRect().top, innerHeight]"
    )
    bottom, top, height = phone.run(apart)
    assert 0 < bottom <= top and top >= 0.4 * height
    assert phone.run("return document.documentElement.scrollWidth") == SMALL_PHONE["width"]
    small = (
        "[...document.querySelectorAll('button')].filter(x => x.getBoundingClientRect().height < 32).length"
    )
    assert phone.run(f"return {small}") == 0
    phone.tap("#panel .close")
    assert phone.run(sheet) == "none" and chosen(phone) == []


def test_the_hardest_tokens_can_be_tapped_too(phone, found):
    phone.tap("#hardest button")
    assert shows(phone, found, int(found[0].base_nll.argmax()) + 1)
    assert phone.console() == []


def test_a_model_that_has_not_learned_to_think_says_so(phone_browser, tmp_path):
    tokenizer = tiny_tokenizer()
    model = thinking_model(mix=0, base={"vocab_size": len(tokenizer)})
    found = look(model, tokenizer("the people of the union")["input_ids"])
    (tmp_path / "look.html").write_text(page(found, tokenizer, {"model": "m", "seed": 0}), encoding="utf-8")
    phone_browser.open(tmp_path / "look.html")
    told = phone_browser.run("return document.getElementById('silent').innerText")
    assert "w is 0 everywhere" in told and f"{found.summary()['alone_nll']:.2f} nats" in told
    assert phone_browser.run("return document.querySelector('#figures b').textContent") == "0"
    assert phone_browser.console() == []


def test_the_picture_of_the_docs_can_be_drawn(tmp_path):
    find_browser()
    tokenizer = tiny_tokenizer()
    model = thinking_model(base={"vocab_size": len(tokenizer), "max_position_embeddings": 1024})
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    draw(str(tmp_path / "model"), tmp_path / "look.png")
    head = (tmp_path / "look.png").read_bytes()[:24]
    assert head[:8] == b"\x89PNG\r\n\x1a\n" and struct.unpack(">II", head[16:]) == (1800, 1650)
