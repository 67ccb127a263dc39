"""Tables that a script measures, kept in a page between marks: `<!-- NAME -->` and `<!-- end of NAME -->`."""

from pathlib import Path

from idnerf.errors import InputError


def put_between_marks(page: Path, name: str, text: str) -> None:
    """Replace what stands between the marks.

    Raises:
        InputError: the page has no such marks.
    """
    begin, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
    before, found, rest = page.read_text(encoding="utf-8").partition(begin)
    _, closed, after = rest.partition(end)
    if not found or not closed:
        raise InputError(f"{page}: expected the marks {begin} and {end} around its tables")
    page.write_text(f"{before}{begin}\n{text.strip()}\n{end}{after}", encoding="utf-8")
