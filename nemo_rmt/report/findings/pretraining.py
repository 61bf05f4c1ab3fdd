"""What pre-training learned."""

from __future__ import annotations

import math

from nemo_rmt.report.findings.finding import Finding
from nemo_rmt.report.run import Run, domains
from nemo_rmt.report.tables import Table


def pretraining(run: Run) -> Finding | None:
    """The pre-trained model's held-out nll against the unigram model's."""
    stage, data = run.stage(0, "evaluate"), run.stage(0, "data")
    metrics = {**data.metrics, **stage.metrics}
    rows = []
    for domain in domains(metrics):
        nll, unigram = metrics.get(f"pretrain/lm/{domain}/nll"), metrics.get(f"lm/{domain}/unigram_nll")
        if nll is not None and unigram is not None:
            rows.append((domain, nll, unigram))
    if not rows:
        return None
    domain, nll, unigram = next((row for row in rows if row[0] == "all"), rows[-1])
    where = "held-out text" if domain == "all" else f"held-out text of {domain}"
    better = nll < unigram
    conclusion = (
        f"Pre-training learned more than how frequent tokens are: {unigram - nll:.3f} nats per token better than a "
        f"unigram model."
        if better
        else "Pre-training has not learned more than how frequent tokens are."
    )
    details = (
        f"On {where} the model needs {nll:.3f} nats per token (perplexity {math.exp(nll):.1f}); a unigram model of the "
        f"training text needs {unigram:.3f} ({math.exp(unigram):.1f})."
    )
    table = Table(
        ["domain", "pre-trained, nats per token", "unigram model", "difference"],
        [[name, f"{nll:.3f}", f"{unigram:.3f}", f"{nll - unigram:+.3f}"] for name, nll, unigram in rows],
        [f"{stage.folder}/result.json"],
    )
    verdict = "beats unigram" if better else "not better than unigram"
    return Finding("pre-training", 0, "Pre-training", verdict, conclusion, details, [table])
