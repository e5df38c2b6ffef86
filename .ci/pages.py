"""The documentation site: the repository's own Markdown, the tutorials, and a reference out of docstrings.

    uv run --group docs python .ci/pages.py --out site            build it; a warning fails the build
    uv run --group docs python .ci/pages.py --out site --serve    and show it on this machine

Every page is made at build time, of a file that readers of the repository see as well, or of docstrings. The
generator is Material for MkDocs, which gets fixes until May 2027. Its authors' successor, Zensical, reads the
same settings, and no plugin or hook of ours would have to move: everything of our own happens before and
after the generator. It stays away for now because its releases from 0.0.74 on cannot be installed from every
registry.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import http.server
import os
import posixpath
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from fences import plain_fences
from workspace import CORE, ROOT, Member, packages

SETTINGS = ROOT / "docs" / "mkdocs.yml"
TUTORIALS = ROOT / "docs" / "tutorials"
BLOCKS = ("h1", "h2", "h3", "h4", "li", "ol", "ul", "pre", "table", "td", "blockquote", "img")
SHIM = re.compile(r"https://[^\s\"'<>]+/iframe-worker/shim")

_LINK = re.compile(
    r"^(?P<indent> *)```(?!`).*?^(?P=indent)```|`[^`\n]+`|(?P<text>\]\()(?P<target>[^)\s]+)(?=\))",
    re.M | re.S,
)


class PageError(Exception):
    """A page that cannot be made, or a site that is not as it has to be."""


@dataclass
class Site:
    """The pages of the site and the files that they link to.

    Attributes:
        folder: where the pages are written.
        pages: file of the repository -> page, relative to ``folder``, with slashes.
        files: other files of the repository that a page links to -> place.
        folders: folder of the repository -> the page that lists what is in it.
        under: page -> what is put under its title.
    """

    folder: Path
    pages: dict[Path, str] = field(default_factory=dict[Path, str])
    files: dict[Path, str] = field(default_factory=dict[Path, str])
    folders: dict[Path, str] = field(default_factory=dict[Path, str])
    under: dict[str, str] = field(default_factory=dict[str, str])

    def page(self, source: Path, target: str) -> str:
        """Take a Markdown file up as a page."""
        self.pages[source] = target
        return target

    def write(self) -> None:
        """Write the pages, with links that lead to pages, and copy what else they link to.

        Raises:
            PageError: a link to a file that is not there.
        """
        for source, target in self.pages.items():
            self.put(target, self.text(source, target))
        for source, target in self.files.items():
            (self.folder / target).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, self.folder / target)

    def text(self, source: Path, target: str) -> str:
        """The Markdown of a page."""
        text = plain_fences(self.turned(source.read_text(encoding="utf-8"), source, target))
        text = text.replace("\n<details>\n", '\n<details markdown="1">\n')  # or what is inside stays as it is
        title, rest = text.split("\n", 1)
        return f"{title}\n\n{self.under[target]}\n{rest}" if target in self.under else text

    def put(self, target: str, text: str) -> None:
        """Write a page."""
        (self.folder / target).parent.mkdir(parents=True, exist_ok=True)
        (self.folder / target).write_text(text, encoding="utf-8")

    def turned(self, text: str, source: Path, target: str) -> str:
        """A file's text with its relative links as they have to be on its page; code stays as it is."""

        def turn(found: re.Match[str]) -> str:
            link = found["target"]
            if link is None or re.match(r"[a-z]+:|#", link):
                return found[0]
            path, hash_mark, anchor = link.partition("#")
            place = posixpath.relpath(self.place(source, path), posixpath.dirname(target) or ".")
            return f"{found['text']}{place}{hash_mark}{anchor}"

        return _LINK.sub(turn, text)

    def place(self, source: Path, path: str) -> str:
        """Where a link in a file leads to, relative to the pages' folder."""
        wanted = (source.parent / path).resolve()
        if wanted in self.folders:
            return self.folders[wanted]
        if wanted.is_dir():
            wanted /= "README.md"
        if wanted in self.pages:
            return self.pages[wanted]
        if not wanted.is_file() or not wanted.is_relative_to(ROOT) or wanted.suffix == ".md":
            raise PageError(f"{source.relative_to(ROOT)} links to {path}, which is no page and no file here")
        return self.files.setdefault(wanted, wanted.relative_to(ROOT).as_posix())


