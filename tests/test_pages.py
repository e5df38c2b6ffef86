"""The documentation site, as far as it can be seen without building it: pages, links, navigation.

``bash .ci/run docs`` builds it and looks at what came out.
"""

from pathlib import Path

import pytest
from pages import BLOCKS, SETTINGS, PageError, Site, check, gather, lists, look
from workspace import CORE, ROOT, members, packages


@pytest.fixture
def site(tmp_path: Path) -> Site:
    made = Site(tmp_path / "pages")
    gather(made)
    return made


def test_every_page_can_be_made_and_every_link_leads_somewhere(site: Site) -> None:
    site.write()
    lists(site)
    assert {path.relative_to(site.folder).as_posix() for path in site.folder.rglob("*.md")} >= {
        "index.md",
        "contributing.md",
        "tutorials/index.md",
        "packages/index.md",
        *(f"{member.path}/{page}.md" for member in members() for page in ("index", "changelog")),
        *(f"tutorials/{member.name}.md" for member in packages()),
    }
    assert (site.folder / "LICENSE").read_bytes() == (ROOT / "LICENSE").read_bytes()


def test_the_navigation_names_each_page_once(site: Site) -> None:
    def pages(entry: object) -> list[str]:
        if isinstance(entry, str):
            return [entry]
        parts = entry.values() if isinstance(entry, dict) else entry
        return [page for part in parts for page in pages(part)]

    found = pages(gather(site))
    made = {"tutorials/index.md", "packages/index.md", *(f"{member.path}/api.md" for member in members())}
    assert len(found) == len(set(found))
    assert set(found) == set(site.pages.values()) | made


def test_links_are_turned_and_code_is_not(site: Site) -> None:
    text = (
        "[a](packages/adaea) [b](CONTRIBUTING.md#tests) [c](docs/tutorials) [d](LICENSE) [e](#here)\n"
        "[f](https://example.org/x) `[g](packages/adaea)`\n```text\n[h](packages/adaea)\n```\n"
    )
    turned = site.turned(text, ROOT / "README.md", "some/where/page.md")
    assert turned == (
        "[a](../../packages/adaea/index.md) [b](../../contributing.md#tests) [c](../../tutorials/index.md) "
        "[d](../../LICENSE) [e](#here)\n"
        "[f](https://example.org/x) `[g](packages/adaea)`\n```text\n[h](packages/adaea)\n```\n"
    )
    assert site.files == {ROOT / "LICENSE": "LICENSE"}


@pytest.mark.parametrize("target", ["nothing.md", "packages/nothing", "../elsewhere.txt", "shared/tests"])
def test_a_link_that_leads_nowhere_is_an_error(site: Site, target: str) -> None:
    with pytest.raises(PageError, match=r"^README\.md links to "):
        site.turned(f"[x]({target})", ROOT / "README.md", "index.md")


def test_what_stands_inside_details_is_markdown(site: Site, tmp_path: Path) -> None:
    source = tmp_path / "page.md"
    source.write_text("# x\n\n<details>\n<summary>y</summary>\n\n| a |\n| --- |\n| b |\n\n</details>\n")
    assert '\n<details markdown="1">\n' in site.text(source, "page.md")
    assert "md_in_html" in SETTINGS.read_text(encoding="utf-8")


def test_a_package_leads_to_its_tutorial_and_reference(site: Site) -> None:
    member = packages()[0]
    text = site.text(member.directory / "README.md", f"{member.path}/index.md")
    assert text.startswith(f"# {member.name}\n\n[Tutorial](../../tutorials/{member.name}.md) · [API")
    assert "[Tutorial]" not in site.text(CORE.directory / "README.md", f"{CORE.path}/index.md")


def test_blocks_are_counted_inside_the_article_only() -> None:
    page = '<ul><li>menu</ul><article><h1 id="a">x</h1><ul><li>y</ul></article><table>'
    assert look(page).blocks == {"h1": 1, "ul": 1, "li": 1}
    assert look(page, article=False).blocks == {"h1": 1, "ul": 2, "li": 2, "table": 1}
    assert set(look(page).blocks) <= set(BLOCKS)


@pytest.mark.parametrize(
    ("html", "complaint"),
    [
        ('<script src="https://example.org/x.js"></script>', "loads https://example.org/x.js"),
        ('<link href="//example.org/x.css" rel="stylesheet">', "loads //example.org/x.css"),
        ('<a id="other"></a>', "lacks name"),
        ('<a id="name"></a><article><p>- a</p></article>', "CommonMark gives"),
    ],
)
def test_a_built_page_is_looked_at(tmp_path: Path, html: str, complaint: str) -> None:
    (tmp_path / "page.html").write_text(html)
    with pytest.raises(PageError, match=complaint):
        check(tmp_path, {"page.html": ["name"]}, {"page.html": "- a\n"})


def test_a_built_page_that_is_as_it_has_to_be_passes(tmp_path: Path) -> None:
    page = '<link href="assets/x.css"><a id="name"></a><article><ul><li>a</ul></article>'
    (tmp_path / "page.html").write_text(page)
    check(tmp_path, {"page.html": ["name"]}, {"page.html": "- a\n"})
    (tmp_path / "page.html").write_text(page.replace('id="name"', 'id="other"'))
    with pytest.raises(PageError, match="name"):
        check(tmp_path, {"page.html": ["name"]}, {"page.html": "- a\n"})


def test_nothing_is_loaded_from_elsewhere_by_settings() -> None:
    text = SETTINGS.read_text(encoding="utf-8")
    assert "font: false" in text
    assert "://" not in text
