"""What LaTeX commands and environments mean to a reader of the text. Names as in LaTeX, without the backslash."""

from __future__ import annotations

import functools

DROPPED: dict[str, int] = {
    name: arguments
    for arguments, names in {
        0: "BibitemOpen BibitemShut IEEEoverridecommandlockouts glsresetall footnotemark hyperref allowdisplaybreaks",
        1: """
            author affiliation affil affiliations address email date thanks institute keywords pacs
            subjclass keyword vspace hspace includegraphics includesvg includepdf epsfig psfig epsfbox
            epsffile epsscale plotone color pagecolor hypersetup bibliographystyle bibliography
            addbibresource pagestyle thispagestyle pagenumbering usepackage RequirePackage documentclass
            documentstyle graphicspath hyphenation phantom hphantom vphantom cline todo marginpar
            marginnote deleted nocite textcolor colorbox href raisebox rotatebox scalebox adjustbox parbox
            foreignlanguage titlerunning authorrunning shorttitle shortauthors corres correspondingauthor
            correspondence received revised accepted published submitto orcid orcidlink ORCID fntext
            corref cortext fnref tnotetext tnoteref ead emailAdd arxivnumber thanksref index
            tablenotemark captionsetup urlstyle theoremstyle bibinfo bibfield ccsdesc
            setcopyright copyrightyear acmYear acmDOI acmISBN acmPrice acmJournal acmVolume acmNumber
            acmArticle acmMonth acmSubmissionID authornote authorsaddresses additionalaffiliation preprint
            dedicatory curraddr urladdr onlineid vgtccategory journal icmltitlerunning icmlkeywords
            icmlcorrespondingauthor usetikzlibrary tikzset pgfplotsset lstset sisetup colorlet setlist
            geometry linespread fontfamily fontseries fontshape fontencoding selectlanguage typeout
            message special PassOptionsToPackage setcitestyle bibpunct arrayrulecolor rowcolor cellcolor
            columncolor newlength newcounter newtoks newsavebox savebox usebox stepcounter refstepcounter
            externaldocument lstinputlisting includeonly setstretch input include
            DeclareGraphicsExtensions Author Address firstnote corresp PACS MSC msc category terms
        """,
        2: """
            rule setlength addtolength setcounter addtocounter fcolorbox markboth fontsize settowidth
            settoheight resizebox plottwo icmlauthor icmlaffiliation newcites titleformat setkeys
            lstdefinelanguage lstdefinestyle newcolumntype DeclareFieldFormat multirow newglossaryentry
            addtocontents ifthenelse sbox
        """,
        3: "addcontentsline titlespacing definecolor crefname Crefname acmConference newacronym DeclarePairedDelimiter",
    }.items()
    for name in names.split()
}
"""Command -> how many of its arguments are no text; optional ones, and those behind them, are not counted."""

_SIGNS = {
    "ldots": "…", "dots": "…", "cdots": "…", "S": "§", "P": "¶", "i": "ı", "j": "ȷ", "LaTeX": "LaTeX", "TeX": "TeX",
    "LaTeXe": "LaTeX2e", "BibTeX": "BibTeX", "textasciitilde": "~", "texttildelow": "~", "textasciicircum": "^",
    "quad": " ", "qquad": " ", "space": " ", "enspace": " ", "thinspace": " ", "newline": " ", "linebreak": " ",
    "nobreakspace": " ", " ": " ", "\n": " ", "\t": " ", ",": " ", ";": " ", ":": " ",
    "-": "", "/": "", "!": "", "@": "", "&": "&", "%": "%", "$": "$", "#": "#", "_": "_", "{": "{", "}": "}",
    "textless": "<", "textgreater": ">", "textbar": "|", "textquotesingle": "'", "textquotedbl": '"', "textmu": "μ",
    "dag": "†", "ddag": "‡", "copyright": "©", "pounds": "£", "euro": "€", "degree": "°", "slash": "/", "lq": "‘",
    "rq": "’", "textunderscore": "_", "textperiodcentered": "·", "textbraceleft": "{", "textbraceright": "}",
    "aa": "å", "AA": "Å", "ae": "æ", "AE": "Æ", "oe": "œ", "OE": "Œ", "ss": "ß", "o": "ø", "O": "Ø", "l": "ł", "L": "Ł",
    "dh": "ð", "DH": "Ð", "th": "þ", "TH": "Þ", "dj": "đ", "DJ": "Đ", "ng": "ŋ", "NG": "Ŋ",
}  # fmt: skip

