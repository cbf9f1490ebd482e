"""The `notify` section of a recipe."""

from __future__ import annotations

from typing import Literal, Self, get_args

from pydantic import Field, model_validator

from orchestrator.config_section import Positive, Section

Kind = Literal["finished", "stopped", "failed", "hang", "node_quarantined", "waiting", "storage_low"]
KINDS: tuple[Kind, ...] = get_args(Kind)


class NotifyConfig(Section):
    """Whom to tell of what a person should know. A message that cannot be sent is logged, and stops nothing."""

    webhook: str | None = None
    """http(s) URL that gets a POST of JSON: `text`, as Slack and its kin read it, and `run`, `kind`, `time` and facts.
    $NAME is read from the driver's environment when it is used, and stored nowhere: give a secret URL so."""
    command: tuple[str, ...] = ()
    """A program and its arguments that get the same JSON on standard input, on the driver's machine."""
    events: tuple[Kind, ...] = Field(default=KINDS, min_length=1)
    """Of these. The run has finished, was stopped or has failed; it hangs; a node is left out for good; devices have
    been waited for; storage is about to be full."""
    waiting_minutes: Positive = 10.0
    """A wait for devices that lasts so long is told of, once."""

    @model_validator(mode="after")
    def a_webhook_is_a_url(self) -> Self:
        # Not a validator of the field: messages of those show the value.
        if self.webhook is not None and not self.webhook.startswith(("http://", "https://", "$")):
            raise ValueError("webhook: give an http:// or https:// URL, or $NAME of an environment variable with one")
        return self