def title_of(path: Path) -> str:
    """The first heading of a Markdown file."""
    return next(line[2:].strip() for line in path.read_text("utf-8").splitlines() if line.startswith("# "))


def gather(site: Site) -> list[dict[str, Any]]:
    """Take up all pages that are files, and say where each stands in the navigation.

    Returns:
        The navigation; the references' pages are named in it and still to be written.
    """

    def of(member: Member) -> list[Any]:
        folder = member.path
        beside = ["[API reference](api.md)", "[Changelog](changelog.md)"]
        if member != CORE:
            beside.insert(0, f"[Tutorial](../../tutorials/{member.name}.md)")
        site.under[f"{folder}/index.md"] = " · ".join(beside) + "\n"
        return [
            site.page(member.directory / "README.md", f"{folder}/index.md"),
            {"API reference": f"{folder}/api.md"},
            {"Changelog": site.page(member.directory / "CHANGELOG.md", f"{folder}/changelog.md")},
        ]

    site.folders[TUTORIALS] = "tutorials/index.md"
    home = site.page(ROOT / "README.md", "index.md")
    tutorials = [
        {member.name: site.page(TUTORIALS / f"{member.name}.md", f"tutorials/{member.name}.md")}
        for member in packages()
    ]
    others = [
        {title_of(path): site.page(path, f"{path.stem.lower()}.md")}
        for path in sorted(ROOT.glob("*.md"))
        if path.name != "README.md"
    ]
    return [
        {"Home": home},
        {"Tutorials": ["tutorials/index.md", *tutorials]},
        {"Packages": ["packages/index.md", *({member.name: of(member)} for member in packages())]},
        {"Core": of(CORE)},
        *others,
    ]


def lists(site: Site) -> None:
    """Write the two pages that list others: the tutorials and the packages."""
    tutorials = "\n".join(
        f"- [{title_of(TUTORIALS / f'{member.name}.md')}]({member.name}.md), with `{member.name}`"
        for member in packages()
    )
    site.put(
        "tutorials/index.md",
        "# Tutorials\n\nOne job from start to finish with each package, on data that come with it. The tests "
        f"run every line and compare what it prints.\n\n{tutorials}\n",
    )
    found = "\n".join(
        f"| [`{member.name}`]({member.name}/index.md) | {member.pyproject['project']['description']} "
        f"| [tutorial](../tutorials/{member.name}.md) | [API]({member.name}/api.md) |"
        for member in packages()
    )
    site.put("packages/index.md", f"# Packages\n\n| package | what it is | | |\n|---|---|---|---|\n{found}\n")


def settings(site: Site, navigation: list[dict[str, Any]], out: Path, known: list[str]) -> dict[str, Any]:
    """The generator's settings: those of ``docs/mkdocs.yml`` with what is known at build time only."""
    import yaml

    found = yaml.safe_load(SETTINGS.read_text(encoding="utf-8"))
    found |= {"docs_dir": site.folder.name, "site_dir": out.name, "nav": navigation}
    python = found["plugins"]["mkdocstrings"]["handlers"]["python"]
    python["paths"] = [str(member.directory / "src") for member in (CORE, *packages())]
    extension = f"{Path(__file__).with_name('docstrings.py')}:Readable"
    python["options"]["extensions"] = [{extension: {"known": known}}]
    return found


