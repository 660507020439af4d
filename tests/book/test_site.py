"""A study on little data and the site built from it, as a browser sees it from disk and without a network."""

import csv
import functools
import importlib.resources
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import zipfile
from contextlib import contextmanager
from html.parser import HTMLParser
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import nbformat
import pytest
from conftest import ROOT, SCRATCH, build_site, children, is_alive, wait_until

from cemb.report import export, quality, select, speed

ARGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
PHONE = {"width": 390, "height": 844}
THEMES = ("light", "dark")

# What one look at a rendered page finds wrong; every list is empty on a good page.
LOOK = """async (theme) => {
  const name = (e) => e.tagName.toLowerCase() + (e.id ? '#' + e.id : '')
    + [...e.classList].map((c) => '.' + c).join('');
  const found = {theme: [], images: [], wide: [], math: [], faint: []};
  const root = document.documentElement;
  if (root.dataset.theme !== theme) found.theme.push(root.dataset.theme);

  for (const i of document.images)
    if (!i.complete || !i.naturalWidth) found.images.push(i.getAttribute('src'));

  const sources = document.querySelectorAll('.math').length;
  if (sources) {
    if (window.MathJax?.startup) await MathJax.startup.promise;
    const set = document.querySelectorAll('.math mjx-container').length;
    if (set < sources) found.math.push(`${set} of ${sources} formulas typeset`);
    for (const e of document.querySelectorAll('[data-mjx-error]'))
      found.math.push(e.getAttribute('data-mjx-error'));
  }

  // Opened, because what is folded away can be too wide as well.
  for (const d of document.querySelectorAll('main details')) d.open = true;
  const width = root.clientWidth;
  if (root.scrollWidth > width) found.wide.push(`page ${root.scrollWidth} > ${width}`);
  const held = (e) => {
    for (let p = e.parentElement; p && p !== document.body; p = p.parentElement)
      if (getComputedStyle(p).overflowX !== 'visible'
          && p.getBoundingClientRect().right <= width + 1 && p.tagName !== 'MAIN') return true;
    return false;
  };
  for (const e of document.querySelectorAll('article *')) {
    const box = e.getBoundingClientRect();
    if (box.width > 1 && box.right > width + 1 && !held(e))
      found.wide.push(`${name(e)} ends at ${Math.round(box.right)}`);
  }

  const rgba = (css) => {
    const n = css.match(/[\\d.]+/g).map(Number);
    return n.length < 4 ? [...n, 1] : n;
  };
  const over = (top, low) => low.map((v, i) => (i < 3 ? top[i] * top[3] + v * (1 - top[3]) : 1));
  const behind = (e) => {
    const layers = [];
    for (let p = e; p; p = p.parentElement) layers.push(rgba(getComputedStyle(p).backgroundColor));
    return layers.reverse().reduce((low, top) => over(top, low), [255, 255, 255, 1]);
  };
  const luminance = (c) => {
    const [r, g, b] = c.slice(0, 3).map((v) => v / 255)
      .map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const texts = '.cell_output :is(th, td, caption, pre), article table :is(th, td)';
  for (const e of document.querySelectorAll(texts)) {
    const ground = behind(e);
    const a = luminance(ground);
    const b = luminance(over(rgba(getComputedStyle(e).color), ground));
    const contrast = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    if (e.textContent.trim() && contrast < 4.5)
      found.faint.push(`${name(e)} contrast ${contrast.toFixed(1)}`);
    if (theme === 'dark' && a > 0.4) found.faint.push(`${name(e)} on a pale box`);
  }
  return found;
}"""


class Page(HTMLParser):
    """The parts of an HTML file that other files can depend on."""

    def __init__(self, path):
        super().__init__()
        self.path, self.ids, self.links, self.images = path, set(), [], []
        self.title, self.has_math, self._in_title = "", False, False
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.ids.update(v for k in ("id", "name") if (v := attrs.get(k)))
        self.links += [v for k in ("href", "src") if (v := attrs.get(k))]
        self.has_math |= "math" in (attrs.get("class") or "").split()
        self._in_title |= tag == "title" and not self.title
        if tag == "img":
            self.images.append((attrs.get("src") or "", attrs.get("alt") or ""))

    def handle_data(self, data):
        if self._in_title:
            self.title += data

    def handle_endtag(self, tag):
        if tag == "title":
            self._in_title = False


