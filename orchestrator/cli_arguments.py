"""Arguments and options that several verbs of the command line share."""

from __future__ import annotations

from typing import Annotated

import typer

RecipePath = Annotated[str, typer.Argument(metavar="RECIPE", help="YAML file; jobs/recipes/ has examples")]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="[key=value]...", help="as in train.lr=1e-4")]
RunPath = Annotated[str, typer.Argument(metavar="RUN", help="run directory, local or s3://")]
Address = Annotated[str | None, typer.Option(help="Ray cluster to use; without it one is started on this machine")]
AsJson = Annotated[bool, typer.Option("--json", help="print JSON")]
