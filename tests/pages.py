"""What the repository's pages say: their blocks, commands and links."""

import re
import shlex
from pathlib import Path

ROOT = Path(__file__).parents[1]
PLACES = (".", "docs", "tpu", "experiments", "findings", "tests")
PAGES = sorted(
    str(page.relative_to(ROOT))
    for place in PLACES
    for page in (ROOT / place).glob("*.md" if place == "." else "**/*.md")
)


def text(page):
    return (ROOT / page).read_text()


def blocks(page, language):
    """The code blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", text(page), re.S | re.M)


def commands(*pages):
    """Every command in the pages' ```sh blocks, once, in order, as arguments."""
    lines = (line for page in pages for block in blocks(page, "sh") for line in joined(block))
    return [shlex.split(line) for line in dict.fromkeys(lines)]


def joined(block):
    """Lines of a shell script, continued ones as one."""
    lines = block.replace("\\\n", " ").splitlines()
    return [line for line in lines if line.strip() and not line.startswith("#")]


def mentioned(page):
    """Commands of this project within a page's prose, as arguments."""
    prose = re.sub(r"^```.*?^```$", "", text(page), flags=re.S | re.M)
    spans = (" ".join(span.split()) for span in re.findall(r"`([^`]+)`", prose))
    return [shlex.split(s) for s in spans if re.match(r"(fot|pip|python) ", s)]


def links(page):
    """(a `name` before "in", label, target, anchor) of every link into the repository."""
    found = re.findall(r"(?:`(\w+)`\s+in\s+)?\[([^]]*)\]\(([^)#]*)#?([^)]*)\)", text(page))
    return [link for link in found if not link[2].startswith("http")]


def anchors(page):
    """What links to parts of a page may end with."""
    titles = re.findall(r"^#+ (.*)$", text(page), re.M)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}