# Jupyter Book for tests of what is around it: it writes a page, and ends as it is told to, or not at all.
JUPYTER_BOOK = """#!/bin/sh
mkdir -p "$6/_build/html"
echo new > "$6/_build/html/index.html"
[ "$STATUS" ] || exec sleep 99
exit "$STATUS"
"""


BUILD = """
import sys
from pathlib import Path

sys.path.insert(0, "book")
sys.executable, site = sys.argv[1:]
import build

build.stage = lambda runs, found, source: source.mkdir(parents=True)
sys.exit(build.processes.supervised(lambda: build.build_html([], [], Path(site))))
"""


@pytest.fixture
def building(tmp_path, started):
    """Starts book/build.py on a site there is already, with `JUPYTER_BOOK` and nothing to stage."""
    (tmp_path / "jupyter-book").write_text(JUPYTER_BOOK)
    (tmp_path / "jupyter-book").chmod(0o755)
    site = tmp_path / "site"
    for folder in ("_build/html", "new"):
        (site / folder).mkdir(parents=True)
    (site / "_build" / "html" / "index.html").write_text("before\n")

    def start(status=""):
        return started("-c", BUILD, tmp_path / "python", site, env={**os.environ, "STATUS": status})

    return start, site


@pytest.mark.parametrize(("status", "text"), [(1, "before\n"), (0, "new\n")])
def test_a_site_is_replaced_by_one_that_is_whole(building, status, text):
    start, site = building
    assert start(str(status)).wait() == status
    assert (site / "_build" / "html" / "index.html").read_text() == text


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_build_that_is_stopped_leaves_the_site_there_is_and_no_process(building, number):
    start, site = building
    process = start()
    wait_until(lambda: list((site / "new").glob("_build/html/index.html")))
    found = children(process.pid)
    assert found
    process.send_signal(number)
    is_killed = number == signal.SIGKILL
    assert process.wait(60) == (-number if is_killed else 128 + number)
    said = "" if is_killed else f"cemb: stopped by {number.name}\n"
    assert process.stderr.read() == said
    wait_until(lambda: not any(map(is_alive, found)), 3)
    assert (site / "_build" / "html" / "index.html").read_text() == "before\n"


def test_smoke_records(smoke, monkeypatch):
    for name in ("CEMB_RESULTS", "CEMB_GRID", "CORPUS"):
        monkeypatch.setenv(name, smoke[name])
    monkeypatch.chdir(ROOT)
    found = select.load()
    kinds = [record["kind"] for record in found]
    assert {kind: kinds.count(kind) for kind in kinds} == {
        "pmi": 1,
        "limits": 1,
        "quality": 16,
        "speed": 38,
        "frontier": 21,
    }
    table = speed.beside_original(found)
    assert len(table) == 9
    assert quality.quality_table(found, "full-batch").shape[0] == 10
    assert list(quality.mini_batch_table(found).table) == ["full table", "hybrid"]
    # A vocabulary of its own, and the whole.
    assert list(quality.growth_table(found)["hashed, gap"] != "") == [True, True]
    assert sorted(r["num_embeddings"] for r in speed.growth_records(found)) == [1000] * 3 + [10**9] * 2
    for record in found:
        assert record["git_commit"] is None or len(record["git_commit"]) == 40
    with pytest.raises(LookupError, match=r"0 records have .*'table': 'robe'"):
        select.pick(found, table="robe")
    rows = list(csv.DictReader(io.StringIO(export.csv_text(found, "quality"))))
    assert len(rows) == 16
    trained = next(row for row in rows if row["training"] == "full-batch")
    assert json.loads(trained["history"])[0]["step"] == 0


def test_executed_notebooks_hold_no_error_and_no_path_of_this_machine(smoke):
    pages = list((SCRATCH / "results" / "local" / "runs").glob("*/run.ipynb"))
    assert len(pages) >= 23
    for page in pages:
        notebook = nbformat.read(page, as_version=4)
        for cell in notebook.cells:
            for output in cell.get("outputs", []):
                assert output.output_type != "error"
                assert output.get("name") != "stderr", output
            assert str(ROOT) not in json.dumps(cell)


