"""Check the links of a built site: every address inside it must lead to a file, and every #anchor to an id.

    python scripts/check_links.py build/docs

The generator checks the links of the Markdown sources. This also sees images, and links in what it generates.
"""

import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit


class Page(HTMLParser):
    """The ids of a page, and the addresses that it links to."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.ids: set[str] = set()
        self.links: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if value and name in ("id", "name"):
                self.ids.add(value)
            elif value and name in ("href", "src"):
                self.links.append(value)


def problems(site: Path) -> list[str]:
    """A line for each link that leads nowhere."""
    pages = {path.resolve(): Page(path) for path in sorted(site.rglob("*.html"))}
    found = []
    for path, page in pages.items():
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc or path.name == "404.html":
                continue  # addresses elsewhere; the page for what is not found is served from any folder
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            target = target / "index.html" if target.is_dir() else target
            where = f"{path.relative_to(site.resolve())}: {link}"
            if not target.exists():
                found.append(f"{where}: expected a file, found none")
            elif parts.fragment and target in pages and unquote(parts.fragment) not in pages[target].ids:
                found.append(f"{where}: expected an id on that page, found none")
    return found


def main(arguments: list[str]) -> int:
    site = Path(arguments[0])
    lines = problems(site)
    print("\n".join([*lines, f"{site}: {len(lines)} links lead nowhere"]))
    return 1 if lines else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