ACCENTS = {
    "`": "\u0300", "'": "\u0301", "^": "\u0302", "~": "\u0303", '"': "\u0308", "=": "\u0304", ".": "\u0307",
    "u": "\u0306", "v": "\u030c", "H": "\u030b", "c": "\u0327", "k": "\u0328", "r": "\u030a", "d": "\u0323",
    "b": "\u0331",
}  # fmt: skip
"""Command -> the combining character that follows its letter."""

UNITS = {
    "femto": "f", "pico": "p", "nano": "n", "micro": "μ", "milli": "m", "centi": "c", "kilo": "k", "mega": "M",
    "giga": "G", "tera": "T", "metre": "m", "meter": "m", "gram": "g", "second": "s", "ampere": "A", "kelvin": "K",
    "mole": "mol", "candela": "cd", "hertz": "Hz", "newton": "N", "pascal": "Pa", "joule": "J", "watt": "W",
    "volt": "V", "ohm": "Ω", "tesla": "T", "coulomb": "C", "farad": "F", "henry": "H", "electronvolt": "eV",
    "degree": "°", "celsius": "°C", "degreeCelsius": "°C", "percent": "%", "litre": "L", "liter": "L", "minute": "min",
    "hour": "h", "day": "d", "bar": "bar", "angstrom": "Å", "decibel": "dB", "byte": "B", "bit": "bit", "dalton": "Da",
    "radian": "rad", "becquerel": "Bq", "gray": "Gy", "sievert": "Sv", "parsec": "pc", "per": "/", "squared": "²",
    "cubed": "³",
}  # fmt: skip
"""siunitx."""

CITATIONS = frozenset(
    """
    cite citep citet citealp citealt citeauthor Citep Citet Citealp Citealt Citeauthor parencite Parencite textcite
    Textcite autocite Autocite footcite smartcite supercite citenum onlinecite citeonline cites parencites textcites
    autocites shortcite shortciteA citeA citeNP citeN fullcite footfullcite citen Cite citealtp citeyear citeyearpar
    citedate
    """.split()
)
TEXTUAL_CITATIONS = frozenset("citet citealt Citet Citealt textcite Textcite citeauthor Citeauthor citeA citeN".split())
REFERENCES = frozenset("ref eqref cref Cref autoref vref Vref pageref nameref labelcref subref fref Fref sref".split())
NAMED_REFERENCES = frozenset("cref Cref autoref vref Vref fref Fref".split())

SECTIONS = {
    name: level
    for level, name in enumerate("part chapter section subsection subsubsection paragraph subparagraph".split())
} | {"bmhead": 5}
"""Command -> its level; without chapters, the level of its heading too."""

MATHS = {
    name + star: rows
    for rows, names in {
        "": "equation displaymath math dmath",
        "aligned": "align flalign alignat xalignat eqnarray IEEEeqnarray empheq",
        "gathered": "gather multline dgroup",
    }.items()
    for name in names.split()
    for star in ("", "*")
}
"""Environment -> the one that holds its rows between $$ and $$."""

MATHS_WITH_ARGUMENT = tuple("alignat xalignat IEEEeqnarray empheq".split())

LENGTHS = """
    vskip hskip kern vglue hglue mskip parskip parindent baselineskip leftskip rightskip hsize vsize
    textwidth textheight topmargin oddsidemargin evensidemargin tabcolsep arraycolsep columnsep hangindent lineskip
""".split()
"""Commands that TeX's own lengths follow, without braces."""

