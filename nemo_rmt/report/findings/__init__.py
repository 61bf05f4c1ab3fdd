"""What happened, in plain sentences: every claim is chosen by the run's numbers."""

from __future__ import annotations

from nemo_rmt.report.findings.finding import Finding
from nemo_rmt.report.findings.pretraining import pretraining
from nemo_rmt.report.findings.remit import remit
from nemo_rmt.report.findings.rl import reinforcement
from nemo_rmt.report.findings.rmt import mid_training
from nemo_rmt.report.run import Run

__all__ = ["Finding", "all_findings"]


def all_findings(run: Run) -> list[Finding]:
    """In the order of the run; a stage without numbers has none."""
    found = [pretraining(run)]
    for iteration in range(run.num_iterations):
        found.append(remit(run, iteration, run.tasks))
        found.append(mid_training(run, iteration))
        found.extend(reinforcement(run, iteration, task) for task in run.tasks)
    return [finding for finding in found if finding is not None]
