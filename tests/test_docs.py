"""The documentation: every relative link leads somewhere, and the site builds without a warning and asks nobody."""

import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
PAGES = sorted((ROOT / "docs").glob("*.md"))
sys.path.insert(0, str(ROOT / "benchmarks"))


def anchors(text: str) -> set[str]:
    """Ids of a page's headings, as Markdown's `toc` extension makes them."""
    headings = re.findall(r"^#+ +(.*)$", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S), flags=re.M)
    return {re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", h.replace("`", "")).strip().lower()) for h in headings}


def links(text: str) -> list[str]:
    text = re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)
    return [link for link in re.findall(r"\]\(([^)\s]+)\)", text) if not re.match(r"[a-z]+:", link)]


@pytest.mark.parametrize(
    "page",
    [ROOT / "README.md", ROOT / "CHANGELOG.md", ROOT / "examples" / "README.md", *PAGES],
    ids=lambda p: f"{p.parent.name}/{p.name}",
)
def test_relative_links_lead_somewhere(page):
    for link in links(page.read_text(encoding="utf-8")):
        name, _, anchor = link.partition("#")
        target = page.parent / name if name else page
        assert target.exists(), link
        if anchor:
            assert anchor in anchors(target.read_text(encoding="utf-8")), link
        if page.parent == ROOT / "docs":  # the site holds docs/ alone
            assert target.resolve().is_relative_to(ROOT / "docs"), link


def navigation() -> list[str]:
    """Pages that mkdocs.yml names, in order."""

    def pages(entry: object) -> list[str]:
        if isinstance(entry, str):
            return [entry]
        values = entry.values() if isinstance(entry, dict) else entry
        return [page for value in values for page in pages(value)]  # type: ignore[union-attr]

    return pages(yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"])


def test_every_page_is_in_the_navigation():
    assert sorted(navigation()) == [page.name for page in PAGES]


def test_every_public_name_is_on_the_api_page():
    import idnerf

    text = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    for name, module in idnerf._LAZY.items():
        assert f"::: {module}.{name}\n" in text, name


def test_the_reproduction_page_is_that_of_the_scoreboard():
    import reproduction

    scoreboard = (ROOT / "docs" / "scoreboard.md").read_text(encoding="utf-8")
    written = (ROOT / "docs" / "reproduction.md").read_text(encoding="utf-8")
    assert written == reproduction.page(scoreboard), "run `python benchmarks/reproduction.py`"
    for row in reproduction.read_scoreboard(scoreboard):
        assert row.scene == "mean" or f"| {row.psnr} | {row.ssim} | {row.ssim_range2} |" in written


class Loads(HTMLParser):
    """What a page makes the browser fetch: not the links that a reader may follow."""

    def __init__(self) -> None:
        super().__init__()
        self.addresses: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        if tag in ("script", "img", "iframe", "source", "video", "embed"):
            self.addresses += [values.get("src") or "", values.get("srcset") or ""]
        if tag == "link" and values.get("rel") not in ("canonical", "prev", "next"):
            self.addresses.append(values.get("href") or "")


def test_the_site_builds_strictly_and_loads_nothing_from_elsewhere(tmp_path):
    site = tmp_path / "site"
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(site)]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    )
    assert done.returncode == 0, done.stdout + done.stderr
    pages = sorted(site.glob("*.html"))
    assert {page.stem for page in pages} >= {Path(name).stem for name in navigation()}
    for page in pages:
        parser = Loads()
        parser.feed(page.read_text(encoding="utf-8"))
        assert parser.addresses
        for address in parser.addresses:
            assert not re.match(r"([a-z]+:)?//", address), f"{page.name} loads {address}"
    for style in site.rglob("*.css"):
        assert not re.search(r"(@import|url\()\s*[\"']?(https?:)?//", style.read_text(encoding="utf-8")), style.name
    api = (site / "api.html").read_text(encoding="utf-8")
    assert 'id="idnerf.models.idnerf.IDNeRF.render"' in api and "Render one new view from source photos" in api