@pytest.fixture(scope="session")
def pages(site):
    # Files under _static are the theme's templates, not pages.
    files = [p for p in sorted(site.rglob("*.html")) if "_static" not in p.relative_to(site).parts]
    return {p.relative_to(site).as_posix(): Page(p) for p in files}


def few_pages(pages):
    """All but the pages of runs, and of these one for each notebook."""
    runs = {Path(name).name.partition("-")[0]: name for name in pages if name.startswith("runs/")}
    return [*(name for name in pages if "/" not in name), *runs.values()]


@pytest.fixture(scope="session")
def browser():
    sync_api = pytest.importorskip("playwright.sync_api")
    names = ("chromium", "chromium-browser", "google-chrome")
    with sync_api.sync_playwright() as p:
        found = [os.environ.get("CHROMIUM"), *map(shutil.which, names), p.chromium.executable_path]
        path = next((f for f in found if f and Path(f).is_file()), None)
        if path is None:
            # Continuous integration installs one, so there its absence is a failure.
            (pytest.fail if os.environ.get("CI") else pytest.skip)(
                "no chromium found; install one or set CHROMIUM to its path"
            )
        browser = p.chromium.launch(executable_path=path, args=ARGS)
        yield browser
        browser.close()


@pytest.fixture(scope="session")
def findings(browser, site, pages):
    """Everything wrong on every page in both themes, by kind; one visit serves all tests below."""
    found = {}
    for theme in THEMES:
        context = browser.new_context(viewport=PHONE, color_scheme=theme)
        context.add_init_script(
            f"localStorage.setItem('mode', '{theme}'); localStorage.setItem('theme', '{theme}');"
        )
        tab = context.new_page()
        visit = {}

        def note(kind, what, visit=visit):
            found.setdefault(kind, []).append(f"{visit['page']}: {what}")

        def on_request(request):
            if urlsplit(request.url).scheme not in ("file", "data"):
                note("requests", request.url)

        tab.on("request", on_request)
        tab.on("requestfailed", lambda r: note("failed", r.url))
        tab.on("pageerror", lambda e: note("errors", e))
        tab.on("console", lambda m: note("errors", m.text) if m.type == "error" else None)
        # Pages of runs are alike; in the dark one of each notebook will do.
        for name in pages if theme == "light" else few_pages(pages):
            visit["page"] = f"{name} ({theme})"
            tab.goto((site / name).as_uri(), wait_until="load")
            for kind, items in tab.evaluate(LOOK, theme).items():
                for item in items:
                    note(kind, item)
        context.close()
    return found


@pytest.mark.parametrize("kind", ["requests", "failed", "errors", "theme", "images", "wide", "math", "faint"])
def test_page_is_clean(findings, kind):
    problems = findings.get(kind, [])
    assert not problems, "\n".join([f"{len(problems)} problems", *problems[:20]])


def test_some_page_has_math(pages):
    assert any(page.has_math for page in pages.values())


def test_titles_are_distinct(pages):
    titles = {}
    for name, page in pages.items():
        titles.setdefault(page.title.strip(), []).append(name)
    assert "" not in titles, titles.get("")
    assert not {title: names for title, names in titles.items() if len(names) > 1}


def test_figures_are_drawings(pages):
    figures = {src for page in pages.values() for src, alt in page.images if "_images/" in src}
    assert len(figures) > 10
    assert {Path(src).suffix for src in figures} == {".svg"}


def test_images_have_alt_text(pages):
    # Sphinx falls back to the file's path, which tells a listener nothing.
    bad = [
        f"{name}: {src}"
        for name, page in pages.items()
        for src, alt in page.images
        if not alt.strip() or Path(src).name in alt or "_images/" in alt
    ]
    assert not bad, "\n".join(bad)


def test_internal_links_resolve(site, pages):
    broken = []
    for name, page in pages.items():
        for link in page.links:
            url = urlsplit(link)
            if url.scheme or url.netloc:
                continue
            path = unquote(url.path)
            target = (page.path.parent / path).resolve() if path else page.path
            if path.startswith("/") or not target.is_file() or not target.is_relative_to(site):
                broken.append(f"{name}: {link} (no such file)")
            elif (fragment := unquote(url.fragment)) and target.suffix == ".html":
                other = pages.get(target.relative_to(site).as_posix())
                if other is None or fragment not in other.ids:
                    broken.append(f"{name}: {link} (no such place)")
    assert not broken, "\n".join(broken)


