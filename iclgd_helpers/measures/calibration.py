"""
The calibrated reading of predictions: what a question adds to an arm's prior over the labels.

An arm answers some labels more readily than others, whatever is asked. Taking that prior off leaves the evidence:
log p(label | question) − log p(label). Zhao et al. 2021 take the prior of texts without content, Fei et al. 2023 of
random words of the task's domain. Zhou et al. 2023 take the mean over a batch of unlabelled questions.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import log_softmax, logsumexp

Floats = NDArray[np.float64]


def log_prior(log_probabilities: ArrayLike) -> Floats:
    """
    An arm's prior: log of its mean label distribution over texts, `[class]`, nats.

    Parameters
    ----------
    log_probabilities : `[text, class]`, nats, of the labels; of any normalisation. No label of a text is needed.
    """
    among_labels = log_softmax(np.asarray(log_probabilities, float), axis=-1)
    prior: Floats = logsumexp(among_labels, axis=0) - np.log(len(among_labels))
    return prior


def calibrated(log_probabilities: ArrayLike, prior: ArrayLike) -> Floats:
    """
    Log-probabilities with the prior taken off and normalised among the labels; `[question, class]`, nats.

    Parameters
    ----------
    log_probabilities : `[question, class]`, nats.
    prior : `[class]`, as `log_prior` gives it for the same arm.
    """
    evidence: Floats = log_softmax(np.asarray(log_probabilities, float) - np.asarray(prior, float), axis=-1)
    return evidence


def shifted(before: ArrayLike, after: ArrayLike, prior_before: ArrayLike, prior_after: ArrayLike) -> NDArray[np.bool_]:
    """
    Which predictions change when the prior, the evidence, or both become those of another arm; `[3, question]`.

    An arm's log-probabilities are evidence plus prior. Row 0: the prior alone is exchanged. Row 1: the evidence alone.
    Row 2: both, which is the change that is seen.

    Parameters
    ----------
    before, after : log-probabilities of two arms, `[question, class]`, nats.
    prior_before, prior_after : their priors, `[class]`, nats.
    """
    a, b = np.asarray(before, float), np.asarray(after, float)
    difference = np.asarray(prior_after, float) - np.asarray(prior_before, float)
    others = np.stack([a + difference, b - difference, b]).argmax(-1)
    changed: NDArray[np.bool_] = others != a.argmax(-1)
    return changed


def by_prior(prior_alone: ArrayLike, evidence_alone: ArrayLike, both: ArrayLike) -> Floats:
    """
    Share of all predictions that change by a shift of the prior: the mean of its effect taken first and taken last.

    The rest of `both` comes from a change of evidence. The two shares are the Shapley values of the two exchanges, so
    they add up to the changes that are seen. A negative share undoes changes that the other one makes.

    Parameters
    ----------
    prior_alone, evidence_alone, both : means over questions of the rows of `shifted`.
    """
    first, without, whole = (np.asarray(mean, float) for mean in (prior_alone, evidence_alone, both))
    share: Floats = (first + whole - without) / 2
    return share
