"""LaTeX -> Markdown: what the reader writes of a paper, and what no source can do to it."""

from __future__ import annotations

import gzip
import io
import re
import tarfile
import time
import unicodedata
import zlib
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.data.readers import Unreadable, latex
from orchestrator.data.readers.tex import source, vocabulary
from tests.unit.test_format_readers import RANDOM, SECONDS, reason, shared


def tex(body: str, preamble: str = "") -> str:
    document = rf"\documentclass{{article}}{preamble}\begin{{document}}{body}\end{{document}}"
    return latex.read(document.encode())


def archive(files: dict[str, str | bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, content in files.items():
            data = content.encode() if isinstance(content, str) else content
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return buffer.getvalue()


def outside_formulas(markdown: str) -> str:
    return re.sub(r"\$\$.*?\$\$|\$[^$]*\$|```.*?```", "", markdown, flags=re.DOTALL)


def test_a_real_submission_reads_as_a_paper() -> None:
    text = latex.read_archive(shared("latex/1911.02782.gz"))
    assert text.startswith("# S2ORC: The Semantic Scholar Open Research Corpus\n\n## Abstract\n\nWe introduce S2ORC (")
    sections = re.findall(r"^## (.+)$", text, re.MULTILINE)
    assert sections[:4] == ["Abstract", "Introduction", "Constructing the corpus", "The S2ORC dataset"]
    assert "References" not in sections and "Background & Terminology" in sections
    assert "(AAN) [START_REF] The acl anthology network corpus, Radev[END_REF] (http://aan.how/) derived" in text
    assert "$$ S_{title} = \\frac{2 \\times J \\times C}{J + C} $$" in text
    assert "| Papers w/ PDF | 28.9M (35.6%) |" in text
    assert "1. Process PDFs and LaTeX sources to derive metadata" in text
    assert "See Appendix §A for definitions" in text and "visualized in Figure 1." in text


def test_no_command_of_a_real_submission_leaks_out_of_its_formulas() -> None:
    text = latex.read_archive(shared("latex/1911.02782.gz"))
    assert not re.findall(r"\\[A-Za-z]+|[{}]|~[A-Za-z]|\[\d+mm\]", outside_formulas(text))


def test_every_citation_of_a_real_submission_is_resolved() -> None:
    data = shared("latex/1911.02782.gz")
    cited = re.findall(r"\\cite[pt]?\{([^}]+)\}", source.submission(data).text)
    text = latex.read_archive(data)
    assert text.count("[START_REF] ") == text.count("[END_REF]") == sum(keys.count(",") + 1 for keys in cited)
    references = re.findall(r"\[START_REF\] (.+?)\[END_REF\]", text)
    assert all(re.fullmatch(r".{10,}, \S.*", found) for found in references)


def test_macros_of_the_author_are_expanded() -> None:
    preamble = r"""
        \newcommand{\name}{Foo\xspace} \newcommand\both[2][x]{#1 and #2} \def\twice#1{#1#1}
        \newcommand{\R}{\mathbb{R}} \DeclareMathOperator{\rank}{rank} \let\old\emph \renewcommand{\emph}[1]{\old{#1}}
        \newcommand{\be}{\begin{equation}} \newcommand{\ee}{\end{equation}} \def\ba#1\ea{\begin{align}#1\end{align}}
        \newenvironment{eq}{\begin{equation}}{\end{equation}}"""
    assert tex(r"\name is \name. \both{b}, \both[a]{b}, \twice{ab}", preamble) == "Foo is Foo. x and b, a and b, abab"
    assert tex(r"\emph{so} $\R x^{\rank A}$", preamble) == r"so $\mathbb{R}x^{\operatorname{rank}A}$"
    assert tex(r"\be a \ee \begin{eq} b \end{eq}", preamble) == "$$ a $$\n\n$$ b $$"
    assert tex(r"\ba a &= b \ea", preamble) == "$$ \\begin{aligned}\na &= b\n\\end{aligned} $$"


def test_macros_that_call_themselves_end() -> None:
    assert tex(r"\def\a{x \a}\a done") == "done"
    assert reason(latex.read, rb"\begin{document}\def\a{\b\b}\def\b{\a\a}\a") == "macro bomb"
    doubling = b"".join(rb"\def\x%c{\x%c\x%c}" % (c, c + 1, c + 1) for c in range(97, 120))
    assert reason(latex.read, rb"\begin{document}" + doubling + rb"\xa") == "macro bomb"


def test_comments_and_conditions_are_not_text() -> None:
    assert tex("a % no\nb\n% no\nc 5\\%\n\nd") == "a b c 5%\n\nd"
    assert tex(r"\begin{comment}no\end{comment}\iffalse no \ifx a b\fi no \else yes \fi") == "yes"
    assert tex(r"\ifdraft no\else final\fi, \ifbig big\fi", r"\newif\ifdraft\newif\ifbig\bigtrue") == "final, big"


@pytest.mark.parametrize("command,combining", sorted(vocabulary.ACCENTS.items()))
def test_accents_become_unicode(command: str, combining: str) -> None:
    composed = unicodedata.normalize("NFC", "e" + combining)
    blank = " " if command.isalpha() else ""
    assert tex(rf"caf\{command}{blank}es, caf\{command}{{e}}s") == f"caf{composed}s, caf{composed}s"


def test_signs_of_the_text_are_characters() -> None:
    assert tex(r"``na\"{\i}ve'' -- \O{}rsted~\& \AA{}ngstr\"om, stra\ss e---5\,\% \textmu m\ldots") == (
        "“naïve” – Ørsted & Ångström, straße—5 % μm…"
    )
    assert tex(r"x\textsuperscript{2} CO\textsubscript{2} \ce{SO4^2-}") == (
        "x[START_SUP]2[END_SUP] CO[START_SUB]2[END_SUB] SO[START_SUB]4[END_SUB][START_SUP]2-[END_SUP]"
    )
    assert tex(r"\SI{3.5}{\milli\metre\per\second}, \num{1e5}, {\bf bold} \unknown{kept} \vspace{2pt}\\[3mm] end") == (
        "3.5 mm/s, 1e5, bold kept end"
    )


@pytest.mark.parametrize(
    "environment,rows",
    [("equation", ""), ("align", "aligned"), ("eqnarray", "aligned"), ("multline", "gathered"), ("gather", "gathered")],
)
def test_displayed_formulas_keep_their_latex_and_lose_their_labels(environment: str, rows: str) -> None:
    formula = r"a &= \frac{1}{2} \\ b &= \text{if $x$}" if rows else r"a_{i} = \frac{1}{2}"
    inside = f"\\begin{{{rows}}}\n{formula}\n\\end{{{rows}}}" if rows else formula
    for star in ("", "*"):
        text = tex(rf"so \begin{{{environment}{star}}}{formula} \label{{e}}\nonumber\end{{{environment}{star}}} holds")
        assert text == f"so\n\n$$ {inside} $$\n\nholds"


def test_formulas_in_lines_are_dollars() -> None:
    assert tex(r"a $x_1^2$, \(y\), \ensuremath{z}; $$w$$ \[v\]") == "a $x_1^2$, $y$, $z$;\n\n$$ w $$\n\n$$ v $$"
    assert tex(r"costs \$5 and \$6") == "costs $5 and $6"


def test_what_sets_the_page_is_no_text() -> None:
    assert tex(
        r"a\vskip 2mm plus 1pt minus .5em b \parbox[t]{2cm}{c} \colorbox{red}{d} \makebox[1cm][c]{e} \kern-2pt f"
    ) == ("a b c d e f")
    assert tex(r"\begin{IEEEeqnarray}{rCl} a & = & b \end{IEEEeqnarray} \bmhead{Data} here") == (
        "$$ \\begin{aligned}\na & = & b\n\\end{aligned} $$\n\n##### Data\n\nhere"
    )


def test_references_are_numbers_or_nothing() -> None:
    text = tex(
        r"""\section{One}\label{one} \subsection{Sub}\label{sub}
        \begin{equation} a \label{eq} \end{equation} \begin{thm}\label{t} So. \end{thm}
        \begin{figure}\caption{F \label{f}}\end{figure} \begin{enumerate}\item x \item y \label{i}\end{enumerate}

        Sections \ref{one} and~\ref{sub}, Eq.~\eqref{eq}, \cref{t,f}, item \ref{i}, App.~\ref{app}, Fig.~\ref{gone}
        (see~\ref{gone}), ends. \appendix \section{More}\label{app}""",
        r"\newtheorem{thm}{Theorem}[section]",
    )
    assert (
        "Sections 1 and 1.1, Eq. (1), Theorem 1.1, Figure 1, item 2, App. A, Fig. (see), ends." in text
        and "Theorem 1.1. So." in text
        and "Figure 1: F" in text
    )


def test_tables_are_markdown_under_their_captions() -> None:
    text = tex(
        r"""Text before
        \begin{table}\caption{Costs of \emph{x}}\label{t}\begin{tabular}{l|cc}\toprule
        Name & \multicolumn{2}{c}{Both} \\ \cmidrule(lr){2-3} \multirow{2}{*}{A} & $<1$ & a|b \\[2pt]\hline
        B & \makecell{two\\lines} \\ \bottomrule\end{tabular}\end{table}
        and after, as in Table~\ref{t}."""
    )
    assert text == (
        "Text before and after, as in Table 1.\n\nTable 1: Costs of x\n\n"
        "| Name | Both |  |\n| --- | --- | --- |\n| A | $<1$ | a\\|b |\n| B | two lines |  |"
    )


def test_a_deluxetable_has_its_head_and_its_comments() -> None:
    text = tex(
        r"""\begin{deluxetable}{lc}\tablecaption{Stars}\tablehead{\colhead{Name} & \colhead{$V$}}
        \startdata HD 1 & 5.1 \\ HD 2 & 6 \enddata\tablecomments{AB magnitudes.}\end{deluxetable}"""
    )
    assert text == "Table 1: Stars\n\n| Name | $V$ |\n| --- | --- |\n| HD 1 | 5.1 |\n| HD 2 | 6 |\n\nAB magnitudes."


def test_figures_are_their_captions() -> None:
    text = tex(
        r"""\begin{figure*}[t]\centering\subfloat[Left]{\includegraphics[width=2cm]{a.png}}
        \begin{tikzpicture}\draw (0,0) node {no};\end{tikzpicture}\caption[short]{Whole.}\end{figure*}"""
    )
    assert text == "Figure 1: Whole. (a) Left"


def test_lists_nest() -> None:
    text = tex(
        r"""\begin{itemize}[noitemsep]\item one\begin{enumerate}\item a\item b\end{enumerate}\item[(x)] two\end{itemize}
        \begin{description}\item[Term] meaning\end{description}"""
    )
    assert text == "- one\n  1. a\n  2. b\n- (x) two\n- Term: meaning"


def test_footnotes_stand_before_the_punctuation() -> None:
    assert tex(r"We use X,\footnote{Found at \url{http://a.b/c_d%20e}.} which works.\footnotemark And \date so.") == (
        "We use X (Found at http://a.b/c_d%20e), which works.And so."
    )


def test_verbatim_text_is_kept_in_fences() -> None:
    listing = "def f(x):  # 50% $a$\n\n    return \\alpha"
    assert tex(f"\\begin{{lstlisting}}[language=Python]\n{listing}\n\\end{{lstlisting}}") == (
        f"```python\n{listing}\n```"
    )
    assert tex("\\begin{verbatim}\n```\n\\end{verbatim} \\verb|a_b % c| end") == "````\n```\n````\n\n`a_b % c` end"


def test_pseudocode_keeps_its_lines() -> None:
    text = tex(
        r"""\begin{algorithm}\caption{Search}\begin{algorithmic}[1]\Require $x$ \For{$i$ in $x$}\If{$i>3$}
        \State stop \Comment{early}\Else \State go on\EndIf\EndFor \State \Return $i$\end{algorithmic}\end{algorithm}"""
    )
    assert text == (
        "Algorithm 1: Search\n\nRequire: $x$\nfor $i$ in $x$\n  if $i>3$\n    stop // early\n  else\n    go on\n"
        "  end if\nend for\nreturn $i$"
    )


BIBITEMS = {
    "natbib": (r"[{Ahmad et~al.(2018)}]", r"Riaz Ahmad and M.~Afzal. 2018. \newblock \href {u} {Cad: a tool}."),
    "plain": ("", r"Leslie Lamport and S. Other. \newblock {\LaTeX}: a system. \newblock Addison, 1994."),
    "ieee": ("", r"A.~Vaswani and N.~Shazeer, ``Attention is all,'' in \emph{Proc. NeurIPS}, 2017."),
    "book": ("", r"D.~E. Knuth, \emph{The Art of Programming}, 3rd ed., 1997."),
    "springer": ("", r"Kingma, D.P., Ba, J.: Adam: A method. In: ICLR (2015)"),
    "elsevier": ("", r"T.~Mikolov, K.~Chen, Estimation of words in space, arXiv preprint (2013)."),
    "aps": (r"[{\citenamefont {Aasi}(2015)}]", r"\bibnamefont {Aasi}, \bibinfo {title} {Advanced {LIGO}}"),
    "untitled": ("", r"M. Peskin, D. Schroeder, Phys. Rev. D 5 (1995) 3."),
}  # fmt: skip


@pytest.mark.parametrize(
    "style,expected",
    [
        ("natbib", "Cad: a tool, Ahmad"),
        ("plain", "LaTeX: a system, Lamport"),
        ("ieee", "Attention is all, Vaswani"),
        ("book", "The Art of Programming, Knuth"),
        ("springer", "Adam: A method, Kingma"),
        ("elsevier", "Estimation of words in space, Mikolov"),
        ("aps", "Advanced LIGO, Aasi"),
    ],
)
def test_titles_are_found_in_reference_lists_of_many_styles(style: str, expected: str) -> None:
    label, entry = BIBITEMS[style]
    items = rf"\begin{{thebibliography}}{{9}}\bibitem{label}{{k}} {entry}\end{{thebibliography}}"
    assert tex(rf"As~\cite{{k}}.{items}") == f"As [START_REF] {expected}[END_REF]."


def test_what_no_list_resolves_is_not_cited() -> None:
    items = rf"\begin{{thebibliography}}{{9}}\bibitem{{u}} {BIBITEMS['untitled'][1]}\end{{thebibliography}}"
    assert tex(rf"Known~\cite{{gone}}, (\citep{{u}}) and \citet{{u}}.{items}") == "Known, and Peskin."


def test_databases_come_before_lists() -> None:
    bib = r"""@string{j = "J"}
        @ARTICLE{a, author = {{\'E}toile, J. and Roe, R.}, title = "{The {H$\alpha$} line}", journal = j}
        @misc{b, title={Second: work}, author={Rachel van der Roe and others}}"""
    main = r"\documentclass{x}\begin{document}See \citep[cf.][p.~2]{a, b} and \citeauthor{b}.\end{document}"
    text = latex.read_archive(archive({"m.tex": main, "r.bib": bib, "m.bbl": r"\bibitem{a} X. \newblock Other."}))
    both = r"[START_REF] The H$\alpha$ line, Étoile[END_REF][START_REF] Second: work, van der Roe[END_REF]"
    assert text == f"See {both} and van der Roe."


MAIN = r"\documentclass{a}\usepackage{mine}\begin{document}\title{T}\input{parts/one}\include{two}\end{document}"
FILES: dict[str, str | bytes] = {
    "paper.tex": MAIN,
    "parts/one.tex": "First\\input{../../etc/passwd} \\own{part}.",
    "two.tex": "\\documentclass{x}\\begin{document}Second.\\end{document}",
    "mine.sty": r"\newcommand{\own}[1]{my #1}\def\small{\@setfontsize\small}",
    "old.tex": r"\documentclass{a}\begin{document}" + "Older version. " * 3 + r"\end{document}",
    "paper.bbl": "",
    "figure.png": b"\x89PNG\0",
}


@pytest.mark.parametrize("pack", [archive, lambda files: gzip.compress(archive(files))], ids=["tar", "gzip"])
def test_an_archive_is_read_from_its_main_file(pack: Callable[[dict[str, str | bytes]], bytes]) -> None:
    assert latex.read_archive(pack(FILES)) == "# T\n\nFirst my part.\n\nSecond."


def test_a_single_file_may_be_compressed_alone() -> None:
    document = r"\documentclass[latin1]{article}\begin{document}Schöne Käse\end{document}"
    assert latex.read_archive(gzip.compress(document.encode())) == "Schöne Käse"
    assert latex.read(document.encode("latin-1")) == "Schöne Käse"


def gzip_bomb() -> bytes:
    """1 GiB of zeros."""
    packer = zlib.compressobj(wbits=31)
    block = bytes(1 << 20)
    return b"".join([*(packer.compress(block) for _ in range(1024)), packer.flush()])


@pytest.mark.parametrize(
    "data,why",
    [
        (b"", "no latex"),
        (RANDOM, "binary"),
        (b"{" * 1_000_000, "no latex"),
        ("Käse ohne Befehle".encode("latin-1"), "no latex"),
        (gzip.compress(archive(FILES))[:-300], "broken gzip"),
        (b"\x1f\x8b" + RANDOM, "broken gzip"),
        (archive({"/etc/main.tex": MAIN}), "path out of the archive"),
        (archive({"../main.tex": MAIN, "main.tex": MAIN}), "path out of the archive"),
        (archive({"readme.txt": "no source"}), "no latex"),
        (archive({"a.tex": r"\begin{document}" + r"\input{a} x" * 20}), "too large"),
        (archive({f"f{n}.tex": rf"\begin{{document}}\input{{f{n + 1}}}" * 30 for n in range(30)}), "too large"),
        (gzip_bomb(), "too large"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_archives_that_are_none_are_refused(data: bytes, why: str) -> None:
    assert reason(latex.read_archive, data) == why


HOSTILE = [
    r"\begin{a}" * 20_000, r"\begin{figure}" * 10_000, "{" * 1_000_000, r"\footnote{" * 20_000, r"\foo[" * 100_000,
    r"\iffalse " * 50_000, r"\section{a " * 30_000, r"\begin{verbatim}" * 20_000, r"\verb|a" * 30_001, "#" * 300_000,
    "\\" * 500_000, r"\begin{tabular}{ll}a&b\\" * 3_000, r"\cite{" * 50_000, r"\newcommand{" * 30_000,
    r"\( x " * 30_000,
    r"(\ref{a}" * 50_000, r"\bibitem{" * 30_000, r"\caption{" * 20_000 + "}" * 20_000, r"\ifx a" * 50_000,
    r"\begin{thebibliography}{}\bibitem{k} " + "A, B. " * 50_000 + r"\end{thebibliography}\cite{k}",
]  # fmt: skip


@pytest.mark.parametrize("body", HOSTILE, ids=lambda body: body[:12])
def test_no_latex_hangs_the_reader(body: str) -> None:
    before = time.process_time()
    try:
        assert isinstance(tex(body), str)
    except Unreadable as refused:
        assert str(refused) in ("no text", "unbalanced latex", "no latex")
    assert time.process_time() - before < SECONDS


FRAGMENTS = r"""
    { } $ $$ \\ & # ~ % \[ \] \( \) [ ] word 1 ' `` \begin{itemize} \end{itemize} \item \begin{table} \end{table}
    \begin{tabular}{l} \end{tabular} \multicolumn{2}{c} \begin{align} \end{align} \label{a} \ref{a} \cite{a,b} \caption{
    \footnote{ \section{ \section* \textbf \def\x#1{ \x \newcommand{\y}[1] \y \let\x\y \iftrue \iffalse \else \fi \' \c
    \begin{verbatim} \end{verbatim} \verb| | \begin{figure} \end{figure} \begin{thm} \newtheorem{thm}{T} \SI{1}{ \ce{
    \begin{algorithmic} \If \end{algorithmic} \begin{deluxetable} \startdata \tablehead{ \bibitem{a} \newblock \par
    \begin{thebibliography} \end{document} \input{x} \newif\ifz \ifz \ztrue \xspace \ensuremath{ \begin{lstlisting}
""".split()


@settings(max_examples=300)
@given(st.lists(st.sampled_from(FRAGMENTS), max_size=60), st.sampled_from(["", " ", "\n", "\n\n"]))
def test_any_latex_is_read_or_refused(fragments: list[str], between: str) -> None:
    try:
        text = tex(between.join(["x", *fragments]))
    except Unreadable:
        return
    assert text and not re.search("[\ue000-\ue002]", text)


def test_sizes_are_bounded() -> None:
    assert source.MAX_TEXT < source.MAX_BYTES == 64 << 20
    assert reason(latex.read, rb"\begin{document}" + b"word " * source.MAX_TEXT) == "too large"