@pytest.mark.parametrize("name", ["index", "data", "speed", "rivals", "quality", "frontier"])
def test_measured_numbers_link_to_what_they_come_from(site, pages, name):
    targets = {link for link in pages[f"{name}.html"].links if "#provenance-" in link}
    assert targets
    for target in targets:
        path, _, place = target.partition("#")
        assert path.startswith("runs/")
        text = (site / path).read_text(encoding="utf-8")
        end = text[text.index(f'id="{place}"') :]
        plain = " ".join(re.sub(r"<[^>]*>", "", end).split())
        for wanted in ("python -m cemb ", "commit", "machine", "versions", "measured"):
            assert wanted in plain, (target, wanted)
        if "runs/speed-" in path:
            assert re.search(r"Every repeat, in order of measurement: .*\d ms", plain), target


@pytest.mark.long
def test_two_builds_are_the_same_bytes(site, smoke, tmp_path):
    again = build_site(smoke, tmp_path)
    files = {path.relative_to(site) for path in site.rglob("*") if path.is_file()}
    assert files == {path.relative_to(again) for path in again.rglob("*") if path.is_file()}
    assert not sorted(path for path in files if (site / path).read_bytes() != (again / path).read_bytes())


class QuietHandler(SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


@contextmanager
def served(folder):
    handler = functools.partial(QuietHandler, directory=str(folder))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


def test_search_finds_adagrad(browser, site):
    # Over HTTP, because a page opened from disk may not read the others for its snippets.
    with served(site) as url:
        tab = browser.new_page(viewport=PHONE)
        try:
            tab.goto(f"{url}/search.html?q=Adagrad")
            # Classes of that name are hits without a snippet.
            hit = tab.locator("#search-results ul.search li:has(.context)", has_text="Adagrad").first
            hit.wait_for(timeout=10_000)
            tab.goto(f"{url}/" + hit.locator("a").first.get_attribute("href"))
            assert "Adagrad" in tab.locator("article").inner_text()
        finally:
            tab.close()


@pytest.fixture
def explorer(browser, site):
    tab = browser.new_page(viewport={"width": 1200, "height": 900})
    tab.goto((site / "explore.html").as_uri())
    yield tab
    tab.close()


def _speed_rows(site):
    (path,) = site.rglob("speed.csv")
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_the_explorers_filters_change_plot_and_table(explorer, site):
    rows = _speed_rows(site)
    points, lines = explorer.locator(".plot .point"), explorer.locator(".listing tbody tr")
    assert points.count() == lines.count() == len(rows)
    hashed = [row for row in rows if row["table"] == "hashed"]
    explorer.get_by_label("table", exact=True).select_option("=hashed")
    assert points.count() == lines.count() == len(hashed) < len(rows)
    assert explorer.locator(".count").inner_text() == f"{len(hashed)} of {len(rows)} records"
    before = points.first.get_attribute("d")
    explorer.get_by_label("up", exact=True).select_option("forward_ms")
    assert points.first.get_attribute("d") != before
    before = points.first.get_attribute("d")
    explorer.get_by_label("log up").uncheck()
    assert points.first.get_attribute("d") != before
    explorer.get_by_label("search the records").fill("no record has this")
    assert points.count() == lines.count() == 0


def test_the_explorer_shows_a_whole_record_and_leads_to_its_run(explorer, site):
    # The one drawn last, because it lies above those of the same figures.
    explorer.locator(".plot .point").last.hover()
    record = explorer.locator(".record")
    for name in ("total_ms", "git_commit", "device_name"):
        assert record.get_by_text(name, exact=True).count() == 1
    run = record.locator("a").inner_text()
    assert run in {row["run"] for row in _speed_rows(site)}
    explorer.locator(".plot .point").last.click()
    assert Path(unquote(urlsplit(explorer.url).path)) == site / "runs" / f"{run}.html"
    assert (site / "runs" / f"{run}.html").is_file()


def test_the_explorers_table_sorts(explorer):
    def column():
        place = 1 + [*explorer.locator(".listing th").all_inner_texts()].index(
            next(t for t in explorer.locator(".listing th").all_inner_texts() if t.startswith("total_ms"))
        )
        texts = explorer.locator(f".listing tbody td:nth-child({place})").all_inner_texts()
        return [float(text.replace(",", "")) for text in texts]

    header = explorer.locator('.listing th[data-column="total_ms"]')
    header.locator("button").click()
    assert header.get_attribute("aria-sort") == "ascending"
    assert column() == sorted(column())
    header.locator("button").press("Enter")
    assert header.get_attribute("aria-sort") == "descending"
    assert column() == sorted(column(), reverse=True)


@pytest.mark.parametrize("kind", ["speed", "quality", "frontier"])
def test_the_explorer_downloads_the_records(explorer, site, kind):
    explorer.get_by_label("records of").select_option(kind)
    with explorer.expect_download() as download:
        explorer.get_by_role("button", name="Download these as CSV").click()
    (path,) = site.rglob(f"{kind}.csv")
    assert Path(download.value.path()).read_bytes() == path.read_bytes()


def test_the_explorers_files_are_loaded_by_its_page_alone(site, pages):
    users = {name for name, page in pages.items() if any("explorer.js" in link for link in page.links)}
    assert users == {"explore.html"}


# What the theme itself brings on every page; anything else that axe-core calls serious or critical fails.
THEMES_OWN = {
    "summary-name",  # the arrow that opens a chapter's list in the sidebar has no name
    "aria-required-children",  # citations are a list whose entries are not marked as such
}


@pytest.mark.parametrize("theme", THEMES)
def test_nothing_keeps_readers_out(browser, site, pages, theme):
    axe = importlib.resources.files("axe_playwright_python") / "axe.min.js"
    context = browser.new_context(viewport={"width": 1200, "height": 900}, color_scheme=theme)
    context.add_init_script(
        f"localStorage.setItem('mode', '{theme}'); localStorage.setItem('theme', '{theme}');"
    )
    tab = context.new_page()
    # Themes differ in colours alone, and each colour is on some of these pages.
    rules = "" if theme == "light" else ", runOnly: ['color-contrast']"
    found = []
    chapters = sorted(name for name in pages if "/" not in name)
    if theme == "dark":
        chapters = ["index.html", "speed.html", "explore.html", "use.html"]
    for name in (*chapters, next(name for name in pages if name.startswith("runs/speed-"))):
        tab.goto((site / name).as_uri(), wait_until="load")
        tab.evaluate(axe.read_text(encoding="utf-8"))
        # Entries of the API are made alike, and axe's time grows with the square of their number.
        tab.evaluate("() => [...document.querySelectorAll('dl.py')].slice(30).forEach((e) => e.remove())")
        result = tab.evaluate(f"() => axe.run(document, {{resultTypes: ['violations']{rules}}})")
        found += [
            f"{name}: {violation['id']} ({violation['impact']}), {node['target']}: {node['html'][:120]}"
            for violation in result["violations"]
            if violation["impact"] in ("serious", "critical") and violation["id"] not in THEMES_OWN
            for node in violation["nodes"]
        ]
    context.close()
    assert not found, "\n".join([f"{len(found)} problems", *found[:40]])


def test_the_site_packs_into_one_file(site, smoke):
    build = site.parent.parent
    command = [sys.executable, "book/build.py", "--build-dir", str(build), "--archive"]
    subprocess.run(command, cwd=ROOT, env=smoke, check=True)
    (archive,) = build.glob("*.zip")
    with zipfile.ZipFile(archive) as packed:
        inside = {name.partition("/")[2]: packed.read(name) for name in packed.namelist()}
    files = {path.relative_to(site).as_posix(): path for path in site.rglob("*") if path.is_file()}
    assert set(inside) == set(files)
    assert all(data == files[name].read_bytes() for name, data in inside.items())


def test_pages_are_small(site, pages):
    large = {name: (site / name).stat().st_size for name in pages}
    assert not {name: size for name, size in large.items() if size > 1_500_000}
