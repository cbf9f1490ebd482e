"""LaTeX from the bytes of a submission to blocks of Markdown; readers/latex.py puts the parts together."""
