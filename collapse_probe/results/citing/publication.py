"""One publication: how a sentence names it, and its entry in a BibTeX file."""

from __future__ import annotations

from dataclasses import dataclass

JMLR = "Journal of Machine Learning Research"
JOURNALS = (JMLR,)


@dataclass(frozen=True)
class Reference:
    """One publication: `authors` as BibTeX takes them, `arxiv` its number there, `venue` where it was published."""

    key: str
    title: str
    authors: str
    year: int
    arxiv: str = ""
    venue: str = ""
    pages: str = ""

    @property
    def short(self) -> str:
        """As a sentence names it: Dong et al., 2021."""
        names = [name.partition(",")[0].strip("{}") for name in self.authors.split(" and ")]
        who = names[0] if len(names) == 1 else " & ".join(names) if len(names) == 2 else f"{names[0]} et al."
        return f"{who}, {self.year}"

    @property
    def bibtex(self) -> str:
        """The entry of a BibTeX file."""
        kind = "inproceedings" if self.venue else "misc"
        fields = {"title": f"{{{self.title}}}", "author": self.authors, "year": str(self.year)}
        if self.venue:
            fields["booktitle"] = self.venue
        if self.venue in JOURNALS:
            kind, fields["journal"] = "article", fields.pop("booktitle")
        fields |= {"pages": self.pages} if self.pages else {}
        fields |= {"eprint": self.arxiv, "archivePrefix": "arXiv"} if self.arxiv else {}
        return entry(kind, self.key, fields)


def entry(kind: str, key: str, fields: dict[str, str]) -> str:
    """One entry of a BibTeX file.

    >>> print(entry("misc", "a2020", {"title": "A title", "year": "2020"}))
    @misc{a2020,
      title = {A title},
      year = {2020},
    }
    """
    lines = "\n".join(f"  {name} = {{{value}}}," for name, value in fields.items())
    return f"@{kind}{{{key},\n{lines}\n}}"
