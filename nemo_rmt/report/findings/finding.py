"""What a finding is."""

from __future__ import annotations

from dataclasses import dataclass, field

from nemo_rmt.report.tables import Table


@dataclass(frozen=True)
class Finding:
    """One paragraph of the page.

    topic: pre-training, ReMiT, RMT or RL. iteration: the one it is about. verdict: a word or two for the margin.
    conclusion: what the numbers say, in a sentence. details: the numbers, in sentences. tables: below them.
    """

    topic: str
    iteration: int
    title: str
    verdict: str
    conclusion: str
    details: str = ""
    tables: list[Table] = field(default_factory=list)

    @property
    def text(self) -> str:
        """Conclusion and details."""
        return f"{self.conclusion} {self.details}".strip()
