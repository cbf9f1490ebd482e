from __future__ import annotations

import pytest

from orchestrator.data.readers import mathml, xml


def latex(inside: str, attributes: str = "") -> str:
    data = f'<math xmlns="http://www.w3.org/1998/Math/MathML" {attributes}>{inside}</math>'
    return mathml.latex(xml.parse(data.encode()))


@pytest.mark.parametrize(
    ("inside", "expected"),
    [
        ("<mi>E</mi><mo>=</mo><mi>m</mi><msup><mi>c</mi><mn>2</mn></msup>", "E = mc^2"),
        ("<mfrac><mn>1</mn><mrow><mi>α</mi><mi>b</mi></mrow></mfrac>", r"\frac{1}{\alpha b}"),
        ("<msubsup><mi>x</mi><mi>i</mi><mrow><mi>n</mi><mo>+</mo><mn>1</mn></mrow></msubsup>", "x_i^{n+1}"),
        ("<msup><mrow><mi>a</mi><mi>b</mi></mrow><mn>2</mn></msup>", "{ab}^2"),
        ("<msup><mi>f</mi><mo>′</mo></msup>", "f'"),
        ("<msqrt><mi>x</mi><mo>+</mo><mn>1</mn></msqrt>", r"\sqrt{x+1}"),
        ("<mroot><mi>x</mi><mn>3</mn></mroot>", r"\sqrt[3]{x}"),
        ("<munderover><mo>∑</mo><mrow><mi>i</mi><mo>=</mo><mn>1</mn></mrow><mi>n</mi></munderover>", r"\sum_{i = 1}^n"),
        ("<munder><mo>lim</mo><mrow><mi>x</mi><mo>→</mo><mn>0</mn></mrow></munder>", r"\lim_{x \to 0}"),
        ("<mover><mi>x</mi><mo>¯</mo></mover>", r"\bar{x}"),
        ("<mover><mrow><mi>A</mi><mi>B</mi></mrow><mo>¯</mo></mover>", r"\overline{AB}"),
        ("<mover><mo>→</mo><mtext>def</mtext></mover>", r"\overset{\text{def}}{\to}"),
        ("<munder><mi>x</mi><mo>⏟</mo></munder>", r"\underbrace{x}"),
        ("<mi>sin</mi><mi>θ</mi>", r"\sin\theta"),
        ("<mi>Re</mi><mo>≤</mo><mn>50</mn><mo>%</mo>", r"\mathrm{Re} \leq 50\%"),
        ('<mi mathvariant="bold">v</mi><mi mathvariant="double-struck">R</mi>', r"\mathbf{v}\mathbb{R}"),
        ("<mi>𝓖</mi><mi>ℒ</mi>", r"\mathcal{G}\mathcal{L}"),
        ("<mi>x</mi><mtext> if </mtext><mi>y</mi>", r"x\text{ if }y"),
        ("<mfenced open='[' close=')'><mi>a</mi><mi>b</mi></mfenced>", "[a,b)"),
        ("<mfenced><mi>a</mi></mfenced>", "(a)"),
        ("<mmultiscripts><mi>C</mi><mn>6</mn><none/><mprescripts/><none/><mn>14</mn></mmultiscripts>", "{}^{14}C_6"),
        ("<mi>f</mi><mo>\u2061</mo><mo>(</mo><mi>x</mi><mo>)</mo>", "f(x)"),
        ("<mi>a</mi><mphantom><mi>b</mi></mphantom><mspace width='1em'/><mo>)</mo>", "a)"),
        ("", ""),
    ],
)
def test_mathml_is_written_as_latex(inside: str, expected: str) -> None:
    assert latex(inside) == expected


def test_a_table_is_aligned_alone_and_a_matrix_among_others() -> None:
    table = (
        "<mtable><mtr><mtd><mi>a</mi></mtd><mtd><mi>b</mi></mtd></mtr><mtr><mtd><mi>c</mi></mtd><mtd/></mtr></mtable>"
    )
    assert latex(table) == r"\begin{aligned} a & b \\ c & \end{aligned}"
    assert latex(f"<mo>(</mo>{table}<mo>)</mo>") == r"(\begin{matrix} a & b \\ c & \end{matrix})"


def test_tex_that_comes_with_the_formula_is_taken_as_it_is() -> None:
    tex = '<annotation encoding="application/x-tex">x_{\\mathrm{in}}</annotation>'
    assert latex(f"<semantics><mi>x</mi>{tex}</semantics>") == r"x_{\mathrm{in}}"


@pytest.mark.parametrize("tag", ["mfrac", "msup", "msubsup", "mover", "munder", "munderover", "mroot", "mmultiscripts"])
def test_missing_arguments_are_empty(tag: str) -> None:
    for inside in ("", "<mi>x</mi>"):
        written = latex(f"<{tag}>{inside}</{tag}>")
        assert ("x" in written) == bool(inside)
        assert written.count("{") == written.count("}")