FLOATS = {
    name + star: kind
    for kind, names in {
        "Figure": "figure wrapfigure SCfigure sidewaysfigure teaserfigure marginfigure floatingfigure",
        "Table": "table wraptable sidewaystable margintable longtable deluxetable",
        "Algorithm": "algorithm algorithm2e",
        "Listing": "listing",
        "Scheme": "scheme",
    }.items()
    for name in names.split()
    for star in ("", "*")
}
PARTS = frozenset("subfigure subtable subcaptionblock subfloatrow".split())
TABLES = {
    "tabular": 1, "tabular*": 2, "tabularx": 2, "tabulary": 2, "longtable": 1, "longtable*": 1, "tblr": 1,
    "supertabular": 1, "xtabular": 1, "tabu": 1, "longtabu": 1, "NiceTabular": 1, "xltabular": 2, "array": 1,
}  # fmt: skip
"""Environment -> its arguments."""
LISTS = frozenset(
    """
    itemize enumerate description compactitem compactenum inparaenum itemize* enumerate* list trivlist
    compactdesc tablenotes asparaenum
    """.split()
)
NUMBERED_LISTS = ("enumerate", "compactenum", "inparaenum", "asparaenum")
VERBATIM = frozenset("verbatim verbatim* Verbatim BVerbatim lstlisting minted alltt".split())
SKIPPED = frozenset(
    """
    thebibliography tikzpicture pgfpicture picture comment filecontents filecontents* CCSXML IEEEkeywords keywords
    keyword pspicture pspicture* feynman fmffile forest overpic highlights psmatrix axis
    """.split()
)
HEADED = {
    "abstract": "Abstract", "onecolabstract": "Abstract", "abstracts": "Abstract",
    **dict.fromkeys(("acknowledgments", "acknowledgements", "acknowledgment", "acknowledgement"), "Acknowledgments"),
    "acks": "Acknowledgments", "ack": "Acknowledgments",
}  # fmt: skip
"""Environment or command -> the heading of what it holds."""
ENVIRONMENT_ARGUMENTS = {
    "minipage": 1, "multicols": 1, "adjustbox": 1, "spacing": 1, "wrapfigure": 2, "wraptable": 2, "floatingfigure": 1,
    "adjustwidth": 2, "list": 2, "textblock": 1, "column": 1, "subfigure": 1, "subtable": 1, "subcaptionblock": 1,
    "addmargin": 1, "otherlanguage": 1, "CJK": 2, "CJK*": 2,
}  # fmt: skip
PSEUDOCODE = frozenset("algorithmic algorithmicx".split())
PSEUDOCODE_WORDS = {
    "state": "", "statex": "", ";": "", "require": "Require:", "ensure": "Ensure:", "input": "Input:",
    "output": "Output:", "kwdata": "Data:", "kwin": "Input:", "kwinput": "Input:", "kwout": "Output:",
    "kwoutput": "Output:", "kwresult": "Result:", "kwret": "return", "if": "if", "uif": "if", "eif": "if",
    "elsif": "else if", "elseif": "else if", "else": "else", "uelse": "else", "endif": "end if", "for": "for",
    "forall": "for all", "foreach": "for each", "endfor": "end for", "while": "while", "endwhile": "end while",
    "repeat": "repeat", "until": "until", "return": "return", "procedure": "procedure", "function": "function",
    "endprocedure": "end procedure", "endfunction": "end function", "loop": "loop", "endloop": "end loop",
    "comment": "", "tcp": "", "tcc": "", "tcp*": "",
}  # fmt: skip
"""Command in lower case -> how its line begins."""
PSEUDOCODE_COMMENTS = ("comment", "tcp", "tcc")
PSEUDOCODE_OPENINGS = ("if", "for", "while", "repeat", "procedure", "function", "loop", "else", "elsif")
PSEUDOCODE_CLOSINGS = ("end", "else", "elsif", "until")


@functools.cache
def signs() -> dict[str, str]:
    """Command -> the characters that it stands for in text."""
    from pylatexenc.latexencode import get_builtin_uni2latex_dict

    known: dict[str, str] = {}
    for code, command in get_builtin_uni2latex_dict().items():
        if command.startswith("\\text") and command[1:].isalpha():
            known.setdefault(command[1:], chr(code))
    return known | _SIGNS
