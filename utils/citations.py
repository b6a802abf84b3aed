"""What a docstring says of where a method is from, short enough for a line of help."""

import re

_QUOTED, _YEAR = re.compile(r' ?"[^"]*",?'), re.compile(r"\b(?:19|20)\d\d\b")


def source_of(docstring: str) -> str:
    """Authors, venue and year of the paper that a docstring opens with, without its title; else the first clause.

    `'AT: Zagoruyko & Komodakis, "Paying ...", ICLR 2017, equation 2'` -> `'AT: Zagoruyko & Komodakis, ICLR 2017'`.
    """
    text = _QUOTED.sub("", docstring.strip().partition("\n")[0])
    year = _YEAR.search(text)
    return text[: year.end()] if year else re.split(r": `|\. |, (?=[a-z])|\.$", text)[0]