def build(out: Path) -> None:
    """Build the site.

    Args:
        out: its folder; it is replaced.

    Raises:
        PageError: a link that leads nowhere, a warning of the generator, a page without what it has to show.
    """
    import yaml
    from reference import anchors, known_names, reference_page

    with tempfile.TemporaryDirectory() as scratch:
        site = Site(Path(scratch) / "pages")
        navigation = gather(site)
        lists(site)
        for member in (CORE, *packages()):
            site.put(f"{member.path}/api.md", reference_page(member))
        site.files[ROOT / "docs" / "site.css"] = "assets/site.css"
        site.write()
        config = Path(scratch) / "mkdocs.yml"
        made = Path(scratch) / "site"
        config.write_text(yaml.safe_dump(settings(site, navigation, made, known_names())), encoding="utf-8")
        command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "-f", str(config)]
        # the variable leaves out a banner about the generator's future
        if subprocess.run(command, cwd=scratch, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"}).returncode:
            raise PageError("the generator is not content, see above")
        localize(made)
        texts = {
            f"{target.removesuffix('.md')}.html": site.text(source, target)
            for source, target in site.pages.items()
        }
        check(made, anchors(), texts)
        shutil.rmtree(out, ignore_errors=True)
        shutil.copytree(made, out)


def localize(site: Path) -> None:
    """Replace the one script that the generator loads from elsewhere by ours, see ``docs/worker.js``."""
    for path in site.rglob("*.html"):
        text = path.read_text(encoding="utf-8")
        own = posixpath.relpath("assets/worker.js", path.parent.relative_to(site).as_posix())
        path.write_text(SHIM.sub(own, text), encoding="utf-8")
    shutil.copyfile(ROOT / "docs" / "worker.js", site / "assets" / "worker.js")


class _Looker(HTMLParser):
    """Finds the anchors of a page, what it loads from other places, and how many blocks its text has."""

    def __init__(self, *, article: bool = True) -> None:
        super().__init__()
        self.ids: set[str] = set()
        self.loads: list[str] = []
        self.blocks = Counter[str]()
        self._inside = self._always = not article

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Called for every tag."""
        given = dict(attrs)
        if given.get("id"):
            self.ids.add(str(given["id"]))
        loaded = given.get("src") or (given.get("href") if tag == "link" else None)
        if loaded and re.match(r"(https?:)?//", loaded) and given.get("rel") != "canonical":
            self.loads.append(loaded)
        self._inside |= tag == "article"
        if self._inside and tag in BLOCKS:
            self.blocks[tag] += 1

    def handle_endtag(self, tag: str) -> None:
        """Called for every closing tag."""
        self._inside &= tag != "article" or self._always


def look(html: str, *, article: bool = True) -> _Looker:
    """What a page consists of; ``article=False`` for HTML without the frame of the site."""
    found = _Looker(article=article)
    found.feed(html)
    return found


def check(site: Path, wanted: dict[str, list[str]], texts: dict[str, str]) -> None:
    """Look at the built pages.

    Args:
        site: the built site.
        wanted: page -> names that have to have an anchor there.
        texts: page -> its Markdown, which has to give the same blocks as on a host of repositories.

    Raises:
        PageError: a name is missing, a list or a table fell apart, or a page loads something from elsewhere.
    """
    from markdown_it import MarkdownIt

    common = MarkdownIt("commonmark").enable("table")
    wrong: list[str] = []
    for path in sorted(site.rglob("*.html")):
        name = path.relative_to(site).as_posix()
        page = look(path.read_text(encoding="utf-8"))
        wrong += [f"{name} loads {url}" for url in page.loads]
        wrong += [f"{name} lacks {entry}" for entry in wanted.get(name, []) if entry not in page.ids]
        if name in texts:
            other = look(common.render(texts[name]), article=False).blocks
            if other != page.blocks:
                wrong.append(f"{name} has {dict(page.blocks)}, CommonMark gives {dict(other)}")
    if wrong:
        raise PageError("\n".join(wrong))


def serve(folder: Path, port: int) -> None:
    """Show a folder on this machine's own address until Ctrl-C."""
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", port), handler) as server:
        print(f"http://127.0.0.1:{port}/  (Ctrl-C ends it)")
        with contextlib.suppress(KeyboardInterrupt):
            server.serve_forever()


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(description="Build the documentation site.")
    parser.add_argument("--out", type=Path, required=True, help="folder of the site; it is replaced")
    parser.add_argument("--serve", action="store_true", help="show it on this machine afterwards")
    parser.add_argument("--port", type=int, default=8000)
    chosen = parser.parse_args()
    try:
        build(chosen.out)
    except PageError as error:
        print(error, file=sys.stderr)
        return 1
    if chosen.serve:
        serve(chosen.out, chosen.port)
    return 0


if __name__ == "__main__":
    sys.exit(main())
